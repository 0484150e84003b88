"""Folders that travel as blocks named by their hash: resumable, verified, and only what is not there already.

A manifest lists for each file its size, SHA-256 and blocks `[size, hash]` in order; a block is a tensor of a
safetensors file, or a piece of at most BLOCK_BYTES. `BlockSource` hands out blocks of finished folders, `Assembly`
fills a folder with them. An assembly keeps no journal: after a kill it hashes what lies there and asks for the rest.

A block's hash is `b3-` and its BLAKE3: five times faster than SHA-256, so that a delivery is bound by link and disk.
"""

import hashlib
import itertools
import json
import logging
import math
import mmap
import os
import re
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from bridge import durable
from bridge.errors import CorruptData

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 * 1024 * 1024
MAX_FILES = 256
MAX_BLOCKS = 500_000
MAX_TRIES = 3  # of a block that arrives damaged
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")  # flat and visible: a manifest cannot leave its folder
SHA256 = re.compile(r"[0-9a-f]{64}")
BLOCK_HASH = re.compile(r"b3-[0-9a-f]{64}")
SYNC_BYTES = 64 * 1024 * 1024  # written blocks are brought to the disk while the next ones arrive


@dataclass(frozen=True)
class FileEntry:
    size: int
    sha256: str
    blocks: list[tuple[int, str]]  # size and hash, in order, without gaps

    def to_json(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self.sha256, "blocks": [list(block) for block in self.blocks]}


@dataclass(frozen=True)
class Place:
    """Where a block lies in a folder."""

    name: str
    offset: int
    size: int


def block_hash(data: Any) -> str:
    """The name of a block."""
    return "b3-" + blake3(data).hexdigest()


def describe(path: Path) -> FileEntry:
    """Hash a file, whole and by blocks."""
    whole, blocks = hashlib.sha256(), []
    with open(path, "rb") as file:
        for size in _block_sizes(path):
            data = file.read(size)
            whole.update(data)
            blocks.append((len(data), block_hash(data)))
    return FileEntry(path.stat().st_size, whole.hexdigest(), blocks)


