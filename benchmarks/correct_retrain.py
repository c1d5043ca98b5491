"""Correct -> retrain -> use, on real data: what corrections bring on patients that no model has seen.

    .venv/bin/python benchmarks/correct_retrain.py DATA            e.g. $UNETSEG_DATA/msd_hippocampus; about an hour on 2 cores

A base model is trained on a few patients (--base). Then rounds: of the other patients' scans the next ones are chosen, "corrected"
(the model's own mask is replaced by the true one) and added to a dataset folder by Dataset.add(); the model in use is fine-tuned on
that folder, exported as a package (ONNX = PyTorch, checked), and scored through predict() on patients that are in no training,
no validation and no choice. The arms differ in nothing but which scans are corrected:

    ours      worklist.order(): where the model is uncertain, no two alike
    random    drawn at random; --random draws, of which the table gives the mean and the range
    none      nothing is corrected, the base goes on for as many steps: what is due to training alone
    full      all patients from the start, for as many steps as base and rounds together: what 40 corrections are held against

Every step is kept in WORK; a run that was stopped or killed goes on where it was (a training in its last epoch). Same command,
same numbers on one machine. To OUT: result.json, curve.png and table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from unetseg_training import export, finetune, metrics
from unetseg_training.cases import Case, CaseSet, find_cases, folds
from unetseg_training.config import Config
from unetseg_training.plan import plan
from unetseg_training.train import git_revision, read_run, train, versions
from UNetSegmentationLib import worklist
from UNetSegmentationLib.dataset import Dataset
from UNetSegmentationLib.files import UserError, atomic_path, write_text
from UNetSegmentationLib.inference.predict import Options, Prediction, predict
from UNetSegmentationLib.model import ModelPackage
from UNetSegmentationLib.networks import UNetConfig

ROOT = Path(__file__).resolve().parents[1]
SEED = 20261123
# A Dice as near to the full model's as two trainings of one recipe with other seeds are to each other.
AS_GOOD = 0.01
TITLES = {"ours": "our order", "random": "random order", "none": "no corrections", "full": "all patients from the start"}


@dataclass(frozen=True)
class Setting:
    """The walk. base: patients of the base model, of whom `validation` choose its best epoch; steps: of the base, of a round."""

    rounds: tuple[int, ...] = (10, 20, 40)
    base: int = 12
    validation: int = 4
    steps: tuple[int, int] = (800, 250)
    random: int = 2
    fold: int = 0
    pool: int = 0
    held_out: int = 0
    epochs: int = 6
    maps: tuple[int, ...] = (8, 16, 32, 64)
    patch: tuple[int, ...] = ()
    rate: float = 0.0
    labels: tuple[str, ...] = ("Anterior hippocampus", "Posterior hippocampus")
    channels: tuple[str, ...] = ("T1 MR",)


class Walk:
    """The cases of each role, and the steps, each done once and read from WORK afterwards."""

    def __init__(self, data: Path, work: Path, setting: Setting = Setting(), tell: Callable[[str], None] = print) -> None:
        self.work, self.setting, self.tell = work, setting, tell
        if self.step("setting", lambda: setting.__dict__) != json.loads(json.dumps(setting.__dict__)):
            raise UserError(f"{work} holds a walk with other settings; give the same ones to go on with it, or another --work.")
        found = find_cases(data, foreground=len(setting.labels) == 1)
        if len(found.labels) != len(setting.labels) or len(found.channels) != len(setting.channels):
            raise UserError(
                f"{data} has {len(found.labels)} labels and {len(found.channels)} channels; name as many (--labels, --channels)."
            )
        self.cases: CaseSet = replace(
            found,
            cases=found.annotated,
            labels=tuple(replace(label, name=name) for label, name in zip(found.labels, setting.labels)),
            channels=setting.channels,
        )
        of = folds(self.cases.cases, min(5, len({c.patient for c in self.cases.cases})))
        rest = [c for c, f in zip(self.cases.cases, of) if f != setting.fold]
        self.held_out = [c for c, f in zip(self.cases.cases, of) if f == setting.fold][: setting.held_out or None]
        people = sorted({c.patient for c in rest})
        dealt = [people[i] for i in np.random.default_rng(SEED).permutation(len(people))]
        roles = (dealt[: setting.validation], dealt[setting.validation : setting.base], dealt[setting.base :])
        self.validation, self.base, self.pool = ([c for p in part for c in rest if c.patient == p] for part in roles)
        self.pool = self.pool[: setting.pool or None]
        if len(self.pool) < setting.rounds[-1] or not self.base or not self.validation:
            raise UserError(
                f"{data} leaves {len(self.pool)} scans to correct, fewer than {setting.rounds[-1]}; make --rounds or --base less."
            )

    # ------------------------------------------------------------------------------------------------------- steps

    def step(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What make() gives, from WORK/name.json where it was done before."""
        path = self.work / f"{name}.json"
        if not path.is_file():
            write_text(path, json.dumps(make(), indent=1) + "\n")
        return json.loads(path.read_text("utf-8"))

    def dataset(self, folder: Path, more: Sequence[Case] = ()) -> Dataset:
        """A dataset folder with the base's own cases, its validation patients marked, and `more`."""
        if not (folder / "dataset.json").is_file():
            Dataset.create(folder, "hippocampi", self.cases.labels, self.cases.channels)
        data = Dataset.open(folder)
        there = data.entries
        for split, cases in (("validation", self.validation), ("train", [*self.base, *more])):
            for case in cases:
                if case.name not in there:
                    image, truth = self.cases.load(case)
                    data.add(image, truth, name=case.name, patient=case.patient, split=split)
        return data

    def fit(self, folder: Path, data: Path, steps: int, version: str, parent: ModelPackage | None = None) -> ModelPackage:
        """Train from the start, or from a package, on a dataset folder; the package, exported after parity on its validation cases."""
        path = folder / f"walk-{version}.unet.zip"
        if path.is_file():
            return ModelPackage.read(path)
        cases = find_cases(data)
        base = (parent.card, UNetConfig.from_json(parent.card.data["network"])) if parent else None
        config = self.config(plan(cases, data, quick=True, measure=False, base=base).config, steps, version)
        start = finetune.start_of(parent, config).state if parent else None
        result = train(config, folder / "run", cases, fold=None, start=start, cache=self.work / "cache")
        items = metrics.case_items(cases, [c for c in cases.annotated if c.split == "validation"][:2])
        return export.export_run(result.network, config.card(), path, items, export.lineage(read_run(folder / "run"), parent), quiet=True)

    def config(self, planned: Config, steps: int, version: str) -> Config:
        """The plan's own --quick settings, for so many steps whatever this machine's speed."""
        epochs = min(self.setting.epochs, steps)
        fit = {"epochs": epochs, "steps": steps // epochs, "minutes": None, "patience": epochs, "validate_every": 1, "validate_cases": 0}
        fit |= {"warmup": max(1, min(50, steps // 10)), "ema": min(0.99, max(0.5, 1 - 20 / steps))}
        if self.setting.rate:
            fit["learning_rate"] = self.setting.rate
        network: dict[str, Any] = {"channels": self.setting.maps} if self.setting.maps else {}
        if network:
            network |= {"strides": planned.network.strides[: len(self.setting.maps) - 1]}
            network |= {"kernels": planned.network.kernels[: len(self.setting.maps)]}
        update: dict[str, Any] = {
            "fit": planned.fit.model_copy(update=fit),
            "network": planned.network.model_copy(update=network),
            "model": planned.model.model_copy(update={"name": "walk", "version": version, "licence": "CC-BY-SA-4.0"}),
        }
        if self.setting.patch:
            update["input"] = planned.input.model_copy(update={"patch": self.setting.patch})
        return Config.model_validate(planned.model_copy(update=update).model_dump())

    def score(self, package: ModelPackage) -> dict[str, Any]:
        """The figures on the held-out patients, and the Dice of each for paired intervals."""
        rows = metrics.evaluate(package, metrics.case_items(self.cases, self.held_out), labels=self.cases.labels, auc=False)
        facts = metrics.summary(rows)
        kept = ("dice", "hausdorff95_mm", "volume_error_percent")
        labels = {name: {k: own[k] for k in kept if k in own} for name, own in facts["labels"].items()}
        dice = [{k: r[k] for k in ("case", "patient", "label", "dice")} for r in rows]
        return {"dice": facts["dice"], "labels": labels, "cases": facts["cases"], "patients": facts["patients"], "rows": dice}

    # ------------------------------------------------------------------------------------------------------- parts

    def base_model(self) -> tuple[ModelPackage, dict[str, Any]]:
        folder = self.work / "base"

        def make() -> dict[str, Any]:
            began = time.monotonic()
            data = self.dataset(folder / "dataset")
            package = self.fit(folder, data.folder, self.setting.steps[0], "1.0.0")
            return {"corrected": 0, "seconds": time.monotonic() - began, **self.score(package)}

        facts = self.step("base/score", make)
        return ModelPackage.read(folder / "walk-1.0.0.unet.zip"), facts

    def full_model(self) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            began = time.monotonic()
            folder = self.work / "full"
            data = self.dataset(folder / "dataset", self.pool)
            steps = self.setting.steps[0] + len(self.setting.rounds) * self.setting.steps[1]
            package = self.fit(folder, data.folder, steps, "3.0.0")
            return {"corrected": len(self.pool), "seconds": time.monotonic() - began, **self.score(package)}

        return self.step("full/score", make)

    def arm(self, name: str, seed: int = 0) -> list[dict[str, Any]]:
        """The base model's score, then those after each round."""
        package, facts = self.base_model()
        place = f"{name}-{seed}" if name == "random" else name
        points, corrected = [facts], list[str]()
        for i, n in enumerate(self.setting.rounds, 1):
            point = self.round(name, seed, place, i, n, corrected, package)
            package = ModelPackage.read(self.work / place / f"{n:03d}" / f"walk-2.{i}.0.unet.zip")
            corrected += point["added"]["cases"]
            points.append(point)
            took = f", {point['seconds']:.0f} s" if point["seconds"] else ""
            self.tell(f"{place}, {n}: Dice {metrics.text(point['dice'])}{took}")
        return points

    def round(self, name: str, seed: int, place: str, i: int, n: int, corrected: Sequence[str], package: ModelPackage) -> dict[str, Any]:
        """What was corrected, how long the fine-tuning took, and the score after it."""
        folder, data = self.work / place / f"{n:03d}", self.work / place / "dataset"
        chosen = self.step(f"{place}/{n:03d}/chosen", lambda: {"cases": self.choose(name, seed, n, corrected, package)})["cases"]
        added = self.step(f"{place}/{n:03d}/added", lambda: self.correct(data, chosen, package))

        def make() -> dict[str, Any]:
            began, going_on = time.monotonic(), (folder / "run").exists()
            made = self.fit(folder, data, self.setting.steps[1], f"2.{i}.0", package)
            spent = None if going_on else time.monotonic() - began  # of a training that was stopped, nothing can be said
            return {"corrected": n, "seconds": spent, "added": added, **self.score(made)}

        return self.step(f"{place}/{n:03d}/score", make)

    def choose(self, name: str, seed: int, n: int, corrected: Sequence[str], package: ModelPackage) -> list[str]:
        """The next scans, up to `n` corrected ones in all."""
        if name == "none":
            return []
        names = [c.name for c in self.pool]
        if name == "random":
            return [names[i] for i in np.random.default_rng((SEED, seed)).permutation(len(names))][len(corrected) : n]
        described = []
        for case in self.pool:
            image = self.cases.image(case)
            described.append(worklist.describe(self.predict(image, package), image))
        values, embeddings = [d[0]["value"] for d in described], np.stack([d[1] for d in described])
        order = worklist.order(values, embeddings, [names.index(c) for c in corrected])
        return [names[i] for i in order[: n - len(corrected)]]

    def predict(self, image: Any, package: ModelPackage) -> Prediction:
        return predict(image, [package], Options(tta="none", uncertainty=True))

    def correct(self, folder: Path, names: Sequence[str], package: ModelPackage) -> dict[str, Any]:
        """Put the true masks of these scans into the dataset in place of the model's; what a person would have had to change."""
        data = self.dataset(folder)
        done, cases = data.entries, {c.name: c for c in self.pool}
        for name in names:
            if name not in done:
                image, truth = self.cases.load(cases[name])
                own = self.predict(image, package).labels
                data.add(image, truth, name=name, patient=cases[name].patient, model_mask=own, model=package.card.name, split="train")
        changed = [entry.changes for name, entry in data.refresh().entries.items() if name in names]
        ml = [sum(c["added_ml"] + c["removed_ml"] for c in one.values()) for one in changed]
        dice = [float(np.mean([c["dice"] for c in one.values()])) for one in changed if one]
        return {"cases": list(names), "changed_ml": sum(ml), "dice_before": float(np.mean(dice)) if dice else None}


# ------------------------------------------------------------------------------------------------------------- results


def reached(points: Sequence[dict[str, Any]], full: dict[str, Any]) -> int | None:
    """After how many corrections the mean Dice is within AS_GOOD of the full model's; None: after none of the rounds."""
    return next((p["corrected"] for p in points if p["dice"]["mean"] >= full["dice"]["mean"] - AS_GOOD), None)


def result(walk: Walk) -> dict[str, Any]:
    """All arms, done now or before."""
    setting = walk.setting
    arms: dict[str, list[list[dict[str, Any]]]] = {"ours": [walk.arm("ours")]}
    arms["random"] = [walk.arm("random", seed) for seed in range(setting.random)]
    arms["none"] = [walk.arm("none")]
    full = walk.full_model()
    walk.tell(f"full: Dice {metrics.text(full['dice'])}")
    base, last = arms["ours"][0][0], arms["ours"][0][-1]
    out: dict[str, Any] = {
        "setting": {**setting.__dict__, "seed": SEED},
        "patients": {"base": len(walk.base), "validation": len(walk.validation), "to_correct": len(walk.pool)},
        "held_out": len(walk.held_out),
        "gain": metrics.difference(base["rows"], last["rows"]),
        "reached": {name: [reached(p, full) for p in lines] for name, lines in arms.items()},
        "against_random": [
            [metrics.difference(theirs["rows"], ours["rows"]) for ours, theirs in zip(arms["ours"][0][1:], line[1:])]
            for line in arms["random"]
        ],
    }

    def slim(point: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in point.items() if k != "rows"}

    out["arms"] = {name: [[slim(p) for p in line] for line in lines] for name, lines in arms.items()} | {"full": [[slim(full)]]}
    out |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions(), "git_revision": git_revision()}
    return out


def table(facts: dict[str, Any]) -> str:
    """Markdown: a line for each arm and round."""
    lines = [
        "| corrected scans | "
        + " | ".join(["order", "Dice (95 %)", *facts["setting"]["labels"], "HD95 mm", "to correct: Dice, ml", "fine-tuning"])
        + " |",
        "|---|---|---|" + "---|" * (len(facts["setting"]["labels"]) + 3),
    ]

    def row(name: str, line: Sequence[dict[str, Any]]) -> str:
        """One line for the same round of one or more draws: means over the draws, the interval where there is one."""
        mean = np.mean([p["dice"]["mean"] for p in line])
        if len(line) == 1:
            dice = metrics.text(line[0]["dice"])
        else:
            means = [p["dice"]["mean"] for p in line]
            dice = f"{mean:.3f} (draws: {', '.join(f'{v:.3f}' for v in means)})"
        labels = [f"{np.mean([p['labels'][n]['dice']['mean'] for p in line]):.3f}" for n in facts["setting"]["labels"]]
        far = np.mean([own["hausdorff95_mm"]["mean"] for p in line for own in p["labels"].values() if own.get("hausdorff95_mm")])
        added = [p["added"] for p in line if p.get("added", {}).get("dice_before") is not None]
        work = f"{np.mean([a['dice_before'] for a in added]):.3f}, {np.mean([a['changed_ml'] for a in added]):.1f}" if added else "–"
        spent = [p["seconds"] for p in line if p["seconds"]]
        took = f"{np.mean(spent):.0f} s" if spent else "–"
        return f"| {line[0]['corrected']} | {TITLES.get(name, name)} | {dice} | {' | '.join(labels)} | {far:.2f} | {work} | {took} |"

    lines.append(row("base model", [facts["arms"]["ours"][0][0]]))
    for i in range(1, 1 + len(facts["setting"]["rounds"])):
        lines += [row(name, [line[i] for line in facts["arms"][name]]) for name in ("ours", "random", "none") if facts["arms"][name]]
    lines.append(row("full", facts["arms"]["full"][0]))
    for name in ("ours", "random"):
        told = [str(v) if v is not None else f"none of {list(facts['setting']['rounds'])}" for v in facts["reached"][name]]
        lines += ["", f"Corrections after which the Dice is within {AS_GOOD} of the full model's, {TITLES[name]}: {', '.join(told)}."]
    gain = facts["gain"]
    lines += [
        "",
        f"Gain on the held-out patients from no to {facts['setting']['rounds'][-1]} corrections in our order: {metrics.text(gain)}.",
    ]
    return "\n".join(lines) + "\n"


def draw(facts: dict[str, Any], path: Path) -> None:
    """The curve: Dice on the held-out patients against corrected scans."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.5), dpi=120)
    axes = figure.subplots()
    for name, color in (("ours", "#0072B2"), ("random", "#E69F00"), ("none", "#999999")):
        lines = facts["arms"][name]
        if not lines:
            continue
        x = [p["corrected"] for p in lines[0]]
        x = [0, *facts["setting"]["rounds"]] if name == "none" else x
        y = np.array([[p["dice"]["mean"] for p in line] for line in lines])
        axes.plot(x, y.mean(0), "o-", color=color, label=TITLES[name])
        if name == "ours":
            low, high = ([p["dice"][k] if p["dice"][k] is not None else p["dice"]["mean"] for p in lines[0]] for k in ("low", "high"))
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        elif len(lines) > 1:
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.25, linewidth=0)
    full = facts["arms"]["full"][0][0]
    axes.axhline(full["dice"]["mean"], color="#009E73", linestyle="--", label=f"{TITLES['full']} ({full['corrected']} more scans)")
    axes.set_xlabel("corrected scans")
    axes.set_ylabel(f"mean Dice on {facts['held_out']} held-out patients")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def write(facts: dict[str, Any], out: Path) -> None:
    draw(facts, out / "curve.png")
    for name, text in (("result.json", json.dumps(facts, indent=1) + "\n"), ("table.md", table(facts))):
        write_text(out / name, text)


def quick(walk: Walk, n: int = 20) -> dict[str, Any]:
    """How long a person waits for unetseg-train finetune --quick, with its own plan and check, on `n` corrected scans."""
    folder = walk.work / "quick"

    def make() -> dict[str, Any]:
        package, facts = walk.base_model()
        data = walk.dataset(folder / "dataset", walk.pool[:n])
        shutil.rmtree(folder / "job", ignore_errors=True)
        words = ["finetune", str(data.folder), "--from", str(package.path), "--job", str(folder / "job"), "--quick"]
        began = time.monotonic()
        command = [sys.executable, "-m", "unetseg_training.cli", *words]
        subprocess.run(command, check=True, stdout=sys.stderr)
        seconds = time.monotonic() - began
        told = json.loads((folder / "job" / "result.json").read_text("utf-8"))
        after = walk.score(ModelPackage.read(folder / "job" / told["package"]))
        change = metrics.difference(facts["rows"], after["rows"])
        return {"cases": n, "seconds": seconds, "told": told["sentence"], "before": facts["dice"], "after": after["dice"], "change": change}

    return walk.step("quick/score", make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "correct-retrain")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "correct_retrain")

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(v) for v in text.split(","))

    def names(text: str) -> tuple[str, ...]:
        return tuple(v.strip() for v in text.split(","))

    standard = Setting()
    parser.add_argument("--rounds", type=numbers, default=standard.rounds, help="corrected scans after each round")
    parser.add_argument("--base", type=int, default=standard.base, help="patients of the base model")
    parser.add_argument("--validation", type=int, default=standard.validation, help="of these, those that choose the best epoch")
    parser.add_argument("--steps", type=numbers, default=standard.steps, help="of the base model, and of a round")
    parser.add_argument("--random", type=int, default=standard.random, help="draws of the random order")
    parser.add_argument("--fold", type=int, default=standard.fold, help="of five patient-wise folds the one held out")
    parser.add_argument("--pool", type=int, default=0, help="scans to choose from; default all that are left")
    parser.add_argument("--held-out", type=int, default=0, help="scans to score; default the whole fold")
    parser.add_argument("--epochs", type=int, default=standard.epochs, help="of a training; after each the best is kept")
    parser.add_argument("--maps", type=numbers, default=standard.maps, help="feature maps of each level")
    parser.add_argument("--patch", type=numbers, default=(), help="voxels (z, y, x) that the network sees; default the plan's")
    parser.add_argument("--rate", type=float, default=0.0, help="learning rate; default the plan's, which is lower for a fine-tuning")
    parser.add_argument("--labels", type=names, default=standard.labels, help="their names; a single one takes all labels as one")
    parser.add_argument("--channels", type=names, default=standard.channels)
    parser.add_argument(
        "--quick", action="store_true", help="only time unetseg-train finetune --quick on the base's and 20 corrected scans"
    )
    options = vars(parser.parse_args())
    data, work, out, only_quick = (options.pop(k) for k in ("data", "work", "out", "quick"))
    try:
        walk = Walk(data, work, Setting(**options), lambda text: print(text, flush=True))
        if only_quick:
            print(json.dumps(quick(walk), indent=1))
            return
        facts = result(walk)
    except UserError as e:
        sys.exit(str(e))
    given = [f"--{k.replace('_', '-')} {','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in options.items()]
    changed = [text for text, k in zip(given, options) if options[k] != getattr(standard, k)]
    write(facts | {"command": " ".join(["benchmarks/correct_retrain.py", f"$UNETSEG_DATA/{data.name}", *changed])}, out)
    print(f"{table(facts)}\nwrote {out}: result.json, curve.png, table.md")


if __name__ == "__main__":
    main()
