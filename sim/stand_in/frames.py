"""The cell's end of the cameras: scene states on a fixed grid of simulated time, as many ahead as the client allows.

Wire: msgpack maps. Client: `{"hello": scene hash, "window": n}`, then `{"credit": 1}` for each picture set it has
finished. Cell: `{"welcome": rate}` or `{"refused": why}`, then `{"frame": number, "time_ms": t, "qpos": bytes,
"plate": bytes}` (float64), or `{"unknown": True}` to a client that it has given up.
"""

import time

import msgpack
import zmq

from sim.stand_in.world import World

CLIENT_PATIENCE_S = 3.0  # of wall time without credit: the client is given up
MAX_WINDOW = 30


class FrameFeed:
    """One camera client at a time; the newest hello wins."""

    def __init__(self, context: zmq.Context, endpoint: str, world: World, scene_hash: str, rate_hz: float):
        self.world, self.scene_hash, self.rate_hz = world, scene_hash, rate_hz
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 2 * MAX_WINDOW)
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.clients_dropped = 0
        self._client: bytes | None = None
        self._credit = 0
        self._number = 0
        self._stuck_since: float | None = None

    @property
    def due_ms(self) -> int:
        """Simulated time of the next picture."""
        return round((self._number + 1) * 1000 / self.rate_hz)

    def emit(self, time_ms: int) -> bool:
        """Send the state of a picture that is due. False: the client is behind, hold the clock and call again."""
        self.serve()
        if self._client is not None and self._credit == 0:
            now = time.monotonic()
            self._stuck_since = self._stuck_since or now
            if now - self._stuck_since < CLIENT_PATIENCE_S:
                return False
            self._client = None
            self.clients_dropped += 1
        self._stuck_since = None
        self._number += 1
        if self._client is not None:
            self._credit -= 1
            data = self.world.data
            frame = {"frame": self._number, "time_ms": time_ms, "qpos": data.qpos.tobytes()}
            self._send(self._client, frame | {"plate": data.mocap_pos[0].tobytes()})
        return True

    def wait(self, timeout_s: float) -> None:
        """Sleep until the client says something."""
        self.socket.poll(int(timeout_s * 1000))

    def serve(self) -> None:
        """Greetings and credit."""
        while self.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            client, payload = self.socket.recv_multipart()
            try:
                message = msgpack.unpackb(payload)
            except (ValueError, msgpack.UnpackException):
                continue
            if not isinstance(message, dict):
                continue
            if "hello" in message:
                self._greet(client, message)
            elif client != self._client:
                self._send(client, {"unknown": True})
            elif "credit" in message:
                self._credit += 1
            elif "bye" in message:
                self._client = None

    def close(self) -> None:
        self.socket.close()

    def _greet(self, client: bytes, message: dict) -> None:
        if message["hello"] != self.scene_hash:
            why = "the cell runs another scene or embodiment; start both from the same configuration"
            self._send(client, {"refused": why})
            return
        self._client = client
        self._credit = min(max(int(message.get("window", 1)), 1), MAX_WINDOW)
        self._send(client, {"welcome": self.rate_hz})

    def _send(self, client: bytes, message: dict) -> None:
        self.socket.send_multipart([client, msgpack.packb(message)])
