import json
import os
import pty
import struct
import sys
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from bridge import pose
from robot import devices
from robot.devices import DeviceError, Gamepad, Keyboard, Playback, Reading, Recorded, SpaceMouse
from robot.pad import BrowserPad
from robot.teleop import SPEED_SHARES, Hand, TeleopConfig, open_device
from tests.robot.cell import wait_for

DOWN = np.diag([1.0, -1.0, -1.0])
FULL_X = Reading((1.0, 0, 0, 0, 0, 0), clutch=True, deadman=True)


@pytest.fixture
def hand():
    return Hand(0.1, 0.2, 0.6)


def test_the_hand_moves_along_the_base_at_one_of_three_speeds(hand):
    steps = []
    for pressed in ((), ("faster",), ("faster",), ("slower",), ("slower",), ("slower",)):
        action = hand.act(Reading(FULL_X.motion, True, True, pressed), DOWN, 1.0)
        steps.append(action[0] / (0.2 * 0.1))
    assert steps == pytest.approx([SPEED_SHARES[n] for n in (1, 2, 2, 1, 0, 0)])
    turn = hand.act(Reading((0, 0, 0, 0, 0, 1.0), True, True), DOWN, 1.0)
    R = DOWN @ pose.matrix_from_rpy(turn[3:6])  # as the contract integrates it
    assert np.allclose(R, pose.matrix_from_rpy([0, 0, 0.6 * 0.2 * 0.1]) @ DOWN)  # about base z, to the left


def test_without_the_clutch_nothing_is_sent(hand):
    assert hand.act(Reading(FULL_X.motion), DOWN, 1.0) is None
    assert hand.act(Reading(FULL_X.motion, deadman=True), DOWN, 1.0) is None


def test_taking_over_keeps_the_hand_as_the_policy_left_it(hand):
    assert hand.act(FULL_X, DOWN, -1.0)[6] == -1.0  # it holds something: do not drop it
    assert hand.act(Reading(clutch=True, pressed=("gripper",)), DOWN, -1.0)[6] == 1.0
    assert hand.act(FULL_X, DOWN, -1.0)[6] == 1.0  # what is on its way is not forgotten
    hand.act(Reading(), DOWN, 1.0)
    alone = hand.act(Reading(FULL_X.motion, pressed=("gripper",)), DOWN, 1.0)  # without the clutch: no motion
    assert np.allclose(alone, [0, 0, 0, 0, 0, 0, -1])


@pytest.mark.parametrize("motion", [(0.0,) * 5, (float("nan"),) + (0.0,) * 5, (1.5,) + (0.0,) * 5])
def test_a_device_cannot_say_nonsense(motion):
    with pytest.raises(ValueError, match="six numbers"):
        Reading(motion)


def test_keyboard():
    ours, theirs = pty.openpty()
    keyboard = Keyboard(theirs)
    try:
        os.write(ours, b"wa w +\ny")
        wait_for(lambda: bool((reading := keyboard.read()).pressed) and found.append(reading) is None, 5.0, "keys")
        assert found[0].motion[:3] == (1.0, 1.0, 0.0)
        assert found[0].pressed == ("gripper", "gripper", "faster", "start", "success")
        wait_for(lambda: not keyboard.read().clutch, 5.0, "letting go")
    finally:
        keyboard.close()


found: list[Reading] = []


def test_keyboard_needs_a_terminal():
    with open(os.devnull) as nothing, pytest.raises(DeviceError, match="terminal"):
        Keyboard(nothing.fileno())


def test_gamepad(tmp_path):
    path = tmp_path / "js0"
    os.mkfifo(path)
    pad = None
    writer = os.open(path, os.O_RDWR)
    try:
        pad = Gamepad(str(path))

        def event(value, kind, number):
            os.write(writer, struct.pack("=IhBB", 0, value, kind, number))

        event(1, 0x81, 0)  # the state at opening is no press
        event(-32767, 2, 1)
        event(1, 1, 4)
        event(1, 1, 3)
        event(-32767, 2, 7)
        event(32767, 2, 5)
        reading = pad.read()
        assert reading.motion[:3] == pytest.approx((1.0, 0.0, 1.0))
        assert reading.clutch
        assert reading.pressed == ("start", "faster")
        event(0, 1, 4)
        event(1, 1, 5)
        os.write(writer, b"half")  # the rest of an event comes later
        assert (pad.read().clutch, pad.read().deadman) == (False, True)
        os.close(writer)
        writer = None
        with pytest.raises(DeviceError, match="gone"):
            pad.read()
    finally:
        if writer is not None:
            os.close(writer)
        if pad is not None:
            pad.close()


