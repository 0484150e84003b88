"""Look at the bridge and measure a link.

cotwin bridge top endpoint=tcp://127.0.0.1:5605      live telemetry: rates, latencies, versions, queue lengths
cotwin bridge echo endpoint=tcp://0.0.0.0:5601 ...   a no-op policy server, for the far end of a link
cotwin bridge bench endpoint=tcp://HOST:5601 ...     round trips to it: latency and MB/s (or to a real server)
cotwin bridge openpi endpoint=tcp://HOST:5601 ...    openpi's WebSocket protocol in front of it, for openpi's clients
"""

import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bridge.config import command_line, errors_in_one_line
from bridge.embodiment import Embodiment
from bridge.keys import Keys
from bridge.messages import Observation
from bridge.pictures import CODINGS
from bridge.policy_client import PolicyClient
from bridge.policy_server import PolicyServer
from bridge.telemetry import TelemetrySubscriber

POLICY_SERVER = "tcp://127.0.0.1:5601"
ENDPOINTS = {"top": "tcp://127.0.0.1:5605", "echo": POLICY_SERVER, "bench": POLICY_SERVER, "openpi": POLICY_SERVER}


@dataclass
class BridgeConfig:
    endpoint: str | None = None  # default: the channel's loopback endpoint (docs/architecture.md)
    keys: str | None = None  # key folder; needed unless the endpoint is loopback or ipc
    peer: str | None = None  # name of the key at the other end, where several are allowed
    refresh_s: float = 1.0  # top
    refreshes: int = 0  # top: stop after so many; 0: until it is interrupted
    calls: int = 200  # bench
    deadline_s: float = 5.0  # bench, openpi
    picture_coding: str = "raw"  # bench: raw, jpeg or png
    host: str = "127.0.0.1"  # openpi; another only with api_key
    port: int = 8000  # openpi
    api_key: str = ""  # openpi: what clients have to say; the protocol has no encryption
    embodiment: Embodiment = field(default_factory=Embodiment)


@errors_in_one_line()
def main(argv: list[str]) -> int:
    action, settings = (argv[0], argv[1:]) if argv and argv[0] in ENDPOINTS else (None, argv)
    config = command_line("bridge", BridgeConfig, settings, __doc__)
    if action is None:
        print(f"error: say what to do: cotwin bridge {'|'.join(ENDPOINTS)} (cotwin bridge --help)", file=sys.stderr)
        return 1
    endpoint = config.endpoint or ENDPOINTS[action]
    keys = Keys.at(config.keys, config.peer)
    {"top": top, "echo": echo, "bench": bench, "openpi": openpi}[action](endpoint, keys, config)
    return 0


class Top:
    """The newest message of each name, and how often it came."""

    def __init__(self):
        self._latest: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, int] = {}
        self._stamp_ns: dict[str, int] = {}

    def take(self, messages: list[tuple[str, dict[str, Any], int]]) -> None:
        for name, fields, stamp_ns in messages:
            self._latest[name], self._stamp_ns[name] = fields, stamp_ns
            self._seen[name] = self._seen.get(name, 0) + 1

    def page(self, elapsed_s: float, missed: int) -> str:
        lines = [f"{time.strftime('%H:%M:%S')}  {len(self._latest)} sources, {missed} messages missed"]
        for name in sorted(self._latest):
            age_s = time.time() - self._stamp_ns[name] / 1e9
            lines.append(f"\n{name}  {self._seen[name] / elapsed_s:.1f}/s, {age_s:.1f} s old")
            lines += [f"  {key:<28} {_short(value)}" for key, value in sorted(self._latest[name].items())]
        self._seen = dict.fromkeys(self._seen, 0)
        return "\n".join(lines)


def top(endpoint: str, keys: Keys | None, config: BridgeConfig) -> None:
    subscriber, view, shown = TelemetrySubscriber(endpoint, keys=keys), Top(), 0
    try:
        while config.refreshes == 0 or shown < config.refreshes:
            started_s = time.monotonic()
            while (left_s := started_s + config.refresh_s - time.monotonic()) > 0:
                view.take(subscriber.poll(left_s))
            clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
            print(clear + view.page(time.monotonic() - started_s, subscriber.missed), flush=True)
            shown += 1
    except KeyboardInterrupt:
        return
    finally:
        subscriber.close()


def echo(endpoint: str, keys: Keys | None, config: BridgeConfig) -> None:
    def no_op(observations: list[Observation]) -> tuple[np.ndarray, int]:
        return np.zeros((len(observations), 50, 7), np.float32), 0

    server = PolicyServer(endpoint, config.embodiment, no_op, max_batch=8, keys=keys)
    print(f"no-op policy server at {server.endpoint}; measure it with: cotwin bridge bench endpoint=...", flush=True)
    server.serve_forever(asked_to_stop())


def openpi(endpoint: str, keys: Keys | None, config: BridgeConfig) -> None:
    from bridge.openpi_port import OpenpiPort  # nothing else here needs WebSockets

    port = OpenpiPort(
        config.host,
        config.port,
        endpoint,
        config.embodiment,
        keys=keys,
        api_key=config.api_key or None,
        deadline_s=config.deadline_s,
    )
    serving = threading.Thread(target=port.serve_forever, name="openpi")
    serving.start()
    print(f"openpi's protocol at ws://{config.host}:{port.port}, for the policy server at {endpoint}", flush=True)
    asked_to_stop().wait()
    port.close()
    serving.join()


def asked_to_stop() -> threading.Event:
    """Set by SIGINT or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def bench(endpoint: str, keys: Keys | None, config: BridgeConfig) -> None:
    if config.picture_coding not in CODINGS:
        raise ValueError(f"picture_coding {config.picture_coding!r}: allowed are {', '.join(CODINGS)}")
    coding = config.picture_coding
    client = PolicyClient(endpoint, config.embodiment, keys=keys, picture_coding=coding, shared_pictures=False)
    try:
        client.wait_ready(config.deadline_s)
        sizes = {(camera.height, camera.width) for camera in config.embodiment.cameras.values()} | {(224, 224)}
        print(f"{'pictures':>16} {'p50 ms':>8} {'p99 ms':>8} {'calls/s':>8} {'MB/s':>8}")
        for height, width in sorted(sizes, reverse=True):
            print(measure(client, config, height, width), flush=True)
    finally:
        client.close()


def measure(client: PolicyClient, config: BridgeConfig, height: int, width: int) -> str:
    """One line of the table: smooth synthetic pictures, so that a picture coding has something to compress."""
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    images = {name: ramp.astype(np.uint8) for name in config.embodiment.cameras}
    observation = Observation(images, np.zeros(7, np.float32), "measure the link", time.monotonic_ns())
    times_s = []
    for _ in range(config.calls):
        started_s = time.perf_counter()
        client.infer(observation, config.deadline_s)
        times_s.append(time.perf_counter() - started_s)
    p50_ms, p99_ms = np.percentile(times_s, (50, 99)) * 1e3
    rate = len(times_s) / sum(times_s)
    megabytes = sum(image.nbytes for image in images.values()) / 1e6
    label = f"{len(images)} x {width}x{height}"
    return f"{label:>16} {p50_ms:8.2f} {p99_ms:8.2f} {rate:8.0f} {rate * megabytes:8.1f}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)[:60]
