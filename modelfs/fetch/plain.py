"""Requests over HTTP without TLS: bodies go from the socket into the cache file without passing through us.

libcurl makes the connection, h11 speaks HTTP/1.1 (RFC 9112), and a body whose length was announced is moved
by splice(2). Compared with libcurl's callbacks that is half of the CPU time per byte (docs/data-plane.md);
where origin, daemon and reader share the machine's cores, that is what cold reads are limited by.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import h11

from modelfs.cache import Pipe
from modelfs.errors import BadAnswer, StoreError, Unavailable
from modelfs.fetch.answer import origin_of
from modelfs.fetch.curl import Connection
from modelfs.fetch.exchange import DISCARD, Exchange

KEPT = 4
"""Connections that are kept alive, each to another origin: a store and those that it redirects to."""

HEAD = 64 * 1024
"""Most bytes of an answer's head."""

RECEIVE = 16 * 1024
"""Bytes that are received at once where they are looked at: heads, and bodies of unknown length."""

BULK = 512 * 1024
"""Bytes that are waited for before a body is moved on: each wake-up is a fight for the GIL."""

PATIENCE = 0.01
"""Seconds after which what is there is moved on, be it less: a slow network delays nobody by more."""

_PROXIES = ("http_proxy", "all_proxy", "ALL_PROXY")
"""The variables by which curl chooses a proxy for plain HTTP; without upper case, which CGI made unsafe."""


def is_plain(url: str) -> bool:
    """Return whether `url` is spoken to without TLS, without a proxy, and without a password of its own."""
    proxied = any(os.environ.get(name) for name in _PROXIES)
    return url[:5].lower() == "http:" and not proxied and "@" not in urlsplit(url).netloc


class Plain:
    """Makes requests on the connections that it keeps alive.

    Args:
        connect: makes a connection to the host of a URL, which the second argument tells without secrets.
        stall_timeout: seconds without a byte after which a request fails.
        user_agent: what servers see.

    """

    def __init__(
        self, connect: Callable[[str, str], Connection], stall_timeout: float, user_agent: str
    ) -> None:
        self._connect = connect
        self._stall = stall_timeout
        self._agent = user_agent
        self._kept: OrderedDict[tuple[str, str, int], _Line] = OrderedDict()

    def perform(self, exchange: Exchange, fields: Mapping[str, str]) -> None:
        """Make one request and deliver its answer; raises what ``Curl.perform`` raises."""
        fields = {"User-Agent": self._agent, "Accept": "*/*", **fields}
        line = self._kept.pop(origin_of(exchange.url), None)
        if line is not None and line.is_quiet():
            with contextlib.suppress(_Gone):  # closed since it was used last: it is asked on a new one
                self._converse(line, fields, exchange)
                return
        elif line is not None:
            line.close()
        line = _Line(self._connect(exchange.url, exchange.place), self._stall)
        try:
            self._converse(line, fields, exchange)
        except _Gone as error:
            raise Unavailable(f"{exchange.place}: {error}; check the network") from error

    def _converse(self, line: _Line, fields: Mapping[str, str], exchange: Exchange) -> None:
        try:
            line.converse(exchange, fields)
        except ConnectionError as error:
            raise Unavailable(f"{exchange.place}: {error.strerror}; check the network") from error
        except h11.LocalProtocolError as error:
            raise BadAnswer(f"{exchange.place}: malformed URL; check the URL of the store") from error
        except h11.RemoteProtocolError as error:
            text = re.sub(r"[^ -~]", "?", str(error))
            raise BadAnswer(f"{exchange.place}: broken answer ({text}); try again") from error
        finally:
            if line.reusable:
                self._kept[origin_of(exchange.url)] = line
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)[1].close()
            else:
                line.close()

    def close(self) -> None:
        """Close the connections."""
        while self._kept:
            self._kept.popitem()[1].close()


class _Gone(Exception):
    """The server closed the connection before it answered."""


