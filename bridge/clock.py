"""Pacing on a fixed grid of the monotonic clock, for loops that ROS does not pace.

Deadlines are absolute (start + n * period): a late tick does not shift the ones after it. Sleeping is left to the
kernel's absolute timer, nothing is polled.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

OVERRUNS = ("skip", "catch_up")


@dataclass(frozen=True)
class Tick:
    """dt_s: measured since the last tick; late_s: how far past its deadline this one began; skipped: whole periods that
    were dropped before it."""

    index: int
    dt_s: float
    late_s: float
    skipped: int


class Grid:
    """`wait()` returns at the next grid point.

    overrun: what happens after a tick that took longer than a period. `skip` begins the newest grid point that has
    passed at once and drops the ones before it; `catch_up` runs them all back to back.
    """

    def __init__(self, period_s: float, overrun: str = "skip"):
        if period_s <= 0:
            raise ValueError(f"period_s {period_s}: more than 0")
        if overrun not in OVERRUNS:
            raise ValueError(f"overrun {overrun!r}: allowed are {', '.join(OVERRUNS)}")
        self.period_s, self.overrun = period_s, overrun
        self._start_s = self._last_s = time.monotonic()
        self._index = 0
        self.late_s: deque[float] = deque(maxlen=10_000)
        self._sections_s: dict[str, deque[float]] = {}

    def wait(self) -> Tick:
        now_s = time.monotonic()
        due = self._index + 1
        newest = int((now_s - self._start_s) / self.period_s)  # the last grid point that has passed
        self._index = max(due, newest) if self.overrun == "skip" else due
        deadline_s = self._start_s + self._index * self.period_s
        if deadline_s > now_s:
            time.sleep(deadline_s - now_s)
        now_s, last_s = time.monotonic(), self._last_s
        self._last_s = now_s
        self.late_s.append(now_s - deadline_s)
        return Tick(self._index, now_s - last_s, now_s - deadline_s, self._index - due)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time a named part of the cycle: `with grid.section("observe"): ...`."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._sections_s.setdefault(name, deque(maxlen=10_000)).append(time.perf_counter() - start_s)

    def stats(self) -> dict[str, float]:
        """p50 and p99 of lateness and of each section, in milliseconds."""
        series = {"late": self.late_s} | self._sections_s
        return {
            f"{name}_p{q}_ms": float(np.percentile(values, q)) * 1e3
            for name, values in series.items()
            if values
            for q in (50, 99)
        }
