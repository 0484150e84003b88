"""The FR3's side of its network protocol, in lock-step with the client.

Once a motion has its first command, the world waits for the answer to each state before it moves on. A slow client then
only slows simulated time; a server that runs ahead would report commands late, and the client's planner fails on that.
"""

import time

import numpy as np
from franky_sim import FR3_URDF

from sim.stand_in.kinematics import ArmKinematics
from sim.stand_in.link import ClientLink
from sim.stand_in.motion import CommandTracker, Motion
from sim.stand_in.protocol import (
    BODY_BYTES,
    COMMAND,
    MOVE_REQUEST,
    ROBOT_HEADER,
    ROBOT_PORT,
    ROBOT_VERSION,
    Command,
    Controller,
    Generator,
    MoveStatus,
    RecoveryStatus,
    RobotMode,
    SetterStatus,
    StateBuffer,
    error_bits,
)
from sim.stand_in.scene import T_FLANGE_TCP, T_HAND_EE
from sim.stand_in.world import World

FIRST_PATIENCE_S = 0.02  # a motion's first command is waited for so long after each state
ANSWER_PATIENCE_S = 0.1  # then the state is sent again: the client ignores it, but sees that the link lives
MIN_GAP_S = 0.0008  # between states that nobody has to answer
LOST_AFTER_S = 1.0  # of wall time without a command: the client is frozen
FORCE_FILTER = 0.05  # share of the newest external torque, each millisecond
MIN_EXTERNAL_NM = 0.05
HAND_MASS_KG, HAND_COM_M = 0.73, (-0.01, 0.0, 0.03)


