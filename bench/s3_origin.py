"""An S3 origin for benchmarks: nginx gives the bytes of objects, a small server of this module the listings.

The objects of bucket B are the files of the directory ``ROOT/B``. What asks for the bytes or the head of an
object is nginx's alone (``sendfile``); what asks for a bucket, or for anything an object has besides its
bytes, goes on to :class:`Control`. Signatures are not checked: whoever is on this machine may read.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from bench.origin import await_port, find_nginx, free_ports

FIRST_BYTE = 0.020
"""Seconds to the first byte of the shaped variant."""

RATE = 100e6
"""Bytes per second and connection of the shaped variant."""

_CONF = """\
daemon off;
worker_processes 2;
pid {run}/nginx.pid;
error_log {run}/error.log error;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    default_type binary/octet-stream;
    keepalive_requests 1000000;
    open_file_cache max=1000 inactive=600s;
    client_body_temp_path {run}/body;
    proxy_temp_path {run}/proxy;
    fastcgi_temp_path {run}/fastcgi;
    uwsgi_temp_path {run}/uwsgi;
    scgi_temp_path {run}/scgi;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    upstream control {{ server 127.0.0.1:{control}; keepalive 16; }}
    map $args $beside {{  # a query that is more than a signature asks for something besides the bytes
        "" "";
        "~^(?:(?:X-Amz-[^&=]*|x-id|AWSAccessKeyId|Signature|Expires)=[^&]*(?:&|$))*$" "";
        default yes;
    }}
    server {{
        listen 127.0.0.1:{port};
        root {root};
        error_page 404 = @missing;
        error_page 418 = @control;
        location = /.requests {{ stub_status; }}
        location ~ ^/[^/]*/?$ {{ proxy_pass http://control; }}
        location / {{
            if ($beside) {{ return 418; }}
            add_header x-amz-request-id 0;
            try_files $uri =404;
        }}
        location @control {{ proxy_pass http://control; }}
        location @missing {{
            default_type application/xml;
            return 404 "<Error><Code>NoSuchKey</Code><Message>NoSuchKey</Message></Error>";
        }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Origin:
    """Endpoints without trailing slash: `plain`, and `shaped` like a network."""

    plain: str
    shaped: str

    def requests(self) -> int:
        """Return how many requests nginx has got so far, this one not counted."""
        with urllib.request.urlopen(f"{self.plain}/.requests") as answer:
            return int(answer.read().split()[9]) - 1


@contextlib.contextmanager
def s3_origin(root: Path) -> Iterator[Origin]:
    """Serve the buckets in `root`, which do not change meanwhile, while the context is open.

    Raises:
        RuntimeError: nginx is not installed or does not start.

    """
    nginx = find_nginx()
    with contextlib.ExitStack() as stack:
        run = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modelfs-origin-")))
        run.chmod(0o755)  # the workers are not root
        control = stack.enter_context(_control(root))
        (port,) = free_ports(1)
        conf = run / "nginx.conf"
        conf.write_text(_CONF.format(run=run, root=root, port=port, control=control))
        process = stack.enter_context(_process([nginx, "-p", str(run), "-c", str(conf)]))
        await_port(process, port)
        command = [sys.executable, "-m", "bench.relay", str(port), str(FIRST_BYTE), str(RATE)]
        relay = stack.enter_context(_process(command, stdout=subprocess.PIPE))
        assert relay.stdout is not None
        shaped = int(relay.stdout.readline())
        yield Origin(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{shaped}")


@contextlib.contextmanager
def _process(command: list[str], stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command, out of reach of the terminal's Ctrl-C, and end it with the context."""
    with subprocess.Popen(command, stdout=stdout, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.terminate()


@contextlib.contextmanager
def _control(root: Path) -> Iterator[int]:
    server = Control(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True, slots=True)
class Listed:
    """One object as listings show it; `etag` is the one nginx sends."""

    key: str
    size: int
    modified: float
    etag: str


class Control(ThreadingHTTPServer):
    """Answers ListObjects, ListObjectsV2, GetBucketLocation and HeadBucket; refuses all else as S3 does."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._root = root
        self._listings: dict[str, list[Listed]] = {}
        self._lock = threading.Lock()

    def objects(self, bucket: str) -> list[Listed] | None:
        """Return what the bucket holds, in the order of the keys' UTF-8; None if there is no such bucket."""
        with self._lock:
            if bucket not in self._listings:
                directory = self._root / bucket
                if bucket in ("", ".", "..") or not directory.is_dir():
                    return None
                self._listings[bucket] = sorted(_walk(directory), key=lambda each: each.key.encode())
            return self._listings[bucket]


def _walk(directory: Path) -> Iterator[Listed]:
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            status = path.stat()
            etag = f'"{int(status.st_mtime):x}-{status.st_size:x}"'
            key = path.relative_to(directory).as_posix()
            yield Listed(key, status.st_size, status.st_mtime, etag)


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing; `last` is the key or common prefix after which the next one begins."""

    objects: list[Listed]
    prefixes: list[str]
    last: str | None


def page(objects: list[Listed], prefix: str, delimiter: str, after: str, limit: int) -> Page:
    """Return the first `limit` keys and common prefixes under `prefix` that sort after `after`.

    What shares a common prefix that is `after` or sorts before it was on an earlier page.
    """
    found: list[Listed] = []
    prefixes: list[str] = []
    last = None
    start = max(prefix.encode(), after.encode())
    for index in range(bisect.bisect_left(objects, start, key=lambda each: each.key.encode()), len(objects)):
        each = objects[index]
        if not each.key.startswith(prefix):
            break
        head, cut, _ = each.key[len(prefix) :].partition(delimiter) if delimiter else (each.key, "", "")
        name = prefix + head + cut if cut else each.key
        if name.encode() <= after.encode() or (cut and prefixes and prefixes[-1] == name):
            continue
        if len(found) + len(prefixes) == limit:
            return Page(found, prefixes, last)
        if cut:
            prefixes.append(name)
        else:
            found.append(each)
        last = name
    return Page(found, prefixes, None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Control

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        objects = self.server.objects(bucket)
        if key:  # of objects, all that is supported is nginx's
            self._refuse(501, "NotImplemented")
        elif objects is None:
            self._refuse(404, "NoSuchBucket")
        elif "location" in query:
            self._answer(200, f"<LocationConstraint{_XMLNS}/>")
        elif self.command == "HEAD":
            self._answer(200, "")
        elif query.get("list-type") == "2" or set(query) <= _LISTING:
            self._answer(200, _listing(bucket, objects, query))
        else:
            self._refuse(501, "NotImplemented")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self._refuse(403, "AccessDenied")

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>")

    def _answer(self, status: int, body: str) -> None:
        data = b'<?xml version="1.0" encoding="UTF-8"?>\n' + body.encode() if body else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("x-amz-bucket-region", "us-east-1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: thousands of requests come."""


_XMLNS = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'

_LISTING = {"prefix", "delimiter", "max-keys", "marker", "encoding-type"}
"""Parameters of ListObjects, the first version."""


def _listing(bucket: str, objects: list[Listed], query: dict[str, str]) -> str:
    def text(tag: str, value: object) -> str:
        return f"<{tag}>{escape(str(value))}</{tag}>"

    def name(tag: str, value: str) -> str:
        return text(tag, quote(value, safe="/") if query.get("encoding-type") == "url" else value)

    second = query.get("list-type") == "2"
    if second:
        token = query.get("continuation-token")
        after = base64.b64decode(token).decode() if token else query.get("start-after", "")
    else:
        after = query.get("marker", "")
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    limit = min(1000, int(query.get("max-keys", 1000)))
    found = page(objects, prefix, delimiter, after, limit)
    lines = [f"<ListBucketResult{_XMLNS}>", text("Name", bucket), name("Prefix", prefix)]
    if delimiter:
        lines.append(name("Delimiter", delimiter))
    if "encoding-type" in query:
        lines.append(text("EncodingType", query["encoding-type"]))
    lines += [text("MaxKeys", limit), text("IsTruncated", str(found.last is not None).lower())]
    if second:
        lines.append(text("KeyCount", len(found.objects) + len(found.prefixes)))
        if found.last is not None:
            lines.append(text("NextContinuationToken", base64.b64encode(found.last.encode()).decode()))
    else:
        lines.append(name("Marker", after))
        if found.last is not None:
            lines.append(name("NextMarker", found.last))
    for each in found.objects:
        modified = datetime.fromtimestamp(each.modified, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        lines += [
            "<Contents>",
            name("Key", each.key),
            text("LastModified", modified),
            text("ETag", each.etag),
            text("Size", each.size),
            text("StorageClass", "STANDARD"),
            "</Contents>",
        ]
    for common in found.prefixes:
        lines += ["<CommonPrefixes>", name("Prefix", common), "</CommonPrefixes>"]
    lines.append("</ListBucketResult>")
    return "".join(lines)
