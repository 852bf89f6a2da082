"""Requests as libcurl makes them: TLS, proxies, and the connections of all others.

libcurl delivers bodies in pieces of 16 KiB, and each system call in between is a fight for the GIL when
several threads receive. So the callback only copies the piece into a buffer; the sink gets `GATHER` bytes at
once, or what there is as soon as curl has emptied the socket: gathering delays nobody.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pycurl

from modelfs.errors import BadAnswer, StoreError, Unavailable
from modelfs.fetch.exchange import DISCARD, Exchange
from modelfs.fetch.sockets import Sockets

GATHER = 256 * 1024
"""Most bytes a sink gets at once through curl; much more than the 16 KiB that it delivers at once."""

RECEIVE = 512 * 1024
"""Bytes of curl's own receive buffer: a plain connection is emptied with few system calls."""

_SUPPRESS_CONNECT_HEADERS = 265  # CURLOPT_SUPPRESS_CONNECT_HEADERS, which pycurl has no name for

_OPTIONS: Mapping[int, Any] = {
    pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
    pycurl.FOLLOWLOCATION: 0,  # by hand: curl would send all our headers but Authorization to strangers
    pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
    pycurl.HTTP_CONTENT_DECODING: 0,
    pycurl.PATH_AS_IS: 1,  # a signature covers the path as it was written, ".." and all
    _SUPPRESS_CONNECT_HEADERS: 1,  # a proxy's answer to CONNECT is not the store's
    pycurl.BUFFERSIZE: RECEIVE,
    pycurl.TCP_NODELAY: 1,
    pycurl.NOSIGNAL: 1,  # curl must not use signals in threads
    pycurl.LOW_SPEED_LIMIT: 1,
}

_BROKEN = frozenset({pycurl.E_PARTIAL_FILE, pycurl.E_FTP_WEIRD_SERVER_REPLY, pycurl.E_UNSUPPORTED_PROTOCOL})
"""Codes of curl for answers that break HTTP: cut short, unparsable, HTTP/0.9."""

_REMEDY = {
    pycurl.E_COULDNT_RESOLVE_HOST: "check the name and the DNS",
    pycurl.E_COULDNT_RESOLVE_PROXY: "check the proxy variables of the environment",
    pycurl.E_PEER_FAILED_VERIFICATION: "add the authority that signed it to ca_bundle",
    pycurl.E_SSL_CACERT_BADFILE: "check ca_bundle",
}

_STATUS = re.compile(rb"HTTP/[0-9.]+ +([0-9]{3})(?![0-9])")

Options = Mapping[int, Any]
"""What all requests of a client have in common."""


def options(*, ca_bundle: str, connect_timeout: float, stall_timeout: float, user_agent: str) -> Options:
    """Return the options of a client; times in seconds."""
    return {
        pycurl.CAINFO: ca_bundle,
        pycurl.CONNECTTIMEOUT_MS: max(1, round(connect_timeout * 1000)),
        pycurl.LOW_SPEED_TIME: math.ceil(stall_timeout),
        pycurl.USERAGENT: user_agent,
    }


class Curl:
    """One curl easy handle with the connections that it keeps alive."""

    def __init__(self, options: Options, sockets: Sockets) -> None:
        self._buffer = memoryview(bytearray(GATHER))
        self._sockets = sockets
        self._curl = _easy(options, sockets)
        self._curl.setopt(pycurl.NOPROGRESS, 0)

    def perform(self, exchange: Exchange, fields: Mapping[str, str]) -> None:
        """Make one request and deliver its answer.

        Raises:
            StoreError: the request failed, or the answer delivers nothing.
            BaseException: what the sink raises.

        """
        curl, answer = self._curl, _Answer(exchange, self._buffer)
        curl.setopt(pycurl.URL, exchange.url)
        # "Name;" is how curl spells a field without a value; "Name:" would remove it.
        lines = [f"{name}: {value}" if value else f"{name};" for name, value in fields.items()]
        curl.setopt(pycurl.HTTPHEADER, [line.encode("latin-1") for line in lines])
        curl.setopt(pycurl.PREREQFUNCTION, answer.on_connected)
        curl.setopt(pycurl.HEADERFUNCTION, answer.on_header)
        curl.setopt(pycurl.WRITEFUNCTION, answer.on_body, use_memoryview=True)
        curl.setopt(pycurl.XFERINFOFUNCTION, lambda *_: 1 if self._sockets.aborted else answer.on_progress())
        broken: pycurl.error | None = None
        try:
            curl.perform()
        except pycurl.error as error:
            broken = error
        if answer.failure is not None:
            raise answer.failure
        if exchange.target is not None:
            return
        answer.flush()  # also before a failure: the next attempt goes on behind what has arrived
        if broken is not None:
            raise _failure(exchange.place, broken) from broken
        exchange.finish()

    def close(self) -> None:
        """Close the connections."""
        self._curl.close()


