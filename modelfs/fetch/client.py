"""The range client: one location, one span, one attempt. All bytes of all stores come through here.

HTTP is libcurl's: of the clients compared in ``docs/data-plane.md`` it needs the least CPU for TLS. Each
request runs in a worker thread on a curl easy handle from a pool; a handle keeps its connections alive, so
that the next request to the same host needs no handshake. HTTP/1.1 only: one TCP connection per request in
flight is faster than streams that share one.

libcurl delivers bodies in pieces of 16 KiB, and each system call in between is a fight for the GIL when
several threads receive. So the callback only copies the piece into a buffer; the sink gets `GATHER` bytes at
once, or what there is as soon as curl has emptied the socket: gathering delays nobody.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import certifi
import pycurl
import trio

from modelfs import __version__
from modelfs.errors import BadAnswer, ConfigError, StoreError, Unavailable
from modelfs.fetch.answer import ascii_url, origin_of
from modelfs.fetch.exchange import GATHER, Exchange
from modelfs.fetch.guard import Guard, Pace, Sink, in_thread
from modelfs.fetch.local import read_data, read_file
from modelfs.metrics import Metrics
from modelfs.stores import redact
from modelfs.stores.reach import Reach
from modelfs.types import Location, Span

__all__ = ["RangeClient", "Sink"]

RECEIVE = 512 * 1024
"""Bytes of curl's own receive buffer: a plain connection is emptied with few system calls."""

MAX_REDIRECTS = 5

_CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine, BSD
)


