"""The range client: one location, one span, one attempt. All bytes of all stores come through here.

Each request runs in a worker thread on a handle from a pool; a handle keeps its connections alive, so that
the next request to the same host needs no handshake. HTTP/1.1 only: one TCP connection per request in flight
is faster than streams that share one. With TLS or through a proxy a request is libcurl's (`curl`): of the
clients compared in ``docs/data-plane.md`` it needs the least CPU for TLS. Without them the kernel moves the
body from the socket into the file (`plain`).
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Self

import certifi
import trio

from modelfs import __version__
from modelfs.errors import BadAnswer, ConfigError, StoreError
from modelfs.fetch.answer import ascii_url, origin_of
from modelfs.fetch.curl import Connection, Curl, Options, options
from modelfs.fetch.exchange import Exchange
from modelfs.fetch.guard import Guard, Pace, Sink, in_thread
from modelfs.fetch.joint import Joint
from modelfs.fetch.library import read_by
from modelfs.fetch.local import read_data, read_file
from modelfs.fetch.plain import Plain, is_plain
from modelfs.fetch.sockets import Sockets
from modelfs.metrics import Metrics
from modelfs.stores import redact
from modelfs.stores.reach import Reach
from modelfs.types import Location, Piece, Span

__all__ = ["RangeClient", "Sink"]

MAX_REDIRECTS = 5

_CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine, BSD
)


class RangeClient:
    """Fetches spans over HTTP(S), from files, data URLs and readers, at most `connections` at once.

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
        bandwidth: most bytes per second of all transfers together, enough for each to move a MiB
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
        self._stall_timeout = stall_timeout
        self._user_agent = user_agent
        self._options = options(
            ca_bundle=_ca_bundle(ca_bundle),
            connect_timeout=connect_timeout,
            stall_timeout=stall_timeout,
            user_agent=user_agent,
        )

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

    async def fetch(
        self, location: Location, span: Span, size: int, sink: Sink, *, ranged: bool = True
    ) -> None:
        """Fetch `span` of the object of `size` bytes at `location` into `sink`, in one attempt.

        An empty span needs no request and calls nothing; one that lies in several parts needs one for each,
        one after the other, and each part's server has to honour ranges. Any other server that refuses the
        range (400, 416, 501) is asked for the whole; one that is known to send none is not asked for one
        (`ranged`). Redirects are followed, but to no address nearer than that of who redirects
        (`modelfs.stores.reach`), and `location.headers` are sent to the host of `location.url` only.

        When this returns the sink has all bytes that it was announced; when it raises, a prefix of them, each
        of them of the pinned version.

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
        try:
            pieces = list(location.pieces(span, size))
        except ValueError as error:
            raise BadAnswer(f"{redact(location.url)}: {error}: refresh the model") from error
        async with self._limiter:
            if not location.parts:
                await self._fetch_piece(pieces[0], sink, ranged)
                return
            joint = Joint(sink, span)
            for piece in pieces:
                await self._fetch_piece(piece, joint.part(piece), ranged)

    async def _fetch_piece(self, piece: Piece, sink: Sink, ranged: bool) -> None:
        location, _, span, size = piece
        scheme = location.url.partition(":")[0].lower()
        with self._measured(scheme):
            guard = Guard(sink, self._metrics.fetched_bytes.labels(scheme), self._pace)
            match scheme:
                case "http" | "https":
                    await self._fetch_http(location, span, size, guard, ranged)
                case "file":
                    await in_thread(partial(read_file, location, span, size, guard), guard.abort)
                case "data":
                    await in_thread(partial(read_data, location, span, size, guard), guard.abort)
                case _ if location.reader is not None:
                    place = redact(location.url)
                    await read_by(location.reader, place, span, guard, self._stall_timeout)
                case _:
                    place = redact(location.url)
                    raise BadAnswer(f"{place}: bytes come from http, https, file and data URLs only")

    async def _fetch_http(
        self, location: Location, span: Span, size: int, guard: Guard, ranged: bool
    ) -> None:
        try:
            handle = self._take(origin_of(location.url))
        except ValueError as error:
            raise BadAnswer(f"{redact(location.url)}: malformed URL; check the URL of the store") from error

        def work() -> None:
            try:
                handle.fetch(location, span, size, guard, ranged)
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
        return _Handle(origin, self._options, self._stall_timeout, self._user_agent)

    def _give_back(self, handle: _Handle) -> None:
        with self._lock:
            if not self._closed and not handle.aborted:
                self._idle.append(handle)
                return
            self._handles -= 1
        handle.close()


class _Handle:
    """The connections that are kept alive for one transfer at a time."""

    def __init__(self, origin: tuple[str, str, int], chosen: Options, stall: float, agent: str) -> None:
        self.origin = origin
        self._sockets = Sockets()
        self._curl = Curl(chosen, self._sockets)
        self._plain = Plain(partial(Connection, options=chosen, sockets=self._sockets), stall, agent)

    @property
    def aborted(self) -> bool:
        """Whether it is of no more use."""
        return self._sockets.aborted

    def fetch(self, location: Location, span: Span, size: int, sink: Sink, ranged: bool) -> None:
        """Do one attempt, redirects included; see `RangeClient.fetch`."""
        url, secrets = ascii_url(location.url), location.headers
        reach = Reach.PUBLIC if location.public else Reach.LINK
        for _ in range(MAX_REDIRECTS + 1):
            exchange = Exchange(url, location, span, size, sink, reach, ranged=ranged)
            speaker = self._plain if is_plain(url) else self._curl
            speaker.perform(exchange, _fields(location, secrets, span, ranged))
            if exchange.target is None:
                return
            ranged = exchange.ranged
            if origin_of(exchange.target) != origin_of(url):
                secrets = {}  # they were meant for the first host only, and stay away once they were dropped
                reach = exchange.reach
            url = exchange.target
        raise BadAnswer(f"{redact(location.url)}: more than {MAX_REDIRECTS} redirects; check the store's URL")

    def abort(self) -> bool:
        """End the transfer from another thread; return whether that works at once."""
        return self._sockets.abort()

    def close(self) -> None:
        self._curl.close()
        self._plain.close()


def _fields(location: Location, secrets: Mapping[str, str], span: Span, ranged: bool) -> dict[str, str]:
    """Return the header fields of a request; ours win over those of the location."""
    own = {"Accept-Encoding": "identity"}
    if ranged:
        own["Range"] = f"bytes={span.start}-{span.stop - 1}"
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
    return fields


def _ca_bundle(chosen: str | None) -> str:
    """Return the file of authorities to trust: a wheel's OpenSSL looks where its builder's system has it."""
    wanted = chosen or os.environ.get("SSL_CERT_FILE")
    if wanted:
        if not os.access(wanted, os.R_OK):
            raise ConfigError(f"the CA bundle {wanted} cannot be read: correct ca_bundle or SSL_CERT_FILE")
        return wanted
    return next((path for path in _CA_BUNDLES if os.access(path, os.R_OK)), certifi.where())
