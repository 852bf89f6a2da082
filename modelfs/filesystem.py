"""``modelfs://MODEL/PATH`` for what reads through fsspec: pandas, pyarrow, dask, datasets and others.

The tree is that of a mount, and so are cache and checks, but this process reads by itself. Specification:
https://filesystem-spec.readthedocs.io/en/latest/developer.html.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from modelfs import config
from modelfs.errors import ModelfsError
from modelfs.local import LOOP, Content, Local
from modelfs.tree import Directory, File, Link, Node, Text


class ModelFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The models of a configuration, read-only; the cache is held from the first question on.

    Args:
        config_file: instead of the one that ``modelfs mount`` would read.
        sources: more models, each ``NAME=URL``.
        cache_dir: instead of the one of the configuration.
        storage_options: of fsspec itself.

    Every method raises OSError with the errno and the text of the :class:`modelfs.errors.ModelfsError`
    behind it: FileNotFoundError, PermissionError and others.
    """

    protocol = "modelfs"
    root_marker = ""

    def __init__(
        self,
        config_file: str | os.PathLike[str] | None = None,
        sources: Sequence[str] = (),
        cache_dir: str | os.PathLike[str] | None = None,
        **storage_options: Any,
    ) -> None:
        super().__init__(**storage_options)
        self._settings = config.load(
            mountpoint=None,
            config_file=None if config_file is None else Path(config_file),
            flags={"cache.dir": None if cache_dir is None else os.fspath(cache_dir), "keep_going": True},
            sources=sources,
        )
        self._opening = threading.Lock()
        self._opened: Local | None = None

    def _local(self) -> Local:
        with self._opening:
            if self._opened is None:
                opened = Local(self._settings)
                LOOP.call(opened.begin)
                self._opened = opened
            return self._opened

    def close(self) -> None:
        """Give the cache back; the next question takes it again. At the latest the process's end does so."""
        with self._opening:
            if self._opened is not None:
                LOOP.call(self._opened.end)
                self._opened = None

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """Return what is in the directory `path`, or the file itself: names, or with `detail` `info`.

        Directories of on-demand namespaces show what was looked up in them.
        """
        path = self._strip_protocol(path)
        node = self._find(path)
        if isinstance(node, Directory):
            prefix = f"{path}/" if path else ""
            rows = [self._row(f"{prefix}{name}", child) for name, child, _ in node.names()(0)]
        else:
            rows = [self._row(path, node)]
        return rows if detail else [row["name"] for row in rows]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Return name, size, type and mtime of what is at `path`; of a file also version and digest."""
        path = self._strip_protocol(path)
        return self._row(path, self._find(path))

    def _find(self, path: str) -> Node:
        with _oserrors(path):
            return self._local().find(path)

    def _row(self, path: str, node: Node) -> dict[str, Any]:
        if isinstance(node, Link):
            node = self._find(path)
        row: dict[str, Any] = {"name": path, "size": 0, "type": "directory", "mtime": node.mtime}
        if isinstance(node, File):
            entry = node.entry
            digest = str(entry.digest) if entry.digest else None
            row |= {"size": node.size, "type": "file", "version": entry.version, "digest": digest}
        elif isinstance(node, Text):
            row |= {"size": len(node.content), "type": "file"}
        return row

    def checksum(self, path: str) -> int:
        """Return a number that is another one for other content."""
        row = self.info(path)
        return hash((row.get("digest"), row.get("version"), row["size"], row["mtime"]))

    def invalidate_cache(self, path: str | None = None) -> None:
        """Look for new revisions of the models now."""
        if self._opened is not None:
            with _oserrors(path or ""):
                self._opened.refresh()

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> IO[bytes]:
        if mode != "rb":
            raise OSError(errno.EROFS, "models are read-only", path)
        node = self._find(path)
        if isinstance(node, Text):
            return io.BytesIO(node.content)
        if not isinstance(node, File):
            raise IsADirectoryError(errno.EISDIR, "is a directory", path)
        with _oserrors(path):
            content = self._local().open(node)
        file: IO[bytes] = ModelFile(self, path, content, block_size or "default", cache_options)
        return file


class ModelFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """One open file of a model."""

    def __init__(
        self,
        fs: ModelFileSystem,
        path: str,
        content: Content,
        block_size: int | str,
        cache_options: dict[str, Any] | None,
    ) -> None:
        self._content = content
        super().__init__(fs, path, "rb", block_size, cache_options=cache_options, size=content.size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        with _oserrors(self.path):
            return self._content.read(start, end)

    def close(self) -> None:
        """Let go of the file; closing again does nothing."""
        if not self.closed:
            self._content.close()
        super().close()


@contextmanager
def _oserrors(path: str) -> Iterator[None]:
    """Raise what fsspec's users expect in the place of our errors."""
    try:
        yield
    except ModelfsError as error:
        raise OSError(error.errno, str(error), path) from error
