"""HTTP for control planes: one place for redirects, deadlines, size limits and the mapping of errors.

Follows RFC 9110. Everything is asked for with ``Accept-Encoding: identity``, so that lengths and ETags are
those of the bytes that range requests will get.
"""

from __future__ import annotations

import base64
import email.utils
import errno
import functools
import json
import netrc
import os
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

import certifi
import httpx
import trio

from modelfs import __version__
from modelfs.errors import AccessDenied, BadAnswer, NotFound, StoreError, Unavailable
from modelfs.stores import redact
from modelfs.stores.reach import Reach, allowed, leads, peer_reach, written_reach
from modelfs.types import Location

MAX_REDIRECTS = 10
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REASON = 16 * 1024
"""Bytes of a failure's body that are read."""
AT_ONCE = 16
"""Requests in flight while one snapshot is made."""

T = TypeVar("T")

LINK_LIFE = 600.0
"""Seconds that a location is used whose end is not known."""
LEAST_LIFE = 30.0
"""Seconds that any location is used at least."""

_RESOLVERS = trio.CapacityLimiter(8)
_STRONG = re.compile(r'"[!#-~]+"')
_WEAK = re.compile(r'W/"[!#-~]+"')


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said in the end.

    Attributes:
        url: that answered, after redirects; may hold secrets.
        status: of HTTP.
        headers: of the answer.
        body: empty unless it was asked for; of a failure its beginning.

    """

    url: httpx.URL
    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says about a file, as far as it can be relied on.

    Attributes:
        size: bytes, None if the server does not say.
        etag: strong validator with its quotes, None if there is none.
        weak: weak validator: tells versions apart, but cannot pin a range request.
        last_modified: as the server writes it.

    """

    size: int | None
    etag: str | None
    weak: str | None
    last_modified: str | None

    @property
    def mtime(self) -> float:
        """Modification time in seconds since the epoch, 0 if unknown."""
        try:
            return email.utils.parsedate_to_datetime(self.last_modified or "").timestamp()
        except (ValueError, OverflowError):
            return 0.0


