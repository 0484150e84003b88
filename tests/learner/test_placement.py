"""The placement grammar, and the same trainer in one process and on Ray."""

import functools
import os
import signal
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from learner.placement_map import Process, described, parse, require_fit
from learner.trainer import local_trainer
from learner.update import AlgoConfig
from learner.weight_sync import WeightSender, receive
from tests.learner.test_ppo import SIZE, tiny_policy
from tests.learner.toy_cell import ToyVectorEnv, tabletop

ALGO = AlgoConfig(beta=0.0, lr=1e-3, critic_warmup_steps=1, batch_size=4, micro_batch_size=2, target_kl=None)


def devices(processes):
    return [(p.node, p.devices) for p in processes]


def test_the_documented_examples():
    collocated = parse({"env,rollout,actor": "all"}, 2, 4)
    assert devices(collocated["actor"]) == [(n, (d,)) for n in range(2) for d in range(4)]
    assert collocated["env"] == collocated["rollout"] == collocated["actor"]
    hybrid = parse({"env": "0-3", "rollout": "4-7", "actor": "0-7"}, 1, 8)
    assert [len(hybrid[name]) for name in ("env", "rollout", "actor")] == [4, 4, 8]
    assert hybrid["rollout"][0] == Process(0, 0, (4,))
    apart = parse({"env": "0-1", "rollout": "2-5", "actor": "6-7"}, 1, 8)
    assert devices(apart["actor"]) == [(0, (6,)), (0, (7,))]


def test_process_ranks():
    placed = parse({"env": "0-1:0-3", "rollout": 0, "actor": "0,2,4-5"}, 2, 3)
    assert devices(placed["env"]) == [(0, (0,)), (0, (0,)), (0, (1,)), (0, (1,))]  # two processes a GPU
    assert devices(placed["actor"]) == [(0, (0,)), (0, (2,)), (1, (1,)), (1, (2,))]
    mixed = parse({"env": "0:0-1,1:2-3", "rollout": 0, "actor": "1"}, 1, 2)
    assert [p.rank for p in mixed["env"]] == [0, 1, 2, 3]
    wide = parse({"env": 0, "rollout": "0-3:0-1", "actor": 0}, 1, 4)  # one process over two GPUs
    assert devices(wide["rollout"]) == [(0, (0, 1)), (0, (2, 3))]
    assert described(wide, gpus=True)[1] == "rollout 0: node 0, GPU 0, 1"


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ({"env,rollout": "all"}, "lacks actor"),
        ({"env,rollout,learner": "all"}, "'learner' is none of"),
        ({"env,env": "all", "rollout": 0, "actor": 0}, "placed twice"),
        ({"env,rollout,actor": "0-8"}, "hardware rank 8, there are 0 to 3"),
        ({"env,rollout,actor": "3-1"}, "neither `all`"),
        ({"env,rollout,actor": "gpu0"}, "neither `all`"),
        ({"env,rollout,actor": "0-2:0-1"}, "one number must divide"),
        ({"env,rollout,actor": "0:1-2"}, "must go on from 0"),
        ({"env,rollout,actor": "1-2:0-0"}, "span two nodes"),
        ({"env,rollout,actor": {"node_group": "franka", "placement": "0"}}, "robots are not placed here"),
    ],
)
def test_what_makes_no_sense_is_refused(placement, words):
    with pytest.raises(ValueError, match=words):
        parse(placement, 2, 2)


def test_work_that_does_not_divide_is_refused():
    placed = parse({"env": "0-3", "rollout": "0-1", "actor": "0-2"}, 1, 4)
    for work, words in (((8, 4, 6), "multiple of 8"), ((6, 2, 6), "multiple of the 4 env"), ((8, 2, 4), "3 actor")):
        with pytest.raises(ValueError, match=words):
            require_fit(placed, *work)
    require_fit(placed, 8, 2, 6)
    with pytest.raises(ValueError, match="several GPUs"):
        require_fit(parse({"env,rollout,actor": "0-1:0-0"}, 1, 2), 4, 1, 4)


def make_policy(device):
    policy = tiny_policy()
    policy.freeze_eyes()
    return policy


def make_env(num_envs, seed):
    return ToyVectorEnv(tabletop(), num_envs, max_steps=6, size=SIZE)


