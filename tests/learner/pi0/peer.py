"""LeRobot's own pi0 and pi0.5, made tiny: the reference that parity is measured against.

LeRobot 0.6.1 has no small variant, so during construction its Gemma shapes are replaced and the two transformer classes
are wrapped to shrink vision tower, projector and vocabulary. Its forward pass is untouched.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config

from learner.pi0.config import ModelConfig

PEERS = {
    "pi0": (modeling_pi0, modeling_pi0.PI0Policy, PI0Config),
    "pi05": (modeling_pi05, modeling_pi05.PI05Policy, PI05Config),
}


def build_peer(
    model: ModelConfig, cameras: tuple[str, ...] = ("third_person", "wrist"), device: str = "cpu", **options
) -> torch.nn.Module:
    """A LeRobot policy with the shapes of `model` and random weights everywhere (its own init leaves zeros)."""
    _, policy_class, config_class = PEERS[model.variant]
    config = config_class(
        device=device,
        chunk_size=model.horizon,
        n_action_steps=model.horizon,
        image_resolution=(model.vision.image_size, model.vision.image_size),
        tokenizer_max_length=model.prompt_tokens,
        **options,
    )
    size = model.vision.image_size
    config.input_features = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, size, size)) for name in cameras
    }
    config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (7,))
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (7,))}
    with shrunk(model):
        policy = policy_class(config)
    randomise(policy)
    return policy


@contextmanager
def shrunk(model: ModelConfig) -> Iterator[None]:
    """Within it, LeRobot constructs policies of `model`'s shapes."""
    module = PEERS[model.variant][0]
    with ExitStack() as stack:
        for name, replacement in _replacements(module, model).items():
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def randomise(policy: torch.nn.Module, seed: int = 0) -> None:
    """Non-trivial values for every parameter, so that no term can hide behind a zero."""
    device = next(policy.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in policy.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device=device)
        scale = 0.1 if parameter.ndim < 2 else 0.7 / max(parameter[0].numel(), 1) ** 0.5
        parameter.data.copy_(noise * scale)


def _replacements(module, model: ModelConfig) -> dict:
    def gemma_config(variant):
        shape = model.language if variant == "gemma_2b" else model.expert
        return module.GemmaConfig(shape.width, shape.depth, shape.mlp_width, shape.heads, 1, shape.head_width)

    def paligemma(config):
        vision = config.vision_config
        vision.hidden_size, vision.num_hidden_layers = model.vision.width, model.vision.depth
        vision.intermediate_size, vision.num_attention_heads = model.vision.mlp_width, model.vision.heads
        vision.patch_size, vision.projection_dim = model.vision.patch_size, model.language.width
        config.projection_dim = model.language.width
        config.text_config.vocab_size = model.vocabulary
        config._vocab_size = config.image_token_index = model.vocabulary
        return paligemma_class(config=config)

    def expert(config):
        config.vocab_size = model.vocabulary
        return expert_class(config=config)

    paligemma_class = module.PaliGemmaForConditionalGenerationWithPiGemma
    expert_class = module.PiGemmaForCausalLM
    return {
        "get_gemma_config": gemma_config,
        "PaliGemmaForConditionalGenerationWithPiGemma": paligemma,
        "PiGemmaForCausalLM": expert,
    }
