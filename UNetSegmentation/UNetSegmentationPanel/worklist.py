"""The work list: scans segmented in advance, the most useful first, corrected one by one and put into the training set.

Reading, writing and segmenting are the desk's, a process of its own (UNetSegmentationLib.worker.desk); here is what a person sees,
and the scan at hand in the scene, which is filled in pieces of a few milliseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

import UNetSegmentationPanel

from . import results
from .models import breakable, plainTip
from .nodules import Pieces
from .run import sentence
from .trainingset import ANSWER_S, silent

SETTING = "UNetSegmentation/WorkList"
_REFRESH_MS = 30_000  # what other annotators did
_WATCH_MS = 200  # whether the background is in somebody's way
_PATIENCE = 5  # so many times nothing must be going on before it goes on itself


# ----------------------------------------------------------------------------------------------------------------- desk


class Desk:
    """The desk's process, started when it is first asked. onEvent(message): what it says unasked; onEnd(text): it is gone."""

    def __init__(self, onEvent: Callable[[dict[str, Any]], None], onEnd: Callable[[str], None]) -> None:
        self._onEvent, self._onEnd = onEvent, onEnd
        self._process: Any = None
        self._python: str | None = None  # of PyTorch's environment
        self._lines: Any = None
        self._answers: dict[int, tuple[Callable[[dict[str, Any]], None], Callable[[str], None]]] = {}
        self._number = 0
        self._pid: int | None = None
        self._fatal = ""
        self.folder: Path | None = None  # for arrays

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int | None:
        return self._pid if self.running else None

    @property
    def waiting(self) -> bool:
        """Somebody waits for an answer: it works, or a drive hangs."""
        return bool(self._answers)

    def ask(self, op: str, onAnswer: Callable[[dict[str, Any]], None], onError: Callable[[str], None], **fields: Any) -> None:
        """Exactly one of the two follows, from the event loop."""
        self._number += 1
        try:
            from UNetSegmentationLib import UserError
            from UNetSegmentationLib.worker.protocol import MAX_LINE, dumps

            self._start()
            line = dumps({"id": self._number, "op": op, **fields})
            if len(line) > MAX_LINE:
                raise UserError(_("These are too many files at once; add their folder, or a .txt list of them."))
        except Exception as e:
            text = sentence(e)
            qt.QTimer.singleShot(0, lambda: onError(text))
            return
        self._answers[self._number] = onAnswer, onError
        self._process.write(line)

    def tell(self, op: str) -> None:
        if self.running:
            self._write({"op": op})

    def close(self, give: tuple[str, str] | None = None) -> None:
        """End it, within two seconds; nobody is called any more. give: the folder and name of a scan that goes back to its list."""
        self._answers.clear()
        if give is not None and self._process is not None:
            self._write({"id": 0, "op": "back", "folder": give[0], "scan": give[1]})
            self._write({"op": "bye"})
        process, self._process = self._process, None
        if process is not None:
            if give is not None:
                process.wait(1.0)
            process.kill()
            process.wait(1.0)
        if self.folder is not None:
            from UNetSegmentationLib.worker.protocol import remove_folder

            remove_folder(self.folder)
            self.folder = None

    def end(self, why: str) -> None:
        """End it, within a second, as if it had died; why: the sentence for who waits. Whatever is asked next starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(1.0)
            self._gone(why)

    def renew(self) -> None:
        """End it where PyTorch has come or gone since it was started: the next one sees that."""
        from .installer import workerPython

        if self._process is not None and self._python != workerPython()[0]:
            self.end("")

    def _start(self) -> None:
        if self._process is not None:
            return
        from UNetSegmentationLib.worker.client import child_environment, command, find_python, new_folder
        from UNetSegmentationLib.worker.protocol import Lines

        from .installer import workerPython
        from .worker import ChildProcess, variablesFor

        if self.folder is None or not self.folder.is_dir():
            self.folder = new_folder()
        self._python, environment = workerPython()
        python = self._python or find_python()
        variables = child_environment(python, variablesFor(python) if environment is None else environment)
        self._lines, self._pid = Lines(), None
        self._fatal = ""
        self._process = ChildProcess([*command(python, self.folder), "desk"], variables, self._heard, self._ended)

    def _write(self, message: dict[str, Any]) -> None:
        from UNetSegmentationLib.worker.protocol import dumps

        self._process.write(dumps(message))

    def _heard(self, data: bytes) -> None:
        from UNetSegmentationLib.worker.protocol import ProtocolError, loads

        for line in self._lines.feed(data) if self._process is not None else ():
            try:
                message = loads(line)
            except ProtocolError:
                logging.warning("The work list's program said what is not understood: %s", (line or b"")[:200])
                continue
            kind, waiting = message.get("event"), self._answers.pop(message.get("id"), None)  # type: ignore[arg-type]
            if kind in ("starting", "hello"):
                self._pid = self._process.workerPid = message.get("pid")
            elif waiting is not None:
                waiting[0](message) if kind == "done" else waiting[1](str(message.get("error", "")))
            elif kind == "error":
                logging.warning("The work list's program: %s", message.get("error"))
                self._fatal = str(message.get("error", ""))
            else:
                self._onEvent(message)
            if self._process is None:
                return  # closed by what was called

    def _ended(self, code: int | None, reason: str) -> None:
        from UNetSegmentationLib.worker.client import cannot_start, ending

        process, self._process = self._process, None
        if process is None:
            return
        if code is None:
            text = str(cannot_start(process.program, reason))
        elif self._fatal:
            text = self._fatal
        else:
            text = str(ending(code, process.program, process.log, self._pid is not None, process.launched))
        self._gone(text)

    def _gone(self, text: str) -> None:
        waiting, self._answers = self._answers, {}
        for _onAnswer, onError in waiting.values():
            onError(text)
        self._onEnd("" if waiting else text)


class Strip:
    """A toolbar of Slicer's window with the scan's name and buttons, while another module such as the Segment Editor is open.

    actions: (text, tooltip, function) of each button.
    """

    def __init__(self, actions: Sequence[tuple[str, str, Callable[[], None]]]) -> None:
        self._actions = actions
        self._bar: Any = None
        self._label: Any = None
        self.buttons: list[Any] = []

    @property
    def shown(self) -> bool:
        return self._bar is not None

    def show(self, name: str) -> None:
        window = slicer.util.mainWindow()
        if window is None:
            return
        if self._bar is None:
            self._bar = qt.QToolBar(_("Work list"))
            self._bar.setObjectName("UNetWorkListToolBar")
            self._label = qt.QLabel()
            self._label.setMargin(4)
            self._label.setMinimumWidth(1)  # a long name is cut at the window's edge
            self._label.setTextFormat(qt.Qt.PlainText)  # a scan's name is no HTML
            for text, tip, method in self._actions:
                button = qt.QPushButton(text)
                button.toolTip, button.autoDefault = tip, False
                button.connect("clicked(bool)", lambda *_unused, m=method: qt.QTimer.singleShot(0, m))
                self._bar.addWidget(button)
                self.buttons.append(button)
            self._bar.addWidget(self._label)
            window.addToolBar(self._bar)
            window.insertToolBarBreak(self._bar)  # Slicer's own fill a laptop's row, so that its buttons would go behind the "»"
        self._label.text = name

    def hide(self) -> None:
        if self._bar is not None:
            window, bar = slicer.util.mainWindow(), self._bar
            self._bar, self._label, self.buttons = None, None, []
            if window is not None:  # else the bar went with it
                window.removeToolBar(bar)
                bar.deleteLater()


# -------------------------------------------------------------------------------------------------------------- section


@dataclass
class Case:
    """The scan at hand. folder: of its list; stamp: of the segmentation when it was opened or added; over: it is done, skipped or given
    back, and stays to be seen, and to be corrected further, until the next one is there."""

    folder: str
    name: str
    volumes: list[Any]
    segmentation: Any
    patient: str
    maskFile: str
    model: str
    modality: str
    value: float | None
    found: int
    stamp: int = 0
    over: bool = False


class WorkListSection:
    """The panel's section. panel: the UNetSegmentationWidget."""

    def __init__(self, panel: Any) -> None:
        self.panel = panel
        self.root = slicer.util.loadUI(panel.resourcePath("UI/WorkList.ui"))
        panel.addSection(self.root)
        self.ui = ui = slicer.util.childWidgetVariables(self.root)
        self.desk = Desk(self._onEvent, self._onDeskEnd)
        self.case: Case | None = None
        self.list: dict[str, Any] | None = None  # the desk's summary
        self.text = ""  # what is to be said
        self.busy = ""  # what is going on with the scan at hand
        self.segmenting = False
        self._choice: dict[str, Any] = {}  # what segments in advance: another model may be chosen for other work meanwhile
        self._answer = ""  # of the desk, on the scan at hand: "awaited", or "late" as the scene was closed meanwhile
        self._fraction = 0.0
        self._passed: list[str] = []
        self._reading = ""  # the scan that the desk reads for "next"
        self._warm = self._closed = self._paused = False
        self._quiet = 0
        self._folder = self._opened = ""  # that was chosen, and that was looked into last
        self._editing = False  # the Segment Editor is to open on the next scan too
        self._pieces = Pieces(self._onLoadFailed)
        self.strip = Strip(
            [
                (_("Done, next"), ui.doneScanButton.toolTip, lambda: self._fromStrip(self.onDone)),
                (_("Skip"), ui.skipScanButton.toolTip, lambda: self._fromStrip(self.onSkip)),
                (_("Later, next"), _("Give this scan back for later, and open the next."), lambda: self._fromStrip(self.onNext)),
            ]
        )
        self._watch, self._refresh, self._late = qt.QTimer(), qt.QTimer(), qt.QTimer()
        for timer, interval, method in (
            (self._watch, _WATCH_MS, self._onWatch),
            (self._refresh, _REFRESH_MS, self._onRefresh),
            (self._late, round(1000 * ANSWER_S), lambda: self._failed(silent(self.folder))),
        ):
            timer.setInterval(interval)
            timer.connect("timeout()", method)
        self._late.setSingleShot(True)
        self.root.connect("contentsCollapsed(bool)", self._onCollapsed)
        for button, method in (
            (ui.listFolderButton, self.onChooseFolder),
            (ui.addFolderButton, self.onAddFolder),
            (ui.addFilesButton, self.onAddFiles),
            (ui.segmentButton, self.onSegment),
            (ui.editScanButton, self.onEdit),
            (ui.doneScanButton, self.onDone),
            (ui.skipScanButton, self.onSkip),
            (ui.nextScanButton, self.onNext),
        ):
            button.connect("clicked(bool)", lambda *_unused, m=method: m())
        self.show()

    # ----------------------------------------------------------------------------------------------- called by the panel

    def read(self) -> None:
        """The core is there."""
        self._warm = True
        self.panel.trainingSet.addListener(self._onTrainingSet)
        if not self.root.collapsed:
            self._open()
        self.show()

    def enter(self) -> None:
        self._editing = False
        self.strip.hide()
        if self._warm and not self.root.collapsed:
            if self.list is None:
                self._open()
            else:
                self._onRefresh()
                self._refresh.start()

    def leave(self) -> None:
        """Another module, the Segment Editor for one: the scan stays open."""
        self._refresh.stop()
        if self.case is not None:
            self.strip.show(self.case.name)

    def closeScene(self) -> None:
        self.strip.hide()
        self._pieces.clear()
        case, self.case = self.case, None
        if self._answer:
            self._answer = "late"
        else:
            self.busy = ""
        if case is not None and not case.over:
            self._back(case.folder, case.name)
            if not self._answer:
                self._sayGivenBack(case.name)
        self.show()

    def close(self) -> None:
        self._closed = True
        self.strip.hide()
        self._pieces.clear()
        for timer in (self._watch, self._refresh, self._late):
            timer.stop()
        self.desk.close((self.case.folder, self.case.name) if self.case is not None else None)

    def update(self) -> None:
        self.show()

    def leavePyTorch(self) -> None:
        """PyTorch is to be removed, and Windows removes no file that a process has loaded: the desk goes on with what is there then."""
        working, self._reading = self.segmenting or self.desk.waiting, ""
        self.desk.end(_("PyTorch is being removed, so the work list was interrupted; go on when that is done.") if working else "")

    # ------------------------------------------------------------------------------------------------------------ folder

    @property
    def folder(self) -> str:
        """Where the list lies: the folder that was chosen last, else the training set's; "" where there is neither."""
        return self._folder or str(qt.QSettings().value(SETTING, "") or "") or self.panel.trainingSet.folder

    def _onCollapsed(self, collapsed: bool) -> None:
        if collapsed:
            self._refresh.stop()
        elif self._warm:
            self._open()

    def _onTrainingSet(self) -> None:
        if self._closed or self.root.collapsed or self.busy or self.folder == self._opened:
            return
        if self.segmenting:
            self._halt()
        if self.desk.waiting and self.case is None:
            self.desk.close()  # it may wait for the former folder's drive for ever
        self._open()

    def _open(self) -> None:
        """Look into the folder, if there is one."""
        self._opened = self.folder
        if self._closed or not self.folder:
            self.show()
            return
        folder, trainingSet = self.folder, self.panel.trainingSet
        if trainingSet.folder and trainingSet.summary is None:
            trainingSet.refresh()  # Done is to know its labels, also where its section was never opened

        def opened(answer: dict[str, Any]) -> None:
            if folder == self.folder:
                self._late.stop()
                if self.text == silent(self.folder):
                    self.text = ""
                self._take(answer)
                self._refresh.start()

        def failed(text: str) -> None:
            self._late.stop()
            self._failed(text)

        self._late.start()
        self._ask("open", opened, failed, folder=folder)
        self.show()

    def onChooseFolder(self) -> None:
        folder = self._askFolder(_("Folder of the work list"), self.folder)
        if not folder or (self.case is not None and not self._mayLeave()):
            return
        case, self.case = self.case, None
        if self.segmenting:
            self._halt()
        if self.desk.waiting:  # perhaps for ever: for the former folder's drive
            self._pieces.clear()
            self.desk.close((case.folder, case.name) if case is not None else None)
            self.busy = self._answer = ""
        elif case is not None:
            self._back(case.folder, case.name)
        self._folder = folder
        qt.QSettings().setValue(SETTING, folder)
        self.list, self.text, self._passed = None, "", []
        self._open()
        self.show()

    def onAddFolder(self) -> None:
        folder = self._askFolder(_("Folder with scans"), "")
        if folder:
            self._add([folder])

    def onAddFiles(self) -> None:
        from UNetSegmentationLib.image import PICTURE_SUFFIXES, VOLUME_SUFFIXES

        suffixes = " ".join(f"*{suffix}" for suffix in (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES, ".txt", ".csv"))
        filters = _("Scans and lists of scans ({suffixes});;All files (*)").format(suffixes=suffixes)
        paths = qt.QFileDialog.getOpenFileNames(slicer.util.mainWindow(), _("Scans, or lists of scans"), "", filters)
        if paths and not isinstance(paths[0], str):
            paths = paths[0]  # PySide
        if paths:
            self._add([str(p) for p in paths])

    def _askFolder(self, title: str, start: str) -> str:
        return str(qt.QFileDialog.getExistingDirectory(slicer.util.mainWindow(), title, start or str(Path.home())) or "")

    def _add(self, sources: Sequence[str]) -> None:
        if not self.folder:
            place = self._askFolder(_("Where is the work list to lie?"), "")
            if not place:
                return
            self._folder = place
            qt.QSettings().setValue(SETTING, place)
        self.busy = _("Looking for scans…")

        def added(answer: dict[str, Any]) -> None:
            said = [(_("1 scan was added.") if answer["added"] == 1 else _("{n} scans were added.")).format(n=answer["added"])]
            if answer["moved"]:
                one, many = _("1 scan was found again in another place."), _("{n} scans were found again in another place.")
                said.append((one if answer["moved"] == 1 else many).format(n=answer["moved"]))
            if answer["leftOut"]:
                said.append(_("{n} left out: {why}").format(n=answer["leftOut"], why=answer["notes"][0]))
            self.busy, self.text = "", " ".join(said)
            self._take(answer)
            if self.segmenting:
                self._ask("segment", self._onSegmenting, self._onSegmentFailed, **self._choice)

        self._ask("add", added, folder=self.folder, sources=list(sources))
        self.show()

    # ----------------------------------------------------------------------------------------------- segment in advance

    def onSegment(self) -> None:
        if self.segmenting:
            self._halt()
            self.show()
            return
        chosen = self.panel.modelList.selected
        self.text = "" if chosen else _("Choose a model above that is to segment the scans.")
        try:
            if chosen and UNetSegmentationPanel._ensureRequirements():
                p = self.panel._parameters or self.panel.logic.getParameterNode()
                options = {"device": p.device, "engine": p.engine} | ({"tta": p.tta} if p.tta else {})
                self._choice = {"folder": self.folder, "models": [str(m.path) for m in chosen], "options": options}
                self._ask("segment", self._onSegmenting, self._onSegmentFailed, **self._choice)
                self.segmenting, self._fraction = True, 0.0
        except Exception as e:
            self.text = sentence(e)
        self.show()

    def _onSegmenting(self, answer: dict[str, Any]) -> None:
        self._paused, self._quiet = False, 0
        self._watch.start()
        self._take(answer)

    def _onSegmentFailed(self, text: str) -> None:
        self.segmenting = False
        self._failed(text)

    def _halt(self) -> None:
        self.segmenting = False
        self._watch.stop()
        self.desk.tell("halt")

    def _onWatch(self) -> None:
        """A click or a run goes first: the background waits until a second after it."""
        worker = UNetSegmentationPanel._worker
        inTheWay = bool(self.busy) or self.panel.controller.running or (worker is not None and worker.state == "busy")
        self._quiet = 0 if inTheWay else self._quiet + 1
        if inTheWay and not self._paused:
            self._paused = True
            self.desk.tell("pause")
            self.show()
        elif self._paused and self._quiet >= _PATIENCE:
            self._paused = False
            self.desk.tell("go")
            self.show()

    def _onEvent(self, message: dict[str, Any]) -> None:
        if message.get("event") == "reading":
            self._reading = str(message.get("scan", ""))
        if self._closed or not self.segmenting:
            return
        if message.get("event") == "segmenting":
            self._fraction = float(message.get("fraction", 0.0))
        elif message.get("event") == "changed":
            self._fraction = 0.0
            self._take(message)
        elif message.get("event") == "rest":
            self.segmenting = False
            self._watch.stop()
            self.text = message.get("error") or self.text
            self._onRefresh()
        self.show()

    def _onDeskEnd(self, text: str) -> None:
        self.segmenting = False
        self._watch.stop()
        if text:
            self._failed(text)
        if self.case is not None:
            qt.QTimer.singleShot(_REFRESH_MS, self._startAgain)
        self.show()

    def _startAgain(self) -> None:
        """While a scan is corrected, whatever module is open, the desk tells the others that it is still taken."""
        if self.case is not None and not self._closed:  # also where another list has started one, which knows that list alone
            self.desk.ask("status", self._take, lambda _text: None, folder=self.case.folder)

    # ---------------------------------------------------------------------------------------------------- scan after scan

    def onNext(self) -> None:
        """Open the next scan; the one at hand is given back."""
        if self.busy or (self.case is not None and not self._mayLeave()):
            return
        leave = ""
        if self.case is not None and self.case.folder == self.folder:
            leave = self.case.name
            self._pass(leave)
        self._next(leave)

    def _pass(self, name: str) -> None:
        """This scan comes last."""
        self._passed = [*(n for n in self._passed if n != name), name]

    def _next(self, leave: str = "") -> None:
        self.text, self.busy, self._answer, folder = "", _("Reading the next scan…"), "awaited", self.folder
        self._reading = ""
        fields = {"folder": folder, "leave": leave, "passed": list(self._passed), "by": self.panel.trainingSet.annotator}
        self._ask("next", lambda answer: self._onScan(answer, folder), lambda text: self._onNextFailed(text, folder), **fields)
        self.show()

    def _onNextFailed(self, text: str, folder: str) -> None:
        name, case = self._reading, self.case
        atHand = case is not None and (case.folder, case.name) == (folder, name)  # the last one, which stays taken
        if name and not atHand and not self.desk.running:  # Slicer still has that scan: the next desk would read it first, and end too
            self._pass(name)
            self.desk.ask("back", self._take, self._failed, folder=folder, scan=name)
            said = _("The work list's program ended while it read '{name}', so that was given back; press '{button}' for another. {why}.")
            text = said.format(name=name, button=self.ui.nextScanButton.text, why=text.partition(";")[0].rstrip("."))
        self._failed(text)

    def _sayGivenBack(self, name: str) -> None:
        self.text = _("The scene was closed, so '{name}' was given back to the list.").format(name=name)

    def _answered(self) -> bool:
        """The desk's answer on the scan at hand is there; whether the scene was closed meanwhile."""
        late, self._answer, self.busy = self._answer == "late", "", ""
        return late

    def _onScan(self, answer: dict[str, Any], folder: str) -> None:
        """folder: of the list that was asked, which may be another's by now."""
        late, scan, case = self._answered(), answer.get("scan"), self.case
        self._take(answer)
        if late and scan is not None:
            self._back(folder, scan["name"])
            _removeArrays(scan, self.desk.folder)
            self._sayGivenBack(scan["name"])
            self.show()
            return
        if case is not None:
            case.over = True
            if case.folder != folder:  # of the same list the desk has given it back
                self._back(case.folder, case.name)
        self.text = " ".join(filter(None, [self.text, *answer.get("notes", ())]))  # after what _onMarked() has to say
        if scan is None:
            self.case = None
            self.text = " ".join(filter(None, [self.text, _("Nothing is left to do in this list.")]))
            self.show()
        else:
            self.busy = _("Opening {name}…").format(name=scan["name"])
            steps = self._load(scan, folder)
            next(steps)  # so that it is given back even where the scene is closed before the first turn
            self._pieces.add(steps)
            self.show()

    def _load(self, scan: dict[str, Any], folder: str) -> Generator[Any, None, None]:
        """The scan and what was found in it, into the scene; then the former one's nodes leave it."""
        from UNetSegmentationLib import Box, Prediction, mrml
        from UNetSegmentationLib.model import Label
        from UNetSegmentationLib.worker.desk import received_grid, received_mask
        from UNetSegmentationLib.worker.protocol import fill_array

        place = self.desk.folder
        assert place is not None
        scene, former = slicer.mrmlScene, self.case
        made: list[Any] = []
        try:
            yield  # the first import takes its time
            for i, channel in enumerate(scan["channels"]):
                grid = received_grid(channel)
                name = scan["name"] if len(scan["channels"]) == 1 else f"{scan['name']} {i}"

                def fill(array: Any, file: str = channel["file"]) -> Generator[None, None, None]:
                    return fill_array(place, file, array)

                made.append((yield from mrml.new_volume_steps(scene, name, grid, fill, tuple(channel["window"]))))
            labels = list(map(Label.from_json, scan["labels"]))
            mask = received_mask(place, scan["mask"], grid)
            image = mrml.image_from_volume(made[0])
            found = Prediction(image.like(mask), tuple(labels), scan["model"], Box.whole(grid.shape))
            segmentation = yield from mrml.write_prediction_steps(found, made[0])
            made.append(segmentation)
            segmentation.SetName(scene.GenerateUniqueName(f"{scan['name']} corrected"))
            present = segmentation.GetSegmentation().GetNumberOfSegments()
            mrml.add_empty_segments(segmentation, labels)
            yield
        except BaseException:
            mrml.remove_nodes(reversed(made))
            self._pass(scan["name"])
            self._back(folder, scan["name"])
            self._sayGivenBack(scan["name"])  # where it fails, why is said instead
            raise
        finally:
            _removeArrays(scan, place)
        volumes = made[:-1]
        case = Case(
            folder,
            scan["name"],
            volumes,
            segmentation,
            scan["patient"],
            scan["maskFile"],
            scan["model"] if scan["maskFile"] else "",  # what it found may be lost
            scan["modality"],
            scan["value"],
            present,
        )
        case.stamp = _stamp(segmentation)
        self.case = case
        p = self.panel._parameters or self.panel.logic.getParameterNode()
        with slicer.util.NodeModify(p):
            p.volume, p.channels = volumes[0], volumes[1:]
        yield  # each of these is shown in several places
        with slicer.util.NodeModify(p):  # after the panel has left the former volume's segmentations
            p.output = p.nodules = segmentation
        yield
        slicer.util.setSliceViewerLayers(background=volumes[0], fit=True)
        yield
        for volume in former.volumes if former is not None else ():
            if volume.GetScene() is not None:  # what lies over it is the former patient's too
                uncertainty = mrml.find_map(volume, "uncertainty")
                results.showMap(uncertainty, False)
                mrml.remove_nodes([uncertainty])
        for node in [former.segmentation, *former.volumes] if former is not None else ():
            mrml.remove_nodes([node])
            yield
        self.busy = ""
        self.show()
        if self._editing:
            self.onEdit()

    def _onLoadFailed(self, text: str) -> None:
        self.busy = ""
        self._failed(text)

    def onEdit(self) -> None:
        """The Segment Editor on the scan at hand."""
        case = self.case
        if case is None or not self._isThere(case):
            return
        from UNetSegmentationLib import mrml

        node = mrml.editor_node(slicer.mrmlScene)
        if node is None:
            node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLSegmentEditorNode")
            node.UnRegister(None)
            node.SetSingletonTag("SegmentEditor")
            node = slicer.mrmlScene.AddNode(node)
        node.SetAndObserveSegmentationNode(case.segmentation)
        node.SetAndObserveSourceVolumeNode(case.volumes[0])
        slicer.util.selectModule("SegmentEditor")

    def _fromStrip(self, method: Callable[[], None]) -> None:
        """Back into the panel, where what follows is to be seen, and on into the Segment Editor with the next scan."""
        slicer.util.selectModule("UNetSegmentation")
        self._editing = True
        method()

    def onDone(self) -> None:
        """Into the training set, then the next scan."""
        case = self.case
        if case is None or self.busy or not self._isThere(case):
            return
        p = self.panel._parameters
        if p is not None:
            if p.volume is not case.volumes[0]:
                with slicer.util.NodeModify(p):
                    p.volume, p.channels = case.volumes[0], case.volumes[1:]
            p.output = case.segmentation
        other = self.panel.trainingSet.segmentation() is not case.segmentation  # a person chose another for this volume
        if other and not self._mayLeave():
            return
        agreed = _stamp(case.segmentation)
        self.text, self.busy = "", _("Adding {name} to the training set…").format(name=case.name)

        def added(name: str | None, text: str) -> None:
            if self._closed or (name is None and self.case is not case):
                return
            if name is not None and self.case is not case:  # the scene was closed meanwhile
                self.text = text
                self._mark(case, name, self._take)
                return
            self.busy = ""
            if name is None:
                self._failed(text)
                return
            if other:  # not before it is in: what was corrected would be lost after a refusal
                case.stamp = agreed
            self.busy, self._answer = _("Marking {name} as done…").format(name=case.name), "awaited"
            self._mark(case, name, lambda answer: self._onMarked(answer, case))
            self.show()

        try:
            self.panel.trainingSet.addCurrent(**self.known(case.volumes[0], added))
        except Exception as e:
            self.busy = ""
            self._failed(sentence(e))
        self.show()

    def _mark(self, case: Case, name: str, onAnswer: Callable[[dict[str, Any]], None]) -> None:
        """As done, with its name in the training set."""
        self._ask("done", onAnswer, folder=case.folder, scan=case.name, case=name, by=self.panel.trainingSet.annotator)

    def known(self, volume: Any, onDone: Callable[[str | None, str], Any] | None = None) -> dict[str, Any]:
        """What TrainingSetSection.addCurrent() is to know of a volume: of the scan at hand whose it is, and by which model. onDone: what
        goes on then; default: that scan is marked as done, where what was added is its own segmentation, and stays open."""
        case = self.case
        if case is None or volume is not case.volumes[0]:
            return {} if onDone is None else {"onDone": onDone}

        stamp = _stamp(case.segmentation)  # of what is added, not of what is corrected meanwhile
        own = self.panel.trainingSet.segmentation() is case.segmentation

        def added(name: str | None, text: str) -> None:
            if name is not None and self.case is case and own:
                case.stamp = stamp
            if onDone is not None:
                onDone(name, text)
            elif name is not None and own and not case.over and not self._closed:
                self._mark(case, name, lambda answer: self._onAdded(answer, case))

        moved = case.volumes[0].GetParentTransformNode() is not None  # from where the file's mask lies
        mask = Path(case.maskFile) if case.maskFile and not moved else None
        return {"onDone": added, "patient": case.patient or None, "model_mask": mask, "model": case.model, "modality": case.modality}

    def _onAdded(self, answer: dict[str, Any], case: Case) -> None:
        """By "Add to training set": whether there is more to correct is the person's to say."""
        case.over = True
        self.text = " ".join([_("'{name}' is marked as done.").format(name=case.name), *answer.get("notes", ())])
        self._take(answer)

    def onSkip(self) -> None:
        """Nobody is to correct it; then the next scan."""
        case = self.case
        if case is None or self.busy or not self._mayLeave():
            return
        self.text, self.busy, self._answer = "", _("Marking {name} as skipped…").format(name=case.name), "awaited"
        self._ask("skip", self._onMarked, folder=case.folder, scan=case.name, by=self.panel.trainingSet.annotator)
        self.show()

    def _onMarked(self, answer: dict[str, Any], added: Case | None = None) -> None:
        """Go on to the next scan. added: that is in the training set, but perhaps not what was corrected in it since."""
        late = self._answered()
        self._take(answer)
        if late:
            return
        notes = " ".join(answer.get("notes", ()))
        if added is not None and self.case is added and _stamp(added.segmentation) != added.stamp:
            text = _("What you corrected in '{name}' meanwhile is not in the training set yet; press Done again to add it.")
            self._failed(" ".join(filter(None, [notes, text.format(name=added.name)])))
            return
        if self.case is not None:
            self.case.over = True
        self._next()
        self.text = notes

    def _mayLeave(self) -> bool:
        """Whether what was corrected in the scan at hand may be lost."""
        case = self.case
        if case is None or case.segmentation.GetScene() is None or _stamp(case.segmentation) == case.stamp:
            return True
        text = _("What you corrected in '{name}' is not in the training set yet and would be lost. Leave the scan anyway?")
        text = text.format(name=case.name)
        return bool(slicer.util.confirmYesNoDisplay(text, windowTitle=_("Work list"), textFormat=qt.Qt.PlainText))

    def _isThere(self, case: Case) -> bool:
        if case.segmentation.GetScene() is not None and all(v.GetScene() is not None for v in case.volumes):
            return True
        self.case = None
        self._back(case.folder, case.name)
        self._failed(_("'{name}' was removed from the scene, so it was given back to the list.").format(name=case.name))
        return False

    def _back(self, folder: str, name: str) -> None:
        """Back to the list, for anybody."""
        if self.desk.running and not self._closed:
            self.desk.ask("back", self._take, lambda _text: None, folder=folder, scan=name)

    # -------------------------------------------------------------------------------------------------------- machinery

    def _ask(self, op: str, onAnswer: Callable[[dict[str, Any]], None], onError: Any = None, **fields: Any) -> None:
        busy = self.busy if op in ("add", "next", "done", "skip") else None  # what ends with this request

        def answered(answer: dict[str, Any]) -> None:
            if not self._closed:
                onAnswer(answer)

        def failed(text: str) -> None:
            if not self._closed:
                if self.busy == busy:
                    self.busy = self._answer = ""
                (onError or self._failed)(text)

        if not (self.segmenting or self.desk.waiting):
            self.desk.renew()
        self.desk.ask(op, answered, failed, **fields)

    def _onRefresh(self) -> None:
        if self.list is not None and self.desk.running and not self.busy:
            self._ask("status", self._take, folder=self.folder)

    def _take(self, answer: dict[str, Any]) -> None:
        found = answer.get("list")
        if found is None or Path(found["folder"]) == Path(self.folder):
            self.list = found
        self.show()

    def _failed(self, text: str) -> None:
        self.text, self._editing = text, False
        self.show()

    # ------------------------------------------------------------------------------------------------- what is to be seen

    def show(self) -> None:
        if self._closed:
            return
        ui, known, case = self.ui, self.list, self.case
        folder = self.folder
        ui.listFolderLabel.text = Path(folder).name or folder if folder else _("none chosen")
        ui.listFolderLabel.toolTip = plainTip(folder)
        counts = known["counts"] if known else {}
        left = counts.get("waiting", 0) + counts.get("segmented", 0)
        free = self._warm and not self.busy
        ui.listFolderButton.enabled = free or (self._warm and self.desk.waiting)
        for button in (ui.addFolderButton, ui.addFilesButton):
            button.enabled = free
        ui.segmentButton.enabled = self.segmenting or (free and bool(known and known["total"]))
        ui.segmentButton.checked = self.segmenting
        ui.segmentButton.text = _("Stop segmenting in advance") if self.segmenting else _("Segment in advance")
        ui.listStatusLabel.text = self._status()
        ui.listStatusLabel.toolTip = plainTip("\n".join(self._details(known))) if known else ""
        ui.listProgressBar.visible = bool(known and known["total"])
        if known:
            ui.listProgressBar.maximum = max(1, known["total"])
            ui.listProgressBar.value = counts["done"] + counts["skipped"]
        ui.listSegmentingLabel.text = self._segmentingText()
        ui.listSegmentingLabel.visible = self.segmenting
        ui.scanFrame.visible = case is not None
        if case is not None:
            ui.scanLabel.text, ui.scanLabel.toolTip = case.name, plainTip(case.name)
            ui.scanInfoLabel.text = breakable(self._info(case))
        ui.editScanButton.enabled = case is not None and free
        ui.doneScanButton.visible = ui.skipScanButton.visible = case is not None
        ui.doneScanButton.enabled = ui.skipScanButton.enabled = free
        ui.nextScanButton.text = _("Later, next") if case is not None else _("Next scan")
        tip = (
            _("Give this scan back for later, and open the next.") if case is not None else _("Open the scan where correcting helps most.")
        )
        ui.nextScanButton.toolTip = tip
        ui.nextScanButton.enabled = free and left > 0
        text = self.busy or self.text
        ui.listMessageLabel.text = breakable(text, copied=True)
        ui.listMessageLabel.visible = bool(text)

    def _status(self) -> str:
        known = self.list
        if not self.folder:
            return _("Choose a folder, then add the scans that are to be corrected.")
        if known is None and self.desk.waiting:
            return _("Reading …")
        if known is None:
            return _("There is no list in this folder yet; add scans to begin one.") if self._warm and not self.text else ""
        counts = known["counts"]
        parts = [_("{done} of {total} scans done").format(done=counts["done"], total=known["total"])]
        mine = self.case is not None and self.case.folder == self.folder and (bool(self.busy) or not self.case.over)
        others = counts["taken"] - mine  # while it is busy the next one is taken
        for n, text in (
            (counts["skipped"], _("{n} skipped")),
            (others, _("{n} with other annotators")),
            (counts["failed"], _("{n} cannot be read or segmented")),
        ):
            if n > 0:
                parts.append(text.format(n=n))
        if known["models"] and known["unsegmented"] and not self.segmenting:
            parts.append(_("{n} not segmented yet").format(n=known["unsegmented"]))
        return ", ".join(parts) + "."

    def _details(self, known: dict[str, Any]) -> list[str]:
        """Who has what, as far as they gave their names, and why scans failed."""
        mine = self.case.name if self.case is not None and self.case.folder == self.folder else None
        others = [_("{name}: {by}").format(**each) for each in known["taken"] if each["by"] and each["name"] != mine]
        return [*others, *(each["error"] for each in known["failed"])]

    def _segmentingText(self) -> str:
        known = self.list
        if not self.segmenting or not known:
            return ""
        if not known["unsegmented"]:
            return _("All scans are segmented.")
        text = (
            _("Segmenting in advance waits for you: {n} left.")
            if self._paused
            else _("Segmenting in advance: {n} left, this one is at {percent} %.")
        )
        return text.format(n=known["unsegmented"], percent=round(100 * self._fraction))

    def _info(self, case: Case) -> str:
        if not case.model:
            return _("Not segmented in advance.")
        found = _("{model} found {n} segments.") if case.found != 1 else _("{model} found one segment.")
        text = found.format(model=case.model, n=case.found) if case.found else _("{model} found nothing.").format(model=case.model)
        return text + (
            " " + _("At its edge it is unsure by {value:.2f} (0 is sure, 1 undecided).").format(value=case.value)
            if case.value is not None
            else ""
        )


def _removeArrays(scan: dict[str, Any], folder: Path) -> None:
    from UNetSegmentationLib.worker.protocol import remove_files

    for name in filter(None, [*(c["file"] for c in scan["channels"]), scan["mask"]]):
        remove_files(folder, name)


def _stamp(segmentation: Any) -> int:
    """Changes with the segments and their voxels."""
    own = segmentation.GetSegmentation()
    times = [own.GetNumberOfSegments(), own.GetMTime()]
    for i in range(own.GetNumberOfSegments()):
        labelmap = own.GetNthSegment(i).GetRepresentation(slicer.vtkSegmentationConverter.GetBinaryLabelmapRepresentationName())
        times.append(labelmap.GetMTime() if labelmap is not None else 0)
    return max(times) * 64 + len(times) % 64
