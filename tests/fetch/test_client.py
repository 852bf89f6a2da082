"""What the range client promises, against servers that misbehave on demand."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelfs.cache import Data, Pipe
from modelfs.errors import (
    AccessDenied,
    BadAnswer,
    CacheError,
    ConfigError,
    Expired,
    NotFound,
    Stale,
    StoreError,
    Unavailable,
)
from modelfs.fetch.answer import accept, parse_content_range, parse_retry_after
from modelfs.fetch.client import RangeClient
from modelfs.metrics import Metrics
from modelfs.types import Location, Span
from tests.fetch.scripted import (
    Server,
    Step,
    answer,
    close,
    part,
    reset,
    silence,
    then,
    tunnel,
)

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SIZE = len(CONTENT)
SPAN = Span(1000, 301_000)
GOOD = part(CONTENT, SPAN.start, SPAN.stop)
SECRET = "s3cr3t"
SECRETS = {"Authorization": f"Bearer {SECRET}", "PRIVATE-TOKEN": SECRET, "x-ms-token": SECRET}


class Basket:
    """A sink that keeps everything and checks that it comes in order."""

    def __init__(self, on_begin: Callable[[Span], None] | None = None, on_write: Any = None) -> None:
        self.span: Span | None = None
        self.data = bytearray()
        self.got = threading.Semaphore(0)
        self._on_begin = on_begin
        self._on_write = on_write

    def begin(self, span: Span) -> None:
        assert self.span is None
        self.span = span
        if self._on_begin:
            self._on_begin(span)

    def write(self, offset: int, data: Data) -> None:
        assert self.span is not None
        assert offset == self.span.start + len(self.data)
        assert len(data)
        assert offset + len(data) <= self.span.stop
        self.data += data.take(len(data)) if isinstance(data, Pipe) else data
        self.got.release()
        if self._on_write:
            self._on_write()


@pytest.fixture(autouse=True, params=["spliced", "curl"])
def _speaker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speak plain HTTP in both ways: where a proxy is configured, though not for this host, curl does."""
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "no_proxy",
        "NO_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    if request.param == "curl":
        monkeypatch.setenv("http_proxy", "http://proxy.invalid")
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def bundle(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


def run(
    use: Callable[[RangeClient], Awaitable[None]], metrics: Metrics | None = None, **options: Any
) -> None:
    async def main() -> None:
        async with RangeClient(metrics=metrics or Metrics(), **options) as client:
            await use(client)

    trio.run(main)


def fetch(location: Location, span: Span = SPAN, size: int = SIZE, **options: Any) -> Basket:
    basket = Basket()

    async def use(client: RangeClient) -> None:
        await client.fetch(location, span, size, basket)

    run(use, **options)
    return basket


def refused(
    kind: type[StoreError], url: str, span: Span = SPAN, basket: Basket | None = None, **options: Any
) -> Any:
    """Fetch with secrets in URL and headers; return the error after checking that it is fit to be shown."""
    basket = basket or Basket()
    details = {name: options.pop(name) for name in ("etag", "last_modified", "expires") if name in options}
    location = Location(f"{url}/model.bin?X-Amz-Signature={SECRET}", SECRETS, **details)

    async def use(client: RangeClient) -> None:
        await client.fetch(location, span, SIZE, basket)

    with pytest.raises(kind) as caught:
        run(use, **options)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert SECRET not in message + repr(caught.value)
    assert "127.0.0.1" in message
    assert "\n" not in message
    return caught.value


# What is sent, and what arrives.


@pytest.mark.parametrize("span", [SPAN, Span(0, 1), Span(SIZE - 1, SIZE), Span(0, SIZE)])
def test_a_range_arrives_whole_and_in_order(span: Span) -> None:
    with Server(part(CONTENT, span.start, span.stop)) as server:
        basket = fetch(Location(server.url), span)
    assert basket.span == span
    assert basket.data == CONTENT[span.start : span.stop]
    assert server.requests[0].headers["range"] == f"bytes={span.start}-{span.stop - 1}"


def test_requests_carry_the_location_s_headers_the_pin_and_no_compression() -> None:
    etag = '"v1"'
    headers = {**SECRETS, "X-Empty": "", "range": "bytes=0-0"}
    with Server(part(CONTENT, SPAN.start, SPAN.stop, etag=etag)) as server:
        fetch(Location(f"{server.url}/a/../b%20c ü?q=1", headers, etag=etag), user_agent="tester/1")
    (request,) = server.requests
    assert request.method == "GET"
    assert request.target == "/a/../b%20c%20%C3%BC?q=1"  # as signed, and nothing raw
    assert request.headers["authorization"] == f"Bearer {SECRET}"
    assert request.headers["x-ms-token"] == SECRET
    assert request.headers["x-empty"] == ""
    assert request.headers["range"] == f"bytes={SPAN.start}-{SPAN.stop - 1}"
    assert request.headers["if-match"] == etag
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"] == "tester/1"


def test_a_password_in_the_url_is_sent_as_one() -> None:
    with Server(GOOD) as server:
        fetch(Location(server.url.replace("http://", "http://user:word@") + "/p?x=1#f"))
    (request,) = server.requests
    assert request.target == "/p?x=1"
    assert request.headers["authorization"] == f"Basic {base64.b64encode(b'user:word').decode()}"
    assert request.headers["host"] == server.url.removeprefix("http://")


def test_a_weak_etag_is_compared_but_never_asked_for() -> None:
    with Server(part(CONTENT, SPAN.start, SPAN.stop, etag='"v1"')) as server:
        assert fetch(Location(server.url, etag='W/"v1"')).data == CONTENT[SPAN.start : SPAN.stop]
    assert "if-match" not in server.requests[0].headers


def test_an_empty_span_asks_nobody() -> None:
    with Server(GOOD) as server:
        basket = fetch(Location(server.url), Span(5, 5))
    assert basket.span is None
    assert server.accepted == 0


def test_an_answer_without_length_in_chunks_with_a_trailer_is_as_good() -> None:
    body = CONTENT[SPAN.start : SPAN.stop]
    chunks = b"%x\r\n%b\r\n0\r\nX-Trailer: 1\r\n\r\n" % (len(body), body)
    head = answer(206, content_length=None, transfer_encoding="chunked", content_range=_range_of(GOOD))
    with Server(head + chunks) as server:
        assert fetch(Location(server.url)).data == body


def test_interim_answers_are_skipped() -> None:
    with Server(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + GOOD) as server:
        assert fetch(Location(server.url)).span == SPAN


def test_a_server_that_ignores_ranges_delivers_the_whole_object() -> None:
    with Server(answer(200, CONTENT)) as server:
        basket = fetch(Location(server.url))
    assert basket.span == Span(0, SIZE)
    assert basket.data == CONTENT


@pytest.mark.parametrize("status", [400, 416, 501])
def test_a_server_that_refuses_ranges_is_asked_for_the_whole_object(status: int) -> None:
    with Server(answer(status, b"no ranges"), answer(200, CONTENT)) as server:
        basket = fetch(Location(server.url, {"Authorization": SECRET}))
    assert (basket.span, bytes(basket.data)) == (Span(0, SIZE), CONTENT)
    assert ["range" in request.headers for request in server.requests] == [True, False]
    assert server.requests[1].headers["authorization"] == SECRET


def test_no_range_is_asked_of_a_server_that_is_known_to_send_none() -> None:
    basket = Basket()

    async def use(client: RangeClient) -> None:
        await client.fetch(Location(server.url), SPAN, SIZE, basket, ranged=False)

    with Server(answer(200, CONTENT)) as server:
        run(use)
    assert "range" not in server.requests[0].headers
    assert bytes(basket.data) == CONTENT


def test_a_sink_that_does_not_want_the_whole_object_ends_the_transfer() -> None:
    class Unwanted(Exception):
        pass

    def decline(span: Span) -> None:
        raise Unwanted

    basket = Basket(on_begin=decline)

    async def use(client: RangeClient) -> None:
        with pytest.raises(Unwanted):
            await client.fetch(Location(server.url), SPAN, SIZE, basket)

    with Server(then(answer(200, content_length=str(SIZE)), silence)) as server:
        run(use)
    assert not basket.data


def test_what_the_sink_raises_ends_the_transfer_and_comes_out() -> None:
    def fail() -> None:
        raise CacheError("the disk is full")

    async def use(client: RangeClient) -> None:
        with pytest.raises(CacheError, match="the disk is full"):
            await client.fetch(Location(server.url), SPAN, SIZE, Basket(on_write=fail))
        basket = Basket()  # and the client goes on
        await client.fetch(Location(server.url), SPAN, SIZE, basket)
        assert basket.data == CONTENT[SPAN.start : SPAN.stop]

    with Server(GOOD) as server:
        run(use)


def test_bytes_reach_the_sink_before_the_rest_has_arrived() -> None:
    basket = Basket()

    async def use(client: RangeClient) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.fetch, Location(server.url), SPAN, SIZE, basket)
            assert await trio.to_thread.run_sync(basket.got.acquire, True, 10)
            assert basket.data == CONTENT[SPAN.start : SPAN.start + 100]
            nursery.cancel_scope.cancel()

    with Server(then(GOOD[: len(GOOD) - len(SPAN) + 100], silence)) as server:
        run(use)


