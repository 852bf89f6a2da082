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
