"""The command `unetseg`: results, and for bad input one sentence, exit code 2 and nothing written."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from UNetSegmentationLib import cli, files
from UNetSegmentationLib.dataset import Dataset
from UNetSegmentationLib.files import expand_arguments
from UNetSegmentationLib.image import Box, Image, UserError, read_image, write_image
from UNetSegmentationLib.inference.click import BEYOND, ClickSession, box_prompt
from UNetSegmentationLib.inference.predict import Options
from UNetSegmentationLib.model import SUFFIX, ModelPackage, find_model, write_package
from UNetSegmentationLib.nodule import COLUMNS, NOTE, describe, row
from workers import make_card, make_onnx

pytest.importorskip("typer")
ROOT = Path(__file__).resolve().parents[2]
WINDOW = {"mode": "window", "level": -300, "width": 1400}
TILTED = (0.0, -1.0, 0.0, 0.96, 0.0, -0.28, 0.28, 0.0, 0.96)
SPACING, ORIGIN = (0.8, 0.9, 2.0), (-31.5, 42.25, -107.0)


def scene(n: int = 20) -> np.ndarray:
    """Values in [0, 1]: noise below 0.45, and a box of 6 x 8 x 10 voxels at 0.9."""
    values = np.random.default_rng(0).uniform(0, 0.45, (n, 24, 28)).astype(np.float32)
    values[8:14, 8:16, 10:20] = 0.9
    return values


@pytest.fixture
def here(tmp_path, monkeypatch, make_package):
    """A scan, a model, an empty folder for results, and an empty current folder."""
    out, current = tmp_path / "out", tmp_path / "current"
    out.mkdir()
    current.mkdir()
    monkeypatch.chdir(current)
    scan = tmp_path / "scan.nrrd"
    image = Image(scene(), SPACING, ORIGIN, TILTED)
    write_image(image, scan)

    def write(array, name="other.nrrd", spacing=SPACING, origin=ORIGIN):
        write_image(Image(array, spacing, origin, TILTED), tmp_path / name)
        return tmp_path / name

    def content(content, name="other.nrrd"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def left():
        return sorted(str(p.relative_to(tmp_path)) for folder in (out, current) for p in folder.rglob("*"))

    return SimpleNamespace(
        out=out,
        current=current,
        scan=scan,
        image=image,
        write=write,
        content=content,
        left=left,
        package=make_package,
        model=make_package().path,
    )


def subprocess_run(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "UNetSegmentation"), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "UNetSegmentationLib", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env, timeout=120)


def one_sentence(result, sentence):
    code, out, err = result
    assert code == 2 and out == "", (code, out, err)
    assert len(err.splitlines()) == 1 and err.startswith("unetseg: ") and err.rstrip().endswith("."), err
    assert sentence in err, err


# ----------------------------------------------------------------------------------------------------------- good input


def test_a_real_process_segments_and_writes_everything(here):
    out = here.out / "new" / "folder"
    names = {"seg": "a.seg.nrrd", "nii": "a.nii.gz", "json": "a.json", "u": "u.nii.gz", "p": "p.nrrd", "png": "a.png"}
    path = {k: out / v for k, v in names.items()}
    done = subprocess_run(
        *("segment", here.scan, "--model", here.model, "-o", path["seg"], "-o", path["nii"], "--json", path["json"]),
        *("--uncertainty", path["u"], "--probabilities", path["p"], "--picture", path["png"], "--display", "0.5,1"),
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert all(f"wrote {path[k]}" in done.stderr for k in ("seg", "nii", "u", "p", "png"))
    assert sorted(p.name for p in out.iterdir()) == sorted(names.values())
    want = here.image.array > 0.5
    for key in ("seg", "nii"):
        labels = read_image(path[key])
        assert np.array_equal(labels.array, want) and labels.same_grid(here.image)
    header = sitk.ReadImage(str(path["seg"]))
    assert header.GetMetaData("Segment0_Name") == "thing" and header.GetMetaData("Segment0_LabelValue") == "1"
    uncertainty, probabilities = read_image(path["u"]), read_image(path["p"])
    assert uncertainty.same_grid(here.image) and 0 <= uncertainty.array.min() and 0.05 < uncertainty.array.max() <= 1
    np.testing.assert_allclose(probabilities.array.sum(0), 1, atol=1e-5)
    assert np.array_equal(probabilities.array[1] > 0.5, want)
    assert path["png"].read_bytes().startswith(b"\x89PNG")
    report = json.loads(path["json"].read_text("utf-8"))
    (item,) = report["labels"]
    assert item["name"] == "thing" and item["voxels"] == 480 and item["volume_mm3"] == pytest.approx(480 * 0.8 * 0.9 * 2)
    assert item["mean_hu"] == pytest.approx(0.9) and report["warnings"] == [] and report["points_are"] == "LPS mm"
    assert report["model"] == "toy-1.0.0" and report["image"] == str(here.scan) and report["roi_ijk"] == [[0, 27], [0, 23], [0, 19]]
    np.testing.assert_allclose(item["center"], here.image.index_to_point((14.5, 11.5, 10.5)), atol=1e-4)


def test_without_a_name_the_result_lies_in_the_current_folder_under_the_scans_name(here, unetseg):
    code, out, err = unetseg("segment", here.scan, "-m", here.model)
    assert code == 0 and here.left() == ["current/scan.seg.nrrd"] and "wrote scan.seg.nrrd" in err and out == ""
    assert "0.691" in err  # 480 voxels in ml


def test_without_a_name_nothing_is_replaced(here, unetseg, monkeypatch):
    """Slicer gives a corrected mask this very name."""
    for name in ("predict", "ClickSession"):
        monkeypatch.setattr(cli, name, lambda *a, **k: pytest.fail("it computes"))
    (here.current / "scan.seg.nrrd").write_text("by hand")
    click = here.package(task="click", spacing=[1, 1, 1], patch=[16, 24, 24]).path
    for command in (("segment", here.scan, "-m", here.model), ("click", here.scan, "-m", click, "--at=0,0,0")):
        one_sentence(unetseg(*command), "scan.seg.nrrd is there already; name the result with -o.")
    assert (here.current / "scan.seg.nrrd").read_text() == "by hand" and here.left() == ["current/scan.seg.nrrd"]


def test_what_is_known_before_it_is_computed_is_said_then_and_once(here, unetseg, monkeypatch):
    compute = cli.predict

    def predict(*arguments):
        print("it computes", file=sys.stderr)
        return compute(*arguments)

    monkeypatch.setattr(cli, "predict", predict)
    model = here.package(roi_mm=10, intensity=WINDOW).path  # the scan is 40 mm, and from 0 to 1
    code, out, err = unetseg("segment", here.scan, "-m", model, "-o", here.out / "a.nrrd", "--json", "-", "-q")
    no_hu, whole = json.loads(out)["warnings"]
    assert code == 0 and "do not look like HU" in no_hu and "not for a whole scan; give a box or a point" in whole
    assert err.splitlines() == [f"warning: {no_hu}", f"warning: {whole}", "it computes"]
    one_sentence(unetseg("segment", here.scan, "-m", model, "-o", here.out / "a.nrrd", "--at", "999,0,0"), "point lies outside the image")


def test_quiet_says_nothing_and_json_goes_to_standard_output(here, unetseg):
    code, out, err = unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "--json", "-", "-q")
    assert code == 0 and err == "" and json.loads(out)["labels"][0]["voxels"] == 480
    assert here.left() == ["out/a.nrrd"]


@pytest.mark.parametrize("suffix", [".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".mha"])
def test_every_format_holds_the_same_labels_in_the_same_place(here, unetseg, suffix):
    code, _, err = unetseg("segment", here.scan, "-m", here.model, "-o", here.out / f"a{suffix}", "-q")
    labels = read_image(here.out / f"a{suffix}")
    assert code == 0 and np.array_equal(labels.array, here.image.array > 0.5) and labels.same_grid(here.image), err


def test_a_picture_in_gives_a_picture_out(here, unetseg, tmp_path):
    picture = (scene(20)[10] * 255).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(picture), str(tmp_path / "a.png"))
    model = here.package(dimensions=2, intensity={"mode": "percentile", "low": 0, "high": 100}).path
    code, out, err = unetseg("segment", tmp_path / "a.png", "-m", model, "-o", here.out / "a.png", "--json", "-")
    assert code == 0 and np.array_equal(read_image(here.out / "a.png").array[0], picture > 127), err
    report, count = json.loads(out), int(np.count_nonzero(picture > 127))
    (item,), (warning,) = report["labels"], report["warnings"]
    assert report["points_are"] == "pixels" and item["volume_ml"] is None and item["volume_mm3"] == item["voxels"] == count
    assert "a.png has no pixel size, so lengths and areas are in pixels" in warning and warning in err
    assert all(text in err for text in ("area (px)", "longest (px)", "perpendicular (px)", f" {count} ")) and "(mm)" not in err


def test_several_files_are_channels_and_several_models_are_averaged(here, unetseg):
    first = here.package(channels=["T1", "T2"], dimensions=2).path
    second = here.package(channels=["T1", "T2"], spacing=[1, 1, 2]).path
    other = here.write(scene()[::-1].copy())
    code, out, err = unetseg("segment", other, here.scan, "-m", first, "-m", second, "-o", here.out / "a.nrrd", "--json", "-", "-q")
    assert code == 0 and json.loads(out)["model"] == "toy-1.0.0+toy-1.0.0" and len(json.loads(out)["engines"]) == 2, err
    labels = read_image(here.out / "a.nrrd").array
    assert np.mean(labels == (here.image.array > 0.5)) > 0.98


@pytest.mark.parametrize(
    ("roi", "box"),
    [
        ("ijk:0,12,0,23,0,19", np.s_[0:20, 0:24, 0:13]),
        ("ijk:-5,99,9,9,8,99", np.s_[8:20, 9:10, 0:28]),
        ("ijk:10,10,8,8,8,8", np.s_[8:9, 8:9, 10:11]),
    ],
)
def test_a_roi_in_voxels_includes_its_last_ones(here, unetseg, roi, box):
    code, out, err = unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "--roi", roi, "--json", "-", "-q")
    want = np.zeros(here.image.shape, bool)
    want[box] = here.image.array[box] > 0.5
    assert code == 0 and np.array_equal(read_image(here.out / "a.nrrd").array, want), err
    z, y, x = box
    assert json.loads(out)["roi_ijk"] == [[x.start, x.stop - 1], [y.start, y.stop - 1], [z.start, z.stop - 1]]


def test_a_roi_in_mm_is_ras():
    image = Image(np.zeros((10, 20, 30)), (2.0, 1.0, 3.0), (-20.0, -10.0, 5.0))
    # x (LPS) = -20 + 2 i, so i = 4..6 is x = -12..-8, which is R = 8..12; likewise j = 3..5 is A = 5..7, k = 2 is S = 11.
    assert cli.parse_roi("7,13,4.5,7.5,9.5,12.5", image) == Box((2, 3, 4), (3, 6, 7))
    assert cli.parse_point("8,-3.5,11") == (-8, 3.5, 11)


def test_a_point_keeps_its_component(here, unetseg):
    values = scene()
    values[2:4, 1:5, 1:5] = 0.9
    model = here.package(postprocess={"largest_component": True}, roi_mm=200).path
    scan = here.write(values)
    x, y, z = here.image.index_to_point((2, 2, 2))
    code, _, err = unetseg("segment", scan, "-m", model, "-o", here.out / "a.nrrd", "-q", "--at", f"{-x},{-y},{z}")
    assert code == 0 and np.count_nonzero(read_image(here.out / "a.nrrd").array) == 32, err
    code, _, err = unetseg("segment", scan, "-m", model, "-o", here.out / "b.nrrd", "-q", "--at", f"{-x},{-y},{z}", "--no-postprocess")
    assert code == 0 and np.count_nonzero(read_image(here.out / "b.nrrd").array) == 32 + 480, err


def test_a_reference_gives_dice_whatever_its_value(here, unetseg):
    truth = 7 * (here.image.array > 0.5).astype(np.uint8)
    truth[8:11] = 0
    reference = here.write(truth, "truth.nii.gz")
    code, _, err = unetseg(
        "segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "--reference", reference, "--json", here.out / "a.json"
    )
    assert code == 0 and json.loads((here.out / "a.json").read_text())["labels"][0]["dice"] == pytest.approx(2 * 240 / 720, abs=1e-4)
    assert "Dice" in err and "0.667" in err


def test_several_labels_are_compared_by_their_values(here, unetseg):
    model = here.package(labels=[{"value": 3, "name": "low"}, {"value": 9, "name": "high"}]).path
    values = np.zeros((20, 24, 28), np.float32)
    values[2:6, 2:6, 2:6], values[10:14, 10:14, 10:14] = 1, 2
    scan = here.write(values)
    reference = here.write((3 * (values > 0)).astype(np.uint8), "truth.nrrd")
    code, out, _ = unetseg("segment", scan, "-m", model, "-o", here.out / "a.nrrd", "--reference", reference, "--json", "-", "-q")
    labels = read_image(here.out / "a.nrrd").array
    assert code == 0 and np.array_equal(labels, np.where(values == 1, 3, np.where(values == 2, 9, 0)))
    assert [item["dice"] for item in json.loads(out)["labels"]] == [pytest.approx(2 / 3, abs=1e-3), 0]


def test_volumes_of_cells_and_means_of_normalised_values_are_not_told_as_0(capsys):
    from UNetSegmentationLib.cli import _print_report

    cell = {"name": "cell", "volume_ml": 2.34e-7, "longest_mm": 0.0123, "perpendicular_mm": None, "mean_hu": 0.527}
    lesion = {"name": "nodule", "volume_ml": 1.2346, "longest_mm": 12.34, "perpendicular_mm": 9.87, "mean_hu": -31.6}
    report = {"model": "nodules", "image": "ct", "seconds": 1.0, "engines": ["ONNX Runtime"], "points_are": "LPS mm"}
    _print_report(report | {"labels": [cell, lesion]})
    said = capsys.readouterr().err
    assert all(text in said for text in ("2.3e-07", "0.012", "0.53", "1.235", "12.3", "9.9", "-32"))


@pytest.mark.parametrize("quiet", [True, False])
def test_values_that_are_not_hu_are_warned_of_on_stderr_and_in_the_report(here, unetseg, quiet):
    model = here.package(intensity=WINDOW).path
    arguments = ["segment", here.scan, "-m", model, "-o", here.out / "a.nrrd", "--json", here.out / "a.json", *(["-q"] if quiet else [])]
    code, _, err = unetseg(*arguments)
    assert code == 0 and "values do not look like HU" in err
    (warning,) = json.loads((here.out / "a.json").read_text())["warnings"]
    assert "values do not look like HU" in warning


def test_a_persons_window_replaces_the_models(here, unetseg):
    hu = (scene() * 1000 - 500).astype(np.int16)
    scan = here.write(hu)
    model = here.package(intensity=WINDOW).path
    for window, threshold in (("0,200", 0), ("lung", -600), ("-50,100", -50)):
        code, _, err = unetseg("segment", scan, "-m", model, "-o", here.out / "a.nrrd", "-q", "--window", window)
        assert code == 0 and np.array_equal(read_image(here.out / "a.nrrd").array, hu > threshold), err


def test_nothing_found_is_a_result(here, unetseg):
    code, out, err = unetseg("segment", here.write(scene() * 0.1), "-m", here.model, "-o", here.out / "a.seg.nrrd", "--json", "-")
    assert code == 0 and json.loads(out)["labels"][0]["longest_mm"] is None and not read_image(here.out / "a.seg.nrrd").array.any(), err
    assert json.loads(out)["warnings"] == ["Nothing was found; try another ROI or model."] and err.count("Nothing was found") == 1


def test_a_folder_gives_the_result_its_name(tmp_path, monkeypatch):
    from UNetSegmentationLib.cli import _stem

    (tmp_path / "scan").mkdir()
    monkeypatch.chdir(tmp_path / "scan")
    assert _stem(Path(".")) == "scan" and _stem(Path("..")) == tmp_path.name and _stem(Path("a.nii.gz")) == "a"


def test_nothing_found_is_a_result_that_dicom_cannot_hold(here, unetseg, data):
    folder = data / "chest_ct_dicom_LungDx-A0002"
    model = here.package(intensity={"mode": "window", "level": 9000, "width": 100}).path
    code, out, err = unetseg("segment", folder, "-m", model, "-o", here.out / "a.dcm", "-o", here.out / "a.nrrd", "--json", "-", "-q")
    (warning,) = json.loads(out)["warnings"]
    assert code == 0 and "found, so there is no" in warning and here.left() == ["out/a.nrrd"] and err == f"warning: {warning}\n"


def test_names_in_brackets_are_shown_as_they_are(here, unetseg, tmp_path):
    model = here.package(labels=[{"value": 1, "name": "lung [left][/]"}]).path
    (tmp_path / "a[bold].nrrd").write_bytes(here.scan.read_bytes())
    code, _, err = unetseg("segment", tmp_path / "a[bold].nrrd", "-m", model, "-o", here.out / "a.nrrd")
    assert code == 0 and "lung [left][/]" in err and "a[bold].nrrd" in err


def test_a_former_result_is_replaced(here, unetseg):
    target = here.out / "a.nrrd"
    target.write_text("old")
    code, _, err = unetseg("segment", here.scan, "-m", here.model, "-o", target, "-q")
    assert code == 0 and read_image(target).shape == here.image.shape and here.left() == ["out/a.nrrd"], err


def test_a_dicom_folder_with_two_series(here, unetseg, data, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    folder = tmp_path / "scan"
    folder.mkdir()
    for i, file in enumerate(sorted((data / "lung_gtv_dicom_rtstruct" / "pat_3").glob("DCM_IMG*"))[:10]):
        dataset = pydicom.dcmread(file)
        if i >= 6:
            dataset.SeriesInstanceUID = "1.2.3.4"
        dataset.save_as(folder / f"{i}.dcm")
    arguments = ["segment", folder, "-m", here.package(dimensions=2, intensity=WINDOW).path, "-o", here.out / "a.nrrd", "-q"]
    one_sentence(unetseg(*arguments), "2 image series; choose one by its UID")
    one_sentence(unetseg(*arguments, "--series", "9.9"), "holds no series 9.9")
    assert here.left() == []
    code, _, err = unetseg(*arguments, "--series", "1.2.3.4")
    assert code == 0 and err == ""
    assert np.array_equal(read_image(here.out / "a.nrrd").array, read_image(folder, "1.2.3.4").array > -300)


def test_a_series_of_what_is_no_folder_is_refused(here, unetseg):
    click = here.package(task="click", spacing=[1, 1, 1], patch=[16, 24, 24]).path
    out = ("-o", here.out / "a.nrrd", "--series", "1.2")
    mask = ("--mask", here.scan, "--series", "1.2")
    for command in (
        ("segment", here.scan, "-m", here.model, *out),
        ("click", here.scan, "-m", click, "--at=0,0,0", *out),
        ("dataset", "add", here.out / "set", here.scan, *mask),
    ):
        one_sentence(unetseg(*command), f"--series is of a DICOM folder, and {here.scan} is a file; name the folder")
    one_sentence(unetseg("segment", here.out / "none.nrrd", "-m", here.model, *out), "none.nrrd does not exist")
    assert here.left() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows takes the home from elsewhere")
def test_results_in_the_persons_folder_lie_there(here, unetseg, monkeypatch):
    """Shells expand ~ only at the beginning of a word, not in --output=~/x."""
    monkeypatch.setenv("HOME", str(here.out))
    source = f"~/{os.path.relpath(here.scan, here.out)}"
    one_sentence(unetseg("segment", here.scan, "-m", here.model, f"--output={source}"), "is what is read")
    names = ["--output=~/a.nrrd", "--json=~/b/a.json", "--uncertainty=~/u.nrrd"]
    code, _, err = unetseg("segment", here.scan, "-m", here.model, *names, "-q")
    assert code == 0 and here.left() == ["out/a.nrrd", "out/b", "out/b/a.json", "out/u.nrrd"], err


def test_dicom_seg_of_a_multi_frame_file_is_refused_before_anything_is_computed(here, unetseg, data, tmp_path, monkeypatch):
    dataset = pytest.importorskip("pydicom").dcmread(data / "lung_gtv_dicom_rtstruct" / "pat_3" / "DCM_IMG_00000.dcm")
    dataset.NumberOfFrames = 3
    dataset.PixelData = dataset.PixelData * 3
    (tmp_path / "scan").mkdir()
    dataset.save_as(tmp_path / "scan" / "a.dcm")
    for name in ("predict", "ClickSession"):
        monkeypatch.setattr(cli, name, lambda *a, **k: pytest.fail("it computes"))
    click = here.package(task="click", spacing=[1, 1, 1], patch=[16, 24, 24]).path
    sentence = f"needs a DICOM file for each slice and {tmp_path / 'scan'} holds its 3 slices in one (multi-frame); write .seg.nrrd"
    for command in (("segment", "-m", here.model), ("click", "-m", click, "--at=0,0,0")):
        one_sentence(unetseg(command[0], tmp_path / "scan", *command[1:], "-o", here.out / "a.dcm", "-q"), sentence)
    assert here.left() == []


def test_cancelling_writes_nothing(here, unetseg, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "predict", interrupted)
    code, out, err = unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "-q")
    assert (code, out, err) == (130, "", "unetseg: cancelled; nothing was written.\n") and here.left() == []
    # In any other command, and while the command's own modules are imported.
    monkeypatch.setattr(cli, "find_model", interrupted)
    monkeypatch.setattr("UNetSegmentationLib.dataset.Dataset.open", interrupted)
    for command in (["model", "info", "toy"], ["segment", here.scan, "-m", "toy"], ["dataset", "list", here.out]):
        assert unetseg(*command) == (130, "", "unetseg: cancelled.\n")
    monkeypatch.setattr(cli, "_app", interrupted)
    assert unetseg("models") == (130, "", "unetseg: cancelled.\n")


def test_a_full_memory_is_a_sentence(here, unetseg, monkeypatch):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(cli, "predict", full)
    one_sentence(unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "-q"), "not enough memory")
    assert here.left() == []


def test_cancelling_says_what_is_kept(here, unetseg, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_report", interrupted)
    code, _, err = unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "-q")
    assert (code, err) == (130, "unetseg: cancelled; not every result may have been written.\n")
    monkeypatch.setattr("UNetSegmentationLib.worklist.WorkList.segment", interrupted)
    code, _, err = unetseg("worklist", "make", here.out / "list", here.scan, "-m", here.model, "-q")
    assert (code, err.splitlines()[-1]) == (
        130,
        "unetseg: cancelled; what is segmented is kept, and the same command goes on with the others.",
    )
    mask = here.write((here.image.array > 0.5).astype(np.uint8), "mask.nrrd")
    monkeypatch.setattr("UNetSegmentationLib.dataset.Dataset.add", interrupted)
    code, _, err = unetseg("dataset", "add", here.out / "set", here.scan, "-m", mask, "--label", "1=a")
    assert (code, err) == (130, "unetseg: cancelled; nothing was written.\n") and not list(here.out.glob("set/dataset.json"))
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------------------------ bad input


def nrrd(sizes="8 8 8", directions="(1,0,0) (0,1,0) (0,0,1)", n=512):
    header = f"NRRD0004\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: {sizes}\nspace directions: {directions}\n"
    return f"{header}kinds: domain domain domain\nencoding: raw\nspace origin: (0,0,0)\n\n".encode() + bytes(n)


def spoiled(value):
    values = scene()
    values[3, 4, 5] = value
    return values


def truncated(here):
    path = here.write(scene(), "whole.nii.gz")
    return here.content(path.read_bytes()[: path.stat().st_size // 2], "half.nii.gz")


BAD_IMAGES = {
    "missing": (lambda h: "nowhere.nrrd", "nowhere.nrrd does not exist"),
    "an empty folder": (lambda h: h.out, "holds no DICOM image series"),
    "truncated nii.gz": (truncated, "cut short or damaged"),
    "empty": (lambda h: h.content(b"", "empty.nii.gz"), "is empty"),
    "text": (lambda h: h.content(b"What a lovely day.\n" * 9), "cannot be read as an image"),
    "four dimensions": (lambda h: h.write(np.stack([scene()] * 5), "4d.nii.gz"), "5 channels"),
    "colours": (lambda h: h.write(np.zeros((3, 8, 8, 8), np.uint8)), "3 channels"),
    "NaN": (lambda h: h.write(spoiled(np.nan)), "1 voxels that are NaN or infinite"),
    "infinite": (lambda h: h.write(spoiled(-np.inf)), "1 voxels that are NaN or infinite"),
    "no slices": (lambda h: h.content(nrrd("8 8 0", n=0)), "cannot be read"),
    "one slice": (lambda h: h.write(scene()[:1]), "only 1 slice"),
    "spacing 0": (lambda h: h.content(nrrd(directions="(0,0,0) (0,1,0) (0,0,1)")), "spacing"),
    "spacing of a kilometre": (lambda h: h.content(nrrd(directions="(1e6,0,0) (0,1,0) (0,0,1)")), "cannot be right"),
    "spacing NaN": (lambda h: h.content(nrrd(directions="(nan,0,0) (0,1,0) (0,0,1)")), "cannot be read"),
    "sheared": (lambda h: h.content(nrrd(directions="(1,0,0) (0.3,1,0) (0,0,1)")), "right angles"),
    "too few voxels": (lambda h: h.content(nrrd(n=511)), "cut short"),
}


@pytest.mark.parametrize("what", BAD_IMAGES)
def test_bad_images_are_refused(here, unetseg, what):
    make, sentence = BAD_IMAGES[what]
    one_sentence(unetseg("segment", make(here), "-m", here.model, "-o", here.out / "a.nrrd", "--json", here.out / "a.json"), sentence)
    assert here.left() == []


def test_a_real_process_refuses_without_a_traceback(here):
    done = subprocess_run("segment", truncated(here), "-m", here.model, "-o", here.out / "a.nrrd")
    one_sentence((done.returncode, done.stdout, done.stderr), "cut short or damaged")
    assert here.left() == []


def test_one_slice_is_too_few_for_a_model_with_context(here, unetseg):
    one = here.write(scene()[10:11])
    model = here.package(dimensions=2, context_slices=1).path
    one_sentence(unetseg("segment", one, "-m", model, "-o", here.out / "a.nrrd"), "only 1 slice")
    assert here.left() == []
    assert unetseg("segment", one, "-m", here.package(dimensions=2).path, "-o", here.out / "a.nrrd", "-q")[0] == 0


def test_wrong_numbers_of_channels_are_refused(here, unetseg):
    two = here.package(channels=["T1", "T2"]).path
    one_sentence(unetseg("segment", here.scan, "-m", two, "-o", here.out / "a.nrrd"), "toy needs 2 (T1, T2)")
    one_sentence(unetseg("segment", here.scan, here.scan, "-m", here.model, "-o", here.out / "a.nrrd"), "toy needs 1 (CT)")
    other = here.write(scene(), origin=(0.0, 0.0, 0.0))
    one_sentence(unetseg("segment", here.scan, other, "-m", two, "-o", here.out / "a.nrrd"), "does not lie on the grid")
    assert here.left() == []


BAD_OPTIONS = {
    "ROI outside": (["--roi", "5000,5010,0,10,0,10"], "lies outside the image"),
    "ROI outside in voxels": (["--roi", "ijk:28,40,0,3,0,3"], "lies outside the image"),
    "ROI without size": (["--roi", "0,0,0,10,0,10"], "has no size"),
    "ROI upside down": (["--roi", "10,0,0,10,0,10"], "has no size"),
    "ROI in voxels upside down": (["--roi", "ijk:5,4,0,3,0,3"], "has no size"),
    "ROI in half voxels": (["--roi", "ijk:0.5,4,0,3,0,3"], "whole numbers"),
    "ROI of five numbers": (["--roi", "0,1,2,3,4"], "must be 6 numbers"),
    "ROI of words": (["--roi", "here"], "must be 6 numbers"),
    "ROI of NaN": (["--roi", "nan,1,0,1,0,1"], "must be 6 numbers"),
    "empty ROI": (["--roi", ""], "must be 6 numbers"),
    "point outside": (["--at", "5000,0,0"], "point lies outside"),
    "point far outside": (["--at", "1e300,0,0"], "e+300, "),
    "point of two numbers": (["--at", "1,2"], "must be 3 numbers"),
    "point at infinity": (["--at", "inf,0,0"], "must be 3 numbers"),
    "empty point": (["--at", ""], "must be 3 numbers"),
    "unknown window": (["--window", "lungs"], "neither a preset"),
    "empty window": (["--window", ""], "neither a preset"),
    "unknown display": (["--display", "lungs"], "neither a preset"),
    "unknown tta": (["--tta", "mirror"], "no test-time augmentation 'mirror'"),
    "unknown engine": (["--engine", "caffe"], "no engine 'caffe'"),
    "unknown device": (["--device", "tpu"], "no device 'tpu'"),
    "unknown precision": (["--precision", "fp8"], "no precision 'fp8'"),
    "overlap too large": (["--overlap", "0.95"], "overlap must be from 0 to below 0.95"),
    "overlap NaN": (["--overlap", "nan"], "overlap must be"),
    "overlap negative": (["--overlap", "-0.1"], "overlap must be"),
    "unknown model": (["-m", "nothing"], "no model 'nothing'"),
    "missing model": (["-m", "nowhere.unet.zip"], "no model package nowhere.unet.zip"),
    "missing reference": (["--reference", "nowhere.nrrd"], "does not exist"),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_bad_options_are_refused(here, unetseg, what):
    options, sentence = BAD_OPTIONS[what]
    one_sentence(unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", *options), sentence)
    assert here.left() == []


def test_a_reference_on_another_grid_is_refused(here, unetseg):
    for reference in (here.write(np.zeros((20, 24, 27), np.uint8)), here.write(np.zeros((20, 24, 28), np.uint8), spacing=(0.8, 0.9, 2.1))):
        result = unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "--reference", reference)
        one_sentence(result, "resample it")
    assert here.left() == []


def test_a_reference_may_hold_other_segments_or_be_cropped_as_slicer_crops_it(here, unetseg, tmp_path):
    truth = (here.image.array > 0.5).astype(np.uint8)
    truth[:2] = 5
    one = here.write(np.where(truth == 5, 5, truth), "several.nrrd")
    cropped = here.image.like(truth).crop(Box((2, 0, 0), truth.shape))
    write_image(cropped, tmp_path / "c.seg.nrrd", {"Segment0_ID": "a", "Segment0_Name": "a", "Segment0_LabelValue": "1"})
    for reference in (one, tmp_path / "c.seg.nrrd"):
        code, out, err = unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "--reference", reference, "--json", "-")
        assert code == 0 and json.loads(out)["labels"][0]["dice"] == 1, err


def test_a_references_segments_are_known_by_their_names(here, unetseg, tmp_path):
    """Slicer numbers them in the order of its list, and the model's values may be any."""
    truth = (here.image.array > 0.5).astype(np.uint8)
    truth[:2] = 2
    named = {"Segment0_ID": "a", "Segment0_Name": "other", "Segment0_LabelValue": "1"}
    named |= {"Segment1_ID": "b", "Segment1_Name": "thing", "Segment1_LabelValue": "2"}
    named |= {"Segment2_ID": "c", "Segment2_Name": "Nothing", "Segment2_LabelValue": "3"}
    write_image(here.image.like(np.where(truth > 0, 3 - truth, 0).astype(np.uint8)), tmp_path / "n.seg.nrrd", named)
    labels = [{"value": 9, "name": "thing", "color": [230, 159, 0]}, {"value": 10, "name": "Nothing"}]  # whose segment is empty
    for model in (here.model, here.package(labels=labels).path):
        arguments = ("-m", model, "-o", here.out / "a.nrrd", "--reference", tmp_path / "n.seg.nrrd", "--json", "-")
        code, out, err = unetseg("segment", here.scan, *arguments)
        assert code == 0 and json.loads(out)["labels"][0]["dice"] == 1, err


