"""A retraining as a job: a folder that says all about it, and a process of its own that outlives whoever started it.

    job = start("my-cases", find_model("hippocampus-3d"), Options(quick=True))
    job = read(job.folder)                       state, time left, Dice so far; jobs("my-cases") finds it again later
    promote(job, "use")                          once it is finished

The folder, my-cases/retrain/<time>-<name>, holds
    job.json         what was asked for, which process does it, how it stands; always replaced as a whole
    live.jsonl       loss and Dice while it trains (unetseg_training/live.py says what is in it)
    result.json      Dice, Hausdorff distance and volume error before and after; check/ has the worst cases' masks
    <name>-<version>.unet.zip, base.unet.zip     what came out, and what it started from
    stop             asks the process to end and to keep the best so far
    log.txt          what the process and its libraries wrote
and what unetseg_training needs to go on exactly where a killed process was. This file imports no PyTorch: the process is
`python -m unetseg_training FOLDER`, by a Python that has it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .files import (
    RUNNING,
    UserError,
    atomic_path,
    child_options,
    escape_arguments,
    is_alive,
    is_inner,
    is_this_computer,
    move_file,
    now_in,
    process_mark,
    remove_file,
    this_computer,
    unescape_arguments,
    user_path,
    write_text,
)
from .model import PACKAGES, SUFFIX, Card, ModelPackage, find_model, model_files, named, user_models_folder, write_package

FOLDER, JOB, LIVE, RESULT, STOP, LOG, BEAT, BASE = (
    "retrain",
    "job.json",
    "live.jsonl",
    "result.json",
    "stop",
    "log.txt",
    "alive",
    f"base{SUFFIX}",
)
_RESERVE = ".reserve"
FORMAT = 1
BEAT_S = 20.0  # seconds between a process's signs of life
DEVICES = ("auto", "cpu", "gpu", "mps")
FORMER = "former"  # in the folder of models: what another took the place of
_PIECE = 1 << 18  # of live.jsonl, read at once


@dataclass(frozen=True)
class Options:
    """quick: a model in ten minutes at most, else in hours. device: of DEVICES. minutes: of training, instead of what quick says.
    name: of the model; "" takes the base's, or the dataset's."""

    quick: bool = True
    device: str = "auto"
    minutes: float | None = None
    name: str = ""


@dataclass
class Job:
    """How a retraining stands. state: of RUNNING, or "finished", "stopped" (by a person), "failed", "lost" (its process is gone
    without a word: killed, or the computer was restarted); text: that in a sentence.

    base: "<name>-<version>", "" from scratch. package: what came out. fraction: of the whole; seconds_left, estimate: s, the
    estimate of the whole, measured on this machine; None: not known yet. dice: the best so far. started, ended: s since 1970.
    after: s that the checks will take once it is trained; None: not planned yet. verdict: "better", "same", "worse", "" (nothing to
    compare with, or not yet); decided: "use", "keep", "discard" or "".
    """

    folder: Path
    state: str = "preparing"
    text: str = ""
    name: str = ""
    base: str = ""
    dataset: Path = Path()
    options: Options = field(default_factory=Options)
    package: Path | None = None
    fraction: float = 0.0
    seconds_left: float | None = None
    estimate: float | None = None
    after: float | None = None
    dice: float | None = None
    started: float = 0.0
    ended: float | None = None
    verdict: str = ""
    decided: str = ""
    host: str = ""
    pid: int | None = None
    kept: bool = False  # there are weights that are worth a package

    @property
    def running_here(self) -> bool:
        """On this computer, or it is not yet known on which."""
        return self.running and (not self.host or is_this_computer(self.host))

    @property
    def running(self) -> bool:
        return self.state in RUNNING

    @property
    def resumable(self) -> bool:
        """Whether resume() would go on with it."""
        return self.state in ("lost", "failed", "stopped") and not self.decided

    @property
    def live(self) -> Path:
        return self.folder / LIVE

    @property
    def result(self) -> dict[str, Any] | None:
        """What result.json says; None before the end."""
        try:
            found = json.loads((self.folder / RESULT).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


# --------------------------------------------------------------------------------------------------------------- looking


def jobs_folder(dataset: Path) -> Path:
    """Where a dataset's retrainings lie: in its folder, or beside the file that lists its cases."""
    return (dataset.parent if dataset.is_file() else dataset) / FOLDER


