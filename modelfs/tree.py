"""Names, inodes and what lies behind them: pure look-ups in memory, no I/O.

Inode numbers are derived, not stored: a file's is a hash of its model, path and content version, so that a
new version is a new inode (the kernel's cached pages of the old one stay right for those who have it open)
and a restarted daemon gives the same numbers. A directory's is a hash of its model and path: it stays itself
over a refresh.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Generic, TypeVar

from modelfs.types import Entry, Snapshot

ROOT_INO = 1
"""The root's inode number, as FUSE has it (``FUSE_ROOT_ID``)."""

METADATA = "model-metadata.yaml"
"""File at the root that says which models are mounted; services detect a production node by it."""

M = TypeVar("M")


@dataclass(slots=True, eq=False)
class Node:
    """Anything with an inode number. `mtime` is in seconds since the epoch and stable."""

    ino: int
    mtime: float = 0.0


@dataclass(slots=True, eq=False)
class File(Node, Generic[M]):
    """A file of a model: `model` is whatever the tree's user needs to read `entry`."""

    model: M = field(kw_only=True)
    entry: Entry = field(kw_only=True)


@dataclass(slots=True, eq=False)
class Text(Node):
    """A small file that modelfs itself wrote."""

    content: bytes = b""


@dataclass(slots=True, eq=False)
class Link(Node):
    """A symbolic link."""

    target: str = ""


@dataclass(slots=True, eq=False)
class Directory(Node):
    """A directory.

    Attributes:
        children: by name.
        resolver: what can find names that are not among `children` (on-demand namespaces, stores too large to
            list); None where `children` is all there is.

    """

    children: dict[str, Node] = field(default_factory=dict)
    resolver: Any = None

    @property
    def links(self) -> int:
        """``st_nlink``: two and one for each subdirectory, as tools that walk trees expect."""
        return 2 + sum(isinstance(child, Directory) for child in self.children.values())


@dataclass(frozen=True, slots=True)
class Change:
    """A name in a directory that no longer means what the kernel may remember."""

    parent: int
    name: str


def inode(*parts: str) -> int:
    """Return a stable inode number for what `parts` name: 63 bits, never 0 or the root's.

    With 63 bits, a million files collide with a probability of 5e-8; :class:`Tree` refuses a collision.
    """
    raw = "\0".join(parts).encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little") >> 1 | 2


def grow(name: str, snapshot: Snapshot, model: M, resolver: Any = None) -> Directory:
    """Return the directory that shows `snapshot` as the model `name`.

    Directories carry the latest time of what is in them. With `resolver`, every directory asks it for names
    it does not have.
    """
    root = Directory(inode(name, "", "directory"), resolver=resolver)
    directories: dict[str, Directory] = {"": root}

    def directory(path: str) -> Directory:
        found = directories.get(path)
        if found is None:
            parent, _, last = path.rpartition("/")
            found = directories[path] = Directory(inode(name, path, "directory"), resolver=resolver)
            directory(parent).children[last] = found
        return found

    for path, entry in snapshot.entries.items():
        if entry.kind == "directory":
            directory(path)
            continue
        parent, _, last = path.rpartition("/")
        directory(parent).children[last] = leaf(name, entry, model)
    for path in sorted(directories, key=lambda p: p.count("/") if p else -1, reverse=True):
        here = directories[path]
        here.mtime = max((child.mtime for child in here.children.values()), default=0.0)
    return root


def leaf(name: str, entry: Entry, model: M) -> Node:
    """Return the node of a file or symbolic link of the model `name`."""
    if entry.kind == "symlink":
        return Link(inode(name, entry.path, "link", entry.target), entry.mtime, entry.target)
    ino = inode(name, entry.path, str(entry.size), entry.version, str(entry.digest or ""))
    return File(ino, entry.mtime, model=model, entry=entry)


