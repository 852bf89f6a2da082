"""One run: an origin that fails, daemons that are killed, a cache too small, and readers that compare."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from modelfs.control import ControlClient
from modelfs.errors import MountError
from modelfs.holder import QUICK_SECONDS
from modelfs.testing.faults import FaultProxy, storm
from modelfs.testing.server import Server

MIB = 1 << 20

SIZES = {
    "model-00001.safetensors": 48 * MIB,
    "model-00002.safetensors": 24 * MIB + 77,
    "optimizer.dat": 40 * MIB + 1,
    "embeddings.npy": 9 * MIB,
    "tokenizer.json": 3 * MIB - 5,
    "config.json": 700,
}
"""The files: weights, which are fetched whole, and others, which are fetched as they are read."""

QUICK_SHARE = 0.4
"""How often a daemon is killed young, perhaps while it takes over."""

QUICK_IN_A_ROW = 2
"""So often at most: more would be a crash loop, for which the holder answers with errors on purpose."""

END_SECONDS = 120.0
"""How long a reader may take to end once it is told to; one that takes longer is stuck."""

FAULTS = (
    *("reset", "reset-in-body", "closed", "truncated", "silence", "silence-in-body", "trickle", "no-http"),
    *("status-429", "status-500", "status-503", "wrong-range", "wrong-total", "malformed-range"),
    *("extra-bytes", "longer-body", "range-ignored", "part-as-whole"),
)
"""How the origin fails, of `modelfs.testing.faults.FAULTS`: all that another attempt can help against."""

FAULT_SECONDS = 1.0
"""How long a silence or a trickle lasts, and what ``Retry-After`` asks for."""

EXPECTED = re.compile(r"the next one takes the mount over|ended before it had read its settings")
"""Errors in the log that a kill explains."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does.

    Attributes:
        kills: after so many the run ends.
        seconds: after so many it ends too; None for no limit.
        readers: processes.
        faults: share of the origin's answers that are faults.
        cache: bytes of the cache; all files have 125 MiB.
        seed: of everything that is random.

    """

    kills: int = 200
    seconds: float | None = None
    readers: int = 16
    faults: float = 0.05
    cache: int = 64 * MIB
    seed: int = 1


@dataclass(slots=True)
class Outcome:
    """What became of it; the totals of all readers.

    Attributes:
        seconds: from the first read to the last.
        reads: reads that were compared with the original.
        bytes: of these.
        wrong_bytes: that were not those of the original.
        errors: what failed in readers, in words; a reader that died is one.
        longest_stall: seconds of the longest call of any reader.
        left_in_d: readers that do not end, in state D of proc_pid_stat(5).
        kills: daemons that were killed.
        handovers: daemons that took the mount over; one that is killed before is none.
        requests: that reached the origin.
        asked_bytes: that they asked for; more than the files have, because the cache is too small for them.
        faults: kind → how many answers were broken so.
        log: unexpected errors in the log.

    """

    seconds: float = 0.0
    reads: int = 0
    bytes: int = 0
    wrong_bytes: int = 0
    errors: list[str] = field(default_factory=list)
    longest_stall: float = 0.0
    left_in_d: int = 0
    kills: int = 0
    handovers: int = 0
    requests: int = 0
    asked_bytes: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether no reader saw anything but a pause."""
        return self.reads > 0 and not (self.wrong_bytes or self.errors or self.left_in_d or self.log)


class Mount:
    """A mount whose daemons are killed; a context manager that unmounts."""

    def __init__(self, directory: Path, url: str, cache: int) -> None:
        self.path = directory / "models"
        self.log = directory / "log"
        self._env = {**os.environ, "MODELFS_RUNTIME_DIR": str(directory / "run")}
        self.path.mkdir()
        words = ["--source", f"m={url}", "--cache-dir", directory / "cache", "--cache-size", cache]
        self._modelfs("mount", self.path, *words, "--log-file", self.log, "--transport=kernel", "--refresh=0")
        (socket,) = (directory / "run").glob("*.sock")
        self._client = ControlClient(socket)
        self._holder = self._client.status()["holder_pid"]

    def _modelfs(self, *words: object) -> None:
        command = [sys.executable, "-m", "modelfs", *map(str, words)]
        result = subprocess.run(command, env=self._env, capture_output=True, text=True, check=False)
        if result.returncode:
            raise MountError(result.stderr.strip() or f"modelfs {words[0]} failed")

    def __enter__(self) -> Mount:
        return self

    def __exit__(self, *error: object) -> None:
        self._modelfs("umount", self.path, "--lazy")

    def status(self) -> dict[str, Any] | None:
        """Return what the daemon that serves says; None while none answers."""
        try:
            return self._client.status()
        except MountError:
            return None

    def daemon(self) -> int | None:
        """Return the process that serves now, or is about to take over; None between two."""
        children = Path(f"/proc/{self._holder}/task/{self._holder}/children").read_text().split()
        return int(children[0]) if children else None

    def unexpected(self) -> list[str]:
        """Return the lines of the log that no kill explains."""
        bad = re.compile(r"\b(ERROR|CRITICAL)\b|Traceback")
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if bad.search(line) and not EXPECTED.search(line)]


