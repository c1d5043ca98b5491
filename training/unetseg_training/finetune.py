"""Going on from a package that carries its weights, for other labels, channels or spacing, without forgetting.

start = start_from(find_model("hippocampus-3d"), labels=["Tumour"], channels=["T1 MR"])
print(start.sentence)                      what was kept, what starts anew
model = build(start.network); model.load_state_dict(start.state); freeze(model, ["encoder"])
replay_set(base_cases, labels, channels)   the base model's own cases, to be mixed in: train(replay=(set, 0.25))
forgetting(base, tuned, base_cases)        Dice on the base model's own cases before and after
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from UNetSegmentationLib.dataset import plain_name
from UNetSegmentationLib.engines import Engine, choose_engine
from UNetSegmentationLib.engines.torch import load_network
from UNetSegmentationLib.files import UserError, write_text
from UNetSegmentationLib.model import Card, Label, ModelPackage, label_key
from UNetSegmentationLib.networks import UNet, UNetConfig, build

from . import metrics
from .cases import channel_places, ordered_channels, with_names
from .export import parentage

if TYPE_CHECKING:
    from .cases import CaseSet
    from .config import Config

FACTS = "finetune.json"
# Below this, so little of the base model would be left that a person had better know.
LEAST_SHARE = 0.5
# What sees the input's channels.
FIRST = ("encoder.0.first.0.weight", "encoder.0.shortcut.weight")
# A fall of the mean Dice on the base's cases below which nobody would call it forgetting.
FORGOTTEN = 0.02


@dataclass
class Start:
    """Where a fine-tuning starts. state: for build(network).load_state_dict. kept, new, partly: names of tensors; notes: what
    a person should know, a sentence each; sentence: all of it in one line."""

    state: dict[str, Tensor]
    network: UNetConfig
    kept: list[str] = field(default_factory=list)
    partly: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sentence: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"sentence": self.sentence, "kept": len(self.kept), "partly": self.partly, "new": self.new}


def start_from(
    package: ModelPackage,
    network: UNetConfig | None = None,
    labels: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    spacing: Sequence[float | None] | None = None,
    intensity: dict[str, Any] | None = None,
) -> Start:
    """The weights of a package, fitted to other labels, channels or another network; what cannot be kept starts at random.

    network: default is the package's own with the numbers of channels and labels wanted. A label or channel that the
    package knows by name keeps its weights, wherever it stands in the new order. spacing, intensity: of the new
    training, only to say what changes. Raises UserError where the package has no weights or hardly any fit.
    """
    card, name = package.card, f"{package.card.name} {package.card.version}"
    try:
        # Building a network draws random numbers: a fork, so that what comes later draws the same as without fine-tuning.
        with torch.random.fork_rng(devices=[]):
            source = load_network(package)
    except UserError as e:
        raise UserError(f"{package.path.name} cannot be trained on: {e}") from e
    assert isinstance(source, UNet)
    clicked = card.data["task"] == "click"
    labels = list(labels) if labels is not None else [label.name for label in card.labels]
    channels = list(channels) if channels is not None else list(card.data["channels"])
    extra = 4 * clicked
    per = (card.inputs - extra) // len(card.data["channels"])
    background = int(card.activation == "softmax")
    wanted = network or replace(
        source.config, in_channels=len(channels) * per + extra, out_channels=len(labels) + background, deep_supervision=False
    )
    if wanted.dimensions != card.dimensions:
        raise UserError(f"{name} is a {card.dimensions}D network and the plan asks for {wanted.dimensions}D; plan with the base's network.")
    slices, rest = divmod(wanted.in_channels - extra, len(channels))
    resliced = slices != per and card.dimensions == 2 and slices % 2 == 1
    if wanted.out_channels != len(labels) + background or rest or (slices != per and not resliced):
        raise UserError(
            f"The plan's network takes {wanted.in_channels} channels and gives {wanted.out_channels}, which does not fit {len(channels)} "
            f"images and {len(labels)} labels on {name} ({per} slices each); plan with the base's network."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {k: v.clone() for k, v in build(wanted).state_dict().items()}
    start = Start(state, wanted)
    old = source.state_dict()
    if resliced:
        for key in FIRST:
            if key in old:
                old[key] = _resliced(old[key], per, slices)
    inputs = _inputs(card, channels, slices, extra)
    rows = [0] * background + [_index(card, n) for n in labels]
    for key, target in state.items():
        value = old.get(_old_key(key, len(wanted.channels) - len(source.config.channels)))
        if value is None or value.ndim != target.ndim:
            start.new.append(key)
        elif key.startswith("heads."):
            _copy_rows(start, key, value, rows, background)
        elif key in FIRST and value.shape[2:] == target.shape[2:]:
            if len(value) != len(target):
                start.new.append(key)
            else:
                _copy_inputs(start, key, value, inputs)
        elif value.shape == target.shape:
            target.copy_(value)
            start.kept.append(key)
        else:
            start.new.append(key)
    if resliced:
        seen = "single slices" if slices == 1 else f"{slices} slices instead of {per}"
        change = "so its filters for the others are added up" if slices < per else "the new ones without influence at first"
        start.notes.append(f"{seen}, {change}")
    _tell(start, len(old), card, name, labels, channels, spacing, intensity)
    return start


def start_of(package: ModelPackage, config: Config) -> Start:
    """start_from() for a plan, with its network, labels, channels, spacing and intensity."""
    labels = [label.name for label in config.card_labels()]
    return start_from(package, config.unet(), labels, config.channels, config.input.spacing, config.input.intensity)


def named_as(cases: CaseSet, card: Card) -> CaseSet:
    """The cases with the base's names for their labels, and a note, where the dataset names none and its masks hold the base's very
    values, or both have one label, which masks mark with 255 as well: hippocampus-3d's own masks, which no file names, lost its
    classifier as "label 1" and "label 2", left-ventricle-2d's as "foreground"."""
    own = sorted(card.labels, key=lambda label: label.value)
    named = with_names(cases, [label.name for label in own])
    if named is cases or len(own) > 1 and cases.values != {label.value: number for number, label in enumerate(own, 1)}:
        return cases
    told = ", ".join(f"{label.value} for {label.name}" for label in own)
    note = (
        f"The labels have no names and are taken as {card.name}'s, {told}; name them in labels.json if they are others."
        if len(own) > 1
        else f"The label has no name and is taken as {card.name}'s {own[0].name}; name it in labels.json if it is another."
    )
    return replace(named, notes=(*cases.notes, note))


