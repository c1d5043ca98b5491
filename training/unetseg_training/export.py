"""From a trained network to a model package and its card in Markdown, with ONNX and PyTorch compared on real cases first.

    export_run(model, card, path, items, lineage=lineage(run))     package, and <name>-<version>.md beside it
    export(model, card, path, drive)                               the package alone; drive(package, engine) runs the cases

Nothing is written unless both give the same numbers. Weights are rounded to float16 before export: the package halves, the
Dice of both first models moves by less than 1e-3, and ONNX and PyTorch still run the very same numbers (in float32).
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save
from torch import nn
from UNetSegmentationLib.engines import Engine, make_engine
from UNetSegmentationLib.files import UserError, counted, write_text
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.model import ONNX, SAFETENSORS, SUFFIX, ModelPackage, check_card, listed, write_package
from UNetSegmentationLib.networks import UNet

from . import clicks
from .metrics import text as figure
from .report import dataset_hash

TOLERANCE = 1e-4  # of a logit
OPSET = 17  # runs in ONNX Runtime from 1.13, so also in 1.23, the last one for Slicer on macOS


class _StableInstanceNorm(nn.Module):
    """Instance norm whose means are taken axis by axis. ONNX Runtime sums a channel's 147,000 voxels one after the other
    in float32: hippocampus-3d's logits were off by 8e-4; summed by axes they are off by 5e-6, in the same time."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.bias: Any = norm.bias
        self.eps: Any = norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        x = x - _mean(x)
        return x * (self.weight.view(shape) / torch.sqrt(_mean(x * x) + self.eps)) + self.bias.view(shape)


def _mean(x: torch.Tensor) -> torch.Tensor:
    for axis in range(x.ndim - 1, 1, -1):
        x = x.mean(axis, keepdim=True)
    return x


def _with_stable_norms(model: UNet) -> UNet:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.InstanceNorm2d, nn.InstanceNorm3d)):
                setattr(parent, name, _StableInstanceNorm(child))
    return model


def to_onnx(model: UNet, example: torch.Tensor) -> bytes:
    """The network with free batch and spatial sizes. example: [N, C, (D,) H, W]."""
    spatial = ["height", "width"] if example.ndim == 4 else ["depth", "height", "width"]
    axes = {0: "batch", **{i + 2: n for i, n in enumerate(spatial)}}
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecation; the newer one fixes pooling sizes
        torch.onnx.export(
            _with_stable_norms(model).eval(),
            (example,),
            buffer,  # type: ignore[arg-type]
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": axes, "logits": axes},
            opset_version=OPSET,
            # Batch norms stay apart (ONNX Runtime fuses them when it loads): fused weights are no longer float16 numbers,
            # which compress to half.
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            dynamo=False,
        )
    graph = onnx.load_from_string(buffer.getvalue())
    _name(graph)
    data = graph.SerializeToString(deterministic=True)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    return data


