"""The Segment Editor effect "U-Net Click": clicks in the slice views become the selected segment, by the panel's worker.

Slicer loads this file alone, under the name SegmentEditorUNetClickLib: so it is one file. What it shares with the panel lies in
UNetSegmentationPanel and UNetSegmentationLib, which are imported, piece by piece, when the effect is first chosen.
"""

import itertools
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ctk
import qt
import slicer
import vtk
from SegmentEditorEffects import AbstractScriptedSegmentEditorEffect
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

NAME = "U-Net Click"  # not translated: settings are stored under it
DEFAULT = "default"  # of the parameter Model; Slicer takes an empty one for none
DOT_PIXELS = 5  # of Qt's, see pixelRatio()
COLORS = {True: (0.2, 0.9, 0.3), False: (0.95, 0.25, 0.2)}
BUDGET_S = 0.01  # of work in one turn of the event loop
WAIT_MS = 15
KEPT_TEXTS = 200

_numbers = itertools.count(1)
_WAIT = object()  # what steps yield when only the worker can bring them on
Steps = Generator[Any, None, Any]


@dataclass
class Target:
    """Where a click goes: into a segment ("": one that is yet to be made), as that was then."""

    volume: Any
    segmentation: Any
    segmentId: str
    digest: str = ""
    lesion: str = ""
    model: Any = None  # that is asked

    def same(self, other: Any) -> bool:
        return (
            other is not None
            and (self.volume, self.segmentation) == (other.volume, other.segmentation)
            and self.segmentId == other.segmentId
        )