class RobotServer:
    """Call, each millisecond: `serve`, `control`, (world.step), `publish`."""

    def __init__(self, world: World, address: str, collision_reflex: bool = True):
        self.world, self.collision_reflex = world, collision_reflex
        self.state = StateBuffer()
        self.kinematics = ArmKinematics()
        self.tracker = CommandTracker(world, self.kinematics, self.state)
        self.link = ClientLink(address, ROBOT_PORT, ROBOT_HEADER)
        self.motion: Motion | None = None
        self.errors: set[int] = set()
        self.last_reflex: set[int] = set()
        self.user_stopped = False
        self.muted: set[Command] = set()  # requests that get no answer
        self.late_answers = 0
        self._responses: list[tuple[Command, int, int]] = []  # what follows the next state
        self._sent_s = 0.0
        self.next_move_status: int | None = None  # what the next Move is answered with instead
        self._recovery: int | None = None  # request that is answered once the arm rests
        self._command = np.zeros(1, COMMAND)
        self._command_bytes = memoryview(self._command).cast("B")
        self._waiting_since: float | None = None
        self._repeated_at = 0.0
        self._touching = False
        self._limits = np.full((2, 13), np.inf)  # lower, upper: torque 7, force 6
        value = self.state.value
        for matrix in (value.F_T_EE, value.F_T_NE):
            matrix[:] = T_FLANGE_TCP.T.ravel()
        value.m_ee[:], value.F_x_Cee[:] = HAND_MASS_KG, HAND_COM_M
        value.I_ee[[0, 4, 8]] = 0.001, 0.0025, 0.0017
        self._handlers = {
            Command.CONNECT: self._connect, Command.MOVE: self._move, Command.STOP_MOVE: self._stop_move,
            Command.AUTOMATIC_ERROR_RECOVERY: self._recover, Command.GET_ROBOT_MODEL: self._model,
        }  # fmt: skip

    # --- each millisecond --------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer what came by TCP. A client that has gone ends its motion."""
        self.link.serve(self._answer, self.drop)

    def control(self) -> bool:
        """Follow the client's command for the last state. False: it is still due, do not step yet."""
        motion = self.motion
        if motion is None:
            self.tracker.brake()
            return True
        command = self._receive(motion)
        # The client looks for the new modes in one state and answers the next. Going on meanwhile, as fast as a busy
        # machine lets the client answer, would lose the commands between its first and the first in step.
        if command is None and not motion.has_command and self.state.message_id > motion.first_id:
            command = self._receive(motion) if self.link.wait_for_udp(FIRST_PATIENCE_S) else None
        if command is None:
            return not motion.has_command  # before the first command the arm just waits
        motion.has_command = True
        if motion.is_torque:
            self.tracker.apply_torque(command["tau_J_d"])
        if motion.generator != Generator.NONE and not motion.is_torque:
            self.tracker.apply(motion.generator, command)
        if command["torque_finished" if motion.generator == Generator.NONE else "motion_finished"]:
            self._end(RobotMode.IDLE, MoveStatus.SUCCESS)
        return True

    def wait(self) -> None:
        """A command is due: wait a little for it, and serve TCP. A client frozen for long ends as on the robot."""
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = self._repeated_at = now
        ready = self.link.wait_for_udp(0.02)
        self.serve()
        if ready or self.motion is None:
            return
        now = time.monotonic()
        if now - self._repeated_at > ANSWER_PATIENCE_S:
            self._repeated_at = now
            self.late_answers += 1
            self.repeat_state()
        if now - self._waiting_since > LOST_AFTER_S:
            self.inject_reflex(["communication_constraints"])

    def publish(self, message_id: int) -> None:
        """Send the state of this millisecond, then what must follow it."""
        self._measure()
        if self._recovery is not None and self.tracker.is_at_rest:
            self._responses.append((Command.AUTOMATIC_ERROR_RECOVERY, self._recovery, RecoveryStatus.OK))
            self._recovery, self.errors = None, set()
            self._show_modes()
        self.state.pack(message_id)
        if self.link.udp is None:
            return
        # Faster than the wall clock, a client that does not read now would later find its socket full of old states.
        now_s = time.monotonic()
        in_step = self._responses or self.motion is not None
        if in_step or now_s - self._sent_s > MIN_GAP_S:
            self._sent_s = now_s
            self.link.send_state(self.state.bytes)
        while self._responses:
            self._respond(*self._responses.pop(0))

    def repeat_state(self) -> None:
        """The last state again, while the cell stands still: keeps the client's receive timeout from firing."""
        if self.link.udp is not None and self.state.message_id:
            self.link.send_state(self.state.bytes)

    # --- faults ------------------------------------------------------------------------------------------------------

    def inject_reflex(self, names: list[str]) -> None:
        """Abort as the robot's own safety does. Raises ValueError for unknown error names."""
        self.errors = error_bits(names)
        self.last_reflex = set(self.errors)
        self._end(RobotMode.REFLEX, MoveStatus.REFLEX)

    def press_user_stop(self) -> None:
        self.user_stopped = True
        self._end(RobotMode.USER_STOPPED, MoveStatus.USER_STOP)

    def release_user_stop(self) -> None:
        self.user_stopped = False
        self._show_modes()

    def drop(self) -> None:
        """Cut the client off. Its motion ends; the arm brakes."""
        self.link.drop()
        self._end(self._resting_mode(), MoveStatus.ABORTED)
        self._recovery = None
        self._responses.clear()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _answer(self, number: int, request_id: int, body: bytes) -> None:
        if number not in BODY_BYTES or len(body) != BODY_BYTES[Command(number)]:
            raise ConnectionError(f"request {number} with {len(body)} bytes is not of protocol {ROBOT_VERSION}")
        command = Command(number)
        if self.link.udp is None and command != Command.CONNECT:
            raise ConnectionError(f"{command.name} before Connect: there is no channel for states and commands")
        if command in self.muted:
            return
        handler = self._handlers.get(command)
        answer = handler(request_id, body) if handler else self._set(command, body)
        if answer is not None:
            self.link.respond(command, request_id, answer)

    def _connect(self, request_id: int, body: bytes) -> bytes:
        version, port = np.frombuffer(body, "<u2")
        if version == ROBOT_VERSION:
            self.link.open_udp(int(port))
        return bytes([version != ROBOT_VERSION]) + ROBOT_VERSION.to_bytes(2, "little")

    def _model(self, request_id: int, body: bytes) -> bytes:
        return b"\0" + FR3_URDF.encode()

    def _move(self, request_id: int, body: bytes) -> bytes:
        controller, generator = MOVE_REQUEST.unpack(body)[:2]
        refused, self.next_move_status = self.next_move_status, None
        if refused is not None:
            return bytes([refused])
        if self.motion is not None or self._recovery is not None or self.errors or self.user_stopped:
            return bytes([MoveStatus.NOT_POSSIBLE])
        if controller > Controller.EXTERNAL or generator > Generator.NONE:
            return bytes([MoveStatus.INVALID_ARGUMENT])
        if generator == Generator.NONE and controller != Controller.EXTERNAL:
            return bytes([MoveStatus.INVALID_ARGUMENT])
        first_id = self.state.message_id + 1
        self.motion = Motion(request_id, Controller(controller), Generator(generator), first_id)
        self.last_reflex = set()
        self.tracker.begin(self.motion)
        self._show_modes()
        return bytes([MoveStatus.STARTED])

    def _stop_move(self, request_id: int, body: bytes) -> bytes:
        if self.motion is None:
            return bytes([SetterStatus.NOT_POSSIBLE])
        self._end(RobotMode.IDLE, MoveStatus.PREEMPTED)
        return bytes([SetterStatus.OK])

    def _recover(self, request_id: int, body: bytes) -> bytes | None:
        """Answered once the arm rests: a motion that began earlier would start under the old contact forces."""
        if self.user_stopped:
            return bytes([RecoveryStatus.USER_STOP])
        if self.motion is not None:
            return bytes([RecoveryStatus.NOT_POSSIBLE])
        self._recovery = request_id
        self._show_modes(RobotMode.RECOVERY)
        return None

    def _set(self, command: Command, body: bytes) -> bytes:
        """Setters: refused while moving. Guiding and the Cartesian controller's stiffness change nothing here."""
        if self.motion is not None:
            return bytes([SetterStatus.NOT_POSSIBLE])
        numbers = np.frombuffer(body, "<f8") if command != Command.SET_GUIDING_MODE else np.zeros(0)
        if not np.isfinite(numbers).all():
            return bytes([SetterStatus.INVALID_ARGUMENT])
        value = self.state.value
        if command == Command.SET_COLLISION_BEHAVIOR:
            torques, forces = numbers[:28].reshape(4, 7), numbers[28:].reshape(4, 6)
            self._limits = np.hstack([torques[2:], forces[2:]])  # the nominal ones
        elif command == Command.SET_JOINT_IMPEDANCE:
            self.world.set_joint_stiffness(numbers)
        elif command == Command.SET_EE_TO_K:
            value.EE_T_K[:] = numbers
        elif command == Command.SET_NE_TO_EE:
            self._set_ee(numbers)
        elif command == Command.SET_LOAD:
            value.m_load[:], value.F_x_Cload[:], value.I_load[:] = numbers[0], numbers[1:4], numbers[4:]
        return bytes([SetterStatus.OK])

    def _set_ee(self, NE_T_EE: np.ndarray) -> None:
        """Move the end effector's frame relative to the hand's; the commanded pose moves with it."""
        value = self.state.value
        value.NE_T_EE[:] = NE_T_EE
        T = T_FLANGE_TCP @ NE_T_EE.reshape(4, 4).T
        value.F_T_EE[:] = T.T.ravel()
        T_hand_ee = T_HAND_EE @ NE_T_EE.reshape(4, 4).T
        self.kinematics.set_ee(T_hand_ee)
        self.world.set_ee(T_hand_ee)
        self.tracker.pose_from_joints()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _receive(self, motion: Motion) -> np.void | None:
        """The command that answers the last state, before a motion's first one any of its own. None: not yet."""
        due = self.state.message_id if motion.has_command else motion.first_id
        while True:
            try:
                size = self.link.udp.recv_into(self._command_bytes)
            except (BlockingIOError, ConnectionRefusedError):
                return None
            if size == COMMAND.itemsize and self._command[0]["message_id"] >= due:
                self._waiting_since = None
                return self._command[0]

    def _end(self, mode: RobotMode, status: MoveStatus) -> None:
        """Finish the motion, if there is one: first the state that shows it, then the Move request's second answer."""
        if self.motion is not None:
            motion, self.motion = self.motion, None
            self._responses.append((Command.MOVE, motion.request_id, status))
            self._waiting_since = None
            self.tracker.end(motion, aborted=status not in (MoveStatus.SUCCESS, MoveStatus.PREEMPTED))
        self._show_modes(mode)

    def _resting_mode(self) -> RobotMode:
        if self.user_stopped:
            return RobotMode.USER_STOPPED
        return RobotMode.REFLEX if self.errors else RobotMode.IDLE

    def _show_modes(self, mode: RobotMode | None = None) -> None:
        motion = self.motion
        if motion is not None:
            generator = motion.generator
            self.state.set_modes(generator, motion.controller, RobotMode.MOVE)
        else:
            self.state.set_modes(None, Controller.OTHER, self._resting_mode() if mode is None else mode)
        self.state.set_errors(self.errors, self.last_reflex)

    def _respond(self, command: Command, request_id: int, status: int) -> None:
        if command in self.muted:
            return
        try:
            self.link.respond(command, request_id, bytes([status]))
        except ConnectionError:
            self.drop()

    def _measure(self) -> None:
        """Measured values into the state; external torques may end the motion."""
        value, world = self.state.value, self.world
        measured = value.O_T_EE.reshape(4, 4).T
        measured[:3, :3], measured[:3, 3] = world.ee_rot, world.ee_pos_m
        value.q[:] = value.theta[:] = world.q
        value.dq[:] = value.dtheta[:] = world.dq
        value.tau_J[:] = world.servo_torque + world.gravity_torque
        value.elbow[:] = value.elbow_d[:] = value.elbow_c
        value.elbow[0] = world.q[2]
        value.O_T_EE_d[:], value.O_dP_EE_d[:] = value.O_T_EE_c, value.O_dP_EE_c
        # Counted as the robot counts: what it presses with, not what presses on it.
        external = value.tau_ext_hat_filtered
        touched = world.contact_torque
        if world.pull_n.any():
            touched = touched + self.kinematics.jacobian(world.q)[:3].T @ world.pull_n
        external -= FORCE_FILTER * (external + touched)
        if external.max() > MIN_EXTERNAL_NM or external.min() < -MIN_EXTERNAL_NM:
            self._judge_contact(external)
        elif self._touching:
            self._touching = False
            for view in (value.O_F_ext_hat_K, value.K_F_ext_hat_K, value.joint_contact, value.cartesian_contact):
                view[:] = 0.0

    def _judge_contact(self, external: np.ndarray) -> None:
        value = self.state.value
        self._touching = True
        J = self.kinematics.jacobian(self.world.q)
        wrench = np.linalg.solve(J @ J.T + 1e-4 * np.eye(6), J @ external)
        value.O_F_ext_hat_K[:] = wrench
        R = self.world.ee_rot @ value.EE_T_K.reshape(4, 4).T[:3, :3]
        value.K_F_ext_hat_K[:3], value.K_F_ext_hat_K[3:] = R.T @ wrench[:3], R.T @ wrench[3:]
        size = np.abs(np.concatenate([external, wrench]))
        contact, collision = size > self._limits[0], size > self._limits[1]
        value.joint_contact[:], value.cartesian_contact[:] = contact[:7], contact[7:]
        value.joint_collision[:], value.cartesian_collision[:] = collision[:7], collision[7:]
        if self.collision_reflex and self.motion is not None and collision.any():
            self.inject_reflex(["joint_reflex"] * collision[:7].any() + ["cartesian_reflex"] * collision[7:].any())
