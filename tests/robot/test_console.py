"""The operator's page and the teleoperation pad in headless Chromium, against the stand-in cell's whole graph."""

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TransformStamped
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_msgs.msg import String
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from robot.frames import TFMessage
from robot.launch_file import ROOT
from robot.params import load_embodiment
from robot.session import Session, SessionConfig
from robot.up import Graph
from tests.robot.cell import loopback
from tests.robot.session_file import read_session
from tests.robot.test_graph import UP_AND_DOWN, Probe

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
    pytest.mark.timeout(150),
]
LATCHED = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def probe(sessions, browser):
    """After the browser, which starts sooner while no arm runs beside it."""
    domain, port = random.randint(1, 100), random.randint(20_000, 32_000)
    os.environ["ROS_DOMAIN_ID"], os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = str(domain), "LOCALHOST"
    args = {"host": loopback(), "cell_control": f"tcp://127.0.0.1:{port}", "cell_frames": f"tcp://127.0.0.1:{port + 1}"}
    args["policy_endpoint"] = f"tcp://127.0.0.1:{port + 2}"
    args |= {"console": "true", "console_port": "0", "mcap": "true", "mcap_folder": str(sessions)}
    server = [sys.executable, "-c", UP_AND_DOWN, args["policy_endpoint"]]
    policy = subprocess.Popen(server, cwd=ROOT)
    try:
        with Graph("launch/cell.launch.yaml", args, io.StringIO()) as graph:
            probe = Probe(domain, graph)
            probe.wait(lambda: probe.state() == "IDLE" and probe.state("runtime_status"), "the graph's start")
            yield probe
            probe.close()
    finally:
        policy.kill()
        policy.wait()


@pytest.fixture(scope="module")
def url(probe):
    probe.wait(lambda: "[console] open " in probe.output(), "the console's address")
    return re.search(r"\[console\] open (\S+)", probe.output())[1]


@pytest.fixture(scope="module")
def page(browser, url, probe):
    """What the browser itself complains about (script errors, refused contents) fails the test that ends last."""
    page, complaints = browser.new_page(), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(url)
    probe.wait(lambda: text(page, "#state") in ("IDLE", "HOLD", "FAULT"), "the page")
    yield page
    assert not [c for c in complaints if "favicon" not in c and "ERR_CONNECTION_REFUSED" not in c]


def text(page, selector):
    return page.text_content(selector)


def test_the_page_shows_cameras_health_and_limits(probe, page):
    sizes = "['third_person', 'wrist'].map(n => document.querySelector(`#camera-${n} img`)?.naturalWidth)"
    probe.wait(lambda: page.evaluate(sizes) == [640, 640], "both pictures")
    probe.wait(lambda: "max_speed_m_s0.5" in text(page, "#limits"), "the limits")
    for part in ("arm_node: arm", "camera_node: wrist", "runtime_node: runtime"):
        probe.wait(lambda part=part: part in text(page, "#health"), part)
    assert "tick jitter p99, ms" in text(page, "#policy")
    assert "pick up the cube" in text(page, "#policy")


def test_space_and_escape_stop_whatever_has_the_focus_and_only_a_person_goes_on(probe, page):
    assert page.is_disabled("[data-call=acknowledge]")
    page.focus("[data-call=home]")
    page.keyboard.press("Enter")
    probe.wait(lambda: text(page, "#note") == "home: at home", "home")
    for key in ("Space", "Escape"):
        page.focus("[data-call=home]")
        page.keyboard.press(key)  # would press the button anywhere else
        probe.wait(lambda: probe.state() == "FAULT", "FAULT of the arm")
        probe.wait(lambda: text(page, "#state") == "FAULT", "FAULT on the page")
        assert text(page, "#reason") == "stop requested"
        assert "home" not in text(page, "#note")
        assert page.is_disabled("[data-call=home]")
        page.click("[data-call=acknowledge]")
        probe.wait(lambda: text(page, "#state") == "IDLE", "IDLE")
    page.click("#stop")
    probe.wait(lambda: probe.state() == "FAULT", "FAULT by the button")
    page.click("[data-call=acknowledge]")
    probe.wait(lambda: text(page, "#state") == "IDLE", "IDLE")


