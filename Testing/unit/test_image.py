"""Images: files in and out, orientation, resampling, boxes; every voxel stays where it was in the patient."""

import contextlib
import ctypes
import gzip
import itertools
import locale
import math
import ntpath
import os
import shutil
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from UNetSegmentationLib import files
from UNetSegmentationLib.files import atomic_path, check_writable
from UNetSegmentationLib.image import (
    Box,
    Grid,
    Image,
    SeveralSeries,
    UserError,
    _check_complete,
    _take_utf8_names,
    check_geometry,
    from_sitk,
    length_unit,
    list_series,
    of_channels,
    read_image,
    reorient,
    resample,
    resample_back,
    sample,
    slices_across,
    to_sitk,
    write_image,
)

ORIENTATIONS = [(o, s) for o in itertools.permutations(range(3)) for s in itertools.product((1, -1), repeat=3)]


def rotation(*degrees: float) -> np.ndarray:
    """About x, then y, then z."""
    out = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        m = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        m[i, i] = m[j, j] = math.cos(angle)
        m[j, i] = math.sin(angle)
        m[i, j] = -math.sin(angle)
        out = m @ out
    return out


def oblique(array: np.ndarray) -> Image:
    direction = tuple(float(v) for v in rotation(12, -20, 35).ravel())
    return Image(array, (0.7, 0.8, 2.5), (-31.25, 112.5, -407.75), direction)


def volume(dtype: str = "int16", shape: tuple[int, ...] = (7, 9, 11)) -> np.ndarray:
    return np.random.default_rng(3).integers(-1000 if dtype[0] != "u" else 0, 1000, shape).astype(dtype)


def same_place(a: Image, b: Image, tolerance: float = 1e-3) -> bool:
    return a.same_grid(b, tolerance) and np.allclose(a.spacing, b.spacing, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
def test_volumes_come_back_as_written(tmp_path, suffix, dtype):
    image = oblique(volume(dtype))
    write_image(image, tmp_path / f"a{suffix}")
    back = read_image(tmp_path / f"a{suffix}")
    assert back.array.dtype == dtype and np.array_equal(back.array, image.array)
    assert same_place(back, image)
    assert back.source == tmp_path / f"a{suffix}"


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_channels_come_back_as_written(tmp_path, suffix):
    image = oblique(volume("float32", (3, 4, 5, 6)))
    write_image(image, tmp_path / f"a{suffix}")
    back = read_image(tmp_path / f"a{suffix}")
    assert back.n_channels == 3 and np.array_equal(back.array, image.array) and same_place(back, image)


def test_metadata_reaches_the_header(tmp_path):
    write_image(oblique(volume()), tmp_path / "a.nrrd", {"Segment0_Name": "a nodule"})
    assert sitk.ReadImage(str(tmp_path / "a.nrrd")).GetMetaData("Segment0_Name") == "a nodule"


def test_arrays_of_types_that_no_file_has_are_written(tmp_path):
    """As a person's masks (result == 1), half precision, and what nibabel reads from a big-endian NIfTI."""
    values = volume() % 2
    for given, kept in (("bool", "uint8"), ("float16", "float32"), (">i2", "int16"), (">f8", "float32")):
        write_image(oblique(values.astype(given)), tmp_path / "a.nrrd")
        back = read_image(tmp_path / "a.nrrd").array
        assert back.dtype == kept and np.array_equal(back, values)


@pytest.mark.parametrize(("suffix", "dtype"), [(".png", "uint8"), (".png", "uint16"), (".tif", "uint16"), (".tif", "float32")])
def test_grey_pictures_are_one_slice(tmp_path, suffix, dtype):
    picture = volume(dtype, (1, 9, 13))
    write_image(Image(picture), tmp_path / f"a{suffix}")
    back = read_image(tmp_path / f"a{suffix}")
    assert back.array.dtype == dtype and np.array_equal(back.array, picture)


def test_colours_are_channels(tmp_path):
    colours = volume("uint8", (9, 13, 3))
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(tmp_path / "a.png"))
    back = read_image(tmp_path / "a.png")
    assert back.n_channels == 3 and np.array_equal(back.array[:, 0], np.moveaxis(colours, -1, 0))


def test_a_volume_is_no_picture_and_other_suffixes_are_refused(tmp_path):
    with pytest.raises(UserError, match="7 slices"):
        write_image(Image(volume("uint8")), tmp_path / "a.png")
    for name in ("a.mhd", "a.nhdr", "a.hdr", "a.xyz", "a"):
        with pytest.raises(UserError, match="end it in .nii.gz"):
            write_image(Image(volume()), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_four_dimensional_nifti_is_channels(data):
    image = read_image(data / "odd_files" / "pcasl.nii.gz")
    whole = sitk.ReadImage(str(data / "odd_files" / "pcasl.nii.gz"))
    assert image.array.shape == (10, 20, 68, 52)
    assert image.spacing == whole.GetSpacing()[:3] and image.origin == whole.GetOrigin()[:3]
    frame = whole[:, :, :, 4]
    assert np.array_equal(image.array[4], sitk.GetArrayViewFromImage(frame))
    # What we build of the 4x4 direction places the corner where ITK does.
    corner = whole.TransformIndexToPhysicalPoint((51, 67, 19, 4))[:3]
    np.testing.assert_allclose(image.index_to_point((51, 67, 19)), corner, atol=1e-3)


def test_files_on_one_grid_are_channels(data):
    folder = data / "brats2015_pat0006"
    files = [folder / "Flair_subtrMeanDivStd.nii.gz", folder / "T1c_subtrMeanDivStd.nii.gz"]
    both, second = read_image(files), read_image(files[1])
    assert both.array.shape == (2, 155, 240, 240) and np.array_equal(both.array[1], second.array)
    assert same_place(both, second)
    assert read_image(files[:1]).array.ndim == 3


@pytest.mark.parametrize("other", [Image(volume("int16", (7, 9, 12))), Image(volume(), (1, 1, 1.1)), Image(volume(), origin=(0, 0.5, 0))])
def test_files_on_different_grids_are_refused(tmp_path, other):
    write_image(Image(volume()), tmp_path / "a.nrrd")
    write_image(other, tmp_path / "b.nrrd")
    with pytest.raises(UserError, match="b.nrrd does not lie on the grid of"):
        read_image([tmp_path / "a.nrrd", tmp_path / "b.nrrd"])


def test_doubles_become_floats_and_complex_numbers_are_refused():
    assert from_sitk(sitk.GetImageFromArray(np.ones((3, 3, 3)))).array.dtype == np.float32
    with pytest.raises(UserError, match="magnitude"):
        from_sitk(sitk.GetImageFromArray(np.ones((3, 3, 3), np.complex64)))


def test_five_dimensions_are_refused():
    frames = sitk.JoinSeries([sitk.GetImageFromArray(np.zeros((3, 3, 3, 2), np.float32), isVector=True)] * 2)
    with pytest.raises(UserError, match="more than four dimensions"):
        from_sitk(frames)


def test_to_and_from_sitk_are_inverse():
    for array in (volume(), volume("float32", (2, 4, 5, 6))):
        image = oblique(array)
        assert np.array_equal(from_sitk(to_sitk(image)).array, array) and same_place(from_sitk(to_sitk(image)), image, 1e-9)


# -------------------------------------------------------------------------------------------------------- damaged files


def write_plain(path: Path, compress: bool = True) -> bytes:
    picture = path.suffix in (".png", ".jpg", ".bmp")
    array = volume("uint8", (40, 50)) if picture else volume("int16", (20, 40, 50))
    image = sitk.GetImageFromArray(array)
    if not picture:
        image.SetSpacing((0.7, 0.8, 2.5))
    sitk.WriteImage(image, str(path), compress)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99, -1])
@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.nii.gz", True),
        ("a.nii", False),
        ("a.nrrd", True),
        ("a.nrrd", False),
        ("a.mha", True),
        ("a.mha", False),
        ("a.png", True),
        ("a.jpg", True),
        ("a.bmp", False),
        ("a.tif", False),
        ("a.img", False),
        ("a.img.gz", True),
    ],
)
def test_truncated_files_are_refused(tmp_path, name, compress, kept):
    content = write_plain(tmp_path / name, compress)
    kept = -200 if (name, kept) == ("a.tif", -1) else kept  # it ends in the name of the program that wrote it
    (tmp_path / name).write_bytes(content[: int(len(content) * kept) if kept > 0 else kept])
    for read in {name, "a.hdr"} if name == "a.img" else {name}:
        with pytest.raises(UserError, match=r"a\.\S+ (is cut short or damaged|cannot be read as an image)"):
            read_image(tmp_path / read)


@pytest.mark.parametrize("name", ["a.hdr", "a.img", "a.tif"])
def test_whole_pairs_and_pages_are_read(tmp_path, name):
    write_plain(tmp_path / name, False)
    assert np.array_equal(read_image(tmp_path / name).array, volume("int16", (20, 40, 50)))


