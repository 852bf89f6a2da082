"""Start a daemon in the background and wait until its mount answers; end one and wait until it is gone."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import logging
import os
import re
import select
import signal
import site
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NoReturn

import modelfs
from modelfs import control, holder, privileges, service
from modelfs.config import Settings
from modelfs.errors import ModelfsError, MountError
from modelfs.fuse import mountpoint
from modelfs.fuse.ledger import Held

log = logging.getLogger(__name__)

START_SECONDS = 600.0
"""How long a daemon may take to resolve its models and mount."""

STOP_SECONDS = 20.0
"""How long a daemon may take to end after its mount is gone."""

LINGER_SECONDS = 2.0
"""How long a lazy unmount waits to see whether anybody still uses the mount."""


def default_log_file(mountpoint: Path, env: Mapping[str, str] | None = None) -> Path:
    """Return the log file of a background daemon that serves `mountpoint`.

    Raises:
        MountError: the user has no home directory for it.

    """
    env = os.environ if env is None else env
    # As systemd-escape --path does it: readable, and no two mountpoints have the same.
    name = re.sub(
        r"[^A-Za-z0-9_.,:/]",
        lambda match: "".join(f"\\x{byte:02x}" for byte in os.fsencode(match[0])),
        str(mountpoint).strip("/"),
    ).replace("/", "-")
    if len(name) > 200:
        name = f"{name[-180:]}-{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]}"
    name = f"{name or '-'}.log"
    if os.geteuid() == 0:
        return Path("/var/log/modelfs") / name
    try:
        state = Path(env.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    except RuntimeError:
        raise MountError("you have no home directory for a log: name a file with --log-file") from None
    return state.absolute() / "modelfs" / name


def log_to(file: Path | None, level: str) -> None:
    """Send this process's log to `file`, by default standard error, from `level` on.

    The libraries we use are heard from WARNING on: their own debug output shows signed URLs and headers.
    """
    handler = logging.StreamHandler() if file is None else logging.FileHandler(file)
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("modelfs").setLevel(level.upper())


def foreground(settings: Settings) -> None:
    """Run the daemon in this process until it is unmounted or told to end.

    As the main process of a service it becomes the holder, if one can keep the mount.

    Raises:
        ModelfsError: as `daemon.run`, or another modelfs mounts there.

    """
    if settings.log_file is not None:
        _open_log(settings.log_file).close()
    if service.is_there() and _is_held(settings):
        _become_holder(settings)
    log_to(settings.log_file, settings.log_level)
    with _claim(settings.mountpoint) as claim:

        def ready(summary: dict[str, Any]) -> None:
            claim.close()
            service.tell("READY=1")
            log.info("ready: %s", settings.mountpoint)

        _run_daemon(settings, ready, None)


def _become_holder(settings: Settings) -> NoReturn:
    """Replace this process by a holder, which keeps its id: the service manager knows us by it."""
    if settings.log_file is not None:
        with _open_log(settings.log_file) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
    _hold(settings)


def _hold(settings: Settings, *words: object) -> NoReturn:
    """Replace this process by a holder, with `words` after the mountpoint."""
    memory = os.memfd_create("modelfs settings")  # they may hold secrets, so no command line sees them
    with os.fdopen(os.dup(memory), "wb") as file:
        file.write(json.dumps(settings.to_json()).encode())
    os.dup2(memory, 0)
    # -P: the working directory is no place to import from.
    command = [sys.executable, "-P", "-m", "modelfs.holder", str(settings.mountpoint), *map(str, words)]
    os.execve(sys.executable, command, _environment())  # noqa: S606  # our own words


def _run_daemon(settings: Settings, ready: Callable[[dict[str, Any]], None], held: Held | None) -> None:
    """Run the daemon; end the process with `holder.LEFT` if it left its mount to a successor."""
    privileges.limit(privileges.needed(settings.cache.directory))
    from modelfs import daemon  # libfuse, libcurl and more: only the daemon's process pays for them

    if daemon.run(settings, ready=ready, held=held):
        raise SystemExit(holder.LEFT)


def _is_held(settings: Settings) -> bool:
    """Return whether a holder shall keep the mount, so that it outlives its daemon."""
    return settings.transport != "pyfuse3" and os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)


def background(settings: Settings) -> dict[str, Any]:
    """Start a daemon in a session of its own, wait until its mount answers, and return what it says of it.

    It is a fork of this process, which must have no other threads.

    Whatever fails before that, also an interrupt or SIGTERM, ends the daemon and leaves nothing mounted.

    Raises:
        ModelfsError: what the daemon said, that it did not come up, or that another modelfs mounts there.
        SystemExit: on SIGTERM and SIGHUP, with 128 and the signal's number.

    """
    file = settings.log_file or default_log_file(settings.mountpoint)
    ready, told = os.pipe()
    with (
        os.fdopen(ready, "rb", buffering=0) as answers,
        os.fdopen(told, "wb", buffering=0) as teller,
        _open_log(file) as output,
        _claim(settings.mountpoint),
        _leaving_on_signals(),
    ):
        start = output.seek(0, os.SEEK_END)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        process = os.fork()
        if not process:
            _descend(replace(settings, log_file=file), teller.fileno(), output.fileno())
        try:
            teller.close()
            summary = _await_ready(answers, file, start)
            mountpoint.check_answers(settings.mountpoint)
            return summary
        except BaseException:
            _abandon(process, settings.mountpoint)
            raise


def _descend(settings: Settings, ready: int, output: int) -> NoReturn:
    """Be a daemon, as a child that has nothing in common with its parent but what it imported."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _let_go(keep={1, 2, ready})
        if not sys.flags.safe_path:  # then the first is no place for a daemon to import from
            sys.path[0] = _root()
        if not mountpoint.is_awaited(settings.mountpoint):
            os.setsid()
        held = holder.begin() if _is_held(settings) else None
        if held is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, holder.SIGNALS)
            if daemon := os.fork():
                for fd in (held.device, held.ledger):
                    os.set_inheritable(fd, True)
                _hold(settings, held.device, held.ledger, daemon)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, holder.SIGNALS)
        _entitle("modelfs daemon")
        _serve(settings, ready, held)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        log.critical("the daemon ended", exc_info=True)
    finally:
        logging.shutdown()
        os._exit(code)


