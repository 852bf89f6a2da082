"""What the manifests do on a node, acted out: pods before and after the daemon, its death, its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelfs.fuse import mountpoint
from modelfs.fuse.device import Device, open_device
from tests import kustomize
from tests.dockerfile import Image
from tests.mount.harness import eventually
from tests.mount.test_handover import BLOCK, MIB, Readers, noise, sha256
from tests.node import Node, Pod, Spec, node
from tests.origin import Origin
from tests.test_kubernetes import K8S, only

MODELS = "/modelfs/models"
"""Where the pods of the examples find models."""


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin({"small.json": b'{"a": 1}', "x.dat": noise(2 * BLOCK), "w.bin": noise(3 * BLOCK, 2)}) as own:
        yield own


@pytest.fixture
def machine(place: Path) -> Iterator[Node]:
    with node(place) as own:
        yield own


def pod_of(directory: Path, name: str = "modelfs") -> Spec:
    """Return the specification of the DaemonSet's pods."""
    spec: Spec = only(kustomize.build(directory), "DaemonSet", name)["spec"]["template"]["spec"]
    return spec


def daemon(machine: Node, origin: Origin, kustomization: str = "base", *, image: Image | None = None) -> Pod:
    """Start the daemon's pod as the manifests have it, but with a model of `origin`."""
    settings: dict[str, Any] = yaml.safe_load((K8S / "base/config.yaml").read_text())
    settings["cache"] = {"size": "1GiB", "min_free": "0%"}
    settings["models"] = {"m": origin.url}
    files = {"config.yaml": yaml.safe_dump(settings)}
    return machine.run(pod_of(K8S / kustomization), files, image)


def reader(machine: Node) -> Pod:
    """Start a pod that reads models, with the volumes and rights of the example."""
    deployment = yaml.safe_load((K8S / "examples/sentiment-analyzer.yaml").read_text())
    spec = deployment["spec"]["template"]["spec"]
    spec["containers"][0]["command"] = ["sleep", "infinity"]
    return machine.run(spec)


def test_pods_see_the_models_whether_they_started_before_the_daemon_or_after(
    machine: Node, origin: Origin
) -> None:
    before = reader(machine)
    assert before.exec("ls", MODELS).returncode != 0  # no directory, rather than one without models
    served = daemon(machine, origin)
    served.await_ready()
    after = reader(machine)
    expected = sha256(origin.files["x.dat"])
    for pod in (before, after):
        assert pod.exec("sha256sum", f"{MODELS}/m/x.dat").stdout.split()[0] == expected
        assert pod.mounts(MODELS) == [mountpoint.FSTYPE]
        assert pod.exec("touch", f"{MODELS}/m/new").returncode != 0


def test_after_a_crash_the_next_daemon_takes_away_what_is_dead(machine: Node, origin: Origin) -> None:
    pods = [reader(machine)]
    served = daemon(machine, origin)
    served.await_ready()
    pods.append(reader(machine))
    served.kill()
    for pod in pods:
        assert "not connected" in pod.exec("ls", MODELS).stderr
    # A second dead mount on the first one, as two crashes of a worse tool leave them.
    device = Device(open_device())
    (place,) = machine.mounts()
    device.mount(place, allow_other=True)
    device.close()
    assert len(machine.mounts()) == 2
    assert [len(pod.mounts(MODELS)) for pod in pods] == [2, 2]
    served.start()
    served.await_ready()
    assert len(machine.mounts()) == 1
    for pod in [*pods, reader(machine)]:
        assert pod.mounts(MODELS) == [mountpoint.FSTYPE]
        assert pod.exec("cat", f"{MODELS}/m/small.json").stdout == '{"a": 1}'


