"""Click a nodule: clicks from the slice views, nodules as segments with their dots, and the table of what they measure.

No widget is known here but the slice views; the scene is written in pieces of a few milliseconds.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

from . import clickController, inputs, isStill, otherShown
from .models import breakable, plainTip
from .run import sentence, volumeKey

COLORS = ((255, 217, 47), (102, 194, 255), (255, 127, 80), (178, 223, 138), (231, 138, 195), (190, 174, 250), (94, 220, 200))
# Beyond this, 128 mm in each direction at 0.5 mm, neither a nodule nor a mass is measured, but an organ. One of 125 mm takes 0.8 s, in
# pieces of 26 ms at most.
LARGEST_VOXELS = 16 << 20
_SHOWN_ROWS = 8  # of the table without scrolling
_BUDGET_S = 0.01
_SETTLE_MS = 200  # after the last stroke of a brush
# Node references and an attribute of a volume: what was last chosen for it.
_CHOSEN_ROLE, _EARLIER_ROLE, _DAYS_ATTRIBUTE = "UNetSegmentation.ChosenNodules", "UNetSegmentation.EarlierStudy", "UNetSegmentation.Days"


class Pieces:
    """Generators run one after the other, a few milliseconds in each turn of the event loop."""

    def __init__(self, failed: Callable[[str], None], idle: Callable[[], None] = lambda: None) -> None:
        self._failed, self._idle = failed, idle
        self._queue: deque[Generator[Any, None, Any]] = deque()
        self._working = False
        self._timer = qt.QTimer()
        self._timer.setInterval(0)
        self._timer.connect("timeout()", self._tick)

    def add(self, steps: Generator[Any, None, Any]) -> None:
        self._queue.append(steps)
        self._timer.start()

    def clear(self) -> None:
        self._timer.stop()
        queue, self._queue = self._queue, deque()
        for steps in list(queue)[int(self._working) :]:
            steps.close()

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    def _tick(self) -> None:
        if self._working or not self._queue:
            self._timer.stop()
            return
        queue, until = self._queue, time.monotonic() + _BUDGET_S
        self._working, error, ended = True, "", False
        try:
            while queue is self._queue and time.monotonic() < until:
                next(queue[0])
        except StopIteration:
            ended = True
        except Exception as e:
            ended, error = True, sentence(e)
        finally:
            self._working = False
        if queue is not self._queue:
            queue[0].close()  # cleared from within
        elif ended:
            queue.popleft()
        if error:
            self._failed(error)
        if ended and not self._queue:
            self._idle()


# ---------------------------------------------------------------------------------------------------------------- views


class ViewClicks:
    """Clicks of the left button into slice views: clicked(ras, positive, composite node of the view). With Ctrl they are negative.
    Shift, the other buttons and the wheel stay Slicer's; so do all clicks while something is being placed or windowed.

    Slicer's own place mode knows no click with a modifier, so the views' interactors are listened to, before Slicer does.
    """

    def __init__(self, clicked: Callable[[Sequence[float], bool, Any], None]) -> None:
        self._clicked = clicked
        self._observed: list[tuple[Any, Any, list[int]]] = []
        self._pressed: tuple[tuple[int, int], bool] | None = None  # where, and whether with Ctrl
        self._swallow = False  # that button's release too
        self._layouts: Any = None

    @property
    def on(self) -> bool:
        return self._layouts is not None

    def start(self) -> None:
        manager = slicer.app.layoutManager()
        if self.on or manager is None:
            return
        self._layouts = manager
        manager.connect("layoutChanged(int)", self._again)
        self._observe()

    def stop(self) -> None:
        if self.on:
            self._layouts.disconnect("layoutChanged(int)", self._again)
            self._layouts = None
            self._leave()

    def _again(self, *_unused: Any) -> None:
        self._leave()
        self._observe()

    def _observe(self) -> None:
        commands = vtk.vtkCommand
        for name in self._layouts.sliceViewNames():
            widget = self._layouts.sliceWidget(name)
            view = widget.sliceView()
            interactor, tags = view.interactor(), []

            def heard(caller: Any, event: str, widget: Any = widget, tags: list[int] = tags) -> None:
                self._heard(caller, event, widget, tags)

            for event in (commands.LeftButtonPressEvent, commands.LeftButtonReleaseEvent, commands.LeftButtonDoubleClickEvent):
                tags.append(interactor.AddObserver(event, heard, 10.0))
            view.setViewCursor(qt.QCursor(qt.Qt.CrossCursor))
            self._observed.append((interactor, view, tags))

    def _leave(self) -> None:
        observed, self._observed, self._pressed, self._swallow = self._observed, [], None, False
        for interactor, view, tags in observed:
            for tag in tags:
                interactor.RemoveObserver(tag)
            with suppress(ValueError):  # PythonQt's, of a view whose node has left the scene
                view.unsetViewCursor()

    def _heard(self, interactor: Any, event: str, widget: Any, tags: list[int]) -> None:
        mode = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
        taken = mode is not None and mode.GetCurrentInteractionMode() in (mode.Place, mode.AdjustWindowLevel)
        at, negative = interactor.GetEventPosition(), bool(interactor.GetControlKey())
        free = not (taken or interactor.GetShiftKey() or interactor.GetAltKey())
        swallow = free and not negative  # a drag with Ctrl is Slicer's, and what is aborted here nobody else hears
        # The press decides: of who heard that alone the release, a drag of Slicer's would go on without a button.
        if event == "LeftButtonPressEvent":
            self._pressed, self._swallow = (at, negative) if free else None, swallow
        elif event == "LeftButtonReleaseEvent":
            swallow, self._swallow = self._swallow, False
        if swallow:
            for tag in tags:
                interactor.GetCommand(tag).SetAbortFlag(1)
        if event == "LeftButtonReleaseEvent":
            pressed, self._pressed = self._pressed, None
            if pressed is not None and isStill(pressed[0], at, interactor):
                ras = widget.mrmlSliceNode().GetXYToRAS().MultiplyPoint([float(at[0]), float(at[1]), 0.0, 1.0])
                self._clicked(ras[:3], not pressed[1], widget.mrmlSliceCompositeNode())


# -------------------------------------------------------------------------------------------------------------- nodules


@dataclass(eq=False)
class _Lesion:
    """A nodule that is clicked at. segment: its ID, None before the first answer. label: the labelmap as it was written. asked: the
    labelmap from which the answer that is awaited goes on, and its digest; None where that is not known. text: of the segment's
    prompts as this panel knows them; where the segment holds another one, it was clicked at in the Segment Editor since."""

    volume: Any
    node: Any
    segment: str | None
    model: Any
    key: str
    label: Any = None
    asked: tuple[Any, str] | None = None
    place: Any = None  # of the volume, when the prompts were last put there
    text: str = ""

    @property
    def held(self) -> str:
        """The text of the prompts that the segment holds."""
        from UNetSegmentationLib import mrml

        return mrml.segment_tag(self.part(), mrml.PROMPTS_TAG) if self.there else ""

    def part(self) -> Any:
        return self.node.GetSegmentation().GetSegment(self.segment) if self.there else None

    @property
    def there(self) -> bool:
        node = self.node
        if node is None or not self.segment or node.GetScene() is None:
            return False
        # While it is removed a node still knows its scene.
        return node.GetScene().GetNodeByID(node.GetID()) is node and node.GetSegmentation().GetSegment(self.segment) is not None


@dataclass
class _Step:
    undo: Any
    lesion: _Lesion
    text: str  # of the prompts before it, as the segment held them
    made: bool  # the segmentation was made by this step, or one before it
    held: Any  # its vtkSegmentation: of a sequence each frame has another one


class NoduleTool(VTKObservationMixin):
    """Nodules of one volume, clicked into one segmentation. changed() is called when something to be seen has changed.

    text: a sentence for the person, or "". segmentation: None before the first nodule. kept(segmentation) is called when one
    was made. A mask that a person corrects meanwhile is what the next click goes on from.
    """

    def __init__(self, changed: Callable[[], None], kept: Callable[[Any], None]) -> None:
        super().__init__()
        self._changed, self._kept = changed, kept
        self.volume: Any = None
        self.segmentation: Any = None
        self.model: Any = None  # of models.Model
        self.options: dict[str, str] = {}
        self.negative = False
        self.text = ""
        # What the worker measured, by the mask's digest and the volumeKey().
        self.measured: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._lesion: _Lesion | None = None
        self._steps: list[_Step] = []
        self._unrecorded = self._left = False
        self._keys = itertools.count(1)
        self._pieces = Pieces(self._say, changed)
        self._views = ViewClicks(self.click)
        self._controller: Any = None

    # ---------------------------------------------------------------------------------------------------------- outside

    def use(self, volume: Any, segmentation: Any, model: Any, options: dict[str, str]) -> None:
        """What is chosen. Another volume, segmentation or model ends the nodule that was clicked at."""
        if (volume, segmentation, model, options) == (self.volume, self.segmentation, self.model, self.options):
            return
        other = volume is not self.volume or model != self.model or options != self.options
        moved = segmentation is not self.segmentation
        if volume is not self.volume:
            self._steps = []  # what cannot be seen is not undone
            self.removeObservers()
            if volume is not None:
                self.addObserver(volume, volume.TransformModifiedEvent, self._onMoved)
        self.volume, self.segmentation, self.model, self.options = volume, segmentation, model, options
        if other or (moved and (self._lesion is None or self._lesion.node is not segmentation)):
            lost = self.busy and self._lesion is not None
            self._pieces.clear()
            self.next()
            if lost:
                self._say(_("The volume, the segmentation or the model was changed or removed meanwhile, so nothing was written."))
        if volume is None or model is None:
            self.disarm()
        self.showDots()

    @property
    def armed(self) -> bool:
        return self._views.on

    @property
    def busy(self) -> bool:
        return self._pieces.busy or (self._mine and self._controller.busy)

    @property
    def segment(self) -> str:
        """The ID of the nodule that the next click refines; "" where it makes a new one."""
        return self._lesion.segment or "" if self._lesion is not None and self._lesion.there else ""

    @property
    def doubted(self) -> bool:
        """A second click beside the last one makes a nodule of what was doubted."""
        return self._mine and self._controller.doubted

    def arm(self) -> None:
        """The next clicks in the slice views are prompts."""
        if self.volume is None or self.model is None:
            return
        interaction = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
        if interaction is not None:
            interaction.SwitchToViewTransformMode()
        self._views.start()
        self._begin().warm()
        self._say("")

    def disarm(self) -> None:
        self._views.stop()
        self._changed()

    def leave(self) -> None:
        """Another module is opened: clicks are Slicer's again, and so are surfaces, which it may measure or export."""
        self._left = True
        self.disarm()
        self._finishSurfaces()

    def click(self, ras: Sequence[float], positive: bool = True, view: Any = None) -> None:
        """A prompt at a point of the world, RAS mm; self.negative turns it round. view: the composite node of the slice view that was
        clicked into, see otherShown()."""
        other = otherShown(view, self.volume) if None not in (view, self.volume) else None
        if other is not None:
            text = _("This view shows '{other}' and not '{name}', which is chosen as the volume; choose '{other}', or show '{name}' here.")
            self._say(text.format(other=other.GetName(), name=self.volume.GetName()))
            return
        if self._isOthers():
            return
        positive = positive and not self.negative
        self._pieces.add(self._promptSteps(lambda c: c.addPoint(ras, positive), positive))

    def box(self, roi: Any) -> None:
        """The box of a markups ROI as a prompt."""
        if not self._isOthers():
            self._pieces.add(self._promptSteps(lambda c: c.addRoi(roi), True))

    def next(self) -> None:
        """The next click is on another nodule."""
        self._lesion, self._unrecorded = None, False
        if self._mine:
            self._controller.end()
        self.negative = False
        self._say("")

    def select(self, segmentId: str) -> None:
        """The next click refines this nodule, from the prompts that are stored with it. Not while an answer is awaited."""
        if segmentId == self.segment or None in (self.segmentation, self.volume, self.model):
            return
        if self.busy:
            self._say(_("The last click is not answered yet; choose another nodule after that."))
            return
        lesion = _Lesion(self.volume, self.segmentation, segmentId, self.model, self._key())
        if not lesion.there or self._isOthers():
            return
        from UNetSegmentationLib import mrml

        self._resume(lesion, mrml.prompts_from_text(lesion.held, self.volume))
        if self.armed:
            self._controller.warm()
        self._say("")

    @property
    def canUndo(self) -> bool:
        self._steps = [s for s in self._steps if s.undo.can_undo]
        lesion = self._lesion
        asked = self._mine and lesion is not None and (lesion.there or not lesion.segment)
        return bool(self._own) or self.doubted or bool(asked and any(p[0] != "mask" for p in self._controller.prompts))

    @property
    def _own(self) -> list[_Step]:
        """The steps of the nodule at hand; all where none is."""
        at = self._lesion if self.segment else None
        steps = [s for s in self._steps if s.lesion.node is None or s.lesion.node.GetSegmentation() is s.held]  # of the frame that is shown
        return [s for s in steps if at is None or (s.lesion.node, s.lesion.segment) == (at.node, at.segment)]

    def undo(self) -> None:
        """Take the last prompt back, of the nodule at hand or else of all; the segment is exactly as it was before it. What a person
        corrected since is asked for. Of one that was doubted nothing was written."""
        from UNetSegmentationLib import mrml

        if not self.canUndo or self._pieces.busy:
            return
        step = next(reversed(self._own), None)
        lesion = step.lesion if step is not None else self._lesion
        if self._mine and self._controller.busy:
            self._controller.cancel()
            self._unrecorded = False
        elif self.doubted:
            self._controller.forgetDoubt()
        elif lesion is not None and self._isCorrected(lesion) and not self._mayUndo(lesion):
            return
        elif step is not None:
            self._steps.remove(step)
            lesion = step.lesion
            lesion.asked = None
            prompts = mrml.prompts_from_text(step.text, lesion.volume)
            ours = self.segmentation is lesion.node
            step.undo.undo()
            if step.made and lesion.node.GetScene() is not None and not _count(lesion.node) and mrml.sequence_frames(lesion.node) is None:
                mrml.remove_nodes([lesion.node])  # its first click was undone before the others
            lesion.label, lesion.text = None, lesion.held
            if self.model is not None:  # another one may be chosen by now
                lesion.model = self.model
            if not lesion.there:
                lesion.segment = None
            if lesion.node.GetScene() is None:
                lesion.node = None
                if ours:  # the selector would go on to another segmentation, which nobody chose
                    self._keep(None)
            if ours and (lesion.there or not prompts):
                self._resume(lesion, prompts)
            elif ours:
                self.next()  # a person had removed it: the next click is on another one
        else:
            if lesion is not None:
                lesion.asked = None
                self._follow(lesion)
            self._unrecorded = self._controller.undo()
        self._say("")

    def close(self) -> None:
        """Nothing of it is left but the segments."""
        self._views.stop()
        self._pieces.clear()
        self._lesion, self._steps = None, []
        self.removeObservers()
        if self._controller is not None:
            self._controller.removeListener(self)
            self._controller = None
        if self.volume is not None or self.segmentation is not None:
            from UNetSegmentationLib import mrml

            mrml.remove_dots(slicer.mrmlScene)

    def forgetScene(self) -> None:
        """The scene is closed."""
        self._pieces.clear()
        self._views.stop()
        self._steps, self._lesion = [], None
        self.volume = self.segmentation = None
        self.removeObservers()
        if self._mine:
            self._controller.end()
        self._say("")

    # ------------------------------------------------------------------------------------------------------ controller's

    def onAnswer(self, answer: Any) -> None:
        lesion, prompts = self._lesion, list(self._controller.answered)
        if lesion is not None:
            self._pieces.add(self._writeSteps(lesion, answer, prompts))
            if self._left:
                self._finishSurfaces()

    def onError(self, text: str) -> None:
        self._unrecorded = False
        self._say(text)

    def _onMoved(self, caller: Any, event: Any) -> None:
        self.showDots()

    def onChanged(self) -> None:
        if self._lesion is not None and not self._mine:
            self._lesion = None  # the volume is gone, or another one clicks now
        self.showDots()
        self._changed()

    # --------------------------------------------------------------------------------------------------------- machinery

    def _isOthers(self) -> bool:
        """Whether the nodules are another scan's; says so."""
        of = scanOf(self.segmentation)
        if of is None or self.volume in (None, of) or _onOneGrid(of, self.volume):
            return False
        text = _("'{nodules}' belongs to '{of}' and not to '{name}'; choose '{of}' as the volume, or another segmentation.")
        self._say(text.format(nodules=self.segmentation.GetName(), of=of.GetName(), name=self.volume.GetName()))
        return True

    @property
    def _mine(self) -> bool:
        return self._controller is not None and self._controller.owner is self

    def _say(self, text: str) -> None:
        self.text = text
        self._changed()

    def _key(self) -> str:
        return f"panel-{id(self)}-{next(self._keys)}"

    def _keep(self, node: Any) -> None:
        self.segmentation = node
        self._kept(node)

    def _finishSurfaces(self) -> None:
        if self._controller is not None:
            from UNetSegmentationLib import mrml

            self._pieces.add(mrml.exact_surface_steps(slicer.mrmlScene))

    def _begin(self) -> Any:
        """The controller, at the lesion, or at a new one."""
        self._left = False
        if self._lesion is None or not self._mine:
            lesion = self._lesion or _Lesion(self.volume, self.segmentation, None, self.model, self._key())
            self._resume(lesion, [])
        return self._controller

    def _resume(self, lesion: _Lesion, prompts: Sequence[Any]) -> None:
        from UNetSegmentationLib import Options, mrml

        if self._controller is None:
            self._controller = clickController()
            self._controller.addListener(self)
        self._lesion, lesion.place, lesion.text = lesion, mrml.place_of(lesion.volume), lesion.held
        self._controller.begin(lesion.volume, lesion.model.path, lesion.key, prompts, self, Options(**self.options))

    def _follow(self, lesion: _Lesion) -> None:
        """Where the scan was moved, the prompts go with it; what was clicked in the Segment Editor is gone on from."""
        from UNetSegmentationLib import mrml

        if lesion.there and not self._controller.busy and (mrml.place_of(lesion.volume), lesion.held) != (lesion.place, lesion.text):
            self._resume(lesion, mrml.prompts_from_text(lesion.held, lesion.volume))

    def _promptSteps(self, prompt: Callable[[Any], None], positive: bool) -> Generator[Any, None, None]:
        from UNetSegmentationLib import mrml
        from UNetSegmentationLib.dataset import BEYOND

        if self.volume is None or self.model is None:
            return
        lesion = self._lesion
        if lesion is not None and lesion.segment and not lesion.there:
            self.next()  # a person removed it: this click is on another one
            lesion = None
        controller = self._begin()
        lesion = self._lesion
        self._follow(lesion)
        if not positive and not controller.prompts and not lesion.there:
            self._say(_("Click on the nodule first, then on what is not part of it."))
            return
        if lesion.there and not controller.busy:
            if (yield from mrml.beyond_steps(lesion.node, [lesion.segment], lesion.volume)) > BEYOND:
                text = _("'{segment}' reaches beyond '{volume}', which would cut it; click on it in the scan that it was made in.")
                self._say(text.format(segment=lesion.part().GetName(), volume=lesion.volume.GetName()))
                return
            label, written = mrml.label_of(lesion.part()), mrml.segment_tag(lesion.part(), mrml.DIGEST_TAG)
            lesion.asked = label, written
            unread = not controller.prompts  # of what it came from nothing can be read any more
            if unread or not self._isAsWritten(lesion):
                mask, start = yield from mrml.segment_part_steps(lesion.node, lesion.segment, lesion.volume)
                lesion.asked = label, mrml.mask_digest(mask, start)
                if not mask.size:  # emptied: as a new one
                    self._resume(lesion, [])
                    if not positive:
                        self._say(_("Click on the nodule first, then on what is not part of it."))
                        return
                elif unread or lesion.asked[1] != written:
                    controller.setMask(mask, start)
        if controller is self._controller and self._mine:
            self.text = ""
            try:
                prompt(controller)
            except Exception:
                controller.cancel()  # the mask that was set for it, too
                raise

    @staticmethod
    def _isAsWritten(lesion: _Lesion) -> bool:
        from UNetSegmentationLib import mrml

        return lesion.label is not None and lesion.label == mrml.label_of(lesion.part())

    def _isCorrected(self, lesion: _Lesion) -> bool:
        """Whether a person changed its mask after its last prompt here."""
        from UNetSegmentationLib import mrml

        if not lesion.there:
            return False
        if lesion.held != lesion.text:
            return True
        if self._isAsWritten(lesion):
            return False
        mask, start = mrml.complete(mrml.segment_part_steps(lesion.node, lesion.segment, lesion.volume))
        return mrml.mask_digest(mask, start) != mrml.segment_tag(lesion.part(), mrml.DIGEST_TAG)

    @staticmethod
    def _mayUndo(lesion: _Lesion) -> bool:
        text = _("{name} was corrected elsewhere after its last click here. Undoing that click takes the correction back, too.")
        return slicer.util.confirmOkCancelDisplay(
            text.format(name=lesion.part().GetName()), windowTitle=_("Undo click"), textFormat=qt.Qt.PlainText
        )

    def _writeSteps(self, lesion: _Lesion, answer: Any, prompts: list[Any]) -> Generator[Any, None, None]:
        from UNetSegmentationLib import mrml
        from UNetSegmentationLib.inference.click import BEYOND

        unrecorded, self._unrecorded = self._unrecorded, False
        if lesion.segment and not lesion.there:
            self._say(_("The segment was removed meanwhile, so nothing was written."))
            return
        if lesion.there and lesion.asked is not None and mrml.label_of(lesion.part()) != lesion.asked[0]:
            mask, start = yield from mrml.segment_part_steps(lesion.node, lesion.segment, lesion.volume)
            if mrml.mask_digest(mask, start) != lesion.asked[1]:
                if lesion is self._lesion:
                    self._resume(lesion, mrml.prompts_from_text(lesion.held, lesion.volume))
                self._say(_("The segment was changed meanwhile, so nothing was written; click again."))
                return
        if answer.box.empty:
            if lesion.there:
                mrml.remove_segment(lesion.node, lesion.segment)
            lesion.segment = lesion.label = None
            self._changed()
            return
        scene, label = lesion.volume.GetScene(), lesion.model.card.labels[0]
        before = lesion.held
        node = lesion.node if lesion.node is not None and lesion.node.GetScene() is scene else self.segmentation
        name, color = nextName(node, lesion.model.card)
        digest = mrml.mask_digest(answer.mask, answer.box.start)
        tags = {
            mrml.PROMPTS_TAG: mrml.prompts_text(prompts, lesion.volume),
            mrml.DIGEST_TAG: digest,
            mrml.CLICK_MODEL_TAG: lesion.model.name,
            **mrml.algorithm_tags(lesion.model.name, "SEMIAUTOMATIC"),
        }
        if answer.text.startswith(BEYOND):
            tags[mrml.CUT_TAG] = mrml.size_text(answer.mask)
        if label.terminology_entry() and not lesion.there:  # later it is what a person says it is
            tags[slicer.vtkSegment.GetTerminologyEntryTagName()] = label.terminology_entry()
        measured = digest, volumeKey([lesion.volume])
        yield
        undo = mrml.Undo(scene, 1)
        undo.begin(node)
        written, segment = yield from mrml.write_clicked_steps(
            answer.mask,
            answer.box.start,
            lesion.volume,
            node,
            lesion.segment,
            name=name,
            color=color,
            tags=tags,
        )
        undo.commit([written])
        shown = written.GetDisplayNode()  # or it would be changed unseen
        shown.SetSegmentVisibility(segment, True)
        shown.SetVisibility(True)
        lesion.node, lesion.segment = written, segment
        lesion.label, lesion.text = mrml.label_of(lesion.part()), tags[mrml.PROMPTS_TAG]
        lesion.asked = lesion.label, digest
        if answer.measures:
            self.measured[measured] = answer.measures
        if not unrecorded:
            made = node is None or any(s.made for s in self._steps if s.lesion.node is node)
            self._steps.append(_Step(undo, lesion, before, made, written.GetSegmentation()))
        if written is not self.segmentation:
            self._keep(written)
        self.showDots()
        self._say(answer.text)

    def showDots(self) -> None:
        """The prompts of all nodules as small dots: of the one at hand those that were just made, of the others the stored ones."""
        from UNetSegmentationLib import UserError, mrml

        if self.volume is None or self.volume.GetScene() is None:
            mrml.remove_dots(slicer.mrmlScene)
            return
        points: dict[bool, list[Any]] = {True: [], False: []}
        lesion = self._lesion
        known = lesion is None or self.busy or (mrml.place_of(self.volume), lesion.held) == (lesion.place, lesion.text)
        current = self._mine and known
        prompts = [p for p in self._controller.prompts if p[0] == "point"] if current else []
        if self.segmentation is not None and self.segmentation.GetScene() is not None:
            held = self.segmentation.GetSegmentation()
            for i in range(held.GetNumberOfSegments()):
                if not current or held.GetNthSegmentID(i) != self.segment:
                    try:
                        stored = mrml.prompts_from_text(mrml.segment_tag(held.GetNthSegment(i), mrml.PROMPTS_TAG), self.volume)
                        prompts += [p for p in stored if p[0] == "point"]  # no masks, which all together may fill the memory
                    except UserError:  # a transform that the core refuses: nobody knows where they are now
                        prompts = []
                        break
        for _kind, x, y, z, positive in prompts:
            points[positive].append((-x, -y, z))
        for positive, wanted in points.items():
            mrml.show_dots(self.volume.GetScene(), positive, wanted)


