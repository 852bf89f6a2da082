"""Packed streams unpack to what was packed, also from a checkpoint on; damage never passes; fuzzing."""

from __future__ import annotations

import gzip
import io
import os
import random
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfs.archives import Contents, Limits, tar, zips
from modelfs.archives.gzip import Gzip
from modelfs.archives.streams import Checkpoint, Stream
from modelfs.archives.zstd import Zstd
from modelfs.errors import BadArchive
from tests.archives.hostile import CORPUS
from tests.archives.packing import tarred, zipped

TEXT = b"".join(b"token %d\n" % (n * 7919 % 10007) for n in range(200_000))
NOISE = random.Random(5).randbytes(1024**2)
EXAMPLES = int(os.environ.get("MODELFS_FUZZ_EXAMPLES", "250"))
"""How many archives are made up; ``make fuzz`` makes up many."""

LIMITS = Limits(members=50, size=1024**2, ratio=10)


def whole(stream: Stream) -> bytes:
    return b"".join(iter(lambda: stream.read(100_000), b""))


def frames(data: bytes) -> bytes:
    """Pack as several frames with something skippable between them."""
    skipped = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"table"
    parts = [data[start : start + 300_000] for start in range(0, len(data), 300_000)]
    return skipped.join(map(zstandard.compress, parts)) + skipped


@pytest.mark.parametrize(
    ("codec", "pack"),
    [
        (Gzip, lambda data: gzip.compress(data, 1)),
        (Gzip, lambda data: gzip.compress(data[:99]) + bytes(7) + gzip.compress(data[99:], 6) + bytes(9)),
        (Gzip, lambda data: gzip.compress(data, 0)),
        (Zstd, frames),
        (Zstd, zstandard.compress),
        (Zstd, zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress),
    ],
    ids=["gzip", "gzip, two members", "gzip, stored", "zstd, frames", "zstd", "zstd, checksum"],
)
@pytest.mark.parametrize("data", [TEXT, NOISE, b""], ids=["text", "noise", "nothing"])
def test_a_stream_can_be_entered_at_its_checkpoints(
    codec: Callable[..., Stream], pack: Callable[[bytes], bytes], data: bytes
) -> None:
    packed = pack(data)
    points: list[Checkpoint] = []
    stream = codec(io.BytesIO(packed), None, 200_000, points.append)
    assert whole(stream) == data
    assert stream.position == len(data)
    if codec is Gzip and data:
        assert len(points) >= 3
    for point in points:
        assert whole(codec(io.BytesIO(packed), point)) == data[point.unpacked :]


@pytest.mark.parametrize("codec", [Gzip, Zstd])
@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_or_changed_stream_is_refused(codec: Callable[..., Stream], where: float) -> None:
    checked = zstandard.ZstdCompressor(write_checksum=True)
    packed = gzip.compress(TEXT) if codec is Gzip else checked.compress(TEXT)
    at = int(len(packed) * where)
    if at:
        with pytest.raises(BadArchive, match=r"truncated|ends"):
            whole(codec(io.BytesIO(packed[:at])))
    changed = packed[:at] + bytes([packed[at] ^ 0xFF]) + packed[at + 1 :]
    with pytest.raises(BadArchive):
        whole(codec(io.BytesIO(changed)))
    with pytest.raises(BadArchive, match="something else"):
        whole(codec(io.BytesIO(packed + b"more")))


def parsed(kind: str, data: bytes) -> Contents:
    contents, file = Contents(LIMITS), io.BytesIO(data)
    if kind == "zip":
        for member in zips.members(file, len(data), LIMITS):
            contents.add(zips.linked(file, member) if member.kind == "symlink" else member)
    else:
        for member in tar.members(file, LIMITS):
            contents.add(member)
    return contents


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_no_change_of_an_archive_makes_a_parser_fail_in_another_way(data: st.DataObject) -> None:
    hostile = data.draw(st.sampled_from([one for one in CORPUS if len(one.data) < 20_000]))
    raw = bytearray(hostile.data)
    for _ in range(data.draw(st.integers(0, 8))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        contents = parsed(hostile.kind, bytes(raw))
    except BadArchive:
        return
    for path, member in contents.members.items():
        assert not path.startswith("/")
        assert ".." not in path.split("/")
        assert member.size >= 0
        assert member.offset >= 0


NAMES = st.text(st.sampled_from("abc/. é"), min_size=1, max_size=30)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=2000), max_size=8), st.sampled_from([*range(3)]))
def test_what_is_shown_of_an_archive_is_what_was_packed(files: dict[str, bytes], form: int) -> None:
    packed = tarred(files, form=form)
    for member in parsed("tar", packed).members.values():
        if member.kind == "file":
            content = packed[member.offset : member.offset + member.size]
            assert content in files.values()
    packed = zipped(files)
    for member in parsed("zip", packed).members.values():
        if member.kind == "file":
            assert whole(zips.content(io.BytesIO(packed), member, 0)) in files.values()
