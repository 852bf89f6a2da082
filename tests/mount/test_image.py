"""The image: the steps of the Dockerfile are done for real, and what they make serves a node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modelfs import __version__
from tests.debian import base_root
from tests.dockerfile import Image, built, layer, stages
from tests.mount.test_cluster_node import MODELS, daemon, reader, status
from tests.mount.test_cluster_node import machine as machine
from tests.mount.test_cluster_node import origin as origin
from tests.mount.test_handover import sha256
from tests.node import Node
from tests.origin import Origin

RECIPE = Path(__file__).parents[2] / "Dockerfile"

PYTHON = (
    "apt-get update && apt-get install -y --no-install-recommends "
    "python3-dev python3-pip python3-venv python-is-python3"
)
"""What the image ``python`` has over Debian alone, here as packages of Debian."""


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    debian = base_root()
    python = layer([("RUN", PYTHON)], [debian], RECIPE.parent)
    with built(RECIPE, {stage.image: [python, debian] for stage in stages(RECIPE.read_text())}) as own:
        yield own


def test_the_image_serves_a_node(image: Image, machine: Node, origin: Origin) -> None:
    served = daemon(machine, origin, image=image)
    served.await_ready()
    assert served.exec(*image.healthcheck).returncode == 0
    assert status(served)["modelfs"] == __version__
    assert status(served)["transport"]["name"] == "kernel"
    pod = reader(machine)
    assert pod.exec("sha256sum", f"{MODELS}/m/x.dat").stdout.split()[0] == sha256(origin.files["x.dat"])
    assert served.terminate() == 0
    assert machine.mounts() == []


def test_the_image_has_what_its_stores_need_and_no_more(image: Image, machine: Node, origin: Origin) -> None:
    served = daemon(machine, origin, image=image)
    stores = "import azure.storage.blob, google.cloud.storage, fsspec, paramiko, zstandard, pyfuse3"
    told = served.exec("python", "-c", stores)
    assert (told.returncode, told.stderr) == (0, "")
    assert served.exec("gcc", "--version").returncode != 0
    assert served.exec("touch", "/opt/modelfs/new").returncode != 0
