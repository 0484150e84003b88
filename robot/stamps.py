"""Another device's clock on ours."""


class StampMap:
    """A device's milliseconds as nanoseconds of the robot's clock.

    The difference of the two clocks is smoothed, for each reading arrives with jitter; stamps never go back.
    """

    def __init__(self):
        self._offset_ns: float | None = None
        self._last_ns = 0

    def stamp_ns(self, device_ms: float, now_ns: int) -> int:
        """`now_ns`: the robot's clock when the reading arrived."""
        offset = now_ns - device_ms * 1e6
        if self._offset_ns is None or abs(offset - self._offset_ns) > 50e6:  # first, or the device was restarted
            self._offset_ns = offset
        self._offset_ns += 0.02 * (offset - self._offset_ns)
        self._last_ns = max(self._last_ns + 1, int(device_ms * 1e6 + self._offset_ns))
        return self._last_ns
