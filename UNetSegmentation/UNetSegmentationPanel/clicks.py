"""Clicks at one lesion: from points of the slice views to the worker and back. It writes nothing; who began it does.

>>> controller = clickController()
>>> controller.addListener(self)                         # onAnswer(answer), onError(text), onChanged(); all three must be there
>>> controller.begin(volumeNode, model.path, "any name of the lesion", owner=self)
>>> controller.warm()                                    # while the person aims: volume, model and a first run
>>> controller.addPoint((r, a, s)); controller.addPoint((r, a, s), positive=False)
>>> controller.setMask(mask, start); controller.addPoint(...)   # go on from what was corrected by hand
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qt
import vtk
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin
from UNetSegmentationLib import mrml
from UNetSegmentationLib.inference.click import DOUBTS, box_prompt
from UNetSegmentationLib.inference.predict import Options
from UNetSegmentationLib.model import ModelPackage, find_model

from .run import sentence, volumeKey

if TYPE_CHECKING:
    import numpy as np

Prompt = tuple[Any, ...]  # ("point", x, y, z, positive), ("box", x0, ..., z1) in LPS mm of the world, ("mask", array, start)


# Of two first clicks on the same lesion, both doubted. Of 22 pairs of doubted clicks on a chest's soft tissue that lay 20 to 60 mm apart
# all were believed as one lesion, of 27 to 387 ml.
_SAME_MM = 20.0


@dataclass(frozen=True)
class _Asked:
    number: int
    prompts: list[Prompt]
    warm: bool = False


class ClickController(VTKObservationMixin):
    """One lesion in one volume at a time, for all of the application. The event loop is never held.

    worker(): gives the PanelWorker; ensure(): whether what the network needs is installed, after asking where it is not.
    prompts: all that were given, in order; the mask of the same prompts is the same, here and in the core's ClickSession.
    A prompt that failed, or where nothing was found, is not among them any more: the segment stays as it was. A first click that
    the core doubts (DOUBTS) is asked again together with the next one, if that lies beside it and is doubted too. answered: those
    of the last answer.

    Only the owner of the lesion hears onAnswer(answer), a WorkerAnswer whose box lies on the volume's grid, and
    onError(text), one sentence, after which nothing has to be written. All listeners hear onChanged(): the prompts, `busy`
    or the lesion itself changed; whose lesion is no longer there finds another `owner`, or None.
    """

    def __init__(self, worker: Callable[[], Any], ensure: Callable[[], bool]) -> None:
        super().__init__()
        self._worker, self._ensure = worker, ensure
        self._listeners: list[Any] = []
        self._numbers = itertools.count(1)
        self._ready: Any = None  # the worker and its Python, for which what is needed is installed
        self._preparing = False  # it is being asked for
        self._doubted: tuple[str, str, Prompt] | None = None  # lesion, volume's ID, first click
        self._forget()

    def _forget(self) -> None:
        self.volumeNode: Any = None
        self.model: ModelPackage | Path | None = None
        self.options = Options()
        self.lesion = ""
        self.owner: Any = None
        self.prompts: list[Prompt] = []
        self.answered: list[Prompt] = []  # the prompts of the last answer
        self._asked: _Asked | None = None  # the last request, while its answer is awaited

    # ---------------------------------------------------------------------------------------------------------- outside

    def addListener(self, listener: Any) -> None:
        self._listeners.append(listener)

    def removeListener(self, listener: Any) -> None:
        """Its lesion ends."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        if self.owner is listener:
            self.end()

    @property
    def busy(self) -> bool:
        """An answer is on its way."""
        return self._asked is not None and not self._asked.warm

    @property
    def doubted(self) -> bool:
        """The lesion's first click was doubted; a second one beside it is believed."""
        return self._doubted is not None and self._doubted[0] == self.lesion

    def begin(
        self,
        volumeNode: Any,
        model: ModelPackage | Path | str,
        lesion: str,
        prompts: Sequence[Prompt] = (),
        owner: Any = None,
        options: Options | None = None,
    ) -> None:
        """A lesion, new or (with the prompts that its mask came from) to be gone on with. Ends the one before.

        model: a click package, its file or its name. options: engine and device. UserError for a name that is not known.
        """
        package = Path(find_model(model).path) if isinstance(model, str) else model
        self._drop()
        self.volumeNode, self.model, self.lesion, self.owner = volumeNode, package, lesion, owner
        self.options = options or Options()
        self.prompts, self.answered = list(prompts), list(prompts)
        scene = volumeNode.GetScene()
        self.addObserver(scene, scene.NodeAboutToBeRemovedEvent, self._onNodeAboutToBeRemoved)
        self.addObserver(scene, scene.StartCloseEvent, self._onSceneStartClose)
        self._tell()

    def end(self) -> None:
        """No lesion; answers that are still to come are dropped."""
        self._doubted = None
        if self.volumeNode is not None:
            self._drop()
            self._tell()

    def warm(self) -> None:
        """Send the volume, load the model and run it once, so that the first click is answered as fast as the next ones."""
        if self.volumeNode is not None and self._asked is None:
            self._ask(self.prompts, warm=True)

    def addPoint(self, ras: Sequence[float], positive: bool = True) -> None:
        """A click at a point of the world (RAS mm) on what is, or is not, part of the lesion."""
        r, a, s = (float(v) for v in ras)
        self._add(("point", -r, -a, s, bool(positive)))

    def addRoi(self, roiNode: Any) -> None:
        """A box about the lesion, of a markups ROI, which may be turned: the smallest one of voxels that holds it counts.
        UserError for one that has no size or lies outside."""
        self._add(box_prompt(mrml.image_from_volume(self.volumeNode), mrml.roi_box(roiNode, self.volumeNode)))

    def setMask(self, mask: np.ndarray, start: Sequence[int] = (0, 0, 0)) -> None:
        """The next prompt goes on from this mask: (z, y, x) of 0 and 1 whose first voxel is the volume's voxel `start`.

        It says more than what was clicked before: of that only stays what it does not contradict.
        """
        first = tuple(int(v) for v in start)
        self.prompts = [*mrml.agreeing(self.prompts, mask, first, self.volumeNode), ("mask", mask, first)]
        self._tell()

    def undo(self) -> bool:
        """Without the last prompt: a mask that was set before it is come back to. Whether the answer of those that are left
        follows (of none an empty one); it does not where they are what was answered last."""
        if not self.prompts:
            return False
        left = self.prompts = self.prompts[:-1]
        if _same(left, self.answered):
            self._cancel()
            self._tell()
            return False
        self._ask(left)
        return True

    def forgetDoubt(self) -> None:
        self._doubted = None
        self._tell()

    def cancel(self) -> None:
        """Prompts that are not answered yet are taken back, and nothing is heard of them; a worker that hangs is ended."""
        self._cancel(hanging=self.busy)
        self.prompts = list(self.answered)
        self._tell()

    # --------------------------------------------------------------------------------------------------------- machinery

    def _add(self, prompt: Prompt) -> None:
        if self.volumeNode is not None:
            self.prompts = [*self.prompts, prompt]
            self._ask(self.prompts)

    def _ask(self, prompts: Sequence[Prompt], warm: bool = False) -> None:
        self._asked = _Asked(next(self._numbers), list(prompts), warm)
        self._tell()
        if self._ready is not None and self._ready == self._runner():  # another one is there after PyTorch has come or gone
            self._send()
        elif not self._preparing:
            qt.QTimer.singleShot(0, self._prepare)

    def _runner(self) -> tuple[Any, str | None]:
        worker = self._worker()
        return worker, worker.python

    def _prepare(self) -> None:
        """Ask for what must be installed, which may let the event loop run for minutes, and go on."""
        if self._asked is None or self._preparing:
            return
        self._preparing = True
        try:
            self._ready, failure = None, _("Nothing was installed, so nothing can be found.")
            self._ready = self._runner() if self._ensure() else None
        except Exception as e:
            failure = sentence(e)
        finally:
            self._preparing = False
        if self._asked is not None and self._ready:
            self._send()
        elif self._asked is not None:
            self._fail(failure)

    def _send(self) -> None:
        asked, node, lesion = self._asked, self.volumeNode, self.lesion
        assert asked is not None
        try:
            key, own = volumeKey([node]), mrml.image_from_volume(node)
            image = mrml.as_read(own, node)

            def answered(answer: Any) -> None:
                measures = answer.measures and mrml.carried_measures(answer.measures, image, own)
                self._onAnswer(asked, key, replace(answer, measures=measures))

            self._worker().click(
                key[0],
                image,
                self.model,
                self.options,
                lesion,
                mrml.carried_prompts(asked.prompts, own, image),
                answered,
                lambda error: self._onError(asked, str(error)),
            )
        except Exception as e:
            self._fail(sentence(e))

    def _onAnswer(self, asked: _Asked, key: Any, answer: Any) -> None:
        if self._asked is None or asked.number > self._asked.number:
            return
        try:
            same = asked.warm or volumeKey([self.volumeNode]) == key  # nobody clicked, and the next click sends it anew
        except Exception:  # it has no voxels any more, or lies under a transform that the core refuses
            same = False
        if not same:
            text = _("'{name}' was changed meanwhile, so nothing was written; click again.")
            self._fail(text.format(name=self.volumeNode.GetName()))
            return
        if asked is self._asked:
            self._asked = None
        if not asked.warm and _same(asked.prompts, self.prompts[: len(asked.prompts)]):
            if asked.prompts and answer.box.empty:
                self._reject(asked.prompts, answer.text)
            else:
                self.answered, self._doubted = asked.prompts, None
                self._say("onAnswer", answer)
        self._tell()

    def _reject(self, prompts: list[Prompt], text: str) -> None:
        """What was found nothing at is taken back; what was given since stays."""
        newer = self.prompts[len(prompts) :]
        former, self._doubted = self._doubted, None
        self.prompts = [*self.answered, *newer]
        if text.startswith(DOUBTS) and len(prompts) == 1:
            this = (self.lesion, self.volumeNode.GetID(), prompts[0])
            if former is not None and former[:2] == this[:2] and math.dist(former[2][1:4], this[2][1:4]) <= _SAME_MM:
                self.prompts = [former[2], *prompts, *newer]
                self._ask(self.prompts)
                return
            self._doubted = this
        if newer:
            self._ask(self.prompts)
        # Further away on a large mass it would be doubted again, see _SAME_MM.
        self._say("onError", text.replace("a second time on it", "a second time at the same place"))

    def _onError(self, asked: _Asked, text: str) -> None:
        if self._asked is not None and asked.number <= self._asked.number:
            self._fail(text)

    def _fail(self, text: str) -> None:
        self._cancel()
        self.prompts = list(self.answered)
        self._say("onError", text)
        self._tell()

    def _cancel(self, hanging: bool = False) -> None:
        """Of what was asked nothing is wanted any more. hanging: nor is the worker, if it does not stop."""
        if self._asked is not None:
            self._asked = None
            if self._ready:
                worker = self._worker()
                (worker.giveUpClicks if hanging else worker.forgetClicks)(self.lesion)

    def _drop(self) -> None:
        if self.volumeNode is not None:
            self._cancel()
            self.removeObservers()
            self._forget()

    def _say(self, method: str, argument: Any) -> None:
        if self.owner is not None:
            getattr(self.owner, method)(argument)

    def _tell(self) -> None:
        for listener in list(self._listeners):
            listener.onChanged()

    def _onSceneStartClose(self, caller: Any, event: Any) -> None:
        self.end()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeAboutToBeRemoved(self, caller: Any, event: Any, node: Any) -> None:
        if node is not None and node is self.volumeNode:
            self.end()


def _same(some: Sequence[Prompt], others: Sequence[Prompt]) -> bool:
    """The very same prompts; masks are not compared by their voxels."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others))
