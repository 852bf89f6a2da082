"""The models of the demo: what they are made from, which store holds them, and what loads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BUCKET = "models"
"""The bucket of the S3 server."""

STORES: Mapping[str, str] = {"hf": "a Hugging Face Hub", "s3": "an S3"}
"""Scheme → what plays it."""


@dataclass(frozen=True)
class Model:
    """One directory of the mount.

    Attributes:
        zoo: its name in ``tests.zoo``, which makes it.
        what: one line about it.
        source: URL of the store that holds it.
        loads: module of ``demo.loads`` → the call in it, as the screen names it.

    """

    zoo: str
    what: str
    source: str
    loads: Mapping[str, str]

    @property
    def scheme(self) -> str:
        """Which of `STORES` holds it."""
        return self.source.partition("://")[0]


MODELS: Mapping[str, Model] = {
    "minilm": Model(
        "minilm",
        "all-MiniLM-L6-v2 as published",
        "hf://sentence-transformers/all-MiniLM-L6-v2",
        {"sentences": "SentenceTransformer"},
    ),
    "bert": Model(
        "bert-sharded",
        "a BERT in four shards",
        f"s3://{BUCKET}/bert/",
        {"shards": "AutoModel, AutoTokenizer"},
    ),
    "heart-disease": Model(
        "sklearn",
        "a scikit-learn forest",
        f"s3://{BUCKET}/heart-disease/",
        {"pickled": "pickle.load", "mapped": "joblib.load, mapped"},
    ),
}
