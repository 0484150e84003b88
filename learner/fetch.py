"""Bring released weights, demonstrations and assets to this machine: `cotwin fetch NAME [to=FOLDER] [revision=main]`.

An interrupted download goes on where it was, every file is compared with the size and hash that its repository names,
and what is here and right is not fetched again. HF_ENDPOINT names another server than huggingface.co; HF_TOKEN is used
where it is set. Some files are gigabytes.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bridge.config import did_you_mean, errors_in_one_line

USAGE = "usage: cotwin fetch NAME [to=FOLDER] [revision=main]"
CHECKPOINT = (
    "openpi-PyTorch's layout: `cotwin sft policy={policy} checkpoint={folder} statistics=checkpoint` makes a "
    "bundle, which `checkpoint` of cotwin train takes (actor.model.model_path); for {recipes}"
)
DEMONSTRATIONS = (
    "demonstrations, found by name below HF_LEROBOT_HOME: data.real, data.sim, actor.sft_data_path of recipe "
    "maniskill_ppo_co_training_openpi_pi05. In LeRobot's v2.1: bring them to v3 by its converter, and add "
    "meta/contract.json (docs/contract.md)"
)


@dataclass(frozen=True)
class Released:
    """A repository of RLinf's, where it goes, and what reads it there. `home`: an environment variable, or a folder."""

    kind: str
    home: str
    use: str
    policy: str = ""
    recipes: str = ""


def _weights(policy: str, recipes: str) -> Released:
    return Released("model", "models", CHECKPOINT, policy, recipes)


RELEASED = {
    "RLinf-Pi05-RLCo-PandaPutOnPlateInScene25DigitalTwin-V1-SFT": _weights(
        "pi05", "recipe maniskill_ppo_co_training_openpi_pi05"
    ),
    "RLinf-Pi05-GSEnv-PutCubeOnPlate-V0-SFT": _weights("pi05", "recipe gsenv_ppo_openpi_pi05"),
    "RLinf-Pi05-SFT": _weights("pi05", "recipes libero_*_openpi_pi05"),
    "RLinf-Pi0-SFT-Spatial-Object-Goal": _weights("pi0", "recipes libero_{spatial,object,goal}_*_openpi"),
    "RLinf-Pi0-SFT-Long": _weights("pi0", "recipes libero_10_*_openpi"),
    "RLCo-Example-Real-Data": Released("dataset", "HF_LEROBOT_HOME", DEMONSTRATIONS),
    "RLCo-Example-Mix-Data": Released("dataset", "HF_LEROBOT_HOME", DEMONSTRATIONS),
    "RLCo-maniskill-assets": Released(
        "dataset",
        "MANISKILL_ASSET_DIR",
        "objects: copy its meshes to $MANISKILL_ASSET_DIR/pick_place/train and held_out for twin.objects=external "
        "(docs/twin.md)",
    ),
    "gsenv-assets-v0": Released(
        "dataset", "assets", "Gaussians and meshes: its .ply clouds are what a scene folder (docs/splat.md) is made of"
    ),
}
DEFAULT_HOMES = {"HF_LEROBOT_HOME": "data", "MANISKILL_ASSET_DIR": "assets"}
OWNER = "RLinf"


@errors_in_one_line()
def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("\n".join([USAGE, "", str(__doc__), "names:", *(f"  {name}" for name in RELEASED)]))
        return 0
    name, options = argv[0], dict(text.partition("=")[::2] for text in argv[1:])
    if unknown := sorted(options.keys() - {"to", "revision"}):
        raise ValueError(f"unknown keys {unknown}: allowed are to and revision")
    folder = fetch(name, Path(options["to"]) if "to" in options else None, options.get("revision", "main"))
    released = RELEASED[name]
    print(
        f"{name} is in {folder}\n"
        + released.use.format(folder=folder, policy=released.policy, recipes=released.recipes)
    )
    return 0


def home(name: str) -> Path:
    """Where a configuration expects it."""
    where = RELEASED[name].home
    return Path(os.environ.get(where) or DEFAULT_HOMES.get(where, where)) / name


def fetch(name: str, to: Path | None = None, revision: str = "main") -> Path:
    """The whole repository in a folder (default: `home`). Raises ValueError for an unknown name, a server that does not
    answer or has no such thing, and files that are not what the repository says; those are removed."""
    if name not in RELEASED:
        raise ValueError(
            f"unknown name {name!r}.{did_you_mean(name, list(RELEASED))} Allowed are {', '.join(RELEASED)}"
        )
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    api, kind, repository = HfApi(endpoint=endpoint), RELEASED[name].kind, f"{OWNER}/{name}"
    folder = to or home(name)
    try:
        info = api.repo_info(repository, repo_type=kind, revision=revision, files_metadata=True)
        api.snapshot_download(repository, repo_type=kind, revision=info.sha, local_dir=folder)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ValueError(
            f"{repository} from {endpoint}: {error}. The same command goes on where this one stopped; HF_ENDPOINT "
            "names another server"
        ) from error
    if wrong := [text for file in tqdm(info.siblings, desc="check", leave=False) if (text := problem(folder, file))]:
        raise ValueError(
            f"{repository} from {endpoint}, removed: {'; '.join(wrong)}. The same command fetches them anew"
        )
    return folder


def problem(folder: Path, file: Any) -> str:
    """What is wrong with a file (a huggingface_hub RepoSibling's), which is then removed; nothing if it is right."""
    path = folder / file.rfilename
    if not path.is_file():
        return f"{file.rfilename} is missing"
    size = path.stat().st_size
    found = f"{size} bytes" if size != file.size else ""
    if not found and file.lfs:
        with path.open("rb") as stream:
            found = "" if hashlib.file_digest(stream, "sha256").hexdigest() == file.lfs.sha256 else "another SHA-256"
    elif not found and file.blob_id:
        blob = hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False)
        found = "" if blob.hexdigest() == file.blob_id else "another git hash"
    if found:
        path.unlink()
    return found and f"{file.rfilename} has {found}, should have {file.size} bytes as published"