def nextName(segmentation: Any, card: Any) -> tuple[str, tuple[int, int, int]]:
    """The name and the colour (0..255) of the next lesion that a model finds: beyond the highest number there is, as what was said of
    one that was removed is not true of it, and told from its neighbours, which the model's one colour would not be."""
    from UNetSegmentationLib.inference.click import expects_lung

    word = _("Nodule") if expects_lung(card) else card.labels[0].name
    names = [] if segmentation is None else [segmentation.GetSegmentation().GetNthSegment(i).GetName() for i in range(_count(segmentation))]
    number = 1 + max((int(m[1]) for m in (re.fullmatch(re.escape(word) + r" (\d+)", n, re.I) for n in names) if m), default=0)
    return f"{word} {number}", COLORS[(number - 1) % len(COLORS)]


def scanOf(segmentation: Any) -> Any:
    """The scan that a segmentation's segments are of: its reference volume, or, where that is none, as in a .seg.nrrd or where it was
    deleted, the one whose voxels they are; None where nobody knows."""
    from UNetSegmentationLib import mrml

    there = segmentation is not None and segmentation.GetScene() is not None and _count(segmentation)
    return (_reference(segmentation) or mrml.find_scan(segmentation)) if there else None


def keepChoice(volume: Any, segmentation: Any, earlier: Any, days: int) -> None:
    """Let the scene keep what is chosen for a volume: the segmentations of its nodules and of its earlier study (None: none), and how
    many days before that was (0: as the studies are dated)."""
    for role, node in ((_CHOSEN_ROLE, segmentation), (_EARLIER_ROLE, earlier)):
        volume.SetNodeReferenceID(role, node.GetID() if node is not None else None)
    volume.SetAttribute(_DAYS_ATTRIBUTE, str(days) if days and earlier is not None else None)


