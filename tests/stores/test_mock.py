"""mock:// stores: real loaders load what they make, and it is the same everywhere."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import pickletools
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import trio

from modelfs.errors import ConfigError, NotFound, Stale, Unavailable
from modelfs.stores import open_store
from modelfs.stores.file import token_of
from modelfs.types import Entry
from tests.stores.case import write_tree
from tests.stores.cases_mock import content


def run(script: str, *arguments: str) -> str:
    """Return the output of `script` run by a Python of its own, where every warning is an error."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_loads_the_bert(tmp_path: Path) -> None:
    write_tree(tmp_path, content("mock://sentiment"))
    output = run(
        """
        import json, sys
        from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
        path = sys.argv[1]
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
        hidden = AutoModel.from_pretrained(path)(**tokenizer("x", return_tensors="pt")).last_hidden_state
        classify = pipeline("sentiment-analysis", model=path)
        print(json.dumps({
            "tokens": tokenizer.tokenize("A GREAT movie, zz!"),
            "ids": tokenizer("good")["input_ids"],
            "unknown": tokenizer.tokenize("\\u6a21"),
            "info": {name: sorted(map(str, keys)) for name, keys in info.items()},
            "shape": list(hidden.shape),
            "answers": classify(["a great movie", "a bad movie"]),
        }))
        """,
        str(tmp_path),
    )
    found = json.loads(output)
    assert found["tokens"] == ["a", "great", "movie", ",", "z", "##z", "!"]
    assert [found["ids"][0], found["ids"][-1]] == [2, 3]
    assert found["unknown"] == ["[UNK]"]
    assert not any(found["info"].values()), found["info"]
    assert found["shape"] == [1, 3, 32]
    assert {answer["label"] for answer in found["answers"]} <= {"NEGATIVE", "POSITIVE"}
    assert len({answer["score"] for answer in found["answers"]}) == 2, "the text makes no difference"


def test_scikit_learn_loads_the_pickles(tmp_path: Path) -> None:
    write_tree(tmp_path, content("mock://sklearn"))
    output = run(
        """
        import json, pickle, sys, warnings
        warnings.simplefilter("error")
        from pathlib import Path
        import joblib
        path = Path(sys.argv[1])
        preprocessor = pickle.loads((path / "preprocessor.pkl").read_bytes())
        model = joblib.load(path / "best_model.pkl")
        rows = preprocessor.transform([[1.0] * 13, [200.0] * 13])
        print(json.dumps({
            "kinds": [type(preprocessor).__name__, type(model).__name__],
            "scaled": rows.shape,
            "labels": model.predict(rows).tolist(),
            "sums": model.predict_proba(rows).sum(axis=1).round(9).tolist(),
            "undone": preprocessor.inverse_transform(rows).round(9).tolist() == [[1.0] * 13, [200.0] * 13],
        }))
        """,
        str(tmp_path),
    )
    found = json.loads(output)
    assert found["kinds"] == ["StandardScaler", "LogisticRegression"]
    assert found["scaled"] == [2, 13]
    assert set(found["labels"]) <= {0, 1}
    assert found["sums"] == [1.0, 1.0]
    assert found["undone"]


def test_the_pickles_are_well_formed() -> None:
    for data in content("mock://sklearn").values():
        pickletools.dis(data, out=io.StringIO())


# What users' tests rely on must not change by accident.
KNOWN = {
    "mock://bert": "4d2a39f8696e86a9",
    "mock://sklearn": "c356ac715083194f",
    "mock://random?files=2&size=5": "dfd5365006fde3a2",
}


def fingerprint(url: str) -> str:
    hasher = hashlib.sha256()
    for path, data in sorted(content(url).items()):
        hasher.update(f"{path}:{len(data)}:".encode() + data)
    return hasher.hexdigest()[:16]


@pytest.mark.parametrize("url", KNOWN)
def test_a_url_means_the_same_bytes_for_ever(url: str) -> None:
    assert fingerprint(url) == KNOWN[url]


def test_name_and_seed_make_a_difference() -> None:
    urls = ["mock://bert", "mock://other", "mock://bert?seed=1", "mock://bert?seed=2"]
    assert len({content(url)["model.safetensors"] for url in urls}) == 4
    assert len({content(url)["tokenizer.json"] for url in urls}) == 1


def test_random_files_are_as_many_and_as_large_as_asked() -> None:
    files = content("mock://random?files=3&size=5000")
    assert {path: len(data) for path, data in files.items()} == {
        "part-00000.bin": 5000,
        "part-00001.bin": 5000,
        "part-00002.bin": 5000,
    }
    assert len(set(files.values())) == 3


def test_large_files_are_written_once_and_end_with_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = open_store("mock://random?files=1&size=3000000")
    entry = trio.run(store.entry, "part-00000.bin")
    assert not list(tmp_path.iterdir()), "written before anybody asked for it"
    locations = [trio.run(store.locate, entry) for _ in range(2)]
    assert locations[0] == locations[1]
    file = Path(unquote(urlsplit(locations[0].url).path))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == entry.version
    assert file.parent.stat().st_mode & 0o777 == 0o700
    file.unlink()  # cleaners of temporary directories do that
    again = trio.run(store.locate, entry)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == entry.version
    assert again.token == token_of(file.stat())
    del store
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_full_temporary_directory_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    store = open_store("mock://random?size=300000")
    entry = trio.run(store.entry, "part-00000.bin")
    with pytest.raises(Unavailable, match="free the temporary directory"):
        trio.run(store.locate, entry)


@pytest.mark.parametrize(
    "entry", [Entry("config.json", 1, "other"), Entry("gone", 1, "x"), Entry("..", 1, "x")]
)
def test_an_entry_of_another_model_is_stale(entry: Entry) -> None:
    with pytest.raises(Stale):
        trio.run(open_store("mock://bert").locate, entry)


def test_a_mock_is_found_and_not_found() -> None:
    store = open_store("mock://bert")
    assert trio.run(store.entry, "config.json").mtime == 1_700_000_000.0
    with pytest.raises(NotFound):
        trio.run(store.entry, "pytorch_model.bin")


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("mock://bert", "mock://bert"),
        ("mock://bert/?seed=0", "mock://bert"),
        ("mock://ORG/Name?seed=a%20b", "mock://ORG/Name?seed=a+b"),
        ("mock://random?size=5&files=2", "mock://random?files=2&size=5"),
    ],
)
def test_urls_have_one_canonical_form(url: str, canonical: str) -> None:
    assert open_store(url).url == canonical


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("mock://", "write mock://NAME"),
        ("mock://user:password@bert", "write mock://NAME"),
        ("mock://a b", "write mock://NAME"),
        ("mock://bert#x", "write mock://NAME"),
        ("mock://[", "malformed"),
        ("mock://bert?seed", "malformed"),
        ("mock://bert?files=2", "unknown parameter 'files'; accepted are: seed"),
        ("mock://random?count=2", "unknown parameter 'count'; accepted are: files, seed, size"),
        ("mock://random?files=-1", "files must be a number"),
        ("mock://random?size=1MB", "size must be a number"),
        ("mock://random?size=", "size must be a number"),
    ],
)
def test_a_bad_url_is_a_config_error(url: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        open_store(url)
    assert "password" not in str(caught.value)


def test_an_unknown_option_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="unknown option 'seed'"):
        open_store("mock://bert", {"seed": 1})
