"""Cached content read again, object by object: on demand, and slowly all the time.

What is bad is dropped, and fetched again by whoever reads it next.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import trio

from modelfs.cache import Cache
from modelfs.errors import CacheError
from modelfs.fetch.source import digest_in
from modelfs.types import Digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """A cached object to be read again: `key`, a `name` for people, bytes present, the digest if known."""

    key: str
    name: str
    present: int
    digest: Digest | None


@dataclass(frozen=True, slots=True)
class Bad:
    """What was wrong with one object: a line for each fault, and how many bytes were dropped."""

    key: str
    name: str
    faults: list[str]
    dropped: int


@dataclass(slots=True)
class Report:
    """What came of reading `objects` objects, `bytes` bytes."""

    objects: int = 0
    bytes: int = 0
    bad: list[Bad] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the answer of ``POST /v1/verify`` as docs/status.md describes it."""
        return asdict(self)


class Distrust(Protocol):
    """Acts on bad bytes that were found: `Fetcher.distrust`, or `discard_from` where there is no fetcher."""

    async def __call__(self, key: str, *, discard: bool) -> None:
        """See `Fetcher.distrust`."""


Progress = Callable[[Subject, int], Awaitable[None]]
"""Called after each block with its object and the bytes done so far; waiting in it sets the pace."""


def discard_from(cache: Cache) -> Distrust:
    """Return what acts on bad bytes in a `cache` that nobody reads."""

    async def distrust(key: str, *, discard: bool) -> None:
        if discard:
            await trio.to_thread.run_sync(cache.discard, key)

    return distrust


def subjects_in(cache: Cache) -> list[Subject]:
    """Return everything in `cache`, with the digests that the names of objects tell."""
    return [Subject(key, key, present, digest_in(key)) for key, present in cache.contents()]


async def verify(cache: Cache, subjects: Sequence[Subject], distrust: Distrust, progress: Progress) -> Report:
    """Read `subjects` again, one after the other, and drop what is bad.

    Cancelling ends it after the block that is being read. An object that is no longer cached counts for
    nothing.
    """
    report = Report()
    for subject in subjects:
        await _audit(cache, subject, distrust, progress, report)
    return report


async def _audit(
    cache: Cache, subject: Subject, distrust: Distrust, progress: Progress, report: Report
) -> None:
    audit = await trio.to_thread.run_sync(cache.audit, subject.key, subject.digest)
    if audit is None:
        return
    try:
        while await trio.to_thread.run_sync(audit.step):
            await progress(subject, report.bytes + audit.done)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(audit.close)
    report.objects += 1
    report.bytes += audit.done
    if audit.faults:
        faults = list(audit.faults)
        try:
            await distrust(subject.key, discard=audit.mismatch)
        except CacheError as error:
            faults.append(str(error))
        log.error("%s (%s): %s", subject.name, subject.key, "; ".join(faults))
        report.bad.append(Bad(subject.key, subject.name, faults, audit.dropped))
