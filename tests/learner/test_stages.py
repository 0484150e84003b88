"""Stage II and its evaluation as whole stages: files in, files out, on toy cells."""

import dataclasses
import json
import re
import sys

import pytest
from safetensors.torch import load_file

from bridge.checkpoint import bundles, read_manifest
from learner import train as train_module
from learner import twin_eval
from learner.curves import LoggerConfig
from learner.demo_dataset import DataConfig
from learner.film import VideoConfig
from learner.run_folder import read_curves
from learner.runs_command import main as runs_main
from learner.sft import train as train_sft
from learner.train import TrainConfig, train
from learner.trainer import Trainer
from learner.twin_eval import TwinEvalConfig, evaluate
from learner.update import AlgoConfig
from tests.learner.test_sft import config_in
from tests.learner.toy_cell import ToyVectorEnv, tabletop
from tests.learner.toy_data import SIZE, write_dataset

TAGS = [
    *("train/ppo_loss", "train/sft_loss", "train/loss_ratio", "train/grad_cosine", "actor/total_loss"),
    *("actor/approx_kl", "actor/pg_clipfrac", "actor/value_loss", "actor/value_clip_ratio", "actor/grad_norm"),
    *("rollout/returns_mean", "rollout/advantages_mean", "env/episode_len", "env/success_once", "sft/loss"),
]


