"""A retraining's folder and process, with a stand-in for the process: begun, found again, killed, resumed, and its model put to use."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from UNetSegmentationLib import files, training
from UNetSegmentationLib.dataset import Dataset
from UNetSegmentationLib.files import UserError
from UNetSegmentationLib.image import Image
from UNetSegmentationLib.model import Card, Label, ModelPackage, find_model
from UNetSegmentationLib.training import Options
from workers import POSIX, make_card

CORE = Path(training.__file__).resolve().parents[1]
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows: TerminateProcess
# Claims its job as the real one does, then does what the dataset's "does" file says.
PROCESS = """
import sys, time
from pathlib import Path
from UNetSegmentationLib import training
folder = Path(sys.argv[1])
if not training.claim(folder):
    sys.exit(0)
does = (folder.parents[1] / "does").read_text()
if does == "fail":
    training.end(folder, "failed", "The disk is full.")
elif does == "finish":
    training.end(folder, "finished", "Better.")
else:
    (folder / "last.ckpt").touch()
    training.update(folder, state="training", kept=True, fraction=0.5, seconds_left=57.5)
    with training.signs_of_life(folder):
        while not (folder / training.STOP).exists():
            time.sleep(0.02)
    training.end(folder, "stopped", "No worse.")
"""
CODE = "import sys; from UNetSegmentationLib import training; training.training_folder = lambda: __import__('pathlib').Path(sys.argv[2]); "


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A training set of two patients, and the stand-in in the place of the training's code."""
    code = tmp_path / "code"
    (code / "unetseg_training").mkdir(parents=True)
    (code / "unetseg_training" / "__init__.py").touch()
    (code / "unetseg_training" / "__main__.py").write_text(PROCESS, "utf-8")
    monkeypatch.setattr(training, "training_folder", lambda: code)
    made = Dataset.create(tmp_path / "My set", "set", [Label(1, "Thing", (200, 0, 0), {})], ["CT"])
    for i in range(2):
        values = np.random.default_rng(i).normal(size=(4, 6, 8)).astype(np.float32)
        made.add(Image(values), (values > 0).astype(np.uint8), name=f"case{i}", patient=f"P{i}")
    does(made.folder, "train")
    yield made.folder
    for job in training.jobs(made.folder):
        if job.running and job.pid and job.pid != os.getpid():
            with suppress(OSError):  # it may end by itself just now
                os.kill(job.pid, KILL)
            wait(job, lambda j: not j.running)


def does(folder, what):
    (folder / "does").write_text(what, "utf-8")


def wait(job, until, seconds=60):
    end = time.monotonic() + seconds
    while not until(job := training.read(job.folder)):
        assert time.monotonic() < end, job
        time.sleep(0.02)
    return job


def start(dataset, **options):
    return training.start(dataset, None, Options(**options), sys.executable)


def package_of(job, make_package, **card):
    """As if the job had made this package."""
    made = make_package(**card)
    path = job.folder / made.path.name
    path.write_bytes(made.path.read_bytes())
    training.update(job.folder, package=path.name)
    return training.read(job.folder)


# --------------------------------------------------------------------------------------------------------------- process


def test_a_job_runs_is_stopped_and_goes_on(dataset):
    job = start(dataset, minutes=3)
    assert job.folder.parent == dataset / "retrain" and job.name == "my-set" and job.base == "" and job.running
    job = wait(job, lambda j: j.state == "training")
    assert job.pid != os.getpid() and job.fraction == 0.5 and job.options == Options(minutes=3.0) and job.dataset == dataset
    assert [j.folder for j in training.jobs(dataset)] == [job.folder]
    for change, told in ((training.resume, "is running; there is nothing"), (lambda j: training.promote(j, "use"), "still running")):
        with pytest.raises(UserError, match=told):
            change(job)
    with pytest.raises(UserError, match=r"running already \(my-set\)"):
        start(dataset)
    training.stop(job)
    job = wait(job, lambda j: not j.running)
    assert (job.state, job.text, job.seconds_left) == ("stopped", "No worse.", None) and job.ended > job.started
    with pytest.raises(UserError, match="not running; there is nothing to stop"):
        training.stop(job)
    does(dataset, "finish")
    again = wait(training.resume(job, sys.executable), lambda j: not j.running)
    assert again.state == "finished" and again.fraction == 1 and not again.resumable
    with pytest.raises(UserError, match="is finished; start a new one"):
        training.resume(again, sys.executable)
    good = json.loads((job.folder / training.JOB).read_text("utf-8"))
    for damage in ({"dataset": None}, {"options": []}, {"started": "soon"}, {"package": 7}):
        (job.folder / training.JOB).write_text(json.dumps(good | damage), "utf-8")
        with pytest.raises(UserError, match="is damaged"):
            training.read(job.folder)
        assert training.jobs(dataset) == []


