"""Any layout gives the same cases: names, patients, labels, and every voxel of image and mask."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from unetseg_training import prepare
from unetseg_training.cases import IGNORE, Case, CaseSet, Mismatch, UnknownLabel, files, fill, find_cases, folds
from UNetSegmentationLib.dataset import Dataset
from UNetSegmentationLib.files import UserError
from UNetSegmentationLib.image import Box, Image, read_image, write_image
from UNetSegmentationLib.inference.predict import Prediction
from UNetSegmentationLib.model import Label
from UNetSegmentationLib.output import write_segmentation

SHAPE = (5, 12, 10)
NAMES = ("a", "b", "c")


def scan(i, shift=0.0):
    array = np.random.default_rng(i).integers(-1000, 400, SHAPE).astype(np.int16)
    return Image(array, (0.8, 0.8, 2.0), (-10.0 + shift, 20.0, 5.0))


def outline(i, values=(1, 2)):
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:4, 2:8, 2 : 7 + i % 3] = values[0]
    mask[2, 4:6, 3:5] = values[1]
    return mask


def put(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(image, path)


def mask_of(i, values=(1, 2)):
    return scan(i).like(outline(i, values))


def exact(found, names=NAMES, count=3):
    """Every case gives its own voxels and its own mask."""
    assert [c.name for c in found.cases] == list(names)[:count]
    for i, case in enumerate(found.cases):
        image, mask = found.load(case)
        assert np.array_equal(image.array, scan(i).array) and np.array_equal(mask, outline(i)) and mask.dtype == np.uint8
        assert image.same_grid(scan(i), 1e-3)


# --------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("folders", [("images", "labels"), ("imagesTr", "labelsTr"), ("Scans", "Masks")])
def test_pairs_in_two_folders(tmp_path, folders):
    for i, name in enumerate(NAMES):
        put(scan(i), tmp_path / folders[0] / f"{name}.nii.gz")
        put(mask_of(i), tmp_path / folders[1] / (f"{name}.nrrd" if i else f"{name}_seg.nii.gz"))
    put(scan(9), tmp_path / folders[0] / "bare.nii.gz")
    (tmp_path / "labels.txt").write_text('# x\n 0 0 0 0 0 0 0 "Clear Label"\n 1 255 0 0 1 1 1 "organ"\n 2 0 255 0 1 1 1 "tumour, left"\n')
    found = find_cases(tmp_path)
    exact(found)
    assert found.layout == "pairs" and [(d.value, d.name) for d in found.labels] == [(1, "organ"), (2, "tumour, left")]
    assert found.channels == ("CT",) and any("1 images have no mask (bare)" in n for n in found.notes)
    with (tmp_path / "labels.txt").open("a") as f:
        f.write(' 3 0 0 255 1 1 1 "node"\n')
    found = find_cases(tmp_path)
    exact(found)
    assert len(found.labels) == 2 and "1 names of the table of labels occur in no mask (node) and are left out." in found.notes
    (tmp_path / "labels.json").write_text('{"organ": 1, "tumour": 2, "node": 3}')
    assert len(find_cases(tmp_path).labels) == 3  # which the dataset says it has


def test_pairs_in_one_folder(tmp_path):
    for i, name in enumerate(NAMES):
        put(scan(i), tmp_path / f"{name}_image.nii.gz")
        put(mask_of(i), tmp_path / f"{name}_label.nii.gz")
    exact(find_cases(tmp_path))


def test_pairs_in_one_folder_however_their_words_are_spelled(tmp_path):
    for i, (name, word) in enumerate(zip(NAMES, ("_CT", "_ct", "_Image"))):
        put(scan(i), tmp_path / f"{name}{word}.nii.gz")
        put(mask_of(i), tmp_path / f"{name}_SEG.nii.gz")
    exact(find_cases(tmp_path))


def test_nnunet_raw(tmp_path):
    folder = tmp_path / "Dataset001_x"
    for i, name in enumerate(NAMES):
        for channel in range(2):
            put(scan(i if not channel else 50 + i), folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        put(mask_of(i, (3, 7)), folder / "labelsTr" / f"{name}.nii.gz")
    put(scan(9), folder / "imagesTs" / "t_0000.nii.gz")
    put(scan(8), folder / "imagesTs" / "t_0001.nii.gz")
    data = {"channel_names": {"0": "FLAIR", "1": "T1"}, "labels": {"background": 0, "organ": 3, "tumour": 7, "ignore": 9}}
    (folder / "dataset.json").write_text(json.dumps({**data, "numTraining": 3, "file_ending": ".nii.gz"}))
    found = find_cases(folder)
    assert found.layout == "nnunet" and found.channels == ("FLAIR", "T1") and [d.name for d in found.labels] == ["organ", "tumour"]
    assert found.values == {3: 1, 7: 2, 9: -1} and [c.name for c in found.annotated] == list(NAMES) and found.cases[-1].split == "test"
    image, mask = found.load(found.cases[1])
    assert np.array_equal(image.array, np.stack([scan(1).array, scan(51).array])) and np.array_equal(mask, outline(1))
    assert not found.load(found.cases[-1])[1].any()
    put(mask_of(0, (3, 9)), folder / "labelsTr" / "a.nii.gz")
    for how, has in (({}, {0, 1, IGNORE}), ({"only": ["tumour"]}, {0, IGNORE}), ({"foreground": True}, {0, 1, IGNORE})):
        chosen = find_cases(folder, **how)
        assert chosen.ignores and set(np.unique(chosen.load(chosen.cases[0])[1])) == has
    put(mask_of(0, (3, 8)), folder / "labelsTr" / "a.nii.gz")
    with pytest.raises(UserError, match=r"holds the unknown label 8 \(known: 3 organ, 7 tumour\)"):
        found.load(found.cases[0])
    (folder / "imagesTr" / "a.json").write_text('{"spacing": [2, 1, 1]}')
    assert any("The spacing in a.json and its like is not read" in n for n in find_cases(folder).notes)
    for wrong, said in (
        ({"labels": {"0": "background", "1": "organ"}}, "is not as nnU-Net asks .*; write"),
        ({"channel_names": ["FLAIR", "T1"]}, "is not as nnU-Net asks .*; write"),
        ({"labels": {"background": 0}}, "names no label but the background"),
        ({"file_ending": ".nrrd"}, r'holds no \*_0000.nrrd; add the images, or correct "file_ending"'),
    ):
        (folder / "dataset.json").write_text(json.dumps({**data, "file_ending": ".nii.gz", **wrong}))
        with pytest.raises(UserError, match=said):
            find_cases(folder)
    (folder / "dataset.json").write_text(json.dumps({**data, "file_ending": ".nii.gz"}))
    (folder / "imagesTr" / "b_0001.nii.gz").unlink()
    with pytest.raises(UserError, match="Case b: .* has 1 of its 2 channels"):
        find_cases(folder)


def test_nnunet_tells_what_it_leaves_out_and_knows_names_that_extend_others(tmp_path):
    for i, name in enumerate(("a", "a_0000", "a_1")):
        for channel in range(2):
            put(scan(i), tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        put(mask_of(i), tmp_path / "labelsTr" / f"{name}.nii.gz")
    data = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "organ": 1, "tumour": 2}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({**data, "numTraining": 3}))
    found = find_cases(tmp_path)
    assert [(c.name, [f.name[-11:-7] for f in c.images]) for c in found.cases] == [(n, ["0000", "0001"]) for n in ("a", "a_0000", "a_1")]
    assert not found.notes
    put(scan(5), tmp_path / "imagesTr" / "b_0000.nii")
    put(mask_of(5), tmp_path / "labelsTr" / "b.nii")
    (tmp_path / "dataset.json").write_text(json.dumps({**data, "numTraining": 4}))
    assert find_cases(tmp_path).notes == (
        "1 images are not named *_0000.nii.gz (b_0000.nii) and are left out.",
        "1 masks have no image of their own (b.nii) and are left out.",
        '"numTraining" in dataset.json is 4, and 3 training cases are here.',
    )


def test_nnunet_with_colour_pictures_regions_and_what_macos_leaves(tmp_path):
    """nnU-Net keeps a colour picture in one file; a region of one value is a label with a name."""
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / part).mkdir()
    for name in NAMES:
        picture = sitk.GetImageFromArray(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8), isVector=True)
        sitk.WriteImage(picture, str(tmp_path / "imagesTr" / f"{name}_0000.png"))
        sitk.WriteImage(sitk.GetImageFromArray(rng.integers(0, 3, (20, 20)).astype(np.uint8)), str(tmp_path / "labelsTr" / f"{name}.png"))
        (tmp_path / "imagesTr" / f"._{name}_0000.png").write_bytes(b"\0\5\x16\7")
        (tmp_path / "labelsTr" / f"._{name}.png").write_bytes(b"\0\5\x16\7")
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    data = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": labels, "file_ending": ".png", "numTraining": 3}
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    found = find_cases(tmp_path)
    assert [c.name for c in found.cases] == list(NAMES) and [d.name for d in found.labels] == ["label 1", "core"]
    image, mask = found.load(found.cases[0])
    assert image.array.shape == (3, 1, 20, 20) and set(np.unique(mask)) == {0, 1, 2}


def test_msd(tmp_path):
    data = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "organ", "2": "tumour"}, "test": ["./imagesTs/t.nii.gz"]}
    data["training"] = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in NAMES]
    for i, name in enumerate(NAMES):
        put(scan(i), tmp_path / "imagesTr" / f"{name}.nii.gz")
        put(mask_of(i), tmp_path / "labelsTr" / f"{name}.nii.gz")
    put(scan(7), tmp_path / "imagesTs" / "t.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    found = find_cases(tmp_path)
    assert found.layout == "msd" and [d.name for d in found.labels] == ["organ", "tumour"] and found.channels == ("CT",)
    exact(found.subset(found.annotated))
    assert [(c.name, c.split) for c in found.cases if not c.annotated] == [("t", "test")]
    (tmp_path / "imagesTs" / "t.nii.gz").unlink()  # a challenge's, which training never reads
    found = find_cases(tmp_path)
    exact(found)
    assert "1 images without a mask are not on the disk (t) and are left out." in found.notes
    # As others write it: names first, one modality, and paths of Windows.
    data |= {"modality": "CT", "labels": {"background": 0, "organ": 1, "tumour": 2}, "test": []}
    data["training"] = [{key: path.replace("/", "\\") for key, path in item.items()} for item in data["training"]]
    (tmp_path / "dataset.json").write_text(json.dumps(data))
    found = find_cases(tmp_path)
    assert found.layout == "msd" and [d.name for d in found.labels] == ["organ", "tumour"]
    exact(found)


def test_monai_datalist(tmp_path):
    items = []
    for i, name in enumerate(NAMES):
        put(scan(i), tmp_path / name / "image.nii.gz")
        put(mask_of(i), tmp_path / name / "label.nii.gz")
        items.append({"image": f"{name}/image.nii.gz", "label": f"{name}/label.nii.gz", "patient": "p" if i else "q"})
    (tmp_path / "list.json").write_text(json.dumps({"training": items[:2], "validation": items[2:]}))
    for place in (tmp_path, tmp_path / "list.json"):
        found = find_cases(place)
        exact(found, [f"{n}-image" for n in NAMES])
        assert found.layout == "monai" and [(c.patient, c.split) for c in found.cases] == [
            ("q", "train"),
            ("p", "train"),
            ("p", "validation"),
        ]
    for names in (["organ", "tumour"], ["Background", "organ", "tumour"]):
        (tmp_path / "list.json").write_text(json.dumps({"training": items, "labels": names}))
        assert [(d.value, d.name) for d in find_cases(tmp_path).labels] == [(1, "organ"), (2, "tumour")]
    (tmp_path / "list.json").write_text(
        json.dumps({"training": [{**e, "fold": i % 2, "label": [e["label"]]} for i, e in enumerate(items)]})
    )
    assert any("folds in list.json are not taken over" in n for n in find_cases(tmp_path).notes)
    (tmp_path / "all.json").write_text(json.dumps({"training": items}))
    with pytest.raises(UserError, match=r"holds 2 lists of cases \(all.json, list.json\); give the file of one"):
        find_cases(tmp_path)
    assert len(find_cases(tmp_path / "all.json").cases) == 3
    (tmp_path / "all.json").unlink()
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a/image.nii.gz", "label": "gone.nii.gz"}]}))
    with pytest.raises(UserError, match="gone.nii.gz, which does not exist"):
        find_cases(tmp_path)


def test_patients_that_a_list_gives_stay_and_files_of_one_name_are_of_many(tmp_path):
    items = []
    for i, name in enumerate(NAMES):
        put(scan(i), tmp_path / name / "image.nii.gz")
        put(mask_of(i), tmp_path / name / "label.nii.gz")
        items.append({"image": f"{name}/image.nii.gz", "label": f"{name}/label.nii.gz"})
    labels = {"0": "background", "1": "organ", "2": "tumour"}
    for layout, rest in (("monai", {}), ("msd", {"labels": labels})):
        for given, patients in (((), ["a-image", "b-image", "c-image"]), (("p", 0, None), ["p", "0", "c-image"])):
            listed = [{**item, "patient": p} for item, p in zip(items, given)] or items
            (tmp_path / "dataset.json").write_text(json.dumps({"training": listed, **rest}))
            found = find_cases(tmp_path)
            assert found.layout == layout and [c.patient for c in found.cases] == patients


def test_bids(tmp_path):
    for i, name in enumerate(("01", "02", "03")):
        put(scan(i), tmp_path / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz")
        put(scan(i), tmp_path / f"sub-{name}" / "anat" / f"sub-{name}_FLAIR.nii.gz")
        put(mask_of(i), tmp_path / "derivatives" / "manual" / f"sub-{name}" / "anat" / f"sub-{name}_desc-lesion_dseg.nii.gz")
    put(scan(5), tmp_path / "sub-03" / "anat" / "sub-03_T2w.nii.gz")
    (tmp_path / "derivatives" / "manual" / "desc-lesion_dseg.tsv").write_text("index\tname\n1\torgan\n2\ttumour\n")
    found = find_cases(tmp_path)
    assert found.layout == "bids" and found.channels == ("FLAIR", "T1w") and [d.name for d in found.labels] == ["organ", "tumour"]
    assert [c.patient for c in found.cases] == ["sub-01", "sub-02", "sub-03"]
    image, mask = found.load(found.cases[2])
    assert image.n_channels == 2 and np.array_equal(mask, outline(2))
    for name in ("01", "02", "03"):  # lies on another grid, and is not what the masks are of
        put(Image(np.zeros((3, 4, 5), np.float32)), tmp_path / f"sub-{name}" / "func" / f"sub-{name}_task-rest_bold.nii.gz")
    assert find_cases(tmp_path).channels == ("FLAIR", "T1w") and any("chosen with --channel" in n for n in found.notes)
    one = find_cases(tmp_path, channels=["t1w"])
    assert one.channels == ("T1w",) and np.array_equal(one.load(one.cases[2])[0].array, scan(2).array)
    assert find_cases(tmp_path, channels=["T1w", "FLAIR"]).cases[0].images == found.cases[0].images[::-1]
    with pytest.raises(UserError, match="There is no channel T2w; the cases have FLAIR, T1w"):
        find_cases(tmp_path, channels=["T2w"])


def test_bids_tells_what_it_leaves_out_and_takes_the_names_that_occur(tmp_path, monkeypatch):
    for i, name in enumerate(("01", "02", "03", "04")):
        put(scan(i), tmp_path / f"sub-{name}" / "ses-a" / "anat" / f"sub-{name}_ses-a_T1w.nii.gz")
        if name != "04":
            put(mask_of(i, (17, 53)), tmp_path / "derivatives" / f"sub-{name}{'_ses-a' * (name < '03')}_dseg.nii.gz")
    table = "index\tname\n" + "".join(f"{i}\tpart {i}\n" for i in range(1300))  # as FreeSurfer's
    (tmp_path / "derivatives" / "dseg.tsv").write_text(table)
    found = find_cases(tmp_path)
    exact(found, ["sub-01_ses-a", "sub-02_ses-a"])
    assert [d.name for d in found.labels] == ["part 17", "part 53"] and found.values == {17: 1, 53: 2}
    assert found.notes[:3] == (
        "2 subjects or sessions have no mask (sub-03_ses-a, sub-04_ses-a) and are left out.",
        "1 masks have no image of their own (sub-03_dseg.nii.gz) and are left out.",
        "1297 names of the table of labels occur in no mask (part 1, part 2, part 3, ...) and are left out.",
    )
    (tmp_path / "sub-05").mkdir()
    put(scan(4), tmp_path / "sub-05" / "sub-05_T1w.nii.gz")
    (tmp_path / "derivatives" / "sub-05_dseg.nii.gz").write_bytes(b"damaged")
    monkeypatch.setattr("unetseg_training.cases.SCANNED", 1)
    assert [d.name for d in find_cases(tmp_path).labels] == ["part 17", "part 53"]


def test_bids_takes_the_run_that_was_annotated(tmp_path):
    for i, name in enumerate(("01", "02")):
        anat = tmp_path / f"sub-{name}" / "anat"
        put(scan(i + 10), anat / f"sub-{name}_run-1_T1w.nii.gz")
        put(scan(i), anat / f"sub-{name}_run-2_T1w.nii.gz")
        put(mask_of(i), tmp_path / "derivatives" / f"sub-{name}" / f"sub-{name}_run-2_dseg.nii.gz")
    (tmp_path / "dseg.tsv").write_bytes("index\tname\n1\tMilzé\n2\n".encode("latin-1"))
    found = find_cases(tmp_path)
    exact(found, ["sub-01", "sub-02"], 2)
    assert [d.name for d in found.labels] == ["Milzé", "label 2"]
    assert "sub-01 has 2 images T1w; sub-01_run-2_T1w.nii.gz is used." in found.notes


def test_bids_masks_of_several_structures_do_not_become_one_label(tmp_path):
    for i, name in enumerate(("01", "02", "03")):
        anat = tmp_path / f"sub-{name}" / "anat"
        put(scan(i), anat / f"sub-{name}_FLAIR.nii.gz")
        put(mask_of(i), anat / f"sub-{name}_label-lesion_mask.nii.gz")
        put(mask_of(i), anat / f"sub-{name}_mask.nii.gz")
        # Lies on another grid, in a folder that comes first by its name.
        small = Image(np.ones((3, 4, 5), np.uint8))
        put(small, tmp_path / f"sub-{name}" / "func" / f"sub-{name}_task-rest_bold.nii.gz")
        put(small, tmp_path / "derivatives" / "aroma" / f"sub-{name}" / "func" / f"sub-{name}_task-rest_mask.nii.gz")
    put(mask_of(0), tmp_path / "sub-01" / "anat" / "sub-01_label-edema_mask.nii.gz")
    found = find_cases(tmp_path)
    exact(found, ["sub-01", "sub-02", "sub-03"])
    assert found.channels == ("FLAIR",) and all("_label-lesion_mask" in c.label.name for c in found.cases)
    (tmp_path / "sub-01" / "anat" / "sub-01_label-lesion_mask.nii.gz").unlink()
    with pytest.raises(UserError, match="are of edema and lesion; keep one kind, or merge them into a _dseg"):
        find_cases(tmp_path)


@pytest.mark.parametrize("suffix", ["mask", "seg"])
def test_of_two_masks_that_all_of_a_bids_set_have_it_is_not_the_brain(tmp_path, suffix):
    for i, name in enumerate(("01", "02")):
        anat = tmp_path / f"sub-{name}" / "anat"
        put(scan(i), anat / f"sub-{name}_FLAIR.nii.gz")
        put(mask_of(i, (1, 1)), anat / f"sub-{name}_label-lesion_{suffix}.nii.gz")
        put(mask_of(i, (0, 1)), anat / f"sub-{name}_label-brain_{suffix}.nii.gz")
    found = find_cases(tmp_path)
    assert len(found.cases) == 2
    assert all(np.array_equal(found.load(c)[1], outline(i, (1, 1))) for i, c in enumerate(found.cases))


def test_our_own_dataset(tmp_path):
    labels = [Label(2, "organ", (1, 2, 3), {}), Label(9, "tumour", (4, 5, 6), {})]
    dataset = Dataset.create(tmp_path / "set", "x", labels, ["CT"])
    with pytest.raises(UserError, match="is empty; add annotated cases first"):
        find_cases(tmp_path / "set")
    for i, name in enumerate(NAMES):
        dataset.add(scan(i), outline(i, (2, 9)), name=name, patient=str(i // 2))
    dataset.split((0.5, 0.5, 0))
    found = find_cases(tmp_path / "set")
    exact(found)
    assert found.layout == "unetseg" and [(d.value, d.name, d.color) for d in found.labels] == [
        (1, "organ", (1, 2, 3)),
        (2, "tumour", (4, 5, 6)),
    ]
    assert {c.split for c in found.cases} == {"train", "validation"} and found.cases[0].patient == found.cases[1].patient


def test_what_monai_reads_of_a_dataset_is_what_we_read(tmp_path):
    pytest.importorskip("monai", reason="monai is not installed")
    from monai.data import load_decathlon_datalist

    dataset = Dataset.create(tmp_path / "set", "x", [Label(1, "organ", (1, 2, 3), {}), Label(2, "tumour", (4, 5, 6), {})], ["CT"])
    for i, name in enumerate(NAMES):
        dataset.add(scan(i), outline(i), name=name)
    dataset.split((0.4, 0.3, 0.3))
    exported = dataset.export(tmp_path / "out", "monai")
    for file in (dataset.folder / "dataset.json", exported / "datalist.json"):
        found = find_cases(file)
        for key, split in (("training", "train"), ("validation", "validation"), ("test", "test")):
            items = load_decathlon_datalist(str(file), True, key)
            assert [(i["image"], i["label"]) for i in items] == [(str(c.images[0]), str(c.label)) for c in found.cases if c.split == split]
            assert len(items) == 1


@pytest.mark.parametrize("kind", ["nnunet", "itksnap"])
def test_an_export_keeps_the_cases_of_a_patient_together(tmp_path, kind):
    dataset = Dataset.create(tmp_path / "set", "x", [Label(1, "organ", (1, 2, 3), {}), Label(2, "tumour", (4, 5, 6), {})], ["CT"])
    for i, (name, split) in enumerate({"p1": "train", "p1.v2": "validation", "z": "train", "t": "test"}.items()):
        dataset.add(scan(i), outline(i), name=name, patient="A" if name in ("p1", "z") else name, split=split)
    cases = find_cases(dataset.folder).cases
    folder = dataset.export(tmp_path / "out", kind)
    found = find_cases(folder)
    assert {(c.name, c.patient) for c in found.cases} == {(c.name, c.patient) for c in cases} and len({c.patient for c in cases}) == 3
    if kind == "nnunet":
        assert {(c.name, c.split) for c in found.cases} == {(c.name, c.split) for c in cases} and not found.notes
        fold = {"train": ["p1", "z"], "val": ["p1.v2"]}
        for folds_ in ([fold, fold], [{**fold, "train": ["p1"]}], [{**fold, "val": ["p1.v2", "z"]}], {"train": []}):
            (folder / "splits_final.json").write_text(json.dumps(folds_))
            found = find_cases(folder)
            assert {c.split for c in found.cases} == {"", "test"} and "splits_final.json is not one split of these cases" in found.notes[0]


def test_luna16_gives_balls(tmp_path):
    image = scan(0)
    put(image, tmp_path / "subset0" / "1.2.3.mha")
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "subset0" / "1.2.3.mha")), str(tmp_path / "subset0" / "1.2.3.mhd"))
    (tmp_path / "subset0" / "1.2.3.mha").unlink()
    center = image.index_to_point((4, 6, 2))
    rows = ["seriesuid,coordX,coordY,coordZ,diameter_mm", "1.2.3," + ",".join(map(str, center)) + ",4.2", "9.9,0,0,0,5"]
    (tmp_path / "annotations.csv").write_text("\n".join(rows) + "\n")
    found = find_cases(tmp_path)
    assert found.layout == "luna16" and len(found.annotated) == 1 and any("1 annotated scans are not here" in n for n in found.notes)
    (tmp_path / "subset0" / "._1.2.3.mhd").write_bytes(b"\0\5\x16\7")  # of macOS, on a USB stick
    assert found.notes == find_cases(tmp_path).notes
    (tmp_path / "subset0" / "._1.2.3.mhd").unlink()
    (tmp_path / "seg-lungs-LUNA16").mkdir()  # the challenge's lungs have the scans' names
    for file in (tmp_path / "subset0").iterdir():
        shutil.copy(file, tmp_path / "seg-lungs-LUNA16")
    assert len(find_cases(tmp_path).cases) == 1
    for file in (tmp_path / "subset0").iterdir():
        shutil.copy(file, file.with_name(f"1.2.4{file.suffix}"))
    assert "1 scans have no annotation (1.2.4) and are left out." in find_cases(tmp_path).notes
    _, mask = found.load(found.cases[0])
    z, y, x = np.indices(SHAPE)
    assert np.array_equal(mask, ((x - 4) * 0.8) ** 2 + ((y - 6) * 0.8) ** 2 + ((z - 2) * 2.0) ** 2 <= 2.1**2) and mask.sum() > 20
    (tmp_path / "annotations.csv").write_text("\n".join(rows) + "\n,,,,\n")
    assert len(find_cases(tmp_path).annotated) == 1
    (tmp_path / "annotations.csv").write_text("\n\n".join(rows[:2]) + "\n1.2.4,1,2,,5\n")
    with pytest.raises(UserError, match=r"annotations.csv, 1\.2\.4,1,2,,5: not a number"):
        find_cases(tmp_path)
    (tmp_path / "annotations.csv").write_text(rows[0] + "\n1.2.3,900,0,0,5\n")
    broken = find_cases(tmp_path)
    with pytest.raises(UserError, match=r"Case 1\.2\.3: an annotation at 900, 0, 0 lies outside"):
        broken.load(broken.cases[0])


# ----------------------------------------------------------------------------------------------------------------- DICOM


def dicom(folder, i, uid, patient):
    folder.mkdir(parents=True)
    image = scan(i)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z, part in enumerate(image.array):
        piece = sitk.GetImageFromArray(part)
        piece.SetSpacing(image.spacing[:2])
        place = "\\".join(f"{v:g}" for v in image.index_to_point((0, 0, z)))
        tags = {"0008|0060": "CT", "0010|0020": patient, "0020|000e": uid, "0020|000d": uid + ".1", "0008|0018": f"{uid}.2.{z}"}
        tags |= {"0020|0032": place, "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0013": str(z), "0018|0050": "2"}
        for key, value in tags.items():
            piece.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{z}.dcm"))
        writer.Execute(piece)


def test_folders_of_slices_with_a_mask_each(tmp_path):
    for i, name in enumerate(NAMES[:2]):
        dicom(tmp_path / "images" / name, i, f"1.2.840.{i + 1}", f"P{i}")
        put(mask_of(i), tmp_path / "labels" / f"{name}.nii.gz")
    exact(find_cases(tmp_path), count=2)
    for name in (".ipynb_checkpoints", "@eaDir"):
        (tmp_path / "images" / name).mkdir()
        (tmp_path / "images" / name / "a.json").write_text("{}")
    assert not any("have no mask" in note for note in find_cases(tmp_path).notes)


def ring(x0, y0, x1, y1):
    """The pixels around a box of pixels, in turn: as LIDC's readers trace the first ones outside a nodule."""
    top, bottom = [(x, y0) for x in range(x0, x1)], [(x, y1) for x in range(x1, x0, -1)]
    return top + [(x1, y) for y in range(y0, y1)] + bottom + [(x0, y) for y in range(y1, y0, -1)]