@pytest.fixture
def toy(monkeypatch):
    def toy_env(config, embodiment, num_envs, num_workers, seed, auto_reset):
        assert not auto_reset
        return ToyVectorEnv(embodiment, num_envs, config.max_steps, SIZE)

    monkeypatch.setattr(train_module, "TwinVectorEnv", toy_env)
    monkeypatch.setattr(twin_eval, "TwinVectorEnv", toy_env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    write_dataset(folder / "run/data/twin", tabletop(), range(1))
    write_dataset(folder / "run/data/stand_in", tabletop(), range(1), fps=30, domain="stand_in")
    train_sft(dataclasses.replace(config_in(folder, steps=3), data=DataConfig()))
    return folder


def train_config(folder, **changes):
    algo = AlgoConfig(
        batch_size=4,
        micro_batch_size=4,
        sft_per_rl=1.0,
        critic_warmup_steps=1,
        gradient_report_every=1,
        target_kl=None,
    )
    config = TrainConfig(runs_dir=str(folder), name="run", iterations=3, envs=2, episodes=3, threads=1, algo=algo)
    config.twin.max_steps = 6
    return dataclasses.replace(config, **changes)


def stop_after_two(monkeypatch, config):
    """A run that somebody interrupts before its third iteration."""
    iterate = Trainer.iterate

    def interrupted(self, film):
        if self.iteration == 2:
            raise KeyboardInterrupt
        return iterate(self, film)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "iterate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_stage_two_leaves_versions_metrics_and_figures_and_goes_on_after_an_interruption(folder, toy, monkeypatch):
    stop_after_two(monkeypatch, train_config(folder))
    with pytest.raises(ValueError, match=r"seed.*resume=false"):
        train(train_config(folder, seed=9))
    figures = train(train_config(folder))
    assert (figures["parent_version"], figures["version"], figures["iterations"]) == (1, 4, 3)
    found = bundles(folder / "run/checkpoints")
    assert [read_manifest(path)[0].parent_version for path in found.values()] == [0, 1, 2, 3]
    assert json.loads((folder / "run/stages/train.json").read_text())["figures"] == figures
    curves = read_curves(folder / "run/tensorboard")
    assert set(TAGS) <= curves.keys()
    assert [step for step, _ in curves["env/episode_len"]] == [1, 2, 3]

    whole = train(train_config(folder, checkpoint=str(found[1]), stage="whole"))
    curves = [json.loads((folder / f"run/curves/{stage}.json").read_text()) for stage in ("train", "whole")]
    resumed, uninterrupted = ([{k: v for k, v in m.items() if "time/" not in k} for m in c] for c in curves)
    assert resumed == uninterrupted
    assert len(resumed) == 3
    ours, theirs = (load_file(folder / f"run/checkpoints/{v:06d}/model.safetensors") for v in (4, whole["version"]))
    assert all((ours[key] == theirs[key]).all() for key in ours)


def test_a_stopped_stage_two_ends_where_it_is_when_it_has_made_enough(folder, toy, monkeypatch):
    config = {"checkpoint": str(folder / "run/checkpoints/000001"), "stage": "short", "save_every": 10}
    stop_after_two(monkeypatch, train_config(folder, **config))
    before = list(bundles(folder / "run/checkpoints"))
    figures = train(train_config(folder, **config, iterations=1))
    after = list(bundles(folder / "run/checkpoints"))
    assert after == [*before, before[-1] + 1]
    assert (figures["version"], figures["iterations"]) == (after[-1], 2)


def test_two_runs_side_by_side(folder, toy, tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        config = train_config(tmp_path, name=name, seed=seed, checkpoint=str(folder / "run/checkpoints/000001"))
        config.algo.beta, config.iterations = 0.0, 1
        train(config)
    assert runs_main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "train.seed | 0 | 1" in text
    assert "train.threads" not in text  # the same in both
    assert re.search(r"train\.optimizer_steps \| \d+ \| \d+", text)
    assert re.search(r"env/episode_len \| 6 \| 6", text)
    assert runs_main(["compare", str(tmp_path / "a")]) == 2
    assert runs_main(["compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 1
    assert "is no run folder" in capsys.readouterr().err


def test_a_logger_that_is_not_installed_is_named(folder, toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = train_config(tmp_path, checkpoint=str(folder / "run/checkpoints/000001"))
    config.algo.beta, config.logger = 0.0, LoggerConfig(["tensorboard", "wandb"])
    with pytest.raises(ValueError, match=r"'wandb' is not installed: uv pip install wandb"):
        train(config)
    with pytest.raises(ValueError, match="allowed are tensorboard, wandb, swanlab"):
        LoggerConfig(["mlflow"])


def test_stage_two_needs_the_robots_demonstrations_unless_beta_is_0(folder, toy, tmp_path):
    config = train_config(tmp_path, checkpoint=str(folder / "run/checkpoints/000001"), iterations=1)
    with pytest.raises(ValueError, match=r"algo\.beta 0\.2 needs demonstrations"):
        train(config)
    config.algo.beta = 0.0
    assert train(config)["iterations"] == 1


def test_stage_two_keeps_videos_and_changes_the_checkpoints_policy_where_asked(folder, toy, tmp_path):
    config = train_config(
        tmp_path,
        checkpoint=str(folder / "run/checkpoints/000001"),
        iterations=2,
        pipeline_stages=2,
        video=VideoConfig(save=True, every=2),
        policy={"num_action_chunks": 3, "flow": {"noise_level": 0.4}},
    )
    config.algo.beta = 0.0
    train(config)
    assert [path.name for path in (tmp_path / "run/videos").iterdir()] == ["train-0000.mp4"]
    saved = json.loads((tmp_path / "run/checkpoints/000003/config.json").read_text())["policy"]
    assert (saved["num_action_chunks"], saved["flow"]["noise_level"]) == (3, 0.4)
    with pytest.raises(ValueError, match=r"config\.json.*num_chunks"):
        train(dataclasses.replace(config, policy={"num_chunks": 3}, resume=False))


def test_stage_two_without_a_checkpoint_says_what_to_do(tmp_path, toy):
    with pytest.raises(ValueError, match="run `cotwin sft` first"):
        train(train_config(tmp_path))


def test_evaluation_leaves_trials_an_interval_and_a_video(folder, toy):
    config = TwinEvalConfig(runs_dir=str(folder), name="run", stage="twin_eval_before", episodes=3, envs=2, seed=40)
    config.twin.max_steps = 6
    figures = evaluate(config)
    assert (figures["trials"], figures["successes"]) == (3, 0)
    assert 0.5 < figures["wilson_high"] < 0.6  # 0 of 3
    lines = (folder / "run/eval/twin_eval_before.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [40, 41, 42]
    stage = json.loads((folder / "run/stages/twin_eval_before.json").read_text())
    assert (folder / "run" / stage["files"]["video"]).stat().st_size > 0


def test_an_interrupted_evaluation_goes_on_with_what_is_missing(folder, toy, monkeypatch):
    config = TwinEvalConfig(runs_dir=str(folder), name="run", stage="long_eval", episodes=3, envs=1, workers=1)
    config.twin.max_steps = 6
    play = twin_eval.run_episodes

    def interrupted(*args):
        for number, trial in enumerate(play(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield trial | {"success": number == 0, "instruction": f"task {number}"}

    monkeypatch.setattr(twin_eval, "run_episodes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    monkeypatch.setattr(twin_eval, "run_episodes", play)
    assert not (folder / "run/eval/long_eval.jsonl").exists()
    other = dataclasses.replace(config, twin=dataclasses.replace(config.twin, max_steps=7))
    with pytest.raises(ValueError, match=r"max_steps.*resume=false"):
        evaluate(other)
    figures = evaluate(config)
    assert (figures["successes"], figures["trials"]) == (1, 3)
    assert figures["task: task 0"] == "1 of 1 (21% to 100%)"
    assert figures["task: task 1"] == "0 of 1 (0% to 79%)"
    lines = [json.loads(line) for line in (folder / "run/eval/long_eval.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 2]
    assert not (folder / "run/eval/long_eval.partial").exists()
