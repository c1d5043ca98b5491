"""Retrain a model on the training set: choose, watch, stop, resume, and decide on what came out.

What trains is a process of its own, which UNetSegmentationLib.training starts and finds again; another one looks at its files for
this section, since the drive that they lie on may hang.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _
from slicer.util import VTKObservationMixin

from . import inputs
from .models import breakable, cardTitle, plainTip
from .nodules import Pieces
from .trainingset import ANSWER_S, countText, silent

_POLL_MS, _AWAY_MS, _IDLE_MS = 1000, 5000, 60_000
_ROWS = 12  # of a table without scrolling
_UP, _DOWN = "▲", "▼"
_COLORS = {True: "#2a9d5c", False: "#e0483e"}  # better and worse, on light and on dark


class Watch:
    """The process that looks at trainings, started when it is first asked; UNetSegmentationLib.training.watch() says what it knows.

    It answers in turn, and later where a drive hangs.
    """

    def __init__(self) -> None:
        self._process: Any = None
        self._line = b""
        self._waiting: deque[Callable[[dict[str, Any]], None]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def ask(self, answered: Callable[[dict[str, Any]], None], **question: Any) -> None:
        """answered(answer) follows from the event loop, unless close() comes before."""
        from UNetSegmentationLib.worker.client import child_environment, find_python

        from .worker import ChildProcess, variablesFor

        if self._process is None:
            python = find_python()
            self._line = b""
            command = [python, "-m", "UNetSegmentationLib.training", "watch"]
            variables = child_environment(python, variablesFor(python))
            self._process = ChildProcess(command, variables, self._heard, self._ended)
        self._waiting.append(answered)
        self._process.write(json.dumps(question).encode() + b"\n")

    def close(self, seconds: float = 0.0) -> None:
        """seconds: to wait at most for the process's end, which nobody hears of when Slicer quits."""
        process, self._process = self._process, None
        self._waiting.clear()
        if process is not None:
            process.kill()
            if seconds:  # else this may be within one of the process's signals
                process.wait(seconds)

    def _heard(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # of a library
            if self._process is None or not isinstance(answer, dict):
                continue
            if "pid" in answer:
                self._process.workerPid = answer["pid"]
            elif self._waiting:
                self._waiting.popleft()(answer)

    def _ended(self, code: int | None, reason: str) -> None:
        process, self._process = self._process, None
        waiting, self._waiting = self._waiting, deque()
        if process is not None:
            text = _could_not(process.program, process.log or reason)
            for answered in waiting:
                answered({"error": text})


class RetrainSection(VTKObservationMixin):
    """The panel's section. panel: the UNetSegmentationWidget."""

    def __init__(self, panel: Any) -> None:
        super().__init__()
        self.panel = panel
        self.root = slicer.util.loadUI(panel.resourcePath("UI/Retrain.ui"))
        panel.addSection(self.root)
        self.ui = ui = slicer.util.childWidgetVariables(self.root)
        self.jobs: list[Any] = []
        self.job: Any = None  # of UNetSegmentationLib.training: the one that is shown
        self.result: dict[str, Any] = {}
        self._elsewhere: list[Any] = []  # trainings of other training sets that were seen to run
        self._lookedElsewhere = 0.0  # s
        self._ready = self._closed = self._entered = self._updating = False
        self._base: str | None = None  # the path that the person chose; None: the one that fits best
        self._of = ""  # the training set that this choice is for
        self._asked: list[str] = []  # what Train was pressed for; the installation that may come first takes minutes
        self._said = ""  # what went wrong with the last thing the person asked for
        self._stopping: tuple[Path, str] | None = None  # the training that was asked to stop, and its state then
        self._install: Any = None  # an installer's Job
        self._task: Any = None  # likewise, of what this module asks for
        self._watch, self._elsewhereWatch = Watch(), Watch()  # another drive holds up another process
        self._looked = ""  # the training set that was looked into last
        self._finds = 0
        self._found = False  # once in this session
        self._live: dict[str, Any] = {}  # the last of each event
        self._anew = True  # live.jsonl is to be read from its start
        self._shown: Any = None  # what the tables hold
        self._case = ""  # that is compared
        self._fetched = True  # its files were read
        self._question: Any = None  # for them, the last one
        self._curves: Any = None
        self._comparison: Any = None
        self._layouts: Any = None
        self._pictures: list[list[Any]] = []
        self._pieces = Pieces(self._onFailed)
        self._timer, self._late, self._idle = qt.QTimer(), qt.QTimer(), qt.QTimer()
        for timer, ms, method in (
            (self._timer, _POLL_MS, self._tick),
            (self._late, round(1000 * ANSWER_S), lambda: self._say(silent(self._folder))),
            (self._idle, _IDLE_MS, self._watch.close),
        ):
            timer.setSingleShot(True)
            timer.setInterval(ms)
            timer.connect("timeout()", method)
        self._manager = slicer.app.layoutManager()
        if self._manager is not None:
            self._manager.connect("layoutChanged(int)", self._onLayout)
        inputs.leaveWheel(ui.startCombo, ui.lengthCombo, ui.trainDeviceCombo, ui.jobCombo)
        for value, text in (("quick", _("Quick, some minutes")), ("full", _("Full, as long as it gets better"))):
            ui.lengthCombo.addItem(text, value)
        self.root.connect("contentsCollapsed(bool)", lambda *_: self._onExpanded())
        ui.startCombo.connect("activated(int)", self._onStart)
        ui.trainButton.connect("clicked(bool)", lambda *_: self.onTrain())
        ui.stopTrainingButton.connect("clicked(bool)", lambda *_: self.onStop())
        ui.resumeTrainingButton.connect("clicked(bool)", lambda *_: self.onResume())
        ui.finishTrainingButton.connect("clicked(bool)", lambda *_: self.onResume(finish=True))
        ui.curvesButton.connect("clicked(bool)", lambda on: self.onCurves(bool(on)))
        ui.jobCombo.connect("activated(int)", lambda index: self._choose(self.jobs[index]) if index < len(self.jobs) else None)
        ui.worstTable.connect("itemSelectionChanged()", self._onCase)
        ui.endCompareButton.connect("clicked(bool)", lambda *_: self._leaveViews())
        ui.useButton.connect("clicked(bool)", lambda *_: self.onDecide("use"))
        ui.keepButton.connect("clicked(bool)", lambda *_: self.onDecide("keep"))
        for button in (ui.discardButton, ui.dropTrainingButton):
            button.connect("clicked(bool)", lambda *_: self.onDecide("discard"))
        ui.shareButton.connect("clicked(bool)", lambda *_: self.onShare())
        panel.trainingSet.addListener(self._onTrainingSet)
        panel.modelList.onClickModel = panel.nodules.read  # a training can start from it, and clicks use it, at once
        ui.installBar.visible = False
        # A scene that is saved with a layout of ours would be empty views to those who do not know it.
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartSaveEvent, lambda *_: self._leaveViews())
        self._showJob()

    # ------------------------------------------------------------------------------------------------------- life cycle

    def read(self) -> None:
        """The core is there: look which trainings the training set has."""
        self._ready = True
        self._find()

    def enter(self) -> None:
        self._entered = True
        if self._ready:
            self._find()

    def leave(self) -> None:
        """Another module is opened: it gets its views back."""
        self._entered = False
        self._leaveViews()

    def closeScene(self) -> None:
        self._leaveViews()
        self._curves = self._comparison = None

    def close(self) -> None:
        """What trains goes on; nothing of ours is left in the scene."""
        self._closed = True
        for timer in (self._timer, self._late, self._idle):
            timer.stop()
        self._watch.close(1.0)
        self._elsewhereWatch.close(1.0)
        self.removeObservers()
        self._leaveViews()
        self._pieces.clear()
        if self._manager is not None:
            self._manager.disconnect("layoutChanged(int)", self._onLayout)
        if self._install is not None:
            self._install.cancel()
        if self._layouts is not None:
            from . import trainingviews

            for what in ("curves", "pictures", "comparison"):
                trainingviews.remove(slicer.mrmlScene, what)

    def update(self) -> None:
        """The panel's models or settings changed."""
        if self._ready and not self._closed:
            self._lookElsewhere(_AWAY_MS / 1000)
            self._showStart()

    # ------------------------------------------------------------------------------------------------ what a person does

    def onTrain(self) -> None:
        """Install what is missing, if the person agrees, and begin; or give up an installation that goes on."""
        if self._install is not None:
            self._install.cancel()
        elif not self._problem():
            combos = self.ui.startCombo, self.ui.lengthCombo, self.ui.trainDeviceCombo
            base, length, device = (combo.itemData(combo.currentIndex) for combo in combos)
            options = {"quick": length == "quick", "device": device or "auto"}
            self._asked = ["start", self._folder, base or "", json.dumps(options)]
            self._withPython(self._begin, self._plan)

    def onStop(self) -> None:
        job = self.job

        def stopped(answer: dict[str, Any]) -> None:
            self._stopping = None if "error" in answer else (job.folder, job.state)
            self._say(answer.get("error", ""))
            self._poll(0)

        self._look(stopped, stop=str(job.folder))

    def onResume(self, finish: bool = False) -> None:
        """Go on where it ended; finish: not with the training, but with the check of the best so far."""
        arguments = ["resume", str(self.job.folder), *["finish"] * finish]
        if wait := self._torchWorks():
            self._say(wait)
            return
        missing = _("What the training needs is not installed any more; press Train, which installs it.")
        self._withPython(lambda *python: self._ask(_("Going on …"), arguments, self._began, *python), lambda: self._say(missing))

    def onCurves(self, on: bool) -> None:
        from . import trainingviews

        if not on or self.job is None:
            self._leaveViews()
            return
        self._endComparison()
        if not self._views().show(trainingviews.CURVES):
            return
        self._curves = trainingviews.Curves(slicer.mrmlScene)  # nothing of a training that was shown before
        trainingviews.remove(slicer.mrmlScene, "pictures")
        trainingviews.show_charts(self._curves)
        self._anew, self._live, self._pictures = True, {}, []
        self._showViews()
        self._poll(0)

    def onDecide(self, how: str) -> None:
        """ "use", "keep" or "discard" what came out; a worse model, or throwing one away, only when asked for twice."""
        job = self.job
        if job is None:
            return
        question = ""
        if how == "discard":
            question = _("Delete the new model? The training set and the former model stay as they are.")
            if job.package is None:
                question = _("Delete what was trained so far? The training set and the former model stay as they are.")
        elif job.verdict == "worse":
            question = _("{sentence} Use it all the same?") if how == "use" else _("{sentence} Keep it all the same?")
            question = question.format(sentence=self.result.get("sentence") or _("The new model is worse on the held-out cases."))
        if question and not slicer.util.confirmYesNoDisplay(question, windowTitle=_("Retrain"), textFormat=qt.Qt.PlainText):
            return
        self._leaveViews()

        self._ask(
            _("Deleting the model …") if how == "discard" else _("Putting it into the list of models …"),
            ["promote", str(job.folder), how],
            self._decided,
        )

    def onShare(self) -> None:
        """Copy the package to where the person wants it."""
        from UNetSegmentationLib.files import UserError, atomic_path
        from UNetSegmentationLib.model import SUFFIX

        from .results import askFile

        package = self.job.package if self.job is not None else None
        if package is None:
            return
        target = askFile(_("Save the model"), package.name, _("Model packages (*{suffix})").format(suffix=SUFFIX), SUFFIX)
        if target is None:
            return
        try:
            with atomic_path(target) as temporary:
                shutil.copyfile(package, temporary)
            self._say(_("{file} can be sent to a colleague, who imports it under Model.").format(file=target.name))
        except (UserError, OSError) as e:
            self._say(str(e))

    def _onExpanded(self) -> None:
        if self._ready and not self.root.collapsed:
            self._find()
            if self._folder and self.panel.trainingSet.summary is None:
                self.panel.trainingSet.refresh()  # so that it can be said what would be learnt from

    def _onStart(self, index: int) -> None:
        self._base = self.ui.startCombo.itemData(index)
        self._showStart()

    def _onTrainingSet(self, *_unused: Any) -> None:
        if self._ready and not self._closed:
            if self._of != self._folder:
                self._of, self._base = self._folder, None
                if self._task is None and self._install is None:
                    self._said = ""
            self._find()

    def _onLayout(self, *_unused: Any) -> None:
        """A person may choose another layout at any time."""
        if self._layouts is not None and not self._closed:
            from .trainingviews import COMPARISON

            if self._case and self._layouts.shown != COMPARISON:
                self._endComparison()
            self._showViews()

    # ----------------------------------------------------------------------------------------------------- beginning it

    def _problem(self) -> str:
        """Why Train cannot be pressed, as one sentence; "" where it can."""
        if not self._folder:
            return _("Choose or make a training set above, and add corrected cases to it.")
        if self._trains():
            return _("A training is running; wait for its end, or stop it.")
        if wait := self._torchWorks():
            return wait
        summary = self.panel.trainingSet.summary
        if isinstance(summary, dict) and min(summary.get("count", 2), summary.get("patients", 2)) < 2:  # before PyTorch is fetched for it
            return _("The training set needs cases of at least two patients, one to learn from and one to be checked on.")
        model = self._start()
        return self._misfit(model) if model is not None else ""

    def _trains(self) -> bool:
        """Whether a training of the set runs on this computer; another's keeps nobody here from training."""
        return any(job.running_here for job in self.jobs)

    def _torchWorks(self) -> str:
        """One sentence while the panel's row installs or removes PyTorch, which a training would need; "" otherwise."""
        return _("Wait until PyTorch is installed or removed.") if self.panel.torchRow.working else ""

    def _needsTorch(self) -> str:
        """Why PyTorch must stay as it is, as one sentence; "" where it need not."""
        if self._install is not None:
            return _("Wait until what the training needs is installed, or cancel that.")
        running = [job for job in (*self.jobs, *self._elsewhere) if job.running_here]
        return _("Wait until the training is done, or stop it: it uses PyTorch.") if running or self._task is not None else ""

    def _start(self) -> Any:
        """The model that is started from; None: from scratch."""
        path = self.ui.startCombo.itemData(self.ui.startCombo.currentIndex)
        return next((m for m in self._models() if str(m.path) == path), None)

    def _models(self) -> list[Any]:
        """Those that a training can start from: automatic ones, and after them those of clicks."""
        return [m for m in (*self.panel.modelList.models, *self.panel.nodules.models) if m.card is not None and _trainable(m.card)]

    def _misfit(self, model: Any) -> str:
        """Why a model cannot go on with the training set, one sentence; "" where it can, or nobody knows yet."""
        from UNetSegmentationLib import training

        return training.misfit(model.card, self.panel.trainingSet.summary)

    def _likeliest(self, models: Sequence[Any]) -> str:
        """The start that is offered first: one that fits, if possible the panel's own choice, else one that knows a label of the set."""
        chosen = self.panel.modelList.selected
        from UNetSegmentationLib.model import label_key

        names = {label_key(str(label["name"])) for label in (self.panel.trainingSet.summary or {}).get("labels", ())}

        def less(model: Any) -> tuple[bool, ...]:
            known = {label.key for label in model.card.labels}
            return bool(self._misfit(model)), model not in chosen, not names & known

        best = min(models, key=less, default=None)
        return str(best.path) if best is not None and not self._misfit(best) else ""

    @property
    def _folder(self) -> str:
        return str(self.panel.trainingSet.folder)

    def _answers(self, done: Any) -> tuple[Any, ...]:
        return self._onProgress, done, self._onInstallFailed, lambda: self._onInstallEnd(_("Cancelled."))

    def _installing(self, text: str, job: Any) -> None:
        self._install = job
        self._onProgress(None, text)
        self._showStart()

    def _onProgress(self, fraction: float | None, text: str) -> None:
        self._said = text
        self.ui.installBar.maximum = 0 if fraction is None else 100  # 0: how long it takes is not known
        self.ui.installBar.value = 0 if fraction is None else round(100 * fraction)
        if not self._closed:
            self._showStart()

    def _onPlan(self, plan: Any) -> None:
        from . import installer

        # The job that is over is kept during the question, so that nobody else begins meanwhile.
        if plan.problem:
            self._onInstallFailed(plan.problem, offline=True)
            return
        question = _("To train, {what} must be downloaded and installed, in a folder of its own. Do it now?").format(what=plan)
        if self._closed or not slicer.util.confirmOkCancelDisplay(question, windowTitle=_("Retrain"), textFormat=qt.Qt.PlainText):
            self._onInstallEnd(_("Nothing was installed, so nothing was trained."))
            return
        self._installing(_("Installing …"), installer.installTraining(plan, *self._answers(lambda _result: self._installed())))

    def _installed(self) -> None:
        from .installer import renewWorker

        renewWorker()
        self._onInstallEnd("")
        if not self._closed:
            failed = _("What the training needs was not installed; try again.")
            self._withPython(self._begin, lambda: self._say(failed))

    def _onInstallFailed(self, problem: str, offline: bool = False) -> None:
        """As in packages.TorchRow."""
        from . import installer

        chosen = (offline or self._install.pipFailed) and not self._closed and installer.askForTorchWheels(problem, _("Retrain"))
        self._onInstallEnd("" if chosen else problem)
        if chosen and not self._closed:
            self._plan()

    def _onInstallEnd(self, text: str) -> None:
        self._install = None
        if not self._closed:
            self._say(text)

    def _plan(self) -> None:
        from . import installer

        if self.panel.controller.running:
            self._say(_("Wait until the segmentation is done: something has to be installed first."))
        elif wait := self._torchWorks():
            self._say(wait)
        else:
            self._installing(_("Looking up what the training needs …"), installer.planTraining(*self._answers(self._onPlan)))

    def _withPython(self, ready: Callable[..., Any], missing: Callable[[], Any]) -> None:
        """ready(python, variables) with the Python that can train, or missing(). Many packages are looked at for it."""

        def found(answer: dict[str, Any]) -> None:
            from UNetSegmentationLib.worker.client import find_python

            from .worker import variablesFor

            python = answer["python"]
            if python and not answer["variables"]:
                python = find_python()  # Slicer's own, which behind its launcher names itself without it (python-real)
            if python:
                ready(python, {**variablesFor(python), **answer["variables"]})
            else:
                missing()

        self._ask(_("Looking for what the training needs …"), ["python"], found)

    def _begin(self, python: str, variables: dict[str, str]) -> None:
        if self._asked[1] != self._folder:
            self._say(_("Another training set was chosen meanwhile, so nothing was started; press Train again."))
            return
        if wait := self._torchWorks():
            self._say(wait)
            return
        self._ask(_("Starting …"), self._asked, self._began, python, variables)

    def _began(self, answer: dict[str, Any]) -> None:
        from UNetSegmentationLib import training

        self._leaveViews()
        self._stopping = None  # it may be the same one, resumed
        job = training.decode(answer["job"])
        self.jobs = [job, *(j for j in self.jobs if j.folder != job.folder)]
        self._choose(job)
        self._find()

    def _ask(self, text: str, arguments: Sequence[str], then: Any, python: str = "", variables: Any = None) -> None:
        """A task of UNetSegmentationLib.training in a process of its own; then(answer). python: default Slicer's."""
        from UNetSegmentationLib.environment import Step
        from UNetSegmentationLib.files import escape_arguments
        from UNetSegmentationLib.worker.client import find_python

        from .installer import Job

        def done(answer: dict[str, Any]) -> None:
            self._task = None
            if not self._closed:
                self._say("")
                then(answer)

        def failed(sentence: str) -> None:
            self._task = None
            if not self._closed:
                self._say(sentence)

        if self._task is None:
            command = (python or find_python(), "-m", "UNetSegmentationLib.training", *escape_arguments(arguments))
            self._task = Job(_answer(Step(text, command, variables or {})), lambda *_unused: None, done, failed)
            self._say(text)

    def _decided(self, answer: dict[str, Any]) -> None:
        """The model list has it, and it is chosen."""
        from UNetSegmentationLib import training
        from UNetSegmentationLib.model import SUFFIX

        path = Path(answer["path"]) if answer["path"] else None
        panel = self.panel
        if path is not None:
            panel.modelList.read()
            panel.nodules.read()
            model = next((m for m in panel.modelList.models if m.path == path and m.card is not None), None)
            names = {m.path: m.name for m in (*panel.modelList.models, *panel.nodules.models)}
            name = names.get(path, path.name.removesuffix(SUFFIX))
            if model is None:
                panel._keepChoice("clickModel", name)
            else:
                panel._keepModels(model.card, [name])
            self._base = str(path)
            slicer.util.showStatusMessage(_("{name} is in the list of models, and chosen.").format(name=name), 5000)
        self._take(training.decode(answer["job"]))
        self._showStart()

    # -------------------------------------------------------------------------------------------------------- following it

    def _find(self) -> None:
        """Look again which trainings there are; the one that was shown, or that runs, or the latest, is shown then."""
        folder = self._folder
        self._finds += 1
        if folder != self._looked:
            self._looked = folder
            self._watch.close()  # it may wait for the former one's drive
            self._late.stop()
            self._elsewhere += [job for job in self.jobs if job.running]
            self.jobs = []
            self._choose(None)
        if folder:
            number = self._finds
            self._look(lambda answer: self._onFound(answer) if number == self._finds else None, find=folder)
        self._lookElsewhere()
        self._showStart()

    def _onFound(self, answer: dict[str, Any]) -> None:
        from UNetSegmentationLib import training

        if "error" in answer:
            self._say(answer["error"])
            return
        before = [job for job in (*self._elsewhere, *self.jobs) if job.running]
        self.jobs = [training.decode(job) for job in answer["jobs"]]
        here = {job.folder for job in self.jobs}
        self._elsewhere = [job for job in before if job.folder not in here]
        wanted = self.job.folder if self.job is not None else None
        # Else the one that runs, which may be an older one that was resumed: it keeps others from starting.
        ranked = sorted(self.jobs, key=lambda job: (job.folder != wanted, not job.running))
        self._choose(ranked[0] if ranked else None)
        self._showStart()
        first, self._found = not self._found, True
        job = self.job
        if first and job is not None and (job.running or job.state == "lost" or self._undecided(job)):
            self.root.collapsed = False  # it is found again

    def _lookElsewhere(self, patience: float = 0.0) -> None:
        """Which trainings of other training sets still run. patience: s after the last look in which that still counts."""
        watch, asked = self._elsewhereWatch, {str(job.folder) for job in self._elsewhere}
        if not asked or watch.busy or time.monotonic() - self._lookedElsewhere < patience:
            return
        self._lookedElsewhere = time.monotonic()

        def answered(answer: dict[str, Any]) -> None:
            watch.close()
            over = asked - set(answer.get("running", asked))
            self._elsewhere = [job for job in self._elsewhere if str(job.folder) not in over]
            self._showStart()

        watch.ask(answered, running=sorted(asked))

    def _look(self, answered: Callable[[dict[str, Any]], None], **question: Any) -> None:
        """Ask how trainings of the training set stand. A drive that hangs is told, and waited for."""

        def done(answer: dict[str, Any]) -> None:
            self._late.stop()
            if self._watch.busy:
                self._late.start()
            self._idle.start()
            if self._said == silent(self._folder):
                self._said = ""
            answered(answer)

        self._idle.stop()
        if not self._watch.busy:
            self._late.start()
        self._watch.ask(done, **question)

    def _choose(self, job: Any) -> None:
        if job is None or self.job is None or job.folder != self.job.folder:
            self._leaveViews()
            self._anew, self._live, self._case, self.result = True, {}, "", {}
        self.job = job
        if job is not None and job.running:
            self.result = {}
        self._fillJobs()
        self._showJob()
        if job is not None:
            self._poll(0)

    def _take(self, job: Any) -> None:
        """How a training stands now."""
        self.jobs = [job if j.folder == job.folder else j for j in self.jobs]
        if self.job is not None and self.job.folder == job.folder:
            self._choose(job)

    def _poll(self, milliseconds: int) -> None:
        if not self._closed:
            self._timer.start(milliseconds)

    def _tick(self) -> None:
        """Look how the shown training stands."""
        if self._closed or self.job is None:
            return
        folder, again, self._anew = self.job.folder, self._anew, False
        self._look(lambda answer: self._onLook(folder, answer), look=str(folder), again=again)

    def _onLook(self, folder: Path, answer: dict[str, Any]) -> None:
        from UNetSegmentationLib import training

        before, trouble = self.job, answer.get("error", "")
        if before is None or before.folder != folder:
            return
        job = before if trouble else training.decode(answer["job"])
        lines, anew, more = answer.get("lines", []), answer.get("anew", False), answer.get("more", False)
        if anew:
            self._live = {}
        for line in lines:
            self._live[str(line.get("event"))] = line
        if self._showsCurves:
            self._curves.show(lines, anew)
            self._showPictures(answer.get("pictures", []))
        self.job = job
        self.jobs = [job if j.folder == job.folder else j for j in self.jobs]
        if not trouble:
            self.result = answer["result"] or {}
        if before.running and not job.running:
            slicer.util.showStatusMessage(f"{_('Retrain')}: {_states()[job.state]}", 10000)
            self._showStart()
            self._fillJobs()
        elif job.state != before.state:
            self._fillJobs()
        self._showJob(trouble)
        if more:
            self._poll(0)
        elif job.running or trouble:
            self._poll(_POLL_MS if self._entered and not trouble else _AWAY_MS)

    # --------------------------------------------------------------------------------------------------------- the views

    def _views(self) -> Any:
        from .trainingviews import Layouts

        if self._layouts is None:
            self._layouts = Layouts()
        return self._layouts

    @property
    def _showsCurves(self) -> bool:
        if self._layouts is None or self._curves is None or not self._curves.alive:
            return False
        from .trainingviews import CURVES

        return self._layouts.shown == CURVES

    def _showPictures(self, stamps: list[list[Any]]) -> None:
        """stamps: path and time of each."""
        from . import trainingviews

        if not stamps or stamps == self._pictures:
            return
        new, self._pictures = not trainingviews.ours(slicer.mrmlScene, "pictures"), stamps
        paths = [Path(path) for path, _time in stamps]

        def steps() -> Generator[None, None, None]:
            node = yield from trainingviews.picture_steps(slicer.mrmlScene, paths)
            if node is not None:
                trainingviews.show_volume(node, [trainingviews.EXAMPLES], fit=new)

        self._pieces.add(steps())

    def _onCase(self) -> None:
        """Show the chosen case before and after."""
        from UNetSegmentationLib.model import read_card

        from . import trainingviews

        rows = {item.row() for item in self.ui.worstTable.selectedItems()}
        worst = self._worst()
        if self._updating or len(rows) != 1 or not max(rows) < len(worst):
            return
        case = worst[rows.pop()]
        job, name = self.job, str(case["case"])
        files = {key: job.folder / str(path) for key, path in case["files"].items()}
        if not self._views().show(trainingviews.COMPARISON):
            return
        self._pieces.clear()
        self._case, self._fetched = name, False
        comparison = self._comparison = self._comparison or trainingviews.Comparison(slicer.mrmlScene)
        comparison.clear()
        pair = [trainingviews.BEFORE, trainingviews.AFTER]
        desk = self.panel.workList.desk

        def steps(found: dict[str, Any]) -> Generator[None, None, None]:
            labels = read_card(job.package).labels
            yield
            yield from comparison.steps(name, found, desk.folder, labels)
            trainingviews.show_volume(comparison.volume, pair, linked=True)
            comparison.jump()
            self._showViews()

        question = self._question = object()

        def wanted() -> bool:  # the case may have been chosen again since, in a scene that was closed meanwhile
            return self._question is question and bool(self._case) and self.job is not None and self.job.folder == job.folder

        def read(found: dict[str, Any]) -> None:
            if wanted():
                self._fetched = True
                self._pieces.add(steps(found))
            elif desk.folder is not None:
                trainingviews.discard(found, desk.folder)

        desk.ask("compare", read, lambda text: self._onFailed(text) if wanted() else None, files={k: str(v) for k, v in files.items()})
        self._showViews()

    def _onFailed(self, text: str) -> None:
        """A file could not be shown."""
        if self._case:
            self._leaveViews()
        self._say(text)

    def _endComparison(self) -> None:
        self._pieces.clear()
        self._case, self._fetched = "", True
        if self._comparison is not None:
            self._comparison.clear()
        before, self._updating = self._updating, True
        self.ui.worstTable.clearSelection()
        self._updating = before

    def _leaveViews(self) -> None:
        """The layout before ours, where ours is on."""
        if self._layouts is not None:
            self._endComparison()
            self._layouts.leave()
            self._pictures = []
            self._showViews()

    def _showViews(self) -> None:
        if self._layouts is None:
            return
        from .trainingviews import COMPARISON, CURVES

        ui, shown = self.ui, self._layouts.shown
        ui.curvesButton.checked = shown == CURVES
        comparing = shown == COMPARISON and bool(self._case)
        ui.compareWidget.visible = comparing
        if comparing:
            parent = self.result.get("parent") or _("nothing to compare with")
            text = _("{case}. Left: {parent}. Right: the new model. Green outline: the corrected mask.")
            ui.compareNote.text = text.format(case=self._case, parent=parent)

    # ------------------------------------------------------------------------------------------------- what is to be seen

    def _say(self, text: str) -> None:
        self._said = text
        self._showStart()

    def _showStart(self) -> None:
        """What a new training would start from, and whether it can."""
        from .run import deviceChoices

        ui, models = self.ui, self._models()
        choices = [*((str(m.path), cardTitle(m.card)) for m in models), ("", _("Nothing: a new model, from scratch"))]
        base = self._base if self._base in dict(choices) else self._likeliest(models)  # the chosen one may be gone
        inputs.fill(ui.startCombo, choices, base)
        ui.startCombo.toolTip = plainTip(ui.startCombo.currentText)  # which a narrow panel cuts off
        devices = deviceChoices()
        inputs.fill(ui.trainDeviceCombo, devices, ui.trainDeviceCombo.itemData(ui.trainDeviceCombo.currentIndex))
        ui.trainDeviceLabel.visible = ui.trainDeviceCombo.visible = len(devices) > 2
        problem, installing = self._problem(), self._install is not None
        text = self._said or problem or self._describeSet()
        ui.trainMessage.text = breakable(text)
        ui.trainMessage.visible = bool(text)
        ui.installBar.visible = installing
        ui.trainButton.text = _("Cancel") if installing else _("Train")
        free = self._task is None and not installing  # whose end asks for a task, and there is one at a time
        ui.trainButton.enabled = installing or not problem and free
        for each in (ui.decideWidget, ui.dropTrainingButton):
            each.enabled = free
        for button in (ui.resumeTrainingButton, ui.finishTrainingButton):
            button.enabled = free and not self._trains()
        tip = _("Make a new model in the background; this one and the training set stay as they are.")
        ui.trainButton.toolTip = plainTip(problem or tip)
        self.panel.torchRow.hold(self._needsTorch())

    def _describeSet(self) -> str:
        """What would be learnt from, and what the model that is started from does not know."""
        from UNetSegmentationLib.model import label_key

        summary = self.panel.trainingSet.summary
        if not isinstance(summary, dict):
            return ""
        names = [str(label["name"]) for label in summary.get("labels", ())]
        text = countText(summary) + " " + _("Labels: {names}.").format(names=", ".join(names) or "–")
        model = self._start()
        card = model.card if model is not None else None
        if card is not None and card.data["task"] == "click":
            return f"{text} {_('Simulated clicks teach it: every connected part of a label is a lesion.')}"
        known = {label.key for label in card.labels} if card is not None else set()
        fresh = [name for name in names if label_key(name) not in known] if card is not None else []
        if fresh:
            text += " " + _("{model} does not know {labels}: that is learnt anew.").format(model=cardTitle(card), labels=", ".join(fresh))
        return text

    def _fillJobs(self) -> None:
        ui, states = self.ui, _states()
        choices = []
        for job in self.jobs:
            date = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
            choices.append((str(job.folder), f"{date} · {job.name or job.base} · {states.get(job.state, job.state)}"))
        inputs.fill(ui.jobCombo, choices, str(self.job.folder) if self.job is not None else "")
        ui.jobCombo.visible = len(choices) > 1

    @staticmethod
    def _undecided(job: Any) -> bool:
        return job.state in ("finished", "stopped") and job.package is not None and not job.decided

    def _showJob(self, trouble: str = "") -> None:
        """How the training that is shown stands."""
        ui, job = self.ui, self.job
        ui.jobWidget.visible = job is not None
        title = _("Retrain")
        if job is None:
            ui.outcomeWidget.visible = False
        else:
            ui.jobBar.visible = job.running
            if job.running:
                percent = round(100 * job.fraction)
                title = f"{title}: {percent} %"
                if ui.jobBar.value != percent:
                    ui.jobBar.value = percent
            elif job.state == "lost" or self._undecided(job):
                title = f"{title}: {_states()[job.state]}"
            text = breakable(trouble or self._describeJob(job))
            if ui.jobMessage.text != text:
                ui.jobMessage.text = text
            ui.stopTrainingButton.visible = job.running
            ui.stopTrainingButton.enabled = job.state != "checking" and self._stopping != (job.folder, job.state)
            ui.resumeTrainingButton.visible = job.resumable
            ui.dropTrainingButton.visible = job.resumable and job.package is None
            ui.finishTrainingButton.visible = job.resumable and job.kept and job.package is None
            ui.curvesButton.enabled = "start" in self._live or self._layouts is not None and ui.curvesButton.checked
            self._showOutcome(job)
        if self.root.text != title:
            self.root.text = title
        self._showViews()

    def _describeJob(self, job: Any) -> str:
        if not job.running:
            if job.text and not job.decided and (job.state in ("failed", "lost") or job.package is None):
                return job.text
            state = _states()[job.state][0].upper() + _states()[job.state][1:]
            return f"{state}. {self._fate(job)}".strip()
        if self._stopping == (job.folder, job.state):
            return _("Stopping …")
        words = {"preparing": _("Preparing"), "training": _("Training"), "checking": _("Checking on held-out cases")}
        parts = [words[job.state]]
        if job.state == "preparing" and job.text:
            parts = [job.text]
        if job.state == "training":
            last = max((line for k, line in self._live.items() if k in ("step", "validation")), key=lambda v: v.get("step", 0), default={})
            total = self._live.get("start", {}).get("steps")
            if last.get("step"):
                step = _("step {step}").format(step=last["step"])
                parts.append(_("step {step} of {total}").format(step=last["step"], total=total) if total else step)
            now, best = self._live.get("validation", {}).get("dice"), job.dice
            if isinstance(best, (int, float)):
                again = isinstance(now, (int, float)) and abs(now - best) > 5e-4
                parts.append(_("Dice {now:.3f}, best {best:.3f}").format(now=now, best=best) if again else f"Dice {best:.3f}")
        if job.seconds_left is not None:
            left = _("about {time} of {whole} left") if job.estimate else _("about {time} left")
            parts.append(left.format(time=_duration(job.seconds_left), whole=_duration(job.estimate or 0)))
        return " · ".join(parts)

    def _fate(self, job: Any) -> str:
        if job.decided:
            use = _("It is used.")
            if job.base:
                use = _("It is used in place of {base}.") if _replaces(job) else _("It is used; {base} stays.")
            return {
                "use": use.format(base=job.base),
                "keep": _("It is kept beside {base}.").format(base=job.base) if job.base else _("It is kept."),
                "discard": _("What came out was discarded."),
            }[job.decided]
        return ""

    # ----------------------------------------------------------------------------------------------------- what came out

    def _worst(self) -> list[dict[str, Any]]:
        """The worst cases that can be shown, of files of the job: it lies in a folder that others may write to."""
        from UNetSegmentationLib.files import is_inner

        worst = self.result.get("worst")
        rows = [w for w in worst if isinstance(w, dict)] if isinstance(worst, list) else []
        rows = [w for w in rows if isinstance(w.get("files"), dict) and {"image", "truth", "after"} <= set(w["files"])]
        return [w for w in rows if all(is_inner(str(path)) for path in w["files"].values())]

    def _showOutcome(self, job: Any) -> None:
        ui, result = self.ui, self.result
        shown = not job.running and bool(result) and job.package is not None
        ui.outcomeWidget.visible = shown
        state = (str(job.folder), job.state, job.decided, shown, result.get("sentence"))
        if not shown or state == self._shown:
            self._shown = state
            return
        self._shown = state
        undecided = not job.decided
        ui.verdictLabel.text = breakable(str(result.get("sentence") or ""))
        ui.verdictLabel.visible = bool(ui.verdictLabel.text)
        font = ui.verdictLabel.font
        font.setBold(job.verdict == "worse")
        ui.verdictLabel.font = font
        self._fillScores(result)
        ui.scoreNote.text = str(result.get("note") or "")
        ui.scoreNote.visible = bool(ui.scoreNote.text)
        self._fillWorst(self._worst())
        ui.decideWidget.visible = undecided
        # What is not the better choice is not the first one that is offered.
        instead = _replaces(job)
        tip = _("Put it in the place of {base} and choose it.") if instead else _("Put it into the list of models and choose it.")
        ui.useButton.toolTip = plainTip(tip.format(base=job.base))
        ui.keepButton.visible = instead
        ui.keepButton.toolTip = plainTip(_("Put it beside {base}, under a name of its own.").format(base=job.base))

    def _fillScores(self, result: dict[str, Any]) -> None:
        labels = result.get("labels") if isinstance(result.get("labels"), dict) else {}
        groups = [(str(name), own) for name, own in labels.items() if isinstance(own, dict)]
        mean = result.get("mean")
        if len(groups) > 1 and isinstance(mean, dict):
            groups.insert(0, (_("All labels"), mean))
        rows: list[tuple[str, ...] | str] = []
        tips: list[str] = []
        for name, own in groups:
            if len(groups) > 1:
                rows.append(name)
                tips.append(name)
            for key, (title, digits, tip) in _figures().items():
                if isinstance(own.get(key), dict):
                    before, after, change = (own[key].get(k) for k in ("before", "after", "change"))
                    rows.append((title, _score(before, digits), _score(after, digits) + _trend(key, change)))
                    tips.append(tip + (_("; change {change}").format(change=_score(change, digits, sign=True)) if change else ""))
        table = self.ui.scoreTable
        inputs.prepareTable(table, ["", _("Before"), _("After")], len(rows))
        for i, row in enumerate(rows):
            if isinstance(row, str):
                table.setSpan(i, 0, 1, 3)
                item = qt.QTableWidgetItem(row)
                font = item.font()
                font.setBold(True)
                item.setFont(font)
                table.setItem(i, 0, item)
                continue
            for j, text in enumerate(row):
                item = qt.QTableWidgetItem(text)
                item.setTextAlignment(int(qt.Qt.AlignVCenter) | int(qt.Qt.AlignRight if j else qt.Qt.AlignLeft))
                item.setToolTip(plainTip(tips[i]))
                if text.endswith((_UP, _DOWN)):
                    good = text.endswith(_UP) == row[0].startswith(_figures()["dice"][0])
                    item.setForeground(qt.QBrush(qt.QColor(_COLORS[good])))
                table.setItem(i, j, item)
        inputs.fitTable(table, _ROWS, 0)

    def _fillWorst(self, worst: Sequence[dict[str, Any]]) -> None:
        ui, table = self.ui, self.ui.worstTable
        ui.worstLabel.visible = table.visible = bool(worst)
        before, self._updating = self._updating, True
        inputs.prepareTable(table, [_("Case"), _("Dice before"), _("Dice after")], len(worst))
        for i, row in enumerate(worst):
            for j, text in enumerate((str(row["case"]), _plain(row.get("dice_before")), _plain(row.get("dice_after")))):
                item = qt.QTableWidgetItem(text)
                item.setTextAlignment(int(qt.Qt.AlignVCenter) | int(qt.Qt.AlignRight if j else qt.Qt.AlignLeft))
                item.setToolTip(plainTip(str(row["case"])))
                table.setItem(i, j, item)
        inputs.fitTable(table, _ROWS, 0)
        self._updating = before