def test_lidc_xml_is_what_two_readers_agree_on(tmp_path):
    dicom(tmp_path / "LIDC-IDRI-9999" / "ct", 0, "1.2.840.7", "LIDC-IDRI-9999")

    def nodule(points, z, inclusion="TRUE"):
        edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
        return f"<roi><imageZposition>{z}</imageZposition><inclusion>{inclusion}</inclusion>{edges}</roi>"

    def session(*rois):
        return f"<readingSession><unblindedReadNodule><noduleID>1</noduleID>{''.join(rois)}</unblindedReadNodule></readingSession>"

    sessions = [
        session(nodule(ring(1, 1, 7, 8), 9.0), nodule([(3, 3)], 11.0)),
        session(nodule(ring(2, 2, 8, 9), 9.0), nodule(ring(3, 3, 5, 5), 9.0, "FALSE")),
        session(),
    ]
    text = "<ResponseHeader><SeriesInstanceUid>1.2.840.7</SeriesInstanceUid></ResponseHeader>" + "".join(sessions)
    for name in ("1.xml", "copy.xml"):
        (tmp_path / "LIDC-IDRI-9999" / name).write_text(f'<LidcReadMessage xmlns="http://www.nih.gov">{text}</LidcReadMessage>')
    found = find_cases(tmp_path)
    assert found.layout == "lidc" and found.channels == ("CT",)
    assert len(found.cases) == 1 and found.notes[-1] == "1 XML files are copies of another (copy.xml) and are left out."
    image, mask = found.load(found.cases[0])
    assert np.array_equal(image.array, scan(0).array)
    expected = np.zeros(SHAPE, np.uint8)
    expected[2, 3:8, 3:7] = 1
    expected[2, 3:6, 3:6] = 0  # a hole in one of the two, with its edge
    assert np.array_equal(mask, expected)


