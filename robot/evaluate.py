"""Evaluate a policy server on the robot or in the stand-in cell: seeded trials, success counted apart from faults.

For each trial: a fresh scene, the arm at home, the policy on, until the task is done for `hold_s` or `trial_s` is over.
One line of `eval/<label>.jsonl` for each trial: success, times, policy versions, jitter and latency. Trials that are
there already are not repeated. With `plan=FILE` several policies meet the same scenes in a shuffled order, nobody at
the table is told which one is on (see `bridge.trials`), and their success rates are compared scene by scene.

A fault (of the arm, or a policy that stopped answering) is neither success nor failure of the policy: it is counted
apart, and its trial is not part of the success rate.
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bridge.config import command_line, save
from bridge.embodiment import Embodiment
from bridge.errors import RobotFault
from bridge.run_files import append_line, read_lines, write_stage
from bridge.trials import Plan, load_plan, report, summarise
from robot.scene import SessionError
from robot.session import Session, SessionConfig, ended_by, interrupted_when_left
from robot.switch import Switch, is_endpoint

# What the runtime says of the time since its last start, as JSON in `runtime_status`.
RUNTIME_FIGURES = ("policy_versions", "tick_jitter_ms", "chunk_latency_ms", "holds", "errors")
STATUS_DELAY_S = 0.5  # the newest status has come by then
SLOWEST = 20  # a cell whose seconds take longer than this many of ours has stopped


@dataclass
class EvalConfig:
    """Keys of `cotwin eval`."""

    name: str = "demo"  # the run: a folder below `runs_dir`
    runs_dir: str = "runs"
    label: str = "before"  # names the file and the stage: eval/<label>.jsonl, stages/eval_<label>.json
    trials: int = 10
    seed: int = 1000  # of the first trial's scene; each trial takes the next
    trial_s: float = 12.0  # the robot's seconds
    hold_s: float = 0.5  # success counts when it lasts for so long
    policy_endpoint: str = "tcp://127.0.0.1:5601"
    plan: str = ""  # file of scenes and policies, in place of trials, seed and policy_endpoint
    instruction: str = ""  # empty: the first of the embodiment contract
    max_faults: int = 5  # more than these end the evaluation
    embodiment: Embodiment = field(default_factory=Embodiment)
    session: SessionConfig = field(default_factory=SessionConfig)

    def __post_init__(self):
        if self.trials < 1:
            raise ValueError(f"trials {self.trials}: allowed are 1 and more")
        if not self.label.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"label {self.label!r}: allowed are letters, digits, - and _ (it names files)")

    @property
    def run(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def trials_file(self) -> Path:
        return self.run / "eval" / f"{self.label}.jsonl"

    @property
    def video_file(self) -> Path:
        return self.run / "videos" / f"eval_{self.label}.mp4"


def main(argv: list[str]) -> int:
    config = command_line("eval", EvalConfig, argv, __doc__)
    save(config, config.run / "config" / f"eval_{config.label}.yaml")
    started_s = time.monotonic()
    try:
        with interrupted_when_left():
            evaluate(config)
    except (SessionError, RobotFault, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    trials = read_lines(config.trials_file)
    figures = report(trials) if config.plan else summarise(trials)
    files = {"first_trial": config.video_file} if config.video_file.exists() else {}
    write_stage(config.run, f"eval_{config.label}", time.monotonic() - started_s, figures, files)
    print(json.dumps(figures, indent=2))
    return 0


def evaluate(config: EvalConfig) -> None:
    """Run the trials that are missing. Raises SessionError when too many end in faults."""
    if config.plan:
        plan = load_plan(Path(config.plan), is_endpoint, "tcp://127.0.0.1:5601")
    else:
        plan = Plan([(config.seed + n, "") for n in range(config.trials)], {"": config.policy_endpoint})
    if not (missing := plan.missing(config.trials_file)):
        return
    faults = 0
    needs, log = ["runtime_node/start", "runtime_node/stop"], config.run / "logs" / f"eval_{config.label}_nodes.log"
    with contextlib.ExitStack() as exits:
        switch = exits.enter_context(contextlib.closing(Switch())) if config.plan else None
        endpoint = switch.endpoint if switch is not None else config.policy_endpoint
        args = {"policy_endpoint": endpoint, "instruction": config.instruction}
        session = exits.enter_context(Session(config.session, config.embodiment, "evaluate", needs, args, log))
        session.call("runtime_node/stop")  # whoever started it: a person is about to set up the first scene
        for seed, policy in tqdm(missing, unit="trial", desc=f"eval {config.label}"):
            if switch is not None:
                switch.choose(plan.policies[policy])
            trial = run_trial(session, config, seed) | ({"policy": policy} if config.plan else {})
            append_line(config.trials_file, trial)
            faults += bool(trial["fault"])
            if faults > config.max_faults:
                raise SessionError(f"{faults} trials ended in faults, the last one: {trial['fault']}")


def run_trial(session: Session, config: EvalConfig, seed: int) -> dict[str, Any]:
    """One trial's line. `tick_jitter_ms` and `chunk_latency_ms` hold every tick and chunk of the trial."""
    session.prepare(seed)
    video = None if config.video_file.exists() else session.record_video("third_person", config.video_file)
    begin_s = session.scene.time_s()
    fault, success_s, at_end = "", None, {}
    try:
        with ended_by(session, "runtime_node/stop"):
            session.call("runtime_node/start")
            tqdm.write(f"scene {seed}: policy on")
            success_s = watch(session, config, begin_s)
            at_end = session.status("runtime_status")  # once stopped it says no more whether the policy was silent
    except RobotFault as error:
        fault = str(error)
    duration_s = round(session.scene.time_s() - begin_s, 3)
    session.spin(STATUS_DELAY_S)
    status = session.status("runtime_status")
    if video is not None:
        video.close()
    figures = {key: json.loads(status[key]) for key in RUNTIME_FIGURES}
    if not fault and not session.scene.automatic and session.scene.judge():
        success_s = duration_s
    if not fault and success_s is None:
        fault = policy_fault(at_end, figures)
    return {
        "seed": seed,
        "success": success_s is not None and not fault,
        "time_to_success_s": success_s,
        "duration_s": duration_s,
        "fault": fault,
        **figures,
    }


def policy_fault(status: dict[str, str], figures: dict[str, Any]) -> str:
    """Why a failed trial says nothing about the policy: it never acted, or had gone silent at the end."""
    if not figures["policy_versions"]:
        return f"the policy never acted: {status['reason']}"
    if status["state"] == "HOLD" and figures["errors"]:
        return f"the policy went silent: {status['reason']}"
    return ""


def watch(session: Session, config: EvalConfig, begin_s: float) -> float | None:
    """Seconds until success, None for none in time, or where only a person can tell. Raises RobotFault."""
    scene = session.scene
    since_s: float | None = None  # when the success that still lasts began

    def over() -> bool:
        nonlocal since_s
        now_s = scene.time_s() - begin_s
        if not scene.success():
            since_s = None
        elif since_s is None:
            since_s = now_s
        held = since_s is not None and now_s - since_s >= config.hold_s
        return held or now_s > config.trial_s or scene.wants_end()

    session.wait(over, SLOWEST * config.trial_s, "the trial's end", session.check_arm, every_s=0.1)
    end_s = scene.time_s() - begin_s
    return round(since_s, 3) if since_s is not None and end_s - since_s >= config.hold_s else None
