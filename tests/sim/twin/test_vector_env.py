import logging
import os
import signal

import numpy as np
import pytest

from sim.expert import PickPlaceExpert
from sim.twin.config import TwinConfig
from sim.twin.vector_env import TwinVectorEnv

CHUNK = 5


def expert_chunks(env: TwinVectorEnv, seeds, num_chunks: int) -> np.ndarray:
    """Chunks [num_chunks, n, C, 7] of the scripted expert, closed-loop step by step in `env` (chunks of one action)."""
    experts = [PickPlaceExpert(env.embodiment, seed) for seed in seeds]
    env.reset(seeds)
    steps = []
    for _ in range(num_chunks * CHUNK):
        actions = np.stack(
            [
                e.act(p["T_base_target"], p["gripper_opening_m"], p["object_pos_m"], p["goal_pos_m"])
                for e, p in zip(experts, env.info_poses(), strict=True)
            ]
        )
        env.step_chunk(actions[:, None])
        steps.append(actions)
    return np.stack(steps).reshape(num_chunks, CHUNK, len(seeds), 7).swapaxes(1, 2)


@pytest.fixture(scope="module")
def env(embodiment):
    """In this process, no pictures, ended episodes stay ended."""
    with TwinVectorEnv(TwinConfig(max_steps=60), embodiment, 2, 0, auto_reset=False, render=False) as env:
        yield env


@pytest.fixture(scope="module")
def chunks(env):
    return expert_chunks(env, [1, 2], 12)


def test_an_episode_that_ends_leaves_the_rest_of_its_chunk(env, chunks):
    env.reset([1, 2])
    rewards, valid, ended_in = np.zeros(2), np.zeros(2, int), [None, None]
    for index, chunk in enumerate(chunks):
        result = env.step_chunk(chunk)
        assert result.reward.shape == result.valid.shape == result.terminated.shape == (2, CHUNK)
        rewards += result.reward.sum(1)
        valid += result.valid.sum(1)
        for row in range(2):
            if ended_in[row] is not None:
                assert not result.valid[row].any()
                assert not result.reward[row].any()
            elif result.terminated[row].any():
                ended_in[row] = index
                last = int(np.flatnonzero(result.terminated[row])[0])
                assert result.valid[row].tolist() == [step <= last for step in range(CHUNK)]
                assert result.reward[row].tolist() == [float(step == last) for step in range(CHUNK)]
                assert result.success[row]
                assert result.episode_len[row] == valid[row]
    assert None not in ended_in
    assert rewards.tolist() == [1.0, 1.0]  # once
    assert result.seeds.tolist() == [1, 2]
    assert env.info_poses([1])[0]["success"]


def test_time_limit_truncates(env):
    env.reset([3, 4])
    nothing = np.tile(np.array([0, 0, 0, 0, 0, 0, 1.0]), (2, 25, 1))
    for _ in range(2):
        assert not env.step_chunk(nothing).truncated.any()
    result = env.step_chunk(nothing)
    assert np.flatnonzero(result.truncated[0]).tolist() == [9]
    assert result.valid.sum(1).tolist() == [10, 10]
    assert not result.terminated.any()
    assert not result.success.any()
    assert result.episode_len.tolist() == [60, 60]


def test_partial_reset_leaves_the_others_alone(env, chunks):
    env.reset([1, 2])
    env.step_chunk(chunks[0])
    before = env.info_poses([1])[0]
    observation = env.reset([7], env_ids=[0])
    assert observation.state.shape == (1, 7)
    assert np.array_equal(env.info_poses([1])[0]["T_base_tcp"], before["T_base_tcp"])
    alone = env.step_chunk(chunks[1][1:], env_ids=[1]).observation.state
    env.reset([1, 2])
    env.step_chunk(chunks[0])
    assert np.array_equal(env.step_chunk(chunks[1]).observation.state[1], alone[0])


def test_wrong_arguments_are_named(env):
    env.reset([1, 2])
    with pytest.raises(ValueError, match=r"shape \(2, 7\)"):
        env.step_chunk(np.zeros((2, 7)))
    with pytest.raises(ValueError, match="NaN"):
        env.step_chunk(np.full((2, 1, 7), np.nan))
    with pytest.raises(ValueError, match="env_ids"):
        env.reset([1], env_ids=[2])
    with pytest.raises(ValueError, match="1 seeds for 2"):
        env.reset([1])
    with pytest.raises(ValueError, match="without a send"):
        env.recv()
    env.send(np.zeros((1, 1, 7)), [0])
    with pytest.raises(ValueError, match="under way"):
        env.send(np.zeros((1, 1, 7)), [0])
    with pytest.raises(ValueError, match="under way"):
        env.reset([1, 2])
    env.recv()
    with pytest.raises(ValueError, match="workers"):
        TwinVectorEnv(TwinConfig(), env.embodiment, 1, 2)


def test_groups_are_answered_in_the_order_they_were_sent(env, chunks):
    env.reset([1, 2])
    together = env.step_chunk(chunks[0]).observation.state
    env.reset([1, 2])
    env.send(chunks[0][1:], [1])
    env.send(chunks[0][:1], [0])
    assert np.array_equal(env.recv().observation.state, together[1:])
    assert np.array_equal(env.recv().observation.state, together[:1])


