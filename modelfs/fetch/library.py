"""Locations with a reader: bytes that only the library of their store can fetch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from modelfs.errors import BadAnswer, Unavailable
from modelfs.fetch.guard import Guard, in_thread
from modelfs.types import Span

PIECE = 1 << 20
"""Bytes asked for at once: what a reader returns is in memory."""

_THREADS = trio.CapacityLimiter(16)


async def read_by(
    reader: Callable[[Span], bytes], place: str, span: Span, sink: Guard, stall_timeout: float
) -> None:
    """Read `span` into `sink`, piece by piece.

    The reader's thread touches nothing of the sink's, so a cancelled or late one is left to end by itself.

    Args:
        reader: of the location; returns the bytes of a span, of the pinned version only.
        place: for messages.
        span: not empty.
        sink: what takes the bytes.
        stall_timeout: seconds that a piece may take.

    Raises:
        Unavailable: a piece took longer.
        BadAnswer: the reader returned less or more than it was asked for.
        StoreError: what the reader raised.

    """
    for start in range(span.start, span.stop, PIECE):
        piece = Span(start, min(start + PIECE, span.stop))
        with trio.move_on_after(stall_timeout) as scope:
            data = await trio.to_thread.run_sync(reader, piece, abandon_on_cancel=True, limiter=_THREADS)
        if scope.cancelled_caught:
            raise Unavailable(f"{place}: no answer within {stall_timeout:g} s; is the store reachable?")
        if len(data) != len(piece):
            raise BadAnswer(f"{place}: {len(data)} bytes came instead of {len(piece)}; try again")
        begins = span if start == span.start else None
        await in_thread(partial(_deliver, sink, begins, start, data), sink.abort)


def _deliver(sink: Guard, begins: Span | None, offset: int, data: bytes) -> None:
    if begins is not None:
        sink.begin(begins)
    sink.write(offset, data)
