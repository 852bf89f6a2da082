"""What mlflow:// promises beyond the contract: names, pins, links into the bucket, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError
from modelfs.stores import open_store, scheme_of
from modelfs.stores.mlflow import MlflowStore
from modelfs.testing import read_span
from modelfs.types import Entry, Span
from tests.stores.site import Answers, Reply, Request, scripted
from tests.stores.tracking import Tracking, shared

FILES = {"MLmodel": b"flavors:\n  python_function: {}\n", "data/model.safetensors": bytes(range(256)) * 40}


@pytest.fixture
def server() -> Tracking:
    return shared()


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def read(store: MlflowStore, entry: Entry) -> bytes:
    async def reading() -> bytes:
        return await read_span(await store.locate(entry), Span(0, entry.size))

    return trio.run(reading)


def contents(store: MlflowStore) -> dict[str, bytes]:
    return {path: read(store, entry) for path, entry in trio.run(store.snapshot).entries.items()}


# -- Against the real server.


def test_every_name_of_a_model_leads_to_it(server: Tracking) -> None:
    run, _ = server.run()
    model, root = server.logged_model("churn", run)
    server.upload(root, FILES)
    version = server.register("churn model", model, alias="prod")
    names = [f"churn model/{version}", "churn model/latest", "churn model@prod", model]
    ours = [f"mlflow://models/{name}" for name in names]
    theirs = [f"models:/{name}" for name in names]
    for spelling in [*ours, *theirs, f"mlflow://runs/{run}/churn", f"runs:/{run}/churn"]:
        found = open_store(spelling, {"tracking_uri": server.url})
        assert isinstance(found, MlflowStore)
        assert contents(found) == FILES, spelling
        assert scheme_of(found.url) == scheme_of(spelling) == "mlflow"


def test_a_part_of_a_model_and_a_single_file_are_models_too(server: Tracking) -> None:
    run, root = server.run()
    server.upload(root, FILES)
    options = {"tracking_uri": server.url}
    part = MlflowStore(f"mlflow://runs/{run}/data", options)
    assert contents(part) == {"model.safetensors": FILES["data/model.safetensors"]}
    lone = MlflowStore(f"mlflow://runs/{run}/data/model.safetensors", options)
    assert contents(lone) == contents(part)


def test_an_alias_that_moves_is_a_new_revision_and_the_old_one_stays_readable(server: Tracking) -> None:
    files = [{"MLmodel": b"first"}, {"MLmodel": b"other"}]
    run, _ = server.run()
    models = [server.logged_model("moving", run) for _ in files]
    for (_, root), content in zip(models, files, strict=True):
        server.upload(root, content)
    options = {"tracking_uri": server.url}
    one = server.register("moving", models[0][0], alias="champion")
    before = trio.run(MlflowStore("mlflow://models/moving@champion", options).snapshot)
    two = server.register("moving", models[1][0], alias="champion")
    restarted = MlflowStore("mlflow://models/moving@champion", options)
    after = trio.run(restarted.snapshot)
    assert (before.revision, after.revision) == (one, two)
    assert before.entries["MLmodel"].version != after.entries["MLmodel"].version
    assert read(restarted, before.entries["MLmodel"]) == b"first"
    assert read(restarted, after.entries["MLmodel"]) == b"other"


def test_links_into_the_bucket_serve_ranges_and_notice_another_content(server: Tracking) -> None:
    run, root = server.run()
    server.upload(root, FILES)
    store = MlflowStore(f"mlflow://runs/{run}/data", {"tracking_uri": server.url})
    entry = trio.run(store.snapshot).entries["model.safetensors"]

    location = trio.run(store.locate, entry)
    assert location.url.startswith(server.s3.url)
    assert location.etag
    assert location.expires
    before = len(server.s3.data_requests)
    assert trio.run(read_span, location, Span(5, 9)) == bytes([5, 6, 7, 8])
    assert [request.range for request in server.s3.data_requests[before:]] == ["bytes=5-8"]

    server.upload(root, {"data/model.safetensors": bytes(len(FILES["data/model.safetensors"]))})
    with pytest.raises(Stale):
        trio.run(read_span, location, Span(0, 1))
    with pytest.raises(Stale, match="was changed since it was listed"):
        trio.run(store.locate, entry)


@pytest.mark.parametrize(
    "name",
    [
        "models/no-such-model/1",
        "models/no-such-model@prod",
        "models/no-such-model/latest",
        "models/m-00000000000000000000000000000000",
        "runs/00000000000000000000000000000000",
    ],
)
def test_what_the_server_does_not_know_is_not_found(server: Tracking, name: str) -> None:
    with pytest.raises(NotFound, match="check the URL"):
        trio.run(MlflowStore(f"mlflow://{name}", {"tracking_uri": server.url}).snapshot)


def test_a_path_that_a_run_does_not_have_is_not_found(server: Tracking) -> None:
    run, root = server.run()
    server.upload(root, FILES)
    with pytest.raises(NotFound, match="there are no artifacts"):
        trio.run(MlflowStore(f"mlflow://runs/{run}/nothing/here", {"tracking_uri": server.url}).snapshot)


# -- Against answers that a test writes.

Api = dict[str, Any]


def answering(api: Api) -> Answers:
    """Answer by target, or by path: JSON, bytes, or a status."""

    def answer(request: Request) -> Reply:
        found = api.get(request.target, api.get(request.target.partition("?")[0], 404))
        if isinstance(found, int):
            return Reply(found)
        return Reply(200, {}, found if isinstance(found, bytes) else json.dumps(found).encode())

    return answer


ALIAS = "/api/2.0/mlflow/registered-models/alias"
WHERE = "/api/2.0/mlflow/model-versions/get-download-uri"
LIST = "/api/2.0/mlflow-artifacts/artifacts"


def one_version(root: str, **more: Any) -> Api:
    return {ALIAS: {"model_version": {"version": "7"}}, WHERE: {"artifact_uri": root}, **more}


def listing(*rows: tuple[str, int | str | None]) -> Api:
    return {
        "files": [
            {"path": path, "is_dir": size is None, **({} if size is None else {"file_size": size})}
            for path, size in rows
        ]
    }


@pytest.mark.parametrize("status", [404, 501])
def test_a_server_that_signs_no_links_sends_the_bytes_itself(status: int) -> None:
    api = one_version(
        "mlflow-artifacts:/1/a b",
        **{
            f"{LIST}?path=1%2Fa+b": listing(("weights.bin", 4)),
            "/api/2.0/mlflow-artifacts/presigned/1/a%20b/weights.bin": status,
            f"{LIST}/1/a%20b/weights.bin": b"1234",
        },
    )
    with scripted(answering(api)) as (url, seen):
        store = MlflowStore("mlflow://models/m@a", {"tracking_uri": url})
        assert contents(store) == {"weights.bin": b"1234"}
        (entry,) = trio.run(store.snapshot).entries.values()
        trio.run(store.locate, entry)
    asked = sum("presigned" in request.target for request in seen)
    assert asked == (1 if status == 501 else 2)


def test_credentials_are_those_of_mlflow_and_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    api = one_version("mlflow-artifacts:/1", **{LIST: listing(("x", 1))})
    with scripted(answering(api)) as (url, seen):
        store = MlflowStore("mlflow://models/m@a", {"tracking_uri": url})

        def sent() -> str | None:
            seen.clear()
            trio.run(store.snapshot)
            (value,) = {request.headers.get("authorization") for request in seen}
            return value

        assert sent() is None
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
        assert sent() == "Bearer t0ken"
        (tmp_path / ".mlflow").mkdir()
        file = tmp_path / ".mlflow" / "credentials"
        file.write_text("[mlflow]\nmlflow_tracking_username = ann\nmlflow_tracking_password = 100%secret\n")
        assert sent() == "Basic YW5uOjEwMCVzZWNyZXQ="
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "bob")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pw")
        assert sent() == "Basic Ym9iOnB3"
        file.write_text("mlflow_tracking_password = s3cret")
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        with pytest.raises(AccessDenied, match="credentials cannot be read") as caught:
            sent()
        assert "s3cret" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize(
    "root",
    [
        "file:///etc",
        "/srv/mlruns/0/abc/artifacts",
        "mlflow-artifacts://other.example.com/1",
        "http://169.254.169.254/latest",
        "dbfs:/x",
    ],
)
def test_artifacts_that_only_the_server_can_read_are_refused(root: str) -> None:
    refused = pytest.raises(StoreError, match="cannot be read from here: let the server proxy them")
    with scripted(answering(one_version(root))) as (url, _), refused:
        trio.run(MlflowStore("mlflow://models/m@a", {"tracking_uri": url}).snapshot)


@pytest.mark.parametrize(
    ("api", "error", "text"),
    [
        ({ALIAS: 401}, AccessDenied, "check MLFLOW_TRACKING_USERNAME"),
        ({ALIAS: 500}, StoreError, "come back later"),
        ({ALIAS: b"<html>"}, BadAnswer, "does not answer as MLflow"),
        ({ALIAS: b"[" * 100_000}, BadAnswer, "does not answer as MLflow"),
        ({ALIAS: {"model_version": {"version": 7}}}, BadAnswer, "has no model_version.version"),
        (one_version("mlflow-artifacts:/1", **{LIST: {"files": 3}}), BadAnswer, "has no files"),
        (one_version("mlflow-artifacts:/1", **{LIST: {"files": [3]}}), BadAnswer, "has no path"),
        (one_version("mlflow-artifacts:/1", **{LIST: listing(("../x", 1))}), BadAnswer, "has no files.path"),
        (one_version("mlflow-artifacts:/1", **{LIST: listing(("x", "-1"))}), BadAnswer, "has no file_size"),
        (one_version("mlflow-artifacts:/1", **{LIST: {}}), NotFound, "there are no artifacts"),
        (one_version("gs://"), StoreError, "its artifacts cannot be read"),
    ],
    ids=range(11),
)
def test_odd_answers_are_errors_that_say_what_to_check(api: Api, error: type[StoreError], text: str) -> None:
    with scripted(answering(api)) as (url, _), pytest.raises(error, match=text):
        trio.run(MlflowStore("mlflow://models/m@a", {"tracking_uri": url}).snapshot)


def test_hostile_names_are_not_shown_and_endless_directories_end() -> None:
    api = one_version("mlflow-artifacts:/1", **{LIST: listing(("..", None), ("deeper", None), ("x", "3"))})
    with scripted(answering(api)) as (url, _):
        found = trio.run(MlflowStore("mlflow://models/m@a", {"tracking_uri": url}).snapshot)
        assert found.entries["x"].size == 3
        assert ("..", "it holds the component '..'") in found.rejected
        deepest = [why for path, why in found.rejected if path.count("deeper") == 32]
        assert "it is deeper than 32 directories" in deepest
        with pytest.raises(StoreError, match="more than 5 entries: raise the option max_entries"):
            trio.run(MlflowStore("mlflow://models/m@a", {"tracking_uri": url, "max_entries": 5}).snapshot)


@pytest.mark.parametrize(
    "url",
    [
        "mlflow://",
        "mlflow://models/bert",
        "mlflow://models/bert/Production",
        "mlflow://models/bert/1/../x",
        "mlflow://runs/",
        "models:/bert",
        "mlflow://elsewhere/bert/1",
    ],
)
def test_malformed_urls_say_how_to_write_one(url: str) -> None:
    with pytest.raises(ConfigError, match=r"write mlflow://models/NAME/VERSION|no place for a model"):
        open_store(url, {"tracking_uri": "http://localhost:5000"})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "no tracking server is named: set the option tracking_uri or MLFLOW_TRACKING_URI"),
        ({"tracking_uri": "sqlite:///mlflow.db"}, "is not that of a server"),
        ({"tracking_uri": "https://user:s3cret@host"}, "holds a password"),
        ({"tracking_uri": "http://host", "timeout": 0}, "must be positive"),
        ({"tracking_uri": "http://host", "registry_uri": "x"}, "unknown option 'registry_uri'"),
    ],
)
def test_bad_options_are_config_errors(options: Api, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        MlflowStore("mlflow://models/bert/1", options)
    assert "s3cret" not in str(caught.value)


# -- A tree without a server.


def test_a_tree_of_mlruns_is_an_ordinary_directory(tmp_path: Path) -> None:
    artifacts = tmp_path / "mlruns/0/models/m-0123456789abcdef0123456789abcdef/artifacts"
    (artifacts / "data").mkdir(parents=True)
    for path, data in FILES.items():
        (artifacts / path).write_bytes(data)
    found = trio.run(open_store(artifacts.as_uri()).snapshot)
    assert {path for path, entry in found.entries.items() if entry.kind == "file"} == FILES.keys()