class Tree:
    """The mounted tree, and every node the kernel still knows.

    A node that left the tree stays reachable by its number until the kernel forgot it: open files and working
    directories outlive a refresh.
    """

    def __init__(self) -> None:
        self.root = Directory(ROOT_INO)
        self._nodes: dict[int, Node] = {ROOT_INO: self.root}
        self._gone: set[int] = set()
        self._lookups: dict[int, int] = {}

    def node(self, ino: int) -> Node | None:
        """Return the node with this number, or None if there is none any more."""
        return self._nodes.get(ino)

    def remember(self, node: Node, count: int = 1) -> None:
        """Count that the kernel learned `node`'s number `count` more times."""
        if node.ino not in self._nodes:
            # It left the tree after the directory that lists it was opened.
            self._nodes[node.ino] = node
            self._gone.add(node.ino)
        self._lookups[node.ino] = self._lookups.get(node.ino, 0) + count

    def forget(self, ino: int, count: int) -> None:
        """Count that the kernel dropped `count` of its references to `ino`."""
        left = self._lookups.get(ino, 0) - count
        if left > 0:
            self._lookups[ino] = left
            return
        self._lookups.pop(ino, None)
        if ino in self._gone:
            self._gone.discard(ino)
            self._nodes.pop(ino, None)

    def put(self, path: tuple[str, ...], node: Node) -> list[Change]:
        """Show `node` under `path`, making directories on the way; return what changed for the kernel.

        A directory replaces a directory of the same number name by name, so that only what differs changes.

        Raises:
            ValueError: two different nodes got one inode number.

        """
        parent = self.root
        changes: list[Change] = []
        for depth, name in enumerate(path[:-1], start=1):
            child = parent.children.get(name)
            if not isinstance(child, Directory):
                child = Directory(inode("/".join(path[:depth]), "", "path"))
                changes += self._place(parent, name, child)
            parent = child
        return changes + self._place(parent, path[-1], node)

    def remove(self, path: tuple[str, ...]) -> list[Change]:
        """Remove what is under `path`, and parents that are empty then; return what changed."""
        walk = [self.root]
        for name in path[:-1]:
            child = walk[-1].children.get(name)
            if not isinstance(child, Directory):
                return []
            walk.append(child)
        changes: list[Change] = []
        for parent, name in zip(reversed(walk), reversed(path), strict=True):
            node = parent.children.get(name)
            if node is None or (changes and isinstance(node, Directory) and (node.children or node.resolver)):
                break
            changes += self._drop(parent, name, node)
        return changes

    def adopt(self, parent: Directory, name: str, node: Node) -> Node:
        """Add a `node` that was found on demand; return it, or what took the name in the meantime."""
        present = parent.children.get(name)
        if present is not None:
            return present
        self._place(parent, name, node)
        return node

    def _place(self, parent: Directory, name: str, node: Node) -> list[Change]:
        old = parent.children.get(name)
        if isinstance(old, Directory) and isinstance(node, Directory) and old.ino == node.ino:
            return self._merge(old, node)
        if old is not None and old.ino == node.ino:
            # Same number, same content: what is known of it may be newer, the kernel need not ask again.
            parent.children[name] = self._nodes[node.ino] = node
            return []
        changes = self._drop(parent, name, old) if old is not None else []
        parent.children[name] = node
        parent.mtime = max(parent.mtime, node.mtime)
        self._admit(node)
        return changes or [Change(parent.ino, name)]

    def _merge(self, old: Directory, new: Directory) -> list[Change]:
        changes: list[Change] = []
        old.mtime, old.resolver = new.mtime, new.resolver
        for name in [name for name in old.children if name not in new.children]:
            changes += self._drop(old, name, old.children[name])
        for name, node in new.children.items():
            changes += self._place(old, name, node)
        return changes

    def _drop(self, parent: Directory, name: str, node: Node) -> list[Change]:
        del parent.children[name]
        for gone in _walk(node):
            if gone.ino in self._lookups:
                self._gone.add(gone.ino)
            else:
                self._nodes.pop(gone.ino, None)
        return [Change(parent.ino, name)]

    def _admit(self, node: Node) -> None:
        for new in _walk(node):
            present = self._nodes.get(new.ino)
            if present is not None and present is not new and new.ino not in self._gone:
                raise ValueError(f"two nodes have the inode number {new.ino}; rename one of the models")
            self._nodes[new.ino] = new
            self._gone.discard(new.ino)


def _walk(node: Node) -> Iterator[Node]:
    yield node
    if isinstance(node, Directory):
        for child in node.children.values():
            yield from _walk(child)


def metadata(generator: str, models: Iterable[Mapping[str, Any]]) -> bytes:
    """Return the content of ``model-metadata.yaml``.

    Args:
        generator: who wrote it.
        models: a mapping of plain values for each model, with at least ``name``.

    YAML 1.2 is a superset of JSON, so scalars are written as JSON writes them.
    """
    lines = ["# The models of this mount, as they are now.", f"generator: {json.dumps(generator)}", "models:"]
    rows = list(models)
    if not rows:
        lines[-1] += " {}"
    for row in rows:
        lines.append(f"  {json.dumps(row['name'])}:")
        lines += [f"    {key}: {json.dumps(value)}" for key, value in row.items() if key != "name"]
    return ("\n".join(lines) + "\n").encode()
