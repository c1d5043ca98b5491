"""The dataset folder: what is added is there voxel for voxel, what fails leaves nothing, and nobody's name is in it."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from UNetSegmentationLib import dataset as module
from UNetSegmentationLib import files, training
from UNetSegmentationLib.dataset import Dataset, UserError, changes, read_mask, read_segments, translated
from UNetSegmentationLib.image import Box, Image, read_image, to_sitk, write_image
from UNetSegmentationLib.inference.predict import Prediction
from UNetSegmentationLib.model import Label
from UNetSegmentationLib.output import write_segmentation
from UNetSegmentationLib.worker.protocol import MAX_LINE, dumps
from workers import POSIX, python

ROOT = Path(__file__).resolve().parents[2]
ORGAN = Label(1, "organ", (1, 2, 3), {"category": ["SCT", "123037004", "Anatomical Structure"], "type": ["SCT", "39607008", "Lung"]})
TUMOUR = Label(5, "tumour", (4, 5, 6), {})
OBLIQUE = tuple(float(v) for v in np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0].ravel())


def scan(seed, dtype=np.int16, direction=OBLIQUE, shape=(6, 11, 9)):
    array = np.random.default_rng(seed).integers(-100, 200, shape).astype(dtype)
    return Image(array, (0.7, 0.8, 2.5), (-31.5, 12.25, 100.0), direction)


def outline(value=5, shape=(6, 11, 9)):
    mask = np.zeros(shape, np.uint8)
    mask[1:5, 2:8, 2:7] = 1
    mask[2:4, 3:6, 3:5] = value
    return mask


@pytest.fixture
def dataset(tmp_path):
    return Dataset.create(tmp_path / "set", "Lungs", [ORGAN, TUMOUR], ["CT"])


def state(dataset):
    return (dataset.folder / "dataset.json").read_bytes(), {p for p in dataset.folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_a_label_map_in_other_values_has_none_of_those_that_are_not_named(dtype):
    array = np.array([0, 1, 127, 255, np.iinfo(dtype).max, np.iinfo(dtype).min], dtype).reshape(6, 1, 1)
    expected = [0, 0, 3, 7, 7 * (dtype is np.uint8), 0]
    assert translated(array, {127: 3, 255: 7, 0: 9, -1: 9}).ravel().tolist() == expected and not translated(array, {}).any()


# ---------------------------------------------------------------------------------------------------------------- adding


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64, np.int64, np.uint16])
def test_what_is_added_is_there_voxel_for_voxel(dataset, dtype):
    image = scan(0, dtype)
    entry = dataset.add(image, outline(), patient="Jane")
    back = read_image(entry.images[0])
    assert np.array_equal(back.array, image.array) and back.same_grid(image, 1e-3)
    assert np.array_equal(read_image(entry.label).array, outline())
    assert entry.record["voxels_by_label"] == {"organ": int((outline() == 1).sum()), "tumour": int((outline() == 5).sum())}
    assert Dataset.open(dataset.folder).entries == dataset.entries and dataset.labels == (ORGAN, TUMOUR)
    assert not dataset.check()


def test_the_same_scan_again_is_a_new_version_and_the_former_one_stays(dataset):
    first = dataset.add(scan(0), outline(), patient="Jane")
    corrected = outline()
    corrected[5, 0, 0:4] = 1
    second = dataset.add(scan(0), corrected, model_mask=outline(), model="m-1.0.0", by="anna", dated=True)
    assert (second.name, second.version, second.patient) == (first.name, 2, first.patient)
    assert second.images == first.images  # the same voxels are not written twice
    assert [e.version for e in dataset.versions(first.name)] == [1, 2] and len(dataset.entries) == 1
    assert np.array_equal(read_image(dataset.versions(first.name)[0].label).array, outline())
    assert second.changes["organ"] == {
        "added": 4,
        "removed": 0,
        "kept": 108,
        "added_ml": 0.0056,
        "removed_ml": 0.0,
        "dice": round(2 * 108 / (108 + 112), 4),
    }
    assert second.record["by"] == "anna" and second.record["date"].startswith("20") and "by" not in first.record
    third = dataset.restore(first.name, version=1)
    assert third.version == 3 and np.array_equal(read_image(third.label).array, outline())


def test_a_left_handed_scan_is_the_same_case_as_slicer_loads_it(dataset):
    right = scan(0, direction=(1.0, 0, 0, 0, 1, 0, 0, 0, 1))
    last = right.origin[2] + right.spacing[2] * (right.shape[0] - 1)
    left = Image(right.array[::-1], right.spacing, (*right.origin[:2], last), (1, 0, 0, 0, 1, 0, 0, 0, -1))
    first, second = dataset.add(left, outline()[::-1]), dataset.add(right, outline())
    assert (second.name, second.version, second.patient) == (first.name, 2, first.patient) and second.images != first.images
    for entry, image in ((first, left), (second, right)):
        assert np.array_equal(read_image(entry.images[0]).array, image.array) and read_image(entry.label).same_grid(image)


def test_a_datasets_labels_have_names_and_values_of_their_own(tmp_path, dataset):
    for labels in (
        [ORGAN, ORGAN],
        [Label(1, "background", (0, 0, 0), {})],
        [Label(300, "x", (0, 0, 0), {})],
        [Label(1, " ", (0, 0, 0), {})],
    ):
        with pytest.raises(UserError, match="names of their own and values of their own from 1 to 255"):
            Dataset.create(tmp_path / "bad", "x", labels, ["CT"])
    with pytest.raises(UserError, match="already holds a dataset.json"):
        Dataset.create(dataset.folder, "x", [ORGAN], ["CT"])
    assert not (tmp_path / "bad" / "dataset.json").exists()


def test_labels_that_a_training_would_not_tell_apart_are_refused(tmp_path, dataset):
    with pytest.raises(UserError, match="'GTV 1' and 'gtv-1', which are too alike"):
        Dataset.create(tmp_path / "bad", "x", [Label(1, "GTV 1", (1, 2, 3), {}), Label(2, "gtv-1", (1, 2, 3), {})], ["CT"])
    spot = Label(2, "tu mour", (1, 2, 3), {})
    dataset.add(scan(0), outline(2), labels=[ORGAN, spot], allow=["label"])
    with pytest.raises(UserError, match="'tu mour' and 'tu.mour', which are too alike"):
        dataset.add(scan(1), outline(2), labels=[ORGAN, replace(spot, name="tu.mour")], allow=["label"])
    assert len(dataset.refresh().entries) == 1 and [d.name for d in dataset.labels] == ["organ", "tumour", "tu mour"]


def test_what_changed_is_counted_by_label():
    before, after = np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8)
    before[0, 0] = 1
    after[0, 0, :2] = 1
    after[0, 1] = 5
    found = changes(before, after, [ORGAN, TUMOUR, Label(7, "none", (0, 0, 0), {})], 0.5)
    assert found["organ"] == {"added": 0, "removed": 2, "kept": 2, "added_ml": 0.0, "removed_ml": 1.0, "dice": 0.6667}
    assert found["tumour"]["added"] == 4 and found["tumour"]["dice"] == 0 and "none" not in found


def test_several_channels_and_other_label_values(tmp_path):
    ds = Dataset.create(tmp_path / "set", "Brain", [ORGAN, TUMOUR], ["FLAIR", "T1c"])
    image = scan(0).like(np.stack([scan(0).array, scan(1).array]))
    theirs = [Label(1, "Tumour ", (0, 0, 0), {}), Label(2, "organ", (0, 0, 0), {})]
    mask = np.select([outline() == 5, outline() == 1], [1, 2])
    entry = ds.add(image, mask, labels=theirs)
    assert np.array_equal(read_image(entry.images).array, image.array) and np.array_equal(read_image(entry.label).array, outline())


def test_a_mask_of_0_and_255_is_the_one_label_there_is(tmp_path):
    ds = Dataset.create(tmp_path / "set", "One", [ORGAN], ["CT"])
    entry = ds.add(scan(0), (outline() > 0) * np.uint8(255))
    assert set(np.unique(read_image(entry.label).array)) == {0, 1}
    other = Dataset.create(tmp_path / "other", "Other", [replace(ORGAN, value=7)], ["CT"])
    entry = other.add(scan(0), (outline() > 0) * np.uint8(255))
    assert set(np.unique(read_image(entry.label).array)) == {0, 7}
    named = ds.add(scan(1), (outline() > 0) * np.uint8(255), labels=[ORGAN])
    assert set(np.unique(read_image(named.label).array)) == {0, 1}
    for other in (replace(ORGAN, value=255, name="bone"), replace(ORGAN, name="bone")):
        with pytest.raises(UserError, match="holds the label"):
            ds.add(scan(2), (outline() > 0) * np.uint8(255), labels=[other])


def nan(image):
    array = image.array.astype(np.float32)
    array[0, 0, 0] = np.nan
    return image.like(array)


@pytest.mark.parametrize(
    ("image", "mask", "how", "said"),
    [
        (scan(0), np.zeros((6, 11, 9), np.uint8), {}, "is empty"),
        (scan(0), outline(7), {}, "the label 7, which the dataset does not have (it has 1 organ, 5 tumour)"),
        (scan(0), outline()[:5], {}, "has (9, 11, 5) voxels and the image (9, 11, 6)"),
        (scan(0), Image(outline(), (0.7, 0.8, 2.6)), {}, "does not lie where its image lies"),
        (scan(0), outline() * 0.3, {}, "not whole"),
        (
            scan(0),
            np.pad(outline()[:, :, :8], ((0, 0), (0, 0), (0, 1))) * (np.arange(6 * 11 * 9).reshape(6, 11, 9) == 137),
            {},
            "as an eraser",
        ),
        (nan(scan(0)), outline(), {}, "no numbers"),
        (scan(0).like(np.zeros((6, 11, 9))), outline(), {}, "the same everywhere"),
        (scan(0).like(np.zeros((2, 6, 11, 9))), outline(), {}, "has 2 channels and the dataset 1 (CT)"),
        (scan(0), outline(), {"name": "../x"}, "cannot name a case"),
        (scan(0), outline(), {"name": "Jane Doe"}, "no patient's name"),
        (scan(0), outline(), {"split": "mine"}, "is no split"),
        (scan(0), outline(), {"allow": ["all"]}, "nothing that can be allowed"),
        (scan(0), outline(), {"labels": [Label(1, "organ", (0, 0, 0), {}), Label(5, "scar", (0, 0, 0), {})]}, "the label scar"),
    ],
)
def test_bad_cases_are_refused_in_one_sentence_and_nothing_is_written(dataset, image, mask, how, said):
    before = state(dataset)
    with pytest.raises(UserError) as e:
        dataset.add(image, mask, **how)
    assert said in str(e.value) and "\n" not in str(e.value)
    assert state(dataset) == before


def test_a_single_slices_mask_lies_where_the_slice_lies_unless_one_of_them_does_not_know_where(dataset, tmp_path):
    """Rows in the other order at the same place, as NIfTI files have them, were taken as they came: mirrored."""
    image = Image(np.arange(99, dtype=np.int16).reshape(1, 11, 9), (0.7, 0.8, 2.5), (10.0, 20.0, 100.0))
    flipped = Image(outline()[2:3, ::-1], image.spacing, (10.0, 28.0, 100.0), (1.0, 0, 0, 0, -1.0, 0, 0, 0, -1.0))
    for mask in (flipped, replace(flipped, direction=image.direction), Image(outline()[2:3], image.spacing, (10.0, 20.0, 60.0))):
        with pytest.raises(UserError, match="does not lie where its image lies"):
            dataset.add(image, mask)
    dataset.add(image, Image(outline()[2:3]), name="of-a-picture")
    dataset.add(Image(image.array + np.int16(1)), replace(flipped), name="a-picture")
    dataset.add(image.like(image.array + np.int16(2)), image.like(outline()[2:3]), name="placed")
    assert len(dataset.entries) == 3
    flat = sitk.GetImageFromArray(outline()[2])  # which does not know its z
    flat.SetSpacing((0.7, 0.8)), flat.SetOrigin((10.0, 20.0))
    sitk.WriteImage(flat, str(tmp_path / "flat.nrrd"))
    assert np.array_equal(read_mask(tmp_path / "flat.nrrd", image)[0], outline()[2:3])
    flat.SetDirection((1.0, 0.0, 0.0, -1.0)), sitk.WriteImage(flat, str(tmp_path / "flat.nrrd"))
    picture = sitk.GetImageFromArray(image.array[0])
    picture.CopyInformation(flat), picture.SetDirection((1.0, 0.0, 0.0, 1.0)), sitk.WriteImage(picture, str(tmp_path / "image.nrrd"))
    with pytest.raises(UserError, match="does not lie where its image lies"):  # of two such the rows are known
        read_mask(tmp_path / "flat.nrrd", read_image(tmp_path / "image.nrrd"))


def test_what_was_drawn_in_slicer_on_a_picture_lies_where_it_was_drawn(tmp_path):
    """Slicer takes ITK's spacing, the size of the print, which here is none: 2809 pixels became 351 elsewhere."""
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.arange(60 * 80, dtype=np.uint32).reshape(60, 80).astype(np.uint8)
    picture.fromarray(pixels).save(tmp_path / "a.jpg", dpi=(72, 72))
    drawn = np.zeros((1, 60, 80), np.uint8)
    drawn[0, 30:42, 20:50] = 1
    for spacing in (25.4 / 72, 1.0):  # of ours, which a person corrected there, it is 1
        part = Image(drawn[:, 25:50, 15:60], (spacing, spacing, 1.0), (15 * spacing, 25 * spacing, 0.0))  # as Slicer crops
        write_segmentation(Prediction(part, (replace(ORGAN, value=1),), "m-1", None), tmp_path / "a.seg.nrrd")
        assert np.array_equal(read_mask(tmp_path / "a.seg.nrrd", read_image(tmp_path / "a.jpg"))[0], drawn)


