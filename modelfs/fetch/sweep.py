"""One forward pass over a stream that cannot be entered anywhere, shared by all who need bytes of it.

Who needs bytes makes a request and waits; a thread unpacks and gives each piece to all requests that it
belongs to. Requests belong to both: the trio thread adds and removes them, the thread serves them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import BinaryIO

import trio

from modelfs.archives.streams import Stream
from modelfs.errors import BadArchive, ModelfsError
from modelfs.fetch.guard import Sink
from modelfs.types import Span

log = logging.getLogger(__name__)

CHUNK = 1024 * 1024
"""Unpacked bytes handed on at once."""

IDLE_SECONDS = 5.0
"""How long a thread waits for the next request where it stopped: readers come back for what follows."""


class Request:
    """Bytes of a stream that somebody waits for.

    Attributes:
        stop: where they end in the stream.
        next: the first that is still missing.
        done: set when nothing more will come: all came, or `error` says why not.

    """

    def __init__(self, base: int, span: Span, sink: Sink) -> None:
        self.next, self.stop = base + span.start, base + span.stop
        self.error: Exception | None = None
        self.done = trio.Event()
        self._base = base
        self._span = span
        self._sink = sink
        self._begun = False
        self._closed = False
        self._lock = threading.Lock()
        self._token = trio.lowlevel.current_trio_token()

    def take(self, offset: int, data: memoryview) -> bool:
        """Hand on what of `data`, at `offset` of the stream, belongs here; return whether that is the end."""
        with self._lock:
            if self._closed:
                return True
            part = data[self.next - offset : self.stop - offset]
            try:
                if not self._begun:
                    self._begun = True
                    self._sink.begin(self._span)
                self._sink.write(self.next - self._base, part)
            except Exception as error:  # the taker's own, and no matter of the others
                self.error = error
                return True
            self.next += len(part)
            return self.complete

    def finish(self) -> None:
        """Wake who waits, from any thread."""
        self._token.run_sync_soon(self.done.set)

    @property
    def complete(self) -> bool:
        """Whether all bytes were handed on."""
        return self.next == self.stop

    def close(self) -> None:
        """Hand on nothing more; returns when nothing is being handed on."""
        with self._lock:
            self._closed = True


class Requests:
    """The requests to one thread, and how far it is."""

    def __init__(self) -> None:
        self.position = 0
        self._lock = threading.Lock()
        self._waiting: list[Request] = []

    def add(self, request: Request) -> None:
        """Add a request."""
        with self._lock:
            self._waiting.append(request)

    def add_ahead(self, request: Request) -> bool:
        """Add a request unless what it needs has gone by; return whether it was added."""
        with self._lock:
            if request.next < self.position:
                return False
            self._waiting.append(request)
            return True

    def pending(self) -> list[Request]:
        """Return the requests that wait."""
        with self._lock:
            return list(self._waiting)

    def serve(self, offset: int, data: bytes) -> None:
        """Give `data`, at `offset` of the stream, to whom it belongs; in the thread."""
        stop = offset + len(data)
        with self._lock:
            self.position = stop
            takers = [request for request in self._waiting if offset <= request.next < stop]
        view = memoryview(data)
        for request in takers:
            if request.take(offset, view):
                self._remove(request)
                request.finish()

    def end(self, error: Exception | None) -> None:
        """End all requests, with an error or incomplete."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for request in waiting:
            request.error = error
            request.finish()

    async def wait(self, request: Request) -> bool:
        """Wait for the end of an added request; return whether all of it came.

        Cancelled, it returns when the sink is no longer in use.

        Raises:
            Exception: what the sink raised, or what ended the thread.

        """
        try:
            await request.done.wait()
        finally:
            self._remove(request)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(request.close, limiter=_CLOSING)
        if request.error is not None:
            raise request.error
        return request.complete

    def _remove(self, request: Request) -> None:
        with self._lock:
            if request in self._waiting:
                self._waiting.remove(request)


_CLOSING = trio.CapacityLimiter(8)

Enter = Callable[[BinaryIO, int, int | None], Stream | None]
"""Called with the packed bytes, the position that is wanted and the one where a stream is, if there is one.

Returns a stream at or before the wanted position, or None if the one that there is shall go on.
"""


class Sweep:
    """Serves requests out of one stream in the order in which they lie; one thread, while there are any.

    Args:
        nursery: where its thread is waited for.
        limiter: of its thread.
        opened: opens the packed bytes for the thread.
        enter: opens the stream.

    """

    def __init__(
        self,
        nursery: trio.Nursery,
        limiter: trio.CapacityLimiter,
        opened: Callable[[], AbstractAsyncContextManager[BinaryIO]],
        enter: Enter,
    ) -> None:
        self._nursery = nursery
        self._limiter = limiter
        self._opened = opened
        self._enter = enter
        self._requests = Requests()
        self._arrived = trio.lowlevel.ParkingLot()
        self.running = False

    async def fetch(self, base: int, span: Span, sink: Sink) -> None:
        """Bring `span`, in bytes of an object that begins at `base` of the stream, into `sink`.

        Raises:
            ModelfsError: the bytes cannot be had.
            Exception: what the sink raised.

        """
        request = Request(base, span, sink)
        self._requests.add(request)
        self._arrived.unpark_all()
        self._start()
        await self._requests.wait(request)

    def _start(self) -> None:
        if not self.running:
            self.running = True
            self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        try:
            async with self._opened() as file:
                await trio.to_thread.run_sync(self._serve, file, limiter=self._limiter)
        except ModelfsError as error:
            self._requests.end(error)
        except Exception as error:  # whatever an archive did to a library, it must not end the daemon
            log.exception("unpacking failed")
            self._requests.end(BadArchive(f"it cannot be unpacked: {type(error).__name__}"))
        self.running = False
        if self._requests.pending():  # made in the last moment
            self._start()

    def _serve(self, file: BinaryIO) -> None:
        stream: Stream | None = None
        while request := trio.from_thread.run(self._next, stream.position if stream else 0):
            entered = self._enter(file, request.next, stream.position if stream else None)
            stream = entered or stream
            if stream is None or stream.position > request.next:
                raise AssertionError("a stream was entered behind what is wanted")
            while stream.position < request.stop:
                offset = stream.position
                data = stream.read(min(CHUNK, request.stop - offset))
                if not data:
                    raise BadArchive("its content ends early")
                self._requests.serve(offset, data)
                if request not in self._requests.pending():
                    break

    async def _next(self, position: int) -> Request | None:
        """Return the next request ahead of `position`, else the first, None if none comes for a while."""
        with trio.move_on_after(IDLE_SECONDS):
            while not self._requests.pending():
                await self._arrived.park()
        pending = self._requests.pending()
        ahead = [request for request in pending if request.next >= position]
        return min(ahead or pending, key=lambda request: request.next, default=None)
