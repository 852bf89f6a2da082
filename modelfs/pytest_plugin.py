"""Fixtures for tests of code that loads models; pytest finds them by itself (entry point ``pytest11``).

Nothing of modelfs is imported before a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Give a function that returns a directory with a tiny model: ``models("finbert")``.

    Any name is a small BERT that transformers load, ``sklearn`` two pickles; ``mock://NAME?seed=2`` is
    another one. What the test calls gets the same from ``modelfs.local_path``, and no network is used.
    """
    from modelfs.environment import VARIABLE, local_path

    monkeypatch.setenv(VARIABLE, "test")
    return local_path
