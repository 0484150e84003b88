"""SAPIEN, splats, or both: the same observation keys, sizes and types, from the same states."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import sapien
import yaml

from bridge.config import CONFIG_DIR
from sim.splat.config import SplatConfig
from sim.splat.procedural import panda_urdf, tabletop, write
from sim.stand_in.config import CameraError, CellConfig
from sim.stand_in.lockstep import LockStepCell
from sim.twin.command import check
from sim.twin.config import Randomization, TwinConfig
from sim.twin.vector_env import TwinVectorEnv
from sim.twin.worker import Twin, render_backend

STILL = Randomization(light=0.0, colour=0.0, planks=0.0, camera_pos_m=0.0, camera_rot_rad=0.0)
SMALL = TwinConfig(picture_width=64, picture_height=48, randomization=STILL, max_steps=4)
BLUE = [0.1, 0.2, 0.9]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    write(folder, *tabletop(panda_urdf(), 2500, TwinConfig()), BLUE)
    return folder


@pytest.fixture(scope="module")
def robot_only(tmp_path_factory):
    """A scene without cube and plate, and without a table."""
    folder = tmp_path_factory.mktemp("robot")
    write(folder, *tabletop(panda_urdf(), 2500, TwinConfig()), BLUE)
    data = yaml.safe_load((folder / "scene.yaml").read_text())
    data["segments"] = {name: carrier for name, carrier in data["segments"].items() if "link" in carrier}
    data["clouds"] = [cloud for cloud in data["clouds"] if cloud["segment"] in data["segments"]]
    (folder / "scene.yaml").write_text(yaml.safe_dump(data))
    return folder


def splats(scene, **more) -> TwinConfig:
    return dataclasses.replace(SMALL, render="splat", splat=SplatConfig(str(scene), device="cpu"), **more)


def red(pictures: np.ndarray) -> np.ndarray:
    r, g, b = np.moveaxis(pictures.astype(int), -1, 0)
    return (r > 60) & (g < 0.6 * r) & (b < 0.6 * r)


def test_all_renderers_give_the_same_observation(embodiment, scene, robot_only):
    move = np.tile(np.float32([0.02, 0.02, -0.02, 0, 0, 0, 1]), (2, 3, 1))
    composite = dataclasses.replace(splats(robot_only), render="composite")
    seen = {}
    for name, config in {"sapien": SMALL, "splat": splats(scene), "composite": composite}.items():
        with TwinVectorEnv(config, embodiment, 2, 0, auto_reset=False) as env:
            env.reset([3, 4])
            seen[name] = env.step_chunk(move).observation
    sapien = seen["sapien"]
    for name, observation in seen.items():
        assert sorted(observation.images) == ["third_person", "wrist"], name
        for pictures in observation.images.values():
            assert pictures.shape == (2, 48, 64, 3)
            assert pictures.dtype == np.uint8
        assert np.array_equal(observation.state, sapien.state), name
    for row in range(2):  # the cube is drawn at the same place by each
        wanted = red(sapien.images["third_person"][row])
        assert wanted.sum() > 8
        for name in ("splat", "composite"):
            found = red(seen[name].images["third_person"][row])
            assert found.sum() > 0.5 * wanted.sum(), name
            assert np.abs(np.argwhere(found).mean(0) - np.argwhere(wanted).mean(0)).max() < 2.5, (
                name
            )  # px; the table is coarse
    # SAPIEN's pixels are untouched where the splats have none, and the arm is theirs
    where = red(sapien.images["third_person"]) & red(seen["composite"].images["third_person"])
    assert np.array_equal(seen["composite"].images["third_person"][where], sapien.images["third_person"][where])
    top = seen["composite"].images["third_person"][:, :4].astype(int)
    assert (top[..., 2] > top[..., 0] + 60).any()  # the background is the splat scene's


@pytest.mark.slow
def test_a_worker_whose_answer_nobody_reads_ends_by_itself(embodiment, robot_only):
    """More than a pipe holds: SAPIEN's part of the pictures."""
    config = dataclasses.replace(splats(robot_only), render="composite", picture_width=160, picture_height=120)
    with TwinVectorEnv(config, embodiment, 2, 1) as env:
        env.reset()
        env.send(np.zeros((2, 1, 7)))
        process = env._workers[0][0]
    assert process.exitcode == 0


