"""What the control API promises, on real Unix sockets with a daemon that only answers."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import trio
import trio.testing
from prometheus_client import CONTENT_TYPE_LATEST

from modelfs import control
from modelfs.control import app
from modelfs.control.app import Tell, Work
from modelfs.control.runtime import Record, listening, write_record
from modelfs.errors import CacheError, Corrupt, ModelfsError, MountError, NotFound
from modelfs.metrics import Metrics
from tests.status_document import document

T = TypeVar("T")


class FakeDaemon:
    """A daemon that remembers what it was asked for."""

    def __init__(self, mountpoint: str = "/models") -> None:
        self.metrics = Metrics()
        self.asked: list[str | None] = []
        self.stopped = trio.Event()
        self.failure: Exception | None = None
        self.broken: Exception | None = None
        self.why: str | None = None
        self.go_on = trio.Event()
        self.flood = False
        self.broken_off = threading.Event()
        self.document = document(mountpoint=mountpoint, pid=os.getpid())

    def record(self) -> control.Record:
        return control.Record(
            Path(self.document["mountpoint"]),
            self.document["pid"],
            self.document["started"],
            self.document["modelfs"],
        )

    async def status(self) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return self.document

    async def unready(self) -> str | None:
        await trio.lowlevel.checkpoint()
        return self.why

    async def refresh(self, model: str | None) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self.asked.append(model)
        return {"models": self.document["models"]}

    def verification(self, model: str | None) -> Work:
        if self.failure is not None:
            raise self.failure

        async def work(tell: Tell) -> dict[str, Any]:
            await tell({"name": "m/file", "done": 1, "total": 2})
            while self.flood:
                await tell({"name": "m/file" * 1000, "done": 1, "total": 2})
            try:
                await self.go_on.wait()
            except trio.Cancelled:
                self.broken_off.set()
                raise
            if self.broken is not None:
                raise self.broken
            return {"objects": 1, "bytes": 2, "bad": [], "model": model}

        return work

    def prefetching(self, model: str, globs: Sequence[str], *, wait: bool) -> Work:
        async def work(tell: Tell) -> dict[str, Any]:
            await tell({"name": f"{model}/file", "done": 1, "total": 2})
            return {"asked": [model, list(globs), wait]}

        return work

    async def pin(self, model: str) -> dict[str, Any]:
        return {"asked": ["pin", model]}

    async def unpin(self, model: str) -> dict[str, Any]:
        return {"asked": ["unpin", model]}

    async def evict(self, model: str, globs: Sequence[str]) -> dict[str, Any]:
        return {"asked": ["evict", model, list(globs)]}

    async def collect(self, older_than: float, *, dry_run: bool) -> dict[str, Any]:
        return {"asked": ["gc", older_than, dry_run]}

    def stop(self) -> None:
        self.stopped.set()


async def serve(
    daemon: FakeDaemon, path: Path, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Be found, and serve, as a daemon does."""
    with control.announced(path, daemon.record()) as listener:
        await app.serve(daemon, listener, task_status=task_status)


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    monkeypatch.setenv("MODELFS_RUNTIME_DIR", str(path))
    return path


def serving(talk: Callable[[Path], T], daemon: FakeDaemon | None = None) -> T:
    """Return what `talk` says in a thread while the control API of `daemon` is served."""
    own = daemon or FakeDaemon()

    async def main() -> T:
        path = control.socket_path(own.record().mountpoint)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, own, path)
            with trio.fail_after(20):
                answer = await trio.to_thread.run_sync(talk, path, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()
        return answer

    return trio.run(main)


def http(path: Path, method: str, url: str, **more: Any) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
        return client.request(method, url, **more)


# -- the routes


def test_the_status_is_the_daemons_document() -> None:
    assert serving(lambda path: control.ControlClient(path).status()) == FakeDaemon().document


def test_a_refresh_names_one_model_or_all() -> None:
    daemon = FakeDaemon()

    def talk(path: Path) -> dict[str, Any]:
        client = control.ControlClient(path)
        client.refresh("finbert")
        http(path, "POST", "/v1/refresh")
        return client.refresh()

    assert serving(talk, daemon) == {"models": document()["models"]}
    assert daemon.asked == ["finbert", None, None]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"modle": "x"}', b'{"model": 5}', b"\xff"])
