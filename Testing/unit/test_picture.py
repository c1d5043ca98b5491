"""The picture: right is left, up is anterior or superior, a millimetre is a millimetre, and nothing is left half-written."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from UNetSegmentationLib.image import IDENTITY, Box, Image, UserError, read_image, reorient
from UNetSegmentationLib.inference.predict import Prediction
from UNetSegmentationLib.measure import measure
from UNetSegmentationLib.model import Label
from UNetSegmentationLib.picture import save_picture

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

MAGENTA, GREEN = Label(1, "lesion", (255, 0, 255), {}), Label(2, "other", (0, 255, 0), {})
CYAN = (92, 225, 255)
SIZE = 1600
# Panels in pixels (left, top, right, bottom) for a measured label; without measures they reach 20 to 40 lower.
HALF, MIDDLE, END = 800, 755, 1435
AXIAL, CORONAL = (16, 75, HALF - 8, MIDDLE), (HALF + 8, 75, SIZE - 16, MIDDLE)
SAGITTAL, CLOSE_UP = (16, MIDDLE, HALF - 8, END), (HALF + 8, MIDDLE, SIZE - 16, END)

STORED = {
    "LPS": np.eye(3),
    "RAS": np.diag([-1.0, -1.0, 1.0]),
    "left-handed": np.diag([1.0, 1.0, -1.0]),
    "sagittal": np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
    "coronal": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]),
}


def head(direction, place, radius=12.0, size=80.0, spacing=(1.0, 1.0, 1.0), value=1):
    """A cube of `size` mm around the origin with a spherical lesion at `place` (LPS mm), stored along `direction`."""
    direction = np.asarray(direction, float)
    counts = [round(size / s) for s in spacing]
    origin = direction @ (-(np.array(counts) - 1) / 2 * spacing)
    empty = np.zeros(counts[::-1], np.uint8)
    image = Image(empty, tuple(spacing), tuple(map(float, origin)), tuple(float(v) for v in direction.ravel()))
    index = np.stack(np.indices(empty.shape)[::-1], -1)
    at = index @ image.matrix[:3, :3].T + image.matrix[:3, 3]
    labels = value * (np.linalg.norm(at - place, axis=-1) <= radius)
    return image.like((60 * (labels > 0)).astype(np.int16)), result(image.like(labels.astype(np.uint8)))


def result(labels, defs=(MAGENTA, GREEN)):
    return Prediction(labels, defs, "toy-1.0.0", Box.whole(labels.shape))


def draw(image, prediction, path, **options):
    save_picture(image, prediction, path, **{"window": (-100, 200), **options})
    with PIL.open(path) as picture:
        assert picture.format == "PNG" and picture.size == (SIZE, SIZE)
        return np.asarray(picture.convert("RGB")).astype(int)


def where(pixels, color, panel, tolerance=60):
    """Rows and columns of the pixels near a colour in a panel, from the panel's middle (right and down positive)."""
    left, top, right, bottom = panel
    part = pixels[top:bottom, left:right]
    rows, columns = np.nonzero(np.abs(part - color).max(-1) <= tolerance)
    return rows - (bottom - top) / 2, columns - (right - left) / 2


def side(pixels, panel, color=MAGENTA.color):
    """(right or left, lower or upper) of the panel's middle, where all of the colour lies."""
    rows, columns = where(pixels, color, panel)
    assert len(rows) > 20
    assert abs(np.median(rows)) > 50 and abs(np.median(columns)) > 50
    return ("right" if np.median(columns) > 0 else "left"), ("lower" if np.median(rows) > 0 else "upper")


@pytest.mark.parametrize("stored", STORED)
def test_left_anterior_superior(tmp_path, stored):
    """The patient's left is the screen's right; anterior is up, or left in sagittal; superior is up."""
    image, prediction = head(STORED[stored], (22, -22, 22))
    pixels = draw(image, prediction, tmp_path / "x.png")
    assert side(pixels, AXIAL) == ("right", "upper")
    assert side(pixels, CORONAL) == ("right", "upper")
    assert side(pixels, SAGITTAL) == ("left", "upper")


def test_right_posterior_inferior(tmp_path):
    image, prediction = head(STORED["RAS"], (-22, 22, -22))
    pixels = draw(image, prediction, tmp_path / "x.png")
    assert side(pixels, AXIAL) == ("left", "lower")
    assert side(pixels, CORONAL) == ("left", "lower")
    assert side(pixels, SAGITTAL) == ("right", "lower")


