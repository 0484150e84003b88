"""The twin's first task.

**Task description.** Pick up the cube and put it on the plate.

**Randomizations.** Cube and plate uniform in their rectangles (`TwinConfig`), never closer than they can lie; the
arm's joints with normal noise around home; looks, friction and latency as `Randomization` says. All of it is drawn
from the episode's seed alone.

**Success conditions.** `stable`: the cube's centre lies within `success_radius_m` of the plate's, rests on it, moves
slower than 2 cm/s, and no finger touches it. `legacy` is the peer's predicate: horizontal distance below 7 cm and the
cube's centre 0 to 7 cm above the plate's, released or not.
"""

from typing import Any

import numpy as np
import sapien
from mani_skill.utils.registration import register_env

from sim.twin.bodies import paint
from sim.twin.scene import TwinEnv, across_m

LEGACY_RADIUS_M = LEGACY_HEIGHT_M = 0.07


@register_env("PutCubeOnPlate-v0", max_episode_steps=100)
class PutCubeOnPlateEnv(TwinEnv):
    TASK = "PutCubeOnPlate-v0"

    def _load_task(self, surface: sapien.physx.PhysxMaterial) -> None:
        twin = self.twin
        cube = self.scene.create_actor_builder()
        cube.add_box_collision(half_size=[twin.cube_half_size_m] * 3, material=surface, density=1000)
        cube.add_box_visual(half_size=[twin.cube_half_size_m] * 3, material=paint(twin.cube_colour))
        cube.initial_pose = sapien.Pose([0.5, 0.4, 0.3])
        self.object = cube.build("cube")
        plate = self.scene.create_actor_builder()
        upright = sapien.Pose(q=[0.70710678, 0.0, 0.70710678, 0.0])  # SAPIEN's cylinders lie along x
        half_height = twin.plate_height_m / 2
        plate.add_cylinder_collision(upright, twin.plate_radius_m, half_height, material=surface)
        plate.add_cylinder_visual(upright, twin.plate_radius_m, half_height, material=paint(twin.plate_colour))
        plate.initial_pose = sapien.Pose([0.5, -0.4, 0.3])
        self.goal = plate.build_kinematic("plate")
        self.rest_height_m, self.goal_top_m = twin.cube_half_size_m, half_height

    def _place(self, rng: np.random.Generator) -> tuple[sapien.Pose, sapien.Pose]:
        twin = self.twin
        cube_xy = rng.uniform(-1, 1, 2) * twin.cube_range_m + twin.cube_center_m
        plate_xy = rng.uniform(-1, 1, 2) * twin.plate_range_m + twin.plate_center_m
        apart = twin.plate_radius_m + 1.5 * twin.cube_half_size_m
        for _ in range(100):
            if np.linalg.norm(cube_xy - plate_xy) >= apart:
                break
            cube_xy = rng.uniform(-1, 1, 2) * twin.cube_range_m + twin.cube_center_m
        return sapien.Pose([*cube_xy, twin.cube_half_size_m]), sapien.Pose([*plate_xy, twin.plate_height_m / 2])

    def lies_on_goal(self, object_pos_m: Any, goal_pos_m: Any) -> Any:
        resting_z = goal_pos_m[..., 2] + self.goal_top_m + self.twin.cube_half_size_m
        near = across_m(object_pos_m, goal_pos_m) <= self.twin.success_radius_m
        return near & (abs(object_pos_m[..., 2] - resting_z) < 0.01)

    def legacy_place(self, object_pos_m: Any, goal_pos_m: Any) -> Any:
        above_m = object_pos_m[..., 2] - goal_pos_m[..., 2]
        near = across_m(object_pos_m, goal_pos_m) < LEGACY_RADIUS_M
        return near & (above_m >= 0) & (above_m <= LEGACY_HEIGHT_M)
