"""What `sim.twin.arm` does for one arm, for many at once: tensors [n, ...] in float64 on one device."""

import torch
from mani_skill.utils.geometry.rotation_conversions import (
    axis_angle_to_matrix,
    euler_angles_to_matrix,
    matrix_to_axis_angle,
)
from torch import Tensor

from bridge.embodiment import Embodiment
from sim.twin.arm import DAMPING, IK_MAX_STEP_RAD, IK_STEPS, IK_TOLERANCE, MAX_JOINT_STEP_RAD, ArmKinematics
from sim.twin.config import TwinConfig


def twist(R: Tensor, p: Tensor) -> Tensor:
    """The constant velocity (linear, angular) that takes the identity to this pose in a unit of time: [..., 6]."""
    w = matrix_to_axis_angle(R)
    angle = w.norm(dim=-1, keepdim=True)
    half = angle.clamp(min=1e-4) / 2
    share = torch.where(angle < 1e-4, 1 / 12, (1 - half / torch.tan(half)) / (4 * half**2))
    wp = torch.linalg.cross(w, p)
    return torch.cat([p - wp / 2 + share * torch.linalg.cross(w, wp), w], -1)


class BatchedKinematics:
    """Forward and inverse kinematics of the TCP in each robot's base frame. `q` [n, 7] rad."""

    def __init__(self, device: torch.device | str):
        self._placements, (self._lower, self._upper) = (torch.tensor(a, device=device) for a in ArmKinematics().chain())
        self._damping = torch.tensor(DAMPING, device=device)

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """`T_base_tcp` [n, 4, 4] and the Jacobian [n, 6, 7] of its velocity (linear, angular) in its own axes."""
        R, p, axes, origins = self._placements[0, :3, :3], self._placements[0, :3, 3].expand(len(q), 3), [], []
        turns = axis_angle_to_matrix(torch.nn.functional.pad(q[..., None], (2, 0)))  # about z
        for joint, placement in enumerate(self._placements[1:]):
            R = R @ turns[:, joint]
            axes.append(R[..., 2])
            origins.append(p)
            p = p + R @ placement[:3, 3]
            R = R @ placement[:3, :3]
        axis, arm = torch.stack(axes, -1), p[..., None] - torch.stack(origins, -1)
        J = R.transpose(-1, -2)[:, None] @ torch.stack([torch.linalg.cross(axis, arm, dim=-2), axis], 1)
        T = torch.eye(4, dtype=q.dtype, device=q.device).repeat(len(q), 1, 1)
        T[:, :3, :3], T[:, :3, 3] = R, p
        return T, J.flatten(1, 2)

    def solve(self, T_base_tcp: Tensor, q_near: Tensor) -> tuple[Tensor, Tensor]:
        """Joint angles near `q_near`, within limits, and bool [n]: whether they reach the pose (damped Newton)."""
        q, found = q_near, torch.zeros(len(q_near), dtype=torch.bool, device=q_near.device)
        for _ in range(IK_STEPS):
            T, J = self.forward(q)
            back = T[:, :3, :3].transpose(-1, -2)
            missing = (back @ (T_base_tcp[:, :3, 3] - T[:, :3, 3])[..., None])[..., 0]
            error = twist(back @ T_base_tcp[:, :3, :3], missing)
            found = found | (error.abs().amax(-1) < IK_TOLERANCE)
            if bool(found.all()):
                break
            Jt = J.transpose(-1, -2)
            step = (Jt @ torch.linalg.solve(J @ Jt + self._damping, error[..., None]))[..., 0]
            step = step / (step.abs().amax(-1, keepdim=True) / IK_MAX_STEP_RAD).clamp(min=1.0)
            q = torch.where(found[:, None], q, (q + step).clamp(self._lower, self._upper))
        return q, found


