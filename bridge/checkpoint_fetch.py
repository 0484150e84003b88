"""The receiving end of `bridge.checkpoint_stream`: a thread that turns announcements into verified bundles on disk.

root/000012/           finished bundles (docs/contract.md, section 5)
root/.incoming/        the bundle under way; what lies there is hashed and used again after a kill
root/.announcement     the last announcement that was accepted: older ones are refused from then on
"""

import json
import logging
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import zmq

from bridge import durable
from bridge.announcement import open_announcement
from bridge.checkpoint import (
    CONTRACT,
    MAX_BUNDLE_BYTES,
    bundle_path,
    bundles,
    finish_bundle,
    info_of,
    latest_bundle,
    prune_bundles,
    read_manifest,
    verify_bundle,
)
from bridge.codec import Limits, Message, decode, encode, text
from bridge.embodiment import Embodiment
from bridge.errors import BridgeError, CorruptData, Refused, SchemaMismatch
from bridge.handshake import CallerEnd
from bridge.keys import Keys
from bridge.messages import CheckpointInfo
from bridge.sockets import Transport, receive
from bridge.transfer import Assembly, BlockSource, read_files

log = logging.getLogger(__name__)

LIMITS = Limits(frames=2, frame_bytes=64 * 1024 * 1024)  # a manifest is the largest single frame
# Blocks under way to one subscriber, or being hashed and written. ZeroMQ counts a message as gone up to half a
# high-water mark late, so more than 32 could fill the publisher's queue, and what does not fit is lost for seconds.
WINDOW = 24
WINDOW_BYTES = 64 * 1024 * 1024  # the same in bytes
WORKERS = 2  # threads that hash and write; one of each fills a core at about 0.5 GB/s
ANNOUNCEMENT, INCOMING = ".announcement", ".incoming"
ASK_CURRENT_S = 2.0
SILENCE_S = 5.0  # without even an answer to `current`: say hello and ask again
BLOCK_SILENCE_S = 10.0  # without a block: ask again; doubled each time, for links that need longer for one block
BACK_OFF_S = 2.0  # after a failed disk or a damaged bundle


