"""``az://ACCOUNT/CONTAINER[/PREFIX/]`` and ``az://ACCOUNT/CONTAINER/BLOB``: Azure Blob Storage.

A blob is pinned by its ETag, which every read asks for (``If-Match``). Where the account keeps versions, a
read names the version as well, and so does one of a blob that was overwritten since. API:
https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api.
"""

from __future__ import annotations

import configparser
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

from modelfs.errors import AccessDenied, BadAnswer, ConfigError, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import Options, checked_options, redact, require
from modelfs.stores.buckets import BucketStore, Unservable, items
from modelfs.types import Digest, Entry, Location

if TYPE_CHECKING:
    from azure.storage.blob import BlobProperties, ContainerClient

OPTIONS: Mapping[str, type | tuple[type, ...]] = {
    "anonymous": bool,
    "connection_string": str,
    "endpoint": str,
    "expires": int,
    "key": str,
    "max_entries": int,
    "sas_token": str,
}

_LONGEST = 7 * 24 * 3600
_AUDIENCE = "https://storage.azure.com/.default"
_API = "2021-12-02"
"""Version of the protocol that reads with a token name; every cloud and emulator of today knows it."""


class AzureStore(BucketStore):
    """A container, what lies under a prefix of it, or one blob; see `BucketStore`.

    Options, all optional; `_Settings` says where else the secrets among them come from:

    - ``connection_string``, ``key`` or ``sas_token`` of the account: secrets.
    - ``anonymous``: send no credentials, for public containers.
    - ``endpoint``: of the account, if it is not ``https://ACCOUNT.blob.core.windows.net``.
    - ``expires``: seconds that a URL signed with the account's key is good (3600).
    - ``max_entries``: what holds more (100,000) is not listed but looked up name by name.

    Raises:
        ConfigError: malformed URL or option, or the extra ``az`` is not installed. Credentials that cannot
            be had are AccessDenied, at first use.

    """

    def __init__(self, url: str, options: Options) -> None:
        require("az", "azure.storage.blob", "azure.identity")
        found = re.fullmatch(
            r"[aA][zZ]://([a-z0-9]{3,24})/(\$root|\$web|[a-z0-9](?:-?[a-z0-9]){2,62})(?:/(.*))?",
            url,
            re.DOTALL,
        )
        if found is None:
            raise ConfigError(f"{redact(url)!r} is not an Azure URL: write az://ACCOUNT/CONTAINER/PREFIX/")
        account, container, path = found[1], found[2], found[3] or ""
        canonical = f"az://{account}/{container}/{path}"
        checked_options(canonical, options, OPTIONS)
        if not 1 <= options.get("expires", 3600) <= _LONGEST:
            raise ConfigError(f"{canonical}: expires must be between 1 and {_LONGEST} seconds")
        endpoint = _settings(canonical, account, options).endpoint
        super().__init__(canonical, _Container(canonical, account, container, options), path, options)
        usual = f"https://{account}.blob.core.windows.net"
        self.identity = canonical if endpoint == usual else f"{canonical} at {endpoint}"


@dataclass(frozen=True)
class _Settings:
    """Where an account is and how to prove oneself there: by key, else by SAS, else by identity.

    Attributes:
        endpoint: URL of the account, without a slash at its end.
        key: of the account.
        sas: a shared access signature, without the question mark.

    """

    endpoint: str
    key: str = field(default="", repr=False)
    sas: str = field(default="", repr=False)


class _Container:
    """The way to one container: a client made at first use, and made anew when the settings changed."""

    def __init__(self, url: str, account: str, name: str, options: Options) -> None:
        self._url = url
        self._account = account
        self._name = name
        self._options = options
        self._connection: _Connection | None = None

    def entries(self, prefix: str, most: int) -> Iterator[tuple[str, Entry | Unservable]]:
        with _mapped(f"{self._url}: listing"):
            listing = self._connected().client.list_blobs(
                prefix or None, include=["metadata"], results_per_page=min(most, 5000)
            )
            for blob in items(listing.by_page(), most):
                yield blob.name, _entry(blob)

    def entry(self, key: str) -> Entry | None:
        properties = self._properties(key)
        found = _entry(properties) if properties else None
        if isinstance(found, Unservable):
            raise found
        return found

    def locate(self, key: str, entry: Entry) -> Location:
        properties = self._properties(key)
        if properties and _etag(properties) == entry.version:
            version = properties.version_id
        else:
            version = self._earlier(key, entry.version)
            if version is None:
                raise Stale(f"{self._url}: {entry.path!r} was changed or removed: refresh the model")
        with _mapped(f"{self._url}: {key!r}"):
            url, headers, expires = self._connected().reading(
                key, version, self._options.get("expires", 3600)
            )
        return Location(url, headers, expires, etag=f'"{entry.version}"')

    def _properties(self, key: str) -> BlobProperties | None:
        from azure.core.exceptions import ResourceNotFoundError

        with _mapped(f"{self._url}: {key!r}"):
            try:
                return self._connected().client.get_blob_client(key).get_blob_properties()
            except ResourceNotFoundError as error:
                if _code(error) == "ContainerNotFound":
                    raise
                return None

    def _earlier(self, key: str, etag: str) -> str | None:
        """Return the version that had this ETag, if the account keeps versions and still has it."""
        with _mapped(f"{self._url}: {key!r}"):
            listing = self._connected().client.list_blobs(key, include=["versions"])
            for blob in items(listing.by_page(), 5000):
                if blob.name == key and _etag(blob) == etag:
                    return blob.version_id
        return None

    def _connected(self) -> _Connection:
        # Threads that come at the same time each make one and the last is kept.
        settings = _settings(self._url, self._account, self._options)
        connection = self._connection
        if connection is None or connection.settings != settings:
            anonymous = bool(self._options.get("anonymous"))
            connection = self._connection = _connect(
                self._url, self._account, self._name, settings, anonymous
            )
        return connection


