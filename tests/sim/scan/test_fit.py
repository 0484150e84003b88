import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sim.scan import fit as training
from sim.scan import photos as photo_set
from sim.scan.fit import CHECKPOINT, REPORT, FitConfig, View, along_rays, fit, main, picture, score, smaller
from sim.scan.photos import Photo, store
from sim.splat.scene import load
from tests.sim.scan.conftest import HEIGHT, WIDTH


@pytest.fixture
def config(scene, photographs, tmp_path) -> FitConfig:
    few = {"num_gaussians": 700, "degree": 0, "device": "cpu"}
    return FitConfig(photos=[str(photographs)], start=str(scene), out=str(tmp_path / "out"), **few)


def test_the_scene_itself_scores_full_marks(scene, photographs):
    found = score(load(scene), photo_set.load(photographs), "cpu")
    assert found["held_out_psnr_db"] > 60
    assert found["held_out_ssim"] > 0.999


def test_a_fit_comes_near_photographs_that_it_has_not_seen(config):
    """Positions of the world unknown, the cube's own from the first scene; the cube moves between photographs."""
    found = fit(dataclasses.replace(config, steps=30))
    written = load(Path(config.out))
    assert {s.name: s.kind for s in written.segments} == {"world": "fixed", "cube": "actor"}
    assert (found["photographs"], found["held_out"]) == (14, 2)
    first = fit(dataclasses.replace(config, steps=1, out=config.out + "1"))
    assert found["held_out_psnr_db"] > max(18, first["held_out_psnr_db"] + 3)
    again = json.loads((Path(config.out) / REPORT).read_text())
    assert again["held_out_psnr_db"] == found["held_out_psnr_db"]
    assert again["config"]["steps"] == 30
    assert not (Path(config.out) / CHECKPOINT).exists()


