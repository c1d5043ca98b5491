"""The training set: a folder of corrected cases, to which the segmentation at hand is added.

What is written, and that nothing is ever half there, is UNetSegmentationLib.dataset's; it is written by a worker of its own,
so that neither the event loop nor a click waits for a slow disk or a network folder that is gone.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ctk
import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

from . import closeDataWorker, dataWorker, inputs
from .models import breakable, plainTip
from .nodules import Pieces
from .run import volumeKey

FOLDER_KEY, NAME_KEY, NAMED_KEY = (f"UNetSegmentation/{name}" for name in ("TrainingSet", "Annotator", "AnnotatorNamed"))
# Of a segment: its name and the label that it was added as, with a tab between them. Of a volume: its case.
LABEL_TAG, CASE_ATTRIBUTE = "UNetSegmentation.Label", "UNetSegmentation.Case"
ANSWER_S = 20.0  # for a folder's index; a network folder that is gone may never answer
IDLE_MS = 120_000  # after which the worker that writes is ended
SHOWN_CASES = 200
_SHOWN_ROWS = 6  # of a table without scrolling
_SETTLE_MS = 200
_UNNAMED = re.compile(r"Segment_\d+")  # what Slicer calls a new segment


@dataclass
class Row:
    """A segment, whether it is added, and as which label."""

    segment: str
    name: str
    label: str
    codes: dict[str, list[str]]
    color: tuple[int, int, int]
    model: str = ""  # that made it
    kept: tuple[str, int] | None = None  # where the model's own mask is kept: key, value
    included: bool = True


@dataclass
class _Adding:
    """A case on its way: what was chosen when it began."""

    folder: str
    volumes: tuple[Any, ...]
    node: Any
    rows: list[Row]
    channels: tuple[str, ...]
    known: tuple[Any, ...]  # labels of the set, or those that a new one gets
    new: bool
    patient: str | None
    modality: str
    by: str
    dated: bool
    own_file: str
    model: str
    onDone: Callable[[str | None, str], Any]
    allow: list[str] = field(default_factory=list)
    key: Any = None
    job: Any = None
    entering: bool = False  # what is written is being put into the index


class TrainingSetSection(VTKObservationMixin):
    """The panel's section. panel: the UNetSegmentationWidget.

    folder: "" before one was chosen. summary: what the folder was last found to hold, see Dataset.summary(); None as long as
    it was not read or holds no training set yet. Listeners are called when either has changed.
    """

    def __init__(self, panel: Any) -> None:
        super().__init__()
        self.panel = panel
        self.root = slicer.util.loadUI(panel.resourcePath("UI/TrainingSet.ui"))
        panel.addSection(self.root)
        self.ui = ui = slicer.util.childWidgetVariables(self.root)
        ui.setSegmentationSelector.setMRMLScene(slicer.mrmlScene)
        inputs.letShrink(ui.setSegmentationSelector)
        settings = qt.QSettings()
        self.folder = str(settings.value(FOLDER_KEY, "") or "")
        self.summary: dict[str, Any] | None = None
        self.rows: list[Row] = []
        self._listeners: list[Callable[[], None]] = []
        self._said, self._failed = "", ""  # how the last case ended; why the folder cannot be read
        self._reading: Any = None
        self._adding: _Adding | None = None
        self._picked: tuple[Any, Any] | None = None  # volume and the segmentation that a person chose for it
        self._choices: dict[tuple[str, str], tuple[bool, str, str]] = {}  # and the segment's name then
        self._patients: dict[str, str] = {}  # by volume, what was typed
        self._cards: list[Any] | None = None
        self._observed: Any = None
        # Of what is observed, apart: removeObserver() keeps each node, and with it its voxels, removeObservers() does not.
        self._edits = VTKObservationMixin()
        self._volume: Any = None
        self._updating = self._closed = self._changing = False
        self._pieces = Pieces(self._onFailed)
        self._settle, self._idle, self._late = qt.QTimer(), qt.QTimer(), qt.QTimer()
        for timer, ms, method in (
            (self._settle, _SETTLE_MS, self.update),
            (self._idle, IDLE_MS, self._closeWorker),
            (self._late, round(1000 * ANSWER_S), self._onLate),
        ):
            timer.setSingleShot(True)
            timer.setInterval(ms)
            timer.connect("timeout()", method)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.NodeAddedEvent, self._onNodeAdded)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.NodeAboutToBeRemovedEvent, self._onNodeAboutToBeRemoved)
        ui.setNameEdit.text = str(settings.value(NAME_KEY, "") or "")
        ui.setNamedCheckBox.checked = str(settings.value(NAMED_KEY, "")) == "1"
        self.root.connect("contentsCollapsed(bool)", lambda collapsed: None if collapsed else self._onExpanded())
        ui.setFolderButton.connect("clicked(bool)", lambda *_: self._onChoose())
        ui.setSegmentationSelector.connect("currentNodeChanged(vtkMRMLNode*)", self._onNode)
        ui.setSegmentsTable.connect("itemChanged(QTableWidgetItem*)", self._onItem)
        ui.setPatientEdit.connect("textEdited(QString)", self._onPatient)
        ui.setNamedCheckBox.connect("toggled(bool)", lambda *_: self._onNamed())
        ui.setNameEdit.connect("editingFinished()", self._onNamed)
        ui.setAddButton.connect("clicked(bool)", lambda *_: self._onAdd())
        ui.setCasesTable.connect("itemSelectionChanged()", self._showTools)
        ui.setVersionsButton.connect("clicked(bool)", lambda *_: self._onVersions())
        ui.setRemoveButton.connect("clicked(bool)", lambda *_: self._onRemove())
        ui.setRestoreButton.connect("clicked(bool)", lambda *_: self._onRestore())
        self._show()

    # ---------------------------------------------------------------------------------------------------------- outside

    def addListener(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    @property
    def busy(self) -> bool:
        """A case is being added."""
        return self._adding is not None

    @property
    def annotator(self) -> str:
        """The name that a person wants to be noted; "" for none."""
        return str(self.ui.setNameEdit.text).strip() if self.ui.setNamedCheckBox.checked else ""

    def setFolder(self, folder: str) -> None:
        """Use this folder, now and in later sessions; it becomes a training set with the first case."""
        self.folder, self.summary, self._said, self._failed, self._changing = folder, None, "", "", False
        qt.QSettings().setValue(FOLDER_KEY, folder)
        self._tell()
        self.refresh()

    def refresh(self) -> None:
        """Look again what the folder holds, which others may write to."""
        if self.folder and not self.busy and self.panel._warm and not self._changing:  # what changes it shows it too
            self._ask("show")

    def addCurrent(
        self,
        onDone: Callable[[str | None, str], Any] = lambda case, text: None,
        *,
        patient: str | None = None,
        model_mask: Path | None = None,
        model: str = "",
        modality: str = "",
    ) -> None:
        """Add the chosen volume with its corrected segmentation, after asking where it looks wrong. Returns at once.

        onDone(case, text) is called once, later: the case's name, or None, and a sentence on what was changed or why nothing
        was added. patient: the identity (PatientID), of which only a hash is kept, unless the person typed another or the case has
        one; default: what the subject hierarchy says, as for modality. model_mask: the model's own mask, where the scene does not
        know it, and which `model` made it.
        """
        problem = _("A case is still being added; wait for it.") if self.busy else ""
        if not problem:
            self._readRows()
            problem = self.problem()
        if problem:
            self.root.collapsed = False
            if not self.busy:
                self._say("")  # the hint says it, as long as it holds
            if problem == self._failed:
                self.refresh()  # its drive may be there again
            qt.QTimer.singleShot(0, lambda: onDone(None, problem))
            return
        from UNetSegmentationLib import mrml

        volumes, ui = self._volumes(), self.ui
        identity, told = mrml.dicom_of(volumes[0])
        typed = self._patients.get(self.panel._parameters.volume.GetID(), "").strip()  # which may be another channel than the first
        rows = [replace(row) for row in self.rows if row.included]
        self._adding = _Adding(
            folder=self.folder,
            volumes=volumes,
            node=self.segmentation(),
            rows=rows,
            channels=self._channels(),
            known=tuple(self._known()),
            new=self.summary is None,
            patient=typed or patient or identity or _sequence(volumes[0]) or None,
            allow=["patient"] if typed else [],
            modality=modality or told,
            by=self.annotator,
            dated=bool(ui.setNamedCheckBox.checked),
            own_file="" if model_mask is None else str(model_mask),
            model=model or "+".join(dict.fromkeys(row.model for row in rows if row.model)),
            onDone=onDone,
        )
        self._send()

    def cancel(self) -> None:
        """Stop adding; the training set stays as it was."""
        adding = self._adding
        if adding is None:
            return
        if adding.job is not None:
            dataWorker().cancel(adding.job)
        else:
            self._pieces.clear()
            self._end(adding, None, _("Cancelled; nothing was added."))

    def problem(self) -> str:
        """Why nothing can be added, as one sentence; "" where it can."""
        volumes, node, p = self._volumes(), self.segmentation(), self.panel._parameters
        if not self.panel._warm:
            return _("The panel is being made ready.")
        if not self.folder:
            return _("Choose a folder for the training set.")
        if self._failed:
            return self._failed
        if self.summary is None and self._reading is not None:
            return _("The training set is being read; try again in a moment.")
        if p is None or p.volume is None:
            return _("Choose a volume.")
        if node is None:
            return _("Choose the corrected segmentation.")
        names = self._channels()
        if len(volumes) < len(names) or None in volumes:
            text = _("The training set has the channels {names}; choose a model with these above, and a volume for each.")
            return text.format(names=", ".join(names))
        if text := inputs.chosenTwice(names, volumes):
            return text
        if self.summary is None and not any(row.included for row in self.rows):
            return _("The first case needs a segment, which says what the training set is about.")
        for row in self.rows:
            if row.included and not row.label.strip():
                return _("Say which label '{name}' is, or leave it out.").format(name=row.name)
        return ""

    # ------------------------------------------------------------------------------------------------------- life cycle

    def read(self) -> None:
        """The panel is warm, or the models may have changed."""
        self._cards = None
        if not self.root.collapsed:
            self._onExpanded()

    def enter(self) -> None:
        self.read()

    def leave(self) -> None:
        self._settle.stop()

    def closeScene(self) -> None:
        """What was not read yet is gone; what the worker has goes on."""
        if self._adding is not None and self._adding.job is None:
            self._pieces.clear()
            self._end(self._adding, None, _("The scene was closed, so nothing was added."))
        self._observe(None)
        self.rows, self._picked, self._volume = [], None, None
        self._choices.clear()
        self._patients.clear()

    def close(self) -> None:
        self._closed = True
        self.cancel()
        self._pieces.clear()
        self.removeObservers()
        self._observe(None)
        for timer in (self._settle, self._idle, self._late):
            timer.stop()
        self._listeners = []

    def update(self) -> None:
        """Show what is chosen now."""
        if self._closed or self.root.collapsed or not self.panel._warm:
            return
        self._readRows()
        self._show()

    def _onExpanded(self) -> None:
        self.update()
        self.refresh()

    def _closeWorker(self) -> None:
        """A process that nobody needs keeps no memory."""
        if self.busy or dataWorker().state == "busy":
            self._idle.start()
        else:
            closeDataWorker()

    # ------------------------------------------------------------------------------------------------- what is to be added

    def _volumes(self) -> tuple[Any, ...]:
        """Those of the set's channels, None where none is: by the names of the rows that they are chosen in, unless a name is there
        twice or none is the set's."""
        from UNetSegmentationLib.dataset import plain_name

        p = self.panel._parameters
        if p is None:
            return ()
        given, names = (p.volume, *self.panel.channelRows.nodes), list(map(plain_name, self._channels()))
        listed, case = self.panel.modelList, self.panel.workList.case
        ours = case is not None and given == tuple(case.volumes)
        # A work list's files are in the order of the model that segmented them, or else of the set, whatever model is chosen now.
        models = [m for m in listed.models if m.card and m.name in case.model.split("+")] if ours else listed.selected
        if models:
            rows = list(map(plain_name, models[0].card.data["channels"]))
            alike = {*names} <= {*rows} or not (ours and len(rows) == len(names) or {*names}.isdisjoint(rows))
            if len({*rows}) == len(rows) and len({*names}) == len(names) and alike:
                by = dict(zip(rows, given))
                return tuple(by.get(name) for name in names)
        return given[: max(1, len(names))]

    def segmentation(self) -> Any:
        """The one that a person chose for the volume, or the work list's, or the one that was worked on: in the Segment Editor, by a run
        or clicks."""
        p = self.panel._parameters
        volume = p.volume if p is not None else None
        if volume is None or volume.GetScene() is None:
            return None
        if self._picked is not None and self._picked[0] is volume:
            node = self._picked[1]
            if node is None or node.GetScene() is volume.GetScene():
                return node
        scene = volume.GetScene()
        editor, case = scene.GetSingletonNode("SegmentEditor", "vtkMRMLSegmentEditorNode"), self.panel.workList.case
        everywhere = list(slicer.util.getNodesByClass("vtkMRMLSegmentationNode", scene))[::-1]
        # The editor may show another of the scan at hand, such as one that only measured something.
        ours = case.segmentation if case is not None and volume is case.volumes[0] else None
        first = [ours, editor.GetSegmentationNode() if editor is not None else None, p.output, p.nodules]
        return next((node for node in (*first, *everywhere) if node is not None and inputs.referenceVolume(node) is volume), None)

    def _known(self) -> list[Any]:
        """The labels of the training set; before there is one, those of the models that made the segments."""
        from UNetSegmentationLib.model import Label

        if self.summary is not None:
            return list(map(Label.from_json, self.summary["labels"]))
        return [label for card in self._itsCards() for label in card.labels]

    def _itsCards(self) -> list[Any]:
        """The cards of the models that made the segments at hand."""
        from UNetSegmentationLib import mrml

        from .models import installedModels, resolve

        node = self.segmentation()
        held = node.GetSegmentation() if node is not None else None
        names = []
        for i in range(held.GetNumberOfSegments() if held is not None else 0):
            keys = (mrml.MODEL_TAG, mrml.KEPT_MODEL_TAG, mrml.CLICK_MODEL_TAG)
            tags = (mrml.segment_tag(held.GetNthSegment(i), key) for key in keys)
            names += [tag.split("+")[0] for tag in tags if tag]
        if not names:
            return []
        if self._cards is None:
            self._cards = [m for task in ("automatic", "click") for m in installedModels(task) if m.card is not None]
        return [model.card for model in resolve(list(dict.fromkeys(names)), self._cards)[0]]

    def _channels(self) -> tuple[str, ...]:
        if self.summary is not None:
            return tuple(self.summary["channels"])
        p = self.panel._parameters
        if not self.panel._warm or p is None or p.volume is None:
            return ("image",)
        cards = self._itsCards()
        if cards:
            return tuple(cards[0].data["channels"])
        from UNetSegmentationLib import mrml

        return (mrml.dicom_of(p.volume)[1] or "image",)

    def _readRows(self) -> None:
        """The segments as they are now, with the labels that they are or were said to be."""
        from UNetSegmentationLib import mrml
        from UNetSegmentationLib.dataset import match_label, read_terminology

        node = self.segmentation()
        self._observe(node)
        held = node.GetSegmentation() if node is not None else None
        known = self._known() if held is not None else []
        clicked = {card.labels[0].name for card in self._itsCards() if card.data["task"] == "click"} if held is not None else set()
        entry = slicer.vtkSegment.GetTerminologyEntryTagName()
        self.rows = []
        for i in range(held.GetNumberOfSegments() if held is not None else 0):
            segment, part = held.GetNthSegmentID(i), held.GetNthSegment(i)
            codes = read_terminology(mrml.segment_tag(part, entry))
            model, click = mrml.segment_tag(part, mrml.MODEL_TAG), mrml.segment_tag(part, mrml.CLICK_MODEL_TAG)
            model = model or mrml.segment_tag(part, mrml.KEPT_MODEL_TAG)
            kept = re.fullmatch(r"([0-9a-f]{32}):(\d+)", mrml.segment_tag(part, mrml.KEPT_TAG)) if model else None
            digest = mrml.segment_tag(part, mrml.DIGEST_TAG)
            match = match_label(part.GetName(), codes, known)
            label = match.name if match is not None else part.GetName()
            if match is None and click and len(clicked) == 1:
                label = next(iter(clicked))
            elif match is None and _UNNAMED.fullmatch(part.GetName()):
                label = known[0].name if len(known) == 1 else ""
            of, _tab, said = mrml.segment_tag(part, LABEL_TAG).rpartition("\t")
            label = said if said and of in ("", part.GetName()) else label  # renamed since, it is something else
            included, said, of = self._choices.get((node.GetID(), segment), (True, "", ""))
            label = said if of == part.GetName() else label
            color = tuple(round(255 * c) for c in part.GetColor())
            where = (kept[1], int(kept[2])) if kept else (digest, 1) if click and digest else None
            self.rows.append(Row(segment, part.GetName(), label, codes, color, model or click, where, included))

    def _observe(self, node: Any) -> None:
        if node is self._observed:
            return
        self._edits.removeObservers()
        kinds = slicer.vtkSegmentation
        for event in (kinds.SegmentAdded, kinds.SegmentRemoved, kinds.SegmentModified) if node is not None else ():
            self._edits.addObserver(node, event, self._onSegments)
        self._observed = node

    def _onSegments(self, caller: Any, event: Any) -> None:
        self._settle.start()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeAdded(self, caller: Any, event: Any, node: Any) -> None:
        if node is not None and node.IsA("vtkMRMLSegmentationNode"):
            self._settle.start()

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def _onNodeAboutToBeRemoved(self, caller: Any, event: Any, node: Any) -> None:
        selector = self.ui.setSegmentationSelector
        if node is not None:  # a scene that is added later may give its ID to another patient's
            self._patients.pop(node.GetID(), None)
            self._choices = {key: value for key, value in self._choices.items() if key[0] != node.GetID()}
        if node is not None and node is self._volume:
            self._volume, self.ui.setPatientEdit.text = None, ""
            self._said = self._said if self.busy else ""
        if node is not None and node in (self._picked or ()):
            self._picked = None
        if node is not None and node is selector.currentNode():
            # Before the selector, which hears it later, goes on to another by itself: that may be another scan's.
            before, self._updating = self._updating, True
            selector.setCurrentNode(None)
            self._updating = before
            self._settle.start()

    # ------------------------------------------------------------------------------------------------------ adding a case

    def _send(self) -> None:
        assert self._adding is not None
        self._idle.stop()
        self._adding.job = None
        self._say(_("Reading the segments"))
        self._pieces.add(self._steps(self._adding))

    def _steps(self, adding: _Adding) -> Generator[Any, None, None]:
        """The mask of the segments, in pieces, and off to the worker."""
        from UNetSegmentationLib import UserError, mrml
        from UNetSegmentationLib.dataset import BEYOND
        from UNetSegmentationLib.model import Label, label_key
        from UNetSegmentationLib.worker.protocol import Case

        adding.key = volumeKey(adding.volumes)
        image = yield from mrml.image_steps(adding.volumes)
        names = list(dict.fromkeys(label_key(row.label) for row in adding.rows))
        if len(names) > 255:
            raise UserError(_("A case holds at most 255 labels; leave some segments out."))
        values = [(row.segment, names.index(label_key(row.label)) + 1) for row in adding.rows]
        whole, low = yield from mrml.merged_steps(adding.node, values, adding.volumes[0])
        far = yield from mrml.beyond_steps(adding.node, dict(values), adding.volumes[0])
        if far > BEYOND:
            text = _("'{name}' reaches {n:.1f} voxels beyond the volume; choose the segmentation of this volume, or crop it to the volume.")
            raise UserError(text.format(name=adding.node.GetName(), n=far))
        yield from self._uncovered(adding, values, whole)
        labels, own = [], {}
        for value, name in enumerate(names, 1):
            row = next(row for row in adding.rows if label_key(row.label) == name)
            same = next((d for d in adding.known if d.key == name), None)
            labels.append(replace(same, value=value) if same is not None else Label(value, row.label.strip(), row.color, row.codes))
        for row in adding.rows:
            if row.kept is not None:
                own.setdefault(row.kept[0], {})[row.kept[1]] = names.index(label_key(row.label)) + 1
        case = Case(
            folder=adding.folder,
            labels=tuple(labels),
            create=(Path(adding.folder).name or "dataset", adding.channels) if adding.new else None,
            offered=adding.known if adding.new else (),
            own=() if adding.own_file else tuple((key, tuple(sorted(values.items()))) for key, values in own.items()),
            own_file=adding.own_file,
            patient=adding.patient,
            modality=adding.modality,
            model=adding.model,
            by=adding.by,
            dated=adding.dated,
            allow=tuple(adding.allow),
        )
        adding.job = dataWorker().addCase(
            adding.key,
            image,
            whole,
            low,
            case,
            onProgress=self._onProgress,
            onResult=lambda data: self._onAdded(adding, data),
            onError=lambda error: self._onError(adding, error),
            onCancelled=lambda: self._onCancelled(adding),
        )

    def _uncovered(self, adding: _Adding, values: Sequence[tuple[str, int]], whole: Any) -> Generator[Any, None, None]:
        """UserError where most of a label would be lost, as another that comes later in the segmentation lies over it."""
        from UNetSegmentationLib import UserError, mrml
        from UNetSegmentationLib.dataset import covered_steps

        names = {value: row.name for row, (_segment, value) in zip(adding.rows, values)}
        if len(names) < 2:
            return
        below, _low = yield from mrml.merged_steps(adding.node, values[::-1], adding.volumes[0])
        found = yield from covered_steps(below, whole)
        if found is not None:
            name, cover = (names[value] for value in found)
            text = _("'{cover}' covers most of '{name}', which would be lost; move '{name}' below it in the list, or leave one out.")
            raise UserError(text.format(cover=cover, name=name))

    def _onProgress(self, fraction: float, text: str) -> None:
        if self._adding is not None:
            self._adding.entering = text == "adding it to the index"
            known = {
                "sending the volume": _("Sending the volume"),
                "starting the worker": _("Starting the worker"),
                "checking the case": _("Checking the case"),
                "writing the image": _("Writing the image"),
                "writing the mask": _("Writing the segmentation"),
                "adding it to the index": _("Adding it to the training set"),
            }
            percent = round(100 * fraction)
            if self.ui.setProgressBar.value != percent:
                self.ui.setProgressBar.value = percent
            self._say(known.get(text, text))

    def _onAdded(self, adding: _Adding, data: dict[str, Any]) -> None:
        if adding.folder == self.folder:
            self.summary, self._failed = data["summary"], ""  # a look before that was given up may have failed
        for node in adding.volumes:  # whichever of them another model has as its first
            if node is not None and node.GetScene() is not None:
                # With the node, as Slicer gives what it crops, filters or clones of it the same attributes.
                node.SetAttribute(CASE_ATTRIBUTE, f"{data['case']} {node.GetID()}")
        held = adding.node.GetSegmentation() if adding.node is not None and adding.node.GetScene() is not None else None
        for row in adding.rows:
            part = held.GetSegment(row.segment) if held is not None else None
            if part is not None:
                part.SetTag(LABEL_TAG, f"{row.name}\t{row.label.strip()}")
        what = _("Added as {case}.") if data["version"] == 1 else _("{case} was updated; this is its version {version}.")
        self._end(adding, data["case"], what.format(case=data["case"], version=data["version"]) + "\n" + changesText(data["record"]))

    def _onError(self, adding: _Adding, error: Any) -> None:
        if error.objection and error.objection not in adding.allow:
            # Not within the worker's callback: a question lets the event loop run.
            qt.QTimer.singleShot(0, lambda: self._object(adding, error))
        elif error.kind == "user":
            self._end(adding, None, str(error))
        else:  # it may have died a moment after the case was in the index
            self._end(
                adding,
                None,
                _("{error} The training set holds whole cases only: add it again, it is never there twice.").format(error=error),
            )

    def _onCancelled(self, adding: _Adding) -> None:
        text = _("Cancelled; nothing was added.")
        if adding.entering:  # the worker was killed just then
            text = _("Cancelled while it was put into the training set: look there whether it was added; it is never there twice.")
        self._end(adding, None, text)

    def _object(self, adding: _Adding, error: Any) -> None:
        if self._closed or self._adding is not adding:
            return
        if error.objection == "patient":  # the code that was typed in another session stays, and the ID of the same scan's other copy
            adding.patient = None
            self._send()
            return
        question = _("Add the label to the training set?") if error.objection == "label" else _("Add it anyway?")
        if slicer.util.confirmOkCancelDisplay(f"{error}\n\n{question}", windowTitle=_("Training set"), textFormat=qt.Qt.PlainText):
            if self._adding is adding:
                adding.allow.append(error.objection)
                self._send()
        elif self._adding is adding:
            self._end(adding, None, str(error))

    def _onFailed(self, text: str) -> None:
        """The segments could not be read."""
        if self._adding is not None:
            self._end(self._adding, None, text)

    def _end(self, adding: _Adding, case: str | None, text: str) -> None:
        if self._adding is not adding:
            return
        self._adding = None
        if adding.key is not None:
            dataWorker().forgetVolume(adding.key)
        self._idle.start()
        if not self._closed:
            self._said = text
            self._tell()
            if case is None:
                self.refresh()  # another may have added meanwhile, or the folder be gone
        try:
            adding.onDone(case, text)
        except Exception:
            logging.exception("A listener of the training set failed.")

    # ------------------------------------------------------------------------------------------------------ the folder

    def _ask(self, action: str, case: str = "", version: int | None = None, said: str = "") -> None:
        """Let the worker look into the folder, or change it."""
        if self._reading is not None:
            dataWorker().cancel(self._reading)
        folder, self._changing = self.folder, action != "show"
        self._idle.stop()
        self._late.stop()

        def done(text: str = "", summary: Any = None) -> None:
            if self._reading is not job:
                return
            self._reading, self._changing = None, False
            self._late.stop()
            self._idle.start()
            if self._closed or folder != self.folder:
                return
            if not text:
                self.summary = summary
            if action == "show":
                self._failed = text
            else:
                self._said = text or said
            self._tell()

        self._reading = job = dataWorker().dataset(
            folder,
            action,
            onResult=lambda data: done(summary=data.get("summary")),
            onError=lambda error: done(str(error)),
            onCancelled=lambda: done(silent(folder)),
            case=case,
            version=version,
            onSent=lambda: self._late.start() if self._reading is job else None,  # the worker's own start may take longer
        )
        self._show()

    def _onLate(self) -> None:
        if self._reading is not None:
            dataWorker().cancel(self._reading)

    def _tell(self) -> None:
        self.update()
        if not self._closed and (self.root.collapsed or not self.panel._warm):
            self._show()
        for listener in list(self._listeners):
            try:
                listener()
            except Exception:
                logging.exception("A listener of the training set failed.")

    def _say(self, text: str) -> None:
        self._said = text
        self._show()

    # ------------------------------------------------------------------------------------------------ what a person does

    def _onChoose(self) -> None:
        title = _("Choose a training set, or an empty folder for a new one")
        folder = qt.QFileDialog.getExistingDirectory(slicer.util.mainWindow(), title, self.folder)
        if folder:
            self.setFolder(str(folder))

    def _onNode(self, node: Any) -> None:
        if not self._updating and self.panel._parameters is not None:
            self._picked = self.panel._parameters.volume, node
            self._said = ""
            self.update()

    def _onItem(self, item: Any) -> None:
        """A segment's box was ticked."""
        if not self._updating and item.column() == 0:
            self._choose(item.row(), included=item.checkState() == qt.Qt.Checked)

    def _onLabel(self, index: int, text: str) -> None:
        if not self._updating:
            self._choose(index, label=str(text))

    def _choose(self, index: int, **changed: Any) -> None:
        node = self.segmentation()
        if node is not None and index < len(self.rows):
            self.rows[index] = row = replace(self.rows[index], **changed)
            self._choices[node.GetID(), row.segment] = row.included, row.label, row.name
            self._said = ""
            self._show()

    def _onPatient(self, text: str) -> None:
        if self._volume is not None:
            self._patients[self._volume.GetID()] = str(text)

    def _onNamed(self) -> None:
        settings = qt.QSettings()
        settings.setValue(NAME_KEY, self.ui.setNameEdit.text.strip())
        settings.setValue(NAMED_KEY, "1" if self.ui.setNamedCheckBox.checked else "")
        self._show()

    def _onAdd(self) -> None:
        if self.busy:
            self.cancel()
        else:
            p = self.panel._parameters
            self.addCurrent(**self.panel.workList.known(p.volume if p is not None else None))

    def _onVersions(self) -> None:
        case = self._case()
        if case is None:
            return
        current = case["versions"][-1]["version"]
        choices = [(versionText(v), v["version"]) for v in reversed(case["versions"]) if v["version"] != current]
        version = _menu(choices)
        if version is not None:
            said = _("{case}: version {version} is the current one again.").format(case=case["name"], version=version)
            self._ask("restore", case["name"], version, said)

    def _onRemove(self) -> None:
        case = self._case()
        if case is not None:
            said = _("{case} is no longer in the training set; Bring back undoes that.").format(case=case["name"])
            self._ask("remove", case["name"], said=said)

    def _onRestore(self) -> None:
        removed = (self.summary or {}).get("removed", [])
        name = _menu([(case["name"], case["name"]) for case in reversed(removed)])
        if name is not None:
            self._ask("restore", name, said=_("{case} is in the training set again.").format(case=name))

    def _case(self) -> dict[str, Any] | None:
        """The case that is chosen in the table."""
        rows = {item.row() for item in self.ui.setCasesTable.selectedItems()}
        shown = self._shownCases()
        return shown[rows.pop()] if len(rows) == 1 and max(rows) < len(shown) else None

    def _shownCases(self) -> list[dict[str, Any]]:
        return list(reversed((self.summary or {}).get("cases", [])))[:SHOWN_CASES]

    # ------------------------------------------------------------------------------------------------- what is to be seen

    def _show(self) -> None:
        if self._closed:
            return
        ui, p, self._updating = self.ui, self.panel._parameters, True
        try:
            self._showFolder()
            volume = p.volume if p is not None else None
            if volume is not self._volume:
                self._volume = volume
                ui.setPatientEdit.text = self._patients.get(volume.GetID(), "") if volume is not None else ""
                self._said = "" if not self.busy else self._said
            if self.panel._warm:
                self._showSegments(volume)
            ui.setNameEdit.enabled = named = bool(ui.setNamedCheckBox.checked)
            text = _("Of the scan only voxels, geometry and modality are written, no other DICOM tag; of the patient a salted hash.")
            ui.setPrivacyLabel.text = text + (" " + _("Your name and today's date go with it.") if named else "")
            problem = "" if self.busy else self.problem()
            ui.setAddButton.enabled = not problem
            ui.setAddButton.text = _("Cancel") if self.busy else _("Add to training set")
            ui.setProgressBar.visible = self.busy
            if not self.busy:
                ui.setProgressBar.value = 0
            hint = problem if problem not in (self._failed, _("Choose a folder for the training set.")) else ""
            text = f"{self._said} …" if self.busy else "\n".join(dict.fromkeys(t for t in (self._said, hint) if t))
            ui.setMessage.text, ui.setMessage.visible = breakable(text), bool(text)
            self._showCases()
        finally:
            self._updating = False

    def _showFolder(self) -> None:
        ui, summary = self.ui, self.summary
        ui.setFolderLabel.text = Path(self.folder).name or self.folder if self.folder else _("none chosen")
        ui.setFolderLabel.toolTip = plainTip(self.folder)
        ui.setFolderButton.enabled = not self.busy
        if not self.folder:
            text = _("Choose a training set, or an empty folder that becomes one with the first case.")
        elif self._failed:
            text = self._failed
        elif summary is None:
            text = _("Reading …") if self._reading is not None else _("Empty; the first case makes it a training set.")
        else:
            text = countText(summary) + " " + _("Labels: {names}.").format(names=", ".join(d["name"] for d in summary["labels"]))
            case = self._currentCase()
            if case is not None:
                text += "\n" + _("This scan is {case}, version {n}.").format(case=case["name"], n=case["versions"][-1]["version"])
        ui.setStatusLabel.text = breakable(text)

    def _currentCase(self) -> dict[str, Any] | None:
        """The case that the chosen volume was added as."""
        p = self.panel._parameters
        volume = p.volume if p is not None else None
        said, of = (volume.GetAttribute(CASE_ATTRIBUTE), volume.GetID()) if volume is not None else (None, None)
        return next((case for case in (self.summary or {}).get("cases", []) if f"{case['name']} {of}" == said), None)

    def _showSegments(self, volume: Any) -> None:
        from UNetSegmentationLib import mrml

        ui, node = self.ui, self.segmentation()
        if ui.setSegmentationSelector.currentNode() is not node:
            ui.setSegmentationSelector.setCurrentNode(node)
        known = volume is not None and bool(self.panel.workList.known(volume).get("patient") or mrml.dicom_of(volume)[0])
        ui.setPatientEdit.placeholderText = _("from DICOM, kept as a hash") if known else _("a code, if this patient has other scans")
        ui.setPatientEdit.enabled = volume is not None
        ui.setSegmentationSelector.enabled = not self.busy
        ui.setSegmentsTable.enabled = not self.busy
        self._fillSegments()

    def _fillSegments(self) -> None:
        from UNetSegmentationLib.model import label_key

        table, rows = self.ui.setSegmentsTable, self.rows
        table.visible = bool(rows)
        names = [label.name for label in self._known()]
        if table.columnCount != 2:
            table.setColumnCount(2)
            table.setHorizontalHeaderLabels([_("Segment"), _("Label in the training set")])
            table.verticalHeader().hide()
            table.horizontalHeader().setSectionResizeMode(qt.QHeaderView.Stretch)
            table.horizontalHeader().setHighlightSections(False)
        if table.rowCount != len(rows):
            table.setRowCount(len(rows))
        for i, row in enumerate(rows):
            item = table.item(i, 0)
            if item is None:
                item = qt.QTableWidgetItem()
                item.setFlags(qt.Qt.ItemIsUserCheckable | qt.Qt.ItemIsEnabled)
                table.setItem(i, 0, item)
                combo = ctk.ctkComboBox()
                combo.editable = True
                combo.setCompleter(None)  # it would make of a new label "lung" the known "lung nodule"
                combo.insertPolicy = qt.QComboBox.NoInsert  # the choices are the set's labels, also after Return
                inputs.leaveWheel(combo)
                combo.connect("editTextChanged(QString)", lambda text, i=i: self._onLabel(i, text))
                table.setCellWidget(i, 1, combo)
            combo = table.cellWidget(i, 1)
            if item.text() != row.name:
                item.setText(row.name)
                item.setToolTip(plainTip(row.name))
            state = qt.Qt.Checked if row.included else qt.Qt.Unchecked
            if item.checkState() != state:
                item.setCheckState(state)
            anew = [combo.itemText(n) for n in range(combo.count)] != names
            if anew:
                combo.clear()
                for name in names:
                    combo.addItem(name)
            if anew or combo.currentText != row.label:
                combo.setEditText(row.label)
                combo.lineEdit().cursorPosition = 0  # or a narrow panel shows the label's end
            combo.enabled = row.included
            known = self.summary is not None and row.included and bool(names)
            new = known and label_key(row.label) not in [label_key(n) for n in names]
            combo.toolTip = _("A label that the training set does not have yet.") if new else plainTip(row.label)
        inputs.fitTable(table, _SHOWN_ROWS)

    def _showCases(self) -> None:
        ui, cases = self.ui, self._shownCases()
        count = (self.summary or {}).get("count", 0)
        removed = (self.summary or {}).get("removed", [])
        ui.setCasesSection.visible = bool(count or removed) and not self._failed
        ui.setCasesSection.text = _("Cases ({n})").format(n=count)
        table = ui.setCasesTable
        texts = [[case["name"], str(case["versions"][-1]["version"]), _marked(case), case["split"] or "-"] for case in cases]
        chosen = {item.row() for item in table.selectedItems()}
        name = table.item(min(chosen), 0).text() if chosen else ""
        now = [[table.item(i, j).text() for j in range(table.columnCount)] for i in range(table.rowCount)]
        if now != texts or not table.columnCount:
            titles = [_("Case"), _("Version"), _("Marked"), _("Split")]
            inputs.prepareTable(table, titles, len(texts))
            for i, (case, row) in enumerate(zip(cases, texts)):
                for j, text in enumerate(row):
                    item = qt.QTableWidgetItem(text)
                    item.setToolTip(plainTip("\n".join(versionText(v) for v in reversed(case["versions"]))))
                    table.setItem(i, j, item)
            current = name or (self._currentCase() or {}).get("name")
            at = next((i for i, case in enumerate(cases) if case["name"] == current), -1)
            if at >= 0:
                table.selectRow(at)
            inputs.fitTable(table, _SHOWN_ROWS, 2)
        table.visible = bool(texts)
        more = count - len(cases)
        ui.setMoreLabel.text = _("and {n} older").format(n=more)
        ui.setMoreLabel.visible = more > 0
        self._showTools()

    def _showTools(self) -> None:
        ui, case = self.ui, self._case()
        free = not self.busy and self._reading is None
        ui.setVersionsButton.enabled = free and case is not None and len(case["versions"]) > 1
        ui.setRemoveButton.enabled = free and case is not None
        ui.setRestoreButton.enabled = free and bool((self.summary or {}).get("removed"))


