"""The stores of S3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from modelfs.stores.s3 import S3Store
from modelfs.testing.s3 import SECRET, S3Server
from tests.stores.case import FILES, Case, Opened


@contextmanager
def bucket(
    directory: Path, *, url: str, files: dict[str, bytes], versioned: bool = False
) -> Iterator[Opened]:
    with S3Server() as server, pytest.MonkeyPatch.context() as environment:
        for name, value in {**server.env(), "AWS_CONFIG_FILE": str(directory / "none")}.items():
            environment.setenv(name, value)
        client = server.client()
        client.create_bucket(Bucket="models")
        if versioned:
            client.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
        for key in ("outside/x", "bert-other/x", "bert.txt"):
            client.put_object(Bucket="models", Key=key, Body=b"not of this model")
        prefix = url.removeprefix("s3://models/").rpartition("/")[0]
        for path, data in files.items():
            client.put_object(Bucket="models", Key=f"{prefix}/{path}", Body=data, ChecksumAlgorithm="SHA256")
        yield S3Store(url, {}), files


def case(url: str, **how: object) -> Callable[[Path], object]:
    return partial(bucket, url=url, **{"files": FILES, **how})


CASES = [
    Case("s3", case("s3://models/bert/"), secrets=(SECRET,)),
    Case("s3-versioned", case("s3://models/bert/large/", versioned=True), secrets=(SECRET,)),
    Case("s3-one-object", case("s3://models/bert/model.bin", files={"model.bin": b"x" * 100})),
]
