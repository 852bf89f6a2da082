"""Real mounts for tests: the daemon is started by the command line, the reading code is another process."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache as remember
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from modelfs import control
from modelfs.cli import launch
from modelfs.errors import MountError
from modelfs.fuse import mountpoint
from tests.mount.forks import forks

BAD_LOG = re.compile(r"\b(ERROR|CRITICAL)\b|Traceback")
DEADLINE = 120


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return once `condition()` is true; fail if that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.02)


class Mounted:
    """A mount and its daemon; `path` is the mountpoint."""

    def __init__(self, path: Path, cache: Path, log: Path, env: Mapping[str, str]) -> None:
        self.path = path
        self.cache = cache
        self.log = log
        self.env = dict(env)
        self.words: Sequence[str] = ()
        """The command that mounted it."""
        self.allowed_errors: list[str] = []
        """Regular expressions of log lines that this test provokes."""

    def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return modelfs(*words, env=self.env, check=check)

    def status(self) -> dict[str, Any]:
        """Return what ``modelfs status --json`` prints, without the half second that a command takes."""
        return self.client().status()

    def client(self) -> control.ControlClient:
        """Return what commands ask the daemon with."""
        with self._environment():
            return control.ControlClient(control.socket_path(mountpoint.canonical(self.path)))

    def umount(self) -> None:
        """Do what ``modelfs umount`` does."""
        with self._environment():
            launch.end(mountpoint.canonical(self.path), lazy=False)

    @contextmanager
    def _environment(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if "MODELFS_RUNTIME_DIR" in self.env:
                patch.setenv("MODELFS_RUNTIME_DIR", self.env["MODELFS_RUNTIME_DIR"])
            yield

    def fetched(self) -> int:
        return int(self.status()["fetch"]["bytes"])

    def requests(self) -> int:
        return int(self.status()["fetch"]["requests"])

    def samples(self, name: str, **labels: str) -> list[Sample]:
        """Return the samples of ``/metrics`` of this name with these labels, all of one moment."""
        with self._environment():
            socket_path = str(control.socket_path(mountpoint.canonical(self.path)))
        with httpx.Client(transport=httpx.HTTPTransport(uds=socket_path)) as client:
            text = client.get("http://modelfs/metrics").text
        return [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of `samples`."""
        return sum(sample.value for sample in self.samples(name, **labels))

    def run(
        self, *command: str, user: str | None = None, check: bool = True, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a reader as `read_by` does."""
        return read_by(*command, user=user, check=check, env=env)

    def python(
        self, code: str, *args: str, user: str | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """Run Python code in a reader of its own; return what it printed, show what it said if it fails."""
        program, variables = interpreter(user)
        words = [program, "-W", "ignore", "-c", code, *args]
        result = self.run(*words, user=user, check=False, env={**variables, **(env or {})})
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout

    def drop_pages(self) -> None:
        """Forget the kernel's page cache, so that every read reaches the daemon again."""
        Path("/proc/sys/vm/drop_caches").write_text("1")

    def bad_lines(self) -> list[str]:
        text = self.log.read_text() if self.log.exists() else ""
        return [
            line
            for line in text.splitlines()
            if BAD_LOG.search(line) and not any(re.search(allowed, line) for allowed in self.allowed_errors)
        ]


def read_by(
    *command: str, user: str | None = None, check: bool = True, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with `user`'s rights and groups if given; its output is text."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=check,
        timeout=DEADLINE,
        user=user,
        group=pwd.getpwnam(user).pw_gid if user else None,
        extra_groups=[] if user else None,
        cwd="/",
        env={**os.environ, **(env or {})},
    )


@remember
def interpreter(user: str | None) -> tuple[str, Mapping[str, str]]:
    """Return a Python that `user` may run, and the environment in which it finds our packages.

    Ours may lie in a home directory; then it is the system's of the same version.
    """
    try:
        read_by(sys.executable, "-c", "", user=user)
    except PermissionError:
        program = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        variables = {"PYTHONPATH": sysconfig.get_path("platlib")}
        read_by(program, "-c", "import numpy", user=user, env=variables)
        return program, variables
    return sys.executable, {}


class Reader:
    """Python code in a process of its own that stops at each ``step()`` until it is told to go on.

    Args:
        code: what it does; has ``mmap``, ``os`` and ``sys``.
        args: become ``sys.argv[1:]``.
        within: words before the command, which lead into a namespace.
        python: the interpreter.

    """

    def __init__(
        self, code: str, *args: object, within: Sequence[str] = (), python: str = sys.executable
    ) -> None:
        prelude = "import mmap,os,sys\ndef step(v=''):\n    print(v,flush=True)\n    sys.stdin.readline()\n"
        self.process = subprocess.Popen(
            [*within, python, "-c", prelude + code, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> int:
        self.go_on()
        return self.process.wait(60)


@contextmanager
def open_directory() -> Iterator[Path]:
    """Yield a new directory that any user can enter; pytest's own are only for its user."""
    directory = Path(tempfile.mkdtemp(prefix="modelfs-test-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def file_system(place: Path, *words: str) -> Iterator[Path]:
    """Mount something of its own as the place of a cache; lazily unmounted in the end."""
    path = place / "disk"
    path.mkdir()
    subprocess.run(["mount", *words, str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def unused_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def raw_server(answer: Callable[[bytes], bytes]) -> Iterator[str]:
    """Serve what need not be HTTP: each connection gets the answer to what it sends first; yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # shut down
                    return
                with connection:
                    if received := connection.recv(65536):
                        connection.sendall(answer(received))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def modelfs(
    *words: str, env: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    result = forks().run(words, {**os.environ, **(env or {})}, DEADLINE)
    if check:
        assert result.returncode == 0, f"modelfs {' '.join(words)}: {result.stderr or result.stdout}"
    return result


@contextmanager
def mounted(
    directory: Path,
    *flags: str,
    sources: Mapping[str, str] | None = None,
    config: str | None = None,
    env: Mapping[str, str] | None = None,
    transport: str = "pyfuse3",
    cache: Path | None = None,
) -> Iterator[Mounted]:
    """Mount below `directory` and unmount in the end, whatever happens.

    Args:
        directory: of this test; mountpoint, cache and log are made in it.
        flags: further words for ``modelfs mount``.
        sources: model name → store URL.
        config: text of a configuration file.
        env: variables for the daemon (endpoints, credentials).
        transport: how the daemon talks to the kernel.
        cache: a cache directory to use again.

    """
    path, log = directory / "models", directory / "daemon.log"
    path.mkdir(exist_ok=True)
    own = Mounted(path, cache or directory / "cache", log, env or {})
    words: list[str] = ["mount", str(path), "--cache-dir", str(own.cache), "--log-file", str(log)]
    words += ["--transport", transport, "--log-level", "info", *flags]
    for name, url in (sources or {}).items():
        words += ["--source", f"{name}={url}"]
    if config is not None:
        file = directory / "modelfs.yaml"
        file.write_text(config)
        words += ["--config", str(file)]
    own.words = words
    failed = True
    try:
        own.cli(*words)
        yield own
        failed = False
    finally:
        _teardown(own)
        if not failed:
            assert own.bad_lines() == [], "the daemon logged errors"


def _teardown(own: Mounted) -> None:
    if mountpoint.mount_at(own.path) is None:
        return
    pids = daemon_pids(own)
    try:
        own.umount()
    except MountError as error:
        print(error)  # beside why the test failed
        for pid in pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, 15)
    while mountpoint.mount_at(own.path) is not None:
        mountpoint.detach(own.path, lazy=True)


def daemon_pids(own: Mounted) -> Sequence[int]:
    """Return the processes that serve the mount, as the daemon says itself."""
    try:
        return [int(own.status()["pid"])]
    except MountError:
        return []


def alone(place: Path) -> dict[str, str]:
    """Return the environment of a `modelfs` that knows no other mounts; `left_behind` finds its processes."""
    return {"MODELFS_RUNTIME_DIR": str(place / "run")}


def left_behind(place: Path) -> list[str]:
    """Return the mounts below `place`, and processes with a cache there or the environment `alone(place)`."""
    variable = b"MODELFS_RUNTIME_DIR=" + os.fsencode(place / "run")
    found = [str(mount.path) for mount in mountpoint.mounts() if mount.ours and place in mount.path.parents]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(each) for each in list((process / "fd").iterdir())]
            caching = any(file.startswith(f"{place}/") and file.endswith("/lock") for file in files)
            if caching or variable in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it ended meanwhile
            continue
    return found
