"""How every node of the robot side starts and ends."""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import rclpy
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

log = logging.getLogger(__name__)

MOST_CORES, LOOKS = 0.8, 3  # what a node that goes first may take of the machine, and for how many seconds more
LOOK_S = 0.2  # a signal that comes while nothing happens is seen this late


class NodeError(RuntimeError):
    """What a node depends on is not there; the process ends with this line and code 1. May be raised in callbacks."""


def run_node(make_node: Callable[[], Node], argv: list[str] | None = None) -> int:
    """Spin until SIGINT or SIGTERM; returns the process's exit code (2: a setting that makes no sense).

    ROS stays up until the node's `close()`, if it has one, has run: threads of a node may publish to the end.
    """
    faulthandler.register(signal.SIGUSR1)  # shows where each thread stands
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    rclpy.init(args=argv if argv is None else ["node", *argv], signal_handler_options=SignalHandlerOptions.NO)
    node = None
    executor = EventsExecutor()  # a third of the usual executor's CPU time (measured), which is dear beside a policy
    try:
        node = make_node()
        executor.add_node(node)
        while not signals:
            executor.spin_once(timeout_sec=LOOK_S)
        return 0
    except (ValueError, NodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        if node is not None:
            getattr(node, "close", lambda: None)()
            executor.remove_node(node)
            node.destroy_node()
        rclpy.try_shutdown()


def go_first() -> bool:
    """Put this process's threads, and those that they will start, under SCHED_RR: on a busy machine a thread that must
    be on time otherwise waits for a core, 20 ms in one of a hundred ticks and up to 200 (measured). All of them, since
    the thread on time waits for the interpreter's lock of the others. False where the system does not permit it
    (`ulimit -r`; libfranka's manual tells how).

    Who goes first must leave room: when the process takes `MOST_CORES` for `LOOKS` seconds, all of them go back.
    """
    try:
        schedule_all(os.SCHED_RR, 1)
    except PermissionError:
        return False
    threading.Thread(target=_leave_room, name="leave-room", daemon=True).start()
    return True


def _leave_room() -> None:
    taken, used_s, now_s = 0, time.process_time(), time.monotonic()
    while taken < LOOKS:
        time.sleep(1.0)
        before_s, used_s = used_s, time.process_time()
        began_s, now_s = now_s, time.monotonic()
        taken = taken + 1 if used_s - before_s > MOST_CORES * (now_s - began_s) else 0
    schedule_all(os.SCHED_OTHER, 0)
    log.error("this node took %.1f cores for %d s: it goes first no more", MOST_CORES, LOOKS)


def schedule_all(policy: int, priority: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))
