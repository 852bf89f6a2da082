"""What `FaultProxy` promises to those who test with it."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from itertools import islice

import pytest

from modelfs.testing.faults import FAULTS, Asked, Fault, FaultProxy, of_content, storm
from tests.mount.harness import eventually
from tests.origin import Origin

DATA = bytes(range(200))
RANGE = {"Range": "bytes=10-109"}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin({"x": DATA}) as own:
        yield own


def get(proxy: FaultProxy, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, "/x?token=s3cret", headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture(autouse=True)
def named_with_a_query(origin: Origin) -> None:
    origin.files["x?token=s3cret"] = DATA


def test_without_a_plan_everything_passes_as_it_is(origin: Origin) -> None:
    with FaultProxy(origin.url) as proxy:
        assert get(proxy) == (200, DATA)
        assert get(proxy, RANGE) == (206, DATA[10:110])
        assert get(proxy, method="HEAD") == (200, b"")
        assert proxy.asked[1] == Asked("GET", "/x", ("token",), "bytes=10-109", proxy.url)
        assert not proxy.injected


def test_a_list_strikes_requests_in_their_order_and_then_no_more(origin: Origin) -> None:
    with FaultProxy(origin.url, [Fault("status-503"), None, Fault("gone")]) as proxy:
        assert [get(proxy)[0] for _ in range(5)] == [503, 200, 404, 200, 200]
        assert proxy.injected == {"status-503": 1, "gone": 1}


def test_a_function_chooses_by_request_and_can_be_replaced(origin: Origin) -> None:
    with FaultProxy(origin.url, lambda asked: Fault("gone") if asked.range else None) as proxy:
        assert get(proxy)[0] == 200
        assert get(proxy, RANGE)[0] == 404
        proxy.follow(of_content([Fault("status-500")]))
        assert get(proxy)[0] == 200
        assert get(proxy, RANGE)[0] == 500
        assert get(proxy, RANGE)[0] == 206


def test_a_fault_that_does_not_apply_is_not_counted(origin: Origin) -> None:
    kinds = ("wrong-range", "longer-body", "part-as-whole", "corrupted", "range-ignored")
    with FaultProxy(origin.url, [Fault(kind) for kind in kinds]) as proxy:
        assert [get(proxy) for _ in kinds] == [(200, DATA)] * len(kinds)
        assert not proxy.injected


def test_a_byte_is_changed_where_the_fault_says(origin: Origin) -> None:
    with FaultProxy(origin.url, [Fault("corrupted", at=0.25)]) as proxy:
        status, body = get(proxy, RANGE)
    assert status == 206
    assert [n for n, (got, right) in enumerate(zip(body, DATA[10:110], strict=True)) if got != right] == [25]


def test_a_body_is_cut_where_the_fault_says(origin: Origin) -> None:
    cut = FaultProxy(origin.url, [Fault("truncated", at=0.25)])
    with cut as proxy, pytest.raises(http.client.IncompleteRead) as caught:
        get(proxy)
    assert caught.value.partial == DATA[:50]


def test_closing_ends_what_is_silent(origin: Origin) -> None:
    proxy = FaultProxy(origin.url, [Fault("silence")])
    with proxy:
        connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=20)
        connection.request("GET", "/x")
        eventually(lambda: proxy.injected)
    with pytest.raises(ConnectionError):
        connection.getresponse()
    connection.close()


def test_a_server_that_is_away_is_a_bad_gateway() -> None:
    with Origin({}) as gone:
        pass
    with FaultProxy(gone.url) as proxy:
        assert get(proxy)[0] == 502


def test_equal_seeds_are_equal_storms_of_all_kinds() -> None:
    first, again, other = (list(islice(storm(seed, rate=0.5), 2000)) for seed in (1, 1, 2))
    assert first == again != other
    struck = [fault for fault in first if fault]
    assert {fault.kind for fault in struck} == FAULTS.keys()
    assert 800 < len(struck) < 1200


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown fault 'boredom': known are closed, corrupted"):
        Fault("boredom")
