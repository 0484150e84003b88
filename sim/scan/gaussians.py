"""The Gaussians under training: parameters with their optimiser, and how a fixed number of them is kept busy.

The number never changes. As in 3D Gaussian Splatting as Markov Chain Monte Carlo (Kheradmand et al. 2024), Gaussians
that have become invisible move to where visible ones are, which are split so that their sum looks as before; noise on
the positions keeps the others exploring. A Gaussian that moves takes over the segment that it moves to.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from sim.splat import reference
from sim.splat.cloud import GaussianCloud, matrix_from_quat_wxyz, multiply_wxyz, quat_wxyz_from_matrix
from sim.splat.harmonics import colours

RATES = {"means_m": 1.6e-4, "quats_wxyz": 1e-3, "log_scales": 5e-3, "opacity_logits": 5e-2, "base": 2.5e-3}
RATES |= {"sheen": 1.25e-4, "background": 1e-2}  # of Adam; positions: a share of the scene's size
INVISIBLE = 0.005  # opacity
MAX_COPIES = 16  # that one Gaussian is split into at once
NOISE = 5e5  # of the positions, in learning rates


class Gaussians:
    """`params`: the cloud's tensors, the coefficients as `base` [G, 1, 3] and `sheen` [G, K - 1, 3], and the colour of
    the `background` [3]; `segment_ids` [G] are not learnt. `size_m`: of the scene, which positions' steps go by."""

    def __init__(self, cloud: GaussianCloud, size_m: float, background: Tensor):
        self.names, self.segment_ids, self.size_m = cloud.segment_names, cloud.segment_ids.clone(), size_m
        parts = {key: getattr(cloud, key) for key in ("means_m", "quats_wxyz", "log_scales", "opacity_logits")}
        parts |= {"base": cloud.sh[:, :1], "sheen": cloud.sh[:, 1:], "background": background.to(cloud.device)}
        self.params = {key: Parameter(part.clone().contiguous()) for key, part in parts.items()}
        fused = cloud.device.type == "cuda"
        groups = [{"params": [param], "lr": RATES[key], "name": key} for key, param in self.params.items()]
        self.optimizer = torch.optim.Adam(groups, eps=1e-15, fused=fused)
        self.set_progress(0.0)

    def set_progress(self, share: float) -> None:
        """Positions' steps shrink to a hundredth over the training."""
        self._mean_rate = RATES["means_m"] * self.size_m * 0.01**share
        self.optimizer.param_groups[0]["lr"] = self._mean_rate

    def cloud(self, degree: int) -> GaussianCloud:
        """With the coefficients up to `degree`; gradients flow to the parameters."""
        p = self.params
        sh = torch.cat([p["base"], p["sheen"][:, : (degree + 1) ** 2 - 1]], dim=1)
        parts = p["means_m"], p["quats_wxyz"], p["log_scales"], p["opacity_logits"]
        return GaussianCloud(*parts, sh, self.segment_ids, self.names)

    def state(self) -> dict[str, object]:
        return {
            "params": {key: param.detach() for key, param in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "segment_ids": self.segment_ids,
        }

    def load(self, state: dict) -> None:
        with torch.no_grad():
            for key, param in self.params.items():
                param.copy_(state["params"][key])
        self.segment_ids.copy_(state["segment_ids"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def explore(self) -> None:
        """Shake positions, along each Gaussian's own shape and the more the less it is seen."""
        p = self.params
        M = matrix_from_quat_wxyz(p["quats_wxyz"]) * p["log_scales"].exp()[:, None, :]
        unseen = torch.sigmoid(-100 * (torch.sigmoid(p["opacity_logits"]) - INVISIBLE))
        noise = torch.randn_like(p["means_m"]) * (unseen * self._mean_rate * NOISE)[:, None]
        p["means_m"].add_((M @ (M.mT @ noise[:, :, None]))[..., 0])

    @torch.no_grad()
    def relocate(self) -> int:
        """Move what is invisible onto what is not, chosen by opacity; how many moved."""
        p = self.params
        opacity = torch.sigmoid(p["opacity_logits"])
        dead = (opacity <= INVISIBLE).nonzero()[:, 0]
        alive = (opacity > INVISIBLE).nonzero()[:, 0]
        if not len(dead) or not len(alive):
            return 0
        chosen = alive[torch.multinomial(opacity[alive], len(dead), replacement=True)]
        parents, counts = chosen.unique(return_counts=True)
        new_opacity, shrink = split(opacity[parents], counts.clamp_max(MAX_COPIES - 1) + 1)
        p["opacity_logits"][parents] = torch.logit(new_opacity.clamp(2 * INVISIBLE, 1 - 1e-6))
        p["log_scales"][parents] += shrink.log()[:, None]
        for key, param in p.items():
            if key == "background":
                continue
            param[dead] = param[chosen]
            for moment in ("exp_avg", "exp_avg_sq"):
                if param in self.optimizer.state:
                    self.optimizer.state[param][moment][torch.cat([parents, dead])] = 0
        self.segment_ids[dead] = self.segment_ids[chosen]
        return len(dead)


def split(opacity: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Opacity and share of the size that each of `copies` (>= 1) Gaussians in one place needs, so that together they
    let as much light through as the one did: at its centre, and on average along a line through it. All [P]."""
    one = 1 - (1 - opacity.double()) ** (1 / copies)
    j = torch.arange(1, MAX_COPIES + 1, device=opacity.device, dtype=torch.float64)
    n = copies.double()[:, None]
    ways = torch.exp(torch.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma((n - j).clamp_min(0) + 1))
    terms = torch.where(j <= n, ways * one[:, None] ** j * (-1.0) ** (j - 1) / j.sqrt(), 0.0)
    return one.to(opacity), (opacity / terms.sum(dim=1)).to(opacity)


def into_camera(cloud: GaussianCloud, T_cam_segment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means [G, 3] and quaternions [G, 4] in the camera's frame, and colours [G, 3] as it sees them."""
    R, t = T_cam_segment[:, :3, :3], T_cam_segment[:, :3, 3]
    eye = -(R.mT @ t[:, :, None])[..., 0][cloud.segment_ids]
    direction = torch.nn.functional.normalize(cloud.means_m - eye, dim=-1)
    quats = multiply_wxyz(quat_wxyz_from_matrix(R)[cloud.segment_ids], cloud.quats_wxyz)
    means = (R[cloud.segment_ids] @ cloud.means_m[:, :, None])[..., 0] + t[cloud.segment_ids]
    return means, quats, colours(cloud.sh, direction)


def draw(cloud: GaussianCloud, T_cam_segment: Tensor, K: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """One picture that gradients flow through: rgb [H, W, 3] over black and alpha [H, W].

    `T_cam_segment` [S, 4, 4]; `K` [3, 3] with pixel centres at half-integers. gsplat on CUDA, else the reference.
    """
    if cloud.device.type != "cuda":
        seen = reference.project(cloud, T_cam_segment, K, width, height)
        return reference.blend(seen, seen.colours, width, height)
    import gsplat  # compiles its kernels on first use

    means, quats, rgb = into_camera(cloud, T_cam_segment)
    camera = torch.eye(4, device=cloud.device)[None], K[None], width, height
    shapes = means, quats, cloud.log_scales.exp(), cloud.opacities
    picture, alpha, _ = gsplat.rasterization(*shapes, rgb, *camera, packed=False)
    return picture[0], alpha[0, :, :, 0]
