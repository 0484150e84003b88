"""A toy cell for the learner's tests: no physics, flat pictures, the real cameras' geometry and the real expert.

The TCP follows its target with a lag, a cube near closed fingers sticks to them, and pictures are coloured polygons.
`ToyVectorEnv` has the vector twin's interface (learner.rollouts.VectorEnv).
"""

from dataclasses import dataclass

import cv2
import numpy as np
import yaml

from bridge import pose
from bridge.config import CONFIG_DIR
from bridge.embodiment import Embodiment
from sim.expert import PickPlaceExpert

HALF_M = 0.02
CORNERS_M = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * HALF_M


def tabletop() -> Embodiment:
    document = yaml.safe_load((CONFIG_DIR / "embodiment" / "fr3_tabletop.yaml").read_text())
    return Embodiment.from_dict(document)


class ToyCell:
    """One scene. Cube and plate lie on the plane z = 0 of the base frame."""

    def __init__(self, embodiment: Embodiment, size: tuple[int, int] = (96, 128)):
        self.embodiment, self.size = embodiment, size

    def reset(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.T_target = pose.pose([0.42, 0.0, 0.30], np.diag([1.0, -1.0, -1.0]))
        self.T_tcp = self.T_target.copy()
        self.opening_m = 0.08
        self.cube_m = np.array([rng.uniform(0.35, 0.5), rng.uniform(-0.15, 0.05), HALF_M])
        self.plate_m = np.array([rng.uniform(0.38, 0.48), rng.uniform(0.17, 0.25), 0.01])
        self.held_from_tcp_m = None

    def step(self, action: np.ndarray) -> None:
        self.T_target = pose.integrate(self.T_target, action)
        self.T_tcp = pose.interpolate(self.T_tcp, self.T_target, 0.8)
        goal_m = float(self.embodiment.gripper_opening_m(action[6]))
        floor_m = 2 * HALF_M if self._between_fingers() or self.held_from_tcp_m is not None else 0.0
        self.opening_m += float(np.clip(max(goal_m, floor_m) - self.opening_m, -0.03, 0.03))
        if self.held_from_tcp_m is None and goal_m < 0.03 and self.opening_m <= 2 * HALF_M and self._between_fingers():
            self.held_from_tcp_m = self.cube_m - self.T_tcp[:3, 3]
        if self.held_from_tcp_m is not None:
            if self.opening_m > 2 * HALF_M + 0.005:
                self.held_from_tcp_m = None
                on_plate = np.linalg.norm((self.cube_m - self.plate_m)[:2]) < 0.06
                self.cube_m[2] = HALF_M + (self.plate_m[2] if on_plate else 0.0)
            else:
                self.cube_m = self.T_tcp[:3, 3] + self.held_from_tcp_m

    def _between_fingers(self) -> bool:
        away_m = np.abs(self.cube_m - self.T_tcp[:3, 3])
        return bool(away_m[0] < 0.018 and away_m[1] < 0.018 and away_m[2] < 0.02)

    @property
    def success(self) -> bool:
        away_m = np.linalg.norm((self.cube_m - self.plate_m)[:2])
        return bool(self.held_from_tcp_m is None and away_m < 0.05 and self.cube_m[2] > HALF_M + 0.005)

    @property
    def state(self) -> np.ndarray:
        return pose.state_vector(self.T_tcp, self.opening_m)

    def pictures(self) -> dict[str, np.ndarray]:
        return {name: self._draw(name) for name in self.embodiment.cameras}

    def _draw(self, name: str) -> np.ndarray:
        height, width = self.size
        camera = self.embodiment.cameras[name]
        T_base_cam = (self.T_tcp if camera.mount == "tcp" else np.eye(4)) @ camera.matrix
        shrink = np.diag([width / camera.width, height / camera.height, 1.0])
        picture = np.full((height, width, 3), (120, 110, 100), np.uint8)
        angle = np.linspace(0, 2 * np.pi, 16)
        plate = self.plate_m + 0.07 * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=-1)
        finger = np.array([[x, y, z] for x in (-0.01, 0.01) for y in (-0.006, 0.006) for z in (-0.05, 0.0)])
        shapes = [(plate, (230, 230, 230)), (self.cube_m + CORNERS_M, (200, 40, 40))]
        for side in (-1, 1):
            corners = finger + [0, side * (self.opening_m / 2 + 0.006), 0]
            shapes.append((corners @ self.T_tcp[:3, :3].T + self.T_tcp[:3, 3], (40, 40, 50)))
        for points, colour in shapes:
            in_camera = (points - T_base_cam[:3, 3]) @ T_base_cam[:3, :3]
            if in_camera[:, 2].min() < 0.02:
                continue
            pixels = in_camera @ (shrink @ camera.intrinsics).T
            hull = cv2.convexHull((16 * pixels[:, :2] / pixels[:, 2:]).astype(np.int32))
            cv2.fillConvexPoly(picture, hull, colour, lineType=cv2.LINE_AA, shift=4)
        return picture