def test_what_ended_is_drawn_as_it_was(embodiment, scene):
    """With auto reset: the last picture of the episode, beside the first of the next, in one call."""
    move = np.tile(np.float32([0.02, 0.02, -0.02, 0, 0, 0, 1]), (2, 4, 1))
    with TwinVectorEnv(splats(scene), embodiment, 2, 0, auto_reset=False) as env:
        env.reset([3, 4])
        last = env.step_chunk(move).observation
        env.reset([9], [1])
        alone = env.step_chunk(move[1:], [1]).observation
    with TwinVectorEnv(splats(scene), embodiment, 2, 0) as env:
        env.reset([3, 4])
        result = env.step_chunk(move)
        env.reset([8, 9])
        together = env.step_chunk(move).final_observation
    assert result.truncated[:, 3].all()
    for name, pictures in last.images.items():
        assert np.array_equal(result.final_observation.images[name], pictures)
        assert not np.array_equal(result.observation.images[name], pictures)
        assert np.array_equal(together.images[name][1], alone.images[name][0])  # batched like alone


def test_one_twin_draws_what_the_vector_env_draws(embodiment, scene):
    config = splats(scene, randomization=Randomization(0.3, 0.0, 0.0, 0.01, 0.02))
    twin = Twin(config, embodiment)
    twin.reset(5)
    with TwinVectorEnv(config, embodiment, 1, 0) as env:
        seen = env.reset([5])
        other = env.reset([6])
    for name, picture in twin.pictures().items():
        assert np.array_equal(picture, seen.images[name][0])
        assert not np.array_equal(picture, other.images[name][0])
    still = Twin(splats(scene), embodiment)
    still.reset(5)
    ratio = twin.pictures()["third_person"][0, 0] / still.pictures()["third_person"][0, 0]
    assert np.allclose(ratio, twin.view().light, atol=0.02)  # the background takes the light's share
    assert abs(twin.view().light - 1) > 0.02


def test_light_falls_on_the_splats_of_a_composite_too(embodiment, robot_only):
    """On the arm and what is behind it by its mean; SAPIEN's table has the sun and the ambient light of its own."""
    shown = {}
    for light in (0.0, 0.3):
        config = splats(robot_only, randomization=dataclasses.replace(STILL, light=light))
        twin = Twin(dataclasses.replace(config, render="composite"), embodiment)
        twin.reset(5)
        shown[light] = twin.pictures()["third_person"].astype(float)
    share = twin.view().light
    assert abs(share - 1) > 0.02
    assert np.allclose(shown[0.3][0, 0] / shown[0.0][0, 0], share, atol=0.02)  # the scene's blue background
    drawn = Twin(splats(robot_only), embodiment)
    drawn.reset(5)
    arm = np.abs(drawn.pictures()["third_person"] - shown[0.0]).max(axis=2) == 0  # by the splats alone
    arm &= shown[0.0].min(axis=2) > 60
    assert arm.sum() > 30
    assert np.isclose(shown[0.3][arm].mean() / shown[0.0][arm].mean(), share, atol=0.01)


