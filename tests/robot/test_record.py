import json
from unittest.mock import Mock

import pytest

from bridge.run_files import append_line, read_lines
from robot import record
from robot.record import RecordConfig
from robot.scene import SessionError
from tests.robot.scripted_session import ScriptedScene, ScriptedSession

GOOD = {"success_s": (1.0, 1e9), "done_s": 2.0}


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(script, **keys) -> ScriptedSession:
        session = script if isinstance(script, ScriptedSession) else ScriptedSession(script)
        monkeypatch.setattr(record, "Session", session)
        record.record(RecordConfig(name="r", runs_dir=str(tmp_path), **keys))
        return session

    run.attempts = lambda: read_lines(tmp_path / "r" / "record" / "attempts.jsonl")
    return run


def test_failures_are_thrown_away_and_made_up_for(run):
    session = run({10: GOOD, 11: {"done_s": 2.0}, 12: GOOD}, episodes=2, seed=10)
    assert [(a["seed"], a["success"], a["saved"]) for a in run.attempts()] == [
        (10, True, True),
        (11, False, False),
        (12, True, True),
    ]
    assert (11, "discard_episode") in session.calls
    assert (10, "save_episode", True) in session.calls
    assert session.opened == 1
    assert [call for call in session.calls if call[0] == 10] == [
        (10, "start_episode"),
        (10, "expert_node/start"),
        (10, "expert_node/stop"),
        (10, "end_episode"),
        (10, "save_episode", True),
    ]


def test_a_person_is_asked_only_once_the_episode_has_ended(run, monkeypatch):
    session = ScriptedSession({})

    def judge(scene) -> bool:
        session.calls.append((session.seed, "judge"))
        session.spin(20.0)
        return True

    monkeypatch.setattr(ScriptedScene, "judge", judge)
    run(session, episodes=1, seed=0, source="device", episode_timeout_s=2.0)
    assert [call[1] for call in session.calls] == ["start_episode", "end_episode", "judge", "save_episode"]
    assert run.attempts()[0]["duration_s"] == pytest.approx(2.6, abs=0.11)


def test_the_expert_is_stopped_however_an_episode_ends(run):
    session = ScriptedSession({})
    session.check_arm = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(session, episodes=1)
    assert [call[1] for call in session.calls][-2:] == ["expert_node/stop", "end_episode"]


def test_failures_can_be_kept(run):
    session = run({0: {"done_s": 2.0}}, episodes=1, keep_failures=True)
    assert (0, "save_episode", False) in session.calls


def test_a_session_goes_on_where_it_stopped(run):
    run({seed: GOOD for seed in range(9)}, episodes=2)
    session = run({seed: GOOD for seed in range(9)}, episodes=5)
    assert [a["seed"] for a in run.attempts()] == [0, 1, 2, 3, 4]
    assert session.calls[0] == (2, "start_episode")
    assert run({}, episodes=5).opened == 0


def test_an_expert_that_never_ends_is_stopped(run):
    run({0: {"success_s": (1.0, 1e9)}}, episodes=1, episode_timeout_s=5.0)
    assert run.attempts()[0]["duration_s"] == pytest.approx(5.6, abs=0.11)


def test_a_fault_or_a_broken_recording_is_counted_and_not_saved(run):
    run({0: {"fault_s": 0.5, **GOOD}, 1: {"save_error": "no picture of wrist", **GOOD}, 2: GOOD}, episodes=1)
    faults = [(a["fault"], a["saved"]) for a in run.attempts()]
    assert faults == [("reflex", False), ("no picture of wrist", False), ("", True)]


def test_too_many_failures_in_a_row_end_it(run):
    with pytest.raises(SessionError, match="3 failures in a row"):
        run({}, episodes=1, max_failures_in_a_row=3, episode_timeout_s=1.0)
    assert len(run.attempts()) == 3


def test_a_process_that_died_ends_it_by_name(run):
    with pytest.raises(SessionError, match="cell ended with code 1"):
        run({"dead": True}, episodes=1)


def test_a_learner_that_refuses_episodes_is_told_of(run):
    with pytest.raises(SessionError, match="does not take episodes: another contract"):
        run({0: GOOD, "send_error": "another contract"}, episodes=1, demos_endpoint="tcp://127.0.0.1:1")


def test_figures_of_a_run():
    common = {"success": True, "fault": "", "duration_s": 10.0, "wall_s": 20.0}
    kept = {"saved": True, "rows": 300, "fps": 30, "gaps_over_50ms": 1, "cpu_s": 5.0}
    attempts = [
        {**common, **kept, "seed": 0, "max_gap_ms": 34.0, "repeated": 0},
        {**common, **kept, "seed": 1, "max_gap_ms": 67.0, "repeated": 2},
        {**common, "seed": 2, "success": False, "saved": False},
        {**common, "seed": 3, "success": False, "fault": "reflex", "saved": False},
    ]
    figures = record.summarise(attempts)
    assert (figures["episodes"], figures["attempts"], figures["faults"]) == (2, 4, 1)
    assert figures["success_rate"] == 0.5
    assert figures["rtf"] == 0.5
    assert (figures["frames"], figures["seconds"]) == (600, 20.0)
    assert (figures["max_gap_ms"], figures["gaps_over_50ms"], figures["repeated_frames"]) == (67.0, 2, 2)
    assert figures["recorder_cpu_cores"] == 0.25


def test_the_command_writes_a_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "Session", ScriptedSession({0: GOOD}))
    assert record.main([f"runs_dir={tmp_path}", "name=r", "episodes=1"]) == 0
    stage = json.loads((tmp_path / "r" / "stages" / "record.json").read_text())
    assert stage["figures"]["episodes"] == 1
    assert stage["files"] == {"demonstration": "videos/record.mp4"}
    monkeypatch.setattr(record, "Session", ScriptedSession({"dead": True}))
    assert record.main([f"runs_dir={tmp_path}", "name=s", "episodes=1"]) == 1
    assert "cell ended with code 1" in capsys.readouterr().err
    assert not (tmp_path / "s" / "stages").exists()


@pytest.mark.parametrize(("keys", "message"), [({"source": "robot"}, "'expert'"), ({"episodes": 0}, "1 and more")])
def test_bad_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        RecordConfig(**keys)


def test_a_line_cut_short_by_a_kill_is_left_out_and_mended(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}]


def test_a_discarded_episode_is_not_kept_even_where_failures_are(run, monkeypatch):
    monkeypatch.setattr("tests.robot.scripted_session.ScriptedScene.is_discarded", True)
    with pytest.raises(SessionError, match="failures in a row"):
        run({}, episodes=1, seed=0, keep_failures=True, max_failures_in_a_row=1, episode_timeout_s=2.0)
    assert [a["saved"] for a in run.attempts()] == [False]
