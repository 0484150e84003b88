"""One TCP client and its UDP channel, as the robot and the hand each have; never blocks."""

import contextlib
import select
import socket
import struct
from collections.abc import Callable


class ClientLink:
    """Listens on (address, port) from the start. One client at a time; others are turned away."""

    def __init__(self, address: str, port: int, header: struct.Struct):
        """Raises OSError when the address is in use or is none of this machine's."""
        self._header = header
        self._listener = socket.create_server((address, port), backlog=2)
        self._listener.setblocking(False)
        self._address = address
        self._client: socket.socket | None = None
        self._received = bytearray()
        self.udp: socket.socket | None = None
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)

    @property
    def is_connected(self) -> bool:
        return self._client is not None

    def serve(self, answer: Callable[[int, int, bytes], None], gone: Callable[[], None]) -> None:
        """`answer(command, id, body)` what came, or `gone()` when the client has left; then take a new one."""
        if not self._poll.poll(0):
            return
        self._hear(answer, gone)
        try:
            newcomer, _ = self._listener.accept()
        except BlockingIOError:
            return
        self._hear(answer, gone)  # the last client may have left just before this one came
        if self._client is not None:
            newcomer.close()  # at once: left waiting, it would hang for ever
            return
        newcomer.setblocking(False)
        newcomer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll.register(newcomer, select.POLLIN)
        self._client = newcomer

    def _hear(self, answer: Callable[[int, int, bytes], None], gone: Callable[[], None]) -> None:
        try:
            for command, request_id, body in self._requests():
                answer(command, request_id, body)
        except ConnectionError:
            gone()

    def _requests(self) -> list[tuple[int, int, bytes]]:
        """(command, id, body) of each complete request. Raises ConnectionError when the client has gone."""
        if self._client is None:
            return []
        while True:
            try:
                data = self._client.recv(65536)
            except BlockingIOError:
                break
            if not data:
                raise ConnectionError("client closed the connection")
            self._received += data
        found = []
        while len(self._received) >= self._header.size:
            command, request_id, size = self._header.unpack_from(self._received)
            if not self._header.size <= size <= 4096:
                raise ConnectionError(f"request {command} claims {size} bytes")
            if len(self._received) < size:
                break
            found.append((command, request_id, bytes(self._received[self._header.size : size])))
            del self._received[:size]
        return found

    def respond(self, command: int, request_id: int, body: bytes) -> None:
        """Raises ConnectionError when the client has gone."""
        assert self._client is not None
        message = self._header.pack(command, request_id, self._header.size + len(body)) + body
        self._client.setblocking(True)  # the URDF may be larger than the socket's buffer
        try:
            self._client.sendall(message)
        finally:
            self._client.setblocking(False)

    def open_udp(self, client_port: int) -> None:
        """Stream to the port that the client named when it connected."""
        assert self._client is not None
        if self.udp is not None:
            self.udp.close()
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind((self._address, 0))
        self.udp.connect((self._client.getpeername()[0], client_port))
        self.udp.setblocking(False)

    def wait_for_udp(self, timeout_s: float) -> bool:
        """Whether a datagram has come."""
        return bool(select.select([self.udp], [], [], timeout_s)[0])

    def send_state(self, datagram: bytes | bytearray) -> None:
        """Best effort, as UDP is: a client that has just gone is noticed on TCP."""
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            self.udp.send(datagram)

    def drop(self) -> None:
        """Cut the client off and listen for the next."""
        if self._client is not None:
            self._poll.unregister(self._client)
            self._client.close()
            self._client = None
        if self.udp is not None:
            self.udp.close()
            self.udp = None
        self._received.clear()

    def close(self) -> None:
        self.drop()
        self._listener.close()
