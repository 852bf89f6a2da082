"""No hostile manifest or listing reaches the tree: each is refused for its reason, what is good is shown."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import trio

from modelfs.errors import StoreError
from modelfs.listing import CONTROL, path_fault
from modelfs.types import MAX_SIZE, Snapshot
from tests.archives.hostile import CORPUS as ARCHIVES
from tests.stores.dialects import DIALECTS, Dialect, Documents, answering
from tests.stores.hostile import CORPUS, Hostile
from tests.stores.site import Reply, Request, scripted

Listing = Callable[[Dialect, Documents], Snapshot]


@pytest.fixture(scope="module")
def listing() -> Iterator[Listing]:
    """Lists what a server answers, a new store each time."""
    current: Mapping[str, object] = {}

    def answers(request: Request) -> Reply:
        return answering(current)(request)

    def listed(dialect: Dialect, documents: Documents) -> Snapshot:
        nonlocal current
        current = documents
        return trio.run(dialect.store(url).snapshot)

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


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(ARCHIVES) + len(CORPUS) >= 200
    assert len(CORPUS) >= 400
    assert len({str(hostile) for hostile in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_what_is_not_hostile_is_shown(dialect: Dialect, listing: Listing) -> None:
    rows = [dialect.row("config.json", 2), dialect.row("weights 1.bin", 3)]
    shown = checked(listing(dialect, dialect.documents(rows)))
    assert {"config.json": 2, "weights 1.bin": 3}.items() <= {
        path: entry.size for path, entry in shown.entries.items()
    }.items()
    assert not shown.rejected


@pytest.mark.parametrize("hostile", CORPUS, ids=[f"{n}-{one.dialect}" for n, one in enumerate(CORPUS)])
def test_a_hostile_answer_is_refused_for_its_reason(hostile: Hostile, listing: Listing) -> None:
    began = time.monotonic()
    try:
        shown = checked(listing(hostile.dialect, hostile.documents))
        reasons = [reason for _, reason in shown.rejected]
    except StoreError as error:
        shown, reasons = None, [str(error)]
    assert any(re.search(hostile.reason, reason) for reason in reasons), reasons
    assert hostile.whole in (shown is None, None)
    if shown:
        assert shown.entries["config.json"].size == 2
    else:
        assert not CONTROL.search(reasons[0])
        assert len(reasons[0]) < 1000
    assert time.monotonic() - began < 20
