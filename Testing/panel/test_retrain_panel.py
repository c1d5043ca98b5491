"""The section "Retrain": trainings in every state, as files made by hand, and what the panel, the scene and the views show of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import retraining
from UNetSegmentationLib.environment import Package, Plan
from workers import make_card, make_onnx

WAIT_S = 60.0
TRAIN_S = 300.0  # for a training of a moment, on a machine that has other things to do


@pytest.fixture
def panel(gui: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models_folder: Path) -> Iterator[Callable[..., Hands]]:
    """panel() opens the module with an empty folder as the training set; the toy that was retrained is installed."""
    folder = tmp_path / "cases"
    folder.mkdir()
    opened: list[Hands] = []

    def open_(folder: Path | None = folder) -> Hands:
        if folder is not None:
            retraining.use_folder(folder)
        hands = Hands(gui, gui.open(), folder)
        opened.append(hands)
        return hands

    yield open_
    for hands in opened:
        hands.section.close()
    if "UNetSegmentationPanel" in sys.modules:
        sys.modules["UNetSegmentationPanel"].shutdown()


class Hands:
    """The test's hands on the section."""

    def __init__(self, gui: Any, widget: Any, folder: Path | None) -> None:
        self.gui, self.widget, self.folder = gui, widget, folder
        self.section = widget.sections[2]
        self.ui = self.section.ui
        widget.trainingSet.refresh = lambda: None  # no process for it
        gui.wait(lambda: widget._warm, WAIT_S)
        self.section.root.collapsed = False
        self.settle()

    def look(self) -> None:
        """What the timer does each second."""
        self.section._poll(0)
        self.settle()

    def settle(self) -> None:
        section = self.section

        def quiet() -> bool:
            self.gui.process_events()
            asking = section._watch.busy or section._elsewhereWatch.busy or (section._timer.active and not section._timer.interval)
            return section._fetched and not section._pieces.busy and not asking

        self.gui.wait(quiet, WAIT_S)
        self.gui.process_events()

    def done(self) -> None:
        """Wait for the process that does what was asked for."""
        self.gui.process_events()
        self.gui.wait(lambda: self.section._task is None, 2 * WAIT_S)
        self.settle()

    def find(self) -> None:
        self.section._find()
        self.settle()

    def rows(self, table: str = "scoreTable") -> list[list[str]]:
        table = getattr(self.ui, table)
        cells = [[table.item(i, j) for j in range(table.columnCount)] for i in range(table.rowCount)]
        return [[c.text() if c is not None else "" for c in row] for row in cells]

    def picture(self, name: str, size: int = 300) -> tuple[Any, np.ndarray]:
        """A slice view of ours, drawn."""
        import slicer
        from headless_slicer import SliceView

        view = SliceView(self.gui.kept[0], name, "Axial", (size, size), slicer.mrmlScene.GetSingletonNode(name, "vtkMRMLSliceNode"))
        composite = slicer.app.layoutManager().sliceWidget(name).mrmlSliceCompositeNode()
        view.logic.GetSliceCompositeNode().SetBackgroundVolumeID(composite.GetBackgroundVolumeID())
        view.logic.FitSliceToBackground()
        return view, view.picture()


def toy(tmp_path: Path, version: str = "1.1.0", **changes: Any) -> Any:
    from UNetSegmentationLib.model import write_package

    card = make_card(**{"version": version, "labels": list(retraining.LABELS), **changes})
    return write_package(tmp_path / f"{card['name']}-{version}.unet.zip", card, make_onnx("threshold", card))


def columns(node: Any) -> dict[str, np.ndarray]:
    from vtk.util.numpy_support import vtk_to_numpy

    table = node.GetTable()
    return {table.GetColumnName(i): vtk_to_numpy(table.GetColumn(i)).copy() for i in range(table.GetNumberOfColumns())}


# -------------------------------------------------------------------------------------------------------------- choosing


def test_without_a_training_set_it_says_where_to_begin(panel: Any, gui: Any) -> None:
    p = panel(None)
    assert not p.ui.trainButton.enabled and "training set" in p.ui.trainMessage.text
    assert not p.ui.jobWidget.visible and not p.ui.outcomeWidget.visible


def test_nothing_of_what_looks_is_left_to_pythons_end(panel: Any, gui: Any) -> None:
    """Slicer may clean the widgets up before the module's own shutdown, or after it."""
    import UNetSegmentationPanel
    from UNetSegmentationPanel import retrain
    from UNetSegmentationPanel.worker import _living

    p = panel()
    p.find()
    looks = p.section._watch._process
    assert looks in _living
    gui.close(p.widget)
    assert looks not in _living  # already now: when Slicer quits, no event loop comes back to it
    watch, told = retrain.Watch(), []
    watch.ask(told.append, find=str(p.folder))
    gui.wait(lambda: told, WAIT_S)
    looks = watch._process
    watch.close()  # as where another folder is looked at, without a wait
    UNetSegmentationPanel.shutdown()
    assert looks not in _living


def test_the_models_with_weights_are_offered_and_the_panels_is_chosen(panel: Any, tmp_path: Path, models_folder: Path) -> None:
    models_folder.mkdir()
    shutil.copy(toy(tmp_path).path, models_folder)  # has no weights
    p = panel()
    combo = p.ui.startCombo
    names = [Path(str(combo.itemData(i))).name for i in range(combo.count)]
    assert names[-1] == "" and "hippocampus-3d-1.2.3.unet.zip" in names and not {n for n in names if n.startswith("toy")}
    assert names[-2].startswith("lung-nodule-click-")
    p.widget._parameters.models = ["hippocampus-3d-1.2.3"]
    p.gui.process_events()
    assert Path(combo.itemData(combo.currentIndex)).name == "hippocampus-3d-1.2.3.unet.zip"
    combo.setCurrentIndex(combo.count - 1)  # the person's own choice stays
    combo.activated.emit(combo.count - 1)
    p.section.update()
    assert combo.itemData(combo.currentIndex) == ""


def test_a_start_whose_model_is_gone_gives_way_to_the_one_that_is_offered_first(panel: Any, models_folder: Path) -> None:
    from UNetSegmentationLib.model import find_model, write_package

    models_folder.mkdir()
    bundled = find_model("hippocampus-3d")
    card = {key: value for key, value in bundled.card.data.items() if key != "files"} | {"name": "zzz", "title": "zzz"}
    mine = write_package(models_folder / f"zzz-{card['version']}.unet.zip", card, bundled.onnx, bundled.safetensors).path
    p = panel()
    combo = p.ui.startCombo
    first = combo.itemData(1)
    p.widget._parameters.models = [Path(str(first)).name.removesuffix(".unet.zip")]
    p.gui.process_events()
    at = combo.findData(str(mine))
    combo.setCurrentIndex(at)
    combo.activated.emit(at)
    assert at > 1 and combo.itemData(combo.currentIndex) == str(mine)
    mine.unlink()
    p.widget.modelList.read()
    p.section.update()
    assert combo.findData(str(mine)) < 0 and combo.itemData(combo.currentIndex) == first


def test_the_wheel_over_a_box_moves_the_panel_and_chooses_nothing(panel: Any) -> None:
    p = panel()
    for combo in (p.ui.startCombo, p.ui.lengthCombo):
        combo.currentIndex = 0
        assert combo.count > 1
        p.gui.wheel(combo)
        assert combo.currentIndex == 0


