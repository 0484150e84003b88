"""Splat and SAPIEN look at the same scene: poses, bindings, cameras and pixel conventions agree."""

import gymnasium as gym
import numpy as np
import torch
from omegaconf import OmegaConf

from bridge.config import CONFIG_DIR
from bridge.embodiment import Embodiment
from sim.splat.procedural import panda_urdf, tabletop, write
from sim.splat.render import render
from sim.splat.renderer import SplatConfig, SplatRenderer, contract_cameras
from sim.twin import put_cube  # noqa: F401  registers the task
from sim.twin.config import Randomization, TwinConfig
from tests.sim.splat.scenes import mask

EMBODIMENT = Embodiment.from_dict(OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "embodiment/fr3_tabletop.yaml")))


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def centre(where: np.ndarray) -> np.ndarray:
    return np.argwhere(where).mean(axis=0)


def test_cube_and_plate_are_where_sapien_draws_them(tmp_path):
    still = Randomization(light=0, colour=0, planks=0, camera_pos_m=0, camera_rot_rad=0)
    green = [0.1, 0.8, 0.1]  # as nothing else is
    twin = TwinConfig(picture_width=160, picture_height=120, randomization=still, plate_colour=green)
    options = {"num_envs": 1, "obs_mode": "state", "sim_backend": "cpu", "render_backend": "cpu"}
    env = gym.make("PutCubeOnPlate-v0", twin=twin, embodiment=EMBODIMENT, **options).unwrapped
    env.reset(seed=1)
    sapien = env.pictures()

    cloud, bodies = tabletop(panda_urdf(), 20_000, twin)
    write(tmp_path, cloud, bodies, [0, 0, 1])
    splat = SplatRenderer(SplatConfig(str(tmp_path), device="cpu"))
    links = {name: link.pose.to_transformation_matrix() for name, link in env.agent.robot.links_map.items()}
    actors = {name: env.scene.actors[name].pose.to_transformation_matrix() for name in ("cube", "plate")}
    env.close()
    cameras, _ = contract_cameras(EMBODIMENT.cameras, 160, 120, links["panda_hand_tcp"])
    names = splat.scene.cloud.segment_names
    # without the table: its Gaussians are as wide as the plate is thick, and sorted by their centres
    cloud = splat.scene.cloud.select_segments(set(names) - {"table"})
    output = render(cloud, splat.scene.poses(links, actors), cameras, segments=True, antialiased=True)
    for m, camera in enumerate(sorted(EMBODIMENT.cameras)):
        r, g, b = np.moveaxis(sapien[camera].astype(int), -1, 0)
        shown = {"cube": (r > 60) & (g < 0.6 * r) & (b < 0.6 * r), "plate": (g > 60) & (r < 0.6 * g) & (b < 0.6 * g)}
        for name, theirs in shown.items():
            ours = torch.eq(mask(output)[0, m], names.index(name)).numpy()
            if theirs.sum() < 30:
                continue
            assert overlap(ours, theirs) > 0.65, f"{name} in {camera}"
            assert np.abs(centre(ours) - centre(theirs)).max() < 1.0, f"{name} in {camera}"  # px
    assert shown["plate"].sum() > 300  # the wrist camera sees it well
