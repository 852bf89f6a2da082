"""What a daemon leaves to its successor is read by it, whole."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from modelfs.fuse.ledger import BACKED, CACHED, DIRECTORY, Held, Ledger, Line


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    own = Ledger.create()
    yield own
    os.close(own.fd)


def test_a_successor_reads_what_was_written(ledger: Ledger) -> None:
    ledger.begin(1 << 39 | 5, passthrough=True)
    lines = [Line(1, 10, 100, 0, CACHED), Line(2, 20, 200, 7, BACKED), Line(3, 30, 300, 0, DIRECTORY)]
    for line in lines:
        ledger.open(line)
    ledger.close(1)
    ledger.close(99)  # nobody knows it: nothing happens
    successor = Ledger(ledger.fd)
    assert (successor.incarnation, successor.flags, successor.passthrough) == (1, 1 << 39 | 5, True)
    assert sorted(successor.lines()) == lines[1:]
    assert 2 in successor
    assert 1 not in successor


def test_many_handles_make_it_grow(ledger: Ledger) -> None:
    for handle in range(1, 5001):
        ledger.open(Line(handle, handle, handle, 0, CACHED))
    for handle in range(1, 5001, 2):
        ledger.close(handle)
    assert {line.handle for line in Ledger(ledger.fd).lines()} == set(range(2, 5001, 2))
    for handle in range(5001, 7001):
        ledger.open(Line(handle, handle, handle, 0, CACHED))
    assert len(Ledger(ledger.fd).lines()) == 4500


def test_a_line_that_was_being_written_is_none(ledger: Ledger) -> None:
    ledger.open(Line(5, 10, 100, 0, CACHED))
    place = os.pread(ledger.fd, 1 << 20, 0).index(struct.pack("=QQ", 5, 10))
    os.pwrite(ledger.fd, bytes(8), place)  # all of it is there but the handle, which comes last
    assert Ledger(ledger.fd).lines() == []


def test_each_daemon_counts(ledger: Ledger) -> None:
    held = Held(-1, ledger.fd)
    assert (held.mounted, held.handovers) == (False, 0)
    for _ in range(3):
        Ledger(ledger.fd).begin(0, passthrough=False)
    assert (held.mounted, held.handovers) == (True, 2)


@pytest.mark.parametrize(("offset", "raw"), [(0, b"x"), (8, b"\x02")])
def test_another_version_is_refused(ledger: Ledger, offset: int, raw: bytes) -> None:
    os.pwrite(ledger.fd, raw, offset)
    with pytest.raises(ValueError, match="another version"):
        Ledger(ledger.fd)
