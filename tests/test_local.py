"""Models without a mount: directories filled from the cache, who gets the cache, what happens offline."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import modelfs
from modelfs.cache import Cache
from modelfs.errors import ConfigError, NotFound, StoreError
from modelfs.metrics import Metrics
from tests.origin import Origin

FILES = {"config.json": b"{}", "sub/model.safetensors": os.urandom(9 * 1024 * 1024), "sub/empty": b""}


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No configuration, mount or cache but one's own."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MODELFS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MODELFS_ENVIRONMENT", "local")
    monkeypatch.setenv("MODELFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MODELFS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def source(tmp_path: Path) -> str:
    for path, data in FILES.items():
        (tmp_path / "srv" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "srv" / path).write_bytes(data)
    (tmp_path / "srv" / "link").symlink_to("sub")
    return f"m={(tmp_path / 'srv').as_uri()}"


def tree(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_model_is_a_directory_of_links_to_the_cache(source: str, tmp_path: Path) -> None:
    found = modelfs.local_path("m", sources=[source])
    assert tree(found) == FILES
    assert (found / "link").readlink() == Path("sub")
    assert (found / "link" / "empty").read_bytes() == b""
    weights = (found / "sub/model.safetensors").stat()
    cached = {path.stat().st_ino for path in (tmp_path / "cache/objects").rglob("*.data")}
    assert weights.st_ino in cached
    assert weights.st_mode & 0o222 == 0


def test_asking_again_changes_nothing_and_a_new_revision_is_another_directory(
    source: str, tmp_path: Path
) -> None:
    first = modelfs.local_path("m", sources=[source])
    before = (first / "config.json").stat()
    assert modelfs.local_path("m", sources=[source]) == first
    assert (first / "config.json").stat().st_ino == before.st_ino
    found = [first]
    for text in ("1", "22"):
        (tmp_path / "srv/config.json").write_text(text)
        found.append(modelfs.local_path("m", sources=[source]))
        assert (found[-1] / "config.json").read_text() == text
    assert [path.exists() for path in found] == [False, True, True]


def test_what_was_damaged_by_others_is_made_again(source: str) -> None:
    found = modelfs.local_path("m", sources=[source])
    (found / "sub/empty").unlink()
    assert modelfs.local_path("m", sources=[source]) == found
    assert tree(found) == FILES


def test_a_url_is_a_model_and_unknown_names_say_which_are_known(source: str) -> None:
    assert tree(modelfs.local_path(source.partition("=")[2])) == FILES
    with pytest.raises(NotFound, match="no model 'x'; configured are: m"):
        modelfs.local_path("x", sources=[source])
    with pytest.raises(ConfigError, match="unknown scheme nope://"):
        modelfs.local_path("nope://x")


def test_files_are_copied_where_they_cannot_be_linked(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    found = modelfs.local_path("m", sources=[source])
    assert tree(found) == FILES
    assert {path.stat().st_nlink for path in found.rglob("*") if path.is_file()} == {1}


def test_bytes_are_verified_and_without_the_store_the_last_snapshot_is_used(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    with Origin({"model.bin": data}) as origin:
        origin.digests["model.bin"] = "0" * 64
        with pytest.raises(StoreError, match="do not have the published digest"):
            modelfs.local_path(origin.url)
        origin.digests["model.bin"] = hashlib.sha256(data).hexdigest()
        found = modelfs.local_path(origin.url)
        assert tree(found) == {"model.bin": data}
        url = origin.url
    assert modelfs.local_path(url) == found


@pytest.mark.parametrize(("name", "mode"), [("m.tar", "w"), ("m.tar.gz", "w:gz")])
def test_an_archive_is_unpacked_whole(tmp_path: Path, name: str, mode: str) -> None:
    members = {"config.json": b"{}", "sub/weights.bin": os.urandom(300_000)}
    with tarfile.open(tmp_path / name, mode) as archive:  # type: ignore[call-overload]
        for path, data in members.items():
            row = tarfile.TarInfo(path)
            row.size = len(data)
            archive.addfile(row, io.BytesIO(data))
    assert tree(modelfs.local_path("m", sources=[f"m={(tmp_path / name).as_uri()}"])) == members


def test_threads_and_processes_share_one_cache(source: str, tmp_path: Path) -> None:
    program = "import modelfs, sys; print(modelfs.local_path('m', sources=sys.argv[1:]))"
    command = [sys.executable, "-c", program, source]
    with ThreadPoolExecutor() as pool:
        children = [pool.submit(subprocess.run, command, capture_output=True, text=True) for _ in range(2)]
        threads = [pool.submit(modelfs.local_path, "m", sources=[source]) for _ in range(3)]
        found = {str(thread.result()) for thread in threads}
        for child in children:
            assert child.result().returncode == 0, child.result().stderr
            found.add(child.result().stdout.strip())
    assert len(found) == 1
    assert tree(Path(*found)) == FILES


def test_a_linked_file_keeps_its_bytes_when_the_cache_makes_room(source: str, tmp_path: Path) -> None:
    found = modelfs.local_path("m", sources=[source])
    cache = Cache(tmp_path / "cache", limit=8 * 1024 * 1024, metrics=Metrics())
    try:
        key, _ = max(cache.contents(), key=lambda row: row[1])
        item = cache.object(key, len(FILES["sub/model.safetensors"]))
        assert item.punch([0, 1]) == 0
        item.close()
        cache.make_room(8 * 1024 * 1024)
        assert key not in dict(cache.contents())
    finally:
        cache.close()
    assert tree(found) == FILES


def test_a_model_that_cannot_be_had_says_why(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        modelfs.local_path("m", sources=[f"m={(tmp_path / 'nothing').as_uri()}"])


def test_importing_modelfs_is_cheap() -> None:
    program = "import modelfs, sys; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"trio", "httpx", "modelfs.cache", "modelfs.config"}.isdisjoint(ended.stdout.split())
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        modelfs.nothing  # noqa: B018