class SegmentEditorEffect(AbstractScriptedSegmentEditorEffect, VTKObservationMixin):
    """One lesion a segment. Its clicks are kept in a tag of the segment, so that the editor's Undo and a reopened scene bring
    them back, and beside them a digest of its voxels: once a brush has changed those, they are what the next click starts from.

    Everything happens in steps, one action after the other, and the event loop is not held. message: the sentence below the
    options; while an answer is awaited and there is none, that is said there.
    """

    def __init__(self, scriptedEffect: Any) -> None:
        scriptedEffect.name = NAME
        scriptedEffect.title = _("U-Net Click")
        # A click where there is no segment makes one. The editor would leave a per-segment effect when Undo takes the only one away.
        scriptedEffect.perSegment = False
        scriptedEffect.requireSegments = False
        AbstractScriptedSegmentEditorEffect.__init__(self, scriptedEffect)
        VTKObservationMixin.__init__(self)
        self.message = ""
        self._number = next(_numbers)
        self._controller: Any = None
        self._models: list[Any] = []
        self._stamps: list[Any] = []  # of all packages, when the models were read
        self._tasks: deque[Steps] = deque()
        self._working = self._timed = self._stale = False
        self._blocked = False  # the first of the tasks waits for the worker
        self._made = False  # the options' widgets are there
        self._target: Target | None = None  # what was clicked at last
        self._observed: Any = None  # the volume and the segmentation that are
        self._scene = VTKObservationMixin()  # apart, as a scene may be closed while another effect is chosen
        self._pressed: Any = None  # where the mouse was pressed with Ctrl
        self._swallow = False  # the release that belongs to a click
        self._prompts: dict[Any, list[Any]] = {}  # text of the tag and the volume's place -> prompts, to the last bit
        self._digests: dict[tuple[str, str], tuple[Any, str]] = {}  # segment -> (when it was changed, digest)
        self._lesions: dict[tuple[str, str], str] = {}  # segment -> the worker's name of it
        self._dots = Dots(scriptedEffect)

    # -------------------------------------------------------------------------------------------------- what Slicer asks

    def clone(self) -> Any:
        import qSlicerSegmentationsEditorEffectsPythonQt as effects

        clone = effects.qSlicerSegmentEditorScriptedEffect(None)
        clone.setPythonSource(Path(__file__).as_posix())
        return clone

    def icon(self) -> Any:
        path = Path(__file__).parent / "SegmentEditorEffect.png"
        return qt.QIcon(str(path)) if path.exists() else qt.QIcon()

    def helpText(self) -> str:
        return "<html>" + "<br>".join(
            (
                _("Click on a lesion, such as a lung nodule, in a slice view: its outline becomes the selected segment."),
                _("<b>Left click</b>: this is part of the lesion."),
                _("<b>Ctrl + left click</b> (macOS: Cmd), or a left click after the key <b>X</b>: this is not part of it."),
                _("<b>N</b>: next lesion, in a new segment. <b>Z</b> and <b>Y</b>: undo and redo, as always in the Segment Editor."),
                _("Correct by brush at any time and click on: the next click starts from the segment as it is."),
                _("Shift, the other buttons, the wheel, and dragging with Ctrl do in slice views what they always do."),
                _("For research. This is not a diagnosis: whether it is a nodule, and of which kind, the network does not know."),
            )
        )

    def createCursor(self, widget: Any) -> Any:
        return qt.QCursor(qt.Qt.CrossCursor)

    def setupOptionsFrame(self) -> None:
        self.positiveButton = qt.QRadioButton(_("Part of the lesion"))
        self.positiveButton.toolTip = _("A left click is on the lesion. (X)")
        self.negativeButton = qt.QRadioButton(_("Not part of it"))
        self.negativeButton.toolTip = _("A left click is on what was outlined wrongly. (X, or Ctrl + left click)")
        self.modelCombo = ctk.ctkComboBox()
        self.modelCombo.scrollWheelEffect = ctk.ctkComboBox.NeverScroll  # who scrolls the editor chooses no other model unseen
        self.modelCombo.toolTip = _("The click models that are installed; the module U-Net Segmentation imports others.")
        self.nextButton = qt.QPushButton(_("Next lesion"))
        self.nextButton.toolTip = _("Add a segment for another lesion. (N)")
        self.clearButton = qt.QPushButton(_("Start again"))
        self.clearButton.toolTip = _("Empty the selected segment and forget its clicks.")
        self.messageLabel = qt.QLabel()
        self.messageLabel.setTextFormat(qt.Qt.PlainText)  # a scan's name is no HTML
        self.messageLabel.wordWrap = True
        kinds, buttons = qt.QHBoxLayout(), qt.QHBoxLayout()
        for widget in (self.positiveButton, self.negativeButton):
            kinds.addWidget(widget)
        for widget in (self.nextButton, self.clearButton):
            buttons.addWidget(widget)
        self.scriptedEffect.addLabeledOptionsWidget(_("Left click:"), kinds)
        self.modelLabel = self.scriptedEffect.addLabeledOptionsWidget(_("Model:"), self.modelCombo)
        self.scriptedEffect.addOptionsWidget(buttons)
        self.scriptedEffect.addOptionsWidget(self.messageLabel)
        self._connections: tuple[Any, ...] = (
            (self.positiveButton, "toggled(bool)", self.updateMRMLFromGUI),
            (self.modelCombo, "currentIndexChanged(int)", self.updateMRMLFromGUI),
            (self.nextButton, "clicked(bool)", self.nextLesion),
            (self.clearButton, "clicked(bool)", self.startAgain),
        )
        for widget, signal, slot in self._connections:
            widget.connect(signal, slot)
        self._scene.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self._onSceneStartClose)
        self._made = True
        self._fillModels()

    def setMRMLDefaults(self) -> None:
        self.scriptedEffect.setParameterDefault("Positive", 1)
        self.scriptedEffect.setParameterDefault("Model", DEFAULT)

    def updateGUIFromMRML(self) -> None:
        if not self._made or self.scriptedEffect.parameterSetNode() is None:
            return
        # A scene that was saved without this effect takes its parameters away, and Slicer asks for them only with a new node.
        self.setMRMLDefaults()
        positive = bool(self.scriptedEffect.integerParameter("Positive"))
        # All at once: a button that another one unchecks would store the model that is still shown.
        were = [(widget, widget.blockSignals(True)) for widget in (self.positiveButton, self.modelCombo)]
        (self.positiveButton if positive else self.negativeButton).checked = True
        self.modelCombo.currentIndex = index = self._shownModel()
        for widget, was in were:
            widget.blockSignals(was)
        # Also where there is no choice but to leave one that is not installed.
        self.modelCombo.visible = self.modelLabel.visible = len(self._models) > 1 or (bool(self._models) and index < 0)

    def updateMRMLFromGUI(self) -> None:
        if self.scriptedEffect.parameterSetNode() is None:
            return
        self.scriptedEffect.setParameter("Positive", int(self.positiveButton.checked))
        model = self.modelCombo.itemData(self.modelCombo.currentIndex)
        if model and model != self.scriptedEffect.parameter("Model"):
            self.scriptedEffect.setParameter("Model", model)
            self._do(self._warmSteps())

    def activate(self) -> None:
        self._say("")
        self._observe()
        self._do(self._warmSteps())
        self._redraw()

    def deactivate(self) -> None:
        self.removeObservers()
        if not self._working:
            for steps in self._tasks:
                steps.close()
        self._tasks.clear()
        self._stale = False  # to draw may have been one of them
        self._dots.clear()
        if self._controller is not None:
            self._controller.end()
        self._observed, self._target, self._pressed, self._swallow = None, None, None, False

    def cleanup(self) -> None:
        """The editor goes; nothing may hold the effect, which PythonQt would then not delete."""
        self.deactivate()
        self._scene.removeObservers()
        if self._controller is not None:
            self._controller.removeListener(self)
            self._controller = None
        if self._made:
            self._made = False
            for widget, signal, slot in self._connections:
                widget.disconnect(signal, slot)
            self._connections = ()

    def sourceVolumeNodeChanged(self) -> None:
        if self.scriptedEffect.active():
            self._observe()
            self._do(self._warmSteps())
            self._redraw()

    def layoutChanged(self) -> None:
        self._dots.clear()
        self._redraw()

    def processViewNodeEvents(self, callerViewNode: Any, eventId: int, viewWidget: Any) -> None:
        if viewWidget.className() == "qMRMLSliceWidget":
            self._dots.move(viewWidget)

    def processInteractionEvents(self, callerInteractor: Any, eventId: int, viewWidget: Any) -> bool:
        if viewWidget.className() != "qMRMLSliceWidget":
            return False
        events = vtk.vtkCommand
        shift, control, alt = (bool(getattr(callerInteractor, f"Get{key}Key")()) for key in ("Shift", "Control", "Alt"))
        at = callerInteractor.GetEventPosition()
        if eventId == events.LeftButtonPressEvent:
            self._pressed = at if control and not shift and not alt else None
            self._swallow = not (shift or control or alt)
            if self._swallow:
                self._clickIn(viewWidget, at, bool(self.scriptedEffect.integerParameter("Positive")))
            return self._swallow
        if eventId == events.LeftButtonReleaseEvent:
            from UNetSegmentationPanel import isStill

            # With Ctrl it is passed on: Slicer has seen the press, and its own Ctrl and drag has to end.
            pressed, self._pressed = self._pressed, None
            if pressed is not None and isStill(pressed, at, callerInteractor):  # what moves is Slicer's own Ctrl and drag
                self._clickIn(viewWidget, at, False)
            swallowed, self._swallow = self._swallow, False
            return swallowed
        if eventId == events.LeftButtonDoubleClickEvent:
            return True  # of two quick clicks; it would make the view fill the window
        if eventId == events.KeyPressEvent and not (control or alt):
            key = (callerInteractor.GetKeySym() or "").lower()
            if key == "n":
                self.nextLesion()
            elif key == "x":
                self.scriptedEffect.setParameter("Positive", 1 - self.scriptedEffect.integerParameter("Positive"))
                self.updateGUIFromMRML()
            return key in ("n", "x")
        return False

    # ------------------------------------------------------------------------------------------------ what a person does

    @property
    def busy(self) -> bool:
        """Something is still to happen."""
        return bool(self._tasks) or (self._controller is not None and self._controller.busy)

    def click(self, ras: Sequence[float], positive: bool = True) -> None:
        """A click at a point of the world, RAS mm, on what is, or is not, part of the selected segment's lesion."""
        if self.scriptedEffect.confirmCurrentSegmentVisible():
            self._do(self._clickSteps(tuple(ras), positive, self._aimed()))

    def nextLesion(self) -> None:
        """A new segment, selected."""
        self._do(self._nextSteps())

    def startAgain(self) -> None:
        """Empty the selected segment, but for where the editor's masking does not let it be edited."""
        if self.scriptedEffect.confirmCurrentSegmentVisible():
            self._do(self._clearSteps(self._aimed()))

    # ------------------------------------------------------------------------------------------- what the worker answers

    def onAnswer(self, answer: Any) -> None:
        target = self._target
        if target is not None:
            steps = self._writeSteps(target, answer.mask, answer.box.start, self._controller.answered, answer.text)
            # What waits for the worker goes on from what is written here.
            (self._tasks.appendleft if self._blocked else self._tasks.append)(steps)
            self._work()

    def onError(self, text: str) -> None:
        self._say(_here(text))

    def onChanged(self) -> None:
        if self._controller.owner is not self:  # the lesion has ended, as with its volume
            self._target = None
        self._showMessage()
        self._redraw()

    # ------------------------------------------------------------------------------------------------------------- tasks

    def _do(self, steps: Steps) -> None:
        self._tasks.append(steps)
        self._work()

    def _work(self) -> None:
        """A few milliseconds of the actions, one after the other."""
        if self._working:
            return
        self._working, until, waiting = True, time.monotonic() + BUDGET_S, False
        self._blocked = False
        try:
            while self._tasks and not waiting and time.monotonic() < until:
                waiting = self._step(self._tasks[0]) is _WAIT
        finally:
            self._working = False
        self._blocked = waiting
        if self._tasks and not self._timed:
            self._timed = True
            qt.QTimer.singleShot(WAIT_MS if waiting else 0, self._onTimer)

    def _onTimer(self) -> None:
        self._timed = False
        self._work()

    def _step(self, steps: Steps) -> Any:
        try:
            return next(steps)
        except StopIteration:
            pass
        except Exception as e:
            self._say(_sentence(e))
        if self._tasks and self._tasks[0] is steps:
            self._tasks.popleft()
        return None

    def _loadSteps(self) -> Steps:
        """Import what a click needs and make the controller, once; and heed what was imported, trained or removed since, of which
        the editor, which lives as long as Slicer, is told nothing. Of 24 packages the cards take 15 ms, their stamps 0.1 ms."""
        if self._controller is None:
            try:
                import UNetSegmentationPanel
            except ImportError as e:
                raise Refusal(_("The module U-Net Segmentation is not there; install the whole extension.")) from e
            self._say(_("Getting ready …"))
            yield from UNetSegmentationPanel.warmUp()
            self._controller = UNetSegmentationPanel.newClickController()
            self._controller.addListener(self)
            self._say("")
            yield
        from UNetSegmentationLib.model import model_files
        from UNetSegmentationPanel import models

        stamps = [(path, _stamp(path)) for path in model_files()]
        if stamps != self._stamps:
            self._models = [m for m in models.installedModels("click") if m.card is not None]
            self._stamps = stamps
            self._fillModels()

    def _warmSteps(self) -> Steps:
        """Volume, model and a first run, while the person aims."""
        yield from self._loadSteps()
        target = self._chosen()
        while self._controller.busy:
            yield _WAIT
        self._target = None
        self._controller.begin(target.volume, self._model().path, f"effect {self._number}", owner=self)
        self._controller.warm()

    def _clickSteps(self, ras: tuple[float, ...], positive: bool, aimed: Target | None) -> Steps:
        yield from self._loadSteps()
        target = self._at(aimed)
        if not (self._controller.busy and target.same(self._target)):
            while self._controller.busy:  # with another lesion, whose answer is not to be lost
                yield _WAIT
            prompts, corrected = yield from self._stateSteps(target)
            if not positive and not prompts and corrected is None:
                raise Refusal(_("Nothing is outlined yet that this could not be part of; click on the lesion first."))
            self._target = target
            target.lesion = self._lesions.setdefault(_key(target), f"effect {self._number}, {next(_numbers)}")
            target.model = self._model()
            self._controller.begin(target.volume, target.model.path, target.lesion, prompts, owner=self)
            if corrected is not None:
                self._controller.setMask(*corrected)
        self._say("")
        self._controller.addPoint(ras, positive)

    def _nextSteps(self) -> Steps:
        yield from self._loadSteps()
        target = self._chosen()
        self.scriptedEffect.saveStateForUndo()
        self._addSegment(target)
        self._say(_("Click on the next lesion."))

    def _clearSteps(self, aimed: Target | None) -> Steps:
        yield from self._loadSteps()
        target = self._at(aimed)
        if target.segmentId:
            if target.same(self._target):
                self._controller.end()
            while self._controller.busy:
                yield _WAIT
            yield from self._stateSteps(target)
            yield from self._writeSteps(target, None, (0, 0, 0), ())
            self._say("")

    def _writeSteps(self, target: Target, mask: Any, start: Sequence[int], prompts: Sequence[Any], said: str = "") -> Steps:
        """The segment becomes this mask (None: empty) where the editor's masking lets it be edited; one step for Undo. said: the
        core's sentence on it."""
        from UNetSegmentationLib import mrml
        from UNetSegmentationLib.inference.click import BEYOND

        yield from self._checkSteps(target)
        editor, segment = self.scriptedEffect.parameterSetNode(), target.segmentId or None
        edit = yield from mrml.edit_steps(mask, start, target.volume, target.segmentation, segment, editor)
        self.scriptedEffect.saveStateForUndo()
        yield  # that copies the segment's layer, which may hold a lung
        yield from self._checkSteps(target)
        if not target.segmentId:
            self._addSegment(target, not self._chosen().segmentId)  # another one may be selected by now
        modes = slicer.qSlicerSegmentEditorAbstractEffect
        with _unmasked(editor):
            for labelmap, mode in ((edit.removed, modes.ModificationModeRemove), (edit.added, modes.ModificationModeAdd)):
                if labelmap is not None:
                    self.scriptedEffect.modifySegmentByLabelmap(target.segmentation, target.segmentId, labelmap, mode)
        segment = target.segmentation.GetSegmentation().GetSegment(target.segmentId)
        self._digests.pop(_key(target), None)
        if edit.digest is not None:
            self._digests[_key(target)] = _seen(target), edit.digest
        target.digest = digest = yield from self._digestSteps(target)
        # Not the model that is chosen by now, nor is one needed to empty a segment.
        text, model = (mrml.prompts_text(prompts, target.volume), target.model.name) if prompts else ("", "none")
        tags = {mrml.PROMPTS_TAG: text, mrml.DIGEST_TAG: digest, mrml.CLICK_MODEL_TAG: model}
        if said.startswith(BEYOND):
            left, _first = yield from mrml.segment_part_steps(target.segmentation, target.segmentId, target.volume)
            tags[mrml.CUT_TAG] = mrml.size_text(left)
        made = mrml.algorithm_tags(model, "SEMIAUTOMATIC")
        segment.RemoveTag(mrml.CUT_TAG)
        if prompts:
            for tag, value in {**tags, **made}.items():
                segment.SetTag(tag, value)
            segment.RemoveTag(mrml.MODEL_TAG)
        else:
            for tag in tags:
                segment.RemoveTag(tag)
            left, _first = yield from mrml.segment_part_steps(target.segmentation, target.segmentId, target.volume)
            for tag in () if left.size else made:  # what the masking left is as it was made
                segment.RemoveTag(tag)
        self._prompts[text, mrml.place_of(target.volume)] = list(prompts)
        while len(self._prompts) > KEPT_TEXTS:
            del self._prompts[next(iter(self._prompts))]
        if said:  # or a hint on the next lesion, which may have been begun meanwhile, would go
            self._say(_here(said))
        self._redraw()

    def _checkSteps(self, target: Target) -> Steps:
        """Refuses where the target is no longer what was clicked at."""
        self._at(target)
        if (yield from self._digestSteps(target)) != target.digest:
            raise Refusal(_("The segment was changed meanwhile, so nothing was written; click again."))

    def _drawSteps(self) -> Steps:
        """The dots: the clicks of the selected segment, and those that have no answer yet; none where nobody knows where they are now, as
        under a non-linear transform, which the next click says."""
        self._stale = False
        if self._controller is None or not self.scriptedEffect.active():  # without it Slicer's effect may be deleted
            return
        try:
            target = self._chosen()
            if self._controller.busy and target.same(self._target):
                prompts = self._controller.prompts
            else:
                prompts, _mask = yield from self._stateSteps(target)
        except Exception:
            prompts = []
        self._dots.show([((-p[1], -p[2], p[3]), p[4]) for p in prompts if p[0] == "point"])

    def _stateSteps(self, target: Target) -> Steps:
        """(the prompts that a segment came from, None), or, where it was changed since, (those that still hold, (mask, start))."""
        from UNetSegmentationLib import mrml

        target.digest = yield from self._digestSteps(target)
        if not target.segmentId:
            return [], None
        segment = target.segmentation.GetSegmentation().GetSegment(target.segmentId)
        text = mrml.segment_tag(segment, mrml.PROMPTS_TAG)
        prompts = self._prompts.get((text, mrml.place_of(target.volume))) or mrml.prompts_from_text(text, target.volume)
        if prompts and mrml.segment_tag(segment, mrml.DIGEST_TAG) == target.digest:
            return prompts, None
        mask, start = yield from mrml.segment_part_steps(target.segmentation, target.segmentId, target.volume)
        if not mask.size:
            return [], None
        return mrml.agreeing(prompts, mask, start, target.volume), (mask, start)

    def _digestSteps(self, target: Target) -> Steps:
        """Of the segment's voxels; read only where it or its layer was changed."""
        from UNetSegmentationLib import mrml

        if not target.segmentId:
            return ""
        when, known = _seen(target), self._digests.get(_key(target))
        if known is None or known[0] != when:
            mask, start = yield from mrml.segment_part_steps(target.segmentation, target.segmentId, target.volume)
            known = self._digests[_key(target)] = when, mrml.mask_digest(mask, start)
        return known[1]

    # ----------------------------------------------------------------------------------------------------------- helpers

    def _chosen(self, segmentId: str | None = None) -> Target:
        """The editor's volume, segmentation and segment (None: the selected one)."""
        editor = self.scriptedEffect.parameterSetNode()
        volume = editor.GetSourceVolumeNode() if editor is not None else None
        segmentation = editor.GetSegmentationNode() if editor is not None else None
        if segmentation is None or segmentation.GetScene() is None:
            raise Refusal(_("Choose a segmentation, or make a new one."))
        if volume is None or volume.GetImageData() is None:
            raise Refusal(_("Choose a source volume."))
        wanted = (editor.GetSelectedSegmentID() or "") if segmentId is None else segmentId
        known = segmentation.GetSegmentation().GetSegmentIndex(wanted) >= 0 if wanted else False
        return Target(volume, segmentation, wanted if known else "")

    def _aimed(self) -> Target | None:
        """The segment that a person means, however long that waits for its turn; None: the one that is selected by then."""
        if any(steps.__name__ == "_nextSteps" for steps in self._tasks):
            return None
        try:
            target = self._chosen()
        except Refusal:
            return None
        return target if target.segmentId else None

    def _at(self, aimed: Target | None) -> Target:
        """The target as it is now (None: the selected one); refuses where it is no longer the same."""
        target = self._chosen(aimed.segmentId if aimed is not None else None)
        if aimed is not None and not target.same(aimed):
            raise Refusal(_("The volume or the segmentation was changed meanwhile, so nothing was written; click again."))
        return target

    def _addSegment(self, target: Target, select: bool = True) -> None:
        """A new segment for the target, named after what the model finds, and selected."""
        from UNetSegmentationPanel.nodules import nextName

        card, segmentation = (target.model or self._model()).card, target.segmentation.GetSegmentation()
        label, (name, color) = card.labels[0], nextName(target.segmentation, card)
        target.segmentId = segmentation.AddEmptySegment("", name, [c / 255 for c in color])
        segment = segmentation.GetSegment(target.segmentId)
        if label.terminology_entry():
            segment.SetTag(segment.GetTerminologyEntryTagName(), label.terminology_entry())
        if target.lesion:
            self._lesions.pop((target.segmentation.GetID(), ""), None)
            self._lesions[_key(target)] = target.lesion
        target.segmentation.CreateDefaultDisplayNodes()
        target.segmentation.GetDisplayNode().SetVisibility(True)  # or it would be changed unseen
        if select:
            self.scriptedEffect.parameterSetNode().SetSelectedSegmentID(target.segmentId)

    def _model(self) -> Any:
        from UNetSegmentationLib.inference.click import MODEL
        from UNetSegmentationPanel import models

        wanted = self.scriptedEffect.parameter("Model")
        found, missing = models.resolve([f"{MODEL}-" if wanted == DEFAULT else wanted], self._models)
        if not found:
            name = missing[0].removesuffix("-")
            raise Refusal(_("{name} is not installed here; import it or choose another model.").format(name=name))
        return found[0]

    def _fillModels(self) -> None:
        was = self.modelCombo.blockSignals(True)
        self.modelCombo.clear()
        self.modelCombo.addItem(_("Default"), DEFAULT)
        for model in self._models:
            self.modelCombo.addItem(f"{model.card.name} {model.card.version}", model.name)
        self.modelCombo.blockSignals(was)
        self.updateGUIFromMRML()

    def _shownModel(self) -> int:
        """The model's place in the list; -1 where it is not there, so that any, the default too, can be chosen instead."""
        wanted = self.scriptedEffect.parameter("Model")
        index = self.modelCombo.findData(wanted)
        if index < 0 and self._models:
            from UNetSegmentationPanel import models

            found, _missing = models.resolve([wanted], self._models)
            index = self.modelCombo.findData(found[0].name) if found else -1
        return index

    def _clickIn(self, viewWidget: Any, xy: Sequence[int], positive: bool) -> None:
        from UNetSegmentationPanel import otherShown

        volume = self.scriptedEffect.parameterSetNode().GetSourceVolumeNode()
        other = otherShown(viewWidget.mrmlSliceCompositeNode(), volume) if volume is not None else None
        if other is not None:
            text = _("This view shows '{other}' and not '{name}', the source volume; choose '{other}', or show '{name}' here.")
            self._say(text.format(other=other.GetName(), name=volume.GetName()))
            return
        # xyToRas() of the base class goes through floats of 32 bits.
        self.click(self.scriptedEffect.viewNode(viewWidget).GetXYToRAS().MultiplyPoint((*xy, 0.0, 1.0))[:3], positive)

    def _observe(self) -> None:
        """What changes where the dots are, or whose they are."""
        self.removeObservers()
        editor = self.scriptedEffect.parameterSetNode()
        if editor is None:
            return
        self.addObserver(editor, vtk.vtkCommand.ModifiedEvent, self._onEditor)
        self._observed = volume, node = editor.GetSourceVolumeNode(), editor.GetSegmentationNode()
        if volume is not None:
            self.addObserver(volume, volume.TransformModifiedEvent, self._onChange)
        if node is not None:
            of = slicer.vtkSegmentation
            # Of the node, which passes them on: of a sequence each frame has another vtkSegmentation.
            events = of.SegmentModified, of.SegmentRemoved, of.SourceRepresentationModified
            for event in (*events, node.SegmentationChangedEvent, node.TransformModifiedEvent):
                self.addObserver(node, event, self._onChange)

    def _onSceneStartClose(self, caller: Any, event: Any) -> None:
        """Nothing of its patients stays, and the next one's nodes have the same IDs."""
        self.deactivate()
        for known in (self._prompts, self._digests, self._lesions):
            known.clear()
        self._say("")

    def _onEditor(self, caller: Any, event: Any) -> None:
        if self._observed != (caller.GetSourceVolumeNode(), caller.GetSegmentationNode()):
            self._observe()
        self._redraw()

    def _onChange(self, caller: Any, event: Any) -> None:
        self._redraw()

    def _redraw(self) -> None:
        """Soon, and once for many changes."""
        if not self._stale:
            self._stale = True
            qt.QTimer.singleShot(0, lambda: self._do(self._drawSteps()))

    def _say(self, text: str) -> None:
        self.message = text
        self._showMessage()

    def _showMessage(self) -> None:
        """No cursor shows an answer that is awaited: Slicer's dialogs put back those of all the application, also one that is over."""
        text = self.message
        if self._made and self._controller is not None:  # then the panel's files are there
            from UNetSegmentationPanel.models import breakable

            text = breakable(text or (_("Looking …") if self._controller.busy else ""))
        if self._made:
            self.messageLabel.text = text


