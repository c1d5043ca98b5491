"""The engines agree with one another, and say what really runs."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from UNetSegmentationLib import engines
from UNetSegmentationLib.engines import choose_engine, installed, make_engine
from UNetSegmentationLib.image import Image, UserError, read_image
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.model import Card, find_model, write_package
from workers import make_card, make_onnx

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


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_an_engine_keeps_no_id_of_the_computer_to_report_runs_with(engine, tmp_path):
    if not installed(engine):
        pytest.skip(f"{engine} is not installed")
    code = "import sys\nfrom UNetSegmentationLib import *\nfrom UNetSegmentationLib.engines import make_engine\n"
    code += "import numpy as np\nmodel = find_model('hippocampus-3d')\nmake_engine(model, sys.argv[1], 'cpu', 'auto', 0)"
    code += ".run(np.zeros((1, 1, *model.card.patch), np.float32))"
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "USERPROFILE", "LOCALAPPDATA", "TEMP"), str(tmp_path))
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | places
    subprocess.run([sys.executable, "-c", code, engine], check=True, env=env | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert not list(tmp_path.rglob("*"))


def test_automatic_choice_runs_and_a_missing_gpu_is_said():
    model = find_model("hippocampus-3d")
    assert "CPU" in choose_engine(model, device="cpu").describe() or "cpu" in choose_engine(model, device="cpu").describe()
    text = choose_engine(model, device="gpu").describe()
    assert any(word in text for word in ("CUDA", "Dml", "CoreML", "cuda", "mps", "no usable GPU"))
    asked = make_engine(model, "onnx", "gpu", "auto", 0).describe()
    assert any(word in asked for word in ("CUDA", "Dml", "CoreML", "none is usable"))


def test_pytorch_that_knows_no_gpu_is_not_imported_to_ask_for_one(monkeypatch):
    asked = []
    monkeypatch.setitem(sys.modules, "UNetSegmentationLib.engines.torch", SimpleNamespace(gpu_device=lambda: asked.append(1)))
    for build, times in (("2.13.0+cpu", 0), ("2.13.0+cu130", 1)):
        monkeypatch.setattr(engines, "version", lambda name, build=build: build)
        assert not engines._has_gpu("torch", find_model("hippocampus-3d")) and len(asked) == times


def test_a_threads_setting_changes_nothing_in_the_result(make_package):
    batch = np.random.default_rng(0).random((1, 1, 16, 16, 16), np.float32)
    model = make_package()
    one, two = (choose_engine(model, "onnx", threads=n).run(batch) for n in (1, 2))
    assert np.array_equal(one, two)


def test_more_threads_than_cores_are_all_of_them(make_package, monkeypatch):
    """With thousands ONNX Runtime did not come to an end, and PyTorch's process died."""
    monkeypatch.setattr(engines, "make_engine", lambda *arguments: arguments[-1])
    monkeypatch.setattr(engines.os, "cpu_count", lambda: 2)
    model = make_package()
    assert [choose_engine(model, "onnx", threads=n) for n in (0, 1, 2, 3, 10**20)] == [0, 1, 2, 0, 0]
    with pytest.raises(UserError, match="must be 0 .all cores. or more, not -1"):
        choose_engine(model, threads=-1)


def test_unknown_names_and_missing_weights_are_one_sentence(make_package):
    model = make_package()
    for options in ({"engine": "caffe"}, {"device": "tpu"}, {"precision": "int4"}):
        with pytest.raises(UserError, match="choose one of"):
            choose_engine(model, **options)
    if installed("torch"):
        with pytest.raises(UserError, match="no PyTorch weights"):
            make_engine(model, "torch", "cpu", "fp32", 0)


def test_where_no_engine_works_onnx_says_why(make_package, monkeypatch):
    """PyTorch, which was tried last, said of a package without its weights to use the engine onnx."""

    def none(package, engine, *rest):
        raise UserError(f"{engine} fails.")

    monkeypatch.setattr(engines, "make_engine", none)
    with pytest.raises(UserError, match="^onnx fails"):
        choose_engine(make_package(), device="cpu")


def test_a_network_that_does_not_fit_its_card_is_refused(make_package):
    model = make_package()
    other = make_package(dimensions=2, patch=[16, 16], divisor=[4, 4])
    mixed = type(model)(model.path, other.card, model.onnx, None)
    with pytest.raises(UserError, match="as its card says"):
        make_engine(mixed, "onnx", "cpu", "fp32", 0)


