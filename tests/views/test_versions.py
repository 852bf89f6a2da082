"""The link to the latest version: what is the highest, what the store and the configuration say."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.errors import NotFound
from modelfs.types import Entry, Snapshot
from modelfs.views.versions import highest, marker, order_of, with_latest

# The example of https://semver.org/#spec-item-11, and what people write besides.
ASCENDING = [
    "1.0.0-alpha",
    "1.0.0-alpha.1",
    "1.0.0-alpha.beta",
    "1.0.0-beta",
    "1.0.0-beta.2",
    "1.0.0-beta.11",
    "1.0.0-rc.1",
    "v1.0.0rc2",
    "v2.0.0-rc.1",
    "v0.9",
    "1.0.0",
    "v1.0.0",
    "v1.0.1",
    "1.2",
    "v1.10.0",
    "v1.10.0.1",
    "v2",
    "v10.0.0+build.7",
]
NO_VERSIONS = [
    "",
    "v",
    "1",
    "17",
    "main",
    "latest",
    "1.x",
    "v1..0",
    "2024-05-01",
    "global_step1000",
    "1_Pooling",
    "1.0/a",
    "v8n",
]


def snapshot(*paths: str, **files: int) -> Snapshot:
    entries = [Entry(path, 10, "v", mtime=5.0) for path in paths]
    return Snapshot.of("s3://b/m/", "", entries + [Entry(name, size, "v") for name, size in files.items()])


def target(shown: Snapshot) -> str | None:
    entry = shown.entries.get("latest")
    return entry.target if entry else None


def test_versions_are_in_order() -> None:
    shuffled = random.Random(1).sample(ASCENDING, len(ASCENDING))
    assert sorted(shuffled, key=lambda name: order_of(name) or ()) == ASCENDING
    for count in range(1, len(ASCENDING) + 1):
        assert highest(ASCENDING[:count]) == ASCENDING[count - 1]


@pytest.mark.parametrize("name", NO_VERSIONS, ids=repr)
def test_what_is_no_version(name: str) -> None:
    assert order_of(name) is None


@given(st.lists(st.tuples(*[st.integers(0, 300)] * 3), min_size=1))
def test_numbers_are_compared_as_numbers(cores: list[tuple[int, int, int]]) -> None:
    found = highest("v{}.{}.{}".format(*core) for core in cores)
    assert found == "v{}.{}.{}".format(*max(cores))


@given(st.text(max_size=40))
def test_any_name_is_taken(name: str) -> None:
    order = order_of(name)
    assert order is None or order == order_of(name)


def test_the_highest_version_is_the_latest() -> None:
    shown = with_latest(snapshot("v1.2.0/m.pkl", "v1.10.0/m.pkl", "v2.0.0-rc.1/m.pkl", "README.md"))
    assert target(shown) == "v1.10.0"
    assert shown.entries["latest"].mtime == 5.0
    assert len(shown.entries) == 5


def test_a_model_without_versions_is_shown_as_it_is() -> None:
    for listed in (snapshot("config.json", "1_Pooling/config.json"), snapshot("v1.0.0", "v1.1.0")):
        assert with_latest(listed) is listed


def test_what_the_store_calls_latest_is_left_alone() -> None:
    for listed in (snapshot("v1.0.0/m", "latest/m"), snapshot("v1.0.0/m", latest=10**6)):
        assert with_latest(listed) is listed
        assert with_latest(listed, "v1.0.0") is listed
        assert marker(listed) is None


def test_the_configuration_decides() -> None:
    listed = snapshot("v1.0.0/m", "v1.1.0/m", "stable/m", LATEST=6)
    assert target(with_latest(listed, "v1.0.0", "v1.1.0")) == "v1.0.0"
    assert target(with_latest(listed, "stable")) == "stable"
    with pytest.raises(NotFound, match="has no directory 'v3' that latest could lead to"):
        with_latest(listed, "v3")


@pytest.mark.parametrize("name", ["LATEST", "latest"])
def test_the_store_says_what_is_the_latest(name: str) -> None:
    listed = snapshot("v1.0.0/m", "v1.1.0/m", **{name: 7})
    own = marker(listed)
    assert own is not None
    assert own.path == name
    shown = with_latest(listed, marked="v1.0.0\n")
    assert target(shown) == "v1.0.0"
    assert ("LATEST" in shown.entries) == (name == "LATEST")


def test_a_marker_that_names_nothing_does_not_count() -> None:
    listed = snapshot("v1.0.0/m", "v1.1.0/m", LATEST=7)
    for said in ("v9.9.9", "", "../../etc", "v1.0.0 v1.1.0", "LATEST"):
        assert target(with_latest(listed, marked=said)) == "v1.1.0"
    named = snapshot("v1.0.0/m", "global_step9/m", latest=12)  # checkpoints of others have such a file
    assert with_latest(named, marked="global_step9") is named


def test_without_versions_there_is_no_marker() -> None:
    assert marker(snapshot("global_step1000/m", latest=15)) is None


def test_of_a_store_too_large_to_list_nothing_is_known() -> None:
    listed = Snapshot.of("s3://b/", "", [Entry("v1.0.0/m")], complete=False)
    assert with_latest(listed, "v1.0.0") is listed
    assert marker(listed) is None
