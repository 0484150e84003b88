"""RLinf's names and keys: they compose, explain themselves and train; what cannot be honoured is refused."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bridge.checkpoint import write_bundle
from bridge.config import CONFIG_DIR
from learner import train as train_module
from learner.explain import explain
from learner.flow import FlowConfig
from learner.load import WEIGHTS, bundle_files, load_policy
from learner.noise import NoiseConfig
from learner.pi0.bundle import HEADS
from learner.pi0.config import tiny
from learner.pi0.policy import Pi0Policy
from learner.recipes import FIXED, KNOWN, RECIPES, _leaves, _read, load_train, recipe_names, translate
from learner.small_policy import SmallPolicy
from learner.train import TrainConfig, main, train
from tests.learner.pi0.test_policy import make
from tests.learner.pi0.words import write_tokenizer
from tests.learner.test_ppo import tiny_policy
from tests.learner.toy_cell import ToyVectorEnv, tabletop
from tests.learner.toy_data import SIZE, write_dataset

CO_TRAINING = "maniskill_ppo_co_training_openpi_pi05"
NAMES = [CO_TRAINING, "gsenv_ppo_openpi_pi05"] + [
    f"libero_{suite}_{algo}_openpi{model}"
    for suite in ("spatial", "object", "goal", "10")
    for algo in ("ppo", "grpo")
    for model in ("", "_pi05")
]
ALWAYS = (CO_TRAINING, "libero_goal_grpo_openpi", "libero_10_ppo_openpi_pi05")  # train in every run; all do in the slow
LONG = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def loaded(*argv):
    return load_train(TrainConfig, list(argv))


def test_the_names_are_the_documented_ones():
    assert recipe_names() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_composes_and_explains_itself(name):
    config = loaded(f"config={name}")
    assert config.name == name
    text = explain(config)
    assert (
        f"at most {config.episodes * config.simulator.max_steps // config.policy['num_action_chunks']} an iteration"
        in text
    )
    assert config.algo.algorithm == ("grpo" if "grpo" in name else "ppo")
    assert config.policy["model"]["variant"] == ("pi05" if name.endswith("pi05") else "pi0")
    assert config.libero.suite == ("" if "libero" not in name else "_".join(name.split("_")[:2]))
    assert config.libero.convention == ("libero" if "libero" in name else "contract")
    for component in ("env 0", "rollout 0", "actor 0"):
        assert component in text


def test_the_arithmetic_of_the_published_recipe(capsys):
    assert main(["--config-name", CO_TRAINING, "explain=true", "cluster.gpus_per_node=8"]) == 0
    text = capsys.readouterr().out
    assert "at most 2560 an iteration" in text
    assert "at most 2 an iteration (2560 samples, 2 epochs)" in text
    assert "128 : 2560 samples (1 : 20), beta 0.2" in text
    assert "actor 7 and rollout 7: node 0, GPU 7" in text
    assert len(_leaves(_read(CO_TRAINING))) < 60
    spatial = explain(loaded("config=libero_spatial_ppo_openpi"))
    assert "at most 24576 an iteration" in spatial
    assert "at most 48 an iteration (2048 samples, 4 epochs)" in spatial


def test_both_spellings_and_the_command_line_wins():
    name = f"config={CO_TRAINING}"
    assert loaded(name, "actor.sft_loss_weight=0.5").algo.beta == 0.5
    assert loaded(name, "actor.model.sft_loss_weight=0.5").algo.beta == 0.5
    assert loaded(name, "algo.beta=0.5").algo.beta == 0.5
    assert loaded(name, "actor.model.use_real_data_co_training=false", "algo.sft_per_rl=1").algo.beta == 0.0
    assert loaded("algorithm.gamma=0.9").algo.gamma == 0.9  # without a recipe too
    lora = loaded(name, "actor.model.is_lora=true", "actor.model.lora_rank=8")
    assert lora.policy["lora"]["rank"] == 8
    placed = loaded(name, "cluster.component_placement.env=0-3", "cluster.component_placement.rollout=4-7",
                    "cluster.component_placement.actor=0-7", "cluster.gpus_per_node=8")  # fmt: skip
    assert [len(placed.placement[c]) for c in ("env", "rollout", "actor")] == [4, 4, 8]
    annealed = loaded(name, "actor.model.openpi.noise_anneal=true", "actor.model.openpi.noise_params=[0.7,0.3,400]")
    assert annealed.policy["flow"]["noise_anneal_steps"] == 400
    assert loaded(name, "runner.logger.logger_backends=[wandb]").logger.backends == ["wandb"]
    assert loaded(name, "env.train.video_cfg.save_video=true").video.save
    assert loaded(name, "rollout.pipeline_stage_num=2").pipeline_stages == 2
    grpo = loaded("config=libero_10_grpo_openpi", "algorithm.filter_rewards=false")
    assert (grpo.algo.filter_low, grpo.algo.filter_high) == (0.0, 1.0)
    assert loaded("algorithm.filter_rewards=true").algo.filter_low == 0.1


def test_data_sets_are_found_below_lerobots_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    assert loaded(f"config={CO_TRAINING}").data.real == [str(tmp_path / "RLCo-Example-Real-Data")]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["config=libero_spatial_ppo_openpie"], "Did you mean 'libero_spatial_ppo_openpi'"),
        (["actor.optim.lrr=1"], "unknown key 'actor.optim.lrr'.*actor.optim.lr"),
        (["algo.gama=1"], "unknown key 'algo.gama'"),
        (["actor.sft_loss_weight=0.1", "actor.model.sft_loss_weight=0.2"], "contradict"),
        (["actor.sft_loss_weight=0.1"], "does nothing without actor.enable_sft_co_train"),
        (["actor.model.lora_rank=8"], "does nothing without actor.model.is_lora"),
        (["algorithm.rewards_lower_bound=0.1"], "does nothing without algorithm.filter_rewards"),
        (["actor.model.openpi.noise_params=[0.7,0.3,4]"], "does nothing without"),
        (["algorithm.gamma=0.9", "algo.gamma=0.8"], "contradict: give one of them"),
        (["algorithm.adv_type=grpo", "algorithm.loss_type=actor_critic"], "contradict"),
        (["actor.model.openpi.pi05=false", "actor.model.openpi.config_name=pi05_libero"], "contradict"),
        (["algorithm.kl_beta=0.1"], "cannot be honoured: there is no reference model"),
        (["env.enable_offload=true"], "cannot be honoured"),
        (["actor.enable_offload=true"], "cluster.offload need a cluster.component_placement"),
        (["actor.enable_offload=true", "rollout.enable_offload=false"], "contradict"),
        (["actor.fsdp_config.sharding_strategy=hybrid_shard"], "allowed are no_shard, full_shard"),
        (["runner.val_check_interval=10"], "cotwin twin-eval"),
        (["env.train.init_params.id=StackCube-v1"], "allowed are"),
        (["algorithm.adv_type=reinforce"], "allowed are gae, grpo"),
        (["config=gsenv_ppo_openpi_pi05", "--config-name=" + CO_TRAINING], "one at a time"),
        (["cluster.component_placement.env=0", "cluster.component_placement.actor=0"], "lacks rollout"),
    ],
)
def test_nonsense_is_refused(argv, words):
    with pytest.raises(ValueError, match=words):
        explain(loaded(*argv))


def test_every_key_is_read():
    """Of our configuration: somewhere outside its definition. Of RLinf's: it becomes one of ours or is checked."""
    sources = {p: p.read_text() for folder in ("learner", "sim/twin") for p in Path(folder).rglob("*.py")}
    config = TrainConfig()
    for part in (config, config.algo, config.cluster, config.logger, config.video):
        for field in dataclasses.fields(part):
            reads = sum(len(re.findall(rf"\.{field.name}\b", text)) for text in sources.values())
            assert reads, f"{type(part).__name__}.{field.name} is read nowhere"
    written = {key for path in RECIPES.glob("[!_]*.yaml") for key in _leaves(_read(path.stem))}
    assert {key for key in written if key.split(".")[0] in ("actor", "algorithm", "env", "rollout", "runner")} <= KNOWN
    for key, (allowed, _) in FIXED.items():
        assert not translate({key: allowed[0]}), f"{key} is a check, not a setting"


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Tiny checkpoints with the heads that `cotwin sft policy=pi0` and `policy=pi05` leave."""
    folder = tmp_path_factory.mktemp("stock")
    for variant in ("pi0", "pi05"):
        given = yaml.safe_load((CONFIG_DIR / f"policy/{variant}.yaml").read_text())
        flow, model = FlowConfig(**given.pop("flow")), tiny(variant, given.pop("model")["horizon"])
        policy = make(variant, flow=flow, noise=NoiseConfig(**given.pop("noise", {})), **given | {"model": model})
        write_bundle(folder / variant, dict(bundle_files(policy)), tabletop(), 1, 0, 0, {})
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_opens_what_stage_1_leaves(name, stock):
    """A head that both have is kept, one that only the recipe has is new, one that only the checkpoint has goes."""
    changes = dict(loaded(f"config={name}").policy)
    model = changes.pop("model")
    variant, changes["model"] = model["variant"], {"horizon": model["horizon"]}  # the tiny one's own sizes otherwise
    policy = cast(Pi0Policy, load_policy(stock / variant, changes=changes))
    saved = load_file(stock / variant / "heads.safetensors")
    heads = policy.heads()
    assert ("value_head" in heads, "noise_head" in heads) == ("ppo" in name, name == CO_TRAINING)
    for key, value in heads.state_dict().items():
        assert torch.equal(value, saved[key])


def test_heads_may_be_new_but_not_in_parts_and_only_where_changes_are_asked_for(stock, tmp_path):
    noisy = {"flow": {"method": "flow_noise", "joint": True}}
    policy = cast(Pi0Policy, load_policy(stock / "pi0", changes=noisy))
    saved = load_file(stock / "pi0/heads.safetensors")
    assert policy.noise_head is not None
    assert policy.value_head is not None
    assert not any(key.startswith("noise_head") for key in saved)
    assert torch.equal(policy.value_head.state_dict()["mlp.0.weight"], saved["value_head.mlp.0.weight"])
    with pytest.raises(ValueError, match=r"value_head\.mlp\.0\.weight is"):  # of other features
        load_policy(stock / "pi0", changes={"value_after_vlm": True})
    folder = shutil.copytree(stock / "pi0", tmp_path / "partial")
    save_file({key: value for key, value in saved.items() if key != "value_head.mlp.0.bias"}, folder / HEADS)
    with pytest.raises(ValueError, match=r"missing value_head\.mlp\.0\.bias"):
        load_policy(folder, changes=noisy)
    folder = shutil.copytree(stock / "pi05", tmp_path / "lacking")
    for gone in ("noise_head", "value_head"):
        saved = load_file(stock / "pi05" / HEADS)
        save_file({key: value for key, value in saved.items() if not key.startswith(gone)}, folder / HEADS)
        with pytest.raises(ValueError, match=f"missing {gone}"):
            load_policy(folder)
    with pytest.raises(ValueError, match=r"noise_head\.mlp\.0\.weight is"):
        load_policy(folder, changes={"add_value_head": False} | noisy | {"noise": {"hidden": [8]}})


def test_a_small_policy_gains_and_gives_up_a_noise_head_too(tmp_path):
    plain, noisy = {"method": "flow_sde", "joint": True}, {"method": "flow_noise", "joint": True, "last_steps": 0}
    policies = [tiny_policy(), tiny_policy(**noisy)]
    for policy, asked in zip(policies, (noisy, plain), strict=True):
        folder = tmp_path / policy.config.flow.method
        write_bundle(folder, dict(bundle_files(policy)), tabletop(), 1, 0, 0, {})
        opened = cast(SmallPolicy, load_policy(folder, changes={"flow": asked | {"last_steps": 0}}))
        assert (opened.noise_head is None) == (asked is plain)
        ours, theirs = opened.state_dict(), policy.state_dict()
        assert {key.split(".")[0] for key in ours.keys() ^ theirs.keys()} == {"noise_head"}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
    without, with_head = (tmp_path / p.config.flow.method for p in policies)
    for folder, other, words in ((without, with_head, "unexpected"), (with_head, without, "missing")):
        mixed = shutil.copytree(folder, tmp_path / words)
        shutil.copy(other / WEIGHTS, mixed / WEIGHTS)
        with pytest.raises(ValueError, match=f"{words} noise_head"):
            load_policy(mixed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    write_dataset(folder / "stand_in", tabletop(), range(1), domain="stand_in")
    write_tokenizer(folder / "tokenizer")
    for variant in ("pi05", "pi0"):
        policy = make(variant)
        policy.config.tokenizer = str(folder / "tokenizer")
        policy.config.compile = False
        write_bundle(folder / variant / "000001", bundle_files(policy), tabletop(), 1, 0, 0, {})
    return folder


@pytest.mark.parametrize("name", LONG)
def test_every_recipe_trains_two_tiny_steps(name, folder, tmp_path, monkeypatch):
    def toy_env(config, embodiment, num_envs, num_workers, seed, auto_reset):
        return ToyVectorEnv(embodiment, num_envs, config.max_steps, SIZE)

    monkeypatch.setattr(train_module, "TwinVectorEnv", toy_env)
    small = [
        f"config={name}",
        f"runs_dir={tmp_path}",
        "libero.suite=''",
        "device=cpu",
        "threads=1",
        "envs=2",
        "iterations=1",
        "episodes=4",
    ]
    small += [f"checkpoint={folder / ('pi05' if name.endswith('pi05') else 'pi0') / '000001'}", "twin.max_steps=6"]
    small += ["algo.batch_size=4", "algo.micro_batch_size=4", "algo.update_epochs=1", "actor.model.num_action_chunks=3"]
    if "grpo" in name:
        small += ["algo.group_size=2", "algo.filter_low=0"]
    if name == CO_TRAINING:
        small += [f"actor.sft_data_path={folder / 'stand_in'}", "algo.sft_per_rl=0.5"]
    config = loaded(*small)
    config.cluster.component_placement = {}
    config.policy["model"] = {"variant": config.policy["model"]["variant"]}  # the tiny one's own sizes
    figures = train(config)
    assert figures["optimizer_steps"] == 2
    assert (tmp_path / name / "checkpoints/000002/model.safetensors").exists()
