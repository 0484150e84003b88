"""Where things lie in a LeRobotDataset v3 of ours: one file for each episode, and `info.json`."""

from typing import Any

from bridge.dataset_schema import CODEBASE_VERSION, features
from bridge.embodiment import Embodiment
from bridge.video import OPTIONS, PIXEL_FORMAT

CHUNK = 1000  # files in one folder
FILE = "chunk-{:03d}/file-{:03d}"
INFO, STATS, TASKS, CONTRACT = "meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/contract.json"
RECORDS = "meta/episode_records"  # the episode.json of each episode: identity, contract, picture histograms
VIDEO_INFO = {
    "video.codec": "h264",
    "video.pix_fmt": PIXEL_FORMAT,
    "video.g": int(OPTIONS["g"]),
    "video.crf": int(OPTIONS["crf"]),
    "video.preset": OPTIONS["preset"],
    "is_depth_map": False,
    "has_audio": False,
}
CARD = """---
task_categories: [robotics]
tags: [LeRobot]
configs: [{{config_name: default, data_files: data/*/*.parquet}}]
---
# {repo_id}

LeRobotDataset v3 of a {robot}: `LeRobotDataset("{repo_id}", root=THIS_FOLDER, video_backend="pyav")`.
`meta/contract.json` says what the numbers mean; the episode table says domain and success of every episode.
"""
INDEX_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": (1,), "names": None},
    "frame_index": {"dtype": "int64", "shape": (1,), "names": None},
    "episode_index": {"dtype": "int64", "shape": (1,), "names": None},
    "index": {"dtype": "int64", "shape": (1,), "names": None},
    "task_index": {"dtype": "int64", "shape": (1,), "names": None},
}


def file_name(index: int) -> str:
    return FILE.format(*divmod(index, CHUNK))


def data_file(index: int) -> str:
    return f"data/{file_name(index)}.parquet"


def episode_file(index: int) -> str:
    return f"meta/episodes/{file_name(index)}.parquet"


def new_info(embodiment: Embodiment, fps: int, image_size: tuple[int, int] | None) -> dict[str, Any]:
    all_features = features(embodiment, image_size) | INDEX_FEATURES
    for feature in all_features.values():
        if feature["dtype"] == "video":
            height, width, channels = feature["shape"]
            feature["info"] = VIDEO_INFO | {
                "video.height": height,
                "video.width": width,
                "video.channels": channels,
                "video.fps": fps,
            }
    return {
        "codebase_version": CODEBASE_VERSION,
        "robot_type": embodiment.name,
        "total_episodes": 0,
        "total_frames": 0,
        "total_tasks": 0,
        "chunks_size": CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": int(fps),
        "splits": {},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {key: feature | {"shape": list(feature["shape"])} for key, feature in all_features.items()},
    }
