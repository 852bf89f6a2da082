"""Wheel, sdist, .deb and .rpm: built, installed, used as docs/hosts.md says, upgraded and removed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import modelfs
from modelfs.testing.hub import HubServer
from tests import debian
from tests.machine import Machine, booted

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PAGE = (ROOT / "docs/hosts.md").read_text()
HIGHER = "99.1"
PARTS = {f"part-{number}.bin": bytes([number % 251]) * 40_000 for number in range(400)}
FILES = {"config.json": b'{"model_type": "bert"}', "model.safetensors": bytes(range(256)) * 40_000}

# The first time in a checkout the machine's root and the environment of the packages are made too.
pytestmark = pytest.mark.timeout(900)

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"
)


def commands(heading: str) -> list[tuple[str, list[str]]]:
    """Return the commands below `heading` of the page, each with the lines it is said to print."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{heading}\n")]
    lines = "".join(re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)).splitlines()
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    assert found
    return found


def follow(machine: Machine, heading: str) -> None:
    """Do what the page says there, in the home of root."""
    for command, printed in commands(heading):
        said = machine.sh(f"cd /root; {command}")
        assert not printed or said.splitlines() == printed, command


def run(*words: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist."""
    place = tmp_path_factory.mktemp("releases")
    run(sys.executable, "-m", "hatchling", "build", "-d", place)
    return place


@pytest.fixture(scope="module")
def packages(releases: Path) -> Path:
    """The .deb and the .rpm of the wheel."""
    place = releases.with_name("packages")
    (wheel,) = releases.glob("*.whl")
    run(sys.executable, "packaging/host/build.py", "deb", "rpm", "--wheel", wheel, "--output", place)
    return place


@pytest.fixture(scope="module")
def upgrade(releases: Path, packages: Path) -> Path:
    """The .deb of a higher version."""
    source, place = releases.with_name("source"), releases.with_name("upgrade")
    with tarfile.open(next(releases.glob("*.tar.gz"))) as sdist:
        sdist.extractall(source, filter="data")
    (tree,) = source.iterdir()
    (tree / "PKG-INFO").unlink()  # it says which version this is
    module = tree / "modelfs/__init__.py"
    module.write_text(module.read_text().replace(f'"{modelfs.__version__}"', f'"{HIGHER}"'))
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", place, cwd=tree)
    (wheel,) = place.glob("*.whl")
    run(sys.executable, "packaging/host/build.py", "deb", "--wheel", wheel, "--output", place)
    return place


def test_the_releases_are_fit_for_pypi(releases: Path) -> None:
    files = sorted(releases.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    run(BIN / "twine", "check", "--strict", *files)
    with zipfile.ZipFile(files[0]) as wheel:
        names = wheel.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"modelfs"}
    assert "modelfs/py.typed" in names


def test_pipx_installs_the_wheel(releases: Path, tmp_path: Path) -> None:
    (wheel,) = releases.glob("*.whl")
    pinned = (ROOT / "packaging/container/constraints.txt").read_text()
    (tmp_path / "ours").write_text(f"modelfs @ {wheel.as_uri()}\n{pinned}")
    env = {
        "PIPX_HOME": str(tmp_path / "home"),
        "PIPX_BIN_DIR": str(tmp_path / "bin"),
        "PIPX_DEFAULT_PYTHON": sys.executable,
        "PIP_CONSTRAINT": str(tmp_path / "ours"),
        "PIP_NO_COMPILE": "1",
        "PATH": os.pathsep.join([str(tmp_path / "bin"), str(BIN), os.environ["PATH"]]),
    }
    for command, _ in commands("pipx"):
        said = run("sh", "-ec", command, env=env, cwd=tmp_path)
    assert said == f"modelfs {modelfs.__version__}\n"
    assert (tmp_path / "bin/mount.modelfs").exists()


def test_make_builds_the_packages() -> None:
    for name in ("deb", "rpm"):
        said = run("make", "--dry-run", "--always-make", name)
        assert f"python packaging/host/build.py {name}\n" in said
    assert commands("Debian and Ubuntu")[0][0] == "make deb"


def everything(machine: Machine) -> set[str]:
    """Return all that is there: files, mounts and groups; not the records that are kept of installations."""
    kept = re.compile(r"/(var/(log|lib/(apt|dpkg|systemd)|cache/(apt|ldconfig))/|etc/(group|gshadow)-$)")
    files = machine.sh("find / -xdev").splitlines()
    own = {file for file in files if "modelfs" in file or not kept.match(file)}
    mounts = machine.sh("findmnt --list --noheadings --output TARGET,FSTYPE | grep -v '^/run/'").splitlines()
    return {*own, *mounts, machine.sh("cat /etc/group /etc/passwd")}


READER = """
import hashlib, itertools, os, select, sys
folder = "/models/finbert"
names = sorted(os.listdir(folder))
kept = os.open(f"{folder}/model.safetensors", os.O_RDONLY)
for number in itertools.count():
    path = f"{folder}/part-{number % 400}.bin"
    assert open(path, "rb").read() == bytes([number % 400 % 251]) * 40_000, path
    assert os.pread(kept, 256, number % 30_000 * 256) == bytes(range(256))
    assert sorted(os.listdir(folder)) == names
    if number == 10:
        print("reading", flush=True)
    if select.select([sys.stdin], [], [], 0)[0]:
        break
print("read", number, flush=True)
"""


@contextmanager
def reading(machine: Machine) -> Iterator[None]:
    """Let a program of the machine read while something else is done: all the time, and what it shall."""
    with machine.start("python3", "-c", READER) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        yield
        said, _ = reader.communicate("\n", timeout=120)
    assert re.fullmatch(r"read \d+\n", said), said
    assert reader.returncode == 0


@as_root
def test_the_page_from_the_installation_to_the_purge(packages: Path, upgrade: Path) -> None:
    with HubServer() as hub:
        hub.add("ProsusAI/finbert", FILES)
        with booted(hub.env()) as machine:
            sudo = machine.root / "usr/local/bin/sudo"
            sudo.write_text('#!/bin/sh\nexec "$@"\n')
            sudo.chmod(0o755)
            before = everything(machine)
            shutil.copy(next(packages.glob("*.deb")), machine.root / "root")
            for command, _ in commands("Debian and Ubuntu")[1:]:
                machine.sh(f"cd /root; {command}")
            assert machine.run("modelfs", "--version") == f"modelfs {modelfs.__version__}"
            changed = machine.run("dpkg", "--verify", "modelfs", check=False).splitlines()
            assert [line for line in changed if "/usr/share/doc/" not in line] == []  # which is left out here

            follow(machine, "As a service")
            assert machine.run("findmnt", "/models", check=False) == ""
            follow(machine, "In /etc/fstab")
            assert machine.run("mount", "-a") == ""

            hub.add("ProsusAI/finbert", {**FILES, **PARTS})
            machine.run("modelfs", "refresh", "/models")
            (machine.root / "root" / next(packages.glob("*.deb")).name).unlink()
            shutil.copy(next(upgrade.glob("*.deb")), machine.root / "root")
            with reading(machine):
                follow(machine, "Upgrade")
                status = json.loads(machine.run("modelfs", "status", "/models", "--json"))
                assert (status["modelfs"], status["handovers"]) == (HIGHER, 1)
            copies = [path.name for path in (machine.root / "usr/lib/modelfs").glob("copy.*")]
            assert copies == [os.readlink(machine.root / "usr/lib/modelfs/current")]

            follow(machine, "Remove")
            for mine in ("root", "models"):
                shutil.rmtree(machine.root / mine)
            machine.run("systemctl", "daemon-reload")
            assert everything(machine) - before == {"/var/tmp/modelfs"} | {
                name for name in everything(machine) if name.startswith("/var/tmp/modelfs/")
            }
            assert "modelfs" not in machine.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


@as_root
def test_a_service_is_upgraded_under_readers(packages: Path, upgrade: Path) -> None:
    with HubServer() as hub:
        hub.add("ProsusAI/finbert", {**FILES, **PARTS})
        with booted(hub.env()) as machine:
            for place in (packages, upgrade):
                shutil.copy(next(place.glob("*.deb")), machine.root / "root")
            machine.sh("dpkg --install /root/modelfs_[!9]*.deb; mkdir /models")
            machine.sh("echo 'models: {finbert: hf://ProsusAI/finbert}' > /etc/modelfs/models.yaml")
            machine.run("systemctl", "start", "modelfs@models")
            holder = machine.run("systemctl", "show", "modelfs@models", "--property=MainPID")
            with reading(machine):
                machine.sh(f"dpkg --unpack /root/modelfs_{HIGHER}*.deb")
                # All files are replaced, and what runs has its own all the same.
                assert machine.run("modelfs", "--version") == f"modelfs {modelfs.__version__}"
                machine.run("dpkg", "--configure", "modelfs")
                assert machine.run("systemctl", "show", "modelfs@models", "--property=MainPID") == holder
                machine.run("systemctl", "restart", "modelfs@models")
                status = json.loads(machine.run("modelfs", "status", "/models", "--json"))
                machine.sh(f"kill -KILL {status['holder_pid']} {status['pid']}")
            status = json.loads(machine.run("modelfs", "status", "/models", "--json"))
            assert (status["modelfs"], status["handovers"]) == (HIGHER, 3)
            with reading(machine):  # and back
                machine.sh("dpkg --install /root/modelfs_[!9]*.deb")
                machine.run("systemctl", "restart", "modelfs@models")
            status = json.loads(machine.run("modelfs", "status", "/models", "--json"))
            assert (status["modelfs"], status["handovers"]) == (modelfs.__version__, 5)
            machine.run("dpkg", "--purge", "modelfs")
            assert machine.run("findmnt", "--types", "fuse.modelfs", check=False) == ""


@as_root
def test_the_rpm_is_installed_and_removed(packages: Path) -> None:
    (rpm,) = packages.glob("*.rpm")
    assert commands("Fedora and RHEL")[0][0].endswith("./modelfs-*.rpm")
    with debian.copied(debian.base_root()) as root:
        into = ["rpm", "--root", root, "--nodeps"]
        run("mount", "-t", "proc", "proc", root / "proc")
        run(*into, "--install", rpm)
        assert run("chroot", root, "modelfs", "--version") == f"modelfs {modelfs.__version__}\n"
        assert run(*into, "--verify", "modelfs") == ""
        run(*into, "--erase", "modelfs")
        found = run("find", root, "-xdev", "-name", "*modelfs*").splitlines()
        assert sorted(found) == [f"{root}/{path}/modelfs" for path in ("etc", "run", "var/cache")]
