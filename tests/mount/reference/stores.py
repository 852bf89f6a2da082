"""The stores of the two models, and how one of them fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from modelfs.testing.faults import Asked, Fault
from modelfs.types import BLOCK
from tests.mount.reference.tree import File, Link, Tree
from tests.origin import Origin

EXCUSES: Mapping[str, int] = {"closed": errno.EIO, "gone": errno.ESTALE, "unauthorized": errno.EACCES}
"""How a store can be out of order → what readers get meanwhile, as docs/reliability.md has it."""

PASSING = ("reset", "reset-in-body", "closed", "truncated", "status-503", "status-429", "silence", "trickle")
"""Faults that may come in a row: they are tried again until the deadline, or bring the reader forward."""

ONCE = (
    *("wrong-range", "malformed-range", "no-http", "extra-bytes", "longer-body", "range-ignored"),
    *("wrong-total", "part-as-whole", "etag-changed", "gone", "expired"),
)
"""Faults that one more attempt helps against."""


class Web:
    """The store of ``web``: an HTTP server, and what is broken of its answers."""

    def __init__(self, origin: Origin) -> None:
        self.outage: str | None = None
        self.suspects: set[File] = set()
        """Versions of which wrong bytes were sent."""
        self._origin = origin
        self._strike: Iterator[str] = iter(())
        self._struck: set[tuple[str, File]] = set()
        self._tree: Tree = {}

    def publish(self, tree: Tree) -> None:
        self._tree = tree
        files = {path: node for path, node in tree.items() if isinstance(node, File)}
        digests = {path: sha256(node.content).hexdigest() for path, node in files.items() if node.digest}
        self._origin.files = {path: node.content for path, node in files.items()}
        self._origin.digests = digests

    def strike(self, kinds: Iterable[str]) -> None:
        """Break the next answers so."""
        self._strike = iter(kinds)

    def choose(self, asked: Asked) -> Fault | None:
        """Be the plan of a `FaultProxy`: only what is asked for with a range is content."""
        path = asked.path.lstrip("/")
        node = self._tree.get(path)
        if not asked.range or not isinstance(node, File):
            return None
        if self.outage is not None:
            return Fault(self.outage)
        kind = next(self._strike, None)
        if kind == "corrupted":
            if not node.digest or not 0 < node.size <= BLOCK:  # parts of others are served unchecked
                return None
            self.suspects.add(node)
        elif kind in ("truncated", "reset-in-body") and node.size < 2:  # not even half a byte would arrive
            return None
        elif kind in ONCE:
            if (path, node) in self._struck:
                return None
            self._struck.add((path, node))
        return None if kind is None else Fault(kind, seconds=0.2 if kind in ("silence", "trickle") else 0)


class Disk:
    """The store of ``disk``: a directory. Files are replaced, never changed."""

    outage = None
    suspects: set[File] = set()

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tree: Tree = {}
        root.mkdir()

    def publish(self, tree: Tree) -> None:
        """Make the directory that; what stays is not touched."""
        aside = {}
        for path, node in self._tree.items():
            if tree.get(path) != node:
                aside[node] = self._root.with_name(f"aside-{len(aside)}")
                os.rename(self._root / path, aside[node])
        for directory, _, _ in os.walk(self._root, topdown=False):
            if directory != str(self._root) and not os.listdir(directory):
                os.rmdir(directory)
        for path, node in tree.items():
            place = self._root / path
            if self._tree.get(path) == node:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(node, Link):
                place.symlink_to(os.path.relpath(node.target, os.path.dirname(path) or "."))
            elif node in aside:
                os.rename(aside.pop(node), place)
            else:
                place.write_bytes(node.content)
        for left in aside.values():
            left.unlink()
        self._tree = tree


Store = Web | Disk
