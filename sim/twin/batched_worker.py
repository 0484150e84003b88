"""Serves the environments of one simulation on a GPU, in the process that owns them: `physics: physx_cuda`.

The same questions and answers as `sim.twin.worker.Worker`, which serves its environments one after another. Here a
policy step is one step of all; environments that are not asked, or whose episode is over, are as they were afterwards.
"""

from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sim.twin.worker import Setup, bind, render_backend, stream_seed

LIBRARY = "libPhysXGpu_64.so"


def require_gpu_physics() -> None:
    """Raises ValueError where PhysX cannot run on a GPU, and says what is missing."""
    import sapien.physx

    instead = "or set physics to physx_cpu"
    library = Path.home() / ".sapien" / "physx" / sapien.physx.version() / LIBRARY
    if not library.is_file():
        raise ValueError(
            f"physics physx_cuda: {library} is missing, where SAPIEN looks for PhysX's GPU library. With network, "
            f"`python -c 'import sapien.physx; sapien.physx.enable_gpu()'` downloads it there (or copy its folder "
            f"from elsewhere); {instead}"
        )
    try:
        sapien.Device("cuda")
    except RuntimeError as error:
        raise ValueError(f"physics physx_cuda: SAPIEN finds no CUDA device ({error}): use a GPU, {instead}") from error


