import sys
import threading

import numpy as np
import pytest

from bridge import pose
from bridge.embodiment import Embodiment
from bridge.errors import BridgeTimeout
from bridge.messages import ActionChunk
from robot.config import RuntimeConfig
from robot.observer import Observer
from robot.runtime import GridLoop, Runtime

MS = 1_000_000
PERIOD_NS = 100 * MS


class ScriptedPolicy:
    """Answers each request at the next poll with a chunk that stands still and counts in its gripper number."""

    def __init__(self):
        self.requests = 0
        self.is_dead = False
        self._answers = []

    def submit(self, observation, deadline_s):
        self.requests += 1
        actions = np.zeros((8, 7), np.float32)
        actions[:, 6] = self.requests + np.arange(8) / 100
        chunk = ActionChunk(actions, observation.stamp_ns, PERIOD_NS, policy_version=1)
        self._answers.append(BridgeTimeout("no chunk after 500 ms") if self.is_dead else chunk)
        return self.requests

    def poll(self):
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, BridgeTimeout):
            raise answer
        return answer


class World:
    """A runtime on a clock that a test moves, with fresh observations."""

    def __init__(self, policy=None, **settings):
        self.now_ns, self.sent = 10_000 * MS, []
        self.observer = Observer(["third_person"], 200 * MS)
        self.policy = policy
        config = RuntimeConfig(autostart=True, num_action_chunks=3, prefetch_ticks=1, **settings)

        def publish(action, stamp_ns, source):
            self.sent.append((round(float(action[0] + action[6]), 2), stamp_ns, source))

        embodiment = Embodiment(instructions=["do it"])
        self.runtime = Runtime(config, embodiment, self.observer, policy, publish, lambda: self.now_ns)

    def tick(self, observe=True):
        self.now_ns += PERIOD_NS
        if observe:
            self.observer.add_picture("third_person", self.now_ns - 20 * MS, np.zeros((2, 2, 3), np.uint8))
            self.observer.add_pose(self.now_ns - 20 * MS, np.eye(4))
            self.observer.add_opening(self.now_ns - 20 * MS, 0.08)
        return self.runtime.tick(self.now_ns)


def test_chunks_follow_each_other_without_a_gap():
    world = World(ScriptedPolicy())
    sources = [world.tick().source for _ in range(8)]
    assert sources == ["hold"] + ["policy"] * 7  # the first tick asks
    # Each later chunk was asked for with one action left, so its own first action is dropped.
    assert [a for a, _, _ in world.sent] == [1.0, 1.01, 1.02, 2.01, 2.02, 2.03, 3.01]
    assert np.diff([stamp for _, stamp, _ in world.sent]).tolist() == [PERIOD_NS] * 6
    assert world.runtime.figures()["policy_versions"] == [1]


def test_a_command_does_not_wait_for_the_pictures_of_a_request():
    world, order = World(ScriptedPolicy()), []
    world.tick()
    submit, publish = world.policy.submit, world.runtime._publish
    world.policy.submit = lambda *request: (order.append("ask"), submit(*request))[1]
    world.runtime._publish = lambda *command: (order.append("command"), publish(*command))
    for _ in range(4):
        world.tick()
    assert order == ["command", "command", "command", "ask", "command"]  # asked with one action left
    assert world.runtime.figures()["command_late_ms"] == [0.0] * 4


def test_figures_are_asked_for_while_the_loop_adds_to_them():
    """By the node's own thread: an error there would end the node in the middle of a motion."""
    world, closing = World(), threading.Event()
    figures = world.runtime._figures
    figures.command_late_ms.extend([0.0] * 2000)
    figures.chunk_latency_ms.extend([0.0] * 2000)

    def add():
        while not closing.is_set():
            figures.command_late_ms.append(1.0)
            figures.chunk_latency_ms.append(1.0)

    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=add)
    thread.start()
    try:
        for _ in range(50):
            world.runtime.figures()
    finally:
        closing.set()
        thread.join()
        sys.setswitchinterval(before_s)


def test_a_dead_policy_server_means_hold_and_its_return_means_motion():
    policy = ScriptedPolicy()
    world = World(policy)
    for _ in range(3):
        world.tick()
    policy.is_dead = True
    sources = [world.tick().source for _ in range(6)]
    assert sources[-2:] == ["hold", "hold"]
    assert "no chunk after 500 ms" in world.runtime.last.reason
    policy.is_dead = False
    assert "policy" in [world.tick().source for _ in range(3)]
    assert world.runtime.figures()["errors"] >= 1