def jobs(dataset: str | Path) -> list[Job]:
    """The retrainings of a dataset, the newest first; of a file's, all that lie beside it."""
    try:
        folders = sorted(jobs_folder(user_path(dataset)).iterdir(), reverse=True)
    except OSError:
        return []
    out = []
    for folder in folders:
        try:
            out.append(read(folder))
        except UserError:
            continue  # not a job, or one that was cut off before it began
    return sorted(out, key=lambda job: -job.started)


def read(folder: str | Path) -> Job:
    """How a job stands now; a few small files are read. UserError where the folder holds none, or is not reached."""
    folder = Path(folder)
    data = _load(folder)
    job = _job(folder, data)
    child = _children.get(folder)
    ended = child is not None and child.poll() is not None  # also takes a dead child's last trace away
    if ended:
        _children.pop(folder, None)
    if not job.running or is_alive(folder / BEAT, data, ended):
        return job
    again = _load(folder)
    if again != data:  # it ended between the two looks
        return read(folder)
    if data.get("pid") is None:
        text = _not_started(folder, str(data.get("python", "")))
        with suppress(UserError):  # only here is it known that the process is over
            update(folder, state="failed", text=text)
        return replace(job, state="failed", text=text, seconds_left=None)
    what = "the computer was restarted, the memory ran out, somebody stopped the process, or its folder was moved or renamed"
    cure = "resume it to go on where it was" if goes_on(folder) else "resume it to begin again"
    return replace(job, state="lost", text=f"It was ended from outside: {what}; {cure}.", seconds_left=None)


def goes_on(folder: Path) -> bool:
    """Whether resume() goes on where the training was: what it needs of each whole epoch is written after the weights (Job.kept)."""
    return (folder / "last.ckpt").is_file()


