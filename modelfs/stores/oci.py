"""``oci://REGISTRY/REPOSITORY[:TAG][@DIGEST]``: models in container registries (also ``docker://``).

Speaks the OCI distribution specification (https://github.com/opencontainers/distribution-spec, ``spec.md``,
"Pulling manifests" and "Pulling blobs"). A tag is resolved to a manifest once per snapshot, with HEAD as long
as it does not move, because Docker Hub counts every GET of a manifest. `manifest` tells which files the
layers are, `docker` who we are.

The version of an entry is the digest of its blob, so any entry can be located after a restart.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError
from modelfs.stores import Options, checked_options, entry_in, redact
from modelfs.stores.docker import HUB, Grant, grant
from modelfs.stores.manifest import (
    INDEXES,
    MANIFEST_VERSION,
    MANIFESTS,
    Manifest,
    choose,
    entries,
    parse,
)
from modelfs.stores.reach import leads
from modelfs.stores.web import Answer, Web, failure, link_expiry, tls_context
from modelfs.types import Digest, Entry, Location, Snapshot, path_fault

OPTIONS: Mapping[str, type | tuple[type, ...]] = {
    "platform": str,
    "path": str,
    "insecure": bool,
    "ca_bundle": str,
    "timeout": (int, float),
}

MAX_MANIFEST = 16 << 20
"""Bytes; most registries take 4 MiB."""

_DEPTH = 3
"""Indexes in indexes that are followed."""
_REMEMBERED = 4
"""Snapshots that an unmoved tag, or one that moves back, need not fetch again."""
_THREADS = trio.CapacityLimiter(4)
_ACCEPT = {"accept": ", ".join((*MANIFESTS, *INDEXES))}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HERE = frozenset({200, 206, 400, 416, 501})
"""Answers to a range of a blob that is there: whether ranges are sent is for the data plane to see."""

_PART = r"[A-Za-z0-9]+(?:(?:[._]|__|-+)[A-Za-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_URL = re.compile(
    rf"(?:oci|docker)://(?:(?P<host>{_HOST})/)??(?P<repo>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>[^@/]+))?",
    re.IGNORECASE,
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_HUB_NAMES = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True, slots=True)
class Reply:
    """What the registry said, and to whom: None if it did not ask who we are."""

    answer: Answer
    granted: Grant | None

    def location(self, url: str) -> Location:
        """Return the location `url` at the registry itself."""
        return Location(url, self.granted.headers, self.granted.expires) if self.granted else Location(url)


@dataclass(frozen=True, slots=True)
class Known:
    """A snapshot that was made, and the manifest that it was made from."""

    snapshot: Snapshot
    manifest: bytes


class OciStore:
    """An image or artifact of a registry; implements :class:`modelfs.stores.Store`.

    A name whose first part has no dot or port and is not ``localhost`` is of Docker Hub, as for Docker. With
    a digest, the tag is only for people. Options:

    - ``platform``: which manifest of an index, ``linux/arm64``; otherwise this machine's or the only one.
    - ``path``: the directory of the image or artifact that is the model.
    - ``insecure``: speak http; loopback addresses always do.
    - ``ca_bundle``: file of the certificate authorities to trust while listing.
    - ``timeout``: seconds that one request of a listing may take (30).

    Credentials are Docker's; they are read again for every token (`docker`).

    Raises:
        ConfigError: malformed URL or option.

    """

    def __init__(self, url: str, options: Options) -> None:
        found = _URL.fullmatch(url)
        if found is None:
            raise ConfigError(f"{redact(url)!r} is no image: write oci://REGISTRY/REPOSITORY:TAG")
        host, repo = _split(found["host"], found["repo"])
        self._host, self._repo = host, repo
        self._digest: str | None = found["digest"]
        if self._digest and not _DIGEST.fullmatch(self._digest):
            raise ConfigError(f"{redact(url)}: the digest must be sha256: and 64 hex digits")
        self._tag: str = found["tag"] or "latest"
        self.url = f"oci://{host}/{repo}" + (f"@{self._digest}" if self._digest else f":{self._tag}")
        checked_options(self.url, options, OPTIONS)
        self._path: str = options.get("path", "").strip("/")
        if self._path and (fault := path_fault(self._path)):
            raise ConfigError(f"{self.url}: option 'path': {fault}")
        self._platform: str | None = options.get("platform")
        if self._platform is not None and not re.fullmatch(r"\w+/\w+(/\w+)?", self._platform):
            raise ConfigError(f"{self.url}: option 'platform' must look like linux/amd64")
        self._ca_bundle: str | None = options.get("ca_bundle")
        self._timeout: float = options.get("timeout", 30)
        plain = options.get("insecure", _is_loopback(host))
        api = "registry-1.docker.io" if host == "docker.io" else host
        self._base = f"{'http' if plain else 'https'}://{api}/v2/{repo}"
        self._server = HUB if host == "docker.io" else host
        chosen = [text for text in (self._platform, self._path) if text]
        self.identity = " ".join([self.url, *chosen])
        self._known: dict[str, Known] = {}
        self._grant: Grant | None = None
        self._granting = trio.Lock()

    def __repr__(self) -> str:
        return f"<OciStore {self.url}>"

    async def snapshot(self) -> Snapshot:
        """Resolve the tag and list the files of the manifest; a tag that has not moved costs one HEAD.

        The revision is the digest of the manifest. Below ``.oci`` are the manifest, the configuration and the
        layers that are tars.

        Raises:
            NotFound: no such tag or platform, or nothing at the option ``path``.
            AccessDenied: no such repository, or a private one.
            StoreError: any other failure.

        """
        digest = self._digest or await self._resolve()
        if digest not in self._known:
            body = await self._manifest(digest or self._tag)
            digest = digest or f"sha256:{hashlib.sha256(body).hexdigest()}"
        if digest not in self._known:
            self._known[digest] = await self._listed(body, digest)
        self._known[digest] = known = self._known.pop(digest)
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return known.snapshot

    async def entry(self, path: str) -> Entry:
        """Return what the latest snapshot has at `path`.

        Raises:
            NotFound: nothing is there.
            StoreError: any other failure.

        """
        latest = list(self._known.values())[-1].snapshot if self._known else await self.snapshot()
        return entry_in(latest, path)

    async def locate(self, entry: Entry) -> Location:
        """Return where the blob is: where the registry leads, with nothing secret of ours, or the registry.

        Raises:
            Stale: the registry no longer has it.
            StoreError: any other failure.

        """
        digest = entry.version.removeprefix(MANIFEST_VERSION)
        gone = f"{self.url}: {entry.path!r} is not in the registry any more: refresh the model"
        if not _DIGEST.fullmatch(digest):
            raise Stale(gone)
        if digest != entry.version:  # the manifest: small, and not to be had in ranges everywhere
            held = (known.manifest for known in self._known.values() if known.snapshot.revision == digest)
            try:
                return Location.inline(next(held, None) or await self._manifest(digest))
            except NotFound as error:
                raise Stale(gone) from error
        reply = await self._ask("GET", f"blobs/{digest}", fields={"range": "bytes=0-0"}, follow=False)
        if reply.answer.status in (404, 410):
            raise Stale(gone)
        if reply.answer.status in _REDIRECTS:
            return await self._led(reply)
        if reply.answer.status not in _HERE:
            raise self._refused(reply.answer)
        return reply.location(str(reply.answer.url))

    async def _led(self, reply: Reply) -> Location:
        """Return the location that the registry leads to: elsewhere as a rule, and signed."""
        try:
            target = reply.answer.url.join(reply.answer.headers.get("location", ""))
        except httpx.InvalidURL as error:
            raise BadAnswer(f"{self.url}: the registry redirects to a malformed URL") from error
        url = str(target)
        public = await trio.to_thread.run_sync(leads, self._base, url, limiter=_THREADS)
        if _origin(target) == _origin(reply.answer.url):
            return reply.location(url)
        return Location(url, expires=link_expiry(url, time.time()), public=public)

    # Manifests

    async def _resolve(self) -> str:
        """Return the digest that the tag stands for, "" if the registry does not tell it without the body."""
        answer = (await self._ask("HEAD", f"manifests/{self._tag}", fields=_ACCEPT)).answer
        if answer.status != 200:
            if answer.status in (401, 403, 404, 429):
                raise self._refused(answer)
            return ""
        told: str = answer.headers.get("docker-content-digest", "")
        return told if _DIGEST.fullmatch(told) else ""

    async def _manifest(self, reference: str) -> bytes:
        """Return the manifest of a tag, or that of a digest, which is checked."""
        answer = (await self._ask("GET", f"manifests/{reference}", MAX_MANIFEST, fields=_ACCEPT)).answer
        if answer.status != 200:
            raise self._refused(answer)
        if ":" in reference:
            wanted = Digest.parse(reference)
            hasher = wanted.hasher(len(answer.body))
            hasher.update(answer.body)
            if hasher.hexdigest() != wanted.value:
                raise BadAnswer(f"{self.url}: the registry answers {wanted} with another manifest")
        return answer.body

    async def _listed(self, body: bytes, digest: str) -> Known:
        for _ in range(_DEPTH):
            manifest = await trio.to_thread.run_sync(parse, body, self.url, limiter=_THREADS)
            if not manifest.manifests:
                work = partial(self._snapshot, manifest, Digest.parse(digest), len(body))
                return Known(await trio.to_thread.run_sync(work, limiter=_THREADS), body)
            digest = str(choose(manifest, self._platform, self.url).digest)
            body = await self._manifest(digest)
        raise BadAnswer(f"{self.url}: an index in an index in an index: name a manifest by its digest")

    def _snapshot(self, manifest: Manifest, digest: Digest, size: int) -> Snapshot:
        listed, taken = entries(manifest, digest, size, self._path)
        if not listed:
            raise NotFound(f"{self.url}: has nothing at {self._path!r}: correct the option path")
        snapshot = Snapshot.of(self.url, str(digest), listed)
        return replace(snapshot, rejected=(*taken, *snapshot.rejected))

    # Asking the registry

    async def _ask(self, method: str, path: str, limit: int | None = None, **how: Any) -> Reply:
        """Return the registry's answer; a 401 is answered once, with a new token or password."""
        try:
            tls = await trio.to_thread.run_sync(tls_context, self._ca_bundle, limiter=_THREADS)
        except OSError as error:
            raise StoreError(f"{self.url}: cannot use {self._ca_bundle}: {error.strerror}") from error
        connect = partial(Web, tls=tls, timeout=self._timeout)

        async def ask(granted: Grant | None) -> Reply:
            async with connect(self._base, granted.headers if granted else {}) as web:
                return Reply(await web.ask(method, f"{self._base}/{path}", limit, **how), granted)

        seen = self._grant
        reply = await ask(seen if seen and time.time() < seen.renew else None)
        if reply.answer.status != 401:
            return reply
        async with self._granting:
            if self._grant is seen:  # nobody else asked for one meanwhile
                scope = f"repository:{self._repo}:pull"
                self._grant = await grant(reply.answer, self._server, scope, connect)
            fresh = self._grant
        return await ask(fresh) if fresh else reply

    def _refused(self, answer: Answer) -> StoreError:
        if answer.status in (401, 403):
            return AccessDenied(
                f"{self.url}: refused ({answer.status}): check the name, and run docker login {self._host}"
            )
        if answer.status == 404:
            return NotFound(f"{self.url}: not there (404): check repository and tag")
        return failure(answer, self._base)


def _split(host: str | None, repo: str) -> tuple[str, str]:
    """Return registry and repository as Docker reads a name: of its Hub if it starts with no host."""
    if host is None and "/" in repo and re.search(r"[.]|^localhost$", repo.partition("/")[0], re.IGNORECASE):
        host, _, repo = repo.partition("/")
    host = host.lower() if host else "docker.io"
    if host in _HUB_NAMES:
        return "docker.io", repo if "/" in repo else f"library/{repo}"
    return host, repo


def _is_loopback(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
