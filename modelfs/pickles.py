"""What a pickle would import, read from its opcodes without executing it.

A pickle is a program whose only way to the outside is to import globals and call them. `scan` walks its
opcodes (:mod:`pickletools` has their table) and skips long payloads unread. It understands plain pickles,
several in a row, ``torch.save`` in its zip and its older form, and joblib files as far as no raw array
interrupts them. What it does not understand it says: `Imports.fault`.
"""

from __future__ import annotations

import os
import pickle  # its constants only: nothing is unpickled here
import pickletools
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import IO, Any

SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill")
"""Ends of the names of files that loaders unpickle; some can be something else, which `scan` sees."""

MAX_OPCODES = 2_000_000
"""Opcodes of the longest pickle that is scanned: a few seconds' work. Weights are payloads, not opcodes."""

MAX_NAME = 4096
"""Bytes of the longest text that can be part of a name; longer ones are skipped unread."""

MAX_FILE = 1 << 60
"""Bytes that no file has: what claims to hold more is broken."""

UNKNOWN = "a name that is computed"
"""Stands for a global whose name cannot be told from the opcodes."""

_HARMLESS: Mapping[str, str] = {
    "torch": "BFloat16Storage BoolStorage ByteStorage CharStorage ComplexDoubleStorage ComplexFloatStorage "
    "DoubleStorage FloatStorage HalfStorage IntStorage LongStorage QInt32Storage QInt8Storage "
    "QUInt2x4Storage QUInt4x2Storage QUInt8Storage ShortStorage Size Tensor bfloat16 bool complex128 "
    "complex64 device float16 float32 float64 int16 int32 int64 int8 uint8",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": "_rebuild_parameter _rebuild_qtensor _rebuild_sparse_tensor _rebuild_tensor "
    "_rebuild_tensor_v2 _rebuild_tensor_v3",
    "torch.nn.parameter": "Parameter",
    "torch.serialization": "_get_layout",
    "torch.storage": "TypedStorage UntypedStorage",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "builtins": "bytearray complex frozenset set",
    "__builtin__": "bytearray complex frozenset set",
    "_codecs": "encode",
    "collections": "Counter OrderedDict",
}
HARMLESS = frozenset(f"{module}.{name}" for module, names in _HARMLESS.items() for name in names.split())
"""Globals that build tensors, arrays and containers and can do nothing else, whatever they are called with.

They are those of ``torch.load(weights_only=True)`` and NumPy's. ``torch.storage._load_from_bytes`` is not
among them: it unpickles.
"""


@dataclass(frozen=True, slots=True)
class Imports:
    """What a file would import when it is unpickled.

    Attributes:
        globals: ``module.name`` of each, sorted.
        fault: why there may be others, or None if these are all.

    """

    globals: tuple[str, ...] = ()
    fault: str | None = None

    @property
    def suspicion(self) -> str | None:
        """What speaks against unpickling it, on one line; None if nothing does."""
        strange = [name for name in self.globals if name not in HARMLESS]
        names = ", ".join(map(_shown, strange[:8])) + " …" * (len(strange) > 8)
        return "; ".join(filter(None, [names and f"it imports {names}", self.fault])) or None


class _Broken(Exception):
    """Here every unpickler fails: what has not been imported yet will not be."""


class _NotUnderstood(Exception):
    """From here on this scanner does not know what an unpickler does."""


def is_pickle(path: str) -> bool:
    """Return whether loaders unpickle a file of this name."""
    return path.lower().endswith(SUFFIXES)


def scan(content: IO[bytes]) -> Imports:
    """Return what unpickling `content`, seekable and at its start, would import; reads no long payload.

    What reading from `content` raises is raised, but for ``RuntimeError``, ``ValueError`` and ``EOFError``.
    """
    found: set[str] = set()
    head = content.read(4)
    content.seek(0)
    fault = None
    try:
        if head == b"PK\x03\x04":  # what torch.load looks at; pickle.load fails at the first byte
            for member in _pickles_in(content):
                with member:
                    _scan_stream(member, found)
        elif head.startswith(_COMPRESSED) or _is_tar(content):
            fault = "it is compressed or an archive, in which pickles are not looked for"
        else:
            _scan_stream(content, found)
    except _NotUnderstood as error:
        fault = str(error)
    except _Broken as error:
        # Nothing imported is nothing done; but some globals read on by themselves, as joblib's arrays do.
        fault = str(error) if found - HARMLESS else None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError) as error:
        fault = f"it cannot be scanned ({type(error).__name__})"
    return Imports(tuple(sorted(found)), fault)


_COMPRESSED = (b"x", b"\x1f\x8b", b"BZ", b"]\0", b"\xfd7zX", b"\x04\x22\x4d\x18", b"7z\xbc\xaf")
"""How files begin that joblib decompresses: zlib, gzip, bzip2, lzma, xz, lz4; and 7-Zip's."""


