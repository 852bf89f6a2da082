"""What the headers of an answer mean, whatever is in them."""

from __future__ import annotations

from email.utils import formatdate

from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelfs.errors import (
    StoreError,
)
from modelfs.fetch.answer import accept, parse_content_range, parse_retry_after
from modelfs.types import Location, Span


@settings(deadline=None)
@given(st.integers(0, 10**18), st.integers(1, 10**17), st.integers(0, 10**17), st.booleans())
def test_every_valid_content_range_is_understood(start: int, length: int, rest: int, known: bool) -> None:
    total = start + length + rest if known else None
    text = f"bytes {start}-{start + length - 1}/{'*' if total is None else total}"
    assert parse_content_range(text) == (Span(start, start + length), total)


@settings(deadline=None)
@example("bytes 0-9300000000000000000/*")
@given(st.text() | st.from_regex(r"bytes [0-9]*-[0-9]*/([0-9]*|\*)", fullmatch=True))
def test_no_content_range_breaks_the_parser(text: str) -> None:
    parsed = parse_content_range(text)
    if parsed is not None:
        span, total = parsed
        assert span
        assert total is None or span.stop <= total


@settings(deadline=None)
@given(st.text() | st.integers().map(str) | st.datetimes().map(lambda d: formatdate(d.year, usegmt=True)))
def test_no_retry_after_breaks_the_parser(text: str) -> None:
    wait = parse_retry_after(text, 1e9)
    assert wait is None or wait >= 0


@settings(deadline=None)
@given(
    st.sampled_from([200, 206]) | st.integers(0, 999),
    st.dictionaries(
        st.sampled_from(["content-range", "content-length", "content-encoding", "etag", "last-modified"]),
        st.text()
        | st.sampled_from(["bytes 3-6/10", "4", "10", '"v1"', formatdate(1e9, usegmt=True), "identity"]),
    ),
    st.sampled_from([{}, {"etag": '"v1"'}, {"last_modified": formatdate(1e9, usegmt=True)}]),
)
def test_an_answer_is_either_the_pinned_version_or_an_error(
    status: int, headers: dict[str, str], pin: dict[str, str]
) -> None:
    location = Location("https://example.org/x", **pin)
    try:
        body = accept("https://example.org/x", status, headers, location, Span(3, 7), 10)
    except StoreError:
        return
    assert body == (Span(3, 7) if status == 206 else Span(0, 10))
    assert status == 200 or headers["content-range"].strip().lower().startswith("bytes")
    assert not pin.keys() or headers[next(iter(pin)).replace("_", "-")] == next(iter(pin.values()))
