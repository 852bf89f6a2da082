"""http(s):// stores: what is listed, how files are pinned, what hostile and broken servers get."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, StoreError, Unavailable
from modelfs.stores import Options, open_store
from modelfs.stores.http import index_names, parse_manifest
from modelfs.testing import read_span
from modelfs.types import Entry, Snapshot, Span
from tests.stores.case import FILES, write_tree
from tests.stores.site import HOST, Answers, Reply, Request, file_reply, scripted

HTML = {"Content-Type": "text/html"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def no_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def listing(url: str, options: Options | None = None) -> Snapshot:
    return trio.run(open_store(url, options).snapshot)


def index(*links: str) -> Reply:
    body = "".join(f'<a href="{link}">text</a>\n' for link in links)
    return Reply(200, HTML, f"<html><body>{body}</body></html>".encode())


def manifest(*files: dict[str, Any]) -> Reply:
    return Reply(200, JSON, json.dumps({"version": 1, "files": files}).encode())


def site(pages: dict[str, Reply | bytes]) -> Answers:
    """Return the answers of a server that has `pages` (bytes: as a file) and nothing else."""

    def answers(request: Request) -> Reply:
        page = pages.get(request.target, Reply(404))
        return page if isinstance(page, Reply) else file_reply(page, request)

    return answers


# ---- validators


@pytest.mark.parametrize(
    ("headers", "version", "etag", "modified"),
    [
        ({"ETag": '"abc"'}, '"abc"', '"abc"', None),
        ({"ETag": '"abc"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, '"abc"', '"abc"', None),
        (
            {"ETag": 'W/"abc"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"},
            '4 W/"abc" Wed, 21 Oct 2015 07:28:00 GMT',
            None,
            "Wed, 21 Oct 2015 07:28:00 GMT",
        ),
        (
            {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"},
            "4 - Wed, 21 Oct 2015 07:28:00 GMT",
            None,
            "Wed, 21 Oct 2015 07:28:00 GMT",
        ),
        ({"ETag": "unquoted", "Last-Modified": "yesterday"}, "4 - yesterday", None, "yesterday"),
    ],
)
def test_the_best_validator_pins_the_version(
    headers: dict[str, str], version: str, etag: str | None, modified: str | None
) -> None:
    with scripted(site({"/a.bin": Reply(200, headers, b"data")})) as (url, _):
        store = open_store(f"{url}a.bin")
        entry = trio.run(store.snapshot).entries["a.bin"]
        location = trio.run(store.locate, entry)
    assert (entry.version, location.etag, location.last_modified) == (version, etag, modified)
    assert entry.mtime == (1445412480.0 if "2015" in str(headers) else 0.0)


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"abc"'}, {"ETag": '""'}])
def test_a_file_whose_versions_look_alike_is_refused(headers: dict[str, str]) -> None:
    pages = {"/": index("a.bin", "b.bin"), "/a.bin": Reply(200, headers, b"data"), "/b.bin": b"fine"}
    with scripted(site(pages)) as (url, _):
        snapshot = listing(url)
        with pytest.raises(BadAnswer, match="neither ETag nor Last-Modified: publish its sha256"):
            listing(f"{url}a.bin")
    assert list(snapshot.entries) == ["b.bin"]
    assert snapshot.rejected[0][0] == "a.bin"
    assert "neither ETag nor Last-Modified" in snapshot.rejected[0][1]


def test_a_file_without_length_is_refused() -> None:
    endless = Reply(200, {"ETag": '"a"'}, b"data", sized=False)
    with scripted(site({"/": index("a.bin", "b.bin"), "/a.bin": endless, "/b.bin": b"fine"})) as (url, _):
        snapshot = listing(url)
        with pytest.raises(BadAnswer, match="no Content-Length"):
            listing(f"{url}a.bin")
    assert list(snapshot.entries) == ["b.bin"]
    assert [path for path, reason in snapshot.rejected if "no Content-Length" in reason] == ["a.bin"]


def test_a_compressed_file_is_refused() -> None:
    pages = {"/a.bin": Reply(200, {"ETag": '"a"', "Content-Encoding": "gzip"}, b"data")}
    with scripted(site(pages)) as (url, requests), pytest.raises(BadAnswer, match="content encoding 'gzip'"):
        listing(f"{url}a.bin")
    assert requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("refusal", [Reply(403), Reply(405), Reply(501), Reply(200, sized=False)])
@pytest.mark.parametrize("data", [b"content", b""])
def test_where_head_is_no_use_one_byte_is_asked_for(refusal: Reply, data: bytes) -> None:
    def answers(request: Request) -> Reply:
        return refusal if request.method == "HEAD" else file_reply(data, request)

    with scripted(answers) as (url, requests):
        store = open_store(f"{url}a.bin")
        if data:
            entry = trio.run(store.snapshot).entries["a.bin"]
            assert (entry.size, entry.version[:1]) == (7, '"')
        else:
            with pytest.raises(BadAnswer, match="neither ETag"):  # of nothing there is no part with an ETag
                trio.run(store.snapshot)
    assert [r.headers.get("range") for r in requests] == [None, "bytes=0-0"]


def test_a_changed_file_has_another_version_and_the_old_one_is_stale() -> None:
    pages: dict[str, Reply | bytes] = {"/a.bin": b"old"}
    with scripted(site(pages)) as (url, _):
        store = open_store(f"{url}a.bin")
        old = trio.run(store.snapshot)
        pages["/a.bin"] = b"new"
        new = trio.run(store.snapshot)
        assert old.revision != new.revision
        location = trio.run(store.locate, old.entries["a.bin"])
        with pytest.raises(StoreError) as caught:
            trio.run(read_span, location, Span(0, 3))
    assert type(caught.value).__name__ == "Stale"


# ---- index pages

APACHE = b"""<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 3.2 Final//EN">
<html><head><title>Index of /pub/m</title></head><body><h1>Index of /pub/m</h1><table>
<tr><th><a href="?C=N;O=D">Name</a></th><th><a href="?C=M;O=A">Last modified</a></th></tr>
<tr><td><a href="/pub/">Parent Directory</a></td></tr>
<tr><td><a href="a%20b%26c.bin">a b&amp;c.bin</a></td></tr>
<tr><td><a href="sub/">sub/</a></td></tr>
<tr><td><a href="a%20b%26c.bin"><img src="/icons/unknown.gif"></a></td></tr>
</table><address>Apache at <A HREF='http://httpd.apache.org/'>Apache</A></address></body></html>"""


@pytest.mark.parametrize(
    ("page", "names"),
    [
        (APACHE, ["a b&c.bin", "sub/"]),
        (b'<a href="./a:b.bin">', ["a:b.bin"]),
        (b'<a href="/pub/m/abs.bin"><a href="http://h/pub/m/full.bin">', ["abs.bin", "full.bin"]),
        (b'<a href="http://other/pub/m/x"><a href="https://h/pub/m/x"><a href="//other/pub/m/x">', []),
        (b'<a href="../"><a href=".."><a href="/"><a href="../secret/x"><a href=".">', []),
        (b'<a href="sub/deeper.bin"><a href="%2e%2e%2fsecret">', []),
        (b'<a href="x?download=1"><a href="#top"><a href=""><a href><a name=x>', []),
        (b'<a href="mailto:a@b"><a href="javascript:alert(1)"><a href="http://[">', []),
        (b'<a href="caf%C3%A9"><a href="caf\xc3\xa9"><a href="\xff"><a href="%ff">', ["café", "\udcff"]),
        (b'<a href="unclosed', []),
    ],
)
def test_an_index_lists_its_own_children_only(page: bytes, names: list[str]) -> None:
    assert index_names(page, "http://h/pub/m/") == names


def test_directories_are_followed_within_the_prefix() -> None:
    pages: dict[str, Reply | bytes] = {
        "/m/": index("../", "/secret", "sub/", "a.bin", "void/"),
        "/m/a.bin": b"a",
        "/m/sub/": index("../", "/m/", "b.bin"),
        "/m/sub/b.bin": b"bb",
        "/m/void/": index("../"),
        "/secret": b"secret",
    }
    with scripted(site(pages)) as (url, requests):
        snapshot = listing(f"{url}m/")
    kinds = {path: entry.kind for path, entry in snapshot.entries.items()}
    assert kinds == {"a.bin": "file", "sub/b.bin": "file", "void": "directory"}
    assert all(request.target.startswith("/m/") for request in requests)


def test_an_endless_tree_is_cut_off() -> None:
    def answers(request: Request) -> Reply:
        if request.target.endswith("/"):
            return index("again/", "file")
        return file_reply(b"x", request) if request.target.endswith("/file") else Reply(404)

    with scripted(answers) as (url, _):
        snapshot = listing(url)
    assert len(snapshot.entries) == 32
    assert [reason for _, reason in snapshot.rejected] == ["it is deeper than 32 directories"]


def test_a_listing_that_is_too_long_is_refused() -> None:
    with scripted(site({"/": index("a", "b", "c"), "/a": b"", "/b": b"", "/c": b""})) as (url, _):
        with pytest.raises(StoreError, match="more than 2 entries: raise the option max_entries") as caught:
            listing(url, {"max_entries": 2})
        assert not caught.value.retryable
        assert len(listing(url, {"max_entries": 3}).entries) == 3


def test_hostile_names_are_rejected_and_never_asked_for() -> None:
    pages = {"/m/": index("%2e%2e/", "a%0ab", "a%00b", "x" * 300, "good"), "/m/good": b"good"}
    with scripted(site(pages)) as (url, requests):
        snapshot = listing(f"{url}m/")
    assert list(snapshot.entries) == ["good"]
    assert [path for path, _ in snapshot.rejected] == ["..", "a\0b", "a\nb", "x" * 300]
    assert {request.target for request in requests} == {"/m/modelfs-manifest.json", "/m/", "/m/good"}


def test_what_the_server_refuses_is_rejected_with_its_reason() -> None:
    pages = {
        "/": index("gone", "private", "odd", "closed/", "good"),
        "/private": Reply(403),
        "/odd": Reply(418),
        "/closed/": Reply(401),
        "/good": b"good",
    }
    with scripted(site(pages)) as (url, _):
        snapshot = listing(url)
    assert list(snapshot.entries) == ["good"]
    reasons = dict(snapshot.rejected)
    assert reasons.keys() == {"gone", "private", "odd", "closed"}
    for path, status in {"gone": "404", "private": "403", "odd": "418", "closed": "401"}.items():
        assert status in reasons[path]


def test_a_model_of_which_nothing_can_be_shown_is_an_error() -> None:
    pages = {"/": index("private"), "/private": Reply(403)}
    with scripted(site(pages)) as (url, _), pytest.raises(AccessDenied, match="private: refused"):
        listing(url)
    with scripted(site({"/": index("../")})) as (url, _), pytest.raises(NotFound, match="lists no files"):
        listing(url)


def test_a_page_that_is_no_index_is_a_bad_answer() -> None:
    pages = {"/": Reply(200, {"Content-Type": "text/plain"}, b"hello")}
    with scripted(site(pages)) as (url, _), pytest.raises(BadAnswer, match="neither a manifest nor an HTML"):
        listing(url)


def test_one_busy_answer_makes_the_whole_listing_unavailable() -> None:
    pages = {"/": index("a", "b"), "/a": b"a", "/b": Reply(503, {"Retry-After": "7"})}
    with scripted(site(pages)) as (url, _), pytest.raises(Unavailable) as caught:
        listing(url)
    assert caught.value.retry_after == 7


def test_a_directory_asked_for_as_a_file_is_explained() -> None:
    pages = {"/m": Reply(301, {"Location": "/m/"}), "/m/": index("a")}
    with scripted(site(pages)) as (url, _), pytest.raises(BadAnswer, match="end its URL with a slash"):
        listing(f"{url}m")


# ---- manifests


def test_a_manifest_that_pins_everything_needs_one_request() -> None:
    sha256 = "ab" * 32
    pages = {
        "/m/modelfs-manifest.json": manifest(
            {"path": "a.bin", "size": 3, "etag": '"v1"', "sha256": sha256.upper(), "comment": "ignored"},
            {"path": "d/b #1.bin", "size": 0, "etag": '"v2"', "url": "../blobs/2?x=1"},
        )
    }
    with scripted(site(pages)) as (url, requests):
        store = open_store(f"{url}m/")
        snapshot = trio.run(store.snapshot)
        a, b = snapshot.entries["a.bin"], snapshot.entries["d/b #1.bin"]
        assert trio.run(store.locate, a).url == f"{url}m/a.bin"
        assert trio.run(store.locate, b).url == f"{url}blobs/2?x=1"
        assert len(requests) == 1
        # After a restart the listing is known, but not yet where the manifest has the files.
        assert trio.run(open_store(f"{url}m/").locate, b).url == f"{url}blobs/2?x=1"
    assert (a.size, a.version, str(a.digest)) == (3, '"v1"', f"sha256:{sha256}")


def test_a_digest_is_a_version_where_the_server_has_no_validator() -> None:
    sha256 = "ab" * 32
    pages = {
        "/modelfs-manifest.json": manifest({"path": "a", "size": 4, "sha256": sha256}),
        "/a": Reply(200, {}, b"data"),
    }
    with scripted(site(pages)) as (url, _):
        store = open_store(url)
        entry = trio.run(store.snapshot).entries["a"]
        location = trio.run(store.locate, entry)
    assert entry.version == f"sha256:{sha256}"
    assert (location.etag, location.last_modified) == (None, None)


def test_a_manifest_that_is_out_of_date_is_noticed() -> None:
    pages = {
        "/modelfs-manifest.json": manifest({"path": "a", "size": 5}, {"path": "b", "size": 4}),
        "/a": b"data",
        "/b": b"data",
    }
    with scripted(site(pages)) as (url, _):
        snapshot = listing(url)
    assert list(snapshot.entries) == ["b"]
    assert "has 4 bytes, the manifest says 5: renew the manifest" in snapshot.rejected[0][1]


def test_hostile_paths_in_a_manifest_are_rejected_and_never_asked_for() -> None:
    bad = ["", "../../etc/passwd", "/etc/passwd", "//evil.example/x", "a\nb", "a//b"]
    rows = [{"path": path, "size": 1} for path in bad]
    pages = {"/m/modelfs-manifest.json": manifest(*rows, {"path": "good", "size": 4}), "/m/good": b"good"}
    with scripted(site(pages)) as (url, requests):
        snapshot = listing(f"{url}m/")
    assert list(snapshot.entries) == ["good"]
    assert len(snapshot.rejected) == 6
    assert {request.target for request in requests} == {"/m/modelfs-manifest.json", "/m/good"}


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b'{"version": 1,\n"files": [\n{"path": }]}', "line 3: not JSON: Expecting value: correct"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 200_000, "not JSON: RecursionError"),
        (b"[]", "not a manifest"),
        (b'{"files": []}', "not a manifest"),
        (b'{"version": 2, "files": []}', "not a manifest"),
        (b'{"version": 1, "files": {}}', "not a manifest"),
        (b'{"version": 1, "files": ["a"]}', r"files\[0\]: must be an object"),
        (
            b'{"version": 1, "files": [{"path": "a", "size": 1}, {"size": 1}]}',
            r"files\[1\]: path must be text",
        ),
        (b'{"version": 1, "files": [{"path": "\\ud800", "size": 1}]}', r"files\[0\]: malformed path"),
        (b'{"version": 1, "files": [{"path": 1, "size": 1}]}', "path must be text"),
        (b'{"version": 1, "files": [{"path": "a"}]}', "size must be a number of bytes"),
        (b'{"version": 1, "files": [{"path": "a", "size": -1}]}', "size must be"),
        (b'{"version": 1, "files": [{"path": "a", "size": true}]}', "size must be"),
        (b'{"version": 1, "files": [{"path": "a", "size": 1.5}]}', "size must be"),
        (b'{"version": 1, "files": [{"path": "a", "size": 9223372036854775808}]}', "size must be"),
        (b'{"version": 1, "files": [{"path": "a", "size": 1, "sha256": "ab"}]}', "sha256 must be 64 hex"),
        (b'{"version": 1, "files": [{"path": "a", "size": 1, "etag": "x"}]}', "etag must be a strong ETag"),
        (
            b'{"version": 1, "files": [{"path": "a", "size": 1, "etag": "W/\\"x\\""}]}',
            "etag must be a strong",
        ),
        (b'{"version": 1, "files": [{"path": "a", "size": 1, "url": 7}]}', "url must be text"),
        (b'{"version": 1, "files": [{"path": "a", "size": 1, "url": "http://evil/x"}]}', "another server"),
        (b'{"version": 1, "files": [{"path": "a", "size": 1, "url": "//evil/x"}]}', "another server"),
        (
            b'{"version": 1, "files": [{"path": "a", "size": 1, "url": "file:///etc/passwd"}]}',
            "another server",
        ),
        (b'{"version": 1, "files": [{"path": "a", "size": 1, "url": "http://["}]}', "malformed"),
    ],
)
def test_a_malformed_manifest_says_where(body: bytes, fault: str) -> None:
    with pytest.raises(BadAnswer, match=fault) as caught:
        parse_manifest(body, "https://h/m/modelfs-manifest.json?secret")
    assert str(caught.value).startswith("https://h/m/modelfs-manifest.json")
    assert "secret" not in str(caught.value)


def blocks(language: str) -> list[str]:
    text = (Path(__file__).parents[2] / "docs/stores/http.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_manifest_of_the_documentation_is_one() -> None:
    (example,) = blocks("json")
    config, model = parse_manifest(example.encode(), "http://h/m/modelfs-manifest.json")
    assert (config.url, config.etag) == ("http://h/m/config.json", '"65f1-23a"')
    assert (model.url, model.size) == ("http://h/blobs/9f2c", 437955512)


def test_the_command_of_the_documentation_makes_a_manifest(tmp_path: Path) -> None:
    (script,) = blocks("sh")
    root = write_tree(tmp_path)
    subprocess.run(["sh", "-ec", script.replace("/srv/www/bert", str(root))], check=True)
    files = parse_manifest((root / "modelfs-manifest.json").read_bytes(), "http://h/modelfs-manifest.json")
    sums = {path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()}
    assert {file.path: file.sha256 for file in files} == sums


def test_a_manifest_that_is_asked_for_must_be_there() -> None:
    pages = {"/": index("a"), "/a": b"a", "/list.json": manifest({"path": "only", "size": 1, "etag": '"x"'})}
    with scripted(site(pages)) as (url, _):
        assert list(listing(url, {"manifest": "list.json"}).entries) == ["only"]
        with pytest.raises(NotFound, match=r"other\.json"):
            listing(url, {"manifest": "other.json"})


@pytest.mark.parametrize("absent", [Reply(403), Reply(200, HTML, b"<html>an app that answers everything")])
def test_servers_that_do_not_say_404_have_no_manifest(absent: Reply) -> None:
    with scripted(site({"/modelfs-manifest.json": absent, "/": index("a"), "/a": b"a"})) as (url, _):
        assert list(listing(url).entries) == ["a"]


@pytest.mark.parametrize("page", ["/modelfs-manifest.json", "/"])
def test_an_answer_without_end_is_cut_off(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelfs.stores.http.MAX_MANIFEST", 1 << 20)
    monkeypatch.setattr("modelfs.stores.http.MAX_INDEX", 1 << 20)
    large = Reply(200, JSON if "json" in page else HTML, b" " * (2 << 20), sized=False)
    with scripted(site({page: large})) as (url, _), pytest.raises(StoreError, match="longer than 1 MiB"):
        listing(url)


# ---- errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AccessDenied),
        (403, AccessDenied),
        (404, NotFound),
        (410, NotFound),
        (408, Unavailable),
        (429, Unavailable),
        (500, Unavailable),
        (503, Unavailable),
        (418, BadAnswer),
        (204, BadAnswer),
        (304, BadAnswer),
    ],
)
@pytest.mark.parametrize("path", ["a.bin", "m/"])
def test_statuses_are_mapped(status: int, kind: type[StoreError], path: str) -> None:
    with scripted(lambda _: Reply(status)) as (url, _), pytest.raises(kind, match=str(status)) as caught:
        listing(f"{url}{path}")
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("1e9", None),
    ],
)
def test_retry_after_is_passed_on(header: str, seconds: float | None) -> None:
    busy = Reply(429, {"Retry-After": header})
    with scripted(lambda _: busy) as (url, _), pytest.raises(Unavailable) as caught:
        listing(f"{url}a.bin")
    assert caught.value.retry_after == seconds


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        with pytest.raises(Unavailable, match="check the address and the network"):
            listing(f"http://{HOST}:{unused.getsockname()[1]}/a.bin")


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"]
)
def test_a_broken_answer_is_unavailable(answer: bytes) -> None:
    async def main() -> None:
        async def talk(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.receive_some()
                await stream.send_all(answer)

        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, talk, 0, host=HOST))
            port = listeners[0].socket.getsockname()[1]
            with pytest.raises(Unavailable):
                await open_store(f"http://{HOST}:{port}/").snapshot()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_silent_server_is_given_up() -> None:
    with socket.create_server((HOST, 0)) as silent:
        store = open_store(f"http://{HOST}:{silent.getsockname()[1]}/", {"timeout": 0.05})
        with pytest.raises(Unavailable, match=r"no answer within 0\.05 s: raise the option timeout"):
            trio.run(store.snapshot)


# ---- secrets and redirects


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_user_and_password_of_the_url_are_sent_but_never_shown() -> None:
    pages = {"/": index("a"), "/a": b"a"}
    with scripted(site(pages)) as (url, requests):
        store = open_store(url.replace("://", "://j%40ne:p%2Fw@"))
        snapshot = trio.run(store.snapshot)
        location = trio.run(store.locate, snapshot.entries["a"])
    assert store.url == url
    assert {request.headers["authorization"] for request in requests} == {basic("j@ne", "p/w")}
    assert location.headers["authorization"] == basic("j@ne", "p/w")
    assert location.url == f"{url}a"


def test_netrc_is_read_anew_each_time(no_netrc: Path) -> None:
    with scripted(site({"/a": b"a"})) as (url, requests):
        store = open_store(f"{url}a")
        for password in ("first", "second"):
            no_netrc.write_text(f"machine {HOST} login me password {password}\n")
            entry = trio.run(store.snapshot).entries["a"]
            assert trio.run(store.locate, entry).headers["authorization"] == basic("me", password)
            assert requests[-1].headers["authorization"] == basic("me", password)
        no_netrc.write_text("machine other.example login me password secret\n")
        assert "authorization" not in trio.run(store.locate, entry).headers


def test_headers_win_over_netrc_and_the_url_over_headers(no_netrc: Path) -> None:
    no_netrc.write_text(f"machine {HOST} login me password secret\n")
    options = {"headers": {"Authorization": "Bearer token", "X-Key": "k"}}
    with scripted(site({"/a": b"a"})) as (url, requests):
        listing(f"{url}a", options)
        listing(f"{url}a".replace("://", "://u:p@"), options)
    assert [request.headers["authorization"] for request in requests] == ["Bearer token", basic("u", "p")]
    assert {request.headers["x-key"] for request in requests} == {"k"}


def test_a_malformed_netrc_is_explained_without_its_content(no_netrc: Path) -> None:
    no_netrc.write_text("machine h login me passwort s3cret\n")
    with pytest.raises(AccessDenied, match=r"netrc, line 1: malformed") as caught:
        listing(f"http://{HOST}:9/a")
    assert "s3cret" not in str(caught.value)


def test_secrets_are_not_sent_to_another_origin() -> None:
    with scripted(site({"/real": b"data"})) as (other, strange):
        pages = {"/a": Reply(302, {"Location": "/b"}), "/b": Reply(307, {"Location": f"{other}real"})}
        with scripted(site(pages)) as (url, own):
            options = {"headers": {"X-Token": "secret", "Authorization": "Bearer secret"}}
            assert listing(f"{url}a", options).entries["a"].size == 4
    assert [request.target for request in own] == ["/a", "/b"]
    assert {request.headers["x-token"] for request in own} == {"secret"}
    assert [request.target for request in strange] == ["/real"]
    assert "secret" not in str(strange[0].headers)


def test_an_index_that_is_redirected_lists_the_same_names() -> None:
    with scripted(site({"/cdn/x/": index("../", "a"), "/cdn/x/a": b"a"})) as (other, _):
        pages = {
            "/m/": Reply(302, {"Location": f"{other}cdn/x/"}),
            "/m/a": Reply(302, {"Location": f"{other}cdn/x/a"}),
        }
        with scripted(site(pages)) as (url, _):
            store = open_store(f"{url}m/")
            snapshot = trio.run(store.snapshot)
            assert trio.run(store.locate, snapshot.entries["a"]).url == f"{url}m/a"


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("/a", "more than 10 redirects"),
        ("file:///etc/passwd", "not HTTP"),
        ("ftp://h/x", "not HTTP"),
        ("http://169.254.169.254/latest/", "link-local"),
    ],
)
def test_bad_redirects_are_not_followed(target: str, fault: str) -> None:
    moved = Reply(302, {"Location": target})
    with scripted(lambda _: moved) as (url, _), pytest.raises(BadAnswer, match=fault):
        listing(f"{url}a")


def test_a_malformed_redirect_is_an_error_of_the_store() -> None:
    with scripted(lambda _: Reply(302, {"Location": "http://[::1"})) as (url, _), pytest.raises(StoreError):
        listing(f"{url}a")


# ---- TLS


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


async def over_tls(authority: trustme.CA, answer: bytes, visit: Callable[[str], Any]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(context)

    async def talk(raw: trio.SocketStream) -> None:
        stream = trio.SSLStream(raw, context, server_side=True, https_compatible=True)
        try:
            await stream.receive_some()
            await stream.send_all(answer)
            await stream.aclose()
        except trio.BrokenResourceError:  # the client does not trust us
            await raw.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, talk, 0, host=HOST))
        await visit(f"https://{HOST}:{listeners[0].socket.getsockname()[1]}/a")
        nursery.cancel_scope.cancel()


GOOD = b'HTTP/1.1 200 OK\r\nContent-Length: 4\r\nETag: "a"\r\nConnection: close\r\n\r\n'


def test_the_ca_bundle_decides_who_is_trusted(authority: trustme.CA, tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))

    async def visit(url: str) -> None:
        assert (await open_store(url, {"ca_bundle": str(bundle)}).snapshot()).entries["a"].size == 4
        with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await open_store(url).snapshot()

    trio.run(over_tls, authority, GOOD, visit)


def test_a_redirect_out_of_tls_is_not_followed(authority: trustme.CA, tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    moved = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"

    async def visit(url: str) -> None:
        with pytest.raises(StoreError, match="from https to http"):
            await open_store(url, {"ca_bundle": str(bundle)}).snapshot()

    trio.run(over_tls, authority, moved, visit)


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_a_bad_ca_bundle_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content:
        (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(StoreError, match=r"cannot use the CA bundle .*ca\.pem"):
        listing(f"https://{HOST}:9/a", {"ca_bundle": str(tmp_path / "ca.pem")})


# ---- configuration


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://Example.COM:80", "http://example.com/"),
        ("https://example.com:8443/a/../b c/", "https://example.com:8443/b%20c/"),
        ("https://u:p@example.com/a.bin#part", "https://example.com/a.bin"),
        ("https://example.com/a.bin?sig=s3cret", "https://example.com/a.bin#query-bafb53f511da"),
    ],
)
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    assert open_store(url).url == shown


def test_different_queries_are_different_stores() -> None:
    assert open_store("http://h/get?id=1").url != open_store("http://h/get?id=2").url


@pytest.mark.parametrize(
    ("url", "options", "fault"),
    [
        ("http://", {}, "no host"),
        ("http:///a", {}, "no host"),
        ("http://h:port/a", {}, "malformed URL"),
        ("http://[/a", {}, "malformed URL"),
        ("http://h/dir/?token=s3cret", {}, "takes no query"),
        ("http://h/", {"header": {}}, "unknown option 'header'; accepted are: ca_bundle, headers, manifest"),
        ("http://h/", {"headers": "x"}, "wrong type"),
        ("http://h/", {"headers": {"X-Key": "s3cret\n"}}, "value of 'X-Key' is not printable"),
        ("http://h/", {"headers": {"X-Key": "s3crét"}}, "value of 'X-Key' is not printable"),
        ("http://h/", {"headers": {"X-Key": 7}}, "value of 'X-Key' is not printable"),
        ("http://h/", {"headers": {"X Key": "s3cret"}}, "not the name of a header"),
        ("http://h/", {"headers": {7: "s3cret"}}, "not the name of a header"),
        ("http://h/", {"timeout": 0}, "'timeout' must be positive"),
        ("http://h/", {"max_entries": -1}, "'max_entries' must be positive"),
        ("http://h/a", {"manifest": "m.json"}, "needs a URL of a directory"),
        ("http://h/", {"manifest": "http://other/m.json"}, "same server"),
        ("http://h/", {"manifest": "http://["}, "malformed"),
    ],
)
def test_bad_configuration_is_refused_without_showing_secrets(url: str, options: Options, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        open_store(url, options)
    assert "s3cr" not in str(caught.value)


def test_nothing_is_asked_when_a_store_is_made_or_a_file_located() -> None:
    with scripted(site({})) as (url, requests):
        store = open_store(f"{url}a.bin")
        trio.run(store.locate, Entry("a.bin", 1, '"v"'))
    assert not requests


def test_a_listing_makes_16_requests_at_once() -> None:
    together = threading.Barrier(16)
    running: set[int] = set()
    highest: list[int] = []
    names = [f"f{number}" for number in range(48)]

    def answers(request: Request) -> Reply:
        if not request.target.startswith("/f"):
            return index(*names) if request.target == "/" else Reply(404)
        running.add(threading.get_ident())
        together.wait(timeout=30)  # fewer at once would wait in vain
        highest.append(len(running))
        running.discard(threading.get_ident())
        return file_reply(b"x", request)

    with scripted(answers) as (url, _):
        assert len(listing(url).entries) == 48
    assert max(highest) == 16
