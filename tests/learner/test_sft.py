import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.checkpoint import latest_bundle, read_manifest, verify_bundle
from learner import sft
from learner.demo_dataset import DataConfig, open_parts
from learner.load import load_policy, load_weights
from learner.policy import ObservationBatch
from learner.sft import SftConfig, SftTrainer, train
from learner.small_policy import SmallPolicyConfig
from tests.learner.toy_cell import tabletop
from tests.learner.toy_data import SIZE, write_dataset


def tiny_policy() -> SmallPolicyConfig:
    return SmallPolicyConfig(
        image_height=SIZE[0], image_width=SIZE[1], conv_channels=8, keypoints=8, width=32, heads=2, layers=2, horizon=8,
        num_action_chunks=4,
    )  # fmt: skip


def config_in(folder, **changes) -> SftConfig:
    data = DataConfig(sim=[str(folder / "twin")], real=[str(folder / "stand_in")], cache=str(folder / "cache"))
    values = {"runs_dir": str(folder), "name": "run", "steps": 6, "max_seconds": 0.0, "batch_size": 8, "data": data}
    return SftConfig(**values | {"policy": tiny_policy(), "embodiment": tabletop(), "threads": 1} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_dataset(folder / "twin", tabletop(), range(2))
    write_dataset(folder / "stand_in", tabletop(), range(1), fps=30, domain="stand_in")
    return folder


def trainer(config):
    return SftTrainer(config, open_parts(config.data, config.embodiment, config.policy.horizon, SIZE))


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(folder):
    config = config_in(folder)
    whole, stopped, resumed = trainer(config), trainer(config), trainer(config)
    losses = [whole.train_step()["loss"] for _ in range(6)]
    for _ in range(3):
        stopped.train_step()
    torch.save(stopped.state_dict(), folder / "state.pt")
    resumed.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    assert [resumed.train_step()["loss"] for _ in range(3)] == losses[3:]
    for key, value in whole.averaged.state_dict().items():
        assert torch.equal(value, resumed.averaged.state_dict()[key]), key
    for key, value in whole.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[key]), key


def test_it_learns_a_small_data_set(folder):
    few = dataclasses.replace(tiny_policy(), goal_weight=0.5, jitter=0.0, shift_px=0, state_noise=0.0)
    learner = trainer(config_in(folder, steps=70, batch_size=16, policy=few))
    terms = [learner.train_step() for _ in range(70)]
    early, late = (sum(t["flow_loss"] for t in part) / 10 for part in (terms[:10], terms[-10:]))
    assert late < 0.7 * early
    assert sum(t["goal_loss"] for t in terms[-10:]) < 0.7 * sum(t["goal_loss"] for t in terms[:10])


def test_a_stage_leaves_a_bundle_that_answers_like_the_trained_policy(folder):
    figures = train(config_in(folder, name="whole"))
    bundle = latest_bundle(folder / "whole" / "checkpoints")
    assert verify_bundle(bundle).version == figures["version"] == 1
    assert read_manifest(bundle)[0].training_step == 6
    stage = json.loads((folder / "whole/stages/sft.json").read_text())
    assert stage["figures"]["steps"] == 6
    assert len(json.loads((folder / "whole" / stage["files"]["loss_curve"]).read_text())["loss"]) == 6
    policy = load_policy(bundle)
    batch = trainer(config_in(folder)).mixture.__next__()
    actions = policy.infer(batch.observation, torch.Generator().manual_seed(1))
    assert actions.shape == (8, 8, 7)
    assert actions.dtype == torch.float32
    again = load_policy(bundle).infer(batch.observation, torch.Generator().manual_seed(1))
    assert torch.equal(actions, again)


def test_an_interrupted_stage_is_continued_and_not_with_other_settings(folder, monkeypatch):
    config = config_in(folder, name="interrupted")
    step = SftTrainer.train_step

    def interrupted(self):
        if self.step == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(SftTrainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(SftTrainer, "train_step", step)
    with pytest.raises(ValueError, match=r"batch_size.*resume=false"):
        train(dataclasses.replace(config, batch_size=4))
    train(config)
    train(config_in(folder, name="uninterrupted"))
    ours, theirs = (
        load_file(folder / name / "checkpoints/000001/model.safetensors") for name in ("interrupted", "uninterrupted")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_stage_that_was_stopped_after_its_last_step_is_finished(folder, monkeypatch):
    config = config_in(folder, name="full", save_every_s=0.0)
    with monkeypatch.context() as disk:
        disk.setattr(sft, "write_bundle", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            train(config)
    figures = train(config)
    assert (figures["version"], figures["steps"]) == (1, 6)
    losses = json.loads((folder / "full/curves/sft.json").read_text())["loss"]
    assert len(losses) == 6
    assert figures["first_loss"] == losses[0]


def test_weights_fit_exactly_or_every_problem_is_named(folder, tmp_path):
    policy = trainer(config_in(folder)).policy
    tensors = {key: value.contiguous() for key, value in policy.state_dict().items()}
    tensors["stray.weight"] = torch.zeros(2)
    tensors["state_in.bias"] = torch.zeros(5)
    del tensors["kind"], tensors["goal_in.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    wrong = r"missing goal_in\.bias; missing kind; unexpected stray\.weight; state_in\.bias is \[5\], expected \[32\]"
    with pytest.raises(ValueError, match=wrong):
        load_weights(policy, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_weights(policy, tmp_path / "model.safetensors")


def test_a_missing_camera_and_a_long_instruction_are_named(folder):
    policy = trainer(config_in(folder)).policy
    pictures = {"wrist": torch.zeros(1, *SIZE, 3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="lacks cameras \\['third_person'\\]"):
        policy.infer(ObservationBatch(pictures, torch.zeros(1, 7), ["pick"]))
    pictures["third_person"] = pictures["wrist"]
    with pytest.raises(ValueError, match="17 words"):
        policy.infer(ObservationBatch(pictures, torch.zeros(1, 7), ["pick " * 17]))
