"""``http(s)://``: one file, or a directory that a manifest or an HTML index lists.

A URL that ends in a slash is a directory. Its manifest is ``modelfs-manifest.json`` (`parse_manifest` defines
it); where there is none, the index pages that nginx, Apache, ``python -m http.server`` and their like make
are followed below the URL, and nowhere else.

The version of a file is all that `HttpStore.locate` needs to pin it, so it survives a restart: the strong
ETag with its quotes; or, where there is none, ``SIZE WEAK-ETAG LAST-MODIFIED``; or the ``sha256:…`` that a
manifest publishes for a file whose server publishes neither.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

import httpx
import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, StoreError
from modelfs.listing import CONTROL
from modelfs.stores import Options, checked_options, entry_in, redact
from modelfs.stores.web import Facts, Web, basic_auth, each, netrc_auth, tls_context
from modelfs.types import Digest, Entry, Location, Snapshot, path_fault

MANIFEST = "modelfs-manifest.json"
"""Name of the manifest that is looked for in every directory URL."""

MAX_MANIFEST = 64 << 20
MAX_INDEX = 16 << 20
MAX_DEPTH = 32

_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "headers": dict,
    "manifest": str,
    "ca_bundle": str,
    "max_entries": int,
    "timeout": (int, float),
}
_PARSERS = trio.CapacityLimiter(2)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[!-~]([ \t!-~]*[!-~])?")
_STRONG_ETAG = re.compile(r'"[!#-~]+"')

Rejected = tuple[str, str]
"""A path that the server lists and the tree must not show, and why."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listed:
    """One file as a manifest or an index lists it.

    Attributes:
        path: below the directory; not checked.
        url: absolute.
        size: bytes, None if the listing does not say.
        etag: strong validator, None if the listing does not say.
        sha256: published digest in hex, "" if there is none.

    """

    path: str
    url: str
    size: int | None = None
    etag: str | None = None
    sha256: str = ""


