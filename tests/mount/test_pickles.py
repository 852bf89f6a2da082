"""What a model's policy lets readers open: pickles that would import more than is known to be harmless."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mount.harness import Mounted, eventually, mounted, open_directory


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    with open_directory() as root:
        (root / "evil.pkl").write_bytes(pickle.dumps([1, Evil()]))
        torch.save({"w": torch.ones(1000), "x": Evil()}, root / "pytorch_model.bin")
        torch.save({"w": torch.ones(1000)}, root / "weights.pt")
        (root / "plain.pkl").write_bytes(pickle.dumps({"a": [1.5]}))
        (root / "raw.bin").write_bytes(bytes(20_000))
        (root / "config.json").write_text("{}")
        yield root


@pytest.fixture(scope="module")
def mount(original: Path, transport: str) -> Iterator[Mounted]:
    with open_directory() as place:
        config = f"""
pickles: deny
models:
  denied: {original.as_uri()}
  warned: {{source: {original.as_uri()}, pickles: warn}}
  allowed: {{source: {original.as_uri()}, pickles: allow}}
"""
        with mounted(place, config=config, transport=transport) as own:
            own.allowed_errors.append("AccessDenied")
            yield own


READ = """
import json, os, sys
found = {}
for name in sorted(os.listdir(sys.argv[1])):
    try:
        with open(os.path.join(sys.argv[1], name), "rb") as file:
            found[name] = len(file.read())
    except OSError as error:
        found[name] = -error.errno
print(json.dumps(found))
"""


def read_all(mount: Mounted, model: str) -> dict[str, int]:
    found: dict[str, int] = json.loads(mount.python(READ, str(mount.path / model)))
    return found


def sizes(original: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(original.iterdir())}


SUSPICIOUS = ("evil.pkl", "pytorch_model.bin")


def report(mount: Mounted, model: str) -> dict[str, Any]:
    return next(row for row in mount.status()["models"] if row["name"] == model)


def test_deny_refuses_what_would_import_more_than_is_harmless(mount: Mounted, original: Path) -> None:
    refused = dict.fromkeys(SUSPICIOUS, -errno.EACCES)
    for _ in range(2):  # also when it is in the cache
        assert read_all(mount, "denied") == {**sizes(original), **refused}
    found = report(mount, "denied")
    assert found["pickles"] == "deny"
    assert set(found["suspicious"]) == set(SUSPICIOUS)
    assert all("posix.system" in why for why in found["suspicious"].values())
    assert "evil.pkl" in mount.cli("status", str(mount.path)).stdout
    log = mount.log.read_text()
    assert log.count("'evil.pkl' is a suspicious pickle: it imports posix.system") == 1


def test_warn_lets_it_be_read_and_says_so(mount: Mounted, original: Path) -> None:
    assert read_all(mount, "warned") == sizes(original)
    eventually(lambda: set(report(mount, "warned")["suspicious"]) == set(SUSPICIOUS))


def test_allow_lets_everything_be_read(mount: Mounted, original: Path) -> None:
    assert read_all(mount, "allowed") == sizes(original)


def test_an_attribute_says_what_a_pickle_would_import(mount: Mounted) -> None:
    read_all(mount, "denied")
    expected = {"evil.pkl": "it imports posix.system", "plain.pkl": "harmless", "weights.pt": "harmless"}
    for name, said in expected.items():
        assert os.getxattr(mount.path / "denied" / name, "user.modelfs.pickle").decode() == said
    with pytest.raises(OSError, match="No data"):
        os.getxattr(mount.path / "denied" / "config.json", "user.modelfs.pickle")
