"""GRPO's groups, an SFT weight that follows, pipeline stages, lost episodes, and ranks that update together."""

import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from learner.demo_dataset import DataConfig, Mixture, open_parts
from learner.rollouts import Episode, collect
from learner.trainer import LocalCrew, RolloutWorker, Trainer, UpdateWorker, informative, local_trainer
from learner.update import AlgoConfig, plan
from tests.learner.test_ppo import SIZE, PushEnv, demos, demos_folder, roll, tiny_policy, updater  # noqa: F401
from tests.learner.toy_cell import ChunkResult, tabletop
from tests.learner.toy_data import write_dataset

GRPO = dict(algorithm="grpo", beta=0.0, group_size=3, batch_size=8, micro_batch_size=8, lr=1e-3)


class LuckyEnv(PushEnv):
    """One query an episode. Seeds divisible by three always succeed; the others if the first action goes up."""

    def step_chunk(self, actions, env_ids):
        n, chunk = actions.shape[:2]
        seeds = self.seeds[env_ids]
        success = (seeds % 3 == 0) | (actions[:, 0, 0] > 0)
        last = np.arange(chunk) == chunk - 1
        return ChunkResult(
            observation=self._views(n),
            reward=np.where(last, success[:, None], 0.0).astype(np.float32),
            terminated=last & success[:, None],
            truncated=last & ~success[:, None],
            valid=np.ones((n, chunk), bool),
            success=success,
            episode_len=np.full(n, chunk),
            seeds=seeds.copy(),
            lost=np.zeros(n, bool),
        )


def test_grpo_compares_episodes_of_one_start_and_replaces_groups_that_say_nothing():
    algo = AlgoConfig(**GRPO, filter_low=0.1, filter_high=0.9, refill_rounds=6)
    policy = tiny_policy()
    trainer = local_trainer(policy, [LuckyEnv()], None, algo, 12, 0)
    rollouts, metrics = trainer.collect(0)
    groups: dict[int, list[Episode]] = {}
    for episode in rollouts.episodes:
        groups.setdefault(episode.seed, []).append(episode)
    assert {len(group) for group in groups.values()} == {3}
    assert len(groups) == 4  # full again although groups were left out
    assert metrics["rollout/groups_kept"] == 1.0
    for seed, group in groups.items():
        rewards = np.array([episode.reward for episode in group])
        assert 0 < rewards.mean() < 1
        assert seed % 3
        mine = [rollouts.episodes[e].seed == seed for e in rollouts.episode.tolist()]
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(sorted(rollouts.advantages[torch.tensor(mine)]), sorted(expected), atol=1e-5)


def test_groups_that_never_differ_leave_the_weights_alone():
    algo = AlgoConfig(**GRPO, filter_low=0.99, filter_high=0.995, refill_rounds=1)
    policy = tiny_policy()
    metrics = local_trainer(policy, [LuckyEnv()], None, algo, 3, 0).iterate()
    assert metrics["rollout/groups_kept"] == 0.0
    assert all(map(torch.equal, policy.state_dict().values(), tiny_policy().state_dict().values()))


@pytest.mark.slow  # tests/learner/test_ppo.py has the one that always runs
def test_grpo_earns_more_without_a_critic():
    policy = tiny_policy(ignore_last=True, last_steps=0)
    policy.freeze_eyes()
    algo = AlgoConfig(**(GRPO | {"lr": 3e-3, "group_size": 4, "update_epochs": 2, "batch_size": 32}))
    trainer = local_trainer(policy, [PushEnv()], None, algo, 12, 0)
    before = {n: p.clone() for n, p in policy.value_head.named_parameters()}
    history = [trainer.iterate()["env/return"] for _ in range(6)]
    assert np.mean(history[-2:]) > history[0] + 2.0
    assert all(torch.equal(p, before[n]) for n, p in policy.value_head.named_parameters())


