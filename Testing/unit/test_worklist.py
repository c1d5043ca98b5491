"""The work list: the order that it gives, what is segmented in advance, and that nobody gets a scan that another has."""

import errno
import json
import ntpath
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from UNetSegmentationLib import files
from UNetSegmentationLib import worklist as module
from UNetSegmentationLib.dataset import Dataset, read_mask
from UNetSegmentationLib.files import UserError
from UNetSegmentationLib.image import Image, SeveralSeries, read_image, write_image
from UNetSegmentationLib.inference.predict import Cancelled, Options, predict
from UNetSegmentationLib.model import Label, find_model
from UNetSegmentationLib.worker import desk as module_desk
from UNetSegmentationLib.worker import protocol
from UNetSegmentationLib.worker.client import child_environment, command, new_folder
from UNetSegmentationLib.worker.protocol import Lines, load_array, remove_folder
from UNetSegmentationLib.worklist import Annotator, WorkList, describe, find_scans, order
from workers import POSIX, python, slow_package, until

ROOT = Path(__file__).resolve().parents[2]
ANNA, BERT = Annotator("anna", "Anna"), Annotator("bert", "Bert")
ONNX = Options(engine="onnx", device="cpu", threads=1, tta="none")


def ball(edge=1.0, radius=5.0, center=(10, 14, 16), shape=(20, 28, 32), spacing=(1.0, 1.0, 1.0)):
    """A ball of 1 on 0 whose edge is `edge` voxels wide: the wider, the more voxels the threshold network is unsure of."""
    distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(np.indices(shape), center)))
    return Image(np.clip(0.5 + (radius - distance) / edge / 4, 0, 1).astype(np.float32), spacing)


def predicted(package, image, **options):
    return predict(image, [package], Options(engine="onnx", device="cpu", threads=1, uncertainty=True, **options))


# --------------------------------------------------------------------------------------------------------------- order


def test_the_first_is_the_least_certain_and_the_next_are_of_other_kinds():
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(5), 20)
    points = np.eye(5)[kinds] * 10 + rng.normal(0, 0.1, (100, 5))
    values = rng.random(100) + np.where(kinds == 2, 5, 0)  # all of one kind are the least certain
    chosen = order(values, points)
    assert sorted(chosen) == list(range(100)) and chosen[0] == int(np.argmax(values))
    assert {int(kinds[i]) for i in chosen[:5]} == set(range(5))
    by_value = np.argsort(-values)[:10]
    assert {int(kinds[i]) for i in by_value} == {2}  # which is what sorting alone would bring
    for i in chosen[1:5]:  # of its kind it is one of the less certain ones
        assert np.mean(values[kinds == kinds[i]] > values[i]) < 0.5


def test_the_order_knows_what_is_done_and_repeats():
    rng = np.random.default_rng(1)
    values, points = rng.random(60), rng.normal(size=(60, 12))
    first = order(values, points)
    assert order(values, points) == first == order(values, points, limit=60)
    assert order(values, points, limit=7) == first[:7]
    assert order(values, points, first[:7]) == first[7:]
    assert order(values * 1e6, points * 3 + 5) == first  # no scale counts
    mixed = rng.permutation(60)
    assert [int(mixed[i]) for i in order(values[mixed], points[mixed])] == first


def test_equal_scans_come_in_the_lists_order_and_numbers_that_are_none_come_last():
    assert order([1, 1, 1], np.zeros((3, 2))) == [0, 1, 2]
    assert order([], np.zeros((0, 4))) == [] and order([1.0], np.zeros((1, 0))) == [0]
    assert order([np.nan, 0.5, 0.7], np.zeros((3, 2))) == [2, 1, 0]
    assert order([0.1, 0.9, 0.9], [[0, 0], [1, 1], [1, 1]]) == [1, 0, 2]  # a second one of a kind waits


# --------------------------------------------------------------------------------------------------------- description


def test_a_blurred_edge_is_worth_more_than_a_sharp_one(make_package):
    package = make_package()
    scores = [describe(predicted(package, image), image)[0] for image in (ball(0.01), ball(0.5), ball(2.0))]
    assert scores[0]["entropy"] < scores[1]["entropy"] < scores[2]["entropy"] <= 1
    assert all(s["disagreement"] == 0 and s["value"] == s["entropy"] for s in scores)


def test_what_two_models_disagree_on_counts(make_package):
    image = ball(0.3)
    one, other = make_package(), make_package(kind="threshold", labels=[{"value": 1, "name": "thing"}], intensity={"mode": "zscore"})
    options = Options(engine="onnx", device="cpu", threads=1, uncertainty=True, tta="none")
    both, _ = describe(predict(image, [one, other], options), image)
    alike, _ = describe(predict(image, [one, one], options), image)
    assert alike["disagreement"] < 1e-6 < 0.02 < both["disagreement"] <= both["entropy"]
    assert both["value"] == pytest.approx(both["entropy"] + both["disagreement"], abs=1e-6)


def test_a_description_is_of_the_patient_and_not_of_how_the_file_lies(make_package):
    package, image = make_package(patch=[16, 16, 16]), ball(center=(7, 9, 20))
    turned = Image(
        np.ascontiguousarray(image.array[::-1, :, ::-1]),
        image.spacing,
        image.index_to_point((31, 0, 19)),
        (-1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0),
    )
    scores, embedding = describe(predicted(package, image), image)
    again, other = describe(predicted(package, turned), turned)
    assert again == pytest.approx(scores, abs=1e-4)
    assert np.abs(other - embedding).max() < 2e-2


def test_every_scan_has_a_description_of_the_same_length(make_package):
    package = make_package(dimensions=2)
    images = [
        ball(),
        ball(radius=-20),  # nothing to find
        Image(np.zeros((4, 20, 20), np.float32)),
        Image(ball().array[10:11], (0.001, 0.001, 0.001)),
        Image((ball().array * 100).astype(np.uint8)),  # all of it is found
    ]
    found = [describe(predicted(package, image), image) for image in images]
    assert len({len(e) for _, e in found}) == 1 and all(np.isfinite(e).all() for _, e in found)
    assert all(0 <= s["value"] <= 2 for s, _ in found)
    with pytest.raises(ValueError, match="uncertainty"):
        describe(predict(images[0], [package], ONNX), images[0])


def test_a_noisy_real_scan_is_worth_more(data):
    image = read_image(data / "msd_hippocampus" / "images" / "hippocampus_003.nii.gz")
    noise = np.random.default_rng(0).normal(0, 0.4 * image.array.std(), image.shape)
    noisy = image.like((image.array + noise).astype(np.float32))
    model = [find_model("hippocampus-3d")]
    (clean, _), (poor, _) = (describe(predict(i, model, Options(uncertainty=True, tta="none")), i) for i in (image, noisy))
    assert poor["value"] > clean["value"]


# --------------------------------------------------------------------------------------------------------------- scans


