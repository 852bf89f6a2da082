"""An origin that fails at random: ``python -m chaos.origin DIRECTORY SEED`` serves files, with a manifest.

It prints its port, and then answers each line of its standard input with one line: ``faults RATE`` makes that
share of the requests fail from now on, ``count`` tells what happened so far as JSON. It ends with its input.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MANIFEST = "modelfs-manifest.json"


class Origin(ThreadingHTTPServer):
    """Serves the files of one directory, which do not change.

    Args:
        directory: of the files.
        seed: of the faults.

    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.name: path for path in directory.iterdir()}
        self.tags = {name: f'"{_sha256(path)}"' for name, path in self.files.items()}
        rows = [
            {"path": name, "size": path.stat().st_size, "etag": self.tags[name]}
            for name, path in self.files.items()
        ]
        self.manifest = json.dumps({"version": 1, "files": rows}).encode()
        self.rate = 0.0
        self.requests = 0
        self.sent = 0
        self.faults = dict.fromkeys(FAULTS, 0)
        self._chance = random.Random(seed)
        self._lock = threading.Lock()

    def fault(self) -> str | None:
        """Count a request; return the name of the fault that it gets, or None."""
        with self._lock:
            self.requests += 1
            if self._chance.random() >= self.rate:
                return None
            name = self._chance.choice(list(FAULTS))
            self.faults[name] += 1
            return name

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, but for clients that went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Origin
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        fault = self.server.fault()
        if fault is not None:
            FAULTS[fault](self)
            return
        self._answer(whole=True)

    def do_HEAD(self) -> None:
        self._answer(whole=True)

    def _answer(self, *, whole: bool) -> None:
        """Answer; without `whole` only the first half of what was announced."""
        name = unquote(self.path.lstrip("/"))
        if name == MANIFEST:
            self._head(200, len(self.server.manifest))
            if self.command == "GET":
                self.wfile.write(self.server.manifest)
            return
        path = self.server.files.get(name)
        tag = self.server.tags.get(name, "")
        if path is None or self.headers.get("If-Match", tag) != tag:
            self._head(404 if path is None else 412, 0)
            return
        size = path.stat().st_size
        start, stop, status, more = 0, size, 200, {"ETag": tag, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, stop, status = int(match[1]), min(int(match[2]) + 1, size), 206
            more["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._head(status, stop - start, more)
        if self.command == "GET":
            self._send(path, start, stop if whole else (start + stop) // 2)

    def _head(self, status: int, length: int, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **(more or {})}.items():
            self.send_header(key, value)
        self.end_headers()

    def _send(self, path: Path, start: int, stop: int) -> None:
        with path.open("rb") as file:
            while start < stop:
                done = os.sendfile(self.connection.fileno(), file.fileno(), start, min(stop - start, 1 << 20))
                start += done
                self.server.sent += done

    # -- faults

    def unavailable(self) -> None:
        """Answer 503."""
        self._head(503, 0)

    def cut(self) -> None:
        """Close the connection in the middle of the answer."""
        self._answer(whole=False)
        self.close_connection = True

    def reset(self) -> None:
        """Reset the connection in the middle of the answer."""
        self._answer(whole=False)
        self.close_connection = True
        # Closed while it lingers for no time: TCP sends RST instead of FIN (socket(7)).
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


FAULTS = {"503": _Handler.unavailable, "cut": _Handler.cut, "reset": _Handler.reset}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(directory: str, seed: str) -> None:
    """Serve until standard input ends."""
    with Origin(Path(directory), int(seed)) as origin:
        serving = threading.Thread(target=origin.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        print(origin.server_port, flush=True)
        for line in sys.stdin:
            if line.startswith("faults "):
                origin.rate = float(line.split()[1])
            print(
                json.dumps({"requests": origin.requests, "bytes": origin.sent, "faults": origin.faults}),
                flush=True,
            )
        origin.shutdown()
        serving.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
