"""A checkpoint tried in the stand-in cell in lock step, in processes."""

import json
import subprocess
import sys
import time

import yaml

from learner.cell_eval import main
from learner.sft import train as train_sft
from tests.learner.test_sft import config_in
from tests.learner.toy_cell import tabletop
from tests.learner.toy_data import write_dataset


def test_trials_of_a_checkpoint_are_counted_and_kept(tmp_path, capsys):
    write_dataset(tmp_path / "twin", tabletop(), range(1))
    write_dataset(tmp_path / "stand_in", tabletop(), range(1), fps=30, domain="stand_in")
    config = config_in(tmp_path, steps=2)
    train_sft(config)
    keys = [f"runs_dir={tmp_path}", f"name={config.name}", "trials=2", "workers=2", "max_steps=9"]
    assert main(keys) == 0
    trials = [json.loads(line) for line in (config.run / "eval/cell_eval.jsonl").read_text().splitlines()]
    assert [trial["seed"] for trial in trials] == [1000, 1001]
    assert {(trial["success"], trial["steps"]) for trial in trials} == {(False, 9)}  # untrained: it goes nowhere
    figures = json.loads((config.run / "stages/cell_eval.json").read_text())["figures"]
    assert (figures["version"], figures["successes"], figures["trials"]) == (1, 0, 2)
    assert main([f"runs_dir={tmp_path}", "name=nothing"]) == 1
    assert "holds no bundle" in capsys.readouterr().err


def test_a_plan_that_was_killed_goes_on_and_ends_as_one_that_was_not(tmp_path):
    """Two untrained checkpoints; the process is killed after its second line, in the middle of later trials."""
    write_dataset(tmp_path / "twin", tabletop(), range(1))
    write_dataset(tmp_path / "stand_in", tabletop(), range(1), fps=30, domain="stand_in")
    for seed, name in enumerate(("old", "new")):
        train_sft(config_in(tmp_path, steps=2, name=name, seed=seed))
    policies = {name: str(tmp_path / name / "checkpoints/000001") for name in ("old", "new")}
    plan = {"seed": 3, "scenes": {"first": 50, "count": 3}, "policies": policies}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))

    def keys(name):
        return [f"runs_dir={tmp_path}", f"name={name}", f"plan={tmp_path}/plan.yaml", "workers=1", "max_steps=5"]

    def left(name):
        stage = json.loads((tmp_path / name / "stages/cell_eval.json").read_text())
        return (tmp_path / name / "eval/cell_eval.jsonl").read_text(), {k: v for k, v in stage.items() if k != "wall_s"}

    assert main(keys("whole")) == 0
    lines = tmp_path / "parts/eval/cell_eval.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "cotwin", "cell-eval", *keys("parts")], stderr=subprocess.DEVNULL)
    while not lines.exists() or lines.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert 2 <= lines.read_text().count("\n") < 6
    assert main(keys("parts")) == 0
    assert left("parts") == left("whole")
    text, stage = left("whole")
    order = [(json.loads(line)["seed"], json.loads(line)["policy"]) for line in text.splitlines()]
    assert len(set(order)) == 6
    assert order[::2] != sorted(order[::2])
    assert (stage["figures"]["new-old/pairs"], stage["figures"]["old/trials"]) == (3, 3)
