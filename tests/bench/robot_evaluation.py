"""An evaluation by plan in the stand-in cell, killed and resumed, beside one that was not: same lines, same report.

Two checkpoints meet the same scenes by `cotwin cell-eval plan=...`, which shares plan, order, lines and report with
`cotwin eval` on the robot; the cell in lock step repeats itself to the last bit, which the real one cannot.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.bench.bridge_swap import ROOT

STAGE = "cell_eval"


def bench_evaluation(figure: Callable[..., dict], quick: bool, checkpoints: Path) -> dict[str, Any]:
    """`checkpoints`: a run's bundles; the first and the newest are compared."""
    scenes, kills = (3, 3) if quick else (50, 4)
    bundles = sorted(path for path in checkpoints.glob("*") if path.is_dir())
    if len(bundles) < 2:
        raise ValueError(f"{checkpoints} holds {len(bundles)} bundles; two are compared: run `cotwin demo` first")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policies = {"first": str(bundles[0].resolve()), "newest": str(bundles[-1].resolve())}
        plan = {"seed": 7, "scenes": {"first": 5000, "count": scenes}, "policies": policies}
        (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
        finish(folder, "whole")
        killed_after = [kill(folder, "parts", 2 * scenes // (kills + 1)) for _ in range(kills)]
        finish(folder, "parts")
        (lines, stage), (other_lines, other_stage) = (left(folder, name) for name in ("whole", "parts"))
    equal = lines == other_lines and stage == other_stage
    figures = {"evaluation_reports_equal": figure(int(equal), None, None, "", None, 2 * scenes)}
    table = {"trials": 2 * scenes, "killed_with_so_many_trials_done": killed_after, "report": stage["figures"]}
    table |= {"lines_equal": lines == other_lines, "stages_equal": stage == other_stage}
    return {"figures": figures, "tables": {"evaluation": table}}


def start(folder: Path, name: str) -> subprocess.Popen:
    keys = [f"runs_dir={folder}", f"name={name}", f"plan={folder}/plan.yaml"]
    command = [sys.executable, "-m", "cotwin", "cell-eval", *keys]
    with open(folder / f"{name}.log", "w") as log:  # workers whose parent was killed complain before they end
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish(folder: Path, name: str) -> None:
    with start(folder, name) as process:
        if process.wait():
            raise RuntimeError((folder / f"{name}.log").read_text()[-3000:])


def kill(folder: Path, name: str, trials: int) -> int:
    """SIGKILL after 1 to `trials` more lines, at any moment of the trials that run then. How many lines there are."""
    lines = folder / name / "eval" / f"{STAGE}.jsonl"
    done = lambda: lines.read_text().count("\n") if lines.exists() else 0  # noqa: E731
    goal = done() + random.randint(1, trials)
    with start(folder, name) as process:
        while done() < goal and process.poll() is None:
            time.sleep(0.05)
        time.sleep(random.uniform(0.0, 2.0))
        process.kill()
    return done()


def left(folder: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """All lines, and the stage without its wall time."""
    stage = json.loads((folder / name / "stages" / f"{STAGE}.json").read_text())
    del stage["wall_s"]
    return (folder / name / "eval" / f"{STAGE}.jsonl").read_bytes(), stage