# Connections.


def test_connections_are_used_again_also_after_errors_and_redirects() -> None:
    steps: tuple[Step, ...] = (
        GOOD,
        answer(404, b"no such thing"),
        answer(503),
        answer(302, b"moved", location="/elsewhere"),
        GOOD,
    )

    async def use(client: RangeClient) -> None:
        await client.fetch(Location(server.url), SPAN, SIZE, Basket())
        for kind in (NotFound, Unavailable):
            with pytest.raises(kind):
                await client.fetch(Location(server.url), SPAN, SIZE, Basket())
        for _ in range(3):
            await client.fetch(Location(server.url), SPAN, SIZE, Basket())

    with Server(*steps) as server:
        run(use)
    assert len(server.requests) == 7
    assert server.accepted == 1


def test_a_connection_that_the_server_closed_meanwhile_is_replaced() -> None:
    async def use(client: RangeClient) -> None:
        for _ in range(3):
            await client.fetch(Location(server.url), SPAN, SIZE, Basket())

    with Server(then(GOOD, close)) as server:
        run(use)
    assert server.accepted == 3


def test_no_more_than_the_given_connections_are_open() -> None:
    go = threading.Event()

    def hold(connection: socket.socket, request: object) -> None:
        go.wait(10)
        connection.sendall(GOOD)

    async def use(client: RangeClient) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(client.fetch, Location(server.url), SPAN, SIZE, Basket())
            for _ in range(2):
                await trio.to_thread.run_sync(server.arrived.acquire)
            await trio.testing.wait_all_tasks_blocked()
            assert len(server.requests) == 2
            go.set()

    with Server(hold) as server:
        run(use, connections=2)
    assert len(server.requests) == 6
    assert server.accepted == 2