@pytest.mark.parametrize(
    ("name", "dpi", "spacing"),
    [("a.tif", 72, 1.0), ("a.jpg", 300, 1.0), ("a.png", 72, 1.0), ("a.tif", 50800, 0.0005), ("a.tif", 36.2857, 0.7)],
)
def test_a_pictures_print_size_is_no_spacing(tmp_path, name, dpi, spacing):
    """A microscope's resolution is one, and what ITK wrote, which has any spacing in inches."""
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    picture.fromarray(volume("uint8", (40, 50))).save(tmp_path / name, dpi=(dpi, dpi))
    assert read_image(tmp_path / name).spacing[:2] == pytest.approx((spacing, spacing), rel=1e-3)


def test_a_size_per_cm_is_a_detectors(tmp_path):
    """Flat panels have pixels of 0.127 mm, which are 200 dpi."""
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    picture.fromarray(volume("uint8", (40, 50))).save(tmp_path / "a.tif", resolution=1 / 0.0127, resolution_unit=3)
    assert read_image(tmp_path / "a.tif").spacing[:2] == pytest.approx((0.127, 0.127), rel=1e-3)


def tiff(array: np.ndarray, big: bool = False, tile: int = 0, **more: int) -> bytes:
    """A TIFF of one page, (y, x) or (y, x, samples). more: further tags, as t274=3."""
    height, width, *samples = array.shape
    tags = {256: width, 257: height, 258: 8 * array.itemsize, 259: 1, 262: 1, 277: (samples or [1])[0]}
    tags |= {int(key[1:]): value for key, value in more.items()}
    tags |= {322: tile, 323: tile, 324: 0, 325: array.nbytes} if tile else {273: 0, 278: height, 279: array.nbytes}
    tags[324 if tile else 273] = start = 16
    at, address = start + array.nbytes, "Q" if big else "I"
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, at) if big else struct.pack("<2sHI8x", b"II", 42, at)
    entries = b"".join(struct.pack(f"<HH{address}{address}", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return head + array.tobytes() + struct.pack("<Q" if big else "<H", len(tags)) + entries + bytes(8 if big else 4)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "how", "read"),
    [
        ((64, 64), "uint16", {}, True),
        ((64, 64), "uint8", {"tile": 64}, True),  # in 8 bits, which they are
        ((64, 64), "uint16", {"t274": 4}, True),
        ((64, 64), "uint16", {"t274": 0}, True),  # no orientation there is, so libtiff turns nothing
        ((64, 64), "uint16", {"t274": 9}, True),
        ((64, 64), "uint16", {"tile": 64}, False),
        ((64, 64), "uint16", {"t274": 3}, False),
        ((64, 64), "uint8", {"t274": 6}, False),
        ((64, 64, 2), "uint8", {}, False),
        ((64, 64, 5), "uint16", {}, False),
    ],
)
def test_a_tiff_that_itk_reads_as_other_numbers_is_refused(tmp_path, shape, dtype, how, read, big):
    """Of 16 bits 0 to 2550 became 0 to 9, and of grey with alpha half a picture's samples a picture of both."""
    array = volume(dtype, shape)
    (tmp_path / "a.tif").write_bytes(tiff(array, big, **how))
    if read:
        assert np.array_equal(of_channels(read_image(tmp_path / "a.tif"), 1).array[0], array[::-1] if how.get("t274") == 4 else array)
    else:
        with pytest.raises(UserError, match="a.tif is tiled, turned or has transparency in a way that would be read wrongly; save it"):
            read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(("dtype", "read"), [("float16", False), ("float32", True)])
def test_a_tiff_of_half_precision_is_refused(tmp_path, dtype, read):
    """ITK takes its bits for whole numbers: 1.5 became 15872."""
    array = np.linspace(-3, 8, 64 * 64, dtype=dtype).reshape(64, 64)
    (tmp_path / "a.tif").write_bytes(tiff(array, t339=3))
    with contextlib.nullcontext() if read else pytest.raises(UserError, match="floating-point numbers of 16 bits, .*; save it with 32"):
        assert np.array_equal(read_image(tmp_path / "a.tif").array[0], array)


@pytest.mark.parametrize(
    ("pages", "depth"),
    [
        ("L L L", 3),
        ("L:0 L:0 small:1", 2),  # marked as a preview, which ITK leaves out
        ("L L:planar", 2),  # of one sample a pixel it says nothing
        ("L small", 0),
        ("L RGB", 0),
        ("L I;16", 0),
        ("small:1 L:0", 0),  # of these two ITK wrote beyond its memory
        ("L:0 small:1 L:0", 0),
        ("L:0 L", 0),
    ],
)
def test_pages_are_slices_where_they_are_alike(tmp_path, pages, depth):
    picture = pytest.importorskip("PIL.TiffImagePlugin", reason="Pillow is not installed")
    grey = picture.Image.fromarray(volume("uint8", (40, 50)))
    with picture.AppendingTiffWriter(str(tmp_path / "a.tif"), True) as file:
        for mode, _, kind in (page.partition(":") for page in pages.split()):
            page = grey.resize((10, 8)) if mode == "small" else grey.convert(mode)
            page.encoderinfo = {}
            page.save(file, format="TIFF", tiffinfo={284: 2} if kind == "planar" else {254: int(kind)} if kind else {})
            file.newFrame()
    if depth:
        image = read_image(tmp_path / "a.tif")
        assert np.array_equal(image.array, [np.asarray(grey)] * depth) and length_unit(image) == "px"
    else:
        with pytest.raises(UserError, match="a.tif has pages of different size or kind; save the one"):
            read_image(tmp_path / "a.tif")


def test_a_print_size_of_a_bigtiff_is_no_spacing(tmp_path):
    content = tiff(volume("uint8", (40, 50)), True, t282=0, t283=0, t296=2)
    for tag in (282, 283):
        content = content.replace(struct.pack("<HHQQ", tag, 4, 1, 0), struct.pack("<HHQII", tag, 5, 1, 72, 1))
    (tmp_path / "a.tif").write_bytes(content)
    assert sitk.ReadImage(str(tmp_path / "a.tif")).GetSpacing()[0] == pytest.approx(25.4 / 72)
    assert read_image(tmp_path / "a.tif").spacing == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("mode", ["LA", "L"])
def test_a_grey_png_with_transparency_is_said_to_be_one(tmp_path, mode):
    picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    grey = picture.fromarray(volume("uint8", (40, 50)))
    grey.convert(mode).save(tmp_path / "a.png", **({"transparency": 0} if mode == "L" else {}))
    with pytest.raises(UserError, match=r"a.png is grey with transparency, which cannot be read; save it without its alpha channel\."):
        read_image(tmp_path / "a.png")


def test_a_picture_has_the_channels_that_are_asked_for(tmp_path):
    grey, colours = volume("uint8", (1, 8, 8)), volume("uint8", (4, 1, 8, 8))
    same = np.stack([grey, grey, grey, grey // 2])
    source = tmp_path / "a.png"
    for array, n, want in (
        (same[:3], 1, grey),
        (same, 1, grey),
        (same[[0, 3]], 1, grey),
        (colours, 3, colours[:3]),
        (same[:3], 3, same[:3]),
    ):
        for image in (Image(array, source=source), Image(array)):  # Slicer's have no file
            assert np.array_equal(of_channels(image, n).channels, want.reshape(n, 1, 8, 8))
    for image in (Image(colours[:3], source=source), Image(same[:3].astype(np.int16)), Image(same[:3], source=tmp_path / "a.nrrd")):
        assert of_channels(image, 1) is image


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_a_flipped_byte_in_compressed_voxels_is_noticed(tmp_path, name):
    content = bytearray(write_plain(tmp_path / name))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / name).write_bytes(bytes(content))
    with pytest.raises(UserError, match="cut short or damaged|cannot be read"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(("compress", "voxels"), [(True, "a.zraw"), (False, "a.raw")])
def test_voxels_in_a_file_of_their_own_are_checked_there(tmp_path, compress, voxels):
    """Of a scan with one byte changed ITK read 8 of 48 slices as others."""
    write_plain(tmp_path / "a.mhd", compress)
    assert np.array_equal(read_image(tmp_path / "a.mhd").array, volume("int16", (20, 40, 50)))
    content = bytearray((tmp_path / voxels).read_bytes())
    content[len(content) // 2] ^= 0x10
    (tmp_path / voxels).write_bytes(bytes(content if compress else content[:-1]))
    with pytest.raises(UserError, match=f"{voxels} is cut short or damaged; copy or export it again"):
        read_image(tmp_path / "a.mhd")


@pytest.mark.parametrize("name", ["A.MHA", "A.NII", "A.NII.GZ", "A.NRRD"])
def test_a_name_in_capitals_is_as_good(tmp_path, name):
    image = Image(volume("int16", (5, 6, 7)))
    write_image(image, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert np.array_equal(read_image(tmp_path / name).array, image.array)


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.bmp"])  # JPEG's library ends the process where the disk is full
def test_pictures_that_lose_values_are_not_written(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is not the name of an image that can be written; end it in .* .tiff"):
        write_image(Image(volume("uint8", (1, 6, 7))), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0, -100])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd"])
def test_a_disk_that_fills_up_leaves_the_former_file(tmp_path, monkeypatch, name, kept):
    write_image(Image(volume("int16", (5, 6, 7))), tmp_path / name)
    before, write = (tmp_path / name).read_bytes(), sitk.WriteImage

    def full(image, path, *rest, **more):
        write(image, path, *rest, **more)
        if ".nii" not in path:
            raise RuntimeError("No space left on device")
        Path(path).write_bytes(Path(path).read_bytes()[:kept])  # which ITK's NIfTI does not notice

    monkeypatch.setattr(sitk, "WriteImage", full)
    with pytest.raises(UserError, match="cannot be written .(not all of it was written|No space left on device).; choose"):
        write_image(Image(volume("int16", (20, 30, 30))), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["b.mhd", "b.mha", "b.nrrd"])
@pytest.mark.parametrize("compress", [True, False])
def test_what_was_converted_from_nifti_keeps_its_fields_and_is_read(tmp_path, name, compress):
    write_plain(tmp_path / "a.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert image.HasMetaDataKey("vox_offset")
    sitk.WriteImage(image, str(tmp_path / name), compress)
    assert np.array_equal(read_image(tmp_path / name).array, sitk.GetArrayFromImage(image))
    if name != "b.mhd":
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="cut short or damaged|cannot be read"):
            read_image(tmp_path / name)


def test_gzip_members_and_trailing_padding_are_accepted(tmp_path):
    write_plain(tmp_path / "a.nii.gz")
    raw = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    want = read_image(tmp_path / "a.nii.gz").array
    (tmp_path / "members.nii.gz").write_bytes(gzip.compress(raw[:5000]) + gzip.compress(raw[5000:]))
    (tmp_path / "padded.nii.gz").write_bytes(gzip.compress(raw) + bytes(100))
    for name in ("members.nii.gz", "padded.nii.gz"):
        assert np.array_equal(read_image(tmp_path / name).array, want)


@pytest.mark.parametrize("name", ["a.nrrd", "a.nii.gz", "a.nii", "a.mha", "a.png", "a.tif", "a.dcm", "a.xyz", "a"])
@pytest.mark.parametrize(("content", "sentence"), [(b"", "is empty"), (b"What a lovely day.\n" * 50, "cannot be read as an image")])
def test_what_is_no_image_is_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_image(tmp_path / name)


def test_a_name_that_begins_with_a_tilde_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="~backup.nrrd does not exist"):
        read_image("~backup.nrrd")
    write_image(Image(volume()), "~backup.nrrd")
    assert np.array_equal(read_image("~backup.nrrd").array, volume())


def test_on_windows_it_is_no_other_persons_folder(monkeypatch):
    home = r"C:\Users\anna"
    monkeypatch.setenv("USERPROFILE", home)
    monkeypatch.setenv("USERNAME", "anna")
    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "name": "nt", "path": ntpath}))
    for name, path in (("~backup.nrrd", "~backup.nrrd"), ("~", home), (r"~\a", rf"{home}\a"), ("~/a", rf"{home}\a")):
        assert ntpath.normpath(files.user_path(name)) == path


