"""Names, inodes and what lies behind them: pure look-ups in memory, no I/O.

The nodes of a model are made from its listing when somebody looks at them, and dropped when the kernel
forgets them: a tree costs what is used of it.

Inode numbers are derived, not stored: a file's is a hash of its model, path and content version, so that a
new version is a new inode (the kernel's cached pages of the old one stay right for those who have it open)
and a restarted daemon gives the same numbers. A directory's is a hash of its model and path: it stays itself
over a refresh.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import count
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

from modelfs.listing import Line, Listing
from modelfs.types import Entry, Snapshot

ROOT_INO = 1
"""The root's inode number, as FUSE has it (``FUSE_ROOT_ID``)."""

METADATA = "model-metadata.yaml"
"""File at the root that says which models are mounted; services detect a production node by it."""

M = TypeVar("M")


class Node(ABC):
    """Anything with an inode number. `mtime` is in seconds since the epoch and stable."""

    __slots__ = ()

    ino: int
    mtime: float


@dataclass(slots=True, eq=False)
class File(Node, Generic[M]):
    """A file of a model: `model` is whatever the tree's user needs to read `entry`."""

    ino: int
    mtime: float
    size: int
    model: M
    line: str

    @property
    def entry(self) -> Entry:
        """What is to be read.

        Raises:
            ValueError: what lay on disk about it is not what was written.

        """
        return Line.parse(self.line).entry


@dataclass(slots=True, eq=False)
class Text(Node):
    """A small file that modelfs itself wrote."""

    ino: int
    mtime: float = 0.0
    content: bytes = b""


@dataclass(slots=True, eq=False)
class Link(Node):
    """A symbolic link."""

    ino: int
    mtime: float = 0.0
    target: str = ""


class Named(NamedTuple):
    """One name of a directory, and the place where a listing goes on after it."""

    name: str
    node: Node
    next: int


Names = Callable[[int], Iterator[Named]]
"""The names of a directory at one moment, in order: called with 0, or the place to go on from.

A restarted daemon has the same places for the same names.
"""


class Directory(Node):
    """A directory.

    Attributes:
        children: by name.
        links: ``st_nlink``, two and one for each subdirectory, as tools that walk trees expect.
        resolver: what can find names that are not among `children` (on-demand namespaces, stores too large to
            list); None where `children` is all there is.

    """

    __slots__ = ()

    children: Mapping[str, Node]
    links: int
    resolver: Any

    @abstractmethod
    def names(self) -> Names:
        """Return what a listing that begins now shows."""


@dataclass(slots=True, eq=False)
class Folder(Directory):
    """A directory that is filled name by name.

    Attributes:
        listed: whether it is among the names of the directory it is in. Who knows the name finds it anyway.

    """

    ino: int
    mtime: float = 0.0
    children: dict[str, Node] = field(default_factory=dict)
    resolver: Any = None
    listed: bool = True

    @property
    def links(self) -> int:  # type: ignore[override]  # nobody sets it
        """Two, and one for each subdirectory."""
        return 2 + sum(isinstance(child, Directory) for _, child in self._listed())

    def _listed(self) -> Iterator[tuple[str, Node]]:
        return (item for item in self.children.items() if not isinstance(item[1], Folder) or item[1].listed)

    def at(self, path: Iterable[str]) -> Node | None:
        """Return what is under `path`, None if there is nothing."""
        node: Node = self
        for name in path:
            below = node.children.get(name) if isinstance(node, Directory) else None
            if below is None:
                return None
            node = below
        return node

    def names(self) -> Names:
        """Return what a listing that begins now shows."""
        children = sorted(self._listed(), key=itemgetter(0))
        return lambda start: (
            Named(name, node, place + 1)
            for place, (name, node) in zip(count(start), children[start:], strict=False)
        )


