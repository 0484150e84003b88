"""Launch files against the documented schema of ROS 2's YAML frontend, and `cotwin up` against real processes."""

import fcntl
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from robot import up
from robot.launch_file import ROOT, Process, arguments, processes
from robot.up import Graph

FILES = sorted((ROOT / "launch").glob("*.launch.yaml"))
CONDITIONS = {"if", "unless"}
PROCESS = {"name", "cwd", "env", "output", "respawn", "respawn_delay", "respawn_max_retries", "launch-prefix", "shell"}
PROCESS |= {"emulate_tty", "sigterm_timeout", "sigkill_timeout"} | CONDITIONS
# What the frontend's parsers read (docs.ros.org, "launch" and "launch_ros" actions): (needed, allowed) keys.
SCHEMA = {
    "arg": ({"name"}, {"name", "default", "description", "choice"} | CONDITIONS),
    "let": ({"name", "value"}, {"name", "value"} | CONDITIONS),
    "set_env": ({"name", "value"}, {"name", "value"} | CONDITIONS),
    "push_ros_namespace": ({"namespace"}, {"namespace"} | CONDITIONS),
    "include": ({"file"}, {"file", "arg", "let"} | CONDITIONS),
    "group": (set(), {"scoped", "forwarding", "keep", "children"} | CONDITIONS),
    "node": (
        {"pkg", "exec"},
        {"pkg", "exec", "namespace", "args", "ros_args", "exec_name", "param", "remap"} | PROCESS,
    ),
    "executable": ({"cmd"}, {"cmd", "args"} | PROCESS),
}
INNER = {
    "param": {"name", "value", "type", "from", "allow_substs", "param"},
    "remap": {"from", "to"},
    "env": {"name", "value"},
    "choice": {"value"},
}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_files_keep_to_ros_schema(file):
    content = yaml.safe_load(file.read_text())
    assert list(content) == ["launch"]
    _check(content["launch"])


def _check(items):
    assert isinstance(items, list)
    for item in items:
        assert len(item) == 1, item
        ((kind, body),) = item.items()
        assert kind in SCHEMA, kind
        if isinstance(body, list):
            assert kind == "group"
            _check(body)
            continue
        needed, allowed = SCHEMA[kind]
        assert needed <= set(body) <= allowed, (kind, body)
        for key, keys in INNER.items():
            if key in body:
                assert all(set(inner) <= keys for inner in body[key]), body
        for key in ("name", "default", "description", "if", "unless", "file", "cmd", "pkg", "exec"):
            assert isinstance(body.get(key, ""), str), f"{kind}: {key} has to be text under ROS: {body[key]!r}"
        if kind == "include":
            assert all(set(arg) == {"name", "value"} for arg in body.get("arg", []))
        if kind == "group":
            _check(body["children"])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_argument_is_described_and_every_file_can_be_run(file):
    args = arguments(file)
    assert all(argument.description for argument in args)
    needed = {argument.name: "['1', '2']" for argument in args if argument.default is None}
    assert processes(file, needed)


def names(file, **args):
    return [process.name for process in processes(file, args)]


def test_conditions_choose_what_runs(tmp_path):
    assert names("launch/cell.launch.yaml") == ["cell", "camera_node", "arm_node", "runtime_node"]
    spool = str(tmp_path)
    assert names("launch/cell.launch.yaml", record="true", expert="true", spool_dir=spool)[-2:] == [
        "expert_node",
        "recorder_node",
    ]


def test_two_arms_live_in_two_namespaces():
    left = processes("launch/robot.launch.yaml", {"host": "10.0.0.2", "serials": "['1','2']", "namespace": "left"})
    assert [process.name for process in left] == ["left/camera_node", "left/arm_node", "left/runtime_node"]
    assert all("__ns:=/left" in process.command for process in left)
    assert 'host:="10.0.0.2"' in left[1].command  # text, though it looks like a number to YAML's eye


def write(tmp_path, *items):
    path = tmp_path / "x.launch.yaml"
    path.write_text(yaml.safe_dump({"launch": list(items)}))
    return str(path)


