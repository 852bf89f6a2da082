"""Archives as directories, as programs see them through a mount: docs/archives.md."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import shutil
import signal
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pytest
import zstandard

from modelfs.stores.file import url_of
from tests.archives.packing import tarred, zipped
from tests.mount.harness import daemon_pids, eventually, mounted

CONTENT: Mapping[str, bytes] = {
    "bert/config.json": b'{"hidden_size": 8}\n',
    "bert/empty": b"",
    "bert/onnx/model.onnx": random.Random(1).randbytes(3 * 1024**2 + 5),
    "bert/vocab.txt": b"".join(b"token%d\n" % n for n in range(20_000)),
    "README.md": b"# BERT\n",
}


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


FORMATS = {
    "model.tar": lambda: tarred(CONTENT),
    "model.zip": lambda: zipped(CONTENT),
    "model.tar.gz": lambda: tarred(CONTENT, "w:gz"),
    "model.tgz": lambda: (
        gzip.compress(tarred(CONTENT)[:700]) + gzip.compress(tarred(CONTENT)[700:]) + bytes(9)
    ),
    "model.tar.zst": lambda: zstandard.compress(tarred(CONTENT)),
    "frames.tar.zst": lambda: b"".join(map(zstandard.compress, cut(tarred(CONTENT), 1_000_000))),
    "stored.zip": lambda: zipped(CONTENT, zipfile.ZIP_STORED),
}


def tree(root: Path) -> dict[str, bytes]:
    """Return all files below `root`."""
    return {
        os.path.relpath(os.path.join(base, name), root): Path(base, name).read_bytes()
        for base, _, names in os.walk(root)
        for name in names
    }


@pytest.mark.parametrize(
    ("transport", "name"),  # what is in an archive does not depend on the transport
    [*(("kernel", name) for name in FORMATS), ("pyfuse3", "model.tar.gz"), ("pyfuse3", "model.zip")],
)
def test_the_source_is_shown_as_its_members(place: Path, transport: str, name: str) -> None:
    archive = place / "store" / name
    archive.parent.mkdir()
    archive.write_bytes(FORMATS[name]())
    with mounted(place, sources={"bert": url_of(archive)}, transport=transport) as m:
        root = m.path / "bert"
        assert (root / "bert" / "config.json").read_bytes() == CONTENT["bert/config.json"]
        assert not (root / "bert" / "nothing").exists()
        assert tree(root) == CONTENT
        assert (root / "bert" / "vocab.txt").stat().st_mtime == 1_700_000_000
        fetched = m.fetched()
        m.drop_pages()
        assert tree(root) == CONTENT
        assert m.fetched() == fetched
        (pid,) = daemon_pids(m)
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    archive.rename(place / "gone")
    with mounted(place, sources={"bert": url_of(archive)}, transport=transport) as m:
        (state,) = m.status()["models"][0]["archives"]
        assert state["state"] == "ready", "what is in it is still known"
        assert tree(m.path / "bert") == CONTENT


MiB = 1024**2
LARGE = int(os.environ.get("MODELFS_LARGE_ARCHIVE", str(96 * MiB)))
"""Bytes of the weights in a large archive; ``MODELFS_LARGE_ARCHIVE=1073741824`` is what users have."""


def large_archive(path: Path) -> tuple[str, str]:
    """Write an archive with the small files first; return the digests of the weights and of the last file."""
    weights, last = hashlib.sha256(), random.Random(3).randbytes(100_000)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:

        def add(name: str, file: IO[bytes], size: int) -> None:
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, file)

        add("m/config.json", io.BytesIO(b"{}"), 2)
        with tempfile.TemporaryFile() as file:
            for _ in range(LARGE // MiB):
                piece = os.urandom(MiB)
                weights.update(piece)
                file.write(piece)
            file.seek(0)
            add("m/model.safetensors", file, LARGE)
        add("m/last.txt", io.BytesIO(last), len(last))
    return weights.hexdigest(), hashlib.sha256(last).hexdigest()


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_a_large_archive_costs_what_is_read_of_it(place: Path) -> None:
    archive = place / "store" / "m.tar.gz"
    archive.parent.mkdir()
    weights, last = large_archive(archive)
    size = archive.stat().st_size
    with mounted(place, sources={"bert": url_of(archive)}, transport="kernel") as m:
        root = m.path / "bert" / "m"
        assert (root / "config.json").read_bytes() == b"{}"
        assert m.fetched() <= 16 * MiB, "a small file in front does not wait for the large one"
        assert sorted(os.listdir(root)) == ["config.json", "last.txt", "model.safetensors"]
        assert m.fetched() == size, "the listing is one pass"
        assert digest_of(root / "model.safetensors") == weights
        assert digest_of(root / "last.txt") == last
        assert m.fetched() == size, "and the only one"
        assert m.status()["rss_bytes"] < 200 * MiB
        (pid,) = daemon_pids(m)
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    shutil.rmtree(place / "cache" / "objects")
    with mounted(place, sources={"bert": url_of(archive)}, transport="kernel") as m:
        assert digest_of(m.path / "bert" / "m" / "last.txt") == last
        assert m.fetched() <= 32 * MiB, "what was evicted is read again from a checkpoint"
        assert digest_of(m.path / "bert" / "m" / "model.safetensors") == weights


def test_a_wrong_archive_is_discarded_with_all_that_came_from_it(place: Path) -> None:
    archive = place / "store" / "m.tar.gz"
    archive.parent.mkdir()
    data = bytearray(tarred(CONTENT, "w:gz"))
    data[-6] ^= 1  # of the checksum at the end
    archive.write_bytes(data)
    with mounted(place, sources={"bert": url_of(archive)}) as m:
        with pytest.raises(OSError, match="Input/output error"):
            os.listdir(m.path / "bert")
        with pytest.raises(OSError, match="Input/output error"):
            (m.path / "bert" / "README.md").read_bytes()
        (state,) = m.status()["models"][0]["archives"]
        assert state["state"] == "failed"
        assert "incorrect data check" in state["why"]
        assert state["members"] == 0


def test_archives_inside_of_a_model_are_directories_if_it_says_so(place: Path) -> None:
    store = place / "store"
    (store / "data").mkdir(parents=True)
    (store / "config.json").write_bytes(b"{}")
    (store / "data" / "a.tar.gz").write_bytes(tarred(CONTENT, "w:gz"))
    (store / "b.zip").write_bytes(zipped(CONTENT))
    url = url_of(store)
    config = f"models:\n  plain: {url}\n  some: {{source: '{url}', archives: 'data/*'}}\n"
    with mounted(place, config=config, transport="kernel") as m:
        assert (m.path / "plain" / "b.zip").is_file()
        assert (m.path / "some" / "b.zip").is_file()
        inner = m.path / "some" / "data" / "a.tar.gz"
        assert inner.is_dir()
        assert (inner / "bert" / "config.json").read_bytes() == CONTENT["bert/config.json"]
        m.allowed_errors.append("the next one takes the mount over")
        os.kill(m.status()["pid"], signal.SIGKILL)
        assert (inner / "bert" / "vocab.txt").read_bytes() == CONTENT["bert/vocab.txt"]
        assert tree(inner) == CONTENT, "the next daemon goes on"
        assert sorted(os.listdir(m.path / "some")) == ["b.zip", "config.json", "data"]