class BatchedWorker:
    """Raises ValueError where GPU physics is wanted and cannot run."""

    def __init__(self, setup: Setup, sim_backend: str = "physx_cuda"):
        if sim_backend == "physx_cuda":
            require_gpu_physics()
        from sim.twin.batched_scene import batched_scene  # imports ManiSkill, which takes seconds

        self.setup, config = setup, setup.config
        self._memory = {name: SharedMemory(name=memory) for name, memory in setup.memory.items()}
        self._pictures = {
            name: np.ndarray(setup.picture_shape, np.uint8, memory.buf) for name, memory in self._memory.items()
        }
        self._sapien_draws = setup.render and config.render != "splat"
        drawing = render_backend() if self._sapien_draws else "none"
        self.scene = batched_scene(setup.num_envs, config, setup.embodiment, sim_backend, drawing)
        self._views = setup.render and config.draws_splats
        self._bound = bind(self.scene, config) if self._views else ([], [])
        n = setup.num_envs
        self._seeds, self._episodes = np.full(n, -1), np.array(setup.begun) - 1
        self._steps = torch.zeros(n, dtype=torch.long, device=self.scene.device)
        self._ended = torch.ones(n, dtype=torch.bool, device=self.scene.device)
        self._instruction = next(iter(setup.embodiment.instructions), "")
        self._watched: int | None = None
        self._frames: list[Any] = []
        self.scene.begin(list(range(n)), [0] * n)  # until they are reset, all are somewhere

    def serve(self, what: str, envs: list[int], arguments: list[Any]) -> dict[int, dict[str, Any]]:
        return getattr(self, "_" + what)(envs, arguments)

    def _reset(self, envs: list[int], starts: list[tuple[int | None, int | None]]) -> dict[int, dict[str, Any]]:
        for env, (seed, episode) in zip(envs, starts, strict=True):
            if seed is None:
                self._episodes[env] = self._episodes[env] + 1 if episode is None else episode
                stream = (self.setup.seed, env // self.setup.group_size)
                seed = stream_seed(stream, int(self._episodes[env]))
            self._seeds[env] = seed
        self.scene.begin(envs, [int(self._seeds[env]) for env in envs])
        self._steps[envs], self._ended[envs] = 0, False
        return {
            env: now | {f"final_{key}": value for key, value in now.items()} | self._names(env)
            for env, now in self._look(envs, final=False).items()
        }

    def _step(self, envs: list[int], chunks: list[np.ndarray]) -> dict[int, dict[str, Any]]:
        n, scene = self.setup.num_envs, self.scene
        actions = torch.zeros(n, len(chunks[0]), 7, dtype=torch.float64, device=scene.device)
        actions[envs] = torch.as_tensor(np.stack(chunks), dtype=torch.float64, device=scene.device)
        asked = torch.zeros_like(self._ended)
        asked[envs] = True
        scene.freeze(~asked | self._ended)
        kept = {key: [] for key in ("reward", "terminated", "truncated", "valid")}
        for action in actions.unbind(1):
            active = scene.active
            if bool(active.any()):
                scene.step(action)
            self._steps += active
            success = scene.now["success"] & active
            truncated = active & ~success & (self._steps >= self.setup.config.max_steps)
            for key, value in zip(kept, (scene.rewards() * active, success, truncated, active), strict=True):
                kept[key].append(value)
            self._ended = self._ended | success | truncated
            self._film(active)
            scene.freeze(success | truncated)
        scene.thaw()
        out = {key: torch.stack(values, 1).cpu().numpy() for key, values in kept.items() if values}
        out = out or {key: np.zeros((n, 0), bool) for key in kept}
        out["reward"] = out["reward"].astype(np.float32)
        out |= {"success": scene.now["success"].cpu().numpy(), "episode_len": self._steps.cpu().numpy()}
        rows = {env: {key: values[env] for key, values in out.items()} | self._names(env) for env in envs}
        for env, now in self._look(envs, final=True).items():
            rows[env] |= {"lost": False} | now | {f"final_{key}": value for key, value in now.items()}
        over = [env for env in envs if bool(self._ended[env])] if self.setup.auto_reset else []
        for pictures in self._pictures.values():
            pictures[0, envs] = pictures[1, envs]
        for env, fresh in self._reset(over, [(None, None)] * len(over)).items() if over else ():
            rows[env] |= {key: fresh[key] for key in ("state", "instruction", "view", "episode")}
        return rows

    def _names(self, env: int) -> dict[str, int]:
        return {"seeds": int(self._seeds[env]), "episode": int(self._episodes[env])}

    def _poses(self, envs: list[int], _: list[Any]) -> dict[int, dict[str, Any]]:
        facts = {key: value.cpu().numpy() for key, value in self.scene.now.items() if key != "stages"}
        stages = {key: value.cpu().numpy() for key, value in self.scene.now["stages"].items()}
        return {
            env: {key: values[env] for key, values in facts.items()}
            | {"success": bool(facts["success"][env]), "stages": {key: bool(v[env]) for key, v in stages.items()}}
            for env in envs
        }

    def _watch(self, envs: list[int], on: list[bool]) -> dict[int, dict[str, Any]]:
        self._watched, self._frames = (envs[0] if on[0] else None), []
        return {envs[0]: {}}

    def _frames_since(self, envs: list[int], _: list[Any]) -> dict[int, dict[str, Any]]:
        taken, self._frames = self._frames, []
        return {envs[0]: {"frames": taken if envs[0] == self._watched else []}}

    def _film(self, active: torch.Tensor) -> None:
        """What the watched environment shows now."""
        if self._watched is None or not bool(active[self._watched]):
            return
        if self._views:
            self._frames.append(self.scene.views(*self._bound, with_rgb=self._sapien_draws)[self._watched])
        elif self._pictures:
            first = min(self._pictures)
            self._frames.append(self.scene.all_pictures("Color")[first][0][self._watched])

    def _look(self, envs: list[int], final: bool) -> dict[int, dict[str, Any]]:
        """What these environments show now; where splats are drawn, the owner draws them from views."""
        states = self.scene.states()
        views = self.scene.views(*self._bound, with_rgb=self._sapien_draws) if self._views else [None] * len(states)
        for name, (pictures,) in self.scene.all_pictures("Color").items() if self._pictures else ():
            self._pictures[name][int(final), envs] = pictures[envs]
        return {env: {"state": states[env], "instruction": self._instruction, "view": views[env]} for env in envs}
