"""``modelfs.lock``: what every file of every model has to be; docs/integrity.md describes the format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelfs.errors import ConfigError, NotLocked
from modelfs.types import Digest, Entry, Snapshot

VERSION = 1
"""Of the format; another one is refused."""

STRONG = frozenset({"sha256", "sha512"})
"""Digests for which nobody can make other content: the others only find accidents."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """What one file or symbolic link has to be.

    Attributes:
        size: bytes.
        digest: of the content, if it is known.
        version: its name at its store; used only where there is no digest.
        target: of a symbolic link; empty for a file.

    """

    size: int = 0
    digest: Digest | None = None
    version: str = ""
    target: str = ""

    @classmethod
    def of(cls, entry: Entry) -> Pinned:
        """Return what pins `entry`: its digest if it has one, else its version."""
        if entry.kind == "symlink":
            return cls(target=entry.target)
        return cls(entry.size, entry.digest, "" if entry.digest else entry.version)

    @property
    def strong(self) -> bool:
        """Whether nobody can make other content that fits."""
        return self.digest is not None and self.digest.algorithm in STRONG

    def to_json(self) -> dict[str, Any]:
        """Return its row in the file."""
        if self.target:
            return {"target": self.target}
        mark = {"digest": str(self.digest)} if self.digest else {"version": self.version}
        return {"size": self.size, **mark}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Pinned:
        """Return what `to_json` wrote; KeyError, TypeError or ValueError if it did not."""
        if "target" in row:
            return cls(target=str(row["target"]))
        digest = Digest.parse(row["digest"]) if "digest" in row else None
        return cls(int(row["size"]), digest, "" if digest else str(row["version"]))

    def fault(self, entry: Entry, *, same_store: bool) -> str | None:
        """Return how `entry` differs, ``expected …, found …``; None if it does not.

        A digest of another algorithm than the store's is compared when the bytes arrive.
        """
        told = entry.digest
        if entry.kind == "symlink" or self.target:
            wanted, found = f"a link to {self.target!r}", f"a link to {entry.target!r}"
            if not self.target:
                wanted = f"a file of {self.size} bytes"
            elif entry.kind != "symlink":
                found = f"a file of {entry.size} bytes"
        elif entry.size != self.size:
            wanted, found = f"{self.size} bytes", f"{entry.size} bytes"
        elif self.digest and told and told.algorithm == self.digest.algorithm:
            wanted, found = str(self.digest), str(told)
        elif self.digest:
            return None
        elif same_store:
            wanted, found = f"version {self.version}", f"version {entry.version}"
        else:
            return "it is locked by its version at another store: run modelfs lock without --no-download"
        return None if wanted == found else f"expected {wanted}, found {found}"


@dataclass(frozen=True, slots=True)
class LockedModel:
    """One model: where it was resolved, to what `revision`, and its files and links by path."""

    source: str
    revision: str
    files: Mapping[str, Pinned]

    @classmethod
    def of(cls, snapshot: Snapshot) -> LockedModel:
        """Return what pins everything in `snapshot`; directories are what is in them."""
        files = {
            path: Pinned.of(entry) for path, entry in snapshot.entries.items() if entry.kind != "directory"
        }
        return cls(snapshot.url, snapshot.revision, files)

    def faults(self, snapshot: Snapshot) -> Iterator[str]:
        """Yield how `snapshot` differs, file by file."""
        shown = {path: entry for path, entry in snapshot.entries.items() if entry.kind != "directory"}
        for path in sorted(self.files.keys() | shown.keys()):
            pinned, entry = self.files.get(path), shown.get(path)
            if entry is None:
                yield f"{path}: expected by the lock, not found"
            elif pinned is None:
                yield f"{path}: found, but not in the lock"
            elif fault := pinned.fault(entry, same_store=snapshot.url == self.source):
                yield f"{path}: {fault}"


@dataclass(frozen=True, slots=True)
class Lock:
    """The content of one lock file: `path` is where it lies, `models` are its models by name."""

    path: Path
    models: Mapping[str, LockedModel]

    def hold(self, name: str, snapshot: Snapshot) -> Snapshot:
        """Return `snapshot` of the model `name` with the digests of the lock, so that bytes are held to them.

        The revision may be another one as long as every file is the same.

        Raises:
            NotLocked: the lock does not have the model, or `snapshot` differs from what it has.

        """
        model = self.models.get(name)
        if model is None:
            raise NotLocked(f"{self.path} does not have the model {name}: add it with modelfs lock")
        if not snapshot.complete:
            raise NotLocked(f"{snapshot.url} is too large to list, and cannot be compared with {self.path}")
        faults = list(model.faults(snapshot))
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise NotLocked(
                f"{faults[0]}{more}: {snapshot.url} is not what {self.path} says; modelfs lock accepts it"
            )
        entries = {
            path: replace(entry, digest=pinned.digest or entry.digest)
            if (pinned := model.files.get(path)) is not None
            else entry
            for path, entry in snapshot.entries.items()
        }
        return replace(snapshot, entries=entries)

    def write(self) -> None:
        """Put the lock into its file, at once or not at all.

        Raises:
            ConfigError: it cannot be written.

        """
        models = {
            name: {
                "source": model.source,
                "revision": model.revision,
                "files": {path: pinned.to_json() for path, pinned in sorted(model.files.items())},
            }
            for name, model in sorted(self.models.items())
        }
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            new.write_text(json.dumps({"version": VERSION, "models": models}, indent=2) + "\n")
            new.replace(self.path)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be written: {error.strerror}: name another file with --output"
            ) from error

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Return the lock in the file `path`.

        Raises:
            ConfigError: it cannot be read, or is no lock of this version.

        """
        try:
            content = path.read_bytes()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConfigError(f"{path}: cannot be read: {reason}: make it with modelfs lock") from error
        try:
            data = json.loads(content)
            if data["version"] != VERSION:
                raise ConfigError(
                    f"{path}: it has version {data['version']!r}, not {VERSION}: make it with modelfs lock"
                )
            models = {
                name: LockedModel(
                    str(model["source"]),
                    str(model["revision"]),
                    {file: Pinned.from_json(row) for file, row in model["files"].items()},
                )
                for name, model in data["models"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not a lock of modelfs: make it with modelfs lock") from error
        return cls(path, models)
