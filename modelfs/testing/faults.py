"""A proxy that breaks the answers of an HTTP server on purpose: `FaultProxy` and the table `FAULTS`.

It stands between a client and any server on this machine and passes everything on as it is, the ``Host``
header too, so that signatures stay good and redirects lead back through it. What its plan strikes is changed
or cut on the way::

    with S3Server() as s3, FaultProxy(s3.url, storm(seed=1)) as proxy:
        store = open_store("s3://models/bert/", {"endpoint_url": proxy.url})
        ...
    print(proxy.injected)  # Counter({'reset': 12, 'truncated': 9, …})

Answers are held in memory while they pass: this is for tests, not for gigabytes.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import select
import socket
import ssl
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from modelfs.testing.server import HOST, Handler, Listener

_PIECES = 20
"""Pieces into which a slow body is cut."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What to do to one answer.

    Attributes:
        kind: a name in `FAULTS`.
        at: where in the body it strikes, as a fraction of its length.
        seconds: of ``Retry-After``; of a slow body, from its first to its last byte; of silence, until the
            connection is closed.
        target: where a ``redirect`` leads to.

    Raises:
        ValueError: there is no such kind.

    """

    kind: str
    at: float = 0.5
    seconds: float = 0.0
    target: str = "file:///etc/hostname"

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise ValueError(f"unknown fault {self.kind!r}: known are {', '.join(sorted(FAULTS))}")


class Asked(NamedTuple):
    """One request as the proxy saw it.

    Attributes:
        method: of HTTP.
        path: as sent, percent-encoded, without the query.
        query: names in the query, without their values: those of signed URLs are secrets.
        range: the ``Range`` header, or "".
        origin: of the proxy, as the client calls it.

    """

    method: str
    path: str
    query: tuple[str, ...]
    range: str
    origin: str


Plan = Callable[[Asked], Fault | None] | Iterable[Fault | None]
"""What happens to which request: a function, or an item per request in their order, and none after the last.

Either is called by one thread at a time.
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent for one request.

    Attributes:
        status: of HTTP.
        headers: as they are sent; ``Content-Length`` need not be that of `body`.
        body: what is sent behind them.
        sent: fraction of the body that is sent before `end`; None for not even the head.
        end: what becomes of the connection: kept for the next request, closed, reset, or left open in
            silence until the client closes it or `seconds` have passed.
        seconds: that the body takes, or the silence.
        raw: sent instead of everything else, if not None.

    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent: float | None = 1.0
    end: Literal["keep", "close", "reset", "silence"] = "keep"
    seconds: float = 0.0
    raw: bytes | None = field(default=None, repr=False)

    def having(self, **headers: str | None) -> Answer:
        """Return the answer with other headers; None removes one. ``_`` in a name stands for ``-``."""
        names = {name.replace("_", "-").lower(): value for name, value in headers.items()}
        kept = {name: value for name, value in self.headers.items() if name.lower() not in names}
        return replace(self, headers=kept | {n.title(): v for n, v in names.items() if v is not None})

    def header(self, name: str) -> str:
        """Return the value of a header, or ""."""
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), "")


Behaviour = Callable[[Fault, Asked, Answer], Answer | None]
"""Returns the broken answer; None if this answer cannot be broken in this way."""


def _ending(end: Literal["close", "reset", "silence"], *, within: bool) -> Behaviour:
    """Break the connection: in the body of a success, or before any answer."""

    def behave(fault: Fault, _: Asked, answer: Answer) -> Answer | None:
        if within and not (answer.body and answer.status in (200, 206)):
            return None
        return replace(answer, sent=fault.at if within else None, end=end, seconds=fault.seconds)

    return behave


def _status(status: int) -> Behaviour:
    """Answer with an error that asks to come back."""

    def behave(fault: Fault, _: Asked, __: Answer) -> Answer:
        wait = {"Retry-After": str(round(fault.seconds))}
        return _error(status, "SlowDown", "Please reduce your request rate", wait)

    return behave


