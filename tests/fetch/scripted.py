"""A loopback HTTP server that does what the script of a test says, also what no server should."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Request:
    """A request as it arrived; header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]


Step = bytes | Callable[[socket.socket, Request], None]
"""What is done with one request: bytes to send, or a function that has the connection for itself.

The connection is kept open afterwards, unless the function closed it.
"""


class Server:
    """Plays `script`, one step for each request in the order of arrival; the last step is repeated."""

    def __init__(self, *script: Step, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.accepted = 0
        self.arrived = threading.Semaphore(0)  # released once for each request
        self._script = script
        self._tls = tls
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._connections.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self._tls:
                with self._tls.wrap_socket(connection, server_side=True) as wrapped:
                    self._converse(wrapped)
            else:
                self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        while connection.fileno() >= 0 and (request := _read_request(connection)):
            with self._lock:
                step = self._script[min(len(self.requests), len(self._script) - 1)]
                self.requests.append(request)
            self.arrived.release()
            if callable(step):
                step(connection, request)
            else:
                connection.sendall(step)


def _read_request(connection: socket.socket) -> Request | None:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            return None
        head += byte
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, _ = first.split(" ")
    headers = dict(line.split(":", 1) for line in lines)
    return Request(method, target, {name.lower(): value.strip() for name, value in headers.items()})


def answer(status: int, body: bytes = b"", **headers: str | None) -> bytes:
    """Return an answer; header names are written with underscores, None leaves one out."""
    fields: dict[str, str | None] = {"content_length": str(len(body)), **headers}
    lines = [
        f"{name.replace('_', '-').title()}: {value}" for name, value in fields.items() if value is not None
    ]
    return "\r\n".join([f"HTTP/1.1 {status} Whatever", *lines, "", ""]).encode("latin-1") + body


def part(content: bytes, start: int, stop: int, **headers: str | None) -> bytes:
    """Return the right answer to a request for the range `[start, stop)` of `content`."""
    fields = {"content_range": f"bytes {start}-{stop - 1}/{len(content)}"} | headers
    return answer(206, content[start:stop], **fields)


def silence(connection: socket.socket, request: Request) -> None:
    """Say nothing until the client hangs up."""
    connection.recv(1)


def reset(connection: socket.socket, request: Request) -> None:
    """Break the connection with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def then(*steps: Step) -> Step:
    """Return the step that does all of `steps`."""

    def run(connection: socket.socket, request: Request) -> None:
        for step in steps:
            if callable(step):
                step(connection, request)
            else:
                connection.sendall(step)

    return run


def close(connection: socket.socket, request: Request) -> None:
    """Close the connection in an orderly way."""
    connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def tunnel(connection: socket.socket, request: Request) -> None:
    """Be a proxy: do what CONNECT asks for."""
    host, _, port = request.target.partition(":")
    with socket.create_connection((host, int(port))) as upstream:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\nX-Proxy: yes\r\n\r\n")
        peers = {connection: upstream, upstream: connection}
        while True:
            for source in select.select(list(peers), [], [])[0]:
                data = source.recv(65536)
                if not data:
                    return
                peers[source].sendall(data)
