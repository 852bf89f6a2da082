"""Random reads of a mounted file in every way, compared with the original, in the manner of fsx.

``python -m tests.mount.fsx MOUNTED ORIGINAL SEED COUNT`` prints what is wrong and exits with 1, or the count.
"""

from __future__ import annotations

import os
import random
import sys

from tests.mount.actor import WAYS

ADVICES = (
    *(os.POSIX_FADV_DONTNEED, os.POSIX_FADV_RANDOM, os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_WILLNEED),
    *(os.POSIX_FADV_NOREUSE, os.POSIX_FADV_NORMAL),
)


def main(mounted: str, original: str, seed: str, count: str) -> None:
    """Read `count` spans; SystemExit at the first that is wrong."""
    chance = random.Random(int(seed))
    right, fd = os.open(original, os.O_RDONLY), os.open(mounted, os.O_RDONLY)
    size = os.fstat(right).st_size
    if os.fstat(fd).st_size != size:
        sys.exit(f"the size is {os.fstat(fd).st_size}, not {size}")
    for number in range(int(count)):
        way = chance.choice(sorted(WAYS))
        offset = chance.choice([chance.randrange(size + 2), max(0, size - chance.randrange(9000)), size])
        length = chance.choice([chance.randrange(1, 9000), chance.randrange(1, 1 << 20), 4096])
        if chance.random() < 0.2:
            os.posix_fadvise(fd, offset, chance.choice([0, length]), chance.choice(ADVICES))
        if chance.random() < 0.1:
            os.close(fd)
            fd = os.open(mounted, os.O_RDONLY)
        found, wanted = WAYS[way](fd, offset, length), os.pread(right, length, offset)
        if found != wanted:
            sys.exit(
                f"{number}: {way} from {offset} of {length}: {len(found)} bytes of {len(wanted)}, or wrong"
            )
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
