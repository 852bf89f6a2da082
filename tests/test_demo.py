"""The demo does what it shows, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from demo.models import MODELS
from modelfs.fuse import mountpoint
from tests.mount import harness

REPOSITORY = Path(__file__).parents[1]
ROW = re.compile(r"^ +([a-z-]+) {2,}.*?(\d+\.\d\d) s +(\S+ \S+) +(\d+) +(\S+ \S+)$", re.MULTILINE)
LOADS = [name for name, model in MODELS.items() for _ in model.loads]

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(
        not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="the demo needs access to /dev/fuse"
    ),
]


class Place:
    """Directories of one test: the mountpoint, and all that its processes may write to."""

    def __init__(self, directory: Path) -> None:
        self.models = directory / "models"
        self.temporary = directory / "temporary"
        self.temporary.mkdir()
        self.env = {
            "MODELFS_RUNTIME_DIR": str(directory / "run"),
            "TMPDIR": str(self.temporary),
            "HF_TOKEN": "the user's own, which no store of the demo may see",
            "AWS_PROFILE": "none-of-this-name",
        }

    def demo(self, *words: str, on: Path | None = None) -> subprocess.Popen[str]:
        """Start the demo, in a process group of its own as a shell does it."""
        return subprocess.Popen(
            [sys.executable, "-m", "demo", "--mountpoint", str(on or self.models), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **self.env},
            process_group=0,
        )

    def run(self, *words: str) -> tuple[str, str]:
        """Run the demo and return what it printed, and what it said on standard error."""
        with self.demo(*words) as demo:
            output, errors = demo.communicate(timeout=200)
        assert demo.returncode == 0, errors
        return output, errors

    def shell(self, command: str) -> str:
        """Run a command that the demo printed, where it was run, and return what it prints."""
        return subprocess.run(
            command,
            shell=True,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **self.env},
        ).stdout

    def mounts(self) -> list[Path]:
        """Return what is mounted here."""
        return [mount.path for mount in mountpoint.mounts() if self.models.parent in mount.path.parents]

    def processes(self) -> list[psutil.Process]:
        """Return what was started here, directly or not, and has not ended."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MODELFS_RUNTIME_DIR") == self.env["MODELFS_RUNTIME_DIR"]:
                    found.append(process)
            except psutil.Error:  # it ended meanwhile, or is another user's
                continue
        return found

    def await_end(self) -> None:
        """Return when nothing runs any more; there is nothing mounted and no file left then."""
        _, alive = psutil.wait_procs(self.processes(), timeout=60)
        assert alive == []
        assert self.mounts() == []
        assert list(self.temporary.iterdir()) == []


@pytest.fixture
def place() -> Iterator[Place]:
    directory = Path(tempfile.mkdtemp(prefix="modelfs-test-"))
    place = Place(directory)
    yield place
    for process in place.processes():
        process.kill()
    for path in place.mounts():
        mountpoint.detach(path, lazy=True)
    shutil.rmtree(directory)


def rows(output: str) -> list[tuple[str, str, int]]:
    """Return model, fetched bytes and requests of every load that was shown."""
    return [(match[1], match[3], int(match[4])) for match in ROW.finditer(output)]


def test_everything_is_loaded_twice_and_can_be_kept(place: Place) -> None:
    output, errors = place.run("--keep")
    assert errors == ""
    first, second = output.split("switched off")
    assert [name for name, *_ in rows(first)] == LOADS
    assert all(fetched != "0 B" and requests for _, fetched, requests in rows(first))
    assert rows(second) == [(name, "0 B", 0) for name in LOADS]

    unread = place.models / "minilm" / "README.md"  # by the loaders: the stores are there
    assert harness.read_by("cat", str(unread)).stdout.startswith("---")
    shown = [place.shell(command) for command in re.findall(r"^ +\$ (.+)$", second, re.MULTILINE)]
    assert "model.joblib" in shown[0]
    assert re.search(r"^minilm +ready ", shown[1], re.MULTILINE)
    assert "'mount'" in shown[2]
    assert shown[3] == f"unmounted {place.models}\n"
    place.await_end()


def test_the_demo_ends_with_nothing_mounted_and_replaces_a_stale_mount(place: Place) -> None:
    place.models.mkdir()
    source, cache, log = (
        place.temporary.as_uri(),
        place.models.with_name("cache"),
        place.models.with_name("log"),
    )
    words = ["--source", f"m={source}", "--cache-dir", str(cache), "--log-file", str(log)]
    command = [sys.executable, "-m", "modelfs", "mount", str(place.models), *words]
    subprocess.run(command, env={**os.environ, **place.env}, check=True)
    for process in place.processes():
        process.kill()
    _, errors = place.run("heart-disease")
    assert "removing the mount that a daemon left behind" in errors
    place.await_end()


def test_a_demo_that_is_cut_off_takes_everything_with_it(place: Place) -> None:
    interrupted = place.demo("heart-disease", on=place.models / "a")
    killed = place.demo("heart-disease", on=place.models / "b")
    with interrupted, killed:
        for demo in (interrupted, killed):
            assert demo.stdout is not None
            assert any("fetched so far" in line for line in demo.stdout)  # it is mounted, and loading begins
        os.killpg(interrupted.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
        killed.kill()
        interrupted.communicate(timeout=60)
        killed.communicate(timeout=60)
    assert interrupted.returncode == 130
    place.await_end()


def test_a_mount_that_is_in_the_way_is_named(place: Place) -> None:
    place.models.mkdir()
    (place.models / "file").touch()
    with place.demo() as demo:
        _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert f"{place.models} is not empty" in errors