def test_many_hosts_do_not_pile_up_idle_connections() -> None:
    hung_up = threading.Event()

    def until_hung_up(connection: socket.socket, request: object) -> None:
        if connection.recv(1) == b"":
            hung_up.set()

    async def use(client: RangeClient) -> None:
        for server in servers:
            basket = Basket()
            await client.fetch(Location(server.url), SPAN, SIZE, basket)
            assert basket.data == CONTENT[SPAN.start : SPAN.stop]
        assert await trio.to_thread.run_sync(hung_up.wait, 10)  # while the client is still open

    servers = [Server(then(GOOD, until_hung_up)), *(Server(GOOD) for _ in range(9))]
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        run(use, connections=1)


def test_close_leaves_running_transfers_alone_and_ends_their_connections_later() -> None:
    hung_up = threading.Event()

    def serve(connection: socket.socket, request: object) -> None:
        connection.sendall(GOOD[:-1])
        release.wait(10)
        connection.sendall(GOOD[-1:])
        if connection.recv(1) == b"":
            hung_up.set()

    release = threading.Event()
    basket = Basket()

    async def use(client: RangeClient) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.fetch, Location(server.url), SPAN, SIZE, basket)
            await trio.to_thread.run_sync(basket.got.acquire)
            client.close()
            release.set()
        assert await trio.to_thread.run_sync(hung_up.wait, 10)

    with Server(serve) as server:
        run(use)
    assert basket.data == CONTENT[SPAN.start : SPAN.stop]


def test_bandwidth_is_limited_for_all_transfers_together() -> None:
    async def use(client: RangeClient) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(client.fetch, Location(server.url), SPAN, SIZE, Basket())

    started = time.monotonic()
    with Server(GOOD) as server:
        run(use, bandwidth=1_500_000)
    assert time.monotonic() - started >= 2 * len(SPAN) / 1_500_000


# Failures.


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadAnswer),
        (401, AccessDenied),
        (403, AccessDenied),
        (404, NotFound),
        (410, NotFound),
        (412, Stale),
        (416, Stale),
        (408, Unavailable),
        (425, Unavailable),
        (429, Unavailable),
        (500, Unavailable),
        (503, Unavailable),
        (599, Unavailable),
        (204, BadAnswer),
        (304, BadAnswer),
        (418, BadAnswer),
        (600, BadAnswer),
    ],
)
def test_each_status_has_its_error(status: int, kind: type[StoreError]) -> None:
    basket = Basket()
    body = b"" if status in (204, 304) else b"Sorry."
    with Server(answer(status, body, content_length=str(len(body)) if body else None)) as server:
        refused(kind, server.url, basket=basket)
    assert basket.span is None


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refused_signature_that_runs_out_is_expired(status: int) -> None:
    with Server(answer(status)) as server:
        refused(Expired, server.url, expires=time.time() + 60)


def test_the_body_of_an_error_is_not_read_to_its_end() -> None:
    with Server(then(answer(500, bytes(200_000), content_length=str(10**12)), silence)) as server:
        refused(Unavailable, server.url)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        (formatdate(time.time() + 3600, usegmt=True), 3500, 3600),
        (formatdate(time.time() - 3600, usegmt=True), 0, 0),
    ],
    ids=["seconds", "in an hour", "an hour ago"],
)
def test_retry_after_is_understood_in_both_forms(value: str, low: float, high: float) -> None:
    with Server(answer(429, retry_after=value)) as server:
        error = refused(Unavailable, server.url)
    assert low <= error.retry_after <= high


