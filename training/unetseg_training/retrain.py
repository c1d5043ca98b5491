"""What the process of a job does (UNetSegmentationLib.training has its folder and says how it is found again).

    run(folder)    plan, train, export, compare with the model that it started from; each step once, after a kill as well

The cases are written down when it begins (cases.json): what is added or corrected meanwhile is for the next retraining, and
a run that goes on finds the same. Who is held out stays held out: cases of a dataset folder that are in no part yet are
dealt to training and validation there, by patient, and keep their part when more come.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from UNetSegmentationLib import training
from UNetSegmentationLib.dataset import Dataset, translated
from UNetSegmentationLib.engines import make_engine
from UNetSegmentationLib.files import UserError, counted, write_text
from UNetSegmentationLib.image import Box, Image, write_image
from UNetSegmentationLib.inference.predict import Prediction
from UNetSegmentationLib.model import SUFFIX, Card, Label, ModelPackage, label_key, model_files, read_card, write_package
from UNetSegmentationLib.networks import UNetConfig

from . import clicks, metrics, report, watch
from . import config as config_file
from .cases import IGNORE, NAMED, Case, CaseSet, channel_places, evenly, file_name, find_cases, ordered_channels
from .check import early
from .config import Config
from .export import card_path, compact, export_run, lineage, markdown
from .finetune import named_as, replay_set, start_of
from .plan import Machine, same_labels, same_task
from .plan import plan as make_plan
from .train import WEIGHTS, Callback, Keeper, load_run, read_run, train

CASES, CHECK = "cases.json", "check"
QUICK_MINUTES = 5.0  # of training, so that ten are enough for all of it
HELD_OUT = 0.2
MOST_CHECKED = {True: 20, False: 100}  # held-out cases that both models are scored on, quick or not
WORST = 4  # whose masks are kept to be looked at, with so many mm about them
AROUND_MM, LARGEST = 20.0, 200
# A change of the mean Dice that nobody would call one.
SAME = 0.005
# Fewer patients show nothing: models that are alike both improve on all of 4 once in 16 times, and no interval tells so.
FEWEST_SURE = 5
FIGURES = ("dice", "hausdorff95_mm", "volume_error_percent")
THREE_CLICKS = "dice_3_clicks"


class Stopped(SystemExit):
    """A person asked for the end. (Lightning and Watch take a SystemExit for an end that is no failure.)"""


# ------------------------------------------------------------------------------------------------------------------- run


def run(folder: str | Path, say: Callable[[str], None] | None = None) -> int:
    """Do the job in `folder`, which this process has claimed, to its end; returns an exit code. What goes wrong becomes a
    sentence in job.json. say: is told each new sentence."""
    folder = Path(folder)
    told = _Told(folder, say)
    try:
        with training.signs_of_life(folder):
            state, text = _work(folder, told)
    except Stopped:
        state, text = "stopped", "Stopped before an epoch was finished, so no model was made; resume it, or discard it."
    except KeyboardInterrupt:
        state, text = "stopped", "Stopped; resume it to go on where it was."
    except UserError as e:
        state, text = "failed", _sentence(str(e), folder)
    except OSError as e:
        state, text = "failed", f"{folder} cannot be written to ({e.strerror or e}); free some space, check the connection, and resume it."
    except SystemExit:
        state, text = "lost", "The system asked it to end, as when the computer is shut down; resume it to go on where it was."
    except Exception as e:
        traceback.print_exc()
        state = "failed"
        text = f"Something unexpected went wrong ({type(e).__name__}: {str(e)[:200]}); please report it with {training.LOG}."
    training.end(folder, state, text)
    if say:
        say(text)
    return 0 if state in ("finished", "stopped") else 1


def _sentence(text: str, folder: Path) -> str:
    """A sentence of the training, for somebody who reads it in a panel."""
    text = text.replace("--restart", "a new retraining")
    if " cannot be written (" not in text:
        return text
    whole = training.goes_on(folder)
    kept = "What is trained so far is kept: resume it then." if whole else "No whole epoch is kept: resume it then, and it begins anew."
    return f"{text} {kept}"


class _Told:
    """What job.json is told, not more often than people and network folders like; and whether a person asked for the end."""

    def __init__(self, folder: Path, say: Callable[[str], None] | None) -> None:
        self.folder, self.say = folder, say
        self.began, self._last, self._looked = time.monotonic(), 0.0, 0.0
        self._said = ""
        self.after = 60.0  # s that the checks will take, until it is planned
        self.stoppable = True  # the checks follow whoever asks for the end during them

    def __call__(self, text: str | None = None, now: bool = False, **changes: Any) -> None:
        """text: a sentence; now: at once, else once a second."""
        if not now and time.monotonic() - self._last < 1:
            return
        self._last = time.monotonic()
        try:
            training.update(self.folder, **changes, **({"text": text} if text is not None else {}))
        except UserError:
            if now:
                raise
            return  # a full disk or a network folder that is away for a moment: only what must be kept fails for it
        if text and text != self._said and self.say:
            self.say(text)
        self._said = text or self._said

    def check_stop(self) -> None:
        """Raises Stopped where the file is there."""
        if self.stoppable and time.monotonic() - self._looked > 0.3:
            self._looked = time.monotonic()
            if (self.folder / training.STOP).exists():
                raise Stopped

    def progress(self, text: str, low: float, high: float, last: bool = False) -> Callable[[int, int, str], None]:
        """last: nothing follows, so the time left is what is left of this, as those took that are done."""
        began, spent = time.monotonic(), dict[int, float]()  # s until so many were done, each of which is told of several times

        def tell(done: int, of: int, name: str) -> None:
            self.check_stop()
            now = time.monotonic() - began
            whole = spent.setdefault(done, now) / done * of if done else self.after
            left: dict[str, Any] = {"seconds_left": round(max(0.0, whole - now), 1)} if last else {}
            self(f"{text} ({name})" if name else text, fraction=low + (high - low) * done / max(1, of), **left)

        return tell


def _work(folder: Path, told: _Told) -> tuple[str, str]:
    job = training.read(folder)
    told.after = job.after or told.after
    base = ModelPackage.read(folder / training.BASE) if (folder / training.BASE).is_file() else None
    finish = (folder / training.STOP).exists()
    stopped = False
    if not (finish and (folder / WEIGHTS).is_file()):
        told("Reading the cases", now=True, state="preparing", fraction=0.0)
        case_set, facts = _cases(folder, job, base)
        for note in (*facts.get("named", ()), *_of_early(facts.get("early", {}))):
            told(note, now=True)
        config = _configured(folder, job, base, case_set, facts, told)
        sentence = ""
        state = None
        if base is not None:
            start = start_of(base, config)
            state, sentence = start.state, start.sentence
        told(sentence or "Training from scratch", now=True)
        try:
            train(
                config,
                folder,
                case_set,
                fold=None,
                start=state,
                callbacks=[*watch.callbacks(folder, config, bar=False, tensorboard=False), Steer(told, config)],
                cache=folder.parent / "cache" if folder.parent.name == training.FOLDER else folder / "cache",
                progress=told.progress("Preparing the cases", 0.03, 0.06),
            )
        except (SystemExit, KeyboardInterrupt) as e:
            # Lightning makes a SystemExit of Ctrl-C, and one of SIGTERM.
            if not isinstance(e, (Stopped, KeyboardInterrupt)) and not isinstance(e.__context__, KeyboardInterrupt):
                raise
            if not (folder / WEIGHTS).is_file():
                raise Stopped from e
            stopped = True
    else:
        case_set, facts = _thawed(folder, job, finish=True)
        stopped = True
    told.stoppable = False
    told("Checking the new model on held-out cases", now=True, state="checking", fraction=0.85, seconds_left=told.after)
    result = _checked(folder, job, base, case_set, facts, told, stopped)
    training.update(folder, package=result["package"], verdict=result["verdict"])
    with suppress(OSError):  # on Windows, while another program looks it over
        (folder / training.STOP).unlink(missing_ok=True)
    return ("stopped" if stopped else "finished"), result["sentence"]


# ----------------------------------------------------------------------------------------------------------------- cases


def _cases(folder: Path, job: training.Job, base: ModelPackage | None = None) -> tuple[CaseSet, dict[str, Any]]:
    """The cases of this retraining, each in its part, and what is to be said of the dataset; the same ones each time. Channels that are
    its base's come in that one's order, as whoever calls the new version gives them, and so do labels, or both could not be averaged.
    Not where masks hold named structures, of which the later label wins a voxel: a tumour would be lost under its organ."""
    if (folder / CASES).is_file():
        return _thawed(folder, job)
    path = job.dataset
    facts: dict[str, Any] = {"name": path.name, "revision": None}

    def ordered(only: Sequence[str] = ()) -> CaseSet:
        read = find_cases(path, only=only)
        if base is not None:
            with suppress(UserError):  # channels that lie in one file keep their order, and the model gets a name of its own
                return ordered_channels(read, base.card.data["channels"])
        return read

    case_set = ordered()
    dataset = Dataset.open(path) if case_set.layout == "unetseg" else None
    if dataset is not None:
        people = {e.patient for e in dataset.entries.values()}
        if len(people) > 1 and any(not e.split for e in dataset.entries.values()):
            dataset.split((1 - HELD_OUT, HELD_OUT, 0))
            case_set = ordered()
        facts = {"name": dataset.name, "revision": dataset.refresh().revision}
    cases = [c for c in case_set.annotated if c.split != "test"]
    if len(cases) < 2 or len({c.patient for c in cases}) < 2:
        what = counted(len(cases), "annotated case") if len(cases) < 2 else f"cases of one patient only ({len(cases)})"
        raise UserError(
            f"{path.name} has {what} to learn from; a model needs two patients at least, one to learn from and one to be checked on: "
            "add more."
        )
    parts = {c.split or "train" for c in cases}
    if parts != {"train", "validation"}:
        cases = _dealt(cases)
    cases = _with_marks(cases, case_set)
    if base is None or base.card.data["task"] != "click":  # which makes one of all labels
        # A first case brings all labels of its model, of which a person may mark some only; a rare one may be in held-out cases alone.
        names = [label.name for label in case_set.labels]
        while True:
            found: set[str] = set()
            for c in cases:
                if c.split != "validation" and len(found) < len(case_set.labels):
                    found |= _marks(c, case_set, dataset)
            if not found or len(found) == len(case_set.labels):
                break
            case_set = ordered([label.name for label in case_set.labels if label.name in found])
            cases = _with_marks(cases, case_set)  # which may take the one that marks another
        facts["unmarked"] = [name for name in names if name not in found]
    facts["early"] = early(case_set) if base is None or base.card.data["task"] != "click" else {}
    if base is not None:
        named = named_as(case_set, base.card)
        facts["named"] = [*named.notes[len(case_set.notes) :]]
        case_set = named
    if base is not None and same_labels(base.card, case_set) and not any(c.reader in NAMED for c in case_set.cases):
        case_set = replay_set(case_set, [label.name for label in base.card.labels], case_set.channels)
    tests = [c for c in case_set.annotated if c.split == "test"]
    case_set = case_set.subset([*(replace(c, split=c.split or "train") for c in cases), *tests])
    facts["sha256"] = report.dataset_hash({c.name: case_set.digest(c) for c in case_set.cases})
    _freeze(folder, job, case_set, facts)
    return case_set, facts


def _marks(case: Case, case_set: CaseSet, dataset: Dataset | None) -> set[str]:
    """The names of the labels that a case marks: as they were counted, or, where nobody did or one was renamed since, as its mask holds
    them."""
    entry = dataset.entries.get(case.name) if dataset is not None else None
    counts = entry.record.get("voxels_by_label", {}) if entry is not None else {}
    if counts and counts.keys() <= {label.name for label in case_set.labels}:
        return {name for name, count in counts.items() if count}
    held = np.unique(case_set.load(case)[1])
    return {label.name for label in case_set.labels if label.value in held}


def _of_early(cases: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for each label of check.early()."""
    return [
        f"Added before the set had {label}, so trained as holding none of it, and not measured for it: {counted(len(names), 'case')}; "
        "correct each again, or remove it."
        for label, names in cases.items()
    ]


