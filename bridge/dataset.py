"""A LeRobotDataset v3 that is whole at every moment, written without LeRobot.

One Parquet file, one MP4 for each camera and one line of the episode table for each episode; nothing is appended to.
Order of an append: videos, rows, record, task list, **episode table file** (from here on the episode exists),
statistics, `info.json`. What a killed process left before that point is removed by the next `open`, what it left after
it is completed. A reader trusts `info.json`, written last and in one step, so it never sees half an episode.

    store = DatasetStore.open_or_create(root, "lab/cube_on_plate", embodiment, fps=30)
    writer = EpisodeWriter(spool / "0001", embodiment, 30, "pick up the cube", domain="real")
    writer.add(images, row); ...; store.append(writer.close(success=True))
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bridge import durable
from bridge.dataset_layout import (
    CARD,
    CHUNK,
    CONTRACT,
    INFO,
    RECORDS,
    STATS,
    TASKS,
    data_file,
    episode_file,
    file_name,
    new_info,
)
from bridge.dataset_schema import DOMAINS, features, image_key
from bridge.embodiment import Embodiment
from bridge.episode import (
    ROWS_FILE,
    EpisodeRecord,
    EpisodeWriter,
    check_fps,
    from_table,
    read_record,
    row_features,
    to_table,
    verify_files,
)
from bridge.errors import CorruptData, SchemaMismatch
from bridge.statistics import column_stats, pixel_stats
from bridge.video import decode_frames

__all__ = ["DatasetStore", "EpisodeWriter", "decode_frames", "read_episode", "video_path"]

# What reading a stranger's record and rows may raise, besides what names itself.
_UNSOUND = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, pa.ArrowException)


def read_episode(root: Path, index: int) -> dict[str, np.ndarray]:
    """All rows of one episode: [N] for scalars, [N, D] for vectors. IndexError when there is no such episode."""
    path = root / data_file(index)
    if index < 0 or not path.is_file():
        raise IndexError(f"{root} has no episode {index}")
    return from_table(pq.read_table(path))


def video_path(root: Path, camera: str, index: int) -> Path:
    """The MP4 of one camera of one episode; frame k belongs to row k."""
    return root / "videos" / image_key(camera) / (file_name(index) + ".mp4")


class DatasetStore:
    """Use `create`, `open` or `open_or_create`. Several processes may hold the same data set: every append takes a
    file lock and first reads what others added. Not for several threads at once."""

    def __init__(self, root: Path, embodiment: Embodiment, info: dict[str, Any]):
        self.root, self.embodiment, self._info = root, embodiment, info
        self._episodes: list[dict[str, Any]] = []  # our lines of the episode table
        self._columns: dict[str, list[np.ndarray]] = {}  # every episode's rows, read when first needed
        self._histograms: dict[str, np.ndarray] = {}

    @classmethod
    def create(
        cls,
        root: Path,
        repo_id: str,
        embodiment: Embodiment,
        fps: int,
        image_size: tuple[int, int] | None = None,
    ) -> "DatasetStore":
        """An empty data set. `image_size` (height, width) where pictures are smaller than the cameras' own.
        ValueError when `root` already holds one or `fps` does not fit the contract."""
        if (root / INFO).exists():
            raise ValueError(f"{root} already holds a data set; open it or choose another folder")
        check_fps(fps, embodiment)
        durable.make_folder(root / RECORDS)
        durable.write_text(root / "README.md", CARD.format(repo_id=repo_id, robot=embodiment.name))
        durable.write_text(root / CONTRACT, _json(embodiment.to_dict()))
        durable.write_text(root / INFO, _json(new_info(embodiment, fps, image_size)))
        return cls.open(root, embodiment)

    @classmethod
    def open(cls, root: Path, embodiment: Embodiment | None = None, repair: bool = True) -> "DatasetStore":
        """Open and repair what a killed process left; `repair=False` only reads. ValueError when there is no data set;
        SchemaMismatch, naming the field, when it was made for another contract than `embodiment`."""
        if not (root / INFO).is_file() or not (root / CONTRACT).is_file():
            raise ValueError(f"{root} is no data set ({INFO} or {CONTRACT} is missing)")
        theirs = Embodiment.load(root / CONTRACT)
        if embodiment is not None:
            embodiment.require_same(theirs, f"data set {root}")
        store = cls(root, theirs, json.loads((root / INFO).read_text()))
        if not repair:
            store._read_new_episodes()
            return store
        with store._locked():
            store._repair()
        return store

    @classmethod
    def open_or_create(
        cls,
        root: Path,
        repo_id: str,
        embodiment: Embodiment,
        fps: int,
        image_size: tuple[int, int] | None = None,
    ) -> "DatasetStore":
        """`open`, or `create` where there is none. SchemaMismatch also for another fps or picture size."""
        if not (root / INFO).exists():
            return cls.create(root, repo_id, embodiment, fps, image_size)
        store = cls.open(root, embodiment)
        store._require_fits(fps, image_size, f"the recording for {root}")
        return store

    @property
    def fps(self) -> int:
        return self._info["fps"]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of all pictures; None where they have the cameras' own."""
        own = features(self.embodiment)
        sizes = {key: f["shape"] for key, f in self._info["features"].items() if f["dtype"] == "video"}
        height, width, _ = next(iter(sizes.values()))
        return (height, width) if any(list(own[key]["shape"]) != list(size) for key, size in sizes.items()) else None

    @property
    def num_episodes(self) -> int:
        return len(self._episodes)

    @property
    def num_frames(self) -> int:
        return self._episodes[-1]["dataset_to_index"] if self._episodes else 0

    @property
    def tasks(self) -> list[str]:
        """Instructions in the order of their task index."""
        return list(dict.fromkeys(task for episode in self._episodes for task in episode["tasks"]))

    def uuids(self) -> set[str]:
        return {episode["uuid"] for episode in self._episodes}

    def episodes(self) -> list[dict[str, Any]]:
        """For each episode: episode_index, uuid, length, tasks, domain, success, dataset_from_index, ..."""
        return [dict(episode) for episode in self._episodes]

    def summary(self) -> dict[str, Any]:
        domains = [episode["domain"] for episode in self._episodes]
        return {
            "episodes": self.num_episodes,
            "successes": sum(episode["success"] for episode in self._episodes),
            "frames": self.num_frames,
            "seconds": self.num_frames / self.fps,
            "fps": self.fps,
            "domains": {domain: domains.count(domain) for domain in sorted(set(domains))},
            "tasks": self.tasks,
            "contract_hash": self.embodiment.contract_hash,
        }

    def record(self, index: int) -> EpisodeRecord:
        """Raises CorruptData when it is missing or damaged."""
        return read_record(self.root / RECORDS, self._record_path(index).name)

    def append(self, folder: Path, summarise: bool = True) -> int:
        """Store one finished episode folder (which stays) and return its index; durable when this returns.

        An episode that is already here (by uuid) is not stored again. Who appends many leaves `summarise` for the last:
        until then readers see none of them. Raises SchemaMismatch, naming the field, for
        another contract, fps or picture size, and CorruptData for a damaged folder.
        """
        record = read_record(folder)
        with self._locked():
            self._read_new_episodes()
            for episode in self._episodes:
                if episode["uuid"] == record.uuid:
                    return episode["episode_index"]
            line, rows = self._store_files(folder, record, self._checked_rows(folder, record))
            _write_table(self.root / episode_file(self.num_episodes), pa.Table.from_pylist([line]))
            self._remember(line, rows, record)
            if summarise:
                self._write_summaries()
        return line["episode_index"]

    def summarise(self) -> None:
        """Show readers what was appended without `summarise`."""
        with self._locked():
            self._read_new_episodes()
            self._write_summaries()

    # --- writing -------------------------------------------------------------------------------------------------

    def _checked_rows(self, folder: Path, record: EpisodeRecord) -> dict[str, np.ndarray]:
        """All that storing and statistics need: with its line in the episode table an episode is past refusing."""
        try:
            self.embodiment.require_same(record.embodiment, f"episode {folder}")
            self._require_fits(record.fps, record.image_size, f"episode {folder}")
            verify_files(folder, record)
            return self._rows_of(record, (folder / ROWS_FILE).read_bytes())
        except _UNSOUND as error:
            raise CorruptData(f"{folder} cannot be stored: {error}") from error

    def _rows_of(self, record: EpisodeRecord, parquet: bytes) -> dict[str, np.ndarray]:
        """Raises one of _UNSOUND for what `_store_files` and `_write_summaries` could not take."""
        try:
            table = pq.read_table(pa.BufferReader(parquet))
        except OSError as error:  # Arrow's for bytes that are no Parquet, not the disk's
            raise ValueError(f"{ROWS_FILE}: {error}") from error
        columns, num_rows = row_features(self.embodiment), record.num_rows
        if type(num_rows) is not int or not 0 < num_rows == len(table) or set(table.column_names) != set(columns):
            raise ValueError(f"{len(table)} rows of {sorted(table.column_names)}; {num_rows!r:.40} are recorded")
        rows = from_table(to_table(from_table(table), columns))
        if not all(np.isfinite(values).all() for values in rows.values()):
            raise ValueError("rows with numbers that are not finite")
        counts = {name: np.array(histogram, np.int64) for name, histogram in record.pixel_histograms.items()}
        if set(counts) != set(self.embodiment.cameras) or not all(_are_counts(c) for c in counts.values()):
            raise ValueError("pixel_histograms: expected counts [3, 256] of every camera")
        if record.domain not in DOMAINS or type(record.success) is not bool:
            raise ValueError(f"domain {record.domain!r:.40}, success {record.success!r:.40}")
        record.instruction.encode()  # text, without half of a surrogate pair
        record.to_json()  # without NaN
        return rows

    def _require_fits(self, fps: int, image_size: Any, what: str) -> None:
        if fps != self.fps:
            raise SchemaMismatch(f"{what} has fps {fps}, data set {self.root} has fps {self.fps}")
        ours = {key: list(f["shape"]) for key, f in self._info["features"].items() if f["dtype"] == "video"}
        theirs = {key: list(f["shape"]) for key, f in features(self.embodiment, image_size).items() if key in ours}
        for key, shape in theirs.items():
            if shape != ours[key]:
                raise SchemaMismatch(f"{what} has {key} of shape {shape}, data set {self.root} has {ours[key]}")

    def _store_files(
        self, folder: Path, record: EpisodeRecord, rows: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Put videos, rows, record and task in place; returns the episode's line and its rows."""
        index = self.num_episodes
        for camera in self.embodiment.cameras:
            target = video_path(self.root, camera, index)
            durable.make_folder(target.parent)
            durable.place(folder / f"{camera}.mp4", target)
        rows = self._with_indices(rows, record)
        columns = {key: f for key, f in self._info["features"].items() if f["dtype"] != "video"}
        _write_table(self.root / data_file(index), to_table(rows, columns))
        durable.write_text(self._record_path(index), record.to_json())
        if record.instruction not in self.tasks:
            _write_tasks(self.root / TASKS, [*self.tasks, record.instruction])
        return self._line(record, rows), rows

    def _with_indices(self, rows: dict[str, np.ndarray], record: EpisodeRecord) -> dict[str, np.ndarray]:
        frame_index = np.arange(record.num_rows)
        tasks = [*self.tasks, record.instruction]
        return rows | {
            "timestamp": (frame_index / self.fps).astype(np.float32),
            "frame_index": frame_index,
            "episode_index": np.full(record.num_rows, self.num_episodes),
            "index": self.num_frames + frame_index,
            "task_index": np.full(record.num_rows, tasks.index(record.instruction)),
        }

    def _line(self, record: EpisodeRecord, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        """The episode table's line: what LeRobot reads, its statistics, and who, where and how it ended."""
        chunk, file = divmod(self.num_episodes, CHUNK)
        line: dict[str, Any] = {
            "episode_index": self.num_episodes,
            "tasks": [record.instruction],
            "length": record.num_rows,
            "dataset_from_index": self.num_frames,
            "dataset_to_index": self.num_frames + record.num_rows,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "meta/episodes/chunk_index": chunk,
            "meta/episodes/file_index": file,
            "uuid": record.uuid,
            "domain": record.domain,
            "success": record.success,
        }
        for camera in self.embodiment.cameras:
            place = f"videos/{image_key(camera)}"
            line |= {f"{place}/chunk_index": chunk, f"{place}/file_index": file}
            line |= {f"{place}/from_timestamp": 0.0, f"{place}/to_timestamp": record.duration_s}
        stats = {key: column_stats(values) for key, values in rows.items()}
        for camera, histogram in record.pixel_histograms.items():
            stats[image_key(camera)] = pixel_stats(np.array(histogram), record.num_rows)
        return line | {f"stats/{key}/{name}": v.tolist() for key, s in stats.items() for name, v in s.items()}

    def _remember(self, line: dict[str, Any], rows: dict[str, np.ndarray], record: EpisodeRecord) -> None:
        if len(self._columns.get("index", [])) == self.num_episodes:  # else they are read when statistics need them
            for key, values in rows.items():
                self._columns.setdefault(key, []).append(values)
            self._add_histograms(record)
        self._episodes.append({key: value for key, value in line.items() if not key.startswith("stats/")})

    def _add_histograms(self, record: EpisodeRecord) -> None:
        for camera, counts in record.pixel_histograms.items():
            self._histograms[camera] = self._histograms.get(camera, 0) + np.array(counts)

    def _write_summaries(self) -> None:
        """`stats.json` over all rows, then `info.json`, which makes the new episodes visible to readers."""
        for index in range(len(self._columns.get("index", [])), self.num_episodes):
            for key, values in read_episode(self.root, index).items():
                self._columns.setdefault(key, []).append(values)
            self._add_histograms(self.record(index))
        if self._episodes:
            stats = {key: column_stats(np.concatenate(parts)) for key, parts in self._columns.items()}
            for camera, histogram in self._histograms.items():
                stats[image_key(camera)] = pixel_stats(histogram, self.num_frames)
            plain = {key: {name: value.tolist() for name, value in s.items()} for key, s in stats.items()}
            durable.write_text(self.root / STATS, _json(plain))
        counts = {"total_episodes": self.num_episodes, "total_frames": self.num_frames, "total_tasks": len(self.tasks)}
        self._info |= counts | {"splits": {"train": f"0:{self.num_episodes}"}}
        durable.write_text(self.root / INFO, _json(self._info))

    # --- opening -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.root / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also by a kill
            yield

    def _read_new_episodes(self) -> None:
        while (path := self.root / episode_file(self.num_episodes)).is_file():
            names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            (line,) = pq.read_table(path, columns=names).to_pylist()
            if line["episode_index"] != self.num_episodes or line["dataset_from_index"] != self.num_frames:
                raise CorruptData(f"{path} does not follow episode {self.num_episodes - 1}")
            self._episodes.append(line)

    def _repair(self) -> None:
        self._read_new_episodes()
        for path in self.root.rglob("*" + durable.UNFINISHED):
            path.unlink()
        orphan = self.num_episodes  # an append that did not reach the episode table is at most one
        leftovers = [video_path(self.root, camera, orphan) for camera in self.embodiment.cameras]
        for path in [*leftovers, self.root / data_file(orphan), self._record_path(orphan)]:
            path.unlink(missing_ok=True)
        if self._info["total_episodes"] != self.num_episodes:
            self._write_summaries()

    def _record_path(self, index: int) -> Path:
        return self.root / RECORDS / f"episode-{index:06d}.json"


def _are_counts(counts: np.ndarray) -> bool:
    return counts.shape == (3, 256) and counts.min() >= 0 and counts.max() < 2**40 and bool(counts.any(1).all())


def _json(value: Any) -> str:
    return json.dumps(value, indent=4, allow_nan=False) + "\n"


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    durable.make_folder(path.parent)
    durable.write_bytes(path, sink.getvalue().to_pybytes())


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """LeRobot reads the instruction from the index of a pandas frame."""
    import pandas as pd

    frame = pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(tasks, name="task"))
    durable.write_bytes(path, frame.to_parquet())
