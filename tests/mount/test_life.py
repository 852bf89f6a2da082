"""How mounts begin and end: who may, what happens to those that are killed, and to stores that come later."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

import modelfs as package
from modelfs.cli import launch
from modelfs.errors import MountError
from modelfs.fuse import mountpoint
from modelfs.testing.hub import HubServer
from modelfs.testing.s3 import S3Server
from tests.mount.harness import (
    Mounted,
    alone,
    eventually,
    interpreter,
    left_behind,
    modelfs,
    mounted,
    read_by,
)
from tests.origin import MANIFEST, Origin

BLOCK = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.client().create_bucket(Bucket="bucket")
        server.client().put_object(Bucket="bucket", Key="key", Body=b"value")
        server.client().put_object(Bucket="bucket", Key="a/b/c", Body=b"deep")
        yield server


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/name", {"config.json": b'{"hub": 1}'})
        yield server


@pytest.fixture
def source(place: Path) -> str:
    """The URL of a model that can be mounted."""
    (place / "origin").mkdir()
    (place / "origin" / "config.json").write_text("{}")
    return f"file://{place}/origin"


@pytest.fixture
def mount(place: Path, source: str, transport: str) -> Iterator[Mounted]:
    with mounted(place, sources={"m": source}, env=alone(place), transport=transport) as own:
        yield own


def is_mounted(path: Path) -> bool:
    return mountpoint.mount_at(path) is not None


@contextmanager
def started(*words: str, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run the command line beside the test; it is killed in the end if it has not ended."""
    command = [sys.executable, "-m", "modelfs", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def reader(file: Path) -> subprocess.Popen[str]:
    """Start a process that prints ``open``, then the SHA-256 of `file`, or ``OSError``."""
    code = (
        "import hashlib, sys\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    print('open', flush=True)\n"
        "    try: print(hashlib.sha256(file.read()).hexdigest())\n"
        "    except OSError: print('OSError')\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)


# -- one mount on one point


def test_a_mount_that_a_killed_daemon_left_is_replaced(place: Path, source: str) -> None:
    with mounted(place, sources={"m": source}, env=alone(place), transport="pyfuse3") as mount:
        os.kill(mount.status()["pid"], signal.SIGKILL)

        def is_stale() -> bool:
            try:
                os.statvfs(mount.path)
            except OSError as error:
                return error.errno == errno.ENOTCONN
            return False

        eventually(is_stale)
        mount.cli(*mount.words)
        assert (mount.path / "m" / "config.json").read_text() == "{}"
        assert [m.path for m in mountpoint.mounts()].count(mount.path) == 1


def test_a_mount_that_a_killed_daemon_left_can_be_unmounted(place: Path, source: str) -> None:
    with mounted(place, sources={"m": source}, env=alone(place), transport="pyfuse3") as mount:
        os.kill(mount.status()["pid"], signal.SIGKILL)
        eventually(lambda: left_behind(place) == [str(mount.path)])
        assert mount.cli("umount", str(mount.path)).stdout.startswith("removed the mount")
        assert left_behind(place) == []


def test_a_second_mount_on_one_point_is_refused(mount: Mounted, place: Path) -> None:
    words = [*mount.words, f"--cache-dir={place}/other-cache"]
    pid = mount.status()["pid"]
    refused = mount.cli(*words, check=False)
    remedy = f"modelfs umount {mount.path} first"
    assert (refused.returncode, refused.stderr) == (
        4,
        f"modelfs: {mount.path} is already mounted, by pid {pid}: {remedy}\n",
    )
    # Whoever else mounted it.
    refused = modelfs(*words, env=alone(place / "other"), check=False)
    assert (refused.returncode, refused.stderr) == (
        4,
        f"modelfs: {mount.path} is a modelfs mount already: {remedy}\n",
    )
    assert (mount.path / "m" / "config.json").read_text() == "{}"
    assert mount.status()["pid"] == pid


def test_of_two_mounts_at_once_one_is_refused(place: Path, source: str, transport: str) -> None:
    path = place / "models"
    path.mkdir()
    words = [
        "mount",
        str(path),
        f"--source=m={source}",
        f"--transport={transport}",
        f"--log-file={place}/log",
    ]
    with (
        started(*words, f"--cache-dir={place}/1", env=alone(place)) as one,
        started(*words, f"--cache-dir={place}/2", env=alone(place)) as two,
    ):
        said = [process.communicate(timeout=30)[1] for process in (one, two)]
    try:
        assert sorted([one.returncode, two.returncode]) == [0, 4], said
        assert re.fullmatch(rf"modelfs: {path} is [^\n]*mount[^\n]*\n", "".join(said)), said
        assert (path / "m" / "config.json").read_text() == "{}"
        assert [m.path for m in mountpoint.mounts()].count(path) == 1
    finally:
        modelfs("umount", str(path), env=alone(place), check=False)
    assert left_behind(place) == []


# -- models that come later


@pytest.mark.parametrize(("by", "transport"), [("refresh", "pyfuse3"), ("itself", "kernel")])
def test_a_model_appears_when_its_store_comes_back(
    by: str, place: Path, source: str, hub: HubServer, transport: str
) -> None:
    optional, flags = ", optional: true", ["--refresh=0"]
    if by == "itself":
        optional, flags = "", ["--keep-going", "--refresh=1s"]
    config = f"models:\n  m: {source}\n  late: {{source: 'hf://org/name'{optional}}}\n"
    hub.stop()
    try:
        with mounted(
            place, *flags, config=config, env={**hub.env(), **alone(place)}, transport=transport
        ) as mount:
            late = mount.path / "late"
            assert (mount.path / "m" / "config.json").read_text() == "{}"
            assert "late" not in os.listdir(mount.path)
            assert not late.exists()
            status = {model["name"]: model for model in mount.status()["models"]}
            assert (status["m"]["state"], status["late"]["state"]) == ("ready", "unavailable")
            assert "cannot be reached" in status["late"]["why"]
            hub.start()
            if by == "refresh":
                assert " ready " in mount.cli("refresh", str(mount.path), "late").stdout
            eventually(late.exists)
            assert (late / "config.json").read_text() == '{"hub": 1}'
            status = {model["name"]: model for model in mount.status()["models"]}
            assert (status["late"]["state"], status["late"]["why"]) == ("ready", None)
    finally:
        hub.start()


def test_without_a_configuration_names_are_found_on_demand(
    place: Path, s3: S3Server, hub: HubServer, transport: str
) -> None:
    env = {**s3.env(), **hub.env(), **alone(place)}
    with mounted(place, env=env, transport=transport) as mount:
        assert (mount.path / "hf" / "org" / "name" / "config.json").read_text() == '{"hub": 1}'
        assert (mount.path / "s3" / "bucket" / "key").read_text() == "value"
        assert (mount.path / "s3" / "bucket" / "a" / "b" / "c").read_text() == "deep"
        for unknown in (
            *("hf/org/none", "hf/none/name", "hf/org/name/none", "hf/.git", "gs", "gs/bucket"),
            *("s3/none-such", "s3/bucket/none", "s3/bucket/a/none"),
        ):
            with pytest.raises(FileNotFoundError):
                os.stat(mount.path / unknown)
        names = [model["name"] for model in mount.status()["models"]]
        assert sorted(names) == ["hf/org/name", "s3/bucket"]


# -- the end


def test_a_second_unmount_says_that_nothing_is_mounted(mount: Mounted, place: Path) -> None:
    assert mount.cli("umount", str(mount.path)).stdout == f"unmounted {mount.path}\n"
    assert left_behind(place) == []
    again = mount.cli("umount", str(mount.path), check=False)
    assert (again.returncode, again.stdout) == (4, "")
    assert again.stderr == f"modelfs: {mount.path} is not mounted: modelfs status lists what is\n"


def test_an_unmount_says_for_whom_the_mount_is_still_there(
    mount: Mounted, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "STOP_SECONDS", 0.0)
    words = ["unshare", "--mount", "--propagation=private", sys.executable, "-c", "print(flush=True);input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as container:
        assert container.stdout
        container.stdout.readline()
        with pytest.raises(MountError, match=rf"still mounted for the containers of .*\b{container.pid}\b"):
            mount.umount()
        container.communicate(b"\n")
    eventually(lambda: left_behind(place) == [])


def test_sigterm_unmounts_serves_who_reads_and_hangs_nobody(place: Path) -> None:
    data = os.urandom(3 * BLOCK)
    with (
        Origin({"slow.dat": data, "silent.dat": data}) as origin,
        ended_while_read(place / "1", "pyfuse3", origin) as one,
        ended_while_read(place / "2", "kernel", origin) as two,
    ):
        for slow, silent in (one, two):
            assert slow.communicate(timeout=30)[0].strip() == hashlib.sha256(data).hexdigest()
            assert silent.communicate(timeout=30)[0].strip() == "OSError"


@contextmanager
def ended_while_read(
    place: Path, transport: str, origin: Origin
) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    """End a mount while `slow.dat`, whose bytes come then, and `silent.dat` are read; yield the readers."""
    place.mkdir()
    origin.held = {"slow.dat": (BLOCK, threading.Event()), "silent.dat": (0, threading.Event())}
    with mounted(place, sources={"m": origin.url}, env=alone(place), transport=transport) as mount:
        with reader(mount.path / "m" / "slow.dat") as slow, reader(mount.path / "m" / "silent.dat") as silent:
            for process in (slow, silent):
                assert process.stdout is not None
                assert process.stdout.readline() == "open\n"
            os.kill(mount.status()["pid"], signal.SIGTERM)
            eventually(lambda: not is_mounted(mount.path))
            origin.held["slow.dat"][1].set()
            yield slow, silent
        eventually(lambda: left_behind(place) == [])


@pytest.mark.parametrize(
    ("flags", "number", "code"),
    [
        (["--transport=kernel"], signal.SIGTERM, 143),
        (["--transport=pyfuse3"], signal.SIGTERM, 143),
        (["--transport=kernel"], signal.SIGINT, 130),
        (["--foreground"], signal.SIGTERM, -signal.SIGTERM),
        (["--foreground"], signal.SIGINT, 130),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mount_that_is_interrupted_while_a_store_is_slow_leaves_nothing(
    flags: list[str], number: int, code: int, place: Path
) -> None:
    (place / "models").mkdir()
    words = ["mount", f"{place}/models", f"--cache-dir={place}/cache", f"--log-file={place}/log", *flags]
    with Origin({"a": b"a"}) as origin:
        origin.held[MANIFEST] = (0, threading.Event())
        with started(*words, f"--source=m={origin.url}", env=alone(place)) as process:
            eventually(lambda: origin.log or process.poll() is not None)
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (code, "", "")
        assert left_behind(place) == []


@pytest.mark.parametrize(("number", "transport"), [(signal.SIGTERM, "kernel"), (signal.SIGINT, "pyfuse3")])
def test_in_the_foreground_a_signal_unmounts(number: int, place: Path, source: str, transport: str) -> None:
    path = place / "models"
    path.mkdir()
    words = ["mount", str(path), "--foreground", f"--cache-dir={place}/cache", f"--transport={transport}"]
    with started(*words, f"--source=m={source}", env=alone(place)) as process:
        eventually(lambda: modelfs("status", str(path), env=alone(place), check=False).returncode == 0)
        assert (path / "m" / "config.json").read_text() == "{}"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err
    assert f"{signal.Signals(number).name}: unmounting" in err
    assert left_behind(place) == []


# -- who may


@pytest.fixture
def device() -> Iterator[None]:
    """/dev/fuse as udev gives it to everybody; in containers it is often root's alone."""
    mode = os.stat("/dev/fuse").st_mode
    os.chmod("/dev/fuse", 0o666)
    yield
    os.chmod("/dev/fuse", mode)


def test_a_mount_that_is_given_up_while_its_holder_begins_leaves_nothing(place: Path, source: str) -> None:
    begun, go_on, path = place / "begun", place / "go-on", place / "models"
    path.mkdir()
    for fifo in (begun, go_on):
        os.mkfifo(fifo)
    (place / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'modelfs.holder' in sys.orig_argv:\n"
        f"    print(os.getpid(), file=open({str(begun)!r}, 'w'), flush=True)\n"
        f"    open({str(go_on)!r}).close()\n"
    )
    root = str(Path(package.__file__).parents[1])
    env = {**os.environ, **alone(place), "PYTHONPATH": os.pathsep.join([str(place), root])}
    words = [str(path), f"--source=m={source}", f"--cache-dir={place}/cache", f"--log-file={place}/log"]
    command = [sys.executable, "-W", "ignore", "-m", "modelfs", "mount", *words]
    with subprocess.Popen(command, env=env) as mount:
        holder = Path(f"/proc/{begun.read_text().strip()}/status")
        eventually(lambda: mountpoint.mount_at(path) is not None)  # the daemon is faster
        mount.terminate()
        eventually(lambda: _is_pending(holder, signal.SIGTERM) or "(zombie)" in holder.read_text())
        go_on.write_text("")
        assert mount.wait(60) == 128 + signal.SIGTERM
    assert left_behind(place) == []


def _is_pending(status: Path, number: int) -> bool:
    (pending,) = re.findall(r"^ShdPnd:\s+(\w+)$", status.read_text(), re.MULTILINE)
    return bool(int(pending, 16) >> (number - 1) & 1)


def test_a_daemon_has_neither_arguments_nor_files_nor_modules_of_who_mounted(
    place: Path, source: str, transport: str
) -> None:
    path, home = place / "models", place / "home"
    for directory in (path, home):
        directory.mkdir()
    (home / "hypercorn.py").write_text("raise RuntimeError('imported from the working directory')\n")
    words = [str(path), f"--source=m={source}", f"--transport={transport}", f"--cache-dir={place}/cache"]
    command = [sys.executable, "-W", "ignore", "-m", "modelfs", "mount", *words, f"--log-file={place}/log"]
    root = str(Path(package.__file__).parents[1])
    env = {**os.environ, **alone(place), "PYTHONPATH": root}
    out, into = os.pipe()
    with os.fdopen(out) as end:
        subprocess.run(command, cwd=home, env=env, stdin=into, pass_fds=(into,), check=True)
        os.close(into)
        assert end.read() == ""  # nobody has the other end any more
    status = json.loads(modelfs("status", str(path), "--json", env=alone(place)).stdout)
    process = Path(f"/proc/{status['pid']}")
    assert (process / "cmdline").read_bytes().rstrip(b"\0") == b"modelfs\0daemon"
    assert (process / "cwd").readlink() == Path("/")
    assert {(process / "fd" / number).readlink() for number in "12"} == {place / "log"}
    modelfs("umount", str(path), env=alone(place))
    assert left_behind(place) == []


@pytest.mark.usefixtures("device")
def test_a_user_without_privileges_mounts_reads_and_unmounts(place: Path, source: str) -> None:
    user = "nobody"
    account = pwd.getpwnam(user)
    home = place / "home"
    (home / "models").mkdir(parents=True)
    for path in (home, home / "models"):
        os.chown(path, account.pw_uid, account.pw_gid)
    program, variables = interpreter(user)
    root = str(Path(package.__file__).parents[1])
    env = {
        **alone(home),
        "HOME": str(home),
        "XDG_STATE_HOME": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, variables.get("PYTHONPATH")])),
    }

    def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return read_by(program, "-W", "ignore", "-m", "modelfs", *words, user=user, env=env, check=check)

    path = home / "models"
    words = ["mount", str(path), f"--source=m={source}", f"--cache-dir={home}/cache"]
    refused = run(*words, "--transport=kernel", check=False)
    assert (refused.returncode, refused.stderr) == (
        4,
        "modelfs: the kernel transport needs root; pyfuse3 does not\n",
    )
    refused = run(*words, "--allow-other", check=False)
    assert refused.returncode == 4
    assert re.fullmatch(r"modelfs: [^\n]*user_allow_other in /etc/fuse.conf[^\n]*\n", refused.stderr)
    result = run(*words, check=False)
    assert result.returncode == 0, result.stderr
    try:
        assert read_by("cat", f"{path}/m/config.json", user=user).stdout == "{}"
        status = json.loads(run("status", str(path), "--json").stdout)
        assert status["transport"] == {
            "name": "pyfuse3",
            "passthrough": False,
            "why": "the kernel transport needs root; pyfuse3 does not",
        }
    finally:
        run("umount", str(path))
    assert left_behind(home) == []


@pytest.mark.parametrize(
    ("transport", "flags", "allowed"),
    [("pyfuse3", [], False), ("kernel", [], False), ("kernel", ["--allow-other"], True)],
)
def test_only_allow_other_lets_other_users_read(
    transport: str, flags: list[str], allowed: bool, place: Path, source: str
) -> None:
    with mounted(place, *flags, sources={"m": source}, env=alone(place), transport=transport) as mount:
        file = str(mount.path / "m" / "config.json")
        assert read_by("cat", file).stdout == "{}"
        result = read_by("cat", file, user="nobody", check=False)
    assert result.stdout == ("{}" if allowed else "")
    assert ("Permission denied" in result.stderr) is not allowed
