"""One recorded episode as a folder that can be carried, checked and put into a data set.

    rows.parquet          one row a picture: the features of `bridge.dataset_schema` without the videos
    <camera>.mp4          one frame a row
    episode.json          the `EpisodeRecord`: who, what, how long, which contract, SHA-256 of the other files

The writer fills `<folder>.partial` and renames it to `<folder>` at the end, so a folder without that ending is whole.
Until then every row is also in `rows.journal`, from which `bridge.episode_rewrite` recovers what a killed writer left.
"""

import dataclasses
import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bridge import durable
from bridge.dataset_schema import DOMAINS, features
from bridge.embodiment import Embodiment
from bridge.errors import CorruptData
from bridge.video import VideoWriter

PARTIAL = ".partial"
ROWS_FILE, RECORD_FILE = "rows.parquet", "episode.json"
JOURNAL, BEGUN = "rows.journal", "begun.json"  # until the episode is finished
# Only the writer knows where an episode ends and how, so it fills these itself.
DERIVED = ("next.reward", "next.success", "next.done")
OPTIONAL = ("frame_repeated", "intervention")
_NUMPY = {"float32": np.float32, "int64": np.int64, "bool": np.bool_}
_ARROW = {"float32": pa.float32(), "int64": pa.int64(), "bool": pa.bool_()}


@dataclass
class EpisodeRecord:
    """What `episode.json` holds. `image_size` is (height, width) where it differs from the cameras' own;
    `pixel_histograms` are counts [3, 256] for each camera; `files` maps file names to SHA-256."""

    uuid: str
    num_rows: int
    fps: int
    instruction: str
    domain: str
    success: bool
    contract_hash: str
    contract: dict[str, Any]
    image_size: list[int] | None
    pixel_histograms: dict[str, list[list[int]]]
    files: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        return self.num_rows / self.fps

    @property
    def embodiment(self) -> Embodiment:
        return Embodiment.from_dict(self.contract)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"


