"""Each kind of fault against each network store: a reader gets the right bytes, or one clean error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import trio

from modelfs.errors import Stale
from modelfs.fetch.source import Source
from modelfs.testing.faults import FAULTS, Asked, Fault, of_content
from modelfs.types import BLOCK
from tests.faults.rig import STORES, Site, fetching, noise, outcome

SIZE = 300_001
DEADLINE = 2.0
"""Seconds after which a reader of a store that never answers well has its error."""
PATIENCE = 60.0
"""Seconds of the readers that are to see the end of a fault: who has an error sooner had it by `DEADLINE`."""


@dataclass(frozen=True)
class Row:
    """What comes of a fault.

    Attributes:
        fault: what is done to answers.
        forever: outcome while every answer is struck, of each store in the order of `STORES`; the last
            is that of those that follow, too.
        once: outcome when only the first is; "right" unless said otherwise.

    """

    fault: Fault
    forever: str
    once: str = "right"

    def expected(self, store: str) -> str:
        words = self.forever.split()
        return words[min(STORES.index(store), len(words) - 1)]


ROWS = [
    Row(Fault("reset"), "Unavailable"),
    Row(Fault("reset-in-body", at=0), "Unavailable"),
    Row(Fault("closed"), "Unavailable"),
    # Without the farewell of TLS it is a broken connection.
    Row(Fault("truncated", at=0), "BadAnswer Unavailable BadAnswer BadAnswer"),
    Row(Fault("silence", seconds=0.5), "Unavailable"),
    Row(Fault("silence-in-body", at=0, seconds=DEADLINE + 1), "Unavailable"),
    Row(Fault("trickle", seconds=0.5), "right"),
    Row(Fault("status-429", seconds=1), "Unavailable"),
    Row(Fault("status-500", seconds=1), "Unavailable"),
    Row(Fault("status-503", seconds=1), "Unavailable"),
    Row(Fault("no-http"), "BadAnswer"),
    Row(Fault("corrupted"), "Corrupt", once="Corrupt"),
    Row(Fault("extra-bytes"), "right"),
    Row(Fault("longer-body"), "BadAnswer"),
    Row(Fault("range-ignored"), "right"),
    Row(Fault("part-as-whole"), "Stale"),
    Row(Fault("wrong-range"), "BadAnswer"),
    Row(Fault("wrong-total"), "Stale"),
    Row(Fault("malformed-range"), "BadAnswer"),
    Row(Fault("etag-changed"), "Stale Stale Stale right"),
    Row(Fault("etag-missing"), "BadAnswer BadAnswer BadAnswer right"),
    Row(Fault("gone"), "Stale"),
    Row(Fault("expired"), "AccessDenied"),
    Row(Fault("rotated"), "AccessDenied"),
    Row(Fault("unauthorized"), "AccessDenied"),
    Row(Fault("redirect", target="file:///etc/passwd"), "BadAnswer"),
    Row(Fault("redirect-loop"), "BadAnswer"),
    Row(Fault("dns-failure"), "Unavailable"),
    Row(Fault("tls-failure"), "Unavailable right Unavailable Unavailable"),
]
KINDS = [row.fault.kind for row in ROWS]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    files = {"two-blocks": noise(BLOCK + 1000, "two-blocks")}
    files |= {
        f"{when}-{kind}": noise(SIZE, f"{when}{kind}") for kind in KINDS for when in ("once", "forever")
    }
    directory = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch, Site(directory, files) as own:
        for name, value in own.environment().items():
            patch.setenv(name, value)
        yield own


Outcome = tuple[str, float, int]
"""What came of it, after how many seconds, after how many faults."""


class Strikes:
    """A plan that strikes each row's own file: so many of its next answers."""

    def __init__(self, site: Site, when: str) -> None:
        self.left = dict.fromkeys(KINDS, 1 if when == "once" else 1_000_000)
        self._rows: dict[str, Row] = {}
        for row in ROWS:
            path = f"{when}-{row.fault.kind}"
            # The last part of the path: of the Hub's links it is the digest.
            self._rows |= {path: row, sha256(site.files[path]).hexdigest(): row}

    def __call__(self, asked: Asked) -> Fault | None:
        row = self._rows[asked.path.rpartition("/")[2]]
        self.left[row.fault.kind] -= 1
        return row.fault if self.left[row.fault.kind] >= 0 else None


Outcomes = dict[tuple[str, str], dict[str, Outcome]]


