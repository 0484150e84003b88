"""A recipe as it stands, on LIBERO itself: a tiny pi0.5 that reads LIBERO's state and speaks its actions."""

import json

import pytest
import torch

from bridge.checkpoint import write_bundle
from learner.load import bundle_files
from learner.pi0.normalise import Normaliser
from learner.recipes import load_train
from learner.train import TrainConfig, train
from learner.twin_eval import TwinEvalConfig, evaluate
from sim.libero.config import LiberoConfig
from tests.learner.pi0.test_policy import make
from tests.learner.pi0.words import write_tokenizer
from tests.sim.libero.test_libero import EMBODIMENT, installed


@installed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_recipe_trains_on_libero_and_is_evaluated(tmp_path):
    policy = make("pi05")
    policy.config.tokenizer, policy.config.compile = str(write_tokenizer(tmp_path / "tokenizer")), False
    policy.embodiment = EMBODIMENT
    policy.state_normaliser = Normaliser("QUANTILES", {"q01": -torch.ones(8), "q99": torch.ones(8)})
    bundle = tmp_path / "000001"
    write_bundle(bundle, bundle_files(policy), EMBODIMENT, 1, 0, 0, {})
    small = ["envs=2", "workers=1", "iterations=1", "episodes=2", "threads=1", "device=cpu", "libero.max_steps=6"]
    small += ["algo.batch_size=4", "algo.micro_batch_size=4", "libero.picture_width=64", "libero.picture_height=64"]
    small += ["actor.model.num_action_chunks=3", f"checkpoint={bundle}", f"runs_dir={tmp_path}"]
    config = load_train(TrainConfig, ["config=libero_spatial_ppo_openpi_pi05", *small])
    config.cluster.component_placement = {}
    config.policy["model"] = {"variant": "pi05"}  # the tiny one's own sizes
    assert train(config)["env_steps"] == 12
    trained = tmp_path / "libero_spatial_ppo_openpi_pi05/checkpoints/000002"

    libero = LiberoConfig("libero_goal", max_steps=3, picture_width=64, picture_height=64, convention="libero")
    asked = TwinEvalConfig("eval", str(tmp_path), checkpoint=str(trained), episodes=2, envs=1, workers=1, libero=libero)
    figures = evaluate(asked)
    assert (figures["trials"], figures["successes"]) == (2, 0)
    assert figures["task: put the bowl on the stove"] == "0 of 1 (0% to 79%)"
    lines = [json.loads(line) for line in (tmp_path / "eval/eval/twin_eval.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [3, 3]
