"""Ask a running cell what a person would do or see: reset the scene, look at poses, judge success, cause faults."""

from typing import Any

import msgpack
import numpy as np
import zmq

from sim.stand_in.errors import CellGone, ResetRefused


class CellClient:
    """One request at a time; not for several threads. Every method raises CellGone after `timeout_s` without answer."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:5610", timeout_s: float = 5.0):
        self.endpoint, self.timeout_s = endpoint, timeout_s
        self._context = zmq.Context()
        self._socket = self._connect()

    def reset(self, seed: int, force: bool = False) -> dict[str, np.ndarray]:
        """Put cube and plate where `seed` says; returns the poses. The arm stays. Raises ResetRefused."""
        return _arrays(self._ask("reset", seed=seed, force=force))

    def poses(self) -> dict[str, Any]:
        """`cube` (centre), `plate` (centre of the upper side), `tcp`: float64 [4, 4] in base; `gripper_opening_m`;
        `time_s` simulated."""
        return _arrays(self._ask("poses"))

    def success(self) -> bool:
        """The cube lies on the plate, let go of and still."""
        return self._ask("success")

    def stats(self) -> dict[str, Any]:
        """`time_s`, `real_time_factor` (last seconds), `late_answers` (of the robot's client, each 0.1 s of waiting),
        `cameras_dropped`, `motion` (bool), `robot_connected`."""
        return self._ask("stats")

    def inject(self, fault: str, **details: Any) -> None:
        """`reflex` (names=[...]), `user_stop`, `release_user_stop`, `pause` (duration_s), `drop_connections`,
        `freeze_gripper` (frozen), `mute` (commands=[numbers]), `pull` (force_n [3] on the TCP, base frame, until it is
        zero), `move_status` (name in `MoveStatus`: the answer to the next motion). Raises ValueError for what the cell
        does not know."""
        self._ask("inject", fault=fault, details=details)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def __enter__(self) -> "CellClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> zmq.Socket:
        socket = self._context.socket(zmq.REQ)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(self.endpoint)
        return socket

    def _ask(self, request: str, **arguments: Any) -> Any:
        self._socket.send(msgpack.packb({"request": request, **arguments}))
        if not self._socket.poll(int(self.timeout_s * 1000)):
            self._socket.close()  # a REQ socket without its answer is of no more use
            self._socket = self._connect()
            raise CellGone(f"no answer from the cell at {self.endpoint} within {self.timeout_s} s: is it running?")
        answer = msgpack.unpackb(self._socket.recv())
        if "error" not in answer:
            return answer["value"]
        if answer["error"] == ResetRefused.__name__:
            raise ResetRefused(answer["message"])
        raise ValueError(answer["message"])


def _arrays(poses: dict[str, Any]) -> dict[str, Any]:
    return {k: np.array(v).reshape(4, 4) if isinstance(v, list) else v for k, v in poses.items()}
