"""The bridge beside a bare ZeroMQ socket, openpi's protocol and LeRobot's async inference, all on loopback in one run.

    python -m tests.bench.bench_bridge [--quick] [--only PART ...] [--out FILE]

round_trip: two 640x480 RGB pictures and a state to a [50, 7] chunk, no-op policy, server in a process of its own.
Ours puts a local server's pictures into shared memory; the rows "by the socket" are what another machine would see.
link: the same through a cable shaped to 100 Mbit/s and 10 ms there and back, where the machine allows it
(root; tests/bench/shaped_link.py).
bundle, update: a 1 GB checkpoint beside a raw stream; an expert-only update (tests/bench/bridge_delivery.py).
swap: ten versions under a 20 Hz loop in the stand-in cell (tests/bench/bridge_swap.py). delivery, demos: kills.
Writes docs/results/bridge.json (docs/contract.md, section 9). Meaningful on a quiet machine only.
"""

import argparse
import asyncio
import contextlib
import datetime
import functools
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import zmq

from bridge.embodiment import Camera, Embodiment
from bridge.keys import Keys
from bridge.messages import Observation
from bridge.openpi_port import pack, unpack
from bridge.pictures import PictureFormat
from bridge.policy_client import PolicyClient
from bridge.policy_server import PolicyServer
from bridge.sockets import is_local
from tests.bench import bridge_delivery, bridge_swap
from tests.bench.shaped_link import LOOPBACK, ShapedLink

RESULT = Path(__file__).resolve().parents[2] / "docs/results/bridge.json"
EMBODIMENT = Embodiment(cameras={"third_person": Camera(), "wrist": Camera()})
CHUNK = np.zeros((50, 7), np.float32)
SPAWN = multiprocessing.get_context("spawn")
OPENPI = "openpi protocol"
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    OPENPI = f"openpi-client {importlib.metadata.version('openpi-client')}"