def test_a_reference_none_of_whose_segments_is_a_label_is_not_compared_by_position(here, unetseg, tmp_path):
    named = {f"Segment{i}_{k}": v for i, n in enumerate("ab") for k, v in (("ID", n), ("Name", n), ("LabelValue", str(i + 1)))}
    write_image(here.image.like((here.image.array > 0.5).astype(np.uint8)), tmp_path / "n.seg.nrrd", named)
    result = unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "--reference", tmp_path / "n.seg.nrrd")
    one_sentence(result, "n.seg.nrrd ('a', 'b') has the name of a label of the model ('thing'); rename them")
    assert here.left() == []


def test_a_slice_of_the_scan_is_not_written_over(here, unetseg, data, tmp_path):
    shutil.copytree(data / "lung_gtv_dicom_rtstruct" / "pat_3", tmp_path / "dcm")
    slices = {p: p.read_bytes() for p in (tmp_path / "dcm").glob("DCM_IMG*")}
    first = min(slices)
    for arguments in (("-o", here.out / "a.nrrd", "--json", first), ("-o", first.rename(first.with_suffix(".dcm")))):
        one_sentence(unetseg("segment", tmp_path / "dcm", "-m", here.model, *arguments), "is a slice of a scan that is read")
    first.with_suffix(".dcm").rename(first)
    assert slices == {p: p.read_bytes() for p in (tmp_path / "dcm").glob("DCM_IMG*")} and here.left() == []


