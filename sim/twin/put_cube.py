"""The twin's first task.

**Task description.** Pick up the cube and put it on the plate.

**Randomizations.** Cube and plate uniform in their rectangles (`TwinConfig`), never closer than they can lie; the
arm's joints with normal noise around home; light, colours and camera pose as `Randomization` says. All of it is drawn
from the episode's seed alone.

**Success conditions.** `stable`: the cube's centre lies within `success_radius_m` of the plate's, rests on it, moves
slower than 2 cm/s, and no finger touches it. `legacy` is the peer's predicate: horizontal distance below 7 cm and the
cube's centre 0 to 7 cm above the plate's, released or not.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs import Pose
from mani_skill.utils.structs.types import SimConfig

from bridge import pose
from bridge.embodiment import Camera, Embodiment
from sim.twin.arm import CONTROL_MODE, TwinPanda, use_collision_shapes_as_visuals
from sim.twin.config import REWARDS, TwinConfig
from sim.twin.shading import light_shader

LEGACY_RADIUS_M = LEGACY_HEIGHT_M = 0.07
STILL_M_PER_S = 0.02
OPENCV_FROM_SAPIEN = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])  # columns: x forward, y left, z up
TABLE_HALF_M = [0.6, 0.7, 0.02]


@dataclass(frozen=True)
class Facts:
    """Privileged truth after a policy step. Poses [4, 4] in base."""

    T_base_tcp: np.ndarray
    T_base_target: np.ndarray
    gripper_opening_m: float
    cube_pos_m: np.ndarray  # centre
    plate_pos_m: np.ndarray  # centre of the upper side
    success: bool
    stages: dict[str, bool]  # reached, grasped, lifted, over_plate


@register_env("PutCubeOnPlate-v0", max_episode_steps=100)
class PutCubeOnPlateEnv(BaseEnv):
    SUPPORTED_ROBOTS = None  # always a `TwinPanda` with the configured gains
    SUPPORTED_REWARD_MODES = REWARDS
    agent: TwinPanda

    def __init__(self, *args, twin: TwinConfig | None = None, embodiment: Embodiment | None = None, **kwargs):
        self.twin = twin or TwinConfig()
        self.embodiment = embodiment or Embodiment()
        if self.twin.sim_freq % self.embodiment.policy_rate_hz:
            raise ValueError(
                f"sim_freq {self.twin.sim_freq} is no multiple of the policy rate {self.embodiment.policy_rate_hz} Hz"
            )
        robot = TwinPanda.tuned(
            arm_stiffness=self.twin.arm_stiffness,
            arm_damping=self.twin.arm_damping,
            gripper_force_limit=self.twin.gripper_force,
            gripper_speed_m_s=self.twin.gripper_speed_m_s,
            gripper_range_m=(self.embodiment.gripper_closed_m, self.embodiment.gripper_open_m),
            max_translation_m=self.embodiment.max_translation_m,
            max_rotation_rad=self.embodiment.max_rotation_rad,
            workspace_m=(self.twin.workspace_lower_m, self.twin.workspace_upper_m),
        )
        kwargs = {"robot_uids": robot, "control_mode": CONTROL_MODE, "reward_mode": self.twin.reward} | kwargs
        super().__init__(*args, **kwargs)

    # --- what ManiSkill asks for --------------------------------------------------------------------------------------

    @property
    def _default_sim_config(self):
        return SimConfig(sim_freq=self.twin.sim_freq, control_freq=int(self.embodiment.policy_rate_hz))

    @property
    def _default_sensor_configs(self):
        return [self._camera(name, camera) for name, camera in sorted(self.embodiment.cameras.items())]

    def _camera(self, name: str, camera: Camera) -> CameraConfig:
        """The contract's camera at the size that is drawn, in SAPIEN's axes. Pixel centres keep their rays."""
        width, height = (self.twin.supersampling * n for n in (self.twin.picture_width, self.twin.picture_height))
        sx, sy = width / camera.width, height / camera.height
        K = np.array(
            [[camera.fx * sx, 0, (camera.cx + 0.5) * sx], [0, camera.fy * sy, (camera.cy + 0.5) * sy], [0, 0, 1]]
        )
        mount = self.agent.robot.links_map[TwinPanda.ee_link_name] if camera.mount == "tcp" else None
        return CameraConfig(
            uid=name,
            pose=sapien_camera_pose(camera.matrix),
            width=width,
            height=height,
            intrinsic=K,
            near=0.01,
            far=10.0,
            mount=mount,
            shader_config=light_shader(),
        )

    def _load_agent(self, options: dict, initial_agent_poses=None, build_separate: bool = False):
        super()._load_agent(options, sapien.Pose())
        for joint in self.agent.robot.joints:
            joint.set_friction(0.0)

    def _load_scene(self, options: dict):
        twin = self.twin
        if self.scene.can_render():
            use_collision_shapes_as_visuals(self.agent.robot, tuple(twin.arm_colour))
        surface = sapien.physx.PhysxMaterial(twin.friction, twin.friction, 0.0)
        table = self.scene.create_actor_builder()
        below = sapien.Pose([0.45, 0.0, -TABLE_HALF_M[2]])
        table.add_box_collision(below, TABLE_HALF_M, material=surface)
        table.add_box_visual(below, TABLE_HALF_M, material=_paint(twin.table_colour))
        table.initial_pose = sapien.Pose()
        self.table = table.build_static("table")
        cube = self.scene.create_actor_builder()
        cube.add_box_collision(half_size=[twin.cube_half_size_m] * 3, material=surface, density=1000)
        cube.add_box_visual(half_size=[twin.cube_half_size_m] * 3, material=_paint(twin.cube_colour))
        cube.initial_pose = sapien.Pose([0.5, 0.4, 0.3])
        self.cube = cube.build("cube")
        plate = self.scene.create_actor_builder()
        upright = sapien.Pose(q=[0.70710678, 0.0, 0.70710678, 0.0])  # SAPIEN's cylinders lie along x
        half_height = twin.plate_height_m / 2
        plate.add_cylinder_collision(upright, twin.plate_radius_m, half_height, material=surface)
        plate.add_cylinder_visual(upright, twin.plate_radius_m, half_height, material=_paint(twin.plate_colour))
        plate.initial_pose = sapien.Pose([0.5, -0.4, 0.3])
        self.plate = plate.build_kinematic("plate")

    def _load_lighting(self, options: dict):
        if not self.scene.can_render():
            return
        scene = self.scene.sub_scenes[0]
        scene.set_ambient_light([0.35] * 3)
        self._sun = scene.add_directional_light([0.4, 0.3, -1.0], [1.6] * 3, shadow=False)

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        rng = np.random.default_rng(int(self._episode_seed[0]))
        twin = self.twin
        cube_xy = rng.uniform(-1, 1, 2) * twin.cube_range_m + twin.cube_center_m
        plate_xy = rng.uniform(-1, 1, 2) * twin.plate_range_m + twin.plate_center_m
        apart = twin.plate_radius_m + 1.5 * twin.cube_half_size_m
        for _ in range(100):
            if np.linalg.norm(cube_xy - plate_xy) >= apart:
                break
            cube_xy = rng.uniform(-1, 1, 2) * twin.cube_range_m + twin.cube_center_m
        q = np.array(self.embodiment.home_joint_pos_rad) + rng.normal(0, twin.home_noise_rad, 7)
        finger = self.embodiment.gripper_open_m / 2
        self._renew_physics()
        self.agent.reset(np.array([*q, finger, finger], dtype=np.float32))
        for body, pos in (
            (self.cube, [*cube_xy, twin.cube_half_size_m]),
            (self.plate, [*plate_xy, twin.plate_height_m / 2]),
        ):
            body.set_pose(Pose.create_from_pq(torch.tensor([pos], dtype=torch.float32)))
        self.cube.set_linear_velocity(torch.zeros(1, 3))
        self.cube.set_angular_velocity(torch.zeros(1, 3))
        self._hold_home(q, finger)
        self._stages = dict.fromkeys(("reached", "grasped", "lifted", "over_plate"), False)
        self._randomize(rng)

    def evaluate(self) -> dict[str, Any]:
        facts = self.facts()
        return {name: torch.tensor([value]) for name, value in {"success": facts.success, **facts.stages}.items()}

    def compute_dense_reward(self, obs: Any, action: torch.Tensor, info: dict) -> torch.Tensor:
        return torch.tensor([self.dense_reward(self.facts())])

    def compute_normalized_dense_reward(self, obs: Any, action: torch.Tensor, info: dict) -> torch.Tensor:
        return self.compute_dense_reward(obs, action, info)

    # --- the direct path: one scene, numpy, pictures only when somebody looks -----------------------------------------

    def begin(self, seed: int) -> None:
        """Begin the episode of `seed`: ManiSkill's `reset` without what nobody looks at here."""
        self._episode_seed[0] = seed
        self._elapsed_steps[:] = 0
        self._initialize_episode(torch.zeros(1, dtype=torch.int64), {})

    def policy_step(self, action: np.ndarray) -> Facts:
        """One period of the contract's 7-D action, without observation, reward or picture."""
        arm, gripper = self._controllers
        arm.move_target(action[:6])
        gripper.command(float(action[6]))
        for _ in range(self._sim_steps_per_control):
            arm.before_simulation_step()
            gripper.before_simulation_step()
            self.scene.px.step()
        return self.facts()

    def facts(self) -> Facts:
        robot = self._robot
        q = robot.qpos
        T_base_tcp = self._tcp.entity_pose.to_transformation_matrix().astype(np.float64)
        cube, plate = self._cube_body.entity_pose.p, self._plate_body.entity_pose.p
        self._note_stages(T_base_tcp, cube, plate)
        return Facts(
            T_base_tcp=T_base_tcp,
            T_base_target=self._controllers[0].T_base_target.copy(),
            gripper_opening_m=float(q[7] + q[8]),
            cube_pos_m=np.array(cube, dtype=np.float64),
            plate_pos_m=plate + np.array([0.0, 0.0, self.twin.plate_height_m / 2]),
            success=self.legacy_success(cube, plate)
            if self.twin.success == "legacy"
            else self.stable_success(cube, plate),
            stages=dict(self._stages),
        )

    def pictures(self) -> dict[str, np.ndarray]:
        """uint8 [H, W, 3] for each camera."""
        self.scene.sub_scenes[0].update_render()
        cameras = {name: sensor.camera._render_cameras[0] for name, sensor in self._sensors.items()}
        for camera in cameras.values():
            camera.take_picture()  # all are under way before the first is waited for
        return {
            name: _area_mean(camera.get_picture("Color"), self.twin.supersampling) for name, camera in cameras.items()
        }

    def state(self, facts: Facts) -> np.ndarray:
        """The observation's `state`, float32 [7]."""
        return pose.state_vector(facts.T_base_tcp, facts.gripper_opening_m)

    def dense_reward(self, facts: Facts) -> float:
        """In [0, 1]: approach, grasp, carry, and 1 on success."""
        if facts.success:
            return 1.0
        tcp_to_cube = np.linalg.norm(facts.T_base_tcp[:3, 3] - facts.cube_pos_m)
        reward = 1 - np.tanh(5 * tcp_to_cube)
        if facts.stages["grasped"]:
            reward += 1 + (1 - np.tanh(5 * np.linalg.norm(facts.cube_pos_m[:2] - facts.plate_pos_m[:2])))
        return float(reward / 5)

    def stable_success(self, cube: np.ndarray, plate: np.ndarray) -> bool:
        twin = self.twin
        resting_z = plate[2] + twin.plate_height_m / 2 + twin.cube_half_size_m
        return bool(
            np.hypot(*(cube[:2] - plate[:2])) <= twin.success_radius_m
            and abs(cube[2] - resting_z) < 0.01
            and np.linalg.norm(self._cube_body.linear_velocity) < STILL_M_PER_S
            and self._fingers_touching_cube() == 0
        )

    @staticmethod
    def legacy_success(cube: np.ndarray, plate: np.ndarray) -> bool:
        return bool(np.hypot(*(cube[:2] - plate[:2])) < LEGACY_RADIUS_M and 0 <= cube[2] - plate[2] <= LEGACY_HEIGHT_M)

    def _after_reconfigure(self, options: dict):
        super()._after_reconfigure(options)
        self._robot = self.agent.robot._objs[0]
        self._tcp = self.agent.tcp._objs[0]
        find = sapien.physx.PhysxRigidBaseComponent
        self._cube_body = self.cube._objs[0].find_component_by_type(sapien.physx.PhysxRigidDynamicComponent)
        self._plate_body = self.plate._objs[0].find_component_by_type(find) or self.plate._objs[0].components[0]
        fingers = ("panda_leftfinger", "panda_rightfinger")
        self._fingers = {self.agent.robot.links_map[name]._objs[0] for name in fingers}
        controllers = self.agent.controller.controllers
        self._controllers = (controllers["arm"], controllers["gripper"])
        self._nominal_camera_poses = {
            name: sensor.camera._render_cameras[0].local_pose for name, sensor in self._sensors.items()
        }

    def _fingers_touching_cube(self) -> int:
        """How many fingers press on the cube. Contacts live on their pairs of bodies, so this walks few."""
        touching = set()
        for contact in self.scene.px.get_contacts():
            others = set(contact.bodies) - {self._cube_body}
            if len(others) == 1 and others <= self._fingers and any(point.impulse.any() for point in contact.points):
                touching |= others
        return len(touching)

    def _note_stages(self, T_base_tcp: np.ndarray, cube: np.ndarray, plate: np.ndarray) -> None:
        s, distance = self._stages, math.dist(T_base_tcp[:3, 3], cube)
        if distance > 0.08:  # no finger can reach the cube; asking for contacts is the costly part
            return
        held = self._fingers_touching_cube() == 2
        s["reached"] |= distance < 0.03
        s["grasped"] |= held
        s["lifted"] |= held and bool(cube[2] > 2 * self.twin.cube_half_size_m)
        s["over_plate"] |= s["lifted"] and math.dist(cube[:2], plate[:2]) < self.twin.success_radius_m

    def _renew_physics(self) -> None:
        """Move everything into a fresh PhysX scene (half a millisecond). A scene that has seen contacts hands them to
        its solver in an order that depends on what came before; in a fresh one the same seed gives the same states
        bit for bit."""
        old, px = self.scene.sub_scenes[0], sapien.physx.PhysxCpuSystem()
        px.timestep = old.physx_system.timestep
        fresh = sapien.Scene([px, old.render_system] if self.scene.can_render() else [px])
        entities = old.entities
        for entity in entities:
            old.remove_entity(entity)
        for entity in entities:
            fresh.add_entity(entity)
        self.scene.sub_scenes[0], self.scene.px = fresh, px

    def _hold_home(self, q: np.ndarray, finger: float) -> None:
        arm, gripper = self._controllers
        arm.hold(q)
        gripper.hold(finger)
        self._robot.qvel = np.zeros(9, dtype=np.float32)
        self._robot.qf = np.zeros(9, dtype=np.float32)

    def _randomize(self, rng: np.random.Generator) -> None:
        """The last draws of an episode, so that worlds with and without pictures have the same states."""
        if not self.scene.can_render():
            return
        r, twin = self.twin.randomization, self.twin
        self._sun.color = [1.6 * (1.0 + rng.uniform(-r.light, r.light))] * 3
        self.scene.sub_scenes[0].set_ambient_light([0.35 * (1.0 + rng.uniform(-r.light, r.light))] * 3)
        arm = [link.entity for link in self._robot.links]
        table, plate = [self.table._objs[0]], [self.plate._objs[0]]
        for entities, colour in ((table, twin.table_colour), (plate, twin.plate_colour), (arm, twin.arm_colour)):
            _repaint(entities, np.clip(np.array(colour) + rng.uniform(-r.colour, r.colour, 3), 0, 1))
        for name, nominal in self._nominal_camera_poses.items():
            turn = pose.matrix_from_rpy(rng.uniform(-1, 1, 3) * r.camera_rot_rad)
            shift = pose.pose(rng.uniform(-1, 1, 3) * r.camera_pos_m, turn)
            offset = sapien.Pose(shift.astype(np.float32))
            self._sensors[name].camera._render_cameras[0].local_pose = nominal * offset


