"""Serves the environments of one simulation on a GPU, in the process that owns them: `physics: physx_cuda`.

The same questions and answers as `sim.twin.worker.Worker`, which serves its environments one after another. Here a
policy step is one step of all; environments that are not asked, or whose episode is over, are as they were afterwards.
"""

from pathlib import Path
from typing import Any

import numpy as np
import sapien.physx
import torch

from sim.twin.batched_scene import batched_scene
from sim.twin.worker import Setup, Worker, bind, render_backend, stream_seed


class BatchedWorker(Worker):
    """All environments of the setup."""

    sim_backend = "physx_cuda"

    @classmethod
    def checked(cls) -> type["BatchedWorker"]:
        """This class. Raises ValueError where PhysX cannot run on a GPU, and says what is missing."""
        instead = "or set physics to physx_cpu"
        library = Path.home() / ".sapien" / "physx" / sapien.physx.version() / "libPhysXGpu_64.so"
        if cls.sim_backend == "physx_cuda" and not library.is_file():
            raise ValueError(
                f"physics physx_cuda: {library} is missing, where SAPIEN looks for PhysX's GPU library. With network, "
                f"`python -c 'import sapien.physx; sapien.physx.enable_gpu()'` downloads it there (or copy its folder "
                f"from elsewhere); {instead}"
            )
        try:
            sapien.Device("cuda" if cls.sim_backend == "physx_cuda" else "cpu")
        except RuntimeError as error:
            raise ValueError(f"physics physx_cuda: SAPIEN finds no CUDA device ({error}); {instead}") from error
        return cls

    def _build(self, setup: Setup) -> None:
        n, config = setup.num_envs, setup.config
        self._sapien_draws = setup.render and config.render != "splat"
        drawing = render_backend() if self._sapien_draws else "none"
        self.scene = batched_scene(n, config, setup.embodiment, self.sim_backend, drawing)
        self._bound = bind(self.scene, config) if setup.render and config.draws_splats else None
        self._instruction = next(iter(setup.embodiment.instructions), "")
        self._seeds, self._episodes = np.zeros(n, int), np.array(setup.begun) - 1
        self._steps = torch.zeros(n, dtype=torch.long, device=self.scene.device)
        self._ended = torch.ones(n, dtype=torch.bool, device=self.scene.device)
        self.scene.begin(list(range(n)), [0] * n)  # until they are reset, all are somewhere

    def serve(self, what: str, envs: list[int], arguments: list[Any]) -> dict[int, dict[str, Any]]:
        if what in ("reset", "step"):
            return (self._begin if what == "reset" else self._run)(envs, arguments)
        return super().serve(what, envs, arguments)

    def _begin(self, envs: list[int], starts: list[tuple[int | None, int | None]]) -> dict[int, dict[str, Any]]:
        for env, (seed, episode) in zip(envs, starts, strict=True):
            if seed is None:
                self._episodes[env] = self._episodes[env] + 1 if episode is None else episode
                seed = stream_seed((self.setup.seed, env // self.setup.group_size), int(self._episodes[env]))
            self._seeds[env] = seed
        self.scene.begin(envs, self._seeds[envs].tolist())
        self._steps[envs], self._ended[envs] = 0, False
        return self._seen(envs, final=False)

    def _run(self, envs: list[int], chunks: list[np.ndarray]) -> dict[int, dict[str, Any]]:
        scene, asked = self.scene, torch.zeros_like(self._ended)
        asked[envs] = True
        actions = torch.zeros(len(asked), *chunks[0].shape, dtype=torch.float64, device=scene.device)
        actions[envs] = torch.tensor(np.stack(chunks), dtype=torch.float64, device=scene.device)
        scene.freeze(~asked | self._ended)
        log = [torch.zeros(4, len(asked), 0, device=scene.device)]
        for action in actions.unbind(1):
            active = scene.active
            if bool(active.any()):
                scene.step(action)
            self._steps += active
            success = scene.now["success"] & active
            truncated = active & ~success & (self._steps >= self.setup.config.max_steps)
            log.append(torch.stack([scene.rewards() * active, success, truncated, active])[..., None])
            self._ended = self._ended | success | truncated
            if self._watched is not None and bool(active[self._watched]):
                self._frames += self._film(self._watched)
            scene.freeze(success | truncated)
        scene.thaw()
        reward, *flags = torch.cat(log, -1).cpu().numpy()
        out = dict(zip(("terminated", "truncated", "valid"), np.array(flags, dtype=bool), strict=True))
        out |= {"reward": reward.astype(np.float32), "success": scene.now["success"].cpu().numpy()}
        out |= {"episode_len": self._steps.cpu().numpy()}
        rows = {env: {"lost": False} | {key: values[env] for key, values in out.items()} for env in envs}
        for env, seen in self._seen(envs, final=True).items():
            rows[env] |= seen
        for pictures in self._pictures.values():
            pictures[0, envs] = pictures[1, envs]
        over = [env for env in envs if self.setup.auto_reset and bool(self._ended[env])]
        for env, fresh in self._begin(over, [(None, None)] * len(over)).items() if over else ():
            rows[env] |= {key: fresh[key] for key in ("state", "instruction", "view", "episode")}
        return rows

    def _poses(self, env: int, _: None) -> dict[str, Any]:
        facts = {key: value[env].cpu().numpy() for key, value in self.scene.now.items() if key != "stages"}
        stages = {key: bool(value[env]) for key, value in self.scene.now["stages"].items()}
        return facts | {"success": bool(facts["success"]), "stages": stages}

    def _film(self, env: int) -> list[Any]:
        if self._bound is not None:
            return [self.scene.views(*self._bound, with_rgb=self._sapien_draws)[env]]
        return [self.scene.shown("Color")[min(self._pictures)][0][env]] if self._pictures else []

    def _seen(self, envs: list[int], final: bool) -> dict[int, dict[str, Any]]:
        """What these environments show now; where splats are drawn, the owner draws them from views."""
        states, views = self.scene.states(), [None] * self.setup.num_envs
        if self._bound is not None:
            views = self.scene.views(*self._bound, with_rgb=self._sapien_draws)
        for name, (pictures,) in self.scene.shown("Color").items() if self._pictures else ():
            self._pictures[name][int(final), envs] = pictures[envs]
        rows = {}
        for env in envs:
            now = {"state": states[env], "instruction": self._instruction, "view": views[env]}
            names = {"seeds": int(self._seeds[env]), "episode": int(self._episodes[env])}
            rows[env] = now | {f"final_{key}": value for key, value in now.items()} | names
        return rows
