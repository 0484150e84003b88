"""What a publisher announces: one checkpoint, a sequence number, and where keys are used a signature over both."""

import json
from dataclasses import asdict
from typing import Any

from bridge.errors import CorruptData
from bridge.keys import Keys
from bridge.messages import CheckpointInfo

INFO_TYPES = dict(CheckpointInfo.__annotations__)


def pack_announcement(info: CheckpointInfo, sequence: int, keys: Keys | None) -> dict[str, bytes]:
    data = json.dumps(asdict(info) | {"sequence": sequence}, sort_keys=True).encode()
    return {"announcement": data, "signature": keys.sign(data) if keys else b""}


def open_announcement(body: dict[str, Any], keys: Keys | None) -> tuple[CheckpointInfo, int]:
    """Raises Refused when no allowed learner signed it, CorruptData when it is none."""
    data, signature = body.get("announcement"), body.get("signature")
    if not isinstance(data, bytes) or not isinstance(signature, bytes):
        raise CorruptData("an announcement without its data or signature")
    if keys is not None:
        keys.verify(data, signature, role="learner")
    try:
        content = json.loads(data)
        sequence = content.pop("sequence")
        info = CheckpointInfo(**content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptData(f"not an announcement: {error!r}") from error
    if type(sequence) is not int or any(type(getattr(info, name)) is not kind for name, kind in INFO_TYPES.items()):
        raise CorruptData(f"an announcement with fields of other types: {content}")
    return info, sequence
