"""The engines agree with one another, and say what really runs."""

import numpy as np
import pytest
from UNetSegmentationLib.engines import choose_engine, installed, make_engine
from UNetSegmentationLib.image import UserError, read_image
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.model import find_model

FOLDERS = {"lung-nodule-2d": "lidc_nodules", "hippocampus-3d": "msd_hippocampus"}


class Compared:
    """Runs the first engine, and keeps the largest difference to the second."""

    def __init__(self, first, second):
        self.first, self.second, self.worst = first, second, 0.0

    def run(self, batch):
        out = self.first.run(batch)
        self.worst = max(self.worst, float(np.abs(out - self.second.run(batch)).max()))
        return out

    def describe(self):
        return self.first.describe()


@pytest.mark.parametrize("other", ["torch", "openvino"])
@pytest.mark.parametrize("name", list(FOLDERS))
def test_logits_equal_those_of_onnx_runtime_on_real_cases(name, other, data):
    if not installed(other):
        pytest.skip(f"{other} is not installed")
    model = find_model(name)
    pair = Compared(make_engine(model, "onnx", "cpu", "fp32", 0), make_engine(model, other, "cpu", "fp32", 0))
    for path in sorted((data / FOLDERS[name] / "images").iterdir())[:3]:
        predict(read_image(path), [model], Options(tta="none"), engines=[pair])
    # OpenVINO's instance norm sums in float32 over a whole channel: 6e-3 in hippocampus-3d 1.1.0.
    assert 0 < pair.worst < (1e-4 if other == "torch" else 1e-2)


def test_automatic_choice_runs_and_a_missing_gpu_is_said():
    model = find_model("hippocampus-3d")
    assert "CPU" in choose_engine(model, device="cpu").describe() or "cpu" in choose_engine(model, device="cpu").describe()
    text = choose_engine(model, device="gpu").describe()
    assert any(word in text for word in ("CUDA", "Dml", "CoreML", "cuda", "mps", "no usable GPU"))
    asked = make_engine(model, "onnx", "gpu", "auto", 0).describe()
    assert any(word in asked for word in ("CUDA", "Dml", "CoreML", "none is usable"))


def test_a_threads_setting_changes_nothing_in_the_result(make_package):
    batch = np.random.default_rng(0).random((1, 1, 16, 16, 16), np.float32)
    model = make_package()
    one, two = (choose_engine(model, "onnx", threads=n).run(batch) for n in (1, 2))
    assert np.array_equal(one, two)


def test_unknown_names_and_missing_weights_are_one_sentence(make_package):
    model = make_package()
    for options in ({"engine": "caffe"}, {"device": "tpu"}, {"precision": "int4"}):
        with pytest.raises(UserError, match="choose one of"):
            choose_engine(model, **options)
    if installed("torch"):
        with pytest.raises(UserError, match="no PyTorch weights"):
            make_engine(model, "torch", "cpu", "fp32", 0)


def test_a_network_that_does_not_fit_its_card_is_refused(make_package):
    model = make_package()
    other = make_package(dimensions=2, patch=[16, 16], divisor=[4, 4])
    mixed = type(model)(model.path, other.card, model.onnx, None)
    with pytest.raises(UserError, match="as its card says"):
        make_engine(mixed, "onnx", "cpu", "fp32", 0)
