"""The training: PyTorch Lightning, resumable exactly after a kill at any moment, on one device or many.

    train(config, folder) -> Result

Batches come from a Source by their number, weights are validated through predict(), and after each epoch everything that
the next one depends on goes to last.ckpt at once (network, average, optimizer, schedule, early stopping, the source's
state). A run that is killed repeats the epoch it was in, and ends with the very weights of one that was not.

Other trainings than that of a Config (a click model's rounds) make their own Job.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import logging
import math
import os
import pickle
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from UNetSegmentationLib.engines.torch import same_values
from UNetSegmentationLib.files import OUT_OF_MEMORY, UserError, atomic_path, remove_file, user_path
from UNetSegmentationLib.image import Image
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.model import Card, ModelPackage
from UNetSegmentationLib.networks import UNet, UNetConfig, build

from .cases import IGNORE, Case, CaseSet, evenly, find_cases, folds, with_names
from .config import Config, Fit, parse
from .prepare import Prepared, prepare

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of lightning's own dependencies, at import
    import lightning as L
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import callbacks as lightning_callbacks
    from lightning.pytorch.callbacks import Callback, Checkpoint
    from lightning.pytorch.strategies import DDPStrategy

if TYPE_CHECKING:
    from .sampling import Source

CHECKPOINT, WEIGHTS, RUN = "last.ckpt", "best.safetensors", "run.json"
# Settings that may differ when a run goes on: they change where and how fast it runs, not what comes out.
_FREE: dict[str, set[str] | None] = {
    "fit": {"workers", "accelerator", "devices", "nodes", "strategy", "minutes", "deterministic"},
    "data": {"path", "cache", "channels"},
    "model": None,
}


# ----------------------------------------------------------------------------------------------------------- validation


class LiveEngine:
    """The engine of a network that is being trained: predict() runs it as it would run a package."""

    def __init__(self, network: UNet) -> None:
        self.network = network

    def run(self, batch: np.ndarray) -> np.ndarray:
        device = next(self.network.parameters()).device
        was = self.network.training
        self.network.eval()
        with torch.inference_mode():
            logits = self.network(torch.from_numpy(np.ascontiguousarray(batch, np.float32)).to(device)).float().cpu().numpy()
        self.network.train(was)
        return logits

    def describe(self) -> str:
        return "the network in training"


def live_package(card: dict[str, Any]) -> ModelPackage:
    """A package without files, for predict(..., engines=[LiveEngine(network)])."""
    return ModelPackage(Path(f"{card['name']}-{card['version']}"), Card(card), b"", None)


class Validator(Protocol):
    def __len__(self) -> int: ...

    def score(self, index: int, network: UNet) -> dict[str, float]:
        """The Dice of each label of held-out case `index`, by the label's name; NaN where there is none to be found."""
        ...

    def name(self, index: int) -> str: ...


class UnfitFold(UserError):
    """One fold cannot be trained or scored; the others may be."""


