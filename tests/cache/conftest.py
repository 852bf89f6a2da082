"""A cache for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modelfs.cache import Cache
from tests.cache import cache_at


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with cache_at(tmp_path / "cache") as cache:
        yield cache