def test_a_grey_picture_that_is_stored_in_colour_is_segmented(here, unetseg):
    values = (255 * here.image.array[8]).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([values] * 3, -1), isVector=True), str(here.out / "a.png"))
    model = here.package(dimensions=2, patch=[16, 16], divisor=[1, 1], spacing=[None, None, None], intensity={"mode": "none"}).path
    code, _, err = unetseg("segment", here.out / "a.png", "-m", model, "-o", here.out / "b.png")
    assert code == 0 and np.array_equal(read_image(here.out / "b.png").array[0] > 0, values > 0.5), err


def test_what_is_read_is_not_written_over(here, unetseg):
    before = here.scan.read_bytes()
    one_sentence(unetseg("segment", here.scan, "-m", here.model, "-o", here.scan), "is what is read")
    reference = here.write((here.image.array > 0.5).astype(np.uint8), "truth.nrrd")
    arguments = ("-m", here.model, "-o", here.out / "a.nrrd", "--reference", reference)
    one_sentence(unetseg("segment", here.scan, *arguments, "--json", reference), "is what is read")
    assert here.scan.read_bytes() == before and here.left() == []


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_what_is_read_is_not_written_over_by_another_of_its_names(here, unetseg, tmp_path):
    before = here.scan.read_bytes()
    link = tmp_path / "link.nrrd"
    link.symlink_to(here.scan)
    for read, written in ((here.scan, here.out / ".." / here.scan.name), (link, here.scan), (here.scan, link)):
        one_sentence(unetseg("segment", read, "-m", here.model, "-o", written), "is what is read")
    twice = ("-o", here.out / "a.nrrd", "-o", here.out / ".." / "out" / "a.nrrd")
    one_sentence(unetseg("segment", here.scan, "-m", here.model, *twice), "Two results")
    assert here.scan.read_bytes() == before and link.is_symlink() and here.left() == []


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_a_result_goes_where_a_link_leads_and_keeps_the_rights_of_what_stood_there(here, unetseg):
    place, link = here.out / "kept.nrrd", here.out / "link.nrrd"
    place.write_text("former")
    place.chmod(0o600)
    link.symlink_to(place)
    assert unetseg("segment", here.scan, "-m", here.model, "-o", link, "-q")[0] == 0
    assert link.is_symlink() and place.stat().st_mode & 0o777 == 0o600 and read_image(place).shape == here.image.shape


