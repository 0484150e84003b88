import numpy as np
import pytest

from bridge.messages import ActionChunk
from robot.executor import Executor

MS = 1_000_000
PERIOD_NS = 100 * MS


def chunk(tag: int, horizon: int = 8, version: int = 1) -> ActionChunk:
    """Action i of the chunk has tag + i / 100 in its first number."""
    actions = np.zeros((horizon, 7), np.float32)
    actions[:, 0] = tag + np.arange(horizon) / 100
    return ActionChunk(actions, start_ns=0, period_ns=PERIOD_NS, policy_version=version)


def play(executor: Executor, first_tick: int, num_ticks: int) -> list[float | None]:
    """What is executed at consecutive ticks; chunks are not answered."""
    out = []
    for n in range(first_tick, first_tick + num_ticks):
        action = executor.tick(n * PERIOD_NS)
        out.append(None if action is None else round(float(action[0]), 2))
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
    executor.load(chunk(20))
    assert play(executor, 3, 4) == [20.01, 20.02, 20.03, None]
    assert executor.counts.late_actions == 1


def test_a_hold_drops_nothing_because_the_arm_waited():
    executor = Executor(2, 0, PERIOD_NS)
    executor.asked()
    executor.load(chunk(10))
    assert play(executor, 0, 2) == [10.0, 10.01]
    executor.asked()  # slow policy: three ticks pass
    assert play(executor, 2, 3) == [None, None, None]
    executor.load(chunk(20))
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
    executor.load(chunk(20, version=2))
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


def test_bad_settings():
    with pytest.raises(ValueError, match="num_action_chunks"):
        Executor(0, 0, PERIOD_NS)