class Web:
    """Requests to one origin and to where it redirects; an async context manager.

    Args:
        origin: any URL of the origin that may see `headers`; other origins never do.
        headers: sent with every request to the origin; secrets.
        tls: whom to trust.
        timeout: seconds that one request, redirects and body included, may take.
        refused: says what an answer other than success means; `failure` by default.

    """

    def __init__(
        self,
        origin: str,
        headers: Mapping[str, str],
        *,
        tls: ssl.SSLContext,
        timeout: float,
        refused: Callable[[Answer, str], StoreError] | None = None,
    ) -> None:
        self._origin = _origin(httpx.URL(origin))
        self._headers = headers
        self._timeout = timeout
        self._failure = refused or failure
        self._client = httpx.AsyncClient(
            verify=tls,
            timeout=None,  # noqa: S113  # `ask` sets one deadline over all phases
            headers={"accept-encoding": "identity", "user-agent": f"modelfs/{__version__}"},
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.aclose()

    async def get(self, url: str, limit: int, fields: Mapping[str, str] | None = None) -> Answer:
        """Return the successful answer to a GET; that is 304 too if `fields` make it conditional.

        Raises:
            StoreError: the body is longer than `limit` bytes, or the server or the network failed.

        """
        answer = await self.ask("GET", url, limit, fields=fields)
        if answer.status != 200 and (answer.status != 304 or "if-none-match" not in (fields or {})):
            raise self._failure(answer, url)
        return answer

    async def location(
        self, url: str, fields: Mapping[str, str] | None = None, life: float | None = None
    ) -> Location:
        """Return where a GET leads: the signed link on another origin, which is not asked for anything.

        A server that answers with the content itself, which is not read, is the location, with its headers.

        Args:
            url: of the origin.
            fields: further header fields, no secrets.
            life: seconds that a location is used if it does not tell when it ends, LINK_LIFE by default.

        Raises:
            StoreError: the server or the network failed, or it leads to where it must not.

        """
        target = httpx.URL(url)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self.ask("GET", str(target), fields=fields, follow=False)
            if answer.status == 200:
                sent = {**self._headers, **(fields or {})}
                return Location(str(target), sent, time.time() + (life or LINK_LIFE))
            if answer.status not in REDIRECTS or "location" not in answer.headers:
                raise self._failure(answer, url)
            try:
                target = target.join(answer.headers["location"])
            except httpx.InvalidURL as error:
                raise BadAnswer(f"{redact(url)}: redirects to a malformed URL") from error
            if _origin(target) != self._origin:
                link = str(target)
                public = await trio.to_thread.run_sync(
                    leads, url, link, abandon_on_cancel=True, limiter=_RESOLVERS
                )
                return Location(link, expires=link_expiry(link, time.time(), life), public=public)
        raise BadAnswer(f"{redact(url)}: more than {MAX_REDIRECTS} redirects")

    async def facts(self, url: str) -> Facts:
        """Return what the server says about the file at `url` without fetching it.

        HEAD is tried first; where it is refused (servers of signed URLs do) or does not tell the length, one
        byte is asked for.

        Raises:
            StoreError: there is no such file, or the server or the network failed.

        """
        answer = await self.ask("HEAD", url)
        if answer.status in (403, 405, 501) or (answer.status == 200 and _size(answer) is None):
            answer = await self.ask("GET", url, fields={"range": "bytes=0-0"})
        size = _size(answer)
        empty = answer.status == 416 and size == 0  # there is no first byte to send
        if answer.status not in (200, 206) and not empty:
            raise self._failure(answer, url)
        if answer.url.path.endswith("/"):
            raise BadAnswer(f"{redact(url)}: is a directory: end its URL with a slash")
        encoding = answer.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise BadAnswer(f"{redact(url)}: sent in content encoding {encoding!r}: switch that off")
        etag = answer.headers.get("etag", "")
        return Facts(
            size,
            etag if _STRONG.fullmatch(etag) else None,
            etag if _WEAK.fullmatch(etag) else None,
            answer.headers.get("last-modified"),
        )

    async def ask(
        self,
        method: str,
        url: str,
        limit: int | None = None,
        *,
        fields: Mapping[str, str] | None = None,
        form: Mapping[str, str] | None = None,
        follow: bool = True,
    ) -> Answer:
        """Return the answer to one request, whatever its status.

        Args:
            method: of HTTP.
            url: to ask; may hold secrets.
            limit: most bytes of the body of a 200; None leaves it unread.
            fields: further header fields, no secrets: they go wherever a redirect leads.
            form: sent as ``application/x-www-form-urlencoded``, likewise: do not follow with secrets in it.
            follow: redirects; otherwise the first answer is returned.

        Raises:
            StoreError: there is no answer, its body is too long, or a redirect must not be followed.

        """
        place = redact(url)
        try:
            with trio.move_on_after(self._timeout):
                return await self._follow(method, url, limit, fields or {}, form, follow)
        except httpx.LocalProtocolError as error:
            # Its text quotes the header that could not be sent, which may be a secret.
            raise StoreError(f"{place}: the request cannot be sent: check the option headers") from error
        except httpx.RemoteProtocolError as error:
            # Nor is this text repeated: it quotes the answer, which may quote the request.
            raise Unavailable(f"{place}: the answer is not HTTP: check the address") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"{place}: {_detail(error)}: check the address and the network") from error
        raise Unavailable(f"{place}: no answer within {self._timeout:g} s: raise the option timeout")

    async def _follow(
        self,
        method: str,
        url: str,
        limit: int | None,
        fields: Mapping[str, str],
        form: Mapping[str, str] | None,
        follow: bool,
    ) -> Answer:
        target, nearest = httpx.URL(url), Reach.LINK
        for _ in range(MAX_REDIRECTS + 1):
            secrets = self._headers if _origin(target) == self._origin else {}
            request = self._client.build_request(method, target, headers={**secrets, **fields}, data=form)
            response = await self._client.send(request, stream=True)
            try:
                reach = allowed(str(target), _peer_reach(target, response, nearest), nearest)
                if not response.has_redirect_location or not follow:
                    body = b""
                    if response.status_code >= 400:
                        body = await _body(response, MAX_REASON)
                    elif limit is not None and response.status_code == 200:
                        body = await _body(response, limit)
                        if len(body) > limit:
                            place, size = redact(url), limit >> 20
                            raise StoreError(
                                f"{place}: the answer is longer than {size} MiB, too long to list"
                            )
                    return Answer(target, response.status_code, response.headers, body)
                following = target.join(response.headers["location"])
            finally:
                await response.aclose()
            if following.scheme not in ("http", "https") or not following.host:
                raise BadAnswer(f"{redact(url)}: redirects to something that is not HTTP")
            if target.scheme == "https" and following.scheme == "http":
                raise StoreError(
                    f"{redact(url)}: redirects from https to http on {following.host}, which is not "
                    "followed: correct the server, or configure the http:// URL if you trust the network"
                )
            if _origin(following) != _origin(target):
                allowed(str(following), written_reach(str(following)), reach)
                nearest = reach
            target = following
        raise BadAnswer(f"{redact(url)}: more than {MAX_REDIRECTS} redirects")


async def each(function: Callable[[T], Awaitable[None]], items: Sequence[T]) -> None:
    """Call `function` with every item, up to `AT_ONCE` at a time; the first StoreError ends them all."""
    queue = iter(items)
    failures: list[StoreError] = []

    async def work(scope: trio.CancelScope) -> None:
        try:
            for item in queue:
                await function(item)
        except StoreError as error:
            failures.append(error)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(min(AT_ONCE, len(items))):
            nursery.start_soon(work, nursery.cancel_scope)
    if failures:
        raise failures[0]


@functools.cache  # reading the authorities takes 40 ms, and every snapshot makes a client
def tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    """Return what trusts the authorities in the file `ca_bundle`, else ``$SSL_CERT_FILE``, else the system's.

    Raises:
        OSError: the file cannot be read, or holds no certificate (``ssl.SSLError``).

    """
    context = ssl.create_default_context(cafile=ca_bundle)
    if ca_bundle is None and "SSL_CERT_FILE" not in os.environ:
        # Some builds of Python look for the system's authorities where this system does not have them.
        context.load_verify_locations(certifi.where())
    return context


