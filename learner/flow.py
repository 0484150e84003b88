"""Flow matching as a Markov policy: denoising steps whose transitions have a density.

Time runs from 1 (noise) to 0 (actions): x_t = t * noise + (1 - t) * actions, velocity v = noise - actions. One step
from t to s = t - 1/K draws, element-wise independent,

    next ~ N(w0 * x0 + w1 * x1, std^2),   x0 = x - t v (data estimate),   x1 = x + (1 - t) v (noise estimate)

| method     | w0    | w1                         | std             |
| flow_ode   | 1 - s | s                          | 0               |
| flow_sde   | 1 - s | s - sigma^2 / (2 t K)      | sigma / sqrt(K) |  sigma_i = a sqrt(t_i / (1 - t_max(i,1)))
| flow_cps   | 1 - s | s cos(pi a / 2)            | s sin(pi a / 2) |
| flow_noise | 1 - s | s                          | learned (learner/noise.py) |

flow_sde is Flow-GRPO's discretisation (arXiv 2505.05470), flow_cps is coefficients-preserving sampling (arXiv
2509.05952), flow_noise is ReinFlow (arXiv 2505.22094). All densities are float32, whatever the model computes in.

Shapes: B batch, K steps, H horizon, D model action width, C executed steps, d environment action width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("flow_ode", "flow_sde", "flow_cps", "flow_noise")
LEVELS = ("token", "action", "chunk")
ALIASES = {"reinflow": "flow_noise"}

Velocity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [N, H, D], t [N]) -> velocity [N, H, D] and features [N, H, width] that the noise head and the critic read."""

NoiseStd = Callable[[Tensor], Tensor]
"""features [N, H, width] -> std [N, H, D] of flow_noise."""


@dataclass
class FlowConfig:
    """How a flow policy explores and what its log-probability is."""

    method: str = "flow_sde"  # flow_ode, flow_sde, flow_cps, flow_noise (also: reinflow)
    num_steps: int = 4  # K, denoising steps of a rollout
    noise_level: float = 0.5  # a of flow_sde and flow_cps at the start of training
    noise_level_end: float | None = None  # None: constant
    noise_anneal_steps: int = 400  # training steps from noise_level to noise_level_end
    joint: bool = False  # every step stochastic; else one step of each sample, drawn uniformly
    ignore_last: bool = False  # never draw the last step as the stochastic one
    last_steps: int = 0  # draw it among so many at the end; 0: among all
    hold: int = 1  # policy steps that share one draw of the noise: what is explored are ways, not jitter about one
    temperature: float | None = None  # joint: ratio = (path ratio) ** temperature; None: 1 / (K + 1), RLinf's mean

    def __post_init__(self):
        self.method = canonical_method(self.method)
        if self.num_steps < 1:
            raise ValueError(f"num_steps {self.num_steps}: at least 1")
        if self.ignore_last and self.num_steps < 2:
            raise ValueError("ignore_last needs num_steps of 2 or more: no step would be left")
        if self.hold < 1 or (self.hold > 1 and self.method == "flow_noise"):
            raise ValueError(f"hold {self.hold}: at least 1, and 1 with flow_noise, whose std is each step's own")
        if not 0 <= self.last_steps <= self.num_steps:
            raise ValueError(f"last_steps {self.last_steps}: allowed are 0 to num_steps ({self.num_steps})")
        if self.last_steps and (self.joint or self.ignore_last):
            raise ValueError(
                f"last_steps {self.last_steps} contradicts joint {self.joint}, ignore_last {self.ignore_last}: set "
                "last_steps to 0, or these to false"
            )
        if self.method == "flow_cps" and self.last_steps == 1:
            raise ValueError("last_steps 1 with flow_cps, which adds no noise on its last step: set last_steps to 0")
        for name in ("noise_level", "noise_level_end"):
            level = getattr(self, name)
            if level is not None and not 0.0 <= level <= 1.0:
                raise ValueError(f"{name} {level}: allowed are 0 to 1")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: must be positive")

    @property
    def joint_temperature(self) -> float:
        return 1.0 / (self.num_steps + 1) if self.temperature is None else self.temperature


@dataclass(frozen=True)
class Transition:
    """One step's kernel; every field float32 with the shape of `index`. `std` is None for flow_noise."""

    t: Tensor
    w0: Tensor
    w1: Tensor
    std: Tensor | None


