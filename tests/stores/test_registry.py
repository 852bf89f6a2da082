"""The table of schemes: what opens a store, what other packages can add, what messages may show."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from modelfs.errors import ConfigError
from modelfs.stores import SCHEMES, Store, known_schemes, open_store, redact, scheme_of
from modelfs.testing import check_store

PLUGIN = """
from modelfs.testing import MemoryStore

def opened(url, options):
    return MemoryStore(url, {"weights": options["content"].encode()})
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package with two schemes, one of which cannot be loaded."""
    (tmp_path / "modelfs_notes.py").write_text(PLUGIN)
    info = tmp_path / "modelfs_notes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modelfs-notes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[modelfs.stores]\nnotes = modelfs_notes:opened\nbroken = modelfs_notes:missing\nfile = evil:Store\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("modelfs_notes", None)


@pytest.mark.parametrize("scheme", ["file", "http", "https", "mock"])
def test_every_scheme_of_ours_opens_a_store(scheme: str) -> None:
    url = {"file": "file:///srv", "mock": "mock://bert"}.get(scheme, f"{scheme}://example.com/")
    assert isinstance(open_store(url), Store)


def test_schemes_are_not_case_sensitive() -> None:
    assert open_store("MOCK://bert").url == "mock://bert"


def test_an_unknown_scheme_says_which_are_known() -> None:
    with pytest.raises(ConfigError) as caught:
        open_store("ftp://user:s3cret@host/x")
    assert str(caught.value) == f"unknown scheme ftp://: known are {', '.join(sorted(SCHEMES))}"


@pytest.mark.parametrize("url", ["", "bert", "/srv/models", "://x", "s3:/bucket", "host:s3cret@x"])
def test_what_is_no_url_says_how_to_write_one(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a store URL: write SCHEME://") as caught:
        scheme_of(url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.usefixtures("plugin")
def test_another_package_adds_a_scheme() -> None:
    assert "notes" in known_schemes()
    store = open_store("notes://mine", {"content": "hello"})
    trio.run(check_store, store, {"weights": b"hello"})


@pytest.mark.usefixtures("plugin")
def test_a_scheme_that_cannot_be_loaded_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"broken:// \(modelfs_notes:missing\) cannot be loaded"):
        open_store("broken://x")


@pytest.mark.usefixtures("plugin")
def test_another_package_cannot_take_over_a_scheme_of_ours() -> None:
    assert open_store("file:///srv").url == "file:///srv"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("https://user:s3cret@host:8443/a/b?X-Amz-Signature=s3cret#s3cret", "https://host:8443/a/b"),
        ("https://s3cret@host/", "https://host/"),
        ("https://u:p@w@host/", "https://host/"),
        ("user:s3cret@host/path?s3cret", "host/path"),
        ("file:///srv/a@b", "file:///srv/a@b"),
        ("https://[s3cret@host/?s3cret", "host/"),
    ],
)
def test_redact_leaves_no_secret(url: str, shown: str) -> None:
    assert redact(url) == shown