def test_a_refresh_that_is_not_understood_is_refused(body: bytes) -> None:
    daemon = FakeDaemon()
    response = serving(lambda path: http(path, "POST", "/v1/refresh", content=body), daemon)
    assert response.status_code == 400
    assert response.json()["kind"] == "ConfigError"
    assert daemon.asked == []


def test_what_is_cached_can_be_steered() -> None:
    lines: list[dict[str, Any]] = []

    def talk(path: Path) -> list[dict[str, Any]]:
        client = control.ControlClient(path)
        return [
            client.prefetch("m", ["*.json"], lines.append, wait=True),
            client.pin("m"),
            client.unpin("m"),
            client.evict("m", ["onnx/"]),
            client.collect(60.0, dry_run=True),
        ]

    assert [answer["asked"] for answer in serving(talk)] == [
        ["m", ["*.json"], True],
        ["pin", "m"],
        ["unpin", "m"],
        ["evict", "m", ["onnx/"]],
        ["gc", 60.0, True],
    ]
    assert lines == [{"name": "m/file", "done": 1, "total": 2}]


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("pin", {}),
        ("evict", {"model": "m", "paths": "x"}),
        ("evict", {"model": "m", "path": ["x"]}),
        ("gc", {}),
        ("gc", {"older_than": -1}),
        ("gc", {"older_than": True}),
        ("gc", {"older_than": float("inf")}),
        ("gc", {"older_than": 1, "dry_run": 1}),
        ("prefetch", {"model": "m", "wait": "yes"}),
    ],
)
def test_what_is_not_understood_changes_nothing(call: str, body: dict[str, Any]) -> None:
    text = json.dumps(body)  # httpx would refuse to write Infinity
    response = serving(lambda path: http(path, "POST", f"/v1/{call}", content=text))
    assert response.status_code == 400
    assert response.json()["kind"] == "ConfigError"


@pytest.mark.parametrize(
    ("failure", "code"), [(NotFound("no model\nx"), 404), (Corrupt("x"), 502), (ModelfsError("x"), 502)]
)
def test_errors_of_the_daemon_are_one_line_with_their_kind(failure: ModelfsError, code: int) -> None:
    daemon = FakeDaemon()
    daemon.failure = failure
    response = serving(lambda path: http(path, "POST", "/v1/refresh"), daemon)
    assert response.status_code == code
    assert response.json() == {"error": str(failure), "kind": type(failure).__name__}

    def talk(path: Path) -> None:
        with pytest.raises(type(failure), match=r"^(no model )?x$"):
            control.ControlClient(path).refresh()

    serving(talk, daemon)


def test_a_bug_of_the_daemon_is_logged_and_neither_shown_nor_fatal(caplog: pytest.LogCaptureFixture) -> None:
    daemon = FakeDaemon()
    daemon.failure = RuntimeError("hush")

    def talk(path: Path) -> tuple[httpx.Response, httpx.Response]:
        return http(path, "POST", "/v1/refresh"), http(path, "GET", "/healthz")

    with pytest.raises(ModelfsError, match=r"^internal error: see the daemon's log$"):
        raise control.error_of(serving(talk, daemon)[0].json())
    bug, health = serving(talk, daemon)
    assert bug.status_code == 500
    assert "hush" not in bug.text
    assert "hush" in caplog.text
    assert (health.status_code, health.text) == (200, "ok\n")


def test_a_shutdown_is_answered_before_the_daemon_stops() -> None:
    daemon = FakeDaemon()

    async def main() -> None:
        path = control.socket_path(Path("/models"))
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, daemon, path)
            with trio.fail_after(20):
                await trio.to_thread.run_sync(control.ControlClient(path).stop)
                await daemon.stopped.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize(
    "ask", [b"POST /v1/verify", b"GET /v1/status", b""], ids=["flood", "keep", "connect"]
)
def test_a_connection_that_is_left_open_keeps_no_daemon_alive(ask: bytes) -> None:
    daemon = FakeDaemon()
    daemon.flood = True

    async def main() -> None:
        path = control.socket_path(Path("/models"))
        with socket.socket(socket.AF_UNIX) as client:
            late = threading.Timer(20, client.shutdown, [socket.SHUT_RDWR])
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, daemon, path)
                client.connect(str(path))
                if ask:
                    client.send(ask + b" HTTP/1.1\r\nHost: x\r\ncontent-length: 0\r\n\r\n")
                    await trio.lowlevel.wait_readable(client)
                await trio.testing.wait_all_tasks_blocked(0.1)  # what is sent fills all buffers
                late.start()
                nursery.cancel_scope.cancel()
            assert late.is_alive()
            late.cancel()

    trio.run(main)


