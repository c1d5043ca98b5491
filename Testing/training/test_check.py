"""The check finds each kind of mistake, names its case and the cure, and says nothing of sound data."""

import json
import re
import shutil

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from unetseg_training import check as module
from unetseg_training.cases import find_cases, numbered_instances
from unetseg_training.check import check, run
from unetseg_training.plan import plan
from UNetSegmentationLib.dataset import Dataset
from UNetSegmentationLib.files import UserError
from UNetSegmentationLib.image import Image, read_image, write_image
from UNetSegmentationLib.model import Label

SHAPE = (6, 20, 18)


def scan(i, dtype=np.int16):
    array = np.random.default_rng(i).normal(-700, 60, SHAPE)
    array[1:5, 5:13, 5:12] += 700
    return Image(array.astype(dtype), (0.8, 0.8, 2.0))


def outline(second=True):
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:5, 5:13, 5:12] = 1
    if second:
        mask[2:4, 6:9, 6:9] = 2
    return mask


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        for part, image in (("images", scan(i)), ("labels", scan(i).like(outline()))):
            (tmp_path / "set" / part).mkdir(parents=True, exist_ok=True)
            write_image(image, tmp_path / "set" / part / f"c{i}.nii.gz")
    return tmp_path / "set"


def put(folder, name, image=None, mask=None):
    if image is not None:
        write_image(image, folder / "images" / f"{name}.nii.gz")
    if mask is not None:
        grid = mask if isinstance(mask, Image) else (image or scan(0)).like(mask)
        write_image(grid, folder / "labels" / f"{name}.nii.gz")


def found(folder, **how):
    """{(case, kind): finding}"""
    findings = check(find_cases(folder, **how)).findings
    return {(f.case, f.kind): f for f in findings}


def test_nothing_is_said_of_sound_cases(folder):
    report = check(find_cases(folder))
    assert report.findings == [] and not report.bad and "nothing was found" in report.table()
    assert report.data()["labels"][1] == {"value": 2, "name": "label 2", "cases": 10, "median_voxels": 18, "median_ml": 0.02304}


def moved(image, mm):
    return Image(image.array, image.spacing, (mm, 0.0, 0.0))