@dataclass(slots=True, eq=False)
class Shown(Generic[M]):
    """A model as the tree shows it, until `listing` is replaced by a newer one."""

    name: str
    model: M
    listing: Listing
    pending: Mapping[str, Any] = field(default_factory=dict)
    """Directories of which the listing does not say everything yet, each with what knows more."""

    def resolver(self, path: str) -> Any:
        """Return what knows more about the directory `path`; None if the listing says everything."""
        for prefix, resolver in self.pending.items():
            if not prefix or path == prefix or path.startswith(f"{prefix}/"):
                return resolver
        return None

    def node(self, line: Line) -> Node:
        """Return a node for what has this line."""
        return Branch(self, line.path) if line.is_directory else _leaf(self.name, line, self.model)


class Branch(Directory):
    """A directory of a model: what the model's present listing says about `path`."""

    __slots__ = ("ino", "path", "shown")

    def __init__(self, shown: Shown[Any], path: str) -> None:
        self.ino = inode(shown.name, path, "directory")
        self.shown = shown
        self.path = path

    @property
    def resolver(self) -> Any:
        """What can find names that the listing does not have yet; None as a rule."""
        return self.shown.resolver(self.path) if self.shown.pending else None

    @property
    def mtime(self) -> float:  # type: ignore[override]  # nobody sets it
        """The latest time of what is in it."""
        line = self.shown.listing.line(self.path)
        return float(line.latest) if line is not None and line.is_directory else 0.0

    @property
    def links(self) -> int:  # type: ignore[override]  # nobody sets it
        """Two, and one for each subdirectory."""
        line = self.shown.listing.line(self.path)
        return 2 + int(line.directories) if line is not None and line.is_directory else 2

    @property
    def children(self) -> Mapping[str, Node]:  # type: ignore[override]  # nobody sets it
        """What is in it, as new nodes."""
        return _Children(self.shown, self.path)

    def names(self) -> Names:
        """Return what a listing that begins now shows."""
        return partial(_names, self.shown, self.shown.listing, self.path)


def _names(shown: Shown[Any], listing: Listing, path: str, start: int) -> Iterator[Named]:
    cut = len(path) + 1 if path else 0
    for line, place in listing.children(path, start):
        yield Named(line.path[cut:], shown.node(line), place)


class _Children(Mapping[str, Node]):
    def __init__(self, shown: Shown[Any], path: str) -> None:
        self._shown = shown
        self._path = path

    def __getitem__(self, name: str) -> Node:
        line = self._shown.listing.line(f"{self._path}/{name}" if self._path else name)
        if line is None:
            raise KeyError(name)
        return self._shown.node(line)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _, _ in _names(self._shown, self._shown.listing, self._path, 0))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, slots=True)
class Change:
    """A name in a directory that no longer means what the kernel may remember.

    Without a `name` it is the directory itself that has another time or number of subdirectories.
    """

    parent: int
    name: str


def inode(*parts: str) -> int:
    """Return a stable inode number for what `parts` name: 63 bits, never 0 or the root's.

    With 63 bits, a million files collide with a probability of 5e-8; :class:`Tree` refuses a collision.
    """
    raw = "\0".join(parts).encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little") >> 1 | 2


def grow(name: str, snapshot: Snapshot, model: M, pending: Mapping[str, Any] | None = None) -> Branch:
    """Return the directory that shows `snapshot` as the model `name`; `pending` is as of `Shown`.

    Directories carry the latest time of what is in them.
    """
    return Branch(Shown(name, model, snapshot.listing, pending or {}), "")


def leaf(name: str, entry: Entry, model: M) -> Node:
    """Return the node of a file or symbolic link of the model `name`."""
    return _leaf(name, Line.of(entry), model)


def _leaf(name: str, line: Line, model: M) -> Node:
    if line.kind == "symlink":
        return Link(inode(name, line.path, "link", line.target), float(line.mtime), line.target)
    ino = inode(name, line.path, line.size, line.version, line.digest)
    return File(ino, float(line.mtime), int(line.size), model, str(line))


