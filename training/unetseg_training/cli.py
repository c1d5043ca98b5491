"""The command `unetseg-train`: check, plan, fit, evaluate, report, export, finetune (jobs, resume, stop and promote are for what
that makes). Exit codes as of `unetseg`: 0 done, 1 the check found errors, 2 bad input (one sentence on stderr), 130 stopped
(what is trained so far is kept)."""

# No `from __future__ import annotations`: typer reads the commands' annotations, which name what only _app() imports.

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from UNetSegmentationLib.environment import TORCH
from UNetSegmentationLib.files import UserError, expand_arguments, user_path


def main() -> None:
    """The entry point of `unetseg-train`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a label's name that a Windows console cannot show must not end a training
    # pyproject's [train] but for TensorBoard, without which all else goes.
    names = ("torch", "jinja2", "lightning", "matplotlib", "monai", "onnx", "pydantic", "rich", "safetensors", "scipy", "typer", "yaml")
    missing = [name.replace("yaml", "pyyaml") for name in names if find_spec(name) is None]
    if missing and ("typer" in missing or "--help" not in sys.argv):
        pinned = f"torch=={TORCH} " if "torch" in missing else ""  # another build of what is there may be gigabytes
        cure = f'run, in a clone of the repository: {sys.executable} -m pip install {pinned}".[train]"'
        sys.exit(f"unetseg-train: {', '.join(missing)} not installed; {cure}")
    try:
        _app()(expand_arguments(sys.argv[1:]))
    except UserError as e:
        print(f"unetseg-train: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if "Error loading" in str(e):  # PyTorch's on Windows, of one of its DLLs
            print(f"unetseg-train: PyTorch cannot be loaded ({e}); close other programs or install it again", file=sys.stderr)
            sys.exit(2)
        where = e.filename or "a file"
        print(
            f"unetseg-train: {where} cannot be read or written ({e.strerror or e}); check the disk's space and your rights", file=sys.stderr
        )
        sys.exit(2)
    except SystemExit as e:
        if e.code == 130:  # typer's for Ctrl-C
            print(f"unetseg-train: stopped{_go_on(sys.argv[1:])}", file=sys.stderr)
        raise


def _go_on(words: Sequence[str]) -> str:
    """How a command that was stopped goes on."""
    if words[:1] == ["finetune"] and not any(w.startswith(("-o", "--output")) for w in words):
        return "; go on with: unetseg-train resume JOB (unetseg-train jobs DATA names it)"
    if words[:1] not in (["fit"], ["finetune"]):
        return ""
    if "--restart" in words:  # until it trains, what was there before lies there still
        return "; begin anew with the same command, or, where it had begun to train, go on with --resume instead of --restart"
    return "; go on with the same command and --resume"


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int, str], None]]:
    """progress(done, of, case) as a line that is gone afterwards."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = [TextColumn(text), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[name]}")]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=1, name="")
        yield lambda done, of, name: bar.update(task, completed=done, total=of, name=name)


def leaf(run: Path, fold: int | None, seed: int) -> Path:
    """The folder of one fold and seed."""
    return run / f"{'split' if fold is None else f'fold{fold}'}-seed{seed}"


def parse_folds(text: str, k: int) -> list[int | None]:
    """ "0", "0,2", "all", or "split" for the dataset's own."""
    if text == "split":
        return [None]
    if text == "all":
        return list(range(k))
    return [*_whole(text, k, "fold")]


def parse_seeds(text: str) -> list[int]:
    """ "0", "0,2", or "all" for five."""
    return list(range(5)) if text == "all" else _whole(text, 10**6, "seed")


def _whole(text: str, below: int, what: str) -> list[int]:
    try:
        values = [int(v) for v in text.split(",")]
    except ValueError:
        values = [-1]
    if any(not 0 <= v < below for v in values):
        raise UserError(f"--{what} must be {'0 to ' + str(below - 1) if what == 'fold' else 'whole numbers from 0'}, or all, not {text!r}.")
    return list(dict.fromkeys(values))


