"""An S3 on this machine: moto's, in a process of its own, with what moto leaves out.

Added to moto are the verification of Signature Version 4, in headers and in presigned URLs with their expiry
(https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html), and range reads of
large objects that read the range only. Install ``modelfs[testing]``.

    with S3Server() as s3:
        s3.client().create_bucket(Bucket="models")
        subprocess.run([...], env={**os.environ, **s3.env()})
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import mmap
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelfs.testing.server import Application, Request, Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

KEY_ID = "AKIAMODELFSTEST00001"
SECRET = "modelfs/test+secret/with=odd+characters0"  # noqa: S105  # accepted by this server only
REGION = "us-east-1"

_FILE_HEADER = "X-Modelfs-File"
_MAPPED = 1 << 20
"""Bytes from which on an object is served from its file and not from memory."""


class S3Server(Server):
    """An S3 in a process of its own; also a context manager. Objects live until `close`.

    Args:
        key_id: the access key that is accepted, and no other.
        secret: its secret.

    """

    def __init__(self, *, key_id: str = KEY_ID, secret: str = SECRET) -> None:
        super().__init__("modelfs.testing.s3:application", key_id, secret)
        self._key_id, self._secret = key_id, secret

    def env(self) -> dict[str, str]:
        """Return the environment that sends every AWS client here, with credentials that are accepted."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self._key_id,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": REGION,
        }

    @cache  # noqa: B019  # a client takes long to make, and a server lives as long as its test
    def client(self) -> S3Client:
        """Return a boto3 client that may do everything."""
        import boto3

        session = boto3.Session(self._key_id, self._secret, region_name=REGION)
        return session.client("s3", endpoint_url=self.url)

    def put_file(self, bucket: str, key: str, path: Path) -> None:
        """Store a copy of the file at `path` with its SHA-256: moto's own uploads are slow with gigabytes.

        Raises:
            urllib.error.HTTPError: if there is no such bucket.

        """
        target = f"{self.url}/{bucket}/{urllib.parse.quote(key)}"
        headers = {_FILE_HEADER: urllib.parse.quote(str(path.absolute()))}
        with urllib.request.urlopen(urllib.request.Request(target, b"", headers, method="PUT")):  # noqa: S310
            pass

    @property
    def data_requests(self) -> list[Request]:
        """The requests for content: GETs of objects, without HEADs and listings."""
        return [r for r in self.requests if r.method == "GET" and "/" in r.path.strip("/")]


# From here on: the child.


def application(key_id: str, secret: str) -> Application:
    """Return moto's S3 behind a check of signatures."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    _serve_ranges_from_files()
    moto = DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if path := environ.get("HTTP_X_MODELFS_FILE"):
            bucket, _, name = environ["RAW_URI"].strip("/").partition("/")
            _copy(bucket, urllib.parse.unquote(name), urllib.parse.unquote(path))
            start_response("200 OK", [("Content-Length", "0")])
            return []
        refusal = _refusal(environ, key_id, secret)
        if refusal is None:
            answer: Iterable[bytes] = moto(environ, start_response)
            return answer
        code, message = refusal
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        length = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start_response("403 Forbidden", length)
        return [body]

    return app


def _copy(bucket: str, name: str, path: str) -> None:
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    key = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, name, b"")
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(path, "rb") as file:  # noqa: PTH123
        while piece := file.read(_MAPPED):
            md5.update(piece)
            sha256.update(piece)
            key._value_buffer.write(piece)
        key.contentsize = file.tell()
    key._etag = md5.hexdigest()
    key.checksum_algorithm, key.checksum_value = "SHA256", base64.b64encode(sha256.digest()).decode()


class _Content(mmap.mmap):
    """An object's bytes: slices copy the slice only, and iteration goes by pieces, not by bytes."""

    def __iter__(self) -> Iterator[bytes]:  # type: ignore[override]  # what WSGI wants
        return (self[start : start + _MAPPED] for start in range(0, len(self), _MAPPED))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Content:
        return self  # moto copies keys to list their versions; nobody can change these bytes


def _serve_ranges_from_files() -> None:
    """Let moto map large objects; it would copy all of one into memory for every range of it."""
    from moto.s3.models import FakeKey

    def value(key: Any) -> bytes | mmap.mmap:
        with key.lock:
            if key.size >= _MAPPED:
                key._value_buffer.rollover()
                key._value_buffer.flush()
                return _Content(key._value_buffer.fileno(), key.size, access=mmap.ACCESS_READ)
            key._value_buffer.seek(0)
            content: bytes = key._value_buffer.read()
            return content

    inherited: Any = FakeKey.__dict__["value"]
    setattr(FakeKey, "value", inherited.getter(value))  # noqa: B010  # mypy knows it as a property only


def _refusal(environ: dict[str, Any], key_id: str, secret: str) -> tuple[str, str] | None:
    """Return the code and message of the refusal if the request is signed and not well; None if it may pass.

    What is not signed at all is for moto to judge: public objects can be read by anybody.
    """
    path, _, query = environ["RAW_URI"].partition("?")
    pairs = [pair.partition("=")[::2] for pair in query.split("&") if pair]
    fields = {urllib.parse.unquote(name): urllib.parse.unquote(value) for name, value in pairs}
    authorization = environ.get("HTTP_AUTHORIZATION", "")
    presigned = "X-Amz-Signature" in fields
    if presigned:
        credential, names = fields["X-Amz-Credential"], fields["X-Amz-SignedHeaders"]
        given, stamp = fields["X-Amz-Signature"], fields["X-Amz-Date"]
        payload = "UNSIGNED-PAYLOAD"
    elif authorization.startswith("AWS4-HMAC-SHA256 "):
        parts = dict(part.strip().split("=", 1) for part in authorization[17:].split(","))
        credential, names, given = parts["Credential"], parts["SignedHeaders"], parts["Signature"]
        stamp, payload = environ["HTTP_X_AMZ_DATE"], environ["HTTP_X_AMZ_CONTENT_SHA256"]
    else:
        return None
    claimed, date, region, service, _ = credential.split("/")
    if claimed != key_id:
        return "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."
    canonical = "\n".join(
        (
            environ["REQUEST_METHOD"],
            path,
            "&".join(sorted(f"{k}={v}" for k, v in map(_quoted, fields.items()) if k != "X-Amz-Signature")),
            *(f"{name}:{_header(environ, name)}" for name in names.split(";")),
            "",
            names,
            payload,
        )
    )
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    scope = f"{date}/{region}/{service}/aws4_request"
    key = f"AWS4{secret}".encode()
    for step in (date, region, service, "aws4_request", f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashed}"):
        key = hmac.new(key, step.encode(), "sha256").digest()
    if not hmac.compare_digest(key.hex(), given):
        return "SignatureDoesNotMatch", "The request signature we calculated does not match yours."
    if presigned:
        start = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        if time.time() >= start + int(fields["X-Amz-Expires"]):
            return "AccessDenied", "Request has expired"
    return None


def _quoted(pair: tuple[str, str]) -> tuple[str, str]:
    return urllib.parse.quote(pair[0], safe="-_.~"), urllib.parse.quote(pair[1], safe="-_.~")


def _header(environ: dict[str, Any], name: str) -> str:
    key = name.upper().replace("-", "_")
    value = environ.get(key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}", "")
    return " ".join(value.split())
