"""The walk of benchmarks/correct_retrain.py in miniature, on real scans: correct, retrain, use; killed in between; its table."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
for name in ("monai", "lightning", "onnx", "pydantic"):
    pytest.importorskip(name)
from UNetSegmentationLib.dataset import Dataset  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.model import ModelPackage  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("correct_retrain", ROOT / "benchmarks" / "correct_retrain.py")
    module = sys.modules["correct_retrain"] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setting(bench):
    small = {"maps": (8, 16, 32), "patch": (24, 32, 24), "epochs": 1, "steps": (20, 40), "rate": 5e-3, "random": 0}
    return bench.Setting(rounds=(2, 5), base=4, validation=1, pool=7, held_out=3, labels=("Hippocampus",), **small)


def test_corrections_raise_the_dice_on_patients_that_no_model_has_seen(bench, setting, data, tmp_path, monkeypatch):
    """Killed in the middle of the corrections and before a fine-tuning, it goes on; done once, nothing is done again."""
    scans = data / "msd_hippocampus"
    walk = bench.Walk(scans, tmp_path, setting, lambda text: None)
    roles = [{c.patient for c in cases} for cases in (walk.base, walk.validation, walk.pool, walk.held_out)]
    assert [len(r) for r in roles] == [3, 1, 7, 3] and len(set.union(*roles)) == 14  # nobody has two roles

    added = []

    def killed(*words, **more):
        raise KeyboardInterrupt

    def add(self, *words, name=None, model_mask=None, **more):
        if model_mask is not None:
            added.append(name)
            if len(added) == 2:
                raise KeyboardInterrupt
        return real_add(self, *words, name=name, model_mask=model_mask, **more)

    real_add = Dataset.add
    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "add", add)
        with pytest.raises(KeyboardInterrupt):
            walk.arm("ours")
    walk.base_model()
    with monkeypatch.context() as patch:
        patch.setattr(bench, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.Walk(scans, tmp_path, setting, lambda text: None).arm("ours")
    points = bench.Walk(scans, tmp_path, setting, lambda text: None).arm("ours")

    dice = [p["dice"]["mean"] for p in points]
    assert min(dice[1:]) > dice[0] + 0.05  # trainings of a few seconds are too noisy to rank the rounds themselves
    entries = Dataset.open(tmp_path / "ours" / "dataset").entries
    corrected = points[1]["added"]["cases"] + points[2]["added"]["cases"]
    assert len(corrected) == len(set(corrected)) == 5 and len(entries) == 9
    assert all(entries[n].version == 1 and entries[n].model and entries[n].changes for n in corrected)
    assert points[2]["added"]["dice_before"] > points[1]["added"]["dice_before"]  # less is left to correct
    last = ModelPackage.read(tmp_path / "ours" / "005" / "walk-2.2.0.unet.zip").card.data["lineage"]
    assert "2.1.0" in json.dumps(last["parent"]) and last["parity"]["largest_difference"] <= 1e-4

    monkeypatch.setattr(bench, "train", killed)
    again = bench.Walk(scans, tmp_path, setting, lambda text: None).arm("ours")
    assert again == points
    with pytest.raises(UserError, match="holds a walk with other settings"):
        bench.Walk(scans, tmp_path, replace(setting, steps=(50, 40)))
    with pytest.raises(UserError, match=r"leaves \d+ scans to correct, fewer than 500"):
        bench.Walk(scans, tmp_path / "other", replace(setting, rounds=(500,)))


def test_the_table_says_what_corrections_brought(bench, tmp_path):
    setting = bench.Setting(rounds=(2, 5), random=2)
    labels = setting.labels

    def point(corrected, dice, **more):
        figure = {"mean": dice, "low": dice - 0.01, "high": dice + 0.01}
        rows = [{"case": f"c{i}", "patient": f"p{i}", "label": name, "dice": dice + i / 1000} for i in range(4) for name in labels]
        own = {name: {"dice": figure, "hausdorff95_mm": {"mean": 2 - dice}} for name in labels}
        return {"corrected": corrected, "dice": figure, "labels": own, "rows": rows, "seconds": 60.0, **more}

    def line(*dice, cases=("x",)):
        added = [{"cases": list(cases), "changed_ml": 3.0, "dice_before": d} if cases else {"dice_before": None} for d in dice]
        return [point(0, 0.70), *(point(n, d, added=a) for n, d, a in zip(setting.rounds, dice, added))]

    class Done:
        held_out, base, validation, pool = [0] * 4, [0] * 3, [0], [0] * 10
        arms = {
            ("ours", 0): line(0.78, 0.845),
            ("random", 0): line(0.75, 0.82),
            ("random", 1): line(0.77, 0.80),
            ("none", 0): line(0.71, 0.72, cases=()),
        }

        def __init__(self):
            self.setting = setting

        def arm(self, name, seed=0):
            return self.arms[name, seed]

        def full_model(self):
            return point(10, 0.85)

        def tell(self, text): ...

    facts = bench.result(Done())
    assert facts["reached"] == {"ours": [5], "random": [None, None], "none": [None]}
    assert facts["gain"]["mean"] == pytest.approx(0.145) and facts["against_random"][0][1]["mean"] == pytest.approx(0.025)
    assert "rows" not in json.dumps(facts["arms"])
    bench.write(facts, tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text("utf-8")
    assert "| 5 | our order | 0.845 (0.835 to 0.855) | 0.845 | 0.845 | 1.16 | 0.845, 3.0 | 60 s |" in text
    assert "| 5 | random order | 0.810 (draws: 0.820, 0.800) |" in text and "| 2 | no corrections | 0.710" in text
    assert "our order: 5." in text and "random order: none of [2, 5], none of [2, 5]." in text
    assert (tmp_path / "out" / "curve.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))["held_out"] == 4
