"""Telemetry: numbers and short texts for whoever looks, never at the loop's cost.

A publisher that nobody hears, or whose listeners are slow, drops; it never waits and never raises for that.
"""

import threading
import time
from typing import Any

import zmq

from bridge.codec import Limits, decode, encode, field
from bridge.errors import BridgeError
from bridge.keys import Keys
from bridge.sockets import Transport, endpoint_of, receive

LIMITS = Limits(header_bytes=64 * 1024, frames=0, frame_bytes=64 * 1024, items=256, depth=6)
MAX_TAKEN = 1000  # messages that one poll returns


class TelemetryPublisher:
    """`send` may be called from several threads."""

    def __init__(self, endpoint: str, *, keys: Keys | None = None):
        self._transport = Transport(keys)
        self._socket = self._transport.bind(zmq.PUB, endpoint, "telemetry", LIMITS)
        self._lock = threading.Lock()
        self._sequence = 0
        self.endpoint = endpoint_of(self._socket)

    def send(self, name: str, fields: dict[str, Any]) -> None:
        """ValueError for fields that are no numbers, texts, lists or maps, or that take more than 64 kB."""
        body = {"name": name, "fields": fields, "stamp_ns": time.time_ns()}
        with self._lock:
            frames = encode("telemetry", body | {"sequence": self._sequence})
            if len(frames) > 1 or len(frames[0]) > LIMITS.header_bytes:
                raise ValueError(f"telemetry {name!r} takes more than {LIMITS.header_bytes} bytes")
            self._sequence += 1
            self._socket.send_multipart(frames, zmq.NOBLOCK)  # a PUB socket drops, it never waits

    def close(self) -> None:
        self._transport.close()


class TelemetrySubscriber:
    """One thread only. `missed` counts messages that were dropped on the way, `corrupt` those that did not decode."""

    def __init__(self, endpoint: str, *, keys: Keys | None = None):
        self._transport = Transport(keys)
        self._socket = self._transport.connect(zmq.SUB, endpoint, "telemetry", LIMITS)
        self._socket.subscribe(b"")
        self._sequence: int | None = None
        self.missed = self.corrupt = 0

    def poll(self, timeout_s: float = 0.0) -> list[tuple[str, dict[str, Any], int]]:
        """Everything that has arrived: name, fields, sender's wall clock in ns. Waits for the first `timeout_s`."""
        taken = []
        self._socket.poll(int(timeout_s * 1e3))
        while len(taken) < MAX_TAKEN:
            try:
                if (frames := receive(self._socket, LIMITS)) is None:
                    return taken
                body = decode(frames, LIMITS).body
                entry = (field(body, "name", str), field(body, "fields", dict), field(body, "stamp_ns", int))
                sequence = field(body, "sequence", int)
            except BridgeError:
                self.corrupt += 1
                continue
            if self._sequence is not None and sequence > self._sequence:
                self.missed += sequence - self._sequence - 1
            self._sequence = sequence
            taken.append(entry)
        return taken

    def close(self) -> None:
        self._transport.close()
