"""The arm of the stand-in cell driven from view to view: the whole ROS graph, as `cotwin up` starts it."""

import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest

from bridge.config import load
from sim.scan import photos as photo_set
from sim.scan.capture import CaptureConfig, main
from tests.robot.cell import loopback

ROOT = Path(__file__).resolve().parents[3]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def domain(monkeypatch):
    monkeypatch.setenv("ROS_DOMAIN_ID", str(random.randrange(1, 100)))
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    monkeypatch.setenv("PATH", f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_photographs_show_the_cube_where_it_is(domain, tmp_path):
    """The wrist camera sees the cube where forward kinematics and the contract's calibration put it, to 12 px."""
    from robot.up import Graph
    from sim.stand_in.client import CellClient

    control, frames = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    args = {"host": loopback(), "cell_control": control, "cell_frames": frames}
    with open(tmp_path / "nodes.log", "w") as log, Graph(str(ROOT / "launch/cell.launch.yaml"), args, log):
        settings = ["num_views=3", "targets_m=[[0.4, 0.18, 0.0]]", "azimuth_rad=[-0.4, 0.4]", "speed_m_s=0.2"]
        assert main([f"out={tmp_path}/photos", *settings]) == 0, (tmp_path / "nodes.log").read_text()[-3000:]
        with CellClient(control) as client:
            cube_m = client.poses()["cube"][:3, 3]
    photos = photo_set.load(tmp_path / "photos")
    assert len(photos) >= 2
    places = [photo.T_world_cam[:3, 3] for photo in photos]
    assert np.linalg.norm(places[0] - places[1]) > 0.03
    camera = load("twin-capture", CaptureConfig).embodiment.cameras["wrist"]
    for photo in photos:
        seen = np.linalg.inv(photo.T_world_cam) @ np.append(cube_m, 1.0)
        expected = (camera.intrinsics @ seen[:3])[:2] / seen[2]
        r, g, b = photo.pixels().astype(int).transpose(2, 0, 1)
        red = np.argwhere((r > 2 * g) & (r > 2 * b) & (r > 60))
        assert len(red) > 200
        np.testing.assert_allclose(red.mean(axis=0)[::-1], expected, atol=12)
        hand = np.linalg.inv(photo.bodies["panda_hand"]) @ photo.T_world_cam
        np.testing.assert_allclose(hand[:3, 3] - camera.matrix[:3, 3], [0, 0, 0.1034], atol=0.003)