def test_missing_files_and_no_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "nowhere.nrrd")
    with pytest.raises(UserError, match="No image"):
        read_image([])
    with pytest.raises(UserError, match="no DICOM image series"):
        read_image(tmp_path)


def with_header(path: Path, old: bytes, new: bytes) -> Path:
    write_plain(path, compress=False)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("a.nrrd", b"space directions: (0.69999999999999996,0,0)", b"space directions: (0,0,0)"),
        ("a.nrrd", b"space directions: (0.69999999999999996,0,0)", b"space directions: (1e6,0,0)"),
        ("a.nrrd", b"space directions: (0.69999999999999996,0,0)", b"space directions: (nan,0,0)"),
        ("a.nrrd", b"space directions: (0.69999999999999996,0,0)", b"space directions: (0.7,0.3,0)"),
        ("a.nrrd", b"sizes: 50 40 20", b"sizes: 50 40 0"),
        ("a.nrrd", b"sizes: 50 40 20", b"sizes: 50 40 -3"),
        ("a.nrrd", b"sizes: 50 40 20", b"sizes: 99999 99999 99999"),
        ("a.mha", b"ElementSpacing = 0.69999999999999996", b"ElementSpacing = 0"),
        ("a.mha", b"ElementSpacing = 0.69999999999999996", b"ElementSpacing = 1e6"),
        ("a.mha", b"DimSize = 50 40 20", b"DimSize = 50 40 0"),
        ("a.mha", b"DimSize = 50 40 20", b"DimSize = 50 40 21"),
        ("a.nii", struct.pack("<f", 0.7), struct.pack("<f", 1e6)),
        ("a.nii", struct.pack("<hhhh", 3, 50, 40, 20), struct.pack("<hhhh", 3, 50, 40, 21)),
    ],
)
def test_absurd_headers_are_refused(tmp_path, name, old, new):
    with pytest.raises(UserError) as error:
        read_image(with_header(tmp_path / name, old, new))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_row_of_voxels_is_no_image(tmp_path):
    path = with_header(tmp_path / "a.nii", struct.pack("<hhhh", 3, 50, 40, 20), struct.pack("<hhhh", 1, 50, 1, 1))
    with pytest.raises(UserError, match="a.nii has one dimension only; choose an image of two or three"):
        read_image(path)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("deflated", [False, True])
def test_a_pixel_size_in_nifti_that_itk_would_take_for_1_mm_is_refused(tmp_path, value, deflated):
    path = with_header(tmp_path / "a.nii", struct.pack("<f", 0.7), struct.pack("<f", value))
    if deflated:
        path = tmp_path / "b.nii.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    with pytest.raises(UserError, match=rf"{value:g} x 0\.8 x 2\.5 mm, which cannot be right"):
        read_image(path)


@pytest.mark.parametrize(
    ("qform", "sform", "rows", "sentence"),
    [
        (0, 1, np.diag([0.7, 0.8, 2.5]), None),
        (1, 1, np.diag([1.4, 0.8, 2.5]), "0.7 x 0.8 x 2.5 mm by its pixdim and 1.4 x 0.8 x 2.5 mm by its sform"),
        (0, 4, np.diag([1.4, 0.8, 2.5]), "by its sform; correct its header"),
        (1, 4, np.diag([1.4, 0.8, 2.5]), None),  # as it lies in a template
        (0, 1, np.array([[0.7, 0, 0], [0, 0.64, 0], [0, 0.48, 2.5]]), "axes that are not at right angles"),
    ],
)
def test_a_nifti_header_that_contradicts_itself_is_refused(tmp_path, qform, sform, rows, sentence):
    """ITK takes the pixdim, and others the sform."""
    path = tmp_path / "a.nii"
    write_plain(path, compress=False)
    content = bytearray(path.read_bytes())
    content[252:256] = struct.pack("<hh", qform, sform)
    content[280:328] = np.c_[rows, [1, 2, 3]].astype("<f4").tobytes()
    path.write_bytes(content)
    if sentence is None:
        assert np.allclose(read_image(path).spacing, (0.7, 0.8, 2.5))
        return
    with pytest.raises(UserError, match=sentence):
        read_image(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spacing": (0.0, 1.0, 1.0)}, "0 x 1 x 1 mm"),
        ({"spacing": (1.0, 1.0, 1e6)}, "cannot be right"),
        ({"spacing": (1.0, math.nan, 1.0)}, "not a number"),
        ({"origin": (math.inf, 0.0, 0.0)}, "not a number"),
        ({"direction": (1.0, 0.0, 0.3, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}, "right angles"),
        ({"direction": (0.0,) * 9}, "right angles"),
        ({"array": np.zeros((0, 4, 4))}, "no voxels"),
        ({"array": np.zeros((0, 4, 4, 4))}, "no voxels"),
        ({"array": np.zeros((4, 4, 4), complex)}, "complex128, not numbers"),
    ],
)
def test_geometry_that_no_scanner_makes_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_geometry(Image(**{"array": np.zeros((4, 4, 4)), **changes}))


# --------------------------------------------------------------------------------------------------------------- DICOM


@pytest.fixture(scope="module")
def slices(data):
    return sorted((data / "lung_gtv_dicom_rtstruct" / "pat_3").glob("DCM_IMG*"))[:8]


def copied(files, folder, edit=lambda i, dataset: None):
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir(parents=True)
    for i, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        edit(i, dataset)
        dataset.save_as(folder / f"{i:03d}.dcm")
    return folder


@pytest.mark.parametrize(
    ("folder", "shape", "spacing", "origin", "extremes"),
    [
        (
            "chest_ct_dicom_LungDx-A0002",
            (30, 512, 512),
            (0.646484375, 0.646484375, 8),
            (-173.1767578125, -294.1767578125, 80),
            (-1024, 1548),
        ),
        ("ct_dicom_jpeg2000", (20, 512, 512), (0.9765625, 0.9765625, 2), (-249.51171875, -437.51171875, -804.5), (-1024, 1839)),
        ("lung_gtv_dicom_rtstruct/pat_3", (46, 137, 136), (0.977, 0.977, 3), (-23.9365, -49.3385, -438.5), (-1000, 1561)),
    ],
)
def test_dicom_series(data, folder, shape, spacing, origin, extremes):
    image = read_image(data / folder)
    assert image.shape == shape and (image.array.min(), image.array.max()) == extremes
    assert image.spacing == pytest.approx(spacing) and image.origin == pytest.approx(origin)
    assert len(image.dicom_files) == shape[0]
    first = read_image(image.dicom_files[0])
    assert np.array_equal(first.array[0], image.array[0]) and first.origin == pytest.approx(image.origin)