def test_metrics_are_prometheus_text() -> None:
    daemon = FakeDaemon()
    daemon.metrics.read_bytes.inc(7)
    response = serving(lambda path: http(path, "GET", "/metrics"), daemon)
    assert response.headers["content-type"] == CONTENT_TYPE_LATEST
    assert "modelfs_read_bytes_total 7.0\n" in response.text


@pytest.mark.parametrize(("method", "path", "code"), [("GET", "/v1/shutdown", 405), ("GET", "/nothing", 404)])
def test_what_is_not_there_is_not_there(method: str, path: str, code: int) -> None:
    daemon = FakeDaemon()
    assert serving(lambda sock: http(sock, method, path), daemon).status_code == code
    assert not daemon.stopped.is_set()


def test_nothing_is_logged_in_ordinary_life(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    serving(lambda path: control.ControlClient(path).status())
    assert [record for record in caplog.records if record.name.startswith(("modelfs", "hypercorn"))] == []
    assert capfd.readouterr() == ("", "")


def test_readiness_says_why_not() -> None:
    daemon = FakeDaemon()
    ready = serving(lambda path: http(path, "GET", "/readyz"), daemon)
    daemon.why = "/models does not answer within 5 s"
    unready = serving(lambda path: http(path, "GET", "/readyz"), daemon)
    assert (ready.status_code, ready.text) == (200, "ok\n")
    assert (unready.status_code, unready.text) == (503, "/models does not answer within 5 s\n")


def test_the_openapi_document_names_every_request_and_what_it_takes() -> None:
    document = serving(lambda path: http(path, "GET", "/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    page = (Path(__file__).parent.parent / "docs" / "status.md").read_text()
    assert described == set(re.findall(r"^\| `(GET|POST) (/\S+?)`", page, re.MULTILINE))
    refresh = document["paths"]["/v1/refresh"]["post"]
    schema = refresh["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"] == {"model": {"type": "string"}}


# -- TCP


def over_tcp(daemon: FakeDaemon, address: str, talk: Callable[[str], T]) -> T:
    """Return what `talk` says, in a thread, to the TCP address of the control API of `daemon`."""
    web = control.web_listener(address)
    port = web.getsockname()[1]

    async def main() -> T:
        path = control.socket_path(daemon.record().mountpoint)
        with control.announced(path, daemon.record()) as listener:
            async with trio.open_nursery() as nursery:
                await nursery.start(app.serve, daemon, listener, web)
                assert await trio.to_thread.run_sync(control.ControlClient(path).status) == daemon.document
                with trio.fail_after(20):
                    answer = await trio.to_thread.run_sync(talk, f"http://{address[:-1]}{port}")
                nursery.cancel_scope.cancel()
        return answer

    return trio.run(main)


def test_tcp_serves_what_only_reads_and_nothing_else() -> None:
    daemon = FakeDaemon()

    def talk(url: str) -> dict[tuple[str, str], int]:
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get("/v1/status").json() == daemon.document
            document = client.get("/openapi.json").json()
            assert {method for item in document["paths"].values() for method in item} == {"get"}
            actions = (
                "/v1/refresh",
                "/v1/verify",
                "/v1/evict",
                "/v1/gc",
                "/v1/pin",
                "/v1/prefetch",
                "/v1/shutdown",
                "/v1/handover",
                "/v1/status",
                "/metrics",
            )
            codes = {("POST", path): client.post(path).status_code for path in actions}
            reads = ("/healthz", "/readyz", "/metrics")
            return codes | {("GET", path): client.get(path).status_code for path in reads}

    codes = over_tcp(daemon, "127.0.0.1:0", talk)
    assert {call: code for call, code in codes.items() if code < 400} == {
        ("GET", "/healthz"): 200,
        ("GET", "/readyz"): 200,
        ("GET", "/metrics"): 200,
    }
    assert daemon.asked == []
    assert not daemon.stopped.is_set()


def test_an_address_that_is_taken_is_told() -> None:
    with control.web_listener("127.0.0.1:0") as first:
        address = f"127.0.0.1:{first.getsockname()[1]}"
        with pytest.raises(
            MountError, match=rf"^http: cannot listen on {address}: .*choose another address$"
        ):
            control.web_listener(address)


# -- the socket


def test_only_the_user_can_open_the_socket(runtime: Path) -> None:
    old = os.umask(0)
    try:
        mode = serving(lambda path: (path.stat().st_mode, path.parent.stat().st_mode))
    finally:
        os.umask(old)
    assert (stat.S_ISSOCK(mode[0]), stat.S_IMODE(mode[0]), stat.S_IMODE(mode[1])) == (True, 0o600, 0o700)


def test_socket_and_record_are_removed_at_the_end(runtime: Path) -> None:
    assert len(serving(lambda path: list(runtime.iterdir()))) == 2
    assert list(runtime.iterdir()) == []


def test_the_socket_of_a_daemon_that_was_detached_is_taken_over() -> None:
    old, new = FakeDaemon(), FakeDaemon()
    new.document["pid"] = 5

    async def succession() -> dict[str, Any]:
        path = control.socket_path(Path("/models"))
        async with trio.open_nursery() as outer:
            async with trio.open_nursery() as inner:
                await inner.start(serve, old, path)
                await outer.start(serve, new, path)
                inner.cancel_scope.cancel()
            # The old one has ended, and left what is not its own.
            with trio.fail_after(20):
                status = await trio.to_thread.run_sync(control.ControlClient(path).status)
            outer.cancel_scope.cancel()
        return status

    assert trio.run(succession)["pid"] == 5
    assert control.mounts() == []


def test_the_socket_of_a_dead_daemon_is_taken_over() -> None:
    path = control.socket_path(Path("/models"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    assert serving(lambda path: control.ControlClient(path).status())["version"] == 1


def test_who_looks_for_dead_daemons_leaves_the_socket_of_a_successor_alone() -> None:
    path, rounds, begin = control.socket_path(Path("/models")), 200, threading.Barrier(2)

    def look() -> None:
        for _ in range(rounds):
            begin.wait()
            for _ in range(5):
                control.mounts()

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    for pid in range(rounds):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        write_record(path, Record(Path("/models"), pid, 0.0, "1"))
        begin.wait(10)
        with listening(path):
            write_record(path, Record(Path("/models"), pid, 0.0, "1"))
            assert control.find(Path("/models")) is not None, f"the socket of daemon {pid} was taken away"
    looker.join()


def test_cancelling_ends_the_server_while_somebody_is_connected() -> None:
    async def main() -> None:
        path = control.socket_path(Path("/models"))
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, FakeDaemon(), path)
                stream = await trio.open_unix_socket(path)
                await stream.send_all(b"GET /v1/status HTTP/1.1\r\n")
                nursery.cancel_scope.cancel()
        await stream.aclose()
        assert not path.exists()

    trio.run(main)


# -- what takes long


def test_progress_is_told_while_the_cache_is_verified() -> None:
    daemon, told = FakeDaemon(), []

    def talk(path: Path) -> dict[str, Any]:
        def progress(line: dict[str, Any]) -> None:
            told.append(line)
            trio.from_thread.run_sync(daemon.go_on.set)

        return control.ControlClient(path).verify("m", progress)

    assert serving(talk, daemon) == {"objects": 1, "bytes": 2, "bad": [], "model": "m"}
    assert told == [{"name": "m/file", "done": 1, "total": 2}]


def test_what_keeps_a_verification_from_its_end_is_told() -> None:
    daemon = FakeDaemon()
    daemon.broken = CacheError("the disk is gone: check it")

    def talk(path: Path) -> None:
        trio.from_thread.run_sync(daemon.go_on.set)
        client = control.ControlClient(path)
        with pytest.raises(CacheError, match="the disk is gone: check it"):
            client.verify(None, lambda line: None)
        daemon.failure = NotFound("no model 'm'")
        with pytest.raises(NotFound, match="no model 'm'"):
            client.verify("m", lambda line: None)

    serving(talk, daemon)


def test_a_verification_ends_when_nobody_listens_any_more() -> None:
    daemon = FakeDaemon()

    def talk(path: Path) -> bool:
        def give_up(line: dict[str, Any]) -> None:
            raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            control.ControlClient(path).verify(None, give_up)
        return daemon.broken_off.wait(20)

    assert serving(talk, daemon)


# -- who is alive


def test_living_daemons_are_found_by_their_mountpoint() -> None:
    def talk(path: Path) -> None:
        record = control.Record(Path("/models"), os.getpid(), document()["started"], "0.1.0")
        assert control.mounts() == [record]
        assert control.find(Path("/models")) == record
        assert control.find(Path("/other")) is None

    serving(talk)
    assert control.mounts() == []


def test_what_a_killed_daemon_left_is_skipped_and_removed(runtime: Path) -> None:
    code = """if True:
        import sys, trio
        from pathlib import Path
        from modelfs import control
        from tests.test_control import FakeDaemon, serve

        async def main():
            path = control.socket_path(Path("/killed"))
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, FakeDaemon("/killed"), path)
                print("ready", flush=True)

        trio.run(main)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        found = control.mounts()
        process.kill()
    assert [(record.mountpoint, record.pid) for record in found] == [(Path("/killed"), process.pid)]
    assert len(list(runtime.iterdir())) == 2
    assert control.mounts() == []
    assert list(runtime.iterdir()) == []


def test_every_mountpoint_has_a_socket_of_its_own() -> None:
    names = {control.socket_path(Path(place)) for place in ("/a", "/b", "/a/b", "/" + "x" * 4000)}
    assert len(names) == 4
    assert control.socket_path(Path("/a")) in names


def test_where_the_sockets_of_a_user_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid() or 1000
    monkeypatch.setattr(os, "geteuid", lambda: user)
    for name in ("own", "modelfs"):
        (tmp_path / name).mkdir(mode=0o700)
        os.chown(tmp_path / name, user, -1)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("MODELFS_RUNTIME_DIR", str(tmp_path / "own"))
    assert control.runtime_dir() == tmp_path / "own"
    monkeypatch.setenv("MODELFS_RUNTIME_DIR", "")
    assert control.runtime_dir() == tmp_path / "modelfs"


def test_a_directory_that_others_can_write_to_is_refused(runtime: Path) -> None:
    runtime.mkdir()
    runtime.chmod(0o777)
    with pytest.raises(MountError, match="only you can write to"):
        control.runtime_dir()
    runtime.rmdir()
    runtime.symlink_to("/tmp")
    with pytest.raises(MountError, match="only you can write to"):
        control.runtime_dir()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELFS_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(MountError, match="too long for a socket: name a shorter"):
        control.socket_path(Path("/models"))


# -- the client


def test_no_daemon_is_a_clear_error() -> None:
    with pytest.raises(MountError, match=r"^no daemon listens on .*: is it mounted\? see modelfs status$"):
        control.ControlClient(control.socket_path(Path("/models"))).status()


@contextmanager
def answering(raw: bytes | None) -> Iterator[Path]:
    """Listen like a daemon that answers each request with `raw` and hangs up, or never does either."""
    path = control.socket_path(Path("/models"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connected = []
            with suppress(OSError):  # closed in the end
                while True:
                    connected.append(listener.accept()[0])
                    if connected[-1].recv(65536) and raw is not None:
                        connected[-1].sendall(raw)
                        connected[-1].shutdown(socket.SHUT_RDWR)
            for connection in connected:
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "gave no valid answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{{{", "gave no valid answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", "gave no valid answer"),
        (b"SSH-2.0\r\n\r\n", "gave no valid answer"),
        (None, "did not answer within 0.2 s"),
    ],
)
def test_an_answer_that_is_none_is_a_clear_error(raw: bytes | None, message: str) -> None:
    with answering(raw) as path, pytest.raises(MountError, match=message):
        control.ControlClient(path).status(seconds=0.2)


def test_the_record_is_json_with_the_documented_members(runtime: Path) -> None:
    record = serving(lambda path: json.loads(path.with_suffix(".json").read_text()))
    assert record == {
        "mountpoint": "/models",
        "pid": os.getpid(),
        "started": 1_700_000_000.0,
        "version": "0.1.0",
    }


def members(value: Any, name: str = "") -> set[str]:
    """Return the paths of all members of a JSON document as docs/status.md writes them."""
    if isinstance(value, dict) and not name.endswith((".errors", ".suspicious")):
        prefix = f"{name}." if name else ""
        return set().union(*(members(item, prefix + key) for key, item in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(members(item, f"{name}[]") for item in value))
    return {name}


def test_the_documented_members_are_those_of_the_document() -> None:
    text = (Path(control.__file__).parents[2] / "docs/status.md").read_text()
    _, _, table = text.partition("## The status document")
    assert set(re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE)) == members(document())