def test_rtstruct_gives_the_published_mask_voxel_for_voxel(data, tmp_path):
    folder = data / "lung_gtv_dicom_rtstruct"
    found = find_cases(folder)
    assert found.layout == "dicom" and found.channels == ("CT",) and [d.name for d in found.labels] == ["GTV-1"]
    image, mask = found.load(found.cases[0])
    truth = read_image(folder / "pat_3_gtv_expected.nii.gz")
    assert image.same_grid(truth) and mask.sum() == 4047 and np.array_equal(mask, truth.array)
    assert find_cases(folder, only=["gtv 1"]).load(found.cases[0])[1].sum() == 4047  # by name, however it is spelled
    (tmp_path / "x").mkdir()
    for file in (folder / "pat_3").iterdir():
        shutil.copy(file, tmp_path / "x")
    import pydicom

    broken = pydicom.dcmread(tmp_path / "x" / "DCM_RS_00046.dcm")
    del broken.ROIContourSequence[0].ContourSequence[0].ContourGeometricType
    broken.save_as(tmp_path / "x" / "DCM_RS_00046.dcm")
    bad = find_cases(tmp_path)
    with pytest.raises(UserError, match="^Case x: its annotation DCM_RS_00046.dcm is not as its format asks .*export it again"):
        bad.load(bad.cases[0])
    with pytest.raises(UserError, match="There is no label heart; the cases have GTV-1"):
        find_cases(folder, only=["heart"])