def _old_key(key: str, deeper: int) -> str:
    """The base's name of a tensor. Decoders are numbered from the deepest level, which is another one in a deeper network."""
    part, index, *rest = key.split(".")
    return ".".join([part, str(int(index) - deeper), *rest]) if part in ("ups", "decoder") else key


def _index(card: Card, label: str) -> int | None:
    """The output channel of a label by its name; of a click model that of what is clicked on, whatever it is called."""
    background = int(card.activation == "softmax")
    if card.data["task"] == "click":
        return background
    return next((i + background for i, own in enumerate(card.labels) if own.key == label_key(label)), None)


def _resliced(value: Tensor, per: int, slices: int) -> Tensor:
    """Weights (out, images * per, y, x) for other numbers of slices: a slice that goes adds its own to the outermost that
    stays (what the base gave where these were alike), one that comes has none."""
    planes, more = value.unflatten(1, (-1, per)), (slices - per) // 2
    new = functional.pad(planes, (0, 0, 0, 0, more, more))
    if more < 0:
        new[:, :, 0] += planes[:, :, :-more].sum(2)
        new[:, :, -1] += planes[:, :, more:].sum(2)
    return new.flatten(1, 2)


def _inputs(card: Card, channels: Sequence[str], per: int, extra: int) -> list[int | None]:
    """For every input plane of the new network, the base's plane; None for a new one.

    Planes are ordered as predict() stacks them: image by image, each with its slices, then the clicks.
    """
    own = card.data["channels"]
    at = channel_places(own, channels)
    if not any(a is not None for a in at) and len(channels) == len(own):
        at = list(range(len(own)))  # another scanner or sequence: filters for edges serve there too
    planes = [None if a is None else a * per + k for a in at for k in range(per)]
    return planes + [len(own) * per + k for k in range(extra)]


def _copy_rows(start: Start, key: str, value: Tensor, rows: list[int | None], background: int) -> None:
    """The classifier: a row (or bias) for each output. A new label starts at random, but with the mean bias of the others,
    so that it does not flood the first predictions."""
    target = start.state[key]
    known = [i for i, r in enumerate(rows) if r is not None]
    if value.shape[1:] != target.shape[1:] or len(known) <= background:
        start.new.append(key)  # nothing but the background is known: its row would only outvote the new labels
        return
    for i in known:
        target[i] = value[rows[i]]
    if target.ndim == 1:
        for i in {*range(len(rows))} - {*known}:
            target[i] = value[background:].mean()
    (start.kept if len(known) == len(rows) else start.partly).append(key)


