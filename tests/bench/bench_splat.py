"""Splat pictures of many environments: ours beside a loop over environments and beside N copies in one scene.

    python -m tests.bench.bench_splat --out docs/results/splat.json        # one CUDA GPU; torch, triton, gsplat
    python -m tests.bench.bench_splat --tiny --out /tmp/splat.json         # a small scene on the CPU

The scene is a procedural arm with hand, cube and plate (13 segments, degree 3), its joints and objects different in
every environment. Peers: `loop`, one environment after the other, by our renderer and by stock gsplat, of which the
faster is the peer; `copies`, N copies of the cloud on a 5 m grid in one scene, four cameras a call, of one colour for
each Gaussian (no spherical harmonics at all). Times are medians, device synchronised (on the CPU:
the process's own time); pictures stay on the device.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sim.splat import harmonics, sample
from sim.splat.cloud import GaussianCloud, merge, multiply_wxyz, quat_wxyz_from_matrix
from sim.splat.render import Cameras, invert_rigid, render
from tests.sim.splat.scenes import with_sheen

# FR3, modified Denavit-Hartenberg: a (m), d (m), alpha (rad) of joints 1 to 7
DH = [
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -np.pi / 2),
    (0.0, 0.316, np.pi / 2),
    (0.0825, 0.0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0.0, 0.0, np.pi / 2),
    (0.088, 0.0, np.pi / 2),
]
HOME_RAD = np.array([0.0, -0.2754, 0.0, -2.5895, 0.0, 2.3141, 0.785398])
CAMERAS_A_CALL = 4  # of the `copies` peer
GRID_M = 5.0
GREY = (0.35, 0.4, 0.45)


@dataclass
class Bench:
    """Sizes, device, and what was found."""

    device: torch.device
    num_gaussians: int
    size_px: int
    num_envs: int
    scaling: list[int]
    copies: list[int]
    repeats: int
    figures: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def milliseconds(self, step: Callable[[], Any], repeats: int | None = None) -> float:
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time  # laptops do other things too
        times = []
        for _ in range(2 + (repeats or self.repeats)):
            self.synchronise()
            start = clock()
            step()
            self.synchronise()
            times.append(clock() - start)
        return 1e3 * statistics.median(times[2:])

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def record(self, name: str, ours: float, peer: float | None, unit: str, peer_name: str, n: int, **more) -> None:
        ratio = peer / ours if peer else None
        figure = {"ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "peer_name": peer_name, "n": n, **more}
        self.figures[name] = figure
        print(f"{name}: {figure}", flush=True)


def arm_cloud(num: int, degree: int = 3) -> GaussianCloud:
    """`num` Gaussians on eight links, hand, two fingers, cube and plate."""
    white, dark = (0.9, 0.9, 0.92), (0.25, 0.25, 0.27)
    parts = [sample.cylinder(0.075, 0.22, round(0.1 * num), white, "link0")]
    parts += [sample.cylinder(0.06, 0.2, round(0.09 * num), white, f"link{i}") for i in range(1, 8)]
    parts += [sample.box((0.06, 0.2, 0.07), round(0.09 * num), dark, "hand")]
    parts += [sample.box((0.02, 0.02, 0.055), round(0.03 * num), dark, f"finger{i}") for i in range(2)]
    parts += [sample.box((0.04, 0.04, 0.04), round(0.04 * num), (0.8, 0.15, 0.1), "cube")]
    parts += [sample.cylinder(0.08, 0.02, num - sum(map(len, parts)), (0.95, 0.95, 0.85), "plate")]
    return with_sheen(merge(parts), degree, 0.05, seed=0) if degree else merge(parts)


def segment_poses(num_envs: int, seed: int = 0) -> Tensor:
    """T_world_segment float64 [N, 13, 4, 4]: random joints near home, random cube and plate."""
    rng = np.random.default_rng(seed)
    q = HOME_RAD + rng.normal(0, 0.25, (num_envs, 7))
    frames = [np.tile(np.eye(4), (num_envs, 1, 1))]
    for joint, (a_m, d_m, alpha) in enumerate(DH):
        frames.append(frames[-1] @ _link(a_m, d_m, alpha, q[:, joint]))
    hand = frames[-1] @ _link(0.0, 0.107 + 0.035, 0.0, np.full(num_envs, -np.pi / 4))
    opening = rng.uniform(0.01, 0.04, num_envs)
    fingers = [hand @ _shift(np.stack([0 * opening, side * opening, 0 * opening + 0.05], axis=1)) for side in (-1, 1)]
    cube = np.stack([rng.uniform(0.3, 0.5, num_envs), rng.uniform(0.1, 0.25, num_envs), np.full(num_envs, 0.02)], 1)
    plate = np.stack([rng.uniform(0.4, 0.5, num_envs), rng.uniform(-0.1, 0.0, num_envs), np.full(num_envs, 0.01)], 1)
    return torch.from_numpy(np.stack([*frames, hand, *fingers, _shift(cube), _shift(plate)], axis=1))


def _link(a_m: float, d_m: float, alpha: float, theta: np.ndarray) -> np.ndarray:
    c, s, ca, sa, zero = np.cos(theta), np.sin(theta), np.cos(alpha), np.sin(alpha), 0 * theta
    rows = [
        [c, -s, zero, zero + a_m],
        [s * ca, c * ca, zero - sa, zero - d_m * sa],
        [s * sa, c * sa, zero + ca, zero + d_m * ca],
        [zero, zero, zero, zero + 1],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _shift(xyz_m: np.ndarray) -> np.ndarray:
    T = np.tile(np.eye(4), (len(xyz_m), 1, 1))
    T[:, :3, 3] = xyz_m
    return T


def third_person(num_envs: int, size_px: int, device: torch.device, seed: int = 0) -> Cameras:
    """One camera an environment, beside the table, each a centimetre or so elsewhere."""
    rng = np.random.default_rng(seed)
    T = np.tile(np.eye(4), (num_envs, 1, 1, 1))
    for n in range(num_envs):
        eye = np.array([1.05, 0.42, 0.52]) + rng.normal(0, 0.01, 3)
        z = np.array([0.35, 0.05, 0.2]) - eye
        z /= np.linalg.norm(z)
        x = np.cross(z, [0, 0, 1.0])
        x /= np.linalg.norm(x)
        T[n, 0, :3] = np.stack([x, np.cross(z, x), z, eye], axis=1)
    focal = 1.25 * size_px
    K = torch.tensor([[focal, 0, (size_px - 1) / 2], [0, focal, (size_px - 1) / 2], [0, 0, 1]], device=device)
    return Cameras(K.expand(num_envs, 1, 3, 3), torch.from_numpy(T).to(device), size_px, size_px)


@dataclass
class World:
    """One scene in the world's frame, as gsplat's own front door wants it."""

    means_m: Tensor
    quats_wxyz: Tensor
    scales_m: Tensor
    opacities: Tensor

    @classmethod
    def of(cls, cloud: GaussianCloud, T_world_segment: Tensor) -> "World":
        """`T_world_segment` [S, 4, 4]."""
        T = T_world_segment.float()
        quats = quat_wxyz_from_matrix(T[:, :3, :3])[cloud.segment_ids]
        T = T[cloud.segment_ids]
        means = (T[:, :3, :3] * cloud.means_m[:, None]).sum(dim=-1) + T[:, :3, 3]
        return cls(means, multiply_wxyz(quats, cloud.quats_wxyz), cloud.log_scales.exp(), cloud.opacities)

    @torch.no_grad()
    def render(self, cameras: Cameras, colours: Tensor, degree: int | None) -> Tensor:
        """rgb [M, H, W, 3] over black. `colours` [G, 3], or coefficients of `degree`, whose directions gsplat does not
        turn with the segments: right for timing, wrong in the picture."""
        import gsplat

        K = cameras.K[0].float().clone()
        K[:, :2, 2] += 0.5
        view = invert_rigid(cameras.T_world_cam[0]).float().contiguous()
        world = self.means_m, self.quats_wxyz, self.scales_m, self.opacities
        size = cameras.width, cameras.height
        return gsplat.rasterization(*world, colours, view, K, *size, sh_degree=degree, packed=False)[0]


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Pictures in [0, 1]; at most 120, where a picture equals the other."""
    return -10 * math.log10(max(1e-12, float(((a.cpu().double() - b.cpu().double()) ** 2).mean())))


