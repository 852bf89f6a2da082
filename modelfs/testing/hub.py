"""A Hugging Face Hub on this machine: what `huggingface_hub` asks of the real one, answered over HTTP.

Implemented are, for models, datasets and spaces: repository info, refs, commits, the paginated tree,
paths-info, ``/resolve/`` with its two kinds of redirects (a signed, expiring link on another origin for LFS
files, ``/api/resolve-cache`` for the others), private and gated repositories and tokens, with the headers and
error codes of https://huggingface.co/docs/hub/api. There is no Xet, no upload and no search.

    with HubServer() as hub:
        hub.add("org/name", {"config.json": b"{}", "model.safetensors": Path("big")})
        subprocess.run([...], env={**os.environ, **hub.env()})
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from modelfs.testing.hub_api import TOKEN, pieces
from modelfs.testing.server import Request, Server
from modelfs.types import Digest

__all__ = ["LFS_PATTERNS", "TOKEN", "HubServer"]

LFS_PATTERNS = ("*.bin", "*.gguf", "*.h5", "*.joblib", "*.msgpack", "*.onnx", "*.pkl", "*.pt", "*.pth",
                "*.safetensors")  # fmt: skip
"""What the Hub's default ``.gitattributes`` sends to LFS, as far as tests care."""


class HubServer(Server):
    """A Hub in a process of its own; also a context manager.

    Args:
        page_size: entries on one page of the tree.
        link_seconds: how long a signed link to an LFS file is good.

    """

    def __init__(self, *, page_size: int = 1000, link_seconds: float = 3600) -> None:
        super().__init__("modelfs.testing.hub_api:application", "")
        state = self._directory / "state.json"
        self._arguments = (str(state),)
        self._blobs = self._directory / "blobs"
        self._blobs.mkdir()
        self._state: dict[str, Any] = {
            "page_size": page_size,
            "link_seconds": link_seconds,
            "link_key": 0,
            "repositories": {},
            "blobs": {},
        }
        self._lock = threading.Lock()
        self._save()

    def add(
        self,
        repository: str,
        files: Mapping[str, bytes | Path],
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
        lfs: Iterable[str] = LFS_PATTERNS,
    ) -> str:
        """Commit `files` as the whole new content of a branch and return the commit's id.

        The id depends on nothing but the branch's history, and content that is there already makes no
        commit. The repository and the branch are made when they are missing.

        Args:
            repository: ``ORG/NAME``, ``NAME`` or ``datasets/ORG/NAME``.
            files: content by path. A `Path` is served from where it is and must not change.
            revision: the branch; ``refs/pr/1`` is one too.
            private: visible with the token only.
            gated: files need the token, and `accept` called.
            lfs: names or paths that match one of these patterns are LFS files.

        """
        patterns = tuple(lfs)
        tree = {path: self._blob(path, content, patterns) for path, content in sorted(files.items())}
        with self._lock:
            repo = self._state["repositories"].setdefault(
                repository, {"refs": {}, "tags": {}, "commits": {}, "accepted": False}
            )
            repo.update(private=private, gated=gated)
            parent = repo["refs"].get(revision)
            if parent is None or repo["commits"][parent]["tree"] != tree:
                order = repo["commits"][parent]["order"] + 1 if parent else 0
                names = json.dumps([repository, parent, [(path, row["oid"]) for path, row in tree.items()]])
                sha = hashlib.sha1(names.encode(), usedforsecurity=False).hexdigest()
                repo["commits"][sha] = {"parent": parent, "order": order, "tree": tree}
                repo["refs"][revision] = sha
            self._save()
            commit: str = repo["refs"][revision]
            return commit

    def tag(self, repository: str, name: str, commit: str) -> None:
        """Name a commit, or move the name to it."""
        with self._lock:
            self._state["repositories"][repository]["tags"][name] = commit
            self._save()

    def accept(self, repository: str) -> None:
        """Accept the licence of a gated repository in the name of the token's owner."""
        with self._lock:
            self._state["repositories"][repository]["accepted"] = True
            self._save()

    def remove(self, repository: str) -> None:
        """Delete a repository."""
        with self._lock:
            del self._state["repositories"][repository]
            self._save()

    def expire_links(self) -> None:
        """Refuse every signed link given out until now, as if its time had come."""
        with self._lock:
            self._state["link_key"] += 1
            self._save()

    def env(self) -> dict[str, str]:
        """Return the environment that sends `huggingface_hub` here; it holds no token."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    @property
    def data_requests(self) -> list[Request]:
        """The requests for content: GETs of files and links, without HEADs and the API."""
        return [
            request
            for request in self.requests
            if request.method == "GET"
            and (request.path.startswith(("/cdn/", "/api/resolve-cache/")) or "/resolve/" in request.path)
        ]

    def _blob(self, path: str, content: bytes | Path, patterns: tuple[str, ...]) -> dict[str, Any]:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        name = path.rpartition("/")[2]
        is_lfs = any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(path, p) for p in patterns)
        hasher = (
            Digest("sha256", "0" * 64).hasher(size) if is_lfs else Digest("git-sha1", "0" * 40).hasher(size)
        )
        for piece in [content] if isinstance(content, bytes) else pieces(content, 0, size):
            hasher.update(piece)
        value = hasher.hexdigest()
        if isinstance(content, bytes):
            source = self._blobs / value
            source.write_bytes(content)
        else:
            source = content.absolute()
        with self._lock:
            self._state["blobs"][value] = str(source)
        if not is_lfs:
            return {"oid": value, "size": size, "lfs": None}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value}\nsize {size}\n".encode()
        blob = Digest("git-sha1", "0" * 40).hasher(len(pointer))
        blob.update(pointer)
        lfs = {"oid": value, "size": size, "pointerSize": len(pointer)}
        return {"oid": blob.hexdigest(), "size": size, "lfs": lfs}

    def _save(self) -> None:
        target = Path(self._arguments[0])
        fresh = target.with_suffix(".new")
        fresh.write_text(json.dumps(self._state))
        fresh.replace(target)
