"""docs/layouts.md: its commands print what it says, its configuration is valid."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from modelfs import config
from tests.mount.harness import mounted

PAGE = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text()
SESSIONS = re.findall(r"^```console\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FILES = {
    "heart-disease/v1.0.0/best_model.pkl": "old",
    "heart-disease/v1.1.0/best_model.pkl": "new",
    "acme/churn/config.json": '{"model_type": "bert"}',
}


def test_the_commands_of_the_page(place: Path) -> None:
    for name, text in FILES.items():
        (place / "origin" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "origin" / name).write_text(text)
    sources = {name: f"file://{place}/origin/{name}" for name in ("heart-disease", "acme/churn")}
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(place),
        "LC_ALL": "C",
    }
    with mounted(place, sources=sources) as mount:
        for session in SESSIONS:
            script = re.sub(r"(?<!\w)/models(?=/)", str(mount.path), session)
            commands = "\n".join(line[2:] for line in script.splitlines() if line.startswith("$ "))
            said = [line for line in script.splitlines() if not line.startswith("$ ")]
            assert mount.run("sh", "-ec", commands, env=env).stdout.split() == " ".join(said).split()
    assert len(SESSIONS) == 2


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_configuration_of_the_page(number: int, tmp_path: Path) -> None:
    file = tmp_path / "modelfs.yaml"
    file.write_text(EXAMPLES[number])
    assert config.load(mountpoint=None, config_file=file).models
