"""What must be installed before the worker can run, asked once, and PyTorch for those who want it."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _
from UNetSegmentationLib import environment
from UNetSegmentationLib.environment import Done, Plan, Step
from UNetSegmentationLib.image import UserError
from UNetSegmentationLib.worker.client import child_environment, find_python

import UNetSegmentationPanel

from .worker import ChildProcess, variablesFor

REQUIREMENTS = Path(__file__).resolve().parents[1] / "Resources" / "requirements.txt"
WHEEL_FOLDER = "UNetSegmentation/WheelFolder"  # in the settings
TORCH_REQUIREMENT = ">=2.4"  # to run models, as in pyproject.toml; training has an environment of its own
NAME = "UNetSegmentation"


def wheelFolder() -> str:
    """The folder that packages are installed from instead of the network; "" for the network."""
    return str(qt.QSettings().value(WHEEL_FOLDER, "") or "")


def setWheelFolder(folder: str) -> None:
    qt.QSettings().setValue(WHEEL_FOLDER, str(folder))


def workerPython() -> tuple[str | None, dict[str, str] | None]:
    """(python, environment) for PanelWorker: PyTorch's own environment where it is ready, else None for Slicer's Python."""
    own = environment.own_environment()
    if own.status != "ready":
        return None, None
    return own.python, {**variablesFor(own.python), **own.variables}


def renewWorker() -> None:
    """PyTorch has come or gone: what the worker does next, it does with the Python that there is now."""
    worker = UNetSegmentationPanel._worker
    if worker is not None:
        worker.renew(*workerPython())


def ensureRequirements(confirm: Callable[[str], bool] | None = None) -> bool:
    """Whether onnxruntime is usable for the worker; asks once, and installs it. False where the person declines.

    confirm: asks a question (default: a dialog). A damaged installation is repaired; nothing else that Slicer's Python has
    changes. UserError with one sentence where it fails and no other wheel folder is chosen; trying again then starts from what
    is there.
    """
    if environment.own_environment().status == "ready":
        return True  # the worker runs there
    if confirm is None:
        confirm = functools.partial(slicer.util.confirmOkCancelDisplay, windowTitle=NAME, textFormat=qt.Qt.PlainText)
    requirements, failure = environment.read_requirements(REQUIREMENTS), ""
    while wanted := environment.to_install(states := environment.check(requirements)):
        _checkWritable()
        found = _plan(wanted, confirm, failure)
        if found is None:
            if failure:
                raise UserError(failure)
            return False
        plan, folder = found
        damaged = [_("{name} is damaged: {reason}.").format(name=s.name, reason=s.reason) for s in states if s.status == "broken"]
        question = _("{packages} will be installed from {source} into Slicer's Python. What Slicer has stays as it is. Continue?")
        if not confirm(" ".join([*damaged, question.format(packages=plan, source=folder or _("the network"))])):
            return False
        environment.remove_remnants(states)
        try:
            _install(wanted, environment.pins(states), folder)
        except UserError as e:  # also of an index that a firewall lets through without its files
            failure = str(e)
            continue
        importlib.invalidate_caches()
        if left := [s for s in environment.check(requirements) if s.status != "installed"]:
            reason = left[0].reason or _("it is not there")
            raise UserError(_("{name} was not installed ({reason}); try again.").format(name=left[0].name, reason=reason))
    return True


def _checkWritable() -> None:
    """UserError where nothing can be installed into Slicer's Python. By trying it: Windows' access rights say too little."""
    folder = Path(sysconfig.get_paths()["purelib"])
    probe = folder / f".{NAME}-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as e:
        text = _("Slicer's folder {folder} cannot be written ({reason}); ask who installed Slicer, or install Slicer for yourself.")
        raise UserError(text.format(folder=folder, reason=e.strerror or e)) from e


def _plan(wanted: Sequence[str], ask: Callable[[str], bool], problem: str = "") -> tuple[Plan, str] | None:
    """What would be installed, and the wheel folder or ""; None where the person gave up.

    Where the remembered folder does not serve any more, the network is tried, and the folder forgotten if that answers.
    problem: why what either had was not installed; then another folder is asked for.
    """
    folder = wheelFolder()
    if not problem:
        if folder:
            try:
                return environment.plan_folder(wanted, folder), folder
            except UserError as e:
                problem = str(e)
        found = _lookUp(wanted)
        if found is None:
            return None
        if not found.problem:
            setWheelFolder("")
            return found, ""
        problem = f"{problem} {found.problem}".strip()
    if slicer.app.testingEnabled():
        raise UserError(problem)
    while folder := _askForFolder(problem, folder, ask):
        try:
            plan = environment.plan_folder(wanted, folder)
            setWheelFolder(folder)
            return plan, folder
        except UserError as e:
            problem = str(e)
    return None


def _askForFolder(problem: str, former: str, ask: Callable[[str], bool]) -> str:
    """Another folder of wheels than the former one; "" where the person gave up."""
    if not ask(_("{problem} Choose a folder of wheels now?").format(problem=problem)):
        return ""
    return str(qt.QFileDialog.getExistingDirectory(None, _("Folder of wheels"), former or str(Path.home())) or "")


def _lookUp(wanted: Sequence[str]) -> Plan | None:
    """Asks the index, with a dialog to cancel it; None where that was done."""
    results: list[Plan] = []
    failures: list[str] = []

    def steps() -> environment.Steps:
        return environment.read_plan((yield environment.plan_step(find_python(), wanted)))

    job = Job(steps(), lambda fraction, text: None, results.append, failures.append)
    dialog = _busy(_("Looking up what has to be installed…"), cancel=True)
    try:
        while job.running and not dialog.wasCanceled:
            slicer.app.processEvents()
            time.sleep(0.01)
    finally:
        job.cancel()
        dialog.close()
        dialog.deleteLater()
    if failures:
        return Plan(complete=False, problem=failures[0])
    return results[0] if results else None


def _install(wanted: Sequence[str], pins: Sequence[str], folder: str) -> None:
    # By variables, since pip_ensure takes no options and PythonSlicer no arguments that are not ASCII (see files.py); as addresses,
    # since pip splits paths at spaces there.
    variables = {"PIP_ONLY_BINARY": ":all:"}
    if folder:
        variables |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": Path(folder).resolve().as_uri()}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        constraints = Path(temporary, "constraints.txt").resolve()
        constraints.write_text("\n".join(pins), "utf-8")
        variables["PIP_CONSTRAINT"] = " ".join(filter(None, [os.environ.get("PIP_CONSTRAINT"), constraints.as_uri()]))
        try:
            with _changed(variables):
                _pip(list(wanted))
        except (subprocess.CalledProcessError, RuntimeError) as e:
            logging.exception("pip failed.")
            text = _("The installation failed ({reason}); what pip said is in the Python console. Try again, or choose a folder of wheels.")
            reason = _("pip's exit code {code}").format(code=e.returncode) if isinstance(e, subprocess.CalledProcessError) else str(e)
            raise UserError(text.format(reason=reason)) from e


def _pip(wanted: list[str]) -> None:
    try:
        from slicer.packaging import pip_ensure
    except ImportError:  # Slicer 5.10
        dialog = _busy(_("Installing {packages}…").format(packages=", ".join(wanted)))
        try:
            slicer.util.pip_install(wanted)
        finally:
            dialog.close()
            dialog.deleteLater()
    else:
        pip_ensure(wanted, prompt_install=False, requester=NAME, skip_in_testing=False)


@contextmanager
def _changed(variables: Mapping[str, str]) -> Generator[None, None, None]:
    """os.environ, which Slicer's pip inherits, with these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _busy(text: str, cancel: bool = False) -> Any:
    dialog = slicer.util.createProgressDialog(labelText=text, windowTitle=NAME, windowModality=qt.Qt.ApplicationModal)
    dialog.setRange(0, 0)  # no end is known
    if not cancel:
        dialog.setCancelButton(None)
    dialog.show()
    slicer.app.processEvents()
    return dialog


