"""The place where the tree appears: may it be mounted on, is something there, how to take it away.

What is mounted is read from ``/proc/self/mountinfo`` (proc_pid_mountinfo(5)), never by touching the mount: a
mount whose daemon is gone or stuck can fail or block whoever touches it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from modelfs.errors import MountError

log = logging.getLogger(__name__)

FSTYPE = "fuse.modelfs"
"""Type of our mounts in mountinfo; transports mount with ``subtype=modelfs``."""

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: `path` is where, `device` is ``MAJOR:MINOR``."""

    path: Path
    device: str
    fstype: str

    @property
    def ours(self) -> bool:
        """Whether this is a mount of modelfs, of this or another daemon."""
        return self.fstype == FSTYPE


def mounts(table: Path = Path("/proc/self/mountinfo")) -> list[Mount]:
    """Return every mount this process can see, in the order they were made."""
    found = []
    for line in table.read_bytes().splitlines():
        fields, _, rest = line.partition(b" - ")
        words = fields.split(b" ")
        path = Path(os.fsdecode(_unescaped(words[4])))
        found.append(Mount(path, words[2].decode(), _unescaped(rest.split(b" ")[0]).decode()))
    return found


def _unescaped(word: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), word)


def mount_at(path: Path) -> Mount | None:
    """Return the topmost mount at exactly `path` (as `canonical` returns it), or None."""
    return next((mount for mount in reversed(mounts()) if mount.path == path), None)


