"""Random operations on a real mount, and on a dict; see tests/mount/reference/."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.mount.reference.chance import random_operations
from tests.mount.reference.world import Operation, World, world

# httpcore does not close a socket that is refused, as that of a daemon that was killed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)

STEPS = 120
"""Operations of a short run; `make reference` does thousands."""

REGRESSIONS: dict[str, Sequence[Operation]] = {
    "a-refresh-left-the-links-of-a-directory": [
        ("stat", "web", 0),
        ("put", "web", "a/b.json", 1, 300, False),
        ("refresh",),
        ("stat", "web", 0),
    ],
    "a-successor-did-not-tell-what-is-new": [
        *(("stat", "web", index) for index in range(8)),
        ("put", "web", "a/b.json", 1, 300, False),
        ("kill",),
        *(("stat", "web", index) for index in range(8)),
        ("refresh",),
        *(("stat", "web", index) for index in range(12)),
        ("whole", "web", 0),
    ],
    "an-open-file-came-back-with-its-directory": [
        ("put", "web", "f/d.safetensors", 1, 300, False),
        ("refresh",),
        ("open", 0, "web", 0, 0),
        ("put", "web", "f", 2, 300, False),
        ("refresh",),
        ("put", "web", "f/d.safetensors/a", 3, 300, False),
        ("refresh",),
        ("whole", "web", 0),
    ],
}
"""What once failed, as `make reference` printed it."""


@pytest.fixture(scope="module")
def shared(transport: str) -> Iterator[World]:
    with world(transport) as own:
        yield own


@pytest.fixture
def empty(shared: World) -> World:
    shared.start_over()
    return shared


@pytest.mark.parametrize("seed", [1, 2])
def test_random_operations_find_what_the_reference_has(empty: World, seed: int) -> None:
    empty.play(random_operations(seed, STEPS))


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_once_failed_does_not(empty: World, name: str) -> None:
    empty.play(REGRESSIONS[name])