@pytest.mark.parametrize("kept", [153, 1000, 40000])
def test_a_structure_set_that_is_cut_short_is_named(data, tmp_path, kept):
    shutil.copytree(data / "lung_gtv_dicom_rtstruct" / "pat_3", tmp_path / "case")
    whole = find_cases(tmp_path)
    file = tmp_path / "case" / "DCM_RS_00046.dcm"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="DCM_RS_00046.dcm is cut short or damaged .*export it again"):
        find_cases(tmp_path)
    with pytest.raises(UserError, match="DCM_RS_00046.dcm .*cut short or damaged"):
        whole.load(whole.cases[0])


def test_contours_with_holes_and_of_other_slices(data, tmp_path):
    import pydicom

    for file in (data / "lung_gtv_dicom_rtstruct" / "pat_3").iterdir():
        shutil.copy(file, tmp_path)
    structure = pydicom.dcmread(tmp_path / "DCM_RS_00046.dcm")
    contours = structure.ROIContourSequence[0].ContourSequence
    for contour in contours:
        contour.ContourGeometricType = "CLOSEDPLANAR_XOR"
    structure.save_as(tmp_path / "DCM_RS_00046.dcm")
    found = find_cases(tmp_path)
    image, mask = found.load(found.cases[0])
    assert mask.sum() == 4047
    for kind, n in (("CLOSED_PLANAR", 4047), ("CLOSEDPLANAR_XOR", 0)):  # some programs export each contour twice
        for contour in contours:
            contour.ContourGeometricType = kind
        structure.ROIContourSequence[0].ContourSequence = [c for contour in contours for c in (contour, contour)]
        structure.save_as(tmp_path / "DCM_RS_00046.dcm")
        assert found.load(found.cases[0])[1].sum() == n
    structure.ROIContourSequence[0].ContourSequence = contours
    for contour in contours:  # drawn on slices that lie between this scan's
        points = np.reshape(np.array(contour.ContourData, float), (-1, 3)) + [0, 0, image.spacing[2] / 2]
        contour.ContourData = [f"{v:.6g}" for v in points.ravel()]
    structure.save_as(tmp_path / "DCM_RS_00046.dcm")
    with pytest.raises(UserError, match="GTV-1 in DCM_RS_00046.dcm do not lie in its scan's slices; resample"):
        found.load(found.cases[0])
    before = found.digest(found.cases[0])
    (tmp_path / ".DS_Store").write_bytes(b"x")  # a look at the folder is no other data
    assert found.digest(found.cases[0]) == before


def test_structures_without_an_outline_are_no_labels(data, tmp_path):
    import pydicom

    shutil.copytree(data / "lung_gtv_dicom_rtstruct" / "pat_3", tmp_path / "case")
    structure = pydicom.dcmread(tmp_path / "case" / "DCM_RS_00046.dcm")
    point = pydicom.Dataset()
    point.ContourGeometricType, point.NumberOfContourPoints, point.ContourData = "POINT", 1, ["0", "0", "0"]
    for number, (name, contours) in enumerate((("gtv 1", []), ("Heart", None), ("Isocentre", [point])), 91):
        roi, outlines = pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName, outlines.ReferencedROINumber = number, name, number
        structure.StructureSetROISequence.append(roi)
        if contours is not None:
            outlines.ContourSequence = contours
            structure.ROIContourSequence.append(outlines)
    structure.save_as(tmp_path / "case" / "DCM_RS_00046.dcm")
    found = find_cases(tmp_path)
    assert [d.name for d in found.labels] == ["GTV-1"] and found.load(found.cases[0])[1].sum() == 4047
    assert "2 structures are outlined in no case (Heart, Isocentre) and are left out." in found.notes


def test_a_series_in_several_folders_is_read_whole_or_refused(data, tmp_path):
    folder = shutil.copytree(data / "lung_gtv_dicom_rtstruct" / "pat_3", tmp_path / "case" / "b")
    (tmp_path / "case" / "a").mkdir()
    half = sorted(folder.glob("DCM_IMG*"))[:20]
    for file in half:  # some are there twice
        shutil.copy(file, tmp_path / "case" / "a")
    found = find_cases(tmp_path)
    assert found.cases[0].name == "case-b" and found.load(found.cases[0])[1].sum() == 4047
    for file in half:
        file.unlink()
    found = find_cases(tmp_path)
    assert len(found.cases) == 1
    with pytest.raises(UserError, match="^Case case: .* in more than one subfolder"):
        found.load(found.cases[0])


def test_contours_of_thicker_slices_are_refused(data, tmp_path):
    import pydicom

    for file in (data / "lung_gtv_dicom_rtstruct" / "pat_3").iterdir():
        shutil.copy(file, tmp_path)
    structure = pydicom.dcmread(tmp_path / "DCM_RS_00046.dcm")
    roi, found = structure.ROIContourSequence[0], find_cases(tmp_path)
    contours = sorted(roi.ContourSequence, key=lambda c: c.ContourData[2])
    roi.ContourSequence = contours[::3]
    structure.save_as(tmp_path / "DCM_RS_00046.dcm")
    with pytest.raises(UserError, match="GTV-1 in DCM_RS_00046.dcm is marked on one slice in 3 only; give the series"):
        found.load(found.cases[0])
    for i, contour in enumerate(contours[:9:3]):  # lesions of one slice each, beside one another
        contour.ContourData = [f"{v:.6g}" for v in (np.reshape(contour.ContourData, (-1, 3)).astype(float) + [40 * i - 40, 0, 0]).ravel()]
    roi.ContourSequence = contours[:9:3]
    structure.save_as(tmp_path / "DCM_RS_00046.dcm")
    assert np.count_nonzero(found.load(found.cases[0])[1].any((1, 2))) == 3


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_dicom_seg_gives_the_mask_that_it_was_made_of(data, tmp_path, kind, monkeypatch):
    highdicom = pytest.importorskip("highdicom", reason="highdicom is not installed")
    import pydicom
    from pydicom.uid import CTImageStorage

    monkeypatch.setattr(highdicom.seg, "SegmentationTypeValues", SimpleNamespace(BINARY=kind))  # what the core writes
    (tmp_path / "case" / "ct").mkdir(parents=True)
    for file in (data / "ct_dicom_jpeg2000").iterdir():
        header = pydicom.dcmread(file)  # de-identified so far that it lacks what a SEG must refer to
        uids = {"SOPClassUID": CTImageStorage, "SOPInstanceUID": f"1.2.826.{header.InstanceNumber}", "SeriesInstanceUID": "1.2.7"}
        for key, value in {**uids, "StudyInstanceUID": "1.2.8", "FrameOfReferenceUID": "1.2.9"}.items():
            header[key].value = header[key].value or value
        header.save_as(tmp_path / "case" / "ct" / f"{file.name[-5:]}.dcm")
    image = read_image(tmp_path / "case" / "ct")
    truth = read_image(data / "ct_dicom_jpeg2000_seg.nii.gz").array
    values = [int(v) for v in np.unique(truth) if v][:3]
    labels = image.like(np.where(np.isin(truth, values), truth, 0).astype(np.uint8))
    defs = tuple(Label(v, f"part {v}", (9, 9, 9), {}) for v in values)
    write_segmentation(Prediction(labels, defs, "m-1", Box.whole(image.shape)), tmp_path / "case" / "seg.dcm", image)
    assert pydicom.dcmread(tmp_path / "case" / "seg.dcm").SegmentationType == kind
    found = find_cases(tmp_path)
    assert found.layout == "dicom" and [d.name for d in found.labels] == [d.name for d in defs] and found.cases[0].name == "case-ct"
    again, mask = found.load(found.cases[0])
    assert np.array_equal(again.array, image.array)
    assert np.array_equal(mask, sum((labels.array == v) * np.uint8(i) for i, v in enumerate(values, 1)))
    assert found.cases[0].patient.startswith("p-")
    labels.array[1::2] = 0  # as if drawn on slices of twice the thickness
    write_segmentation(Prediction(labels, defs, "m-1", Box.whole(image.shape)), tmp_path / "case" / "seg.dcm", image)
    with pytest.raises(UserError, match="in seg.dcm is marked on one slice in 2 only"):
        found.load(found.cases[0])


