"""What the worker costs over calling predict() directly, against the bound of 5 % or 50 ms on a whole volume.

    .venv/bin/python benchmarks/worker.py

A 128x256x256 int16 volume and a small convolutional network of random weights (or --model), with the uncertainty, whose
map is the largest thing that travels; both ways alternate, and the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "UNetSegmentation"))

from UNetSegmentationLib.image import Image
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.model import ModelPackage, find_model, write_package
from UNetSegmentationLib.worker.client import WorkerClient

SHAPE = (128, 256, 256)


def small_network(path: Path) -> ModelPackage:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(0, 0.2, (8, 1, 3, 3, 3)), "b": rng.normal(0, 0.5, (2, 8, 1, 1, 1))}
    nodes = [
        helper.make_node("Conv", ["image", "a"], ["x"], pads=[1] * 6),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Conv", ["y", "b"], ["logits"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, "D", "H", "W"]) for n, c in (("image", 1), ("logits", 2))]
    initial = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], initial)
    card = {
        "format": 1,
        "name": "small",
        "version": "1.0.0",
        "task": "automatic",
        "dimensions": 3,
        "channels": ["CT"],
        "spacing": [None] * 3,
        "patch": [64] * 3,
        "divisor": [4] * 3,
        "intensity": {"mode": "zscore"},
        "labels": [{"value": 1, "name": "thing"}],
        "activation": "softmax",
        "licence": "Apache-2.0",
    }
    return write_package(
        path, card, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a package's name or file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--overlap", type=float, default=0.0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    image = Image(rng.normal(0, 200, SHAPE).astype(np.int16), (0.8, 0.8, 1.5))
    options = Options(threads=arguments.threads, overlap=arguments.overlap, uncertainty=True, tta="none", device="cpu", engine="onnx")
    with tempfile.TemporaryDirectory() as folder, WorkerClient() as client:
        model = find_model(arguments.model) if arguments.model else small_network(Path(folder, "small-1.0.0.unet.zip"))
        began = time.perf_counter()
        client.start()
        start = time.perf_counter() - began
        began = time.perf_counter()
        volume = client.load_volume(image)
        load = time.perf_counter() - began
        client.predict(volume, [model], options)  # makes the engine; predict() below gets a ready one too
        from UNetSegmentationLib.engines import choose_engine

        engines = [choose_engine(model, options.engine, options.device, options.precision, options.threads)]
        seconds: dict[str, list[float]] = {"direct": [], "worker": []}
        for _ in range(arguments.runs):
            began = time.perf_counter()
            direct = predict(image, [model], options, engines=engines)
            seconds["direct"].append(time.perf_counter() - began)
            began = time.perf_counter()
            through = client.predict(volume, [model], options)
            seconds["worker"].append(time.perf_counter() - began)
        same = np.array_equal(direct.labels.array, through.labels.array)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    overhead = medians["worker"] - medians["direct"]
    print(
        json.dumps(
            {
                "model": model.card.name,
                "shape": SHAPE,
                "direct_s": round(medians["direct"], 3),
                "worker_s": round(medians["worker"], 3),
                "overhead_ms": round(1000 * overhead, 1),
                "overhead_percent": round(100 * overhead / medians["direct"], 2),
                "runs_s": {name: [round(v, 3) for v in values] for name, values in seconds.items()},
                "start_s": round(start, 3),
                "load_volume_s": round(load, 3),
                "same_labels": same,
            }
        )
    )
    sys.exit(not same or (overhead > 0.05 * medians["direct"] and overhead > 0.05))


if __name__ == "__main__":
    main()
