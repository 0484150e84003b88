"""The cell's MuJoCo scene: FR3 with Franka hand on a table, a cube, a plate, cameras.

Kinematics, inertias and meshes of the arm come from the FR3 description that the `franky_sim` package ships. Its visual
meshes have 242 000 faces, far too many for a software renderer, so the arm is drawn with its collision meshes.
"""

from importlib.resources import files

import mujoco
import numpy as np

from bridge.embodiment import Camera, Embodiment
from bridge.pose import matrix_from_rpy, pose, quat_xyzw_from_matrix
from sim.stand_in.config import Bodies, CameraError, CellConfig, Chessboard, Looks

ARM_JOINTS = tuple(f"fr3_joint{i}" for i in range(1, 8))
T_HAND_EE = pose([0.0, 0.0, 0.1034], np.eye(3))
T_FLANGE_TCP = pose([0.0, 0.0, 0.0], matrix_from_rpy([0.0, 0.0, -np.pi / 4])) @ T_HAND_EE  # Franka hand: F_T_EE
PHYSICS_STEP_S = 0.001
FLOOR_Z_M = -0.75
TABLE_CENTRE_M, TABLE_HALF_M = (0.42, 0.0), (0.60, 0.70)
POSITION_GROUP, TORQUE_GROUP = 1, 2  # actuator groups; one of the two is disabled

# What touches what (contype, conaffinity): the arm touches table, plate and cube; the cube also table and plate.
HARD = [0.004, 1.0]  # contact time constant (s), damping ratio
ARM_TOUCH, FURNITURE_TOUCH, CUBE_TOUCH, NO_TOUCH = (1, 0), (2, 1), (4, 3), (0, 0)


def build_model(config: CellConfig, embodiment: Embodiment) -> mujoco.MjModel:
    """qpos: 7 arm joints (rad), 2 fingers (m), cube position and quaternion wxyz. Mocap body 0 is the plate.

    Actuators: 7 joint positions, 7 joint velocities, 7 joint torques, then the hand's width.
    """
    spec = _fr3_spec()
    spec.option.timestep = PHYSICS_STEP_S
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10.0  # a squeezed cube must not creep out of the fingers
    _light_arm(spec, config.looks)
    _drive_arm(spec, config.bodies)
    _hand(spec, config.bodies)
    _surroundings(spec, config.looks)
    _things(spec, config.bodies, config.looks)
    _chessboard(spec, config.board)
    for name, camera in embodiment.cameras.items():
        spec.visual.global_.offwidth = max(spec.visual.global_.offwidth, camera.width)
        spec.visual.global_.offheight = max(spec.visual.global_.offheight, camera.height)
        _camera(spec, name, camera, config.camera_errors.get(name, CameraError()))
    return spec.compile()


def arm_spec() -> mujoco.MjSpec:
    """The bare kinematic chain with the end effector's site `ee`: no meshes, no drives."""
    spec = _fr3_spec()
    for item in [*spec.geoms, *spec.meshes, *spec.actuators, *spec.equalities, *spec.tendons]:
        spec.delete(item)
    _ee_site(spec)
    return spec


def _fr3_spec() -> mujoco.MjSpec:
    """The description as shipped; its `meshdir` misses the folder the meshes lie in, and its keyframe is not ours."""
    assets = files("franky_sim") / "assets"
    text = (assets / "fr3.xml").read_text().replace('meshdir="assets"', f'meshdir="{assets / "meshes"}"')
    spec = mujoco.MjSpec.from_string(text)
    spec.modelname = "stand_in_cell"
    for key in list(spec.keys):
        spec.delete(key)
    spec.body("hand").quat = [np.cos(np.pi / 8), 0.0, 0.0, -np.sin(np.pi / 8)]  # the file has seven digits
    return spec


def _ee_site(spec: mujoco.MjSpec) -> None:
    spec.body("hand").add_site(name="ee", pos=T_HAND_EE[:3, 3])


def _light_arm(spec: mujoco.MjSpec, looks: Looks) -> None:
    """Throw the fine visual meshes away and show the collision meshes instead. Fingers keep theirs (624 faces)."""
    for geom in list(spec.geoms):
        if geom.group == 2 and "finger" not in geom.meshname:
            spec.delete(geom)
    used = {geom.meshname for geom in spec.geoms}
    for mesh in list(spec.meshes):
        if mesh.name not in used:
            spec.delete(mesh)
    for material in list(spec.materials):
        spec.delete(material)
    for geom in list(spec.geoms):
        geom.material = ""
        if geom.group == 2:
            geom.rgba = [*(looks.joint_rgb if geom.meshname.endswith("1") else looks.arm_rgb), 1.0]
        elif geom.type == mujoco.mjtGeom.mjGEOM_MESH and geom.meshname.endswith("_coll"):
            geom.group = 2
            dark = geom.meshname in ("link3_coll", "link5_coll", "hand_coll")
            geom.rgba = [*(looks.joint_rgb if dark else looks.arm_rgb), 1.0]
            touches = geom.meshname in ("link5_coll", "link6_coll", "link7_coll", "hand_coll")
            geom.contype, geom.conaffinity = ARM_TOUCH if touches else NO_TOUCH
        else:
            spec.delete(geom)  # finger pads: see `_hand`


