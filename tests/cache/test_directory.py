"""Whose directory a cache may be in, and who may look into it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelfs.errors import CacheLocked, CacheUnusable
from modelfs.types import BLOCK
from tests.cache import (
    cache_at,
    content,
    mounted,
    open_cache,
    put,
    stored,
    whole,
)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
NOBODY = 65534


def test_two_daemons_never_share_a_directory(tmp_path: Path) -> None:
    with cache_at(tmp_path / "c"), pytest.raises(CacheLocked, match=f"process {os.getpid()};"):
        open_cache(tmp_path / "c")
    open_cache(tmp_path / "c").close()


def test_only_the_owner_can_read_anything(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    directory.mkdir(mode=0o755)
    with cache_at(directory) as cache:
        item = cache.object("k", BLOCK + 1)
        put(item, content(BLOCK + 1), 0)
        assert os.stat(item.path).st_mode & 0o777 == 0o600
        put(item, content(BLOCK + 1), 1)
        assert os.stat(item.path).st_mode & 0o777 == 0o400
        item.close()
        cache.set_meta("big", "x" * 100_000)
    directories = [path for path in directory.rglob("*") if path.is_dir()]
    outer = [directory, directory / "objects", directory / "meta", *(directory / "objects").iterdir()]
    assert set(outer) <= {directory, *directories}
    assert {path.stat().st_mode & 0o777 for path in outer} == {0o700}


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(CacheUnusable, match=r"cache\.dir"):
        open_cache(tmp_path / "c")
    with pytest.raises(CacheUnusable, match=r"cache\.dir"):
        open_cache(tmp_path / "c" / "d")


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    mode = tmp_path.stat().st_mode
    with pytest.raises(CacheUnusable, match="holds something else"):
        open_cache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert tmp_path.stat().st_mode == mode


def test_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    open_cache(tmp_path / "c").close()
    (tmp_path / "c" / "format").write_text("2\n")
    with pytest.raises(CacheUnusable, match="format '2'"):
        open_cache(tmp_path / "c")
    assert (tmp_path / "c" / "clean").exists()


@needs_root
def test_a_read_only_disk_cannot_hold_a_cache(tmp_path: Path) -> None:
    with mounted(tmp_path / "ro", "-o", "ro") as directory, pytest.raises(CacheUnusable, match="Read-only"):
        open_cache(directory / "c")


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """Be somebody without any rights, and have a directory."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


@needs_root
def test_an_ordinary_user_can_drop_and_fetch_blocks_of_a_complete_object() -> None:
    data = content(2 * BLOCK)
    with ordinary_user() as home:
        with cache_at(home / "c") as cache:
            stored(cache, "k", data)
        with cache_at(home / "c") as cache:
            item = cache.object("k", len(data))
            assert os.stat(item.path).st_mode & 0o777 == 0o400
            assert item.punch([1]) == BLOCK
            assert os.stat(item.path).st_mode & 0o777 == 0o600
            put(item, data, 1)
            assert whole(item) == data
            assert os.stat(item.path).st_mode & 0o777 == 0o400
            item.close()


@needs_root
def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    with ordinary_user() as home:
        (home / "mine").mkdir()
        os.seteuid(0)
        os.chown(home / "mine", 1234, 1234)
        os.chmod(home / "mine", 0o777)
        os.seteuid(NOBODY)
        with pytest.raises(CacheUnusable, match="another user"):
            open_cache(home / "mine")
