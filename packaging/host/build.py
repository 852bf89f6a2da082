"""Build the packages for hosts: ``python packaging/host/build.py [deb] [rpm] [--wheel FILE] [--output DIR]``.

The packages hold a virtual environment for the Python of this distribution, with modelfs, what all its stores
need, and the versions that packaging/container/constraints.txt names. The .deb fits this release of this
distribution, the .rpm also others with the same Python and no older C library.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import string
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build"
CONSTRAINTS = ROOT / "packaging/container/constraints.txt"
EXTRAS = "az,fsspec,gs,zstd"
PACKAGERS = ("deb", "rpm")
PLACE = "/usr/lib/modelfs/dist"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

PIN = "import os, sys; sys.path[:] = map(os.path.realpath, sys.path)\n"
"""Keeps a process to the copy it was started from, when the link to the current one is changed."""


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a command and return what it printed; end with what it said if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def distribution_python() -> Path:
    """Return the interpreter that the packages depend on, like /usr/bin/python3.11."""
    python = Path("/usr/bin/python3").resolve()
    found = re.fullmatch(r"python3\.(\d+)", python.name)
    if found is None or int(found[1]) < 11:
        sys.exit(f"{python}: modelfs needs Python 3.11 or newer from the distribution")
    return python


def install(python: Path, where: Path, *words: str | Path, compiled: str = "") -> None:
    """Install into the environment `where` without a trace of this directory, and compile what is `compiled`.

    Modules are compiled to be taken as they are: packages do not keep times of files exactly.
    """
    run(
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--python",
        where / "bin/python",
        "install",
        "--no-compile",
        *words,
    )
    site = where / "lib" / python.name / "site-packages"
    for trace in site.glob("*.dist-info/direct_url.json"):
        trace.unlink()
    for script in (where / "bin").iterdir():
        if script.name != "python":
            script.unlink()
    compiling = ["-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    run(python, *compiling, "-s", where, "-p", PLACE, site / compiled)


def requirements(wheel: Path) -> list[str]:
    """Return what the wheel says that it needs."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    return re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)


def environment(python: Path, wheel: Path) -> Path:
    """Return an environment with all dependencies; made once for each list of them."""
    wanted = "\0".join([python.name, EXTRAS, CONSTRAINTS.read_text(), *requirements(wheel)])
    where = BUILD / f"environment-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}"
    if where.exists():
        return where
    new = where.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    site = new / "lib" / python.name / "site-packages"
    site.mkdir(parents=True)
    (new / "bin").mkdir()
    (new / "bin/python").symlink_to(python)
    (new / "pyvenv.cfg").write_text(f"home = {python.parent}\ninclude-system-site-packages = false\n")
    (site / "modelfs-current.pth").write_text(PIN)
    install(python, new, "--constraint", CONSTRAINTS, f"{wheel}[{EXTRAS}]")
    new.rename(where)
    return where


def library(stage: Path, name: str) -> str:
    """Return the full name of the shared library `name` that extensions in `stage` were linked with."""
    for extension in stage.rglob("pyfuse3/*.so"):
        for line in run("ldd", extension).splitlines():
            if line.strip().startswith(name):
                return line.split()[0]
    sys.exit(f"nothing in {stage} is linked with {name}")


def build(wheel: Path, packagers: Sequence[str], output: Path) -> list[Path]:
    """Return the packages of `wheel`, one for each of `packagers`, made in `output`."""
    python = distribution_python()
    base = environment(python, wheel)
    version = wheel.name.split("-")[1]
    stage, config = BUILD / f"stage-{version}", BUILD / f"nfpm-{version}.yaml"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(base, stage, symlinks=True, copy_function=os.link)
    install(python, stage, "--no-deps", "--force-reinstall", wheel, compiled="modelfs")
    fuse = library(stage, "libfuse3.so")
    names = {
        "HERE": HERE,
        "ROOT": ROOT,
        "STAGE": stage,
        "VERSION": version,
        "ARCH": ARCHITECTURES[platform.machine()],
        "PYTHON": python.name,
        "LIBFUSE": fuse,
        "LIBFUSE_PACKAGE": run("dpkg-query", "--search", f"*/{fuse}").partition(":")[0],
    }
    config.write_text(string.Template((HERE / "nfpm.yaml").read_text()).substitute(names))
    output.mkdir(parents=True, exist_ok=True)
    nfpm = Path(sys.executable).with_name("nfpm")
    made = []
    for packager in packagers:
        said = run(nfpm, "package", "--config", config, "--packager", packager, "--target", output)
        made.append(Path(said.rpartition("created package: ")[2]))
    shutil.rmtree(stage)
    return made


def main() -> None:
    """Build the packages, and the wheel if none is given; print where they are."""
    parser = argparse.ArgumentParser(description="Build the packages for hosts.")
    parser.add_argument("packagers", nargs="*", metavar="deb|rpm", default=PACKAGERS, help="by default both")
    parser.add_argument("--wheel", type=Path, help="what to package; by default one made of this checkout")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where packages go")
    asked = parser.parse_args()
    BUILD.mkdir(exist_ok=True)
    wheel = asked.wheel
    if wheel is None:
        made = BUILD / "wheel"
        shutil.rmtree(made, ignore_errors=True)
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", made, cwd=ROOT)
        (wheel,) = made.iterdir()
    for package in build(wheel.resolve(), asked.packagers, asked.output.resolve()):
        print(package)


if __name__ == "__main__":
    main()
