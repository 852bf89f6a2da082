"""Fallback chains on real mounts: stores die, lie or are away, and readers get the right bytes still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from tests.faults.rig import noise
from tests.mount.harness import Mounted, Reader, eventually, mounted
from tests.origin import Origin

MIB = 1024 * 1024
CONTENT = noise(44 * MIB + 77, "weights")
CONFIG = b'{"hidden": 1}'

STORE = """
import sys
from hashlib import sha256
from pathlib import Path
from tests.origin import Origin
files = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()}
with Origin(files) as origin:
    origin.digests = {name: sha256(data).hexdigest() for name, data in files.items()}
    origin.pause = 0.05
    print(origin.url, flush=True)
    sys.stdin.read()
"""
"""A slow store in a process of its own, which can be killed."""

READ = """
from hashlib import sha256
seen = sha256()
with open(sys.argv[1], 'rb', buffering=0) as file:
    seen.update(file.read(1 << 20))
    step()
    while data := file.read(1 << 20):
        seen.update(data)
print(seen.hexdigest())
"""


@pytest.fixture
def backup() -> Iterator[Origin]:
    """The second store of the chain."""
    files = {"w.dat": CONTENT, "config.json": CONFIG}
    with Origin(files) as own:
        own.digests = {path: sha256(data).hexdigest() for path, data in files.items()}
        yield own


@contextmanager
def store(files: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield the process of a store of `files`, and its URL."""
    with subprocess.Popen(
        [sys.executable, "-c", STORE, str(files)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def chain(place: Path, transport: str, *urls: str) -> Iterator[Mounted]:
    """Mount the model ``m`` with a chain of stores."""
    flags = [word for url in urls for word in ("--source", f"m={url}")]
    with mounted(place, "--refresh", "0", *flags, transport=transport) as own:
        yield own


def test_the_first_store_dies_while_a_file_is_read(place: Path, transport: str, backup: Origin) -> None:
    files = place / "files"
    files.mkdir()
    (files / "w.dat").write_bytes(CONTENT)
    with store(files) as (process, url), chain(place, transport, url, backup.url) as mount:
        with Reader(READ, mount.path / "m/w.dat") as reader:
            reader.said()  # the first MiB is there
            assert backup.log == []
            process.send_signal(signal.SIGKILL)
            process.wait()
            reader.go_on()
            assert reader.said() == sha256(CONTENT).hexdigest()
        spans = [span.removeprefix("bytes=").split("-") for _, _, span in backup.contents()]
        assert sum(int(stop) + 1 - int(start) for start, stop in spans) < len(CONTENT)
        assert mount.metric("modelfs_fallbacks_total", **{"from": "http", "to": "http"}) >= 1
        (model,) = mount.status()["models"]
        assert model["source"] == url
        assert [row["serving"] for row in model["sources"]] == [False, True]
        assert model["sources"][0]["state"] == "failing"
        lines = [line for line in mount.cli("status", str(mount.path)).stdout.splitlines() if url in line]
        assert any(f"{backup.url} serves" in line and f"{url} is failing (" in line for line in lines)


def test_wrong_bytes_of_the_first_store_are_never_seen(place: Path, transport: str, backup: Origin) -> None:
    with Origin({"config.json": CONFIG[::-1]}) as first:
        first.digests["config.json"] = sha256(CONFIG).hexdigest()
        with chain(place, transport, first.url, backup.url) as mount:
            for _ in range(2):
                assert mount.run("cat", str(mount.path / "m/config.json")).stdout == CONFIG.decode()
                mount.drop_pages()
            assert len(first.contents()) == 1


def test_a_model_is_mounted_from_the_second_store_and_returns_to_the_first(
    place: Path, transport: str, backup: Origin
) -> None:
    with Origin({}) as first:
        first.files["modelfs-manifest.json"] = b""
        away = f"{first.url}away/"
        with chain(place, transport, away, backup.url) as mount:
            config = mount.path / "m/config.json"
            assert config.read_bytes() == CONFIG
            (model,) = mount.status()["models"]
            assert (model["source"], model["state"]) == (backup.url, "ready")
            first.files["away/modelfs-manifest.json"] = (
                b'{"version": 1, "files": [{"path": "config.json", "size": 1, "etag": "\\"x\\""}]}'
            )
            mount.cli("refresh", str(mount.path))
            eventually(lambda: config.stat().st_size == 1)
            assert mount.status()["models"][0]["source"] == away


def test_a_successor_goes_on_with_the_chain(place: Path, backup: Origin) -> None:
    files = place / "files"
    files.mkdir()
    (files / "w.dat").write_bytes(CONTENT)
    with store(files) as (process, url), chain(place, "kernel", url, backup.url) as mount:
        mount.allowed_errors.append("the next one takes the mount over")
        with Reader(READ, mount.path / "m/w.dat") as reader:
            reader.said()
            process.kill()
            process.wait()
            os.kill(mount.status()["pid"], signal.SIGKILL)
            reader.go_on()
            assert reader.said() == sha256(CONTENT).hexdigest()
        eventually(lambda: mount.status()["handovers"] == 1)