def test_substitutions_and_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED", "0.5")
    node = {
        "pkg": "robot",
        "exec": "arm_node",
        "namespace": "left",
        "param": [
            {"name": "speed", "value": "$(env SPEED)"},
            {"name": "other", "value": "$(env NOT_SET 7)"},
            {"name": "text", "value": "$(var x)", "type": "str"},
            {"name": "empty", "value": ""},
            {"name": "flag", "value": True},
            {"from": "$(dirname)/p.yaml"},
        ],
        "remap": [{"from": "action", "to": "$(var x)/action"}],
    }
    file = write(tmp_path, {"arg": {"name": "x", "default": "12"}}, {"node": node})
    (process,) = processes(file)
    command = process.command
    for expected in ("speed:=0.5", "other:=7", 'text:="12"', 'empty:=""', "flag:=true", "action:=12/action"):
        assert expected in command
    assert str(tmp_path / "p.yaml") in command
    assert processes(file, {"x": "y"})[0].command.count("action:=y/action") == 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"noed": {}}, "unknown action 'noed'"),
        ({"node": {"pkg": "robot", "exec": "arm_node", "colour": "red"}}, r"node does not know \['colour'\]"),
        ({"node": {"pkg": "robot", "exec": "leg_node"}}, "robot/leg_node"),
        ({"executable": {"cmd": "$(var nothing)"}}, "no such argument"),
        ({"executable": {"cmd": "$(eval 1+1)"}}, "unknown substitution"),
        ({"executable": {"cmd": "true", "if": "perhaps"}}, "neither true nor false"),
        ({"arg": {"name": "a", "description": "the address"}}, "argument 'a' is needed: the address"),
        ({"arg": {"name": "a", "default": "3", "choice": [{"value": "1"}, {"value": "2"}]}}, "allowed are"),
        ({"include": {"file": "$(dirname)/gone.yaml"}}, "no file"),
    ],
)
def test_mistakes_are_named(tmp_path, item, message):
    with pytest.raises(ValueError, match=message):
        processes(write(tmp_path, item))


def test_unknown_arguments_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'record'"):
        processes("launch/cell.launch.yaml", {"recrod": "true"})
    with pytest.raises(ValueError, match=r"cell\.launch\.yaml"):
        processes("launch/nothing.launch.yaml")


def python(code: str, name: str, **more) -> dict:
    return {"executable": {"cmd": f'{sys.executable} -c "{code}"', "name": name, **more}}


SLEEPER = "import time; print('up', flush=True); time.sleep(60)"


def wait_until(condition, timeout_s=20.0):
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_output_is_labelled_and_all_stop_when_one_ends(tmp_path):
    file = write(tmp_path, python(SLEEPER, "first"), python("import sys; print('bye'); sys.exit(7)", "second"))
    out = io.StringIO()
    with Graph(file, out=out) as graph:
        assert graph.wait() == ("second", 7)
        pid = graph.pid("first")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert "[second] bye" in out.getvalue()


def test_the_command_ends_with_the_code_of_what_ended(tmp_path, capfd):
    file = write(tmp_path, python(SLEEPER, "first"), python("import os; os.kill(os.getpid(), 9)", "second"))
    assert up.main([file]) == 128 + 9
    assert "second ended with code -9" in capfd.readouterr().err
    assert up.main([file, "x:=1"]) == 2
    assert "unknown argument 'x'" in capfd.readouterr().err
    assert up.main([file, "x"]) == 2


def test_an_interrupt_stops_everything_also_what_ignores_it(tmp_path):
    deaf = "import signal,time; signal.signal(2, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    file = write(tmp_path, python(SLEEPER, "first"), python(deaf, "second"))
    command = [
        sys.executable,
        "-c",
        f"from robot import up; up.STOP_PATIENCE_S = ((2, 0.5), (15, 2.0)); up.main([{file!r}])",
    ]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    seen = {child.stdout.readline().strip() for _ in range(2)}
    assert seen == {"[first] up", "[second] deaf"}
    child.send_signal(signal.SIGINT)
    assert child.wait(20) == 0


