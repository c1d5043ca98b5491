"""The question, the installation and PyTorch's environment as the panel does them, with real pip on wheels made here."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import time
import types
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from UNetSegmentationLib import UserError, environment, files

POSIX = pytest.mark.skipif(os.name == "nt", reason="a shell script as launcher")
_unit = importlib.util.spec_from_file_location("unit_environment", Path(__file__).parents[1] / "unit" / "test_environment.py")
unit = importlib.util.module_from_spec(_unit)
_unit.loader.exec_module(unit)


@pytest.fixture
def installer(gui, tmp_path, monkeypatch):
    """The module, with a site-packages of this test that has numpy 2.0.2, and pip, which installs there for Slicer."""
    from UNetSegmentationPanel import installer

    unit.without_configuration(monkeypatch)
    unit.without_proxy(monkeypatch)
    monkeypatch.setattr(environment, "TORCH_DISK", dict.fromkeys(environment.TORCH_DISK, 1e6))
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "numpy-2.0.2.dist-info").mkdir()
    for name in ("check", "pins", "plan_folder"):
        monkeypatch.setattr(environment, name, functools.partial(getattr(environment, name), paths=[site]))
    monkeypatch.setattr(installer.sysconfig, "get_paths", lambda: {"purelib": str(site)})
    installer.site = site
    gui.pip.installed = {"onnxruntime": None, "flatbuffers": None}
    gui.pip.constraints = []

    def pip(requirements):
        with urllib.request.urlopen(os.environ["PIP_CONSTRAINT"]) as file:
            gui.pip.constraints.append(file.read().decode())
        # --target does not see what is there already, which Slicer's pip does.
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), *requirements, "flatbuffers"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout + done.stderr)

    gui.pip.run = pip
    return installer


@pytest.fixture
def wheels(tmp_path):
    return unit.make_wheels(tmp_path / "wheel folder")


class Asked(list):
    """Stands in for the person: takes the questions, gives the answers in order."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self, text):
        self.append(text)
        return self.answers.pop(0)


def status(installer):
    return [s.status for s in environment.check(environment.read_requirements(installer.REQUIREMENTS))]


# ------------------------------------------------------------------------------------------------------------ onnxruntime