class BatchedArm:
    """The commanded targets of n arms and their fingers, and where the drives of a policy period's physics steps are.

    Differs from `sim.twin.arm`'s controllers in nothing but the number of arms. `T_base_target` [n, 4, 4].
    """

    def __init__(self, n: int, twin: TwinConfig, embodiment: Embodiment, device: torch.device | str):
        def tensor(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        self.kinematics = BatchedKinematics(device)
        self._limit = tensor([embodiment.max_translation_m] * 3 + [embodiment.max_rotation_rad] * 3)
        self._lower_m, self._upper_m = tensor(twin.workspace_lower_m), tensor(twin.workspace_upper_m)
        self._closed_m, self.open_m = embodiment.gripper_closed_m, embodiment.gripper_open_m
        self._finger_step_m = 0.5 * twin.gripper_speed_m_s / twin.sim_freq
        self.sim_steps = int(twin.sim_freq / embodiment.policy_rate_hz)
        self._latest = round((twin.latency_s + twin.randomization.latency_s) * twin.sim_freq)
        self._delay = torch.zeros(n, dtype=torch.long, device=device)
        self._rows = torch.arange(n, device=device)
        self.T_base_target = torch.eye(4, dtype=torch.float64, device=device).repeat(n, 1, 1)
        self.q_target, self._finger_m = self.T_base_target.new_zeros(n, 7), self.T_base_target.new_zeros(n)
        # Joints and finger goal of each physics step: those that a late one may still need, then this period's.
        self._path = self.q_target.new_zeros(n, self._latest + self.sim_steps, 8)

    def hold(self, rows: Tensor, q: Tensor, finger_m: float, delay_steps: Tensor) -> None:
        """Take joint angles [r, 7] as what was commanded last in these environments."""
        self.q_target[rows], self._finger_m[rows], self._delay[rows] = q, finger_m, delay_steps
        self.T_base_target[rows] = self.kinematics.forward(q)[0]
        self._path[rows] = torch.cat([q, torch.full_like(q[:, :1], finger_m)], -1)[:, None]

    def move(self, actions: Tensor, active: Tensor) -> None:
        """Integrate one action [n, 7] of each environment that is active [n]."""
        step, position = actions[:, :6].clamp(-self._limit, self._limit), self.T_base_target[:, :3, 3]
        T = self.T_base_target.clone()
        lower, upper = torch.minimum(self._lower_m, position), torch.maximum(self._upper_m, position)
        T[:, :3, 3] = (position + step[:, :3]).clamp(lower, upper)
        T[:, :3, :3] = T[:, :3, :3] @ euler_angles_to_matrix(step[:, [5, 4, 3]], "ZYX")
        self.T_base_target = torch.where(active[:, None, None], T, self.T_base_target)
        q_next, found = self.kinematics.solve(self.T_base_target, self.q_target)
        change = torch.where((active & found)[:, None], q_next - self.q_target, 0.0)
        change = change / (change.abs().amax(-1, keepdim=True) / MAX_JOINT_STEP_RAD).clamp(min=1.0)
        share = torch.arange(1, self.sim_steps + 1, device=change.device)[:, None] / self.sim_steps
        joints = self.q_target[:, None] + share * change[:, None]
        self.q_target = self.q_target + change
        opening_m = self._closed_m + 0.5 * (actions[:, 6].clamp(-1.0, 1.0) + 1.0) * (self.open_m - self._closed_m)
        period = torch.cat([joints, (0.5 * opening_m)[:, None, None].expand(-1, self.sim_steps, 1)], -1)
        path = torch.cat([self._path[:, self.sim_steps :], period], 1)
        self._path = torch.where(active[:, None, None], path, self._path)

    def drives(self, sim_step: int, active: Tensor) -> Tensor:
        """Targets [n, 9] of joints and fingers for physics step 0, 1, ... of the period."""
        now = self._path[self._rows, self._latest + sim_step - self._delay]
        to_go_m = (now[:, 7] - self._finger_m).clamp(-self._finger_step_m, self._finger_step_m)
        self._finger_m = torch.where(active, self._finger_m + to_go_m, self._finger_m)
        return torch.cat([now[:, :7], self._finger_m[:, None].expand(-1, 2)], -1)

    def at_rest(self) -> Tensor:
        """Targets [n, 9] where nothing moves."""
        return torch.cat([self.q_target, self._finger_m[:, None].expand(-1, 2)], -1)
