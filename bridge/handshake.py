"""The two ends of a request channel, DEALER and ROUTER, and the first message that each connection begins with.

A caller says `hello` (protocol version in the header, contract hash, policy version, role); the listener answers
`welcome`, `mismatch` (with its contract, so that the caller can name the fields) or `refused`. A listener that was
restarted knows nobody and answers anything else with `who`; the caller then says hello again. So either side may fail
and return at any time, and neither needs to be told.
"""

import logging
import math
import os
import socket as host
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq

from bridge.codec import DEFAULT_LIMITS, Limits, Message, decode, encode, text
from bridge.embodiment import Embodiment, differences
from bridge.errors import CorruptData, Refused, SchemaMismatch
from bridge.keys import CALLS, Keys
from bridge.shared_pictures import PictureReader
from bridge.sockets import Transport, endpoint_of, receive, send, watch_disconnects

log = logging.getLogger(__name__)

HELLO_AGAIN_S = 0.25
NOTICE_S = 0.25  # how long a wait goes on before a lost connection is noticed
MAX_CALLERS = 256
DRIFT = 1e-4  # two quartz clocks differ by less
FORGET_S = 300.0  # a caller that was silent this long has to say hello again


@dataclass
class Caller:
    """What a listener knows of the other end. `uid` is chosen by the caller and survives its reconnections."""

    route: bytes
    uid: str
    name: str
    role: str
    heard_s: float
    key: str | None = None
    hello: dict[str, Any] = field(default_factory=dict)
    clock_offset_s: float = math.inf  # our monotonic clock minus the caller's, plus the shortest transit seen
    offset_s: float = 0.0  # when that was seen
    pictures: PictureReader | None = None  # the infer channel's, of a caller on this machine

    def age_s(self, sent_ns: int) -> float:
        """How long a message, stamped by the caller's monotonic clock, was under way or waited in our socket.

        Counted beyond the fastest message so far: the listener may be busy for long between two looks at its socket, so
        the time of reading says nothing. The offset may rise by DRIFT, because two clocks never run equally fast.
        """
        now_s = time.monotonic()
        passed_s = now_s - sent_ns * 1e-9
        self.clock_offset_s = min(self.clock_offset_s + DRIFT * (now_s - self.offset_s), passed_s)
        self.offset_s = now_s
        return passed_s - self.clock_offset_s