@pytest.mark.parametrize(
    ("turn", "size", "mask", "refused"),
    [
        (1, (30, 20), (30, 20), False),
        (3, (30, 20), (30, 20), True),
        (6, (30, 20), (30, 20), False),  # drawn on it as it is stored
        (6, (30, 20), (20, 30), True),
        (8, (20, 20), (20, 20), True),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_mask_of_a_picture_that_some_programs_turn_is_refused_where_it_may_be_turned(tmp_path, suffix, turn, size, mask, refused):
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    exif = picture.Exif()
    exif[274] = turn
    picture.new("L", size, 90).save(tmp_path / f"a{suffix}", exif=exif)
    image = read_image(tmp_path / f"a{suffix}")
    picture.new("L", mask, 1).save(tmp_path / "mask.png")
    if refused:
        with pytest.raises(UserError, match=rf"a{suffix} is marked as turned \(EXIF orientation {turn}\), which some .*; save it upright"):
            read_mask(tmp_path / "mask.png", image)
    else:
        assert read_mask(tmp_path / "mask.png", image)[0].all()
    write_image(image.like(np.ones(image.shape, np.uint8)), tmp_path / "mask.nii.gz")  # which ITK's programs draw, as it is stored
    assert read_mask(tmp_path / "mask.nii.gz", image)[0].all()


def test_a_grey_picture_that_is_stored_in_colours_is_one_channel(dataset):
    grey = scan(0).array.astype(np.uint8)
    colours = scan(0).like(np.stack([grey, grey, grey, np.full_like(grey, 255)]))
    entry = dataset.add(colours, outline())
    assert len(entry.images) == 1 and np.array_equal(read_image(entry.images[0]).array, grey)


def test_what_is_refused_can_be_allowed(dataset):
    dataset.add(scan(0), np.zeros((6, 11, 9), np.uint8), allow=["empty"])
    dot = np.zeros((6, 11, 9), np.uint8)
    dot[2, 2, 2] = 5
    assert dataset.add(scan(1), dot, allow=["leftover"]).record["voxels_by_label"]["tumour"] == 1
    dataset.add(scan(2), outline(), name="a")
    with pytest.raises(UserError, match="has another image"):
        dataset.add(scan(3), outline(), name="a")
    assert dataset.add(scan(3), outline(), name="a", allow=["image"]).version == 2
    with pytest.raises(UserError, match="already there as a; add it under that name"):
        dataset.add(scan(3), outline(), name="b")


def test_what_comes_back_is_not_there_twice(dataset):
    """Else it could be learnt from as one patient's and held out as another's."""
    dataset.add(scan(0), outline(), name="one", patient="A")
    dataset.add(scan(1), outline(), name="one", allow=["image"])
    dataset.add(scan(0), outline(), name="two", patient="B")
    with pytest.raises(UserError, match="already there as two; .* or remove two first"):
        dataset.restore("one", 1)
    dataset.remove("two")
    dataset.restore("one", 1)
    with pytest.raises(UserError, match="already there as one"):
        dataset.restore("two")
    assert list(dataset.refresh().entries) == ["one"]


def test_a_former_image_comes_back_as_its_own_patients(dataset):
    """Else a person could be learnt from as another and held out too."""
    dataset.add(scan(0), outline(), name="one", patient="Mistaken")
    dataset.add(scan(0), outline(1), name="one", patient="Alice", allow=["patient"], split="test")
    dataset.add(scan(1), outline(), name="two", patient="Alice")
    dataset.add(scan(2), outline(), name="three", patient="Bob", split="train")
    dataset.add(scan(3), outline(), name="one", patient="Bob", allow=["image", "patient"])
    assert dataset.entries["one"].split == "train"
    entry = dataset.restore("one", 1)  # as its patient was known last
    assert (entry.patient, entry.split) == (dataset.patient("Alice"), "test") and not dataset.check()
    entry = dataset.restore("one", 3)
    assert (entry.patient, entry.split) == (dataset.patient("Bob"), "train")
    dataset.remove("two")
    assert dataset.restore("one", 1).split == ""  # where no other of the patient's is, it is dealt anew
    data = json.loads((dataset.folder / "dataset.json").read_text())
    for version in data["cases"]["one"]["versions"]:
        version.pop("patient", None)  # an earlier version did not know
    (dataset.folder / "dataset.json").write_text(json.dumps(data))
    assert dataset.restore("one", 3).patient == dataset.patient("Alice")


def test_a_patient_that_a_person_named_is_not_replaced_by_another_unseen(dataset, tmp_path):
    image = dicom(tmp_path / "dicom", "4711")
    assert dataset.add(Image(image.array, image.spacing), outline()).patient != dataset.patient("4711")  # as NIfTI
    name = dataset.add(image, outline()).name
    assert dataset.entries[name].patient == dataset.patient("4711")  # nothing was known of it
    for removed in (False, True):
        if removed:
            dataset.remove(name)
        with pytest.raises(module.Objection, match="is there as another patient's; leave the patient out") as e:
            dataset.add(image, outline(), patient="P7")
        assert e.value.kind == "patient"
    assert dataset.add(image, outline(), patient="P7", allow=["patient"]).patient == dataset.patient("P7")
    assert dataset.add(image, outline()).patient == dataset.patient("P7")


@pytest.mark.parametrize("kind", ["int8", "uint32", "int64", "uint64", "float64"])
def test_a_scan_is_the_same_in_any_type_of_its_numbers_that_a_volume_node_may_have(dataset, kind):
    array = np.random.default_rng(0).integers(0, 100, (6, 11, 9))
    image = Image(array.astype(kind))
    assert dataset.add(image, outline()).name == dataset.add(Image(module.storable(image.array)), outline()).name
    assert module.storable(image.array).dtype == {"int8": np.int16, "float64": np.float32}.get(kind, np.int32)
    assert np.array_equal(module.storable(image.array), array)


def test_what_may_be_allowed_says_so(dataset):
    dot = np.zeros((6, 11, 9), np.uint8)
    dot[2, 2, 2] = 7
    scar = (Label(7, "scar", (0, 0, 0), {}),)
    found = []
    for mask, how in ((np.zeros_like(dot), {}), (dot, {"labels": scar}), (dot, {"labels": scar, "allow": ["label"]})):
        with pytest.raises(module.Objection) as e:
            dataset.add(scan(0), mask, **how)
        found.append(e.value.kind)
    assert found == ["empty", "label", "leftover"] and len(dataset.labels) == 2
    entry = dataset.add(scan(0), dot, labels=scar, allow=["label", "leftover"])
    assert [(d.value, d.name) for d in dataset.labels] == [(1, "organ"), (5, "tumour"), (2, "scar")]
    assert np.count_nonzero(read_image(entry.label).array == 2) == 1 and entry.record["voxels_by_label"]["scar"] == 1
    # A label that another person added meanwhile is there once.
    record, edge = {**entry.record, "voxels": "1"}, Label(2, "edge", (0, 0, 0), {})
    with pytest.raises(UserError, match="Another person added a label"):
        dataset._commit(lambda data: dataset._enter(data, "x", record, "p-1", False, None, (), [edge]))


def test_a_correction_is_not_replaced_by_the_models_mask_unasked(dataset, monkeypatch):
    found, corrected = outline(), outline()
    corrected[1, 2, 2] = 0
    assert dataset.add(scan(0), found, model_mask=found).version == 1
    other = outline(1)
    assert dataset.add(scan(0), other, model_mask=other).version == 2  # in the place of another model's, which nobody corrected
    assert dataset.add(scan(0), corrected, model_mask=found).version == 3
    with pytest.raises(module.Objection, match=r"correction that case-\w+ holds \(version 3\); correct it, or allow an uncorrected") as e:
        dataset.add(scan(0), found, model_mask=found)
    assert e.value.kind == "uncorrected" and not dataset.check() and len(list(dataset.folder.glob("cases/*/*"))) == 3
    assert dataset.add(scan(0), corrected, model_mask=corrected).version == 4  # a model that finds the same
    assert dataset.add(scan(0), found).version == 5  # nobody says that it is a model's
    assert dataset.add(scan(0), corrected, model_mask=corrected, allow=["uncorrected"]).version == 6

    # One that another adds meanwhile is not replaced unseen either.
    second, enter = Dataset.open(dataset.folder), Dataset._commit
    monkeypatch.setattr(Dataset, "_commit", lambda self, change: dataset.add(scan(0), found) and enter(second, change))
    monkeypatch.setattr(dataset, "_commit", lambda change: enter(dataset, change), raising=False)
    with pytest.raises(module.Objection, match="version 7"):
        second.add(scan(0), corrected, model_mask=corrected)


def test_a_case_can_be_stopped_between_its_files(dataset):
    before, told = state(dataset), []

    class Stopped(Exception):
        pass

    def check():
        if any("mask" in text for _, text in told):
            raise Stopped

    with pytest.raises(Stopped):
        dataset.add(scan(0), outline(), model_mask=outline(), progress=lambda fraction, text: told.append((fraction, text)), check=check)
    assert state(dataset) == before and [t for _, t in told] == ["checking the case", "writing the mask"]


def test_segments_are_matched_to_labels_by_name_codes_or_name_without_number():
    match, tissue = module.match_label, {"category": ["SCT", "85756007", "Tissue"], "type": ["SCT", "85756007", "Gewebe"]}
    lung = {"category": ["SCT", "123037004", "Anatomie"], "type": ["SCT", "39607008", "Lunge"]}
    labels = [ORGAN, TUMOUR, Label(6, "Tissue", (0, 0, 0), tissue)]
    assert match(" Tumour ", {}, labels) is TUMOUR and match("links", lung, labels) is ORGAN and match("tumour_12", {}, labels) is TUMOUR
    assert match("Segment_1", tissue, labels) is None and match("L1", {}, labels) is None
    assert match("links", lung, [*labels, Label(7, "left lung", (0, 0, 0), lung)]) is None


def test_the_summary_is_what_a_person_sees(dataset):
    name = dataset.add(scan(0), outline(), model_mask=outline(0), by="A", dated=True).name
    dataset.add(scan(0), outline())
    other = dataset.add(scan(1), outline(), patient="P").name
    dataset.remove(other)
    found = json.loads(json.dumps(dataset.summary()))
    assert (found["count"], found["patients"], [c["name"] for c in found["removed"]]) == (1, 1, [other])
    (case,) = found["cases"]
    assert case["name"] == name and [v["version"] for v in case["versions"]] == [1, 2] and case["versions"][0]["by"] == "A"
    assert case["voxels"] == {"organ": 108, "tumour": 12} and "files" not in case["versions"][0]


def test_of_a_large_dataset_the_summary_fits_into_a_line_of_the_workers(dataset):
    dataset.add(scan(0), outline(), model_mask=outline(0), name="first")
    data = json.loads((dataset.folder / "dataset.json").read_text())
    one = data["cases"]["first"]
    one["versions"][0]["changes"] = {f"structure {i}": one["versions"][0]["changes"]["organ"] for i in range(30)}
    data["cases"] |= {f"case{i}": one for i in range(3000)}
    (dataset.folder / "dataset.json").write_text(json.dumps(data))
    found = dataset.refresh().summary()
    assert found["count"] == 3001 and 200 < len(found["cases"]) < 3000 and found["cases"][-1]["name"] == "case2999"
    assert len(dumps({"id": 1, "event": "done", "summary": found})) < MAX_LINE


def test_a_case_is_removed_restored_and_erased(dataset):
    entry = dataset.add(scan(0), outline())
    dataset.remove(entry.name)
    assert not dataset.entries and entry.label.exists() and not dataset.check()
    assert dataset.restore(entry.name).version == 1
    dataset.remove(entry.name, erase=True)
    assert not entry.label.exists() and entry.name not in (dataset.folder / "dataset.json").read_text()
    other = dataset.add(scan(1), outline())
    dataset.remove(other.name)
    dataset.remove(other.name, erase=True)  # also what was removed before
    assert not other.label.exists() and other.name not in (dataset.folder / "dataset.json").read_text()
    with pytest.raises(UserError, match=f"has no case {entry.name}"):
        dataset.remove(entry.name)


def test_a_case_is_erased_as_far_as_it_can_be(dataset, monkeypatch):
    entries = [dataset.add(scan(0), outline(value)) for value in (5, 1)]
    shutil.rmtree(entries[0].label.parent)  # lost
    dataset.remove(entries[0].name, erase=True)
    assert not entries[1].label.exists()
    entries = [dataset.add(scan(1), outline(value)) for value in (5, 1)]
    erase, held = shutil.rmtree, entries[0].label.parent
    monkeypatch.setattr(module.shutil, "rmtree", lambda path, **how: None if path == held else erase(path, **how))
    with pytest.raises(UserError, match=f"is no longer in the dataset, but {re.escape(str(held))} could not be erased"):
        dataset.remove(entries[0].name, erase=True)
    assert not entries[1].label.exists() and not dataset.refresh().entries
    monkeypatch.undo()
    assert dataset.clean(0) == [held]


@POSIX
def test_a_link_in_a_shared_folder_leads_to_nothing_that_is_removed(dataset, tmp_path):
    home, cases = tmp_path / "home", dataset.folder / "cases"
    entry, other = dataset.add(scan(0), outline()), Dataset.create(tmp_path / "other", "Other", [ORGAN, TUMOUR], ["CT"])
    kept = [home / "Documents" / "thesis.doc", home / "notes.txt", home / "check" / f"{entry.name}_image.nii.gz"]
    kept += [other.add(scan(0), outline()).label, dataset.folder / "retrain" / "job" / "job.json"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", "utf-8")
    (home / "empty").mkdir()
    (cases / "left" / "behind").mkdir(parents=True)
    links = {"x": home, "empty": home / "empty", "other": kept[3].parents[1], "retrain": dataset.folder / "retrain", "loop": cases / "loop"}
    for name, to in links.items():
        (cases / name).symlink_to(to)
    (cases / entry.name / "link").symlink_to(home)
    (dataset.folder / ".unetseg-x").symlink_to(home)
    assert dataset.clean(0) == [cases / "left" / "behind"] and all(path.is_file() for path in kept) and (home / "empty").is_dir()
    index = dataset.folder / "dataset.json"
    good, data = index.read_text("utf-8"), json.loads(index.read_text("utf-8"))
    data["cases"][entry.name]["versions"][0]["files"]["cases/x/Documents/thesis.doc"] = "0"
    index.write_text(json.dumps(data), "utf-8")
    with pytest.raises(UserError, match="cases/x/Documents lies behind a link, so nothing was erased; remove the link"):
        dataset.remove(entry.name, erase=True)
    assert entry.label.exists() and kept[0].exists() and entry.name in dataset.refresh().entries
    index.write_text(good, "utf-8")
    (dataset.folder / "retrain" / "linked").symlink_to(home)
    with pytest.raises(UserError, match=f"but .*linked/check/{entry.name}_image.nii.gz could not be erased"):
        dataset.remove(entry.name, erase=True)
    assert not entry.label.exists() and all(path.is_file() for path in kept)


@POSIX
def test_a_training_set_may_lie_behind_a_link(dataset, tmp_path):
    (tmp_path / "link").symlink_to(dataset.folder)
    linked = Dataset.open(tmp_path / "link")
    entry = linked.add(scan(0), outline())
    (linked.folder / "cases" / "left" / "behind").mkdir(parents=True)
    assert [path.name for path in linked.clean(0)] == ["behind"]
    linked.remove(entry.name, erase=True)
    assert not entry.label.exists()


def test_of_an_erased_case_trainings_keep_no_image(dataset, monkeypatch):
    for i, name in enumerate(("case1", "case1-b", "case1__lesion_2")):
        dataset.add(scan(i), outline(), name=name)
    job, lesion = dataset.folder / "retrain" / "20260102-030405-toy", "case1__lesion_3"
    own = [job / "check" / f"{name}_{key}.nii.gz" for name in ("case1", lesion) for key in ("image", "truth", "before", "after")]
    own += [dataset.folder / "retrain" / "cache" / f"case1-{'0a' * 8}.safetensors", job / "pictures" / "example-case1.png"]
    own += [job / "pictures" / f"worst-{lesion}.png", job / "report.html"]
    others = [job / "check" / f"{name}_image.nii.gz" for name in ("case1-b", "case1__lesion_2", "acase1")]
    others += [dataset.folder / "retrain" / "cache" / name for name in (f"case1-b-{'0a' * 8}.safetensors", "hashes.json")]
    own.append(dataset.folder / "retrain" / "cache" / ".unetseg-0a0a0a0a-0a0a.safetensors")
    others += [job / "job.json", job.with_name("other") / "report.html"]
    for path in (*own, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('<img alt="case1-b: truth">' if path in others else '<img alt="case1, lesion 3: axial">', "utf-8")
    remove = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **how: (_ for _ in ()).throw(OSError) if path == own[0] else remove(path, **how))
    with pytest.raises(
        UserError, match=f"but {re.escape(str(own[0]))} could not be erased; close the programs that use it and delete it.$"
    ):
        dataset.remove("case1", erase=True)
    assert [p for p in own if p.exists()] == own[:1] and all(p.exists() for p in others)


@pytest.mark.parametrize("where", ["starting", "here", "elsewhere", "gone", "silent", "ended"])
def test_nothing_is_erased_that_a_training_holds(dataset, where):
    entry = dataset.add(scan(0), outline())
    job = dataset.folder / training.FOLDER / "20260102-030405-toy"
    job.mkdir(parents=True)
    state, now, pid = "ended" if where == "ended" else training.RUNNING[1], time.time(), None if where == "starting" else os.getpid()
    held = {"state": state, "launched": now - (0 if where == "starting" else 3600), "pid": pid, "mark": "", "host": "another"}
    if where in ("here", "gone"):
        held |= {"host": files.this_computer(), "mark": files.process_mark(os.getpid()) if where == "here" else "another's"}
    (job / training.JOB).write_text(json.dumps(held), "utf-8")
    if where in ("elsewhere", "silent"):
        (job / training.BEAT).touch()
        os.utime(job / training.BEAT, (now, now - (1000 if where == "silent" else 10)))
    assert module.is_alive is training.is_alive and module.RUNNING is training.RUNNING  # one rule for both
    runs = where in ("starting", "here", "elsewhere")
    assert training.is_alive(job / training.BEAT, held) == runs or where == "ended"
    if runs:
        with pytest.raises(UserError, match="^A training of this dataset runs and holds its cases; stop it first, then erase.$"):
            dataset.remove(entry.name, erase=True)
        dataset.remove(entry.name)  # its files stay
        dataset.restore(entry.name)
        (job / training.JOB).unlink()
    dataset.remove(entry.name, erase=True)
    assert not entry.label.exists()


def test_a_removed_case_that_is_added_again_keeps_its_history_and_its_split(dataset):
    entry = dataset.add(scan(0), outline(), split="test")
    dataset.remove(entry.name)
    again = dataset.add(scan(0), outline(1))
    assert (again.name, again.version, again.split) == (entry.name, 2, "test")
    dataset.remove(entry.name)
    assert dataset.restore(entry.name, 1).version == 3 and entry.label.exists() and again.label.exists()


def test_another_scan_under_a_removed_cases_name_is_not_that_patients(dataset):
    entry = dataset.add(scan(0), outline(), name="one", patient="Bob", split="test")
    dataset.remove("one")
    with pytest.raises(module.Objection, match="The case one, which was removed, has another image; choose another name") as e:
        dataset.add(scan(1), outline(), name="one")
    assert e.value.kind == "image"
    other = dataset.add(scan(1), outline(), name="one", allow=["image"])
    assert (other.version, other.split) == (2, "") and other.patient != entry.patient
    dataset.remove("one")
    again = dataset.add(scan(0), outline(), name="one", allow=["image"])  # as an older version of it is
    assert again.version == 3 and again.patient != other.patient


def test_a_case_that_is_brought_back_is_where_its_patients_others_are_meanwhile(dataset):
    entry = dataset.add(scan(0), outline(), patient="P", split="train")
    dataset.remove(entry.name)
    dataset.add(scan(1), outline(), patient="P", split="test")
    assert dataset.restore(entry.name).split == "test" and not dataset.check()


# ------------------------------------------------------------------------------------------------------------- anonymity


def dicom(folder, patient="DOE^JANE-4711"):
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    tags = {
        "0008|0060": "CT",
        "0010|0010": "Doe^Jane",
        "0010|0020": patient,
        "0020|000e": "1.2.3.4",
        "0020|000d": "1.2.3",
        "0008|0080": "Mercy",
    }
    array = scan(0).array
    for z, part in enumerate(array):
        image = sitk.GetImageFromArray(part[None])
        for key, value in {**tags, "0020|0032": f"0\\0\\{2.5 * z}", "0008|0018": f"1.2.3.4.{z}", "0020|0013": str(z)}.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{z}.dcm"))
        writer.Execute(image)
    return read_image(folder)


def test_nothing_that_names_a_patient_is_written(dataset, tmp_path):
    image = dicom(tmp_path / "DOE^JANE-4711")
    entry = dataset.add(image, outline(), model_mask=outline(), by="anna")
    content = b""
    for path in dataset.folder.rglob("*"):
        assert not re.search("doe|jane|4711", str(path.relative_to(dataset.folder)), re.IGNORECASE)
        if path.is_file():
            content += gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for word in (b"Doe", b"DOE", b"Jane", b"4711", b"Mercy", b"1.2.3.4"):
        assert word not in content
    assert entry.record["modality"] == "CT"
    # The same PatientID is the same patient, in this folder only.
    assert dataset.add(scan(1), outline(), patient="DOE^JANE-4711").patient == entry.patient
    other = Dataset.create(tmp_path / "other", "Lungs", [ORGAN, TUMOUR], ["CT"])
    assert other.patient("DOE^JANE-4711") != entry.patient
    (dataset.folder / "salt").unlink()
    with pytest.raises(UserError, match="salt is missing or damaged"):
        dataset.add(scan(2), outline(), patient="x")
    assert any("salt" in p.what for p in dataset.check())


def test_a_single_dicom_file_names_its_patient_too(tmp_path):
    dicom(tmp_path / "dicom")
    one = read_image(tmp_path / "dicom" / "0.dcm")
    assert module.dicom_tag(one, "0010|0020") == "DOE^JANE-4711" and module.modality(one) == "CT"
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "dicom" / "0.dcm")), str(tmp_path / "0.nrrd"))  # with its tags
    assert module.dicom_tag(read_image(tmp_path / "0.nrrd"), "0010|0020") == "" == module.modality(scan(0))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_an_id_with_an_umlaut_is_the_same_patient_as_in_slicer(dataset, tmp_path, encoding):
    letter = "ü".encode(encoding)
    image = dicom(tmp_path / "dicom", f"M{'#' * len(letter)}-12")
    for file in image.dicom_files:
        Path(file).write_bytes(Path(file).read_bytes().replace(b"#" * len(letter), letter))
    assert dataset.add(image, outline()).patient == dataset.patient("Mü-12")


