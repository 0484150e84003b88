"""The placement grammar, and the same trainer in one process, in several, and on Ray."""

import functools
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from learner.exchange import Exchange
from learner.member import Job
from learner.placement import ordered_nodes, placed_trainer
from learner.placement_map import ClusterConfig, Process, described, parse, require_fit, seated
from learner.remote import Spawn, WorkerDied
from learner.remote_envs import EnvProcess, RemoteEnvs
from learner.rollouts import collect
from learner.trainer import divided, local_trainer
from learner.update import AlgoConfig
from learner.weight_sync import WeightSource, receive
from tests.learner.test_ppo import SIZE, PushEnv, tiny_policy
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
    assert described(wide, ClusterConfig(), gpus=True)[2] == "rollout 0: node 0, GPU 0, 1"


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


class ClosingEnv(ToyVectorEnv):
    def close(self):
        open(self.mark, "w").close()


def make_closing(mark, num_envs, seed):
    env = ClosingEnv(tabletop(), num_envs, max_steps=6, size=SIZE)
    env.mark = str(mark)
    return env


def no_demos(policy, rank, ranks):
    return None


def job(make=make_env, stages=1, envs=2, policy=make_policy, **cluster):
    cluster = ClusterConfig(component_placement={"env,rollout,actor": "all"}, **cluster)
    return Job(policy, make, no_demos, ALGO, envs, stages, 0, 1, "cpu", cluster)


def curve(trainer, iterations=2):
    metrics = [trainer.iterate() for _ in range(iterations)]
    return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in metrics]


@pytest.fixture(scope="module")
def alone():
    trainer = local_trainer(make_policy("cpu"), [make_env(2, 0)], None, ALGO, 4, 0)
    return curve(trainer), trainer.state_dict()["worker"]["policy"]


COLLOCATED = parse({"env,rollout,actor": "all"}, 1, 1)
APART = parse({"env": 0, "rollout": 1, "actor": 0}, 1, 2)


def test_a_rollout_worker_on_an_actors_gpu_is_the_same_process():
    names = [seat.name for seat in seated(parse({"env": 0, "rollout": 1, "actor": "0-1"}, 1, 2), True)]
    assert names == ["actor 0", "actor 1 and rollout 0"]
    assert [s.name for s in seated(COLLOCATED, False)] == ["actor 0", "rollout 0"]
    two = parse({"env": "0:0-1", "rollout": "0:0-1", "actor": 0}, 1, 1)
    assert [s.name for s in seated(two, True)] == ["actor 0 and rollout 0", "rollout 1"]


def test_ranks_get_what_they_have_already():
    rows, home = torch.tensor([5, 3, 0, 4, 1]), torch.tensor([0, 0, -1, 1, 0, 0])
    parts = divided(rows, home, 2)
    assert [part.tolist() for part in parts] == [[5, 0, 4], [3, 1]]  # rank 1 has only 3 of them; 1 must travel
    assert divided(rows, home, 1)[0] is rows


@pytest.mark.parametrize("placement", [pytest.param(COLLOCATED, marks=pytest.mark.slow), APART])
def test_in_processes_the_curve_is_that_of_one(alone, placement, tmp_path):
    with placed_trainer(job(functools.partial(make_closing, tmp_path / "closed")), placement, 4) as trainer:
        ours = [trainer.iterate() for _ in range(2)]
        weights = trainer.state_dict()["worker"]["policy"]
    for mine, other in zip(ours, alone[0], strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("time/")} == other
        assert all(0 <= mine[f"time/{name}_idle_share"] < 1 for name in ("env", "rollout", "actor"))
    assert all(torch.equal(weights[name], value) for name, value in alone[1].items())
    assert ours[1]["rollout/weights_version"] == ours[0]["actor/optimizer_steps"]
    assert (tmp_path / "closed").exists()


@pytest.mark.slow  # six processes, one after the other
def test_a_placed_trainer_goes_on_after_an_interruption_though_placed_otherwise(alone):
    with placed_trainer(job(offload=True), COLLOCATED, 4) as trainer:
        first = curve(trainer, 1)
        state = trainer.state_dict()
    with placed_trainer(job(offload=True), APART, 4) as trainer:
        trainer.load_state_dict(state)
        assert first + curve(trainer, 1) == alone[0]


