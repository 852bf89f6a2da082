"""The circuit breaker: when it opens, who probes, and that it never lets two probe at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modelfs.fetch.breaker import FAILURES, FIRST, LONGEST, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(clock: Clock, **more: Any) -> Breaker:
    breaker = Breaker(clock, lambda low, high: high, **more)
    for _ in range(FAILURES):
        assert breaker.admits
        breaker.failed()
    return breaker


def test_it_opens_after_failures_in_a_row_only(clock: Clock) -> None:
    breaker = Breaker(clock)
    for _ in range(10 * FAILURES):
        breaker.failed()
        breaker.succeeded()
    assert breaker.state == "closed"
    assert not opened(clock).admits


def test_one_request_probes_and_its_answer_closes(clock: Clock) -> None:
    states: list[str] = []
    breaker = opened(clock, changed=states.append)
    clock.now += FIRST - 0.01
    assert not breaker.admits
    clock.now += 0.01
    assert breaker.admits
    assert breaker.begin()
    assert not breaker.admits
    assert not breaker.begin()
    breaker.succeeded()
    assert breaker.admits
    assert states == ["open", "half-open", "closed"]


def test_each_failed_probe_doubles_the_pause(clock: Clock) -> None:
    breaker = opened(clock)
    for seconds in (FIRST, 2 * FIRST, 4 * FIRST):
        clock.now += seconds
        assert breaker.begin()
        breaker.failed()
        clock.now += seconds
        assert not breaker.admits
        clock.now -= seconds
    for _ in range(10):
        clock.now += LONGEST
        assert breaker.begin()
        breaker.failed()
    clock.now += LONGEST
    assert breaker.admits
    breaker.succeeded()
    for _ in range(FAILURES):
        breaker.failed()
    clock.now += FIRST
    assert breaker.admits


def test_a_probe_that_was_given_up_is_followed_by_another(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += FIRST
    probe = breaker.begin()
    breaker.released(probe=False)
    assert not breaker.admits
    breaker.released(probe=probe)
    assert breaker.admits


def test_when_it_admits_again_is_left_to_chance(clock: Clock) -> None:
    bounds: list[tuple[float, float]] = []

    def spread(low: float, high: float) -> float:
        bounds.append((low, high))
        return low

    breaker = Breaker(clock, spread)
    for _ in range(FAILURES):
        breaker.failed()
    assert bounds == [(FIRST / 2, FIRST)]
    clock.now += FIRST / 2
    assert breaker.admits


class Requests(RuleBasedStateMachine):
    """Any number of requests of which each ends in some way, some of them although nobody admitted them."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(self.clock, lambda low, high: high)
        self.probes = 0
        self.under_way: list[bool] = []
        self.waited = 0.0

    @rule(seconds=st.floats(0, 2 * LONGEST))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def begin(self) -> None:
        admitted, state = self.breaker.admits, self.breaker.state
        probe = self.breaker.begin()
        assert probe == (admitted and state == "open")
        self.under_way.append(probe)
        self.probes += probe

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "released"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        probe = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        if outcome == "released":
            self.breaker.released(probe=probe)
        else:
            getattr(self.breaker, outcome)()
        if outcome == "succeeded":
            assert self.breaker.state == "closed"
        if probe or self.breaker.state != "half-open":  # a late answer of another decided as well
            self.probes = 0
            self.under_way = [False] * len(self.under_way)

    @invariant()
    def one_probe_at_a_time(self) -> None:
        assert self.probes <= 1
        assert (self.breaker.state == "half-open") == (self.probes == 1)
        assert not (self.breaker.state == "half-open" and self.breaker.admits)

    @invariant()
    def it_is_never_closed_for_good(self) -> None:
        later = self.clock.now
        self.clock.now += LONGEST
        assert self.breaker.admits or self.breaker.state == "half-open"
        self.clock.now = later


TestRequests = Requests.TestCase