speck = outline()
speck[0, 0, 0] = 1
WRONG = {
    "geometry": (lambda f: put(f, "c3", mask=moved(scan(0).like(outline()), 7.0)), "error", "lies up to 7.00 mm beside", "resample"),
    "size": (
        lambda f: put(f, "c3", mask=scan(0).like((scan(3).array > -9999) * np.uint8(2))),
        "warning",
        "has 2.76 ml, the others",
        "marked twice",
    ),
    "empty": (lambda f: put(f, "c3", mask=np.zeros(SHAPE, np.uint8)), "warning", "its mask is empty", "mark something"),
    "duplicate": (lambda f: put(f, "c3", scan(1), outline(False)), "error", "the same voxels as c1, with another mask", "merge the masks"),
    "leak": (lambda f: put(f, "c3", scan(1)), "error", "has the voxels of c1 but counts as another patient", "give both the same patient"),
    "intensity": (lambda f: put(f, "c3", scan(3).like(scan(3).array + np.int16(3000))), "warning", "(", "check its units"),
    "constant": (lambda f: put(f, "c3", scan(3).like(np.full(SHAPE, 7, np.int16))), "error", "is 7 everywhere", "export it again"),
    "leftover": (lambda f: put(f, "c3", mask=speck), "warning", "1 islet of at most 3 voxels", "erase what is left over"),
    "spacing": (
        lambda f: put(f, "c3", Image(scan(3).array, (0.8, 0.8, 9.0)), outline()),
        "warning",
        "spacing in z is 9 mm",
        "check its header",
    ),
    "slice": (
        lambda f: put(f, "c3", Image(scan(3).array[2:3], scan(3).spacing), outline()[2:3]),
        "warning",
        "a single slice among volumes",
        "its whole volume",
    ),
    "unreadable": (
        lambda f: (f / "images" / "c3.nii.gz").write_bytes(b"x" * 400),
        "error",
        "cannot be read as an image",
        "complete image file",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_mistake_is_found_with_its_case_and_cure(folder, kind):
    spoil, level, text, cure = WRONG[kind]
    spoil(folder)
    f = found(folder)[("c3", kind)]
    assert f.level == level and text in f.text and cure in f.cure and "\n" not in str(f)


def test_an_unknown_label_is_found_among_many_cases(folder, monkeypatch):
    monkeypatch.setattr("unetseg_training.cases.SCANNED", 2)  # so that finding the cases does not see it
    put(folder, "c3", mask=np.where(outline() == 2, 9, outline()).astype(np.uint8))
    f = found(folder)[("c3", "label")]
    assert f.level == "error" and "the unknown label 9 (known: 1 label 1, 2 label 2)" in f.text


def test_a_mirrored_copy_is_suspected(folder):
    put(folder, "c3", scan(1).like(scan(1).array[:, ::-1].copy()))
    assert "may be c1 turned or mirrored" in found(folder)[("c3", "duplicate")].text


def test_a_mask_beside_its_lesion_is_odd(folder):
    put(folder, "c3", mask=np.roll(outline(), 8, 1))
    f = found(folder)[("c3", "intensity")]
    assert "inside label 1" in f.text or "inside label 2" in f.text


def test_an_offset_of_ct_is_suspected(folder):
    put(folder, "c3", scan(3).like(scan(3).array + np.int16(2024)))
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "modality": {"0": "CT"},
                "labels": {"1": "a", "2": "b"},
                "training": [{"image": f"images/c{i}.nii.gz", "label": f"labels/c{i}.nii.gz"} for i in range(10)],
            }
        )
    )
    assert "as if 1024 had been added" in check(find_cases(folder)).table()


@pytest.mark.parametrize("channel, hu, told", [("image", (-1000, 500), True), ("abdomen CT", (0, 200), True), ("image", (0, 2000), False)])
def test_an_offset_of_some_cases_is_told_by_check_and_plan(tmp_path, channel, hu, told):
    """Half of the set has HU, or only the channel's name says that it is CT. The highest of real CTs with 1024 added was 1410."""
    dataset = Dataset.create(tmp_path / "set", "x", [Label(1, "organ", (1, 2, 3), {})], [channel])
    for i in range(6):
        low, high = hu if i % 2 else (20, 1410)
        values = np.random.default_rng(i).permutation(np.linspace(low, high, np.prod((16, 20, 18)))).reshape(16, 20, 18)
        mask = np.zeros(values.shape, np.uint8)
        mask[4:12, 5:13, 5:12] = 1
        dataset.add(Image(values.astype(np.int16)), mask, name=f"c{i}", patient=f"P{i}")
    cases = find_cases(dataset.folder)
    assert {f.case for f in check(cases).findings if "as if 1024 had been added" in f.text} == ({"c0", "c2", "c4"} if told else set())
    hint = f"The CT of 3 cases (c0, c2, c4) has no value below 0, {module.OFFSET}."
    assert (hint in plan(cases, dataset.folder, measure=False).notes) == told


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_marks_on_separate_slices_are_told_once_and_not_as_leftovers(tmp_path, axis):
    """The label's rim leaves specks on a marked slice, which are no islets but cuts of what lies between."""
    step, shape = 4, (24, 24, 24)
    for name in ("a", "b", "c"):
        mask = np.zeros(shape, np.uint8)
        mask[3:20:step, 5:13, 5:12] = 1
        mask[7, 18, 18] = 1
        if name == "c":  # one case is marked throughout
            mask[3:20, 5:13, 5:12] = 1
        put(tmp_path, name, Image(np.random.default_rng(ord(name)).normal(size=shape).astype(np.float32)), np.moveaxis(mask, 0, axis))
    report = check(find_cases(tmp_path))
    (finding,) = report.findings
    text = "label 1 (foreground) is marked on separate slices only in 2 of 3 cases (in a on 5 of 17 between its first and last)"
    assert (finding.kind, finding.level) == ("gaps", "warning") and finding.text.startswith(text)
    assert finding.cure == "fill between slices in the Segment Editor, or label them ignore"