# -------------------------------------------------------------------------------------------- .seg.nrrd, pictures, values


def test_overlapping_segments_by_name(data, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    shutil.copy(data / "odd_files" / "CTChest4.nrrd", tmp_path / "images" / "x.nrrd")
    shutil.copy(data / "odd_files" / "SegmentationOverlapping.seg.nrrd", tmp_path / "labels" / "x.seg.nrrd")
    found = find_cases(tmp_path)
    assert len(found.labels) == 8 and found.labels[7].name == "overlapping sphere" and found.labels[4].color == (22, 197, 71)
    _, whole = found.load(found.cases[0])
    flat = read_image(data / "odd_files" / "Segmentation.seg.nrrd").array
    sphere = whole == 8
    assert np.array_equal(whole[~sphere], flat[~sphere])
    one = find_cases(tmp_path, only=["left lung", "right lung"], foreground=True)
    assert np.array_equal(one.load(one.cases[0])[1], np.isin(flat, (5, 6)))
    # What lies under the sphere is not lost to whoever asks for the lung alone.
    only = find_cases(tmp_path, only=["left lung", "Right Lung"])
    _, lungs = only.load(only.cases[0])
    assert np.array_equal(lungs, np.select([flat == 6, flat == 5], [1, 2]))


def save_segments(path, **masks):
    """A .seg.nrrd with a layer for each segment."""
    image = sitk.GetImageFromArray(np.stack([*masks.values()], -1).astype(np.uint8), isVector=True)
    image.SetSpacing(scan(0).spacing)
    image.SetOrigin(scan(0).origin)
    for i, name in enumerate(masks):
        for key, value in {"ID": name, "Name": name, "LabelValue": "1", "Layer": str(i), "Color": "1 0 0"}.items():
            image.SetMetaData(f"Segment{i}_{key}", value)
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path), True)


def test_a_label_that_later_ones_would_cover_is_refused(tmp_path):
    organ, tumour = outline(0) > 0, outline(0) == 2
    put(scan(0), tmp_path / "images" / "a.nii.gz")
    save_segments(tmp_path / "labels" / "a.seg.nrrd", tumour=tumour, organ=organ)
    found = find_cases(tmp_path)
    with pytest.raises(UserError, match="^Case a: later labels cover most of tumour, which would be lost; name .* with --only, those"):
        found.load(found.cases[0])
    exact(find_cases(tmp_path, only=["organ", "tumour"]), count=1)
    one = find_cases(tmp_path, foreground=True)
    assert np.array_equal(one.load(one.cases[0])[1], organ)
    gtv, ctv, ptv = (np.pad(np.ones((2, n, n), bool), ((1, SHAPE[0] - 3), (1, SHAPE[1] - 1 - n), (1, SHAPE[2] - 1 - n))) for n in (6, 7, 8))
    save_segments(tmp_path / "labels" / "a.seg.nrrd", PTV=ptv, CTV=ctv, GTV=gtv)
    nested = find_cases(tmp_path)  # a GTV of most of its CTV
    assert np.array_equal(nested.load(nested.cases[0])[1], np.select([gtv, ctv, ptv], [3, 2, 1]))
    save_segments(tmp_path / "labels" / "a.seg.nrrd", both=ctv, one=gtv, rest=ctv & ~gtv)
    gone = find_cases(tmp_path)
    with pytest.raises(UserError, match="later labels cover most of both, which"):
        gone.load(gone.cases[0])
    beside = tumour.copy()
    beside[0, :2] = True  # of 24 voxels 4 lie under the organ
    save_segments(tmp_path / "labels" / "a.seg.nrrd", tumour=beside, organ=organ)
    assert np.array_equal(found.load(found.cases[0])[1], np.select([organ, beside], [2, 1]))


def test_a_mask_by_names_is_another_for_other_labels(tmp_path, monkeypatch):
    """The cache would give what was pre-processed for one as the other. By its digest, though, a run knows the case again."""
    put(scan(0), tmp_path / "images" / "a.nii.gz")
    save_segments(tmp_path / "labels" / "a.seg.nrrd", liver=outline(0) == 1, spleen=outline(0) == 2)
    for part in ("images/a.nii.gz", "labels/a.seg.nrrd"):
        os.utime(tmp_path / part, (1e9, 1e9))  # long ago, so that the digest is remembered
    sets = [find_cases(tmp_path, only=only) for only in (["liver"], ["spleen"], ["liver", "spleen"], ["spleen", "liver"])]
    hashes = prepare._Hashes(tmp_path / "hashes.json")
    for _ in range(2):
        assert {hashes.of(s, s.cases[0]) for s in sets} == {sets[0].digest(sets[0].cases[0])}
    monkeypatch.setattr(prepare, "_settings", lambda config: {})
    monkeypatch.setattr(prepare, "_open", lambda path, wanted, *rest: wanted)
    assert len({prepare.prepare(s, SimpleNamespace(labels=()), tmp_path / "cache")[0] for s in sets}) == 4


def test_names_in_any_script_are_labels_of_their_own(tmp_path):
    image, mask = scan(0), outline(0)
    put(image, tmp_path / "images" / "a.nii.gz")
    (tmp_path / "labels").mkdir()

    def save(*names):
        defs = tuple(Label(i, name, (i, i, i), {}) for i, name in enumerate(names, 1))
        write_segmentation(Prediction(image.like(mask), defs, "m-1", Box.whole(SHAPE)), tmp_path / "labels" / "a.seg.nrrd")

    save("肿瘤", "肝脏")
    exact(find_cases(tmp_path), count=1)
    assert [label.name for label in find_cases(tmp_path, only=["肝脏"]).labels] == ["肝脏"]
    save("CD3", "CD3+")
    exact(find_cases(tmp_path), count=1)
    save("GTV-1", "gtv 1")
    with pytest.raises(UserError, match=r"a.seg.nrrd has the labels 'GTV-1' and 'gtv 1', which are too alike; rename one"):
        find_cases(tmp_path)


def test_a_cropped_segmentation_with_other_values_finds_its_place(tmp_path):
    image, mask = scan(0), outline(0, (7, 40))
    box = Box.around(mask)
    defs = (Label(7, "organ", (1, 1, 1), {}), Label(40, "tumour", (2, 2, 2), {}))
    part = image.like(mask).crop(box)
    put(image, tmp_path / "images" / "a.nii.gz")
    (tmp_path / "labels").mkdir()
    write_segmentation(Prediction(part, defs, "m-1", Box.whole(part.shape)), tmp_path / "labels" / "a.seg.nrrd")
    exact(find_cases(tmp_path), count=1)


def test_a_segmentation_beside_its_image_teaches_no_background(tmp_path):
    image, mask = scan(0), outline(0)
    put(image, tmp_path / "images" / "a.nii.gz")
    (tmp_path / "labels").mkdir()
    defs = (Label(1, "organ", (1, 1, 1), {}), Label(2, "tumour", (2, 2, 2), {}))
    for shift, fits in ((0.3, True), (4.0, False), (500.0, False)):
        part = scan(0, shift).like(mask).crop(Box.around(mask))
        write_segmentation(Prediction(part, defs, "m-1", Box.whole(part.shape)), tmp_path / "labels" / "a.seg.nrrd")
        found = find_cases(tmp_path)
        if fits:
            exact(found, count=1)
        else:
            with pytest.raises(Mismatch, match=r"Case a: a.seg.nrrd reaches \d+\.\d voxels beyond its image; give"):
                found.load(found.cases[0])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_pictures_with_masks_of_0_and_255(tmp_path, suffix):
    grey = np.random.default_rng(0).integers(0, 255, (20, 30)).astype(np.uint8)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 3:21] = 255  # not of whole blocks of 8 pixels: a JPEG rings at its edge
    for name, pixels in (("grey", np.stack([grey] * 3, -1)), ("other", np.stack([grey[::-1]] * 3, -1))):
        for folder, picture in (("images", pixels), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(picture, isVector=picture.ndim == 3), str(tmp_path / folder / f"{name}{suffix}"))
    found = find_cases(tmp_path)
    image, labels = found.load(found.cases[0])
    assert found.channels == ("image",) and image.array.shape == (1, 20, 30) and np.array_equal(labels[0], mask // 255)
    colour = np.stack([grey, grey, grey[:, ::-1]], -1)
    sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(tmp_path / "images" / f"grey{suffix}"))
    found = find_cases(tmp_path)
    assert found.channels == ("red", "green", "blue") and found.load(found.cases[0])[0].array.shape == (3, 1, 20, 30)