def test_an_interrupted_fit_goes_on(config, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(dataclasses.replace(config, steps=4))
    with pytest.raises(ValueError, match="fit with other settings"):
        fit(dataclasses.replace(config, steps=6, seed=1))
    steps = []
    real = training.loss_of
    monkeypatch.setattr(training, "loss_of", lambda *arguments: steps.append(0) or real(*arguments))
    assert fit(dataclasses.replace(config, steps=6))["steps"] == 6
    assert len(steps) == 1 + 2  # one warms up


def test_time_ends_a_fit(config):
    found = fit(dataclasses.replace(config, steps=10_000, max_s=0.5))
    assert 0 < found["steps"] < 10_000


def test_first_points_lie_on_their_rays(photographs, config):
    train = photo_set.load(photographs)[:1]
    cloud = along_rays(train, 400, config)
    T = np.linalg.inv(train[0].T_world_cam)
    inside = cloud.means_m.double().numpy() @ T[:3, :3].T + T[:3, 3]
    pixels = inside @ train[0].K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    np.testing.assert_allclose(pixels, np.round(pixels), atol=2e-3)
    u, v = np.round(pixels).astype(int).T
    np.testing.assert_allclose((0.28209479 * cloud.sh[:, 0] + 0.5).numpy(), train[0].pixels()[v, u] / 255, atol=1e-5)
    on_table = cloud.means_m[:, 2].abs() < 1e-4
    assert 0.2 < float(on_table.float().mean()) < 0.8


def test_a_smaller_photograph_sees_the_same(photographs):
    photo = photo_set.load(photographs)[0]
    view = View(photo, ("world", "cube"), 2, "cpu")
    assert (view.height, view.width) == (HEIGHT // 2, WIDTH // 2)
    K = smaller(photo, 2).numpy()
    np.testing.assert_allclose(K, [[30, 0, 14.5], [0, 30, 10.5], [0, 0, 1]])  # the middle stays the middle
    np.testing.assert_allclose(view.K.numpy(), [[30, 0, 15], [0, 30, 11], [0, 0, 1]])


def test_what_a_mask_hides_is_not_learnt(photographs, config):
    photo = photo_set.load(photographs)[0]
    cloud, _, size_m = training.start(config, [photo])
    gaussians = training.Gaussians(cloud, size_m, torch.zeros(3))
    hidden = View(photo, cloud.segment_names, 1, "cpu")
    hidden.mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    seen = View(photo, cloud.segment_names, 1, "cpu")
    for view, learns in ((hidden, False), (seen, True)):
        gaussians.optimizer.zero_grad()
        loss, _ = training.loss_of(gaussians, view, 0)
        loss.backward()
        gradient = gaussians.params["base"].grad
        assert (gradient is not None and bool(gradient.abs().max() > 0)) == learns


@pytest.fixture
def half_hidden(photographs, tmp_path) -> list[Photo]:
    """The photographs with a left half that is painted over, and masked."""
    grey = np.full((HEIGHT, WIDTH), 255, np.uint8)
    grey[:, : WIDTH // 2] = 0
    Image.fromarray(grey).save(tmp_path / "mask.png")
    made = []
    for photo in photo_set.load(photographs):
        pixels = photo.pixels()
        pixels[:, : WIDTH // 2] = (255, 0, 255)
        stored = store(tmp_path / photo.path.name, pixels, photo.K, photo.T_world_cam, photo.bodies)
        made.append(dataclasses.replace(stored, mask_path=tmp_path / "mask.png"))
    photo_set.save(tmp_path, made)
    return made


def test_what_a_mask_hides_starts_no_gaussian_and_no_background(half_hidden, config, tmp_path):
    colours = 0.28209479 * along_rays(half_hidden, 400, config).sh[:, 0] + 0.5
    assert bool((colours[:, 1] > 0.02).all())  # no magenta
    fit(dataclasses.replace(config, photos=[str(tmp_path)], steps=1))
    red, green, _ = load(Path(config.out)).background.tolist()
    assert abs(red - green) < 0.2


def test_what_a_mask_hides_is_not_scored(half_hidden, scene):
    found = score(load(scene), half_hidden, "cpu")
    assert found["held_out_psnr_db"] > 60
    assert found["held_out_ssim"] > 0.999
    assert found["held_out_edge_distance"] < 0.01
    smaller_too = score(load(scene), half_hidden, "cpu", shrink=4)  # 7.5 hidden columns: the eighth is hidden too
    assert smaller_too["held_out_psnr_db"] > 20
    with pytest.raises(ValueError, match="shrink 44 leaves no whole pixel"):
        View(half_hidden[0], ("world", "cube"), 44, "cpu")


def test_what_cannot_be_fitted_is_named(config, scene, photographs, tmp_path, capsys):
    made = [dataclasses.replace(photo, bodies={"mug": np.eye(4)}) for photo in photo_set.load(photographs)]
    for photo in made:
        shutil.copy(photo.path, tmp_path)
    made = [dataclasses.replace(photo, path=tmp_path / photo.path.name) for photo in made]
    photo_set.save(tmp_path, made)
    settings = [f"out={config.out}", f"start={scene}", "num_gaussians=400", "steps=1"]
    assert main([f"photos=[{tmp_path}]", *settings]) == 1
    assert "name bodies ['mug'] that the first scene lacks; it has ['cube']" in capsys.readouterr().err
    assert main([f"photos=[{tmp_path},{photographs}]", *settings]) == 1
    assert "every photograph must name the same bodies" in capsys.readouterr().err
    many = 3 * photo_set.load(photographs)  # 48 photographs, and 40 Gaussians that the cube leaves of 100
    with pytest.raises(ValueError, match="num_gaussians 100: 60 are the bodies' own"):
        training.start(dataclasses.replace(config, num_gaussians=100), many)
    assert main([f"photos=[{config.out}]", *settings]) == 1
    assert "is no set of photographs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="degree 4"):
        FitConfig(degree=4)


def test_a_picture_is_the_photographs_size(scene, photographs):
    photo = photo_set.load(photographs)[3]
    assert picture(load(scene), photo, "cpu").shape == (HEIGHT, WIDTH, 3)
