"""fsspec+…:// in detail: versions, reads that are checked, unknown servers, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError
from modelfs.fetch.client import RangeClient
from modelfs.metrics import Metrics
from modelfs.stores import identity_of, open_store
from modelfs.types import Span
from tests.fetch.test_client import Basket
from tests.stores.case import write_tree
from tests.stores.sftp_server import PASSWORD, Sftp, sftp

LARGE = os.urandom(3_000_000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("root"), {"bert/model.bin": LARGE, "bert/config.json": b"{}"})


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sftp]:
    with sftp(root, tmp_path_factory.mktemp("server")) as running:
        yield running


def options(server: Sftp, **more: object) -> dict[str, object]:
    known = str(server.known_hosts)
    return {"password": PASSWORD, "known_hosts": known, "look_for_keys": False, "allow_agent": False, **more}


def test_a_file_is_fetched_over_sftp_and_stale_once_it_is_rewritten(server: Sftp, root: Path) -> None:
    store = open_store(f"{server.url}/bert", options(server))
    whole, rest = Basket(), Basket()

    async def read() -> None:
        entry = (await store.snapshot()).entries["model.bin"]
        location = await store.locate(entry)
        async with RangeClient(metrics=Metrics()) as client:
            await client.fetch(location, Span(5, entry.size), entry.size, whole)
            (root / "bert/model.bin").write_bytes(LARGE[::-1])
            os.utime(root / "bert/model.bin", (1, 1))
            with pytest.raises(Stale, match="was changed since it was listed"):
                await client.fetch(location, Span(0, entry.size), entry.size, rest)

    trio.run(read)
    assert whole.data == LARGE[5:]
    assert not rest.data


def test_bytes_of_a_file_that_changes_while_it_is_read_are_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    file = write_tree(tmp_path, {"model.bin": b"old content"}) / "model.bin"
    store = open_store(f"fsspec+local://{tmp_path}")
    read = LocalFileSystem.cat_file

    def changed_meanwhile(system: LocalFileSystem, *arguments: object, **more: object) -> bytes:
        data = read(system, *arguments, **more)
        file.write_bytes(b"new content")
        os.utime(file, (1, 1))
        return data

    entry = trio.run(store.snapshot).entries["model.bin"]
    location = trio.run(store.locate, entry)
    assert location.reader
    monkeypatch.setattr(LocalFileSystem, "cat_file", changed_meanwhile)
    with pytest.raises(Stale):
        location.reader(Span(0, 11))


def test_a_server_whose_key_is_not_known_gets_no_password(server: Sftp, tmp_path: Path) -> None:
    unknown = tmp_path / "known_hosts"
    unknown.touch()
    store = open_store(f"{server.url}/bert", options(server, known_hosts=str(unknown)))
    with pytest.raises(AccessDenied, match=r"not let in \(UnknownHostKey\)"):
        trio.run(store.snapshot)


def test_a_wrong_password_is_access_denied_and_never_shown(server: Sftp) -> None:
    store = open_store(f"{server.url}/bert", options(server, password="wr0ng-s3cret"))
    with pytest.raises(AccessDenied, match="not let in") as caught:
        trio.run(store.snapshot)
    assert "wr0ng" not in f"{caught.value!r} {store!r} {identity_of(store)}"


def test_a_password_in_the_url_is_not_part_of_it() -> None:
    store = open_store("fsspec+sftp://reader:s3cret@host:2222/bert")
    assert store.url == "fsspec+sftp://host:2222/bert"
    assert "s3cret" not in identity_of(store)
    other = open_store("fsspec+sftp://reader:changed@host:2222/bert")
    assert identity_of(other) == identity_of(store)
    assert identity_of(open_store("fsspec+sftp://writer@host:2222/bert")) != identity_of(store)


def test_links_are_not_followed(tmp_path: Path) -> None:
    write_tree(tmp_path, {"bert/a": b"x", "secret": b"y"})
    (tmp_path / "bert/link").symlink_to("../secret")
    (tmp_path / "bert/loop").symlink_to(".")
    found = trio.run(open_store(f"fsspec+local://{tmp_path}/bert").snapshot)
    assert list(found.entries) == ["a"]
    assert [path for path, _ in found.rejected] == ["link", "loop"]


def test_what_is_too_much_is_not_listed(tmp_path: Path) -> None:
    write_tree(tmp_path, dict.fromkeys("abc", b"x"))
    with pytest.raises(StoreError, match="more than 2 entries: raise the option max_entries"):
        trio.run(open_store(f"fsspec+local://{tmp_path}", {"max_entries": 2}).snapshot)


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        trio.run(open_store(f"fsspec+local://{tmp_path}/none").snapshot)


def test_an_option_that_the_file_system_does_not_have_is_told(server: Sftp) -> None:
    store = open_store(f"{server.url}/bert", options(server, colour="red"))
    with pytest.raises(BadAnswer, match="check the URL and the options"):
        trio.run(store.snapshot)


@pytest.mark.parametrize(
    ("url", "given", "text"),
    [
        ("fsspec+nothing://x", {}, "fsspec knows no protocol 'nothing'"),
        ("fsspec+dropbox://x", {}, "install what fsspec needs for dropbox"),
        ("fsspec+zip://a::file:///x.zip", {}, "write fsspec+PROTOCOL://PATH"),
        ("fsspec+memory://x", {"asynchronous": True}, "is not for the configuration"),
        ("fsspec+memory://x", {"nested": {"a": "s3cret"}}, "must be text, a number, true or false"),
        ("fsspec+memory://x", {"max_entries": 0}, "'max_entries' must be positive"),
    ],
)
def test_mistakes_are_config_errors(url: str, given: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("+", r"\+")) as caught:
        open_store(url, given)
    assert "s3cret" not in str(caught.value)