def _answer(step: Any) -> Generator[Any, Any, dict[str, Any]]:
    """The process's answer; UserError with its sentence."""
    from UNetSegmentationLib.environment import answer_of
    from UNetSegmentationLib.files import UserError

    done = yield step
    answer = answer_of(done) or {}
    if "error" in answer:
        raise UserError(answer["error"])
    if not answer:
        raise UserError(_could_not(step.command[0], done.log))
    return answer


def _could_not(python: str, log: str) -> str:
    last = (log.strip().splitlines() or [_("it said nothing")])[-1][:200]
    return _("The Python at {python} could not do it ({reason}); try again.").format(python=python, reason=last)


# ---------------------------------------------------------------------------------------------------------------- words


def _states() -> dict[str, str]:
    return {
        "preparing": _("preparing"),
        "training": _("training"),
        "checking": _("checking"),
        "finished": _("finished"),
        "stopped": _("stopped"),
        "failed": _("failed"),
        "lost": _("interrupted"),
    }


def _figures() -> dict[str, tuple[str, int, str]]:
    """Key in result.json: title of the row, digits, what it means."""
    return {
        "dice": (_("Dice"), 3, _("Overlap with the corrected mask: 1 is all, 0 is none")),
        "dice_3_clicks": (_("Dice, 3 clicks"), 3, _("The same after three clicks; the other rows are after one")),
        "hausdorff95_mm": (_("HD95 (mm)"), 2, _("Hausdorff distance of the outlines, 95th percentile: 0 is perfect")),
        "volume_error_percent": (_("Vol. error (%)"), 1, _("Volume error in percent of the corrected mask's: 0 is perfect")),
    }


