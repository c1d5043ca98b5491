"""Results as files: what is written opens where it must, with names, colours, codes and every voxel in its place."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from UNetSegmentationLib.dataset import read_mask
from UNetSegmentationLib.image import IDENTITY, Box, Image, UserError, read_image, to_sitk
from UNetSegmentationLib.inference.predict import Prediction
from UNetSegmentationLib.model import Label
from UNetSegmentationLib.output import write_segmentation
from UNetSegmentationLib.postprocess import voxel_counts

NODULE = Label(
    1,
    "nodule",
    (230, 159, 0),
    {
        "category": ["SCT", "49755003", "Morphologically Altered Structure"],
        "type": ["SCT", "27925004", "Nodule"],
        "type_modifier": ["SCT", "24028007", "Right"],
        "region": ["SCT", "39607008", "Lung"],
        "region_modifier": ["SCT", "7771000", "Left"],
    },
)
SCAR = Label(300, "Närbe, 50 % | old", (0, 158, 115), {})
BONE = Label(3, "bone", (255, 255, 255), {})
DEFS = (NODULE, BONE, SCAR)


def rotation(*degrees):
    r = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        a, b = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        r = r @ turn
    return r


DIRECTIONS = {
    "identity": np.eye(3),
    "flipped": np.diag([-1.0, -1.0, 1.0]),
    "left-handed": np.diag([1.0, 1.0, -1.0]),
    "oblique": rotation(10, -25, 40),
    "oblique left-handed": rotation(10, -25, 40) @ np.diag([1.0, -1.0, 1.0]),
    "sagittal": np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
}


def test_planes_without_a_label_are_not_counted_voxel_by_voxel(monkeypatch):
    labels, counted, bincount = np.zeros((9, 5, 4), np.uint8), [], np.bincount
    labels[3:5, 1:3, 2] = 2
    monkeypatch.setattr(np, "bincount", lambda plane, *rest, **more: counted.append(plane.size) or bincount(plane, *rest, **more))
    assert voxel_counts(labels, 4).tolist() == [176, 0, 4, 0] and sum(counted) == 40
    assert voxel_counts(labels[:, :0], 4).tolist() == [0] * 4


def prediction(array, direction=IDENTITY, defs=DEFS):
    direction = tuple(float(v) for v in np.ravel(direction))
    labels = Image(array, (0.7, 1.1, 2.5), (-31.5, 12.25, 100.0), direction)
    return Prediction(labels, defs, "lung-nodule-2d-1.0.0", Box.whole(array.shape))


def volume(dtype=np.uint16):
    array = np.zeros((6, 9, 11), dtype)
    array[1:3, 2:5, 3:8] = 1
    array[4:6, 5:9, 0:2] = 300 if np.dtype(dtype).itemsize > 1 else 3
    return array


CASES = {name: prediction(volume(), d) for name, d in DIRECTIONS.items()} | {
    "uint8": prediction(volume(np.uint8)),
    "one slice": prediction(volume()[1:2]),
    "one picture": prediction(volume(np.uint8)[1:2], defs=(NODULE,)),
    "empty": prediction(np.zeros((6, 9, 11), np.uint8)),
}


def points(labels, value):
    """The LPS positions of a label's voxels, sorted."""
    index = np.argwhere(labels.array == value)[:, ::-1]
    return ordered(index @ labels.matrix[:3, :3].T + labels.matrix[:3, 3])


def ordered(at):
    at = np.round(np.asarray(at, float).reshape(-1, 3), 3) + 0.0
    return at[np.lexsort(at.T)]


# -------------------------------------------------------------------------------------------------------------- Slicer