def test_gs_kwargs_and_scenes_are_checked(embodiment, scene, tmp_path):
    peer = {"render_interface": "gs_rlinf", "cache_table": False, "render_bs": 4, "device": "cpu"}
    mapped = TwinConfig(render="splat", splat=SplatConfig(str(scene)), gs_kwargs=peer).splat
    assert mapped == SplatConfig(str(scene), device="cpu", cache_fixed=False, images_per_call=4)
    over = TwinConfig(splat=SplatConfig(str(scene), antialiased=True), gs_kwargs=peer).splat
    assert over == dataclasses.replace(mapped, antialiased=True)
    with pytest.raises(ValueError, match="render_bs"):
        TwinConfig(splat=SplatConfig(str(scene)), gs_kwargs={"render_b": 4})
    with pytest.raises(ValueError, match="needs a scene folder"):
        TwinConfig(render="splat")
    with pytest.raises(ValueError, match="allowed are sapien, splat, composite"):
        TwinConfig(render="raster")
    data = yaml.safe_load((scene / "scene.yaml").read_text())
    data["segments"]["cube"] = {"actor": "teapot"}
    (tmp_path / "scene.yaml").write_text(yaml.safe_dump(data))
    for path in scene.glob("*.ply"):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=r"no \['teapot'\].*cube, plate"):
        Twin(splats(tmp_path), embodiment)


def test_selfcheck_says_what_is_wrong(scene, tmp_path):
    assert check("PutCubeOnPlate-v0", "splat", scene)["result"] == "ok"
    data = yaml.safe_load((scene / "scene.yaml").read_text())
    data["segments"] = {"table": data["segments"]["table"]}
    data["clouds"] = [cloud for cloud in data["clouds"] if cloud["segment"] == "table"]
    (tmp_path / "scene.yaml").write_text(yaml.safe_dump(data))
    (tmp_path / "table.ply").symlink_to(scene / "table.ply")
    assert "third_person did not change" in check("PutCubeOnPlate-v0", "splat", tmp_path)["result"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("light", 0.3), ("colour", 0.2), ("planks", 0.4), ("camera_pos_m", 0.02), ("camera_rot_rad", 0.05)],
)
def test_each_look_is_drawn_alone_and_from_the_seed(twin, monkeypatch, key, value):
    def look(seed):
        twin.reset(seed)
        return twin.pictures()["third_person"], twin.env.get_state().numpy()

    plain, state = look(5)
    monkeypatch.setattr(twin.env.twin.randomization, key, value)
    first, other, again = look(5), look(4), look(5)
    assert np.array_equal(first[0], again[0])
    assert np.abs(first[0].astype(int) - plain).mean() > 0.5  # another look
    assert np.abs(first[0].astype(int) - other[0]).mean() > 0.5
    assert np.array_equal(first[1], state)  # of the same scene


def test_the_twin_looks_like_the_cell_that_it_was_calibrated_on(twin, embodiment):
    """Another renderer, another light model, and cameras half a degree off: near, and never the same."""
    data = yaml.safe_load((CONFIG_DIR / "cell/tabletop.yaml").read_text())
    errors = {name: CameraError(**error) for name, error in data["camera_errors"].items()}
    size = (twin.config.picture_height, twin.config.picture_width)
    cell = LockStepCell(CellConfig(camera_errors=errors), embodiment, picture_size=size)
    cell.reset(2)
    twin.reset(2)
    for name, picture in cell.pictures().items():
        apart = np.abs(twin.pictures()[name].astype(float) - picture)
        assert 1 < apart.mean() < 20, name  # cube and plate are elsewhere; a grey table in grey gives 55


def test_sapien_draws_on_the_gpu_that_cuda_shows(monkeypatch):
    """`sapien.Device` stands for machines that this is not: CUDA's device 0 is the first of CUDA_VISIBLE_DEVICES."""

    def machine(devices):
        def find(alias):
            if alias not in devices:
                raise RuntimeError(f'failed to find device "{alias}"')
            return SimpleNamespace(can_render=lambda: devices[alias])

        monkeypatch.setattr(sapien, "Device", find)
        return render_backend()

    assert machine({"cpu": False, "cuda:0": True, "cuda:1": True}) == "cuda:0"
    assert machine({"cpu": False, "cuda:0": False}) == "cpu"  # CUDA without a Vulkan driver
    assert machine({"cpu": False}) == "cpu"
