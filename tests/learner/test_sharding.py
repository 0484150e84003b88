"""Weights, gradients and moments in shares: the update of one process, and a state that any number of ranks resumes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from learner.demo_dataset import DataConfig, Mixture, open_parts
from learner.sharding import shard
from learner.trainer import UpdateWorker
from learner.update import AlgoConfig, plan
from learner.weight_sync import WeightSource
from tests.learner.test_ppo import SIZE, demos, demos_folder, roll, tiny_policy  # noqa: F401
from tests.learner.toy_cell import tabletop

# Two micro-batches a step and rank, an anchor whose weight follows, both kinds of steps (with a comparison and not).
ALGO = AlgoConfig(
    beta=0.01, batch_size=8, micro_batch_size=2, sft_per_rl=1.0, critic_warmup_steps=1, target_kl=None,
    gradient_report_every=2, lr=1e-3,
)  # fmt: skip


def trained(rank, ranks, folder, sharded):
    """Two updates: metrics, names of changed weights, state; the second of a fresh worker that goes on from the
    first's state."""
    policy, state = tiny_policy(), None
    policy.freeze_eyes()
    rollouts, found = roll(policy), []
    batches = plan(len(rollouts), ALGO, ranks, torch.Generator().manual_seed(6))[:3]
    for turn in range(2):
        policy = tiny_policy(seed=turn)
        policy.freeze_eyes()
        if sharded:
            shard(policy, "cpu", ranks)
        data = DataConfig(real=[f"{folder}/stand_in"], cache=f"{folder}/cache")
        parts = open_parts(data, tabletop(), policy.horizon, SIZE)
        mixture = Mixture(parts, ALGO.sft_batch_size(ranks), 0, rank, ranks)
        worker = UpdateWorker(policy, ALGO, mixture, 0, dist.group.WORLD, rank)
        # Adam divides a gradient by its own size, and so makes rounding errors of tiny ones as large as any step.
        for group in worker.updater.optimizer.param_groups:
            group["eps"] = 1e-2
        if state:
            worker.load_state_dict(state)
        source = WeightSource(policy)
        metrics = worker.update(turn, rollouts, [rows[rank::ranks] for rows in batches])
        changed = source.changed()
        state = worker.state_dict()
        kept = copy.deepcopy(state)  # a plain worker's goes on to live in the next
        found.append({"metrics": metrics, "changed": changed, "state": kept})
    return found


def rank_main(rank, ranks, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/meeting-{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    both = [trained(rank, ranks, folder, sharded) for sharded in (True, False)]
    torch.save(both, f"{folder}/both-{ranks}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_shards_make_the_update_of_whole_copies(demos_folder, ranks):  # noqa: F811
    """Whole copies make that of one process (test_grpo_and_ranks)."""
    demos(demos_folder, tiny_policy())  # pictures are decoded once
    mp.start_processes(rank_main, args=(ranks, str(demos_folder)), nprocs=ranks, start_method="fork")
    for rank in range(ranks):
        ours, wanted = torch.load(demos_folder / f"both-{ranks}-{rank}.pt", weights_only=True)
        for mine, other in zip(ours, wanted, strict=True):
            assert mine["metrics"] == pytest.approx(other["metrics"], rel=1e-4, abs=1e-6)
            assert mine["metrics"]["train/grad_share_sft"] > 0
            assert mine["changed"] == other["changed"]
            assert "value_head.mlp.0.weight" in mine["changed"]
            for name, value in other["state"]["policy"].items():
                torch.testing.assert_close(mine["state"]["policy"][name], value, atol=1e-5, rtol=0)
            moments, wanted_moments = (each["state"]["updater"]["optimizer"]["state"] for each in (mine, other))
            assert moments.keys() == wanted_moments.keys()
            for index, entry in wanted_moments.items():
                torch.testing.assert_close(moments[index]["exp_avg"], entry["exp_avg"], atol=1e-4, rtol=1e-3)
