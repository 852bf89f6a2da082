"""Which blocks to get next: pure functions from what is known to what to do.

Nothing here waits, reads a clock or changes its arguments; ``modelfs.fetch.engine`` feeds in the state and
starts what comes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase

from modelfs.types import BLOCK, Span

WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.onnx",
    "*.onnx.data",
    "*.onnx_data",
    "*.pkl",
    "*.joblib",
    "*.h5",
    "*.msgpack",
)
"""Names of files that a loader reads whole sooner or later: fetched whole from open."""

MAX_STREAMS = 16
"""Positions remembered per object: parallel loaders read one file at up to this many places at once."""

MAX_WINDOW = 8
"""Most blocks of readahead for one stream."""

SLACK = BLOCK
"""How far, in bytes, a read may jump from where a stream stands and still belong to it.

The kernel reads ahead up to 1 MiB and sends such reads in parallel, so they arrive out of order.
"""


class Priority(IntEnum):
    """Why a block is fetched; the smaller goes first."""

    DEMAND = 0
    READAHEAD = 1
    PREFETCH = 2


@dataclass(frozen=True, slots=True)
class Step:
    """Fetch this block for this reason."""

    block: int
    priority: Priority


@dataclass(frozen=True, slots=True)
class Stream:
    """One reader's way through an object: `position` is the end of its furthest read, both in bytes."""

    position: int
    consumed: int

    @property
    def window(self) -> int:
        """Blocks of readahead this stream has earned.

        None before 1 MiB was consumed (a single look into the middle of a file pulls nothing extra), one
        within the first block, then as many as were consumed, up to `MAX_WINDOW`.
        """
        if self.consumed < BLOCK // 8:
            return 0
        return max(1, min(MAX_WINDOW, self.consumed // BLOCK))


def is_weights(path: str) -> bool:
    """Return whether `path` names a weight file."""
    name = path.rpartition("/")[2].lower()
    return any(fnmatchcase(name, pattern) for pattern in WEIGHTS)


def following(path: str) -> str | None:
    """Return the path of the shard after `path`, None if it is no shard or the last one.

    Whoever writes a ``*.index.json`` (transformers, diffusers) names shards ``NAME-00001-of-00003.EXT``.
    """
    found = re.fullmatch(r"(.*-)(\d{5})(-of-)(\d{5})(\.[^/]*)", path, re.DOTALL)
    if found is None or int(found[2]) >= int(found[4]):
        return None
    return f"{found[1]}{int(found[2]) + 1:05d}{found[3]}{found[4]}{found[5]}"


def advance(streams: Sequence[Stream], span: Span) -> tuple[Stream, ...]:
    """Return `streams` after a read of `span`, the one that took it last.

    The nearest stream within `SLACK` takes the read; without one a new stream begins. The one that has been
    idle longest is forgotten beyond `MAX_STREAMS`.
    """
    near = [s for s in streams if s.position - SLACK <= span.start <= s.position + SLACK]
    if near:
        best = min(near, key=lambda s: abs(s.position - span.start))
        rest = [s for s in streams if s is not best]
        moved = Stream(max(best.position, span.stop), best.consumed + len(span))
    else:
        rest, moved = list(streams), Stream(span.stop, len(span))
    return (*rest[-(MAX_STREAMS - 1) :], moved)


def plan(
    *,
    blocks: int,
    absent: Callable[[int], bool],
    demand: Iterable[int],
    streams: Sequence[Stream],
    whole: bool,
    order: Sequence[int] = (),
) -> Iterator[Step]:
    """Yield what to fetch next, most urgent first, each block once.

    Args:
        blocks: how many blocks the object has.
        absent: whether a block is neither cached nor on its way.
        demand: blocks that readers are waiting for, oldest wish first.
        streams: where readers are, most recent last.
        whole: fetch everything in the end: onward from the most recent stream, then what lies before it.
        order: blocks in the order in which an earlier load read them; with `whole` they go before the rest.

    """
    planned: set[int] = set()

    def fresh(candidates: Iterable[int], priority: Priority) -> Iterator[Step]:
        for block in candidates:
            if 0 <= block < blocks and block not in planned and absent(block):
                planned.add(block)
                yield Step(block, priority)

    yield from fresh(demand, Priority.DEMAND)
    for stream in reversed(streams):
        here = max(0, stream.position - 1) // BLOCK
        yield from fresh(range(here, here + 1 + stream.window), Priority.READAHEAD)
    if whole:
        yield from fresh(order, Priority.PREFETCH)
        start = max(0, streams[-1].position - 1) // BLOCK if streams else 0
        yield from fresh(range(start, blocks), Priority.PREFETCH)
        yield from fresh(range(start), Priority.PREFETCH)
