"""Directories and single files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelfs.stores import open_store
from tests.stores.case import FILES, Case, Opened, write_tree


@contextmanager
def directory(directory: Path) -> Iterator[Opened]:
    yield open_store(write_tree(directory).as_uri()), FILES


@contextmanager
def single(directory: Path) -> Iterator[Opened]:
    write_tree(directory)
    yield (
        open_store((directory / "model.safetensors").as_uri()),
        {"model.safetensors": FILES["model.safetensors"]},
    )


CASES = [Case("file-directory", directory), Case("file-single", single)]