# --------------------------------------------------------------------------------------------------- writers that are killed

# Runs add() in a child that kills itself with SIGKILL at one point of it.
CHILD = """
import os, signal, sys
import numpy as np
import SimpleITK as sitk
from pathlib import Path
from test_dataset import scan, outline
from UNetSegmentationLib import dataset as m
point, folder = sys.argv[1], sys.argv[2]
def die(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)
def after(function):
    def wrapped(*a, **k):
        function(*a, **k)
        die()
    return wrapped
def half(image, path, *a, **k):
    real(image, path, *a, **k)
    os.truncate(path, os.path.getsize(path) // 2)
    die()
real, write_image = sitk.WriteImage, m.write_image
if point == "half a file":
    sitk.WriteImage = half
elif point == "one file":
    m.write_image = after(write_image)
elif point == "all files":
    m.Dataset._commit = die
elif point == "locked":
    m._read_index, kept = (lambda f, n=[0]: die() if (f / m.LOCK).exists() else kept(f)), m._read_index
elif point == "half an index":
    def half_json(path, data):
        path.write_text('{"format": "unetseg')
        die()
    m._write_json = half_json
elif point == "index not moved":
    m.FolderLock.mine = die
elif point == "index moved":
    m.FolderLock.__exit__ = die
m.Dataset.open(folder).add(scan(1), outline(), patient="b")
"""
POINTS = ["half a file", "one file", "all files", "locked", "half an index", "index not moved", "index moved"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX kill")
@pytest.mark.parametrize("point", POINTS)
def test_a_writer_killed_anywhere_leaves_whole_cases_only(dataset, point, monkeypatch):
    monkeypatch.setattr(module, "DEAD", -1.0)
    dataset.add(scan(0), outline(), patient="a")
    before = json.loads((dataset.folder / "dataset.json").read_text())["cases"]
    script = CHILD.replace("sys.argv[1], sys.argv[2]", f"{point!r}, {str(dataset.folder)!r}")
    child = python(script)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, errors
    after = Dataset.open(dataset.folder)
    assert len(after.entries) == (2 if point == "index moved" else 1)
    assert all(after._data["cases"][n] == case for n, case in before.items())
    wrong = [p for p in after.check() if "belong to no case" not in p.what]
    assert not wrong
    added = after.add(scan(1), outline(), patient="b")  # a dead process's lock is no hindrance
    assert len(after.entries) == 2 and np.array_equal(read_image(added.images[0]).array, scan(1).array)
    assert not list(after.folder.glob(".lock"))
    after.clean(age=0)
    assert not after.check() and not list(after.folder.glob(".unetseg-*"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX kill")
def test_writers_killed_at_any_moment_lose_no_case_of_others(dataset, monkeypatch):
    monkeypatch.setattr(module, "DEAD", -1.0)
    code = f"""
    import itertools, sys
    from test_dataset import scan, outline
    from UNetSegmentationLib import dataset as m
    m.DEAD = -1.0
    ds = m.Dataset.open({str(dataset.folder)!r})
    start = int(sys.stdin.readline())
    for i in itertools.count(start):
        print(ds.add(scan(i), outline(), name=f"c{{i}}").name, flush=True)
    """
    done = []
    chance = random.Random(5)
    for turn in range(4):
        child = python(code, stdin=subprocess.PIPE)
        child.stdin.write(f"{1000 * turn}\n")
        child.stdin.flush()
        done += [child.stdout.readline().strip() for _ in range(3)]
        time.sleep(chance.random() * 0.2)
        child.kill()
        done += child.communicate()[0].split()
    dataset.add(scan(9999), outline(), name="last")
    assert set(done) <= set(dataset.entries) and len(done) >= 12
    assert [p for p in dataset.check() if "belong to no case" not in p.what] == []
    assert all(np.array_equal(read_image(e.label).array, outline()) for e in dataset.entries.values())


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
@pytest.mark.parametrize("limit", [300, 1200, 4000])
def test_a_full_disk_is_a_sentence_and_changes_nothing(dataset, limit):
    for i in range(4):
        dataset.add(scan(i), outline())
    size = (dataset.folder / "dataset.json").stat().st_size
    assert size > 4000  # so that at one limit the files fit and the index does not
    before = state(dataset)
    code = f"""
    import resource
    import numpy as np
    from test_dataset import scan, outline
    from UNetSegmentationLib.dataset import Dataset, UserError
    ds = Dataset.open({str(dataset.folder)!r})
    image = scan(8).like((scan(8).array > 60).astype(np.uint8))
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    try:
        ds.add(image, outline())
    except UserError as e:
        print(e)
    """
    said, errors = python(code).communicate(timeout=60)
    assert "disk" in said and said.count("\n") == 1 and "choose a" not in said, said + errors  # no file name is a person's choice here
    assert state(dataset) == before and {p.name for p in (dataset.folder / "cases").iterdir()} == set(dataset.entries)


def test_a_drive_that_goes_while_a_case_is_written_leaves_no_part_of_it_in_its_place(dataset):
    """Of a drive that was taken away an empty folder may be left, on this computer's own disk."""
    dataset.add(scan(0), outline())
    before, away = state(dataset), dataset.folder.with_name("away")

    def progress(fraction, text):
        if text == "writing the image":
            dataset.folder.rename(away)
            dataset.folder.mkdir()

    with pytest.raises(UserError, match="is no longer there; connect its drive or network folder, and try again"):
        dataset.add(scan(1), outline(), progress=progress)
    assert not list(dataset.folder.iterdir())
    dataset.folder.rmdir()
    away.rename(dataset.folder)
    dataset.clean(age=0)
    assert state(dataset) == before and not dataset.check()


@pytest.mark.parametrize("spoil", [lambda p: os.truncate(p, os.path.getsize(p) // 2), lambda p: write_image(scan(7), p)])
def test_a_file_that_was_not_written_whole_without_a_word_is_noticed(dataset, monkeypatch, spoil):
    dataset.add(scan(0), outline())
    before, write = state(dataset), module.write_image

    def silently(image, path):
        write(image, path)
        spoil(path)

    monkeypatch.setattr(module, "write_image", silently)
    with pytest.raises(UserError, match="did not take the case whole; check the disk's space"):
        dataset.add(scan(1), outline())
    assert state(dataset) == before


# ------------------------------------------------------------------------------------------------------------------ lock


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
def test_a_lock_that_a_full_disk_did_not_take_is_in_nobodys_way(dataset):
    code = f"""
    import resource
    from UNetSegmentationLib.dataset import Dataset, UserError
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        Dataset.open({str(dataset.folder)!r}).split()
    except UserError as e:
        print(e)
    """
    said, errors = python(code).communicate(timeout=60)
    assert "disk" in said, said + errors
    assert not list(dataset.folder.glob(".*"))


def test_two_writers_at_once_lose_nothing(dataset):
    code = """
    import sys
    from test_dataset import scan, outline
    from UNetSegmentationLib.dataset import Dataset
    ds = Dataset.open({folder!r})
    for i in range({first}, {first} + 8):
        ds.add(scan(i), outline(), name=f"c{{i}}", patient=str(i % 3))
    """
    children = [python(textwrap.dedent(code).format(folder=str(dataset.folder), first=100 * k)) for k in range(3)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    dataset.refresh()
    assert set(dataset.entries) == {f"c{100 * k + i}" for k in range(3) for i in range(8)} and dataset.revision == 24
    assert not dataset.check() and len({e.patient for e in dataset.entries.values()}) == 3


def foreign(dataset, age):
    lock = dataset.folder / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "t"}))
    then = time.time() - age
    os.utime(lock, (then, then))
    return lock


def test_another_computers_lock_is_waited_for_and_a_stale_one_is_taken_over(dataset, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    lock = foreign(dataset, 0)
    before = state(dataset)
    with pytest.raises(UserError, match="being written to by process 1 on elsewhere; try again in a minute, or delete .*lock"):
        dataset.add(scan(0), outline())
    assert lock.exists() and state(dataset) == before
    foreign(dataset, 3600)
    dataset.add(scan(0), outline())
    assert not lock.exists() and not list(dataset.folder.glob(".[cg]*"))
    lock.write_text("")  # killed between making and filling it
    os.utime(lock, (0, 0))
    dataset.add(scan(1), outline())
    assert len(dataset.entries) == 2


def test_a_case_that_is_erased_while_its_new_version_is_written_is_not_half_there(dataset, monkeypatch):
    entry = dataset.add(scan(0), outline())
    other, commit = Dataset.open(dataset.folder), Dataset._commit

    def late(self, change):
        if self is dataset:
            other.remove(entry.name, erase=True)
        return commit(self, change)

    monkeypatch.setattr(Dataset, "_commit", late)
    with pytest.raises(UserError, match="was erased by another person just now"):
        dataset.add(scan(0), outline(), by="anna")
    assert not Dataset.open(dataset.folder).entries and not list(dataset.folder.rglob("*.nii.gz"))


def test_a_case_that_the_index_names_keeps_its_files_whatever_comes_after(dataset, monkeypatch):
    """Windows refuses to remove a lock that another is reading; or a person interrupts just then."""
    unlink = Path.unlink

    def held(self, missing_ok=False):
        if self.name == ".lock":
            raise PermissionError(13, "in use")
        unlink(self, missing_ok)

    monkeypatch.setattr(module.time, "sleep", lambda _s: None)
    monkeypatch.setattr(Path, "unlink", held)
    entry = dataset.add(scan(0), outline())
    monkeypatch.setattr(Path, "unlink", unlink)
    assert entry.label.exists() and not dataset.check()
    (dataset.folder / ".lock").unlink()

    def interrupted(self, *error):
        unlink(self.path)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.FolderLock, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset.add(scan(1), outline())
    monkeypatch.undo()
    assert len(Dataset.open(dataset.folder).entries) == 2 and not Dataset.open(dataset.folder).check()


def test_a_writer_that_lost_its_lock_begins_again_with_what_the_other_wrote(dataset, monkeypatch):
    other = Dataset.open(dataset.folder)
    mine, turns = module.FolderLock.mine, []

    def robbed(self):
        if not turns:
            turns.append(1)
            (dataset.folder / ".lock").unlink()
            other.add(scan(1), outline(), name="theirs")
        return mine(self)

    monkeypatch.setattr(module.FolderLock, "mine", robbed)
    dataset.add(scan(0), outline(), name="ours")
    assert set(Dataset.open(dataset.folder).entries) == {"ours", "theirs"}


def test_a_lock_goes_also_where_windows_is_slow_to_remove_files(dataset, monkeypatch):
    """A name is taken until the last program that looks the removed file over is through, and a lock may be looked over too."""
    touch, unlink, read_text, removed, looks = Path.touch, Path.unlink, Path.read_text, set(), []

    def make(self, *how, **more):
        if self in removed:
            raise PermissionError(13, "Access is denied")
        touch(self, *how, **more)

    def remove(self, missing_ok=False):
        unlink(self, missing_ok)
        removed.add(self)

    def read(self, *how, **more):
        if self.name == ".lock":
            looks.append(self)
            if len(looks) in (1, 3):  # when the index is to be replaced, and when the lock is to be given back
                raise PermissionError(13, "Access is denied")
        return read_text(self, *how, **more)

    for name, function in (("touch", make), ("unlink", remove), ("read_text", read)):
        monkeypatch.setattr(Path, name, function)
    dataset.add(scan(0), outline())
    assert len(looks) > 3 and len(dataset.entries) == 1 and not (dataset.folder / ".lock").exists()


def test_windows_tells_that_a_process_is_gone_without_ending_it(monkeypatch):
    errors, codes, asked = {1: 87, 2: 5}, {3: 259, 4: 1}, []  # no such process, access denied; still active, ended

    def exit_code(handle, code):
        code._obj.value = codes[handle.value]
        return 1

    kernel = SimpleNamespace(
        OpenProcess=lambda _access, _inherit, pid: asked.append(pid) or (pid if pid in codes else None),
        GetExitCodeProcess=exit_code,
        GetProcessTimes=lambda *_unused: 1,
        CloseHandle=lambda _handle: 1,
    )
    monkeypatch.setattr("ctypes.WinDLL", lambda *_unused, **_how: kernel, raising=False)
    monkeypatch.setattr("ctypes.get_last_error", lambda: errors[asked[-1]], raising=False)
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(module, "os", SimpleNamespace(name="nt"))
    here = socket.gethostname()
    assert [pid for pid in (-1, 0, 1, 2, 3, 4, "1") if module.process_is_gone({"host": here, "pid": pid})] == [1, 4]
    assert not module.process_is_gone({"host": "elsewhere", "pid": 1})


def test_a_lock_of_another_computer_of_the_same_name_is_not_a_dead_ones(dataset, monkeypatch):
    def at(computer):
        for each in (files, module):
            monkeypatch.setattr(each, "this_computer", lambda: computer, raising=False)

    at("0a" * 16)
    with module.FolderLock(dataset.folder) as lock:
        owner = json.loads(lock.path.read_text()) | {"pid": 1 << 22}
    assert module.process_is_gone(owner) and module.process_is_gone(owner | {"host": socket.gethostname()})  # of an earlier version
    at("0b" * 16)
    assert not module.process_is_gone(owner) and owner["name"] == socket.gethostname()  # by which a person knows it


def test_a_fresh_lock_is_not_taken_from_a_program_that_is_not_seen_here(dataset, monkeypatch):
    """Of another container it may be, whose computer has the same name."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock = dataset.folder / ".lock"
    lock.write_text(json.dumps({"host": files.this_computer(), "pid": gone.pid, "token": "another's"}))
    monkeypatch.setattr(module, "DEAD", 50.0)
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with pytest.raises(UserError, match=f"is being written to by process {gone.pid} on"):
        dataset.add(scan(0), outline())
    os.utime(lock, (time.time() - 55,) * 2)
    assert dataset.add(scan(0), outline()).version == 1


def test_a_share_that_is_lost_while_a_file_is_written_is_a_sentence(tmp_path, monkeypatch):
    def lost(self, *_unused, **_how):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", lost)
    monkeypatch.setattr(Path, "unlink", lost)
    with pytest.raises(UserError, match="job.json cannot be written .Input/output error"):
        files.write_text(tmp_path / "job.json", "{}")


def test_a_folder_that_is_gone_or_damaged_is_a_sentence(dataset, tmp_path):
    dataset.add(scan(0), outline())
    index = dataset.folder / "dataset.json"
    good = index.read_text()
    for change, said in (
        (lambda d: d["cases"][next(iter(d["cases"]))]["versions"][0].update(label="../../etc/passwd"), "is damaged"),
        *(
            (lambda d, file=file: d["cases"][next(iter(d["cases"]))]["versions"][0].update(label=file), "is damaged .the file")
            for file in ("/etc/a/b/c", r"cases\a\b\c", r"cases/a/b/..\..\..\c", "C:/cases/a/b", "//host/share/a/b")
        ),
        (lambda d: d.pop("segments"), "is damaged"),
        (lambda d: d.update(format_version=9), "newer version"),
        (lambda d: d.update(format="other"), "another program's"),
        (lambda d: d["cases"].update({"..": {}}), "is damaged"),
    ):
        data = json.loads(good)
        change(data)
        index.write_text(json.dumps(data))
        with pytest.raises(UserError, match=said):
            Dataset.open(dataset.folder)
    index.write_text(good[:100])
    with pytest.raises(UserError, match="is damaged"):
        dataset.refresh()
    index.unlink()
    with pytest.raises(UserError, match="is no dataset"):
        dataset.add(scan(1), outline())
    with pytest.raises(UserError, match="is not there; connect its drive"):
        Dataset.open(tmp_path / "gone")
    index.write_text(good)
    dataset.folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="is not there"):
        dataset.add(scan(1), outline())


def test_changed_and_missing_files_are_found(dataset):
    a, b = dataset.add(scan(0), outline()), dataset.add(scan(1), outline())
    a.label.write_bytes(b"x")
    b.images[0].unlink()
    problems = {p.case: str(p) for p in dataset.check()}
    assert "was changed since it was added; restore it" in problems[a.name] and "is missing" in problems[b.name]


# ----------------------------------------------------------------------------------------------------------------- splits


def test_a_split_has_the_fractions_that_were_asked_for(dataset):
    for i in range(20):
        dataset.add(scan(i), outline(), name=f"c{i}")
    assert [len(v) for v in dataset.split((0.7, 0.2, 0.1)).values()] == [14, 4, 2]


def test_patients_are_split_as_a_whole_and_stay_where_they_are(dataset):
    for i in range(12):
        dataset.add(scan(i), outline(), name=f"c{i}", patient=str(i // 2))
    parts = dataset.split((0.5, 0.25, 0.25), seed=3)
    assert [len(v) for v in parts.values()] == [6, 4, 2]
    assert all(parts.values())
    where = {n: s for s, names in parts.items() for n in names}
    assert all(where[f"c{2 * i}"] == where[f"c{2 * i + 1}"] for i in range(6))
    again = dataset.add(scan(50), outline(), name="more", patient="0")
    assert again.split == where["c0"]
    dataset.add(scan(51), outline(), name="new", patient="x")
    after = {n: s for s, names in dataset.split((0.5, 0.25, 0.25), seed=9).items() for n in names}
    assert all(after[n] == s for n, s in where.items()) and after["new"]
    with pytest.raises(UserError, match="put both into the same split"):
        dataset.add(scan(52), outline(), patient="0", split="test" if where["c0"] != "test" else "train")
    with pytest.raises(UserError, match="three fractions"):
        dataset.split((0.5, 0.6, 0.1))


def test_too_few_patients_cannot_be_split(dataset):
    dataset.add(scan(0), outline())
    with pytest.raises(UserError, match="too few patients"):
        dataset.split()
    assert dataset.split((1, 0, 0))["train"]


# ---------------------------------------------------------------------------------------------------------------- exports


@pytest.fixture
def filled(dataset):
    for i in range(6):
        dataset.add(scan(i, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)), outline(), name=f"c{i}")
    dataset.split((0.5, 0.25, 0.25))
    return dataset


def test_nnunet_takes_the_export(filled, tmp_path):
    folder = filled.export(tmp_path / "raw", "nnunet")
    assert folder.name == "Dataset501_Lungs" and filled.export(tmp_path / "raw", "nnunet").name == "Dataset502_Lungs"
    data = json.loads((folder / "dataset.json").read_text())
    assert data["labels"] == {"background": 0, "organ": 1, "tumour": 2} and data["channel_names"] == {"0": "CT"}
    names = sorted(p.name.removesuffix("_0000.nii.gz") for p in (folder / "imagesTr").iterdir())
    assert len(names) == data["numTraining"] and names == sorted(p.name.removesuffix(".nii.gz") for p in (folder / "labelsTr").iterdir())
    tests = [e.name for e in filled.entries.values() if e.split == "test"]
    assert tests and {p.name for p in (folder / "imagesTs").iterdir()} == {f"{n}_0000.nii.gz" for n in tests}
    mask, image = read_image(folder / "labelsTr" / f"{names[0]}.nii.gz"), read_image(folder / "imagesTr" / f"{names[0]}_0000.nii.gz")
    assert np.array_equal(mask.array, np.where(outline() == 5, 2, outline())) and mask.same_grid(image)
    fold = json.loads((folder / "splits_final.json").read_text())[0]
    assert sorted(fold["train"] + fold["val"]) == names and fold["val"]
    rows = [f"{e.name},{e.patient}" for e in filled.entries.values()]
    for place in (folder, filled.export(tmp_path / "snap", "itksnap")):
        assert (place / "patients.csv").read_text().splitlines() == ["case,patient", *rows]


def test_nnunets_own_check_of_a_dataset_passes(filled, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2] / "build" / "nnunet")])  # behind what is ours
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed (make nnunet)")
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    folder = filled.export(tmp_path / "raw", "nnunet")
    verify_dataset_integrity(str(folder), 1)
    label = next((folder / "labelsTr").iterdir())
    mask = read_image(label)
    write_image(mask.like(mask.array * 7), label)  # it does look
    with pytest.raises(RuntimeError):
        verify_dataset_integrity(str(folder), 1)


def test_monai_takes_the_export_and_the_folder_itself(filled, tmp_path):
    folder = filled.export(tmp_path / "monai", "monai")
    for place, file in ((folder, folder / "datalist.json"), (filled.folder, filled.folder / "dataset.json")):
        data = json.loads(file.read_text())
        splits = [e.split for e in filled.entries.values()]
        for key, split in (("training", "train"), ("validation", "validation"), ("test", "test")):
            assert len(data[key]) == splits.count(split) > 0
            items = [{k: place / v for k, v in item.items() if k != "patient"} for item in data[key]]
            assert all(np.array_equal(read_image(i["label"]).array, outline()) and i["image"].is_file() for i in items)


def test_itksnap_takes_the_label_descriptions(filled, tmp_path):
    folder = filled.export(tmp_path / "snap", "itksnap")
    # As ITK-SNAP reads a line: sscanf "%d %d %d %d %f %d %d" and a name in quotes.
    pattern = r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+(\d)\s+(\d)\s+"([^"]*)"'
    lines = [re.fullmatch(pattern, line) for line in (folder / "labels.txt").read_text().splitlines() if not line.startswith("#")]
    assert [(m[1], m[2], m[8]) for m in lines] == [("0", "0", "Clear Label"), ("1", "1", "organ"), ("5", "4", "tumour")]
    assert len(list((folder / "images").iterdir())) == len(list((folder / "labels").iterdir())) == 6


def test_an_export_whose_files_windows_looks_over_is_moved_then(filled, tmp_path, busy_file):
    folder = filled.export(tmp_path / "monai", "monai")
    assert (folder / "datalist.json").is_file() and busy_file == [folder] * 3


@pytest.mark.parametrize("name", ["aux", "Con.1", "LPT1", "p1."])
def test_a_folder_that_windows_cannot_make_names_no_case(dataset, name):
    with pytest.raises(UserError, match="Windows makes no folder of that name; choose another"):
        dataset.add(scan(0), outline(), name=name)
    assert dataset.add(scan(0), outline(), name="auxiliary.1").name == "auxiliary.1"


def test_names_that_differ_in_case_alone_are_one_to_windows_and_macos(dataset):
    dataset.add(scan(0), outline(), name="P1")
    with pytest.raises(UserError, match="There is a case P1 already, the same name to Windows and macOS; choose another, or update"):
        dataset.add(scan(1), outline(), name="p1")
    dataset.remove("P1", erase=True)
    added = dataset.add(scan(1), outline(), name="p1")
    former, version = dataset.folder / "cases" / "P1", added.label.parent
    if not former.samefile(version.parent):
        former.rmdir()
        version.parent.rename(former)
    assert dataset.clean(age=0) == [] and (former / version.name / "label.nii.gz").is_file()


def test_a_removed_case_is_not_restored_beside_one_whose_name_differs_in_case_alone(dataset, tmp_path):
    """On Windows and macOS an export wrote one patient's voxels over the other's."""
    dataset.add(scan(0), outline(), name="P1", patient="a")
    dataset.remove("P1")
    dataset.add(scan(1), outline(), name="p1", patient="b")
    before = state(dataset)
    with pytest.raises(UserError, match="There is a case p1 already, the same name to Windows and macOS; remove that one before P1"):
        dataset.restore("P1")
    assert state(dataset) == before
    index = dataset.folder / "dataset.json"
    data = json.loads(index.read_text("utf-8"))
    data["cases"]["P1"] = data["removed"].pop("P1")  # as an earlier version restored it
    index.write_text(json.dumps(data), "utf-8")
    dataset.refresh()
    for kind in module.EXPORTS:
        with pytest.raises(UserError, match="The cases p1 and P1 have the same name to Windows and macOS.*; remove one of them and"):
            dataset.export(tmp_path / "out", kind)
    assert not (tmp_path / "out").exists() and dataset.restore("P1", 1).version == 2


@pytest.mark.parametrize("kind", module.EXPORTS)
def test_a_folders_name_with_braces_takes_an_export(filled, tmp_path, kind):
    folder = filled.export(tmp_path / "{study} 3" / "{8F2A-11}", kind)
    assert len(list(folder.glob("images*/c?*.nii.gz"))) == len(list(folder.glob("labels*/c?.nii.gz"))) == 6


def test_an_export_is_whole_or_not_there(filled, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="is not empty"):
        filled.export(tmp_path / "full", "monai")
    with pytest.raises(UserError, match="no known export"):
        filled.export(tmp_path / "a", "dicom")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        filled.export(tmp_path / "b", "monai")
    assert {p.name for p in tmp_path.iterdir()} & {"a", "b"} == set() and not list(tmp_path.glob(".unetseg*"))


# ------------------------------------------------------------------------------------------------------------- masks, CLI


def test_our_own_segmentation_is_read_back_with_names_and_codes(tmp_path):
    image = scan(0)
    labels = Prediction(image.like(outline()), (ORGAN, TUMOUR), "m-1", None)
    write_segmentation(labels, tmp_path / "a.seg.nrrd")
    array, found = read_mask(tmp_path / "a.seg.nrrd", image)
    assert [(d.name, d.color, d.terminology) for d in found] == [(d.name, d.color, d.terminology) for d in (ORGAN, TUMOUR)]
    assert np.array_equal(array, np.where(outline() == 5, 2, outline()))
    with pytest.raises(UserError, match="names no segments"):
        write_image(image, tmp_path / "b.nrrd")
        (tmp_path / "b.nrrd").rename(tmp_path / "b.seg.nrrd")
        read_segments(tmp_path / "b.seg.nrrd")


def test_slicers_overlapping_segments(data):
    image = read_image(data / "odd_files" / "CTChest4.nrrd")
    array, found = read_mask(data / "odd_files" / "SegmentationOverlapping.seg.nrrd", image)
    assert [d.name for d in found][4:] == ["right lung", "left lung", "tissue", "overlapping sphere"]
    assert found[4].terminology["type"][0] == "SCT"
    flat, _ = read_mask(data / "odd_files" / "Segmentation.seg.nrrd", image)
    sphere = array == 8
    assert sphere.sum() > 1000 and (flat[sphere] > 0).any() and np.array_equal(array[~sphere], flat[~sphere])


def test_a_segment_that_later_ones_cover_does_not_vanish(tmp_path):
    image, tumour, lung = scan(0), np.zeros((6, 11, 9), np.uint8), np.zeros((6, 11, 9), np.uint8)
    tumour[2:4, 3:5, 3:5], lung[1:5, 2:6, 2:6] = 1, 1
    for first, second in ((tumour, lung), (lung, tumour)):
        both = sitk.Compose([sitk.GetImageFromArray(mask) for mask in (first, second)])
        both.CopyInformation(to_sitk(image))
        for i, name in enumerate(("tumour", "lung") if first is tumour else ("lung", "tumour")):
            for key, value in {"ID": name, "Name": name, "Layer": i, "LabelValue": 1, "Color": "1 0 0", "Tags": ""}.items():
                both.SetMetaData(f"Segment{i}_{key}", str(value))
        sitk.WriteImage(both, str(tmp_path / "a.seg.nrrd"))
        if first is tumour:
            with pytest.raises(UserError, match="Later segments cover most of 'tumour' in .*, which would be lost; move it"):
                read_mask(tmp_path / "a.seg.nrrd", image)
    assert np.array_equal(read_mask(tmp_path / "a.seg.nrrd", image)[0], lung + tumour)


def test_a_models_mask_is_matched_by_the_names_of_its_labels(unetseg, tmp_path):
    def segmented(name, mask, *labels):
        write_segmentation(Prediction(image.like(mask), labels, "m-1.0.0", Box.whole(mask.shape)), tmp_path / name)
        return tmp_path / name

    image, organ, tumour = (
        scan(0, direction=(1.0, 0, 0, 0, 1, 0, 0, 0, 1)),
        Label(1, "organ", (1, 2, 3), {}),
        Label(2, "tumour", (4, 5, 6), {}),
    )
    write_image(image, tmp_path / "a.nii.gz")
    found = segmented("model.seg.nrrd", outline(2), organ, tumour)
    # The organ was deleted, so that the tumour is the first segment of the file.
    mine = segmented("mine.seg.nrrd", (outline(2) == 2).astype(np.uint8), replace(tumour, value=1))
    Dataset.create(tmp_path / "set", "Set", [organ, tumour], ["CT"])
    for mask, removed in ((found, 0), (mine, 108)):
        code, out, said = unetseg("dataset", "add", tmp_path / "set", tmp_path / "a.nii.gz", "-m", mask, "--model-mask", found)
        assert code == 0, said
        assert f"organ: 0 voxels added, {removed} removed" in out and "tumour: 0 voxels added, 0 removed" in out
    assert np.array_equal(read_image(Dataset.open(tmp_path / "set").versions(out.split()[0])[0].model).array, outline(2))


def test_the_command_line(unetseg, tmp_path, monkeypatch):
    run = partial(unetseg, "dataset")
    write_image(scan(0), tmp_path / "a.nii.gz")
    write_image(scan(0).like(outline()), tmp_path / "m.nii.gz")
    folder, case = tmp_path / "set", (tmp_path / "a.nii.gz", "--mask", tmp_path / "m.nii.gz")
    code, _, said = run("add", folder, *case, "--label", "1=organ")
    assert code == 2 and "the label 5" in said and not (folder / "dataset.json").exists()
    code, _, said = run("add", folder, *case)
    assert code == 2 and "does not name its labels; give --label 1=NAME" in said
    labels = ("--label", "1=organ", "--label", "5=tumour", "--patient", "Jane")
    code, out, said = run("add", folder, *case, "--model-mask", tmp_path / "m.nii.gz", *labels)
    assert code == 0 and "tumour: 0 voxels added, 0 removed, Dice with the model's 1.000" in out, said
    assert run("split", folder, "--fractions", "1,0,0")[1].startswith("train: 1 case")
    listed = json.loads(run("list", folder, "--json")[1])
    assert listed[0]["split"] == "train" and listed[0]["version"] == 1 and "Jane" not in str(listed)
    monkeypatch.setenv("COLUMNS", "120")  # in 80 the name is folded
    assert listed[0]["name"] in run("list", folder)[1]
    assert run("export", folder, tmp_path / "out", "--as", "monai")[0] == 0 and (tmp_path / "out" / "datalist.json").is_file()
    assert run("check", folder)[:2] == (0, "1 case, 0 problems\n")
    assert run("remove", folder, listed[0]["name"])[0] == run("restore", folder, listed[0]["name"])[0] == 0
    Dataset.open(folder).entries[listed[0]["name"]].label.unlink()
    code, out, _ = run("check", folder)
    assert code == 1 and "label.nii.gz of version 1 is missing" in out


def test_an_image_that_is_lost_comes_back_with_the_next_version(dataset):
    former = dataset.add(scan(0), outline(), name="one")
    former.images[0].unlink()
    again = dataset.add(scan(0), outline(), name="one")
    assert np.array_equal(read_image(again.images[0]).array, scan(0).array)


def test_cleaning_keeps_what_can_be_restored(dataset):
    dataset.add(scan(0), outline(), name="one")
    dataset.remove("one")
    dataset.clean(age=0)
    assert np.array_equal(read_image(dataset.restore("one").images[0]).array, scan(0).array)


def test_whole_numbers_that_no_file_holds_become_the_nearest():
    large = np.array([0, 1 << 40])
    assert module.storable(large).dtype == np.float32 and module.storable(large).tolist() == [0, 1 << 40]


def test_labels_have_values_up_to_255():
    known = [Label(1, f"l{i}", (0, 0, 0), {}) for i in range(10)]
    assert [label.value for label in module.completed([Label(253, "x", (0, 0, 0), {})], known)] == [253, 254, 255]


def test_a_set_whose_cases_were_removed_is_not_undone(dataset):
    dataset.add(scan(0), outline(), name="one")
    dataset.remove("one")
    dataset.discard()
    assert Dataset.open(dataset.folder).restore("one").name == "one"