class Killer:
    """Kills one daemon after the other, at moments that `chance` decides."""

    def __init__(self, mount: Mount, chance: random.Random) -> None:
        self.kills = 0
        self._mount = mount
        self._chance = chance
        self._quick = 0
        self._last: int | None = None

    def kill(self, until: float) -> None:
        """Wait for the next daemon and for its moment, and kill it; not from `until` (monotonic) on."""
        pid = _await(self._next, until)
        born = time.monotonic()
        if pid is None:
            return
        self._last = pid
        daemon = os.pidfd_open(pid)
        try:
            if self._quick < QUICK_IN_A_ROW and self._chance.random() < QUICK_SHARE:
                self._quick += 1
                moment = born + self._chance.uniform(0.0, QUICK_SECONDS * 0.8)
            else:
                self._quick = 0
                _await(lambda: self._serves(pid), until)
                moment = max(born + QUICK_SECONDS * 1.02, time.monotonic()) + self._chance.uniform(0.0, 0.5)
            time.sleep(max(0.0, min(moment, until) - time.monotonic()))
            if time.monotonic() < until:
                signal.pidfd_send_signal(daemon, signal.SIGKILL)
                self.kills += 1
        finally:
            os.close(daemon)

    def _serves(self, pid: int) -> bool | None:
        status = self._mount.status()
        return True if status is not None and status["pid"] == pid else None

    def _next(self) -> int | None:
        pid = self._mount.daemon()
        return pid if pid != self._last else None


def _await(question: Any, until: float) -> Any:
    """Return what `question()` returns once that is not None; None from `until` (monotonic) on."""
    while (answer := question()) is None and time.monotonic() < until:
        time.sleep(0.01)
    return answer


def run(plan: Plan) -> Outcome:
    """Do what `plan` says and return what became of it; leaves nothing behind.

    Raises:
        MountError: it could not even be mounted, or not be unmounted.

    """
    chance = random.Random(plan.seed)
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modelfs-chaos-")))
        originals = directory / "originals"
        originals.mkdir()
        for name, size in SIZES.items():
            (originals / name).write_bytes(chance.randbytes(size))
        server = stack.enter_context(Server("chaos.origin:directory", str(originals)))
        proxy = stack.enter_context(FaultProxy(server.url))
        mount = stack.enter_context(Mount(directory, f"{proxy.url}/", plan.cache))
        proxy.follow(storm(plan.seed, FAULTS, rate=plan.faults, seconds=FAULT_SECONDS))
        began = time.monotonic()
        until = began + (plan.seconds or 86400.0)
        with _readers(plan, mount.path / "m", originals, outcome):
            killer = Killer(mount, chance)
            while killer.kills < plan.kills and time.monotonic() < until:
                killer.kill(until)
        outcome.seconds = time.monotonic() - began
        outcome.kills = killer.kills
        status = _await(mount.status, time.monotonic() + END_SECONDS)
        outcome.handovers = status["handovers"] if status else 0
        outcome.log = mount.unexpected()
        outcome.requests, outcome.faults = len(proxy.asked), dict(proxy.injected.most_common())
        outcome.asked_bytes = sum(_length(asked.range) for asked in proxy.asked)
    return outcome


def _length(value: str) -> int:
    """Return how many bytes a ``Range`` header asks for; 0 for none."""
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", value)
    return int(match[2]) + 1 - int(match[1]) if match else 0


@contextlib.contextmanager
def _readers(plan: Plan, model: Path, originals: Path, outcome: Outcome) -> Iterator[None]:
    """Let readers read meanwhile; add what they found to `outcome` in the end."""
    command = [sys.executable, "-m", "chaos.reader", str(model), str(originals)]
    readers = [
        subprocess.Popen(
            [*command, str(plan.seed * 1000 + number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(plan.readers)
    ]
    try:
        yield
    finally:
        for reader in readers:
            cast(IO[str], reader.stdin).close()
            reader.stdin = None  # communicate() would flush it
        _gather(readers, outcome)


def _gather(readers: Sequence[subprocess.Popen[str]], outcome: Outcome) -> None:
    until = time.monotonic() + END_SECONDS
    for number, reader in enumerate(readers):
        try:
            said, complaints = reader.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            state = re.search(r"^State:\s+(\S)", Path(f"/proc/{reader.pid}/status").read_text(), re.MULTILINE)
            outcome.left_in_d += state is not None and state[1] == "D"
            outcome.errors.append(f"reader {number} does not end")
            reader.kill()
            continue
        if reader.returncode:
            outcome.errors.append(f"reader {number} ended with {reader.returncode}: {complaints[-300:]}")
            continue
        found = json.loads(said)
        outcome.reads += found["reads"]
        outcome.bytes += found["bytes"]
        outcome.wrong_bytes += found["wrong"]
        outcome.errors += found["errors"]
        outcome.errors += ["and more"] * (found["failed"] > len(found["errors"]))
        outcome.longest_stall = max(outcome.longest_stall, found["longest"])
