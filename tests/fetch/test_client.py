"""What the range client sends, what arrives, and over which connections."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
import time

import pytest
import trio
import trio.testing

from modelfs.errors import (
    CacheError,
    NotFound,
    Unavailable,
)
from modelfs.fetch.client import RangeClient
from modelfs.metrics import Metrics
from modelfs.types import Location, Span
from tests.fetch.basket import CONTENT, GOOD, SECRET, SECRETS, SIZE, SPAN, Basket, fetch, range_of, run
from tests.fetch.scripted import (
    Server,
    Step,
    answer,
    close,
    part,
    silence,
    then,
)

pytestmark = pytest.mark.usefixtures("speaker")


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
    head = answer(206, content_length=None, transfer_encoding="chunked", content_range=range_of(GOOD))
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