def test_the_mask_that_belongs_to_a_series_lies_on_its_grid(data):
    mask = read_image(data / "lung_gtv_dicom_rtstruct" / "pat_3_gtv_expected.nii.gz")
    assert mask.same_grid(read_image(data / "lung_gtv_dicom_rtstruct" / "pat_3"))
    upside_down = read_image(data / "ct_dicom_jpeg2000_seg.nii.gz")
    image = read_image(data / "ct_dicom_jpeg2000")
    assert not upside_down.same_grid(image) and reorient(upside_down)[0].same_grid(image)


def test_slices_of_different_types_keep_their_values(slices, tmp_path):
    """ITK takes the first slice's type for all."""
    image = read_image(copied(slices, tmp_path / "whole"))
    whole, first = image.array.astype(np.float32), int(Path(image.dicom_files[0]).stem)

    def edit(i, dataset):
        values = dataset.pixel_array.astype(np.int32) * int(dataset.RescaleSlope) + int(dataset.RescaleIntercept)
        dataset.RescaleSlope, dataset.RescaleIntercept = "1", "0" if i == first else "-2000"
        dataset.PixelRepresentation = 0
        dataset.PixelData = (values.clip(0) if i == first else values + 2000).astype(np.uint16).tobytes()

    read = read_image(copied(slices, tmp_path / "mixed", edit)).array
    assert np.array_equal(read[1:], whole[1:]) and np.array_equal(read[0], whole[0].clip(0)) and whole[1:].min() < -900


def test_several_series_are_listed_and_read_by_uid(slices, tmp_path):
    def second(i, dataset):
        dataset.SeriesInstanceUID = "1.2.3.4"
        dataset.SeriesDescription = "Lung 3.0"
        dataset.PixelData = bytes(len(dataset.PixelData))

    copied(slices, tmp_path / "scan")
    copied(slices[:5], tmp_path / "scan" / "other", second)
    with pytest.raises(SeveralSeries, match="2 image series") as error:
        read_image(tmp_path / "scan")
    assert error.value.series["1.2.3.4"] == "CT Lung 3.0, 5 images" and "1.2.3.4 (CT Lung 3.0, 5 images)" in str(error.value)
    (first,) = set(error.value.series) - {"1.2.3.4"}
    assert read_image(tmp_path / "scan", "1.2.3.4").shape[0] == 5 and not (read_image(tmp_path / "scan", "1.2.3.4").array + 1000).any()
    assert read_image(tmp_path / "scan", first).shape[0] == 8
    for paths in (tmp_path / "scan", [tmp_path / "scan"]):
        with pytest.raises(UserError, match="holds no series 9.9"):
            read_image(paths, "9.9")
    # As channels: of a folder with one series it is that, and each of the others wants to be told.
    one = copied(slices, tmp_path / "one")
    assert read_image([tmp_path / "scan", one], first).n_channels == 2 == read_image([one, tmp_path / "scan"], first).n_channels
    for uid, n in (("9.1", 8), ("9.2", 5)):
        copied(slices[:n], tmp_path / "two" / uid, lambda i, dataset, uid=uid: setattr(dataset, "SeriesInstanceUID", uid))
    with pytest.raises(SeveralSeries, match="two holds 2"):
        read_image([tmp_path / "scan", tmp_path / "two"], first)
    assert read_image([tmp_path / "scan", tmp_path / "two"], f"{first},9.1").n_channels == 2


def test_a_series_without_a_uid_is_one_of_several_and_chosen_by_its_first_file(slices, tmp_path):
    def bare(i, dataset):
        del dataset.SeriesInstanceUID

    folder, one = copied(slices, tmp_path / "scan"), copied(slices[:5], tmp_path / "one", bare)
    assert read_image(one).shape[0] == 5
    for file in one.iterdir():  # in one folder with the other
        shutil.copy(file, folder / f"bare, {file.name}")
    with pytest.raises(SeveralSeries, match="2 image series; choose one by its UID or, without one, its first file") as error:
        read_image(folder)
    keys = {text.rpartition(", ")[2]: key for key, text in error.value.series.items()}
    assert keys["5 images"] in {f"bare_ {file.name}" for file in one.iterdir()}
    for n in (5, 8):
        image = read_image(folder, keys[f"{n} images"])
        assert image.shape[0] == n and {Path(file).name.startswith("bare") for file in image.dicom_files} == {n == 5}
    copied(slices, tmp_path / "two" / "a", bare), copied(slices[:5], tmp_path / "two" / "b", bare)
    with pytest.raises(SeveralSeries, match=r"2 image series; .* a/\d+.dcm \(CT.*, 8 images\); b/\d+.dcm \(CT.*, 5 images\)") as error:
        read_image(tmp_path / "two")
    assert [read_image(tmp_path / "two", key).shape[0] for key in error.value.series] == [8, 5]
    assert read_image([tmp_path / "two", folder], ",".join((list(error.value.series)[1], keys["5 images"]))).n_channels == 2


def test_other_files_beside_a_series_are_ignored(slices, tmp_path, data, capfd):
    folder = copied(slices, tmp_path / "scan")
    (folder / "notes.txt").write_text("remember")
    (folder / "empty").write_bytes(b"")
    (folder / "subfolder").mkdir()
    shutil.copy(data / "lung_gtv_dicom_rtstruct" / "pat_3" / "DCM_RS_00046.dcm", folder)
    assert list(list_series(folder).values())[0][0].endswith("8 images")
    assert read_image(folder).shape[0] == 8
    assert capfd.readouterr().err == ""


def test_a_dose_is_no_scan(slices, tmp_path):
    def dose(i, dataset):
        dataset.Modality, dataset.SeriesInstanceUID = "RTDOSE", "1.2.3.4"

    copied(slices[:1], copied(slices, tmp_path / "scan") / "dose", dose)
    assert read_image(tmp_path / "scan").shape[0] == 8


def test_a_folder_with_structures_alone_holds_no_images(tmp_path, data):
    shutil.copy(data / "lung_gtv_dicom_rtstruct" / "pat_3" / "DCM_RS_00046.dcm", tmp_path)
    with pytest.raises(UserError, match="no DICOM image series"):
        read_image(tmp_path)


def test_a_missing_slice_is_noticed(slices, tmp_path):
    with pytest.raises(UserError, match=r"6\.00 mm between slices \d and \d, 3\.00 mm elsewhere"):
        read_image(copied(slices[:3] + slices[4:], tmp_path / "scan"))


