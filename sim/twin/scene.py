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
from mani_skill.utils.structs import Actor, Pose
from mani_skill.utils.structs.types import SimConfig

from bridge import pose
from bridge.embodiment import Embodiment
from sim.twin.arm import CONTROL_MODE, TwinPanda, use_collision_shapes_as_visuals
from sim.twin.bodies import paint
from sim.twin.config import REWARDS, TwinConfig
from sim.twin.looks import ShownEnv

STILL_M_PER_S = 0.02
LIFTED_M = 0.02
TABLE_CENTRE_M, TABLE_HALF_M = (0.42, 0.0), (0.6, 0.7, 0.02)


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


def across_m(a_m: Any, b_m: Any) -> Any:
    """Horizontal distance, of numpy arrays or tensors [..., 3] -> [...]."""
    return ((a_m - b_m)[..., :2] ** 2).sum(-1) ** 0.5


class TwinEnv(ShownEnv):
    SUPPORTED_ROBOTS = None  # always a `TwinPanda` with the configured gains
    SUPPORTED_REWARD_MODES = REWARDS
    ROBOT = TwinPanda
    TASK = ""
    LEGACY_FORCE_N = -1.0  # more than this presses object and goal together; below 0: is not asked
    SETTLE_S = 0.0  # let the bodies come to rest for so long, where the task does not put them down exactly
    PER_EPISODE: tuple[str, ...] = ()  # attributes that `_place` sets, which predicates and stages read
    object: Actor  # of this episode, like what follows
    goal: Actor
    bare = False  # without object and goal: for motions of the arm alone
    rest_height_m: Any  # of the object's centre on the table
    goal_top_m: float  # from the goal's origin to the surface that things are put on

    def __init__(self, *args, twin: TwinConfig | None = None, embodiment: Embodiment | None = None, **kwargs):
        self.twin = twin or TwinConfig(task=self.TASK)
        self.embodiment = embodiment or Embodiment()
        if self.twin.sim_freq % self.embodiment.policy_rate_hz:
            raise ValueError(
                f"sim_freq {self.twin.sim_freq} is no multiple of the policy rate {self.embodiment.policy_rate_hz} Hz"
            )
        robot = self.ROBOT.tuned(
            arm_acceleration_rad_s2=self.twin.arm_acceleration_rad_s2 if self.twin.arm_follows == "plans" else 0.0,
            arm_stiffness=self.twin.arm_stiffness,
            arm_damping=self.twin.arm_damping,
            gripper_force_limit=self.twin.gripper_force,
            gripper_damping=self.twin.gripper_damping,
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

    def _load_agent(self, options: dict, initial_agent_poses=None, build_separate: bool = False):
        super()._load_agent(options, sapien.Pose())
        for joint in self.agent.robot.joints:
            joint.set_friction(0.0)

    def _load_scene(self, options: dict):
        twin = self.twin
        if self.scene.can_render():
            use_collision_shapes_as_visuals(self.agent.robot)
            self.room = self._room()
        self._surface = sapien.physx.PhysxMaterial(twin.friction, twin.friction, 0.0)
        table = self.scene.create_actor_builder()
        (x, y), (half_x, half_y, half_z) = TABLE_CENTRE_M, TABLE_HALF_M
        table.add_box_collision(sapien.Pose([x, y, -half_z]), TABLE_HALF_M, material=self._surface)
        half_plank = half_y / twin.table_planks
        for plank in range(twin.table_planks):
            place = sapien.Pose([x, y - half_y + (2 * plank + 1) * half_plank, -half_z])
            table.add_box_visual(place, [half_x, half_plank, half_z], material=paint(twin.table_colour))
        table.initial_pose = sapien.Pose()
        self.table = table.build_static("table")
        self._entities: list[sapien.Entity] = []
        self._load_task(self._surface)

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

    @property
    def candidates(self) -> tuple[list[Actor], list[Actor]]:
        """What an episode's object and its goal are chosen from."""
        return [self.object], [self.goal]

    @abstractmethod
    def legacy_place(self, object_pos_m: Any, goal_pos_m: Any) -> Any:
        """Where the peer's predicate holds, from the two bodies' origins: numpy or tensors [..., 3] -> bool [...]."""
        ...

    @abstractmethod
    def lies_on_goal(self, object_pos_m: Any, goal_pos_m: Any) -> Any:
        """Whether the object's centre is where it lies when it was put down well: [..., 3] -> bool [...]."""
        ...

    def legacy_success(self, object_pos_m: np.ndarray, goal_pos_m: np.ndarray) -> bool:
        """The peer's predicate."""
        return bool(
            self.legacy_place(object_pos_m, goal_pos_m)
            and (self.LEGACY_FORCE_N < 0 or self._force_on_goal_n() > self.LEGACY_FORCE_N)
        )

    def stable_success(self, object_pos_m: np.ndarray, goal_pos_m: np.ndarray) -> bool:
        """Well put down, at rest, and released."""
        return (
            bool(self.lies_on_goal(object_pos_m, goal_pos_m))
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

    def set_arm_dynamics(self, **values: float) -> None:
        """From the next reset on, instead of the configured `arm_acceleration_rad_s2`, `arm_stiffness`, `arm_damping`
        or `latency_s`."""
        self.twin, arm = replace(self.twin, **values), self._controllers[0]
        if arm.plans is not None:
            arm.plans.set_acceleration(self.twin.arm_acceleration_rad_s2)
        for joint in arm.joints:
            joint.set_drive_properties(self.twin.arm_stiffness, self.twin.arm_damping, self.agent.arm_force_limit)

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
        fingers = ("panda_leftfinger", "panda_rightfinger")
        self._fingers = {self.agent.robot.links_map[name]._objs[0] for name in fingers}
        controllers = self.agent.controller.controllers
        self._controllers = (controllers["arm"], controllers["gripper"])

    def _fingers_touching(self) -> int:
        """How many fingers press on the object. Contacts live on their pairs of bodies, so this walks few."""
        touching = set()
        for contact in self.scene.px.get_contacts():
            others = set(contact.bodies) - {self._object_body}
            if len(others) == 1 and others <= self._fingers and any(point.impulse.any() for point in contact.points):
                touching |= others
        return len(touching)

    def _force_on_goal_n(self) -> float:
        """Between object and goal, mean over the last physics step."""
        pair = {self._object_body, self._goal_body}
        impulses = [p.impulse for c in self.scene.px.get_contacts() if set(c.bodies) == pair for p in c.points]
        return float(np.linalg.norm(np.sum(impulses, axis=0)) * self.twin.sim_freq) if impulses else 0.0

    def _settle(self) -> None:
        if self.bare or not self.SETTLE_S:
            return
        for _ in range(round(self.SETTLE_S * self.twin.sim_freq)):
            self.scene.px.step()
        self._object_body.linear_velocity = self._object_body.angular_velocity = np.zeros(3, np.float32)

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
