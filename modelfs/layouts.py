"""Models laid out as other programs expect it: the nodes of what `modelfs.views` says.

The nodes have numbers of their own, and read the same entries of the same stores as those of the plain
model: what is cached for one is cached for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from modelfs.tree import Folder, Node, Text, grow, inode, leaf
from modelfs.types import Snapshot
from modelfs.views import ollama
from modelfs.views.hub import Revision, absent, commit_of, refs

M = TypeVar("M")

_OLLAMA = f"{ollama.PLACE}/models"


class Holder(NamedTuple, Generic[M]):
    """A model as it holds a repository.

    Attributes:
        model: whatever the tree's user needs to read its files.
        revision: name of the branch or tag; None if its store has no such names.
        snapshots: what is shown of it, and what was before: a reader may have been told that commit.

    """

    model: M
    revision: str | None
    snapshots: Sequence[Snapshot]


def arrange(path: str, placed: Mapping[str, Node]) -> Folder:
    """Return the directory `path` with each of `placed` where its name, a relative path, says.

    Directories carry the latest time of what is in them.
    """
    top = Folder(inode(path, "", "path"))
    for name, node in placed.items():
        *above, last = name.split("/")
        folder = top
        folder.mtime = max(folder.mtime, node.mtime)
        for depth, part in enumerate(above, start=1):
            child = folder.children.get(part)
            if not isinstance(child, Folder):
                child = Folder(inode("/".join((path, *above[:depth])), "", "path"))
                folder.children[part] = child
            folder = child
            folder.mtime = max(folder.mtime, node.mtime)
        folder.children[last] = node
    return top


def repository(path: str, holders: Sequence[Holder[M]]) -> Folder:
    """Return the directory `path` of a repository, as `modelfs.views.hub` describes it.

    Args:
        path: of the directory, from the root of the mount.
        holders: who have the repository; if several say what a name stands for, the first is believed.

    """
    nodes: dict[str, Node] = {}

    def write(name: str, mtime: float, content: bytes) -> None:
        number = inode(f"{path}/{name}", "text", content.decode(), repr(mtime))
        nodes.setdefault(name, Text(number, mtime, content))

    for model, _, snapshots in holders:
        for snapshot in snapshots:
            commit = commit_of(snapshot)
            if (place := f"snapshots/{commit}") not in nodes:
                shown = nodes[place] = grow(f"{path}/{place}", snapshot, model)
                for name in absent(snapshot):
                    write(f".no_exist/{commit}/{name}", shown.mtime, b"")
    named = [Revision(holder.revision, holder.snapshots[0]) for holder in holders]
    for name, commit in refs(named).items():
        write(f"refs/{name}", nodes[f"snapshots/{commit}"].mtime, commit.encode())
    return arrange(path, nodes)


def artifacts(held: Iterable[tuple[M, str, Snapshot]]) -> Folder:
    """Return the directory of Ollama's models, as `modelfs.views.ollama` describes it.

    Args:
        held: models, each with the canonical URL of its store and what is shown of it.

    """
    nodes: dict[str, Node] = {ollama.EMPTY: Folder(inode(f"{_OLLAMA}/{ollama.EMPTY}", "", "path"))}
    for each in held:
        for place, node in artifact(*each):
            nodes.setdefault(place, node)
    return arrange(_OLLAMA, nodes)


def artifact(model: M, url: str, snapshot: Snapshot) -> Iterator[tuple[str, Node]]:
    """Yield what is shown of one model in the directory that `artifacts` returns, with its path there."""
    place, manifest = ollama.manifest_of(url), snapshot.entries.get(ollama.MANIFEST)
    if place is not None and manifest is not None:
        for name, entry in ((place, manifest), *ollama.blobs(snapshot)):
            yield name, leaf(f"{_OLLAMA}/{name}", entry, model)
