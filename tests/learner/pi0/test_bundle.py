"""Policy folders without a peer: adapters kept or merged, nothing unused in them; openpi's normalisation by hand."""

import copy
import json

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from bridge.checkpoint import write_bundle
from bridge.embodiment import Embodiment
from learner.flow import FlowConfig
from learner.load import load_policy
from learner.pi0.adapters import LoraConfig, adapter_weights
from learner.pi0.bundle import bundle_files, load_lerobot
from learner.pi0.config import tiny
from learner.pi0.model import Pi0Model
from learner.pi0.normalise import Normaliser
from learner.pi0.weights import load_released, to_released
from tests.learner.pi0.test_policy import make, observation, parameter_count
from tests.learner.pi0.words import ByteTokenizer

BOTH = LoraConfig(4, on_prefix=True, on_expert=True)


def adapted(**options):
    """A policy whose adapters do something."""
    policy = make(lora=copy.deepcopy(BOTH), **options)
    with torch.no_grad():
        for name, parameter in adapter_weights(policy.model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy


def actions(policy) -> torch.Tensor:
    return policy.infer(observation(), torch.Generator().manual_seed(3))


def written(policy, folder):
    write_bundle(folder, dict(bundle_files(policy)), Embodiment(), 1, 0, 0, {})
    return folder


def opened(folder):
    policy = load_policy(folder)
    policy._tokenizer = ByteTokenizer()
    return policy


def test_lora_starts_neutral_trains_alone_and_merges():
    plain, fresh = make(), make(lora=BOTH)
    assert torch.allclose(actions(plain), actions(fresh), atol=1e-6)
    names = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert any("language" in name and "lora_A" in name for name in names)
    assert any("vision" in name and "lora_B" in name for name in names)
    assert not any("base_layer" in name for name in names)
    policy, merged = adapted(), make()
    load_released(merged.model, to_released(policy.model), (), "merged")
    assert not torch.allclose(actions(policy), actions(plain), atol=1e-3)
    assert torch.allclose(actions(policy), actions(merged), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_come_back_bit_for_bit_and_train_on(tmp_path, dtype):
    """As if it had not been saved: the next update's loss and gradients are the same bits."""
    flow = FlowConfig(method="flow_noise", joint=True)
    policy = adapted(dtype=dtype, flow=flow, add_value_head=True).eval()
    back = opened(written(policy, tmp_path / "000001"))
    assert torch.equal(actions(back), actions(policy))
    assert back.config == policy.config
    found = []
    for each in (policy, back):
        prepared = each.prepare(observation())
        sample = each.sample(prepared, torch.Generator().manual_seed(1))
        scores = each.scores(prepared, sample.chain, sample.denoise_index)
        (scores.log_prob.sum() + scores.value.sum()).backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() >= {f"model.{name}" for name in adapter_weights(policy.model)}
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_a_folder_with_adapters_is_never_opened_without_them(tmp_path):
    policy = adapted()
    folder = written(policy, tmp_path / "000001")
    assert json.loads((folder / "config.json").read_text())["type"] == "pi05_lora"
    with pytest.raises(ValueError, match="is a 'pi05_lora' checkpoint, the policy is 'pi05'"):
        load_lerobot(folder, Embodiment(), policy.config)
    from lerobot.configs import PreTrainedConfig

    with pytest.raises(Exception, match="pi05_lora"):
        PreTrainedConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapters.safetensors")
    gone = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != gone}, folder / "adapters.safetensors")
    with pytest.raises(ValueError, match=f"missing model.{gone}|missing {gone}"):
        load_policy(folder)
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapters\.safetensors"):
        load_policy(folder)


def test_a_merged_export_is_a_plain_policy(tmp_path):
    policy = adapted()
    policy.config.lora.merge_on_save = True
    folder = written(policy, tmp_path / "000001")
    assert json.loads((folder / "config.json").read_text())["type"] == "pi05"
    assert not (folder / "adapters.safetensors").exists()
    plain = opened(folder)
    assert not adapter_weights(plain.model)
    assert torch.allclose(actions(plain), actions(policy), atol=1e-4)
    lerobot = load_lerobot(folder, Embodiment(), make().config, ByteTokenizer())
    assert torch.equal(actions(lerobot), actions(plain))


@pytest.mark.parametrize("variant", ["pi05", "pi0"])
def test_unused_heads_are_neither_allocated_nor_sent(variant):
    config = tiny(variant)
    assert sum(p.numel() for p in Pi0Model(config).parameters()) == parameter_count(config)
    sent = load(bundle_files(make(variant))["model.safetensors"])
    assert sum(tensor.numel() for tensor in sent.values()) == parameter_count(config)
    assert not any("lm_head" in key for key in sent)


def test_openpis_normalisation_by_hand_and_in_lerobots_terms():
    x = torch.tensor([0.0, 1.0, 3.0])
    low, high = torch.tensor([0.0, 0.5, 0.0]), torch.tensor([4.0, 1.0, 0.0])
    quantiles = Normaliser("QUANTILES", {"q01": low, "q99": high}, "openpi")
    expected = torch.tensor([2 * 0 / (4 + 1e-6) - 1, 2 * 0.5 / (0.5 + 1e-6) - 1, 2 * 3 / 1e-6 - 1])
    torch.testing.assert_close(quantiles(x), expected)
    moments = Normaliser("MEAN_STD", {"mean": torch.ones(3), "std": torch.tensor([2.0, 0.5, 0.0])}, "openpi")
    torch.testing.assert_close(moments(x), torch.tensor([-1 / (2 + 1e-6), 0.0, 2 / 1e-6]))
    for normaliser in (quantiles, moments):
        torch.testing.assert_close(normaliser.inverse(normaliser(x)), x)
        torch.testing.assert_close(normaliser.as_lerobot()(x), normaliser(x), rtol=1e-2, atol=1e-5)
