"""Many names: what it costs to mount, list and look at a model of 100,000 files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.harness import mounted, open_directory

COUNTS = {"kernel": 100_000, "pyfuse3": 10_000}
"""Files by transport: a listing is assembled in the same way for both."""
LOOK = """
import json, os, sys
names = sizes = 0
for entry in list(os.scandir(sys.argv[1])):
    names += 1
    sizes += entry.stat().st_size
print(json.dumps([names, sizes]))
"""


@pytest.fixture
def many(transport: str) -> Iterator[str]:
    """The URL of a directory of as many empty files, and one in a directory below."""
    with open_directory() as source:
        for number in range(COUNTS[transport]):
            os.close(os.open(source / f"shard-{number:06}.safetensors", os.O_CREAT | os.O_WRONLY))
        (source / "onnx").mkdir()
        (source / "onnx" / "model.onnx").write_bytes(b"weights")
        yield f"file://{source}"


def test_many_files_are_listed_without_a_request_for_each(place: Path, transport: str, many: str) -> None:
    cache, files = place / "cache", COUNTS[transport]
    for start in ("cold", "warm"):
        with mounted(place, "--refresh", "0", sources={"m": many}, transport=transport, cache=cache) as mount:
            asked = mount.requests()
            assert json.loads(mount.python(LOOK, str(mount.path / "m"))) == [files + 1, 0]
            assert (mount.path / "m" / "onnx" / "model.onnx").stat().st_size == 7
            assert mount.requests() == asked
            requests = mount.metric("modelfs_fuse_requests_total")
            assert requests < files / 10, f"{start}: {requests:.0f} requests"
            model = mount.status()["models"][0]
            assert (model["files"], model["size"]) == (files + 1, 7)