def test_it_lives_on_and_is_found_again_after_its_starter_was_killed(dataset, tmp_path):
    code = CODE + "j = training.start(sys.argv[1], python=sys.executable); print(j.folder, flush=True); import time; time.sleep(99)"
    environment = {**os.environ, "PYTHONPATH": str(CORE)}
    command = [sys.executable, "-c", code, str(dataset), str(tmp_path / "code")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True) as slicer:
        folder = Path(slicer.stdout.readline().strip())
        wait(training.read(folder), lambda j: j.state == "training")
        slicer.kill() if os.name == "nt" else os.killpg(slicer.pid, signal.SIGKILL)
    (job,) = training.jobs(dataset)
    assert job.folder == folder and job.state == "training"
    training.stop(job)
    assert wait(job, lambda j: not j.running).state == "stopped"


@pytest.mark.parametrize("allowed", [True, False])
def test_on_windows_it_leaves_slicers_job_and_opens_no_window(tmp_path, monkeypatch, allowed):
    flags = []

    def popen(command, creationflags, **options):
        flags.append(creationflags)
        if not allowed and creationflags & 0x01000000:
            raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(files, "os", SimpleNamespace(name="nt"))
    monkeypatch.setattr(training.subprocess, "Popen", popen)
    monkeypatch.setattr(training, "_children", {})
    training._launch(tmp_path, sys.executable)
    assert flags == ([0x09000200] if allowed else [0x09000200, 0x08000200])  # never 8, DETACHED_PROCESS


def test_the_process_of_a_training_stands_back_on_every_system(tmp_path, monkeypatch):
    from unetseg_training import __main__ as process

    done = []
    monkeypatch.setattr(sys, "argv", ["unetseg_training", str(tmp_path)])
    monkeypatch.setattr(training, "claim", lambda folder: True)
    monkeypatch.setattr(files, "stand_back", done.append)
    monkeypatch.setitem(sys.modules, "unetseg_training.retrain", SimpleNamespace(run=lambda folder: done.append(folder) or 0))
    assert process.main() == 0 and done == [5, tmp_path]


def test_a_killed_job_is_lost_and_resumed(dataset):
    job = wait(start(dataset), lambda j: j.state == "training")
    os.kill(job.pid, KILL)
    lost = wait(job, lambda j: not j.running)
    assert lost.state == "lost" and lost.resumable and "ended from outside" in lost.text
    assert lost.text.endswith("or its folder was moved or renamed; resume it to go on where it was.")
    assert json.loads((job.folder / "job.json").read_text("utf-8"))["state"] == "training"  # nobody was there to write it
    # A later process that happens to have its id is not it.
    training.update(job.folder, pid=os.getpid())
    assert training.read(job.folder).state == "lost"
    training.update(job.folder, kept=False)
    (job.folder / "last.ckpt").unlink()
    with pytest.raises(UserError, match="No epoch of this training was finished"):
        training.resume(lost, sys.executable, finish=True)
    assert "resume it to begin again" in training.read(job.folder).text
    (job.folder / "best.safetensors").touch()  # it was killed between that and its next word
    lost = training.read(job.folder)
    assert lost.kept and "resume it to begin again" in lost.text  # nothing goes on from the weights alone
    assert training.resume(lost, launch=False).seconds_left is None
    training.update(job.folder, pid=1 << 22, mark="another boot 1")
    back = wait(training.resume(lost, sys.executable), lambda j: j.state == "training")
    assert back.pid not in (job.pid, os.getpid())
    training.stop(back)
    assert wait(back, lambda j: not j.running).state == "stopped"


