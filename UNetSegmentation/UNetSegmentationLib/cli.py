"""The command `unetseg`. Exit codes: 0 done, 2 bad input (one sentence on stderr, nothing written), 130 cancelled; 1 where
`dataset check` found problems."""

# No `from __future__ import annotations`: typer reads the commands' annotations, which name what only _app() imports.

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from . import __version__
from .engines import DEVICES, ENGINES, PRECISIONS, choose_engine, installed, make_engine
from .files import check_writable, counted, expand_arguments, user_path, write_text
from .image import (
    PICTURE_SUFFIXES,
    VOLUME_SUFFIXES,
    Box,
    Image,
    SeveralSeries,
    UserError,
    from_picture,
    length_unit,
    list_series,
    of_channels,
    on_print,
    read_image,
    write_image,
)
from .inference.augment import TTA, views
from .inference.click import BEYOND, ClickSession, Prompt, box_prompt, expects_lung
from .inference.click import MODEL as CLICK_MODEL
from .inference.predict import Options, Prediction, foreseen, predict
from .intensity import display_range, expects_hu, parse_window, presets
from .measure import dice, measure
from .model import (
    DEFAULT_COLORS,
    SLICE_AXIS,
    SUFFIX,
    Card,
    Label,
    ModelPackage,
    bare_card,
    find_model,
    model_files,
    user_models_folder,
    write_package,
)
from .nodule import COLUMNS, csv_text, describe
from .nodule import row as nodule_row
from .picture import save_picture


def main() -> None:
    """Run the command line."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        sys.exit("unetseg: the command line needs typer and rich; run: pip install typer rich")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Windows' pipes and files are cp1252, and a label's name may be Chinese
    try:
        _app()(expand_arguments(sys.argv[1:]))
    except UserError as e:
        print(f"unetseg: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        where = e.filename or "A file or the standard output"
        print(f"unetseg: {where} cannot be read or written ({e.strerror or e}); check its name, its disk and your rights.", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("unetseg: there was not enough memory; close other programs or choose a smaller ROI, and try again.", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------------- parsing


def _numbers(text: str, n: int, what: str) -> list[float]:
    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if len(values) != n or not np.all(np.isfinite(values)):
        raise UserError(f"{what} must be {n} numbers separated by commas, not {text!r}.")
    return values


def parse_point(text: str, option: str = "--at") -> tuple[float, float, float]:
    """ "R,A,S" in mm, as Slicer shows it, to LPS."""
    r, a, s = _numbers(text, 3, option)
    return -r, -a, s


def parse_roi(text: str, image: Image, option: str = "--roi") -> Box:
    """ "R0,R1,A0,A1,S0,S1" in mm RAS, or "ijk:i0,i1,j0,j1,k0,k1" in voxels (last one included), to an index box."""
    if text.startswith("ijk:"):
        voxels = _numbers(text[4:], 6, f"{option} ijk:")
        i0, i1, j0, j1, k0, k1 = (int(v) for v in voxels)
        if voxels != [i0, i1, j0, j1, k0, k1]:
            raise UserError(f"{option} {text} must be whole numbers; voxels are counted from 0.")
        if i0 > i1 or j0 > j1 or k0 > k1:
            raise UserError(f"{option} {text} has no size; give ijk:i0,i1,j0,j1,k0,k1 with the smaller number of each pair first.")
        return Box((k0, j0, i0), (k1 + 1, j1 + 1, i1 + 1))
    r0, r1, a0, a1, s0, s1 = _numbers(text, 6, option)
    if r0 >= r1 or a0 >= a1 or s0 >= s1:
        raise UserError(f"{option} {text} has no size; give R0,R1,A0,A1,S0,S1 with the smaller number of each pair first.")
    return image.box_around_points([(-r, -a, s) for r in (r0, r1) for a in (a0, a1) for s in (s0, s1)])


def _stem(path: Path) -> str:
    name = path.name if path.name not in ("", "..") else path.resolve().name
    for suffix in (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES, ".nhdr", ".mhd", ".dcm"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _targets(output: Sequence[Path], images: Sequence[Path]) -> Sequence[Path]:
    """Where the result goes. Without a name of a person's nothing is replaced: it may be a mask that was corrected in Slicer."""
    target = Path(f"{_stem(images[0])}.seg.nrrd")
    if not output and target.exists():
        raise UserError(f"{target} is there already; name the result with -o.")
    return output or [target]


# ------------------------------------------------------------------------------------------------------------- segment


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[float, str], None] | None]:
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=1.0)
        yield lambda fraction, text: bar.update(task, completed=fraction, description=text)


@contextmanager
def _cancellable(left: str = "; nothing was written") -> Iterator[None]:
    """Ctrl-C, also at a prompt, ends the command with its sentence (typer says nothing, or "Aborted." and 1, by its version)."""
    import typer

    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        print(f"unetseg: cancelled{left}.", file=sys.stderr)
        raise typer.Exit(130) from None


def _read(images: Sequence[Path], series: str | None) -> Image:
    """Read; where a folder holds several series and a person sits there, ask which."""
    if series is not None and all(user_path(p).is_file() for p in images):
        raise UserError(f"--series is of a DICOM folder, and {images[0]} is a file; name the folder, or leave --series out.")
    while True:  # a folder after the other
        try:
            return read_image(list(images), series)
        except SeveralSeries as e:
            if not sys.stdin.isatty():
                raise
            import typer

            uids = list(e.series)
            for i, uid in enumerate(uids, 1):
                print(f"{i}: {e.series[uid]}", file=sys.stderr)
            choice = typer.prompt("Which series", type=int, err=True)
            if not 1 <= choice <= len(uids):
                raise UserError(f"There is no series {choice}; choose a number from 1 to {len(uids)}.") from None
            series = ",".join(filter(None, (series, uids[choice - 1])))


def _same(a: Path, b: Path) -> bool:
    """Also over links and "..", and where a file system takes A.nrrd for a.nrrd."""
    try:
        return a.samefile(b)
    except OSError:  # one of them is not there
        return os.path.realpath(a) == os.path.realpath(b)


