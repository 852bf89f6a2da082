"""Build a kustomization with kustomize itself: its library in Go, from the PyPI package pykustomize.

In a process of its own, because a Go runtime changes signal handlers: ``python -m tests.kustomize DIR``.
The package is for newer Pythons than ours; its library is asked directly, and lies in ``.venv/go``.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

LIBRARY = Path(sys.prefix, "go/pykustomize/_lib/linux-amd64/libpykustomize.so")


def build(directory: Path) -> list[dict[str, Any]]:
    """Return the objects of the kustomization in `directory`."""
    return list(yaml.safe_load_all(_built(directory)))


@cache
def _built(directory: Path) -> str:
    command = [sys.executable, "-m", "tests.kustomize", str(directory)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    library = ctypes.CDLL(str(LIBRARY))
    library.pykustomize_last_error.restype = ctypes.c_char_p
    result = ctypes.c_char_p()
    if library.pykustomize_build(sys.argv[1].encode(), json.dumps({}).encode(), ctypes.byref(result)):
        sys.exit(library.pykustomize_last_error().decode())
    sys.stdout.buffer.write(result.value or b"")


if __name__ == "__main__":
    main()
