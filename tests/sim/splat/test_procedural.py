"""The scene sampled from the twin's shapes: where its parts are, and that it loads."""

import numpy as np
import pytest
import torch
import trimesh

from sim.splat import procedural, scene
from sim.splat.cloud import matrix_from_quat_wxyz
from sim.splat.procedural import panda_urdf, robot_links, tabletop
from sim.twin.config import TwinConfig


def test_the_pandas_links_are_covered():
    clouds = robot_links(panda_urdf(), 2000)
    names = [cloud.segment_names[0] for cloud in clouds]
    assert names == [*(f"panda_link{i}" for i in range(8)), "panda_hand", "panda_leftfinger", "panda_rightfinger"]
    assert sum(map(len, clouds)) == pytest.approx(2000, abs=20)
    base = clouds[0].means_m
    assert 0 <= base[:, 2].min() < 0.01  # stands on its origin
    assert base[:, 2].max() == pytest.approx(0.14, abs=0.01)
    left, right = clouds[-2].means_m, clouds[-1].means_m
    assert left[:, 1].min() > -1e-3  # the right finger is the left one turned by half a turn
    assert right[:, 1].max() < 1e-3


def test_a_urdf_with_an_origin(tmp_path):
    trimesh.creation.box((0.1, 0.1, 0.1)).export(tmp_path / "box.stl")
    urdf = tmp_path / "robot.urdf"
    visual = '<visual><origin xyz="1 2 3" rpy="0 0 0.5"/><geometry><mesh filename="box.stl"/></geometry></visual>'
    urdf.write_text(f'<robot name="r"><link name="a">{visual}</link><link name="b"/></robot>')
    (cloud,) = robot_links(urdf, 600)
    assert cloud.segment_names == ("a",)
    local = (cloud.means_m.double().numpy() - [1, 2, 3]) @ np.array(
        [[np.cos(0.5), -np.sin(0.5), 0], [np.sin(0.5), np.cos(0.5), 0], [0, 0, 1]]
    )
    assert np.abs(np.abs(local).max(axis=1) - 0.05).max() < 1e-6  # on the turned box's faces
    normals = matrix_from_quat_wxyz(cloud.quats_wxyz)[:, :, 2]
    assert ((cloud.means_m - torch.tensor([1.0, 2, 3])) * normals).sum(dim=1).min() > 0.04  # outwards
    urdf.write_text('<robot name="r"><link name="b"/></robot>')
    with pytest.raises(ValueError, match="no link with a visual mesh"):
        robot_links(urdf, 600)


def test_command_writes_a_scene_that_loads(tmp_path, capsys):
    assert procedural.main([f"out={tmp_path}/cell", "num_gaussians=1200"]) == 0
    assert "14 segments" in capsys.readouterr().out
    loaded = scene.load(tmp_path / "cell")
    cloud, _ = tabletop(panda_urdf(), 1200, TwinConfig())
    assert torch.equal(loaded.cloud.means_m, cloud.means_m)
    kinds = {segment.name: segment.kind for segment in loaded.segments}
    assert (kinds["table"], kinds["cube"], kinds["panda_hand"]) == ("fixed", "actor", "link")
    table = loaded.segments[loaded.cloud.segment_names.index("table")]
    assert table.T_world_segment is not None
    top = loaded.cloud.select_segments(["table"]).means_m[:, 2].max() + table.T_world_segment[2, 3]
    assert float(top) == pytest.approx(0, abs=1e-6)  # the table's top is z = 0


def test_light_is_baked_into_the_colour():
    cloud, _ = tabletop(panda_urdf(), 1200, TwinConfig())
    table = cloud.select_segments(["table"])
    up = matrix_from_quat_wxyz(table.quats_wxyz)[:, 2, 2]
    bright, dark = table.sh[up > 0.9, 0].mean(), table.sh[up < -0.9, 0].mean()
    assert bright > dark + 0.1
