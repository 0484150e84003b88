"""A fake of `robot.session.Session`: no graph, no arm, no cell; time passes when it is asked to wait."""

import json

from bridge.errors import RobotFault
from robot.scene import SessionError


class ScriptedScene:
    automatic, is_discarded = True, False

    def __init__(self, session):
        self.session = session

    def success(self) -> bool:
        start, end = self.session.script.get(self.session.seed, {}).get("success_s", (1e9, 1e9))
        return start <= self.session.time_s - self.session.begin_s < end

    judge = success

    def time_s(self) -> float:
        return self.session.time_s

    def wants_end(self) -> bool:
        return False


class ScriptedSession:
    """`script[seed]`: success_s (from, to), fault_s, runtime (values of runtime_status), save_error, done_s."""

    def __init__(self, script):
        self.script, self.seed, self.time_s, self.begin_s = script, -1, 0.0, 0.0
        self.calls, self.scene, self.expert_done = [], ScriptedScene(self), None
        self.opened = 0

    def __call__(self, config, embodiment, name, needs, launch_args, log):
        self.launch_args, self.needs = launch_args, needs
        return self

    def __enter__(self):
        self.opened += 1
        return self

    def __exit__(self, *_):
        pass

    def check(self):
        if self.script.get("dead"):
            raise SessionError("cell ended with code 1")

    def check_arm(self):
        self.check()
        if self.time_s - self.begin_s >= self.script.get(self.seed, {}).get("fault_s", 1e9):
            raise RobotFault("reflex")

    def prepare(self, seed):
        self.seed, self.begin_s = seed, self.time_s

    def spin(self, duration_s):
        self.time_s = round(self.time_s + duration_s, 6)
        if self.time_s - self.begin_s >= self.script.get(self.seed, {}).get("done_s", 1e9):
            self.expert_done = True

    def wait(self, ready, timeout_s, what, check=None, every_s=0.1):
        limit_s = self.time_s + timeout_s
        while not ready():
            (check or self.check)()
            assert self.time_s < limit_s
            self.spin(every_s)

    def call(self, service, success=None, timeout_s=None):
        self.calls.append((self.seed, service) if success is None else (self.seed, service, success))
        if service == "save_episode":
            if error := self.script.get(self.seed, {}).get("save_error"):
                raise SessionError(error)
            saved = {"rows": 30, "fps": 30, "max_gap_ms": 33.0 + self.seed, "gaps_over_50ms": 0, "repeated": 1}
            return json.dumps(saved | {"cpu_s": 0.5, "episode": "0"})
        return ""

    def status(self, topic):
        if topic == "recorder_status":
            return {"pending": "0", "send_error": self.script.get("send_error", "")}
        values = {"policy_versions": [1], "tick_jitter_ms": [1.0], "chunk_latency_ms": [20.0], "holds": 0, "errors": 0}
        values |= self.script.get(self.seed, {}).get("runtime", {})
        return {"state": "RUNNING", "reason": ""} | {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
        }

    def record_video(self, camera, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        return self

    def close(self):
        pass