@pytest.mark.parametrize("planes", [[3, 4, 18, 19], [4, 19], [2, 5, 20], [2, 3, 6, 9, 12], [*range(3, 20)]])
def test_lesions_far_from_each_other_are_not_marked_on_separate_slices(tmp_path, planes):
    for name in ("a", "b", "c"):
        mask = np.zeros((24, 24, 24), np.uint8)
        mask[planes, 5:13, 5:12] = 1
        mask[10, 18, 18] = 1 if 10 in planes else 0
        put(tmp_path, name, Image(np.random.default_rng(ord(name)).normal(size=mask.shape).astype(np.float32)), mask)
    kinds = [f.kind for f in check(find_cases(tmp_path)).findings]
    assert kinds == ["leftover"] * 3 * (10 in planes)


def test_what_is_judged_in_part_has_no_islets(tmp_path):
    """Where IGNORE cuts a structure, its rest may be of any size."""
    for i, ignore in enumerate((False, True)):
        folder = tmp_path / str(i)
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        names = {"background": 0, "a": 1, "ignore": 2}
        (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MR"}, "labels": names, "file_ending": ".nii.gz"}))
        mask = outline(False)
        mask[0, 0, 0] = 1
        mask[5, :, 15] = 2 * ignore
        for name in ("c", "d"):
            write_image(scan(ord(name)), folder / "imagesTr" / f"{name}_0000.nii.gz")
            write_image(scan(0).like(mask), folder / "labelsTr" / f"{name}.nii.gz")
        assert ({("c", "leftover"), ("d", "leftover")} <= found(folder).keys()) != ignore


def test_a_voxel_that_is_no_number_is_found_in_a_large_image(tmp_path):
    """Every second voxel of one of 4 million is among those whose percentiles are taken."""
    values = np.random.default_rng(0).normal(size=(40, 320, 320)).astype(np.float32)
    values[0, 0, 1] = np.nan
    mask = np.zeros(values.shape, np.uint8)
    mask[5:9, 5:9, 5:9] = 1
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    put(tmp_path, "a", mask=Image(mask))
    write_image(Image(values), tmp_path / "images" / "a.mha")  # of NIfTI ITK reads a NaN as 0
    finding = found(tmp_path)["a", "unreadable"]
    assert finding.level == "error" and "voxels that are no numbers" in finding.text


def test_missing_classes_one_case_and_patients(folder):
    (folder / "labels.json").write_text('{"1": "organ", "2": "tumour", "3": "node"}')
    f = found(folder)[("", "missing")]
    assert f.level == "error" and f.text == "no case has label 3 (node)" and "take the label out" in f.cure
    put(folder, "c3", mask=moved(scan(0).like(outline()), 7.0))
    assert found(folder)[("", "missing")].text == "no case that can be read has label 3 (node)"
    (folder / "labels.json").unlink()
    for i in range(1, 10):
        put(folder, f"c{i}", mask=outline(False))
    assert "only one patient has label 2 (label 2), as in c0" in found(folder)[("", "missing")].text
    (folder / "labels.json").write_text(json.dumps({i: f"part {i}" for i in range(1, 12)}))
    assert "and 4 more: no case has label 8 (part 8), no case" in check(find_cases(folder)).table(width=1000)
    (folder / "labels.json").unlink()
    assert "all 10 cases are of one patient" in found(folder, patient="c()")[("", "one case")].text
    for i in range(1, 10):
        for part in ("images", "labels"):
            (folder / part / f"c{i}.nii.gz").unlink()
    assert "there is one case only" in found(folder)[("", "one case")].text


def test_cases_from_before_a_label_are_told_until_they_are_corrected(tmp_path):
    one, two = Label(1, "organ", (1, 2, 3), {}), Label(2, "tumour", (4, 5, 6), {})
    made = Dataset.create(tmp_path / "set", "set", [one], ["CT"])
    for i in range(4):
        labels = [one, two] if i == 3 else [one]
        made.add(scan(i), outline(i == 3), labels=labels, name=f"c{i}", patient=f"P{i}", allow=["label"])

    def told():
        return [f.text for f in check(find_cases(made.folder)).findings if "added before" in f.text]

    assert told() == ["added before the set had tumour, so trained as holding none of it (3 cases): c0, c1, c2"]
    assert "added before" not in check(find_cases(made.folder, only=["organ"])).table()
    assert "added before" not in check(find_cases(made.folder, foreground=True)).table()
    made.add(scan(0), outline(False), labels=[one, two], name="c0")  # looked at, and none found
    assert told()[0].endswith("(2 cases): c1, c2") and check(find_cases(made.folder / "dataset.json")).findings
    made._commit(lambda data: data["segments"][0].update(name="liver"))  # c1's organ may be the tumour for all that is known
    assert not told()


def test_leaks_between_splits(folder):
    names = [f"c{i}" for i in range(10)]
    put(folder, "c9", scan(0), outline())
    items = [{"image": f"images/{n}.nii.gz", "label": f"labels/{n}.nii.gz", "patient": f"p{i % 7}"} for i, n in enumerate(names)]
    (folder / "list.json").write_text(json.dumps({"training": items[:6], "validation": items[6:]}))
    report = check(find_cases(folder / "list.json"))
    leaks = [f for f in report.errors if f.kind == "leak"]
    assert any(f.case == "c9" and "is in validation and the same voxels are in train as c0" in f.text for f in leaks)
    assert {f.case for f in leaks if "its patient is in train and validation" in f.text} == {"c7", "c8", "c9"}
    assert report.bad >= {"c7", "c8", "c9"}


def test_leaks_from_what_is_in_no_split_into_the_test(folder):
    """nnU-Net's and MSD's training cases are in no split until folds are dealt, and the test images often have no mask."""
    put(folder, "c9", scan(0))
    (folder / "labels" / "c9.nii.gz").unlink()
    items = [{"image": f"images/c{i}.nii.gz", "label": f"labels/c{i}.nii.gz", "patient": f"p{i}"} for i in range(8)]
    test = [{"image": f"images/c{i}.nii.gz", "patient": f"p{i % 7}"} for i in (8, 9)]
    (folder / "list.json").write_text(json.dumps({"training": items, "test": test}))
    findings = check(find_cases(folder / "list.json")).findings
    assert {(f.case, f.text) for f in findings if f.kind == "leak"} == {
        ("c8", "its patient is in train and test (c1, c8)"),
        ("c9", "its patient is in train and test (c2, c9)"),
        ("c9", "is in test and the same voxels are in train as c0"),
    }
    twin = next(f for f in findings if f.kind == "duplicate")
    assert (twin.case, twin.level, twin.text) == ("c9", "warning", "has the same voxels as c0")


@pytest.mark.parametrize("axis, tile, aspect", [(0, (14, 16), 2), (1, (12, 16), 3), (2, (12, 14), 1.5)])
def test_single_slices_of_any_plane_can_be_drawn(tmp_path, monkeypatch, capsys, axis, tile, aspect):
    scan, mask = np.random.default_rng(0).normal(0, 1, (12, 14, 16)), np.zeros((12, 14, 16), np.uint8)
    mask[3:9, 3:9, 3:9] = 1
    for name in ("a", "b"):
        put(tmp_path, name, Image(scan.take([5], axis), (1.0, 2.0, 3.0)), mask.take([5], axis))
    shown, imshow = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, x, **how: shown.append((x.shape, how["aspect"])) or imshow(self, x, **how))
    assert run(tmp_path, picture=tmp_path / "a.png") == 1 and (tmp_path / "a.png").is_file()
    assert shown == [(tile, aspect)]
    capsys.readouterr()
    monkeypatch.setattr(module, "_tile", None)
    with pytest.raises(TypeError):
        run(tmp_path, picture=tmp_path / "a.png")
    assert "has the same voxels as a" in capsys.readouterr().out  # a picture that fails takes no finding along


