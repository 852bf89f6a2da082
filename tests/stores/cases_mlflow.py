"""The stores of MLflow: artifacts that the server proxies, and artifacts in a bucket that it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelfs.stores.mlflow import MlflowStore
from modelfs.testing.s3 import SECRET
from tests.stores.case import FILES, Case, Opened
from tests.stores.tracking import shared

TOKEN = "mlflow-token-0123456789"

NAMED = {path: data for path, data in FILES.items() if "#" not in path}
"""MLflow refuses names with a #."""


@contextmanager
def proxied(directory: Path) -> Iterator[Opened]:
    server = shared()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
        run, _ = server.run()
        model, root = server.logged_model("bert", run)
        server.upload(root, NAMED)
        server.register("sentiment model", model, alias="champion")
        url = "mlflow://models/sentiment model@champion"
        yield MlflowStore(url, {"tracking_uri": server.url}), NAMED


@contextmanager
def bucket(directory: Path) -> Iterator[Opened]:
    server = shared()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**server.s3.env(), "AWS_CONFIG_FILE": str(directory / "none")}.items():
            environment.setenv(name, value)
        run, root = server.run(server.direct)
        server.upload(root, {**{f"model/{path}": data for path, data in FILES.items()}, "log": b""})
        yield MlflowStore(f"mlflow://runs/{run}/model", {"tracking_uri": server.url}), FILES


CASES = [
    Case("mlflow-proxied", proxied, secrets=(TOKEN,)),
    Case("mlflow-bucket", bucket, secrets=(SECRET,)),
]