@pytest.mark.timeout(300)  # three imports of ManiSkill
def test_workers_give_the_same_and_a_dead_one_is_replaced(embodiment, caplog):
    """Pictures, auto reset, worker counts, and a killed process, in one test: a worker takes seconds to start."""
    config = TwinConfig(max_steps=8)
    actions = np.random.default_rng(0).uniform(-0.03, 0.03, (4, 3, CHUNK, 7)).astype(np.float32)

    def run(env):
        results = [env.reset([10, 11, 12])]
        for chunk in actions[:3]:
            results.append(env.step_chunk(chunk))
        return results

    with TwinVectorEnv(config, embodiment, 3, 0, seed=4) as env:
        local = run(env)
        env.watch(1)
        env.step_chunk(actions[3])
        frames = env.frames(1)
        assert len(frames) == 3  # of the second episode's steps 6 to 8, the limit
        assert env.frames(1) == []
        fifth = env.step_chunk(actions[0])
        assert frames[0].shape == (config.picture_height, config.picture_width, 3)
    with TwinVectorEnv(config, embodiment, 3, 2, seed=4) as env:
        remote = run(env)
        for ours, theirs in zip(local[1:], remote[1:], strict=True):
            for key in ("reward", "valid", "truncated", "seeds", "episode_len"):
                assert np.array_equal(getattr(ours, key), getattr(theirs, key)), key
            for which in ("observation", "final_observation"):
                a, b = getattr(ours, which), getattr(theirs, which)
                assert np.array_equal(a.state, b.state)
                assert all(np.array_equal(a.images[name], b.images[name]) for name in ("third_person", "wrist"))
        # Chunk 2 ends all episodes at step 8: the rest is not executed and the next episode has begun.
        second = local[2]
        assert second.valid.tolist() == [[True] * 3 + [False] * 2] * 3
        assert second.truncated[:, 2].all()
        assert not np.array_equal(second.observation.state, second.final_observation.state)
        assert second.seeds.tolist() == [10, 11, 12]
        assert not set(local[3].seeds) & {10, 11, 12}
        assert len(set(local[3].seeds)) == 3

        victim = env._workers[0][0]
        env.send(actions[3])
        os.kill(victim.pid, signal.SIGKILL)
        with caplog.at_level(logging.ERROR):
            result = env.recv()
        assert "environments [0, 1]" in caplog.text
        assert result.lost.tolist() == [True, True, False]
        assert not result.valid[:2].any()
        assert result.valid[2].tolist() == [True] * 3 + [False] * 2  # worked on
        assert np.isfinite(result.observation.state).all()
        after = env.step_chunk(actions[0])
        assert not after.lost.any()
        assert after.valid.all()
        assert after.seeds.tolist() == fifth.seeds.tolist()  # the streams go on, with the lost episodes left out
    assert not victim.is_alive()


def kill_worker(env: TwinVectorEnv) -> None:
    process = env._workers[0][0]
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_dead_worker_costs_all_its_environments_their_episodes_and_a_reset_nothing(embodiment, caplog):
    still = np.zeros((2, 3, 7), np.float32)
    with TwinVectorEnv(TwinConfig(), embodiment, 2, 1, auto_reset=False, render=False) as env:
        wanted = env.reset([11, 8]).state
        env.step_chunk(still)
        kill_worker(env)
        assert np.array_equal(env.reset([11], [0]).state, wanted[:1])
        assert "environments [0, 1]" in caplog.text
        result = env.step_chunk(still)
        assert result.seeds[0] == 11
        assert result.lost.tolist() == [False, True]  # seed 8 went with the worker, which nobody was told yet
        assert result.episode_len.tolist() == [3, 0]
        result = env.step_chunk(still)
        assert result.lost.tolist() == [False, False]
        assert result.episode_len.tolist() == [6, 3]


@pytest.mark.slow
def test_every_environment_of_a_dead_worker_is_told_by_itself(embodiment):
    still = np.zeros((2, 3, 7), np.float32)
    with TwinVectorEnv(TwinConfig(), embodiment, 2, 1, auto_reset=False, render=False) as env:
        env.reset([11, 8])
        kill_worker(env)
        assert "T_base_target" in env.info_poses([0])[0]  # of the new worker
        for alone in ([0], [1]):
            result = env.step_chunk(still[:1], alone)
            assert result.lost.tolist() == [True]
            assert not result.valid.any()
        assert not env.step_chunk(still).lost.any()


def test_groups_share_their_start_states(embodiment):
    with pytest.raises(ValueError, match="multiple"):
        TwinVectorEnv(TwinConfig(), embodiment, 3, 0, group_size=2, render=False)
    with TwinVectorEnv(TwinConfig(max_steps=5), embodiment, 4, 0, seed=1, group_size=2, render=False) as env:
        starts = []
        for _ in range(3):
            state = env.reset().state
            objects = np.stack([poses["object_pos_m"] for poses in env.info_poses()])
            assert np.array_equal(state[0::2], state[1::2])
            assert np.array_equal(objects[0::2], objects[1::2])
            starts += [*state[::2]]
            env.reset(env_ids=[1])  # one is an episode ahead; the next reset of its group begins the same for all
        assert len({tuple(start) for start in starts}) == 6
        env.reset()
        different = np.random.default_rng(0).uniform(-0.02, 0.02, (4, 5, 7)).astype(np.float32)
        result = env.step_chunk(different)  # all end here
        assert result.truncated.any(1).all()
        assert not np.array_equal(result.final_observation.state[0], result.final_observation.state[1])
        assert np.array_equal(result.observation.state[0::2], result.observation.state[1::2])
