"""Both stages with a tiny pi0.5 or pi0, files in and files out: from a released folder to what PPO made of it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.checkpoint import bundles, latest_bundle
from learner import train as train_module
from learner.demo_dataset import DataConfig, DemoDataset, open_parts
from learner.flow import FlowConfig
from learner.load import load_policy
from learner.pi0.adapters import LoraConfig
from learner.pi0.bundle import bundle_files
from learner.pi0.config import tiny
from learner.pi0.inputs import prepare_images
from learner.pi0.policy import Pi0Config, Pi0Policy
from learner.pi0.stage import Pi0SftConfig
from learner.policy import ObservationBatch
from learner.run_folder import read_curves
from learner.sft import SftTrainer, main, schema
from learner.sft import train as train_sft
from learner.train import train
from learner.trainer import Trainer
from tests.learner.pi0.test_policy import make
from tests.learner.pi0.words import write_tokenizer
from tests.learner.test_stages import TAGS, train_config
from tests.learner.toy_cell import ToyVectorEnv, tabletop
from tests.learner.toy_data import SIZE, write_dataset

FLOW = FlowConfig(method="flow_noise", num_steps=2, joint=True)
PREFIX = ("paligemma", "model.paligemma")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Demonstrations, a tokenizer, and the released weights of both variants."""
    folder = tmp_path_factory.mktemp("pi0-stages")
    write_dataset(folder / "data/twin", tabletop(), range(1))
    write_dataset(folder / "data/stand_in", tabletop(), range(1), fps=30, domain="stand_in")
    write_tokenizer(folder / "tokenizer")
    for variant in ("pi05", "pi0"):
        (folder / variant).mkdir()
        for name, content in bundle_files(make(variant)).items():
            if name != "policy.json":
                (folder / variant / name).write_bytes(content)
    return folder


@pytest.fixture
def toy(monkeypatch):
    def toy_env(config, embodiment, num_envs, num_workers, seed, auto_reset):
        return ToyVectorEnv(embodiment, num_envs, config.max_steps, SIZE)

    monkeypatch.setattr(train_module, "TwinVectorEnv", toy_env)


def sft_config(folder, variant="pi05", name="run", **policy) -> Pi0SftConfig:
    options = dict(model=tiny(variant), flow=FLOW, dtype="float32", num_action_chunks=3, num_inference_steps=2)
    options |= dict(add_value_head=True, value_hidden=[8], tokenizer=str(folder / "tokenizer"))
    return Pi0SftConfig(
        runs_dir=str(folder),
        name=name,
        steps=3,
        batch_size=4,
        threads=1,
        checkpoint=str(folder / variant),
        data=DataConfig(sim=[str(folder / "data/twin")], real=[str(folder / "data/stand_in")]),
        embodiment=tabletop(),
        policy=Pi0Config(**options | policy),
    )


def changed(old, new) -> set[str]:
    """Names of the tensors that differ; both files hold the same names."""
    ours, theirs = load_file(old), load_file(new)
    assert ours.keys() == theirs.keys()
    return {key for key in ours if not torch.equal(ours[key].float(), theirs[key].float())}


def observation() -> ObservationBatch:
    rng = np.random.default_rng(0)
    pictures = {name: torch.from_numpy(rng.integers(0, 255, (2, *SIZE, 3), np.uint8)) for name in tabletop().cameras}
    return ObservationBatch(pictures, torch.tensor(rng.normal(0, 0.3, (2, 7)), dtype=torch.float32), ["go", "stop"])


