import gc
import os
import sys

import pytest
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("MUJOCO_GL", "egl")  # read once, by whoever imports MuJoCo first
os.environ.setdefault("OMP_NUM_THREADS", "1")  # at test sizes threads wait for each other longer than they compute

EXIT_STATUS = pytest.StashKey[int]()

# Files that one process runs one after the other: emulated arms live at 1 kHz and share the machine with no second one,
# the twin's tests share one rendering twin, and those of pi0 an import of ten seconds. Every other file is for whoever
# is free.
TOGETHER = {
    "arms": (
        "tests/robot/",
        "tests/sim/stand_in/",
        "tests/sim/scan/test_board.py",
        "tests/sim/scan/test_capture.py",
        "tests/sim/scan/test_drive.py",
        "tests/learner/test_cell_eval.py",
        "tests/learner/test_serve.py",
    ),
    "twin": ("tests/sim/twin/",),
    "pi0": ("tests/learner/pi0/",),
}
LONGEST_FIRST = ("arms", "twin", "pi0", "tests/learner/", "tests/bridge/")  # so that both processes end together
LAST = "tests/sim/twin/test_vector_env.py"  # its own processes: beside the arms they take three times as long


def group_of(nodeid):
    if nodeid.startswith(LAST):
        return LAST
    return next((name for name, paths in TOGETHER.items() if nodeid.startswith(paths)), nodeid.split("::")[0])


class Groups(LoadFileScheduling):
    def _split_scope(self, nodeid):
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config, log):
    return Groups(config, log)


def pytest_xdist_auto_num_workers(config):
    """Two processes for the whole suite; chosen tests start sooner in this one."""
    chosen = config.option.keyword or any(text.startswith("-m") for text in config.invocation_params.args)
    return 2 if config.args == config.getini("testpaths") and not chosen else 0


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """What is imported stays: to look through it for garbage, again and again, takes a tenth of all time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):

        def order(item):
            group = group_of(item.nodeid)
            return [group == LAST, *(not group.startswith(name) for name in LONGEST_FIRST)]

        items.sort(key=order)


@pytest.fixture(autouse=True)
def ordinary_priority():
    """Constructing a `franky.Robot` makes a thread real-time: one that stays so takes the machine from all others."""
    yield
    policy = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert policy == os.SCHED_OTHER


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
