"""Nodes that talk to another machine: keys reach the client that the runtime builds, and launch files pass them."""

import pytest

from bridge.errors import BridgeTimeout
from bridge.keys import Keys
from robot.config import RuntimeConfig
from robot.launch_file import processes
from tests.bridge.test_infer import EMBODIMENT, observation, serving

pytest.importorskip("rclpy")
from robot.runtime_node import policy_client


@pytest.fixture
def people(tmp_path):
    roles = {"arm": "robot", "gpu": "server", "old-gpu": "server"}
    made = {name: Keys.new(tmp_path / name, name, role) for name, role in roles.items()}
    for name in ("gpu", "old-gpu"):
        made["arm"].allow(made[name].me)
    made["gpu"].allow(made["arm"].me)
    return made


def test_the_runtimes_client_speaks_curve_with_the_server_that_it_was_told(people):
    with serving(keys=people["gpu"]) as server:
        config = RuntimeConfig(policy_endpoint=server.endpoint, keys=str(people["arm"].folder), peer="gpu")
        client = policy_client(config, EMBODIMENT)
        assert client.infer(observation(5), 10.0).actions[0, 0] == 5
        client.close()
        unkeyed = policy_client(RuntimeConfig(policy_endpoint=server.endpoint), EMBODIMENT)
        with pytest.raises(BridgeTimeout):
            unkeyed.wait_ready(0.5)
        unkeyed.close()


def test_what_is_wrong_with_keys_is_said(people, tmp_path):
    with pytest.raises(ValueError, match="needs exactly one allowed key of role server; found gpu, old-gpu"):
        policy_client(RuntimeConfig(policy_endpoint="tcp://127.0.0.1:1", keys=str(people["arm"].folder)), EMBODIMENT)
    with pytest.raises(ValueError, match="cotwin keys new"):
        policy_client(RuntimeConfig(policy_endpoint="tcp://127.0.0.1:1", keys=str(tmp_path / "no")), EMBODIMENT)
    with pytest.raises(ValueError, match="no keys were given"):
        policy_client(RuntimeConfig(policy_endpoint="tcp://192.0.2.1:5601"), EMBODIMENT)
    assert policy_client(RuntimeConfig(), EMBODIMENT) is None


@pytest.mark.parametrize("file", ["launch/robot.launch.yaml", "launch/cell.launch.yaml"])
def test_launch_files_pass_keys_to_both_nodes_that_leave_the_machine(file):
    args = {"keys": "/k", "policy_server": "gpu", "learner": "store", "record": "true", "spool_dir": "/s"}
    needed = {"host": "10.0.0.2", "serials": "['1','2']"} if "robot.launch" in file else {}
    commands = {process.name: process.command for process in processes(file, args | needed)}
    assert {'keys:="/k"', 'peer:="gpu"'} <= set(commands["runtime_node"])
    assert {'keys:="/k"', 'peer:="store"'} <= set(commands["recorder_node"])
