"""The robot side on one machine: recorder, kills, loop quality, random streams. Beside LeRobot's record command.

    python -m tests.bench.bench_robot [--quick] [--only PART ...] [--out FILE]

recorder: ten minutes of the stand-in cell at 30 fps, two pictures of 640x480 and 7-D state and action, the arm moving.
kills: SIGKILL to the recorder at random moments (tests/bench/robot_kills.py). loop: commands at 20 Hz with cameras and
recorder running and a policy that takes 300 ms for a chunk, beside LeRobot's record loop on the same cell (which has no
policy to wait for; it goes by the wall clock, ours by the cell's). streams: the property test of the streamed target.
evaluation: two checkpoints of `cotwin demo` (or of the folder CHECKPOINTS names) in the cell in lock step, killed and
resumed (tests/bench/robot_evaluation.py). faults: what robot_faults.json says.
Writes docs/results/robot.json (docs/contract.md, section 9). Meaningful on a quiet machine only.
"""

import argparse
import datetime
import functools
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from geometry_msgs.msg import PoseStamped
from hypothesis import given, settings
from hypothesis import strategies as st
from rclpy.qos import QoSProfile
from sensor_msgs.msg import JointState
from std_srvs.srv import SetBool

from bridge import data_command
from bridge.pose import ACTION_NAMES
from robot.params import load_embodiment
from robot.stamped import matrix_of, stamp_ns
from robot.up import Graph
from sim.stand_in.client import CellClient
from tests.bench import robot_evaluation, robot_kills
from tests.bench.bench_bridge import figure, machine
from tests.bench.bridge_swap import RATE_HZ, ROOT, Watcher, launch_file
from tests.robot.cell import loopback
from tests.robot.test_lerobot_plugin import LEROBOT_RECORD, install_plugin
from tests.robot.test_target import bounds, check_stream, limits_of, streams

RESULT = ROOT / "docs/results/robot.json"
FAULTS = ROOT / "docs/results/robot_faults.json"
CHECKPOINTS = Path(os.environ.get("CHECKPOINTS", ROOT / "runs/demo/checkpoints"))  # as `cotwin demo` leaves them
SLOW_POLICY = """
import sys, threading, time
import numpy as np
from bridge.policy_server import PolicyServer
from robot.params import load_embodiment

def infer(observations):
    time.sleep(0.3)
    k = time.monotonic() / 0.05 + np.arange(24)
    actions = np.zeros((len(observations), 24, 7), np.float32)
    actions[:, :, 1], actions[:, :, 6] = 0.004 * np.sin(2 * np.pi * k / 60), 1.0
    return actions, 1

PolicyServer(sys.argv[1], load_embodiment(sys.argv[2]), infer, max_batch=1).serve_forever(threading.Event())
"""


class Listener(Watcher):
    """Also hears commands and poses, and saves episodes."""

    def __init__(self, graph):
        super().__init__(graph)
        self.arrived_s: dict[str, list[float]] = {"action": [], "teleop/action": []}
        self.stamps_s: list[float] = []  # of actions
        self.poses: dict[str, list] = {"tcp_pose": [], "target_pose": []}  # (time s, position m)
        self.listening = False
        many = QoSProfile(depth=100)
        for topic in self.arrived_s:
            self.node.create_subscription(JointState, topic, functools.partial(self._on_command, topic), many)
        for topic in self.poses:
            self.node.create_subscription(PoseStamped, topic, functools.partial(self._on_pose, topic), many)

    def _on_command(self, topic, message) -> None:
        if topic == "action":
            self.stamps_s.append(stamp_ns(message) * 1e-9)
        if self.listening:
            self.arrived_s[topic].append(time.monotonic())

    def _on_pose(self, topic, message) -> None:
        if self.listening:
            self.poses[topic].append((stamp_ns(message) * 1e-9, *matrix_of(message)[:3, 3]))

    def spin(self, duration_s: float) -> None:
        until_s = time.monotonic() + duration_s
        while (left_s := until_s - time.monotonic()) > 0:
            self.executor.spin_once(timeout_sec=min(left_s, 0.1))
            if self.graph.ended():
                raise RuntimeError(f"{self.graph.ended()}: {self.graph._out.getvalue()[-3000:]}")

    def save(self) -> dict:
        client = self.node.create_client(SetBool, "save_episode")
        self.wait(client.service_is_ready, "save_episode")
        future = client.call_async(SetBool.Request(data=True))
        self.wait(future.done, "an answer of save_episode")
        if not future.result().success:
            raise RuntimeError(f"{future.result().message}: {self.graph._out.getvalue()[-3000:]}")
        return json.loads(future.result().message)