def test_a_channel_of_small_values_beside_one_of_large_is_drawn_with_its_own_window(tmp_path):
    dataset = Dataset.create(tmp_path / "set", "x", [Label(1, "a", (255, 0, 0), {})], ["ADC", "T2"])
    for i in range(2):
        rng = np.random.default_rng(i)
        adc = rng.normal(1e-3, 2e-4, SHAPE)  # mm2/s, and a hot voxel, which percentiles leave out
        adc[1, 4, 4] = 1.0
        dataset.add(Image(np.stack([adc, rng.normal(500, 100, SHAPE)]).astype(np.float32)), outline(False), name=f"c{i}")
    figure = Figure()
    axes = figure.add_subplot()
    cases = find_cases(tmp_path / "set")
    module._tile(axes, cases, cases.cases[0])
    shown = axes.images[0]
    grey = shown.cmap(shown.norm(shown.get_array()))[..., 0]
    assert np.quantile(grey, 0.75) - np.quantile(grey, 0.25) > 0.1


def test_the_table_json_and_picture(folder, tmp_path, capsys, monkeypatch):
    for i in range(8):
        put(folder, f"c{i}", mask=speck)
    put(folder, "c9", mask=moved(scan(0).like(outline()), 7.0))
    errors = run(folder, json_file=tmp_path / "out.json", picture=tmp_path / "out.png")
    said = capsys.readouterr().out
    assert errors == 1 and "10 cases (pairs) of 10 patients" in said and "and 3 more: c5, c6, c7" in said and "1 error, 8 warnings" in said
    assert max(map(len, said.splitlines())) <= 120
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["errors"] == 1 and data["findings"][0]["case"] == "c9" and data["findings"][0]["cure"]
    pixels = read_image(tmp_path / "out.png").array
    assert pixels.shape[-1] > 800 and pixels[:3].std() > 10
    assert run(folder, json_file="-") == 1 and json.loads(capsys.readouterr().out)["cases"] == 10
    monkeypatch.setattr(module, "check", None)  # it is told before minutes of reading
    with pytest.raises(UserError, match="end the picture's name in .png"):
        run(folder, picture=tmp_path / "out.gif")


