"""What a store has, and how that is shown: dicts from path to content."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class File:
    """A version of a file: `size` bytes made of `seed`; `digest` says whether the store publishes one.

    `serial` tells apart what the store tells apart although the bytes are equal: files of a directory by
    their inodes and times.
    """

    seed: int
    size: int
    digest: bool = False
    serial: int = 0

    @property
    def content(self) -> bytes:
        return _content(self.seed, self.size)


@lru_cache(maxsize=64)
def _content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link; `target` is a path in the tree."""

    target: str


Tree = Mapping[str, File | Link]
"""What a store has: path → what is there. Directories are implied."""

NAMES = ("a", "b.json", "c.dat", "d.safetensors", "e.bin", "f")
"""Of files and directories; few, so that random paths collide."""

ALWAYS: Tree = {"z.json": File(0, 10)}
"""What stays: a store that has no files at all is taken for a mistake."""


def resolved(tree: Tree, path: str, depth: int = 0) -> File | str | None:
    """Return the file or the path of the directory that is at `path` once links are followed, or None."""
    if depth > 8:
        return None
    done = ""
    for part in path.split("/"):
        done = f"{done}/{part}" if done else part
        here = tree.get(done)
        if isinstance(here, Link):
            return resolved(tree, here.target + path[len(done) :], depth + 1)
        if isinstance(here, File):
            return here if done == path else None
    return path if is_directory(tree, path) else None


def tidied(tree: Tree) -> dict[str, File | Link]:
    """Return `tree` without links that lead nowhere, and those that lead nowhere then.

    They are not shown; but what would be an empty directory without them is.
    """
    kept = {path: node for path, node in tree.items() if resolved(tree, path) is not None}
    return kept if len(kept) == len(tree) else tidied(kept)


def is_directory(tree: Tree, path: str) -> bool:
    return not path or any(other.startswith(f"{path}/") for other in tree)


def shown(tree: Tree) -> Tree:
    """Return `tree` as it is mounted: links to files as files, other links with the text they are read as."""
    found: dict[str, File | Link] = {}
    for path, node in tree.items():
        if isinstance(node, File):
            found[path] = node
            continue
        target = resolved(tree, path)
        if isinstance(target, File):
            found[path] = target
        elif target is not None:
            found[path] = Link(os.path.relpath(target, os.path.dirname(path) or "."))
    return found


def kind_of(tree: Tree, path: str) -> str | None:
    """Return what `shown` has at `path`: "file", "link", "directory" or None."""
    node = tree.get(path)
    if node is not None:
        return "file" if isinstance(node, File) else "link"
    return "directory" if is_directory(tree, path) else None


def children(tree: Tree, path: str) -> dict[str, str | None]:
    """Return name → kind of what is in the directory `path` of what is `shown`."""
    prefix = f"{path}/" if path else ""
    found = {other[len(prefix) :].partition("/")[0] for other in tree if other.startswith(prefix)}
    return {name: kind_of(tree, prefix + name) for name in sorted(found)}


def status_of(tree: Tree, path: str) -> tuple[str, int, int] | int:
    """Return kind, size and links of what is at `path` of what is `shown`, or the errno of lstat(2)."""
    node = tree.get(path)
    if isinstance(node, File):
        return "file", node.size, 1
    if isinstance(node, Link):
        return "link", len(os.fsencode(node.target)), 1
    if is_directory(tree, path):
        return "directory", 0, 2 + list(children(tree, path).values()).count("directory")
    above = path
    while above := os.path.dirname(above):
        if isinstance(tree.get(above), File):
            return errno.ENOTDIR
    return errno.ENOENT
