"""``mlflow://``: registered models, logged models and artifacts of runs that an MLflow tracking server knows.

Asks the tracking server's REST API (https://mlflow.org/docs/latest/api_reference/rest-api.html). The bytes
come through the server where it proxies artifacts (``mlflow-artifacts:/…``, the service of
``mlflow_artifacts.proto``), and straight from the bucket where it names one (``s3://…``).

The version of an entry ends with the root of the artifacts it was listed in, so it can be located after the
alias has moved, and after a restart.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlencode, urlsplit

import trio

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError
from modelfs.stores import Options, Store, checked_options, entry_in, open_store, redact
from modelfs.stores.reach import leads
from modelfs.stores.web import Answer, Web, basic_auth, each, failure, link_expiry, tls_context
from modelfs.types import Entry, Location, Snapshot, path_fault

OPTIONS: Mapping[str, type | tuple[type, ...]] = {
    "tracking_uri": str,
    "artifacts": dict,
    "ca_bundle": str,
    "max_entries": int,
    "timeout": (int, float),
}

ELSEWHERE = frozenset({"s3", "gs"})
"""Schemes of artifact roots that are read without the tracking server: those that lead to no private file."""

MAX_ANSWER = 64 << 20
MAX_DEPTH = 32
_REMEMBERED = 4
"""Artifact roots whose stores are kept."""

_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
_SIGNED = "/api/2.0/mlflow-artifacts/presigned"
_UNSENDABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""What no name or URI can hold that is sent again."""
_URL = re.compile(
    r"(?i:mlflow)://(?:"
    r"models/(?P<name>[^/:?#]+?)(?:@(?P<alias>[\w-]+)|/(?P<version>[0-9]+|latest))"
    r"|models/(?P<logged>m-[\w-]+)"
    r"|runs/(?P<run>[\w-]+)"
    r")(?:/(?P<path>.*))?"
)


class Found(NamedTuple):
    """What a mutable name stands for now: the URI of its artifacts, and what `revision` to show."""

    revision: str
    root: str


