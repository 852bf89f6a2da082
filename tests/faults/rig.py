"""Every network store behind a `FaultProxy`, and readers that fetch from it over real sockets."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio
import trustme

from modelfs.cache import Cache
from modelfs.errors import ModelfsError
from modelfs.fetch.client import RangeClient
from modelfs.fetch.engine import Fetcher
from modelfs.fetch.source import Source
from modelfs.metrics import Metrics
from modelfs.stores import Store, open_store
from modelfs.testing.faults import FaultProxy, Plan
from modelfs.testing.hub import TOKEN, HubServer
from modelfs.testing.s3 import KEY_ID, REGION, SECRET, S3Server
from modelfs.types import Entry
from tests.origin import Origin
from tests.stores.registry import Repository
from tests.stores.site import scripted

STORES = ("http", "https", "s3", "hf", "hf-plain")
"""Kinds of stores; of the Hub's files those in LFS, behind signed links, and those that are not."""

SECRETS = (SECRET, TOKEN, "pa55word", "Signature=")
"""What no message may show: the stores are asked with these, or with links that have this."""

WRONG = "WRONG BYTES"
"""The outcome that must never be."""


def noise(size: int, seed: str) -> bytes:
    return random.Random(seed).randbytes(size)


class Site:
    """The same files in an HTTP server, an S3, a Hub and a registry; reached through proxies."""

    def __init__(self, directory: Path, files: Mapping[str, bytes]) -> None:
        self.files = files
        self._directory = directory
        self._servers = ExitStack()
        authority = trustme.CA()
        self.ca_bundle = str(directory / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_bundle)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(self.tls)

    def __enter__(self) -> Site:
        self.origin = self._servers.enter_context(Origin(dict(self.files)))
        self.origin.digests = {path: sha256(data).hexdigest() for path, data in self.files.items()}
        self.s3 = self._servers.enter_context(S3Server())
        self.s3.client().create_bucket(Bucket="models")
        self.hub = self._servers.enter_context(HubServer())
        self.hub.add("org/name", self.files, private=True, lfs="*")
        self.hub.add("org/plain", self.files, private=True, lfs=())
        for number, (path, data) in enumerate(self.files.items()):
            file = self._directory / str(number)
            file.write_bytes(data)
            self.s3.put_file("models", path, file)
        pushed = Repository("team/model")
        raw = "application/vnd.cncf.model.weight.v1.raw"
        note = "org.cncf.model.filepath"
        pushed.manifest("v1", [pushed.blob(data, raw, {note: f"m/{p}"}) for p, data in self.files.items()])
        registry, _ = self._servers.enter_context(scripted(pushed.answer))
        self.registry = registry.rstrip("/")
        (self._directory / "token").write_text(TOKEN)
        self.sign_with(KEY_ID, SECRET)
        return self

    def __exit__(self, *exception: object) -> None:
        self._servers.close()

    def sign_with(self, key_id: str, secret: str) -> None:
        """Write the file that the S3 store takes its credentials from."""
        (self._directory / "credentials").write_text(
            f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {secret}\n"
        )

    def environment(self) -> dict[str, str]:
        """Return the variables with which the stores find their credentials."""
        return {
            "AWS_SHARED_CREDENTIALS_FILE": str(self._directory / "credentials"),
            "AWS_CONFIG_FILE": str(self._directory / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "DOCKER_CONFIG": str(self._directory / "none"),
            "NETRC": str(self._directory / "none"),
        }

    @contextmanager
    def behind(self, kind: str, plan: Plan = ()) -> Iterator[tuple[FaultProxy, Store]]:
        """Yield a proxy with `plan` and the store of that kind behind it."""
        with FaultProxy(self.upstream(kind), plan, tls=self.tls if kind == "https" else None) as proxy:
            yield proxy, self.store(kind, proxy.url)

    def upstream(self, kind: str) -> str:
        """Return the URL of the server that stores of that kind ask."""
        urls = {"s3": self.s3.url, "ht": self.origin.url, "hf": self.hub.url, "oc": self.registry}
        return urls[kind[:2]]

    def store(self, kind: str, url: str) -> Store:
        """Return the store of that kind at `url`."""
        options: dict[str, Any]
        match kind:
            case "s3":
                options = {"endpoint_url": url, "region": REGION}
                return open_store("s3://models/", options)
            case "hf" | "hf-plain":
                options = {"endpoint": url, "token_file": str(self._directory / "token")}
                return open_store("hf://org/name" if kind == "hf" else "hf://org/plain", options)
            case "oci":
                options = {"insecure": url.startswith("http:"), "timeout": 5, "path": "m"}
                return open_store(f"oci://{urlsplit(url).netloc}/team/model:v1", options)
            case _:
                options = {"ca_bundle": self.ca_bundle, "timeout": 5}
                return open_store(f"{url.replace('://', '://user:pa55word@')}/", options)


@asynccontextmanager
async def fetching(
    directory: Path, ca_bundle: str, *, deadline: float, connections: int = 64
) -> AsyncIterator[tuple[Fetcher, Cache, Metrics]]:
    """Yield a fetch path of its own with an empty cache in `directory`."""
    metrics = Metrics()
    cache = Cache(directory, limit=None, min_free=0, metrics=metrics)
    client = RangeClient(metrics=metrics, connections=connections, stall_timeout=1, ca_bundle=ca_bundle)
    try:
        async with trio.open_nursery() as nursery:
            yield (
                Fetcher(nursery, cache, client, metrics, connections=connections, read_deadline=deadline),
                cache,
                metrics,
            )
            nursery.cancel_scope.cancel()
    finally:
        client.close()
        cache.close()


async def outcome(
    fetcher: Fetcher, source: Source, entry: Entry, content: bytes, first: int | None = None
) -> str:
    """Read all of `entry`, first from `first` on, and return "right", `WRONG`, or the class of the error.

    The error is checked: one line without secrets. Bytes are compared whatever comes after them.
    """
    try:
        reader = await fetcher.open(source, entry)
        try:
            for start in (len(content) * 2 // 3 if first is None else first, 0):
                got = await reader.read(start, len(content))
                if got != content[start:]:
                    return WRONG
        finally:
            reader.close()
    except ModelfsError as error:
        message = str(error)
        assert message
        assert not [secret for secret in SECRETS if secret in message], message
        return type(error).__name__
    return "right"