def _drive_arm(spec: mujoco.MjSpec, bodies: Bodies) -> None:
    """Stiff position and velocity servos for the robot's own controllers, plain torques for external ones.

    The rotor inertias (armature) of the description stay: without them the client's damping makes the wrist diverge.
    """
    for actuator in list(spec.actuators):
        spec.delete(actuator)
    for body in spec.bodies:
        body.gravcomp = 1.0  # the robot compensates its own weight and the hand's, not what it holds
    for name in ARM_JOINTS:
        joint = spec.joint(name)
        joint.frictionloss = 0.0  # compensated inside the robot
        joint.damping[0] = bodies.joint_damping_nms
    common = {"trntype": mujoco.mjtTrn.mjTRN_JOINT}
    stiffness = bodies.joint_stiffness_nm
    for name, kp in zip(ARM_JOINTS, stiffness, strict=True):
        act = spec.add_actuator(name=f"{name}_position", target=name, group=POSITION_GROUP, **common)
        act.set_to_position(kp=kp)
    for name, kp in zip(ARM_JOINTS, stiffness, strict=True):
        act = spec.add_actuator(name=f"{name}_velocity", target=name, group=POSITION_GROUP, **common)
        act.set_to_velocity(kv=0.03 * kp)
    for name in ARM_JOINTS:
        spec.add_actuator(name=f"{name}_torque", target=name, group=TORQUE_GROUP, **common).set_to_motor()


def _hand(spec: mujoco.MjSpec, bodies: Bodies) -> None:
    """One force-limited drive on the sum of both finger travels, as one motor drives both fingers of the hand.

    The drive's force is what each finger presses with; its limit is `actuator_forcerange`, set while running.
    """
    for tendon in list(spec.tendons):
        spec.delete(tendon)
    width = spec.add_tendon(name="hand_width")
    for name in ("finger_joint1", "finger_joint2"):
        width.wrap_joint(name, 1.0)
        joint = spec.joint(name)
        joint.armature, joint.damping[0] = 0.3, 20.0  # motor and spindle seen from the finger
        joint.frictionloss = 0.0
    drive = spec.add_actuator(name="hand", target="hand_width", trntype=mujoco.mjtTrn.mjTRN_TENDON)
    drive.set_to_position(kp=4000.0, kv=160.0)
    drive.forcelimited, drive.forcerange = True, [-30.0, 30.0]
    contact = {"condim": 4, "friction": [bodies.friction, 0.01, 0.0001], "solref": HARD, "group": 3}
    box, (touch, affinity) = mujoco.mjtGeom.mjGEOM_BOX, ARM_TOUCH
    for side in ("left", "right"):
        finger = spec.body(f"{side}_finger")
        for part, pos, size in (
            ("tip", [0, 0.004, 0.0445], [0.0085, 0.004, 0.0085]),
            ("shank", [0, 0.0145, 0.02], [0.0085, 0.0075, 0.02]),
        ):
            finger.add_geom(
                name=f"{side}_{part}",
                type=box,
                pos=pos,
                size=size,
                mass=0,
                contype=touch,
                conaffinity=affinity,
                **contact,
            )
    _ee_site(spec)


