import math

import pytest
import torch

from learner.flow import FlowConfig
from learner.pi0.augment import AugmentConfig, augment, recoloured, warped
from learner.policy import SftBatch
from tests.learner.pi0.test_policy import PLAIN, make, no_padding, observation

CAMERAS = ["third_person", "wrist"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int = 4, size: int = 28) -> torch.Tensor:
    """Smooth, so that a bilinear look-up between pixels is near the truth."""
    x = torch.linspace(-1, 1, size)
    waves = [torch.sin(2 * x[:, None] + phase) * torch.cos(3 * x + phase) for phase in range(3 * batch)]
    return 0.8 * torch.stack(waves).view(batch, 3, size, size)


def test_at_zero_nothing_changes():
    images = torch.stack([pictures(), pictures().flip(3)], dim=1)
    assert torch.allclose(augment(images, CAMERAS, PLAIN, seeded(0)), images, atol=1e-6)


def test_turns_and_crops_by_hand():
    x = pictures(2)
    still, none = torch.zeros(2, 2), torch.zeros(2)
    turned = warped(x, 1.0, still, torch.tensor([math.pi / 2, 0.0]))
    assert torch.allclose(turned[0], x[0].rot90(1, (1, 2)), atol=1e-5)
    assert torch.allclose(turned[1], x[1], atol=1e-5)
    # The upper left and the lower right quarter, each pixel now two wide: pairs average to the quarter itself.
    quarters = warped(x, 0.5, torch.tensor([[-0.5, -0.5], [0.5, 0.5]]), none)
    halved = torch.nn.functional.avg_pool2d(quarters, 2)[..., 1:-1, 1:-1]
    expected = torch.stack([x[0, :, :14, :14], x[1, :, 14:, 14:]])[..., 1:-1, 1:-1]
    assert torch.allclose(halved, expected, atol=0.02)
    corner = warped(torch.ones(1, 3, 28, 28), 1.0, torch.zeros(1, 2), torch.tensor([math.pi / 4]))
    assert corner[0, :, 0, 0].tolist() == [-1.0] * 3, "black comes in"
    assert corner[0, 0, 14, 14] == 1.0


def test_colours_by_hand():
    one = torch.ones(1)
    x = torch.tensor([[0.2, 0.4], [0.6, 0.4], [0.4, 0.4]]).view(1, 3, 1, 2)  # mean 0.4; grey 0.4 and 0.4
    for factors, expected in (
        ((1.5 * one, one, one), [[0.3, 0.6], [0.9, 0.6], [0.6, 0.6]]),
        ((one, 0.5 * one, one), [[0.3, 0.4], [0.5, 0.4], [0.4, 0.4]]),
        ((one, one, 0 * one), [[0.4, 0.4]] * 3),
        ((2 * one, one, one), [[0.4, 0.8], [1.0, 0.8], [0.8, 0.8]]),  # 1.2 is cut
    ):
        got = (recoloured(2 * x - 1, *factors) + 1) / 2
        assert torch.allclose(got.view(3, 2), torch.tensor(expected), atol=1e-6)


def test_each_picture_has_its_own_draw_and_a_seed_repeats_them():
    images = pictures(1).expand(2, 2, 3, 28, 28)  # the same four times
    found = augment(images, CAMERAS, AugmentConfig(), seeded(1))
    assert torch.equal(found, augment(images, CAMERAS, AugmentConfig(), seeded(1)))
    different = found.flatten(0, 1).flatten(1)
    assert torch.cdist(different, different).fill_diagonal_(1.0).min() > 0.01
    assert (found.abs() <= 1).all()


def test_a_camera_on_the_hand_is_only_recoloured():
    colourless = AugmentConfig(brightness=0.0, contrast=0.0, saturation=0.0)
    images = torch.stack([pictures(), pictures()], dim=1)
    found = augment(images, CAMERAS, colourless, seeded(2))
    assert torch.allclose(found[:, 1], images[:, 1], atol=1e-6)
    assert ((found[:, 0] - images[:, 0]).abs().amax((1, 2, 3)) > 0.05).all()
    everything_moves = AugmentConfig(brightness=0.0, contrast=0.0, saturation=0.0, steady=[])
    assert torch.equal(augment(images, CAMERAS, everything_moves, seeded(2))[:, 0], found[:, 0])


def test_demonstrations_are_augmented_and_nothing_else():
    policy, plain = make(), make(augment=PLAIN)
    seen = observation()
    batch = SftBatch(seen, torch.rand(3, 6, 7, generator=seeded(3)), no_padding())
    loss = [each.sft_loss(batch, seeded(4)).item() for each in (policy, policy, plain)]
    assert loss[0] == loss[1] != loss[2]
    assert torch.equal(policy.infer(seen, seeded(5)), plain.infer(seen, seeded(5)))
    flow = FlowConfig(method="flow_sde", num_steps=2)
    prepared = [make(augment=each, flow=flow).prepare(seen).keys_values for each in (AugmentConfig(), PLAIN)]
    assert torch.equal(*prepared)


@pytest.mark.parametrize(
    ("name", "value"), [("crop", 0.0), ("crop", 1.2), ("rotate_deg", -1.0), ("brightness", 1.5), ("saturation", -0.1)]
)
def test_ranges_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"augment.{name} {value}"):
        AugmentConfig(**{name: value})
