"""SmallPolicy: the pi0.5 shape at a few million parameters, trained from scratch on a CPU.

Prefix: keypoints of each camera, the instruction's words, the state, and the sub-goal; suffix: the action chunk,
denoised by an expert with weights of its own (learner/experts.py) along learner/flow.py's path.

What makes it learn from a hundred demonstrations is the sub-goal: where the TCP will be when the gripper next opens or
closes. Demonstrations contain that answer for every one of their pictures, so the eyes get a direct regression target
(`sft_loss` adds its error), and the expert reads the predicted point as a vector from where the TCP is now.

B batch, H horizon, C executed steps, K denoising steps, M noise draws for each demonstration.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge.embodiment import Embodiment
from bridge.pose import ACTION_DIM, STATE_DIM
from learner import flow
from learner.experts import ActionExpert, KeysValues, PrefixLayer
from learner.flow import FlowConfig
from learner.noise import NoiseConfig, NoiseHead
from learner.normalization import MIN_HALF_RANGE_ACTION, MIN_HALF_RANGE_STATE, Normalizer, Quantiles
from learner.policy import ObservationBatch, Sample, Scores, SftBatch
from learner.prompt import PADDING, hashed_words
from learner.value_head import ValueHead
from learner.vision import ColourJitter, KeypointEncoder, area_resize

GOAL_SCALE_M, FINE_SCALE_M = 0.1, 0.02  # a TCP-to-goal vector of this length is 1 in the network


@dataclass
class SmallPolicyConfig:
    name: str = "small"
    image_height: int = 96
    image_width: int = 128
    conv_channels: int = 32
    keypoints: int = 32  # heat maps of each camera
    tokens_per_camera: int = 3
    width: int = 128  # of both transformers
    heads: int = 4
    layers: int = 3
    word_table: int = 1024
    max_words: int = 16
    horizon: int = 16  # H, policy steps
    num_action_chunks: int = 8  # C, executed before the next observation is asked
    infer_steps: int = 5  # K of deterministic inference
    # Loud, and on the last step alone: a well-trained policy takes back what moved it at earlier ones, and what is
    # credited must outweigh what the initial noise does uncredited (docs/training.md).
    flow: FlowConfig = field(default_factory=lambda: FlowConfig(num_steps=5, noise_level=0.6, last_steps=1))
    noise: NoiseConfig = field(default_factory=NoiseConfig)  # read by flow.method=flow_noise only
    noise_draws: int = 2  # M; a demonstration's picture is encoded once for M points of its flow
    goal_weight: float = 0.5  # share of the sub-goal's error in the loss
    jitter: float = 0.2  # colour augmentation of demonstrations
    shift_px: int = 1  # random shift of demonstrations' pictures, at the policy's resolution
    state_noise: float = 0.01  # added to demonstrations' states, in normalised units

    pads_pictures = False

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.image_height, self.image_width

    def __post_init__(self):
        if not 1 <= self.num_action_chunks <= self.horizon:
            raise ValueError(f"num_action_chunks {self.num_action_chunks}: allowed are 1 to horizon ({self.horizon})")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width}: must be a multiple of 2 * heads ({2 * self.heads})")


@dataclass
class Statistics:
    """What the data looked like: quantiles of state and of policy-rate action, contract units."""

    state: Quantiles
    action: Quantiles

    def to_dict(self) -> dict[str, Any]:
        return {"state": self.state.to_dict(), "action": self.action.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Statistics":
        return cls(Quantiles.from_dict(data["state"]), Quantiles.from_dict(data["action"]))


@dataclass
class Prepared:
    """`views` of each camera: uint8 pictures [B, h, w, 3], or with frozen eyes what they see: float32 [B, features]."""

    views: dict[str, Tensor]
    state: Tensor  # [B, 7], contract units
    words: Tensor  # int64 [B, max_words]

    def __len__(self) -> int:
        return len(self.state)

    def __getitem__(self, rows: Tensor) -> "Prepared":
        return Prepared({name: view[rows] for name, view in self.views.items()}, self.state[rows], self.words[rows])

    @classmethod
    def concatenate(cls, parts: list["Prepared"]) -> "Prepared":
        views = {name: torch.cat([part.views[name] for part in parts]) for name in parts[0].views}
        return cls(views, torch.cat([part.state for part in parts]), torch.cat([part.words for part in parts]))


@dataclass
class Prefix:
    keys_values: KeysValues
    mask: Tensor  # bool [B, P]
    pooled: Tensor  # [B, width], mean of the readable tokens
    goal_m: Tensor  # [B, 3], predicted TCP position at the next gripper event, relative to the TCP now
    condition: Tensor  # [B, width], goal and state for the expert's norms


class SmallPolicy(nn.Module):
    """Implements learner.policy.Policy. Built by `learner.load` from a bundle or by Stage I from statistics."""

    pads_pictures = SmallPolicyConfig.pads_pictures

    def __init__(self, config: SmallPolicyConfig, embodiment: Embodiment, statistics: Statistics):
        super().__init__()
        self.config, self.embodiment, self.statistics = config, embodiment, statistics
        self.horizon, self.num_action_chunks = config.horizon, config.num_action_chunks
        self.noise_level = config.flow.noise_level  # Stage II anneals it
        self.eyes_frozen = False
        self.cameras = sorted(embodiment.cameras)
        self.normalize_state = Normalizer(statistics.state, MIN_HALF_RANGE_STATE)
        self.normalize_action = Normalizer(statistics.action, MIN_HALF_RANGE_ACTION)
        width, size = config.width, (config.image_height, config.image_width)
        self.eyes = nn.ModuleDict(
            {name: KeypointEncoder(config.conv_channels, config.keypoints, size) for name in self.cameras}
        )
        features = self.eyes[self.cameras[0]].num_features
        self.view_in = nn.ModuleDict(
            {name: nn.Linear(features, config.tokens_per_camera * width) for name in self.cameras}
        )
        self.goal_head = nn.Sequential(
            nn.Linear(features * len(self.cameras) + STATE_DIM + width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, 3),
        )
        self.goal_in, self.state_in = nn.Linear(6, width), nn.Linear(STATE_DIM, width)
        self.condition_in = nn.Linear(6 + STATE_DIM, width)
        self.word_table = nn.Embedding(config.word_table, width, padding_idx=PADDING)
        self.kind = nn.Parameter(0.02 * torch.randn(len(self.cameras) * config.tokens_per_camera + 2, width))
        self.word_position = nn.Parameter(0.02 * torch.randn(config.max_words, width))
        self.prefix_layers = nn.ModuleList(PrefixLayer(width, config.heads) for _ in range(config.layers))
        self.expert = ActionExpert(width, config.heads, config.layers, config.horizon, ACTION_DIM)
        self.value_head = ValueHead(width, (2 * width, width))
        self.noise_head = NoiseHead(width, ACTION_DIM, config.noise) if config.flow.method == "flow_noise" else None

    @property
    def device(self) -> torch.device:
        return self.kind.device

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.config.picture_size

    def set_noise_level(self, level: float) -> None:
        """Annealing (learner.flow.annealed_noise_level)."""
        self.noise_level = level

    def freeze_eyes(self) -> None:
        """Stage II: the convolutions stay as they are, and `prepare` already runs them."""
        self.eyes.requires_grad_(False)
        self.eyes_frozen = True

    # -- the policy's two halves -------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, observation: ObservationBatch) -> Prepared:
        prepared = self._model_inputs(observation)
        if self.eyes_frozen:
            prepared.views = {name: self.eyes[name](view) for name, view in prepared.views.items()}
        return prepared

    @torch.no_grad()
    def infer(self, observation: ObservationBatch, generator: torch.Generator | None = None) -> Tensor:
        prefix = self._prefix(self.prepare(observation))
        noise = flow.draw_noise((len(observation), self.horizon, ACTION_DIM), generator, self.device)
        actions = flow.denoise(self._velocity(prefix), noise, self.config.infer_steps)
        return self.normalize_action.inverse(actions).cpu()

    @torch.no_grad()
    def sample(self, prepared: Prepared, generator: torch.Generator | None = None) -> Sample:
        prefix = self._prefix(prepared)
        noise = flow.draw_noise((len(prepared), self.horizon, ACTION_DIM), generator, self.device)
        chain = flow.sample_chain(
            self._velocity(prefix), noise, self.config.flow, self.noise_level, self.noise_head, generator
        )
        return Sample(
            actions=self.normalize_action.inverse(chain.states[:, -1]),
            chain=chain.states,
            denoise_index=chain.denoise_index,
            log_prob=chain.log_prob[:, : self.num_action_chunks],
            value=self._value(prefix),
            prepared=prepared,
        )

    def scores(self, prepared: Prepared, chain: Tensor, denoise_index: Tensor) -> Scores:
        prefix = self._prefix(prepared)
        scored = flow.score_chain(
            self._velocity(prefix), chain, denoise_index, self.config.flow, self.noise_level, self.noise_head
        )
        entropy = scored.entropy[:, : self.num_action_chunks].mean((1, 2))
        return Scores(scored.log_prob[:, : self.num_action_chunks], entropy, self._value(prefix))

    @torch.no_grad()
    def value(self, prepared: Prepared) -> Tensor:
        """float32 [B]."""
        return self._value(self._prefix(prepared))

    def sft_loss(self, batch: SftBatch, generator: torch.Generator | None = None) -> Tensor:
        return self.sft_terms(batch, generator)["loss"]

    def sft_terms(self, batch: SftBatch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss and what it is made of: the flow-matching error over real dims inside the episode, and the
        sub-goal's error (0 where none is known)."""
        draws = self.config.noise_draws
        jitter = ColourJitter(self.config.jitter, self.config.shift_px, generator)
        inputs = self._model_inputs(batch.observation)
        state_noise = self.config.state_noise * flow.draw_noise(tuple(inputs.state.shape), generator, self.device)
        inputs.state = inputs.state + state_noise * self.normalize_state.half_range
        prefix = self._prefix(inputs, jitter)
        actions = self.normalize_action(batch.actions.to(self.device)).repeat_interleave(draws, 0)
        noise = flow.draw_noise(tuple(actions.shape), generator, self.device)
        t = flow.sample_sft_time(len(actions), generator, self.device)
        x, target = flow.sft_pair(actions, noise, t)
        v, _ = self._velocity(prefix)(x, t)
        is_pad = batch.is_pad.to(self.device).repeat_interleave(draws, 0)
        flow_loss = flow.masked_sft_loss(v, target, is_pad, ACTION_DIM)
        if batch.goal_m is None:
            return {"loss": flow_loss, "flow_loss": flow_loss, "goal_loss": torch.zeros_like(flow_loss)}
        goal_m = batch.goal_m.to(self.device)
        known = torch.isfinite(goal_m).all(-1, keepdim=True)
        away_m = torch.where(known, goal_m - batch.observation.state[:, :3].to(self.device), 0.0)
        # Scaled by distance: a centimetre matters at the cube and not across the table.
        tolerance_m = 0.02 + 0.2 * away_m.norm(dim=-1, keepdim=True)
        error = F.smooth_l1_loss(prefix.goal_m / tolerance_m, away_m / tolerance_m, reduction="none", beta=0.5)
        goal_loss = (error * known).sum() / (3 * known.sum()).clamp(min=1)
        loss = flow_loss + self.config.goal_weight * goal_loss
        return {"loss": loss, "flow_loss": flow_loss, "goal_loss": goal_loss}

    # -- parts -------------------------------------------------------------------------------------------------------

    def _model_inputs(self, observation: ObservationBatch) -> Prepared:
        """Pictures at the policy's size, words hashed; still before the eyes."""
        if missing := [name for name in self.cameras if name not in observation.images]:
            raise ValueError(f"observation lacks cameras {missing}; it has {sorted(observation.images)}")
        views = {}
        for name in self.cameras:
            pictures = area_resize(observation.images[name].cpu().numpy(), self.picture_size)
            views[name] = torch.from_numpy(pictures).to(self.device)
        words = hashed_words(observation.instruction, self.config.word_table, self.config.max_words)
        return Prepared(views, observation.state.to(self.device), words.to(self.device))

    def _prefix(self, prepared: Prepared, jitter: ColourJitter | None = None) -> Prefix:
        batch, width = len(prepared), self.config.width
        seen = {name: self._look(name, prepared.views[name], jitter) for name in self.cameras}
        state = self.normalize_state(prepared.state)
        longest = int((prepared.words != PADDING).sum(1).max())  # words come first: columns behind it are all padding
        word_mask = prepared.words[:, :longest] != PADDING
        words = self.word_table(prepared.words[:, :longest]) + self.word_position[:longest]
        said = (words * word_mask[..., None]).sum(1) / word_mask.sum(1, keepdim=True).clamp(min=1)
        goal_m = GOAL_SCALE_M * self.goal_head(torch.cat([*seen.values(), state, said], dim=-1))
        views = [self.view_in[name](seen[name]).view(batch, -1, width) for name in self.cameras]
        # The way to the goal at two scales: across the table, and the last centimetres.
        way = torch.cat([goal_m / GOAL_SCALE_M, torch.tanh(goal_m / FINE_SCALE_M)], dim=-1)
        facts = torch.cat([*views, self.state_in(state)[:, None], self.goal_in(way)[:, None]], dim=1)
        tokens = torch.cat([facts + self.kind, words], dim=1)
        mask = F.pad(word_mask, (facts.shape[1], 0), value=True)
        keys_values = []
        for layer in self.prefix_layers:
            tokens, layer_keys_values = layer(tokens, mask[:, None, None])
            keys_values.append(layer_keys_values)
        pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return Prefix(keys_values, mask, pooled, goal_m, self.condition_in(torch.cat([way, state], dim=-1)))

    def _look(self, name: str, view: Tensor, jitter: ColourJitter | None) -> Tensor:
        return self.eyes[name](view, jitter) if view.dtype == torch.uint8 else view

    def _velocity(self, prefix: Prefix) -> flow.Velocity:
        """A closure for learner.flow; rows of x beyond the batch are repeats of one observation, side by side."""

        def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            repeats = len(x) // len(prefix.mask)
            if repeats == 1:
                return self.expert(x, t, prefix.keys_values, prefix.mask, prefix.condition)
            keys_values = [tuple(part.repeat_interleave(repeats, 0) for part in pair) for pair in prefix.keys_values]
            mask, condition = (part.repeat_interleave(repeats, 0) for part in (prefix.mask, prefix.condition))
            return self.expert(x, t, keys_values, mask, condition)

        return velocity

    def _value(self, prefix: Prefix) -> Tensor:
        # Detached: returns of a few episodes must not bend what demonstrations taught the prefix.
        return self.value_head(prefix.pooled.detach())
