"""The control API of a real daemon: over TCP, and whether it is ready."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import trio

from modelfs.control.ready import Readiness
from tests.mount.harness import eventually, mounted


def test_a_mount_is_ready_until_it_does_not_answer(place: Path, transport: str) -> None:
    config = "http: 127.0.0.1:0\nmodels: {m: 'mock://tiny'}\n"
    with mounted(place, config=config, transport=transport) as mount:
        status = mount.status()
        url = status["http"]
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/readyz", trust_env=False).text == "ok\n"
        assert httpx.get(f"{url}/healthz", trust_env=False).text == "ok\n"
        assert httpx.get(f"{url}/v1/status", trust_env=False).json()["pid"] == status["pid"]
        assert httpx.post(f"{url}/v1/shutdown", trust_env=False).status_code == 404
        asked = Readiness(mount.path, seconds=1.0)

        async def twice() -> list[str | None]:
            return [await asked.why_not() for _ in range(2)]

        os.kill(status["pid"], signal.SIGSTOP)
        try:
            why = f"{mount.path} does not answer within 1 s"
            assert trio.run(twice) == [why, why]
        finally:
            os.kill(status["pid"], signal.SIGCONT)
        eventually(lambda: trio.run(asked.why_not) is None)  # the process that was left has ended


def test_what_is_not_mounted_is_not_ready(tmp_path: Path) -> None:
    assert trio.run(Readiness(tmp_path).why_not) == f"{tmp_path} is not mounted"


def test_metrics_say_what_was_read_and_what_it_took(place: Path, transport: str) -> None:
    with mounted(place, config="models: {m: 'mock://tiny'}\n", transport=transport) as mount:
        files = [path for path in (mount.path / "m").rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        for _ in range(2):
            mount.run("cksum", str(largest))
            mount.drop_pages()
        kernel_reads = mount.status()["transport"]["passthrough"]
        assert mount.metric("modelfs_opens_total") == 2
        assert mount.metric("modelfs_passthrough_opens_total") == (2 if kernel_reads else 0)
        if not kernel_reads:
            assert mount.metric("modelfs_reads_total", scheme="mock", result="miss") > 0
            assert mount.metric("modelfs_reads_total", scheme="mock", result="hit") > 0
        assert mount.metric("modelfs_models") == mount.metric("modelfs_models", state="ready") == 1
        assert mount.metric("modelfs_cache_bytes") == mount.status()["cache"]["used"] > 0
        assert mount.metric("modelfs_cache_objects") > 0
        assert mount.metric("modelfs_mount_info", passthrough=str(kernel_reads).lower()) == 1
        if transport == "kernel":
            mount.cli("upgrade", str(mount.path))
            assert mount.metric("modelfs_handovers_total") == 1