class HeldOut:
    """Whole held-out cases through predict(), on their own grids."""

    def __init__(self, case_set: CaseSet, cases: Sequence[Case], config: Config) -> None:
        self.case_set, self.config, self.all = case_set, config, cases
        self.cases = evenly(cases, config.fit.validate_cases or len(cases))
        self.package = live_package(config.card())
        self.examples: list[tuple[str, Image, np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self.cases)

    def name(self, index: int) -> str:
        return self.cases[index].name

    def read(self) -> None:
        """Others where those chosen have empty masks, which have no Dice once the network finds nothing; UnfitFold where all have."""
        if any(map(self.case_set.marked, self.cases)):
            return
        marked = [c for c in self.all if self.case_set.marked(c)]
        if not marked:
            names = f"{', '.join(c.name for c in self.all[:3])}{', …' * (len(self.all) > 3)}"
            raise UnfitFold(
                f"The masks of all held-out cases ({names}) are empty, so nothing shows how well the model does; mark something in one, "
                "or hold out others."
            )
        self.cases = evenly(marked, self.config.fit.validate_cases or len(marked))

    def score(self, index: int, network: UNet) -> dict[str, float]:
        case = self.cases[index]
        image, truth = self.case_set.load(case)
        found = predict(image, [self.package], Options(tta="none"), engines=[LiveEngine(network)]).labels.array
        if len(self.examples) >= 4:
            self.examples = [e for e in self.examples if e[0] != case.name]
        if len(self.examples) < 4:
            self.examples.append((case.name, image, truth, found.astype(np.uint8)))
        out = {}
        for value, label in enumerate(self.config.labels, 1):
            a, b = (found == value) & (truth != IGNORE), truth == value
            total = int(a.sum()) + int(b.sum())
            out[label.name] = 2 * int((a & b).sum()) / total if total else math.nan
        return out


# ------------------------------------------------------------------------------------------------------------------ jobs


@dataclass
class Job:
    """What is trained. prepare() is called once on each machine, then source(rank, devices) and loss() on each device.

    identity: what a checkpoint must have been made with to be gone on from, flat, JSON-able; record: what run.json says.
    """

    network: UNetConfig
    fit: Fit
    source: Callable[[int, int], Source]
    loss: Callable[[], Callable[[Any, Tensor], Tensor]]
    validator: Validator | None = None
    prepare: Callable[[], None] = lambda: None
    start: dict[str, Tensor] | None = None
    freeze: Callable[[UNet], object] | None = None
    seed: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """network: the averaged weights of the best epoch, in evaluation mode. dice: its mean over labels; NaN without validation."""

    network: UNet
    dice: float
    labels: dict[str, float]
    epoch: int
    folder: Path


def learnable(cases: Sequence[Case], source: object) -> list[Case]:
    """Those of the annotated cases that are not for testing; UserError where they are too few to train on. source: the dataset's name."""
    named = [c for c in cases if c.split != "test"]
    if not named:
        raise UserError(f"{source} holds no annotated cases; add images with their masks, or check the folder's name.")
    if len(named) == 1:
        raise UserError(
            f"{source} holds one annotated case only ({named[0].name}); a model needs at least two, one to learn from and one to be "
            "checked on: annotate another."
        )
    return named


def held_out(
    cases: Sequence[Case], config: Config, fold: int | None, marked: Callable[[Case], bool] | None = None
) -> tuple[list[Case], list[Case]]:
    """Training and validation cases. fold: of the patient-wise folds, for which marked is as of folds(); None: the dataset's own
    split. Test cases are in neither."""
    what = config.data.path
    named = learnable(cases, what)
    if fold is None:
        train = [c for c in named if c.split in ("", "train")]
        check = [c for c in named if c.split == "validation"]
        if not check or not train:
            raise UserError(f"{what} does not say which cases are for validation; train a fold (--fold 0), or mark them in the dataset.")
        return train, check
    patients = len({c.patient for c in named})
    if patients == 1:
        raise UserError(
            f"All {len(named)} cases of {what} are of one patient ({named[0].patient}), so nothing shows how well the model does on "
            "another; add a second patient, or correct data.patient."
        )
    k = min(config.data.folds, patients)
    if not 0 <= fold < k:
        raise UserError(f"There is no fold {fold}; {what} has the folds 0 to {k - 1}.")
    of = folds(named, k, config.data.fold_seed, marked)
    return [c for c, f in zip(named, of) if f != fold], [c for c, f in zip(named, of) if f == fold]


def make_job(
    config: Config,
    cache: Path,
    case_set: CaseSet | None = None,
    *,
    fold: int | None = 0,
    seed: int = 0,
    start: dict[str, Tensor] | None = None,
    freeze: Callable[[UNet], object] | None = None,
    replay: tuple[CaseSet, float] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Job:
    """The Job of a configuration."""
    from . import clicks, losses
    from .sampling import Patches

    clicked = config.model.task == "click"
    if clicked and replay:
        raise UserError("A click model is trained without its base's cases; leave --replay out, or add them to the dataset.")
    case_set = case_set or find(config)
    ignores = case_set.ignores or bool(replay and replay[0].ignores)
    if clicked and ignores:
        raise UserError(
            f"A click model learns from what is marked all over, and {config.data.path} has the label ignore; complete its masks, or train "
            "an automatic model."
        )
    _check_labels(config, case_set)
    train, check = held_out(case_set.annotated, config, fold, case_set.marked)
    base = [c for c in replay[0].annotated if c.split != "test"] if replay else []
    if replay and not base:
        raise UserError(f"All annotated cases of {replay[0].source} are for testing, so none can be replayed; name another dataset.")
    kept: dict[str, list[Prepared]] = {}

    identity: dict[str, Any] = {
        f"{section}.{name}": value
        for section, values in config.model_dump(mode="json").items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
        if section not in _FREE or (_FREE[section] is not None and name not in (_FREE[section] or ()))
    }
    identity |= {"fold": fold, "seed": seed, "cases": [c.name for c in train]}
    if replay:
        identity["share"] = replay[1]
    if start is not None:
        identity["start"] = hashlib.sha256(save_tensors({k: v.contiguous() for k, v in start.items()})).hexdigest()

    def load() -> None:
        if not kept:
            # Held-out cases are read at validation as predict() reads them; the network never sees their cached form.
            try:
                kept["train"] = prepare(case_set, config, cache, train, progress)
                kept["base"] = prepare(replay[0], config, cache, base, progress) if replay else []
            except (MemoryError, ValueError) as e:  # the second is NumPy's of more than 2^63 bytes
                if not isinstance(e, MemoryError) and "too big" not in str(e):
                    raise
                spacing = " x ".join("its own" if v is None else f"{v:g}" for v in config.input.spacing)
                raise UserError(f"A case with an input.spacing of {spacing} mm is larger than the memory; make it coarser.") from e
            _check_classes(config, kept["train"] + kept["base"], fold)
            validator.read()
            identity["data"] = hashlib.sha256("".join(c.digest for c in kept["train"] + kept["base"]).encode()).hexdigest()

    def source(rank: int, devices: int) -> Source:
        load()
        if clicked:
            return clicks.source(kept["train"], config, config.fit.batch // devices, config.fit.seed + seed + rank)
        return Patches(kept["train"], config, config.fit.seed + seed, (rank, devices), kept["base"], replay[1] if replay else 0)

    def loss() -> losses.LossOf:
        load()
        if clicked:
            return clicks.loss
        return losses.make(config.loss, len(config.labels) + 1, [c.counts for c in kept["train"]], ignores)

    record = {
        "config": config.model_dump(mode="json"),
        "fold": fold,
        "training_cases": [c.name for c in train],
        "validation_cases": [c.name for c in check],
        "data": kept,
    }
    validator = (clicks.HeldOut if clicked else HeldOut)(case_set, check, config)
    return Job(config.unet(), config.fit, source, loss, validator, load, start, freeze, config.fit.seed + seed, identity, record)


def find(config: Config) -> CaseSet:
    """The dataset that a configuration names; labels that have no names there have the configuration's."""
    data = config.data
    path = os.path.expandvars(data.path)
    if "$" in path and not user_path(path).exists():  # Windows' hidden shares end in one
        raise UserError(f"data.path is {data.path}, and that variable is not set; set it to the folder, or write the folder's name.")
    found = find_cases(Path(path), data.layout, patient=data.patient, only=data.only, foreground=data.foreground, channels=data.channels)
    return with_names(found, [label.name for label in config.labels])


def _check_labels(config: Config, case_set: CaseSet) -> None:
    have, want = [label.name for label in case_set.labels], [label.name for label in config.labels]
    if have != want:
        raise UserError(
            f"{config.data.path} now has the labels {', '.join(have)}, the configuration {', '.join(want)}; "
            "plan again, or correct one of them."
        )


def _check_classes(config: Config, cases: Sequence[Prepared], fold: int | None) -> None:
    for value, label in enumerate(config.labels, 1):
        if not any(c.counts[value] for c in cases):
            where = "the training cases" if fold is None else f"the training cases of fold {fold}"
            raise UnfitFold(
                f"Label {value} ({label.name}) is in none of {where} ({len(cases)}: {', '.join(c.name for c in cases[:3])}"
                f"{', …' if len(cases) > 3 else ''}); annotate it in one, train another fold, or leave it out with data.only."
            )


# ------------------------------------------------------------------------------------------------------------- lightning


class _Steps(Sampler[int]):
    """The numbers of this epoch's batches."""

    def __init__(self, module: Training) -> None:
        self.module = module

    def __len__(self) -> int:
        return self.module.job.fit.steps * self.module.job.fit.accumulate

    def __iter__(self) -> Any:
        # Not current_epoch: just after a resume it still is the epoch before.
        first = self.module.trainer.global_step * self.module.job.fit.accumulate
        return iter(range(first, first + len(self)))


class _Batches(Dataset[Any]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, step: int) -> tuple[int, Tensor, Tensor]:
        return (step, *self.source.batch(step))


class Batches(L.LightningDataModule):
    """The Source and the held-out cases, as Lightning asks for them."""

    def __init__(self, job: Job, module: Training) -> None:
        super().__init__()
        self.job, self.module = job, module

    def prepare_data(self) -> None:
        self.job.prepare()

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        rank, devices = self.trainer.global_rank, self.trainer.world_size
        self.module.source = self.job.source(rank, devices)
        self.module.loss = self.job.loss()

    def train_dataloader(self) -> DataLoader[Any]:
        source = self.module.source
        assert source is not None
        workers = _workers(self.job.fit, self.module.device)
        if hasattr(source, "after"):
            workers = 0  # the next batch depends on the network's answer to this one
        return DataLoader(
            _Batches(source),
            batch_size=None,
            sampler=_Steps(self.module),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.module.device.type == "cuda",
            worker_init_fn=_one_thread if workers else None,
        )

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        count = len(self.job.validator) if self.job.validator else 0
        rank, devices = self.trainer.global_rank, self.trainer.world_size
        # As many for each device, lest one skips the validation that the others wait in; -1 is no case.
        return [i if i < count else -1 for i in range(rank, -(-count // devices) * devices, devices)]


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _workers(fit: Fit, device: torch.device) -> int:
    if fit.workers is not None:
        return fit.workers
    # On a CPU the network wants the cores; patches take a few percent of a step.
    return 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 2) - 1))


def _made(network: UNetConfig) -> UNet:
    """With random weights, in the layout that it is trained in."""
    model = build(network)
    if network.dimensions == 2:  # 0.88 of a CPU's time of a step with lung-nodule-2d; in 3D nothing is gained
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


class Training(L.LightningModule):
    """The network, the average of its weights, and a step. `network` is a name of Lightning's own, so it is `model`."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        torch.manual_seed(job.seed)
        self.model = _made(job.network)
        if job.start is not None:
            self.model.load_state_dict(job.start)
        if job.freeze:
            job.freeze(self.model)
            job.identity["freeze"] = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        self.average = build(job.network)
        self.average.load_state_dict(self.model.state_dict())
        self.average.requires_grad_(False)
        self.source: Source | None = None
        self.loss: Callable[[Any, Tensor], Tensor] | None = None
        self.scores: list[tuple[str, dict[str, float]]] = []
        self.last_scores: dict[str, float] = {}

    # -- learning

    def training_step(self, batch: tuple[int, Tensor, Tensor], batch_idx: int) -> Tensor:
        step, x, y = batch
        assert self.loss is not None and self.source is not None
        output = self.model(x)
        with torch.autocast(x.device.type, enabled=False):
            loss = self.loss([o.float() for o in output] if isinstance(output, list) else output.float(), y)
        if not torch.isfinite(loss):
            raise UserError(
                f"The loss is not a number at step {step + 1} (cases {', '.join(self.source.names(step))}); look at these images for "
                f"extreme values, lower fit.learning_rate or set fit.precision to 32, and train again{_kept(self.trainer)}."
            )
        if hasattr(self.source, "after"):
            self.source.after((output[0] if isinstance(output, list) else output).detach().float())
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        done = self.trainer.global_step
        keep = min(self.job.fit.ema, done / (done + 9)) if done else 0.0
        with torch.no_grad():
            for a, b in zip(self.average.state_dict().values(), self.model.state_dict().values()):
                if a.dtype.is_floating_point:
                    a.lerp_(b, 1 - keep)
                else:
                    a.copy_(b)

    def configure_optimizers(self) -> Any:
        fit = self.job.fit
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if not weights:
            raise UserError("All layers are frozen, so nothing can be learnt; freeze fewer.")
        optimizer = torch.optim.AdamW(weights, fit.learning_rate, betas=fit.betas, weight_decay=fit.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, fit))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- validation

    def on_validation_epoch_start(self) -> None:
        self.scores = []

    def validation_step(self, index: int, batch_idx: int) -> None:
        validator = self.job.validator
        assert validator is not None
        index = int(index)
        if index < 0:
            return
        with torch.autocast(self.device.type, enabled=False):
            self.scores.append((validator.name(index), validator.score(index, self.average)))

    def on_validation_epoch_end(self) -> None:
        rows = self.scores
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            dist.all_gather_object(parts, rows)
            rows = sorted((row for part in parts for row in part), key=lambda r: r[0])
        self.scores = rows
        means: dict[str, float] = {}
        for name in dict.fromkeys(n for _, row in rows for n in row):
            values = [row[name] for _, row in rows if name in row and not math.isnan(row[name])]
            if values:
                means[name] = float(np.mean(values))
        if not means:
            raise UserError("The validation cases hold none of the labels; train another fold, or annotate them.")
        self.last_scores = means
        for name, value in means.items():
            self.log(f"dice/{name}", value)
        self.log("dice", float(np.mean(list(means.values()))))

    def examples(self) -> list[Any]:
        """(name, image, truth, prediction) of up to four cases of the last validation."""
        return list(getattr(self.job.validator, "examples", []))

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = json.dumps(self.job.identity)
        if self.source is not None and hasattr(self.source, "state"):
            checkpoint["source"] = self.source.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "source" in checkpoint:  # Lightning has set up the data by now
            self.source.restore(checkpoint["source"])  # type: ignore[union-attr]


def rate(fit: Fit, step: int) -> float:
    """The learning rate of an optimizer step, as a part of fit.learning_rate: a linear warm-up, then half a cosine."""
    warmup = min(fit.warmup, fit.epochs * fit.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, fit.epochs * fit.steps - 1 - warmup))
    last = fit.final_rate / fit.learning_rate
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))


def _write(path: Path, content: bytes | memoryview) -> None:
    """All or nothing, on the disk itself before the name changes. A virus scanner may be longer at a checkpoint than at other files,
    and a night's training is not to end for it."""
    with atomic_path(path, patience=60.0) as temporary, temporary.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


class _Checkpoints(TorchCheckpointIO):
    """Whole checkpoint files or none, read without unpickling anything but tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        _write(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return _load_checkpoint(Path(path))


def _load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as f:
            if f.read(4) != b"PK\3\4":  # torch.load takes the pickles of before 1.6 as well
                raise ValueError("no checkpoint of this program")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(f"{path} holds more than numbers and is not loaded; ask who wrote it there, or delete it and train again.") from e
    except Exception as e:  # torch raises half a dozen types for a damaged file
        raise UserError(f"{path} is damaged ({str(e).splitlines()[0][:100]}); delete it and train again.") from e


def _kept(trainer: L.Trainer) -> str:
    return ": the last good epoch is kept" if trainer.current_epoch else ""


def awake() -> float:
    """Seconds on a clock that stands still while the computer sleeps, as time.monotonic() does but on Windows (PEP 418)."""
    if sys.platform == "win32":
        ticks = ctypes.c_ulonglong()  # of 100 ns
        ctypes.windll.kernel32.QueryUnbiasedInterruptTime(ctypes.byref(ticks))
        return ticks.value / 1e7
    return time.monotonic()


class EarlyStopping(lightning_callbacks.EarlyStopping):
    """By planned validations alone: that of an epoch in which time was up would end a run that goes on sooner than one with more time.

    Named as its base, by which checkpoints hold its state.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if (trainer.current_epoch + 1) % pl_module.job.fit.validate_every == 0:
            super().on_validation_end(trainer, pl_module)


class Keeper(Checkpoint):
    """After each epoch: the best averaged weights, then the checkpoint; and an end, with a validation, when the time is used up."""

    def __init__(self, folder: Path, fit: Fit) -> None:
        super().__init__()
        self.folder, self.fit = folder, fit
        self.best, self.epoch, self.labels = -math.inf, -1, dict[str, float]()
        self.seconds, self._since = 0.0, 0.0
        self._dice = -math.inf  # of this epoch, where it is validated

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        self._since = self._since or awake()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        # A run that was killed between its last checkpoint and its end would train an epoch more than one that was not.
        trainer.should_stop = self.late() or any(s.wait_count >= s.patience for s in trainer.early_stopping_callbacks)

    def late(self) -> bool:
        return bool(self.fit.minutes) and self.seconds > 60 * (self.fit.minutes or 0)

    def _count(self) -> None:
        now = awake()
        self.seconds, self._since = self.seconds + now - self._since, now

    def _up(self, trainer: L.Trainer) -> bool:
        return trainer.strategy.broadcast(self.late())  # by its own clock one process would stop while the others wait for it

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.is_last_batch:
            self._count()
            if self._up(trainer):  # Lightning reads next whether to validate: the last epoch is, whatever fit.validate_every
                trainer.check_val_every_n_epoch = 1

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        self._count()
        self._dice = float(trainer.callback_metrics["dice"])

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        if not all(p.isfinite().all() for p in module.model.parameters()):  # a checkpoint of them could never be gone on from
            raise UserError(
                f"The weights are no numbers after epoch {trainer.current_epoch + 1}; lower fit.learning_rate or set fit.precision to 32, "
                f"and train again{_kept(trainer)}."
            )
        value, self._dice = self._dice, -math.inf
        # Until the first validation the latest weights are the best known.
        if value > self.best or self.best == -math.inf:
            self.best, self.epoch, self.labels = value, trainer.current_epoch, dict(module.last_scores)
            if trainer.is_global_zero:
                weights = {k: v.detach().cpu().contiguous() for k, v in module.average.state_dict().items()}
                _write(self.folder / WEIGHTS, save_tensors(weights, {"network": json.dumps(module.job.network.to_json())}))
        trainer.save_checkpoint(self.folder / CHECKPOINT)
        if self._up(trainer):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "epoch": self.epoch, "labels": self.labels, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.epoch, self.labels, self.seconds = state["best"], state["epoch"], state["labels"], state["seconds"]


# ------------------------------------------------------------------------------------------------------------------ train


def train(
    config: Config,
    folder: Path,
    case_set: CaseSet | None = None,
    *,
    fold: int | None = 0,
    seed: int = 0,
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
    start: dict[str, Tensor] | None = None,
    freeze: Callable[[UNet], object] | None = None,
    replay: tuple[CaseSet, float] | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """Train one fold with one seed in `folder`, or go on there. UserError in one sentence for what the person can cure.

    case_set: else what config.data names. seed: added to fit.seed. start: weights to begin from; freeze(network) is called
    before the optimizer is made; replay: (other cases, the probability of a patch of theirs). cache: else data.cache, else
    `cache` beside the folder. progress(done, of, case) while cases are pre-processed.
    """
    cache = cache or (user_path(config.data.cache) if config.data.cache else folder.parent / "cache")
    job = make_job(config, cache, case_set, fold=fold, seed=seed, start=start, freeze=freeze, replay=replay, progress=progress)
    return run(job, folder, resume=resume, callbacks=callbacks)


def run(job: Job, folder: Path, *, resume: bool = True, callbacks: Sequence[Callback] = ()) -> Result:
    """Train a Job in `folder`; see train()."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    saved = folder / CHECKPOINT
    first = is_first()
    going_on = resume and saved.exists()
    module = Training(job)
    if first:
        job.prepare()
    if going_on:
        done, minutes = read_run(folder), job.fit.minutes
        # One that ended as its time was up goes on when it has more.
        ended = bool(done.get("finished") and not (done.get("late") and (not minutes or done["seconds"] < 60 * minutes)))
        if first:
            before, now = json.loads(_load_checkpoint(saved).get("identity", "{}")), job.identity
            old, new = (record.get("config", {}).get("model") for record in (done, job.record))
            if old and new:
                before, now = before | _made_by(old, ended), now | _made_by(new, ended)
            _check_identity(before, now, folder)
            _describe(job, folder, done)
        if ended:
            dice = math.nan if done["dice"] is None else done["dice"]
            return Result(load_weights(folder, job.network), dice, done["dice_by_label"], done["best_epoch"], folder)
    keeper = Keeper(folder, job.fit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice about workers, cores and loggers
            trainer = _trainer(job, folder, [*callbacks, keeper])
            if job.fit.batch % trainer.world_size:
                raise UserError(
                    f"fit.batch is {job.fit.batch}, which {trainer.world_size} devices cannot share evenly; make it a multiple."
                )
            if job.network.norm == "batch" and trainer.world_size > 1 and trainer.strategy.root_device.type != "cuda":
                raise UserError(  # PyTorch's SyncBatchNorm knows GPUs only
                    f"network.norm batch cannot be shared by {trainer.world_size} processes without GPUs; set it to instance, "
                    "or fit.devices and fit.nodes to 1."
                )
            if trainer.is_global_zero:
                if not resume:  # only now: a mask or a setting that does not do is to cost no trained model
                    _remove(folder, "metrics.csv", "metrics.json", CHECKPOINT, WEIGHTS, RUN, "finetune.json")
                    shutil.rmtree(folder / "pictures", ignore_errors=True)
                _record(job, folder, trainer, going_on)
            trainer.fit(module, datamodule=Batches(job, module), ckpt_path=str(saved) if going_on else None)
    except torch.OutOfMemoryError as e:
        raise UserError("The GPU's memory is full; make fit.batch or input.patch smaller, or set network.checkpointing.") from e
    except (MemoryError, RuntimeError) as e:  # torch's for a CPU's memory is a plain RuntimeError
        if isinstance(e, RuntimeError) and not OUT_OF_MEMORY.search(str(e)):
            raise
        raise UserError("The memory is full; make fit.batch or input.patch smaller, or set network.checkpointing.") from e
    except SystemExit as e:
        if isinstance(e.__context__, KeyboardInterrupt):  # Lightning makes it of Ctrl-C
            raise KeyboardInterrupt from e
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt
    dice = keeper.best if keeper.best > -math.inf else math.nan
    if trainer.is_global_zero:
        end = {"finished": True, "dice": None if math.isnan(dice) else dice, "dice_by_label": keeper.labels, "best_epoch": keeper.epoch}
        end |= {"epochs": trainer.current_epoch, "seconds": round(keeper.seconds, 1), "steps": trainer.global_step}
        end["late"] = keeper.late()
        _write_run(folder, {**read_run(folder), **end})
    trainer.strategy.barrier()
    return Result(load_weights(folder, job.network), dice, keeper.labels, keeper.epoch, folder)


def _trainer(job: Job, folder: Path, callbacks: Sequence[Callback]) -> L.Trainer:
    fit = job.fit.model_copy(update={"accelerator": _accelerator(job)})
    precision = precision_here(fit)
    if fit.precision not in ("auto", precision):
        _note(job, f"fit.precision {fit.precision} is for a GPU, so this CPU trains with {precision}.")
    devices, nodes = _topology(fit)
    strategy: Any = fit.strategy if devices * nodes == 1 or fit.strategy != "auto" else "ddp"
    if strategy == "ddp" and sys.platform == "win32":
        strategy = DDPStrategy(process_group_backend="gloo")  # PyTorch takes NCCL for GPUs, which Windows does not have
    patience = max(1, round(fit.patience / fit.validate_every))
    stopping = [EarlyStopping("dice", mode="max", patience=patience, check_finite=False)] if job.validator else []
    try:
        return L.Trainer(
            accelerator=fit.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[precision],  # type: ignore[arg-type]
            max_epochs=fit.epochs,
            check_val_every_n_epoch=fit.validate_every,
            accumulate_grad_batches=fit.accumulate,
            gradient_clip_val=fit.clip or None,
            deterministic="warn" if fit.deterministic else None,
            sync_batchnorm=job.network.norm == "batch" and devices * nodes > 1,
            callbacks=[*stopping, *callbacks],
            plugins=[_Checkpoints()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            limit_val_batches=1.0 if job.validator else 0,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ValueError) as e:
        why = str(e).strip().splitlines()[0].rstrip(".")[:200]
        raise UserError(
            f"This computer cannot train with fit.accelerator {fit.accelerator}, fit.devices {devices} and fit.strategy {fit.strategy} "
            f"({why}); correct them in config.yaml."
        ) from e


def _accelerator(job: Job) -> str:
    """fit.accelerator; "cpu" where "auto" would be a GPU of Apple's that computes wrong values, which is said, also in run.json."""
    asked = job.fit.accelerator
    if asked == "cpu" or not (fault := mps_fault(job.network)):
        return asked
    if asked != "auto":
        raise UserError(f"{fault}; train on the CPU (fit.accelerator: cpu), or install another version of PyTorch.")
    _note(job, f"{fault}, so the CPU trains.")
    return "cpu"


def _note(job: Job, text: str) -> None:
    """Say it now, and in run.json."""
    job.record["note"] = " ".join(filter(None, (job.record.get("note"), text)))
    print(text, file=sys.stderr)


def mps_fault(network: UNetConfig) -> str:
    """Why Apple's GPU cannot train this network, half a sentence; "" where its values and gradients are those of the CPU, or PyTorch has
    no such GPU."""
    if torch.cuda.is_available() or not torch.backends.mps.is_available():
        return ""

    def learn(device: str) -> tuple[np.ndarray, np.ndarray]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _made(network)
            x = torch.rand(1, network.in_channels, *(2 * d for d in network.divisor))
        output = model.to(device)(x.to(device))
        first = output[0] if isinstance(output, list) else output
        first.square().mean().backward()
        gradient = next(p.grad for p in model.parameters() if p.grad is not None)  # of the first layer: through all others
        return first.detach().cpu().numpy(), gradient.cpu().numpy()

    try:
        if all(map(same_values, learn("mps"), learn("cpu"))):
            return ""
        what = "gives wrong values"
    except (RuntimeError, ValueError) as e:  # NotImplementedError is one
        what = f"cannot train this network ({(str(e).splitlines() or [type(e).__name__])[0][:200]})"
    return f"PyTorch {torch.__version__} {what} on this computer's mps"


def is_first() -> bool:
    """Whether this process leads: those that Lightning starts are told only their machine and their place on it."""
    told = {k: int(os.environ.get(k) or 0) for k in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")}
    if os.environ.get("RANK"):
        return told["RANK"] == 0
    if int(os.environ.get("SLURM_NTASKS") or 1) > 1:
        return told["SLURM_PROCID"] == 0
    return told["NODE_RANK"] == told["LOCAL_RANK"] == 0


def _topology(fit: Fit) -> tuple[int, int]:
    """Devices on each machine, and machines: of torchrun or SLURM where they started us."""
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if "SLURM_NTASKS" in os.environ and int(os.environ["SLURM_NTASKS"]) > 1:
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return fit.devices, fit.nodes


def precision_here(fit: Fit) -> str:
    """ "32", "bf16" or "16": what "auto" is on this machine, and "16" on its CPU, where Lightning would take bf16 whatever that costs."""
    cuda, mps = (fit.accelerator != "cpu" and kind.is_available() for kind in (torch.cuda, torch.backends.mps))
    if fit.precision != "auto" and (fit.precision != "16" or cuda or mps):
        return fit.precision
    if cuda:
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "16"
    if mps:
        return "32"
    # avx512_bf16 or AMX multiply bf16 at twice the speed and more; elsewhere it is emulated, and slower than float32.
    return "bf16" if bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()) else "32"


_FINETUNE = "unetseg-train finetune DATA --from MODEL -o {run} --resume"


def _made_by(model: dict[str, Any], ended: bool) -> dict[str, Any]:
    """What of "model", which else may be edited, a training depends on, as its record has it, lest checkpoints of earlier versions not go
    on. Masks' last steps choose the best epoch and a click model's surroundings its lesions, but only until it has ended."""
    kept = {"model.task": model.get("task", "automatic"), "model.extent": model.get("extent", "image") != "image"}
    kept["model.surround"] = model.get("surround")
    return kept | ({} if ended else {f"model.{k}": model.get(k) or None for k in ("postprocess", "surroundings")})


def _check_identity(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    differ = sorted(k.rstrip(".") for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if "start" in before and "start" not in now:
        raise UserError(f"{folder} is a fine-tuning; go on with it by {_FINETUNE.format(run=folder.parent)}.")
    if differ:
        anew = "in another folder" if "start" in now else "with --restart or in another folder"  # finetune has no --restart
        back = "give --replay, --share and --freeze as before" if {"share", "freeze"} & {*differ} else "put them back"
        raise UserError(
            f"{folder} was trained with other settings ({', '.join(differ[:4])}{', …' if len(differ) > 4 else ''}), so it cannot go on "
            f"exactly; {back}, or start anew {anew}."
        )


def load_weights(folder: Path, network: UNetConfig) -> UNet:
    """The best averaged weights of a run, in evaluation mode on the CPU."""
    path = folder / WEIGHTS
    if not path.is_file():
        tuned = (folder / "finetune.json").exists()
        command = _FINETUNE.format(run=folder.parent) if tuned else f"unetseg-train fit {folder.parent}"
        raise UserError(f"{folder} holds no trained weights ({WEIGHTS}); train it first: {command}.")
    model = build(network)
    try:
        model.load_state_dict(load_tensors(path.read_bytes()))
    except Exception as e:  # SafetensorError, or torch's RuntimeError for other shapes
        raise UserError(f"{path} does not fit the network of its run ({str(e).splitlines()[0][:100]}); train it again.") from e
    return model.eval()


def weights_hash(folder: Path) -> str:
    """By which figures are known to be of these weights."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def load_run(folder: str | Path) -> tuple[Config, UNet]:
    """The configuration and the best network of a run's folder (RUN/fold0-seed0), as run.json has them."""
    folder = Path(folder)
    run = read_run(folder)
    if "config" not in run:
        raise UserError(f"{folder} holds no run; name the folder of a fold, such as RUN/fold0-seed0.")
    config = parse(run["config"], str(folder / RUN))
    return config, load_weights(folder, config.unet())


# ----------------------------------------------------------------------------------------------------------------- record


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json in a fold's folder holds; {} where there is none."""
    try:
        return json.loads((folder / RUN).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _write_run(folder: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    _write(folder / RUN, text.encode("utf-8"))


def _record(job: Job, folder: Path, trainer: L.Trainer, going_on: bool) -> None:
    """run.json: all that is needed to train the same again."""
    data = dict(job.record)
    kept = data.pop("data", None)
    if kept:
        data["data"] = {part: {c.name: c.digest for c in cases} for part, cases in kept.items() if cases}
    data |= {
        "seed": job.seed,
        "network": job.network.to_json(),
        "versions": versions(),
        "git_revision": git_revision(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else trainer.strategy.root_device.type,
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "started": read_run(folder).get("started") or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "resumed": read_run(folder).get("resumed", 0) + 1 if going_on else 0,
        "finished": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_run(folder, data)


def _describe(job: Job, folder: Path, done: dict[str, Any]) -> None:
    """What a package says of itself may be edited after the training; figures of another way from image to mask then go."""
    old, new = (record.get("config", {}).get("model") for record in (done, job.record))
    if old and new and old != new:
        former = {"extent": "image", **old}
        if any(former.get(k) != new[k] for k in ("tta", "postprocess", "surroundings", "second_opinion", "roi_mm", "extent", "surround")):
            _remove(folder, "metrics.csv", "metrics.json")
        _write_run(folder, {**done, "config": {**done["config"], "model": new}})


def _remove(folder: Path, *names: str) -> None:
    """What people have open, which Windows then holds, comes first, so that nothing else is gone where it stays."""
    for name in names:
        try:
            remove_file(folder / name)
        except PermissionError as e:
            raise UserError(f"{folder / name} is open in another program; close it there and start again.") from e


def versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for name in ("unet-segmentation", "torch", "lightning", "monai", "numpy", "SimpleITK", "safetensors"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            from UNetSegmentationLib import __version__

            if name == "unet-segmentation":
                out[name] = __version__
    return out


def git_revision() -> str | None:
    """The commit of the program's own checkout, with "+" where files were changed; None where there is none."""
    place = Path(__file__).resolve().parent
    if not (place.parents[1] / ".git").exists():  # installed, where git would climb to whatever repository that lies in
        return None
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
