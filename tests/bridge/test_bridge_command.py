import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from websockets.sync.client import connect

from bridge import bridge_command
from bridge.bridge_command import Top
from bridge.config import load
from bridge.openpi_port import DEFAULT_CAMERA_KEYS, PROMPT_KEY, STATE_KEY, pack, unpack
from bridge.telemetry import TelemetryPublisher
from tests.bridge.test_infer import serving


def test_top_shows_rates_and_newest_values():
    view = Top()
    now_ns = time.time_ns()
    view.take([("runtime", {"tick_p99_ms": 0.25}, now_ns), ("runtime", {"tick_p99_ms": 0.5, "queue": 3}, now_ns)])
    page = view.page(elapsed_s=2.0, missed=7)
    assert "1 sources, 7 messages missed" in page
    assert "runtime  1.0/s" in page
    assert "0.5" in page
    assert "0.25" not in page


def test_top_hears_a_publisher(capsys):
    publisher, stop = TelemetryPublisher("tcp://127.0.0.1:*"), threading.Event()

    def talk():
        while not stop.wait(0.02):
            publisher.send("policy_server", {"infer_p50_ms": 12.5})

    thread = threading.Thread(target=talk)
    thread.start()
    arguments = ["top", f"endpoint={publisher.endpoint}", "refresh_s=0.5", "refreshes=2"]
    assert bridge_command.main(arguments) == 0
    stop.set()
    thread.join()
    publisher.close()
    assert "policy_server" in capsys.readouterr().out


@pytest.mark.parametrize("coding", ["raw", "jpeg"])
def test_bench_measures_a_server(coding, capsys):
    embodiment = load("bridge", bridge_command.BridgeConfig).embodiment
    with serving(embodiment=embodiment) as server:
        arguments = ["bench", f"endpoint={server.endpoint}", "calls=3", f"picture_coding={coding}"]
        assert bridge_command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["640x480", "224x224"]


def test_mistakes_are_one_line(capsys):
    for wrong, said in [
        ([], "say what to do"),
        (["bench", "endpoint=tcp://192.0.2.1:1"], "no keys were given"),
        (["bench", "endpoint=tcp://127.0.0.1:1", "deadline_s=0.1"], "no policy server at"),
        (["bench", "picture_coding=webp"], "allowed are raw, jpeg, png"),
    ]:
        assert bridge_command.main(wrong) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_openpi_clients_reach_a_policy_server_through_the_command():
    embodiment = load("bridge", bridge_command.BridgeConfig).embodiment
    with serving(embodiment=embodiment) as server:
        command = [sys.executable, "-m", "cotwin", "bridge", "openpi", f"endpoint={server.endpoint}", "port=0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = re.search(r"ws://[\d.:]+", process.stdout.readline()).group()
            with connect(url, compression=None, max_size=None) as connection:
                assert unpack(connection.recv())["contract_hash"] == embodiment.contract_hash
                images = {key: np.zeros((48, 64, 3), np.uint8) for key in DEFAULT_CAMERA_KEYS.values()}
                connection.send(pack(images | {STATE_KEY: np.full(7, 0.5, np.float32), PROMPT_KEY: "go"}))
                assert unpack(connection.recv())["actions"].shape == (5, 7)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