def test_of_a_model_of_clicks_it_says_how_it_learns(panel: Any) -> None:
    p = panel()
    p.widget.trainingSet.summary = {"labels": [{"name": "Liver lesion"}], "count": 3, "patients": 2, "channels": ["CT"]}
    combo = p.ui.startCombo
    at = next(i for i in range(combo.count) if "lung-nodule-click" in str(combo.itemData(i)))
    combo.setCurrentIndex(at)
    combo.activated.emit(at)
    assert p.ui.trainButton.enabled and "learnt anew" not in p.ui.trainMessage.text
    assert p.ui.trainMessage.text.endswith("every connected part of a label is a lesion.")
    p.widget.trainingSet.summary["channels"] = ["CT", "PET"]
    p.section.update()
    assert not p.ui.trainButton.enabled and "clicked on in one image" in p.ui.trainMessage.text


# ------------------------------------------------------------------------------------------------------------- beginning


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two small cases of two patients."""
    from UNetSegmentationLib.dataset import Dataset
    from UNetSegmentationLib.image import Image
    from UNetSegmentationLib.model import Label

    out = Dataset.create(tmp_path / "set", "toys", [Label(1, "Anterior", (230, 159, 0), {})], ["CT"])
    for i in range(2):
        image = Image(np.random.default_rng(i).normal(0, 9, (6, 8, 8)).astype(np.float32))
        mask = np.zeros((6, 8, 8), np.uint8)
        mask[2:4, 2:6, 2:6] = 1
        out.add(image, mask, patient=f"p{i}")
    return out.folder


def launched(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str] | None = None) -> list[tuple[Any, ...]]:
    """Trainings are not started, but noted: this very process stands for them, and does what is asked for at once. variables: of
    the Python that trains; an empty dictionary: there is none."""
    import socket

    from UNetSegmentationLib import environment, training
    from UNetSegmentationLib.files import UserError
    from UNetSegmentationPanel.retrain import RetrainSection

    seen: list[tuple[Any, ...]] = []

    def launch(folder: Path, python: str) -> None:
        training.update(folder, pid=os.getpid(), mark=training.process_mark(os.getpid()), host=socket.gethostname())

    def ask(self: Any, text: str, arguments: Any, then: Any, python: str = "", variables: Any = None) -> None:
        try:
            answer = training.task(*arguments)
        except UserError as e:
            self._say(str(e))
            return
        if "job" in answer:
            seen.append((Path(answer["job"]["folder"]), python, variables))
        self._say("")
        then(answer)

    def python() -> tuple[str, dict[str, str]]:
        if variables == {}:
            raise UserError("Training needs torch, which is not installed; install it.")
        return "python-of-torch", variables or {}

    monkeypatch.setattr(environment, "training_python", python)
    monkeypatch.setattr(training, "_launch", launch)
    monkeypatch.setattr(RetrainSection, "_ask", ask)
    return seen


def test_train_starts_a_job_and_follows_it_to_its_end(panel: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = launched(monkeypatch, {"X": "1"})
    p = panel(dataset)
    p.gui.click(p.ui.trainButton)
    ((_folder, python, variables),) = seen
    assert python == "python-of-torch" and variables["X"] == "1"
    job, folder = p.section.job, seen[0][0]
    assert job.state == "preparing" and job.options.quick and job.options.device == "auto" and folder.parent == dataset / "retrain"
    assert job.base == Path(p.ui.startCombo.itemData(p.ui.startCombo.currentIndex)).name.removesuffix(".unet.zip")
    assert not p.ui.trainButton.enabled and p.ui.stopTrainingButton.visible and not p.ui.resumeTrainingButton.visible

    retraining.change(folder, state="training", fraction=0.2, seconds_left=200.0, estimate=480.0, dice=0.9)
    lines = retraining.curve(80)
    retraining.write_lines(folder / "live.jsonl", lines)
    p.look()
    text = p.ui.jobMessage.text
    assert "step 80 of 600" in text and "best 0.900" in text and "about 3 min of 8 min left" in text
    assert p.ui.jobBar.value == 20 and p.section.root.text == "Retrain: 20 %"
    p.gui.click(p.ui.stopTrainingButton)
    p.settle()
    assert (folder / "stop").exists()
    assert p.ui.jobMessage.text == "Stopping …" and not p.ui.stopTrainingButton.enabled  # a step, or an epoch, may take a minute
    retraining.change(folder, state="checking", fraction=0.9, seconds_left=None)
    p.look()
    assert p.ui.jobMessage.text == "Checking on held-out cases" and not p.ui.stopTrainingButton.enabled
    retraining.change(folder, state="stopped", fraction=1.0)
    p.look()
    assert p.ui.resumeTrainingButton.visible and not p.ui.stopTrainingButton.visible and not p.ui.jobBar.visible
    assert p.ui.trainButton.enabled

    p.gui.click(p.ui.resumeTrainingButton)
    assert len(seen) == 2 and p.section.job.running and not (folder / "stop").exists()
    retraining.change(folder, state="training", fraction=0.2)
    p.look()
    assert p.ui.jobMessage.text.startswith("Training") and p.ui.stopTrainingButton.enabled


def test_slicers_own_python_is_started_by_its_launcher(panel: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind which it takes itself for python-real, which without Slicer's variables does not start."""
    from UNetSegmentationLib.worker.client import find_python

    seen = launched(monkeypatch)
    p = panel(dataset)
    p.gui.click(p.ui.trainButton)
    retraining.change(seen[0][0], state="stopped", fraction=1.0)
    p.look()
    p.gui.click(p.ui.resumeTrainingButton)
    assert [python for _, python, _ in seen] == 2 * [find_python()]


