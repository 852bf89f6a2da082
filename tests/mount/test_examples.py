"""examples/modelfs.yaml mounts a model from each store; the servers are those of the stores' own tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from modelfs.stores import SCHEMES, scheme_of
from modelfs.testing.hub import HubServer
from modelfs.testing.s3 import S3Server
from tests.archives.packing import tarred
from tests.kaggle import Kaggle
from tests.mount.harness import Mounted, mounted
from tests.origin import Origin
from tests.releases import Releases
from tests.stores.azurite import azurite
from tests.stores.gcs import gcs
from tests.stores.registry import Repository, docker_registry
from tests.stores.sftp_server import PASSWORD, sftp
from tests.stores.tracking import shared

EXAMPLE = Path(__file__).parents[2] / "examples" / "modelfs.yaml"

FILE = "model.safetensors"


def content(name: str) -> bytes:
    """Return what `FILE` holds in the model `name`."""
    return random.Random(name).randbytes(300_000)


class Site:
    """What the example needs of the world: `env` leads to it, and `text` is the example with its hosts."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.env: dict[str, str] = {}
        self.text = EXAMPLE.read_text()
        self.directory = directory
        self.stack = stack

    def put(self, old: str, new: str) -> None:
        assert old in self.text
        self.text = self.text.replace(old, new)


def hub(site: Site, files: Mapping[str, bytes]) -> None:
    server = site.stack.enter_context(HubServer())
    server.add("ProsusAI/finbert", dict(files))
    server.add("ElKulako/cryptobert", {FILE: content("cryptobert")})  # which the bucket does not have
    site.env |= server.env()


def s3(site: Site, files: Mapping[str, bytes]) -> None:
    server = site.stack.enter_context(S3Server())
    client = server.client()
    client.create_bucket(Bucket="your-mlops-bucket")
    for path, data in files.items():
        client.put_object(Bucket="your-mlops-bucket", Key=f"heart-disease-models/{path}", Body=data)
    site.env |= server.env()


def github(site: Site, files: Mapping[str, bytes]) -> None:
    server = site.stack.enter_context(Releases())
    assets = {"twitter-roberta-v1.0.0.tar.gz": tarred(files, "w:gz")}
    server.publish("mikeepley2/crypto-data-collection", "v1.0.0", assets)
    site.env["GITHUB_API_URL"] = server.url


def oci(site: Site, files: Mapping[str, bytes]) -> None:
    pushed = Repository("team/sentiment")
    title = "org.opencontainers.image.title"
    pushed.manifest(
        "v1", [pushed.blob(data, "application/octet-stream", {title: path}) for path, data in files.items()]
    )
    url = site.stack.enter_context(docker_registry(site.directory))
    pushed.push(url)
    site.put("registry.example.com", url.split("/")[2])


def gs(site: Site, files: Mapping[str, bytes]) -> None:
    server = site.stack.enter_context(gcs())
    for path, data in files.items():
        server.put(f"forecasts/{path}", data)
    site.env["STORAGE_EMULATOR_HOST"] = server.url


def az(site: Site, files: Mapping[str, bytes]) -> None:
    server = site.stack.enter_context(azurite())
    for path, data in files.items():
        server.put(f"vision/{path}", data)
    site.env["AZURE_STORAGE_CONNECTION_STRING"] = server.connection_string


def mlflow(site: Site, files: Mapping[str, bytes]) -> None:
    server = shared()
    model, root = server.logged_model("fraud", server.run()[0])
    server.upload(root, files)
    server.register("fraud-detector", model, alias="champion")
    site.env["MLFLOW_TRACKING_URI"] = server.url


def kaggle(site: Site, files: Mapping[str, bytes]) -> None:
    server = site.stack.enter_context(Kaggle())
    server.versions["google/bert/pyTorch/base"] = [dict(files)]
    site.env["KAGGLE_API_ENDPOINT"] = server.url


def web(site: Site, files: Mapping[str, bytes]) -> None:
    server = site.stack.enter_context(Origin(dict(files)))
    site.put("https://models.example.com/churn/", server.url)


def over_ssh(site: Site, files: Mapping[str, bytes]) -> None:
    root = site.directory / "sftp"
    write(root / "srv/models/ocr", files)
    server = site.stack.enter_context(sftp(root, site.directory))
    site.put("fsspec+sftp://reader@sftp.example.com", server.url)
    site.env |= {"FSSPEC_SFTP_PASSWORD": PASSWORD, "FSSPEC_SFTP_KNOWN_HOSTS": str(server.known_hosts)}


def directory(site: Site, files: Mapping[str, bytes]) -> None:
    write(site.directory / "srv", files)
    site.put("/srv/models/house-prices", str(site.directory / "srv"))


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir(parents=True)
    for path, data in files.items():
        (directory / path).write_bytes(data)


SITES: Mapping[str, Callable[[Site, Mapping[str, bytes]], None]] = {
    "finbert": hub,
    "heart-disease": s3,
    "twitter-roberta": github,
    "sentiment": oci,
    "forecasts": gs,
    "vision": az,
    "fraud": mlflow,
    "bert": kaggle,
    "churn": web,
    "ocr": over_ssh,
    "house-prices": directory,
}


@pytest.fixture
def mount(place: Path) -> Iterator[Mounted]:
    with ExitStack() as stack:
        site = Site(place, stack)
        for name, make in SITES.items():
            make(site, {FILE: content(name), "config.json": b"{}"})
        with mounted(place, config=site.text, env=site.env, transport="kernel") as own:
            yield own


def test_the_example_mounts_a_model_from_each_store(mount: Mounted) -> None:
    found = mount.run("sh", "-c", f"cd {mount.path} && sha256sum */{FILE}").stdout
    digests = {path: digest for digest, path in map(str.split, found.splitlines())}
    assert digests == {f"{name}/{FILE}": sha256(content(name)).hexdigest() for name in (*SITES, "cryptobert")}


def test_the_example_has_every_store() -> None:
    models = yaml.safe_load(EXAMPLE.read_text())["models"]
    sources = [model["source"] for model in models.values()]
    chained = [url for source in sources for url in (source if isinstance(source, list) else [source])]
    shown = {scheme_of(url).partition("+")[0] for url in chained}
    # Two names of one store, and one without a remote side.
    assert shown == {scheme.rstrip("+") for scheme in SCHEMES} - {"http", "docker", "mock"}