@pytest.mark.parametrize("variant", ["pi05", pytest.param("pi0", marks=pytest.mark.slow)])
def test_both_stages_from_released_weights(folder, toy, variant, monkeypatch):
    """pi0.5 trains its expert, critic on the prefix; pi0 adapters on the expert, critic on it too. Interrupted in Stage
    II they go on as if they had not been."""
    adapted = dict(lora=LoraConfig(2, on_prefix=False, on_expert=True), value_after_vlm=False)
    train_sft(sft_config(folder, variant, f"run_{variant}", **(adapted if variant == "pi0" else {})))
    run = folder / f"run_{variant}"
    first = latest_bundle(run / "checkpoints")
    moved = changed(folder / variant / "model.safetensors", first / "model.safetensors")
    expert = "paligemma_with_expert.gemma_expert.model.layers.0.mlp.down_proj.weight"
    assert (f"model.{expert}" in moved) == (variant == "pi05")
    assert not any("paligemma_with_expert.paligemma" in key for key in moved)  # a frozen prefix stays bit for bit
    assert (first / "adapters.safetensors").exists() == (variant == "pi0")
    assert load_policy(first).action_normaliser.mode == "QUANTILES"

    config = train_config(
        folder, name=f"run_{variant}", iterations=2, data=DataConfig(real=[str(folder / "data/stand_in")])
    )
    iterate = Trainer.iterate

    def interrupted(self, *arguments):
        if self.iteration == 1:
            raise KeyboardInterrupt
        return iterate(self, *arguments)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(Trainer, "iterate", iterate)
    figures = train(config)
    assert (figures["parent_version"], figures["version"], figures["iterations"]) == (1, 3, 2)
    assert set(TAGS) <= read_curves(run / "tensorboard").keys()
    whole = train(dataclasses.replace(config, checkpoint=str(first), stage="whole"))
    found = bundles(run / "checkpoints")
    trained = "adapters" if variant == "pi0" else "model"
    for name in (trained, "heads"):
        assert changed(found[3] / f"{name}.safetensors", found[whole["version"]] / f"{name}.safetensors") == set()
        assert changed(first / f"{name}.safetensors", found[3] / f"{name}.safetensors")


@pytest.mark.gpu
def test_both_stages_on_a_gpu(folder, toy):
    """Compiled, in bfloat16, with graphs of passes without gradient."""
    train_sft(dataclasses.replace(sft_config(folder, name="gpu", dtype="bfloat16"), device="cuda"))
    data = DataConfig(real=[str(folder / "data/stand_in")])
    assert train(train_config(folder, name="gpu", iterations=2, data=data, device="cuda"))["version"] == 3
    on_cpu, on_gpu = (load_policy(latest_bundle(folder / "gpu/checkpoints"), device) for device in ("cpu", "cuda"))
    chunks = [policy.infer(observation(), torch.Generator().manual_seed(1)) for policy in (on_cpu, on_gpu)]
    assert (chunks[0] - chunks[1]).abs().max() <= 2e-2


def test_the_command_picks_the_policys_keys(folder, capsys):
    assert schema([]).__name__ == schema(["policy=small"]).__name__ == "SftConfig"
    assert schema(["steps=1", "policy=pi05"]) is Pi0SftConfig
    gemma = "depth: 2, heads: 8, head_width: 16"
    command = [
        *("policy=pi05", "name=command", f"runs_dir={folder}", "steps=2", "batch_size=2", "threads=1"),
        f"data.real=[{folder}/data/stand_in]",
        f"policy.tokenizer={folder}/tokenizer",
        "policy.model.vision={width: 32, depth: 2, mlp_width: 64, heads: 2, patch_size: 14, image_size: 28}",
        f"policy.model.language={{width: 64, mlp_width: 96, {gemma}}}",
        f"policy.model.expert={{width: 32, mlp_width: 48, {gemma}}}",
        *("policy.model.vocabulary=300", "policy.model.prompt_tokens=16", "policy.dtype=float32"),
    ]
    with pytest.raises(SystemExit):
        main(["policy=pi05", "--help"])
    assert "value_after_vlm: true" in capsys.readouterr().out
    assert main(command) == 1
    assert "set checkpoint to their folder" in capsys.readouterr().err
    assert main([*command, "checkpoint=random"]) == 0
    policy = load_policy(latest_bundle(folder / "command/checkpoints"))
    assert isinstance(policy, Pi0Policy)
    assert (policy.horizon, policy.num_action_chunks, policy.config.flow.method) == (8, 4, "flow_noise")
    with pytest.raises(SystemExit, match="unknown key 'policy.goal_weight'"):
        main([*command, "policy.goal_weight=1"])