def keptChoice(volume: Any) -> tuple[Any, Any, int]:
    """What keepChoice() was given; of a volume that nothing was chosen for (None, None, 0)."""
    earlier = volume.GetNodeReference(_EARLIER_ROLE)
    days = volume.GetAttribute(_DAYS_ATTRIBUTE) if earlier is not None else None  # it may have been removed meanwhile
    return volume.GetNodeReference(_CHOSEN_ROLE), earlier, int(days or 0)


def _reference(segmentation: Any) -> Any:
    """The reference volume; the labelmap that segments were made of is no scan."""
    own = inputs.referenceVolume(segmentation)
    return own if own is not None and own.GetClassName() == inputs.VOLUME else None


def _onOneGrid(*volumes: Any) -> bool:
    """Whether two volumes' voxels are the same places, as a filtered copy's are."""
    from UNetSegmentationLib import UserError, mrml

    try:
        one, other = map(mrml.image_from_volume, volumes)  # views, no copies
    except UserError:
        return False
    return one.same_grid(other)


def _count(node: Any) -> int:
    return node.GetSegmentation().GetNumberOfSegments()


# ---------------------------------------------------------------------------------------------------------------- table


@dataclass
class Row:
    """A segment and what describe() says of it; measures None where it is empty, or not measured: unmeasured is the sentence why.
    note: what is to be known of its mask, of this mrml.size_text()."""

    segment: str
    name: str
    measures: dict[str, Any] | None
    label: Any = field(default=None, repr=False)
    digest: str = ""
    unmeasured: str = ""
    note: str = ""
    size: str = ""


