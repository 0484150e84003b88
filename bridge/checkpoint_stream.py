"""Checkpoints from the learner to policy servers: announce, fetch, verify, confirm.

    publisher  --PUB-->     announcement (signed): version, manifest's SHA-256, sequence number
    subscriber --DEALER-->  hello, `current`, `want` [hashes], `confirm` version + manifest's SHA-256 (as in hello)
    publisher  --ROUTER-->  welcome and `current` (the announcement again), `block` hash + bytes, `absent` hash

What is announced over PUB may be lost: the same announcement is in the welcome and is asked for every few seconds. A
subscriber acts on an announcement only if an allowed learner signed it (where keys are used) and its sequence number
is new, so neither a stolen transport key nor a recording of old traffic can change weights.
"""

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import zmq

from bridge import durable
from bridge.announcement import open_announcement, pack_announcement
from bridge.checkpoint import MANIFEST, bundle_path, bundles, prune_bundles, read_manifest
from bridge.checkpoint_fetch import LIMITS, WINDOW, CheckpointSubscriber
from bridge.codec import Blob, encode, text
from bridge.errors import BridgeTimeout
from bridge.handshake import Caller, ListenerEnd
from bridge.keys import Keys
from bridge.messages import CheckpointInfo
from bridge.sockets import Transport, endpoint_of
from bridge.transfer import BlockSource

__all__ = ["CheckpointPublisher", "CheckpointSubscriber"]

ANNOUNCED = "announced.json"
MAX_WANTED = 8 * WINDOW  # hashes that one subscriber may have waiting here; ours asks for WINDOW