def test_what_was_cut_is_shown_and_pictures_go_on(probe, page):
    before = page.get_attribute("#camera-wrist img", "src")
    for _ in range(3):
        probe.send_teleop(0.0, 0.0, 0.15, 0, 0, 0, 1)
        probe.spin(0.15)
    probe.wait(lambda: re.search(r"clipped: step_dz_m\d", text(page, "#clips")), "the cut")
    probe.wait(lambda: "clipped: stream_" in text(page, "#clips") or "clipped: speed" in text(page, "#clips"), "speed")
    probe.wait(lambda: page.get_attribute("#camera-wrist img", "src") != before, "a picture of the motion")


def test_the_policy_is_started_and_stopped_and_the_page_says_who_is_in_control(probe, page):
    start, stop = "[data-call='start policy']", "[data-call='stop policy']"
    probe.wait(lambda: text(page, "#control") == "stopped", "the runtime")
    assert page.is_disabled(stop)
    page.keyboard.press("p")
    probe.wait(lambda: text(page, "#control") == "the policy is in control, version 3", "the policy's start")
    assert text(page, "#note").startswith("start policy: started")
    assert page.is_disabled(start)
    probe.wait(lambda: probe.source() == "policy", "an action of the policy")

    def person_is_in_control():
        probe.send_teleop(0.001, 0, 0, 0, 0, 0, 1)
        return text(page, "#control").startswith("a person is in control")

    probe.wait(person_is_in_control, "a person who takes over")
    probe.wait(lambda: text(page, "#control").startswith("the policy"), "the policy again")
    page.focus(stop)
    page.keyboard.press("Enter")
    probe.wait(lambda: text(page, "#control") == "stopped, version 3", "the policy's end")
    assert text(page, "#note") == "stop policy: stopped"
    assert page.is_enabled(start)


def test_an_evaluation_asks_on_the_page_and_is_answered_by_keys(probe, page, tmp_path, monkeypatch):
    """A session at a real cell, where a person sets the scene and judges; its terminal stays silent."""
    monkeypatch.setattr(sys, "stdin", os.fdopen(os.pipe()[0]))
    config, verdicts, marks = SessionConfig(launch_file="", cell_endpoint=""), [], []
    probe.node.create_subscription(String, "teleop/mark", lambda m: marks.append(m.data), 10)

    def evaluate():
        with Session(config, load_embodiment("fr3_tabletop"), "evaluate", [], {}, tmp_path / "log") as session:
            session.scene.reset(7)
            session.wait(session.scene.wants_end, 30.0, "the mark")
            verdicts.append(session.scene.judge())
            verdicts.append(session.scene.judge())

    thread = threading.Thread(target=evaluate, daemon=True)
    thread.start()
    probe.wait(lambda: "set up scene 7" in text(page, "#prompt"), "the scene")
    page.keyboard.press("s")
    probe.wait(lambda: not page.is_visible("#prompt"), "the trial")
    page.click("#marks button:has-text('failure')")
    probe.wait(lambda: text(page, "#prompt") == "was it a success? [y/n]", "the second question")
    page.keyboard.press("Control+x")  # the browser's own
    page.keyboard.press("y")
    probe.wait(lambda: not thread.is_alive(), "the verdict")
    assert verdicts == [False, True]
    probe.wait(lambda: len(marks) == 3, "all marks")
    assert marks == ["start", "failure", "success"]


def test_strangers_reach_nothing(probe, url):
    address = url.split("?")[0]
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(address)
    assert refusal.value.code == 403
    socket = url.replace("http", "ws").replace("/?", "/socket?")
    for bad in ({"uri": socket.split("?")[0]}, {"uri": socket, "origin": "http://elsewhere.example"}):
        with pytest.raises(InvalidStatus):
            connect(**bad)
    for nonsense in ('{"call": "start"}', '{"mark": "perfect"}', "[", "3"):
        with connect(socket) as connection:
            connection.send(nonsense)
            with pytest.raises(ConnectionClosed):
                connection.recv(5.0)
    assert probe.state() != "FAULT"