LOAD = """
import json, sys
import numpy as np
import slicer, vtk
from vtk.util.numpy_support import vtk_to_numpy

scene = slicer.vtkMRMLScene()
slicer.mrmlScene = scene
application = slicer.vtkSlicerApplicationLogic()
application.SetMRMLScene(scene)
logic = slicer.vtkSlicerSegmentationsModuleLogic()
logic.SetMRMLApplicationLogic(application)
logic.SetMRMLScene(scene)
out = {}
for path in sys.argv[2:]:
    node = logic.LoadSegmentationFromFile(path, True, "loaded")
    segmentation = node.GetSegmentation()
    segments = []
    for i in range(segmentation.GetNumberOfSegments()):
        key, segment = segmentation.GetNthSegmentID(i), segmentation.GetNthSegment(i)
        image, matrix, entry = slicer.vtkOrientedImageData(), vtk.vtkMatrix4x4(), vtk.mutable("")
        node.GetBinaryLabelmapRepresentation(key, image)
        image.GetImageToWorldMatrix(matrix)
        segment.GetTag("TerminologyEntry", entry)
        x0, x1, y0, y1, z0, z1 = image.GetExtent()
        at = np.empty((0, 3))
        if not image.IsEmpty():
            array = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(z1 - z0 + 1, y1 - y0 + 1, x1 - x0 + 1)
            index = np.argwhere(array)[:, ::-1] + (x0, y0, z0)
            ras = np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(3)])
            at = (index @ ras[:, :3].T + ras[:, 3]) * (-1, -1, 1)
        segments.append([key, segment.GetName(), segment.GetColor(), str(entry), at.tolist()])
    out[path] = segments
json.dump(out, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def in_slicer(tmp_path_factory):
    """All cases as Slicer's own storage node reads them: name -> [id, name, colour, terminology, LPS points]."""
    if importlib.util.find_spec("slicer") is None:
        pytest.skip("slicer-core is not installed")
    folder = tmp_path_factory.mktemp("slicer")
    paths = {name: folder / f"{name}.seg.nrrd" for name in CASES}
    for name, path in paths.items():
        write_segmentation(CASES[name], path)
    answer = folder / "answer.json"
    script = [sys.executable, "-c", LOAD, str(answer), *map(str, paths.values())]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert answer.exists(), done.stderr
    loaded = json.loads(answer.read_text())
    return {name: loaded[str(path)] for name, path in paths.items()}


@pytest.mark.parametrize("case", [c for c in CASES if c != "empty"])
def test_slicer_opens_it_voxel_exact(in_slicer, case):
    expected = CASES[case]
    present = [d for d in expected.label_defs if (expected.labels.array == d.value).any()]
    assert present
    assert [s[1] for s in in_slicer[case]] == [d.name for d in present]
    for (key, _, color, entry, at), label in zip(in_slicer[case], present, strict=True):
        assert key == f"Segment_{label.value}"
        assert np.allclose(color, np.array(label.color) / 255, atol=1e-5)
        if label.terminology:
            assert entry == label.terminology_entry()
        assert np.allclose(ordered(at), points(expected.labels, label.value), atol=2e-3)


def test_slicer_opens_an_empty_result(in_slicer):
    """All labels are offered, ready to be painted, though none was found."""
    assert [(s[1], s[4]) for s in in_slicer["empty"]] == [(d.name, []) for d in DEFS]


def test_seg_nrrd_lists_what_is_there(tmp_path):
    path = tmp_path / "x.seg.nrrd"
    write_segmentation(CASES["oblique"], path)
    file = sitk.ReadImage(str(path))
    names = {k: file.GetMetaData(k) for k in file.GetMetaDataKeys() if k.endswith("_Name")}
    assert names == {"Segment0_Name": "nodule", "Segment1_Name": SCAR.name}
    assert file.GetMetaData("Segment1_LabelValue") == "300"
    assert file.GetMetaData("Segment0_Extent") == "0 10 0 8 0 5"
    assert NODULE.terminology_entry() in file.GetMetaData("Segment0_Tags")
    assert "DICOM.SegmentAlgorithmType:AUTOMATIC|DICOM.SegmentAlgorithmName:lung-nodule-2d-1.0.0|" in file.GetMetaData("Segment0_Tags")
    assert np.array_equal(sitk.GetArrayFromImage(file), CASES["oblique"].labels.array)
    write_segmentation(replace(CASES["oblique"], model_name=""), path)
    assert "DICOM." not in sitk.ReadImage(str(path)).GetMetaData("Segment0_Tags")