def _surroundings(spec: mujoco.MjSpec, looks: Looks) -> None:
    spec.visual.quality.offsamples = 0  # multisampling doubles the cost of a picture
    spec.visual.quality.shadowsize = 1024
    spec.visual.quality.numquads = 2
    spec.visual.headlight.ambient = [looks.ambient] * 3
    spec.visual.headlight.diffuse = [0.22] * 3
    spec.visual.headlight.specular = [0.0] * 3
    spec.stat.extent = 1.0  # MuJoCo counts the next two in it, and would take the walls' distance: fingers were cut off
    spec.visual.map.znear, spec.visual.map.zfar = 0.02, 6.0
    lamp = np.array(looks.lamp_pos_m)
    aim = np.array([*TABLE_CENTRE_M, 0.0]) - lamp
    spec.worldbody.add_light(
        name="lamp",
        pos=lamp,
        dir=aim / np.linalg.norm(aim),
        diffuse=[looks.lamp_diffuse] * 3,
        specular=[0.1] * 3,
        ambient=[0.0] * 3,
        castshadow=looks.shadows,
    )
    rgba = lambda rgb: [*rgb, 1.0]  # noqa: E731
    box = mujoco.mjtGeom.mjGEOM_BOX
    touch, affinity = NO_TOUCH
    still = {"contype": touch, "conaffinity": affinity}
    # Nearest first: the renderer skips pixels that are covered already. And planks of plain colour instead of a
    # textured table top, because filtering a texture costs a software renderer as much as all the rest.
    rng = np.random.default_rng(looks.seed)
    (x, y), (half_x, half_y), thickness = TABLE_CENTRE_M, TABLE_HALF_M, 0.03
    width = 2 * half_y / looks.num_planks
    for i in range(looks.num_planks):
        rgb = np.clip(np.array(looks.table_rgb) * rng.uniform(1 - looks.plank_spread, 1 + looks.plank_spread), 0, 1)
        spec.worldbody.add_geom(
            name=f"plank{i}", type=box, pos=[x, y - half_y + (i + 0.5) * width, -thickness],
            size=[half_x, width / 2, thickness], rgba=rgba(rgb), **still,
        )  # fmt: skip
    touch, affinity = FURNITURE_TOUCH
    spec.worldbody.add_geom(
        name="table", type=box, pos=[x, y, -0.1], size=[half_x, half_y, 0.1], contype=touch, conaffinity=affinity,
        friction=[0.9, 0.005, 0.0001], solref=HARD, group=3,
    )  # fmt: skip
    for name, pos, size in (
        ("wall_x", [-1.4, 0, 0], [0.01, 3, 2]),
        ("wall_y", [0, -1.8, 0], [3, 0.01, 2]),
        ("floor", [0, 0, FLOOR_Z_M], [3, 3, 0.01]),
    ):
        rgb = looks.floor_rgb if name == "floor" else looks.wall_rgb
        spec.worldbody.add_geom(name=name, type=box, pos=pos, size=size, rgba=rgba(rgb), **still)


def _things(spec: mujoco.MjSpec, bodies: Bodies, looks: Looks) -> None:
    """The cube is free; the plate is glued to the table wherever the reset put it (a mocap body)."""
    half = bodies.cube_side_m / 2
    touch, affinity = CUBE_TOUCH
    cube = spec.worldbody.add_body(name="cube", pos=[0.4, 0.2, half])
    cube.add_freejoint(name="cube")
    cube.add_geom(
        name="cube",
        type=mujoco.mjtGeom.mjGEOM_BOX,
        size=[half] * 3,
        mass=bodies.cube_mass_kg,
        rgba=[*looks.cube_rgb, 1.0],
        contype=touch,
        conaffinity=affinity,
        condim=4,
        friction=[bodies.friction, 0.01, 0.0001],
    )
    plate = spec.worldbody.add_body(name="plate", pos=[0.45, 0.0, bodies.plate_thickness_m], mocap=True)
    touch, affinity = FURNITURE_TOUCH
    thickness = bodies.plate_thickness_m
    plate.add_geom(
        name="plate",
        type=mujoco.mjtGeom.mjGEOM_CYLINDER,
        pos=[0, 0, -thickness / 2],
        size=[bodies.plate_radius_m, thickness / 2, 0],
        contype=touch,
        conaffinity=affinity,
        group=3,
        friction=[bodies.friction, 0.005, 0.0001],
        solref=HARD,
    )
    vertices, faces = _plate_mesh(bodies.plate_radius_m, thickness)
    spec.add_mesh(name="plate", uservert=vertices.ravel(), userface=faces.ravel())
    touch, affinity = NO_TOUCH
    plate.add_geom(
        name="plate_look",
        type=mujoco.mjtGeom.mjGEOM_MESH,
        meshname="plate",
        rgba=[*looks.plate_rgb, 1.0],
        contype=touch,
        conaffinity=affinity,
        group=2,
    )


