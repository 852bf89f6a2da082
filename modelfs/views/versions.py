"""Versions: a model whose directories are ``v1.0.0``, ``v1.1.0`` … gets a link ``latest``.

Versions are compared as https://semver.org/#spec-item-11 says. As for Go modules, a pre-release is the latest
version only where there is no release.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from modelfs.errors import NotFound
from modelfs.listing import Listing
from modelfs.types import Entry, Snapshot

LATEST = "latest"
"""Name of the link."""

MAX_MARKER = 256
"""Bytes of the largest file that may say which version is the latest."""

_MARKERS = (LATEST, "LATEST")
_VERSION = re.compile(
    r"(?:[vV](?=\d)|(?=\d+\.))(?P<core>[0-9]{1,18}(?:\.[0-9]{1,18}){0,3})"
    r"(?P<rest>[-+].+|(?:a|b|rc|alpha|beta|dev)[0-9]*)?"
)

_Order = tuple[bool, tuple[int, ...], tuple[tuple[bool, int, str], ...], str]


def order_of(name: str) -> _Order | None:
    """Return what versions are sorted by; None if `name` is no version.

    Accepted are two to four numbers, or with a ``v`` before them one as well, and what semantic versions have
    behind them, or Python's: ``v2``, ``1.0``, ``v1.0.0-rc.1+build``, ``1.0rc1``.
    """
    found = _VERSION.fullmatch(name)
    if found is None:
        return None
    core = tuple(map(int, found["core"].split(".")))
    early = (found["rest"] or "").partition("+")[0].removeprefix("-")
    parts = tuple(
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in early.split(".")
    )
    # Trailing zeros do not count; the name decides between what is equal then.
    return not early, (*core, 0, 0, 0)[:4], parts, name


def highest(names: Iterable[str]) -> str | None:
    """Return the highest version among `names`; None if none is a version."""
    versions = [order for order in map(order_of, names) if order is not None]
    return max(versions)[-1] if versions else None


def marker(snapshot: Snapshot) -> Entry | None:
    """Return the file by which the store says itself which version is the latest; None if it does not.

    A file ``latest`` or ``LATEST`` beside versions, small enough to hold no more than a name.
    """
    if not snapshot.complete or highest(_directories(snapshot)) is None:
        return None
    found = (snapshot.entries.get(name) for name in _MARKERS)
    return next((e for e in found if e and e.kind == "file" and e.size <= MAX_MARKER), None)


def with_latest(snapshot: Snapshot, wanted: str | None = None, marked: str = "") -> Snapshot:
    """Return `snapshot` with a link ``latest`` to the directory `wanted`, or else to the latest version.

    What the store itself calls ``latest`` is left as it is, unless it is the marker.

    Args:
        snapshot: of a store that was listed; others are returned as they are.
        wanted: what was configured.
        marked: content of `marker`; it counts if it is the name of a version that is there.

    Raises:
        NotFound: there is no directory `wanted`.

    """
    if not snapshot.complete:
        return snapshot
    directories = _directories(snapshot)
    if wanted is not None and wanted not in directories:
        raise NotFound(f"{snapshot.url} has no directory {wanted!r} that latest could lead to")
    said = marked.strip()
    is_marked = said in directories and order_of(said) is not None
    target = wanted or (said if is_marked else highest(directories))
    if target is None:
        return snapshot
    entries = dict(snapshot.entries)
    present = snapshot.listing.line(LATEST)
    if present is not None:
        own = marker(snapshot)
        if not is_marked or own is None or own.path != LATEST:
            return snapshot
        del entries[LATEST]
    below = snapshot.listing.line(target)
    mtime = float(below.latest) if below is not None else 0.0
    entries[LATEST] = Entry(LATEST, mtime=mtime, kind="symlink", target=target)
    return replace(snapshot, entries=Listing.of(entries.values()))


def _directories(snapshot: Snapshot) -> set[str]:
    listing = snapshot.listing
    root = listing.line("")
    count = int(root.directories) if root is not None else 0
    # Not one name more than needed is looked at: there may be 100,000 files beside them, or nothing else.
    found = (line.path for line, _ in listing.children("") if line.is_directory)
    return set(islice(found, count))
