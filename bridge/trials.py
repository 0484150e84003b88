"""Trials of an evaluation, on the robot or in the cell: which scenes, which policies, in which order, and the report.

    seed: 7                     # of the order
    scenes: {first: 1000, count: 20}     # or a list of numbers
    policies: {old: "tcp://127.0.0.1:5601", new: "tcp://127.0.0.1:5611"}     # for `cotwin cell-eval` bundle folders

Every policy meets every scene. Scenes come in a shuffled order, and within each the policies too, so that what drifts
(light, wear, the person) meets all policies alike. A finished trial is one JSON line; what has a line is not repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bridge.compare import compare
from bridge.run_files import read_lines
from bridge.statistics import wilson_interval


@dataclass(frozen=True)
class Plan:
    """`trials`: (scene's seed, name of the policy), in the order in which they are run. `policies`: where each is."""

    trials: list[tuple[int, str]]
    policies: dict[str, str]

    def missing(self, lines: Path) -> list[tuple[int, str]]:
        """Trials without a line yet, in order."""
        known = {(trial["seed"], trial.get("policy", "")) for trial in read_lines(lines)}
        return [trial for trial in self.trials if trial not in known]


def load_plan(path: Path, is_place: Callable[[str], bool], example: str) -> Plan:
    """`is_place` says whether a policy can be at such a place. Raises ValueError naming the key."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"plan {path}: {error}") from error
    keys = {"seed", "scenes", "policies"}
    if not isinstance(content, dict) or set(content) != keys:
        raise ValueError(f"plan {path}: its keys are {sorted(keys)}, got {sorted(content or {})}")
    scenes = _scenes(content["scenes"], path)
    policies: dict[str, str] = content["policies"]
    if not isinstance(policies, dict) or not policies:
        raise ValueError(f"plan {path}: policies names at least one, such as {{new: {example}}}")
    for name, place in policies.items():
        if not is_place(str(place)):
            raise ValueError(f"plan {path}: policy {name}: {place!r} is not like {example}")
    rng = np.random.default_rng(content["seed"])
    names = sorted(policies)
    trials = [(int(scene), names[k]) for scene in rng.permutation(scenes) for k in rng.permutation(len(names))]
    return Plan(trials, dict(policies))


def _scenes(given: Any, path: Path) -> list[int]:
    if isinstance(given, dict) and set(given) == {"first", "count"}:
        given = list(range(given["first"], given["first"] + given["count"]))
    if not isinstance(given, list) or not given or not all(isinstance(scene, int) for scene in given):
        raise ValueError(f"plan {path}: scenes is a list of numbers, or {{first: N, count: N}}")
    if len(set(given)) != len(given):
        raise ValueError(f"plan {path}: a scene is named twice; repeated trials of one scene are not independent")
    return given


def report(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of each policy of a plan (`policy/figure`), and of every two compared (`one-other/figure`)."""
    figures: dict[str, Any] = {}
    for policy in sorted({trial["policy"] for trial in trials}):
        own = summarise([trial for trial in trials if trial["policy"] == policy])
        figures |= {f"{policy}/{key}": value for key, value in own.items()}
    return figures | compare(trials)


def summarise(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of all trials. Percentiles are over all their ticks and chunks. The rate is of the newest policy version:
    faults are not part of it, nor are trials in which (or before which) the checkpoint was swapped. What it would be
    if each fault were a failure stands beside it: a policy that presses until the arm faults has failed."""
    newest = max((version for trial in trials for version in trial["policy_versions"]), default=None)
    handovers = [trial for trial in trials if not trial["fault"] and set(trial["policy_versions"]) - {newest}]
    counted = [trial for trial in trials if not trial["fault"] and trial not in handovers]
    successes = sum(trial["success"] for trial in counted)
    low, high = wilson_interval(successes, len(counted))
    faults = sum(bool(trial["fault"]) for trial in trials)
    versions = [version for trial in trials for version in trial["policy_versions"]]
    figures: dict[str, Any] = {
        "successes": successes,
        "trials": len(counted),
        "success_rate": round(successes / len(counted), 4) if counted else 0.0,
        "wilson_low": round(low, 4),
        "wilson_high": round(high, 4),
        "faults": faults,
        "success_rate_faults_failed": round(successes / max(1, len(counted) + faults), 4),
        "handover_trials": len(handovers),
        "holds": sum(trial.get("holds", 0) for trial in trials),
    }
    if versions:
        figures |= {"policy_version_before": versions[0], "policy_version_after": versions[-1]}
    if times := [trial["time_to_success_s"] for trial in counted if trial["success"]]:
        figures["time_to_success_s"] = round(float(np.median(times)), 3)
    for name in ("chunk_latency", "tick_jitter"):
        if values := [value for trial in trials for value in trial.get(f"{name}_ms", ())]:
            p50, p99 = np.percentile(values, [50, 99])
            figures |= {f"{name}_p50_ms": round(float(p50), 3), f"{name}_p99_ms": round(float(p99), 3)}
    return figures
