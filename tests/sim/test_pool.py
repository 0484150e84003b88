"""Processes that do, that refuse and that die."""

import itertools
import os

import pytest

from sim.pool import in_order

_factor = 0


def begin(factor: int) -> None:
    global _factor
    if not factor:
        raise OSError("no driver")
    _factor = factor


def work(item: int) -> int:
    if item == 7:
        os._exit(3)
    if item == 5:
        raise ValueError("5 is refused")
    return item * _factor


def test_answers_come_in_the_order_of_endless_items():
    answers = in_order(work, itertools.count(100), 2, begin, (3,))
    assert list(itertools.islice(answers, 9)) == [3 * item for item in range(100, 109)]
    answers.close()


def test_all_of_few_items_are_answered():
    assert list(in_order(work, [1, 2, 3], 2, begin, (10,))) == [10, 20, 30]


def test_what_the_work_refuses_is_raised_where_it_was_asked():
    with pytest.raises(ValueError, match="5 is refused"):
        list(in_order(work, [4, 5], 1, begin, (1,)))


def test_processes_that_cannot_begin_are_an_error_not_an_endless_start():
    with pytest.raises(RuntimeError, match="worker process died"):
        list(in_order(work, [1, 2], 1, begin, (0,)))


def test_a_process_that_dies_at_work_is_an_error_not_a_wait():
    with pytest.raises(RuntimeError, match="worker process died"):
        list(in_order(work, [7], 1, begin, (1,)))
