"""An unpacked stream as the pass over an archive reads it: headers for the parser, contents for readers."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from modelfs.archives import Limits, Member
from modelfs.archives.streams import Stream
from modelfs.errors import BadArchive
from modelfs.fetch.sweep import CHUNK, Requests


class Passing:
    """What a parser reads of a stream; a `modelfs.archives.File`, used by the thread of the pass alone.

    Args:
        stream: what is unpacked.
        requests: of those who read members that have not gone by.
        limits: what the stream must not exceed.
        wait: called before each step; returns when somebody needs what follows.
        read: called with the path and digest of each member whose content went by.

    """

    def __init__(
        self,
        stream: Stream,
        requests: Requests,
        limits: Limits,
        wait: Callable[[], None],
        read: Callable[[str, str], None],
    ) -> None:
        self._stream = stream
        self._requests = requests
        self._limits = limits
        self._wait = wait
        self._note = read
        self._member: Member | None = None

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""
        parts = []
        while size and (data := self._next(size)):
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def expect(self, member: Member | None) -> None:
        """Say whose content follows: a file that is shown, or None."""
        self._member = member

    def seek(self, offset: int) -> None:
        """Go on at `offset`, handing what is passed over to who needs it."""
        member, self._member = self._member, None
        hasher = sha256()
        stop = member.offset + member.size if member else offset
        while self._stream.position < offset:
            self._wait()
            here = self._stream.position
            data = self._next(min(CHUNK, (stop if here < stop else offset) - here))
            if not data:
                raise BadArchive("it is truncated in the content of a member")
            if here < stop:
                hasher.update(data)
        if member:
            self._note(member.path, f"sha256:{hasher.hexdigest()}")

    def drain(self) -> None:
        """Read what is behind the end of the archive: checksums are there."""
        while self._next(CHUNK):
            self._wait()

    def _next(self, size: int) -> bytes:
        offset = self._stream.position
        data = self._stream.read(size)
        self._limits.check_size(self._stream.position)
        self._limits.check_ratio(self._stream.position, self._stream.packed)
        self._requests.serve(offset, data)
        return data
