"""Models by name: libraries find them under ``/.hub`` as in a cache of their own, wherever they come from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from modelfs.testing.hub import HubServer
from modelfs.testing.s3 import S3Server
from tests import zoo as models_of
from tests.mount.harness import Mounted, Reader, alone, eventually, mounted, open_directory

REPOSITORY = Path(__file__).parents[2]
PUBLISHED = "sentence-transformers/all-MiniLM-L6-v2"
SOURCES = (PUBLISHED, "acme/from-s3", "acme/from-a-directory")

LOAD = """
import json, sys
import huggingface_hub, sentence_transformers, transformers
from tests.mount.loaders import TEXTS, fingerprint

def loaded(name):
    model = transformers.AutoModel.from_pretrained(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return fingerprint([model.state_dict(), tokenizer(TEXTS)["input_ids"]])

names = sys.argv[2:]
results = {name: loaded(name) for name in names}
results["expected"] = loaded(sys.argv[1])
for what, name in ("sentences", names[0]), ("expected sentences", sys.argv[1]):
    encoder = sentence_transformers.SentenceTransformer(name, device="cpu")
    results[what] = fingerprint(encoder.encode(TEXTS))
results["snapshots"] = [huggingface_hub.snapshot_download(name) for name in names]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def minilm() -> Iterator[Path]:
    with open_directory() as directory:
        models_of.build(directory, ["minilm"])
        yield directory / "minilm"


@pytest.fixture(scope="module")
def mount(minilm: Path, transport: str) -> Iterator[Mounted]:
    files = {str(path.relative_to(minilm)): path for path in minilm.rglob("*") if path.is_file()}
    with ExitStack() as stack:
        hub, s3 = stack.enter_context(HubServer()), stack.enter_context(S3Server())
        hub.add(PUBLISHED, files)
        s3.client().create_bucket(Bucket="models")
        for name, path in files.items():
            s3.put_file("models", f"minilm/{name}", path)
        sources = {
            "minilm": f"hf://{PUBLISHED}",
            "acme/from-s3": "s3://models/minilm/",
            "acme/from-a-directory": minilm.as_uri(),
        }
        yield stack.enter_context(
            mounted(
                stack.enter_context(open_directory()),
                "--allow-other",
                sources=sources,
                env={**hub.env(), **s3.env()},
                transport=transport,
            )
        )


def by_name(mount: Mounted, home: Path, **more: str) -> Mapping[str, str]:
    """The environment of a process that loads by name."""
    return {
        "HF_HUB_CACHE": str(mount.path / ".hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home),
        "HOME": str(home),
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


@pytest.mark.parametrize(
    ("transport", "user"),
    [("kernel", None), ("kernel", "nobody"), ("pyfuse3", "nobody")],
    ids=["kernel-root", "kernel-nobody", "pyfuse3-nobody"],
    indirect=["transport"],
)
def test_unmodified_libraries_load_by_name(
    mount: Mounted, minilm: Path, transport: str, user: str | None
) -> None:
    # Where the bytes come from is one thing, who reads them and how another: not every pair is tried.
    names = SOURCES if transport == "kernel" and user is None else SOURCES[:1]
    with open_directory() as home:
        if user:
            shutil.chown(home, user)
        code = f"import sys; sys.path.append({str(REPOSITORY)!r})\n{LOAD}"
        results = json.loads(mount.python(code, str(minilm), *names, user=user, env=by_name(mount, home)))
    assert {results[name] for name in names} == {results["expected"]}
    assert results["sentences"] == results["expected sentences"]
    for path in map(Path, results["snapshots"]):
        assert path.is_relative_to(mount.path / ".hub")
        assert (path / "config.json").read_bytes() == (minilm / "config.json").read_bytes()


def test_nothing_is_fetched_twice(mount: Mounted, minilm: Path) -> None:
    commit = (mount.path / ".hub" / "models--acme--from-s3" / "refs" / "main").read_text()
    shown = mount.path / ".hub" / "models--acme--from-s3" / "snapshots" / commit / "model.safetensors"
    mount.run("cksum", str(shown))
    before = mount.requests()
    mount.run("cmp", str(mount.path / "acme" / "from-s3" / "model.safetensors"), str(shown))
    assert mount.requests() == before
    assert os.stat(shown).st_ino != os.stat(mount.path / "acme" / "from-s3" / "model.safetensors").st_ino


def test_the_root_lists_models_only(mount: Mounted) -> None:
    assert os.listdir(mount.path) == ["acme", "minilm", "model-metadata.yaml"]
    assert sorted(os.listdir(mount.path / ".hub")) == [
        "models--acme--from-a-directory",
        "models--acme--from-s3",
        "models--sentence-transformers--all-MiniLM-L6-v2",
    ]
    models = {model["name"]: model["repositories"] for model in mount.status()["models"]}
    assert models == {"minilm": [PUBLISHED], **{name: [name] for name in SOURCES[1:]}}


CACHED = """
import sys
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
for name in sys.argv[2:]:
    found = try_to_load_from_cache(sys.argv[1], name)
    print("absent" if found is _CACHED_NO_EXIST else found)
"""


def test_the_library_knows_what_is_not_there(mount: Mounted, place: Path) -> None:
    env = by_name(mount, place)
    names = "adapter_config.json", "model.safetensors.index.json", "1_Pooling/config.json"
    *absent, found = mount.python(CACHED, PUBLISHED, *names, env=env).split()
    assert absent == ["absent", "absent"]
    assert found.endswith("/1_Pooling/config.json")


# -- one small repository, on demand, over refreshes and hand-overs --------------------------------------


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def test_a_reader_keeps_the_commit_it_was_told(place: Path, hub: HubServer, transport: str) -> None:
    first = hub.add("org/name", {"config.json": b"first", "model.bin": b"1" * 100_000})
    sources, env = {"m": "hf://org/name"}, {**hub.env(), **alone(place)}
    with mounted(place, "--refresh", "0", sources=sources, env=env, transport=transport) as mount:
        folder = mount.path / ".hub" / "models--org--name"
        old = folder / "snapshots" / first
        assert (folder / "refs" / "main").read_bytes() == first.encode()
        code = "f = open(sys.argv[1]); step(f.read(5)); f.seek(0); step(f.read()); f.seek(0); step(f.read())"
        with Reader(code, old / "config.json") as reader:
            assert reader.said() == "first"
            second = hub.add("org/name", {"config.json": b"second", "model.bin": b"2" * 100_000})
            mount.cli("refresh", str(mount.path))
            eventually(lambda: (folder / "refs" / "main").read_bytes() == second.encode())
            assert (folder / "snapshots" / second / "config.json").read_text() == "second"
            assert (old / "model.bin").read_bytes() == b"1" * 100_000
            numbers = {path: path.stat().st_ino for path in sorted(folder.rglob("*"))}
            reader.go_on()
            assert reader.said() == "first"
            if transport == "kernel":
                mount.cli("upgrade", str(mount.path))
                eventually(lambda: mount.status()["handovers"] == 1)
                mount.drop_pages()
                assert {path: path.stat().st_ino for path in sorted(folder.rglob("*"))} == numbers
                assert (old / "model.bin").read_bytes() == b"1" * 100_000
            reader.go_on()
            assert reader.said() == "first"


def test_repositories_are_found_on_demand(place: Path, hub: HubServer, transport: str) -> None:
    commit = hub.add("org/name", {"config.json": b"{}"})
    hub.add("evil/name", {"config.json": b"{}"})
    hub.tag("org/name", "v1", hub.add("org/name", {"config.json": b"old"}, revision="old"))
    env = {**hub.env(), **alone(place)}
    with mounted(place, config="namespaces: [hf/org]\n", env=env, transport=transport) as mount:
        shown = mount.path / ".hub"
        assert os.listdir(shown) == []
        assert (mount.path / "hf" / "org" / "name@v1" / "config.json").read_text() == "old"
        for name in ("evil--name", "org", "org--name--x", "org--..", "org--na me", "org--missing"):
            assert not (shown / f"models--{name}").exists()
        assert (shown / "models--org--name" / "refs" / "main").read_text() == commit
        assert (shown / "models--org--name" / "snapshots" / commit / "config.json").read_text() == "{}"
        assert (mount.path / "hf" / "org" / "name" / "config.json").read_text() == "{}"
        if transport == "kernel":
            mount.cli("upgrade", str(mount.path))
            eventually(lambda: mount.status()["handovers"] == 1)
            assert (shown / "models--org--name" / "snapshots" / commit / "config.json").read_text() == "{}"


def test_a_model_can_be_a_cache_itself(place: Path, hub: HubServer, transport: str) -> None:
    (place / "origin").mkdir()
    (place / "origin" / "config.json").write_text("{}")
    commit = hub.add("org/name", {"config.json": b"{}"})
    config = f"""
models:
  own: {{source: "file://{place}/origin", layout: hub}}
  tagged: {{source: "hf://org/name@main", layout: hub, exclude: "*.json"}}
"""
    with mounted(place, config=config, env=hub.env(), transport=transport) as mount:
        own = mount.path / "own" / "models--own"
        assert (own / "snapshots" / (own / "refs" / "main").read_text() / "config.json").read_text() == "{}"
        assert os.listdir(mount.path / "own") == ["models--own"]
        assert sorted(os.listdir(mount.path / "tagged")) == ["models--org--name", "models--tagged"]
        tagged = mount.path / "tagged" / "models--org--name"
        assert (tagged / "refs" / "main").read_text() == commit
        assert os.listdir(tagged / "snapshots" / commit) == []
        assert (tagged / ".no_exist" / commit / "tokenizer.json").exists()
        assert mount.status()["models"][1]["hidden"] == 1
