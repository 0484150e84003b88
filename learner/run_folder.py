"""Reading a run's folder (docs/architecture.md, "A run's folder"): stages, trials, curves."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Stage:
    """What one stage measured. `figures` are plain numbers or strings; `files` are paths relative to the run."""

    stage: str
    wall_s: float
    figures: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    folder: Path
    stages: dict[str, Stage]
    trials: dict[str, list[dict[str, Any]]]  # label -> one dict a trial
    curves: dict[str, list[tuple[int, float]]]  # TensorBoard tag -> (step, value)

    def figure(self, stage: str, name: str, default: Any = None) -> Any:
        return self.stages[stage].figures.get(name, default) if stage in self.stages else default


def load_run(folder: Path) -> Run:
    """Raises ValueError when there is no such run or a stage file is damaged (the file is named)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no run folder; `cotwin demo` makes one")
    stages = {}
    for path in sorted((folder / "stages").glob("*.json"), key=lambda p: p.stat().st_mtime_ns):
        try:
            stage = Stage(**json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is not a stage file: {error}") from error
        stages[path.stem] = stage
    trials = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        for path in sorted((folder / "eval").glob("*.jsonl"))
    }
    return Run(folder, stages, trials, read_curves(folder / "tensorboard"))


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars below a TensorBoard folder; a tag that several runs wrote becomes `<run>/<tag>` for each."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, list[tuple[int, float]]] = {}
    for directory in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
        name = str(directory.relative_to(folder))
        for tag in events.Tags()["scalars"]:
            points = [(event.step, event.value) for event in events.Scalars(tag)]
            curves[tag if name == "." else f"{name}:{tag}"] = points
    return curves