class HttpStore:
    """A file or a directory of a web server; implements :class:`modelfs.stores.Store`.

    Options:
        headers: sent to the server with every request; secrets, never sent to another origin.
        manifest: name of the manifest, relative to the directory; then there must be one.
        ca_bundle: file of the certificate authorities to trust while listing.
        max_entries: most files and directories to list (100 000).
        timeout: seconds that one request of a listing may take (60).

    User and password come from the URL, else from ``~/.netrc`` (or ``$NETRC``), which is read again for
    every call. Neither they nor the query are part of `url`; a query is replaced by its hash.
    """

    def __init__(self, url: str, options: Options) -> None:
        checked_options(url, options, _OPTIONS)
        self._url, self.url, authorization = _parsed(url)
        self._headers = _checked_headers(self.url, options.get("headers", {}))
        if authorization:
            self._headers["authorization"] = authorization
        self._ca_bundle: str | None = options.get("ca_bundle")
        self._max_entries: int = options.get("max_entries", 100_000)
        self._timeout: float = options.get("timeout", 60)
        self._single = not self._url.endswith("/")
        self._told: str | None = options.get("manifest")
        self._manifest = _manifest_url(self._url, self._told or MANIFEST)
        if self._told and self._single:
            raise ConfigError(f"{self.url}: option 'manifest' needs a URL of a directory, ending in a slash")
        self._urls: dict[str, str] | None = None  # of the manifest's files; None before it was read

    async def snapshot(self) -> Snapshot:
        """List the file or directory; the revision is derived from the listing.

        Files that cannot be served correctly are in ``rejected``: those without a length, those whose
        versions cannot be told apart, those the server refuses. If nothing remains, that is an error.

        Raises:
            NotFound: there is neither a file, a manifest nor an index, or they list nothing.
            AccessDenied: credentials are missing or wrong.
            Unavailable: the server cannot be reached or is busy.
            BadAnswer: the manifest is malformed, or the page is no index.
            StoreError: the listing is too large, or a redirect leaves https.

        """
        async with await self._web() as web:
            files, empty, rejected = await self._listing(web)
            entries, failures = await _pinned(web, files)
        entries += empty
        if not entries:
            raise failures[0][1] if failures else NotFound(f"{self.url}: lists no files: check the URL")
        listed = Snapshot.of(self.url, "", entries)
        rejected += [(path, str(error)) for path, error in failures]
        return replace(listed, rejected=tuple(sorted((*listed.rejected, *rejected))))

    async def entry(self, path: str) -> Entry:
        """Return the entry at `path` of a fresh listing; NotFound if there is none."""
        async with await self._web() as web:
            files, empty, _ = await self._listing(web)
            named = [file for file in files if file.path == path]
            entries, failures = await _pinned(web, named)
        if failures:
            raise failures[0][1]
        # Only names matter of the others.
        others = [Entry(file.path) for file in files if file.path != path]
        return entry_in(Snapshot.of(self.url, "latest", [*entries, *others, *empty]), path)

    async def locate(self, entry: Entry) -> Location:
        """Return the URL of the file, the headers for it and the validator that pins its version.

        Nothing is asked of the server, except for the manifest if it was not read yet: a version that is
        gone is noticed by the range request that the validator guards.
        """
        if self._urls is None and not self._single:
            async with await self._web() as web:
                await self._read_manifest(web)
        url = self._url if self._single else (self._urls or {}).get(entry.path) or self._url_of(entry.path)
        etag = entry.version if _STRONG_ETAG.fullmatch(entry.version) else None
        modified = None
        if etag is None and not entry.version.startswith("sha256:"):
            modified = entry.version.split(" ", 2)[-1]
        return Location(url, await self._secrets(), etag=etag, last_modified=modified)

    async def _web(self) -> Web:
        try:
            tls = await _in_thread(tls_context, self._ca_bundle)
        except OSError as error:
            chosen = self._ca_bundle or os.environ.get("SSL_CERT_FILE")
            raise StoreError(f"{self.url}: cannot use the CA bundle {chosen}: {error.strerror}") from error
        return Web(self._url, await self._secrets(), tls=tls, timeout=self._timeout)

    async def _secrets(self) -> dict[str, str]:
        """Return the headers that only the server may see, with the password of today."""
        if "authorization" in self._headers:
            return {**self._headers}
        found = await _in_thread(netrc_auth, urlsplit(self._url).hostname)
        return {**self._headers, "authorization": found} if found else {**self._headers}

    def _url_of(self, path: str) -> str:
        return self._url + quote(os.fsencode(path))

    async def _listing(self, web: Web) -> tuple[list[Listed], list[Entry], list[Rejected]]:
        """Return the files, the empty directories, and what must not be shown."""
        if self._single:
            name = os.fsdecode(unquote_to_bytes(urlsplit(self._url).path.rpartition("/")[2]))
            return [Listed(name, self._url)], [], []
        manifest = await self._read_manifest(web)
        return await self._crawl(web) if manifest is None else (manifest, [], [])

    async def _read_manifest(self, web: Web) -> list[Listed] | None:
        """Return what the manifest lists; None if the directory has none."""
        try:
            answer = await web.get(self._manifest, MAX_MANIFEST)
            absent = "html" in answer.headers.get("content-type", "")  # a page for every URL: no manifest
        except (NotFound, AccessDenied):  # S3 and its like refuse what is not there
            if self._told:
                raise
            absent = True
        if absent and not self._told:
            self._urls = {}
            return None
        files = await _in_thread(parse_manifest, answer.body, self._manifest)
        if len(files) > self._max_entries:
            raise self._too_large()
        self._urls = {file.path: file.url for file in files}
        return files

    async def _crawl(self, web: Web) -> tuple[list[Listed], list[Entry], list[Rejected]]:
        """Follow the index pages, as `_listing` returns it."""
        files: list[Listed] = []
        empty: list[Entry] = []
        rejected: list[Rejected] = []
        level, below, seen = [""], list[str](), 0

        async def follow(directory: str) -> None:
            nonlocal seen
            url = self._url_of(directory)
            try:
                answer = await web.get(url, MAX_INDEX)
                if "html" not in answer.headers.get("content-type", ""):
                    raise BadAnswer(f"{redact(url)}: neither a manifest nor an HTML index: add {MANIFEST}")
            except (NotFound, AccessDenied, BadAnswer) as error:
                if not directory:
                    raise
                rejected.append((directory.rstrip("/"), str(error)))
                return
            names = await _in_thread(index_names, answer.body, str(answer.url))
            seen += len(names)
            if seen > self._max_entries:
                raise self._too_large()
            if not names and directory:
                empty.append(Entry(directory.rstrip("/"), kind="directory"))
            for name in names:
                path = directory + name
                if fault := path_fault(path.removesuffix("/")):
                    rejected.append((path.rstrip("/"), fault))
                elif name.endswith("/"):
                    below.append(path)
                else:
                    files.append(Listed(path, self._url_of(path)))

        depth = 0
        while level and depth < MAX_DEPTH:
            await each(follow, level)
            level, below, depth = below, [], depth + 1
        rejected += [(path.rstrip("/"), f"it is deeper than {MAX_DEPTH} directories") for path in level]
        return files, empty, rejected

    def _too_large(self) -> StoreError:
        return StoreError(f"{self.url}: more than {self._max_entries} entries: raise the option max_entries")


