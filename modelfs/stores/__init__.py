"""The Store protocol, and the table of URL schemes.

A store is its control plane only: it says what there is and where the bytes are; ``modelfs.fetch`` moves
them. Write a store as a class with three coroutines, register it under the entry point group
``modelfs.stores`` (name = scheme, value = the class) and prove it with ``modelfs.testing.check_store``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from modelfs.errors import ConfigError, NotFound
from modelfs.types import Entry, Location, Snapshot

Options = Mapping[str, Any]
"""A store's options from the configuration; every store names those it knows."""


@runtime_checkable
class Store(Protocol):
    """A remote source of one model, named by a URL.

    All three verbs may be cancelled at any await and called concurrently. They raise
    :class:`modelfs.errors.StoreError` (``NotFound``, ``AccessDenied``, ``Stale``, ``Unavailable``,
    ``BadAnswer``) and nothing else; retrying is the caller's business.
    """

    url: str
    """Canonical URL without secrets: the name of the store in logs and status, and its identity in the cache.

    A store whose URL does not say where it is has an attribute ``identity`` as well: `identity_of`.
    """

    async def snapshot(self) -> Snapshot:
        """Resolve the revision to something immutable and list everything at it."""

    async def entry(self, path: str) -> Entry:
        """Return the one entry at `path`, for stores too large to list.

        A path that is only the prefix of others is a ``directory``.

        Raises:
            NotFound: nothing is there.

        """

    async def locate(self, entry: Entry) -> Location:
        """Return where the bytes of `entry`, as pinned by its version, can be had.

        Raises:
            Stale: the store no longer has this version.

        """


class Factory(Protocol):
    """What a scheme stands for: called with the URL as configured and the options for it."""

    def __call__(self, url: str, options: Options, /) -> Store:
        """Return the store; check `url` and `options` and raise ConfigError, but do no I/O."""


SCHEMES: Mapping[str, str] = {
    "az": "modelfs.stores.az:AzureStore",
    "file": "modelfs.stores.file:FileStore",
    "fsspec+": "modelfs.stores.fsspec:FsspecStore",
    "gs": "modelfs.stores.gs:GoogleStore",
    "http": "modelfs.stores.http:HttpStore",
    "https": "modelfs.stores.http:HttpStore",
    "s3": "modelfs.stores.s3:S3Store",
    "hf": "modelfs.stores.hf:HubStore",
    "oci": "modelfs.stores.oci:OciStore",
    "docker": "modelfs.stores.oci:OciStore",
    "github": "modelfs.stores.github:GitHubStore",
    "kaggle": "modelfs.stores.kaggle:KaggleStore",
    "mock": "modelfs.stores.mock:MockStore",
    "mlflow": "modelfs.stores.mlflow:MlflowStore",
}
"""Scheme → ``module:class``, imported when first used so that a daemon pays only for what it mounts.

A scheme that ends in ``+`` stands for all that begin with it.
"""

SPELLINGS: Mapping[str, str] = {"models:/": "mlflow://models/", "runs:/": "mlflow://runs/"}
"""How other tools write the URLs of their models → how we do."""

GROUP = "modelfs.stores"
"""Entry point group where other packages register schemes."""


def spelled(url: str) -> str:
    """Return `url` as we write it where it is one of the `SPELLINGS` of others; anything else as it is."""
    for theirs, ours in SPELLINGS.items():
        if url.startswith(theirs) and not url.startswith(f"{theirs}/"):
            return ours + url.removeprefix(theirs)
    return url


def scheme_of(url: str) -> str:
    """Return the scheme of a store URL.

    Raises:
        ConfigError: if `url` has none.

    """
    scheme, separator, _ = spelled(url).partition("://")
    if not separator or not scheme:
        raise ConfigError(
            f"{redact(url)!r} is not a store URL: write SCHEME://…, for example s3://bucket/prefix, "
            "hf://ORG/NAME or file:///srv/models"
        )
    return scheme.lower()


def identity_of(store: Store) -> str:
    """Return what tells `store` from all others, in cache keys: its ``identity`` if it has one, or its URL.

    One bucket name at two endpoints is two stores: the same ETag there may mean other bytes.
    """
    identity = getattr(store, "identity", store.url)
    return identity if isinstance(identity, str) else store.url


