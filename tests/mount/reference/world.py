"""A mount, its stores, and the reference; every operation is compared at once."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelfs.control import ControlClient
from modelfs.errors import MountError
from modelfs.holder import QUICK_SECONDS
from modelfs.testing.faults import FaultProxy
from tests.cache import damage
from tests.mount.actor import Actor, Status
from tests.mount.harness import Mounted, alone, eventually, mounted, open_directory
from tests.mount.reference.stores import EXCUSES, Disk, Store, Web
from tests.mount.reference.tree import (
    ALWAYS,
    NAMES,
    File,
    Link,
    Tree,
    children,
    kind_of,
    resolved,
    shown,
    status_of,
    tidied,
)
from tests.origin import Origin

DEADLINE = 4
"""Seconds of ``read_deadline``: so long readers wait for a store that is out of order."""

CACHE = 40 << 20
"""Bytes; less than the largest trees have, so that room must be made."""

Operation = tuple[Any, ...]
"""The name of a method of `World`, and its arguments."""


@dataclass(slots=True)
class Handle:
    """An open file: what it may be; more than one version only after a daemon died."""

    model: str
    path: str
    versions: list[File]
    direct: bool


@dataclass
class World:
    """A mount, its stores, the process that reads, and the reference."""

    mount: Mounted
    actor: Actor
    stores: Mapping[str, Store]
    done: Counter[str] = field(default_factory=Counter)
    """How often each operation was compared, and how often an error had an excuse."""

    def __post_init__(self) -> None:
        self.kernel = self.mount.status()["transport"]["name"] == "kernel"
        self._client = ControlClient(next((self.mount.path.parent / "run").glob("*.sock")))
        self._trees: dict[str, dict[str, File | Link]] = {model: {**ALWAYS} for model in self.stores}
        self._possible: dict[str, list[Tree]] = {model: [ALWAYS] for model in self.stores}
        self._moving = False
        """Whether a daemon that took over may still be resolving: it may show what the store has by now."""
        self._handles: dict[int, Handle] = {}
        self._names: dict[int, tuple[str, File | Link | None]] = {}
        self._inodes: dict[tuple[str, File | Link | None], int] = {}
        self._serial = itertools.count(1)
        self._born = 0.0

    def play(self, operations: Iterable[Operation]) -> None:
        """Do each operation and compare; AssertionError if the mount is not as the reference."""
        for name, *args in operations:
            OPERATIONS[name](self, *args)
            self.done[name] += 1

    def start_over(self) -> None:
        """Close what is open and empty the stores."""
        for number in list(self._handles):
            self.close(number)
        self.mend()
        for model in self._trees:
            self._publish(model, {**ALWAYS})
        self.refresh()

    # -- what may be ---------------------------------------------------------------------------------------

    def _excuses(self, model: str, path: str, versions: Iterable[File]) -> set[int]:
        """Return the errnos that a reader of these versions may get."""
        store, found = self.stores[model], set()
        if store.outage is not None:
            found.add(EXCUSES[store.outage])
        if any(version in store.suspects for version in versions):
            found.add(errno.EIO)
        there = resolved(self._trees[model], path)
        if any(version != there for version in versions):
            found.add(errno.ESTALE)
        return found

    def _choose(self, model: str, index: int) -> str | None:
        """Return a path of a file that may be shown."""
        paths = sorted(
            {p for tree in self._possible[model] for p, node in tree.items() if isinstance(node, File)}
        )
        return paths[index % len(paths)] if paths else None

    def _somewhere(self, model: str, index: int) -> str:
        """Return a path in the model, of a file, link or directory, or one that is not there."""
        paths, links = {"", *NAMES}, set()
        for tree in self._possible[model]:
            links |= {f"{path}/" for path, node in tree.items() if isinstance(node, Link)}
            for path in tree:
                paths |= {path, f"{path}/config.json", f"{path}x", *map(str, Path(path).parents)} - {"."}
        direct = sorted(path for path in paths if not any(path.startswith(link) for link in links))
        return direct[index % len(direct)]

    def _place(self, model: str, path: str) -> str:
        return os.path.join(self.mount.path, model, path) if path else os.path.join(self.mount.path, model)

    # -- the stores ----------------------------------------------------------------------------------------

    def _publish(self, model: str, tree: dict[str, File | Link]) -> None:
        self._trees[model] = tidied(tree)
        self.stores[model].publish(self._trees[model])
        if self._moving:
            self._possible[model].append(shown(self._trees[model]))

    def _without(self, model: str, path: str) -> dict[str, File | Link]:
        """Return the tree with room for something at `path`."""
        return {
            other: node
            for other, node in self._trees[model].items()
            if not (other == path or other.startswith(f"{path}/") or path.startswith(f"{other}/"))
        }

    def put(self, model: str, path: str, seed: int, size: int, digest: bool) -> None:
        """Publish a file at the store; nobody has been told yet."""
        file = File(seed, size, digest) if model == "web" else File(seed, size, serial=next(self._serial))
        self._publish(model, {**self._without(model, path), path: file})

    def link(self, path: str, index: int) -> None:
        """Make a symbolic link, in the directory."""
        there = self._trees["disk"]
        targets = sorted({*there, *map(os.path.dirname, there)} - {"", path})
        if targets:
            self._publish("disk", {**self._without("disk", path), path: Link(targets[index % len(targets)])})

    def remove(self, model: str, index: int) -> None:
        """Remove a file at the store."""
        paths = sorted(self._trees[model].keys() - ALWAYS.keys())
        if paths:
            self._publish(
                model, {p: n for p, n in self._trees[model].items() if p != paths[index % len(paths)]}
            )

    def rename(self, model: str, index: int, path: str) -> None:
        """Rename a file at the store."""
        paths = sorted(self._trees[model].keys() - ALWAYS.keys())
        if paths:
            moved = self._trees[model][paths[index % len(paths)]]
            rest = {p: n for p, n in self._without(model, path).items() if p != paths[index % len(paths)]}
            self._publish(model, {**rest, path: moved})

    def refresh(self) -> None:
        """Have the mount show what the stores have now."""
        eventually(self._refreshed, 60)
        self._moving = False
        self._possible = {model: [shown(tree)] for model, tree in self._trees.items()}

    def _refreshed(self) -> bool:
        try:
            models = self._client.refresh()["models"]
        except MountError:  # the successor of one that was killed is still to come
            assert self._moving, "no daemon answers"
            return False
        assert [model["why"] for model in models] == [None] * len(models)
        return True

    # -- names ---------------------------------------------------------------------------------------------

    def stat(self, model: str, index: int) -> None:
        path = self._somewhere(model, index)
        expected = {status_of(tree, path) for tree in self._possible[model]}
        found = self.actor.attempt("status", self._place(model, path))
        if isinstance(found, OSError):
            assert found.errno in expected, f"{path}: {found}, not {expected}"
            return
        assert found[:3] in expected, f"{path}: {found}, not {expected}"
        self._same_inode(model, path, found)

    def _same_inode(self, model: str, path: str, found: Status) -> None:
        """Compare with what had this inode before: one version of one file, or one directory."""
        if len(self._possible[model]) == 1:
            name = f"{model}/{path}", self._possible[model][0].get(path)
            assert self._names.setdefault(found.ino, name) == name, f"two have the inode {found.ino}"
            assert self._inodes.setdefault(name, found.ino) == found.ino, f"{name} has got another inode"

    def listing(self, model: str, index: int) -> None:
        path = self._somewhere(model, index)
        expected = [
            children(tree, path) if kind_of(tree, path) == "directory" else status_of(tree, path)
            for tree in self._possible[model]
        ]
        found = self.actor.attempt("names", self._place(model, path))
        if isinstance(found, OSError):
            wrong = {
                errno.ENOTDIR if isinstance(e, tuple) else e for e in expected if not isinstance(e, dict)
            }
            # What is behind a link to a directory is listed too.
            assert found.errno in wrong, f"{path}: {found}, not {expected}"
            return
        if any(kind_of(tree, path) == "link" for tree in self._possible[model]):
            return
        assert {name.name: name.kind for name in found} in expected, f"{path}: {found}, not {expected}"
        assert [name.name for name in found] == sorted(name.name for name in found)
        for name in found[:3] if len(self._possible[model]) == 1 else ():
            status: Status = self.actor.do("status", self._place(model, os.path.join(path, name.name)))
            assert status.ino == name.ino, f"{path}/{name}: {status}"

    def list_in_pieces(self, model: str, index: int, room: int, back: Sequence[int]) -> None:
        directories = sorted(
            {os.path.dirname(path) for tree in self._possible[model] for path in tree} | {""}
        )
        path = directories[index % len(directories)]
        expected = [[*children(tree, path)] for tree in self._possible[model]]
        found = self.actor.attempt("pieces", self._place(model, path), room, list(back))
        if isinstance(found, OSError):
            assert not all(expected), f"{path}: {found}"
            return
        assert found in expected, f"{path}: {found}, not {expected}"

    def access(self, model: str, index: int, mode: int) -> None:
        path = self._somewhere(model, index)
        kinds = {kind_of(tree, path) for tree in self._possible[model]}
        if kinds <= {"file", "directory", None}:
            expected = {
                kind is not None and not mode & os.W_OK and not (mode & os.X_OK and kind == "file")
                for kind in kinds
            }
            assert self.actor.do("access", self._place(model, path), mode) in expected, f"{path}: {kinds}"

    def readlink(self, model: str, index: int) -> None:
        path = self._somewhere(model, index)
        for tree in self._possible[model][:1] if len(self._possible[model]) == 1 else ():
            node = tree.get(path)
            if isinstance(node, Link):
                assert self.actor.do("readlink", self._place(model, path)) == node.target
            elif kind_of(tree, path) is not None:
                found = self.actor.attempt("readlink", self._place(model, path))
                if isinstance(found, OSError):
                    assert found.errno == errno.EINVAL, f"{path}: {found}"
                else:
                    raise AssertionError(f"{path} is read as a link: {found}")

    # -- contents ------------------------------------------------------------------------------------------

    def whole(self, model: str, index: int) -> None:
        """Open a file, read all of it and close it."""
        path = self._choose(model, index)
        if path is None:
            return
        found = [status_of(tree, path) for tree in self._possible[model]]
        versions = [node for tree in self._possible[model] if isinstance(node := tree.get(path), File)]
        data = self.actor.attempt("whole", self._place(model, path))
        if isinstance(data, OSError):
            missing = (
                {errno.EISDIR if isinstance(row, tuple) else row for row in found}
                if len(found) > 1
                else set()
            )
            self._excused(data, {*self._excuses(model, path, versions), *missing}, path)
        else:
            assert any(data == version.content for version in versions), _difference(path, 0, data, versions)
            self._cleared(model, versions)

    def open(self, number: int, model: str, index: int, flags: int) -> None:
        """Open a file and keep it open under `number`, instead of what was open there."""
        self.close(number)
        path = self._choose(model, index)
        if path is None:
            return
        found = [status_of(tree, path) for tree in self._possible[model]]
        versions = [node for tree in self._possible[model] if isinstance(node := tree.get(path), File)]
        perhaps_directory = any(row[0] == "directory" for row in found if isinstance(row, tuple))
        size = self.actor.attempt("open_as", number, self._place(model, path), flags)
        if isinstance(size, OSError):
            missing = {row for row in found if isinstance(row, int)}
            if perhaps_directory and flags & os.O_DIRECT:
                missing.add(errno.EINVAL)  # open(2) of a directory with O_DIRECT
            self._excused(size, {*self._excuses(model, path, versions), *missing}, path)
            return
        if perhaps_directory:
            self.actor.do("close", number)  # perhaps that is what it is: directories are opened too
            return
        fitting = [version for version in versions if version.size == size]
        assert fitting, f"{path} has {size} bytes, not those of {versions}"
        self._handles[number] = Handle(model, path, fitting, bool(flags & os.O_DIRECT))

    def reopen(self, number: int) -> None:
        """Open what is at the same path now."""
        handle = self._handles.get(number)
        paths = (
            sorted(
                {p for tree in self._possible[handle.model] for p, n in tree.items() if isinstance(n, File)}
            )
            if handle
            else []
        )
        if handle is not None and handle.path in paths:
            self.open(number, handle.model, paths.index(handle.path), 0)

    def close(self, number: int) -> None:
        if self._handles.pop(number, None) is not None:
            self.actor.do("close", number)

    def read(self, number: int, way: str, at: float, length: int) -> None:
        """Read from an open file, from a fraction `at` of its size on, which may lie behind its end."""
        handle = self._handles.get(number)
        if handle is None:
            return
        offset = int(at * handle.versions[0].size)
        if handle.direct and not way.startswith("mapped"):
            way = "direct"  # the others' memory and spans are not aligned
        data = self.actor.attempt("read", number, way, offset, length)
        if isinstance(data, OSError):
            excuses = self._excuses(handle.model, handle.path, handle.versions)
            if excuses and way.startswith("mapped"):
                excuses.add(errno.EIO)  # a page fault has no other
            self._excused(data, excuses, handle.path)
            return
        fitting = [v for v in handle.versions if v.content[offset : offset + length] == data]
        assert fitting, f"{way}: {_difference(handle.path, offset, data, handle.versions, length)}"
        handle.versions = fitting
        if length:
            self._cleared(handle.model, fitting)

    def seek(self, number: int, at: float, whence: int) -> None:
        """Look for data or a hole: all of a file is data."""
        handle = self._handles.get(number)
        if handle is None:
            return
        size = handle.versions[0].size
        offset = int(at * size)
        found = self.actor.attempt("seek", number, offset, whence)
        if not isinstance(found, OSError):
            assert offset < size, f"{handle.path}: after its end is something at {found}"
            assert found == (offset if whence == os.SEEK_DATA else size), handle.path
        elif offset < size or found.errno != errno.ENXIO:
            # The kernel asks the daemon, and a successor may not know what the store has no more.
            excuses = self._excuses(handle.model, handle.path, handle.versions) & {errno.ESTALE}
            self._excused(found, excuses, handle.path)

    def advise(self, number: int, advice: int) -> None:
        if number in self._handles:
            self.actor.do("advise", number, advice)

    def _excused(self, error: OSError, excuses: set[int], path: str) -> None:
        allowed = {errno.errorcode[number] for number in excuses}
        assert error.errno in excuses, f"{path}: {error}; allowed is {allowed or 'no error'}"
        self.done[f"excused {errno.errorcode[error.errno or 0]}"] += 1

    def _cleared(self, model: str, versions: Sequence[File]) -> None:
        """Note that content could be read: what has a digest is checked before the first of its bytes."""
        self.stores[model].suspects.difference_update(versions)

    # -- trouble -------------------------------------------------------------------------------------------

    def strike(self, kinds: Sequence[str]) -> None:
        """Break the next answers with content."""
        store = self.stores["web"]
        assert isinstance(store, Web)
        store.strike(kinds)

    def outage(self, kind: str) -> None:
        """Break every answer with content until `mend`."""
        store = self.stores["web"]
        assert isinstance(store, Web)
        store.outage = kind

    def mend(self) -> None:
        store = self.stores["web"]
        assert isinstance(store, Web)
        store.outage = None
        store.strike(())

    def kill(self) -> None:
        """Kill the daemon; what comes next waits for its successor."""
        if not self.kernel:
            return
        # One that dies young is taken for one that cannot live; that is another test's.
        eventually(lambda: self._pid() and time.monotonic() - self._born > QUICK_SECONDS + 1, 60)
        for model, tree in self._trees.items():
            self._possible[model].append(shown(tree))
        self._moving = True
        os.kill(self._pid(), signal.SIGKILL)
        self._born = time.monotonic()

    def kill_in_refresh(self, seconds: float) -> None:
        """Kill the daemon while it takes up what the stores have now, `seconds` after it was asked to."""
        if not self.kernel:
            return
        asking = threading.Thread(target=self._ask)
        eventually(lambda: self._pid() and time.monotonic() - self._born > QUICK_SECONDS + 1, 60)
        asking.start()
        time.sleep(seconds)
        self.kill()
        asking.join()

    def _ask(self) -> None:
        with contextlib.suppress(MountError):
            self._client.refresh()

    def _pid(self) -> int:
        try:
            return int(self._client.status()["pid"])
        except MountError:
            return 0

    def drop(self, what: int) -> None:
        """Have the kernel forget pages (1), names and inodes (2), or both (3)."""
        Path("/proc/sys/vm/drop_caches").write_text(str(what))

    def wipe(self) -> None:
        """Delete every file of the cache."""
        for path in self._cached():
            path.unlink(missing_ok=True)
            path.with_suffix(".table").unlink(missing_ok=True)

    def rot(self, at: float, punch: bool) -> None:
        """Change bytes of every complete file of the cache, and have it verified.

        Nothing is read in between: nobody can tell then. What is open heals as long as the store has it.
        """
        if any(self._excuses(h.model, h.path, h.versions) for h in self._handles.values()):
            return
        eventually(self._pid, 60)  # a successor answers readers before it can be asked to verify
        hit = 0
        for path in self._cached():
            facts = path.stat()
            if facts.st_size and not facts.st_mode & 0o200:  # others are being written
                offset = int(at * facts.st_size)
                _punch(path, offset) if punch else damage(path, offset)
                hit += 1
        bad = self._client.verify(None, lambda _: None)["bad"] if hit else []
        self.done["rotten objects"] += len(bad)
        for number, handle in self._handles.items():
            eventually(lambda: self._heals(number, handle))  # noqa: B023  # called at once

    def _heals(self, number: int, handle: Handle) -> bool:
        self.advise(number, os.POSIX_FADV_DONTNEED)
        way = "direct" if handle.direct else "pread"
        data = self.actor.attempt("read", number, way, 0, handle.versions[0].size)
        if isinstance(data, OSError):
            assert data.errno == errno.EIO, data
        return any(version.content == data for version in handle.versions)

    def _cached(self) -> list[Path]:
        return sorted((self.mount.cache / "objects").glob("*/*.data"))


def _punch(path: Path, offset: int) -> None:
    """Make a hole of a page, as a file system loses one."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        start = offset - offset % 4096
        file.seek(start)
        file.write(bytes(min(4096, path.stat().st_size - start)))
    path.chmod(0o400)


