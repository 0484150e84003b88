"""The stand-in cell an episode at a time in this process, as fast as it goes: for a thousand trials, not for the robot.

Scene, physics, hand, cameras and inverse kinematics are the cell's own. What is left out: the robot's protocol, the
ROS graph, and the time that a policy takes to answer. In between the arm is moved by plans like the robot side's.
"""

from dataclasses import dataclass

import mujoco
import numpy as np

from bridge import pose
from bridge.embodiment import Embodiment
from bridge.pictures import area_resize
from sim.arm_plans import ArmPlans
from sim.stand_in.config import CellConfig
from sim.stand_in.gripper import MOVE_FORCE_N, SQUEEZE_M
from sim.stand_in.kinematics import ArmKinematics
from sim.stand_in.scene import PictureMaker
from sim.stand_in.world import Drive, World

STEP_S = 0.001
SOLVED_TICKS = 10  # between two solutions the joints' target goes straight
GRIPPER_SPEED_M_S = 0.1
MIN_GRIPPER_COMMAND = 0.1  # smaller ones change nothing, as on the robot


@dataclass(frozen=True)
class CellFacts:
    """Privileged truth after a policy step, by the names of the twin's facts. Poses [4, 4] in base."""

    T_base_tcp: np.ndarray
    T_base_target: np.ndarray
    gripper_opening_m: float
    object_pos_m: np.ndarray
    object_yaw_rad: float
    goal_pos_m: np.ndarray
    success: bool


class LockStepCell:
    """Answers to what `sim.twin.worker.Twin` answers to. `picture_size` (height, width): what pictures are averaged
    down to; None: as the cameras take them. One thread makes and uses it (it owns a GL context).
    """

    def __init__(
        self,
        config: CellConfig,
        embodiment: Embodiment,
        max_steps: int = 100,
        picture_size: tuple[int, int] | None = None,
        workspace_m: tuple[list[float], list[float]] = ([0.20, -0.45, 0.018], [0.75, 0.45, 0.75]),
    ):
        self.embodiment, self.max_steps, self.picture_size = embodiment, max_steps, picture_size
        self.instruction = next(iter(embodiment.instructions), "")
        self.rest_height_m = config.bodies.cube_side_m / 2
        self._lower_m, self._upper_m = np.array(workspace_m[0]), np.array(workspace_m[1])
        self._world = World(config, embodiment)
        self._kinematics, self._plans = ArmKinematics(), ArmPlans()
        self._maker: PictureMaker | None = None  # when somebody asks for a picture
        self._ticks = round(1.0 / (embodiment.policy_rate_hz * STEP_S))
        self.seed, self.steps, self.ended = -1, 0, True

    @property
    def env(self) -> "LockStepCell":
        """The twin keeps `policy_step` one storey further down."""
        return self

    def reset(self, seed: int) -> None:
        """Begin the episode of `seed`, arm at home, hand open: the scene that `cotwin cell` has for the seed."""
        world, e = self._world, self.embodiment
        home = np.array(e.home_joint_pos_rad)
        mujoco.mj_resetData(world.model, world.data)
        world.set_drive(Drive.POSITION)
        world.set_hand_force(MOVE_FORCE_N)
        world.q[:], world.fingers_m[:] = home, e.gripper_open_m / 2
        world.reset(seed, force=True)
        self._q_target = home.copy()
        self._plans.hold(home)
        pos_m, R = self._kinematics.forward(home)
        self.T_base_target = pose.pose(pos_m, R)
        self._goal_width_m = world.width_target[0] = e.gripper_open_m
        self.seed, self.steps, self.ended = seed, 0, False
        self.facts = self._facts()

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Reward, terminated, truncated of one policy step."""
        assert not self.ended, "step after the end of an episode"
        self.facts = self.policy_step(np.asarray(action, dtype=np.float64))
        self.steps += 1
        truncated = not self.facts.success and self.steps >= self.max_steps
        self.ended = self.facts.success or truncated
        return float(self.facts.success), self.facts.success, truncated

    def policy_step(self, action: np.ndarray) -> CellFacts:
        """One action [7], clipped to step limits and workspace, over one policy period."""
        e, T_from = self.embodiment, self.T_base_target
        limit = np.repeat([e.max_translation_m, e.max_rotation_rad], 3)
        T = pose.integrate(T_from, np.append(np.clip(action[:6], -limit, limit), action[6]))
        lower, upper = np.minimum(self._lower_m, T_from[:3, 3]), np.maximum(self._upper_m, T_from[:3, 3])
        T[:3, 3] = np.clip(T[:3, 3], lower, upper)
        self.T_base_target = T
        self._command_hand(float(action[6]))
        for tick in range(self._ticks):
            if tick % SOLVED_TICKS == 0:
                q_from, until = self._q_target.copy(), min(tick + SOLVED_TICKS, self._ticks)
                path = pose.interpolate(T_from, T, until / self._ticks)
                for _ in range(2):  # made for a millisecond's way, not for ten
                    self._kinematics.solve(self._q_target, path[:3, 3], path[:3, :3], None)
                q_step = (self._q_target - q_from) / (until - tick)
            q_from = q_from + q_step
            self._plans.follow(q_from, STEP_S)
            self._tick()
        return self._facts()

    def pictures(self) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] for each camera."""
        if self._maker is None:
            self._maker = PictureMaker(self._world.model)
        self._maker.set_state(self._world.data.qpos, self._world.data.mocap_pos[0])
        taken = {}
        for name, camera in self.embodiment.cameras.items():
            picture = np.empty((camera.height, camera.width, 3), np.uint8)
            self._maker.render(name, picture)
            taken[name] = picture if self.picture_size is None else area_resize(picture[None], self.picture_size)[0]
        return taken

    @property
    def state(self) -> np.ndarray:
        """The observation's `state`, float32 [7]."""
        return pose.state_vector(self.facts.T_base_tcp, self.facts.gripper_opening_m)

    def _command_hand(self, value: float) -> None:
        if abs(value) <= MIN_GRIPPER_COMMAND:
            return
        goal_m = SQUEEZE_M if value < 0 else float(self.embodiment.gripper_opening_m(value))
        if goal_m != self._goal_width_m:
            self._goal_width_m = goal_m
            self._world.set_hand_force(MOVE_FORCE_N)
            self._world.width_target[0] = self._world.width_m

    def _tick(self) -> None:
        world, plans = self._world, self._plans
        world.follow(np.array(plans.q_rad), np.array(plans.dq_rad_s), np.array(plans.ddq_rad_s2))
        target, step_m = world.width_target, GRIPPER_SPEED_M_S * STEP_S
        target[0] += min(max(self._goal_width_m - target[0], -step_m), step_m)
        world.step()

    def _facts(self) -> CellFacts:
        world, poses = self._world, self._world.poses()
        cube = poses["cube"]
        return CellFacts(
            T_base_tcp=poses["tcp"],
            T_base_target=self.T_base_target.copy(),
            gripper_opening_m=world.width_m,
            object_pos_m=cube[:3, 3].copy(),
            object_yaw_rad=float(np.arctan2(cube[1, 0], cube[0, 0])),
            goal_pos_m=poses["plate"][:3, 3].copy(),
            success=world.success(),
        )
