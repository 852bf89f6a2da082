"""Connections to S3 and what its refusals mean: everything about botocore that ``s3.py`` need not know.

botocore is the core of boto3: it finds credentials in the AWS chain (environment, profiles, SSO, web
identity, instance metadata), renews them, and signs.
"""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from modelfs.errors import AccessDenied, BadAnswer, NotFound, StoreError, Unavailable
from modelfs.stores import Options
from modelfs.stores.buckets import THREADS

if TYPE_CHECKING:
    from botocore.session import Session
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

_CONNECT_TIMEOUT, _READ_TIMEOUT, _ATTEMPTS = 10, 30, 3
_TEMPORARY = 600
"""Seconds that URLs signed with temporary credentials live: botocore renews those that have less left."""


class Account:
    """The way to one bucket: a client made at first use, and made anew when credentials were rotated.

    Its methods block, may be called by several threads at once and raise StoreErrors only.

    Args:
        bucket: its name.
        options: those of :class:`modelfs.stores.s3.S3Store`.

    """

    def __init__(self, bucket: str, options: Options) -> None:
        self._bucket = bucket
        self._options = options
        self._connection: _Connection | None = None

    def ask(self, where: str, question: Callable[[S3Client], T]) -> T:
        """Return the answer to `question`; a refusal is asked again if credentials were rotated meanwhile.

        Raises:
            StoreError: what botocore raised, mapped, beginning with `where`.

        """
        return self._ask(where, lambda connection: question(connection.client))

    def presign(self, where: str, parameters: Mapping[str, Any], seconds: int) -> tuple[str, float | None]:
        """Return a URL of ``GetObject`` and when it runs out: after `seconds` or less, or never if unsigned.

        Raises:
            StoreError: as `ask` does.

        """

        def sign(connection: _Connection) -> tuple[str, float | None]:
            lifetime = min(seconds, _TEMPORARY) if connection.temporary else seconds
            expires = None if self._options.get("anonymous") else time.time() + lifetime
            url = connection.client.generate_presigned_url("get_object", {**parameters}, lifetime)
            return url, expires

        return self._ask(where, sign)

    def _ask(self, where: str, question: Callable[[_Connection], T]) -> T:
        from botocore.exceptions import ClientError

        try:
            connection = self._connected()
            try:
                return question(connection)
            except ClientError as error:
                if _code(error) not in _CREDENTIAL_CODES or not self._rotated(connection):
                    raise
                return question(self._connected())
        except Exception as error:  # botocore's, its parser's, its endless recursion after odd redirects
            raise _fault(error, where) from error

    def _connected(self) -> _Connection:
        # Threads that come at the same time each make one and the last is kept: cheaper than to have all of
        # them wait for one that may be waiting for a dead server.
        connection = self._connection
        if connection is None:
            connection = self._connection = _connect(self._bucket, self._options)
        return connection

    def _rotated(self, used: _Connection) -> bool:
        """Tell whether there are other credentials now than `used`; then forget the connection."""
        if self._options.get("anonymous") or used.refreshes:
            return False
        if _credentials(_session(self._options))[0] == used.credentials:
            return False
        self._connection = None
        return True


@dataclass(frozen=True)
class _Connection:
    """A client, thread-safe, and what it signs with.

    Attributes:
        credentials: as they were when the client was made, to notice a rotation.
        temporary: URLs die with the credentials that signed them.
        refreshes: botocore renews the credentials by itself.

    """

    client: S3Client
    credentials: object
    temporary: bool
    refreshes: bool


@cache
def _descriptions() -> Any:
    """Return what botocore knows about services: 12 MB and 0.2 s, hence one for all stores."""
    from botocore.loaders import create_loader

    return create_loader()


def _session(options: Options) -> Session:
    from botocore.session import Session

    session = Session(profile=options.get("profile"))
    session.register_component("data_loader", _descriptions())
    return session


def _credentials(session: Session) -> tuple[object, bool, bool]:
    """Return the credentials of a session, and whether they are temporary and renew themselves."""
    from botocore.credentials import RefreshableCredentials

    found = session.get_credentials()
    if found is None:
        return None, False, False
    refreshes = isinstance(found, RefreshableCredentials)
    frozen = found.get_frozen_credentials()
    return frozen, bool(refreshes or frozen.token), refreshes


def _connect(bucket: str, options: Options) -> _Connection:
    """Make a client for the bucket's own region, with the addressing style of the endpoint."""
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import ClientError

    session = _session(options)
    anonymous = bool(options.get("anonymous"))

    def client(style: str, region: str | None) -> S3Client:
        addressing: Any = {"addressing_style": style}
        config = Config(
            signature_version=UNSIGNED if anonymous else "s3v4",
            s3=addressing,
            connect_timeout=_CONNECT_TIMEOUT,
            read_timeout=_READ_TIMEOUT,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            max_pool_connections=THREADS,
        )
        made = session.create_client(
            "s3",
            region_name=region,
            endpoint_url=options.get("endpoint_url"),
            verify=options.get("ca_bundle"),
            config=config,
        )
        made.meta.events.register("before-parse.s3.ListObjectsV2", _read_contents)
        return cast("S3Client", made)

    style, region = options.get("addressing_style", "auto"), options.get("region")
    found = client("path" if style == "auto" else style, region)
    if style == "auto":
        host = urlsplit(found.meta.endpoint_url).hostname or ""
        at_amazon = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        style = "virtual" if at_amazon else "path"
        found = client(style, region) if at_amazon else found
    if region is None:
        # botocore follows a bucket to its region, but would presign URLs for the one it was configured with.
        try:
            answer: Mapping[str, Any] = found.head_bucket(Bucket=bucket)
        except ClientError as error:
            answer = error.response  # a refusal names the region too
        region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
        if region and region != found.meta.region_name:
            found = client(style, region)
    return _Connection(found, *((None, False, False) if anonymous else _credentials(session)))


