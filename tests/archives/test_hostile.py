"""No hostile archive reaches the tree: each is refused for its reason, what is good beside it is shown."""

from __future__ import annotations

import io

import pytest

from modelfs.archives import Contents, tar, zips
from modelfs.errors import BadArchive
from modelfs.types import Entry, Snapshot
from tests.archives.hostile import CORPUS, Hostile


def contents_of(hostile: Hostile) -> Contents:
    """Return what would be shown, found as the pass finds it."""
    contents, file = Contents(hostile.limits), io.BytesIO(hostile.data)
    if hostile.kind == "zip":
        for member in zips.members(file, len(hostile.data), hostile.limits):
            contents.add(zips.linked(file, member) if member.kind == "symlink" else member)
    else:
        for member in tar.members(file, hostile.limits):
            contents.add(member)
    return contents


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(CORPUS) >= 200
    assert len({(hostile.kind, hostile.name) for hostile in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("hostile", CORPUS, ids=lambda hostile: f"{hostile.kind}: {hostile.name}")
def test_a_hostile_archive_is_refused_for_its_reason(hostile: Hostile) -> None:
    if hostile.whole:
        with pytest.raises(BadArchive) as refused:
            contents_of(hostile)
        assert hostile.reason in str(refused.value)
        return
    contents = contents_of(hostile)
    reasons = [reason for _, reason in contents.rejected]
    assert any(hostile.reason in reason for reason in reasons), reasons
    assert contents.members["config.json"].size == 2
    shown = Snapshot.of("file:///x", "r", [member.entry("", "v") for member in contents.members.values()])
    assert shown.rejected == (), "what is left is fit for a tree"
    assert all(isinstance(entry, Entry) for entry in shown.entries.values())
