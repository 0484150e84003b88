"""The moving cell: the scene's state, one millisecond a step, seeded resets, and what a person would judge by eye."""

from enum import Enum

import mujoco
import numpy as np

from bridge.embodiment import Embodiment
from bridge.pose import pose
from sim.stand_in.config import CellConfig
from sim.stand_in.errors import ResetRefused
from sim.stand_in.scene import PHYSICS_STEP_S, POSITION_GROUP, TORQUE_GROUP, build_model, set_site

FEEDFORWARD_SHARE = 0.2  # of the newest acceleration, each millisecond: second differences are rough


class Drive(Enum):
    POSITION = "position"  # joint position and velocity servos
    TORQUE = "torque"  # plain torques, gravity compensated


class World:
    """MuJoCo state and views of it. Poses are [4, 4] in base; `q` and `dq` are the arm's 7 joints, live views."""

    def __init__(self, config: CellConfig, embodiment: Embodiment):
        self.config = config
        self.model = build_model(config, embodiment)
        self.data = mujoco.MjData(self.model)
        data = self.data
        self.q, self.dq = data.qpos[:7], data.qvel[:7]
        self.fingers_m, self.finger_speeds_m_s = data.qpos[7:9], data.qvel[7:9]
        self.position_target, self.velocity_target, self.torque = data.ctrl[0:7], data.ctrl[7:14], data.ctrl[14:21]
        self.width_target = data.ctrl[21:22]
        self.servo_torque, self.gravity_torque = data.qfrc_actuator[:7], data.qfrc_gravcomp[:7]
        self.contact_torque = data.qfrc_constraint[:7]  # of the surroundings on the joints
        self._acceleration, self._inertial_force = np.zeros(self.model.nv), np.zeros(self.model.nv)
        self._ee = self.model.site("ee").id
        self.ee_pos_m, self.ee_rot = data.site_xpos[self._ee], data.site_xmat[self._ee].reshape(3, 3)
        self._geoms = {name: self.model.geom(name).id for name in ("cube", "plate", "left_tip", "right_tip")}
        self._cube_body, self._hand = self.model.body("cube").id, self.model.site("ee").bodyid[0]
        self.pull_n = np.zeros(3)
        self._arm_bodies = set(range(1, self.model.body("right_finger").id + 1))
        home = np.array(embodiment.home_joint_pos_rad)
        self.q[:], self.position_target[:] = home, home
        self.fingers_m[:], self.width_target[0] = embodiment.gripper_open_m / 2, embodiment.gripper_open_m
        self.set_drive(Drive.POSITION)
        self.reset(0)

    # --- motion ------------------------------------------------------------------------------------------------------

    def set_drive(self, drive: Drive) -> None:
        self._acceleration[:] = self.data.qfrc_applied[:7] = 0.0
        self.model.opt.disableactuator = 1 << (TORQUE_GROUP if drive is Drive.POSITION else POSITION_GROUP)

    def set_joint_stiffness(self, stiffness_nm: np.ndarray) -> None:
        """Servo gains of the seven joints; damping follows."""
        self.model.actuator_gainprm[:7, 0] = stiffness_nm
        self.model.actuator_biasprm[:7, 1] = -np.asarray(stiffness_nm)

    def set_hand_force(self, limit_n: float) -> None:
        self.model.actuator_forcerange[21] = (-limit_n, limit_n)

    def set_ee(self, T_hand_ee: np.ndarray) -> None:
        """Where the end effector sits on the hand body."""
        set_site(self.model, self._ee, T_hand_ee)

    def follow(self, q_d: np.ndarray, dq_d: np.ndarray, ddq_d: np.ndarray) -> None:
        """Servo targets, and the torque of the planned acceleration, without which the arm trails by millimetres."""
        self.position_target[:], self.velocity_target[:] = q_d, dq_d
        self._acceleration[:7] += FEEDFORWARD_SHARE * (ddq_d - self._acceleration[:7])
        mujoco.mj_mulM(self.model, self.data, self._inertial_force, self._acceleration)
        self.data.qfrc_applied[:7] = self._inertial_force[:7]

    def pull(self, force_n: np.ndarray) -> None:
        """A force [3] on the TCP, base frame, until told otherwise."""
        self.pull_n = np.array(force_n, dtype=np.float64)
        self.data.xfrc_applied[self._hand] = 0.0

    def step(self) -> None:
        """One millisecond, ending with poses and contacts that belong to the new state."""
        if self.pull_n.any():
            lever_m = self.ee_pos_m - self.data.xipos[self._hand]
            self.data.xfrc_applied[self._hand] = *self.pull_n, *np.cross(lever_m, self.pull_n)
        mujoco.mj_step2(self.model, self.data)
        mujoco.mj_step1(self.model, self.data)

    @property
    def time_s(self) -> float:
        return self.data.time

    @property
    def width_m(self) -> float:
        return float(self.fingers_m[0] + self.fingers_m[1])

    # --- what a person does and sees ---------------------------------------------------------------------------------

    def reset(self, seed: int, force: bool = False) -> None:
        """Put cube and plate where `seed` says; the arm stays. The same seed gives the same scene to the last bit.

        Raises ResetRefused, with nothing moved, when the hand holds the cube or the arm is in the way, unless forced.
        """
        if not force and self.cube_is_held():
            raise ResetRefused("the hand holds the cube: open it first, or reset with force=True")
        before = self.data.qpos.copy(), self.data.qvel.copy(), self.data.mocap_pos.copy()
        layout, bodies, rng = self.config.layout, self.config.bodies, np.random.default_rng(seed)
        cube = np.array(layout.cube_pos_m) + rng.uniform(-1, 1, 2) * np.array(layout.cube_spread_m)
        plate = np.array(layout.plate_pos_m) + rng.uniform(-1, 1, 2) * np.array(layout.plate_spread_m)
        yaw = rng.uniform(-1, 1) * layout.cube_yaw_spread_rad
        self.data.qpos[9:] = [*cube, bodies.cube_side_m / 2, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        self.data.qvel[9:] = 0.0
        self.data.mocap_pos[0] = [*plate, bodies.plate_thickness_m]
        self.data.qacc_warmstart[:] = 0.0
        mujoco.mj_step1(self.model, self.data)
        if not force and self._arm_touches_cube():
            self.data.qpos[:], self.data.qvel[:], self.data.mocap_pos[:] = before
            mujoco.mj_step1(self.model, self.data)
            raise ResetRefused("the arm stands where the cube should go: drive it home first, or reset with force=True")

    def poses(self) -> dict[str, np.ndarray]:
        """`cube` (its centre), `plate` (centre of its upper side), `tcp`: float64 [4, 4] in base."""
        data, plate = self.data, self.model.body("plate").id
        return {
            "cube": pose(data.xpos[self._cube_body], data.xmat[self._cube_body].reshape(3, 3)),
            "plate": pose(data.xpos[plate], data.xmat[plate].reshape(3, 3)),
            "tcp": pose(self.ee_pos_m, self.ee_rot),
        }

    def cube_is_held(self) -> bool:
        """Both fingertips touch the cube."""
        touched = self._touched_by("cube")
        return {self._geoms["left_tip"], self._geoms["right_tip"]} <= touched

    def success(self) -> bool:
        """The cube lies on the plate, near its centre, still, and the arm does not touch it."""
        task, data = self.config.task, self.data
        offset = data.xpos[self._cube_body] - data.mocap_pos[0]
        height_error = abs(offset[2] - self.config.bodies.cube_side_m / 2)
        return bool(
            np.hypot(offset[0], offset[1]) <= task.max_distance_m
            and height_error <= task.max_height_error_m
            and np.linalg.norm(data.qvel[9:12]) <= task.max_speed_m_s
            and self._geoms["plate"] in self._touched_by("cube")
            and not self._arm_touches_cube()
        )

    def _touched_by(self, name: str) -> set[int]:
        """Geoms in contact with the named one."""
        geom = self._geoms[name]
        pairs = self.data.contact.geom
        return set(pairs[(pairs == geom).any(axis=1)].ravel().tolist()) - {geom}

    def _arm_touches_cube(self) -> bool:
        return any(int(self.model.geom_bodyid[geom]) in self._arm_bodies for geom in self._touched_by("cube"))


assert PHYSICS_STEP_S == 0.001, "the robot's state counts milliseconds"
