"""A cable of 100 Mbit/s and 10 ms there and back between two network namespaces of this machine. Needs root and `ip`.

Kernels without netem are common, so the cable is a process between two TUN devices: each packet leaves when its turn
at that rate has come, and arrives 5 ms later; a queue of 2000 packets drops what exceeds it. TCP is the kernel's own.
"""

import fcntl
import os
import select
import struct
import subprocess
import time
from collections import deque
from multiprocessing import get_context
from typing import NamedTuple

RATE_BIT_S, DELAY_S, QUEUE = 100e6, 0.005, 2000
ADDRESSES = ("10.201.77.1", "10.201.77.2")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SPAWN = get_context("spawn")


class Place(NamedTuple):
    """Where a process runs: a network namespace (None: this one) and its address there."""

    namespace: str | None
    address: str

    def enter(self) -> None:
        """This thread, and those that it starts from here on."""
        if self.namespace is not None:
            with open(f"/run/netns/{self.namespace}") as file:
                os.setns(file.fileno(), os.CLONE_NEWNET)


LOOPBACK = Place(None, "127.0.0.1")


class ShapedLink:
    """Context manager: the two ends as Places. Raises RuntimeError where the machine does not allow it."""

    def __init__(self):
        self.names = tuple(f"cotwin{os.getpid()}{end}" for end in "ab")
        self._process = None

    def __enter__(self) -> tuple[Place, Place]:
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            ours, theirs = SPAWN.Pipe()
            self._process = SPAWN.Process(target=cable, args=(theirs, self.names), daemon=True)
            self._process.start()
            if not ours.poll(30) or ours.recv() != "made":
                raise RuntimeError("no TUN devices can be made")
            for name, here, there in zip(self.names, ADDRESSES, reversed(ADDRESSES), strict=True):
                inside = ("ip", "netns", "exec", name, "ip")
                _run(*inside, "addr", "add", here, "peer", there, "dev", "cable")
                _run(*inside, "link", "set", "cable", "up")
            ours.send("go")
        except (OSError, EOFError, subprocess.CalledProcessError, RuntimeError) as error:
            self.__exit__()
            raise RuntimeError(f"no shaped link here: {getattr(error, 'stderr', None) or error}") from error
        first, second = (Place(name, address) for name, address in zip(self.names, ADDRESSES, strict=True))
        return first, second

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def cable(pipe, names) -> None:
    ends = []
    for name in names:
        Place(name, "").enter()
        ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
        fcntl.ioctl(ends[-1], TUNSETIFF, struct.pack("16sH22x", b"cable", IFF_TUN | IFF_NO_PI))
    pipe.send("made")
    pipe.recv()
    under_way, free_s = (deque(), deque()), [0.0, 0.0]  # by the end that they came from: (arrival, packet)
    while True:
        now_s = time.monotonic()
        for end, packets in enumerate(under_way):
            while packets and packets[0][0] <= now_s:
                os.write(ends[1 - end], packets.popleft()[1])
        due_s = min((packets[0][0] for packets in under_way if packets), default=now_s + 1.0)
        readable, _, _ = select.select(ends, [], [], max(0.0, due_s - time.monotonic()))
        now_s = time.monotonic()
        for descriptor in readable:
            end = ends.index(descriptor)
            for _ in range(64):  # then look at what is due
                try:
                    packet = os.read(descriptor, 65536)
                except BlockingIOError:
                    break
                if len(under_way[end]) < QUEUE:
                    free_s[end] = max(free_s[end], now_s) + len(packet) * 8 / RATE_BIT_S
                    under_way[end].append((free_s[end] + DELAY_S, packet))


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