def test_a_name_that_just_fits_is_written(here, unetseg):
    target = here.out / ("n" * 246 + ".seg.nrrd")  # 255 bytes
    code, _, err = unetseg("segment", here.scan, "-m", here.model, "-o", target, "-q")
    assert code == 0 and here.left() == [f"out/{target.name}"], err


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems know no such names")
def test_a_name_that_is_no_utf8_is_refused(here, data, tmp_path):
    """In a process of its own, which ITK would end."""
    name = tmp_path / os.fsdecode(b"sc\xe4n.nrrd")
    name.write_bytes(here.scan.read_bytes())
    folder = tmp_path / "series"
    folder.mkdir()
    for i, file in enumerate(sorted((data / "lung_gtv_dicom_rtstruct" / "pat_3").glob("DCM_IMG*"))[:3]):
        (folder / os.fsdecode(b"\xe4%d.dcm" % i)).write_bytes(file.read_bytes())
    for source in (name, folder):
        result = subprocess_run("segment", source, "-m", here.model, "-o", here.out / "a.nrrd")
        one_sentence((result.returncode, result.stdout, result.stderr), "has a name that is not UTF-8")
    result = subprocess_run("segment", here.scan, "-m", here.model, "-o", here.out / os.fsdecode(b"\xe4.nrrd"), "-q")
    one_sentence((result.returncode, result.stdout, result.stderr), "has a name that is not UTF-8")
    result = subprocess_run("worklist", "make", here.out / "list", folder, name)
    one_sentence((result.returncode, result.stdout, result.stderr), "has a name that is not UTF-8")
    assert here.left() == []


