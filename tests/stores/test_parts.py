"""Which names are parts of a split file."""

from __future__ import annotations

import random

import pytest

from modelfs.stores.parts import splits


@pytest.mark.parametrize(
    "names",
    [
        ["m.gguf.001", "m.gguf.002", "m.gguf.003"],
        ["m.gguf.000", "m.gguf.001"],
        ["m.gguf.part1", "m.gguf.part2"],
        [f"m.gguf.part{number}" for number in range(1, 13)],
        ["m.gguf.part-00", "m.gguf.part-01"],
        ["m.gguf.part_aa", "m.gguf.part_ab"],
        ["m.gguf.partaa", "m.gguf.partab"],
        ["m.gguf.aa", "m.gguf.ab", "m.gguf.ac"],
        [f"m.gguf.part-{a}{b}" for a in "ab" for b in "abcdefghijklmnopqrstuvwxyz"],
    ],
)
def test_a_whole_sequence_is_one_file(names: list[str]) -> None:
    shuffled = random.Random(1).sample(names, len(names))
    [split] = splits(["README.md", *shuffled, "model-00001-of-00002.safetensors"])
    assert (split.name, list(split.parts), split.fault) == ("m.gguf", names, "")


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["m.001", "m.003"], "1 of its 3 parts are missing, the first of them is part 2"),
        (["m.002", "m.003"], "1 of its 3 parts are missing, the first of them is part 1"),
        (["m.part-ab", "m.part-ad"], "2 of its 4 parts are missing, the first of them is part 1"),
        (["m.part1", "m.part01", "m.part2"], "two of its parts have the same number"),
    ],
)
def test_a_sequence_with_a_gap_is_refused(names: list[str], fault: str) -> None:
    [split] = splits(names)
    assert split.fault == fault
    assert sorted(split.parts) == sorted(names)


@pytest.mark.parametrize(
    "names",
    [
        ["m.001"],
        ["m.part1", "n.part1"],
        ["model.py", "model.md", "model.gz"],
        ["model.bin", "model.txt"],
        ["model.2024", "model.2025"],
        ["libx.so.1", "libx.so.2"],
        [".001", ".002"],
        ["m-part1", "m-part2"],
    ],
)
def test_other_names_are_files_of_their_own(names: list[str]) -> None:
    assert splits(names) == []
