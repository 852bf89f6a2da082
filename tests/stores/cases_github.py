"""Releases on GitHub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelfs.stores.github import GitHubStore
from tests.releases import Releases
from tests.stores.case import FILES, Case, Opened

# GitHub has no directories, and replaces what it does not like in names.
FLAT = {path: data for path, data in FILES.items() if path.isascii() and path.replace(".", "").isalnum()}
TOKEN = "ghp_modelfsTestToken"  # accepted by this server only


@contextmanager
def public(directory: Path) -> Iterator[Opened]:
    with Releases(page_size=2) as releases:
        releases.publish("org/repo", "v1.0.0", FLAT)
        yield GitHubStore("github://org/repo@v1.0.0", releases.options), FLAT


@contextmanager
def private(directory: Path) -> Iterator[Opened]:
    token = directory / "token"
    token.write_text(f"{TOKEN}\n")
    with Releases(token=TOKEN) as releases:
        releases.publish("org/repo", "v1.0.0", FLAT, digests=False)
        yield GitHubStore("github://org/repo", {**releases.options, "token_file": str(token)}), FLAT


@contextmanager
def one_file_in_parts(directory: Path) -> Iterator[Opened]:
    data = FILES["model.safetensors"]
    with Releases() as releases:
        parts = {
            f"m.gguf.part-{end}": data[at : at + 30_000]
            for end, at in (("aa", 0), ("ab", 30_000), ("ac", 60_000))
        }
        releases.publish("org/repo", "release/v1", {"other": b"x", **parts})
        yield GitHubStore("github://org/repo@release%2Fv1/m.gguf", releases.options), {"m.gguf": data}


@contextmanager
def enterprise(directory: Path) -> Iterator[Opened]:
    with Releases() as releases:
        releases.direct = True
        releases.publish("org/repo", "v1", FLAT)
        yield GitHubStore("github://org/repo@v1", releases.options), FLAT


CASES = [
    Case("github", public),
    Case("github-private", private, secrets=(TOKEN,)),
    Case("github-parts", one_file_in_parts),
    Case("github-enterprise", enterprise),
]