def _difference(
    path: str, offset: int, data: bytes, versions: Sequence[File], length: int | None = None
) -> str:
    """Return in words how `data` differs from each version."""
    words = [f"{path} from {offset} on: {len(data)} bytes"]
    for version in versions:
        wanted = version.content[offset : None if length is None else offset + length]
        wrong = [at for at, (a, b) in enumerate(zip(data, wanted, strict=False)) if a != b]
        where = f", {len(wrong)} wrong from {offset + wrong[0]} to {offset + wrong[-1]}" if wrong else ""
        words.append(f"{version}: {len(wanted)} bytes{where}")
    return "; ".join(words)


OPERATIONS: Mapping[str, Callable[..., None]] = {
    operation.__name__: operation
    for operation in (
        *(World.put, World.link, World.remove, World.rename, World.refresh),
        *(World.stat, World.listing, World.list_in_pieces, World.access, World.readlink),
        *(World.whole, World.open, World.reopen, World.close, World.read, World.seek, World.advise),
        *(
            World.strike,
            World.outage,
            World.mend,
            World.kill,
            World.kill_in_refresh,
            World.drop,
            World.wipe,
            World.rot,
        ),
    )
}


@contextmanager
def world(transport: str) -> Iterator[World]:
    """Mount two empty models and yield the world of them."""
    with ExitStack() as stack:
        place = stack.enter_context(open_directory())
        origin = stack.enter_context(Origin({}))
        web, disk = Web(origin), Disk(place / "disk")
        for store in (web, disk):
            store.publish(ALWAYS)
        proxy = stack.enter_context(FaultProxy(origin.url.rstrip("/"), web.choose))
        mount = stack.enter_context(
            mounted(
                place,
                *("--refresh", "0", "--cache-size", str(CACHE)),
                sources={"web": f"{proxy.url}/", "disk": f"file://{place}/disk"},
                env={**alone(place), "MODELFS_READ_DEADLINE": f"{DEADLINE}s"},
                transport=transport,
            )
        )
        mount.allowed_errors += [
            "do not have the published digest",
            "the next one takes the mount over",
            r"ERROR modelfs\.fetch\.scrub",
        ]
        actor = stack.enter_context(Actor())
        yield World(mount, actor, {"web": web, "disk": disk})