def test_the_liver_is_on_the_screens_left(tmp_path, data):
    """A real abdomen with flipped axes: the liver is the patient's right, above the middle of this scan."""
    image, labels = (read_image(data / "totalseg" / f"example_{n}.nii.gz") for n in ("ct", "seg117"))
    liver = result(image.like((labels.array == 5).astype(np.uint8)))
    pixels = draw(image, liver, tmp_path / "x.png")
    assert side(pixels, CORONAL) == ("left", "upper")
    assert np.median(where(pixels, MAGENTA.color, AXIAL)[1]) < -50
    # The spine, bright at this window, is in the axial panel's lower half.
    rows, _ = where(draw(image, liver, tmp_path / "y.png", window=(300, 700)), (255, 255, 255), AXIAL, 5)
    assert np.median(rows) > 0


def test_an_oblique_image_takes_the_nearest_axes(tmp_path, data):
    image = read_image(data / "odd_files" / "CT_pitch.nii.gz")
    canonical, orientation = reorient(image)
    array = np.zeros(canonical.shape, np.uint8)
    z, y, x = canonical.shape
    array[z - 12 : z - 4, y // 5 : y // 5 + 20, -40:-20] = 1  # superior, anterior, left
    prediction = result(image.like(np.ascontiguousarray(orientation.original(array))))
    pixels = draw(image, prediction, tmp_path / "x.png", window=(0, 255))
    assert side(pixels, CORONAL) == ("right", "upper")
    assert side(pixels, SAGITTAL) == ("left", "upper")


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 5.0), (2.0, 0.8, 1.0)])
def test_a_sphere_is_round_in_every_panel(tmp_path, spacing):
    image, prediction = head(np.eye(3), (0, 0, 0), radius=20, spacing=spacing)
    pixels = draw(image, prediction, tmp_path / "x.png")
    for panel in (AXIAL, CORONAL, SAGITTAL):
        rows, columns = where(pixels, MAGENTA.color, panel)
        assert np.ptp(columns) / np.ptp(rows) == pytest.approx(1, abs=0.14)
        assert 0.42 < np.ptp(rows) / 665 < 0.58  # 40 of the 80 mm that the panel's height shows


def test_the_crosshair_and_close_up_follow_the_largest_component(tmp_path):
    image, prediction = head(np.eye(3), (22, -22, 22))
    array = prediction.labels.array.copy()
    array[2:4, 70:74, 2:6] = 2
    prediction = result(image.like(array))
    pixels = draw(image, prediction, tmp_path / "x.png")
    close_up = (CLOSE_UP[0], CLOSE_UP[1] - 20, CLOSE_UP[2], CLOSE_UP[3] - 40)
    assert len(where(pixels, MAGENTA.color, close_up)[0]) > 100
    assert not len(where(pixels, GREEN.color, close_up)[0])


def test_callipers_are_drawn_when_measured(tmp_path):
    image, prediction = head(np.eye(3), (10, 0, 0))
    plain = draw(image, prediction, tmp_path / "x.png")
    assert not len(where(plain, CYAN, CLOSE_UP)[0])
    entry = {
        "value": 1,
        "longest_mm": 24.0,
        "perpendicular_mm": 20.0,
        "longest_points": [(10, -12, 0.5), (10, 12, 0.5)],
        "perpendicular_points": [(0, 0, 0.5), (20, 0, 0.5)],
        "mean_hu": None,
    }
    pixels = draw(image, prediction, tmp_path / "y.png", measures=[entry])
    rows, columns = where(pixels, CYAN, CLOSE_UP, 40)
    line = columns[np.abs(rows - np.median(rows)) < 3]
    outline = where(pixels, MAGENTA.color, CLOSE_UP)[1]
    assert len(line) > 100 and 0.7 < np.ptp(line[np.abs(line) < 300]) / np.ptp(outline) < 1.4
    # They lie in one slice only: on another, none is drawn.
    away = {**entry, "perpendicular_points": [(0, 0, 20.5), (20, 0, 20.5)]}
    assert not len(where(draw(image, prediction, tmp_path / "z.png", measures=[away]), CYAN, CLOSE_UP, 40)[0])


def test_measures_of_measure_py(tmp_path):
    """What the rest of the program hands over, empty labels among it."""
    image, prediction = head(STORED["RAS"], (10, 0, 0))
    measures = measure(prediction.labels, prediction.label_defs, image)
    assert measures[1]["longest_mm"] is None
    pixels = draw(image, prediction, tmp_path / "x.png", measures=measures, title=r"50 % of $x^2 \frac", unit="HU")
    assert len(where(pixels, CYAN, CLOSE_UP)[0]) > 50


def test_the_close_up_of_thick_slices_shows_one_of_them(tmp_path):
    """Where they were measured: in axial panels both diameters would lie across the stack."""
    turned = np.linalg.qr(np.array([[0.70, 0.1, 0.7], [0.67, -0.44, -0.6], [-0.25, -0.89, 0.4]]))[0]
    for name, direction in {"short axis": turned, "coronal": STORED["coronal"]}.items():
        image, prediction = head(direction, (0, 0, 0), radius=20, spacing=(1, 1, 8))
        pixels = draw(image, prediction, tmp_path / f"{name}.png", measures=measure(prediction.labels, (MAGENTA,), image))
        rows, columns = where(pixels, MAGENTA.color, CLOSE_UP)
        assert np.ptp(columns) / np.ptp(rows) == pytest.approx(1, abs=0.05)
        assert len(where(pixels, CYAN, CLOSE_UP, 40)[0]) > 100


