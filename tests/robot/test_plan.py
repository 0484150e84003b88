import threading
from collections import Counter

import numpy as np
import pytest

from bridge.errors import BridgeTimeout
from bridge.policy_client import PolicyClient
from bridge.policy_server import PolicyServer
from bridge.run_files import read_lines
from bridge.trials import load_plan, report
from robot import evaluate
from robot.evaluate import EvalConfig
from robot.switch import Switch, is_endpoint
from tests.bridge.test_infer import observation
from tests.robot.cell import wait_for
from tests.robot.scripted_session import ScriptedSession

PLAN = "seed: 7\nscenes: {first: 100, count: 6}\npolicies: {old: tcp://127.0.0.1:1, new: tcp://127.0.0.1:2}\n"


def load_endpoints(path):
    return load_plan(path, is_endpoint, "tcp://127.0.0.1:5601")


@pytest.fixture
def plan_file(tmp_path):
    def write(text):
        (tmp_path / "plan.yaml").write_text(text)
        return tmp_path / "plan.yaml"

    return write


def test_every_policy_meets_every_scene_in_a_shuffled_order_that_stays(plan_file):
    plan = load_endpoints(plan_file(PLAN))
    assert Counter(scene for scene, _ in plan.trials) == Counter({100 + n: 2 for n in range(6)})
    assert set(plan.trials) == {(100 + n, name) for n in range(6) for name in ("old", "new")}
    assert [scene for scene, _ in plan.trials[::2]] == [scene for scene, _ in plan.trials[1::2]]  # pairs stay together
    assert [scene for scene, _ in plan.trials[::2]] != sorted(scene for scene, _ in plan.trials[::2])
    assert {name for _, name in plan.trials[::2]} == {"old", "new"}  # neither is always first
    assert load_endpoints(plan_file(PLAN)) == plan
    assert load_endpoints(plan_file(PLAN.replace("seed: 7", "seed: 8"))) != plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\n", "its keys are"),
        (PLAN.replace("{first: 100, count: 6}", "[1, 1]"), "named twice"),
        (PLAN.replace("{first: 100, count: 6}", "all"), "list of numbers"),
        (PLAN.replace("tcp://127.0.0.1:1", "127.0.0.1"), "not like tcp"),
        ("seed: [", "plan"),
    ],
)
def test_plans_that_make_no_sense(plan_file, text, words):
    with pytest.raises(ValueError, match=words):
        load_endpoints(plan_file(text))


class Served:
    """A real policy server whose every number is its name."""

    def __init__(self, value, embodiment):
        answer = lambda seen: (np.full((len(seen), 8, 7), value, np.float32), 1)  # noqa: E731
        self._server = PolicyServer("tcp://127.0.0.1:*", embodiment, answer, max_batch=1)
        self.endpoint, self._closing = self._server.endpoint, threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(self._closing,), daemon=True)
        self._thread.start()

    def close(self):
        self._closing.set()
        self._thread.join(5.0)


def test_the_switch_leads_to_the_chosen_policy_only():
    from tests.bridge.test_infer import EMBODIMENT

    one, two, switch = Served(0.25, EMBODIMENT), Served(0.5, EMBODIMENT), Switch()
    client = PolicyClient(switch.endpoint, EMBODIMENT)

    def says():
        try:
            return float(client.infer(observation(1), 0.5).actions[0, 0])
        except BridgeTimeout:
            return None

    try:
        for served, value in ((one, 0.25), (two, 0.5), (one, 0.25)):
            switch.choose(served.endpoint)
            wait_for(lambda value=value: says() == value, 15.0, f"an answer of {value}")
            assert {says() for _ in range(5)} == {value}
    finally:
        client.close()
        switch.close()
        one.close()
        two.close()


def run_plan(monkeypatch, tmp_path, plan_file, max_trials=None):
    """The new policy solves every scene, the old one even scenes. `max_trials`: then the session dies."""
    session, chosen = ScriptedSession({}), []

    class Choosing(Switch):
        def choose(self, endpoint):
            chosen.append(endpoint)
            if max_trials is not None and len(chosen) > max_trials:
                raise KeyboardInterrupt
            scene = load_endpoints(plan_file).trials[len(done) + len(chosen) - 1][0]
            solved = endpoint.endswith("2") or scene % 2 == 0
            session.script = {scene: {"success_s": (1.0, 1e9)}} if solved else {}

    config = EvalConfig(name="r", runs_dir=str(tmp_path), plan=str(plan_file), trial_s=3.0, label="ab")
    done = read_lines(config.trials_file)
    monkeypatch.setattr(evaluate, "Session", session)
    monkeypatch.setattr(evaluate, "Switch", Choosing)
    evaluate.evaluate(config)
    return read_lines(config.trials_file)


def test_an_interrupted_plan_goes_on_and_reports_the_same(monkeypatch, tmp_path, plan_file, capsys):
    file = plan_file(PLAN)
    whole = run_plan(monkeypatch, tmp_path / "whole", file)
    with pytest.raises(KeyboardInterrupt):
        run_plan(monkeypatch, tmp_path / "parts", file, max_trials=5)
    parts = run_plan(monkeypatch, tmp_path / "parts", file)
    assert [(t["seed"], t["policy"], t["success"]) for t in parts] == [
        (t["seed"], t["policy"], t["success"]) for t in whole
    ]
    assert len(parts) == 12
    figures = report(parts)
    assert figures == report(whole)
    assert (figures["new/successes"], figures["old/successes"]) == (6, 3)
    assert (figures["new-old/difference"], figures["new-old/pairs"]) == (0.5, 6)
    assert "new" not in capsys.readouterr().out  # whoever stands at the table is not told
