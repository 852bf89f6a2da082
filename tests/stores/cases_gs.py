"""The stores of Google Cloud Storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from modelfs.stores import open_store
from tests.stores.case import FILES, Case, Opened
from tests.stores.gcs import BUCKET, TOKEN, gcs


@contextmanager
def bucket(directory: Path, *, path: str, files: dict[str, bytes], public: bool = False) -> Iterator[Opened]:
    with gcs() as server, pytest.MonkeyPatch.context() as environment:
        for key in ("outside/x", "bert-other/x", "bert.txt"):
            server.put(key, b"not of this model")
        for name, data in files.items():
            server.put(f"{path.rpartition('/')[0]}/{name}", data)
        if not public:
            server.tokens.append(TOKEN)
            file = server.account(directory / "account.json", TOKEN)
            environment.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        options = {"endpoint": server.url, **({"anonymous": True} if public else {})}
        yield open_store(f"gs://{BUCKET}/{path}", options), files


def case(path: str, **how: object) -> Callable[[Path], object]:
    return partial(bucket, path=path, **{"files": FILES, **how})


CASES = [
    Case("gs", case("bert/"), secrets=(TOKEN,)),
    Case("gs-public", case("bert/large/", public=True)),
    Case("gs-one-object", case("bert/model.bin", files={"model.bin": b"x" * 100}), secrets=(TOKEN,)),
]