@pytest.mark.parametrize("version", ["5.10", "5.12"])
def test_asks_once_and_installs_from_the_wheel_folder(gui, installer, wheels, version):
    gui.use_slicer(version)
    installer.setWheelFolder(str(wheels))
    asked = Asked(True)
    assert installer.ensureRequirements(confirm=asked) is True
    assert len(asked) == 1 and "onnxruntime 1.20.0 and flatbuffers 25.2.10 (0.1 MB)" in asked[0] and str(wheels) in asked[0]
    assert "numpy" not in asked[0] and gui.pip.constraints == ["numpy==2.0.2"]
    assert gui.pip.calls[0][0] == ("pip_install" if version == "5.10" else "pip_ensure")
    assert gui.pip.calls[0][1][0] == "onnxruntime>=1.17"
    assert status(installer) == ["installed"]
    assert not [n for n in os.environ if n in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_ONLY_BINARY")]
    assert installer.ensureRequirements(confirm=asked) is True  # nothing more is asked
    assert len(asked) == 1 and len(gui.pip.calls) == 1


@pytest.mark.parametrize("version", ["5.10", "5.12"])
def test_in_folders_of_any_name_pip_gets_arguments_in_ascii_only(gui, installer, wheels, version, tmp_path, monkeypatch):
    gui.use_slicer(version)
    place = tmp_path / "Jörg Müller"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    installer.setWheelFolder(str(wheels.rename(place / "wheels")))
    assert installer.ensureRequirements(confirm=Asked(True))
    assert status(installer) == ["installed"] and gui.pip.constraints == ["numpy==2.0.2"]
    assert repr(gui.pip.calls[0]).isascii() and "PIP_CONSTRAINT" not in os.environ


def test_asks_by_slicers_own_dialog(gui, installer, wheels):
    installer.setWheelFolder(str(wheels))
    gui.dialogs.answer("OK")
    assert installer.ensureRequirements()
    assert "will be installed" in "".join(text for _, text in gui.dialogs.shown)


def test_declined_is_declined(gui, installer, wheels):
    installer.setWheelFolder(str(wheels))
    assert installer.ensureRequirements(confirm=Asked(False)) is False
    assert not gui.pip.calls and status(installer) == ["missing"]


@pytest.mark.parametrize("version", ["5.10", "5.12"])
def test_a_failure_is_one_sentence_and_the_next_try_repairs(gui, installer, wheels, version):
    gui.use_slicer(version)
    installer.setWheelFolder(str(wheels))
    pip = gui.pip.run

    def killed(requirements):
        pip(requirements)
        (installer.site / "onnxruntime-1.20.0.dist-info" / "RECORD").unlink()
        raise subprocess.CalledProcessError(1, "pip")

    gui.pip.run = killed
    with pytest.raises(UserError, match="exit code 1.*Try again"):
        installer.ensureRequirements(confirm=Asked(True, False))
    assert status(installer) == ["broken"]
    gui.pip.run = pip
    asked = Asked(True)
    assert installer.ensureRequirements(confirm=asked)
    assert asked[0].startswith("onnxruntime is damaged: its installation was cut off.")
    assert status(installer) == ["installed"]


def test_a_pip_that_does_nothing_is_noticed(gui, installer, wheels):
    installer.setWheelFolder(str(wheels))
    gui.pip.run = lambda requirements: []
    with pytest.raises(UserError, match="onnxruntime was not installed"):
        installer.ensureRequirements(confirm=Asked(True))


def test_online_it_says_how_much_before_anything_is_fetched(gui, installer, wheels, tmp_path, monkeypatch):
    with unit.package_index(tmp_path / "index", wheels) as (address, requests):
        monkeypatch.setenv("PIP_INDEX_URL", address)
        asked = Asked(False)
        assert installer.ensureRequirements(confirm=asked) is False
    assert "onnxruntime 1.20.0" in asked[0] and "0.1 MB" in asked[0] and "from the network" in asked[0]
    assert requests and not [path for command, path in requests if command == "GET" and path.endswith(".whl")]
    assert not gui.pip.calls


def test_offline_a_wheel_folder_is_asked_for(gui, installer, wheels, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    (tmp_path / "empty").mkdir()
    gui.dialogs.answer(str(tmp_path / "empty"), str(wheels))
    asked = Asked(True, True, True)
    assert installer.ensureRequirements(confirm=asked)
    assert "index cannot be reached" in asked[0] and asked[0].endswith("Choose a folder of wheels now?")
    assert "has no wheel of onnxruntime>=1.17" in asked[1]
    assert "will be installed from" in asked[2]
    assert installer.wheelFolder() == str(wheels)


@contextmanager
def files_blocked(folder, wheels):
    """The address of an index that a firewall lets through, without its files."""
    with unit.package_index(folder, wheels) as (address, _requests):
        for file in folder.glob("*.whl*"):
            file.unlink()
        yield address


def test_where_the_files_are_blocked_a_wheel_folder_is_asked_for(gui, installer, wheels, tmp_path, monkeypatch):
    import slicer

    (tmp_path / "empty").mkdir()
    with files_blocked(tmp_path / "index", wheels) as address:
        monkeypatch.setenv("PIP_INDEX_URL", address)
        with monkeypatch.context() as m, pytest.raises(UserError, match="exit code 1"):
            m.setattr(type(slicer.app), "testingEnabled", lambda self: True)
            installer.ensureRequirements(confirm=Asked(True))  # and nothing more
        with pytest.raises(UserError, match="exit code 1"):
            installer.ensureRequirements(confirm=Asked(True, False))
        gui.dialogs.answer(str(tmp_path / "empty"), str(wheels))
        asked = Asked(True, True, True, True)
        assert installer.ensureRequirements(confirm=asked)
    assert "from the network" in asked[0] and "exit code 1" in asked[1] and asked[1].endswith("Choose a folder of wheels now?")
    assert "has no wheel of onnxruntime>=1.17" in asked[2] and str(wheels) in asked[3]
    assert installer.wheelFolder() == str(wheels) and status(installer) == ["installed"]


def test_a_wheel_folder_that_is_gone_gives_way_to_the_network(gui, installer, wheels, tmp_path, monkeypatch):
    installer.setWheelFolder(str(tmp_path / "gone"))
    with unit.package_index(tmp_path / "index", wheels) as (address, _requests):
        monkeypatch.setenv("PIP_INDEX_URL", address)
        asked = Asked(False)
        assert installer.ensureRequirements(confirm=asked) is False
    assert len(asked) == 1 and "from the network" in asked[0] and installer.wheelFolder() == ""


def test_a_wheel_folder_that_is_gone_is_asked_for_again_where_there_is_no_network(gui, installer, wheels, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    installer.setWheelFolder(str(tmp_path / "gone"))
    gui.dialogs.answer(str(wheels))
    asked = Asked(True, False)
    assert installer.ensureRequirements(confirm=asked) is False
    assert "gone cannot be read" in asked[0] and "index cannot be reached" in asked[0] and str(wheels) in asked[1]
    assert installer.wheelFolder() == str(wheels)


def test_a_look_up_that_fails_forgets_no_wheel_folder(gui, installer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        environment, "plan_step", lambda python, wanted: environment.Step("failing", (python, "-c", "raise OSError('odd')"))
    )
    installer.setWheelFolder(str(tmp_path / "not plugged in"))
    asked = Asked(False)
    assert installer.ensureRequirements(confirm=asked) is False
    assert "odd" in asked[0] and asked[0].endswith("Choose a folder of wheels now?")
    assert installer.wheelFolder() == str(tmp_path / "not plugged in")


def test_a_slicer_that_cannot_be_written_to_is_said_before_the_question(gui, installer, wheels, tmp_path, monkeypatch):
    installer.setWheelFolder(str(wheels))
    monkeypatch.setattr(installer.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "no such folder")})
    with pytest.raises(UserError, match="no such folder cannot be written .*; ask who installed Slicer, or install"):
        installer.ensureRequirements(confirm=Asked())
    assert not gui.pip.calls


@pytest.mark.parametrize("answers", [(False,), (True,)])
def test_offline_without_a_folder_nothing_happens(gui, installer, monkeypatch, answers):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    gui.dialogs.answer("")  # the file dialog, cancelled
    assert installer.ensureRequirements(confirm=Asked(*answers)) is False
    assert installer.wheelFolder() == "" and not gui.pip.calls


def test_slicers_testing_mode_waits_for_nobody(gui, installer, tmp_path, monkeypatch):
    import slicer

    monkeypatch.setattr(type(slicer.app), "testingEnabled", lambda self: True)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    installer.setWheelFolder(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="cannot be read"):
        installer.ensureRequirements()


def test_looking_up_can_be_cancelled(gui, installer, monkeypatch):
    import qt

    code = "import time; time.sleep(60)"
    monkeypatch.setattr(environment, "plan_step", lambda python, wanted: environment.Step("waiting", (python, "-c", code)))

    def cancel():
        import slicer

        shown = [w for w in slicer.app.topLevelWidgets() if isinstance(w, qt.QProgressDialog)]
        for widget in shown:
            widget.cancel()
        if not shown:
            qt.QTimer.singleShot(100, cancel)

    qt.QTimer.singleShot(100, cancel)
    assert installer.ensureRequirements(confirm=Asked()) is False


def test_importing_it_imports_neither_onnxruntime_nor_torch(gui, installer):
    assert not {"onnxruntime", "torch", "openvino"} & set(sys.modules)


# --------------------------------------------------------------------------------------------------------------- processes


class Told:
    """The callbacks of a job."""

    def __init__(self):
        self.progress, self.outcomes = [], []

    @property
    def arguments(self):
        def outcome(kind):
            return lambda *values: self.outcomes.append((kind, *values))

        return lambda fraction, text: self.progress.append((fraction, text)), outcome("done"), outcome("error"), outcome("cancelled")


def python_step(code, text="working"):
    return environment.Step(text, (sys.executable, "-c", code))


def test_a_job_runs_its_steps_and_tells_the_result(gui, installer):
    told = Told()

    def steps():
        done = yield python_step("print('Progress 1 of 4')")
        done = yield python_step(f"import sys; print({done.output.strip()!r}); print('bad', file=sys.stderr); sys.exit(3)")
        return done

    job = installer.Job(steps(), *told.arguments)
    assert not told.progress  # nothing from within the constructor
    gui.wait(lambda: told.outcomes)
    assert told.outcomes == [("done", environment.Done(3, "Progress 1 of 4\n", "bad\n"))]
    assert (None, "working") in told.progress and (0.25, "working") in told.progress and not job.running


def test_a_program_that_is_not_there(gui, installer):
    told = Told()

    def steps():
        return (yield environment.Step("looking for a GPU", ("there-is-no-such-program",)))

    installer.Job(steps(), *told.arguments)
    gui.wait(lambda: told.outcomes)
    assert told.outcomes[0][1].code is None


@pytest.mark.parametrize("error, text", [(UserError("The disk is full."), "The disk is full."), (KeyError("x"), "unexpected.*KeyError")])
def test_errors_are_told_once(gui, installer, error, text):
    told = Told()

    def steps():
        yield python_step("pass")
        raise error

    installer.Job(steps(), *told.arguments)
    gui.wait(lambda: told.outcomes)
    ((kind, sentence),) = told.outcomes
    assert kind == "error" and re.search(text, sentence)


@POSIX
def test_cancel_ends_the_process_behind_a_launcher_and_cleans_up(gui, installer, tmp_path):
    told = Told()
    launcher = tmp_path / "PythonSlicer"
    launcher.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\n')
    launcher.chmod(0o755)
    code = "import os, time; print('{\"pid\": %d}' % os.getpid(), 'Progress 1 of 2', sep='\\n', flush=True); time.sleep(60)"

    def steps():
        yield environment.Step("sleeping", (str(launcher), "-c", code))

    def cleanup():
        yield python_step(f"open({str(tmp_path / 'cleaned')!r}, 'w')")

    job = installer.Job(steps(), *told.arguments, cleanup=cleanup)
    gui.wait(lambda: (0.5, "sleeping") in told.progress)
    pid = job._process.workerPid
    job.cancel()
    job.cancel()
    assert not told.outcomes  # only from the event loop
    gui.wait(lambda: told.outcomes)
    assert told.outcomes == [("cancelled",)] and (tmp_path / "cleaned").exists()
    gui.wait(lambda: not runs(pid))


def runs(pid):
    """A zombie that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if os.path.isdir("/proc/self") else True
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_job_cancelled_at_once_never_starts(gui, installer):
    told = Told()

    def steps():
        raise AssertionError("started")
        yield

    installer.Job(steps(), *told.arguments).cancel()
    gui.wait(lambda: told.outcomes)
    assert told.outcomes == [("cancelled",)]


def test_nothing_of_a_job_is_left_to_pythons_end(gui, installer):
    from UNetSegmentationPanel import shutdown
    from UNetSegmentationPanel.worker import _living

    told = Told()
    jobs = [installer.Job((python_step("import time; time.sleep(60)") for _ in range(1)), *told.arguments) for _ in range(2)]
    gui.wait(lambda: len(told.progress) == 2)
    jobs[0].cancel()
    shutdown()
    assert not _living  # already now: when Slicer quits, no event loop comes back to it


def test_shutdown_is_silent(gui, installer):
    told = Told()

    def steps():
        yield python_step("import time; time.sleep(60)")

    job = installer.Job(steps(), *told.arguments)
    gui.wait(lambda: told.progress)
    installer.shutdown()
    end = time.monotonic() + 0.3
    gui.wait(lambda: time.monotonic() > end)
    assert not told.outcomes and not job.running


# ----------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.fixture
def torch_wheels(installer, tmp_path):
    folder = tmp_path / "torch wheels"
    for name in ("numpy", "SimpleITK", "onnxruntime", "onnx", "safetensors"):
        unit.make_wheel(folder, name, "9.9")
    unit.make_wheel(folder, "torch", environment.TORCH, files={"torch/__init__.py": unit.TORCH.replace("{version}", environment.TORCH)})
    installer.setWheelFolder(str(folder))
    return folder


def outcome(gui, told):
    return gui.wait(lambda: told.outcomes, 60)[0]


def test_pytorch_is_planned_made_shown_used_and_removed(gui, installer, torch_wheels):
    assert installer.describeTorch() == "Not installed" and installer.workerPython() == (None, None)
    told = Told()
    installer.planTorch(*told.arguments)
    kind, plan = outcome(gui, told)
    assert kind == "done" and "torch 2.13.0" in str(plan)
    told = Told()
    installer.createTorch(*told.arguments, variant=plan.variant)
    kind, own = outcome(gui, told)
    assert kind == "done" and own.status == "ready" and own == environment.own_environment()
    assert installer.describeTorch().startswith(f"PyTorch {environment.TORCH} on CPU, ")
    python, variables = installer.workerPython()
    assert python == own.python and variables["UNETSEG_PACKAGES"] == str(own.folder / "packages")
    assert installer.ensureRequirements(confirm=Asked()) is True  # the worker runs there
    told = Told()
    installer.removeTorch(*told.arguments[1:])
    assert outcome(gui, told)[0] == "done"
    assert environment.own_environment().status == "none" and not own.folder.exists()


def test_what_training_needs_is_planned_and_added_to_pytorch(gui, installer, torch_wheels, monkeypatch):
    for name in ("lightning", "monai", "scipy", "pydantic", "matplotlib", "jinja2"):
        unit.make_wheel(torch_wheels, name, "9.9")
    unit.make_wheel(torch_wheels, "pyyaml", "9.9", files={"yaml/__init__.py": ""})
    with monkeypatch.context() as m:
        m.setattr(environment, "training_lacks", lambda own=None: ["torch>=2.10", "monai>=1.4"])  # whatever this Python has
        told = Told()
        installer.planTraining(*told.arguments)
        kind, plan = outcome(gui, told)
        assert kind == "done" and "torch 2.13.0" in str(plan) and "monai 9.9" in str(plan)
    told = Told()
    installer.createTorch(*told.arguments, variant="cpu")  # as of a person who only ran models with it
    assert outcome(gui, told)[0] == "done"
    with pytest.raises(UserError, match="lightning, monai"):
        environment.training_python()
    told = Told()
    installer.planTraining(*told.arguments)
    kind, plan = outcome(gui, told)
    assert kind == "done" and "lightning 9.9" in str(plan) and "torch" not in str(plan)
    told = Told()
    installer.installTraining(plan, *told.arguments)
    kind, own = outcome(gui, told)
    assert kind == "done" and own.status == "ready"
    python, variables = environment.training_python()
    assert python == own.python and variables["UNETSEG_PACKAGES"] == str(own.folder / "packages")
    told = Told()
    installer.removeTorch(*told.arguments[1:])
    assert outcome(gui, told)[0] == "done"


def test_the_panels_row_installs_and_removes_it(gui, installer, torch_wheels):
    widget = gui.open()
    ui = widget.ui
    gui.wait(lambda: widget._warm, 60)
    ui.advancedSection.collapsed = False
    assert (ui.torchStatus.text, ui.torchButton.text) == ("Not installed", "Install…")

    gui.dialogs.answer(False)
    ui.torchButton.click()
    assert ui.torchButton.text == "Cancel"
    gui.wait(lambda: not widget.torchRow.working, 60)
    assert "torch 2.13.0" in gui.dialogs.texts("message")[-1] and environment.own_environment().status == "none"

    panelWorker = sys.modules["UNetSegmentationPanel"].panelWorker
    gui.dialogs.answer(True)
    ui.torchButton.click()
    gui.wait(lambda: environment.own_environment().status == "broken", 60)
    worker = panelWorker()  # of a click while it is installed
    assert worker.python is None
    gui.wait(lambda: not widget.torchRow.working and environment.own_environment().status == "ready", 120)
    assert ui.torchButton.text == "Remove" and ui.torchStatus.text.startswith(f"PyTorch {environment.TORCH} on CPU, ")
    assert panelWorker().python == environment.own_environment().python

    gui.dialogs.answer(True)
    ui.torchButton.click()
    gui.wait(lambda: not widget.torchRow.working, 120)
    assert "Remove PyTorch" in gui.dialogs.texts("message")[-1]
    assert environment.own_environment().status == "none"
    assert (ui.torchStatus.text, ui.torchButton.text) == ("Not installed", "Install…")
    assert panelWorker() is not worker and panelWorker().python is None
    gui.close(widget)
    sys.modules["UNetSegmentationPanel"].closeWorker()


def test_clicks_ask_again_for_what_they_need_after_pytorch_has_gone(gui, installer, monkeypatch):
    import numpy as np
    import slicer
    import UNetSegmentationPanel
    from UNetSegmentationPanel.clicks import ClickController

    asked, sent = [], []
    monkeypatch.setattr(sys.modules["UNetSegmentationPanel.worker"].PanelWorker, "click", lambda self, *arguments: sent.append(self))
    controller = ClickController(UNetSegmentationPanel.panelWorker, lambda: not asked.append(None))
    controller.begin(slicer.util.addVolumeFromArray(np.zeros((2, 3, 4), np.int16)), Path("toy.unet.zip"), "lesion")
    changes = (
        lambda: None,
        lambda: UNetSegmentationPanel.closeWorker(),  # PyTorch was removed
        lambda: UNetSegmentationPanel.panelWorker().renew("python-of-torch", {}),
    )
    for n, change in enumerate(changes, 1):
        change()
        for _ in range(2):
            controller.addPoint((0, 0, 0))
            gui.process_events()
        assert (len(asked), len(sent)) == (n, 2 * n)
    controller.end()
    UNetSegmentationPanel.closeWorker()


def test_what_another_slicer_is_installing_is_told_and_waited_for(gui, installer):
    widget = gui.open()
    gui.wait(lambda: widget._warm, 60)
    ui = widget.ui
    ui.advancedSection.collapsed = False
    folder = fake_torch("making")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        makers = [[*environment._this_process()[:1], other.pid, files.process_mark(other.pid)]]
        environment._write_marker(folder, {**environment._read_marker(folder), "makers": makers})
        ui.torchButton.click()
        assert ui.torchStatus.text == "PyTorch is being installed by another Slicer; wait for its end."
        assert not widget.torchRow.working and not gui.dialogs.shown
        other.kill()
    widget._update()
    assert ui.torchStatus.text == "To be installed again: it was not finished"
    gui.close(widget)


def test_offline_a_wheel_folder_with_pytorch_is_asked_for(gui, installer, torch_wheels, wheels, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(environment, "TORCH_INDEX", "http://127.0.0.1:9/")
    installer.setWheelFolder("")
    widget = gui.open()
    ui = widget.ui
    gui.wait(lambda: widget._warm, 60)

    gui.dialogs.answer(False)
    ui.torchButton.click()
    gui.wait(lambda: not widget.torchRow.working, 60)
    assert "index cannot be reached" in ui.torchStatus.text and ui.torchButton.text == "Install…"

    gui.dialogs.answer(True, str(wheels), True, str(torch_wheels), False)
    ui.torchButton.click()
    gui.wait(lambda: not gui.dialogs.answers and not widget.torchRow.working, 60)
    first, other, question = gui.dialogs.texts("message")[-3:]
    assert "index cannot be reached" in first and f"{wheels} has no wheel of torch. Choose" in other
    assert question.startswith("Download and install") and "torch 2.13.0" in question and installer.wheelFolder() == str(torch_wheels)
    gui.close(widget)


def test_where_pytorchs_files_are_blocked_a_wheel_folder_is_asked_for(gui, installer, torch_wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "own_requirements", lambda *_unused: [f"torch=={environment.TORCH}"])
    installer.setWheelFolder("")
    widget = gui.open()
    ui = widget.ui
    gui.wait(lambda: widget._warm, 60)
    with files_blocked(tmp_path / "index", torch_wheels) as address:
        monkeypatch.setenv("PIP_INDEX_URL", address)
        monkeypatch.setattr(environment, "TORCH_INDEX", address + "/")
        for answers in ((True, False), (True, True, str(torch_wheels), False)):
            gui.dialogs.clear()
            gui.dialogs.answer(*answers)
            ui.torchButton.click()
            gui.wait(lambda: not gui.dialogs.answers and not widget.torchRow.working, 60)
            problem = gui.dialogs.texts("message")[1].removesuffix(" Choose a folder of wheels now?")
            assert problem.startswith("PyTorch was not installed: pip failed")
            assert ui.torchStatus.text == (problem if answers[1] is False else "Not installed")
        assert gui.dialogs.texts("message")[2].startswith("Download and install") and installer.wheelFolder() == str(torch_wheels)

        monkeypatch.setattr(environment, "TORCH_DISK", dict.fromkeys(environment.TORCH_DISK, 1e18))
        gui.dialogs.answer(True)
        ui.torchButton.click()  # a folder of wheels would not help
        gui.wait(lambda: not widget.torchRow.working, 60)
    assert "free some space" in ui.torchStatus.text
    gui.close(widget)


def fake_torch(state="ready"):
    """PyTorch's own environment, without the megabytes."""
    folder = environment.environment_folder()
    (folder / "packages" / "torch").mkdir(parents=True)
    (folder / "packages" / "torch" / "__init__.py").touch()
    version = list(sys.version_info[:2])
    environment._write_marker(folder, {"made_by": "UNetSegmentation", "state": state, "python": sys.executable, "version": version})
    return folder


def test_a_removal_that_is_cancelled_ends_and_what_is_left_can_be_removed(gui, installer, monkeypatch):
    folder = fake_torch()
    widget = gui.open()
    ui = widget.ui
    gui.wait(lambda: widget._warm, 60)
    ui.advancedSection.collapsed = False

    def forever(python):
        environment._write_marker(environment.environment_folder(), {"made_by": "UNetSegmentation", "state": "removing"})
        yield python_step("import time; time.sleep(60)")

    with monkeypatch.context() as m:
        m.setattr(environment, "remove_steps", forever)
        gui.dialogs.answer(True)
        ui.torchButton.click()
        assert ui.torchButton.text == "Cancel" and ui.torchStatus.text == "Removing …" and not ui.applyButton.enabled
        gui.wait(lambda: environment.own_environment().status == "broken")
        ui.torchButton.click()
        gui.wait(lambda: not widget.torchRow.working)
    assert ui.torchStatus.text == "Cancelled." and ui.torchButton.text == "Install…" and ui.torchButton.enabled
    with monkeypatch.context() as m:  # Retrain has installed it
        ready = replace(environment.own_environment(), status="ready", torch="2.13.0", device="CPU")
        m.setattr(environment, "own_environment", lambda: ready)
        widget._update()
        assert ui.torchStatus.text.startswith("PyTorch 2.13.0 on CPU") and ui.torchButton.text == "Remove"

    gui.dialogs.answer("Cancel", "Remove")
    ui.torchButton.click()
    assert folder.exists() and not widget.torchRow.working and "was not finished" in gui.dialogs.texts("message")[-1]
    ui.torchButton.click()
    gui.wait(lambda: not widget.torchRow.working, 60)
    assert not folder.exists() and ui.torchStatus.text == "Not installed"

    fake_torch("making")
    with monkeypatch.context() as m:
        planned = []
        m.setattr(installer, "planTorch", lambda *answers: planned.append(answers))
        gui.dialogs.answer("Install again")
        ui.torchButton.click()
        assert planned
    gui.close(widget)


def test_pytorch_that_cannot_be_installed_leaves_nothing(gui, installer, torch_wheels):
    unit.make_wheel(torch_wheels, "torch", environment.TORCH, files={"torch/__init__.py": "raise OSError('a DLL is missing')"})
    told = Told()
    installer.createTorch(*told.arguments)
    kind, sentence = outcome(gui, told)
    assert kind == "error" and "a DLL is missing" in sentence
    assert environment.own_environment().status == "none"


def test_cancelling_pytorch_leaves_nothing(gui, installer, torch_wheels):
    told = Told()
    job = installer.createTorch(*told.arguments)
    gui.wait(lambda: (None, "installing PyTorch") in told.progress)
    assert environment.own_environment().status == "broken"
    job.cancel()
    assert outcome(gui, told) == ("cancelled",)
    assert environment.own_environment().status == "none"


def test_a_wheel_folder_without_pytorch_does_not_count_for_it(gui, installer, wheels, torch_wheels):
    assert installer._torchWheels() == str(torch_wheels)
    installer.setWheelFolder(str(wheels))
    assert installer._torchWheels() is None


def test_a_folder_that_is_not_ours_is_not_removed(gui, installer):
    folder = environment.own_environment().folder
    folder.mkdir()
    (folder / "thesis.docx").touch()
    told = Told()
    installer.removeTorch(*told.arguments[1:])
    kind, sentence = outcome(gui, told)
    assert kind == "error" and "is not removed" in sentence and (folder / "thesis.docx").exists()
    assert "cannot be used" in installer.describeTorch()


def test_pytorch_in_slicer_goes_through_its_extension(gui, installer, monkeypatch):
    import slicer

    assert not installer.torchExtension()
    with pytest.raises(UserError, match="Extensions Manager"):
        installer.installTorchInSlicer()
    calls = []

    class PyTorchUtilsLogic:
        """As in SlicerPyTorch, PyTorchUtils/PyTorchUtils.py."""

        answer = None

        @staticmethod
        def torchInstalled():
            return False

        def installTorch(self, askConfirmation=False, forceComputationBackend=None, torchVersionRequirement=None):
            calls.append((askConfirmation, torchVersionRequirement))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    monkeypatch.setitem(sys.modules, "PyTorchUtils", types.SimpleNamespace(PyTorchUtilsLogic=PyTorchUtilsLogic))
    monkeypatch.setattr(slicer.modules, "pytorchutils", object(), raising=False)
    assert installer.installTorchInSlicer() is False  # declined
    assert calls == [(True, ">=2.4")]
    PyTorchUtilsLogic.answer = types.ModuleType("torch")
    assert installer.installTorchInSlicer() is True
    PyTorchUtilsLogic.answer = RuntimeError("in use")
    with pytest.raises(UserError, match="could not install PyTorch .in use"):
        installer.installTorchInSlicer()


def test_the_panels_row_leaves_it_to_the_extension_where_that_is_there(gui, installer, monkeypatch):
    import slicer
    from UNetSegmentationPanel import packages

    answers, asked, there = [None, RuntimeError("in use"), types.ModuleType("torch")], [], []

    class PyTorchUtilsLogic:
        @staticmethod
        def torchInstalled():
            return False

        def installTorch(self, askConfirmation=False, forceComputationBackend=None, torchVersionRequirement=None):
            asked.append(askConfirmation)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            there.extend(["2.9.1"] if answer else [])
            return answer

    def version(name):
        if not there:
            raise missing(name)
        return there[0]

    missing = packages.metadata.PackageNotFoundError
    monkeypatch.setattr(packages, "metadata", types.SimpleNamespace(version=version, PackageNotFoundError=missing))
    monkeypatch.setitem(sys.modules, "PyTorchUtils", types.SimpleNamespace(PyTorchUtilsLogic=PyTorchUtilsLogic))
    monkeypatch.setattr(slicer.modules, "pytorchutils", object(), raising=False)
    widget = gui.open()
    gui.wait(lambda: widget._warm, 60)
    ui = widget.ui
    ui.advancedSection.collapsed = False
    for text in ("Nothing was installed.", "The PyTorch extension could not install PyTorch (in use); restart Slicer and try again."):
        ui.torchButton.click()
        assert ui.torchStatus.text == text and ui.torchButton.enabled
    ui.torchButton.click()
    assert ui.torchStatus.text == "PyTorch 2.9.1 in Slicer's Python" and not ui.torchButton.enabled
    assert asked == [True] * 3 and environment.own_environment().status == "none"  # no folder of its own was made
    gui.close(widget)
