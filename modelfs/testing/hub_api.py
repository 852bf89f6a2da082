"""The child of `HubServer`: what a Hub answers, from the state that its parent saves."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from modelfs.testing.server import HOST, Application

TOKEN = "hf_modelfsTestToken"  # noqa: S105  # accepted by this server only
"""The one token that is valid."""

_EPOCH = 1_704_067_200
_PIECE = 1 << 20


def pieces(path: str | Path, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes ``[start, stop)`` of a file, a mebibyte at a time."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # one call for str and Path
        while start < stop:
            piece = os.pread(file.fileno(), min(_PIECE, stop - start), start)
            if not piece:
                raise OSError(f"{path} became shorter while it was served")
            yield piece
            start += len(piece)


class _Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Iterable[bytes] = ()


_REASONS = {200: "OK", 206: "Partial Content", 302: "Found", 307: "Temporary Redirect", 400: "Bad Request",
            401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 412: "Precondition Failed",
            416: "Range Not Satisfiable"}  # fmt: skip


def application(state_path: str) -> Application:
    """Return the Hub as a WSGI application that follows the state its parent saves at `state_path`."""
    lock = threading.Lock()
    loaded: dict[str, Any] = {}
    identity = None

    def state() -> dict[str, Any]:
        nonlocal loaded, identity
        with lock:
            stat = Path(state_path).stat()
            if identity != (stat.st_ino, stat.st_mtime_ns):
                loaded = json.loads(Path(state_path).read_bytes())
                identity = (stat.st_ino, stat.st_mtime_ns)
            return loaded

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        answer = _Hub(state(), environ).answer()
        start_response(f"{answer.status} {_REASONS[answer.status]}", list(answer.headers.items()))
        return answer.body

    return app


class _Refusal(Exception):
    """Ends the handling of a request with an error answer as the Hub gives it."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        body = json.dumps({"error": message}).encode()
        fields = {"X-Error-Message": message, "Content-Type": "application/json; charset=utf-8"}
        if code:
            fields["X-Error-Code"] = code
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer = _Answer(status, {**fields, "Content-Length": str(len(body))}, [body])