def test_stage_one_goes_on_bit_for_bit_and_shares_what_is_frozen(folder):
    config = sft_config(folder)
    parts = open_parts(config.data, config.embodiment, config.policy.horizon, config.policy.picture_size, padded=True)
    whole, stopped, resumed = (SftTrainer(config, parts) for _ in range(3))
    losses = [whole.train_step()["loss"] for _ in range(4)]
    for _ in range(2):
        stopped.train_step()
    torch.save(stopped.state_dict(), folder / "state.pt")
    resumed.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    assert [resumed.train_step()["loss"] for _ in range(2)] == losses[2:]
    for key, value in whole.averaged.state_dict().items():
        assert torch.equal(value, resumed.averaged.state_dict()[key]), key
    assert whole.averaged.model.embed.weight is whole.policy.model.embed.weight
    assert whole.averaged.model.action_in.weight is not whole.policy.model.action_in.weight


def test_statistics_are_the_datas_or_the_checkpoints(folder):
    config = sft_config(folder)
    parts = open_parts(config.data, config.embodiment, 6, (28, 28), padded=True)
    rows = parts[0].datasets[0].rows
    measured = SftTrainer(config, parts).policy.action_normaliser
    assert measured.statistics["q99"][2] > rows.step_action[:, 2].mean() > measured.statistics["q01"][2]
    assert measured.statistics["q99"][3] - measured.statistics["q01"][3] >= 0.02 - 1e-6  # no rotation in the data
    kept = SftTrainer(dataclasses.replace(config, statistics="checkpoint"), parts).policy.action_normaliser
    assert torch.equal(kept.statistics["q99"], torch.linspace(0.5, 2.0, 7))
    with pytest.raises(ValueError, match="statistics 'mine'"):
        dataclasses.replace(config, statistics="mine")


def test_an_openpi_folder_starts_stage_one_with_its_own_statistics(folder, tmp_path):
    """Weights and norm_stats.json; what the bundle then says in LeRobot's terms is the same map."""
    tensors = {key.removeprefix("model."): x for key, x in load_file(folder / "pi05/model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stats = {"q01": [-1.0] * 7, "q99": [0.5 + 0.1 * axis for axis in range(7)]}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": stats, "actions": stats}}))
    config = dataclasses.replace(sft_config(folder, name="openpi"), checkpoint=str(tmp_path), statistics="checkpoint")
    train_sft(config)
    policy = load_policy(latest_bundle(folder / "openpi/checkpoints"))
    x = torch.linspace(-0.5, 0.5, 7)
    by_hand = 2 * (x + 1) / (torch.tensor(stats["q99"]) + 1 + 1e-6) - 1
    torch.testing.assert_close(policy.action_normaliser(x), by_hand)
    del tensors["action_in_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing: action_in_proj.bias"):
        train_sft(config)
    assert train_sft(dataclasses.replace(config, allow=["action_in_proj.bias"]))["version"] == 2


def test_nothing_past_an_episodes_end_is_a_target(folder):
    """The last row of an episode has no step of its own left to teach from: all but its known steps are masked."""
    assert Pi0SftConfig().data.hold_steps == 0
    data = DemoDataset(folder / "data/twin", tabletop(), 6, (28, 28), folder / "data/cache", padded=True)
    assert data.batch(np.array([len(data) - 3])).is_pad.tolist() == [[False] * 3 + [True] * 3]


def test_demonstrations_are_padded_as_the_network_sees_them(folder):
    """Pictures are kept at the network's size, undistorted, half a grey level from what the camera's would give."""
    size, embodiment = (28, 28), tabletop()
    padded = DemoDataset(folder / "data/twin", embodiment, 6, size, folder / "data/cache", padded=True)
    full = DemoDataset(folder / "data/twin", embodiment, 6, SIZE, folder / "data/cache")
    rows = np.array([0, 5])
    ours, theirs = (data.batch(rows).observation.images["wrist"] for data in (padded, full))
    assert ours.shape == (2, 28, 28, 3)
    difference = prepare_images(ours, 28, "cpu") - prepare_images(theirs, 28, "cpu")
    assert difference.abs().max() <= 1.01 / 255
    assert (ours[:, :3] == 0).all()  # 48 x 64 pictures between black bars


def test_stage_two_needs_a_critic_for_ppo(folder, toy):
    train_sft(sft_config(folder, name="blind", add_value_head=False))
    config = train_config(folder, name="blind", iterations=1, data=DataConfig(real=[str(folder / "data/stand_in")]))
    with pytest.raises(ValueError, match="add_value_head"):
        train(config)
