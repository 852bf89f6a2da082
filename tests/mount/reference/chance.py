"""Random operations."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping

from modelfs.types import BLOCK
from tests.mount.actor import WAYS
from tests.mount.reference.stores import ONCE, PASSING
from tests.mount.reference.tree import NAMES
from tests.mount.reference.world import Operation

MIB = 1 << 20

HANDLES = 5
"""Files that are open at a time, at most."""

SIZES = (0, 1, 300, 4095, 4096, 4097, 70_000, 131_072, MIB + 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77)
LENGTHS = (0, 1, 511, 4096, 5000, 131_072, MIB, 3 * MIB + 7)


def random_path(chance: random.Random) -> str:
    """Return a path that likely collides with one of before."""
    return "/".join(chance.choice(NAMES) for _ in range(chance.choice((1, 1, 2, 2, 3))))


def random_put(chance: random.Random) -> Operation:
    size = chance.choice(SIZES[:7]) if chance.random() < 0.7 else chance.choice(SIZES)
    seed = chance.randrange(1 << 30)
    return "put", chance.choice(("web", "disk")), random_path(chance), seed, size, chance.random() < 0.5


def random_strike(chance: random.Random) -> Operation:
    if chance.random() < 0.4:
        return "strike", [chance.choice((*ONCE, "corrupted"))]
    return "strike", [chance.choice(PASSING) for _ in range(chance.randint(1, 3))]


def _model(chance: random.Random) -> tuple[str, int]:
    return chance.choice(("web", "web", "disk")), chance.randrange(1 << 16)


def _at(chance: random.Random) -> float:
    return round(chance.choice((0.0, 0.0, chance.random(), chance.random(), 0.99, 1.0, 1.2)), 4)


RANDOM: Mapping[Callable[[random.Random], Operation], float] = {
    random_put: 8,
    lambda c: ("link", random_path(c), c.randrange(1 << 16)): 1,
    lambda c: ("remove", *_model(c)): 2,
    lambda c: ("rename", *_model(c), random_path(c)): 2,
    lambda c: ("refresh",): 4,
    lambda c: ("stat", *_model(c)): 8,
    lambda c: ("listing", *_model(c)): 5,
    lambda c: (
        "list_in_pieces",
        *_model(c),
        c.choice((64, 100, 300, 4096)),
        [c.randrange(99) for _ in range(3)],
    ): 3,
    lambda c: ("access", *_model(c), c.choice((os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.X_OK))): 3,
    lambda c: ("readlink", *_model(c)): 2,
    lambda c: ("whole", *_model(c)): 6,
    lambda c: ("open", c.randrange(HANDLES), *_model(c), c.choice((0, 0, 0, os.O_DIRECT, os.O_NOATIME))): 8,
    lambda c: ("reopen", c.randrange(HANDLES)): 3,
    lambda c: ("close", c.randrange(HANDLES)): 2,
    lambda c: ("read", c.randrange(HANDLES), c.choice(sorted(WAYS)), _at(c), c.choice(LENGTHS)): 30,
    lambda c: ("seek", c.randrange(HANDLES), _at(c), c.choice((os.SEEK_DATA, os.SEEK_HOLE))): 3,
    lambda c: ("advise", c.randrange(HANDLES), c.choice((os.POSIX_FADV_DONTNEED, os.POSIX_FADV_RANDOM))): 4,
    random_strike: 5,
    lambda c: ("outage", c.choice(("closed", "gone", "gone", "unauthorized", "unauthorized"))): 0.4,
    lambda c: ("mend",): 2,
    lambda c: ("kill",): 0.7,
    lambda c: ("kill_in_refresh", round(c.random() / 20, 4)): 0.5,
    lambda c: ("drop", c.choice((1, 1, 2, 3))): 0.7,
    lambda c: ("wipe",): 0.6,
    lambda c: ("rot", round(c.random(), 3), c.random() < 0.3): 0.6,
}
"""What makes a random operation → how often."""


def random_operations(seed: int, steps: int) -> Iterator[Operation]:
    """Yield a tree, and `steps` operations on it; the same ones for the same seed."""
    chance = random.Random(seed)
    for _ in range(12):
        yield random_put(chance)
    yield ("refresh",)
    makers, weights = [*RANDOM], [*RANDOM.values()]
    for _ in range(steps):
        yield chance.choices(makers, weights)[0](chance)
