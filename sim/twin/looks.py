"""What the twin shows: cameras, light, colours, and the parts of a picture that SAPIEN draws or that splats need."""

from typing import Any

import numpy as np
import sapien
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.structs import Actor

from bridge import pose
from bridge.embodiment import Camera, Embodiment
from sim.twin.arm import TwinPanda
from sim.twin.bodies import base_colour, paint
from sim.twin.config import TwinConfig
from sim.twin.shading import light_shader
from sim.twin.splat_pictures import View

OPENCV_FROM_SAPIEN = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])  # columns: x forward, y left, z up
AMBIENT, SUN = 0.15, 3.0  # on a level surface they add up to full light
DARK_LINKS = ("panda_link3", "panda_link5", "panda_hand")
WALLS = (([-1.4, 0, 0], [0.01, 3, 2]), ([0, -1.8, 0], [3, 0.01, 2]), ([0, 0, -0.75], [3, 3, 0.01]))  # middle, half
TIP_FROM_M = 0.04  # along a finger, which is dark from there on
ABSENT = np.eye(4, dtype=np.float32) + np.float32([[0] * 4, [0] * 4, [0, 0, 0, -100], [0] * 4])  # out of every picture
Named = dict[str, np.ndarray]


class ShownEnv(BaseEnv):
    """The side of a `sim.twin.scene.TwinEnv` that is looked at. `table`, `goal` and `room` are painted anew at each
    reset."""

    agent: TwinPanda
    twin: TwinConfig
    embodiment: Embodiment
    table: Actor
    goal: Actor
    room: Actor

    def _absent(self) -> list[Actor]:
        """Bodies that take no part in this episode."""
        return []

    @property
    def _default_sensor_configs(self):
        return [self._camera(name, camera) for name, camera in sorted(self.embodiment.cameras.items())]

    def _camera(self, name: str, camera: Camera) -> CameraConfig:
        """The contract's camera at the size that is drawn, in SAPIEN's axes. Pixel centres keep their rays."""
        width, height = (self.twin.supersampling * n for n in (self.twin.picture_width, self.twin.picture_height))
        sx, sy = width / camera.width, height / camera.height
        K = np.array(
            [[camera.fx * sx, 0, (camera.cx + 0.5) * sx], [0, camera.fy * sy, (camera.cy + 0.5) * sy], [0, 0, 1]]
        )
        mount = self.agent.robot.links_map[TwinPanda.ee_link_name] if camera.mount == "tcp" else None
        return CameraConfig(
            uid=name,
            pose=sapien_camera_pose(camera.matrix),
            width=width,
            height=height,
            intrinsic=K,
            near=0.01,
            far=10.0,
            mount=mount,
            shader_config=light_shader(),
        )

    def _load_lighting(self, options: dict):
        if not self.scene.can_render():
            return
        for scene in self.scene.sub_scenes:
            scene.set_ambient_light([AMBIENT] * 3)
            self._sun = scene.add_directional_light(self.twin.light_direction, [SUN] * 3, shadow=False)

    def _room(self) -> Actor:
        """What is behind the table: two walls and the floor, for looks only."""
        room = self.scene.create_actor_builder()
        for centre, half in WALLS:
            room.add_box_visual(sapien.Pose(centre), half, material=paint(self.twin.room_colour))
        room.initial_pose = sapien.Pose()
        return room.build_static("room")

    def _after_reconfigure(self, options: dict):
        super()._after_reconfigure(options)
        self._robot: Any = self.agent.robot._objs[0]
        self._tcp: Any = self.agent.tcp._objs[0]
        self._nominal_camera_poses = {name: camera.local_pose for name, camera in self._render_cameras.items()}

    def pictures(self) -> dict[str, np.ndarray]:
        """SAPIEN's, uint8 [H, W, 3] for each camera."""
        return {name: area_mean(rgba, self.twin.supersampling) for name, (rgba,) in self._drawn("Color").items()}

    def _drawn(self, *textures: str) -> dict[str, list[np.ndarray]]:
        self.scene.sub_scenes[0].update_render()
        for camera in self._render_cameras.values():
            camera.take_picture()
        return {n: [camera.get_picture(texture) for texture in textures] for n, camera in self._render_cameras.items()}

    @property
    def _render_cameras(self) -> dict[str, Any]:
        return {name: sensor.camera._render_cameras[0] for name, sensor in self._sensors.items()}

    def _link(self, name: str) -> sapien.physx.PhysxArticulationLinkComponent:
        return self.agent.robot.links_map[name]._objs[0]

    def view(self, links: list[str], actors: list[str], with_rgb: bool) -> View:
        """Everything that a picture of this moment needs where splats are drawn."""
        rgb, depth_m = {}, {}
        if with_rgb:
            for name, (rgba, distance_m) in self._drawn("Color", "Distance").items():
                rgb[name] = area_mean(rgba, self.twin.supersampling)
                depth_m[name] = nearest(distance_m, self.twin.supersampling)
        absent = {actor.name for actor in self._absent()}
        bodies = [self._link(name).entity_pose.to_transformation_matrix() for name in links]
        present = {name: entity for name, entity in self.bodies.items() if name not in absent}
        bodies += [present[n].pose.to_transformation_matrix() if n in present else ABSENT for n in actors]
        T_base_tcp = self._tcp.entity_pose.to_transformation_matrix().astype(np.float64)
        cameras = [
            (T_base_tcp if camera.mount == "tcp" else np.eye(4)) @ camera.matrix @ self._camera_offsets[name]
            for name, camera in sorted(self.embodiment.cameras.items())
        ]
        poses = (np.array(part, dtype=np.float32).reshape(-1, 4, 4) for part in (bodies, cameras))
        return View(rgb, depth_m, *poses, self._light)

    @property
    def bodies(self) -> dict[str, sapien.Entity]:
        """Actors of the scene by name."""
        return {name: actor._objs[0] for name, actor in self.scene.actors.items()}

    @property
    def actor_names(self) -> set[str]:
        """Of all actors that an episode of the task may show."""
        return set(self.scene.actors)

    def hide(self, links: list[str], actors: list[str]) -> None:
        """SAPIEN draws these no more."""
        shown = [entity for name in actors if name in self.scene.actors for entity in self.scene.actors[name]._objs]
        for entity in [link.entity for name in links for link in self.agent.robot.links_map[name]._objs] + shown:
            body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
            if body is not None:
                entity.remove_component(body)

    def _randomize_looks(self, rng: np.random.Generator) -> None:
        """The last draws of an episode, so that worlds with and without pictures have the same states."""
        r, twin = self.twin.randomization, self.twin
        sun, ambient = (1.0 + rng.uniform(-r.light, r.light) for _ in range(2))
        nominal = {"table": twin.table_colour, "goal": twin.plate_colour, "room": twin.room_colour}
        nominal |= {"arm": twin.arm_colour, "joint": twin.joint_colour}
        colours = {n: np.clip(np.add(c, rng.uniform(-r.colour, r.colour, 3)), 0, 1) for n, c in nominal.items()}
        planks = np.clip(colours["table"] * rng.uniform(1 - r.planks, 1 + r.planks, (twin.table_planks, 1)), 0, 1)
        self._light, self._camera_offsets, shifts = (sun + ambient) / 2, {}, {}
        for name in sorted(self.embodiment.cameras):
            turn = pose.matrix_from_rpy(rng.uniform(-1, 1, 3) * r.camera_rot_rad)
            shifts[name] = pose.pose(rng.uniform(-1, 1, 3) * r.camera_pos_m, turn)
            to_opencv = pose.pose(np.zeros(3), OPENCV_FROM_SAPIEN)
            self._camera_offsets[name] = to_opencv @ shifts[name] @ to_opencv.T
        if self.scene.can_render():
            self._show_looks(sun, ambient, colours, planks, shifts)

    def _show_looks(self, sun: float, ambient: float, colours: Named, planks: np.ndarray, shifts: Named) -> None:
        for name, shift in shifts.items():
            pose_now = self._nominal_camera_poses[name] * sapien.Pose(shift.astype(np.float32))
            self._render_cameras[name].local_pose = pose_now
        self._sun.color = [SUN * sun] * 3
        self.scene.sub_scenes[0].set_ambient_light([AMBIENT * ambient] * 3)
        self._repaint(0, colours, planks, [self.goal])

    def _repaint(self, index: int, colours: Named, planks: np.ndarray, goals: list[Actor]) -> None:
        """The bodies of a sub-scene."""
        for shape, colour in zip(shown_shapes(self.table._objs[index]), planks, strict=False):
            repaint(shape, colour)  # there are none where splats draw it
        for actor in (*goals, self.room):
            for shape in shown_shapes(actor._objs[index]):
                repaint(shape, colours["room" if actor is self.room else "goal"])
        for link in self.agent.robot._objs[index].links:
            for shape in shown_shapes(link.entity):
                tip = "finger" in link.entity.name and shape.local_pose.p[2] > TIP_FROM_M
                repaint(shape, colours["joint" if tip or link.entity.name.endswith(DARK_LINKS) else "arm"])