def fit_run(
    run: Path,
    folds: Sequence[int | None],
    seeds: Sequence[int],
    *,
    resume: bool,
    restart: bool,
    quiet: bool = False,
    **how: Any,
) -> list[Any]:
    """Train each fold with each seed, those that are finished left as they are; the Results. What is said of a fold that cannot be
    trained, is said when the others are."""
    from . import report, watch
    from .config import read
    from .train import CHECKPOINT, RUN, UnfitFold, find, held_out, is_first, train

    config = read(run)
    results, unfit = [], dict[int | None, UnfitFold]()
    case_set = how.pop("case_set", None) or find(config)
    for fold in folds:  # all of them before the first, which may take hours
        held_out(case_set.annotated, config, fold)
        for seed in seeds:
            folder = leaf(run, fold, seed)
            if is_first() and not (resume or restart) and ((folder / CHECKPOINT).exists() or (folder / RUN).exists()):
                raise UserError(f"{folder} holds a training already; add --resume to go on with it, or --restart to begin anew.")
    for fold in folds:
        for seed in seeds:
            folder = leaf(run, fold, seed)
            try:
                with _bar("pre-processing") as progress:
                    result = train(
                        config,
                        folder,
                        case_set,
                        fold=fold,
                        seed=seed,
                        resume=not restart,
                        callbacks=watch.callbacks(folder, config, bar=not quiet),
                        progress=progress,
                        **how,
                    )
            except UnfitFold as e:
                unfit[fold] = e
                break  # no seed cures it
            results.append(result)
            if not is_first():
                continue
            try:
                report.write(folder)
            except UserError as e:  # a report that fails must not look like a training that failed
                print(f"no report was written: {e}", file=sys.stderr)
            if math.isnan(result.dice):
                print(f"{folder}: ended before its first validation, so its Dice is not known; see: unetseg-train evaluate {folder}")
                continue
            parts = ", ".join(f"{name} {value:.3f}" for name, value in result.labels.items())
            print(f"{folder}: Dice {result.dice:.3f} ({parts}) on held-out cases, best in epoch {result.epoch + 1}")
    known = [r.dice for r in results if not math.isnan(r.dice)]
    if len(known) > 1 and is_first():
        print(f"mean Dice of {len(known)} trainings: {sum(known) / len(known):.3f}")
    if unfit:
        raise UserError(" ".join(str(e) if len(folds) == 1 else f"Fold {fold} was not trained: {e}" for fold, e in unfit.items()))
    return results


def _expanded(path: Path | None) -> Path | None:
    """The argument with the person's folder for ~, which shells leave in --output=~/run."""
    return path and user_path(path)


def _read(run: Path) -> Any:
    from .config import read

    if run.is_file():
        raise UserError(f"{run} is a file; name the run's folder, {run.parent}.")
    return read(run)


