"""Stores through fsspec: file systems of its own, and a real SFTP server."""

from __future__ import annotations

import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from modelfs.stores import open_store
from tests.stores.case import FILES, Case, Opened, write_tree
from tests.stores.sftp_server import PASSWORD, sftp


@contextmanager
def memory(directory: Path) -> Iterator[Opened]:
    system, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for path, data in FILES.items():
        system.pipe_file(f"{root}/bert/{path}", data)
    system.pipe_file(f"{root}/bert-other/x", b"not of this model")
    try:
        yield open_store(f"fsspec+memory:/{root}/bert/"), FILES
    finally:
        system.rm(root, recursive=True)


@contextmanager
def local(directory: Path) -> Iterator[Opened]:
    yield open_store(f"fsspec+local://{write_tree(directory / 'bert')}"), FILES


@contextmanager
def local_file(directory: Path) -> Iterator[Opened]:
    write_tree(directory, {"model.bin": b"x" * 100})
    yield open_store(f"fsspec+local://{directory}/model.bin"), {"model.bin": b"x" * 100}


@contextmanager
def archive(directory: Path) -> Iterator[Opened]:
    file = directory / "model.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as writer:
        for path, data in FILES.items():
            writer.writestr(f"bert/{path}", data)
    yield open_store("fsspec+zip://bert", {"fo": str(file)}), FILES


@contextmanager
def ssh(directory: Path) -> Iterator[Opened]:
    write_tree(directory / "root/models/bert")
    with sftp(directory / "root", directory) as server:
        options = {"password": PASSWORD, "known_hosts": str(server.known_hosts), "look_for_keys": False}
        yield open_store(f"{server.url}/models/bert", options), FILES


CASES = [
    Case("fsspec-memory", memory),
    Case("fsspec-local", local),
    Case("fsspec-local-file", local_file),
    Case("fsspec-zip", archive),
    Case("fsspec-sftp", ssh, secrets=(PASSWORD,)),
]
