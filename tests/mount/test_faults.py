"""A mounted model is read right through what breaks on the way to its store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from itertools import cycle
from pathlib import Path

import pytest

from modelfs.testing.faults import Fault, FaultProxy, of_content
from modelfs.testing.hub import TOKEN
from modelfs.types import BLOCK
from tests.faults.rig import Site, noise
from tests.mount.harness import Mounted, mounted

MODELS = ("http", "s3", "hf")
FILES = {  # its own for each model: equal digests would be one object in the cache
    f"{model}-{name}": noise(size, model + name)
    for model in MODELS
    for name, size in (("w.safetensors", 3 * BLOCK + 77), ("x.dat", BLOCK))
}
PASSING = [
    Fault("reset"),
    Fault("reset-in-body"),
    Fault("closed"),
    Fault("truncated"),
    Fault("status-503"),
    Fault("status-429"),
    Fault("silence", seconds=0.2),
]
"""All that is tried again until ``read_deadline``, or brings the reader forward each time."""

DIGESTS = """
import hashlib, pathlib, sys
for path in pathlib.Path(sys.argv[1]).glob(sys.argv[2]):
    print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site"), FILES) as own:
        yield own


@contextmanager
def behind_proxies(
    site: Site, place: Path, transport: str
) -> Iterator[tuple[Mounted, Mapping[str, FaultProxy]]]:
    """Mount one model of each network store, each behind a proxy."""
    with ExitStack() as stack:
        proxies = {kind: stack.enter_context(site.behind(kind))[0] for kind in MODELS}
        urls = {"http": f"{proxies['http'].url}/", "s3": "s3://models/", "hf": "hf://org/name"}
        sources = {f"from-{kind}": url for kind, url in urls.items()}
        endpoints = {"AWS_ENDPOINT_URL": proxies["s3"].url, "HF_ENDPOINT": proxies["hf"].url}
        env = {**site.environment(), **endpoints, "HF_TOKEN": TOKEN, "AWS_DEFAULT_REGION": "us-east-1"}
        flags = ("--refresh", "0")
        mount = stack.enter_context(mounted(place, *flags, sources=sources, env=env, transport=transport))
        yield mount, proxies


def test_a_model_is_read_right_through_everything_that_passes(
    place: Path, site: Site, transport: str
) -> None:
    with behind_proxies(site, place, transport) as (mount, proxies):
        for model, proxy in proxies.items():
            every_other = [item for fault in PASSING for item in (fault, None)]
            proxy.follow(of_content(cycle(every_other)))
            printed = mount.python(DIGESTS, str(mount.path / f"from-{model}"), f"{model}-*")
            digests = dict(line.split() for line in printed.splitlines())
            own = {path: data for path, data in FILES.items() if path.startswith(f"{model}-")}
            assert digests == {path: sha256(data).hexdigest() for path, data in own.items()}
            assert proxy.injected.total() >= 3, model


def test_corrupted_bytes_are_an_error_and_then_fetched_again(place: Path, site: Site, transport: str) -> None:
    code = "import sys\ntry: print(len(open(sys.argv[1], 'rb').read()))\nexcept OSError as e: print(e.errno)"
    with behind_proxies(site, place, transport) as (mount, proxies):
        mount.allowed_errors.append("do not have the published digest")
        proxies["hf"].follow(of_content(lambda _: Fault("corrupted")))
        assert mount.python(code, str(mount.path / "from-hf" / "hf-x.dat")).strip() == "5"  # EIO
        proxies["hf"].follow(())
        assert mount.python(code, str(mount.path / "from-hf" / "hf-x.dat")).strip() == str(BLOCK)
