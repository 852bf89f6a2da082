"""A real systemd, as the first process of a namespace, restarts the service under load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelfs.fuse import mountpoint
from tests.mount.conftest import place as place
from tests.mount.harness import Mounted, alone, eventually, left_behind
from tests.mount.test_handover import Readers
from tests.mount.test_handover import origin as origin
from tests.origin import Origin

SYSTEMD = Path("/lib/systemd/systemd")

SERVICE = "modelfs@models"

UNSHARE = [
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount",
    "--mount-proc",
    "--propagation",
    "unchanged",
]

BOOT = """
for mounted in $(cut -d' ' -f5 /proc/self/mountinfo); do
  case "$mounted" in "$SHARED"*) ;; *) mount --make-slave "$mounted" || true ;; esac
done
for mounted in $(grep -F ' - fuse.modelfs ' /proc/self/mountinfo | cut -d' ' -f5); do
  case "$mounted" in "$SHARED"*) ;; *) umount --lazy "$mounted" || true ;; esac
done
mount -t tmpfs tmpfs /run
exec {systemd} --system --log-target=console --show-status=no
"""
"""Keeps what systemd mounts to its namespace, but for what is below $SHARED, as a host does for its pods.

Slaves, and not private: what other tests unmount meanwhile is unmounted here too, and their daemons can end.
What is private outside too becomes no slave: the mounts of other tests are unmounted here at once.
"""

UNIT = Path(__file__).parents[1] / "packaging/host/files/modelfs@.service"

HERE = """
[Unit]
DefaultDependencies=no
AssertPathExists=
[Service]
Environment={environment}
ExecStart=
ExecStart={python} -m modelfs mount {path} --foreground --transport=kernel --cache-dir={place}/cache {words}
StandardOutput=append:{place}/service.log
StandardError=append:{place}/service.log
CacheDirectory=
RuntimeDirectory=
RestartSec=100ms
"""
"""What differs from the unit in packages: there is no installation, and nothing but `place` is written to."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse") or not SYSTEMD.exists(),
    reason="needs root, /dev/fuse and systemd",
)


class Systemd:
    """A manager of its own for the units of one directory."""

    def __init__(self, place: Path) -> None:
        self.units = place / "units"
        self.units.mkdir()
        (self.units / "default.target").write_text("[Unit]\nDefaultDependencies=no\n")
        self._log = (place / "systemd.log").open("wb")
        self._process = subprocess.Popen(
            [*UNSHARE, "sh", "-c", BOOT.format(systemd=SYSTEMD)],
            env={
                "PATH": os.environ["PATH"],
                "container": "modelfs-test",
                "SYSTEMD_UNIT_PATH": str(self.units),
                "SHARED": str(place),
            },
            stdout=self._log,
            stderr=self._log,
        )

    def ctl(self, *words: str, check: bool = True) -> str:
        """Run systemctl; return what it printed."""
        return self.run("systemctl", *words, check=check)

    def run(self, *words: str, check: bool = True) -> str:
        """Run a program in its namespace; return what it printed, nothing if there is none yet."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return ""
        inside = ["nsenter", "--target", children[0], "--mount", "--pid"]
        done = subprocess.run([*inside, *words], check=False, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def close(self) -> None:
        """Kill it, and with it all that is in its namespace."""
        self._process.kill()
        self._process.wait()
        self._log.close()


@contextmanager
def shared(place: Path) -> Iterator[None]:
    """Let what is mounted below `place` be seen in all namespaces that are made from this one."""
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "--make-shared", place], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def systemd(place: Path) -> Iterator[Systemd]:
    with shared(place):
        manager = Systemd(place)
        try:
            eventually(lambda: manager.ctl("is-active", "default.target", check=False) == "active")
            yield manager
        finally:
            manager.close()


def test_systemctl_restart_under_load_fails_no_read(systemd: Systemd, place: Path, origin: Origin) -> None:
    path = place / "models"
    path.mkdir()
    variables = {**alone(place), "PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path)}
    here = HERE.format(
        environment=" ".join(f'"{name}={value}"' for name, value in variables.items()),
        python=sys.executable,
        path=path,
        place=place,
        words=f"--source=m={origin.url} --refresh=0",
    )
    shutil.copy(UNIT, systemd.units)
    (systemd.units / f"{UNIT.name}.d").mkdir()
    (systemd.units / f"{UNIT.name}.d/here.conf").write_text(here)
    systemd.ctl("daemon-reload")
    systemd.ctl("start", SERVICE)
    mount = Mounted(path, place / "cache", place / "service.log", alone(place))
    device = mountpoint.mount_at(path)
    assert device is not None
    kept = "NFileDescriptorStore"
    assert systemd.ctl("show", SERVICE, "-p", kept) == f"{kept}=2"
    with Readers(mount.path / "m", origin, 4) as results:
        for restarts in (1, 2):
            systemd.ctl("restart", SERVICE)
            assert mountpoint.mount_at(path) == device
            assert mount.status()["handovers"] == restarts
        # Not asked for, systemd does it by itself.
        status = mount.status()
        systemd.run("kill", "-KILL", str(status["holder_pid"]), str(status["pid"]))
        eventually(lambda: systemd.ctl("show", SERVICE, "-p", "NRestarts") == "NRestarts=1")
        eventually(lambda: systemd.ctl("is-active", SERVICE, check=False) == "active")
        assert mount.status()["handovers"] == 3
    assert len(results) == 4
    assert all(results)
    assert mountpoint.mount_at(path) == device
    mount.umount()
    eventually(lambda: systemd.ctl("is-active", SERVICE, check=False) == "inactive")
    assert left_behind(place) == []
