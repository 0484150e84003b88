import os

os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer: no threads of its own

import pytest
from omegaconf import OmegaConf

from bridge.config import CONFIG_DIR
from bridge.embodiment import Embodiment
from sim.twin.config import Randomization, TwinConfig
from sim.twin.vector_env import Twin

FIXED_LOOKS = Randomization(light=0.0, colour=0.0, planks=0.0, camera_pos_m=0.0, camera_rot_rad=0.0)


@pytest.fixture(scope="session")
def embodiment() -> Embodiment:
    return Embodiment.from_dict(OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "embodiment/fr3_tabletop.yaml")))


@pytest.fixture(scope="session")
def twin(embodiment) -> Twin:
    """One rendering twin for the whole session (importing ManiSkill takes seconds); each test resets it."""
    return Twin(TwinConfig(randomization=FIXED_LOOKS), embodiment)
