"""What readers can name in the on-demand namespaces: allowed models, and never where to ask for them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from modelfs.namespaces import permits
from modelfs.testing.hub import HubServer
from modelfs.testing.s3 import S3Server
from tests.mount.harness import Mounted, alone, mounted, open_directory

FOUND = ("hf/org/name", "hf/org/name@main", "hf/org/other", "hf/good/bert-base", "s3/models-a")
REFUSED = ("hf/good/gpt", "hf/evil/name", "hf/name", "hf/datasets/name", "s3/private", "s3/models-a-backup")
HOSTILE = (
    "hf/org@main/name",
    "hf/org/name@a@b",
    "hf/org/name@refs%2fpr%2f1",
    "hf/org/..%2f..%2fapi",
    "hf/org/%2e%2e",
    "hf/org/a--b",
    "hf/org/name.git",
    "hf/org/na\nme",
    "hf/org/na me",
    "hf/org/name?x=1",
    "hf/org/name#x",
    "hf/org/-rf",
    "hf/org/.hidden",
    "hf/org/\xff\udc80",
    "hf/org/" + "n" * 1000,
    "s3/models-" + "n" * 1000,
    "hf/127.0.0.1:80",
    "hf/me:secret@127.0.0.1",
    "s3/models-a@127.0.0.1",
    "s3/models-a:80",
    "s3/models-%2fx",
    "s3/models-\n",
    "s3/models-\\",
)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        for name in (
            "org/name",
            "org/other",
            "good/bert-base",
            "good/gpt",
            "evil/name",
            "datasets/good/name",
        ):
            server.add(name, {"config.json": b"{}"})
        yield server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        for bucket in ("models-a", "private", "models-a-backup"):
            server.client().create_bucket(Bucket=bucket)
            server.client().put_object(Bucket=bucket, Key="config.json", Body=b"{}")
        yield server


@pytest.fixture(scope="module")
def mount(hub: HubServer, s3: S3Server) -> Iterator[Mounted]:
    with open_directory() as place:
        config = "namespaces: [hf/org, hf/good/bert-*, 's3/models-?']\n"
        env = {**hub.env(), **s3.env(), **alone(place)}
        with mounted(place, config=config, env=env, transport="kernel") as own:
            yield own


@pytest.mark.parametrize("path", FOUND)
def test_what_is_allowed_is_found(path: str, mount: Mounted) -> None:
    assert (mount.path / path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("path", [*REFUSED, *HOSTILE], ids=ascii)
def test_what_is_not_allowed_is_not_there_and_nobody_is_asked(
    path: str, mount: Mounted, hub: HubServer, s3: S3Server
) -> None:
    before = len(hub.requests), len(s3.requests)
    with pytest.raises(OSError) as refused:  # noqa: PT011  # its number is looked at below
        os.stat(os.fsencode(mount.path) + b"/" + path.encode("utf-8", "surrogateescape"))
    too_long = max(len(part) for part in path.split("/")) > 255
    assert refused.value.errno == (errno.ENAMETOOLONG if too_long else errno.ENOENT)
    assert (len(hub.requests), len(s3.requests)) == before


def test_what_is_above_leads_out_of_the_mount(mount: Mounted) -> None:
    assert os.path.samefile(mount.path / "hf" / "org" / "..", mount.path / "hf")


def test_the_status_names_the_patterns(mount: Mounted) -> None:
    assert mount.status()["namespaces"] == ["hf/org", "hf/good/bert-*", "s3/models-?"]
    assert "on demand  hf/org, hf/good/bert-*, s3/models-?" in mount.cli("status", str(mount.path)).stdout


@pytest.mark.parametrize(
    ("pattern", "path", "is_permitted"),
    [
        ("hf", "hf/any/thing@v1", True),
        ("hf/org", "hf/org/x", True),
        ("hf/org", "hf/org2", False),
        ("hf/*/bert", "hf/anybody/bert", True),
        ("hf/*/bert", "hf/anybody/bert-2", False),
        ("hf/a/b", "hf/a", True),
        ("s3/m*", "hf/m", False),
        ("s3/m*", "s3/m/x", True),
    ],
)
def test_patterns(pattern: str, path: str, is_permitted: bool) -> None:
    assert permits([pattern], path) is is_permitted
