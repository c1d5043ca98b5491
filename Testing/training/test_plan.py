"""The plan: what it chooses for which data and machine, and that it says why in files that a person can read."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("pydantic")
pytest.importorskip("lightning")
pytest.importorskip("monai")

from unetseg_training import config as c  # noqa: E402
from unetseg_training import plan as module  # noqa: E402
from unetseg_training.cases import IGNORE, numbered_instances  # noqa: E402
from unetseg_training.plan import Fingerprint, Machine, fingerprint, plan  # noqa: E402
from unetseg_training.prepare import compute, key  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Image, read_image  # noqa: E402
from UNetSegmentationLib.model import Card, Label, find_model  # noqa: E402
from UNetSegmentationLib.networks import UNetConfig  # noqa: E402

LAPTOP = Machine(2, 16 << 30)
GPU = Machine(16, 128 << 30, "a GPU", 80 << 30)


def cases(n=6, shape=(20, 24, 28), spacing=(1.0, 1.0, 1.0), labels=("a", "b"), channels=("MR",), low=0.0, spot=4):
    """A CaseSet in memory. Every case: noise, and two boxes as labels; the first is brighter."""
    rng = np.random.default_rng(0)

    def load(case):
        values = rng.normal(100 if low == 0 else -700, 20, shape).astype(np.float32)
        values[0] = low
        mask = np.zeros(shape, np.uint8)
        mask[shape[0] // 2 :, 4 : 4 + spot, 4 : 4 + spot] = 1
        values[mask > 0] += 300
        if len(labels) > 1:
            mask[shape[0] // 2 :, 12 : 12 + spot, 4 : 4 + spot] = 2
        return Image(values, spacing), mask

    made = [SimpleNamespace(name=f"case{i}", patient=f"p{i}", split="") for i in range(n)]
    found = tuple(Label(i, name, (1, 2, 3), {}) for i, name in enumerate(labels, 1))
    return SimpleNamespace(cases=made, annotated=made, labels=found, channels=channels, layout="pairs", notes=("said so",), load=load)


def of(case_set, machine=LAPTOP, **how):
    return plan(case_set, "some/My Data", machine=machine, measure=False, **how)


def test_the_memory_of_windows_is_asked_for(monkeypatch):
    def fill(status):
        assert bytes(status)[:4] == (64).to_bytes(4, "little")
        status[1] = 64 << 30

    monkeypatch.setattr(module, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr("ctypes.WinDLL", lambda name: SimpleNamespace(GlobalMemoryStatusEx=fill), raising=False)
    assert module._memory() == 64 << 30


def test_files_say_what_and_why(tmp_path):
    made = of(cases(), quick=True)
    made.write(tmp_path / "run")
    assert c.read(tmp_path / "run") == made.config and made.config.model.name == "my-data"
    text = (tmp_path / "run" / "plan.md").read_text("utf-8")
    assert "6 annotated cases of 6 patients" in text and "said so" in text and "| a | " in text
    yaml = (tmp_path / "run" / "config.yaml").read_text("utf-8")
    for name, why in made.reasons.items():
        section, _, setting = name.partition(".")
        assert hasattr(getattr(made.config, section), setting), name
        assert f"| {name} | " in text and why in text and "Why: " + why[:60] in yaml
    assert {"input.spacing", "input.patch", "input.intensity", "fit.batch", "fit.steps", "network.channels"} <= set(made.reasons)


def test_a_small_volume_is_seen_whole_and_quick_is_quick():
    quick, full = of(cases(), quick=True).config, of(cases()).config
    assert quick.input.dimensions == 3 and all(p >= n for p, n in zip(quick.input.patch, (20, 24, 28)))
    assert quick.fit.minutes and quick.fit.minutes < 10 and quick.fit.batch < 8 <= full.fit.batch <= 16
    assert full.fit.epochs * full.fit.steps > quick.fit.epochs * quick.fit.steps
    assert quick.input.intensity == {"mode": "zscore"} and quick.input.flip_axes == ["x", "y", "z"]


def test_thick_slices_are_not_halved_first():
    made = of(cases(shape=(24, 64, 64), spacing=(0.5, 0.5, 4.0), spot=10)).config
    assert made.input.spacing == (0.5, 0.5, 4.0)
    assert made.network.strides[0] == (1, 2, 2) and made.network.kernels[0] == (1, 3, 3) and made.network.strides[-1][0] == 2
    assert all(p % d == 0 for p, d in zip(made.input.patch, made.unet().divisor))


@pytest.mark.parametrize(
    "names, flips",
    [
        (("left lung", "right lung"), ["y", "z"]),
        (("LeftKidney", "other"), ["y", "z"]),
        (("LLung", "other"), ["y", "z"]),
        (("KidneyR", "other"), ["y", "z"]),
        (("Anterior", "Posterior"), ["x", "z"]),
        (("a", "b"), ["x", "y", "z"]),
        (("L1", "Largest"), ["x", "y", "z"]),  # a vertebra has no side
    ],
)
def test_mirrors_that_would_make_a_label_wrong_are_left_out(names, flips):
    assert of(cases(labels=names)).config.input.flip_axes == flips


@pytest.mark.parametrize("name, flips", [("Upper lung", []), ("Anterior", []), ("left lung", ["y"]), ("a", ["x", "y"])])
def test_of_slices_as_they_were_taken_only_x_is_known(name, flips):
    """Chest radiographs in which "Upper lung" barred z, which a picture lacks, were mirrored upside down."""
    made = of(cases(shape=(1, 64, 64), labels=(name, "b")))
    assert made.config.input.axis == "acquired" and made.config.input.flip_axes == flips
    assert ("may be any of a slice's own" in made.reasons["input.flip_axes"]) == (not flips)


def test_ct_is_known_by_its_name_and_by_its_values():
    for case_set in (cases(channels=("CT",)), cases(low=-1000.0)):
        intensity = of(case_set).config.input.intensity
        assert intensity["mode"] == "ct-foreground" and intensity["low"] < intensity["mean"] < intensity["high"]
    assert of(cases(channels=("T1", "T2"), low=-1000.0)).config.input.intensity["mode"] == "zscore"


def test_pictures_and_few_slices_are_2d():
    flat = of(cases(shape=(1, 120, 100), labels=("a",))).config.input
    assert (flat.dimensions, flat.context_slices, flat.spacing) == (2, 0, (None, None, None))
    few = of(cases(shape=(100, 6, 120), spacing=(1.0, 3.0, 1.0))).config.input
    assert (few.dimensions, few.axis, few.context_slices, few.spacing) == (2, "coronal", 1, (1.0, None, 1.0))


def test_images_too_small_for_a_network_are_refused():
    with pytest.raises(UserError, match="The images have 7 x 6 voxels, and a network needs at least 8"):
        of(cases(shape=(1, 6, 7), labels=("a",), spot=2))
    assert of(cases(shape=(1, 6, 8), labels=("a",), spot=2)).config.network.strides == ((1, 2),)


def test_large_pictures_are_made_coarser():
    made = of(cases(2, shape=(1, 1500, 2000), labels=("a",), spot=200), quick=True)
    x, y, z = made.config.input.spacing
    assert x == y > 4 and z is None and "made coarser" in made.reasons["input.spacing"]
    assert made.case_seconds < 5
    # A base that takes pictures as they are has more to do.
    kept = of(cases(2, shape=(1, 180, 190), labels=("a",)), quick=True).config
    base = Card(kept.card()), kept.unet()
    assert kept.input.spacing == (None, None, None)
    tuned = of(cases(2, shape=(1, 1500, 2000), labels=("a",), spot=200), quick=True, base=base)
    assert tuned.config.input.spacing == (None, None, None) and tuned.case_seconds > 3 * made.case_seconds


@pytest.mark.parametrize("shape", [(20, 24, 28), (6, 100, 120)])
def test_a_single_slice_among_volumes_is_named(shape):
    mixed = cases(shape=shape)
    whole = mixed.load

    def load(case):
        image, mask = whole(case)
        return (Image(image.array[-1:]), mask[-1:]) if case.name == "case2" else (image, mask)

    mixed.load = load
    with pytest.raises(
        UserError, match=r"Single slices are among the volumes \(case2\); replace each by its whole volume, or leave it out"
    ):
        of(mixed)


def whole_body(n=20):
    return Fingerprint(
        n, n, n, [(300, 512, 512)] * n, [(1.5, 0.8, 0.8)] * n, [[78_000_000, 600_000, 40_000]] * n, dict(low=-50, high=200, mean=60, std=40)
    )


def test_the_machine_decides_patch_network_and_spacing():
    laptop, gpu = (of(cases(), m, found=whole_body()).config for m in (LAPTOP, GPU))
    assert np.prod(gpu.input.patch) > 4 * np.prod(laptop.input.patch) and gpu.network.channels[0] > laptop.network.channels[0]
    assert laptop.input.spacing[0] > gpu.input.spacing[0]
    # Never so coarse that the smallest label (40,000 voxels, a ball of 42 mm) has fewer than 6 voxels across.
    assert max(laptop.input.spacing) <= 42 / 6
    tight = of(cases(), Machine(2, 1 << 30), found=whole_body()).config
    assert tight.fit.batch < 8 and tight.fit.batch * tight.fit.accumulate >= 8
    assert of(cases(), GPU, found=whole_body()).reasons["fit.batch"].startswith("the field's 8 to 16")


def test_more_minutes_are_more_steps():
    steps = [of(cases(shape=(40, 48, 48)), minutes=m).config.fit.steps for m in (30, 120)]
    assert steps[1] > 2.5 * steps[0]


def test_fine_tuning_keeps_the_input_and_levels_of_its_base():
    card = find_model("hippocampus-3d").card
    made = of(
        cases(labels=("Anterior hippocampus", "Posterior hippocampus")), base=(card, UNetConfig.from_json(card.data["network"]))
    ).config
    assert made.unet() == UNetConfig.from_json(card.data["network"]) and made.input.patch == card.patch
    assert made.input.intensity == card.intensity and made.fit.learning_rate < 1e-3


def test_a_label_of_the_base_keeps_its_colour_and_codes_and_its_task_its_mirrors():
    """Folders' labels, in their own order, have neither: the hippocampus' colours had changed places. Of its labels' names alone a model of
    it may also be mirrored along z."""
    card = find_model("hippocampus-3d").card
    base = (card, UNetConfig.from_json(card.data["network"]))
    made = of(cases(labels=("posterior hippocampus", "Anterior hippocampus")), base=base)
    kept = {label.key: (label.color, label.terminology) for label in card.labels}
    assert [label.name for label in made.config.labels] == ["posterior hippocampus", "Anterior hippocampus"]
    assert {label.name.lower(): (label.color, label.terminology) for label in made.config.labels} == kept
    assert made.config.input.flip_axes == card.data["flip_axes"] == ["x"]
    assert made.reasons["input.flip_axes"] == "that of hippocampus-3d, which it is fine-tuned from"
    other = cases(labels=("Anterior hippocampus", "Tail"))
    codes = {"category": ["SCT", "1", "Structure"], "type": ["SCT", "2", "Own"]}
    other.labels = (replace(other.labels[0], terminology=codes), other.labels[1])
    made = of(other, base=base).config
    assert [(label.color, label.terminology) for label in made.labels] == [((1, 2, 3), codes), ((1, 2, 3), None)]
    assert made.input.flip_axes == ["x", "z"]


def test_a_large_case_is_counted_plane_by_plane():
    """np.bincount takes eight bytes a voxel."""
    image = Image(np.ones((40, 96, 96), np.int16), direction=(-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    mask = np.zeros(image.shape, np.uint8)
    mask[:2], mask[2, 0] = 1, IGNORE
    case_set = cases(1, labels=("a",))
    case_set.load = lambda case: (image, mask)
    tracemalloc.start()
    found = fingerprint(case_set)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.counts == [[mask.size - 2 * 96 * 96 - 96, 2 * 96 * 96]]
    assert peak < 7 * mask.size


def test_nothing_to_learn_is_said():
    none = cases(0)
    with pytest.raises(UserError, match="no annotated cases"):
        fingerprint(none)
    empty = cases()
    whole = empty.load
    empty.load = lambda case: (whole(case)[0], np.zeros((20, 24, 28), np.uint8))
    with pytest.raises(UserError, match="All masks of the dataset are empty"):
        fingerprint(empty)
    broken = cases()
    broken.load = lambda case: (Image(np.full((20, 24, 28), np.nan, np.float32)), np.ones((20, 24, 28), np.uint8))
    with pytest.raises(UserError, match="Case case0 has 13440 voxels that are NaN"):
        fingerprint(broken)


def test_a_step_is_measured_here():
    from unetseg_training.plan import _measured

    net = {"channels": (4, 8), "strides": ((2, 2),), "kernels": ((3, 3), (3, 3))}
    assert 0 < _measured(net, 2, 1, 2, (32, 32), 2, "32", False) < 60


def test_a_step_of_apples_gpu_is_over_when_it_has_computed_it(monkeypatch):
    """Its kernels only begin when they are called, so that a step of 2 s was measured as 0.003 s."""
    import torch

    waited, zeros = [], torch.zeros
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(1))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_where: self)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **more: zeros(*shape, **more))
    net = {"channels": (4, 8), "strides": ((2, 2),), "kernels": ((3, 3), (3, 3))}
    assert module._measured(net, 2, 1, 2, (32, 32), 2, "32", True) and len(waited) == 4


def test_where_apples_gpu_computes_nonsense_the_cpu_is_planned_for(monkeypatch):
    fault, laptop = "PyTorch 9 gives wrong values on this computer's mps", replace(LAPTOP, gpu="Apple GPU", gpu_memory=8 << 30)
    seen = []
    monkeypatch.setattr("unetseg_training.plan.mps_fault", lambda network: seen.append(network) or fault)
    for quick in (True, False):
        made, cpu = of(cases(), laptop, quick=quick), of(cases(), quick=quick)
        assert made.config == cpu.config and made.machine == LAPTOP
        assert made.notes == ("said so", f"{fault}, so this is for the CPU.")
    monkeypatch.setattr("unetseg_training.plan.mps_fault", lambda network: "")
    assert of(cases(), laptop).config.unet() == seen[-1]  # what is looked at is what would be trained


def test_a_model_of_crops_that_goes_on_with_whole_scans_is_no_longer_one_of_crops():
    """In a ROI it was shown only that, and was worse than its base."""
    card = find_model("hippocampus-3d").card
    names, base = tuple(label.name for label in card.labels), (card, UNetConfig.from_json(card.data["network"]))
    crops, heads = (of(cases(labels=names, shape=(40, 50, n)), base=base) for n in (60, 100))
    assert (crops.config.model.extent, heads.config.model.extent) == ("box", "content")
    assert "model.extent" not in crops.reasons and "100 mm long" in heads.reasons["model.extent"]


def test_fine_tuning_keeps_the_padding_of_its_base():
    card = find_model("hippocampus-3d").card
    network = UNetConfig.from_json(card.data["network"])
    names = tuple(label.name for label in card.labels)
    for padding in ("zero", "reflect"):
        made = of(cases(labels=names), base=(Card({**card.data, "padding": padding}), network)).config
        assert made.input.padding == padding


def test_fine_tuning_shows_pixels_of_the_size_that_its_base_was_trained_on():
    """Slices of 128 pixels of 2.6 mm were trained on as they are, and the base had seen none such."""
    card = find_model("left-ventricle-2d").card
    base = card, UNetConfig.from_json(card.data["network"])
    made = [
        of(cases(labels=("Left ventricle cavity",), shape=(1, n, n), spacing=(s, s, 8.0)), base=base).config
        for n, s in ((128, 2.6), (512, 0.65))
    ]
    for config, n, s in zip(made, (128, 512), (2.6, 0.65)):
        image = Image(np.random.default_rng(0).normal(100, 20, (1, n, n)).astype(np.float32), (s, s, 8.0))
        seen = compute(image, np.ones(image.shape, np.uint8), config, "x")
        assert seen["labels"].shape == (1, 256, 256) and np.allclose(seen["spacing"], (8, 1.3, 1.3))
        new = config.card()
        assert (new["spacing"], new["pixel_mm"], new["field_px"]) == ([None] * 3, 1.3, 256)
        other = config.model_copy(update={"input": config.input.model_copy(update={"pixel_mm": None})})
        assert key(config, "") != key(other, "")
    cells = cases(labels=("cell",), shape=(1, 512, 512), spacing=(0.0005, 0.0005, 1.0))
    assert "pixel_mm" not in of(cells, base=base).config.card()  # else they were refused, as too coarse
    (small, large) = (m.fit.steps for m in made)
    assert abs(small - large) <= 1  # a case is validated in the same time


def test_a_small_gpu_in_a_large_machine_gets_what_it_holds():
    small = of(cases(), Machine(16, 512 << 30, "a GPU", 6 << 30), found=whole_body()).config
    large = of(cases(), GPU, found=whole_body()).config
    assert np.prod(small.input.patch) < np.prod(large.input.patch) and small.fit.batch < large.fit.batch


def test_what_is_rare_is_shown_more_often_and_every_last_epoch_is_validated():
    assert of(cases(), found=whole_body()).config.fit.foreground == 0.67  # of 40,000 in 78 million voxels
    assert of(cases()).config.fit.foreground == 0.5
    every = [of(cases(), found=whole_body(n), quick=True, minutes=m) for n in (20, 60, 300) for m in (0.1, 0.5, 2, 6)]
    assert all(made.config.fit.epochs % made.config.fit.validate_every == 0 for made in every)


def test_what_no_memory_holds_is_computed_again():
    assert of(cases(), Machine(2, 1 << 29), found=whole_body()).config.network.checkpointing
    assert not of(cases(), GPU, found=whole_body()).config.network.checkpointing


@pytest.mark.parametrize("slices", [1, 12])
def test_slices_that_lie_otherwise_in_every_patient_are_seen_as_they_were_taken(slices):
    """Short-axis slices of the heart are nearest to sagittal in one patient and to coronal in the next: of stacks of 1.4 x 1.4 x 8 mm
    the plan was volumes of 4.7 mm, single slices were told to be replaced by their volumes."""
    made = cases(shape=(slices, 96, 96), spacing=(1.4, 1.4, 8.0), spot=8)
    load, ways = made.load, ((0, 0, 1.0, 1.0, 0, 0, 0, 1.0, 0), (1.0, 0, 0, 0, 0, 1.0, 0, -1.0, 0))

    def turned(case):
        image, mask = load(case)
        return replace(image, direction=ways[made.cases.index(case) % 2]), mask

    made.load = turned
    found = of(made).config.input
    assert found.dimensions == 2 and found.axis == "acquired" and found.context_slices == (slices > 1)
    assert tuple(found.spacing) == ((1.4, 1.4, None) if slices > 1 else (None,) * 3) and len(found.patch) == 2
    made.labels = (Label(1, "anterior", (1, 2, 3), {}), made.labels[1])
    assert not of(made).config.input.flip_axes  # which is another axis of the slices in every case
    made.load = lambda case: (replace(load(case)[0], direction=ways[0]), load(case)[1])  # all alike
    assert slices > 1 or of(made).config.input.axis == "sagittal"


def test_a_sigmoid_base_is_refused_before_the_cases_are_read():
    card, case_set = find_model("hippocampus-3d").card, cases()
    case_set.load = None
    base = Card({**card.data, "activation": "sigmoid"}), UNetConfig.from_json(card.data["network"])
    with pytest.raises(UserError, match="judges each label by itself"):
        of(case_set, base=base)


def test_one_odd_stack_does_not_make_slices_of_the_volumes_of_the_others():
    made = cases(12, shape=(24, 96, 96), spacing=(0.8, 0.8, 5.0), spot=8)
    load = made.load
    made.load = lambda case: (
        (replace(load(case)[0], direction=(0, 0, 1.0, 1.0, 0, 0, 0, 1.0, 0)), load(case)[1]) if case is made.cases[0] else load(case)
    )
    assert of(made).config.input.dimensions == 3


def test_pictures_of_which_a_base_would_see_a_voxel_are_refused():
    card = find_model("lung-nodule-2d").card
    base = card, UNetConfig.from_json(card.data["network"])
    case_set = cases(shape=(1, 300, 300), spacing=(0.0002,) * 3, spot=40)
    with pytest.raises(UserError, match=r"spacing of lung-nodule-2d \(0.6 x 0.6 mm\) the median image has 1 x 1 voxels.* at least 8"):
        of(case_set, base=base)
    assert of(cases(shape=(1, 300, 300), spacing=(0.6,) * 3, spot=40), base=base)


def test_pictures_without_a_pixel_size_are_refused_for_a_base_of_micrometres():
    made = of(cases(shape=(1, 300, 300), labels=("a",), spot=40, channels=("image",)), quick=True).config
    case_set = cases(shape=(1, 300, 300), labels=("a",), spot=40, channels=("image",))
    read = case_set.load
    case_set.load = lambda case: (replace(read(case)[0], source=Path("a.png")), read(case)[1])
    with pytest.raises(UserError, match="Case case0 has no pixel size, which my-data needs"):
        of(case_set, base=(Card({**made.card(), "spacing": [0.0025, 0.0025, None]}), made.unet()))
    assert of(case_set, base=(Card(made.card()), made.unet()))


def test_a_dataset_named_from_within_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "My Data" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "My Data" / "images")
    made = plan(cases(), "..", machine=LAPTOP, measure=False).config.model
    assert made.name == "my-data" and made.training_data[0].startswith("My Data: 6 cases")


def pictures(pixel, draw, n=4):
    """Pictures of 1500 x 1500 pixels of one label. draw(mask) marks it in (1, y, x)."""
    mask = np.zeros((1, 1500, 1500), np.uint8)
    draw(mask)
    values = np.random.default_rng(0).normal(100, 20, mask.shape).astype(np.float32) + 100 * mask
    made = cases(n, labels=("a",))
    made.load = lambda case: (Image(values, (pixel, pixel, 1.0)), mask)
    return made


@pytest.mark.parametrize("pixel", [1.0, 0.0005])
def test_many_small_objects_keep_voxels_across(pixel):
    """1,400 nuclei of 9 pixels were seen as one large ball, and at pixels of 5.2, of which the truth itself had a Dice of 0.62."""

    def nuclei(mask):
        for y in range(0, 1500, 30):
            for x in range(0, 1500, 30):
                mask[0, y : y + 8, x : x + 8] = 1  # as large as a circle of 9 pixels

    found = fingerprint(case_set := pictures(pixel, nuclei))
    for quick, across in ((True, 4), (False, 6)):
        made = of(case_set, quick=quick, found=found)
        assert 9.1 * pixel / across * 0.9 < made.config.input.spacing[0] < 9.1 * pixel / across
        hint = f"Its smallest objects are {9.03 * pixel:.3g} mm large"
        assert any(hint in note and "give it more minutes" in note for note in made.notes)
    assert "coarser" not in of(case_set, GPU, found=found).reasons["input.spacing"]


def test_vessels_with_specks_are_as_coarse_as_before():
    """Finer than 2.55 pixels a quick training was worse: 0.581, not 0.699."""

    def vessels(mask):
        mask[0, ::60], mask[0, :, ::60] = 1, 1
        mask[0, 20::30, 20::30] = 1  # more specks than vessels

    made = of(pictures(1.0, vessels), quick=True)
    assert made.config.input.spacing[0] == pytest.approx(1500 / 2 / 192, abs=0.01) and made.notes == ("said so",)


def test_few_slices_are_measured_in_their_plane():
    case_set = cases(labels=("a",), shape=(6, 100, 120), spacing=(1.0, 1.0, 9.0), spot=10)
    whole, typical = module._smallest(fingerprint(case_set))
    assert 2 * np.sqrt(100 / np.pi) == pytest.approx(typical) and typical < whole
    case_set = cases(labels=("a",), shape=(40, 100, 120), spot=10)
    assert module._smallest(fingerprint(case_set)) == pytest.approx([2 * (3 * 2000 / 4 / np.pi) ** (1 / 3)] * 2)


def chests(**how):
    """Plans of 30 CTs of 400 x 512 x 512 voxels with one nodule of 8 mm."""
    shape = (400, 512, 512)
    found = replace(whole_body(30), shapes=[shape] * 30, spacings=[(1.0, 0.7, 0.7)] * 30, counts=[[np.prod(shape) - 500, 500]] * 30)
    return of(cases(30, labels=("a",)), found=found, **how)


@pytest.mark.parametrize("quick, minutes", [(True, 15), (True, 60), (False, 180), (False, 600)])
def test_validation_of_whole_scans_leaves_time_to_train(quick, minutes):
    """Of such a plan all but a few minutes were for validation."""
    made = chests(quick=quick, minutes=minutes)
    fit = made.config.fit
    spent = fit.epochs // fit.validate_every * fit.validate_cases * made.case_seconds
    assert made.seconds < 1.1 * 60 * minutes and spent < 0.35 * made.seconds
    assert fit.validate_cases < 6 and fit.epochs % fit.validate_every == 0 and fit.patience >= 3 * fit.validate_every
    assert f"takes {100 * spent / made.seconds:.0f} % of the time" in made.reasons["fit.validate_every"]


def test_a_validation_that_does_not_fit_is_one_at_the_end():
    assert chests(quick=True).seconds < 1.25 * 360  # it took 35 minutes
    made = chests(quick=True, minutes=1)
    fit = made.config.fit
    assert (fit.validate_every, fit.validate_cases) == (12, 1) and "and 1 validation of" in made.reasons["fit.steps"]
    assert made.seconds - made.case_seconds > 25  # half of the minute is trained at least
    assert any("checked once, on one, at its end; give it more minutes" in note for note in made.notes)
    assert not any("at its end" in note for note in chests(quick=True, minutes=60).notes)


def test_what_fits_is_validated_on_as_many_cases_as_before():
    small = of(cases(30), quick=True).config.fit
    assert (small.validate_cases, small.validate_every, small.patience) == (6, 1, 15)


def sided(n=10, apart=lambda i: True, **how):
    """Cases of two boxes, one behind the other along y; the other way round in those that are not apart()."""
    made = cases(n, labels=("label 1", "label 2"), **how)
    load = made.load

    def turned(case):
        image, mask = load(case)
        return image, mask if apart(made.cases.index(case)) else np.choose(mask, np.array([0, 2, 1], np.uint8))

    made.load = turned
    return made


def test_labels_without_names_that_lie_as_sides_do_are_not_mirrored():
    """The left and the right lung, as labels 1 and 2, had a Dice of 0.70, without mirrors along x 0.95."""
    made = of(sided())
    assert made.config.input.flip_axes == ["x", "z"]
    assert "label 1 and label 2, alike in size, lie in one order along y" in made.reasons["input.flip_axes"]
    assert of(sided(apart=lambda i: i)).config.input.flip_axes == ["x", "z"]  # nine of ten
    named = sided()
    named.labels = tuple(replace(label, name=name) for label, name in zip(named.labels, "ab"))
    for other in (sided(apart=lambda i: i % 4), sided(4), sided(shape=(20, 240, 28)), named):
        made = of(other)
        assert made.config.input.flip_axes == ["x", "y", "z"] and "order" not in made.reasons["input.flip_axes"]
    assert of(sided(shape=(1, 64, 64))).config.input.flip_axes == ["x"]  # of pictures too, and of their own axes
    uneven = sided()
    load = uneven.load
    uneven.load = lambda case: (load(case)[0], np.where((load(case)[1] == 2) & (np.arange(28) > 4), 0, load(case)[1]).astype(np.uint8))
    assert of(uneven).config.input.flip_axes == ["x", "y", "z"]  # one is four times as large


def test_cells_that_are_numbered_in_a_film_are_noted(data):
    """Of HeLa frames with tracked cells the plan was one of 27 classes."""
    frames = [read_image(p).array for p in sorted((data / "dic_hela" / "01_ST").rglob("*.tif"))]
    values = np.unique(frames)
    films = cases(len(frames), labels=tuple(f"label {i}" for i in range(1, len(values))))
    films.load = lambda case: (
        Image(np.zeros(frames[0].shape, np.float32)),
        np.searchsorted(values, frames[films.cases.index(case)]).astype(np.uint8),
    )
    found = fingerprint(films)
    assert any("learn instances as one label with --foreground" in note for note in of(films, found=found).notes)
    films.labels = tuple(replace(label, name=f"class {label.value}") for label in films.labels)
    assert of(films, found=found).notes == ("said so",)


def test_rare_classes_of_pictures_are_no_instances():
    rng = np.random.default_rng(0)
    labels = [Label(i, f"label {i}", (1, 1, 1), {}) for i in range(1, 13)]
    scenes = np.geomspace(200, 60000, 12) * np.exp(rng.normal(0, 0.3, (8, 12)))  # from a sign to a road
    for k in range(5):
        scenes[np.arange(8) != k, k] = 0
    assert not numbered_instances(labels, np.c_[np.full(8, 1e5), scenes], True)
