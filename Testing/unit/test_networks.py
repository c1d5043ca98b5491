"""The U-Nets: the paper's numbers, shapes, gradients, and what the options change."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from UNetSegmentationLib.networks import UNetConfig, build  # noqa: E402
from UNetSegmentationLib.networks.unet import deep_supervision_targets  # noqa: E402


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_ronneberger2015_is_the_papers():
    model = build("ronneberger2015")
    assert parameters(model) == 31_030_658
    assert [m.kernel_size for m in model.modules() if isinstance(m, torch.nn.Conv2d)].count((3, 3)) == 18
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in model.modules()) == 4
    assert [(m.kernel_size, m.stride) for m in model.modules() if isinstance(m, torch.nn.ConvTranspose2d)] == [((2, 2), (2, 2))] * 4
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 64, 96)).shape == (1, 2, 64, 96)


def test_valid_padding_gives_the_papers_sizes():
    model = build("ronneberger2015", padding="valid", channels=(2, 2, 2, 2, 2))
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)


SMALL = UNetConfig(dimensions=3, in_channels=2, out_channels=3, channels=(4, 8, 8))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, norm="batch", activation="relu"),
        replace(SMALL, norm="none", residual=True),
        replace(SMALL, residual=True, down="conv"),
        replace(SMALL, strides=((1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3))),
        UNetConfig(dimensions=2, in_channels=2, out_channels=3, channels=(4, 8, 8), residual=True),
    ],
)
def test_every_option_keeps_the_size_and_trains_every_weight(config):
    torch.manual_seed(0)
    model = build(config)
    size = [2 * d for d in config.divisor]
    logits = model(torch.randn(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_divisor_of_anisotropic_strides():
    assert replace(SMALL, strides=((1, 2, 2), (2, 2, 2))).divisor == (2, 4, 4)


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    plain = build(SMALL)
    lean = build(replace(SMALL, checkpointing=True))
    lean.load_state_dict(plain.state_dict())
    grads = []
    for model in (plain, lean):
        x = torch.ones(1, 2, 8, 8, 8, requires_grad=True)
        (model(x * torch.linspace(-1, 1, 8)) ** 2).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_checkpointing_averages_a_batch_in_once():
    plain, lean = (build(replace(SMALL, norm="batch", checkpointing=lean)) for lean in (False, True))
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(2, 2, 8, 8, 8, requires_grad=True)
    for model in (plain, lean):
        for _ in range(2):
            model(x).square().mean().backward()
    kept = lean.state_dict()
    for key, value in plain.state_dict().items():
        assert not key.endswith(("running_mean", "running_var")) or torch.equal(kept[key], value), key


def test_deep_supervision_gives_each_level_in_training_and_one_output_otherwise():
    model = build(replace(SMALL, deep_supervision=True))
    x = torch.randn(1, 2, 8, 8, 8)
    outputs = model.train()(x)
    assert [tuple(o.shape[2:]) for o in outputs] == [(8, 8, 8), (4, 4, 4)]
    target = torch.randint(0, 3, (1, 8, 8, 8))
    assert [tuple(t.shape[1:]) for t in deep_supervision_targets(target, outputs)] == [(8, 8, 8), (4, 4, 4)]
    assert model.eval()(x).shape == (1, 3, 8, 8, 8)


def test_config_survives_json_and_refuses_nonsense():
    assert UNetConfig.from_json(SMALL.to_json()) == SMALL
    for bad in ({"norm": "group"}, {"dimensions": 4}, {"strides": ((2, 2),)}, {"padding": "valid", "residual": True}):
        with pytest.raises(ValueError):
            replace(SMALL, **bad)
    with pytest.raises(ValueError, match="unknown"):
        UNetConfig.from_json({"depth": 3})
