"""Every figure against a value by hand or from another implementation; empty masks; intervals; the deployed path."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("monai", reason="MONAI is not installed")
pytest.importorskip("torchmetrics", reason="TorchMetrics is not installed")
import SimpleITK as sitk  # noqa: E402
from scipy import ndimage  # noqa: E402
from scipy.spatial.distance import cdist  # noqa: E402
from unetseg_training import metrics, report  # noqa: E402
from unetseg_training.cases import IGNORE, find_cases  # noqa: E402
from unetseg_training.export import _measured, compact  # noqa: E402
from UNetSegmentationLib.dataset import Dataset  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Image, read_image  # noqa: E402
from UNetSegmentationLib.inference.predict import Options  # noqa: E402
from UNetSegmentationLib.model import Label, find_model  # noqa: E402

THING = Label(1, "thing", (0, 0, 0), {})
SPACING = (0.5, 0.8, 2.5)  # x, y, z


def block(shape, start, stop):
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(a, b) for a, b in zip(start, stop))] = 1
    return mask


def blob(seed, shape=(14, 30, 32)):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 3)
    return (noise > np.quantile(noise, 0.8)).astype(np.uint8)


def only(prediction, truth, **how):
    return metrics.score(prediction, truth, how.pop("spacing", SPACING), [THING], **how)["thing"]


@pytest.mark.parametrize("shift, mm", [((2, 0, 0), 5.0), ((0, 3, 0), 2.4), ((0, 0, 4), 2.0)])
def test_a_shifted_block_by_hand(shift, mm):
    shape = (16, 30, 40)
    truth = block(shape, (4, 8, 10), (10, 18, 30))
    moved = block(shape, *([a + s for a, s in zip(corner, shift)] for corner in ((4, 8, 10), (10, 18, 30))))
    row = only(moved, truth)
    size, overlap = 6 * 10 * 20, np.prod([n - s for n, s in zip((6, 10, 20), shift)])
    assert row["dice"] == pytest.approx(overlap / size)
    assert row["sensitivity"] == row["precision"] == pytest.approx(overlap / size)
    assert row["specificity"] == pytest.approx(1 - (size - overlap) / (np.prod(shape) - size))
    assert row["hausdorff_mm"] == row["hausdorff95_mm"] == pytest.approx(mm)
    assert row["volume_ml"] == row["truth_ml"] == pytest.approx(size * 0.5 * 0.8 * 2.5 / 1000)
    assert row["volume_error_ml"] == row["volume_error_percent"] == 0
    assert only(moved, truth, tolerance_mm=mm)["surface_dice"] == pytest.approx(1)
    assert only(moved, truth, tolerance_mm=mm - 0.1)["surface_dice"] < 0.9


@pytest.mark.parametrize("seed", range(3))
def test_distances_equal_those_of_all_pairs_of_surface_voxels(seed):
    a, b = blob(seed), blob(seed + 10)

    def surface(mask):
        inner = ndimage.binary_erosion(np.pad(mask, 1))[1:-1, 1:-1, 1:-1]
        return np.argwhere(mask.astype(bool) & ~inner) * SPACING[::-1]

    pairs = cdist(surface(a), surface(b))
    row = only(a, b)
    assert row["hausdorff_mm"] == pytest.approx(max(pairs.min(0).max(), pairs.min(1).max()), rel=1e-5)
    assert row["hausdorff95_mm"] == pytest.approx(max(np.percentile(pairs.min(k), 95) for k in (0, 1)), rel=1e-5)
    measures = sitk.LabelOverlapMeasuresImageFilter()
    measures.Execute(sitk.GetImageFromArray(a), sitk.GetImageFromArray(b))
    assert row["dice"] == pytest.approx(measures.GetDiceCoefficient())


def test_voxels_that_nobody_has_judged_are_left_out():
    """Of an image whose other half is not judged, all figures are those of the half alone."""
    truth, found = blob(1), blob(2)
    p = np.random.default_rng(0).random(truth.shape).astype(np.float32)[None]
    half = truth.copy()
    half[7:] = IGNORE
    row, alone = only(found, half, probability=p), only(found[:7], truth[:7], probability=p[:, :7])
    assert row.pop("roc") == alone.pop("roc") and row == pytest.approx(alone) and row["auc"] is not None


def test_surface_dice_of_a_block_inside_a_larger_one():
    inner, outer = block((30, 30, 30), (8, 8, 8), (22, 22, 22)), block((30, 30, 30), (7, 7, 7), (23, 23, 23))
    for tolerance, low, high in ((0.9, 0, 0), (1.0, 0.7, 1), (1.8, 1, 1)):  # faces are 1 mm apart, corners 1.73 mm
        assert low <= only(inner, outer, spacing=(1, 1, 1), tolerance_mm=tolerance)["surface_dice"] <= high


def test_a_picture_is_measured_in_its_plane():
    truth, moved = block((1, 40, 40), (0, 10, 10), (1, 20, 20)), block((1, 40, 40), (0, 10, 13), (1, 20, 23))
    row = only(moved, truth, spacing=(2.0, 1.0, 1.0))
    assert row["hausdorff_mm"] == pytest.approx(6.0) and row["dice"] == pytest.approx(0.7)
    assert 0 < row["surface_dice"] < 1


def test_empty_masks_give_what_the_table_promises():
    nothing, thing = np.zeros((6, 8, 8), np.uint8), block((6, 8, 8), (2, 2, 2), (4, 4, 4))
    p = np.full((1, 6, 8, 8), 0.5, np.float32)
    absent, missed, false = only(nothing, nothing, probability=p), only(nothing, thing, probability=p), only(thing, nothing, probability=p)
    keys = ("dice", *metrics.FIGURES[2:9])
    assert [absent[k] for k in keys] == [1, None, None, None, None, 1, None, None] and absent["state"] == "absent"
    assert [missed[k] for k in keys] == [0, None, None, 0, 0, 1, None, 0.5] and missed["state"] == "missed"
    assert [false[k] for k in keys] == [0, None, None, 0, None, pytest.approx(1 - 8 / 384), 0, None] and false["state"] == "false"
    assert missed["volume_error_percent"] == -100 and false["volume_error_percent"] is None
    assert false["volume_error_ml"] == pytest.approx(0.008)


def test_a_model_that_finds_nothing_gains_little_by_the_cases_without_a_label(tmp_path):
    nothing, thing = np.zeros((6, 8, 8), np.uint8), block((6, 8, 8), (2, 2, 2), (4, 4, 4))
    rows = [{"case": n, "patient": n, "label": "thing", **only(nothing, t)} for n, t in (("a", thing), ("b", thing), ("c", nothing))]
    facts = metrics.summary(rows)
    own = facts["labels"]["thing"]
    assert own["dice"]["mean"] == pytest.approx(1 / 3, abs=1e-5) and own["dice"]["cases"] == 3
    assert own["dice_where_present"]["mean"] == 0 and own["dice_where_present"]["cases"] == own["missed"] == own["present"] == 2
    assert not {"hausdorff_mm", "hausdorff95_mm"} & set(own) and own["surface_dice"]["cases"] == 2
    head, cells = (line.split() for line in metrics.table(facts).splitlines())
    assert "0.333" in cells and "0.000" in cells and "dice_where_present" in head and "hausdorff95_mm" not in head
    card = "\n".join(_measured(compact(facts)))
    assert "| label | Dice | Dice where present | surface Dice |" in card and "| thing | 0.333 (0.000 to 1.000) | 0.000 (" in card
    metrics.write(tmp_path, rows, facts)
    page = report.write(tmp_path).read_text("utf-8")
    assert "Dice where present</th>" in page and "leaves out the cases without it" in page and "HD 95 % (mm)</th>" not in page
    assert "dice_where_present" not in metrics.summary(rows[:2])["labels"]["thing"]  # it would say the same as the Dice


def test_roc_equals_the_rank_statistic_ties_and_all():
    rng = np.random.default_rng(0)
    truth = (rng.random((3, 10, 10)) < 0.3).astype(np.uint8)
    p = np.clip(np.round(rng.random(truth.shape) * 0.6 + 0.3 * truth, 1), 0, 1).astype(np.float32)
    row = only(truth, truth, probability=p[None])
    pos, neg = p[truth == 1].astype(float)[:, None], p[truth == 0].astype(float)[None]
    assert row["auc"] == pytest.approx(np.mean((pos > neg) + 0.5 * (pos == neg)), abs=1e-6)
    roc = row["roc"]
    assert len(roc) == len(metrics.FPR) and roc[-1] == 1 and roc == sorted(roc)
    assert only(truth, truth, probability=truth[None].astype(np.float32))["auc"] == 1


def test_intervals_are_seeded_and_near_the_theory():
    values = np.random.default_rng(1).normal(0.8, 0.1, 200)
    low, high = metrics.interval(values)
    assert (low, high) == metrics.interval(values)
    error = 1.96 * values.std() / np.sqrt(200)
    assert low == pytest.approx(values.mean() - error, abs=2e-3) and high == pytest.approx(values.mean() + error, abs=2e-3)
    assert metrics.interval(values, seed=7) != (low, high)


def test_scans_of_one_patient_are_not_counted_as_patients():
    values = np.repeat(np.random.default_rng(2).normal(0.8, 0.1, 20), 10)
    alone, grouped = metrics.interval(values), metrics.interval(values, np.repeat(np.arange(20).astype(str), 10))
    assert (grouped[1] - grouped[0]) > 2.5 * (alone[1] - alone[0])
    assert metrics.interval([0.5, 0.6], ["a", "a"]) is None is metrics.interval([])
    rows = [{"case": f"c{i}", "patient": f"p{i // 5}", "label": "x", "dice": 0.5 + 0.1 * (i // 5)} for i in range(20)]
    own, wanted = metrics.summary(rows)["labels"]["x"]["dice"], metrics.interval([r["dice"] for r in rows], [r["patient"] for r in rows])
    assert (own["low"], own["high"]) == pytest.approx(wanted, abs=1e-5)


def volume(*labels):
    """Blocks of the toy network's values 0, 1, 2 one beside the other."""
    array = np.zeros((8, 16, 16), np.float32)
    for value in labels:
        array[2:6, 2:8, 7 * value - 5 : 7 * value] = value
    return array


