"""Finished episodes from robots to the learner's data set: kept until they are known to be there.

    sender   --DEALER-->  hello, `offer` uuid + manifest, `block` hash + bytes
    receiver --ROUTER-->  welcome, `want` uuid + hashes, `stored` uuid, `busy` uuid, `refused_episode` uuid + reason

The sender's spool is a folder on the robot's disk; an episode leaves it when the receiver has said `stored`, which it
does after `DatasetStore.append` returned (durable, once for each uuid). Either side may be killed at any moment: the
sender offers again what is in the spool, the receiver asks for the blocks that it does not have. Order does not matter.
"""

import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from bridge import durable
from bridge.codec import Blob, Limits, Message, encode, field, text
from bridge.dataset import DatasetStore
from bridge.embodiment import Embodiment
from bridge.episode import read_record
from bridge.errors import BridgeError, BridgeTimeout, CorruptData, Refused, SchemaMismatch, SpoolFull
from bridge.handshake import Caller, CallerEnd, ListenerEnd
from bridge.keys import Keys
from bridge.transfer import Assembly, BlockSource, describe, read_files

log = logging.getLogger(__name__)

LIMITS = Limits(frames=2, frame_bytes=16 * 1024 * 1024)
MAX_EPISODE_BYTES = 16 * 1024**3
WINDOW = 8
OFFER_AGAIN_S = 10.0  # after this long without a word about the episode; a slow link may need as long for one block
BUSY_S = 2.0  # before an episode is offered again to a learner that could not take it
MANIFEST, REFUSED = "manifest.json", "refused"  # in the spool; no uuid is as short
UUID = re.compile(r"[0-9a-zA-Z-]{8,64}")