def _trainable(card: Any) -> bool:
    """Whether it carries what a training starts from."""
    return "model.safetensors" in card.data.get("files", {}) and "network" in card.data


def _replaces(job: Any) -> bool:
    """Whether the new model has its base's name and would take its place; one of another task does not."""
    return bool(job.base) and job.name == job.base.rpartition("-")[0]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return _("{n} s").format(n=max(1, round(seconds)))
    minutes = round(seconds / 60)
    return _("{n} min").format(n=minutes) if minutes < 120 else _("{h} h {m} min").format(h=minutes // 60, m=minutes % 60)


def _plain(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"


def _score(figure: Any, digits: int, sign: bool = False) -> str:
    """A mean with its interval, which has a digit less where there are three: "0.861 (0.84–0.88)"."""
    if not isinstance(figure, dict) or not isinstance(figure.get("mean"), (int, float)):
        return "–"
    low, high, few = figure.get("low"), figure.get("high"), min(digits, 2)
    plus = "+" if sign else ""
    mean = f"{figure['mean']:{plus}.{digits}f}"
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return mean
    between = f"{low:{plus}.{few}f} {_('to')} {high:{plus}.{few}f}" if min(low, high) < 0 or sign else f"{low:.{few}f}–{high:.{few}f}"
    return f"{mean} ({between})"


def _trend(key: str, change: Any) -> str:
    """An arrow where the change is more than chance: its interval does not hold 0, of five cases at least (as in the training's
    verdict). An error that may be of either sign has none."""
    if key == "volume_error_percent" or not isinstance(change, dict) or change.get("cases", 0) < 5:
        return ""
    low, high = change.get("low"), change.get("high")
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or low <= 0 <= high:
        return ""
    return " " + (_UP if low > 0 else _DOWN)
