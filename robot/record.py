"""Record demonstrations to a LeRobot data set.

For each episode: a fresh scene, the arm at home, recorder on, then the scripted expert (`source=expert`) or a person's
device (`source=device`: its marks, or Enter, end an episode) until the task is done or its time is over. Successes are
saved, failures thrown away (`keep_failures=true` keeps them). A session that was interrupted goes on where it stopped.

`demos_endpoint` sends the episodes to a learner; empty, they go to `data/<domain>` of the run's folder.
"""

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bridge.config import command_line, errors_in_one_line, save
from bridge.embodiment import Embodiment
from bridge.errors import RobotFault
from bridge.run_files import RunConfig, append_line, read_lines, write_stage
from robot.scene import SessionError
from robot.session import Session, SessionConfig, ended_by, interrupted_when_left

EXPERT, DEVICE = "expert", "device"
EXPERT_PATIENCE_S = 10.0
SLOWEST = 20  # a cell whose seconds take longer than this many of ours has stopped


@dataclass
class RecordConfig(RunConfig):
    """Keys of `cotwin record`."""

    episodes: int = 12  # saved ones, earlier sessions of this run included
    seed: int = 0  # of the first scene; every attempt takes the next one
    source: str = EXPERT  # or device
    instruction: str = ""  # empty: the first of the embodiment contract
    domain: str = "stand_in"
    demos_endpoint: str = ""
    keep_failures: bool = False
    episode_timeout_s: float = 30.0  # the robot's seconds
    settle_s: float = 0.5  # after the task is done, still recorded; then success is judged
    max_failures_in_a_row: int = 5
    delivery_timeout_s: float = 60.0  # at the end, for episodes that the learner has not acknowledged
    embodiment: Embodiment = field(default_factory=Embodiment)
    session: SessionConfig = field(default_factory=SessionConfig)

    def __post_init__(self):
        if self.source not in (EXPERT, DEVICE):
            raise ValueError(f"source {self.source!r}: allowed are {EXPERT!r} and {DEVICE!r}")
        if self.episodes < 1:
            raise ValueError(f"episodes {self.episodes}: allowed are 1 and more")

    @property
    def data_root(self) -> Path:
        return self.run / "data" / self.domain

    @property
    def attempts_file(self) -> Path:
        return self.run / "record" / "attempts.jsonl"


@errors_in_one_line(RobotFault, SessionError)
def main(argv: list[str]) -> int:
    config = command_line("record", RecordConfig, argv, __doc__)
    save(config, config.run / "config" / "record.yaml")
    started_s = time.monotonic()
    with interrupted_when_left():
        record(config)
    attempts = read_lines(config.attempts_file)
    video = config.run / "videos" / "record.mp4"
    files = {"demonstration": video} if video.exists() else {}
    figures = summarise(attempts)
    write_stage(config.run, "record", time.monotonic() - started_s, figures, files)
    print(json.dumps(figures, indent=2))
    return 0


def record(config: RecordConfig) -> None:
    """Attempts until enough episodes are saved; one line of `record/attempts.jsonl` for each."""
    attempts = read_lines(config.attempts_file)
    saved = sum(attempt["saved"] for attempt in attempts)
    if saved >= config.episodes:
        return
    needs = ["start_episode", "end_episode", "save_episode", "discard_episode"]
    if config.source == EXPERT:
        needs += ["expert_node/start", "expert_node/stop"]
    log = config.run / "logs" / "record_nodes.log"
    session = Session(config.session, config.embodiment, "record", needs, launch_args(config), log)
    failures = 0
    with (
        session,
        tqdm(total=config.episodes, initial=saved, unit="episode", desc="record") as progress,
    ):
        while saved < config.episodes:
            attempt = attempt_one(session, config, config.seed + len(attempts))
            append_line(config.attempts_file, attempt)
            attempts.append(attempt)
            saved += attempt["saved"]
            progress.update(attempt["saved"])
            failures = 0 if attempt["success"] else failures + 1
            if failures >= config.max_failures_in_a_row:
                raise SessionError(f"{failures} failures in a row, the last: {attempt['fault'] or 'task not done'}")
        if config.demos_endpoint:
            session.wait(lambda: _delivered(session), config.delivery_timeout_s, "delivery of all episodes")


