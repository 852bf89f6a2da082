"""Fallback chains: which store of a model is asked, for its snapshot and for the bytes of an object.

A snapshot is the word of one store. Bytes may come from any store of the chain that publishes the same digest
and size for them: then it does not matter who sends them, and one may go on in the middle of a file where
another stopped. What came in is compared with that digest like everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from modelfs.errors import NotFound, StoreError, Unavailable
from modelfs.fetch.source import Source
from modelfs.types import Digest, Entry, Snapshot

log = logging.getLogger(__name__)

PROOFS = frozenset({"sha256", "sha512", "sha1", "git-sha1"})
"""Digests for which nobody makes other content to what is there: equal ones prove equal bytes."""

ANSWER_SECONDS = 10.0
"""So long a store may take to list a model of which nothing is shown yet, if there is another to ask."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The content of an object at one store: `entry` is what the store at `source` calls it."""

    source: Source
    entry: Entry


class Copies:
    """Where the content of one object can be had.

    Args:
        source: the store that lists it.
        entry: what it is there.
        key: names the object.

    """

    def __init__(self, source: Source, entry: Entry, key: str) -> None:
        self.home = Copy(source, entry)
        self.brought: dict[Source, None] = {}
        """Stores that were asked for bytes of it, in this order, since the last of them came to nothing."""
        self._key = key
        self._found: dict[Source, Copy | None] = {source: self.home}
        self._useless: set[Source] = set()

    @property
    def alone(self) -> bool:
        """Whether there is one store only."""
        return len(self.home.source.chain) == 1

    async def first(self, digest: Digest | None) -> Copy:
        """Return the copy to begin with; no store is asked to list unless the others are known to fail."""
        if self.alone:
            return self.home
        for source in self._candidates(()):
            copy = self._found.get(source) or _at_its_path(source.snapshot, self.home.entry, digest, source)
            if copy is not None:
                return copy
        return await self.other(digest, ()) or self.left() or self.home

    async def other(self, digest: Digest | None, failing: Collection[Source]) -> Copy | None:
        """Return the copy to ask instead of those at `failing`; stores are asked to list if need be."""
        for source in self._candidates(failing):
            copy = await self._at(source, digest)
            if copy is not None and source.breaker.admits:
                return copy
        return None

    def left(self, over: Collection[Source] = ()) -> Copy | None:
        """Return the best known copy that is not at one of `over`, even if its store fails now."""
        known = (self._found.get(source) for source in self._usable() if source not in over)
        return next((copy for copy in known if copy is not None), None)

    def put_aside(self, source: Source) -> None:
        """Never ask `source` for this object again: it no longer has it, or does not let us have it."""
        self._useless.add(source)

    def blame(self) -> bool:
        """Remember that what was brought is not the content: who began is asked for it no more.

        Once this was said of all stores, they may all be asked again. Returns whether it was not.
        """
        chain = self.home.source.chain
        for source in list(self.brought)[:1]:
            source.refuse(self._key)
        self.brought.clear()
        if self._usable():
            return True
        for source in chain:
            source.forgive(self._key)
        return False

    def _usable(self) -> list[Source]:
        chain = self.home.source.chain
        return [s for s in chain if s not in self._useless and not s.refused(self._key)]

    def _candidates(self, failing: Collection[Source]) -> list[Source]:
        return [s for s in self._usable() if s not in failing and s.breaker.admits]

    async def _at(self, source: Source, digest: Digest | None) -> Copy | None:
        """Return the copy at `source`, None if it has none; asks for its listing if it was never asked."""
        if source not in self._found and _proves(digest):
            snapshot = await source.listed()
            if snapshot is not None:
                found = _at_its_path(snapshot, self.home.entry, digest, source)
                if found is None:
                    found = await trio.to_thread.run_sync(
                        _anywhere, snapshot, self.home.entry.size, digest, source
                    )
                self._found[source] = found
        return self._found.get(source)


def _proves(digest: Digest | None) -> bool:
    return digest is not None and digest.algorithm in PROOFS


def _is(entry: Entry, size: int, digest: Digest | None) -> bool:
    return _proves(digest) and entry.kind == "file" and entry.size == size and entry.digest == digest


def _at_its_path(
    snapshot: Snapshot | None, entry: Entry, digest: Digest | None, source: Source
) -> Copy | None:
    there = snapshot.entries.get(entry.path) if snapshot is not None else None
    return Copy(source, there) if there is not None and _is(there, entry.size, digest) else None


def _anywhere(snapshot: Snapshot, size: int, digest: Digest | None, source: Source) -> Copy | None:
    return next((Copy(source, each) for each in snapshot.entries.values() if _is(each, size, digest)), None)


async def answering(chain: Sequence[Source], shown: Source | None) -> tuple[Source, Snapshot, Snapshot]:
    """Ask the stores of a chain in order for a snapshot; return the first that has one.

    With it comes what it listed, and what is shown of that.

    Args:
        chain: the stores.
        shown: the one whose snapshot is shown; while it is out of reach, its snapshot is better than that of
            a store after it. Once it has no such model any more, it is not.

    Raises:
        StoreError: none has one; it can be retried if that may help with any of them.

    """
    errors: list[StoreError] = []
    for source in chain:
        hurry = shown is None and source is not chain[-1]
        try:
            with trio.fail_after(ANSWER_SECONDS if hurry else float("inf")):
                return source, *await source.resolve()
        except trio.TooSlowError:
            source.why = f"{source.url}: no answer within {ANSWER_SECONDS:g} s"
            errors.append(Unavailable(source.why))
        except StoreError as error:
            errors.append(error)
            if source is shown and not isinstance(error, NotFound):
                break
    if len(errors) == 1:
        raise errors[0]
    kind = next((type(error) for error in errors if error.retryable), type(errors[0]))
    raise kind("; ".join(map(str, errors)))


def same_content(one: Snapshot, other: Snapshot) -> bool:
    """Return whether two snapshots say the same of every file, or have the same bytes as digests prove.

    With many entries this takes a while: call it in a thread.
    """
    if one.digest == other.digest and one.complete == other.complete:
        return True
    if not one.complete or not other.complete or len(one.entries) != len(other.entries):
        return False
    pairs = zip(one.entries.values(), other.entries.values(), strict=True)
    return all(
        (a.path, a.kind, a.target) == (b.path, b.kind, b.target)
        and (a.kind != "file" or _is(b, a.size, a.digest))
        for a, b in pairs
    )


def standing(shown: Source) -> list[dict[str, Any]]:
    """Return what ``modelfs status`` says about the stores of a chain, of which one is `shown`.

    The one that serves is whom the next request for bytes goes to, as far as that is known before.
    """
    chain = shown.chain
    well = (s for s in chain if _state(s) == "ready" or (s is shown and _state(s) == "standby"))
    serving = next(well, shown)
    return [
        {"url": source.url, "state": _state(source), "serving": source is serving, "why": source.why}
        for source in chain
    ]


def _state(source: Source) -> str:
    if source.breaker.state != "closed":
        return {"open": "failing", "half-open": "probing"}[source.breaker.state]
    if source.why is not None:
        return "failing"
    return "ready" if source.snapshot is not None else "standby"
