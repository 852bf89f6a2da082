"""Models made on the spot: two stores of one URL must hold the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import trio

from modelfs.stores import open_store
from modelfs.testing import read_span
from modelfs.types import Span
from tests.stores.case import Case, Opened


def model(url: str) -> Callable[[Path], AbstractContextManager[Opened]]:
    @contextmanager
    def opened(directory: Path) -> Iterator[Opened]:
        yield open_store(url), content(url)

    return opened


def content(url: str) -> dict[str, bytes]:
    """Return what another instance of the store at `url` holds."""
    store = open_store(url)

    async def read() -> dict[str, bytes]:
        entries = (await store.snapshot()).entries
        return {
            path: await read_span(await store.locate(entry), Span(0, entry.size))
            for path, entry in entries.items()
        }

    return trio.run(read)


CASES = [
    Case("mock-bert", model("mock://ElKulako/cryptobert")),
    Case("mock-sklearn", model("mock://sklearn?seed=1")),
    Case("mock-random", model("mock://random?files=3&size=300001&seed=x")),
]
