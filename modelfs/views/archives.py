"""Archives shown as directories: which, and what is then in a snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from urllib.parse import unquote, urlsplit

from modelfs.archives import Contents, format_of
from modelfs.stores.manifest import LAYERS, below
from modelfs.types import Entry, Snapshot
from modelfs.views import Face
from modelfs.views.layers import merged


def chosen(url: str, snapshot: Snapshot, face: Face) -> Iterator[tuple[Entry, str]]:
    """Yield the archives of `snapshot` that are to be directories, each with the path of its directory.

    The path is empty if the archive is all there is and `url` names it: its members are the model then.
    """
    if face.archives is False or not snapshot.complete:
        return
    if len(snapshot.entries) == 1:
        entry = next(iter(snapshot.entries.values()))
        name = unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]
        if entry.kind == "file" and format_of(entry.path) and name == entry.path.rpartition("/")[2]:
            yield entry, ""
            return
    if not face.archives:
        return
    patterns = ("*",) if face.archives is True else face.archives
    for path in snapshot.entries:
        if path.startswith(f"{LAYERS}/"):
            continue
        if format_of(path) and any(_fits(path, pattern) for pattern in patterns):
            entry = snapshot.entries[path]
            if entry.kind == "file":
                yield entry, path


def _fits(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path.rpartition("/")[2], pattern)


def with_layers(
    snapshot: Snapshot,
    layers: Sequence[tuple[Entry, str, Contents]],
    directory: str,
    is_shown: Callable[[str], bool],
    *,
    known: bool,
) -> Snapshot:
    """Return `snapshot`, packed, with what is seen of the layers of an image in their place.

    Args:
        snapshot: what holds the layers.
        layers: bottom first: the archive, the version of its members, and what is known of them.
        directory: of the image that is shown; empty for all of it.
        is_shown: whether a path in it is.
        known: whether all is known of all layers; before, nothing is shown of them.

    """
    packed = {entry.path for entry, _, _ in layers}
    entries = [entry for path, entry in snapshot.entries.items() if path not in packed]
    rejected = list(snapshot.rejected)
    if known:
        members = [
            [member.entry("", version) for member in contents.members.values()]
            for _, version, contents in layers
        ]
        entries += [entry for entry in below(merged(members), directory) if is_shown(entry.path)]
        rejected += [
            (path, reason)
            for _, _, contents in layers
            for path, reason in contents.rejected
            if not directory or f"{path}/".startswith(f"{directory}/")
        ]
    shown = Snapshot.of(snapshot.url, snapshot.revision, entries)
    return replace(shown, rejected=(*rejected, *shown.rejected), hidden=snapshot.hidden).packed()


def with_members(snapshot: Snapshot, archives: Mapping[str, tuple[Entry, str, Contents]]) -> Snapshot:
    """Return `snapshot`, packed, with members in the place of their archives.

    Args:
        snapshot: what holds the archives.
        archives: by the path of their directory: the archive, the version of its members, and what is known
            of them.

    """
    rejected = list(snapshot.rejected)
    packed = {entry.path for entry, _, _ in archives.values()}
    entries = [entry for path, entry in snapshot.entries.items() if path not in packed]
    for prefix, (archive, version, contents) in archives.items():
        if prefix:
            entries.append(Entry(prefix, kind="directory", mtime=archive.mtime))
        entries += [member.entry(prefix, version) for member in list(contents.members.values())]
        rejected += [(f"{prefix}/{path}" if prefix else path, reason) for path, reason in contents.rejected]
    shown = Snapshot.of(snapshot.url, snapshot.revision, entries)
    return replace(shown, rejected=(*rejected, *shown.rejected), hidden=snapshot.hidden).packed()