def test_no_picture_of_sound_cases(folder, tmp_path):
    assert not check(find_cases(folder)).picture(tmp_path / "a.png") and not (tmp_path / "a.png").exists()
    assert module.LEVELS[0] == "error"


@pytest.mark.parametrize("suffixes", [(".tif", ".tif", ".png"), (".nii.gz",) * 3])  # the latter as our own training sets have them
def test_pictures_with_and_without_a_pixel_size_are_an_error(tmp_path, suffixes):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for i, suffix in enumerate(suffixes):
        picture = np.random.default_rng(i).integers(0, 200, (1, 20, 18)).astype(np.uint8)
        size = (0.0025, 0.0025, 1.0) if i < 2 else (1.0, 1.0, 1.0)
        for part, array in (("images", picture), ("labels", (picture > 100).astype(np.uint8))):
            write_image(Image(array, size), tmp_path / part / f"c{i}{suffix}")
    mixed = r"1 of 3 images have no pixel size \(c2\) and count as 1 mm, that of the others is 0.0025 mm; save all as TIFF"
    errors = check(find_cases(tmp_path)).errors
    assert len(errors) == 1 and re.match(mixed, str(errors[0]))
    with pytest.raises(UserError, match=mixed):
        plan(find_cases(tmp_path), tmp_path, measure=False)
    for part in ("images", "labels"):
        (tmp_path / part / f"c2{suffixes[2]}").unlink()
    assert not check(find_cases(tmp_path)).errors