def test_on_another_computer_only_silence_tells(dataset):
    job = training.create(dataset)
    training.update(job.folder, pid=1 << 22, mark="x", host="another", state="training")
    (job.folder / training.BEAT).touch()
    assert training.read(job.folder).state == "training"
    assert training.create(dataset).running  # it does not keep this computer from training
    os.utime(job.folder / training.BEAT, (time.time() - 2 * files.SILENT_S,) * 2)
    assert training.read(job.folder).state == "lost"


def test_none_is_resumed_beside_another_of_its_dataset(dataset):
    job = training.create(dataset)
    training.update(job.folder, state="stopped", kept=True)
    other = training.create(dataset)
    for finish in (False, True):
        with pytest.raises(UserError, match=r"running already \(my-set\)"):
            training.resume(job, finish=finish, launch=False)
    assert training.read(job.folder).state == "stopped" and not (job.folder / training.STOP).exists()
    training.update(other.folder, state="stopped")
    assert training.resume(job, launch=False).running


@pytest.mark.parametrize("late", [-3600, 3600])
def test_the_clocks_of_two_computers_may_differ(dataset, monkeypatch, late):
    job = training.create(dataset)
    training.update(job.folder, pid=1 << 22, mark="x", host="another", state="training")
    files_there = {*job.folder.iterdir(), job.folder / training.BEAT}
    (job.folder / training.BEAT).touch()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + late)  # the file's time is its own computer's
    assert training.read(job.folder).state == "training" and not training.claim(job.folder)
    with monkeypatch.context() as m:  # who may write nothing there has its own clock only
        m.setattr(Path, "touch", lambda path: os.open(path / "x", os.O_RDONLY))
        assert (training.read(job.folder).state == "training") == (late < 0)
    os.utime(job.folder / training.BEAT, (now() - 2 * files.SILENT_S,) * 2)
    assert training.read(job.folder).state == "lost" and {*job.folder.iterdir()} == files_there
    training.resume(training.read(job.folder), sys.executable, launch=False)  # on that computer; nobody saw its process yet
    assert training.read(training.create(dataset).folder).running
    with monkeypatch.context() as m:
        m.setattr(time, "time", lambda: now() - late)
        assert training.read(job.folder).running
    training.update(job.folder, launched=now() - 2 * files.START_S)
    assert training.read(job.folder).state == "failed"


@pytest.mark.parametrize("path", ["a.png", "pictures/a.png", r"pictures\a.png", "a..b/c"])
def test_a_path_of_others_may_lead_into_its_folder(path):
    assert files.is_inner(path)


@pytest.mark.parametrize("path", ["..", "a/../../b", r"a\..\b", "/a", r"\a", "C:a", "C:/a", "//host/share/a", r"\\host\share\a"])
def test_a_path_of_others_does_not_lead_elsewhere(dataset, path):
    assert not files.is_inner(path)
    job = training.create(dataset)
    assert training._pictures(job, [path, "pictures/a.png"]) == [job.folder / "pictures" / "a.png"]


def test_a_package_elsewhere_is_not_a_jobs(dataset, make_package):
    job = training.create(dataset)
    package = make_package().path
    for path in (str(package), os.path.relpath(package, job.folder)):
        training.update(job.folder, package=path)
        assert training.read(job.folder).package is None


@POSIX
def test_a_linked_file_in_a_job_is_not_written_to(dataset, tmp_path):
    job = training.create(dataset)
    training.update(job.folder, state="stopped", kept=True)
    mine = tmp_path / "thesis.doc"
    mine.write_text("mine", "utf-8")
    for name in (training.LOG, "pictures"):
        (job.folder / name).symlink_to(mine)
        with pytest.raises(UserError, match=f"{name} is a link, which no training makes, .*; remove it, then resume.$"):
            training.resume(training.read(job.folder), sys.executable)
        (job.folder / name).unlink()
    assert mine.read_text("utf-8") == "mine" and training.read(job.folder).state == "stopped"


