"""Fit a splat scene to photographs: cotwin twin fit photos=[FOLDER] out=SCENE

What the photographs name as `bodies` (robot links, objects) starts from the twin's own shapes and is learnt in its
body's frame, so that the arm may stand elsewhere in every photograph and the scene comes out bound. All else starts as
points along the photographs' own rays. Every eighth photograph is held out and scores the result (`fit.json`). A fit
that was interrupted goes on from its checkpoint.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bridge.pictures import area_resize
from sim.scan import action
from sim.scan import photos as photo_set
from sim.scan.gaussians import Gaussians, draw
from sim.scan.photos import Photo
from sim.scan.scores import psnr_db, scores, ssim
from sim.splat import procedural, sample
from sim.splat.cloud import GaussianCloud, merge
from sim.splat.render import Cameras, invert_rigid, render, to_uint8
from sim.splat.scene import SplatScene, load
from sim.twin.config import TASKS, TwinConfig

WORLD = "world"
CHECKPOINT, REPORT = "checkpoint.pt", "fit.json"
SSIM_SHARE = 0.2  # of the loss; the rest is the mean absolute difference
SHRINK = 0.01  # weight of mean opacity and mean size in the loss: what nothing needs fades
MOVE_EVERY = 100  # steps between relocations, none in the last fifth
FAR_M = 4.0
UNSURE_LOGIT = -2.2  # of opacity: 0.1, for a point of unknown depth


@dataclass
class FitConfig:
    """Keys of `cotwin twin fit`."""

    photos: list[str] = field(default_factory=list)  # folders with transforms.json
    out: str = "runs/scan/scene"  # the scene folder to write
    start: str = ""  # a scene folder whose segments the bodies start from; empty: the twin's own shapes
    task: str = TASKS[0]  # of these shapes
    num_gaussians: int = 150_000
    degree: int = 2  # of the spherical harmonics
    steps: int = 15_000  # photographs that are looked at
    max_s: float = 0.0  # training ends after so long, however many steps it made; 0: no limit
    shrink: int = 1  # photographs are made so many times smaller
    held_out_every: int = 8
    checkpoint_every_s: float = 60.0
    device: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for key, least in (("num_gaussians", 100), ("steps", 1), ("shrink", 1), ("held_out_every", 2)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} {getattr(self, key)}: at least {least}")
        if not 0 <= self.degree <= 3:
            raise ValueError(f"degree {self.degree}: allowed are 0 to 3")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"


class View:
    """One photograph on the device: `rgb` [H, W, 3] uint8, `mask` [H, W] or None, and its camera."""

    def __init__(self, photo: Photo, segments: tuple[str, ...], shrink: int, device: str):
        self.height, self.width = photo.height // shrink, photo.width // shrink
        size = self.height, self.width
        self.rgb = torch.from_numpy(area_resize(photo.pixels()[None], size)[0]).to(device)
        mask = photo.mask()
        if mask is not None:  # a pixel of which a part is hidden is hidden
            white = 255 * mask[None, ..., None].repeat(3, axis=3).astype(np.uint8)
            mask = torch.from_numpy(area_resize(white, size)[0, ..., 0] == 255).to(device)
            if not mask.any():
                raise ValueError(f"{photo.path}: shrink {shrink} leaves no whole pixel of what its mask shows")
        self.mask = mask
        self.K = smaller(photo, shrink, half_px=0.5).float().to(device)
        T = np.stack([photo.bodies.get(name, np.eye(4)) for name in segments])
        T_cam_world = invert_rigid(torch.from_numpy(photo.T_world_cam))
        self.T_cam_segment = (T_cam_world @ torch.from_numpy(T)).float().to(device)


def smaller(photo: Photo, shrink: int, half_px: float = 0.0) -> Tensor:
    """K of the photograph made smaller, float64 [3, 3]; the centre of the first pixel is at (half_px, half_px)."""
    K = torch.from_numpy(photo.K).clone()
    K[:2, 2] += 0.5  # the corner of the first pixel keeps its ray
    K[0] *= (photo.width // shrink) / photo.width
    K[1] *= (photo.height // shrink) / photo.height
    K[:2, 2] += half_px - 0.5
    return K


def fit(config: FitConfig) -> dict[str, Any]:
    """Train, score the held-out photographs, write the scene. Returns what `fit.json` holds."""
    torch.manual_seed(config.seed)
    found = [photo for folder in config.photos for photo in photo_set.load(Path(folder))]
    if len(found) < 2:
        raise ValueError(f"photos {config.photos}: at least two photographs are needed")
    if len({tuple(sorted(photo.bodies)) for photo in found}) > 1:
        raise ValueError(f"photos {config.photos}: every photograph must name the same bodies")
    held_out = found[:: config.held_out_every]
    train = [photo for index, photo in enumerate(found) if index % config.held_out_every]
    cloud, carriers, size_m = start(config, train)
    views = [View(photo, cloud.segment_names, config.shrink, config.device) for photo in train]
    seen = [view.rgb.flatten(0, 1) if view.mask is None else view.rgb[view.mask] for view in views]
    background = torch.stack([rgb.float().mean(dim=0) for rgb in seen]).mean(dim=0) / 255
    gaussians = Gaussians(cloud.to(config.device), size_m, background)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    steps, seconds = _train(config, gaussians, views, out / CHECKPOINT)
    figures: dict[str, Any] = {"photographs": len(train), "held_out": len(held_out), "steps": steps}
    figures |= {"train_s": round(seconds, 1), "device": config.device} | _write(gaussians, carriers, config.degree, out)
    figures |= score(load(out), held_out, config.device, config.shrink)
    (out / REPORT).write_text(json.dumps(figures | {"config": asdict(config)}, indent=2) + "\n")
    (out / CHECKPOINT).unlink()
    return figures


def start(config: FitConfig, train: list[Photo]) -> tuple[GaussianCloud, dict[str, dict[str, Any]], float]:
    """The first cloud, what carries its segments (entries of scene.yaml), and the scene's size in m."""
    names, num = sorted(train[0].bodies), config.num_gaussians
    parts: list[GaussianCloud] = []
    carriers: dict[str, dict[str, Any]] = {}
    if names:
        if config.start:
            scene = load(Path(config.start))
            whole = scene.cloud
            known = {s.name: {s.kind: s.body} for s in scene.segments if s.kind != "fixed"}
        else:
            whole, known = procedural.tabletop(procedural.panda_urdf(), num // 2, TwinConfig(task=config.task))
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"photographs name bodies {unknown} that the first scene lacks; it has {sorted(known)}")
        parts = [whole.select_segments([name]).bind(name) for name in names]
        carriers = {name: known[name] for name in names}
    left = num - sum(map(len, parts))
    if left < len(train):
        raise ValueError(f"num_gaussians {num}: {num - left} are the bodies' own, too few are left for all else")
    whole = merge([along_rays(train, left, config), *parts])
    num_sh = (config.degree + 1) ** 2
    sh = torch.nn.functional.pad(whole.sh, (0, 0, 0, max(0, num_sh - whole.sh.shape[1])))[:, :num_sh]
    eyes = np.stack([photo.T_world_cam[:3, 3] for photo in train])
    size_m = max(0.1, float(np.linalg.norm(eyes - eyes.mean(axis=0), axis=1).max()))
    return replace(whole, sh=sh), {WORLD: {}} | carriers, size_m


