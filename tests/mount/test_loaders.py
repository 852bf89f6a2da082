"""Unmodified loaders read mounted models from every kind of store: first, again, and with the store gone."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from modelfs.testing.hub import HubServer
from modelfs.testing.s3 import S3Server
from tests import zoo as models_of
from tests.mount import harness, loaders
from tests.mount.harness import Mounted, mounted, open_directory

REPOSITORY = Path(__file__).parents[2]
NAMES = [load.__name__ for load in loaders.LOADERS]
EVERY_LOADER = pytest.mark.parametrize("loader", NAMES)

Loads = Mapping[str, str]
"""Loader → fingerprint of what it loaded, or why it failed."""


@dataclass(frozen=True)
class Store:
    """A store that holds the zoo: where each model is, what the daemon must know, how to switch it off."""

    sources: Mapping[str, str]
    env: Mapping[str, str]
    switch_off: Callable[[], None]


@contextmanager
def directories(zoo: Path) -> Iterator[Store]:
    with open_directory() as parent:
        origin = parent / "origin"
        shutil.copytree(zoo, origin)
        sources = {name: (origin / name).as_uri() for name in models_of.MODELS}
        yield Store(sources, {}, lambda: os.rename(origin, parent / "gone"))


@contextmanager
def s3(zoo: Path) -> Iterator[Store]:
    with S3Server() as server:
        server.client().create_bucket(Bucket="zoo")
        for file in files_of(zoo):
            server.put_file("zoo", str(file), zoo / file)
        sources = {name: f"s3://zoo/{name}/" for name in models_of.MODELS}
        yield Store(sources, server.env(), server.stop)


@contextmanager
def hub(zoo: Path) -> Iterator[Store]:
    with HubServer() as server:
        for name in models_of.MODELS:
            server.add(f"zoo/{name}", {str(f): zoo / name / f for f in files_of(zoo / name)})
        sources = {name: f"hf://zoo/{name}@main" for name in models_of.MODELS}
        yield Store(sources, server.env(), server.stop)


STORES = {"file": directories, "s3": s3, "hf": hub}


def files_of(directory: Path) -> list[Path]:
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def load_all(directory: Path, user: str | None = None) -> Loads:
    """Run every loader on `directory`, in one process and with an empty home."""
    program, variables = harness.interpreter(user)
    with open_directory() as home:
        if user:
            shutil.chown(home, user)
        variables = {
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "2",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), variables.get("PYTHONPATH")])),
        }
        command = [program, "-W", "ignore", "-m", "tests.mount.loaders", str(directory)]
        result = harness.read_by(*command, user=user, check=False, env=variables)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    done = {line["loader"]: line.get("loaded") or line["failed"] for line in lines}
    return {
        name: done.get(name, f"ended with {result.returncode}: {result.stderr[-2000:]}") for name in NAMES
    }


@pytest.fixture(scope="module")
def expected(zoo: Path) -> Loads:
    """What the loaders find in the original directories."""
    return load_all(zoo)


@dataclass(frozen=True)
class Runs:
    """The loaders on one mount: with an empty cache; then as another user, mounted anew, the store off."""

    first: Loads
    fetched: int
    offline: Loads
    offline_requests: int


MOUNTS = [("file", "kernel"), ("s3", "kernel"), ("hf", "pyfuse3")]
"""Every store and every transport; not every pair, for a store does not see the transport."""


@pytest.fixture(scope="module", params=MOUNTS, ids="-".join)
def runs(request: pytest.FixtureRequest, zoo: Path) -> Iterator[Runs]:
    kind, transport = request.param
    with open_directory() as place, STORES[kind](zoo) as store:

        def mount() -> AbstractContextManager[Mounted]:
            return mounted(place, "--allow-other", sources=store.sources, env=store.env, transport=transport)

        with mount() as first_mount:
            first = load_all(first_mount.path)
            # What no loader read is cached too from here on.
            first_mount.run("tar", "-cf", "/dev/null", str(first_mount.path))
            fetched = first_mount.fetched()
        store.switch_off()
        with mount() as second_mount:
            second = load_all(second_mount.path, user="nobody")
            yield Runs(first, fetched, second, second_mount.requests())


def test_the_page_about_loaders_names_every_loader_that_is_run() -> None:
    page = (REPOSITORY / "docs" / "loaders.md").read_text()
    assert re.findall(r"\| `(\w+)` \|$", page, re.MULTILINE) == NAMES


@EVERY_LOADER
def test_a_loader_finds_what_it_finds_on_a_disk(loader: str, runs: Runs, expected: Loads) -> None:
    assert runs.first[loader] == expected[loader]


@EVERY_LOADER
def test_another_user_loads_the_same_after_a_remount_without_the_store(
    loader: str, runs: Runs, expected: Loads
) -> None:
    assert runs.offline[loader] == expected[loader]


def test_loading_again_asks_the_store_for_nothing(runs: Runs) -> None:
    assert runs.offline_requests == 0


def test_little_is_fetched_twice(runs: Runs, zoo: Path) -> None:
    # Pieces that a reader waits for may come past a range that brings them later.
    assert 0 < runs.fetched <= 1.1 * sum((zoo / file).stat().st_size for file in files_of(zoo))


def test_a_file_that_is_opened_again_is_read_by_the_kernel_alone(
    zoo: Path, place: Path, transport: str
) -> None:
    sources = {"bert": (zoo / "bert").as_uri()}
    with mounted(place, "--allow-other", sources=sources, transport=transport) as mount:
        file = str(mount.path / "bert" / "model.safetensors")
        size = os.path.getsize(zoo / "bert" / "model.safetensors")
        mount.run("cksum", file)
        first = mount.status()["reads"]["bytes"]
        assert first >= size
        mount.run("cksum", file, user="nobody")
        # The kernel may have given up a few pages; without keep_cache it gives up all.
        assert mount.status()["reads"]["bytes"] - first < size / 10


FAULT = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(hashlib.sha256(mapped[:4096]).hexdigest(), flush=True)
sys.stdin.readline()
print(hashlib.sha256(mapped[-4096:]).hexdigest(), flush=True)
"""


def test_a_page_fault_waits_for_a_store_that_comes_back(place: Path, transport: str) -> None:
    data = random.Random(2).randbytes(96 << 20)
    with S3Server() as server:
        server.client().create_bucket(Bucket="slow")
        (place / "file").write_bytes(data)
        server.put_file("slow", "m/tensors.dat", place / "file")  # not fetched ahead as weights are
        with mounted(place, sources={"m": "s3://slow/m/"}, env=server.env(), transport=transport) as mount:
            command = [sys.executable, "-c", FAULT, str(mount.path / "m" / "tensors.dat")]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as reader:
                assert reader.stdout is not None
                assert reader.stdout.readline().strip() == hashlib.sha256(data[:4096]).hexdigest()
                server.stop()
                assert reader.stdin is not None
                reader.stdin.write("go\n")
                reader.stdin.flush()
                end = time.monotonic() + harness.DEADLINE
                while not mount.status()["fetch"]["retries"]:
                    assert time.monotonic() < end, "the daemon does not try again"
                assert reader.poll() is None
                server.start()
                out, _ = reader.communicate(timeout=harness.DEADLINE)
            assert out.strip() == hashlib.sha256(data[-4096:]).hexdigest()
            assert reader.returncode == 0
