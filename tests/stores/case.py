"""A row of the contract suite.

Every module ``tests/stores/cases_*.py`` has a list ``CASES``; ``test_contract.py`` runs the contract on each
of them. To add a store, add a module with a context manager that makes it and a row::

    @contextmanager
    def notes(directory: Path) -> Iterator[tuple[Store, Mapping[str, bytes]]]:
        yield NotesStore("notes://x", {}), FILES

    CASES = [Case("notes", notes)]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from modelfs.stores import Store

Opened = tuple[Store, Mapping[str, bytes]]
"""A store and the content of every file in it, by path."""


@dataclass(frozen=True)
class Case:
    """A store to check.

    Attributes:
        id: name of the test.
        open: called with an empty directory to use; makes the store (and its server) and ends it.
        secrets: strings it is configured with that must never be shown.

    """

    id: str
    open: Callable[[Path], AbstractContextManager[Opened]]
    secrets: tuple[str, ...] = ()


FILES: Mapping[str, bytes] = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": random.Random(1).randbytes(70_001),
    "empty": b"",
    "onnx/model.onnx": random.Random(2).randbytes(513),
    "onnx/sub/weights.bin": b"\0" * 100,
    "onnx-quantised/model.onnx": b"same prefix as a directory",
    "name with space + plus, 100%25 ?#&;=.txt": b"quoted",
    "größe 模型.txt": b"not ASCII",
    ".hidden": b"hidden",
}
"""What a store of the contract suite should hold unless it has reasons not to: names and sizes that hurt."""


def write_tree(root: Path, files: Mapping[str, bytes] = FILES) -> Path:
    """Write `files` below `root` and return it."""
    for path, data in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return root
