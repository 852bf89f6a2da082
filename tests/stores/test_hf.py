"""What hf:// promises beyond the contract, and that the Hub it is tested against is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import open_store
from modelfs.stores.hf import HubStore
from modelfs.testing import read_span
from modelfs.testing.hub import TOKEN, HubServer
from modelfs.types import Entry, Snapshot, Span
from tests.stores.scripted import Answer, scripted

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "onnx/model.onnx": b"graph"}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(page_size=100) as server:
        server.add("org/bert", FILES)
        yield server


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


def store(hub: HubServer, url: str, **options: Any) -> HubStore:
    return HubStore(url, {"endpoint": hub.url, **options})


def snapshot(store: HubStore) -> Snapshot:
    return trio.run(store.snapshot)


def read(store: HubStore, entry: Entry) -> bytes:
    async def main() -> bytes:
        return await read_span(await store.locate(entry), Span(0, entry.size))

    return trio.run(main)


# URLs


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("hf://org/name", "hf://org/name@main"),
        ("hf://org/name/", "hf://org/name@main"),
        ("HF://Org/Na.me-2@v1.0", "hf://Org/Na.me-2@v1.0"),
        ("hf://org/name@refs/pr/12/sub/dir/", "hf://org/name@refs/pr/12/sub/dir"),
        ("hf://org/name@refs/convert/parquet", "hf://org/name@refs/convert/parquet"),
        ("hf://org/name/sub@dir", "hf://org/name@main/sub@dir"),
        ("hf://gpt2", "hf://models/gpt2@main"),
        ("hf://gpt2@main/sub", "hf://models/gpt2@main/sub"),
        ("hf://models/gpt2@main/sub", "hf://models/gpt2@main/sub"),
        ("hf://models/org/name", "hf://org/name@main"),
        ("hf://datasets/org/name@main", "hf://datasets/org/name@main"),
        ("hf://spaces/org/name/x", "hf://spaces/org/name@main/x"),
    ],
)
def test_a_url_has_one_canonical_form(url: str, canonical: str) -> None:
    assert open_store(url).url == canonical
    assert open_store(canonical).url == canonical


@pytest.mark.parametrize(
    "url",
    ["hf://", "hf:///name", "hf://org/na--me", "hf://org/..", "hf://org/name/../up", "hf://org/name@",
     "hf://a b/c", "hf://org/name.git", "hf://org/name@main//x", "hf://org/name?token=1"],
)  # fmt: skip
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="hf://"):
        HubStore(url, {})


@pytest.mark.parametrize(
    "options", [{"revision": "main"}, {"endpoint": "huggingface.co"}, {"endpoint": "https://user:pw@host"}]
)
def test_malformed_options_are_refused_without_showing_them(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        HubStore("hf://org/name", options)
    assert "pw" not in str(caught.value)


def test_the_endpoint_comes_from_the_environment(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    assert set(snapshot(HubStore("hf://org/bert", {})).entries) == set(FILES)


# Snapshots


def test_entries_publish_the_digests_of_lfs_and_of_git(hub: HubServer) -> None:
    found = snapshot(store(hub, "hf://org/bert"))
    algorithms = {path: entry.digest and entry.digest.algorithm for path, entry in found.entries.items()}
    assert algorithms == {
        "config.json": "git-sha1",
        "model.safetensors": "sha256",
        "onnx/model.onnx": "sha256",
    }
    assert {entry.mtime for entry in found.entries.values()} == {1_704_067_200.0}
    assert len(found.revision) == 40


def test_a_tree_of_many_pages_is_listed_whole(hub: HubServer) -> None:
    files = {f"shard-{number:04}.txt": b"%d" % number for number in range(251)}
    hub.add("org/many", files)
    before = len(hub.requests)
    assert set(snapshot(store(hub, "hf://org/many")).entries) == set(files)
    assert [r.path for r in hub.requests[before:]].count(hub.requests[-1].path) == 3


def test_an_unmoved_branch_costs_one_request_and_a_commit_none(hub: HubServer) -> None:
    branch = store(hub, "hf://org/bert")
    first = snapshot(branch)
    before = len(hub.requests)
    assert snapshot(branch) == first
    assert len(hub.requests) == before + 1
    commit = store(hub, f"hf://org/bert@{first.revision}")
    assert snapshot(commit).entries == first.entries
    before = len(hub.requests)
    snapshot(commit)
    assert len(hub.requests) == before


def test_names_that_could_leave_the_model_are_rejected(hub: HubServer) -> None:
    hub.add("org/hostile", {"../up": b"", "/etc/passwd": b"", "a//b": b"", "good": b""})
    found = snapshot(store(hub, "hf://org/hostile"))
    assert list(found.entries) == ["good"]
    assert len(found.rejected) == 3


def test_revisions_are_branches_tags_pull_requests_and_commits(hub: HubServer) -> None:
    first = hub.add("org/revisions", {"f": b"1"})
    second = hub.add("org/revisions", {"f": b"2"})
    pull = hub.add("org/revisions", {"f": b"3"}, revision="refs/pr/1")
    hub.tag("org/revisions", "v1.0", first)
    expected = {"main": second, "v1.0": first, "refs/pr/1": pull, first: first}
    for revision, sha in expected.items():
        assert snapshot(store(hub, f"hf://org/revisions@{revision}")).revision == sha


def test_datasets_are_repositories_too(hub: HubServer) -> None:
    hub.add("datasets/org/rows", {"rows.parquet": b"PAR1"})
    dataset = store(hub, "hf://datasets/org/rows")
    entry = snapshot(dataset).entries["rows.parquet"]
    assert read(dataset, entry) == b"PAR1"


def test_a_directory_that_is_not_there_is_not_found(hub: HubServer) -> None:
    with pytest.raises(NotFound, match="'onn'"):
        snapshot(store(hub, "hf://org/bert@main/onn"))


# Locations


def test_a_large_file_is_at_its_signed_link_without_the_token(hub: HubServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    bert = store(hub, "hf://org/bert", token_file=str(token))
    location = trio.run(bert.locate, snapshot(bert).entries["model.safetensors"])
    assert location.url.startswith("http://localhost:")
    assert not location.headers
    assert location.etag is None
    assert location.expires is not None
    assert 3500 < location.expires - time.time() <= 3600
    assert httpx.get(location.url, headers={"Range": "bytes=1-2"}).content == b"\1\2"


def test_a_small_file_is_at_the_hub_with_the_token(hub: HubServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    hub.add("org/private", FILES, private=True)
    private = store(hub, "hf://org/private", token_file=str(token))
    location = trio.run(private.locate, snapshot(private).entries["config.json"])
    assert location.url.startswith(hub.url)
    assert dict(location.headers) == {"authorization": f"Bearer {TOKEN}"}
    assert TOKEN not in repr(location)
    assert httpx.get(location.url).status_code == 401


def test_a_link_that_ran_out_can_be_had_anew(hub: HubServer) -> None:
    bert = store(hub, "hf://org/bert")
    entry = snapshot(bert).entries["model.safetensors"]
    location = trio.run(bert.locate, entry)
    hub.expire_links()
    assert httpx.get(location.url).status_code == 403
    assert read(bert, entry) == FILES["model.safetensors"]


def test_a_branch_that_moves_leaves_its_old_files_readable(hub: HubServer) -> None:
    hub.add("org/moving", {"config.json": b"old", "model.bin": b"old weights"})
    moving = store(hub, "hf://org/moving")
    old = snapshot(moving)
    hub.add("org/moving", {"config.json": b"new", "model.bin": b"new weights"})
    for _ in range(2):
        assert read(moving, old.entries["config.json"]) == b"old"
        assert read(moving, old.entries["model.bin"]) == b"old weights"
        new = snapshot(moving)
    assert new.revision != old.revision
    assert read(moving, new.entries["config.json"]) == b"new"


def test_a_restarted_daemon_finds_the_commit_of_a_listing_it_kept(hub: HubServer) -> None:
    files = {"config.json": b"kept", "model.bin": b"kept weights"}
    hub.add("org/restart", files)
    kept = snapshot(store(hub, "hf://org/restart"))
    for number in range(3):
        hub.add("org/restart", {"config.json": b"%d" % number})
        for path, data in files.items():
            assert read(store(hub, "hf://org/restart"), kept.entries[path]) == data


def test_a_version_that_no_commit_has_is_stale(hub: HubServer) -> None:
    bert = store(hub, "hf://org/bert")
    entry = snapshot(bert).entries["config.json"]
    for foreign in (
        Entry("config.json", entry.size, "git-sha1:" + "0" * 40),
        Entry("gone", 1, entry.version),
    ):
        with pytest.raises(Stale, match="refresh the model"):
            trio.run(bert.locate, foreign)


def test_a_history_that_was_rewritten_makes_files_stale(hub: HubServer) -> None:
    hub.add("org/squashed", {"f": b"old"})
    squashed = store(hub, "hf://org/squashed")
    entry = snapshot(squashed).entries["f"]
    hub.remove("org/squashed")
    hub.add("org/squashed", {"f": b"new"})
    with pytest.raises(Stale):
        trio.run(squashed.locate, entry)


# Rights and failures


def test_a_private_repository_looks_missing_until_there_is_a_token(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/secret", FILES, private=True)
    secret = store(hub, "hf://org/secret")
    with pytest.raises(NotFound, match=r"no such repository, or a private one.*HF_TOKEN"):
        snapshot(secret)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert set(snapshot(secret).entries) == set(FILES)


def test_a_gated_repository_names_the_page_with_its_licence(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", FILES)
    gated = store(hub, "hf://org/gated")
    entry = snapshot(gated).entries["model.safetensors"]
    hub.add("org/gated", FILES, gated=True)
    expected = f"accept its licence at {hub.url}/org/gated and set HF_TOKEN"
    for _ in range(2):
        with pytest.raises(AccessDenied, match=expected):
            snapshot(store(hub, "hf://org/gated"))
        with pytest.raises(AccessDenied, match=expected):
            trio.run(gated.locate, entry)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.accept("org/gated")
    assert snapshot(store(hub, "hf://org/gated")).entries["model.safetensors"] == entry
    assert read(gated, entry) == FILES["model.safetensors"]


def test_a_token_is_read_anew_and_never_shown(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/rotating", FILES, private=True)
    token = tmp_path / "token"
    rotating = store(hub, "hf://org/rotating", token_file=str(token))
    with pytest.raises(AccessDenied, match=r"token_file .*token cannot be read"):
        snapshot(rotating)
    token.write_text("hf_wrong")
    with pytest.raises(AccessDenied, match=r"the token was refused \(401\)") as caught:
        snapshot(rotating)
    assert "hf_wrong" not in repr(caught.value) + str(caught.value)
    token.write_text("hf_broken\nin two lines")
    with pytest.raises(AccessDenied, match="holds no token") as caught:
        snapshot(rotating)
    assert "hf_broken" not in str(caught.value)
    token.write_text(f"{TOKEN}\n")
    assert set(snapshot(rotating).entries) == set(FILES)


def test_what_is_missing_is_named(hub: HubServer) -> None:
    with pytest.raises(NotFound, match="no such repository"):
        snapshot(store(hub, "hf://org/nothing"))
    with pytest.raises(NotFound, match="no revision 'v9'"):
        snapshot(store(hub, "hf://org/bert@v9"))


def test_an_outage_is_unavailable_and_passes() -> None:
    with HubServer() as hub:
        hub.add("org/bert", FILES)
        bert = store(hub, "hf://org/bert")
        entry = snapshot(bert).entries["config.json"]
        hub.stop()
        for verb in (bert.snapshot, lambda: bert.locate(entry)):
            with pytest.raises(Unavailable, match="cannot be reached") as caught:
                trio.run(verb)
            assert "\n" not in str(caught.value)
        hub.start()
        assert read(bert, entry) == b"{}"


def test_offline_mode_says_what_to_unset(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE=1"):
        snapshot(store(hub, "hf://org/bert"))


@pytest.fixture
def script() -> Iterator[tuple[str, list[Answer]]]:
    with scripted() as (url, answers):
        yield url, answers


SHA = b"a" * 40
INFO = (200, {}, b'{"id": "x", "sha": "%s", "lastModified": "2024-01-01T00:00:00.000Z"}' % SHA)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""), AccessDenied, "HF"),
        ((403, {}, b""), AccessDenied, "HF_TOKEN"),
        ((403, {"X-Error-Message": "Access to this resource is disabled."}, b""), AccessDenied, "disabled"),
        ((404, {}, b""), NotFound, "endpoint"),
        ((418, {}, b"short and stout"), BadAnswer, "418"),
        ((429, {"Retry-After": "7"}, b""), Unavailable, "429"),
        ((503, {}, b"<html>"), Unavailable, "503"),
        ((200, {}, b"<html>a captive portal"), BadAnswer, "not a Hub's"),
        ((200, {}, b"[]"), BadAnswer, "not a Hub's"),
        ((200, {}, b'{"id": "x"}'), BadAnswer, "no commit"),
        ((200, {}, b'{"id": "x", "sha": "../../etc"}'), BadAnswer, "no commit"),
    ],
)  # fmt: skip
def test_every_answer_has_its_meaning(
    script: tuple[str, list[Answer]], answer: Any, kind: type[StoreError], text: str
) -> None:
    url, answers = script
    answers.append(answer)
    with pytest.raises(kind, match=text) as caught:
        snapshot(HubStore("hf://org/name", {"endpoint": url}))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert "short and stout" not in str(caught.value)


def test_a_rate_limit_says_how_long_to_wait(script: tuple[str, list[Answer]]) -> None:
    url, answers = script
    answers.append((429, {"RateLimit": '"api";r=0;t=55', "Retry-After": "x"}, b""))
    with pytest.raises(Unavailable) as caught:
        snapshot(HubStore("hf://org/name", {"endpoint": url}))
    assert caught.value.retry_after == 55


@pytest.mark.parametrize(
    "page",
    [
        (200, {"Link": '<https://evil.example/more>; rel="next"'}, b"[]"),
        (200, {"Link": '<ftp://evil.example/more>; rel="next"'}, b"[]"),
        (200, {}, b'[{"type": "file", "path": "f", "size": 1, "oid": "not hex"}]'),
        (200, {}, b'[{"type": "file"}]'),
        (200, {}, b'{"error": "?"}'),
    ],
)
def test_a_listing_that_makes_no_sense_is_a_bad_answer(script: tuple[str, list[Answer]], page: Any) -> None:
    url, answers = script
    answers += [INFO, page]
    with pytest.raises(BadAnswer):
        snapshot(HubStore("hf://org/name", {"endpoint": url}))


def test_a_listing_without_end_is_a_bad_answer(script: tuple[str, list[Answer]]) -> None:
    url, answers = script
    answers += [INFO, (200, {"Link": f'<{url}/more>; rel="next"'}, b"[]")]
    with pytest.raises(BadAnswer, match="does not end"):
        snapshot(HubStore("hf://org/name", {"endpoint": url}))


LISTING = (200, {}, json.dumps([{"type": "file", "path": "f", "size": 3, "oid": "b" * 40}]).encode())


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ({"X-Repo-Commit": "c" * 40, "X-Linked-Size": "3"}, "another"),
        ({"X-Repo-Commit": "a" * 40, "X-Linked-Size": "4"}, "3 bytes, the server says 4"),
        ({"X-Repo-Commit": "a" * 40, "X-Linked-Size": "3", "Location": "file:///etc/passwd"}, "file: URL"),
    ],
)
def test_a_location_that_contradicts_the_listing_is_a_bad_answer(
    script: tuple[str, list[Answer]], headers: dict[str, str], text: str
) -> None:
    url, answers = script
    answers += [INFO, LISTING, (302 if "Location" in headers else 200, headers, b"")]
    odd = HubStore("hf://org/name", {"endpoint": url})
    entry = snapshot(odd).entries["f"]
    with pytest.raises(BadAnswer, match=text):
        trio.run(odd.locate, entry)


@pytest.mark.parametrize(
    ("query", "lifetime"),
    [
        ("Expires=2000000100&X-Amz-Date=20330518T033320Z&X-Amz-Expires=200", 100),
        ("Expires=2000000300&X-Amz-Date=20330518T033320Z&X-Amz-Expires=200", 200),
        ("X-Goog-Date=20330518T033320Z&X-Goog-Expires=60", 60),
        ("Expires=never", 600),
        ("Expires=1", 30),
        ("", 600),
    ],
)
def test_a_links_end_is_read_from_it(
    script: tuple[str, list[Answer]], monkeypatch: pytest.MonkeyPatch, query: str, lifetime: float
) -> None:
    url, answers = script
    answers += [
        INFO,
        LISTING,
        (302, {"Location": f"https://cdn.example/f?{query}", "X-Linked-Size": "3"}, b""),
    ]
    odd = HubStore("hf://org/name", {"endpoint": url})
    entry = snapshot(odd).entries["f"]
    monkeypatch.setattr("modelfs.stores.hf.time.time", lambda: 2_000_000_000.0)
    location = trio.run(odd.locate, entry)
    assert location.expires == 2_000_000_000 + lifetime


# The Hub itself, asked by the library that everybody uses


CLIENT = """
import json, sys
from pathlib import Path
import huggingface_hub as hub
api, sha = hub.HfApi(), sys.argv[1]
whole = Path(hub.snapshot_download("org/name"))
info = api.model_info("org/name", revision="v1", files_metadata=True)
errors = {}
for name, ask in {
    "private": lambda: api.model_info("org/private"),
    "missing": lambda: api.model_info("org/missing"),
    "revision": lambda: api.model_info("org/name", revision="nope"),
    "entry": lambda: hub.hf_hub_download("org/name", "nope"),
    "gated": lambda: hub.hf_hub_download("org/gated", "f"),
}.items():
    try:
        ask()
    except hub.errors.HfHubHTTPError as error:
        errors[name] = type(error).__name__