class CallerEnd:
    """DEALER. One thread only. Nothing is sent before the welcome, and nothing waits for a server that is away."""

    def __init__(
        self,
        endpoint: str,
        channel: str,
        embodiment: Embodiment | None,
        *,
        role: str,
        keys: Keys | None = None,
        limits: Limits = DEFAULT_LIMITS,
        hello: Callable[[], dict[str, Any]] = dict,
        allow_contract_mismatch: list[str] | None = None,
    ):
        if role not in CALLS[channel]:
            raise ValueError(f"role {role!r} may not call the {channel} channel; allowed are {sorted(CALLS[channel])}")
        self.endpoint, self.embodiment, self.limits = endpoint, embodiment, limits
        self.role, self.uid, self.ready, self.welcome, self.welcomes = role, uuid.uuid4().hex, False, {}, 0
        self.corrupt = 0
        self._hello, self._hello_due_s = hello, 0.0
        self._accepted_hash: str | None = None
        self._allow = allow_contract_mismatch or []
        self._transport = Transport(keys)
        self._socket = self._transport.connect(zmq.DEALER, endpoint, channel, limits)
        self._disconnects = watch_disconnects(self._socket)

    def receive(self, timeout_s: float = 0.0) -> Message | None:
        """The next message that is not part of the handshake, None when `timeout_s` passed or we were just welcomed.

        Raises SchemaMismatch when the listener's protocol or contract is another, Refused when it will not serve us;
        both leave the handshake to be tried again by the next call, because the listener may be replaced.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            now_s = self._say_hello()
            try:
                wait_s = min(until_s - now_s, NOTICE_S if self.ready else self._hello_due_s - now_s)
                frames = receive(self._socket, self.limits, wait_s=wait_s)
            except CorruptData as error:
                self.corrupt += 1
                log.warning("%s: %s", self.endpoint, error)
                continue
            if frames is None:
                self._notice_disconnect()
                if time.monotonic() >= until_s:
                    return None
                continue
            try:
                message = decode(frames, self.limits)
            except CorruptData as error:
                self.corrupt += 1
                log.warning("%s: dropped an answer: %s", self.endpoint, error)
                continue
            was_ready = self.ready
            if not self._handshake(message):
                return message
            if self.ready and not was_ready:
                return None  # so that the owner sends what had to wait

    def send(self, frames: list[Any]) -> bool:
        """Hand encoded frames to the socket. False when not connected, not welcomed or the queue is full."""
        return self.ready and self._send(frames)

    def doubt(self) -> None:
        """Say hello again before anything else: the listener has been silent for too long."""
        self.ready = False

    def close(self) -> None:
        self._socket.disable_monitor()
        self._transport.close()

    def _notice_disconnect(self) -> None:
        """Whoever answers after a lost connection may be another process, so it is greeted anew."""
        while receive(self._disconnects) is not None:
            self.ready, self._hello_due_s = False, 0.0

    def _send(self, frames: list[Any]) -> bool:
        try:
            send(self._socket, frames)
        except zmq.Again:
            return False
        return True

    def _say_hello(self) -> float:
        """If it is due. Returns the time, monotonic."""
        now_s = time.monotonic()
        if self.ready or now_s < self._hello_due_s:
            return now_s
        body = {
            "uid": self.uid,
            "name": f"{host.gethostname()}:{os.getpid()}",
            "role": self.role,
            "contract_hash": self.embodiment.contract_hash if self.embodiment else None,
            "accepted_hash": self._accepted_hash,
            "policy_version": -1,
            "sent_ns": time.monotonic_ns(),
        }
        said = self._send(encode("hello", body | self._hello()))
        self._hello_due_s = now_s + (HELLO_AGAIN_S if said else 0.02)
        return now_s

    def _handshake(self, message: Message) -> bool:
        """Whether `message` was part of the handshake, and then dealt with."""
        match message.kind:
            case "welcome":
                if not self.ready:
                    self.ready, self.welcome, self.welcomes = True, message.body, self.welcomes + 1
            case "who":
                if self.ready:
                    self.ready, self._hello_due_s = False, 0.0
            case "mismatch":
                self._meet(message.body)
            case "refused":
                self.ready, self._hello_due_s = False, time.monotonic() + HELLO_AGAIN_S
                raise Refused(f"{self.endpoint}: {message.body.get('reason')}")
            case _:
                return False
        return True

    def _meet(self, body: dict[str, Any]) -> None:
        """The listener has another contract: raise, naming the fields, unless a person allowed each of them."""
        self.ready, self._hello_due_s = False, time.monotonic() + HELLO_AGAIN_S
        if self.embodiment is None:
            raise SchemaMismatch(f"{self.endpoint} asks for a contract where none is compared")
        try:
            theirs = Embodiment.from_dict(body["contract"])
            theirs_hash = theirs.contract_hash
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise SchemaMismatch(f"{self.endpoint} sent a contract that we cannot read: {error}") from error
        self.embodiment.require_same(theirs, f"the other end at {self.endpoint}", self._allow)
        log.warning("accepted a contract that differs in %s", differences(self.embodiment.to_dict(), theirs.to_dict()))
        self._accepted_hash, self._hello_due_s = theirs_hash, 0.0


class ListenerEnd:
    """ROUTER. One thread only. Hands out messages of welcomed callers; deals with everything else itself."""

    def __init__(
        self,
        endpoint: str,
        channel: str,
        embodiment: Embodiment | None,
        *,
        keys: Keys | None = None,
        limits: Limits = DEFAULT_LIMITS,
        welcome: Callable[[Caller], dict[str, Any]] = lambda caller: {},
        open_picture: Callable | None = None,
    ):
        self.channel, self.embodiment, self.limits = channel, embodiment, limits
        self.callers: dict[bytes, Caller] = {}
        self.counts = dict.fromkeys(("received", "corrupt", "refused", "unsendable"), 0)
        self._keys, self._welcome, self._open_picture = keys, welcome, open_picture
        self._transport = Transport(keys)
        self._socket = self._transport.bind(zmq.ROUTER, endpoint, channel, limits)
        self.endpoint = endpoint_of(self._socket)

    def receive(self, timeout_s: float = 0.0) -> tuple[Caller, Message] | None:
        """The next message of a welcomed caller, None when none came within `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        while True:
            frames: list[zmq.Frame] | None = []
            try:
                frames = receive(self._socket, self.limits, leading=1, wait_s=until_s - time.monotonic())
                if frames is None:
                    if time.monotonic() >= until_s:
                        return None
                    continue
                self.counts["received"] += 1
                route, message = frames[0].bytes, decode(frames[1:], self.limits, self._open_picture)
            except CorruptData as error:
                self.counts["corrupt"] += 1
                log.warning("%s: dropped a message: %s", self.endpoint, error)
                continue
            except SchemaMismatch as error:
                assert frames  # it was decoded
                self._refuse(frames[0].bytes, str(error))
                continue
            key = _key_of(frames[0]) if self._keys is not None else None
            if message.kind == "hello":
                self._greet(route, key, message.body)
            elif (caller := self.callers.get(route)) is None:
                self._send(route, encode("who", {}))
            elif self._keys is not None and key not in self._keys.accepted():
                del self.callers[route]
                self._refuse(route, "this key has been revoked")
            else:
                caller.heard_s = time.monotonic()
                return caller, message

    def send(self, caller: Caller, kind: str, body: dict[str, Any]) -> bool:
        """False when the caller is gone or does not read: its answer is dropped and counted."""
        return self._send(caller.route, encode(kind, body))

    def close(self) -> None:
        self._transport.close()

    def _send(self, route: bytes, frames: list[Any]) -> bool:
        try:
            send(self._socket, [route, *frames])
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.counts["unsendable"] += 1
            return False
        return True

    def _refuse(self, route: bytes, reason: str) -> None:
        self.counts["refused"] += 1
        log.warning("%s: refused a caller: %s", self.endpoint, reason)
        self._send(route, encode("refused", {"reason": reason}))

    def _greet(self, route: bytes, key: str | None, hello: dict[str, Any]) -> None:
        role, uid = text(hello, "role"), text(hello, "uid")
        if role not in CALLS[self.channel] or not 0 < len(uid) <= 64:
            return self._refuse(route, f"role {role!r:.40} may not call the {self.channel} channel")
        if self._keys is not None:
            peer = self._keys.accepted().get(key or "")
            if peer is None or peer.role != role:
                known = f"{peer.name} has role {peer.role}" if peer else "its key is not allowed"
                return self._refuse(route, f"the caller claims role {role}, but {known}")
        ours = self.embodiment.contract_hash if self.embodiment else None
        if self.embodiment and ours not in (theirs := text(hello, "contract_hash"), text(hello, "accepted_hash")):
            self.counts["refused"] += 1
            log.warning("%s: another contract: ours %s, theirs %s", self.endpoint, ours, theirs)
            self._send(route, encode("mismatch", {"contract": self.embodiment.to_dict()}))
            return None
        now_s = time.monotonic()
        for gone in [r for r, c in self.callers.items() if c.uid == uid or now_s - c.heard_s > FORGET_S]:
            del self.callers[gone]
        if len(self.callers) >= MAX_CALLERS:
            # One that left says nothing more; one that is only quiet is asked who it is, and says hello again.
            del self.callers[min(self.callers, key=lambda r: self.callers[r].heard_s)]
        caller = Caller(route, uid, text(hello, "name")[:64], role, now_s, key, hello)
        if isinstance(sent_ns := hello.get("sent_ns"), int):
            caller.age_s(sent_ns)
        self.callers[route] = caller
        self._send(route, encode("welcome", {"contract_hash": ours} | self._welcome(caller)))
        return None


def _key_of(frame: zmq.Frame) -> str | None:
    """The CURVE key behind a frame, as the ZAP handler recorded it."""
    try:
        return frame.get("User-Id")
    except zmq.ZMQError:
        return None
