"""The camera reader with the RealSense SDK's software device behind `rs.pipeline`."""

import time

import numpy as np
import pyrealsense2 as rs
import pytest

from bridge.embodiment import Camera
from robot import camera_check
from robot.camera import CameraReader
from robot.camera_check import Tally, calibration_problems
from robot.stamps import StampMap
from sim.stand_in.camera_device import _device
from tests.robot.cell import wait_for

CAMERA = Camera(width=64, height=48, fx=60.0, fy=60.0, cx=31.5, cy=23.5)


class Feeder:
    """One software camera whose pictures a test pushes."""

    def __init__(self, serial="123"):
        self.context, self._events = rs.context(), []
        self.context.set_devices_changed_callback(lambda event: self._events.append((event, event.get_new_devices())))
        self.device = _device(self.context, "wrist", serial, CAMERA, 30, 0)

    def push(self, number: int, value: int = 0) -> None:
        self.device.pixels[:] = value
        self.device.push(number, 1000 + 33 * number)


@pytest.fixture
def feeder():
    return Feeder()


def reader(feeder, seen, **settings):
    keep = lambda picture: seen.append((picture.number, picture.stamp_ns, int(picture.pixels[0, 0, 0])))  # noqa: E731
    return CameraReader("wrist", CAMERA, "123", 30, keep, context=feeder.context, **settings)


def test_pictures_arrive_whole_in_order_with_the_time_of_their_exposure(feeder):
    seen = []
    camera = reader(feeder, seen)
    for number in range(1, 31):
        feeder.push(number, number)
        time.sleep(0.005)
    wait_for(lambda: len(seen) == 30, 10.0, "all pictures")
    camera.close()
    assert seen == [(n, (1000 + 33 * n) * 1_000_000, n) for n in range(1, 31)]
    assert camera.health.state == "OK"
    assert camera.health.num_dropped == 0


def test_a_burst_is_queued_not_lost(feeder):
    seen = []
    camera = reader(feeder, seen)
    for number in range(1, 11):
        feeder.push(number)
    wait_for(lambda: len(seen) == 10, 10.0, "all pictures")
    camera.close()


def test_dropped_and_repeated_numbers_are_counted(feeder):
    seen = []
    camera = reader(feeder, seen, max_repeats=2)
    for number in (1, 2, 5, 5, 6):
        feeder.push(number)
        time.sleep(0.02)
    wait_for(lambda: len(seen) == 4, 10.0, "four pictures")
    assert [number for number, _, _ in seen] == [1, 2, 5, 6]
    assert (camera.health.num_dropped, camera.health.num_repeated) == (2, 1)
    assert camera.health.state == "OK"
    for _ in range(3):
        feeder.push(6)
        time.sleep(0.02)
    wait_for(lambda: camera.health.state == "FROZEN", 10.0, "noticing the freeze")
    feeder.push(7)
    wait_for(lambda: camera.health.state == "OK", 10.0, "recovery")
    camera.close()


def test_a_silent_camera_is_lost_and_comes_back(feeder):
    seen = []
    camera = reader(feeder, seen, frame_timeout_s=0.2)
    feeder.push(1)
    wait_for(lambda: camera.health.state == "LOST", 10.0, "noticing the silence")
    feeder.push(2)
    wait_for(lambda: camera.health.state == "OK", 10.0, "recovery")
    camera.close()
    assert len(seen) == 2


def test_a_camera_that_is_not_there_is_named(feeder):
    with pytest.raises(ValueError, match=r"serial 999\), 64x48 RGB8 at 30 Hz: not connected; there are \['123'\]"):
        CameraReader("wrist", CAMERA, "999", 30, lambda picture: None, context=feeder.context)


def test_another_clock_is_mapped_smoothly_and_never_back():
    stamps, rng, last = StampMap(), np.random.default_rng(0), 0
    for n in range(500):
        device_ms, true_ns = 5000.0 + 10 * n, 10**12 + 10_000_000 * n
        stamp = stamps.stamp_ns(device_ms, true_ns + int(rng.uniform(0, 4e6)))  # up to 4 ms late
        assert stamp > last
        last = stamp
        if n > 200:
            assert abs(stamp - true_ns - 2e6) < 1e6
    stamp = stamps.stamp_ns(10.0, true_ns + 10**9)  # the device was restarted
    assert stamp == pytest.approx(true_ns + 10**9, abs=2)


def tally_of(feeder, numbers, value=None, pause_s=0.033):
    """Judgement of pictures with these numbers."""
    tally = Tally(CAMERA, 30, has_our_clock=False)
    camera = CameraReader("wrist", CAMERA, "123", 30, tally.add, context=feeder.context)
    rng = np.random.default_rng(0)
    for number in numbers:
        feeder.device.pixels[:] = rng.integers(0, 255, feeder.device.pixels.shape) if value is None else value
        feeder.device.push(number, 1000 + round(number * 100 / 3))
        time.sleep(pause_s / 3)
    wait_for(lambda: camera.health.num_pictures + camera.health.num_repeated == len(numbers), 10.0, "all pictures")
    figures, problems = tally.judge(camera)
    camera.close()
    return figures, " ".join(problems)


def test_check_finds_a_good_camera_good(feeder):
    figures, problems = tally_of(feeder, range(1, 31))
    assert problems == ""
    assert (figures["pictures"], figures["dropped"]) == (30, 0)
    assert figures["rate_hz"] == pytest.approx(30.0, abs=0.1)


@pytest.mark.parametrize(
    ("numbers", "value", "words"),
    [
        ([*range(1, 15), *range(17, 30)], None, "2 pictures dropped"),
        (range(1, 20), 0, "lens covered"),
        ([1, 2, 3, 3, 4], None, "1 repeated"),
        (range(1, 60, 2), None, "delivers 15.0 Hz"),
        ([1, 2], None, "hardly any picture"),
    ],
)
def test_check_says_what_is_wrong(feeder, numbers, value, words):
    assert words in tally_of(feeder, list(numbers), value)[1]


def test_check_compares_the_calibration():
    seen = rs.intrinsics()
    seen.fx, seen.fy, seen.ppx, seen.ppy = 60.5, 70.0, 31.0, 80.0
    words = calibration_problems(CAMERA, seen)
    assert words == ["fy is 70.0 px, the contract says 60.0", "cy is 80.0 px, the contract says 23.5"]


def test_check_command(capsys):
    assert camera_check.main([]) == 2
    assert camera_check.main(["check", "serials=[1,2]", "cameras=[third_person,wrist]"]) == 1
    assert "not connected" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not in the contract"):
        camera_check.CheckConfig(cameras=["nose"], serials=["1"])
