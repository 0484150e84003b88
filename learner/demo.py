"""The whole loop on this machine, one command after another, ending in a report.

Each stage is a command of its own (`cotwin STAGE --help`); this only strings them together: demonstrations in the twin
and in the stand-in cell, Stage I, evaluation, Stage II, delivery of the new checkpoint to the running robot,
evaluation again, report.

An interrupted demo goes on where it stopped; `restart=true` begins anew.
"""

import contextlib
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.config import command_line
from bridge.run_files import RunConfig
from learner.report import summary, write_report
from learner.run_folder import load_run

START_LIMIT_S = 120.0
EVAL_SEED = 1000  # the scenes of both evaluations in the stand-in cell; no demonstration starts from them


@dataclass
class DemoConfig(RunConfig):
    """Sizes of the demo. The defaults take ten to thirteen minutes on two cores."""

    seed: int = 0
    restart: bool = False
    record_episodes: int = 10  # in the stand-in cell, at 30 fps
    twin_episodes: int = 120
    sft_steps: int = 600  # fewer leave a policy that hardly succeeds, so a slower machine takes longer
    ppo_iterations: int = 3
    beta: float = 0.2  # weight of the SFT term in Stage II
    trials: int = 10  # in the stand-in cell, before and after Stage II
    twin_trials: int = 20
    workers: int = 2  # twin processes


class StageFailed(Exception):
    """A command of the demo ended with an error; its log says why."""


def main(argv: list[str]) -> int:
    config = command_line("demo", DemoConfig, argv, __doc__)
    folder = config.run
    if config.restart and folder.exists():
        shutil.rmtree(folder)
    started = time.monotonic()
    try:
        Demo(config, folder).run()
    except StageFailed as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    run = load_run(folder)
    report = write_report(run)
    rows = [*summary(run), ("this run took", f"{time.monotonic() - started:.0f} s"), ("report", str(report))]
    width = max(len(label) for label, _ in rows)
    print("\n" + "\n".join(f"  {label:<{width}}  {text}" for label, text in rows))
    (folder / "demo.json").write_text(json.dumps(result_file(run, config), indent=2) + "\n")
    return 0


class Demo:
    """Runs stages whose result is not there yet. `folder` is the run's folder."""

    def __init__(self, config: DemoConfig, folder: Path):
        self.config, self.folder = config, folder
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        c = self.config
        run = [f"name={c.name}", f"runs_dir={c.runs_dir}"]
        seeded, faults = [*run, f"seed={c.seed}"], f"max_faults={c.trials + 1}"
        self.stage("twin_demos", ["twin-demos", *seeded, f"episodes={c.twin_episodes}", f"workers={c.workers}"])
        if not self.has("record"):
            with self.server("demos", ["demos", f"root={self.folder / 'data' / 'stand_in'}"], "receiving"):
                endpoint = "demos_endpoint=tcp://127.0.0.1:5602"
                self.stage("record", ["record", *seeded, f"episodes={c.record_episodes}", endpoint])
        self.stage("sft", ["sft", *seeded, f"steps={c.sft_steps}", "max_seconds=0"])
        self.twin_eval("before")
        if not (self.has("eval_before") and self.has("train") and self.has("eval_after")):
            with self.server("serve", ["serve", f"root={self.folder / 'deployed'}"], "policy server ready"):
                self.push("deliver")
                self.stage(
                    "eval_before", ["eval", *run, "label=before", f"trials={c.trials}", f"seed={EVAL_SEED}", faults]
                )
                algo = [f"iterations={c.ppo_iterations}", f"algo.beta={c.beta}", f"workers={c.workers}"]
                self.stage("train", ["train", *seeded, *algo])
                # One trial more: while it runs, the new checkpoint is swapped in. It counts for neither version.
                after = ["eval", *run, "label=after", f"trials={c.trials + 1}", f"seed={EVAL_SEED - 1}", faults]
                self.stage("eval_after", after, once_shown="policy on", do=lambda: self.push("swap"))
        self.twin_eval("after")

    def twin_eval(self, when: str) -> None:
        c = self.config
        counts = [f"episodes={c.twin_trials}", f"workers={c.workers}", f"stage=twin_eval_{when}"]
        self.stage(f"twin_eval_{when}", ["twin-eval", f"name={c.name}", f"runs_dir={c.runs_dir}", *counts])

    def push(self, stage: str) -> None:
        """Bring the newest checkpoint to the policy server."""
        self.stage(stage, ["push", f"root={self.folder / 'checkpoints'}", f"run={self.folder}", f"stage={stage}"])

    def has(self, stage: str) -> bool:
        return (self.folder / "stages" / f"{stage}.json").exists()

    def stage(
        self, stage: str, command: list[str], once_shown: str = "", do: Callable[[], None] = lambda: None
    ) -> None:
        """Run `cotwin COMMAND` in the foreground unless its stage file exists; `do` something the first time that its
        output shows a text."""
        if self.has(stage):
            print(f"· {stage}: done before")
            return
        log = self.folder / "logs" / f"{stage}.log"
        print(f"\n▶ {stage}: cotwin {' '.join(command)}", flush=True)
        code = _run_and_copy(_cotwin(command), log, once_shown, do)
        if code != 0:
            raise StageFailed(f"stage {stage} ended with code {code}; its output is in {log}")
        if not self.has(stage):
            raise StageFailed(f"stage {stage} ended without its result file; its output is in {log}")

    @contextlib.contextmanager
    def server(self, name: str, command: list[str], ready: str) -> Iterator[subprocess.Popen]:
        """A command in the background for as long as the block lasts; waits until its output says that it is ready."""
        log = self.folder / "logs" / f"{name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(_cotwin(command), stdout=output, stderr=subprocess.STDOUT, env=_environment())
        try:
            limit = time.monotonic() + START_LIMIT_S
            while ready not in log.read_text():
                if process.poll() is not None:
                    raise StageFailed(f"{name} ended with code {process.returncode}; its output is in {log}")
                if time.monotonic() > limit:
                    raise StageFailed(f"{name} was not ready within {START_LIMIT_S:.0f} s; its output is in {log}")
                time.sleep(0.1)
            yield process
        finally:
            _end(process)


def _cotwin(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "cotwin", *command]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def _run_and_copy(command: list[str], log: Path, once_shown: str, do: Callable[[], None]) -> int:
    """Show the command's output as it comes (progress bars too) and keep a copy."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment())
    assert process.stdout is not None
    waiting = bool(once_shown)
    try:
        with log.open("w") as copy:
            while chunk := os.read(process.stdout.fileno(), 4096):
                text = chunk.decode(errors="replace")
                sys.stdout.write(text)
                sys.stdout.flush()
                copy.write(text)
                if waiting and once_shown in text:
                    waiting = False
                    do()
        return process.wait()
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    for send, patience_s in ((process.terminate, 15.0), (process.kill, 5.0)):
        if process.poll() is not None:
            return
        send()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def result_file(run: Any, config: DemoConfig) -> dict[str, Any]:
    """`docs/results/demo.json` in the form of the contract's section 9."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "name": "demo",
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "command": "make demo",
        "machine": {
            "gpu": "none",
            "cpu": platform.processor() or platform.machine(),
            "cpu_cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "figures": {
            stage: {k: v for k, v in data.figures.items() if not isinstance(v, list | dict)} | {"wall_s": data.wall_s}
            for stage, data in run.stages.items()
        },
        "summary": dict(summary(run)),
    }
