"""Bodies of `sim.twin.objects` as ManiSkill actors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import sapien
from mani_skill.utils.building.actor_builder import ActorBuilder

from sim.twin.objects import Body

DENSITY = 700.0  # kg/m3: of wood and filled plastic
ANGULAR_DAMPING = 5.0  # what rolls comes to rest
GAMMA = 2.2  # of the shader


class BodyBuilder(ActorBuilder):
    """Builds a `Body`: each part is seen as it is and collides as its convex hull."""

    def __init__(self, scene: Any, made: Body, material: sapien.physx.PhysxMaterial, initial_pose: sapien.Pose):
        super().__init__()
        self.set_scene(scene)
        self.initial_pose, self._made, self._material = initial_pose, made, material

    def build_entity(self) -> sapien.Entity:
        self._procedural_shapes = []  # of each environment's entity, its own
        for mesh, colour in self._made.parts if self.scene.can_render() else ():
            corners = np.asarray(mesh.triangles, dtype=np.float32).reshape(-1, 3)
            normals = np.repeat(mesh.face_normals, 3, axis=0).astype(np.float32)
            faces = np.arange(len(corners), dtype=np.uint32).reshape(-1, 3)
            flat = np.zeros((len(corners), 2), np.float32)
            visual = sapien.render.RenderShapeTriangleMesh(corners, faces, normals, flat, paint(colour))
            self._procedural_shapes.append(visual)
        return super().build_entity()

    def build_physx_component(self, link_parent=None):
        component = sapien.physx.PhysxRigidDynamicComponent()
        if self.physx_body_type == "kinematic":
            component.kinematic = True
        for mesh, _ in self._made.parts:
            corners = np.asarray(mesh.convex_hull.vertices, dtype=np.float32)
            shape = sapien.physx.PhysxCollisionShapeConvexMesh(corners, np.ones(3, np.float32), self._material)
            shape.set_collision_groups(self.collision_groups)
            shape.set_density(DENSITY)
            component.attach(shape)
        component.angular_damping, component.name = ANGULAR_DAMPING, self.name
        return component


def base_colour(colour: Sequence[float]) -> list[float]:
    """What reflects light so that a picture shows `colour` where the light is full."""
    return [*(float(share) ** GAMMA for share in colour), 1.0]


def paint(colour: Sequence[float]) -> sapien.render.RenderMaterial:
    material = sapien.render.RenderMaterial()
    material.base_color = base_colour(colour)
    material.roughness, material.specular = 0.9, 0.1
    return material
