"""The stores of the demo, and its janitor: ``python -m demo.stores DIRECTORY MOUNTPOINT MODEL…``.

Starts a Hub and an S3 server, puts the models into them and prints one line of JSON: their URLs, and the
environment that leads every client to them. Then obeys lines on standard input, each answered by an empty
one: ``stop`` and ``start`` switch the stores off and on, ``keep`` leaves the mount alone from then on.

When standard input ends, the mount is taken away, unless it is to be kept. When it is gone, by whomever, and
its daemon too, DIRECTORY is removed, and everything ends. So nothing outlives a demo that was killed.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo.models import BUCKET, MODELS
from modelfs.fuse import mountpoint
from modelfs.testing.hub import HubServer
from modelfs.testing.s3 import S3Server

POLL_SECONDS = 0.5


def main(directory: Path, place: Path, names: Sequence[str]) -> None:
    """Serve until standard input has ended and nothing is mounted on `place` any more."""
    zoo = directory / "zoo"
    with making(zoo, names) as maker, HubServer() as hub, S3Server() as s3:
        if maker.wait():
            raise SystemExit(f"tests.zoo ended with status {maker.returncode}")
        seed(zoo, names, hub, s3)
        tell({"urls": {"hf": hub.url, "s3": s3.url}, "env": {**hub.env(), **s3.env()}})
        kept = obey(hub, s3)
        if not kept and mountpoint.mount_at(place) is not None:
            words = [sys.executable, "-m", "modelfs", "umount", "--lazy", str(place)]
            subprocess.run(words, check=False)  # if it fails, serving goes on as long as the mount
        while mountpoint.mount_at(place) is not None:
            time.sleep(POLL_SECONDS)
    await_release(directory / "cache" / "lock")
    shutil.rmtree(directory)


def making(zoo: Path, names: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start to make the models `names`, in a process that holds torch no longer than that takes."""
    made = [MODELS[name].zoo for name in names]
    command = [sys.executable, "-W", "ignore", "-m", "tests.zoo", str(zoo), *made]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)


def seed(zoo: Path, names: Sequence[str], hub: HubServer, s3: S3Server) -> None:
    """Put each of the models `names` into its store."""
    s3.client().create_bucket(Bucket=BUCKET)
    for name in names:
        model = MODELS[name]
        root = zoo / model.zoo
        files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
        where = model.source.partition("://")[2]
        if model.scheme == "hf":
            hub.add(where, files)
            continue
        bucket, _, prefix = where.partition("/")
        for path, file in files.items():
            s3.put_file(bucket, f"{prefix}{path}", file)


def tell(answer: dict[str, object] | None = None) -> None:
    """Print one line for whoever started this process."""
    print(json.dumps(answer) if answer else "", flush=True)


def obey(hub: HubServer, s3: S3Server) -> bool:
    """Do what standard input says until it ends; return whether the mount is to be kept."""
    kept = False
    for line in sys.stdin:
        match line.strip():
            case "stop":
                hub.stop()
                s3.stop()
            case "start":
                hub.start()
                s3.start()
            case "keep":
                kept = True
            case unknown:
                raise ValueError(f"not a command: {unknown!r}")
        tell()
    return kept


def await_release(lock: Path) -> None:
    """Return when no daemon holds the lock of its cache any more (docs/cache.md)."""
    if lock.exists():
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
