"""A machine on this one: systemd as the first process of a fresh Debian, for packages and units."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests import debian
from tests.mount.harness import eventually

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private"]

BOOT = """
set -e
cd "$1"
umount --all --lazy --types fuse.modelfs
mount -t proc proc proc
mount --rbind -o ro /sys sys
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for node in null zero full random urandom tty fuse autofs; do
  touch dev/$node
  mount --bind /dev/$node dev/$node
done
exec chroot . /lib/systemd/systemd --system --log-target=console --show-status=no --unit=basic.target
"""
"""Nothing that starts may touch what all machines share: /sys is read-only, /dev has only what is needed.

Mounts of other tests are not kept: in a namespace that still has them they could not end.
"""


class Machine:
    """One that runs; `root` is its root directory, seen from outside and without what is mounted inside."""

    def __init__(self, root: Path, process: int, env: Mapping[str, str]) -> None:
        self.root = root
        self._inside = ["nsenter", "--target", str(process), "--mount", "--pid", "--root", "--wd"]
        self._env = {
            "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            **env,
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a program that talks through pipes."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*self._inside, *words],
            env=self._env,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, check: bool = True) -> str:
        """Run a program; return what it printed, also as the reason if it fails."""
        with self.start(*words) as process:
            said, _ = process.communicate(timeout=240)
        assert not check or process.returncode == 0, f"{' '.join(words)}: {process.returncode}: {said}"
        return said.strip()

    def sh(self, script: str) -> str:
        """Run a shell script that ends with its first error."""
        return self.run("sh", "-ec", script)


@contextmanager
def booted(env: Mapping[str, str]) -> Iterator[Machine]:
    """Yield a machine whose programs have the variables `env`, also what its systemd starts."""
    with debian.copied(debian.base_root()) as root:
        shutil.rmtree(root / "lib/systemd/system/sysinit.target.wants")
        (root / "etc/machine-id").write_text("")
        log = (root.parent / "systemd.log").open("wb")
        process = subprocess.Popen(
            [*UNSHARE, "sh", "-c", BOOT, "sh", root],
            env={"container": "modelfs-test"},
            stdout=log,
            stderr=log,
        )
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            eventually(children.read_text)
            machine = Machine(root, int(children.read_text()), env)
            active = ["systemctl", "is-active", "basic.target"]
            eventually(lambda: machine.run(*active, check=False) == "active")
            machine.run("systemctl", "set-environment", *(f"{name}={value}" for name, value in env.items()))
            yield machine
        finally:
            process.kill()
            process.wait()
            log.close()