def _copy_inputs(start: Start, key: str, value: Tensor, inputs: list[int | None]) -> None:
    """The first convolution. A new channel beside known ones starts at zero: the network begins as good as it was. Where no
    channel is known, each gets the mean of the base's."""
    target = start.state[key]
    known = [p for p in inputs if p is not None]
    for i, plane in enumerate(inputs):
        target[:, i] = value[:, plane] if plane is not None else (0.0 if known else value.mean(1))
    (start.kept if len(known) == len(inputs) and target.shape == value.shape else start.partly).append(key)


def _tell(
    start: Start, old: int, card: Card, name: str, labels: list[str], channels: list[str], spacing: Any, intensity: dict[str, Any] | None
) -> None:
    total = len(start.state)
    found = len(start.kept) + len(start.partly)
    if found < LEAST_SHARE * old:
        raise UserError(
            f"Of {name}'s {old} tensors only {found} fit the planned network; plan with the base's network, or train from the start."
        )
    notes = start.notes
    fresh = [n for n in labels if _index(card, n) is None]
    kept = [n for n in labels if n not in fresh]
    gone = [label.name for label in card.labels if label.key not in {label_key(n) for n in labels}]
    if gone and card.data["task"] == "click":
        notes.append(f"what is clicked on is {labels[0]} and no longer {gone.pop()}")
    if fresh:
        meant = "are meant, name them" if len(gone) > 1 else "is meant, name it"
        same = f" (if the base's {', '.join(gone)} {meant} so in the dataset)" if not kept and len(fresh) == len(gone) else ""
        notes.append(f"new label{'s' * (len(fresh) > 1)} {', '.join(fresh)}" + (f", kept {', '.join(kept)}" if kept else same))
    if gone:
        notes.append(f"no longer given: {', '.join(gone)}")
    own = card.data["channels"]
    at = channel_places(own, channels)
    more = [c for c, a in zip(channels, at) if a is None]
    if more and len(more) < len(channels):
        notes.append(f"the channel {', '.join(more)} starts without influence")
    elif more:
        notes.append(f"{', '.join(more)} {'take' if len(more) > 1 else 'takes'} the place of the base's {', '.join(own)}")
    lost = [c for i, c in enumerate(own) if i not in at]
    if lost and not (more and len(lost) == len(own)):
        notes.append(f"without the channel {', '.join(lost)}")
    if spacing is not None:
        pairs = [(a, b) for a, b in zip(card.spacing, spacing) if a and b]
        if any(abs(a - b) > 1e-3 for a, b in pairs):
            text = [" x ".join("its own" if v is None else f"{v:g}" for v in s) for s in (card.spacing, spacing)]
            factor = max(max(a / b, b / a) for a, b in pairs)
            note = f"spacing {text[1]} mm instead of {text[0]} mm"
            notes.append(note + (", so different that the network must learn sizes anew" if factor >= 2 else ""))
    if intensity is not None and intensity != card.intensity:
        notes.append("other normalisation of intensities, to which the first layers must adapt")
    at_random = sorted({n for n in start.new if not n.startswith("heads.")})
    if at_random:
        notes.append(f"at random: {', '.join(at_random[:4])}{' and others' if len(at_random) > 4 else ''}")
    start.sentence = f"From {name}: {len(start.kept)} of {total} tensors kept" + "".join(f"; {n}" for n in notes) + "."


# ------------------------------------------------------------------------------------------------------------- freezing


class _StillBatchNorm2d(nn.BatchNorm2d):
    """Keeps its running mean and variance, also while the rest trains."""

    def train(self, mode: bool = True) -> _StillBatchNorm2d:
        return super().train(False)


class _StillBatchNorm3d(nn.BatchNorm3d):
    def train(self, mode: bool = True) -> _StillBatchNorm3d:
        return super().train(False)


