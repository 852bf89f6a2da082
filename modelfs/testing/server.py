"""HTTP servers of tests: each in a process of its own, on a port that survives outages.

A server must not live in the process that reads a mounted file: a page fault on a mapped file holds the
interpreter lock until the bytes are there, and a server in the same process would wait for that lock.

``python -m modelfs.testing.server MODULE:FACTORY LOG ARGUMENT…`` is the child. It serves the WSGI application
(PEP 3333) that ``FACTORY(ARGUMENT…)`` returns, obeys ``start`` and ``stop`` on its standard input and ends
when that is closed, so it never outlives its parent.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self
from urllib.parse import unquote

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[Any]]
"""A WSGI application; ``RAW_URI`` of its environment is the target of the request as it was sent."""

HOST = "127.0.0.1"


class Request(NamedTuple):
    """One request as a server saw it.

    Attributes:
        method: of HTTP.
        path: as sent, percent-encoded, without the query.
        query: names in the query, without their values: those of signed URLs are secrets.
        range: the ``Range`` header, or "".

    """

    method: str
    path: str
    query: tuple[str, ...]
    range: str


class Server:
    """A server process; also a context manager that starts and ends it.

    Args:
        factory: ``module:function`` that makes the application, called in the child.
        arguments: of the factory.

    """

    def __init__(self, factory: str, *arguments: str) -> None:
        self._factory = factory
        self._arguments = arguments
        self._directory = Path(tempfile.mkdtemp(prefix="modelfs-server-"))
        self._log = self._directory / "requests"
        self._log.touch()
        self._child: subprocess.Popen[str] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """``http://127.0.0.1:PORT``; the same from the first `start` on."""
        return f"http://{HOST}:{self.port}"

    @property
    def requests(self) -> list[Request]:
        """Every request so far in the order of arrival, failed ones too."""
        rows = (line.split("\t") for line in self._log.read_text().splitlines())
        return [Request(method, path, tuple(query.split()), span) for method, path, query, span in rows]

    def start(self) -> Self:
        """Accept connections; returns when it does. Does nothing to a server that runs."""
        if self._child is None:
            command = [sys.executable, "-m", "modelfs.testing.server", self._factory, str(self._log)]
            self._child = subprocess.Popen(  # noqa: S603  # our own interpreter and module
                [*command, *self._arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        self.port = int(self._tell("start"))
        return self

    def stop(self) -> None:
        """Have an outage: cut every connection and refuse new ones; state and port are kept."""
        self._tell("stop")

    def close(self) -> None:
        """End the process and forget its state; the object is of no more use."""
        if self._child is not None:
            self._child.communicate()
            self._child = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def _tell(self, command: str) -> str:
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            raise RuntimeError("the server was not started")
        child.stdin.write(f"{command}\n")
        child.stdin.flush()
        answer = child.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"the server {self._factory} ended with status {child.wait()}: see its output")
        return answer

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Listener(ThreadingHTTPServer):
    """One period of accepting connections on loopback; `cut` ends it and everything it accepted.

    Args:
        port: to listen on; 0 for a free one.
        handler: what answers, in a thread per connection.

    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, handler: type[Handler]) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__((HOST, port), handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def cut(self) -> None:
        """Accept no more, and shut down every connection; their threads end by themselves."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its handler closed it meanwhile

    def server_bind(self) -> None:
        """Bind the port."""
        # HTTPServer's own asks the resolver for the host's name, which can take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Show what went wrong in a handler."""
        if not isinstance(sys.exception(), ConnectionError):  # a client that went away is none
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler, ABC):
    """HTTP/1.1 with connections that are kept alive; a subclass answers each request in `serve`."""

    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        """Begin with a connection."""
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        """End with a connection."""
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Be silent: `Server.requests` is the log."""

    def handle_expect_100(self) -> bool:
        """Let a client that asks first send its body."""
        going_on = super().handle_expect_100()
        self.wfile.flush()  # the client waits for it
        return going_on

    @abstractmethod
    def serve(self) -> None:
        """Read the body with `body`, answer the request."""

    def _serve(self) -> None:
        self.serve()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815  # named by http.server

    def body(self) -> IO[bytes]:
        """Return the whole body, read ahead so that the connection is at the next request."""
        body = tempfile.SpooledTemporaryFile(1 << 20)  # noqa: SIM115  # our caller closes it
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body.write(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                continue  # trailers
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left and (piece := self.rfile.read(min(left, 1 << 20))):
                body.write(piece)
                left -= len(piece)
        size = body.tell()
        body.seek(0)
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
        self.headers["Content-Length"] = str(size)
        return body


class _Listener(Listener):
    """Serves a WSGI application, and writes a line per request into the file descriptor `log`."""

    def __init__(self, port: int, application: Application, log: int) -> None:
        self.application = application
        self.log = log
        super().__init__(port, _Wsgi)


class _Wsgi(Handler):
    """Around a WSGI application."""

    server: _Listener

    def serve(self) -> None:
        path, _, query = self.path.partition("?")
        names = " ".join(pair.partition("=")[0] for pair in query.split("&"))
        span = self.headers.get("Range", "")
        os.write(self.server.log, f"{self.command}\t{path}\t{names}\t{span}\n".encode())
        with self.body() as body:
            status, headers, content = self._answer(path, query, body)
            try:
                self.send_response_only(*status)
                for name, value in headers:
                    self.send_header(name, value)
                if not any(name.lower() == "content-length" for name, _ in headers):
                    content = [b"".join(content)]
                    self.send_header("Content-Length", str(len(content[0])))
                self.end_headers()
                if self.command != "HEAD":
                    for piece in content:
                        self.wfile.write(piece)
            finally:
                getattr(content, "close", lambda: None)()

    def _answer(
        self, path: str, query: str, body: IO[bytes]
    ) -> tuple[tuple[int, str], list[tuple[str, str]], Iterable[bytes]]:
        environ = {
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": body,
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "REQUEST_METHOD": self.command,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote(path, "latin-1"),
            "QUERY_STRING": query,
            "RAW_URI": self.path,
            "REMOTE_ADDR": self.client_address[0],
            "SERVER_NAME": HOST,
            "SERVER_PORT": str(self.server.server_address[1]),
            "SERVER_PROTOCOL": self.protocol_version,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
        }
        for name, value in self.headers.items():
            key = name.upper().replace("-", "_")
            environ[key if key == "CONTENT_LENGTH" else f"HTTP_{key}"] = value
        started: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
            started.append((status, headers))

        try:
            content = self.server.application(environ, start_response)
            status, headers = started[-1]
        except Exception:  # any fault of an application is a 500, and its developer wants to see it
            traceback.print_exc()
            return (500, "Internal Server Error"), [], []
        code, _, reason = status.partition(" ")
        return (int(code), reason), headers, content


def main(factory: str, log: str, *arguments: str) -> None:
    """Be the child: serve until standard input ends."""
    module, _, name = factory.partition(":")
    application: Application = getattr(importlib.import_module(module), name)(*arguments)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    # Bound but never listening, this socket keeps the port ours during an outage.
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((HOST, 0))
    port = reserved.getsockname()[1]
    listener: _Listener | None = None
    for command in sys.stdin:
        if command == "start\n" and listener is None:
            listener = _Listener(port, application, descriptor)
        elif command == "stop\n" and listener is not None:
            listener.cut()
            listener = None
        print(port, flush=True)
    if listener is not None:
        listener.cut()


if __name__ == "__main__":
    main(*sys.argv[1:])
