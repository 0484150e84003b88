"""LeRobotDataset v3 folders as batches for a policy.

Rows are read whole (they are small); videos are decoded once, at the policy's picture size, into a memory-mapped cache
named by the video file's own hash, so that later epochs and later runs cost a copy. LeRobot's reader seeks and decodes
for every item; a test holds that both give the same numbers.

A data set faster than the policy is composed: at 30 fps, three rows' motions make one action at 10 Hz, starting from
any row, so one recording serves three phases.

    data = DemoDataset(Path("runs/demo/data/stand_in"), embodiment, horizon=16, size=(96, 128), cache=Path("cache"))
    batch = data.batch(np.array([0, 17, 4]))
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from bridge import durable, pose
from bridge.dataset_schema import CODEBASE_VERSION, image_key
from bridge.embodiment import Embodiment
from bridge.video import decode_frames
from learner.policy import ObservationBatch, SftBatch
from learner.vision import area_resize, padded_pictures


@dataclass(frozen=True)
class Rows:
    """A data set's rows, as a policy uses them. N rows; actions at the policy's rate.

    step_action float32 [N, 7]: the action that starts at each row, over one policy period. step_known bool [N]: the
    episode lasts for all of it. goal_m float32 [N, 3]: TCP position at the next gripper event, NaN when none follows.
    """

    state: np.ndarray
    step_action: np.ndarray
    step_known: np.ndarray
    goal_m: np.ndarray
    gripper: np.ndarray  # float32 [N], commands
    task: np.ndarray  # int64 [N]
    episode_end: np.ndarray  # int64 [N], one past the last row of the row's episode


class DemoDataset:
    """One data set. Raises ValueError for what is no v3 data set and SchemaMismatch for another contract."""

    def __init__(
        self,
        root: Path,
        embodiment: Embodiment,
        horizon: int,
        size: tuple[int, int],
        cache: Path,
        hold_steps: int = 0,
        allow_contract_mismatch: list[str] | None = None,
        padded: bool = False,
    ):
        self.hold_steps = hold_steps
        self.root, self.embodiment, self.horizon = Path(root), embodiment, horizon
        self.size, self.padded = size, padded
        info = _read_info(self.root)
        contract = Embodiment.load(self.root / "meta/contract.json")
        embodiment.require_same(contract, f"data set {root}", allow_contract_mismatch)
        self.fps = info["fps"]
        if self.fps % embodiment.policy_rate_hz:
            raise ValueError(f"{root}: {self.fps} fps is no multiple of the policy rate {embodiment.policy_rate_hz} Hz")
        self.rows_per_step = round(self.fps / embodiment.policy_rate_hz)
        episodes = _read_table(self.root / "meta/episodes").sort_values("episode_index")
        self.instructions = pd.read_parquet(self.root / "meta/tasks.parquet").sort_values("task_index").index.tolist()
        self.rows = self._read_rows(episodes)
        self._pictures = {name: self._open_pictures(name, episodes, info, cache) for name in embodiment.cameras}

    def __len__(self) -> int:
        return len(self.rows.state)

    def batch(self, rows: np.ndarray) -> SftBatch:
        """Demonstrations that start at these rows (int64 [B])."""
        end = self.rows.episode_end[rows][:, None]
        steps = rows[:, None] + self.rows_per_step * np.arange(self.horizon)
        known = (steps < end) & self.rows.step_known[np.minimum(steps, end - 1)]
        # After the end the target is held, as the executor does when a chunk runs out.
        hold = np.zeros((len(rows), 1, 7), np.float32)
        hold[:, 0, 6] = self.rows.gripper[end[:, 0] - 1]
        actions = np.where(known[..., None], self.rows.step_action[np.minimum(steps, end - 1)], hold)
        is_pad = np.cumsum(~known, axis=1) > self.hold_steps
        images = {name: torch.from_numpy(pictures.take(rows)) for name, pictures in self._pictures.items()}
        instructions = [self.instructions[task] for task in self.rows.task[rows]]
        observation = ObservationBatch(images, torch.from_numpy(self.rows.state[rows]), instructions)
        goal_m = torch.from_numpy(self.rows.goal_m[rows])
        return SftBatch(observation, torch.from_numpy(actions), torch.from_numpy(is_pad), goal_m)

    def _read_rows(self, episodes: pd.DataFrame) -> Rows:
        columns = ["index", "observation.state", "action", "task_index"]
        table = _read_table(self.root / "data", columns).sort_values("index")
        if table["index"].tolist() != list(range(len(table))):
            raise ValueError(f"{self.root}: rows are missing or double; `index` must count from 0")
        state, action = np.stack(table["observation.state"]), np.stack(table["action"])
        step_action, step_known = np.zeros_like(action), np.zeros(len(table), bool)
        goal_m, episode_end = np.full((len(table), 3), np.nan, np.float32), np.zeros(len(table), np.int64)
        for first, end in zip(episodes["dataset_from_index"], episodes["dataset_to_index"], strict=True):
            composed = compose(action[first:end], self.rows_per_step)
            step_action[first : first + len(composed)] = composed
            step_known[first : first + len(composed)] = True
            goal_m[first:end] = next_gripper_event_m(state[first:end], action[first:end, 6])
            episode_end[first:end] = end
        task = table["task_index"].to_numpy()
        return Rows(state, step_action, step_known, goal_m, action[:, 6], task, episode_end)

    def _open_pictures(self, camera: str, episodes: pd.DataFrame, info: dict[str, Any], cache: Path) -> "Pictures":
        key = image_key(camera)
        place, files = f"videos/{key}", {}
        file_of_row, frame_of_row = np.zeros(len(self), np.int64), np.zeros(len(self), np.int64)
        opened: list[np.ndarray] = []
        for line in tqdm(episodes.to_dict("records"), desc=f"{self.root.name} {camera}", unit="episode", leave=False):
            numbers = {"chunk_index": line[f"{place}/chunk_index"], "file_index": line[f"{place}/file_index"]}
            path = self.root / info["video_path"].format(video_key=key, **numbers)
            if path not in files:
                files[path] = len(opened)
                opened.append(cached_frames(path, self.size, cache, self.padded))
            rows = slice(line["dataset_from_index"], line["dataset_to_index"])
            first_frame = round(line[f"{place}/from_timestamp"] * self.fps)
            file_of_row[rows] = files[path]
            frame_of_row[rows] = first_frame + np.arange(line["length"])
            if first_frame + line["length"] > len(opened[files[path]]):
                raise ValueError(f"{path} has {len(opened[files[path]])} frames, too few for episode {line}")
        return Pictures(opened, file_of_row, frame_of_row)


@dataclass(frozen=True)
class Pictures:
    """One camera's frames of a data set: memory-mapped files, and where each row's frame is."""

    files: list[np.ndarray]
    file_of_row: np.ndarray
    frame_of_row: np.ndarray

    def take(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3]."""
        return np.stack([self.files[self.file_of_row[row]][self.frame_of_row[row]] for row in rows])


