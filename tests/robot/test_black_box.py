import re
import time

import numpy as np
import pytest

from robot import black_box
from robot.safety import State
from tests.robot.cell import running_cell, wait_for
from tests.robot.test_arm import PATIENCE_S, connect, move, play


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with running_cell() as cell:
        arm = connect(cell, fault_dir=str(folder))
        try:
            arm.home().result(PATIENCE_S)
            play(arm, cell, [move(0.02, yaw=0.03)] * 3 + [move(-3.0)] + [move(0, 0.02)] * 2)
            cell.inject("reflex", names=["cartesian_reflex"])
            wait_for(lambda: arm.snapshot().state is State.FAULT, PATIENCE_S, "FAULT")
            wait_for(lambda: list(folder.glob("*.npz")), PATIENCE_S, "the file")
            time.sleep(0.3)
        finally:
            arm.close()
    (path,) = folder.glob("*.npz")
    return path


def test_a_fault_leaves_the_seconds_before_it(fault_file):
    recording = black_box.load(fault_file)
    assert "cartesian_reflex" in recording.facts["reason"]
    states = recording.states
    assert np.all(np.diff(states["stamp_ns"]) > 0)
    assert len(states) > 100
    assert black_box.STATES[states["state"][-1]] is State.FAULT
    assert State.RUNNING in {black_box.STATES[n] for n in states["state"]}
    assert len(recording.actions) == 6
    text = "\n".join(black_box.describe(recording))
    assert "state RUNNING" in text
    assert re.search("FAULT: .*reflex", text)


def test_replay_decides_as_the_arm_did_and_notices_what_was_changed(fault_file, capsys):
    recording = black_box.load(fault_file)
    assert black_box.replay(recording) == (6, [])
    assert black_box.main(["replay", str(fault_file)]) == 0
    assert "replayed 6 actions: none decided otherwise" in capsys.readouterr().out
    recording.facts["limits"]["max_speed_m_s"] = 0.1
    assert len(black_box.replay(recording)[1]) == 6


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "x.npz").write_text("no")
    assert black_box.main(["replay", str(tmp_path / "x.npz")]) == 2
    assert "not a fault recording" in capsys.readouterr().err
    assert black_box.main([]) == 2


def test_the_ring_forgets_what_is_older():
    box = black_box.BlackBox(10.0, {})
    for n in range(1000):
        box.add_state(n, State.IDLE, np.zeros(7), np.eye(4), np.zeros(6), np.eye(4), 0.0)
    assert len(box._states) == 300
