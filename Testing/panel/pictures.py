"""Photographs the panel in each of its states: python Testing/panel/pictures.py OUT

Light and dark are Slicer's styles; the widths are those of a docked panel. The scan and the model are toys.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WIDTH, NARROW = 420, 380


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="unetseg-pictures-"))
    os.environ["UNETSEG_MODELS"], os.environ["UNETSEG_ENVIRONMENT"] = str(work / "models"), str(work / "torch")
    sys.path[:0] = [str(HERE), str(ROOT / "UNetSegmentation"), str(ROOT / "Testing")]
    from standins.slicergui import finish, start

    gui = start(work / "gui")
    try:
        photograph(gui, out, work)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    shutil.rmtree(work, ignore_errors=True)
    finish(status)


def photograph(gui: Any, out: Path, work: Path) -> None:
    import numpy as np
    import slicer
    from workers import slow_package

    def shoot(name: str, width: int = WIDTH, dark: bool = False) -> None:
        for _ in range(5):
            gui.process_events()
        gui.grab(widget, out / f"{name}.png", width, dark)

    widget = gui.open()
    ui, controller = widget.ui, widget.controller
    gui.wait(lambda: widget._warm, 60)
    shoot("empty")
    shoot("empty-dark", dark=True)

    rng = np.random.default_rng(0)
    array = rng.normal(-800, 40, (40, 96, 96)).astype(np.int16)
    z, y, x = np.ogrid[:40, :96, :96]
    array[((z - 20) * 2.0) ** 2 + (y - 50) ** 2 + (x - 40) ** 2 < 81] = 40
    matrix = np.diag([0.7, 0.7, 1.4, 1.0])
    volume = slicer.util.addVolumeFromArray(array, matrix, name="Chest CT, thin slices")
    volume.CreateDefaultDisplayNodes()
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "Nodule")
    roi.SetCenterWorld((28, 35, 28))
    roi.SetSizeWorld((26, 26, 26))
    settings = widget._parameters
    settings.models = ["lung-nodule-2d-1.2.1"]
    shoot("asks-for-a-region")
    settings.region, settings.uncertainty = roi, True
    shoot("ready")
    shoot("narrow", NARROW)
    ui.advancedSection.collapsed = False
    ui.detailsButton.click()
    shoot("advanced-and-details")
    ui.advancedSection.collapsed = True
    ui.detailsButton.click()

    ui.applyButton.click()
    gui.wait(lambda: not controller.running, 120)
    shoot("done")
    shoot("done-narrow", NARROW)
    shoot("done-dark", dark=True)
    ui.undoButton.click()
    shoot("undone")
    photograph_nodules(gui, widget, volume, shoot)

    slow = slow_package(work).path
    widget.modelList.importFile(slow)
    ui.applyButton.click()
    gui.wait(lambda: controller.text in ("Loading the model", "Segmenting"), 60)
    controller._pace = time.monotonic() - 12, 0.0
    controller.fraction = 0.37
    controller._say("running", "Segmenting")
    shoot("running")
    shoot("running-dark", dark=True)
    os.kill(controller._worker().pid, 9)
    gui.wait(lambda: not controller.running, 60)
    shoot("error")
    shoot("error-narrow-dark", NARROW, dark=True)
    photograph_sets(gui, widget, work, out, shoot)
    photograph_retrain(gui, widget, work, out, shoot)
    gui.close(widget)
    sys.modules["UNetSegmentationPanel"].shutdown()


def photograph_nodules(gui: Any, widget: Any, volume: Any, shoot: Any) -> None:
    """The section "Click a nodule", with nodules that were clicked into the made scan."""
    import numpy as np
    import slicer

    ui, section, settings = widget.ui, widget.nodules, widget._parameters
    array = slicer.util.arrayFromVolume(volume)
    z, y, x = np.ogrid[:40, :96, :96]
    for (k, j, i), mm, hu in (((12, 24, 70), 4.0, 20), ((28, 74, 66), 6.5, -560)):
        array[((z - k) * 1.4) ** 2 + ((y - j) * 0.7) ** 2 + ((x - i) * 0.7) ** 2 < mm**2] = hu
    array[34:, :12, :12] = -1024
    slicer.util.arrayFromVolumeModified(volume)
    ui.runSection.collapsed = ui.modelSection.collapsed = ui.inputSection.collapsed = True

    def settle() -> None:
        gui.process_events()
        gui.wait(lambda: not section.tool.busy, 120)
        for _ in range(40):
            gui.process_events()
            time.sleep(0.01)

    shoot("nodules-none")
    ui.clickButton.click()
    settle()
    shoot("nodules-armed")
    for at in ((28.0, 35.0, 28.0), (49.0, 16.8, 16.8), (46.2, 51.8, 39.2)):
        section.tool.click(at)
        settle()
        if at[0] != 46.2:
            section.tool.next()
    shoot("nodules")
    shoot("nodules-narrow", NARROW)
    shoot("nodules-dark", dark=True)
    earlier = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "CT of last year, nodules")
    earlier.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    from mrml_scenes import add_segment
    from UNetSegmentationLib.mrml import segment_mask

    held = settings.nodules.GetSegmentation()
    for i in range(2):
        mask = segment_mask(settings.nodules, held.GetNthSegmentID(i), volume)
        mask[:, : int(np.nonzero(mask)[1].min()) + 3 + i] = 0
        add_segment(earlier, held.GetNthSegment(i).GetName(), mask, volume)
    settings.earlier, settings.days = earlier, 182
    settle()
    table = ui.noduleTable
    table.horizontalScrollBar().setValue(table.horizontalScrollBar().maximum)
    shoot("nodules-follow-up")
    shoot("nodules-follow-up-wide", 1100)
    settings.earlier = None
    section.tool.next()
    section.tool.click((3.0, 3.0, 52.0))
    settle()
    shoot("nodules-nothing-found")
    section.tool.disarm()
    ui.runSection.collapsed = ui.modelSection.collapsed = ui.inputSection.collapsed = False


def photograph_sets(gui: Any, widget: Any, work: Path, out: Path, shoot: Any) -> None:
    """The sections "Training set" and "Work list", from empty folders to the last scan of a list."""
    import numpy as np
    import slicer
    from retraining import LABELS
    from UNetSegmentationLib.image import Image, write_image
    from UNetSegmentationLib.model import write_package
    from workers import make_card, make_onnx

    others = [getattr(widget.ui, name) for name in ("inputSection", "noduleSection", "modelSection", "runSection", "resultSection")]
    for each in others:
        each.collapsed = True
    labels = [d | {"name": f"{d['name']} hippocampus"} for d in LABELS]
    card, model = make_card(name="hippocampus-toy", labels=labels), "hippocampus-toy-1.0.0"
    write_package(Path(os.environ["UNETSEG_MODELS"], f"{model}.unet.zip"), card, make_onnx("threshold", card))
    widget.modelList.read()
    for i in range(4):
        array = np.random.default_rng(i).normal(0, 0.05, (24, 48, 40)).astype(np.float32)
        array[8:16, 10:24, 10 + i : 26], array[8:16, 26:36, 12:24] = 0.8 - 0.1 * i, 2.0
        write_image(Image(array, (0.8, 0.8, 1.2)), work / "Scans of 2026" / f"T1 MR {i + 1}.nii.gz")
    (work / "Scans of 2026" / "T1 MR 5.nii.gz").write_bytes(b"cut off")
    made, scans = widget.trainingSet, widget.workList

    def settle(what: Any = lambda: True) -> None:
        gui.process_events()
        gui.wait(lambda: what() and not scans.busy and not made.busy and made._reading is None and not made._settle.active, 120)

    def folder(button: Any, path: Path) -> None:
        path.mkdir(exist_ok=True)
        gui.dialogs.answer(str(path))
        button.click()
        settle()

    made.root.collapsed = False
    shoot("set-no-folder")
    made.root.collapsed, scans.root.collapsed = True, False
    settle()
    shoot("list-no-folder")
    folder(scans.ui.listFolderButton, work / "Hippocampi")
    shoot("list-empty")
    folder(scans.ui.addFolderButton, work / "Scans of 2026")
    settle(lambda: scans.list)
    shoot("list-filled")
    widget._parameters.models = [model]
    gui.process_events()
    scans.ui.segmentButton.click()
    gui.wait(lambda: scans.list["models"], 120)
    scans._fraction = 0.37
    scans.show()
    gui.grab(widget, out / "list-segmenting.png", WIDTH)
    gui.wait(lambda: not scans.segmenting, 120)
    settle()
    shoot("list-segmented")

    made.root.collapsed = False
    folder(made.ui.setFolderButton, work / "Hippocampi")
    made.root.collapsed = True
    scans.ui.nextScanButton.click()
    settle(lambda: scans.case)
    for name, width, dark in (("list-scan", WIDTH, False), ("list-scan-narrow", NARROW, False), ("list-scan-dark", WIDTH, True)):
        shoot(name, width, dark)
    made.root.collapsed, scans.root.collapsed = False, True
    settle()
    shoot("set-ready")
    made.ui.setPatientEdit.text = "4711"
    made.ui.setAddButton.click()
    gui.wait(lambda: not made.busy or made.ui.setMessage.text.startswith("Writing"), 120)
    shoot("set-adding")
    settle()
    shoot("set-added")
    segmentation = scans.case.segmentation
    held, node = segmentation.GetSegmentation(), scans.case.volumes[0]
    from UNetSegmentationLib.mrml import segment_mask

    mask = segment_mask(segmentation, held.GetNthSegmentID(0), node)
    mask[9, 4:12, 12:20] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask, segmentation, held.GetNthSegmentID(0), node)
    settle()
    made.ui.setAddButton.click()
    settle()
    made.ui.setCasesSection.collapsed = False
    made.ui.setCasesTable.selectRow(0)
    for name, width, dark in (("set-cases", WIDTH, False), ("set-cases-narrow", NARROW, False), ("set-cases-dark", WIDTH, True)):
        shoot(name, width, dark)
    made.root.collapsed, scans.root.collapsed = True, False
    left = scans.list["total"] - 1  # one of them cannot be read
    for done in range(1, left + 1):
        scans.ui.doneScanButton.click()
        settle(lambda done=done: scans.list["counts"]["done"] == done and (scans.case is not None) == (done < left))
        shoot("list-next" if done < left else "list-finished")
    (work / "Hippocampi").rename(work / "away")
    made.root.collapsed = False
    made.refresh()
    settle()
    shoot("set-folder-gone")
    (work / "away").rename(work / "Hippocampi")
    made.root.collapsed = scans.root.collapsed = True
    made.setFolder("")
    settle()
    for each in others:
        each.collapsed = False


def photograph_retrain(gui: Any, widget: Any, work: Path, out: Path, shoot: Any) -> None:
    """The section "Retrain" with trainings made by hand, and what it shows in the views."""
    import retraining
    import slicer
    from headless_slicer import SliceView, draw_chart
    from UNetSegmentationLib.model import write_package
    from workers import make_card, make_onnx

    ui, folder = widget.ui, work / "cases"
    folder.mkdir()
    section = widget.sections[2]
    for each in (ui.inputSection, ui.noduleSection, ui.modelSection, ui.runSection):
        each.collapsed = True
    section.root.collapsed = False
    shoot("retrain-no-training-set")

    def find() -> None:
        section._find()
        gui.process_events()
        gui.wait(lambda: not section._watch.busy and (section._timer.interval or not section._timer.active), 60)

    card = make_card(version="1.1.0", labels=list(retraining.LABELS))
    package = write_package(work / "toy-1.1.0.unet.zip", card, make_onnx("threshold", card))
    widget.trainingSet.setFolder(str(folder))
    shoot("retrain")
    job = retraining.make_job(folder)
    lines = retraining.curve()
    retraining.make_pictures(job, lines)
    retraining.write_lines(job / "live.jsonl", lines)
    find()
    ui = section.ui

    def settle() -> None:
        gui.process_events()
        gui.wait(lambda: section._fetched and not section._pieces.busy and section._live.get("validation", {}).get("step") == 400, 20)

    section.onCurves(True)
    settle()
    shoot("retrain-training")
    shoot("retrain-training-dark", dark=True)
    for name, chart in (("loss", section._curves.loss_chart), ("dice", section._curves.dice_chart)):
        retraining.save_picture(draw_chart(chart, (700, 380)), out / f"retrain-{name}.png")

    def views(names: tuple[str, ...], size: tuple[int, int]) -> list[Any]:
        found = []
        for name in names:
            node = slicer.mrmlScene.GetSingletonNode(name, "vtkMRMLSliceNode")
            view = SliceView(gui.kept[0], name, "Axial", size, node)
            composite = slicer.app.layoutManager().sliceWidget(name).mrmlSliceCompositeNode()
            view.show(slicer.mrmlScene.GetNodeByID(composite.GetBackgroundVolumeID()))
            found.append(view.picture())
        return found

    retraining.save_picture(views(("UNetExamples",), (700, 700))[0], out / "retrain-examples.png")
    section.onCurves(False)
    for verdict in ("better", "same", "worse"):
        retraining.make_result(job, package.path, verdict, sure=verdict != "same")
        find()
        shoot(f"retrain-{verdict}")
    retraining.make_result(job, package.path)
    find()
    gui.process_events()
    section.ui.worstTable.selectRow(0)
    settle()
    shoot("retrain-compare")
    shoot("retrain-compare-narrow", NARROW)
    shoot("retrain-compare-dark", dark=True)
    retraining.save_picture(retraining.beside(views(("UNetBefore", "UNetAfter"), (600, 600))), out / "retrain-before-after.png")
    section.ui.endCompareButton.click()
    retraining.make_job(folder, "20260103-030405-toy", started=1767407045.0, pid=2**22 + 1, mark="another", kept=True)
    find()
    section._choose(section.jobs[0])
    shoot("retrain-interrupted", NARROW)
    shutil.rmtree(folder)
    find()
    for each in (widget.ui.inputSection, widget.ui.noduleSection, widget.ui.modelSection, widget.ui.runSection):
        each.collapsed = False


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