def _chessboard(spec: mujoco.MjSpec, board: Chessboard) -> None:
    """For looks only: a white sheet a square larger all round, and the dark squares, which begin at the corner."""
    box, (touch, affinity), side = mujoco.mjtGeom.mjGEOM_BOX, NO_TOUCH, board.square_m
    still = {"type": box, "contype": touch, "conaffinity": affinity}
    middle = np.array([board.columns - 1, board.rows - 1]) / 2
    if board.columns:
        size = [(board.columns + 2) * side / 2, (board.rows + 2) * side / 2, 5e-4]
        spec.worldbody.add_geom(name="sheet", pos=[*board.pos_m, 5e-4], size=size, rgba=[0.95, 0.95, 0.95, 1], **still)
    for column, row in np.ndindex(board.columns, board.rows):
        if (column + row) % 2 == 0:
            pos = np.array(board.pos_m) + side * (np.array([column, row]) - middle)
            size, dark = [side / 2, side / 2, 6e-4], [0.05, 0.05, 0.05, 1]
            spec.worldbody.add_geom(name=f"dark{column}_{row}", pos=[*pos, 6e-4], size=size, rgba=dark, **still)


def _plate_mesh(radius_m: float, thickness_m: float, num_segments: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A shallow dish turned on a lathe: float32 [V, 3], int32 [F, 3]; z = 0 is where things lie. For looks only."""
    profile = np.array([  # radius and height, from the middle of the upper side to the middle of the lower one
        [1e-4, 0.0], [0.72 * radius_m, 0.0], [radius_m, 0.006], [1.03 * radius_m, 0.004],
        [0.75 * radius_m, -thickness_m], [1e-4, -thickness_m],
    ])  # fmt: skip
    angle = np.arange(num_segments) * 2 * np.pi / num_segments
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    vertices = np.concatenate(
        [np.column_stack([r * ring, np.full(num_segments, z)]) for r, z in profile], dtype=np.float32
    )
    faces = []
    for row in range(len(profile) - 1):
        for i in range(num_segments):
            a, b = row * num_segments + i, row * num_segments + (i + 1) % num_segments
            faces += [[a, a + num_segments, b], [b, a + num_segments, b + num_segments]]
    return vertices, np.array(faces, dtype=np.int32)


def _camera(spec: mujoco.MjSpec, name: str, camera: Camera, error: CameraError) -> None:
    T = camera.matrix @ pose(error.pos_m, matrix_from_rpy(error.rpy_rad))
    if camera.mount == "base":
        body = spec.worldbody
    else:
        body = spec.body("hand")
        T = T_HAND_EE @ T
    x, y, z, w = quat_xyzw_from_matrix(T[:3, :3] @ np.diag([1.0, -1.0, -1.0]))  # MuJoCo looks along -z, y up
    cx, cy = camera.cx + error.principal_px[0], camera.cy + error.principal_px[1]
    body.add_camera(
        name=name, pos=T[:3, 3], quat=[w, x, y, z], resolution=[camera.width, camera.height],
        sensor_size=[camera.width * 1e-5, camera.height * 1e-5],
        focal_pixel=[camera.fx * error.focal_scale, camera.fy * error.focal_scale],
        # MuJoCo counts the principal point from the picture's centre, to the left and up (tested).
        principal_pixel=[(camera.width - 1) / 2 - cx, (camera.height - 1) / 2 - cy],
    )  # fmt: skip


def set_site(model: mujoco.MjModel, site: int, T_body_site: np.ndarray) -> None:
    """Move a site within its body, while running."""
    model.site_pos[site] = T_body_site[:3, 3]
    model.site_quat[site] = np.roll(quat_xyzw_from_matrix(T_body_site[:3, :3]), 1)
    model.site_sameframe[site] = mujoco.mjtSameFrame.mjSAMEFRAME_NONE


class PictureMaker:
    """Renders the cell's cameras from a bare state. Use from the thread that made it (it owns a GL context)."""

    def __init__(self, model: mujoco.MjModel):
        self.model, self.data = model, mujoco.MjData(model)
        width, height = model.vis.global_.offwidth, model.vis.global_.offheight
        self._gl = mujoco.GLContext(width, height)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = bool(model.light_castshadow.any())
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = [1, 0, 1, 0, 0, 0]
        self._option.sitegroup[:] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._bottom_up: dict[str, np.ndarray] = {}

    def set_state(self, qpos: np.ndarray, plate_pos_m: np.ndarray) -> None:
        self.data.qpos[:] = qpos
        self.data.mocap_pos[0] = plate_pos_m
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def render(self, camera: str, out: np.ndarray) -> None:
        """Fill `out`, uint8 [H, W, 3] RGB."""
        height, width = out.shape[:2]
        self._camera.fixedcamid = self.model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, self.data, self._option, None, self._camera, everything, self._scene)
        rect = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rect, self._scene, self._context)
        bottom_up = self._bottom_up.setdefault(camera, np.empty_like(out))
        mujoco.mjr_readPixels(bottom_up, None, rect, self._context)
        out[:] = bottom_up[::-1]

    def close(self) -> None:
        self._context.free()
        self._gl.free()
