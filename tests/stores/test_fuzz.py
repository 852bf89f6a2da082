"""Whatever a store answers, it is a listing fit to be shown or a StoreError of one line; fuzzing.

``make fuzz`` does it for longer. The parsers of archives are fuzzed in ``tests/archives/test_streams.py``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelfs.errors import StoreError
from modelfs.listing import CONTROL
from modelfs.stores.docker import challenges
from modelfs.stores.http import index_names, parse_manifest
from modelfs.stores.manifest import choose, entries, parse
from modelfs.stores.parts import splits
from modelfs.stores.web import link_expiry
from modelfs.types import Digest, Snapshot
from tests.archives.test_streams import EXAMPLES
from tests.stores.dialects import DIALECTS, SHA256, Dialect, oci_layer, oci_manifest
from tests.stores.hostile import PATHS, SIZES
from tests.stores.listing import Lists, checked, listing

PARSING, ASKING = max(EXAMPLES // 3, 1), max(EXAMPLES // 12, 1)
"""How many answers are made up for each parser, and for each store that asks a server for them."""

STRANGE = [
    *(path for path, _ in PATHS.values()),
    *SIZES.values(),
    True,
    1.5,
    1e300,
    {},
    [],
    [[]],
    "\udc80",
    SHA256,
]
"""What is put into the place of what belongs there."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(STRANGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of everything in a JSON document, by keys and indexes."""
    yield path
    inner = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in inner:
        yield from places(value, (*path, key))


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """Return a JSON document of which up to three places are something else, gone, or there twice."""
    for _ in range(draw(st.integers(1, 3))):
        document = copy.deepcopy(document)
        place = draw(st.sampled_from(list(places(document))))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(JSON)
            continue
        around = document
        for key in place[:-1]:
            around = around[key]
        match draw(st.sampled_from(["other", "other", "gone", "twice"])):
            case "other":
                around[place[-1]] = draw(JSON)
            case "gone":
                del around[place[-1]]
            case "twice" if isinstance(around, list):
                around.append(around[place[-1]])
    return document


def flipped(raw: bytes, at: float, mask: int) -> bytes:
    """Return `raw` with bits of one byte changed."""
    index = int(at * (len(raw) - 1)) if raw else 0
    return raw[:index] + bytes([raw[index] ^ mask]) + raw[index + 1 :] if raw else raw


FLIPS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3)

IMAGE = oci_manifest(
    oci_layer("config.json", 2),
    oci_layer("", 5, mediaType="application/vnd.oci.image.layer.v1.tar+gzip", annotations={}),
    oci_layer("", 5, mediaType="application/vnd.ollama.image.model", annotations={}, name="model"),
    config=oci_layer("x", 1),
    annotations={"org.opencontainers.image.created": "2025-07-01T12:00:00Z"},
)
PLATFORM = {"os": "linux", "architecture": "amd64", "variant": "v8"}
INDEX = {"schemaVersion": 2, "manifests": [oci_layer("x", 9, platform=PLATFORM), oci_layer("x", 9)]}


def refused(error: StoreError) -> None:
    assert not CONTROL.search(str(error))
    str(error).encode()


@settings(max_examples=PARSING, deadline=None)
@given(damaged(IMAGE) | damaged(INDEX), FLIPS, st.sampled_from(["", "config.json", "models"]))
def test_a_damaged_manifest_of_a_registry_is_shown_in_part_or_refused(
    document: Any, flips: list[tuple[float, int]], directory: str
) -> None:
    body = json.dumps(document).encode()
    for at, mask in flips:
        body = flipped(body, at, mask)
    try:
        manifest = parse(body, "oci://here/m:v1")
        if manifest.manifests:
            choose(manifest, None, "oci://here/m:v1")
        listed, rejected = entries(manifest, Digest("sha256", SHA256), len(body), directory)
    except StoreError as error:
        refused(error)
    else:
        checked(Snapshot.of("oci://here/m:v1", "r", listed))
        assert all(path.startswith(".oci/") for path, _ in rejected)