def test_evaluate_scores_the_deployed_path_and_writes_it(make_package, tmp_path):
    labels = [{"value": 1, "name": "one"}, {"value": 2, "name": "two"}]
    package = make_package(labels=labels)
    both, second = volume(1, 2), volume(2)
    names = [Label(1, "two", (0, 0, 0), {}), Label(2, "other", (0, 0, 0), {}), Label(3, "one", (0, 0, 0), {})]
    truth = np.select([both == 1, both == 2], [3, 1], 0).astype(np.uint8)  # the truth's values are others
    shown = []
    rows = metrics.evaluate(
        package, [("a", Image(both), truth, "P1"), ("b", Image(second), truth, "P2")], labels=names, seen=lambda *a: shown.append(a)
    )
    by = {(r["case"], r["label"]): r for r in rows}
    assert [by[k]["dice"] for k in (("a", "one"), ("a", "two"), ("b", "one"), ("b", "two"))] == [1, 1, 0, 1]
    assert by["b", "one"]["state"] == "missed" and by["a", "one"]["auc"] == 1
    assert [len(s[2]) for s in shown] == [2, 2] and set(np.unique(shown[0][0].truth)) == {0, 1, 2}
    facts = metrics.summary(rows, tolerance_mm=1.0)
    assert facts["dice"]["mean"] == 0.75 and facts["cases"] == facts["patients"] == 2
    assert facts["labels"]["one"]["volume_error_percent"]["worst_tenth"] == 90  # of 0 and -100
    assert facts["labels"]["one"]["missed"] == 1 and facts["labels"]["one"]["hausdorff_mm"]["cases"] == 1
    assert "missed" in metrics.table(facts) and "1/2" in metrics.table(facts)
    metrics.write(tmp_path, rows, facts)
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8"))["summary"]["dice"]["mean"] == 0.75
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as f:
        assert [r["dice"] for r in csv.DictReader(f)] == ["1.0", "1.0", "0.0", "1.0"]
    row = {"case": "=cmd|calc!A1", "label": "@thing", "dice": 0.5, "volume_error_ml": -2.0}
    metrics.write(tmp_path, [row], facts)
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as f:  # a spreadsheet would run it
        assert list(csv.reader(f))[1] == ["'=cmd|calc!A1", "'@thing", "0.5", "-2.0"]
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8"))["rows"] == [row]


