"""What an HTTP answer to a range request means: pure functions from status and headers to a span or an error.

Nothing of a body may be used before :func:`accept` has passed the answer. The rules are those of RFC 9110
(HTTP Semantics), made stricter where it would let bytes of another version through.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import quote, urljoin, urlsplit

from modelfs.errors import AccessDenied, BadAnswer, Expired, NotFound, Stale, StoreError, Unavailable
from modelfs.stores import redact
from modelfs.types import Location, Span

REDIRECTS = frozenset({301, 302, 303, 307, 308})
"""Statuses that name another place in ``Location`` (RFC 9110 section 15.4)."""

RANGE_REFUSED = frozenset({400, 416, 501})
"""Statuses of servers that know no ranges; what else they may mean shows when the whole is asked for."""

_CONTENT_RANGE = re.compile(
    r"bytes[ \t]+([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII | re.IGNORECASE
)
_LARGEST = 2**63 - 1
"""Bytes of the largest file: an off_t."""

_PORTS = {"http": 80, "https": 443}
_URL_CHARACTERS = "!#$%&'()*+,/:;=?@[]~-._"


def parse_content_range(value: str) -> tuple[Span, int | None] | None:
    """Return the span and the total size (None for ``*``) of a ``Content-Range``, or None if it is malformed.

    RFC 9110 section 14.4: a range that ends before it starts or after the total is invalid. So is for us one
    behind what a file can hold.
    """
    match = _CONTENT_RANGE.fullmatch(value.strip())
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if not first <= last < _LARGEST or (total is not None and last >= total):
        return None
    return Span(first, last + 1), total


def parse_retry_after(value: str, now: float) -> float | None:
    """Return the seconds from `now` that a ``Retry-After`` asks to wait, never negative; None if malformed.

    RFC 9110 section 10.2.3: a number of seconds or an HTTP date.
    """
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value, re.ASCII):
        return float(value)
    moment = _date(value)
    return None if moment is None else max(0.0, moment.timestamp() - now)


def accept(
    place: str, status: int, headers: Mapping[str, str], location: Location, span: Span, size: int
) -> Span:
    """Return the span that the body of this answer is going to deliver.

    That is `span` for a partial answer and the whole object where the server ignored the range.

    Args:
        place: who answered, for messages; without secrets.
        status: of the final answer, not a redirect.
        headers: by lower-case name; repeated ones joined by ``", "``.
        location: what was asked for and what validators the answer must carry.
        span: the range that was asked for.
        size: of the whole object in the snapshot.

    Raises:
        Stale: the store has other bytes now.
        StoreError: of the class that fits the status; BadAnswer where the answer contradicts the request.

    """
    if status not in (200, 206):
        raise failure(place, status, headers, location)
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise BadAnswer(f"{place}: answered in content encoding {encoding!r} although none was asked for")
    _check_version(headers, location, place)
    if status == 200:
        if _length(headers, place) not in (None, size):
            raise Stale(f"{place}: now has {headers['content-length']} bytes, not {size}: refresh the model")
        return Span(0, size)
    if headers.get("content-type", "").lower().startswith("multipart/byteranges"):
        raise BadAnswer(f"{place}: answered one range with several parts")
    parsed = parse_content_range(headers.get("content-range", ""))
    if parsed is None:
        raise BadAnswer(f"{place}: malformed Content-Range {headers.get('content-range', '')[:80]!r}")
    answered, total = parsed
    if total not in (None, size):
        raise Stale(f"{place}: now has {total} bytes, not {size}: refresh the model")
    if answered != span or _length(headers, place) not in (None, len(span)):
        raise BadAnswer(f"{place}: asked for bytes {_text(span)}, answered {_text(answered)}")
    return span


def failure(place: str, status: int, headers: Mapping[str, str], location: Location) -> StoreError:
    """Return the error that a status other than success and redirection stands for."""
    place = f"{place}: HTTP {status}"
    if location.expires is not None and status in (400, 401, 403, 618):
        # S3 answers 400 ExpiredToken when the session that signed has ended, GitHub "618 jwt:expired".
        return Expired(f"{place}: the signed location is no longer accepted; it is asked for again")
    match status:
        case 401 | 403:
            return AccessDenied(f"{place}: the store refuses the credentials; check them")
        case 404 | 410:
            return NotFound(f"{place}: the object is gone; refresh the model")
        case 412 | 416:
            return Stale(f"{place}: the store no longer has this version; refresh the model")
        case _ if status in (408, 425, 429) or 500 <= status <= 599:
            wait = parse_retry_after(headers.get("retry-after", ""), time.time())
            return Unavailable(
                f"{place}: the store is overloaded or out of order; try later", retry_after=wait
            )
        case _:
            return BadAnswer(f"{place}: unexpected answer to a range request; check the URL of the store")


def redirect(url: str, headers: Mapping[str, str]) -> str:
    """Return the URL that a redirect from `url` leads to.

    Raises:
        BadAnswer: there is none, it is neither http nor https, or it leaves https for http.

    """
    place = redact(url)
    # The header is bytes in latin-1 clothes.
    reference = ascii_url(headers.get("location", "").encode("latin-1"))
    try:
        target = urljoin(url, reference)
        scheme = urlsplit(target).scheme
        origin_of(target)
    except ValueError as error:
        raise BadAnswer(f"{place}: redirects to a malformed URL") from error
    if not reference or scheme not in _PORTS:
        raise BadAnswer(
            f"{place}: redirects to {scheme if reference else 'nowhere'!r}, not to an http(s) URL"
        )
    if scheme == "http" and urlsplit(url).scheme == "https":
        raise BadAnswer(
            f"{place}: redirects from https to http ({redact(target)}), which would expose the model"
        )
    return target


def ascii_url(url: str | bytes) -> str:
    """Return `url` with everything percent-encoded that must not be in a URL as it is, as browsers do."""
    return quote(url, safe=_URL_CHARACTERS)


def origin_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of an http(s) URL: what secrets in headers are meant for.

    Raises:
        ValueError: the URL has no host or a malformed port.

    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError("no host")
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme, 0)


def _check_version(headers: Mapping[str, str], location: Location, place: str) -> None:
    if location.etag is not None:
        etag = headers.get("etag")
        if etag is None:
            raise BadAnswer(f"{place}: answered without the ETag that pins the version")
        # A weak pin promises no more than a weak comparison; a strong one needs a strong answer
        # (RFC 9110 section 8.8.3.2).
        weak = location.etag.startswith("W/")
        if (etag.removeprefix("W/") if weak else etag) != location.etag.removeprefix("W/"):
            raise Stale(f"{place}: has another version now (its ETag changed): refresh the model")
    if location.last_modified is not None:
        modified = headers.get("last-modified")
        if modified is None:
            raise BadAnswer(f"{place}: answered without the Last-Modified that pins the version")
        if modified != location.last_modified and (
            _date(modified) is None or _date(modified) != _date(location.last_modified)
        ):
            raise Stale(f"{place}: was modified since it was listed: refresh the model")


def _length(headers: Mapping[str, str], place: str) -> int | None:
    value = headers.get("content-length")
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,19}", value, re.ASCII):
        raise BadAnswer(f"{place}: malformed Content-Length {value[:80]!r}")
    return int(value)


def _date(value: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _text(span: Span) -> str:
    return f"{span.start}-{span.stop - 1}"