class _Line:
    """A connection, and the pipe that its bodies go through."""

    def __init__(self, connection: Connection, stall: float) -> None:
        self.reusable = False
        self._connection = connection
        self._fd = connection.fd
        self._stall = stall
        self._pipe = Pipe()
        self._socket = socket.socket(fileno=self._fd)
        self._waking = 1
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def is_quiet(self) -> bool:
        """Return whether nothing has come since the last answer, which would be its end or nonsense."""
        self._wake_at(1)
        return not self._poll.poll(0)

    def close(self) -> None:
        self._socket.detach()
        self._pipe.close()
        self._connection.close()

    def converse(self, exchange: Exchange, fields: Mapping[str, str]) -> None:
        """Make a request and deliver the answer; `reusable` says afterwards whether there may be another.

        Raises:
            _Gone: not a byte of an answer came.
            h11.ProtocolError: the request (Local) or the answer (Remote) is not HTTP.
            ConnectionError: it broke.
            StoreError: the answer delivers nothing, or did not come in time.
            BaseException: what the sink raises.

        """
        self.reusable = False
        self._wake_at(1)
        exchange.connected(self._connection.address)
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD)
        head = self._ask(http, exchange, fields)
        headers: dict[str, str] = {}
        for name, value in head.headers:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        stays = head.http_version == b"1.1" and "close" not in headers.get("connection", "").lower()
        try:
            exchange.answered(head.status_code, headers)
        except StoreError:
            self.reusable = stays and self._drained(http, exchange)
            raise
        if exchange.target is not None:
            self.reusable = stays and self._drained(http, exchange)
            return
        if "content-length" in headers and "transfer-encoding" not in headers:
            self._splice(http, exchange, int(headers["content-length"]))
        else:
            while isinstance(event := self._next(http, exchange), h11.Data):
                exchange.deliver(bytes(event.data))
        exchange.finish()
        self.reusable = stays and not http.trailing_data[0]

    def _ask(self, http: h11.Connection, exchange: Exchange, fields: Mapping[str, str]) -> h11.Response:
        """Send the request and return the head of the final answer, which may follow interim ones."""
        parts = urlsplit(exchange.url)
        target = exchange.url.partition("://")[2][len(parts.netloc) :].partition("#")[0]
        named = {name.lower() for name in fields}
        host = {} if "host" in named else {"Host": parts.netloc}
        request = h11.Request(
            method="GET",
            target=target if target.startswith("/") else f"/{target}",
            headers=[(k.encode(), v.encode("latin-1")) for k, v in {**host, **fields}.items()],
        )
        try:
            self._send((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""), exchange)
            first = self._receive(exchange)
        except ConnectionError as error:
            raise _Gone(error.strerror) from error
        if not first:
            raise _Gone("the server closed the connection without an answer")
        http.receive_data(first)
        while not isinstance(event := self._next(http, exchange), h11.Response):
            """An interim answer."""
        return event

    def _next(self, http: h11.Connection, exchange: Exchange) -> h11.Event:
        while not isinstance(event := http.next_event(), h11.Event):
            http.receive_data(self._receive(exchange))
        return event

    def _drained(self, http: h11.Connection, exchange: Exchange) -> bool:
        """Read the rest of what delivers nothing; return False if it is not worth the connection."""
        size = 0
        with contextlib.suppress(ConnectionError, h11.RemoteProtocolError, Unavailable):
            while size <= DISCARD:
                event = self._next(http, exchange)
                if not isinstance(event, h11.Data):
                    return not http.trailing_data[0]
                size += len(event.data)
        return False

    def _splice(self, http: h11.Connection, exchange: Exchange, left: int) -> None:
        """Deliver a body of `left` bytes, of which some may have come with the head."""
        while left and isinstance(event := http.next_event(), h11.Data):
            exchange.deliver(bytes(event.data))
            left -= len(event.data)
        while left:
            ended: ConnectionError | bool = False
            try:
                while len(self._pipe) < left and not ended:
                    ended = self._pipe.fill(self._fd, left - len(self._pipe)) == 0
            except BlockingIOError:
                """The socket is empty or the pipe is full."""
            except ConnectionError as error:
                ended = error
            if count := len(self._pipe):
                exchange.deliver(self._pipe)
                left -= count
            elif not ended:
                self._await_bulk(min(left, BULK), exchange)
            if isinstance(ended, ConnectionError):
                raise ended
            if ended:
                return

    def _send(self, data: bytes, exchange: Exchange) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                self._wait(exchange, select.POLLOUT)

    def _receive(self, exchange: Exchange) -> bytes:
        while True:
            try:
                return os.read(self._fd, RECEIVE)
            except BlockingIOError:
                self._wait(exchange)

    def _await_bulk(self, count: int, exchange: Exchange) -> None:
        """Return when `count` bytes are there, or any after `PATIENCE`, or the end."""
        self._wake_at(count)
        if not self._poll.poll(PATIENCE * 1000):
            self._wake_at(1)
            self._wait(exchange)

    def _wake_at(self, count: int) -> None:
        """Let polls return when so many bytes are there; ``SO_RCVLOWAT`` of socket(7)."""
        if self._waking != count:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._waking = count

    def _wait(self, exchange: Exchange, event: int = select.POLLIN) -> None:
        poll = select.poll()
        poll.register(self._fd, event)
        if not poll.poll(self._stall * 1000):
            raise Unavailable(f"{exchange.place}: no byte for {self._stall:g} s; check the network")
