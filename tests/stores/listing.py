"""Asks stores for what a server of the tests lists, and looks whether that is fit to be shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import trio

from modelfs.listing import CONTROL, path_fault
from modelfs.types import MAX_SIZE, Snapshot
from tests.stores.dialects import Dialect, Documents, answering
from tests.stores.site import Reply, Request, scripted

Lists = Callable[[Dialect, Documents], Snapshot]


@contextmanager
def listing() -> Iterator[Lists]:
    """Yield what lists the answers of a server, with a new store each time and nobody's credentials."""
    current: Mapping[str, object] = {}

    def answers(request: Request) -> Reply:
        return answering(current)(request)

    def listed(dialect: Dialect, documents: Documents) -> Snapshot:
        nonlocal current
        current = documents
        return checked(trio.run(dialect.store(url).snapshot))

    with pytest.MonkeyPatch.context() as environment:
        for name in ("GH_TOKEN", "GITHUB_TOKEN", "HF_TOKEN", "KAGGLE_API_TOKEN", "KAGGLE_USERNAME"):
            environment.delenv(name, raising=False)
        for name in ("AZURE_CONFIG_DIR", "DOCKER_CONFIG", "AWS_CONFIG_FILE", "HOME"):
            environment.setenv(name, "/nonexistent")
        with scripted(answers) as (url, _):
            yield listed


def checked(snapshot: Snapshot) -> Snapshot:
    """Return `snapshot`, all of which is fit for a tree, a cache and a message."""
    for path, entry in snapshot.entries.items():
        assert path == entry.path
        assert path_fault(path) is None
        assert 0 <= entry.size <= MAX_SIZE
    assert all(reason and not CONTROL.search(reason) for _, reason in snapshot.rejected)
    assert Snapshot.from_json(json.loads(json.dumps(snapshot.to_json()))).entries == snapshot.entries
    return snapshot
