import json
import threading
from collections import Counter

import numpy as np
import pytest

from bridge.errors import BridgeTimeout
from bridge.policy_client import PolicyClient
from bridge.policy_server import PolicyServer
from bridge.run_files import read_lines
from robot import evaluate
from robot.compare import compare, exact_p, paired_interval, pairs_needed
from robot.evaluate import EvalConfig
from robot.plan import Switch, load_plan
from tests.bridge.test_infer import observation
from tests.robot.cell import wait_for
from tests.robot.scripted_session import ScriptedSession

PLAN = "seed: 7\nscenes: {first: 100, count: 6}\npolicies: {old: tcp://127.0.0.1:1, new: tcp://127.0.0.1:2}\n"


@pytest.fixture
def plan_file(tmp_path):
    def write(text):
        (tmp_path / "plan.yaml").write_text(text)
        return tmp_path / "plan.yaml"

    return write


def test_every_policy_meets_every_scene_in_a_shuffled_order_that_stays(plan_file):
    plan = load_plan(plan_file(PLAN))
    assert Counter(scene for scene, _ in plan.trials) == Counter({100 + n: 2 for n in range(6)})
    assert set(plan.trials) == {(100 + n, name) for n in range(6) for name in ("old", "new")}
    assert [scene for scene, _ in plan.trials[::2]] == [scene for scene, _ in plan.trials[1::2]]  # pairs stay together
    assert [scene for scene, _ in plan.trials[::2]] != sorted(scene for scene, _ in plan.trials[::2])
    assert {name for _, name in plan.trials[::2]} == {"old", "new"}  # neither is always first
    assert load_plan(plan_file(PLAN)) == plan
    assert load_plan(plan_file(PLAN.replace("seed: 7", "seed: 8"))) != plan


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
        load_plan(plan_file(text))


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
            scene = load_plan(plan_file).trials[len(done) + len(chosen) - 1][0]
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
    figures = evaluate.report(parts)
    assert figures == evaluate.report(whole)
    assert (figures["new/successes"], figures["old/successes"]) == (6, 3)
    assert (figures["new-old/difference"], figures["new-old/pairs"]) == (0.5, 6)
    assert "new" not in capsys.readouterr().out  # whoever stands at the table is not told


def test_paired_interval_by_hand():
    """Without correlation it is the hybrid of two Wilson intervals: 4 of 8 both, each alone and neither twice."""
    difference, low, high = paired_interval(2, 2, 2, 2)
    assert difference == 0
    half = 0.5 - 0.2152  # Wilson, 4 of 8
    assert (low, high) == pytest.approx((-(half * 2**0.5), half * 2**0.5), abs=1e-3)
    assert paired_interval(10, 0, 0, 10)[1] > paired_interval(5, 5, 5, 5)[1]  # pairs that agree say more
    assert paired_interval(0, 0, 0, 0) == (0.0, -1.0, 1.0)
    forth, back = paired_interval(36, 12, 2, 0), paired_interval(36, 2, 12, 0)
    assert forth == pytest.approx((0.2, -back[2], -back[1]))
    assert forth[1] > 0


def test_the_interval_covers_what_it_says():
    rng, inside, n = np.random.default_rng(0), 0, 400
    for _ in range(n):
        first = rng.random(40) < 0.6
        second = np.where(rng.random(40) < 0.5, first, rng.random(40) < 0.6)
        counts = [np.sum(first & second), np.sum(first & ~second), np.sum(~first & second), np.sum(~first & ~second)]
        _, low, high = paired_interval(*map(int, counts))
        inside += low <= 0 <= high
    assert 0.925 <= inside / n <= 0.99


def test_exact_test_and_number_of_pairs_by_hand():
    assert exact_p(5, 0) == pytest.approx(2 / 32)
    assert exact_p(3, 3) == 1.0
    assert exact_p(0, 0) == 1.0
    # (1.96 sqrt(0.3) + 0.8416 sqrt(0.3 - 0.04))^2 / 0.04
    assert pairs_needed(0.2, 0.3) == 57
    assert pairs_needed(0.0, 0.3) is None


def test_faults_are_left_out_of_pairs():
    def trial(policy, seed, success, fault=""):
        return {"policy": policy, "seed": seed, "success": success, "fault": fault}

    trials = [trial("a", n, True) for n in range(4)] + [trial("b", n, n > 1) for n in range(3)]
    trials[0]["fault"] = "reflex"
    figures = compare(trials)
    assert (figures["a-b/pairs"], figures["a-b/left_out"]) == (2, 1)
    assert figures["a-b/difference"] == 0.5
    assert json.loads(json.dumps(figures)) == figures


def test_one_policy_has_nothing_to_be_compared_with():
    assert compare([{"policy": "a", "seed": 1, "success": True, "fault": ""}]) == {}