@POSIX
def test_a_link_that_another_made_gives_way_to_what_is_written(tmp_path, monkeypatch):
    mine, link = tmp_path / "thesis.doc", tmp_path / "run.json"
    mine.write_text("mine", "utf-8")
    link.symlink_to(mine)
    me, look = os.geteuid(), os.lstat
    with monkeypatch.context() as root:  # as in a container: the link's maker could write there himself
        root.setattr(os, "geteuid", lambda: me + 1)
        files.write_text(link, "mine too")
    assert link.is_symlink() and mine.read_text("utf-8") == "mine too"

    def others(path, **how):
        found = look(path, **how)
        return os.stat_result([*found[:4], me + 1, *found[5:]]) if path == link else found

    monkeypatch.setattr(os, "lstat", others)
    files.write_text(link, "{}")
    assert (mine.read_text("utf-8"), link.read_text("utf-8"), link.is_symlink()) == ("mine too", "{}", False)


def test_a_python_that_cannot_train_is_told(dataset, tmp_path):
    (tmp_path / "code" / "unetseg_training" / "__main__.py").write_text("import no_such_package", "utf-8")
    job = wait(start(dataset), lambda j: not j.running)
    assert job.state == "failed" and "did not start" in job.text and "No module named 'no_such_package'" in job.text
    with pytest.raises(UserError, match="cannot be started with the Python at .*nowhere"):
        training.start(dataset, None, Options(), str(tmp_path / "nowhere"))
    assert [j.folder for j in training.jobs(dataset)] == [job.folder]  # of the one that could not be started nothing is left


def test_a_python_without_pytorch_is_told(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "training_folder", lambda: CORE.parent / "training")
    (tmp_path / "bare").mkdir()
    for name in ("torch", "monai", "lightning"):
        text = f"raise ModuleNotFoundError('No module named {name}', name='{name}')"
        (tmp_path / "bare" / f"{name}.py").write_text(text, "utf-8")
    monkeypatch.setenv("UNETSEG_PACKAGES", str(tmp_path / "bare"))
    job = wait(start(dataset), lambda j: not j.running)
    assert job.state == "failed" and "lacks the package" in job.text and job.text.endswith("install what training needs and resume it.")


@pytest.mark.parametrize(
    ("error", "then"),
    [("[WinError 126] The specified module could not be found.", "install what"), ("[WinError 1455] Zu klein.", "close other programs")],
)
def test_a_pytorch_that_windows_cannot_load_is_told(dataset, tmp_path, monkeypatch, error, then):
    monkeypatch.setattr(training, "training_folder", lambda: CORE.parent / "training")
    (tmp_path / "bare").mkdir()
    for name in ("torch", "monai", "lightning"):
        (tmp_path / "bare" / f"{name}.py").write_text(f"raise OSError({error!r})", "utf-8")
    monkeypatch.setenv("UNETSEG_PACKAGES", str(tmp_path / "bare"))
    job = wait(start(dataset), lambda j: not j.running)
    assert job.state == "failed" and f"cannot load what training needs ({error}); {then}" in job.text


def test_a_folder_that_holds_other_files_is_left_alone(dataset, tmp_path):
    mine = tmp_path / "mine"
    (mine / "pictures").mkdir(parents=True)
    for python in (str(tmp_path / "nowhere"), sys.executable):
        with pytest.raises(UserError, match="mine holds other files; choose a new or an empty folder"):
            training.start(dataset, python=python, folder=mine)
    assert [p.name for p in mine.iterdir()] == ["pictures"]
    (mine / "pictures").rmdir()
    assert training.create(dataset, folder=mine).folder == mine


def test_one_process_has_a_job(dataset):
    job = wait(start(dataset), lambda j: j.state == "training")
    assert not training.claim(job.folder)
    assert training.read(job.folder).pid == job.pid
    training.stop(job)
    wait(job, lambda j: not j.running)