def test_an_unreadable_retry_after_is_none() -> None:
    with Server(answer(503, retry_after="soon")) as server:
        assert refused(Unavailable, server.url).retry_after is None


def _range_of(message: bytes) -> str:
    return message.partition(b"Content-Range: ")[2].partition(b"\r\n")[0].decode()


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (part(CONTENT, 0, 300_000), BadAnswer),
        (part(CONTENT, SPAN.start, SPAN.stop - 1), BadAnswer),
        (part(CONTENT, SPAN.start, SPAN.stop, content_range=None), BadAnswer),
        (part(CONTENT, SPAN.start, SPAN.stop, content_range="bytes */1048576"), BadAnswer),
        (part(CONTENT, SPAN.start, SPAN.stop, content_range="items 1000-300999/1048576"), BadAnswer),
        (part(CONTENT, SPAN.start, SPAN.stop, content_range="bytes 300999-1000/1048576"), BadAnswer),
        (part(CONTENT + b"x", SPAN.start, SPAN.stop), Stale),
        (part(CONTENT, SPAN.start, SPAN.stop, content_encoding="gzip"), BadAnswer),
        (part(CONTENT, SPAN.start, SPAN.stop, content_type="multipart/byteranges; boundary=x"), BadAnswer),
        (part(CONTENT, SPAN.start, SPAN.stop, content_length=str(len(SPAN) + 1)), BadAnswer),
        (part(CONTENT, SPAN.start, SPAN.stop, content_length=None) + b"x", BadAnswer),
        (part(CONTENT, SPAN.start, SPAN.stop, content_length=None)[:-1], BadAnswer),
        (answer(200, CONTENT + b"x"), Stale),
        (answer(200, CONTENT[:-1]), Stale),
        (answer(200, CONTENT + b"x", content_length=None), BadAnswer),
        (b"\x00\x01\x02 nonsense\r\n\r\n", BadAnswer),
        (b"HTTP/1.1 2x6 Whatever\r\n\r\n", BadAnswer),
        (GOOD.replace(b"Content-Range:", b"Content-Range: bytes 0-1/9\r\nContent-Range:"), BadAnswer),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_delivers_no_wrong_byte(
    reply: bytes, kind: type[StoreError]
) -> None:
    basket = Basket()
    with Server(then(reply, close)) as server:
        refused(kind, server.url, basket=basket)
    start = basket.span.start if basket.span else 0
    assert CONTENT[start:].startswith(basket.data)


def test_an_unknown_total_is_accepted() -> None:
    with Server(part(CONTENT, SPAN.start, SPAN.stop, content_range="bytes 1000-300999/*")) as server:
        assert fetch(Location(server.url)).span == SPAN


@pytest.mark.parametrize(
    ("pin", "headers", "kind"),
    [
        ({"etag": '"v1"'}, {"etag": '"v2"'}, Stale),
        ({"etag": '"v1"'}, {"etag": 'W/"v1"'}, Stale),
        ({"etag": 'W/"v1"'}, {"etag": 'W/"v2"'}, Stale),
        ({"etag": '"v1"'}, {}, BadAnswer),
        (
            {"last_modified": formatdate(1e9, usegmt=True)},
            {"last_modified": formatdate(2e9, usegmt=True)},
            Stale,
        ),
        ({"last_modified": formatdate(1e9, usegmt=True)}, {"last_modified": "yesterday"}, Stale),
        ({"last_modified": formatdate(1e9, usegmt=True)}, {}, BadAnswer),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_another_version_is_never_delivered(
    pin: dict[str, str], headers: dict[str, str | None], kind: type[StoreError], whole: bool
) -> None:
    basket = Basket()
    reply = answer(200, CONTENT, **headers) if whole else part(CONTENT, SPAN.start, SPAN.stop, **headers)
    with Server(reply) as server:
        refused(kind, server.url, basket=basket, **pin)
    assert basket.span is None


def test_the_same_modification_time_may_be_written_differently() -> None:
    with Server(part(CONTENT, SPAN.start, SPAN.stop, last_modified=formatdate(1e9, usegmt=True))) as server:
        basket = fetch(Location(server.url, last_modified=formatdate(1e9, usegmt=False)))
    assert basket.span == SPAN


@pytest.mark.parametrize("ending", [close, reset])
def test_what_arrived_before_the_connection_broke_is_kept(ending: Step) -> None:
    basket = Basket()
    received = threading.Event()

    def until_received(connection: socket.socket, request: object) -> None:
        received.wait(10)  # a reset overtakes the bytes before it

    basket = Basket(on_write=received.set)
    with Server(then(GOOD[:-1000], until_received, ending)) as server:
        refused(BadAnswer if ending is close else Unavailable, server.url, basket=basket)
    assert basket.data
    assert CONTENT[SPAN.start :].startswith(basket.data)


def test_a_reset_before_the_answer_is_unavailable() -> None:
    with Server(reset) as server:
        refused(Unavailable, server.url)


def test_nobody_listening_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    refused(Unavailable, f"http://127.0.0.1:{port}")


def test_silence_is_unavailable_after_the_stall_timeout() -> None:
    async def use(client: RangeClient) -> None:
        async def stall(server: Server, basket: Basket) -> None:
            with pytest.raises(Unavailable):
                await client.fetch(Location(server.url), SPAN, SIZE, basket)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stall, mute, Basket())
            nursery.start_soon(stall, tired, halves)

    halves = Basket()
    with Server(silence) as mute, Server(then(GOOD[:100_000], silence)) as tired:
        run(use, stall_timeout=1)
    assert CONTENT[SPAN.start :].startswith(halves.data)
    assert halves.data


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/x", "http:///x", "http://127.0.0.1:none/x", "http://[127.0.0.1/x"]
)
def test_urls_that_cannot_be_fetched_are_bad_answers(url: str) -> None:
    with pytest.raises(BadAnswer):
        fetch(Location(url))