def sapien_camera_pose(T_mount_cam: np.ndarray) -> sapien.Pose:
    """From OpenCV axes (x right, y down, z forward) to SAPIEN's (x forward, y left, z up)."""
    T = np.array(T_mount_cam, dtype=np.float64)
    T[:3, :3] = T[:3, :3] @ OPENCV_FROM_SAPIEN
    return sapien.Pose(T.astype(np.float32))


def area_mean(rgba: np.ndarray, share: int) -> np.ndarray:
    """uint8 [H * share, W * share, 4] -> uint8 [H, W, 3], as area resizing would."""
    if share == 1:
        return np.ascontiguousarray(rgba[..., :3])
    parts = [rgba[i::share, j::share, :3] for i in range(share) for j in range(share)]
    total = parts[0].astype(np.uint16)
    for part in parts[1:]:
        total += part
    return ((total + share * share // 2) // (share * share)).astype(np.uint8)


def nearest(distance_m: np.ndarray, share: int) -> np.ndarray:
    """float32 [H * share, W * share], 0 where nothing is -> [H, W]: the nearest of each block, inf where nothing is."""
    depth_m = np.where(distance_m > 0, distance_m, np.inf)
    return np.minimum.reduce([depth_m[i::share, j::share] for i in range(share) for j in range(share)])


def shown_shapes(entity: sapien.Entity) -> list[Any]:
    body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
    return [] if body is None else list(body.render_shapes)


def repaint(shape: Any, colour: np.ndarray) -> None:
    for part in shape.parts if hasattr(shape, "parts") else [shape]:
        part.material.base_color = base_colour(colour)
