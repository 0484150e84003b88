"""Where hand-held photographs were taken: structure from motion by pycolmap, set into the robot's base frame.

Structure from motion knows neither scale nor frame. Both come from photographs of the same cell whose poses are known
(those of the wrist camera): all are matched together, and the cameras' places are laid onto the known ones.
"""

import shutil
from pathlib import Path

import numpy as np
import pycolmap

from bridge import pose
from sim.scan import photos as photo_set
from sim.scan.photos import Photo

HAND_HELD, KNOWN = "hand_held", "known"  # folders of pictures, each of one camera
SUFFIXES = (".png", ".jpg", ".jpeg")
MIN_KNOWN = 3
MAX_ERROR_M = 0.02  # of a known place, for it to count


def locate(pictures: Path, known: Path, out: Path) -> list[Photo]:
    """The photographs of folder `pictures`, copied into `out`, as far as they fit together with those of `known`.

    Raises ValueError where too few do. They name no bodies.
    """
    placed = photo_set.load(known)
    taken = sorted(path for path in pictures.glob("*") if path.suffix.lower() in SUFFIXES)
    for folder, paths in ((HAND_HELD, taken), (KNOWN, [photo.path for photo in placed])):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copy(path, out / folder / path.name)
    database = out / "colmap.db"
    database.unlink(missing_ok=True)
    reader = pycolmap.ImageReaderOptions(camera_model="OPENCV")
    names = [f"{folder}/{path.name}" for folder in (HAND_HELD, KNOWN) for path in sorted((out / folder).iterdir())]
    pycolmap.extract_features(database, out, names, pycolmap.CameraMode.PER_FOLDER, reader)
    pycolmap.match_exhaustive(database)
    models = pycolmap.incremental_mapping(database, out, out / "colmap")
    if not models:
        raise ValueError(f"{pictures}: no two photographs could be matched; is there texture, and do they overlap?")
    model = max(models.values(), key=lambda one: one.num_reg_images())
    places = {f"{KNOWN}/{photo.path.name}": photo.T_world_cam[:3, 3] for photo in placed}
    limits = pycolmap.RANSACOptions(max_error=MAX_ERROR_M)
    T = pycolmap.align_reconstruction_to_locations(
        model, list(places), np.array(list(places.values())), MIN_KNOWN, limits
    )
    if T is None:
        raise ValueError(f"{known}: fewer than {MIN_KNOWN} known places fit: do these photographs show the same cell?")
    model.transform(T)
    found = [_photo(out, image, model) for image in model.images.values() if image.has_pose]
    return [photo for photo in found if photo.path.parent.name == HAND_HELD]


def _photo(out: Path, image: pycolmap.Image, model: pycolmap.Reconstruction) -> Photo:
    camera, T_cam_world = model.cameras[image.camera_id], image.cam_from_world().matrix()
    fx, fy, cx, cy, *distortion = camera.params
    return Photo(
        path=out / image.name,
        width=camera.width,
        height=camera.height,
        K=np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]]),  # from the first pixel's corner to its centre
        T_world_cam=np.linalg.inv(pose.pose(T_cam_world[:, 3], T_cam_world[:, :3])),
        distortion=tuple(map(float, distortion)),
    )
