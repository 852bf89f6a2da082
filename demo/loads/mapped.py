"""The same forest by joblib, its arrays mapped from the file."""

from pathlib import Path
from typing import Any

import joblib

from demo.loads.pickled import use

__all__ = ["load", "use"]


def load(directory: str) -> Any:
    return joblib.load(Path(directory) / "model.joblib", mmap_mode="r")