async def run(site: Site, store: str, when: str, directory: Path) -> dict[str, Outcome]:
    """Let one reader per kind of fault read its own file, all at once."""
    found: dict[str, Outcome] = {}
    strikes = Strikes(site, when)

    async def read(row: Row) -> None:
        kind = row.fault.kind
        path = f"{when}-{kind}"
        entry = snapshot.entries[path]
        hopeless = when == "forever" and row.expected(store) == "Unavailable"
        began = trio.current_time()
        what = await outcome(impatient if hopeless else patient, source, entry, site.files[path])
        found[kind] = what, trio.current_time() - began, proxy.injected[kind]
        strikes.left[kind] = 0
        again = await outcome(patient, source, entry, site.files[path])
        assert again == "right", f"{kind}: {again} once the store is good again"

    async with (
        fetching(directory / "patient", site.ca_bundle, deadline=PATIENCE) as (patient, _, metrics),
        fetching(directory / "impatient", site.ca_bundle, deadline=DEADLINE) as (impatient, _, _),
    ):
        with site.behind(store) as (proxy, own):
            snapshot = await own.snapshot()
            source = Source(own, metrics)
            proxy.follow(of_content(strikes))
            async with trio.open_nursery() as nursery:
                for row in ROWS:
                    nursery.start_soon(read, row)
    return found


@pytest.fixture(scope="module")
def outcomes(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    found: Outcomes = {}

    async def one(store: str, when: str) -> None:
        found[store, when] = await run(site, store, when, tmp_path_factory.mktemp(f"{store}-{when}"))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for store in STORES:
                for when in ("once", "forever"):
                    nursery.start_soon(one, store, when)

    trio.run(main)
    return found


def test_every_kind_of_fault_is_tried() -> None:
    assert sorted(KINDS) == sorted(FAULTS)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("row", ROWS, ids=KINDS)
def test_a_fault_that_passes_is_not_seen(outcomes: Outcomes, store: str, row: Row) -> None:
    what, seconds, injected = outcomes[store, "once"][row.fault.kind]
    assert what in (row.once, "right")  # the answer that was struck may have been given up for another
    assert injected == (0 if (store, row.fault.kind) == ("https", "tls-failure") else 1)
    if row.fault.kind.startswith("status-"):
        assert seconds >= row.fault.seconds  # of Retry-After


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("row", ROWS, ids=KINDS)
def test_a_fault_that_stays_is_one_clean_error(outcomes: Outcomes, store: str, row: Row) -> None:
    what, seconds, _ = outcomes[store, "forever"][row.fault.kind]
    assert what == row.expected(store)
    if what == "Unavailable":
        assert seconds < PATIENCE


@pytest.mark.parametrize("store", STORES)
def test_an_object_that_changes_between_two_ranges_is_not_mixed(
    site: Site, store: str, tmp_path: Path
) -> None:
    def behind_the_first_block(asked: Asked) -> Fault | None:
        late = int(asked.range.removeprefix("bytes=").partition("-")[0]) >= BLOCK
        return Fault("etag-changed") if late else None

    async def main() -> None:
        content = site.files["two-blocks"]
        async with fetching(tmp_path, site.ca_bundle, deadline=PATIENCE) as (fetcher, _, metrics):
            with site.behind(store) as (proxy, own):
                entry = (await own.snapshot()).entries["two-blocks"]
                proxy.follow(of_content(behind_the_first_block))
                reader = await fetcher.open(Source(own, metrics), entry)
                assert await reader.read(0, 1000) == content[:1000]
                if store.startswith("hf"):  # pins by digest: its content network's ETags are nobody's promise
                    assert await reader.read(BLOCK, 1000) == content[BLOCK:]
                else:
                    with pytest.raises(Stale):
                        await reader.read(BLOCK, 1000)
                reader.close()

    trio.run(main)


@pytest.mark.parametrize("store", STORES)
def test_a_store_that_falls_silent_for_good_is_an_error_in_time(
    site: Site, store: str, tmp_path: Path
) -> None:
    path = "once-reset"

    async def main() -> None:
        async with fetching(tmp_path, site.ca_bundle, deadline=DEADLINE) as (fetcher, _, metrics):
            with site.behind(store) as (proxy, own):
                entry = (await own.snapshot()).entries[path]
                proxy.follow(lambda _: Fault("silence"))  # also where the object is asked for
                with trio.fail_after(PATIENCE):
                    what = await outcome(fetcher, Source(own, metrics), entry, site.files[path])
                assert what == "Unavailable"

    trio.run(main)
