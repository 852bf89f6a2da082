"""file:// stores: what is listed, what is refused, what happens when files change."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from modelfs.errors import AccessDenied, ConfigError, NotFound, Stale
from modelfs.stores import Store, open_store
from modelfs.stores.file import path_of, url_of
from modelfs.testing import read_span
from modelfs.types import Entry, Snapshot, Span


def store_at(path: Path) -> Store:
    return open_store(url_of(path))


def listing(path: Path) -> Snapshot:
    return trio.run(store_at(path).snapshot)


def test_the_version_is_the_token_that_the_location_carries(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    os.utime(tmp_path / "a", ns=(0, 1_700_000_000_123_456_789))
    entry = listing(tmp_path).entries["a"]
    status = os.stat(tmp_path / "a")
    assert entry.version == f"{status.st_dev}:{status.st_ino}:7:1700000000123456789"
    assert entry.mtime == status.st_mtime
    location = trio.run(store_at(tmp_path).locate, entry)
    assert (location.token, path_of(location.url)) == (entry.version, tmp_path / "a")


def test_empty_directories_are_entries(tmp_path: Path) -> None:
    (tmp_path / "logs" / "old").mkdir(parents=True)
    assert listing(tmp_path).entries["logs/old"].kind == "directory"


def test_an_empty_directory_is_an_empty_model(tmp_path: Path) -> None:
    assert not listing(tmp_path).entries


def change_content(file: Path) -> None:
    file.write_bytes(b"longer than before")


def replace_by_same_bytes(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(0, file.stat().st_mtime_ns))
    other.replace(file)


def turn_into_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def turn_into_link_outside(file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    "change",
    [change_content, replace_by_same_bytes, Path.unlink, turn_into_directory, turn_into_link_outside],
)
def test_a_changed_file_is_stale(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"content")
    store = store_at(tmp_path)
    before = trio.run(store.snapshot)
    location = trio.run(store.locate, before.entries["a"])
    change(file)
    with pytest.raises(Stale, match="refresh the model"):
        trio.run(store.locate, before.entries["a"])
    with pytest.raises(Stale):
        trio.run(read_span, location, Span(0, 7))
    assert trio.run(store.snapshot).revision != before.revision


def test_links_inside_are_followed(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_bytes(b"weights")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "model.bin").symlink_to("../blobs/abc")
    (tmp_path / "absolute").symlink_to(blobs / "abc")
    (tmp_path / "latest").symlink_to("snapshots")
    snapshot = listing(tmp_path)
    assert not snapshot.rejected
    blob = snapshot.entries["blobs/abc"]
    for path in ("snapshots/model.bin", "absolute"):
        entry = snapshot.entries[path]
        assert (entry.kind, entry.size, entry.version) == ("file", 7, blob.version)
        location = trio.run(store_at(tmp_path).locate, entry)
        assert trio.run(read_span, location, Span(0, 7)) == b"weights"
    assert (snapshot.entries["latest"].kind, snapshot.entries["latest"].target) == ("symlink", "snapshots")


def test_loops_of_links_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "self").symlink_to("self")
    snapshot = listing(tmp_path)
    assert snapshot.entries["sub/up"].target == ".."
    assert snapshot.entries["here"].target == "."
    assert [path for path, _ in snapshot.rejected] == ["self"]


def test_links_that_leave_are_rejected(tmp_path: Path) -> None:
    root = tmp_path / "model"
    root.mkdir()
    (tmp_path / "model-secret").write_bytes(b"a neighbour whose name begins like the model's")
    (root / "passwd").symlink_to("/etc/passwd")
    (root / "etc").symlink_to("/etc")
    (root / "neighbour").symlink_to("../model-secret")
    (root / "chain").symlink_to("passwd")
    snapshot = listing(root)
    assert not snapshot.entries
    leaves = "the symbolic link leaves the directory"
    assert snapshot.rejected == tuple((name, leaves) for name in ("chain", "etc", "neighbour", "passwd"))


def test_a_dangling_link_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nothing")
    assert listing(tmp_path).rejected == (("gone", "it cannot be read: No such file or directory"),)


def test_what_is_no_file_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link-to-fifo").symlink_to("fifo")
    monkeypatch.chdir(tmp_path)  # the path of a socket is limited to 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        snapshot = listing(tmp_path)
    assert not snapshot.entries
    odd = "it is neither a regular file nor a directory"
    assert snapshot.rejected == (("fifo", odd), ("link-to-fifo", odd), ("socket", odd))


def test_hostile_names_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a\nb").write_bytes(b"")
    snapshot = listing(tmp_path)
    assert not snapshot.entries
    assert snapshot.rejected == (("a\nb", "it holds a control character"),)


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\xfe%41"
    with open(raw, "wb") as file:
        file.write(b"bytes")
    path = os.fsdecode(b"\xff\xfe%41")
    store = store_at(tmp_path)
    snapshot = trio.run(store.snapshot)
    assert Snapshot.from_json(snapshot.to_json()) == snapshot
    location = trio.run(store.locate, snapshot.entries[path])
    assert trio.run(read_span, location, Span(0, 5)) == b"bytes"
    assert list(listing(Path(os.fsdecode(raw))).entries) == [path]


def test_a_single_file_is_a_model_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "v1.gguf").write_bytes(b"weights")
    (tmp_path / "current.gguf").symlink_to("v1.gguf")
    assert list(listing(tmp_path / "current.gguf").entries) == ["current.gguf"]


def test_a_single_pipe_is_rejected_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert [path for path, _ in listing(tmp_path / "fifo").rejected] == ["fifo"]


def test_the_root_may_be_a_link_that_is_switched(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "name").write_text(version)
    link = tmp_path / "current"
    link.symlink_to("v1")
    store = store_at(link)
    old = trio.run(store.snapshot)
    link.unlink()
    link.symlink_to("v2")
    new = trio.run(store.snapshot)
    assert old.revision != new.revision
    location = trio.run(store.locate, new.entries["name"])
    assert trio.run(read_span, location, Span(0, 2)) == b"v2"
    with pytest.raises(Stale):
        trio.run(store.locate, old.entries["name"])


@pytest.mark.parametrize("name", ["missing", "file/below"])
def test_a_missing_root_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotFound, match="check the path"):
        listing(tmp_path / name)


def refuse(path: Any) -> Any:
    raise PermissionError(13, "Permission denied", path)


def test_an_unreadable_root_is_access_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "scandir", refuse)  # root reads everything: only the system call can refuse
    with pytest.raises(AccessDenied, match="let the daemon's user read it"):
        listing(tmp_path)


def test_an_unreadable_subdirectory_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a").write_bytes(b"")
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if "lost" in str(path) else real(path))
    snapshot = listing(tmp_path)
    assert snapshot.entries["a"]
    assert snapshot.rejected == (("lost+found", "it cannot be read: Permission denied"),)


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("file://server/models", "names the host 'server'"),
        ("file://models", "names the host 'models'"),
        ("file://", "no absolute path"),
        ("file:///a%00b", "no absolute path"),
        ("file:///a?b", "%3F"),
        ("file:///a#b", "%23"),
        ("file://[/x", "malformed"),
    ],
)
def test_a_bad_url_is_a_config_error(url: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        open_store(url)


def test_an_unknown_option_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="unknown option 'recursive'; accepted are: none"):
        open_store("file:///srv", {"recursive": True})


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("file://localhost/srv/models/", "file:///srv/models"),
        ("FILE:///srv/m%C3%B6del", "file:///srv/m%C3%B6del"),
        ("file:///srv/mödel x", "file:///srv/m%C3%B6del%20x"),
        ("file:///", "file:///"),
    ],
)
def test_urls_have_one_canonical_form(url: str, canonical: str) -> None:
    assert open_store(url).url == canonical


def test_a_location_never_leads_outside(tmp_path: Path) -> None:
    root = tmp_path / "model"
    root.mkdir()
    outside = tmp_path / "secret"
    outside.write_bytes(b"")
    version = listing(tmp_path).entries["secret"].version
    with pytest.raises(Stale):
        trio.run(store_at(root).locate, Entry("../secret", 0, version))