def read_files(manifest: bytes, max_bytes: int) -> dict[str, FileEntry]:
    """The checked `files` of a manifest that came from elsewhere. Raises CorruptData naming what is wrong."""
    try:
        files = {
            str(name): FileEntry(entry["size"], entry["sha256"], [(size, sha) for size, sha in entry["blocks"]])
            for name, entry in json.loads(manifest)["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptData(f"not a manifest: {error!r}") from error
    if not 0 < len(files) <= MAX_FILES or sum(len(entry.blocks) for entry in files.values()) > MAX_BLOCKS:
        raise CorruptData(f"a manifest of {len(files)} files; allowed are 1 to {MAX_FILES} with {MAX_BLOCKS} blocks")
    for name, entry in files.items():
        if not NAME.fullmatch(name):
            raise CorruptData(f"file name {name!r}: allowed are flat names of letters, digits, '.', '_' and '-'")
        sizes = [entry.size, *(size for size, _ in entry.blocks)]
        if not all(type(size) is int and size >= 0 for size in sizes) or sum(sizes[1:]) != entry.size:
            raise CorruptData(f"{name}: the blocks do not add up to the file")
        if max(sizes[1:], default=0) > BLOCK_BYTES:
            raise CorruptData(f"{name}: a block of {max(sizes[1:])} bytes; allowed are {BLOCK_BYTES}")
        hashes = [(SHA256, entry.sha256), *((BLOCK_HASH, sha) for _, sha in entry.blocks)]
        if not all(isinstance(sha, str) and pattern.fullmatch(sha) for pattern, sha in hashes):
            raise CorruptData(f"{name}: a hash is not 64 hex digits, with b3- before a block's")
    if (total := sum(entry.size for entry in files.values())) > max_bytes:
        raise CorruptData(f"a folder of {total} bytes; allowed are {max_bytes}")
    return files


def places(files: dict[str, FileEntry]) -> dict[str, list[Place]]:
    """Every block by its hash: equal blocks are fetched once and written wherever they belong."""
    found: dict[str, list[Place]] = {}
    for name, entry in files.items():
        offset = 0
        for size, sha in entry.blocks:
            found.setdefault(sha, []).append(Place(name, offset, size))
            offset += size
    return found


class BlockSource:
    """Blocks of folders that no longer change. `get` returns a view of the mapped file: nothing is copied."""

    def __init__(self):
        self._index: dict[str, tuple[Path, Place]] = {}
        self._maps: dict[Path, mmap.mmap] = {}

    def add(self, folder: Path, files: dict[str, FileEntry]) -> None:
        for sha, where in places(files).items():
            self._index.setdefault(sha, (folder, where[0]))

    def remove(self, folder: Path) -> None:
        """Forget a folder, before it is deleted."""
        self._index = {sha: entry for sha, entry in self._index.items() if entry[0] != folder}
        self._maps = {path: mapped for path, mapped in self._maps.items() if path.parent != folder}

    def get(self, sha: str) -> memoryview | None:
        if sha not in self._index:
            return None
        folder, place = self._index[sha]
        if place.size == 0:
            return memoryview(b"")
        path = folder / place.name
        if path not in self._maps:
            try:
                with open(path, "rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # deleted, or truncated to nothing, behind our back
                self.remove(folder)
                return None
        view = memoryview(self._maps[path])[place.offset : place.offset + place.size]
        return view if len(view) == place.size else None


class Assembly:
    """A folder in the making. Raises OSError when the disk fails (full, read-only): what was written stays of use.

    One thread owns it. With `workers`, `put` leaves hashing and writing to that many threads and `settle` takes in what
    they finished; without, `put` does it all at once.
    """

    def __init__(self, folder: Path, files: dict[str, FileEntry], local: BlockSource | None = None, workers: int = 0):
        self.folder, self.files = folder, files
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="assembly") if workers else None
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="assembly-sync") if workers else None
        self._writing: dict[str, Future[bool]] = {}
        self._syncing: Future[None] | None = None
        self._unsynced_bytes = 0
        self.bytes_total = sum(entry.size for entry in files.values())
        self.bytes_here = self.bytes_local = 0
        self._places = places(files)
        self._missing: OrderedDict[str, None] = OrderedDict()  # not asked for yet, in the order of the files
        self._asked: dict[str, None] = {}
        self._tries: dict[str, int] = {}
        self._files: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(set(os.listdir(folder)) - set(files)):
            os.unlink(folder / name)
        try:
            self._begin(local)
        except OSError:
            self.close()
            raise

    @property
    def complete(self) -> bool:
        return not self._missing and not self._asked and not self._writing

    @property
    def is_writing(self) -> bool:
        return bool(self._writing)

    def has(self, name: str) -> bool:
        """Whether every block of this file has been written."""
        shas = [sha for _, sha in self.files[name].blocks]
        return not any(sha in self._missing or sha in self._asked or sha in self._writing for sha in shas)

    def wants(self, window: int, window_bytes: float = math.inf) -> list[str]:
        """Hashes to ask for now, so that `window` of them, or so many bytes, are under way or being written."""
        new, num = [], len(self._asked) + len(self._writing)
        under_way_bytes = sum(self._places[sha][0].size for sha in (*self._asked, *self._writing))
        while self._missing and num + len(new) < window and under_way_bytes < window_bytes:
            sha, _ = self._missing.popitem(last=False)
            self._asked[sha] = None
            under_way_bytes += self._places[sha][0].size
            new.append(sha)
        return new

    def put(self, sha: str, data: Any) -> bool:
        """Check a block and write it wherever it belongs. False when nobody waits for it (sent twice, late).

        Raises CorruptData when one block has arrived damaged MAX_TRIES times.
        """
        if sha not in self._asked and sha not in self._missing:
            return False
        self._asked.pop(sha, None)
        self._missing.pop(sha, None)
        if self._workers is not None:
            self._writing[sha] = self._workers.submit(self._check_and_write, sha, data)
            self._unsynced_bytes += len(data)
            return True
        return self._note(sha, self._check_and_write(sha, data))

    def settle(self) -> None:
        """Take in what the workers finished. Raises as `put` does."""
        for sha in [sha for sha, future in self._writing.items() if future.done()]:
            self._note(sha, self._writing.pop(sha).result())
        if self._syncing is not None and self._syncing.done():
            self._syncing.result()
            self._syncing = None
        if self._syncer is not None and self._syncing is None and self._unsynced_bytes > SYNC_BYTES:
            self._unsynced_bytes = 0
            self._syncing = self._syncer.submit(self._sync)

    def _sync(self) -> None:
        for descriptor in self._files.values():
            os.fsync(descriptor)

    def _check_and_write(self, sha: str, data: Any) -> bool:
        if block_hash(data) != sha:
            return False
        self._write(sha, data)
        return True

    def _note(self, sha: str, good: bool) -> bool:
        if good:
            self.bytes_here += sum(place.size for place in self._places[sha])
            return True
        self._tries[sha] = self._tries.get(sha, 0) + 1
        log.warning("block %s arrived damaged (%d)", sha[:16], self._tries[sha])
        if self._tries[sha] >= MAX_TRIES:
            raise CorruptData(f"block {sha[:16]} of {self.folder.name} arrived damaged {MAX_TRIES} times")
        self._missing[sha] = None
        return False

    def ask_again(self) -> None:
        """What was asked for and has not come is wanted anew."""
        self._missing = OrderedDict(dict.fromkeys([*self._asked, *self._missing]))
        self._asked.clear()

    def finish(self) -> None:
        """Everything on the disk. Call when complete."""
        assert self.complete
        if self._syncing is not None:
            self._syncing.result()  # what the disk said to that thread, it does not say again
        self._sync()
        self.close()
        durable.sync(self.folder)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)  # waits for the writes that have begun
        if self._syncer is not None:
            self._syncer.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _begin(self, local: BlockSource | None) -> None:
        """Open the files and take stock: blocks that lie here, blocks that lie in other folders, blocks to fetch."""
        there = set()
        for name, entry in self.files.items():
            if (self.folder / name).exists():
                there.add(name)
            self._files[name] = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._files[name], entry.size)
        for sha, where in self._places.items():
            if all(place.name in there and self._lies_here(sha, place) for place in where):
                self.bytes_here += sum(place.size for place in where)
            elif local is not None and (data := local.get(sha)) and block_hash(data) == sha:
                self._write(sha, data)
                self._note(sha, good=True)
                self.bytes_local += len(data)
            elif where[0].size:
                self._missing[sha] = None

    def _lies_here(self, sha: str, place: Place) -> bool:
        data = os.pread(self._files[place.name], place.size, place.offset)
        return block_hash(data) == sha

    def _write(self, sha: str, data: Any) -> None:
        for place in self._places[sha]:
            view, offset = memoryview(data), place.offset
            while len(view):
                written = os.pwrite(self._files[place.name], view, offset)
                view, offset = view[written:], offset + written


def _block_sizes(path: Path) -> Iterable[int]:
    """Where to cut a file: at every tensor of a safetensors file, and at BLOCK_BYTES at the latest."""
    size = path.stat().st_size
    cuts = sorted({0, size, *(_tensor_bounds(path, size) if path.suffix == ".safetensors" else ())})
    for start, end in itertools.pairwise(cuts):
        for offset in range(start, end, BLOCK_BYTES):
            yield min(BLOCK_BYTES, end - offset)


def _tensor_bounds(path: Path, size: int) -> Iterable[int]:
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 + header_bytes:
            raise CorruptData(f"{path} is no safetensors file: its header is longer than the file")
        header = json.loads(file.read(header_bytes))
    yield 8 + header_bytes
    for name, tensor in header.items():
        if name != "__metadata__":
            yield from (8 + header_bytes + offset for offset in tensor["data_offsets"])