def _refusal(status: int, code: str, message: str) -> Behaviour:
    """Answer with an error in the words of S3."""
    return lambda _, __, ___: _error(status, code, message, {})


def _error(status: int, code: str, message: str, headers: Mapping[str, str]) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    length = {"Content-Type": "application/xml", "Content-Length": str(len(body))}
    return Answer(status, {**length, **headers}, body)


def _trickle(fault: Fault, _: Asked, answer: Answer) -> Answer | None:
    return replace(answer, seconds=fault.seconds) if answer.body else None


def _corrupted(fault: Fault, asked: Asked, answer: Answer) -> Answer | None:
    """Turn a byte round; only of content, for what a listing says cannot be known to be wrong."""
    if not asked.range or not answer.body or answer.status not in (200, 206):
        return None
    at = min(int(len(answer.body) * fault.at), len(answer.body) - 1)
    wrong = bytes([answer.body[at] ^ 0xFF])
    return replace(answer, body=answer.body[:at] + wrong + answer.body[at + 1 :])


def _extra_bytes(_: Fault, __: Asked, answer: Answer) -> Answer | None:
    """Send more than ``Content-Length`` says."""
    return replace(answer, body=answer.body + b"\0extra\r\n", end="close") if answer.body else None


def _longer_body(_: Fault, __: Asked, answer: Answer) -> Answer | None:
    """Send, and announce, more than ``Content-Range`` says."""
    if answer.status != 206:
        return None
    body = answer.body + b"\0longer\r\n"
    return replace(answer, body=body).having(content_length=str(len(body)))


def _range(change: Callable[[int, int, int], str]) -> Behaviour:
    """Lie in ``Content-Range``; `change` gets first byte, last byte and size."""

    def behave(_: Fault, __: Asked, answer: Answer) -> Answer | None:
        told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.header("Content-Range"))
        return answer.having(content_range=change(*map(int, told.groups()))) if told else None

    return behave


def _part_as_whole(_: Fault, __: Asked, answer: Answer) -> Answer | None:
    """Send a part and say that it is all: 200 instead of 206."""
    return replace(answer, status=200).having(content_range=None) if answer.status == 206 else None


def _etag(value: str | None) -> Behaviour:
    """Have another ETag, as an object that was overwritten between two ranges, or none."""

    def behave(_: Fault, asked: Asked, answer: Answer) -> Answer | None:
        return answer.having(etag=value) if asked.range and answer.header("ETag") else None

    return behave


def _redirect(fault: Fault, _: Asked, answer: Answer) -> Answer:
    """Redirect to the target; what else the head says is kept."""
    return replace(answer.having(location=fault.target, content_length="0"), status=302, body=b"")


def _leading(target: str, only: str = "") -> Behaviour:
    """Redirect to `target`, made from the request; only if the proxy speaks the scheme `only`."""

    def behave(fault: Fault, asked: Asked, answer: Answer) -> Answer | None:
        scheme, _, host = asked.origin.partition("://")
        if only and scheme != only:
            return None
        parts = {"scheme": scheme, "host": host, "path": asked.path}
        return _redirect(replace(fault, target=target.format(**parts)), asked, answer)

    return behave


def _whole(_: Fault, asked: Asked, answer: Answer) -> Answer | None:
    """Send everything although a range was asked for; the proxy has asked for it so."""
    return answer if asked.range and answer.status == 200 else None


