"""The twin's arm: ManiSkill's Panda with a controller that takes the contract's action.

The Panda of ManiSkill and the FR3 share one kinematic chain up to joint limits, so a TCP target means the same in both.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pinocchio as pin
import sapien
import torch
from gymnasium import spaces
from mani_skill import PACKAGE_ASSET_DIR
from mani_skill.agents.controllers import PDJointPosControllerConfig
from mani_skill.agents.controllers.pd_joint_pos import PDJointPosController
from mani_skill.agents.registration import register_agent
from mani_skill.agents.robots.panda.panda import Panda

from bridge import pose
from sim.arm_plans import ArmPlans

URDF = f"{PACKAGE_ASSET_DIR}/robots/panda/panda_v2.urdf"
CONTROL_MODE = "pd_ee_target_delta_pose"
DAMPING = 1e-8 * np.eye(6)  # of the Newton steps: keeps them finite at singular poses
IK_MAX_STEP_RAD = 0.3
MAX_JOINT_STEP_RAD = 0.5  # of a policy step: near a singular pose small steps of the TCP are large ones of joints
IK_STEPS = 20
IK_TOLERANCE = 1e-6  # m and rad


class ArmKinematics:
    """Forward and inverse kinematics of the TCP in the robot's base frame. `q` float64 [7] rad."""

    def __init__(self):
        full = pin.buildModelFromUrdf(URDF)
        fingers = [full.getJointId(name) for name in Panda.gripper_joint_names]
        self._model = pin.buildReducedModel(full, fingers, pin.neutral(full))
        self._data = self._model.createData()
        self._tcp = self._model.getFrameId(Panda.ee_link_name)
        self._lower, self._upper = self._model.lowerPositionLimit, self._model.upperPositionLimit

    def chain(self) -> tuple[np.ndarray, np.ndarray]:
        """[8, 4, 4]: each joint's frame in the one before at angle 0, then the TCP's in the last; joints turn about
        their own z axes. And rad [2, 7]: lower and upper limits."""
        assert all(joint.shortname() == "JointModelRZ" for joint in list(self._model.joints)[1:])
        places = [*list(self._model.jointPlacements)[1:], self._model.frames[self._tcp].placement]
        return np.array([place.homogeneous for place in places]), np.array([self._lower, self._upper])

    def forward(self, q: np.ndarray) -> np.ndarray:
        """`T_base_tcp` [4, 4]."""
        pin.framesForwardKinematics(self._model, self._data, np.asarray(q, dtype=np.float64))
        return self._data.oMf[self._tcp].homogeneous

    def solve(self, T_base_tcp: np.ndarray, q_near: np.ndarray) -> np.ndarray | None:
        """Joint angles near `q_near`, within limits, that reach the pose (damped Newton). None when they cannot."""
        goal, q = pin.SE3(T_base_tcp), np.array(q_near, dtype=np.float64)
        for _ in range(IK_STEPS):
            pin.computeJointJacobians(self._model, self._data, q)
            pin.updateFramePlacement(self._model, self._data, self._tcp)
            error = pin.log6(self._data.oMf[self._tcp].actInv(goal)).vector
            if np.abs(error).max() < IK_TOLERANCE:
                return q
            J = pin.getFrameJacobian(self._model, self._data, self._tcp, pin.ReferenceFrame.LOCAL)
            step = J.T @ np.linalg.solve(J @ J.T + DAMPING, error)
            q = np.clip(q + step / max(1.0, np.abs(step).max() / IK_MAX_STEP_RAD), self._lower, self._upper)
        return None


