"""Fixtures of the mount tests: each test has a directory of its own, readable for other users too."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.mount)
            if not os.path.exists("/dev/fuse") or os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="mount tests need /dev/fuse and root"))


@pytest.fixture(params=["pyfuse3"])
def transport(request: pytest.FixtureRequest) -> str:
    """Every mount test runs on each transport."""
    name: str = request.param
    return name


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that any user can enter; pytest's own are only for its user."""
    directory = Path(tempfile.mkdtemp(prefix="modelfs-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)