def along_rays(train: list[Photo], num: int, config: FitConfig) -> GaussianCloud:
    """`num` round Gaussians with the colours of random pixels: on the table's plane (z = 0) where a pixel looks at it
    from nearby, half of the time, and anywhere along the ray else."""
    rng = np.random.default_rng(config.seed)
    points, sizes, rgbs, logits = [], [], [], []
    for photo, count in zip(train, np.diff(np.linspace(0, num, len(train) + 1).astype(int)), strict=True):
        mask = photo.mask()
        places = rng.integers(0, photo.width * photo.height if mask is None else mask.sum(), count)
        v, u = np.divmod(places if mask is None else np.flatnonzero(mask)[places], photo.width)
        rays = np.stack([u, v, np.ones(count)], axis=1) @ np.linalg.inv(photo.K).T @ photo.T_world_cam[:3, :3].T
        eye = photo.T_world_cam[:3, 3]
        depth = np.exp(rng.uniform(np.log(0.2), np.log(FAR_M), count))
        to_table = np.divide(-eye[2], rays[:, 2], out=np.full(count, np.inf), where=rays[:, 2] < -1e-3)
        on_table = (to_table > 0) & (to_table < FAR_M) & (rng.random(count) < 0.5)
        depth = np.where(on_table, to_table, depth)
        points.append(eye + depth[:, None] * rays)
        sizes.append(0.5 * depth / photo.K[0, 0] * np.sqrt(photo.width * photo.height / max(1, count)))
        rgbs.append(photo.pixels()[v, u] / 255)
        logits.append(np.where(on_table, 0.0, UNSURE_LOGIT))
    return GaussianCloud(
        means_m=torch.from_numpy(np.concatenate(points)).float(),
        quats_wxyz=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(num, 1),
        log_scales=torch.from_numpy(np.log(np.concatenate(sizes))).float()[:, None].repeat(1, 3),
        opacity_logits=torch.from_numpy(np.concatenate(logits)).float(),
        sh=sample.flat_colour(torch.from_numpy(np.concatenate(rgbs)).float()),
        segment_ids=torch.zeros(num, dtype=torch.int64),
        segment_names=(WORLD,),
    )


def loss_of(gaussians: Gaussians, view: View, degree: int) -> tuple[Tensor, Tensor]:
    """What is minimised, and the rendered picture [H, W, 3]."""
    cloud = gaussians.cloud(degree)
    rgb, alpha = draw(cloud, view.T_cam_segment, view.K, view.width, view.height)
    rgb, target = rgb + (1 - alpha)[..., None] * gaussians.params["background"], view.rgb.float() / 255
    if view.mask is not None:
        rgb = torch.where(view.mask[..., None], rgb, target)
    loss = (1 - SSIM_SHARE) * (rgb - target).abs().mean() + SSIM_SHARE * (1 - ssim(rgb, target))
    return loss + SHRINK * (cloud.opacities.mean() + cloud.log_scales.exp().mean()), rgb


