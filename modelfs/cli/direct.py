"""What commands do without a daemon, and with the cache directory for themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from modelfs.cache import Cache
from modelfs.errors import CacheUnusable
from modelfs.fetch import scrub
from modelfs.metrics import Metrics


def verify_directory(directory: Path, progress: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Read a cache directory again that no daemon uses; return what `ControlClient.verify` returns.

    Raises:
        CacheError: it is in use, or no cache.

    """
    if not (directory / "format").exists():
        raise CacheUnusable(f"{directory} is no cache: name the directory that was cache.dir of a mount")
    logging.getLogger("modelfs").addHandler(logging.NullHandler())  # the report says it all
    cache = Cache(directory, metrics=Metrics())
    try:
        subjects = scrub.subjects_in(cache)
        total = sum(subject.present for subject in subjects)

        async def show(subject: scrub.Subject, done: int) -> None:
            progress({"name": subject.name, "done": done, "total": total})

        report = trio.run(scrub.verify, cache, subjects, scrub.discard_from(cache), show)
    finally:
        cache.close()
    return report.to_json()