def parse_manifest(body: bytes, url: str) -> list[Listed]:
    """Return the files of the manifest `body` that was read from `url`.

    A manifest is a JSON object ``{"version": 1, "files": […]}``. Each file is an object with ``path`` (below
    the manifest's directory), ``size`` (bytes) and, each optional, ``sha256`` (64 hex digits), ``etag``
    (strong, with its quotes, as the server sends it) and ``url`` (relative to the manifest, of the same
    origin; without it the file is at its path). Unknown members are ignored.

    Raises:
        BadAnswer: the manifest is malformed; names the line, or the file and the member.

    """
    place = redact(url)
    try:
        data = json.loads(body)
    except json.JSONDecodeError as error:
        raise BadAnswer(
            f"{place}, line {error.lineno}: not JSON: {error.msg}: correct the manifest"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"{place}: not JSON: {type(error).__name__}: correct the manifest") from error
    if not isinstance(data, dict) or data.get("version") != 1 or not isinstance(data.get("files"), list):
        raise BadAnswer(f'{place}: not a manifest: it must be {{"version": 1, "files": […]}}')
    return [_listed(row, url, f"{place}, files[{index}]") for index, row in enumerate(data["files"])]


_MEMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "path": (lambda v: isinstance(v, str), "text"),
    "size": (lambda v: type(v) is int and 0 <= v < 1 << 63, "a number of bytes"),
    "sha256": (lambda v: isinstance(v, str) and bool(re.fullmatch("[0-9a-fA-F]{64}", v)), "64 hex digits"),
    "etag": (lambda v: isinstance(v, str) and bool(_STRONG_ETAG.fullmatch(v)), "a strong ETag in quotes"),
    "url": (lambda v: isinstance(v, str), "text"),
}


def _listed(row: Any, url: str, place: str) -> Listed:
    if not isinstance(row, dict):
        raise BadAnswer(f"{place}: must be an object: correct the manifest")
    for name, (holds, wanted) in _MEMBERS.items():
        if (name in row or name in ("path", "size")) and not holds(row.get(name)):
            raise BadAnswer(f"{place}: {name} must be {wanted}: correct the manifest")
    try:
        target = urljoin(url, row["url"] if "url" in row else "./" + quote(os.fsencode(row["path"])))
        same = _same_origin(target, url)
        if CONTROL.search(target) or not target.encode():
            raise ValueError("a URL is text")
    except ValueError as error:
        raise BadAnswer(f"{place}: malformed path or url: correct the manifest") from error
    if not same:
        raise BadAnswer(f"{place}: url leads to another server: make it relative")
    return Listed(row["path"], target, row["size"], row.get("etag"), row.get("sha256", "").lower())


def index_names(page: bytes, url: str) -> list[str]:
    """Return the names that the HTML index `page` of the directory `url` lists, directories with a slash.

    Only links to direct children count: not those to parents, to other servers, or with a query, which sort
    the listing. Names are decoded but not checked.
    """
    prefix = unquote_to_bytes(urlsplit(url).path.rpartition("/")[0] + "/")
    names: dict[str, None] = {}
    for link in dict.fromkeys(_links(page.decode(errors="surrogateescape"))):
        try:
            target = urlsplit(urljoin(url, html.unescape(link).strip()))
            path = unquote_to_bytes(os.fsencode(target.path))
        except ValueError:
            continue
        child = path.removeprefix(prefix)
        inside = _same_origin(target.geturl(), url) and path.startswith(prefix)
        if inside and child not in (b"", b"/") and b"/" not in child[:-1] and not target.query:
            names[os.fsdecode(child)] = None
    return list(names)


