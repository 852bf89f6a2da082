"""`make chaos`, a short one: no reader sees more than a pause; and what would be wrong is noticed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.reader import Reader
from chaos.run import Outcome

ROOT = Path(__file__).parents[1]


@pytest.mark.mount
@pytest.mark.skipif(not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root")
def test_no_reader_sees_more_than_a_pause() -> None:
    words = ["--kills", "3", "--readers", "6", "--seed", "3", "--faults", "0.1", "--json"]
    command = [sys.executable, "-m", "chaos", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["good"]
    assert outcome["kills"] == 3
    assert outcome["handovers"] >= 1
    assert outcome["requests"] > 0
    assert sum(outcome["faults"].values()) > 0


def test_a_reader_notices_wrong_and_missing_bytes(tmp_path: Path) -> None:
    originals, model = tmp_path / "originals", tmp_path / "model"
    for directory in (originals, model):
        directory.mkdir()
        (directory / "f").write_bytes(bytes(1000))
    reader = Reader(model, originals, random.Random(1))
    reader.whole("f")
    reader.mapped("f")
    reader.listing("f")
    assert (reader.found.wrong, reader.found.failed) == (0, 0)
    (model / "f").write_bytes(bytes(500) + b"x" * 400)
    reader.whole("f")
    assert reader.found.wrong == 500
    (model / "f").unlink()
    reader.step()
    assert reader.found.failed == 1
    assert len(reader.found.errors) == 1


@pytest.mark.parametrize(
    "bad", [Outcome(reads=1, wrong_bytes=1), Outcome(reads=1, errors=["x"]), Outcome(reads=1, left_in_d=1)]
)
def test_an_outcome_is_good_only_without_harm(bad: Outcome) -> None:
    assert not bad.good
    assert not Outcome().good  # nobody read anything
    assert Outcome(reads=1).good
