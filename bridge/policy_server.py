"""Learner side of the infer channel: waiting observations in, one batched call, chunks and errors out by id.

Batching is fair: each batch takes one request of each robot in turn before a second of any. A request that has waited
past its deadline is dropped unanswered (its robot has given up), so a backlog never delays what still matters.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.codec import DEFAULT_LIMITS, Limits, field, observation_from_body
from bridge.embodiment import Embodiment
from bridge.errors import BridgeError, CorruptData
from bridge.handshake import Caller, ListenerEnd
from bridge.keys import Keys
from bridge.messages import Observation
from bridge.pictures import PictureFormat, open_picture
from bridge.shared_pictures import PictureReader

log = logging.getLogger(__name__)

MAX_WAITING_PER_ROBOT = 8
Infer = Callable[[list[Observation]], tuple[np.ndarray, int]]


@dataclass
class Request:
    caller: Caller
    id: int
    observation: Observation
    deadline_s: float  # absolute, this machine's monotonic clock


class PolicyServer:
    """`infer` gets up to `max_batch` observations; it returns actions float32 [n, H, 7] and the version that made them.
    Pictures may lie in memory that is written anew once their request is answered: copy what has to outlive the call.

    A ValueError, RuntimeError or ArithmeticError of `infer` is answered to the robots of that batch and logged;
    anything else ends the server (after answering). `pictures`: at which size and by which resize the policy takes
    its pictures, for robots that prepare them before they send; it may change with the policy, at any time.
    """

    def __init__(
        self,
        endpoint: str,
        embodiment: Embodiment,
        infer: Infer,
        *,
        max_batch: int,
        keys: Keys | None = None,
        limits: Limits = DEFAULT_LIMITS,
        policy_version: int = -1,
        pictures: PictureFormat | None = None,
    ):
        if max_batch < 1:
            raise ValueError(f"max_batch {max_batch}: at least 1")
        self.embodiment, self.max_batch, self.policy_version = embodiment, max_batch, policy_version
        self.pictures = pictures
        self._infer = infer
        self._waiting: dict[bytes, deque[Request]] = {}
        self._turn: deque[bytes] = deque()  # whose request is next
        names = ("requests", "answered", "expired", "overflow", "errors", "batches")
        self._counts = dict.fromkeys(names, 0)
        self._batch_sizes: deque[int] = deque(maxlen=1000)
        self._infer_s: deque[float] = deque(maxlen=1000)
        self._end = ListenerEnd(
            endpoint, "infer", embodiment, keys=keys, limits=limits, welcome=self._welcome, open_picture=open_picture
        )
        self.endpoint = self._end.endpoint

    def serve_forever(self, stop: threading.Event) -> None:
        """Serve until `stop`, then close the socket. Call it from one thread."""
        try:
            while not stop.is_set():
                arrived = self._end.receive(0.0 if self._turn else 0.05)
                while arrived is not None:
                    self._take(*arrived)
                    arrived = self._end.receive(0.0)
                if batch := self._next_batch():
                    self._serve(batch)
        finally:
            self._end.close()

    def stats(self) -> dict[str, Any]:
        """Counters since the start; batch sizes and times of the last 1000 batches."""
        infer_ms = np.array(self._infer_s or [np.nan]) * 1e3
        return (
            self._counts
            | self._end.counts
            | {
                "policy_version": self.policy_version,
                "robots": len(self._end.callers),
                "waiting": sum(map(len, list(self._waiting.values()))),
                "mean_batch": float(np.mean(self._batch_sizes or [0])),
                "infer_p50_ms": float(np.percentile(infer_ms, 50)),
                "infer_p99_ms": float(np.percentile(infer_ms, 99)),
            }
        )

    def _welcome(self, caller: Caller) -> dict[str, Any]:
        caller.pictures = PictureReader.attach(caller.hello.get("pictures"))
        about = {"policy_version": self.policy_version, "pictures": self._picture_format()}
        return about | {"shared_pictures": caller.pictures is not None}

    def _picture_format(self) -> dict[str, Any] | None:
        return self.pictures.to_dict() if self.pictures else None

    def _take(self, caller: Caller, message: Any) -> None:
        """Queue a request, or answer what is wrong with it."""
        body, request = message.body, message.body.get("id")
        if message.kind != "infer" or not isinstance(request, int):
            self._end.counts["corrupt"] += 1
            return
        self._counts["requests"] += 1
        try:
            budget_s = field(body, "budget_s", float)
            if not 0.0 < budget_s <= 3600.0:
                raise CorruptData(f"budget_s {budget_s}: allowed are 0 to 3600")
            deadline_s = time.monotonic() + budget_s - caller.age_s(field(body, "sent_ns", int))
            if caller.pictures is not None and body.get("images") is None:
                body["images"] = caller.pictures.read(request, field(body, "shared", dict))
            observation = observation_from_body(body, tuple(self.embodiment.cameras))
        except BridgeError as error:
            self._answer_error(caller, request, error)
            return
        queue = self._waiting.setdefault(caller.route, deque())
        if len(queue) >= MAX_WAITING_PER_ROBOT:
            queue.popleft()
            self._counts["overflow"] += 1
        if not queue and caller.route not in self._turn:
            self._turn.append(caller.route)
        queue.append(Request(caller, request, observation, deadline_s))

    def _next_batch(self) -> list[Request]:
        batch: list[Request] = []
        now_s = time.monotonic()
        while self._turn and len(batch) < self.max_batch:
            route = self._turn.popleft()
            queue = self._waiting[route]
            while queue and queue[0].deadline_s <= now_s:
                queue.popleft()
                self._counts["expired"] += 1
            if queue:
                batch.append(queue.popleft())
            if queue:
                self._turn.append(route)
            else:
                del self._waiting[route]
        return batch

    def _serve(self, batch: list[Request]) -> None:
        started_s = time.monotonic()
        try:
            actions, version = self._infer([request.observation for request in batch])
            actions = np.asarray(actions, dtype=np.float32)
            if actions.ndim != 3 or actions.shape[0] != len(batch) or actions.shape[2] != 7:
                raise ValueError(f"the policy returned actions {list(actions.shape)} for {len(batch)} observations")
        except BaseException as error:
            for request in batch:
                self._answer_error(request.caller, request.id, error)
            if not isinstance(error, ValueError | RuntimeError | ArithmeticError):
                raise
            log.exception("the policy failed on a batch of %d", len(batch))
            return
        self.policy_version = version
        self._counts["batches"] += 1
        self._batch_sizes.append(len(batch))
        self._infer_s.append(time.monotonic() - started_s)
        period_ns = round(1e9 / self.embodiment.policy_rate_hz)
        for request, chunk in zip(batch, actions, strict=True):
            body = {
                "id": request.id,
                "actions": chunk,
                "start_ns": request.observation.stamp_ns,
                "period_ns": period_ns,
                "policy_version": int(version),
                "pictures": self._picture_format(),
            }
            self._counts["answered"] += self._end.send(request.caller, "chunk", body)

    def _answer_error(self, caller: Caller, request: int, error: BaseException) -> None:
        self._counts["errors"] += 1
        body = {"id": request, "error": type(error).__name__, "message": f"{type(error).__name__}: {error}"[:500]}
        self._end.send(caller, "error", body)