# Each takes time linear in the page: html.parser takes quadratic, and a stranger's page is up to 16 MiB.
_TAG = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1|\Z)|<a\s(?P<attributes>[^<>]*)>",
    re.IGNORECASE | re.DOTALL,
)
_ATTRIBUTE = re.compile(r"""([^\s=>"'/]+)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+))?""")


def _links(page: str) -> Iterator[str]:
    """Yield the target of each link, with its character references, outside comments and scripts."""
    for tag in _TAG.finditer(page):
        for name, value in _ATTRIBUTE.findall(tag["attributes"] or ""):
            if name.lower() == "href":
                yield value.strip(value[:1]) if value[:1] in ("'", '"') else value


def _parsed(url: str) -> tuple[str, str, str]:
    """Return the URL to ask for, the URL to show, and the value of ``Authorization`` or ""."""
    try:
        parsed, _ = httpx.URL(url), urlsplit(url)  # neither refuses everything that is malformed
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"{redact(url)}: malformed URL: {error}") from None
    if not parsed.host:
        raise ConfigError(f"{redact(url)}: no host: write {parsed.scheme}://HOST/PATH")
    bare = parsed.copy_with(userinfo=b"", fragment=None, raw_path=parsed.raw_path)
    shown = str(bare.copy_with(query=None))
    if bare.query:
        if bare.path.endswith("/"):
            raise ConfigError(f"{shown}: the URL of a directory takes no query: use the option headers")
        # Different queries are different files, but they may hold signatures.
        shown += f"#query-{hashlib.sha256(bare.query).hexdigest()[:12]}"
    user = parsed.username or parsed.password
    return str(bare), shown, basic_auth(parsed.username, parsed.password) if user else ""


def _manifest_url(url: str, name: str) -> str:
    try:
        manifest = urljoin(url, name)
        if _same_origin(manifest, url):
            return manifest
    except ValueError as error:
        raise ConfigError(f"{redact(url)}: option 'manifest' is malformed: {error}") from error
    raise ConfigError(f"{redact(url)}: option 'manifest' must name a file of the same server")


def _checked_headers(url: str, headers: dict[Any, Any]) -> dict[str, str]:
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            begins = _HEADER_NAME.match(str(name))  # what follows may be the value
            shown = begins[0] if begins else ""
            raise ConfigError(f"{url}: option 'headers': '{shown}…' is not the name of a header")
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ConfigError(f"{url}: option 'headers': the value of {name!r} is not printable ASCII text")
    return {name.lower(): value for name, value in headers.items()}


def _same_origin(one: str, other: str) -> bool:
    return urlsplit(one)[:2] == urlsplit(other)[:2]


async def _pinned(
    web: Web, files: Sequence[Listed]
) -> tuple[list[Entry], list[tuple[str, NotFound | AccessDenied | BadAnswer]]]:
    """Return the entries of `files`, asking for what the listing lacks, and why others have none."""
    entries: list[Entry] = []
    failures: list[tuple[str, NotFound | AccessDenied | BadAnswer]] = []

    async def pin(file: Listed) -> None:
        try:
            entries.append(await _entry(web, file))
        except (NotFound, AccessDenied, BadAnswer) as error:
            failures.append((file.path, error))

    await each(pin, files)
    return entries, failures


async def _entry(web: Web, file: Listed) -> Entry:
    """Return the entry of `file`; BadAnswer if it cannot be served correctly."""
    if fault := path_fault(file.path):
        raise BadAnswer(f"{redact(file.url)}: {fault}")
    digest = Digest("sha256", file.sha256) if file.sha256 else None
    if file.size is not None and file.etag:
        return Entry(file.path, file.size, file.etag, digest)
    facts = await web.facts(file.url)
    place = redact(file.url)
    if facts.size is None:
        raise BadAnswer(f"{place}: the server does not tell its length (no Content-Length)")
    if file.size is not None and file.size != facts.size:
        raise BadAnswer(f"{place}: has {facts.size} bytes, the manifest says {file.size}: renew the manifest")
    version = _version(facts) or (f"sha256:{file.sha256}" if file.sha256 else "")
    if not version:
        raise BadAnswer(f"{place}: has neither ETag nor Last-Modified: publish its sha256 in {MANIFEST}")
    return Entry(file.path, facts.size, version, digest, facts.mtime)


def _version(facts: Facts) -> str:
    if facts.etag or not facts.last_modified:
        return facts.etag or ""
    return f"{facts.size} {facts.weak or '-'} {facts.last_modified}"


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True, limiter=_PARSERS)
