"""How every node of the robot side starts and ends."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable

import rclpy
from rclpy.experimental import EventsExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

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
    (`ulimit -r`; libfranka's manual tells how)."""
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return False
    return True
