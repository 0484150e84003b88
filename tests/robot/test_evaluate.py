import json
import os
import signal
import time
from unittest.mock import Mock

import pytest

from bridge.errors import RobotFault
from bridge.run_files import read_lines
from bridge.trials import summarise
from robot import evaluate
from robot.evaluate import EvalConfig
from robot.scene import SessionError
from robot.session import ended_by, interrupted_when_left
from tests.robot.scripted_session import ScriptedScene, ScriptedSession

SOLVED = {"success_s": (3.0, 1e9)}


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(script, **keys) -> ScriptedSession:
        session = script if isinstance(script, ScriptedSession) else ScriptedSession(script)
        monkeypatch.setattr(evaluate, "Session", session)
        evaluate.evaluate(EvalConfig(name="r", runs_dir=str(tmp_path), **keys))
        return session

    run.trials = lambda label="before": read_lines(tmp_path / "r" / "eval" / f"{label}.jsonl")
    return run


def test_success_must_last(run):
    """Seed 1's success is gone after 0.3 s; seed 2 has none."""
    run({0: SOLVED, 1: {"success_s": (3.0, 3.3)}}, trials=3, seed=0, trial_s=6.0, hold_s=0.5)
    trials = run.trials()
    assert [trial["success"] for trial in trials] == [True, False, False]
    assert trials[0]["time_to_success_s"] == pytest.approx(3.0, abs=0.11)
    assert trials[0]["duration_s"] == pytest.approx(3.5, abs=0.21)
    assert trials[1]["duration_s"] == pytest.approx(6.1, abs=0.11)
    assert trials[1]["time_to_success_s"] is None


def test_trials_that_are_there_are_not_repeated(run):
    run({0: SOLVED}, trials=1, seed=0, trial_s=5.0)
    session = run({1: SOLVED}, trials=3, seed=0, trial_s=5.0)
    assert [trial["seed"] for trial in run.trials()] == [0, 1, 2]
    assert session.calls[:2] == [(-1, "runtime_node/stop"), (1, "runtime_node/start")]  # the first before any scene
    assert run({}, trials=3, seed=0).opened == 0
    run({0: SOLVED}, trials=1, seed=0, label="after", trial_s=5.0)
    assert len(run.trials("after")) == 1


def test_the_policy_is_stopped_after_every_trial(run):
    session = run({0: {"fault_s": 1.0}, 1: SOLVED}, trials=2, seed=0, trial_s=5.0)
    assert [call[1] for call in session.calls[1:]] == ["runtime_node/start", "runtime_node/stop"] * 2


def test_a_person_is_asked_only_once_the_policy_is_off(run, monkeypatch):
    """Who takes 4 s to answer sees an arm at rest meanwhile, and the trial is none the longer."""
    session = ScriptedSession({})

    def judge(scene) -> bool:
        session.calls.append((session.seed, "judge"))
        session.spin(4.0)
        return session.seed == 0

    monkeypatch.setattr(ScriptedScene, "automatic", False)
    monkeypatch.setattr(ScriptedScene, "success", lambda scene: None)
    monkeypatch.setattr(ScriptedScene, "judge", judge)
    run(session, trials=2, seed=0, trial_s=2.0)
    assert [call[1] for call in session.calls[1:]] == ["runtime_node/start", "runtime_node/stop", "judge"] * 2
    first, second = run.trials()
    assert (first["success"], second["success"], second["fault"]) == (True, False, "")
    assert first["duration_s"] == first["time_to_success_s"] == pytest.approx(2.1, abs=0.11)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SessionError, OSError])
def test_the_policy_is_stopped_however_a_trial_ends(run, error):
    session = ScriptedSession({})
    session.check_arm = Mock(side_effect=error)
    with pytest.raises(error):
        run(session, trials=1, seed=0)
    assert [call[1] for call in session.calls[1:]] == ["runtime_node/start", "runtime_node/stop"]


@pytest.mark.parametrize("error", [SessionError("the wrist camera died"), RobotFault("reflex"), KeyboardInterrupt()])
def test_a_stop_that_fails_is_told_after_what_ended_the_trial(run, error):
    session = ScriptedSession({})
    session.check_arm = Mock(side_effect=error)
    session.call = Mock(side_effect=["", "", SessionError("nobody answers runtime_node/stop")])
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else SessionError) as raised:
        run(session, trials=2, seed=0)
    assert str(raised.value).startswith(str(error))
    assert "nobody answers" in "".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert session.call.call_count == 3


