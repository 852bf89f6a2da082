"""``hf://ORG/NAME[@REVISION][/SUBDIR]``: repositories of the Hugging Face Hub and of servers like it.

`huggingface_hub` names, authenticates and resolves; the bytes are read from where ``/resolve/`` leads: a
signed link to a content network for LFS files, the Hub itself for small ones. A revision is resolved to its
commit once per snapshot. API: https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import trio

from modelfs import __version__
from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import Options, checked_options, entry_in, redact, server_of
from modelfs.stores.reach import Reach, allowed, resolved_reach
from modelfs.stores.tokens import read_token
from modelfs.stores.web import LINK_LIFE, link_expiry
from modelfs.types import Digest, Entry, Location, Snapshot, path_fault

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

T = TypeVar("T")

OPTIONS: Mapping[str, type | tuple[type, ...]] = {"endpoint": str, "token_file": str}

_THREADS = trio.CapacityLimiter(16)
_TIMEOUT = 30.0
"""Seconds that the Hub has for each step of an answer."""
_PAGES = 1000
"""Pages of a listing that are believed."""
_REMEMBERED = 4
"""Snapshots whose commits are known without asking."""
_HISTORY = 20
"""Commits of the branch that are searched for a version of unknown origin."""

_OFFICIAL = "https://huggingface.co"

# Read when huggingface_hub is imported: a file system tells nobody what is installed beside it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
_AGENT: Any = {"library_name": "modelfs", "library_version": __version__}

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"refs/(?:pr/[0-9]+|convert/[^/@]+)|[^/@]+"
_URL = re.compile(
    rf"[hH][fF]://(?P<kind>(?:models|datasets|spaces)/)?"
    rf"(?P<repo>{_PART}/{_PART}|{_PART}(?=@|/?$))(?:@(?P<revision>{_REVISION}))?(?:/(?P<subdir>.*))?"
)


class HubStore:
    """A repository at a revision, a directory of it, or one file.

    ``hf://ORG/NAME``, ``hf://NAME`` for the few without an owner, ``hf://datasets/ORG/NAME``,
    ``hf://spaces/ORG/NAME``. ``@REVISION`` is a branch, tag or commit up to the next ``/``, or one of
    ``refs/pr/N`` and ``refs/convert/NAME``; without it, ``main``. Options, all optional:

    - ``endpoint``: the server; otherwise ``HF_ENDPOINT``, otherwise https://huggingface.co.
    - ``token_file``: holds the token; otherwise ``HF_TOKEN`` or the file that ``hf auth login`` wrote. It is
      read anew for every question, so tokens can be rotated.

    Raises:
        ConfigError: malformed URL or option.

    """

    def __init__(self, url: str, options: Options) -> None:
        found = _URL.fullmatch(url)
        if found is None or re.search(r"\.\.|--|\.git$", found["repo"]):
            raise ConfigError(f"{redact(url)!r} is not a Hub URL: write hf://ORG/NAME@REVISION")
        self._kind = (found["kind"] or "models/").rstrip("/")
        self._repo: str = found["repo"]
        self._revision: str = found["revision"] or "main"
        self._subdir: str = (found["subdir"] or "").removesuffix("/")
        if self._subdir and path_fault(self._subdir):
            raise ConfigError(f"{redact(url)!r} is no place for a model: {path_fault(self._subdir)}")
        below = f"/{self._subdir}" if self._subdir else ""
        # A lone name gets company: what stands before @ right after :// would be a user's name.
        kind = f"{self._kind}/" if self._kind != "models" or "/" not in self._repo else ""
        self.url = f"hf://{kind}{self._repo}@{self._revision}{below}"
        checked_options(self.url, options, OPTIONS)
        endpoint = options.get("endpoint") or os.environ.get("HF_ENDPOINT")
        self._endpoint, self.identity = server_of(self.url, "endpoint", endpoint, _OFFICIAL)
        self._token_file: str | None = options.get("token_file")
        self._known: dict[str, Snapshot] = {}

    def __repr__(self) -> str:
        return f"<HubStore {self.url}>"

    async def snapshot(self) -> Snapshot:
        """Resolve the revision and list its tree; an unmoved revision costs one small request.

        Raises:
            NotFound: no such repository, revision or directory, or none that this token may see.
            AccessDenied: the repository is gated, and its files cannot be read.
            StoreError: any other failure.

        """
        snapshot = await self._in_thread(self._snapshot, dict(self._known))
        self._known.pop(snapshot.revision, None)
        self._known[snapshot.revision] = snapshot
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return snapshot

    async def entry(self, path: str) -> Entry:
        """Return what the latest snapshot has at `path`.

        Raises:
            NotFound: nothing is there.
            StoreError: any other failure.

        """
        latest = list(self._known.values())[-1] if self._known else await self.snapshot()
        return entry_in(latest, path)

    async def locate(self, entry: Entry) -> Location:
        """Return where the Hub keeps this version, whatever its branch has become since.

        Raises:
            Stale: it is in none of the commits that can be looked at.
            StoreError: any other failure.

        """
        return await self._in_thread(self._locate, entry, dict(self._known))

    # The verbs, in a thread

    def _snapshot(self, known: Mapping[str, Snapshot]) -> Snapshot:
        if self._revision in known:
            return known[self._revision]  # a commit: nothing can have changed
        sha, mtime, gated = self._commit()
        if sha in known:
            return known[sha]
        rows = self._pages(f"tree/{sha}?recursive=true")
        entries = [entry for row in rows if (entry := self._entry_of(row, mtime))]
        if self._subdir and not entries:
            raise NotFound(f"{self.url}: there is no {self._subdir!r} at commit {sha}: check the URL")
        if gated and entries:
            # Anybody may list it; better refused now than when it is read. Cards may be open, weights never.
            self._file(max(entries, key=lambda entry: entry.size), sha)
        return Snapshot.of(self.url, sha, entries)

    def _commit(self) -> tuple[str, float, bool]:
        """Return the revision's commit, the time of the repository's last change, and whether it is gated."""
        from huggingface_hub import HfApi

        wanted: Any = ["sha", "lastModified"]
        if self._kind != "spaces":  # which cannot be
            wanted.append("gated")
        info = HfApi(self._endpoint, self._token()).repo_info(
            self._repo, revision=self._revision, repo_type=self._kind[:-1], timeout=_TIMEOUT, expand=wanted
        )
        sha, changed = info.sha or "", info.last_modified
        if not re.fullmatch(r"[0-9a-f]{40,64}", sha):
            raise BadAnswer(f"{self.url}: the server names no commit: check the endpoint {self._endpoint}")
        return sha, changed.timestamp() if changed else 0.0, bool(info.gated)

    def _entry_of(self, row: Mapping[str, Any], mtime: float) -> Entry | None:
        """Return the entry of one row of the tree; None if it is elsewhere or a directory."""
        path = row["path"]
        if row["type"] != "file":
            return None
        if path == self._subdir:
            path = path.rpartition("/")[2]
        elif self._subdir:
            if not path.startswith(f"{self._subdir}/"):
                return None
            path = path[len(self._subdir) + 1 :]
        lfs = row.get("lfs")
        digest = Digest("sha256", lfs["oid"]) if lfs else Digest("git-sha1", row["oid"])
        return Entry(path, int(lfs["size"] if lfs else row["size"]), str(digest), digest, mtime)

    def _locate(self, entry: Entry, known: Mapping[str, Snapshot]) -> Location:
        for sha, snapshot in reversed(list(known.items())):
            listed = snapshot.entries.get(entry.path)
            if listed is not None and listed.version == entry.version and (found := self._file(entry, sha)):
                return self._location(found, entry)
        # Listed before this store was made, by a daemon that ran earlier.
        for sha in self._history():
            found = None if sha in known else self._file(entry, sha)
            if found is not None and found.etag == entry.version.partition(":")[2]:
                return self._location(found, entry)
        raise Stale(f"{self.url}: {entry.path!r} was changed or removed: refresh the model")

    def _history(self) -> Iterator[str]:
        """Yield the commits of the revision, newest first; the servers that keep no history have one."""
        newest, _, _ = self._commit()
        yield newest
        try:
            older = [
                str(row["id"])
                for row, _ in zip(self._pages(f"commits/{newest}"), range(_HISTORY), strict=False)
            ]
        except NotFound:
            return
        yield from (sha for sha in older if sha != newest)

    def _file(self, entry: Entry, sha: str) -> HfFileMetadata | None:
        """Return where the commit has a file of the entry's name, if it does."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

        paths = [f"{self._subdir}/{entry.path}" if self._subdir else entry.path]
        if entry.path == self._subdir.rpartition("/")[2]:
            paths.insert(0, self._subdir)  # the URL names a single file
        for path in paths:
            url = hf_hub_url(
                self._repo, path, repo_type=self._kind[:-1], revision=sha, endpoint=self._endpoint
            )
            try:
                found = get_hf_file_metadata(
                    url, token=self._token(), timeout=_TIMEOUT, endpoint=self._endpoint, **_AGENT
                )
            except (EntryNotFoundError, RevisionNotFoundError):
                continue
            if found.commit_hash not in (None, sha):
                raise BadAnswer(f"{self.url}: asked for commit {sha}, the server answered another")
            return found
        return None

    def _location(self, found: HfFileMetadata, entry: Entry) -> Location:
        """Return the location of the content; its ETag is the content network's, which nobody published."""
        if found.size not in (None, entry.size):
            raise BadAnswer(
                f"{self.url}: {entry.path!r} has {entry.size} bytes, the server says {found.size}"
            )
        now = time.time()
        if _origin(found.location) != _origin(self._endpoint):
            # Signed already. A token must not leave the Hub.
            if found.location.startswith("http:") and self._endpoint.startswith("https:"):
                raise BadAnswer(f"{self.url}: {self._endpoint} leads from https to http: check the endpoint")
            limit = resolved_reach(self._endpoint)
            allowed(found.location, resolved_reach(found.location), limit)
            public = limit is Reach.PUBLIC
            return Location(found.location, expires=link_expiry(found.location, now), public=public)
        sent = {k: v for k, v in self._headers().items() if k.lower() == "authorization"}
        return Location(found.location, sent, now + LINK_LIFE)

    # Asking the Hub

    def _pages(self, question: str) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of an answer in pages (RFC 8288 links): as huggingface_hub does, with time-outs."""
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not declared
            get_session,
            hf_raise_for_status,
        )

        url = f"{self._endpoint}/api/{self._kind}/{self._repo}/{question}"
        for _ in range(_PAGES):
            answer = get_session().get(url, headers=self._headers(), timeout=_TIMEOUT)
            hf_raise_for_status(answer)
            yield from answer.json()
            url = answer.links.get("next", {}).get("url", "")
            if not url:
                return
            # A mirror may pass on links to the original, where the token must not go.
            url = url.replace(_OFFICIAL, self._endpoint, 1) if url.startswith(_OFFICIAL) else url
            if _origin(url) != _origin(self._endpoint):
                break
        raise BadAnswer(f"{self.url}: the listing does not end, or not at {self._endpoint}")

    def _headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # as above

        headers: dict[str, str] = build_hf_headers(token=self._token(), **_AGENT)
        return headers

    def _token(self) -> str | None:
        """Return the token of the configured file; None leaves it to huggingface_hub."""
        if self._token_file is None:
            return None
        return read_token(self._token_file, self.url)

    async def _in_thread(self, verb: Callable[..., T], *arguments: Any) -> T:
        def ask() -> T:
            try:
                return verb(*arguments)
            except StoreError:
                raise
            except Exception as error:  # the library's, of many kinds; none of them may leave a store
                raise self._fault(error) from error

        # Nothing is changed by the question, so its thread may be left behind by a cancelled caller.
        return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=_THREADS)

    def _fault(self, error: Exception) -> StoreError:
        """Return what `error` means; the library's own text runs over many lines and may quote the server."""
        from huggingface_hub import errors as hub

        match error:
            case hub.OfflineModeIsEnabled():
                return Unavailable(
                    f"{self.url}: HF_HUB_OFFLINE=1 forbids asking the Hub: unset it for modelfs"
                )
            case hub.GatedRepoError():
                page = f"{self._endpoint}/{'' if self._kind == 'models' else f'{self._kind}/'}{self._repo}"
                return AccessDenied(f"{self.url} is gated: accept its licence at {page} and set HF_TOKEN")
            case hub.RevisionNotFoundError():
                return NotFound(f"{self.url}: there is no revision {self._revision!r}: check the URL")
            case hub.RepositoryNotFoundError():
                return NotFound(
                    f"{self.url}: no such repository, or a private one: check the name and HF_TOKEN"
                )
            case hub.DisabledRepoError():
                return AccessDenied(f"{self.url} was disabled by the Hub: use another repository")
            case hub.HfHubHTTPError():
                return self._refused(error.response.status_code, error.response.headers)
            # httpx.HTTPError or httpx2.HTTPError, whichever the installed huggingface_hub is built on.
            case _ if isinstance(error, hub.HfHubHTTPError.__bases__[0]):
                place = f"the Hub at {self._endpoint} cannot be reached"
                return Unavailable(f"{self.url}: {place} ({type(error).__name__}): check the network")
        kind = type(error).__name__
        return BadAnswer(
            f"{self.url}: the answer is not a Hub's ({kind}): check the endpoint {self._endpoint}"
        )

    def _refused(self, status: int, headers: Mapping[str, str]) -> StoreError:
        match status:
            case 401 | 403:
                return AccessDenied(f"{self.url}: the token was refused ({status}): check HF_TOKEN")
            case 404:
                return NotFound(f"{self.url}: not at {self._endpoint}: check the URL and the endpoint")
            case 408 | 429 | 500 | 502 | 503 | 504:
                # https://huggingface.co/docs/hub/rate-limits: RateLimit: "api";r=0;t=55
                reset = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("ratelimit", ""))
                wait = reset[1] if reset else headers.get("retry-after", "")
                text = f"{self.url}: the Hub answered {status}: try again later, with a token if it has none"
                return Unavailable(text, retry_after=float(wait) if wait.isdigit() else None)
        return BadAnswer(f"{self.url}: unexpected answer {status} of {self._endpoint}")


def _origin(url: str) -> tuple[str, str, int | None]:
    """Return what must be equal for a token to be sent along (RFC 6454)."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise BadAnswer(f"the Hub leads to a {parts.scheme}: URL: check the endpoint")
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme]