def _check_names(
    targets: Sequence[Path], maps: Sequence[Path], picture: Path | None, *texts: Path | None, read: Sequence[Path | None] = ()
) -> None:
    """Refuse names that could not be written to, or that are read, before anything is computed."""
    from .output import check_suffix

    if sum(str(p) == "-" for p in texts) > 1:
        raise UserError("Only one of --json and --csv can go to standard output; give the other a file name.")
    everything = [user_path(p) for p in (*targets, *maps, picture, *texts) if p and str(p) != "-"]
    sources = [user_path(p) for p in read if p]
    for path in everything:
        check_writable(path)
        if any(_same(path, source) for source in sources):
            raise UserError(f"{path} is what is read; give the result a name of its own (-o).")
        for folder in (s for s in sources if s.is_dir() and path.is_file() and path.resolve().is_relative_to(s.resolve())):
            if any(_same(path, Path(file)) for _, files in list_series(folder).values() for file in files):
                raise UserError(f"{path} is a slice of a scan that is read; give the result a name of its own (-o).")
        if sum(_same(path, other) for other in everything) > 1:
            raise UserError(f"Two results would be written to {path}; give each a name of its own.")
    for path in targets:
        check_suffix(path)
    for path in maps:
        if not path.name.lower().endswith(VOLUME_SUFFIXES) or path.name.lower().endswith(".seg.nrrd"):  # as which Slicer would load it
            raise UserError(f"{path} is not the name of a volume; end it in {', '.join(VOLUME_SUFFIXES)}, and not in .seg.nrrd.")
    if picture and picture.suffix.lower() != ".png":
        raise UserError(f"{picture} would not be a PNG; end the picture's name in .png.")


def _check_fit(image: Image, targets: Sequence[Path], reference: Path | None, labels: Sequence[Label]) -> Image | None:
    """The reference on the image's grid, its segments by their names in the values of `labels` where any has one of theirs. Refuses
    results that this image cannot give, before anything is computed."""
    from .dataset import read_mask, same_names, translated
    from .output import check_fit

    for path in targets:
        check_fit(path, image)
    if reference is None:
        return None
    array, named = read_mask(reference, image)
    table = same_names(named, labels)
    if named and not table and max(len(named), len(labels)) > 1:  # one and one are compared whatever they are called
        theirs, ours = (", ".join(f"'{label.name}'" for label in some) for some in (named, labels))
        cure = "rename them as those, or give a label map with the model's values"
        raise UserError(f"None of the segments of {reference} ({theirs}) has the name of a label of the model ({ours}); {cure}.")
    return image.like(translated(array, table, np.uint16) if table else array)


def _report(image: Image, prediction: Prediction, truth: Image | None) -> dict[str, Any]:
    """What --json writes."""
    measures = measure(prediction.labels, prediction.label_defs, image)
    warnings, pixels = list(prediction.warnings), length_unit(image) == "px"
    flat = image.shape[0] == 1
    if pixels:
        sizes = "areas are in pixels" if flat else "volumes are in pixels and voxels"
        warnings.append(f"{image.source} has no pixel size, so lengths and {sizes}.")
        for item in measures:
            item["volume_ml"] = None
    start, stop = prediction.roi.start[::-1], prediction.roi.stop[::-1]
    report: dict[str, Any] = {
        "image": str(image.source),
        "model": prediction.model_name,
        "engines": list(prediction.engines),
        "seconds": round(prediction.seconds, 3),
        "warnings": warnings,
        "roi_ijk": [[a, b - 1] for a, b in zip(start, stop)],
        "points_are": ("pixels" if flat else "voxels") if pixels else "LPS mm",
        "labels": measures,
    }
    if truth is not None:
        for item in measures:
            # A reference with one label counts for a model with one label, whatever its value.
            alone = len(measures) == 1 and len(np.unique(truth.array[truth.array > 0])) < 2
            true = truth.array > 0 if alone else truth.array == item["value"]
            item["dice"] = round(dice(prediction.labels.array == item["value"], true), 4)
    return report