def speed(bench: Bench) -> None:
    """`splat_b64_ms`, and the exponents."""
    cloud = arm_cloud(bench.num_gaussians).to(bench.device)
    times = {}
    for N in sorted({*bench.scaling, bench.num_envs}):
        T, cameras = segment_poses(N).to(bench.device), third_person(N, bench.size_px, bench.device)
        times[N] = bench.milliseconds(lambda T=T, cameras=cameras: render(cloud, T, cameras))
        print(f"ours, {N} environments: {times[N]:.3f} ms", flush=True)
    N = bench.num_envs
    T, cameras = segment_poses(N).to(bench.device), third_person(N, bench.size_px, bench.device)
    single = [cameras.select(slice(n, n + 1), slice(None)) for n in range(N)]
    loops = {"ours": bench.milliseconds(lambda: [render(cloud, T[n : n + 1], single[n]) for n in range(N)], 5)}
    if bench.device.type == "cuda":
        sh, degree = cloud.sh, cloud.degree
        loops["gsplat"] = bench.milliseconds(
            lambda: [World.of(cloud, T[n]).render(single[n], sh, degree) for n in range(N)], 5
        )
    best = min(loops, key=lambda name: loops[name])
    size = {"n": bench.repeats, "num_envs": N, "num_gaussians": len(cloud), "size_px": bench.size_px}
    bench.record(
        "splat_b64_ms", times[N], loops[best], "ms", f"loop over environments ({best})", **size, loops_ms=loops
    )
    slope = exponent({n: times[n] for n in bench.scaling})
    copies = {n: copies_ms(bench, cloud, n) for n in bench.copies}
    peer_name = f"N copies in one scene, {CAMERAS_A_CALL} cameras a call"
    bench.record("splat_b64_copies_ms", times[N], copies[N], "ms", peer_name, **size, copies_ms=copies)
    bench.record("splat_scaling_exponent", slope, exponent(copies), "", peer_name, bench.repeats, times_ms=times)


