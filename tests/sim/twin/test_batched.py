"""Many environments in one simulation. GPU physics cannot run here: one environment is tried on CPU physics, beside the
twin that everything else uses; the mathematics for 16 beside what computes them one at a time."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import sapien.physx
import torch

from bridge import pose
from bridge.config import load
from bridge.embodiment import Embodiment
from sim.expert import PickPlaceExpert
from sim.twin.arm import ArmKinematics, GripperController, TargetDeltaPoseController
from sim.twin.batched_arm import BatchedArm, BatchedKinematics, twist
from sim.twin.batched_scene import BatchedScene
from sim.twin.batched_worker import BatchedWorker
from sim.twin.config import Randomization, TwinConfig
from sim.twin.demos import TwinDemosConfig
from sim.twin.pick_place import PickPlaceTwinEnv
from sim.twin.put_cube import PutCubeOnPlateEnv
from sim.twin.vector_env import TwinVectorEnv
from sim.twin.worker import Twin
from tests.sim.twin.several_scenes import several_scenes

N = 16
HOME = np.array(Embodiment().home_joint_pos_rad)
FIXED = Randomization(light=0.0, colour=0.0, planks=0.0, camera_pos_m=0.0, camera_rot_rad=0.0)
FOLLOWS = {"arm_follows": "drives", "arm_stiffness": 1000.0, "arm_damping": 75.0}
CUDA = TwinConfig(physics="physx_cuda", randomization=FIXED, picture_width=64, picture_height=48, **FOLLOWS)


def on_cpu(monkeypatch, config, embodiment, num_envs=1, **options) -> TwinVectorEnv:
    """The batched code on CPU physics."""
    monkeypatch.setattr(BatchedWorker, "sim_backend", "physx_cpu")
    return TwinVectorEnv(config, embodiment, num_envs, 1, **options)


def test_an_episode_is_the_twins(monkeypatch, embodiment):
    """The expert's actions in both: a scene that has seen contacts solves them in another order than a fresh one, so
    poses may differ by a millimetre (0.34 mm was the most in ten episodes)."""
    twin = Twin(dataclasses.replace(CUDA, physics="physx_cpu"), embodiment)
    with on_cpu(monkeypatch, CUDA, embodiment, auto_reset=False) as env:
        for seed in (1, 2):
            observation = env.reset([seed])
            twin.reset(seed)
            assert np.allclose(observation.state[0], twin.state, atol=1e-6)
            for name, picture in twin.pictures().items():
                off = np.abs(observation.images[name][0].astype(int) - picture).max(-1)
                assert (off > 2).mean() < 0.002, name  # at edges
            (found,), wanted = env._local.scene.views([], [], with_rgb=True), twin.env.view([], [], with_rgb=True)
            for name, depth_m in wanted.depth_m.items():
                off = ~np.isclose(found.depth_m[name], depth_m, atol=1e-3)
                assert off.mean() < 0.002, name
            env.watch(0)
            expert = PickPlaceExpert(embodiment, seed)
            while not twin.ended:
                f = twin.facts
                action = expert.act(f.T_base_target, f.gripper_opening_m, f.object_pos_m, f.goal_pos_m)
                reward, *_ = twin.step(action)
                result = env.step_chunk(action[None, None])
                (batched,) = env.info_poses()
                assert np.allclose(batched["T_base_target"], twin.facts.T_base_target, atol=1e-9)
                assert np.allclose(batched["T_base_tcp"], twin.facts.T_base_tcp, atol=1e-3)
                assert np.allclose(batched["object_pos_m"], twin.facts.object_pos_m, atol=1e-3)
                assert np.isclose(batched["gripper_opening_m"], twin.facts.gripper_opening_m, atol=1e-3)
                assert batched["stages"] == twin.facts.stages
                assert result.reward[0, 0] == reward
                assert result.success[0] == twin.facts.success
            film = env.frames(0)
            assert len(film) == twin.steps
            assert np.array_equal(film[-1], result.final_observation.images["third_person"][0])
            assert twin.facts.success
            assert result.terminated[0, 0]
            assert result.episode_len[0] == twin.steps


def test_kinematics_of_many_are_those_of_one():
    one, many, rng = ArmKinematics(), BatchedKinematics("cpu"), np.random.default_rng(0)
    q = HOME + rng.normal(0, 0.3, (N, 7))
    T, J = (values.numpy() for values in many.forward(torch.tensor(q)))
    assert np.allclose(T, [one.forward(row) for row in q], atol=1e-12)
    for joint in range(7):  # the Jacobian against the difference of poses
        moved = many.forward(torch.tensor(q + 1e-6 * np.eye(7)[joint]))[0].numpy()
        difference = np.linalg.inv(T) @ moved
        spin = pose.rpy_from_matrix(difference[:, :3, :3])
        assert np.allclose(J[:, :, joint], np.concatenate([difference[:, :3, 3], spin], 1) / 1e-6, atol=1e-5)
    goals = np.array([one.forward(row) for row in q + rng.normal(0, 0.05, (N, 7))])
    goals[0, :3, 3] += 2.0  # out of reach
    solved, found = many.solve(torch.tensor(goals), torch.tensor(q))
    wanted = [one.solve(goal, near) for goal, near in zip(goals, q, strict=True)]
    assert found.tolist() == [row is not None for row in wanted]
    assert not found[0]
    assert found.sum() > N / 2  # of the others some lie beyond the joints' limits
    assert np.allclose(solved[found], [row for row in wanted if row is not None], atol=1e-9)


def test_a_twist_takes_a_unit_of_time():
    """Against many small steps of the same velocity, also where the angle is nearly none."""
    for angle in (0.0, 1e-6, 0.5, 3.0):
        v, axis = np.array([0.3, -0.2, 0.1]), np.array([2.0, -1.0, 2.0]) / 3
        small = pose.pose(v / 4096, rotation(axis * angle / 4096))
        T = np.linalg.matrix_power(small, 4096)
        found = twist(*(torch.tensor(part)[None] for part in (T[:3, :3], T[:3, 3])))[0]
        assert np.allclose(found, [*v, *axis * angle], atol=1e-3 if angle > 1 else 2e-4)


def test_targets_of_many_are_those_of_one(embodiment):
    """Against the controllers of the single arm: limits, workspace, poses out of reach, latency, fingers."""
    latency = Randomization(latency_s=0.13)
    twin = TwinConfig(latency_s=0.02, randomization=latency, workspace_lower_m=[0.2, -0.3, 0.1])
    rng = np.random.default_rng(1)
    q, delays = HOME + rng.normal(0, 0.05, (N, 7)), rng.integers(2, 16, N)
    batched, ones = BatchedArm(N, twin, embodiment, "cpu"), [single(twin, embodiment, int(delay)) for delay in delays]
    batched.hold(torch.arange(N), torch.tensor(q), 0.03, torch.tensor(delays))
    for (arm, gripper, _), start in zip(ones, q, strict=True):
        arm.hold(start)
        gripper.hold(0.03)
    stay = torch.zeros(N, dtype=torch.bool)
    stay[5] = True
    for _ in range(25):
        actions = rng.normal(0, 0.08, (N, 7)) + [0.03, 0, 0, 0, 0, 0, 0]  # beyond the limits, and outwards
        batched.move(torch.tensor(actions), ~stay)
        for env, (arm, gripper, _) in enumerate(ones):
            if env != 5:
                arm.move_target(actions[env, :6])
                gripper.command(float(actions[env, 6]))
        for sim_step in range(batched.sim_steps):
            drives = batched.drives(sim_step, ~stay).numpy()
            for env, (arm, gripper, driven) in enumerate(ones):
                if env != 5:
                    arm.before_simulation_step()
                    gripper.before_simulation_step()
                    assert np.allclose(drives[env], driven, atol=1e-7)
    found = batched.T_base_target.numpy()
    assert np.allclose(found[5], ArmKinematics().forward(q[5]), atol=1e-12)  # was not asked
    assert np.allclose(np.delete(found, 5, 0), [arm.T_base_target for i, (arm, *_) in enumerate(ones) if i != 5])
    assert (found[:, 0, 3] > 0.7).any()  # some went as far as they can


def test_predicates_and_reward_of_many_are_those_of_one():
    rng = np.random.default_rng(2)
    goal = rng.normal(0, 0.1, (N, 3)).astype(np.float32)
    body = goal + (rng.uniform(-1, 1, (N, 3)) * [0.06, 0.06, 0.03]).astype(np.float32)
    plain = {"twin": TwinConfig(cube_half_size_m=0.02), "goal_top_m": 0.003}
    sizes = {
        "inner_half_m": np.where(rng.random((N, 1)) < 0.5, np.inf, rng.uniform(0.02, 0.06, (N, 2))),
        "inner_radius_m": rng.uniform(0.04, 0.08, N),
        "reach_m": rng.uniform(0.01, 0.03, N),
        "legacy_radius_m": rng.uniform(0.04, 0.08, N),
        "legacy_above_m": rng.uniform(0.0, 0.03, N),
    }
    for task in (PutCubeOnPlateEnv, PickPlaceTwinEnv):
        for predicate in (task.lies_on_goal, task.legacy_place):
            many = SimpleNamespace(**plain, **{key: torch.tensor(values) for key, values in sizes.items()})
            found = predicate(many, torch.tensor(body), torch.tensor(goal)).tolist()
            ones = [SimpleNamespace(**plain, **{key: values[i] for key, values in sizes.items()}) for i in range(N)]
            assert found == [bool(predicate(ones[i], body[i], goal[i])) for i in range(N)]
            assert 0 < sum(found) < N, predicate
    T = np.tile(np.eye(4), (N, 1, 1))
    T[:, :3, 3] = body + rng.normal(0, 0.1, (N, 3))
    success, grasped = rng.random((2, N)) < 0.5
    now = {"T_base_tcp": T, "object_pos_m": body, "goal_pos_m": goal, "success": success}
    batch = {key: torch.tensor(values) for key, values in now.items()} | {"stages": {"grasped": torch.tensor(grasped)}}
    rewards = BatchedScene.rewards(SimpleNamespace(now=batch, twin=TwinConfig(reward="dense")))
    for env in range(N):
        facts = SimpleNamespace(**{key: v[env] for key, v in now.items()}, stages={"grasped": grasped[env]})
        assert rewards[env].item() == pytest.approx(PutCubeOnPlateEnv.dense_reward(None, facts), abs=1e-6)


def test_what_is_missing_is_said(embodiment, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"libPhysXGpu_64.so is missing.*enable_gpu.*physx_cpu"):
        TwinVectorEnv(CUDA, embodiment, 4, 0, render=False)
    assert not any(tmp_path.rglob("*.so"))  # nothing is downloaded unasked
    library = tmp_path / ".sapien/physx" / sapien.physx.version() / "libPhysXGpu_64.so"
    library.parent.mkdir(parents=True)
    library.touch()

    def no_device(alias):
        raise RuntimeError(f'failed to find device "{alias}"')

    monkeypatch.setattr(sapien, "Device", no_device)
    with pytest.raises(ValueError, match="no CUDA device"):
        TwinVectorEnv(CUDA, embodiment, 4, 0, render=False)
    with pytest.raises(ValueError, match="cannot vary light, colour"):
        TwinConfig(physics="physx_cuda", arm_follows="drives")
    with pytest.raises(ValueError, match="arm_follows 'plans'"):
        dataclasses.replace(CUDA, arm_follows="plans")
    with pytest.raises(ValueError, match="physx_cpu, physx_cuda"):
        TwinConfig(physics="cuda")


def rotation(vector: np.ndarray) -> np.ndarray:
    """Rodrigues: axis times angle."""
    angle = np.linalg.norm(vector)
    x, y, z = vector / max(angle, 1e-12)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


def single(twin, embodiment, delay_steps):
    """The single arm's two controllers without a simulation, and the nine targets that they set."""
    driven = np.zeros(9)
    arm = TargetDeltaPoseController.__new__(TargetDeltaPoseController)
    arm.kinematics, arm.delay_steps, arm._sim_steps, arm.plans = ArmKinematics(), delay_steps, 10, None
    arm._limit = np.repeat([embodiment.max_translation_m, embodiment.max_rotation_rad], 3)
    arm._lower_m, arm._upper_m = np.array(twin.workspace_lower_m), np.array(twin.workspace_upper_m)
    arm._drives = [functools.partial(driven.__setitem__, joint) for joint in range(7)]
    gripper = GripperController.__new__(GripperController)
    gripper.delay_steps, gripper._finger_step_m = delay_steps, 0.5 * twin.gripper_speed_m_s / twin.sim_freq
    gripper.config = SimpleNamespace(closed_m=embodiment.gripper_closed_m, open_m=embodiment.gripper_open_m)
    gripper._drives = [functools.partial(driven.__setitem__, joint) for joint in (7, 8)]
    return arm, gripper, driven


