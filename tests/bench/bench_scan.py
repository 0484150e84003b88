"""Scanning the stand-in cell: calibrate, photograph, fit, check, and show the policy its pictures.

    python -m tests.bench.bench_scan --out docs/results/scan.json     # one CUDA GPU; gsplat, mani_skill, mujoco on EGL
    python -m tests.bench.bench_scan --tiny --out /tmp/scan.json      # the CPU, a few small photographs

The cell's cameras are off their nominal calibration as its configuration says, and nobody tells the scan. `calibrate`:
a chessboard on the table and the wrist camera's pictures of it. `fit`: photographs by the calibrated wrist camera and
by a hand-held one whose poses are known, every eighth held out. `check`: corners of the held-out photographs found
again in the scene. `policy`: the contract's cameras at the policy's picture size, with cube, plate and arm where no
photograph showed them: the fitted scene's pictures and SAPIEN's, each beside the stand-in's. A stand-in is not a real
cell: its photographs have no noise, no blur and no reflections.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridge import pose
from bridge.config import load
from bridge.pictures import area_resize
from sim.expert import R_DOWN
from sim.scan.board import Board
from sim.scan.capture import CALIBRATION, CaptureConfig, capture
from sim.scan.check import CheckConfig, check
from sim.scan.fit import FitConfig, fit
from sim.scan.scores import scores
from sim.scan.stand_in import StandInPhotographer
from sim.scan.views import Reach
from sim.splat.config import SplatConfig
from sim.stand_in.config import Chessboard
from sim.twin.config import Randomization, TwinConfig
from sim.twin.replay_report import put
from sim.twin.worker import Twin
from tests.bench.bench_splat import commit, machine

FULL = {"board_views": 40, "wrist": 96, "hand_held": 240, "gaussians": 200_000, "steps": 30_000, "max_s": 170.0}
TINY = {"board_views": 12, "wrist": 12, "hand_held": 20, "gaussians": 2_500, "steps": 60, "max_s": 20.0}
SHRINK = {"full": 1, "tiny": 8}
POLICY_STATES = 24
FIRST_SEED = 100  # of scenes that no photograph showed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few and small photographs, on the CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/scan_bench"), help="photographs and the fitted scene")
    parser.add_argument("--seconds", type=float, default=None, help="of training at most")
    parser.add_argument("--commit", default=None, help="recorded commit, where there is no git")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs on the CPU")
    size = dict(TINY if args.tiny else FULL)
    size["max_s"] = args.seconds or size["max_s"]
    shrink = SHRINK["tiny" if args.tiny else "full"]
    device = torch.device("cpu" if args.tiny else "cuda")
    figures: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def measure(name: str, step: Any, *arguments: Any) -> None:
        began_s = time.monotonic()
        figures.update(step(*arguments))
        seconds[name] = round(time.monotonic() - began_s, 1)
        result = {"name": "scan", "date": time.strftime("%Y-%m-%d"), "commit": args.commit or commit()}
        result |= {"command": "python -m tests.bench.bench_scan" + " --tiny" * args.tiny, "machine": machine(device)}
        result |= {"figures": figures, "details": {"seconds": seconds, "size": size}}
        args.out.write_text(json.dumps(result, indent=2) + "\n")  # what was measured stays if a later part fails
        print(json.dumps(figures, indent=2), flush=True)

    measure("calibrate", calibrate, args.work, size)
    measure("fit", fit_cell, args.work, size, shrink, device)
    if not args.tiny:  # so few Gaussians have no corners
        measure("check", check_cell, args.work, device)
    measure("policy", policy_pictures, args.work, 2 if args.tiny else POLICY_STATES)


def figure(ours: float, unit: str, peer: float | None = None, peer_name: str = "", **more: Any) -> dict[str, Any]:
    ratio = ours / peer if peer else None
    return {"ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "peer_name": peer_name} | more


def calibrate(work: Path, size: dict[str, Any]) -> dict[str, Any]:
    """Board pictures, and how far hand-eye transform and camera matrix are from the cell's true ones."""
    config = load("twin-capture", CaptureConfig, ["source=stand_in", f"out={work}/board"])
    board = Board(columns=9, rows=6, square_m=0.02)
    lying = Chessboard(board.columns, board.rows, board.square_m, pos_m=[0.52, -0.25])
    config = dataclasses.replace(config, board=board, cell=dataclasses.replace(config.cell, board=lying))
    config = dataclasses.replace(config, num_views=size["board_views"], hand_held=0)
    found = capture(dataclasses.replace(config, targets_m=[[0.48, -0.25, 0.0]], distance_m=[0.3, 0.45]))
    made = json.loads((work / "board" / CALIBRATION).read_text())
    camera, error = config.embodiment.cameras[config.camera], config.cell.camera_errors[config.camera]
    T_true = camera.matrix @ pose.pose(error.pos_m, pose.matrix_from_rpy(error.rpy_rad))
    off, nominal = (np.linalg.inv(T_true) @ T for T in (np.array(made["T_tcp_cam"]), camera.matrix))
    mm, nominal_mm = (1e3 * float(np.linalg.norm(T[:3, 3])) for T in (off, nominal))
    mrad, nominal_mrad = (1e3 * float(pose.rotation_angle(T[:3, :3])) for T in (off, nominal))
    focal_px, nominal_px = (abs(fx - camera.fx * error.focal_scale) for fx in (made["K"][0][0], camera.fx))
    peer, more = "the nominal calibration", {"n": found["board_pictures"], "rms_px": found["board_rms_px"]}
    return {
        "hand_eye_error_mm": figure(mm, "mm", nominal_mm, peer, **more),
        "hand_eye_error_mrad": figure(mrad, "mrad", nominal_mrad, peer, **more),
        "focal_error_px": figure(focal_px, "px", nominal_px, peer, **more),
    }