@contextmanager
def running_cell(folder: Path, file: str, **args: str):
    """A recording stand-in cell with its arm at home, on addresses of its own: (listener, client of the cell)."""
    os.environ["ROS_DOMAIN_ID"], os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = str(random.randint(1, 100)), "LOCALHOST"
    port = random.randint(20_000, 32_000)  # the kernel gives those from 32768 on to whoever connects
    control, frames = f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}"
    all_args = {"host": loopback(), "cell_control": control, "cell_frames": frames, "record": "true"}
    all_args |= {"spool_dir": f"{folder}/spool", "dataset_root": f"{folder}/data"} | args
    with Graph(file, all_args, io.StringIO()) as graph:
        listener = Listener(graph)
        listener.wait(lambda: listener.status.get("safety_state", {}).get("state") == "IDLE", "the cell's start")
        listener.call("home")
        cell = CellClient(control)
        try:
            yield listener, cell
        finally:
            cell.close()
            listener.close()


# --- recorder --------------------------------------------------------------------------------------------------------


def bench_recorder(quick: bool) -> dict:
    minutes = 0.25 if quick else 10.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with running_cell(folder, str(ROOT / "launch/cell.launch.yaml")) as (listener, cell):
            sway = listener.node.create_publisher(JointState, "teleop/action", QoSProfile(depth=10))
            listener.node.create_timer(0.1, functools.partial(publish_sway, sway))
            listener.spin(1.0)
            listener.call("start_episode")
            began_s, cell_s = time.monotonic(), float(cell.stats()["time_s"])
            while float(cell.stats()["time_s"]) - cell_s < 60 * minutes:
                listener.spin(1.0)
            wall_s, cell_s = time.monotonic() - began_s, float(cell.stats()["time_s"]) - cell_s
            told = listener.save()
        (line,) = data_command.inspect(folder / "data")[1]
        if line["problems"]:
            raise RuntimeError(f"the recording is damaged: {line['problems']}")
    table = {
        key: told[key] for key in ("rows", "repeated", "late_ignored", "max_gap_ms", "gaps_over_50ms", "max_backlog")
    }
    table |= {"seconds": cell_s, "wall_s": wall_s, "recorder_cores": told["cpu_s"] / wall_s, "frames_equal_rows": True}
    figures = {
        "recorder_dropped_frames": figure(told["repeated"], None, None, "frames", None, 2 * told["rows"]),
        "recorder_real_time_factor": figure(cell_s / wall_s, None, None, "", None, told["rows"]),
    }
    return {"figures": figures, "tables": {"recorder": table}}


def publish_sway(publisher) -> None:
    """A hand at the device that leads the arm to and fro."""
    y_m = 0.01 * float(np.sin(2 * np.pi * time.monotonic() / 4.0))
    publisher.publish(JointState(name=list(ACTION_NAMES), position=[0.0, y_m, 0.0, 0.0, 0.0, 0.0, 1.0]))


# --- loop ------------------------------------------------------------------------------------------------------------


