"""Watching a training: Lightning callbacks for the bar, TensorBoard, curve.csv and live.jsonl (see live.py).

    trainer = Trainer(callbacks=watch.callbacks(folder, config), logger=False, enable_progress_bar=False)

They read what the module logs, "dice" and "dice/<label>", and the loss that training_step returns. They draw no random
number and change nothing, so that a run is the same with and without them. Only the first process writes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from UNetSegmentationLib.files import UserError, atomic_path

from . import report
from .cases import file_name
from .live import FORMAT, Line, LiveFile

# No more than a line in this many seconds: for a plot this is smooth, and a fast network makes 100 steps a second.
STEP_SECONDS = 2.0
PICTURE_SECONDS = 60.0
RECENT = 50


def callbacks(folder: str | Path, config: Any = None, bar: bool = True, tensorboard: bool = True) -> list[Callback]:
    """What a Trainer needs to be watched: the Dice of the config's labels, or of a click model what is logged."""
    labels = [label.name for label in config.labels] if config is not None and config.model.task == "automatic" else []
    return [Watch(Path(folder), labels, bar, tensorboard)]


class Watch(Callback):
    """Collects each step and validation, and tells the bar, TensorBoard, curve.csv and live.jsonl.

    labels: the classes' names, as logged under "dice/<name>"; []: what is logged.
    A module with examples() -> [(name, image, truth (z, y, x), prediction)] also gets pictures, in
    folder/pictures and in TensorBoard.
    """

    def __init__(self, folder: Path, labels: list[str], bar: bool = True, tensorboard: bool = True) -> None:
        self.folder, self.labels, self._bar_wanted, self._board_wanted = folder, labels, bar, tensorboard
        self.live: LiveFile | None = None
        self._bar: _Bar | None = None
        self._board: Any = None
        self._losses: list[Any] = []  # tensors: reading each one's value would make a GPU wait at every step
        self._since: list[float] = []

    # ------------------------------------------------------------------------------------------------ Lightning's hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        total = trainer.estimated_stepping_batches
        self.total = int(total) if 0 < total < float("inf") else None
        self.live = LiveFile(self.folder / "live.jsonl", step)
        before = [line for line in self.live.lines if line["event"] == "validation" and line.get("dice") is not None]
        points = ({"dice": line["dice"], "step": line["step"]} for line in before)
        self.best: dict[str, Any] | None = max(points, key=lambda p: p["dice"], default=None)
        self.step, self._pictured, self._pictures = step, 0.0, []  # type: ignore[var-annotated]
        self._marks = deque([(time.monotonic(), step)], RECENT)
        self._spans: deque[float] = deque(maxlen=RECENT)
        self._last, self._written, self._fresh = time.monotonic(), time.monotonic(), True
        self.live.write("start", step=step, epoch=trainer.current_epoch, format=FORMAT, labels=self.labels, steps=self.total)
        if self._bar_wanted:
            self._bar = _Bar(step, self.total)
        if self._board_wanted:
            self._board = _writer(self.folder / "tensorboard", step)
        self._curve()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.live and self._fresh:
            self._fresh = False
            self._last = time.monotonic()  # a validation in between is no part of a step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.live:
            return
        # Lightning divides it by what is accumulated: 0.427 of 1.707 with 4.
        self._losses.append(outputs["loss"] * trainer.accumulate_grad_batches)
        if trainer.global_step == self.step:
            return  # gradients are being accumulated
        now = time.monotonic()
        self._spans.append((now - self._last) / (trainer.global_step - self.step))
        self._marks.append((now, trainer.global_step))
        self.step, self._last = trainer.global_step, now
        if now - self._written >= STEP_SECONDS or (self.total and self.step == self.total):
            self._written = now
            line = self.live.write("step", **self._now(trainer, self._settle()))
            if self._bar:
                self._bar.step(self.step, trainer.current_epoch, line["loss"])
            if self._board:
                self._board.add_scalar("loss", line["loss"] or 0, self.step)
                self._board.add_scalar("learning rate", line["learning_rate"] or 0, self.step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.live or trainer.sanity_checking:
            return
        found = {k: float(v) for k, v in trainer.callback_metrics.items()}
        names = self.labels or [k.removeprefix("dice/") for k in found if k.startswith("dice/")]
        dice = {n: found[f"dice/{n}"] for n in names if f"dice/{n}" in found}
        mean = found.get("dice", float(np.mean(list(dice.values()))) if dice else None)
        if mean is not None and np.isfinite(mean) and (self.best is None or mean > self.best["dice"]):
            self.best = {"dice": round(mean, 5), "step": trainer.global_step}
        self._draw(pl_module, trainer.global_step)
        self._settle()
        fields = {**self._now(trainer, self._since), "dice": mean, "dice_per_class": dice, "best": self.best, "pictures": self._pictures}
        line = self.live.write("validation", **fields)
        self._since, self._fresh = [], True
        self._curve()
        if self._board:
            for name, value in [("mean", line["dice"]), *line["dice_per_class"].items()]:
                if value is not None:
                    self._board.add_scalar(f"dice/{name}", value, self.step)
            self._board.flush()
        if self._bar:
            self._bar.validation(line)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        stopped = isinstance(exception, (KeyboardInterrupt, SystemExit))  # Lightning's for SIGTERM is a SystemExit
        self._end(trainer, "stopped" if stopped else "failed", "" if stopped else f"{exception or type(exception).__name__}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        message = ""
        if self.live and self.total and trainer.global_step < self.total:
            stopped = any(s.wait_count >= s.patience for s in trainer.early_stopping_callbacks)
            why = "by early stopping" if stopped else "as its time (fit.minutes) was up"
            message = f"after {trainer.current_epoch} of {trainer.max_epochs} epochs, {why}"
        self._end(trainer, "finished", message)

    def state_dict(self) -> dict[str, Any]:
        """The losses since the last validation, which may be some epochs ago."""
        return {"since": [*self._since, *map(float, self._losses)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since = state["since"]

    # ------------------------------------------------------------------------------------------------------------- lines

    def _settle(self) -> list[float]:
        """The losses since the last line of steps, which also count for the next validation."""
        losses, self._losses = [float(v) for v in self._losses], []
        self._since += losses
        return losses

    def _now(self, trainer: Trainer, losses: list[float]) -> dict[str, Any]:
        (t0, s0), (t1, s1) = self._marks[0], self._marks[-1]
        left = None
        if self.total and s1 > s0:  # with the validations in between, which the person also waits for
            left = round((self.total - self.step) * (t1 - t0) / (s1 - s0), 1)
        return {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "loss": float(np.mean(losses)) if losses else None,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None,
            "seconds_per_step": float(np.median(self._spans)) if self._spans else None,
            "seconds_left": left,
        }

    def _end(self, trainer: Trainer, reason: str, message: str) -> None:
        if not self.live:
            return
        self.live.write("end", step=trainer.global_step, epoch=trainer.current_epoch, reason=reason, message=message)
        if self._bar:
            self._bar.end()
        if self._board:
            with contextlib.suppress(OSError):  # it must not hide why the training ended
                self._board.close()
        self.live = self._bar = self._board = None

    def _curve(self) -> None:
        """curve.csv: a line a validation, for a spreadsheet; one that holds it open on Windows must not end a training."""
        assert self.live
        rows = [line for line in self.live.lines if line["event"] == "validation"]
        keys = ["step", "epoch", "loss", "learning_rate", "seconds_per_step", "dice"]
        with (
            contextlib.suppress(UserError, OSError),
            atomic_path(self.folder / "curve.csv") as path,
            path.open("w", newline="", encoding="utf-8") as f,
        ):
            names = list(dict.fromkeys([*self.labels, *(n for r in rows for n in r["dice_per_class"])]))
            writer = csv.writer(f)
            writer.writerow([*keys, *(f"dice {n}" for n in names)])
            writer.writerows([[r.get(k) for k in keys] + [r["dice_per_class"].get(n) for n in names] for r in rows])

    def _draw(self, module: LightningModule, step: int) -> None:
        show = getattr(module, "examples", None)
        if show is None or (self._pictured and time.monotonic() - self._pictured < PICTURE_SECONDS):
            return
        self._pictured, self._pictures = time.monotonic(), []
        for name, image, truth, prediction in show()[:4]:
            png = report.overlay(image, truth, prediction, title=f"{name}, step {step}")
            place = f"pictures/example-{file_name(name)}.png"
            with contextlib.suppress(UserError, OSError), atomic_path(self.folder / place) as path:
                path.write_bytes(png)
            if (self.folder / place).is_file():
                self._pictures.append(place)
            if self._board:
                from PIL import Image as Picture

                pixels = np.asarray(Picture.open(io.BytesIO(png)).convert("RGB"))
                self._board.add_image(f"examples/{name}", pixels, step, dataformats="HWC")


def _writer(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed, so nothing is written for it: pip install tensorboard", file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)  # type: ignore[no-untyped-call]


class _Bar:
    """A bar with loss, Dice and the time left in a terminal; elsewhere a line for each validation."""

    def __init__(self, step: int, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console()
        self.text = "no Dice yet"
        self.progress = None
        if console.is_terminal:
            left, right = TextColumn("epoch {task.fields[epoch]}"), TextColumn("loss {task.fields[loss]}  {task.fields[dice]}")
            self.progress = Progress(left, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), right, console=console)
            self.task = self.progress.add_task("", total=total, completed=step, epoch=1, loss="–", dice=self.text)
            self.progress.start()

    def step(self, step: int, epoch: int, loss: float | None) -> None:
        if self.progress:
            self.progress.update(self.task, completed=step, epoch=epoch + 1, loss="–" if loss is None else f"{loss:.3f}", dice=self.text)

    def validation(self, line: Line) -> None:
        dice, best = line["dice"], line["best"]
        self.text = "no Dice yet" if dice is None else f"Dice {dice:.3f} (best {best['dice']:.3f} at step {best['step']})"
        if not self.progress:
            loss = "–" if line["loss"] is None else f"{line['loss']:.3f}"
            classes = ", ".join(f"{n} {v:.3f}" for n, v in line["dice_per_class"].items() if v is not None)
            print(f"step {line['step']}  epoch {line['epoch'] + 1}  loss {loss}  {self.text}  {classes}".rstrip(), flush=True)

    def end(self) -> None:
        if self.progress:
            self.progress.stop()
