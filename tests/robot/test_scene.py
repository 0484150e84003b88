import os
import sys
import time
from collections import deque

import pytest

from robot.scene import CellScene, OperatorScene, SessionError


class Terminal:
    """What a person types, line by line, into the program's standard input."""

    def __init__(self, monkeypatch):
        reading, self._writing = os.pipe()
        monkeypatch.setattr(sys, "stdin", os.fdopen(reading, "r", buffering=1))

    def type(self, text: str) -> None:
        os.write(self._writing, text.encode())

    def hang_up(self) -> None:
        os.close(self._writing)


@pytest.fixture
def terminal(monkeypatch):
    return Terminal(monkeypatch)


class Patience:
    """A `check` that types the next answer each time it is asked, as a person who reads the question first."""

    def __init__(self, terminal, answers):
        self.terminal, self.answers = terminal, iter(answers)

    def __call__(self):
        self.terminal.type(next(self.answers))


def test_a_person_judges(terminal, capsys):
    scene = OperatorScene(Patience(terminal, ["perhaps\n", "Y\n", "n\n"]))
    assert scene.judge() is True
    assert scene.judge() is False
    assert "answer y or n" in capsys.readouterr().out


def test_what_was_typed_before_the_question_is_no_answer(terminal):
    terminal.type("y\n")
    assert OperatorScene(Patience(terminal, ["n\n"])).judge() is False


def test_enter_ends_an_episode(terminal):
    scene = OperatorScene(lambda: None)
    assert not scene.wants_end()
    terminal.type("\n")
    assert scene.wants_end()
    assert not scene.wants_end()


def test_waiting_for_a_person_notices_who_died(terminal):
    def check():
        raise SessionError("arm_node ended with code 1")

    with pytest.raises(SessionError, match="arm_node"):
        OperatorScene(check).reset(3)


def test_nobody_at_the_terminal_is_an_error(terminal):
    terminal.hang_up()
    with pytest.raises(SessionError, match="standard input ended"):
        OperatorScene(lambda: None).reset(3)


def test_a_cell_that_is_not_there(monkeypatch):
    pytest.importorskip("sim.stand_in.client")
    scene = CellScene("tcp://127.0.0.1:9", lambda: None)
    scene._cell.timeout_s = 0.05
    with pytest.raises(SessionError, match="no answer from the cell"):
        scene.success()

    def check():
        raise SessionError("cell ended with code -9")

    scene._check = check
    with pytest.raises(SessionError, match="code -9"):
        scene.time_s()
    scene.close()


def test_marks_of_a_device_end_and_judge_an_episode(terminal, monkeypatch):
    monkeypatch.setattr("robot.scene.UNDO_S", 0.05)
    marks = deque()
    scene = OperatorScene(lambda: marks.append("start"), marks)
    scene.reset(1)  # the mark stands for Enter
    assert not scene.wants_end()
    marks.append("success")
    assert not scene.wants_end()  # it could still be taken back
    time.sleep(0.06)
    assert scene.wants_end()
    assert scene.judge() is True
    scene.reset(2)
    marks += ["success", "undo"]
    scene.wants_end()
    time.sleep(0.06)
    assert not scene.wants_end()
    marks.append("discard")
    scene.wants_end()
    time.sleep(0.06)
    assert scene.wants_end()
    assert (scene.judge(), scene.is_discarded) == (False, True)
    scene.reset(3)
    assert not scene.is_discarded


def test_a_mark_answers_the_question_that_enter_left_open(terminal):
    marks = deque()
    scene = OperatorScene(lambda: marks.append("failure"), marks)
    terminal.type("\n")
    assert scene.wants_end()
    assert scene.judge() is False


def test_what_is_asked_is_told_and_taken_back_when_it_was_answered(terminal):
    told = []
    scene = OperatorScene(Patience(terminal, ["perhaps\n", "y\n"]), tell=told.append)
    assert scene.judge() is True
    assert told == ["was it a success? [y/n]", "", "was it a success? [y/n]", ""]
