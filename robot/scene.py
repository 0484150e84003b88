"""Who prepares the scene and judges success: the stand-in cell by itself, or a person beside a real one."""

import select
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol


class SessionError(RuntimeError):
    """The session cannot go on: a process died, a node does not answer, or a request was refused. Says which."""


UNDO_S = 1.0  # an episode's last mark can be taken back for so long
VERDICTS = {"success": True, "failure": False, "discard": False}


class Scene(Protocol):
    automatic: bool  # nobody is asked
    is_discarded: bool  # the episode that ended is to be thrown away, whatever it was

    def reset(self, seed: int) -> None: ...

    def success(self) -> bool | None:
        """None where only a person can tell, at the end."""

    def judge(self) -> bool:
        """Whether the episode that ended was a success."""

    def time_s(self) -> float:
        """Seconds as the robot lives them."""

    def wants_end(self) -> bool:
        """Whether somebody asked to end the episode."""

    def close(self) -> None: ...


class CellScene:
    """The stand-in cell. `check` is asked first when the cell does not answer: it may know who died."""

    automatic, is_discarded = True, False

    def __init__(self, endpoint: str, check: Callable[[], None]):
        from sim.stand_in.client import CellClient  # only where a cell is configured

        self._cell, self._check = CellClient(endpoint), check

    def reset(self, seed: int) -> None:
        self._ask(self._cell.reset, seed)

    def success(self) -> bool:
        return bool(self._ask(self._cell.success))

    def judge(self) -> bool:
        return self.success()

    def time_s(self) -> float:
        return float(self._ask(self._cell.stats)["time_s"])

    def wants_end(self) -> bool:
        return False

    def close(self) -> None:
        self._cell.close()

    def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        from sim.stand_in.errors import CellGone, ResetRefused

        try:
            return method(*arguments)
        except CellGone as error:
            self._check()
            raise SessionError(str(error)) from error
        except ResetRefused as error:
            raise SessionError(f"the cell refused to reset: {error}") from error


class OperatorScene:
    """A person at the terminal, or with a device in hand. `check` is called while waiting for an answer and raises when
    the robot side died. `marks` are the episode marks of a device or of the console,
    which whoever hears them appends; `tell` is told what is asked, and "" when it was answered."""

    automatic = False

    def __init__(
        self, check: Callable[[], None], marks: deque[str] | None = None, tell: Callable[[str], None] = lambda _: None
    ):
        self._check, self._marks, self._tell = check, marks if marks is not None else deque(), tell
        self._verdict, self._marked_s, self.is_discarded = "", 0.0, False

    def reset(self, seed: int) -> None:
        self._verdict, self.is_discarded = "", False
        self._ask(f"set up scene {seed}, step back, then press Enter (or mark start): ", ("start",))

    def success(self) -> None:
        return None

    def judge(self) -> bool:
        answer, self._verdict = self._verdict, ""
        while answer not in VERDICTS:
            answer = self._ask("was it a success? [y/n] ", tuple(VERDICTS))
            answer = {"y": "success", "n": "failure"}.get(answer.lower(), answer)
            if answer not in VERDICTS:
                print(f"{answer!r}: answer y or n")
        self.is_discarded = answer == "discard"
        return VERDICTS[answer]

    def time_s(self) -> float:
        return time.monotonic()

    def wants_end(self) -> bool:
        """Enter ends the episode at once; a mark of how it went ends it unless it is taken back."""
        while self._marks:
            if (mark := self._marks.popleft()) in VERDICTS:
                self._verdict, self._marked_s = mark, time.monotonic()
            elif mark == "undo":
                self._verdict = ""
        if self._verdict:
            return time.monotonic() - self._marked_s > UNDO_S
        return self._line(0.0) is not None

    def close(self) -> None:
        pass

    def _ask(self, prompt: str, by_mark: tuple[str, ...]) -> str:
        """A line of the terminal, or a mark."""
        while self._line(0.0) is not None:  # what was typed or marked before the question is no answer to it
            pass
        self._marks.clear()
        print(prompt, end="", flush=True)
        self._tell(prompt.strip())
        try:
            while (line := self._line(0.1)) is None:
                self._check()
                while self._marks:
                    if (mark := self._marks.popleft()) in by_mark:
                        print(mark)
                        return mark
            return line.strip()
        finally:
            self._tell("")

    def _line(self, timeout_s: float) -> str | None:
        if not select.select([sys.stdin], [], [], timeout_s)[0]:
            return None
        line = sys.stdin.readline()
        if not line:
            raise SessionError("standard input ended, and with it the person who sets scenes and judges them")
        return line