@pytest.mark.parametrize("headers", [{"X-A": "b\r\nX-Evil: 1"}, {"X A": "b"}, {"X-A": "\u20ac"}, {"": "b"}])
def test_headers_that_would_break_the_request_are_refused(headers: dict[str, str]) -> None:
    with Server(GOOD) as server, pytest.raises(BadAnswer):
        fetch(Location(server.url, headers))
    assert not server.requests


# Redirects.


def test_redirects_within_a_host_keep_the_headers() -> None:
    with Server(answer(302, location="b%20c/ü?q=1#x"), answer(308, location="/d"), GOOD) as server:
        basket = fetch(Location(f"{server.url}/a/", SECRETS))
    assert basket.span == SPAN
    assert [request.target for request in server.requests] == ["/a/", "/a/b%20c/%FC?q=1", "/d"]
    assert all(request.headers["private-token"] == SECRET for request in server.requests)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_to_another_host_drop_every_header_of_the_location_for_good(status: int) -> None:
    with Server(GOOD) as last, Server() as other, Server() as first:
        first._script = (answer(status, location=f"{other.url}/x"), answer(status, location=last.url))
        other._script = (answer(status, location=f"{first.url}/back"),)
        basket = fetch(Location(first.url, SECRETS, etag=None))
    assert basket.data == CONTENT[SPAN.start : SPAN.stop]
    requests = [first.requests[0], other.requests[0], first.requests[1], last.requests[0]]
    assert [SECRET in str(request.headers) for request in requests] == [True, False, False, False]
    assert all("range" in request.headers for request in requests)


def test_endless_redirects_are_given_up() -> None:
    with Server(answer(302, location="/again")) as server:
        refused(BadAnswer, server.url)
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "", None, "http://[::1"]
)
def test_redirects_to_anything_but_http_are_refused(target: str | None) -> None:
    with Server(answer(302, location=target)) as server:
        refused(BadAnswer, server.url)
    assert len(server.requests) == 1


def test_a_redirect_from_https_to_http_is_refused(tls: ssl.SSLContext, bundle: str) -> None:
    with Server(GOOD) as plain, Server(answer(302, location=plain.url), tls=tls) as server:
        refused(BadAnswer, server.url, ca_bundle=bundle)
    assert not plain.requests


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest/meta-data/", "http://0xa9fea9fe/x"])
def test_a_redirect_to_the_metadata_service_is_refused(target: str) -> None:
    with Server(answer(302, location=target)) as server:
        url = f"{server.url}/model.bin"
        with pytest.raises(BadAnswer, match="link-local"):
            fetch(Location(url))


def test_a_url_that_a_public_store_chose_leads_to_no_private_address() -> None:
    with Server(GOOD) as server:
        with pytest.raises(BadAnswer, match="private address"):
            fetch(Location(server.url, public=True))
        assert not server.requests
        assert fetch(Location(server.url)).span == SPAN


def test_a_redirect_with_a_large_body_is_followed() -> None:
    with Server(answer(302, bytes(500_000), location="/b"), GOOD) as server:
        assert fetch(Location(server.url)).span == SPAN


# TLS and proxies.


def test_https_with_a_trusted_authority(tls: ssl.SSLContext, bundle: str) -> None:
    with Server(GOOD, tls=tls) as server:
        assert fetch(Location(server.url), ca_bundle=bundle).data == CONTENT[SPAN.start : SPAN.stop]


