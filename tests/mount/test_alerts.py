"""Every alert fires when its cause is there, and no other: the causes are real, and so is what is scraped."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pytest

from modelfs.testing.faults import Asked, Fault, FaultProxy
from tests import prometheus
from tests.cache import damage
from tests.faults.rig import noise
from tests.mount.harness import (
    Mounted,
    alone,
    eventually,
    file_system,
    left_behind,
    mounted,
    open_directory,
    unused_port,
)
from tests.origin import MANIFEST, Origin
from tests.prometheus import Scrape, fired, scrape, value

MIB = 1 << 20
FILES = {"a.dat": noise(12 * MIB, "a"), "b.dat": noise(12 * MIB, "b")}
FILES |= {f"{number}.json": noise(100, str(number)) for number in range(40)}
NAMES = iter([name for name in FILES if name.endswith(".json")])
"""Small files, each for the one test that takes it: nobody has read it before."""
COVERED = {
    alert: test
    for test, alerts in {
        "test_a_mount_that_is_hidden": ["ModelfsNotReady"],
        "test_reads_of_what_the_store_no_longer_has": ["ModelfsReadErrors"],
        "test_a_store_that_does_not_go_on": ["ModelfsReadsWait"],
        "test_a_store_that_fails": ["ModelfsStoreFailing"],
        "test_a_store_that_fails_now_and_then": ["ModelfsStoreErrors"],
        "test_a_model_that_comes_late_and_goes_away": ["ModelfsModelUnavailable", "ModelfsModelStale"],
        "test_a_bit_that_flips_on_the_disk": ["ModelfsCacheCorrupt"],
        "test_a_store_that_sends_wrong_bytes": ["ModelfsWrongBytes"],
        "test_a_cache_that_is_smaller_than_what_is_read_in_turn": ["ModelfsCacheTooSmall"],
        "test_a_disk_that_others_fill_and_that_fails_then": ["ModelfsCacheDiskFull", "ModelfsCacheErrors"],
        "test_a_daemon_that_dies_again_and_again_and_is_gone": ["ModelfsDaemonDies", "ModelfsDown"],
    }.items()
    for alert in alerts
}


def test_every_alert_has_a_test_that_provokes_its_cause() -> None:
    assert sorted(COVERED) == sorted(rule["alert"] for rule in prometheus.rules())
    assert all(callable(globals()[test]) for test in COVERED.values())


class Watched(NamedTuple):
    """A mount of the model ``m``, whose store does what a test wants, and the address of its metrics."""

    mount: Mounted
    origin: Origin
    proxy: FaultProxy
    url: str

    def look(self) -> Scrape:
        return scrape(self.url)

    def read(self, name: str) -> bytes:
        return (self.mount.path / "m" / name).read_bytes()


@contextmanager
def watched(
    place: Path, settings: str = "", models: str = "", cache: Path | None = None
) -> Iterator[Watched]:
    with Origin(FILES) as origin, FaultProxy(origin.url.rstrip("/")) as proxy:
        port = unused_port()  # its successors listen there as well
        config = f"http: 127.0.0.1:{port}\nrefresh: 0\n{settings}\nmodels:\n  m: {proxy.url}/\n{models}"
        with mounted(place, config=config, env=alone(place), transport="kernel", cache=cache) as mount:
            own = Watched(mount, origin, proxy, f"http://127.0.0.1:{port}")
            eventually(lambda: value(own.look(), "up") == 1)
            yield own


@pytest.fixture(scope="module")
def shared() -> Iterator[Watched]:
    """One mount for all tests that leave it as they found it."""
    with open_directory() as place, watched(place, "read_deadline: 8s\ncache: {size: 16MiB}") as own:
        yield own


@pytest.fixture
def well(shared: Watched) -> Watched:
    """The mount that is shared, of which nothing is wrong now."""
    assert fired(shared.look()) == {}
    return shared


def only(alerts: Mapping[str, list[dict[str, str]]], name: str) -> dict[str, str]:
    """Return labels and annotations of the one alert that fires, which is `name`."""
    assert alerts.keys() == {name}
    (alert,) = alerts[name]
    return alert


def contents(fault: Fault) -> Callable[[Asked], Fault | None]:
    """Strike every request for content."""
    return lambda asked: None if asked.path.endswith(MANIFEST) else fault


# -- readers


def test_a_mount_that_is_hidden(well: Watched) -> None:
    before = well.look()
    subprocess.run(["mount", "-t", "tmpfs", "hidden", str(well.mount.path)], check=True)
    try:
        only(fired(before, well.look()), "ModelfsNotReady")
    finally:
        subprocess.run(["umount", str(well.mount.path)], check=True)


def test_reads_of_what_the_store_no_longer_has(well: Watched) -> None:
    before, name = well.look(), next(NAMES)
    well.origin.files[name] = b"another version"
    with pytest.raises(OSError, match="Stale"):
        well.read(name)
    alert = only(fired(before, well.look()), "ModelfsReadErrors")
    assert alert["kind"] == "Stale"


def test_a_store_that_does_not_go_on(well: Watched) -> None:
    before, name, go_on = well.look(), next(NAMES), threading.Event()
    well.origin.held[name] = (10, go_on)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(well.read, name)
        eventually(lambda: value(well.look(), "modelfs_longest_wait_seconds") > 4)
        during = well.look()
        go_on.set()
        assert reader.result() == FILES[name]
    only(fired(before, during), "ModelfsReadsWait")


# -- stores


def test_a_store_that_fails(well: Watched) -> None:
    before, name = well.look(), next(NAMES)
    well.proxy.follow(contents(Fault("status-503")))
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(well.read, name)
        eventually(lambda: value(well.look(), "modelfs_breaker_state") == 2)
        during = well.look()
        well.proxy.follow(())
        assert reader.result() == FILES[name]
    alert = only(fired(before, during), "ModelfsStoreFailing")
    assert alert["store"] == f"{well.proxy.url}/"
    assert value(well.look(), "modelfs_breaker_state") == 0


def test_a_store_that_fails_now_and_then(well: Watched) -> None:
    names = [next(NAMES) for _ in range(14)]
    well.proxy.follow(cycle([Fault("status-503"), None]))
    with ThreadPoolExecutor(4) as pool:
        assert well.read(names[0]) == FILES[names[0]]
        before = well.look()  # the first failure of its kind is no increase
        assert list(pool.map(well.read, names[1:])) == [FILES[name] for name in names[1:]]
    well.proxy.follow(())
    alert = only(fired(before, well.look()), "ModelfsStoreErrors")
    assert alert["scheme"] == "http"


def test_a_model_that_comes_late_and_goes_away(place: Path) -> None:
    store = place / "store"
    with watched(place, models=f"  late: {{source: 'file://{store}', optional: true}}\n") as own:
        alert = only(fired(own.look()), "ModelfsModelUnavailable")
        assert alert["model"] == "late"
        store.mkdir()
        (store / "config.json").write_text("{}")
        own.mount.cli("refresh", str(own.mount.path))
        before = own.look()
        assert fired(before) == {}
        assert (own.mount.path / "late/config.json").read_text() == "{}"
        store.rename(place / "away")
        own.mount.cli("refresh", str(own.mount.path))
        alert = only(fired(before, own.look()), "ModelfsModelStale")
        assert alert["model"] == "late"
        assert (own.mount.path / "late/config.json").read_text() == "{}"


# -- the cache


def test_a_bit_that_flips_on_the_disk(well: Watched) -> None:
    name = next(NAMES)
    assert well.read(name) == FILES[name]
    before = well.look()
    found = (path for path in well.mount.cache.rglob("*.data") if path.stat().st_size == len(FILES[name]))
    (file,) = (path for path in found if path.read_bytes() == FILES[name])
    damage(file, 50)
    well.mount.allowed_errors.append(r"ERROR modelfs\.fetch\.scrub")
    assert well.mount.cli("verify", "--mountpoint", str(well.mount.path), check=False).returncode == 1
    only(fired(before, well.look()), "ModelfsCacheCorrupt")
    assert well.read(name) == FILES[name]


def test_a_store_that_sends_wrong_bytes(well: Watched) -> None:
    name = next(NAMES)
    well.origin.digests[name] = 64 * "0"
    well.mount.cli("refresh", str(well.mount.path))
    before = well.look()
    well.mount.allowed_errors.append("the bytes do not have the published digest")
    with pytest.raises(OSError, match="Input/output"):
        well.read(name)
    assert fired(before, well.look()).keys() == {"ModelfsWrongBytes", "ModelfsReadErrors"}


def test_a_cache_that_is_smaller_than_what_is_read_in_turn(well: Watched) -> None:
    before = well.look()
    for name in ("a.dat", "b.dat", "a.dat", "b.dat"):
        assert well.read(name) == FILES[name]
    only(fired(before, well.look()), "ModelfsCacheTooSmall")


def test_a_disk_that_others_fill_and_that_fails_then(place: Path) -> None:
    image = place / "image"
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    with (
        file_system(place, "-o", "loop,errors=remount-ro", str(image)) as disk,
        watched(place, cache=disk / "cache") as own,
    ):
        before = own.look()
        assert fired(before) == {}
        filler = disk / "filler"
        filler.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - MIB))
        alert = only(fired(before, own.look()), "ModelfsCacheDiskFull")
        assert "iB are free" in alert["description"]
        filler.unlink()
        devices = dict(line.split()[1::-1] for line in Path("/proc/self/mounts").read_text().splitlines())
        (Path("/sys/fs/ext4") / Path(devices[str(disk)]).name / "trigger_fs_error").write_text("1")
        assert own.read("a.dat") == FILES["a.dat"]
        only(fired(before, own.look()), "ModelfsCacheErrors")


# -- life


def test_a_daemon_that_dies_again_and_again_and_is_gone(place: Path) -> None:
    with watched(place) as own:
        own.mount.allowed_errors.append("the next one takes the mount over")
        before = own.look()
        for deaths in (1, 2, 3):
            os.kill(own.mount.status()["pid"], signal.SIGKILL)
            eventually(lambda: value(own.look(), "modelfs_handovers_total") == deaths)  # noqa: B023
            after = own.look()
            assert ("ModelfsDaemonDies" in fired(before, after)) == (deaths == 3)
        only(fired(before, after), "ModelfsDaemonDies")
        assert own.read("0.json") == FILES["0.json"]
        status = own.mount.status()
        for pid in (status["holder_pid"], status["pid"]):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: left_behind(place) == [str(own.mount.path)])
        alert = only(fired(before, own.look()), "ModelfsDown")
        assert alert["summary"] == "No modelfs daemon answers at node:9180"
        alert = only(fired(before, {}), "ModelfsDown")
        assert alert["summary"] == "No modelfs daemon answers"
