"""Files that survive a power cut: written beside their place, synced, and moved there in one step.

After `write_bytes` or `replace` has returned, the file is on the disk whole; before, the old one (or none) is there.
"""

import hashlib
import os
import shutil
from pathlib import Path

UNFINISHED = ".tmp"


def write_bytes(path: Path, data: bytes) -> None:
    unfinished = path.with_name(path.name + UNFINISHED)
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def place(source: Path, target: Path) -> None:
    """`target` becomes the same bytes as `source`, which nobody may change afterwards: linked where the file system
    can, else copied."""
    unfinished = target.with_name(target.name + UNFINISHED)
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, unfinished)
    sync(unfinished)
    replace(unfinished, target)


def replace(source: Path, target: Path) -> None:
    os.replace(source, target)
    sync(target.parent)


def make_folder(path: Path) -> None:
    """`mkdir -p`, with every new entry synced."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