class LiveLines:
    """The lines of a live.jsonl as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at, self._last = 0, b""  # where to go on, and the bytes before it

    def read(self) -> tuple[list[dict[str, Any]], bool, bool]:
        """(new lines, whether they are the file's first ones again, whether there are more to read at once).

        OSError where the file cannot be read; none and no lines where it is not there yet.
        """
        try:
            with open(self.path, "rb") as f:
                f.seek(self._at - len(self._last))
                data = f.read(len(self._last) + _PIECE)
                # It was thinned out or a training went on from an earlier step: the file is another one.
                anew = not self._at or not data.startswith(self._last)
                if anew and self._at:
                    f.seek(0)
                    data = f.read(_PIECE)
                else:
                    data = data[len(self._last) :]
        except FileNotFoundError:
            return [], False, False
        if anew:
            self._at, self._last = 0, b""
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        self._last = (self._last + whole)[-64:]
        return [line for part in whole.split(b"\n") if (line := _line(part)) is not None], anew and bool(whole), len(data) >= _PIECE


def _line(data: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(data)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _load(folder: Path) -> dict[str, Any]:
    path = folder / JOB
    for attempt in range(4):
        try:
            data = json.loads(path.read_text("utf-8"))
            break
        except FileNotFoundError as e:
            raise UserError(f"{folder} holds no retraining (it has no {JOB}); choose one of those of the dataset.") from e
        except (OSError, ValueError) as e:  # it is being replaced: Windows and network folders say so
            if attempt == 3:
                raise UserError(f"{path} cannot be read ({e}); check the connection to its folder.") from e
            time.sleep(0.02)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version of UNetSegmentation; update this one.")
    return data


def _job(folder: Path, data: Mapping[str, Any]) -> Job:
    known = {f.name for f in fields(Job)} - {"folder", "dataset", "options", "package"}
    try:
        job = Job(folder, **{k: v for k, v in data.items() if k in known})
        job.dataset = folder.parent.parent / data["dataset"]
        job.options = Options(**{k: v for k, v in data.get("options", {}).items() if k in {f.name for f in fields(Options)}})
        package = data.get("package")
        job.package = folder / package if package and is_inner(package) and (folder / package).is_file() else None
        # The process may be killed just after it wrote them, and say so no more.
        job.kept = job.kept or (folder / "best.safetensors").is_file()
        job.started = float(job.started)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{folder / JOB} is damaged ({type(e).__name__}: {e}); remove its folder, or put the file back.") from e
    return job


def update(folder: Path, **changes: Any) -> None:
    """Change job.json; for the one process that has the job, or for who starts it."""
    data = {**_load(folder), **changes}
    for attempt in range(10):
        try:
            write_text(folder / JOB, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
            return
        except UserError as e:  # on Windows and its shares while another reads it
            if attempt == 9 or not isinstance(e.__cause__, PermissionError):
                raise
            time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------- processes

_children: dict[Path, subprocess.Popen[bytes]] = {}  # that this process started


def training_folder() -> Path:
    """Where unetseg_training lies: beside the core, or in a source checkout's `training`."""
    from .worker.client import working_folder

    beside = working_folder()
    for place in (beside, beside.parent / "training"):
        if (place / "unetseg_training" / "__main__.py").is_file():
            return place
    raise UserError("The training's code (unetseg_training) is not installed; install UNetSegmentation again.")


def _launch(folder: Path, python: str) -> None:
    """Start the job's process, which is nobody's child in what matters: it has its own session and no pipe of ours."""
    from .worker.client import child_environment, working_folder

    variables = child_environment(python)
    paths = [str(training_folder()), *filter(None, [variables.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    command = [python, "-m", "unetseg_training", *escape_arguments([str(folder.absolute())])]
    with open(folder / LOG, "ab") as log:
        how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": working_folder(), "env": variables}
        try:
            try:
                child = subprocess.Popen(command, **how, **child_options(apart=True, breakaway=True))
            except PermissionError:
                child = subprocess.Popen(command, **how, **child_options(apart=True))
        except OSError as e:
            raise UserError(f"The training cannot be started with the Python at {python} ({e.strerror or e}); choose another.") from e
    _children[folder] = child


def _not_started(folder: Path, python: str) -> str:
    try:
        log = (folder / LOG).read_text("utf-8", errors="replace").strip().splitlines()
    except OSError:
        log = []
    last = log[-1].strip()[:200] if log else "it said nothing"
    where = f" with the Python at {python}" if python else ""  # none where it was to train here and now
    return f"The training did not start{where} ({last}); install what it needs, or choose another, and resume it."


# --------------------------------------------------------------------------------------------------------- start and stop


def start(
    dataset: str | Path,
    base: ModelPackage | str | Path | None = None,
    options: Options = Options(),
    python: str = sys.executable,
    folder: str | Path | None = None,
) -> Job:
    """Begin a retraining and return at once. base: a package with its weights, None: from scratch. python: one that has what training
    needs.

    folder: of the job (default: a new one in the dataset's "retrain"). Raises UserError for what can be seen to fail now.
    """
    job = create(dataset, base, options, folder)
    try:
        return _go(job.folder, python)
    except BaseException:
        shutil.rmtree(job.folder, ignore_errors=True)
        raise


def create(
    dataset: str | Path, base: ModelPackage | str | Path | None = None, options: Options = Options(), folder: str | Path | None = None
) -> Job:
    """A job's folder, without its process. dataset: a folder, its index, or a file that lists cases."""
    from .dataset import INDEX

    path = user_path(dataset)
    dataset = path.resolve() if ".." in path.parts else path.absolute()  # ".." is no name
    if dataset.name == INDEX and _is_set(dataset.parent):
        dataset = dataset.parent
    summary = _check_dataset(dataset)
    if options.device not in DEVICES or (options.minutes is not None and not 0 < options.minutes < 1e5):
        raise UserError(f"Train on one of {', '.join(DEVICES)}, for a number of minutes above 0.")
    package = base if base is None or isinstance(base, ModelPackage) else find_model(base)
    if package is not None:
        _check_base(package)
        if problem := misfit(package.card, summary):
            raise UserError(problem)
    name = options.name or (package.card.name if package else slug(_called(dataset)))
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", name):
        raise UserError(f"{name!r} cannot name a model; use lower-case letters, digits and dashes.")
    _check_alone(dataset)
    now = time.time()
    try:
        place = _new_folder(dataset, name, now) if folder is None else user_path(folder).absolute()
        if folder is not None:
            place.mkdir(parents=True, exist_ok=True)
            if (place / JOB).exists():
                raise UserError(f"{place} holds a retraining already; resume that, or choose another folder.")
            if any(place.iterdir()):  # what fails to start, or is discarded, is removed
                raise UserError(f"{place} holds other files; choose a new or an empty folder.")
        try:
            if package is not None:
                with atomic_path(place / BASE) as temporary:
                    shutil.copyfile(package.path, temporary)
            data = {
                "format": FORMAT,
                "state": "preparing",
                "text": "Starting",
                "name": name,
                "base": f"{package.card.name}-{package.card.version}" if package else "",
                # Inside its dataset, or beside its list, it goes where that goes, onto another computer too.
                "dataset": str(dataset) if place.parent != jobs_folder(dataset) else dataset.name if dataset.is_file() else "",
                "options": asdict(options),
                "started": now,
                "launched": now_in(place),
                "pid": None,
            }
            write_text(place / JOB, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        except BaseException:
            if folder is None:
                shutil.rmtree(place, ignore_errors=True)
            raise
    except OSError as e:
        raise UserError(f"{dataset} cannot be written to ({e.strerror or e}); check its space, the connection and your rights.") from e
    return read(place)


def misfit(card: Card, summary: Mapping[str, Any] | None) -> str:
    """Why a model cannot go on with a dataset (its Dataset.summary(), None: not known), and what can be done; "" where it can."""
    if card.activation == "sigmoid":  # a new model's labels share one softmax with the background
        return f"{card.name} judges each label by itself (sigmoid), which is not trained here; start from another model, or from scratch."
    if summary is not None and summary.get("flat") and card.dimensions == 3:
        return f"The cases are single slices and {card.name} is a 3D model; start from a 2D model, or from scratch."
    if summary is not None and card.data["task"] == "click" and len(summary.get("channels") or [""]) != 1:
        return f"{card.name} is clicked on in one image and each case has several; start from another model, or from scratch."
    return ""


def _is_set(folder: Path) -> bool:
    """Whether it is a dataset folder of this program: other programs' indices have the same name."""
    from .dataset import INDEX

    try:
        return bool(json.loads((folder / INDEX).read_text("utf-8")).get("format") == "unetseg-dataset")
    except (OSError, ValueError, AttributeError):
        return False


def _check_dataset(dataset: Path) -> dict[str, Any] | None:
    """What a look at the index shows, and the dataset's summary; layouts of other programs are judged by the training itself."""
    from .dataset import Dataset

    if not dataset.exists():
        raise UserError(f"The dataset {dataset} is not there; connect its drive or network folder, or check the name.")
    if not _is_set(dataset):
        return None
    opened = Dataset.open(dataset)
    entries = opened.entries
    if len(entries) < 2:
        held = "no case yet" if not entries else f"one case only ({next(iter(entries))})"
        raise UserError(f"The training set holds {held}; add at least two of two patients, one to learn from and one to be checked on.")
    if len({e.patient for e in entries.values()}) < 2:
        raise UserError(
            f"All {len(entries)} cases of the training set are of one patient, so nothing would show how well the model does on another; "
            "add a case of a second patient."
        )
    return opened.summary()


def _check_alone(dataset: Path) -> None:
    """Two at once would share one computer's memory."""
    for other in jobs(dataset):
        if other.running_here:
            raise UserError(f"A retraining of this dataset is running already ({other.name}); wait for its end, or stop it.")


def _check_base(package: ModelPackage) -> None:
    card = package.card
    if package.safetensors is None or "network" not in card.data:
        raise UserError(f"{card.name} {card.version} carries no PyTorch weights, so it cannot be trained on; choose another model.")


def _new_folder(dataset: Path, name: str, now: float) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    folder = jobs_folder(dataset)
    folder.mkdir(exist_ok=True)
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        try:
            place = folder / f"{stamp}-{name}{suffix}"
            place.mkdir()
            return place
        except FileExistsError:
            continue
    raise UserError(f"{folder} holds too many trainings of this second; try again.")


def _called(dataset: Path) -> str:
    """The name of a dataset's folder, or of the file that lists its cases."""
    return dataset.stem if dataset.is_file() else dataset.name


def slug(text: str) -> str:
    """A text as the name of a model."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64].strip("-") or "my-model"


def resume(job: Job, python: str = sys.executable, finish: bool = False, launch: bool = True) -> Job:
    """Go on with a job that was stopped or lost, or that failed, where it was; returns at once. finish: train no further, but
    make a package of the best so far. launch False: the caller is the process that goes on.
    UserError where it runs, or another of its dataset does on this computer, or it has nothing to go on with."""
    from .dataset import FolderLock

    with FolderLock(job.folder):  # two Slicers may find it lost at the same time
        now = read(job.folder)
        if now.running:
            raise UserError("This retraining is running; there is nothing to resume.")
        if not now.resumable:
            raise UserError("This retraining is finished; start a new one to train further.")
        if finish and not now.kept:
            raise UserError("No epoch of this training was finished, so there is nothing to make a model of; resume it.")
        _check_alone(now.dataset)
        if link := next((path for path in job.folder.rglob("*") if path.is_symlink()), None):
            raise UserError(f"{link} is a link, which no training makes, and what it writes would go elsewhere; remove it, then resume.")
        if finish:
            (job.folder / STOP).touch()
        else:
            remove_file(job.folder / STOP)
        before = _load(job.folder)
        changed = {"state": "preparing", "text": "Starting", "pid": None, "mark": None, "launched": now_in(job.folder), "ended": None}
        # A killed process left its time, and a former package, which may have been judged worse, is no longer on offer.
        update(job.folder, **changed, fraction=0.0, seconds_left=None, verdict="", package=None)
        try:
            return _go(job.folder, python) if launch else read(job.folder)
        except BaseException:
            update(job.folder, **before)
            raise


def _go(folder: Path, python: str) -> Job:
    update(folder, python=python)
    _launch(folder, python)
    return read(folder)


def stop(job: Job) -> None:
    """Ask a running job to end and to keep the best so far; returns at once. Checks and the package still follow."""
    if not read(job.folder).running:
        raise UserError("This retraining is not running; there is nothing to stop.")
    try:
        (job.folder / STOP).touch()
    except OSError as e:
        raise UserError(f"{job.folder} cannot be written to ({e.strerror or e}); check the connection, and try again.") from e


# ------------------------------------------------------------------------------------------------ the job's own process


def claim(folder: Path) -> bool:
    """Write this process into job.json; False where another one that lives has the job."""
    data = _load(folder)
    if data.get("pid") not in (None, os.getpid()) and is_alive(folder / BEAT, data):
        return False
    (folder / BEAT).touch()
    # Room for the last sentence, should the disk be full then.
    (folder / _RESERVE).write_bytes(bytes(1 << 16))
    update(folder, pid=os.getpid(), mark=process_mark(os.getpid()), host=this_computer(), state="preparing")
    return True


def end(folder: Path, state: str, text: str) -> None:
    """The last words of the job's process. It waits two minutes for a network folder that is away."""
    done = {"fraction": 1.0} if state == "finished" else {}
    until = time.monotonic() + 120
    while True:
        try:
            with suppress(OSError):
                (folder / _RESERVE).unlink(missing_ok=True)
            update(folder, state=state, text=text, seconds_left=None, ended=time.time(), **done)
            break
        except UserError:
            if time.monotonic() > until:
                raise
            time.sleep(2)
    with suppress(OSError):
        (folder / BEAT).unlink(missing_ok=True)


@contextmanager
def signs_of_life(folder: Path) -> Iterator[None]:
    """While the block runs, other computers see that the process lives."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            with suppress(OSError):  # a network folder may be gone for a while
                (folder / BEAT).touch()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(1)


# --------------------------------------------------------------------------------------------------------------- promote


def promote(job: Job, how: str) -> Path | None:
    """What becomes of a finished job's package; returns where it lies then.

    "use": it takes its parent's place among the user's models; the parent, where it lies there and not with the program, goes
    into the folder "former" beside. "keep": both stay, this one under a name of its own. "discard": it is removed, with
    all but the record of it. That it is worse is for the caller to ask about.
    """
    if how not in ("use", "keep", "discard"):
        raise UserError(f"{how} is nothing that can be done with a model; choose use, keep or discard.")
    job = read(job.folder)
    if job.running:
        raise UserError("This retraining is still running; wait for its end, or stop it.")
    if how == "discard":
        update(job.folder, decided=how, package=None)
        _clear(job.folder)
        return None
    if job.package is None:
        what = "was discarded; start another" if job.decided == "discard" else "has made no model; resume it, or start another"
        raise UserError(f"This retraining {what}.")
    package = ModelPackage.read(job.package)
    models = user_models_folder()
    parent = job.base.rpartition("-")
    card = dict(package.card.data)
    former: Path | None = None
    if how == "keep" and job.decided == "use" and package.card.name == parent[0]:
        aside = models / FORMER
        raise UserError(f"It is used in place of {job.base} already; to have both, move that one back if it lies in {aside}.")
    if how == "use":
        if package.card.name == parent[0]:
            former = next((p for p in models.glob(PACKAGES) if named(p) == (parent[0], parent[2])), None)
    elif package.card.name == parent[0] or taken(card["name"], card["version"]):
        card["name"] = free_name(slug(f"{card['name'][:40]}-{_called(job.dataset)[:20]}"))
        card["title"] = f"{card.get('title') or package.card.name} ({_called(job.dataset)})"[:200]
    path = _there(models, package, job.base, lambda name: name == card["name"] if how == "use" else name != parent[0])
    if path is None:
        while taken(card["name"], card["version"]):
            card["version"] = next_version(card["version"])
        target = models / f"{card['name']}-{card['version']}{SUFFIX}"
        path = write_package(target, {k: v for k, v in card.items() if k != "files"}, package.onnx, package.safetensors).path
    if former is not None:
        try:
            (models / FORMER).mkdir(exist_ok=True)
            move_file(former, models / FORMER / f"{job.base}{SUFFIX}")  # whatever its file was called
        except OSError as e:
            raise UserError(f"{former} could not be put aside ({e.strerror or e}); both models are in the list now.") from e
    update(job.folder, decided=how)
    return path


def _there(models: Path, package: ModelPackage, base: str, called: Callable[[str], bool]) -> Path | None:
    """This very package under a name of the right kind, as where it was put there before and the process killed just then. Not its
    parent, of which it may be no more than a copy."""

    def content(card: Card) -> dict[str, Any]:
        return {k: v for k, v in card.data.items() if k not in ("name", "version", "title")}

    for path in sorted(models.glob(PACKAGES)):
        name, version = named(path)
        if f"{name}-{version}" != base and called(name):
            with suppress(UserError):
                if content(ModelPackage.read(path).card) == content(package.card):
                    return path
    return None


def taken(name: str, version: str) -> bool:
    """Whether a model is called so, or a user's file that is another model's."""
    return (user_models_folder() / f"{name}-{version}{SUFFIX}").exists() or (name, version) in map(named, model_files())


def free_name(name: str) -> str:
    have = {named(path)[0] for path in model_files()}
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in have)


def next_version(version: str) -> str:
    """1.4.2 -> 1.5.0"""
    major, minor, _ = version.split(".")
    return f"{major}.{int(minor) + 1}.0"


def _clear(folder: Path) -> None:
    """Remove what is large: weights, packages, masks; the record of the training stays, as does what another program holds."""
    for path in (*folder.glob("*" + SUFFIX), *folder.glob("*.ckpt"), *folder.glob("*.safetensors")):
        with suppress(OSError):
            path.unlink(missing_ok=True)
    for name in ("check", "pictures"):
        shutil.rmtree(folder / name, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- in a process


def encode(job: Job) -> dict[str, Any]:
    """A job as JSON for another process, which decode() gives back."""
    return {**asdict(job), "folder": str(job.folder), "dataset": str(job.dataset), "package": str(job.package) if job.package else None}


def decode(data: Mapping[str, Any]) -> Job:
    package = Path(data["package"]) if data["package"] else None
    places = {"folder": Path(data["folder"]), "dataset": Path(data["dataset"]), "package": package}
    return Job(**{**data, **places, "options": Options(**data["options"])})


def watch(questions: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Answers to a panel's questions, a line of JSON each: a network drive that hangs holds up this process and no panel.

    {"find": dataset}                   {"jobs": encoded}
    {"running": [job folders]}          {"running": those that run still}
    {"look": job folder, "again": bool} {"job", "result", "lines": those of live.jsonl that are new, or all where "again"; "anew",
                                        "more": as of LiveLines.read(); "pictures": [path, time] of the last validation's}
    {"stop": job folder}                {}
    {"error": a sentence} where it cannot be done.
    """
    live = LiveLines(Path())
    pictures: list[Path] = []
    for question in questions:
        asked = json.loads(question)
        try:
            if "find" in asked:
                yield {"jobs": [encode(job) for job in jobs(asked["find"])]}
            elif "running" in asked:
                yield {"running": [folder for folder in asked["running"] if _runs(folder)]}
            elif "stop" in asked:
                stop(read(asked["stop"]))
                yield {}
            else:
                job = read(asked["look"])
                if asked["again"] or live.path != job.live:
                    live, pictures = LiveLines(job.live), []
                lines, anew, more = live.read()
                for line in lines:
                    if line.get("event") == "validation":
                        pictures = _pictures(job, line.get("pictures"))
                stamps = [[str(path), path.stat().st_mtime] for path in pictures if path.is_file()]
                result = None if job.running else job.result
                yield {"job": encode(job), "result": result, "lines": lines, "anew": anew, "more": more, "pictures": stamps}
        except UserError as e:
            yield {"error": str(e)}
        except OSError as e:
            yield {"error": f"{asked.get('look', '')} cannot be read ({e.strerror or e}); it is tried again."}


def _runs(folder: str) -> bool:
    try:
        return read(folder).running
    except (UserError, OSError):  # it was discarded, or its disk is away
        return False


def _pictures(job: Job, names: Any) -> list[Path]:
    return [job.folder / str(n) for n in names if is_inner(str(n))] if isinstance(names, list) else []


def task(name: str, *rest: str) -> dict[str, Any]:
    """What takes a panel too long to do itself; its answer. python: which one can train; start DATASET BASE OPTIONS ("" for no
    base, the options as JSON), with this Python and its variables: the job, encoded; resume FOLDER [finish], likewise;
    promote FOLDER HOW: the model's path, and the job."""
    if name == "python":
        from .environment import training_python

        try:
            python, variables = training_python()
        except UserError as e:
            return {"python": "", "lacks": str(e)}
        return {"python": python, "variables": variables}
    if name == "start":
        return {"job": encode(start(rest[0], rest[1] or None, Options(**json.loads(rest[2])), sys.executable))}
    job = read(rest[0])
    if name == "resume":
        return {"job": encode(resume(job, sys.executable, finish="finish" in rest[1:]))}
    if name == "promote":
        path = promote(job, rest[1])
        return {"path": None if path is None else str(path), "job": encode(read(job.folder))}
    raise ValueError(f"no task {name!r}")


def main(arguments: list[str]) -> int:
    """The first line is the process's id, the last the task's answer, or {"error": a sentence}. With "watch": an answer for each
    line of stdin."""
    from .environment import activate

    print(json.dumps({"pid": os.getpid()}), flush=True)
    activate()  # before anything but the standard library is imported
    if arguments == ["watch"]:
        for found in watch(sys.stdin):
            print(json.dumps(found), flush=True)
        return 0
    try:
        answer = task(*unescape_arguments(arguments))
    except UserError as e:
        answer = {"error": str(e)}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
