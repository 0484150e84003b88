"""Bad links for tests: one that mistreats messages, and one that mistreats a TCP connection."""

import contextlib
import random
import select
import socket
import threading
import time

import zmq

MESSAGE_FAULTS = ("dropped", "delayed", "duplicated", "reordered", "truncated", "corrupted")


class FaultyMessages:
    """Between one caller and one listener: takes each ZeroMQ message apart and mistreats a share of them, both ways."""

    def __init__(self, listener: str, fault: str, share: float, seed: int = 0):
        self.fault, self.share, self.harmed = fault, share, 0
        self._random = random.Random(seed)
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.bind("tcp://127.0.0.1:*")
        self.endpoint = self._front.last_endpoint.decode()
        self._back = self._context.socket(zmq.DEALER)
        self._back.connect(listener)
        self._route = b""
        self._held: list[tuple[float, zmq.Socket, list[bytes]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self):
        self._stop.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self):
        while not self._stop.is_set():
            for source, target in ((self._front, self._back), (self._back, self._front)):
                while source.poll(2):
                    frames = source.recv_multipart()
                    if source is self._front:
                        self._route, frames = frames[0], frames[1:]
                    self._pass_on(target, frames)
            for entry in [e for e in self._held if e[0] <= time.monotonic()]:
                self._held.remove(entry)
                self._send(entry[1], entry[2])

    def _pass_on(self, target, frames):
        harm = self._random.random() < self.share
        self.harmed += harm
        now_s = time.monotonic()
        match self.fault if harm else None:
            case "dropped":
                return
            case "delayed":
                self._held.append((now_s + self._random.uniform(0.0, 0.4), target, frames))
                return
            case "reordered":
                self._held.append((now_s + 0.03, target, frames))
                return
            case "duplicated":
                self._send(target, frames)
            case "truncated":
                last = frames[-1]
                frames = [*frames[:-1], last[: self._random.randrange(len(last) + 1)]][: self._random.choice([1, 9])]
            case "corrupted":
                data = bytearray(frames[0])
                data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
                frames = [bytes(data), *frames[1:]]
        self._send(target, frames)

    def _send(self, target, frames):
        target.send_multipart([self._route, *frames] if target is self._front else frames)


class FaultyConnection:
    """A TCP proxy. `freeze` stops moving bytes and tells nobody (a half-open connection, as after a pulled cable),
    `cut` closes, `bytes_per_s` makes a slow reader."""

    def __init__(self, listener: str, bytes_per_s: float | None = None):
        host, port = listener.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._bytes_per_s = bytes_per_s
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._frozen: set[socket.socket] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def freeze(self):
        self._frozen = {end for pair in self._pairs for end in pair}

    def cut(self):
        for pair in list(self._pairs):
            for end in pair:
                with contextlib.suppress(OSError):  # closed already
                    end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._stop.set()
        self._thread.join()
        for end in (self._server, *(end for pair in self._pairs for end in pair)):
            end.close()

    def _run(self):
        while not self._stop.is_set():
            peer = {a: b for pair in self._pairs for a, b in (pair, pair[::-1])}
            ends = [end for end in peer if end not in self._frozen]
            readable, _, _ = select.select([self._server, *ends], [], [], 0.02)
            for end in readable:
                if end is self._server:
                    accepted = self._server.accept()[0]
                    try:
                        self._pairs.append((accepted, socket.create_connection(self._target)))
                    except OSError:
                        accepted.close()
                    continue
                self._move(end, peer[end])

    def _move(self, end, other):
        try:
            data = end.recv(65536)
            other.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._pairs = [pair for pair in self._pairs if end not in pair]
            for closing in (end, other):
                closing.close()
        elif self._bytes_per_s is not None:
            time.sleep(len(data) / self._bytes_per_s)