class MlflowStore:
    """The artifacts of a model or a run; implements :class:`modelfs.stores.Store`.

    ``mlflow://models/NAME/VERSION``, ``…/latest``, ``mlflow://models/NAME@ALIAS``, ``mlflow://models/m-ID``
    (a logged model) and ``mlflow://runs/RUN``; each may be followed by ``/PATH`` of a directory or file
    below. Of a run, the first component of ``PATH`` may be the name of a model that it logged. Options, all
    optional:

    - ``tracking_uri``: the tracking server; otherwise ``MLFLOW_TRACKING_URI``.
    - ``artifacts``: options of the store that the artifacts are in, if the server does not proxy them.
    - ``ca_bundle``: file of the authorities to trust while asking; otherwise
      ``MLFLOW_TRACKING_SERVER_CERT_PATH``.
    - ``max_entries``: most files and directories to list (100 000).
    - ``timeout``: seconds that one question may take (60).

    User and password come from ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD`` or from
    ``~/.mlflow/credentials``, otherwise ``MLFLOW_TRACKING_TOKEN`` is sent; they are read for every call.

    Raises:
        ConfigError: malformed URL or option, or no tracking server.

    """

    def __init__(self, url: str, options: Options) -> None:
        found = _URL.fullmatch(url)
        if found is None:
            raise ConfigError(
                f"{redact(url)!r} is not an MLflow URL: write mlflow://models/NAME/VERSION, "
                "mlflow://models/NAME@ALIAS, mlflow://models/m-ID or mlflow://runs/RUN/PATH"
            )
        self._asked = found.groupdict()
        self._path = (found["path"] or "").removesuffix("/")
        if self._path and (fault := path_fault(self._path)):
            raise ConfigError(f"{redact(url)!r} is no place for a model: {fault}")
        self.url = f"mlflow://{url.partition('://')[2].removesuffix('/')}"
        checked_options(self.url, options, OPTIONS)
        self._tracking = _tracking_uri(self.url, options.get("tracking_uri"))
        self.identity = f"{self.url} at {self._tracking}"
        self._ca_bundle = options.get("ca_bundle") or os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
        self._max_entries: int = options.get("max_entries", 100_000)
        self._timeout: float = options.get("timeout", 60)
        self._artifacts: Options = options.get("artifacts", {})
        self._stores: dict[str, Store] = {}
        self._signs = True
        self._pins: dict[tuple[str, str], str | None] = {}

    def __repr__(self) -> str:
        return f"<MlflowStore {self.url}>"

    async def snapshot(self) -> Snapshot:
        """Resolve alias, version or run to its artifacts, and list them.

        Raises:
            NotFound: the server knows no such model, version, alias or run, or nothing is at its path.
            AccessDenied: the server refuses.
            StoreError: any other failure, also that the artifacts are where only the server can read them.

        """
        async with await self._web() as web:
            found = await self._resolve(web)
            place = self._proxied(found.root)
            if place is not None:
                return await self._listed(web, found, place)
        inner = await self._store(found.root).snapshot()
        root = quote(found.root)
        entries = [replace(entry, version=f"{entry.version} {root}") for entry in inner.entries.values()]
        listed = Snapshot.of(self.url, found.revision, entries, complete=inner.complete)
        return replace(listed, rejected=(*listed.rejected, *inner.rejected))

    async def entry(self, path: str) -> Entry:
        """Return the entry at `path` of a fresh listing; NotFound if there is none."""
        return entry_in(await self.snapshot(), path)

    async def locate(self, entry: Entry) -> Location:
        """Return where the server, or the store behind it, has the file.

        Raises:
            Stale: the store behind it no longer has this version.
            StoreError: any other failure.

        """
        version, _, root = entry.version.rpartition(" ")
        root = unquote(root)
        if not version:
            raise Stale(f"{self.url}: there is no such version of {entry.path!r}: refresh the model")
        place = self._proxied(root)
        if place is None:
            return await self._store(root).locate(replace(entry, version=version))
        path = quote(os.fsencode("/".join(filter(None, (place, entry.path)))))
        if self._signs and entry.size and (signed := await self._signed(path, entry)):
            return signed
        return Location(f"{self._tracking}{_ARTIFACTS}/{path}", await self._secrets())

    async def _signed(self, path: str, entry: Entry) -> Location | None:
        """Return a link into the bucket behind the server, which serves ranges; None if there is none.

        MLflow 3 signs such links if the bucket can; without, the server fetches all of an object for each
        request.
        """
        now = time.time()
        async with await self._web() as web:
            answer = await web.ask("GET", f"{self._tracking}{_SIGNED}/{path}", MAX_ANSWER)
            if answer.status != 200:  # what else is wrong, the artifact's own URL tells
                self._signs = answer.status != 501
                return None
            data = self._parsed(answer)
            link = self._text(data, "url")
            if data.get("headers"):
                return None
            public = await trio.to_thread.run_sync(leads, self._tracking, link)
            facts = await web.facts(link)
        pinned = self._pins.setdefault((entry.path, entry.version), facts.etag)
        if facts.size != entry.size or pinned != facts.etag:
            raise Stale(f"{self.url}: {entry.path!r} was changed since it was listed: refresh the model")
        return Location(link, expires=link_expiry(link, now), etag=facts.etag, public=public)

    # What names stand for

    async def _resolve(self, web: Web) -> Found:
        """Return what the URL stands for now.

        Raises:
            StoreError: the server does not say.

        """
        asked = self._asked
        if asked["run"]:
            return await self._run(web, asked["run"])
        if asked["logged"]:
            return Found(asked["logged"], _below(await self._logged(web, asked["logged"]), self._path))
        name, version = asked["name"], asked["version"]
        if asked["alias"]:
            row = await self._ask(web, "registered-models/alias", name=name, alias=asked["alias"])
            version = self._text(row, "model_version", "version")
        elif version == "latest":
            named = name.replace("'", "''")
            newest = {"filter": f"name = '{named}'", "order_by": "version_number DESC", "max_results": "1"}
            row = await self._ask(web, "model-versions/search", **newest)
            versions = self._rows(row, "model_versions")
            if not versions:
                raise NotFound(f"{self.url}: {self._tracking} has no version of this model: check the URL")
            version = self._text(versions[0], "version")
        row = await self._ask(web, "model-versions/get-download-uri", name=name, version=version)
        return Found(version, _below(self._text(row, "artifact_uri"), self._path))

    async def _run(self, web: Web, run: str) -> Found:
        """Return the artifacts of a run, or of the newest model that it logged under that name.

        MLflow 3 keeps logged models beside runs, and answers for ``runs:/RUN/NAME`` all the same.
        """
        row = await self._ask(web, "runs/get", run_id=run)
        name, _, rest = self._path.partition("/")
        models: list[tuple[int, str, str]] = []

        async def look(output: Any) -> None:
            info = await self._logged_info(web, self._text(output, "model_id"))
            if info.get("name") == name:
                created = self._number(info, "creation_timestamp_ms")
                models.append((created, self._text(info, "model_id"), self._text(info, "artifact_uri")))

        await each(look, self._rows(row, "run", "outputs", "model_outputs") if name else [])
        if models:
            _, model, root = max(models)
            return Found(model, _below(root, rest))
        return Found(run, _below(self._text(row, "run", "info", "artifact_uri"), self._path))

    async def _logged(self, web: Web, model: str) -> str:
        return self._text(await self._logged_info(web, model), "artifact_uri")

    async def _logged_info(self, web: Web, model: str) -> Mapping[str, Any]:
        row = await self._ask(web, f"logged-models/{quote(model, safe='')}")
        info = _member(row, "model", "info")
        return info if isinstance(info, dict) else {}

    # Where artifacts are

    def _proxied(self, root: str) -> str | None:
        """Return the path of `root` at the server, "" for its top; None if another store has it.

        Raises:
            StoreError: neither is so.

        """
        try:
            parts, server = urlsplit(root), urlsplit(self._tracking)
        except ValueError:
            raise self._malformed("artifact_uri") from None
        if parts.scheme == "mlflow-artifacts" and parts.netloc in ("", server.netloc):
            return parts.path.removeprefix(_ARTIFACTS).strip("/")
        if root.startswith(f"{self._tracking}{_ARTIFACTS}/"):
            return root.removeprefix(f"{self._tracking}{_ARTIFACTS}").strip("/")
        if parts.scheme in ELSEWHERE:
            return None
        raise StoreError(
            f"{self.url}: its artifacts are at {redact(root)}, which cannot be read from here: let the "
            "server proxy them (--serve-artifacts), or make this place itself the source of the model"
        )

    def _store(self, root: str) -> Store:
        if root not in self._stores:
            options = dict(self._artifacts)
            endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
            if root.startswith("s3:") and endpoint:
                options.setdefault("endpoint_url", endpoint)
            try:
                self._stores[root] = open_store(root, options)
            except ConfigError as error:
                raise StoreError(f"{self.url}: its artifacts cannot be read: {error}") from error
            while len(self._stores) > _REMEMBERED:
                del self._stores[next(iter(self._stores))]
        return self._stores[root]

    async def _listed(self, web: Web, found: Found, place: str) -> Snapshot:
        """Return what the server lists below `place`, or the one file there."""
        entries: list[Entry] = []
        rejected: list[tuple[str, str]] = []
        below: list[str] = []
        level, seen = [""], 0
        version = quote(found.root)

        async def look(directory: str) -> None:
            nonlocal seen
            rows = await self._directory(web, "/".join(filter(None, (place, directory))))
            seen += len(rows)
            if seen > self._max_entries:
                raise StoreError(
                    f"{self.url}: more than {self._max_entries} entries: raise the option max_entries"
                )
            for row in rows:
                path = "/".join(filter(None, (directory, row.path)))
                if (
                    fault := path_fault(row.path)
                    or ("/" in row.path and "it names no child")
                    or path_fault(path)
                ):
                    rejected.append((path, fault))
                elif row.size is None:
                    below.append(path)
                else:
                    entries.append(Entry(path, row.size, f"{row.size} {version}"))

        for _ in range(MAX_DEPTH):
            await each(look, level)
            level, below = below, []
        rejected += [(path, f"it is deeper than {MAX_DEPTH} directories") for path in level]
        if not seen and self._path:
            entries = await self._lone(web, found.root, place)
        if not entries and not rejected:
            raise NotFound(f"{self.url}: there are no artifacts at {self._tracking}: check the URL")
        listed = Snapshot.of(self.url, found.revision, entries)
        return replace(listed, rejected=(*listed.rejected, *sorted(rejected)))

    async def _lone(self, web: Web, root: str, place: str) -> list[Entry]:
        """Return the file at `place` as the only entry; a listing of it is empty, like that of nothing."""
        above, _, name = place.rpartition("/")
        version = quote(root.rpartition("/")[0])
        return [
            Entry(row.path, row.size, f"{row.size} {version}")
            for row in await self._directory(web, above)
            if row.path == name and row.size is not None
        ]

    async def _directory(self, web: Web, place: str) -> list[_Row]:
        url = f"{self._tracking}{_ARTIFACTS}?{urlencode({'path': os.fsencode(place)})}"
        return [self._row(row) for row in self._rows(await self._json(web, url), "files")]

    def _row(self, row: Any) -> _Row:
        path = _member(row, "path")
        if not isinstance(path, str) or not path:
            raise self._malformed("path")
        if "/" in path:  # names of children are asked for
            raise self._malformed("files.path")
        return _Row(path, None if row.get("is_dir") else self._number(row, "file_size"))

    # Questions

    async def _web(self) -> Web:
        try:
            tls = await trio.to_thread.run_sync(tls_context, self._ca_bundle)
        except OSError as error:
            raise StoreError(
                f"{self.url}: cannot use the CA bundle {self._ca_bundle}: {error.strerror}"
            ) from error
        return Web(self._tracking, await self._secrets(), tls=tls, timeout=self._timeout)

    async def _secrets(self) -> dict[str, str]:
        return await trio.to_thread.run_sync(_credentials, self.url)

    async def _ask(self, web: Web, question: str, **fields: str) -> Mapping[str, Any]:
        query = f"?{urlencode(fields)}" if fields else ""
        return await self._json(web, f"{self._tracking}/api/2.0/mlflow/{question}{query}")

    async def _json(self, web: Web, url: str) -> Mapping[str, Any]:
        answer = await web.ask("GET", url, MAX_ANSWER)
        if answer.status in (400, 404):  # 400: no such alias
            raise NotFound(f"{self.url}: {self._tracking} has no such thing: check the URL")
        if answer.status in (401, 403):
            raise AccessDenied(
                f"{self.url}: {self._tracking} refuses ({answer.status}): check MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        if answer.status != 200:
            raise failure(answer, url)
        return self._parsed(answer)

    def _parsed(self, answer: Answer) -> Mapping[str, Any]:
        try:
            data = json.loads(answer.body)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise BadAnswer(
                f"{self.url}: {self._tracking} does not answer as MLflow does: check tracking_uri"
            )
        return data

    def _text(self, row: Any, *path: str) -> str:
        """Return the text at `path` in an answer; BadAnswer if it is not there."""
        text = _member(row, *path)
        if not isinstance(text, str) or not text or _UNSENDABLE.search(text):
            raise self._malformed(".".join(path))
        return text

    def _number(self, row: Mapping[str, Any], name: str) -> int:
        """Return a number, which JSON of protocol buffers writes as a text too; 0 if it is not there."""
        number = row.get(name, 0)
        if type(number) not in (int, str) or not re.fullmatch(r"[0-9]{1,18}", str(number)):
            raise self._malformed(name)
        return int(number)

    def _rows(self, row: Any, *path: str) -> list[Any]:
        """Return the list at `path`, which is left out where it is empty."""
        rows = _member(row, *path)
        if not isinstance(rows, list | None):
            raise self._malformed(".".join(path))
        return rows or []

    def _malformed(self, member: str) -> BadAnswer:
        return BadAnswer(f"{self.url}: the answer of {self._tracking} has no {member}: check tracking_uri")


class _Row(NamedTuple):
    """One artifact in a directory; `size` is None for a directory."""

    path: str
    size: int | None


def _member(row: Any, *path: str) -> Any:
    """Return what is at `path` in objects of objects; None if there is nothing."""
    for name in path:
        row = row.get(name) if isinstance(row, dict) else None
    return row


def _below(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}" if path else root.rstrip("/")


def _tracking_uri(url: str, told: str | None, env: Mapping[str, str] = os.environ) -> str:
    uri = told or env.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ConfigError(
            f"{url}: no tracking server is named: set the option tracking_uri or MLFLOW_TRACKING_URI"
        )
    if "@" in urlsplit(uri).netloc:
        raise ConfigError(
            f"{url}: the tracking URI holds a password: move it to MLFLOW_TRACKING_USERNAME and _PASSWORD"
        )
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", uri):
        raise ConfigError(
            f"{url}: the tracking URI {redact(uri)!r} is not that of a server, http(s)://HOST; models of "
            "a directory are mounted as file:///…/mlruns/EXPERIMENT/models/m-ID/artifacts"
        )
    return uri.rstrip("/")


def _credentials(url: str, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the ``Authorization`` that MLflow's own client would send.

    Raises:
        AccessDenied: ``~/.mlflow/credentials`` is there but cannot be read.

    """
    user, password = env.get("MLFLOW_TRACKING_USERNAME"), env.get("MLFLOW_TRACKING_PASSWORD")
    if not (user and password):
        file = configparser.ConfigParser(interpolation=None)
        try:
            file.read(Path("~/.mlflow/credentials").expanduser())
        except RuntimeError:
            pass
        except (configparser.Error, OSError, UnicodeError):  # the parser's message may quote a password
            raise AccessDenied(f"{url}: ~/.mlflow/credentials cannot be read: correct it") from None
        user = user or file.get("mlflow", "mlflow_tracking_username", fallback="")
        password = password or file.get("mlflow", "mlflow_tracking_password", fallback="")
    if user and password:
        return {"authorization": basic_auth(user, password)}
    token = env.get("MLFLOW_TRACKING_TOKEN")
    return {"authorization": f"Bearer {token}"} if token else {}