def difference(name: str, before: Listing, after: Listing) -> list[Change]:
    """Return the names of the model `name` that mean something else in the listing `after`.

    So does what is in a directory that came or went: of an open file the kernel keeps the name, and finds it
    below the directory again when that comes back. With many entries this takes a while: call it in a thread.
    """
    kinds: dict[str, set[bool]] = {}
    for text in {*before.lines}.symmetric_difference(after.lines):
        line = Line.parse(text)
        kinds.setdefault(line.path, set()).add(line.is_directory)
    both = {path for path in kinds if before.line(path) and after.line(path)}
    itself = {path for path, kind in kinds.items() if kind == {True} and path in both}
    changed = (path.rpartition("/") for path in sorted(kinds) if path and path not in itself)
    return [
        *(Change(inode(name, parent, "directory"), last) for parent, _, last in changed),
        *(Change(inode(name, path, "directory"), "") for path in sorted(itself)),
    ]


class Tree:
    """The mounted tree, and every node the kernel still knows.

    A node that left the tree stays reachable by its number until the kernel forgot it: open files and working
    directories outlive a refresh.
    """

    def __init__(self) -> None:
        self.root = Folder(ROOT_INO)
        self._nodes: dict[int, Node] = {ROOT_INO: self.root}
        self._loose: set[int] = set()
        """Numbers whose nodes are dropped when the kernel forgets them: nothing else holds them."""
        self._lookups: dict[int, int] = {}
        self._expected: list[tuple[Shown[Any], Listing, Mapping[int, int]]] = []

    def node(self, ino: int) -> Node | None:
        """Return the node with this number, or None if there is none any more."""
        found = self._nodes.get(ino)
        if found is None:
            for shown, listing, places in self._expected:
                if ino in places:
                    return shown.node(Line.parse(listing.lines[places[ino]]))
        return found

    def expect(self, root: Branch, places: Mapping[int, int]) -> None:
        """Answer for all numbers of a model as it is now: an earlier daemon may have told the kernel of any.

        Args:
            root: of the model.
            places: what `numbers` returned for it.

        """
        self._expected.append((root.shown, root.shown.listing, places))

    def remember(self, node: Node, count: int = 1) -> None:
        """Count that the kernel learned `node`'s number `count` more times.

        Raises:
            ValueError: it knows another node by this number.

        """
        present = self._nodes.get(node.ino)
        if present is not node:
            if present is None:
                self._loose.add(node.ino)
            elif not _alike(present, node):
                raise ValueError(f"two nodes have the inode number {node.ino}; rename one of the models")
            if node.ino in self._loose:
                self._nodes[node.ino] = node  # what is known of it may be newer
        self._lookups[node.ino] = self._lookups.get(node.ino, 0) + count

    def forget(self, ino: int, count: int) -> None:
        """Count that the kernel dropped `count` of its references to `ino`."""
        left = self._lookups.get(ino, 0) - count
        if left > 0:
            self._lookups[ino] = left
            return
        self._lookups.pop(ino, None)
        if ino in self._loose:
            self._loose.discard(ino)
            self._nodes.pop(ino, None)

    def branches(self) -> list[Branch]:
        """Return the roots of all models in the tree, in every layout."""
        return [node for node in _walk(self.root) if isinstance(node, Branch)]

    def put(self, path: tuple[str, ...], node: Node, differing: list[Change] | None = None) -> list[Change]:
        """Show `node` under `path`, making directories on the way; return what changed for the kernel.

        A directory replaces a directory of the same number name by name, so that only what differs changes.

        Args:
            path: the names.
            node: what is shown there from now on.
            differing: what `difference` says about the model that is shown there, if it was asked already.

        Raises:
            ValueError: two different nodes got one inode number.

        """
        parent = self.root
        changes: list[Change] = []
        for depth, name in enumerate(path[:-1], start=1):
            child = parent.children.get(name)
            if not isinstance(child, Folder):
                child = Folder(inode("/".join(path[:depth]), "", "path"))
                changes += self._place(parent, name, child)
            parent = child
        return changes + self._place(parent, path[-1], node, differing)

    def remove(self, path: tuple[str, ...]) -> list[Change]:
        """Remove what is under `path`, and parents that are empty then; return what changed."""
        walk = [self.root]
        for name in path[:-1]:
            child = walk[-1].children.get(name)
            if not isinstance(child, Folder):
                return []
            walk.append(child)
        changes: list[Change] = []
        for parent, name in zip(reversed(walk), reversed(path), strict=True):
            node = parent.children.get(name)
            if node is None or (changes and isinstance(node, Directory) and (node.children or node.resolver)):
                break
            changes += self._drop(parent, name, node)
        return changes

    def adopt(self, parent: Folder, name: str, node: Node) -> Node:
        """Add a `node` that was found on demand; return it, or what took the name in the meantime."""
        present = parent.children.get(name)
        if present is not None:
            return present
        self._place(parent, name, node)
        return node

    def _place(
        self, parent: Folder, name: str, node: Node, differing: list[Change] | None = None
    ) -> list[Change]:
        old = parent.children.get(name)
        if old is not None and old.ino == node.ino:
            match old, node:
                case Branch(), Branch() if old.shown.listing is node.shown.listing:
                    return []
                case Branch(), Branch():
                    before, old.shown.listing = old.shown.listing, node.shown.listing
                    old.shown.pending = node.shown.pending
                    parent.mtime = max(parent.mtime, node.mtime)
                    return (
                        difference(node.shown.name, before, node.shown.listing)
                        if differing is None
                        else differing
                    )
                case Folder(), Folder():
                    return self._merge(old, node)
                case (Branch(), Folder()) | (Folder(), Branch()):
                    pass  # the store became too large to list, or small enough
                case _:
                    # Same number, same content: the kernel need not ask again.
                    parent.children[name] = self._nodes[node.ino] = node
                    return []
        changes = self._drop(parent, name, old) if old is not None else []
        changes += differing or ()
        parent.children[name] = node
        parent.mtime = max(parent.mtime, node.mtime)
        self._admit(node)
        return changes or [Change(parent.ino, name)]

    def _merge(self, old: Folder, new: Folder) -> list[Change]:
        changes: list[Change] = []
        old.mtime, old.resolver = new.mtime, new.resolver
        for name in [name for name in old.children if name not in new.children]:
            changes += self._drop(old, name, old.children[name])
        for name, node in new.children.items():
            changes += self._place(old, name, node)
        return changes

    def _drop(self, parent: Folder, name: str, node: Node) -> list[Change]:
        del parent.children[name]
        changes = [Change(parent.ino, name)]
        for gone in _walk(node):
            if gone.ino in self._lookups:
                self._loose.add(gone.ino)
            else:
                self._nodes.pop(gone.ino, None)
            if isinstance(gone, Folder):
                changes += (Change(gone.ino, below) for below in gone.children)  # as `difference` does
        return changes

    def _admit(self, node: Node) -> None:
        for new in _walk(node):
            present = self._nodes.get(new.ino)
            if present is not None and present is not new and new.ino not in self._loose:
                raise ValueError(f"two nodes have the inode number {new.ino}; rename one of the models")
            self._nodes[new.ino] = new
            self._loose.discard(new.ino)


def numbers(root: Branch) -> Mapping[int, int]:
    """Return the inode numbers of everything in a model, each with its place in the listing.

    With many entries this takes a while: call it in a thread.
    """
    shown = root.shown
    return {shown.node(Line.parse(text)).ino: place for place, text in enumerate(shown.listing.lines)}


def _alike(one: Node, other: Node) -> bool:
    """Return whether two nodes with one number are the same thing, known at different times."""
    match one, other:
        case File(), File():
            return one.model is other.model and one.entry.path == other.entry.path
        case Branch(), Branch():
            return one.shown.name == other.shown.name and one.path == other.path
        case Link(), Link():
            return one.target == other.target
        case _:
            return isinstance(one, Directory) and isinstance(other, Directory)


def _walk(node: Node) -> Iterator[Node]:
    """Yield `node` and all below it that exists without being asked for."""
    yield node
    if isinstance(node, Folder):
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