def test_a_table_that_is_open_elsewhere_costs_no_figure(tmp_path, monkeypatch, capsys):
    """As Excel holds a file on Windows."""
    (tmp_path / "metrics.csv").write_text("old")

    def held(path, to, _replace=Path.replace):
        if Path(to).suffix == ".csv":
            raise PermissionError(13, "Permission denied")
        return _replace(path, to)

    monkeypatch.setattr(Path, "replace", held)
    metrics.write(tmp_path, [{"case": "a", "dice": 0.5}], {"cases": 1})
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8"))["rows"] == [{"case": "a", "dice": 0.5}]
    said = capsys.readouterr().err
    assert "metrics.csv cannot be written, as it may be open in another program" in said and "metrics.json has the same figures" in said
    assert sorted(f.name for f in tmp_path.iterdir()) == ["metrics.csv", "metrics.json"]


def test_labels_are_the_same_however_they_are_spelt(make_package):
    case = ("a", Image(volume(1)), 3 * volume(1).astype(np.uint8))
    rows = metrics.evaluate(make_package(), [case], labels=[Label(3, "Thing ", (0, 0, 0), {})])
    assert [(r["label"], r["dice"]) for r in rows] == [("thing", 1)]


def test_voxels_that_nobody_has_judged_stay_so_in_the_models_own_values(make_package):
    truth = 3 * volume(1).astype(np.uint8)
    truth[:4][truth[:4] > 0] = IGNORE
    (row,) = metrics.evaluate(make_package(), [("a", Image(volume(1)), truth)], labels=[Label(3, "thing", (0, 0, 0), {})])
    assert row["precision"] == 1 and row["auc"] == 1


