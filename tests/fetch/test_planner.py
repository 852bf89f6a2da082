"""The planner is a pure function: state in, blocks to fetch out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.fetch.planner import (
    MAX_STREAMS,
    MAX_WINDOW,
    Priority,
    Step,
    Stream,
    advance,
    following,
    is_weights,
    plan,
)
from modelfs.types import BLOCK, Span

MIB = 1024 * 1024


def steps(
    blocks: int,
    *,
    absent: set[int] | None = None,
    demand: tuple[int, ...] = (),
    streams: tuple[Stream, ...] = (),
    whole: bool = False,
) -> list[Step]:
    missing = set(range(blocks)) if absent is None else absent
    return list(plan(blocks=blocks, absent=missing.__contains__, demand=demand, streams=streams, whole=whole))


def test_nothing_wanted_nothing_planned() -> None:
    assert steps(100) == []


def test_demand_comes_first_and_in_order() -> None:
    planned = steps(10, demand=(7, 2), streams=(Stream(5 * BLOCK, 3 * BLOCK),), whole=True)
    assert planned[:2] == [Step(7, Priority.DEMAND), Step(2, Priority.DEMAND)]
    assert [s.priority for s in planned] == sorted(s.priority for s in planned)


def test_one_look_into_the_middle_pulls_nothing_else() -> None:
    middle = 512 * MIB
    streams = advance((), Span(middle, middle + 100 * 1024))
    planned = steps(128, demand=(middle // BLOCK,), streams=streams)
    assert planned == [Step(middle // BLOCK, Priority.DEMAND)]


def test_readahead_grows_with_what_a_stream_consumed() -> None:
    windows = [Stream(0, consumed).window for consumed in (0, MIB, BLOCK, 2 * BLOCK, 5 * BLOCK, 100 * BLOCK)]
    assert windows == [0, 1, 1, 2, 5, MAX_WINDOW]


def test_a_sequential_reader_is_one_stream() -> None:
    streams: tuple[Stream, ...] = ()
    for start in range(0, 4 * BLOCK, MIB):
        streams = advance(streams, Span(start, start + MIB))
    assert streams == (Stream(4 * BLOCK, 4 * BLOCK),)


def test_parallel_readers_at_distant_offsets_are_streams_of_their_own() -> None:
    streams: tuple[Stream, ...] = ()
    starts = [n * 20 * BLOCK for n in range(8)]
    for step in range(4):
        for start in starts:
            streams = advance(streams, Span(start + step * MIB, start + (step + 1) * MIB))
    assert sorted(s.position for s in streams) == [start + 4 * MIB for start in starts]
    assert all(s.consumed == 4 * MIB for s in streams)


def test_the_longest_idle_stream_is_forgotten() -> None:
    streams: tuple[Stream, ...] = ()
    for n in range(MAX_STREAMS + 3):
        streams = advance(streams, Span(n * 10 * BLOCK, n * 10 * BLOCK + 1))
    assert len(streams) == MAX_STREAMS
    assert streams[0].position == 3 * 10 * BLOCK + 1


def test_a_weight_file_is_fetched_whole_onward_from_its_reader() -> None:
    planned = steps(6, absent={0, 1, 4, 5}, streams=(Stream(3 * BLOCK, 10),), whole=True)
    assert [s.block for s in planned] == [4, 5, 0, 1]


def test_names_of_weight_files() -> None:
    assert all(map(is_weights, ("a/model.safetensors", "pytorch_model.bin", "x.GGUF", "best_model.pkl")))
    assert not any(map(is_weights, ("config.json", "tokenizer.json", "bin", "model.safetensors.index.json")))


@given(
    blocks=st.integers(0, 40),
    absent=st.sets(st.integers(0, 45)),
    demand=st.lists(st.integers(0, 39), unique=True),
    streams=st.lists(
        st.builds(Stream, position=st.integers(0, 41 * BLOCK), consumed=st.integers(0, 41 * BLOCK)),
        max_size=4,
    ),
    whole=st.booleans(),
)
def test_a_plan_is_sound(
    blocks: int, absent: set[int], demand: list[int], streams: list[Stream], whole: bool
) -> None:
    planned = steps(blocks, absent=absent, demand=tuple(demand), streams=tuple(streams), whole=whole)
    chosen = [s.block for s in planned]
    assert len(chosen) == len(set(chosen)), "a block is planned once"
    assert all(0 <= block < blocks and block in absent for block in chosen)
    assert {b for b in demand if b < blocks and b in absent} == {
        s.block for s in planned if s.priority is Priority.DEMAND
    }
    if whole:
        assert set(chosen) == {block for block in absent if block < blocks}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"),
        ("unet/pytorch_model-00009-of-00010.bin", "unet/pytorch_model-00010-of-00010.bin"),
        ("model-00003-of-00003.safetensors", None),
        ("model.safetensors", None),
        ("model-1-of-3.safetensors", None),
    ],
)
def test_the_shard_after_a_shard(path: str, expected: str | None) -> None:
    assert following(path) == expected


def test_a_learned_order_goes_before_the_rest() -> None:
    steps = plan(
        blocks=6, absent=lambda block: block != 3, demand=[5], streams=(), whole=True, order=[4, 3, 1]
    )
    assert [step.block for step in steps] == [5, 4, 1, 0, 2]
