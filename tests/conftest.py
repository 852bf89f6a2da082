"""What all tests rely on."""

from __future__ import annotations

import signal

import pytest

# A shell's background jobs ignore SIGINT, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, real mounts, so that no worker is left alone with it in the end."""
    items.sort(key=lambda item: not (item.path.parent.name == "mount" or item.path.stem in LONG))


LONG = {"test_demo", "test_packages", "test_systemd"}
"""What takes longest outside of ``tests/mount``."""
