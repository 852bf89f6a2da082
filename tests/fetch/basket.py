"""What fetches with a range client of its own, for tests of what it promises."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from modelfs.cache import Data, Pipe
from modelfs.errors import (
    StoreError,
)
from modelfs.fetch.client import RangeClient
from modelfs.metrics import Metrics
from modelfs.types import Location, Span
from tests.fetch.scripted import (
    part,
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


def range_of(message: bytes) -> str:
    return message.partition(b"Content-Range: ")[2].partition(b"\r\n")[0].decode()