def test_each_of_several_is_as_if_alone(monkeypatch, embodiment):
    """Behind a fake of the GPU system: starts, partial resets, chunks of some, ends inside chunks, auto reset, groups.
    What one does is the same whatever the others do."""
    config, rng = dataclasses.replace(CUDA, max_steps=12), np.random.default_rng(3)
    actions = rng.normal(0, 0.02, (3, 20, 7)).astype(np.float32)
    twin = Twin(dataclasses.replace(config, physics="physx_cpu"), embodiment, render=False)
    options = {"seed": 1, "group_size": 2, "render": False}
    plain = TwinVectorEnv(twin.config, embodiment, 4, 0, **options)
    several_scenes(monkeypatch)
    with on_cpu(monkeypatch, config, embodiment, 3, auto_reset=False, render=False) as env:
        states = env.reset([4, 5, 6]).state
        for seed, state, facts in zip((4, 5, 6), states, env.info_poses(), strict=True):
            twin.reset(seed)
            assert np.allclose(state, twin.state, atol=1e-6)
            assert np.allclose(facts["object_pos_m"], twin.facts.object_pos_m, atol=1e-6)
            assert np.allclose(facts["goal_pos_m"], twin.facts.goal_pos_m, atol=1e-6)
        together = env.step_chunk(actions[:, :5])
        before, moving = env.info_poses(), env._local.scene.get_state()[1]
        some = env.step_chunk(actions[[0, 2], 5:9], env_ids=[0, 2])
        (stayed,) = env.info_poses([1])
        for key in ("T_base_tcp", "object_pos_m", "T_base_target", "gripper_opening_m"):
            assert np.array_equal(stayed[key], before[1][key]), key
        assert np.allclose(env._local.scene.get_state()[1], moving, atol=1e-6)  # velocities too
        env.reset([9], env_ids=[0])
        assert np.array_equal(env.info_poses([1])[0]["object_pos_m"], stayed["object_pos_m"])
        late = env.step_chunk(actions[:, 9:14])  # 5, 10 and 14 steps in
        assert late.valid.tolist() == [[True] * 5, [True] * 5, [True] * 3 + [False] * 2]
        assert late.truncated.any(1).tolist() == [False, False, True]
        assert late.episode_len.tolist() == [5, 10, 12]
        last = late.observation.state[2]
        assert np.array_equal(env.step_chunk(actions[:, 14:15]).observation.state[2], last)  # it is over
        # Each alone, with what it was asked to do.
        twin.reset(6)
        twin.step_chunk(np.concatenate([actions[2, :9], actions[2, 9:12]]))
        assert np.allclose(last, twin.state, atol=1e-4)
        twin.reset(5)
        twin.step_chunk(np.concatenate([actions[1, :5], actions[1, 9:14]]))
        assert np.allclose(late.observation.state[1], twin.state, atol=1e-4)
        assert np.allclose(together.observation.state[0], alone(twin, 4, actions[0, :5]), atol=1e-4)
        assert np.allclose(some.observation.state[0], alone(twin, 4, actions[0, :9]), atol=1e-4)
    with plain, on_cpu(monkeypatch, config, embodiment, 4, **options) as env:
        assert np.allclose(env.reset().state, plain.reset().state, atol=1e-6)
        for chunk in (slice(0, 6), slice(6, 13), slice(13, 16)):  # all end within the second
            one, other = (each.step_chunk(np.tile(actions[0, chunk], (4, 1, 1))) for each in (env, plain))
            assert np.allclose(one.final_observation.state, other.final_observation.state, atol=1e-4)
            assert np.allclose(one.observation.state, other.observation.state, atol=1e-4)
            assert one.seeds.tolist() == other.seeds.tolist()
            assert one.episode_len.tolist() == other.episode_len.tolist()