def mounted_for(device: str) -> list[int]:
    """Return a process of each mount namespace in which a mount of `device` is left, seen from here."""
    found: dict[str, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            namespace = str((process / "ns" / "mnt").readlink())
            if namespace not in found and any(m.device == device for m in mounts(process / "mountinfo")):
                found[namespace] = int(process.name)
        except OSError:
            continue  # it ended, or is not ours to look into
    return sorted(found.values())


def canonical(path: Path) -> Path:
    """Return `path` absolute and without symbolic links, not touching what is mounted at it."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  # resolve() would touch the mount
    direct = Path(os.path.realpath(absolute.parent)) / absolute.name
    return direct if mount_at(direct) else Path(os.path.realpath(direct))


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return ``call()``, made in a thread of its own.

    Raises:
        TimeoutError: after `seconds`; the thread stays behind, and does not keep the process from ending.

    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError
    return outcome[0]


def is_stale(path: Path, seconds: float = 10.0) -> bool:
    """Return whether `path` is a mount whose daemon is gone.

    Raises:
        MountError: if `path` does not answer within `seconds`.

    """
    try:
        within(seconds, lambda: os.statvfs(path))  # stat() is answered from the kernel's cache
    except TimeoutError:
        raise MountError(
            f"{path} does not answer: end the daemon that serves it, then modelfs umount --lazy {path}"
        ) from None
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def is_awaited(path: Path) -> bool:
    """Return whether an automount (autofs(5)) at `path` waits for a mount.

    Until it has one, it lets only its manager's process group through; all others who look at `path` wait.
    """
    mount = mount_at(path)
    return mount is not None and mount.fstype == "autofs"


def check_answers(path: Path, seconds: float = 10.0) -> None:
    """Return if `path` is a mount of ours that answers.

    Raises:
        MountError: it is not mounted, or does not answer within `seconds`.

    """
    try:
        within(seconds, lambda: (path.stat(), os.statvfs(path)))
    except TimeoutError:
        raise MountError(f"{path} was mounted but does not answer within {seconds:.0f} s") from None
    except OSError as error:
        raise MountError(f"{path} was mounted but does not answer: {error.strerror}") from error
    mount = mount_at(path)
    if mount is None or not mount.ours:
        raise MountError(f"{path} is not a modelfs mount although its daemon says so")


def _taken(path: Path) -> MountError:
    return MountError(f"{path} is a modelfs mount already: modelfs umount {path} first")


def prepare(path: Path, *, allow_other: bool = False) -> None:
    """Make sure that `path` (as `canonical` returns it) can be mounted on; take a stale mount of ours away.

    Raises:
        MountError: naming what is in the way and what to do.

    """
    mount = mount_at(path)
    while mount is not None and mount.ours:
        if not is_stale(path):
            raise _taken(path)
        log.warning("%s: removing the mount that a daemon left behind", path)
        detach(path, lazy=True)
        mount = mount_at(path)
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise MountError(f"{path} is not a directory: choose a directory to mount on")
        with os.scandir(path) as entries:
            if next(entries, None) is not None:
                if mount_at(path) is not None:  # it was made since we looked
                    raise _taken(path)
                raise MountError(f"{path} is not empty: choose an empty directory")
    except FileNotFoundError:
        raise MountError(f"{path} does not exist: mkdir -p {path}") from None
    except OSError as error:
        raise MountError(f"{path} cannot be used: {error.strerror}") from error
    _check_system(path, allow_other)


def _check_system(path: Path, allow_other: bool) -> None:
    if not Path("/dev/fuse").exists():
        raise MountError(
            "there is no /dev/fuse: modprobe fuse, or run the container with "
            "--device /dev/fuse --cap-add SYS_ADMIN"
        )
    if os.geteuid() == 0:
        return
    if _fusermount() is None:
        raise MountError(
            "there is no fusermount3, which users other than root need: install the package fuse3"
        )
    if not os.access(path, os.W_OK):
        raise MountError(f"{path} belongs to somebody else: choose a directory you may write to")
    if allow_other and not _user_allow_other():
        raise MountError(
            "allow_other needs the line user_allow_other in /etc/fuse.conf: add it, or mount as root"
        )


def _user_allow_other() -> bool:
    try:
        return any(
            line.strip() == "user_allow_other" for line in Path("/etc/fuse.conf").read_text().splitlines()
        )
    except OSError:
        return False


def _fusermount() -> str | None:
    return shutil.which("fusermount3") or shutil.which("fusermount")


def detach(path: Path, *, lazy: bool) -> None:
    """Take the topmost mount at `path` away.

    The kernel refuses while anything of it is in use. If `lazy`, the name disappears at once, and the mount
    itself when its last user is gone.

    Raises:
        MountError: it is in use (naming the processes that can be found), not mounted, or not ours to take.

    """
    code = _umount2(path, lazy) if os.geteuid() == 0 else _fusermount_u(path, lazy)
    if code == 0:
        return
    if code == errno.EBUSY:
        users = (
            ", ".join(f"{name} (pid {pid})" for pid, name in holders(path)) or "a process that cannot be seen"
        )
        raise MountError(f"{path} is in use by {users}: end it, or modelfs umount --lazy {path}")
    if code == errno.EINVAL:
        raise MountError(f"{path} is not mounted")
    raise MountError(f"{path} cannot be unmounted: {os.strerror(code)}")


def _umount2(path: Path, lazy: bool) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    return 0 if libc.umount2(os.fsencode(path), flags) == 0 else ctypes.get_errno()


def _fusermount_u(path: Path, lazy: bool) -> int:
    """Return 0 or the errno that fusermount's words stand for; it has no other way to say."""
    program = _fusermount()
    if program is None:
        raise MountError(f"{path} cannot be unmounted without fusermount3: install the package fuse3")
    command = [program, "-u", *(["-z"] if lazy else []), "--", str(path)]
    result = subprocess.run(  # noqa: S603  # our own words and a path
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    if result.returncode == 0:
        return 0
    words = {os.strerror(code): code for code in (errno.EBUSY, errno.EINVAL, errno.EPERM)}
    for text, code in words.items():
        if text in result.stderr:
            return code
    if mount_at(path) is None:
        return errno.EINVAL
    raise MountError(f"{path} cannot be unmounted: {result.stderr.strip() or 'fusermount failed'}")


def holders(path: Path) -> list[tuple[int, str]]:
    """Return ``(pid, name)`` of the processes seen to use something under `path`.

    Only links and maps under ``/proc`` are read, never the mount itself: it may be stuck.
    """
    prefix = f"{path}/"
    found = []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda p: int(p.name)):
        if any(used == str(path) or used.startswith(prefix) for used in _used_paths(process)):
            try:
                name = (process / "comm").read_text().strip()
            except OSError:  # it ended meanwhile
                continue
            found.append((int(process.name), name))
    return found


def _used_paths(process: Path) -> Iterator[str]:
    """Yield the paths `process` works in, has open or has mapped; nothing of what we may not see."""
    links = [process / "cwd", process / "root", process / "exe"]
    with contextlib.suppress(OSError):
        links += (process / "fd").iterdir()
    for link in links:
        with contextlib.suppress(OSError):
            yield str(link.readlink())
    with contextlib.suppress(OSError):
        for line in (process / "maps").read_bytes().splitlines():
            words = line.split(maxsplit=5)
            if len(words) == 6:
                yield os.fsdecode(words[5])