class TargetDeltaPoseController(PDJointPosController):
    """Six numbers of the contract's action, counted from the last commanded target (`bridge.pose.integrate`).

    As on the arm, the target moves evenly over the policy period instead of jumping. One scene at a time (CPU physics).
    `T_base_target` [4, 4] is the commanded TCP pose; the joints follow `delay_steps` physics steps late, by the arm's
    `plans`, or where there are none straight away.
    """

    config: "TargetDeltaPoseControllerConfig"
    delay_steps = 0
    plans: ArmPlans | None = None

    def _initialize_joints(self):
        super()._initialize_joints()
        self.kinematics = ArmKinematics()
        self._drives = [joint._objs[0].set_drive_target for joint in self.joints]
        self._speeds = [joint._objs[0].set_drive_velocity_target for joint in self.joints]
        self._step_s = self.articulation.px.timestep
        if self.config.acceleration_rad_s2:
            self.plans = ArmPlans(self.config.acceleration_rad_s2)
        self._limit = np.repeat([self.config.max_translation_m, self.config.max_rotation_rad], 3)
        self._lower_m, self._upper_m = np.array(self.config.workspace_lower_m), np.array(self.config.workspace_upper_m)

    def _initialize_action_space(self):
        limit = self._limit.astype(np.float32)
        self.single_action_space = spaces.Box(-limit, limit, dtype=np.float32)

    def reset(self):
        super().reset()
        self.hold(self.qpos[0].cpu().numpy().astype(np.float64))

    def hold(self, q: np.ndarray) -> None:
        """Take joint angles [7] as what was commanded last."""
        self.q_target = np.array(q, dtype=np.float64)
        self.T_base_target = self.kinematics.forward(self.q_target)
        self._path = deque([self.q_target] * self.delay_steps)
        self._q_goal = self.q_target
        if self.plans is not None:
            self.plans.hold(self.q_target)
            self._set(self._speeds, self.plans.dq_rad_s)
        self._set(self._drives, self.q_target.tolist())

    def set_action(self, action: torch.Tensor):
        self.move_target(action[0].cpu().numpy())

    def move_target(self, action: np.ndarray) -> None:
        """Integrate one action [6], clipped to step limits and workspace; the joints follow over the next policy
        period. Where no joint angles reach the target they stay as they are, and go on once it is back in reach."""
        step, position = np.clip(action, -self._limit, self._limit), self.T_base_target[:3, 3]
        # As on the arm: a target that starts outside the workspace may come back, but not go further out.
        lower, upper = np.minimum(self._lower_m, position), np.maximum(self._upper_m, position)
        self.T_base_target[:3, 3] = np.clip(position + step[:3], lower, upper)
        if step[3:].any():
            self.T_base_target[:3, :3] = self.T_base_target[:3, :3] @ pose.matrix_from_rpy(step[3:])
        q_start, q_next = self.q_target.copy(), self.kinematics.solve(self.T_base_target, self.q_target)
        if q_next is not None:
            change = q_next - q_start
            self.q_target = q_start + change / max(1.0, np.abs(change).max() / MAX_JOINT_STEP_RAD)
        share = np.arange(1, self._sim_steps + 1)[:, None] / self._sim_steps
        self._path.extend(q_start + share * (self.q_target - q_start))

    def before_simulation_step(self):
        if self._path:
            self._q_goal = self._path.popleft()
            if self.plans is None:
                self._set(self._drives, self._q_goal.tolist())
        if self.plans is not None:
            self.plans.follow(self._q_goal, self._step_s)
            self._set(self._drives, self.plans.q_rad)
            self._set(self._speeds, self.plans.dq_rad_s)

    def _set(self, setters: list, values: list[float]) -> None:
        for setter, value in zip(setters, values, strict=True):
            setter(value)

    def get_state(self) -> dict:
        return {}


@dataclass
class TargetDeltaPoseControllerConfig(PDJointPosControllerConfig):
    acceleration_rad_s2: float = 0.0  # of plans; 0: none
    max_translation_m: float = 0.1
    max_rotation_rad: float = 0.1
    workspace_lower_m: Sequence[float] = (-np.inf,) * 3
    workspace_upper_m: Sequence[float] = (np.inf,) * 3
    controller_cls = TargetDeltaPoseController


class GripperController(PDJointPosController):
    """One number in [-1, 1] to both fingers: -1 closed, +1 open, linear in opening, at the hand's own speed."""

    config: "GripperControllerConfig"
    delay_steps = 0

    def _initialize_action_space(self):
        self.single_action_space = spaces.Box(np.float32([-1.0]), np.float32([1.0]), dtype=np.float32)

    def _initialize_joints(self):
        super()._initialize_joints()
        self._drives = [joint._objs[0].set_drive_target for joint in self.joints]
        self._finger_step_m = 0.5 * self.config.speed_m_s * self.articulation.px.timestep

    def reset(self):
        super().reset()
        self.hold(float(self.qpos[0].mean()))

    def hold(self, finger_m: float) -> None:
        self._finger_goal_m = self._finger_m = finger_m
        self._late: deque[tuple[int, float]] = deque()  # physics steps to wait, and then the goal
        self._waited = 0
        self._drive()

    def set_action(self, action: torch.Tensor):
        self.command(float(action[0, 0]))

    def command(self, value: float) -> None:
        share = 0.5 * (min(max(value, -1.0), 1.0) + 1.0)
        goal_m = 0.5 * (self.config.closed_m + share * (self.config.open_m - self.config.closed_m))
        self._late.append((self._waited + self.delay_steps, goal_m))

    def before_simulation_step(self):
        if self._late and self._late[0][0] <= self._waited:
            self._finger_goal_m = self._late.popleft()[1]
        self._waited += 1
        to_go_m = self._finger_goal_m - self._finger_m
        if to_go_m:
            self._finger_m += min(max(to_go_m, -self._finger_step_m), self._finger_step_m)
            self._drive()

    def _drive(self) -> None:
        for set_drive_target in self._drives:
            set_drive_target(self._finger_m)

    def get_state(self) -> dict:
        return {}