def _let_go(keep: set[int]) -> None:
    """Close what this process has inherited, all but `keep`.

    The numbers stay in use: to whom they belong here may close them at any time.
    """
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in {int(entry.name) for entry in Path("/proc/self/fd").iterdir()} - {nothing, *keep}:
        os.dup2(nothing, fd, inheritable=fd == 0)


def _entitle(title: str) -> None:
    """Let process lists show `title` and not our arguments, which were another command's; proc(5)."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    ctypes.memmove(start, title.replace(" ", "\0").encode().ljust(end - start, b"\0"), end - start)


def _claim(path: Path) -> IO[bytes]:
    """Become the only one of this user's processes that mounts on `path`, until what is returned is closed.

    Two at once would both find the place free, and mount one on the other.

    Raises:
        MountError: another one is at it.

    """
    claim = control.socket_path(path).with_suffix(".lock").open("ab")
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claim.close()
        raise MountError(f"{path} is being mounted already: wait for the other modelfs mount") from None
    return claim


@contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """Let the first SIGTERM or SIGHUP raise SystemExit, so that what was begun is undone."""

    def leave(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    # Under nohup SIGHUP is ignored, and stays so.
    before = {n: signal.signal(n, leave) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _root() -> str:
    """Return the directory that this very modelfs is imported from."""
    return str(Path(modelfs.__file__).parents[1])


def _environment() -> dict[str, str]:
    """Return this process's environment, in which a Python finds this very modelfs, installed or not."""
    root = _root()
    # Those of a package lie behind a symbolic link: with the path it leads to now, no upgrade would be seen.
    if root in map(os.path.realpath, (*site.getsitepackages(), site.getusersitepackages())):
        return dict(os.environ)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _await_ready(answers: IO[bytes], file: Path, start: int) -> dict[str, Any]:
    """Return what the daemon says when it is ready.

    Raises:
        ModelfsError: it said why it cannot be, ended without a word, or took too long.

    """
    deadline = time.monotonic() + START_SECONDS
    said = b""
    while not said.endswith(b"\n"):
        if not select.select([answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise MountError(f"the daemon was not ready within {START_SECONDS:.0f} s: see {file}")
        part = answers.read(65536)
        if not part:
            raise MountError(f"the daemon ended before it was ready: {_last_line(file, start)}: see {file}")
        said += part
    answer: dict[str, Any] = json.loads(said)
    if "error" in answer:
        raise control.error_of(answer)
    return answer


def _abandon(process: int, path: Path) -> None:
    """End our child, a daemon that did not come up, and take away what it may have mounted.

    What answers is another's, mounted before it or meanwhile.
    """
    os.kill(process, signal.SIGTERM)
    if not _ended(process, STOP_SECONDS):
        if os.getpgid(process) == process:
            os.killpg(process, signal.SIGKILL)  # a holder's daemon too
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    mount = mountpoint.mount_at(path)
    if mount is not None and mount.ours and mountpoint.is_stale(path):
        mountpoint.detach(path, lazy=True)


def serve_background(ready_fd: int | None, held: Held | None) -> None:
    """Be the daemon that a holder started, with the settings on standard input.

    Args:
        ready_fd: where one line of JSON says that the mount answers or why not.
        held: what the holder keeps.

    """
    _serve(Settings.from_json(json.load(sys.stdin)), ready_fd, held)


def _serve(settings: Settings, ready_fd: int | None, held: Held | None) -> None:
    """Be a daemon whose standard error is its log.

    Raises:
        SystemExit: it failed, or left its mount to a successor.

    """
    for fd in (ready_fd, *((held.device, held.ledger) if held else ())):
        if fd is not None:
            os.set_inheritable(fd, False)
    os.chdir("/")  # keep no directory busy
    log_to(None, settings.log_level)  # standard error is the log file
    if not mountpoint.is_awaited(settings.mountpoint):
        _leave_group()

    def tell(answer: dict[str, Any]) -> None:
        if ready_fd is None:
            return
        with suppress(OSError), os.fdopen(ready_fd, "w") as pipe:  # closed: told already, or nobody waits
            pipe.write(json.dumps(answer) + "\n")

    def ready(summary: dict[str, Any]) -> None:
        _leave_group()
        tell({"ok": True, **summary})

    try:
        _run_daemon(settings, ready, held)
    except Exception as error:
        known = isinstance(error, ModelfsError)
        log.error("%s", error, exc_info=None if known else error)
        text = str(error) if known else f"unexpected {type(error).__name__}: see {settings.log_file}"
        tell({"error": text, "kind": type(error).__name__ if known else "ModelfsError"})
        raise SystemExit(1) from None


def _leave_group() -> None:
    """Leave the process group of an automount's manager, if it is that: for its own there is no automount."""
    if os.getpgrp() not in (os.getpid(), os.getppid()):
        os.setsid()


def end(path: Path, *, lazy: bool) -> str:
    """Unmount `path` (as `mountpoint.canonical` returns it), wait for its daemon, and say what was done.

    The kernel decides whether the mount is in use: nobody who reads is cut off. If `lazy`, the name
    disappears at once and the daemon serves whoever has files open until they are closed.

    Raises:
        MountError: not mounted, not ours, in use, or the daemon does not end.

    """
    mount, record = mountpoint.mount_at(path), control.find(path)
    if mount is None and record is None:
        raise MountError(f"{path} is not mounted: modelfs status lists what is")
    if mount is not None:
        if not mount.ours:
            raise MountError(f"{path} is a mount of type {mount.fstype}, not one of modelfs: umount {path}")
        stale = record is None and not lazy and mountpoint.is_stale(path)
        mountpoint.detach(path, lazy=lazy or stale)
        if stale:
            return f"removed the mount that a daemon left behind on {path}"
    elif record is not None:  # its mount is not in our view of the file system
        control.ControlClient(control.socket_path(path)).stop()
    if record is None or _ended(record.pid, LINGER_SECONDS if lazy else STOP_SECONDS):
        return f"unmounted {path}"
    if lazy:
        return f"detached {path}; its daemon (pid {record.pid}) ends when the last open file is closed"
    why = f"{path} is unmounted but its daemon (pid {record.pid}) did not end within {STOP_SECONDS:.0f} s: "
    elsewhere = mountpoint.mounted_for(mount.device) if mount else []
    if elsewhere:
        pids = ", ".join(map(str, elsewhere))
        raise MountError(f"{why}it is still mounted for the containers of these processes: {pids}")
    raise MountError(f"{why}see its log, then end it with kill")


def upgrade(path: Path) -> str:
    """Let a daemon of the version installed now take over the mount on `path`; say what was done.

    Raises:
        MountError: the mount has no holder, or no successor came within `STOP_SECONDS`.

    """
    client = control.ControlClient(control.socket_path(path))
    before = client.status()
    client.hand_over()
    if not _ended(before["pid"], STOP_SECONDS):
        raise MountError(f"the daemon (pid {before['pid']}) does not leave {path}: see {before['log']}")
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if control.find(path) is not None:
            now = client.status()
            return (
                f"{path}: modelfs {before['modelfs']} (pid {before['pid']}) → "
                f"{now['modelfs']} (pid {now['pid']})"
            )
        time.sleep(0.1)  # a socket that does not exist yet cannot be waited for
    raise MountError(f"no daemon took over {path} within {STOP_SECONDS:.0f} s: see {before['log']}")


def _ended(pid: int, seconds: float) -> bool:
    """Return whether the process `pid` ends within `seconds`."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _open_log(file: Path) -> IO[bytes]:
    """Return the log file, made if needed, open for appending.

    Raises:
        MountError: it cannot be written.

    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.fdopen(os.open(file, flags, 0o640), "ab", buffering=0)
    except OSError as error:
        raise MountError(f"the log {file} cannot be written: {error.strerror}: use --log-file") from error


def _last_line(file: Path, start: int) -> str:
    """Return the last line that was written to `file` after its first `start` bytes."""
    with file.open("rb") as log_file:
        log_file.seek(max(start, log_file.seek(0, os.SEEK_END) - 8192))
        lines = log_file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
