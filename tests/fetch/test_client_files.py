"""Files and data URLs, read by the range client like any store."""

from __future__ import annotations

import base64
import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from modelfs.errors import (
    BadAnswer,
    NotFound,
    Stale,
    StoreError,
)
from modelfs.fetch.client import RangeClient
from modelfs.types import Location, Span
from tests.fetch.basket import CONTENT, SIZE, Basket, fetch, run

pytestmark = pytest.mark.usefixtures("speaker")


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