FILES = {"version": 1, "files": [{"path": "a/b", "size": 1, "sha256": SHA256, "etag": '"x"', "url": "b"}] * 2}


@settings(max_examples=PARSING, deadline=None)
@given(damaged(FILES), FLIPS)
def test_a_damaged_manifest_of_a_site_leads_nowhere_else(
    document: Any, flips: list[tuple[float, int]]
) -> None:
    body = json.dumps(document).encode()
    for at, mask in flips:
        body = flipped(body, at, mask)
    try:
        files = parse_manifest(body, "http://here/models/modelfs-manifest.json")
    except StoreError as error:
        refused(error)
    else:
        assert all(file.url.startswith("http://here/") and not CONTROL.search(file.url) for file in files)


MARKUP = [
    *(
        b"<a href=",
        b"<A HREF='",
        b'<a href="',
        b"'>",
        b'"',
        b"<",
        b">",
        b"<!--",
        b"-->",
        b"<script>",
        b"</script>",
    ),
    *(b"../", b"/", b"a", b"%00", b"%2e%2e%2f", b"%2F", b"http://here/d/x", b"//", b"http://[", b"?", b"#"),
    *(
        b"&#0;",
        b"&#x2f;",
        b"&#" + b"1" * 5000,
        b"\0",
        b"\n",
        b"\xff",
        b"<![CDATA[",
        b"<!DOCTYPE",
        b"javascript:",
    ),
]


@settings(max_examples=PARSING, deadline=None)
@given(st.lists(st.sampled_from(MARKUP) | st.binary(max_size=5), max_size=40).map(b"".join))
def test_whatever_a_page_is_its_names_are_of_children(page: bytes) -> None:
    for name in index_names(page, "http://here/d/"):
        assert "/" not in name.removesuffix("/")
        assert name.removesuffix("/")


@pytest.mark.parametrize(
    "piece", [b"<a ", b"<a href='", b"<!--", b"<script>", b"</script", b"<", b"&#x", b"<a x=", b"\t"]
)
def test_a_long_page_takes_time_in_proportion(piece: bytes) -> None:
    pages = (b"%s" % (piece * (2**20 // len(piece))), b"<a href='" + piece * (2**20 // len(piece)) + b"'>")
    for page in pages:
        assert len(index_names(page, "http://here/d/")) <= 1


@settings(max_examples=PARSING, deadline=None)
@given(st.sets(st.from_regex(r"[ab]\.(part[-_]?)?([0-9]{1,6}|[a-c]{2,3})", fullmatch=True), max_size=12))
def test_parts_of_a_file_are_used_once_and_in_order(names: set[str]) -> None:
    for split in splits(names):
        assert len(split.parts) == len({*split.parts}) >= 2
        assert {*split.parts} <= names


@settings(max_examples=PARSING, deadline=None)
@given(st.text(st.characters(max_codepoint=255)), st.text(max_size=60))
def test_whatever_a_header_or_a_link_says_is_understood_or_ignored(header: str, query: str) -> None:
    for parameters in challenges(header).values():
        assert all(isinstance(value, str) for value in parameters.values())
    assert link_expiry(f"https://here/x?Expires={query}&jwt={query}", 1e9) > 1e9


@pytest.fixture(scope="module")
def lists() -> Iterator[Lists]:
    with listing() as lists:
        yield lists


@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_a_damaged_answer_is_shown_in_part_or_refused(dialect: Dialect, lists: Lists) -> None:
    whole = dict(dialect.documents([dialect.row("config.json", 2), dialect.row("weights.bin", 3)]))

    @settings(max_examples=ASKING, deadline=None)
    @given(st.data())
    def damage(data: st.DataObject) -> None:
        documents = dict(whole)
        name = data.draw(st.sampled_from(sorted(documents)))
        body = documents[name]
        if not isinstance(body, bytes):
            documents[name] = data.draw(damaged(body))
            body = json.dumps(documents[name]).encode()
        for at, mask in data.draw(FLIPS):
            documents[name] = body = flipped(body, at, mask)
        try:
            lists(dialect, documents)
        except StoreError as error:
            refused(error)

    damage()
