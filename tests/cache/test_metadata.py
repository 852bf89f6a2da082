"""What is kept beside the objects."""

from __future__ import annotations

import os
import pickle
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from modelfs.cache import Cache
from tests.cache import (
    cache_at,
    in_threads,
)


def test_metadata_is_kept_as_json(tmp_path: Path) -> None:
    value = {"entries": [["a", 1, None]], "big": "x" * 100_000}
    with cache_at(tmp_path / "c") as cache:
        assert cache.get_meta("a") is None
        cache.set_meta("a", value)
        cache.set_meta("b", 1)
        cache.set_meta("b", None)
        with pytest.raises(TypeError):
            cache.set_meta("a", object())
    with cache_at(tmp_path / "c") as cache:
        assert cache.get_meta("a") == value
        assert cache.get_meta("b") is None


def test_metadata_can_be_used_from_many_threads(cache: Cache) -> None:
    def work(number: int) -> None:
        cache.set_meta(f"k{number}", number)

    in_threads([lambda n=n: work(n) for n in range(8)])
    assert [cache.get_meta(f"k{number}") for number in range(8)] == list(range(8))


@pytest.mark.parametrize("ruin", ["garbage", "truncated", "no table", "empty"])
def test_a_ruined_database_is_replaced_by_an_empty_one(tmp_path: Path, ruin: str) -> None:
    database = tmp_path / "c" / "meta" / "cache.db"
    with cache_at(tmp_path / "c") as cache:
        cache.set_meta("a", list(range(20_000)))
        cache.set_meta("b", "x" * 20_000)
    match ruin:
        case "garbage":
            database.write_bytes(b"this was a database once" * 1000)
        case "truncated":
            os.truncate(database, 5000)
        case "no table":
            with closing(sqlite3.connect(database)) as connection:
                connection.execute("DROP TABLE Cache")
                connection.execute("CREATE TABLE Cache (x INTEGER)")
                connection.commit()
        case "empty":
            database.write_bytes(b"")
    with cache_at(tmp_path / "c") as cache:
        assert cache.get_meta("b") is None
        cache.set_meta("a", 2)
        assert cache.get_meta("a") == 2


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "modelfs-bomb"),)


def test_a_pickle_in_the_database_is_never_loaded(tmp_path: Path) -> None:
    bomb = Bomb()
    target = Path(bomb.__reduce__()[1][0])
    with cache_at(tmp_path / "c") as cache:
        cache.set_meta("a", 1)
    with closing(sqlite3.connect(tmp_path / "c" / "meta" / "cache.db")) as connection:
        pickle_mode = 4
        connection.execute("UPDATE Cache SET mode = ?, value = ?, raw = 1", (pickle_mode, pickle.dumps(bomb)))
        connection.commit()
    with cache_at(tmp_path / "c") as cache:
        assert cache.get_meta("a") is None
        assert not target.exists()
        cache.set_meta("a", 3)
        assert cache.get_meta("a") == 3