def test_what_the_process_itself_says_is_kept(dataset):
    does(dataset, "fail")
    job = wait(start(dataset), lambda j: not j.running)
    assert (job.state, job.text) == ("failed", "The disk is full.") and job.resumable


def test_processes_are_told_apart_by_when_they_began():
    mine = files.process_mark(os.getpid())
    assert mine and mine == files.process_mark(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert files.process_mark(child.pid) not in (None, mine)
        child.kill()
        end = time.monotonic() + 30
        while files.process_mark(child.pid) is not None:  # dead, though its parent has not looked yet
            assert time.monotonic() < end
            time.sleep(0.01)
    assert files.process_mark(-1) is None


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux's ps in the place of macOS's")
def test_where_there_is_no_proc_the_mark_is_the_same_in_every_time_zone(monkeypatch):
    class Mac(type(Path())):
        def exists(self):
            return False

    monkeypatch.setattr(files, "Path", Mac)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    mark = files.process_mark(os.getpid())
    monkeypatch.setenv("TZ", "America/New_York")
    assert mark and mark == files.process_mark(os.getpid())


def test_a_mac_whose_host_name_follows_the_network_stays_the_same(dataset, monkeypatch):
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(gethostuuid=lambda found, wait: ctypes.memset(found, 7, 16) and 0))
    job = training.create(dataset)
    training.update(job.folder, state="training", pid=1 << 22, mark="x", host=files.this_computer())
    monkeypatch.setattr(socket, "gethostname", lambda: "mac.clinic.example")
    assert files.this_computer() == "07" * 16 and files.is_this_computer("mac.clinic.example")  # the host of a former version
    assert training.read(job.folder).state == "lost"


def test_a_folder_of_any_name_gets_to_the_processes(tmp_path):
    place = tmp_path / "Jörg 世界"
    place.mkdir()
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(training.training_folder()), str(Path(training.__file__).parents[1])])}
    for module, words in (("unetseg_training", ()), ("UNetSegmentationLib.training", ("resume",))):
        command = [sys.executable, "-m", module, *files.escape_arguments([*words, str(place)])]
        done = subprocess.run(command, env={**variables, "PYTHONIOENCODING": "utf-8"}, capture_output=True, encoding="utf-8")
        said = json.loads(done.stdout.splitlines()[-1])["error"] if words else done.stderr
        assert f"{place} holds no retraining" in said


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_can_be_seen_to_fail_is_told_at_once(dataset, tmp_path, make_package):
    with pytest.raises(UserError, match="is not there; connect its drive"):
        training.start(tmp_path / "gone", None, Options(), sys.executable)
    with pytest.raises(UserError, match="Train on one of auto, cpu"):
        start(dataset, device="abacus")
    with pytest.raises(UserError, match="cannot name a model"):
        start(dataset, name="My Model")
    with pytest.raises(UserError, match="carries no PyTorch weights"):
        training.start(dataset, make_package(), Options(), sys.executable)
    set_ = Dataset.open(dataset)
    set_.remove("case1")
    with pytest.raises(UserError, match=r"holds one case only \(case0\); add"):
        start(dataset)
    values = np.random.default_rng(5).normal(size=(4, 6, 8)).astype(np.float32)
    set_.add(Image(values), (values > 0).astype(np.uint8), patient="P0")
    with pytest.raises(UserError, match="All 2 cases of the training set are of one patient"):
        start(dataset)
    assert training.jobs(dataset) == [] and not (dataset / "retrain").exists()
    with pytest.raises(UserError, match="holds no retraining"):
        training.read(tmp_path)


def test_a_job_goes_where_its_dataset_goes(dataset, tmp_path):
    job = training.create(dataset)
    training.end(job.folder, "finished", "Better.")
    dataset.rename(tmp_path / "moved")
    (found,) = training.jobs(tmp_path / "moved")
    assert found.dataset == tmp_path / "moved"
    (tmp_path / "moved" / "does").rename(tmp_path / "does")
    (tmp_path / "moved").rename(dataset)


