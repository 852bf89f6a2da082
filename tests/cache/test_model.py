"""The cache against a model of it, a dict: whatever happens, a read gives the bytes written or none."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from modelfs.cache import Cache, CacheObject
from modelfs.errors import CacheError
from modelfs.types import BLOCK, Span, block_count, block_span
from tests.cache import content, crash_image, damage, data_file, open_cache, put, table_file

SIZES = {"empty": 0, "tiny": 1, "small": 5000, "two": BLOCK + 4097, "three": 3 * BLOCK}
CONTENT = {key: content(size, number) for number, (key, size) in enumerate(SIZES.items())}
EVERY_BLOCK = [(key, block) for key, size in SIZES.items() for block in range(block_count(size))]
KEYS = st.sampled_from(list(SIZES))
BLOCKS = st.sampled_from(EVERY_BLOCK)


def memory_disk() -> Path | None:
    """Return a directory in memory if there is room: this test is about what is said, not about fsync."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > 1 << 30 else None


class CacheMachine(RuleBasedStateMachine):
    """One cache, used, damaged, crashed and restarted.

    `present` is the model: the blocks that must be there. A damaged block may be there or not (it depends on
    whether the damage was noticed); damage happens only to a stopped cache, and that stop is then unclean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="modelfs-model-", dir=memory_disk()))
        self.generation = 0
        self.present: set[tuple[str, int]] = set()
        self.damaged: set[tuple[str, int]] = set()
        self.pinned: set[str] = set()
        self.open: dict[str, CacheObject] = {}
        self.cache: Cache = open_cache(self.directory)

    @property
    def directory(self) -> Path:
        return self.home / str(self.generation)

    @initialize(some=st.sets(BLOCKS))
    def start(self, some: set[tuple[str, int]]) -> None:
        for which in sorted(some):
            self.fetch(which)

    def teardown(self) -> None:
        self.close_all()
        self.cache.close(sync=False)
        shutil.rmtree(self.home)

    def close_all(self) -> None:
        for item in self.open.values():
            item.close()
        self.open.clear()

    def item(self, key: str) -> CacheObject:
        if key not in self.open:
            self.open[key] = self.cache.object(key, SIZES[key])
        return self.open[key]

    # What users do

    @rule(which=BLOCKS)
    def fetch(self, which: tuple[str, int]) -> None:
        key, block = which
        if not self.item(key).has(block):
            put(self.item(key), CONTENT[key], block)
            self.present.add(which)
            self.damaged.discard(which)

    @rule(which=BLOCKS, share=st.integers(0, 100))
    def begin_to_fetch(self, which: tuple[str, int], share: int) -> None:
        key, block = which
        span = block_span(block, SIZES[key])
        stop = span.start + len(span) * share // 100
        self.item(key).write(span.start, CONTENT[key][span.start : stop])
        assert self.item(key).covers(Span(span.start, stop))
        if not self.item(key).has(block):
            with contextlib.suppress(CacheError):  # unless earlier parts complete it
                self.item(key).commit(block)
                self.present.add(which)
                self.damaged.discard(which)

    @rule(which=BLOCKS, first=st.integers(0, BLOCK), length=st.integers(0, 200_000), now=st.booleans())
    def read_somewhere(self, which: tuple[str, int], first: int, length: int, now: bool) -> None:
        key, block = which
        start = min(block * BLOCK + first, SIZES[key])
        self.read(key, Span(start, min(start + length, SIZES[key])), now=now)

    @rule(now=st.booleans())
    def read_all_there_may_be(self, now: bool) -> None:
        for key, block in sorted(self.present | self.damaged):
            self.read(key, block_span(block, SIZES[key]), now=now)

    def read(self, key: str, span: Span, *, now: bool) -> None:
        item = self.item(key)
        if now:
            got = item.read_now(span)
            assert got is None or got == CONTENT[key][span.start : span.stop]
            return
        blocks = {(key, block) for block in span.blocks()}
        try:
            data = item.read(span)
        except CacheError:
            assert not blocks <= self.present
            self.damaged -= {each for each in blocks if not item.has(each[1])}
        else:
            assert data == CONTENT[key][span.start : span.stop]

    @rule(which=BLOCKS)
    def check(self, which: tuple[str, int]) -> None:
        key, block = which
        assert self.item(key).check(block) == (which in self.present)
        self.damaged.discard(which)

    @rule(key=KEYS)
    def close(self, key: str) -> None:
        if key in self.open:
            self.open.pop(key).close()

    # What takes blocks away

    @rule(key=KEYS)
    def discard(self, key: str) -> None:
        self.cache.discard(key)
        self.forget({each for each in EVERY_BLOCK if each[0] == key})

    @rule(which=BLOCKS)
    def punch(self, which: tuple[str, int]) -> None:
        self.item(which[0]).punch([which[1]])
        self.forget({which})

    @rule()
    def evict_everything(self) -> None:
        self.cache.limit = 0
        self.cache.make_room(0)
        self.cache.limit = None
        self.forget({each for each in EVERY_BLOCK if each[0] not in self.pinned})

    @rule(key=KEYS, pin=st.booleans())
    def pin(self, key: str, pin: bool) -> None:
        (self.pinned.add if pin else self.pinned.discard)(key)
        self.cache.pin(self.pinned)

    def forget(self, blocks: set[tuple[str, int]]) -> None:
        self.present -= blocks
        self.damaged -= blocks

    # Stops

    @rule(close_first=st.booleans())
    def stop_and_start(self, close_first: bool) -> None:
        if close_first:
            self.close_all()
        self.cache.close(sync=False)
        self.close_all()
        self.cache = open_cache(self.directory)

    @rule()
    def crash_and_start(self) -> None:
        self.crash()
        self.cache = open_cache(self.directory)

    @rule(
        which=BLOCKS,
        what=st.sampled_from(["data", "data", "record", "header", "table cut"]),
        where=st.floats(0, 1, exclude_max=True),
        stop=st.booleans(),
        look=st.booleans(),
    )
    def crash_with_damage(
        self, which: tuple[str, int], what: str, where: float, stop: bool, look: bool
    ) -> None:
        key, block = which
        self.fetch(which)
        if which in self.damaged:
            return
        self.crash()
        span = block_span(block, SIZES[key])
        table = table_file(self.directory, key)
        lost = {which}
        match what:
            case "data":
                damage(data_file(self.directory, key), span.start + int(where * len(span)))
            case "record":
                damage(table, 64 + 8 * block + int(where * 8))
            case "header":
                damage(table, int(where * 64))
                lost = {each for each in EVERY_BLOCK if each[0] == key}
            case "table cut":
                with table.open("r+b") as file:
                    file.truncate(64 + 8 * block + int(where * 8))
                lost = {each for each in EVERY_BLOCK if each[0] == key and each[1] >= block}
        self.damaged |= lost & self.present
        self.present -= lost
        self.cache = open_cache(self.directory)
        if stop:  # open it, look at nothing, and stop cleanly: the damage must not become trusted
            self.item(key)
            self.stop_and_start(close_first=True)
        if look:
            self.read_all_there_may_be(now=False)

    def crash(self) -> None:
        """Go on with what a SIGKILL would leave now."""
        crash_image(self.directory, self.home / str(self.generation + 1))
        self.open.clear()
        self.cache.close(sync=False)
        shutil.rmtree(self.directory)  # whose files are the same: what has another name is not punched
        self.generation += 1

    # What always holds

    @invariant()
    def what_must_be_there_is_there(self) -> None:
        for key, item in self.open.items():
            has = {(key, block) for block in range(block_count(SIZES[key])) if item.has(block)}
            must = {each for each in self.present if each[0] == key}
            assert must <= has <= must | self.damaged
            assert item.complete == (len(has) == block_count(SIZES[key]))
            assert item.missing(range(block_count(SIZES[key]))) == [
                block for block in range(block_count(SIZES[key])) if (key, block) not in has
            ]

    @invariant()
    def the_numbers_add_up(self) -> None:
        for key, size in SIZES.items():
            must, may = (
                sum(len(block_span(block, size)) for each, block in blocks if each == key)
                for blocks in (self.present, self.present | self.damaged)
            )
            assert must <= self.cache.cached_bytes(key, size) <= may
            assert self.cache.pinned(key) == (key in self.pinned)
        assert self.cache.used() >= sum(len(block_span(block, SIZES[key])) for key, block in self.present)


CacheMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestCacheAgainstModel = CacheMachine.TestCase
