"""Every error modelfs raises on purpose; each class owns its errno and whether a retry can help.

::

    ModelfsError                    EIO
    ├── ConfigError                 EINVAL        bad file, flag, URL or option
    ├── MountError                  EBUSY         the mountpoint cannot be used
    ├── CacheError                  EIO
    │   ├── CacheUnusable           EIO           the directory cannot hold a cache
    │   └── CacheLocked             EBUSY         another daemon owns the directory
    └── StoreError                  EIO
        ├── NotFound                ENOENT        the store has no such thing
        ├── AccessDenied            EACCES        credentials missing, wrong or not sufficient
        ├── NotLocked               EACCES        not what modelfs.lock says
        ├── Stale                   ESTALE        the store no longer has these very bytes
        ├── Expired                 EIO  retry    the location's signature ran out: locate again
        ├── Unavailable             EIO  retry    network, time-out, 429, 5xx
        ├── BadAnswer               EIO  retry    the answer breaks the protocol (wrong range, short body)
        ├── Corrupt                 EIO           the bytes do not have the published digest
        └── BadArchive              EIO           an archive that cannot be shown as a directory

Messages are one line, name the place and end with what to do; they never hold a secret. Libraries'
own exceptions are mapped to these where the library is called, and nowhere else.
"""

import errno as _errno


class ModelfsError(Exception):
    """Base of all errors of modelfs.

    Attributes:
        errno: what a reader gets if the error reaches the kernel.
        retryable: whether the same attempt can succeed later without anybody changing anything.

    """

    errno: int = _errno.EIO
    retryable: bool = False

    def __str__(self) -> str:
        """Return the message as one line whatever was put into it."""
        return " ".join(super().__str__().split())


class ConfigError(ModelfsError):
    """A configuration file, flag, URL or store option is wrong."""

    errno = _errno.EINVAL


class MountError(ModelfsError):
    """The mountpoint cannot be mounted or unmounted."""

    errno = _errno.EBUSY


class CacheError(ModelfsError):
    """The cache directory or a file in it failed."""


class CacheUnusable(CacheError):
    """The directory cannot hold a cache at all (missing rights, read-only, not ours)."""


class CacheLocked(CacheError):
    """Another process is using the directory.

    Attributes:
        pid: of that process, or None if it does not tell.

    """

    errno = _errno.EBUSY

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class StoreError(ModelfsError):
    """A store, or the way to it, failed."""


class NotFound(StoreError):
    """The store has no such bucket, repository, revision or object."""

    errno = _errno.ENOENT


class AccessDenied(StoreError):
    """The store refused: credentials are missing, wrong or not sufficient, or a licence is not accepted."""

    errno = _errno.EACCES


class NotLocked(StoreError):
    """The store has something else than modelfs.lock says."""

    errno = _errno.EACCES


class Stale(StoreError):
    """The store no longer has the bytes of the version that was pinned."""

    errno = _errno.ESTALE


class Expired(StoreError):
    """A location's signature or token is no longer accepted; a new location can be."""

    retryable = True


class Unavailable(StoreError):
    """The store cannot be reached or asks to come back later.

    Attributes:
        retry_after: seconds the store asked to wait (``Retry-After``), or None.

    """

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BadAnswer(StoreError):
    """The store's answer breaks its protocol: wrong range, wrong length, truncated or unparsable."""

    retryable = True


class Corrupt(StoreError):
    """The bytes that arrived are not those whose digest the store published."""


class BadArchive(StoreError):
    """An archive is damaged, truncated, or more than its limits allow: it cannot be shown as a directory."""


def unwrapped(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what the exceptions of a nursery come down to: Ctrl-C, the first ModelfsError, or all."""
    if group.subgroup(KeyboardInterrupt):
        return KeyboardInterrupt()
    found: BaseException = group.subgroup(ModelfsError) or group
    while found is not group and isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
