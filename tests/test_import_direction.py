"""robot, sim, learner -> bridge; robot and bridge run where neither torch nor ray is installed, learner without ROS.

Every module of a part is imported in a process that refuses the forbidden packages.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "ray", "lerobot", "mani_skill")
FORBIDDEN = {
    "bridge": (*HEAVY, "rclpy", "robot", "sim", "learner"),
    "robot": (*HEAVY, "learner"),
    "sim/stand_in": (*HEAVY, "learner"),
    "learner": ("rclpy", "robot"),
}
PROBE = """
import importlib, sys
forbidden, modules = sys.argv[1].split(","), sys.argv[2].split(",")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in forbidden:
            raise ImportError(f"{name} is forbidden here")

sys.meta_path.insert(0, Refuse())
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"{module}: {error}")
"""


def modules_of(part: str) -> list[str]:
    """Dotted names of a part's modules; programs that run when imported are left out."""
    paths = [p.relative_to(ROOT).with_suffix("") for p in sorted((ROOT / part).rglob("*.py"))]
    return [".".join(p.parts) for p in paths if p.name not in ("__init__", "__main__")]


def import_without(forbidden: tuple[str, ...], modules: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROBE, ",".join(forbidden), ",".join(modules)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_a_part_imports_without_what_it_must_not_need(part):
    modules = modules_of(part)
    assert modules
    result = import_without(FORBIDDEN[part], modules)
    assert result.returncode == 0, result.stderr


def test_the_probe_notices():
    result = import_without(("numpy",), ["bridge.pose"])
    assert result.returncode != 0
    assert "bridge.pose: numpy is forbidden here" in result.stderr
