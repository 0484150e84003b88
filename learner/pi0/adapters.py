"""LoRA through peft, on the prefix's language model and vision tower, on the expert, or on both."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class LoraConfig:
    """rank 0: no adapters. Scale is alpha / rank; the base weights below an adapter do not train."""

    rank: int = 0
    alpha: float | None = None  # None: equal to rank
    on_prefix: bool = True
    on_expert: bool = False
    merge_on_save: bool = False  # write a plain policy, which LeRobot opens too, instead of one that trains on

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"LoRA rank {self.rank}: 0 (off) or more")


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put an adapter on every attention and MLP projection of the chosen parts, in place.

    Our projections are fused, so one adapter serves query, key and value (or gate and up). Raises ValueError when peft
    is missing.
    """
    if not config.rank:
        return
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora.rank needs the package peft: uv pip install peft") from error
    parts = ["vision", "language"] * config.on_prefix + ["expert"] * config.on_expert
    if not parts:
        raise ValueError("lora.rank is set, but lora.on_prefix and lora.on_expert are both off")
    for part in parts:
        inject_adapter_in_model(
            PeftConfig(
                r=config.rank,
                lora_alpha=config.alpha or config.rank,
                lora_dropout=0.0,
                init_lora_weights="gaussian",
                target_modules=r"layers\.\d+\.(qkv|out|gate_up|up|down)",
            ),
            getattr(model, part),
        )


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter's parameters by name; empty without adapters."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