def test_the_environment_names_the_authorities(
    tls: ssl.SSLContext, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", bundle)
    with Server(GOOD, tls=tls) as server:
        assert fetch(Location(server.url)).span == SPAN


def test_an_unknown_authority_and_a_wrong_name_are_refused(
    tls: ssl.SSLContext, bundle: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    with Server(GOOD, tls=tls) as server:
        assert "ca_bundle" in str(refused(Unavailable, server.url, ca_bundle=str(stranger)))
        with pytest.raises(Unavailable):
            fetch(Location(f"https://127.0.0.2:{server.port}"), ca_bundle=bundle)
    assert not server.requests


def test_a_missing_ca_bundle_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pem"):
        fetch(Location("https://127.0.0.1"), ca_bundle=str(tmp_path / "none.pem"))


def test_http_goes_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(GOOD) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert fetch(Location("http://models.invalid/x")).span == SPAN
    assert proxy.requests[0].target == "http://models.invalid/x"


def test_https_goes_through_a_tunnel(
    tls: ssl.SSLContext, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(GOOD, tls=tls) as server, Server(tunnel) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        basket = fetch(Location(server.url, SECRETS), ca_bundle=bundle)
    assert basket.data == CONTENT[SPAN.start : SPAN.stop]
    assert proxy.requests[0].method == "CONNECT"
    assert SECRET not in str(proxy.requests[0].headers)


# Cancellation.


def cancelled(url: str, when: Callable[[], object], basket: Basket, **options: Any) -> None:
    """Cancel a fetch as soon as `when`, called in a thread, returns; it must return without delay."""

    async def use(client: RangeClient) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.fetch, Location(url), SPAN, SIZE, basket)
                await trio.to_thread.run_sync(when)
                await trio.testing.wait_all_tasks_blocked()
                started = time.monotonic()
                scope.cancel()
        assert scope.cancelled_caught
        assert time.monotonic() - started < 1
        written = len(basket.data)
        again = Basket()
        with Server(GOOD) as healthy:
            await client.fetch(Location(healthy.url), SPAN, SIZE, again)  # the client goes on
        assert again.data == CONTENT[SPAN.start : SPAN.stop]
        assert len(basket.data) == written

    run(use, **options)


def test_cancelling_a_request_whose_answer_does_not_come_returns_at_once() -> None:
    basket = Basket()
    with Server(silence) as server:
        cancelled(server.url, server.arrived.acquire, basket)
    assert basket.span is None


def test_cancelling_a_used_connection_does_not_ask_again() -> None:
    async def use(client: RangeClient) -> None:
        await client.fetch(Location(server.url), SPAN, SIZE, Basket())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.fetch, Location(server.url), SPAN, SIZE, Basket())
            for _ in range(2):
                await trio.to_thread.run_sync(server.arrived.acquire)
            nursery.cancel_scope.cancel()

    with Server(GOOD, silence) as server:
        run(use)
    assert len(server.requests) == 2
    assert server.accepted == 1


def test_cancelling_in_the_middle_of_a_body_returns_at_once(tls: ssl.SSLContext, bundle: str) -> None:
    for context in (None, tls):
        basket = Basket()
        with Server(then(GOOD[:-1], silence), tls=context) as server:
            cancelled(server.url, basket.got.acquire, basket, ca_bundle=bundle)
        assert CONTENT[SPAN.start :].startswith(basket.data)


def test_cancelling_a_handshake_that_is_not_answered_returns_at_once() -> None:
    arrived = threading.Event()

    def listen() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1)
            arrived.set()
            while connection.recv(4096):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        cancelled(f"https://127.0.0.1:{listener.getsockname()[1]}", arrived.wait, Basket())
        thread.join()


def test_cancelling_a_connection_that_is_not_accepted_returns_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        try:
            cancelled(f"http://127.0.0.1:{address[1]}", lambda: _wait_for_syn(address[1], 5), Basket())
        finally:
            for filler in fillers:
                filler.close()