# ---------------------------------------------------------------------------------------------------------------- processes


class Job:
    """Steps of UNetSegmentationLib.environment, one process after the other; the event loop goes on meanwhile.

    onProgress(fraction or None, text), and at the end exactly one of onDone(result), onError(sentence) and onCancelled(),
    called from the event loop. cleanup: gives the steps that follow a failure or a cancel, before that is told.
    """

    def __init__(
        self,
        steps: environment.Steps,
        onProgress: Callable[[float | None, str], Any],
        onDone: Callable[[Any], Any],
        onError: Callable[[str], Any],
        onCancelled: Callable[[], Any] = lambda: None,
        cleanup: Callable[[], environment.Steps] | None = None,
    ) -> None:
        self._steps, self._cleanup = steps, cleanup
        self._onProgress, self._onDone, self._onError, self._onCancelled = onProgress, onDone, onError, onCancelled
        self._process: ChildProcess | None = None
        self._step: Step | None = None
        self._output, self._line = b"", b""
        self._outcome: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self.pipFailed = False  # then a wheel folder may help, which it does not where the disk is too small
        self.running = True
        _jobs.add(self)
        qt.QTimer.singleShot(0, self._begin)

    def cancel(self) -> None:
        """End the running process; onCancelled() follows. Does nothing to a job that is over or failing."""
        if self.running and self._outcome is None:
            if self._process is not None:
                self._process.kill()
                self._process = None
            self._steps.close()
            self._fail(self._onCancelled)

    def _begin(self) -> None:
        if self._outcome is None and self.running:
            self._advance(None)

    def _advance(self, done: Done | None) -> None:
        try:
            self._step = step = self._steps.send(done)  # type: ignore[arg-type]  # None starts it
            self._output, self._line = b"", b""
            python = step.command[0]
            variables = environment.variables_of(step, child_environment(python, variablesFor(python)))
            self._process = ChildProcess(step.command, variables, self._heard, self._ended)
        except StopIteration as e:
            self._outcome = self._outcome or (self._onDone, (e.value,))
            qt.QTimer.singleShot(0, self._tell)
        except UserError as e:
            if self._outcome is None and self._step is not None:
                self.pipFailed = "pip" in self._step.command and ("folder of wheels" in str(e) or "pip failed" in str(e))
            self._fail(self._onError, str(e))
        except Exception as e:
            logging.exception("A step of an installation failed.")
            text = _("Something unexpected went wrong ({error}); please report it with the log.")
            self._fail(self._onError, text.format(error=f"{type(e).__name__}: {str(e)[:200]}"))
        else:
            if self._outcome is None:
                self._onProgress(None, step.text)

    def _heard(self, data: bytes) -> None:
        self._output += data
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace")
            pid = environment.child_pid(text)
            if pid is not None and self._process is not None:
                self._process.workerPid = pid
            fraction, what = environment.pip_progress(text)
            if (fraction is not None or what) and self._outcome is None and self._step is not None:
                self._onProgress(fraction, what or self._step.text)

    def _ended(self, code: int | None, reason: str) -> None:
        process, self._process = self._process, None
        log = process.log if process is not None else ""
        self._advance(Done(code, self._output.decode("utf-8", "replace"), log or reason))

    def _fail(self, callback: Callable[..., Any], *arguments: Any) -> None:
        """The first failure counts; the cleanup's own are only logged."""
        first = self._outcome is None
        self._outcome = self._outcome or (callback, arguments)
        if first and self._cleanup is not None:
            self._steps = self._cleanup()
            qt.QTimer.singleShot(0, lambda: self._advance(None))
        else:
            qt.QTimer.singleShot(0, self._tell)

    def _tell(self) -> None:
        if self.running and self._outcome is not None:
            callback, arguments = self._outcome
            self.running = False
            _jobs.discard(self)
            callback(*arguments)

    def abandon(self) -> None:
        """End the running process; nothing more is told."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        self._steps.close()
        self.running = False
        _jobs.discard(self)


_jobs: set[Job] = set()  # those that run, which nobody else may hold


def shutdown() -> None:
    """The application quits: end what runs. What is half made then is found and made again the next time."""
    for job in list(_jobs):
        job.abandon()


# ------------------------------------------------------------------------------------------------------------------ PyTorch


def describeTorch() -> str:
    """One line about it for the panel."""
    own = environment.own_environment()
    if own.status == "ready":
        return _("PyTorch {version} on {device}, {size}").format(version=own.torch, device=own.device, size=environment.megabytes(own.size))
    if own.status == "broken":
        return _("To be installed again: {reason}").format(reason=own.reason)
    if own.status == "busy":
        return own.reason
    if own.status == "foreign":
        return _("{folder} cannot be used: {reason}").format(folder=own.folder, reason=own.reason)
    return _("Not installed")


def planTorch(*answers: Any) -> Job:
    """Find out what createTorch() would fetch: onDone(plan), with str(plan) to ask about and plan.variant to go on with. answers: as
    of Job, here and below."""
    return Job(environment.plan_torch_steps(find_python(), "auto", _torchWheels()), *answers)


def createTorch(*answers: Any, variant: str = "auto", training: bool = False) -> Job:
    """Make PyTorch's own environment, with Slicer's Python; the worker is to be shut down before, and renewWorker() to follow."""
    python = find_python()
    return Job(environment.create_steps(python, variant, _torchWheels(), training), *answers, cleanup=lambda: _removeHalfMade(python))


def planTraining(*answers: Any) -> Job:
    """Find out what installTraining() would fetch: PyTorch's own environment with all that training needs, or what that lacks of
    it. onDone(plan), with str(plan) to ask about."""
    own = environment.own_environment()
    if own.status == "ready":
        return Job(environment.plan_training_steps(own, _torchWheels()), *answers)
    return Job(environment.plan_torch_steps(find_python(), "auto", _torchWheels(), training=True), *answers)


def installTraining(plan: Plan, *answers: Any) -> Job:
    """Install what planTraining() found; renewWorker() is to follow."""
    own = environment.own_environment()
    if own.status == "ready":
        return Job(environment.add_training_steps(own, _torchWheels()), *answers)
    return createTorch(*answers, variant=plan.variant or "auto", training=True)


def _torchWheels() -> str | None:
    """The wheel folder, where it was meant for PyTorch too."""
    folder = wheelFolder()
    return folder if folder and _hasTorch(folder) else None


def _hasTorch(folder: str) -> bool:
    return any(Path(folder).glob("torch-*.whl"))


def askForTorchWheels(problem: str, title: str) -> bool:
    """Whether a wheel folder with PyTorch was chosen, since nothing can be fetched (`problem`): then all is to be planned again."""
    folder = wheelFolder()
    while not slicer.app.testingEnabled():
        confirm = functools.partial(slicer.util.confirmOkCancelDisplay, windowTitle=title, textFormat=qt.Qt.PlainText)
        folder = _askForFolder(problem, folder, confirm)
        if not folder:
            break
        if _hasTorch(folder):
            setWheelFolder(folder)
            return True
        problem = _("The wheel folder {folder} has no wheel of torch.").format(folder=folder)
    return False


def _removeHalfMade(python: str) -> environment.Steps:
    if environment.own_environment().status == "broken":
        yield from environment.remove_steps(python)


def removeTorch(onDone: Callable[[Any], Any], onError: Callable[[str], Any], onCancelled: Callable[[], Any]) -> Job:
    """Remove PyTorch's own environment; the worker is to be shut down before. Cancelled, it is half there, as "broken"."""
    return Job(environment.remove_steps(find_python()), lambda fraction, text: None, onDone, onError, onCancelled)


def torchExtension() -> bool:
    """Whether the PyTorch extension is there, through which alone PyTorch may come into Slicer's Python."""
    return hasattr(slicer.modules, "pytorchutils")


def installTorchInSlicer() -> bool:
    """PyTorch into Slicer's Python by the PyTorch extension, which asks; False where the person declines."""
    if not torchExtension():
        raise UserError(_("The PyTorch extension is not installed; install it in the Extensions Manager and restart Slicer."))
    try:
        logic = importlib.import_module("PyTorchUtils").PyTorchUtilsLogic()
        if logic.torchInstalled():
            return True
        return logic.installTorch(askConfirmation=True, torchVersionRequirement=TORCH_REQUIREMENT) is not None
    except Exception as e:
        logging.exception("The PyTorch extension failed.")
        text = _("The PyTorch extension could not install PyTorch ({error}); restart Slicer and try again.")
        raise UserError(text.format(error=str(e)[:200] or type(e).__name__)) from e
