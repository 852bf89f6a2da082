"""An HTTP origin that tests steer while a mount reads from it: change, hold back or cut what it serves."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

MANIFEST = "modelfs-manifest.json"
PIECE = 128 * 1024


class Origin:
    """Serves `files` below ``/``, with a manifest, ETags and ranges; a context manager."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.digests: dict[str, str] = {}
        """Path → sha256 that the manifest publishes; only for these."""
        self.held: dict[str, tuple[int, threading.Event]] = {}
        """Path → after how many bytes of the file its answer waits, and for what."""
        self.long: tuple[int, threading.Event] | None = None
        """Answers with more than so many bytes of a file wait for this."""
        self.silent = threading.Event()
        """While set, requests for contents get no answer until `silence_over`."""
        self.silence_over = threading.Event()
        self.pause = 0.0
        """Seconds between pieces of `PIECE` bytes of an answer."""
        self.ranges = True
        """Whether ranges are honoured; without, every answer is the whole file."""
        self.refusal = 0
        """The status that every request for a range gets, if not 0."""
        self.cuts: dict[str, int] = {}
        """Path → after how many bytes the next answer that is longer breaks off."""
        self.faults: dict[str, list[int]] = {}
        """Path → statuses that its next requests for bytes get instead."""
        self.log: list[tuple[str, str, str]] = []
        """(method, path, Range header) of every request."""

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}/"

    def contents(self) -> list[tuple[str, str, str]]:
        """Return the requests for bytes of files."""
        return [row for row in self.log if row[0] == "GET" and not row[1].endswith(MANIFEST)]

    def manifest(self) -> bytes:
        rows = []
        for path, data in self.files.items():
            row: dict[str, object] = {"path": path, "size": len(data), "etag": etag(data)}
            if path in self.digests:
                row["sha256"] = self.digests[path]
            rows.append(row)
        return json.dumps({"version": 1, "files": rows}).encode()

    def __enter__(self) -> Self:
        origin = self

        class Handler(_Handler):
            owner = origin

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.silence_over.set()
        for _, event in (*self.held.values(), *([self.long] if self.long else [])):
            event.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@lru_cache(maxsize=8)  # a request for a large file shall not take as long as hashing it
def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    owner: Origin
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Be silent: `Origin.log` is the log."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        owner, path = self.owner, self.path.lstrip("/")
        wanted = self.headers.get("Range", "")
        owner.log.append((self.command, path, wanted))
        data = owner.manifest() if path == MANIFEST else owner.files.get(path)
        if body and path != MANIFEST and owner.silent.is_set():
            owner.silence_over.wait()
            self.close_connection = True
            return
        if data is None:
            self._head(404, {"Content-Length": "0"})
            return
        tag = etag(data)
        if self.headers.get("If-Match", tag) != tag:
            self._head(412, {"Content-Length": "0"})
            return
        if body and self.owner.faults.get(path):
            self._head(self.owner.faults[path].pop(0), {"Content-Length": "0"})
            return
        if body and wanted and owner.refusal:
            self._head(owner.refusal, {"Content-Length": "0"})
            return
        start, stop, status = 0, len(data), 200
        headers = {"ETag": tag, "Accept-Ranges": "bytes"}
        if owner.ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)):
            start, stop, status = int(match[1]), min(int(match[2]) + 1, len(data)), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._head(status, headers | {"Content-Length": str(stop - start)})
        if body:
            self._send(path, data, start, stop)

    def _send(self, path: str, data: bytes, start: int, stop: int) -> None:
        if stop - start > self.owner.cuts.get(path, len(data)):
            stop = start + self.owner.cuts.pop(path)
            self.close_connection = True
        long = self.owner.long
        if long is not None and stop - start > long[0]:
            long[1].wait()
        try:
            if path in self.owner.held:
                limit, event = self.owner.held[path]
                self.wfile.write(data[start : max(start, min(limit, stop))])
                start = max(start, min(limit, stop))
                if start < stop:
                    event.wait()
            piece = PIECE if self.owner.pause else max(1, stop - start)
            for at in range(start, stop, piece):
                time.sleep(self.owner.pause)
                self.wfile.write(data[at : min(at + piece, stop)])
        except ConnectionError:
            self.close_connection = True  # the reader or the daemon went away

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
