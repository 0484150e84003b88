"""The README's commands and tree are true."""

import re
import subprocess
from pathlib import Path

import pytest

from cotwin import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_command_in_the_readme_exists():
    named = set(re.findall(r"cotwin ([a-z][a-z-]*)", README))
    assert named
    assert named <= set(COMMANDS)


def test_every_make_target_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", README, re.MULTILINE)):
        assert re.search(rf"^{target[0] or target[1]}:", makefile, re.MULTILINE), target


def test_launch_files_in_the_readme_exist():
    for path in re.findall(r"launch/[a-z_.]+\.yaml", README):
        assert (ROOT / path).is_file(), path


def test_the_tree_names_every_module():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    modules = [f for f in tracked if f.endswith(".py") and f.split("/")[0] in ("bridge", "robot", "sim", "learner")]
    tree = README.split("<!-- tree -->")[1].split("<!-- /tree -->")[0]
    missing = [f for f in modules if not f.endswith("__init__.py") and f" {Path(f).name} " not in tree]
    assert not missing, "run `.venv/bin/python .ci/tree`"
