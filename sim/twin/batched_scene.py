"""The twin's tasks with many environments in one simulation: ManiSkill's sub-scenes, all state in batched tensors.

Made for `physx_cuda`, which steps all sub-scenes at once. The same code runs one environment on `physx_cpu`, which is
how it is tested. An environment that is frozen takes part in the physics like the others and is put back afterwards.
"""

from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers import PDJointPosControllerConfig
from mani_skill.utils.geometry.rotation_conversions import quaternion_to_matrix
from mani_skill.utils.structs import Actor
from torch import Tensor

from bridge import pose
from bridge.embodiment import Embodiment
from sim.twin.arm import CONTROL_MODE, TwinPanda
from sim.twin.batched_arm import BatchedArm
from sim.twin.config import TwinConfig
from sim.twin.looks import ABSENT
from sim.twin.pick_place import PickPlaceTwinEnv
from sim.twin.put_cube import PutCubeOnPlateEnv
from sim.twin.scene import LIFTED_M, STILL_M_PER_S, TwinEnv, across_m
from sim.twin.splat_pictures import View

SHELF_M, PITCH_M = (0.42, 0.0, -3.0), 0.3  # where bodies wait that take no part: below the floor, on a grid
STAGES = ("reached", "grasped", "lifted", "over_goal")
FINGERS = ("panda_leftfinger", "panda_rightfinger")
State = dict[str, dict[str, Tensor]]


class BatchedPanda(TwinPanda):
    """Joint targets come from `BatchedArm`, for all joints and environments in one call."""

    @property
    def _controller_configs(self):
        joints = [*self.arm_joint_names, *self.gripper_joint_names]
        arm, fingers = len(self.arm_joint_names), len(self.gripper_joint_names)
        return {
            CONTROL_MODE: PDJointPosControllerConfig(
                joints,
                lower=None,
                upper=None,
                stiffness=[self.arm_stiffness] * arm + [self.gripper_stiffness] * fingers,
                damping=[self.arm_damping] * arm + [self.gripper_damping] * fingers,
                force_limit=[self.arm_force_limit] * arm + [self.gripper_force_limit] * fingers,
                normalize_action=False,
            )
        }


