"""What the twin's tasks share: the arm on its table, the contract's action, cameras, light and the episode's course.

A task is a subclass that names its bodies: `_load_task` builds them, `_place` puts them for an episode, and two
predicates say what success is. Nothing else differs between tasks, so whatever drives one drives all.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.structs import Actor, Pose
from mani_skill.utils.structs.types import SimConfig

from bridge import pose
from bridge.embodiment import Camera, Embodiment
from sim.twin.arm import CONTROL_MODE, TwinPanda, use_collision_shapes_as_visuals
from sim.twin.bodies import paint
from sim.twin.config import REWARDS, TwinConfig
from sim.twin.shading import light_shader
from sim.twin.splat_pictures import View

STILL_M_PER_S = 0.02
LIFTED_M = 0.02
OPENCV_FROM_SAPIEN = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])  # columns: x forward, y left, z up
TABLE_HALF_M = [0.6, 0.7, 0.02]
ABSENT = np.eye(4, dtype=np.float32) + np.float32([[0] * 4, [0] * 4, [0, 0, 0, -100], [0] * 4])  # out of every picture


@dataclass(frozen=True)
class Facts:
    """Privileged truth after a policy step. Poses [4, 4] in base."""

    T_base_tcp: np.ndarray
    T_base_target: np.ndarray
    gripper_opening_m: float
    object_pos_m: np.ndarray  # centre of what is carried
    object_yaw_rad: float  # about base z, of the object's own x axis; its y axis is the one to close the fingers along
    goal_pos_m: np.ndarray  # centre of the surface that it is put on
    success: bool
    stages: dict[str, bool]  # reached, grasped, lifted, over_goal


class TwinEnv(BaseEnv):
    SUPPORTED_ROBOTS = None  # always a `TwinPanda` with the configured gains
    SUPPORTED_REWARD_MODES = REWARDS
    TASK = ""
    agent: TwinPanda
    object: Actor  # of this episode, like what follows
    goal: Actor
    bare = False  # without object and goal: for motions of the arm alone
    rest_height_m: float  # of the object's centre on the table
    goal_top_m: float  # from the goal's origin to the surface that things are put on

    def __init__(self, *args, twin: TwinConfig | None = None, embodiment: Embodiment | None = None, **kwargs):
        self.twin = twin or TwinConfig(task=self.TASK)
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
        self._surface = sapien.physx.PhysxMaterial(twin.friction, twin.friction, 0.0)
        table = self.scene.create_actor_builder()
        below = sapien.Pose([0.45, 0.0, -TABLE_HALF_M[2]])
        table.add_box_collision(below, TABLE_HALF_M, material=self._surface)
        table.add_box_visual(below, TABLE_HALF_M, material=paint(twin.table_colour))
        table.initial_pose = sapien.Pose()
        self.table = table.build_static("table")
        self._entities: list[sapien.Entity] = []
        self._load_task(self._surface)

    def _load_lighting(self, options: dict):
        if not self.scene.can_render():
            return
        scene = self.scene.sub_scenes[0]
        scene.set_ambient_light([0.35] * 3)
        self._sun = scene.add_directional_light([0.4, 0.3, -1.0], [1.6] * 3, shadow=False)

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        seed = int(self._episode_seed[0])
        rng = np.random.default_rng(seed)
        object_pose, goal_pose = self._place(rng)
        q = np.array(self.embodiment.home_joint_pos_rad) + rng.normal(0, self.twin.home_noise_rad, 7)
        finger = self.embodiment.gripper_open_m / 2
        find = sapien.physx.PhysxRigidDynamicComponent
        self._object_body, self._goal_body = (
            actor._objs[0].find_component_by_type(find) for actor in (self.object, self.goal)
        )
        self._renew_physics()
        self.agent.reset(np.array([*q, finger, finger], dtype=np.float32))
        self.object.set_pose(Pose.create(object_pose))
        self.goal.set_pose(Pose.create(goal_pose))
        if not self.bare:
            self.object.set_linear_velocity(torch.zeros(1, 3))
            self.object.set_angular_velocity(torch.zeros(1, 3))
        self._randomize_physics(np.random.default_rng([seed, 1]))
        self._hold_home(q, finger)
        self._stages = dict.fromkeys(("reached", "grasped", "lifted", "over_goal"), False)
        self._settle()
        self._randomize_looks(rng)

    # --- what a task says ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _load_task(self, surface: sapien.physx.PhysxMaterial) -> None:
        """Build every body that an episode may need."""
        ...

    @abstractmethod
    def _place(self, rng: np.random.Generator) -> tuple[sapien.Pose, sapien.Pose]:
        """Choose the episode's `object` and `goal` and say where they begin. Draws from nothing but `rng`."""
        ...

    def _absent(self) -> list[Actor]:
        """Bodies that take no part in this episode."""
        return [self.object, self.goal] if self.bare else []

    def _settle(self) -> None:
        """Let the bodies come to rest, where the task does not put them down exactly."""

    @abstractmethod
    def legacy_success(self, object_pos_m: np.ndarray, goal_pos_m: np.ndarray) -> bool:
        """The peer's predicate, from the two bodies' origins."""
        ...

    @abstractmethod
    def lies_on_goal(self, object_pos_m: np.ndarray, goal_pos_m: np.ndarray) -> bool:
        """Whether the object's centre is where it lies when it was put down well."""
        ...

    def stable_success(self, object_pos_m: np.ndarray, goal_pos_m: np.ndarray) -> bool:
        """Well put down, at rest, and released."""
        return (
            self.lies_on_goal(object_pos_m, goal_pos_m)
            and bool(np.linalg.norm(self._object_body.linear_velocity) < STILL_M_PER_S)
            and self._fingers_touching() == 0
        )

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

    def start_arm_at(self, T_base_tcp: np.ndarray, opening_m: float) -> None:
        """Put the arm at rest where its TCP has this pose [4, 4]. ValueError where it cannot be."""
        arm, q = self._controllers[0], np.array(self.embodiment.home_joint_pos_rad)
        q = arm.kinematics.solve(T_base_tcp, q)
        if q is None:
            raise ValueError(f"no joint angles near home reach {np.round(T_base_tcp[:3, 3], 3).tolist()} m")
        self.agent.reset(np.array([*q, opening_m / 2, opening_m / 2], dtype=np.float32))
        self._hold_home(q, opening_m / 2)

    def set_arm_dynamics(self, stiffness: float, damping: float, latency_s: float) -> None:
        """From the next reset on, instead of the configured ones."""
        self.twin = replace(self.twin, arm_stiffness=stiffness, arm_damping=damping, latency_s=latency_s)
        for joint in self._controllers[0].joints:
            joint.set_drive_properties(stiffness, damping, force_limit=self.agent.arm_force_limit)

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
        q = self._robot.qpos
        T_base_tcp = self._tcp.entity_pose.to_transformation_matrix().astype(np.float64)
        lying, goal = self._object_body.entity_pose, self._goal_body.entity_pose.p
        self._note_stages(T_base_tcp, lying.p, goal)
        succeeded = self.legacy_success if self.twin.success == "legacy" else self.stable_success
        w, x, y, z = map(float, lying.q)
        return Facts(
            T_base_tcp=T_base_tcp,
            T_base_target=self._controllers[0].T_base_target.copy(),
            gripper_opening_m=float(q[7] + q[8]),
            object_pos_m=np.array(lying.p, dtype=np.float64),
            object_yaw_rad=math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)),
            goal_pos_m=goal + np.array([0.0, 0.0, self.goal_top_m]),
            success=succeeded(lying.p, goal),
            stages=dict(self._stages),
        )

    def pictures(self) -> dict[str, np.ndarray]:
        """SAPIEN's, uint8 [H, W, 3] for each camera."""
        return {name: area_mean(rgba, self.twin.supersampling) for name, (rgba,) in self._draw("Color").items()}

    def _draw(self, *textures: str) -> dict[str, list[np.ndarray]]:
        self.scene.sub_scenes[0].update_render()
        cameras = {name: sensor.camera._render_cameras[0] for name, sensor in self._sensors.items()}
        for camera in cameras.values():
            camera.take_picture()  # all are under way before the first is waited for
        return {name: [camera.get_picture(texture) for texture in textures] for name, camera in cameras.items()}

    def _link(self, name: str) -> sapien.physx.PhysxArticulationLinkComponent:
        return self.agent.robot.links_map[name]._objs[0]

    def view(self, links: list[str], actors: list[str], with_rgb: bool) -> View:
        """Everything that a picture of this moment needs where splats are drawn."""
        rgb, depth_m = {}, {}
        if with_rgb:
            for name, (rgba, distance_m) in self._draw("Color", "Distance").items():
                rgb[name] = area_mean(rgba, self.twin.supersampling)
                depth_m[name] = nearest(distance_m, self.twin.supersampling)
        absent = {actor.name for actor in self._absent()}
        bodies = [self._link(name).entity_pose.to_transformation_matrix() for name in links]
        present = {name: entity for name, entity in self.bodies.items() if name not in absent}
        bodies += [present[n].pose.to_transformation_matrix() if n in present else ABSENT for n in actors]
        T_base_tcp = self._tcp.entity_pose.to_transformation_matrix().astype(np.float64)
        cameras = [
            (T_base_tcp if camera.mount == "tcp" else np.eye(4)) @ camera.matrix @ self._camera_offsets[name]
            for name, camera in sorted(self.embodiment.cameras.items())
        ]
        poses = (np.array(part, dtype=np.float32).reshape(-1, 4, 4) for part in (bodies, cameras))
        return View(rgb, depth_m, *poses, self._light)

    @property
    def bodies(self) -> dict[str, sapien.Entity]:
        """Actors of the scene by name."""
        return {name: actor._objs[0] for name, actor in self.scene.actors.items()}

    @property
    def actor_names(self) -> set[str]:
        """Of all actors that an episode of the task may show."""
        return set(self.scene.actors)

    def hide(self, links: list[str], actors: list[str]) -> None:
        """SAPIEN draws these no more."""
        shown = [self.bodies[name] for name in actors if name in self.bodies]
        for entity in [self._link(name).entity for name in links] + shown:
            body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
            if body is not None:
                entity.remove_component(body)

    def state(self, facts: Facts) -> np.ndarray:
        """The observation's `state`, float32 [7]."""
        return pose.state_vector(facts.T_base_tcp, facts.gripper_opening_m)

    def dense_reward(self, facts: Facts) -> float:
        """In [0, 1]: approach, grasp, carry, and 1 on success."""
        if facts.success:
            return 1.0
        tcp_to_object = np.linalg.norm(facts.T_base_tcp[:3, 3] - facts.object_pos_m)
        reward = 1 - np.tanh(5 * tcp_to_object)
        if facts.stages["grasped"]:
            reward += 1 + (1 - np.tanh(5 * np.linalg.norm(facts.object_pos_m[:2] - facts.goal_pos_m[:2])))
        return float(reward / 5)

    def _after_reconfigure(self, options: dict):
        super()._after_reconfigure(options)
        self._robot = self.agent.robot._objs[0]
        self._tcp = self.agent.tcp._objs[0]
        fingers = ("panda_leftfinger", "panda_rightfinger")
        self._fingers = {self.agent.robot.links_map[name]._objs[0] for name in fingers}
        controllers = self.agent.controller.controllers
        self._controllers = (controllers["arm"], controllers["gripper"])
        self._nominal_camera_poses = {
            name: sensor.camera._render_cameras[0].local_pose for name, sensor in self._sensors.items()
        }

    def _fingers_touching(self) -> int:
        """How many fingers press on the object. Contacts live on their pairs of bodies, so this walks few."""
        touching = set()
        for contact in self.scene.px.get_contacts():
            others = set(contact.bodies) - {self._object_body}
            if len(others) == 1 and others <= self._fingers and any(point.impulse.any() for point in contact.points):
                touching |= others
        return len(touching)

    def _note_stages(self, T_base_tcp: np.ndarray, object_pos_m: np.ndarray, goal_pos_m: np.ndarray) -> None:
        s, distance = self._stages, math.dist(T_base_tcp[:3, 3], object_pos_m)
        if distance > 0.08:  # no finger can reach the object; asking for contacts is the costly part
            return
        held = self._fingers_touching() == 2
        s["reached"] |= distance < 0.03
        s["grasped"] |= held
        s["lifted"] |= held and bool(object_pos_m[2] > self.rest_height_m + LIFTED_M)
        s["over_goal"] |= s["lifted"] and math.dist(object_pos_m[:2], goal_pos_m[:2]) < self.twin.success_radius_m

    def _renew_physics(self) -> None:
        """Move everything that takes part into a fresh PhysX scene (half a millisecond). A scene that has seen contacts
        hands them to its solver in an order that depends on what came before; in a fresh one the same seed gives the
        same states bit for bit."""
        old, px = self.scene.sub_scenes[0], sapien.physx.PhysxCpuSystem()
        px.timestep = old.physx_system.timestep
        fresh = sapien.Scene([px, old.render_system] if self.scene.can_render() else [px])
        present = old.entities
        self._entities = self._entities or present  # in their order, which the solver sees
        for entity in present:
            old.remove_entity(entity)
        absent = {actor._objs[0] for actor in self._absent()}
        for entity in self._entities:
            if entity not in absent:
                fresh.add_entity(entity)
        self.scene.sub_scenes[0], self.scene.px = fresh, px

    def _hold_home(self, q: np.ndarray, finger: float) -> None:
        arm, gripper = self._controllers
        arm.hold(q)
        gripper.hold(finger)
        self._robot.qvel = np.zeros(9, dtype=np.float32)
        self._robot.qf = np.zeros(9, dtype=np.float32)

    def _randomize_physics(self, rng: np.random.Generator) -> None:
        """Of draws of their own, so that an episode's start is the same with and without them."""
        r, twin = self.twin.randomization, self.twin
        friction = twin.friction * (1.0 + rng.uniform(-r.friction, r.friction))
        self._surface.static_friction = self._surface.dynamic_friction = friction
        latency_s = twin.latency_s + rng.uniform(0.0, r.latency_s)
        for controller in self._controllers:
            controller.delay_steps = round(latency_s * twin.sim_freq)

    def _randomize_looks(self, rng: np.random.Generator) -> None:
        """The last draws of an episode, so that worlds with and without pictures have the same states."""
        r, twin = self.twin.randomization, self.twin
        sun, ambient = (1.0 + rng.uniform(-r.light, r.light) for _ in range(2))
        colours = {
            name: np.clip(np.array(colour) + rng.uniform(-r.colour, r.colour, 3), 0, 1)
            for name, colour in (("table", twin.table_colour), ("goal", twin.plate_colour), ("arm", twin.arm_colour))
        }
        self._light, self._camera_offsets, shown = (sun + ambient) / 2, {}, self.scene.can_render()
        for name in sorted(self.embodiment.cameras):
            turn = pose.matrix_from_rpy(rng.uniform(-1, 1, 3) * r.camera_rot_rad)
            shift = pose.pose(rng.uniform(-1, 1, 3) * r.camera_pos_m, turn)
            to_opencv = pose.pose(np.zeros(3), OPENCV_FROM_SAPIEN)
            self._camera_offsets[name] = to_opencv @ shift @ to_opencv.T
            if shown:
                camera = self._sensors[name].camera._render_cameras[0]
                camera.local_pose = self._nominal_camera_poses[name] * sapien.Pose(shift.astype(np.float32))
        if not shown:
            return
        self._sun.color = [1.6 * sun] * 3
        self.scene.sub_scenes[0].set_ambient_light([0.35 * ambient] * 3)
        repaint([self.table._objs[0]], colours["table"])
        repaint([self.goal._objs[0]], colours["goal"])
        repaint([link.entity for link in self._robot.links], colours["arm"])