def fit_cell(work: Path, size: dict[str, Any], shrink: int, device: torch.device) -> dict[str, Any]:
    settings = ["source=stand_in", f"out={work}/photos", f"calibration={work}/board/{CALIBRATION}"]
    settings += [f"num_views={size['wrist']}", f"hand_held={size['hand_held']}"]
    capture(load("twin-capture", CaptureConfig, settings))
    settings = [f"photos=[{work}/photos]", f"out={work}/scene", f"num_gaussians={size['gaussians']}"]
    settings += [f"steps={size['steps']}", f"max_s={size['max_s']}", f"shrink={shrink}", f"device={device}"]
    found = fit(load("twin-fit", FitConfig, settings))
    keys = ("photographs", "steps", "train_s", "gaussians")
    more = {"n": found["held_out"]} | {key: found[key] for key in keys}
    return {
        "scan_held_out_psnr_db": figure(found["held_out_psnr_db"], "dB", **more),
        "scan_held_out_ssim": figure(found["held_out_ssim"], "", **more),
        "scan_held_out_edge_distance": figure(found["held_out_edge_distance"], "", **more),
    }


def check_cell(work: Path, device: torch.device) -> dict[str, Any]:
    """On the photographs that the fit held out."""
    found = check(
        load("twin-check", CheckConfig, [f"scene={work}/scene", f"photos=[{work}/photos]", f"device={device}"])
    )
    return {"scan_check_error_px": figure(found["error_px"], "px", n=found["corners"], p90_px=found["error_p90_px"])}


def policy_pictures(work: Path, num: int) -> dict[str, Any]:
    """Mean scores of both renderers' pictures beside the stand-in's, over states of a reach in unseen scenes."""
    config = load("twin-capture", CaptureConfig, ["source=stand_in"])
    person, embodiment = StandInPhotographer(config.cell, config.embodiment), config.embodiment
    reach, rng = Reach(embodiment.home_joint_pos_rad, min_height_m=0.0), np.random.default_rng(0)
    still = TwinConfig(randomization=Randomization(0.0, 0.0, 0.0, 0.0, 0.0, 0.0), home_noise_rad=0.0)
    shown = dataclasses.replace(still, render="splat", splat=SplatConfig(scene=str(work / "scene")))
    twins = {"sapien": Twin(still, embodiment), "splat": Twin(shown, embodiment)}
    found: dict[str, list[dict[str, float]]] = {}
    for index in range(num):
        person.reset(FIRST_SEED + index)
        things = person.bodies(np.array(embodiment.home_joint_pos_rad), 0.08, ["cube", "plate"])
        xy_m = things["cube"][:2, 3], things["plate"][:2, 3]
        share, opening_m = rng.uniform(0, 1), rng.uniform(0.045, 0.08)
        T = pose.pose((1 - share) * np.array([0.42, 0.0, 0.3]) + share * np.array([*xy_m[0], 0.03]), R_DOWN)
        q = reach.joints(T)
        assert q is not None, f"the arm does not reach {T[:3, 3]}"
        for render, twin in twins.items():
            put(twin, T, opening_m, xy_m)
            size = still.picture_height, still.picture_width
            for camera, picture in twin.pictures().items():
                seen = area_resize(person.shoot(camera, q, opening_m)[None], size)[0]
                one = scores(torch.from_numpy(picture), torch.from_numpy(seen))
                found.setdefault(f"{render} {camera}", []).append(one)
    person.close()
    figures = {}
    for camera in embodiment.cameras:
        for key, unit in (("psnr_db", "dB"), ("ssim", ""), ("edge_distance", "")):
            ours, peer = (float(np.mean([one[key] for one in found[f"{r} {camera}"]])) for r in ("splat", "sapien"))
            figures[f"policy_{camera}_{key}"] = figure(ours, unit, peer, "SAPIEN's pictures", n=num)
    return figures


if __name__ == "__main__":
    main()
