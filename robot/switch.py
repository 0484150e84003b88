"""A switch that hides which policy is on: one port that leads to one policy server at a time."""

import contextlib
import socket
import threading
from urllib.parse import urlsplit

PIECE = 65536


def is_endpoint(text: str) -> bool:
    return urlsplit(text).scheme == "tcp" and bool(urlsplit(text).port)


class Switch:
    """A TCP port on loopback that leads to one policy server at a time. Whoever connects cannot tell which.

    `choose` cuts what is connected; the policy client connects and shakes hands anew, as after a server's restart.
    """

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._goal: tuple[str, int] | None = None
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="policy-switch", daemon=True).start()

    def choose(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        with self._lock:
            self._goal = (parts.hostname or "", parts.port or 0)
            self._cut()

    def close(self) -> None:
        self._listener.close()
        with self._lock:
            self._goal = None
            self._cut()

    def _cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open = []

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                goal = self._goal
            try:
                theirs = socket.create_connection(goal, timeout=2.0) if goal else None
            except OSError:
                theirs = None
            with self._lock:
                if theirs is None or goal != self._goal:
                    for end in (ours, theirs):
                        if end is not None:
                            end.close()
                    continue
                theirs.settimeout(None)
                self._open += [ours, theirs]
            for source, sink in ((ours, theirs), (theirs, ours)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(PIECE):
            sink.sendall(piece)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