def test_a_diameter_that_crosses_the_slices_is_drawn_in_none(tmp_path):
    image, prediction = head(np.eye(3), (10, 0, 0))
    across = {"value": 1, "perpendicular_points": [(0, 0, -9.5), (20, 0, 10.5)], "longest_points": [(10, -12, 0.5), (10, 12, 0.5)]}
    assert not len(where(draw(image, prediction, tmp_path / "x.png", measures=[across]), CYAN, CLOSE_UP, 40)[0])


def test_nothing_found(tmp_path):
    image, prediction = head(np.eye(3), (500, 0, 0))
    pixels = draw(image, prediction, tmp_path / "x.png", measures=measure(prediction.labels, prediction.label_defs, image))
    assert not len(where(pixels, MAGENTA.color, (0, 0, SIZE, SIZE))[0])


def test_many_labels(tmp_path):
    image, _ = head(np.eye(3), (0, 0, 0))
    array = np.zeros(image.shape, np.uint16)
    for i in range(40):
        array[30:50, 2 * i : 2 * i + 2, 20:60] = 7 * i + 1
    defs = tuple(Label(7 * i + 1, f"a long name of a label that is number {i}", (6 * i, 255 - 6 * i, 128), {}) for i in range(40))
    draw(image, result(image.like(array), defs), tmp_path / "x.png")


@pytest.mark.parametrize("case", ["grey", "rgb", "crop", "coronal slice", "oblique slice", "nan", "flat"])
def test_odd_images(tmp_path, case):
    image, prediction = head(np.eye(3), (0, 0, 0))
    box = {"coronal slice": Box((0, 40, 0), (80, 41, 80)), "crop": Box((38, 38, 38), (41, 44, 45))}
    if case in box:
        image, prediction = image.crop(box[case]), result(prediction.labels.crop(box[case]))
    elif case == "nan":
        array = image.array.astype(np.float32)
        array[:40] = np.nan
        image = image.like(array)
    elif case == "flat":
        draw(image, prediction, tmp_path / "x.png", window=(5, 5))
        return
    else:
        direction = STORED["sagittal"] if case == "oblique slice" else np.eye(3)
        array = image.array[40:41] if case != "rgb" else np.repeat(image.array[None, 40:41], 3, 0).astype(np.uint8)
        image = Image(array, direction=tuple(float(v) for v in direction.ravel()))
        prediction = result(image.like(prediction.labels.array[40:41]))
    pixels = draw(image, prediction, tmp_path / "x.png", measures=measure(prediction.labels, (MAGENTA,), image))
    assert len(where(pixels, MAGENTA.color, (0, 0, SIZE, END))[0]) > 100


def test_one_slice_gets_the_whole_sheet(tmp_path):
    """A picture file: one panel, as stored (first row up, first column left), round where it is round."""
    y, x = np.ogrid[:100, :100]
    labels = (((y - 30) ** 2 + (x - 65) ** 2) < 20**2).astype(np.uint8)[None]
    image = Image(100 * labels)
    assert image.direction == IDENTITY
    pixels = draw(image, result(image.like(labels)), tmp_path / "x.png")
    rows, columns = where(pixels, MAGENTA.color, (16, 75, SIZE - 16, END))
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), rel=0.05)
    assert np.ptp(rows) > 450 and rows.mean() < -150 and columns.mean() > 100


def test_only_png(tmp_path):
    with pytest.raises(UserError, match=".png"):
        save_picture(*head(np.eye(3), (0, 0, 0)), tmp_path / "x.jpg", (0, 100))
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_what_was(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, file, **options):
        open(file, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.png"
    path.write_bytes(b"before")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(UserError, match="No space"):
        save_picture(*head(np.eye(3), (0, 0, 0)), path, (0, 100))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.png", b"before")]


def test_says_what_to_install(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib$"):
        save_picture(*head(np.eye(3), (0, 0, 0)), tmp_path / "x.png", (0, 100))


def test_no_global_state(tmp_path):
    """Importing costs no matplotlib, drawing no pyplot."""
    code = """
import sys
import numpy as np
from UNetSegmentationLib import picture
from UNetSegmentationLib.image import Box, Image
from UNetSegmentationLib.inference.predict import Prediction
assert "matplotlib" not in sys.modules
image = Image(np.zeros((4, 5, 6), np.uint8))
picture.save_picture(image, Prediction(image, (), "toy-1.0.0", Box.whole(image.shape)), sys.argv[1], (0, 1))
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2] / "UNetSegmentation")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").stat().st_size > 1000