@pytest.mark.parametrize("level", ["chunk", "action", "token"])
def test_at_every_level_the_first_step_follows_the_advantages(level):
    """Where the ratio is 1 the surrogate's gradient is that of -mean(A log p), with the level's own mean."""
    policy = tiny_policy()
    rollouts = roll(policy)
    learner = updater(policy, AlgoConfig(beta=0.0, level=level, critic_warmup_steps=0, algorithm="ppo"))
    rows = torch.arange(len(rollouts))
    weights = learner._weights(rollouts, rows)
    metrics = learner.rl_loss(rollouts, rows, weights)[1]
    assert metrics["actor/ratio"] == pytest.approx(1.0, abs=1e-4)
    valid = rollouts.valid.float()
    share = {"chunk": torch.ones(len(rows)), "action": valid.sum(1), "token": valid.sum(1)}[level]
    expected = -(rollouts.advantages * share).sum() / share.sum()
    assert metrics["actor/policy_loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_beta_follows_the_gradients_share(demos_folder):  # noqa: F811
    policy = tiny_policy()
    rollouts = roll(policy)
    config = AlgoConfig(
        beta=1e-3, sft_gradient_share=0.25, critic_warmup_steps=0, batch_size=18, micro_batch_size=18, lr=0.0,
        value_lr=0.0, target_kl=None,
    )  # fmt: skip
    learner = updater(policy, config, demos(demos_folder, policy))
    shares = [learner.step(rollouts, torch.arange(18))["train/grad_share_sft"] for _ in range(20)]
    assert shares[0] < 0.2
    assert np.mean(shares[-8:]) == pytest.approx(0.25, abs=0.08)
    resumed = updater(policy, config, demos(demos_folder, policy))
    resumed.load_state_dict(learner.state_dict())
    assert resumed.beta == learner.beta > 1e-3


def test_nonsense_is_refused():
    for keys, words in (
        ({"algorithm": "sac"}, "allowed are ppo, grpo"),
        ({"algorithm": "grpo"}, "at least 2"),
        ({"level": "word"}, "chunk"),
        ({"dual_clip": 0.5}, "above 1"),
        ({"filter_low": 0.9, "filter_high": 0.1}, "low <= high"),
        ({"sft_per_rl": 0.001}, "not one demonstration"),
        ({"sft_gradient_share": 0.2, "beta": 0.0}, "beta above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            AlgoConfig(**keys)


class MortalEnv(PushEnv):
    """Loses all its episodes in their second query, once."""

    def __init__(self):
        super().__init__()
        self.queries = 0

    def step_chunk(self, actions, env_ids):
        self.queries += 1
        result = super().step_chunk(actions, env_ids)
        if self.queries == 2:
            result.lost[:], result.valid[:], result.terminated[:], result.truncated[:] = True, False, False, False
        return result


def test_a_lost_episode_begins_again_and_leaves_no_sample():
    rollouts = collect([MortalEnv()], tiny_policy(), range(5), 0.9, 0.95, torch.Generator().manual_seed(0))
    assert sorted((e.seed, e.length) for e in rollouts.episodes) == [(s, 11 if s % 2 else 15) for s in range(5)]
    assert len(rollouts) == 2 * 3 + 3 * 4
    counts = torch.bincount(rollouts.episode)
    assert sorted(counts.tolist()) == [3, 3, 4, 4, 4]


class StageEnv(PushEnv):
    """Notes in a shared list what it is asked, to show who is at work."""

    def __init__(self, name, notes):
        super().__init__()
        self.name, self.notes = name, notes

    def send(self, actions, env_ids):
        self.notes.append(f"send {self.name}")
        super().send(actions, env_ids)

    def recv(self):
        self.notes.append(f"recv {self.name}")
        return super().recv()


def test_pipeline_stages_work_while_the_policy_thinks_for_the_others():
    notes: list[str] = []
    envs = [StageEnv("a", notes), StageEnv("b", notes)]
    rollouts = collect(envs, tiny_policy(), range(6), 0.9, 0.95, torch.Generator().manual_seed(0))
    assert notes[:6] == ["send a", "send b", "recv a", "send a", "recv b", "send b"]
    assert sorted(e.seed for e in rollouts.episodes) == list(range(6))
    assert rollouts.episode.max() == 5
    # Every sample is its own episode's: odd seeds end at their 11th step, in three queries.
    for number, episode in enumerate(rollouts.episodes):
        assert (rollouts.episode == number).sum() == (3 if episode.seed % 2 else 4)


def test_groups_of_samples_keep_their_episodes():
    rollouts = roll(tiny_policy())
    kept = informative(rollouts, AlgoConfig(filter_low=0.5))
    assert {e.seed for e in kept.episodes} == {1, 3}
    assert len(kept) == 6
    assert kept.episode.unique().tolist() == [0, 1]


def test_ranks_read_disjoint_rows_of_the_same_batches(tmp_path):
    write_dataset(tmp_path / "twin", tabletop(), range(1))
    write_dataset(tmp_path / "stand_in", tabletop(), range(1), domain="stand_in")
    data = DataConfig(
        sim=[str(tmp_path / "twin")], real=[str(tmp_path / "stand_in")], alpha=0.3, cache=str(tmp_path / "cache")
    )
    parts = open_parts(data, tabletop(), 6, SIZE)
    whole = Mixture(parts, 6, 0)
    ranks = [Mixture(parts, 3, 0, rank, 2) for rank in range(2)]
    for _ in range(5):
        expected = next(whole).observation.state
        found = torch.cat([next(mixture).observation.state for mixture in ranks])
        assert len(found) == 6
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))


CONFIG = AlgoConfig(beta=0.0, batch_size=18, micro_batch_size=2, critic_warmup_steps=1, level="action", target_kl=None)


def trained(rank, ranks, group):
    policy = tiny_policy()
    rollouts = roll(policy)
    batches = plan(len(rollouts), CONFIG, ranks, torch.Generator().manual_seed(6))
    worker = UpdateWorker(policy, CONFIG, None, 0, group, rank)
    # Adam divides a gradient by its own size, and so makes rounding errors of tiny ones as large as any step.
    worker.updater.optimizer = torch.optim.SGD(worker.updater.optimizer.param_groups, lr=0.1)
    metrics = worker.update(0, rollouts, [rows[rank::ranks] for rows in batches])
    return metrics, policy.state_dict()


def rank_main(rank, ranks, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    torch.save(trained(rank, ranks, dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_make_the_update_of_one(tmp_path, ranks):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(rank_main, args=(ranks, port, str(tmp_path)), nprocs=ranks, start_method="fork")
    metrics, alone = trained(0, 1, None)
    for rank in range(ranks):
        got_metrics, got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        for name, value in alone.items():
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def anchored_main(rank, ranks, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    policy = tiny_policy()
    rollouts = roll(policy)
    data = DataConfig(real=[f"{folder}/stand_in"], cache=f"{folder}/cache")
    mixture = Mixture(open_parts(data, policy.embodiment, policy.horizon, SIZE), 2, 0, rank, ranks)
    # Three samples of each batch are one rank's and two the other's, yet both read as many demonstrations.
    sizes = dict(batch_size=5, micro_batch_size=1, sft_per_rl=1.0)
    algo = AlgoConfig(beta=0.01, sft_gradient_share=0.3, critic_warmup_steps=1, **sizes)
    worker = UpdateWorker(policy, algo, mixture, 0, dist.group.WORLD, rank)
    batches = plan(len(rollouts), algo, ranks, torch.Generator().manual_seed(6))
    metrics = worker.update(0, rollouts, [rows[rank::ranks] for rows in batches])
    learned = (metrics, worker.updater.beta, policy.state_dict(), mixture.state_dict())
    torch.save(learned, f"{folder}/anchored-{rank}.pt")
    dist.destroy_process_group()


def test_ranks_with_their_own_demonstrations_stay_the_same_policy(demos_folder):  # noqa: F811
    demos(demos_folder, tiny_policy())  # pictures are decoded once
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(anchored_main, args=(2, port, str(demos_folder)), nprocs=2, start_method="fork")
    (metrics, beta, ours, read), (others, other_beta, theirs, also_read) = (
        torch.load(demos_folder / f"anchored-{rank}.pt", weights_only=True) for rank in range(2)
    )
    assert metrics == others
    assert read == also_read
    assert beta == other_beta > 0.01
    assert metrics["train/sft_loss"] > 0
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["expert.action_out.weight"], tiny_policy().expert.action_out.weight)


def test_demonstrations_of_a_step_do_not_follow_the_number_of_ranks():
    algo = AlgoConfig(batch_size=8, micro_batch_size=8, sft_per_rl=0.5)
    assert [ranks * algo.sft_batch_size(ranks) for ranks in (1, 2, 4)] == [4, 4, 4]
    in_parts = AlgoConfig(batch_size=8, micro_batch_size=2, sft_per_rl=0.5)  # four, two and one of 1 each
    assert [in_parts.sft_batch_size(ranks) for ranks in (1, 2, 4)] == [1, 1, 1]


def test_the_advantages_are_of_all_workers_together():
    """Two rollout workers' samples are normalised as one batch, not each by itself."""
    policy = tiny_policy()
    algo = AlgoConfig(beta=0.0)
    crew = LocalCrew(*[RolloutWorker(policy, [PushEnv()], algo, 0, rank) for rank in range(2)])
    trainer = Trainer(crew, LocalCrew(UpdateWorker(policy, algo, None, 0)), algo, 8, 0, lambda version: None)
    rollouts, _ = trainer.collect(0)
    counted = rollouts.advantages[rollouts.mask]
    assert counted.mean().item() == pytest.approx(0, abs=1e-5)
    assert counted.std().item() == pytest.approx(1, abs=1e-3)
    halves = rollouts.advantages.split(len(rollouts) // 2)
    assert any(abs(half.mean().item()) > 1e-3 for half in halves)