def _sequence(volume: Any) -> str:
    """An identity that all frames of a volume's sequence share, so that they are held out together; "" for a single volume.

    Of the first frame's voxels, so that it is the same in every session.
    """
    from UNetSegmentationLib import mrml

    found = mrml.sequence_frames(volume)
    first = None if found is None else found[0].GetSequenceNode(volume).GetNthDataNode(0)
    if first is None or first.GetImageData() is None:
        return ""
    voxels = slicer.util.arrayFromVolume(first).ravel()
    return "sequence " + hashlib.sha256(voxels[:: max(1, voxels.size >> 20)].tobytes()).hexdigest()


def silent(folder: str) -> str:
    return _("The folder {folder} does not answer; check its drive or network connection, or choose another.").format(folder=folder)


def _menu(choices: Sequence[tuple[str, Any]]) -> Any:
    """What a person chooses of (text, value); None for nothing."""
    menu, chosen = qt.QMenu(), []
    for text, value in choices:
        menu.addAction(text).connect("triggered()", lambda *_, value=value: chosen.append(value))
    if choices:
        menu.exec_(qt.QCursor.pos())
    return chosen[0] if chosen else None


def countText(summary: dict[str, Any]) -> str:
    cases, people = summary["count"], summary["patients"]
    text = _("1 case of 1 patient.") if cases == people == 1 else _("{cases} cases of 1 patient.")
    return (text if people == 1 else _("{cases} cases of {people} patients.")).format(cases=cases, people=people)