@pytest.fixture
def default_signals():
    """Whatever the tests themselves were started by, such as nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_terminal_that_closes_ends_a_trial_as_ctrl_c_does(number, default_signals):
    stop = Mock()
    stop.call.side_effect = lambda _: os.kill(os.getpid(), signal.SIGHUP)  # the shell sends one as well

    def trial() -> None:
        with interrupted_when_left(), ended_by(stop, "stop"):
            os.kill(os.getpid(), number)
            time.sleep(5.0)

    with pytest.raises(KeyboardInterrupt, match=number.name):
        trial()
    stop.call.assert_called_once_with("stop")
    assert signal.getsignal(number) == signal.SIG_DFL


def test_faults_are_not_failures(run):
    script = {
        0: SOLVED,
        1: {"fault_s": 1.0},
        2: {"runtime": {"policy_versions": [], "reason": "BridgeTimeout", "state": "HOLD"}},
        3: {"runtime": {"errors": 4, "reason": "BridgeTimeout", "state": "HOLD"}},
        4: {},
    }
    run(script, trials=5, seed=0, trial_s=2.0 + 3)
    assert [trial["fault"] for trial in run.trials()] == [
        "",
        "reflex",
        "the policy never acted: BridgeTimeout",
        "the policy went silent: BridgeTimeout",
        "",
    ]
    figures = summarise(run.trials())
    assert (figures["successes"], figures["trials"], figures["faults"]) == (1, 2, 3)


def test_too_many_faults_end_it(run):
    with pytest.raises(SessionError, match="2 trials ended in faults, the last one: reflex"):
        run({seed: {"fault_s": 0.5} for seed in range(9)}, trials=9, seed=0, max_faults=1)


def test_figures_of_trials():
    def trial(seed, success, version, latency, jitter, fault=""):
        times = {"chunk_latency_ms": latency, "tick_jitter_ms": jitter, "holds": 1, "policy_versions": [version]}
        return {"seed": seed, "success": success, "time_to_success_s": 4.0 if success else None, "fault": fault} | times

    trials = [trial(seed, seed < 8, 2, [10.0] * 99, [1.0] * 100) for seed in range(10)]
    trials.append(trial(10, False, 2, [110.0] * 10, [5.0] * 100, fault="reflex"))
    figures = summarise(trials)
    assert (figures["successes"], figures["trials"], figures["faults"]) == (8, 10, 1)
    assert (figures["success_rate"], figures["success_rate_faults_failed"]) == (0.8, round(8 / 11, 4))
    assert (figures["wilson_low"], figures["wilson_high"]) == (0.4902, 0.9433)
    assert (figures["policy_version_before"], figures["policy_version_after"]) == (2, 2)
    # 10 of 1000 latencies are 110 ms, so the 99th percentile, 99 % of the way along 1000 sorted values, is still 10.
    assert figures["chunk_latency_p50_ms"] == 10.0
    assert figures["chunk_latency_p99_ms"] == pytest.approx(11.0, abs=0.01)
    assert figures["tick_jitter_p99_ms"] == 5.0

    handover = [trial(11, True, 1, [10.0], [1.0]), *trials[5:]]
    figures = summarise(handover)
    assert (figures["successes"], figures["trials"], figures["handover_trials"]) == (3, 5, 1)
    assert (figures["policy_version_before"], figures["policy_version_after"]) == (1, 2)


def test_the_command_writes_a_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "Session", ScriptedSession({1000: SOLVED}))
    assert evaluate.main([f"runs_dir={tmp_path}", "name=r", "trials=1", "label=after"]) == 0
    stage = json.loads((tmp_path / "r" / "stages" / "eval_after.json").read_text())
    assert stage["figures"]["successes"] == 1
    assert stage["files"] == {"first_trial": "videos/eval_after.mp4"}


@pytest.mark.parametrize(("keys", "message"), [({"label": "a/b"}, "letters"), ({"trials": 0}, "1 and more")])
def test_bad_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**keys)
