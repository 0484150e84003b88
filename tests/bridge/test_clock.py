import time

import pytest

from bridge.clock import Grid


def test_ticks_lie_on_one_grid_and_never_early():
    grid = Grid(0.01)
    start_s = grid._start_s
    for k in range(1, 6):
        tick = grid.wait()
        assert tick.index == k
        assert tick.late_s >= 0
        assert time.monotonic() >= start_s + k * 0.01


def test_an_overrun_drops_points_and_keeps_the_grid():
    grid = Grid(0.02)
    grid.wait()
    time.sleep(0.09)  # past points 2, 3, 4 and 5
    tick = grid.wait()
    assert tick.skipped == tick.index - 2 >= 3
    assert tick.dt_s >= 0.09
    following = grid.wait()
    assert following.index == tick.index + 1 + following.skipped


def test_catching_up_runs_every_point():
    grid = Grid(0.01, overrun="catch_up")
    time.sleep(0.05)
    ticks = [grid.wait() for _ in range(8)]
    assert [tick.index for tick in ticks] == list(range(1, 9))
    assert ticks[0].late_s > ticks[2].late_s > 0.01
    assert not any(tick.skipped for tick in ticks)


def test_sections_are_named_in_the_stats():
    grid = Grid(0.005)
    with grid.section("observe"):
        time.sleep(0.002)
    grid.wait()
    stats = grid.stats()
    assert stats["observe_p50_ms"] >= 2
    assert set(stats) == {"late_p50_ms", "late_p99_ms", "observe_p50_ms", "observe_p99_ms"}


@pytest.mark.parametrize("wrong", [{"period_s": 0.0}, {"period_s": 1.0, "overrun": "hurry"}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="period_s|overrun"):
        Grid(**wrong)