def _freeze(folder: Path, job: training.Job, case_set: CaseSet, facts: dict[str, Any]) -> None:
    def place(path: Path | None) -> str | None:
        if path is None:
            return None
        return path.relative_to(job.dataset).as_posix() if job.dataset in path.parents else str(path.absolute())

    data = {
        "dataset": facts,
        "labels": [label.to_json() for label in case_set.labels],
        "channels": case_set.channels,
        "layout": case_set.layout,
        "values": [[k, v] for k, v in case_set.values.items()],
        "cases": [{**asdict(c), "images": [place(p) for p in c.images], "label": place(c.label)} for c in case_set.cases],
    }
    write_text(folder / CASES, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _dealt(cases: Sequence[Case]) -> list[Case]:
    """Those of about HELD_OUT of the patients for validation: by each patient's own hash, so that who is held out stays held out when
    others come."""
    ranks = {c.patient: int(hashlib.sha256(c.patient.encode("utf-8", "surrogateescape")).hexdigest(), 16) / 2**256 for c in cases}
    lowest, highest = min(ranks, key=ranks.__getitem__), max(ranks, key=ranks.__getitem__)
    held_out = ({p for p, rank in ranks.items() if rank < HELD_OUT} | {lowest}) - {highest}
    return [replace(c, split="validation" if c.patient in held_out else "train") for c in cases]


def _with_marks(cases: list[Case], case_set: CaseSet) -> list[Case]:
    """Where all held-out masks are empty, a patient who has marks changes places with one of those: nothing would show how well the
    model does, and no training can have ended with these parts."""
    if any(case_set.marked(c) for c in cases if c.split == "validation"):
        return cases
    marked = list(dict.fromkeys(c.patient for c in cases if c.split != "validation" and case_set.marked(c)))
    if len(marked) < 2:
        return cases
    other = {"train": "validation", "": "validation", "validation": "train"}
    swapped = {marked[0], next(c.patient for c in cases if c.split == "validation")}
    return [replace(c, split=other[c.split]) if c.patient in swapped else c for c in cases]


def _thawed(folder: Path, job: training.Job, finish: bool = False) -> tuple[CaseSet, dict[str, Any]]:
    """finish: of what is trained a model is made, for which the training cases need not be there."""
    data = json.loads((folder / CASES).read_text("utf-8"))

    def tuples(value: Any) -> Any:
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    cases = []
    for given in data["cases"]:
        entry = dict(given)
        images = tuple(job.dataset / p for p in entry.pop("images"))
        label = entry.pop("label")
        cases.append(Case(images=images, label=job.dataset / label if label else None, **{k: tuples(v) for k, v in entry.items()}))
        for path in (*images, *([cases[-1].label] if cases[-1].label else [])):
            if not (path.exists() or (finish and cases[-1].split == "train")):
                cure = ", or make a model of what is trained (resume --finish)" if job.kept and not finish else ", or start anew"
                raise UserError(f"{path} of case {entry['name']} is no longer there, so this retraining cannot go on; bring it back{cure}.")
    labels = tuple(map(Label.from_json, data["labels"]))
    values = {int(k): int(v) for k, v in data["values"]}
    return CaseSet(tuple(cases), labels, tuple(data["channels"]), data["layout"], values, source=job.dataset), data["dataset"]


# ------------------------------------------------------------------------------------------------------------------ plan


def _configured(
    folder: Path, job: training.Job, base: ModelPackage | None, case_set: CaseSet, facts: dict[str, Any], told: _Told
) -> Config:
    """config.yaml of the job: planned for this machine, or as it was planned."""
    device = job.options.device
    machine = Machine.here()
    if device in ("gpu", "mps") and not machine.gpu:
        raise UserError("There is no GPU here that PyTorch can use; retrain on the CPU, or install PyTorch for your GPU.")
    if (folder / "config.yaml").is_file():
        config = config_file.read(folder)
        planned = config.model_dump(mode="json")
        planned["fit"]["accelerator"] = device
        return config_file.parse(planned, "the plan")
    quick = job.options.quick
    minutes = job.options.minutes or (QUICK_MINUTES if quick else None)
    told("Measuring how fast this machine is", now=True)
    old = (base.card, UNetConfig.from_json(base.card.data["network"])) if base else None
    made = make_plan(
        case_set,
        job.dataset,
        quick=quick,
        minutes=minutes,
        machine=replace(machine, gpu="", gpu_memory=0) if device == "cpu" else machine,
        base=old,
        progress=told.progress("Reading the cases", 0.0, 0.03),
    )
    data = made.config.model_dump(mode="json")
    data["fit"]["accelerator"] = device
    if minutes is not None:
        data["fit"]["minutes"] = float(f"{1.35 * minutes:.3g}")  # should the machine be busier than when it was measured
    every, fit = data["fit"]["validate_every"], data["fit"]
    if quick and fit["validate_cases"] * 2 >= 2 * every > 4:  # a curve of two points says nothing; in the same time, on fewer cases
        fit |= {"validate_every": 2, "validate_cases": fit["validate_cases"] * 2 // every}
    data["model"] = _named(job, base, case_set, facts, data)
    made.config = config_file.parse(data, "the plan")
    checked = len(_held_out(case_set, quick, made.config.model.task == "click"))
    told.after = 20 + checked * made.case_seconds * (2 if base else 1)
    cap = made.config.fit.minutes
    left = (made.seconds if cap is None else min(made.seconds, 60 * cap)) + told.after
    told("Measured", now=True, estimate=round(time.monotonic() - told.began + left), seconds_left=round(left), after=round(told.after, 1))
    made.write(folder)  # only now: whoever goes on reads both
    return made.config


def _named(job: training.Job, base: ModelPackage | None, case_set: CaseSet, facts: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What the new package says about itself: its base's words where it does the same task."""
    train = [c for c in case_set.cases if c.split == "train"]
    learned = f"{facts['name']}: {len(train)} cases of {len({c.patient for c in train})} patients"
    name, version = job.name, "0.1.0"
    out = {**data["model"], "title": facts["name"], "training_data": [*data["model"]["training_data"][:-1], learned]}
    if base is not None:
        same = same_task(base.card, case_set)
        if same:
            out["title"] = base.card.data.get("title") or base.card.name
        elif not job.options.name:
            # Under its base's name it would take that one's place in every list, and segment something else, or other images.
            name = training.slug(facts["name"])
        if name == base.card.name and same:
            version = training.next_version(base.card.version)
    if not job.options.name and any(not same_task(card, case_set) for card in _cards(name)):
        name = training.free_name(name)
    if name != job.name:
        training.update(job.folder, name=name)
    while training.taken(name, version):
        version = training.next_version(version)
    return {**out, "name": name, "version": version}


def _cards(name: str) -> list[Card]:
    """Of the models of that name that are here."""
    cards = []
    for path in model_files():
        with suppress(UserError):  # one that is damaged takes no other's place
            cards.append(read_card(path))
    return [card for card in cards if card.name == name]


# ----------------------------------------------------------------------------------------------------------------- steer


class Steer(Callback):
    """Tells job.json how far the training is, and ends it when a person asks: between two steps, by Stopped, so that the
    last checkpoint is that of a whole epoch and resume() goes on exactly."""

    def __init__(self, told: _Told, config: Config) -> None:
        self.told, self.minutes = told, config.fit.minutes
        self.began = self.first = self.before = 0.0
        self.best: float | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.began, self.first = time.monotonic(), trainer.global_step
        keeper = next(c for c in trainer.callbacks if isinstance(c, Keeper))
        self.before, self.best = keeper.seconds, keeper.best if np.isfinite(keeper.best) else None
        self.told(now=True, state="training", dice=self.best)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.told.check_stop()
        total, done = int(trainer.estimated_stepping_batches), trainer.global_step
        spent = time.monotonic() - self.began
        left = spent / max(1, done - self.first) * (total - done)
        part = done / max(1, total)
        if self.minutes:
            rest = 60 * self.minutes - self.before - spent
            part, left = max(part, 1 - max(0.0, rest) / (60 * self.minutes)), min(left, max(0.0, rest))
        text = f"Training, epoch {trainer.current_epoch + 1}"
        text += f", best Dice so far {self.best:.3f}" if self.best is not None else ""
        self.told(text, fraction=0.06 + 0.79 * min(1.0, part), seconds_left=round(left + self.told.after, 1), dice=self.best)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *more: Any) -> None:
        self.told.check_stop()
        self.told()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        dice = float(trainer.callback_metrics.get("dice", float("nan")))
        if np.isfinite(dice) and (self.best is None or dice > self.best):
            self.best = round(dice, 5)
        self.told(now=True, dice=self.best)


# ----------------------------------------------------------------------------------------------------------------- check


def _held_out(case_set: CaseSet, quick: bool, clicked: bool = False) -> list[Case]:
    """The cases that both models are scored on: test cases, else those of validation. Where those chosen mark nothing (of a model of
    clicks: no lesion), others that do: on empty masks any model that finds nothing has a Dice of 1."""
    most, holds = MOST_CHECKED[quick], clicks.has_lesion if clicked else CaseSet.marked
    parts = [[c for c in case_set.cases if c.split == part] for part in ("test", "validation")]
    for part in parts:
        chosen = evenly(part, most)
        if any(holds(case_set, c) for c in chosen):
            return chosen
        if holding := [c for c in part if c not in chosen and holds(case_set, c)]:
            return evenly(holding, most)
    return evenly(parts[0] or parts[1], most)


def _checked(
    folder: Path, job: training.Job, base: ModelPackage | None, case_set: CaseSet, facts: dict[str, Any], told: _Told, stopped: bool
) -> dict[str, Any]:
    """Export the best weights, score the package and its base on the held-out cases, and write both down."""
    config, network = load_run(folder)
    cases = _held_out(case_set, job.options.quick, config.model.task == "click")
    train_cases = [c for c in case_set.cases if c.split == "train"]
    record = read_run(folder)
    unmarked, before_label, named = facts.pop("unmarked", []), facts.pop("early", {}), facts.pop("named", [])
    origin = lineage(record, base, dataset=facts, cases=len(train_cases))
    told("Writing the package", now=True, fraction=0.87)
    card = config.card()
    if base is not None and config.model.task == "automatic" and same_labels(base.card, case_set):
        # In a mask of the new version a value means what it did.
        values = {label.key: label.value for label in base.card.labels}
        card["labels"] = [{**label, "value": values[label_key(label["name"])]} for label in card["labels"]]
    draft = export_run(network, card, folder / f"draft{SUFFIX}", metrics.case_items(case_set, cases), origin, cases=3, quiet=True)
    progress = told.progress("Scoring the models on held-out cases", 0.88, 0.99, last=True)
    compared = compare(base, draft, case_set, cases, folder / CHECK, progress, before_label)
    scored = compared.pop("scored")
    tested = cases[0].split == "test"
    notes = [] if tested else ["The best epoch was chosen on these very cases, which flatters it a little; mark cases as test."]
    if record.get("note"):
        notes.append(record["note"])
    if unmarked:
        notes.append(f"Marked in no case that was learnt from, so the new model does not know it: {', '.join(unmarked)}.")
    notes += [*named, *_of_early(before_label)]
    if absent := [label.name for label in case_set.labels if label.name not in compared["labels"]]:
        notes.append(f"In no held-out case, so not measured: {', '.join(absent)}.")
    new = [name for name, own in compared["labels"].items() if not own["dice"]["before"]]
    if new and compared["mean"]["dice"]["before"]:
        notes.append(f"New, so compared with nothing: {', '.join(new)}.")
    where = f"{'test' if tested else 'validation'} cases of {facts['name']}"
    if config.model.task == "click":
        where = f"lesions in the {where}, after one click"
    summary = metrics.summary(metrics.measured(scored), held_out=where, command="unetseg-train finetune")
    card = {k: v for k, v in draft.card.data.items() if k != "files"} | {"metrics": compact(summary)}
    path = folder / f"{config.model.name}-{config.model.version}{SUFFIX}"
    package = write_package(path, card, draft.onnx, draft.safetensors)
    write_text(card_path(package), markdown(package))
    for rest in (draft.path, card_path(draft)):
        with suppress(OSError):  # Windows, while a virus scanner looks at it
            rest.unlink(missing_ok=True)
    metrics.write(folder, scored, summary)
    result = {
        "format": 1,
        "name": config.model.name,
        "version": config.model.version,
        "package": path.name,
        "parent": job.base,
        "stopped": stopped,
        "held_out": where,
        "note": " ".join(notes),
        **compared,
    }
    write_text(folder / training.RESULT, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    try:
        report.write(folder)
    except (UserError, OSError, KeyError) as e:  # a report that fails must not look like a training that failed
        print(f"no report was written: {e}", file=sys.stderr)
    return result


def compare(
    base: ModelPackage | None,
    new: ModelPackage,
    case_set: CaseSet,
    cases: Sequence[Case],
    folder: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, of, name: None,
    unjudged: Mapping[str, Collection[str]] = {},
) -> dict[str, Any]:
    """Both models on the same cases, through predict(): what result.json says of it, and the new model's rows ("scored").

    Figures are means with bootstrap intervals by patient; volume errors count without their sign. folder: gets the worst
    cases' image and masks, these in the new model's values, cut to what is marked. "before" is null where the base gives none of
    the labels, or cannot run; labels that no case marks are left out, and means over labels are of those that both models give.
    "present": the cases that hold the label, "missed" and "false" {"before", "after"}: those where it was not found, or found though
    there is none; over labels a case counts for each. metrics.WHERE_PRESENT: the Dice of those that hold it, where others do not.
    Models of clicks are clicked at in each lesion, at the same first place, and judged after clicks.JUDGED: "cases" and "rows"
    are then lesions. unjudged: {label: cases whose masks tell nothing of it}, which are not scored for it.
    """
    unscored = {label_key(label): cases for label, cases in unjudged.items()}
    clicked = new.card.data["task"] == "click"
    engines = {id(p): make_engine(p, "onnx", "cpu", "fp32", 0) for p in (base, new) if p is not None}
    seconds = {id(p): clicks.second_engine(p.card) for p in (base, new) if p is not None and clicked}
    rows: dict[str, list[metrics.Row]] = {"before": [], "after": []}
    worst: list[tuple[float, str, dict[str, Image]]] = []
    problem = ""

    def dice(case: str) -> dict[str, float]:
        both = _compared(rows)
        found = {k: [r["dice"] for r in rs if r["case"] == case and r["label"] in both] for k, rs in rows.items()}
        return {k: float(np.mean(v)) for k, v in found.items() if v}

    if base is not None and not clicked and not _shared(base, case_set):
        problem = f"{base.card.name} gives none of these labels"
        base = None
    order: list[int] = []  # of its channels here, where it is another: its weights went to them by their names
    if base is not None and len(base.card.data["channels"]) == len(case_set.channels) > 1:
        order = [i for i in channel_places(case_set.channels, base.card.data["channels"]) if i is not None]
        if order == list(range(len(case_set.channels))):
            order = []
        elif len(order) < len(case_set.channels):
            problem = f"{base.card.name} takes other channels ({', '.join(base.card.data['channels'])})"
            base = None
    for i, case in enumerate(cases):
        progress(i, len(cases), case.name)
        whole = metrics.Item(case.name, *case_set.load(case), case.patient)
        scorers: dict[str, Callable[[metrics.Item, list[metrics.Row]], np.ndarray]] = {}
        for item in clicks.by_lesion(whole) if clicked else [whole]:
            progress(i, len(cases), item.name)
            masks = {"truth": (item.truth > 0).astype(np.uint8) if clicked else item.truth}
            for key, package in (("before", base), ("after", new)):
                if package is None:
                    continue
                seen = item._replace(image=item.image.like(item.image.channels[order])) if key == "before" and order else item
                try:
                    if key not in scorers:
                        scorers[key] = _scorer(package, seen, case_set, engines[id(package)], seconds.get(id(package)))
                    masks[key] = scorers[key](seen, rows[key])
                    rows[key] = [r for r in rows[key] if r["case"] not in unscored.get(label_key(r["label"]), ())]
                except UserError as e:
                    if key == "after":
                        raise
                    problem = f"{package.card.name} cannot run on these cases ({e})"
                    rows["before"].clear()
                    base = None
            after = dice(item.name).get("after")
            if folder is not None and after is not None and (len(worst) < WORST or after < worst[-1][0]):
                worst = sorted([*worst, (after, item.name, _cut(item.image, masks))], key=lambda w: w[0])[:WORST]
    if not rows["after"]:
        raise UserError(clicks.NO_LESION)
    scored = rows["after"]
    seen_labels = {r["label"] for r in metrics.measured(scored)}
    rows = {k: [r for r in rs if r["label"] in seen_labels] for k, rs in rows.items()}
    if base is not None and not rows["before"]:
        problem = f"{base.card.name} gives none of the labels that these cases mark"
    names = [label.name for label in case_set.labels if label.name in seen_labels]
    out: dict[str, Any] = {"cases": len({r["case"] for r in rows["after"]}), "patients": len({r["patient"] for r in rows["after"]})}
    out |= {"task": new.card.data["task"]}
    figures = (*FIGURES, *([THREE_CLICKS] if clicked else []))
    out["labels"] = {n: {f: _figures(rows, f, [n]) for f in figures} | _present(rows, [n]) for n in names}
    both = list(_compared(rows))
    out["mean"] = {"dice": _figures(rows, "dice", both)} | _present(rows, both)
    old = {(r["case"], r["label"]): r["dice"] for r in rows["before"]}
    out["rows"] = [
        {"case": r["case"], "label": r["label"], "dice_before": _round(old.get((r["case"], r["label"]))), "dice_after": _round(r["dice"])}
        for r in rows["after"]
    ]
    out["verdict"], out["sentence"] = verdict(out, problem)
    if not clicked:
        values = {b.value: a.value for a, b in _shared(new, case_set)}
        for _, _, images in worst:
            images |= {k: i.like(translated(i.array, values, np.uint16)) for k, i in images.items() if k != "image"}
    shown = [({"case": c, **{f"dice_{k}": _round(dice(c).get(k)) for k in rows}}, images) for _, c, images in worst]
    out["worst"] = _written(folder, shown) if folder is not None else []
    return out | {"scored": scored}


def _compared(rows: dict[str, list[metrics.Row]]) -> set[str]:
    """The labels that both models give, of which a mean compares them: a new one's would lower it. All, where there is no base."""
    before, after = ({r["label"] for r in rows[key]} for key in ("before", "after"))
    return before & after or after


def _round(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)


def _shared(package: ModelPackage, case_set: CaseSet) -> list[tuple[Label, Label]]:
    """(the package's label, the cases' label of the same name)"""
    mine = {label.key: label for label in case_set.labels}
    return [(label, mine[label.key]) for label in package.card.labels if label.key in mine]


def _scorer(
    package: ModelPackage, item: metrics.Item, case_set: CaseSet, engine: Any, second: Any
) -> Callable[[metrics.Item, list[metrics.Row]], np.ndarray]:
    """What scores a case, or one of its lesions, and adds its rows; it returns the mask."""
    if package.card.data["task"] != "click":
        return lambda item, rows: _scored(package, item, case_set, engine, rows)
    session = clicks.ClickSession(item.image, package, engine, second=second)

    def score(item: metrics.Item, rows: list[metrics.Row]) -> np.ndarray:
        row, mask = clicks.score(session, item, case_set.labels)
        rows.append(row)
        return mask

    return score


def _scored(package: ModelPackage, item: metrics.Item, case_set: CaseSet, engine: Any, rows: list[metrics.Row]) -> np.ndarray:
    """Score one case and add its rows, for the labels that the cases have; the mask in the cases' label values."""
    pairs = _shared(package, case_set)
    shared = {a.value: b for a, b in pairs}
    # A label that only the package gives is in no truth: it gets a value that is not there, and is left out.
    last = max(label.value for label in case_set.labels)
    truth = [replace(a, value=shared[a.value].value if a.value in shared else last + a.value) for a in package.card.labels]
    seen: list[Prediction] = []
    found = metrics.evaluate(package, [item], labels=truth, auc=False, engine=engine, seen=lambda item, made, rows: seen.append(made))
    names = {a.name: b.name for a, b in pairs}
    rows += [{**r, "label": names[r["label"]]} for r in found if r["label"] in names]
    return translated(seen[0].labels.array, {value: label.value for value, label in shared.items()})


def _figures(rows: dict[str, list[metrics.Row]], figure: str, names: Sequence[str]) -> dict[str, Any]:
    """{"before", "after", "change"} of one figure, each {"mean", "low", "high", "cases"} or null; over labels by each case's mean."""

    def of(key: str) -> list[metrics.Row]:
        found = [r for r in rows[key] if r["label"] in names and r.get(figure) is not None]
        cases: dict[str, list[float]] = {}
        for r in found:
            cases.setdefault(r["case"], []).append(abs(r[figure]))
        patients = {r["case"]: r["patient"] for r in found}
        return [{"case": c, "label": "", "patient": patients[c], figure: float(np.mean(v))} for c, v in cases.items()]

    def mean(own: list[metrics.Row]) -> dict[str, Any] | None:
        values = [r[figure] for r in own]
        low, high = metrics.interval(values, [r["patient"] for r in own]) or (None, None)
        return {"mean": _round(np.mean(values)), "low": _round(low), "high": _round(high), "cases": len(values)} if values else None

    before, after = of("before"), of("after")
    change = None
    if {r["case"] for r in before} & {r["case"] for r in after}:
        difference = metrics.difference(before, after, figure)
        change = {k: difference[k] for k in ("mean", "low", "high", "cases")}
    return {"before": mean(before), "after": mean(after), "change": change}


def _present(rows: dict[str, list[metrics.Row]], names: Sequence[str]) -> dict[str, Any]:
    """What a mean over all cases hides where some lack a label: see compare()."""
    own = {k: [r for r in rs if r["label"] in names] for k, rs in rows.items()}
    held = {k: [r for r in rs if r["state"] in metrics.PRESENT] for k, rs in own.items()}
    out: dict[str, Any] = {"present": len(held["after"])}
    out |= {s: {k: sum(r["state"] == s for r in rs) if rs else None for k, rs in own.items()} for s in ("missed", "false")}
    if 0 < len(held["after"]) < len(own["after"]):
        out[metrics.WHERE_PRESENT] = _figures(held, "dice", names)
    return out


def verdict(facts: dict[str, Any], problem: str = "") -> tuple[str, str]:
    """("better" | "same" | "worse" | "", sentence) from compare()'s figures.

    Worse: the mean Dice fell by more than SAME, certain or not, or that of a label by more than twice that and beyond chance; or,
    where some cases lack a label, that of those that hold it by more than twice that: on 20 cases, 14 of them empty, a model that
    finds nothing has 0.7, and one that finds all, and a little in the empty ones, 0.3.
    Better only where it rose by more than SAME and chance (the 95 % interval, of FEWEST_SURE patients at least) does not explain it.
    """
    clicked = facts.get("task") == "click"
    what = "lesion" if clicked else "case"
    on = f"on {counted(facts['cases'], f'held-out {what}')} of {counted(facts['patients'], 'patient')}"
    on += ", after one click" * clicked
    dice = facts["mean"]["dice"]
    after, change = dice["after"], dice["change"]
    if change is None:
        why = f"; {problem}, so there is nothing to compare with" if problem else ""
        return "", f"Mean Dice {after['mean']:.3f} {on}{why}."
    figures = f"mean Dice {dice['before']['mean']:.3f} before and {after['mean']:.3f} after, {on}"
    if change["low"] is not None:
        figures += f" (change {change['mean']:+.3f}, 95 % interval {change['low']:+.3f} to {change['high']:+.3f})"
    lost = [
        f"{name} fell by {-c['mean']:.3f}{where}"
        for name, own in facts["labels"].items()
        for figure, where in (("dice", ""), (metrics.WHERE_PRESENT, " where there is some"))
        if (c := own.get(figure, {}).get("change")) and c["mean"] < -2 * SAME and (c["high"] is None or c["high"] < 0)
    ]
    held = facts["mean"].get(metrics.WHERE_PRESENT)
    if held and held["change"]["mean"] < -2 * SAME:
        found = (
            f"{held[k]['mean']:.3f} {k} (missed {facts['mean']['missed'][k]} of {facts['mean']['present']})" for k in ("before", "after")
        )
        lost.append(f"it does worse where there is something to find: mean Dice {' and '.join(found)}")
    if change["mean"] < -SAME or lost:
        return "worse", f"Worse: {'; '.join([figures, *lost])}. Keep the former model, or correct more cases and retrain."
    if change["mean"] > SAME and (change["low"] or 0) > 0 and facts["patients"] >= FEWEST_SURE:
        return "better", f"Better: {figures}."
    if change["mean"] > SAME:
        return "same", f"Probably better, but so few cases could show it by chance: {figures}."
    return "same", f"No worse, and not better beyond chance: {figures}."


def _cut(image: Image, masks: dict[str, np.ndarray]) -> dict[str, Image]:
    """The image and the masks in the box of all that is marked, and AROUND_MM about it, LARGEST voxels wide at most; then about a voxel
    of the truth, or of what was found where that is empty: between two things that lie far apart there may be nothing."""
    marked, middle = np.zeros(image.shape, bool), [0, 0, 0]
    for mask in masks.values():
        own = (mask > 0) & (mask != IGNORE)
        if own.any() and not marked.any():
            counts = own.sum((1, 2))
            z = int(np.searchsorted(counts.cumsum(), counts.sum() / 2, "right"))
            middle = [z, *np.argwhere(own[z])[counts[z] // 2].tolist()]
        marked |= own
    around = Box.around(marked) or Box(tuple(n // 2 for n in image.shape), tuple(n // 2 + 1 for n in image.shape))
    margin = [int(np.ceil(AROUND_MM / s)) for s in image.spacing[::-1]]
    starts, stops = [], []
    for start, stop, more, n, at in zip(around.start, around.stop, margin, image.shape, middle):
        low, high = max(0, start - more), min(n, stop + more)
        if high - low > LARGEST:
            low = max(low, min(high - LARGEST, at - LARGEST // 2))
            high = low + LARGEST
        starts.append(low)
        stops.append(high)
    box = Box(tuple(starts), tuple(stops))
    plain = image.like(image.channels[0])
    out = {"image": plain.crop(box)}
    return out | {key: plain.like(mask.astype(np.uint8)).crop(box) for key, mask in masks.items()}


def _written(folder: Path, worst: Sequence[tuple[dict[str, Any], dict[str, Image]]]) -> list[dict[str, Any]]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)  # where a program holds one of its files, Windows leaves it
    out = []
    for entry, images in worst:
        files = {key: f"{folder.name}/{file_name(entry['case'])}_{key}.nii.gz" for key in images}
        for key, image in images.items():
            write_image(Image(np.ascontiguousarray(image.array), image.spacing, image.origin, image.direction), folder.parent / files[key])
        out.append({**entry, "files": files})
    return out
