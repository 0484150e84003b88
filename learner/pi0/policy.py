"""pi0 and pi0.5 behind the loop's policy interface (learner/policy.py).

With a frozen vision-language part, `prepare` runs it once and keeps each layer's keys and values (13 MB a sample in
bfloat16 with two cameras); rollouts and every PPO epoch then run the action expert alone.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bridge.embodiment import Embodiment
from learner.flow import (
    FlowConfig,
    chain_from_noise,
    draw_denoise_index,
    draw_noise,
    masked_sft_loss,
    sample_sft_time,
    score_chain,
    sft_pair,
    time_grid,
)
from learner.noise import NoiseConfig, NoiseHead
from learner.pi0.adapters import LoraConfig, add_adapters
from learner.pi0.augment import AugmentConfig, augment
from learner.pi0.config import ModelConfig
from learner.pi0.graphs import Graphed
from learner.pi0.inputs import Tokenizer, load_tokenizer, pad_width, prepare_images, prompts, tokenize
from learner.pi0.layers import Linear, refresh_working_copies
from learner.pi0.model import Pi0Model, Prefix, TimeTable
from learner.pi0.normalise import Normaliser
from learner.pi0.prepared import Prepared
from learner.pi0.rtc import guidance_weights, guided_denoise
from learner.policy import ObservationBatch, Sample, Scores, SftBatch
from learner.value_head import ValueHead, pool_prefix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREFIX_CACHES = ("device", "host", "recompute")


@dataclass
class Pi0Config:
    """A pi0 or pi0.5 policy: the network, how it explores, what of it trains, and how it is run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)  # flow_noise's learned range
    lora: LoraConfig = field(default_factory=LoraConfig)
    cameras: list[str] = field(default_factory=lambda: ["third_person", "wrist"])  # in the network's order
    ignored_cameras: list[str] = field(default_factory=list)  # of the robot, not shown to the network
    num_action_chunks: int = 5  # C, steps of a chunk that are executed and scored
    action_env_dim: int = 7  # d, the rest of the padded action width is never scored
    num_inference_steps: int = 10  # denoising steps when deployed
    state_in_prompt: bool = True  # pi0.5: the state as words (off for models trained without it)
    tokenizer: str = "google/paligemma-3b-pt-224"  # folder, or name in the local Hugging Face cache

    train_expert_only: bool = True  # freeze vision tower and language model
    freeze_vision: bool = False
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # pictures of demonstrations
    sft_padded_dims: bool = False  # also regress the padded action dims, as openpi and RLinf do

    add_value_head: bool = False
    value_after_vlm: bool = True  # the critic reads the prefix; else the expert's features
    value_vlm_mode: str = "mean_token"  # first_token, last_token
    value_masked_pooling: bool = True  # off: padding positions of the prompt count too, as in RLinf
    value_hidden: list[int] = field(default_factory=lambda: [512, 256, 128])
    detach_critic_input: bool = False  # value gradients do not reach the expert
    chunk_critic_input: bool = False  # the expert critic averages the executed steps only

    dtype: str = "bfloat16"  # of the arithmetic; weights that train are float32
    prefix_cache: str = "device"  # where a frozen prefix is kept: device, host, recompute
    gradient_checkpointing: bool = False
    compile: bool = True  # torch.compile and CUDA graphs, on a GPU

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}: allowed are {', '.join(DTYPES)}")
        if self.prefix_cache not in PREFIX_CACHES:
            raise ValueError(f"prefix_cache {self.prefix_cache!r}: allowed are {', '.join(PREFIX_CACHES)}")
        if not 1 <= self.num_action_chunks <= self.model.horizon:
            raise ValueError(f"num_action_chunks {self.num_action_chunks}: allowed are 1 to {self.model.horizon}")
        if not 1 <= self.action_env_dim <= self.model.action_width:
            raise ValueError(f"action_env_dim {self.action_env_dim}: allowed are 1 to {self.model.action_width}")
        if not self.cameras:
            raise ValueError("cameras is empty: name at least one, in the network's order")

    pads_pictures = True

    @property
    def horizon(self) -> int:
        return self.model.horizon

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.model.vision.image_size, self.model.vision.image_size

    @property
    def prefix_is_frozen(self) -> bool:
        return self.train_expert_only and not (self.lora.rank and self.lora.on_prefix)


