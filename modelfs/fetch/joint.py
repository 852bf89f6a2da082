"""A span that lies in several places, one behind the other: one sink for all of them."""

from __future__ import annotations

from modelfs.cache import Data
from modelfs.errors import BadAnswer
from modelfs.fetch.guard import Sink
from modelfs.stores import redact
from modelfs.types import Piece, Span


class Joint:
    """Passes on what the parts of a span deliver as if it came from one place.

    Args:
        sink: what takes the bytes; it is announced all of them when the first part begins.
        span: what it is to get, in bytes of the whole object.

    """

    def __init__(self, sink: Sink, span: Span) -> None:
        self._sink = sink
        self._span = span
        self._begun = False

    def part(self, piece: Piece) -> Sink:
        """Return the sink for what `piece` delivers."""
        return _Part(self, piece)

    def begin(self) -> None:
        """Announce the span, once."""
        if not self._begun:
            self._sink.begin(self._span)
            self._begun = True

    def write(self, offset: int, data: Data) -> None:
        """Take bytes that go to `offset` of the whole object."""
        self._sink.write(offset, data)


class _Part:
    def __init__(self, joint: Joint, piece: Piece) -> None:
        self._joint = joint
        self._piece = piece

    def begin(self, span: Span) -> None:
        if span != self._piece.span:  # the whole part: it may be gigabytes, of which a block is wanted
            place = redact(self._piece.location.url)
            raise BadAnswer(f"{place}: ignores ranges, so files in several parts cannot be read from there")
        self._joint.begin()

    def write(self, offset: int, data: Data) -> None:
        self._joint.write(self._piece.offset + offset, data)
