"""Losses against MONAI's and torch's, and what they are for."""

import pytest

torch = pytest.importorskip("torch")
monai_losses = pytest.importorskip("monai.losses")

from torch.nn import functional  # noqa: E402
from unetseg_training.cases import IGNORE  # noqa: E402
from unetseg_training.config import Loss  # noqa: E402
from unetseg_training.losses import cross_entropy, make, median_frequency_weights, overlap_loss  # noqa: E402


@pytest.fixture
def sample():
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 8, 9, 7), generator=g)
    target[1][target[1] == 2] = 0  # a label that one patch lacks
    return torch.randn((2, 3, 8, 9, 7), generator=g), target, functional.one_hot(target, 3).movedim(-1, 1).float()


def test_the_parts_equal_monai_and_torch_on_one_device(sample):
    logits, target, truth = sample
    dice = monai_losses.DiceLoss(include_background=False, softmax=True, batch=True, smooth_nr=1, smooth_dr=1)
    assert torch.allclose(overlap_loss(logits, truth), dice(logits, truth), atol=1e-6)
    tversky = monai_losses.TverskyLoss(
        include_background=False, softmax=True, batch=True, alpha=0.3, beta=0.7, smooth_nr=0.5, smooth_dr=0.5
    )
    assert torch.allclose(overlap_loss(logits, truth, 0.3, 0.7), tversky(logits, truth), atol=1e-6)
    assert torch.allclose(cross_entropy(logits, truth), functional.cross_entropy(logits, target), atol=1e-6)
    weights = torch.tensor([0.5, 1.0, 4.0])
    expected = functional.cross_entropy(logits, target, weights, reduction="none").mean()
    assert torch.allclose(cross_entropy(logits, truth, weights), expected, atol=1e-6)


def test_median_frequency_weights():
    # Class 1 has 10 % of the voxels of both cases, class 2 half of a case of its own; class 3 is nowhere.
    counts = [[900, 100, 0, 0], [400, 100, 500, 0]]
    frequencies = [1300 / 2000, 200 / 2000, 500 / 1000]
    weights = median_frequency_weights(counts)
    assert weights == pytest.approx([0.5 / f for f in frequencies] + [0.0])


@pytest.mark.parametrize("kind", ["ce", "dice", "dice_ce", "focal", "tversky", "boundary"])
def test_every_loss_is_less_for_a_better_answer_and_has_gradients(sample, kind):
    logits, target, truth = sample
    weights = "median-frequency" if kind in ("ce", "focal") else "none"
    loss = make(Loss(kind=kind, class_weights=weights), 3, [[800, 100, 100], [900, 100, 0]])
    good = (8 * truth).requires_grad_()
    poor = logits.clone().requires_grad_()
    assert loss(good, target) < loss(poor, target)
    loss(poor, target).backward()
    assert torch.isfinite(poor.grad).all() and poor.grad.abs().sum() > 0


def test_a_wrong_rare_class_costs_more_with_weights(sample):
    _, target, truth = sample
    rare = functional.one_hot(torch.where(target == 2, 0, target), 3).movedim(-1, 1).float()  # class 2 taken for background
    common = functional.one_hot(torch.where(target == 1, 0, target), 3).movedim(-1, 1).float()
    loss = make(Loss(kind="ce", class_weights=[1.0, 1.0, 20.0]), 3)
    assert loss(8 * rare, target) > 2 * loss(8 * common, target)


@pytest.mark.parametrize("kind", ["ce", "dice", "dice_ce", "focal", "tversky", "boundary"])
def test_what_nobody_has_judged_does_not_count(sample, kind):
    """The loss of half the slices is that of a patch which holds those alone; what is said of the others changes nothing."""
    logits, target, _ = sample
    part = target.clone()
    part[:, 4:] = IGNORE
    loss = make(Loss(kind=kind), 3, ignores=True)
    whole = logits.clone().requires_grad_()
    value = loss(whole, part)
    value.backward()
    assert torch.isfinite(value) and not whole.grad[:, :, 4:].any() and whole.grad[:, :, :4].any()
    other = torch.cat([logits[:, :, :4], torch.randn(logits[:, :, 4:].shape)], 2)
    assert torch.equal(loss(other, part), value)
    if kind != "boundary":  # distances reach from one slice to the next
        assert torch.allclose(value, make(Loss(kind=kind), 3)(logits[:, :, :4], target[:, :4]), atol=1e-5)
    assert torch.allclose(loss(logits, target), make(Loss(kind=kind), 3)(logits, target), atol=1e-6)
    assert torch.isfinite(loss(logits, torch.full_like(target, IGNORE)))


def test_deep_supervision_weighs_each_level_half_of_the_finer(sample):
    logits, target, truth = sample
    coarse, small = torch.zeros(2, 3, 4, 4, 3), target[:, ::2, ::2, ::2][:, :4, :4, :3]
    loss = make(Loss(kind="ce"), 3)
    fine, low = loss(logits, target), torch.log(torch.tensor(3.0))
    assert small.shape == coarse.shape[:1] + coarse.shape[2:]
    assert torch.allclose(loss([logits, coarse], target), (fine + 0.5 * low) / 1.5, atol=1e-5)
