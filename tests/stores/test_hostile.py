"""No hostile manifest or listing reaches the tree: each is refused for its reason, what is good is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from modelfs.errors import StoreError
from modelfs.listing import CONTROL
from tests.archives.hostile import CORPUS as ARCHIVES
from tests.stores.dialects import DIALECTS, Dialect
from tests.stores.hostile import CORPUS, Hostile
from tests.stores.listing import Lists, listing


@pytest.fixture(scope="module")
def lists() -> Iterator[Lists]:
    with listing() as lists:
        yield lists


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(ARCHIVES) + len(CORPUS) >= 200
    assert len(CORPUS) >= 400
    assert len({str(hostile) for hostile in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_what_is_not_hostile_is_shown(dialect: Dialect, lists: Lists) -> None:
    rows = [dialect.row("config.json", 2), dialect.row("weights 1.bin", 3)]
    shown = lists(dialect, dialect.documents(rows))
    assert {"config.json": 2, "weights 1.bin": 3}.items() <= {
        path: entry.size for path, entry in shown.entries.items()
    }.items()
    assert not shown.rejected


@pytest.mark.parametrize("hostile", CORPUS, ids=[f"{n}-{one.dialect}" for n, one in enumerate(CORPUS)])
def test_a_hostile_answer_is_refused_for_its_reason(hostile: Hostile, lists: Lists) -> None:
    try:
        shown = lists(hostile.dialect, hostile.documents)
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