def test_a_truncated_slice_is_noticed(slices, tmp_path):
    folder = copied(slices, tmp_path / "scan")
    content = (folder / "003.dcm").read_bytes()
    (folder / "003.dcm").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError):
        read_image(folder)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_a_truncated_slice_is_noticed_by_its_length(slices, tmp_path, syntax):
    """SimpleITK 2.5.2, which Slicer has, fills the missing rows and says nothing."""
    dataset = pytest.importorskip("pydicom").dcmread(slices[0])
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(tmp_path / "a.dcm", implicit_vr=syntax.endswith(".1.2"), little_endian=True)
    content = (tmp_path / "a.dcm").read_bytes()
    assert dataset.PixelData in content
    end = content.index(dataset.PixelData) + len(dataset.PixelData)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(tmp_path / "a.dcm"))
    reader.ReadImageInformation()  # of the whole file, since later ones refuse this for a part
    for size, complete in ((len(content), True), (end, True), (end - 1, False), (end // 2, False)):
        (tmp_path / "a.dcm").write_bytes(content[:size])
        with contextlib.nullcontext() if complete else pytest.raises(UserError, match="a.dcm is cut short"):
            _check_complete(tmp_path / "a.dcm", reader)


@pytest.mark.parametrize("kept", [0, 100, 140, 180, 300, 1500, -1000])
def test_a_lost_slice_at_the_end_of_a_series_is_named(slices, tmp_path, data, kept):
    """GDCM leaves it out, and its neighbours are as evenly spaced as before."""
    folder = copied(slices, tmp_path / "scan")
    structures = (data / "lung_gtv_dicom_rtstruct" / "pat_3" / "DCM_RS_00046.dcm").read_bytes()
    for name, content in (("structures.dcm", structures), ("of old.dcm", structures[structures.index(b"\x08\0\x16\0") - 12 :])):
        (folder / name).write_bytes(content)
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + b"\2\0\2\0UI\x16\0" + b"1.2.840.10008.1.3.10\0\0")
    (folder / "._000.dcm").write_bytes(b"macOS")
    last = Path(read_image(folder).dicom_files[-1])
    last.write_bytes(last.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"{last.name} cannot be read \(empty, cut short or damaged"):
        read_image(folder)


def test_what_is_no_slice_of_the_wanted_series_may_lie_beside_it(slices, tmp_path):
    """Of its SOP class too: segmentations, screen shots of reports, an object without pixels, and a cut slice of another series."""
    folder = copied(slices, tmp_path / "scan")
    uid = next(iter(list_series(folder)))

    def other(i, dataset):
        dataset.SeriesInstanceUID, dataset.Modality = f"1.2.3.{400 + i}", ("SEG", "SR", "KO", "CT", "CT")[i]
        if i == 3:
            del dataset.PixelData

    for file in sorted(copied(slices[:5], tmp_path / "others", other).iterdir()):
        shutil.copy(file, folder / f"other {file.name}")
    assert read_image(folder, uid).shape[0] == 8
    cut, content = folder / "other 004.dcm", (folder / "other 004.dcm").read_bytes()
    cut.write_bytes(content[:-1000])
    assert read_image(folder).shape[0] == 8
    cut.write_bytes(content[: content.index(b"1.2.3.404") + 7])  # the name of its series is cut too
    with pytest.raises(UserError, match=r"other 004.dcm cannot be read \(empty, cut short or damaged"):
        read_image(folder)


def test_a_slice_that_lies_there_twice_is_noticed(slices, tmp_path):
    folder = copied(slices, tmp_path / "scan")
    shutil.copy(folder / "003.dcm", folder / "again.dcm")
    with pytest.raises(UserError, match="several images of the same place .*a slice twice"):
        read_image(folder)


@pytest.mark.parametrize("lost", [range(8), [3]])
def test_a_slice_that_does_not_say_where_it_lies_is_named(slices, tmp_path, lost):
    def edit(i, dataset):
        if i in lost:
            del dataset.ImagePositionPatient

    with pytest.raises(UserError, match=r"00\d.dcm does not say where in the patient it lies, .*; export its series again .*, or choose"):
        read_image(copied(slices, tmp_path / "scan", edit))


def test_a_slice_that_says_that_it_lies_at_0_0_0_is_read(slices, tmp_path):
    first = pytest.importorskip("pydicom").dcmread(slices[0]).ImagePositionPatient

    def edit(i, dataset):
        dataset.ImagePositionPatient = [a - b for a, b in zip(dataset.ImagePositionPatient, first)]

    assert read_image(copied(slices, tmp_path / "scan", edit)).shape[0] == 8


@pytest.mark.parametrize("size", [None, [1, 1]])
def test_a_series_without_a_pixel_size_is_refused(slices, tmp_path, size):
    def edit(i, dataset):
        dataset.PixelSpacing = size

    folder = copied(slices, tmp_path / "scan", edit)
    with contextlib.nullcontext() if size else pytest.raises(UserError, match="does not say how large its pixels are; export it again"):
        assert read_image(folder).spacing == (1, 1, 3)


def test_a_series_of_enhanced_files_has_its_pixel_size_in_a_sequence(slices, tmp_path):
    def edit(i, dataset):
        dataset.PixelSpacing = [1, 1]

    source = sorted(copied(slices, tmp_path / "source", edit).iterdir())
    for i in range(8):
        file = multi_frame(source, tmp_path / "scan" / f"{i}.dcm", [i])
    assert read_image(file.parent).spacing == (1, 1, 3)


@pytest.mark.parametrize(
    ("turned", "sine", "read"), [([0], 1.0, False), (range(4), 0.26, False), (range(4), 0.003, False), (range(4), 0.0004, True)]
)
def test_slices_of_several_directions_are_no_volume(slices, tmp_path, turned, sine, read):
    """A localizer's, or stacks along a spine; where these turn about their corner, their places alone do not tell."""

    def turn(i, dataset):
        if i in turned:
            dataset.ImageOrientationPatient = [1, 0, 0, 0, math.sqrt(1 - sine**2), -sine]

    folder = copied(slices, tmp_path / "scan", turn)
    with (
        contextlib.nullcontext() if read else pytest.raises(UserError, match=r"scan lie in several directions .*; keep or export those of")
    ):
        assert read_image(folder).shape[0] == 8


@pytest.mark.parametrize("times", [1, 2])
def test_a_series_in_time_is_no_volume(slices, tmp_path, times):
    places = [float(pytest.importorskip("pydicom").dcmread(f, stop_before_pixels=True).ImagePositionPatient[2]) for f in slices[:times]]

    def again(i, dataset):
        dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], places[i % times]]

    with pytest.raises(UserError, match="several images of the same place"):
        read_image(copied(slices, tmp_path / "scan", again))


@pytest.mark.parametrize(
    ("thickness", "between", "spacing"), [(8, None, 8), (8, 10, 10), (747, None, 1), (None, None, 1), ("", None, 1), (0, None, 1)]
)
def test_a_single_slice_is_as_thick_as_it_says(slices, tmp_path, thickness, between, spacing):
    def edit(i, dataset):
        dataset.SliceThickness, dataset.SpacingBetweenSlices = thickness, between

    folder = copied(slices[:1], tmp_path / "scan", edit)
    for path in (folder, folder / "000.dcm"):
        image = read_image(path)
        assert image.spacing[2] == spacing
        for suffix in (".nii.gz", ".nrrd"):  # its mask, by whoever says 1 mm, lies on it
            write_image(replace(image, spacing=(0.977, 0.977, 1.0)), tmp_path / f"mask{suffix}", {"0018|0050": "8"})
            mask = read_image(tmp_path / f"mask{suffix}")
            assert mask.same_grid(image) and mask.spacing[2] == 1


