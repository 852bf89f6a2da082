"""The stores of Azure Blob Storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from modelfs.stores import open_store
from tests.stores.azurite import ACCOUNT, CONTAINER, KEY, azurite
from tests.stores.case import FILES, Case, Opened


@contextmanager
def container(directory: Path, *, path: str, files: dict[str, bytes], by: str = "key") -> Iterator[Opened]:
    with azurite() as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AZURE_CONFIG_DIR", str(directory))
        for key in ("outside/x", "bert-other/x", "bert.txt"):
            server.put(key, b"not of this model")
        for name, data in files.items():
            server.put(f"{path.rpartition('/')[0]}/{name}", data)
        options: dict[str, object] = {"endpoint": server.url}
        match by:
            case "key":
                environment.setenv("AZURE_STORAGE_CONNECTION_STRING", server.connection_string)
                options = {}
            case "sas":
                environment.setenv("AZURE_STORAGE_SAS_TOKEN", server.sas())
            case "public":
                server.container.set_container_access_policy({}, public_access="container")
                options["anonymous"] = True
        yield open_store(f"az://{ACCOUNT}/{CONTAINER}/{path}", options), files


def case(path: str, **how: object) -> Callable[[Path], object]:
    return partial(container, path=path, **{"files": FILES, **how})


CASES = [
    Case("az", case("bert/"), secrets=(KEY,)),
    Case("az-sas", case("bert/large/", by="sas"), secrets=("sig=",)),
    Case("az-public", case("bert/", by="public")),
    Case("az-one-blob", case("bert/model.bin", files={"model.bin": b"x" * 100}), secrets=(KEY,)),
]