# ----------------------------------------------------------------------------------------------------------- labelmaps


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".NRRD"])
@pytest.mark.parametrize("case", ["oblique left-handed", "one slice"])
def test_labelmaps_keep_the_grid(tmp_path, suffix, case):
    path = tmp_path / f"x{suffix}"
    write_segmentation(CASES[case], path)
    back = read_image(path)
    assert back.array.dtype == CASES[case].labels.array.dtype
    assert np.array_equal(back.array, CASES[case].labels.array)
    assert back.same_grid(CASES[case].labels)


@pytest.mark.parametrize("source", ["p.jpg", "p.tif"])
@pytest.mark.parametrize("suffix", [".seg.nrrd", ".nii.gz", ".nrrd", ".mha", ".tif"])
def test_a_result_lies_on_its_picture_in_slicer_and_is_taken_back(tmp_path, suffix, source):
    """Slicer takes the size of a print for mm."""
    array = np.zeros((40, 60), np.uint8)
    array[5:20, 30:50] = 1
    pytest.importorskip("PIL.Image").fromarray(array * 200).save(tmp_path / source, dpi=(72, 72))
    image, path = read_image(tmp_path / source), tmp_path / f"x{suffix}"
    assert image.spacing == (1, 1, 1)
    write_segmentation(Prediction(image.like(array[None]), (NODULE,), "m-1.0.0", Box.whole(image.shape)), path)
    spacing = sitk.ReadImage(str(path)).GetSpacing()[:2]
    assert spacing == pytest.approx((1, 1) if suffix == ".tif" else (25.4 / 72, 25.4 / 72), rel=1e-3)
    assert np.array_equal(read_mask(path, image)[0][0], array)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
@pytest.mark.parametrize("direction", ["identity", "sagittal"])
def test_one_slice_as_a_picture(tmp_path, suffix, direction):
    path = tmp_path / f"x{suffix}"
    array = volume()[1:2]
    write_segmentation(prediction(array, DIRECTIONS[direction]), path)
    assert np.array_equal(read_image(path).array, array)


def test_many_slices_are_no_picture(tmp_path):
    with pytest.raises(UserError, match="slices"):
        write_segmentation(CASES["identity"], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.zip", "x.mhd"])
def test_an_unknown_suffix_lists_the_known(tmp_path, name):
    with pytest.raises(UserError) as caught:
        write_segmentation(CASES["identity"], tmp_path / name)
    assert all(s in str(caught.value) for s in (".seg.nrrd", ".dcm", ".nii.gz", ".nrrd", ".mha", ".png"))


@pytest.mark.parametrize("name", ["x.seg.nrrd", "x.nii.gz"])
def test_a_failing_write_leaves_what_was(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"before")

    def fail(image, file, **options):
        open(file, "wb").write(b"half")
        raise RuntimeError("itk::ERROR: disk full")

    monkeypatch.setattr(sitk, "WriteImage", fail)
    with pytest.raises(UserError, match="disk full"):
        write_segmentation(CASES["identity"], path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"before")]


# --------------------------------------------------------------------------------------------------------------- DICOM


@pytest.fixture(scope="module")
def series(data, tmp_path_factory):
    """Eight slices of a real chest CT under names that do not follow their order."""
    source = data / "chest_ct_dicom_LungDx-A0002"
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    folder = tmp_path_factory.mktemp("series")
    for i in range(8):
        shutil.copy(source / f"1-{10 + i}.dcm", folder / f"{i * 5 % 8}.dcm")
    return read_image(folder)


def dicom_prediction(image, defs=DEFS):
    array = np.zeros(image.shape, np.uint16)
    array[1:5, 100:140, 200:260] = 1
    array[3, 110:120, 210:220] = 0
    array[4:6, 300:310, 50:90] = 300
    return Prediction(image.like(array), defs, "lung-nodule-2d-1.0.0", Box.whole(array.shape))