def test_a_window_of_no_picture_is_refused(here, unetseg):
    one_sentence(unetseg("segment", here.scan, "-m", here.model, "-o", here.out / "a.nrrd", "--display", "bone"), "give --picture")
    later = here.package(display="a preset of a later version").path
    code, _, err = unetseg("segment", here.scan, "-m", later, "-o", here.out / "a.nrrd", "--picture", here.out / "a.png", "-q")
    assert (code, err) == (0, "") and (here.out / "a.png").exists()


BAD_NAMES = {
    "a folder": (["-o", "{out}"], "cannot be written"),
    "below a file": (["-o", "{scan}/a.nrrd"], "cannot be written"),
    "unknown suffix": (["-o", "{out}/a.xyz"], "end the name in .seg.nrrd"),
    "no suffix": (["-o", "{out}/a"], "end the name in .seg.nrrd"),
    "a second one that is bad": (["-o", "{out}/a.nrrd", "-o", "{out}/a.jpg"], "end the name in .seg.nrrd"),
    "a picture of a volume": (["-o", "{out}/a.nrrd", "-o", "{out}/a.png"], "20 slices"),
    "DICOM of what is none": (["-o", "{out}/a.nrrd", "-o", "{out}/a.dcm"], "DICOM series"),
    "uncertainty as a picture": (["-o", "{out}/a.nrrd", "--uncertainty", "{out}/u.png"], "not the name of a volume"),
    "uncertainty as a segmentation": (["-o", "{out}/a.nrrd", "--uncertainty", "{out}/u.Seg.nrrd"], ", and not in .seg.nrrd"),
    "probabilities as a segmentation": (["-o", "{out}/a.nrrd", "--probabilities", "{out}/p.seg.nrrd"], "not the name of a volume"),
    "uncertainty in two files": (["-o", "{out}/a.nrrd", "--uncertainty", "{out}/u.mhd"], "not the name of a volume"),
    "probabilities without suffix": (["-o", "{out}/a.nrrd", "--probabilities", "{out}/p"], "not the name of a volume"),
    "uncertainty below a file": (["-o", "{out}/a.nrrd", "--uncertainty", "{scan}/u.nrrd"], "cannot be written"),
    "a picture as JPEG": (["-o", "{out}/a.nrrd", "--picture", "{out}/a.jpg"], "would not be a PNG"),
    "a report that is a folder": (["-o", "{out}/a.nrrd", "--json", "{out}"], "cannot be written"),
    "one name for two": (["-o", "{out}/a.nrrd", "--uncertainty", "{out}/a.nrrd"], "Two results"),
}


@pytest.mark.parametrize("what", BAD_NAMES)
def test_bad_names_are_refused_before_anything_is_computed(here, unetseg, what, monkeypatch):
    def computed(*arguments):
        raise AssertionError("too late")

    monkeypatch.setattr(cli, "predict", computed)
    options, sentence = BAD_NAMES[what]
    filled = [o.format(out=here.out, scan=here.scan) for o in options]
    one_sentence(unetseg("segment", here.scan, "-m", here.model, *filled), sentence)
    assert here.left() == []


