"""What stores publish about contents: the algorithms, and hash objects for them."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import crc32c as _crc32c


class Hasher(Protocol):
    """The part of :mod:`hashlib`'s objects that digests need."""

    def update(self, data: Any, /) -> None:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """Return the digest of everything so far in lower-case hex."""


class _Crc32:
    """CRC-32 as of zlib, in the shape of a hash object; S3 calls it ``CRC32``."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


class _Crc32c:
    """CRC-32C (Castagnoli), in the shape of a hash object; S3 and GCS call it ``CRC32C``."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = crc32c(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def crc32c(data: Any, value: int = 0) -> int:
    """Return the CRC-32C of `data` (any buffer), continuing from `value`; long buffers release the GIL."""
    return _crc32c.crc32c(data, value)


Algorithm = Literal["sha256", "sha512", "sha1", "md5", "git-sha1", "crc32", "crc32c"]

_HEX_LENGTH: Mapping[str, int] = {
    "sha256": 64,
    "sha512": 128,
    "sha1": 40,
    "md5": 32,
    "git-sha1": 40,
    "crc32": 8,
    "crc32c": 8,
}


@dataclass(frozen=True, slots=True)
class Digest:
    r"""What a store publishes about the content of one object, written ``algorithm:hex``.

    ``git-sha1`` is the id of a git blob: SHA-1 over ``blob SIZE\0`` and the content
    (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects).
    """

    algorithm: Algorithm
    value: str

    def __post_init__(self) -> None:
        length = _HEX_LENGTH.get(self.algorithm)
        if length is None or not re.fullmatch(rf"[0-9a-f]{{{length}}}", self.value):
            raise ValueError(f"not a digest: {self.algorithm}:{self.value[:140]}")

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest written ``algorithm:hex``.

        Raises:
            ValueError: if `text` is not of that form.

        """
        algorithm, _, value = text.partition(":")
        return cls(algorithm, value.lower())  # type: ignore[arg-type]  # __post_init__ checks it

    def hasher(self, size: int) -> Hasher:
        """Return a fresh hash object of this algorithm for content of `size` bytes."""
        match self.algorithm:
            case "crc32":
                return _Crc32()
            case "crc32c":
                return _Crc32c()
            case "git-sha1":
                hasher = hashlib.sha1(usedforsecurity=False)
                hasher.update(b"blob %d\0" % size)
                return hasher
            case algorithm:
                return hashlib.new(algorithm, usedforsecurity=False)
