"""Checkpoint bundles: folders that are whole, or do not load (docs/contract.md, section 5).

`manifest.json` names every other file with size, SHA-256 and blocks (`bridge.transfer`); its own SHA-256 is what an
announcement signs. `done` is written last and a bundle gets its name by one rename, so that a folder with the right
name is finished and a folder without `done` is not.
"""

import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from bridge import durable
from bridge.embodiment import Embodiment
from bridge.errors import CorruptData
from bridge.messages import CheckpointInfo
from bridge.transfer import NAME, FileEntry, describe, read_files

MANIFEST, CONTRACT, DONE = "manifest.json", "contract.json", "done"
MAX_BUNDLE_BYTES = 64 * 1024**3
VERSION_NAME = re.compile(r"\d{6,}")


def bundle_path(root: Path, version: int) -> Path:
    return Path(root) / f"{version:06d}"


def write_bundle(
    folder: Path,
    files: dict[str, Path | bytes],
    embodiment: Embodiment,
    version: int,
    parent_version: int,
    training_step: int,
    evaluation: dict[str, Any],
) -> CheckpointInfo:
    """Make a bundle of `files` (name to content, or to a file that is copied); durable and verified when it returns.

    Raises ValueError when `folder` exists or a file's name is not flat or reserved.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; bundles are never changed, choose the next version")
    for name in files:
        if not NAME.fullmatch(name) or name in (MANIFEST, CONTRACT, DONE):
            raise ValueError(f"file name {name!r}: flat names other than {MANIFEST}, {CONTRACT} and {DONE} are allowed")
    unfinished = folder.with_name(f".{folder.name}.{time.time_ns()}")
    durable.make_folder(unfinished)
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, unfinished / name)
        else:
            (unfinished / name).write_bytes(content)
    embodiment.save(unfinished / CONTRACT)
    entries = {name: describe(unfinished / name) for name in (CONTRACT, *files)}
    manifest = {
        "version": version,
        "parent_version": parent_version,
        "training_step": training_step,
        "contract_hash": embodiment.contract_hash,
        "evaluation": evaluation,
        "files": {name: entry.to_json() for name, entry in entries.items()},
    }
    for name in entries:
        durable.sync(unfinished / name)
    finish_bundle(unfinished, folder, (json.dumps(manifest, allow_nan=False) + "\n").encode())
    return read_manifest(folder)[0]


def finish_bundle(unfinished: Path, folder: Path, manifest: bytes) -> None:
    """The last steps to a bundle whose files are on the disk: manifest, `done`, name. An older `folder` is replaced."""
    durable.write_bytes(unfinished / MANIFEST, manifest)
    durable.write_bytes(unfinished / DONE, b"")
    if folder.exists():
        replaced = folder.with_name(f".{folder.name}.{time.time_ns()}.replaced")
        folder.rename(replaced)
        durable.replace(unfinished, folder)
        shutil.rmtree(replaced)
    else:
        durable.replace(unfinished, folder)


def read_manifest(folder: Path) -> tuple[CheckpointInfo, dict[str, FileEntry], dict[str, Any]]:
    """Info, files and the whole manifest; the files are not read. Raises CorruptData when unfinished or malformed."""
    if not (folder / DONE).is_file():
        raise CorruptData(f"{folder} is not a finished bundle: {DONE} is missing")
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise CorruptData(f"{folder / MANIFEST} cannot be read: {error}") from error
    return info_of(data), read_files(data, MAX_BUNDLE_BYTES), json.loads(data)


def info_of(manifest: bytes) -> CheckpointInfo:
    """Raises CorruptData when a field is missing or of another type."""
    try:
        content = json.loads(manifest)
        numbers = {key: content[key] for key in ("version", "parent_version", "training_step")}
        contract_hash = content["contract_hash"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptData(f"not a bundle's manifest: {error!r}") from error
    if not all(type(number) is int for number in numbers.values()) or not isinstance(contract_hash, str):
        raise CorruptData(f"not a bundle's manifest: {numbers}, contract_hash {contract_hash!r}")
    return CheckpointInfo(**numbers, manifest_sha256=hashlib.sha256(manifest).hexdigest(), contract_hash=contract_hash)


def verify_bundle(folder: Path) -> CheckpointInfo:
    """Read every byte of a bundle. Raises CorruptData naming the file that is missing, altered or unknown."""
    folder = Path(folder)
    info, files, _ = read_manifest(folder)
    if CONTRACT not in files:
        raise CorruptData(f"{folder / MANIFEST} does not list {CONTRACT}")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptData(f"{path} is missing")
        if path.stat().st_size != entry.size:
            raise CorruptData(f"{path} has {path.stat().st_size} bytes; the manifest says {entry.size}")
        if durable.sha256(path) != entry.sha256:
            raise CorruptData(f"{path} is not what the manifest says (SHA-256 differs)")
    if unknown := {path.name for path in folder.iterdir()} - {*files, MANIFEST, DONE}:
        raise CorruptData(f"{folder} holds files that its manifest does not list: {sorted(unknown)}")
    try:
        found = Embodiment.load(folder / CONTRACT).contract_hash
    except ValueError as error:
        raise CorruptData(str(error)) from error
    if found != info.contract_hash:
        raise CorruptData(f"{folder / CONTRACT} has hash {found}; the manifest says {info.contract_hash}")
    return info


def bundles(root: Path) -> dict[int, Path]:
    """Finished bundles by version, ascending. Their content is not checked here."""
    folders = [p for p in Path(root).iterdir() if VERSION_NAME.fullmatch(p.name)] if Path(root).is_dir() else []
    return {int(p.name): p for p in sorted(folders, key=lambda p: int(p.name)) if (p / DONE).is_file()}


def latest_bundle(root: Path) -> Path | None:
    """The finished bundle with the highest version."""
    return next(reversed(bundles(root).values()), None)


def prune_bundles(root: Path, keep: int, protect: set[int]) -> list[Path]:
    """Delete all but the newest `keep` bundles and those in `protect`; returns what was deleted."""
    if keep < 1:
        raise ValueError(f"keep {keep}: at least 1")
    gone = [folder for version, folder in list(bundles(root).items())[:-keep] if version not in protect]
    for folder in gone:
        (folder / DONE).unlink()  # from here on it is no bundle, whatever happens to the rest
        shutil.rmtree(folder)
    return gone
