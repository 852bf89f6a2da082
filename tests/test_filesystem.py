"""modelfs:// for fsspec: its own abstract tests of reading, and what they leave out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.tests.abstract as abstract
import pytest

import modelfs
from modelfs.filesystem import ModelFileSystem
from tests.origin import Origin

ROOT = Path(modelfs.__file__).parents[1]


class Writable(ModelFileSystem):
    """A file system whose one model, ``model``, is a directory that fsspec's tests fill as they go."""

    cachable = False

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory
        super().__init__(sources=[f"model={directory.as_uri()}"], **options)

    def _real(self, path: str) -> Path:
        return self.directory / self._strip_protocol(path).removeprefix("model").strip("/")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._real(path).parent.mkdir(parents=True, exist_ok=True)
        self._real(path).write_bytes(value)
        self.invalidate_cache()

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        self.pipe_file(path, b"")

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        self._real(path).mkdir(parents=True)
        self.invalidate_cache()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.mkdir(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        shutil.rmtree(self._real(path))
        self.invalidate_cache()


class TestReading(abstract.AbstractFixtures, abstract.AbstractGetTests):
    """All of fsspec's abstract tests that only read from the file system: those of ``get``."""

    @pytest.fixture
    def fs(self, tmp_path: Path) -> Iterator[ModelFileSystem]:
        (tmp_path / "srv").mkdir()
        fs = Writable(tmp_path / "srv", cache_dir=tmp_path / "cache")
        yield fs
        fs.close()

    @pytest.fixture
    def fs_path(self) -> str:
        return "model"

    @pytest.fixture
    def local_path(self, tmp_path: Path) -> str:
        (tmp_path / "local").mkdir()
        return str(tmp_path / "local")


@pytest.fixture
def origin() -> Iterator[Origin]:
    files = {"config.json": b"{}", "big.bin": bytes(range(256)) * 80_000, "a/b/c.txt": b"one\ntwo\n"}
    with Origin(files) as origin:
        yield origin


@pytest.fixture
def fs(origin: Origin, tmp_path: Path) -> Iterator[ModelFileSystem]:
    sources = [f"m={origin.url}", "gone=file:///no/such/place"]
    fs = ModelFileSystem(sources=sources, cache_dir=tmp_path / "cache", skip_instance_cache=True)
    yield fs
    fs.close()


def test_files_are_read_where_they_are_looked_at(fs: ModelFileSystem, origin: Origin) -> None:
    with fs.open("modelfs://m/big.bin", block_size=4096) as file:
        file.seek(10_000_000)
        assert file.read(300) == (bytes(range(256)) * 3)[10_000_000 % 256 :][:300]
        file.seek(-2, os.SEEK_END)
        assert file.read() == b"\xfe\xff"
    assert fs.cat_file("m/a/b/c.txt", start=4) == b"two\n"
    assert fs.read_text("m/config.json") == "{}"
    assert [line.strip() for line in fs.open("m/a/b/c.txt", "rt")] == ["one", "two"]
    assert fs.cat("m/big.bin") == origin.files["big.bin"]
    asked = len(origin.contents())
    assert fs.cat("m/big.bin") == origin.files["big.bin"]
    assert len(origin.contents()) == asked


def test_listings_are_those_of_the_mount(fs: ModelFileSystem) -> None:
    assert fs.ls("", detail=False) == ["m", "model-metadata.yaml"]
    assert fs.find("m") == ["m/a/b/c.txt", "m/big.bin", "m/config.json"]
    assert fs.glob("m/**/*.txt") == ["m/a/b/c.txt"]
    info = fs.info("m/big.bin")
    assert (info["size"], info["type"]) == (20_480_000, "file")
    assert info["version"].startswith('"')
    assert fs.isdir("m/a")
    assert fs.checksum("m/big.bin") != fs.checksum("m/config.json")
    assert b"models:" in fs.cat("model-metadata.yaml")


def test_errors_are_those_that_fsspec_users_expect(fs: ModelFileSystem) -> None:
    for path in ("m/nothing", "x", "m/config.json/below"):
        with pytest.raises(FileNotFoundError):
            fs.info(path)
        assert not fs.exists(path)
    with pytest.raises(IsADirectoryError):
        fs.open("m/a")
    with pytest.raises(OSError, match=r"model gone: .*No such file"):
        fs.ls("gone")
    for mode in ("wb", "ab", "xb"):
        with pytest.raises(OSError, match="read-only"):
            fs.open("m/new", mode)


def test_a_new_revision_is_seen_when_it_is_asked_for(fs: ModelFileSystem, origin: Origin) -> None:
    assert fs.cat("m/config.json") == b"{}"
    origin.files["config.json"] = b'{"new": 1}'
    assert fs.info("m/config.json")["size"] == 2
    fs.invalidate_cache()
    assert fs.cat("m/config.json") == b'{"new": 1}'


def test_fsspec_finds_it_by_its_entry_point(tmp_path: Path) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "site" / "modelfs_points-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modelfs-points\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fsspec.specs]\nmodelfs = {points['fsspec.specs']['modelfs']}\n")
    (tmp_path / "srv").mkdir()
    (tmp_path / "srv" / "x").write_bytes(b"here")
    program = (
        "import fsspec, sys\n"
        "options = dict(sources=['m=' + sys.argv[1]], cache_dir=sys.argv[2])\n"
        "print(fsspec.open('modelfs://m/x', **options).open().read())\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}"}
    command = [sys.executable, "-c", program, (tmp_path / "srv").as_uri(), str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (ended.stdout, ended.stderr) == ("b'here'\n", "")
    assert (tmp_path / "cache" / "clean").exists()