@pytest.mark.slow
def test_the_pad_in_a_browser_moves_the_arm_while_it_is_held(probe, browser):
    command = [sys.executable, "-u", "-m", "cotwin", "teleop", "device=browser", "port=0", "use_sim_time=true"]
    probe.call("home")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as teleop:
        try:
            page = browser.new_page()
            page.goto(teleop.stdout.readline().split()[1])
            probe.wait(lambda: text(page, "#state") == "connected", "the pad")
            before = probe.target_m()
            box = page.locator("#left").bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x, y - box["height"] / 4)  # half way forward
            probe.wait(lambda: probe.target_m()[0] - before[0] > 0.02, "motion")
            assert abs(probe.target_m()[1] - before[1]) < 2e-3
            page.mouse.up()
            probe.wait(lambda: probe.state() == "HOLD", "letting go")
            held = probe.target_m()
            probe.spin(0.5)
            assert np.allclose(probe.target_m(), held, atol=1e-4)
            page.close()
        finally:
            teleop.terminate()


def test_frames_and_diagnostics_are_what_ros_tools_expect(probe):
    if TFMessage is not None:
        pytest.skip("tf2_msgs is here: transforms go to tf and tf_static")
    heard, poses, reports = {}, {}, {}
    keep = lambda m: heard.setdefault((m.header.frame_id, m.child_frame_id), []).append(m)  # noqa: E731
    probe.node.create_subscription(TransformStamped, "transforms", keep, 10)
    probe.node.create_subscription(TransformStamped, "transforms_static", keep, LATCHED)
    probe.node.create_subscription(PoseStamped, "tcp_pose", lambda m: poses.update({stamp(m): m.pose.position}), 10)
    report = lambda m: reports.update({s.name: (s.level, stamp(m)) for s in m.status})  # noqa: E731
    probe.node.create_subscription(DiagnosticArray, "/diagnostics", report, 10)
    probe.wait(lambda: len(heard) == 3 and len(heard["base", "tcp"]) > 20 and len(reports) == 4, "frames, diagnostics")
    tcp = next(m for m in heard["base", "tcp"] if stamp(m) in poses)
    assert tcp.transform.translation.z == poses[stamp(tcp)].z
    camera = heard["tcp", "wrist_optical_frame"][0].transform
    expected = load_embodiment("fr3_tabletop").cameras["wrist"].matrix
    assert [camera.translation.x, camera.translation.y, camera.translation.z] == pytest.approx(expected[:3, 3])
    assert ("base", "third_person_optical_frame") in heard
    assert all(level in (b"\0", b"\1") for level, _ in reports.values()), reports
    assert all(stamp_s > 0 for _, stamp_s in reports.values())


def stamp(message):
    return message.header.stamp.sec + message.header.stamp.nanosec * 1e-9


def test_a_silent_arm_and_a_dead_server_are_no_news(probe, page):
    pid = probe.graph.pid("arm_node")
    os.kill(pid, signal.SIGSTOP)
    try:
        probe.wait(lambda: text(page, "#state") == "NO NEWS", "silence of the arm")
    finally:
        os.kill(pid, signal.SIGCONT)
    probe.wait(lambda: text(page, "#state") != "NO NEWS", "news")
    os.kill(probe.graph.pid("console"), signal.SIGKILL)
    probe.wait(lambda: text(page, "#state") == "NOT CONNECTED", "the end of the server")
    page.keyboard.press("Space")
    assert text(page, "#note") == "no connection: use the robot's own stop"


def test_a_killed_session_log_is_whole_up_to_its_last_second(probe, sessions):
    """Last in this file: the recorded session is this file's own."""
    (path,) = sessions.glob("session_*.mcap")
    os.kill(probe.graph.pid("session_log"), signal.SIGKILL)
    killed_ns = time.time_ns()
    messages = read_session(path)
    assert killed_ns - max(m.log_ns for m in messages) < 3e9
    by_topic = {}
    for message in messages:
        by_topic.setdefault(message.topic, []).append(message)
    assert {"/joint_states", "/target_pose", "/action", "/safety_state", "/runtime_status", "/diagnostics"} <= set(
        by_topic
    )
    states = {pair.value for m in by_topic["/safety_state"] for pair in m.content().values if pair.key == "state"}
    assert {"IDLE", "RUNNING", "HOLD", "FAULT"} <= states
    assert by_topic["/teleop/mark"][0].content().data == "start"
    picture = by_topic["/wrist/image_raw/compressed"][-1].content()
    assert picture.format == "jpeg"
    gaps_s = np.diff([stamp(m.content()) for m in by_topic["/joint_states"]])
    assert gaps_s.min() > 0