@dataclass(frozen=True)
class _Connection:
    """A client, its settings, and the identity that gives tokens if there is neither key nor SAS."""

    account: str
    client: ContainerClient
    settings: _Settings
    identity: Any

    def reading(
        self, key: str, version: str | None, seconds: int
    ) -> tuple[str, Mapping[str, str], float | None]:
        """Return URL and headers for reads of a blob, and when they run out: in `seconds` if signed here."""
        from azure.storage.blob import generate_blob_sas

        query = [f"versionid={quote(version)}"] if version else []
        signature, expires = self.settings.sas, _end_of(self.settings.sas)
        if self.settings.key:
            expires = time.time() + seconds
            signature = generate_blob_sas(
                self.account,
                self.client.container_name,
                key,
                account_key=self.settings.key,
                permission="r",
                expiry=datetime.fromtimestamp(expires, UTC),
                version_id=version,
            )
        if signature:
            query.append(signature)
        url = "?".join(filter(None, (self.client.get_blob_client(key).url, "&".join(query))))
        if signature:
            return url, {}, expires
        if self.identity is None:
            return url, {}, None
        token = self.identity.get_token(_AUDIENCE)
        headers = {"authorization": f"Bearer {token.token}", "x-ms-version": _API}
        return url, headers, float(token.expires_on)


def _connect(where: str, account: str, container: str, settings: _Settings, anonymous: bool) -> _Connection:
    from azure.core.credentials import AzureSasCredential
    from azure.identity import DefaultAzureCredential
    from azure.storage.blob import ContainerClient

    credential: Any = None
    identity = None
    if settings.key:
        credential = {"account_name": account, "account_key": settings.key}
    elif settings.sas:
        credential = AzureSasCredential(settings.sas)
    elif not anonymous and not settings.endpoint.startswith("https:"):
        raise AccessDenied(f"{where}: a token is sent over https only: set key or sas_token, or anonymous")
    elif not anonymous:
        credential = identity = DefaultAzureCredential()
    client = ContainerClient(
        settings.endpoint,
        container,
        credential,
        connection_timeout=10,
        read_timeout=30,
        retry_total=2,
        initial_backoff=1,
        increment_base=1,
    )
    return _Connection(account, client, settings, identity)


_NAMES = ("account", "connection_string", "key", "sas_token")
"""Settings of ``AZURE_STORAGE_…`` and of the section ``[storage]`` in the Azure CLI's file."""


def _settings(url: str, account: str, options: Options, env: Mapping[str, str] = os.environ) -> _Settings:
    """Return how to reach `account`: by the options, the environment, or the Azure CLI's configuration.

    The first of these that holds a secret for this account decides. The CLI's file is
    ``~/.azure/config`` (https://learn.microsoft.com/cli/azure/azure-cli-configuration); it is read again
    for every question.

    Raises:
        ConfigError: a connection string is malformed, or the endpoint is no URL.
        AccessDenied: the CLI's file cannot be read.

    """
    places: list[Mapping[str, str]] = [
        {name: options[name] for name in _NAMES if name in options},
        {
            name: env[f"AZURE_STORAGE_{name.upper()}"]
            for name in _NAMES
            if env.get(f"AZURE_STORAGE_{name.upper()}")
        },
        _of_cli(url, env),
    ]
    endpoint = str(options.get("endpoint") or f"https://{account}.blob.core.windows.net")
    found = _Settings(endpoint)
    if not options.get("anonymous"):
        secrets = (_secrets(url, account, place) for place in places)
        found = next(
            (_Settings(place.endpoint or endpoint, place.key, place.sas) for place in secrets if place), found
        )
    if options.get("endpoint"):
        found = _Settings(endpoint, found.key, found.sas)
    if not re.fullmatch(r"https?://[^/@?#\s]+(/[a-z0-9]+)?/?", found.endpoint):
        raise ConfigError(f"{url}: endpoint must look like https://HOST or http://HOST:PORT/ACCOUNT")
    return _Settings(found.endpoint.rstrip("/"), found.key, found.sas)


