"""What a mount does with large files: how much it fetches, from where, and how much memory it needs."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modelfs.testing.s3 import S3Server
from tests.mount.harness import Mounted, mounted

MIB = 1 << 20
GIB = 1 << 30
BLOCK = 8 * MIB

SHA256 = "import hashlib,sys\nprint(hashlib.file_digest(open(sys.argv[1],'rb'),'sha256').hexdigest())"


def make(path: Path, size: int) -> str:
    """Write `size` bytes that differ from block to block; return their SHA-256."""
    digest = hashlib.sha256()
    unit = os.urandom(MIB)
    with path.open("wb") as file:
        for number in range(size // MIB):
            piece = number.to_bytes(8, "big") + unit[8:]
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[S3Server, str]]:
    """An S3 server with one object of 1 GiB under two names, and its SHA-256."""
    source = tmp_path_factory.mktemp("large") / "source"
    digest = make(source, GIB)
    with S3Server() as server:
        server.client().create_bucket(Bucket="models")
        for key in ("big/w.bin", "big/w.dat"):
            server.put_file("models", key, source)
        source.unlink()
        yield server, digest


def test_a_cold_file_has_its_digest_and_a_second_read_asks_nobody(
    place: Path, transport: str, large: tuple[S3Server, str]
) -> None:
    server, digest = large
    sources = {"m": "s3://models/big/"}
    with mounted(place, sources=sources, env=server.env(), transport=transport) as mount:
        path = str(mount.path / "m" / "w.bin")
        assert mount.python(SHA256, path).strip() == digest
        asked, fetched = len(server.data_requests), mount.fetched()
        assert fetched == GIB
        mount.drop_pages()
        assert mount.python(SHA256, path).strip() == digest
        assert len(server.data_requests) == asked
        assert mount.fetched() == fetched


def test_a_look_into_a_large_file_fetches_two_blocks_at_most(
    place: Path, transport: str, large: tuple[S3Server, str]
) -> None:
    server, _ = large
    with mounted(place, sources={"m": "s3://models/big/"}, env=server.env(), transport=transport) as mount:
        code = "import os,sys\nfd=os.open(sys.argv[1],os.O_RDONLY)\nprint(len(os.pread(fd,100_000,512<<20)))"
        assert mount.python(code, str(mount.path / "m" / "w.dat")).strip() == "100000"
        while mount.status()["fetch"]["in_flight"]:
            """What was begun is counted as well."""
        assert 100_000 <= mount.fetched() <= 2 * BLOCK


class _Endless(BaseHTTPRequestHandler):
    """A file of any length without keeping it: a repeated MiB."""

    protocol_version = "HTTP/1.1"
    unit = memoryview(os.urandom(MIB) * 2)
    size = 4 * GIB

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        start, stop, status = 0, self.size, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, stop, status = int(found[1]), int(found[2]) + 1, 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{self.size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", '"endless"')
        self.end_headers()
        while self.command == "GET" and start < stop:
            offset = start % MIB
            piece = self.unit[offset : offset + min(MIB, stop - start)]
            try:
                self.wfile.write(piece)
            except ConnectionError:
                self.close_connection = True
                return
            start += len(piece)


@pytest.fixture
def endless() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endless)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/w.bin"
    server.shutdown()
    thread.join()
    server.server_close()


def test_memory_stays_bounded_while_4_gib_stream_through(place: Path, transport: str, endless: str) -> None:
    with mounted(place, "--cache-size", "1GiB", sources={"m": endless}, transport=transport) as mount:
        code = (
            "import sys\n"
            "unit=None; n=0\n"
            "with open(sys.argv[1],'rb',0) as f:\n"
            "    while data := f.read(1<<20):\n"
            "        unit = unit or data\n"
            "        assert data == unit, n\n"
            "        n += len(data)\n"
            "print(n)\n"
        )
        assert mount.python(code, str(mount.path / "m" / "w.bin")).strip() == str(4 * GIB)
        assert peak_memory(mount) < 200 * MIB
        assert mount.status()["cache"]["used"] <= GIB


def peak_memory(mount: Mounted) -> int:
    """Return the most bytes of memory the daemon ever had resident."""
    text = Path(f"/proc/{mount.status()['pid']}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
