"""Our parameter names against the released ones (LeRobot's and openpi-PyTorch's, which agree), strict both ways.

We multiply by fused weights (query, key and value in one matrix; gate and up in one; all adaRMS norms in one), so one
of ours may be several of theirs, stacked by rows.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from learner.pi0.config import GemmaConfig, ModelConfig, VisionConfig
from learner.pi0.model import Pi0Model

Pieces = list[tuple[str, tuple[int, ...]]]
"""Released names with their shapes, in the order in which their rows are stacked in our parameter."""

UNUSED = ("paligemma_with_expert.paligemma.lm_head.weight", "paligemma_with_expert.gemma_expert.lm_head.weight")
"""Language-model heads that no pi0 ever evaluates: 790 M numbers. Ignored when present, written by nobody."""

TIED_EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def released_names(config: ModelConfig) -> dict[str, Pieces]:
    """Our parameter name -> released pieces (without LeRobot's leading `model.`)."""
    paligemma, width = "paligemma_with_expert.paligemma.model", config.expert.width
    names = _vision(config.vision, f"{paligemma}.vision_tower.vision_model")
    projector = f"{paligemma}.multi_modal_projector.linear"
    names |= _linear("vision.projector", {projector: config.language.width}, config.vision.width)
    names["embed.weight"] = [(EMBEDDING, (config.vocabulary, config.language.width))]
    names |= _gemma("language", config.language, f"{paligemma}.language_model", adaptive=False)
    adaptive = config.variant == "pi05"
    names |= _gemma("expert", config.expert, "paligemma_with_expert.gemma_expert.model", adaptive)
    names |= _linear("action_in", {"action_in_proj": width}, config.action_width)
    names |= _linear("action_out", {"action_out_proj": config.action_width}, width)
    time = "time_mlp" if adaptive else "action_time_mlp"
    names |= _linear("time_in", {f"{time}_in": width}, width if adaptive else 2 * width)
    names |= _linear("time_out", {f"{time}_out": width}, width)
    if not adaptive:
        names |= _linear("state_in", {"state_proj": width}, config.state_width)
    return names


def to_released(model: Pi0Model, merged: bool = True) -> dict[str, Tensor]:
    """The model's parameters under their released names and shapes, LoRA adapters merged in or left out."""
    released = {}
    for name, pieces in released_names(model.config).items():
        whole = _merged(model, name) if merged else _parameter(model, name).detach()
        parts = whole.split([shape[0] for _, shape in pieces])
        released |= {key: part.reshape(shape) for (key, shape), part in zip(pieces, parts, strict=True)}
    return released


def load_released(model: Pi0Model, tensors: dict[str, Tensor], allow: Iterable[str], source: str) -> None:
    """Fill the model from released tensors. Raises one ValueError naming every missing, unexpected and misshapen key.

    A key in `allow` may be missing (its parameter keeps its value), superfluous or misshapen (ignored). The unused
    language-model heads are always ignored; a checkpoint that ties the embedding to one of them is understood.
    """
    tensors = {key.removeprefix("model."): value for key, value in tensors.items()}
    if EMBEDDING not in tensors and TIED_EMBEDDING in tensors:
        tensors[EMBEDDING] = tensors[TIED_EMBEDDING]
    names, allow = released_names(model.config), set(allow)
    expected = dict(piece for pieces in names.values() for piece in pieces)
    problems = [f"missing: {key}" for key in sorted(expected.keys() - tensors.keys() - allow)]
    problems += [f"unexpected: {key}" for key in sorted(tensors.keys() - expected.keys() - allow - set(UNUSED))]
    for key in sorted(expected.keys() & tensors.keys() - allow):
        if tuple(tensors[key].shape) != expected[key]:
            problems.append(f"misshapen: {key} is {tuple(tensors[key].shape)}, expected {expected[key]}")
    if problems:
        raise ValueError(
            f"{source} does not fit this {model.config.variant} model; nothing was loaded. "
            "Fix the checkpoint or the model's shapes, or accept keys by name with allow:\n  " + "\n  ".join(problems)
        )
    with torch.no_grad():
        for name, pieces in names.items():
            parts = _parameter(model, name).split([shape[0] for _, shape in pieces])
            for (key, shape), part in zip(pieces, parts, strict=True):
                value = tensors.get(key)
                if value is not None and tuple(value.shape) == shape:
                    part.copy_(value.reshape(part.shape))


def _parameter(model: Pi0Model, name: str) -> Tensor:
    """By our name, which an adapter around the layer does not change."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    return getattr(getattr(module, "base_layer", module), kind)


def _merged(model: Pi0Model, name: str) -> Tensor:
    parameter = _parameter(model, name).detach()
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    if kind != "weight" or not hasattr(module, "base_layer"):
        return parameter
    return (parameter.float() + module.get_delta_weight("default").detach()).to(parameter.dtype)


def _linear(ours: str, theirs: dict[str, int], fan_in: int, bias: bool = True) -> dict[str, Pieces]:
    """`theirs`: released module name -> rows."""
    names: dict[str, Pieces] = {f"{ours}.weight": [(f"{key}.weight", (rows, fan_in)) for key, rows in theirs.items()]}
    if bias:
        names[f"{ours}.bias"] = [(f"{key}.bias", (rows,)) for key, rows in theirs.items()]
    return names


def _layer_norm(ours: str, theirs: str, width: int) -> dict[str, Pieces]:
    return {f"{ours}.{kind}": [(f"{theirs}.{kind}", (width,))] for kind in ("weight", "bias")}


def _vision(config: VisionConfig, root: str) -> dict[str, Pieces]:
    width, patch = config.width, (config.width, 3, config.patch_size, config.patch_size)
    names: dict[str, Pieces] = {
        "vision.patch.weight": [(f"{root}.embeddings.patch_embedding.weight", patch)],
        "vision.patch.bias": [(f"{root}.embeddings.patch_embedding.bias", (width,))],
        "vision.position": [(f"{root}.embeddings.position_embedding.weight", (config.tokens, width))],
    }
    for i in range(config.depth):
        ours, theirs = f"vision.layers.{i}", f"{root}.encoder.layers.{i}"
        names |= _layer_norm(f"{ours}.attn_norm", f"{theirs}.layer_norm1", width)
        names |= _linear(f"{ours}.qkv", {f"{theirs}.self_attn.{p}_proj": width for p in "qkv"}, width)
        names |= _linear(f"{ours}.out", {f"{theirs}.self_attn.out_proj": width}, width)
        names |= _layer_norm(f"{ours}.mlp_norm", f"{theirs}.layer_norm2", width)
        names |= _linear(f"{ours}.up", {f"{theirs}.mlp.fc1": config.mlp_width}, width)
        names |= _linear(f"{ours}.down", {f"{theirs}.mlp.fc2": width}, config.mlp_width)
    return names | _layer_norm("vision.norm", f"{root}.post_layernorm", width)


def _gemma(stack: str, config: GemmaConfig, root: str, adaptive: bool) -> dict[str, Pieces]:
    width, attention = config.width, config.heads * config.head_width
    names: dict[str, Pieces] = {}
    adaptive_norms: dict[str, int] = {}
    for i in range(config.depth):
        ours, theirs = f"{stack}.layers.{i}", f"{root}.layers.{i}"
        rows = {"q_proj": attention, "k_proj": config.head_width, "v_proj": config.head_width}
        names |= _linear(f"{ours}.qkv", {f"{theirs}.self_attn.{p}": n for p, n in rows.items()}, width, bias=False)
        names |= _linear(f"{ours}.out", {f"{theirs}.self_attn.o_proj": width}, attention, bias=False)
        halves = {f"{theirs}.mlp.{p}_proj": config.mlp_width for p in ("gate", "up")}
        names |= _linear(f"{ours}.gate_up", halves, width, bias=False)
        names |= _linear(f"{ours}.down", {f"{theirs}.mlp.down_proj": width}, config.mlp_width, bias=False)
        norms = (f"{theirs}.input_layernorm", f"{theirs}.post_attention_layernorm")
        if adaptive:
            adaptive_norms |= {f"{norm}.dense": 3 * width for norm in norms}
        else:
            names[f"{ours}.attn_norm.weight"] = [(f"{norms[0]}.weight", (width,))]
            names[f"{ours}.mlp_norm.weight"] = [(f"{norms[1]}.weight", (width,))]
    if adaptive:
        names |= _linear(f"{stack}.modulate", adaptive_norms, width)
        return names | _linear(f"{stack}.modulate_final", {f"{root}.norm.dense": 3 * width}, width)
    return names | {f"{stack}.norm.weight": [(f"{root}.norm.weight", (width,))]}
