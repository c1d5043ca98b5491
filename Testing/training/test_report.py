"""report.html: one file, nothing from outside, the right figures; and the pictures in it, voxel for voxel."""

import base64
import hashlib
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("monai", reason="MONAI is not installed")
pytest.importorskip("lightning", reason="Lightning is not installed")
pytest.importorskip("jinja2", reason="Jinja2 is not installed")
pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
from PIL import Image as Picture  # noqa: E402
from unetseg_training import metrics, report  # noqa: E402
from unetseg_training.live import LiveFile  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Image  # noqa: E402

NAMES = ("a<b>", "two")


class Page(HTMLParser):
    """What a browser would build: tags that close, every address, the table's cells."""

    VOID = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tables, self.texts = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data", "poster", "srcset")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th", "button") and self.tables:
            self.tables[-1][-1][-1] += data


def cases(count=8):
    rng = np.random.default_rng(0)
    labels = [metrics.Label(i, n, (0, 0, 0), {}) for i, n in enumerate(NAMES, 1)]
    rows = []
    for i in range(count):
        truth = np.zeros((6, 20, 20), np.uint8)
        truth[1:5, 3:9, 3:9], truth[1:5, 12:18, 8:16] = 1, 2
        if i == 3:
            truth[truth == 1] = 0
        found = np.roll(truth, i % 4, 2)
        p = np.stack([np.clip((found == k) + rng.normal(0, 0.2, truth.shape), 0, 1) for k in (1, 2)]).astype(np.float32)
        for name, row in metrics.score(found, truth, (1, 1, 2), labels, p).items():
            rows.append({"case": f"case & {i}", "patient": str(i), "label": name, **row})
    return rows


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run."""
    rows = cases()
    metrics.write(tmp_path, rows, metrics.summary(rows, tolerance_mm=1.0, held_out="fold 0 of 5", command="unetseg-train evaluate RUN"))
    file = LiveFile(tmp_path / "live.jsonl")
    file.write("start", step=0, epoch=0, format=1, labels=NAMES, steps=40)
    for step in range(1, 41):
        file.write("step", step=step, epoch=0, loss=1 / step, learning_rate=1e-3 / step, seconds_per_step=0.1)
        if step % 10 == 0:
            each = {n: step / 50 for n in NAMES}
            best = {"dice": step / 50, "step": step}
            file.write(
                "validation", step=step, epoch=0, loss=1 / step, dice=step / 50, dice_per_class=each, best=best, seconds_per_step=0.1
            )
    file.write("end", step=40, epoch=0, reason="stopped", message="ended before all planned steps")
    facts = {
        "config": {"model": {"name": "my-model"}, "fit": {"batch": 4}, "labels": [{"name": "x"}]},
        "seed": 7,
        "data": {"train": {"c1": "ab", "c2": "cd"}},
    }
    (tmp_path / "run.json").write_text(json.dumps(facts), "utf-8")
    (tmp_path / "plan.md").write_text("patch 64: <fits>", "utf-8")
    (tmp_path / "finetune.json").write_text(
        json.dumps(
            {
                "sentence": "From toy 1.0.0: 10 of 10 tensors kept.",
                "base": {"cases": 5, "before": {"mean": 0.9, "low": 0.8, "high": 0.95}, "after": {"mean": 0.89, "low": 0.8, "high": 0.95},
                         "change": {"mean": -0.01, "low": -0.02, "high": 0.0}, "verdict": "It still knows what it knew."},
            }
        ),
        "utf-8",
    )  # fmt: skip
    return tmp_path


def test_one_file_that_asks_for_nothing_else(run):
    path = report.write(run)
    text = path.read_text("utf-8")
    page = Page(text)
    assert f"<h1>my-model, {run.name}</h1>" in text
    assert page.open == [] and path == run / "report.html"
    assert page.addresses and all(a.startswith("data:image/") for a in page.addresses)
    without = re.sub(r"data:image/[^\"]*", "", text)
    assert "http" not in without.replace("http-equiv", "") and "@import" not in text and "url(" not in without
    assert "default-src 'none'" in text and "a&lt;b&gt;" in text and "<fits>" not in text
    assert report.write(run).read_text("utf-8").split("</h1>")[0] == text.split("</h1>")[0]


def test_its_figures_are_those_of_the_run(run):
    page = Page(report.write(run).read_text("utf-8"))
    facts = json.loads((run / "metrics.json").read_text("utf-8"))
    text = " ".join(" ".join(page.texts).split())
    for part in (
        f"{facts['summary']['dice']['mean']:.3f}", "fold 0 of 5", "unetseg-train evaluate RUN", "best Dice 0.800 at step 40",
        "Surface Dice at 1.0 mm", "The training was stopped at step 40.", "From toy 1.0.0", "-0.010 (-0.020 to 0.000)", "still knows",
        "2 cases, SHA-256",
    ):  # fmt: skip
        assert part in text, part
    every = next(t for t in page.tables if t[0][0] == "Case")
    assert len(every) == 1 + len(facts["rows"])
    column = every[0].index("Dice")
    dice = [float(r[column]) for r in every[1:]]
    assert dice == sorted(dice) and dice == sorted(round(r["dice"], 3) for r in facts["rows"])
    by_label = next(t for t in page.tables if t[0][0] == "Label")
    assert by_label[1][0] == "a<b>" and by_label[1][-2:] == ["0 of 7", "0"]
    settings = [r for t in page.tables for r in t]
    assert ["fit.batch", "4"] in settings and ["labels[0].name", "x"] in settings and ["seed", "7"] in settings


def test_a_run_that_has_just_begun_has_a_report_too(tmp_path):
    with pytest.raises(UserError, match="neither live.jsonl nor metrics.json"):
        report.write(tmp_path)
    file = LiveFile(tmp_path / "live.jsonl")
    file.write("start", step=0, epoch=0, format=1, labels=[], steps=None)
    assert "No case was scored yet" in report.write(tmp_path).read_text("utf-8")
    (tmp_path / "metrics.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match="metrics.json cannot be read"):
        report.write(tmp_path)


def test_one_patient_has_no_interval(tmp_path):
    rows = cases(1)
    metrics.write(tmp_path, rows, metrics.summary(rows))
    assert "one patient, no interval" in report.write(tmp_path).read_text("utf-8")


@pytest.mark.parametrize("reason", ["failed", "stopped"])
def test_a_run_that_was_resumed_has_not_ended_as_it_did_before(tmp_path, reason):
    file = LiveFile(tmp_path / "live.jsonl")
    file.write("step", step=20, epoch=0, loss=1.0)
    file.write("end", step=20, epoch=1, reason=reason, message="The disk is full.")
    assert f"The training {'was ' * (reason == 'stopped')}{reason} at step 20." in report.write(tmp_path).read_text("utf-8")
    LiveFile(tmp_path / "live.jsonl", 20).write("step", step=21, epoch=1, loss=0.9)
    text = report.write(tmp_path).read_text("utf-8")
    assert "at step 20." not in text and "The disk is full." not in text


def test_figures_of_a_cell_have_the_decimals_they_need(tmp_path):
    rows = [{**r, **dict.fromkeys(("hausdorff_mm", "hausdorff95_mm", "volume_ml", "truth_ml"), 0.000123)} for r in cases(1)]
    metrics.write(tmp_path, rows, metrics.summary(rows))
    text = report.write(tmp_path).read_text("utf-8")
    assert text.count(">0.00012<") == 4 * len(rows) + 2 * len(NAMES)  # each case's, and the means of the distances


def test_scores_of_other_weights_are_not_these(run):
    data = json.loads((run / "metrics.json").read_text("utf-8"))
    (run / "best.safetensors").write_bytes(b"one")
    data["summary"]["weights"] = hashlib.sha256(b"one").hexdigest()
    (run / "metrics.json").write_text(json.dumps(data), "utf-8")
    (run / "pictures").mkdir()
    (run / "pictures" / "worst-a.png").write_bytes(b"\x89PNG\r\n\x1a\nx")
    (run / "pictures" / "worst.json").write_text('[{"case": "a", "file": "worst-a.png"}]')
    text = report.write(run).read_text("utf-8")
    assert "Every case" in text and "The worst cases" in text
    (run / "best.safetensors").write_bytes(b"two")
    text = report.write(run).read_text("utf-8")
    assert "metrics.json is of other weights than these (run evaluate again)" in text and "The training</h2>" in text
    assert "Every case" not in text and "The worst cases" not in text and "Dice, mean" not in text


def test_no_other_file_than_the_runs_own_pictures_gets_into_it(run, tmp_path_factory):
    """A run on a shared disk may be anyone's, and its report says no more than the run's folder holds."""
    other = tmp_path_factory.mktemp("other")
    png, secret = b"\x89PNG\r\n\x1a\nsecret", other / "secret.png"
    (run / "pictures").mkdir()
    for path in (secret, run / "secret.png", run / "pictures" / "worst-a.png"):
        path.write_bytes(png)
    (run / "pictures" / "worst-b.png").write_bytes(b"secret")  # as a link to another file
    (run / "pictures" / "example-b.png").write_bytes(b"secret")
    names = [str(secret), "../secret.png", "..\\secret.png", "worst-b.png", "none.png", None]
    listed = [{"case": f"case {i}", "file": name} for i, name in enumerate([*names, "worst-a.png"])]
    (run / "pictures" / "worst.json").write_text(json.dumps(listed))
    pictures = [a for a in Page(report.write(run).read_text("utf-8")).addresses if a.startswith("data:image/png")]
    assert pictures == ["data:image/png;base64," + base64.b64encode(png).decode()]
    if sys.platform != "win32":  # where links need rights
        (other / "key").write_text("a private key")
        (run / "plan.md").unlink()
        (run / "plan.md").symlink_to(other / "key")
        assert "a private key" not in report.write(run).read_text("utf-8")


def svg(address):
    return base64.b64decode(address.partition(",")[2]).decode()


def test_odd_and_many_labels_are_drawn(tmp_path):
    names = ["$a_$b$", "_c", *(f"n{i:02}" for i in range(14))]
    lines = [{"event": "step", "step": s, "loss": 1 / s, "learning_rate": 0.1**s} for s in (1, 2, 3)]
    lines += [{"event": "validation", "step": s, "loss": 1.0, "dice": 0.5, "dice_per_class": dict.fromkeys(names, 0.5)} for s in (1, 2)]
    text = svg(report._curves(lines))
    assert all(f">{n}<" in text for n in ("$a_$b$", " _c", "n07", "and 6 more", "mean")) and ">n08<" not in text
    assert ">$\\mathdefault" not in text  # the axis of the rates
    rows = [{**row, "label": name} for row in cases() if row["label"] == "two" for name in names]
    metrics.write(tmp_path, rows, metrics.summary(rows))
    text = report.write(tmp_path).read_text("utf-8")
    assert "Of the 16 labels the first 7 are drawn; the table has all." in text
    assert svg(re.search(r'<img src="([^"]*)" alt="Dice of each case', text)[1]).count("> _c") == 3  # axis and two legends


def colours(png):
    pixels = np.asarray(Picture.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return pixels, *((np.abs(pixels - [int(c[i : i + 2], 16) for i in (1, 3, 5)]).sum(-1) < 60) for c in (report.TRUTH, report.FOUND))


def test_the_picture_shows_both_outlines_where_they_are():
    image = Image(np.zeros((20, 60, 60), np.float32), (1.0, 1.0, 2.0))
    truth, found = np.zeros((2, 20, 60, 60), np.uint8)
    truth[8:12, 10:30, 10:30] = 1  # the patient's right (low x) and anterior (low y)
    found[8:12, 10:30, 40:50] = 1
    png = report.overlay(image, truth, found, title="x")
    pixels, green, magenta = colours(png)
    assert pixels.shape[1] == 1400 and 370 < pixels.shape[0] < 400
    axial = slice(0, 350)
    body = slice(40, None)  # without the heading
    gy, gx = np.nonzero(green[body, axial])
    my, mx = np.nonzero(magenta[body, axial])
    assert len(gx) > 100 and len(mx) > 100
    scale = (gx.max() - gx.min()) / 20  # pixels a mm, of the 20 mm wide truth
    assert (gy.max() - gy.min()) / scale == pytest.approx(20, abs=0.5)
    assert (mx.max() - mx.min()) / scale == pytest.approx(10, abs=0.5) and (mx.min() - gx.min()) / scale == pytest.approx(30, abs=0.5)
    coronal = slice(352, 698)
    gy, _ = np.nonzero(green[body, coronal])
    assert (gy.max() - gy.min()) / scale == pytest.approx(8, abs=0.5)  # 4 slices of 2 mm


def test_each_panel_has_the_letters_of_its_plane(monkeypatch):
    """Left, right, top, bottom: in radiological convention the patient's right is on the left, as is the front in a sagittal view."""
    panels, panel = [], report._panel
    monkeypatch.setattr(report, "_panel", lambda axes, *rest: panels.append(axes) or panel(axes, *rest))
    truth = np.zeros((20, 60, 60), np.uint8)
    truth[8:12, 10:30, 10:30] = 1
    report.overlay(Image(truth.astype(np.float32)), truth, np.roll(truth, 9, 2))
    letters = [{t.get_position(): t.get_text() for t in axes.texts} for axes in panels]
    places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.975), (0.5, 0.025))
    assert ["".join(own[place] for place in places) for own in letters[:3]] == ["RLAP", "RLSI", "APSI"]
    # And it is so: low x, the patient's right, lies on the left; low y, the front, on top or left; high z on top.
    assert [axes.get_xlim()[0] < axes.get_xlim()[1] for axes in panels[:3]] == [True] * 3
    assert [axes.get_ylim()[0] < axes.get_ylim()[1] for axes in panels[:3]] == [False, True, True]


