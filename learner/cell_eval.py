"""Success of a checkpoint in the stand-in cell, a trial in each process and faster than real time: seeded scenes,
deterministic actions, an interval. No robot side takes part (`cotwin eval` is the one that drives it)."""

import json
import multiprocessing as mp
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
from bridge.run_files import RunConfig, append_line, write_stage
from bridge.statistics import success_figures
from learner.load import load_policy
from learner.policy import ObservationBatch
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
    cell: CellConfig = field(default_factory=CellConfig)

    def __post_init__(self):
        if min(self.trials, self.workers, self.max_steps) < 1:
            raise ValueError("trials, workers and max_steps must be at least 1")


def main(argv: list[str]) -> int:
    config = command_line("cell-eval", CellEvalConfig, argv, __doc__)
    started_s = time.monotonic()
    try:
        folder = config.bundle(config.checkpoint)
        figures = {"version": verify_bundle(folder).version}
        seeds = range(config.seed, config.seed + config.trials)
        trials = evaluate(folder, config.cell, seeds, config.workers, config.max_steps)
    except (BridgeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    figures |= success_figures(sum(trial["success"] for trial in trials), len(trials))
    lines = config.run / "eval" / f"{config.stage}.jsonl"
    lines.unlink(missing_ok=True)
    for trial in trials:
        append_line(lines, trial)
    write_stage(config.run, config.stage, time.monotonic() - started_s, figures, {"trials": lines})
    print(json.dumps(figures, indent=2))
    return 0


def evaluate(
    folder: Path, config: CellConfig, seeds: Iterable[int], workers: int, max_steps: int = 100
) -> list[dict[str, Any]]:
    """`seed`, `success` and `steps` of a trial in each scene, in the order of the seeds."""
    seeds = list(seeds)
    context = mp.get_context("spawn")
    with context.Pool(workers, _begin, (folder, config, max_steps)) as pool:
        return list(tqdm(pool.imap(_trial, seeds), total=len(seeds), desc="cell trials", unit="trial"))


_cell: LockStepCell | None = None  # of this worker process
_policy: Any = None


def _begin(folder: Path, config: CellConfig, max_steps: int) -> None:
    global _cell, _policy
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    _policy = load_policy(folder, "cpu")
    _cell = LockStepCell(config, _policy.embodiment, max_steps)


def _trial(seed: int) -> dict[str, Any]:
    assert _cell is not None
    _cell.reset(seed)
    generator = torch.Generator().manual_seed(seed)
    while not _cell.ended:
        images = {name: torch.from_numpy(picture)[None] for name, picture in _cell.pictures().items()}
        seen = ObservationBatch(images, torch.from_numpy(_cell.state)[None], [_policy.embodiment.instructions[0]])
        for action in _policy.infer(seen, generator)[0, : _policy.num_action_chunks].numpy():
            if not _cell.ended:
                _cell.step(action)
    return {"seed": seed, "success": _cell.facts.success, "steps": _cell.steps}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