def test_a_dataset_may_be_named_by_its_index_or_by_a_list_of_cases(dataset, tmp_path):
    own = training.create(dataset / "dataset.json")
    assert own.dataset == dataset and own.name == "my-set" and training.jobs(dataset / "dataset.json") == training.jobs(dataset) == [own]
    training.end(own.folder, "stopped", "Stopped.")
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("fold", "dataset"):  # other programs' indices are called so too
        cases = lists / f"{name}.json"
        cases.write_text('{"training": []}')
        job = training.create(cases)
        assert (job.dataset, job.name, job.folder.parent) == (cases, name, lists / "retrain")
        assert job in training.jobs(cases)
        with pytest.raises(UserError, match="running already"):
            training.create(cases)
        training.end(job.folder, "stopped", "Stopped.")
    moved = lists.rename(tmp_path / "moved")
    assert {j.dataset for j in training.jobs(moved)} == {moved / "fold.json", moved / "dataset.json"}


def test_live_lines_are_read_once_and_anew_where_the_file_is_another(tmp_path):
    path = tmp_path / "live.jsonl"
    lines = training.LiveLines(path)
    assert lines.read() == ([], False, False)  # not there yet
    made = [{"event": "step", "step": i, "loss": 0.1234567890123 + i} for i in range(9000)]

    def write(wanted, mode="w"):
        with open(path, mode, encoding="utf-8") as f:
            f.writelines(json.dumps(line) + "\n" for line in wanted)

    write(made[:10])
    assert lines.read() == (made[:10], True, False)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(made[10]) + "\n" + "not JSON\n" + json.dumps(made[11])[:9])
    assert lines.read() == ([made[10]], False, False)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(made[11])[9:] + "\n")
    assert lines.read() == ([made[11]], False, False) and lines.read() == ([], False, False)
    # Thinned out, and already longer than it was: the bytes before the place are others.
    write(made[:4] + made[5:40])
    assert lines.read() == (made[:4] + made[5:40], True, False)
    write(made)
    found, turns = [], 0
    while True:
        new, anew, more = lines.read()
        found, turns = (new if anew else found + new), turns + 1
        if not more:
            break
    assert found == made[: len(found)] and len(found) >= len(made) - 1 and turns == 1 + path.stat().st_size // (1 << 18)
    path.write_text("")
    assert lines.read()[0] == []


def test_a_panels_questions_are_answered_line_by_line(dataset):
    """By the real process, as the panel asks it."""
    does(dataset, "finish")
    job = training.create(dataset)
    job.live.write_text(json.dumps({"event": "step", "step": 1}) + "\n", "utf-8")
    folder, gone = str(job.folder), str(dataset / "retrain" / "gone")
    asked = [
        {"find": str(dataset)},
        {"look": folder, "again": True},
        {"look": folder, "again": False},
        {"look": folder, "again": True},
        {"look": gone, "again": True},
        {"running": [folder, gone]},
        {"stop": gone},
        {"stop": folder},
        {"find": str(dataset / "nowhere")},
    ]
    command = [sys.executable, "-m", "UNetSegmentationLib.training", "watch"]
    text = "".join(json.dumps(question) + "\n" for question in asked)
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=CORE, check=True)
    first, found, look, same, again, none, running, no, nothing, empty = (json.loads(line) for line in done.stdout.splitlines())
    assert first["pid"] and [training.decode(each) for each in found["jobs"]] == [training.read(job.folder)]
    assert training.decode(look["job"]) == training.read(job.folder) and look["lines"] == [{"event": "step", "step": 1}]
    assert look["anew"] and not same["lines"] and again["lines"] == look["lines"] and look["pictures"] == []
    assert "holds no retraining" in none["error"] and "holds no retraining" in no["error"]
    assert running == {"running": [folder]} and nothing == {} and (job.folder / training.STOP).exists() and empty == {"jobs": []}


# --------------------------------------------------------------------------------------------------------------- promote


