"""The lock: what it holds, what it refuses and how it says so, and how ``modelfs lock`` makes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelfs import config
from modelfs.cache import Cache
from modelfs.cli import direct
from modelfs.errors import CacheLocked, ConfigError, NotLocked, StoreError
from modelfs.lockfile import Lock, LockedModel, Pinned
from modelfs.metrics import Metrics
from modelfs.types import BLOCK, Digest, Entry, Snapshot
from modelfs.views import Face
from tests.origin import Origin

A, B = Digest("sha256", "a" * 64), Digest("sha256", "b" * 64)
ENTRIES = (
    Entry("config.json", 10, "v1", A),
    Entry("deep/empty", kind="directory"),
    Entry("link", kind="symlink", target="config.json"),
    Entry("weak.bin", 30, "v3", Digest("md5", "3" * 32)),
    Entry("unpublished.bin", 20, "v2"),
)


def snapshot(*entries: Entry, url: str = "mock://m", complete: bool = True) -> Snapshot:
    return Snapshot.of(url, "r1", entries or ENTRIES, complete=complete)


def changed(path: str, **more: Any) -> Snapshot:
    return snapshot(*(replace(e, **more) if e.path == path else e for e in ENTRIES))


@pytest.fixture
def lock(tmp_path: Path) -> Lock:
    return Lock(tmp_path / "modelfs.lock", {"m": LockedModel.of(snapshot())})


def test_a_lock_comes_back_from_its_file(lock: Lock) -> None:
    lock.write()
    assert Lock.read(lock.path) == lock
    assert [path.name for path in lock.path.parent.iterdir()] == ["modelfs.lock"]
    assert json.loads(lock.path.read_text())["models"]["m"] == {
        "source": "mock://m",
        "revision": "r1",
        "files": {
            "config.json": {"size": 10, "digest": str(A)},
            "link": {"target": "config.json"},
            "unpublished.bin": {"size": 20, "version": "v2"},
            "weak.bin": {"size": 30, "digest": f"md5:{'3' * 32}"},
        },
    }


def test_what_is_locked_is_shown(lock: Lock) -> None:
    assert lock.hold("m", snapshot()) == snapshot()
    again = changed("config.json", version="v9", mtime=7.0)  # the same bytes
    assert lock.hold("m", again) == again


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (changed("config.json", digest=B), f"config.json: expected {A}, found {B}: "),
        (changed("config.json", size=11), "config.json: expected 10 bytes, found 11 bytes: "),
        (
            changed("unpublished.bin", version="v9"),
            "unpublished.bin: expected version v2, found version v9: ",
        ),
        (
            changed("link", target="weak.bin"),
            "link: expected a link to 'config.json', found a link to 'weak.bin': ",
        ),
        (
            changed("link", kind="file", size=3, target=""),
            "link: expected a link to 'config.json', found a file of 3 bytes: ",
        ),
        (
            changed("config.json", kind="symlink", target="link"),
            "config.json: expected a file of 10 bytes, found a link to 'link': ",
        ),
        (snapshot(*ENTRIES[1:]), "config.json: expected by the lock, not found: "),
        (snapshot(*ENTRIES, Entry("new", 1)), "new: found, but not in the lock: "),
        (
            snapshot(*ENTRIES[2:], Entry("new", 1)),
            "config.json: expected by the lock, not found (and 1 more): ",
        ),
        (
            snapshot(url="mock://mirror"),
            "unpublished.bin: it is locked by its version at another store: run modelfs lock without "
            "--no-download: ",
        ),
    ],
)
def test_anything_else_is_refused_in_one_line(lock: Lock, found: Snapshot, said: str) -> None:
    with pytest.raises(NotLocked) as refused:
        lock.hold("m", found)
    assert str(refused.value) == f"{said}{found.url} is not what {lock.path} says; modelfs lock accepts it"
    assert not refused.value.retryable


def test_a_model_that_is_not_in_the_lock_is_refused(lock: Lock) -> None:
    with pytest.raises(NotLocked, match=r"modelfs.lock does not have the model n: add it with modelfs lock$"):
        lock.hold("n", snapshot())
    with pytest.raises(NotLocked, match=r"^mock://m is too large to list, and cannot be compared with /"):
        lock.hold("m", snapshot(complete=False))


def test_digests_of_the_lock_are_what_bytes_are_compared_with(tmp_path: Path) -> None:
    files = {"unpublished.bin": Pinned(20, A), "weak.bin": Pinned(30, B)}
    lock = Lock(tmp_path / "l", {"m": LockedModel("mock://m", "r1", files)})
    held = lock.hold("m", snapshot(ENTRIES[3], ENTRIES[4], url="mock://mirror"))
    assert {path: entry.digest for path, entry in held.entries.items()} == {
        "unpublished.bin": A,
        "weak.bin": B,
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory: make it with modelfs lock"),
        (b"\x00\xff", "not a lock of modelfs: make it"),
        (b"[]", "not a lock of modelfs: make it"),
        (b"{}", "not a lock of modelfs: make it"),
        (b'{"version": 2}', "it has version 2, not 1: make it"),
        (b'{"version": 1, "models": []}', "not a lock of modelfs: make it"),
        (
            b'{"version": 1, "models": {"m": {"source": "", "revision": "", "files": {"f": {"size": 1}}}}}',
            "not a lock",
        ),
        (
            b'{"version": 1, "models": {"m": {"source": "", "revision": "", "files": {"f": '
            b'{"size": 1, "digest": "sha256:0"}}}}}',
            "not a lock",
        ),
    ],
)
def test_what_is_no_lock_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "modelfs.lock"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        Lock.read(path)
    assert str(refused.value).startswith(f"{path}: {said}")


def test_a_lock_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written: No such file .*: name another file"):
        Lock(tmp_path / "none" / "modelfs.lock", {}).write()


# -- making one

BIG = bytes(range(256)) * (BLOCK // 256) + b"tail"
SMALL = b"{}"


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin({"published.bin": BIG, "big.bin": BIG[::-1], "empty": b"", "small.json": SMALL}) as origin:
        origin.digests["published.bin"] = hashlib.sha256(BIG).hexdigest()
        yield origin


def settings(tmp_path: Path, origin: Origin, *flags: str) -> config.Settings:
    cache = str(tmp_path / "cache")
    return config.load(
        mountpoint=None,
        env={},
        flags={"cache.dir": cache, "lock": str(tmp_path / "lock")},
        sources=[f"m={origin.url}", *flags],
    )


def made(tmp_path: Path, origin: Origin, *, download: bool = True, flags: tuple[str, ...] = ()) -> Lock:
    return direct.lock(settings(tmp_path, origin, *flags), lambda line: None, download=download)


def sha256(data: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(data).hexdigest())


def test_only_what_has_no_strong_digest_is_fetched_to_be_locked(tmp_path: Path, origin: Origin) -> None:
    lines: list[Any] = []
    lock = direct.lock(settings(tmp_path, origin), lines.append, download=True)
    assert lock.path == tmp_path / "lock"
    assert lock.models["m"].files == {
        path: Pinned(len(data), sha256(data)) for path, data in origin.files.items()
    }
    assert {path for _, path, _ in origin.contents()} == {"big.bin", "small.json"}
    assert lines[-1]["done"] == lines[-1]["total"] == len(BIG) + len(SMALL)
    # A locked mount finds them in the cache: they are filed under what they are.
    cache = Cache(tmp_path / "cache", metrics=Metrics())
    try:
        for data in (BIG[::-1], SMALL):
            assert cache.cached_bytes(f"sha256-{sha256(data).value}", len(data)) == len(data)
        assert len(cache.contents()) == 2
    finally:
        cache.close(sync=False)


def test_without_downloads_versions_are_pinned_and_no_cache_is_touched(
    tmp_path: Path, origin: Origin
) -> None:
    files = made(tmp_path, origin, download=False).models["m"].files
    assert files["published.bin"] == Pinned(len(BIG), sha256(BIG))
    assert files["small.json"].digest is None
    assert files["small.json"].version
    assert origin.contents() == []
    assert not (tmp_path / "cache").exists()


def test_what_filters_hide_is_not_locked(tmp_path: Path, origin: Origin) -> None:
    all_of_it = settings(tmp_path, origin)
    model = replace(all_of_it.models[0], face=Face(exclude=("big.bin",), formats="production"))
    lock = direct.lock(replace(all_of_it, models=(model,)), lambda line: None, download=False)
    assert set(lock.models["m"].files) == set(origin.files) - {"big.bin"}


def test_what_cannot_be_locked_is_told_with_its_name(tmp_path: Path, origin: Origin) -> None:
    with pytest.raises(StoreError, match=r"^model n: file:///none/such"):
        made(tmp_path, origin, flags=("n=file:///none/such",))
    origin.faults["small.json"] = [403] * 9
    with pytest.raises(StoreError, match=r"^model m: .*small.json"):
        made(tmp_path, origin)
    with pytest.raises(ConfigError, match=r"^there is no model to lock: name one"):
        direct.lock(replace(settings(tmp_path, origin), models=()), lambda line: None, download=True)


def test_a_cache_in_use_is_refused(tmp_path: Path, origin: Origin) -> None:
    cache = Cache(tmp_path / "cache", metrics=Metrics())
    try:
        with pytest.raises(CacheLocked, match="in use by process"):
            made(tmp_path, origin)
        assert made(tmp_path, origin, download=False).models.keys() == {"m"}
    finally:
        cache.close(sync=False)
