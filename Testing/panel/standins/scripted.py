"""`slicer.ScriptedLoadableModule`, `slicer.i18n` and `slicer.packaging`, after Base/Python/slicer of Slicer 5.12."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import unittest
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import qt
import slicer
from packaging.requirements import Requirement


def _base_name(of: object, suffix: str) -> str:
    return type(of).__name__.removesuffix(suffix)


class ScriptedLoadableModule:
    def __init__(self, parent: Any) -> None:
        self.parent = parent
        self.moduleName = type(self).__name__
        parent.title = ""
        parent.categories = []
        parent.dependencies = []
        parent.contributors = []
        parent.helpText = ""
        parent.acknowledgementText = ""
        slicer.selfTests = {**getattr(slicer, "selfTests", {}), self.moduleName: self.runTest}

    def resourcePath(self, filename: str) -> str:
        return os.path.join(os.path.dirname(self.parent.path), "Resources", filename)

    def runTest(self, msec: int = 100, **kwargs: Any) -> None:
        test = getattr(importlib.import_module(type(self).__module__), self.moduleName + "Test")()
        test.messageDelay = msec
        test.runTest(**kwargs)


class ScriptedLoadableModuleWidget:
    def __init__(self, parent: Any = None) -> None:
        self.moduleName = _base_name(self, "Widget")
        self.developerMode = slicer.util.settingsValue("Developer/DeveloperMode", False, converter=slicer.util.toBool)
        self.parent = parent
        if parent is None:
            self.parent = slicer.qMRMLWidget()
            self.parent.setLayout(qt.QVBoxLayout())
            self.parent.setMRMLScene(slicer.mrmlScene)
        self.layout = self.parent.layout()
        if parent is None:
            self.setup()
            self.parent.show()
        slicer.app.moduleManager().connect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)

    def resourcePath(self, filename: str) -> str:
        return os.path.join(os.path.dirname(slicer.util.modulePath(self.moduleName)), "Resources", filename)

    def cleanup(self) -> None:
        pass

    def _onModuleAboutToBeUnloaded(self, moduleName: str) -> None:
        if moduleName == self.moduleName:
            self.cleanup()
            slicer.app.moduleManager().disconnect("moduleAboutToBeUnloaded(QString)", self._onModuleAboutToBeUnloaded)

    def setupDeveloperSection(self) -> None:
        pass

    def setup(self) -> None:
        self.setupDeveloperSection()


class ScriptedLoadableModuleLogic:
    def __init__(self, parent: Any = None) -> None:
        self.moduleName = _base_name(self, "Logic")
        self.isSingletonParameterNode = True

    def getAllParameterNodes(self) -> list[Any]:
        nodes = slicer.mrmlScene.GetNodesByClass("vtkMRMLScriptedModuleNode")
        found = [nodes.GetItemAsObject(i) for i in range(nodes.GetNumberOfItems())]
        return [n for n in found if n.GetAttribute("ModuleName") == self.moduleName]

    def getParameterNode(self) -> Any:
        if self.isSingletonParameterNode:
            node = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
            if node is not None:
                if node.GetAttribute("ModuleName") != self.moduleName:  # closing the scene takes it away
                    node.SetAttribute("ModuleName", self.moduleName)
                return node
        elif nodes := self.getAllParameterNodes():
            return nodes[0]
        return slicer.mrmlScene.AddNode(self.createParameterNode())

    def createParameterNode(self) -> Any:
        node = slicer.mrmlScene.CreateNodeByClass("vtkMRMLScriptedModuleNode")
        node.UnRegister(None)
        if self.isSingletonParameterNode:
            node.SetSingletonTag(self.moduleName)
        node.SetAttribute("ModuleName", self.moduleName)
        node.SetName(slicer.mrmlScene.GenerateUniqueName(self.moduleName))
        return node


class ScriptedLoadableModuleTest(unittest.TestCase):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.enableScreenshots = False
        self.screenshotScaleFactor = 1.0

    def delayDisplay(self, message: str, requestedDelay: int | None = None, msec: int | None = None) -> None:
        slicer.util.delayDisplay(message, 0)

    def runTest(self) -> None:
        logging.warning("No test is defined in %s", type(self).__name__)


def translate(context: str, text: str) -> str:
    return slicer.app.translate(context, text)


def tr(text: str) -> str:
    return translate("", text)


def load_requirements(path: str | Path) -> list[Requirement]:
    lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def _requirements(reqs: Any) -> list[Requirement]:
    if isinstance(reqs, str):
        try:
            reqs = [Requirement(reqs)]
        except ValueError:
            reqs = reqs.split()
    return [r if isinstance(r, Requirement) else Requirement(r) for r in (reqs if isinstance(reqs, list) else [reqs])]


class Pip:
    """What pip was asked for, and what it does then; nothing is ever installed or looked up elsewhere.

    calls: (function, requirements as a list of strings, keyword arguments). `run(requirements)`, set by the test, stands in
    for pip: gives the log's lines, or raises CalledProcessError. `installed`: what pip_check finds beyond what Python has;
    None for a name hides it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.calls: list[tuple[str, list[str], dict[str, Any]]] = []
        self.run: Callable[[list[str]], list[str] | None] = lambda requirements: []
        self.installed: dict[str, str | None] = {}
        self.running = False

    def check(self, req: Any) -> bool:
        for requirement in _requirements(req):
            if requirement.marker is not None and not requirement.marker.evaluate():
                continue
            try:
                version = self.installed[requirement.name] if requirement.name in self.installed else metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = None
            if version is None or version not in requirement.specifier:
                return False
        return True

    def install(self, name: str, requirements: Any, **options: Any) -> None:
        wanted = requirements.split() if isinstance(requirements, str) else [str(r) for r in requirements]
        self.calls.append((name, wanted, options))
        if options.get("blocking", True):
            self.run(wanted)
            return
        if self.running:
            raise RuntimeError("A non-blocking pip_install is already in progress. Wait for it to complete or use blocking=True.")
        self.running = True

        def finish() -> None:
            try:
                lines, code = self.run(wanted) or [], 0
            except subprocess.CalledProcessError as e:
                lines, code = (e.output or "").splitlines(), e.returncode
            self.running = False
            for line in lines:
                (options.get("logCallback") or print)(line)
            if options.get("completedCallback"):
                options["completedCallback"](code)

        qt.QTimer.singleShot(20, finish)