def _app() -> Any:
    import typer

    app = typer.Typer(
        help="Train segmentation models: check the data, plan, fit, evaluate, export.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    data_argument = typer.Argument(help="The dataset: a folder or its index file, in any of the layouts.", show_default=False)
    run_argument = typer.Argument(help="The run's folder, with config.yaml.", show_default=False, callback=_expanded)
    leaf_argument = typer.Argument(help="The folder of a fold, such as RUN/fold0-seed0.", show_default=False, callback=_expanded)
    layout_option = typer.Option(help="The dataset's layout, where it is not recognised.")
    patient_option = typer.Option(help="Regular expression whose first group is the patient in a case's name.")
    only_option = typer.Option(help="A label to learn, others are left out; may be given several times.")
    foreground_option = typer.Option("--foreground", help="Learn all labels as one.")
    channel_option = typer.Option(help="A channel to see, others are left out; may be given several times.")
    fold_option = typer.Option(help="Fold: 0, 1, ..., several with commas, all, or split (the dataset's own).")
    seed_option = typer.Option(help="Seed: 0, 1, ..., several with commas, or all (five).")

    @app.command()
    def check(
        data: Annotated[str, data_argument],
        layout: Annotated[str | None, layout_option] = None,
        patient: Annotated[str | None, patient_option] = None,
        only: Annotated[list[str] | None, only_option] = None,
        foreground: Annotated[bool, foreground_option] = False,
        channel: Annotated[list[str] | None, channel_option] = None,
        json_file: Annotated[str | None, typer.Option("--json", help="Also write all findings as JSON here; - for stdout.")] = None,
        picture: Annotated[Path | None, typer.Option(help="Also draw the worst cases here (.png).")] = None,
    ) -> None:
        """Look for what spoils a training. Masks that do not fit, empty or unknown labels, duplicates, leaks and outliers are named."""
        from .check import run as check_run

        how: dict[str, Any] = {"patient": patient, "only": only or [], "foreground": foreground, "channels": channel or []}
        errors = check_run(data, layout, json_file=json_file, picture=picture, **how)
        if errors:
            raise typer.Exit(1)

    @app.command()
    def plan(
        data: Annotated[str, data_argument],
        output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder to make.", callback=_expanded)],
        quick: Annotated[bool, typer.Option("--quick", help="A first model in about ten minutes.")] = False,
        minutes: Annotated[float | None, typer.Option(help="Training time to plan for.", min=0.1)] = None,
        layout: Annotated[str | None, layout_option] = None,
        patient: Annotated[str | None, patient_option] = None,
        only: Annotated[list[str] | None, only_option] = None,
        foreground: Annotated[bool, foreground_option] = False,
        channel: Annotated[list[str] | None, channel_option] = None,
        base: Annotated[str | None, typer.Option(help="A model package to fine-tune from, by name or file.")] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a plan that is there.")] = False,
    ) -> None:
        """Choose spacing, patch, network and training for a dataset. For this machine: config.yaml, and plan.md with the reasons."""
        how = {"layout": layout, "patient": patient, "only": only or [], "foreground": foreground, "channels": channel or []}
        _plan(data, output, quick, minutes, how, base, overwrite)
        # fit would begin with weights drawn at random, in a network of the base's shape.
        print(f"next: unetseg-train {f'finetune {data} --from {base} -o {output} --resume' if base else f'fit {output}'}")

    @app.command()
    def fit(
        run: Annotated[Path, run_argument],
        fold: Annotated[str, fold_option] = "0",
        seed: Annotated[str, seed_option] = "0",
        resume: Annotated[bool, typer.Option("--resume", help="Go on where it was stopped or killed.")] = False,
        restart: Annotated[bool, typer.Option("--restart", help="Begin anew; what was trained is replaced.")] = False,
        quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    ) -> None:
        """Train what config.yaml describes."""
        if resume and restart:
            raise UserError("--resume and --restart exclude each other; give one.")
        from .train import find

        config, seeds = _read(run), parse_seeds(seed)
        folds = parse_folds(fold, config.data.folds)
        case_set = find(config)
        if fold == "all":  # of few patients there are fewer than config.yaml asks for
            folds = folds[: max(2, len({c.patient for c in case_set.annotated if c.split != "test"}))]
        fit_run(run, folds, seeds, resume=resume, restart=restart, quiet=quiet, case_set=case_set)

    @app.command()
    def pictures(
        run: Annotated[Path, run_argument],
        output: Annotated[Path | None, typer.Option("--output", "-o", help="The picture; else RUN/augmentation.png.")] = None,
        case: Annotated[str | None, typer.Option(help="The case to show; else the first.")] = None,
    ) -> None:
        """Draw what each random change of the augmentation does to a case."""
        from . import transforms
        from .prepare import prepare
        from .train import find

        config = _read(run)
        case_set = find(config)
        chosen = [c for c in case_set.annotated if case is None or c.name == case][:1]
        if not chosen:
            raise UserError(
                f"There is no case {case!r} in {config.data.path}; there are {', '.join(c.name for c in case_set.annotated[:5])}, …"
            )
        target = output or run / "augmentation.png"
        transforms.draw(config, prepare(case_set, config, user_path(config.data.cache or run / "cache"), chosen)[0], target)
        print(f"wrote {target}")

    @app.command()
    def evaluate(
        folder: Annotated[Path, leaf_argument],
        data: Annotated[str | None, typer.Option(help="Another dataset to score, all of it; else the fold's held-out cases.")] = None,
    ) -> None:
        """Score held-out cases on the path that the program uses. Writes metrics.csv, metrics.json and report.html."""
        from . import clicks, metrics, report
        from .plan import own_name
        from .train import LiveEngine, live_package, load_run, weights_hash

        config, network = load_run(folder)
        weights = weights_hash(folder)
        case_set, cases = _scored(folder, config, data)
        clicked = config.model.task == "click"
        with _bar("scoring") as progress:
            rows = (clicks.evaluate if clicked else metrics.evaluate)(
                live_package(config.card()),
                metrics.case_items(case_set, cases),
                labels=case_set.labels,
                engine=LiveEngine(network),
                seen=report.Worst(folder, config.input.intensity),
                progress=lambda done, name: progress(done, len(cases), name),
            )
        told = f"unetseg-train evaluate {own_name(folder)}" + (f" --data {own_name(data)}" if data else "")
        where = own_name(data) if data else f"the held-out cases of {own_name(folder)}"
        where = f"lesions in {where}, after one click" if clicked else where
        where += "" if data else ", which chose its epoch as well"
        if data and (learned := _learned(folder, config, data, case_set, cases)):
            where += f"; {learned} of its {len(cases)} cases were trained on"
            print(f"{learned} of {len(cases)} cases were trained on, so the figures flatter the model.", file=sys.stderr)
        facts = metrics.summary(metrics.measured(rows), held_out=where, command=told, weights=weights)
        print(metrics.table(facts))
        if absent := {r["label"]: 0 for r in rows if r["label"] not in facts["labels"]}:
            print(f"In no case that was scored, so not measured: {', '.join(absent)}.")
        metrics.write(folder, rows, facts)
        print(f"wrote {report.write(folder)}")

    @app.command()
    def report(folder: Annotated[Path, leaf_argument]) -> None:
        """Write report.html: curves, all cases, the worst as pictures."""
        from .report import write

        print(f"wrote {write(folder)}")

    @app.command()
    def export(
        folder: Annotated[Path, leaf_argument],
        output: Annotated[
            Path | None, typer.Option("--output", "-o", help="The .unet.zip to write, or a folder for it.", callback=_expanded)
        ] = None,
        base: Annotated[
            str | None, typer.Option(help="The package that it was fine-tuned from, for its lineage. Default: as finetune noted.")
        ] = None,
    ) -> None:
        """Make a model package. ONNX and PyTorch must agree on held-out cases before."""
        import json

        from UNetSegmentationLib.model import find_model

        from . import metrics
        from .export import export_run, lineage
        from .finetune import FACTS
        from .train import load_run, read_run, weights_hash

        config, network = load_run(folder)
        case_set, cases = _scored(folder, config, None, some=True)
        try:
            scored = json.loads((folder / "metrics.json").read_text("utf-8"))["summary"]
        except (OSError, ValueError, KeyError):
            scored = None
            print("no metrics.json yet; for figures on the card run evaluate first", file=sys.stderr)
        if scored and scored.get("weights") != weights_hash(folder):
            scored = None
            print("metrics.json is of other weights than these, so the card has no figures; run evaluate again", file=sys.stderr)
        origin = lineage(read_run(folder), find_model(base) if base else None)
        if not base and (folder / FACTS).is_file():
            origin |= {k: v for k, v in json.loads((folder / FACTS).read_text("utf-8")).items() if k == "parent"}
        made = export_run(network, config.card(), output or folder, metrics.case_items(case_set, cases), origin, scored)
        print(f"wrote {made.path}")

    @app.command()
    def finetune(
        data: Annotated[str, data_argument],
        base: Annotated[
            str | None,
            typer.Option("--from", help="The model package to start from, by name or file; without it, from scratch (not with -o)."),
        ] = None,
        output: Annotated[
            Path | None,
            typer.Option("--output", "-o", help="A run's folder to make, as plan and fit do, instead of a retraining.", callback=_expanded),
        ] = None,
        quick: Annotated[
            bool | None, typer.Option("--quick/--full", help="In about ten minutes, or in hours. Default: quick; with -o, full.")
        ] = None,
        minutes: Annotated[float | None, typer.Option(help="Training time to plan for.", min=0.01)] = None,
        device: Annotated[str, typer.Option(help="Without -o: auto, cpu, gpu or mps.")] = "auto",
        name: Annotated[
            str, typer.Option(help="Without -o: of the new model; else the base's, or the dataset's where the labels are others.")
        ] = "",
        job: Annotated[
            Path | None, typer.Option(help="Without -o: the retraining's folder; else a new one in retrain/, in DATA or beside its file.")
        ] = None,
        detach: Annotated[bool, typer.Option("--detach", help="Without -o: begin it and return; see jobs, stop, resume, promote.")] = False,
        freeze: Annotated[list[str] | None, typer.Option(help="With -o: layers to keep, e.g. encoder; several times.")] = None,
        replay: Annotated[str | None, typer.Option(help="With -o: the base model's own dataset, to train on as well.")] = None,
        share: Annotated[
            float | None, typer.Option(help="With --replay: part of the patches that come from it; default 0.25.", min=0, max=1)
        ] = None,
        fold: Annotated[str, typer.Option(help="With -o: the fold, 0, 1, ..., or split (the dataset's own).")] = "0",
        seed: Annotated[str, typer.Option(help="With -o: the seed.")] = "0",
        resume: Annotated[bool, typer.Option("--resume", help="With -o: go on where it was stopped or killed.")] = False,
        layout: Annotated[str | None, typer.Option(help="With -o: the dataset's layout, where it is not recognised.")] = None,
        foreground: Annotated[bool, typer.Option("--foreground", help="With -o: learn all labels as one.")] = False,
    ) -> None:
        """Fine-tune a model on other cases, labels, channels or spacing.

        It trains, scores the new model and its base on held-out cases, says whether it got better, and makes a package. Ctrl-C
        keeps the best so far. With -o it trains only; evaluate and export do the rest.
        """
        if share is not None and not replay:
            raise UserError("--share goes with --replay; give that, or leave it out.")
        if output is None:
            if freeze or replay or resume or layout or foreground or (fold, seed) != ("0", "0"):
                names = "--freeze, --replay, --fold, --seed, --resume, --layout and --foreground"
                raise UserError(f"{names} go with -o RUN; give it, or leave them out.")
            _retrain(data, base, quick is not False, minutes, device, name, job, detach)
            return
        if name or job or detach or device != "auto":
            raise UserError("--device, --name, --job and --detach do not go with -o RUN; leave either out.")
        if base is None:
            raise UserError("finetune needs a model to start from; name one with --from, or use plan and fit.")
        from UNetSegmentationLib.model import find_model

        from . import finetune as tuning
        from . import metrics
        from .cases import UNNAMED, evenly, find_cases
        from .report import write as write_report
        from .train import LiveEngine, live_package

        folds, seeds = parse_folds(fold, 50), parse_seeds(seed)
        if len(folds) * len(seeds) > 1:
            raise UserError("finetune trains one fold with one seed at a time; give one of each.")
        package = find_model(base)
        begun = (output / "config.yaml").exists()
        if begun and not resume:
            raise UserError(f"{output} holds a fine-tuning already; add --resume to go on with it, or choose another folder.")
        if not begun:
            _plan(data, output, bool(quick), minutes, {"layout": layout, "foreground": foreground}, base, False)
        config = _read(output)
        planned, named = (user_path(path).resolve() for path in (os.path.expandvars(config.data.path), data))
        pairs = ((planned, named), (named, planned))  # a dataset is its folder or the index file in that
        if begun and planned != named and not any(a.is_file() and a.parent == b for a, b in pairs):
            raise UserError(f"{output} is a fine-tuning on {config.data.path}; name that dataset, or choose another folder.")
        start = tuning.start_of(package, config)
        print(start.sentence)
        frozen = tuple(freeze or ())
        if not (facts_file := leaf(output, folds[0], seeds[0]) / tuning.FACTS).exists():  # it may be stopped, and exported then
            tuning.write(facts_file.parent, start, package, frozen)
        old = find_cases(Path(replay)) if replay else None
        if old and not all(UNNAMED.fullmatch(label.name) for label in config.labels):  # those of a plan from before sets were named so
            old = tuning.named_as(old, package.card)
        part = 0.25 if share is None else share
        again = (tuning.replay_set(old, [label.name for label in config.labels], config.channels), part) if old else None
        (result,) = fit_run(
            output,
            folds,
            seeds,
            resume=resume,
            restart=False,
            start=start.state,
            freeze=(lambda network: tuning.freeze(network, frozen)) if frozen else None,
            replay=again,
        )
        facts = None
        if old:
            kept = [c for c in old.annotated if c.split == "test"]
            items = metrics.case_items(old, evenly(kept or old.annotated, 20))
            engine = LiveEngine(result.network)
            facts = tuning.forgetting(package, live_package(config.card()), items, old.labels, engine, old.channels)
            if facts["cases"] and not kept:
                facts["verdict"] += " It was trained on these very cases, as none is marked as test."
            print(facts["verdict"])
        tuning.write(result.folder, start, package, frozen, facts)
        print(f"wrote {write_report(result.folder)}")

    job_argument = typer.Argument(help="The folder of a retraining, such as DATA/retrain/20261123-101500-my-model.", show_default=False)

    @app.command()
    def jobs(data: Annotated[Path, data_argument]) -> None:
        """List the retrainings of a dataset, the newest first."""
        from UNetSegmentationLib import training

        if not user_path(data).exists():
            raise UserError(f"{data} does not exist; check the name.")
        found = [training.read(data)] if (data / training.JOB).is_file() else training.jobs(data)
        fates = {"use": ", used", "keep": ", kept", "discard": ", discarded"}
        for job in found:
            state = job.state + fates.get(job.decided, "")
            print(f"{job.folder}\n    {state}: {job.text}" + (f"\n    {job.package}" if job.package else ""))
        if not found:
            print("no retraining yet; begin one with: unetseg-train finetune DATA --from MODEL")

    @app.command()
    def stop(job: Annotated[Path, job_argument]) -> None:
        """End a retraining that runs on its own. The best so far becomes a package."""
        from UNetSegmentationLib import training

        training.stop(training.read(job))
        print("it will stop in a moment and keep the best so far")

    @app.command()
    def resume(
        job: Annotated[Path, job_argument],
        finish: Annotated[bool, typer.Option("--finish", help="Train no further; make a package of the best so far.")] = False,
        detach: Annotated[bool, typer.Option("--detach", help="Go on and return.")] = False,
    ) -> None:
        """Go on with a retraining that was stopped, killed, or failed."""
        from UNetSegmentationLib import training

        _follow(training.resume(training.read(job), sys.executable, finish=finish, launch=detach), detach)

    @app.command()
    def promote(
        job: Annotated[Path, job_argument],
        how: Annotated[str, typer.Argument(help="use (in its parent's place), keep (both) or discard.")],
        worse: Annotated[bool, typer.Option("--worse", help="Also where it is worse than its parent.")] = False,
    ) -> None:
        """Decide on what came out of a retraining."""
        from UNetSegmentationLib import training

        found = training.read(job)
        if how == "use" and found.verdict == "worse" and not worse:
            raise UserError(f"It is worse than {found.base}; keep both, discard it, or add --worse to use it all the same.")
        path = training.promote(found, how)
        print(f"wrote {path}" if path else "discarded")

    return app


def _retrain(
    data: str,
    base: str | None,
    quick: bool,
    minutes: float | None,
    device: str,
    name: str,
    folder: Path | None,
    detach: bool,
) -> None:
    from UNetSegmentationLib import training

    options = training.Options(quick, device, minutes, name)
    if detach:
        _follow(training.start(data, base, options, sys.executable, folder=folder), True)
    else:
        job = training.create(data, base, options, folder)
        try:
            _follow(job, False)
        except UserError as e:
            from .retrain import CASES

            if "resume it" not in str(e) and not (job.folder / CASES).exists():  # of no use: the cases cannot be trained on
                shutil.rmtree(job.folder, ignore_errors=True)
                with suppress(OSError):  # others are there
                    training.jobs_folder(job.dataset).rmdir()
            raise


def _follow(job: Any, detached: bool) -> None:
    """Do a retraining here and now, unless it runs on its own."""
    from UNetSegmentationLib import training

    def say(text: str) -> None:
        if (now := training.read(job.folder)).running or now.package:  # else it is the error's
            print(text, flush=True)

    if detached:
        listed = job.folder.parent == training.jobs_folder(job.dataset)
        print(f"{job.folder}: begun; look with: unetseg-train jobs {job.dataset if listed else job.folder}")
        return
    try:
        from .retrain import run  # takes seconds, in which it may be stopped

        if not training.claim(job.folder):
            raise UserError(f"{job.folder} is being trained by another process; wait for it, or stop it.")
        print(job.folder)
        run(job.folder, say)
    except KeyboardInterrupt:
        if training.read(job.folder).running:
            training.end(job.folder, "stopped", "Stopped; resume it to go on where it was.")
        raise
    job = training.read(job.folder)
    if job.package is None:
        raise UserError(job.text)
    how = "keep (or discard)" if job.verdict == "worse" else "use"
    print(f"wrote {job.package}; decide with: unetseg-train promote {job.folder} {how}")


def _scored(folder: Path, config: Any, data: str | None, some: bool = False) -> tuple[Any, Sequence[Any]]:
    """The dataset and the cases of it to score: the run's held-out ones, or all of another dataset. some: of the held-out ones those
    that are there will do."""
    from .cases import UnfitPattern, ordered_channels
    from .train import find, read_run

    if data:
        other = config.data.model_copy(update={"path": data, "layout": None, "channels": []})
        try:
            case_set = find(config.model_copy(update={"data": other}))
        except UnfitPattern:  # others name their cases in their own way
            print(f"data.patient fits the name of no case of {data}; its patients are as it tells them itself.", file=sys.stderr)
            other = other.model_copy(update={"patient": None})
            case_set = find(config.model_copy(update={"data": other}))
        if len(case_set.channels) != len(config.channels):  # else they are the run's, by whatever names
            case_set = find(config.model_copy(update={"data": other.model_copy(update={"channels": config.data.channels})}))
        case_set = ordered_channels(case_set, config.channels)
        return case_set, case_set.annotated
    case_set = find(config)
    names = set(read_run(folder).get("validation_cases", ()))
    cases = [c for c in case_set.annotated if c.name in names]
    gone = sorted(names - {c.name for c in cases})
    if not cases or (gone and not some):
        which = f"{len(gone)} of the {len(names)} held-out cases of {folder} ({', '.join(gone[:3])}{', …' * (len(gone) > 3)})"
        raise UserError(
            f"{which} are no longer in {config.data.path}; put them back" + (", or name another dataset with --data." if not some else ".")
        )
    return case_set, cases


def _learned(folder: Path, config: Any, data: str, case_set: Any, cases: Sequence[Any]) -> int:
    """How many of the cases the run was trained on: by what they hold, or, in the run's own dataset, by their names as well, since a
    mask may have been corrected."""
    from .train import read_run

    record = read_run(folder)
    digests = {digest for part in (record.get("data") or {}).values() for digest in part.values()}
    own = user_path(os.path.expandvars(config.data.path)).resolve() == user_path(data).resolve()
    names = set(record.get("training_cases", ())) if own else set()
    return sum(c.name in names or case_set.digest(c) in digests for c in cases)


def _plan(
    data: str,
    output: Path,
    quick: bool,
    minutes: float | None,
    how: dict[str, Any],
    base: str | None,
    overwrite: bool,
) -> None:
    """how: find_cases()'s arguments, which are the section "data" of the configuration."""
    from UNetSegmentationLib.files import check_writable
    from UNetSegmentationLib.model import find_model
    from UNetSegmentationLib.networks import UNetConfig

    from .cases import find_cases
    from .finetune import named_as
    from .plan import plan as make_plan
    from .train import learnable

    if (output / "config.yaml").exists() and not overwrite:
        raise UserError(f"{output} holds a plan already; add --overwrite to replace it, or choose another folder.")
    check_writable(output / "config.yaml")
    old = None
    if base:
        card = find_model(base).card
        if "network" not in card.data:
            raise UserError(f"{base} does not describe its network, so it cannot be trained on; choose a package with PyTorch weights.")
        old = card, UNetConfig.from_json(card.data["network"])
    case_set = find_cases(Path(data), **how)
    case_set = named_as(case_set, old[0]) if old else case_set
    learnable(case_set.annotated, data)
    with _bar("reading the cases") as progress:
        made = make_plan(case_set, data, quick=quick, minutes=minutes, data=how, base=old, progress=progress)
    made.write(output)
    print(made.markdown())
    print(f"wrote {output / 'config.yaml'} and {output / 'plan.md'}")


if __name__ == "__main__":
    main()