def test_a_pod_of_the_daemon_that_ends_serves_who_reads_and_leaves_a_gap_that_is_loud(
    machine: Node, origin: Origin
) -> None:
    served = daemon(machine, origin)
    served.await_ready()
    pod = reader(machine)
    origin.held["x.dat"] = (MIB, threading.Event())
    code = (
        "fd=os.open(sys.argv[1],os.O_RDONLY)\n"
        "step(os.pread(fd,10,0).hex())\n"
        "print(__import__('hashlib').file_digest(open(fd,'rb'),'sha256').hexdigest(),flush=True)\n"
    )
    with pod.reader(code, f"{MODELS}/m/x.dat") as reading:
        assert reading.said() == origin.files["x.dat"][:10].hex()
        codes: list[int] = []
        end = threading.Thread(target=lambda: codes.append(served.terminate()))
        end.start()
        eventually(lambda: machine.mounts() == [])
        gap = pod.exec("ls", MODELS)
        assert gap.returncode != 0
        assert "Permission denied" in gap.stderr
        assert "Permission denied" in pod.exec("cat", f"{MODELS}/m/small.json").stderr
        reading.go_on()
        origin.held["x.dat"][1].set()
        assert reading.said() == sha256(origin.files["x.dat"])
        assert reading.process.wait(30) == 0
        end.join(30)
    assert codes == [0]
    assert pod.mounts(MODELS) == []
    # The next pod begins where it stopped: nothing is fetched again.
    asked = len(origin.contents())
    daemon(machine, origin).await_ready()
    assert pod.exec("sha256sum", f"{MODELS}/m/x.dat").stdout.split()[0] == sha256(origin.files["x.dat"])
    assert len(origin.contents()) == asked


@pytest.fixture
def kept(machine: Node) -> Pod:
    """The keeper of the overlay ``holder``, on `machine`."""
    return machine.run(pod_of(K8S / "overlays/holder", "modelfs-keeper"))


def status(pod: Pod) -> dict[str, Any]:
    """Return what the daemon in `pod` says of its mount."""
    found: dict[str, Any] = json.loads(pod.exec("modelfs", "status", "--json").stdout)[0]
    return found


def test_with_the_holder_a_pod_of_the_daemon_is_replaced_and_no_read_fails(
    machine: Node, origin: Origin, kept: Pod
) -> None:
    served = daemon(machine, origin, "overlays/holder")
    served.await_ready()
    pod = reader(machine)
    with Readers(f"{MODELS}/m", origin, 2, start=pod.reader) as results:
        served.kill()  # all that is in the container, as when it is out of memory
        served.start()
        served.await_ready()
        assert status(served)["handovers"] == 1
        assert served.terminate() == 0  # an update: one pod ends, another one begins
        served = daemon(machine, origin, "overlays/holder")
        served.await_ready()
        assert status(served)["handovers"] == 2
    assert len(results) == 2
    assert all(results)
    assert pod.mounts(MODELS) == [mountpoint.FSTYPE]


def test_with_the_holder_a_read_in_progress_waits_for_the_next_pod(
    machine: Node, origin: Origin, kept: Pod
) -> None:
    served = daemon(machine, origin, "overlays/holder")
    served.await_ready()
    pod = reader(machine)
    origin.held["w.bin"] = (MIB, threading.Event())
    code = (
        "fd=os.open(sys.argv[1],os.O_RDONLY)\n"
        "m=mmap.mmap(fd,0,prot=mmap.PROT_READ)\n"
        "step(m[:10].hex())\n"
        "print(__import__('hashlib').sha256(m).hexdigest(),flush=True)\n"
    )
    with pod.reader(code, f"{MODELS}/m/w.bin") as reading:
        assert reading.said() == origin.files["w.bin"][:10].hex()
        reading.go_on()
        served.kill()
        # Also the keeper may be replaced while a daemon serves; it gets everything anew.
        served.start()
        served.await_ready()
        kept.kill()
        kept.start()
        eventually(lambda: kept.log.read_text().count("keeping modelfs-ledger") == 2)
        served.kill()
        served.start()
        origin.held["w.bin"][1].set()
        assert reading.said() == sha256(origin.files["w.bin"])
        assert reading.process.wait(30) == 0
    served.await_ready()
    assert status(served)["handovers"] == 2


def test_without_daemon_and_keeper_nothing_is_left(machine: Node, origin: Origin, kept: Pod) -> None:
    served = daemon(machine, origin, "overlays/holder")
    served.await_ready()
    pod = reader(machine)
    assert served.terminate() == 0
    assert pod.mounts(MODELS) == [mountpoint.FSTYPE]  # left to the next one
    assert kept.terminate() == 0  # but there will be none
    assert pod.mounts(MODELS) == []
    assert machine.mounts() == []
    assert "Permission denied" in pod.exec("ls", MODELS).stderr


def test_a_daemon_whose_keeper_went_first_drains(machine: Node, origin: Origin, kept: Pod) -> None:
    served = daemon(machine, origin, "overlays/holder")
    served.await_ready()
    kept.kill()
    assert served.terminate() == 0
    assert machine.mounts() == []