def custom_operator():
    onnx = pytest.importorskip("onnx")
    value = [onnx.helper.make_tensor_value_info(n, 1, None) for n in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Shell", ["x"], ["y"], domain="com.evil")], "g", value[:1], value[1:])
    return onnx.helper.make_model(graph).SerializeToString()


def external_data():
    onnx = pytest.importorskip("onnx")
    tensor = onnx.numpy_helper.from_array(np.zeros(3, np.float32), "w")
    tensor.external_data.add(key="location", value="/etc/passwd")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    value = [onnx.helper.make_tensor_value_info(n, 1, None) for n in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", value[:1], value[1:], [tensor])
    return onnx.helper.make_model(graph).SerializeToString()


def bitten(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    return path


BAD_PACKAGES = {
    "corrupt": (lambda pack: bitten(pack()), "model package"),
    "wrong hash": (lambda pack: pack(change_card=lambda c: c["files"]["model.onnx"].update(sha256="0" * 64)), "its SHA-256 differs"),
    "climbing out": (lambda pack: pack(extra=[("../../evil.py", b"x")]), "climbs out"),
    "custom operator": (lambda pack: pack(onnx=custom_operator()), "custom operator com.evil.Shell"),
    "external data": (lambda pack: pack(onnx=external_data()), "external data"),
    "no network": (lambda pack: pack(onnx=b"hello"), "not an ONNX file"),
    "bad card": (lambda pack: pack(change_card=lambda c: c.pop("licence")), "lacks 'licence'"),
    "two inputs": (lambda pack: pack(change_card=lambda c: c.update(channels=["a", "b"])), "takes 1 channels but its card says 2"),
    "two labels": (
        lambda pack: pack(change_card=lambda c: c["labels"].append({"value": 2, "name": "b"})),
        "gives 2 channels but its card says 3",
    ),
    "two dimensions": (
        lambda pack: pack(change_card=lambda c: c.update(dimensions=2, patch=[8, 8], divisor=[4, 4])),
        "takes no float32 tensor of 4 axes",
    ),
}


@pytest.mark.parametrize("what", BAD_PACKAGES)
def test_bad_packages_are_refused_by_every_command(here, unetseg, pack, what):
    make, sentence = BAD_PACKAGES[what]
    path = make(pack)
    images = [here.scan] * (2 if what == "two inputs" else 1)
    one_sentence(unetseg("segment", *images, "-m", path, "-o", here.out / "a.nrrd"), sentence)
    one_sentence(unetseg("model", "verify", path), sentence)
    assert here.left() == [] and not list(here.out.parent.rglob("evil*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment"],
        ["segment", "a.nrrd"],
        ["fly"],
        ["segment", "a.nrrd", "-m", "x", "--overlap", "much"],
        ["segment", "a.nrrd", "-m", "x", "--threads", "-1"],
        ["model", "pack", "a.onnx"],
    ],
)
def test_wrong_usage_ends_with_2_and_no_traceback(here, unetseg, arguments):
    code, _, err = unetseg(*arguments)
    assert code == 2 and "Usage" in err and "Traceback" not in err and here.left() == []


# -------------------------------------------------------------------------------------------------------- other commands


def test_version_and_help(unetseg):
    from UNetSegmentationLib import __version__

    assert unetseg("--version") == (0, f"{__version__}\n", "")
    code, out, err = unetseg("segment", "--help")
    assert code == 0 and "--uncertainty" in out and "0 to below 0.95" in " ".join(out.replace("│", " ").split()) and err == ""


def test_models_lists_good_ones_and_names_broken_ones(here, unetseg, models_folder):
    models_folder.mkdir()
    licence = "CC BY 4.0. Trained on the chest CT of a hospital with a name that is too long for a column."
    of = {"licence": licence, "metrics": {"dice": {"lung": 0.912, "odd": "high"}}}
    model = here.package(name="mine", labels=[{"value": 1, "name": "lung [left]"}], **of)
    (models_folder / model.path.name).write_bytes(model.path.read_bytes())
    odd = here.package(name="odd", metrics={"dice": 0.8})
    (models_folder / odd.path.name).write_bytes(odd.path.read_bytes())
    (models_folder / f"broken-1.0.0{SUFFIX}").write_bytes(b"hello")
    code, out, err = unetseg("models", "--json")
    cards = {card["name"]: card for card in json.loads(out)}
    assert code == 0 and cards["mine"] == model.card.data and "odd" in cards
    assert len(err.splitlines()) == 1 and "broken-1.0.0.unet.zip is damaged" in err
    code, out, err = unetseg("models")
    assert code == 0 and "lung 0.912" in out and "[left]" in out and "broken" in err
    assert licence in " ".join(out.split()) and "automatic, 3D" in out and "…" not in out


def test_models_are_used_by_their_names(here, unetseg, models_folder):
    models_folder.mkdir()
    (models_folder / here.model.name).write_bytes(here.model.read_bytes())
    for name in ("toy", "toy-1.0.0"):
        assert unetseg("segment", here.scan, "-m", name, "-o", here.out / f"{name}.nrrd", "-q")[0] == 0
    one_sentence(unetseg("segment", here.scan, "-m", "toys", "-o", here.out / "b.nrrd"), "installed are: ")


def test_presets_are_listed(unetseg):
    code, out, _ = unetseg("presets", "--json")
    listed = {item["name"]: item for item in json.loads(out)}
    assert code == 0 and listed["lung"]["level"] == -600 and listed["lung"]["width"] == 1500
    assert listed["mr-percentile"]["mode"] == "percentile"
    code, out, err = unetseg("presets")
    assert code == 0 and "mediastinum" in out and "-600" in out and err == ""


def test_doctor_measures_each_model_and_names_what_is_broken(here, models_folder):
    models_folder.mkdir()
    (models_folder / here.model.name).write_bytes(here.model.read_bytes())
    (models_folder / f"broken-1.0.0{SUFFIX}").write_bytes(b"hello")
    done = subprocess_run("doctor", "--json", UNETSEG_MODELS=str(models_folder))
    findings = json.loads(done.stdout)
    assert done.returncode == 0 and findings["packages"]["numpy"] == np.__version__ and findings["cores"] >= 1
    rows = {(r["model"], r["engine"]): r for r in findings["speed"]}
    assert rows["toy", "onnx"]["ms"] > 0 and rows["toy", "onnx"]["runs_on"].startswith("ONNX Runtime")
    assert findings["models"][str(models_folder / here.model.name)] is None
    assert "damaged" in findings["models"][str(models_folder / f"broken-1.0.0{SUFFIX}")]


def test_verify_and_info(here, unetseg, pack):
    code, out, err = unetseg("model", "verify", here.model, pack())
    assert code == 0 and len(out.splitlines()) == 2 and all("verified (" in line for line in out.splitlines()) and err == ""
    code, out, err = unetseg("model", "info", here.model)
    assert code == 0 and json.loads(out) == ModelPackage.read(here.model).card.data and err == ""
    one_sentence(unetseg("model", "info", "nothing"), "no model 'nothing'")


def test_verify_runs_the_network(unetseg, pack):
    onnx = pytest.importorskip("onnx")
    network = onnx.load_from_string(make_onnx("threshold", make_card()))
    network.graph.output[0].type.tensor_type.ClearField("shape")
    labels = [{"value": 1, "name": "a"}, {"value": 2, "name": "b"}]
    path = pack(onnx=network.SerializeToString(), change_card=lambda card: card.update(labels=labels))
    one_sentence(unetseg("model", "verify", path), "does not fit its card")


def test_verify_compares_the_weights_with_the_network(unetseg, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load, save

    model = find_model("lung-nodule-2d")
    assert unetseg("model", "verify", "lung-nodule-2d")[0] == 0
    weights = {k: v * torch.tensor(1.1).to(v.dtype) if k.startswith("heads.") else v for k, v in load(model.safetensors).items()}
    other = write_package(tmp_path / f"other{SUFFIX}", model.card.data, model.onnx, save(weights))
    one_sentence(unetseg("model", "verify", other.path), "gives other values with PyTorch than with ONNX")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # not installed beside PyTorch, and the package not to blame
    assert unetseg("model", "verify", "lung-nodule-2d")[0] == 0


def test_names_that_standard_output_cannot_hold_are_escaped(here, pack):
    """A pipe on Windows is cp1252."""
    path = pack(change_card=lambda card: card.update(labels=[{"value": 1, "name": "\u7d50\u7bc0"}], licence="\u7bc0"))
    (path.parent / "models").mkdir()
    path = path.rename(path.parent / "models" / path.name)
    options = {"PYTHONIOENCODING": "cp1252", "UNETSEG_MODELS": str(path.parent)}
    result = subprocess_run("model", "info", path, **options)
    assert result.returncode == 0 and json.loads(result.stdout)["labels"][0]["name"] == "\u7d50\u7bc0", result.stderr
    result = subprocess_run("models", COLUMNS="300", **options)
    assert result.returncode == 0 and "\\u7d50\\u7bc0" in result.stdout, result.stderr


def test_the_names_that_other_commands_take_are_listed_whole(here, unetseg, tmp_path):
    """In the 80 columns of a pipe."""
    name = "a-scan-of-" + "0123456789" * 5
    scan = here.scan.rename(tmp_path / f"{name}.nrrd")
    mask = here.write((here.image.array > 0.5).astype(np.uint8), "mask.nrrd")
    label = ("--label", "1=a structure of a long name", "--name", name)
    assert unetseg("dataset", "add", here.out / "set", scan, "-m", mask, *label)[0] == 0
    assert unetseg("worklist", "make", here.out / "list", scan, "--later")[0] == 0
    for part, folder in (("dataset", "set"), ("worklist", "list")):
        code, out, err = unetseg(part, "list", here.out / folder)
        assert code == 0 and "".join(line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")) == name, out + err


@pytest.mark.parametrize("label", ["1=", "x=a", "-1=a", "\u00b2=a"])
def test_a_label_that_is_none_is_refused(here, unetseg, label):
    mask = here.write((here.image.array > 0.5).astype(np.uint8), "mask.nrrd")
    result = unetseg("dataset", "add", here.out / "set", here.scan, "-m", mask, f"--label={label}")
    one_sentence(result, "must be VALUE=NAME")
    assert here.left() == []


@pytest.mark.parametrize("options", [("--name", "a b"), ("--split", "foo"), ("--model-mask", "nowhere.nrrd")])
def test_a_new_dataset_whose_first_case_is_refused_leaves_no_folder(here, unetseg, options):
    mask = here.write((here.image.array > 0.5).astype(np.uint8), "mask.nrrd")
    arguments = (here.scan, "-m", mask, "--label", "1=a", *options)
    assert unetseg("dataset", "add", here.out / "set", *arguments)[0] == 2 and here.left() == []
    (here.out / "mine").mkdir()
    assert unetseg("dataset", "add", here.out / "mine", *arguments)[0] == 2 and here.left() == ["out/mine"]


def test_a_name_that_is_too_long_is_one_sentence(here, unetseg):
    one_sentence(unetseg("segment", here.scan, "-m", "m" * 300, "-o", here.out / "a.nrrd"), "There is no model")
    one_sentence(unetseg("model", "pack", "n" * 300, "--card", "a", "-o", here.out / f"a{SUFFIX}"), "cannot be read or written")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_standard_output_that_is_full_is_one_sentence(here):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "UNetSegmentation")}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "UNetSegmentationLib", "model", "info", "lung-nodule-click"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)
    one_sentence((result.returncode, "", result.stderr), "standard output cannot be read or written")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_pack_makes_a_package_that_segments(here, unetseg, tmp_path, encoding):
    (tmp_path / "card.json").write_text(json.dumps(make_card(name="packed")), encoding)
    (tmp_path / "net.onnx").write_bytes(make_onnx("threshold", make_card()))
    target = here.out / f"packed-1.0.0{SUFFIX}"
    code, out, err = unetseg("model", "pack", tmp_path / "net.onnx", "--card", tmp_path / "card.json", "-o", target)
    assert code == 0 and out == f"wrote {target}\n" and err == ""
    assert ModelPackage.read(target).card.name == "packed"
    assert unetseg("segment", here.scan, "-m", target, "-o", here.out / "a.nrrd", "-q")[0] == 0


@pytest.mark.parametrize(
    ("card", "network", "sentence"),
    [
        (None, b"", "card.json does not exist"),
        (b"{", b"", "is not JSON"),
        (b"\xff\xfe\x00", b"", "is not JSON"),
        (b"[" * 100_000, b"", "is not JSON"),
        (b"[]", b"", "JSON object"),
        (b"{}", b"x", "lacks 'format'"),
        (..., b"hello", "not an ONNX file"),
        (..., None, "net.onnx does not exist"),
    ],
)
def test_pack_refuses_bad_input(here, unetseg, tmp_path, card, network, sentence):
    if card is not None:
        (tmp_path / "card.json").write_bytes(json.dumps(make_card()).encode() if card is ... else card)
    if network is not None:
        (tmp_path / "net.onnx").write_bytes(network)
    result = unetseg("model", "pack", tmp_path / "net.onnx", "--card", tmp_path / "card.json", "-o", here.out / f"a{SUFFIX}")
    one_sentence(result, sentence)
    assert here.left() == []


def test_pack_makes_a_package_of_a_bare_network_that_segments(here, unetseg, tmp_path):
    card = make_card(labels=[{"value": 1, "name": "one"}, {"value": 2, "name": "two"}])
    network = tmp_path / "My net.onnx"
    network.write_bytes(make_onnx("threshold", card))
    one_sentence(unetseg("segment", here.scan, "-m", network), "unetseg model pack My net.onnx --labels A,B --intensity PRESET -o")
    target = here.out / f"net{SUFFIX}"
    pack = ["model", "pack", network, "-o", target]
    one_sentence(unetseg(*pack, "--labels", "one", "--intensity", "lung"), "finds 2 labels beside the background")
    for options in ([], ["--labels", "one,two"], ["--intensity", "lung"], ["--card", network, "--labels", "one,two", "--axis", "axial"]):
        one_sentence(unetseg(*pack, *options), "Give either --card, or --labels and --intensity")
    assert here.left() == []
    assert unetseg(*pack, "--labels", "one,two", "--intensity=0.5,1", "--spacing", "1,1,2") == (0, f"wrote {target}\n", "")
    made = ModelPackage.read(target).card
    assert (made.name, made.spacing, made.intensity) == ("my-net", (1, 1, 2), {"mode": "window", "level": 0.5, "width": 1})
    code, _, err = unetseg("segment", here.scan, "-m", target, "-o", here.out / "a.nrrd", "-q")
    assert code == 0, err
    assert unetseg("model", "verify", target)[0] == 0
    assert "--labels liver,tumour" in " ".join(unetseg("model", "pack", "--help")[1].replace("│", " ").split())


def test_pack_does_not_overwrite_what_it_reads(unetseg, tmp_path):
    card, network = tmp_path / "card.json", tmp_path / "net.onnx"
    card.write_text(json.dumps(make_card()))
    network.write_bytes(make_onnx("threshold", make_card()))
    before = card.read_bytes(), network.read_bytes()
    for output in (card, network, tmp_path / "toy.zip"):
        one_sentence(unetseg("model", "pack", network, "--card", card, "-o", output), f"would be no package; end its name in {SUFFIX}")
    assert (card.read_bytes(), network.read_bytes()) == before and not (tmp_path / "toy.zip").exists()


def test_parsers_name_the_option():
    with pytest.raises(UserError, match="--at must be 3 numbers"):
        cli.parse_point("1;2;3")
    with pytest.raises(UserError, match="--roi must be 6 numbers"):
        cli.parse_roi("1,2", Image(np.zeros((3, 3, 3))))


# ---------------------------------------------------------------------------------------------------------------- click


@pytest.fixture
def clicked(tmp_path, make_package):
    """A scan with two blocks, and a click package that is a threshold."""
    array = np.zeros((12, 40, 40), np.float32)
    array[4:8, 10:16, 10:16] = array[4:8, 10:16, 24:30] = 1
    scan = tmp_path / "scan.nrrd"
    write_image(Image(array), scan)
    package = make_package(task="click", spacing=[1, 1, 1], patch=[16, 24, 24])
    return scan, package.path, array


def test_click_outlines_what_is_clicked_on(clicked, tmp_path, unetseg):
    scan, package, array = clicked
    out, report = tmp_path / "o.nrrd", tmp_path / "o.json"
    # A RAS of -12, -12, 6 is the LPS voxel (12, 12, 6).
    code, _, stderr = unetseg("click", scan, "--at=-12,-12,6", "-m", package, "-o", out, "--json", report, "--engine", "onnx")
    assert code == 0, stderr
    labels = read_image(out).array
    assert labels[:, :, :20].sum() == 4 * 6 * 6 and not labels[:, :, 20:].any()
    told = json.loads(report.read_text())
    assert told["labels"][0]["voxels"] == 144 and told["seconds"] > 0
    both = tmp_path / "both.nrrd"
    code, _, stderr = unetseg("click", scan, "--at=-12,-12,6", "--at=-26,-12,6", "--not=-29,-10,6", "-m", package, "-o", both, "-q")
    assert code == 0, stderr
    labels = read_image(both).array
    assert labels[6, 12, 12] == labels[6, 12, 26] == 1 and labels[6, 10, 29] == 0


def test_click_tells_the_nodules_size(clicked, tmp_path, unetseg):
    scan, package, _ = clicked
    command = ["click", scan, "--at=-12,-12,6", "-m", package, "--engine", "onnx", "-o", tmp_path / "o.nrrd"]
    code, out, err = unetseg(*command, "--json", "-", "--csv", tmp_path / "o.csv", "--reference", tmp_path / "none.nrrd")
    assert code == 2 and "does not exist" in err and not (tmp_path / "o.csv").exists()
    code, out, err = unetseg(*command, "--json", "-", "--csv", tmp_path / "o.csv")
    assert code == 0, err
    report = json.loads(out)
    image, mask = read_image(scan), read_image(tmp_path / "o.nrrd").array
    told = describe(image, mask, lung=False)  # the toy's window does not tell lung from soft tissue
    assert report["nodule"] == json.loads(json.dumps(told))
    for name, value in zip(COLUMNS, row(told)):
        assert any(name in line and value in line for line in err.splitlines()), name
    assert NOTE in " ".join(err.split())  # a narrow table breaks it
    heading, line = csv.reader((tmp_path / "o.csv").read_text("utf-8-sig").splitlines())
    assert (tmp_path / "o.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # a spreadsheet would read mm³ as mmÂ³
    assert heading == ["Scan", "R (mm)", "A (mm)", "S (mm)", *COLUMNS, "Note"]
    assert line == ["scan.nrrd", "-12.5", "-12.5", "5.5", *row(told), NOTE]
    code, out, err = unetseg(*command, "--csv", "-", "-q")
    assert code == 0 and out.splitlines()[0] == ",".join(heading) and len(out.splitlines()) == 2
    assert err == ""


def test_a_click_box_holds_all_its_corners_in_a_turned_scan(clicked, tmp_path, unetseg):
    """Of 45 degrees two opposite ones lie along a line of voxels, and the box between them is flat."""
    _, package, array = clicked
    c = math.sqrt(0.5)
    image = Image(array, direction=(c, -c, 0, c, c, 0, 0, 0, 1))
    write_image(image, tmp_path / "turned.nrrd")
    x, y, z = image.index_to_point((12.5, 12.5, 5.5))
    for box in (f"{-x - 5},{-x + 5},{-y - 5},{-y + 5},{z - 3},{z + 90}", "ijk:8,17,8,17,4,9"):
        code, _, err = unetseg("click", tmp_path / "turned.nrrd", f"--box={box}", "-m", package, "-o", tmp_path / "o.nrrd", "-q")
        assert code == 0, err
        labels = read_image(tmp_path / "o.nrrd").array
        assert labels[:, :, :20].sum() == 144 and not labels[:, :, 20:].any()
    assert box_prompt(Image(array), Box((5, 8, 8), (6, 18, 18)))[1:] == (8, 8, 4.5, 17, 17, 5.5)  # one slice from edge to edge


def test_what_the_furthest_look_cuts_is_said_to_be_cut_wherever_its_size_is(clicked, tmp_path, unetseg):
    _, package, _ = clicked
    write_image(Image(np.ones((40, 60, 200), np.float32)), tmp_path / "wide.nrrd")
    at = ("--at=-100,-30,20", "--at=-101,-30,20", "-m", package, "-o", tmp_path / "o.nrrd")
    code, out, err = unetseg("click", tmp_path / "wide.nrrd", *at, "--json=-", "--csv", tmp_path / "o.csv")
    assert code == 0, err
    assert json.loads(out)["nodule"]["note"].endswith(BEYOND) and BEYOND in (tmp_path / "o.csv").read_text("utf-8-sig")


def test_click_gives_what_a_session_gives_on_a_real_scan(data, tmp_path, unetseg):
    image = read_image(data / "chest_ct" / "LIDC-IDRI-0001_ct.nii.gz").crop(Box((30, 220, 220), (50, 300, 300)))
    write_image(image, tmp_path / "scan.nii.gz")
    code, _, err = unetseg(
        "click", tmp_path / "scan.nii.gz", "--at=-57,-86,-116", "--not=-42,-86,-116", "-o", tmp_path / "o.nrrd", "--engine", "onnx"
    )
    assert code == 0, err
    session = ClickSession(read_image(tmp_path / "scan.nii.gz"), options=Options(engine="onnx"))
    session.add_point((57.0, 86.0, -116.0)), session.add_point((42.0, 86.0, -116.0), positive=False)
    assert session.mask.sum() > 1000 and np.array_equal(read_image(tmp_path / "o.nrrd").array, session.mask)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "Nothing was clicked on"),
        (("--at=-12,-12,6", "--json=-", "--csv=-"), "Only one of --json and --csv"),
        (("--at=-12,-12,6", "--csv=o.nrrd"), "Two results would be written"),
        (("--box=1,2,3",), "--box must be 6 numbers"),
        (("--at=-2,-2,2",), "Nothing was found here"),
        (("--at=-200,-2,2",), "outside the image"),
        (("--at=-12,-12,6", "--not=1,2"), "--not must be 3 numbers"),
        (("--box=0,-10,0,-10,0,0",), "--box 0,-10,0,-10,0,0 has no size; give R0,R1"),
        (("--box=900,910,0,10,0,9",), "The box lies outside the image"),
    ],
)
def test_click_refuses_in_one_sentence_and_writes_nothing(clicked, tmp_path, unetseg, options, sentence):
    scan, package, _ = clicked
    out = tmp_path / "o.nrrd"
    options = [option.replace("=o.nrrd", f"={out}") for option in options]
    code, _, stderr = unetseg("click", scan, *options, "-m", package, "-o", out)
    assert code == 2 and sentence in stderr and stderr.count("\n") == 1
    assert not out.exists()


