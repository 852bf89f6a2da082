"""What the range client says of servers that misbehave on demand."""

from __future__ import annotations

import socket
import threading
import time
from email.utils import formatdate

import pytest
import trio
import trio.testing

from modelfs.errors import (
    AccessDenied,
    BadAnswer,
    Expired,
    NotFound,
    Stale,
    StoreError,
    Unavailable,
)
from modelfs.fetch.client import RangeClient
from modelfs.types import Location
from tests.fetch.basket import CONTENT, GOOD, SIZE, SPAN, Basket, fetch, refused, run
from tests.fetch.scripted import (
    Server,
    Step,
    answer,
    close,
    part,
    reset,
    silence,
    then,
)

pytestmark = pytest.mark.usefixtures("speaker")


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
    ("seconds", "low", "high"),
    [(None, 7, 7), (3600, 3500, 3600), (-3600, 0, 0)],
    ids=["seconds", "in an hour", "an hour ago"],
)
def test_retry_after_is_understood_in_both_forms(seconds: int | None, low: float, high: float) -> None:
    value = "7" if seconds is None else formatdate(time.time() + seconds, usegmt=True)
    with Server(answer(429, retry_after=value)) as server:
        error = refused(Unavailable, server.url)
    assert low <= error.retry_after <= high


def test_an_unreadable_retry_after_is_none() -> None:
    with Server(answer(503, retry_after="soon")) as server:
        assert refused(Unavailable, server.url).retry_after is None


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