def _wait_for_syn(port: int, count: int) -> None:
    """Wait until `count` connections to `port` were tried, whether they were accepted or not."""
    needle = f"0100007F:{port:04X}"
    while sum(line.split()[2] == needle for line in Path("/proc/net/tcp").read_text().splitlines()) < count:
        pass


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler to make name resolution hang")
def test_cancelling_while_a_name_is_looked_up_returns_at_once(tmp_path: Path) -> None:
    source = tmp_path / "slow.c"
    source.write_text(
        "#include <netdb.h>\n#include <unistd.h>\n"
        "int getaddrinfo(const char *n, const char *s, const struct addrinfo *h, struct addrinfo **r)"
        '{ write(1, "looking up\\n", 11); sleep(60); return EAI_NONAME; }\n'
    )
    library = tmp_path / "slow.so"
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", library, source], check=True)
    script = (
        "import trio\n"
        "from modelfs.fetch.client import RangeClient\n"
        "from modelfs.metrics import Metrics\n"
        "from modelfs.types import Location, Span\n"
        "async def main():\n"
        "    client = RangeClient(metrics=Metrics())\n"
        "    with trio.move_on_after(1) as scope:\n"
        "        await client.fetch(Location('http://models.invalid/x'), Span(0, 1), 1, None)\n"
        "    assert scope.cancelled_caught\n"
        "    client.close()\n"
        "trio.run(main)\n"
        "print('done', flush=True)\n"
    )
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_PRELOAD": str(library)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            assert "looking up\n" in lines
            assert "done\n" in lines
            assert time.monotonic() - started < 15
        finally:
            process.kill()


def test_cancelled_before_it_starts_it_asks_nobody() -> None:
    async def use(client: RangeClient) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.fetch(Location(server.url), SPAN, SIZE, Basket())
        assert scope.cancelled_caught

    with Server(GOOD) as server:
        run(use)
    assert not server.requests


def test_cancelling_waits_for_a_sink_that_is_at_work() -> None:
    at_work, go_on = threading.Event(), threading.Event()
    happened: list[str] = []

    def work() -> None:
        at_work.set()
        go_on.wait(10)
        happened.append("the sink is done")

    async def use(client: RangeClient) -> None:
        async def cancelled_fetch(scope: trio.CancelScope) -> None:
            with scope:
                await client.fetch(Location(server.url), SPAN, SIZE, basket)
            happened.append("fetch returned")

        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelled_fetch, scope)
            await trio.to_thread.run_sync(at_work.wait)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert happened == []
            go_on.set()
        assert happened == ["the sink is done", "fetch returned"]
        assert scope.cancelled_caught

    basket = Basket(on_write=work)
    with Server(then(GOOD[:-1], silence)) as server:
        run(use)
    assert len(happened) == 2


# Counting.


def test_metrics_count_requests_bytes_and_failures_by_scheme() -> None:
    metrics = Metrics()

    async def use(client: RangeClient) -> None:
        await client.fetch(Location(server.url), SPAN, SIZE, Basket())
        with pytest.raises(NotFound):
            await client.fetch(Location(server.url), SPAN, SIZE, Basket())
        await client.fetch(Location("data:,abc"), Span(0, 3), 3, Basket())

    with Server(GOOD, answer(404)) as server:
        run(use, metrics)
    assert metrics.value("modelfs_fetched_bytes_total", scheme="http") == len(SPAN)
    assert metrics.value("modelfs_fetched_bytes_total", scheme="data") == 3
    assert metrics.value("modelfs_store_requests_total", scheme="http") == 2
    assert metrics.value("modelfs_store_errors_total", scheme="http", kind="NotFound") == 1
    assert metrics.value("modelfs_store_errors_total") == 1
    assert metrics.value("modelfs_fetch_seconds_count", scheme="http") == 1


# Files.


def _file(path: Path, content: bytes, *, pinned: bool = True) -> Location:
    path.write_bytes(content)
    status = path.stat()
    token = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    return Location(path.as_uri(), token=token if pinned else None)


def test_a_file_is_read_like_any_store(tmp_path: Path) -> None:
    content = CONTENT * 3
    span = Span(5, len(content) - 5)
    basket = fetch(_file(tmp_path / "ä b%#?.bin", content), span, len(content))
    assert basket.span == span
    assert basket.data == content[5:-5]


@pytest.mark.parametrize("pinned", [True, False])
def test_a_file_of_another_size_is_stale(tmp_path: Path, pinned: bool) -> None:
    location = _file(tmp_path / "model", CONTENT, pinned=pinned)
    (tmp_path / "model").write_bytes(CONTENT + b"x")
    with pytest.raises(Stale):
        fetch(location)


def test_a_file_that_was_replaced_or_touched_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "model"
    location = _file(path, CONTENT)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(Stale):
        fetch(location)
    location = _file(path, CONTENT)
    status = path.stat()
    (tmp_path / "other").write_bytes(bytes(SIZE))
    os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(tmp_path / "other", path)
    with pytest.raises(Stale):
        fetch(location)


def test_a_file_that_changes_while_it_is_read_delivers_nothing_of_the_change(tmp_path: Path) -> None:
    path = tmp_path / "model"
    content = CONTENT * 3
    location = _file(path, content)

    def change() -> None:
        with path.open("r+b") as file:
            file.write(b"X" * len(content))
        os.utime(path, ns=(0, 0))  # the clock of a file system may be coarse

    basket = Basket(on_write=change)

    async def use(client: RangeClient) -> None:
        with pytest.raises(Stale):
            await client.fetch(location, Span(0, len(content)), len(content), basket)

    run(use)
    assert len(basket.data) < len(content)
    assert content.startswith(basket.data)