def bench_loop(quick: bool) -> dict:
    seconds = 8.0 if quick else 60.0
    ours, theirs = our_loop(seconds), lerobot_loop(seconds)
    name = "lerobot-record 0.6.1 through the plugin, same cell, no policy"
    n = ours["commands"]
    figures = {
        "tick_jitter_p99_ms": compared(ours["jitter_p99_ms"], theirs["jitter_p99_ms"], "ms", name, n),
        "largest_command_gap_periods": compared(
            ours["largest_gap_periods"], theirs["largest_gap_periods"], "", name, n
        ),
        "tracking_lag_ms": figure(ours["tracking_lag_ms"], None, None, "ms", None, n),
    }
    return {"figures": figures, "tables": {"loop_20hz": {"cotwin, policy of 300 ms": ours, name: theirs}}}


def compared(ours: float, peer: float, unit: str, name: str, n: int) -> dict:
    return figure(ours, peer, peer / max(ours, 1e-9), unit, name, n)


def our_loop(seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file, endpoint = fast_cell(folder), f"tcp://127.0.0.1:{random.randint(50_001, 60_000)}"
        policy = subprocess.Popen([sys.executable, "-c", SLOW_POLICY, endpoint, folder / "contract.json"], cwd=ROOT)
        args = {"policy_endpoint": endpoint, "deadline_s": "1.0", "num_action_chunks": "20", "prefetch_ticks": "10"}
        try:
            with running_cell(folder, file, **args) as (listener, cell):
                listener.call("start_episode")
                listener.call("runtime_node/start")
                listener.wait(lambda: listener.figures().get("state") == "RUNNING", "the policy's start")
                listener.spin(2.0)
                begin_s = float(cell.stats()["time_s"])
                by_wall = spread(heard(listener, "action", seconds))
                rtf = (float(cell.stats()["time_s"]) - begin_s) / seconds
                listener.call("runtime_node/stop")
                listener.spin(0.5)  # until the status has told of the last command
                runtime = listener.figures()
                told = listener.save()
        finally:
            policy.kill()
            policy.wait()
    # On the robot's own clock, which the cell slows down where the machine is busy: each command names its tick, and
    # the runtime knows how late it sent each (the beginning of its tick, counted before, is not yet the command).
    ticks = np.rint((np.array(listener.stamps_s) - listener.stamps_s[0]) * RATE_HZ).astype(int)
    late_ms = np.array(json.loads(runtime["command_late_ms"]))[-len(ticks) :]
    table = spread(np.diff(ticks) * 1e3 / RATE_HZ + np.diff(late_ms))
    table |= {"late_p50_ms": float(np.percentile(late_ms, 50)), "late_p99_ms": float(np.percentile(late_ms, 99))}
    table |= {"ticks_without_command": int((np.diff(ticks) - 1).sum()), "wall_clock": by_wall, "real_time_factor": rtf}
    table["chunk_latency_p50_ms"] = float(np.percentile(json.loads(runtime["chunk_latency_ms"]), 50))
    table["tracking_lag_ms"] = lag_ms(listener.poses)
    return table | {"recorded_rows": told["rows"], "repeated": told["repeated"]}


def lerobot_loop(seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = fast_cell(folder)
        search = install_plugin(folder)
        more = {"robot.use_sim_time": "true", "robot.max_age_s": 2.0}
        options = robot_kills.lerobot_options(folder, folder / "lerobot", round(RATE_HZ), seconds + 6, 1, **more)
        with running_cell(folder, file, record="false") as (listener, cell), open(folder / "log.txt", "w") as log:
            environment = os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
            command = [sys.executable, "-c", LEROBOT_RECORD, *options]
            process = subprocess.Popen(command, env=environment, stderr=log, stdout=log)
            try:
                listener.listening = True
                listener.wait(
                    lambda: listener.arrived_s["teleop/action"] or process.poll() is not None, "its first command"
                )
                if process.poll() is not None:
                    raise RuntimeError((folder / "log.txt").read_text()[-3000:])
                listener.spin(2.0)
                begin_s = float(cell.stats()["time_s"])
                table = spread(heard(listener, "teleop/action", seconds))
                table["real_time_factor"] = (float(cell.stats()["time_s"]) - begin_s) / seconds
                process.wait(robot_kills.PATIENCE_S)
            finally:
                process.kill()
                process.wait()
    return table


def fast_cell(folder: Path) -> str:
    embodiment = load_embodiment("fr3_tabletop")
    embodiment.policy_rate_hz = RATE_HZ
    embodiment.save(folder / "contract.json")
    return str(launch_file(folder, folder / "contract.json"))


def heard(listener: Listener, topic: str, seconds: float) -> np.ndarray:
    """Milliseconds between the commands that arrive in the next `seconds`."""
    for values in (*listener.arrived_s.values(), listener.stamps_s, *listener.poses.values()):
        values.clear()
    listener.listening = True
    listener.spin(seconds)
    listener.listening = False
    gaps_ms = np.diff(listener.arrived_s[topic]) * 1e3
    if len(gaps_ms) < 0.3 * seconds * RATE_HZ:
        raise RuntimeError(f"{len(gaps_ms)} commands in {seconds} s: {listener.status}")
    return gaps_ms


def spread(gaps_ms: np.ndarray) -> dict:
    """Jitter is how far the distances of commands are from a period."""
    off_ms, periods = np.abs(gaps_ms - 1e3 / RATE_HZ), gaps_ms * 1e-3 * RATE_HZ
    return {
        "commands": len(gaps_ms) + 1,
        "jitter_p50_ms": float(np.percentile(off_ms, 50)),
        "jitter_p99_ms": float(np.percentile(off_ms, 99)),
        "largest_gap_periods": float(periods.max()),
        "gaps_over_1_5_periods": int((periods > 1.5).sum()),
    }


def lag_ms(poses: dict[str, list]) -> float:
    """The delay of the measured position behind the target that makes them most alike, to the millisecond."""
    tcp, target = (np.array(poses[topic]) for topic in ("tcp_pose", "target_pose"))
    late_s = np.arange(0, 301) * 1e-3
    inside = (tcp[:, 0] > target[0, 0] + 0.3) & (tcp[:, 0] < target[-1, 0])
    errors = [
        np.mean((np.interp(tcp[inside, 0] - s, target[:, 0], target[:, 2]) - tcp[inside, 2]) ** 2) for s in late_s
    ]
    return float(late_s[int(np.argmin(errors))] * 1e3)


# --- safety ----------------------------------------------------------------------------------------------------------


def bench_streams(quick: bool) -> dict:
    examples, outside, tried = 100 if quick else 10_000, 0, 0

    @settings(max_examples=examples, deadline=None, database=None)
    @given(streams, bounds, st.one_of(st.none(), st.integers(0, 14)))
    def try_one(stream, bound, halt_after):
        nonlocal tried
        tried += 1
        check_stream(stream, limits_of(*bound), halt_after)

    try:
        try_one()
    except AssertionError as error:  # hypothesis stops at the first one
        print(error)
        outside = 1
    return {
        "figures": {"random_streams_outside_limits": figure(outside, None, None, "streams", None, tried)},
        "tables": {},
    }


def bench_faults(quick: bool) -> dict:
    said = json.loads(FAULTS.read_text())["figures"]
    return {"figures": {name: said[name] for name in ("faults_injected", "faults_ending_safe")}, "tables": {}}


PARTS = {
    "recorder": bench_recorder,
    "kills": lambda quick: robot_kills.bench_kills(figure, quick),
    "loop": bench_loop,
    "streams": bench_streams,
    "evaluation": lambda quick: robot_evaluation.bench_evaluation(figure, quick, CHECKPOINTS),
    "faults": bench_faults,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it works")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    before = json.loads(options.out.read_text()) if options.out.exists() else {"figures": {}, "tables": {}}
    about, figures, tables = machine(), before["figures"], before["tables"]
    for part in options.only:
        started_s = time.monotonic()
        result = PARTS[part](options.quick)
        print(f"{part}: {time.monotonic() - started_s:.0f} s\n{json.dumps(result, indent=1)}", flush=True)
        figures |= result["figures"]
        tables |= result["tables"]
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    document = {
        "name": "robot",
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip(),
        "command": f"python -m tests.bench.bench_robot {' '.join(argv)}".strip(),
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
