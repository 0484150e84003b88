"""Scanning the stand-in cell: calibrate, photograph, fit, check, and show the policy its pictures.

    python -m tests.bench.bench_scan --out docs/results/scan.json     # one CUDA GPU with all that the parts below need
    python -m tests.bench.bench_scan --only fit check --out ...       # of photographs that were taken elsewhere
    python -m tests.bench.bench_scan --tiny --out /tmp/scan.json      # the CPU, a few small photographs

The cell's cameras are off their nominal calibration as its configuration says, and nobody tells the scan.

* `calibrate` (mujoco, pin): a chessboard on the table and the wrist camera's pictures of it.
* `photograph` (mujoco, pin, mani_skill's files): by the calibrated wrist camera, and by a hand-held one whose poses are
  known; and the shapes that links and objects start from.
* `fit` (CUDA, gsplat): every eighth photograph is held out.
* `check` (OpenCV): corners of the held-out photographs found again in the scene.
* `policy` (mujoco, pin, mani_skill with Vulkan): the contract's cameras at the policy's picture size, with cube, plate
  and arm where no photograph showed them: the fitted scene's pictures and SAPIEN's, each beside the stand-in's.

Parts leave what the next need in `--work`; figures are merged into the file. A stand-in is not a real cell: its
photographs have no noise, no blur and no reflections.
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
from sim.scan.check import CheckConfig, check
from sim.scan.fit import FitConfig, fit
from sim.scan.scores import scores
from sim.splat import procedural
from sim.splat.config import SplatConfig
from sim.twin.config import Randomization, TwinConfig
from tests.bench.bench_splat import commit, machine

FULL = {"board_views": 40, "wrist": 96, "hand_held": 240, "gaussians": 120_000, "steps": 30_000, "max_s": 170.0}
TINY = {"board_views": 12, "wrist": 12, "hand_held": 20, "gaussians": 2_500, "steps": 60, "max_s": 20.0}
FULL |= {"shrink": 1, "states": 24}
TINY |= {"shrink": 8, "states": 2}
FIRST_SEED = 100  # of scenes that no photograph showed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="few and small photographs, on the CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/scan_bench"), help="photographs and the fitted scene")
    parser.add_argument("--seconds", type=float, default=None, help="of training at most")
    parser.add_argument("--commit", default=None, help="recorded commit, where there is no git")
    args = parser.parse_args()
    size = dict(TINY if args.tiny else FULL)
    size["max_s"] = args.seconds or size["max_s"]
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    # So few Gaussians as the tiny scene has show no corners to check by.
    for name in args.only or [part for part in PARTS if part != "check" or not args.tiny]:
        if name == "fit" and not args.tiny and device.type == "cpu":
            parser.error("no CUDA device; --tiny runs on the CPU")
        began_s = time.monotonic()
        figures = PARTS[name](args.work, size, device)
        seconds = round(time.monotonic() - began_s, 1)
        print(json.dumps({name: figures, "seconds": seconds}, indent=2), flush=True)
        write(args.out, figures, {f"{name}_s": seconds, f"{name}_machine": machine(device)}, args.commit, args.tiny)


def write(out: Path, figures: dict[str, Any], details: dict[str, Any], at_commit: str | None, tiny: bool) -> None:
    """What was measured before stays, also if a later part fails."""
    old: dict[str, Any] = {"machine": None, "figures": {}, "details": {}}
    old |= json.loads(out.read_text()) if out.exists() else {}
    result = {"name": "scan", "date": time.strftime("%Y-%m-%d"), "commit": at_commit or commit()}
    result |= {"command": "python -m tests.bench.bench_scan" + " --tiny" * tiny}
    result |= {"machine": details.get("fit_machine") or old["machine"]}  # the fit is what a GPU is needed for
    result |= {"figures": old["figures"] | figures, "details": old["details"] | details}
    out.write_text(json.dumps(result, indent=2) + "\n")


def figure(
    ours: float, unit: str, peer: float | None = None, peer_name: str = "", lower_is_better: bool = False, **more: Any
) -> dict[str, Any]:
    """`ratio` above 1: ours is better."""
    ratio = None if not peer or not ours else (peer / ours if lower_is_better else ours / peer)
    return {"ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "peer_name": peer_name} | more


def calibrate(work: Path, size: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Board pictures, and how far hand-eye transform and camera matrix are from the cell's true ones."""
    from sim.scan.board import Board
    from sim.scan.capture import CALIBRATION, CaptureConfig, capture
    from sim.stand_in.config import Chessboard

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
        "hand_eye_error_mm": figure(mm, "mm", nominal_mm, peer, True, **more),
        "hand_eye_error_mrad": figure(mrad, "mrad", nominal_mrad, peer, True, **more),
        "focal_error_px": figure(focal_px, "px", nominal_px, peer, True, **more),
    }


