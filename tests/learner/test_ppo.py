import dataclasses

import numpy as np
import pytest
import torch

from learner.advantages import normalized
from learner.demo_dataset import DataConfig, Mixture, open_parts
from learner.losses import level_log_prob
from learner.normalization import Quantiles
from learner.policy import ObservationBatch
from learner.rollouts import Rollouts, collect
from learner.small_policy import SmallPolicy, SmallPolicyConfig, Statistics
from learner.trainer import local_trainer, rollout_metrics
from learner.twin_eval import run_episodes
from learner.update import AlgoConfig, Updater, make_optimizer, plan
from tests.learner.toy_cell import ChunkResult, ToyVectorEnv, Views, tabletop
from tests.learner.toy_data import write_dataset

SIZE = (24, 32)


def tiny_policy(seed=0, **flow):
    torch.manual_seed(seed)
    config = SmallPolicyConfig(
        image_height=SIZE[0], image_width=SIZE[1], conv_channels=8, keypoints=4, width=32, heads=2, layers=2, horizon=6,
        num_action_chunks=4, jitter=0.0,
    )  # fmt: skip
    config.flow = dataclasses.replace(config.flow, num_steps=4, noise_level=0.5, **flow)
    low = np.array([-0.03, -0.03, -0.03, 0.0, 0.0, 0.0, -1.0])
    statistics = Statistics(Quantiles(-np.ones(7), np.ones(7)), Quantiles(low, -low))
    policy = SmallPolicy(config, tabletop(), statistics)
    with torch.no_grad():  # zero-initialised: would hide a wrong gradient
        policy.expert.action_out.weight.normal_(std=0.1)
    return policy


