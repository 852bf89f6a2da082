"""The messages of FUSE: what is no message is refused, and the layouts are those of the C header."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.fuse import wire
from modelfs.fuse.wire import Init, Opcode, Opening, ProtocolError

HEADER = Path("/usr/include/linux/fuse.h")


def message(opcode: int, body: bytes = b"", *, length: int | None = None, extensions: int = 0) -> memoryview:
    size = wire.HEADER_IN + len(body) if length is None else length
    return memoryview(struct.pack("=IIQQIIIHH", size, opcode, 7, 1, 0, 0, 42, extensions, 0) + body)


def test_a_request_is_its_header_and_its_body() -> None:
    found = wire.request(message(Opcode.LOOKUP, b"name\0"))
    assert (found.opcode, found.unique, found.node, found.pid, bytes(found.body)) == (1, 7, 1, 42, b"name\0")


def test_extensions_are_not_part_of_the_body() -> None:
    assert (
        bytes(wire.request(message(Opcode.LOOKUP, b"name\0\0\0" + bytes(8), extensions=1)).body)
        == b"name\0\0\0"
    )


@given(st.binary(max_size=80), st.integers(0, 200), st.integers(0, 0xFFFF))
def test_a_request_of_another_length_than_it_says_is_refused(
    body: bytes, length: int, extensions: int
) -> None:
    raw = message(Opcode.READ, body, length=length, extensions=extensions)
    if length == len(raw) and extensions * 8 <= len(body):
        wire.request(raw)
        return
    with pytest.raises(ProtocolError):
        wire.request(raw)


@given(st.binary(max_size=wire.HEADER_IN - 1))
def test_what_has_no_header_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        wire.request(memoryview(raw))


@pytest.mark.parametrize("opcode", [*wire.BODIES])
@given(body=st.binary(max_size=64))
def test_a_body_of_fixed_length_has_that_length(opcode: Opcode, body: bytes) -> None:
    layout = wire.BODIES[opcode]
    if len(body) == layout.size:
        assert wire.fields(opcode, memoryview(body)) == layout.unpack(body)
    else:
        with pytest.raises(ProtocolError):
            wire.fields(opcode, memoryview(body))


@given(st.binary(max_size=20))
def test_a_name_ends_with_its_only_nul(raw: bytes) -> None:
    if len(raw) > 1 and raw.index(b"\0") == len(raw) - 1 if b"\0" in raw else False:
        assert wire.name(memoryview(raw)) == raw[:-1]
    else:
        with pytest.raises(ProtocolError):
            wire.name(memoryview(raw))


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=5), st.integers(-9, 9)
)
def test_forgets_hold_as_many_as_they_say(pairs: list[tuple[int, int]], wrong: int) -> None:
    rest = b"".join(struct.pack("=QQ", *pair) for pair in pairs)
    assert wire.forgets(memoryview(struct.pack("=II", len(pairs), 0) + rest)) == pairs
    if wrong:
        count = max(0, len(pairs) + wrong)
        body = struct.pack("=II", count, 0) + rest
        if count != len(pairs):
            with pytest.raises(ProtocolError):
                wire.forgets(memoryview(body))


@pytest.mark.parametrize("parse", [wire.getxattr, wire.forgets])
@pytest.mark.parametrize("size", range(8))
def test_short_bodies_are_refused(parse: object, size: int) -> None:
    assert callable(parse)
    with pytest.raises(ProtocolError):
        parse(memoryview(bytes(size)))


def test_flags_beyond_32_count_only_with_their_announcement() -> None:
    high = int(Init.PASSTHROUGH) >> 32
    body = struct.pack("=IIIII", 7, 41, 131072, int(Init.ASYNC_READ), high)
    assert Init.PASSTHROUGH not in wire.init(memoryview(body)).flags
    body = struct.pack("=IIIII", 7, 41, 131072, int(Init.ASYNC_READ | Init.INIT_EXT), high)
    assert Init.PASSTHROUGH in wire.init(memoryview(body)).flags
    with pytest.raises(ProtocolError):
        wire.init(memoryview(body[:12]))


def test_names_in_a_listing_are_padded_to_eight_bytes() -> None:
    for length in range(1, 20):
        entry = wire.dirent(5, 9, 0o100444, b"n" * length)
        assert len(entry) % 8 == 0
        ino, following, size, kind = struct.unpack_from("=QQII", entry)
        assert (ino, following, size, kind) == (5, 9, length, 8)
        assert entry[24 : 24 + length] == b"n" * length


def test_a_notification_says_its_length_and_its_code() -> None:
    raw = wire.inval_entry(3, b"name")
    length, code, unique = struct.unpack_from("=IiQ", raw)
    assert (length, code, unique) == (len(raw), wire.NOTIFY_INVAL_ENTRY, 0)
    assert raw.endswith(b"name\0")
    raw = wire.inval_attributes(3)
    assert struct.unpack("=IiQQqq", raw) == (len(raw), wire.NOTIFY_INVAL_INODE, 0, 3, -1, 0)
    assert struct.unpack("=IiQ", wire.resend()) == (16, wire.NOTIFY_RESEND, 0)


STRUCTURES = {
    "fuse_in_header": wire.HEADER_IN,
    "fuse_out_header": wire.HEADER_OUT,
    "fuse_entry_out": 128,
    "fuse_attr_out": 104,
    "fuse_open_out": 16,
    "fuse_init_out": 64,
    "fuse_statfs_out": 80,
    "fuse_getxattr_out": 8,
    "fuse_lseek_out": 8,
    "fuse_forget_in": wire.BODIES[Opcode.FORGET].size,
    "fuse_getattr_in": wire.BODIES[Opcode.GETATTR].size,
    "fuse_open_in": wire.BODIES[Opcode.OPEN].size,
    "fuse_read_in": wire.BODIES[Opcode.READ].size,
    "fuse_release_in": wire.BODIES[Opcode.RELEASE].size,
    "fuse_access_in": wire.BODIES[Opcode.ACCESS].size,
    "fuse_interrupt_in": wire.BODIES[Opcode.INTERRUPT].size,
    "fuse_lseek_in": wire.BODIES[Opcode.LSEEK].size,
    "fuse_notify_inval_entry_out": 16,
    "fuse_notify_inval_inode_out": 24,
}
OUT = {
    "fuse_entry_out": wire.absent_out(1.0),
    "fuse_attr_out": wire.attr_out(wire.Attr(1, 0, 0, 0.0, 1, 0, 0, 4096), 1.0),
    "fuse_open_out": wire.open_out(1, Opening(0)),
    "fuse_init_out": wire.init_out(wire.Terms(41, 0, Init(0), 1, 1, 0)),
    "fuse_statfs_out": wire.statfs_out(blocks=1, files=1, block=4096, name_max=255),
    "fuse_getxattr_out": wire.xattr_size_out(1),
    "fuse_lseek_out": wire.lseek_out(1),
}


def test_the_layouts_are_those_of_the_c_header(tmp_path: Path) -> None:
    """Sizes and constants, from the compiler; what this header is too old for is left out."""
    text = HEADER.read_text()
    constants = {f"FUSE_{code.name}": int(code) for code in Opcode}
    constants |= {f"FOPEN_{flag.name}": int(flag) for flag in Opening}
    constants |= {f"FUSE_{flag.name}": int(flag) for flag in Init}
    constants |= {
        "FUSE_NOTIFY_INVAL_ENTRY": wire.NOTIFY_INVAL_ENTRY,
        "FUSE_NOTIFY_INVAL_INODE": wire.NOTIFY_INVAL_INODE,
    }
    known = {name: value for name, value in constants.items() if re.search(rf"\b{name}\b", text)}
    assert len(known) > 40
    program = tmp_path / "layouts.c"
    lines = [f'printf("%zu\\n", sizeof(struct {name}));' for name in STRUCTURES]
    lines += [f'printf("%llu\\n", (unsigned long long){name});' for name in known]
    program.write_text(
        "#include <stdio.h>\n#include <linux/fuse.h>\nint main(){" + "".join(lines) + "return 0;}"
    )
    subprocess.run(["gcc", "-o", tmp_path / "layouts", program], check=True)
    found = [int(line) for line in subprocess.check_output([tmp_path / "layouts"]).split()]
    assert dict(zip(STRUCTURES, found, strict=False)) == STRUCTURES
    assert dict(zip(known, found[len(STRUCTURES) :], strict=True)) == known
    assert {name: len(body) for name, body in OUT.items()} == {name: STRUCTURES[name] for name in OUT}
