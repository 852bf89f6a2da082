"""``modelfs bench`` measures a store through a mount of its own, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mount.harness import modelfs
from tests.origin import Origin

MIB = 1024 * 1024


def test_a_store_is_measured_and_nothing_is_left(place: Path, transport: str) -> None:
    beside = place / "disk"
    with Origin({"small.json": b"{}", "weights/w.safetensors": bytes(range(256)) * 4096 * 9}) as origin:
        words = ["bench", origin.url, "--cache-dir", str(beside / "cache"), "--transport", transport]
        found = json.loads(modelfs(*words, "--json").stdout)
        shown = modelfs(*words, "small.json").stdout
    assert found["path"] == "weights/w.safetensors"  # the largest
    assert (found["bytes"], found["transport"]) == (9 * MIB, transport)
    assert all(found[speed] > 0 for speed in ("download", "cold", "warm", "local", "answer_seconds"))
    assert "small.json" in shown
    assert "× download" in shown
    assert list(beside.iterdir()) == [beside / "cache"]
    assert list((beside / "cache").iterdir()) == []
    assert str(beside) not in Path("/proc/self/mountinfo").read_text()


def test_no_more_is_read_than_was_asked_for(place: Path) -> None:
    with Origin({"a.dat": bytes(40 * MIB)}) as origin:
        words = ["bench", origin.url, "a.dat", "--size", "10MiB", "--json"]
        found = json.loads(modelfs(*words, "--cache-dir", str(place / "cache")).stdout)
    assert found["bytes"] == 10 * MIB


@pytest.mark.parametrize("path", ["", "no/such.bin"])
def test_a_store_without_the_file_is_one_line(place: Path, path: str) -> None:
    with Origin({"empty.bin": b""}) as origin:
        words = [word for word in ("bench", origin.url, path) if word]
        result = modelfs(*words, "--cache-dir", str(place / "cache"), check=False)
    assert result.returncode == 6
    assert result.stderr.count("\n") == 1
