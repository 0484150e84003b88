import json

import numpy as np
import pytest
import torch

from bridge.config import load as load_config
from sim.scan.arm import Links
from sim.scan.bind import BindConfig, Box, bind, main
from sim.scan.views import look_at
from sim.splat import ply, procedural
from sim.splat.cloud import GaussianCloud, merge
from sim.splat.render import Cameras, render
from sim.splat.scene import load
from sim.twin.config import TwinConfig
from tests.sim.splat.scenes import psnr_db

CUBE_M = [0.45, 0.2, 0.02]
YAW_RAD = 0.3


@pytest.fixture(scope="module")
def posed() -> tuple[GaussianCloud, GaussianCloud, dict[str, np.ndarray], BindConfig]:
    """The twin's own shapes: as one cloud in the base frame with the arm at home, bound as they truly are, the poses of
    their bodies, and the settings that should cut the one into the other."""
    config = load_config("twin-bind", BindConfig)
    config.objects = {"cube": Box(CUBE_M, [0.05, 0.05, 0.05], YAW_RAD)}
    true, _ = procedural.tabletop(procedural.panda_urdf(), 8000, TwinConfig())
    true = merge([true.select_segments([n]).bind(n) for n in true.segment_names if n != "plate"])
    poses = Links().poses(np.array(config.embodiment.home_joint_pos_rad), config.opening_m)
    c, s = np.cos(YAW_RAD), np.sin(YAW_RAD)
    poses["cube"] = np.array([[c, -s, 0, CUBE_M[0]], [s, c, 0, CUBE_M[1]], [0, 0, 1, CUBE_M[2]], [0, 0, 0, 1]])
    poses["table"] = np.eye(4)
    poses["table"][:3, 3] = procedural.TABLE_CENTER_M
    parts = [true.select_segments([n]).bind(n).transform(torch.from_numpy(poses[n])) for n in true.segment_names]
    return merge(parts).bind("world"), true, poses, config


def test_what_moves_is_cut_out(posed):
    whole, true, _, config = posed
    bound, carriers = bind(whole, config)
    assert len(bound) == len(whole)
    assert carriers["cube"] == {"actor": "cube"}
    assert carriers["panda_link4"] == {"link": "panda_link4"}
    assert carriers["world"] == {}
    for name in ("cube", "panda_link0", "panda_link3", "panda_link6", "panda_hand", "panda_leftfinger"):
        ours, theirs = (len(cloud.select_segments([name])) for cloud in (bound, true))
        assert ours == pytest.approx(theirs, rel=0.1), name


def test_a_bound_scan_moves_as_the_robot_does(posed, tmp_path):
    """Written, read again, and drawn with arm and cube elsewhere: the same picture as of the true parts."""
    whole, true, poses, config = posed
    ply.write(tmp_path / "scan.ply", whole)
    home = ",".join(map(str, config.embodiment.home_joint_pos_rad))
    settings = [f"cloud={tmp_path}/scan.ply", f"out={tmp_path}/scene", f"joints_rad=[{home}]"]
    box = f"objects={{cube: {{pos_m: {CUBE_M}, size_m: [0.05, 0.05, 0.05], yaw_rad: {YAW_RAD}}}}}"
    assert main([*settings, box]) == 0
    scene = load(tmp_path / "scene")
    moved = Links().poses(np.array(config.embodiment.home_joint_pos_rad) + 0.3, 0.04)
    moved["cube"], moved["table"] = poses["cube"].copy(), poses["table"]
    moved["cube"][:2, 3] += [0.1, -0.1]
    bodies = {name: torch.from_numpy(T)[None] for name, T in moved.items()}
    K = torch.tensor([[150.0, 0, 63.5], [0, 150.0, 47.5], [0, 0, 1]])[None, None]
    eye = torch.from_numpy(look_at(np.array([1.3, 0.6, 0.7]), np.array([0.4, 0.0, 0.25])))
    cameras = Cameras(K, eye[None, None], 128, 96)
    got = render(scene.cloud, scene.poses(bodies, bodies), cameras).rgb
    expected = render(true, torch.stack([bodies[n] for n in true.segment_names], dim=1), cameras).rgb
    at_home = render(scene.cloud, scene.poses(*2 * [{n: torch.from_numpy(T)[None] for n, T in poses.items()}]), cameras)
    assert psnr_db(got, expected) > 28
    assert psnr_db(at_home.rgb, expected) < 22


def test_the_clouds_own_frame_and_scale(posed, tmp_path, capsys):
    """A cloud in centimetres, in a frame that is turned against the base."""
    whole, _, _, config = posed
    T = np.array([[0.0, -1, 0, 0.2], [1, 0, 0, -0.1], [0, 0, 1, 0.3], [0, 0, 0, 1]])
    ply.write(tmp_path / "scan.ply", whole.transform(torch.from_numpy(np.linalg.inv(T))).transform(torch.eye(4), 100.0))
    numbers = ",".join(map(str, T.ravel()))
    settings = [f"cloud={tmp_path}/scan.ply", f"out={tmp_path}/scene", f"T_base_cloud=[{numbers}]", "scale=0.01"]
    assert main(settings) == 0
    counts = json.loads(capsys.readouterr().out)
    bound, _ = bind(whole, BindConfig(embodiment=config.embodiment))
    straight = dict(zip(bound.segment_names, bound.segment_ids.bincount().tolist(), strict=True))
    assert counts == {name: pytest.approx(n, abs=3) for name, n in straight.items()}


def test_what_is_wrong_is_named(capsys):
    assert main(["cloud=nowhere.ply"]) == 1
    assert "'nowhere.ply': there is no such file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="joints_rad"):
        BindConfig(joints_rad=[1.0])
    with pytest.raises(ValueError, match="16 numbers"):
        BindConfig(T_base_cloud=[1.0])
