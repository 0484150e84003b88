"""Who may speak on which channel: CURVE keys for the transport, Ed25519 keys for announcements, one allow-list.

A key folder holds `identity.json` (ours, with secrets, mode 0600) and `allowed.json` (others' public keys, each with a
name and a role). The allow-list is read again when it changes, so `cotwin keys revoke` works on a running server. Both
ends need each other's public key: the binding side to let the other in, the connecting side to know whom it talks to.
"""

import json
import logging
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq

from bridge.errors import Refused

log = logging.getLogger(__name__)

ROLES = ("robot", "server", "learner", "viewer")
SERVES = {"infer": {"server"}, "demos": {"learner"}, "checkpoints": {"learner"}, "telemetry": {"robot", "server"}}
CALLS = {  # docs/contract.md, section 4: who may connect to each channel
    "infer": {"robot"},
    "demos": {"robot"},
    "checkpoints": {"server", "robot"},
    "telemetry": set(ROLES),
}
IDENTITY, ALLOWED = "identity.json", "allowed.json"


@dataclass(frozen=True)
class Peer:
    """A key we accept. `curve_public` is Z85 (40 characters), `sign_public` 64 hex digits."""

    name: str
    role: str
    curve_public: str
    sign_public: str

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} of key {self.name!r}: allowed are {', '.join(ROLES)}")
        if len(self.curve_public) != 40:
            raise ValueError(f"public key of {self.name!r} has {len(self.curve_public)} characters; Z85 keys have 40")
        if len(self.sign_public) != 64:
            raise ValueError(f"signing key of {self.name!r} has {len(self.sign_public)} hex digits; expected 64")


class Keys:
    """Our key pair and the peers that we accept."""

    def __init__(self, folder: Path, peer: str | None = None):
        """`peer` names the allowed key that connections of ours have to find at the other end, where several could be.

        Raises ValueError when the folder has no identity, or one that others may read.
        """
        self.folder, self.peer = Path(folder), peer
        path = self.folder / IDENTITY
        if not path.exists():
            raise ValueError(f"{path} does not exist; make a key with `cotwin keys new folder={self.folder}`")
        if path.stat().st_mode & 0o077:
            mode = oct(path.stat().st_mode & 0o777)
            raise ValueError(f"{path} has mode {mode}: others could read the secret key. Fix: chmod 600 {path}")
        self._identity = json.loads(path.read_text())
        self.me = Peer(**{k: self._identity[k] for k in ("name", "role", "curve_public", "sign_public")})
        self._lock = threading.Lock()
        self._allowed: dict[str, Peer] = {}
        self._allowed_stamp: tuple[int, int] | None = None

    @classmethod
    def at(cls, folder: str | None, peer: str | None = None) -> "Keys | None":
        """The keys that a setting names; None where it is empty: clear text, which only loopback and ipc allow."""
        return cls(Path(folder).expanduser(), peer or None) if folder else None

    @classmethod
    def new(cls, folder: Path, name: str, role: str) -> "Keys":
        """Make a key pair. Raises ValueError when the folder already holds one: keys are never overwritten."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        path = Path(folder) / IDENTITY
        if path.exists():
            raise ValueError(f"{path} exists; move it away first if you really want another key")
        curve_public, curve_secret = zmq.curve_keypair()
        sign = Ed25519PrivateKey.generate()
        public = Peer(name, role, curve_public.decode(), sign.public_key().public_bytes_raw().hex())
        identity = asdict(public) | {
            "curve_secret": curve_secret.decode(),
            "sign_secret": sign.private_bytes_raw().hex(),
        }
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, json.dumps(identity, indent=2) + "\n")
        return cls(folder)

    @property
    def curve_pair(self) -> tuple[bytes, bytes]:
        return self._identity["curve_public"].encode(), self._identity["curve_secret"].encode()

    @property
    def allowed(self) -> dict[str, Peer]:
        """Accepted peers by their CURVE public key, as the file has them now."""
        path = self.folder / ALLOWED
        with self._lock:
            try:
                stat = path.stat()
            except FileNotFoundError:
                self._allowed, self._allowed_stamp = {}, None
                return self._allowed
            stamp = (stat.st_mtime_ns, stat.st_ino)
            if stamp != self._allowed_stamp:
                peers = [Peer(**entry) for entry in json.loads(path.read_text())]
                self._allowed = {peer.curve_public: peer for peer in peers}
                self._allowed_stamp = stamp
            return self._allowed

    def accepted(self) -> dict[str, Peer]:
        """`allowed` for whoever serves: nobody while the file cannot be read, as when a person is editing it."""
        try:
            return self.allowed
        except (ValueError, TypeError, OSError) as error:
            log.error("refused everybody: %s cannot be read: %s", self.folder / ALLOWED, error)
            return {}

    def allow(self, peer: Peer) -> None:
        """Raises ValueError for a name that another key has."""
        others = [p for p in self.allowed.values() if p.curve_public != peer.curve_public]
        if any(p.name == peer.name for p in others):
            raise ValueError(f"the name {peer.name!r} belongs to another key; revoke that one first")
        self._write_allowed([*others, peer])

    def revoke(self, name: str) -> Peer:
        """Raises ValueError when no such name is allowed."""
        peers = list(self.allowed.values())
        gone = [p for p in peers if p.name == name]
        if not gone:
            raise ValueError(f"no key named {name!r}; allowed are {sorted(p.name for p in peers)}")
        self._write_allowed([p for p in peers if p.name != name])
        return gone[0]

    def _write_allowed(self, peers: list[Peer]) -> None:
        write_private(self.folder / ALLOWED, json.dumps([asdict(p) for p in peers], indent=2) + "\n")

    def server_key(self, channel: str) -> bytes:
        """The allowed key that serves `channel`. Raises ValueError when there is none, or a choice to make."""
        peers = [p for p in self.allowed.values() if p.role in SERVES[channel] and self.peer in (None, p.name)]
        if len(peers) != 1:
            found = ", ".join(p.name for p in peers) or "none"
            wanted = f"{self.peer!r} to be an" if self.peer else "exactly one"
            raise ValueError(
                f"{self.folder}: the {channel} channel needs {wanted} allowed key of role "
                f"{' or '.join(sorted(SERVES[channel]))}; found {found}. See `cotwin keys show`; `peer` names one."
            )
        return peers[0].curve_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """What the ZAP handler asks: may this CURVE key connect to the channel `domain`?"""
        peer = self.accepted().get(key if isinstance(key, str) else key.decode())
        if peer is None:
            log.warning("refused an unknown key on channel %s: %s", domain, key)
            return False
        if peer.role not in CALLS[domain]:
            log.warning("refused %s on channel %s: role %s may not", peer.name, domain, peer.role)
            return False
        return True

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature (64 bytes)."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(self._identity["sign_secret"])).sign(data)

    def verify(self, data: bytes, signature: bytes, role: str) -> Peer:
        """Whose signature it is. Raises Refused when no allowed key of that role made it."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        for peer in self.accepted().values():
            if peer.role == role:
                try:
                    Ed25519PublicKey.from_public_bytes(bytes.fromhex(peer.sign_public)).verify(signature, data)
                except InvalidSignature:
                    continue
                return peer
        raise Refused(f"not signed by any allowed key of role {role}")


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