def compose(action: np.ndarray, rows_per_step: int) -> np.ndarray:
    """Motions over `rows_per_step` consecutive rows: [n, 7] -> [n - rows_per_step + 1, 7], one for each first row."""
    if rows_per_step == 1:
        return action
    count = max(len(action) - rows_per_step + 1, 0)
    parts = [action[k : k + count] for k in range(rows_per_step)]
    return pose.compose(np.stack(parts, axis=1)).astype(np.float32)


def next_gripper_event_m(state: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """TCP position where the gripper command next changes sign, for each row of one episode; NaN when it never will.

    state [n, 7], gripper [n] commands in [-1, 1] -> float32 [n, 3].
    """
    closed = gripper < 0
    out = np.full((len(state), 3), np.nan, np.float32)
    start = 0
    for event in np.flatnonzero(closed[1:] != closed[:-1]) + 1:
        out[start:event] = state[event, :3]
        start = event
    return out


def cached_frames(path: Path, size: tuple[int, int], cache: Path, padded: bool = False) -> np.ndarray:
    """All frames of a video at `size` (height, width), uint8 [n, h, w, 3], memory-mapped. `padded`: undistorted."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    stored = Path(cache) / f"{durable.sha256(path)[:32]}_{size[0]}x{size[1]}{'_padded' * padded}.npy"
    if not stored.exists():
        resize = padded_pictures if padded else area_resize
        frames = [resize(frame[None], size) for frame in decode_frames(path)]
        durable.make_folder(stored.parent)
        unfinished = stored.with_suffix(f".{os.getpid()}.partial.npy")  # runs that begin together do this at a time
        np.save(unfinished, np.concatenate(frames))
        unfinished.replace(stored)
    return np.load(stored, mmap_mode="r")


@dataclass
class Part:
    """Data sets that are one side of a mixture, and their share of every batch."""

    name: str
    datasets: list[DemoDataset]
    share: float

    def __len__(self) -> int:
        return sum(map(len, self.datasets))


class Mixture:
    """Batches with fixed shares from parts (real and simulated), each walked in an order that is new in every epoch.

    The state is two kinds of counters; seed and counters alone decide the next batch. Where `ranks` train together,
    each has a mixture of its own that reads its rows of batches of `ranks * batch_size`.
    """

    def __init__(self, parts: list[Part], batch_size: int, seed: int, rank: int = 0, ranks: int = 1):
        self.parts = [part for part in parts if part.share > 0]
        if not self.parts or any(len(part) == 0 for part in self.parts):
            raise ValueError(f"no demonstrations in {[p.name for p in parts if len(p) == 0 or p.share <= 0]}")
        total = sum(part.share for part in self.parts)
        self.shares = [part.share / total for part in self.parts]
        self.batch_size, self.seed = batch_size * ranks, seed
        self.rank, self.ranks = rank, ranks
        self.batches = 0
        self.drawn = [0] * len(self.parts)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __next__(self) -> SftBatch:
        pieces, left = [], self.batch_size
        for index, part in enumerate(self.parts):
            count = left if index == len(self.parts) - 1 else self._count(self.shares[index])
            first = (self.rank - (self.batch_size - left)) % self.ranks  # of this rank's rows in this part's
            left -= count
            rows = np.array([self._draw(index) for _ in range(count)], np.int64)[first :: self.ranks]
            for dataset in part.datasets:
                mine = (rows >= 0) & (rows < len(dataset))
                if mine.any():
                    pieces.append(dataset.batch(rows[mine]))
                rows = np.where(rows < 0, rows, rows - len(dataset))
        self.batches += 1
        return concatenate(pieces)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "drawn": list(self.drawn), "sizes": [len(part) for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError when the data has changed since: the same counters would mean other rows."""
        if state["sizes"] != (sizes := [len(part) for part in self.parts]):
            raise ValueError(f"data sets had {state['sizes']} rows when training stopped and have {sizes} now")
        self.batches, self.drawn = state["batches"], list(state["drawn"])

    def _count(self, share: float) -> int:
        """Rows of this batch, so that the running total never strays from the share by a whole row."""
        per_batch = share * self.batch_size
        return int((self.batches + 1) * per_batch + 1e-9) - int(self.batches * per_batch + 1e-9)

    def _draw(self, part: int) -> int:
        epoch, position = divmod(self.drawn[part], len(self.parts[part]))
        self.drawn[part] += 1
        if (part, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != part}
            order = np.random.default_rng([self.seed, part, epoch]).permutation(len(self.parts[part]))
            self._orders[part, epoch] = order
        return int(self._orders[part, epoch][position])


def concatenate(batches: list[SftBatch]) -> SftBatch:
    observations = [batch.observation for batch in batches]
    images = {name: torch.cat([o.images[name] for o in observations]) for name in observations[0].images}
    observation = ObservationBatch(
        images, torch.cat([o.state for o in observations]), [text for o in observations for text in o.instruction]
    )
    actions, is_pad = torch.cat([b.actions for b in batches]), torch.cat([b.is_pad for b in batches])
    return SftBatch(observation, actions, is_pad, torch.cat([b.goal_m for b in batches if b.goal_m is not None]))


@dataclass
class DataConfig:
    """Where demonstrations are and how they mix."""

    sim: list[str] = field(default_factory=list)  # data set folders from the twin
    real: list[str] = field(default_factory=list)  # from the robot (or its stand-in)
    alpha: float = 0.6  # share of `sim` in every batch, where both exist: L = alpha L_sim + (1 - alpha) L_real
    hold_steps: int = 4  # policy steps after an episode's end that teach to hold; the rest of a chunk is masked
    cache: str = ""  # decoded pictures; empty: beside the data sets
    allow_contract_mismatch: list[str] = field(default_factory=list)

    def __post_init__(self):
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha {self.alpha}: allowed are 0 to 1")


def open_parts(
    config: DataConfig, embodiment: Embodiment, horizon: int, size: tuple[int, int], padded: bool = False
) -> list[Part]:
    """The sides of the mixture that have data, pictures at `size` (height, width; `padded`: undistorted). ValueError
    when there is none at all."""
    if not config.sim and not config.real:
        raise ValueError("no demonstrations: name data set folders in data.sim or data.real")
    parts = []
    for name, folders, share in (("sim", config.sim, config.alpha), ("real", config.real, 1 - config.alpha)):
        datasets = [
            DemoDataset(
                Path(folder),
                embodiment,
                horizon,
                size,
                Path(config.cache or Path(folder).parent / "cache"),
                config.hold_steps,
                config.allow_contract_mismatch,
                padded,
            )
            for folder in folders
        ]
        if datasets:
            parts.append(Part(name, datasets, share if config.sim and config.real else 1.0))
    return parts


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    if not path.is_file():
        raise ValueError(f"{root} is no LeRobot data set: {path} is missing")
    info = json.loads(path.read_text())
    if info.get("codebase_version") != CODEBASE_VERSION:
        raise ValueError(f"{root} has format {info.get('codebase_version')!r}, expected {CODEBASE_VERSION!r}")
    return info


def _read_table(folder: Path, columns: list[str] | None = None) -> pd.DataFrame:
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no Parquet file: no finished episode")
    if columns is None:
        columns = [name for name in pq.read_schema(files[0]).names if not name.startswith("stats/")]
    return pd.concat([pq.read_table(file, columns=columns).to_pandas() for file in files], ignore_index=True)