class RangeClient:
    """Fetches spans over HTTP(S), from files and from data URLs, at most `connections` at once.

    Proxies are those of the usual environment variables. Use it as an asynchronous context manager or call
    `close`.

    Args:
        metrics: what is counted; the label ``scheme`` is that of the location.
        connections: most transfers at once; further ones wait their turn.
        connect_timeout: seconds for name resolution, connection and TLS handshake.
        stall_timeout: seconds without a byte after which a transfer fails; rounded up to whole ones, and
            noticed up to five seconds later, for curl averages.
        ca_bundle: PEM file of the authorities to trust; by default ``$SSL_CERT_FILE``, the system's bundle or
            certifi's, the first that exists.
        user_agent: what servers see.
        bandwidth: most bytes per second of all transfers together, enough for each to move `GATHER` bytes
            within `stall_timeout`; None for no limit.

    Raises:
        ConfigError: the CA bundle cannot be read.

    """

    def __init__(
        self,
        *,
        metrics: Metrics,
        connections: int = 16,
        connect_timeout: float = 10,
        stall_timeout: float = 30,
        ca_bundle: str | None = None,
        user_agent: str = f"modelfs/{__version__}",
        bandwidth: float | None = None,
    ) -> None:
        self._metrics = metrics
        self._connections = connections
        self._limiter = trio.CapacityLimiter(connections)
        self._pace = Pace(bandwidth) if bandwidth else None
        self._lock = threading.Lock()
        self._idle: list[_Handle] = []
        self._closed = False
        self._handles = 0
        self._options = {
            pycurl.CAINFO: _ca_bundle(ca_bundle),
            pycurl.CONNECTTIMEOUT_MS: max(1, round(connect_timeout * 1000)),
            pycurl.LOW_SPEED_TIME: math.ceil(stall_timeout),
            pycurl.USERAGENT: user_agent,
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that nobody uses, and each one in use as soon as its transfer has ended."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for handle in idle:
            handle.close()

    async def fetch(self, location: Location, span: Span, size: int, sink: Sink) -> None:
        """Fetch `span` of the object of `size` bytes at `location` into `sink`, in one attempt.

        An empty span needs no request and calls nothing. Redirects are followed, but to no address nearer
        than that of who redirects (`modelfs.stores.reach`), and `location.headers` are sent to the host of
        `location.url` only. When this returns the sink has all bytes that it was announced; when it raises,
        a prefix of them, each of them of the pinned version.

        Cancelled, it aborts the transfer at once, even one whose server is silent, and the sink is not
        called afterwards.

        Raises:
            Stale: the store has other bytes now.
            Expired: the location's signature is no longer accepted.
            AccessDenied, NotFound: as the store says.
            Unavailable: no connection, a stall, 408, 425, 429 or 5xx.
            BadAnswer: the answer is not what was asked for, or ends early.
            Exception: whatever the sink raised.

        """
        if not span:
            return
        scheme = location.url.partition(":")[0].lower()
        async with self._limiter:
            with self._measured(scheme):
                guard = Guard(sink, self._metrics.fetched_bytes.labels(scheme), self._pace)
                match scheme:
                    case "http" | "https":
                        await self._fetch_http(location, span, size, guard)
                    case "file":
                        await in_thread(partial(read_file, location, span, size, guard), guard.abort)
                    case "data":
                        await in_thread(partial(read_data, location, span, size, guard), guard.abort)
                    case _:
                        place = redact(location.url)
                        raise BadAnswer(f"{place}: bytes come from http, https, file and data URLs only")

    async def _fetch_http(self, location: Location, span: Span, size: int, guard: Guard) -> None:
        try:
            handle = self._take(origin_of(location.url))
        except ValueError as error:
            raise BadAnswer(f"{redact(location.url)}: malformed URL; check the URL of the store") from error

        def work() -> None:
            try:
                handle.fetch(location, span, size, guard)
            finally:
                self._give_back(handle)

        # Both, in this order: a transfer whose sink was not reached yet shall not reach it any more.
        await in_thread(work, lambda: guard.abort() | handle.abort())

    @contextlib.contextmanager
    def _measured(self, scheme: str) -> Iterator[None]:
        self._metrics.requests.labels(scheme).inc()
        started = time.monotonic()
        try:
            yield
        except StoreError as error:
            self._metrics.store_errors.labels(scheme, type(error).__name__).inc()
            raise
        self._metrics.fetch_seconds.labels(scheme).observe(time.monotonic() - started)

    def _take(self, origin: tuple[str, str, int]) -> _Handle:
        """Return a handle that nobody uses, best one that is already connected to `origin`."""
        with self._lock:
            known = next((handle for handle in reversed(self._idle) if handle.origin == origin), None)
            if known is None and self._idle and self._handles >= self._connections:
                known = self._idle[0]
            if known is not None:
                self._idle.remove(known)
                known.origin = origin
                return known
            self._handles += 1
        return _Handle(origin, self._options)

    def _give_back(self, handle: _Handle) -> None:
        with self._lock:
            if not self._closed and not handle.aborted:
                self._idle.append(handle)
                return
            self._handles -= 1
        handle.close()


class _Handle:
    """One curl easy handle with the connections that it keeps alive; does one transfer at a time."""

    def __init__(self, origin: tuple[str, str, int], options: Mapping[int, Any]) -> None:
        self.origin = origin
        self.aborted = False
        self._lock = threading.Lock()
        self._sockets: set[int] = set()
        self._buffer = memoryview(bytearray(GATHER))
        self._curl = pycurl.Curl()
        for option, value in {**_OPTIONS, **options}.items():
            self._curl.setopt(option, value)
        self._curl.setopt(pycurl.SOCKOPTFUNCTION, self._opened)
        self._curl.setopt(pycurl.CLOSESOCKETFUNCTION, self._close_socket)

    def fetch(self, location: Location, span: Span, size: int, sink: Sink) -> None:
        """Do one attempt, redirects included; see `RangeClient.fetch`."""
        url, secrets = ascii_url(location.url), location.headers
        reach = Reach.PUBLIC if location.public else Reach.LINK
        for _ in range(MAX_REDIRECTS + 1):
            exchange = Exchange(url, location, span, size, sink, self._buffer, reach)
            self._perform(exchange, _fields(location, secrets, span))
            if exchange.target is None:
                return
            if origin_of(exchange.target) != origin_of(url):
                secrets = {}  # they were meant for the first host only, and stay away once they were dropped
                reach = exchange.reach
            url = exchange.target
        raise BadAnswer(f"{redact(location.url)}: more than {MAX_REDIRECTS} redirects; check the store's URL")

    def _perform(self, exchange: Exchange, fields: list[bytes]) -> None:
        curl = self._curl
        curl.setopt(pycurl.URL, exchange.url)
        curl.setopt(pycurl.HTTPHEADER, fields)
        curl.setopt(pycurl.PREREQFUNCTION, exchange.on_connected)
        curl.setopt(pycurl.HEADERFUNCTION, exchange.on_header)
        curl.setopt(pycurl.WRITEFUNCTION, exchange.on_body, use_memoryview=True)
        curl.setopt(pycurl.XFERINFOFUNCTION, lambda *_: 1 if self.aborted else exchange.on_progress())
        broken: pycurl.error | None = None
        try:
            curl.perform()
        except pycurl.error as error:
            broken = error
        if exchange.failure is not None:
            raise exchange.failure
        if exchange.target is not None:
            return
        exchange.flush()  # also before a failure: the next attempt goes on behind what has arrived
        if broken is not None:
            raise _failure(redact(exchange.url), *broken.args) from broken
        exchange.finish()

    def abort(self) -> bool:
        """End the transfer from another thread; return whether that works at once.

        Shutting the sockets down wakes curl even where it waits for a silent server. It does not work while
        curl looks up a name: libc cannot be interrupted there, but no sink has been reached either, and
        the thread ends by itself within the connect timeout.
        """
        with self._lock:
            self.aborted = True
            for fd in self._sockets:
                sock = socket.socket(fileno=fd)
                with contextlib.suppress(OSError):  # not connected any more
                    sock.shutdown(socket.SHUT_RDWR)
                sock.detach()
            return bool(self._sockets)

    def close(self) -> None:
        self._curl.close()

    def _opened(self, fd: int, purpose: int) -> int:
        with self._lock:
            if self.aborted:
                return pycurl.SOCKOPT_ERROR
            self._sockets.add(fd)
            return pycurl.SOCKOPT_OK

    def _close_socket(self, fd: int) -> int:
        # Closed under the lock, so that `abort` never meets a number that already means another file.
        with self._lock:
            self._sockets.discard(fd)
            os.close(fd)
            return 0


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
    pycurl.NOPROGRESS: 0,
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


def _failure(place: str, code: int, text: str) -> StoreError:
    """Return what curl's error means; every failure to reach the store is worth another attempt."""
    text = re.sub(r"[^ -~]", "?", text)
    if code in _BROKEN:
        return BadAnswer(f"{place}: broken answer ({text}); try again")
    return Unavailable(f"{place}: {text}; {_REMEDY.get(code, 'check the network')}")


def _fields(location: Location, secrets: Mapping[str, str], span: Span) -> list[bytes]:
    """Return the header fields of a request; ours win over those of the location."""
    own = {"Range": f"bytes={span.start}-{span.stop - 1}", "Accept-Encoding": "identity"}
    if location.etag is not None and not location.etag.startswith("W/"):
        own["If-Match"] = location.etag
    names = {name.lower() for name in own}
    fields = own | {name: value for name, value in secrets.items() if name.lower() not in names}
    for name, value in fields.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(r"[^\t -~\x80-\xff]", value):
            place = redact(location.url)
            raise BadAnswer(
                f"{place}: the store hands over a malformed header {name!r}; check its credentials"
            )
    # "Name;" is how curl spells a field without a value; "Name:" would remove it.
    return [
        f"{name}: {value}".encode("latin-1") if value else f"{name};".encode()
        for name, value in fields.items()
    ]


def _ca_bundle(chosen: str | None) -> str:
    """Return the file of authorities to trust: a wheel's OpenSSL looks where its builder's system has it."""
    wanted = chosen or os.environ.get("SSL_CERT_FILE")
    if wanted:
        if not os.access(wanted, os.R_OK):
            raise ConfigError(f"the CA bundle {wanted} cannot be read: correct ca_bundle or SSL_CERT_FILE")
        return wanted
    return next((path for path in _CA_BUNDLES if os.access(path, os.R_OK)), certifi.where())
