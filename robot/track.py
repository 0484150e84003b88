"""One stream of stamped samples, and what lies between two of them."""

import bisect
from collections.abc import Callable
from typing import Any


class Track:
    """Samples of one stream in the order of their stamps; `blend(a, b, share)` gives what lies between two of them."""

    def __init__(self, blend: Callable[[Any, Any, float], Any], keep: int = 2048):
        self._blend, self._keep = blend, keep
        self.stamps_ns: list[int] = []
        self._values: list[Any] = []

    def add(self, stamp_ns: int, value: Any) -> None:
        """A sample that is not newer than the last one is a repetition and left out."""
        if self.stamps_ns and stamp_ns <= self.stamps_ns[-1]:
            return
        self.stamps_ns.append(stamp_ns)
        self._values.append(value)
        if len(self.stamps_ns) > 2 * self._keep:
            del self.stamps_ns[: self._keep], self._values[: self._keep]

    @property
    def newest_ns(self) -> int:
        return self.stamps_ns[-1] if self.stamps_ns else 0

    def begins_by(self, stamp_ns: int) -> bool:
        return bool(self.stamps_ns) and self.stamps_ns[0] <= stamp_ns

    def reaches(self, stamp_ns: int) -> bool:
        return bool(self.stamps_ns) and self.stamps_ns[-1] >= stamp_ns

    def at(self, stamp_ns: int) -> Any:
        """Interpolated; before the first and after the last sample that sample."""
        after = bisect.bisect_left(self.stamps_ns, stamp_ns)
        if after == 0:
            return self._values[0]
        if after == len(self.stamps_ns):
            return self._values[-1]
        start, end = self.stamps_ns[after - 1], self.stamps_ns[after]
        return self._blend(self._values[after - 1], self._values[after], (stamp_ns - start) / (end - start))


def linear(a: Any, b: Any, share: float) -> Any:
    return (1 - share) * a + share * b


def hold(a: Any, b: Any, share: float) -> Any:
    """A command is in effect from its own stamp until the next one's."""
    return b if share >= 1 else a
