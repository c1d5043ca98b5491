"""Results as files: Slicer segmentations, plain labelmaps, DICOM SEG. All or nothing, on the input's exact grid."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import UserError, atomic_path
from .image import IDENTITY, PICTURE_SUFFIXES, VOLUME_SUFFIXES, WRITTEN_SUFFIXES, Image, on_print, write_image
from .model import Label
from .postprocess import voxel_counts

if TYPE_CHECKING:
    from .inference.predict import Prediction

SUFFIXES = (".seg.nrrd", ".dcm", *WRITTEN_SUFFIXES)

# By these tags of a segment Slicer's DICOM SEG exporter tells how it was made, and without them that a person drew it.
ALGORITHM_TYPE, ALGORITHM_NAME = "DICOM.SegmentAlgorithmType", "DICOM.SegmentAlgorithmName"

# What a DICOM SEG says of a label whose model names no codes, as category and type: what Slicer's does of a new segment.
TISSUE = ("SCT", "85756007", "Tissue")

# What a DICOM source may not lack, and what it must name but may leave empty (de-identified files often drop these).
IDENTIFIERS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
MAY_BE_EMPTY = (*PATIENT, "AccessionNumber", "StudyID", "StudyDate", "StudyTime")


def check_suffix(path: str | Path) -> None:
    """UserError where the name says no format that `write_segmentation` knows."""
    if not str(path).lower().endswith(SUFFIXES):
        raise UserError(f"{path} cannot be written in any known format; end the name in {', '.join(SUFFIXES)}.")


def check_fit(path: str | Path, image: Image | None) -> None:
    """UserError where a result of this image cannot be written to a name with a known suffix."""
    name = str(path).lower()
    if name.endswith(".dcm") and not (image and image.dicom_files):
        raise UserError(f"{path} needs the scan's own DICOM series; open the scan from its DICOM folder, or write .seg.nrrd.")
    if name.endswith(".dcm") and image and len(image.dicom_files) != image.shape[0]:
        what = f"{image.source} holds its {image.shape[0]} slices in one (multi-frame)"
        raise UserError(f"{path} needs a DICOM file for each slice and {what}; write .seg.nrrd, or export the scan slice by slice.")
    if name.endswith(PICTURE_SUFFIXES) and image and image.shape[0] != 1:
        raise UserError(f"{path} would hold one picture but {image.source} has {image.shape[0]} slices; write .seg.nrrd.")


def write_segmentation(prediction: Prediction, path: str | Path, image: Image | None = None) -> None:
    """Write a prediction's labels; the name's suffix says how.

    .seg.nrrd: a Slicer segmentation. .dcm: DICOM SEG, which needs `image` as read from its DICOM folder.
    .nii.gz, .nii, .nrrd, .mha: a labelmap. .png, .tif: the labelmap of a single slice, without geometry. What has a geometry lies
    on_print().
    Raises UserError; what stood at `path` before is then untouched.
    """
    check_suffix(path)
    name = str(path).lower()
    labels = prediction.labels
    if name.endswith(".seg.nrrd"):
        write_image(on_print(labels), path, _slicer_header(prediction))
    elif name.endswith(".dcm"):
        _write_dicom(prediction, Path(path), image)
    elif name.endswith(VOLUME_SUFFIXES):
        write_image(on_print(labels), path)
    else:
        # A picture has no third axis, so a direction that needs one has no place in it.
        write_image(replace(labels, direction=IDENTITY), path)


def algorithm_tags(model_name: str, kind: str) -> dict[str, str]:
    """The tags of a segment that say how it was made; none without a name, which Slicer's exporter asks for beside these kinds.

    kind: DICOM's SegmentAlgorithmType, "AUTOMATIC" or "SEMIAUTOMATIC".
    """
    return {ALGORITHM_TYPE: kind, ALGORITHM_NAME: model_name[:64]} if model_name else {}


def present(labels: np.ndarray, label_defs: Iterable[Label]) -> tuple[Label, ...]:
    """The labels that have at least one voxel in a (z, y, x) labelmap."""
    counts = voxel_counts(labels, int(labels.max(initial=0)) + 1)
    return tuple(label for label in label_defs if label.value < len(counts) and counts[label.value])


# -------------------------------------------------------------------------------------------------------------- Slicer


def _slicer_header(prediction: Prediction) -> dict[str, str]:
    """The header by which vtkMRMLSegmentationStorageNode knows names, colours and terminology.

    Segments are listed for the labels that are there. Where none is, all are listed, empty: Slicer opens a file without
    segments as a plain volume.
    """
    labels = prediction.labels
    z, y, x = labels.shape
    extent = f"0 {x - 1} 0 {y - 1} 0 {z - 1}"
    header = {
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for i, label in enumerate(present(labels.array, prediction.label_defs) or prediction.label_defs):
        tags = {
            "Segmentation.Status": "inprogress",
            "TerminologyEntry": label.terminology_entry(),
            **algorithm_tags(prediction.model_name, prediction.algorithm),
        }
        values = {
            "ID": f"Segment_{label.value}",
            "Name": label.name,
            "NameAutoGenerated": 0,
            "Color": " ".join(f"{c / 255:.6g}" for c in label.color),
            "ColorAutoGenerated": 0,
            "LabelValue": label.value,
            "Layer": 0,
            "Extent": extent,
            "Tags": "".join(f"{key}:{value}|" for key, value in tags.items() if value),
        }
        header |= {f"Segment{i}_{key}": str(value) for key, value in values.items()}
    return header


# --------------------------------------------------------------------------------------------------------------- DICOM


def _write_dicom(prediction: Prediction, path: Path, image: Image | None) -> None:
    check_fit(path, image)
    files = image.dicom_files if image is not None else ()
    labels = prediction.labels
    if len(files) != labels.shape[0]:
        raise UserError(f"The result has {labels.shape[0]} slices and the DICOM series {len(files)}; write .seg.nrrd instead.")
    found = present(labels.array, prediction.label_defs)
    if not found:
        raise UserError("Nothing was found, so there is no DICOM SEG to write; try another ROI or model, or write .seg.nrrd.")
    try:
        import highdicom  # noqa: F401
        import pydicom
    except ImportError as e:
        raise UserError("DICOM SEG needs pydicom and highdicom; run: pip install pydicom highdicom") from e
    try:
        sources = [pydicom.dcmread(f, stop_before_pixels=True) for f in files]
        for key in (k for k in IDENTIFIERS if not all(s.get(k) for s in sources)):
            raise ValueError(f"it lacks its {key}")
        for source, key in itertools.product(sources, MAY_BE_EMPTY):
            source.setdefault(key, "")
        with warnings.catch_warnings():
            # About the form of the patient's name, which is the archive's affair.
            warnings.filterwarnings("ignore", category=UserWarning, module="highdicom|pydicom")
            dataset = _dicom_seg(prediction, found, sources)
            with atomic_path(path) as temporary:
                dataset.save_as(temporary)
    # What highdicom raises for a source that lacks what the standard asks for.
    except (AttributeError, KeyError, TypeError, ValueError, OSError, pydicom.errors.InvalidDicomError) as e:
        raise UserError(f"No DICOM SEG can be made from this series ({e}); write .seg.nrrd instead.") from e


def _dicom_seg(prediction: Prediction, found: tuple[Label, ...], sources: list[Any]) -> Any:
    """A binary SEG: frame i of the labels belongs to source i. Segment numbers run from 1, as the standard wants."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    from . import __version__

    name, _, version = prediction.model_name.rpartition("-")
    algorithm = hd.AlgorithmIdentificationSequence(
        prediction.model_name[:64],
        codes.DCM.ArtificialIntelligence,
        version if name else __version__,
    )
    numbers = np.zeros(int(max(prediction.labels.array.max(), *(d.value for d in found))) + 1, np.min_scalar_type(len(found)))
    segments = []
    for number, label in enumerate(found, 1):
        numbers[label.value] = number
        segments.append(_segment(number, label, prediction.algorithm, algorithm))
    return hd.seg.Segmentation(
        source_images=sources,
        pixel_array=numbers[prediction.labels.array],
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=hd.UID(),
        series_number=int(sources[0].get("SeriesNumber") or 0) + 1000,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="UNetSegmentation",
        manufacturer_model_name=prediction.model_name[:64],
        software_versions=__version__,
        device_serial_number="0",
        specific_character_set="ISO_IR 192",
        series_description=f"Segmentation by {prediction.model_name}"[:64],
        content_description="Made by a model; not for diagnosis",
    )


def _segment(number: int, label: Label, kind: str, algorithm: Any) -> Any:
    import highdicom as hd

    def code(key: str, fallback: tuple[str, str, str] | None = None) -> Any:
        entry = label.terminology.get(key) or fallback
        return hd.sr.CodedConcept(entry[1], entry[0], entry[2][:64]) if entry else None

    region = code("region")
    segment = hd.seg.SegmentDescription(
        number,
        label.name[:64],
        code("category", TISSUE),
        code("type", TISSUE),
        hd.seg.SegmentAlgorithmTypeValues(kind),
        algorithm,
        anatomic_regions=[region] if region else None,
        display_color=hd.color.CIELabColor.from_rgb(*label.color),
    )
    if modifier := code("type_modifier"):
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    if region and (modifier := code("region_modifier")):
        segment.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [modifier]
    return segment
