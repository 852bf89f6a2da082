"""What of a model is shown: filters and the link to the latest version, on a real mount."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelfs.testing.s3 import S3Server
from tests.mount.harness import Mounted, Reader, eventually, mounted, open_directory

CONFIG = """
models:
  sdxl:
    source: s3://models/sdxl/
    exclude: ["*.md"]
    formats: production
  heart: s3://models/heart/
  fixed: {source: s3://models/heart/, latest: v1.0.0}
  local: {source: "s3://models/sdxl/", include: "unet/"}
"""
SDXL = (
    "README.md",
    "model_index.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.bin",
)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.client().create_bucket(Bucket="models")
        for name in SDXL:
            put(server, f"sdxl/{name}", name)
        put_versions(server)
        yield server


@pytest.fixture(scope="module")
def mount(s3: S3Server, transport: str) -> Iterator[Mounted]:
    with (
        open_directory() as place,
        mounted(place, "--refresh", "0", config=CONFIG, env=s3.env(), transport=transport) as own,
    ):
        yield own


def put(s3: S3Server, key: str, text: str) -> None:
    s3.client().put_object(Bucket="models", Key=key, Body=text.encode())


def put_versions(s3: S3Server) -> None:
    """Put three versions, and nothing else, under ``heart/``."""
    for version in ("v1.0.0", "v1.9.0", "v1.10.0"):
        put(s3, f"heart/{version}/best_model.pkl", version * 1000)
    s3.client().delete_object(Bucket="models", Key="heart/v2.0.0/best_model.pkl")


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_only_what_the_filters_let_through_is_there(mount: Mounted) -> None:
    shown = {name for name in SDXL if not name.endswith(("unet/diffusion_pytorch_model.bin", ".md"))}
    assert files(mount.path / "sdxl") == shown
    assert files(mount.path / "local") == {name for name in SDXL if name.startswith("unet/")}
    assert not (mount.path / "sdxl" / "unet" / "diffusion_pytorch_model.bin").exists()
    models = {model["name"]: model for model in mount.status()["models"]}
    assert (models["sdxl"]["files"], models["sdxl"]["hidden"], models["heart"]["hidden"]) == (4, 2, 0)
    assert "sdxl: 2 files of the store hidden by its filters" in mount.cli("status", str(mount.path)).stdout


def test_latest_leads_to_the_highest_version_and_old_ones_stay_readable(mount: Mounted, s3: S3Server) -> None:
    put_versions(s3)
    mount.cli("refresh", str(mount.path))
    heart = mount.path / "heart"
    assert os.readlink(heart / "latest") == "v1.10.0"
    assert os.readlink(mount.path / "fixed" / "latest") == "v1.0.0"
    code = "f = open(sys.argv[1]); step(f.read(7)); f.seek(0); step(f.read())"
    with Reader(code, heart / "latest" / "best_model.pkl") as reader:
        assert reader.said() == "v1.10.0"
        put(s3, "heart/v2.0.0/best_model.pkl", "v2.0.0" * 1000)
        for version in ("v1.9.0", "v1.10.0"):
            s3.client().delete_object(Bucket="models", Key=f"heart/{version}/best_model.pkl")
        mount.cli("refresh", str(mount.path), "heart")
        eventually(lambda: os.readlink(heart / "latest") == "v2.0.0")
        assert (heart / "latest" / "best_model.pkl").read_text() == "v2.0.0" * 1000
        assert not (heart / "v1.10.0").exists()
        reader.go_on()
        assert reader.said() == "v1.10.0" * 1000


def test_the_store_says_which_version_is_the_latest_also_after_a_restart(
    place: Path, s3: S3Server, transport: str
) -> None:
    put(s3, "liver/v1.9.0/best_model.pkl", "x")
    put(s3, "liver/v1.10.0/best_model.pkl", "x")
    put(s3, "liver/LATEST", "v1.9.0\n")
    sources = {"liver": "s3://models/liver/"}
    with mounted(place, sources=sources, env=s3.env(), transport=transport) as mount:
        assert os.readlink(mount.path / "liver" / "latest") == "v1.9.0"
    s3.stop()
    try:
        with mounted(place, sources=sources, env=s3.env(), transport=transport) as mount:
            assert os.readlink(mount.path / "liver" / "latest") == "v1.9.0"
    finally:
        s3.start()
