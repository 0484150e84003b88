"""Kills of a recorder for `bench_robot`: ours and LeRobot's, each fed with the same topics (two pictures of 640x480 at
30 Hz) and killed with SIGKILL at random moments."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from std_srvs.srv import SetBool, Trigger

from bridge import data_command
from bridge.dataset import DatasetStore
from bridge.embodiment import Camera, Embodiment
from tests.robot.test_lerobot_plugin import LEROBOT_RECORD, install_plugin, readings
from tests.robot.topics import Topics

SIZE = (480, 640)
PATIENCE_S = 120.0
COUNT_READABLE = """
import sys
from lerobot.datasets import LeRobotDataset
try:
    dataset = LeRobotDataset("lab/kills", root=sys.argv[1], video_backend="pyav")
    ends = [int(episode["dataset_to_index"]) for episode in dataset.meta.episodes]
    assert all(dataset[end - 1] for end in ends)
    print(len(ends))
except Exception as error:  # whatever a reader can make of what is left
    print(repr(error)[:300], file=sys.stderr)
    print(0)
"""


@contextmanager
def feeding(folder: Path):
    embodiment = Embodiment(cameras={"third_person": Camera(), "wrist": Camera()}, instructions=["pick up the cube"])
    embodiment.save(folder / "contract.json")
    os.environ["ROS_DOMAIN_ID"], os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = str(random.randint(1, 100)), "LOCALHOST"
    topics = Topics(int(os.environ["ROS_DOMAIN_ID"]), SIZE)
    try:
        yield topics, embodiment
    finally:
        topics.close()


def ask(topics: Topics, process: subprocess.Popen, kind, service: str, **fields):
    """The answer; None when the process died first. Asked again each second: a killed predecessor's service is believed
    to be there for some seconds more."""
    client = topics.node.create_client(kind, service)
    until_s = time.monotonic() + PATIENCE_S
    try:
        while process.poll() is None:
            future = client.call_async(kind.Request(**fields))
            again_s = time.monotonic() + (1.0 if kind is Trigger else PATIENCE_S)
            while process.poll() is None and time.monotonic() < again_s:
                if future.done():
                    return future.result()
                time.sleep(0.005)
            if time.monotonic() > until_s:
                raise TimeoutError(f"no answer of {service}")
        return None
    finally:
        topics.node.destroy_client(client)


def kill_ours(runs: int, longest_s: float, seed: int) -> dict:
    """Each run starts a recorder on the same data set and records short episodes until it is killed."""
    rng, saved, interrupted = np.random.default_rng(seed), {}, 0
    with tempfile.TemporaryDirectory() as temporary, feeding(Path(temporary)) as (topics, embodiment):
        folder = Path(temporary)
        values = {
            "embodiment": folder / "contract.json",
            "dataset_root": folder / "data",
            "spool_dir": folder / "spool",
        }
        words = [w for key, value in (values | {"domain": "stand_in"}).items() for w in ("-p", f"{key}:={value}")]
        for run in range(runs):
            with open(folder / "log.txt", "a") as log:
                command = [sys.executable, "-m", "robot.recorder_node", "--ros-args", *words]
                process = subprocess.Popen(command, stderr=log, stdout=log)
            answer = ask(topics, process, Trigger, "start_episode")
            if answer is None:
                raise RuntimeError(f"the recorder ended by itself: {(folder / 'log.txt').read_text()[-2000:]}")
            bomb = threading.Timer(float(rng.uniform(0.2, longest_s)), process.send_signal, [signal.SIGKILL])
            bomb.start()
            recording = True
            while process.poll() is None:
                time.sleep(float(rng.uniform(0.3, 1.0)))
                answer = ask(topics, process, SetBool, "save_episode", data=True)
                if answer is None:
                    break
                recording = False
                if answer.success:  # else no picture had come yet; the answer says so and nothing was promised
                    told = json.loads(answer.message)
                    saved[int(told["episode"])] = told["rows"]
                if ask(topics, process, Trigger, "start_episode") is None:
                    break
                recording = True
            bomb.join()
            process.wait()
            interrupted += recording
            print(f"run {run + 1}: {len(saved)} episodes saved", flush=True)
        store = DatasetStore.open(folder / "data", embodiment)
        data_command.take_spool(store, folder / "spool", success=False)
        found = {line["episode_index"]: line for line in data_command.inspect(folder / "data")[1]}
        lost = [n for n, rows in saved.items() if n not in found or found[n]["length"] != rows or found[n]["problems"]]
        recovered = sum("interrupted" in line.get("notes", []) for line in found.values())
    about = {"kills": runs, "finished": len(saved), "lost": len(lost), "killed_while_recording": interrupted}
    return about | {"recovered": recovered, "damaged": sum(bool(line["problems"]) for line in found.values())}


def kill_lerobot(runs: int, episodes: int, seed: int) -> dict:
    """`lerobot-record` through our plugin with streaming encoding, killed after `episodes` finished ones."""
    rng, finished, lost = np.random.default_rng(seed), 0, 0
    with tempfile.TemporaryDirectory() as temporary, feeding(Path(temporary)):
        folder = Path(temporary)
        search = install_plugin(folder)
        environment = os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        for run in range(runs):
            root = folder / f"data{run}"
            options = lerobot_options(folder, root, fps=30, episode_time_s=1.0, num_episodes=1000)
            process = subprocess.Popen(
                [sys.executable, "-c", LEROBOT_RECORD, *options], env=environment, stderr=subprocess.PIPE, text=True
            )
            done = 0
            for line in process.stderr:
                if begun := re.search(r"Recording episode (\d+)", line):
                    done = int(begun[1])  # so many are finished
                    if done == episodes:
                        time.sleep(float(rng.uniform(0.0, 1.0)))
                        process.kill()
                        break
            process.stderr.close()
            process.wait()
            if done < episodes:
                raise RuntimeError(f"lerobot-record ended by itself after {done} episodes")
            count = subprocess.run(
                [sys.executable, "-c", COUNT_READABLE, root], env=environment, stdout=subprocess.PIPE, check=True
            )
            finished, lost = finished + done, lost + done - min(done, int(count.stdout))
            print(f"lerobot run {run + 1}: {lost} of {finished} lost", flush=True)
    return {"kills": runs, "finished": finished, "lost": lost}


def lerobot_options(folder: Path, root: Path, fps: int, episode_time_s: float, num_episodes: int, **more) -> list[str]:
    options = {
        "robot.type": "cotwin",
        "robot.embodiment": folder / "contract.json",
        "teleop.type": "cotwin",
        "teleop.device": "playback",
        "teleop.path": readings(folder / "hand.jsonl", 0),  # a hand that lies still
        "teleop.fps": fps,
        "dataset.repo_id": "lab/kills",
        "dataset.root": root,
        "dataset.fps": fps,
        "dataset.single_task": "pick up the cube",
        "dataset.num_episodes": num_episodes,
        "dataset.episode_time_s": episode_time_s,
        "dataset.reset_time_s": 0,
        "dataset.push_to_hub": "false",
        "dataset.streaming_encoding": "true",
        "dataset.rgb_encoder.vcodec": "h264",
        "dataset.rgb_encoder.preset": "ultrafast",
        "dataset.rgb_encoder.g": 15,
        "play_sounds": "false",
    }
    return [f"--{key}={value}" for key, value in (options | more).items()]


def bench_kills(figure, quick: bool) -> dict:
    ours = kill_ours(*((3, 4.0) if quick else (50, 6.0)), seed=3)
    theirs = kill_lerobot(*((1, 2) if quick else (4, 3)), seed=4)
    name = "lerobot-record 0.6.1 through the plugin, streaming h264"
    figures = {
        "recorder_kill_lost_episodes": figure(ours["lost"], theirs["lost"], None, "episodes", name, ours["finished"])
    }
    return {"figures": figures, "tables": {"kills": {"ours": ours, name: theirs}}}