def freeze(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Keep layers as they are: parts of the network by name ("encoder", "encoder.0", "ups", "decoder", "heads"), or single
    tensors. Call before the optimizer is made. Returns the frozen parameters' names; UserError for a name that fits nothing
    or where nothing would be left to train."""
    frozen: list[str] = []
    for name in names:
        hit = [k for k, _ in model.named_parameters() if k == name or k.startswith(name + ".")]
        if not hit:
            parts = sorted({k.split(".")[0] for k, _ in model.named_parameters()})
            raise UserError(f"The network has no layer {name!r} to freeze; name one of {', '.join(parts)}, or e.g. {parts[0]}.0.")
        frozen += [k for k in hit if k not in frozen]
    parameters = dict(model.named_parameters())
    if len(frozen) == len(parameters):
        raise UserError("Every layer would be frozen and nothing could be learnt; leave at least the heads free.")
    for key in frozen:
        parameters[key].requires_grad_(False)
    for name, module in model.named_modules():
        own = [f"{name}.{k}" for k, _ in module.named_parameters(recurse=False)]
        if own and set(own) <= set(frozen) and isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.__class__ = _StillBatchNorm2d if isinstance(module, nn.BatchNorm2d) else _StillBatchNorm3d
            module.eval()
    return frozen


# ----------------------------------------------------------------------------------------------- replay against forgetting


def replay_set(base: CaseSet, labels: Sequence[str], channels: Sequence[str]) -> CaseSet:
    """The base model's own cases with the labels in the new training's order, for train(replay=(set, share)).

    Raises UserError where they do not show what the new training needs: a case without the annotation of a new label would
    teach that the label is nowhere.
    """
    numbers = [base.number(name) for name in labels]
    if missing := [name for name, number in zip(labels, numbers) if not number]:
        raise UserError(
            f"The base's cases ({base.source or base.layout}) are not annotated with {', '.join(missing)}, so replaying them would teach "
            "that it is nowhere; annotate it there, or go without replay and freeze the encoder."
        )
    if len(channels) != len(base.channels):
        raise UserError(
            f"The base's cases have the channels {', '.join(base.channels)} and this training {', '.join(channels)}; "
            "go without replay and freeze the encoder."
        )
    base = ordered_channels(base, channels)
    values = {value: numbers.index(number) + 1 if number in numbers else min(number, 0) for value, number in base.values.items()}
    known = {label.value: label for label in base.labels}
    return replace(base, labels=tuple(replace(known[n], value=i) for i, n in enumerate(numbers, 1)), values=values)


def forgetting(
    before: ModelPackage,
    after: ModelPackage,
    cases: Iterable[metrics.Item],
    labels: Sequence[Label] | None = None,
    engine: Engine | None = None,
    channels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Dice on the base model's own cases, of the base model and of the one made from it, over their labels that both give.

    {"before", "after", "change" (each {"mean", "low", "high", "cases"}), "cases", "labels", "forgotten", "verdict"}.
    labels, channels: what the truth's values and the images' channels are (default: as the base's card); each model gets the channels
    in its own order. Labels are the same by plain_name(), as in replay_set(). engine: runs `after`, where it is not exported yet.
    """
    own = {plain_name(label.name): label.value for label in labels or before.card.labels}
    given = own.keys() & {plain_name(label.name) for label in after.card.labels}
    shared = {key: label.name for label in before.card.labels if (key := plain_name(label.name)) in given}
    if not shared:
        text = "The two models and the base's cases share no label, so there is nothing to compare."
        return {"cases": 0, "labels": [], "verdict": text, "forgotten": None}
    last = max(own.values())
    # A label that is in no truth gets a value that is not there, and is left out.
    truths = [
        [replace(label, value=own.get(plain_name(label.name), last + label.value)) for label in m.card.labels] for m in (before, after)
    ]
    have, wanted = channels or before.card.data["channels"], [m.card.data["channels"] for m in (before, after)]
    places = [[i for i in channel_places(have, names) if i is not None] for names in wanted]
    engines = choose_engine(before), engine or choose_engine(after)
    scores: list[list[metrics.Row]] = [[], []]
    for item in cases:  # each by both models at once: twenty whole CTs would not fit the memory
        for model, runs, truth, at, rows in zip((before, after), engines, truths, places, scores):
            moved = len(at) == len(model.card.data["channels"]) and at != [*range(item.image.n_channels)]
            image = item.image.like(item.image.channels[at]) if moved else item.image
            found = metrics.evaluate(model, [item._replace(image=image)], labels=truth, surfaces=False, auc=False, engine=runs)
            rows += [{**r, "label": shared[key]} for r in found if (key := plain_name(r["label"])) in shared]
    facts = [metrics.summary(rows)["dice"] for rows in scores]
    change = metrics.difference(scores[0], scores[1])
    forgotten = change["mean"] < -FORGOTTEN and (change["high"] is None or change["high"] < 0)
    verdict = (
        "It has forgotten some of what it knew: replay more of the base's cases, freeze the encoder, or train for fewer steps."
        if forgotten
        else "It still knows what it knew."
    )
    out = {"before": facts[0], "after": facts[1], "change": change, "cases": len({r["case"] for r in scores[1]})}
    return out | {"labels": sorted(shared.values()), "forgotten": forgotten, "verdict": verdict}


def write(folder: str | Path, start: Start, package: ModelPackage, frozen: Sequence[str] = (), base: dict[str, Any] | None = None) -> None:
    """finetune.json in a run's folder (FACTS), for the report and the card: where it started, what is frozen, and forgetting()."""
    facts = {"parent": parentage(package), **start.to_json(), "frozen": list(frozen)}
    facts |= {"base": base} if base and base["labels"] else {}
    write_text(Path(folder) / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