def _delivered(session: Session) -> bool:
    status = session.status("recorder_status")
    if status.get("send_error"):
        raise SessionError(f"the learner does not take episodes: {status['send_error']}")
    return status.get("pending") == "0"


def launch_args(config: RecordConfig) -> dict[str, str]:
    """What the launch file passes on to the recorder."""
    args = {
        "record": "true",
        "dataset_root": str(config.data_root.resolve()),
        "spool_dir": str((config.run / "spool").resolve()),
        "domain": config.domain,
        "demos_endpoint": config.demos_endpoint,
        "instruction": config.instruction,
    }
    return args | {"expert": "true", "seed": str(config.seed)} if config.source == EXPERT else args


def attempt_one(session: Session, config: RecordConfig, seed: int) -> dict[str, Any]:
    """One episode, saved or not. A fault of the arm or a broken recording is part of the result, not an error."""
    session.prepare(seed)
    video_path = config.run / "videos" / "record.mp4"
    video = None if video_path.exists() else session.record_video("third_person", video_path)
    started_s, begin_s = time.monotonic(), session.scene.time_s()
    session.call("start_episode")
    fault = ""
    try:
        with ended_by(session, "end_episode"):
            demonstrate(session, config)
    except RobotFault as error:
        fault = str(error)
    duration_s, wall_s = session.scene.time_s() - begin_s, time.monotonic() - started_s
    if video is not None:
        video.close()
    success = not fault and session.scene.judge()
    saved: dict[str, Any] = {}
    if (success or (config.keep_failures and not fault)) and not session.scene.is_discarded:
        try:
            saved = json.loads(session.call("save_episode", success=success, timeout_s=60.0))
        except SessionError as error:
            session.check()
            fault = str(error)
    else:
        session.call("discard_episode")
    return {
        "seed": seed,
        "success": success,
        "fault": fault,
        "saved": bool(saved),
        "duration_s": round(duration_s, 3),
        "wall_s": round(wall_s, 3),
        **saved,
    }


def demonstrate(session: Session, config: RecordConfig) -> None:
    """Run the expert, or wait for the person, until the episode is over."""
    scene, begin_s = session.scene, session.scene.time_s()

    def over() -> bool:
        ended = scene.wants_end() if config.source == DEVICE else session.expert_done is not None
        return ended or scene.time_s() - begin_s > config.episode_timeout_s

    is_expert = config.source == EXPERT
    with ended_by(session, "expert_node/stop") if is_expert else contextlib.nullcontext():
        if is_expert:
            session.expert_done = None
            start_expert(session)
        else:
            print("recording; mark success, failure or discard, or end the episode with Enter")
        session.wait(over, SLOWEST * config.episode_timeout_s, "the episode's end", session.check_arm, every_s=0.1)
        session.spin(config.settle_s)


def start_expert(session: Session) -> None:
    """On a busy machine the scripted person's node may be there before it has heard of the arm."""
    until_s = time.monotonic() + EXPERT_PATIENCE_S
    while True:
        try:
            session.call("expert_node/start")
            return
        except SessionError:
            session.check()
            if time.monotonic() > until_s:
                raise
        session.spin(0.2)


def summarise(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all attempts of a run; a gap is the time between two pictures of the row camera."""
    saved = [attempt for attempt in attempts if attempt["saved"]]
    seconds, wall_s = sum(a["duration_s"] for a in attempts), sum(a["wall_s"] for a in attempts)
    figures: dict[str, Any] = {
        "episodes": len(saved),
        "attempts": len(attempts),
        "successes": sum(a["success"] for a in attempts),
        "faults": sum(bool(a["fault"]) for a in attempts),
        "success_rate": sum(a["success"] for a in attempts) / len(attempts),
        "seconds": round(sum(a["rows"] / a["fps"] for a in saved), 3),
        "rtf": round(seconds / max(wall_s, 1e-3), 4),
    }
    if saved:
        figures |= {
            "frames": sum(a["rows"] for a in saved),
            "max_gap_ms": round(max(a["max_gap_ms"] for a in saved), 3),
            "gaps_over_50ms": sum(a["gaps_over_50ms"] for a in saved),
            "repeated_frames": sum(a["repeated"] for a in saved),
            "recorder_cpu_cores": round(sum(a["cpu_s"] for a in saved) / max(sum(a["wall_s"] for a in saved), 1e-3), 3),
        }
    return figures
