"""Render a chart with Helm itself: its library in Go, from the PyPI package helm-sdkpy.

The library installs, and has no ``helm template``. So Helm talks to an API server that knows a few kinds and
holds nothing; before Helm makes any object it stores the release, with all that it has rendered, in a Secret.
That is taken, and Helm is refused. In a process of its own, like `tests.kustomize`.
"""

from __future__ import annotations

import base64
import ctypes
import gzip
import json
import re
import subprocess
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

LIBRARY = Path(sys.prefix, "go/helm_sdkpy/_lib/linux-amd64/libhelm_sdkpy.so")

KINDS = {
    "v1": ["ServiceAccount", "ConfigMap", "Secret", "Service"],
    "apps/v1": ["DaemonSet"],
    "monitoring.coreos.com/v1": ["ServiceMonitor"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "rbac.authorization.k8s.io/v1": ["ClusterRole", "ClusterRoleBinding"],
}


class RenderError(Exception):
    """Helm refuses the chart or the values; what it says."""


def render(chart: Path, values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of the release ``modelfs`` of `chart` with `values` over its own.

    Raises:
        RenderError: what Helm says against it.

    """
    return [found for found in yaml.safe_load_all(_rendered(chart, json.dumps(values))) if found]


@cache
def _rendered(chart: Path, values: str) -> str:
    command = [sys.executable, "-m", "tests.helm", str(chart), values]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RenderError(done.stderr)
    return done.stdout


class Server(ThreadingHTTPServer):
    manifest: str | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        version = path.removeprefix("/apis/").removeprefix("/api/")
        answer: dict[str, Any] | None = None
        if path == "/version":
            answer = {"major": "1", "minor": "37", "gitVersion": "v1.37.0"}
        elif path == "/api":
            answer = {"kind": "APIVersions", "versions": ["v1"]}
        elif path == "/apis":
            groups = [version.split("/") for version in KINDS if "/" in version]
            versions = [{"groupVersion": f"{group}/{v}", "version": v} for group, v in groups]
            answer = {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [
                    {"name": group, "versions": [each], "preferredVersion": each}
                    for (group, _), each in zip(groups, versions, strict=True)
                ],
            }
        elif version in KINDS:
            resources = [self._resource(kind) for kind in KINDS[version]]
            answer = {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        elif path.endswith("/secrets"):
            answer = {"kind": "SecretList", "apiVersion": "v1", "items": []}
        self._say(200 if answer else 404, answer or {"kind": "Status", "reason": "NotFound", "code": 404})

    @staticmethod
    def _resource(kind: str) -> dict[str, Any]:
        plural = "networkpolicies" if kind == "NetworkPolicy" else f"{kind.lower()}s"
        namespaced = not kind.startswith("Cluster")
        return {"name": plural, "kind": kind, "namespaced": namespaced, "verbs": ["get", "create", "list"]}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        # Protobuf; the release is the base64 of gzip, which begins so, of JSON.
        (release,) = re.findall(rb"H4sI[A-Za-z0-9+/]+=*", body)
        self.server.manifest = json.loads(gzip.decompress(base64.b64decode(release)))["manifest"]
        self._say(403, {"kind": "Status", "reason": "Forbidden", "code": 403})

    def _say(self, code: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    library = ctypes.CDLL(str(LIBRARY))
    library.helm_sdkpy_last_error.restype = ctypes.c_char_p
    handle, result = ctypes.c_ulonglong(), ctypes.c_char_p()
    chart, values = (word.encode() for word in sys.argv[1:])
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cluster = {"server": f"http://127.0.0.1:{server.server_port}"}
        access = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }
        config = yaml.safe_dump(access).encode()
        library.helm_sdkpy_config_create(b"modelfs", config, None, b"{}", ctypes.byref(handle))
        library.helm_sdkpy_install(handle, b"modelfs", chart, values, None, b"{}", ctypes.byref(result))
        server.shutdown()
    if server.manifest is None:
        sys.exit(library.helm_sdkpy_last_error().decode())
    print(server.manifest)


if __name__ == "__main__":
    main()