def observation(height: int, width: int) -> Observation:
    """Soft shapes with a little noise, so that compression has about as much to do as with a camera's picture."""
    rng = np.random.default_rng(0)
    images = {}
    for name in EMBODIMENT.cameras:
        soft = cv2.resize(rng.integers(20, 235, (12, 16, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
        images[name] = np.clip(soft + rng.normal(0, 2, soft.shape), 0, 255).astype(np.uint8)
    return Observation(images, np.zeros(7, np.float32), "put the cube on the plate", time.monotonic_ns())


@contextlib.contextmanager
def made_keys():
    """Key folders of a server and a robot that know each other."""
    with tempfile.TemporaryDirectory() as folder:
        server = Keys.new(Path(folder, "server"), "server", "server")
        robot = Keys.new(Path(folder, "robot"), "robot", "robot")
        server.allow(robot.me)
        robot.allow(server.me)
        yield f"{folder}/server", f"{folder}/robot"


# --- servers, each in a process of its own ---------------------------------------------------------------------------


def serve_ours(pipe, keys_folder, address):
    keys = Keys(Path(keys_folder)) if keys_folder else None
    no_op = lambda observations: (np.zeros((len(observations), 50, 7), np.float32), 1)  # noqa: E731
    server = PolicyServer(
        f"tcp://{address}:*", EMBODIMENT, no_op, max_batch=8, keys=keys, pictures=PictureFormat(224, 224, padded=True)
    )
    pipe.send(server.endpoint)
    run_until_told(pipe, server.serve_forever)


def serve_bare(pipe, keys_folder, address):
    context = zmq.Context()
    socket = context.socket(zmq.REP)
    if keys_folder:
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = Keys(Path(keys_folder)).curve_pair
    socket.bind(f"tcp://{address}:*")
    pipe.send(socket.last_endpoint.decode())

    def serve(stop):
        while not stop.is_set():
            if socket.poll(50):
                socket.recv_multipart(copy=False)
                socket.send(CHUNK, copy=False)

    run_until_told(pipe, serve)
    context.destroy(linger=0)


def serve_openpi(pipe, keys_folder, address):
    """As openpi's server does it: asyncio, inference inside the event loop, msgpack with arrays in one frame."""
    import websockets.asyncio.server

    encode, decode = openpi_encoding()

    async def talk(connection):
        await connection.send(encode({}))
        async for data in connection:
            decode(data)
            await connection.send(encode({"actions": CHUNK, "server_timing": {"infer_ms": 0.0}}))

    async def run():
        async with websockets.asyncio.server.serve(talk, address, 0, compression=None, max_size=None) as server:
            pipe.send(f"ws://{address}:{server.sockets[0].getsockname()[1]}")
            before_s = cpu_s()
            while not pipe.poll():
                await asyncio.sleep(0.05)
            pipe.recv()
        pipe.send(cpu_s() - before_s)

    asyncio.run(run())


def serve_lerobot(pipe, keys_folder, address):
    """LeRobot's own gRPC servicer with its own preparation of observations; only the policy is replaced by a no-op."""
    os.chdir(tempfile.mkdtemp())  # it writes log files where it is imported
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace

    import grpc
    import torch
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.policy_server import PolicyServer as LeRobotServer
    from lerobot.transport import services_pb2_grpc

    servicer = LeRobotServer(PolicyServerConfig(inference_latency=0.0))
    logging.disable(logging.INFO)
    servicer.lerobot_features = lerobot_features()
    image_features = {f"observation.images.{name}": SimpleNamespace(shape=(3, 480, 640)) for name in EMBODIMENT.cameras}
    servicer.policy = SimpleNamespace(
        config=SimpleNamespace(image_features=image_features),
        predict_action_chunk=lambda observed: torch.zeros(1, 50, 7),
    )
    servicer.actions_per_chunk = 50
    servicer.preprocessor = servicer.postprocessor = lambda value: value
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{address}:0")
    server.start()
    pipe.send(f"{address}:{port}")
    run_until_told(pipe, lambda stop: stop.wait())
    server.stop(0)


def openpi_encoding():
    if OPENPI == "openpi protocol":
        return pack, unpack
    from openpi_client import msgpack_numpy

    return msgpack_numpy.Packer().pack, msgpack_numpy.unpackb


def lerobot_features():
    features = {"observation.state": {"dtype": "float32", "shape": (7,), "names": [f"s{k}" for k in range(7)]}}
    for name in EMBODIMENT.cameras:
        features[f"observation.images.{name}"] = {"dtype": "video", "shape": (480, 640, 3), "names": None}
    return features


def run_until_told(pipe, serve):
    stop = threading.Event()

    def wait():
        pipe.recv()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    before_s = cpu_s()
    serve(stop)
    pipe.send(cpu_s() - before_s)


def serve_at(place, target, pipe, keys_folder):
    place.enter()
    target(pipe, keys_folder, place.address)


@contextlib.contextmanager
def server_process(target, keys_folder, place):
    """Yields the endpoint and a function that stops the server and returns the CPU seconds it took."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=serve_at, args=(place, target, theirs, keys_folder), daemon=True)
    process.start()
    try:
        if not ours.poll(60):
            raise TimeoutError(f"{target.__name__} did not start")

        def stop():
            ours.send("stop")
            return ours.recv() if ours.poll(10) else float("nan")

        yield ours.recv(), stop
    finally:
        process.kill()
        process.join()


# --- callers: each a function that makes one call --------------------------------------------------------------------


@contextlib.contextmanager
def call_ours(endpoint, observed, keys, **options):
    client = PolicyClient(endpoint, EMBODIMENT, keys=keys, **options)
    client.wait_ready(20)
    shared = options.get("shared_pictures", True) and options.get("picture_coding", "raw") == "raw"
    if client.stats()["shared_pictures"] != (shared and is_local(endpoint)):
        raise RuntimeError(f"pictures go another way than was asked: {client.stats()}")
    yield lambda: client.infer(observed, 10.0)
    client.close()


@contextlib.contextmanager
def call_bare(endpoint, observed, keys):
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    if keys:
        socket.curve_serverkey = keys.server_key("infer")
        socket.curve_publickey, socket.curve_secretkey = keys.curve_pair
    socket.connect(endpoint)
    frames = [observed.state.tobytes(), *observed.images.values()]

    def call():
        socket.send_multipart(frames, copy=False)
        socket.recv_multipart(copy=False)

    yield call
    context.destroy(linger=0)


@contextlib.contextmanager
def call_openpi(endpoint, observed, keys):
    """openpi's own client where it is installed (`uv pip install --no-deps openpi-client`: it asks for an old numpy),
    else its protocol as our compatibility port speaks it."""
    keyed = {"observation/image": observed.images["third_person"], "observation/wrist_image": observed.images["wrist"]}
    keyed |= {"observation/state": observed.state, "prompt": observed.instruction}
    if OPENPI != "openpi protocol":
        from openpi_client.websocket_client_policy import WebsocketClientPolicy

        policy = WebsocketClientPolicy(endpoint)
        yield lambda: policy.infer(keyed)
        policy._ws.close()
        return
    import websockets.sync.client

    with websockets.sync.client.connect(endpoint, compression=None, max_size=None) as connection:
        connection.recv()

        def call():
            connection.send(pack(keyed))
            unpack(connection.recv())

        yield call


@contextlib.contextmanager
def call_lerobot(endpoint, observed, keys):
    """What LeRobot's robot client does for one chunk: pickle, send in 2 MB pieces, ask for the actions, unpickle."""
    import pickle

    import grpc
    from lerobot.async_inference.helpers import TimedObservation
    from lerobot.transport import services_pb2, services_pb2_grpc
    from lerobot.transport.utils import grpc_channel_options, send_bytes_in_chunks

    channel = grpc.insecure_channel(endpoint, grpc_channel_options())
    stub = services_pb2_grpc.AsyncInferenceStub(channel)
    stub.Ready(services_pb2.Empty())
    raw = {f"s{k}": float(v) for k, v in enumerate(observed.state)} | observed.images | {"task": observed.instruction}
    steps = iter(range(10**9))

    def call():
        timed = TimedObservation(timestamp=time.time(), observation=raw, timestep=next(steps), must_go=True)
        pieces = send_bytes_in_chunks(pickle.dumps(timed), services_pb2.Observation, silent=True)
        stub.SendObservations(pieces)
        answer = stub.GetActions(services_pb2.Empty())
        if len(pickle.loads(answer.data)) != 50:
            raise RuntimeError("LeRobot's server did not answer with 50 actions")

    yield call
    channel.close()


def measure(server, caller, calls, size=(480, 640), folders=(None, None), link=(LOOPBACK, LOOPBACK)):
    """p50 and p99 in ms, CPU ms a call over both processes, MB/s of pictures as they were before any coding."""
    observed = observation(*size)
    keys = Keys(Path(folders[1])) if folders[1] else None
    with open("/proc/thread-self/ns/net") as home, server_process(server, folders[0], link[0]) as (endpoint, stop):
        link[1].enter()
        try:
            with caller(endpoint, observed, keys) as call:
                for _ in range(max(10, calls // 10)):
                    call()
                cpu_before_s, started_s, times_s = cpu_s(), time.monotonic(), []
                for _ in range(calls):
                    before_s = time.perf_counter()
                    call()
                    times_s.append(time.perf_counter() - before_s)
                elapsed_s, client_cpu_s = time.monotonic() - started_s, cpu_s() - cpu_before_s
        finally:
            if link[1].namespace is not None:
                os.setns(home.fileno(), os.CLONE_NEWNET)
        server_cpu_s = stop()
    megabytes = sum(image.nbytes for image in observed.images.values()) / 1e6
    return {
        "p50_ms": float(np.percentile(times_s, 50)) * 1e3,
        "p99_ms": float(np.percentile(times_s, 99)) * 1e3,
        "calls_per_s": calls / elapsed_s,
        "mb_per_s": megabytes * calls / elapsed_s,
        "client_cpu_ms": client_cpu_s / calls * 1e3,
        "server_cpu_ms": server_cpu_s / calls * 1e3,
    }


def bench_round_trip(quick: bool) -> dict:
    calls = 200 if quick else 1000
    resized = functools.partial(call_ours, resize_pictures=True)
    by_socket = functools.partial(call_ours, shared_pictures=False)
    with made_keys() as curve:
        rows = {
            "bare ZeroMQ REQ/REP": measure(serve_bare, call_bare, calls),
            "ours": measure(serve_ours, call_ours, calls),
            "ours, by the socket": measure(serve_ours, by_socket, calls),
            OPENPI: measure(serve_openpi, call_openpi, calls),
            "LeRobot async (gRPC)": measure(serve_lerobot, call_lerobot, calls // 2),
            "bare ZeroMQ + CURVE": measure(serve_bare, call_bare, calls, folders=curve),
            "ours + CURVE": measure(serve_ours, call_ours, calls, folders=curve),
            "ours + CURVE, by the socket": measure(serve_ours, by_socket, calls, folders=curve),
            "ours + CURVE, 224x224": measure(serve_ours, call_ours, calls, (224, 224), curve),
            "ours + CURVE, 224x224, by the socket": measure(serve_ours, by_socket, calls, (224, 224), curve),
            "ours + CURVE, resized to 224x224 by the client": measure(serve_ours, resized, calls, folders=curve),
            "ours, 224x224": measure(serve_ours, call_ours, calls, (224, 224)),
            "ours, 224x224, by the socket": measure(serve_ours, by_socket, calls, (224, 224)),
            f"{OPENPI}, 224x224": measure(serve_openpi, call_openpi, calls, (224, 224)),
        }
    figures = {}
    lerobot, bare = "LeRobot async (gRPC)", "bare ZeroMQ REQ/REP"
    pairs = {  # figure: (ours, peer, how the peer is named)
        "": ("ours", OPENPI, f"{OPENPI} (WebSocket)"),
        "_beside_lerobot": ("ours", lerobot, "LeRobot 0.6.1 async inference, inference_latency=0"),
        "_beside_bare": ("ours", bare, bare),
        "_socket": ("ours, by the socket", OPENPI, f"{OPENPI} (WebSocket)"),
        "_socket_beside_bare": ("ours, by the socket", bare, bare),
        "_curve": ("ours + CURVE", OPENPI, f"{OPENPI}, clear text"),
        "_curve_socket": ("ours + CURVE, by the socket", OPENPI, f"{OPENPI}, clear text"),
        "_curve_224": ("ours + CURVE, 224x224", OPENPI, f"{OPENPI}, clear text, 640x480"),
        "_curve_224_socket": ("ours + CURVE, 224x224, by the socket", OPENPI, f"{OPENPI}, clear text, 640x480"),
        "_curve_resized": (
            "ours + CURVE, resized to 224x224 by the client",
            OPENPI,
            f"{OPENPI}, clear text, 640x480",
        ),
    }
    for name, (row, peer_row, peer_name) in pairs.items():
        for quantile in ("p50_ms", "p99_ms"):
            ours, peer = rows[row][quantile], rows[peer_row][quantile]
            figures[f"round_trip{name}_{quantile}"] = figure(ours, peer, peer / ours, "ms", peer_name, calls)
    return {"figures": figures, "tables": {"round_trip": rows}}


# --- a slow link ------------------------------------------------------------------------------------------------------


def bench_link(quick: bool) -> dict:
    """Round trips over the shaped link; ours with CURVE, as clear text may not leave a machine."""
    calls = 20 if quick else 100
    size, small = (480, 640), (224, 224)
    try:
        with ShapedLink() as link, made_keys() as curve:
            jpeg = functools.partial(call_ours, picture_coding="jpeg")
            resized = functools.partial(call_ours, resize_pictures=True)
            both = functools.partial(call_ours, resize_pictures=True, picture_coding="jpeg")
            rows = {
                "bare ZeroMQ + CURVE": measure(serve_bare, call_bare, calls, size, curve, link),
                OPENPI: measure(serve_openpi, call_openpi, calls, size, link=link),
                f"{OPENPI}, 224x224": measure(serve_openpi, call_openpi, calls, small, link=link),
                "ours + CURVE": measure(serve_ours, call_ours, calls, size, curve, link),
                "ours + CURVE, JPEG": measure(serve_ours, jpeg, calls, size, curve, link),
                "ours + CURVE, resized to 224x224": measure(serve_ours, resized, calls, size, curve, link),
                "ours + CURVE, resized to 224x224, JPEG": measure(serve_ours, both, calls, size, curve, link),
            }
    except RuntimeError as error:
        return {"figures": {}, "tables": {"link_100mbit_10ms": {"not measured": str(error)}}}
    ours, best, peer = (
        rows[name]["p50_ms"] for name in ("ours + CURVE", "ours + CURVE, resized to 224x224, JPEG", OPENPI)
    )
    peer_name = f"{OPENPI}, clear text, 640x480, same link"
    figures = {
        "link_round_trip_p50_ms": figure(ours, peer, peer / ours, "ms", peer_name, calls),
        "link_round_trip_resized_jpeg_p50_ms": figure(best, peer, peer / best, "ms", peer_name, calls),
    }
    return {"figures": figures, "tables": {"link_100mbit_10ms": rows}}


# --- kills -----------------------------------------------------------------------------------------------------------


def bench_delivery(quick: bool) -> dict:
    from tests.bridge.test_delivery_kills import deliver_with_kills

    with tempfile.TemporaryDirectory() as folder:
        kills, size, longest_s = (4, 300_000, 1.0) if quick else (20, 2_000_000, 2.0)
        survived = deliver_with_kills(Path(folder), kills, seed=7, size=size, longest_s=longest_s)["kills"]
    return {"figures": {"delivery_kills_survived": figure(survived, None, None, "kills", None, kills)}, "tables": {}}


def bench_demos(quick: bool) -> dict:
    from tests.bridge.test_demo_stream import kill_both_at_random, require_every_episode_once

    episodes, kills, longest_s = (10, 3, 2.0) if quick else (200, 20, 4.5)
    with tempfile.TemporaryDirectory() as folder:
        held = kill_both_at_random(Path(folder), episodes, kills, seed=8, longest_s=longest_s)
        require_every_episode_once(Path(folder), held)
    figures = {"demo_kills_lost_episodes": figure(episodes - len(held), None, None, "episodes", None, episodes)}
    return {"figures": figures, "tables": {"demos": {"episodes": episodes, "kills_each_side": kills}}}


# --- writing ---------------------------------------------------------------------------------------------------------

PARTS = {
    "round_trip": bench_round_trip,
    "link": bench_link,
    "bundle": lambda quick: bridge_delivery.bench_bundle(figure, quick),
    "update": lambda quick: bridge_delivery.bench_update(figure, quick),
    "swap": lambda quick: bridge_swap.bench_swap(figure, quick),
    "delivery": bench_delivery,
    "demos": bench_demos,
}


def figure(ours, peer, ratio, unit, peer_name, n) -> dict:
    return {"ours": ours, "peer": peer, "ratio": ratio, "unit": unit, "peer_name": peer_name, "n": n}


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def machine() -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(memory),
        "load_average": os.getloadavg()[0],
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    cv2.setNumThreads(1)
    before = json.loads(options.out.read_text()) if options.out.exists() else {"figures": {}, "tables": {}}
    about = machine()
    figures, tables = before["figures"], before["tables"]
    for part in options.only:
        started_s = time.monotonic()
        result = PARTS[part](options.quick)
        print(f"{part}: {time.monotonic() - started_s:.0f} s")
        figures |= result["figures"]
        tables |= result["tables"]
        print(json.dumps(result, indent=1), flush=True)
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=RESULT.parent, capture_output=True, text=True, check=True).stdout
    document = {
        "name": "bridge",
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "command": f"python -m tests.bench.bench_bridge {' '.join(argv)}".strip(),
        "machine": about,
        "figures": figures,
        "tables": tables,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
