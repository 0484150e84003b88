"""Robot side of the infer channel: observations out, action chunks back, or a BridgeTimeout for each request.

Requests carry an id and the time that they may take. The robot's loop never waits here (`submit`, `poll`); a failed
server or network costs timeouts while it lasts and nothing afterwards.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.codec import DEFAULT_LIMITS, Limits, encode, field, observation_body, text
from bridge.embodiment import Embodiment
from bridge.errors import BridgeError, BridgeTimeout, CorruptData, Refused, SchemaMismatch
from bridge.handshake import CallerEnd
from bridge.keys import Keys
from bridge.messages import ActionChunk, Observation
from bridge.pictures import CODINGS, PictureFormat, compress
from bridge.shared_pictures import PictureWriter
from bridge.sockets import is_local

SILENCE_S = 1.0  # of a server that lets requests time out, before it is greeted anew
ANSWERED_ERRORS = {error.__name__: error for error in (BridgeTimeout, CorruptData, Refused, SchemaMismatch)}


@dataclass
class Pending:
    frames: list[Any]
    deadline_s: float  # absolute, monotonic
    asked_s: float
    sent: bool = False


class PolicyClient:
    """One thread only. Pictures are sent without a copy: leave an observation's arrays unchanged until its answer.
    picture_coding: `raw` (loopback, gigabit), `jpeg` or the lossless `png` for slower links.
    resize_pictures: prepare them here, at the size and by the resize that the server names, instead of at the server.
    shared_pictures: raw pictures go through shared memory where the server is on this machine and can reach it.

    Example:
        client = PolicyClient("tcp://127.0.0.1:5601", embodiment)
        client.submit(observation, deadline_s=0.2)
        ...
        chunk = client.poll()  # None, or an ActionChunk, or raises BridgeTimeout
    """

    def __init__(
        self,
        endpoint: str,
        embodiment: Embodiment,
        *,
        role: str = "robot",
        keys: Keys | None = None,
        max_in_flight: int = 2,
        limits: Limits = DEFAULT_LIMITS,
        allow_contract_mismatch: list[str] | None = None,
        picture_coding: str = "raw",
        resize_pictures: bool = False,
        shared_pictures: bool = True,
    ):
        if picture_coding not in CODINGS:
            raise ValueError(f"picture_coding {picture_coding!r}: allowed are {', '.join(CODINGS)}")
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight {max_in_flight}: at least 1")
        self.policy_version = -1
        self.max_in_flight = max_in_flight
        self._picture_coding, self._resize_pictures = picture_coding, resize_pictures
        self._picture_format: PictureFormat | None = None
        self._period_ns = round(1e9 / embodiment.policy_rate_hz)
        self._pending: dict[int, Pending] = {}
        self._expired: deque[BridgeError] = deque()
        self._newest: tuple[int, ActionChunk] | None = None
        self._next_id = 1
        self._heard_s = self._doubted_s = 0.0
        self._counts = dict.fromkeys(("submitted", "answered", "timeouts", "late", "superseded", "errors"), 0)
        self._round_trips_s: deque[float] = deque(maxlen=1000)
        self._writer: PictureWriter | None = None
        if shared_pictures and picture_coding == "raw" and is_local(endpoint):
            slot_bytes = sum(3 * camera.height * camera.width for camera in embodiment.cameras.values())
            self._writer = PictureWriter(max_in_flight, slot_bytes)
        self._end = CallerEnd(
            endpoint,
            "infer",
            embodiment,
            role=role,
            keys=keys,
            limits=limits,
            hello=self._hello,
            allow_contract_mismatch=allow_contract_mismatch,
        )
        self._welcomes = 0

    def submit(self, observation: Observation, deadline_s: float) -> int:
        """Ask for a chunk within `deadline_s` from now. Returns the request's id and never waits.

        While the server is away the request is kept here and sent if the server returns before the deadline.
        Raises BridgeError when `max_in_flight` requests are waiting, SchemaMismatch when the contracts differ.
        """
        if deadline_s <= 0:
            raise ValueError(f"deadline_s {deadline_s}: it is a duration from now, more than 0")
        self._pump(0.0)
        if len(self._pending) >= self.max_in_flight:
            raise BridgeError(f"{len(self._pending)} requests are in flight already; poll until one ends")
        request, self._next_id = self._next_id, self._next_id + 1
        now_s = time.monotonic()
        body = observation_body(observation) | self._pictures(request, observation.images)
        body |= {"id": request, "budget_s": float(deadline_s), "sent_ns": round(now_s * 1e9)}
        self._pending[request] = Pending(encode("infer", body), now_s + deadline_s, now_s)
        self._counts["submitted"] += 1
        self._send_pending()
        return request

    def poll(self) -> ActionChunk | None:
        """The newest finished chunk, each once; older ones are dropped. Never waits.

        Raises BridgeTimeout once for each request whose deadline has passed, and for each request that the server
        could not serve the error it answered with.
        """
        self._pump(0.0)
        if self._expired:
            raise self._expired.popleft()
        if self._newest is None:
            return None
        chunk, self._newest = self._newest[1], None
        return chunk

    def infer(self, observation: Observation, deadline_s: float) -> ActionChunk:
        """Submit and wait for this very request. Raises BridgeTimeout or the server's error."""
        request = self.submit(observation, deadline_s)
        until_s = self._pending[request].deadline_s
        while request in self._pending:
            self._pump(max(0.0, until_s - time.monotonic()))
        if self._newest is not None and self._newest[0] == request:
            chunk, self._newest = self._newest[1], None
            return chunk
        raise self._expired.pop()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait for the handshake. Raises BridgeTimeout, SchemaMismatch or Refused."""
        until_s = time.monotonic() + timeout_s
        while not self._end.ready:
            if time.monotonic() > until_s:
                raise BridgeTimeout(f"no policy server at {self._end.endpoint} within {timeout_s} s")
            self._pump(0.02)

    def stats(self) -> dict[str, Any]:
        """Counters since the start; round trips of the last 1000 answers in milliseconds."""
        trips_ms = np.array(self._round_trips_s or [np.nan]) * 1e3
        return self._counts | {
            "ready": self._end.ready,
            "shared_pictures": self._writer is not None and bool(self._end.welcome.get("shared_pictures")),
            "handshakes": self._end.welcomes,
            "corrupt": self._end.corrupt,
            "in_flight": len(self._pending),
            "policy_version": self.policy_version,
            "round_trip_p50_ms": float(np.percentile(trips_ms, 50)),
            "round_trip_p99_ms": float(np.percentile(trips_ms, 99)),
        }

    def close(self) -> None:
        self._end.close()
        if self._writer is not None:
            self._writer.close()

    def _pump(self, timeout_s: float) -> None:
        """Take every waiting answer (waiting up to `timeout_s` for the first), then let passed deadlines expire."""
        message = self._end.receive(timeout_s)
        while message is not None:
            self._heard_s = time.monotonic()
            self._answer(message.kind, message.body)
            message = self._end.receive(0.0)
        if self._end.welcomes != self._welcomes:
            self._welcomes = self._end.welcomes
            for pending in self._pending.values():  # a server that was restarted knows none of them
                pending.sent = False
            version = self._end.welcome.get("policy_version")
            if isinstance(version, int):
                self.policy_version = version
            self._note_format(self._end.welcome)
        now_s = time.monotonic()
        for request in [r for r, p in self._pending.items() if p.deadline_s <= now_s]:
            pending = self._end_of(request)
            assert pending
            self._counts["timeouts"] += 1
            waited_ms = (now_s - pending.asked_s) * 1e3
            where = f"from {self._end.endpoint}" if pending.sent else f": {self._end.endpoint} is not connected"
            self._expired.append(BridgeTimeout(f"request {request}: no chunk after {waited_ms:.0f} ms {where}"))
            if now_s - max(self._heard_s, self._doubted_s) > SILENCE_S:
                self._doubted_s = now_s
                self._end.doubt()
        self._send_pending()

    def _note_format(self, body: dict[str, Any]) -> None:
        if self._resize_pictures:
            self._picture_format = PictureFormat.from_message(body.get("pictures"))

    def _pictures(self, request: int, images: dict[str, np.ndarray]) -> dict[str, Any]:
        if self._resize_pictures and self._picture_format is not None:
            images = {name: self._picture_format.apply(image) for name, image in images.items()}
        shared = self._writer is not None and self._end.welcome.get("shared_pictures")
        if shared and (told := self._writer.write(request, images)):
            return {"images": None, "shared": told}
        return {"images": {name: compress(image, self._picture_coding) for name, image in images.items()}}

    def _end_of(self, request: int) -> Pending | None:
        """The request that has ended, if it was waited for."""
        if self._writer is not None:
            self._writer.release(request)
        return self._pending.pop(request, None)

    def _hello(self) -> dict[str, Any]:
        return {"policy_version": self.policy_version, "pictures": self._writer and self._writer.offer()}

    def _send_pending(self) -> None:
        for pending in self._pending.values():
            if not pending.sent and self._end.ready:
                pending.sent = self._end.send(pending.frames)

    def _answer(self, kind: str, body: dict[str, Any]) -> None:
        request = body.get("id")
        if not isinstance(request, int) or (pending := self._end_of(request)) is None:
            self._counts["late"] += 1
            return
        try:
            if kind == "error":
                self._counts["errors"] += 1
                error = ANSWERED_ERRORS.get(text(body, "error"), BridgeError)
                raise error(f"policy server, request {request}: {body.get('message')}")
            chunk = self._chunk(body)
        except BridgeError as error:
            self._expired.append(error)
            return
        self._counts["answered"] += 1
        self._round_trips_s.append(self._heard_s - pending.asked_s)
        self.policy_version = chunk.policy_version
        if self._newest is None or request > self._newest[0]:
            self._counts["superseded"] += self._newest is not None
            self._newest = (request, chunk)
        else:
            self._counts["superseded"] += 1

    def _chunk(self, body: dict[str, Any]) -> ActionChunk:
        actions = field(body, "actions", np.ndarray)
        if actions.dtype != np.float32 or actions.ndim != 2 or actions.shape[1] != 7 or not len(actions):
            raise CorruptData(f"actions: expected float32 [H, 7], got {actions.dtype} {list(actions.shape)}")
        if not np.isfinite(actions).all():
            raise CorruptData("actions hold numbers that are not finite")
        start_ns, version = field(body, "start_ns", int), field(body, "policy_version", int)
        self._note_format(body)
        return ActionChunk(actions, start_ns, field(body, "period_ns", int), version)
