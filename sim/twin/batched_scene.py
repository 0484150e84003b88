"""The twin's tasks with many environments in one simulation: ManiSkill's sub-scenes, all state in batched tensors.

Made for `physx_cuda`, which steps all sub-scenes at once. The same code runs one environment on `physx_cpu`, which is
how it is tested. An environment that is frozen takes part in the physics like the others and is put back afterwards.
"""

from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers import PDJointPosControllerConfig
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

SHELF_M, PITCH_M = (0.42, 0.0, -3.0), 0.3  # where bodies wait that take no part: below the floor, in rows
FINGERS = ("panda_leftfinger", "panda_rightfinger")
State = dict[str, dict[str, Tensor]]


class BatchedPanda(TwinPanda):
    """Joint targets come from `BatchedArm`, for all joints and environments in one call."""

    @property
    def _controller_configs(self):
        arm, fingers = self.arm_joint_names, self.gripper_joint_names
        gains = {
            key: [getattr(self, f"arm_{key}")] * len(arm) + [getattr(self, f"gripper_{key}")] * len(fingers)
            for key in ("stiffness", "damping", "force_limit")
        }
        return {CONTROL_MODE: PDJointPosControllerConfig([*arm, *fingers], None, None, **gains, normalize_action=False)}


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
        self._fingers = [self.agent.robot.links_map[name] for name in FINGERS]
        self._carried, self._receivers = self.candidates
        self.arm = BatchedArm(n, self.twin, self.embodiment, device)
        self._rows, self._frozen = torch.arange(n, device=device), torch.zeros(n, dtype=torch.bool, device=device)
        self._chosen = torch.zeros(2, n, dtype=torch.long, device=device)  # which object, which goal
        self._columns: dict[str, Tensor] = {}
        self._lights, self._offsets = np.ones(n), np.zeros((n, len(self.embodiment.cameras), 4, 4))
        stages = {name: torch.zeros_like(self._frozen) for name in ("reached", "grasped", "lifted", "over_goal")}
        self.now, self._repainted = {"stages": stages}, False

    def _show_looks(self, sun, ambient, colours, planks, shifts):
        """Once: here `TwinConfig` allows none but the nominal ones."""
        for index in range(0 if self._repainted else self.num_envs):
            self._repaint(index, colours, planks, self._receivers)
        self._repainted = True

    def _initialize_episode(self, env_idx: Tensor, options: dict):
        """Nothing: `begin` does it."""

    def evaluate(self) -> dict[str, Any]:
        return {}

    # --- episodes -----------------------------------------------------------------------------------------------------

    def begin(self, envs: list[int], seeds: list[int]) -> None:
        """Begin the episodes of `seeds` in these environments; the draws are those of `TwinEnv`."""
        rows, mask = torch.tensor(envs, device=self.device), torch.zeros_like(self._frozen)
        before, state, finger_m = self.scene.get_sim_state(), self.scene.get_sim_state(), 0.5 * self.arm.open_m
        mask[rows] = True
        joints, delays = [], []
        for env, seed in zip(envs, seeds, strict=True):
            rng, physics = np.random.default_rng(seed), np.random.default_rng([seed, 1])
            places = self._place(rng)
            joints.append(np.array(self.embodiment.home_joint_pos_rad) + rng.normal(0, self.twin.home_noise_rad, 7))
            physics.uniform()  # of the friction: one material serves all
            latency_s = self.twin.latency_s + physics.uniform(0.0, self.twin.randomization.latency_s)
            delays.append(round(latency_s * self.twin.sim_freq))
            self._randomize_looks(rng)
            self._lights[env], self._offsets[env] = self._light, list(self._camera_offsets.values())
            for name in self.PER_EPISODE:
                value = torch.as_tensor(getattr(self, name), dtype=torch.float64, device=self.device)
                self._columns.setdefault(name, value.new_zeros(self.num_envs, *value.shape))[env] = value
            for index, actor in enumerate(self._carried + self._receivers):
                waits_m = np.add(SHELF_M, [PITCH_M * (index % 6 - 3), PITCH_M * (index // 6 - 3), 0.1])
                state["actors"][actor.name][env] = torch.tensor([*waits_m, 1.0, *[0.0] * 9])
            for which, (actors, own) in enumerate(((self._carried, self.object), (self._receivers, self.goal))):
                self._chosen[which, env] = actors.index(own)
                state["actors"][own.name][env, :7] = torch.tensor([*places[which].p, *places[which].q])
        for name, column in self._columns.items():  # what predicates and stages read
            setattr(self, name, column)
        q = torch.tensor(np.array(joints), device=self.device)
        self.arm.hold(rows, q, finger_m, torch.tensor(delays, device=self.device))
        arms = state["articulations"][self.agent.robot.name]
        arms[rows, 13:22], arms[rows, 22:] = self.arm.at_rest()[rows].float(), 0.0
        self._drive(self.arm.at_rest())
        self._put(state, rows)
        if self.SETTLE_S:
            self._simulate(round(self.SETTLE_S * self.twin.sim_freq))
            state = self.scene.get_sim_state()
            for actor in self._carried:
                state["actors"][actor.name][:, 7:] = 0.0
            self._put(_merged(mask, state, before), self._rows)
        for values in self.now["stages"].values():
            values[rows] = False
        self._note(mask)

    def step(self, actions: Tensor) -> None:
        """One period of the contract's actions [n, 7] in the environments that are not frozen."""
        self.arm.move(actions, self.active)
        for sim_step in range(self.arm.sim_steps):
            self._drive(self.arm.drives(sim_step, self.active))
            self.scene.px.step()
        self._simulate(0)
        self._note(self.active)

    @property
    def active(self) -> Tensor:
        return ~self._frozen

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

    def _simulate(self, steps: int) -> None:
        """Physics steps, after which tensors are as the simulation is."""
        for _ in range(steps):
            self.scene.px.step()
        if self.gpu_sim_enabled:
            self.scene._gpu_fetch_all()

    # --- what is so ---------------------------------------------------------------------------------------------------

    def _note(self, mask: Tensor) -> None:
        """Facts of the environments in the mask [n]; those of the others stay."""
        qpos, body = self.agent.robot.get_qpos(), self._own(0, [actor.pose.raw_pose for actor in self._carried])
        object_pos, goal_pos = body[:, :3], self._own(1, [actor.pose.p for actor in self._receivers])
        w, x, y, z = body[:, 3:].double().unbind(-1)
        T_base_tcp, s = self.agent.tcp.pose.to_transformation_matrix().double(), self.now["stages"]
        pressing = [self._impulses(self._carried, [finger]).norm(dim=-1) > 0 for finger in self._fingers]
        if self.twin.success == "legacy":
            success = self.legacy_place(object_pos, goal_pos)
            if self.LEGACY_FORCE_N >= 0:
                force_n = self._impulses(self._carried, self._receivers).norm(dim=-1) * self.twin.sim_freq
                success = success & (force_n > self.LEGACY_FORCE_N)
        else:
            still = self._own(0, [actor.linear_velocity for actor in self._carried]).norm(dim=-1) < STILL_M_PER_S
            success = self.lies_on_goal(object_pos, goal_pos) & still & ~(pressing[0] | pressing[1])
        tcp_to_object = (T_base_tcp[:, :3, 3] - object_pos).norm(dim=-1)
        near, over = mask & (tcp_to_object <= 0.08), across_m(object_pos, goal_pos) < self.twin.success_radius_m
        held = near & pressing[0] & pressing[1]
        lifted = s["lifted"] | (held & (object_pos[:, 2] > self.rest_height_m + LIFTED_M))
        stages = {"reached": s["reached"] | (near & (tcp_to_object < 0.03)), "grasped": s["grasped"] | held}
        stages |= {"lifted": lifted, "over_goal": s["over_goal"] | (near & lifted & over)}
        fresh = {
            "T_base_tcp": T_base_tcp,
            "T_base_target": self.arm.T_base_target.clone(),
            "gripper_opening_m": (qpos[:, 7] + qpos[:, 8]).double(),
            "object_pos_m": object_pos.double(),
            "object_yaw_rad": torch.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)),
            "goal_pos_m": goal_pos + torch.tensor([0.0, 0.0, self.goal_top_m], device=self.device).double(),
            "success": success,
        }
        self.now = _merged(mask, {"": fresh}, {"": fresh | self.now})[""] | {"stages": stages}

    def _own(self, which: int, values: list[Tensor]) -> Tensor:
        """Of what each object (0) or goal (1) has, each environment's own: [n, ...]."""
        return torch.stack(values)[self._chosen[which], self._rows]

    def _impulses(self, objects: list[Actor], others: list[Any]) -> Tensor:
        """[n, 3]: between each environment's own object and its own goal, or a finger, in the last physics step."""
        pairs = [[self.scene.get_pairwise_contact_impulses(one, other) for one in objects] for other in others]
        other = self._chosen[1] if others is self._receivers else torch.zeros_like(self._rows)
        return torch.stack([torch.stack(of) for of in pairs])[other, self._chosen[0], self._rows]

    def rewards(self) -> Tensor:
        """[n]: of the last step, as `TwinEnv.dense_reward` or 1 on success."""
        now, done = self.now, self.now["success"].double()
        if self.twin.reward != "dense":
            return done
        reward = 1 - torch.tanh(5 * (now["T_base_tcp"][:, :3, 3] - now["object_pos_m"]).norm(dim=-1))
        carry = 2 - torch.tanh(5 * across_m(now["object_pos_m"], now["goal_pos_m"]))
        return torch.where(now["success"], 1.0, (reward + now["stages"]["grasped"] * carry) / 5)

    def states(self) -> np.ndarray:
        """The observations' `state`, float32 [n, 7]."""
        return pose.state_vector(*(self.now[key].cpu().numpy() for key in ("T_base_tcp", "gripper_opening_m")))

    # --- pictures -----------------------------------------------------------------------------------------------------

    def shown(self, *textures: str) -> dict[str, list[np.ndarray]]:
        """SAPIEN's pictures of each camera: "Color" uint8 [n, H, W, 3], "Distance" float32 [n, H, W], inf where nothing
        is."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        for sensor in self._sensors.values():
            sensor.capture()
        drawn = {name: sensor.camera.get_picture(list(textures)) for name, sensor in self._sensors.items()}
        share = self.twin.supersampling
        return {name: [_shrunk(picture, share).cpu().numpy() for picture in found] for name, found in drawn.items()}

    def views(self, links: list[str], actors: list[str], with_rgb: bool) -> list[View]:
        """`TwinEnv.view` of every environment."""
        drawn, n = self.shown("Color", "Distance") if with_rgb else {}, self.num_envs
        bodies = [self.agent.robot.links_map[name].pose.to_transformation_matrix() for name in links]
        for name in actors:
            T = torch.tensor(ABSENT, device=self.device).expand(n, 4, 4)
            if (actor := self.scene.actors.get(name)) is not None:
                present = torch.ones_like(self._frozen)
                for which, those in enumerate((self._carried, self._receivers)):
                    if actor in those:
                        present = self._chosen[which] == those.index(actor)
                T = torch.where(present[:, None, None], actor.pose.to_transformation_matrix().to(self.device), T)
            bodies.append(T)
        T_body = torch.stack(bodies, 1).cpu().numpy() if bodies else np.zeros((n, 0, 4, 4), np.float32)
        T_tcp, cameras = self.now["T_base_tcp"].cpu().numpy(), sorted(self.embodiment.cameras.items())
        mounts = [T_tcp if camera.mount == "tcp" else np.eye(4) for _, camera in cameras]
        T_cam = [T @ cameras[m][1].matrix @ self._offsets[:, m] for m, T in enumerate(mounts)]
        T_cam = np.stack(T_cam, 1).astype(np.float32)
        rgb, depth_m = ([{k: found[i][env] for k, found in drawn.items()} for env in range(n)] for i in (0, 1))
        return [View(rgb[env], depth_m[env], T_body[env], T_cam[env], float(self._lights[env])) for env in range(n)]


def batched_scene(n: int, twin: TwinConfig, embodiment: Embodiment, sim_backend: str, render_backend: str) -> Any:
    task = {task.TASK: task for task in (PutCubeOnPlateEnv, PickPlaceTwinEnv)}[twin.task]
    made: Any = type(f"Batched{task.__name__}", (BatchedScene, task), {})
    backends = {"sim_backend": sim_backend, "render_backend": render_backend}
    return made(num_envs=n, obs_mode="none", twin=twin, embodiment=embodiment, **backends)


def _merged(mask: Tensor, new: State, old: State) -> State:
    """Rows of `new` where the mask [n] is, else of `old`."""
    return {
        kind: {name: torch.where(mask.view(-1, *[1] * (v.ndim - 1)), v, old[kind][name]) for name, v in those.items()}
        for kind, those in new.items()
    }


def _shrunk(picture: Tensor, share: int) -> Tensor:
    """Blocks of share x share pixels to one: the mean of colours, the nearest distance (0 is nothing: inf)."""
    n, height, width = picture.shape[:3]
    blocks = picture.reshape(n, height // share, share, width // share, share, -1)
    if picture.dtype == torch.uint8:
        return ((blocks[..., :3].int().sum((2, 4)) + share * share // 2) // (share * share)).to(torch.uint8)
    return torch.where(blocks > 0, blocks, torch.inf).amin((2, 4))[..., 0]