def alone(twin: Twin, seed: int, actions: np.ndarray) -> np.ndarray:
    twin.reset(seed)
    twin.step_chunk(actions)
    return twin.state


def test_pick_place_of_several_is_the_twins(monkeypatch):
    """Behind the fake: one of many objects in each, which comes to rest while the others' episodes stand still; and
    what splats are drawn from."""
    made = load("twin-demos", TwinDemosConfig, ["twin=pick_place", "embodiment=rl_co"])
    config = dataclasses.replace(made.twin, receptacle="either", success="legacy", **FOLLOWS)
    twin = Twin(config, made.embodiment, render=False)
    several_scenes(monkeypatch)
    cuda = dataclasses.replace(config, physics="physx_cuda")
    actions = np.random.default_rng(4).normal(0, 0.03, (2, 6, 7)).astype(np.float32)
    with on_cpu(monkeypatch, cuda, made.embodiment, 2, auto_reset=False, render=False) as env:
        env.reset([20, 21])
        env.step_chunk(actions[:, :3])
        moved = env.info_poses()[1]
        env.reset([22], env_ids=[0])
        assert np.array_equal(env.info_poses()[1]["object_pos_m"], moved["object_pos_m"])
        assert np.array_equal(env.info_poses()[1]["T_base_tcp"], moved["T_base_tcp"])
        env.step_chunk(actions[:, 3:])
        scene, names = env._local.scene, sorted(env._local.scene.actor_names)
        views = scene.views(["panda_hand"], names, with_rgb=False)
        for row, (seed, steps) in enumerate(((22, slice(3, 6)), (21, slice(0, 6)))):
            twin.reset(seed)
            twin.step_chunk(actions[row, steps])
            facts, found = vars(twin.facts), env.info_poses()[row]
            for key in ("T_base_tcp", "T_base_target", "object_pos_m", "object_yaw_rad", "goal_pos_m"):
                assert np.allclose(found[key], facts[key], atol=2e-3), key
            assert found["stages"] == facts["stages"]
            wanted = twin.env.view(["panda_hand"], names, with_rgb=False)
            assert np.allclose(views[row].T_base_cam, wanted.T_base_cam, atol=1e-3)
            shown = [name for name in names if name != "shelf"]
            index = [names.index(name) + 1 for name in shown]
            assert np.allclose(views[row].T_base_body[[0, *index]], wanted.T_base_body[[0, *index]], atol=3e-3)
            assert (views[row].T_base_body[1:, 2, 3] > -50).sum() < 6  # most objects take no part
