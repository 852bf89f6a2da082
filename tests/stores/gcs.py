"""Google Cloud Storage on loopback: the emulator, behind what it leaves out.

That is credentials, generations and pages of a listing: https://cloud.google.com/storage/docs/json_api/v1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, unquote

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.handlers.objects import _checksums, _make_object_resource
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

from tests.stores.site import serving

BUCKET = "models-of-ours"
TOKEN = "ya29.s3cr3t-t0ken"


@dataclass
class Gcs:
    """A server with one bucket.

    Attributes:
        url: of the server, for ``endpoint``.
        tokens: that are accepted; empty if everybody may read.
        requests: ``PATH?QUERY`` of each GET.

    """

    storage: Storage
    url: str = ""
    tokens: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def put(self, key: str, data: bytes, **metadata: object) -> str:
        """Store an object and return its generation."""
        resource = _make_object_resource(self.url, BUCKET, key, "application/octet-stream", str(len(data)))
        resource = {**_checksums(data, resource), **metadata}
        self.storage.create_file(BUCKET, key, data, resource)
        return str(resource["generation"])

    def delete(self, key: str) -> None:
        self.storage.delete_file(BUCKET, key)

    def account(self, file: Path, token: str) -> Path:
        """Write the key of a service account, to which this server gives `token`, and return `file`."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        fields = {
            "type": "service_account",
            "client_email": "reader@models.iam.gserviceaccount.com",
            "private_key": key.decode(),
            "project_id": "models",
            "token_uri": f"{self.url}/token/{token}",
        }
        file.write_text(json.dumps(fields))
        return file


class _Handler(RequestHandler):
    """Refuses strangers and lost generations, pages listings, leaves the rest to the emulator."""

    def __init__(self, gcs: Gcs, *arguments: object) -> None:
        self.gcs = gcs
        super().__init__(gcs.storage, *arguments)

    def do_GET(self) -> None:
        self.gcs.requests.append(self.path)
        path, _, query = self.path.partition("?")
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.gcs.tokens and given not in self.gcs.tokens:
            self._send(401, {"error": {"code": 401, "message": "Invalid Credentials"}})
        elif re.fullmatch("/storage/v1/b/[^/]+/o", path):
            self._list(unquote(path.split("/")[4]), asked)
        elif "generation" in asked and asked["generation"] != self._generation(path):
            self._send(404, {"error": {"code": 404, "message": "No such object"}})
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        token = self.path.removeprefix("/token/")
        self._send(200, {"access_token": token, "expires_in": 3600, "token_type": "Bearer"})

    def _generation(self, path: str) -> str:
        bucket, name = re.fullmatch("/download/storage/v1/b/([^/]+)/o/([^/]+)", path).groups()
        return self.gcs.storage.objects[bucket].get(unquote(name), {}).get("generation", "")

    def _list(self, bucket: str, asked: dict[str, str]) -> None:
        if bucket not in self.gcs.storage.buckets:
            self._send(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
            return
        found, _ = self.gcs.storage.get_file_list(bucket, asked.get("prefix"))
        start = int(asked.get("pageToken", 0))
        stop = start + min(int(asked.get("maxResults", 1000)), 4)
        more = {"nextPageToken": str(stop)} if stop < len(found) else {}
        self._send(200, {"kind": "storage#objects", "items": found[start:stop], **more})

    def _send(self, status: int, answer: dict[str, object]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def gcs() -> Iterator[Gcs]:
    server = Gcs(Storage(use_memory_fs=True))
    create_bucket(BUCKET, server.storage)
    with serving(partial(_Handler, server)) as url:
        server.url = url.rstrip("/")
        yield server
