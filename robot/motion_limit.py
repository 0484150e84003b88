"""Speed, acceleration and jerk limits of a stream of vectors [3], position or rotation alike. Pure numbers, no clock.

A stream is counted in steps of `period_s`: `velocity` is what the last step moved by, over the period, and
`acceleration` how much that differs from the step before, over the period again. What holds for these holds for the
poses that are sent.

Safety by a way out: from each state `brake` leads to rest within all limits. A step is only taken when the way out from
where it leads keeps inside what is allowed (`stopping_way`); else the way out that the last step left is taken. So no
stream of goals can lead out, however wild.
"""

from dataclasses import dataclass

import numpy as np

MAX_BRAKE_STEPS = 400
SLACK = 1.0 + 1e-9


@dataclass(frozen=True)
class MotionLimit:
    """Euclidean lengths, per second, second squared and cubed, of m or rad."""

    speed: float
    acceleration: float
    jerk: float
    period_s: float


def towards(
    way: np.ndarray, left: float, velocity: np.ndarray, acceleration: np.ndarray, limit: MotionLimit
) -> tuple[np.ndarray, dict[str, tuple[float, float]]]:
    """The next velocity [3] to come by `way` [3] in one step, where the goal will rest `left` away from here.

    Also what was cut: `speed`, `acceleration` or `jerk`, each with what was wanted and what is allowed. Slows down
    early enough to stop at the goal.
    """
    h, cuts = limit.period_s, {}
    wanted = way / h
    # A stop takes u^2 / 2a, half a step, and the time in which the jerk lets the acceleration rise.
    late_s = h / 2 + max(0.0, limit.acceleration / limit.jerk - h)
    slow = limit.acceleration * late_s
    stoppable = np.sqrt(slow * slow + 2 * limit.acceleration * left) - slow
    wanted, speed = _shorten(wanted, min(limit.speed, max(stoppable, 0.0)))
    if speed > limit.speed * SLACK:
        cuts["speed"] = speed, limit.speed
    change, size = _shorten((wanted - velocity) / h, limit.acceleration)
    if size > limit.acceleration * SLACK:
        cuts["acceleration"] = size, limit.acceleration
    change, size = _shorten(change - acceleration, limit.jerk * h)
    if size > limit.jerk * h * SLACK:
        cuts["jerk"] = size / h, limit.jerk
        return velocity + h * (acceleration + change), cuts
    return (velocity + h * (acceleration + change) if cuts else wanted), cuts


def brake(velocity: np.ndarray, acceleration: np.ndarray, limit: MotionLimit) -> np.ndarray:
    """The next velocity on the way to rest."""
    h, most = limit.period_s, limit.jerk * limit.period_s
    stop = -velocity / h
    needed = _length(stop)
    if needed <= min(limit.acceleration, most) * SLACK and _length(stop - acceleration) <= most * SLACK:
        return np.zeros(3)
    # As hard as the jerk can end again by the time that the speed is gone.
    endable = np.sqrt(most * most / 4 + 2 * limit.jerk * needed * h) - most / 2
    stop, _ = _shorten(stop, min(limit.acceleration, endable))
    change, _ = _shorten(stop - acceleration, most)
    return velocity + h * (acceleration + change)


def stopping_way(velocity: np.ndarray, acceleration: np.ndarray, limit: MotionLimit) -> np.ndarray | None:
    """Where `brake` leads, relative to here, after each of its steps: [N, 3]. None when the speed limit would be broken
    on the way, as by an acceleration that cannot end in time."""
    way, here = [], np.zeros(3)
    for _ in range(MAX_BRAKE_STEPS):
        if _length(velocity) > limit.speed * SLACK:
            return None
        if not velocity.any() and not acceleration.any():
            return np.array(way).reshape(-1, 3)
        slower = brake(velocity, acceleration, limit)
        velocity, acceleration = slower, (slower - velocity) / limit.period_s
        here = here + limit.period_s * velocity
        way.append(here)
    return None


def _shorten(vector: np.ndarray, longest: float) -> tuple[np.ndarray, float]:
    """The vector, not longer than allowed, and its length before."""
    length = _length(vector)
    return (vector * (longest / length) if length > longest else vector), length


def _length(vector: np.ndarray) -> float:
    x, y, z = vector.tolist()
    return (x * x + y * y + z * z) ** 0.5