def _note(segment: Any, size: str) -> str:
    """What is to be known of a segment's mask, of this mrml.size_text()."""
    from UNetSegmentationLib import mrml
    from UNetSegmentationLib.inference.click import BEYOND

    return f" {BEYOND}" if size and mrml.segment_tag(segment, mrml.CUT_TAG) == size else ""


class NoduleList(VTKObservationMixin):
    """What the segments of a segmentation measure, kept up to date while they are edited. changed() follows each change.

    known: NoduleTool.measured, which need not be made again. models(): of clicks, which say whether theirs are of lungs.
    ready: whether the rows are the segmentation's, or still to come; text: why they will not come; note: what is to be known of
    all figures; astray: that the segments do not lie where they were drawn in their scan.
    """

    def __init__(
        self, changed: Callable[[], None], known: dict[tuple[Any, ...], dict[str, Any]], models: Callable[[], Sequence[Any]]
    ) -> None:
        super().__init__()
        self._changed, self._known, self._models = changed, known, models
        self.node: Any = None
        self.volume: Any = None
        self.rows: list[Row] = []
        self.ready, self.text, self.note, self.astray = False, "", "", ""
        self.size = ""  # of a picture without mm the title of the column of sizes
        self._pieces = Pieces(self._failed)
        self._timer = qt.QTimer()
        self._timer.setSingleShot(True)
        self._timer.setInterval(_SETTLE_MS)
        self._timer.connect("timeout()", self._measure)

    def use(self, node: Any, volume: Any) -> None:
        """volume: whose intensities count, unless the segments lie on one of their own."""
        if node is not None:
            own = _reference(node)
            volume = own if own is not None and (volume is None or _count(node)) else volume
        if node is self.node and volume is self.volume:
            return
        self.close()
        self.node, self.volume = node, volume
        if node is not None:
            kinds = slicer.vtkSegmentation
            of = (kinds.SegmentAdded, kinds.SegmentRemoved, kinds.SegmentModified, kinds.SegmentsOrderModified)
            for event in (*of, kinds.SourceRepresentationModified):
                self.addObserver(node, event, self._onSegments)
            self.addObserver(node, node.TransformModifiedEvent, self._onSegments)
            if volume is not None:
                for event in (vtk.vtkCommand.ModifiedEvent, volume.ImageDataModifiedEvent, volume.TransformModifiedEvent):
                    self.addObserver(volume, event, self._onSegments)
        self._timer.start(0)

    def close(self) -> None:
        self._timer.stop()
        self._pieces.clear()
        self.removeObservers()
        self.node, self.volume, self.rows = None, None, []
        self.ready, self.text, self.note, self.astray = False, "", "", ""

    def title(self, column: str) -> str:
        """Of a column of nodule.COLUMNS."""
        return column if not self.size else self.size if "(mm³)" in column else column.replace("(mm)", "(px)")

    def _failed(self, text: str) -> None:
        logging.info("The nodules were not measured: %s", text)
        self.rows, self.ready = [Row(row.segment, row.name, None) for row in self.rows], False  # what they were may be true no more
        self.text, self.astray = text, ""
        self._changed()

    def _onSegments(self, caller: Any, event: Any) -> None:
        self._timer.start(_SETTLE_MS)

    def _measure(self) -> None:
        self._pieces.clear()
        self._pieces.add(self._steps())

    def _steps(self) -> Generator[Any, None, None]:
        from UNetSegmentationLib import mrml, nodule
        from UNetSegmentationLib.image import length_unit
        from UNetSegmentationLib.inference.click import expects_lung

        node, volume = self.node, self.volume
        rows, former = [], {row.segment: row for row in self.rows}
        usable = node is not None and volume is not None and volume.GetImageData() is not None
        if usable and (node.GetScene() is None or volume.GetScene() is None):
            usable = False
        held = node.GetSegmentation() if usable else None
        own, scan = (mrml.image_from_volume(volume), volumeKey([volume])) if usable else (None, None)
        image = mrml.as_read(own, volume) if usable else None
        inside = mrml.place_in(node, volume) if usable else None
        for segment in [held.GetNthSegmentID(i) for i in range(held.GetNumberOfSegments())] if usable else ():
            part = held.GetSegment(segment)
            if part is None:
                continue
            label, row = mrml.label_of(part), former.get(segment)
            if row is not None and row.label == (label, scan, inside):
                rows.append(replace(row, name=part.GetName(), note=_note(part, row.size)))
                continue
            mask, start = yield from mrml.segment_part_steps(node, segment, volume)
            digest, size = mrml.mask_digest(mask, start), mrml.size_text(mask)
            measures = row.measures if row is not None and row.digest == digest and row.label[1] == scan else None
            measures = measures or self._known.get((digest, scan))
            if measures is None and 0 < mask.size <= LARGEST_VOXELS:
                model = mrml.segment_tag(part, mrml.CLICK_MODEL_TAG)
                made = [m.card for m in self._models() if m.name.rpartition("-")[0] == model.rpartition("-")[0]]
                lung = all(map(expects_lung, made)) if made else not model  # of a model that is not here nothing is known
                measures = mrml.carried_measures((yield from nodule.describe_steps(image, mask, start, lung)), image, own)
            why = ""
            if mask.size > LARGEST_VOXELS and 10 * int((mask > 0).sum()) < mask.size:  # lungs fill a quarter
                why = _("Its voxels lie too far apart for a nodule, so it is not measured; erase those that are astray.")
            elif not mask.size and (yield from mrml.beyond_steps(node, [segment], volume)):
                why = _("It lies outside its scan, so it is not measured; put both under the same transform.")
            measures = measures if mask.size else None
            rows.append(Row(segment, part.GetName(), measures, (label, scan, inside), digest, why, _note(part, size), size))
            yield
        self.rows, self.ready, self.text, self.note = rows, usable, "", mrml.stretch_note(volume) if usable else ""
        self.size = "" if image is None or length_unit(image) == "mm" else "Area (px)" if image.shape[0] == 1 else "Volume (voxels)"
        self.astray = ""
        if usable and volume is _reference(node) and mrml.is_astray(node, volume):
            self.astray = _("{name} does not lie where it did in its scan; put both under the same transform, or harden both.").format(
                name=node.GetName()
            )
        if node is not None and not usable:
            self.text = _(
                "The scan of {name} is not in the scene, or one of several there, so its nodules are not measured; load it, or choose it "
                "as the source volume in the Segment Editor."
            ).format(name=node.GetName())
        self._changed()