def _is_tar(content: IO[bytes]) -> bool:
    """Return whether `content` begins like the archives that the oldest torch made."""
    block = content.read(tarfile.BLOCKSIZE)
    content.seek(0)
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _pickles_in(content: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the pickles of an archive of ``torch.save``; its other members are raw tensors."""
    with zipfile.ZipFile(content) as archive:
        for member in archive.infolist():
            if member.filename.lower().endswith(".pkl"):
                yield archive.open(member)


_TORCH_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first pickle of the older form of ``torch.save``; four more follow, then raw tensors."""


def _scan_stream(content: IO[bytes], found: set[str]) -> None:
    start = content.read(2 + len(_TORCH_MAGIC))
    content.seek(0)
    for number in range(5) if start[:1] == b"\x80" and start[2:] == _TORCH_MAGIC else count():
        if number and not content.read(1):
            return
        if number:
            content.seek(-1, os.SEEK_CUR)
        _scan_one(content, found)


def _scan_one(content: IO[bytes], found: set[str]) -> None:
    """Add what the pickle at the position of `content` imports to `found`, and stop behind it."""
    recent: list[str | None] = []  # the top of the stack; None is something else than text
    memo: dict[int, str | None] = {}
    for _ in range(MAX_OPCODES):
        code = content.read(1)
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise _Broken("it holds more than opcodes, such as raw arrays" if code else "it ends early")
        argument = _argument(content, opcode)
        match opcode.name:
            case "STOP":
                return
            case "PROTO":
                if _number(argument) > pickle.HIGHEST_PROTOCOL:
                    raise _NotUnderstood("it is of a protocol that is not known here")
            case "FRAME":
                pass
            case "GLOBAL" | "INST":
                found.add(UNKNOWN if argument is None else str(argument))
                recent = [None]
            case "STACK_GLOBAL":
                names = [name for name in recent[-2:] if name is not None]
                found.add(".".join(names) if len(names) == 2 else UNKNOWN)
                recent = [None]
            case "EXT1" | "EXT2" | "EXT4":
                found.add("an extension registered with copyreg")
                recent = [None]
            case "MEMOIZE":
                memo[len(memo)] = recent[-1] if recent else None
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[_number(argument)] = recent[-1] if recent else None
            case "GET" | "BINGET" | "LONG_BINGET":
                recent.append(memo.get(_number(argument)))
            case _ if opcode.name in _TEXTS:
                recent.append(argument if isinstance(argument, str) else None)
            case _:
                recent = []
    raise _NotUnderstood(f"it has more than {MAX_OPCODES:,} opcodes")


_OPCODES: Mapping[bytes, Any] = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_TEXTS = frozenset(
    {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"}
)
_LENGTHS: Mapping[int, tuple[int, bool]] = {
    pickletools.TAKEN_FROM_ARGUMENT1: (1, False),
    pickletools.TAKEN_FROM_ARGUMENT4: (4, True),
    pickletools.TAKEN_FROM_ARGUMENT4U: (4, False),
    pickletools.TAKEN_FROM_ARGUMENT8U: (8, False),
}
"""How an argument says its length: bytes of the length, and whether it is signed."""


def _argument(content: IO[bytes], opcode: Any) -> str | int | None:
    """Read the argument of an opcode; None if there is none, or it cannot be part of a name."""
    if opcode.arg is None:
        return None
    size: int = opcode.arg.n
    if size == pickletools.UP_TO_NEWLINE:
        lines = [_line(content) for _ in range(2 if "pair" in opcode.arg.name else 1)]
        known = [line.decode("utf-8", "backslashreplace") for line in lines if line is not None]
        text = ".".join(known)
        return None if len(known) < len(lines) else text.strip("'\"") if opcode.name == "STRING" else text
    if size >= 0:
        return int.from_bytes(_exactly(content, size), "little")
    width, signed = _LENGTHS[size]
    length = int.from_bytes(_exactly(content, width), "little", signed=signed)
    if not 0 <= length <= MAX_FILE:
        raise _Broken("it holds a text of an impossible length")
    if opcode.name in _TEXTS and length <= MAX_NAME:
        return _exactly(content, length).decode("utf-8", "backslashreplace")
    content.seek(length, os.SEEK_CUR)  # beyond the end there is no next opcode
    return None


def _line(content: IO[bytes]) -> bytes | None:
    """Read one line; return None if it is too long to be a name."""
    line = part = content.readline(MAX_NAME)
    while part and not part.endswith(b"\n"):
        line, part = b"", content.readline(MAX_NAME)
    if not part:
        raise _Broken("it ends early")
    return line[:-1] if line else None


def _exactly(content: IO[bytes], size: int) -> bytes:
    data = content.read(size)
    if len(data) != size:
        raise _Broken("it ends early")
    return data


def _number(argument: str | int | None) -> int:
    if argument is None:
        raise _NotUnderstood("it holds a number of very many digits")
    try:
        return int(argument)
    except ValueError:
        raise _Broken("it holds a malformed number") from None


def _shown(name: str) -> str:
    """Return a name from a file for a message: short, and on one line."""
    text = name.encode("ascii", "backslashreplace").decode()
    return "".join(character if character.isprintable() else "?" for character in text)[:100]
