"""The layers of an image as one file system.

Rules of https://github.com/opencontainers/image-spec, ``layer.md``, "Representing changes" and "Whiteouts":
a file replaces whatever a lower layer has at its path, directories of several layers are one,
``.wh.NAME`` removes NAME of the layers below, and ``.wh..wh..opq`` all that they have in its directory. A
whiteout does not touch its own layer.

Layers packed for lazy pulling (eStargz: https://github.com/containerd/stargz-snapshotter, ``estargz.md``)
have files at their root that are no part of the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modelfs.listing import parents
from modelfs.types import Entry

WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
_OTHER = ".wh..wh."
"""What begins so is a note of the builder's file system to itself."""
_ESTARGZ = frozenset({"stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"})
"""What eStargz adds to a layer: the list of its files, and what to prefetch."""


def merged(layers: Sequence[Iterable[Entry]]) -> list[Entry]:
    """Return what is seen of `layers`, the bottom one first; paths of a layer are unique."""
    shown: dict[str, Entry] = {}
    above: set[str] = set()  # directories that upper layers need
    removed: set[str] = set()  # what lower layers must not show, with all below
    emptied: set[str] = set()  # directories of which lower layers show nothing
    for layer in reversed(layers):
        found: list[Entry] = []
        gone: set[str] = set()
        empty: set[str] = set()
        for entry in layer:
            directory, _, name = entry.path.rpartition("/")
            if name == OPAQUE:
                empty.add(directory)
                continue
            if entry.path in _ESTARGZ:
                continue
            if name.startswith(WHITEOUT):
                if not name.startswith(_OTHER):
                    gone.add(f"{directory}/{name[len(WHITEOUT) :]}".lstrip("/"))
                continue
            if entry.kind != "directory":
                gone.add(entry.path)  # also if it is hidden itself: it replaced what is below
            if not _hidden(entry, shown, above, removed, emptied):
                found.append(entry)
        for entry in found:
            shown[entry.path] = entry
            above.update(parents(entry.path))
        removed |= gone
        emptied |= empty
    return list(shown.values())


def _hidden(
    entry: Entry, shown: dict[str, Entry], above: set[str], removed: set[str], emptied: set[str]
) -> bool:
    path = entry.path
    if path in shown or path in removed or (path in above and entry.kind != "directory"):
        return True
    directories = ["", *parents(path)]
    return any(directory in emptied or directory in removed for directory in directories)