def test_scans_are_found_below_a_folder_and_in_lists(tmp_path):
    folder = tmp_path / "scans"
    for name in (
        "b.nii.gz",
        "a.nrrd",
        "deep/mr_0000.nii.gz",
        "deep/mr_0001.nii.gz",
        "a-label.nrrd",
        "seg/a.nrrd",
        ".hidden/x.nrrd",
        "$RECYCLE.BIN/S-1-5-21/$RAB12CD.nrrd",  # deleted scans of Windows' drives and of network storage
        "#recycle/old.nii.gz",
        "#12/c.nrrd",  # but not a patient
        "@eaDir/b.nii.gz",
        "System Volume Information/x.nrrd",
        "n.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "labelled.nii.gz").write_text("x")  # no label, by its name
    dicom = folder / "series" / "1"
    dicom.mkdir(parents=True)
    (dicom / "IM1").write_bytes(b"\0" * 128 + b"DICM")
    below = [["/".join(f.relative_to(folder).parts) for f in files] for files in find_scans([folder])]
    several = ["deep/mr_0000.nii.gz", "deep/mr_0001.nii.gz"]
    assert below == [["a.nrrd"], ["b.nii.gz"], ["labelled.nii.gz"], ["#12/c.nrrd"], several, ["series/1"]]
    listed = folder / "list.csv"
    listed.write_text("# mine\na.nrrd\n\n deep/mr_0000.nii.gz, deep/mr_0001.nii.gz\n", "utf-8")
    assert find_scans([listed]) == [(folder / "a.nrrd",), (folder / "deep/mr_0000.nii.gz", folder / "deep/mr_0001.nii.gz")]
    assert find_scans([folder / "a.nrrd", folder / "a.nrrd"]) == [(folder / "a.nrrd",)]
    listed.write_text("a.nrrd\ngone.nrrd\n")
    with pytest.raises(UserError, match="line 2: .*gone.nrrd does not exist; correct the line"):
        find_scans([listed])
    with pytest.raises(UserError, match="does not exist; check the name"):
        find_scans([tmp_path / "nothing"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_as_excel_saves_them(tmp_path, encoding):
    for name in ("ä.nrrd", "b.nrrd", "one;two.nrrd"):
        (tmp_path / name).write_text("x")
    listed = tmp_path / "list.csv"
    listed.write_text("ä.nrrd;b.nrrd\n;;\n,,\nb.nrrd;\none;two.nrrd\nä.nrrd,b.nrrd\n", encoding)
    a, b, odd = (tmp_path / name for name in ("ä.nrrd", "b.nrrd", "one;two.nrrd"))
    assert find_scans([listed]) == [(a, b), (b,), (odd,)]
    long = [tmp_path / (f"1.2.840.{n}" * 8 + ".nrrd") for n in range(4)]  # together they are too long for a name
    for path in long:
        path.write_text("x")
    listed.write_text(";".join(path.name for path in long) + "\n", encoding)
    assert find_scans([listed]) == [tuple(long)]
    listed.write_text("ä.nrrd;gone.nrrd\n", encoding)
    with pytest.raises(UserError, match="line 1: .*gone.nrrd does not exist; correct the line"):
        find_scans([listed])
    listed.write_bytes("ä.nrrd\n".encode("cp1252"))
    with pytest.raises(UserError, match="save it as UTF-8 text"):
        find_scans([listed])


def test_a_scan_by_another_way_is_no_other_scan(tmp_path):
    write_image(ball(), tmp_path / "scans" / "a.nii.gz")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "l.txt").write_text("../scans/a.nii.gz\n")
    work, added = WorkList.gather(tmp_path / "deep" / "x" / ".." / "list", [tmp_path / "lists" / "l.txt"])
    assert added == ["a"] and work.add([tmp_path / "scans"]) == work.add([tmp_path / "lists/../scans/a.nii.gz"]) == []
    text = work.folder / "worklist.json"
    text.write_text(text.read_text().replace("/scans/a.nii.gz", "/lists/../scans/a.nii.gz"))  # of an earlier version
    assert work.add([tmp_path / "scans"]) == []
    work = WorkList.gather(tmp_path / "lists" / ".." / "list", [tmp_path / "scans"])[0]
    assert json.loads((work.folder / "worklist.json").read_text())["scans"]["a"]["files"] == ["../scans/a.nii.gz"]


def test_numbered_scans_are_no_channels(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("ct_0001.nii.gz", "ct_0002.nii.gz", "mr_0000.nii.gz", "mr_0001.nii.gz", "pet_0000.nii.gz", "x.nii", "x.nrrd"):
        (scans / name).write_text("x")
    names = [[f.name for f in files] for files in find_scans([scans])]
    several = ["mr_0000.nii.gz", "mr_0001.nii.gz"]
    assert names == [["ct_0001.nii.gz"], ["ct_0002.nii.gz"], several, ["pet_0000.nii.gz"], ["x.nii"], ["x.nrrd"]]
    assert WorkList.gather(tmp_path / "list", [scans])[1] == ["ct_0001", "ct_0002", "mr", "pet", "x", "x-2"]


def test_files_that_are_named_themselves_are_channels_too(tmp_path):
    names = ("p_0001.nii.gz", "p_0000.nii.gz", "q_0001.nii.gz", "IM_0000", "IM_0001", "gt.nrrd")  # a mask's name was chosen by a person
    for name in (*names, "other/p_0000.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_scans([*(tmp_path / name for name in names), tmp_path / "other" / "p_0000.nii.gz"])
    assert found[0] == (tmp_path / "p_0000.nii.gz", tmp_path / "p_0001.nii.gz")
    assert found[1:] == [*((tmp_path / name,) for name in names[2:]), (tmp_path / "other" / "p_0000.nii.gz",)]


def test_numbered_scans_that_a_shell_names_one_by_one_are_scans(tmp_path, make_package, unetseg):
    files = [tmp_path / f"ct_{i:04d}.nii.gz" for i in range(5)]
    for i, file in enumerate(files):
        write_image(ball(1.0, 4 + i), file)
    assert find_scans(files) == [(file,) for file in files] and find_scans(files[:4]) == [tuple(files[:4])]
    options = "-m", make_package().path, "--device", "cpu", "--engine", "onnx", "-q"
    assert unetseg("worklist", "make", tmp_path / "one", *files[:2], *options)[0] == 0  # the model takes one channel
    assert [s.status for s in WorkList.open(tmp_path / "one").scans.values()] == ["segmented"] * 2
    listed = tmp_path / "list.txt"
    listed.write_text("ct_0000.nii.gz\nct_0001.nii.gz\n")
    work, added = WorkList.gather(tmp_path / "late", files[:2])
    assert added == ["ct"] and unetseg("worklist", "make", work.folder, *options)[0] == 0
    error = work.refresh().scan("ct").error
    assert "needs 1 (CT)" in error and "If its files are scans of their own, name each on a line of a .txt list." in error
    assert work.add([listed]) == ["ct-2", "ct_0001"]


def test_scans_of_a_list_from_before_do_not_come_again_as_channels(tmp_path):
    files = [tmp_path / f"ct_{i:04d}.nii.gz" for i in range(2)]
    for file in files:
        write_image(ball(), file)
    work, added = WorkList.gather(tmp_path / "list", files, channels=1)
    assert added == ["ct", "ct_0001"] and work.add(files) == []
    for name in added:
        work.fail(name, "It needs 2 channels.")
    assert work.add(files) == ["ct-2"] and work.scan("ct-2").files == tuple(files)


@pytest.mark.parametrize(
    ("scans", "masks"),
    [
        (["imagesTr/a.nii", "imagesTs/b.nii"], ["labelsTr/a.nii", "labelsTs/b.nii"]),
        (["s0001/ct.nii"], ["s0001/segmentations/liver.nii", "s0002/segs/liver.nii"]),  # TotalSegmentator
        (["p1/p1_frame01.nii", "GT_012.nii"], ["p1/p1_frame01_gt.nii", "gt/p1.nii"]),  # ACDC; but a patient of that name
        (["sub-1/sub-1_T1w.nii"], ["sub-1/sub-1_dseg.nii", "sub-1/sub-1_label-L_probseg.nii", "sub-1/sub-1_desc-brain_mask.nii"]),  # BIDS
        (["lung.nii"], ["lung_labelmap.nii", "Segmentation-label.nii", "lung.seg.nrrd"]),  # Slicer
    ],
)
def test_the_masks_of_common_layouts_are_no_scans(tmp_path, scans, masks):
    for name in (*scans, *masks):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert sorted(f for (f,) in find_scans([tmp_path])) == sorted(tmp_path / name for name in scans)


@pytest.mark.parametrize("name", ["gt", "labelsTr"])
def test_a_folder_that_a_person_names_is_searched_whatever_it_is_called(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "p1.nii").write_text("x")
    assert find_scans([tmp_path / name]) == [(tmp_path / name / "p1.nii",)] and find_scans([tmp_path]) == []


def test_a_dicom_folder_without_images_is_no_scan(tmp_path):
    def dicom(name, modality, kind=b"CS\x08\0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM" + b"\x08\0\x60\0" + kind + modality + b"\x08\0\x70\0LO")

    for i in range(9):
        dicom(f"mixed/a{i}", b"RTSTRUCT")
    dicom("mixed/ct", b"CT")
    dicom("plain/ct", b"CT")
    dicom("plans/rs", b"RTSTRUCT")
    dicom("plans/rd", b"RTDOSE", b"\x06\0\0\0")  # without the value's type
    dicom("plans/below/mr", b"MR")
    dicom("DICOMDIR/DICOMDIR", b"SR", kind=b"UI\x16\x001.2.840.10008.1.3.10\0\x08\0\x60\0CS\x02\0")  # of the first of its series
    assert [f.name for (f,) in find_scans([tmp_path])] == ["DICOMDIR", "mixed", "plain", "below"]


def test_pictures_are_scans_where_nothing_else_is(tmp_path):
    scans = tmp_path / "scans"
    for name in ("b.PNG", "p/x.tiff", "p/x_mask.png", "a_0000.jpg", "a_0001.jpg", "masks/b.png", "notes.txt"):
        (scans / name).parent.mkdir(parents=True, exist_ok=True)
        (scans / name).write_text(name)
    assert WorkList.gather(tmp_path / "list", [scans])[1] == ["a", "b", "x"]
    for i in range(5):
        (tmp_path / f"film_{i:04d}.png").write_text("x")
        (tmp_path / f"film_{i:04d}.nii").write_text("x")
    assert len(find_scans([tmp_path])) == 1  # five channels
    for i in range(5):
        (tmp_path / f"film_{i:04d}.nii").unlink()
    assert len(find_scans([tmp_path])) == 8  # five frames
    (scans / "p" / "ct.nii.gz").write_text("x")  # of which the pictures may be
    assert find_scans([scans]) == [(scans / "p" / "ct.nii.gz",)]


def test_what_a_training_set_keeps_is_no_scan(tmp_path):
    write_image(ball(), tmp_path / "a.nii.gz")
    set_ = Dataset.create(tmp_path / "set", "Set", [Label(1, "Thing", (1, 2, 3), {})], ["CT"])
    set_.add(ball(), (ball().array > 0.5).astype(np.uint8))
    for name in ("retrain/job/check/c_image.nii.gz", "new.nii.gz"):
        write_image(ball(), set_.folder / name)
    assert find_scans([tmp_path]) == [(tmp_path / "a.nii.gz",), (set_.folder / "new.nii.gz",)]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems know no such names")
def test_a_name_that_is_no_utf8_leaves_the_other_scans_of_its_folder(tmp_path):
    bad = tmp_path / "scans" / os.fsdecode(b"sc\xe4n.nii.gz")
    write_image(ball(1.0), tmp_path / "scans" / "s0.nii.gz")
    bad.write_bytes((tmp_path / "scans" / "s0.nii.gz").read_bytes())
    work, added = WorkList.gather(tmp_path / "list", [tmp_path / "scans"])
    assert added == ["s0"] and len(work.left_out) == 1 and "has a name that is not UTF-8" in work.left_out[0]
    (tmp_path / "scans" / "s0.nii.gz").unlink()
    for sources in ([tmp_path / "scans"], [bad]):
        with pytest.raises(UserError, match="has a name that is not UTF-8"):
            WorkList.gather(tmp_path / "other", sources)
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------------------------------------------- list


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    for i, edge in enumerate((0.2, 2.0, 0.6, 1.2)):
        write_image(ball(edge, center=(10, 10 + 2 * i, 16)), folder / f"s{i}.nii.gz")
    return folder


@pytest.fixture
def work(tmp_path, scans):
    out = WorkList.create(tmp_path / "list")
    assert out.add([scans]) == ["s0", "s1", "s2", "s3"]
    return out


def segment_all(work, package):
    out = []
    while (scan := work.segment([package], Annotator.here(pid=os.getpid()), ONNX)) is not None:
        out.append(scan)
    return out


def test_scans_are_segmented_in_advance_and_offered_where_it_helps_most(work, make_package, tmp_path):
    package = make_package()
    assert work.choose_models([package]) == 4 and work.unsegmented == 4
    ends = []
    me = replace(ANNA, pid=os.getpid(), lease=module.LONG_LEASE)

    def meanwhile():  # a killed one on another computer must not hold its scan for the hours of a person
        claims = [s.get("claim") for s in json.loads((work.folder / module.LIST).read_text("utf-8"))["scans"].values()]
        ends.extend(claim["until"] for claim in claims if claim)
        return False

    done = [work.segment([package], me, ONNX, cancelled=meanwhile), *segment_all(work, package)]
    assert ends and max(ends) <= work._now() + module.LEASE
    assert [s.status for s in done] == ["segmented"] * 4 and work.counts()["segmented"] == 4 and work.unsegmented == 0
    for scan in done:
        image = read_image(scan.files)
        array, labels = read_mask(scan.mask, image)
        assert [d.name for d in labels] == ["thing"] and np.array_equal(array, image.array > 0.5)
    expected = [s.name for s in sorted(done, key=lambda s: -s.scores["value"])]
    ahead = [s.name for s in work.ordered()]
    assert ahead[0] == expected[0] == "s1" and sorted(ahead) == ["s0", "s1", "s2", "s3"]
    assert work.labels("toy-1.0.0")[0].name == "thing"
    assert [s.name for s in WorkList.open(work.folder).ordered(2)] == ahead[:2]  # it is all in the file
    assert work.add([tmp_path / "scans"]) == []  # they are there


def test_a_sign_of_life_that_fails_costs_no_scan(work, make_package, monkeypatch):
    package, tries = make_package(), []
    work.choose_models([package])

    def away_once(self, me):
        tries.append(me)
        if len(tries) == 1:
            raise UserError("The folder cannot be read or written (Host is down).")

    monkeypatch.setattr(module, "LEASE", 0.0)
    monkeypatch.setattr(WorkList, "renew", away_once)
    assert work.segment([package], ANNA, ONNX).status == "segmented" and len(tries) > 1


def test_a_bad_scan_is_a_sentence_and_stops_nobody(work, make_package, scans):
    (scans / "s2.nii.gz").write_bytes(b"no image")
    package = make_package()
    work.choose_models([package])
    found = {s.name: s for s in segment_all(work, package)}
    assert found["s2"].status == "failed" and "cannot be read as an image" in found["s2"].error and len(found) == 4
    assert work.counts()["segmented"] == 3 and "s2" not in {s.name for s in work.ordered()}
    write_image(ball(), scans / "s2.nii.gz")
    assert work.choose_models([package]) == 1  # tried again
    assert segment_all(work, package)[0].status == "segmented"


def test_a_scan_that_was_still_being_copied_comes_back_where_it_is_added_again(work, scans):
    work.fail("s2", "s2.nii.gz is cut short or damaged; copy or export it again.")
    assert work.add([scans / "s1.nii.gz"]) == [] and work.add([scans]) == ["s2"]
    assert (work.scan("s2").status, work.scan("s2").error) == ("waiting", "") and work.add([scans]) == []


def two_series(folder, n):
    """DICOM: the series 1.n.1 and 1.n.2."""
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for uid in (f"1.{n}.1", f"1.{n}.2"):
        for z, part in enumerate((ball().array * 100).astype(np.int16)):
            image = sitk.GetImageFromArray(part[None])
            tags = {"0008|0018": f"{uid}.{z}", "0008|0060": "CT", "0020|000d": "1.2.3", "0020|000e": uid, "0020|0013": str(z)}
            for key, value in {**tags, "0020|0032": f"0\\0\\{z}"}.items():
                image.SetMetaData(key, value)
            writer.SetFileName(str(folder / f"{uid}.{z}.dcm"))
            writer.Execute(image)
    return folder


def test_folders_of_several_series_as_channels_become_a_scan_for_each_pair(tmp_path, make_package):
    for n in (7, 8):
        two_series(tmp_path / f"f{n}", n)
    (tmp_path / "l.csv").write_text("f7,f8\n")
    work, package = WorkList.gather(tmp_path / "list", [tmp_path / "l.csv"])[0], make_package(channels=["T1", "T2"])
    work.choose_models([package])
    for _ in range(7):  # three splits and four scans
        work.segment([package], ANNA, ONNX)
    assert work.counts()["segmented"] == len(work.scans) == 4
    assert {s.series for s in work.scans.values()} == {f"1.7.{a},1.8.{b}" for a in (1, 2) for b in (1, 2)}


def test_a_folder_that_a_person_opened_meanwhile_is_not_split_twice(tmp_path, make_package, monkeypatch):
    package, work = make_package(), WorkList.gather(tmp_path / "list", [two_series(tmp_path / "f7", 7)])[0]
    work.choose_models([package])

    def slowly(files, series=None):  # meanwhile a person presses Next
        monkeypatch.setattr(module, "read_image", read_image)
        hers = WorkList.open(work.folder)
        name = hers.next(ANNA).name
        with pytest.raises(SeveralSeries) as e:
            read_image(files)
        hers.split(name, list(e.value.series))
        hers.next(ANNA)
        return read_image(files, series)

    monkeypatch.setattr(module, "read_image", slowly)
    work.segment([package], BERT, ONNX)
    assert [(s.series, s.status, s.by) for s in work.refresh().scans.values()] == [("1.7.1", "taken", "Anna"), ("1.7.2", "waiting", "")]
    work.add([two_series(tmp_path / "f8", 8)])
    hers = WorkList.open(work.folder)
    WorkList.open(work.folder).split("f8", ["1.8.1", "1.8.2"])
    hers.split("f8", ["1.8.1", "1.8.2"])  # she had read it before
    assert [s.series for s in work.refresh().scans.values()] == ["1.7.1", "1.7.2", "1.8.1", "1.8.2"]


def test_what_was_found_in_a_folder_that_another_split_meanwhile_is_no_series(work, make_package):
    package, split = make_package(), []
    work.choose_models([package])

    def meanwhile():
        if not split:
            split.append(WorkList.open(work.folder).split("s0", ["1.2", "1.3"]))
        return False

    work.segment([package], BERT, ONNX, cancelled=meanwhile)
    scan = work.refresh().scan("s0")
    assert (scan.series, scan.status, scan.mask) == ("1.2", "waiting", None) and not list(work.folder.glob("worklist/*/*"))


def test_interrupted_after_the_list_names_it_a_result_stays(work, make_package, monkeypatch):
    package, leave = make_package(), module.FolderLock.__exit__
    work.choose_models([package])

    def interrupted(self, *error):
        leave(self, *error)
        if any(record.get("mask") for record in json.loads((work.folder / module.LIST).read_text("utf-8"))["scans"].values()):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.FolderLock, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            work.segment([package], ANNA, ONNX)
    assert work.refresh().scan("s0").status == "segmented" and work.scan("s0").mask.is_file()


def test_another_model_segments_what_is_left_to_correct_again(work, make_package):
    old, new = make_package(), make_package(version="2.0.0")
    work.choose_models([old])
    segment_all(work, old)
    first = work.next(ANNA)
    work.done(first.name, ANNA, "case-1")
    former = {s.name: s.mask for s in work.scans.values()}
    assert work.choose_models([new]) == 3
    with pytest.raises(UserError, match="^toy-2.0.0 was chosen for the work list meanwhile, so toy-1.0.0 stopped; choose toy-1.0.0 again"):
        work.segment([old], ANNA, ONNX)
    again = segment_all(work, new)
    assert work.segment([old], ANNA, ONNX) is None  # nothing is left of which to tell
    assert {s.model for s in again} == {"toy-2.0.0"} and first.name not in {s.name for s in again}
    assert all(not former[s.name].exists() and s.mask.exists() for s in again)
    assert work.scan(first.name).case == "case-1" and work.scan(first.name).by == "Anna" and former[first.name].exists()


def test_a_mask_that_somebody_corrects_is_not_replaced(work, make_package):
    old, new = make_package(), make_package(version="2.0.0")
    work.choose_models([old])
    segment_all(work, old)
    work.choose_models([new])
    taken = []

    def meanwhile():
        if not taken:
            taken.append(WorkList.open(work.folder).next(replace(ANNA, pid=os.getpid())))
        return False

    other = work.segment([new], Annotator.here(pid=os.getpid()), ONNX, cancelled=meanwhile)
    while other.name != taken[0].name:  # the segmenter comes to the scan while it is taken
        work.back(taken.pop().name)
        other = work.segment([new], Annotator.here(pid=os.getpid()), ONNX, cancelled=meanwhile)
    scan = work.refresh().scan(other.name)
    assert scan.status == "taken" and scan.model == "toy-1.0.0" and scan.mask.is_file()
    assert len(list(scan.mask.parent.iterdir())) == 1
    work.back(scan.name)
    assert work.unsegmented and {s.model for s in segment_all(work, new)} == {"toy-2.0.0"}


def test_scans_on_a_drive_that_is_not_connected_are_left_to_others(work, make_package, scans):
    package = make_package()
    work.choose_models([package])
    scans.rename(scans.with_name("elsewhere"))
    segment_all(work, package)
    assert work.counts()["waiting"] == 4 and set(work.away) == {"s0", "s1", "s2", "s3"}
    scans.mkdir()  # as an unconnected share's mount point
    assert work.scan("s0").away == scans
    scans.rmdir()
    scans.with_name("elsewhere").rename(scans)
    (scans / "s1.nii.gz").unlink()
    assert work.scan("s0").away is None and work.scan("s1").away is None
    assert {s.status for s in segment_all(WorkList.open(work.folder), package)} == {"segmented", "failed"}  # it is gone for all


def fails_with(error):
    """read_image() of a computer that cannot read s0."""

    def read(files, *_series):
        if "s0" in str(files):
            raise error
        return read_image(files, *_series)

    return read


def caused(text, cause):
    error = UserError(text)
    error.__cause__ = cause
    return error


ITK = "Failed to allocate memory for image"
NO_MEMORY = caused(f"s0.nii.gz cannot be read as an image ({ITK}); check that it is complete.", RuntimeError(ITK))
NO_RIGHTS = caused(
    "s0.nii.gz cannot be read (Permission denied); check your rights and the disk.", PermissionError(13, "Permission denied")
)


@pytest.mark.parametrize("error", [MemoryError(), NO_MEMORY, NO_RIGHTS, OSError(28, "No space left on device")])
def test_what_this_computer_cannot_do_fails_no_scan(work, make_package, monkeypatch, error):
    package = make_package()
    work.choose_models([package])
    monkeypatch.setattr(module, "read_image", fails_with(error))
    done = segment_all(work, package)
    assert "was left alone" in done[0].error and list(work.away) == ["s0"] and len(done) == 4
    assert ("check your rights and the disk. s0 was" in done[0].error) == (error is NO_RIGHTS) and "is complete" not in done[0].error
    assert work.refresh().counts() == dict.fromkeys(module.STATUSES, 0) | {"waiting": 1, "segmented": 3} and work.next(ANNA)
    monkeypatch.undo()
    assert [s.name for s in segment_all(WorkList.open(work.folder), package)] == ["s0"]  # it is nobody's


def test_what_windows_has_no_number_for_is_no_damage(work, monkeypatch):
    """It is EINVAL, as of a file that OneDrive cannot bring. A reader that looks before a damaged file's start has it too."""
    scan, invalid = work.scan("s0"), OSError(errno.EINVAL, "Invalid argument")
    error = caused("s0.nii.gz cannot be read (Invalid argument); check your rights and the disk.", invalid)
    assert module.left_alone(scan, error) == ""

    def fail(*_unused):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(module, "open", fail, raising=False)
    assert "s0 cannot be opened here (Invalid argument), so it was left alone" in module.left_alone(scan, error)


def test_what_is_amiss_with_more_than_a_scan_is_told_by_its_own_sentence(work, make_package, monkeypatch):
    package, tried = make_package(), []
    work.choose_models([package])

    def fails(error):
        def predict(*_unused):
            tried.append(error)
            raise error

        monkeypatch.setattr(module, "predict", predict)
        return error

    fails(caused("toy.unet.zip cannot be read (Permission denied); check your rights.", PermissionError(13, "Permission denied")))
    with pytest.raises(UserError, match="^toy.unet.zip cannot be read .Permission denied.; check your rights.$"):
        segment_all(work, package)
    assert len(tried) == 1 and work.refresh().counts()["waiting"] == 4 and work.unsegmented == 4
    gpu = fails(UserError("The GPU's memory is full; use the CPU."))  # of a smaller scan it may not be
    assert [s.error for s in segment_all(work, package)] == [f"{gpu} s{i} was left alone." for i in range(4)]


def test_models_that_need_a_person_segment_nothing_in_advance(work):
    for name, why in (("lung-nodule-click", "works from clicks"), ("lung-nodule-2d", "a box around one target")):
        with pytest.raises(UserError, match=f"{why}.*choose another model, or none"):
            work.choose_models([find_model(name)])
    assert work.next(ANNA).name == "s0"  # a list needs no model
    # Nor do models that cannot be averaged: every scan had failed by them.
    with pytest.raises(UserError, match="do not give the same labels, so they cannot be averaged"):
        work.choose_models([find_model("hippocampus-3d"), find_model("left-ventricle-2d")])
    assert work.models == ()


@pytest.fixture
def clock(monkeypatch):
    """The folder's clock, which stands still: clock[0] is moved by hand, however long the machine takes. It begins where rounding a
    claim's end to the nearest tenth of a second would lengthen it."""
    now = [1.7e9 + 0.06]
    monkeypatch.setattr(WorkList, "_now", lambda self: now[0])
    return now


def test_nobody_gets_what_another_has(work, clock):
    mine = [work.next(ANNA).name]
    theirs = work.next(BERT)
    assert theirs.name != mine[0] and theirs.status == "taken" and work.counts()["taken"] == 2
    assert work.scan(mine[0]).by == "Anna" and 12 * 3600 - 0.11 < work.scan(mine[0]).until <= 12 * 3600
    assert work.next(ANNA).name == mine[0]  # from the command line one goes on with what one has
    other = work.next(ANNA, leave=mine[0], passed=[mine[0]])
    assert other.name not in (mine[0], theirs.name) and work.scan(mine[0]).status == "waiting"
    assert work.skip(other.name, ANNA) == "" and work.scan(other.name).status == "skipped"
    rest = work.next(ANNA, passed=[mine[0]])
    assert rest.name not in (mine[0], other.name, theirs.name)
    work.done(rest.name, ANNA)
    assert work.next(ANNA, passed=[mine[0]]).name == mine[0]  # what was passed over comes last
    work.done(mine[0], ANNA)
    assert work.next(ANNA) is None and work.counts() == {
        "waiting": 0, "segmented": 0, "taken": 1, "done": 2, "skipped": 1, "failed": 0,
    }  # fmt: skip
    work.back(other.name)
    assert work.next(ANNA).name == other.name


def test_what_was_put_off_comes_again_in_that_order(work):
    assert work.next(ANNA, passed=["s3", "s0", "s2", "s1"]).name == "s3"


def test_what_was_taken_is_free_again_when_its_time_is_over_or_its_program_gone(work, clock):
    short = Annotator("anna", "Anna", lease=60)
    name = work.next(short).name
    assert work.next(BERT).name != name
    clock[0] += 59
    assert work.scan(name).status == "taken"
    clock[0] += 1
    assert work.scan(name).status == "waiting"
    assert work.next(Annotator("carl")).name == name
    note = work.done(name, short, "case-1")
    assert note == f"{name} was taken by another annotator too, as your time for it was over." and work.scan(name).status == "done"
    assert "already done by Anna; the dataset keeps both versions" in work.done(name, Annotator("carl"), "case-1")
    assert work.done(name, short) == f"{name} was already done by Anna."  # and into no dataset
    assert work.skip(name, short) == f"{name} was already done by Anna, and stays so." and work.scan(name).status == "done"

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    killed = work.next(Annotator.here(pid=gone.pid))
    assert work.scan(killed.name).status == "waiting" and work.next(Annotator.here(pid=os.getpid())).name == killed.name


def test_names_tell_apart_who_share_an_account(work, clock):
    """At the command line; a panel's name may change while it has a scan."""
    bob, nobody = replace(ANNA, name="Bob"), replace(ANNA, name="")
    hers = work.next(ANNA).name
    assert work.skip(hers, bob) == f"{hers} was taken by Anna too."
    assert work.next(ANNA).name != hers and work.scan(hers).status == "skipped"
    work.back(hers)
    work.back(work.next(ANNA).name)
    hers = work.next(ANNA).name
    his = work.next(bob).name
    assert his != hers and work.scan(hers).by == "Anna" and work.scan(his).by == "Bob"
    assert work.next(bob, leave=hers).name == his and work.scan(hers).status == "taken"
    assert work.next(nobody).name == min(hers, his) and work.scan(hers).by == "Anna"  # its own, and their names stay
    free = work.next(nobody, passed=[hers, his]).name
    assert work.next(nobody).name == free not in (hers, his) and work.scan(free).by == ""
    assert work.next(ANNA, leave=hers).name == free and work.scan(free).by == "Anna"
    panel = replace(ANNA, pid=os.getpid())
    other = work.next(panel).name
    assert work.next(replace(panel, name="Bob")).name == other and work.scan(other).by == "Bob"


def test_time_is_the_folders(work, monkeypatch):
    name = work.next(ANNA).name
    monkeypatch.setattr(module.time, "time", lambda: 0.0)  # of a computer whose clock is wrong
    assert WorkList.open(work.folder).scan(name).status == "taken"
    assert WorkList.open(work.folder)._now() == pytest.approx((work.folder / "worklist.json").stat().st_mtime, abs=600)


def test_a_sign_of_life_keeps_what_is_taken(work, clock):
    me = Annotator("anna", lease=60)
    name = work.next(me).name
    for _ in range(3):
        clock[0] += 40
        work.renew(me)
    assert work.scan(name).status == "taken"
    revision = work._data["revision"]
    work.renew(BERT)  # who has nothing changes nothing
    assert work.refresh()._data["revision"] == revision


def test_three_annotators_at_once_do_no_scan_twice(tmp_path):
    for i in range(18):
        (tmp_path / "scans").mkdir(exist_ok=True)
        (tmp_path / "scans" / f"s{i:02d}.nrrd").write_text("x")
    work = WorkList.create(tmp_path / "list")
    work.add([tmp_path / "scans"])
    code = f"""
    import sys
    from UNetSegmentationLib.worklist import Annotator, WorkList
    me, work = Annotator(sys.argv[1]), WorkList.open({str(work.folder)!r})
    while (scan := work.next(me)) is not None:
        print(scan.name)
        work.done(scan.name, me)
    """
    children = [python(code.replace("sys.argv[1]", repr(f"annotator {k}"))) for k in range(3)]
    told = []
    for child in children:
        out, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
        told += out.split()
    assert sorted(told) == [f"s{i:02d}" for i in range(18)] and work.refresh().counts()["done"] == 18


@POSIX
@pytest.mark.parametrize("point", ["predicting", "mask written", "half a list", "list not moved"])
def test_killed_while_segmenting_the_next_goes_on_and_nothing_is_half_there(work, make_package, point, monkeypatch):
    from UNetSegmentationLib import dataset

    monkeypatch.setattr(dataset, "DEAD", -1.0)
    package = make_package()
    work.choose_models([package])
    code = f"""
    import os, signal
    from test_worklist import ONNX
    from UNetSegmentationLib import worklist as m
    from UNetSegmentationLib.model import ModelPackage
    def die(*_a, **_k):
        os.kill(os.getpid(), signal.SIGKILL)
    package, me = ModelPackage.read({str(package.path)!r}), m.Annotator.here(pid=os.getpid())
    work = m.WorkList.open({str(work.folder)!r})
    work.segment([package], me, ONNX)
    point = {point!r}
    if point == "predicting":
        m.predict = die
    elif point == "mask written":
        write = m.write_segmentation
        m.write_segmentation = lambda *a: (write(*a), die())
    elif point == "half a list":
        taken = m.WorkList._segmented
        def half(*a):
            out = taken(*a)
            m.flush = die
            return out
        m.WorkList._segmented = half
    else:
        taken = m.WorkList._segmented
        def late(*a):
            out = taken(*a)
            m.FolderLock.mine = die
            return out
        m.WorkList._segmented = late
    work.segment([package], me, ONNX)
    """
    child = python(code)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, errors
    work.refresh()
    assert work.counts()["segmented"] == 1 and work.unsegmented == 3
    assert len(segment_all(work, package)) == 3 and work.counts()["segmented"] == 4
    named = {s.mask for s in work.scans.values()}
    left = [p for p in work.folder.glob("worklist/*/*") if p not in named]
    for p in left:
        os.utime(p, (0, 0))
    work.clean()
    assert set(work.folder.glob("worklist/*/*")) == named and all(m.is_file() for m in named)


def test_what_a_dead_program_had_in_hand_is_segmented_last(work, make_package):
    """A scan too large for the memory would end every program before it came to the others."""
    package = make_package()
    work.choose_models([package])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    claim = work._claim(Annotator.here(pid=gone.pid), work._now(), "segment")
    work._commit(lambda data: data["scans"]["s0"].update(claim=claim))
    assert [s.name for s in segment_all(work, package)] == ["s1", "s2", "s3", "s0"] and work.counts()["segmented"] == 4


def test_a_result_that_windows_holds_stops_nothing_and_goes_later(work, make_package, monkeypatch):
    one, other = make_package(), make_package(name="other")
    work.choose_models([one])
    former = work.segment([one], ANNA, ONNX).mask
    work.choose_models([other])
    unlink = Path.unlink

    def held(self, missing_ok=False):
        if self == former:
            raise PermissionError(13, "The process cannot access the file")
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", held)
        for _ in range(4):
            assert work.segment([other], ANNA, ONNX).status == "segmented"
    named = work.scans["s0"].mask
    shared = named.parent.with_name("S0")  # the folder of a scan S0, where case means nothing
    named.parent.rename(shared)
    for path in shared.iterdir():
        os.utime(path, (0, 0))
    work.clean()
    assert [p.name for p in shared.iterdir()] == [named.name]


@POSIX
def test_a_link_in_a_shared_list_leads_to_nothing_that_is_removed(work, make_package, tmp_path):
    package, path = make_package(), work.folder / "worklist.json"
    work.choose_models([package])
    kept = [tmp_path / "home" / name for name in ("thesis.doc", "notes.txt")]
    kept[0].parent.mkdir()
    for file in kept:
        file.touch()
        os.utime(file, (0, 0))
    (work.folder / "worklist").mkdir()
    (work.folder / "worklist" / "x").symlink_to(kept[0].parent)
    (tmp_path / "empty").mkdir()
    (work.folder / "worklist" / "empty").symlink_to(tmp_path / "empty")
    data = json.loads(path.read_text("utf-8"))
    data["scans"] = {"s0": {**data["scans"]["s0"], "mask": "worklist/x/thesis.doc", "model": "other-1.0.0", "status": "segmented"}}
    path.write_text(json.dumps(data), "utf-8")
    assert work.segment([package], ANNA, ONNX).mask.parent == work.folder / "worklist" / "s0"
    work.clean()
    assert all(file.exists() for file in kept)


def test_every_file_gives_a_scan_a_name_that_a_list_takes(tmp_path, scans):
    names = ("..", "Müller é", "漢字", "a b.c-", "-x", "_0000", "a" * 59 + "-b", "CT", "x" * 80)
    for i, name in enumerate(names):
        (tmp_path / str(i)).mkdir()
        shutil.copy(scans / "s0.nii.gz", tmp_path / str(i) / f"{name}.nii.gz")
    work = WorkList.gather(tmp_path / "list", [tmp_path / str(i) / f"{name}.nii.gz" for i, name in enumerate(names)])[0]
    work.split("CT", ["1.2", "1.3"])
    assert len(WorkList.open(work.folder).scans) == len(names) + 1


def test_cancelled_the_scan_is_free_again(work, make_package):
    package = make_package()
    work.choose_models([package])
    with pytest.raises(Cancelled):
        work.segment([package], ANNA, ONNX, cancelled=lambda: True)
    assert work.unsegmented == 4 and work.segment([package], BERT, ONNX).name == "s0"


def test_a_list_is_made_and_changed_where_text_gets_longer_lines(tmp_path, scans, monkeypatch):
    def windows(self, text, encoding=None, errors=None, newline=None):
        return self.write_bytes(text.replace("\n", "\r\n").encode(encoding))

    monkeypatch.setattr(Path, "write_text", windows)
    work = WorkList.gather(tmp_path / "list", [scans])[0]
    assert work.next(ANNA).name == "s0" and work.refresh().counts()["taken"] == 1


def test_a_full_disk_leaves_the_list_as_it_was(work, make_package, monkeypatch):
    package = make_package()
    work.choose_models([package])
    before = (work.folder / "worklist.json").read_bytes()

    def full(*_unused):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "flush", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        work.next(ANNA)
    assert (work.folder / "worklist.json").read_bytes() == before and not list(work.folder.glob(".unetseg-*"))


def test_where_no_result_can_be_kept_no_scan_fails_for_it(work, make_package, monkeypatch):
    package = make_package()
    work.choose_models([package])

    def full(*_unused):
        raise UserError("x.seg.nrrd cannot be written (Error writing); choose a name in a folder with space.")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_segmentation", full)
        with pytest.raises(UserError, match="cannot take what was found in s0; check the disk's space"):
            work.segment([package], ANNA, ONNX)
    assert work.refresh().counts()["waiting"] == 4 and work.segment([package], BERT, ONNX).status == "segmented"


@pytest.mark.parametrize("late", [False, True])
def test_in_the_place_of_a_list_that_was_lost_nothing_is_left(work, make_package, monkeypatch, late):
    """As of a network folder, whose empty mount point would hold the result, hidden once it is there again."""
    package = make_package()
    work.choose_models([package])
    happens = "write_segmentation" if late else "describe"
    former = getattr(module, happens)

    def lose(*args):
        out = former(*args)
        (work.folder / "worklist.json").unlink()
        return out

    monkeypatch.setattr(module, happens, lose)
    with pytest.raises(UserError, match="is no work list" if late else "is no longer there; connect its drive .* and segment again"):
        work.segment([package], ANNA, ONNX)
    assert not [path for path in work.folder.rglob("*") if path.is_file()]


def test_a_list_that_is_gone_damaged_or_hostile_is_a_sentence(work):
    path, good = work.folder / "worklist.json", json.loads((work.folder / "worklist.json").read_text())
    for change, said in (
        (lambda d: d.update(format="other"), "another program's"),
        (lambda d: d.update(format_version=2), "newer version"),
        (lambda d: d.pop("scans"), "damaged"),
        (lambda d: d["scans"]["s0"].update(status="odd"), "damaged .the scan 's0'"),
        (lambda d: d["scans"].update({"../../new": d["scans"].pop("s0")}), "damaged .the scan '../../new'"),
        (lambda d: d["scans"]["s0"].update(mask="worklist/../../x.nrrd"), "damaged .the file"),
        (lambda d: d["scans"]["s0"].update(mask=r"worklist/s0/..\..\x.nrrd"), "damaged .the file"),
        (lambda d: d["scans"]["s0"].update(claim={"until": "soon"}), "damaged"),
    ):
        data = json.loads(json.dumps(good))
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match=said):
            work.next(ANNA)
    path.unlink()
    with pytest.raises(UserError, match="is no work list .it has no worklist.json"):
        work.refresh()
    with pytest.raises(UserError, match="is not there; connect its drive"):
        WorkList.open(work.folder / "gone")


def test_a_list_and_its_scans_may_move_together(work, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("list", "scans"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    moved = WorkList.open(tmp_path / "elsewhere" / "list")
    assert moved.next(ANNA).files[0].is_file()
    assert moved.add([tmp_path / "elsewhere" / "scans"]) == []


def test_scans_that_were_moved_stay_what_they_are(work, scans, tmp_path):
    assert work.add([two_series(tmp_path / "f7", 7)]) == ["f7"]
    work.split("f7", ["1.7.1", "1.7.2"])
    work.done("s0", ANNA, "case-1")
    work.fail("s1", "It was being moved.")
    for name in ("scans", "f7"):
        (tmp_path / "new" / name).mkdir(parents=True)
        (tmp_path / name).rename(tmp_path / "new" / name)
    added = work.add([tmp_path / "new"])
    assert added == ["s1"] and sorted(work.moved) == ["f7", "f7-2", "s0", "s1", "s2", "s3"] and len(work.scans) == 6
    found = work.scan("s0")
    assert (found.status, found.case, found.files) == ("done", "case-1", (tmp_path / "new" / "scans" / "s0.nii.gz",))
    assert [s.series for s in work.scans.values() if s.files == (tmp_path / "new" / "f7",)] == ["1.7.1", "1.7.2"]
    shutil.copytree(tmp_path / "new", tmp_path / "copy")  # what is still there has not moved
    assert len(work.add([tmp_path / "copy"])) == 5 and not work.moved and work.add([tmp_path / "copy"]) == []


def test_another_patients_scan_of_the_same_name_is_not_the_one_that_is_gone(tmp_path):
    for name, edge in (("A", 0.2), ("B", 2.0)):
        write_image(ball(edge), tmp_path / name / "ct.nii")  # uncompressed, so of the same size
    for name, value in (("A", 1), ("B", 2)):  # a middle of nothing but background
        array = np.zeros((40, 64, 64), np.float32)
        array[4, 30, :9] = value
        write_image(Image(array), tmp_path / name / "masked" / "t1.nii")
        (tmp_path / name / "DICOM" / "ST1").mkdir(parents=True)
        (tmp_path / name / "DICOM" / "ST1" / "IM1").write_bytes(b"\0" * 128 + b"DICM" + bytes([value] * 300))
        (tmp_path / f"{name}.txt").write_text(f"{name}/ct.nii\n{name}/masked/t1.nii\n{name}/DICOM\n")
    work = WorkList.gather(tmp_path / "list", [tmp_path / "A.txt"])[0]
    work.done("ct", ANNA, "case-1")
    shutil.move(tmp_path / "A", tmp_path / "archive")
    assert work.add([tmp_path / "B.txt"]) == ["ct-2", "t1-2", "DICOM-2"] and not work.moved
    shutil.copytree(tmp_path / "archive", tmp_path / "again")
    two = [tmp_path / name / "ct.nii" for name in ("archive", "again")]
    assert len(work.add(two)) == 2 and not work.moved  # which of the two it is nobody can say


def test_scans_of_a_list_from_before_are_known_once_they_were_seen(work, scans, tmp_path):
    text = work.folder / "worklist.json"
    data = json.loads(text.read_text("utf-8"))
    for record in data["scans"].values():
        del record["print"]
    text.write_text(json.dumps(data), "utf-8")
    assert work.add([scans]) == [] and work.scan("s0").known
    taken = work.next(ANNA).name
    scans.rename(tmp_path / "new")
    assert work.add([tmp_path / "new"]) == [f"{taken}-2"]  # which somebody has on her screen
    assert sorted(work.moved) == sorted({"s0", "s1", "s2", "s3"} - {taken})


def test_a_drive_that_is_not_there_has_not_moved(work, scans, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == scans.parent)
    scans.rename(tmp_path / "new")
    assert len(work.add([tmp_path / "new"])) == 4 and not work.moved  # another computer may have it there


@pytest.mark.parametrize("top", ["Z:\\", "\\\\nas\\study\\"])
def test_a_list_at_the_top_of_a_drive_or_share_may_have_another_letter_elsewhere(monkeypatch, top):
    monkeypatch.setattr(module, "Path", PureWindowsPath)
    monkeypatch.setattr(module, "_plain", lambda path: PureWindowsPath(ntpath.normpath(path)))
    stored = {folder: WorkList(PureWindowsPath(top, folder), {})._stored(PureWindowsPath(top, "ct", "a.nii.gz")) for folder in ("list", "")}
    assert stored == {"list": "../ct/a.nii.gz", "": "ct/a.nii.gz"}
    assert WorkList(PureWindowsPath(top, "list"), {})._stored(PureWindowsPath("D:\\ct\\a.nii.gz")) == "D:/ct/a.nii.gz"


@POSIX
def test_below_the_root_a_list_names_scans_as_they_are():
    assert WorkList(Path("/list"), {})._stored(Path("/ct/a.nii.gz")) == Path("/ct/a.nii.gz").absolute().as_posix()


def test_to_windows_a_scan_in_other_letters_is_the_same(work, scans, monkeypatch):
    monkeypatch.setattr(os.path, "normcase", ntpath.normcase)
    (scans / "s0.nii.gz").rename(scans / "S0.nii.gz")
    assert work.add([scans / "S0.nii.gz"]) == []


@pytest.mark.skipif(sys.platform == "darwin", reason="there both are one name")
@pytest.mark.parametrize(("made", "here"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_list_of_a_mac_finds_names_with_umlauts_on_other_systems_and_back(tmp_path, made, here, monkeypatch):
    there = [unicodedata.normalize(form, "Müller/Größe ä.nii.gz") for form in (made, here)]
    write_image(ball(), tmp_path / there[0])
    work = WorkList.gather(tmp_path / "list", [tmp_path / there[0]])[0]
    (tmp_path / there[1]).parent.mkdir()
    (tmp_path / there[0]).rename(tmp_path / there[1])
    (tmp_path / there[0]).parent.rmdir()
    looks, exists = [], os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: looks.append(path) or exists(path))
    assert len(work.scans) == 1 and not looks  # not at thousands, on a slow share
    found = work.next(ANNA)
    assert found.files == (tmp_path / there[1],) and found.away is None and read_image(found.files)
    assert work.add([tmp_path / there[1]]) == []
    found.files[0].unlink()
    (tmp_path / there[1]).with_name("other").touch()
    assert work.scan(found.name).away is None  # its folder is there: the scan alone is gone
    (tmp_path / there[1]).parent.rename(tmp_path / "elsewhere")
    assert work.scan(found.name).away is not None


def test_a_list_lies_in_a_datasets_folder_and_neither_minds(tmp_path, scans):
    dataset = Dataset.create(tmp_path / "set", "Set", [Label(1, "thing", (1, 2, 3), {})], ["CT"])
    work = WorkList.create(dataset.folder)
    work.add([scans])
    assert not dataset.check() and dataset.clean(age=0) == [] and WorkList.there(dataset.folder)


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_makes_gives_and_takes(scans, make_package, tmp_path, unetseg, models_folder):
    def run(*arguments):
        return unetseg("worklist", *arguments)

    package, folder = make_package(), tmp_path / "list"
    assert run("make", folder)[0] == 2 and not folder.exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = run("make", folder, empty)
    assert code == 2 and "No scans were found there" in err and not folder.exists()
    assert run("make", empty, empty)[0] == 2 and empty.is_dir()  # a folder that was there stays
    assert run("make", folder, scans, "-m", package.path, "--limit=-1")[0] == 2 and not folder.exists()
    bad = (("--tta", "mirror", "no test-time augmentation 'mirror'"), ("--engine", "caffe", "no engine 'caffe'"))
    for option, value, sentence in bad:
        code, _, err = run("make", folder, scans, "-m", package.path, option, value)
        assert code == 2 and sentence in err and not folder.exists()
    code, _, err = run("make", folder, scans / "s0.nii.gz", "-m", package.path, "--limit", 1, "--device", "cpu", "--engine", "onnx")
    assert code == 0 and "1 scan added" in err and "1 scan: 1 segmented" in err and all(err.splitlines())  # no bar, which left a line
    shutil.copytree(package.path.parent, models_folder)
    for option, value, sentence in bad:  # with the list's own model
        code, _, err = run("make", folder, scans, option, value)
        assert code == 2 and sentence in err and WorkList.open(folder).counts()["segmented"] == len(WorkList.open(folder).scans) == 1
    code, _, err = run("make", folder, scans, "-m", package.path, "--limit", 1)
    assert code == 0 and "3 scans added" in err and "4 scans: 2 waiting, 2 segmented" in err
    code, _, err = run("make", folder)  # goes on where it was stopped
    assert code == 0 and "2 of 2" in err and "4 scans: 4 segmented" in err
    code, out, _ = run("next", folder, "--json", "--by", "Anna")
    scan = json.loads(out)
    assert code == 0 and scan["name"] == "s1" and scan["by"] == "Anna" and Path(scan["mask"]).is_file()

    image = read_image(scan["files"][0])
    corrected = tmp_path / "mine.nii.gz"
    write_image(image.like((image.array > 0.4).astype(np.uint8)), corrected)
    code, _, err = run("done", folder, "s1", "-m", corrected)
    assert code == 2 and "holds no dataset" in err
    dataset = Dataset.create(tmp_path / "set", "Set", [Label(3, "Thing", (1, 2, 3), {})], ["CT"])
    write_image(image.like(np.where(image.array > 0.4, 3, 0).astype(np.uint8)), corrected)
    code, _, err = run("done", folder, "s1", "--dataset", dataset.folder)
    assert code == 2 and "give --mask too" in err and WorkList.open(folder).scan("s1").status == "taken"
    code, out, err = run("done", folder, "s1", "-m", corrected, "--dataset", dataset.folder, "--by", "Anna")
    assert code == 0, err
    entry = next(iter(dataset.refresh().entries.values()))
    more = int(np.count_nonzero((image.array > 0.4) & ~(image.array > 0.5)))
    assert entry.changes["Thing"]["added"] == more > 0 and entry.record["model_name"] == "toy-1.0.0"
    write_image(image.like(np.zeros_like(image.array, np.uint8)), tmp_path / "empty.nii.gz")
    again = ("done", folder, "s1", "-m", tmp_path / "empty.nii.gz", "--dataset", dataset.folder)
    assert run(*again)[0] == 2
    code, out, err = run(*again, "--allow", "empty")
    assert code == 0 and "version 2" in out and "was already done by Anna; the dataset keeps both versions." in out, err
    assert run("skip", folder, "s0")[0] == 0 and run("back", folder, "s0")[0] == 0
    code, out, _ = run("list", folder, "--json")
    rows = {r["name"]: r for r in json.loads(out)}
    assert rows["s1"]["status"] == "done" and rows["s1"]["case"] == entry.name and rows["s0"]["status"] == "segmented"
    code, out, _ = run("list", folder)
    assert code == 0 and "1 done" in out


def test_a_list_whose_own_model_was_replaced_says_what_to_give(scans, make_package, tmp_path, unetseg):
    package, folder = make_package(), tmp_path / "list"
    options = "-m", package.path, "--limit", 1, "--device", "cpu", "--engine", "onnx"
    assert unetseg("worklist", "make", folder, scans / "s0.nii.gz", *options)[0] == 0
    code, _, err = unetseg("worklist", "make", folder, scans)
    assert code == 2 and "The list's own model is gone" in err and "with -m, or only add the scans with --later." in err
    assert "toy-1.0.0" in err and len(WorkList.open(folder).scans) == 1
    scans.rename(tmp_path / "moved")
    code, _, err = unetseg("worklist", "make", folder, tmp_path / "moved", "--later")
    assert code == 0 and "3 scans added, 1 scan found again in another place" in err


def test_who_segments_hears_that_a_colleague_chose_another_model(scans, make_package, tmp_path, unetseg, monkeypatch):
    mine, hers, folder, told = make_package(), make_package(version="2.0.0"), tmp_path / "list", []
    segmented = WorkList._segmented

    def meanwhile(self, *how):
        WorkList.open(folder).choose_models([hers])
        return segmented(self, *how)

    monkeypatch.setattr(WorkList, "_segmented", meanwhile)
    code, _, err = unetseg("worklist", "make", folder, scans, "-m", mine.path, "--device", "cpu", "--engine", "onnx", "-q")
    assert code == 2 and "toy-2.0.0 was chosen for the work list meanwhile, so toy-1.0.0 stopped" in err
    work = WorkList.open(folder)
    work.choose_models([mine])
    segmenter = module_desk._Segmenter(SimpleNamespace(tell=told.append), folder, [mine], ONNX)
    segmenter._thread.join(60)
    assert told[-1]["event"] == "rest" and "toy-2.0.0 was chosen" in told[-1]["error"]
    assert work.refresh().unsegmented == 4
    work.choose_models([mine, hers])
    with pytest.raises(UserError, match="toy-1.0.0 and toy-2.0.0 were chosen .* so toy-2.0.0 and toy-1.0.0 stopped"):
        work.segment([hers, mine], ANNA, ONNX)  # of which the first's card says how to clean up


def test_the_command_line_segments_and_names_each_series_of_a_folder(tmp_path, make_package, unetseg):
    folder, one, other = two_series(tmp_path / "f7", 7), tmp_path / "one", tmp_path / "other"
    options = "-m", make_package().path, "--device", "cpu", "--engine", "onnx"
    code, _, err = unetseg("worklist", "make", one, folder, *options)
    assert code == 0 and "1 of 2: f7, value" in err and "2 of 2: f7-2, value" in err and "2 scans: 2 segmented" in err
    code, _, err = unetseg("worklist", "make", other, folder)
    Dataset.create(other, "Set", [Label(1, "Thing", (1, 2, 3), {})], ["CT"])
    image = read_image(folder, "1.7.2")
    write_image(image.like((image.array > 50).astype(np.uint8)), tmp_path / "m.nii.gz")
    code, _, err = unetseg("worklist", "done", other, "f7", "-m", tmp_path / "m.nii.gz")
    assert code == 2 and "f7 holds several series, each a scan of its own now" in err
    assert [s.series for s in WorkList.open(other).scans.values()] == ["1.7.1", "1.7.2"]
    assert unetseg("worklist", "done", other, "f7-2", "-m", tmp_path / "m.nii.gz")[0] == 0
    assert WorkList.open(other).scan("f7-2").status == "done"


def test_the_command_line_adds_channels_by_their_names(tmp_path, make_package, unetseg):
    package, one, other = make_package(channels=["T2", "T1"]), ball(0.5), ball(2.0)
    for i, image in enumerate((one, other)):
        write_image(image, tmp_path / "s" / f"x_000{i}.nii.gz")
    write_image(one.like((one.array > 0.5).astype(np.uint8)), tmp_path / "m.nii.gz")
    unetseg("worklist", "make", tmp_path / "list", tmp_path / "s", "-m", package.path, "--device", "cpu", "--engine", "onnx")
    dataset = Dataset.create(tmp_path / "set", "Set", [Label(1, "Thing", (1, 2, 3), {})], ["t1", "T2"])
    done = "worklist", "done", tmp_path / "list", "x", "-m", tmp_path / "m.nii.gz", "--dataset", dataset.folder
    package.path.unlink()
    code, _, err = unetseg(*done)
    assert code == 0, err
    (entry,) = dataset.refresh().entries.values()
    assert np.array_equal(read_image(entry.images[0]).array, other.array) and np.array_equal(read_image(entry.images[1]).array, one.array)


# ----------------------------------------------------------------------------------------------------------------- desk


class DeskClient:
    """The desk as a panel has it, on pipes."""

    def __init__(self):
        self.folder = new_folder()
        arguments = [*command(sys.executable, self.folder), "desk"]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment(sys.executable))
        self.lines, self.heard, self.number = Lines(), [], 0

    def tell(self, op, **fields):
        self.number += 1
        self.process.stdin.write(json.dumps({"id": self.number, "op": op, **fields}).encode() + b"\n")
        self.process.stdin.flush()
        return self.number

    def listen(self, wanted):
        while True:
            for message in self.heard:
                if wanted(message):
                    self.heard.remove(message)
                    return message
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, "the desk ended"
            self.heard += [json.loads(line) for line in self.lines.feed(data)]

    def ask(self, op, **fields):
        number = self.tell(op, **fields)
        return self.listen(lambda m: m.get("id") == number)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        remove_folder(self.folder)


@pytest.fixture
def desk():
    client = DeskClient()
    yield client
    client.close()


def test_the_desk_segments_while_it_hands_out_scans(desk, tmp_path, scans, make_package):
    folder, package = str(tmp_path / "list"), make_package()
    assert desk.ask("open", folder=str(tmp_path))["list"] is None
    assert "is not there" in desk.ask("open", folder=folder)["error"]
    answer = desk.ask("add", folder=folder, sources=[str(scans)])
    assert answer["added"] == 4 and answer["list"]["counts"]["waiting"] == 4
    first = desk.ask("next", folder=folder, leave="", passed=[])["scan"]
    assert first["name"] == "s0" and first["mask"] is None and first["labels"] == [] and first["value"] is None
    options = {"engine": "onnx", "device": "cpu", "tta": "none"}
    assert desk.ask("segment", folder=folder, models=[str(package.path)], options=options)["todo"] == 4
    rest = desk.listen(lambda m: m["event"] == "rest")
    assert rest["error"] == "" and sum(m["event"] == "changed" for m in desk.heard) == 3  # all but the one that is taken

    answer = desk.ask("next", folder=folder, leave="s0", passed=["s0"])
    scan, (channel,) = answer["scan"], answer["scan"]["channels"]
    image = read_image(scans / "s1.nii.gz")
    assert scan["name"] == "s1" and np.array_equal(load_array(desk.folder, channel["file"]), image.array)
    assert channel["geometry"]["spacing"] == list(image.spacing) and scan["labels"][0]["name"] == "thing"
    assert np.array_equal(load_array(desk.folder, scan["mask"]), image.array > 0.5) and Path(scan["maskFile"]).is_file()
    assert answer["list"]["counts"]["taken"] == 1
    answer = desk.ask("done", folder=folder, scan="s1", case="case-1")
    assert answer["notes"] == [] and answer["list"]["counts"]["done"] == 1
    assert "no scan nobody" in desk.ask("skip", folder=folder, scan="nobody")["error"]
    assert desk.ask("odd")["kind"] == "internal"
    assert "No model was chosen" in desk.ask("segment", folder=folder, models=[], options={})["error"]


def test_a_computer_whose_name_changes_is_no_other_annotator_to_itself(work, monkeypatch):
    from UNetSegmentationLib.worker.desk import Desk

    program = Desk.__new__(Desk)
    program._me = Annotator.here(pid=os.getpid())
    name = work.next(program._annotator({"by": " Anna "})).name
    monkeypatch.setattr(socket, "gethostname", lambda: "mac.clinic.example")  # of another network
    assert work.scan(name).by == "Anna"
    assert work.done(name, program._annotator({}), "case-1") == "" and not work.counts()["taken"]


def test_a_scan_stays_with_who_has_it_on_another_computer_of_the_same_name(work, monkeypatch):
    def at(computer):
        monkeypatch.setattr(module, "this_computer", lambda: computer)
        monkeypatch.setattr(files, "this_computer", lambda: computer)
        return Annotator.here(pid=os.getpid())

    name = work.next(replace(at("0a" * 16), pid=1 << 22)).name  # a program that is not on the other
    assert work.next(at("0b" * 16)).name != name
    assert work.next(at("0a" * 16)).name == name  # but on its own it is gone


def test_another_model_waits_for_the_scan_that_the_former_one_has_in_hand(desk, tmp_path, make_package):
    folder, options = str(tmp_path / "list"), {"engine": "onnx", "device": "cpu", "threads": 1, "tta": "none"}
    write_image(ball(), tmp_path / "one" / "s0.nii.gz")
    desk.ask("add", folder=folder, sources=[str(tmp_path / "one")])
    slow = slow_package(tmp_path, 60_000)
    desk.ask("segment", folder=folder, models=[str(slow.path)], options=options)
    desk.listen(lambda m: m["event"] == "segmenting")
    time.sleep(0.3)  # its network runs, which ends with the tile
    desk.tell("halt")
    desk.ask("segment", folder=folder, models=[str(make_package().path)], options=options)
    assert desk.listen(lambda m: m["event"] == "rest")["error"] == ""
    assert WorkList.open(folder).scan("s0").model == "toy-1.0.0"


def test_the_desk_reads_a_case_that_is_compared(desk, tmp_path):
    image = Image(np.random.default_rng(0).normal(0, 9, (2, 4, 6, 5)).astype(np.float32), (0.5, 0.6, 2.0), (1.0, 2.0, 3.0))
    masks = {key: np.zeros(image.shape, np.uint8) for key in ("truth", "before", "after")}
    masks["truth"][1, 2:4, 2] = masks["after"][1, 2:5, 2] = 2
    files = {key: tmp_path / f"{key}.nrrd" for key in ("image", *masks)}
    write_image(image, files["image"])
    for key, mask in masks.items():
        write_image(image.like(mask), files[key])
    answer = desk.ask("compare", files={key: str(path) for key, path in files.items()})
    channel = answer["image"]
    assert np.array_equal(load_array(desk.folder, channel["file"]), image.array[0]) and channel["geometry"]["origin"] == [1.0, 2.0, 3.0]
    assert set(answer["masks"]) == {"truth", "after"}  # nothing is marked in the other
    assert np.array_equal(load_array(desk.folder, answer["masks"]["after"]), masks["after"])
    assert answer["point"] == pytest.approx(image.index_to_point((2, 3, 1)))  # where "before" has none of it
    write_image(Image(masks["truth"]), files["after"])
    said = desk.ask("compare", files={key: str(path) for key, path in files.items()})
    assert said["kind"] == "user" and "after.nrrd does not lie on the grid of its image" in said["error"]
    files["before"].unlink()
    assert "before.nrrd" in desk.ask("compare", files={key: str(path) for key, path in files.items()})["error"]


def test_the_desk_waits_while_it_is_in_the_way(desk, tmp_path, scans, make_package):
    folder = str(tmp_path / "list")
    desk.ask("add", folder=folder, sources=[str(scans)])
    desk.tell("pause")
    number = desk.tell("segment", folder=folder, models=[str(make_package().path)], options={"engine": "onnx", "device": "cpu"})
    desk.tell("pause")
    desk.listen(lambda m: m.get("id") == number)
    before = desk.ask("status", folder=folder)["list"]["unsegmented"]
    time.sleep(0.5)
    assert desk.ask("status", folder=folder)["list"]["unsegmented"] >= before - 1 > 1
    desk.tell("go")
    desk.listen(lambda m: m["event"] == "rest")
    assert desk.ask("status", folder=folder)["list"]["unsegmented"] == 0


def test_the_desk_leaves_alone_what_is_not_there_from_this_computer(desk, tmp_path, scans):
    folder = str(tmp_path / "list")
    away = tmp_path / "drive"
    write_image(ball(), away / "a.nii.gz")
    desk.ask("add", folder=folder, sources=[str(away), str(scans)])
    (away / "a.nii.gz").rename(tmp_path / "a.nii.gz")
    answer = desk.ask("next", folder=folder, leave="", passed=[])
    assert answer["scan"]["name"] == "s0" and "drive is not there, so a was left alone" in answer["notes"][0]
    assert answer["list"]["counts"]["failed"] == 0
    for name in ("s0", "s1", "s2", "s3"):
        desk.ask("done", folder=folder, scan=name, case="c")
    assert "connect its drive" in desk.ask("next", folder=folder, leave="", passed=[])["error"]
    assert desk.ask("status", folder=folder)["list"]["counts"]["waiting"] == 1
    (tmp_path / "a.nii.gz").rename(away / "a.nii.gz")
    assert desk.ask("next", folder=folder, leave="", passed=[])["scan"]["name"] == "a"


def test_a_list_is_told_of_with_each_scan_looked_at_once(work, monkeypatch):
    looked, look = [], WorkList._scan
    monkeypatch.setattr(WorkList, "_scan", lambda self, name, *how: looked.append(name) or look(self, name, *how))
    work.skip("s1", ANNA)
    assert module_desk.summary(work)["counts"]["skipped"] == 1 and looked == ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize("left", [False, True])
def test_many_scans_of_one_folder_that_is_away_hold_the_desk_up_once(tmp_path, scans, left):
    for i in range(25):
        (tmp_path / "drive" / f"p{i}").mkdir(parents=True)
        (tmp_path / "drive" / f"p{i}" / "ct.nii.gz").write_text(str(i))
    folder, told = str(tmp_path / "list"), []
    WorkList.gather(folder, [tmp_path / "drive", scans])
    shutil.rmtree(tmp_path / "drive")
    if left:  # an empty folder, of a drive that is not connected
        (tmp_path / "drive").mkdir()
    desk = module_desk.Desk(0, 1, tmp_path, os.getpid())
    desk.tell = told.append
    answer = desk._next({"folder": folder, "leave": "", "passed": []})
    assert answer["scan"]["name"] == "s0" and [m["scan"] for m in told] == ["ct", "s0"]
    (note,) = answer["notes"]
    assert f"{tmp_path / 'drive'} is not there, so ct was left alone" in note and "add its scans again from where they are now" in note


def test_the_desk_opens_a_scan_with_voxels_that_are_no_numbers(desk, tmp_path):
    values = np.linspace(0, 100, 1000, dtype=np.float32).reshape(10, 10, 10)
    values[0] = np.nan
    write_image(Image(values), tmp_path / "scans/nan.nrrd")
    write_image(Image(np.full((4, 5, 6), np.inf, np.float32)), tmp_path / "scans/none.nrrd")
    folder = str(tmp_path / "list")
    desk.ask("add", folder=folder, sources=[str(tmp_path / "scans")])
    for name, low in (("nan", 10), ("none", 0)):
        scan = desk.ask("next", folder=folder, leave="", passed=[])["scan"]
        assert scan["name"] == name and low <= scan["channels"][0]["window"][0] < scan["channels"][0]["window"][1]
        desk.ask("skip", folder=folder, scan=name)


def test_the_desks_scan_is_the_same_case_as_the_commands(desk, tmp_path):
    image = Image(np.random.default_rng(0).integers(0, 100, (5, 6, 7)).astype(np.int64))
    write_image(image, tmp_path / "scans" / "a.nrrd")
    desk.ask("add", folder=str(tmp_path / "list"), sources=[str(tmp_path / "scans")])
    (channel,) = desk.ask("next", folder=str(tmp_path / "list"), leave="", passed=[])["scan"]["channels"]
    set_ = Dataset.create(tmp_path / "set", "Set", [Label(1, "Thing", (1, 2, 3), {})], ["CT"])
    mask = (image.array > 50).astype(np.uint8)
    added = [set_.add(Image(array), mask) for array in (load_array(desk.folder, channel["file"]), image.array)]
    assert added[0].name == added[1].name and channel["dtype"] == "int32"


def test_what_this_computer_cannot_hold_fails_nobodys_scan(desk, tmp_path, scans):
    folder = str(tmp_path / "list")
    desk.ask("add", folder=folder, sources=[str(scans)])
    remove_folder(desk.folder)  # as a full disk: the voxels cannot be written
    assert desk.ask("next", folder=folder, leave="", passed=[])["kind"] in ("user", "internal")
    counts = WorkList.open(folder).counts()
    assert counts["waiting"] == 4 and counts["failed"] == counts["taken"] == 0


@pytest.mark.parametrize("error", [MemoryError(), NO_MEMORY, UserError("s0.nii.gz cannot be read as an image (Unable to open).")])
def test_a_scan_that_this_person_cannot_open_is_left_to_others(work, monkeypatch, tmp_path, error):
    def denied(path, *mode):
        raise PermissionError(13, "Permission denied")

    def no_memory(_array):
        raise MemoryError

    desk = module_desk.Desk(0, 1, tmp_path, os.getpid())
    if isinstance(error, UserError) and error.__cause__ is None:
        monkeypatch.setattr(module, "open", denied, raising=False)
    monkeypatch.setattr(module_desk, "read_image", fails_with(error))
    for _ in range(2):  # not the same again and again
        answer = desk._next({"folder": str(work.folder), "leave": "", "passed": []})
        assert answer["scan"]["name"] == "s1" and "so it was left alone" in answer["notes"][0]
        work.back("s1")
    monkeypatch.setattr(module_desk, "storable", no_memory)
    with pytest.raises(UserError, match="s0.* so it was left alone"):
        desk._next({"folder": str(work.folder), "leave": "", "passed": []})
    assert work.refresh().counts()["waiting"] == 4


def test_a_full_disk_is_told_at_once_and_the_scan_at_hand_stays_taken(work, monkeypatch, tmp_path):
    def full(*_unused):
        raise OSError(28, "No space left on device")

    desk, read = module_desk.Desk(0, 1, tmp_path, os.getpid()), []
    monkeypatch.setattr(module_desk, "read_image", lambda *a: read.append(a) or read_image(*a))

    def later(leave):
        return desk._next({"folder": str(work.folder), "leave": leave, "passed": [leave]})["scan"]["name"]

    assert later("") == "s0"
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "open", full, raising=False)
        with pytest.raises(
            UserError, match="^The temporary folder .* cannot hold the volume .No space left on device.; free some disk space.$"
        ):
            later("s0")
    assert len(read) == 2 and [s.status for s in work.refresh().scans.values()] == ["taken", "waiting", "waiting", "waiting"]
    assert later("s0") == "s1" and [s.status for s in work.refresh().scans.values()] == ["waiting", "taken", "waiting", "waiting"]
    for name in ("s0", "s2", "s3"):
        work.done(name, BERT)
    assert later("s1") == "s1" and work.refresh().scan("s1").status == "taken"  # the last comes again


@POSIX
def test_a_scan_that_cannot_be_read_is_passed_over_and_the_desk_ends_with_its_client(desk, tmp_path, scans):
    folder = str(tmp_path / "list")
    (scans / "s0.nii.gz").write_bytes(b"no image")
    desk.ask("add", folder=folder, sources=[str(scans)])
    answer = desk.ask("next", folder=folder, leave="", passed=[])
    assert answer["scan"]["name"] == "s1" and "s0.nii.gz cannot be read" in answer["notes"][0]
    assert [m["scan"] for m in desk.heard if m["event"] == "reading"] == ["s0", "s1"]  # told before, should it end the desk
    assert answer["list"]["failed"][0]["name"] == "s0"
    desk.process.stdin.close()
    until(lambda: desk.process.poll() is not None, "the desk's end")


def test_a_scan_that_was_finished_while_it_was_segmented_stays_so(work, make_package):
    package = make_package()
    work.choose_models([package])
    ended = []

    def meanwhile():
        if not ended:
            ended.append(WorkList.open(work.folder).skip("s0", ANNA))
        return False

    assert work.segment([package], BERT, ONNX, cancelled=meanwhile).name == "s0"
    assert work.refresh().scan("s0").status == "skipped"


def test_every_column_of_the_description_counts_the_same():
    """By the first column, whose numbers are large, 1 is the farthest from 0; by both, 3 is."""
    points = np.array([[0, 0.0], [1000, 0.0], [0, 0.1], [900, 1.0], [500, 0.0]])
    assert order(np.ones(5), points)[:2] == [0, 3]


def test_a_scan_that_somebody_has_does_not_fail(work, make_package, scans, monkeypatch):
    """Taken meanwhile, not segmented before: who corrects it can read it."""
    package = make_package()
    work.choose_models([package])

    def fails(*words):
        WorkList.open(work.folder)._commit(lambda data: data["scans"]["s0"].update(claim=work._claim(ANNA, work._now(), "correct")))
        raise UserError("It cannot be segmented.")

    monkeypatch.setattr(module, "predict", fails)
    work.segment([package], BERT, ONNX)
    assert work.refresh().scan("s0").status == "taken" and not work.scan("s0").error


def test_what_is_being_written_is_not_cleaned_away(work):
    fresh, old = (work.folder / module.RESULTS / "s0" / f"{n}.seg.nrrd" for n in ("fresh", "old"))
    fresh.parent.mkdir(parents=True)
    for path in (fresh, old):
        path.touch()
    os.utime(old, (0, 0))
    work.clean()
    assert fresh.exists() and not old.exists()


def test_cleaning_knows_what_others_did_meanwhile(work, make_package):
    package = make_package()
    work.choose_models([package])
    stale = WorkList.open(work.folder)
    mask = work.segment([package], ANNA, ONNX).mask
    os.utime(mask, (0, 0))
    stale.clean()
    assert mask.is_file()


def test_what_has_no_result_yet_comes_before_what_another_model_segmented(work, make_package):
    old, new = make_package(), make_package(version="2.0.0")
    work.choose_models([old])
    first = work.segment([old], ANNA, ONNX).name
    work.choose_models([new])
    assert first == "s0" and [s.name for s in segment_all(work, new)][-1] == "s0"