def multi_frame(slices, path, order, explicit=True, change=None, syntax=None):
    """An enhanced CT whose frame i is slice order[i]; change(i, frame's functional groups)."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    def group(name, **values):
        inner, outer = pydicom.Dataset(), pydicom.Dataset()
        for key, value in values.items():
            setattr(inner, key, value)
        setattr(outer, name, pydicom.Sequence([inner]))
        return outer

    scan = sorted((pydicom.dcmread(f) for f in slices), key=lambda d: d.ImagePositionPatient[2])
    out = pydicom.dcmread(slices[0])
    out.SOPClassUID = out.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    out.file_meta.TransferSyntaxUID = syntax or (ExplicitVRLittleEndian if explicit else ImplicitVRLittleEndian)
    shared, frames = pydicom.Dataset(), []
    shared.update(group("PixelMeasuresSequence", PixelSpacing=out.PixelSpacing))
    for i, k in enumerate(order):
        frame = group("PlanePositionSequence", ImagePositionPatient=scan[k].ImagePositionPatient)
        frame.update(group("PlaneOrientationSequence", ImageOrientationPatient=out.ImageOrientationPatient))
        frame.update(group("PixelValueTransformationSequence", RescaleIntercept=out.RescaleIntercept, RescaleSlope=out.RescaleSlope))
        if change:
            change(i, frame)
        frames.append(frame)
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleIntercept", "RescaleSlope"):
        delattr(out, key)
    out.SharedFunctionalGroupsSequence, out.PerFrameFunctionalGroupsSequence = pydicom.Sequence([shared]), pydicom.Sequence(frames)
    out.NumberOfFrames, out.PixelData = len(order), b"".join(scan[k].PixelData for k in order)
    path.parent.mkdir(exist_ok=True)
    pydicom.dcmwrite(path, out, implicit_vr=not explicit, little_endian=syntax != "1.2.840.10008.1.2.2", force_encoding=True)
    return path


@pytest.mark.parametrize("explicit", [True, False])
def test_a_multi_frame_file_is_the_volume_of_its_slices(slices, tmp_path, explicit):
    want = read_image(copied(slices, tmp_path / "scan"))
    file = multi_frame(slices, tmp_path / "frames" / "a.dcm", range(8), explicit)
    for path in (file, file.parent):
        got = read_image(path)
        assert got.same_grid(want) and np.array_equal(got.channels[0], want.array)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(("order", "sentence"), [(range(8), ""), ([0, 1, 2, 4, 5, 6], "not evenly spaced")])
def test_philips_frames_whose_private_sequence_repeats_their_place(slices, tmp_path, explicit, order, sentence):
    def repeat(i, frame):
        again = type(frame)()
        again.ImagePositionPatient = frame.PlanePositionSequence[0].ImagePositionPatient
        frame.private_block(0x2005, "Philips MR Imaging DD 005", create=True).add_new(0x0F, "SQ", [again])

    file = multi_frame(slices, tmp_path / "frames" / "a.dcm", order, explicit, repeat)
    with pytest.raises(UserError, match=sentence) if sentence else contextlib.nullcontext():
        assert read_image(file).same_grid(read_image(copied(slices, tmp_path / "scan")))


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"])
def test_frames_whose_places_cannot_be_seen_are_refused(slices, tmp_path, syntax):
    file = multi_frame(slices, tmp_path / "frames" / "a.dcm", [1, 0, *range(2, 8)], syntax=syntax)
    with pytest.raises(UserError, match="deflated or big-endian in one file, .*; export it with one slice a file"):
        read_image(file)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(
    ("order", "change", "sentence"),
    [
        ([0, 1, 2, 4, 5, 6], None, r"not evenly spaced: 6\.00 mm between slices 3 and 4, 3\.00 mm elsewhere"),
        ([1, 3, 5, 7, 0, 2, 4, 6], None, "not evenly spaced"),
        ([0, 1, 2, 3, 0, 1, 2, 3], None, "several images of the same place"),
        ([0, 0, 1, 1, 2, 2], None, "several images of the same place"),
        (range(8), lambda i, f: setattr(f.PlanePositionSequence[0], "ImagePositionPatient", [0, i, 3 * i]), "gantry tilt"),
        (
            range(8),
            lambda i, f: setattr(f.PlaneOrientationSequence[0], "ImageOrientationPatient", [1, 0, 0, 0, *((1, 0) if i < 4 else (0, -1))]),
            "in several directions",
        ),
        (
            range(8),
            lambda i, f: setattr(f.PixelValueTransformationSequence[0], "RescaleIntercept", -1000 - i),
            "scaled each in its own way",
        ),
    ],
)
def test_frames_that_are_no_volume_are_noticed(slices, tmp_path, explicit, order, change, sentence):
    """ITK reads all of these, some with a spacing of 1 mm."""
    file = multi_frame(slices, tmp_path / "frames" / "a.dcm", order, explicit, change)
    for path in (file, file.parent):
        with pytest.raises(UserError, match=sentence):
            read_image(path)


@pytest.mark.parametrize(
    "tags",
    [
        {"FrameTime": "33.3"},
        {"FrameTimeVector": ["0", "33.3"]},
        {"FrameIncrementPointer": 0x00181063},
        {"PixelSpacing": None, "CineRate": 30},
        {"PixelSpacing": None, "FrameIncrementPointer": 0x00182002},  # a scanned document's pages
        {"FrameIncrementPointer": [0x00540010, 0x00540090]},  # projections of nuclear medicine
    ],
)
def test_pictures_in_time_are_no_volume(slices, tmp_path, tags):
    folder = frames_without_places(slices, tmp_path, tags)
    for path in (folder, folder / "000.dcm"):
        with pytest.raises(UserError, match="pictures in time, .*, not slices of a volume; export the frames as single images"):
            read_image(path)


@pytest.mark.parametrize("tags", [{"FrameTime": "33.3", "FrameIncrementPointer": 0x00540080}, {"PixelSpacing": [1, 1]}, {}])
def test_frames_that_go_on_by_slices_may_have_a_time_each(slices, tmp_path, tags):
    """As those of a reconstruction in nuclear medicine."""
    folder = frames_without_places(slices, tmp_path, tags)
    assert read_image(folder / "000.dcm").shape[0] == 2


def test_frames_whose_places_itk_does_not_know_are_refused(slices, tmp_path):
    """Of an ultrasound volume it says 1 mm at 0."""
    file = multi_frame(slices, tmp_path / "frames" / "a.dcm", range(8))
    dataset = pytest.importorskip("pydicom").dcmread(file)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.6.2"
    dataset.save_as(file)
    with pytest.raises(UserError, match="frames' places cannot be read; export it with one slice a file"):
        read_image(file)


def frames_without_places(slices, tmp_path, tags):
    def join(i, dataset):
        del dataset.ImagePositionPatient
        dataset.NumberOfFrames, dataset.PixelData = 2, dataset.PixelData * 2
        for key, value in tags.items():
            setattr(dataset, key, value)

    return copied(slices[:1], tmp_path / "scan", join)


@pytest.mark.parametrize("frames", [2, 4])
def test_several_multi_frame_files_are_not_read_by_half(slices, tmp_path, frames):
    def join(i, dataset):
        dataset.NumberOfFrames = frames
        dataset.PixelData = dataset.PixelData * frames

    with pytest.raises(UserError, match="several multi-frame files; export it with one slice a file"):
        read_image(copied(slices[:2], tmp_path / "scan", join))


@pytest.mark.parametrize("odd", [0, 3])
def test_a_slice_of_another_size_is_named(slices, tmp_path, odd):
    def halve(i, dataset):
        if i == odd:
            dataset.Rows //= 2
            dataset.PixelData = dataset.PixelData[: 2 * dataset.Rows * dataset.Columns]

    with pytest.raises(
        UserError, match=rf"00{odd}.dcm has 136 x 68 pixels, but most slices of its DICOM series have 136 x 137; take it out"
    ):
        read_image(copied(slices, tmp_path / "scan", halve))


def test_a_tilted_gantry_is_noticed(slices, tmp_path):
    def tilt(i, dataset):
        x, y, z = map(float, dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y + 0.2 * z, z]

    with pytest.raises(UserError, match="gantry tilt"):
        read_image(copied(slices, tmp_path / "scan", tilt))


def test_a_series_spread_over_two_folders_is_not_read_by_half(slices, tmp_path):
    copied(slices[:4], tmp_path / "scan" / "a")
    copied(slices[4:], tmp_path / "scan" / "b")
    with pytest.raises(UserError, match="more than one subfolder"):
        read_image(tmp_path / "scan")
    assert read_image(tmp_path / "scan" / "a").shape[0] == 4


def test_slices_three_times_as_thick_as_their_pixels_are_a_volume_whatever_the_last_bits(tmp_path):
    """Of 100 such scans turned at random, 21 were in slices to the panel and none to unetseg, or the other way round."""
    for axis in itertools.product((-20, 10), repeat=3):
        image = Image(volume("int16", (4, 6, 5)), (0.6, 0.6, 1.8), (0.0, 0.0, 0.0), tuple(rotation(*axis).ravel()))
        write_image(image, tmp_path / "a.nii.gz")
        read = read_image(tmp_path / "a.nii.gz")
        again = replace(read, spacing=tuple(np.linalg.norm(read.matrix[:3, :3], axis=0)))  # as Slicer's matrix tells it
        assert {slices_across(i) for i in (image, read, again)} == {None}
        assert slices_across(replace(read, spacing=(0.6, 0.6, 1.85))) == 2


def test_a_turned_series_keeps_its_direction(slices, tmp_path):
    def turn(i, dataset):
        dataset.ImageOrientationPatient = [0.8, 0.6, 0, -0.6, 0.8, 0]

    image = read_image(copied(slices, tmp_path / "scan", turn))
    np.testing.assert_allclose(np.reshape(image.direction, (3, 3))[:, 0], [0.8, 0.6, 0])


# ---------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("tilt", [(0, 0, 0), (12, -20, 18)])
@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_reorient_keeps_every_voxels_place(order, signs, tilt):
    columns = rotation(*tilt)[:, list(order)] * signs
    image = Image(np.arange(60).reshape(3, 4, 5), (0.5, 1.5, 3.0), (10.0, -20.0, 30.0), tuple(float(v) for v in columns.ravel()))
    canonical, orientation = reorient(image)
    turned = np.reshape(canonical.direction, (3, 3))
    assert np.all(np.diag(turned) > 0.8) and np.allclose(turned, rotation(*tilt))
    for z, y, x in np.ndindex(image.shape):
        (k,), (j,), (i,) = np.nonzero(canonical.array == image.array[z, y, x])
        np.testing.assert_allclose(canonical.index_to_point((i, j, k)), image.index_to_point((x, y, z)), atol=1e-9)
    assert np.array_equal(orientation.original(canonical.array), image.array)
    channels = np.stack([image.array, -image.array])
    assert np.array_equal(orientation.original(orientation.canonical(channels)), channels)


def test_reorient_copies_nothing():
    image = Image(np.zeros((3, 4, 5)), direction=(0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, -1.0))
    assert np.shares_memory(reorient(image)[0].array, image.array)


def test_points_and_indices_are_inverse_and_agree_with_itk():
    image = oblique(volume())
    index = (3.25, -1.5, 7.0)
    np.testing.assert_allclose(image.point_to_index(image.index_to_point(index)), index, atol=1e-9)
    np.testing.assert_allclose(image.index_to_point(index), to_sitk(image).TransformContinuousIndexToPhysicalPoint(index), atol=1e-6)


def test_same_grid_looks_at_the_corners():
    image = oblique(volume())
    assert image.same_grid(oblique(volume("uint8")))
    assert not image.same_grid(Image(image.array, image.spacing, image.origin, tuple(rotation(12, -20, 35.5).ravel())))
    assert not image.same_grid(Image(image.array, image.spacing, (-31.0, 112.5, -407.75), image.direction))
    assert image.same_grid(Image(image.array, image.spacing, (-31.25001, 112.5, -407.75), image.direction))


# ----------------------------------------------------------------------------------------------------------- resampling

SPACINGS = [(1.0, 1.0, 1.0), (0.5, 0.6, 1.1), (2.0, 1.7, 6.0), (None, 1.3, None), (0.7, 0.8, 2.5)]


@pytest.mark.parametrize("interpolator", ["linear", "bspline"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_ramp_stays_the_same_ramp(spacing, interpolator):
    """Physical positions as values, on an oblique grid: resampling must give the position of each new voxel."""
    image = oblique(np.zeros((30, 40, 50)))
    z, y, x = np.indices(image.shape)
    points = np.moveaxis(image.matrix[:3, :3] @ np.stack([x, y, z]).reshape(3, -1), 0, 0).reshape(3, *image.shape)
    ramp = image.like(points.astype(np.float32))
    out = resample(ramp, spacing, interpolator)
    z, y, x = np.indices(out.shape)
    want = (out.matrix[:3, :3] @ np.stack([x, y, z]).reshape(3, -1)).reshape(3, *out.shape)
    want += (np.array(out.origin) - image.origin)[:, None, None, None]
    inside = (slice(None), *(slice(n // 4, n - n // 4) for n in out.shape))
    np.testing.assert_allclose(out.array[inside], want[inside], atol=2e-3)
    for have, asked, own in zip(out.spacing, spacing, image.spacing, strict=True):
        assert have == pytest.approx(asked or own)


@pytest.mark.parametrize(
    ("interpolator", "itk"), [("linear", sitk.sitkLinear), ("bspline", sitk.sitkBSpline), ("nearest", sitk.sitkNearestNeighbor)]
)
@pytest.mark.parametrize("spacing", [(0.613, 0.907, 1.913), (0.751, 0.853, 2.917)])
def test_resample_agrees_with_simpleitk(spacing, interpolator, itk):
    image = oblique(volume("float32", (20, 30, 40)))
    out = resample(image, spacing, interpolator)
    reference = sitk.Resample(
        to_sitk(image), out.shape[::-1], sitk.Transform(), itk, out.origin, out.spacing, out.direction, 0.0, sitk.sitkFloat32, True
    )
    reference = sitk.GetArrayFromImage(reference)
    inner = tuple(slice(4, -4) for _ in range(3))
    if interpolator == "nearest":
        assert np.mean(out.array[inner] == reference[inner]) > 0.999
    else:
        np.testing.assert_allclose(out.array[inner], reference[inner], atol=2e-2)


def test_the_grid_has_the_images_centre():
    image = oblique(volume("float32", (21, 30, 41)))
    for spacing in SPACINGS:
        out = resample(image, spacing)
        middle = [
            image.index_to_point([(n - 1) / 2 for n in image.shape[::-1]]),
            out.index_to_point([(n - 1) / 2 for n in out.shape[::-1]]),
        ]
        np.testing.assert_allclose(*middle, atol=1e-9)


def test_the_images_own_spacing_changes_nothing():
    image = oblique(volume())
    out = resample(image, (0.7, None, 2.5 * (1 + 1e-6)))
    assert np.array_equal(out.array, image.array) and same_place(out, image, 1e-9)


def test_nearest_keeps_type_and_values():
    labels = Image(np.random.default_rng(0).choice([0, 3, 70000], (8, 9, 10)).astype(np.uint32))
    out = resample(labels, (0.7, 1.6, 2.2), "nearest")
    assert out.array.dtype == np.uint32 and set(np.unique(out.array)) <= {0, 3, 70000}


def test_a_coarse_grid_averages_instead_of_skipping():
    stripes = Image(np.tile(np.array([0, 100], np.float32), (8, 8, 32)))
    assert np.abs(resample(stripes, (4.0, None, None)).array[..., 3:-3] - 50).max() < 8
    assert resample(stripes, (1.1, None, None)).array.max() > 90


@pytest.mark.parametrize("interpolator", ["linear", "bspline"])
def test_an_image_far_finer_than_the_grid_is_still_averaged(interpolator):
    z, y, x = np.indices((150, 4, 300), dtype=np.float32)
    values = resample(Image(100 + x + z, (0.01, 0.01, 0.02)), (1.0, 1.0, 1.0), interpolator).array
    assert values.shape == (3, 1, 3)
    np.testing.assert_allclose(values[:, 0], 100 + np.array([24.5, 74.5, 124.5])[:, None] + [49.5, 149.5, 249.5], rtol=0.01)


def test_one_slice_can_be_resampled_in_plane():
    out = resample(Image(volume("uint8", (1, 40, 50)), (0.5, 0.5, 1.0)), (1.0, 1.0, None))
    assert out.shape == (1, 20, 25) and np.isfinite(out.array).all()


@pytest.mark.parametrize("interpolator", ["linear", "bspline", "nearest"])
@pytest.mark.parametrize("spacing", [(0.513, 0.607, 1.103), (1.411, 1.907, 6.011), (2.803, 0.511, None)])
def test_sampling_a_part_equals_the_part_of_the_whole(spacing, interpolator):
    image = Image(volume("int16", (41, 61, 71)), (0.7, 0.8, 2.5))
    grid = Grid.over(image, spacing)
    whole = sample(image.channels, grid, Box.whole(grid.shape), interpolator)
    for low, high in ((0.0, 0.3), (0.3, 0.6), (0.7, 1.0)):
        box = Box(tuple(int(n * low) for n in grid.shape), tuple(math.ceil(n * high) for n in grid.shape))
        part = sample(image.channels, grid, box, interpolator)
        np.testing.assert_allclose(part, whole[(slice(None), *box.slices)], atol=1e-5 * 1000)


@pytest.mark.parametrize("interpolator", ["linear", "bspline", "nearest"])
def test_long_rows_are_interpolated_in_parts(interpolator, monkeypatch):
    image = Image(volume("int16", (41, 61, 71)), (0.7, 0.8, 2.5))
    grid = Grid.over(image, (0.513, 1.907, 6.011))
    whole = sample(image.channels, grid, Box.whole(grid.shape), interpolator)
    monkeypatch.setattr("UNetSegmentationLib.image._LONGEST", 40)
    np.testing.assert_allclose(sample(image.channels, grid, Box.whole(grid.shape), interpolator), whole, atol=1e-5 * 1000)


@pytest.mark.parametrize("interpolator", ["linear", "nearest"])
@pytest.mark.parametrize("scale", [(1.0, 0.75, 0.75), (1.15, 1.1, 0.6)])
def test_beyond_the_image_its_edge_goes_on(scale, interpolator):
    """As the click model was taught; in the other two axes it is still interpolated."""
    values = volume("int16", (20, 30, 40))[None]
    margin, offset = 24, (-9.5, 3.25, 12.5)
    padded = np.pad(values, ((0, 0), *[(margin, margin)] * 3), mode="edge")
    inside = sample(values, Grid((14, 16, 16), scale, offset), Box.whole((14, 16, 16)), interpolator)
    grid = Grid((14, 16, 16), scale, tuple(o + margin for o in offset))
    np.testing.assert_allclose(inside, sample(padded, grid, Box.whole(grid.shape), interpolator), atol=1e-3)


@pytest.mark.parametrize("interpolator", ["linear", "bspline", "nearest"])
@pytest.mark.parametrize("scale", [(1.0, 1.0, 1.0), (1.0, 0.75, 0.75)])
def test_a_patch_at_the_images_own_spacing_may_be_larger_than_the_image(scale, interpolator):
    values = volume("int16", (10, 14, 12))[None]
    grid = Grid((24, 30, 30), scale, (0.0, 0.0, 0.0))
    wide = np.pad(values, ((0, 0), (0, 20), (0, 20), (0, 20)), mode="edge")
    expected = sample(wide, grid, Box.whole(grid.shape), interpolator)
    inside = sample(values, grid, Box.whole(grid.shape), interpolator)
    assert inside.shape == expected.shape
    part = (slice(None), slice(None), slice(0, 10), slice(0, 10))  # a B-spline is mirrored at the edge
    np.testing.assert_allclose(inside[part], expected[part], atol=5 if interpolator == "bspline" else 1e-3)


def test_unknown_interpolators_are_an_error():
    with pytest.raises(ValueError, match="cubic"):
        resample(Image(volume()), (2, 2, 2), "cubic")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_resampling_back_by_bands_equals_doing_it_at_once(spacing, axis):
    image = Image(np.zeros((12, 33, 41)), (0.7, 0.8, 2.5))
    grid = Grid.over(image, spacing)
    values = np.random.default_rng(0).random((2, *grid.shape), np.float32)
    whole = resample_back(values, Box.whole(grid.shape), grid, Box.whole(image.shape))
    assert whole.shape == (2, *image.shape)
    out = np.full_like(whole, np.nan)
    for a in range(0, image.shape[axis], 5):
        start, stop = [0, 0, 0], list(image.shape)
        start[axis], stop[axis] = a, min(a + 5, image.shape[axis])
        band = Box(tuple(start), tuple(stop))
        need = grid.cover(band)
        part = resample_back(values[(slice(None), *need.slices)], need, grid, band)
        out[(slice(None), *band.slices)] = part
    np.testing.assert_allclose(out, whole, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_back_and_forth_keeps_a_smooth_image(spacing):
    image = Image(np.zeros((20, 33, 41)), (0.7, 0.8, 2.5))
    z, y, x = (i * s for i, s in zip(np.indices(image.shape), image.spacing[::-1], strict=True))
    smooth = np.sin(x / 10) + np.cos(y / 9) + np.sin(z / 25)
    grid = Grid.over(image, spacing)
    lattice = sample(smooth[None], grid, Box.whole(grid.shape))
    back = resample_back(lattice, Box.whole(grid.shape), grid, Box.whole(image.shape))[0]
    inner = tuple(slice(n // 5, n - n // 5) for n in image.shape)
    np.testing.assert_allclose(back[inner], smooth[inner], atol=0.03)


def test_the_cover_of_every_voxel_is_enough_and_no_larger_than_the_lattice():
    for shape, spacing in itertools.product([(1, 2, 3), (5, 17, 40)], SPACINGS):
        image = Image(np.zeros(shape), (0.7, 0.8, 2.5))
        grid = Grid.over(image, spacing)
        for a in range(shape[2]):
            need = grid.cover(Box((0, 0, a), (shape[0], shape[1], a + 1)))
            at = (a - grid.offset[2]) / grid.scale[2]
            assert 0 <= need.start[2] < need.stop[2] <= grid.shape[2]
            assert need.start[2] <= max(0, at) + 1e-9 and need.stop[2] - 1 >= min(grid.shape[2] - 1, at) - 1e-9


# --------------------------------------------------------------------------------------------------------------- boxes


def test_box_arithmetic():
    box = Box((1, 2, 3), (4, 6, 8))
    assert box.shape == (3, 4, 5) and not box.empty
    assert box & Box((2, 0, 5), (9, 9, 9)) == Box((2, 2, 5), (4, 6, 8))
    assert (box & Box((4, 0, 0), (9, 9, 9))).empty
    assert box.shifted((1, -1, 0)) == Box((2, 1, 3), (5, 5, 8)) and box.grown((1, 0, 2)) == Box((0, 2, 1), (5, 6, 10))
    assert box.relative_to(Box((1, 1, 1), (9, 9, 9))) == Box((0, 1, 2), (3, 5, 7))
    mask = np.zeros((6, 7, 9), bool)
    mask[box.slices] = True
    assert Box.around(mask) == box and Box.around(np.zeros((3, 3, 3), bool)) is None


def test_crop_keeps_the_place_and_refuses_what_is_outside():
    image = oblique(volume())
    part = image.crop(Box((2, 3, 4), (6, 8, 10)))
    assert np.array_equal(part.array, image.array[2:6, 3:8, 4:10])
    np.testing.assert_allclose(part.index_to_point((1, 2, 3)), image.index_to_point((5, 5, 5)), atol=1e-9)
    assert image.like(np.stack([image.array] * 2)).crop(Box((0, 0, 0), (1, 1, 1))).array.shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="outside"):
        image.crop(Box((-1, 0, 0), (6, 8, 10)))
    with pytest.raises(ValueError, match="outside"):
        image.crop(Box((0, 0, 0), (8, 9, 11)))


def test_box_around_points_holds_the_voxels_between_the_planes():
    image = Image(np.zeros((20, 20, 20)), (2.0, 1.0, 0.5), (100.0, 0.0, -50.0))
    edges = [image.index_to_point((1.5, 2.5, 3.5)), image.index_to_point((4.5, 6.5, 8.5))]
    assert image.box_around_points(edges) == Box((4, 3, 2), (9, 7, 5))
    assert image.box_around_points(edges[::-1]) == Box((4, 3, 2), (9, 7, 5))
    assert image.box_around_points([image.index_to_point((3, 4, 5))]) == Box((5, 4, 3), (6, 5, 4))
    assert image.box_around_points([image.index_to_point((2.4, 4, 5)), image.index_to_point((2.6, 4, 5))]) == Box((5, 4, 2), (6, 5, 4))
    assert image.box_around_points([image.index_to_point((-3, 0, 0)), image.index_to_point((30, 0, 0))]) == Box((0, 0, -3), (1, 1, 31))


def test_box_around_points_survives_a_headers_rounding():
    image = Image(np.zeros((20, 20, 20)), (0.703125, 0.703125, 2.5), (-123.109375, -95.05937194824219, -215.0))
    edges = [image.index_to_point((1.5, 2.5, 3.5)), image.index_to_point((4.5, 6.5, 8.5))]
    rounded = [tuple(float(np.float32(v)) for v in p) for p in edges]
    assert image.box_around_points(rounded) == Box((4, 3, 2), (9, 7, 5))


def test_an_images_array_has_three_or_four_axes_and_like_checks_the_shape():
    with pytest.raises(ValueError, match="2-dimensional"):
        Image(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="does not fit"):
        Image(np.zeros((3, 3, 3))).like(np.zeros((3, 3, 4)))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tif"])
def test_names_hold_any_letter(tmp_path, suffix):
    image = Image(volume("uint8", (1, 9, 9)))
    path = tmp_path / "Jörg 世界" / f"Schädel ß{suffix}"
    write_image(image, path)
    assert np.array_equal(read_image(path).array, image.array) and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("known", [True, False])
def test_on_windows_only_the_letters_of_the_locale_change(monkeypatch, known):
    asked = []

    def setlocale(category, name):
        asked.append((category, name))
        if not known:
            raise locale.Error("unsupported locale setting")

    monkeypatch.setattr(locale, "setlocale", setlocale)
    _take_utf8_names()
    assert asked == [(locale.LC_CTYPE, ".UTF8")]


# -------------------------------------------------------------------------------------------------------- writing safely


def test_atomic_path_replaces_only_when_all_went_well(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("one")
        assert temporary.parent == target.parent and not target.exists()
    assert target.read_text() == "one"
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("two")
        raise ZeroDivisionError
    assert target.read_text() == "one" and list(target.parent.iterdir()) == [target]
    with atomic_path(target) as temporary:
        temporary.write_text("three")
    assert target.read_text() == "three" and list(target.parent.iterdir()) == [target]


def test_atomic_path_says_why_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), atomic_path(tmp_path / "file" / "a.txt"):
        pass
    with pytest.raises(UserError, match="cannot be written"), atomic_path(tmp_path / ("x" * 300)):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"), atomic_path(tmp_path / "folder") as temporary:
        temporary.write_text("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_failed_write_leaves_the_former_file(tmp_path):
    path = tmp_path / "a.png"
    write_image(Image(volume("uint8", (1, 9, 9))), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot be written"):
        write_image(Image(volume("float32", (1, 9, 9))), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_check_writable_leaves_no_trace(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "folder" / "a.nrrd")
    check_writable(tmp_path / "file")
    for path in (tmp_path, tmp_path / "file" / "a.nrrd", tmp_path / "file" / "b" / "a.nrrd"):
        with pytest.raises(UserError, match="cannot be written"):
            check_writable(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="Windows takes the home from elsewhere")
def test_a_result_in_the_persons_folder_lies_there(tmp_path, monkeypatch):
    """As --output=~/x: shells expand ~ only at the beginning of a word."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    check_writable("~/new/a.txt")
    files.write_text("~/new/a.txt", "text")
    assert (tmp_path / "home" / "new" / "a.txt").read_text() == "text" and os.listdir(tmp_path) == ["home"]


