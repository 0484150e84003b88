"""From chunks of actions to one action a tick. No ROS, no network, no clock: time is an argument."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from bridge.messages import ActionChunk

MEMORY_TICKS = 100  # executed actions that a late chunk may have to be compared with


@dataclass
class Counts:
    executed: int = 0
    late_actions: int = 0  # their tick had passed: the loop overran, or the old chunk covered it
    useless_chunks: int = 0  # came so late that no action was left
    holds: int = 0


class Executor:
    """Executes `num_action_chunks` actions of each chunk, one a tick, and holds (None) when they run out.

    When does a chunk start? Its first action is meant for the moment of its observation (`start_ns`, when the picture
    was exposed), which lies before the tick that asked and off the grid. Whatever was executed since that moment, the
    new chunk has planned too: that much time of it is passed over, to the fraction of an action. Where the
    old chunk led elsewhere than the new one would have, the difference is made up evenly over the new one's
    executed part, so that its end is where the policy wants it: without this a moving arm overshoots at every
    change of chunk, by its speed times the age of the picture. A tick at which nothing was executed (a hold) does not
    count, for the arm waited. A new chunk, and the policy version that made it, takes over only when the old one's
    executed part has ended.

    Example (3 actions executed, asked at tick 2 with a picture of that moment; b's first action is passed over):
        tick      0   1   2   3   4
        action    a0  a1  a2  b1  b2
    """

    def __init__(self, num_action_chunks: int, prefetch_ticks: int, period_ns: int):
        if num_action_chunks < 1 or prefetch_ticks < 0:
            raise ValueError(f"num_action_chunks {num_action_chunks} must be 1 or more, prefetch_ticks not negative")
        self.num_action_chunks = num_action_chunks
        self.prefetch_ticks = prefetch_ticks
        self.period_ns = period_ns
        self.policy_version = -1
        self.counts = Counts()
        self._executed: deque[tuple[int, np.ndarray]] = deque(maxlen=MEMORY_TICKS)  # tick, action [7]
        self.clear()

    def clear(self) -> None:
        """Forget every action and what was asked for (intervention, stop)."""
        self._plan = np.zeros((0, 7))  # the current chunk's executed part, one row a tick from `_plan_ns` on
        self._plan_ns = self._next = 0
        self._pending: ActionChunk | None = None
        self._waiting = False
        self._executed.clear()

    @property
    def num_left(self) -> int:
        return max(0, len(self._plan) - self._next)

    def wants_chunk(self) -> bool:
        return not self._waiting and self._pending is None and self.num_left <= self.prefetch_ticks

    def asked(self) -> None:
        """A chunk was asked for."""
        self._waiting = True

    def gave_up(self) -> None:
        """The chunk that was asked for will not come; `wants_chunk` may ask again."""
        self._waiting = False

    def load(self, chunk: ActionChunk) -> None:
        """The answer. Ignored when nobody waits for it any more."""
        if self._waiting:
            self._waiting, self._pending = False, chunk

    def tick(self, tick_ns: int) -> np.ndarray | None:
        """The action [7] of this tick, None to hold. Ticks lie on a grid of `period_ns`."""
        self._drop_late(tick_ns)
        if self.num_left == 0 and self._pending is not None:
            self._adopt(tick_ns)
        if self.num_left == 0:
            self.counts.holds += 1
            return None
        action = self._plan[self._next]
        self._next += 1
        self._executed.append((tick_ns, action))
        self.counts.executed += 1
        return action

    def _adopt(self, tick_ns: int) -> None:
        chunk, self._pending = self._pending, None
        actions = np.asarray(chunk.actions, dtype=np.float64)
        passed, moved = self._since(chunk.start_ns, tick_ns)
        whole = int(passed)
        share = passed - whole
        num = min(len(actions) - whole - (share > 0), self.num_action_chunks)
        if num < 1:
            self.counts.useless_chunks += 1
            return
        plan = actions[whole : whole + num].copy()
        if share > 0:  # off the grid: the rest of one action and the beginning of the next
            plan[:, :6] = (1 - share) * plan[:, :6] + share * actions[whole + 1 : whole + num + 1, :6]
        planned = actions[:whole, :6].sum(axis=0) + share * actions[whole, :6]
        plan[:, :6] += (planned - moved) / num
        self._plan, self._plan_ns, self._next = plan, tick_ns, 0
        self.policy_version = chunk.policy_version
        self.counts.late_actions += whole

    def _since(self, start_ns: int, tick_ns: int) -> tuple[float, np.ndarray]:
        """Periods executed between two times, and the motion [6] that was asked for in them (small angles add)."""
        passed, moved = 0.0, np.zeros(6)
        for begin_ns, action in self._executed:
            overlap_ns = min(begin_ns + self.period_ns, tick_ns) - max(begin_ns, start_ns)
            if overlap_ns > 0:
                passed += overlap_ns / self.period_ns
                moved += overlap_ns / self.period_ns * action[:6]
        return passed, moved

    def _drop_late(self, tick_ns: int) -> None:
        late = min(round((tick_ns - self._plan_ns) / self.period_ns), len(self._plan)) - self._next
        if late > 0:
            self._next += late
            self.counts.late_actions += late