@pytest.mark.parametrize(("turn", "mask", "refused"), [(3, (30, 20), True), (6, (20, 30), True), (6, (30, 20), False)])
def test_masks_of_pictures_that_some_programs_turn_are_refused_where_they_may_be_turned(tmp_path, turn, mask, refused):
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    exif = picture.Exif()
    exif[274] = turn
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    picture.new("L", (30, 20), 90).save(tmp_path / "images" / "a.jpg", exif=exif)
    picture.new("L", mask, 255).save(tmp_path / "masks" / "a.png")
    found = find_cases(tmp_path)
    if refused:
        with pytest.raises(Mismatch, match=rf"Case a: a.jpg is marked as turned \(EXIF orientation {turn}\), .*; save it upright"):
            found.load(found.cases[0])
    else:
        assert found.load(found.cases[0])[1].all()


def test_jpegs_of_several_labels_are_refused_and_small_ones_of_one_are_not(tmp_path):
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    two = np.zeros((64, 64), np.uint8)
    two[9:23, 8:25], two[32:56, 33:56] = 100, 200
    dots = np.zeros((8, 64, 64), np.uint8)
    for i, dot in enumerate(dots):
        dot[20 + 3 * i :][:3, 40 - 5 * i :][:, :3] = 255
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for quality in (30, 50, 75, 95):  # of 50, most of the dots are grey
        for masks, several in ((dots, False), ([np.where(two == 200, two, 0)] * 8, False), ([two] * 8, True)):
            for i, mask in enumerate(masks):
                picture.fromarray(two[::-1] + np.uint8(i)).save(tmp_path / "images" / f"{i}.png")
                picture.fromarray(mask).save(tmp_path / "masks" / f"{i}.jpg", quality=quality)
            for foreground in (False, True):
                if several:
                    with pytest.raises(UserError, match=r"JPEGs of several greys \(as .*0.jpg\), which JPEG blurs; save them as PNG"):
                        find_cases(tmp_path, foreground=foreground)
                else:
                    found = find_cases(tmp_path, foreground=foreground)
                    assert np.array_equal(found.load(found.cases[0])[1][0], masks[0] // masks[0].max())


def test_jpegs_of_one_label_may_have_soft_edges_and_other_whites_and_greys_that_become_one(tmp_path):
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    radius = np.hypot(*(np.indices((256, 256)) - 128))

    def save(*masks):
        for i, mask in enumerate(masks):
            picture.fromarray(np.full((256, 256), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
            picture.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / f"{i}.jpg", quality=90)

    save(*(255 * np.clip((80 + i - radius) / 40, 0, 1) for i in range(4)))  # 6 grey values a pixel, which is flat
    assert find_cases(tmp_path).values == {255: 1}
    save(*(np.where(radius < 40, white, 0) for white in (255, 200, 255, 200)))
    assert find_cases(tmp_path).values == {255: 1}
    save(*[np.select([radius < 20, radius < 40], [160, 240])] * 4)
    with pytest.raises(UserError, match="JPEGs of several greys"):
        find_cases(tmp_path)
    found = find_cases(tmp_path, foreground=True)  # both are white, and become one
    assert np.count_nonzero(found.load(found.cases[0])[1][0] != (radius < 40)) < 50


def test_a_mask_with_a_palette_holds_the_palettes_numbers(tmp_path):
    """As PASCAL VOC's, whose colours are for the eye; SimpleITK reads the colours."""
    Picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    array = np.arange(12 * 10).reshape(12, 10).astype(np.uint8) % 3
    for name in NAMES:
        for part in ("images", "masks"):
            (tmp_path / part).mkdir(exist_ok=True)
        Picture.fromarray(array * 100).save(tmp_path / "images" / f"{name}.png")
        mask = Picture.frombytes("P", (10, 12), array.tobytes())
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        mask.save(tmp_path / "masks" / f"{name}.png")
    found = find_cases(tmp_path)
    assert found.values == {1: 1, 2: 2} and np.array_equal(found.load(found.cases[0])[1][0], array)


@pytest.mark.parametrize(
    ("palette", "values"),
    [([0, 0, 0, 255, 255, 255, 255, 0, 0], {1: 1, 2: 2}), ([255, 255, 255, 0, 0, 0], {255: 1})],
)
def test_a_palette_is_read_alike_whichever_classes_a_mask_holds(tmp_path, palette, values):
    """White looks grey, also where the palette has red too; in one that is all grey the greys count, in any order."""
    Picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for i, name in enumerate(NAMES):
        array = np.arange(12 * 10).reshape(12, 10).astype(np.uint8) % (3 if i and 2 in values else 2)
        for part in ("images", "masks"):
            (tmp_path / part).mkdir(exist_ok=True)
        Picture.fromarray(array * 100).save(tmp_path / "images" / f"{name}.png")
        mask = Picture.frombytes("P", (10, 12), array.tobytes())
        mask.putpalette(palette)
        mask.save(tmp_path / "masks" / f"{name}.png")
    found = find_cases(tmp_path)
    assert found.values == values
    assert np.array_equal(found.load(found.cases[0])[1][0], np.arange(120).reshape(12, 10) % 2 == (2 in values))


def test_masks_of_0_and_1_beside_masks_of_0_and_255_are_of_one_label(tmp_path):
    square = np.zeros((20, 30), np.uint8)
    square[8:16, 8:24] = 1
    soft = np.zeros((20, 30), np.uint8)
    soft[4:14] = np.linspace(0, 255, 300).reshape(10, 30)

    def save(**masks):
        for name, mask in masks.items():
            for folder, picture in (("images", square * 9), ("masks", mask)):
                (tmp_path / folder).mkdir(exist_ok=True)
                sitk.WriteImage(sitk.GetImageFromArray(picture), str(tmp_path / folder / f"{name}.png"))

    save(a=square, b=square * 255)
    found = find_cases(tmp_path)
    assert [label.name for label in found.labels] == ["foreground"] and any("all are taken as one label" in n for n in found.notes)
    assert all(np.array_equal(found.load(c)[1][0], square) for c in found.cases)
    save(c=np.where(square, np.tile(np.array([1, 255], np.uint8), (20, 15)), 0).astype(np.uint8))
    assert len(find_cases(tmp_path).labels) == 2  # where one mask holds both, they are two
    save(c=soft)
    with pytest.raises(UserError, match=r"c\.png has 256 grey values; save it as 0 and 255, or use --foreground"):
        find_cases(tmp_path)
    one = find_cases(tmp_path, foreground=True)
    assert np.array_equal(one.load(one.cases[2])[1][0], soft > 0)


def test_soft_edges_of_few_greys_are_no_labels(tmp_path):
    disc = np.hypot(*(np.indices((80, 96)) - 40)) < 25
    soft = (disc.reshape(40, 2, 48, 2).mean((1, 3)) * 255).astype(np.uint8)
    assert {64 - 1, 127, 191, 255} <= set(np.unique(soft))

    def save(mask):
        for folder, picture in (("images", soft), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(picture), str(tmp_path / folder / "a.png"))

    save(soft)
    with pytest.raises(UserError, match=r"a\.png has 5 grey values; save it as 0 and 255, .* classes, name them in labels\.json"):
        find_cases(tmp_path)
    assert len(find_cases(tmp_path, foreground=True).labels) == 1
    soft[2:6, 2:6] = 63
    save(soft)
    assert len(find_cases(tmp_path).labels) == 4  # where a grey fills a place it is one
    dots = np.zeros_like(soft)
    for k, value in enumerate((64, 128, 192, 255)):
        dots[10 * k : 10 * k + 2, 2::5] = value
    save(dots)
    assert len(find_cases(tmp_path).labels) == 4  # or where they lie apart


def test_instances_become_one_label(tmp_path, monkeypatch):
    monkeypatch.setattr("unetseg_training.cases.SCANNED", 3)
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(5):  # cells that no other mask numbers so
        cells = np.arange(400, dtype=np.uint16).reshape(1, 20, 20) + np.uint16(400 * i)
        sitk.WriteImage(sitk.GetImageFromArray(rng.integers(0, 200, (1, 20, 20), np.uint8)), str(tmp_path / "images" / f"c{i:02}.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(cells), str(tmp_path / "labels" / f"c{i:02}.nii.gz"))
    with pytest.raises(UserError, match="instances and not labels; use --foreground"):
        find_cases(tmp_path)
    one = find_cases(tmp_path, foreground=True)
    assert [label.name for label in one.labels] == ["foreground"]
    assert [int(one.load(c)[1].sum()) for c in one.cases] == [399, 400, 400, 400, 400]


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_one_class_a_channel_is_no_label_map(pairs, classes):
    """The channel of the background would be learnt as the label."""
    for i, name in enumerate(NAMES):
        one_hot = sitk.GetImageFromArray(np.stack([outline(i) == k for k in range(classes)]).astype(np.uint8), isVector=False)
        sitk.WriteImage(one_hot, str(pairs / "labels" / f"{name}.nii.gz"))
    with pytest.raises(UserError, match=f"holds {classes} channels; save one label map"):
        find_cases(pairs)


def test_pictures_that_are_numbered_from_0_are_no_channels(tmp_path):
    rng = np.random.default_rng(0)
    for folder, name in (("images", "frame_{:04d}"), ("masks", "frame_{:04d}"), ("", "a_{:04d}"), ("", "a_{:04d}_mask")):
        (tmp_path / folder).mkdir(exist_ok=True)
        for i in range(4):
            picture = rng.integers(0, 2 if "mask" in folder + name else 255, (9, 9)).astype(np.uint8)
            sitk.WriteImage(sitk.GetImageFromArray(picture), str(tmp_path / folder / f"{name.format(i)}.png"))
    assert [c.name for c in find_cases(tmp_path).cases] == [f"frame_{i:04d}" for i in range(4)]
    shutil.rmtree(tmp_path / "images")
    assert [c.name for c in find_cases(tmp_path).cases] == [f"a_{i:04d}" for i in range(4)]


def test_what_has_no_partner_is_told(tmp_path):
    for i, name in enumerate(NAMES):
        put(scan(i), tmp_path / f"{name}.nii.gz")
        put(mask_of(i), tmp_path / (f"{name}_seg.nii.gz" if i else "A_seg.nii.gz"))
    (tmp_path / "._labels.json").write_bytes(b"\0\5\x16\7\xff")
    found = find_cases(tmp_path)
    assert [c.name for c in found.cases] == ["b", "c"]
    assert found.notes[:2] == (
        "1 images have no mask (a) and are left out.",
        "1 masks have no image of their own (A_seg.nii.gz) and are left out.",
    )


def test_real_pictures(data):
    found = find_cases(data / "sunnybrook")
    assert len(found.cases) == 55 and len({c.patient for c in found.cases}) == 13 and found.channels == ("image",)
    image, mask = found.load(found.cases[0])
    assert image.array.shape == (1, 256, 256) and set(np.unique(mask)) == {0, 1} and mask.sum() == 587
    eyes = find_cases(data / "chase_db1")
    assert len(eyes.cases) == 20 and len({c.patient for c in eyes.cases}) == 10 and eyes.channels == ("red", "green", "blue")
    assert eyes.load(eyes.cases[0])[1].sum() == 66885


def test_real_volumes(data):
    found = find_cases(data / "lidc_nodules")
    assert len(found.cases) == 779 and len({c.patient for c in found.cases}) == 435 and found.channels == ("CT",)
    assert found.load(found.cases[0])[1].sum() == 6547
    hippocampi = find_cases(data / "msd_hippocampus")
    assert len(hippocampi.cases) == 189 and len(hippocampi.labels) == 2
    one = find_cases(data / "msd_hippocampus", foreground=True)
    both, merged = hippocampi.load(hippocampi.cases[0])[1], one.load(one.cases[0])[1]
    assert len(one.labels) == 1 and np.array_equal(merged, both > 0)


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def pairs(tmp_path):
    for i, name in enumerate(NAMES):
        put(scan(i), tmp_path / "images" / f"{name}.nii.gz")
        put(mask_of(i), tmp_path / "labels" / f"{name}.nii.gz")
    return tmp_path


def test_a_mask_that_does_not_fit_names_its_case_and_the_cure(pairs):
    put(scan(0, shift=3.0).like(outline(0)), pairs / "labels" / "a.nii.gz")
    put(Image(outline(1)[:4], (0.8, 0.8, 2.0)), pairs / "labels" / "b.nii.gz")
    put(scan(2, shift=0.05).like(outline(2)), pairs / "labels" / "c.nii.gz")  # a header's rounding
    found = find_cases(pairs)
    with pytest.raises(Mismatch, match=r"^Case a: its mask a.nii.gz lies up to 3.00 mm beside its image .*; resample it"):
        found.load(found.cases[0])
    with pytest.raises(Mismatch, match="^Case b: its mask b.nii.gz has 10 x 12 x 4 voxels and its image 10 x 12 x 5; resample"):
        found.load(found.cases[1])
    assert np.array_equal(found.load(found.cases[2])[1], outline(2))


def test_an_unknown_label_names_its_case(pairs):
    found = find_cases(pairs)
    put(mask_of(1, (1, 6)), pairs / "labels" / "b.nii.gz")
    with pytest.raises(UnknownLabel, match=r"^Case b: its mask b.nii.gz holds the unknown label 6 \(known: 1 label 1, 2 label 2\)"):
        found.load(found.cases[1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: shutil.rmtree(p / "labels"), "holds no annotated cases"),
        (lambda p: put(mask_of(0), p / "labels" / "d.nii.gz"), "d.nii.gz has no image of its name"),
        (
            lambda p: [put(scan(i).like(np.zeros(SHAPE, np.uint8)), p / "labels" / f"{n}.nii.gz") for i, n in enumerate(NAMES)],
            "All masks are empty",
        ),
        (lambda p: put(scan(0), p / "images" / "a.nrrd"), "have the same name"),
        (lambda p: (p / "dataset.json").write_text("{"), "is not JSON"),
    ],
)
def test_bad_folders_are_one_sentence(pairs, spoil, said):
    spoil(pairs)
    with pytest.raises(UserError, match=said) as e:
        find_cases(pairs)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: put(scan(0).like(outline(0) * np.float32(0.3)), p), "not whole; it is no label map"),
        (lambda p: put(scan(0), p), "holds the negative value"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.unlink(), "does not exist"),
    ],
)
def test_a_bad_mask_is_its_own_cases_affair(pairs, spoil, said):
    found = find_cases(pairs)
    spoil(pairs / "labels" / "a.nii.gz")
    with pytest.raises(UserError, match=f"^Case a: .*{said}"):
        found.load(found.cases[0])
    if (pairs / "labels" / "a.nii.gz").exists():  # and does not keep the others from being found
        assert len(find_cases(pairs).labels) == 2


