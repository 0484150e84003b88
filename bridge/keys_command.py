"""Keys of this machine and the machines that may talk to it.

    cotwin keys new name=robot1 role=robot        make our key pair, and robot1.public.json to carry to the others
    cotwin keys show                              our public key and everybody on the allow-list
    cotwin keys allow card=learner.public.json    let the owner of that public key in, with the role on its card
    cotwin keys revoke name=learner               and out again; running servers notice at once

Roles: robot (may infer, send demonstrations), server (policy server), learner (announces checkpoints), viewer (reads
telemetry). Compare fingerprints by voice or on paper when a card travelled over a network that you do not trust.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bridge.config import command_line, errors_in_one_line
from bridge.keys import Keys, Peer

ACTIONS = ("new", "show", "allow", "revoke")


@dataclass
class KeysConfig:
    folder: str = "~/.config/cotwin/keys"
    name: str | None = None  # new: ours; revoke: whose
    role: str | None = None  # new: robot, server, learner or viewer; allow: instead of the card's
    card: str | None = None  # allow: the other's public.json


@errors_in_one_line()
def main(argv: list[str]) -> int:
    action, settings = (argv[0], argv[1:]) if argv and argv[0] in ACTIONS else (None, argv)
    config = command_line("keys", KeysConfig, settings, __doc__)
    folder = Path(config.folder).expanduser()
    match action:
        case "new":
            print(new(folder, config.name, config.role))
        case "show":
            print(show(Keys(folder)))
        case "allow":
            print(allow(Keys(folder), config.card, config.role))
        case "revoke":
            peer = Keys(folder).revoke(_needed(config.name, "name", action))
            print(f"revoked {peer.name} ({peer.role})")
        case _:
            raise ValueError(f"say what to do: cotwin keys {'|'.join(ACTIONS)} (cotwin keys --help)")
    return 0


def new(folder: Path, name: str | None, role: str | None) -> str:
    keys = Keys.new(folder, _needed(name, "name", "new"), _needed(role, "role", "new"))
    card = folder / f"{keys.me.name}.public.json"
    card.write_text(json.dumps(asdict(keys.me), indent=2) + "\n")
    return f"made {describe(keys.me)}\ncarry {card} to the machines it talks to, and there: cotwin keys allow card=FILE"


def show(keys: Keys) -> str:
    lines = [f"ours     {describe(keys.me)}"]
    lines += [f"allowed  {describe(peer)}" for peer in sorted(keys.allowed.values(), key=lambda peer: peer.name)]
    return "\n".join(lines)


def allow(keys: Keys, card: str | None, role: str | None) -> str:
    path = Path(_needed(card, "card", "allow")).expanduser()
    try:
        fields = json.loads(path.read_text())
        peer = Peer(**fields | ({"role": role} if role else {}))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a public key card: {error}") from error
    keys.allow(peer)
    return f"allowed {describe(peer)}"


def describe(peer: Peer) -> str:
    return f"{peer.name} ({peer.role})  fingerprint {fingerprint(peer)}"


def fingerprint(peer: Peer) -> str:
    """20 hex digits of the SHA-256 over both public keys."""
    digest = hashlib.sha256(f"{peer.curve_public}{peer.sign_public}".encode()).hexdigest()
    return "-".join(digest[i : i + 4] for i in range(0, 20, 4))


def _needed(value: str | None, key: str, action: str) -> str:
    if not value:
        raise ValueError(f"cotwin keys {action} needs {key}=...")
    return value
