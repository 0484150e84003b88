"""Episodes made from others: recovered after a kill, cut where pictures end, slower, or with smaller pictures.

Rows compose (docs/contract.md, section 6): at a slower rate, a row's action is the motion over the rows that it stands
for, and its state and picture are the first one's. Rows at the end that do not fill a slower row are left out.
"""

import json
import uuid
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bridge import durable, pose
from bridge.dataset import DatasetStore, decode_frames, read_episode, video_path
from bridge.dataset_layout import INDEX_FEATURES
from bridge.embodiment import Embodiment
from bridge.episode import (
    BEGUN,
    DERIVED,
    JOURNAL,
    RECORD_FILE,
    ROWS_FILE,
    EpisodeRecord,
    EpisodeWriter,
    journal_type,
    read_record,
    row_features,
    to_table,
    verify_files,
)
from bridge.errors import CorruptData
from bridge.pictures import area_resize
from bridge.video import readable_frames

COMPOSED = ("action", "requested_action")
FROM_MEMBERS = uuid.UUID("6f1c0a52-5d0e-4a55-9a5a-2f1f6c3b7a10")  # names what is made from an episode, always the same


@dataclass(frozen=True)
class Episode:
    """An episode wherever it lies. `rows` [N, ...] without index columns; `frames`: readable pictures of a camera."""

    record: EpisodeRecord
    rows: dict[str, np.ndarray]
    videos: dict[str, Path]
    frames: dict[str, int]

    @property
    def num_whole(self) -> int:
        """Rows that have a picture of every camera."""
        return min(len(self.rows["action"]), *self.frames.values())

    @property
    def problems(self) -> list[str]:
        found, rows = [], len(self.rows["action"])
        for camera, path in self.videos.items():
            if self.frames[camera] != rows:
                found.append(f"{camera} has {self.frames[camera]} readable pictures for {rows} rows")
            elif durable.sha256(path) != self.record.files[path_name(camera)]:
                found.append(f"{camera} is not the video that was recorded (SHA-256 differs)")
        if rows != self.record.num_rows:
            found.append(f"{rows} rows, {self.record.num_rows} were recorded")
        if np.any(np.diff(self.rows["capture_stamp_ns"], axis=0) <= 0):
            found.append("capture_stamp_ns does not grow")
        return found


def path_name(camera: str) -> str:
    return f"{camera}.mp4"


def stored(store: DatasetStore, index: int) -> Episode:
    """One episode of a data set. Raises CorruptData when its record is damaged."""
    rows = {key: values for key, values in read_episode(store.root, index).items() if key not in INDEX_FEATURES}
    videos = {camera: video_path(store.root, camera, index) for camera in store.embodiment.cameras}
    return Episode(store.record(index), rows, videos, {name: readable_frames(path) for name, path in videos.items()})


def recover(partial: Path, folder: Path, success: bool = False) -> Path:
    """What a killed writer left in `partial` (which stays) as a finished episode: up to the last picture that every
    camera has. Returns where it is: `folder`, or `partial` itself when only the last act was missing.

    Raises CorruptData when not even one row is left.
    """
    if (partial / RECORD_FILE).exists():
        verify_files(partial, read_record(partial))
        return partial
    try:
        begun = json.loads((partial / BEGUN).read_text())
        embodiment = Embodiment.from_dict(begun["contract"])
        journal = (partial / JOURNAL).read_bytes()
    except (OSError, ValueError, KeyError) as error:
        raise CorruptData(f"{partial} holds no interrupted episode: {error}") from error
    kind = journal_type(embodiment)
    table = np.frombuffer(journal, kind, count=len(journal) // kind.itemsize)
    rows = {key: table[key] for key in table.dtype.names or ()}
    videos = {camera: partial / path_name(camera) for camera in embodiment.cameras}
    about = {"num_rows": len(table), "success": success, "contract_hash": embodiment.contract_hash}
    record = EpisodeRecord(**begun, **about, pixel_histograms={}, files={}, extra={"interrupted": True})
    episode = Episode(record, rows, videos, {name: readable_frames(path) for name, path in videos.items()})
    return rewrite(episode, folder, uuid_hex=record.uuid)


def carry(episode: Episode, folder: Path) -> Path:
    """The same episode, its videos bit for bit, as a folder that a data set takes."""
    durable.make_folder(folder)
    for camera, path in episode.videos.items():
        durable.place(path, folder / path_name(camera))
    pq.write_table(to_table(episode.rows, row_features(episode.record.embodiment)), folder / ROWS_FILE)
    files = {name: durable.sha256(folder / name) for name in episode.record.files}
    durable.write_text(folder / RECORD_FILE, replace(episode.record, files=files).to_json())
    return folder


def rewrite(
    episode: Episode,
    folder: Path,
    fps: int | None = None,
    image_size: tuple[int, int] | None = None,
    uuid_hex: str | None = None,
) -> Path:
    """The episode's whole rows at `fps` (a divisor of its own) with pictures of `image_size` (default: as they are).

    Its uuid follows from the episode's and what was done, so that it is the same when it is made again.
    Raises CorruptData when no row is left, ValueError for a rate that is no divisor.
    """
    record, embodiment = episode.record, episode.record.embodiment
    fps = fps or record.fps
    if record.fps % fps:
        raise ValueError(f"{fps} fps from {record.fps} fps: rows can only be joined by a whole number")
    stride = record.fps // fps
    if (num_rows := episode.num_whole // stride) == 0:
        raise CorruptData(f"episode {record.uuid} has {episode.num_whole} rows with pictures, too few for one row")
    height, width = image_size or record.image_size or (0, 0)
    size = (height, width) if height else None
    writer = EpisodeWriter(folder, embodiment, fps, record.instruction, record.domain, size)
    made = f"{record.uuid} {episode.num_whole} rows at {fps} fps {size}"
    writer.uuid = uuid_hex or uuid.uuid5(FROM_MEMBERS, made).hex
    rows = slower(episode.rows, stride, num_rows)
    frames = {name: islice(decode_frames(path), 0, num_rows * stride, stride) for name, path in episode.videos.items()}
    for k in range(num_rows):
        images = {name: next(pictures) for name, pictures in frames.items()}
        if size is not None:
            images = {name: area_resize(image[None], size)[0] for name, image in images.items()}
        writer.add(images, {key: values[k] for key, values in rows.items()})
    return writer.close(record.success, record.extra | {"made_from": {"uuid": record.uuid, "rows": record.num_rows}})


def slower(rows: dict[str, np.ndarray], stride: int, num_rows: int) -> dict[str, np.ndarray]:
    """The writer's columns [num_rows, ...], each row standing for `stride` rows."""
    kept = {key: values[: num_rows * stride] for key, values in rows.items() if key not in DERIVED}
    out = {key: values[::stride] for key, values in kept.items()}
    if stride > 1:
        for key in COMPOSED:
            out[key] = pose.compose(kept[key].reshape(num_rows, stride, pose.ACTION_DIM))
        out["intervention"] = np.any(kept["intervention"].reshape(num_rows, stride), axis=1)
    return out
