"""Web servers of the tests on loopback: one whose answers a test writes, Python's own, and nginx."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Reply:
    """What a server answers; a Content-Length is added if `sized`."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    sized: bool = True


Answers = Callable[[Request], Reply]


def file_reply(data: bytes, request: Request, **headers: str) -> Reply:
    """Answer like a good server: strong ETag, If-Match, one range."""
    etag = f'"{hashlib.md5(data).hexdigest()}"'
    headers = {"ETag": etag, "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", **headers}
    if request.headers.get("if-match", headers["ETag"]) != headers["ETag"]:
        return Reply(412)
    span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    if not span:
        return Reply(200, headers, data)
    start, stop = int(span[1]), min(int(span[2]) + 1, len(data))
    if start >= stop:
        return Reply(416, {"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop])


class Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close then waits for the connections' threads
    request_queue_size = 128  # with the default of 5, connections made at once wait a second for each other


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    server = Server((HOST, 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def scripted(answers: Answers) -> Iterator[tuple[str, list[Request]]]:
    """Serve `answers`; yield the URL of the root and the requests so far."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            request = Request(self.command, self.path, headers, body)
            requests.append(request)
            reply = answers(request)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.sized:
                self.send_header("Content-Length", str(len(reply.body)))
            else:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

        do_HEAD = do_POST = do_GET  # noqa: N815  # the names are http.server's

        def log_message(self, *arguments: object) -> None:
            pass

    with serving(Handler) as url:
        yield url, requests


@contextmanager
def python_server(root: Path) -> Iterator[str]:
    """Serve `root` with ``python -m http.server``: no ETags, no ranges, an index of everything."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with serving(functools.partial(Handler, directory=str(root))) as url:
        yield url


@contextmanager
def nginx(root: Path, directory: Path) -> Iterator[str]:
    """Serve `root` with nginx, which keeps its files in `directory`."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
        config = directory / "nginx.conf"
        temporary = "".join(
            f"{kind}_temp_path {directory};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;" if os.geteuid() == 0 else ""
        config.write_text(
            f"daemon off; worker_processes 1; {user} pid {directory}/pid; error_log {directory}/error.log;"
            "events {} http { access_log off; autoindex on; charset utf-8;"
            f"{temporary} server {{ listen {HOST}:{port}; root '{root}'; }} }}"
        )
        # nginx takes over sockets that NGINX names, as it does when it is upgraded: no port is ever guessed.
        command = [program, "-e", f"{directory}/error.log", "-c", str(config)]
        fd = listener.fileno()
        with subprocess.Popen(command, pass_fds=[fd], env={"NGINX": f"{fd};"}) as child:
            try:
                yield f"http://{HOST}:{port}/"
            finally:
                child.terminate()