def changesText(record: dict[str, Any]) -> str:
    """What a person changed, a line for each label."""
    changes = record.get("changes")
    if changes is None:
        return _("The model's own mask is not known here, so what was changed is not recorded.")
    lines = []
    for name, c in changes.items():
        if not c["added"] and not c["removed"]:
            lines.append(_("{name}: as the model had it.").format(name=name))
            continue
        text = _(
            "{name}: {added} voxels added ({added_ml:.3g} ml), {removed} removed ({removed_ml:.3g} ml); Dice with the model's {dice:.2f}."
        )
        lines.append(text.format(name=name, **c))
    return "\n".join(lines)


def versionText(version: dict[str, Any]) -> str:
    """One line on a version of a case."""
    text = _("Version {n}").format(n=version["version"])
    if version.get("restored"):
        text += " " + _("(version {n} again)").format(n=version["restored"])
    day = str(version.get("date", ""))[:10]
    text += "".join(f", {part}" for part in (day, str(version.get("by", ""))) if part)
    changes = version.get("changes") or {}
    return text + "".join(f"; {name} +{c['added']} -{c['removed']}" for name, c in changes.items())


def _marked(case: dict[str, Any]) -> str:
    found = [name for name, n in case["voxels"].items() if n]
    return ", ".join(found) or _("nothing")