class CheckpointSubscriber:
    """`poll` and `confirm` are for one thread, and never wait. `poll` raises what a person has to look at, once each:
    SchemaMismatch for a checkpoint of another embodiment, Refused when the publisher does not let us in.

    current_version: what already runs, so that only newer versions (or rollbacks) are handed out.
    """

    def __init__(
        self,
        announce_endpoint: str,
        fetch_endpoint: str,
        root: Path,
        embodiment: Embodiment,
        *,
        keys: Keys | None = None,
        role: str = "server",
        keep: int = 3,
        current_version: int = -1,
        allow_contract_mismatch: list[str] | None = None,
    ):
        self._allow = allow_contract_mismatch
        self.root, self.embodiment, self._keys, self._keep = Path(root), embodiment, keys, keep
        self._running = current_version
        self._ready: queue.SimpleQueue[Path | BaseException] = queue.SimpleQueue()
        self._to_confirm: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._confirmed = self._named(current_version)
        self._sequence = -1
        self._target: CheckpointInfo | None = None
        self._manifest: bytes | None = None
        self._assembly: Assembly | None = None
        self._contract_seen = False
        self._heard_s = self._asked_current_s = self._resume_s = self._block_s = 0.0
        self._block_silence_s = BLOCK_SILENCE_S
        names = ("announcements", "refused", "bytes_fetched", "bytes_reused", "bundles", "damaged", "disk_errors")
        self._counts = dict.fromkeys(names, 0)
        self.root.mkdir(parents=True, exist_ok=True)
        self._transport = Transport(keys)
        self._announcements = self._transport.connect(zmq.SUB, announce_endpoint, "checkpoints", LIMITS)
        self._announcements.subscribe(b"")
        # The contract is checked on each announcement, not here: a publisher may change embodiment.
        self._end = CallerEnd(
            fetch_endpoint, "checkpoints", None, role=role, keys=keys, limits=LIMITS, hello=lambda: self._confirmed
        )
        self._welcomes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint-subscriber", daemon=True)
        self._thread.start()

    def poll(self) -> Path | None:
        """A new verified bundle, ready to load, each once. Only the newest if several came."""
        newest = None
        while True:
            try:
                item = self._ready.get_nowait()
            except queue.Empty:
                return newest
            if isinstance(item, BaseException):
                raise item
            newest = item

    def confirm(self, version: int) -> None:
        """Tell the publisher that this version runs now."""
        self._running = version
        self._to_confirm.put(version)

    def stats(self) -> dict[str, Any]:
        assembly = self._assembly
        progress = assembly.bytes_here / max(1, assembly.bytes_total) if assembly else 1.0
        target = self._target.version if self._target else -1
        return self._counts | {"connected": self._end.ready, "target_version": target, "progress": progress}

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._consider(_accepted(self.root), stored=True)  # it still holds, and may have a bundle to finish
            while not self._stop.is_set():
                self._step()
        except BaseException as error:  # the owner must hear of it: poll raises it
            self._ready.put(error)
            raise
        finally:
            if self._assembly is not None:
                self._assembly.close()
            self._end.close()
            self._transport.close()

    def _step(self) -> None:
        try:
            self._hear_announcements()
            writing = self._assembly is not None and self._assembly.is_writing
            message = self._end.receive(0.001 if writing else 0.02)
            while message is not None:
                self._heard_s = time.monotonic()
                self._take(message)
                self._go_on()
                message = self._end.receive(0.0)
            if self._end.welcomes != self._welcomes:
                self._welcomes, self._heard_s = self._end.welcomes, time.monotonic()
                self._consider(self._end.welcome)
                if self._assembly is not None:
                    self._assembly.ask_again()
            while not self._to_confirm.empty():
                self._confirmed = self._named(self._to_confirm.get())
                self._end.send(encode("confirm", self._confirmed))
            self._go_on()
        except (Refused, SchemaMismatch) as error:
            self._counts["refused"] += 1
            log.error("%s", error)
            self._ready.put(error)
        except OSError as error:  # a full or failing disk: what was written stays of use
            self._pause("disk_errors", error)
        except CorruptData as error:
            self._pause("damaged", error)

    def _named(self, version: int) -> dict[str, Any]:
        """The bundle that runs: another run's has the same number and another manifest."""
        return {"policy_version": version, "policy_manifest": _manifest_hash(bundle_path(self.root, version))}

    def _hear_announcements(self) -> None:
        while True:
            try:
                if (frames := receive(self._announcements, LIMITS)) is None:
                    return
                self._consider(decode(frames, LIMITS).body)
            except BridgeError as error:
                log.warning("dropped an announcement: %s", error)

    def _consider(self, body: dict[str, Any], stored: bool = False) -> None:
        """Accept an announcement that is genuine, new and ahead; refuse and log any other."""
        if "announcement" not in body:
            return  # a publisher that has announced nothing yet
        try:
            info, sequence = open_announcement(body, self._keys)
            if sequence < self._sequence:
                raise Refused(f"announcement {sequence} of version {info.version} is older than {self._sequence}")
        except BridgeError as error:
            self._counts["refused"] += 1
            log.warning("refused an announcement: %s", error)
            return
        if sequence == self._sequence:
            return
        self._counts["announcements"] += 1
        if not stored:
            text = json.dumps({key: body[key].hex() for key in ("announcement", "signature")})
            durable.write_text(self.root / ANNOUNCEMENT, text)
        self._sequence = sequence
        self._give_up()
        runs = _manifest_hash(bundle_path(self.root, self._running))
        if info.version > self._running or info.rollback:
            self._target, self._resume_s = info, 0.0
        elif info.version < self._running or runs == info.manifest_sha256:
            log.info("version %d is announced; %d runs already", info.version, self._running)
        else:  # a person has to look: whoever announced it waits for us
            self._ready.put(Refused(f"version {info.version} is announced, but what runs is another run's"))

    def _give_up(self) -> None:
        if self._assembly is not None:
            self._assembly.close()
        self._target = self._manifest = self._assembly = None
        self._contract_seen = False

    def _pause(self, count: str, error: Exception) -> None:
        """Begin this bundle again in a while, from what is on the disk."""
        self._counts[count] += 1
        log.error("version %s: %s; trying again in %.0f s", self._target and self._target.version, error, BACK_OFF_S)
        target = self._target
        self._give_up()
        self._target, self._resume_s = target, time.monotonic() + BACK_OFF_S

    def _go_on(self) -> None:
        """The next step towards the announced bundle: look for it here, ask for its manifest, its blocks, finish."""
        now_s = time.monotonic()
        if self._end.ready and now_s - self._asked_current_s > ASK_CURRENT_S:
            self._asked_current_s = now_s
            self._end.send(encode("current", {}))
        if self._end.ready and now_s - self._heard_s > SILENCE_S:
            self._heard_s = now_s
            self._end.doubt()
        if self._target is None or now_s < self._resume_s:
            return
        if self._assembly is None:
            self._begin(self._target, now_s)
            return
        self._assembly.settle()
        self._check_contract(self._target, self._assembly)
        if self._assembly.complete:
            self._finish(self._target, self._assembly)
        elif self._end.ready:
            if now_s - self._block_s > self._block_silence_s:
                self._block_s, self._block_silence_s = now_s, 2 * self._block_silence_s
                self._assembly.ask_again()
            if wanted := self._assembly.wants(WINDOW, WINDOW_BYTES):
                self._end.send(encode("want", {"hashes": wanted}))

    def _begin(self, target: CheckpointInfo, now_s: float) -> None:
        """Use the bundle if it lies here already, else ask for its manifest."""
        folder = bundle_path(self.root, target.version)
        if _manifest_hash(folder) == target.manifest_sha256 and _is_whole(folder):
            self._require_contract(target, folder)
            self._hand_out(target, folder)
        elif self._end.send(encode("want", {"hashes": [target.manifest_sha256]})):
            self._resume_s = now_s + SILENCE_S  # ask again then, unless it comes before

    def _take(self, message: Message) -> None:
        sha, data = text(message.body, "hash"), message.body.get("data")
        if message.kind == "current":
            self._consider(message.body)
        elif message.kind == "absent" and self._target is not None:
            raise CorruptData(f"the publisher does not have block {sha[:16]}")
        elif message.kind == "block" and self._target is not None and isinstance(data, memoryview):
            if self._assembly is None and sha == self._target.manifest_sha256:
                self._take_manifest(self._target, bytes(data))
            elif self._assembly is not None:
                self._block_s, self._block_silence_s = self._heard_s, BLOCK_SILENCE_S
                if self._assembly.put(sha, data):
                    self._counts["bytes_fetched"] += len(data)

    def _take_manifest(self, target: CheckpointInfo, manifest: bytes) -> None:
        info = info_of(manifest)
        if info.manifest_sha256 != target.manifest_sha256 or info.version != target.version:
            raise CorruptData(f"the manifest of version {target.version} is not the announced one")
        files = read_files(manifest, MAX_BUNDLE_BYTES)
        if CONTRACT not in files:
            raise CorruptData(f"the bundle has no {CONTRACT}")
        incoming = self.root / INCOMING
        name = target.manifest_sha256[:32]
        for other in incoming.glob("*"):
            if other.name != name:
                shutil.rmtree(other)
        self._manifest, self._resume_s, self._block_s = manifest, 0.0, self._heard_s
        self._assembly = Assembly(
            incoming / name, dict(sorted(files.items(), key=_contract_first)), self._local(), WORKERS
        )
        self._counts["bytes_reused"] += self._assembly.bytes_local
        self._check_contract(target, self._assembly)

    def _local(self) -> BlockSource:
        """Blocks of the bundles that are here: what did not change does not travel."""
        source = BlockSource()
        for folder in bundles(self.root).values():
            try:
                source.add(folder, read_manifest(folder)[1])
            except CorruptData as error:
                log.warning("%s is of no use: %s", folder, error)
        return source

    def _check_contract(self, target: CheckpointInfo, assembly: Assembly) -> None:
        """Before gigabytes travel: is this bundle for our embodiment? `poll` raises SchemaMismatch if not."""
        if not self._contract_seen and assembly.has(CONTRACT):
            self._require_contract(target, assembly.folder)
            self._contract_seen = True

    def _require_contract(self, target: CheckpointInfo, folder: Path) -> None:
        what = f"checkpoint version {target.version}"
        try:
            theirs = Embodiment.load(folder / CONTRACT)
            if theirs.contract_hash != target.contract_hash:
                raise SchemaMismatch(f"{what}: its contract is not the announced one ({target.contract_hash})")
            self.embodiment.require_same(theirs, what, self._allow)
        except ValueError as error:
            self._give_up()
            raise SchemaMismatch(f"{what}: {error}") from error
        except SchemaMismatch:
            self._give_up()  # until another one is announced
            raise

    def _finish(self, target: CheckpointInfo, assembly: Assembly) -> None:
        assert self._manifest is not None
        assembly.finish()
        folder = bundle_path(self.root, target.version)
        finish_bundle(assembly.folder, folder, self._manifest)
        self._counts["bundles"] += 1
        prune_bundles(self.root, self._keep, {target.version, target.parent_version, self._running})
        self._hand_out(target, folder)

    def _hand_out(self, target: CheckpointInfo, folder: Path) -> None:
        self._give_up()
        log.info("version %d is ready in %s", target.version, folder)
        self._ready.put(folder)


def bundle_to_run(root: Path) -> Path | None:
    """What a server starts with: the newest bundle, unless the last accepted announcement went back to another."""
    newest = latest_bundle(root)
    try:
        info, _ = open_announcement(_accepted(root), None)  # whose it is was checked when it was accepted
    except CorruptData:
        return newest
    folder = bundle_path(root, info.version)
    return folder if info.rollback and _manifest_hash(folder) == info.manifest_sha256 else newest


def _accepted(root: Path) -> dict[str, bytes]:
    """The last announcement that was accepted; empty where there is none."""
    try:
        stored = json.loads((root / ANNOUNCEMENT).read_text())
        return {key: bytes.fromhex(value) for key, value in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); waiting for the publisher", root / ANNOUNCEMENT, error)
        return {}


def _manifest_hash(folder: Path) -> str | None:
    try:
        return read_manifest(folder)[0].manifest_sha256
    except CorruptData:
        return None


def _is_whole(folder: Path) -> bool:
    try:
        verify_bundle(folder)
    except CorruptData as error:
        log.warning("fetching %s again: %s", folder, error)
        return False
    return True


def _contract_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] != CONTRACT, item[0]