@dataclass(frozen=True)
class Chain:
    """states float32 [B, K+1, H, D] from noise to actions; denoise_index int64 [B, K]; log_prob float32 [B, H, D];
    features [B, K, H, width] of every step (for a critic on the expert)."""

    states: Tensor
    denoise_index: Tensor
    log_prob: Tensor
    features: Tensor


@dataclass(frozen=True)
class ChainScores:
    """log_prob and entropy float32 [B, H, D]; features [B, K or 1, H, width] of the recomputed steps."""

    log_prob: Tensor
    entropy: Tensor
    features: Tensor


def canonical_method(name: str) -> str:
    """Raises ValueError for an unknown method; `reinflow` is the older name of `flow_noise`."""
    method = ALIASES.get(name, name)
    if method not in METHODS:
        raise ValueError(f"noise method {name!r}: allowed are {', '.join((*METHODS, *ALIASES))}")
    return method


def annealed_noise_level(config: FlowConfig, step: int) -> float:
    """Linear from noise_level to noise_level_end over noise_anneal_steps training steps, then constant."""
    if config.noise_level_end is None:
        return config.noise_level
    share = min(max(step, 0) / max(config.noise_anneal_steps, 1), 1.0)
    return config.noise_level + share * (config.noise_level_end - config.noise_level)


def time_grid(num_steps: int, device: torch.device | str | None = None) -> Tensor:
    """float32 [K+1]: 1, 1 - 1/K, ..., 1/K, 0. Rounded once, from float64: time embeddings turn 1e-7 into 1e-4."""
    return (1.0 - torch.arange(num_steps + 1, dtype=torch.float64, device=device) / num_steps).float()


def transition(method: str, num_steps: int, index: int | Tensor, noise_level: float | Tensor) -> Transition:
    """The kernel of step `index` (int, or int64 tensor of any shape) on the K-step grid."""
    method = canonical_method(method)
    index = torch.as_tensor(index)
    grid = time_grid(num_steps, index.device)
    t, s = grid[index], grid[index + 1]
    w0, w1 = 1.0 - s, s
    if method == "flow_ode":
        return Transition(t, w0, w1, torch.zeros_like(t))
    if method == "flow_noise":
        return Transition(t, w0, w1, None)
    if method == "flow_cps":
        angle = torch.as_tensor(noise_level) * (math.pi / 2)
        return Transition(t, w0, s * torch.cos(angle), s * torch.sin(angle))
    # sigma diverges at t = 1; the first step takes the second grid time instead (0 when there is one step only).
    capped = grid[torch.clamp(index, min=1)]
    sigma = noise_level * torch.sqrt(t / (1.0 - capped))
    return Transition(t, w0, w1 - sigma**2 / (2 * t * num_steps), sigma / math.sqrt(num_steps))


def step_mean(x: Tensor, v: Tensor, step: Transition) -> Tensor:
    """Mean of the next state. x, v float32 [B, H, D]; the step's fields are scalars or [B]."""
    t, w0, w1 = (_over_actions(field) for field in (step.t, step.w0, step.w1))
    return w0 * (x - t * v) + w1 * (x + (1.0 - t) * v)


