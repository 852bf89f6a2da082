"""A storm of faults over every network store: ``make storm``, or ``python -m tests.faults.storm -h``.

Many readers fetch files through proxies that break most answers, in every way there is, and compare what
they get. The exit status is 0 if each reader got the right bytes or one clean error, and enough faults were
injected.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import trio

from modelfs.fetch.engine import Fetcher
from modelfs.fetch.source import Source
from modelfs.testing.faults import FAULTS, Plan, storm
from modelfs.types import BLOCK, Entry
from tests.faults.rig import STORES, WRONG, Site, fetching, noise, outcome

GROUPS = 12
"""Fetch paths at work at once; each begins again with an empty cache when all its readers have ended."""

DEADLINE = 10.0
"""Seconds after which a reader has its error."""

SIZES = [1, 100, 4096, 70_000, 131_072, 131_073, 300_001, 600_000] * 3 + [BLOCK + 77]
FILES: Mapping[str, bytes] = {f"{n}.bin": noise(size, f"storm {n}") for n, size in enumerate(SIZES)}


@dataclass
class Report:
    """What the readers saw, and why.

    Attributes:
        outcomes: readers that ended so, by "right" or class of error.
        injected: faults by kind.
        seconds: it took.

    """

    outcomes: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether nobody saw wrong bytes, and some the right ones."""
        return self.outcomes[WRONG] == 0 and self.outcomes["right"] > 0

    def __str__(self) -> str:
        """Return lines for people."""
        rows = {
            "faults": f"{self.injected.total()} in {self.seconds:.0f} s",
            **{f"  {kind}": count for kind, count in sorted(self.injected.items())},
            "readers": self.outcomes.total(),
            **{f"  {what}": count for what, count in self.outcomes.most_common()},
            WRONG: self.outcomes[WRONG],
        }
        return "\n".join(f"{name:<20} {value}" for name, value in rows.items())


def weather(seed: int) -> Plan:
    """Return a plan that strikes most requests for content and some others."""
    content = storm(seed, rate=0.7, seconds=0.2)
    others = storm(seed, rate=0.1, seconds=0.2)
    return lambda asked: next(content if asked.range else others)


def raging(faults: int, seconds: float, seed: int, directory: Path) -> Report:
    """Let readers read through a storm until so many faults were injected, or so many seconds are over.

    Args:
        faults: at least so many, of every kind at least one.
        seconds: it ends after so long in any case.
        seed: of all that is random here; what happens when is up to the machine.
        directory: for servers and caches.

    """
    report = Report()

    async def main(site: Site) -> None:
        began = trio.current_time()
        with ExitStack() as stack:
            opened = {kind: stack.enter_context(site.behind(kind)) for kind in STORES}
            snapshots = {kind: await store.snapshot() for kind, (_, store) in opened.items()}
            for number, (proxy, _) in enumerate(opened.values()):
                proxy.follow(weather(seed + number))

            def enough() -> bool:
                injected = sum((proxy.injected for proxy, _ in opened.values()), Counter[str]())
                report.injected, report.seconds = injected, trio.current_time() - began
                return report.seconds > seconds or (
                    injected.total() >= faults and injected.keys() == FAULTS.keys()
                )

            async def group(number: int) -> None:
                chance = random.Random(seed * GROUPS + number)
                round_ = 0
                while not enough():
                    place = directory / f"cache-{number}-{round_}"
                    async with fetching(place, site.ca_bundle, deadline=DEADLINE, connections=32) as (
                        fetcher,
                        _,
                        metrics,
                    ):
                        sources = {kind: Source(store, metrics) for kind, (_, store) in opened.items()}
                        async with trio.open_nursery() as nursery:
                            for path in FILES:
                                kind = chance.choice(STORES)
                                entry = snapshots[kind].entries[path]
                                for _ in range(chance.choice((1, 1, 2))):
                                    start = chance.randrange(len(FILES[path]))
                                    nursery.start_soon(read, fetcher, sources[kind], entry, start)
                    round_ += 1

            async def read(fetcher: Fetcher, source: Source, entry: Entry, start: int) -> None:
                what = await outcome(fetcher, source, entry, FILES[entry.path], start)
                report.outcomes[what] += 1

            async with trio.open_nursery() as nursery:
                for number in range(GROUPS):
                    nursery.start_soon(group, number)

    with Site(directory, FILES) as site, patch.dict("os.environ", site.environment()):
        trio.run(main, site)
    return report


def main(words: Sequence[str] | None = None) -> int:
    """Run, print the report and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.storm", description=__doc__)
    parser.add_argument("--faults", type=int, default=10_000, help="at least so many (%(default)s)")
    parser.add_argument("--seconds", type=float, default=900, help="it ends after so long (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (%(default)s)")
    wanted = parser.parse_args(words)
    logging.disable(logging.CRITICAL)  # the engine tells of every error, and there are thousands
    with tempfile.TemporaryDirectory(prefix="modelfs-storm-") as directory:
        report = raging(wanted.faults, wanted.seconds, wanted.seed, Path(directory))
    print(report)
    return 0 if report.good and report.injected.total() >= wanted.faults else 1


if __name__ == "__main__":
    raise SystemExit(main())