def test_only_windows_leaves_patterns_to_the_command_and_brackets_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.nii", "a.nii", "c1.nii", "c[1].nii", "--x=a"):
        Path(name).touch()
    typed = ["segment", "c[1].nii", "[ab].nii", "?.nii", "c[1]*", "no*.nii", "--x=?", "-o", "~/$THERE"]
    home = Path.home() / "a.nrrd"
    monkeypatch.setenv("THERE", "a.nrrd")
    told = {}
    for system in ("posix", "nt"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "name", system)
            patch.setattr(files, "user_path", lambda name: os.path.expanduser(name))  # no WindowsPath here
            told[system] = expand_arguments(typed)
    assert told == {"posix": typed, "nt": ["segment", "c[1].nii", "[ab].nii", "a.nii", "b.nii", "c[1].nii", *typed[5:8], str(home)]}


def test_typer_expands_nothing_itself(here, unetseg, monkeypatch):
    """As it does on Windows, where out[1].nrrd would become an out1.nrrd that is there."""
    import typer.core

    seen = []
    monkeypatch.setattr(typer.core, "_main", lambda self, args=None, **_unused: seen.append(args))
    unetseg("segment", "scan[1].nii.gz")
    assert seen == [["segment", "scan[1].nii.gz"]]


def test_an_older_click_takes_every_command():
    """Before 8.2 it refuses a default of several arguments when the commands are made, so that none of them runs."""
    import typer.main

    commands, several = [typer.main.get_command(cli._app())], {}
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        several |= {(command.name, p.name): p.default for p in command.params if p.param_type_name == "argument" and p.nargs == -1}
    assert ("make", "sources") in several and set(several.values()) == {None}


