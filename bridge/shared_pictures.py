"""Pictures for a policy server on the same machine: through shared memory, which costs one copy instead of six.

The caller makes one anonymous, sealed memory file (it ends with its process, whatever kills it) and names it in its
hello. A listener that can open it says so in its welcome; anything else (another machine, user or container) leaves the
pictures on the socket. Requests still travel by the socket, with deadlines, ids and keys as ever; they say where their
pictures lie. Only the same user (or root) can open the memory, and who could could read either process anyway.
"""

import fcntl
import logging
import mmap
import os
import re
import secrets
from typing import Any

import numpy as np

from bridge.codec import field
from bridge.errors import CorruptData

log = logging.getLogger(__name__)

NAME = "cotwin-pictures"
PROOF_BYTES = 16  # random, at the start: whoever names a memory must know what stands in it
SERIAL_BYTES = 16  # in front of each slot: which request wrote it, and room to keep pictures aligned
MAX_BYTES = 1 << 30
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # so that the reader's map always has memory


class PictureWriter:
    """The caller's end: `slots` places of `slot_bytes`, each of one request in flight."""

    def __init__(self, slots: int, slot_bytes: int):
        self._slot_bytes = slot_bytes
        size = PROOF_BYTES + slots * (SERIAL_BYTES + slot_bytes)
        self._fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, size)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        self._bytes = np.frombuffer(mmap.mmap(self._fd, size), np.uint8)
        self._bytes[:PROOF_BYTES] = np.frombuffer(secrets.token_bytes(PROOF_BYTES), np.uint8)
        self._free = [PROOF_BYTES + k * (SERIAL_BYTES + slot_bytes) for k in range(slots)]
        self._taken: dict[int, int] = {}  # request -> where its slot begins

    def offer(self) -> dict[str, Any]:
        """What the hello says of it."""
        return {"pid": os.getpid(), "fd": self._fd, "size": len(self._bytes), "proof": bytes(self._bytes[:PROOF_BYTES])}

    def write(self, request: int, images: dict[str, np.ndarray]) -> dict[str, Any] | None:
        """Copies the pictures; returns what the request says of them, None where they do not fit."""
        if sum(image.nbytes for image in images.values()) > self._slot_bytes or not self._free:
            return None
        slot = self._taken[request] = self._free.pop()
        self._bytes[slot : slot + 8] = np.frombuffer(request.to_bytes(8, "little"), np.uint8)
        at, places = slot + SERIAL_BYTES, {}
        for name, image in images.items():
            self._bytes[at : at + image.nbytes].reshape(image.shape)[...] = image
            places[name] = [at, *image.shape]
            at += image.nbytes
        return {"slot": slot, "places": places}

    def release(self, request: int) -> None:
        """The request has ended: an answer, an error, or a deadline after which nobody wants one."""
        if (slot := self._taken.pop(request, None)) is not None:
            self._free.append(slot)

    def close(self) -> None:
        os.close(self._fd)  # the map goes with its last user


class PictureReader:
    """The listener's end."""

    def __init__(self, offer: dict[str, Any]):
        """Raises OSError or CorruptData where the offered memory is not to be had."""
        pid, fd, size, proof = (
            field(offer, "pid", int),
            field(offer, "fd", int),
            field(offer, "size", int),
            field(offer, "proof", bytes),
        )
        path = f"/proc/{pid}/fd/{fd}"
        # Looked at before it is opened: the name could be anything of that process, and opening some things acts.
        if not re.match(rf"/memfd:{NAME}( |$)", os.readlink(path)) or not PROOF_BYTES < size <= MAX_BYTES:
            raise CorruptData(f"{path} is not a memory of pictures")
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(handle).st_size != size or fcntl.fcntl(handle, fcntl.F_GET_SEALS) & SEALS != SEALS:
                raise CorruptData(f"{path} is not sealed at {size} bytes")
            self._bytes = np.frombuffer(mmap.mmap(handle, size, prot=mmap.PROT_READ), np.uint8)
        finally:
            os.close(handle)
        if not secrets.compare_digest(bytes(self._bytes[:PROOF_BYTES]), proof):
            raise CorruptData(f"{path} is another's memory")

    @classmethod
    def attach(cls, offer: Any) -> "PictureReader | None":
        """The memory that a hello offers, None where there is none or it cannot be reached from here."""
        if not isinstance(offer, dict):
            return None
        try:
            return cls(offer)
        except (OSError, CorruptData) as error:
            log.info("pictures will come by the socket: %s", error)
            return None

    def read(self, request: int, told: dict[str, Any]) -> dict[str, np.ndarray]:
        """Read-only views of the request's pictures, right until the request is answered or late.

        Raises CorruptData for places outside the memory, and where another request has taken the slot since.
        """
        slot, places = field(told, "slot", int), field(told, "places", dict)
        if not PROOF_BYTES <= slot <= len(self._bytes) - SERIAL_BYTES:
            raise CorruptData(f"slot {slot} of a memory of {len(self._bytes)} bytes")
        if int.from_bytes(self._bytes[slot : slot + 8].tobytes(), "little") != request:
            raise CorruptData(f"request {request} has given up its pictures")
        return {name: self._view(name, place) for name, place in places.items()}

    def _view(self, name: Any, place: Any) -> np.ndarray:
        if not isinstance(place, list) or len(place) != 4 or not all(type(n) is int and n > 0 for n in place):
            raise CorruptData(f"place {place!r:.80} of picture {name!r:.40}; expected [start, height, width, channels]")
        start, height, width, channels = place
        end = start + height * width * channels
        if end > len(self._bytes):
            raise CorruptData(f"picture {name!r:.40} ends at {end} of {len(self._bytes)} bytes")
        return self._bytes[start:end].reshape(height, width, channels)