@pytest.mark.slow  # four processes that import torch; tests/learner/test_sharding.py has the arithmetic
def test_shards_make_the_curve_of_whole_copies_and_a_state_for_one_process(alone):
    """Two actors, each with its half of every tensor that trains; then one process with all."""
    placement = parse({"env": 0, "rollout": 0, "actor": "0-1"}, 1, 2)
    with placed_trainer(job(sharded=True), placement, 4) as trainer:
        ours = curve(trainer)
        state, files = trainer.state_dict(), trainer.bundle()
    for mine, other in zip(ours, alone[0], strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    policy = make_policy("cpu")
    resumed = local_trainer(policy, [make_env(2, 0)], None, ALGO, 4, 0)
    resumed.load_state_dict(state)
    for name, value in alone[1].items():
        torch.testing.assert_close(policy.state_dict()[name], value, atol=1e-5, rtol=0)
    assert files == resumed.bundle()


@pytest.mark.slow
def test_asynchronously_no_sample_is_older_than_one_update():
    with placed_trainer(job(asynchronous=True), COLLOCATED, 4) as trainer:
        ours = curve(trainer, 4)
    versions = [metrics["rollout/weights_version"] for metrics in ours]
    steps = [metrics["actor/optimizer_steps"] for metrics in ours]
    assert versions == [0, 0, steps[0], steps[0] + steps[1]]
    assert [m["rollout/staleness"] for m in ours] == [0, *steps[:3]]


class FragileEnv(ToyVectorEnv):
    """Kills its own process, or the one that owns it, in the second chunk of the first process that lives."""

    def step_chunk(self, actions, env_ids=None):
        if not os.path.exists(self.mark) and self.steps.max() > 0:
            open(self.mark, "w").close()
            os.kill(mp.parent_process().pid if self.kills_owner else os.getpid(), signal.SIGKILL)
        return super().step_chunk(actions, env_ids)


def make_fragile(mark, kills_owner, num_envs, seed):
    env = FragileEnv(tabletop(), num_envs, max_steps=6, size=SIZE)
    env.mark, env.kills_owner = str(mark), kills_owner
    return env


class DyingEnv(PushEnv):
    """Ends its process while the episode of seed 4 begins, once."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def reset(self, seeds, env_ids):
        if 4 in seeds and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os._exit(9)
        return super().reset(seeds, env_ids)


def make_dying(mark, num_envs, seed):
    return DyingEnv(str(mark))


def test_a_process_that_dies_while_an_episode_begins_takes_the_others_with_it(tmp_path):
    """Seed 1 ends first, 4 takes its place; 0 and 2 are under way in the process that dies, and begin again."""
    arguments = functools.partial(make_dying, tmp_path / "died"), 3, 0
    env = RemoteEnvs([lambda: Spawn().start("env 0", EnvProcess, arguments, Process(0, 0, (0,)), "cpu")], 3)
    try:
        rollouts = collect([env], tiny_policy(), [1, 0, 2, 4], 0.9, 0.95, torch.Generator().manual_seed(0))
    finally:
        env.close()
    assert (tmp_path / "died").exists()
    assert sorted((e.seed, e.length) for e in rollouts.episodes) == [(0, 15), (1, 11), (2, 15), (4, 15)]
    samples = torch.bincount(rollouts.episode).tolist()
    assert {e.seed: n for e, n in zip(rollouts.episodes, samples, strict=True)} == {0: 4, 1: 3, 2: 4, 4: 4}
    assert rollouts.num_env_steps == 15 + 11 + 15 + 15


@pytest.mark.slow  # eight processes that each import torch
def test_two_of_each_with_an_env_process_that_dies(tmp_path):
    placement = parse({"env": "0-1:0-3", "rollout": "2-3", "actor": "0-1"}, 1, 4)
    fragile = functools.partial(make_fragile, tmp_path / "died", False)
    with placed_trainer(job(fragile, stages=2, envs=4), placement, 4) as trainer:
        first = trainer.iterate()
        second = trainer.iterate()
        states = [state["policy"] for state in trainer.update_crew.call("state_dict", [(), ()])]
    assert (tmp_path / "died").exists()
    assert first["env/num_trajectories"] == 4
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert second["rollout/weights_version"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)  # three processes that import torch, one of them twice
@pytest.mark.parametrize("others", [0, 1])
def test_a_killed_rollout_worker_costs_its_samples_and_nothing_more(tmp_path, caplog, others):
    """With another worker the iteration goes on without it; alone, its successor plays the iteration again."""
    placement = parse({"env": f"0:0-{others}", "rollout": f"1:0-{others}", "actor": 0}, 1, 2)
    fragile = functools.partial(make_fragile, tmp_path / "died", True)
    with placed_trainer(job(fragile, envs=2), placement, 4) as trainer:
        first, second = trainer.iterate(), trainer.iterate()
    assert (tmp_path / "died").exists()
    told = [record.message for record in caplog.records]
    dropped = [text for text in told if "died by signal 9: its" in text]
    assert len(dropped) == 1
    assert f"its {4 // (1 + others)} episodes of iteration 0 are dropped" in dropped[0]
    assert first["env/num_trajectories"] == 4 // (1 + others)
    assert second["env/num_trajectories"] == 4
    assert second["rollout/weights_version"] == first["actor/optimizer_steps"]


@pytest.mark.slow
def test_the_death_of_an_actor_ends_the_run(tmp_path):
    fragile = functools.partial(make_fragile, tmp_path / "died", True)
    with placed_trainer(job(fragile), COLLOCATED, 4) as trainer, pytest.raises(WorkerDied, match="actor 0 and rollout"):
        trainer.iterate()


def refused(device):
    raise ValueError("no such checkpoint")


def test_what_a_worker_raises_is_raised_here():
    with (
        pytest.raises(ValueError, match="no such checkpoint"),
        placed_trainer(job(policy=refused), COLLOCATED, 4),
    ):
        pass


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sharded": True}, "cluster.sharded need a cluster.component_placement"),
        ({"launcher": "slurm"}, "allowed are processes, ray"),
        ({"launcher": "processes", "num_nodes": 2}, "reaches one machine"),
        ({"carrier": "mpi"}, "allowed are nccl, gloo"),
        ({"offload": True, "asynchronous": True, "component_placement": {"env": 0}}, "wait for no turn"),
    ],
)
def test_clusters_that_make_no_sense_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        ClusterConfig(**keys)


def test_without_ray_it_says_so(monkeypatch):
    monkeypatch.setattr("learner.placement.ray", None)
    with pytest.raises(ValueError, match="need Ray"), placed_trainer(job(launcher="ray"), COLLOCATED, 4):
        pass


@pytest.mark.slow
@pytest.mark.timeout(300)  # Ray and three processes that import torch
def test_on_ray_the_curve_is_that_of_one_process(alone):
    ray = pytest.importorskip("ray")
    with placed_trainer(job(launcher="ray"), APART, 4) as trainer:
        assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
        assert curve(trainer) == alone[0]


@pytest.mark.slow
@pytest.mark.timeout(300)  # two nodes of Ray and four processes that import torch
def test_on_two_nodes_the_curve_is_that_of_one_process_and_each_part_is_where_it_was_put(alone, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        cluster.add_node(**node)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        placement = parse({"env,rollout": "0", "actor": "1"}, 2, 1)
        assert [p.node for part in placement.values() for p in part] == [0, 0, 1]
        with placed_trainer(job(launcher="ray"), placement, 4) as trainer:
            assert curve(trainer) == alone[0]
            own = ray.get_runtime_context().get_node_id()
            alive = [one for one in ray._private.state.actors().values() if one["State"] == "ALIVE"]
            assert {one["Address"]["NodeID"] == own for one in alive} == {True, False}
        more = placed_trainer(job(launcher="ray"), parse({"env,rollout": "0", "actor": "2"}, 3, 1), 4)
        with pytest.raises(ValueError, match="needs 3 nodes; the Ray cluster has 2"), more:
            pass
    finally:
        cluster.shutdown()


def test_node_0_is_the_machine_that_trains():
    nodes = [{"NodeID": name, "NodeManagerAddress": address, "Alive": alive} for name, address, alive in (
        ("a", "10.0.0.2", True), ("b", "10.0.0.1", True), ("c", "10.0.0.9", True), ("d", "10.0.0.0", False),
    )]  # fmt: skip
    assert ordered_nodes(nodes, "c") == [("c", "10.0.0.9"), ("b", "10.0.0.1"), ("a", "10.0.0.2")]


@pytest.mark.parametrize("kind", ["file", "tcp"])
def test_weights_travel_where_they_were_written(tmp_path, kind):
    """Two processes by gloo: the receiver ends with the sender's weights, and only what changed was sent."""
    policy = make_policy("cpu")
    with torch.no_grad():
        policy.expert.action_out.bias += 1
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"file": f"file:{tmp_path}/meeting", "tcp": f"tcp:127.0.0.1:{store.port}"}[kind]
    mp.start_processes(synced, args=(str(tmp_path), meeting), nprocs=2, start_method="fork")
    sent_bytes = torch.load(tmp_path / "0.pt", weights_only=True)
    everything = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    everything += sum(buffer.nbytes for name, buffer in policy.named_buffers() if name in policy.state_dict())
    assert sent_bytes == [policy.expert.action_out.bias.nbytes, 0, everything]
    weights = torch.load(tmp_path / "1.pt", weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in policy.state_dict().items())


def synced(rank, folder, meeting):
    torch.set_num_threads(1)
    policy, exchange = make_policy("cpu"), Exchange(meeting, "weights", rank, 2, "gloo")
    if rank == 0:
        source, sent = WeightSource(policy), []
        with torch.no_grad():
            policy.expert.action_out.bias += 1
        for names in (source.changed(), source.changed(), source.changed(everything=True)):
            torch.save(names, f"{folder}/names-{len(sent)}.pt")
            open(f"{folder}/ready-{len(sent)}", "w").close()
            sent.append(source.send(names, exchange))
        torch.save(sent, f"{folder}/0.pt")
    else:
        for turn in range(3):
            while not os.path.exists(f"{folder}/ready-{turn}"):
                time.sleep(0.01)
            receive(policy, torch.load(f"{folder}/names-{turn}.pt"), exchange)
        torch.save(policy.state_dict(), f"{folder}/1.pt")
