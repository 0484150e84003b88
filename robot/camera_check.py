"""Look at every camera for some seconds: cotwin camera check serials=[...]. Ends with 1 when something is wrong.

For each camera: rate, pictures dropped or repeated, how even the exposure times are and how old pictures are when they
come, whether anything is to be seen, and whether the device's own calibration is the contract's.
"""

import sys
import time
from dataclasses import dataclass, field

import numpy as np
import pyrealsense2 as rs

from bridge.config import command_line, errors_in_one_line
from bridge.embodiment import Camera, Embodiment
from robot.camera import CameraReader, Picture
from robot.config import CameraConfig
from robot.scene import SessionError

RATE_SHARE = 0.05  # of the asked rate
GAP_PERIODS = 1.5
MAX_AGE_MS = 100.0
DARK, FLAT = 8.0, 3.0  # mean and spread of grey levels below which nothing is to be seen
FOCAL_SHARE, CENTRE_PX = 0.03, 12.0


@dataclass
class CheckConfig(CameraConfig):
    """Keys of `cotwin camera check`."""

    seconds: float = 5.0
    embodiment: Embodiment = field(default_factory=Embodiment)

    def __post_init__(self):
        super().__post_init__()
        if not 0.5 <= self.seconds <= 3600:
            raise ValueError(f"seconds {self.seconds}: allowed are 0.5 to 3600")
        if unknown := sorted(set(self.cameras) - set(self.embodiment.cameras)):
            raise ValueError(f"cameras {unknown} are not in the contract; it has {sorted(self.embodiment.cameras)}")


class Tally:
    """What one camera delivered. `add` is called from the camera's thread."""

    def __init__(self, camera: Camera, rate_hz: float, has_our_clock: bool = True):
        self.camera, self.rate_hz, self.has_our_clock = camera, rate_hz, has_our_clock
        self._stamps_ms: list[float] = []
        self._ages_ms: list[float] = []
        self._means: list[float] = []
        self._spreads: list[float] = []

    def add(self, picture: Picture) -> None:
        self._stamps_ms.append(picture.stamp_ns * 1e-6)
        self._ages_ms.append((time.time_ns() - picture.stamp_ns) * 1e-6)
        few = picture.pixels[::16, ::16]
        self._means.append(float(few.mean()))
        self._spreads.append(float(few.std()))

    def judge(self, reader: CameraReader) -> tuple[dict[str, float], list[str]]:
        """Figures, and what is wrong in words."""
        health, problems = reader.health, []
        figures = {"pictures": health.num_pictures, "dropped": health.num_dropped, "repeated": health.num_repeated}
        if health.state != "OK":
            problems.append(f"is {health.state}")
        if len(self._stamps_ms) < 3:
            return figures, [*problems, "hardly any picture came"]
        gaps_ms = np.diff(self._stamps_ms)
        rate_hz, age_ms = 1e3 / float(gaps_ms.mean()), float(np.percentile(self._ages_ms, 99))
        figures |= {"rate_hz": round(rate_hz, 2), "longest_gap_ms": round(float(gaps_ms.max()), 1)}
        figures |= {"brightness": round(float(np.mean(self._means)), 1)}
        if self.has_our_clock:
            figures["age_p99_ms"] = round(age_ms, 1)
            if not 0 <= age_ms <= MAX_AGE_MS:
                problems.append(f"pictures are {age_ms:.0f} ms old: is global time on, and USB 3 used?")
        if health.num_dropped or health.num_repeated:
            problems.append(f"{health.num_dropped} pictures dropped, {health.num_repeated} repeated")
        if abs(rate_hz / self.rate_hz - 1) > RATE_SHARE:
            problems.append(f"delivers {rate_hz:.1f} Hz of {self.rate_hz:g} Hz: too little light, or a slow USB port")
        elif gaps_ms.max() > GAP_PERIODS * 1e3 / self.rate_hz:
            problems.append(f"a gap of {gaps_ms.max():.0f} ms between two exposures")
        if np.mean(self._means) < DARK or np.mean(self._spreads) < FLAT:
            problems.append("nothing is to be seen: is the lens covered?")
        return figures, problems + calibration_problems(self.camera, reader.intrinsics())


def calibration_problems(camera: Camera, seen: rs.intrinsics) -> list[str]:
    """Where the device's own calibration is not the contract's."""
    problems = []
    for name, ours, theirs in (("fx", camera.fx, seen.fx), ("fy", camera.fy, seen.fy)):
        if abs(theirs / ours - 1) > FOCAL_SHARE:
            problems.append(f"{name} is {theirs:.1f} px, the contract says {ours:.1f}")
    for name, ours, theirs in (("cx", camera.cx, seen.ppx), ("cy", camera.cy, seen.ppy)):
        if abs(theirs - ours) > CENTRE_PX:
            problems.append(f"{name} is {theirs:.1f} px, the contract says {ours:.1f}")
    return problems


def check(config: CheckConfig) -> dict[str, tuple[dict[str, float], list[str]]]:
    """Figures and problems of each camera. ValueError for one that does not open, SessionError without a cell."""
    context, serials, stand_in = None, dict(zip(config.cameras, config.serials, strict=False)), None
    if config.device == "stand_in":
        from robot.camera_node import load_cell
        from sim.stand_in.camera_device import StandInCameras
        from sim.stand_in.errors import CellGone

        stand_in = StandInCameras(config.cell_frames, config.embodiment, load_cell(config.cell))
        context, serials = stand_in.context, stand_in.serials
    tallies, readers = {}, []
    try:
        for name in config.cameras:
            camera = config.embodiment.cameras[name]
            tally = tallies[name] = Tally(camera, config.rate_hz, stand_in is None)
            limits = {"frame_timeout_s": config.frame_timeout_s, "max_repeats": config.max_repeats}
            readers.append(
                CameraReader(name, camera, serials[name], config.rate_hz, tally.add, context=context, **limits)
            )
        if stand_in is not None:
            try:
                stand_in.start()
            except CellGone as error:
                raise SessionError(str(error)) from error
        time.sleep(config.seconds)
        return {reader.name: tallies[reader.name].judge(reader) for reader in readers}
    finally:
        if stand_in is not None:
            stand_in.stop()
        for reader in readers:
            reader.close()


@errors_in_one_line(SessionError)
def main(argv: list[str]) -> int:
    if argv[:1] != ["check"]:
        print(f"usage: cotwin camera check [key=value ...]\n\n{(__doc__ or '').strip()}")
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    config = command_line("camera", CheckConfig, argv[1:], __doc__ or "")
    results = check(config)
    for name, (figures, problems) in results.items():
        print(f"{name}: {'; '.join(problems) or 'good'}")
        print("  " + ", ".join(f"{key} {value:g}" for key, value in figures.items()))
    return int(any(problems for _, problems in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
