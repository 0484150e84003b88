"""Scene folders and the renderer that the twin calls."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from bridge.config import CONFIG_DIR
from bridge.embodiment import Camera
from sim.splat import ply, scene
from sim.splat.render import Cameras, render, to_uint8
from sim.splat.renderer import SplatConfig, SplatRenderer, contract_cameras
from tests.sim.splat.scenes import SEGMENTS, cameras, poses, psnr_db, rigid, tabletop

CLOUD = tabletop(300, degree=1)
BODIES = {"hand_link": poses(3)[:, 1], "cube_actor": poses(3)[:, 2]}


def description() -> dict:
    return {
        "format": "cotwin-splat-1",
        "clouds": [{"file": f"{name}.ply", "segment": name} for name in SEGMENTS],
        "segments": {
            "table": {"T_world_segment": poses(1)[0, 0].flatten().tolist()},
            "arm": {"link": "hand_link"},
            "cube": {"actor": "cube_actor"},
        },
        "background": {"color": [0.1, 0.2, 0.3]},
        "cameras": {"third_person": {"width": 64, "height": 48, "fx": 60.0, "fy": 60.0, "cx": 31.5, "cy": 23.5}},
    }


@pytest.fixture
def folder(tmp_path):
    for name in SEGMENTS:
        ply.write(tmp_path / f"{name}.ply", CLOUD.select_segments([name]))
    (tmp_path / "scene.yaml").write_text(yaml.safe_dump(description()))
    return tmp_path


def test_a_folder_becomes_the_cloud_again(folder):
    loaded = scene.load(folder)
    assert loaded.cloud.segment_names == SEGMENTS
    assert torch.equal(loaded.cloud.means_m, CLOUD.means_m)
    assert torch.equal(loaded.cloud.sh, CLOUD.sh)
    assert loaded.fixed_names == ("table",)
    assert loaded.cameras["third_person"].width == 64
    T = loaded.poses({"hand_link": BODIES["hand_link"]}, {"cube_actor": BODIES["cube_actor"]})
    torch.testing.assert_close(T, poses(3))


def test_a_cloud_captured_elsewhere_is_moved_into_its_segment(folder):
    entry = description()
    entry["clouds"][2] |= {"T_segment_cloud": rigid([0.1, 0, 0], [0, 0, 1.0]).flatten().tolist(), "scale": 2.0}
    (folder / "scene.yaml").write_text(yaml.safe_dump(entry))
    cube = scene.load(folder).cloud.select_segments(["cube"])
    expected = CLOUD.select_segments(["cube"]).transform(rigid([0.1, 0, 0], [0, 0, 1.0]), 2.0)
    torch.testing.assert_close(cube.means_m, expected.means_m)
    torch.testing.assert_close(cube.sh, expected.sh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format 'other', this version reads 'cotwin-splat-1'"),
        ({"clouds": []}, "at least one cloud"),
        ({"colouds": []}, "unknown key 'colouds'.*Did you mean 'clouds'"),
        ({"clouds": [{"file": "arm.ply"}]}, r"clouds\[0\]: segment is needed"),
        ({"clouds": [{"file": "arm.ply", "segment": "amr"}]}, "'amr', which is not declared. Did you mean 'arm'"),
        ({"clouds": [{"file": "arm.ply", "segment": "arm"}]}, r"\['cube', 'table'\] have no cloud"),
        ({"segments": {"arm": {"link": "a", "actor": "b"}}}, r"segments.arm: \['actor', 'link'\] exclude each other"),
        ({"segments": {"table": {"T_world_segment": [1.0] * 16}}}, "segments.table.T_world_segment is not a rigid"),
        ({"segments": {"table": {"T_world_segment": [1.0]}}}, "16 numbers are needed"),
        ({"background": {"color": [0, 0, 2]}}, "three numbers in"),
        ({"background": {"color": [0, 0, 0], "image": "a.png"}}, "either color or image"),
        ({"cameras": {"wrist": {"mount": "head"}}}, "cameras.wrist: camera mount 'head'"),
        ({"cameras": {"wrist": {"fov": 1.0}}}, "cameras.wrist: .*'fov'"),
    ],
)
def test_mistakes_in_the_description_are_named(folder, change, message):
    (folder / "scene.yaml").write_text(yaml.safe_dump(description() | change))
    with pytest.raises(ValueError, match=message):
        scene.load(folder)


def test_missing_files_and_bodies_are_named(folder):
    loaded = scene.load(folder)
    with pytest.raises(ValueError, match="segment 'arm' is bound to link 'hand_link'.*Did you mean 'hand_lnk'"):
        loaded.poses({"hand_lnk": BODIES["hand_link"]}, BODIES)
    (folder / "cube.ply").unlink()
    with pytest.raises(FileNotFoundError, match=r"clouds\[2\].*cube.ply does not exist"):
        scene.load(folder)
    with pytest.raises(FileNotFoundError, match="scene.yaml"):
        scene.load(folder / "nowhere")


def renderer(folder, **config) -> SplatRenderer:
    return SplatRenderer(SplatConfig(scene=str(folder), device="cpu", **config))


def test_pictures_are_the_render_over_the_background(folder):
    splat = renderer(folder)
    pictures = splat.pictures(poses(2), cameras(2))
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (2, 2, 48, 56, 3)
    expected = render(CLOUD, poses(2), cameras(2), background=torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(pictures, to_uint8(expected.rgb))


def test_a_background_picture_is_resized(folder):
    Image.fromarray(np.full((10, 20, 3), (255, 0, 51), dtype=np.uint8)).save(folder / "back.png")
    (folder / "scene.yaml").write_text(yaml.safe_dump(description() | {"background": {"image": "back.png"}}))
    far = poses(1)
    far[:, :, 2, 3] = -100
    assert (renderer(folder).pictures(far, cameras(1)) == torch.tensor([255, 0, 51])).all()


def test_cached_fixed_segments_change_nothing_but_the_work(folder, monkeypatch):
    splat, cams = renderer(folder), cameras(2)
    full = splat.render(poses(2), cams)
    calls = []

    def counting(cloud, *arguments, **options):
        calls.append(len(cloud))
        return render(cloud, *arguments, **options)

    monkeypatch.setattr("sim.splat.renderer.render", counting)
    first = splat.render(poses(2), cams, fixed=[True, False])
    assert psnr_db(first.rgb[:, 0], full.rgb[:, 0]) > 30  # layers: nearly the same
    assert torch.equal(first.rgb[:, 1], full.rgb[:, 1])  # the moving camera: the same
    table, moving = int((CLOUD.segment_ids == 0).sum()), int((CLOUD.segment_ids > 0).sum())
    assert calls == [moving, table, 300]
    calls.clear()
    again = splat.render(poses(2), cams, fixed=[True, False])
    assert calls == [moving, 300]  # the table was not drawn again
    assert torch.equal(first.rgb, again.rgb)
    assert torch.equal(first.depth_m, again.depth_m)


def test_the_cache_never_shows_an_old_camera_or_table(folder):
    splat, cams, T = renderer(folder), cameras(2).select(slice(None), slice(0, 1)), poses(2)
    splat.render(T, cams, fixed=[True])
    moved = Cameras(cams.K, rigid([0.1, 0, 0], [0, 0, 0]) @ cams.T_world_cam, cams.width, cams.height)
    shifted = T.clone()
    shifted[1, 0, 0, 3] += 0.2  # the table of one environment
    for T_now, cams_now in ((T, moved), (shifted, cams), (T, replace(cams, width=40)), (T, cams)):
        fresh = renderer(folder).render(T_now, cams_now, fixed=[True])
        assert torch.equal(splat.render(T_now, cams_now, fixed=[True]).rgb, fresh.rgb)


def test_composite_puts_the_nearer_on_top(folder):
    splat, T, cams = renderer(folder), poses(1), cameras(1)
    shape = (1, 2, 48, 56)
    white = torch.full((*shape, 3), 255, dtype=torch.uint8)
    assert torch.equal(splat.composite(T, cams, white, torch.full(shape, 0.1)), white)
    nothing = splat.composite(T, cams, white, torch.full(shape, torch.inf))
    assert torch.equal(nothing, splat.pictures(T, cams))


def test_contract_cameras_keep_their_rays():
    tilt = rigid([0, 0, 0.1], [3.0, 0, 0]).flatten().tolist()
    side = Camera(640, 480, 600.0, 500.0, 319.5, 239.5)
    wrist = replace(side, mount="tcp", T_mount_cam=tilt)
    T_base_tcp = poses(2)[:, 1]
    cams, fixed = contract_cameras({"wrist": wrist, "side": side}, 320, 120, T_base_tcp)
    assert fixed == [True, False]  # side, wrist: by name
    # the middle stays the middle: (320 - 1) / 2 and (120 - 1) / 2
    expected = torch.tensor([[300.0, 0, 159.5], [0, 125.0, 59.5], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(cams.K[1, 0], expected)
    torch.testing.assert_close(cams.T_world_cam[:, 1], T_base_tcp @ rigid([0, 0, 0.1], [3.0, 0, 0]))
    torch.testing.assert_close(cams.T_world_cam[:, 0], torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


def test_gs_kwargs_are_mapped():
    peer = {"render_interface": "gs_rlinf", "cache_table": False, "render_bs": 4, "device": "cpu"}
    assert SplatConfig("cell").with_gs_kwargs(peer) == SplatConfig("cell", "auto", "cpu", False, images_per_call=4)
    given = SplatConfig("cell", backend="torch", device="cpu", cache_fixed=False, antialiased=True)
    assert given.with_gs_kwargs({"render_bs": 4}) == replace(given, images_per_call=4)
    assert given.with_gs_kwargs({}) == given
    for bad, message in (
        ({"render_batch": 4}, "unknown key 'render_batch'"),
        ({"cache_tabel": True}, "Did you mean 'cache_table'"),
        ({"render_interface": "nerf"}, "render_interface 'nerf': allowed are gs_rlinf"),
        ({"render_bs": 0}, "images_per_call 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SplatConfig("cell").with_gs_kwargs(bad)


def test_wrong_number_of_fixed_flags(folder):
    with pytest.raises(ValueError, match="fixed has 1 entries for 2 cameras"):
        renderer(folder).render(poses(1), cameras(1), fixed=[True])


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "splat").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_fit_the_dataclass(path):
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SplatConfig), OmegaConf.load(path)))
    assert isinstance(config, SplatConfig)
