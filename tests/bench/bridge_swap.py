"""Swaps under a running loop for `bench_bridge`: the stand-in cell's own nodes at 20 Hz beside a real `cotwin serve`.

Cell, cameras, arm and runtime run as processes from the launch file; the server really loads, warms up and infers
with each version, only its actions are replaced by "stay where you are". How late each tick of the runtime began comes
from `runtime_status`.
"""

import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RATE_HZ = 20.0
ROOT = Path(__file__).resolve().parents[2]
CALM_SERVER = """
import sys
import numpy as np
from learner import serve
real = serve.Loaded.infer
def calm(self, observations):
    actions, version = real(self, observations)
    still = np.zeros_like(actions)
    still[..., 6] = 1.0
    return still, version
serve.Loaded.infer = calm
sys.exit(serve.main(sys.argv[1:]))
"""
PATIENCE_S = 90.0


class Watcher:
    """Hears `runtime_status` and `safety_state`, and calls services. Nothing else: it must not load the machine."""

    def __init__(self, graph):
        import rclpy
        from diagnostic_msgs.msg import DiagnosticStatus
        from rclpy.experimental import EventsExecutor
        from rclpy.node import Node
        from rclpy.signals import SignalHandlerOptions

        self.graph, self.status = graph, {}
        self.context = rclpy.Context()
        domain = int(os.environ["ROS_DOMAIN_ID"])
        rclpy.init(context=self.context, domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
        self.node = Node("watcher", context=self.context, enable_rosout=False)
        self.executor = EventsExecutor(context=self.context)
        self.executor.add_node(self.node)
        for topic in ("runtime_status", "safety_state"):
            self.node.create_subscription(DiagnosticStatus, topic, lambda m, t=topic: self._hear(t, m), 10)

    def _hear(self, topic, message) -> None:
        self.status[topic] = {pair.key: pair.value for pair in message.values}

    def wait(self, condition, what: str, timeout_s: float = PATIENCE_S) -> None:
        until_s = time.monotonic() + timeout_s
        while not condition():
            if self.graph.ended() or time.monotonic() > until_s:
                output = self.graph._out.getvalue()[-3000:]
                raise TimeoutError(f"{what}: not within {timeout_s} s; {self.graph.ended()}; {output}")
            self.executor.spin_once(timeout_sec=0.1)

    def call(self, service: str) -> None:
        from std_srvs.srv import Trigger

        client = self.node.create_client(Trigger, service)
        self.wait(client.service_is_ready, service)
        future = client.call_async(Trigger.Request())
        self.wait(future.done, f"an answer of {service}")
        if not future.result().success:
            raise RuntimeError(f"{service}: {future.result().message}")

    def figures(self) -> dict:
        return self.status.get("runtime_status", {})

    def ticks(self) -> int:
        return int(self.figures().get("ticks", 0))

    def close(self) -> None:
        import rclpy

        self.executor.remove_node(self.node)
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


def write_versions(root: Path, embodiment, count: int) -> None:
    import torch

    from bridge.checkpoint import bundle_path, write_bundle
    from learner.load import bundle_files
    from learner.normalization import Quantiles
    from learner.small_policy import SmallPolicy, SmallPolicyConfig, Statistics

    span = Quantiles(np.full(7, -1.0), np.full(7, 1.0))
    for version in range(1, count + 1):
        torch.manual_seed(version)
        policy = SmallPolicy(SmallPolicyConfig(), embodiment, Statistics(span, span))
        files: dict[str, Path | bytes] = {**bundle_files(policy)}
        write_bundle(bundle_path(root, version), files, embodiment, version, version - 1, 0, {})


def launch_file(folder: Path, contract: Path) -> Path:
    """The cell's, with a contract of another rate for the cell and its nodes."""
    text = (ROOT / "launch/cell.launch.yaml").read_text()
    nodes, cell = '{name: "embodiment", value: "$(var embodiment)"}', "cotwin cell embodiment=$(var embodiment)"
    if text.count(nodes) < 3 or cell not in text:
        raise ValueError("launch/cell.launch.yaml names the embodiment in another way")
    text = text.replace(nodes, f'{{name: "embodiment", value: "{contract}"}}')
    for included in ("record.launch.yaml", "watch.launch.yaml"):  # the recorder keeps its contract: 30 fps fit 10 Hz
        (folder / included).write_text((ROOT / "launch" / included).read_text())
    path = folder / "cell.launch.yaml"
    path.write_text(text.replace(cell, f"{cell} embodiment.policy_rate_hz={RATE_HZ}"))
    return path


def late_ms(watcher: Watcher, ticks: int, work=lambda: True) -> tuple[list[float], dict]:
    """How late each of at least so many ticks began, and the runtime's figures; `work` is called again and again, and
    says when it is done."""
    watcher.call("runtime_node/start")
    watcher.wait(lambda: watcher.figures().get("state") == "RUNNING", "the policy's start")
    watcher.call("runtime_node/stop")
    watcher.call("runtime_node/start")  # forgets the first chunk's pains
    watcher.wait(lambda: watcher.ticks() < ticks, "counting anew")

    def counted() -> bool:
        return work() and watcher.ticks() >= ticks

    watcher.wait(counted, f"{ticks} ticks", 20 * ticks / RATE_HZ)
    figures = dict(watcher.figures())
    watcher.call("runtime_node/stop")
    return json.loads(figures["tick_jitter_ms"]), figures


def bench_swap(figure, quick: bool) -> dict:
    from bridge.checkpoint_stream import CheckpointPublisher
    from bridge.config import load
    from learner.serve import ServeConfig
    from robot.up import Graph

    versions, ticks = (3, 100) if quick else (11, 500)
    os.environ["ROS_DOMAIN_ID"], os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = str(random.randint(1, 100)), "LOCALHOST"
    port = random.randint(20_000, 32_000)  # the kernel gives those from 32768 on to whoever connects
    control, frames, policy, announce, fetch = (f"tcp://127.0.0.1:{port + n}" for n in range(5))
    settings = [f"embodiment.policy_rate_hz={RATE_HZ}"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        embodiment = load("serve", ServeConfig, settings).embodiment
        embodiment.save(folder / "contract.json")
        write_versions(folder / "trained", embodiment, versions)
        ends = [f"announce_endpoint={announce}", f"fetch_endpoint={fetch}"]
        serve = [sys.executable, "-c", CALM_SERVER, f"root={folder}/deployed", f"endpoint={policy}", *ends, *settings]
        args = {"host": f"127.{random.randrange(1, 250)}.7.9", "cell_control": control, "cell_frames": frames}
        args |= {"policy_endpoint": policy, "deadline_s": "1.0", "num_action_chunks": "8", "prefetch_ticks": "4"}
        server = subprocess.Popen(serve, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        publisher = CheckpointPublisher(announce, fetch, folder / "trained")
        try:
            publisher.announce(1)
            publisher.wait_confirmed(1, timeout_s=PATIENCE_S)
            with Graph(str(launch_file(folder, folder / "contract.json")), args, io.StringIO()) as graph:
                watcher = Watcher(graph)
                watcher.wait(lambda: watcher.status.get("safety_state", {}).get("state") == "IDLE", "the cell's start")
                quiet, calm = late_ms(watcher, ticks // 2)
                announced = [1]

                def announce_next() -> bool:
                    """The next version once the loop acts by the last one, spread over its ticks."""
                    is_used = int(watcher.figures()["policy_version"]) == announced[-1]
                    if is_used and announced[-1] < versions and watcher.ticks() >= announced[-1] * ticks / versions:
                        announced.append(announced[-1] + 1)
                        publisher.announce(announced[-1])
                    return is_used and announced[-1] == versions

                swapping, figures = late_ms(watcher, ticks, announce_next)
                again, _ = late_ms(watcher, ticks // 2)
                watcher.close()
            publisher.wait_confirmed(versions, timeout_s=PATIENCE_S)
        finally:
            publisher.close()
            server.kill()
            server.wait()
    used = len(json.loads(figures["policy_versions"])) - 1
    extra_ms = max(swapping) - max(max(quiet), max(again))
    rows = {"without swaps": quiet, "with swaps": swapping, "without swaps, after": again}
    table = {name: {f"p{q}_ms": float(np.percentile(v, q)) for q in (50, 99, 100)} for name, v in rows.items()}
    for name, seen in (("without swaps", calm), ("with swaps", figures)):
        latency_ms = float(np.percentile(json.loads(seen["chunk_latency_ms"]), 99))
        table[name] |= {"ticks": int(seen["ticks"]), "holds": int(seen["holds"]), "chunk_latency_p99_ms": latency_ms}
    table["with swaps"]["swaps seen by the loop"] = used
    figures = {"swap_extra_jitter_ms": figure(extra_ms, None, None, "ms", None, used)}
    return {"figures": figures, "tables": {"swap": table}}