def check_frames(path, p, image):
    """Every frame lies where its source slice lies, and says so; together they are the labels."""
    highdicom = pytest.importorskip("highdicom")
    pydicom = pytest.importorskip("pydicom")
    seg = highdicom.seg.segread(path)
    uids = [pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in image.dicom_files]
    frames = np.atleast_3d(seg.pixel_array)
    back = np.zeros(image.shape, np.uint16)
    values = {d.name[:64]: d.value for d in p.label_defs}
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        x, y, z = image.point_to_index(group.PlanePositionSequence[0].ImagePositionPatient)
        assert np.allclose((x, y, z), (0, 0, round(z)), atol=1e-4)
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == uids[round(z)]
        # A single segment is identified once for all frames.
        holder = group if "SegmentIdentificationSequence" in group else seg.SharedFunctionalGroupsSequence[0]
        number = holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        back[round(z)][frame > 0] = values[seg.SegmentSequence[number - 1].SegmentLabel]
    assert np.array_equal(back, p.labels.array)
    with pytest.raises(UserError, match="DICOM segmentation and no image"):  # not a volume of the frames that hold something
        read_image(path)
    return seg


def test_dicom_seg_is_voxel_exact(series, tmp_path):
    p = dicom_prediction(series)
    write_segmentation(p, tmp_path / "x.dcm", series)
    seg = check_frames(tmp_path / "x.dcm", p, series)
    shared = seg.SharedFunctionalGroupsSequence[0]
    axes = np.reshape(series.direction, (3, 3)).T[:2]
    assert np.allclose(shared.PlaneOrientationSequence[0].ImageOrientationPatient, axes.ravel())
    assert np.allclose(shared.PixelMeasuresSequence[0].PixelSpacing, series.spacing[1::-1])
    # highdicom's own view of it, in physical space
    got = seg.get_volume(combine_segments=True)
    index = np.argwhere(got.array)
    at = index @ got.affine[:3, :3].T + got.affine[:3, 3]
    assert np.allclose(ordered(at), ordered(np.vstack([points(p.labels, v) for v in (1, 300)])), atol=2e-3)


def test_dicom_seg_says_what_it_is(series, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    write_segmentation(replace(dicom_prediction(series), algorithm="SEMIAUTOMATIC"), tmp_path / "x.dcm", series)
    seg, source = pydicom.dcmread(tmp_path / "x.dcm"), pydicom.dcmread(series.dicom_files[0], stop_before_pixels=True)
    assert seg.Modality == "SEG" and seg.SegmentationType == "BINARY"
    for key in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "StudyDate"):
        assert seg[key].value == source[key].value
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert seg.SeriesNumber == source.SeriesNumber + 1000
    nodule, scar = seg.SegmentSequence
    assert [s.SegmentNumber for s in (nodule, scar)] == [1, 2]
    assert [s.SegmentLabel for s in (nodule, scar)] == ["nodule", SCAR.name]
    assert {s.SegmentAlgorithmType for s in (nodule, scar)} == {"SEMIAUTOMATIC"}  # it was clicked
    assert nodule.SegmentAlgorithmName == "lung-nodule-2d-1.0.0"
    kind = nodule.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodingSchemeDesignator, kind.CodeValue, kind.CodeMeaning) == ("SCT", "27925004", "Nodule")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Right"
    region = nodule.AnatomicRegionSequence[0]
    assert region.CodeMeaning == "Lung" and region.AnatomicRegionModifierSequence[0].CodeMeaning == "Left"
    # Without codes it may be an organ as well as a lesion.
    assert scar.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Tissue"
    assert scar.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"


