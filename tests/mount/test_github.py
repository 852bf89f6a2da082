"""Releases through a real mount: links that expire while they are read, and files in parts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from modelfs.types import BLOCK
from tests.mount.harness import mounted
from tests.releases import Releases

REPO = "org/repo"
TOKEN = "ghp_modelfsTestToken"
WEIGHTS = random.Random(5).randbytes(4 * BLOCK + 12_345)
CUTS = (0, BLOCK + 7, 2 * BLOCK, len(WEIGHTS))
DIGEST = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"


@pytest.fixture
def releases() -> Iterator[Releases]:
    with Releases(token=TOKEN) as server:
        yield server


def environment(releases: Releases) -> dict[str, str]:
    return {"GITHUB_API_URL": releases.url, "GITHUB_TOKEN": TOKEN}


def test_links_that_expire_in_the_middle_of_a_file_go_unnoticed(
    releases: Releases, place: Path, transport: str
) -> None:
    releases.publish(REPO, "v1", {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    releases.expire_after = 2
    source = f"github://{REPO}@v1"
    with mounted(place, sources={"m": source}, env=environment(releases), transport=transport) as mount:
        found = mount.python(DIGEST, str(mount.path / "m/model.safetensors"))
        assert found.strip() == sha256(WEIGHTS).hexdigest()
        assert (mount.path / "m/config.json").read_bytes() == b"{}"
        assert TOKEN not in mount.log.read_text()
    statuses = [status for _, _, status in releases.contents]
    assert 618 in statuses
    assert 400 not in statuses  # no token was sent there


def test_a_split_file_is_read_as_one(releases: Releases, place: Path, transport: str) -> None:
    parts = {
        f"w.gguf.part-a{letter}": WEIGHTS[start:stop]
        for letter, start, stop in zip("abc", CUTS, CUTS[1:], strict=False)
    }
    releases.publish(REPO, "v1", {**parts, "gap.bin.001": b"1", "gap.bin.003": b"3"})
    sources = {"all": f"github://{REPO}", "one": f"github://{REPO}@v1/w.gguf"}
    with mounted(place, sources=sources, env=environment(releases), transport=transport) as mount:
        assert [path.name for path in (mount.path / "all").iterdir()] == ["w.gguf"]
        assert [path.name for path in (mount.path / "one").iterdir()] == ["w.gguf"]
        with (mount.path / "one/w.gguf").open("rb") as file:  # across the first joint, within one block
            file.seek(CUTS[1] - 5)
            assert file.read(10) == WEIGHTS[CUTS[1] - 5 : CUTS[1] + 5]
        assert mount.python(DIGEST, str(mount.path / "all/w.gguf")).strip() == sha256(WEIGHTS).hexdigest()


def test_releases_can_be_named_on_demand(releases: Releases, place: Path, transport: str) -> None:
    releases.publish(REPO, "v1", {"config.json": b"1"})
    releases.publish(REPO, "v2", {"config.json": b"2"})
    releases.publish("other/repo", "v1", {"config.json": b"3"})
    config = "namespaces: [github/org]\n"
    with mounted(place, config=config, env=environment(releases), transport=transport) as mount:
        root = mount.path / "github"
        assert (root / "org/repo/v1/config.json").read_bytes() == b"1"
        assert (root / "org/repo/latest/config.json").read_bytes() == b"2"
        assert not (root / "org/repo/v3").exists()
        asked = len(releases.log)
        for absent in ("other/repo/v1", "org/repo/v1@v2", "org/repo@v1", "org/../other"):
            assert not (root / absent / "config.json").exists()
        assert len(releases.log) == asked