def _loads(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # of what is damaged, anything
        return False
    return True


def _display(card: Card) -> dict[str, Any]:
    """The window that a card's images are looked at with; one that only a later version knows is no reason to show none."""
    preset = presets().get(card.data.get("display", ""))
    return preset.intensity() if preset else card.intensity


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(stderr=True)
    title = f"{report['model']} on {Path(report['image']).name}: {report['seconds']:.1f} s, {', '.join(report['engines'])}"
    table = Table(title=escape(title))
    with_dice = any("dice" in item for item in report["labels"])
    size, unit = {"pixels": ("area (px)", "px"), "voxels": ("voxels", "px")}.get(report["points_are"], ("volume (ml)", "mm"))
    for name in ("segment", size, f"longest ({unit})", f"perpendicular ({unit})", "mean", *(["Dice"] if with_dice else [])):
        table.add_column(name, justify="left" if name == "segment" else "right")

    def show(value: float | None, digits: int) -> str:
        if value is None:
            return "-"
        return f"{value:.2g}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"

    for item in report["labels"]:
        row = [
            escape(item["name"]),
            show(item["volume_mm3"], 0) if unit == "px" else show(item["volume_ml"], 3),
            show(item["longest_mm"], 1),
            show(item["perpendicular_mm"], 1),
            show(item["mean_hu"], 0),
        ]
        table.add_row(*row, *([show(item.get("dice"), 3)] if with_dice else []))
    console.print(table)


def _print_nodule(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    nodule = report["nodule"]
    title = f"{report['model']} on {Path(report['image']).name}: {', '.join(report['engines'])}"
    table = Table(title=escape(title), caption=escape(nodule["note"]), show_header=False)
    for name, value in zip(COLUMNS, nodule_row(nodule)):
        table.add_row(name, value)
    if "dice" in report["labels"][0]:
        table.add_row("Dice", f"{report['labels'][0]['dice']:.3f}")
    Console(stderr=True).print(table)


def _print_json(value: Any) -> None:
    """With the letters themselves where standard output can hold them."""
    print(json.dumps(value, indent=2, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf")))


def _write_text(path: Path | None, text: str, encoding: str = "utf-8") -> None:
    """To a file, or to standard output where it is "-"."""
    if str(path) == "-":
        print(text)
    elif path:
        write_text(path, text + "\n", encoding)


@_cancellable("; not every result may have been written")
def _write(
    image: Image,
    prediction: Prediction,
    truth: Image | None,
    card: Card,
    targets: Sequence[Path],
    maps: Mapping[Path, Image],
    picture: Path | None,
    shown: dict[str, Any],
    report_file: Path | None,
    quiet: bool,
    nodule: dict[str, Any] | None = None,
    csv_file: Path | None = None,
    said: Sequence[str] = (),
) -> None:
    """Everything that a command leaves behind. shown: the picture's window. nodule: describe() of what was clicked on. said: the warnings
    that were printed before."""
    from .output import write_segmentation

    report = _report(image, prediction, truth)
    if nodule is not None:
        report["nodule"] = nodule
    if not prediction.labels.array.any():
        dicom, gone = [path for path in targets if path.suffix.lower() == ".dcm"], ""
        if dicom and (len(dicom) < len(targets) or report_file):  # nothing found is a result, which only a DICOM SEG cannot hold
            targets, gone = [path for path in targets if path not in dicom], f", so there is no {dicom[0]}"
        report["warnings"].append(f"Nothing was found{gone}; try another ROI or model.")
    # DICOM first: it asks most of the input, and where it fails nothing else should have been written.
    for path in sorted(targets, key=lambda p: p.suffix.lower() != ".dcm"):
        write_segmentation(prediction, path, image)
    for path, values in maps.items():
        write_image(on_print(values), path)
    if picture:
        save_picture(
            image,
            prediction,
            picture,
            window=display_range(shown, image.channels),
            measures=report["labels"],
            title=f"{_stem(Path(str(image.source)))} - {prediction.model_name}",
            unit="HU" if expects_hu(card.intensity) else "",
        )
    _write_text(report_file, json.dumps(report, indent=2))
    if nodule is not None:
        x, y, z = nodule["center"]
        place = [f"{v:.1f}" for v in (-x, -y, z)]
        cells = [Path(str(image.source)).name, *place, *nodule_row(nodule)]
        text = csv_text([cells], ("Scan", "R (mm)", "A (mm)", "S (mm)", *COLUMNS), [nodule["note"]])
        _write_text(csv_file, text.rstrip("\n"), "utf-8-sig")  # the mark by which spreadsheets know UTF-8
    for warning in report["warnings"]:
        if warning not in said:
            print(f"warning: {warning}", file=sys.stderr)
    if not quiet:
        (_print_report if nodule is None else _print_nodule)(report)
        for path in [*targets, *maps, *([picture] if picture else [])]:
            print(f"wrote {path}", file=sys.stderr)


def _app() -> Any:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    app = typer.Typer(
        help="Segment medical images with U-Nets.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    model_app = typer.Typer(help="Look into and make model packages.", no_args_is_help=True)
    parts = {"model": model_app, "dataset": _dataset_app(), "worklist": _worklist_app()}
    for name, part in parts.items():
        app.add_typer(part, name=name)

    without = "Replaces what is there. Default: the image's name with .seg.nrrd, in the current folder, if that is not there yet."

    def version(value: bool) -> None:
        if value:
            print(__version__)
            raise typer.Exit()

    @app.callback()
    def root(show: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False) -> None:
        pass

    @app.command()
    def segment(
        images: Annotated[list[Path], typer.Argument(help="An image file or a DICOM folder; several for a model with several channels.")],
        model: Annotated[list[str], typer.Option("--model", "-m", help="A model's name or .unet.zip file; several are averaged.")],
        output: Annotated[
            list[Path],
            typer.Option(
                "--output", "-o", help=f".seg.nrrd, .nii(.gz), .nrrd, .mha, .dcm (DICOM SEG), .png, .tif; may be repeated. {without}"
            ),
        ] = [],  # noqa: B006 - typer copies it
        roi: Annotated[
            str | None, typer.Option(help="Only this box: R0,R1,A0,A1,S0,S1 in mm RAS, or ijk:i0,i1,j0,j1,k0,k1 in voxels.")
        ] = None,
        at: Annotated[str | None, typer.Option(help="R,A,S in mm: a box around this point, and the component next to it.")] = None,
        window: Annotated[str | None, typer.Option(help="Override the model's window: a preset, or LEVEL,WIDTH in HU.")] = None,
        tta: Annotated[str | None, typer.Option(help=f"Test-time augmentation: {', '.join(TTA)}. Default: the model's.")] = None,
        engine: Annotated[str, typer.Option(help=f"auto, {', '.join(ENGINES)}.")] = "auto",
        device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}.")] = "auto",
        precision: Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)}.")] = "auto",
        threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
        overlap: Annotated[float, typer.Option(help="Overlap of neighbouring patches, 0 to below 0.95.")] = 0.5,
        series: Annotated[str | None, typer.Option(help="The series' UID, where a DICOM folder holds several.")] = None,
        uncertainty: Annotated[Path | None, typer.Option(help="Also write the uncertainty (entropy, 0 to 1) to this image file.")] = None,
        probabilities: Annotated[Path | None, typer.Option(help="Also write the probabilities to this image file.")] = None,
        picture: Annotated[Path | None, typer.Option(help="Also write a four-panel PNG.")] = None,
        display: Annotated[str | None, typer.Option(help="Window of the picture: a preset, or LEVEL,WIDTH.")] = None,
        report_file: Annotated[Path | None, typer.Option("--json", help="Also write the measures as JSON; - for standard output.")] = None,
        reference: Annotated[Path | None, typer.Option(help="A label map of the same scan to compare with (Dice).")] = None,
        postprocess: Annotated[bool, typer.Option(help="Apply the model's clean-up (components, holes).")] = True,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no table.")] = False,
    ) -> None:
        """Segment an image and write the result."""
        packages = [find_model(m) for m in model]
        targets = _targets(output, images)
        maps = [p for p in (uncertainty, probabilities) if p]
        _check_names(targets, maps, picture, report_file, read=[*images, reference])
        shown = parse_window(display) if display else _display(packages[0].card)
        if display and not picture:
            raise UserError("--display is of the picture; give --picture too.")
        with _cancellable(), _progress(not quiet and sys.stderr.isatty()) as progress:
            image = _read(images, series)
            truth = _check_fit(image, targets, reference, packages[0].card.labels)
            options = Options(
                roi=parse_roi(roi, image) if roi is not None else None,
                at=parse_point(at) if at is not None else None,
                intensity=parse_window(window) if window is not None else None,
                tta=tta,
                overlap=overlap,
                engine=engine,
                device=device,
                precision=precision,
                threads=threads,
                uncertainty=uncertainty is not None,
                probabilities=probabilities is not None,
                postprocess=postprocess,
            )
            said = foreseen(image, packages, options)  # at once: hippocampus-3d takes 458 s for the whole of a chest CT
            for warning in said:
                print(f"warning: {warning}", file=sys.stderr)
            prediction = predict(image, packages, options, progress)
        values = ((uncertainty, prediction.uncertainty), (probabilities, prediction.probabilities))
        maps_written = {p: m for p, m in values if p and m}
        _write(image, prediction, truth, packages[0].card, targets, maps_written, picture, shown, report_file, quiet, said=said)

    @app.command()
    def click(
        images: Annotated[list[Path], typer.Argument(help="A CT scan: an image file or a DICOM folder.")],
        at: Annotated[list[str], typer.Option(help="R,A,S in mm of a click on the nodule; may be repeated.")] = [],  # noqa: B006
        not_: Annotated[list[str], typer.Option("--not", help="R,A,S in mm of a click on what is not part of it; may be repeated.")] = [],  # noqa: B006
        box: Annotated[
            list[str],
            typer.Option(help="A box that fits closely around it: R0,R1,A0,A1,S0,S1 in mm RAS, or ijk:i0,i1,j0,j1,k0,k1 in voxels."),
        ] = [],  # noqa: B006
        model: Annotated[str, typer.Option("--model", "-m", help="A click model's name or .unet.zip file.")] = CLICK_MODEL,
        output: Annotated[
            list[Path],
            typer.Option("--output", "-o", help=f".seg.nrrd, .nii(.gz), .nrrd, .mha, .dcm (DICOM SEG); may be repeated. {without}"),
        ] = [],  # noqa: B006
        engine: Annotated[str, typer.Option(help=f"auto, {', '.join(ENGINES)}.")] = "auto",
        device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}.")] = "auto",
        threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
        series: Annotated[str | None, typer.Option(help="The series' UID, where a DICOM folder holds several.")] = None,
        picture: Annotated[Path | None, typer.Option(help="Also write a four-panel PNG.")] = None,
        report_file: Annotated[Path | None, typer.Option("--json", help="Also write the measures as JSON; - for standard output.")] = None,
        csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the nodule's row as CSV; - for standard output.")] = None,
        reference: Annotated[Path | None, typer.Option(help="A label map of the same scan to compare with (Dice).")] = None,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No table.")] = False,
    ) -> None:
        """Outline the one nodule that is clicked on, and say its size: first --box, then all --at in their order, then all --not."""
        package = find_model(model)
        targets = _targets(output, images)
        _check_names(targets, [], picture, report_file, csv_file, read=[*images, reference])
        prompts: list[Prompt] = [("point", *parse_point(text), True) for text in at]
        prompts += [("point", *parse_point(text, "--not"), False) for text in not_]
        if not at and not box:
            raise UserError("Nothing was clicked on; give --at R,A,S or --box.")
        with _cancellable():
            image = _read(images, series)
            truth = _check_fit(image, targets, reference, package.card.labels)
            prompts = [box_prompt(image, parse_roi(text, image, "--box")) for text in box] + prompts
            session = ClickSession(image, package, options=Options(engine=engine, device=device, threads=threads))
            answer = session.replay(prompts)
            if not answer.found:
                raise UserError(answer.text)
            nodule = describe(image, answer.mask, answer.box.start, expects_lung(package.card))
            if answer.text.startswith(BEYOND):
                nodule["note"] += f" {BEYOND}"
        prediction = replace(session.prediction(), seconds=sum(session.seconds.values()))
        _write(image, prediction, truth, package.card, targets, {}, picture, _display(package.card), report_file, quiet, nodule, csv_file)

    @app.command()
    def models(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
        """List the bundled and imported models."""
        cards, broken = [], []
        for path in model_files():
            try:
                cards.append((path, ModelPackage.read(path).card))
            except UserError as e:
                broken.append(str(e))
        if as_json:
            _print_json([card.data for _, card in cards])
        else:
            table, console = Table(), Console()
            for name in ("model", "task", "size", "segments, measured Dice"):
                table.add_column(name, no_wrap=name in ("model", "task", "size"), overflow="fold")
            for path, card in cards:
                scores = card.data.get("metrics", {}).get("dice")
                numbers = {k: v for k, v in scores.items() if isinstance(v, (int, float))} if isinstance(scores, dict) else {}
                names = dict.fromkeys((*(label.name for label in card.labels), *numbers))
                table.add_row(
                    f"{card.name} {card.version}",
                    f"{card.data['task']}, {'2.5' if card.context else card.dimensions}D",
                    f"{path.stat().st_size / 1e6:.1f} MB",
                    escape("\n".join(f"{name} {numbers[name]:.3f}" if name in numbers else name for name in names)),
                )
            console.print(table)
            for _, card in cards:
                console.print(escape(f"{card.name} {card.version}: {card.data['licence']}"), highlight=False)
            console.print(escape(f"Imported models: {user_models_folder()}"), highlight=False)
        for text in broken:
            print(f"unetseg: {text}", file=sys.stderr)

    @app.command(name="presets")
    def list_presets(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
        """List the window presets."""
        if as_json:
            _print_json([{"name": p.name, "label": p.label, "modality": p.modality, **p.intensity()} for p in presets().values()])
            return
        table = Table()
        for name in ("preset", "what", "modality", "level", "width"):
            table.add_column(name, justify="right" if name in ("level", "width") else "left")
        for p in presets().values():
            ends = [f"{v:g} %" for v in p.percentiles] if p.percentiles else [f"{p.level:g}", f"{p.width:g}"]
            table.add_row(p.name, p.label, p.modality, *ends)
        Console().print(table)

    @app.command()
    def sample(folder: Annotated[Path | None, typer.Option(help="Where to keep it; default: the user's data folder.")] = None) -> None:
        """Fetch two real chest CT with nodule labels (from the source distribution of pyradiomics 3.0.1, 34 MB)."""
        from .sample import fetch_sample

        for name, path in fetch_sample(folder, lambda _, text: print(text, file=sys.stderr)).items():
            print(f"{name}\t{path}")

    @app.command()
    def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
        """What runs here, and how fast."""
        findings = _doctor()
        if as_json:
            _print_json(findings)
            return
        console = Console()
        console.print(f"unetseg {__version__}, Python {findings['python']}, {findings['platform']}, {counted(findings['cores'], 'core')}")
        for name, text in findings["packages"].items():
            console.print(f"  {name}: {text or 'not installed'}")
        table = Table(title="one patch, median of 5 (the first one, which warms up, left out)")
        for name in ("model", "engine", "runs on", "ms", "Mvoxel/s"):
            table.add_column(name, justify="right" if name in ("ms", "Mvoxel/s") else "left")
        for row in findings["speed"]:
            if "error" in row:
                table.add_row(row["model"], row["engine"], escape(row["error"]))
            else:
                table.add_row(row["model"], row["engine"], row["runs_on"], f"{row['ms']:.0f}", f"{row['mvoxel_per_s']:.2f}")
        console.print(table)
        for path, problem in findings["models"].items():
            console.print(escape(f"{path}: {problem or 'verified'}"), style=None if problem is None else "red", highlight=False)

    @model_app.command()
    def verify(packages: Annotated[list[str], typer.Argument(help="Names or .unet.zip files.")]) -> None:
        """Check a package: hashes, card, ONNX graph, that it loads and runs, and that its PyTorch weights are of the same network."""
        for name in packages:
            package = find_model(name)
            engine = choose_engine(package, device="cpu")
            shape = (1, package.card.inputs, *package.card.patch[3 - package.card.dimensions :])
            batch = np.random.default_rng(0).random(shape, np.float32)
            out = engine.run(batch)
            if out.shape != (1, package.card.outputs, *shape[2:]) or not np.isfinite(out).all():
                raise UserError(f"{package.path} loads, but gives {out.shape} for {shape}; it does not fit its card.")
            modules = "torch.nn", "safetensors.torch", "onnxruntime.capi"
            if package.safetensors and "network" in package.card.data and all(map(_loads, modules)):
                ours, theirs = (make_engine(package, name, "cpu", "fp32", 0).run(batch) for name in ("onnx", "torch"))
                # In noise the bundled models differ by 5e-6 of the largest logit at most.
                if ours.shape != theirs.shape or not np.abs(ours - theirs).max() <= 1e-3 * np.abs(ours).max():
                    raise UserError(
                        f"{package.path} gives other values with PyTorch than with ONNX; ask its author for a corrected package."
                    )
            print(f"{package.path}: verified ({engine.describe()})")

    @model_app.command()
    def info(package: Annotated[str, typer.Argument(help="A name or .unet.zip file.")]) -> None:
        """Print a package's card."""
        _print_json(find_model(package).card.data)

    @model_app.command()
    def pack(
        network: Annotated[Path, typer.Argument(help="The .onnx file.")],
        output: Annotated[Path, typer.Option("--output", "-o", help="The .unet.zip to write.")],
        card: Annotated[Path | None, typer.Option(help="The card as JSON; sizes and hashes are filled in.")] = None,
        labels: Annotated[str, typer.Option(help="Without a card: A,B, in the order of the outputs after the background.")] = "",
        intensity: Annotated[
            str, typer.Option(help="Without a card: what it was trained to see; a window preset, LEVEL,WIDTH in HU, zscore or percentile.")
        ] = "",
        spacing: Annotated[
            str, typer.Option(help="Without a card: X,Y,Z in mm, X,Y of a 2D network's slices. Default: images as they are.")
        ] = "",
        axis: Annotated[str, typer.Option(help=f"Without a card, 2D: {', '.join(SLICE_AXIS)}. Default: axial.")] = "",
        safetensors: Annotated[Path | None, typer.Option(help="Weights to fine-tune from.")] = None,
    ) -> None:
        """Make a package from an ONNX file and a card, or what a card would say: unetseg model pack net.onnx --labels liver,tumour
        --intensity abdomen --spacing 0.8,0.8,2.5 -o net.unet.zip"""
        if not str(output).endswith(SUFFIX):
            raise UserError(f"{output} would be no package; end its name in {SUFFIX}.")
        if bool(card) == bool(labels and intensity) or card and (labels or intensity or spacing or axis):
            raise UserError("Give either --card, or --labels and --intensity (and --spacing and --axis).")
        for path in filter(None, (network, card, safetensors)):
            if not path.is_file():
                raise UserError(f"{path} does not exist; check the name.")
        onnx = network.read_bytes()
        if card:
            try:
                data = json.loads(card.read_bytes())  # also in UTF-16, as PowerShell's > writes it, and with Notepad's mark
            except (ValueError, RecursionError) as e:
                raise UserError(f"{card} is not JSON ({e}); correct it.") from e
            if not isinstance(data, dict):
                raise UserError(f"{card} must hold a JSON object.")
        else:
            data = bare_card(network.stem, onnx, labels, intensity, spacing, axis)
        made = write_package(output, data, onnx, safetensors.read_bytes() if safetensors else None)
        print(f"wrote {made.path}")

    for part in (app, *parts.values()):
        for command in part.registered_commands:
            assert command.callback is not None
            command.callback = _cancellable("")(command.callback)
    return app


def _dataset_app() -> Any:
    """The commands on dataset folders."""
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .dataset import EXPORTS, INDEX, OBJECTIONS, SPLITS, Dataset, modality, read_mask, read_model_mask

    app = typer.Typer(help="Collect annotated cases to train from, in one folder.", no_args_is_help=True)
    Folder = Annotated[Path, typer.Argument(help="The dataset's folder.")]

    def named_labels(texts: Sequence[str]) -> list[Label]:
        out = []
        for i, text in enumerate(texts):
            value, _, name = text.rpartition("=")
            if not name.strip() or not (value or str(i + 1)).isdecimal():
                raise UserError(f"--label {text} must be VALUE=NAME, such as 1=nodule.")
            out.append(Label(int(value or i + 1), name.strip(), DEFAULT_COLORS[i % len(DEFAULT_COLORS)], {}))
        return out

    @app.command()
    def add(
        folder: Folder,
        images: Annotated[list[Path], typer.Argument(help="The image file or DICOM folder; several for several channels.")],
        mask: Annotated[Path, typer.Option("--mask", "-m", help="The corrected mask: .seg.nrrd, or a label map on the image's grid.")],
        model_mask: Annotated[Path | None, typer.Option(help="The model's own mask, to record what was changed.")] = None,
        model: Annotated[str, typer.Option(help="Which model made it.")] = "",
        name: Annotated[str | None, typer.Option(help="The case's name (no patient's name); default: made from the voxels.")] = None,
        patient: Annotated[
            str | None, typer.Option(help="Groups a patient's cases; only a salted hash is kept. Default: the PatientID.")
        ] = None,
        label: Annotated[list[str], typer.Option(help="VALUE=NAME of the mask's labels, for a new dataset; may be repeated.")] = [],  # noqa: B006
        channel: Annotated[list[str], typer.Option(help="A channel's name, for a new dataset; may be repeated.")] = [],  # noqa: B006
        by: Annotated[str, typer.Option(help="Who annotated it, if that is to be kept.")] = "",
        dated: Annotated[bool, typer.Option("--dated", help="Keep today's date.")] = False,
        split: Annotated[str | None, typer.Option(help=f"{', '.join(SPLITS)}. Default: where the patient's other cases are.")] = None,
        allow: Annotated[list[str], typer.Option(help=f"Accept what is refused otherwise: {', '.join(OBJECTIONS)}.")] = [],  # noqa: B006
        series: Annotated[str | None, typer.Option(help="The series' UID, where a DICOM folder holds several.")] = None,
    ) -> None:
        """Add a case, or a new version of one; creates the dataset where there is none. Only voxels, geometry and modality are copied."""
        with _cancellable():
            image = _read(images, series)
            array, named = read_mask(mask, image)
            new, made = not (user_path(folder) / INDEX).exists(), not user_path(folder).exists()
            if new:
                if len(images) == 1:  # several files are channels, each of them
                    image = of_channels(image, len(channel)) if channel else of_channels(of_channels(image, 1), 3)
                labels = named_labels(label) or list(named)
                if not labels:
                    raise UserError(f"{folder} is a new dataset and {mask} does not name its labels; give --label 1=NAME.")
                n = image.n_channels
                channels = channel or ([modality(image) or "image"] if n == 1 else [f"channel {i}" for i in range(n)])
                dataset = Dataset.create(folder, folder.absolute().name, labels, channels)
            else:
                dataset = Dataset.open(folder)
                if len(images) == 1:
                    image = of_channels(image, len(dataset.channels))
            try:
                its: Sequence[Label] = named_labels(label) or named
                its, own = read_model_mask(model_mask, image, its, dataset.labels) if model_mask else (its, None)
                entry = dataset.add(
                    image,
                    array,
                    name=name,
                    patient=patient,
                    labels=its or None,
                    model_mask=own,
                    model=model,
                    by=by,
                    dated=dated,
                    split=split,
                    allow=allow,
                )
            except BaseException:
                if new:
                    dataset.discard()
                    if made:
                        with suppress(OSError):
                            dataset.folder.rmdir()
                raise
        print(f"{entry.name} version {entry.version}, {counted(len(dataset.entries), 'case')} in {folder}")
        for what, change in entry.changes.items():
            added = counted(change["added"], "voxel")
            print(f"  {what}: {added} added, {change['removed']} removed, Dice with the model's {change['dice']:.3f}")

    @app.command(name="list")
    def list_cases(folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
        """The cases with their patients (hashed), splits and versions."""
        dataset = Dataset.open(folder)
        entries = dataset.entries.values()
        if as_json:
            keys = ("name", "patient", "split", "version")
            _print_json([{k: getattr(e, k) for k in keys} | {"record": e.record} for e in entries])
            return
        table = Table(title=escape(f"{dataset.name}: {', '.join(d.name for d in dataset.labels)}"))
        for column in ("case", "patient", "split", "version", "size", "voxels", "changed"):
            table.add_column(column, overflow="fold")
        for e in entries:
            marked = ", ".join(f"{k} {v}" for k, v in e.record["voxels_by_label"].items())
            changed = ", ".join(f"{k} +{c['added']} -{c['removed']}" for k, c in e.changes.items())
            size = " x ".join(map(str, e.record["geometry"]["size"]))
            table.add_row(e.name, e.patient, e.split or "-", str(e.version), size, escape(marked), escape(changed) or "-")
        Console().print(table)

    @app.command()
    def check(
        folder: Folder,
        hashes: Annotated[bool, typer.Option(help="Read every file and compare its hash.")] = True,
        clean: Annotated[bool, typer.Option("--clean", help="Remove files of no case that are older than a day.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    ) -> None:
        """Whether the folder is whole; `unetseg-train check` looks into the images and masks."""
        dataset = Dataset.open(folder)
        gone = dataset.clean() if clean else []
        problems = dataset.check(hashes)
        if as_json:
            _print_json([{"case": p.case, "what": p.what, "cure": p.cure} for p in problems])
        else:
            for problem in problems:
                print(problem)
            removed = f", {counted(len(gone), 'leftover')} removed" if clean else ""
            print(f"{counted(len(dataset.entries), 'case')}, {counted(len(problems), 'problem')}{removed}")
        if problems:
            raise typer.Exit(1)

    @app.command()
    def split(
        folder: Folder,
        fractions: Annotated[str, typer.Option(help="Of train, validation and test.")] = "0.7,0.15,0.15",
        seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
        again: Annotated[bool, typer.Option("--again", help="Also deal anew what is dealt already.")] = False,
    ) -> None:
        """Deal the patients into train, validation and test; patients already dealt keep their part."""
        for part, names in Dataset.open(folder).split(_numbers(fractions, 3, "--fractions"), seed, again).items():
            print(f"{part}: {counted(len(names), 'case')}")

    @app.command()
    def export(
        folder: Folder,
        target: Annotated[Path, typer.Argument(help="A new folder.")],
        kind: Annotated[str, typer.Option("--as", help=f"{', '.join(EXPORTS)}.")],
    ) -> None:
        """Copy the cases as nnU-Net, MONAI or ITK-SNAP read them."""
        with _cancellable():
            print(f"wrote {Dataset.open(folder).export(target, kind)}")

    @app.command()
    def remove(
        folder: Folder,
        case: Annotated[str, typer.Argument(help="The case's name.")],
        erase: Annotated[bool, typer.Option("--erase", help="Delete all of its versions; it cannot be brought back.")] = False,
    ) -> None:
        """Take a case out; without --erase its files stay and `restore` brings it back."""
        Dataset.open(folder).remove(case, erase)
        print(f"{case} is {'erased' if erase else 'removed'}")

    @app.command()
    def restore(
        folder: Folder,
        case: Annotated[str, typer.Argument(help="The case's name.")],
        version: Annotated[int | None, typer.Option(help="Make this former version the current one.")] = None,
    ) -> None:
        """Bring a removed case or a former version back."""
        entry = Dataset.open(folder).restore(case, version)
        print(f"{entry.name} version {entry.version}")

    return app


def _worklist_app() -> Any:
    """The commands on work lists."""
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .dataset import INDEX, OBJECTIONS, Dataset, plain_name, read_mask, read_model_mask
    from .worklist import CHANNELS, Annotator, Scan, WorkList, check_models

    app = typer.Typer(help="Correct many scans one by one, those first where it helps most.", no_args_is_help=True)
    Folder = Annotated[Path, typer.Argument(help="The work list's folder; a dataset's folder may hold one.")]
    Name = Annotated[str, typer.Argument(help="The scan's name in the list.")]
    By = Annotated[str, typer.Option(help="Your name, if the others may see who has a scan.")]

    def as_json(scan: Scan) -> dict[str, Any]:
        out: dict[str, Any] = {"name": scan.name, "status": scan.status, "files": [str(f) for f in scan.files]}
        if scan.series:
            out["series"] = scan.series
        out |= {"mask": str(scan.mask) if scan.mask else None, "model": scan.model, "scores": scan.scores}
        return out | {k: v for k, v in (("by", scan.by), ("error", scan.error), ("case", scan.case)) if v}

    def summary(work: WorkList) -> str:
        counts = work.counts()
        return f"{counted(sum(counts.values()), 'scan')}: " + (", ".join(f"{n} {status}" for status, n in counts.items() if n) or "none")

    def in_order(image: Image, scan: Scan, channels: Sequence[str]) -> Image:
        """The dataset's channels by their names, as the panel adds them: a scan's files are in its model's order."""
        rows, names = (list(map(plain_name, some)) for some in (scan.channels, channels))
        if len(rows) != image.n_channels or any(len({*some}) < len(some) for some in (rows, names)) or not {*names} <= {*rows}:
            return image
        return image.like(image.channels[[rows.index(name) for name in names]])

    @app.command()
    def make(
        folder: Folder,
        # None: Click before 8.2 refuses any other default of several arguments, for all commands.
        sources: Annotated[
            list[Path] | None, typer.Argument(help="Scans, folders of scans, or a .txt/.csv with a scan on each line.")
        ] = None,
        model: Annotated[list[str], typer.Option("--model", "-m", help="What segments them in advance; several are averaged.")] = [],  # noqa: B006
        later: Annotated[bool, typer.Option("--later", help="Do not segment now; the panel, or this command once more, does.")] = False,
        limit: Annotated[int | None, typer.Option(min=1, help="Segment so many scans and stop.")] = None,
        tta: Annotated[str | None, typer.Option(help=f"{', '.join(TTA)}. Default: the model's own.")] = None,
        engine: Annotated[str, typer.Option(help=f"auto, {', '.join(ENGINES)}.")] = "auto",
        device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}.")] = "auto",
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    ) -> None:
        """Make a list or add scans to it, and segment those that the models have not segmented yet. May be stopped and called again."""
        models = [find_model(m) for m in model]
        check_models(models)
        there = WorkList.there(folder)
        if not sources and not there:
            raise UserError(f"{folder} holds no work list yet; name the scans, folders or lists to make it of.")
        if not models and there and not later:
            try:
                models = [find_model(m) for m in WorkList.open(folder).models]
            except UserError as e:
                text = "The list's own model is gone, perhaps as a trained one took its place; name the one that is to segment with -m, or "
                raise UserError(f"{text}only add the scans with --later. {e}") from e
        # Before the list is touched: for a TTA that there is none of every scan of it would be marked as failed.
        views(tta or "none", (), 1.0)
        engines = None if later else [choose_engine(m, engine, device) for m in models]
        channels = len(models[0].card.data["channels"]) if models else CHANNELS
        work, added = WorkList.gather(folder, sources or [], channels)
        if not quiet:
            again = f", {counted(len(work.moved), 'scan')} found again in another place" * bool(work.moved)
            print(f"{counted(len(added), 'scan')} added{again}", *work.left_out, sep="\n", file=sys.stderr)
        if models:
            todo = work.choose_models(models)
            me = Annotator.here(pid=os.getpid())
            options = Options(tta=tta, engine=engine, device=device)
            with _cancellable("; what is segmented is kept, and the same command goes on with the others"):
                n = 0
                while not later and n != limit:
                    with _progress(not quiet and sys.stderr.isatty()) as progress:
                        scan = work.segment(models, me, options, progress, engines=engines)
                    if scan is None:
                        break
                    if not (scan.scores or scan.error):  # a folder of several series, each a scan of its own now
                        todo = n + work.unsegmented - len(work.away)
                        continue
                    n += 1
                    if not quiet:
                        value = f"value {scan.scores['value']:.3f}" if scan.scores and not scan.error else scan.error
                        print(f"{n} of {todo}: {scan.name}, {value}", file=sys.stderr)
        work.clean()
        if not quiet:
            print(summary(work.refresh()), file=sys.stderr)

    @app.command(name="list")
    def list_scans(folder: Folder, json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
        """The scans to come, the most useful first, then the others."""
        work = WorkList.open(folder)
        scans = ({s.name: s for s in work.ordered()} | work.scans).values()
        if json_:
            _print_json([as_json(s) for s in scans])
            return
        table = Table(title=escape(summary(work)))
        for column in ("scan", "status", "value", "entropy", "disagreement", "note"):
            table.add_column(column, overflow="fold")
        for s in scans:
            numbers = [f"{s.scores[k]:.3f}" if s.scores else "-" for k in ("value", "entropy", "disagreement")]
            hours = f"for {s.until / 3600:.1f} h" if s.until else ""
            note = s.error or " ".join(filter(None, [f"by {s.by}" if s.by else "", hours, f"as {s.case}" if s.case else ""]))
            table.add_row(escape(s.name), s.status, *numbers, escape(note))
        Console().print(table)

    @app.command(name="next")
    def next_scan(
        folder: Folder,
        by: By = "",
        leave: Annotated[str, typer.Option(help="A scan of yours that you give back for another.")] = "",
        json_: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    ) -> None:
        """Take the most useful scan, or go on with the one that you have. It is yours for twelve hours, or until done, skip or back."""
        scan = WorkList.open(folder).next(Annotator.here(by), leave)
        if scan is None:
            print("Nothing is left to do." if not json_ else "null")
        elif json_:
            _print_json(as_json(scan))
        else:
            print(scan.name)
            for file in scan.files:
                print(f"  scan  {file}{f' series {scan.series}' if scan.series else ''}")
            print(f"  found {scan.mask}" if scan.mask else "  not segmented yet")

    @app.command()
    def done(
        folder: Folder,
        scan: Name,
        mask: Annotated[Path | None, typer.Option("--mask", "-m", help="The corrected mask, which is added to the dataset.")] = None,
        dataset: Annotated[Path | None, typer.Option(help="The dataset's folder; default: the list's, where it holds one.")] = None,
        by: By = "",
        allow: Annotated[list[str], typer.Option(help=f"Accept what is refused otherwise: {', '.join(OBJECTIONS)}.")] = [],  # noqa: B006
    ) -> None:
        """Mark a scan as corrected; with --mask also add it to the dataset, with the model's own mask."""
        if not mask and (dataset or allow):
            raise UserError("--dataset and --allow are of the corrected mask; give --mask too.")
        work, case = WorkList.open(folder), ""
        found = work.scan(scan)
        if mask:
            target = Dataset.open(dataset or folder) if dataset or (folder / INDEX).exists() else None
            if target is None:
                raise UserError(f"{folder} holds no dataset; give --dataset with the dataset's folder (unetseg dataset add makes one).")
            try:
                image = read_image(found.files, found.series)
            except SeveralSeries as e:
                work.split(scan, list(e.series))
                text = f"{scan} holds several series, each a scan of its own now; look which is yours with: unetseg worklist list --json, "
                raise UserError(text + "then give that one's name.") from e
            if not from_picture(image):
                image = in_order(image, found, target.channels)
            array, named = read_mask(mask, image)
            its, own = read_model_mask(found.mask, image, named, target.labels) if found.mask else (named, None)
            model = found.model if found.mask else ""
            entry = target.add(image, array, labels=its or None, model_mask=own, model=model, by=by, allow=allow)
            case = entry.name
            print(f"{case} version {entry.version} in {target.folder}")
        note = work.done(scan, Annotator.here(by), case)
        print(note or summary(work))

    @app.command()
    def skip(folder: Folder, scan: Name, by: By = "") -> None:
        """Take this scan off the list for everybody."""
        work = WorkList.open(folder)
        print(work.skip(scan, Annotator.here(by)) or summary(work))

    @app.command()
    def back(folder: Folder, scan: Name) -> None:
        """Give a scan back: it is offered again, also one that was taken by another, done, skipped or failed."""
        work = WorkList.open(folder)
        work.back(scan)
        print(summary(work))

    return app


def _doctor() -> dict[str, Any]:
    from importlib import metadata

    def found(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    names = ("numpy", "SimpleITK", "onnxruntime", "openvino", "torch", "highdicom", "matplotlib")
    out: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {n: found(n) for n in names},
        "models": {},
        "speed": [],
    }
    for path in model_files():
        try:
            package = ModelPackage.read(path)
            out["models"][str(path)] = None
        except UserError as e:
            out["models"][str(path)] = str(e)
            continue
        shape = (1, package.card.inputs, *package.card.patch[3 - package.card.dimensions :])
        batch = np.random.default_rng(0).random(shape, np.float32)
        for name in filter(installed, ENGINES):
            row: dict[str, Any] = {"model": package.card.name, "engine": name}
            try:
                engine = make_engine(package, name, "auto", "auto", 0)
                engine.run(batch)
                times = []
                for _ in range(5):
                    began = time.perf_counter()
                    engine.run(batch)
                    times.append(time.perf_counter() - began)
                median = sorted(times)[2]
                row.update(runs_on=engine.describe(), ms=median * 1e3, mvoxel_per_s=np.prod(shape[2:]) / median / 1e6)
            except UserError as e:
                row["error"] = str(e)
            out["speed"].append(row)
    return out