class DemoSender:
    """Robot side. `enqueue` returns when the episode is in the spool, on the disk; a thread of its own sends.

    spool_dir is this sender's alone. max_spool_bytes bounds what waits there: `enqueue` raises SpoolFull beyond it.
    An episode that the learner refuses for good moves to `<spool_dir>/refused/` and is counted, never deleted.
    """

    def __init__(
        self,
        endpoint: str,
        embodiment: Embodiment,
        spool_dir: Path,
        *,
        keys: Keys | None = None,
        max_spool_bytes: int = 20 * 1024**3,
    ):
        self.spool_dir, self.max_spool_bytes = Path(spool_dir), max_spool_bytes
        durable.make_folder(self.spool_dir)
        for unfinished in self.spool_dir.glob(".*"):
            shutil.rmtree(unfinished)
        self._end = CallerEnd(endpoint, "demos", embodiment, role="robot", keys=keys, limits=LIMITS)
        self._error: BaseException | None = None  # why nothing is being sent, if a person has to look
        self._changed = threading.Condition()
        self._offered: tuple[Path, str, BlockSource] | None = None
        self._heard_s, self._welcomes = 0.0, 0
        self._wait_until_s: dict[str, float] = {}  # episodes that the learner cannot take just now
        self._counts = dict.fromkeys(("enqueued", "stored", "refused", "bytes_sent", "offers"), 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo-sender", daemon=True)
        self._thread.start()

    def enqueue(self, episode_folder: Path) -> None:
        """Take a finished episode: linked (copied across file systems) into the spool; the folder itself may go.

        Whether the learner can be reached does not matter here. Raises CorruptData when the folder is no finished
        episode, SpoolFull when it does not fit.
        """
        record = read_record(episode_folder)
        if not UUID.fullmatch(record.uuid):
            raise CorruptData(f"{episode_folder}: uuid {record.uuid!r}: expected 8 to 64 letters, digits and '-'")
        names = sorted(path.name for path in episode_folder.iterdir())
        size = sum((episode_folder / name).stat().st_size for name in names)
        waiting = self._spool_bytes()
        if waiting + size > self.max_spool_bytes:
            raise SpoolFull(
                f"{self.spool_dir} holds {waiting / 1e9:.2f} GB of unsent episodes; with {size / 1e9:.2f} GB more it "
                f"would exceed {self.max_spool_bytes / 1e9:.2f} GB. Is the learner reachable at {self._end.endpoint}?"
            )
        target = self.spool_dir / record.uuid
        if not target.exists():
            unfinished = self.spool_dir / f".{record.uuid}.{time.time_ns()}.new"
            try:
                durable.make_folder(unfinished)
                for name in names:
                    durable.place(episode_folder / name, unfinished / name)
                files = {name: describe(unfinished / name).to_json() for name in names}
                durable.write_text(unfinished / MANIFEST, json.dumps({"uuid": record.uuid, "files": files}))
                durable.replace(unfinished, target)
            except OSError:  # a full disk: leave nothing that fills it further
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        self._counts["enqueued"] += 1

    def pending(self) -> int:
        """Episodes in the spool that the learner has not acknowledged."""
        return len(self._waiting())

    def flush(self, timeout_s: float) -> None:
        """Wait until every episode was acknowledged.

        Raises BridgeTimeout, SchemaMismatch or Refused when the learner does not let us in, OSError when our disk is
        full or fails; nothing is lost then.
        """
        until_s = time.monotonic() + timeout_s
        while left := self.pending():
            if self._error is not None:
                raise self._error
            if time.monotonic() > until_s:
                raise BridgeTimeout(f"{left} episodes in {self.spool_dir} were not acknowledged within {timeout_s} s")
            with self._changed:
                self._changed.wait(0.05)

    def stats(self) -> dict[str, Any]:
        counts = {"pending": self.pending(), "spool_bytes": self._spool_bytes(), "connected": self._end.ready}
        return self._counts | counts | {"error": str(self._error) if self._error else None}

    def close(self) -> None:
        """Stop sending; what is unsent stays in the spool for the next sender."""
        self._stop.set()
        self._thread.join()

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._step()
                except (Refused, SchemaMismatch, OSError) as error:  # it is tried again, and somebody must look
                    if self._error is None:
                        log.error("%s", error)
                    self._error = error
                    if isinstance(error, OSError):  # a full or failing disk; what is in the spool stays there
                        self._stop.wait(BUSY_S)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._end.close()

    def _step(self) -> None:
        message = self._end.receive(0.05)
        while message is not None:
            self._take(message)
            message = self._end.receive(0.0)
        now_s = time.monotonic()
        if self._end.welcomes != self._welcomes:  # a learner that was restarted knows of no offer
            self._welcomes, self._offered = self._end.welcomes, None
        if not self._end.ready:
            self._offered = None
        elif self._offered is None:
            self._error = None
            self._offer_next(now_s)
        elif now_s - self._heard_s > OFFER_AGAIN_S:
            self._offered = None
            self._end.doubt()

    def _offer_next(self, now_s: float) -> None:
        for folder in self._waiting():
            if self._wait_until_s.get(folder.name, 0.0) > now_s:
                continue
            manifest = (folder / MANIFEST).read_bytes()
            source = BlockSource()
            source.add(folder, read_files(manifest, MAX_EPISODE_BYTES))
            digest = hashlib.sha256(manifest).hexdigest()
            offer = {"uuid": folder.name, "sha256": digest, "manifest": Blob(manifest)}
            if self._end.send(encode("offer", offer)):
                self._offered, self._heard_s = (folder, folder.name, source), now_s
                self._counts["offers"] += 1
            return

    def _take(self, message: Message) -> None:
        if self._offered is None or text(message.body, "uuid") != self._offered[1]:
            return  # about an episode that was given up: it will be offered again
        folder, uuid, source = self._offered
        self._heard_s = time.monotonic()
        match message.kind:
            case "want":
                for sha in field(message.body, "hashes", list)[:WINDOW]:
                    data = source.get(sha) if isinstance(sha, str) else None
                    if data is not None:
                        self._end.send(encode("block", {"uuid": uuid, "hash": sha, "data": Blob(data)}))
                        self._counts["bytes_sent"] += len(data)
            case "stored":
                self._offered = None
                source.remove(folder)
                self._drop(folder)
                self._counts["stored"] += 1
            case "busy":
                self._offered = None
                self._wait_until_s[uuid] = self._heard_s + BUSY_S
            case "refused_episode":
                self._offered = None
                self._wait_until_s[uuid] = self._heard_s + 2 * BUSY_S  # others first, should our disk be full
                reason = str(message.body.get("reason"))
                log.error("the learner refused episode %s: %s", uuid, reason)
                durable.make_folder(self.spool_dir / REFUSED)
                durable.write_text(folder / "refused.txt", reason + "\n")
                shutil.rmtree(self.spool_dir / REFUSED / uuid, ignore_errors=True)
                folder.rename(self.spool_dir / REFUSED / uuid)
                self._counts["refused"] += 1
        with self._changed:
            self._changed.notify_all()

    def _drop(self, folder: Path) -> None:
        gone = folder.with_name(f".{folder.name}.{time.time_ns()}.stored")
        durable.replace(folder, gone)  # one step, so that a kill cannot leave half an episode in the spool
        shutil.rmtree(gone)

    def _waiting(self) -> list[Path]:
        entries = [e for e in os.scandir(self.spool_dir) if UUID.fullmatch(e.name)]
        with contextlib.suppress(FileNotFoundError):  # sent meanwhile
            entries.sort(key=lambda e: e.stat().st_mtime_ns)
        return [Path(e.path) for e in entries]

    def _spool_bytes(self) -> int:
        total = 0
        for folder in self._waiting():
            with contextlib.suppress(FileNotFoundError):
                total += sum(entry.stat().st_size for entry in os.scandir(folder))
        return total


class DemoReceiver:
    """Learner side. `incoming_dir` (default: beside the data set) holds episodes under way; they survive a restart.

    Storing happens in a second thread, so that one robot's long episode does not keep the others from sending.
    """

    def __init__(
        self,
        endpoint: str,
        store: DatasetStore,
        *,
        keys: Keys | None = None,
        incoming_dir: Path | None = None,
        max_episode_bytes: int = MAX_EPISODE_BYTES,
    ):
        self._store, self._max_episode_bytes = store, max_episode_bytes
        self._incoming = incoming_dir or store.root.with_name(f"{store.root.name}.incoming")
        self._end = ListenerEnd(endpoint, "demos", store.embodiment, keys=keys, limits=LIMITS)
        self.endpoint = self._end.endpoint
        self._under_way: dict[str, tuple[Caller, Assembly]] = {}
        self._to_store: queue.SimpleQueue[tuple[Caller, str, Path] | None] = queue.SimpleQueue()
        self._storing: set[str] = set()
        self._results: queue.SimpleQueue[tuple[Caller, str, BaseException | None]] = queue.SimpleQueue()
        self._counts = dict.fromkeys(
            ("offers", "stored", "duplicates", "bytes_received", "refused_episodes", "busy"), 0
        )

    def serve_forever(self, stop: threading.Event) -> None:
        """Receive until `stop`, then close. Raises what broke the storing thread, if anything did."""
        self._known = self._store.uuids()
        worker = threading.Thread(target=self._store_all, name="demo-store", daemon=True)
        worker.start()
        try:
            while not stop.is_set():
                arrived = self._end.receive(0.02)
                while arrived is not None:
                    self._take(*arrived)
                    arrived = self._end.receive(0.0)
                self._report_stored()
        finally:
            self._to_store.put(None)
            worker.join()
            for _, assembly in self._under_way.values():
                assembly.close()
            self._end.close()

    def stats(self) -> dict[str, Any]:
        return self._counts | self._end.counts | {"robots": len(self._end.callers), "under_way": len(self._under_way)}

    def _take(self, caller: Caller, message: Message) -> None:
        uuid = text(message.body, "uuid")
        if not UUID.fullmatch(uuid):
            self._end.counts["corrupt"] += 1
            return
        try:
            match message.kind:
                case "offer":
                    manifest = bytes(field(message.body, "manifest", memoryview))
                    if hashlib.sha256(manifest).hexdigest() == text(message.body, "sha256"):
                        self._take_offer(caller, uuid, manifest)
                    else:  # damaged under way; it will be offered again
                        self._end.counts["corrupt"] += 1
                case "block" if uuid in self._under_way:
                    self._take_block(caller, uuid, field(message.body, "hash", str), message.body)
        except CorruptData as error:
            self._forget(uuid)
            if message.kind == "offer":
                self._refuse(caller, uuid, error)
            else:  # a block that arrived damaged again and again
                self._busy(caller, uuid, error)
        except OSError as error:  # the disk is full or failing: the episode is safe with its robot
            self._forget(uuid)
            self._busy(caller, uuid, error)

    def _take_offer(self, caller: Caller, uuid: str, manifest: bytes) -> None:
        self._counts["offers"] += 1
        if uuid in self._known:
            self._counts["duplicates"] += 1
            shutil.rmtree(self._incoming / uuid, ignore_errors=True)  # of a kill between storing and clearing up
            self._end.send(caller, "stored", {"uuid": uuid})
            return
        if uuid in self._storing:
            self._end.send(caller, "want", {"uuid": uuid, "hashes": []})  # patience
            return
        files = read_files(manifest, self._max_episode_bytes)
        self._forget(uuid)
        self._under_way[uuid] = caller, Assembly(self._incoming / uuid, files)
        self._go_on(caller, uuid)

    def _take_block(self, caller: Caller, uuid: str, sha: str, body: dict[str, Any]) -> None:
        data = field(body, "data", memoryview)
        if self._under_way[uuid][1].put(sha, data):
            self._counts["bytes_received"] += len(data)
        self._go_on(caller, uuid)

    def _go_on(self, caller: Caller, uuid: str) -> None:
        assembly = self._under_way[uuid][1]
        if not assembly.complete:
            if wanted := assembly.wants(WINDOW):
                self._end.send(caller, "want", {"uuid": uuid, "hashes": wanted})
            return
        assembly.finish()
        del self._under_way[uuid]
        self._storing.add(uuid)
        self._to_store.put((caller, uuid, assembly.folder))

    def _forget(self, uuid: str) -> None:
        if uuid in self._under_way:
            self._under_way.pop(uuid)[1].close()

    def _store_all(self) -> None:
        """The storing thread: the only one that touches the data set."""
        while (job := self._to_store.get()) is not None:
            caller, uuid, folder = job
            try:
                if (found := read_record(folder).uuid) != uuid:
                    raise CorruptData(f"episode {uuid} says that it is {found}")
                self._store.append(folder)
                shutil.rmtree(folder)
                self._results.put((caller, uuid, None))
            except BaseException as error:
                self._results.put((caller, uuid, error))
                if not isinstance(error, BridgeError | OSError):
                    raise

    def _report_stored(self) -> None:
        while not self._results.empty():
            caller, uuid, error = self._results.get()
            self._storing.discard(uuid)
            if error is None:
                self._known.add(uuid)
                self._counts["stored"] += 1
                self._end.send(caller, "stored", {"uuid": uuid})
            elif isinstance(error, BridgeError):
                shutil.rmtree(self._incoming / uuid, ignore_errors=True)
                self._refuse(caller, uuid, error)
            elif isinstance(error, OSError):
                self._busy(caller, uuid, error)
            else:
                raise error

    def _refuse(self, caller: Caller, uuid: str, error: Exception) -> None:
        self._counts["refused_episodes"] += 1
        log.error("refused episode %s of %s: %s", uuid, caller.name, error)
        self._end.send(caller, "refused_episode", {"uuid": uuid, "reason": f"{type(error).__name__}: {error}"[:1000]})

    def _busy(self, caller: Caller, uuid: str, error: OSError | CorruptData) -> None:
        self._counts["busy"] += 1
        log.error("cannot take episode %s of %s now: %s", uuid, caller.name, error)
        self._end.send(caller, "busy", {"uuid": uuid})
