"""The image: its recipe is clean and pinned, its script says what it does, compose gives it what it needs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NODE = ROOT / "packaging/container/modelfs-node"


def freeze() -> ModuleType:
    spec = importlib.util.spec_from_file_location("freeze", ROOT / "packaging/container/freeze.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--failure-threshold", "style", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_scripts_of_the_image_are_clean() -> None:
    ruff = Path(sys.executable).parent / "ruff"
    done = subprocess.run([ruff, "check", ROOT / "packaging/container/modelfs-untaint"], check=False)
    assert done.returncode == 0
    assert all(os.access(NODE.with_name(name), os.X_OK) for name in ("modelfs-node", "modelfs-untaint"))


def test_everything_the_image_installs_has_an_exact_version() -> None:
    lines = (ROOT / "packaging/container/constraints.txt").read_text().splitlines()[1:]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line)] == []
    pinned = {line.partition("==")[0] for line in lines}
    assert freeze().closure() == pinned, "run python packaging/container/freeze.py"


def test_every_base_image_has_a_version_and_a_name_for_it() -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", recipe, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", image)
    assert set(re.findall(r"^FROM (\S+)", recipe, re.MULTILINE)) == {"${PYTHON_IMAGE}"}


def test_what_the_recipe_copies_is_sent_to_the_builder() -> None:
    recipe, ignore = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignore if line.startswith("!")}
    copied = [
        source
        for words in re.findall(r"^COPY (?!--from)(.+)$", recipe, re.MULTILINE)
        for source in words.split()[:-1]
        if not source.startswith("--")
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == name or source.startswith(f"{name}/") for name in sent), source


@pytest.fixture
def node(tmp_path: Path) -> Any:
    """Runs the image's script with a modelfs that tells what it was asked, and exits as $CODES says."""
    told = tmp_path / "told"
    program = tmp_path / "bin/modelfs"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {told}\n'
        'read -r code rest < "$CODES"; echo "$rest" > "$CODES"; exit "${code:-0}"\n'
    )
    program.chmod(0o755)

    def run(*words: str, codes: str = "") -> tuple[int, list[str]]:
        told.write_text("")
        (tmp_path / "codes").write_text(f"{codes}\n")
        env = {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "MODELFS_MOUNTPOINT": str(tmp_path / "models"),
            "CODES": str(tmp_path / "codes"),
        }
        done = subprocess.run([NODE, *words], env=env, capture_output=True, timeout=60, check=False)
        return done.returncode, told.read_text().replace(str(tmp_path), "").splitlines()

    return run


def test_the_directory_below_the_mount_is_made_unreadable(node: Any, tmp_path: Path) -> None:
    assert node("mount", "--refresh", "5m") == (
        0,
        ["mount /models --foreground --allow-other --refresh 5m"],
    )
    assert (tmp_path / "models").stat().st_mode & 0o777 == 0
    (tmp_path / "models").chmod(0o555)  # as a mount is: it stays what it is
    assert node("mount")[0] == 0
    assert (tmp_path / "models").stat().st_mode & 0o777 == 0o555


def test_ready_is_a_daemon_and_a_mount_that_answer(node: Any, tmp_path: Path) -> None:
    stat = tmp_path / "bin/stat"
    stat.write_text("#!/bin/sh\necho 65735546\n")  # FUSE_SUPER_MAGIC
    stat.chmod(0o755)
    assert node("ready") == (0, ["status /models"])
    assert node("ready", codes="4")[0] == 4
    stat.unlink()
    assert node("ready")[0] != 0  # there is no directory
    (tmp_path / "models").mkdir()
    assert node("ready")[0] != 0  # it is no mount


def test_a_drain_ends_with_the_daemon(node: Any) -> None:
    assert node("drain", codes="0 0 0 4") == (0, ["umount --lazy /models", *["status /models"] * 3])


def test_an_unknown_word_is_refused(node: Any) -> None:
    assert node("serve") == (2, [])


def test_compose_shares_the_parent_of_the_mount() -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = document["services"]
    assert all(re.search(r":[\w.-]+$", each.get("image", "")) for each in services.values())
    (shared,) = [v for v in services["modelfs"]["volumes"] if isinstance(v, dict)]
    mountpoint = re.findall(r"MODELFS_MOUNTPOINT=(\S+)", (ROOT / "Dockerfile").read_text())
    assert mountpoint == [f"{shared['target']}/models"]
    assert shared["bind"]["propagation"] == "rshared"
    (seen,) = services["example"]["volumes"]
    assert (seen["source"], seen["bind"]["propagation"]) == (shared["source"], "rslave")