def profile(bench: Bench) -> None:
    """Where the time of a batch goes, and how much memory it takes."""
    if bench.device.type != "cuda":
        return
    cloud = arm_cloud(bench.num_gaussians).to(bench.device)
    T = segment_poses(bench.num_envs).to(bench.device)
    cameras = third_person(bench.num_envs, bench.size_px, bench.device)
    render(cloud, T, cameras)
    torch.cuda.reset_peak_memory_stats()
    render(cloud, T, cameras)
    bench.details["peak_gb_b64"] = torch.cuda.max_memory_allocated() / 1e9
    bench.details["kernels_us"] = kernel_times(lambda: render(cloud, T, cameras))


def copies_ms(bench: Bench, cloud: GaussianCloud, N: int) -> float:
    """Every camera against N copies of the cloud, moved together in each step."""
    side = math.ceil(math.sqrt(N))
    grid = np.array([[GRID_M * (n % side), GRID_M * (n // side), 0.0] for n in range(N)])
    shift = torch.from_numpy(_shift(grid)).to(bench.device)
    T = shift[:, None] @ segment_poses(N).to(bench.device)
    cameras = third_person(N, bench.size_px, bench.device)
    moved = Cameras(cameras.K.transpose(0, 1), (shift[:, None] @ cameras.T_world_cam).transpose(0, 1), *_size(cameras))
    names = tuple(f"{n}/{name}" for n in range(N) for name in cloud.segment_names)
    S = len(cloud.segment_names)
    scene = GaussianCloud(
        cloud.means_m.repeat(N, 1),
        cloud.quats_wxyz.repeat(N, 1),
        cloud.log_scales.repeat(N, 1),
        cloud.opacity_logits.repeat(N),
        cloud.sh[:, :1].repeat(N, 1, 1),
        (cloud.segment_ids + S * torch.arange(N, device=cloud.device)[:, None]).flatten(),
        names,
    )
    if bench.device.type == "cpu":
        return bench.milliseconds(lambda: render(scene, T.flatten(0, 1)[None], moved), 1)
    colours = harmonics.colours(scene.sh, torch.zeros_like(scene.means_m))

    def step() -> None:
        world = World.of(scene, T.flatten(0, 1))
        for first in range(0, N, CAMERAS_A_CALL):
            few = moved.select(slice(None), slice(first, first + CAMERAS_A_CALL))
            world.render(few, colours, None)

    return bench.milliseconds(step, 3)


def pictures(bench: Bench) -> None:
    """That all ways draw the same."""
    if bench.device.type == "cuda":
        num = min(16, bench.num_envs)
        cloud, T = arm_cloud(bench.num_gaussians).to(bench.device), segment_poses(num).to(bench.device)
        cameras = third_person(num, bench.size_px, bench.device)
        together = render(cloud, T, cameras).rgb
        single = [cameras.select(slice(n, n + 1), slice(None)) for n in range(num)]
        alone = [render(cloud, T[n : n + 1], single[n]).rgb for n in range(num)]
        worst = min(psnr_db(together[n], alone[n]) for n in range(num))
        bench.record("splat_batch_vs_single_psnr_db", worst, None, "dB", "one at a time", num)
        flat = arm_cloud(bench.num_gaussians, degree=0).to(bench.device)
        colours = harmonics.colours(flat.sh, torch.zeros_like(flat.means_m))
        stock = [World.of(flat, T[n]).render(single[n], colours, None) for n in range(num)]
        ours = render(flat, T, cameras).rgb
        worst = min(psnr_db(ours[n], stock[n]) for n in range(num))
        bench.record("splat_vs_stock_gsplat_psnr_db", worst, None, "dB", "gsplat.rasterization", num)
    small, T = arm_cloud(min(20_000, bench.num_gaussians)), segment_poses(4, seed=3)
    cameras = third_person(4, min(128, bench.size_px), torch.device("cpu"), seed=3)
    reference = render(small, T, cameras, background=torch.tensor(GREY), segments=True, backend="torch")
    on_device = Cameras(cameras.K.to(bench.device), cameras.T_world_cam.to(bench.device), *_size(cameras))
    fast = render(small.to(bench.device), T, on_device, background=torch.tensor(GREY), segments=True)
    worst = min(psnr_db(fast.rgb[n], reference.rgb[n]) for n in range(4))
    assert fast.segment is not None
    assert reference.segment is not None
    same = float(torch.eq(fast.segment.cpu(), reference.segment).float().mean())
    both = fast.depth_m.cpu().isfinite() & reference.depth_m.isfinite()
    depth_error_m = float((fast.depth_m.cpu()[both] - reference.depth_m[both]).abs().quantile(0.999))
    more = {"segment_agreement": same, "depth_error_m_p999": depth_error_m}
    bench.record("splat_cpu_reference_psnr_db", worst, None, "dB", "CPU reference", 4, **more)


def _size(cameras: Cameras) -> tuple[int, int]:
    return cameras.width, cameras.height


def exponent(times_ms: dict[int, float]) -> float:
    """Slope of log time over log N: 1 is linear."""
    if len(times_ms) < 2:
        return math.nan
    return float(np.polyfit(np.log(list(times_ms)), np.log(list(times_ms.values())), 1)[0])


def kernel_times(step: Callable[[], Any]) -> dict[str, float]:
    """The ten longest kernels of one call, us."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:10]
    return {event.key[:80]: round(event.self_device_time_total, 1) for event in events}


def machine(device: torch.device) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(memory),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small scene on the CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="recorded commit, where there is no git")
    args = parser.parse_args()
    if args.tiny:
        bench = Bench(torch.device("cpu"), 600, 48, 4, [2, 4, 8], [2, 4], 3)
    elif torch.cuda.is_available():
        bench = Bench(torch.device("cuda"), 200_000, 224, 64, [16, 32, 64, 128, 256], [16, 32, 64], 20)
    else:
        parser.error("no CUDA device; --tiny runs on the CPU")
    for part in (pictures, speed, profile):
        part(bench)
        result = {
            "name": "splat",
            "date": time.strftime("%Y-%m-%d"),
            "commit": args.commit or commit(),
            "command": "python -m tests.bench.bench_splat" + " --tiny" * args.tiny,
            "machine": machine(bench.device),
            "figures": bench.figures,
            "details": bench.details,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