def test_what_cannot_be_trained_on_is_a_sentence(panel: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real processes."""
    from UNetSegmentationLib.dataset import Dataset

    p = panel(dataset)
    assert p.ui.trainButton.enabled
    Dataset.open(dataset).remove(next(iter(Dataset.open(dataset).entries)))  # by somebody else, just now
    p.gui.click(p.ui.trainButton)
    assert p.ui.trainMessage.text.endswith("…") and not p.ui.trainButton.enabled
    p.done()
    assert "one case only" in p.ui.trainMessage.text and not list((dataset / "retrain").glob("*"))
    p = Tasks(panel(dataset))  # where the panel knows it
    assert not p.ui.trainButton.enabled and "needs cases of at least two patients" in p.ui.trainMessage.text


class FakeJob:
    """As installer.Job: half done, until the test lets it end."""

    pipFailed = False

    def __init__(self, answers: Any, outcome: str, value: Any) -> None:
        self.progress, done, failed, self._cancelled = answers
        self._end = lambda: (done if outcome == "done" else failed)(value)

    def end(self) -> None:
        self._end()

    def cancel(self) -> None:
        self._cancelled()


def test_what_is_missing_is_asked_for_with_its_size_and_installed(panel: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from UNetSegmentationPanel import installer

    python: dict[str, str] = {}
    plan = Plan((Package("lightning", "2.6.6", 12_000_000), Package("monai", "1.6.1", 200_000_000)))
    answer = ["done", plan]
    monkeypatch.setattr(installer, "planTraining", lambda *answers: FakeJob(answers, *answer))
    installed: list[Plan] = []

    def install(plan: Plan, *answers: Any) -> Any:
        installed.append(plan)
        python["X"] = "1"
        return FakeJob(answers, "done", None)

    monkeypatch.setattr(installer, "installTraining", install)
    seen = launched(monkeypatch, python)
    p = panel(dataset)
    p.gui.dialogs.answer(False)
    p.gui.click(p.ui.trainButton)
    assert p.ui.trainButton.text == "Cancel" and p.ui.installBar.visible and p.ui.installBar.maximum == 0  # how long is not known
    p.section._install.progress(0.5, "fetching torch")
    assert p.ui.installBar.value == 50 and p.ui.trainMessage.text == "fetching torch"
    p.section._install.end()
    assert "Nothing was installed" in p.ui.trainMessage.text and not installed and not seen and not p.ui.installBar.visible

    p.gui.click(p.ui.trainButton)
    p.gui.click(p.ui.trainButton)  # Cancel
    assert p.ui.trainMessage.text == "Cancelled." and p.ui.trainButton.text == "Train"

    p.gui.dialogs.answer(True)
    p.gui.click(p.ui.trainButton)
    p.section._install.end()
    p.section._install.end()
    assert len(seen) == 1
    assert installed == [plan] and "212 MB" in str(p.gui.dialogs.shown) and p.section.job.running

    answer[:] = ["done", Plan((Package("lightning", ""),), False, "No network, or choose a folder of wheels.")]
    offered: list[str] = []
    monkeypatch.setattr(installer, "askForTorchWheels", lambda problem, title: offered.append(problem) or len(offered) == 1)
    python.clear()
    retraining.change(p.section.job.folder, state="failed", text="Out of memory; train with smaller patches.")
    p.look()
    assert p.ui.jobMessage.text == "Out of memory; train with smaller patches."
    p.gui.click(p.ui.trainButton)
    p.section._install.end()
    assert p.section._install is not None  # is planned again, from the folder that was chosen
    p.section._install.end()
    assert offered == 2 * ["No network, or choose a folder of wheels."] == 2 * [p.ui.trainMessage.text] and p.section._install is None

    answer[:] = ["failed", "The folder lacks monai; put it there."]
    p.gui.click(p.ui.trainButton)
    p.section._install.end()
    assert p.ui.trainMessage.text == "The folder lacks monai; put it there." and len(offered) == 2

    answer[:] = ["done", plan]
    monkeypatch.setattr(installer, "installTraining", lambda plan, *answers: FakeJob(answers, "failed", "Files are blocked; try again."))
    for pip_failed, so_often in ((False, 0), (True, 1)):
        offered.clear()
        p.gui.dialogs.answer(True)
        p.gui.click(p.ui.trainButton)
        p.section._install.end()
        p.section._install.pipFailed = pip_failed
        p.section._install.end()
        assert offered == so_often * ["Files are blocked; try again."]
    assert p.section._install is not None  # is planned again, from the folder that was chosen


def test_a_segmentation_goes_on_while_what_training_needs_is_installed(panel: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import UNetSegmentationPanel
    from UNetSegmentationPanel import installer

    plan, python = Plan((Package("torch", "2.13.0", 190_000_000),)), {}
    monkeypatch.setattr(installer, "planTraining", lambda *answers: FakeJob(answers, "done", plan))
    monkeypatch.setattr(installer, "installTraining", lambda plan, *answers: FakeJob(answers, "done", None))
    launched(monkeypatch, python)
    p = panel(dataset)
    worker = UNetSegmentationPanel.panelWorker()
    p.gui.dialogs.answer(True)
    p.gui.click(p.ui.trainButton)
    p.section._install.end()
    monkeypatch.setattr(installer, "workerPython", lambda: ("python-of-torch", {}))
    python["X"] = "1"
    p.section._install.end()
    assert UNetSegmentationPanel.panelWorker() is worker and not worker._closed and worker.python == "python-of-torch"


def test_nothing_else_is_begun_while_what_training_needs_is_installed(panel: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training that waits for it would not begin then."""
    from UNetSegmentationPanel import installer

    plan = Plan((Package("torch", "2.13.0", 190_000_000),))
    monkeypatch.setattr(installer, "planTraining", lambda *answers: FakeJob(answers, "done", plan))
    monkeypatch.setattr(installer, "installTraining", lambda plan, *answers: FakeJob(answers, "done", None))
    launched(monkeypatch, {})
    retraining.make_job(dataset, state="stopped", kept=True, pid=None)
    p = panel(dataset)
    others = p.ui.resumeTrainingButton, p.ui.finishTrainingButton, p.ui.dropTrainingButton, p.ui.decideWidget
    assert all(each.enabled for each in others) and p.ui.resumeTrainingButton.visible
    p.gui.dialogs.answer(True)
    p.gui.click(p.ui.trainButton)
    assert not any(each.enabled for each in others)
    p.section._install.end()
    assert p.ui.trainMessage.text == "Installing …" and not any(each.enabled for each in others)
    p.gui.click(p.ui.trainButton)  # Cancel
    assert all(each.enabled for each in others)
    p.gui.click(p.ui.trainButton)
    p.section.close()
    assert p.section._install is None  # nor does it go on when Slicer quits


def test_what_is_trained_is_what_was_shown_when_train_was_pressed(panel: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for what it needs, and installing that, takes minutes."""
    from UNetSegmentationPanel.retrain import RetrainSection

    launched(monkeypatch)
    p = panel(dataset)
    found: list[Any] = []
    monkeypatch.setattr(RetrainSection, "_withPython", lambda self, ready, missing: found.append(ready))
    combos = p.ui.startCombo, p.ui.lengthCombo, p.ui.trainDeviceCombo
    for i in (0, 1):
        for combo in combos:
            combo.setCurrentIndex(i and combo.count - 1)
            combo.activated.emit(combo.currentIndex)
        if not i:
            base = Path(p.ui.startCombo.itemData(0)).name.removesuffix(".unet.zip")
            p.gui.click(p.ui.trainButton)
    assert p.ui.startCombo.itemData(p.ui.startCombo.currentIndex) == ""
    found[0]("python", {})
    job = p.section.job
    assert (job.base, job.options.quick, job.options.device) == (base, True, "auto")


def test_pytorch_stays_as_it_is_while_a_training_needs_it_and_the_other_way_round(
    panel: Any, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from UNetSegmentationPanel import installer

    monkeypatch.setattr(installer, "planTraining", lambda *answers: FakeJob(answers, "done", Plan((Package("monai", "1.6.1", 9_000_000),))))
    monkeypatch.setattr(installer, "planTorch", lambda *answers: FakeJob(answers, "failed", "No network; try again."))
    launched(monkeypatch, {})
    p = panel(dataset)
    button, row = p.widget.ui.torchButton, p.widget.torchRow
    usual = button.toolTip
    assert button.enabled
    p.gui.click(p.ui.trainButton)  # looks up what is to be installed
    assert not button.enabled and "training needs is installed" in button.toolTip
    p.gui.dialogs.answer(lambda text: not button.enabled and False)
    p.section._install.end()
    assert button.enabled and button.toolTip == usual

    button.click()
    assert row.working and button.text == "Cancel" and button.enabled
    assert not p.ui.trainButton.enabled and "PyTorch is installed or removed" in p.ui.trainButton.toolTip
    p.section._begin("python", {})
    p.section._plan()
    assert p.section._install is None and "PyTorch is installed or removed" in p.ui.trainMessage.text
    row._job.end()
    assert not row.working and p.ui.trainButton.enabled

    folder = retraining.make_job(dataset)
    p.find()
    assert not button.enabled and "Wait until the training is done" in button.toolTip
    monkeypatch.setattr(type(p.section), "_folder", str(tmp_path / "cases"))  # another training set is chosen
    p.find()
    assert not p.section.jobs and not button.enabled  # it still needs PyTorch
    retraining.change(folder, state="finished")
    p.section._lookedElsewhere = 0.0
    p.section.update()
    p.settle()
    assert button.enabled
    retraining.make_job(tmp_path / "cases", host="another computer")
    p.find()
    assert p.section.jobs[0].running and button.enabled  # it has a PyTorch of its own
    assert p.ui.trainButton.enabled  # and may train at the same time


# ----------------------------------------------------------------------------------------------------------- finding again


def test_a_running_training_is_found_again_and_a_killed_one_can_be_resumed(
    panel: Any, gui: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = retraining.make_job(tmp_path / "cases")
    p = panel()
    assert not p.section.root.collapsed and p.section.root.text == "Retrain: 35 %"
    gui.close(p.widget)
    retraining.change(folder, pid=2**22 + 1, mark="another boot 1", kept=True)  # no process has it
    p = panel()
    p.look()
    assert p.section.root.text == "Retrain: interrupted" and p.ui.resumeTrainingButton.visible
    assert "resume it" in p.ui.jobMessage.text and p.ui.trainButton.enabled
    seen = launched(monkeypatch)
    p.gui.click(p.ui.finishTrainingButton)  # of the best so far
    assert len(seen) == 1 and (folder / "stop").exists() and p.section.job.running


def test_a_folder_that_is_gone_for_a_while_is_a_sentence_and_followed_again(panel: Any, tmp_path: Path) -> None:
    folder = retraining.make_job(tmp_path / "cases")
    p = panel()
    (tmp_path / "cases").rename(tmp_path / "gone")
    p.look()
    assert str(folder) in p.ui.jobMessage.text and p.section.job.running
    (tmp_path / "gone").rename(tmp_path / "cases")
    retraining.change(folder, fraction=0.5)
    p.look()
    assert p.section.root.text == "Retrain: 50 %" and "Training" in p.ui.jobMessage.text


def test_one_that_is_over_is_looked_at_again_where_it_could_not_be_read(
    panel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from UNetSegmentationPanel import retrain

    folder = finished(tmp_path)
    p = panel()
    monkeypatch.setattr(retrain, "_AWAY_MS", 50)
    (tmp_path / "cases").rename(tmp_path / "gone")
    p.look()
    assert str(folder) in p.ui.jobMessage.text
    (tmp_path / "gone").rename(tmp_path / "cases")
    p.gui.wait(lambda: p.ui.jobMessage.text == "Finished.", WAIT_S)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a named pipe stands for a drive that hangs: who opens it waits")
def test_a_drive_that_hangs_holds_no_panel_up(panel: Any, tmp_path: Path) -> None:
    folder = retraining.make_job(tmp_path / "cases")
    p = panel()
    assert p.section.root.text == "Retrain: 35 %"
    (folder / "job.json").unlink()
    os.mkfifo(folder / "job.json")
    p.section._late.setInterval(1)
    p.section._poll(0)
    p.gui.wait(lambda: "does not answer" in p.ui.trainMessage.text, WAIT_S)
    assert str(tmp_path / "cases") in p.ui.trainMessage.text and p.section.job.running  # as it was seen last
    p.section._late.setInterval(round(1000 * WAIT_S))
    other = retraining.make_job(tmp_path / "others", fraction=0.5)
    p.widget.trainingSet.setFolder(str(tmp_path / "others"))
    p.gui.wait(lambda: p.section.job is not None and p.section.job.folder == other, WAIT_S)
    assert p.section.root.text == "Retrain: 50 %" and "does not answer" not in p.ui.trainMessage.text
    retraining.change(other, fraction=0.6)
    p.section._poll(0)
    p.gui.wait(lambda: p.section.root.text == "Retrain: 60 %", WAIT_S)
    assert [job.folder for job in p.section._elsewhere] == [folder]  # which may run still, and needs PyTorch


def test_of_several_trainings_one_is_chosen(panel: Any, tmp_path: Path) -> None:
    retraining.make_job(tmp_path / "cases", "20260101-010101-old", title="old", state="failed", text="No space; free some.", started=1.0)
    retraining.make_job(tmp_path / "cases", title="new")
    p = panel()
    combo = p.ui.jobCombo
    assert combo.visible and ["new" in combo.itemText(0), "old" in combo.itemText(1)] == [True, True] and combo.currentIndex == 0
    combo.setCurrentIndex(1)
    combo.activated.emit(1)
    p.look()
    assert p.ui.jobMessage.text == "No space; free some." and p.ui.resumeTrainingButton.visible
    p.gui.dialogs.answer(True)
    p.gui.click(p.ui.dropTrainingButton)
    p.done()
    assert not p.ui.resumeTrainingButton.visible and not p.ui.dropTrainingButton.visible and "discarded" in p.ui.jobMessage.text


def test_of_several_trainings_the_one_that_runs_is_found_again(panel: Any, tmp_path: Path) -> None:
    retraining.make_job(tmp_path / "cases", "20260101-010101-old", title="old", started=1.0)
    retraining.make_job(tmp_path / "cases", title="new", state="failed", text="No space; free some.", pid=None)
    p = panel()
    assert p.section.job.name == "old" and p.ui.stopTrainingButton.visible and p.section.root.text == "Retrain: 35 %"


def test_of_several_trainings_an_answer_about_another_is_not_shown(panel: Any, tmp_path: Path) -> None:
    retraining.make_job(tmp_path / "cases", title="new")
    old = retraining.make_job(tmp_path / "cases", "20260101-010101-old", title="old", state="failed", text="No space.", started=1.0)
    p = panel()
    seen, onLook = [], p.section._onLook
    p.section._onLook = lambda folder, answer: (onLook(folder, answer), seen.append((folder, p.section.job.folder)))
    p.section._tick()
    p.ui.jobCombo.activated.emit(1)
    p.settle()
    assert len({folder for folder, _shown in seen}) == 2 and {shown for _folder, shown in seen} == {old}


def test_none_is_resumed_beside_the_one_that_runs(panel: Any, tmp_path: Path) -> None:
    running = retraining.make_job(tmp_path / "cases", title="new")
    retraining.make_job(tmp_path / "cases", "20260101-010101-old", title="old", state="stopped", kept=True, started=1.0)
    p = panel()
    combo, buttons = p.ui.jobCombo, (p.ui.resumeTrainingButton, p.ui.finishTrainingButton)

    def choose(i: int) -> None:
        combo.setCurrentIndex(i)
        combo.activated.emit(i)
        p.look()

    choose(1)
    assert all(b.visible and not b.enabled for b in buttons) and "wait for its end, or stop it" in p.ui.trainMessage.text
    retraining.change(running, state="failed", pid=None)
    choose(0)
    choose(1)
    assert all(b.visible and b.enabled for b in buttons) and p.ui.trainButton.enabled


# ---------------------------------------------------------------------------------------------------------------- curves


def test_curves_grow_in_the_plot_views_and_leave_no_trace(panel: Any, gui: Any, tmp_path: Path) -> None:
    import slicer

    folder = retraining.make_job(tmp_path / "cases")
    lines = retraining.curve(200)
    retraining.write_lines(folder / "live.jsonl", lines[:60])
    p = panel()
    p.look()
    before = slicer.app.layoutManager().layout
    nodes = slicer.mrmlScene.GetNumberOfNodes()
    p.gui.click(p.ui.curvesButton)
    p.look()
    curves = p.section._curves
    assert slicer.app.layoutManager().layout == 7161
    for name, chart in (("UNetLoss", curves.loss_chart), ("UNetDice", curves.dice_chart)):
        assert slicer.mrmlScene.GetSingletonNode(name, "vtkMRMLPlotViewNode").GetPlotChartNodeID() == chart.GetID()
    losses = [line["loss"] for line in lines[:60] if line["event"] == "step"]
    assert np.allclose(columns(curves._steps)["loss"], losses)
    assert not slicer.mrmlScene.GetStorableNodesModifiedSinceRead()  # or Slicer would ask to save them

    noted: list[str] = []
    tag = curves.dice_chart.AddObserver("ModifiedEvent", lambda *_: noted.append("dice"))
    with open(folder / "live.jsonl", "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(line) + "\n" for line in lines[60:])[:-20])  # the last line is half there
    p.look()
    curves.dice_chart.RemoveObserver(tag)
    checks = [line for line in lines if line["event"] == "validation"]
    last = lines[-1]["event"] == "validation"
    shown = columns(curves._checks)
    assert noted and np.allclose(shown["dice"], [line["dice"] for line in checks[: len(checks) - last]])
    assert set(shown) == {"step", "loss", "dice", "dice Anterior", "dice Posterior"}
    series = [curves.dice_chart.GetNthPlotSeriesNode(i).GetName() for i in range(curves.dice_chart.GetNumberOfPlotSeriesNodes())]
    assert series[0] == "Mean" and series[1].startswith("Best: 0.") and series[2:] == ["Anterior", "Posterior"]

    retraining.write_lines(folder / "live.jsonl", lines[:30])  # resumed from an earlier step
    p.look()
    assert np.allclose(columns(curves._steps)["loss"], [line["loss"] for line in lines[:30] if line["event"] == "step"])

    slicer.mrmlScene.InvokeEvent(slicer.mrmlScene.StartSaveEvent)  # as the save dialog does
    gui.save_scene(tmp_path / "scene.mrml")
    text = (tmp_path / "scene.mrml").read_text("utf-8")
    assert not [word for word in ("UNetSegmentation.Training", "UNetLoss", "UNetExamples", "7161") if word in text]
    assert slicer.app.layoutManager().layout == before and not p.ui.curvesButton.checked  # others do not know that layout
    p.gui.click(p.ui.curvesButton)
    p.gui.click(p.ui.curvesButton)
    assert slicer.app.layoutManager().layout == before
    p.section.close()
    from UNetSegmentationPanel import trainingviews

    assert not trainingviews.ours(slicer.mrmlScene, "curves")
    assert slicer.mrmlScene.GetNumberOfNodes() - nodes <= 8  # the views' own nodes, which Slicer keeps


def test_of_another_training_only_its_own_curves_and_examples_are_shown(panel: Any, tmp_path: Path) -> None:
    import slicer

    old = retraining.make_job(tmp_path / "cases", "20260101-010101-old", title="old", state="failed", text="No space.", started=1.0)
    lines = retraining.curve(200)
    retraining.make_pictures(old, lines)
    retraining.write_lines(old / "live.jsonl", lines)
    new = retraining.make_job(tmp_path / "cases", title="new")
    retraining.write_lines(new / "live.jsonl", retraining.curve(30, labels=("Nodule",)))  # before its first validation
    p = panel()

    def show(i: int) -> tuple[list[str], bool]:
        p.ui.jobCombo.setCurrentIndex(i)
        p.ui.jobCombo.activated.emit(i)
        p.look()
        p.gui.click(p.ui.curvesButton)
        p.look()
        chart = p.section._curves.dice_chart
        names = [chart.GetNthPlotSeriesNode(i).GetName() for i in range(chart.GetNumberOfPlotSeriesNodes())]
        view = slicer.app.layoutManager().sliceWidget("UNetExamples").mrmlSliceCompositeNode()
        return names, bool(view.GetBackgroundVolumeID())

    names, examples = show(1)
    assert names[1].startswith("Best: 0.") and names[2:] == ["Anterior", "Posterior"] and examples
    assert show(0) == (["Mean", "Best"], False)
    retraining.write_lines(new / "live.jsonl", retraining.curve(60, labels=("Nodule",)))
    p.look()
    assert set(columns(p.section._curves._checks)) == {"step", "loss", "dice", "dice Nodule"}
    assert show(1) == (names, True)
    slicer.app.layoutManager().setLayout(slicer.vtkMRMLLayoutNode.SlicerLayoutOneUpRedSliceView)
    p.look()
    assert show(1) == (names, True)  # of the same training again


def test_another_layout_or_a_closed_scene_ends_the_curves_only(panel: Any, gui: Any, tmp_path: Path) -> None:
    import slicer

    folder = retraining.make_job(tmp_path / "cases")
    retraining.write_lines(folder / "live.jsonl", retraining.curve(80))
    p = panel()
    p.look()
    p.gui.click(p.ui.curvesButton)
    slicer.app.layoutManager().setLayout(slicer.vtkMRMLLayoutNode.SlicerLayoutOneUpRedSliceView)
    p.look()
    assert not p.ui.curvesButton.checked
    p.gui.click(p.ui.curvesButton)
    p.look()
    gui.close_scene()
    p.look()
    assert slicer.app.layoutManager().layout != 7161 and not p.ui.curvesButton.checked
    p.gui.click(p.ui.curvesButton)
    p.look()
    assert len(columns(p.section._curves._steps)["loss"]) == 40
    gui.leave(p.widget)
    assert slicer.app.layoutManager().layout != 7161


def test_a_view_that_fills_all_gives_way_to_the_curves_and_to_the_layout_before(panel: Any, tmp_path: Path) -> None:
    import slicer

    retraining.write_lines(retraining.make_job(tmp_path / "cases") / "live.jsonl", retraining.curve(80))
    p = panel()
    p.look()
    manager = slicer.app.layoutManager()
    before, node = manager.layout, manager.layoutLogic().GetLayoutNode()
    node.AddMaximizedViewNode(manager.sliceWidget("Red").mrmlSliceNode())  # by the button of the view
    p.gui.click(p.ui.curvesButton)
    p.look()
    assert manager.layout == 7161 and node.GetNumberOfMaximizedViewNodes() == 0
    node.AddMaximizedViewNode(slicer.mrmlScene.GetSingletonNode("UNetDice", "vtkMRMLPlotViewNode"))
    p.look()
    assert p.ui.curvesButton.checked and node.GetNumberOfMaximizedViewNodes() == 1  # looked at so
    p.gui.click(p.ui.curvesButton)
    assert manager.layout == before and node.GetNumberOfMaximizedViewNodes() == 0


def test_examples_lie_upright_in_the_view(panel: Any, tmp_path: Path) -> None:
    folder = retraining.make_job(tmp_path / "cases")
    lines = retraining.curve(80)
    retraining.make_pictures(folder, lines)
    retraining.write_lines(folder / "live.jsonl", lines)
    p = panel()
    p.look()
    p.gui.click(p.ui.curvesButton)
    p.look()
    _view, picture = p.picture("UNetExamples", 300)
    inside = np.argwhere(picture.sum(2) > 0)
    (top, left), (bottom, right) = inside.min(0), inside.max(0)
    middle = (top + bottom) // 2
    red, blue = picture[..., 0].astype(int), picture[..., 2].astype(int)
    assert red[top + 5, right - 5] > 200 > 60 > red[top + 5, left + 5]  # brighter to the right
    assert blue[top + 3, left + 20] > 180 > 60 > blue[middle - 6, left + 20]  # each example's top is up
    assert picture[bottom - 5, left + 20, 1] > picture[top + 5, left + 20, 1] + 60  # the second one is below


# ----------------------------------------------------------------------------------------------------------- what came out


def finished(tmp_path: Path, verdict: str = "better", **how: Any) -> Path:
    folder = retraining.make_job(tmp_path / "cases", pid=None, launched=0.0)
    retraining.make_result(folder, toy(tmp_path).path, verdict, **how)
    return folder


def test_the_table_says_before_and_after_with_intervals(panel: Any, tmp_path: Path) -> None:
    finished(tmp_path)
    p = panel()
    assert p.section.root.text == "Retrain: finished" and p.ui.verdictLabel.text.startswith("Better:")
    rows = p.rows()
    assert rows[:3] == [["All labels", "", ""], ["Dice", "0.812 (0.79–0.83)", "0.871 (0.85–0.89) ▲"], ["Anterior", "", ""]]
    assert ["HD95 (mm)", "1.62 (1.31–1.93)", "1.22 (0.91–1.53) ▼"] in rows
    assert ["Vol. error (%)", "-6.3 (-9.5 to -3.1)", "1.2 (-2.0 to 4.4)"] in rows
    assert "change +0.059 (+0.03 to +0.09)" in p.ui.scoreTable.item(1, 1).toolTip()
    assert p.rows("worstTable") == [[retraining.CASE, "0.612", "0.951"]]


def test_a_change_that_may_be_chance_has_no_arrow_and_nothing_to_compare_with_is_a_dash(panel: Any, tmp_path: Path) -> None:
    folder = finished(tmp_path, "same", sure=False)
    result = json.loads((folder / "result.json").read_text("utf-8"))
    result["labels"]["Posterior"]["dice"] |= {"before": None, "change": None}
    result["labels"]["Anterior"]["dice"]["change"] = {"mean": 0.01, "low": -0.01, "high": 0.03, "cases": 6}
    result["labels"]["Anterior"]["hausdorff95_mm"]["change"] = {"mean": -0.4, "low": -0.5, "high": -0.3, "cases": 4}
    (folder / "result.json").write_text(json.dumps(result), "utf-8")
    p = panel()
    rows = p.rows()
    assert ["HD95 (mm)", "1.62 (1.31–1.93)", "1.22 (0.91–1.53)"] in rows
    assert rows[3] == ["Dice", "0.840 (0.82–0.86)", "0.890 (0.87–0.91)"] and rows[7] == ["Dice", "–", "0.850 (0.83–0.87)"]


def test_a_damaged_result_shows_what_can_be_shown(panel: Any, tmp_path: Path) -> None:
    folder = finished(tmp_path)
    (folder / "result.json").write_text(json.dumps({"labels": {"a": 1}, "mean": [], "worst": [{"case": 1}, 2], "sentence": None}), "utf-8")
    p = panel()
    assert p.rows() == [] and not p.ui.worstTable.visible and p.ui.useButton.visible
    (folder / "result.json").write_text("{", "utf-8")
    p.find()
    assert not p.ui.outcomeWidget.visible and p.ui.jobMessage.text.startswith("Finished.")


def test_the_worst_case_stands_before_and_after_side_by_side(panel: Any, tmp_path: Path, gui: Any) -> None:
    import slicer
    from UNetSegmentationPanel import trainingviews

    finished(tmp_path)
    p = panel()
    selector = p.widget.ui.volumeSelector
    volumes = selector.nodeCount()
    before = slicer.app.layoutManager().layout
    p.ui.worstTable.selectRow(0)
    p.settle()
    assert slicer.app.layoutManager().layout == 7162 and p.ui.compareWidget.visible
    assert "Left: toy-1.0.0" in p.ui.compareNote.text and selector.nodeCount() == volumes  # it is nobody's volume to segment
    masks = p.section._comparison.masks
    assert set(masks) == {"truth", "before", "after"}
    colors = {}
    for name in ("UNetBefore", "UNetAfter"):
        view, picture = p.picture(name, 400)
        # Where the mask before had left the truth and the mask after has not: index (x, y, z) of the made case.
        image = p.section._comparison.volume
        matrix = [image.GetOrigin()[a] for a in range(3)]
        spacing, size = image.GetSpacing(), 1
        at = (matrix[0] + 26 * spacing[0], matrix[1] + 15 * spacing[1], view.node.GetSliceOffset())
        pixel = view.pixel(picture, at).astype(int)
        colors[name] = pixel
        near = picture.reshape(-1, 3).astype(int)
        assert ((near[:, 1] > 200) & (near[:, 0] < 80) & (near[:, 2] < 110)).sum() > 20 * size  # the truth's outline is green in both
    assert abs(colors["UNetBefore"][0] - colors["UNetBefore"][2]) < 12  # grey: not found
    assert colors["UNetAfter"][0] - colors["UNetAfter"][2] > 25  # tinted: found
    composites = [slicer.app.layoutManager().sliceWidget(n).mrmlSliceCompositeNode() for n in ("UNetBefore", "UNetAfter")]
    assert all(c.GetLinkedControl() for c in composites)
    nodes = [slicer.app.layoutManager().sliceWidget(n).mrmlSliceNode() for n in ("UNetBefore", "UNetAfter", "Red")]
    assert nodes[0].GetViewGroup() == nodes[1].GetViewGroup() != nodes[2].GetViewGroup()
    assert nodes[0].GetSliceOffset() == nodes[1].GetSliceOffset()

    slicer.mrmlScene.InvokeEvent(slicer.mrmlScene.StartSaveEvent)  # as the save dialog does
    gui.save_scene(tmp_path / "scene.mrml")
    text = (tmp_path / "scene.mrml").read_text("utf-8")
    assert not [word for word in (retraining.CASE, "UNetBefore", "7162") if word in text]
    p.ui.worstTable.selectRow(0)
    p.settle()
    p.gui.click(p.ui.endCompareButton)
    assert slicer.app.layoutManager().layout == before and not trainingviews.ours(slicer.mrmlScene, "comparison")
    assert not p.ui.worstTable.selectedItems() and not p.ui.compareWidget.visible

    p.ui.worstTable.selectRow(0)
    p.gui.click(p.ui.endCompareButton)  # before its files were read
    p.ui.worstTable.selectRow(0)
    p.settle()
    assert set(p.section._comparison.masks) == {"truth", "before", "after"}
    assert not list(p.widget.workList.desk.folder.glob("*.npy"))
    gui.close_scene()
    assert not p.ui.compareWidget.visible and not p.ui.worstTable.selectedItems()
    p.ui.worstTable.selectRow(0)
    p.settle()
    assert set(p.section._comparison.masks) == {"truth", "before", "after"}


def test_a_case_whose_files_are_gone_is_a_sentence(panel: Any, tmp_path: Path) -> None:
    import slicer
    from UNetSegmentationPanel import trainingviews

    folder = finished(tmp_path)
    (folder / "check" / f"{retraining.CASE}_before.nii.gz").unlink()
    p = panel()
    before = slicer.app.layoutManager().layout
    p.ui.worstTable.selectRow(0)
    p.settle()
    assert "before.nii.gz" in p.ui.trainMessage.text and slicer.app.layoutManager().layout == before
    assert not trainingviews.ours(slicer.mrmlScene, "comparison")


@pytest.mark.parametrize("path", ["/etc/hostname", "//host/share/x.nii", r"\\host\share\x.nii", "C:/x.nii", "../../x.nii"])
def test_a_case_whose_files_lie_elsewhere_is_not_shown(panel: Any, tmp_path: Path, path: str) -> None:
    folder = finished(tmp_path)
    result = json.loads((folder / "result.json").read_text("utf-8"))
    other = json.loads(json.dumps(result["worst"][0]))
    other["files"]["truth"] = path
    (folder / "result.json").write_text(json.dumps({**result, "worst": [other, *result["worst"]]}), "utf-8")
    assert panel().ui.worstTable.rowCount == 1


def test_use_it_takes_the_parents_place_and_is_chosen(panel: Any, tmp_path: Path, models_folder: Path) -> None:
    models_folder.mkdir()
    (tmp_path / "parent").mkdir()
    shutil.copy(toy(tmp_path / "parent", "1.0.0").path, models_folder)
    folder = finished(tmp_path)
    p = panel()
    assert "toy-1.0.0" in p.ui.useButton.toolTip
    p.gui.click(p.ui.useButton)
    p.done()
    assert sorted(f.name for f in models_folder.glob("*.zip")) == ["toy-1.1.0.unet.zip"]
    assert list(p.widget._parameters.models) == ["toy-1.1.0"]
    assert [m.name for m in p.widget.modelList.selected] == ["toy-1.1.0"]
    assert p.section.job.decided == "use" and not p.ui.decideWidget.visible and "in place of toy-1.0.0" in p.ui.jobMessage.text
    assert p.section.root.text == "Retrain" and (folder / "toy-1.1.0.unet.zip").exists()


@pytest.mark.parametrize("away", [False, True])
def test_used_it_takes_the_volumes_by_their_channels_names(panel: Any, tmp_path: Path, models_folder: Path, away: bool) -> None:
    """away: while another module is open."""
    import slicer

    models_folder.mkdir()
    shutil.copy(toy(tmp_path, name="former", channels=["T1", "T2", "FLAIR"]).path, models_folder)
    folder = retraining.make_job(tmp_path / "cases", pid=None, launched=0.0)
    retraining.make_result(folder, toy(tmp_path, channels=["T1", "FLAIR", "T2"]).path)
    p = panel()
    t1, t2, flair = (slicer.util.addVolumeFromArray(np.zeros((6, 8, 8), np.float32), name=n) for n in ("T1", "T2", "FLAIR"))
    settings = p.widget._parameters
    settings.volume, settings.models, settings.channels = t1, ["former-1.1.0"], [t2, flair]
    p.gui.process_events()
    p.gui.click(p.ui.useButton)
    if away:
        p.gui.leave(p.widget)
    p.done()
    assert list(settings.models) == ["toy-1.1.0"] and list(settings.channels) == [flair, t2]


def test_a_model_of_clicks_is_judged_after_one_click_and_chosen_for_clicks(panel: Any, tmp_path: Path, models_folder: Path) -> None:
    folder = retraining.make_job(tmp_path / "cases", pid=None, launched=0.0)
    retraining.make_result(folder, toy(tmp_path, task="click", labels=[retraining.LABELS[0]]).path)
    result = json.loads((folder / "result.json").read_text("utf-8"))
    own = result["labels"]["Anterior"]
    result["labels"] = {"Anterior": {**own, "dice_3_clicks": own["dice"]}}
    (folder / "result.json").write_text(json.dumps(result), "utf-8")
    p = panel()
    assert [row[0] for row in p.rows()] == ["Dice", "Dice, 3 clicks", "HD95 (mm)", "Vol. error (%)"]
    assert "after one" in p.ui.scoreTable.item(1, 1).toolTip()
    colors = [p.ui.scoreTable.item(i, 2).foreground().color().name() for i in (0, 1)]
    assert colors[0] == colors[1]
    p.gui.click(p.ui.useButton)
    p.done()
    assert p.widget._parameters.clickModel == "toy-1.1.0" and [f.name for f in models_folder.glob("*.zip")] == ["toy-1.1.0.unet.zip"]
    assert "toy-1.1.0" in [m.name for m in p.widget.nodules.models] and p.section.job.decided == "use"


def test_keep_both_gives_it_a_name_of_its_own(panel: Any, tmp_path: Path, models_folder: Path) -> None:
    models_folder.mkdir()
    (tmp_path / "parent").mkdir()
    shutil.copy(toy(tmp_path / "parent", "1.0.0").path, models_folder)
    finished(tmp_path)
    p = panel()
    p.gui.click(p.ui.keepButton)
    p.done()
    names = sorted(f.name for f in models_folder.glob("*.zip"))
    assert len(names) == 2 and "toy-1.0.0.unet.zip" in names
    assert list(p.widget._parameters.models) == [next(n for n in names if n != "toy-1.0.0.unet.zip").removesuffix(".unet.zip")]


def test_a_worse_model_is_used_only_when_asked_for_twice(panel: Any, tmp_path: Path, models_folder: Path) -> None:
    finished(tmp_path, "worse")
    p = panel()
    assert p.ui.verdictLabel.font.bold() and any("▲" in r[2] for r in p.rows() if r[0] == "HD95 (mm)")
    p.gui.dialogs.answer(False, False)
    for button in (p.ui.useButton, p.ui.keepButton):
        p.gui.click(button)
        assert not list(models_folder.glob("*")) and not p.section.job.decided
    assert "Worse: Dice 0.871 before" in str(p.gui.dialogs.shown)
    p.gui.dialogs.answer(True)
    p.gui.click(p.ui.useButton)
    p.done()
    assert list(models_folder.glob("*.zip")) and p.section.job.decided == "use"


def test_discard_asks_and_leaves_the_record(panel: Any, tmp_path: Path, models_folder: Path) -> None:
    folder = finished(tmp_path)
    p = panel()
    p.gui.dialogs.answer(False)
    p.gui.click(p.ui.discardButton)
    assert (folder / "toy-1.1.0.unet.zip").exists()
    p.gui.dialogs.answer(True)
    p.gui.click(p.ui.discardButton)
    p.done()
    assert not (folder / "toy-1.1.0.unet.zip").exists() and (folder / "job.json").exists() and not list(models_folder.glob("*"))
    assert not p.ui.outcomeWidget.visible and "discarded" in p.ui.jobMessage.text


def test_a_full_disk_is_a_sentence_and_nothing_is_decided(panel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path)
    monkeypatch.setenv("UNETSEG_MODELS", str(tmp_path / "file" / "models"))
    (tmp_path / "file").write_text("in the way")
    p = panel()
    p.gui.click(p.ui.useButton)
    p.done()
    assert str(tmp_path / "file") in p.ui.trainMessage.text and p.section.job.decided == "" and p.ui.decideWidget.visible


def test_the_package_is_saved_as_one_file(panel: Any, tmp_path: Path) -> None:
    from UNetSegmentationLib.model import ModelPackage

    finished(tmp_path)
    p = panel()
    p.gui.dialogs.answer(str(tmp_path / "for a colleague"))
    p.gui.click(p.ui.shareButton)
    assert ModelPackage.read(tmp_path / "for a colleague.unet.zip").card.version == "1.1.0"
    assert "colleague.unet.zip" in p.ui.trainMessage.text
    (tmp_path / "mine.unet.zip").write_text("mine")
    p.gui.dialogs.answer(str(tmp_path / "mine"), False)  # the dialog asks about the name as it was typed only
    p.gui.click(p.ui.shareButton)
    assert (tmp_path / "mine.unet.zip").read_text() == "mine"
    p.gui.dialogs.answer("")
    p.gui.click(p.ui.shareButton)
    p.gui.dialogs.answer(str(tmp_path / "nowhere" / "x"))
    (tmp_path / "nowhere").write_text("a file")
    p.gui.click(p.ui.shareButton)
    assert "nowhere" in p.ui.trainMessage.text


# ----------------------------------------------------------------------------------------------------------- another task


def training_set(folder: Path, labels: Sequence[str], shape: tuple[int, int, int], n: int = 3) -> Path:
    """n cases of as many patients; each label is a bright block."""
    from UNetSegmentationLib.dataset import Dataset
    from UNetSegmentationLib.image import Image
    from UNetSegmentationLib.model import Label

    made = [Label(i, name, (230, 159, 0), {}) for i, name in enumerate(labels, 1)]
    out = Dataset.create(folder, folder.name, made, ["MR"])
    for i in range(n):
        array, mask = np.random.default_rng(i).normal(0, 0.2, shape).astype(np.float32), np.zeros(shape, np.uint8)
        for label in made:
            place = (slice(None), slice(4 + i, 14 + i), slice(12 * label.value - 8, 12 * label.value))
            array[place], mask[place] = 2.0 * label.value, label.value
        out.add(Image(array), mask, name=f"case{i}", patient=f"P{i}")
    return out.folder


@pytest.fixture
def hippocampi(tmp_path: Path) -> Path:
    return training_set(tmp_path / "Hippocampi", ["Anterior hippocampus", "Posterior hippocampus"], (12, 32, 32))


class Tasks(Hands):
    """The hands on the training set's folder too, which its own worker reads."""

    def __init__(self, hands: Hands) -> None:
        self.__dict__.update(hands.__dict__)
        del self.widget.trainingSet.refresh
        self.widget.trainingSet.refresh()
        self.read()

    def read(self) -> None:
        self.gui.process_events()
        self.gui.wait(lambda: self.widget.trainingSet.summary is not None, WAIT_S)
        self.look()

    def choose(self, folder: Path) -> None:
        self.widget.trainingSet.root.collapsed = False
        self.gui.dialogs.answer(str(folder))
        self.gui.click(self.widget.trainingSet.ui.setFolderButton)
        self.read()

    @property
    def start(self) -> str:
        return Path(str(self.ui.startCombo.itemData(self.ui.startCombo.currentIndex))).name.removesuffix(".unet.zip")

    def start_from(self, name: str) -> None:
        combo = self.ui.startCombo
        index = next(i for i in range(combo.count) if Path(str(combo.itemData(i))).name.removesuffix(".unet.zip") == name)
        combo.setCurrentIndex(index)
        combo.activated.emit(index)
        self.gui.process_events()


def test_another_training_set_is_another_task_and_the_first_is_found_again(
    panel: Any, hippocampi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hearts = training_set(tmp_path / "Hearts", ["Left ventricle cavity"], (1, 32, 32))
    running = retraining.make_job(hippocampi)
    seen = launched(monkeypatch)
    p = panel(hippocampi)
    p.widget._parameters.models = ["hippocampus-3d-1.2.3"]
    p = Tasks(p)
    assert p.start == "hippocampus-3d-1.2.3" and p.section.job.folder == running and p.section.root.text == "Retrain: 35 %"
    p.start_from("")  # for these cases; others begin with what fits them

    p.choose(hearts)
    assert p.section.job is None and not p.ui.jobWidget.visible and p.section.root.text == "Retrain" and p.ui.trainButton.enabled
    assert p.start == "left-ventricle-2d-1.0.3"  # though the panel's model is another, which does not fit
    assert p.ui.trainMessage.text == "3 cases of 3 patients. Labels: Left ventricle cavity."
    p.start_from("hippocampus-3d-1.2.3")
    said = "The cases are single slices and hippocampus-3d is a 3D model; start from a 2D model, or from scratch."
    assert p.ui.trainMessage.text == said and not p.ui.trainButton.enabled
    p.start_from("lung-nodule-2d-1.2.1")
    assert p.ui.trainMessage.text.endswith("does not know Left ventricle cavity: that is learnt anew.")
    p.gui.click(p.ui.trainButton)
    ((heart, _python, _variables),) = seen
    assert heart.parent == hearts / "retrain" and p.section.job.folder == heart and p.section.job.base == "lung-nodule-2d-1.2.1"

    retraining.change(running, fraction=0.5)
    p.choose(hippocampi)
    assert [job.folder for job in p.section.jobs] == [running] and p.section.root.text == "Retrain: 50 %"
    assert p.start == "hippocampus-3d-1.2.3"
    p.choose(hearts)
    assert [job.folder for job in p.section.jobs] == [heart] and p.section.job.running and p.ui.stopTrainingButton.visible


def test_nothing_is_started_on_a_training_set_that_was_chosen_meanwhile(
    panel: Any, hippocampi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from UNetSegmentationPanel.retrain import RetrainSection

    p = panel(hippocampi)
    found: list[Any] = []
    monkeypatch.setattr(RetrainSection, "_withPython", lambda self, ready, missing: found.append(ready))
    p.gui.click(p.ui.trainButton)
    p.widget.trainingSet.setFolder(str(training_set(tmp_path / "Hearts", ["Left ventricle cavity"], (1, 32, 32))))
    found[0]("python", {})
    assert "Another training set was chosen meanwhile" in p.ui.trainMessage.text and p.ui.trainButton.enabled
    assert p.section._task is None and not (tmp_path / "Hearts" / "retrain").exists()


def test_a_model_of_another_task_is_trained_and_used_beside_its_base(
    panel: Any, hippocampi: Path, tmp_path: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real processes, on single slices: from a 2D model of other labels to a new one that the panel segments with."""
    for name in ("torch", "monai", "lightning", "pydantic", "onnx"):
        pytest.importorskip(name)
    import slicer
    import torch
    from safetensors.torch import save
    from UNetSegmentationLib.model import write_package
    from UNetSegmentationLib.networks import UNetConfig, build
    from UNetSegmentationPanel.retrain import RetrainSection

    network = UNetConfig(dimensions=2, in_channels=1, out_channels=2, channels=(4, 8))
    card = {"dimensions": 2, "channels": ["MR"], "labels": [{"value": 1, "name": "Vessel"}], "patch": [32, 32], "divisor": [2, 2]}
    card = make_card(**card, intensity={"mode": "zscore"}, network=network.to_json(), name="vessels")
    torch.manual_seed(0)
    write_package(models_folder / "vessels-1.0.0.unet.zip", card, make_onnx("threshold", card), save(build(network).state_dict()))
    before = retraining.make_job(hippocampi, state="failed", text="No space; free some.")
    discs = training_set(tmp_path / "Discs", ["Disc"], (1, 32, 32), 4)

    ask = RetrainSection._ask

    def moment(self: Any, text: str, arguments: Sequence[str], *more: Any) -> None:
        if arguments[0] == "start":
            arguments = [*arguments[:3], json.dumps({**json.loads(arguments[3]), "minutes": 0.02})]
        ask(self, text, arguments, *more)

    monkeypatch.setattr(RetrainSection, "_ask", moment)
    p = Tasks(panel(hippocampi))
    p.choose(discs)
    p.start_from("vessels-1.0.0")
    p.gui.click(p.ui.trainButton)
    p.gui.wait(lambda: p.section.job is not None, TRAIN_S)
    p.gui.wait(lambda: not p.section.job.running, TRAIN_S)
    p.settle()
    assert p.section.job.state == "finished" and p.section.job.package.is_file(), p.section.job.text
    assert "vessels gives none of these labels" in p.ui.verdictLabel.text and not p.ui.keepButton.visible  # it replaces nothing
    p.gui.click(p.ui.useButton)
    p.done()
    assert "It is used; vessels-1.0.0 stays." in p.ui.jobMessage.text and (models_folder / "vessels-1.0.0.unet.zip").is_file()
    (model,) = p.widget.modelList.selected
    assert model.name == "discs-0.1.0" and [label.name for label in model.card.labels] == ["Disc"]

    array = np.random.default_rng(9).normal(0, 0.2, (1, 32, 32)).astype(np.float32)
    array[0, 6:16, 4:12] = 2.0
    p.widget._parameters.volume = slicer.util.addVolumeFromArray(array)
    p.gui.process_events()
    p.gui.click(p.widget.ui.applyButton)
    p.gui.wait(lambda: not p.widget.controller.running, TRAIN_S)
    assert p.widget.controller.phase == "done", p.widget.controller.text
    held = p.widget._parameters.output.GetSegmentation()
    assert [held.GetNthSegment(i).GetName() for i in range(held.GetNumberOfSegments())] == ["Disc"]

    p.choose(hippocampi)
    assert [job.folder for job in p.section.jobs] == [before] and p.ui.jobMessage.text == "No space; free some."
