"""A real MLflow tracking server with sqlite, and what tests put into it through its REST API."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from modelfs.testing.s3 import S3Server
from tests.mount.harness import eventually

START_SECONDS = 60.0


BUCKET = "mlflow"


@cache
def shared() -> Tracking:
    """Return the server of this process, which takes 10 s to start; it ends with the process."""
    server = Tracking()
    atexit.register(server.close)
    server.start()
    return server


class Tracking:
    """``mlflow server`` on a free port, and the S3 on this machine where it keeps artifacts.

    What is in the experiment ``0`` it proxies; of the experiment `direct` it names the bucket.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="modelfs-mlflow-"))
        self._log = self._directory / "log"
        self._child: subprocess.Popen[bytes] | None = None
        self.s3 = S3Server()
        self.url = ""
        self.direct = ""

    def start(self) -> None:
        """Return when it answers."""
        try:
            self.s3.start()
            self.s3.client().create_bucket(Bucket=BUCKET)
            command = [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "0"),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{self._directory}/mlflow.db"),
                *("--artifacts-destination", f"s3://{BUCKET}/proxied"),
            ]
            quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            env = {**os.environ, **self.s3.env(), **quiet, "MLFLOW_S3_ENDPOINT_URL": self.s3.url}
            with self._log.open("wb") as log:
                self._child = subprocess.Popen(
                    command, stdout=log, stderr=log, env=env, cwd=self._directory, start_new_session=True
                )
            eventually(self._port, START_SECONDS)
        except BaseException:
            self.close()
            raise
        self.url = f"http://127.0.0.1:{self._port()}"
        self._http = httpx.Client(base_url=self.url, timeout=30)
        made = self.ask(
            "POST", "experiments/create", name="direct", artifact_location=f"s3://{BUCKET}/direct"
        )
        self.direct = made["experiment_id"]

    def close(self) -> None:
        """End the server with its workers, and the S3."""
        if self._child is not None:
            if self._child.poll() is None:
                os.killpg(self._child.pid, signal.SIGTERM)
            self._child.wait(30)
        self.s3.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _port(self) -> str | None:
        text = self._log.read_text()
        assert self._child is not None
        assert self._child.poll() is None, text
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", text)
        return found[1] if found else None

    def ask(self, method: str, question: str, **fields: Any) -> dict[str, Any]:
        """Return the answer of the REST API."""
        given = {"params": fields} if method == "GET" else {"json": fields}
        answer = self._http.request(method, f"/api/2.0/mlflow/{question}", **given)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def run(self, experiment: str = "0") -> tuple[str, str]:
        """Return the id of a new run and the URI of its artifacts."""
        info = self.ask("POST", "runs/create", experiment_id=experiment)["run"]["info"]
        return info["run_id"], info["artifact_uri"]

    def logged_model(self, name: str, run: str) -> tuple[str, str]:
        """Return the id of a new model that `run` logged, and the URI of its artifacts."""
        model = self.ask("POST", "logged-models", experiment_id="0", name=name, source_run_id=run)
        info = model["model"]["info"]
        self.ask("POST", "runs/outputs", run_id=run, models=[{"model_id": info["model_id"], "step": 0}])
        self.ask("PATCH", f"logged-models/{info['model_id']}", model_id=info["model_id"], status=2)
        return info["model_id"], info["artifact_uri"]

    def upload(self, root: str, files: Mapping[str, bytes]) -> None:
        """Put `files` below the artifact URI `root`, as MLflow's own client does."""
        if root.startswith("s3:"):
            prefix = root.removeprefix(f"s3://{BUCKET}/")
            for path, data in files.items():
                self.s3.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{path}", Body=data)
            return
        place = root.removeprefix("mlflow-artifacts:")
        for path, data in files.items():
            target = f"/api/2.0/mlflow-artifacts/artifacts{place}/{quote(path)}"
            answer = self._http.put(target, content=data)
            assert answer.status_code == 200, answer.text

    def register(self, name: str, model: str, *, alias: str = "") -> str:
        """Return the number of a new version, the logged `model`, of the registered model `name`."""
        if self._http.get("/api/2.0/mlflow/registered-models/get", params={"name": name}).status_code != 200:
            self.ask("POST", "registered-models/create", name=name)
        given = {"name": name, "source": f"models:/{model}", "model_id": model}
        version = str(self.ask("POST", "model-versions/create", **given)["model_version"]["version"])
        if alias:
            self.ask("POST", "registered-models/alias", name=name, alias=alias, version=version)
        return version