def _read_contents(
    response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object
) -> None:
    """Read the objects out of a listing, and leave the rest of the answer to botocore.

    Its parser takes almost 1 ms for an object, because it asks the model of the service about every element.

    Raises:
        ValueError: the answer declares a document type, and with it perhaps entities that grow.

    """
    body = response_dict["body"]
    if response_dict["status_code"] != 200 or b"<Contents" not in body:
        return
    if b"<!DOCTYPE" in body:
        raise ValueError("a listing has no document type")
    root = ElementTree.fromstring(body)  # noqa: S314  # no document type, hence no entities of its own
    objects, rest = [], []
    for element in root:
        if _local(element) == "Contents":
            objects.append({name: read(text) for name, read, text in _fields(element)})
        else:
            rest.append(element)
    root[:] = rest
    response_dict["body"] = ElementTree.tostring(root)
    customized_response_dict["Contents"] = objects


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]  # Amazon's answers have a namespace, others' may not


def _fields(element: ElementTree.Element) -> Iterator[tuple[str, Callable[[str], object], str]]:
    for child in element:
        name = _local(child)
        if name in _OBJECT:
            yield name, _OBJECT[name], child.text or ""


def _time(text: str) -> datetime:
    """Return a time as S3 writes it, ``2024-01-01T00:00:00.000Z``, or as others do."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        from botocore.utils import parse_timestamp

        return parse_timestamp(text)


_OBJECT: Mapping[str, Callable[[str], object]] = {
    "Key": str,
    "Size": int,
    "ETag": str,
    "LastModified": _time,
}
"""What is read of an object in a listing, and how."""

_CREDENTIAL_CODES = {
    "400", "401", "403", "AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken",
    "SignatureDoesNotMatch", "TokenRefreshRequired",
}  # fmt: skip
"""Answers that rotated credentials can explain; HEAD has no body and tells the status only."""

_EXPIRED = (AccessDenied, "the session has expired: renew it, for example with aws sso login")
_ELSEWHERE = (NotFound, "the bucket is in another region or at another endpoint: set region or endpoint_url")
_DENIED = (
    AccessDenied,
    "access denied: the credentials need s3:ListBucket and s3:GetObject; set anonymous for a public bucket",
)
_BUSY = (Unavailable, "the store is busy or broken, or not S3: try again later, or check endpoint_url")
_LACKING = (BadAnswer, "this server does not implement what is needed")
_MEANING: Mapping[str, tuple[type[StoreError], str]] = {
    "NoSuchBucket": (NotFound, "there is no such bucket: check its name, and endpoint_url"),
    "InvalidBucketName": (NotFound, "that cannot be the name of a bucket: check the URL"),
    "NoSuchKey": (NotFound, "there is no such object"),
    "NoSuchVersion": (NotFound, "there is no such version"),
    "InvalidAccessKeyId": (AccessDenied, "the access key is unknown here: check profile and endpoint_url"),
    "SignatureDoesNotMatch": (AccessDenied, "the secret key is wrong: check the profile"),
    "RequestTimeTooSkewed": (AccessDenied, "the clock of this machine is wrong: set it"),
    "ExpiredToken": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "PermanentRedirect": _ELSEWHERE,
    "AuthorizationHeaderMalformed": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "NotImplemented": _LACKING,
    "SlowDown": _BUSY,
    "RequestTimeout": _BUSY,
    "301": _ELSEWHERE,
    "400": (AccessDenied, "refused (400): the session has expired, or the object needs a customer's own key"),
    "401": _DENIED,
    "403": _DENIED,
    "404": (NotFound, "there is no such object, or no such bucket: check the URL"),
    "429": _BUSY,
    "501": _LACKING,
}  # fmt: skip


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _fault(error: Exception, where: str) -> StoreError:
    """Return what `error` of botocore means; its own text is never used, it can hold parts of credentials."""
    from botocore import exceptions as boto

    match error:
        case boto.ClientError():
            answer: Mapping[str, Any] = error.response.get("ResponseMetadata", {})
            status = int(answer.get("HTTPStatusCode", 0))
            code = _code(error)
            if code in _MEANING or str(status) in _MEANING:
                kind, text = _MEANING.get(code) or _MEANING[str(status)]
            else:
                name = re.sub(r"[^A-Za-z0-9]", "", code)[:60]
                kind, text = _BUSY if status >= 500 else (BadAnswer, f"unexpected answer {status} {name}")
            if kind is Unavailable:
                wait = answer.get("HTTPHeaders", {}).get("retry-after", "")
                return Unavailable(f"{where}: {text}", retry_after=float(wait) if wait.isdigit() else None)
            return kind(f"{where}: {text}")
        case boto.NoCredentialsError() | boto.PartialCredentialsError():
            text = (
                "no AWS credentials: set profile, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or anonymous"
            )
        case boto.ProfileNotFound():
            text = "the AWS profile does not exist: check profile, AWS_PROFILE and ~/.aws/config"
        case boto.SSLError():
            return Unavailable(f"{where}: the TLS certificate is not trusted: set ca_bundle")
        case boto.HTTPClientError():
            return Unavailable(f"{where}: the store cannot be reached ({type(error).__name__})")
        case boto.ConnectionError():
            return Unavailable(f"{where}: the store cannot be reached ({type(error).__name__})")
        case boto.BotoCoreError():
            text = f"AWS credentials or configuration cannot be used ({type(error).__name__}): check profile"
        case _:
            return BadAnswer(f"{where}: the answer is not S3's: check endpoint_url")
    return AccessDenied(f"{where}: {text}")