FAULTS: Mapping[str, Behaviour] = {
    "reset": _ending("reset", within=False),
    "reset-in-body": _ending("reset", within=True),
    "closed": _ending("close", within=False),
    "truncated": _ending("close", within=True),
    "silence": _ending("silence", within=False),
    "silence-in-body": _ending("silence", within=True),
    "trickle": _trickle,
    "status-429": _status(429),
    "status-500": _status(500),
    "status-503": _status(503),
    "no-http": lambda _, __, answer: replace(answer, raw=b"\x16\x03\x01\0\x05 220 ready\r\n", end="close"),
    "corrupted": _corrupted,
    "extra-bytes": _extra_bytes,
    "longer-body": _longer_body,
    "range-ignored": _whole,
    "part-as-whole": _part_as_whole,
    "wrong-range": _range(lambda first, last, size: f"bytes {max(0, first - 1)}-{last - 1}/{size}"),
    "wrong-total": _range(lambda first, last, size: f"bytes {first}-{last}/{size + 1}"),
    "malformed-range": _range(lambda first, last, size: f"bytes {last}-{first}/{size}+"),
    "etag-changed": _etag('"00000000000000000000000000000000"'),
    "etag-missing": _etag(None),
    "gone": _refusal(404, "NoSuchKey", "The specified key does not exist."),
    "expired": _refusal(403, "AccessDenied", "Request has expired"),
    "rotated": _refusal(403, "InvalidAccessKeyId", "The access key does not exist in our records."),
    "unauthorized": _refusal(401, "AccessDenied", "Who are you?"),
    "redirect": _redirect,
    "redirect-loop": _leading("#again"),
    "dns-failure": _leading("{scheme}://modelfs-test.invalid{path}"),
    "tls-failure": _leading("https://{host}{path}", only="http"),
}
"""Kind → what it does to an answer. Names and TLS fail behind a redirect: who reaches the proxy has both."""


def storm(
    seed: int, kinds: Iterable[str] = FAULTS, *, rate: float = 0.5, seconds: float = 0.0
) -> Iterator[Fault | None]:
    """Yield faults of random kinds at random places without end, the same ones for the same `seed`.

    Args:
        seed: of the random numbers.
        kinds: of which to choose.
        rate: fraction of the requests that are struck.
        seconds: of each `Fault`.

    """
    source, known = random.Random(seed), sorted(kinds)  # noqa: S311  # not a secret
    while True:
        struck, kind, at = source.random() < rate, source.choice(known), source.random()
        yield Fault(kind, at, seconds) if struck else None


def of_content(plan: Plan) -> Plan:
    """Return `plan` for the requests for ranges, with all others passed on as they are."""
    choose = _chooser(plan)
    return lambda asked: choose(asked) if asked.range else None


def _chooser(plan: Plan) -> Callable[[Asked], Fault | None]:
    if callable(plan):
        return plan
    faults = iter(plan)
    return lambda _: next(faults, None)


class FaultProxy:
    """A reverse proxy on loopback with a thread per connection; also a context manager.

    Args:
        upstream: ``http://HOST:PORT`` of the server behind it.
        plan: what to do to which request.
        tls: to speak HTTPS to the client; the server behind it is asked over HTTP all the same.

    Attributes:
        upstream: as above; can be set while it runs.

    """

    def __init__(self, upstream: str, plan: Plan = (), *, tls: ssl.SSLContext | None = None) -> None:
        self.upstream = upstream
        self._tls = tls
        self._lock = threading.Lock()
        self._choose = _chooser(plan)
        self._injected: Counter[str] = Counter()
        self._asked: list[Asked] = []
        self._listener: _Gate | None = None

    @property
    def url(self) -> str:
        """``http://127.0.0.1:PORT``, or https; RuntimeError if it does not run."""
        if self._listener is None:
            raise RuntimeError("the proxy was not started")
        return f"{self.scheme}://{HOST}:{self._listener.server_address[1]}"

    @property
    def scheme(self) -> str:
        """What it speaks to its clients: http or https."""
        return "https" if self._tls else "http"

    @property
    def injected(self) -> Counter[str]:
        """How many answers were broken so far, by kind; those that a kind does not apply to do not count."""
        with self._lock:
            return self._injected.copy()

    @property
    def asked(self) -> list[Asked]:
        """Every request so far, in the order of arrival."""
        with self._lock:
            return self._asked.copy()

    def follow(self, plan: Plan) -> None:
        """Go on with another plan, from the next request on."""
        with self._lock:
            self._choose = _chooser(plan)

    def choose(self, asked: Asked) -> Fault | None:
        """Return what the plan wants done to a request, and note that it came."""
        with self._lock:
            self._asked.append(asked)
            return self._choose(asked)

    def count(self, fault: Fault) -> None:
        """Note that an answer is broken."""
        with self._lock:
            self._injected[fault.kind] += 1

    def close(self) -> None:
        """Cut every connection and accept no more."""
        if self._listener is not None:
            self._listener.cut()
            self._listener = None

    def __enter__(self) -> Self:
        self._listener = _Gate(self, self._tls)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Gate(Listener):
    def __init__(self, proxy: FaultProxy, tls: ssl.SSLContext | None) -> None:
        self.proxy = proxy
        self.tls = tls
        self.closing = threading.Event()
        super().__init__(0, _Passage)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self.tls is None:
            return connection, address
        # The handshake is for the connection's own thread.
        return self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def cut(self) -> None:
        self.closing.set()
        super().cut()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients go away, and refuse our certificate
            super().handle_error(request, client_address)


