"""The panel's tests run in child processes, one for each file, whose results are reported here.

PySide6 and VTK abort when Python ends, and the stand-ins fill `slicer` with what other tests must not see. So the parent
collects the files as always, which is why they must not import qt, ctk, slicer or the panel at their top, runs one child
with pytest on the file's chosen tests, and reports what the child reports. UNETSEG_PANEL_CHILD=1 in the environment runs
them here and now, for a debugger.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CHILD = "UNETSEG_PANEL_CHILD"
MISSING = [name for module, name in (("PySide6", "PySide6-Essentials"), ("slicer", "slicer-core")) if not importlib.util.find_spec(module)]
REASON = f"not installed: {', '.join(MISSING)}"
_children: dict[Path, _Child] = {}
_status = 0


class _Child:
    """pytest on tests of one file in a process of its own; `reports` gives what it says of each test."""

    def __init__(self, items: list[pytest.Item], root: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="panel-"))
        self.file, self.log = self.folder / "reports", self.folder / "log"
        self.file.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *[i.nodeid for i in items]]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=root, env={**os.environ, CHILD: str(self.file)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.told = open(self.file, encoding="utf-8")
        self.rest = ""
        self.lines: deque[str] = deque()

    def _read(self) -> None:
        *lines, self.rest = (self.rest + self.told.read()).split("\n")
        self.lines.extend(lines)

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        found: list[pytest.TestReport] = []
        while True:
            ended = self.process.poll() is not None
            self._read()
            while self.lines:
                data = json.loads(self.lines.popleft())
                if "end" in data:
                    return found
                report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
                if isinstance(report.longrepr, list):  # why it was skipped, a tuple before JSON
                    report.longrepr = tuple(report.longrepr)
                found.append(report)
            if ended:
                break
            time.sleep(0.01)
        lines = self.log.read_text("utf-8", "replace").splitlines()
        log = "\n".join([line for line in lines if not line.startswith("Extension modules:")][-60:])
        text = f"the panel's process ended with {self.process.returncode} during this test or before\n{log}"
        return [*found, pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if CHILD in os.environ or MISSING or HERE not in item.path.parents:  # pytest asks every conftest about every test
        return None
    if item.path not in _children:
        items = [i for i in item.session.items if i.path == item.path]
        _children[item.path] = _Child(items, item.config.rootpath)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _children[item.path].reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=REASON))


# --- in the child ----------------------------------------------------------------------------------------------------


def _tell(data: Any) -> None:
    file = os.environ.get(CHILD, "")
    if os.path.isabs(file):
        with open(file, "a", encoding="utf-8") as f:
            f.write(json.dumps(data) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if CHILD in os.environ and _config is not None:
        _tell(_config.hook.pytest_report_to_serializable(config=_config, report=report))


def pytest_runtest_logfinish(nodeid: str) -> None:
    if CHILD in os.environ:
        _tell({"end": nodeid})


_config: pytest.Config | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    global _status
    _status = int(exitstatus)
    for child in _children.values():
        child.process.kill()  # of use only when the session was cut off
        child.process.wait()
        shutil.rmtree(child.folder, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    if "PySide6" in sys.modules:
        from standins.slicergui import finish

        finish(_status)


@pytest.fixture(scope="session")
def _application(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from standins.slicergui import start

    return start(tmp_path_factory.mktemp("gui") / "gui")


@pytest.fixture(scope="module", autouse=True)
def _no_worker_left() -> Iterator[None]:
    yield
    if "UNetSegmentationPanel" in sys.modules:
        sys.modules["UNetSegmentationPanel"].shutdown()


@pytest.fixture
def gui(_application: Any) -> Iterator[Any]:
    """Slicer with an empty scene, fresh settings and no module loaded. Exceptions that nobody caught fail the test."""
    _application.reset()
    yield _application
    _application.reset()
    errors, _application.errors = _application.errors, []
    assert not errors, "\n".join(errors)
