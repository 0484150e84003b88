"""LeRobotDataset v3 features, shared by every writer and reader (docs/contract.md, section 6)."""

from typing import Any

from bridge.embodiment import Embodiment
from bridge.pose import ACTION_NAMES, STATE_NAMES

DOMAINS = ("real", "stand_in", "twin")
CODEBASE_VERSION = "v3.0"


def image_key(camera: str) -> str:
    return f"observation.images.{camera}"


def features(embodiment: Embodiment, image_size: tuple[int, int] | None = None) -> dict[str, dict[str, Any]]:
    """User features, LeRobot's `info.json` form. `image_size` (height, width) overrides the cameras' own for twins that
    render smaller pictures of the same view.

    An `action` row is the motion of the commanded target from this row to the next one (so rows compose: any number of
    consecutive rows gives the action of a slower policy), after safety clipping; `requested_action` is the same before
    clipping and is kept off the `action` prefix, which LeRobot would take for a policy output.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, camera in embodiment.cameras.items():
        height, width = image_size or (camera.height, camera.width)
        names = ["height", "width", "channels"]
        out[image_key(name)] = {"dtype": "video", "shape": (height, width, 3), "names": names}
    vectors = {"observation.state": STATE_NAMES, "action": ACTION_NAMES, "requested_action": ACTION_NAMES}
    for key, names in vectors.items():
        out[key] = {"dtype": "float32", "shape": (len(names),), "names": list(names)}
    out["capture_stamp_ns"] = {"dtype": "int64", "shape": (1,), "names": ["robot_clock_ns"]}
    for key in ("frame_repeated", "intervention", "next.success", "next.done"):
        out[key] = {"dtype": "bool", "shape": (1,), "names": None}
    out["next.reward"] = {"dtype": "float32", "shape": (1,), "names": None}
    return out
