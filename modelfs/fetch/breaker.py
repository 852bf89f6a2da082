"""A circuit breaker: when to leave a store alone that fails, and who finds out whether it is back.

A small state machine without I/O (https://martinfowler.com/bliki/CircuitBreaker.html)::

    closed ──`FAILURES` in a row──▶ open ──after a while, the next request is the probe──▶ half-open
       ▲                             ▲                                                        │
       └──────── an answer ──────────┼────────────────────────────────────────────────────────┤
                                     └──────────────────── the probe fails ───────────────────┘

Each time the probe fails the next one waits twice as long, up to `LONGEST`. How long exactly is left to
chance: a thousand nodes shall not come back at the same moment.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "half-open", "open"]

FAILURES = 5
"""Failures in a row that open a breaker: more than one connection that breaks, less than all of a load."""

FIRST = 1.0
"""Seconds for which it stays open the first time, at most; at least half of it."""

LONGEST = 60.0
"""The most that this grows to."""


class Breaker:
    """The breaker of one store; it forbids nothing, whoever has another store to go to asks it first.

    Args:
        clock: returns seconds that never go back.
        spread: returns a number between its two arguments, by chance.
        changed: called with the new state.

    """

    def __init__(
        self,
        clock: Callable[[], float],
        spread: Callable[[float, float], float] = random.uniform,
        changed: Callable[[State], None] = lambda state: None,
    ) -> None:
        self._clock = clock
        self._spread = spread
        self._changed = changed
        self._failures = 0
        self._seconds = FIRST
        self._until = -math.inf
        self.state: State = "closed"

    @property
    def admits(self) -> bool:
        """Whether a request may be sent to the store now by who can go elsewhere."""
        return self.state == "closed" or (self.state == "open" and self._clock() >= self._until)

    def begin(self) -> bool:
        """Note that a request is sent; return whether it is the probe, to be told to `released`."""
        if self.state == "open" and self.admits:
            self._become("half-open")
            return True
        return False

    def succeeded(self) -> None:
        """Note that the store answered a request, whichever: it is back."""
        self._failures = 0
        self._seconds = FIRST
        self._become("closed")

    def failed(self) -> None:
        """Note that a request failed because of the store. Those that began before it opened do not count."""
        self._failures += 1
        if self.state == "half-open":
            self._seconds = min(LONGEST, 2 * self._seconds)
        elif self.state == "open" or self._failures < FAILURES:
            return
        self._until = self._clock() + self._spread(self._seconds / 2, self._seconds)
        self._become("open")

    def released(self, *, probe: bool) -> None:
        """Note that a request was given up before anybody knew: if it was the probe, the next one is."""
        if probe and self.state == "half-open":
            self._become("open")

    def _become(self, state: State) -> None:
        if state != self.state:
            self.state = state
            self._changed(state)
