"""PyTorch for those who want it: one row that says what is there, and installs or removes it.

With the PyTorch extension it goes into Slicer's Python, through that extension alone; without, into a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from . import closeWorker
from .models import breakable


class TorchRow:
    """changed() is called when PyTorch has come or gone, and leave() before it goes, beside closeWorker(), for all else that uses it.
    Nothing is looked up before show()."""

    def __init__(self, ui: Any, changed: Callable[[], None], leave: Callable[[], None]) -> None:
        self.ui, self._changed, self._leave = ui, changed, leave
        self._job: Any = None
        self._said = self._held = self._of = ""  # _of: PyTorch's status when that was said
        self._tip = ui.torchButton.toolTip
        self._closed = self._extensions = self._through = self._busy = False
        ui.torchButton.connect("clicked(bool)", lambda *_: self._onClicked())

    def show(self, busy: bool = False) -> None:
        """busy: a run goes on, which needs what is installed."""
        from UNetSegmentationLib.environment import own_environment

        from .installer import describeTorch, torchExtension

        ui, status = self.ui, own_environment().status
        ready, self._through = status == "ready", status == "none" and torchExtension()
        version = self._slicersTorch() if not ready else ""
        there = _("PyTorch {version} in Slicer's Python").format(version=version) if version else describeTorch()
        if self._job is None and status != self._of:
            self._said = ""  # Retrain has installed PyTorch, say
        ui.torchStatus.text = breakable(self._said or there)
        ui.torchButton.text = _("Cancel") if self._job else _("Remove") if ready else _("Install…")
        self._extensions = bool(version)
        self.block(busy)

    def block(self, busy: bool) -> None:
        """busy: a run goes on. What the PyTorch extension has put there is that extension's to remove."""
        self._busy = busy
        held = "" if self.working else self._held  # what works can be cancelled
        self.ui.torchButton.enabled = not busy and not self._extensions and not held
        through = _("Optional, for graphics cards. The PyTorch extension puts it into Slicer's Python; training gets a folder of its own.")
        self.ui.torchButton.toolTip = held or (through if self._through else self._tip)

    def hold(self, why: str) -> None:
        """why: as one sentence, what must end before PyTorch may come or go; "" for nothing."""
        if why != self._held:
            self._held = why
            self.block(self._busy)

    def close(self) -> None:
        self._closed = True
        if self._job is not None:
            self._job.cancel()

    @property
    def working(self) -> bool:
        return self._job is not None

    @staticmethod
    def _slicersTorch() -> str:
        """The version of the PyTorch that the PyTorch extension put into Slicer's Python; "" where it did not."""
        from .installer import torchExtension

        try:
            return metadata.version("torch") if torchExtension() else ""
        except metadata.PackageNotFoundError:
            return ""

    def _installInSlicer(self) -> None:
        """The PyTorch extension asks, shows and waits by itself."""
        from UNetSegmentationLib import UserError

        from .installer import installTorchInSlicer

        closeWorker()  # the next one is to see it
        try:
            text = "" if installTorchInSlicer() else _("Nothing was installed.")
        except UserError as e:
            text = str(e)
        self._onEnd(text)

    def _onClicked(self) -> None:
        from UNetSegmentationLib.environment import own_environment

        from . import installer

        if self._job is not None:
            self._job.cancel()
            return
        own = own_environment()
        if own.status == "none" and installer.torchExtension():
            self._installInSlicer()
        elif own.status == "busy":
            self._onEnd("")  # which shows how it stands now
        elif own.status == "ready":
            question = _("Remove {what} from this computer?").format(what=installer.describeTorch())
            if slicer.util.confirmOkCancelDisplay(question, windowTitle="PyTorch", textFormat=qt.Qt.PlainText):
                self._remove()
        else:
            again = self._askAgain(own.reason) if own.status == "broken" else True
            if again:
                self._plan()
            elif again is False:
                self._remove()

    @staticmethod
    def _askAgain(reason: str) -> bool | None:
        """What is to become of a PyTorch that is not whole: install it again, remove it, or None for nothing."""
        box = qt.QMessageBox(slicer.util.mainWindow())
        box.windowTitle = "PyTorch"
        box.textFormat = qt.Qt.PlainText
        box.text = _("PyTorch cannot be used ({reason}). Install it again, or remove it from this computer?").format(reason=reason)
        box.setStandardButtons(qt.QMessageBox.Yes | qt.QMessageBox.No | qt.QMessageBox.Cancel)
        box.button(qt.QMessageBox.Yes).text = _("Install again")
        box.button(qt.QMessageBox.No).text = _("Remove")
        answer = int(box.exec_())
        box.deleteLater()  # its parent would keep it
        return {int(qt.QMessageBox.Yes): True, int(qt.QMessageBox.No): False}.get(answer)

    def _remove(self) -> None:
        from . import installer

        closeWorker()
        self._leave()
        self._said = _("Removing …")
        self._job = installer.removeTorch(lambda _result: self._onEnd(""), self._onEnd, lambda: self._onEnd(_("Cancelled.")))
        self._begun()

    def _start(self, text: str, begin: Callable[..., Any], onDone: Callable[[Any], None], **more: Any) -> None:
        self._said = text
        self._job = begin(self._onProgress, onDone, self._onFailed, lambda: self._onEnd(_("Cancelled.")), **more)
        self._begun()

    def _begun(self) -> None:
        self.show()
        self._changed()  # nothing else may need PyTorch meanwhile

    def _plan(self) -> None:
        from . import installer

        self._start(_("Looking up what PyTorch needs …"), installer.planTorch, self._onPlan)

    def _onPlan(self, plan: Any) -> None:
        from . import installer

        # The job that is over is kept during the question, so that nobody else begins meanwhile.
        if plan.problem:
            self._onFailed(plan.problem, offline=True)
            return
        question = _("Download and install {what}? It gets a folder of its own; nothing of Slicer's Python changes.").format(what=plan)
        chosen = not self._closed and slicer.util.confirmOkCancelDisplay(question, windowTitle="PyTorch", textFormat=qt.Qt.PlainText)
        if not chosen or self._held:
            self._onEnd(self._held)
            return
        closeWorker()
        self._start(_("Installing …"), installer.createTorch, lambda _own: self._onEnd(""), variant=plan.variant or "auto")

    def _onFailed(self, problem: str, offline: bool = False) -> None:
        """offline, or where pip failed: a wheel folder is asked for, and all planned again from there."""
        from . import installer

        chosen = (offline or self._job.pipFailed) and not self._closed and installer.askForTorchWheels(problem, "PyTorch")
        self._onEnd("" if chosen else problem)
        if chosen and not self._closed:
            self._plan()

    def _onProgress(self, fraction: float | None, text: str) -> None:
        self._say(text if fraction is None else f"{text} ({100 * fraction:.0f} %)")

    def _onEnd(self, text: str) -> None:
        from UNetSegmentationLib.environment import own_environment

        from .installer import renewWorker

        renewWorker()
        self._job, self._said, self._of = None, text, own_environment().status
        if not self._closed:
            self._changed()

    def _say(self, text: str) -> None:
        self._said = text
        if not self._closed:
            self.ui.torchStatus.text = breakable(text)