class _Passage(Handler):
    """One client's connection, with its own to the server behind."""

    server: _Gate

    def setup(self) -> None:
        super().setup()
        self._behind: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        self._leave()
        super().finish()

    def _leave(self) -> None:
        if self._behind is not None:
            self._behind.close()

    def log_error(self, format: str, *args: Any) -> None:
        """Be silent about what is no request: a TLS handshake, for one."""

    def serve(self) -> None:
        path, _, query = self.path.partition("?")
        names = tuple(pair.partition("=")[0] for pair in query.split("&") if pair)
        proxy = self.server.proxy
        origin = f"{proxy.scheme}://{self.headers.get('Host', HOST)}"
        asked = Asked(self.command, path, names, self.headers.get("Range", ""), origin)
        fault = proxy.choose(asked)
        with self.body() as body:
            answer = self._ask(body.read(), whole=fault is not None and fault.kind == "range-ignored")
        if fault is not None and (broken := FAULTS[fault.kind](fault, asked, answer)):
            proxy.count(fault)
            answer = broken
        self._send(answer)

    def _ask(self, body: bytes, *, whole: bool) -> Answer:
        """Pass the request on, without its range if `whole`, and return the answer."""
        dropped = {"connection", "content-length", *(["range"] if whole else [])}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        place = urlsplit(self.server.proxy.upstream)
        if self._behind is None or (self._behind.host, self._behind.port) != (place.hostname, place.port):
            self._leave()
            self._behind = http.client.HTTPConnection(place.hostname or HOST, place.port)
        try:
            self._behind.request(self.command, self.path, body or None, headers)
            response = self._behind.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            self._behind.close()
            return _error(502, "BadGateway", "The server behind does not answer.", {})
        kept = {
            n: v for n, v in response.getheaders() if n.lower() not in ("connection", "transfer-encoding")
        }
        answer = Answer(response.status, kept, content)
        return answer if self.command == "HEAD" else answer.having(content_length=str(len(content)))

    def _send(self, answer: Answer) -> None:
        self.close_connection = answer.end != "keep"
        if answer.sent is not None:
            self._write(answer)
        if answer.end == "silence":
            waiting = select.poll()
            waiting.register(self.connection, select.POLLIN)  # the client has gone, or the proxy is closing
            waiting.poll(answer.seconds * 1000 or None)
        if answer.end == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _write(self, answer: Answer) -> None:
        if answer.raw is not None:
            self.connection.sendall(answer.raw)
            return
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        body = b"" if self.command == "HEAD" else answer.body[: int(len(answer.body) * (answer.sent or 0))]
        pieces = _PIECES if answer.seconds and answer.end == "keep" else 1
        step = max(1, -(-len(body) // pieces))
        self.connection.sendall(head + body[:step])
        for start in range(step, len(body), step):
            if self.server.closing.wait(answer.seconds / pieces):
                return
            self.connection.sendall(body[start : start + step])
