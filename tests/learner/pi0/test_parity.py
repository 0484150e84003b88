"""Ours against LeRobot's PI0Policy and PI05Policy with the same tiny random weights, float32, same noise."""

import json
from typing import cast

import pytest
import torch
from safetensors.torch import save_file

from bridge.checkpoint import write_bundle
from bridge.embodiment import Embodiment
from learner.load import load_policy
from learner.pi0.bundle import (
    bundle_files,
    config_from_lerobot,
    load_lerobot,
    load_weights,
    openpi_normalisers,
    read_json,
)
from learner.pi0.config import ModelConfig, tiny
from learner.pi0.model import Pi0Model
from learner.pi0.normalise import Normaliser
from learner.pi0.policy import Pi0Config, Pi0Policy
from learner.pi0.weights import load_released, released_names, to_released
from learner.policy import ObservationBatch, SftBatch
from tests.learner.pi0.test_policy import PLAIN
from tests.learner.pi0.words import ByteTokenizer

TOLERANCE = 1e-5
CAMERAS = ["third_person", "wrist"]


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def pair(request):
    """(LeRobot's policy, our network with its weights). Importing LeRobot's policies takes ten seconds."""
    from tests.learner.pi0.peer import build_peer

    torch.manual_seed(0)
    config = tiny(request.param)
    peer = build_peer(config).eval()
    model = Pi0Model(config)
    load_released(model, peer.state_dict(), (), "the peer")
    return peer, model


