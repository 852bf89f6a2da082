"""The stores of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelfs.stores.hf import HubStore
from modelfs.testing.hub import TOKEN, HubServer
from tests.stores.case import FILES, Case, Opened


@contextmanager
def public(directory: Path) -> Iterator[Opened]:
    with HubServer(page_size=4) as hub:
        hub.add("org/name", FILES)
        yield HubStore("hf://org/name", {"endpoint": hub.url}), FILES


@contextmanager
def private_directory(directory: Path) -> Iterator[Opened]:
    token = directory / "token"
    token.write_text(f"{TOKEN}\n")
    with HubServer() as hub:
        below = {f"onnx/{path}": data for path, data in FILES.items()}
        hub.add("org/name", {"beside": b"", "onnx-other/x": b"", **below}, revision="refs/pr/1", private=True)
        options = {"endpoint": hub.url, "token_file": str(token)}
        yield HubStore("hf://org/name@refs/pr/1/onnx", options), FILES


@contextmanager
def one_file(directory: Path) -> Iterator[Opened]:
    with HubServer() as hub:
        hub.add("name", {"a/q4.gguf": b"quantised", "a/q8.gguf": b"more"})
        yield HubStore("hf://name@main/a/q4.gguf", {"endpoint": hub.url}), {"q4.gguf": b"quantised"}


CASES = [
    Case("hf", public),
    Case("hf-private-directory", private_directory, secrets=(TOKEN,)),
    Case("hf-one-file", one_file),
]
