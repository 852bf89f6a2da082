"""Where the control sockets of this user's daemons lie, and which daemons are alive.

Beside each socket lies a record: a JSON file that says whose it is. The socket alone decides who is alive:
the kernel closes it with its process, however that ends, and tells the process's id.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from modelfs.errors import MountError

MAX_SOCKET_PATH = 107
"""Bytes of the longest path of a Unix socket on Linux (unix(7)), without the terminating NUL."""


@dataclass(frozen=True, slots=True)
class Record:
    """One daemon: `pid` serves `mountpoint` since `started` with modelfs `version`."""

    mountpoint: Path
    pid: int
    started: float
    version: str


def runtime_dir() -> Path:
    """Return the directory of this user's control sockets; make it if needed.

    ``$MODELFS_RUNTIME_DIR``, or ``/run/modelfs`` for root, or ``$XDG_RUNTIME_DIR/modelfs``, or
    ``/tmp/modelfs-UID``.

    Raises:
        MountError: it cannot be made, or others could write to it.

    """
    if os.environ.get("MODELFS_RUNTIME_DIR"):
        path = Path(os.environ["MODELFS_RUNTIME_DIR"]).absolute()
    elif os.geteuid() == 0:
        path = Path("/run/modelfs")
    elif os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(os.environ["XDG_RUNTIME_DIR"]) / "modelfs"
    else:
        path = Path(f"/tmp/modelfs-{os.geteuid()}")  # noqa: S108  # checked below
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise MountError(
            f"{path} cannot be made: {error.strerror}: name another directory with MODELFS_RUNTIME_DIR"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise MountError(
            f"{path} is not a directory that only you can write to: name another with MODELFS_RUNTIME_DIR"
        )
    return path


def socket_path(mountpoint: Path) -> Path:
    """Return the control socket of the daemon that serves `mountpoint`.

    Raises:
        MountError: as `runtime_dir`, or the path would be too long for a socket.

    """
    name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]
    path = runtime_dir() / f"{name}.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise MountError(
            f"{path} is too long for a socket: name a shorter directory with MODELFS_RUNTIME_DIR"
        )
    return path


@contextlib.contextmanager
def _changing(directory: Path) -> Iterator[None]:
    """Be the only one who makes or removes sockets in `directory`.

    Who finds a dead daemon's socket would else remove that of its successor, which appears at the same path.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on `path`; remove it and its record in the end, unless another daemon has taken it over.

    Raises:
        MountError: the socket cannot be made.

    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            with _changing(path.parent):
                path.unlink(missing_ok=True)
                listener.bind(str(path))
                # Before listen(): until then nobody can connect. A umask would be the whole process's.
                path.chmod(0o600)
                listener.listen()
                own = path.stat().st_ino
        except OSError as error:
            raise MountError(f"{path}: cannot listen: {error.strerror or error}") from error
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError), _changing(path.parent):
                if path.stat().st_ino == own:
                    remove(path)


@contextlib.contextmanager
def announced(path: Path, record: Record) -> Iterator[socket.socket]:
    """Listen on `path` with `record` beside it; whoever connects waits until somebody answers.

    Both are removed in the end. The mount decides who serves a mountpoint: a daemon that still listens there
    was detached from it, and loses its socket.

    Raises:
        MountError: the socket cannot be made.

    """
    with listening(path) as listener:
        write_record(path, record)
        yield listener


def web_listener(address: str) -> socket.socket:
    """Listen on `address`, ``HOST:PORT`` as the configuration gives it; port 0 is any free one.

    Raises:
        MountError: the address cannot be had.

    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family)
    except OSError as error:
        why = error.strerror or error
        raise MountError(f"http: cannot listen on {address}: {why}: choose another address") from error


def write_record(sock: Path, record: Record) -> None:
    """Put `record` beside the socket `sock`, at once or not at all."""
    new = sock.with_suffix(".new")
    new.write_text(json.dumps({**asdict(record), "mountpoint": str(record.mountpoint)}))
    new.replace(sock.with_suffix(".json"))


def remove(sock: Path) -> None:
    """Remove the socket `sock` and its record."""
    for path in (sock, sock.with_suffix(".json")):
        path.unlink(missing_ok=True)


def peer_pid(sock: Path) -> int | None:
    """Return the id of the process that listens on `sock`; None if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        try:
            connection.connect(str(sock))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise MountError(
                f"{sock}: {error.strerror or error}: only the user who mounted can ask"
            ) from error
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", raw)[0]
        return pid


def find(mountpoint: Path) -> Record | None:
    """Return the record of the living daemon that serves `mountpoint`, or None."""
    return next((record for record in mounts() if record.mountpoint == mountpoint), None)


def mounts() -> list[Record]:
    """Return the living daemons of this user; remove what dead ones left behind."""
    found = []
    for path in sorted(runtime_dir().glob("*.json")):
        sock = path.with_suffix(".sock")
        pid = peer_pid(sock)
        if pid is None:
            with _changing(sock.parent):
                if peer_pid(sock) is None:
                    remove(sock)
            continue
        with contextlib.suppress(FileNotFoundError):  # it ended between two lines
            record = json.loads(path.read_text())
            found.append(Record(Path(record["mountpoint"]), pid, record["started"], record["version"]))
    return sorted(found, key=lambda record: record.mountpoint)