def test_a_package_that_cannot_be_loaded_is_one_sentence(monkeypatch, make_package):
    """As onnxruntime on Windows without Microsoft's runtime, and PyTorch there without one of its DLLs."""
    monkeypatch.setitem(sys.modules, "UNetSegmentationLib.engines.onnx", None)
    with pytest.raises(UserError, match="package onnxruntime cannot be loaded .*; install it again"):
        make_engine(make_package(), "onnx", "cpu", "auto", 0)

    class Full:
        def __getattr__(self, name):
            raise OSError("[WinError 1455] The paging file is too small for this operation to complete")

    monkeypatch.setitem(sys.modules, "UNetSegmentationLib.engines.onnx", Full())
    with pytest.raises(UserError, match="cannot be loaded .*paging file.*; close other programs"):
        make_engine(make_package(), "onnx", "cpu", "auto", 0)
    if installed("torch") or installed("openvino"):
        text = choose_engine(find_model("hippocampus-3d")).describe()
        assert "ONNX" not in text and text.startswith(("OpenVINO", "PyTorch"))


def test_a_gpu_that_does_not_work_is_passed_over_and_said(monkeypatch, capfd):
    """ONNX Runtime with its CUDA provider but without CUDA; PyTorch with a device that lacks operators, or computes nonsense."""
    import onnxruntime

    model = find_model("hippocampus-3d")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    loaded = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print(loaded.append(1)), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of ONNX Runtime, which this build has no such provider for
        assert "none is usable" in make_engine(model, "onnx", "gpu", "auto", 0).describe()
        assert loaded == [1] and capfd.readouterr().out == ""  # PyTorch's CUDA was looked for, and the report on stdout left alone
        if not installed("torch"):
            pytest.skip("torch is not installed")
        from UNetSegmentationLib.engines import torch as engine

        monkeypatch.setattr(engines, "version", lambda name: "2.13.0+cu130")
        monkeypatch.setattr(engine, "gpu_device", lambda: "meta")  # a device of PyTorch's that has shapes only
        with pytest.raises(UserError, match="failed while it ran the network on meta"):
            make_engine(model, "torch", "gpu", "auto", 0)
        chosen = choose_engine(model)
    text = chosen.describe()
    assert "CPU" in text and "GPU provider cannot be used" in text and "on meta" in text
    assert chosen.run(np.zeros((1, 1, 16, 16, 16), np.float32)).shape == (1, 3, 16, 16, 16)

    monkeypatch.setattr(engine, "gpu_device", lambda: "cpu")
    assert "PyTorch" in make_engine(model, "torch", "gpu", "bf16", 0).describe()  # half precision is near enough
    run = engine.TorchEngine.run
    monkeypatch.setattr(engine.TorchEngine, "run", lambda self, batch: np.roll(run(self, batch), 1, axis=1))
    with pytest.raises(UserError, match="gives wrong values on this computer's cpu"):
        make_engine(model, "torch", "gpu", "auto", 0)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might"), "no kernel image"),
        (
            NotImplementedError("The operator 'aten::max_pool3d_with_indices' is not currently implemented for the MPS device."),
            "max_pool3d",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"), "memory is full"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: you tried"), "memory is full"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "memory is full"),
        (RuntimeError("Couldn't open shared file mapping: <torch_1_2_0>, error code: <1455>"), "memory is full"),
        (RuntimeError("[WinError 1455] Die Auslagerungsdatei ist zu klein"), "memory is full"),
    ],
)
def test_what_pytorch_raises_is_one_sentence(monkeypatch, error, sentence):
    if not installed("torch"):
        pytest.skip("torch is not installed")
    import torch

    def fail(*_):
        raise error

    engine = make_engine(find_model("lung-nodule-2d"), "torch", "cpu", "auto", 0)
    monkeypatch.setattr(torch, "from_numpy", fail)  # where the batch goes to the device
    with pytest.raises(UserError, match=sentence) as raised:
        engine.run(np.zeros((1, 3, 32, 32), np.float32))
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_the_weights_say_how_large_a_network_is_and_not_the_card():
    if not installed("torch"):
        pytest.skip("torch is not installed")
    import torch
    from UNetSegmentationLib.engines.torch import load_network

    model = find_model("lung-nodule-2d")  # in float16, with batch norm
    network = load_network(model)
    kinds = {(k.endswith("num_batches_tracked"), v.dtype, v.device.type) for k, v in network.state_dict().items()}
    assert kinds == {(True, torch.int64, "cpu"), (False, torch.float32, "cpu")} and not network.training
    claimed = model.card.data["network"]
    huge = Card({**model.card.data, "network": {**claimed, "channels": [10**6] * len(claimed["channels"])}})
    with pytest.raises(UserError, match="do not fit the network of its card .Error.s. in loading"):  # and not: can't allocate memory
        load_network(replace(model, card=huge))


