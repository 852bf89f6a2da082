"""What is cached is fetched ahead, kept and given up as commands say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelfs.errors import CacheError, ConfigError, NotFound
from modelfs.testing.hub import HubServer
from modelfs.types import BLOCK
from tests.mount.harness import Mounted, alone, eventually, mounted, open_directory
from tests.origin import Origin

FILES = {
    "w.bin": random.Random(1).randbytes(2 * BLOCK + 77),
    "config.json": b'{"a": 1}',
    "onnx/model.onnx": random.Random(2).randbytes(BLOCK),
    "empty": b"",
}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin(FILES) as own:
        yield own


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Mounted, Origin]]:
    with (
        Origin(FILES) as origin,
        open_directory() as place,
        mounted(place, sources={"m": origin.url}, env=alone(place)) as mount,
    ):
        yield mount, origin


@pytest.fixture
def mount(shared: tuple[Mounted, Origin]) -> Mounted:
    """A mount of which nothing is cached yet."""
    mount, origin = shared
    eventually(lambda: not gc(mount)["evicted"] and not mount.status()["cache"]["objects"])
    origin.log.clear()
    return mount


def fetch(mount: Mounted, *globs: str, model: str = "m", wait: bool = True) -> dict[str, Any]:
    return mount.client().prefetch(model, globs, lambda line: None, wait=wait)


def gc(mount: Mounted, *, dry_run: bool = False) -> dict[str, Any]:
    return mount.client().collect(0.0, dry_run=dry_run)


def cached(mount: Mounted, name: str = "m") -> int:
    (model,) = [model for model in mount.status()["models"] if model["name"] == name]
    return int(model["cached_bytes"])


def pinned(mount: Mounted) -> list[str]:
    return [model["name"] for model in mount.status()["models"] if model["pinned"]]


def names(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(row["name"] for row in rows)


# -- prefetch


def test_what_was_prefetched_needs_no_store(mount: Mounted, shared: tuple[Mounted, Origin]) -> None:
    _, origin = shared
    told: list[dict[str, Any]] = []
    answer = mount.client().prefetch("m", [], told.append, wait=True)
    assert answer == {"files": 4, "bytes": SIZE, "fetched": SIZE, "failed": []}
    assert {line["name"] for line in told} == {f"m/{name}" for name in FILES}
    assert [line["done"] for line in told] == sorted(line["done"] for line in told)
    assert (told[-1]["done"], told[-1]["total"]) == (SIZE, SIZE)
    assert cached(mount) == SIZE
    asked = len(origin.contents())
    result = mount.cli("prefetch", "m", "--wait")
    assert result.stdout == "prefetched m: 4 files, 24.0 MiB, 0 B of it fetched now\n"
    assert result.stderr == ""  # a bar is for terminals
    for name, data in FILES.items():
        assert (mount.path / "m" / name).read_bytes() == data
    assert len(origin.contents()) == asked


def test_only_some_files_are_prefetched_and_evicted(mount: Mounted) -> None:
    words = ["prefetch", "m", "--path", "onnx/", "--path", "*.json", "--wait", "--json"]
    answer = json.loads(mount.cli(*words).stdout)
    assert (answer["files"], answer["fetched"]) == (2, BLOCK + 8)
    assert cached(mount) == BLOCK + 8
    with pytest.raises(NotFound, match=r"^model m has no file '\*\.gguf'$"):
        fetch(mount, "*.gguf")
    eventually(lambda: mount.client().evict("m", ["onnx/"])["evicted"])
    assert cached(mount) == 8


def test_without_wait_it_goes_on_in_the_daemon(mount: Mounted, shared: tuple[Mounted, Origin]) -> None:
    _, origin = shared
    origin.silent.set()
    answer = fetch(mount, wait=False)
    assert (answer["files"], answer["bytes"], answer["failed"]) == (4, SIZE, [])
    assert cached(mount) == 0
    origin.silent.clear()
    origin.silence_over.set()
    eventually(lambda: cached(mount) == SIZE)


@pytest.mark.parametrize("ask", ["prefetch", "pin", "unpin", "evict"])
def test_no_such_model_is_told(ask: str, mount: Mounted) -> None:
    client = mount.client()
    asks: dict[str, Callable[[], object]] = {
        "prefetch": lambda: fetch(mount, model="n"),
        "pin": lambda: client.pin("n"),
        "unpin": lambda: client.unpin("n"),
        "evict": lambda: client.evict("n", []),
    }
    with pytest.raises(NotFound, match=r"^no model 'n'; mounted are: m$"):
        asks[ask]()


def test_files_that_cannot_be_had_are_named(place: Path, origin: Origin) -> None:
    env = {"MODELFS_READ_DEADLINE": "5s", **alone(place)}
    with mounted(place, "--cache-size", "20MiB", sources={"m": origin.url}, env=env) as mount:
        with pytest.raises(
            CacheError, match=rf"^m: {SIZE} bytes are wanted, and the cache may hold {20 << 20}:"
        ):
            fetch(mount)
        assert origin.contents() == []
        fetch(mount, "*.json")
        origin.refusal = 403
        result = mount.cli("prefetch", "m", "--path", "*.json", "--path", "w.bin", "--wait", check=False)
        assert result.returncode == 6
        first, second = result.stdout.splitlines()
        assert first == "prefetched m: 2 files, 16.0 MiB, 0 B of it fetched now"
        assert second.startswith("m/w.bin: ")
        refused = "modelfs: m: 1 of 2 files could not be fetched: run it again; what is there stays\n"
        assert result.stderr == refused


# -- evict and gc


def test_evicting_frees_what_nobody_has_open(place: Path, origin: Origin, transport: str) -> None:
    with mounted(place, sources={"m": origin.url}, env=alone(place), transport=transport) as mount:
        with (mount.path / "m" / "w.bin").open("rb") as file:
            fetch(mount)
            eventually(lambda: len(gc(mount, dry_run=True)["evicted"]) == 3)
            before = mount.status()["cache"]["used"]
            answer = json.loads(mount.cli("evict", "m", "--json").stdout)
            assert names(answer["evicted"]) == ["m/config.json", "m/empty", "m/onnx/model.onnx"]
            assert answer["kept"] == [{"name": "m/w.bin", "why": "open"}]
            assert answer["freed"] == before - mount.status()["cache"]["used"] >= BLOCK
            assert file.read() == FILES["w.bin"]
        assert cached(mount) == len(FILES["w.bin"])
        eventually(lambda: gc(mount, dry_run=True)["evicted"])
        assert mount.cli("evict", "m").stdout == "evicted 1 file: 16.0 MiB freed\n"
        assert cached(mount) == 0
        assert (mount.path / "m" / "w.bin").read_bytes() == FILES["w.bin"]  # fetched again


def test_what_nobody_used_for_a_while_goes(mount: Mounted) -> None:
    fetch(mount)
    assert mount.client().collect(3600, dry_run=False) == {"evicted": [], "dry_run": False}
    eventually(lambda: len(gc(mount, dry_run=True)["evicted"]) == len(FILES))
    assert cached(mount) == SIZE
    assert mount.cli("gc", "--older-than", "0s", "--dry-run").stdout.endswith("24.0 MiB to be freed\n")
    first, *_, last = mount.cli("gc", "--older-than", "0s").stdout.splitlines()
    assert first.startswith("m/")
    assert last == "4 files evicted: 24.0 MiB freed"
    assert cached(mount) == 0


# -- pin


def test_a_pin_outlives_the_daemon_and_the_revision(place: Path, origin: Origin) -> None:
    sources, env = {"m": origin.url, "n": "mock://n"}, alone(place)
    with mounted(place, sources=sources, env=env) as mount:
        fetch(mount)
        assert mount.cli("pin", "m").stdout == "pinned m: 24.0 MiB of 24.0 MiB (100%) cached\n"
    with mounted(place, sources=sources, env=env) as mount:
        assert pinned(mount) == ["m"]
        answer = mount.client().evict("m", [])
        assert answer["evicted"] == []
        assert {row["why"] for row in answer["kept"]} == {"pinned"}
        assert names(gc(mount)["evicted"]) == []
        origin.files = {"other": b"x" * 1000}
        mount.client().refresh("m")
        fetch(mount)
        eventually(lambda: sum(row["bytes"] for row in gc(mount)["evicted"]) >= SIZE)  # the old revision
        assert cached(mount) == 1000
        assert mount.cli("unpin", "m").stdout == "unpinned m\n"
        assert gc(mount)["evicted"] != []
    with mounted(place, sources=sources, env=env) as mount:
        assert pinned(mount) == []


def test_what_the_configuration_pins_is_unpinned_there(place: Path, origin: Origin) -> None:
    config = f"models: {{m: {{source: '{origin.url}', pin: true}}}}\n"
    with mounted(place, config=config, env=alone(place)) as mount:
        mount.client().pin("m")
        with pytest.raises(ConfigError, match=r"^model m is pinned by the configuration: remove pin there"):
            mount.client().unpin("m")
        assert pinned(mount) == ["m"]


def test_a_pinned_model_that_was_found_on_demand_is_there_after_a_restart(place: Path) -> None:
    with HubServer() as hub:
        hub.add("org/bert", {"config.json": b"{}", "model.bin": b"w" * 100_000})
        config, env = "namespaces: [hf]\n", {**alone(place), **hub.env()}
        with mounted(place, config=config, env=env) as mount:
            assert fetch(mount, model="hf/org/bert")["fetched"] == 100_002
            mount.client().pin("hf/org/bert")
        with mounted(place, config=config, env=env) as mount:
            assert pinned(mount) == ["hf/org/bert"]
            assert gc(mount)["evicted"] == []
            assert cached(mount, "hf/org/bert") == 100_002
