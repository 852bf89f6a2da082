"""Archives as directories, as programs see them through a mount: docs/archives.md."""

from __future__ import annotations

import io
import os
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from modelfs.stores.file import url_of
from tests.mount.harness import daemon_pids, eventually, mounted

CONTENT: Mapping[str, bytes] = {
    "bert/config.json": b'{"hidden_size": 8}\n',
    "bert/empty": b"",
    "bert/onnx/model.onnx": random.Random(1).randbytes(3 * 1024**2 + 5),
    "bert/vocab.txt": b"".join(b"token%d\n" % n for n in range(20_000)),
    "README.md": b"# BERT\n",
}


def tarred(members: Mapping[str, bytes], mode: str = "w") -> bytes:
    """Return a tar archive as a user makes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for path, content in members.items():
            info = tarfile.TarInfo(path)
            info.size, info.mtime = len(content), 1_700_000_000
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip archive as a user makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for path, content in members.items():
            archive.writestr(zipfile.ZipInfo(path, (2023, 11, 14, 22, 13, 20)), content, method)
    return buffer.getvalue()


FORMATS = {
    "model.tar": lambda: tarred(CONTENT),
    "model.zip": lambda: zipped(CONTENT),
    "stored.zip": lambda: zipped(CONTENT, zipfile.ZIP_STORED),
}


def tree(root: Path) -> dict[str, bytes]:
    """Return all files below `root`."""
    return {
        os.path.relpath(os.path.join(base, name), root): Path(base, name).read_bytes()
        for base, _, names in os.walk(root)
        for name in names
    }


@pytest.mark.parametrize("name", FORMATS)
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
        assert tree(m.path / "bert") == CONTENT, "a mount without its store shows what it knows"
