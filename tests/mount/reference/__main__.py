"""The long run: many seeds, one after the other, until one fails."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from modelfs.errors import MountError
from tests.mount.reference.chance import random_operations
from tests.mount.reference.world import Operation, world

FAILURES = AssertionError, OSError, RuntimeError, MountError
"""How a difference between the mount and the reference shows."""


def failure(operations: Sequence[Operation], transport: str) -> tuple[int, str] | None:
    """Do the operations in a world of their own; return how many were done until which error, if any."""
    done: list[Operation] = []
    with world(transport) as own:
        try:
            for operation in operations:
                own.play([operation])
                done.append(operation)
        except FAILURES as error:
            return len(done), str(error)
    return None


def smaller(operations: Sequence[Operation], transport: str) -> Sequence[Operation]:
    """Leave out what is not needed for a failure: first halves, then quarters, and so on."""
    size = len(operations) // 2
    while size:
        start = 0
        while start < len(operations):
            fewer = [*operations[:start], *operations[start + size :]]
            found = failure(fewer, transport)
            if found is None:
                start += size
            else:
                operations = fewer[: found[0] + 1]
        size //= 2
    return operations


def main(words: Sequence[str] | None = None) -> int:
    """Play seeds until one fails or all are done; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mount.reference", description=__doc__)
    parser.add_argument("--transport", choices=("kernel", "pyfuse3"), action="append")
    parser.add_argument("--seed", type=int, default=1, help="the first one (%(default)s)")
    parser.add_argument("--seeds", type=int, default=10, help="how many (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of each (%(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print each operation before it is done")
    parser.add_argument("--shrink", action="store_true", help="look for fewer operations that fail too")
    wanted = parser.parse_args(words)
    for transport in wanted.transport or ("kernel", "pyfuse3"):
        with world(transport) as own:
            for seed in range(wanted.seed, wanted.seed + wanted.seeds):
                own.start_over()
                done: list[Operation] = []
                try:
                    for operation in random_operations(seed, wanted.steps):
                        done.append(operation)
                        if wanted.verbose:
                            print(f"{time.monotonic():.3f} {operation}", flush=True)
                        own.play([operation])
                except FAILURES as error:
                    print(f"{transport}, seed {seed}, operation {len(done)}: {error}")
                    break
            else:
                print(f"{transport}: all right; {dict(own.done.most_common())}", flush=True)
                continue
        if wanted.shrink:
            done = [*smaller(done, transport)]
        print("REGRESSIONS of tests/mount/test_reference.py may have this:")
        print(f'    "{transport}-{seed}": [')
        print("".join(f"        {operation!r},\n" for operation in done) + "    ],")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
