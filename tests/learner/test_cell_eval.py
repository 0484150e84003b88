"""A checkpoint tried in the stand-in cell in lock step, in processes."""

import json

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
    keys = [f"runs_dir={tmp_path}", f"name={config.name}", "trials=2", "workers=1", "max_steps=9"]
    assert main(keys) == 0
    trials = [json.loads(line) for line in (config.run / "eval/cell_eval.jsonl").read_text().splitlines()]
    assert [trial["seed"] for trial in trials] == [1000, 1001]
    assert {(trial["success"], trial["steps"]) for trial in trials} == {(False, 9)}  # untrained: it goes nowhere
    figures = json.loads((config.run / "stages/cell_eval.json").read_text())["figures"]
    assert (figures["version"], figures["successes"], figures["trials"]) == (1, 0, 2)
    assert main([f"runs_dir={tmp_path}", "name=nothing"]) == 1
    assert "holds no bundle" in capsys.readouterr().err