def test_what_else_lies_in_the_folder_does_not_refuse_it(pairs):
    (pairs / "a.json").write_bytes('{"InstitutionName": "Klinikum München"}'.encode("latin-1"))
    exact(find_cases(pairs))
    (pairs / "list.json").write_text('{"training": [{"image": "images/a.nii.gz"},]}')  # but this was to be the list
    with pytest.raises(UserError, match="list.json is not JSON"):
        find_cases(pairs)


def test_a_damaged_segmentation_is_its_own_cases_affair(pairs):
    for i, name in enumerate(NAMES):
        (pairs / "labels" / f"{name}.nii.gz").unlink()
        defs = (Label(1, "organ", (1, 1, 1), {}), Label(2, "tumour", (2, 2, 2), {}))
        whole = Prediction(mask_of(i), defs, "m-1", Box.whole(SHAPE))
        write_segmentation(whole, pairs / "labels" / f"{name}.seg.nrrd")
    put(scan(1).like(np.zeros(SHAPE, np.uint8)), pairs / "labels" / "b.seg.nrrd")  # no segments
    (pairs / "labels" / "c.seg.nrrd").write_bytes(b"NRRD0004\nx")
    found = find_cases(pairs)
    assert [label.name for label in found.labels] == ["organ", "tumour"]
    exact(found.subset(found.cases[:1]), count=1)
    for case in found.cases[1:]:
        with pytest.raises(UserError, match=f"^Case {case.name}: "):
            found.load(case)
    put(scan(0), pairs / "labels" / "a.seg.nrrd")
    with pytest.raises(UserError, match="seg.nrrd"):
        find_cases(pairs)


def test_wrong_names_are_sentences(tmp_path, pairs):
    twice = find_cases(pairs, only=["label 2", "Label-2"])  # named twice, it is one label
    assert [label.value for label in twice.labels] == [1] and twice.values == {1: 0, 2: 1}
    with pytest.raises(UserError, match="does not exist"):
        find_cases(tmp_path / "gone")
    with pytest.raises(UserError, match="no known layout; choose one of unetseg, nnunet"):
        find_cases(pairs, "files")
    with pytest.raises(UserError, match="holds no annotated cases in the layout luna16"):
        find_cases(pairs, "luna16")
    with pytest.raises(UserError, match="no regular expression"):
        find_cases(pairs, patient="(")
    with pytest.raises(UserError, match=r"'patient\(.*\)' fits the name of no case, as a; correct --patient"):
        find_cases(pairs, patient=r"patient(\d)")


# ---------------------------------------------------------------------------------------------------------- folds, filling


def test_folds_keep_patients_together_and_are_fixed(data):
    cases = [Case(f"c{i}", f"p{i // 3}", (), None) for i in range(30)]
    dealt = folds(cases, 5, seed=1)
    assert [len({f for c, f in zip(cases, dealt) if c.patient == f"p{p}"}) for p in range(10)] == [1] * 10
    assert sorted({f: dealt.count(f) for f in dealt}.values()) == [6] * 5 and dealt == folds(cases[::-1], 5, seed=1)[::-1]
    with pytest.raises(UserError, match="10 patients cannot be dealt into 11 folds"):
        folds(cases, 11)
    # Cards' figures are of a fold: it must never be dealt anew.
    nodules = find_cases(data / "lidc_nodules").cases
    held_out = sorted({c.patient for c, fold in zip(nodules, folds(nodules, 5)) if fold == 0})
    assert (len(held_out), held_out[:3]) == (87, ["LIDC-IDRI-0001", "LIDC-IDRI-0006", "LIDC-IDRI-0012"])