class Pi0Policy(nn.Module):
    """`state_normaliser` and `action_normaliser` come with the checkpoint (learner/pi0/bundle.py) or are measured by
    Stage I (learner/pi0/stage.py)."""

    pads_pictures = Pi0Config.pads_pictures

    def __init__(
        self,
        config: Pi0Config,
        embodiment: Embodiment,
        state_normaliser: Normaliser,
        action_normaliser: Normaliser,
        tokenizer: Tokenizer | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.config, self.embodiment = config, embodiment
        self.horizon, self.num_action_chunks = config.model.horizon, config.num_action_chunks
        self.state_normaliser, self.action_normaliser = state_normaliser, action_normaliser
        self._tokenizer = tokenizer
        self.dtype = DTYPES[config.dtype]
        with torch.device(device):
            self.model = Pi0Model(config.model, self.dtype)
            features = config.model.language.width if config.value_after_vlm else config.model.expert.width
            self.value_head = ValueHead(features, config.value_hidden) if config.add_value_head else None
            width, actions = config.model.expert.width, config.model.action_width
            is_learned = config.flow.method == "flow_noise"
            self.noise_head = NoiseHead(width, actions, config.noise) if is_learned else None
            self.register_buffer("noise_level", torch.tensor(config.flow.noise_level), persistent=False)
        add_adapters(self.model, config.lora)
        self._freeze()
        fast = config.compile and torch.device(device).type == "cuda"
        for stack in (self.model.vision, self.model.language, self.model.expert):
            stack.run.gradient_checkpointing = config.gradient_checkpointing
        if fast:
            self.model.compile_layers()
        self._tables = {steps: TimeTable() for steps in (config.num_inference_steps, config.flow.num_steps)}
        self._infer_graph = Graphed(self._infer, fast)
        self._prefix_graph = Graphed(self._encode, fast)
        self._sample_graph = Graphed(self._explore, fast)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring what passes without gradient keep of the weights up to date; `prepare`, `infer` and `sample` call it.

        Changes are found by autograd's version counters: optimisers, `copy_` and `load_state_dict` count, a write
        through `.data` does not.
        """
        refresh_working_copies(self.model, self.dtype)
        for num_steps, table in self._tables.items():
            table.refresh(self.model, time_grid(num_steps, self.device)[:-1])

    # --- the policy interface -------------------------------------------------------------------------------------

    def prepare(self, observation: ObservationBatch) -> Prepared:
        images, image_mask, tokens, token_mask, state = self._inputs(observation)
        valid = self._prefix_valid(image_mask, token_mask)
        if not self.config.prefix_is_frozen or self.config.prefix_cache == "recompute":
            return Prepared(state, valid, images=images, image_mask=image_mask, tokens=tokens, token_mask=token_mask)
        self.refresh()
        keys_values, pooled = self._prefix_graph(images, image_mask, tokens, token_mask)
        if self.config.prefix_cache == "host":
            keys_values = keys_values.cpu()
        return Prepared(state, valid, keys_values=keys_values, pooled=pooled)

    @torch.no_grad()
    def infer(self, observation: ObservationBatch, generator: torch.Generator | None = None) -> Tensor:
        self.refresh()
        inputs = self._inputs(observation)
        noise = draw_noise(self._action_shape(len(observation)), generator, self.device)
        (actions,) = self._infer_graph(*inputs, noise)
        return self._to_contract(actions).cpu()

    @torch.no_grad()
    def infer_next(
        self,
        observation: ObservationBatch,
        previous: Tensor,
        delay: int,
        generator: torch.Generator | None = None,
        max_guidance: float = 5.0,
    ) -> Tensor:
        """Real-time chunking: like `infer`, but continuing `previous` [B, R, 7] (contract units), the not yet executed
        rest of the last chunk, of which `delay` steps will be executed before this one arrives."""
        self.refresh()
        rest = min(previous.shape[1], self.horizon)
        weights = guidance_weights(self.horizon, delay, self.horizon - rest)
        target = torch.zeros(self._action_shape(len(observation)), device=self.device)
        normalised = self.action_normaliser(previous[:, :rest].to(self.device))
        target[:, :rest, : self.config.action_env_dim] = normalised
        images, image_mask, tokens, token_mask, state = self._inputs(observation)
        prefix = self.model.prefix(images, image_mask, tokens, token_mask)
        noise = draw_noise(target.shape, generator, self.device)
        # The padded dims have no previous action to follow, so nothing pulls on them.
        real = torch.arange(target.shape[-1]) < self.config.action_env_dim
        weights = weights[:, None] * real

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.model.velocity(prefix, state, x, t)[0]

        steps = self.config.num_inference_steps
        x = guided_denoise(velocity, noise, steps, target, weights, max_guidance)
        return self._to_contract(x).cpu()

    @torch.no_grad()
    def sample(self, prepared: Prepared, generator: torch.Generator | None = None) -> Sample:
        self.refresh()
        batch, flow = len(prepared), self.config.flow
        noise = draw_noise(self._action_shape(batch), generator, self.device)
        index = draw_denoise_index(flow, batch, generator, self.device)
        step_noise = draw_noise((flow.num_steps, *noise.shape), generator, self.device)
        keys_values, pooled = self._prefix_tensors(prepared)
        states, log_prob, value = self._sample_graph(
            keys_values, prepared.valid, pooled, prepared.state, noise, step_noise, index
        )
        actions = self._to_contract(states[:, -1])
        return Sample(actions, states, index, self._executed(log_prob), value, prepared)

    @torch.no_grad()
    def value(self, prepared: Prepared) -> Tensor:
        """The critic alone. One on the expert reads the features of a chunk, always from the same noise: an observation
        has one value, and global randomness no part in it."""
        self.refresh()
        if self.value_head is None or self.config.value_after_vlm:
            return self._value(self._prefix_tensors(prepared)[1], torch.empty(len(prepared), 0, device=self.device))
        return self.sample(prepared, torch.Generator().manual_seed(0)).value

    def scores(self, prepared: Prepared, chain: Tensor, denoise_index: Tensor) -> Scores:
        flow, device = self.config.flow, self.device
        chain, denoise_index = chain.to(device), denoise_index.to(device)
        prefix, pooled = self._prefix_with_gradient(prepared)
        repeats = flow.num_steps if flow.joint else 1
        state = prepared.state.repeat_interleave(repeats, dim=0)
        prefix = prefix.repeat(repeats)

        def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.model.velocity(prefix, state, x, t)

        scored = score_chain(velocity, chain, denoise_index, flow, self.noise_level, self.noise_head)
        entropy = self._executed(scored.entropy).mean((1, 2))
        return Scores(self._executed(scored.log_prob), entropy, self._value(pooled, scored.features))

    def sft_loss(self, batch: SftBatch, generator: torch.Generator | None = None) -> Tensor:
        actions = self.action_normaliser(batch.actions.to(self.device))
        actions = pad_width(actions, self.config.model.action_width)
        noise = draw_noise(tuple(actions.shape), generator, self.device)
        t = sample_sft_time(len(actions), generator, self.device)
        x, target = sft_pair(actions, noise, t)
        images, image_mask, tokens, token_mask, state = self._inputs(batch.observation)
        images = augment(images, self.config.cameras, self.config.augment, generator)
        with torch.set_grad_enabled(not self.config.prefix_is_frozen and torch.is_grad_enabled()):
            prefix = self.model.prefix(images, image_mask, tokens, token_mask)
        v, _ = self.model.velocity(prefix, state, x, t)
        dims = self.config.model.action_width if self.config.sft_padded_dims else self.config.action_env_dim
        return masked_sft_loss(v, target, batch.is_pad.to(self.device), dims)

    def sft_terms(self, batch: SftBatch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"loss": self.sft_loss(batch, generator)}

    # --- the pieces -----------------------------------------------------------------------------------------------

    @property
    def picture_size(self) -> tuple[int, int]:
        return self.config.picture_size

    @property
    def device(self) -> torch.device:
        return self.model.action_in.weight.device

    def heads(self) -> nn.ModuleDict:
        """What a policy has besides the released network: `value_head`, `noise_head`."""
        named = {"value_head": self.value_head, "noise_head": self.noise_head}
        return nn.ModuleDict({name: head for name, head in named.items() if head is not None})

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config.tokenizer)
        return self._tokenizer

    def set_noise_level(self, level: float) -> None:
        """Annealing (learner.flow.annealed_noise_level); in place, so captured graphs see it."""
        self.noise_level.fill_(level)

    def _inputs(self, observation: ObservationBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """images [B, I, 3, size, size], image_mask [B, I], tokens, token_mask [B, T], state [B, state_width]."""
        config, device, size = self.config, self.device, self.config.model.vision.image_size
        if unknown := sorted(set(observation.images) - {*config.cameras, *config.ignored_cameras}):
            raise ValueError(
                f"this policy has no camera {unknown}; it reads {config.cameras} and ignores {config.ignored_cameras}"
            )
        batch = len(observation)
        black = torch.full((batch, 3, size, size), -1.0, device=device)
        pictures = [
            prepare_images(observation.images[name], size, device) if name in observation.images else black
            for name in config.cameras
        ]
        present = torch.tensor([name in observation.images for name in config.cameras], device=device)
        state = self.state_normaliser(observation.state.float())
        in_words = config.model.variant == "pi05" and config.state_in_prompt
        texts = prompts(config.model.variant, observation.instruction, state if in_words else None)
        tokens, token_mask = tokenize(self.tokenizer, texts, config.model.prompt_tokens)
        state = pad_width(state.to(device), config.model.state_width)
        images = torch.stack(pictures, dim=1)
        return images, present.expand(batch, -1).clone(), tokens.to(device), token_mask.to(device), state

    def _prefix_valid(self, image_mask: Tensor, token_mask: Tensor) -> Tensor:
        tokens = self.config.model.vision.tokens
        return torch.cat([image_mask.repeat_interleave(tokens, dim=1), token_mask], dim=1)

    def _action_shape(self, batch: int) -> tuple[int, int, int]:
        return batch, self.horizon, self.config.model.action_width

    def _to_contract(self, x: Tensor) -> Tensor:
        return self.action_normaliser.inverse(x[..., : self.config.action_env_dim])

    def _executed(self, x: Tensor) -> Tensor:
        """[B, H, D] -> [B, C, d]."""
        return x[:, : self.num_action_chunks, : self.config.action_env_dim]

    def _infer(
        self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor, noise: Tensor
    ) -> tuple[Tensor]:
        """A whole chunk, from pictures to actions in network units."""
        prefix = self.model.prefix(images, image_mask, tokens, token_mask)
        steps, x = self.config.num_inference_steps, noise
        for k in range(steps):
            t = torch.full((len(x),), 1.0 - k / steps, device=x.device)
            x = x - self.model.velocity(prefix, state, x, t, self._tables[steps].row(k))[0] / steps
        return (x,)

    def _encode(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, 2, S, W], and the critic's view of the prefix [B, C] (empty without one)."""
        prefix, pooled = self._run_prefix(images, image_mask, tokens, token_mask)
        stacked = torch.stack([torch.stack(pair, dim=1) for pair in prefix.keys_values], dim=1)
        return stacked, pooled

    def _run_prefix(
        self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Prefix, Tensor]:
        wanted = self.value_head is not None and self.config.value_after_vlm
        prefix = self.model.prefix(images, image_mask, tokens, token_mask, need_output=wanted)
        if not wanted:
            return prefix, torch.zeros((len(tokens), 0), device=self.device)
        assert prefix.output is not None
        used = self._prefix_valid(image_mask, torch.ones_like(token_mask))
        mode, masked = self.config.value_vlm_mode, self.config.value_masked_pooling
        return prefix, pool_prefix(prefix.output, prefix.valid, used, mode, masked)

    def _prefix_tensors(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """`_encode`'s outputs on the device, from the cache or computed now."""
        if prepared.keys_values is not None:
            assert prepared.pooled is not None
            return prepared.keys_values.to(self.device, non_blocking=True), prepared.pooled
        keys_values, pooled = self._prefix_graph(*prepared.raw_inputs())
        return keys_values, pooled

    def _prefix_with_gradient(self, prepared: Prepared) -> tuple[Prefix, Tensor]:
        if prepared.keys_values is not None or self.config.prefix_is_frozen:
            keys_values, pooled = self._prefix_tensors(prepared)
            return Prefix.from_stacked(keys_values, prepared.valid), pooled
        return self._run_prefix(*prepared.raw_inputs())

    def _explore(
        self,
        keys_values: Tensor,
        valid: Tensor,
        pooled: Tensor,
        state: Tensor,
        noise: Tensor,
        step_noise: Tensor,
        index: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Chain [B, K+1, H, D], log-probability [B, H, D] and value [B] of stochastic chunks."""
        prefix, flow = Prefix.from_stacked(keys_values, valid), self.config.flow
        rows = (self._tables[flow.num_steps].row(k) for k in range(flow.num_steps))

        def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.model.velocity(prefix, state, x, t, next(rows))

        chain = chain_from_noise(velocity, noise, step_noise, index, flow, self.noise_level, self.noise_head)
        features = chain.features
        if not flow.joint:  # the step that an update will recompute, so that old and new value are of the same input
            features = features[torch.arange(len(index), device=index.device), index[:, 0]][:, None]
        return chain.states, chain.log_prob, self._value(pooled, features)

    def _value(self, pooled: Tensor, features: Tensor) -> Tensor:
        """float32 [B]; features [B, steps, H, C] of the expert."""
        if self.value_head is None:
            return torch.zeros(len(features), device=features.device)
        if self.config.value_after_vlm:
            return self.value_head(pooled)
        if self.config.chunk_critic_input:
            features = features[:, :, : self.num_action_chunks]
        pooled = features.mean(2)
        pooled = pooled.detach() if self.config.detach_critic_input else pooled
        return self.value_head(pooled).mean(1)

    def _freeze(self) -> None:
        """Frozen weights are kept in the arithmetic's dtype, those that train in float32."""
        model = self.model
        frozen: list[nn.Module] = []
        if self.config.train_expert_only:
            frozen = [model.vision, model.embed, model.language]
        elif self.config.freeze_vision:
            frozen = [model.vision]
        for part in frozen:
            for name, parameter in part.named_parameters():
                if "lora_" not in name:
                    parameter.requires_grad_(False)
            for module in part.modules():
                if isinstance(module, Linear | nn.Embedding):  # norms stay float32: they are small
                    module.to(self.dtype)
