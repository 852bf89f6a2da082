"""The processes that the demo starts: the stores, the command line, the loaders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
MODELFS = Path(sys.executable).with_name("modelfs")
"""The command line, as it was installed."""

SETTINGS = ("MODELFS_", "AWS_", "HF_", "HUGGING", "TRANSFORMERS_")
"""Beginnings of the variables that name the user's own stores, credentials and settings."""


class Failure(Exception):
    """The demo cannot go on; the message says why, with what the processes said."""


@dataclass(frozen=True)
class Loaded:
    """One load.

    Attributes:
        seconds: what it took until the model had computed something.
        answer: what that was.
        fetched: bytes that came from the store.
        requests: how often the store was asked for some.
        cached: bytes of the model that the cache has since.

    """

    seconds: float
    answer: str
    fetched: int
    requests: int
    cached: int


class Session:
    """A directory, an environment and the processes in it; a context manager that ends them all.

    Args:
        place: the mountpoint.
        models: names of those that the stores shall hold.

    """

    def __init__(self, place: Path, models: Sequence[str]) -> None:
        self.place = place
        self.urls: dict[str, str] = {}
        """Of the stores, by scheme."""
        self._counted = (0, 0)
        self._models = models
        self._kept = False

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="modelfs-demo-"))
        self.env = environment(self.directory)
        with (self.directory / "stores.log").open("w") as log:
            self._stores = subprocess.Popen(
                [sys.executable, "-m", "demo.stores", str(self.directory), str(self.place), *self._models],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=self.env,
                start_new_session=True,  # Ctrl-C is for the demo, which ends them in its own time
            )
        try:
            ready = json.loads(self._answer())
        except BaseException:
            self._end()
            raise
        self.urls = ready["urls"]
        self.env |= ready["env"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept:
            self._end()

    def _end(self) -> None:
        """End the stores, which take with them whatever is still mounted."""
        self._pipe.close()
        self._stores.wait()
        shutil.rmtree(self.directory, ignore_errors=True)  # they did that already, unless they failed

    def keep(self) -> None:
        """Leave everything as it is when the session ends; the stores end with the mount."""
        self.stores("keep")
        self._pipe.close()
        self._kept = True

    @property
    def _pipe(self) -> Any:
        return self._stores.stdin

    def stores(self, command: str) -> None:
        """Let the stores ``start``, ``stop`` or ``keep``."""
        self._pipe.write(f"{command}\n")
        self._pipe.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._stores.stdout is not None
        line = self._stores.stdout.readline()
        if not line:
            raise Failure(f"the stores ended with status {self._stores.wait()}{self._log('stores.log')}")
        return line

    def modelfs(self, *words: str) -> str:
        """Run the command line and return what it printed."""
        with subprocess.Popen(
            [MODELFS, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
            # The stores clean up when their input ends: not before the last command has.
            pass_fds=[self._pipe.fileno()],
        ) as process:
            try:
                output, errors = process.communicate()
            except KeyboardInterrupt:
                process.wait()  # it was interrupted too, and takes back what it began
                raise
        if process.returncode:
            raise Failure(f"modelfs {words[0]}: {errors.strip()}{self._log('daemon.log')}")
        return output

    def mount(self, sources: dict[str, str]) -> str:
        """Mount `sources`, name → URL, and return what was printed."""
        words = [word for name, url in sources.items() for word in ("--source", f"{name}={url}")]
        cache, log = str(self.directory / "cache"), str(self.directory / "daemon.log")
        self._counted = (0, 0)  # a daemon counts from its start
        return self.modelfs("mount", str(self.place), *words, "--cache-dir", cache, "--log-file", log)

    def status(self) -> dict[str, Any]:
        """Return the document of docs/status.md."""
        document: dict[str, Any] = json.loads(self.modelfs("status", str(self.place), "--json"))
        return document

    def load(self, module: str, model: str) -> Loaded:
        """Run a module of ``demo.loads`` on a mounted model, in a process of its own."""
        with (
            (self.directory / "loader.log").open("w") as log,
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "demo.loads", module, str(self.place / model)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**self.env, "HF_HUB_OFFLINE": "1"},  # paths are loaded, nobody need be asked for more
            ) as process,
        ):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise Failure(f"{module} ended with status {process.wait()}{self._log('loader.log')}")
            status = self.status()
            while status["fetch"]["in_flight"]:  # the rest of the weights, for as long as the model lives
                status = self.status()
        done = json.loads(line)
        (bytes_before, requests_before), fetch = self._counted, status["fetch"]
        self._counted = (fetch["bytes"], fetch["requests"])
        return Loaded(
            done["seconds"],
            done["answer"],
            fetch["bytes"] - bytes_before,
            fetch["requests"] - requests_before,
            next(row["cached_bytes"] for row in status["models"] if row["name"] == model),
        )

    def _log(self, name: str) -> str:
        """Return the last lines of a log, to be put behind a message."""
        file = self.directory / name
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        return "".join(f"\n  {line}" for line in lines[-12:])


def environment(directory: Path) -> dict[str, str]:
    """Return this process's environment without the user's own stores, credentials and settings."""
    ours = {
        "MODELFS_CONFIG": str(directory / "modelfs.yaml"),
        "HF_HOME": str(directory / "huggingface"),  # also where a login would lie
        "AWS_CONFIG_FILE": str(directory / "aws"),
        "AWS_SHARED_CREDENTIALS_FILE": str(directory / "aws"),
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(directory / "tmp"),  # servers and libraries leave things there
    }
    (directory / "tmp").mkdir()
    (directory / "modelfs.yaml").touch()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == "MODELFS_RUNTIME_DIR" or not name.startswith(SETTINGS)
    }
    direct = ",".join(filter(None, [inherited.get("no_proxy") or inherited.get("NO_PROXY"), "127.0.0.1"]))
    return {**inherited, **ours, "no_proxy": direct, "NO_PROXY": direct}
