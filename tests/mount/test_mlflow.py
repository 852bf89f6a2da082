"""What MLflow wrote into a directory ``mlruns/`` without a server, mounted: MLflow loads it from there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from modelfs.testing.s3 import S3Server
from tests.mount.harness import mounted

WRITE = """
import mlflow, numpy
from sklearn.linear_model import LinearRegression
mlflow.set_experiment("churn")
grid = numpy.arange(200).reshape(100, 2) % 17
with mlflow.start_run():
    mlflow.sklearn.log_model(LinearRegression().fit(grid, grid.sum(1)), name="churn")
"""
LOAD = """
import mlflow, numpy, sys
grid = numpy.arange(200).reshape(100, 2) % 17
for path in sys.argv[1:]:
    print(numpy.allclose(mlflow.pyfunc.load_model(path).predict(grid), grid.sum(1)))
"""


def test_models_of_a_tree_of_mlruns_are_loaded_by_mlflow(place: Path) -> None:
    tracking = {
        "MLFLOW_TRACKING_URI": (place / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",  # MLflow 3 still reads and writes them, if it is told to
        "GIT_PYTHON_REFRESH": "quiet",
        "HOME": str(place),
    }
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WRITE],
        check=True,
        capture_output=True,
        cwd=place,
        env={**os.environ, **tracking},
    )
    (artifacts,) = (place / "mlruns").glob("*/models/m-*/artifacts")
    with S3Server() as server:
        server.client().create_bucket(Bucket="team")
        below = artifacts.relative_to(place)
        for file in filter(Path.is_file, artifacts.rglob("*")):
            server.put_file("team", str(below / file.relative_to(artifacts)), file)
        sources = {"directory": artifacts.as_uri(), "bucket": f"s3://team/{below}/"}
        with mounted(place, sources=sources, env=server.env(), transport="kernel") as m:
            paths = [str(m.path / name) for name in sources]
            loaded = m.python(LOAD, *paths, env=tracking)
    assert loaded.split() == ["True", "True"]
