"""What stages leave in a run's folder: JSON lines while they go on, one stage file when they end
(docs/architecture.md, "A run's folder")."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge import durable
from bridge.checkpoint import latest_bundle


@dataclass
class RunConfig:
    """Keys of every stage: the run that it belongs to, a folder below `runs_dir`."""

    name: str = "demo"
    runs_dir: str = "runs"

    @property
    def run(self) -> Path:
        return Path(self.runs_dir) / self.name

    def bundle(self, checkpoint: str) -> Path:
        """The bundle folder `checkpoint`; empty: the run's newest. Raises ValueError where there is none."""
        folder = Path(checkpoint) if checkpoint else latest_bundle(self.run / "checkpoints")
        if folder is None:
            raise ValueError(f"{self.run / 'checkpoints'} holds no bundle to start from; run `cotwin sft` first")
        return folder


def write_stage(
    run: Path, stage: str, wall_s: float, figures: dict[str, Any], files: dict[str, Path] | None = None
) -> Path:
    """`<run>/stages/<stage>.json`. `figures` are numbers or strings; `files` lie in the run's folder and are stored
    relative to it. A stage file exists only whole, and so says that its stage has ended."""
    relative = {name: str(path.resolve().relative_to(run.resolve())) for name, path in (files or {}).items()}
    path = run / "stages" / f"{stage}.json"
    durable.make_folder(path.parent)
    content = {"stage": stage, "wall_s": round(wall_s, 3), "figures": figures, "files": relative}
    durable.write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines, none where there is no file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]


def append_line(path: Path, entry: dict[str, Any]) -> None:
    """One JSON line, on the disk when this returns. A last line that was cut short goes."""
    durable.make_folder(path.parent)
    text = path.read_bytes() if path.exists() else b""
    if not text.endswith(b"\n") and text:
        os.truncate(path, text.rfind(b"\n") + 1)
    with open(path, "a") as file:
        file.write(json.dumps(entry, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
