"""Where a process runs, and how it gets its models there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelfs
from modelfs import environment
from modelfs.errors import ConfigError
from modelfs.tree import METADATA

ROOT = Path(modelfs.__file__).parents[1]


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mounts but those that a test makes up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "PLACES", (tmp_path / "app", tmp_path / "models"))
    monkeypatch.setenv("MODELFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MODELFS_CACHE_DIR", str(tmp_path / "cache"))


def mounted(place: Path) -> Path:
    (place / "finbert").mkdir(parents=True)
    (place / METADATA).write_text("models: {}\n")
    return place


@pytest.mark.parametrize(
    ("env", "found", "way", "why"),
    [
        ({}, "local", "directory", "nothing tells of another"),
        ({"CI": "true"}, "ci", "directory", "CI is set"),
        ({"GITHUB_ACTIONS": "true"}, "ci", "directory", "GITHUB_ACTIONS is set"),
        ({"CI": "false", "TESTING": "0"}, "local", "directory", "nothing tells of another"),
        ({"TESTING": "true", "CI": "true"}, "test", "mock", "TESTING is set"),
        ({"PYTEST_CURRENT_TEST": "tests/x.py::y (call)"}, "test", "mock", "PYTEST_CURRENT_TEST is set"),
        ({"MODELFS_ENVIRONMENT": "ci", "TESTING": "true"}, "ci", "directory", "MODELFS_ENVIRONMENT says so"),
        ({"MODELFS_ENVIRONMENT": "production"}, "production", "directory", "MODELFS_ENVIRONMENT says so"),
    ],
    ids=range(8),
)
def test_the_first_sign_that_holds_decides(env: dict[str, str], found: str, way: str, why: str) -> None:
    assert modelfs.detect(env) == modelfs.Detected(found, way, None, why)  # type: ignore[arg-type]


def test_a_mount_in_its_place_is_production_and_serves_all_but_tests(tmp_path: Path) -> None:
    place = mounted(tmp_path / "models")
    assert modelfs.detect({"TESTING": "true"}) == modelfs.Detected(
        "production", "mount", place, f"{place / METADATA} is there"
    )
    assert modelfs.detect({"MODELFS_ENVIRONMENT": "test"}).way == "mock"
    assert modelfs.detect({"MODELFS_ENVIRONMENT": "ci"}).mountpoint == place
    elsewhere = mounted(tmp_path / "elsewhere")
    assert modelfs.detect({"MODELFS_MOUNTPOINT": str(elsewhere)}).mountpoint == elsewhere


def test_a_word_that_is_no_environment_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"\$MODELFS_ENVIRONMENT: 'prod' is none of production, test, ci"):
        modelfs.detect({"MODELFS_ENVIRONMENT": "prod"})


def test_the_place_in_a_mount_is_the_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = mounted(tmp_path / "app")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert modelfs.local_path("finbert") == place / "finbert"


def test_a_test_gets_a_tiny_model_whatever_is_configured(tmp_path: Path) -> None:
    (tmp_path / "modelfs.yaml").write_text('models: {finbert: "hf://ProsusAI/finbert"}\n')
    found = modelfs.local_path("finbert")
    assert json.loads((found / "config.json").read_text())["model_type"] == "bert"
    assert (found / "model.safetensors").stat().st_size > 100_000
    assert modelfs.local_path("finbert") == found
    assert {path.name for path in modelfs.local_path("mock://sklearn").iterdir()} == {
        "best_model.pkl",
        "preprocessor.pkl",
    }
    assert (modelfs.local_path("hf://ProsusAI/finbert@main") / "config.json").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["text", "json"])
def test_the_command_says_the_same(words: list[str], tmp_path: Path) -> None:
    env = {**os.environ, "MODELFS_ENVIRONMENT": "ci", "MODELFS_MOUNTPOINT": str(mounted(tmp_path / "m"))}
    ended = subprocess.run(
        [sys.executable, "-m", "modelfs", "env", *words], capture_output=True, text=True, env=env, check=True
    )
    if words:
        assert json.loads(ended.stdout) == {
            "environment": "ci",
            "way": "mount",
            "mountpoint": str(tmp_path / "m"),
            "why": "MODELFS_ENVIRONMENT says so",
        }
    else:
        place = tmp_path / "m"
        assert ended.stdout == f"ci: models come from the mount on {place} (MODELFS_ENVIRONMENT says so)\n"


def test_pytest_has_a_fixture_for_models(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(
        "import modelfs\n"
        "def test_user(models):\n"
        "    found = models('finbert')\n"
        "    assert (found / 'config.json').exists()\n"
        "    assert modelfs.local_path('finbert') == found\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "modelfs.pytest_plugin", "test_user.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MODELFS_ENVIRONMENT": "local"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert ended.returncode == 0, ended.stdout
    assert "1 passed" in ended.stdout
