import json
import re

import pytest

from learner.report import summary, write_report
from learner.run_folder import load_run


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "tiny"
    (folder / "stages").mkdir(parents=True)
    (folder / "eval").mkdir()
    interval = {"successes": 7, "trials": 10, "wilson_low": 0.3968, "wilson_high": 0.8922}
    stages = {
        "record": {"figures": {"episodes": 12, "rtf": 0.91}, "files": {"demonstration": "demo.mp4"}},
        "eval_after": {"figures": {**interval, "policy_version_before": 1, "policy_version_after": 2}, "files": {}},
    }
    for name, stage in stages.items():
        (folder / "stages" / f"{name}.json").write_text(json.dumps({"stage": name, "wall_s": 2.5, **stage}))
    (folder / "eval" / "after.jsonl").write_text('{"seed": 1, "success": true}\n{"seed": 2, "success": false}\n')
    (folder / "demo.mp4").write_bytes(b"not really a film")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step in range(3):
            writer.add_scalar("train/sft_loss", 1.0 / (step + 1), step)
    return folder


def test_page_is_one_file_that_shows_what_was_measured(run_folder):
    page = write_report(load_run(run_folder)).read_text()
    assert "7 of 10 (95 % interval 40% to 89%)" in page
    assert "version 1 → 2" in page
    assert "data:video/mp4;base64," in page
    assert "<svg" in page
    outside = [u for u in re.findall(r'(?:src|href)="([^"#]+)"', page) if not u.startswith("data:")]
    assert outside == []


def test_summary_leaves_out_what_nobody_measured(run_folder):
    labels = [label for label, _ in summary(load_run(run_folder))]
    assert "demonstrations, stand-in" in labels
    assert "Stage I loss" not in labels


def test_damaged_stage_file_is_named(run_folder):
    (run_folder / "stages" / "record.json").write_text("{")
    with pytest.raises(ValueError, match="record.json"):
        load_run(run_folder)


def test_no_such_run(tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        load_run(tmp_path / "nothing")
