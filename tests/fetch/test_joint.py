"""An object that lies in several places is read as if it were in one."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from modelfs.cache import Data, Pipe
from modelfs.errors import BadAnswer, Stale
from modelfs.fetch.client import RangeClient
from modelfs.metrics import Metrics
from modelfs.types import Location, Span
from tests.origin import Origin

CONTENT = random.Random(7).randbytes(300_000)
CUTS = (0, 100_000, 100_000, 170_000, 300_000)
PARTS = {f"p{number}": CONTENT[start:stop] for number, (start, stop) in enumerate(pairwise(CUTS))}


class Sink:
    def __init__(self) -> None:
        self.begun: list[Span] = []
        self.data = bytearray()

    def begin(self, span: Span) -> None:
        self.begun.append(span)

    def write(self, offset: int, data: Data) -> None:
        assert offset == self.begun[0].start + len(self.data)
        self.data += data.take(len(data)) if isinstance(data, Pipe) else data


def fetched(location: Location, span: Span, size: int = len(CONTENT)) -> Sink:
    sink = Sink()

    async def main() -> None:
        async with RangeClient(metrics=Metrics()) as client:
            await client.fetch(location, span, size, sink)

    trio.run(main)
    return sink


def at(origin: Origin, directory: Path) -> Location:
    """Return the location of parts at a server, in a file and inline."""
    file = directory / "p2"
    file.write_bytes(PARTS["p2"])
    urls = {"p0": f"{origin.url}p0", "p2": file.as_uri(), "p3": f"{origin.url}p3"}
    places = [Location(urls[name]) if name in urls else Location.inline(data) for name, data in PARTS.items()]
    return Location.joined(zip(map(len, PARTS.values()), places, strict=True))


@pytest.mark.parametrize(
    "span",
    [
        Span(0, 300_000),
        Span(0, 1),
        Span(99_999, 100_001),
        Span(100_000, 170_000),
        Span(5, 299_999),
        Span(169_999, 170_000),
    ],
    ids=str,
)
def test_a_span_comes_from_all_parts_that_hold_it(tmp_path: Path, span: Span) -> None:
    with Origin(PARTS) as origin:
        sink = fetched(at(origin, tmp_path), span)
    assert sink.begun == [span]
    assert sink.data == CONTENT[span.start : span.stop]
    holders = [
        name
        for name, stop in zip(("p0", "p3"), (100_000, 300_000), strict=True)
        if span.stop > stop - len(PARTS[name]) and span.start < stop
    ]
    assert [path for _, path, _ in origin.log] == holders


def test_a_part_that_fails_leaves_a_prefix(tmp_path: Path) -> None:
    with Origin({**PARTS, "p3": b"shorter"}) as origin, pytest.raises(Stale):
        fetched(at(origin, tmp_path), Span(150_000, 300_000))


def test_a_server_of_parts_must_honour_ranges(tmp_path: Path) -> None:
    with Origin(PARTS) as origin:
        origin.ranges = False
        assert fetched(at(origin, tmp_path), Span(0, 300_000)).data == CONTENT
        with pytest.raises(BadAnswer, match="ignores ranges"):
            fetched(at(origin, tmp_path), Span(1, 300_000))


def test_parts_of_another_size_are_refused(tmp_path: Path) -> None:
    with Origin(PARTS) as origin, pytest.raises(BadAnswer, match="parts of 300000 bytes instead of 299999"):
        fetched(at(origin, tmp_path), Span(0, 10), 299_999)


def test_joined_locations_expire_with_the_first() -> None:
    ends = (None, 200.0, 100.0)
    assert Location.joined((1, Location("http://x/", expires=end)) for end in ends).expires == 100.0
    assert Location.joined([(1, Location("http://x/"))]).expires is None