def _secrets(url: str, account: str, place: Mapping[str, str]) -> _Settings | None:
    """Return what one `place` says about `account`, None if nothing; the endpoint may be ""."""
    if place.get("account", account) != account:
        return None
    if text := place.get("connection_string"):
        # https://learn.microsoft.com/azure/storage/common/storage-configure-connection-string
        parts = dict(part.strip().partition("=")[::2] for part in text.split(";") if part.strip())
        if not all(parts.values()):
            raise ConfigError(f"{url}: the connection string is malformed: copy it from the portal again")
        if parts.get("AccountName", account) == account:
            suffix = parts.get("EndpointSuffix", "core.windows.net")
            built = f"{parts.get('DefaultEndpointsProtocol', 'https')}://{account}.blob.{suffix}"
            endpoint = parts.get("BlobEndpoint", built)
            sas = parts.get("SharedAccessSignature", "").removeprefix("?")
            return _Settings(endpoint, parts.get("AccountKey", ""), sas)
    if place.get("key") or place.get("sas_token"):
        return _Settings("", place.get("key", ""), place.get("sas_token", "").removeprefix("?"))
    return None


def _of_cli(url: str, env: Mapping[str, str]) -> Mapping[str, str]:
    path = Path(env.get("AZURE_CONFIG_DIR") or "~/.azure").expanduser() / "config"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, configparser.Error) as error:  # its text may quote a secret
        raise AccessDenied(f"{url}: {path} cannot be read ({type(error).__name__}): correct it") from None
    return dict(parser["storage"]) if parser.has_section("storage") else {}


def _end_of(sas: str) -> float | None:
    """Return when a shared access signature runs out; None if it does not say so itself."""
    try:
        moment = datetime.fromisoformat(parse_qs(sas)["se"][0])
    except (KeyError, ValueError):
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _entry(blob: BlobProperties) -> Entry | Unservable:
    if (blob.metadata or {}).get("hdi_isfolder") == "true":  # of a hierarchical namespace
        return Entry(blob.name, kind="directory")
    if str(blob.blob_tier) == "Archive":
        return Unservable("it is archived: rehydrate it first")
    digest = blob.content_settings.content_md5
    return Entry(
        blob.name,
        int(blob.size),
        _etag(blob),
        Digest("md5", bytes(digest).hex()) if digest else None,
        float(int(blob.last_modified.timestamp())),
    )


def _etag(blob: BlobProperties) -> str:
    """Return the ETag without the quotes, which listings leave out; ValueError if there is none."""
    etag = (blob.etag or "").strip('"')
    if not re.fullmatch(r"[!#-~]+", etag):
        raise ValueError("a blob has an ETag")
    return etag


@contextmanager
def _mapped(where: str) -> Iterator[None]:
    """Raise what Azure's libraries raise as the StoreError that it means, beginning with `where`."""
    from azure.core.exceptions import AzureError

    try:
        yield
    except AzureError as error:
        raise _fault(error, where) from error


def _code(error: Exception) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", str(getattr(error, "error_code", "") or ""))[:60]


def _fault(error: Exception, where: str) -> StoreError:
    """Return what `error` of a library means; its own text, which may hold secrets, is never used."""
    from azure.core.exceptions import ClientAuthenticationError, ServiceRequestError, ServiceResponseError

    status = int(getattr(error, "status_code", None) or 0)
    match error:
        case ServiceRequestError() | ServiceResponseError():
            return Unavailable(f"{where}: Azure cannot be reached ({type(error).__name__})")
        case ClientAuthenticationError() if not status:
            return AccessDenied(
                f"{where}: no Azure credentials: set AZURE_STORAGE_CONNECTION_STRING, "
                "AZURE_STORAGE_SAS_TOKEN, a workload identity, or anonymous"
            )
    if status in (401, 403):
        return AccessDenied(
            f"{where}: access denied {_code(error)}: the credentials need to read and list the container"
        )
    if status == 404:
        return NotFound(f"{where}: there is no such container: check the URL")
    if status in (408, 429) or status >= 500:
        return Unavailable(f"{where}: the store is busy or broken: try again later")
    return BadAnswer(f"{where}: unexpected answer {status} {_code(error)}: check the endpoint")
