"""Cached content read again, object by object: on demand, and slowly all the time.

What is bad is dropped, and fetched again by whoever reads it next.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import trio

from modelfs.cache import Cache
from modelfs.errors import CacheError
from modelfs.fetch.source import digest_in
from modelfs.types import Digest

log = logging.getLogger(__name__)

PERIOD = 7 * 86400.0
"""Seconds from the beginning of one pass of the scrubber to that of the next."""

SETTLE = 600.0
"""Seconds after its start before the scrubber reads anything: models are being loaded then."""

YIELD = 1.0
"""Seconds for which the scrubber pauses while readers wait for the disk or a store."""

NOTE = 30.0
"""Seconds after which it is noted anew on disk how far a pass has come."""

STATE = "scrub"
"""Name under which it is noted."""


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


async def verify(
    cache: Cache,
    subjects: Sequence[Subject],
    distrust: Distrust,
    progress: Progress,
    *,
    idly: bool = False,
) -> Report:
    """Read `subjects` again, one after the other, and drop what is bad.

    With `idly` others may use the disk first. Cancelling ends it after the block that is being read. An
    object that is no longer cached counts for nothing.
    """
    report = Report()
    for subject in subjects:
        await _audit(cache, subject, distrust, progress, report, idly)
    return report


async def _audit(
    cache: Cache, subject: Subject, distrust: Distrust, progress: Progress, report: Report, idly: bool
) -> None:
    audit = await trio.to_thread.run_sync(cache.audit, subject.key, subject.digest)
    if audit is None:
        return
    try:
        while await trio.to_thread.run_sync(partial(audit.step, idly=idly)):
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


class Scrubber:
    """Reads everything in the cache again, once a week, slowly, and not while readers wait.

    How far a pass has come survives restarts: it goes through the objects in the order of their names.

    Args:
        cache: what is read.
        subjects: gives everything in it.
        distrust: acts on bad bytes.
        busy: whether readers wait.
        rate: bytes per second, at most; more than 0.
        settle: seconds before the first read.

    Attributes:
        began: when the present or last pass began, seconds since the epoch; None before the first.
        finished: when the last one that came to its end did.
        bad: objects of which something was bad, since the daemon started.

    """

    def __init__(
        self,
        cache: Cache,
        subjects: Callable[[], Sequence[Subject]],
        distrust: Distrust,
        busy: Callable[[], bool],
        rate: int,
        *,
        settle: float = SETTLE,
    ) -> None:
        self._cache = cache
        self._subjects = subjects
        self._distrust = distrust
        self._busy = busy
        self.rate = rate
        self._settle = settle
        self.began: float | None = None
        self.finished: float | None = None
        self.bad = 0
        self._after = ""
        self._noted = -math.inf

    async def run(self) -> None:
        """Read; never returns."""
        await self._recall()
        await trio.sleep(self._settle)
        while True:
            if self.began is None or self._is_over(self.began):
                if self.began is not None:
                    await trio.sleep(max(0.0, self.began + PERIOD - time.time()))
                self.began, self._after = time.time(), ""
            await self._pass()
            self.finished = time.time()
            await self._note()

    def _is_over(self, began: float) -> bool:
        return self.finished is not None and self.finished >= began

    async def _pass(self) -> None:
        """Read what comes after the object that was read last."""
        for subject in sorted(self._subjects(), key=lambda subject: subject.key):
            if subject.key <= self._after:
                continue
            done = 0

            async def pace(_: Subject, now_done: int) -> None:
                nonlocal done
                await trio.sleep((now_done - done) / self.rate)
                done = now_done
                while self._busy():  # noqa: ASYNC110  # readers come and go all the time
                    await trio.sleep(YIELD)

            report = await verify(self._cache, [subject], self._distrust, pace, idly=True)
            self.bad += len(report.bad)
            self._after = subject.key
            if trio.current_time() - self._noted > NOTE:
                await self._note()

    async def _note(self) -> None:
        self._noted = trio.current_time()
        state = {"began": self.began, "finished": self.finished, "after": self._after}
        await trio.to_thread.run_sync(self._cache.set_meta, STATE, state)

    async def _recall(self) -> None:
        state = await trio.to_thread.run_sync(self._cache.get_meta, STATE)
        match state:
            case {"began": float(began), "finished": float() | None as finished, "after": str(after)}:
                # A clock that was set back shall not put the next pass off for years.
                self.began, self.finished, self._after = min(began, time.time()), finished, after

    def to_json(self) -> dict[str, Any]:
        """Return ``cache.scrub`` of the status document."""
        return {"rate": self.rate, "began": self.began, "finished": self.finished, "bad": self.bad}
