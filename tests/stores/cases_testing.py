"""The stores of modelfs.testing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelfs.testing import FaultyStore, MemoryStore
from tests.stores.case import FILES, Case, Opened


@contextmanager
def memory(directory: Path) -> Iterator[Opened]:
    yield MemoryStore("memory://contract", FILES), FILES


@contextmanager
def faultless(directory: Path) -> Iterator[Opened]:
    yield FaultyStore(MemoryStore("memory://contract", FILES, digests=False), {}), FILES


CASES = [Case("memory", memory), Case("faulty-without-faults", faultless)]