class BatchedScene(TwinEnv):
    """To be mixed into a task, before it. `now`: of each environment what `sim.twin.scene.Facts` are of one, by the
    same names, and `stages` too a dict of bool [n]."""

    ROBOT = BatchedPanda
    now: dict[str, Any]

    # --- what ManiSkill asks for --------------------------------------------------------------------------------------

    def _load_scene(self, options: dict):
        super()._load_scene(options)
        shelf = self.scene.create_actor_builder()
        shelf.add_box_collision(sapien.Pose(), [2.0, 2.0, 0.05])
        shelf.initial_pose = sapien.Pose(np.add(SHELF_M, [0, 0, -0.05]))
        shelf.build_static("shelf")

    def _after_reconfigure(self, options: dict):
        n, device = self.num_envs, self.device
        links = self.agent.robot.links_map
        self._fingers = [links[name] for name in FINGERS]
        self._objects, self._goals = self.candidates
        side = int(np.ceil(np.sqrt(len(self._objects + self._goals))))
        self._waits = {
            actor.name: np.add(SHELF_M, [PITCH_M * (i % side - side / 2), PITCH_M * (i // side - side / 2), 0.1])
            for i, actor in enumerate(self._objects + self._goals)
        }
        self.arm = BatchedArm(n, self.twin, self.embodiment, device)
        self._rows = torch.arange(n, device=device)
        self._frozen = torch.zeros(n, dtype=torch.bool, device=device)
        self._chosen = torch.zeros(2, n, dtype=torch.long, device=device)  # object and goal of each
        self._columns: dict[str, Tensor] = {}
        self._lights, self._offsets = np.ones(n), np.tile(np.eye(4), (n, len(self.embodiment.cameras), 1, 1))
        self._stages = {name: torch.zeros(n, dtype=torch.bool, device=device) for name in STAGES}
        self.now = {}
        if self.scene.can_render():
            looks = self._draw_looks(np.random.default_rng(0))  # the nominal ones: `TwinConfig` allows no others here
            for index in range(n):
                self._paint(looks, index, self._goals)

    def _initialize_episode(self, env_idx: Tensor, options: dict):
        """Nothing: `begin` does it."""

    def evaluate(self) -> dict[str, Any]:
        return {}

    # --- episodes -----------------------------------------------------------------------------------------------------

    def begin(self, envs: list[int], seeds: list[int]) -> None:
        """Begin the episodes of `seeds` in these environments; the draws are those of `TwinEnv`."""
        rows, before = torch.tensor(envs, device=self.device), self.scene.get_sim_state()
        state = {kind: {name: values.clone() for name, values in part.items()} for kind, part in before.items()}
        finger, joints, delays = self.embodiment.gripper_open_m / 2, [], []
        for env, seed in zip(envs, seeds, strict=True):
            rng = np.random.default_rng(seed)
            poses = dict(zip(("object", "goal"), self._place(rng), strict=True))
            joints.append(np.array(self.embodiment.home_joint_pos_rad) + rng.normal(0, self.twin.home_noise_rad, 7))
            for name in self.PER_EPISODE:
                value = torch.as_tensor(getattr(self, name), dtype=torch.float64, device=self.device)
                self._columns.setdefault(name, value.new_zeros(self.num_envs, *value.shape))[env] = value
            for actors, name, row in ((self._objects, "object", 0), (self._goals, "goal", 1)):
                for index, actor in enumerate(actors):
                    chosen = actor is getattr(self, name)
                    place = poses[name] if chosen else sapien.Pose(self._waits[actor.name])
                    state["actors"][actor.name][env] = torch.tensor([*place.p, *place.q, *[0.0] * 6])
                    if chosen:
                        self._chosen[row, env] = index
            physics = np.random.default_rng([seed, 1])
            physics.uniform()  # of the friction, which one material has for all
            latency_s = self.twin.latency_s + physics.uniform(0.0, self.twin.randomization.latency_s)
            delays.append(round(latency_s * self.twin.sim_freq))
            looks = self._draw_looks(rng)
            self._lights[env], self._offsets[env] = looks.light, list(looks.camera_offsets.values())
        for name, column in self._columns.items():  # what predicates and stages read
            setattr(self, name, column)
        q = torch.tensor(np.array(joints), device=self.device)
        self.arm.hold(rows, q, finger, torch.tensor(delays, device=self.device))
        arms = state["articulations"][self.agent.robot.name]
        arms[rows, 13:] = 0.0
        arms[rows, 13:22] = self.arm.at_rest()[rows].float()
        self._drive(self.arm.at_rest())
        self._put(state, rows)
        self._settle_rows(rows, before)
        for values in self._stages.values():
            values[rows] = False
        self.now = self._facts(rows)

    def _settle_rows(self, rows: Tensor, before: State) -> None:
        if not self.SETTLE_S:
            return
        for _ in range(round(self.SETTLE_S * self.twin.sim_freq)):
            self.scene.px.step()
        self._fetch()
        state, mask = self.scene.get_sim_state(), torch.zeros_like(self._frozen)
        mask[rows] = True
        for actor in self._objects:
            state["actors"][actor.name][:, 7:] = 0.0
        self._put(_merged(mask, state, before), self._rows)

    def step(self, actions: Tensor) -> None:
        """One period of the contract's actions [n, 7] in the environments that are not frozen."""
        active = ~self._frozen
        self.arm.move(actions, active)
        for sim_step in range(self.arm.sim_steps):
            self._drive(self.arm.drives(sim_step, active))
            self.scene.px.step()
        self._fetch()
        self.now = self._facts(active)

    def freeze(self, rows: Tensor) -> None:
        """From now on nothing happens in the environments of the mask [n], until `thaw`."""
        if bool(rows.any()):
            state = self.scene.get_sim_state()
            self._kept = _merged(rows & ~self._frozen, state, self._kept) if bool(self._frozen.any()) else state
            self._frozen = self._frozen | rows

    def thaw(self) -> None:
        """Everything frozen is as it was."""
        if bool(self._frozen.any()):
            self._put(self._kept, self._frozen.nonzero()[:, 0])
            self._frozen = torch.zeros_like(self._frozen)

    @property
    def active(self) -> Tensor:
        return ~self._frozen

    def _put(self, state: State, rows: Tensor) -> None:
        part = {kind: {name: values[rows] for name, values in those.items()} for kind, those in state.items()}
        self.scene.set_sim_state(part, rows)
        if self.gpu_sim_enabled:
            self.scene._gpu_apply_all()
            self.scene.px.gpu_update_articulation_kinematics()
            self.scene._gpu_fetch_all()

    def _drive(self, targets: Tensor) -> None:
        self.agent.controller.set_drive_targets(targets.float())
        if self.gpu_sim_enabled:
            self.scene.px.gpu_apply_articulation_target_position()

    def _fetch(self) -> None:
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()

    # --- what is so ---------------------------------------------------------------------------------------------------

    def _facts(self, rows: Tensor) -> dict[str, Any]:
        """Of the environments in `rows` (mask or numbers) as they are; of the others as they were."""
        mask = torch.zeros_like(self._frozen)
        mask[rows] = True
        qpos, body = self.agent.robot.get_qpos(), self._of(self._objects, 0, "pose")
        object_pos, goal_pos = body[:, :3], self._of(self._goals, 1, "pose")[:, :3]
        w, x, y, z = body[:, 3:].double().unbind(-1)
        T_base_tcp = matrices(self.agent.tcp.pose.raw_pose)
        tcp_to_object = (T_base_tcp[:, :3, 3] - object_pos).norm(dim=-1)
        lies = self.lies_on_goal(object_pos, goal_pos)
        asked = mask & ((tcp_to_object <= 0.08) | lies)  # elsewhere nobody asks who touches the object
        touching = self._fingers_pressing() if bool(asked.any()) else torch.zeros_like(self._rows)
        if self.twin.success == "legacy":
            success = self.legacy_place(object_pos, goal_pos)
            if self.LEGACY_FORCE_N >= 0 and bool(success.any()):
                success = success & (self._pressed_n() > self.LEGACY_FORCE_N)
        else:
            still = self._of(self._objects, 0, "linear_velocity").norm(dim=-1) < STILL_M_PER_S
            success = lies & still & (touching == 0)
        near, held, s = mask & (tcp_to_object <= 0.08), touching == 2, self._stages
        s["reached"] = s["reached"] | (near & (tcp_to_object < 0.03))
        s["grasped"] = s["grasped"] | (near & held)
        s["lifted"] = s["lifted"] | (near & held & (object_pos[:, 2] > self.rest_height_m + LIFTED_M))
        over = across_m(object_pos, goal_pos) < self.twin.success_radius_m
        s["over_goal"] = s["over_goal"] | (near & s["lifted"] & over)
        top = torch.tensor([0.0, 0.0, self.goal_top_m], dtype=torch.float64, device=self.device)
        fresh = {
            "T_base_tcp": T_base_tcp,
            "T_base_target": self.arm.T_base_target,
            "gripper_opening_m": (qpos[:, 7] + qpos[:, 8]).double(),
            "object_pos_m": object_pos.double(),
            "object_yaw_rad": torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)),
            "goal_pos_m": goal_pos + top,
            "success": success,
        }
        if self.now:
            fresh = _merged(mask, {"": fresh}, {"": self.now})[""]
        return {**fresh, "stages": dict(s)}

    def _of(self, actors: list[Actor], which: int, name: str) -> Tensor:
        """An attribute [n, ...] of each environment's own one of the actors."""
        values = [getattr(actor, name) for actor in actors]
        stacked = torch.stack([value.raw_pose if name == "pose" else value for value in values])
        return stacked[self._chosen[which], self._rows]

    def _fingers_pressing(self) -> Tensor:
        """[n]: how many fingers press on the object."""
        pairs = [[self.scene.get_pairwise_contact_impulses(o, f) for o in self._objects] for f in self._fingers]
        impulses = torch.stack([torch.stack(of)[self._chosen[0], self._rows] for of in pairs])
        return (impulses.norm(dim=-1) > 0).sum(0)

    def _pressed_n(self) -> Tensor:
        """[n]: the force between object and goal, mean over the last physics step."""
        pairs = [[self.scene.get_pairwise_contact_forces(o, g) for o in self._objects] for g in self._goals]
        forces = torch.stack([torch.stack(of) for of in pairs])
        return forces[self._chosen[1], self._chosen[0], self._rows].norm(dim=-1)

    def rewards(self) -> Tensor:
        """[n]: of the last step, as `TwinEnv.dense_reward` or 1 on success."""
        now, done = self.now, self.now["success"].double()
        if self.twin.reward != "dense":
            return done
        reward = 1 - torch.tanh(5 * (now["T_base_tcp"][:, :3, 3] - now["object_pos_m"]).norm(dim=-1))
        carry = 2 - torch.tanh(5 * across_m(now["object_pos_m"], now["goal_pos_m"]))
        return torch.where(now["success"], 1.0, (reward + now["stages"]["grasped"] * carry) / 5)

    # --- pictures -----------------------------------------------------------------------------------------------------

    def all_pictures(self, *textures: str) -> dict[str, list[np.ndarray]]:
        """SAPIEN's, of each camera: "Color" uint8 [n, H, W, 3] (the mean of what is drawn larger), "Distance" float32
        [n, H, W], inf where nothing is (the nearest)."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        for sensor in self._sensors.values():
            sensor.capture()
        share = self.twin.supersampling
        drawn = {name: sensor.camera.get_picture(list(textures)) for name, sensor in self._sensors.items()}
        return {name: [_shrunk(picture, share).cpu().numpy() for picture in found] for name, found in drawn.items()}

    def views(self, links: list[str], actors: list[str], with_rgb: bool) -> list[View]:
        """`TwinEnv.view` of every environment."""
        n, drawn = self.num_envs, self.all_pictures("Color", "Distance") if with_rgb else {}
        chosen, bodies = self._chosen.cpu(), [self.agent.robot.links_map[name].pose.raw_pose for name in links]
        T_base_body = matrices(torch.stack(bodies, 1)) if links else torch.zeros(n, 0, 4, 4, device=self.device)
        carried = torch.tensor(ABSENT, dtype=torch.float64).repeat(n, len(actors), 1, 1)
        for index, name in enumerate(actors):
            if (actor := self.scene.actors.get(name)) is not None:
                T = matrices(actor.pose.raw_pose.cpu()).expand(n, 4, 4)
                for those, which in ((self._objects, 0), (self._goals, 1)):
                    if actor in those:
                        T = torch.where((chosen[which] == those.index(actor))[:, None, None], T, carried[:, index])
                carried[:, index] = T
        T_body = torch.cat([T_base_body.cpu().double(), carried], 1).float().numpy()
        T_tcp = matrices(self.agent.tcp.pose.raw_pose).cpu().numpy()
        cameras = [camera for _, camera in sorted(self.embodiment.cameras.items())]
        mounts = [T_tcp if camera.mount == "tcp" else np.eye(4) for camera in cameras]
        T_base_cam = [T @ cameras[m].matrix @ self._offsets[:, m] for m, T in enumerate(mounts)]
        T_cam = np.stack(T_base_cam, 1).astype(np.float32)
        return [
            View(
                {name: found[0][env] for name, found in drawn.items()},
                {name: found[1][env] for name, found in drawn.items()},
                T_body[env],
                T_cam[env],
                float(self._lights[env]),
            )
            for env in range(n)
        ]

    def states(self) -> np.ndarray:
        """The observations' `state`, float32 [n, 7]."""
        T, opening = self.now["T_base_tcp"].cpu().numpy(), self.now["gripper_opening_m"].cpu().numpy()
        return pose.state_vector(T, opening)


class BatchedPutCube(BatchedScene, PutCubeOnPlateEnv):
    pass


class BatchedPickPlace(BatchedScene, PickPlaceTwinEnv):
    pass


def batched_scene(n: int, twin: TwinConfig, embodiment: Embodiment, sim_backend: str, render_backend: str) -> Any:
    made = {task.TASK: task for task in (BatchedPutCube, BatchedPickPlace)}[twin.task]
    backends = {"sim_backend": sim_backend, "render_backend": render_backend}
    return made(num_envs=n, obs_mode="none", twin=twin, embodiment=embodiment, **backends)


def matrices(poses: Tensor) -> Tensor:
    """p and q (w first) [..., 7] -> float64 [..., 4, 4]."""
    T = torch.eye(4, dtype=torch.float64, device=poses.device).repeat(*poses.shape[:-1], 1, 1)
    T[..., :3, :3], T[..., :3, 3] = quaternion_to_matrix(poses[..., 3:].double()), poses[..., :3]
    return T


def _merged(mask: Tensor, new: State, old: State) -> State:
    """Rows of `new` where the mask [n] is, else of `old`."""
    return {
        kind: {name: torch.where(mask.view(-1, *[1] * (v.ndim - 1)), v, old[kind][name]) for name, v in those.items()}
        for kind, those in new.items()
    }


def _shrunk(picture: Tensor, share: int) -> Tensor:
    """Blocks of share x share pixels to one: the mean of colours, the nearest distance (0 is nothing: inf)."""
    n, height, width, channels = (picture if picture.ndim == 4 else picture[..., None]).shape
    blocks = picture.view(n, height // share, share, width // share, share, channels)
    if picture.dtype == torch.uint8:
        return ((blocks[..., :3].int().sum((2, 4)) + share * share // 2) // (share * share)).to(torch.uint8)
    return torch.where(blocks > 0, blocks, torch.inf).amin((2, 4))[..., 0]