@pytest.fixture(scope="module")
def inputs():
    """Three samples: one with both cameras, one with a black camera, prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    mask = torch.ones(3, 2, dtype=torch.bool)
    mask[1, 1] = False
    length = torch.tensor([16, 9, 5])
    return {
        "images": normal(3, 2, 3, 28, 28).clamp(-1, 1),
        "image_mask": mask,
        "tokens": torch.randint(300, (3, 16), generator=generator),
        "token_mask": torch.arange(16)[None] < length[:, None],
        "state": normal(3, 32),
        "noise": normal(3, 6, 32),
        "actions": normal(3, 6, 32),
        "t": torch.tensor([1.0, 0.3, 0.05]),
    }


def peer_arguments(peer, inputs):
    images, masks = list(inputs["images"].unbind(1)), list(inputs["image_mask"].unbind(1))
    words = (inputs["tokens"], inputs["token_mask"])
    return (images, masks, *words, inputs["state"]) if peer.name == "pi0" else (images, masks, *words)


def our_prefix(model, inputs):
    return model.prefix(*(inputs[name] for name in ("images", "image_mask", "tokens", "token_mask")))


def test_prefix_embeddings(pair, inputs):
    peer, model = pair
    theirs, pad, _ = peer.model.embed_prefix(*peer_arguments(peer, inputs)[:4])
    ours, valid = model.embed_prefix(*(inputs[name] for name in ("images", "image_mask", "tokens", "token_mask")))
    assert torch.equal(valid, pad)
    assert (ours - theirs).abs().max() <= TOLERANCE


def test_velocity_loss_and_gradients(pair, inputs):
    """The peer runs both stacks side by side, we run them one after the other: same numbers, same gradients."""
    peer, model = pair
    names = released_names(model.config)
    theirs = peer.model.forward(*peer_arguments(peer, inputs), inputs["actions"], inputs["noise"], inputs["t"])
    t = inputs["t"][:, None, None]
    x = t * inputs["noise"] + (1 - t) * inputs["actions"]
    v, _ = model.velocity(our_prefix(model, inputs), inputs["state"], x, inputs["t"])
    target = inputs["noise"] - inputs["actions"]
    # The velocity that explains the peer's squared error, on the side where ours is.
    explained = target + torch.sign(v - target) * theirs.sqrt()
    assert (v - explained).abs().max() <= TOLERANCE
    peer.zero_grad()
    model.zero_grad()
    theirs.mean().backward()
    (v - target).square().mean().backward()
    peer_gradients = {name.removeprefix("model."): p.grad for name, p in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, _ in names[name]:
            if peer_gradients[key] is None:
                assert parameter.grad is None or parameter.grad.abs().max() == 0, name
        if parameter.grad is None:  # the last prefix layer's output, which nobody reads
            assert "language" in name
            continue
        parts = parameter.grad.split([shape[0] for _, shape in names[name]])
        for (key, shape), part in zip(names[name], parts, strict=True):
            assert (part.reshape(shape) - peer_gradients[key]).abs().max() <= TOLERANCE, key


def test_sampled_actions(pair, inputs):
    peer, model = pair
    theirs = peer.model.sample_actions(*peer_arguments(peer, inputs), noise=inputs["noise"], num_steps=10)
    x = inputs["noise"]
    with torch.no_grad():
        prefix = our_prefix(model, inputs)
        for k in range(10):
            x = x - model.velocity(prefix, inputs["state"], x, torch.full((3,), 1 - k / 10))[0] / 10
    assert (theirs - inputs["noise"]).abs().mean() > 0.1  # the weights do something
    assert (x - theirs).abs().max() <= TOLERANCE


def test_weights_come_back_bit_for_bit(pair):
    peer, model = pair
    theirs = {key.removeprefix("model."): value for key, value in peer.state_dict().items()}
    ours = to_released(model)
    assert theirs.keys() - ours.keys() == {
        "paligemma_with_expert.paligemma.lm_head.weight",
        "paligemma_with_expert.gemma_expert.lm_head.weight",
    }
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- whole policies: raw observations in, contract units out ------------------------------------------------------


def statistics():
    generator = torch.Generator().manual_seed(3)
    low, span = torch.rand(7, generator=generator) - 1, torch.rand(7, generator=generator) + 0.5
    return {
        key: {"q01": low - i, "q99": low - i + span, "mean": low + i, "std": span, "min": low - 2, "max": low + 2}
        for i, key in enumerate(("observation.state", "action"))
    }


@pytest.fixture
def peer_folder(pair, tmp_path, monkeypatch):
    """What LeRobot's own code saves, and its processors (with a byte tokenizer, since PaliGemma's is not here)."""
    from lerobot.policies.pi0 import processor_pi0
    from lerobot.policies.pi05 import processor_pi05
    from lerobot.processor import TokenizerProcessorStep

    peer, _ = pair
    module = processor_pi0 if peer.name == "pi0" else processor_pi05

    def tokenizer_step(tokenizer_name, **options):
        return TokenizerProcessorStep(tokenizer=ByteTokenizer(), **options)

    monkeypatch.setattr(module, "TokenizerProcessorStep", tokenizer_step)
    make = module.make_pi0_pre_post_processors if peer.name == "pi0" else module.make_pi05_pre_post_processors
    before, after = make(peer.config, statistics())
    for part in (peer, before, after):
        part.save_pretrained(tmp_path)
    return tmp_path, before, after


def our_config(peer, **options) -> Pi0Config:
    shared = dict(cameras=CAMERAS, dtype="float32", num_action_chunks=3)
    return Pi0Config(model=tiny(peer.name), **(shared | options))


def observation(batch=2) -> ObservationBatch:
    generator = torch.Generator().manual_seed(5)
    size = {"third_person": (batch, 48, 64, 3), "wrist": (batch, 30, 20, 3)}
    images = {name: torch.randint(256, shape, generator=generator, dtype=torch.uint8) for name, shape in size.items()}
    state = torch.rand(batch, 7, generator=generator) * 4 - 2
    return ObservationBatch(images, state, ["Pick_up the\ncube ", "put it down"][:batch])


def peer_batch(before, seen: ObservationBatch) -> dict:
    raw = {f"observation.images.{name}": x.permute(0, 3, 1, 2).float() / 255 for name, x in seen.images.items()}
    return before({**raw, "observation.state": seen.state, "task": list(seen.instruction)})


def test_actions_from_raw_observations(pair, peer_folder):
    """Pictures of any size, prompt, state and normalisation: all the way from uint8 to metres."""
    peer, _ = pair
    folder, before, after = peer_folder
    policy = load_lerobot(folder, Embodiment(), our_config(peer), ByteTokenizer())
    seen = observation()
    ours = policy.infer(seen, torch.Generator().manual_seed(9))
    noise = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(9))
    peer.model.sample_noise = lambda shape, device: noise
    try:
        theirs = after(peer.predict_action_chunk(peer_batch(before, seen)))
    finally:
        del peer.model.sample_noise
    assert (ours - theirs).abs().max() <= TOLERANCE


def test_config_from_what_lerobot_saves(pair, peer_folder):
    """Without a config of ours the shapes are the released ones, the rest is LeRobot's config.json."""
    peer, _ = pair
    folder, _, _ = peer_folder
    path = folder / "config.json"
    saved = read_json(path)
    config = config_from_lerobot(saved, path)
    full = ModelConfig(variant=peer.name)
    assert (config.model.language, config.model.expert) == (full.language, full.expert)
    assert (config.model.prompt_tokens, config.model.horizon, config.num_action_chunks) == (16, 6, 6)
    assert (config.cameras, config.action_env_dim, config.num_inference_steps) == (CAMERAS, 7, 10)
    with pytest.raises(ValueError, match="only pi0 and pi05"):
        config_from_lerobot(saved | {"action_expert_variant": "gemma_2b"}, path)
    with pytest.raises(ValueError, match="use_relative_actions"):
        config_from_lerobot(saved | {"use_relative_actions": True}, path)


