"""The Franka hand's side of its network protocol. It grasps by contact: fingers close and press."""

from dataclasses import dataclass

from sim.stand_in.link import ClientLink
from sim.stand_in.protocol import (
    GRASP_REQUEST,
    GRIPPER_HEADER,
    GRIPPER_MOVE_REQUEST,
    GRIPPER_PORT,
    GRIPPER_STATE,
    GRIPPER_VERSION,
    GripperCommand,
    GripperStatus,
)
from sim.stand_in.world import World

MAX_WIDTH_M = 0.08
MAX_SPEED_M_S = 0.1  # of the width: each finger moves at half of it
MOVE_FORCE_N, MAX_FORCE_N = 20.0, 70.0
ARRIVED_M = 0.0005
SQUEEZE_M = -0.2  # a width no object has: the drive presses with all the force it is allowed
STILL_SHARE, STILL_TICKS = 0.1, 60  # of the commanded speed
STATE_EVERY_MS = 10
TEMPERATURE_C = 30
STEP_S = 0.001


@dataclass
class _Goal:
    """`epsilon_m` is (inner, outer) for a grasp, None for a move."""

    command: GripperCommand
    request_id: int
    width_m: float
    speed_m_s: float
    epsilon_m: tuple[float, float] | None = None
    still_ticks: int = 0


class GripperServer:
    """Call, each millisecond: `serve`, `control`, (world.step), `publish`."""

    def __init__(self, world: World, address: str):
        self.world = world
        self.link = ClientLink(address, GRIPPER_PORT, GRIPPER_HEADER)
        self.frozen = False  # a fault: fingers stand still and requests stay without an answer
        self._goal: _Goal | None = None
        self._grasp: _Goal | None = None  # the last one that held something
        self._responses: list[tuple[int, int, GripperStatus]] = []
        self._state = b""  # the last one sent

    @property
    def is_grasped(self) -> bool:
        return self._grasp is not None and self._within(self._grasp)

    def serve(self) -> None:
        """Answer what came by TCP. A client that has gone stops the fingers."""
        self.link.serve(self._accept, self.drop)

    def control(self) -> None:
        """Move the width's target on, and see whether the goal is reached."""
        goal = self._goal
        if goal is None or self.frozen:
            return
        target, step = self.world.width_target, goal.speed_m_s * STEP_S
        towards = goal.width_m if goal.epsilon_m is None else SQUEEZE_M
        target[0] += min(max(towards - target[0], -step), step)
        speed = abs(self.world.finger_speeds_m_s[0] + self.world.finger_speeds_m_s[1])
        goal.still_ticks = goal.still_ticks + 1 if speed < STILL_SHARE * goal.speed_m_s else 0
        arrived = goal.epsilon_m is None and abs(self.world.width_m - goal.width_m) < ARRIVED_M
        if arrived or goal.still_ticks > STILL_TICKS:
            self._finish(goal, arrived)

    def publish(self, message_id: int) -> None:
        """Send the state, and the answers that are due."""
        if self.link.udp is not None and message_id % STATE_EVERY_MS == 0:
            width = min(max(self.world.width_m, 0.0), MAX_WIDTH_M)
            state = GRIPPER_STATE.pack(message_id & 0xFFFFFFFF, width, MAX_WIDTH_M, self.is_grasped, TEMPERATURE_C)
            self.link.send_state(state)
            self._state = state
        while self._responses:
            command, request_id, status = self._responses.pop(0)
            try:
                self.link.respond(command, request_id, int(status).to_bytes(2, "little"))
            except ConnectionError:
                self.drop()

    def repeat_state(self) -> None:
        """The last state again, while the cell stands still: keeps the client's receive timeout from firing."""
        if self.link.udp is not None and self._state:
            self.link.send_state(self._state)

    def drop(self) -> None:
        """Cut the client off; the fingers stay as they are."""
        self.link.drop()
        self._halt()
        self._responses.clear()  # also the answer to what was halted: nobody is there to hear it

    def _accept(self, number: int, request_id: int, body: bytes) -> None:
        if number == GripperCommand.CONNECT and len(body) == 4:
            version, port = int.from_bytes(body[:2], "little"), int.from_bytes(body[2:], "little")
            self.link.open_udp(port)
            wrong = GripperStatus.FAIL if version != GRIPPER_VERSION else GripperStatus.OK
            answer = int(wrong).to_bytes(2, "little") + GRIPPER_VERSION.to_bytes(2, "little")
            self.link.respond(number, request_id, answer)
        elif self.frozen:
            return
        elif number == GripperCommand.STOP and not body:
            self._halt()
            self._responses.append((number, request_id, GripperStatus.OK))
        elif number == GripperCommand.HOMING and not body:
            self._begin(_Goal(GripperCommand.HOMING, request_id, MAX_WIDTH_M, MAX_SPEED_M_S), MOVE_FORCE_N)
        elif number == GripperCommand.MOVE and len(body) == GRIPPER_MOVE_REQUEST.size:
            width, speed = GRIPPER_MOVE_REQUEST.unpack(body)
            self._begin(_Goal(GripperCommand.MOVE, request_id, width, speed), MOVE_FORCE_N)
        elif number == GripperCommand.GRASP and len(body) == GRASP_REQUEST.size:
            width, inner, outer, speed, force = GRASP_REQUEST.unpack(body)
            self._begin(_Goal(GripperCommand.GRASP, request_id, width, speed, (inner, outer)), force)
        else:
            raise ConnectionError(f"request {number} with {len(body)} bytes is not of protocol {GRIPPER_VERSION}")

    def _begin(self, goal: _Goal, force_n: float) -> None:
        self._halt()
        if not (0.0 <= goal.width_m <= MAX_WIDTH_M and goal.speed_m_s > 0 and force_n >= 0):  # also refuses NaN
            self._responses.append((goal.command, goal.request_id, GripperStatus.FAIL))
            return
        goal.speed_m_s = min(goal.speed_m_s, MAX_SPEED_M_S)
        self._grasp = None
        self._goal = goal
        self.world.set_hand_force(min(force_n, MAX_FORCE_N))
        self.world.width_target[0] = self.world.width_m

    def _finish(self, goal: _Goal, arrived: bool) -> None:
        self._goal = None
        if goal.epsilon_m is None:
            status = GripperStatus.OK if arrived else GripperStatus.UNSUCCESSFUL
        elif self._within(goal):
            self._grasp, status = goal, GripperStatus.OK
            self.world.width_target[0] = SQUEEZE_M  # go on pressing
        else:
            status = GripperStatus.UNSUCCESSFUL
        self._responses.append((goal.command, goal.request_id, status))

    def _halt(self) -> None:
        """Stop where the fingers are, and answer the request that this cuts off."""
        if self._goal is not None:
            self._responses.append((self._goal.command, self._goal.request_id, GripperStatus.ABORTED))
            self._goal = None
            self.world.width_target[0] = self.world.width_m

    def _within(self, goal: _Goal) -> bool:
        assert goal.epsilon_m is not None
        inner, outer = goal.epsilon_m
        return goal.width_m - inner < self.world.width_m < goal.width_m + outer