def observation(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = {
        name: torch.randint(0, 255, (n, *SIZE, 3), generator=generator, dtype=torch.uint8)
        for name in ("third_person", "wrist")
    }
    return ObservationBatch(images, torch.randn(n, 7, generator=generator), tabletop().instructions * n)


class PushEnv:
    """Pays for actions that move along +x. Episodes of odd seeds terminate at their 11th step, the others are cut by a
    time limit at their 15th."""

    num_envs = 3

    def __init__(self):
        self.seeds, self.steps = np.zeros(3, int), np.zeros(3, int)

    def reset(self, seeds, env_ids):
        self.seeds[env_ids], self.steps[env_ids] = seeds, 0
        return self._views(len(env_ids))

    def _views(self, n):
        images = {name: np.full((n, *SIZE, 3), 90, np.uint8) for name in ("third_person", "wrist")}
        return Views(images, np.full((n, 7), 0.1, np.float32), tabletop().instructions[:1] * n)

    def step_chunk(self, actions, env_ids):
        n, chunk = actions.shape[:2]
        seeds = self.seeds[env_ids]
        number = self.steps[env_ids][:, None] + 1 + np.arange(chunk)
        odd = seeds[:, None] % 2 == 1
        valid = number <= np.where(odd, 11, 15)
        self.steps[env_ids] += valid.sum(1)
        terminated, truncated = odd & (number == 11), ~odd & (number == 15)
        return ChunkResult(
            observation=self._views(n),
            reward=np.clip(actions[..., 0] / 0.03, -2, 2).astype(np.float32),
            terminated=terminated,
            truncated=truncated,
            valid=valid,
            success=terminated.any(1),
            episode_len=self.steps[env_ids].copy(),
            seeds=seeds.copy(),
            lost=np.zeros(n, bool),
        )

    def send(self, actions, env_ids):
        self.answer = self.step_chunk(actions, env_ids)

    def recv(self):
        return self.answer

    def close(self):
        pass


@pytest.fixture(scope="module")
def demos_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    write_dataset(folder / "stand_in", tabletop(), range(1), domain="stand_in")
    return folder


def demos(folder, policy, seed=0):
    data = DataConfig(real=[str(folder / "stand_in")], cache=str(folder / "cache"))
    return Mixture(open_parts(data, policy.embodiment, policy.horizon, SIZE), 4, seed)


def roll(policy, seed=0, **more):
    rollouts = collect([PushEnv()], policy, range(5), 0.9, 0.95, torch.Generator().manual_seed(seed), **more)
    return dataclasses.replace(rollouts, advantages=normalized(rollouts.advantages, rollouts.mask))


def updater(policy, config, mixture=None):
    generator = torch.Generator().manual_seed(5)
    return Updater(policy, make_optimizer(policy, config), config, mixture, generator)


def whole_update(learner, rollouts):
    return learner.update(rollouts, plan(len(rollouts), learner.config, 1, torch.Generator().manual_seed(6)))


@pytest.mark.parametrize(
    "flow",
    [
        {},
        {"last_steps": 0},
        {"hold": 4},
        {"joint": True, "last_steps": 0},
        {"method": "flow_cps", "last_steps": 2},
        {"method": "flow_noise", "joint": True, "last_steps": 0},
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_scores_of_a_sample_are_those_of_the_rollout(flow, frozen):
    policy = tiny_policy(**flow)
    if frozen:
        policy.freeze_eyes()
    sample = policy.sample(policy.prepare(observation(6)), torch.Generator().manual_seed(1))
    scores = policy.scores(sample.prepared, sample.chain, sample.denoise_index)
    torch.testing.assert_close(scores.log_prob, sample.log_prob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.value, sample.value, atol=1e-6, rtol=0)
    rows = torch.tensor([4, 1])
    part = policy.scores(sample.prepared[rows], sample.chain[rows], sample.denoise_index[rows])
    torch.testing.assert_close(part.log_prob, sample.log_prob[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.normalize_action(sample.actions), sample.chain[:, -1], atol=1e-5, rtol=1e-5)


def test_sampled_densities_are_densities():
    """E_old[p_new / p_old] = 1 for any new policy: holds only if log_prob is the density that sample() draws from."""
    policy, other = tiny_policy(), tiny_policy()
    with torch.no_grad():
        other.expert.action_out.bias += 0.04 * torch.randn(7)
    prepared = policy.prepare(observation(1))[torch.zeros(3000, dtype=torch.long)]
    sample = policy.sample(prepared, torch.Generator().manual_seed(2))
    everything = torch.ones(3000, policy.num_action_chunks, dtype=torch.bool)
    with torch.no_grad():
        scores = other.scores(prepared, sample.chain, sample.denoise_index)
        new, old = (level_log_prob(p, everything, "chunk")[0] for p in (scores.log_prob, sample.log_prob))
    ratio = (new - old).exp()
    error = ratio.std().item() / len(ratio) ** 0.5
    assert ratio.std() > 0.1
    assert abs(ratio.mean().item() - 1) < 4 * error


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("report_every", [0, 1])
def test_the_gradient_of_the_sum_is_the_sum_of_the_gradients(demos_folder, report_every):
    """grad(L_PPO + beta L_SFT) = grad L_PPO + beta grad L_SFT for every parameter, in the step that training takes."""
    beta, policy = 0.3, tiny_policy()
    rollouts = roll(policy)
    config = AlgoConfig(
        beta=beta, clip_grad=1e9, micro_batch_size=8, batch_size=16, critic_warmup_steps=0,
        gradient_report_every=report_every,
    )  # fmt: skip
    rows = torch.arange(16)
    learner = updater(policy, config, demos(demos_folder, policy))
    learner.optimizer.step = lambda: None
    learner.step(rollouts, rows)
    combined = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    apart = updater(policy, config, demos(demos_folder, policy))
    ppo = gradients(policy, apart.rl_loss(rollouts, rows, (1 / 16, 1 / 16))[0])
    sft = gradients(policy, (apart.sft_loss() + apart.sft_loss()) / 2)
    assert combined.keys() == ppo.keys() | sft.keys()
    assert sum(g.abs().sum() for g in sft.values()) > 0
    for name, gradient in combined.items():
        zero = torch.zeros_like(gradient)
        expected = ppo.get(name, zero) + beta * sft.get(name, zero)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_beta_0_is_ppo_alone_bit_for_bit(demos_folder):
    config = AlgoConfig(beta=0.0, micro_batch_size=8, batch_size=16, critic_warmup_steps=0)
    with_demos, alone = tiny_policy(), tiny_policy()
    metrics = [
        whole_update(updater(policy, config, mixture), roll(policy))
        for policy, mixture in ((with_demos, demos(demos_folder, with_demos)), (alone, None))
    ]
    assert metrics[0] == metrics[1]
    for (name, ours), theirs in zip(with_demos.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(alone.expert.action_out.weight, tiny_policy().expert.action_out.weight)


def test_metrics_add_up_and_micro_batches_do_not_matter(demos_folder):
    policy = tiny_policy()
    rollouts = roll(policy)
    config = AlgoConfig(beta=0.2, micro_batch_size=16, batch_size=16, critic_warmup_steps=0, gradient_report_every=1)
    metrics = updater(policy, config, demos(demos_folder, policy)).step(rollouts, torch.arange(16))
    assert metrics["actor/total_loss"] == pytest.approx(metrics["train/ppo_loss"] + 0.2 * metrics["train/sft_loss"])
    expected = 0.2 * metrics["train/sft_loss"] / abs(metrics["train/ppo_loss"])
    assert metrics["train/loss_ratio"] == pytest.approx(expected)
    assert -1 <= metrics["train/grad_cosine"] <= 1
    assert metrics["train/grad_norm_sft"] > 0
    whole, parts = tiny_policy(), tiny_policy()
    for policy, micro in ((whole, 16), (parts, 4)):
        config = AlgoConfig(beta=0.0, micro_batch_size=micro, batch_size=16, critic_warmup_steps=0, clip_grad=1e9)
        learner = updater(policy, config)
        learner.optimizer.step = lambda: None
        learner.step(rollouts, torch.arange(16))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=5e-6, rtol=1e-4)


def test_critic_warm_up_moves_the_value_head_alone():
    policy, before = tiny_policy(), tiny_policy()
    config = AlgoConfig(beta=0.0, critic_warmup_steps=2, batch_size=18, micro_batch_size=18, update_epochs=2)
    learner = updater(policy, config)
    whole_update(learner, roll(policy))
    changed = [n for (n, a), b in zip(policy.named_parameters(), before.parameters(), strict=True) if not a.equal(b)]
    assert changed
    assert all(name.startswith("value_head") for name in changed)
    whole_update(learner, roll(policy))
    assert not policy.expert.action_out.weight.equal(before.expert.action_out.weight)


def test_a_non_finite_loss_is_refused_and_changes_nothing():
    policy = tiny_policy()
    rollouts = roll(policy)
    rollouts.advantages[3] = float("nan")
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(ValueError, match="gradient norm nan"):
        whole_update(updater(policy, AlgoConfig(beta=0.0, critic_warmup_steps=0)), rollouts)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_an_update_ends_where_it_finds_the_policy_beyond_the_kl_limit():
    policy = tiny_policy()
    config = AlgoConfig(
        beta=0.0, lr=1e-2, lr_warmup_steps=0, target_kl=1e-3, update_epochs=50, critic_warmup_steps=0, batch_size=16,
        micro_batch_size=16,
    )  # fmt: skip
    learner, rollouts = updater(policy, config), roll(policy)
    metrics = whole_update(learner, rollouts)
    assert metrics["actor/stopped_early"] == 1.0
    assert 1 <= metrics["actor/optimizer_steps"] == learner.steps < 50
    # Batches differ: one that is beyond the limit makes no step, neither of the weights nor of Adam's moments.
    before = [p.clone() for p in policy.parameters()]
    moments = [state["exp_avg"].clone() for state in learner.optimizer.state.values()]
    steps = learner.steps
    beyond = [rows for rows in torch.arange(len(rollouts)).split(4) if far(learner, rollouts, rows)]
    assert beyond
    for rows in beyond:
        assert learner.step(rollouts, rows)["actor/approx_kl"] > config.target_kl
    assert learner.steps == steps
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, learner.optimizer.state.values(), strict=True))


def far(learner: Updater, rollouts: Rollouts, rows: torch.Tensor) -> bool:
    return learner.rl_loss(rollouts, rows, (0.25, 0.25))[1]["actor/approx_kl"] > learner.config.target_kl


def test_the_policys_rate_rises_over_its_first_steps_and_the_critics_does_not():
    policy, rates = tiny_policy(), []
    config = AlgoConfig(
        beta=0.0, lr=1e-4, value_lr=1e-3, critic_warmup_steps=2, lr_warmup_steps=4, batch_size=16, micro_batch_size=16,
        target_kl=None,
    )  # fmt: skip
    learner, rollouts = updater(policy, config), roll(policy)
    for _ in range(8):
        learner.step(rollouts, torch.arange(16))
        rates.append([group["lr"] for group in learner.optimizer.param_groups])
    policys, critics = zip(*rates, strict=True)
    assert policys[2:] == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4, 1e-4])
    assert critics == pytest.approx([1e-3] * 8)
    with pytest.raises(ValueError, match="lr_warmup_steps -1"):
        AlgoConfig(lr_warmup_steps=-1)