class Connection:
    """A connection that curl has made and somebody else speaks on.

    Args:
        url: to whose host.
        place: the same for messages, without secrets.

    Attributes:
        fd: of its socket, which does not block.
        address: of the server.

    Raises:
        StoreError: there is no connection.

    """

    def __init__(self, url: str, place: str, options: Options, sockets: Sockets) -> None:
        self._curl = _easy(options, sockets)
        self._curl.setopt(pycurl.URL, url)
        self._curl.setopt(pycurl.CONNECT_ONLY, 1)
        try:
            self._curl.perform()
            self.fd: int = self._curl.getinfo(pycurl.ACTIVESOCKET)
            self.address: str = self._curl.getinfo(pycurl.PRIMARY_IP)
        except pycurl.error as error:
            self._curl.close()
            raise _failure(place, error) from error

    def close(self) -> None:
        """Close it."""
        self._curl.close()


class _Answer:
    """What curl calls back. No exception may leave a callback: it is kept, and curl is told to stop."""

    def __init__(self, exchange: Exchange, buffer: memoryview) -> None:
        self.failure: BaseException | None = None
        self._exchange = exchange
        self._status = 0
        self._headers: dict[str, str] = {}
        self._discarded = 0
        self._buffer = buffer
        self._fill = 0

    def on_connected(self, address: str, *_: object) -> int:
        """Judge the connection before the request is sent on it."""
        try:
            self._exchange.connected(address)
        except BadAnswer as error:
            self.failure = error
            return 1
        return 0

    def on_header(self, line: bytes) -> int | None:
        """Take one line of the head; the blank one at its end decides what becomes of the body."""
        try:
            if self._exchange.body is not None:
                return None  # a trailer
            if match := _STATUS.match(line):  # the final answer may follow interim ones
                self._status, self._headers = int(match[1]), {}
            elif line not in (b"\r\n", b"\n"):
                name, _, value = line.decode("latin-1").partition(":")
                key, value = name.lower(), value.strip(" \t\r\n")
                self._headers[key] = f"{self._headers[key]}, {value}" if key in self._headers else value
            elif self._status >= 200:
                self._exchange.answered(self._status, self._headers)
        except BaseException as error:
            self.failure = error
            return 0 if self._status in (200, 206) else None
        return None

    def on_body(self, data: memoryview) -> int | None:
        """Gather one piece of the body. This runs for every 16 KiB: nothing but the copy is done here."""
        fill = self._fill
        end = fill + len(data)
        if end > GATHER or self._exchange.body is None:
            return self._make_room(data)
        self._buffer[fill:end] = data
        self._fill = end
        return None

    def _make_room(self, data: memoryview) -> int | None:
        if self._exchange.body is None:
            self._discarded += len(data)
            return None if self._discarded <= DISCARD else 0
        return 0 if self.on_progress() else self.on_body(data)

    def on_progress(self) -> int:
        """Pass on what was gathered: curl calls this when it has emptied the socket."""
        try:
            self.flush()
        except BaseException as error:
            self.failure = error
            return 1
        return 0

    def flush(self) -> None:
        """Give the exchange what was gathered."""
        if self._fill:
            data, self._fill = self._buffer[: self._fill], 0
            self._exchange.deliver(data)


def _failure(place: str, error: pycurl.error) -> StoreError:
    """Return what curl's error means; every failure to reach the store is worth another attempt."""
    arguments: tuple[Any, ...] = error.args
    code, text = arguments[0], re.sub(r"[^ -~]", "?", arguments[1])
    if code in _BROKEN:
        return BadAnswer(f"{place}: broken answer ({text}); try again")
    return Unavailable(f"{place}: {text}; {_REMEDY.get(code, 'check the network')}")


def _easy(options: Options, sockets: Sockets) -> Any:
    def opened(fd: int, purpose: int) -> int:
        return pycurl.SOCKOPT_OK if sockets.opened(fd) else pycurl.SOCKOPT_ERROR

    def closed(fd: int) -> int:
        sockets.close(fd)
        return 0

    curl = pycurl.Curl()
    for option, value in {**_OPTIONS, **options}.items():
        curl.setopt(option, value)
    curl.setopt(pycurl.SOCKOPTFUNCTION, opened)
    curl.setopt(pycurl.CLOSESOCKETFUNCTION, closed)
    return curl
