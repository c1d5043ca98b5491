"""The training loop: resumable after a kill at any step, with a curve on disk.

Every step draws its batch from a generator seeded by (seed, step), so that a resumed run sees the same batches as one
that was never interrupted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from UNetSegmentationLib.networks import UNet, UNetConfig, build

Batch = Callable[[int], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    steps: int
    learning_rate: float = 1e-3
    final_rate: float = 1e-6
    warmup: int = 100
    weight_decay: float = 1e-4
    ema: float = 0.998
    save_every: int = 200
    seed: int = 20261122
    # A second phase from this step on: the rate starts again, at restart_rate, and falls over the remaining steps.
    restart_at: int | None = None
    restart_rate: float = 5e-4


def dice_ce(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice over the batch, background left out (Isensee et al. 2021). target: integer labels."""
    k = logits.shape[1]
    ce = functional.cross_entropy(logits, target)
    p = logits.softmax(1)
    truth = functional.one_hot(target, k).movedim(-1, 1).float()
    axes = (0, *range(2, logits.ndim))
    overlap, total = (p * truth).sum(axes)[1:], (p + truth).sum(axes)[1:]
    return ce + 1 - ((2 * overlap + 1) / (total + 1)).mean()


def _rate(schedule: Schedule, step: int) -> float:
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    first, last, top = schedule.warmup, schedule.restart_at or schedule.steps, schedule.learning_rate
    if step >= last:
        first, last, top = last, schedule.steps, schedule.restart_rate
    done = (step - first) / max(1, last - first)
    return schedule.final_rate + (top - schedule.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    config: UNetConfig,
    schedule: Schedule,
    batch: Batch,
    folder: Path,
    validate: Callable[[UNet], dict[str, float]] | None = None,
    loss_of: Loss = dice_ce,
) -> UNet:
    """Train, or go on from folder/checkpoint.pt; returns the network with the averaged (EMA) weights.

    batch(step) gives inputs [N, C, ...] float32 and what loss_of(logits, ...) takes, by default labels [N, ...] int64;
    each step's loss goes to folder/curve.jsonl. A batch with after(logits) is told the network's answer; its state()
    is saved with the checkpoint and given back to restore().
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(schedule.seed)
    model, average = build(config), build(config)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), schedule.learning_rate, betas=(0.9, 0.999), weight_decay=schedule.weight_decay)
    saved, curve = folder / "checkpoint.pt", folder / "curve.jsonl"
    start, lines = 0, []
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        if hasattr(batch, "restore"):
            batch.restore(state["batch"])
        lines = [line for line in curve.read_text().splitlines() if json.loads(line)["step"] <= start]
        print(f"resumed at step {start}", flush=True)
    recent: list[float] = []
    began, first = time.monotonic(), start
    model.train()
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(schedule, step)
        x, y = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        loss = loss_of(logits.float(), y)
        if not torch.isfinite(loss):
            raise SystemExit(f"The loss is not a number at step {step}; lower the learning rate or look for bad intensities.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(schedule.ema, (step + 1) / (step + 10))
            for a, b in zip(average.state_dict().values(), model.state_dict().values()):
                if a.dtype.is_floating_point:
                    a.lerp_(b, 1 - keep)
                else:
                    a.copy_(b)
        if hasattr(batch, "after"):
            batch.after(logits.detach().float())
        recent.append(float(loss.detach()))
        done = step + 1
        if done % schedule.save_every == 0 or done == schedule.steps:
            seconds = (time.monotonic() - began) / (done - first)
            row: dict[str, float] = {"step": done, "loss": round(sum(recent) / len(recent), 4), "seconds_per_step": round(seconds, 3)}
            if validate:
                average.eval()
                row.update(validate(average))
            print(row, flush=True)
            lines.append(json.dumps(row))
            recent = []
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            if hasattr(batch, "state"):
                state["batch"] = batch.state()
            torch.save(state, saved.with_suffix(".part"))
            curve.with_suffix(".part").write_text("\n".join(lines) + "\n")
            curve.with_suffix(".part").replace(curve)
            saved.with_suffix(".part").replace(saved)
    average.eval()
    return average
