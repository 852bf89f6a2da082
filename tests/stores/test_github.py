"""What github:// promises beyond the contract."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, Unavailable
from modelfs.stores import identity_of, open_store
from modelfs.stores.github import GitHubStore
from modelfs.testing import read_span
from modelfs.types import Entry, Snapshot, Span
from tests.releases import Releases

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40}
REPO = "org/bert"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GH_TOKEN", "GITHUB_TOKEN", "GITHUB_API_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def releases() -> Iterator[Releases]:
    with Releases() as server:
        server.publish(REPO, "v1", FILES)
        yield server


def store(releases: Releases, url: str = f"github://{REPO}@v1", **options: Any) -> GitHubStore:
    return GitHubStore(url, {**releases.options, **options})


def snapshot(store: GitHubStore) -> Snapshot:
    return trio.run(store.snapshot)


def read(store: GitHubStore, entry: Entry) -> bytes:
    async def main() -> bytes:
        return await read_span(await store.locate(entry), Span(0, entry.size))

    return trio.run(main)


# URLs


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("github://org/repo", "github://org/repo@latest"),
        ("GitHub://Org/Re.po-2@v1.0/", "github://Org/Re.po-2@v1.0"),
        ("github://org/repo@latest/a.tar.gz", "github://org/repo@latest/a.tar.gz"),
        ("github://org/repo@release%2F1/a.bin", "github://org/repo@release%2F1/a.bin"),
        ("github://org/repo/a.bin", "github://org/repo@latest/a.bin"),
    ],
)
def test_a_url_has_one_canonical_form(url: str, canonical: str) -> None:
    assert open_store(url).url == canonical
    assert open_store(canonical).url == canonical


@pytest.mark.parametrize(
    "url",
    ["github://", "github://org", "github://org/repo@", "github://org/repo@v1/a/b", "github://org/..@v1",
     "github://org/repo@v1/..", "github://org/repo@v1?token=1", "github://o%20rg/repo", "github://org/r@a%0Ab"],
)  # fmt: skip
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="github://"):
        GitHubStore(url, {})


@pytest.mark.parametrize(
    "options", [{"tag": "v1"}, {"api_url": "api.github.com"}, {"api_url": "https://u:pw@h"}, {"timeout": 0}]
)
def test_malformed_options_are_refused_without_showing_them(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        GitHubStore("github://org/repo", options)
    assert "pw" not in str(caught.value)


def test_the_api_comes_from_the_environment_and_is_part_of_the_identity(
    releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = identity_of(GitHubStore(f"github://{REPO}@v1", {}))
    monkeypatch.setenv("GITHUB_API_URL", f"{releases.url}/")
    there = GitHubStore(f"github://{REPO}@v1", {})
    assert set(snapshot(there).entries) == set(FILES)
    assert identity_of(there) != usual


# Snapshots


def test_latest_is_the_newest_full_release_and_new_assets_are_a_new_revision(releases: Releases) -> None:
    latest = store(releases, f"github://{REPO}")
    first = snapshot(latest)
    releases.publish(REPO, "v2-rc1", {"rc": b""}, prerelease=True)
    assert snapshot(latest) == first
    releases.upload(REPO, "v1", "config.json", b"[]")
    second = snapshot(latest)
    assert second.revision != first.revision
    assert second.entries["config.json"].version != first.entries["config.json"].version
    assert second.entries["model.safetensors"] == first.entries["model.safetensors"]
    releases.publish(REPO, "v2", {"weights.bin": b"2"})
    assert list(snapshot(latest).entries) == ["weights.bin"]


def test_digests_of_the_api_are_published(releases: Releases) -> None:
    releases.upload(REPO, "v1", "old.bin", b"before June 2025", digest=False)
    found = snapshot(store(releases)).entries
    assert {path: entry.digest is not None for path, entry in found.items()} == {
        "config.json": True,
        "model.safetensors": True,
        "old.bin": False,
    }
    assert found["config.json"].mtime == 1_751_371_200.0


def test_an_asset_that_is_not_uploaded_yet_is_not_shown(releases: Releases) -> None:
    releases.upload(REPO, "v1", "half.bin", b"half", state="starter")
    found = snapshot(store(releases))
    assert set(found.entries) == set(FILES)
    assert found.rejected == (("half.bin", "it is not uploaded completely"),)


def test_what_is_not_there_is_not_found(releases: Releases) -> None:
    with pytest.raises(NotFound, match="set GITHUB_TOKEN"):
        snapshot(store(releases, f"github://{REPO}@v9"))
    with pytest.raises(NotFound, match="no such asset"):
        snapshot(store(releases, f"github://{REPO}@v1/nothing.bin"))


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"id": "1"}', b"[" * 100_000])
def test_an_answer_of_another_api_is_refused(releases: Releases, body: bytes) -> None:
    releases.refusals = [(200, {}, body)]
    with pytest.raises(BadAnswer, match="check the API's URL"):
        snapshot(store(releases))


# Parts


def test_split_files_are_one_and_those_that_lack_a_part_are_refused(releases: Releases) -> None:
    parts = {
        "big.bin.001": b"one",
        "big.bin.002": b"two",
        "big.bin.003": b"3",
        "gap.bin.part1": b"",
        "gap.bin.part3": b"",
    }
    releases.publish(REPO, "parts", {"config.json": b"{}", **parts})
    releases.upload(REPO, "parts", "half.bin.part-aa", b"half")
    releases.upload(REPO, "parts", "half.bin.part-ab", b"", state="starter")
    split = store(releases, f"github://{REPO}@parts")
    found = snapshot(split)
    assert list(found.entries) == ["big.bin", "config.json"]
    assert found.entries["big.bin"].size == 7
    assert found.entries["big.bin"].digest is None
    assert read(split, found.entries["big.bin"]) == b"onetwo3"
    assert dict(found.rejected) == {
        "gap.bin": "1 of its 3 parts are missing, the first of them is part 2",
        "half.bin": "its part half.bin.part-ab is not uploaded completely",
        "half.bin.part-ab": "it is not uploaded completely",
    }
    with pytest.raises(NotFound, match="parts are missing"):
        snapshot(store(releases, f"github://{REPO}@parts/gap.bin"))


# Locations


def test_the_token_stays_with_the_api_and_the_link_with_its_expiry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "ghp_secret")
    with Releases(token="ghp_secret", life=120) as private:
        private.publish(REPO, "v1", FILES)
        asked = store(private)
        entry = snapshot(asked).entries["config.json"]
        location = trio.run(asked.locate, entry)
        assert "ghp_secret" not in f"{location.url} {location.headers}"
        assert location.expires is not None
        assert abs(location.expires - time.time() - 120) < 30  # of the two ends the JWT's, which is nearer
        assert read(asked, entry) == b"{}"


def test_a_replaced_asset_is_stale_even_for_a_store_that_never_listed(releases: Releases) -> None:
    entries = snapshot(store(releases)).entries
    assert read(store(releases), entries["config.json"]) == b"{}"
    releases.upload(REPO, "v1", "config.json", b"[]")
    with pytest.raises(Stale, match="refresh the model"):
        read(store(releases), entries["config.json"])
    with pytest.raises(Stale):
        read(store(releases), Entry("config.json", 2, "another store's version"))


# Credentials


def test_a_token_that_rotates_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("ghp_old")
    with Releases(token="ghp_old") as private:
        private.publish(REPO, "v1", FILES)
        asked = store(private, token_file=str(file))
        first = snapshot(asked)
        private.token = "ghp_new"
        with pytest.raises(AccessDenied, match="401") as caught:
            snapshot(asked)
        assert "ghp_" not in str(caught.value)
        file.write_text("ghp_new\n")
        assert snapshot(asked) == first
        file.write_text("ghp\nbroken")
        with pytest.raises(AccessDenied, match="holds no token"):
            snapshot(asked)


@pytest.mark.parametrize("name", ["GH_TOKEN", "GITHUB_TOKEN"])
def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with Releases(token="ghp_1") as private:
        private.publish(REPO, "v1", FILES)
        with pytest.raises(NotFound, match="or a private one"):
            snapshot(store(private))
        monkeypatch.setenv(name, "ghp_1")
        assert set(snapshot(store(private)).entries) == set(FILES)


def test_a_refusal_that_is_no_rate_limit_says_what_the_token_needs(releases: Releases) -> None:
    releases.refusals = [(403, {}, b'{"message": "Resource protected by organization SAML enforcement."}')]
    with pytest.raises(AccessDenied, match="single sign-on"):
        snapshot(store(releases))


# Rate limits


def test_an_unchanged_release_costs_nothing_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "ghp_1")
    with Releases(token="ghp_1", page_size=1) as private:
        private.publish(REPO, "v1", FILES)
        asked = store(private)
        first = snapshot(asked)
        private.log.clear()
        assert snapshot(asked) == first
        assert [status for _, status in private.log] == [304, 304, 304]


def test_without_a_token_listing_leaves_half_of_the_limit_for_reading(releases: Releases) -> None:
    releases.limit = (60, time.time() + 3600)
    asked = store(releases)
    first = snapshot(asked)
    releases.upload(REPO, "v1", "config.json", b"[]")
    asked_before = len(releases.log)
    assert snapshot(asked) == first
    assert len(releases.log) == asked_before
    releases.limit = (60, time.time() - 1)  # a new hour: GitHub says that the next begins any moment
    fresh = store(releases)
    assert snapshot(fresh) != first


def test_a_used_up_limit_is_obeyed_and_says_when_it_ends(releases: Releases) -> None:
    asked = store(releases)
    entry = snapshot(asked).entries["config.json"]
    releases.limit = (0, time.time() + 1800)
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"until \d\d:\d\d:\d\d UTC: set GITHUB_TOKEN") as caught:
            trio.run(asked.locate, entry)
        assert caught.value.retry_after is not None
        assert 1700 < caught.value.retry_after <= 1801
    assert [status for _, status in releases.log].count(403) == 1


@pytest.mark.parametrize(
    ("status", "headers", "body", "wait"),
    [
        (429, {"Retry-After": "7"}, b"", 7),
        (403, {"Retry-After": "9"}, b"", 9),
        (403, {}, b'{"message": "You have exceeded a secondary rate limit."}', 60),
        (429, {}, b"", 60),
    ],
)
def test_secondary_limits_are_obeyed(
    releases: Releases, status: int, headers: dict[str, str], body: bytes, wait: float
) -> None:
    releases.refusals = [(status, headers, body)]
    asked = store(releases)
    with pytest.raises(Unavailable) as caught:
        snapshot(asked)
    assert caught.value.retry_after == wait
    with pytest.raises(Unavailable):
        snapshot(asked)
    assert len(releases.log) == 1


def test_another_token_has_another_limit(releases: Releases, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("ghp_1")
    releases.token = "ghp_1"
    releases.refusals = [(429, {"Retry-After": "3600"}, b"")]
    asked = store(releases, token_file=str(file))
    with pytest.raises(Unavailable):
        snapshot(asked)
    releases.token = "ghp_2"
    file.write_text("ghp_2")
    assert set(snapshot(asked).entries) == set(FILES)
