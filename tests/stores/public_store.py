"""Web servers at public and private addresses that redirect to each other; runs in a network of its own.

Prints a line for each redirect: whether it was followed by the range client and by the listing of
``http://``, and whether the server it led to was asked anything.
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import trio

from modelfs.cache import Data, Pipe
from modelfs.errors import BadAnswer
from modelfs.fetch.client import RangeClient
from modelfs.metrics import Metrics
from modelfs.stores.web import Web, tls_context
from modelfs.types import Location, Span

CONTENT = b"content"
PAIRS = [
    ("http://11.0.0.1/", "http://11.0.0.2/"),
    ("http://11.0.0.1/", "http://10.0.0.1/"),
    ("http://11.0.0.1/", "http://localhost/"),
    ("http://11.0.0.1/", "http://[::ffff:127.0.0.1]/"),
    ("http://11.0.0.1/", "http://169.254.169.254/"),
    ("http://10.0.0.1/", "http://11.0.0.2/"),
    ("http://10.0.0.1/", "http://127.0.0.1/"),
    ("http://10.0.0.1/", "http://169.254.169.254/"),
]
asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        asked.append(self.headers["Host"])
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT)


class Sink:
    def begin(self, span: Span) -> None:
        assert span == Span(0, len(CONTENT))

    def write(self, offset: int, data: Data) -> None:
        assert (data.take(len(data)) if isinstance(data, Pipe) else data) == CONTENT


async def by_client(url: str) -> None:
    async with RangeClient(metrics=Metrics()) as client:
        await client.fetch(Location(url), Span(0, len(CONTENT)), len(CONTENT), Sink())


async def by_listing(url: str) -> None:
    async with Web(url, {}, tls=tls_context(None), timeout=10) as web:
        assert (await web.get(url, 100)).body == CONTENT


async def main() -> None:
    for start, target in PAIRS:
        results = []
        asked.clear()
        for way in (by_client, by_listing):
            try:
                await way(f"{start}to/{target}")
                results.append("followed")
            except BadAnswer:
                results.append("refused")
        names = {("followed",) * 2: "followed by both", ("refused",) * 2: "refused by both"}
        outcome = names.get(tuple(results), str(results))
        quiet = ", and nothing was asked of it" if not asked else ""
        print(f"{start}->{target} {outcome}{quiet}")


if __name__ == "__main__":
    server = ThreadingHTTPServer(("0.0.0.0", 80), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trio.run(main)
