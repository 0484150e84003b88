import numpy as np
import pytest

from bridge.messages import ActionChunk
from robot.executor import Executor

MS = 1_000_000
PERIOD_NS = 100 * MS


def chunk(tag: int, horizon: int = 8, version: int = 1, seen_at: float = 0) -> ActionChunk:
    """Action i of the chunk has tag + i / 100 as its gripper number and moves nothing; seen at that tick."""
    actions = np.zeros((horizon, 7), np.float32)
    actions[:, 6] = tag + np.arange(horizon) / 100
    return ActionChunk(actions, start_ns=round(seen_at * PERIOD_NS), period_ns=PERIOD_NS, policy_version=version)


def moving(steps_m: list[float], seen_at: float) -> ActionChunk:
    """Moves along x by these steps."""
    actions = np.zeros((len(steps_m), 7), np.float32)
    actions[:, 0] = steps_m
    return ActionChunk(actions, start_ns=round(seen_at * PERIOD_NS), period_ns=PERIOD_NS, policy_version=1)


def play(executor: Executor, first_tick: int, num_ticks: int) -> list[float | None]:
    """What is executed at consecutive ticks; chunks are not answered."""
    out = []
    for n in range(first_tick, first_tick + num_ticks):
        action = executor.tick(n * PERIOD_NS)
        out.append(None if action is None else round(float(action[6]), 2))
    return out


def test_executes_the_first_actions_then_holds():
    executor = Executor(3, 0, PERIOD_NS)
    assert executor.wants_chunk()
    executor.asked()
    assert not executor.wants_chunk()  # one request at a time
    executor.load(chunk(10))
    assert play(executor, 0, 5) == [10.0, 10.01, 10.02, None, None]  # never the last delta again
    assert executor.counts.holds == 2


def test_the_new_chunk_drops_what_the_old_one_covered():
    executor = Executor(3, 1, PERIOD_NS)
    executor.asked()
    executor.load(chunk(10))
    assert play(executor, 0, 2) == [10.0, 10.01]
    assert executor.wants_chunk()  # one action left
    executor.asked()
    assert play(executor, 2, 1) == [10.02]  # executed after the picture was taken
    executor.load(chunk(20, seen_at=2))
    assert play(executor, 3, 4) == [20.01, 20.02, 20.03, None]
    assert executor.counts.late_actions == 1


def test_a_hold_drops_nothing_because_the_arm_waited():
    executor = Executor(2, 0, PERIOD_NS)
    executor.asked()
    executor.load(chunk(10))
    assert play(executor, 0, 2) == [10.0, 10.01]
    executor.asked()  # slow policy: three ticks pass
    assert play(executor, 2, 3) == [None, None, None]
    executor.load(chunk(20, seen_at=2))
    assert play(executor, 5, 2) == [20.0, 20.01]


def test_missed_ticks_drop_their_actions():
    executor = Executor(4, 0, PERIOD_NS)
    executor.asked()
    executor.load(chunk(10))
    assert play(executor, 0, 1) == [10.0]
    assert play(executor, 3, 2) == [10.03, None]  # the loop overran ticks 1 and 2
    assert executor.counts.late_actions == 2


def test_a_chunk_waits_for_the_boundary_and_brings_its_version_then():
    executor = Executor(3, 2, PERIOD_NS)
    executor.asked()
    executor.load(chunk(10, version=1))
    assert play(executor, 0, 1) == [10.0]
    executor.asked()
    executor.load(chunk(20, version=2, seen_at=1))
    assert not executor.wants_chunk()
    assert play(executor, 1, 2) == [10.01, 10.02]
    assert executor.policy_version == 1
    assert play(executor, 3, 1) == [20.02]
    assert executor.policy_version == 2


def test_a_chunk_with_nothing_left_is_dropped_and_asked_for_again():
    executor = Executor(3, 3, PERIOD_NS)
    executor.asked()
    executor.load(chunk(10, horizon=3))
    executor.asked()
    play(executor, 0, 3)
    executor.load(chunk(20, horizon=3))
    assert play(executor, 3, 1) == [None]
    assert executor.counts.useless_chunks == 1
    assert executor.wants_chunk()


def test_giving_up_and_clearing():
    executor = Executor(3, 0, PERIOD_NS)
    executor.asked()
    executor.gave_up()
    assert executor.wants_chunk()
    executor.load(chunk(10))  # an answer after giving up
    assert play(executor, 0, 1) == [None]
    executor.asked()
    executor.load(chunk(20))
    executor.tick(PERIOD_NS)
    executor.clear()
    assert play(executor, 2, 1) == [None]


def test_an_old_picture_makes_no_overshoot():
    """The policy always wants to stop at x = 0.09. Its second look is half a tick old when it is used for tick 2, while
    the arm moves by 0.03 a tick: the target has passed 0.06, the picture saw 0.045."""
    executor = Executor(2, 0, PERIOD_NS)
    executor.asked()
    executor.load(moving([0.03] * 3 + [0.0] * 5, seen_at=0))
    x_m = sum(executor.tick(n * PERIOD_NS)[0] for n in range(2))
    assert x_m == pytest.approx(0.06)
    executor.asked()
    executor.load(moving([0.03, 0.015] + [0.0] * 6, seen_at=1.5))  # from 0.045 on
    x_m += sum(executor.tick(n * PERIOD_NS)[0] for n in range(2, 4))
    assert x_m == pytest.approx(0.09, abs=1e-6)


def test_a_change_of_mind_is_made_up_over_the_executed_part():
    """By tick 2 the old chunk has gone 0.02 since the picture at tick 1; the new one would have gone -0.02 in that time
    and then stays: its two executed actions take the target back by 0.04."""
    executor = Executor(2, 0, PERIOD_NS)
    executor.asked()
    executor.load(moving([0.02] * 8, seen_at=0))
    for n in range(2):
        executor.tick(n * PERIOD_NS)
    executor.asked()
    executor.load(moving([-0.02] + [0.0] * 7, seen_at=1))
    steps_m = [executor.tick(n * PERIOD_NS)[0] for n in range(2, 4)]
    assert steps_m == pytest.approx([-0.02, -0.02])


def test_bad_settings():
    with pytest.raises(ValueError, match="num_action_chunks"):
        Executor(0, 0, PERIOD_NS)