def test_coreml_is_for_slices_only(monkeypatch):
    import onnxruntime
    from UNetSegmentationLib.engines.onnx import gpu_providers

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CoreMLExecutionProvider", "CPUExecutionProvider"])
    assert gpu_providers(2) == ["CoreMLExecutionProvider"] and gpu_providers(3) == []


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_precision_that_is_not_to_be_had_is_said(engine):
    if not installed(engine):
        pytest.skip(f"{engine} is not installed")
    model = find_model("lung-nodule-2d")
    assert "asked for" not in make_engine(model, engine, "cpu", "fp32", 0).describe()
    text = make_engine(model, engine, "cpu", "bf16", 0).describe()
    assert "bf16 was asked for" in text or ", bf16" in text


def test_openvino_says_why_it_fails_and_where_the_memory_is_full():
    if not installed("openvino"):
        pytest.skip("openvino is not installed")
    with pytest.raises(UserError, match="cannot load .*Expected only (non negative|positive)"):  # and no place in its source
        make_engine(find_model("lung-nodule-2d"), "openvino", "cpu", "auto", -1)
    engine = make_engine(find_model("lung-nodule-2d"), "openvino", "cpu", "auto", 0)
    with pytest.raises(UserError, match="failed while it ran the network .Can't set the input tensor"):
        engine.run(np.zeros((1, 5, 16, 16)))
    engine._model = lambda batch: [np.zeros((0, 2, 0, 0))]  # what it gives where the memory is full
    with pytest.raises(UserError, match="memory is full"):
        engine.run(np.zeros((1, 3, 16, 16)))


def test_openvino_finds_one_of_several_gpus(monkeypatch):
    if not installed("openvino"):
        pytest.skip("openvino is not installed")
    import openvino

    class Two(openvino.Core):
        available_devices = ("CPU", "GPU.0", "GPU.1")

        def compile_model(self, model, device, settings):
            asked.append(device)
            return super().compile_model(model, "CPU", settings)

    asked = []
    monkeypatch.setattr(openvino, "Core", Two)
    text = make_engine(find_model("lung-nodule-2d"), "openvino", "gpu", "auto", 0).describe()
    assert asked == ["GPU"] and "none is usable" not in text


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_network_exported_for_one_batch_takes_any(make_package, tmp_path, engine, size):
    if not installed(engine):
        pytest.skip(f"{engine} is not installed")
    onnx = pytest.importorskip("onnx")
    card = make_card()
    network = onnx.load_from_string(make_onnx("threshold", card))
    for port in (network.graph.input[0], network.graph.output[0]):
        port.type.tensor_type.shape.dim[0].dim_value = size
    fixed = write_package(tmp_path / "fixed-1.0.0.unet.zip", card, network.SerializeToString())
    image = Image(np.random.default_rng(0).random((30, 30, 30), np.float32))
    want = predict(image, [make_package()], Options(engine=engine)).labels.array
    for batch in (1, 3, 4):
        assert np.array_equal(predict(image, [fixed], Options(engine=engine, batch=batch)).labels.array, want)


def test_an_openvino_that_is_half_removed_is_passed_over(make_package, monkeypatch, tmp_path):
    (tmp_path / "openvino" / "libs").mkdir(parents=True)
    left, find = PathFinder.find_spec("openvino", [str(tmp_path)]), find_spec
    with monkeypatch.context() as m:
        m.setattr("importlib.util.find_spec", lambda name: left if name == "openvino" else find(name))
        assert not installed("openvino") and choose_engine(make_package(), device="cpu").describe().startswith("ONNX Runtime")
    # With its module, but not what that should load.
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(__spec__=SimpleNamespace(origin="here")))
    assert installed("openvino")
    with pytest.raises(UserError, match="OpenVINO cannot load .*Core.*; use another engine"):
        make_engine(make_package(), "openvino", "cpu", "auto", 0)
    text = choose_engine(make_package(), device="cpu").describe()
    assert text.startswith("ONNX Runtime") and "OpenVINO cannot load" in text