@pytest.fixture
def finished(dataset, make_package):
    """A finished job that made toy 1.1.0 of toy 1.0.0."""
    job = training.create(dataset)
    training.update(job.folder, base="toy-1.0.0", name="toy")
    training.end(job.folder, "finished", "Better.")
    return package_of(job, make_package, version="1.1.0", title="A toy", lineage={"parent": {"name": "toy", "version": "1.0.0"}})


@pytest.fixture
def parent(make_package, models_folder):
    """toy 1.0.0, imported."""
    package = make_package()
    models_folder.mkdir()
    (models_folder / package.path.name).write_bytes(package.path.read_bytes())
    return package


def test_used_it_takes_its_parents_place(finished, parent, models_folder):
    assert find_model("toy").card.version == "1.0.0"
    path = training.promote(finished, "use")
    assert path == models_folder / "toy-1.1.0.unet.zip" and find_model("toy").card.version == "1.1.0"
    assert [p.name for p in models_folder.glob("*.unet.zip")] == ["toy-1.1.0.unet.zip"]
    aside = ModelPackage.read(models_folder / "former" / "toy-1.0.0.unet.zip")
    assert aside.card.data == parent.card.data
    with pytest.raises(UserError, match="is used in place of toy-1.0.0 already; to have both, move that one back if it lies in .*former"):
        training.promote(finished, "keep")
    assert training.read(finished.folder).decided == "use" and ModelPackage.read(path).card.origin == "Fine-tuned from toy 1.0.0."


def test_kept_it_gets_a_name_of_its_own(finished, parent, make_package, models_folder):
    left = models_folder / ".unetseg-1a2b3c4d-t-1.1.0.unet.zip"  # of a killed process
    left.write_bytes(finished.package.read_bytes())
    path = training.promote(finished, "keep")
    assert path.name == "toy-my-set-1.1.0.unet.zip"
    assert find_model("toy").card.version == "1.0.0" and find_model("toy-my-set").card.data["title"] == "A toy (My set)"
    assert training.promote(finished, "keep") == path  # asked for twice, it is there once
    package_of(finished, make_package, version="1.1.0", description="Another training's")
    assert training.promote(finished, "keep").name == "toy-my-set-2-1.1.0.unet.zip"
    cases = finished.dataset.with_name("fold.json")
    cases.touch()
    training.update(finished.folder, dataset=str(cases))
    assert training.promote(package_of(finished, make_package, version="1.1.0", description="A third"), "keep").name.startswith(
        "toy-fold-1"
    )


def test_used_again_after_a_kill_it_is_there_once(finished, parent, models_folder, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "move_file", killed)  # the new one is written, its parent still in its place
        training.promote(finished, "use")
    for _ in range(2):
        assert training.promote(finished, "use").name == "toy-1.1.0.unet.zip"
    assert [p.name for p in models_folder.glob("*.unet.zip")] == ["toy-1.1.0.unet.zip"]
    assert (models_folder / "former" / parent.path.name).is_file()


def test_what_has_the_same_name_and_version_is_not_replaced(finished, make_package, models_folder):
    models_folder.mkdir()
    other = make_package(version="1.1.0", title="Another's")
    (models_folder / other.path.name).write_bytes(other.path.read_bytes())
    assert training.promote(finished, "use").name == "toy-1.2.0.unet.zip"
    assert ModelPackage.read(models_folder / other.path.name).card.data["title"] == "Another's"


def test_the_next_version_is_counted_in_numbers():
    assert training.next_version("1.9.2") == "1.10.0"


def test_a_file_of_any_name_holds_its_models_name(finished, make_package, models_folder):
    models_folder.mkdir()
    same = {"lineage": ModelPackage.read(finished.package).card.data["lineage"]}  # trained for nothing: a copy of its parent
    for name, version, file, more in (
        ("toy", "1.1.0", "my best", {}),
        ("toy", "1.0.0", "toy-old", same),
        ("other", "1.0.0", "toy-1.2.0", {}),
    ):
        package = make_package(name=name, version=version, title="Another's", **more)
        (models_folder / f"{file}.unet.zip").write_bytes(package.path.read_bytes())
    assert training.free_name("toy") == "toy-2" and training.free_name("my") == "my"
    assert training.promote(finished, "use").name == "toy-1.3.0.unet.zip" and find_model("toy").card.data["title"] == "A toy"
    assert find_model("other").path.name == "toy-1.2.0.unet.zip" and (models_folder / "former" / "toy-1.0.0.unet.zip").is_file()