def basic_auth(user: str, password: str) -> str:
    """Return the value of an ``Authorization`` header (RFC 7617, UTF-8)."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def netrc_auth(host: str) -> str | None:
    """Return the ``Authorization`` for `host` from ``$NETRC`` or ``~/.netrc``; None if there is none.

    Raises:
        AccessDenied: the file is there but cannot be read or understood.
        Unavailable: the process has no descriptor for it at the moment.

    """
    try:
        path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        found = netrc.netrc(path).authenticators(host)
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: the user has no home
        return None
    except netrc.NetrcParseError as error:
        # The parser's message may quote a password.
        raise AccessDenied(f"{path}, line {error.lineno}: malformed: correct it") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise Unavailable(f"{path}: {error.strerror}: raise the limit of open files") from error
        raise AccessDenied(f"{path}: cannot be read ({type(error).__name__}): correct it") from error
    return basic_auth(found[0], found[2] or "") if found else None


def link_expiry(url: str, now: float, otherwise: float | None = None) -> float:
    """Return when a signed link runs out, seconds since the epoch.

    Known are ``Expires`` of CloudFront and its like, the date and lifetime of Signature V4 (S3, GCS), ``se``
    of Azure's shared access signatures, and ``exp`` of a JSON Web Token (RFC 7519), of which GitHub adds one.
    What tells nothing of that runs out `otherwise` seconds after `now`, LINK_LIFE by default.
    """
    query = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
    ends = [float(query["expires"])] if re.fullmatch(r"[0-9]{1,12}", query.get("expires", "")) else []
    for prefix in ("x-amz", "x-goog"):
        date, life = query.get(f"{prefix}-date", ""), query.get(f"{prefix}-expires", "")
        if re.fullmatch(r"[0-9]{1,9}", life) and (signed := _moment(date, "%Y%m%dT%H%M%SZ")):
            ends.append(signed + int(life))
    if "sig" in query and (end := _moment(query.get("se", ""), "%Y-%m-%dT%H:%M:%SZ")):
        ends.append(end)
    if end := _token_end(query.get("jwt", "")):
        ends.append(end)
    # A link that looks dead on arrival tells of a wrong clock here: let the other side judge.
    return max(min(ends, default=now + (otherwise or LINK_LIFE)), now + LEAST_LIFE)


def _token_end(token: str) -> float | None:
    """Return ``exp`` of a JSON Web Token without checking its signature, which is not for us."""
    try:
        claims = json.loads(base64.urlsafe_b64decode(f"{token.split('.')[1]}==="))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return None


def _moment(text: str, form: str) -> float | None:
    try:
        return datetime.strptime(f"{text}+0000", f"{form}%z").timestamp()
    except ValueError:
        return None


def _origin(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


def _peer_reach(url: httpx.URL, response: httpx.Response, nearest: Reach) -> Reach:
    stream = response.extensions["network_stream"]
    try:
        return peer_reach(str(url), stream.get_extra_info("server_addr")[0])
    except OSError as error:  # it has reset the connection behind its answer
        if nearest is Reach.LINK:
            return written_reach(str(url))
        raise httpx.ReadError(str(error)) from error


async def _body(response: httpx.Response, limit: int) -> bytes:
    """Return the body, or the beginning of one that is longer than `limit` bytes."""
    body = bytearray()
    # Leaving the loop would leave httpx's generators behind half-way; a cancelled read unwinds them all.
    with trio.CancelScope() as scope:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > limit:
                scope.cancel()
    return bytes(body)


def _detail(error: BaseException) -> str:
    """Return what the outermost error that says anything says: faults of TLS are wrapped in silent ones."""
    cause: BaseException | None = error
    while cause is not None and not str(cause):
        cause = cause.__cause__ or cause.__context__
    return str(cause or type(error).__name__)


def _size(answer: Answer) -> int | None:
    """Return the length of the whole file as far as `answer` tells it."""
    if answer.status in (206, 416):
        text = answer.headers.get("content-range", "").rpartition("/")[2]
    else:
        text = answer.headers.get("content-length", "")
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def failure(answer: Answer, url: str) -> StoreError:
    """Return the error that a status other than success stands for."""
    place, status = redact(url), answer.status
    if status in (401, 403, 407):
        return AccessDenied(
            f"{place}: refused ({status}): check user and password in ~/.netrc, or the option headers"
        )
    if status in (404, 410):
        return NotFound(f"{place}: not there ({status}): check the URL")
    if status in (408, 425, 429) or status >= 500:
        wait = _retry_after(answer.headers.get("retry-after", ""))
        return Unavailable(f"{place}: not available now ({status}): come back later", retry_after=wait)
    return BadAnswer(f"{place}: unexpected answer ({status}): check the URL")


def _retry_after(text: str) -> float | None:
    """Return the seconds that a ``Retry-After`` asks for (RFC 9110, 10.2.3), None if it is wrong."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
