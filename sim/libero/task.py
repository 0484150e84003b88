"""One LIBERO environment, an episode at a time: seeds to starts, and scenes that are built once."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from bridge.embodiment import Embodiment
from sim.libero.config import NUM_TASKS, NUM_TRIALS, RATE_HZ, LiberoConfig
from sim.libero.scene import CAMERAS, LiberoScene, open_packages
from sim.twin.worker import Episodes

_idle: OrderedDict[str, list[LiberoScene]] = OrderedDict()  # of this process, by what they were built from


def start_of(seed: int) -> tuple[int, int]:
    """Task and trial of a seed; 500 consecutive seeds are all starts of a suite, and any ten of them all tasks."""
    return seed % NUM_TASKS, seed // NUM_TASKS % NUM_TRIALS


class LiberoTask(Episodes):
    """`facts` are `sim.libero.scene.Facts`. Environments of one process share their scenes: an episode takes an idle
    one of its task, and only where there is none is one built."""

    scene: LiberoScene | None = None

    def __init__(
        self, config: LiberoConfig, embodiment: Embodiment, stream: Sequence[int] = (0, 0), render: bool = True
    ):
        """Raises ValueError when LIBERO's packages are missing, and for an embodiment that is not LIBERO's."""
        super().__init__(stream)
        if not config.suite:
            raise ValueError("libero.suite is empty: name a suite")
        if embodiment.policy_rate_hz != RATE_HZ:
            raise ValueError(
                f"LIBERO runs at {RATE_HZ} Hz; embodiment {embodiment.name!r} has policy_rate_hz "
                f"{embodiment.policy_rate_hz}: use a checkpoint made with embodiment=libero"
            )
        if unknown := sorted(set(embodiment.cameras) - set(CAMERAS)):
            raise ValueError(f"LIBERO has no camera {unknown}; it has {', '.join(CAMERAS)}")
        open_packages(config.packages)
        self.config, self.embodiment, self.render = config, embodiment, render
        self.max_steps = config.max_steps

    def __del__(self) -> None:
        self._give_back()

    @property
    def env(self) -> LiberoScene:
        """By the twin's name, for scripts that drive either."""
        assert self.scene is not None, "no episode was begun"
        return self.scene

    def begin(self, seed: int) -> None:
        task, trial = start_of(seed)
        self._take(task)
        self.instruction = self.env.instruction
        self.env.begin(trial)
        self.facts = self.env.facts()

    def move(self, action: np.ndarray) -> None:
        self.facts = self.env.policy_step(action)

    def pictures(self) -> dict[str, np.ndarray]:
        return self.env.pictures(self.embodiment.cameras) if self.render else {}

    @property
    def state(self) -> np.ndarray:
        """Of 8 numbers with `convention: libero`."""
        return self.env.state(self.facts)

    def _give_back(self) -> None:
        """For the next who wants one of this task."""
        if self.scene is not None and _idle is not None:
            _idle.setdefault(self._key, []).append(self.scene)
            self.scene = None

    def _take(self, task: int) -> None:
        self._give_back()
        self._key = f"{self.config} {self.embodiment} {task} {self.render}"
        if idle := _idle.pop(self._key, []):
            self.scene = idle.pop()
            if idle:
                _idle[self._key] = idle
            return
        while sum(map(len, _idle.values())) >= self.config.scenes:  # those of the task that was left longest ago
            oldest = next(iter(_idle))
            _idle[oldest].pop().close()
            if not _idle[oldest]:
                del _idle[oldest]
        self.scene = LiberoScene(self.config, self.embodiment, task, self.render)
