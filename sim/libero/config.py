"""What a LIBERO environment is made of. Lengths in m, in the robot's base frame."""

from dataclasses import dataclass, field
from typing import Any

from bridge.embodiment import Embodiment

SUITES = {"libero_spatial": 240, "libero_object": 240, "libero_goal": 320, "libero_10": 480}  # policy steps
NUM_TASKS, NUM_TRIALS = 10, 50  # of each suite, and of each task: 500 starts
CONVENTIONS = ("contract", "libero")
RATE_HZ = 20.0


@dataclass
class LiberoConfig:
    """`convention: libero` is what released LIBERO checkpoints speak: actions in [-1, 1] as LIBERO's own controller
    reads them, and its state of 8 numbers (position in world, axis-angle, two finger positions)."""

    suite: str = ""  # empty: no LIBERO, where a twin may take its place
    max_steps: int = 0  # policy steps of an episode; 0: the suite's own
    settle_steps: int = 15  # with an open, resting hand before an episode begins
    picture_width: int = 256
    picture_height: int = 256
    convention: str = "contract"  # or libero
    packages: str = ".libero"  # folder of LIBERO's packages (docs/libero.md)
    scenes: int = 10  # idle ones that a process keeps; building one takes seconds
    workspace_lower_m: list[float] = field(default_factory=lambda: [0.15, -0.6, -0.02])  # of the TCP's target
    workspace_upper_m: list[float] = field(default_factory=lambda: [0.95, 0.6, 0.9])

    def __post_init__(self):
        if self.suite and self.suite not in SUITES:
            raise ValueError(f"suite {self.suite!r}: allowed are {', '.join(SUITES)}")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention {self.convention!r}: allowed are {', '.join(CONVENTIONS)}")
        least_of = {"max_steps": 0, "settle_steps": 0, "picture_width": 1, "picture_height": 1, "scenes": 1}
        for key, least in least_of.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key} {getattr(self, key)}: allowed are {least} and more")
        if self.suite and not self.max_steps:
            self.max_steps = SUITES[self.suite]

    @property
    def draws_splats(self) -> bool:
        return False

    def make(self, embodiment: Embodiment, stream: tuple[int, int] = (0, 0), render: bool = True) -> Any:
        """One environment in this process: `sim.libero.task.LiberoTask`."""
        from sim.libero.task import LiberoTask

        return LiberoTask(self, embodiment, stream, render)
