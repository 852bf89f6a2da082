"""Daemon and holder have given up what they do not need of root's rights, and everything still works."""

from __future__ import annotations

import os
import pwd
import signal
from pathlib import Path

import pytest

from tests.mount.harness import Mounted, alone, eventually, mounted

DAC_OVERRIDE, DAC_READ_SEARCH, SYS_ADMIN = 1 << 1, 1 << 2, 1 << 21
NOBODY = pwd.getpwnam("nobody").pw_uid
SIZE = 20_000_000


def rights(pid: int) -> set[tuple[int, int, int, int]]:
    """Return what each thread holds: effective, permitted, more in its bounding set, no new privileges."""
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        rows = dict(line.split(":", 1) for line in (thread / "status").read_text().splitlines())
        effective, permitted, bounding = (int(rows[name], 16) for name in ("CapEff", "CapPrm", "CapBnd"))
        found.add((effective, permitted, bounding & ~permitted, int(rows["NoNewPrivs"])))
    return found


@pytest.fixture
def private(place: Path) -> str:
    """The URL of a directory that only another user can read."""
    root = place / "private"
    root.mkdir()
    (root / "model.bin").write_bytes(bytes(SIZE))
    for path in (root / "model.bin", root):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o700)
    return root.as_uri()


def read(mount: Mounted) -> None:
    assert mount.run("wc", "-c", str(mount.path / "m" / "model.bin")).stdout.split()[0] == str(SIZE)


def handovers(mount: Mounted) -> int:
    result = mount.cli("status", str(mount.path), check=False)
    return int(mount.status()["handovers"]) if result.returncode == 0 else 0


def test_a_daemon_keeps_what_its_mount_needs(place: Path, private: str, transport: str) -> None:
    kept = DAC_READ_SEARCH | SYS_ADMIN
    with mounted(place, sources={"m": private}, transport=transport, env=alone(place)) as mount:
        read(mount)
        status = mount.status()
        assert rights(status["pid"]) == {(kept, kept, 0, 1)}
        assert status["capabilities"] == ["CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN"]
        if status["holder_pid"] is not None:
            most = kept | DAC_OVERRIDE
            assert rights(status["holder_pid"]) == {(most, most, 0, 1)}
        mount.umount()


def test_a_mount_is_read_only_and_knows_no_devices_and_no_set_uid(
    place: Path, private: str, transport: str
) -> None:
    with mounted(place, sources={"m": private}, transport=transport, env=alone(place)) as mount:
        rows = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
        (options,) = (row[3].split(",") for row in rows if row[1] == str(mount.path))
        assert {"ro", "nosuid", "nodev"} <= set(options)


def test_a_successor_has_no_more_and_no_less(place: Path, private: str) -> None:
    with mounted(place, sources={"m": private}, transport="kernel", env=alone(place)) as mount:
        mount.allowed_errors.append("the next one takes the mount over")
        first = mount.status()
        (before,) = rights(first["pid"])
        mount.cli("upgrade", str(mount.path))
        os.kill(mount.status()["pid"], signal.SIGKILL)
        eventually(lambda: handovers(mount) == 2)
        read(mount)
        status = mount.status()
        # What is out of reach, the first has given up for good; a successor, without CAP_SETPCAP, cannot.
        effective, permitted, _, none_new = before
        assert rights(status["pid"]) == {(effective, permitted, DAC_OVERRIDE, none_new)}
        assert status["transport"] == first["transport"]


def test_a_cache_of_another_user_can_be_written(place: Path, private: str) -> None:
    cache = place / "cache"
    cache.mkdir()
    os.chown(cache, NOBODY, NOBODY)
    cache.chmod(0o700)
    with mounted(place, sources={"m": private}, transport="kernel", env=alone(place)) as mount:
        read(mount)
        assert mount.status()["cache"]["objects"] == 1
        assert "CAP_DAC_OVERRIDE" in mount.status()["capabilities"]
