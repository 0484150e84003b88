"""Look after data sets.

    cotwin data inspect root=A                        every episode: rows, success, gaps, whether pictures match rows
    cotwin data repair root=A spool=runs/demo/spool   finish what a killed recorder left; interrupted episodes too
    cotwin data repair root=A out=B                   B: A without what is damaged, episodes cut where pictures end
    cotwin data merge sources=[A,B] out=C             one data set of robot and twin; domains stay with their episodes
    cotwin data push root=A repo_id=lab/cube          to the Hugging Face Hub (HF_ENDPOINT, HF_TOKEN are honoured)

`merge` joins rows to the slowest rate of its sources, or to `fps`, and takes their smallest pictures; statistics are
those of all rows. Repeated, it adds only what is new. `inspect` ends with 1 when something is wrong.
"""

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from bridge.config import command_line, errors_in_one_line
from bridge.dataset import DatasetStore
from bridge.dataset_schema import CODEBASE_VERSION
from bridge.durable import UNFINISHED
from bridge.episode import BEGUN, PARTIAL, finished_episodes
from bridge.episode_rewrite import Episode, carry, recover, rewrite, stored
from bridge.errors import BridgeError, CorruptData

ACTIONS = ("inspect", "repair", "merge", "push")


@dataclass
class DataCommandConfig:
    """Keys of `cotwin data`."""

    root: str = ""  # the data set
    sources: list[str] = field(default_factory=list)  # merge: data sets of one contract
    out: str = ""  # merge, repair: the new data set
    fps: int = 0  # merge: 0 is the slowest of the sources
    repo_id: str = "cotwin/demonstrations"  # merge: of the new data set; push: OWNER/NAME on the hub
    spool: str = ""  # repair: where a recorder wrote (`spool_dir`)
    success: bool = False  # repair: whether interrupted episodes were successful; somebody has to know
    private: bool = True  # push


@errors_in_one_line()
def main(argv: list[str]) -> int:
    action, settings = (argv[0], argv[1:]) if argv and argv[0] in ACTIONS else (None, argv)
    config = command_line("data", DataCommandConfig, settings, __doc__)
    match action:
        case "inspect":
            return show(inspect(_needed(config.root, "root", action)))
        case "repair":
            return repair(config)
        case "merge":
            sources = [Path(source) for source in config.sources]
            print(summary(merge(sources, _needed(config.out, "out", action), config.repo_id, config.fps)))
        case "push":
            print(push(_needed(config.root, "root", action), config.repo_id, config.private))
        case _:
            raise ValueError(f"say what to do: cotwin data {'|'.join(ACTIONS)} (cotwin data --help)")
    return 0


def inspect(root: Path) -> tuple[DatasetStore, list[dict[str, Any]]]:
    """One line for each episode; nothing is changed. `max_gap_ms`: between the capture times of consecutive rows."""
    store = DatasetStore.open(root, repair=False)
    lines = []
    for known in tqdm(store.episodes(), unit="episode", leave=False):
        about = {key: known[key] for key in ("episode_index", "domain", "success", "length", "tasks")}
        try:
            episode = stored(store, known["episode_index"])
        except (CorruptData, IndexError, OSError) as error:
            lines.append(about | {"problems": [str(error)]})
            continue
        stamps_ns, extra = episode.rows["capture_stamp_ns"], episode.record.extra
        about["seconds"] = float(stamps_ns[-1] - stamps_ns[0]) * 1e-9 + 1 / store.fps
        about["max_gap_ms"] = float(np.diff(stamps_ns).max(initial=0)) * 1e-6
        about |= {key: int(episode.rows[key].sum()) for key in ("frame_repeated", "intervention")}
        about["notes"] = [note for note in ("interrupted", "made_from") if extra.get(note)]
        lines.append(about | {"problems": episode.problems})
    return store, lines


def show(found: tuple[DatasetStore, list[dict[str, Any]]]) -> int:
    store, lines = found
    print(
        f"{'episode':>7} {'domain':>9} {'success':>7} {'rows':>6} {'s':>7} {'gap ms':>7} {'repeated':>8} {'by hand':>7}"
    )
    for line in lines:
        numbers = SimpleNamespace(**{"seconds": 0, "max_gap_ms": 0, "frame_repeated": 0, "intervention": 0} | line)
        about = "; ".join([*line.get("notes", []), *line["problems"]])
        print(
            f"{numbers.episode_index:7d} {numbers.domain:>9} {'yes' if numbers.success else 'no':>7} "
            f"{numbers.length:6d} {numbers.seconds:7.1f} {numbers.max_gap_ms:7.0f} {numbers.frame_repeated:8d} "
            f"{numbers.intervention:7d}  {about}"
        )
    print(summary(store))
    damaged = sum(bool(line["problems"]) for line in lines)
    if damaged:
        print(f"{damaged} damaged episodes: cotwin data repair root={store.root} out=NEW takes what is whole")
    return 1 if damaged else 0


def summary(store: DatasetStore) -> str:
    facts = store.summary()
    domains = ", ".join(f"{count} {domain}" for domain, count in facts["domains"].items())
    return (
        f"{store.root}: {facts['episodes']} episodes ({domains}), {facts['successes']} successes, "
        f"{facts['frames']} rows, {facts['seconds']:.1f} s at {facts['fps']} fps, contract {facts['contract_hash'][:9]}"
    )