def test_a_file_that_another_program_holds_is_refused_before_and_said_after(tmp_path, monkeypatch):
    """As Excel holds a table on Windows: nobody else may open it for writing, nor replace it."""
    (tmp_path / "a.csv").write_text("old")
    was = (tmp_path / "a.csv").stat()
    check_writable(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "old" and (tmp_path / "a.csv").stat().st_mtime_ns == was.st_mtime_ns
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        check_writable(tmp_path / "pipe")

    def held(method):
        own = getattr(Path, method)

        def refuse(self, *arguments, **more):
            if (tmp_path / "a.csv") in (self, *arguments):
                raise PermissionError(13, "Permission denied")
            return own(self, *arguments, **more)

        monkeypatch.setattr(Path, method, refuse)

    held("open"), held("replace")
    for write in (check_writable, lambda path: files.write_text(path, "new")):
        with pytest.raises(UserError, match="a.csv cannot be written, as it may be open in another program; close it there"):
            write(tmp_path / "a.csv")
    monkeypatch.undo()
    assert (tmp_path / "a.csv").read_text() == "old" and not list(tmp_path.glob(".unetseg*"))


def test_a_folder_that_windows_lets_nobody_write_to_is_refused_at_once(tmp_path, monkeypatch):
    tries = []

    def refuse(path, *_unused):
        tries.append(path)
        raise PermissionError(13, "Permission denied")

    windows = SimpleNamespace(**{**vars(os), "name": "nt", "open": refuse})
    monkeypatch.setattr(files, "os", windows)
    monkeypatch.setattr(tempfile, "_os", windows)
    monkeypatch.setattr(tempfile, "TMP_MAX", 50)  # of 2**31 - 1
    with pytest.raises(UserError, match="cannot be written .Permission denied.; choose a folder"), atomic_path(tmp_path / "a.csv"):
        pass
    with pytest.raises(UserError, match="cannot be written; choose a file name in a folder that you may write to"):
        check_writable(tmp_path / "a.nrrd")
    assert len(tries) == 2


@pytest.mark.parametrize(("patience", "whole"), [(1.0, False), (60.0, True)])
def test_a_file_that_windows_holds_is_waited_for(tmp_path, monkeypatch, patience, whole):
    clock = [0.0]
    replace = Path.replace

    def held(self, target):
        if clock[0] < 20:
            raise PermissionError(13, "Access is denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "name": "nt"}))
    waiting = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda s: clock.__setitem__(0, clock[0] + s))
    monkeypatch.setattr(files, "time", waiting)
    with contextlib.nullcontext() if whole else pytest.raises(UserError, match="cannot be written"):
        with atomic_path(tmp_path / "a", patience) as temporary:
            temporary.write_text("new")
    assert (tmp_path / "a").exists() == whole and clock[0] < patience + 1


def test_what_works_in_the_background_has_a_lower_priority_on_windows_too(monkeypatch):
    said = []
    kernel = SimpleNamespace(SetPriorityClass=lambda process, priority: said.append((process.value, priority)))
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr("ctypes.WinDLL", lambda name: kernel, raising=False)
    files.stand_back()
    assert said == [(ctypes.c_void_p(-1).value, 0x4000)]


def test_a_drive_that_is_not_there_is_a_sentence(monkeypatch):
    for method in ("exists", "is_dir"):  # not even its root, on Windows
        monkeypatch.setattr(Path, method, lambda self: False)
    with pytest.raises(UserError, match="cannot be written"):
        check_writable("/nowhere/a.nrrd")
