"""The seam between a trio task that fetches and the thread that moves its bytes.

The thread writes into a `Sink` through a `Guard`; `in_thread` runs it, and tells it of a cancellation.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import trio
from prometheus_client import Counter

from modelfs.cache import Data
from modelfs.types import Span

if TYPE_CHECKING:
    from outcome import Outcome


class Sink(Protocol):
    """What takes the bytes of one attempt.

    Its methods are called in a worker thread, one after the other, with contiguous data. What they raise ends
    the transfer and comes out of `RangeClient.fetch` as it is.
    """

    def begin(self, span: Span) -> None:
        """Learn, once and before any byte, which bytes follow: those asked for, or all of the object.

        The latter when the server ignored the range; raise if they are not wanted.
        """

    def write(self, offset: int, data: Data) -> None:
        """Take all bytes of `data`, which go to `offset`. A buffer is used again: keep no view of it."""


async def in_thread(work: Callable[[], None], abort: Callable[[], bool]) -> None:
    """Run `work` in a worker thread and raise what it raises.

    This is ``trio.to_thread.run_sync`` with a word to the thread when the task is cancelled: `abort` is
    called in the trio thread. If it returns True the thread is about to end and is waited for, so that
    nothing of the caller's is in use any more; its failure then becomes the cancellation, while work that
    was just completed counts. If it returns False the thread uses nothing of the caller's and is left to
    itself.
    """
    task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
    cancel: Callable[[], object] | None = None
    awaited = True

    def resume(result: Outcome[None]) -> None:
        if awaited:
            trio.lowlevel.reschedule(task, result)

    def deliver(result: Outcome[None]) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # only a thread left to itself outlives the run
            token.run_sync_soon(resume, result)

    def on_cancel(raise_cancel: Callable[[], object]) -> trio.lowlevel.Abort:
        nonlocal cancel, awaited
        cancel, awaited = raise_cancel, abort()
        return trio.lowlevel.Abort.FAILED if awaited else trio.lowlevel.Abort.SUCCEEDED

    # No checkpoint before: a cancellation that is already pending aborts the thread like any other.
    trio.lowlevel.start_thread_soon(work, deliver, "modelfs range client")
    try:
        await trio.lowlevel.wait_task_rescheduled(on_cancel)
    except Exception:
        if cancel is not None:  # whatever ended it, it was told to end: that is the cancellation
            cancel()
        raise


class Aborted(Exception):
    """Raised in a transfer's thread after its task was cancelled; `in_thread` makes it the cancellation."""


class Guard:
    """The sink of a transfer as its thread sees it: counted, paced, and out of reach once aborted."""

    def __init__(self, sink: Sink, received: Counter, pace: Pace | None) -> None:
        self._sink = sink
        self._received = received
        self._pace = pace
        self._lock = threading.Lock()
        self._aborted = threading.Event()
        self._begun = False

    def begin(self, span: Span) -> None:
        """Pass on, or raise Aborted."""
        with self._lock:
            if self._aborted.is_set():
                raise Aborted
            self._begun = True
        self._sink.begin(span)

    def write(self, offset: int, data: Data) -> None:
        """Pass on, count and wait for the speed limit, or raise Aborted."""
        if self._aborted.is_set():
            raise Aborted
        count = len(data)
        self._received.inc(count)
        self._sink.write(offset, data)
        if self._pace:
            self._aborted.wait(self._pace.delay(count))

    def abort(self) -> bool:
        """End the transfer at its next call; return whether the sink may be in use at this moment."""
        with self._lock:
            self._aborted.set()
            return self._begun


class Pace:
    """A speed limit in bytes per second that many threads share."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._due = 0.0

    def delay(self, count: int) -> float:
        """Return the seconds to wait now that `count` more bytes were moved."""
        now = time.monotonic()
        with self._lock:
            self._due = max(self._due, now) + count / self._rate
            return self._due - now