def test_programs_die_with_a_parent_that_was_killed(tmp_path):
    pid_file = tmp_path / "pid"
    code = f"import os,time; open('{pid_file}','w').write(str(os.getpid())); time.sleep(60)"
    file = write(tmp_path, python(code, "first"))
    child = subprocess.Popen([sys.executable, "-m", "robot.up", file], cwd=ROOT)
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    child.kill()
    child.wait()

    def is_gone():
        try:
            os.kill(int(pid_file.read_text()), 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(is_gone)


def test_respawn_starts_it_again_and_does_not_count_as_ended(tmp_path):
    count = tmp_path / "count"
    file = write(tmp_path, python(f"open('{count}','a').write('x')", "often", respawn=True), python(SLEEPER, "first"))
    with Graph(file, out=io.StringIO()) as graph:
        wait_until(lambda: not graph.ended() and count.exists() and len(count.read_text()) >= 2)


def test_what_killed_nodes_left_in_shared_memory_is_cleared_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(up, "SHARED_MEMORY", tmp_path)
    dead, alive, young = (tmp_path / f"fastdds_{16 * digit}" for digit in "0af")
    for segment in (dead, alive, young):
        lock = segment.with_name(segment.name + "_el")
        segment.write_bytes(b"pictures"), lock.touch()
        if segment is not young:
            os.utime(lock, (time.time() - 100, time.time() - 100))
    with open(f"{alive}_el") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with Graph(write(tmp_path, python("pass", "first")), out=io.StringIO()) as graph:
            graph.wait()
    assert sorted(path.name for path in tmp_path.glob("fastdds*")) == sorted(
        f"{segment.name}{end}" for segment in (alive, young) for end in ("", "_el")
    )


def test_a_program_that_does_not_exist_is_named(tmp_path):
    graph = Graph(write(tmp_path, {"executable": {"cmd": "/no/such/program", "name": "ghost"}}), out=io.StringIO())
    assert graph.processes == [Process("ghost", ["/no/such/program"])]
    with pytest.raises(ValueError, match="ghost"):
        graph.start()


def test_two_arms_have_namespaces_of_their_own():
    args = {"left_host": "10.0.0.1", "right_host": "10.0.0.2", "right_cameras": "false", "record": "true"}
    args |= {"left_spool": "/tmp/l", "right_spool": "/tmp/r", "left_dataset": "/d/l", "right_dataset": "/d/r"}
    there = {process.name: " ".join(process.command) for process in processes("launch/two_arms.launch.yaml", args)}
    assert set(there) == {"left/camera_node"} | {
        f"{side}/{node}_node" for side in ("left", "right") for node in ("arm", "runtime", "recorder")
    }
    for side, host in (("left", "10.0.0.1"), ("right", "10.0.0.2")):
        assert f"__ns:=/{side}" in there[f"{side}/arm_node"]
        assert f'host:="{host}"' in there[f"{side}/arm_node"]
        assert f'dataset_root:="/d/{side[0]}"' in there[f"{side}/recorder_node"]


def test_whoever_looks_on_is_started_on_demand_and_ends_nothing():
    args = {"host": "10.0.0.2", "serials": "['1','2']", "console": "true", "mcap": "true", "mcap_folder": "/m"}
    watchers = processes("launch/robot.launch.yaml", args)[3:]
    assert [process.name for process in watchers] == ["console", "session_log"]
    assert all(process.respawn for process in watchers)
    assert watchers[0].command[-2:] == ["namespace=", "port=8091"]
    two = processes(
        "launch/two_arms.launch.yaml", {"left_host": "a", "right_host": "b", "console": "true", "mcap": "true"}
    )
    found = {process.name: process.command[-2:] for process in two if process.respawn}
    assert found == {
        "left/console": ["namespace=left", "port=8091"],
        "right/console": ["namespace=right", "port=8092"],
        "left/session_log": ["namespace=left", "folder=runs/sessions"],
        "right/session_log": ["namespace=right", "folder=runs/sessions"],
    }
