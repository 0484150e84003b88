"""From streams of pictures and arm states to one aligned observation."""

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from bridge import pose
from bridge.errors import StaleObservation
from bridge.messages import Observation

REFERENCE_CAMERA = "third_person"


class Ring:
    """The newest stamped values of one source, in time order. Late and repeated stamps are dropped and counted."""

    def __init__(self, length: int):
        self.stamps_ns: deque[int] = deque(maxlen=length)
        self.values: deque[Any] = deque(maxlen=length)
        self.num_out_of_order = 0

    def add(self, stamp_ns: int, value: Any) -> None:
        if self.stamps_ns and stamp_ns <= self.stamps_ns[-1]:
            self.num_out_of_order += 1
            return
        self.stamps_ns.append(stamp_ns)
        self.values.append(value)

    def around(self, stamp_ns: int) -> tuple[int, int, float]:
        """Indices before and after a time, and the share of the way between them; the ends hold their value."""
        after = bisect_left(self.stamps_ns, stamp_ns)
        if after == 0:
            return 0, 0, 0.0
        if after == len(self.stamps_ns):
            return after - 1, after - 1, 0.0
        before = after - 1
        share = (stamp_ns - self.stamps_ns[before]) / (self.stamps_ns[after] - self.stamps_ns[before])
        return before, after, share

    def nearest(self, stamp_ns: int) -> int:
        before, after, share = self.around(stamp_ns)
        return after if share > 0.5 else before


class Observer:
    """Observations at the time of the newest picture of the reference camera; everything else is brought to that time.

    `decode` makes uint8 [H, W, 3] of what `add_picture` was given, for the few pictures that a policy really sees.
    """

    def __init__(self, cameras: list[str], max_age_ns: int, decode: Callable[[Any], np.ndarray] = np.asarray):
        if not cameras:
            raise ValueError("an observer needs at least one camera")
        self.reference = REFERENCE_CAMERA if REFERENCE_CAMERA in cameras else cameras[0]
        self.max_age_ns = max_age_ns
        self._decode = decode
        self._pictures = {name: Ring(8) for name in cameras}
        self._poses, self._openings = Ring(120), Ring(120)
        self._lock = threading.Lock()  # what is added between the search for an index and its use moves all of them

    def add_picture(self, camera: str, stamp_ns: int, picture: Any) -> None:
        with self._lock:
            self._pictures[camera].add(stamp_ns, picture)

    def add_pose(self, stamp_ns: int, T_base_tcp: np.ndarray) -> None:
        with self._lock:
            self._poses.add(stamp_ns, T_base_tcp)

    def add_opening(self, stamp_ns: int, opening_m: float) -> None:
        with self._lock:
            self._openings.add(stamp_ns, opening_m)

    def read(self, now_ns: int, instruction: str) -> Observation:
        """Raises StaleObservation when a source is missing, too old, or too far from the reference picture in time."""
        with self._lock:
            sources = self._pictures | {"tcp_pose": self._poses, "gripper": self._openings}
            if silent := [name for name, ring in sources.items() if not ring.stamps_ns]:
                raise StaleObservation(f"nothing yet from {', '.join(silent)}")
            stamp_ns = self._pictures[self.reference].stamps_ns[-1]
            age_ns = {name: now_ns - ring.stamps_ns[-1] for name, ring in sources.items()}
            for name, age in age_ns.items():
                if age > self.max_age_ns:
                    raise StaleObservation(
                        f"{name} is {age / 1e6:.0f} ms old, allowed are {self.max_age_ns / 1e6:.0f} ms"
                    )
            taken = {name: self._picture(name, stamp_ns) for name in self._pictures}
            before, after, share = self._poses.around(stamp_ns)
            T_base_tcp = pose.interpolate(self._poses.values[before], self._poses.values[after], share)
            before, after, share = self._openings.around(stamp_ns)
            opening_m = (1 - share) * self._openings.values[before] + share * self._openings.values[after]
        images = {name: self._decode(picture) for name, picture in taken.items()}
        return Observation(images, pose.state_vector(T_base_tcp, opening_m), instruction, stamp_ns, age_ns)

    def _picture(self, camera: str, stamp_ns: int) -> Any:
        ring = self._pictures[camera]
        index = ring.nearest(stamp_ns)
        if abs(ring.stamps_ns[index] - stamp_ns) > self.max_age_ns:
            apart_ms = abs(ring.stamps_ns[index] - stamp_ns) / 1e6
            raise StaleObservation(f"{camera} and {self.reference} are {apart_ms:.0f} ms apart")
        return ring.values[index]