def sapien_camera_pose(T_mount_cam: np.ndarray) -> sapien.Pose:
    """From OpenCV axes (x right, y down, z forward) to SAPIEN's (x forward, y left, z up)."""
    T = np.array(T_mount_cam, dtype=np.float64)
    T[:3, :3] = T[:3, :3] @ OPENCV_FROM_SAPIEN
    return sapien.Pose(T.astype(np.float32))


def _area_mean(rgba: np.ndarray, share: int) -> np.ndarray:
    """uint8 [H * share, W * share, 4] -> uint8 [H, W, 3], as area resizing would."""
    if share == 1:
        return np.ascontiguousarray(rgba[..., :3])
    parts = [rgba[i::share, j::share, :3] for i in range(share) for j in range(share)]
    total = parts[0].astype(np.uint16)
    for part in parts[1:]:
        total += part
    return ((total + share * share // 2) // (share * share)).astype(np.uint8)


def _paint(colour) -> sapien.render.RenderMaterial:
    material = sapien.render.RenderMaterial()
    material.base_color = [*map(float, colour), 1.0]
    material.roughness, material.specular = 0.9, 0.1
    return material


def _repaint(entities: list[sapien.Entity], colour: np.ndarray) -> None:
    """Fingers keep their own dark colour."""
    for entity in entities:
        body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        for shape in [] if body is None or "finger" in entity.name else body.render_shapes:
            parts = shape.parts if hasattr(shape, "parts") else [shape]
            for part in parts:
                part.material.base_color = [*map(float, colour), 1.0]