def test_voxels_that_nobody_judged_differ_from_nothing(monkeypatch):
    seen, shot = [], report._worst_shot
    monkeypatch.setattr(report, "_worst_shot", lambda *given: seen.append(shot(*given)) or seen[-1])
    truth, found = np.zeros((2, 20, 60, 60), np.uint8)
    truth[8:12, 10:20, 10:20] = found[8:12, 10:20, 10:20] = 1
    found[15, 30:33, 30:33] = 1  # wrong
    truth[3, 30:50, 30:50], found[3, 30:50, 30:50] = report.IGNORE, 1
    report.overlay(Image(np.zeros(truth.shape, np.float32)), truth, found)
    assert seen[0][1][0] == 15 and "axial" in seen[0][2]


def test_the_middle_of_a_hollow_structure_is_a_voxel_of_it():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = (rng.random((7, 9, 11)) < 0.1).astype(np.uint8)
        index = np.argwhere(mask)
        near = (((index - index.mean(0)) * (3, 1, 0.5)) ** 2).sum(1)
        at = report._target([mask * 0, mask], (3, 1, 0.5))
        assert mask[at] and np.isclose(near[(index == at).all(1)], near.min(), rtol=1e-4)


def test_turned_images_are_shown_upright():
    image = Image(np.zeros((20, 60, 60), np.float32))
    truth = np.zeros((20, 60, 60), np.uint8)
    truth[8:12, 10:20, 10:20] = 1
    turned = Image(image.array, (1.0, 1.0, 1.0), (59.0, 59.0, 0.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    one = report.overlay(image, truth, truth)
    two = report.overlay(turned, truth[:, ::-1, ::-1], truth[:, ::-1, ::-1])
    assert np.array_equal(colours(one)[0], colours(two)[0])


def test_colour_and_empty_pictures_can_be_drawn():
    rgb = Image(np.random.RandomState(0).randint(0, 255, (3, 1, 40, 50)).astype(np.uint8))
    mask = np.zeros((1, 40, 50), np.uint8)
    assert len(report.overlay(rgb, mask, mask)) > 1000
    mask[0, 5:20, 5:20] = 1
    _, green, _ = colours(report.overlay(rgb, mask, np.zeros_like(mask)))
    assert green[40:].sum() > 100
    assert report.window_of({"mode": "window", "level": -600, "width": 1500}, mask) == (-1350, 150)
    low, high = report.window_of({"mode": "zscore"}, np.arange(1001.0))
    assert (low, high) == (5, 995)


def test_the_worst_cases_are_kept_and_no_others(tmp_path, make_package):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "worst-old.png").write_bytes(b"x")
    worst = report.Worst(tmp_path, keep=2)
    with pytest.raises(UserError, match="The cases have no label thing"):
        metrics.evaluate(make_package(), [("x", Image(np.zeros((4, 16, 16))), np.zeros((4, 16, 16)))], labels=[], seen=worst)
    assert (tmp_path / "pictures" / "worst-old.png").exists()
    items = []
    for i in range(5):
        array = np.zeros((4, 16, 16), np.float32)
        array[1:3, 2:10, 2:10] = 1
        truth = np.roll(array, (2, 0, 4, 1, 3)[i], 2).astype(np.uint8)
        items.append((f"case/{i}", Image(array), truth))
    metrics.evaluate(make_package(), items, surfaces=False, auc=False, seen=worst)
    listed = json.loads((tmp_path / "pictures" / "worst.json").read_text("utf-8"))
    assert [w["case"] for w in listed] == ["case/2", "case/4"]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["worst-case_2.png", "worst-case_4.png", "worst.json"]


def test_letters_of_any_script_are_drawn_with_a_font_that_has_them(recwarn):
    """Of those installed: DejaVu Sans, which Matplotlib brings, has no circled letters and no Chinese ones; its STIX has the former."""
    assert report.fonts("Fall 3, größer\n") == ["DejaVu Sans"]
    assert len(report.fonts("Ⓐ 1")) == 2 and not any(name.startswith("Last Resort") for name in report.fonts("案例Ⓐ"))
    image, mask = Image(np.zeros((6, 8, 8), np.float32)), np.zeros((6, 8, 8), np.uint8)
    report.overlay(image, mask, mask, title="Ⓐ")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