def _train(config: FitConfig, gaussians: Gaussians, views: list[View], checkpoint: Path) -> tuple[int, float]:
    """Steps and seconds of training, those before an interruption included."""
    step, before_s = _resume(config, gaussians, checkpoint)
    order = np.random.default_rng([config.seed, step])
    loss_of(gaussians, views[0], 0)  # kernels are compiled before the clock starts
    began_s = saved_s = time.monotonic()
    seconds = before_s
    with tqdm(total=config.steps, initial=step, unit="step", desc="fit", mininterval=1.0) as bar:
        while step < config.steps and (not config.max_s or seconds < config.max_s):
            share = max(step / config.steps, seconds / config.max_s if config.max_s else 0.0)
            gaussians.set_progress(share)
            view = views[int(order.integers(len(views)))]
            loss, rgb = loss_of(gaussians, view, min(config.degree, int(10 * share)))
            loss.backward()
            gaussians.optimizer.step()
            gaussians.optimizer.zero_grad()
            gaussians.explore()
            step += 1
            if step % MOVE_EVERY == 0:
                if share < 0.8:
                    gaussians.relocate()
                bar.set_postfix_str(f"PSNR {psnr_db(rgb.detach(), view.rgb / 255):.1f} dB", refresh=False)
            bar.update()
            now_s = time.monotonic()
            seconds = before_s + now_s - began_s
            if now_s - saved_s > config.checkpoint_every_s:
                saved_s = now_s
                _save(config, gaussians, checkpoint, step, seconds)
    _save(config, gaussians, checkpoint, step, seconds)
    return step, seconds


def _save(config: FitConfig, gaussians: Gaussians, checkpoint: Path, step: int, seconds: float) -> None:
    """In one step: a process that dies here leaves the checkpoint before."""
    part = checkpoint.with_suffix(".part")
    torch.save(gaussians.state() | {"step": step, "seconds": seconds, "made_by": _made_by(config)}, part)
    part.replace(checkpoint)


def _resume(config: FitConfig, gaussians: Gaussians, checkpoint: Path) -> tuple[int, float]:
    if not checkpoint.is_file():
        return 0, 0.0
    state = torch.load(checkpoint, map_location=config.device, weights_only=True)
    if state["made_by"] != _made_by(config):
        raise ValueError(f"{checkpoint} is of a fit with other settings; remove it, or choose another out=FOLDER")
    gaussians.load(state)
    return state["step"], state["seconds"]


def _made_by(config: FitConfig) -> str:
    free = ("steps", "max_s", "checkpoint_every_s", "out")  # may be others when a fit goes on
    return json.dumps({key: value for key, value in asdict(config).items() if key not in free})


@torch.no_grad()
def _write(gaussians: Gaussians, carriers: dict[str, dict[str, Any]], degree: int, out: Path) -> dict[str, Any]:
    """The scene folder, without what cannot be seen."""
    cloud = gaussians.cloud(degree).to("cpu")
    cloud = cloud.select(cloud.opacities > 1 / 255)
    background = gaussians.params["background"].detach().clamp(0, 1).tolist()
    parts = [cloud.select_segments([name]).bind(name) for name in cloud.segment_names]
    parts = [part for part in parts if len(part)]
    carried = {part.segment_names[0]: carriers[part.segment_names[0]] for part in parts}
    procedural.write(out, merge(parts), carried, background)
    return {"gaussians": len(cloud)}


def score(scene: SplatScene, held_out: list[Photo], device: str, shrink: int = 1) -> dict[str, float]:
    """Mean scores of the scene's pictures beside these photographs."""
    found = []
    for photo in held_out:
        view = View(photo, scene.cloud.segment_names, shrink, device)
        found.append(scores(picture(scene, photo, device, shrink), view.rgb, view.mask))
    return {f"held_out_{key}": float(np.mean([one[key] for one in found])) for key in found[0]}


def picture(scene: SplatScene, photo: Photo, device: str, shrink: int = 1) -> Tensor:
    """The scene as the photograph's camera sees it, by the renderer that the twin uses: uint8 [H, W, 3]."""
    bodies = {name: torch.from_numpy(T)[None] for name, T in photo.bodies.items()}
    K, T_world_cam = smaller(photo, shrink), torch.from_numpy(photo.T_world_cam)
    cameras = Cameras(K[None, None], T_world_cam[None, None], photo.width // shrink, photo.height // shrink)
    T, background = scene.poses(bodies, bodies), scene.background.to(device)
    return to_uint8(render(scene.cloud.to(device), T, cameras, background=background).rgb)[0, 0]


def main(argv: list[str]) -> int:
    return action.run("fit", FitConfig, argv, __doc__, fit)