def test_two_scans_of_one_patient_have_no_interval(make_package, tmp_path):
    dataset = Dataset.create(tmp_path / "set", "set", [THING], ["CT"])
    for noise in (0.0, 0.1):  # one image twice would be refused
        dataset.add(Image(volume(1) + noise), volume(1).astype(np.uint8), patient="P1")
    facts = metrics.summary(metrics.evaluate(make_package(), metrics.case_items(find_cases(dataset.folder))))
    assert (facts["cases"], facts["patients"]) == (2, 1) and facts["dice"]["low"] is None


def test_what_cannot_be_scored_is_said_in_a_sentence(make_package):
    package = make_package()
    with pytest.raises(UserError, match="no case with a mask"):
        metrics.evaluate(package, [])
    with pytest.raises(UserError, match="^case7: .*grid"):
        metrics.evaluate(package, [("case7", Image(volume(1)), np.zeros((2, 2, 2), np.uint8))])
    with pytest.raises(UserError, match="no label thing"):
        metrics.evaluate(package, [], labels=[Label(1, "liver", (0, 0, 0), {})])
    with pytest.raises(UserError, match="by simulated clicks"):
        metrics.evaluate(find_model("lung-nodule-click"), [])


class Half:
    """An engine that finds everything everywhere."""

    def run(self, batch):
        return np.stack([np.zeros_like(batch[:, 0]), np.ones_like(batch[:, 0])], 1)

    def describe(self):
        return "half"


def test_a_network_that_is_not_exported_takes_the_same_path(make_package):
    truth = volume(1).astype(np.uint8)
    rows = metrics.evaluate(make_package(), [("a", Image(volume(1)), truth)], Options(tta="none"), surfaces=False, engine=Half())
    assert rows[0]["sensitivity"] == 1 and rows[0]["precision"] == pytest.approx(truth.mean()) and "hausdorff_mm" not in rows[0]


def test_changes_are_paired():
    rows = [{"case": f"c{i}", "patient": f"c{i}", "label": "x", "dice": 0.5 + 0.01 * i} for i in range(20)]
    better = [{**r, "dice": r["dice"] + 0.02} for r in rows]
    change = metrics.difference(rows, better)
    assert change["mean"] == change["low"] == change["high"] == 0.02 and change["cases"] == 20
    with pytest.raises(UserError, match="share no case"):
        metrics.difference(rows, [])


def test_the_bundled_model_scores_what_its_note_says_on_a_real_case(data):
    package = find_model("hippocampus-3d")
    path = sorted((data / "msd_hippocampus" / "images").iterdir())[0]
    truth = read_image(data / "msd_hippocampus" / "labels" / path.name).array
    rows = metrics.evaluate(package, [(path.name, read_image(path), truth)], Options(engine="onnx", device="cpu"))
    for row in rows:
        assert row["dice"] > 0.8 and row["hausdorff95_mm"] < 4 and row["surface_dice"] > 0.8 and row["auc"] > 0.99
        assert row["hausdorff95_mm"] <= row["hausdorff_mm"]


def test_a_cell_is_measured_in_its_own_voxels():
    """0.02 mm wide, within 1 mm any mask of it would be right, and two decimals of a millimetre would show nothing."""
    truth, moved = block((1, 300, 300), (0, 100, 100), (1, 200, 200)), block((1, 300, 300), (0, 100, 150), (1, 200, 250))
    spacing = (0.0002,) * 3
    row = only(moved, truth, spacing=spacing)
    assert row["tolerance_mm"] == pytest.approx(0.001) and row["surface_dice"] < 0.7
    assert only(moved, truth, spacing=(1, 1, 1))["tolerance_mm"] == 1
    facts = metrics.summary([{"case": "a", "patient": "a", "label": "thing", **row}])
    assert facts["tolerance_mm"] == 0.001 and facts["labels"]["thing"]["hausdorff_mm"]["mean"] == pytest.approx(0.01)
    row = only(block((1, 300, 300), (0, 100, 103), (1, 200, 202)), truth, spacing=spacing)
    facts = metrics.summary([{"case": "a", "patient": "a", "label": "thing", **row}])
    head, cells = (line.split() for line in metrics.table(facts).splitlines())
    shown = dict(zip(head, cells))
    assert float(shown["hausdorff_mm"]) == pytest.approx(0.0006) and float(shown["volume_error_ml"]) == pytest.approx(-8e-13, rel=0.1)