def photograph(work: Path, size: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Photographs, and the first scene: no figures of its own."""
    from sim.scan.capture import CALIBRATION, CaptureConfig, capture

    settings = ["source=stand_in", f"out={work}/photos", f"calibration={work}/board/{CALIBRATION}"]
    settings += [f"num_views={size['wrist']}", f"hand_held={size['hand_held']}"]
    capture(load("twin-capture", CaptureConfig, settings))
    made = procedural.tabletop(procedural.panda_urdf(), size["gaussians"] // 2, TwinConfig())
    procedural.write(work / "start", *made, list(procedural.SplatSceneConfig().background))
    return {}


def fit_cell(work: Path, size: dict[str, Any], device: torch.device) -> dict[str, Any]:
    settings = [f"photos=[{work}/photos]", f"start={work}/start", f"out={work}/scene", f"device={device}"]
    settings += [f"num_gaussians={size['gaussians']}", f"shrink={size['shrink']}"]
    settings += [f"steps={size['steps']}", f"max_s={size['max_s']}"]
    found = fit(load("twin-fit", FitConfig, settings))
    more = {"n": found["held_out"]} | {key: found[key] for key in ("photographs", "steps", "train_s", "gaussians")}
    return {
        "scan_held_out_psnr_db": figure(found["held_out_psnr_db"], "dB", **more),
        "scan_held_out_ssim": figure(found["held_out_ssim"], "", **more),
        "scan_held_out_edge_distance": figure(found["held_out_edge_distance"], "", **more),
    }


def check_cell(work: Path, size: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """On the photographs that the fit held out."""
    settings = [f"scene={work}/scene", f"photos=[{work}/photos]", f"device={device}", "limit_px=1000"]
    found = check(load("twin-check", CheckConfig, settings))
    return {"scan_check_error_px": figure(found["error_px"], "px", n=found["corners"], p90_px=found["error_p90_px"])}


def policy_pictures(work: Path, size: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Mean scores of both renderers' pictures beside the stand-in's, over states of a reach in unseen scenes."""
    from sim.expert import R_DOWN
    from sim.scan.arm import Reach
    from sim.scan.capture import CaptureConfig
    from sim.scan.stand_in import StandInPhotographer
    from sim.twin.replay_report import put
    from sim.twin.worker import Twin

    config = load("twin-capture", CaptureConfig, ["source=stand_in"])
    person, embodiment = StandInPhotographer(config.cell, config.embodiment), config.embodiment
    reach, rng = Reach(embodiment.home_joint_pos_rad, min_height_m=0.0), np.random.default_rng(0)
    states = []  # the photographer first: its GL context and SAPIEN's renderer do not share a process well
    for index in range(size["states"]):
        person.reset(FIRST_SEED + index)
        things = person.bodies(np.array(embodiment.home_joint_pos_rad), 0.08, ["cube", "plate"])
        xy_m = things["cube"][:2, 3], things["plate"][:2, 3]
        share, opening_m = rng.uniform(0, 1), rng.uniform(0.045, 0.08)
        T = pose.pose((1 - share) * np.array([0.42, 0.0, 0.3]) + share * np.array([*xy_m[0], 0.03]), R_DOWN)
        q = reach.joints(T)
        assert q is not None, f"the arm does not reach {T[:3, 3]}"
        states.append((T, opening_m, xy_m, {name: person.shoot(name, q, opening_m) for name in embodiment.cameras}))
    person.close()
    still = TwinConfig(randomization=Randomization(0.0, 0.0, 0.0, 0.0, 0.0, 0.0), home_noise_rad=0.0)
    shown = dataclasses.replace(still, render="splat", splat=SplatConfig(scene=str(work / "scene"), device=str(device)))
    found: dict[str, list[dict[str, float]]] = {}
    for render, config in {"sapien": still, "splat": shown}.items():
        twin = Twin(config, embodiment)
        for T, opening_m, xy_m, seen in states:
            put(twin, T, opening_m, xy_m)
            for camera, picture in twin.pictures().items():
                small = area_resize(seen[camera][None], picture.shape[:2])[0]
                one = scores(torch.from_numpy(picture), torch.from_numpy(small))
                found.setdefault(f"{render} {camera}", []).append(one)
    figures = {}
    for camera in embodiment.cameras:
        for key, unit, lower in (("psnr_db", "dB", False), ("ssim", "", False), ("edge_distance", "", True)):
            ours, peer = (float(np.mean([one[key] for one in found[f"{r} {camera}"]])) for r in ("splat", "sapien"))
            figures[f"policy_{camera}_{key}"] = figure(ours, unit, peer, "SAPIEN's pictures", lower, n=size["states"])
    return figures


PARTS = {
    "calibrate": calibrate,
    "photograph": photograph,
    "fit": fit_cell,
    "check": check_cell,
    "policy": policy_pictures,
}

if __name__ == "__main__":
    main()