@dataclass
class Growth:
    """By the later study's segment ID: the cells of growthColumns(), sentences, and what is to be known of them; and the earlier
    nodules without a successor."""

    cells: dict[str, list[str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    gone: list[Row] = field(default_factory=list)


def growth(before: Sequence[Row], after: Sequence[Row], days: int, astray: bool = False) -> Growth:
    """astray: in one of the studies, so that what has no partner need not be new."""
    from UNetSegmentationLib import nodule

    old, new = [[r for r in rows if r.measures and r.measures["voxels"]] for rows in (before, after)]
    alone = "-" if astray or any(r.unmeasured for r in before) else _("new")
    out = Growth({r.segment: ["-", "-", "-", alone] for r in new})
    for i, j in nodule.match([r.measures for r in old], [r.measures for r in new]):
        if i is not None and j is None:
            out.gone.append(old[i])
        elif i is not None and j is not None:
            found = nodule.follow_up(old[i].measures, new[j].measures, days or 1)  # the change itself needs no days
            time = "-" if found["doubling_days"] is None else f"{found['doubling_days']:.0f}" if days else _("days?")
            name = {"growth": _("growth"), "stable": _("stable"), "smaller": _("smaller")}.get(found["growth"], "-")
            out.cells[new[j].segment] = [old[i].name, f"{found['volume_change_percent']:+.0f}", time, name]
            out.texts[new[j].segment] = found["text"] if days else ""
            out.notes[new[j].segment] = found["note"].removeprefix(nodule.NOTE) + (old[i].note and _(" Earlier:") + old[i].note)
    return out


def growthColumns() -> list[str]:
    return [_("Earlier"), _("Volume change (%)"), _("Doubling time (days)"), _("Growth")]


# -------------------------------------------------------------------------------------------------------------- section


class NoduleSection(VTKObservationMixin):
    """The panel's section. keep(name, value) puts a choice into the scene's settings."""

    KEY = "Ctrl+Shift+K"  # no key of Slicer's

    def __init__(self, ui: Any, root: Any, keep: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.ui, self._keep = ui, keep
        self.models: list[Any] = []
        self._days = 0
        self._dated: int | None = None  # days by the studies' dates
        self._shown: tuple[list[str], list[list[str]], list[str]] = ([], [], [])
        self._growth = Growth()
        self._doubts = ""  # sentences on the two studies, which hold for all rows
        self._updating = False
        self._roi: Any = None  # that is being drawn
        self.tool = NoduleTool(self._updateTool, lambda node: keep("nodules", node))
        self.now = NoduleList(self._onMeasured, self.tool.measured, lambda: self.models)
        self.earlier = NoduleList(self._updateTable, {}, lambda: self.models)
        ui.clickButton.connect("clicked(bool)", self._onArm)
        ui.negativeButton.connect("toggled(bool)", self._onNegative)
        ui.nextNoduleButton.connect("clicked(bool)", lambda *_: self.tool.next())
        ui.clickBoxButton.connect("clicked(bool)", lambda *_: self._onBox())
        ui.undoClickButton.connect("clicked(bool)", lambda *_: self.tool.undo())
        ui.clickModelCombo.connect("currentIndexChanged(int)", self._onModel)
        ui.noduleTable.connect("itemSelectionChanged()", self._onRow)
        ui.noduleTable.connect("cellClicked(int,int)", lambda *_: self._onRow())
        ui.copyNodulesButton.connect("clicked(bool)", lambda *_: self._onCopy())
        ui.exportNodulesButton.connect("clicked(bool)", lambda *_: self._onExport())
        ui.daysSpinBox.connect("valueChanged(int)", lambda days: None if self._updating else keep("days", int(days)))
        # Seen wherever the mouse is, as long as the panel is shown.
        self._shortcut = qt.QShortcut(qt.QKeySequence(self.KEY), root)
        self._shortcut.setContext(qt.Qt.ApplicationShortcut)
        self._shortcut.connect("activated()", lambda: self._onArm(not self.tool.armed))

    def read(self) -> None:
        """Look again which models there are."""
        from .models import installedModels

        self.models = [m for m in installedModels("click") if m.card is not None]

    def show(self, settings: Any) -> None:
        """Let the section show the scene's settings."""
        from UNetSegmentationLib import mrml
        from UNetSegmentationLib.inference.click import MODEL

        from .models import cardHtml, cardTitle, resolve

        ui, self._updating = self.ui, True
        try:
            # What the effect and find_model() take too, so that all give the same mask.
            found, _missing = resolve([settings.clickModel, f"{MODEL}-"], self.models)
            model = next(iter((*found, *self.models)), None)
            combo = ui.clickModelCombo
            inputs.fill(combo, [(m.name, cardTitle(m.card)) for m in self.models], model and model.name)
            combo.toolTip = cardHtml(model) if model is not None else ""
            ui.clickModelLabel.visible = combo.visible = bool(self.models)
        finally:
            self._updating = False
        self.tool.use(settings.volume, settings.nodules, model, {"engine": settings.engine, "device": settings.device})
        self.now.use(settings.nodules, settings.volume and (scanOf(settings.nodules) or settings.volume))
        earlier = settings.earlier if settings.earlier is not settings.nodules else None
        self.earlier.use(earlier, mrml.find_scan(earlier, self.now.volume) if earlier is not None else None)
        self._dated = None
        if self.earlier.volume is not None and self.now.volume is not None:
            self._dated = mrml.days_between(self.earlier.volume, self.now.volume)
        self._updating = True
        self._days = settings.days or max(0, self._dated or 0)
        inputs.showValue(ui.daysSpinBox, self._days)
        self._updating = False
        self._updateTable()

    def leave(self) -> None:
        """Another module is opened."""
        self.tool.leave()
        self._endBox()

    def closeScene(self) -> None:
        self._endBox()
        self.tool.forgetScene()
        for each in (self.now, self.earlier):
            each.close()

    def close(self) -> None:
        self._endBox()
        for each in (self.tool, self.now, self.earlier):
            each.close()

    # ------------------------------------------------------------------------------------------------ what a person does

    def _onArm(self, on: bool) -> None:
        if on:
            self.tool.arm()
        else:
            self.tool.disarm()

    def _onNegative(self, on: bool) -> None:
        self.tool.negative = bool(on)
        self._updateTool()

    def _onModel(self, index: int) -> None:
        if not self._updating and index >= 0:
            self._keep("clickModel", self.ui.clickModelCombo.itemData(index))

    def _onBox(self) -> None:
        self._endBox()
        if not self.tool.armed:
            self.tool.arm()
        self._roi = inputs.startPlacing(inputs.ROI, _("Nodule box"))
        interaction = slicer.mrmlScene.GetNodeByID("vtkMRMLInteractionNodeSingleton")
        if interaction is not None:
            self.addObserver(interaction, interaction.InteractionModeChangedEvent, self._onMode)

    def _onMode(self, interaction: Any, event: Any) -> None:
        if interaction.GetCurrentInteractionMode() != interaction.Place:
            qt.QTimer.singleShot(0, self._drawn)  # the second corner is set after the mode

    def _drawn(self) -> None:
        roi = self._roi
        if roi is not None and roi.GetScene() is not None and not inputs.regionProblem(roi):
            self.tool.box(roi)
        self._endBox()

    def _endBox(self) -> None:
        """The prompt has the box now."""
        self.removeObservers()
        roi, self._roi = self._roi, None
        if roi is not None and roi.GetScene() is not None:
            qt.QTimer.singleShot(_SETTLE_MS, lambda: roi.GetScene() is not None and roi.GetScene().RemoveNode(roi))

    def _onRow(self) -> None:
        """Centre the views on the chosen nodule; the next click refines it."""
        from UNetSegmentationLib import mrml

        chosen = {item.row() for item in self.ui.noduleTable.selectedItems()}
        if self._updating or len(chosen) != 1 or not max(chosen) < len(self.now.rows):
            return
        row = self.now.rows[chosen.pop()]
        self.tool.select(row.segment)
        if row.measures and row.measures["voxels"] and not self.tool.busy:
            mrml.jump_slices(slicer.mrmlScene, row.measures["center"])

    def _onCopy(self) -> None:
        from UNetSegmentationLib import nodule

        from .results import rowsText

        columns, rows, remarks = self._whole()
        said = [f"{row.name}:{remark}" for row, remark in zip(self.now.rows, remarks) if remark]
        qt.QApplication.clipboard().setText(rowsText([columns, *rows, *([line] for line in said), [nodule.NOTE]], "\t"))
        slicer.util.showStatusMessage(_("The table is in the clipboard."), 3000)

    def _onExport(self) -> None:
        from UNetSegmentationLib import nodule

        from .results import saveText

        columns, rows, remarks = self._whole()
        if self.now.node is not None:
            text = nodule.csv_text(rows, columns, [nodule.NOTE + remark for remark in remarks])
            saveText(_("Save the nodules"), f"{self.now.node.GetName()}.csv", text)

    def _whole(self) -> tuple[list[str], list[list[str]], list[str]]:
        """The table's titles and rows, with a row for each vanished nodule, and what is to be known of each row: on paper nobody sees
        tooltips, nor what stands under the table."""
        columns, rows, _tips = self._shown
        said = {row.segment: note for row, note in self._caveats()}
        remarks = [
            said.get(row.segment, "") + "".join(f" {text}" for text in (self._growth.texts.get(row.segment), self._doubts) if text)
            for row in self.now.rows
        ]
        gone = [["-"] * (len(columns) - 4) + [row.name, "-", "-", _("not matched")] for row in self._growth.gone]
        return columns, rows + gone, remarks + [_(" Not matched in this study.")] * len(gone)

    # ------------------------------------------------------------------------------------------------- what is to be seen

    def _updateTool(self) -> None:
        ui, tool = self.ui, self.tool
        ready = tool.volume is not None and tool.model is not None
        ui.clickButton.enabled = ready
        ui.clickButton.checked = tool.armed
        ui.negativeButton.enabled = ui.clickBoxButton.enabled = ready
        ui.nextNoduleButton.enabled = ready and bool(tool.segment or tool.doubted) and not tool.busy
        ui.negativeButton.checked = tool.negative
        ui.undoClickButton.enabled = tool.canUndo
        text = tool.text
        if not text and tool.busy:
            text = _("Looking …")
        elif not text and not ready:
            text = _("Choose a volume.") if tool.volume is None else _("There is no model for clicks; import one.")
        elif not text and tool.armed:
            text = _("Click on the nodule in a slice view.")
            if tool.segment:
                name = tool.segmentation.GetSegmentation().GetSegment(tool.segment).GetName()
                text = _("{name}: click on what is missing, {key}+click on what is too much, or press Next nodule.")
                text = text.format(name=name, key="Cmd" if sys.platform == "darwin" else "Ctrl")
        if ui.clickMessage.text != (text := breakable(text)):
            ui.clickMessage.text = text
        ui.clickMessage.visible = bool(text)
        self._mark()

    def _mark(self) -> None:
        """Select the row of the nodule at hand, and say what a reader must know of it."""
        table, segment = self.ui.noduleTable, self.tool.segment
        at = next((i for i, row in enumerate(self.now.rows) if row.segment == segment), -1)
        if table.rowCount == len(self.now.rows) and {item.row() for item in table.selectedItems()} != ({at} if at >= 0 else set()):
            self._updating, before = True, self._updating
            if at < 0:
                table.clearSelection()
            else:
                table.selectRow(at)
            self._updating = before
        note = " ".join([_("By size only; not a diagnosis."), *(f"{row.name}:{n}" for row, n in self._caveats() if row.segment == segment)])
        if self.ui.noduleNote.text != note:
            self.ui.noduleNote.text = note

    def _caveats(self) -> list[tuple[Row, str]]:
        """What a reader must know of a nodule's figures, for each where there is something."""
        from UNetSegmentationLib.nodule import NOTE

        grown = {segment: note + (self.earlier.note and _(" Earlier:") + self.earlier.note) for segment, note in self._growth.notes.items()}
        notes = [
            (row, row.measures["note"].removeprefix(NOTE) + row.note + self.now.note + grown.get(row.segment, ""))
            if row.measures
            else (row, row.unmeasured and f" {row.unmeasured}")
            for row in self.now.rows
        ]
        return [(row, note) for row, note in notes if note]

    def _onMeasured(self) -> None:
        self._updateTable()
        self.tool.showDots()  # segments may have been removed, or clicked at in the Segment Editor

    def _updateTable(self) -> None:
        from UNetSegmentationLib import mrml, nodule

        ui, rows = self.ui, self.now.rows
        columns = [_("Nodule"), *map(self.now.title, nodule.COLUMNS)]
        texts = [[row.name, *(nodule.row(row.measures) if row.measures else ["-"] * len(nodule.COLUMNS))] for row in rows]
        now, earlier = self.now, self.earlier
        grown = growth(earlier.rows, rows, self._days, bool(now.astray or earlier.astray)) if earlier.ready and rows else Growth()
        self._growth, tips = grown, [row.unmeasured or grown.texts.get(row.segment, "") for row in rows]
        if self.earlier.node is not None and rows:
            columns += growthColumns()
            for text, row in zip(texts, rows):
                text += grown.cells.get(row.segment, ["-"] * 4)
        shown = bool(rows)
        ui.noduleTable.visible = ui.noduleTools.visible = ui.followUpWidget.visible = shown
        doubts = [now.astray, earlier.astray]
        if (self._dated or 0) < 0:
            doubts.append(_("The earlier study is of a later date; choose the two the other way round."))
        unmeasured = [r.name for r in earlier.rows if r.unmeasured]
        if unmeasured:
            doubts.append(_("Not measured in the earlier study: {names}.").format(names=", ".join(unmeasured)))
        self._doubts = " ".join(filter(None, doubts))
        gone = _("Not matched in this study: {names}.").format(names=", ".join(r.name for r in grown.gone)) if grown.gone else ""
        ui.goneLabel.text = breakable(now.text or " ".join(filter(None, (self._doubts, gone, earlier.text))))
        ui.goneLabel.visible = bool(rows and ui.goneLabel.text)
        if (columns, texts, tips) != self._shown:
            self._shown = columns, texts, tips
            self._fill(columns, texts, tips)
            node = self.now.node
            # What a scene was saved with stays as long as its scan is not there.
            if self.now.ready and node is not None and node.GetScene() is not None:
                held = node.GetSegmentation()
                clicked = any(mrml.segment_tag(held.GetNthSegment(i), mrml.PROMPTS_TAG) for i in range(_count(node)))
                if clicked or mrml.find_table(node, mrml.NODULES_ROLE) is not None:
                    mrml.write_rows(columns, texts, node)
        self._updateTool()

    def _fill(self, columns: Sequence[str], rows: Sequence[Sequence[str]], tips: Sequence[str]) -> None:
        table, self._updating, before = self.ui.noduleTable, True, self._updating
        # A docked panel is narrow: the unit stands under the name.
        inputs.prepareTable(table, [title.replace(" (", "\n(") for title in columns], len(rows))
        for j, title in enumerate(columns):
            table.horizontalHeaderItem(j).setToolTip(_headerTip(title))
        for i, row in enumerate(rows):
            for j, text in enumerate(row):
                item = qt.QTableWidgetItem(text)
                number = text != "-" and re.search(r"\(|HU", columns[j])
                item.setTextAlignment(
                    int(qt.Qt.AlignVCenter) | int(qt.Qt.AlignRight if number else qt.Qt.AlignLeft if j == 0 else qt.Qt.AlignHCenter)
                )
                item.setToolTip(plainTip(tips[i] or f"{columns[j]}: {text}"))
                table.setItem(i, j, item)
        table.resizeColumnsToContents()
        shown = min(len(rows), _SHOWN_ROWS) * table.verticalHeader().defaultSectionSize
        extra = table.horizontalHeader().sizeHint.height() + table.horizontalScrollBar().sizeHint.height() + 2 * table.frameWidth
        table.minimumHeight = table.maximumHeight = shown + extra
        self._updating = before


def _headerTip(title: str) -> str:
    """What is meant by a column; the guidelines are named in UNetSegmentationLib.nodule."""
    known = {
        "Side": _("By position against the body's midline."),
        "Mean (mm)": _(
            "Mean of the longest and the perpendicular diameter of the axial section, in thick slices of their own plane "
            "(Fleischner, Lung-RADS)."
        ),
        "Solid part (mm)": _("Mean diameter of the solid part of a part-solid nodule."),
        _("Growth"): _("Of a lung nodule: by 25 % or more of its volume (BTS 2015), or of its solid part by itself (Lung-RADS v2022)."),
        "Size class": _("Lung-RADS v2022 by size and texture only; not a diagnosis."),
    }
    return known.get(title.replace("(px)", "(mm)"), title)
