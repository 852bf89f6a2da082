"""One HTTP request and what becomes of its answer; knows nothing of how it is spoken."""

from __future__ import annotations

from collections.abc import Mapping

from modelfs.cache import Data
from modelfs.errors import BadAnswer
from modelfs.fetch.answer import RANGE_REFUSED, REDIRECTS, accept, redirect
from modelfs.fetch.guard import Sink
from modelfs.stores import redact
from modelfs.stores.reach import Reach, allowed, peer_reach, written_reach
from modelfs.types import Location, Span

DISCARD = 64 * 1024
"""Bytes of an error's or redirect's body that are read so that the connection can be used again."""


class Exchange:
    """Judges the answer to one request and passes its body on to the sink.

    Attributes:
        url: what is requested, without anything that needs encoding.
        reach: of who answers; a server must not be nearer than the one that redirected to it.
        ranged: whether a range is asked for; False once the server has refused to send one.
        target: where to ask next: where the answer redirects to, or here for the whole; or None.
        body: the span that the answer delivers, None before it was accepted or if it was not.

    """

    def __init__(
        self, url: str, location: Location, span: Span, size: int, sink: Sink, reach: Reach, *, ranged: bool
    ) -> None:
        self.url = url
        self.reach = reach
        self.ranged = ranged
        self.place = redact(url)
        self.target: str | None = None
        self.body: Span | None = None
        self._location = location
        self._span = span
        self._size = size
        self._sink = sink
        self._offset = 0

    def connected(self, address: str) -> None:
        """Judge whom we are connected to, before anything is asked of it.

        Raises:
            BadAnswer: it is nearer than who sent us there.

        """
        self.reach = allowed(self.url, peer_reach(self.url, address), self.reach)

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        """Take the head of the final answer: header names in lower case, repeated ones joined by ``", "``.

        Raises:
            StoreError: what the answer means, if it delivers nothing.
            BaseException: what the sink raises.

        """
        if status in REDIRECTS:
            target = redirect(self.url, headers)
            allowed(target, written_reach(target), self.reach)
            self.target = target
            return
        if self.ranged and status in RANGE_REFUSED:
            self.ranged, self.target = False, self.url
            return
        body = accept(self.place, status, headers, self._location, self._span, self._size)
        self._sink.begin(body)
        self.body, self._offset = body, body.start

    def deliver(self, data: Data) -> None:
        """Give the sink the next bytes of the body; never one behind what the answer announced.

        Raises:
            BadAnswer: there are more.
            BaseException: what the sink raises.

        """
        count = len(data)
        if self.body is None or self._offset + count > self.body.stop:
            raise BadAnswer(f"{self.place}: sent more bytes than it announced; try again")
        self._sink.write(self._offset, data)
        self._offset += count

    def finish(self) -> None:
        """Check that the answer was complete.

        Raises:
            BadAnswer: it was not.

        """
        if self.body is None or self._offset != self.body.stop:
            raise BadAnswer(f"{self.place}: the answer ended early, at byte {self._offset}; try again")
