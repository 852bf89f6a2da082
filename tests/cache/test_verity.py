"""fs-verity: refused here for real; where it is granted, at its seam: what the kernel asks for is kept.

The stand-in for the kernel grants it as linux/fsverity.h says: to a descriptor that is open for reading
only, of a file that may be written and that nobody has open for writing; and from then on it watches that
nobody changes the file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from modelfs.cache import Cache, CacheObject, verity
from modelfs.errors import CacheError
from modelfs.types import BLOCK, Digest, Span
from tests.cache import cache_at, content, damage, data_file, open_cache, put, whole

SIZE = 2 * BLOCK + 5
DATA = content(SIZE)
DIGEST = Digest("sha256", hashlib.sha256(DATA).hexdigest())


class Kernel:
    """Grants fs-verity, and remembers the files."""

    def __init__(self) -> None:
        self.sealed: dict[int, tuple[int, bytes]] = {}
        """Inode → a descriptor of its own and what the file held."""

    def enable(self, fd: int) -> None:
        facts = os.fstat(fd)
        if not facts.st_mode & 0o200:  # as an ordinary user meets it
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        for name in os.listdir("/proc/self/fd"):
            try:
                other = os.fstat(int(name))
                flags = fcntl.fcntl(int(name), fcntl.F_GETFL)
            except OSError:  # the directory that was listed
                continue
            if other.st_ino == facts.st_ino and flags & os.O_ACCMODE != os.O_RDONLY:
                raise OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY))
        self.sealed[facts.st_ino] = os.dup(fd), os.pread(fd, facts.st_size, 0)

    def is_enabled(self, fd: int) -> bool:
        return os.fstat(fd).st_ino in self.sealed

    def close(self) -> None:
        for fd, held in self.sealed.values():
            assert os.pread(fd, len(held) + 1, 0) == held, "a sealed file was changed"
            os.close(fd)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel()
    monkeypatch.setattr(verity, "enable", kernel.enable)
    monkeypatch.setattr(verity, "is_enabled", kernel.is_enabled)
    yield kernel
    kernel.close()


@pytest.fixture
def cache(kernel: Kernel, tmp_path: Path) -> Iterator[Cache]:
    with cache_at(tmp_path / "cache") as cache:
        yield cache


def verified(cache: Cache, key: str = "k") -> CacheObject:
    item = cache.object(key, SIZE)
    put(item, DATA)
    assert item.verifier(DIGEST).advance()
    assert item.verified
    return item


def is_sealed(cache: Cache, kernel: Kernel, key: str = "k") -> bool:
    return data_file(cache.directory, key).stat().st_ino in kernel.sealed


def test_this_machine_says_whether_it_has_fs_verity(tmp_path: Path) -> None:
    refusal = verity.refusal(tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "file"
    path.write_bytes(b"content")
    fd = os.open(path, os.O_RDONLY)
    try:
        if refusal is None:
            verity.enable(fd)
        else:
            with pytest.raises(OSError, match=r"not supported|Inappropriate"):
                verity.enable(fd)
        assert verity.is_enabled(fd) == (refusal is None)
    finally:
        os.close(fd)
    with cache_at(tmp_path / "cache") as cache:
        assert cache.usage().unsealable == refusal
        with closing(verified(cache)) as item:  # with or without
            assert whole(item) == DATA


def test_a_directory_that_cannot_be_written_is_a_refusal() -> None:
    assert verity.refusal(Path("/proc")) == "it is refused: No such file or directory"


def test_verified_content_is_sealed_and_read_as_ever(cache: Cache, kernel: Kernel) -> None:
    assert cache.usage().unsealable is None
    with closing(verified(cache)) as item:
        assert is_sealed(cache, kernel)
        assert data_file(cache.directory, "k").stat().st_mode & 0o777 == 0o400
        assert whole(item) == DATA
        item.write(0, b"equal keys mean equal bytes")
        assert whole(item) == DATA
    with closing(cache.object("k", SIZE)) as item:
        assert whole(item) == DATA
        with closing(item.lend()) as loan:
            assert fcntl.fcntl(loan.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_content_without_a_digest_and_incomplete_content_are_not_sealed(cache: Cache, kernel: Kernel) -> None:
    with closing(cache.object("k", SIZE)) as item:
        put(item, DATA)
    with closing(cache.object("l", SIZE)) as item:
        put(item, DATA, 0)
        assert item.verifier(DIGEST).advance() is None
    assert not is_sealed(cache, kernel)
    assert not is_sealed(cache, kernel, "l")


def test_a_sealed_object_that_loses_a_block_gets_a_new_file(cache: Cache, kernel: Kernel) -> None:
    with closing(verified(cache)) as item:
        used = cache.used()
        assert item.punch([1]) == used - 4096  # all of it: the file cannot have a hole
        assert cache.used() == 4096
        assert (item.cached_bytes, item.complete, item.verified) == (0, False, False)
        with pytest.raises(CacheError, match="not in the cache"):
            item.read(Span(0, 5))
        put(item, DATA)
        assert whole(item) == DATA
        assert not is_sealed(cache, kernel)
        assert item.verifier(DIGEST).advance()
        assert is_sealed(cache, kernel)
        assert cache.used() == used


def test_eviction_takes_an_open_sealed_object_as_a_whole(cache: Cache, kernel: Kernel) -> None:
    with closing(verified(cache)) as item:
        cache.limit = cache.used() - 1
        assert cache.make_room(0) >= SIZE
        assert item.cached_bytes == 0
        put(item, DATA, 0)
        assert item.read(Span(0, BLOCK)) == DATA[:BLOCK]


def test_a_bad_block_of_a_sealed_object_is_found_and_all_of_it_fetched_again(
    cache: Cache, kernel: Kernel
) -> None:
    verified(cache).close()
    fd, _ = kernel.sealed[data_file(cache.directory, "k").stat().st_ino]
    damage(data_file(cache.directory, "k"), 7)  # as the disk does it
    kernel.sealed[os.fstat(fd).st_ino] = fd, os.pread(fd, SIZE, 0)
    audit = cache.audit("k", DIGEST)
    assert audit is not None
    with closing(audit):
        while audit.step():
            pass
    assert audit.faults == ["block 0 does not match its checksum"]
    with closing(cache.object("k", SIZE)) as item:
        assert item.cached_bytes == 0
        put(item, DATA)
        assert whole(item) == DATA


def test_a_loan_of_a_sealed_file_outlives_the_file(cache: Cache, kernel: Kernel) -> None:
    with closing(verified(cache)) as item, closing(item.lend()) as loan:
        assert item.punch([0]) == 0
        now = data_file(cache.directory, "k").stat().st_ino
        damage(data_file(cache.directory, "k"), 7)
        fd, _ = kernel.sealed[now]
        kernel.sealed[now] = fd, os.pread(fd, SIZE, 0)
        assert not item.check(0)
        assert os.pread(loan.fileno(), SIZE, BLOCK) == DATA[BLOCK:]
        put(item, DATA)
        assert whole(item) == DATA


def test_what_was_verified_before_is_sealed_when_it_is_audited(tmp_path: Path, kernel: Kernel) -> None:
    with cache_at(tmp_path / "cache") as cache:
        cache.unsealable = "not yet"
        verified(cache).close()
        assert not is_sealed(cache, kernel)
    with cache_at(tmp_path / "cache") as cache:
        audit = cache.audit("k", DIGEST)
        assert audit is not None
        with closing(audit):
            while audit.step():
                pass
        assert is_sealed(cache, kernel)
        with closing(cache.object("k", SIZE)) as item:
            assert item.verified


def test_a_file_that_somebody_can_write_stays_as_it_is(cache: Cache, kernel: Kernel) -> None:
    with closing(cache.object("k", SIZE)) as item:
        put(item, DATA)
        path = data_file(cache.directory, "k")
        path.chmod(0o600)
        with path.open("r+b"):
            assert item.verifier(DIGEST).advance()
        assert not is_sealed(cache, kernel)
        assert item.punch([1]) == BLOCK
        put(item, DATA, 1)
        assert whole(item) == DATA


def test_a_sealed_file_whose_table_is_damaged_is_replaced(tmp_path: Path, kernel: Kernel) -> None:
    with closing(open_cache(tmp_path / "cache")) as cache:
        verified(cache).close()
        damage(data_file(cache.directory, "k").with_suffix(".table"), 64 + 8)
        with closing(cache.object("k", SIZE)) as item:
            put(item, DATA)
            assert whole(item) == DATA


def test_a_block_dropped_while_the_kernel_reads_the_file_is_not_lost(
    cache: Cache, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = cache.object("k", SIZE)
    put(item, DATA)

    def overtaken(fd: int) -> None:
        item.punch([2])
        kernel.enable(fd)

    monkeypatch.setattr(verity, "enable", overtaken)
    item.verifier(DIGEST).advance()
    assert (item.cached_bytes, item.verified) == (0, False)
    monkeypatch.setattr(verity, "enable", kernel.enable)
    put(item, DATA)
    assert whole(item) == DATA
    assert item.verifier(DIGEST).advance()
    assert is_sealed(cache, kernel)
    item.close()
