import os
import subprocess
import sys
import threading

import pytest
import rclpy
from rclpy.parameter import Parameter
from rclpy.time import Time

from robot import clock

S = 1_000_000_000
CLASSES = """
import os, threading
from robot.spin import go_first
before, may = threading.Event(), go_first()
threading.Thread(target=before.wait, daemon=True).start()
print(may, {os.sched_getscheduler(int(thread)) == os.SCHED_RR for thread in os.listdir("/proc/self/task")})
"""


@pytest.fixture
def node():
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=1 + os.getpid() % 100)
    simulated = [Parameter("use_sim_time", value=True)]
    node = rclpy.create_node("sleeper", context=context, parameter_overrides=simulated)
    yield node
    node.destroy_node()
    rclpy.shutdown(context=context)


def test_a_leap_of_simulated_time_ends_a_sleep(node, monkeypatch):
    monkeypatch.setattr(clock, "SLEEP_S", 3600.0)
    robot_clock, closing, slept = clock.RobotClock(node), threading.Event(), []
    node.get_clock().set_ros_time_override(Time(nanoseconds=S))
    sleeper = threading.Thread(target=lambda: slept.append(robot_clock.sleep_until(1000 * S, closing)), daemon=True)
    sleeper.start()
    node.get_clock().set_ros_time_override(Time(nanoseconds=2 * S))
    sleeper.join(0.05)
    assert sleeper.is_alive()
    node.get_clock().set_ros_time_override(Time(nanoseconds=2000 * S))
    sleeper.join(10.0)
    assert slept == [True]
    assert robot_clock.now_ns() >= 2000 * S
    closing.set()
    assert not robot_clock.sleep_until(3000 * S, closing)


def test_a_message_that_came_too_early_makes_no_sleep_a_spin(node, monkeypatch):
    monkeypatch.setattr(clock, "SLEEP_S", 3600.0)
    robot_clock, closing, looks = clock.RobotClock(node), threading.Event(), []
    node.get_clock().set_ros_time_override(Time(nanoseconds=S))
    now_ns = robot_clock.now_ns
    monkeypatch.setattr(robot_clock, "now_ns", lambda: looks.append(1) or now_ns())
    sleeper = threading.Thread(target=robot_clock.sleep_until, args=(1000 * S, closing), daemon=True)
    sleeper.start()
    sleeper.join(0.05)
    robot_clock._reached.set()  # as when it had been on its way for the time before
    sleeper.join(0.2)
    assert len(looks) <= 3
    node.get_clock().set_ros_time_override(Time(nanoseconds=2000 * S))
    sleeper.join(10.0)
    assert not sleeper.is_alive()


def test_a_world_that_begins_anew_while_time_is_asked_for_leaves_no_old_time(node, monkeypatch):
    robot_clock, steady_s, anew = clock.RobotClock(node), clock.time.monotonic, []

    def in_between() -> float:
        if not anew:
            anew.append(threading.Thread(target=node.get_clock().set_ros_time_override, args=(Time(nanoseconds=S),)))
            anew[0].start()
            anew[0].join(0.1)
        return steady_s()

    node.get_clock().set_ros_time_override(Time(nanoseconds=1000 * S))
    monkeypatch.setattr(clock.time, "monotonic", in_between)
    robot_clock.now_ns()
    anew[0].join()
    assert robot_clock.now_ns() < 2 * S


@pytest.mark.parametrize("began", [False, True])
def test_time_that_has_not_begun_or_stands_still_makes_no_sleep_a_spin(node, monkeypatch, began):
    monkeypatch.setattr(clock, "SLEEP_S", 3600.0)
    robot_clock, closing, looks = clock.RobotClock(node), threading.Event(), []
    if began:
        node.get_clock().set_ros_time_override(Time(nanoseconds=S))
    now_ns = robot_clock.now_ns
    monkeypatch.setattr(robot_clock, "now_ns", lambda: looks.append(1) or now_ns())
    until_ns = S + clock.MAX_AHEAD_NS + 1 if began else 1  # a nanosecond after where time stops
    sleeper = threading.Thread(target=robot_clock.sleep_until, args=(until_ns, closing), daemon=True)
    sleeper.start()
    sleeper.join(0.2)
    assert sleeper.is_alive()
    assert len(looks) <= 10
    node.get_clock().set_ros_time_override(Time(nanoseconds=2 * S))
    sleeper.join(10.0)
    assert not sleeper.is_alive()


def test_all_threads_go_first_where_that_is_permitted():
    result = subprocess.run([sys.executable, "-c", CLASSES], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() in (["True", "{True}"], ["False", "{False}"])


RESTLESS = """
import os, threading
from robot import spin
spin.LOOKS = 1
may = spin.go_first()
first = lambda: os.sched_getscheduler(0) == os.SCHED_RR
def turn():
    while first():
        pass
threads = [threading.Thread(target=turn) for _ in range(2)]  # they hand each other the interpreter's lock
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(may, first(), threading.active_count())
"""


def test_who_goes_first_and_leaves_no_room_goes_back():
    result = subprocess.run([sys.executable, "-c", RESTLESS], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split()[1:] == ["False", "1"]
    assert ("goes first no more" in result.stderr) == result.stdout.startswith("True")
