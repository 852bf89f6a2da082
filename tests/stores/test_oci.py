"""What stores of container registries promise beyond the contract: names, who we are, tags, redirects."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError, Unavailable
from modelfs.fetch.source import object_key
from modelfs.stores import open_store
from modelfs.stores.docker import HUB, challenges, credentials
from modelfs.stores.oci import OciStore
from modelfs.testing.contract import read_span
from modelfs.types import Digest, Entry, Snapshot, Span
from tests.archives.packing import tarred
from tests.stores.registry import (
    PASSWORD,
    USER,
    Repository,
    docker_config,
    docker_registry,
    sha256,
    with_password,
    with_tokens,
)
from tests.stores.site import Answers, Reply, Request, file_reply, scripted

RAW = "application/vnd.cncf.model.weight.v1.raw"
PATH = "org.cncf.model.filepath"
DIGEST = sha256(b"")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no credentials of whoever runs the tests take part."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))


def model(**files: bytes) -> Repository:
    """Return a repository with one artifact, tagged v1."""
    pushed = Repository("team/model")
    layers = [pushed.blob(data, RAW, {PATH: name}) for name, data in files.items()]
    pushed.manifest("v1", layers)
    return pushed


def store(url: str, reference: str = ":v1", **options: Any) -> OciStore:
    return OciStore(f"oci://{urlsplit(url).netloc}/team/model{reference}", options)


def snapshot(of: OciStore) -> Snapshot:
    return trio.run(of.snapshot)


def failure(call: Callable[..., Awaitable[Any]], *words: Any) -> StoreError:
    with pytest.raises(StoreError) as caught:
        trio.run(call, *words)
    assert "\n" not in str(caught.value)
    return caught.value


# Names.


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("oci://ghcr.io/org/model:v1", "oci://ghcr.io/org/model:v1"),
        ("docker://ghcr.io/org/model", "oci://ghcr.io/org/model:latest"),
        ("oci://model", "oci://docker.io/library/model:latest"),
        ("oci://ai/smollm2:360M-Q4_K_M", "oci://docker.io/ai/smollm2:360M-Q4_K_M"),
        ("oci://index.docker.io/ai/smollm2", "oci://docker.io/ai/smollm2:latest"),
        ("oci://localhost/x", "oci://localhost/x:latest"),
        ("oci://localhost:5000/x:y", "oci://localhost:5000/x:y"),
        ("oci://registry:5000/a/b/c", "oci://registry:5000/a/b/c:latest"),
        ("oci://[::1]:5000/a", "oci://[::1]:5000/a:latest"),
        ("oci://GHCR.io/Org/Model-GGUF:Q4", "oci://ghcr.io/Org/Model-GGUF:Q4"),
        (f"oci://ghcr.io/org/model@{DIGEST}", f"oci://ghcr.io/org/model@{DIGEST}"),
        (f"oci://ghcr.io/org/model:v1@{DIGEST}", f"oci://ghcr.io/org/model@{DIGEST}"),
        ("oci://registry.ollama.ai/library/gemma3:270m", "oci://registry.ollama.ai/library/gemma3:270m"),
    ],
)
def test_names_are_read_as_docker_does(written: str, meant: str) -> None:
    assert open_store(written).url == meant


@pytest.mark.parametrize(
    "url",
    [
        "oci://",
        "oci:///x",
        "oci://ghcr.io/",
        "oci://ghcr.io/a//b",
        "oci://ghcr.io/../x",
        "oci://ghcr.io/a:",
        "oci://ghcr.io/a:b/c",
        "oci://ghcr.io/a?x=1",
        "oci://ghcr.io/a b",
        "oci://user:secret@ghcr.io/a",
        "oci://ghcr.io/a@sha256:12",
        f"oci://ghcr.io/a@md5:{'0' * 32}",
    ],
)
def test_other_names_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"platform": "arm64"}, {"path": "a/../b"}, {"timeout": 0}, {"insecure": "yes"}, {"user": "x"}],
    ids=lambda options: next(iter(options)),
)
def test_malformed_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OciStore("oci://ghcr.io/a/b", options)


# Content.


def test_a_layer_is_the_same_object_as_the_file_of_another_store() -> None:
    pushed = model(weights=b"the same bytes")
    with scripted(pushed.answer) as (url, _):
        listed = snapshot(store(url)).entries["weights"]
    other = Entry("model.bin", 14, "oid", Digest.parse(sha256(b"the same bytes")))
    assert object_key("oci", listed) == object_key("hf", other)


def test_the_manifest_tells_the_media_types_of_the_entries() -> None:
    pushed = model(a=b"1", b=b"2")

    async def read(of: OciStore) -> bytes:
        entry = (await of.snapshot()).entries[".oci/manifest.json"]
        return await read_span(await of.locate(entry), Span(0, entry.size))

    with scripted(pushed.answer) as (url, _):
        layers = json.loads(trio.run(read, store(url)))["layers"]
        listed = snapshot(store(url)).entries
    assert {layer["mediaType"] for layer in layers} == {RAW}
    versions = {entry.version for entry in listed.values()}
    assert {layer["digest"] for layer in layers} <= versions


def test_the_manifest_can_be_read_after_a_restart() -> None:
    pushed = model(a=b"1")

    async def read(of: OciStore, entry: Entry) -> bytes:
        return await read_span(await of.locate(entry), Span(0, entry.size))

    with scripted(pushed.answer) as (url, _):
        entry = snapshot(store(url)).entries[".oci/manifest.json"]
        assert trio.run(read, store(url), entry) == pushed.manifests["v1"][1]


def test_a_manifest_with_another_digest_is_refused() -> None:
    pushed = model(a=b"1")
    pinned = pushed.digest("v1")
    pushed.manifests[pinned] = model(a=b"2").manifests["v1"]
    with scripted(pushed.answer) as (url, _):
        assert isinstance(failure(store(url, f"@{pinned}").snapshot), BadAnswer)


def test_a_directory_that_is_not_there_is_not_found() -> None:
    with scripted(model(a=b"1").answer) as (url, _):
        assert isinstance(failure(store(url, path="models").snapshot), NotFound)


# Tags.


def test_a_tag_that_has_not_moved_costs_one_head() -> None:
    with scripted(model(a=b"1").answer) as (url, requests):
        of = store(url)
        first = snapshot(of)
        del requests[:]
        assert snapshot(of) is first
        assert [request.method for request in requests] == ["HEAD"]


def test_a_moved_tag_is_another_revision_and_the_old_blobs_stay() -> None:
    pushed = model(a=b"old")
    with scripted(pushed.answer) as (url, _):
        of = store(url)
        before = snapshot(of)
        pushed.manifest("v1", [pushed.blob(b"new", RAW, {PATH: "a"})])
        after = snapshot(of)
        assert (before.revision, after.revision) == (
            sha256(pushed.manifests[before.revision][1]),
            pushed.digest("v1"),
        )

        async def read(entry: Entry) -> bytes:
            return await read_span(await of.locate(entry), Span(0, entry.size))

        assert trio.run(read, before.entries["a"]) == b"old"
        assert trio.run(read, after.entries["a"]) == b"new"


def test_a_registry_without_digest_headers_is_asked_for_the_manifest() -> None:
    pushed = model(a=b"1")

    def bare(request: Request) -> Reply:
        reply = pushed.answer(request)
        return Reply(reply.status, {}, reply.body)

    with scripted(bare) as (url, _):
        assert snapshot(store(url)).revision == pushed.digest("v1")


def test_a_blob_that_was_removed_is_stale() -> None:
    pushed = model(a=b"1")
    with scripted(pushed.answer) as (url, _):
        of = store(url)
        entry = snapshot(of).entries["a"]
        pushed.blobs.clear()
        assert isinstance(failure(of.locate, entry), Stale)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(404), NotFound),
        (Reply(401), AccessDenied),
        (Reply(403), AccessDenied),
        (Reply(429, {"Retry-After": "7"}), Unavailable),
        (Reply(503), Unavailable),
        (Reply(200, {}, b"<html>"), BadAnswer),
        (Reply(200, {}, b"[" * 100_000), BadAnswer),
        (Reply(200, {}, b'{"schemaVersion": 1}'), BadAnswer),
    ],
    ids=["404", "401", "403", "429", "503", "html", "deep", "schema-1"],
)
def test_each_answer_has_its_error(reply: Reply, kind: type[StoreError]) -> None:
    with scripted(lambda _: reply) as (url, _):
        error = failure(store(url).snapshot)
    assert type(error) is kind
    assert getattr(error, "retry_after", None) == (7.0 if reply.status == 429 else None)


# Platforms.


def test_the_platform_of_an_index_can_be_chosen() -> None:
    pushed = Repository("team/model")
    rows = []
    for name in ("amd64", "arm64"):
        child = pushed.manifest(name, [pushed.blob(name.encode(), RAW, {PATH: "weights"})])
        rows.append(child | {"platform": {"os": "linux", "architecture": name}})
    pushed.index("v1", rows)
    with scripted(pushed.answer) as (url, _):
        for name in ("amd64", "arm64"):
            found = snapshot(store(url, platform=f"linux/{name}"))
            assert found.revision == pushed.digest(name)
        error = failure(store(url, platform="linux/s390x").snapshot)
    assert isinstance(error, NotFound)
    assert "linux/amd64, linux/arm64" in str(error)


def test_indexes_that_do_not_end_are_refused() -> None:
    pushed = Repository("team/model")
    inner = pushed.manifest("v1", [])
    for _ in range(4):
        inner = pushed.index("v1", [inner])
    with scripted(pushed.answer) as (url, _):
        assert isinstance(failure(store(url).snapshot), BadAnswer)


# Who we are.


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ('Bearer realm="https://a/t",service="s",scope="r:x:pull,push"',
         {"bearer": {"realm": "https://a/t", "service": "s", "scope": "r:x:pull,push"}}),
        ('Basic realm="x y"', {"basic": {"realm": "x y"}}),
        ('Negotiate, BEARER Realm = "u" , service=s, Basic realm="q\\"q"',
         {"negotiate": {}, "bearer": {"realm": "u", "service": "s"}, "basic": {"realm": 'q"q'}}),
        ("", {}),
        ('"=,,=', {}),
    ],
)  # fmt: skip
def test_challenges_are_understood(text: str, meant: object) -> None:
    assert challenges(text) == meant


class TokenServer:
    """Gives a new token for each request of whoever it knows; `tokens` are those that the registry takes."""

    def __init__(self, *known: str) -> None:
        self.known = {base64.b64encode(user.encode()).decode() for user in known}
        self.tokens: set[str] = set()
        self.asked: list[Request] = []
        self.given = 0

    def answer(self, request: Request) -> Reply:
        self.asked.append(request)
        if self.known and request.headers.get("authorization", "").removeprefix("Basic ") not in self.known:
            return Reply(401)
        self.given += 1
        self.tokens.add(f"token-{self.given}")
        document = {"token": f"token-{self.given}", "expires_in": 300}
        return Reply(200, {}, json.dumps(document).encode())


@contextmanager
def guarded(authority: TokenServer, answers: Answers) -> Iterator[tuple[str, list[Request]]]:
    """Serve `answers` to those whom `authority` lets in, as `scripted` does."""
    with (
        scripted(authority.answer) as (realm, _),
        scripted(with_tokens(answers, f"{realm}token?x=1", authority.tokens)) as served,
    ):
        yield served


def test_a_token_is_asked_for_and_used_again() -> None:
    pushed, authority = model(a=b"1", b=b"2"), TokenServer()

    async def use(of: OciStore) -> None:
        listed = await of.snapshot()
        for name in ("a", "b"):
            location = await of.locate(listed.entries[name])
            assert location.headers == {"authorization": "Bearer token-1"}
            assert location.expires is not None
            await read_span(location, Span(0, 1))

    with guarded(authority, pushed.answer) as (url, _):
        trio.run(use, store(url))
    (asked,) = authority.asked
    assert parse_qs(urlsplit(asked.target).query) == {
        "x": ["1"],
        "service": ["registry.test"],
        "scope": ["repository:team/model:pull"],
    }
    assert "authorization" not in asked.headers


def test_a_token_that_is_refused_is_replaced() -> None:
    pushed, authority = model(a=b"1"), TokenServer()
    with guarded(authority, pushed.answer) as (url, _):
        of = store(url)
        listed = snapshot(of)
        authority.tokens.clear()
        location = trio.run(of.locate, listed.entries["a"])
    assert location.headers == {"authorization": "Bearer token-2"}


def test_a_token_is_replaced_before_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed, authority = model(a=b"1"), TokenServer()
    with guarded(authority, pushed.answer) as (url, _):
        of = store(url)
        snapshot(of)
        now = time.time()
        monkeypatch.setattr("time.time", lambda: now + 280)
        snapshot(of)
    assert authority.given == 2


def test_verbs_at_once_ask_for_one_token() -> None:
    pushed, authority = model(a=b"1"), TokenServer()

    async def use(of: OciStore) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(of.snapshot)

    with guarded(authority, pushed.answer) as (url, _):
        trio.run(use, store(url))
    assert authority.given == 1


@pytest.mark.parametrize("form", ["auth", "fields", "helper", "store"])
def test_dockers_credentials_open_a_private_repository(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed, authority = model(a=b"1"), TokenServer(f"{USER}:{PASSWORD}")
    with guarded(authority, pushed.answer) as (url, requests):
        host = urlsplit(url).netloc
        document: dict[str, Any] = {
            "auth": {"auths": {host: {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}}},
            "fields": {"auths": {f"https://{host}/v1/": {"username": USER, "password": PASSWORD}}},
            "helper": {"credHelpers": {host: "test"}, "credsStore": "not-there"},
            "store": {"credsStore": "test"},
        }[form]
        helper(tmp_path, monkeypatch, USER, PASSWORD)
        monkeypatch.setenv("DOCKER_CONFIG", str(docker_config(tmp_path / "docker", document)))
        snapshot(store(url))
    assert not any("basic" in request.headers.get("authorization", "").lower() for request in requests)


def helper(
    directory: Path, monkeypatch: pytest.MonkeyPatch, user: str, secret: str, exit_code: int = 0
) -> Path:
    """Put ``docker-credential-test`` on the path; what it was asked for is in the file that is returned."""
    program, asked = directory / "docker-credential-test", directory / "asked"
    said = json.dumps({"ServerURL": "x", "Username": user, "Secret": secret})
    said = said if not exit_code else "credentials not found in native keychain"
    program.write_text(f"#!/bin/sh\ncat >{asked}; echo $1 >>{asked}; echo '{said}'; exit {exit_code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return asked


def test_a_helper_is_asked_for_docker_hub_by_its_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = helper(tmp_path, monkeypatch, USER, PASSWORD)
    monkeypatch.setenv("DOCKER_CONFIG", str(docker_config(tmp_path / "d", {"credsStore": "test"})))
    found = trio.run(credentials, HUB)
    assert found is not None
    assert (found.user, found.password) == (USER, PASSWORD)
    assert asked.read_text() == f"{HUB}get\n"
    assert PASSWORD not in repr(found)


def test_a_helper_that_has_nothing_leaves_it_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(tmp_path, monkeypatch, "", "", exit_code=1)
    document = {"credsStore": "test", "auths": {"r.test": {"username": "u", "password": "p"}}}
    monkeypatch.setenv("DOCKER_CONFIG", str(docker_config(tmp_path / "d", document)))
    found = trio.run(credentials, "r.test")
    assert found is not None
    assert found.user == "u"
    assert trio.run(credentials, "other.test") is None


def test_credentials_that_rotate_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed, authority = model(a=b"1"), TokenServer(f"{USER}:new")
    monkeypatch.setenv("DOCKER_CONFIG", str(docker_config(tmp_path / "d", {"credsStore": "test"})))
    helper(tmp_path, monkeypatch, USER, "old-canary")
    with guarded(authority, pushed.answer) as (url, _):
        of = store(url)
        error = failure(of.snapshot)
        assert isinstance(error, AccessDenied)
        assert "canary" not in str(error)
        helper(tmp_path, monkeypatch, USER, "new")
        assert "a" in snapshot(of).entries


def test_an_identity_token_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = model(a=b"1")
    helper(tmp_path, monkeypatch, "<token>", "identity-canary")
    monkeypatch.setenv("DOCKER_CONFIG", str(docker_config(tmp_path / "d", {"credsStore": "test"})))
    given = Reply(200, {}, b'{"access_token": "for-you"}')
    with (
        scripted(lambda _: given) as (realm, asked),
        scripted(with_tokens(pushed.answer, realm, {"for-you"})) as (url, _),
    ):
        snapshot(store(url))
    forms = [(request.method, parse_qs(request.body.decode())) for request in asked]
    wanted = {
        "grant_type": ["refresh_token"],
        "refresh_token": ["identity-canary"],
        "client_id": ["modelfs"],
        "service": ["registry.test"],
        "scope": ["repository:team/model:pull"],
    }
    assert forms == [("POST", wanted)]


@pytest.mark.parametrize(
    "document",
    ['{"auths": ', '{"credsStore": "../x"}', '{"credsStore": "not-installed"}',
     '{"auths": {"r.test": {"auth": "%%"}}}'],
    ids=["cut", "path", "absent", "base64"],
)  # fmt: skip
def test_a_configuration_that_cannot_be_used_is_named(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(document)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    error = failure(credentials, "r.test")
    assert isinstance(error, AccessDenied)
    assert str(tmp_path / "config.json") in str(error)


@pytest.mark.parametrize(
    "realm",
    ["http://169.254.169.254/token", "ftp://x/token", "", "http:///x"],
    ids=["metadata", "ftp", "none", "host"],
)
def test_a_registry_leads_to_no_token_server_that_it_should_not_know(realm: str) -> None:
    with scripted(with_tokens(model(a=b"1").answer, realm, set())) as (url, _):
        assert isinstance(failure(store(url).snapshot), BadAnswer)


@pytest.mark.parametrize(
    "body", [b"[]", b"{}", b'{"token": 5}', b'{"token": "a\\nb"}', b"not json", b'{"token": ""}']
)
def test_a_token_server_that_gives_none_is_a_bad_answer(body: bytes) -> None:
    with (
        scripted(lambda _: Reply(200, {}, body)) as (realm, _),
        scripted(with_tokens(model(a=b"1").answer, realm, set())) as (url, _),
    ):
        assert isinstance(failure(store(url).snapshot), BadAnswer)


# Redirects.


def test_what_opens_the_registry_is_never_sent_elsewhere() -> None:
    pushed, authority = model(a=b"the bytes"), TokenServer()
    cdn: Answers = lambda request: file_reply(b"the bytes", request)  # noqa: E731

    async def read(of: OciStore) -> None:
        entry = (await of.snapshot()).entries["a"]
        location = await of.locate(entry)
        assert not location.headers
        assert await read_span(location, Span(0, entry.size)) == b"the bytes"

    with scripted(cdn) as (away, asked_away), scripted(authority.answer) as (realm, _):

        def registry(request: Request) -> Reply:
            if "/blobs/" in request.target:
                return Reply(307, {"Location": f"{away}signed?X-Sig=1"})
            return pushed.answer(request)

        with scripted(with_tokens(registry, realm, authority.tokens)) as (url, _):
            trio.run(read, store(url))
    assert len(asked_away) == 1
    assert "authorization" not in asked_away[0].headers


def test_a_redirect_within_the_registry_keeps_what_opens_it() -> None:
    pushed, authority = model(a=b"1"), TokenServer()

    def registry(request: Request) -> Reply:
        if "/blobs/" in request.target:
            return Reply(307, {"Location": "/data/1"})
        return file_reply(b"1", request) if request.target == "/data/1" else pushed.answer(request)

    async def read(of: OciStore) -> bytes:
        return await read_span(await of.locate((await of.snapshot()).entries["a"]), Span(0, 1))

    with guarded(authority, registry) as (url, _):
        assert trio.run(read, store(url)) == b"1"


@pytest.mark.parametrize("target", ["http://169.254.169.254/x", "file:///etc/passwd"])
def test_a_registry_leads_to_no_address_that_it_should_not_know(target: str) -> None:
    pushed = model(a=b"1")

    def registry(request: Request) -> Reply:
        return Reply(307, {"Location": target}) if "/blobs/" in request.target else pushed.answer(request)

    async def locate(of: OciStore) -> None:
        await of.locate((await of.snapshot()).entries["a"])

    with scripted(registry) as (url, _):
        assert isinstance(failure(locate, store(url)), BadAnswer)


# Debian's registry, as others fill it.


def test_a_registry_with_a_password_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = model(a=b"1")
    with docker_registry(tmp_path, **with_password(tmp_path)) as url:
        pushed.push(url, (USER, PASSWORD))
        assert isinstance(failure(store(url).snapshot), AccessDenied)
        row = {urlsplit(url).netloc: {"username": USER, "password": PASSWORD}}
        monkeypatch.setenv("DOCKER_CONFIG", str(docker_config(tmp_path / "d", {"auths": row})))
        assert "a" in snapshot(store(url)).entries


def test_an_image_that_skopeo_copied_shows_its_layers(tmp_path: Path) -> None:
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed")
    pushed = Repository("team/model")
    layers = [
        pushed.blob(tarred({"models/a": b"1"}), "application/vnd.oci.image.layer.v1.tar"),
        pushed.blob(gzip.compress(tarred({"models/b": b"2"})), "application/vnd.oci.image.layer.v1.tar+gzip"),
    ]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
    config_type = "application/vnd.oci.image.config.v1+json"
    pushed.manifest("v1", layers, pushed.blob(json.dumps(config).encode(), config_type))
    pushed.write_layout(tmp_path / "layout", "v1")
    with docker_registry(tmp_path) as url:
        target = f"docker://{urlsplit(url).netloc}/team/model:v1"
        copy = [skopeo, "--insecure-policy", "copy", "--preserve-digests", "--dest-tls-verify=false"]
        subprocess.run([*copy, f"oci:{tmp_path}/layout:v1", target], check=True, capture_output=True)
        listed = snapshot(store(url))
    first, second = (layer["digest"].removeprefix("sha256:")[:12] for layer in layers)
    assert list(listed.entries) == [
        ".oci/config.json",
        f".oci/layers/0-{first}.tar",
        f".oci/layers/1-{second}.tar.gz",
        ".oci/manifest.json",
    ]