def _name(model: onnx.ModelProto) -> None:
    """Nodes and tensors by the network's own layers, as a person reads them in Netron: encoder.0.first.0.Conv."""
    known = {value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    taken = set(known)
    names: dict[str, str] = {}

    def readable(name: str) -> str:
        parts = [p for p in re.sub(r"_output_0$", "", name).split("/") if p]
        # PyTorch writes /encoder.0/first/first.0/Conv: a part that goes on with the next one says nothing of its own.
        kept = [p for i, p in enumerate(parts) if i + 1 == len(parts) or not parts[i + 1].startswith(p + ".")]
        return ".".join(kept) or name

    for node in model.graph.node:
        node.name = readable(node.name)
        for i, name in enumerate(node.output):
            if name in known or not name:
                continue
            new = readable(name) + (f".{i}" if i else "")
            while new in taken:
                new += "_"
            taken.add(new)
            names[name] = new
    for node in model.graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
    for value in model.graph.value_info:
        value.name = names.get(value.name, value.name)


def _describe(data: bytes, card: dict[str, Any]) -> bytes:
    """What Netron shows as the model's properties."""
    model = onnx.load_from_string(data)
    model.producer_name, model.graph.name = "UNetSegmentation", card["name"]
    model.doc_string = card.get("title", "")
    spacing = " x ".join("own" if v is None else f"{v:g}" for v in card["spacing"])
    labels = ", ".join(f"{label['value']} {label['name']}" for label in card["labels"])
    facts = {"version": card["version"], "channels": ", ".join(card["channels"]), "labels": labels, "spacing (x, y, z) mm": spacing}
    onnx.helper.set_model_props(model, facts | {"licence": card["licence"]})
    return model.SerializeToString(deterministic=True)


class _Compared:
    """Runs the first engine, and keeps the largest difference to the second: in logits, and as a part of a batch's largest logit
    where that is above 1, since float32 is no finer than its numbers are large."""

    def __init__(self, first: Engine, second: Engine) -> None:
        self.first, self.second, self.worst, self.batches = first, second, 0.0, 0

    def run(self, batch: np.ndarray) -> np.ndarray:
        logits = self.first.run(batch)
        difference = float(np.abs(logits - self.second.run(batch)).max()) / max(1.0, float(np.abs(logits).max()))
        self.worst = max(self.worst, difference if math.isfinite(difference) else math.inf)
        self.batches += 1
        return logits

    def describe(self) -> str:
        return f"{self.first.describe()} against {self.second.describe()}"


def _rounded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float16 where the numbers fit: a batch norm's variance may be larger than float16 can say."""
    out = {}
    for key, value in state.items():
        if value.is_floating_point():
            if not torch.isfinite(value).all():
                raise UserError(
                    f"The network's {key} holds numbers that are not finite; export the best weights of a run that did not diverge."
                )
            half = value.half()
            value = half if torch.isfinite(half).all() else value.float()
        out[key] = value.cpu().contiguous()
    return out


def export(
    model: UNet,
    card: dict[str, Any],
    path: Path,
    drive: Callable[[ModelPackage, Engine], object],
    quiet: bool = False,
    finish: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda card, parity: card,
) -> ModelPackage:
    """Write the package, unless ONNX and PyTorch differ by more than TOLERANCE in a logit (of the largest, where that is above
    1) while drive(package, engine) runs it on real cases through the deployed path. The model keeps the rounded weights.
    finish(card, parity): the card to write. Raises UserError; what stood at `path` is then untouched."""
    state = _rounded(model.state_dict())
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    weights = save(state)
    config = model.config
    example = torch.zeros(1, config.in_channels, *(2 * d for d in config.divisor))
    card = {**card, "network": config.to_json()}
    graph = _describe(to_onnx(copy.deepcopy(model).cpu(), example), card)
    draft = ModelPackage(path, check_card({**card, "files": listed({ONNX: graph, SAFETENSORS: weights})}), graph, weights)
    pair = _Compared(make_engine(draft, "onnx", "cpu", "fp32", 0), make_engine(draft, "torch", "cpu", "fp32", 0))
    drive(draft, pair)
    if not pair.batches:
        raise UserError("No case was run, so ONNX and PyTorch were not compared and no package was written; name some real cases.")
    if pair.worst > TOLERANCE:
        raise UserError(
            f"ONNX and PyTorch differ by {pair.worst:.2g} in a logit, more than {TOLERANCE:g}; no package was written. "
            "Update onnx and torch, or train with a smaller learning rate."
        )
    parity = {"largest_difference": float(f"{pair.worst:.2g}"), "tolerance": TOLERANCE, "batches": pair.batches}
    package = write_package(path, finish(card, parity), graph, weights)
    if not quiet:
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, ONNX and PyTorch differ by {pair.worst:.1g} at most")
    return package


def export_run(
    model: UNet,
    card: dict[str, Any],
    path: str | Path,
    items: Iterable[tuple[Any, ...]],
    lineage: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    cases: int = 5,
    quiet: bool = False,
) -> ModelPackage:
    """The package of a trained network, and its card in Markdown beside it.

    path: the package's file, or a folder: then <name>-<version>.unet.zip in it. items: (name, image, truth, ...) as for
    metrics.evaluate; the first `cases` are run by both engines. lineage: see lineage(). metrics: metrics.summary() of held-out
    cases; the card keeps what compact() leaves.
    """
    path = Path(path)
    if not str(path).endswith(SUFFIX):
        if path.suffix.lower() == ".zip" and not path.is_dir():
            raise UserError(f"{path} would be no package; end its name in {SUFFIX}, or name a folder.")
        path = path / f"{card['name']}-{card['version']}{SUFFIX}"
    driven = 0  # no more of them: a case may be called by its patient, and a package is for everybody

    def drive(package: ModelPackage, engine: Engine) -> None:
        nonlocal driven
        for item in islice(items, cases):
            driven += 1
            if package.card.data["task"] == "click":
                clicks.drive(package, engine, item[1], item[2])
                continue
            predict(item[1], [package], Options(tta="none", postprocess=False), engines=[engine])

    def finish(card: dict[str, Any], parity: dict[str, Any]) -> dict[str, Any]:
        extra = {"lineage": {**(lineage or {}), "parity": {**parity, "cases": driven}}}
        return {**card, **extra, **({"metrics": compact(metrics)} if metrics else {})}

    package = export(model, card, path, drive, quiet, finish)
    write_text(card_path(package), markdown(package))
    return package


def parentage(package: ModelPackage) -> dict[str, str]:
    """What the card of a model says of the package that it was fine-tuned from."""
    digest = hashlib.sha256(package.path.read_bytes()).hexdigest()
    return {"name": package.card.name, "version": package.card.version, "sha256": digest}


def lineage(run: dict[str, Any], parent: ModelPackage | None = None, **more: Any) -> dict[str, Any]:
    """Where a model comes from, for its card: from run.json, and the package that it was fine-tuned from."""
    out: dict[str, Any] = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
    if parent is not None:
        out["parent"] = parentage(parent)
    digests = {f"{part}/{name}": d for part, cases in (run.get("data") or {}).items() for name, d in cases.items()}
    if digests:
        name = Path(str((run.get("config") or {}).get("data", {}).get("path", ""))).name
        # A replayed base's own cases are no part of this dataset, but of what makes the weights.
        out |= {"dataset": {"name": name, "sha256": dataset_hash(digests)}, "cases": len(run["data"].get("train") or digests)}
        out |= {"replayed": len(run["data"]["base"])} if run["data"].get("base") else {}
    out |= {k: run[k] for k in ("seed", "fold", "git_revision", "versions") if run.get(k) is not None}
    return out | more


# ----------------------------------------------------------------------------------------------------------- model card


def compact(facts: dict[str, Any]) -> dict[str, Any]:
    """Of metrics.summary() what a card keeps: means and intervals, no curves. "dice" is {label: mean}, as in every card."""
    kept = (
        "dice", "dice_where_present", "dice_3_clicks", "hausdorff95_mm", "surface_dice", "sensitivity", "precision", "volume_error_percent",
    )  # fmt: skip
    labels = {
        name: {k: {x: own[k][x] for x in ("mean", "low", "high", "cases")} for k in kept if k in own}
        | {k: own[k] for k in ("missed", "false")}
        for name, own in facts["labels"].items()
    }
    out = {"dice": {name: round(own["dice"]["mean"], 4) for name, own in facts["labels"].items()}, "labels": labels}
    return out | {k: facts[k] for k in ("cases", "patients", "held_out", "tolerance_mm", "command", "seed", "draws") if k in facts}


def card_path(package: ModelPackage) -> Path:
    return package.path.with_name(package.path.name.removesuffix(SUFFIX) + ".md")


def _words(text: Any) -> str:
    """Text of a card inside Markdown: no line breaks, and no marks of Markdown's or HTML's own."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def markdown(package: ModelPackage) -> str:
    """A package's card for people, from what the package itself says: so both cannot disagree."""
    card, data = package.card, package.card.data
    metrics, origin = data.get("metrics", {}), data.get("lineage", {})
    own = f"{data['pixel_mm']:g} (where the image knows its own)" if "pixel_mm" in data else "the image's own"
    spacing = " x ".join((own if i < 2 else "the image's own") if v is None else f"{v:g}" for i, v in enumerate(card.spacing))
    lines = [f"# {_words(data.get('title') or card.name)}", "", f"`{card.name}` {card.version}. Not for diagnosis.", ""]
    automatic = data["task"] == "automatic"
    how = f"segment IMAGE{'…' * (len(data['channels']) > 1)}" if automatic else "click SCAN"
    how += "" if automatic and not card.of_target else " --at R,A,S"
    lines += ["## Intended use", "", _words(data.get("intended_use") or data.get("description") or "Not stated."), ""]
    lines += [
        f"- Input: {_words(', '.join(data['channels']))}, {card.dimensions}D, spacing {spacing} mm, intensities: {card.intensity['mode']}",
        f"- Labels: {', '.join(f'{label.value} {_words(label.name)}' for label in card.labels)}",
        f"- Run it: `unetseg {how} -m {package.path.name} -o MASK.nii.gz`{'' if automatic else ', or in 3D Slicer by clicks'}",
        "",
    ]
    lines += [
        "## Data and licence",
        "",
        *(f"- {_words(d)}" for d in data.get("training_data", ["Not stated."])),
        "",
        _words(data["licence"]),
        "",
    ]
    lines += ["## Measured", "", *_measured(metrics), ""]
    lines += ["## Limits", "", *(f"- {_words(text)}" for text in _limits(data)), ""]
    lines += ["## Lineage", ""]
    lines += [f"- {_words(card.origin)}"] if card.origin else []
    lines += [f"- {counted(origin['replayed'], 'case')} of the base's own replayed, lest it forget"] if "replayed" in origin else []
    for key, text in (("parent", "SHA-256 of the package that it was fine-tuned from"), ("dataset", "SHA-256 of the training data")):
        if isinstance(origin.get(key), dict) and "sha256" in origin[key]:
            lines.append(f"- {text}: {_words(origin[key]['sha256'])}")
    known = {"seed": "seed", "fold": "fold held out", "git_revision": "program's revision"}
    lines += [f"- {text}: {_words(origin[key])}" for key, text in known.items() if key in origin]
    if "versions" in origin:
        lines.append("- made with: " + ", ".join(f"{_words(k)} {_words(v)}" for k, v in origin["versions"].items()))
    if "parity" in origin:
        parity = origin["parity"]
        lines.append(
            f"- ONNX and PyTorch differ by {parity['largest_difference']:g} in a logit (of the largest, where that is above 1) at most, "
            f"on {counted(parity.get('cases', 0), 'case')}"
        )
    lines += [f"- `{name}`: {entry['size']} bytes, SHA-256 {entry['sha256']}" for name, entry in data["files"].items()]
    return "\n".join(lines) + "\n"


def _measured(metrics: dict[str, Any]) -> list[str]:
    if not metrics:
        return ["Not measured."]
    headings = {
        "dice": "Dice",
        "dice_where_present": "Dice where present",
        "dice_3_clicks": "Dice, 3 clicks",
        "hausdorff95_mm": "HD 95 % (mm)",
        "surface_dice": "surface Dice",
        "sensitivity": "sensitivity",
        "precision": "precision",
    }
    per = metrics.get("labels") or {name: {"dice": {"mean": value}} for name, value in metrics.get("dice", {}).items()}
    columns = [k for k in headings if any(k in own for own in per.values())]
    out = ["| label | " + " | ".join(headings[k] for k in columns) + " |", "|---|" + "---|" * len(columns)]
    for name, own in per.items():
        out.append(f"| {_words(name)} | " + " | ".join(figure(own.get(k)) for k in columns) + " |")
    where = f"On {counted(metrics['cases'], 'case')}" if "cases" in metrics else "On cases"
    where += f" of {counted(metrics['patients'], 'patient')}" if "patients" in metrics else ""
    where += f" ({_words(metrics['held_out'])})" if "held_out" in metrics else " (held out)"
    note = ", through the deployed path" + ("; in brackets 95 % bootstrap intervals." if any("(" in line for line in out[2:]) else ".")
    if any("surface_dice" in own for own in per.values()):
        note += f" Surface Dice at {metrics.get('tolerance_mm', 1.0):g} mm."
    if "dice_where_present" in columns:
        note += " Dice is 1 where a case has none of a label and none was found; Dice where present leaves out the cases without it."
    out += ["", where + note]
    missed = [
        f"{_words(n)}: {own['missed']} missed, {own['false']} false" for n, own in per.items() if own.get("missed") or own.get("false")
    ]
    out += [f"Cases in which a label was missed or found where there is none: {'; '.join(missed)}."] if missed else []
    return out + ([f"Command: `{metrics['command']}`"] if "command" in metrics else [])


def _limits(data: dict[str, Any]) -> list[str]:
    """What the card says, and what follows from how the model was made."""
    out = [data["limits"]] if data.get("limits") else []
    cases = data.get("metrics", {}).get("patients") or data.get("metrics", {}).get("cases")
    if cases and cases < 30:
        out.append(f"Measured on {counted(cases, 'patient')} only: the intervals are wide, and rare findings were not seen.")
    if data.get("roi_mm"):
        out.append(f"Meant for a box of about {data['roi_mm']:g} mm about its target, not for whole images.")
    elif data.get("extent") == "box":
        out.append("Meant for a box about its target, not for whole images.")
    out.append(f"Other inputs than {', '.join(data['channels'])}, other scanners, ages and diseases than in its data: not measured.")
    return out