def demonstration(embodiment: Embodiment, seed: int, noise_m: float = 0.0, size: tuple[int, int] = (96, 128)) -> dict:
    """One expert episode: images {name: [n, H, W, 3]}, state and action [n, 7], success. `noise_m` moves the target
    now and then."""
    cell, expert = ToyCell(embodiment, size), PickPlaceExpert(embodiment, seed)
    cell.reset(seed)
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(120):
        if noise_m and rng.random() < 0.1:
            cell.T_target[:3, 3] += rng.normal(0, noise_m, 3)
        action = expert.act(cell.T_target, cell.opening_m, cell.cube_m, cell.plate_m)
        rows.append((cell.pictures(), cell.state, action))
        if expert.done:
            break
        cell.step(action)
    images = {name: np.stack([row[0][name] for row in rows]) for name in embodiment.cameras}
    states, actions = np.stack([row[1] for row in rows]), np.stack([row[2] for row in rows])
    return {"images": images, "state": states, "action": actions, "success": cell.success}


@dataclass
class Views:
    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: list[str]
    instruction: list[str]


@dataclass
class ChunkResult:
    observation: Views
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    success: np.ndarray
    episode_len: np.ndarray
    seeds: np.ndarray
    lost: np.ndarray


class ToyVectorEnv:
    """Toy cells behind the vector twin's interface (without automatic resets)."""

    def __init__(self, embodiment: Embodiment, num_envs: int, max_steps: int = 80, size: tuple[int, int] = (96, 128)):
        self.cells = [ToyCell(embodiment, size) for _ in range(num_envs)]
        self.num_envs, self.max_steps = num_envs, max_steps
        self.seeds = np.zeros(num_envs, np.int64)
        self.steps = np.zeros(num_envs, np.int64)

    def reset(self, seeds, env_ids=None):
        ids = self._ids(env_ids)
        for env, seed in zip(ids, seeds, strict=True):
            self.cells[env].reset(int(seed))
            self.seeds[env], self.steps[env] = seed, 0
        return self._observe(ids)

    def _ids(self, env_ids):
        return list(range(self.num_envs)) if env_ids is None else list(env_ids)

    def _observe(self, ids):
        pictures = [self.cells[env].pictures() for env in ids]
        images = {name: np.stack([p[name] for p in pictures]) for name in pictures[0]}
        words = self.cells[0].embodiment.instructions[:1] * len(ids)
        return Views(images, np.stack([self.cells[env].state for env in ids]), words)

    def step_chunk(self, actions: np.ndarray, env_ids=None) -> ChunkResult:
        ids = self._ids(env_ids)
        reward = np.zeros(actions.shape[:2], np.float32)
        terminated, truncated, valid = (np.zeros(actions.shape[:2], bool) for _ in range(3))
        for row, env in enumerate(ids):
            cell = self.cells[env]
            for step, action in enumerate(actions[row]):
                cell.step(action)
                self.steps[env] += 1
                valid[row, step], terminated[row, step] = True, cell.success
                truncated[row, step] = not cell.success and self.steps[env] >= self.max_steps
                reward[row, step] = float(cell.success)
                if terminated[row, step] or truncated[row, step]:
                    break
        return ChunkResult(
            observation=self._observe(ids),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            valid=valid,
            success=terminated.any(1),
            episode_len=self.steps[ids].copy(),
            seeds=self.seeds[ids].copy(),
            lost=np.zeros(len(ids), bool),
        )

    def send(self, actions: np.ndarray, env_ids=None) -> None:
        self._answer = self.step_chunk(actions, env_ids)

    def recv(self) -> ChunkResult:
        return self._answer

    def close(self) -> None:
        pass