def gaussian_log_prob(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Element-wise log density in float32; elements with std 0 contribute exactly 0, in value and gradient."""
    value, mean, std = torch.broadcast_tensors(value.float(), mean.float(), std.float())
    random = std > 0
    safe = torch.where(random, std, torch.ones_like(std))
    log_prob = -0.5 * ((value - mean) / safe) ** 2 - torch.log(safe) - 0.5 * math.log(2 * math.pi)
    return torch.where(random, log_prob, torch.zeros_like(log_prob))


def held(noise: Tensor, hold: int) -> Tensor:
    """[..., H, D] with every `hold`-th draw kept for so many policy steps."""
    if hold == 1:
        return noise
    return noise[..., ::hold, :].repeat_interleave(hold, -2)[..., : noise.shape[-2], :]


def held_log_prob(value: Tensor, mean: Tensor, std: Tensor, hold: int) -> Tensor:
    """`gaussian_log_prob` of [B, H, D] where `hold` policy steps share a draw: the density of their mean deviation, at
    the first of them; 0 at the others. What the noise cannot do has no density and is left out, as the denoising steps
    without noise are."""
    if hold == 1:
        return gaussian_log_prob(value, mean, std)
    value, mean, std = torch.broadcast_tensors(value.float(), mean.float(), std.float())
    deviation = torch.stack([part.mean(-2) for part in (value - mean).split(hold, -2)], -2)
    firsts = gaussian_log_prob(deviation, torch.zeros_like(deviation), std[..., ::hold, :])
    log_prob = torch.zeros_like(value)
    log_prob[..., ::hold, :] = firsts
    return log_prob


def first_steps(std: Tensor, hold: int) -> Tensor:
    """[B, H, D] with 0 at the policy steps that have no draw of their own."""
    first = torch.arange(std.shape[-2], device=std.device) % hold == 0
    return std * first[:, None]


def gaussian_entropy(std: Tensor) -> Tensor:
    """Element-wise 0.5 ln(2 pi e std^2) in float32; 0 where std is 0."""
    std = std.float()
    random = std > 0
    safe = torch.where(random, std, torch.ones_like(std))
    return torch.where(random, torch.log(safe) + 0.5 * math.log(2 * math.pi * math.e), torch.zeros_like(std))


def aggregate(log_prob: Tensor, level: str) -> Tensor:
    """[B, C, d] -> token level [B, C, d], action level [B, C], chunk level [B] (sums)."""
    if level not in LEVELS:
        raise ValueError(f"log-probability level {level!r}: allowed are {', '.join(LEVELS)}")
    if level == "token":
        return log_prob
    return log_prob.sum(-1) if level == "action" else log_prob.sum((-1, -2))


def draw_denoise_index(config: FlowConfig, batch: int, generator: torch.Generator | None, device) -> Tensor:
    """int64 [B, K]: 0..K-1 in joint mode, else one uniform step of each sample, repeated."""
    steps = config.num_steps
    if config.joint:
        return torch.arange(steps, device=device).expand(batch, steps).clone()
    first = steps - config.last_steps if config.last_steps else 0
    last = steps - 1 if config.ignore_last else steps
    drawn = torch.randint(first, last, (batch, 1), generator=generator, device=_drawing_device(generator, device))
    return drawn.to(device).expand(batch, steps).clone()


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | None, device) -> Tensor:
    """float32 N(0, 1), drawn where the generator lives, so that a CPU seed gives one chunk on every device."""
    return torch.randn(shape, generator=generator, device=_drawing_device(generator, device)).to(device)


def sample_chain(
    velocity: Velocity,
    noise: Tensor,
    config: FlowConfig,
    noise_level: float | Tensor,
    noise_std: NoiseStd | None = None,
    generator: torch.Generator | None = None,
) -> Chain:
    """Denoise `noise` float32 [B, H, D] with exploration. Steps that the drawn index does not name are Euler steps."""
    batch, device = noise.shape[0], noise.device
    index = draw_denoise_index(config, batch, generator, device)
    step_noise = draw_noise((config.num_steps, *noise.shape), generator, device)
    return chain_from_noise(velocity, noise, step_noise, index, config, noise_level, noise_std)


def chain_from_noise(
    velocity: Velocity,
    noise: Tensor,
    step_noise: Tensor,
    index: Tensor,
    config: FlowConfig,
    noise_level: float | Tensor,
    noise_std: NoiseStd | None = None,
) -> Chain:
    """`sample_chain` with its randomness drawn beforehand (what a CUDA graph needs): step_noise [K, B, H, D]."""
    states, features, log_probs = [noise], [], []
    for k in range(config.num_steps):
        x = states[-1]
        v, feature = velocity(x, torch.full((len(x),), 1.0 - k / config.num_steps, device=x.device))
        chosen = (index == k).any(dim=1)
        step_index = torch.full_like(index[:, 0], k)
        mean, std = _kernel(x, v.float(), feature, step_index, chosen, config, noise_level, noise_std)
        states.append(mean + std * held(step_noise[k], config.hold))
        features.append(feature)
        log_probs.append(held_log_prob(states[-1], mean, std, config.hold))
    log_prob = torch.stack(log_probs, dim=1).sum(1)
    if config.joint:
        log_prob = config.joint_temperature * (log_prob + _initial_log_prob(noise))
    return Chain(torch.stack(states, dim=1), index, log_prob, torch.stack(features, dim=1))


def score_chain(
    velocity: Velocity,
    states: Tensor,
    denoise_index: Tensor,
    config: FlowConfig,
    noise_level: float | Tensor,
    noise_std: NoiseStd | None = None,
) -> ChainScores:
    """Log-probability and entropy of a stored chain under the current velocity, with gradient.

    One velocity call: over B samples (single step), or over B*K with sample b at rows b*K .. b*K + K-1 (joint).
    """
    batch, steps = denoise_index.shape
    index = denoise_index if config.joint else denoise_index[:, :1]
    rows = torch.arange(batch, device=states.device)[:, None]
    x = states[rows, index].flatten(0, 1)
    following = states[rows, index + 1].flatten(0, 1)
    flat_index = index.flatten()
    v, feature = velocity(x, time_grid(steps, states.device)[flat_index])
    chosen = torch.ones_like(flat_index, dtype=torch.bool)
    mean, std = _kernel(x, v.float(), feature, flat_index, chosen, config, noise_level, noise_std)
    shape = (batch, index.shape[1], *x.shape[1:])
    log_prob = held_log_prob(following, mean, std, config.hold).view(shape).sum(1)
    random = std.expand_as(x) if config.hold == 1 else first_steps(std.expand_as(x), config.hold)
    entropy = gaussian_entropy(random).view(shape).sum(1)
    if config.joint:
        initial_entropy = 0.5 * math.log(2 * math.pi * math.e)
        log_prob = config.joint_temperature * (log_prob + _initial_log_prob(states[:, 0]))
        entropy = (entropy + initial_entropy) / (steps + 1)
    return ChainScores(log_prob, entropy, feature.view(batch, index.shape[1], *feature.shape[1:]))


def denoise(velocity: Velocity, noise: Tensor, num_steps: int) -> Tensor:
    """Forward Euler from noise to actions, no exploration: what is deployed. float32 [B, H, D]."""
    x = noise
    for k in range(num_steps):
        t = torch.full((x.shape[0],), 1.0 - k / num_steps, device=x.device)
        x = x - velocity(x, t)[0].float() / num_steps
    return x


def sft_pair(actions: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Flow-matching regression: noisy actions x_t and the target velocity. actions, noise [B, H, D]; t [B]."""
    share = t[:, None, None]
    return share * noise + (1.0 - share) * actions, noise - actions


def sample_sft_time(batch: int, generator: torch.Generator | None, device) -> Tensor:
    """float32 [B], 0.001 + 0.999 Beta(1.5, 1) (openpi's): Beta(a, 1) is u ** (1 / a)."""
    u = torch.rand(batch, generator=generator, device=_drawing_device(generator, device)).to(device)
    return 0.001 + 0.999 * u ** (1.0 / 1.5)


def masked_sft_loss(v: Tensor, target: Tensor, is_pad: Tensor, action_dims: int) -> Tensor:
    """Mean squared error over the first `action_dims` dims and the steps inside the episode. v, target [B, H, D];
    is_pad bool [B, H]."""
    error = (v.float() - target)[..., :action_dims].square().mean(-1)
    inside = (~is_pad).float()
    return (error * inside).sum() / inside.sum().clamp(min=1.0)


def _kernel(x, v, feature, index, chosen, config, noise_level, noise_std) -> tuple[Tensor, Tensor]:
    """Mean and std of the next state, both [N, H, D]: the method's kernel where `chosen` [N], the ODE's elsewhere."""
    ode = transition("flow_ode", config.num_steps, index, 0.0)
    if config.method == "flow_noise":
        if noise_std is None:
            raise ValueError("flow_noise needs a noise head (learner.noise.NoiseHead)")
        std = noise_std(feature).float()
        return step_mean(x, v, ode), torch.where(_over_actions(chosen), std, torch.zeros_like(std))
    step = transition(config.method, config.num_steps, index, noise_level)
    assert step.std is not None
    w1 = torch.where(chosen, step.w1, ode.w1)
    std = torch.where(chosen, step.std, torch.zeros_like(step.std))
    return step_mean(x, v, Transition(step.t, step.w0, w1, std)), _over_actions(std).expand_as(x)


def _initial_log_prob(noise: Tensor) -> Tensor:
    return gaussian_log_prob(noise, torch.zeros_like(noise), torch.ones_like(noise))


def _over_actions(field: Tensor) -> Tensor:
    return field[..., None, None]


def _drawing_device(generator: torch.Generator | None, device):
    return device if generator is None else generator.device