class EpisodeWriter:
    """Writes one episode while it happens: pictures are encoded in one thread a camera, rows are kept in memory.

    folder: the finished episode's place; must not exist. image_size: (height, width) of all pictures, where they are
    smaller than the cameras' own (twins). queue_frames: how many pictures a camera's encoder may be behind before `add`
    waits. Raises ValueError for an unknown domain, an empty instruction, an fps that
    does not fit the contract, or a taken folder.
    """

    def __init__(
        self,
        folder: Path,
        embodiment: Embodiment,
        fps: int,
        instruction: str,
        domain: str,
        image_size: tuple[int, int] | None = None,
        queue_frames: int = 30,
    ):
        if domain not in DOMAINS:
            raise ValueError(f"domain {domain!r}: allowed are {DOMAINS}")
        if not instruction.strip():
            raise ValueError("an episode needs an instruction: the policy is conditioned on it")
        if folder.exists():
            raise ValueError(f"{folder} exists; every episode has a folder of its own")
        check_fps(fps, embodiment)
        self.folder, self.embodiment, self.fps = folder, embodiment, fps
        self.instruction, self.domain, self.image_size = instruction, domain, image_size
        self.uuid = uuid.uuid4().hex
        self._partial = folder.with_name(folder.name + PARTIAL)
        shutil.rmtree(self._partial, ignore_errors=True)
        durable.make_folder(self._partial)
        self._columns = row_features(embodiment)
        self._rows: dict[str, list[np.ndarray]] = {key: [] for key in self._columns if key not in DERIVED}
        self._videos = {
            name: VideoWriter(
                self._partial / f"{name}.mp4", fps, image_size or (camera.height, camera.width), queue_frames
            )
            for name, camera in embodiment.cameras.items()
        }
        about: dict[str, Any] = {"uuid": self.uuid, "fps": fps, "instruction": instruction, "domain": domain}
        begun = about | {"contract": embodiment.to_dict(), "image_size": image_size}
        durable.write_text(self._partial / BEGUN, json.dumps(begun))
        self._journal = open(self._partial / JOURNAL, "wb", buffering=0)  # noqa: SIM115, until close or discard

    @property
    def num_rows(self) -> int:
        return len(self._rows["action"])

    @property
    def backlog(self) -> int:
        """Pictures that wait for the slowest camera's encoder."""
        return max((video.backlog for video in self._videos.values()), default=0)

    def add(self, images: dict[str, np.ndarray], row: dict[str, Any]) -> None:
        """One row and one picture (uint8 [H, W, 3], not written to afterwards) for each camera.

        `row` has every feature but videos, timestamp and index columns, and `next.*`, which follow from `close`;
        `frame_repeated` and `intervention` default to False. Waits when an encoder is behind. Raises ValueError for
        wrong keys, shapes, non-finite numbers, and a `capture_stamp_ns` that does not grow.
        """
        if set(images) != set(self._videos):
            raise ValueError(f"images of {sorted(images)}, expected {sorted(self._videos)}")
        values = self._checked({**dict.fromkeys(OPTIONAL, False), **row})
        for name, frame in images.items():
            self._videos[name].add(frame)
        for key, value in values.items():
            self._rows[key].append(value)
        self._journal.write(b"".join(values[key].tobytes() for key in self._rows))

    def close(self, success: bool, extra: dict[str, Any] | None = None) -> Path:
        """Finish, sync and move the episode to `folder`. Raises ValueError when it has no rows, RuntimeError when a
        video does not hold one frame a row (the partial folder is left for inspection)."""
        if self.num_rows == 0:
            self.discard()
            raise ValueError("an episode without rows cannot be saved: no picture arrived between start and save")
        for video in self._videos.values():
            video.close()
        pq.write_table(self._table(success), self._partial / ROWS_FILE)
        names = [ROWS_FILE, *(f"{name}.mp4" for name in self._videos)]
        for name in names:
            durable.sync(self._partial / name)
        record = EpisodeRecord(
            uuid=self.uuid,
            num_rows=self.num_rows,
            fps=self.fps,
            instruction=self.instruction,
            domain=self.domain,
            success=bool(success),
            contract_hash=self.embodiment.contract_hash,
            contract=self.embodiment.to_dict(),
            image_size=list(self.image_size) if self.image_size else None,
            pixel_histograms={name: video.histogram.tolist() for name, video in self._videos.items()},
            files={name: durable.sha256(self._partial / name) for name in names},
            extra=extra or {},
        )
        durable.write_text(self._partial / RECORD_FILE, record.to_json())
        self._journal.close()
        os.rename(self._partial, self.folder)
        durable.sync(self.folder.parent)
        for name in (JOURNAL, BEGUN):  # only now: a partial folder without them is removed, not set aside
            (self.folder / name).unlink()
        return self.folder

    def discard(self) -> None:
        """Throw the episode away."""
        for video in self._videos.values():
            video.abort()
        self._journal.close()
        shutil.rmtree(self._partial)

    def _checked(self, row: dict[str, Any]) -> dict[str, np.ndarray]:
        if set(row) != set(self._rows):
            missing, unknown = sorted(set(self._rows) - set(row)), sorted(set(row) - set(self._rows))
            raise ValueError(f"row lacks {missing} and has unknown {unknown}; {DERIVED} follow from close(success)")
        values = {}
        for key, value in row.items():
            feature = self._columns[key]
            array = np.asarray(value, dtype=_NUMPY[feature["dtype"]])
            array = array.reshape(1) if array.ndim == 0 else array
            if array.shape != feature["shape"]:
                raise ValueError(f"{key} has shape {array.shape}, expected {feature['shape']}")
            if not np.isfinite(array).all():
                raise ValueError(f"{key} is not finite: {array.tolist()}")
            values[key] = array.copy()
        stamp, stamps = values["capture_stamp_ns"], self._rows["capture_stamp_ns"]
        if stamps and stamp <= stamps[-1]:
            raise ValueError(f"capture_stamp_ns {int(stamp[0])} does not follow {int(stamps[-1][0])}")
        return values

    def _table(self, success: bool) -> pa.Table:
        last = np.arange(self.num_rows) == self.num_rows - 1
        columns = {key: np.stack(values) for key, values in self._rows.items()}
        columns["next.done"] = last
        columns["next.success"] = last & success
        columns["next.reward"] = columns["next.success"].astype(np.float32)
        return to_table(columns, self._columns)


