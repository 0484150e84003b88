"""Two policies on the same scenes: how much better is one, how sure is that, and how many more scenes would show it."""

import math
from itertools import combinations
from typing import Any

from bridge.statistics import wilson_interval

Z_TWO_SIDED, Z_POWER = 1.959964, 0.841621  # 95 % and 80 %


def paired_interval(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float, float]:
    """Difference of two success rates on the same scenes, and its 95 % interval.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998) 2635, method 10: Wilson's intervals of both rates, put
    together with the correlation of the pairs.
    """
    total = both + only_first + only_second + neither
    if total == 0:
        return 0.0, -1.0, 1.0
    first, second = (both + only_first) / total, (both + only_second) / total
    (low1, high1), (low2, high2) = (wilson_interval(both + only, total) for only in (only_first, only_second))
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    cross = both * neither - only_first * only_second
    if cross > 0:
        cross = max(cross - total / 2, 0)
    phi = cross / math.sqrt(product) if product else 0.0
    down = _side(first - low1, high2 - second, phi)
    up = _side(high1 - first, second - low2, phi)
    difference = first - second
    return difference, max(-1.0, difference - down), min(1.0, difference + up)


def exact_p(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided test: how likely so uneven a split of the unequal pairs is between equal policies."""
    unequal = only_first + only_second
    tail = sum(math.comb(unequal, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**unequal)


def pairs_needed(difference: float, unequal_share: float) -> int | None:
    """Scenes for a 95 % test to find such a difference four times in five; None when there is none to find.

    Source: R. J. Connor, Biometrics 43 (1987) 207.
    """
    if difference == 0:
        return None
    spread = math.sqrt(max(0.0, unequal_share - difference**2))
    return math.ceil(((Z_TWO_SIDED * math.sqrt(unequal_share) + Z_POWER * spread) / difference) ** 2)


def compare(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Every two policies of a plan's trials (keys `policy`, `seed`, `success`, `fault`), as flat figures.

    Scenes in which either trial ended in a fault are left out and counted.
    """
    figures: dict[str, Any] = {}
    for first, second in combinations(sorted({trial["policy"] for trial in trials}), 2):
        of = {name: {t["seed"]: t for t in trials if t["policy"] == name} for name in (first, second)}
        scenes = sorted(set(of[first]) & set(of[second]))
        pairs = [(of[first][scene], of[second][scene]) for scene in scenes]
        good = [(a["success"], b["success"]) for a, b in pairs if not a["fault"] and not b["fault"]]
        counts = [good.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        difference, low, high = paired_interval(*counts)
        unequal = (counts[1] + counts[2]) / max(len(good), 1)
        figures |= {
            f"{first}-{second}/{key}": value
            for key, value in {
                "pairs": len(good),
                "left_out": len(pairs) - len(good),
                "difference": round(difference, 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "p": round(exact_p(counts[1], counts[2]), 4),
                "pairs_needed": pairs_needed(difference, unequal),
            }.items()
        }
    return figures


def _side(ours: float, theirs: float, phi: float) -> float:
    return math.sqrt(max(0.0, ours**2 - 2 * phi * ours * theirs + theirs**2))
