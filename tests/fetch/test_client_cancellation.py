"""A transfer that is cancelled ends at once, and takes nothing with it."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from modelfs.fetch.client import RangeClient
from modelfs.types import Location
from tests.fetch.basket import CONTENT, GOOD, SIZE, SPAN, Basket, run
from tests.fetch.scripted import (
    Server,
    silence,
    then,
)

pytestmark = [pytest.mark.usefixtures("speaker"), pytest.mark.timeout(60)]

NEVER = 3600.0
"""Seconds: no time limit of the client ends a fetch before its test is given up."""


def cancelled(url: str, when: Callable[[], object], basket: Basket, **options: Any) -> None:
    """Cancel a fetch as soon as `when`, called in a thread, returns; it must return, though nothing comes."""

    async def use(client: RangeClient) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.fetch, Location(url), SPAN, SIZE, basket)
                await trio.to_thread.run_sync(when)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        written = len(basket.data)
        again = Basket()
        with Server(GOOD) as healthy:
            await client.fetch(Location(healthy.url), SPAN, SIZE, again)  # the client goes on
        assert again.data == CONTENT[SPAN.start : SPAN.stop]
        assert len(basket.data) == written

    run(use, connect_timeout=NEVER, stall_timeout=NEVER, **options)


def test_cancelling_a_request_whose_answer_does_not_come_returns_at_once() -> None:
    basket = Basket()
    with Server(silence) as server:
        cancelled(server.url, server.arrived.acquire, basket)
    assert basket.span is None


def test_cancelling_a_used_connection_does_not_ask_again() -> None:
    async def use(client: RangeClient) -> None:
        await client.fetch(Location(server.url), SPAN, SIZE, Basket())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.fetch, Location(server.url), SPAN, SIZE, Basket())
            for _ in range(2):
                await trio.to_thread.run_sync(server.arrived.acquire)
            nursery.cancel_scope.cancel()

    with Server(GOOD, silence) as server:
        run(use)
    assert len(server.requests) == 2
    assert server.accepted == 1


def test_cancelling_in_the_middle_of_a_body_returns_at_once(tls: ssl.SSLContext, bundle: str) -> None:
    for context in (None, tls):
        basket = Basket()
        with Server(then(GOOD[:-1], silence), tls=context) as server:
            cancelled(server.url, basket.got.acquire, basket, ca_bundle=bundle)
        assert CONTENT[SPAN.start :].startswith(basket.data)


def test_cancelling_a_handshake_that_is_not_answered_returns_at_once() -> None:
    arrived = threading.Event()

    def listen() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1)
            arrived.set()
            while connection.recv(4096):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        cancelled(f"https://127.0.0.1:{listener.getsockname()[1]}", arrived.wait, Basket())
        thread.join()


def test_cancelling_a_connection_that_is_not_accepted_returns_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        try:
            cancelled(f"http://127.0.0.1:{address[1]}", lambda: _wait_for_syn(address[1], 5), Basket())
        finally:
            for filler in fillers:
                filler.close()


def _wait_for_syn(port: int, count: int) -> None:
    """Wait until `count` connections to `port` were tried, whether they were accepted or not."""
    needle = f"0100007F:{port:04X}"
    while sum(line.split()[2] == needle for line in Path("/proc/net/tcp").read_text().splitlines()) < count:
        pass


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler to make name resolution hang")
def test_cancelling_while_a_name_is_looked_up_returns_at_once(tmp_path: Path) -> None:
    source = tmp_path / "slow.c"
    source.write_text(
        "#include <netdb.h>\n#include <unistd.h>\n"
        "int getaddrinfo(const char *n, const char *s, const struct addrinfo *h, struct addrinfo **r)"
        '{ write(1, "looking up\\n", 11); sleep(30); write(1, "looked up\\n", 10); return EAI_NONAME; }\n'
    )
    library = tmp_path / "slow.so"
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", library, source], check=True)
    script = (
        "import trio\n"
        "from modelfs.fetch.client import RangeClient\n"
        "from modelfs.metrics import Metrics\n"
        "from modelfs.types import Location, Span\n"
        "async def main():\n"
        "    client = RangeClient(metrics=Metrics())\n"
        "    with trio.move_on_after(1) as scope:\n"
        "        await client.fetch(Location('http://models.invalid/x'), Span(0, 1), 1, None)\n"
        "    assert scope.cancelled_caught\n"
        "    client.close()\n"
        "trio.run(main)\n"
        "print('done', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_PRELOAD": str(library)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line == "done\n":
                    break
            assert lines[-1] == "done\n"
            assert set(lines[:-1]) == {"looking up\n"}  # each try begins one; none has come to its end
        finally:
            process.kill()


def test_cancelled_before_it_starts_it_asks_nobody() -> None:
    async def use(client: RangeClient) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.fetch(Location(server.url), SPAN, SIZE, Basket())
        assert scope.cancelled_caught

    with Server(GOOD) as server:
        run(use)
    assert not server.requests


def test_cancelling_waits_for_a_sink_that_is_at_work() -> None:
    at_work, go_on = threading.Event(), threading.Event()
    happened: list[str] = []

    def work() -> None:
        at_work.set()
        go_on.wait(10)
        happened.append("the sink is done")

    async def use(client: RangeClient) -> None:
        async def cancelled_fetch(scope: trio.CancelScope) -> None:
            with scope:
                await client.fetch(Location(server.url), SPAN, SIZE, basket)
            happened.append("fetch returned")

        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelled_fetch, scope)
            await trio.to_thread.run_sync(at_work.wait)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert happened == []
            go_on.set()
        assert happened == ["the sink is done", "fetch returned"]
        assert scope.cancelled_caught

    basket = Basket(on_write=work)
    with Server(then(GOOD[:-1], silence)) as server:
        run(use)
    assert len(happened) == 2
