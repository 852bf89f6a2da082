"""The layout of Ollama's models: which artifacts it can name, and what they consist of."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.types import Digest, Entry, Snapshot
from modelfs.views.ollama import MANIFEST, blobs, is_artifact, manifest_of

MODEL = "application/vnd.ollama.image.model"


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("oci://registry.ollama.ai/library/llama3.2:1b", "registry.ollama.ai/library/llama3.2/1b"),
        ("oci://127.0.0.1:5000/me/tiny:latest", "127.0.0.1:5000/me/tiny/latest"),
        ("oci://registry.local/tiny:v1", "registry.local/library/tiny/v1"),
        (
            "oci://registry.ollama.ai/library/tiny@sha256:" + "0" * 64,
            "registry.ollama.ai/library/tiny/latest",
        ),
        ("oci://registry.local/a/b/c:latest", None),
        ("s3://bucket/library/tiny/", None),
        ("hf://org/name@main", None),
    ],
)
def test_names(url: str, place: str | None) -> None:
    assert manifest_of(url) == (f"manifests/{place}" if place else None)


def test_artifacts() -> None:
    assert is_artifact(json.dumps({"schemaVersion": 2, "layers": [{"mediaType": MODEL}]}))
    assert not is_artifact(json.dumps({"layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar"}]}))


@given(
    st.recursive(st.none() | st.text() | st.integers(), lambda s: st.lists(s) | st.dictionaries(st.text(), s))
)
def test_what_is_no_manifest(value: object) -> None:
    assert not is_artifact(json.dumps({"layers": value}))
    assert not is_artifact(json.dumps(value)[:-1])


def test_blobs() -> None:
    digests = [Digest("sha256", digit * 64) for digit in "0123"]
    paths = MANIFEST, ".oci/config.json", "model.gguf", "template"
    listed = [Entry(path, 9, str(digest), digest) for path, digest in zip(paths, digests, strict=True)]
    snapshot = Snapshot.of("oci://h/n/m:t", "", [*listed, Entry("unknown", 9, "v")])
    assert dict(blobs(snapshot)) == {
        f"blobs/sha256-{digit * 64}": entry for digit, entry in zip("0123", listed, strict=True)
    }