@pytest.mark.parametrize("instances", [True, False])
def test_numbered_instances_are_suspected(folder, instances):
    rng = np.random.default_rng(0)
    for i in range(10):
        mask = np.zeros(SHAPE, np.uint8)
        for k in range(6 + i % 3):
            width = rng.integers(2, 5) if instances else 1 + k % 4
            mask[1 : 2 + width, 2 * k + 2 : 2 * k + 3 + (not instances and k > 3), 2 : 3 + width] = k + 1
        put(folder, f"c{i}", mask=scan(i).like(mask))
    assert (("", "instances") in found(folder)) == instances
    notes = plan(find_cases(folder), folder, measure=False).notes
    assert any("learn instances as one label with --foreground" in note for note in notes) == instances
    assert ("", "instances") not in found(folder, foreground=True)


def test_structures_of_small_and_large_bodies_and_of_crops_are_no_instances(folder, monkeypatch):
    rng = np.random.default_rng(0)
    labels = [Label(i, f"label {i}", (1, 1, 1), {}) for i in range(1, 25)]

    def told(sizes, by_person, crop=24):
        cases = np.array([[0, *sizes * np.exp(rng.normal(0, by_person) + rng.normal(0, 0.1, 24))] for _ in range(20)])
        for i, case in enumerate(cases):
            start = rng.integers(0, 25 - crop)
            case[1 + np.r_[0:start, start + crop - i % 2 : 24]] = 0
            case[np.flatnonzero(case)[[0, -1]]] *= rng.uniform(0.1, 1, 2) if crop < 24 else 1
        return numbered_instances(labels, cases)

    muscles, spine = np.tile([300, 280, 250, 320, 260, 300], 4), np.geomspace(5e3, 47e3, 24)
    assert not told(muscles, 0.4) and not told(spine, 0.2, crop=8)
    assert "name them in labels.json if they are classes, or learn" in told(np.ones(24), 0.2)
    given = []
    for place in ("check", "plan"):
        monkeypatch.setattr(f"unetseg_training.{place}.numbered_instances", lambda _, sizes, *_pictures: given.append(sizes) or "")
    check(find_cases(folder))
    plan(find_cases(folder), folder, measure=False)
    assert len(given) == 2 and all(np.allclose(np.array(sizes)[:, 2], 18 * 0.8 * 0.8 * 2) for sizes in given)  # mm3


def test_real_data(data, tmp_path):
    report = check(find_cases(data / "sunnybrook"))
    assert not report.findings and report.data()["patients"] == 13
    cubes = find_cases(data / "lidc_nodule_cubes")
    cubes = check(cubes.subset(cubes.cases[:40]))
    assert not cubes.errors
    cells = [np.bincount(read_image(p).array.ravel(), minlength=14) for p in (data / "dic_hela" / "01_GT").glob("*.tif")]
    assert numbered_instances([Label(i, f"label {i}", (1, 1, 1), {}) for i in range(1, 14)], cells)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    source = data / "msd_hippocampus"
    for i, p in enumerate(sorted((source / "images").iterdir())[:20]):
        shutil.copy(p, tmp_path / "images")
        shutil.copy(source / "labels" / (p.name if i else sorted((source / "labels").iterdir())[1].name), tmp_path / "labels" / p.name)
    wrong = check(find_cases(tmp_path))  # the first case has the second one's mask
    assert wrong.bad == {"hippocampus_003"} and wrong.errors[0].kind == "geometry"


def test_a_ct_without_air_and_bone_is_no_offset(folder):
    for i in range(10):
        put(folder, f"c{i}", scan(i).like(np.clip(scan(i).array + np.int16(1000), 0, 900).astype(np.int16)))
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "modality": {"0": "CT"},
                "labels": {"1": "a", "2": "b"},
                "training": [{"image": f"images/c{i}.nii.gz", "label": f"labels/c{i}.nii.gz"} for i in range(10)],
            }
        )
    )
    assert "1024" not in check(find_cases(folder)).table()
