"""A node without a cluster: pods in namespaces that see what kubelet and its runtime would show them.

The host is this process's own mount namespace, with a shared directory as its root for ``hostPath``. What a
runtime does for a container is in runc's libcontainer/rootfs_linux.go: a namespace, a root of its own on a
mount that is private, volumes bound into it, each with the propagation that is asked for, and pivot_root(2).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from modelfs.fuse import mountpoint
from tests.dockerfile import Image
from tests.mount.harness import Reader, eventually, interpreter, unused_port

REPOSITORY = Path(__file__).parents[1]
MACHINE = Image(
    Path("/"),
    {
        "PATH": f"{REPOSITORY}/packaging/container:{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(REPOSITORY),
    },
)
"""This machine as an image: with the real scripts, and the modelfs of this checkout."""

PROPAGATION = {None: "rprivate", "HostToContainer": "rslave", "Bidirectional": "rshared"}

Spec = dict[str, Any]


class Node:
    """A node whose host paths are below `root`, a directory that is a shared mount."""

    def __init__(self, place: Path) -> None:
        self.root = place / "node"
        self.pods: list[Pod] = []
        self._place = place
        self._numbers = itertools.count()

    def run(self, spec: Spec, files: Mapping[str, str] | None = None, image: Image | None = None) -> Pod:
        """Start a pod of `spec`, its first container alone.

        Args:
            spec: as in a manifest.
            files: those of every ConfigMap.
            image: of the container; None is this machine.

        """
        pod = Pod(self, self._place / f"pod-{next(self._numbers)}", spec, files or {}, image or MACHINE)
        self.pods.append(pod)
        pod.start()
        return pod

    def mounts(self) -> list[Path]:
        """Return where something of ours is mounted in the host's namespace."""
        return [m.path for m in mountpoint.mounts() if m.ours and self.root in m.path.parents]

    def close(self) -> None:
        for pod in self.pods:
            pod.kill()
        for path in reversed(self.mounts()):
            mountpoint.detach(path, lazy=True)


