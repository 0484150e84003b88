"""What the tests ask of LIBERO, in a process that has its MuJoCo: `python -m tests.sim.libero.scripts SUITE TASKS`.

Prints one JSON line a task.
"""

import json
import sys

import numpy as np
import yaml

from bridge.config import CONFIG_DIR
from bridge.embodiment import Embodiment
from sim.libero.config import LiberoConfig
from sim.libero.scene import CAMERAS
from sim.libero.task import LiberoTask

EMBODIMENT = Embodiment.from_dict(yaml.safe_load((CONFIG_DIR / "embodiment/libero.yaml").read_text()))
HOLD = np.array([0, 0, 0, 0, 0, 0, 1.0])


def made(suite: str, **changes) -> LiberoTask:
    return LiberoConfig(suite=suite, picture_width=128, picture_height=128, **changes).make(EMBODIMENT)


def fulfil(task: LiberoTask) -> None:
    """Hold things over where the goal wants them, and bring doors and knobs to where LIBERO's own starts have them when
    they are open, closed or on. The rest is left to physics."""
    env, taken = task.env._env, []
    for predicate, *names in env.parsed_problem["goal_state"]:
        state = env.object_states_dict[names[0]]
        if predicate in ("on", "in"):
            beside = taken.count(names[1])
            aside_m = [0.0, 0.07 * beside, 0.06] if predicate == "on" else [0.0, 0.05 * beside, 0.02]
            taken.append(names[1])
            at_m = env.object_states_dict[names[1]].get_geom_state()["pos"] + aside_m
            joint = env.get_object(names[0]).joints[-1]
            env.sim.data.set_joint_qpos(joint, np.append(at_m, env.sim.data.get_joint_qpos(joint)[3:]))
            env.sim.data.set_joint_qvel(joint, np.zeros(6))
        else:
            owner = env.get_object(getattr(state, "parent_name", names[0]))
            state.set_joint(np.mean(owner.object_properties["articulation"][f"default_{predicate}_ranges"]))
        env.sim.forward()


def tried(task: LiberoTask, seed: int) -> dict:
    """Ten idle steps, the goal brought about, and idle steps until the episode is over."""
    task.reset(seed)
    pictures = task.pictures()
    idle = [task.step(HOLD)[:2] for _ in range(10)]
    fulfil(task)
    rewards = []
    while not task.ended and len(rewards) < 80:
        rewards.append(task.step(HOLD)[0])
    return {
        "task": task.instruction,
        "idle": [float(sum(reward for reward, _ in idle)), any(success for _, success in idle)],
        "rewards": sum(rewards),
        "success": task.facts.success,
        "steps": task.steps,
        "contrast": {name: float(picture.std()) for name, picture in pictures.items()},
        "shape": [list(picture.shape) for picture in pictures.values()],
    }


def repeated(suite: str) -> list[bool]:
    """Whether another trial of the task, and the same one after other episodes and in another environment, end where
    the first did."""
    task, seen = made(suite), []
    actions = np.random.default_rng(0).uniform(-0.05, 0.05, (6, 7))
    for first, other in ((11, 0), (1, 0), (11, 2)):  # 11 and 1 are trials of one task
        task.reset(first)
        for action in actions:
            task.step(action)
        seen.append((task.env._env.sim.data.qpos.copy(), task.pictures()["wrist"]))
        task = made(suite) if other == 2 else task
        task.reset(other)
        task.step(-HOLD)  # a hand that closes
    return [all(map(np.array_equal, seen[0], later)) for later in seen[1:]]


def beside_liberos_own(suite: str) -> dict:
    """LIBERO's controller and observations as it gives them, from the same start with the same actions."""
    task = made(suite, convention="libero")
    task.reset(20)
    from libero.libero import benchmark
    from libero.libero.envs.env_wrapper import ControlEnv
    from robosuite.utils.transform_utils import quat2axisangle

    names = benchmark.get_benchmark(suite)()
    own = ControlEnv(names.get_task_bddl_file_path(0), use_camera_obs=False, hard_reset=False)
    own.seed(0)
    own.reset()
    own.set_init_state(names.get_task_init_states(0)[2])
    for _ in range(15):
        own.step([0.0] * 6 + [-1.0])
    for action in np.random.default_rng(1).uniform(-1.2, 1.2, (8, 7)):
        task.step(action)
        own.step(np.clip(action, -1, 1))
    seen = own.env._get_observations(force_update=True)  # what `step` gives is a physics step old
    state = np.concatenate(
        [seen["robot0_eef_pos"], quat2axisangle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
    )
    pictures = task.pictures()
    own.sim._render_context_offscreen.gl_ctx.make_current()
    theirs = {name: own.sim.render(128, 128, camera_name=camera)[::-1, ::-1] for name, camera in CAMERAS.items()}
    return {
        "qpos": float(np.abs(task.env._env.sim.data.qpos - own.sim.data.qpos).max()),
        "state": float(np.abs(task.state - state).max()),
        "pictures": [float(np.abs(pictures[name].astype(int) - theirs[name]).mean()) for name in CAMERAS],
    }


def seen_and_foreseen(suite: str) -> dict[str, list[float]]:
    """The plate's middle in each picture, by its pixels and by the contract's camera: four numbers."""
    task = made(suite)
    task.reset(0)
    for _ in range(25):  # the wrist camera over the plate
        to_go = task.facts.goal_pos_m + [-0.05, 0, 0.3] - task.facts.T_base_target[:3, 3]
        task.step(np.append(np.clip(to_go, -0.02, 0.02), [0, 0, 0, 1.0]))
    env, found = task.env._env, {}
    plate = env.get_object("plate_1")
    geoms = [env.sim.model.geom_name2id(name) for name in plate.visual_geoms]
    middle = np.append(task.env._in_base("plate_1") + [0, 0, 0.01], 1.0)
    task.pictures()
    for name, camera in EMBODIMENT.cameras.items():
        drawn = env.sim.render(256, 256, camera_name=CAMERAS[name], segmentation=True)[::-1, ::-1, 1]
        rows, columns = np.nonzero(np.isin(drawn, geoms))
        T_base_cam = (task.facts.T_base_tcp if camera.mount == "tcp" else np.eye(4)) @ camera.matrix
        u, v, w = camera.intrinsics @ (np.linalg.inv(T_base_cam) @ middle)[:3]
        found[name] = [float(columns.mean()), float(rows.mean()), u / w, v / w]
    return found


def main(suite: str, tasks: str) -> None:
    if tasks == "details":
        found = {"repeated": repeated(suite), "cameras": seen_and_foreseen(suite), "tried": tried(made(suite), 0)}
        print(json.dumps(found))
        return
    if tasks == "own":
        print(json.dumps(beside_liberos_own(suite)))
        return
    task = made(suite, scenes=1)
    for number in tasks.split(","):
        print(json.dumps(tried(task, int(number))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
