"""Small pictures and few rows for tests of whatever records, carries or reads episodes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bridge import durable
from bridge.embodiment import Camera, Embodiment
from bridge.episode import EpisodeWriter

FPS = 30
HEIGHT, WIDTH = 48, 64


def small_embodiment(**changes) -> Embodiment:
    cameras = {name: Camera(width=WIDTH, height=HEIGHT) for name in ("third_person", "wrist")}
    return Embodiment(**{"cameras": cameras, "instructions": ["pick up the cube"], **changes})


def picture(k: int, camera: str) -> np.ndarray:
    """A smooth ramp whose brightness tells row and camera apart."""
    ramp = np.linspace(0, 60, WIDTH)[None, :, None] + np.zeros((HEIGHT, 1, 3))
    return np.uint8((ramp + 7 * k + (90 if camera == "wrist" else 0)) % 250)


def small_row(k: int, rng: np.random.Generator) -> dict:
    action = rng.uniform(-0.03, 0.03, 7).astype(np.float32)
    return {
        "observation.state": rng.normal(size=7),
        "action": action,
        "requested_action": 2 * action,
        "capture_stamp_ns": 5_000_000_000 + k * 33_333_333,
    }


def write_episode(
    folder: Path,
    num_rows: int = 8,
    seed: int = 0,
    embodiment: Embodiment | None = None,
    success: bool = True,
    instruction: str = "pick up the cube",
    domain: str = "stand_in",
    **options,
) -> Path:
    embodiment, rng = embodiment or small_embodiment(), np.random.default_rng(seed)
    writer = EpisodeWriter(folder, embodiment, options.pop("fps", FPS), instruction, domain, **options)
    for k in range(num_rows):
        writer.add({name: picture(k, name) for name in embodiment.cameras}, small_row(k, rng))
    return writer.close(success)


def reseal(folder: Path, **changes: Any) -> None:
    """An `episode.json` that fits whatever was done to the rows, with other fields of it changed."""
    record = json.loads((folder / "episode.json").read_text())
    record["files"]["rows.parquet"] = durable.sha256(folder / "rows.parquet")
    (folder / "episode.json").write_text(json.dumps(record | changes))


def spoil_rows(folder: Path) -> None:
    """One number that is none, and an `episode.json` that vouches for it."""
    table = pq.read_table(folder / "rows.parquet")
    numbers = table["next.reward"].to_numpy().copy()
    numbers[1] = np.nan
    at = table.column_names.index("next.reward")
    pq.write_table(table.set_column(at, "next.reward", pa.array(numbers)), folder / "rows.parquet")
    reseal(folder)
