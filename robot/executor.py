"""From chunks of actions to one action a tick. No ROS, no network, no clock: time is an argument."""

from dataclasses import dataclass, replace

import numpy as np

from bridge.messages import ActionChunk


@dataclass
class Counts:
    adopted: int = 0
    executed: int = 0
    late_actions: int = 0  # their tick had passed: the loop overran, or the old chunk covered it
    useless_chunks: int = 0  # came so late that no action was left
    holds: int = 0


class Executor:
    """Executes the first `num_action_chunks` actions of each chunk, one a tick, and holds (None) when they run out.

    When does a chunk start? Its first action is meant for the tick at which it was asked for. Whatever the old chunk
    executed from that tick on, the new one has planned too: so many of its actions are dropped. A tick at which nothing
    was executed (a hold) does not count, for the arm waited and the first action is still the right one. A new
    chunk, and the policy version that made it, takes over only when the old one's executed part has ended.

    Example (3 actions executed, asked for with one left; the new chunk's first action is dropped):
        tick      0   1   2   3   4
        action    a0  a1  a2  b1  b2
        ask               b
    """

    def __init__(self, num_action_chunks: int, prefetch_ticks: int, period_ns: int):
        if num_action_chunks < 1 or prefetch_ticks < 0:
            raise ValueError(f"num_action_chunks {num_action_chunks} must be 1 or more, prefetch_ticks not negative")
        self.num_action_chunks = num_action_chunks
        self.prefetch_ticks = prefetch_ticks
        self.period_ns = period_ns
        self.policy_version = -1
        self.counts = Counts()
        self.clear()

    def clear(self) -> None:
        """Forget every action and what was asked for (intervention, stop)."""
        self._current: ActionChunk | None = None
        self._next = self._end = 0  # of the current chunk: index of the next action, and where its executed part ends
        self._pending: ActionChunk | None = None
        self._waiting = False
        self._executed_since_asked = 0

    @property
    def num_left(self) -> int:
        return max(0, self._end - self._next)

    def wants_chunk(self) -> bool:
        return not self._waiting and self._pending is None and self.num_left <= self.prefetch_ticks

    def asked(self) -> None:
        """A chunk was asked for at this tick, before its action was taken."""
        self._waiting, self._executed_since_asked = True, 0

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
        action = self._current.actions[self._next]
        self._next += 1
        self._executed_since_asked += 1
        self.counts.executed += 1
        return action

    def _adopt(self, tick_ns: int) -> None:
        skipped, chunk = self._executed_since_asked, self._pending
        self._pending = None
        if skipped >= len(chunk.actions):
            self.counts.useless_chunks += 1
            return
        self._current = replace(chunk, start_ns=tick_ns - skipped * self.period_ns)
        self._next, self._end = skipped, min(len(chunk.actions), skipped + self.num_action_chunks)
        self.policy_version = chunk.policy_version
        self.counts.adopted += 1
        self.counts.late_actions += skipped

    def _drop_late(self, tick_ns: int) -> None:
        if self._current is None:
            return
        due = round((tick_ns - self._current.start_ns) / self.period_ns)
        late = min(due, self._end) - self._next
        if late > 0:
            self._next += late
            self.counts.late_actions += late
