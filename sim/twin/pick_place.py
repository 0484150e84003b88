"""The co-training twin: one of many objects from the table into a tray or a bowl.

**Task description.** Pick up the object on the table and put it into the tray (or bowl). Made for a policy of 5 Hz and
80 steps (`twin: pick_place`, `embodiment: rl_co`).

**Randomizations.** The object, uniformly from the configured split of `sim.twin.objects`; its place uniform in a
rectangle, its yaw uniform; the receptacle's place uniform in another (and, with `receptacle: either`, which it is); the
object never begins where the receptacle stands. The arm's joints with normal noise around home; looks, friction and
latency as `Randomization` says. All of it is drawn from the episode's seed alone; the object comes to rest before the
first observation.

**Success conditions.** `stable`: the object's centre lies within the receptacle's inner outline and no higher above
its floor than the object can reach, it moves slower than 2 cm/s, and no finger touches it. `legacy` is the peer's
predicate: horizontal distance at most half the receptacle's larger side plus 1 cm, above it by at most 5 cm more than
half of both heights, and pressing on it with more than 0.03 N; whether the gripper has let go or the object lies still
is not asked.
"""

from typing import Any

import numpy as np
import sapien
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs import Actor

from sim.twin.bodies import BodyBuilder
from sim.twin.objects import BOWL_RADIUS_M, THICKNESS_M, TRAY_HALF_M, builtin, objects, receptacles
from sim.twin.scene import TwinEnv, across_m

LEGACY_MARGIN_M, LEGACY_ABOVE_M = 0.01, 0.05
CLEARANCE_M = 0.01  # between object and receptacle at the start


@register_env("PickPlaceTwin-v1", max_episode_steps=80)
class PickPlaceTwinEnv(TwinEnv):
    TASK = "PickPlaceTwin-v1"
    LEGACY_FORCE_N = 0.03
    SETTLE_S = 0.4
    PER_EPISODE = ("rest_height_m", "inner_half_m", "inner_radius_m", "reach_m", "legacy_radius_m", "legacy_above_m")
    inner_half_m: Any  # in x and y, of the receptacle; and round ones' radius: where the object's centre may lie
    inner_radius_m: Any
    reach_m: Any  # no higher above the receptacle's floor

    def _load_task(self, surface: sapien.physx.PhysxMaterial) -> None:
        away = sapien.Pose([0.0, 0.0, 5.0])
        self._objects, choices = objects(self.twin), receptacles()
        self._receptacles = [made for made in choices if self.twin.receptacle in (made.name, "either")]
        self._object_actors: list[Actor] = [
            BodyBuilder(self.scene, made, surface, away).build_dynamic(made.name) for made in self._objects
        ]
        self._goal_actors: list[Actor] = [
            BodyBuilder(self.scene, made, surface, away).build_kinematic(made.name) for made in self._receptacles
        ]
        self.goal_top_m = THICKNESS_M

    def _place(self, rng: np.random.Generator) -> tuple[sapien.Pose, sapien.Pose]:
        twin = self.twin
        chosen, into = int(rng.integers(len(self._objects))), int(rng.integers(len(self._receptacles)))
        self.made, self.into = self._objects[chosen], self._receptacles[into]
        self.object, self.goal = self._object_actors[chosen], self._goal_actors[into]
        self.rest_height_m = self.made.size_m[2] / 2
        everywhere, bowl = float("inf"), self.into.name == "bowl"
        self.inner_half_m = np.full(2, everywhere) if bowl else np.array(TRAY_HALF_M)
        self.inner_radius_m = BOWL_RADIUS_M if bowl else everywhere
        self.reach_m = self.made.longest_half_m + CLEARANCE_M
        self.legacy_radius_m = max(self.into.size_m[:2]) / 2 + LEGACY_MARGIN_M
        self.legacy_above_m = (self.made.size_m[2] + self.into.size_m[2]) / 2 + LEGACY_ABOVE_M
        yaw_rad = rng.uniform(-np.pi, np.pi)
        apart = self.into.size_m[:2] / 2 + self.made.longest_half_m + CLEARANCE_M
        for _ in range(100):
            goal_xy = rng.uniform(-1, 1, 2) * twin.plate_range_m + twin.plate_center_m
            object_xy = rng.uniform(-1, 1, 2) * twin.cube_range_m + twin.cube_center_m
            if (np.abs(object_xy - goal_xy) >= apart).any():
                break
        turned = [np.cos(yaw_rad / 2), 0.0, 0.0, np.sin(yaw_rad / 2)]
        return sapien.Pose([*object_xy, self.rest_height_m], turned), sapien.Pose([*goal_xy, 0.0])

    @property
    def candidates(self) -> tuple[list[Actor], list[Actor]]:
        return self._object_actors, self._goal_actors

    def _absent(self) -> list[Actor]:
        others = [actor for actor in self._object_actors + self._goal_actors if actor not in (self.object, self.goal)]
        return others + super()._absent()

    @property
    def actor_names(self) -> set[str]:
        """Also of bodies that this configuration leaves out: one splat scene serves every split and receptacle."""
        return super().actor_names | {made.name for split in builtin().values() for made in (*split, *receptacles())}

    def lies_on_goal(self, object_pos_m: Any, goal_pos_m: Any) -> Any:
        apart_m = object_pos_m - goal_pos_m
        above_m = apart_m[..., 2] - self.goal_top_m
        inside = (abs(apart_m[..., :2]) <= self.inner_half_m).all(-1)
        inside = inside & (across_m(object_pos_m, goal_pos_m) <= self.inner_radius_m)
        return inside & (above_m > 0.0) & (above_m <= self.reach_m)

    def legacy_place(self, object_pos_m: Any, goal_pos_m: Any) -> Any:
        above_m = object_pos_m[..., 2] - goal_pos_m[..., 2]
        near = across_m(object_pos_m, goal_pos_m) <= self.legacy_radius_m
        return near & (above_m > 0) & (above_m <= self.legacy_above_m)
