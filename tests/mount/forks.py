"""Runs the command line in forks of one process, so that not each command has to import everything again.

``python -m tests.mount.forks`` reads a JSON line for each command, ``{"words": […], "env": {…}, "out": FILE,
"err": FILE}``, and answers with its exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn


class Forks:
    """The process that forks, for one process of the tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()
        atexit.register(self._end)

    def run(
        self, words: Sequence[str], env: Mapping[str, str], seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """Run ``modelfs WORDS`` and wait for its end, for so many seconds at most: one command at a time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock, tempfile.TemporaryDirectory(prefix="modelfs-command-") as name:
            out, err = Path(name) / "out", Path(name) / "err"
            asked = {"words": list(words), "env": dict(env), "out": str(out), "err": str(err)}
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            answered: list[Any] = []
            try:
                answered = select.select([self._process.stdout], [], [], seconds)[0]
            finally:
                # An answer that comes later is not for the next command.
                if not answered:
                    self._process.kill()
                    forks.cache_clear()
            if not answered:
                raise subprocess.TimeoutExpired(["modelfs", *words], seconds)
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(["modelfs", *words], code, out.read_text(), err.read_text())

    def _end(self) -> None:
        self._process.communicate()


@cache
def forks() -> Forks:
    """Return the one of this process."""
    return Forks()


def _serve() -> None:
    from modelfs import cli, daemon  # noqa: F401 - before there is a command

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            _become(cli.main, asked)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(main: Any, asked: Mapping[str, Any]) -> NoReturn:
    os.environ.clear()
    os.environ.update(asked["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT, 0o600), number)
    main(asked["words"])
    raise AssertionError("it exits")


if __name__ == "__main__":
    _serve()