def test_no_gamepad_and_no_library_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(DeviceError, match="plug one in"):
        Gamepad(str(tmp_path / "js7"))
    monkeypatch.setitem(sys.modules, "pyspacemouse", None)
    with pytest.raises(DeviceError, match="pip install pyspacemouse"):
        SpaceMouse()


def test_spacemouse_with_a_fake_library(monkeypatch):
    """No device can be here: this fake answers as pyspacemouse 2.1 does."""
    states = [types.SimpleNamespace(x=1.2, y=0.02, z=0, roll=0, pitch=0, yaw=-0.5, buttons=[1, 1])]
    device = types.SimpleNamespace(read=lambda: states[0], close=lambda: None)
    fake = types.SimpleNamespace(AxisConvention=types.SimpleNamespace(ROS="ros"), open=lambda axis_convention: device)
    monkeypatch.setitem(sys.modules, "pyspacemouse", fake)
    mouse = SpaceMouse()
    assert mouse.read() == Reading((1.0, 0.0, 0.0, 0.0, 0.0, -0.5), True, True, ("gripper", "start"))
    assert mouse.read().pressed == ()
    states[0] = types.SimpleNamespace(x=0, y=0, z=0, roll=0, pitch=0, yaw=0, buttons=[0, 0])
    assert mouse.read() == Reading()


def test_a_recording_plays_back_what_was_read(tmp_path):
    readings = [FULL_X, Reading(pressed=("start",)), Reading((0, 0.5, 0, 0, 0, 0), True, True)]
    source = iter(readings)
    device = types.SimpleNamespace(read=lambda: next(source), close=lambda: None)
    recorded = Recorded(device, tmp_path / "r.jsonl")
    for _ in readings:
        recorded.read()
    recorded.close()
    playback = open_device(TeleopConfig(device="playback", path=str(tmp_path / "r.jsonl")))
    assert isinstance(playback, Playback)
    assert [playback.read() for _ in range(3)] == readings
    assert playback.read() == Reading()
    (tmp_path / "bad.jsonl").write_text('{"motion": [9, 0, 0, 0, 0, 0], "pressed": []}\n')
    with pytest.raises(DeviceError, match="no recording"):
        Playback(tmp_path / "bad.jsonl")


@pytest.fixture
def pad():
    pad = BrowserPad(port=0)
    yield pad
    pad.close()


def socket_of(pad):
    return pad.url.replace("http", "ws").replace("/?", "/socket?")


def test_the_page_is_served_to_who_has_the_token(pad):
    with urllib.request.urlopen(pad.url) as answer:
        assert "dead-man" in answer.read().decode()
    for url in (pad.url.split("?")[0], pad.url[:-1]):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(url)
        assert refusal.value.code == 403


def test_the_pad_holds_while_the_page_speaks(pad, monkeypatch):
    message = {"motion": [0.5, 0, 0, 0, 0, 0], "clutch": True, "deadman": True, "pressed": ["gripper"]}
    with connect(socket_of(pad)) as page:
        page.send(json.dumps(message))
        wait_for(lambda: pad.read().clutch, 5.0, "the grip")
        wait_for(lambda: pad.read() == Reading(), 5.0, "letting go of a page that fell silent")
        with connect(socket_of(pad)) as second, pytest.raises(ConnectionClosed):
            second.recv()
        page.send(json.dumps(message | {"motion": [0.5, 0, 0, 0, 0, 0]}))
        wait_for(lambda: pad.read().clutch, 5.0, "the grip")
    wait_for(lambda: not pad.read().clutch, 5.0, "the end of the connection")
    with connect(socket_of(pad)) as page:
        page.send('{"motion": [7, 0, 0, 0, 0, 0], "clutch": true, "deadman": true, "pressed": []}')
        with pytest.raises(ConnectionClosed):
            page.recv()
    assert not pad.read().clutch


def test_presses_are_not_lost_between_readings(pad):
    with connect(socket_of(pad)) as page:
        for name in ("start", "gripper"):
            page.send(json.dumps({"motion": [0] * 6, "clutch": False, "deadman": False, "pressed": [name]}))
        seen: list[str] = []
        wait_for(lambda: seen.extend(pad.read().pressed) is None and len(seen) == 2, 5.0, "both")
        assert seen == ["start", "gripper"]


def test_another_sites_page_is_refused(pad):
    with pytest.raises(InvalidStatus):
        connect(socket_of(pad), origin="http://elsewhere.example")
    with pytest.raises(DeviceError, match="set host= or port="):
        BrowserPad(port=int(pad.url.split(":")[2].split("/")[0]))


@pytest.mark.parametrize(("keys", "message"), [({"device": "wand"}, "allowed"), ({"device": "playback"}, "path=FILE")])
def test_bad_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        TeleopConfig(**keys)


def test_every_mark_is_a_button():
    assert set(devices.MARKS) <= set(devices.BUTTONS)
