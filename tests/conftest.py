import os
import sys

import pytest

os.environ.setdefault("MUJOCO_GL", "egl")  # read once, by whoever imports MuJoCo first
os.environ.setdefault("OMP_NUM_THREADS", "1")  # at test sizes threads wait for each other longer than they compute

EXIT_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave without the interpreter's teardown: SAPIEN, franky, DDS and torch in one process do not agree on who goes
    last, and one of them crashing after the last test would hide that all tests passed."""
    if EXIT_STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])