def test_a_fold_of_empty_masks_gets_a_marked_patient_and_others_stay():
    cases = [Case(f"c{i}", f"p{i}", (), None) for i in range(9)]
    before = folds(cases, 3)
    full = {i for i in range(9) if before[i] != 1} | {before.index(1)}
    assert folds(cases, 3, marked=lambda c: int(c.name[1:]) in full) == before
    for some in (full - {before.index(1)}, {i for i in range(9) if before[i] == 0}):
        after = folds(cases, 3, marked=lambda c, some=some: int(c.name[1:]) in some)
        assert {after[i] for i in some} == {0, 1, 2} and sorted(after) == sorted(before)
        assert sum(a != b for a, b in zip(after, before)) == 2 * len({0, 1, 2} - {before[i] for i in some})
    assert folds(cases, 3, marked=lambda c: False) == before


def test_patients_of_names_and_of_a_pattern(pairs):
    assert [c.patient for c in find_cases(pairs, patient="([ab]|c)").cases] == ["a", "b", "c"]
    assert len({c.patient for c in find_cases(pairs, patient="[a-c]()").cases}) == 1
    (pairs / "patients.csv").write_text("case,patient\na,x\nb,x\nc,y\n")
    assert [c.patient for c in find_cases(pairs).cases] == ["x", "x", "y"]
    for pattern in ("c", "(c)|a|b"):  # fits no other, or without its group
        some = find_cases(pairs, patient=pattern)
        assert [c.patient for c in some.cases] == ["x", "x", "c"]
        assert some.notes[-1] == f"The pattern {pattern!r} decides the patient of 1 of 3 cases; the others, as a, keep theirs."
    assert find_cases(pairs, patient=".").notes[-1] == "The pattern '.' decides the patient of 3 of 3 cases."


@pytest.mark.parametrize(
    "rows",
    [
        b"case,patient\na,X\nb,X\nc,Y\n",
        b"Case,Patient\na,X\nb,X \nc,Y\n",
        b"case, patient\na, X\nb , X\nc, Y\n",
        b"\xef\xbb\xbfcase;patient\na;X\nb;X\nc;Y\n",
        "case,patient,clinic\na,X,Köln\nb,X,\nc,Y,\n".encode("cp1252"),
        "case\tpatient\r\na\tX\r\nb\tX\r\nc\tY\r\n\t\r\n".encode("utf-16"),
        b"file\tpatient\r\nimages\\a.nii.gz\tX\r\nimages\\b.nii.gz\tX\r\nimages\\c.nii.gz\tY\r\n",
    ],
)
def test_a_table_of_patients_as_spreadsheets_save_it(pairs, rows):
    (pairs / "patients.csv").write_bytes(rows)
    assert [c.patient for c in find_cases(pairs).cases] == ["X", "X", "Y"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_names_and_splits_as_windows_saves_them(pairs, encoding):
    (pairs / "labels.txt").write_text('1 255 0 0 1 1 1 "Tumör"\n2 0 255 0 1 1 1 "Leber"\n', encoding)
    assert [label.name for label in find_cases(pairs).labels] == ["Tumör", "Leber"]
    for part in ("images", "labels"):
        (pairs / part).rename(pairs / f"{part}Tr")
    for name in NAMES:
        (pairs / "imagesTr" / f"{name}.nii.gz").rename(pairs / "imagesTr" / f"{name}_0000.nii.gz")
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "Tumör": 1, "Leber": 2}, "numTraining": 3}
    (pairs / "dataset.json").write_text(json.dumps(about, ensure_ascii=False), encoding)
    (pairs / "splits_final.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}]), encoding)
    found = find_cases(pairs)
    assert found.layout == "nnunet" and [label.name for label in found.labels] == ["Tumör", "Leber"]
    assert [c.split for c in found.cases] == ["train", "train", "validation"]


@pytest.mark.parametrize("encoding", ["cp1250", "cp1252", "cp932"])
def test_names_in_a_code_page_are_refused(pairs, encoding):
    """Nothing says in which: Wątroba in Polish became W¹troba."""
    name = "肝臓" if encoding == "cp932" else "Tumör"
    for file, text in (("labels.txt", f'1 255 0 0 1 1 1 "{name}"\n'), ("labels.json", f'{{"{name}": 1}}')):
        (pairs / file).write_text(text, encoding)
        with pytest.raises(UserError, match=f"{file} is not in UTF-8, so that its names cannot be read; save it as UTF-8"):
            find_cases(pairs)


def test_a_table_without_patients_is_told(pairs):
    (pairs / "index.csv").write_text("case,age\na,50\n")
    (pairs / "patients.csv").write_text("patient,age,sex\nX,60,M\nY,55,F\n")  # clinical, not of the cases
    notes = find_cases(pairs).notes
    for name in ("index.csv", "patients.csv"):
        assert any(f'{name} lacks a column "case" (or "file") or a column "patient", and is not read' in note for note in notes)
    (pairs / "patients.csv").write_text("case,person\na,X\nb,X\nc,Y\n")
    with pytest.raises(UserError, match='patients.csv lacks a column "patient"; name its column so, lest folds .*, or put the table elsew'):
        find_cases(pairs)


def test_a_table_that_misses_a_case_does_not_let_folds_leak(pairs):
    (pairs / "patients.csv").write_text("case,patient\na,X\nb,X\n")
    with pytest.raises(UserError, match="patients.csv names no patient of c; give each case its line"):
        find_cases(pairs)


def test_a_digest_changes_with_the_voxels(pairs):
    found = find_cases(pairs)
    before = [found.digest(c) for c in found.cases]
    assert len(set(before)) == 3
    put(mask_of(5), pairs / "labels" / "a.nii.gz")
    after = [found.digest(c) for c in found.cases]
    assert after[0] != before[0] and after[1:] == before[1:]
    assert isinstance(found, CaseSet) and found.subset(found.cases[:1]).cases == found.cases[:1]


def test_pictures_that_were_read_with_their_prints_size_are_others(tmp_path, monkeypatch):
    """A cache or a run of an earlier version has them on another scale."""
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for name, how in (("a.jpg", {}), ("b.jpg", {"dpi": (72, 72)}), ("c.tif", {"dpi": (72, 72)}), ("d.tif", {"dpi": (50800, 50800)})):
        picture.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "images" / name, **how)
        picture.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "labels" / f"{name[0]}.png")
    found = find_cases(tmp_path)
    now = [found.digest(case) for case in found.cases]
    monkeypatch.setattr("unetseg_training.cases.print_spacing", lambda path: None)
    assert [found.digest(case) != d for case, d in zip(found.cases, now)] == [False, True, True, False]


@pytest.mark.parametrize("spacing", [1.0, 25.4 / 72])
def test_a_pictures_mask_may_lie_as_slicer_shows_the_picture(tmp_path, spacing):
    """Which takes the size of its print for mm; so do label maps that unetseg writes of it."""
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    picture.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "images" / "a.jpg", dpi=(72, 72))
    mask = sitk.GetImageFromArray(np.eye(8, dtype=np.uint8)[None])
    mask.SetSpacing((spacing, spacing, 1.0))
    sitk.WriteImage(mask, str(tmp_path / "labels" / "a.nii.gz"))
    found = find_cases(tmp_path)
    assert np.array_equal(found.load(found.cases[0])[1][0], np.eye(8))


def test_a_digest_of_files_that_are_missing_or_lie_beside_their_header(pairs):
    for name, suffix in (("a", ".mhd"), ("b", ".nhdr")):
        mask = sitk.ReadImage(str(pairs / "labels" / f"{name}.nii.gz"))
        (pairs / "labels" / f"{name}.nii.gz").unlink()
        sitk.WriteImage(mask, str(pairs / "labels" / f"{name}{suffix}"))
    found = find_cases(pairs)
    exact(found)
    before = [found.digest(c) for c in found.cases]
    for raw in pairs.glob("labels/*.raw"):
        raw.write_bytes(raw.read_bytes()[::-1])
    assert [found.digest(c) != d for c, d in zip(found.cases, before)] == [True, True, False]
    (pairs / "images" / "c.nii.gz").unlink()
    with pytest.raises(UserError, match=r"^Case c: .*c.nii.gz cannot be read \(No such file or directory\); put it back"):
        found.digest(found.cases[2])
    (pairs / "x.nhdr").write_text("NRRD0004\nencoding: raw\ndata file: slice %02d.raw 8 10 2\n")
    (pairs / "x.mhd").write_text("NDims = 3\nElementDataFile = LIST\none.raw\ntwo.raw\n")
    assert [f.name for f in files(pairs / "x.nhdr")] == ["x.nhdr", "slice 08.raw", "slice 10.raw"]
    assert [f.name for f in files(pairs / "x.mhd")] == ["x.mhd", "one.raw", "two.raw"]


def test_polygons_hold_the_pixels_whose_centres_they_hold():
    path = pytest.importorskip("matplotlib.path", reason="matplotlib is not installed")
    rng = np.random.default_rng(0)
    for _ in range(10):
        turn = np.sort(rng.uniform(0, 2 * np.pi, 15))
        polygon = np.stack([20 + 12 * np.cos(turn) * rng.uniform(0.3, 1.2, 15), 15 + 12 * np.sin(turn)], 1)
        y, x = np.indices((30, 40))
        inside = path.Path(polygon).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(30, 40)
        assert np.array_equal(fill([polygon], (30, 40)), inside)
    outer, inner = np.array([(1, 1), (9, 1), (9, 9), (1, 9)]) - 0.5, np.array([(3, 3), (5, 3), (5, 5), (3, 5)]) - 0.5
    hole = fill([outer, inner], (12, 12))
    assert hole.sum() == 64 - 4 and not hole[3:5, 3:5].any() and fill([outer + 100], (12, 12)).sum() == 0
