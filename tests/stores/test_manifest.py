"""Which manifest of an index is meant, and which files the layers of all kinds of artifacts are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import pytest

from modelfs.errors import BadAnswer, NotFound
from modelfs.stores import manifest as oci
from modelfs.types import Digest

OLLAMA = "application/vnd.ollama.image."
DOCKER = "application/vnd.docker.ai."
LAYER = "application/vnd.oci.image.layer.v1.tar"
TITLE, UNPACK = "org.opencontainers.image.title", "io.deis.oras.content.unpack"
PATH, METADATA = "org.cncf.model.filepath", "org.cncf.model.file.metadata+json"


def digest(text: str) -> str:
    return f"sha256:{sha256(text.encode()).hexdigest()}"


def row(media_type: str, content: str = "", annotations: Mapping[str, str] | None = None, **more: Any) -> Any:
    found = {"mediaType": media_type, "digest": digest(content or media_type), "size": 7, **more}
    return found | ({"annotations": annotations} if annotations else {})


def parsed(**members: Any) -> oci.Manifest:
    return oci.parse(json.dumps({"schemaVersion": 2, **members}).encode(), "oci://x")


def paths(*layers: Any) -> list[str]:
    """Return the paths of the files of an artifact, in the order of its layers."""
    entries, _ = oci.entries(parsed(layers=list(layers)), Digest.parse(digest("manifest")), 1)
    assert entries[0].path == oci.MANIFEST
    return [entry.path for entry in entries[1:]]


ARTIFACTS: Mapping[str, tuple[list[Any], list[str]]] = {
    "ollama": (
        [
            row(f"{OLLAMA}model"),
            row(f"{OLLAMA}template"),
            row(f"{OLLAMA}license", "a"),
            row(f"{OLLAMA}license", "b"),
            row(f"{OLLAMA}params"),
            row(f"{OLLAMA}projector"),
        ],
        ["model.gguf", "template", "LICENSE", "LICENSE-2", "params.json", "mmproj.gguf"],
    ),
    "ollama-tensors": (
        [row(f"{OLLAMA}tensor", name="vae/x.weight"), row(f"{OLLAMA}json", name="tokenizer.json")],
        ["vae/x.weight", "tokenizer.json"],
    ),
    "docker-gguf": (
        [row(f"{DOCKER}gguf.v3"), row(f"{DOCKER}license"), row(f"{DOCKER}chat.template.jinja")],
        ["model.gguf", "LICENSE", "chat_template.jinja"],
    ),
    "docker-shards": (
        [row(f"{DOCKER}safetensors", "a"), row(f"{DOCKER}safetensors", "b")],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ),
    "docker-files": (
        [row(f"{DOCKER}safetensors", "a", {PATH: "text_encoder/model.safetensors"})],
        ["text_encoder/model.safetensors"],
    ),
    "modelpack": (
        [
            row("application/vnd.cncf.model.weight.v1.raw", "a", {PATH: "./x/model.safetensors"}),
            row("application/vnd.cnai.model.doc.v1.raw", "b", {"org.cnai.model.filepath": "README.md"}),
        ],
        ["x/model.safetensors", "README.md"],
    ),
    "oras": (
        [row(LAYER, "a", {TITLE: "model.onnx"}), row("text/plain", "b", {TITLE: "docs/notes.txt"})],
        ["model.onnx", "docs/notes.txt"],
    ),
    "unknown": ([row("application/x-mystery", "a")], [f"sha256-{digest('a')[7:19]}"]),
}


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_files_have_the_names_that_their_makers_gave(kind: str) -> None:
    layers, meant = ARTIFACTS[kind]
    assert paths(*layers) == meant


ARCHIVES: Mapping[str, tuple[Any, str]] = {
    "oci": (row(LAYER), "tar"),
    "oci-gzip": (row(f"{LAYER}+gzip"), "tar.gz"),
    "oci-zstd": (row(f"{LAYER}+zstd"), "tar.zst"),
    "docker-gzip": (row("application/vnd.docker.image.rootfs.diff.tar.gzip"), "tar.gz"),
    "oras-directory": (row(f"{LAYER}+gzip", "", {TITLE: "data", UNPACK: "true"}), "tar.gz"),
    "modelpack": (row("application/vnd.cncf.model.weight.v1.tar", "", {PATH: "model"}), "tar"),
    "kitops": (row("application/vnd.kitops.modelkit.model.v1.tar+gzip"), "tar.gz"),
    "docker-directory": (row(f"{DOCKER}dir.tar", "", {PATH: "onnx"}), "tar"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_layers_that_are_archives_are_kept_apart(kind: str) -> None:
    layer, suffix = ARCHIVES[kind]
    assert paths(layer) == [f".oci/layers/0-{layer['digest'][7:19]}.{suffix}"]


def test_layers_stay_in_order_however_many_there_are() -> None:
    found = paths(*(row(LAYER, str(number)) for number in range(12)))
    assert found == sorted(found)


def test_a_directory_holds_its_files_and_layers_that_may_hold_more() -> None:
    layers = [row(LAYER), row("x/raw", "a", {PATH: "models/a"}), row("x/raw", "b", {PATH: "models-2/b"})]
    listed, _ = oci.entries(parsed(layers=layers), Digest.parse(digest("m")), 1, "models")
    assert [entry.path for entry in listed] == [f".oci/layers/models/0-{digest(LAYER)[7:19]}.tar", "a"]


@pytest.mark.parametrize("directory", ["", "models", "opt/models"])
def test_layers_are_found_with_the_directory_that_they_stand_for(directory: str) -> None:
    rows = [row(LAYER, str(number)) for number in range(11)]
    entries, _ = oci.entries(parsed(layers=rows), Digest.parse(digest("m")), 1, directory)
    found, paths = oci.layers_in(reversed([entry.path for entry in entries] + ["a", ".oci/x"]))
    assert found == directory
    assert [path.rpartition("-")[2] for path in paths] == [
        f"{digest(str(number))[7:19]}.tar" for number in range(11)
    ]
    assert oci.layers_in(["a", ".oci/manifest.json"]) == ("", [])


def test_versions_are_digests_and_times_are_stable() -> None:
    noted = {PATH: "a", METADATA: '{"name": "a", "mtime": "2025-06-01T12:00:00.123456789Z"}'}
    layers = [row("x/raw", "a", noted), row("x/raw", "b", {PATH: "b", METADATA: "{"})]
    created = {"org.opencontainers.image.created": "2024-01-01T00:00:00Z"}
    found, _ = oci.entries(parsed(layers=layers, annotations=created), Digest.parse(digest("m")), 1)
    assert [(entry.version, entry.mtime) for entry in found[1:]] == [
        (digest("a"), 1748779200.123456),
        (digest("b"), 1704067200.0),
    ]


@pytest.mark.parametrize("directory", ["", "models"])
def test_no_file_passes_for_a_layer(directory: str) -> None:
    path = f"{directory}/.oci/layers/0-x.tar".removeprefix("/")
    listed, rejected = oci.entries(
        parsed(layers=[row("x/raw", "a", {PATH: path})]), Digest.parse(digest("m")), 1, directory
    )
    assert oci.layers_in(entry.path for entry in listed) == ("", [])
    assert [path for path, _ in rejected] == [".oci/layers/0-x.tar"]


def test_a_file_that_is_there_twice_is_listed_once() -> None:
    layer = row("x/raw", "a", {PATH: "a"})
    assert paths(layer, layer) == ["a"]


# Indexes.


def child(name: str, platform: str, annotations: Mapping[str, str] | None = None) -> Any:
    keys = dict(zip(("os", "architecture", "variant"), platform.split("/"), strict=False))
    return row("application/vnd.oci.image.manifest.v1+json", name, annotations, platform=keys)


def chosen(wanted: str | None, *rows: Any) -> str:
    return str(oci.choose(parsed(manifests=list(rows)), wanted, "oci://x").digest)


LINUX = [child("amd", "linux/amd64"), child("arm", "linux/arm64/v8"), child("s390x", "linux/s390x")]
SBOM = child("sbom", "unknown/unknown", {"vnd.docker.reference.type": "attestation-manifest"})
MODEL = child("model", "unknown/unknown")


@pytest.mark.parametrize(
    ("machine", "wanted", "rows", "meant"),
    [
        ("x86_64", None, LINUX, "amd"),
        ("aarch64", None, LINUX, "arm"),
        ("s390x", None, LINUX, "s390x"),
        ("x86_64", "linux/arm64", LINUX, "arm"),
        ("x86_64", "linux/arm64/v8", LINUX, "arm"),
        ("x86_64", None, [SBOM, LINUX[1]], "arm"),
        ("x86_64", None, [LINUX[1], MODEL], "model"),
        ("x86_64", None, [SBOM, MODEL], "model"),
        ("x86_64", None, [LINUX[1], LINUX[2], child("model", "")], "model"),
    ],
)
def test_the_manifest_of_an_index_that_fits_is_chosen(
    machine: str, wanted: str | None, rows: list[Any], meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert chosen(wanted, *rows) == digest(meant)


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [(None, LINUX[1:]), ("linux/arm", LINUX), ("windows/amd64", LINUX), (None, [SBOM])],
    ids=["other-machines", "prefix", "other-system", "attestation"],
)
def test_no_manifest_is_guessed(wanted: str | None, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(NotFound):
        chosen(wanted, *rows)


# What is no manifest.


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"layers": {}},
        {"layers": [5]},
        {"layers": [{"mediaType": "x/y", "size": 1}]},
        {"layers": [row("x/y") | {"digest": "sha256:12"}]},
        {"layers": [row("x/y") | {"digest": "sha256:../../x"}]},
        {"layers": [row("x/y") | {"digest": "md5:" + "0" * 32}]},
        {"layers": [row("x/y") | {"digest": 7}]},
        {"layers": [row("x/y") | {"size": -1}]},
        {"layers": [row("x/y") | {"size": 1 << 63}]},
        {"layers": [row("x/y") | {"size": "1"}]},
        {"layers": [row("x/y") | {"size": True}]},
        {"layers": [], "config": []},
        {"manifests": [None]},
    ],
    ids=lambda members: json.dumps(members)[:40],
)
def test_malformed_manifests_are_refused(members: Mapping[str, Any]) -> None:
    with pytest.raises(BadAnswer):
        parsed(**members)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"schemaVersion": 1}', "[" * 100_000, "\xff"])
def test_what_is_no_manifest_at_all_is_refused(text: str) -> None:
    with pytest.raises(BadAnswer):
        oci.parse(text.encode("latin-1"), "oci://x")


def test_members_of_strange_types_do_not_matter() -> None:
    odd = {"mediaType": 5, "annotations": {PATH: 7, TITLE: "a"}, "platform": "linux", "name": []}
    assert paths({"digest": digest("a"), "size": 1, **odd}) == ["a"]