def test_rollouts_are_whole_episodes_and_bootstrap_through_time_limits_only():
    policy = tiny_policy()
    with torch.no_grad():
        policy.value_head.mlp[-1].weight.zero_()
        policy.value_head.mlp[-1].bias.fill_(2.0)
    rollouts = roll(policy)  # seeds 0 to 4 on three environments: two episodes of 11 steps, three of 15
    assert sorted((e.seed, e.length, e.success) for e in rollouts.episodes) == [
        (seed, 11 if seed % 2 else 15, bool(seed % 2)) for seed in range(5)
    ]
    assert rollouts.num_env_steps == 2 * 11 + 3 * 15
    assert len(rollouts) == 2 * 3 + 3 * 4
    actions = policy.normalize_action.inverse(rollouts.chain[:, -1])[:, :4, 0]
    paid = ((actions / 0.03).clamp(-2, 2) * rollouts.valid).sum(1)
    # Queries 0 to 2 hold rows of environments 0, 1, 2; environment 1 (seed 1) ends in the third, environment 0 in the
    # fourth, which is its last.
    of_0, of_1 = torch.tensor([0, 3, 6, 9]), torch.tensor([1, 4, 7])
    for rows, final in ((of_0, 2.0), (of_1, 0.0)):
        following, expected = 0.0, []
        for row in reversed(rows.tolist()):
            bootstrap = final if row == rows[-1] else 2.0
            following = paid[row] + 0.9 * bootstrap - 2.0 + 0.9 * 0.95 * following
            expected.append(following + 2.0)
        torch.testing.assert_close(rollouts.returns[rows], torch.stack(expected[::-1]), atol=1e-4, rtol=1e-4)
    failed = roll(policy, bootstrap_truncation=False)  # the limit belongs to the task: the last query's future is 0
    assert rollouts.returns[9] - failed.returns[9] == pytest.approx(0.9 * 2.0, abs=1e-4)
    assert failed.returns[7] == pytest.approx(rollouts.returns[7].item(), abs=1e-6)
    metrics = rollout_metrics(rollouts)
    assert metrics["env/success_once"] == 0.4
    assert metrics["env/episode_len"] == pytest.approx(67 / 5)


