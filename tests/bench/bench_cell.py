"""What the stand-in cell costs: `python -m tests.bench.bench_cell` prints one JSON object. Robot client, cameras and
cell are those in use; only ROS is left out."""

import json
import random
import time
from pathlib import Path

import franky
import numpy as np
import pyrealsense2 as rs

from bridge.config import load
from sim.stand_in.camera_device import StandInCameras
from sim.stand_in.scene import PictureMaker, build_model
from sim.stand_in.server import Cell, CellServerConfig
from tests.sim.stand_in.conftest import RunningCell, start_cell

SECONDS = 4.0


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def share_of(cell: RunningCell, work) -> tuple[float, float]:
    """(cores used by the cell's process, simulated seconds a wall second) while `work` runs."""
    cpu, simulated, wall = cpu_s(cell.process.pid), cell.client.stats()["time_s"], time.monotonic()
    work()
    wall = time.monotonic() - wall
    return (cpu_s(cell.process.pid) - cpu) / wall, (cell.client.stats()["time_s"] - simulated) / wall


def idle_tick_us(config: CellServerConfig) -> float:
    cell = Cell(config)
    begin = time.process_time()
    for _ in range(3000):
        cell.tick()
    spent = time.process_time() - begin
    cell.close()
    return spent / 3000 * 1e6


def picture_ms(config: CellServerConfig) -> dict[str, float]:
    maker, costs = PictureMaker(build_model(config.cell, config.embodiment)), {}
    state = np.array([*config.embodiment.home_joint_pos_rad, 0.04, 0.04, 0.4, 0.2, 0.02, 1, 0, 0, 0])
    for name, camera in config.embodiment.cameras.items():
        out = np.empty((camera.height, camera.width, 3), np.uint8)
        maker.render(name, out)
        begin = time.process_time()
        for _ in range(30):
            maker.set_state(state, np.array([0.45, 0.0, 0.006]))
            maker.render(name, out)
        costs[name] = (time.process_time() - begin) / 30 * 1e3
    maker.close()
    return costs


def stream(robot: franky.Robot, seconds: float) -> None:
    """20 Hz absolute targets, as the arm node sends them."""
    T, begin = np.array(robot.current_cartesian_state.pose.end_effector_pose.matrix), time.monotonic()
    for n in range(round(seconds * 20)):
        goal = T.copy()
        goal[1, 3] += 0.04 * np.sin(2 * np.pi * 0.25 * 0.05 * n)
        robot.move(franky.CartesianMotion(franky.Affine(goal), return_when_finished=False), asynchronous=True)
        time.sleep(max(0.0, begin + 0.05 * (n + 1) - time.monotonic()))
    robot.move(franky.CartesianStopMotion())


def main() -> None:
    address = f"127.{random.randrange(1, 250)}.{random.randrange(250)}.{random.randrange(1, 250)}"
    overrides = [
        f"address={address}",
        "ros=false",
        "control_endpoint=tcp://127.0.0.1:*",
        "frames_endpoint=tcp://127.0.0.1:*",
    ]
    config = load("cell", CellServerConfig, overrides)
    figures = {"idle_tick_us": idle_tick_us(config)}
    figures |= {f"picture_{name}_cpu_ms": ms for name, ms in picture_ms(config).items()}
    cell = start_cell("speed=1.0")
    figures["idle_cores"], figures["idle_factor"] = share_of(cell, lambda: time.sleep(SECONDS))
    robot = cell.robot()
    robot.move(franky.JointMotion(list(config.embodiment.home_joint_pos_rad)))
    figures["moving_cores"], figures["moving_factor"] = share_of(cell, lambda: stream(robot, SECONDS))
    cameras = StandInCameras(cell.frames_endpoint, config.embodiment, config.cell)
    pipelines = []
    for name, camera in config.embodiment.cameras.items():
        request = rs.config()
        request.enable_device(cameras.serials[name])
        request.enable_stream(rs.stream.color, camera.width, camera.height, rs.format.rgb8, 30)
        pipelines.append(rs.pipeline(cameras.context))
        pipelines[-1].start(request)
    with cameras:
        time.sleep(1.0)
        pictures, begin = cameras.pictures, time.process_time()
        figures["cameras_cores_of_cell"], figures["cameras_factor"] = share_of(cell, lambda: stream(robot, SECONDS))
        figures["cameras_client_cores"] = (time.process_time() - begin) / SECONDS
        figures["picture_sets_per_s"] = (cameras.pictures - pictures) / SECONDS
    for pipeline in pipelines:
        pipeline.stop()
    cell.close()
    fast = start_cell("speed=0")
    _, figures["fastest_factor"] = share_of(fast, lambda: time.sleep(2.0))
    fast.close()
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
