"""Real-time chunking: plan the next chunk while the last one is still being executed, without a jump between them.

While a chunk is computed the robot executes `delay` more steps of the old one; those are fixed. Each denoising step
pulls the data estimate towards the old chunk's remaining actions, strongly where they are certain to be executed and
less the later they are. Source: Black, Galliker, Levine, Real-Time Execution of Action Chunking Flow Policies,
arXiv 2506.07339, equations 2 to 5. Unlike the ports in circulation this keeps the step factor and the Jacobian.

The paper's time is tau = 1 - t and its velocity is -v.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def guidance_weights(horizon: int, delay: int, executed: int) -> Tensor:
    """float32 [H]: 1 for the first `delay` steps, then decaying until the old chunk ends, `executed` before this one's
    end; 0 after. Raises ValueError unless delay <= horizon - executed."""
    if not 0 <= delay <= horizon - executed:
        raise ValueError(f"delay {delay}: needs 0 <= delay <= horizon - executed steps ({horizon} - {executed})")
    step = torch.arange(horizon, dtype=torch.float32)
    c = ((horizon - executed - step) / (horizon - executed - delay + 1)).clamp(0.0, 1.0)
    decay = c * torch.expm1(c) / (math.e - 1)
    return torch.where(step < delay, torch.ones_like(step), torch.where(step < horizon - executed, decay, 0.0 * step))


def guidance_scale(t: float, maximum: float) -> float:
    """min(beta, (1 - tau) / (tau r^2)) with r^2 = (1 - tau)^2 / (tau^2 + (1 - tau)^2): large at the noise end."""
    tau = 1.0 - t
    if tau <= 0.0 or t <= 0.0:
        return maximum
    return min(maximum, (tau**2 + t**2) / (tau * t))


def guided_denoise(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    num_steps: int,
    previous: Tensor,
    weights: Tensor,
    max_guidance: float = 5.0,
) -> Tensor:
    """Euler steps with guidance. noise, previous float32 [B, H, D] in network units (`previous` aligned with this
    chunk's first step; its value does not matter where the weight is 0); weights [H] or [H, D]."""
    x, weights = noise, weights.to(noise)
    weights = weights[:, None] if weights.ndim == 1 else weights
    for k in range(num_steps):
        t = 1.0 - k / num_steps
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x, torch.full((len(x),), t, device=x.device))
            estimate = x - t * v
            error = (weights * (previous - estimate)).detach()
            (pull,) = torch.autograd.grad(estimate, x, error)
        x = (x - v / num_steps + guidance_scale(t, max_guidance) / num_steps * pull).detach()
    return x