class Refusal(Exception):
    """What cannot be done, as a sentence for the person."""


def _sentence(error: Exception) -> str:
    if isinstance(error, Refusal):
        return str(error)
    from UNetSegmentationPanel.run import sentence

    return sentence(error)


def _here(text: str) -> str:
    """The core's sentences, which are English, end in a box, an engine or a device, which only the panel has; from what is painted
    the click goes on."""
    text = text.replace("draw a box around it", "paint roughly over it and click again")
    return text.replace("choose another engine or device", "click in the module U-Net Segmentation, by another engine or device")


def _stamp(path: Path) -> Any:
    """Another one where the file is another."""
    try:
        status = path.stat()
    except OSError:  # it went this moment, or its folder is away
        return None
    return status.st_mtime_ns, status.st_size


def _key(target: Target) -> tuple[str, str]:
    return target.segmentation.GetID(), target.segmentId


def _seen(target: Target) -> tuple[Any, ...]:
    """What a digest is of: the segment on the voxels of the volume, wherever both are by now."""
    from UNetSegmentationLib import mrml

    segment = target.segmentation.GetSegmentation().GetSegment(target.segmentId)
    return mrml.label_of(segment)[1:], mrml.place_in(target.segmentation, target.volume), target.volume.GetImageData().GetDimensions()


