import json

import numpy as np
import pytest

from bridge.compare import compare, exact_p, paired_interval, pairs_needed


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
