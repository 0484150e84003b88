"""Success of a checkpoint in the stand-in cell, a trial in each process and faster than real time: seeded scenes,
deterministic actions, an interval. No robot side takes part (`cotwin eval` is the one that drives it).

With `plan=FILE` (`bridge.trials`) several checkpoints meet the same scenes and are compared, as on the robot. Trials
that have a line already are not repeated: an interrupted plan goes on, and ends with the lines of an uninterrupted one.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bridge.checkpoint import verify_bundle
from bridge.config import command_line
from bridge.errors import BridgeError
from bridge.run_files import RunConfig, append_line, read_lines, write_stage
from bridge.statistics import success_figures
from bridge.trials import Plan, load_plan, report
from learner.load import load_policy
from learner.policy import ObservationBatch
from sim.pool import in_order
from sim.stand_in.config import CellConfig
from sim.stand_in.lockstep import LockStepCell


@dataclass
class CellEvalConfig(RunConfig):
    """Keys of `cotwin cell-eval`."""

    stage: str = "cell_eval"
    checkpoint: str = ""  # bundle folder; empty: the run's newest
    trials: int = 20
    seed: int = 1000  # trial k is the cell's scene seed + k
    workers: int = 2
    max_steps: int = 100  # policy steps of a trial
    plan: str = ""  # file of scenes and checkpoints, in place of trials, seed and checkpoint
    cell: CellConfig = field(default_factory=CellConfig)

    def __post_init__(self):
        if min(self.trials, self.workers, self.max_steps) < 1:
            raise ValueError("trials, workers and max_steps must be at least 1")


def main(argv: list[str]) -> int:
    config = command_line("cell-eval", CellEvalConfig, argv, __doc__)
    started_s = time.monotonic()
    lines = config.run / "eval" / f"{config.stage}.jsonl"
    try:
        if config.plan:
            plan = load_plan(Path(config.plan), lambda place: Path(place).is_dir(), "runs/demo/checkpoints/000001")
        else:
            folder, seeds = config.bundle(config.checkpoint), range(config.seed, config.seed + config.trials)
            plan = Plan([(seed, "") for seed in seeds], {"": str(folder)})
            lines.unlink(missing_ok=True)
        evaluate(plan, lines, config)
    except (BridgeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    trials = read_lines(lines)
    if config.plan:
        figures = report(trials)
    else:
        figures = {"version": trials[0]["policy_versions"][0]}
        figures |= success_figures(sum(trial["success"] for trial in trials), len(trials))
    write_stage(config.run, config.stage, time.monotonic() - started_s, figures, {"trials": lines})
    print(json.dumps(figures, indent=2))
    return 0


def evaluate(plan: Plan, lines: Path, config: CellEvalConfig) -> None:
    """Append the trials that are missing to `lines`, in the order of the plan."""
    if not (missing := plan.missing(lines)):
        return
    infos = {name: verify_bundle(Path(place)) for name, place in plan.policies.items()}
    if len({info.contract_hash for info in infos.values()}) > 1:
        raise ValueError(
            f"plan {config.plan}: checkpoints are compared under one embodiment contract, these have several"
        )
    folders = {name: (Path(place), infos[name].version) for name, place in plan.policies.items()}
    begin = folders, config.cell, config.max_steps
    if config.workers == 1:
        _begin(*begin)
        trials: Iterable[dict[str, Any]] = map(_trial, missing)
    else:
        trials = in_order(_trial, missing, config.workers, _begin, begin)
    for trial in tqdm(trials, total=len(missing), desc="cell trials", unit="trial"):
        append_line(lines, trial)


_cell: LockStepCell | None = None  # of this process, or this worker of its pool
_policies: dict[str, tuple[Any, int]] = {}  # each with its version


def _begin(folders: dict[str, tuple[Path, int]], config: CellConfig, max_steps: int) -> None:
    global _cell
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    for name, (folder, version) in folders.items():
        _policies[name] = load_policy(folder, "cpu"), version
    _cell = LockStepCell(config, next(iter(_policies.values()))[0].embodiment, max_steps)


def _trial(asked: tuple[int, str]) -> dict[str, Any]:
    """One line, by the names of `cotwin eval`; a policy that everybody waits for is never late, and nothing faults."""
    seed, name = asked
    cell, (policy, version) = _cell, _policies[name]
    assert cell is not None
    cell.reset(seed)
    generator = torch.Generator().manual_seed(seed)
    while not cell.ended:
        images = {camera: torch.from_numpy(picture)[None] for camera, picture in cell.pictures().items()}
        seen = ObservationBatch(images, torch.from_numpy(cell.state)[None], [policy.embodiment.instructions[0]])
        for action in policy.infer(seen, generator)[0, : policy.num_action_chunks].numpy():
            if not cell.ended:
                cell.step(action)
    success, duration_s = cell.facts.success, round(cell.steps * policy.embodiment.period_s, 3)
    trial = {"seed": seed, "success": success, "steps": cell.steps, "policy_versions": [version], "fault": ""}
    trial |= {"time_to_success_s": duration_s if success else None, "duration_s": duration_s}
    return trial | ({"policy": name} if name else {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