def repair(config: DataCommandConfig) -> int:
    root = _needed(config.root, "root", "repair")
    store = DatasetStore.open(root)  # which finishes, or takes back, an append that was killed
    if config.spool:
        take_spool(store, Path(config.spool), config.success)
    if config.out:
        new = DatasetStore.open_or_create(
            Path(config.out), config.repo_id, store.embodiment, store.fps, store.image_size
        )
        lost = append_all([store], new, cut=True)
        print("\n".join([*lost, summary(new)]))
        return 0
    return show(inspect(root))


def take_spool(store: DatasetStore, spool: Path, success: bool) -> None:
    """Episodes that a recorder did not deliver, finished or interrupted, into the data set; then they leave the spool.

    What cannot be taken stays where it is, and is named.
    """
    interrupted = [path.parent for path in sorted(spool.glob(f"*/*{PARTIAL}/{BEGUN}"))]
    for folder in [*finished_episodes(spool / "recordings"), *interrupted]:
        with tempfile.TemporaryDirectory(dir=spool) as place:
            try:
                whole = recover(folder, Path(place) / "episode", success) if folder.suffix == PARTIAL else folder
                index = store.append(whole)
            except BridgeError as error:
                print(f"left {folder}: {error}", file=sys.stderr)
                continue
        shutil.rmtree(folder)
        print(f"{folder.name}: episode {index}, {store.episodes()[index]['length']} rows")


def merge(sources: list[Path], out: Path, repo_id: str, fps: int = 0) -> DatasetStore:
    """Raises SchemaMismatch, naming the field, for different contracts; ValueError for rates that do not divide, or
    pictures of different shape; CorruptData for a damaged episode (`repair` first)."""
    if not sources:
        raise ValueError("merge needs sources=[A,B,...]")
    stores = [DatasetStore.open(source, repair=False) for source in sources]
    first = stores[0]
    for store in stores[1:]:
        first.embodiment.require_same(store.embodiment, f"data set {store.root}")
    fps = fps or min(store.fps for store in stores)
    if odd := [f"{store.root} has {store.fps}" for store in stores if store.fps % fps]:
        raise ValueError(f"rows are joined by a whole number into {fps} fps: {', '.join(odd)}")
    sizes = {store.image_size for store in stores}
    smallest = min((size for size in sizes if size), default=None)
    for camera in first.embodiment.cameras.values():
        for height, width in filter(None, [*sizes, (camera.height, camera.width)]):
            if smallest and height * smallest[1] != width * smallest[0]:
                raise ValueError(f"pictures of {width}x{height} and {smallest[1]}x{smallest[0]} differ in shape")
    new = DatasetStore.open_or_create(out, repo_id, first.embodiment, fps, smallest)
    append_all(stores, new)
    return new


def append_all(stores: list[DatasetStore], new: DatasetStore, cut: bool = False) -> list[str]:
    """Every episode of `stores` into `new`, changed only where rate, picture size or (`cut`) damage ask for it. Returns
    what was lost; CorruptData for damage without `cut`."""
    lost = []
    members = [(store, index) for store in stores for index in range(store.num_episodes)]
    for store, index in tqdm(members, unit="episode", leave=False):
        name = f"{store.root} episode {index}"
        with tempfile.TemporaryDirectory(dir=new.root.parent) as place:
            try:
                episode = stored(store, index)
                if episode.problems and not cut:
                    raise CorruptData(f"{'; '.join(episode.problems)}; cotwin data repair root={store.root} out=NEW")
                new.append(_fitting(episode, store, new, Path(place) / "episode"), summarise=False)
            except (CorruptData, IndexError, OSError) as error:
                if not cut:
                    raise CorruptData(f"{name}: {error}") from error
                lost.append(f"{name} is lost: {error}")
                continue
            if episode.problems:
                rows = len(episode.rows["action"])
                lost.append(f"{name}: {episode.num_whole} of {rows} rows kept: {'; '.join(episode.problems)}")
    new.summarise()
    return lost


def _fitting(episode: Episode, store: DatasetStore, new: DatasetStore, folder: Path) -> Path:
    if episode.problems or (store.fps, store.image_size) != (new.fps, new.image_size):
        return rewrite(episode, folder, new.fps, new.image_size)
    return carry(episode, folder)


def push(root: Path, repo_id: str, private: bool) -> str:
    """Upload a data set that has no damage, with the tag by which LeRobot finds its version. Returns its address."""
    try:
        hub = importlib.import_module("huggingface_hub")
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise ValueError("push needs huggingface_hub: pip install huggingface_hub") from error
    store, lines = inspect(root)
    if bad := [line["episode_index"] for line in lines if line["problems"]]:
        raise CorruptData(f"episodes {bad} are damaged: cotwin data inspect root={root}")
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    about: dict[str, Any] = {"repo_id": repo_id, "repo_type": "dataset"}
    try:
        api.create_repo(**about, private=private, exist_ok=True)
        left_out = [".lock", f"*{UNFINISHED}"]
        message = f"{store.num_episodes} episodes"
        api.upload_folder(**about, folder_path=root, ignore_patterns=left_out, commit_message=message)
        with contextlib.suppress(errors.RevisionNotFoundError):  # the tag of an earlier push
            api.delete_tag(**about, tag=CODEBASE_VERSION)
        api.create_tag(**about, tag=CODEBASE_VERSION)
    except (errors.HfHubHTTPError, OSError) as error:
        raise ValueError(f"{repo_id} could not be pushed: {error}") from error
    return f"{api.endpoint}/datasets/{repo_id}"


def _needed(value: str, key: str, action: str) -> Path:
    if not value:
        raise ValueError(f"cotwin data {action} needs {key}=...")
    return Path(value)