class Pod:
    """A pod with one container: `start` begins it, also again after a crash, with the same volumes."""

    def __init__(
        self, node: Node, directory: Path, spec: Spec, files: Mapping[str, str], image: Image
    ) -> None:
        self._node = node
        self._directory = directory
        self._spec = spec
        self._files = files
        self._image = image
        self.container: Spec = spec["containers"][0]
        context = self.container.get("securityContext", {})
        self._user = context.get("runAsUser", 0)
        self._foreign = not spec.get("hostPID", False)
        # All pods have the node's network: each gets ports of its own for those that it names.
        self._ports = {each["containerPort"]: unused_port() for each in self.container.get("ports", [])}
        given = {each["name"]: each["value"] for each in self.container.get("env", []) if "value" in each}
        self.env = {**image.env, **{name: self._with_ports(value) for name, value in given.items()}}
        self.log = directory / "log"
        directory.mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self._namespace = ""

    # -- what kubelet does -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start the container, in namespaces of its own."""
        number = next(self._node._numbers)
        root = self._directory / f"container-{number}"
        root.mkdir()
        words = ["unshare", "--mount", "--propagation=unchanged"]
        words += ["--pid", "--fork", "--kill-child"] if self._foreign else []
        script = "\n".join(self._script(root))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, "sh", "-euc", script, "sh", *self._as_user(), *self.container["command"]],
                env=self.env,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
            )
        assert self.process.stdout is not None
        with self.process.stdout as begun:
            assert begun.readline() == b"begun\n", self.log.read_text()
        self._namespace = os.readlink(f"/proc/{self._pid()}/ns/mnt")

    def probe(self, name: str) -> bool:
        """Return whether the container's probe of this name succeeds."""
        probe = self.container[name]
        asked, seconds = probe["httpGet"], probe["timeoutSeconds"]
        (number,) = [
            each["containerPort"] for each in self.container["ports"] if each["name"] == asked["port"]
        ]
        url = f"http://127.0.0.1:{self._ports[number]}{asked['path']}"
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(url, timeout=seconds, trust_env=False).is_success
        return False

    def await_ready(self) -> None:
        """Return when the startup probe has succeeded, and then the readiness probe too."""
        for name in ("startupProbe", "readinessProbe"):
            eventually(lambda name=name: self.ended() or self.probe(name), 90)  # type: ignore[misc]
            assert not self.ended(), self.log.read_text()
        assert self.probe("livenessProbe")

    def terminate(self) -> int:
        """End the pod as when it is deleted; return the exit code, -9 if its grace period was too short."""
        grace = self._spec.get("terminationGracePeriodSeconds", 30)
        assert self.process is not None
        stop = self.container.get("lifecycle", {}).get("preStop")
        if stop:
            self.exec(*stop["exec"]["command"], timeout=grace)
        # kubelet asks the main process alone; in a container without hostPID it is the namespace's first.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid() or self.process.pid, signal.SIGTERM)
        try:
            return self.process.wait(min(grace, 60))
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill all that runs in the container, as when it is out of memory or the runtime is restarted."""
        if self.process is None:
            return
        while pids := self._pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid), "rb") as ending:
                    os.kill(pid, signal.SIGKILL)
                    select.select(
                        [ending], [], [], 30
                    )  # its sockets live a little longer than its namespaces
            self.process.poll()
        self.process.kill()
        self.process.wait()
        self.process = None

    def ended(self) -> bool:
        """Return whether the container's main process has ended."""
        return self.process is None or self.process.poll() is not None

    # -- what runs in it -------------------------------------------------------------------------------

    def exec(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, with its user's rights, and return what came of it."""
        return subprocess.run(
            [*self._inside(), *words],
            env=self.env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def reader(self, code: str, *args: object) -> Reader:
        """Start a `Reader` in the container, with its user's rights."""
        return Reader(code, *args, within=self._inside(), python=interpreter("nobody")[0])

    def mounts(self, path: str) -> list[str]:
        """Return the types of what is mounted at exactly `path` of the container, the first one first."""
        table = mountpoint.mounts(Path(f"/proc/{self._pid()}/mountinfo"))
        return [mount.fstype for mount in table if mount.path == Path(path)]

    # -- how -------------------------------------------------------------------------------------------

    def _with_ports(self, value: str) -> str:
        for named, used in self._ports.items():
            value = re.sub(rf":{named}$", f":{used}", value)
        return value

    def _inside(self) -> list[str]:
        pid = self._pid()
        assert pid is not None, "the container has ended"
        namespaces = ["--mount", "--pid"] if self._foreign else ["--mount"]
        return ["nsenter", f"--target={pid}", *namespaces, *self._as_user()]

    def _as_user(self) -> list[str]:
        if not self._user:
            return []
        return ["setpriv", f"--reuid={self._user}", f"--regid={self._user}", "--clear-groups"]

    def _pid(self) -> int | None:
        """Return the id that the container's main process has for the host."""
        if self.process is None or not self._foreign:
            return self.process and self.process.pid
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def _pids(self) -> list[int]:
        """Return the processes in the container's mount namespace; those that were sent into it too."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/mnt") == self._namespace:
                    found.append(int(process.name))
        return found

    def _script(self, place: Path) -> Iterator[str]:
        """Yield the commands that make the container's root in `place` and change to it."""
        root = f"{place}/root"
        yield f"mount --make-private $(stat --format=%m {place})"
        yield f"mount -t tmpfs tmpfs {place}"
        yield f"mkdir {place}/upper {place}/work {root}"
        layers = f"lowerdir={self._image.root},upperdir={place}/upper,workdir={place}/work"
        yield f"mount -t overlay -o {layers} overlay {root}"
        for path in ("/dev", "/sys", *([] if self._foreign else ["/proc"])):
            yield f"mount --rbind {path} {root}{path} && mount --make-rslave {root}{path}"
        if self._foreign:
            yield f"mount -t proc proc {root}/proc"
        sources = {volume["name"]: self._source(volume) for volume in self._spec["volumes"]}
        mounts = sorted(self.container["volumeMounts"], key=lambda mount: str(mount["mountPath"]))
        for mount in mounts:
            source, target = shlex.quote(str(sources[mount["name"]])), f"{root}{mount['mountPath']}"
            yield f"test -e {target} || mkdir -p {target}"
            yield f"mount --rbind {source} {target}"
            yield f"mount --make-{PROPAGATION[mount.get('mountPropagation')]} {target}"
            if mount.get("readOnly"):
                yield f"mount -o remount,bind,ro {target}"
        for path in (REPOSITORY, Path(sys.prefix)) if self._image is MACHINE else ():  # volumes may hide them
            if any(Path(mount["mountPath"]) in path.parents for mount in mounts):
                yield f"mkdir -p {root}{path} && mount --bind {path} {root}{path}"
        yield f"mkdir {root}/.old && cd {root} && pivot_root . .old"
        if self.container.get("securityContext", {}).get("readOnlyRootFilesystem"):
            yield "mount -o remount,bind,ro /"
        yield "mount --make-rslave /.old && umount --lazy /.old"
        yield 'echo begun; exec "$@" >&2'

    def _source(self, volume: Spec) -> Path:
        """Return the directory or file of the host that is the pod's `volume`."""
        if "hostPath" in volume:
            path = volume["hostPath"]["path"]
            if volume["hostPath"]["type"] == "CharDevice":
                return Path(path)
            source = Path(f"{self._node.root}{path}")
        else:
            source = self._directory / volume["name"]
        if "configMap" in volume and not source.exists():
            source.mkdir()
            for name, text in self._files.items():
                (source / name).write_text(text)
        assert source.exists() or volume.get("hostPath", {}).get("type") != "Directory", f"no {source}"
        source.mkdir(parents=True, exist_ok=True)
        return source


@contextmanager
def node(place: Path) -> Iterator[Node]:
    """Yield a node without pods below `place`; in the end nothing runs and nothing is mounted."""
    own = Node(place)
    own.root.mkdir()
    subprocess.run(["mount", "--bind", own.root, own.root], check=True)
    try:
        subprocess.run(["mount", "--make-shared", own.root], check=True)
        yield own
    finally:
        own.close()
        subprocess.run(["umount", "--lazy", own.root], check=True)
        assert [mount for mount in mountpoint.mounts() if place in mount.path.parents] == []
