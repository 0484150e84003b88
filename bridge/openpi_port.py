"""openpi's WebSocket protocol in front of our policy server, so that its stock clients can use it.

The protocol (Physical Intelligence's openpi, `openpi_client`): binary frames of msgpack, in which an array is a map of
`__ndarray__`, `data`, `dtype`, `shape` (bytes keys). The server speaks first, with its metadata; then one dict for
each observation, and one dict with `actions` and `server_timing` back. An error is a text frame, then the end.
`GET /healthz` answers OK. It has neither encryption nor authentication: loopback only, or behind an `Api-Key`.
"""

import hmac
import http
import logging
import time
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from bridge.codec import DEFAULT_LIMITS, DTYPES, array_from
from bridge.embodiment import Embodiment
from bridge.errors import BridgeError, CorruptData, SchemaMismatch
from bridge.keys import Keys
from bridge.messages import Observation
from bridge.policy_client import PolicyClient
from bridge.sockets import is_local

log = logging.getLogger(__name__)

# The keys that openpi's LIBERO client sends.
DEFAULT_CAMERA_KEYS = {"third_person": "observation/image", "wrist": "observation/wrist_image"}
STATE_KEY, PROMPT_KEY = "observation/state", "prompt"


def pack(value: Any) -> bytes:
    """openpi's encoding. ValueError for arrays that it does not know."""
    return msgpack.packb(value, default=_pack_array)


def unpack(data: bytes) -> Any:
    """Raises CorruptData for anything malformed. Arrays are read-only views."""
    try:
        return msgpack.unpackb(data, object_hook=_unpack_array, max_array_len=1024, max_map_len=1024)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CorruptData(f"not openpi's encoding: {error}") from error


class OpenpiPort:
    """A WebSocket server that passes observations on to `infer_endpoint`, one policy client for each connection.

    camera_keys: which key of openpi's dict each of our cameras comes from; missing images are a SchemaMismatch.
    Raises ValueError for an address that others can reach, unless an `api_key` is asked of them.
    """

    def __init__(
        self,
        host: str,
        port: int,
        infer_endpoint: str,
        embodiment: Embodiment,
        *,
        keys: Keys | None = None,
        api_key: str | None = None,
        camera_keys: Mapping[str, str] | None = None,
        deadline_s: float = 10.0,
    ):
        if api_key is None and not is_local(f"tcp://{host}:{port}"):
            raise ValueError(f"{host} can be reached from other machines: set api_key, or bind 127.0.0.1")
        self.embodiment, self.deadline_s = embodiment, deadline_s
        self.camera_keys = dict(
            camera_keys or {name: DEFAULT_CAMERA_KEYS.get(name, name) for name in embodiment.cameras}
        )
        self._infer_endpoint, self._keys, self._api_key = infer_endpoint, keys, api_key
        self._server: Server = serve(
            self._talk,
            host,
            port,
            compression=None,
            max_size=DEFAULT_LIMITS.frame_bytes,
            process_request=self._admit,
        )
        self.port: int = self._server.socket.getsockname()[1]

    def serve_forever(self) -> None:
        """Returns after `close`, which another thread calls."""
        self._server.serve_forever()

    def close(self) -> None:
        self._server.shutdown()

    def _admit(self, connection: ServerConnection, request: Any) -> Any:
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        given = request.headers.get("Authorization", "")
        if self._api_key and not hmac.compare_digest(given.encode(), f"Api-Key {self._api_key}".encode()):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "wrong or missing Api-Key\n")
        return None

    def _talk(self, connection: ServerConnection) -> None:
        client = PolicyClient(self._infer_endpoint, self.embodiment, keys=self._keys)
        try:
            metadata = {
                "contract_hash": self.embodiment.contract_hash,
                "policy_rate_hz": self.embodiment.policy_rate_hz,
            }
            connection.send(pack(metadata))
            for data in connection:
                connection.send(self._answer(client, data))
        except BridgeError as error:
            log.warning("openpi client %s: %s", connection.remote_address, error)
            connection.send(f"{type(error).__name__}: {error}")
            connection.close(code=1011, reason=type(error).__name__)
        except ConnectionClosed:
            log.info("openpi client %s left", connection.remote_address)
        finally:
            client.close()

    def _answer(self, client: PolicyClient, data: bytes | str) -> bytes:
        started_s = time.monotonic()
        if not isinstance(data, bytes):
            raise CorruptData("a text frame where an observation was expected")
        chunk = client.infer(self._observation(unpack(data)), self.deadline_s)
        timing = {"infer_ms": (time.monotonic() - started_s) * 1e3}
        return pack({"actions": chunk.actions, "policy_version": chunk.policy_version, "server_timing": timing})

    def _observation(self, sent: Any) -> Observation:
        if not isinstance(sent, dict):
            raise CorruptData(f"a {type(sent).__name__} where a dict was expected")
        wanted = {*self.camera_keys.values(), STATE_KEY, PROMPT_KEY}
        if missing := sorted(wanted - set(sent)):
            raise SchemaMismatch(f"the observation lacks {missing}; it has {sorted(map(str, sent))}")
        try:
            state = np.asarray(sent[STATE_KEY], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise SchemaMismatch(f"{STATE_KEY}: {error}") from error
        images = {name: sent[key] for name, key in self.camera_keys.items()}
        return Observation(images, state, str(sent[PROMPT_KEY]), time.monotonic_ns())


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.str not in DTYPES:
            raise ValueError(f"array of dtype {value.dtype}: allowed are {sorted(DTYPES)}")
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise ValueError(f"a {type(value).__name__} cannot travel")


def _unpack_array(value: dict) -> Any:
    if b"__ndarray__" in value:
        return array_from(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"))
    if b"__npgeneric__" in value:
        return value.get(b"data")
    return value
