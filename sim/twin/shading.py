"""The twin's own SAPIEN shader pack: one forward pass, for renderers that run on the CPU.

Against ManiSkill's `minimal` pack on two CPU cores: a picture costs about a third, and the first one does not wait
seconds for an environment map and a reflection table, because no shader asks for them.
"""

from pathlib import Path

import sapien
from mani_skill.render import ShaderConfig

FOLDER = str(Path(__file__).parent / "shaders")


def light_shader() -> ShaderConfig:
    """For `CameraConfig(shader_config=...)`. Pictures are "Color", uint8 RGBA, and "Distance", float32: the depth along
    the optical axis in m, 0 where nothing is.

    Picture formats are global to the process and must be known before the first camera is made.
    """
    for name in ("Color", "ColorRaw"):
        sapien.render.set_picture_format(name, "r8g8b8a8unorm")
    sapien.render.set_picture_format("Distance", "r32sfloat")
    return ShaderConfig(
        shader_pack=FOLDER,
        texture_names={"Color": ["rgb"], "Distance": ["depth"]},
        texture_transforms={"Color": lambda data: {"rgb": data[..., :3]}, "Distance": lambda data: {"depth": data}},
    )