def test_discarded_only_the_record_stays(finished, models_folder):
    (finished.folder / "check").mkdir()
    (finished.folder / "last.ckpt").touch()
    assert training.promote(finished, "discard") is None
    job = training.read(finished.folder)
    assert job.decided == "discard" and job.package is None and not job.resumable
    assert not {p.name for p in job.folder.iterdir()} & {"check", "last.ckpt", "toy-1.1.0.unet.zip"} and not models_folder.exists()
    with pytest.raises(UserError, match="was discarded; start another"):
        training.promote(job, "use")
    with pytest.raises(UserError, match="choose use, keep or discard"):
        training.promote(job, "burn")


def test_discarding_ends_well_where_windows_holds_a_file(finished, monkeypatch):
    (finished.folder / "last.ckpt").touch()
    unlink = Path.unlink

    def held(self, missing_ok=False):
        if self.suffix == ".ckpt":
            raise PermissionError(13, "it is used by another process")
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", held)
    assert training.promote(finished, "discard") is None
    assert training.read(finished.folder).decided == "discard" and not list(finished.folder.glob("*.unet.zip"))


def test_a_parent_that_a_virus_scanner_reads_is_put_aside_a_moment_later(finished, parent, models_folder, busy_file, monkeypatch):
    write = training.write_package

    def written(*arguments):
        made = write(*arguments)
        busy_file.clear()  # the next two moves are refused again
        return made

    monkeypatch.setattr(training, "write_package", written)
    training.promote(finished, "use")
    former = models_folder / "former" / parent.path.name
    assert former.is_file() and busy_file[:3] == [former] * 3


def test_the_parent_of_another_task_stays(finished, make_package, models_folder):
    models_folder.mkdir()
    parent = make_package(name="other")
    (models_folder / parent.path.name).write_bytes(parent.path.read_bytes())
    training.update(finished.folder, base="other-1.0.0")
    training.promote(training.read(finished.folder), "use")
    assert sorted(p.name for p in models_folder.glob("*.unet.zip")) == ["other-1.0.0.unet.zip", "toy-1.1.0.unet.zip"]


def test_resumed_a_job_offers_no_former_package_and_is_not_stopped_again(finished):
    training.update(finished.folder, state="stopped", verdict="worse", kept=True)
    (finished.folder / training.STOP).touch()
    assert training.read(finished.folder).ended is not None
    job = training.resume(finished, launch=False)
    assert job.package is None and job.verdict == "" and job.ended is None and not (job.folder / training.STOP).exists()


def test_room_is_kept_for_the_last_sentence(dataset):
    job = training.create(dataset)
    assert training.claim(job.folder)
    room = job.folder / training._RESERVE
    held = room.stat().st_size if room.exists() else 0
    alive = (job.folder / training.BEAT).exists()
    training.end(job.folder, "failed", "The disk is full.")  # before all else: the fixture ends processes of running jobs, here this one
    assert held >= 1 << 16 and not room.exists()
    assert alive and not (job.folder / training.BEAT).exists()


def test_a_click_model_and_several_channels_do_not_fit():
    card = Card(make_card(task="click"))
    assert training.misfit(card, {"channels": ["T1", "T2"]})
    assert not training.misfit(card, {"channels": ["T1"]}) and not training.misfit(card, None)


def test_a_sigmoid_model_is_refused_before_there_is_a_job(dataset):
    package = find_model("hippocampus-3d")
    package = replace(package, card=Card({**package.card.data, "activation": "sigmoid"}))
    assert not training.misfit(find_model("hippocampus-3d").card, None)
    for folder in (dataset, dataset.parent):  # the other is not known to be a training set
        with pytest.raises(UserError, match="judges each label by itself .*; start from another model, or from scratch"):
            training.create(folder, package)
    assert not training.jobs(dataset)