def test_what_is_not_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        fetch(Location((tmp_path / "none").as_uri()))
    with pytest.raises(BadAnswer):
        fetch(Location(tmp_path.as_uri()))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadAnswer):
        fetch(Location((tmp_path / "pipe").as_uri()))
    for url in ("file://elsewhere/etc/passwd", "file:relative", "file:///a%00b"):
        with pytest.raises(BadAnswer):
            fetch(Location(url))


def test_cancelling_a_file_between_two_reads_stops_there(tmp_path: Path) -> None:
    content = CONTENT * 3
    first, cancelled_ = threading.Event(), threading.Event()

    def pause() -> None:
        first.set()
        cancelled_.wait(10)

    basket = Basket(on_write=pause)
    location = _file(tmp_path / "model", content)

    async def use(client: RangeClient) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.fetch, location, Span(0, len(content)), len(content), basket)
            await trio.to_thread.run_sync(first.wait)
            nursery.cancel_scope.cancel()
            trio.lowlevel.current_trio_token().run_sync_soon(cancelled_.set)

    run(use)
    assert 0 < len(basket.data) < len(content)


# Data URLs.


@pytest.mark.parametrize(
    ("url", "content"),
    [
        ("data:,hello%20world%00", b"hello world\0"),
        ("data:text/plain;charset=utf-8,%C3%BC,%2C", "ü,,".encode()),
        ("DATA:application/json;base64," + base64.b64encode(b"{}").decode(), b"{}"),
        ("data:;BASE64,e30%3D", b"{}"),
        ("data:;base64,e3 0=%0A", b"{}"),
    ],
)
def test_data_urls_are_decoded(url: str, content: bytes) -> None:
    assert fetch(Location(url), Span(0, len(content)), len(content)).data == content
    assert fetch(Location(url), Span(1, len(content)), len(content)).data == content[1:]


@pytest.mark.parametrize(
    ("url", "kind"), [("data:hello", BadAnswer), ("data:;base64,e30", BadAnswer), ("data:,hello", Stale)]
)
def test_malformed_data_urls_are_refused_without_being_shown(url: str, kind: type[StoreError]) -> None:
    with pytest.raises(kind) as caught:
        fetch(Location(url), Span(0, 2), 2)
    assert "e30" not in str(caught.value)
    assert "hello" not in str(caught.value)


# Pure functions.


@settings(deadline=None)
@given(st.integers(0, 10**18), st.integers(1, 10**17), st.integers(0, 10**17), st.booleans())
def test_every_valid_content_range_is_understood(start: int, length: int, rest: int, known: bool) -> None:
    total = start + length + rest if known else None
    text = f"bytes {start}-{start + length - 1}/{'*' if total is None else total}"
    assert parse_content_range(text) == (Span(start, start + length), total)


@settings(deadline=None)
@example("bytes 0-9300000000000000000/*")
@given(st.text() | st.from_regex(r"bytes [0-9]*-[0-9]*/([0-9]*|\*)", fullmatch=True))
def test_no_content_range_breaks_the_parser(text: str) -> None:
    parsed = parse_content_range(text)
    if parsed is not None:
        span, total = parsed
        assert span
        assert total is None or span.stop <= total


@settings(deadline=None)
@given(st.text() | st.integers().map(str) | st.datetimes().map(lambda d: formatdate(d.year, usegmt=True)))
def test_no_retry_after_breaks_the_parser(text: str) -> None:
    wait = parse_retry_after(text, 1e9)
    assert wait is None or wait >= 0


@settings(deadline=None)
@given(
    st.sampled_from([200, 206]) | st.integers(0, 999),
    st.dictionaries(
        st.sampled_from(["content-range", "content-length", "content-encoding", "etag", "last-modified"]),
        st.text()
        | st.sampled_from(["bytes 3-6/10", "4", "10", '"v1"', formatdate(1e9, usegmt=True), "identity"]),
    ),
    st.sampled_from([{}, {"etag": '"v1"'}, {"last_modified": formatdate(1e9, usegmt=True)}]),
)
def test_an_answer_is_either_the_pinned_version_or_an_error(
    status: int, headers: dict[str, str], pin: dict[str, str]
) -> None:
    location = Location("https://example.org/x", **pin)
    try:
        body = accept("https://example.org/x", status, headers, location, Span(3, 7), 10)
    except StoreError:
        return
    assert body == (Span(3, 7) if status == 206 else Span(0, 10))
    assert status == 200 or headers["content-range"].strip().lower().startswith("bytes")
    assert not pin.keys() or headers[next(iter(pin)).replace("_", "-")] == next(iter(pin.values()))
