"""Models of Kaggle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelfs.stores.kaggle import KaggleStore
from tests.kaggle import Kaggle
from tests.stores.case import FILES, Case, Opened

MODEL = "org/bert/pyTorch/base"
TOKEN = "KGAT_modelfsTestToken"  # accepted by this server only


@contextmanager
def newest(directory: Path) -> Iterator[Opened]:
    with Kaggle() as kaggle:
        kaggle.versions[MODEL] = [{"old": b"1"}, dict(FILES)]
        yield KaggleStore(f"kaggle://{MODEL}", kaggle.options), FILES


@contextmanager
def private_version(directory: Path) -> Iterator[Opened]:
    token = directory / "token"
    token.write_text(f"{TOKEN}\n")
    with Kaggle(f"Bearer {TOKEN}") as kaggle:
        kaggle.versions[MODEL] = [dict(FILES), {"new": b"2"}]
        yield KaggleStore(f"kaggle://{MODEL}/1", {**kaggle.options, "token_file": str(token)}), FILES


CASES = [Case("kaggle", newest), Case("kaggle-private-version", private_version, secrets=(TOKEN,))]