class FragileEnv(ToyVectorEnv):
    """Kills its own process in the second chunk of the first process that lives, as the kernel might."""

    def step_chunk(self, actions, env_ids=None):
        if not os.path.exists(self.mark) and self.steps.max() > 0:
            open(self.mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step_chunk(actions, env_ids)


def make_fragile(mark, num_envs, seed):
    env = FragileEnv(tabletop(), num_envs, max_steps=6, size=SIZE)
    env.mark = str(mark)
    return env


def no_demos(policy, rank, ranks):
    return None


def job(make=make_env, stages=1, envs=2):
    from learner.placement import Job

    return Job(make_policy, make, no_demos, ALGO, envs, stages, 0, 1, "cpu")


def curve(trainer, iterations=2):
    metrics = [trainer.iterate() for _ in range(iterations)]
    return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in metrics]


def placed(job, placement):
    from learner.placement import placed_trainer

    return placed_trainer(job, placement, 4)


@pytest.fixture(scope="module")
def alone():
    trainer = local_trainer(make_policy("cpu"), [make_env(2, 0)], None, ALGO, 4, 0)
    return curve(trainer), trainer.state_dict()["worker"]["policy"]


def test_without_ray_it_says_so(monkeypatch):
    monkeypatch.setattr("learner.placement.ray", None)
    with pytest.raises(ValueError, match="needs Ray"), placed(job(), parse({"env,rollout,actor": "all"}, 1, 1)):
        pass


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    from learner.placement import start_ray

    start_ray()
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)  # Ray and three processes that import torch
def test_on_ray_the_curve_is_that_of_one_process(cluster, alone):
    with placed(job(), parse({"env,rollout,actor": "all"}, 1, 1)) as trainer:
        ours = curve(trainer)
        weights = trainer.state_dict()["worker"]["policy"]
    assert ours == alone[0]
    assert all(torch.equal(weights[name], value) for name, value in alone[1].items())
    assert ours[1]["rollout/weights_version"] == ours[0]["actor/optimizer_steps"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_placed_trainer_goes_on_after_an_interruption(cluster, alone):
    placement = parse({"env,rollout,actor": "all"}, 1, 1)
    with placed(job(), placement) as trainer:
        first = curve(trainer, 1)
        state = trainer.state_dict()
    with placed(job(), placement) as trainer:
        trainer.load_state_dict(state)
        assert first + curve(trainer, 1) == alone[0]


@pytest.mark.timeout(300)
@pytest.mark.slow  # eight processes that each import torch
def test_apart_with_two_of_each_and_an_env_process_that_dies(cluster, tmp_path):
    placement = parse({"env": "0-1:0-3", "rollout": "2-3", "actor": "0-1"}, 1, 4)
    fragile = functools.partial(make_fragile, tmp_path / "died")
    with placed(job(fragile, stages=2, envs=4), placement) as trainer:
        first = trainer.iterate()
        second = trainer.iterate()
        states = [state["policy"] for state in trainer.update_crew.call("state_dict", [(), ()])]
    assert (tmp_path / "died").exists()
    assert first["env/num_trajectories"] == 4
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert second["rollout/weights_version"] > 0


def test_weights_travel_where_they_changed(tmp_path):
    """Two processes by gloo: the receiver ends with the sender's weights, and only what changed was sent."""
    policy = make_policy("cpu")
    with torch.no_grad():
        policy.expert.action_out.bias += 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(synced, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    sent_bytes = torch.load(tmp_path / "0.pt", weights_only=True)
    version, weights = torch.load(tmp_path / "1.pt", weights_only=True)
    assert sent_bytes == [policy.expert.action_out.bias.nbytes, 0]
    assert version == 8
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())


def synced(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    policy = make_policy("cpu")
    if rank == 0:
        sender = WeightSender(policy, dist.group.WORLD)
        with torch.no_grad():
            policy.expert.action_out.bias += 1
        torch.save([sender.send(7), sender.send(8)], f"{folder}/0.pt")
    else:
        receive(policy, dist.group.WORLD)
        torch.save((receive(policy, dist.group.WORLD), policy.state_dict()), f"{folder}/1.pt")
    dist.destroy_process_group()