class _Hub:
    """One request and the state it is answered from."""

    def __init__(self, state: dict[str, Any], environ: dict[str, Any]) -> None:
        self.state = state
        self.environ = environ
        target, _, query = environ["RAW_URI"].partition("?")
        self.parts = [urllib.parse.unquote(part) for part in target.strip("/").split("/")]
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        self.expand = [v for k, v in urllib.parse.parse_qsl(query) if k == "expand"]
        self.origin = f"http://{environ['HTTP_HOST']}"
        self.authorization = environ.get("HTTP_AUTHORIZATION", "")

    def answer(self) -> _Answer:
        try:
            match self.parts:
                case ["cdn", sha256]:
                    return self.link(sha256)
                case ["api", "whoami-v2"]:
                    return self.whoami()
                case ["api", "resolve-cache", kind, *rest]:
                    name, repo, [sha, *path] = self.repository(kind, rest)
                    return self.file(name, repo, sha, "/".join(path))
                case ["api", ("models" | "datasets" | "spaces") as kind, *rest]:
                    name, repo, rest = self.repository(kind, rest)
                    return self.api(name, repo, rest)
                case [("datasets" | "spaces") as kind, *rest] if "resolve" in rest:
                    return self.resolve(kind, rest)
                case rest if "resolve" in rest:
                    return self.resolve("models", rest)
            raise _Refusal(404, "", "Sorry, we can't find the page you are looking for.")
        except _Refusal as refusal:
            return refusal.answer

    # Who asks, and for what

    def authenticated(self) -> bool:
        if not self.authorization:
            return False
        if self.authorization != f"Bearer {TOKEN}":
            raise _Refusal(401, "", "Invalid credentials in Authorization header")
        return True

    def repository(self, kind: str, rest: list[str]) -> tuple[str, dict[str, Any], list[str]]:
        """Split a path into the repository, whose name has one or two parts, and what follows."""
        prefix = "" if kind == "models" else f"{kind}/"
        known = self.authenticated()
        for length in (2, 1):
            name = prefix + "/".join(rest[:length])
            repo = self.state["repositories"].get(name)
            if repo is not None and (known or not repo["private"]):
                return name, repo, rest[length:]
        # Strangers cannot tell a private repository from none.
        status = 404 if known else 401
        raise _Refusal(
            status, "RepoNotFound", "Repository not found" if known else "Invalid username or password."
        )

    def commit(self, repo: dict[str, Any], revision: str) -> str:
        for names in (repo["refs"], repo["tags"]):
            if revision in names:
                return str(names[revision])
        if revision in repo["commits"]:
            return revision
        raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def may_read(self, name: str, repo: dict[str, Any]) -> None:
        if not repo["gated"] or (self.authenticated() and repo["accepted"]):
            return
        message = f"Access to model {name} is restricted and you are not in the authorized list."
        if not self.authenticated():
            raise _Refusal(401, "GatedRepo", f"{message} You must be authenticated to access it.")
        raise _Refusal(403, "GatedRepo", f"{message} Visit {self.origin}/{name} to ask for access.")

    # The API

    def whoami(self) -> _Answer:
        if not self.authenticated():
            raise _Refusal(401, "", "Invalid username or password.")
        return _json({"type": "user", "name": "modelfs", "orgs": []})

    def api(self, name: str, repo: dict[str, Any], rest: list[str]) -> _Answer:
        match rest:
            case []:
                return self.info(name, repo, repo["refs"].get("main") or next(iter(repo["refs"].values())))
            case ["revision", revision]:
                return self.info(name, repo, self.commit(repo, revision))
            case ["refs"]:
                return _json(_refs(repo))
            case ["commits", revision]:
                return self.page(_commits(repo, self.commit(repo, revision)), 50)
            case ["tree", revision, *path]:
                return self.tree(repo, self.commit(repo, revision), "/".join(path))
            case ["paths-info", revision]:
                return self.paths_info(repo, self.commit(repo, revision))
        raise _Refusal(404, "", "Sorry, we can't find the page you are looking for.")

    def info(self, name: str, repo: dict[str, Any], sha: str) -> _Answer:
        commit = repo["commits"][sha]
        siblings: list[dict[str, Any]] = []
        for path, row in commit["tree"].items():
            sibling = {"rfilename": path}
            if self.query.get("blobs") in ("True", "true", "1"):
                sibling |= {"size": row["size"], "blobId": row["oid"]}
                if lfs := row["lfs"]:
                    sizes = {"size": lfs["size"], "pointerSize": lfs["pointerSize"]}
                    sibling["lfs"] = {"sha256": lfs["oid"], **sizes}
            siblings.append(sibling)
        short = name.removeprefix("datasets/").removeprefix("spaces/")
        data: dict[str, Any] = {
            "_id": hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()[:24],
            "id": short,
            "modelId": short,
            "author": short.partition("/")[0],
            "sha": sha,
            "lastModified": _date(commit),
            "createdAt": _date({"order": 0}),
            "private": repo["private"],
            "gated": "manual" if repo["gated"] else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        if self.expand:
            data = {key: data[key] for key in ("_id", "id", *self.expand) if key in data}
        return _json(data)

    def tree(self, repo: dict[str, Any], sha: str, path: str) -> _Answer:
        rows = self.rows(repo, sha)
        below = f"{path}/" if path else ""
        rows = [row for row in rows if row["path"].startswith(below)]
        if path and not rows:
            raise _Refusal(404, "EntryNotFound", f'{path} does not exist on "{sha}"')
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            rows = [row for row in rows if "/" not in row["path"][len(below) :]]
        size: int = self.state["page_size"]
        return self.page(rows, min(size, 50) if self.expanded() else size)

    def paths_info(self, repo: dict[str, Any], sha: str) -> _Answer:
        body = self.environ["wsgi.input"].read()
        if self.environ.get("CONTENT_TYPE", "").startswith("application/json"):
            fields = json.loads(body)
            wanted = set(fields["paths"])
            expand = fields.get("expand", False)
        else:
            pairs = urllib.parse.parse_qsl(body.decode())
            wanted = {value for key, value in pairs if key == "paths"}
            expand = ("expand", "true") in [(key, value.lower()) for key, value in pairs]
        self.query["expand"] = "true" if expand else ""
        return _json([row for row in self.rows(repo, sha) if row["path"] in wanted])

    def rows(self, repo: dict[str, Any], sha: str) -> list[dict[str, Any]]:
        """Return files and directories as the tree lists them, in the order of their paths."""
        tree: dict[str, Any] = repo["commits"][sha]["tree"]
        rows: dict[str, dict[str, Any]] = {}
        for path, blob in tree.items():
            row: dict[str, Any] = {"type": "file", "oid": blob["oid"], "size": blob["size"], "path": path}
            if blob["lfs"]:
                row["lfs"] = blob["lfs"]
            rows[path] = row
            parts = path.split("/")
            for depth in range(1, len(parts)):
                above = "/".join(parts[:depth])
                oid = hashlib.sha1(f"{sha}/{above}".encode(), usedforsecurity=False).hexdigest()
                rows[above] = {"type": "directory", "oid": oid, "size": 0, "path": above}
        if self.expanded():
            last = {"id": sha, "title": "Upload files", "date": _date(repo["commits"][sha])}
            for row in rows.values():
                row["lastCommit"] = last
        return [rows[path] for path in sorted(rows)]

    def expanded(self) -> bool:
        return self.query.get("expand", "").lower() in ("true", "1")

    def page(self, rows: list[Any], size: int) -> _Answer:
        """Answer one page, with the way to the next in a ``Link`` header (RFC 8288)."""
        start = int(self.query.get("cursor", 0))
        answer = _json(rows[start : start + size])
        if start + size < len(rows):
            query = urllib.parse.urlencode({**self.query, "cursor": start + size})
            target = self.environ["RAW_URI"].partition("?")[0]
            answer.headers["Link"] = f'<{self.origin}{target}?{query}>; rel="next"'
        return answer

    # Content

    def resolve(self, kind: str, rest: list[str]) -> _Answer:
        name, repo, rest = self.repository(kind, rest)
        self.may_read(name, repo)
        if len(rest) < 3 or rest[0] != "resolve":
            raise _Refusal(404, "", "Sorry, we can't find the page you are looking for.")
        sha, path = self.commit(repo, rest[1]), "/".join(rest[2:])
        row = self.entry(repo, sha, path)
        commit = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if row["lfs"]:
            linked = {"X-Linked-Size": str(row["size"]), "X-Linked-Etag": f'"{row["lfs"]["oid"]}"'}
            return _redirect(302, self.signed(row["lfs"]["oid"]), {**commit, **linked})
        etag = urllib.parse.quote(f'"{row["oid"]}"')
        target = urllib.parse.quote(f"/api/resolve-cache/{kind}/{name.removeprefix(kind + '/')}/{sha}/{path}")
        return _redirect(307, f"{target}?etag={etag}", commit)

    def entry(self, repo: dict[str, Any], sha: str, path: str) -> dict[str, Any]:
        tree: dict[str, Any] = repo["commits"][sha]["tree"]
        if path not in tree:
            raise _Refusal(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        row: dict[str, Any] = tree[path]
        return row

    def file(self, name: str, repo: dict[str, Any], sha: str, path: str) -> _Answer:
        self.may_read(name, repo)
        oid = self.entry(repo, self.commit(repo, sha), path)["oid"]
        return self.content(oid, oid, {"X-Repo-Commit": sha})

    def signed(self, oid: str) -> str:
        """Return a link on another origin: ``localhost`` is not ``127.0.0.1``."""
        expires = int(time.time() + self.state["link_seconds"])
        host = self.environ["HTTP_HOST"].replace(HOST, "localhost")
        signature = self.signature(oid, expires)
        return f"http://{host}/cdn/{oid}?Expires={expires}&Key-Pair-Id=K1&Signature={signature}"

    def signature(self, oid: str, expires: int) -> str:
        key = f"link key {self.state['link_key']}".encode()
        return hmac.new(key, f"{oid} {expires}".encode(), "sha256").hexdigest()

    def link(self, oid: str) -> _Answer:
        if self.authorization:
            raise _Refusal(400, "", "Only one auth mechanism allowed: the link is signed already")
        expires = int(self.query.get("Expires", 0))
        given = self.query.get("Signature", "")
        if not hmac.compare_digest(given, self.signature(oid, expires)) or time.time() >= expires:
            raise _Refusal(403, "", "Request has expired")
        # The validator of the storage behind the links is not the SHA-256 that the Hub publishes.
        return self.content(oid, hashlib.md5(oid.encode(), usedforsecurity=False).hexdigest(), {})

    def content(self, oid: str, etag: str, headers: dict[str, str]) -> _Answer:
        """Answer the blob or one range of it (RFC 9110, sections 13.1.1 and 14)."""
        path = self.state["blobs"][oid]
        size = Path(path).stat().st_size
        headers = {**headers, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        wanted = self.environ.get("HTTP_IF_MATCH")
        if wanted and wanted != "*" and f'"{etag}"' not in [tag.strip() for tag in wanted.split(",")]:
            return _Answer(412, {**headers, "Content-Length": "0"})
        status, start, stop = 200, 0, size
        unit, _, span = self.environ.get("HTTP_RANGE", "").partition("=")
        if unit == "bytes" and "," not in span:
            first, _, last = span.partition("-")
            start = int(first) if first else max(0, size - int(last))
            stop = min(int(last) + 1, size) if first and last else size
            if start >= size:
                return _Answer(416, {**headers, "Content-Range": f"bytes */{size}", "Content-Length": "0"})
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
        headers |= {"Content-Length": str(stop - start), "Content-Type": "application/octet-stream"}
        return _Answer(status, headers, pieces(path, start, stop))


def _json(data: Any) -> _Answer:
    body = json.dumps(data).encode()
    headers = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(body))}
    return _Answer(200, headers, [body])


def _redirect(status: int, target: str, headers: dict[str, str]) -> _Answer:
    body = f"{_REASONS[status]}. Redirecting to {target}".encode()
    return _Answer(status, {**headers, "Location": target, "Content-Length": str(len(body))}, [body])


def _date(commit: dict[str, Any]) -> str:
    moment = datetime.fromtimestamp(_EPOCH + 60 * commit["order"], UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _refs(repo: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    kinds = {"refs/convert/": "converts", "refs/pr/": "pullRequests"}
    for name, sha in repo["refs"].items():
        kind = next((kind for prefix, kind in kinds.items() if name.startswith(prefix)), "branches")
        ref = name if name.startswith("refs/") else f"refs/heads/{name}"
        found[kind].append({"name": name, "ref": ref, "targetCommit": sha})
    for name, sha in repo["tags"].items():
        found["tags"].append({"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha})
    return found


def _commits(repo: dict[str, Any], sha: str | None) -> list[dict[str, Any]]:
    rows = []
    while sha is not None:
        commit = repo["commits"][sha]
        rows.append({"id": sha, "title": "Upload files", "message": "", "authors": [], "date": _date(commit)})
        sha = commit["parent"]
    return rows