def test_dicom_seg_of_a_label_with_a_long_meaning(series, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    p = dicom_prediction(series)
    long = replace(p.label_defs[0], terminology={**p.label_defs[0].terminology, "type": ("SCT", "27925004", "N" * 65)})
    write_segmentation(replace(p, label_defs=(long, *p.label_defs[1:])), tmp_path / "x.dcm", series)
    segment = pydicom.dcmread(tmp_path / "x.dcm").SegmentSequence[0]
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "N" * 64


def test_dicom_seg_of_a_reversed_series(series, tmp_path):
    """Files from head to feet: the arrays of image and labels follow the files."""
    d = np.reshape(series.direction, (3, 3)) @ np.diag([1.0, 1.0, -1.0])
    image = Image(
        series.array[::-1],
        series.spacing,
        series.index_to_point((0, 0, 7)),
        tuple(float(v) for v in d.ravel()),
        dicom_files=series.dicom_files[::-1],
    )
    p = dicom_prediction(image)
    write_segmentation(p, tmp_path / "x.dcm", image)
    check_frames(tmp_path / "x.dcm", p, image)


def test_dicom_seg_of_a_deidentified_series_with_umlauts(series, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    for i, file in enumerate(series.dicom_files[:4]):
        dataset = pydicom.dcmread(file)
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName = "Müller^Jörg"
        del dataset.PatientSex, dataset.PatientBirthDate, dataset.AccessionNumber
        dataset.save_as(tmp_path / f"{i}.dcm")
    image = read_image(tmp_path)
    p = dicom_prediction(image)
    write_segmentation(p, tmp_path / "out" / "x.dcm", image)
    seg = check_frames(tmp_path / "out" / "x.dcm", p, image)
    assert seg.PatientName == "Müller^Jörg"


def test_dicom_seg_needs_identifiers(series, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    for i, file in enumerate(series.dicom_files[:4]):
        dataset = pydicom.dcmread(file)
        dataset.StudyInstanceUID = ""
        dataset.save_as(tmp_path / f"{i}.dcm")
    image = read_image(tmp_path)
    with pytest.raises(UserError, match="StudyInstanceUID"):
        write_segmentation(dicom_prediction(image), tmp_path / "out" / "x.dcm", image)
    assert not (tmp_path / "out").exists()


def test_dicom_seg_without_a_series(tmp_path):
    for image in (None, CASES["identity"].labels):
        with pytest.raises(UserError, match="DICOM folder"):
            write_segmentation(CASES["identity"], tmp_path / "x.dcm", image)


def test_dicom_seg_of_another_scan(series, tmp_path):
    with pytest.raises(UserError, match="6 slices"):
        write_segmentation(CASES["identity"], tmp_path / "x.dcm", series)


def test_dicom_seg_of_nothing(series, tmp_path):
    p = dicom_prediction(series, defs=(BONE,))
    with pytest.raises(UserError, match="Nothing was found, so there is no DICOM SEG to write"):
        write_segmentation(p, tmp_path / "x.dcm", series)


def test_dicom_seg_says_what_to_install(series, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UserError, match="pip install pydicom highdicom$"):
        write_segmentation(dicom_prediction(series), tmp_path / "x.dcm", series)


def test_a_failing_dicom_write_leaves_what_was(series, tmp_path, monkeypatch):
    pydicom = pytest.importorskip("pydicom")
    path = tmp_path / "x.dcm"
    path.write_bytes(b"before")

    def fail(self, file, *args, **options):
        open(file, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pydicom.Dataset, "save_as", fail)
    with pytest.raises(UserError, match="No space"):
        write_segmentation(dicom_prediction(series), path, series)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.dcm", b"before")]


def test_geometry_survives_sitk(tmp_path):
    """The file's header is SimpleITK's own for the same grid."""
    write_segmentation(CASES["oblique"], tmp_path / "x.seg.nrrd")
    file, expected = sitk.ReadImage(str(tmp_path / "x.seg.nrrd")), to_sitk(CASES["oblique"].labels)
    assert np.allclose(file.GetDirection(), expected.GetDirection(), atol=1e-12)
    assert np.allclose(file.GetOrigin(), expected.GetOrigin(), atol=1e-9)


def test_dicom_seg_of_a_series_without_number_and_of_a_modifier_without_region(series, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    for i, file in enumerate(series.dicom_files[:6]):
        dataset = pydicom.dcmread(file)
        dataset.SeriesNumber = None
        dataset.save_as(tmp_path / f"{i}.dcm")
    p = dicom_prediction(image := read_image(tmp_path))
    alone = replace(NODULE, terminology={k: v for k, v in NODULE.terminology.items() if k != "region"})
    write_segmentation(replace(p, label_defs=(alone, *DEFS[1:])), tmp_path / "out" / "x.dcm", image)
    assert "AnatomicRegionSequence" not in pydicom.dcmread(tmp_path / "out" / "x.dcm").SegmentSequence[0]
    assert pydicom.dcmread(tmp_path / "out" / "x.dcm").SeriesNumber == 1000