@dataclass
class GripperControllerConfig(PDJointPosControllerConfig):
    closed_m: float = 0.0
    open_m: float = 0.08
    speed_m_s: float = 0.1
    controller_cls = GripperController


@register_agent()
class TwinPanda(Panda):
    """Panda on the twin's table. `tuned` makes a variant with other gains."""

    uid = "twin_panda"
    urdf_path = URDF
    arm_acceleration_rad_s2 = 0.0
    gripper_speed_m_s = 0.1
    gripper_range_m = (0.0, 0.08)
    max_translation_m = max_rotation_rad = 0.1
    workspace_m = ((-np.inf,) * 3, (np.inf,) * 3)  # lower and upper corner of the box for the TCP target

    @classmethod
    def tuned(cls, **attributes: Any) -> type["TwinPanda"]:
        return type(cls.__name__, (cls,), attributes)

    @property
    def _controller_configs(self):
        arm = TargetDeltaPoseControllerConfig(
            self.arm_joint_names,
            lower=None,
            upper=None,
            stiffness=self.arm_stiffness,
            damping=self.arm_damping,
            force_limit=self.arm_force_limit,
            normalize_action=False,
            acceleration_rad_s2=self.arm_acceleration_rad_s2,
            max_translation_m=self.max_translation_m,
            max_rotation_rad=self.max_rotation_rad,
            workspace_lower_m=self.workspace_m[0],
            workspace_upper_m=self.workspace_m[1],
        )
        gripper = GripperControllerConfig(
            self.gripper_joint_names,
            lower=None,
            upper=None,
            stiffness=self.gripper_stiffness,
            damping=self.gripper_damping,
            force_limit=self.gripper_force_limit,
            normalize_action=False,
            closed_m=self.gripper_range_m[0],
            open_m=self.gripper_range_m[1],
            speed_m_s=self.gripper_speed_m_s,
        )
        return {CONTROL_MODE: {"arm": arm, "gripper": gripper}}


def use_collision_shapes_as_visuals(robot) -> None:
    """Draw the arm as its convex hulls: a hundredth of the triangles, which is what a CPU renderer pays for."""
    for link in [link for articulation in robot._objs for link in articulation.links]:
        body = link.entity.find_component_by_type(sapien.render.RenderBodyComponent)
        if body is not None:
            link.entity.remove_component(body)
        body = sapien.render.RenderBodyComponent()
        for shape in link.collision_shapes:
            material = sapien.render.RenderMaterial()
            if not isinstance(shape, sapien.physx.PhysxCollisionShapeConvexMesh):  # of a finger
                visual = sapien.render.RenderShapeBox(shape.half_size, material)
            else:
                vertices = np.asarray(shape.vertices) * np.asarray(shape.scale)
                corners, normals = _flat_shaded(vertices, np.asarray(shape.triangles))
                faces = np.arange(len(corners), dtype=np.uint32).reshape(-1, 3)
                visual = sapien.render.RenderShapeTriangleMesh(
                    corners, faces, normals, np.zeros((len(corners), 2), np.float32), material
                )
            visual.local_pose = shape.local_pose
            body.attach(visual)
        link.entity.add_component(body)


def _flat_shaded(vertices: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A triangle soup with one outward normal a face: corners and normals, float32 [3 * triangles, 3]."""
    corners = vertices[triangles]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    outward = np.einsum("ij,ij->i", normals, corners.mean(1) - vertices.mean(0)) > 0
    corners[~outward], normals[~outward] = corners[~outward][:, ::-1], -normals[~outward]
    return corners.reshape(-1, 3).astype(np.float32), np.repeat(normals, 3, axis=0).astype(np.float32)
