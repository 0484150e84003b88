"""Every ZeroMQ option in one place.

A socket either speaks in the clear on loopback or `ipc`, or it speaks CURVE and the binding side asks the allow-list
(`bridge.keys`) about each key. There is no third way: a clear-text socket that leaves the machine is a ValueError.
"""

import ipaddress
import logging
from typing import Any, cast
from urllib.parse import urlsplit

import zmq
from zmq.auth.thread import ThreadAuthenticator

from bridge.codec import DEFAULT_LIMITS, Limits
from bridge.errors import CorruptData
from bridge.keys import Keys

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 64  # messages per peer and direction; the protocols above bound what is in flight far below this
HEARTBEAT_MS = 1000  # a silent peer is pinged; without an answer for HEARTBEAT_TIMEOUT_MS its connection is closed
HEARTBEAT_TIMEOUT_MS = 3000
HANDSHAKE_MS = 5000
POLLIN, NOBLOCK, SNDMORE = int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.SNDMORE)  # plain: enums are slow to combine


def is_local(endpoint: str) -> bool:
    """Whether nothing sent to `endpoint` leaves this machine."""
    if endpoint.startswith(("ipc://", "inproc://")):
        return True
    host = urlsplit(endpoint.replace("*", "0")).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Transport:
    """A context of its own with its sockets and, where keys are used on a binding side, its allow-list (ZAP)."""

    def __init__(self, keys: Keys | None = None):
        self.keys = keys
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None

    def bind(self, kind: int, endpoint: str, channel: str, limits: Limits = DEFAULT_LIMITS) -> zmq.Socket:
        """Raises ValueError when the endpoint is taken, malformed, or reachable from outside without keys."""
        socket = self._socket(kind, endpoint, limits)
        if self.keys is not None:
            if self._authenticator is None:
                self._authenticator = ThreadAuthenticator(self._context, log=logging.getLogger("bridge.zap"))
                self._authenticator.start()
            self._authenticator.configure_curve_callback(channel, credentials_provider=self.keys)
            socket.zap_domain = channel.encode()
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = self.keys.curve_pair
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"cannot bind {endpoint} for {channel}: {error}") from error
        return socket

    def connect(self, kind: int, endpoint: str, channel: str, limits: Limits = DEFAULT_LIMITS) -> zmq.Socket:
        """Returns at once; the connection is made, and made again after a failure, in the background."""
        server_key = self.keys.server_key(channel) if self.keys is not None else None
        socket = self._socket(kind, endpoint, limits)
        if self.keys is not None:
            socket.curve_serverkey = server_key
            socket.curve_publickey, socket.curve_secretkey = self.keys.curve_pair
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"cannot connect to {endpoint} for {channel}: {error}") from error
        return socket

    def close(self) -> None:
        """Drops what was not sent: the protocols above repeat what matters."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._context.destroy(linger=0)

    def _socket(self, kind: int, endpoint: str, limits: Limits) -> zmq.Socket:
        if self.keys is None and not is_local(endpoint):
            self.close()
            raise ValueError(
                f"{endpoint} is reachable from other machines and no keys were given. Make some with "
                "`cotwin keys new` on both ends and `cotwin keys allow`, or use a loopback or ipc endpoint."
            )
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.set_hwm(HIGH_WATER_MARK)
        socket.maxmsgsize = max(limits.frame_bytes, limits.header_bytes)
        socket.heartbeat_ivl, socket.heartbeat_timeout = HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS
        socket.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS
        socket.handshake_ivl = HANDSHAKE_MS
        socket.reconnect_ivl, socket.reconnect_ivl_max = 50, 1000
        socket.tcp_keepalive = 1
        socket.ipv6 = "[" in endpoint
        if kind == zmq.DEALER:
            socket.immediate = True  # nothing queues for a server that is not there, so nothing arrives stale
        if kind == zmq.ROUTER:
            socket.router_mandatory = True  # a vanished or stuck peer is an error we count, not a silent loss
        return socket


def send(socket: zmq.Socket, frames: list[Any]) -> None:
    """One message, large frames without a copy. Raises zmq.Again where nobody can take it now."""
    for frame in frames[:-1]:
        socket.send(frame, NOBLOCK | SNDMORE, copy=False)
    socket.send(frames[-1], NOBLOCK, copy=False)


def receive(
    socket: zmq.Socket, limits: Limits = DEFAULT_LIMITS, leading: int = 0, wait_s: float = 0.0
) -> list[zmq.Frame] | None:
    """All frames of one message without a copy; None if nothing is there, or came within `wait_s`.

    `leading` routing frames come before the message. Raises CorruptData when there are more frames than allowed.
    """
    # One call that waits and looks; to look alone is cheaper still, and ten times cheaper than to catch zmq.Again.
    # Each costs several times what it does in a tight loop: between two messages the caches have gone cold.
    if wait_s > 0:
        is_there = zmq.zmq_poll([(socket, POLLIN)], max(1, int(wait_s * 1e3)))
    else:
        is_there = cast(int, socket.get(zmq.EVENTS)) & POLLIN
    if not is_there:
        return None
    frames = [socket.recv(NOBLOCK, copy=False)]
    while frames[-1].more and len(frames) < limits.frames + 1 + leading:
        frames.append(socket.recv(copy=False))
    if frames[-1].more:
        while socket.recv(copy=False).more:
            pass
        raise CorruptData(f"more than {limits.frames} frames in one message")
    return frames


def watch_disconnects(socket: zmq.Socket) -> zmq.Socket:
    """A socket that has a message to read after each time the connection was lost."""
    return socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)


def endpoint_of(socket: zmq.Socket) -> str:
    """Where a socket was bound, with the port that was chosen for `:*`."""
    return socket.last_endpoint.decode()
