"""Shapes of pi0 and pi0.5. The defaults are the released models; tests use small ones of the same kind."""

from dataclasses import dataclass, field

VARIANTS = ("pi0", "pi05")


@dataclass
class VisionConfig:
    """SigLIP So400m/14."""

    width: int = 1152
    depth: int = 27
    mlp_width: int = 4304
    heads: int = 16
    patch_size: int = 14
    image_size: int = 224

    def __post_init__(self):
        if self.width % self.heads or self.image_size % self.patch_size:
            raise ValueError(
                f"vision: heads ({self.heads}) must divide width ({self.width}) and patch_size ({self.patch_size}) "
                f"must divide image_size ({self.image_size})"
            )

    @property
    def tokens(self) -> int:
        """Image tokens of one camera."""
        return (self.image_size // self.patch_size) ** 2


@dataclass
class GemmaConfig:
    """One Gemma stack, multi-query: all heads share one key and value head, as in both Gemma 2B (the prefix) and Gemma
    300M (the action expert)."""

    width: int = 2048
    depth: int = 18
    mlp_width: int = 16384
    heads: int = 8
    head_width: int = 256


def expert_300m() -> GemmaConfig:
    return GemmaConfig(width=1024, mlp_width=4096)


@dataclass
class ModelConfig:
    """The network alone: no training, no normalisation."""

    variant: str = "pi05"  # pi05: time through adaRMS, state as text; pi0: a state token, time mixed into the actions
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: GemmaConfig = field(default_factory=GemmaConfig)
    expert: GemmaConfig = field(default_factory=expert_300m)
    vocabulary: int = 257152
    prompt_tokens: int = 200  # pi0: 48
    horizon: int = 50
    action_width: int = 32  # actions are padded to this
    state_width: int = 32

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"model variant {self.variant!r}: allowed are {', '.join(VARIANTS)}")
        for name in ("depth", "heads", "head_width"):
            ours, theirs = getattr(self.language, name), getattr(self.expert, name)
            if ours != theirs:
                raise ValueError(f"the expert attends to the prefix layer by layer: {name} {ours} and {theirs} differ")

    @property
    def suffix_tokens(self) -> int:
        """Tokens the expert processes in one step: the actions, and for pi0 the state before them."""
        return self.horizon + (self.variant == "pi0")


def tiny(variant: str = "pi05", horizon: int = 6) -> ModelConfig:
    """A model of the same kind that fits a test: two layers, 28-pixel pictures, 64 words."""
    gemma = dict(depth=2, heads=8, head_width=16)
    return ModelConfig(
        variant=variant,
        vision=VisionConfig(width=32, depth=2, mlp_width=64, heads=2, patch_size=14, image_size=28),
        language=GemmaConfig(width=64, mlp_width=96, **gemma),
        expert=GemmaConfig(width=32, mlp_width=48, **gemma),
        vocabulary=300,
        prompt_tokens=16,
        horizon=horizon,
    )
