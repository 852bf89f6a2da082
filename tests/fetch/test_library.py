"""The range client with a location that carries its reader."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio

from modelfs.errors import BadAnswer, Stale, StoreError, Unavailable
from modelfs.fetch.client import RangeClient
from modelfs.fetch.library import PIECE
from modelfs.metrics import Metrics
from modelfs.types import Location, Span
from tests.fetch.test_client import Basket

CONTENT = bytes(range(256)) * (3 * PIECE // 256) + b"end"


def fetch(reader: Callable[[Span], bytes], basket: Basket, span: Span, **options: float) -> None:
    async def main() -> None:
        async with RangeClient(metrics=Metrics(), **options) as client:
            await client.fetch(Location("odd://place", reader=reader), span, len(CONTENT), basket)

    trio.run(main)


def test_a_span_is_read_piece_by_piece() -> None:
    basket, asked = Basket(), list[Span]()

    def reader(span: Span) -> bytes:
        asked.append(span)
        return CONTENT[span.start : span.stop]

    span = Span(7, len(CONTENT))
    fetch(reader, basket, span)
    assert basket.span == span
    assert basket.data == CONTENT[7:]
    assert [len(piece) for piece in asked] == [PIECE, PIECE, PIECE - 4]


@pytest.mark.parametrize("surplus", [-1, 1])
def test_less_or_more_than_was_asked_for_is_a_bad_answer(surplus: int) -> None:
    basket = Basket()
    with pytest.raises(BadAnswer, match="odd://place"):
        fetch(lambda span: CONTENT[span.start : span.stop + surplus], basket, Span(0, 10))
    assert not basket.data


def test_what_came_before_a_change_is_kept() -> None:
    basket = Basket()

    def reader(span: Span) -> bytes:
        if span.start:
            raise Stale("odd://place: was changed")
        return CONTENT[: span.stop]

    with pytest.raises(Stale):
        fetch(reader, basket, Span(0, 2 * PIECE))
    assert basket.data == CONTENT[:PIECE]


def test_silence_is_unavailable_and_can_be_cancelled() -> None:
    basket, going = Basket(), threading.Event()

    def silent(span: Span) -> bytes:
        going.wait(30)
        return CONTENT[span.start : span.stop]

    async def cancelled() -> None:
        async with RangeClient(metrics=Metrics()) as client:
            with trio.move_on_after(0.1) as scope:
                await client.fetch(Location("odd://place", reader=silent), Span(0, 9), len(CONTENT), basket)
            assert scope.cancelled_caught

    try:
        with pytest.raises(Unavailable, match=r"no answer within 0\.2 s"):
            fetch(silent, basket, Span(0, 9), stall_timeout=0.2)
        trio.run(cancelled)
    finally:
        going.set()
    assert basket.span is None


def test_an_odd_place_without_a_reader_is_a_bad_answer() -> None:
    async def main() -> None:
        async with RangeClient(metrics=Metrics()) as client:
            await client.fetch(Location("odd://place"), Span(0, 9), 9, Basket())

    with pytest.raises(StoreError, match="bytes come from"):
        trio.run(main)