pip = Pip()


def _packaging() -> ModuleType:
    """slicer.packaging of 5.12."""
    module = ModuleType("slicer.packaging")

    def pip_check(req: Any) -> bool:
        return pip.check(req)

    def pip_install(
        requirements: Any,
        constraints: Any = None,
        no_deps_requirements: Any = None,
        skip_packages: Any = None,
        blocking: bool = True,
        show_progress: bool = True,
        requester: str | None = None,
        parent: Any = None,
        logCallback: Any = None,
        completedCallback: Any = None,
    ) -> None:
        options = {k: v for k, v in locals().items() if k != "requirements"}
        pip.install("pip_install", requirements, **options)

    def pip_uninstall(requirements: Any, blocking: bool = True, logCallback: Any = None, completedCallback: Any = None) -> None:
        pip.calls.append(("pip_uninstall", requirements.split() if isinstance(requirements, str) else list(requirements), {}))

    def pip_ensure(
        requirements: Any,
        constraints: Any = None,
        skip_packages: Any = None,
        prompt_install: bool = True,
        prompt_restart: bool = True,
        requester: str | None = None,
        skip_in_testing: bool = True,
        show_progress: bool = True,
    ) -> None:
        missing = [str(r) for r in _requirements(requirements) if not pip.check(r)]
        if not missing or (skip_in_testing and slicer.app.testingEnabled()):
            return
        if prompt_install and not slicer.util.confirmOkCancelDisplay(f"{len(missing)} Python packages need to be installed: {missing}"):
            raise RuntimeError("User declined package installation")
        pip.install("pip_ensure", missing, constraints=constraints, show_progress=show_progress, requester=requester)

    def isPipInstallInProgress() -> bool:
        return pip.running

    for function in (load_requirements, pip_check, pip_install, pip_uninstall, pip_ensure, isPipInstallInProgress):
        setattr(module, function.__name__, function)
    return module


def use_packaging(there: bool) -> None:
    """With slicer.packaging as in 5.12, or without as in 5.10."""
    if there:
        slicer.packaging = sys.modules["slicer.packaging"] = _packaging()
        slicer.util.pip_install = lambda requirements, **options: slicer.packaging.pip_install(requirements, **options)
        slicer.util.pip_uninstall = lambda requirements, **options: slicer.packaging.pip_uninstall(requirements, **options)
    else:
        vars(slicer).pop("packaging", None)
        sys.modules.pop("slicer.packaging", None)
        slicer.util.pip_install = lambda requirements: pip.install("pip_install", requirements)
        slicer.util.pip_uninstall = lambda requirements: pip.calls.append(("pip_uninstall", str(requirements).split(), {}))


def install() -> None:
    modules = {
        "ScriptedLoadableModule": (
            ScriptedLoadableModule,
            ScriptedLoadableModuleWidget,
            ScriptedLoadableModuleLogic,
            ScriptedLoadableModuleTest,
        ),
        "i18n": (tr, translate),
    }
    for name, members in modules.items():
        module = ModuleType(f"slicer.{name}")
        module.__all__ = [m.__name__ for m in members]  # type: ignore[attr-defined]
        for member in members:
            setattr(module, member.__name__, member)
        sys.modules[module.__name__] = module
        setattr(slicer, name, module)
    use_packaging(True)
