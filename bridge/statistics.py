"""Statistics that are what they say: quantiles over all rows, intervals that hold for few trials."""

import math

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % (z = 1.96) score interval of a success rate; (0, 1) for no trials.

    Unlike p +- z sqrt(p (1 - p) / n) it is meaningful at 0 of n and n of n. Source: E. B. Wilson, JASA 22 (1927).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials: allowed are 0 <= successes <= trials")
    if trials == 0:
        return 0.0, 1.0
    rate, z2 = successes / trials, z * z
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def success_figures(successes: int, trials: int) -> dict[str, float]:
    """What a stage file says of so many successes: counts, rate and interval."""
    low, high = wilson_interval(successes, trials)
    rate = successes / max(trials, 1)
    return {
        "successes": successes,
        "trials": trials,
        "success_rate": rate,
        "wilson_low": low,
        "wilson_high": high,
    }


def column_stats(values: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics of one feature over all rows [N] or [N, D]: each [D] (D = 1 for [N]), `count` [1]."""
    columns = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    stats = {"min": columns.min(0), "max": columns.max(0), "mean": columns.mean(0), "std": columns.std(0)}
    quantiles = np.quantile(columns, list(QUANTILES.values()), axis=0)
    return stats | {"count": np.array([len(columns)])} | dict(zip(QUANTILES, quantiles, strict=True))


def pixel_stats(histogram: np.ndarray, num_frames: int) -> dict[str, np.ndarray]:
    """LeRobot's picture statistics, in [0, 1] and shaped [3, 1, 1], from counts [3, 256] of pixel values.

    Counts add up over frames and episodes, so the quantiles of a whole data set are true ones.
    """
    counts = np.asarray(histogram, dtype=np.float64)
    levels, total = np.arange(256) / 255.0, counts.sum(1)
    mean = counts @ levels / total
    seen = counts > 0
    stats = {
        "min": levels[seen.argmax(1)],
        "max": levels[255 - seen[:, ::-1].argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(counts @ levels**2 / total - mean**2, 0.0)),
    }
    below = counts.cumsum(1)
    for name, share in QUANTILES.items():
        stats[name] = levels[(below >= share * total[:, None]).argmax(1)]
    return {name: value.reshape(3, 1, 1) for name, value in stats.items()} | {"count": np.array([num_frames])}
