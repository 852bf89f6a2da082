"""A short storm: whatever comes together, nobody sees a wrong byte. The long one is ``make storm``."""

from __future__ import annotations

from pathlib import Path

from modelfs.testing.faults import FAULTS
from tests.faults.rig import WRONG
from tests.faults.storm import FILES, raging

CLEAN = {"right", "AccessDenied", "BadAnswer", "Corrupt", "Stale", "Unavailable"}


def test_in_a_storm_readers_get_the_right_bytes_or_one_clean_error(tmp_path: Path) -> None:
    report = raging(faults=300, seconds=60, seed=1, directory=tmp_path)
    assert report.outcomes[WRONG] == 0, report
    assert set(report.outcomes) <= CLEAN, report
    assert report.outcomes["right"] > len(FILES), report
    assert report.injected.keys() == FAULTS.keys(), report