def test_ppo_earns_more():
    policy = tiny_policy(last_steps=0)  # untrained: noise on any step moves the actions
    policy.freeze_eyes()
    algo = AlgoConfig(
        beta=0.0, lr=3e-3, critic_warmup_steps=2, gamma=0.5, update_epochs=3, batch_size=64, micro_batch_size=64
    )
    trainer = local_trainer(policy, [PushEnv()], None, algo, 6, 0)
    rewards = [trainer.iterate()["env/return"] for _ in range(8)]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 2.0


def test_evaluation_gives_every_seed_one_episode():
    env = ToyVectorEnv(tabletop(), 3, max_steps=9, size=SIZE)
    frames = []
    trials = list(run_episodes(env, tiny_policy(), range(100, 107), frames))
    assert sorted(trial["seed"] for trial in trials) == list(range(100, 107))
    assert {trial["steps"] for trial in trials} == {9}
    assert {trial["instruction"] for trial in trials} == set(tabletop().instructions)
    assert len(frames) == 3
    assert frames[0].shape == (SIZE[0], 2 * SIZE[1], 3)


def trainer(folder):
    policy = tiny_policy()
    policy.freeze_eyes()
    algo = AlgoConfig(lr=1e-3, critic_warmup_steps=1, batch_size=4, micro_batch_size=4, sft_gradient_share=0.3)
    env = ToyVectorEnv(tabletop(), 2, max_steps=6, size=SIZE)
    return local_trainer(policy, [env], demos(folder, policy), algo, 3, 0)


def weights_of(trainer):
    return trainer.state_dict()["worker"]["policy"]


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(demos_folder, tmp_path):
    whole, stopped, resumed = (trainer(demos_folder) for _ in range(3))
    metrics = [whole.iterate() for _ in range(4)]
    for _ in range(2):
        stopped.iterate()
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for expected in metrics[2:]:
        got = resumed.iterate()
        assert {k: v for k, v in got.items() if "time/" not in k} == {
            k: v for k, v in expected.items() if "time/" not in k
        }
    for (name, ours), theirs in zip(weights_of(whole).items(), weights_of(resumed).values(), strict=True):
        assert torch.equal(ours, theirs), name
