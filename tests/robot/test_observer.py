import sys
import threading
import time

import numpy as np
import pytest

from bridge import pose
from bridge.errors import StaleObservation
from robot.observer import Observer, Ring

MS = 1_000_000


def at(x: float, yaw: float = 0.0) -> np.ndarray:
    return pose.pose(np.array([x, 0.0, 0.3]), pose.matrix_from_rpy([np.pi, 0, yaw]))


def picture(value: int) -> np.ndarray:
    return np.full((4, 6, 3), value, np.uint8)


def filled() -> Observer:
    observer = Observer(["third_person", "wrist"], max_age_ns=200 * MS)
    for n in range(4):
        observer.add_picture("third_person", (1000 + 33 * n) * MS, picture(n))
        observer.add_picture("wrist", (1005 + 33 * n) * MS, picture(100 + n))
    for n in range(20):
        observer.add_pose((1000 + 10 * n) * MS, at(0.4 + 0.01 * n, 0.1 * n))
        observer.add_opening((1000 + 10 * n) * MS, 0.08 - 0.001 * n)
    return observer


def test_what_is_added_while_it_reads_mixes_no_two_moments():
    """By the node's thread while the loop's reads; each value says when it was."""
    observer, closing, now_ms = Observer(["third_person"], max_age_ns=10**15), threading.Event(), [0]

    def add():
        while not closing.is_set():
            now_ms[0] += 1
            stamp_ns = now_ms[0] * MS
            observer.add_pose(stamp_ns, at(1e-3 * now_ms[0]))
            observer.add_opening(stamp_ns, 1e-3 * now_ms[0])
            observer.add_picture("third_person", stamp_ns, now_ms[0])

    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=add)
    thread.start()
    try:
        while now_ms[0] < 200:
            time.sleep(0.001)
        for _ in range(1500):
            seen = observer.read(0, "")
            moment = seen.stamp_ns / MS * 1e-3
            values = float(seen.images["third_person"]) * 1e-3, seen.state[0], seen.state[6]
            assert values == pytest.approx([moment] * 3)
    finally:
        closing.set()
        thread.join()
        sys.setswitchinterval(before_s)


def test_state_is_interpolated_to_the_reference_picture():
    observation = filled().read(1200 * MS, "do it")
    assert observation.stamp_ns == 1099 * MS
    assert observation.images["third_person"][0, 0, 0] == 3
    assert observation.images["wrist"][0, 0, 0] == 103  # 5 ms away; the one before is 28 ms away
    # 1099 ms is 9.9 steps of 1 cm, of 0.1 rad and of -1 mm.
    assert observation.state == pytest.approx([0.499, 0.0, 0.3, np.pi, 0.0, 0.99, 0.0701], abs=1e-5)
    assert observation.state.dtype == np.float32
    assert observation.age_ns["third_person"] == 101 * MS
    assert observation.age_ns["tcp_pose"] == 10 * MS


def test_old_or_missing_sources_are_errors_of_their_own():
    with pytest.raises(StaleObservation, match=r"third_person is 301 ms old"):
        filled().read(1400 * MS, "")
    observer = Observer(["third_person"], 200 * MS)
    observer.add_picture("third_person", 0, picture(0))
    with pytest.raises(StaleObservation, match="nothing yet from tcp_pose, gripper"):
        observer.read(0, "")


def test_a_frozen_second_camera_is_stale_even_while_the_first_runs():
    observer = filled()
    for n in range(4, 12):
        observer.add_picture("third_person", (1000 + 33 * n) * MS, picture(n))
    for n in range(20, 40):
        observer.add_pose((1000 + 10 * n) * MS, at(0.5))
        observer.add_opening((1000 + 10 * n) * MS, 0.08)
    with pytest.raises(StaleObservation, match="wrist"):
        observer.read(1390 * MS, "")


def test_ring_refuses_to_go_back_in_time():
    ring = Ring(4)
    for stamp in (10, 20, 20, 15, 30):
        ring.add(stamp, stamp)
    assert list(ring.values) == [10, 20, 30]
    assert ring.num_out_of_order == 2
    assert ring.around(25) == (1, 2, 0.5)
    assert ring.around(5)[0] == 0
    assert ring.around(99)[:2] == (2, 2)


def test_pictures_are_decoded_only_when_read():
    decoded = []
    observer = Observer(["third_person"], 200 * MS, decode=lambda p: decoded.append(p) or picture(p))
    for n in range(8):
        observer.add_picture("third_person", n * MS, n)
        observer.add_pose(n * MS, at(0.4))
        observer.add_opening(n * MS, 0.0)
    observer.read(8 * MS, "")
    assert decoded == [7]