def redact(url: str) -> str:
    """Return `url` without user name, password, query and fragment: fit for a message."""
    try:
        parts = urlsplit(url) if "://" in url else None
    except ValueError:
        parts = None
    if parts is None:  # whatever is before an @ may be a password
        return url.partition("?")[0].rpartition("@")[2]
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def known_schemes() -> list[str]:
    """Return every scheme that `open_store` accepts, sorted."""
    return sorted({*SCHEMES, *(point.name for point in importlib.metadata.entry_points(group=GROUP))})


def is_known(scheme: str) -> bool:
    """Return whether `open_store` accepts URLs of `scheme`."""
    return scheme in known_schemes() or _family(scheme) in SCHEMES


def open_store(url: str, options: Options | None = None) -> Store:
    """Return the store that `url` names.

    Raises:
        ConfigError: unknown scheme, malformed URL, unknown option, or an extra that is not installed.

    """
    return _factory(scheme_of(url))(spelled(url), options or {})


def _factory(scheme: str) -> Factory:
    if place := SCHEMES.get(scheme) or SCHEMES.get(_family(scheme)):
        module, _, name = place.partition(":")
        factory: Factory = getattr(importlib.import_module(module), name)
        return factory
    for point in importlib.metadata.entry_points(group=GROUP, name=scheme):
        try:
            loaded: Factory = point.load()
        except Exception as error:
            raise ConfigError(f"the store {scheme}:// ({point.value}) cannot be loaded: {error}") from error
        return loaded
    raise ConfigError(f"unknown scheme {scheme}://: known are {', '.join(known_schemes())}")


def _family(scheme: str) -> str:
    """Return the beginning of `scheme` up to its first ``+``, which ends the name; "" if it has none."""
    first, plus, rest = scheme.partition("+")
    return first + plus if rest else ""


def require(extra: str, *modules: str) -> None:
    """Return if what the optional dependencies `extra` bring can be imported; nothing is imported here.

    Raises:
        ConfigError: naming the extra.

    """
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # a package that it is in
            found = None
        if found is None:
            raise ConfigError(f"this store needs {module}: install it with pip install 'modelfs[{extra}]'")


def entry_in(snapshot: Snapshot, path: str) -> Entry:
    """Return the entry of a complete `snapshot` at `path`: ``Store.entry`` for stores that always list.

    A path that is only the prefix of others is a directory, whether or not it has an entry of its own.

    Raises:
        NotFound: nothing is there.

    """
    entry = snapshot.entries.get(path)
    if entry is not None:
        return entry
    if any(name.startswith(f"{path}/") for name in snapshot.entries):
        return Entry(path, kind="directory")
    raise NotFound(f"{snapshot.url} has no {path!r} at revision {snapshot.revision}")


def checked_options(url: str, options: Options, known: Mapping[str, type | tuple[type, ...]]) -> Options:
    """Return `options` after checking every name and type against `known`; all numbers must be positive.

    Raises:
        ConfigError: naming the option, the store and what is accepted.

    """
    for name, value in options.items():
        if name not in known:
            accepted = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"{redact(url)}: unknown option {name!r}; accepted are: {accepted}")
        if not isinstance(value, known[name]):
            raise ConfigError(f"{redact(url)}: option {name!r} has the wrong type ({type(value).__name__})")
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
            raise ConfigError(f"{redact(url)}: option {name!r} must be positive")
    return options


def server_of(url: str, option: str, configured: str | None, official: str) -> tuple[str, str]:
    """Return the server that the store `url` asks, and the identity that the store has there.

    Args:
        url: of the store.
        option: what the server is called in messages.
        configured: the URL of the server, if anybody named one.
        official: the one that is asked otherwise.

    Raises:
        ConfigError: `configured` is no URL of a server, or one with a user or a query.

    """
    if configured and not re.fullmatch(r"https?://[^@?#\s]+", configured):
        raise ConfigError(f"{url}: {option} must look like {official}")
    server = (configured or official).rstrip("/")
    return server, url if server == official else f"{url} at {server}"