print(json.dumps({
    "files": {str(p.relative_to(whole)): p.read_bytes().hex() for p in whole.rglob("*") if p.is_file()},
    "commit": whole.name,
    "old": Path(hub.hf_hub_download("org/name", "config.json", revision=sha)).read_text(),
    "siblings": [[s.rfilename, s.size, s.lfs and s.lfs.sha256] for s in info.siblings],
    "tree": [f.path for f in api.list_repo_tree("org/name", recursive=True, expand=True)],
    "flat": [f.path for f in api.list_repo_tree("org/name")],
    "below": [f.path for f in api.list_repo_tree("org/name", "sub")],
    "paths": [f.path for f in api.get_paths_info("org/name", ["sub", "config.json", "nope"])],
    "commits": [c.commit_id for c in api.list_repo_commits("org/name")],
    "refs": [r.name for r in api.list_repo_refs("org/name").tags],
    "user": api.whoami(token=sys.argv[2])["name"],
    "mine": api.model_info("org/private", token=sys.argv[2]).private,
    "errors": errors,
}))
"""


def test_huggingface_hub_takes_the_server_for_the_hub(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(3_000_000))
    with HubServer(page_size=3) as hub:
        old = hub.add("org/name", {"config.json": b"old"})
        files = {"config.json": b"new", "model.safetensors": large, "sub/größe x.txt": b"q", "sub/y.bin": b""}
        new = hub.add("org/name", files)
        assert hub.add("org/name", files) == new
        hub.tag("org/name", "v1", new)
        hub.add("org/private", {"f": b""}, private=True)
        hub.add("org/gated", {"f": b""}, gated=True)
        environment = {**os.environ, **hub.env(), "HF_HOME": str(tmp_path / "home")}
        client = subprocess.run(
            [sys.executable, "-c", CLIENT, old, TOKEN],
            env=environment,
            capture_output=True,
            check=True,
            timeout=120,
        )
    found = json.loads(client.stdout)
    contents = {path: data if isinstance(data, bytes) else large.read_bytes() for path, data in files.items()}
    assert found["files"] == {path: data.hex() for path, data in contents.items()}
    assert (found["commit"], found["old"]) == (new, "old")
    assert [row[:2] for row in found["siblings"]] == [[path, len(data)] for path, data in contents.items()]
    assert [row[0] for row in found["siblings"] if row[2]] == ["model.safetensors", "sub/y.bin"]
    assert found["tree"] == ["config.json", "model.safetensors", "sub", "sub/größe x.txt", "sub/y.bin"]
    assert found["flat"] == ["config.json", "model.safetensors", "sub"]
    assert found["below"] == ["sub/größe x.txt", "sub/y.bin"]
    assert found["paths"] == ["config.json", "sub"]
    assert (found["commits"], found["refs"]) == ([new, old], ["v1"])
    assert (found["user"], found["mine"]) == ("modelfs", True)
    assert found["errors"] == {
        "private": "RepositoryNotFoundError",
        "missing": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "entry": "RemoteEntryNotFoundError",
        "gated": "GatedRepoError",
    }


def test_the_servers_links_are_for_one_mechanism_and_check_ranges(hub: HubServer) -> None:
    data = FILES["model.safetensors"]
    url = f"{hub.url}/org/bert/resolve/main/model.safetensors"
    link = httpx.get(url).headers["location"]
    assert httpx.get(link, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 400
    assert httpx.get(link.replace("Signature=", "Signature=0")).status_code == 403
    etag = httpx.head(link).headers["etag"]
    for span, status, content in [
        ("bytes=0-0", 206, data[:1]),
        ("bytes=100-", 206, data[100:]),
        ("bytes=-7", 206, data[-7:]),
        ("bytes=10-999999", 206, data[10:]),
        (f"bytes={len(data)}-", 416, b""),
    ]:
        answer = httpx.get(link, headers={"Range": span, "If-Match": etag})
        assert (answer.status_code, answer.content) == (status, content), span
    assert httpx.get(link, headers={"If-Match": '"other"'}).status_code == 412


def test_the_server_tells_data_requests_from_the_rest(hub: HubServer) -> None:
    before = len(hub.data_requests)
    bert = store(hub, "hf://org/bert")
    found = snapshot(bert)
    assert len(hub.data_requests) == before
    read(bert, found.entries["config.json"])
    read(bert, found.entries["model.safetensors"])
    assert [request.range for request in hub.data_requests[before:]] == ["bytes=0-1", "bytes=0-10239"]
