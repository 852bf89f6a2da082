"""The layout of the Hub's cache: names, commits, and what is known to be missing."""

from __future__ import annotations

import re

import pytest
from huggingface_hub.file_download import repo_folder_name
from hypothesis import given
from hypothesis import strategies as st

from modelfs.types import Entry, Snapshot
from modelfs.views.hub import Revision, absent, commit_of, folder_of, refs, repositories, revision_in

COMMIT = "c0ffee" + "0" * 34


def snapshot(revision: str, *paths: str) -> Snapshot:
    return Snapshot.of("s3://b/m/", revision, [Entry(path, 1, "v") for path in paths])


@pytest.mark.parametrize(
    ("name", "url", "found"),
    [
        ("finbert", "hf://ProsusAI/finbert@main", ("ProsusAI/finbert",)),
        ("acme/finbert", "hf://ProsusAI/finbert@main", ("acme/finbert", "ProsusAI/finbert")),
        ("acme/finbert", "s3://bucket/finbert/", ("acme/finbert",)),
        ("finbert", "s3://bucket/finbert/", ()),
        ("gpt2", "hf://models/gpt2@main", ("gpt2",)),
        ("part", "hf://org/name@main/onnx", ()),
        ("data", "hf://datasets/org/name@main", ()),
        ("pr", "hf://org/name@refs/pr/1", ("org/name",)),
        ("a--b/c", "s3://bucket/c/", ()),
        ("a/b..c", "s3://bucket/c/", ()),
        ("a/-b", "s3://bucket/c/", ()),
        ("two words/c", "s3://bucket/c/", ()),
    ],
)
def test_repositories_of_a_model(name: str, url: str, found: tuple[str, ...]) -> None:
    assert repositories(name, url) == found


def test_a_model_can_be_a_repository_without_an_owner() -> None:
    assert repositories("finbert", "s3://b/f/", alone=True) == ("finbert",)
    assert repositories("finbert", "s3://b/f/", "hf://ProsusAI/finbert@main") == ("ProsusAI/finbert",)


@pytest.mark.parametrize("repository", ["ProsusAI/finbert", "gpt2", "a-b/c_d.e"])
def test_folders_have_the_names_that_the_library_gives_them(repository: str) -> None:
    assert folder_of(repository) == repo_folder_name(repo_id=repository, repo_type="model")


def test_revisions_of_urls() -> None:
    assert revision_in("hf://org/name@v1.0") == "v1.0"
    assert revision_in("hf://org/name@refs/pr/1") == "refs/pr/1"
    assert revision_in("s3://bucket/name@v1/") is None


def test_a_commit_is_the_stores_own_where_it_has_one() -> None:
    assert commit_of(snapshot(COMMIT, "a")) == COMMIT


@given(st.text("0123456789abcdefABCDEF:-", max_size=50), st.sets(st.sampled_from("abcdef"), min_size=1))
def test_every_snapshot_has_a_commit(revision: str, paths: set[str]) -> None:
    own = commit_of(snapshot(revision, *paths))
    assert re.fullmatch("[0-9a-f]{40}", own)
    assert own == commit_of(snapshot(revision, *paths))
    if revision:
        assert own == commit_of(snapshot(revision, *paths, "another"))
        assert own != commit_of(snapshot(f"{revision}-", *paths))
    else:  # then it is derived from what is there
        assert own != commit_of(snapshot(revision, *paths, "another"))


def test_names_of_revisions() -> None:
    one, two = snapshot("etag-1", "a"), snapshot(COMMIT, "b")
    assert refs([]) == {}
    assert refs([Revision(None, one)]) == {"main": commit_of(one)}
    assert refs([Revision("v1", one)]) == {"v1": commit_of(one), "main": commit_of(one)}
    assert refs([Revision("v1", one), Revision("main", two)]) == {"v1": commit_of(one), "main": COMMIT}
    assert refs([Revision(None, one), Revision("main", two)]) == {"main": commit_of(one)}
    assert refs([Revision(COMMIT, two)]) == {"main": COMMIT}
    assert refs([Revision("..", two)]) == {"main": COMMIT}


def test_what_is_missing() -> None:
    names = set(absent(snapshot("", "config.json", "model.safetensors", "tokenizer.json/odd")))
    assert {"adapter_config.json", "model.safetensors.index.json", "chat_template.jinja"} <= names
    assert not names & {"config.json", "model.safetensors", "tokenizer.json"}