def sapien_camera_pose(T_mount_cam: np.ndarray) -> sapien.Pose:
    """From OpenCV axes (x right, y down, z forward) to SAPIEN's (x forward, y left, z up)."""
    T = np.array(T_mount_cam, dtype=np.float64)
    T[:3, :3] = T[:3, :3] @ OPENCV_FROM_SAPIEN
    return sapien.Pose(T.astype(np.float32))


def area_mean(rgba: np.ndarray, share: int) -> np.ndarray:
    """uint8 [H * share, W * share, 4] -> uint8 [H, W, 3], as area resizing would."""
    if share == 1:
        return np.ascontiguousarray(rgba[..., :3])
    parts = [rgba[i::share, j::share, :3] for i in range(share) for j in range(share)]
    total = parts[0].astype(np.uint16)
    for part in parts[1:]:
        total += part
    return ((total + share * share // 2) // (share * share)).astype(np.uint8)


def nearest(distance_m: np.ndarray, share: int) -> np.ndarray:
    """float32 [H * share, W * share], 0 where nothing is -> [H, W]: the nearest of each block, inf where nothing is."""
    depth_m = np.where(distance_m > 0, distance_m, np.inf)
    return np.minimum.reduce([depth_m[i::share, j::share] for i in range(share) for j in range(share)])


def repaint(entities: list[sapien.Entity], colour: np.ndarray) -> None:
    """Fingers keep their own dark colour."""
    for entity in entities:
        body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        for shape in [] if body is None or "finger" in entity.name else body.render_shapes:
            parts = shape.parts if hasattr(shape, "parts") else [shape]
            for part in parts:
                part.material.base_color = [*map(float, colour), 1.0]