def test_a_datasets_channels_are_the_files_and_of_one_picture_its_colours(here, unetseg):
    """Stains in a file each looked like grey with its transparency."""
    rng = np.random.default_rng(0)
    files = [here.out / f"{i}.png" for i in range(4)]
    for file in files:
        write_image(Image(rng.integers(0, 255, (1, 12, 14)).astype(np.uint8)), file)
    colours, mask = here.out / "colours.png", here.out / "mask.png"
    grey = read_image(files[0]).array
    write_image(Image(np.stack([grey] * 3)), colours)
    write_image(Image((grey > 100).astype(np.uint8)), mask)
    told = {}
    for name, images, more in (
        ("two", files[:2], ()),
        ("four", files, ()),
        ("named", files[:2], ("--channel", "DAPI", "--channel", "GFP")),
        ("grey", [colours], ()),
        ("rgb", [colours], ("--channel", "R", "--channel", "G", "--channel", "B")),
    ):
        assert unetseg("dataset", "add", here.out / name, *images, "-m", mask, "--label", "1=cell", *more)[0] == 0
        told[name] = len(Dataset.open(here.out / name).channels)
    assert told == {"two": 2, "four": 4, "named": 2, "grey": 1, "rgb": 3}
    code, _, err = unetseg("dataset", "add", here.out / "grey", *files[1:3], "-m", mask, "--label", "1=cell")
    assert code == 2 and "has 2 channels and the dataset 1" in err
    assert unetseg("dataset", "add", here.out / "two", *files[1:3], "-m", mask, "--label", "1=cell")[0] == 0