@contextmanager
def _unmasked(editor: Any) -> Generator[None, None, None]:
    """While its masking, which was heeded already, is off, the editor takes what it is given."""
    mode, ranged, was = editor.GetMaskMode(), editor.GetSourceVolumeIntensityMask(), editor.StartModify()
    editor.SetMaskMode(slicer.vtkMRMLSegmentationNode.EditAllowedEverywhere)
    editor.SetSourceVolumeIntensityMask(False)
    try:
        yield
    finally:
        editor.SetMaskMode(mode)
        editor.SetSourceVolumeIntensityMask(ranged)
        editor.EndModify(was)


class Dots:
    """The clicks as small discs in the slice views, on the slice that they were made on."""

    def __init__(self, scriptedEffect: Any) -> None:
        self._effect = scriptedEffect
        self._points: list[Any] = []
        self._views: dict[Any, tuple[Any, dict[bool, tuple[Any, Any]]]] = {}  # by view node

    def show(self, points: Sequence[tuple[tuple[float, ...], bool]]) -> None:
        """points: RAS mm of the world, and whether positive."""
        self._points = list(points)
        manager = slicer.app.layoutManager()
        if not self._views and self._points and manager is not None:
            for name in manager.sliceViewNames():
                self._add(manager.sliceWidget(name))
        for widget, _layers in self._views.values():
            self.move(widget)

    def move(self, viewWidget: Any) -> None:
        """The view, or what is to be seen in it, was changed."""
        node = self._effect.viewNode(viewWidget)
        view = self._views.get(node)
        if view is None:
            return
        to_slice, to_xy = vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(node.GetSliceToRAS(), to_slice)
        vtk.vtkMatrix4x4.Invert(node.GetXYToRAS(), to_xy)
        reach = max(0.5, self._effect.sliceSpacing(viewWidget) / 2)
        # The editor tells nothing of the views that the segmentation is not shown in: there dots would not move with the slice.
        points = self._points if self._effect.segmentationDisplayableInView(node) else []
        for positive, (data, _actor) in view[1].items():
            places = vtk.vtkPoints()
            for ras, kind in points:
                if kind == positive and abs(to_slice.MultiplyPoint((*ras, 1.0))[2]) <= reach:
                    places.InsertNextPoint(*to_xy.MultiplyPoint((*ras, 1.0))[:2], 0.0)
            data.SetPoints(places)
            data.Modified()
        self._effect.scheduleRender(viewWidget)

    def clear(self) -> None:
        """Takes all of it out of the views."""
        for widget, layers in self._views.values():
            if self._effect.renderer(widget) is not None:  # the application may be closing
                for _data, actor in layers.values():
                    self._effect.removeActor2D(widget, actor)
        self._views.clear()

    def _add(self, viewWidget: Any) -> None:
        from UNetSegmentationPanel import pixelRatio

        layers, diameter = {}, 2 * DOT_PIXELS * pixelRatio(self._effect.renderWindow(viewWidget))
        for positive, color in COLORS.items():
            data, disc, glyph = vtk.vtkPolyData(), vtk.vtkGlyphSource2D(), vtk.vtkGlyph2D()
            disc.SetGlyphTypeToCircle()
            disc.SetScale(diameter)
            disc.SetResolution(16)
            glyph.SetInputData(data)
            glyph.SetSourceConnection(disc.GetOutputPort())
            mapper, actor = vtk.vtkPolyDataMapper2D(), vtk.vtkActor2D()
            mapper.SetInputConnection(glyph.GetOutputPort())
            mapper.ScalarVisibilityOff()
            actor.SetMapper(mapper)
            actor.GetProperty().SetColor(*color)
            actor.PickableOff()
            self._effect.addActor2D(viewWidget, actor)
            layers[positive] = data, actor
        self._views[self._effect.viewNode(viewWidget)] = viewWidget, layers
