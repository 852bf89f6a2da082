"""Fixtures of the mount tests: each test has a directory of its own, readable for other users too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.harness import open_directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.mount)
            if not os.path.exists("/dev/fuse") or os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="mount tests need /dev/fuse and root"))


@pytest.fixture(scope="session", params=["pyfuse3", "kernel"])
def transport(request: pytest.FixtureRequest) -> str:
    """Every mount test runs on each transport."""
    name: str = request.param
    return name


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that any user can enter; pytest's own are only for its user."""
    with open_directory() as directory:
        yield directory


@pytest.fixture(scope="session")
def zoo() -> Iterator[Path]:
    """The directory of all models of `tests.zoo`; nobody writes to it."""
    with open_directory() as directory:
        command = [sys.executable, "-W", "ignore", "-m", "tests.zoo", str(directory)]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
        yield directory