def test_old_observations_are_not_shown_to_the_policy():
    policy = ScriptedPolicy()
    world = World(policy)
    world.tick()
    world.now_ns += 400 * MS
    for _ in range(6):
        tick = world.tick(observe=False)
    assert policy.requests == 1
    assert tick.source == "hold"
    assert "stale observation: third_person" in tick.reason
    world.tick()
    assert policy.requests == 2


def test_a_person_takes_over_and_gives_back():
    world = World(ScriptedPolicy(), teleop_timeout_s=0.05)
    for _ in range(3):
        world.tick()
    world.runtime.teleop.add([0.01, 0, 0, 0, 0, 0, -1])
    world.runtime.teleop.add([0.02, 0, 0, 0, 0, 0, 1])
    assert world.tick().source == "teleop"
    assert world.sent[-1] == (1.03, world.now_ns, "teleop")  # 3 cm and an open hand
    num_sent = len(world.sent)
    assert world.tick().source == "teleop"  # still holding the device: the policy stays quiet
    assert len(world.sent) == num_sent
    threading.Event().wait(0.06)
    sources = [world.tick().source for _ in range(2)]
    assert sources == ["hold", "policy"]  # asks anew: the old chunk was about another world
    assert world.sent[-1][0] == pytest.approx(2.0)


def test_a_fault_of_the_arm_ends_the_run_until_somebody_starts_it():
    world = World(ScriptedPolicy())
    for _ in range(3):
        world.tick()
    world.runtime.arm_state("FAULT")
    assert world.tick().source == "hold"
    world.runtime.arm_state("IDLE")
    assert world.tick().source == "hold"
    world.runtime.start()
    assert [world.tick().source for _ in range(2)] == ["hold", "policy"]


def test_without_a_policy_only_teleop_moves():
    world = World(None)
    assert world.tick().source == "hold"
    world.runtime.teleop.add([0.01] + [0] * 6)
    assert world.tick().source == "teleop"
    with pytest.raises(ValueError, match="finite"):
        world.runtime.teleop.add([np.nan] + [0] * 6)


def test_teleop_actions_that_would_be_too_fast_together_take_a_tick_each():
    world = World(None, teleop_speed_m_s=0.45)
    for _ in range(3):
        world.runtime.teleop.add([0.03] + [0] * 6)
    assert [world.tick().source for _ in range(3)] == ["teleop"] * 3
    assert [a for a, _, _ in world.sent] == [0.03] * 3


def test_composed_actions_move_the_target_as_one_after_the_other():
    a, b = np.array([0.01, 0, 0.02, 0.03, 0, 0.05, 1]), np.array([0, 0.01, 0, 0, 0.04, -0.02, -1])
    start = pose.pose(np.array([0.4, 0.1, 0.3]), pose.matrix_from_rpy([np.pi, 0.1, 0.7]))
    both = pose.integrate(start, pose.compose([a, b]))
    assert np.allclose(both, pose.integrate(pose.integrate(start, a), b), atol=1e-12)
    assert pose.compose([a, b])[6] == -1


class SteppedClock:
    """Sleeping takes exactly as long as asked, plus what the test adds."""

    def __init__(self):
        self.time_ns = 12_345 * MS
        self.extra_ns = 0

    def now_ns(self):
        return self.time_ns

    def sleep_until(self, until_ns, closing):
        self.time_ns = max(self.time_ns, until_ns) + self.extra_ns
        return not closing.is_set()


def test_the_grid_is_absolute_and_an_overrun_costs_only_its_own_ticks():
    clock, closing, ticks = SteppedClock(), threading.Event(), []

    def tick(tick_ns):
        ticks.append(tick_ns // MS)
        if len(ticks) == 3:
            clock.time_ns += 250 * MS  # covers two more ticks
        if len(ticks) == 6:
            closing.set()

    clock.extra_ns = 2 * MS
    loop = GridLoop(PERIOD_NS, tick, clock)
    loop.run(closing)
    assert ticks == [12_400, 12_500, 12_600, 12_900, 13_000, 13_100]
    assert loop.num_overruns == 2
    assert loop.figures()["tick_jitter_p50_ms"] == pytest.approx(2.0)


def test_simulated_time_that_begins_anywhere_makes_no_tick_late():
    clock, closing, late_ms = SteppedClock(), threading.Event(), []
    begins_ns, clock.time_ns = 1_130 * MS, 0
    sleep_until = clock.sleep_until
    clock.sleep_until = lambda until_ns, closing: sleep_until(max(until_ns, begins_ns), closing)
    loop = GridLoop(PERIOD_NS, lambda tick_ns: (late_ms.append(clock.time_ns - tick_ns), closing.set()), clock)
    loop.run(closing)
    assert late_ms == [0]
