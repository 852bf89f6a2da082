"""A fresh Debian to install into: its root directory is made once per checkout, every test writes to a copy.

It is the release of this machine, from the mirror that apt uses here, with what a plain host has: no
compiler, no pip. Copies are overlays, so they cost nothing. Needs root and mmdebstrap(1).
"""

from __future__ import annotations

import fcntl
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build"

INCLUDED = ("ca-certificates", "fuse3", "python3", "systemd")

LEFT_OUT = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*")


def _sources() -> list[str]:
    """Return the lines of sources.list(5) that name where apt gets this release from."""
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    fields = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", fields, "Created-By: Packages", f"Codename: {release}"],
        check=True,
        capture_output=True,
        text=True,
    )
    return [f"deb {line}" for line in dict.fromkeys(told.stdout.splitlines()) if line.split()[1] == release]


def _settings() -> list[str]:
    """Return how apt reaches its mirrors here, proxies and the like, as words for mmdebstrap."""
    told = subprocess.run(["apt-config", "dump", "Acquire"], check=True, capture_output=True, text=True)
    plain = [line for line in told.stdout.splitlines() if "IndexTargets" not in line and '""' not in line]
    return [f"--aptopt={line}" for line in plain]


def base_root() -> Path:
    """Return the root directory that nobody writes to; the first call in a checkout makes it (a minute).

    Its name says what was asked for: a checkout that asks for something else makes another one.
    """
    BUILD.mkdir(exist_ok=True)
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    root = BUILD / "-".join(["root", release, *INCLUDED])
    with (BUILD / "root.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.exists():
            return root
        unfinished = BUILD / "root.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        options = ["--mode=root", "--variant=apt", "--quiet", f"--include={','.join(INCLUDED)}"]
        options += [*_settings(), "--dpkgopt=force-unsafe-io"]
        options += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
        subprocess.run(
            ["mmdebstrap", *options, release, unfinished, "-"],
            input="\n".join([*_sources(), ""]),
            check=True,
            text=True,
        )
        unfinished.rename(root)
    return root


@contextmanager
def copied(base: Path) -> Iterator[Path]:
    """Yield a directory that holds what `base` holds and can be written to; it is removed in the end.

    What is written is kept in memory, as long as it is there.
    """
    holder = Path(tempfile.mkdtemp(prefix="copy-", dir=BUILD))
    root, upper, work = (holder / name for name in ("root", "upper", "work"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", holder], check=True)
    try:
        for directory in (root, upper, work):
            directory.mkdir()
        options = f"lowerdir={base},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, root], check=True)
        yield root
    finally:
        subprocess.run(["umount", "--lazy", "--recursive", holder], check=True)
        holder.rmdir()