def journal_type(embodiment: Embodiment) -> np.dtype:
    """One row of the journal."""
    columns = row_features(embodiment)
    return np.dtype([(key, _NUMPY[f["dtype"]], f["shape"]) for key, f in columns.items() if key not in DERIVED])


def row_features(embodiment: Embodiment) -> dict[str, dict[str, Any]]:
    return {key: feature for key, feature in features(embodiment).items() if feature["dtype"] != "video"}


def check_fps(fps: int, embodiment: Embodiment) -> None:
    """Rows compose into policy steps only when a step is a whole number of rows."""
    steps = fps / embodiment.policy_rate_hz
    if fps != int(fps) or steps < 1 or abs(steps - round(steps)) > 1e-9:
        raise ValueError(
            f"fps {fps}: must be a whole multiple of the contract's policy_rate_hz {embodiment.policy_rate_hz}"
        )


def to_table(columns: dict[str, np.ndarray], column_features: dict[str, dict[str, Any]]) -> pa.Table:
    """Arrays [N], [N, 1] or [N, D] to Arrow, typed and ordered as the features say."""
    arrays, fields = [], []
    for key, feature in column_features.items():
        kind, width = _ARROW[feature["dtype"]], feature["shape"][0]
        flat = pa.array(np.ascontiguousarray(columns[key]).ravel(), kind)
        arrays.append(flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width))
        fields.append(pa.field(key, arrays[-1].type))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def from_table(table: pa.Table) -> dict[str, np.ndarray]:
    """Inverse of `to_table`: [N] for scalars, [N, D] for vectors."""
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            columns[name] = column.flatten().to_numpy().reshape(-1, column.type.list_size)
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns


def read_record(folder: Path, name: str = RECORD_FILE) -> EpisodeRecord:
    """Raises CorruptData (naming the folder) when `episode.json` is missing or damaged."""
    try:
        record = EpisodeRecord(**json.loads((folder / name).read_text()))
        assert record.embodiment  # the contract is read, and refused here when it is none
        return record
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptData(f"{folder} is no finished episode: {error}") from error


def verify_files(folder: Path, record: EpisodeRecord) -> None:
    """Raises CorruptData when a file of the episode is missing or is not what was recorded."""
    expected = {ROWS_FILE, *(f"{name}.mp4" for name in record.embodiment.cameras)}
    if set(record.files) != expected:
        raise CorruptData(f"{folder} lists files {sorted(record.files)}, expected {sorted(expected)}")
    for name, digest in record.files.items():
        path = folder / name
        if not path.is_file() or durable.sha256(path) != digest:
            raise CorruptData(f"{path} is missing or not what was recorded (SHA-256 differs)")


def finished_episodes(folder: Path) -> list[Path]:
    """Finished episode folders in `folder`, oldest first by name."""
    return sorted(path.parent for path in folder.glob(f"*/{RECORD_FILE}") if path.parent.suffix != PARTIAL)


def remove_episode(folder: Path) -> None:
    """Delete an episode that lies safe elsewhere; a kill on the way leaves only what `remove_unfinished` removes."""
    (folder / BEGUN).unlink(missing_ok=True)  # of a kill in `close`; it would be set aside
    partial = folder.with_name(folder.name + PARTIAL)
    os.rename(folder, partial)
    shutil.rmtree(partial)


def set_aside_unfinished(folder: Path, place: Path) -> list[Path]:
    """Move what a killed writer left in `folder` to `place`, for `cotwin data repair`; returns the places."""
    moved = []
    for path in sorted(path.parent for path in folder.glob(f"*{PARTIAL}/{BEGUN}")):
        durable.make_folder(place)
        durable.replace(path, place / path.name)
        moved.append(place / path.name)
    return moved


def remove_unfinished(folder: Path) -> int:
    """Delete what killed writers left in `folder`; returns how many episodes that were."""
    partial = list(folder.glob("*" + PARTIAL))
    for path in partial:
        shutil.rmtree(path)
    return len(partial)