def test_sft_loss(pair, peer_folder):
    peer, _ = pair
    folder, before, _ = peer_folder
    policy = load_lerobot(
        folder, Embodiment(), our_config(peer, train_expert_only=False, augment=PLAIN), ByteTokenizer()
    )
    seen, actions = observation(), torch.rand(2, 6, 7)
    draw = torch.Generator().manual_seed(4)
    noise, u = torch.randn(2, 6, 32, generator=draw), torch.rand(2, generator=draw)
    batch = peer_batch(before, seen) | {"action": policy.action_normaliser(actions)}
    peer.model.sample_noise = lambda shape, device: noise
    peer.model.sample_time = lambda size, device: 0.001 + 0.999 * u ** (1 / 1.5)
    try:
        theirs = peer.forward(batch)[0]
    finally:
        del peer.model.sample_noise, peer.model.sample_time
    no_padding = SftBatch(seen, actions, torch.zeros(2, 6, dtype=torch.bool))
    ours = policy.sft_loss(no_padding, torch.Generator().manual_seed(4))
    assert abs(ours.item() - theirs.item()) <= TOLERANCE


def test_openpi_layout_gives_the_same_actions(pair, peer_folder, tmp_path_factory):
    """The same weights as openpi writes them: no `model.` before the names, the embedding tied to its head, statistics
    in norm_stats.json."""
    peer, _ = pair
    folder, _, _ = peer_folder
    openpi = tmp_path_factory.mktemp("openpi")
    tensors = {key.removeprefix("model."): value.clone() for key, value in peer.state_dict().items()}
    embedding = tensors.pop("paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight")
    tensors["paligemma_with_expert.paligemma.lm_head.weight"] = embedding
    save_file(tensors, openpi / "model.safetensors")
    stats = {
        name: {kind: value.tolist() for kind, value in statistics()[key].items()}
        for name, key in (("state", "observation.state"), ("actions", "action"))
    }
    (openpi / "lab" / "task").mkdir(parents=True)
    (openpi / "lab" / "task" / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    ours = Pi0Policy(our_config(peer), Embodiment(), *openpi_normalisers(openpi, our_config(peer)), ByteTokenizer())
    load_weights(ours, openpi)
    lerobot = load_lerobot(folder, Embodiment(), our_config(peer), ByteTokenizer())
    seen, seeds = observation(), [torch.Generator().manual_seed(2) for _ in range(2)]
    # The conventions' epsilons differ: 1e-6 of a span of about 1.
    assert (ours.infer(seen, seeds[0]) - lerobot.infer(seen, seeds[1])).abs().max() <= 2e-5
    (openpi / "norm_stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"exactly one norm_stats\.json, found \['lab/task/norm_stats\.json', "):
        openpi_normalisers(openpi, our_config(peer))
    with pytest.raises(ValueError, match="found none"):
        openpi_normalisers(folder, our_config(peer))


def test_lerobot_opens_what_we_write(pair, peer_folder, tmp_path_factory):
    from lerobot.configs import PreTrainedConfig
    from lerobot.processor import PolicyProcessorPipeline

    from tests.learner.pi0.peer import shrunk

    peer, _ = pair
    folder, _, _ = peer_folder
    policy = load_lerobot(folder, Embodiment(), our_config(peer), ByteTokenizer())
    written = tmp_path_factory.mktemp("ours")
    for name, content in bundle_files(policy).items():
        (written / name).write_bytes(content)
    config = PreTrainedConfig.from_pretrained(written)
    with shrunk(tiny(peer.name)):
        back = type(peer).from_pretrained(written, config=config, strict=False)
    ours, theirs = to_released(policy.model), back.state_dict()
    assert all(torch.equal(ours[key], theirs[f"model.{key}"]) for key in ours)
    override = {"tokenizer_processor": {"tokenizer": ByteTokenizer(), "tokenizer_name": None}}
    before = PolicyProcessorPipeline.from_pretrained(written, "policy_preprocessor.json", overrides=override)
    seen = observation()
    batch = peer_batch(before, seen)
    assert torch.allclose(batch["observation.state"], policy.state_normaliser(seen.state), atol=1e-6)
    assert torch.equal(batch["observation.language.tokens"], policy._inputs(seen)[2])


def test_bundle_round_trip(pair, peer_folder, tmp_path_factory):
    """As the loop saves and the policy server loads, critic included."""
    peer, _ = pair
    folder, _, _ = peer_folder
    options = dict(add_value_head=True, value_hidden=[8, 4])
    policy = load_lerobot(folder, Embodiment(), our_config(peer, **options), ByteTokenizer())
    written = tmp_path_factory.mktemp("bundles") / "000001"
    write_bundle(written, dict(bundle_files(policy)), Embodiment(), 1, 0, 0, {})
    back = cast(Pi0Policy, load_policy(written))
    back._tokenizer = ByteTokenizer()
    assert back.config == policy.config
    seen, seeds = observation(), [torch.Generator().manual_seed(2) for _ in range(2)]
    assert torch.equal(back.infer(seen, seeds[0]), policy.infer(seen, seeds[1]))
    assert torch.equal(back.value(back.prepare(seen)), policy.value(policy.prepare(seen)))
    (written / "heads.safetensors").unlink()
    with pytest.raises(ValueError, match="heads.safetensors"):
        load_policy(written)


def test_one_error_names_every_key_that_does_not_fit(pair, peer_folder):
    peer, _ = pair
    folder, _, _ = peer_folder
    tensors = {key: value.clone() for key, value in peer.state_dict().items()}
    del tensors["model.action_in_proj.bias"]
    tensors["model.action_out_proj.bias"] = torch.zeros(5)
    tensors["model.surplus"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_lerobot(folder, Embodiment(), our_config(peer), ByteTokenizer())
    for line in ("missing: action_in_proj.bias", "unexpected: surplus", "misshapen: action_out_proj.bias is (5,)"):
        assert line in str(error.value)
    allow = ["action_in_proj.bias", "action_out_proj.bias", "surplus"]
    load_lerobot(folder, Embodiment(), our_config(peer), ByteTokenizer(), allow=allow)
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_lerobot(folder, Embodiment(), our_config(peer), ByteTokenizer())
    other = "pi0" if peer.name == "pi05" else "pi05"
    with pytest.raises(ValueError, match="checkpoint, the policy is"):
        load_lerobot(folder, Embodiment(), Pi0Config(model=tiny(other), num_action_chunks=3), ByteTokenizer())


@pytest.mark.parametrize("mode", ["QUANTILES", "MEAN_STD", "MIN_MAX", "IDENTITY"])
def test_normalisation_equals_lerobots(mode):
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor import NormalizerProcessorStep

    values = statistics()["action"]
    values["q99"][2] = values["q01"][2]  # an axis that nothing used
    step = NormalizerProcessorStep(
        features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        norm_map={FeatureType.ACTION: NormalizationMode(mode)},
        stats={"action": values},
    )
    ours, x = Normaliser(mode, values), torch.randn(4, 7)
    torch.testing.assert_close(ours(x), step._normalize_action(x, inverse=False), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.inverse(x), step._normalize_action(x, inverse=True), rtol=1e-6, atol=1e-6)


def test_a_policy_of_either_variant_trains_and_samples(pair):
    """Smoke over the interface that the loop calls."""
    peer, _ = pair
    units = Normaliser("QUANTILES", statistics()["action"])
    policy = Pi0Policy(our_config(peer, add_value_head=True), Embodiment(), units, units, ByteTokenizer())
    prepared = policy.prepare(observation())
    sample = policy.sample(prepared)
    scores = policy.scores(prepared, sample.chain, sample.denoise_index)
    assert sample.actions.shape == (2, 6, 7)
    assert scores.log_prob.shape == sample.log_prob.shape == (2, 3, 7)
    assert sample.value.shape == scores.entropy.shape == (2,)
