"""A fake of PhysX's GPU system, which cannot run here: one CPU system for each sub-scene behind the same buffers.

What is written to a buffer counts once it is applied, and what is read is what was last fetched, as on a GPU; so code
that forgets either is found out. Only what ManiSkill and the twin ask for is there.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import sapien
import sapien.physx
import torch
from mani_skill.envs import sapien_env
from mani_skill.envs.scene import ManiSkillScene
from mani_skill.utils.structs import Articulation, ArticulationJoint, base

from sim.twin.batched_scene import BatchedScene


class Buffer:
    def __init__(self, rows: int, columns: int):
        self.data = torch.zeros(rows, columns)

    def torch(self) -> torch.Tensor:
        return self.data


class FakeGpuSystem:
    def __init__(self, systems: list[sapien.physx.PhysxCpuSystem]):
        self.systems, self.calls = systems, 0

    @property
    def timestep(self) -> float:
        return self.systems[0].timestep

    @timestep.setter
    def timestep(self, value: float) -> None:
        for system in self.systems:
            system.timestep = value

    def gpu_init(self) -> None:
        self.bodies = [body for system in self.systems for body in system.rigid_dynamic_components]
        self.links = [link for system in self.systems for link in system.articulation_link_components]
        self.arms = list(dict.fromkeys(link.articulation for link in self.links))
        self.index = {body: row for row, body in enumerate(self.bodies + self.links)}
        self.cuda_rigid_body_data = Buffer(len(self.index), 13)
        for name in ("qpos", "qvel", "qf", "target_qpos", "target_qvel", "qacc"):
            setattr(self, f"cuda_articulation_{name}", Buffer(len(self.arms), 9))

    def step(self) -> None:
        for system in self.systems:
            system.step()

    def gpu_apply_rigid_dynamic_data(self) -> None:
        for row, body in zip(self.cuda_rigid_body_data.data.numpy(), self.bodies, strict=False):
            body.entity_pose = sapien.Pose(row[:3], row[3:7])
            if not body.kinematic:
                body.linear_velocity, body.angular_velocity = row[7:10], row[10:13]

    def gpu_fetch_rigid_dynamic_data(self) -> None:
        self._fetch(self.bodies)

    def gpu_fetch_articulation_link_pose(self) -> None:
        self._fetch(self.links)

    def _fetch(self, components: list[Any]) -> None:
        for c in components:
            row = np.concatenate([c.entity_pose.p, c.entity_pose.q, c.linear_velocity, c.angular_velocity])
            self.cuda_rigid_body_data.data[self.index[c]] = torch.tensor(row)

    def gpu_apply_articulation_target_position(self) -> None:
        for targets, arm in zip(self.cuda_articulation_target_qpos.data.numpy(), self.arms, strict=True):
            for joint, target in zip(arm.active_joints, targets, strict=True):
                joint.set_drive_target(target)

    def __getattr__(self, name: str) -> Any:
        """The rest of what is applied to joints, and fetched from them."""
        what, _, key = name.partition("_articulation_")
        if what == "gpu_apply" and key in ("qpos", "qvel", "qf"):
            return lambda: self._joints(key, apply=True)
        if what == "gpu_fetch" and key in ("qpos", "qvel"):
            return lambda: self._joints(key, apply=False)
        if what in ("gpu_apply", "gpu_fetch", "gpu_update"):
            return lambda: None  # the root stands still, and CPU systems keep their kinematics themselves
        raise AttributeError(name)

    def _joints(self, key: str, apply: bool) -> None:
        for row, arm in enumerate(self.arms):
            values = getattr(self, f"cuda_articulation_{key}").data[row]
            if apply:
                setattr(arm, key, values.numpy())
            else:
                values[:] = torch.tensor(getattr(arm, key))

    def gpu_create_contact_pair_impulse_query(self, pairs: list[tuple]) -> SimpleNamespace:
        return SimpleNamespace(pairs=pairs, cuda_impulses=Buffer(len(pairs), 3))

    def gpu_query_contact_pair_impulses(self, query: SimpleNamespace) -> None:
        query.cuda_impulses.data[:] = 0
        for system in self.systems:
            for contact in system.get_contacts():
                for row, pair in enumerate(query.pairs):
                    if set(contact.bodies) == set(pair):
                        impulse = np.sum([point.impulse for point in contact.points], axis=0)
                        query.cuda_impulses.data[row] += torch.tensor(impulse, dtype=torch.float32)


def several_scenes(monkeypatch) -> None:
    """From now on `BatchedScene` runs any number of environments on "physx_cpu", as it would on a GPU."""
    number = property(lambda self: torch.tensor([self.scene.px.index[body] for body in self._bodies]))
    arms = property(lambda self: _numbers(self.scene.px.arms, self._objs))
    arms_of_joint = property(lambda self: _numbers(self.scene.px.arms, self._physx_articulations))
    monkeypatch.setattr(sapien_env, "CPU_SIM_BACKENDS", set())
    monkeypatch.setattr(sapien.physx, "PhysxGpuSystem", FakeGpuSystem)
    monkeypatch.setattr(base.PhysxRigidBodyComponentStruct, "_body_data_index", number)
    monkeypatch.setattr(Articulation, "_data_index", arms)
    monkeypatch.setattr(ArticulationJoint, "_data_index", arms_of_joint)
    monkeypatch.setattr(BatchedScene, "_setup_scene", _setup_scene)


def _numbers(among: list[Any], those: list[Any]) -> torch.Tensor:
    return torch.tensor([among.index(one) for one in those], dtype=torch.int32)


def _setup_scene(self: BatchedScene) -> None:
    self._set_scene_config()
    systems = [sapien.physx.PhysxCpuSystem() for _ in range(self.num_envs)]
    scenes = [sapien.Scene([system]) for system in systems]
    self.scene = ManiSkillScene(scenes, sim_config=self.sim_config, device=self.device, backend=self.backend)
    self.scene.px, self.scene.gpu_sim_enabled = FakeGpuSystem(systems), True
    self.scene.px.timestep = 1.0 / self._sim_freq