class CheckpointPublisher:
    """Announces bundles in `root` and serves their blocks from a thread of its own.

    max_bytes_per_s bounds what is sent to all subscribers together. The last announcement is kept in `root`, so that a
    publisher that was restarted goes on where it was.
    """

    def __init__(
        self,
        announce_endpoint: str,
        fetch_endpoint: str,
        root: Path,
        *,
        keys: Keys | None = None,
        max_bytes_per_s: float | None = None,
        keep: int | None = None,
    ):
        self.root, self._keys, self._keep = Path(root), keys, keep
        self._transport = Transport(keys)
        self._announcer = self._transport.bind(zmq.PUB, announce_endpoint, "checkpoints", LIMITS)
        self.announce_endpoint = endpoint_of(self._announcer)
        self._end = ListenerEnd(fetch_endpoint, "checkpoints", None, keys=keys, limits=LIMITS, welcome=self._welcome)
        self.fetch_endpoint = self._end.endpoint
        self._rate = Rate(max_bytes_per_s)
        self._wanted: dict[str, tuple[Caller, dict[str, None]]] = {}  # by subscriber's uid, in turn
        self._source, self._manifests = BlockSource(), {}
        self._announced: dict[str, bytes] = {}
        self._sequence = 0
        self._confirmed: dict[str, tuple[int, str]] = {}  # subscriber's uid -> version, name
        self._changed = threading.Condition()
        self._counts = dict.fromkeys(("announced", "bytes_sent", "blocks_sent", "absent"), 0)
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._restore()
        self._thread = threading.Thread(target=self._run, name="checkpoint-publisher", daemon=True)
        self._thread.start()

    def announce(self, version: int) -> CheckpointInfo:
        """Make `version` (a finished bundle in `root`) the one that everybody should run.

        Announcing the announced version again repeats the announcement. Raises CorruptData when there is no such
        bundle, ValueError when it is older than the announced one or is not what was announced under its version.
        """
        return self._announce(version, rollback=False)

    def rollback(self, version: int) -> CheckpointInfo:
        """Take everybody back to an older version, which must still be in `root`."""
        return self._announce(version, rollback=True)

    def wait_confirmed(self, version: int, count: int = 1, timeout_s: float = 60.0) -> list[str]:
        """Names of the subscribers that run `version`, once there are `count`. Raises BridgeTimeout before that."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                self._raise_failure()
                names = [name for confirmed, name in self._confirmed.values() if confirmed == version]
                if len(names) >= count:
                    return sorted(names)
                if (left_s := until_s - time.monotonic()) <= 0:
                    raise BridgeTimeout(
                        f"version {version} was confirmed by {len(names)} of {count} within {timeout_s} s"
                    )
                self._changed.wait(min(left_s, 0.5))

    def stats(self) -> dict[str, Any]:
        with self._changed:
            confirmed = {name: version for version, name in self._confirmed.values()}
        return self._counts | self._end.counts | {"subscribers": len(self._end.callers), "confirmed": confirmed}

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._transport.close()

    def _announce(self, version: int, rollback: bool) -> CheckpointInfo:
        self._raise_failure()
        folder = bundle_path(self.root, version)
        info = read_manifest(folder)[0]
        with self._changed:
            current = open_announcement(self._announced, None)[0] if self._announced else None
            if current and version == current.version:
                if info.manifest_sha256 != current.manifest_sha256:
                    raise ValueError(f"{folder} is not the bundle that was announced as version {version}")
                self._announcer.send_multipart(encode("announce", self._announced), zmq.NOBLOCK)
                return current
            if current and rollback == (version > current.version):
                direction = "older" if rollback else "newer"
                raise ValueError(f"version {version} is not {direction} than {current.version}, which is announced")
            info = dataclasses.replace(info, rollback=rollback)
            self._add(folder)
            # Larger than every number before it, also when the file that remembers them was lost.
            self._sequence = max(self._sequence + 1, time.time_ns())
            self._announced = pack_announcement(info, self._sequence, self._keys)
            durable.write_text(self.root / ANNOUNCED, json.dumps({k: v.hex() for k, v in self._announced.items()}))
            self._announcer.send_multipart(encode("announce", self._announced), zmq.NOBLOCK)
            self._counts["announced"] += 1
        if self._keep is not None:
            self._prune(self._keep, {version, info.parent_version})
        return info

    def _restore(self) -> None:
        """Serve what lies in `root`, and go on announcing what was announced last."""
        found = bundles(self.root)
        for folder in found.values():
            self._add(folder)
        if (path := self.root / ANNOUNCED).exists():
            stored = {key: bytes.fromhex(value) for key, value in json.loads(path.read_text()).items()}
            info, self._sequence = open_announcement(stored, None)
            if info.version in found:
                self._announced = pack_announcement(info, self._sequence, self._keys)  # with the key of today

    def _add(self, folder: Path) -> None:
        info, files, _ = read_manifest(folder)
        self._source.add(folder, files)
        self._manifests[info.manifest_sha256] = folder

    def _prune(self, keep: int, protect: set[int]) -> None:
        for folder in prune_bundles(self.root, keep, protect):
            self._source.remove(folder)
            self._manifests = {sha: path for sha, path in self._manifests.items() if path != folder}

    def _run(self) -> None:
        """Answer what arrives; between two arrivals send one block, taking the subscribers in turn."""
        try:
            while not self._stop.is_set():
                arrived = self._end.receive(min(self._rate.wait_s(), 0.05) if self._wanted else 0.05)
                while arrived is not None:
                    self._answer(*arrived)
                    arrived = self._end.receive(0.0)
                if self._wanted and self._rate.wait_s() <= 0:
                    self._send_block()
        except BaseException as error:  # the owner must hear of it: announce and wait_confirmed raise it
            self._failure = error
            raise
        finally:
            self._end.close()

    def _answer(self, caller: Caller, message: Any) -> None:
        match message.kind:
            case "want":
                hashes = message.body.get("hashes")
                wanted = [sha for sha in hashes if isinstance(sha, str)] if isinstance(hashes, list) else []
                queue = self._wanted.setdefault(caller.uid, (caller, {}))[1]
                queue.update(dict.fromkeys(wanted[: MAX_WANTED - len(queue)]))
            case "current":
                self._end.send(caller, "current", self._announced)
            case "confirm":
                self._note_confirmed(caller, message.body)

    def _send_block(self) -> None:
        uid, (caller, queue) = next(iter(self._wanted.items()))
        del self._wanted[uid]
        if not queue:
            return
        sha = next(iter(queue))
        del queue[sha]
        data = self._block(sha)
        if data is None:
            self._counts["absent"] += 1
            self._end.send(caller, "absent", {"hash": sha[:80]})
        elif not self._end.send(caller, "block", {"hash": sha, "data": Blob(data)}):
            return  # gone; it says hello and asks again when it is back
        else:
            self._rate.spend(len(data))
            self._counts["bytes_sent"] += len(data)
            self._counts["blocks_sent"] += 1
        if queue:
            self._wanted[uid] = (caller, queue)

    def _block(self, sha: str) -> bytes | memoryview | None:
        if sha in self._manifests:
            return (self._manifests[sha] / MANIFEST).read_bytes()
        return self._source.get(sha)

    def _welcome(self, caller: Caller) -> dict[str, Any]:
        self._wanted.pop(caller.uid, None)  # a caller that comes back asks anew
        self._note_confirmed(caller, caller.hello)
        return self._announced

    def _note_confirmed(self, caller: Caller, body: dict[str, Any]) -> None:
        version, folder = body.get("policy_version"), self._manifests.get(text(body, "policy_manifest"))
        with self._changed:
            self._confirmed.pop(caller.uid, None)
            if isinstance(version, int) and folder == bundle_path(self.root, version):  # ours, not another run's
                self._confirmed[caller.uid] = (version, caller.name)
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class Rate:
    """Paces blocks so that on average `bytes_per_s` are sent; None: as fast as they go."""

    def __init__(self, bytes_per_s: float | None):
        if bytes_per_s is not None and bytes_per_s <= 0:
            raise ValueError(f"max_bytes_per_s {bytes_per_s}: more than 0, or none for no limit")
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0  # when all that was sent has been paid for

    def spend(self, num_bytes: int) -> None:
        if self._bytes_per_s is not None:
            self._free_s = max(self._free_s, time.monotonic()) + num_bytes / self._bytes_per_s

    def wait_s(self) -> float:
        return max(0.0, self._free_s - time.monotonic())
