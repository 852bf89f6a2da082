"""What kaggle:// promises beyond the contract, and that the Kaggle it is tested against is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, Unavailable
from modelfs.stores import identity_of, open_store
from modelfs.stores.kaggle import KaggleStore
from modelfs.stores.web import basic_auth
from modelfs.testing import read_span
from modelfs.types import Entry, Snapshot, Span
from tests.kaggle import Kaggle

MODEL = "org/bert/pyTorch/base"
FILES = {"config.json": b"{}", "sub/model.safetensors": bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in [name for name in os.environ if name.startswith("KAGGLE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kaggle").mkdir()
    return tmp_path / ".kaggle"


@pytest.fixture
def kaggle() -> Iterator[Kaggle]:
    with Kaggle() as server:
        server.versions[MODEL] = [dict(FILES)]
        yield server


def store(kaggle: Kaggle, version: str = "") -> KaggleStore:
    return KaggleStore(f"kaggle://{MODEL}{version}", kaggle.options)


def snapshot(store: KaggleStore) -> Snapshot:
    return trio.run(store.snapshot)


def read(store: KaggleStore, entry: Entry) -> bytes:
    async def main() -> bytes:
        return await read_span(await store.locate(entry), Span(0, entry.size))

    return trio.run(main)


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("kaggle://google/bert/tensorFlow2/a-b_c.d/", "kaggle://google/bert/tensorFlow2/a-b_c.d"),
        ("Kaggle://a/b/c/d/12", "kaggle://a/b/c/d/12"),
    ],
)
def test_a_url_has_one_canonical_form(url: str, canonical: str) -> None:
    assert open_store(url).url == canonical


@pytest.mark.parametrize(
    "url",
    [f"kaggle://{rest}" for rest in ("", "a/b/c", "a/b/c/d/latest", "a/b/c/d/0", "a/b/../d", "a/b/c/d/1/x")],
)
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="kaggle://OWNER"):
        KaggleStore(url, {})


def test_the_endpoint_comes_from_the_environment_and_is_part_of_the_identity(
    kaggle: Kaggle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = identity_of(KaggleStore(f"kaggle://{MODEL}", {}))
    monkeypatch.setenv("KAGGLE_API_ENDPOINT", kaggle.url)
    there = KaggleStore(f"kaggle://{MODEL}", {})
    assert set(snapshot(there).entries) == set(FILES)
    assert identity_of(there) != usual
    with pytest.raises(ConfigError, match="endpoint must look like"):
        KaggleStore(f"kaggle://{MODEL}", {"endpoint": "https://user:pw@host"})


def test_the_newest_version_is_followed_and_a_numbered_one_is_not(kaggle: Kaggle) -> None:
    newest, first = store(kaggle), store(kaggle, "/1")
    before = snapshot(newest)
    assert before.revision == "1"
    assert before.entries["config.json"].mtime == 1_709_294_400.123
    kaggle.log.clear()
    assert snapshot(newest) == before
    assert len(kaggle.log) == 1
    kaggle.versions[MODEL].append({"config.json": b"[]"})
    after = snapshot(newest)
    assert (after.revision, list(after.entries)) == ("2", ["config.json"])
    assert set(snapshot(first).entries) == set(FILES)
    # What was listed before comes from where it was listed, also for a store that never listed it.
    assert read(newest, before.entries["config.json"]) == b"{}"
    assert read(store(kaggle), after.entries["config.json"]) == b"[]"
    kaggle.versions[MODEL][0] = None
    with pytest.raises(Stale, match="refresh the model"):
        read(newest, before.entries["config.json"])
    with pytest.raises(NotFound, match="check the URL"):
        snapshot(store(kaggle, "/1"))


def test_many_files_are_listed_whole(kaggle: Kaggle) -> None:
    files = {f"shard-{number:04}.bin": b"%d" % number for number in range(251)}
    kaggle.versions[MODEL].append(dict(files))
    assert set(snapshot(store(kaggle)).entries) == set(files)


@pytest.mark.parametrize(
    ("status", "error"), [(401, AccessDenied), (403, AccessDenied), (429, Unavailable), (500, Unavailable)]
)
def test_refusals_say_what_to_do(kaggle: Kaggle, status: int, error: type[Exception]) -> None:
    kaggle.refusals = [status]
    with pytest.raises(error) as caught:
        snapshot(store(kaggle))
    if status == 403:
        assert f"{kaggle.url}/models/org/bert" in str(caught.value)


def test_a_server_of_another_kind_is_refused(kaggle: Kaggle) -> None:
    kaggle.versions[MODEL] = []
    kaggle.refusals = [200]
    with pytest.raises(BadAnswer, match="check the endpoint"):
        snapshot(store(kaggle))


def test_credentials_are_found_where_kaggles_own_tools_find_them(
    monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
) -> None:
    def accepted(authorization: str) -> bool:
        kaggle.authorization = authorization
        return set(snapshot(store(kaggle)).entries) == set(FILES)

    with Kaggle() as kaggle:
        kaggle.versions[MODEL] = [dict(FILES)]
        (home / "kaggle.json").write_text(json.dumps({"username": "me", "key": "from-file"}))
        assert accepted(basic_auth("me", "from-file"))
        monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "other"))
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "kaggle.json").write_text(json.dumps({"username": "me", "key": "elsewhere"}))
        assert accepted(basic_auth("me", "elsewhere"))
        monkeypatch.setenv("KAGGLE_USERNAME", "me")
        monkeypatch.setenv("KAGGLE_KEY", "from-environment")
        assert accepted(basic_auth("me", "from-environment"))
        (home / "access_token").write_text("KGAT_file\n")
        assert accepted("Bearer KGAT_file")
        monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_environment")
        assert accepted("Bearer KGAT_environment")
        (tmp_path / "mounted").write_text("KGAT_rotated")
        monkeypatch.setenv("KAGGLE_API_TOKEN", str(tmp_path / "mounted"))
        assert accepted("Bearer KGAT_rotated")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"username": "me"}', '{"username": "me", "key": 7, "x": "s3cret"}']
)
def test_a_malformed_kaggle_json_is_named_and_not_quoted(kaggle: Kaggle, home: Path, text: str) -> None:
    (home / "kaggle.json").write_text(text)
    kaggle.authorization = "Basic x"
    with pytest.raises(AccessDenied) as caught:
        snapshot(store(kaggle))
    assert "s3cret" not in str(caught.value)


def test_the_real_client_downloads_the_same_from_this_server(kaggle: Kaggle, tmp_path: Path) -> None:
    kaggle.authorization = basic_auth("me", "key")
    code = f"import kagglehub; print(kagglehub.model_download({MODEL!r}))"
    account = {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "key", "KAGGLE_API_ENDPOINT": kaggle.url}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **account, "KAGGLEHUB_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    root = Path(result.stdout.splitlines()[-1])
    assert {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    } == FILES
