"""The one file that describes a training, config.yaml: what it may hold, how it is read, and how it is written for a person.

Every setting has its meaning as a comment in the file; plan.py adds why it chose the value.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from UNetSegmentationLib.files import UserError, write_text
from UNetSegmentationLib.model import card_schema, intensity_errors, label_key, schema_errors
from UNetSegmentationLib.networks import UNetConfig

Axis = Literal["x", "y", "z"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Maps = Annotated[int, Field(ge=1, le=4096)]
Range = tuple[Positive, Positive]
Stride = Annotated[int, Field(ge=1)]
Spacing = Annotated[float, Field(ge=1e-7, allow_inf_nan=False)]  # 0.1 nm, the finest pixels of an electron microscope


def _odd(value: int) -> int:
    if value < 1 or value % 2 == 0:
        raise ValueError(f"a kernel's size is an odd number above 0, not {value}")
    return value


Kernel = Annotated[int, AfterValidator(_odd)]
Precision = Annotated[Literal["auto", "32", "bf16", "16"], BeforeValidator(lambda v: str(v) if type(v) is int else v)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def _f(default: Any, text: str, **limits: Any) -> Any:
    return Field(default, description=text, **limits)


class Data(_Strict):
    path: str = _f(..., "The dataset's folder, or its index file; $VARIABLES are filled in.", min_length=1)
    layout: str | None = _f(None, "How the dataset is laid out; null finds out.")
    patient: str | None = _f(None, "Regular expression whose first group is the patient in a case's name; null keeps the layout's.")
    only: list[str] = _f([], "Names of the labels to learn; empty learns all.")
    foreground: bool = _f(False, "Learn all labels as one.")
    channels: list[str] = _f([], "Names of the channels to read; empty reads all.")
    folds: int = _f(5, "Cross-validation folds, split by patient.", ge=2, le=50)
    fold_seed: int = _f(20261122, "Shuffles the patients before they are dealt out to the folds.", ge=0)
    cache: str | None = _f(None, "Folder of the pre-processed cases; null is `cache` beside this file.")


class LabelEntry(_Strict):
    name: str
    color: tuple[int, int, int] | None = None
    terminology: dict[str, list[str]] | None = None

    @model_validator(mode="after")
    def _fits_a_card(self) -> LabelEntry:
        """Else the package would be refused at the end of the training."""
        card = card_schema()
        item = {"value": 1, **self.model_dump(mode="json", exclude_none=True)}
        for error in schema_errors(item, card["properties"]["labels"]["items"], card, "the label"):
            raise ValueError(error)
        return self


class Input(_Strict):
    dimensions: Literal[2, 3] = _f(3, "2: slice by slice; 3: volumes.")
    axis: Literal["axial", "coronal", "sagittal", "acquired"] = _f("axial", "2D: the plane of the slices; acquired: as they were taken.")
    context_slices: int = _f(0, "2D: neighbouring slices on each side, as further channels.", ge=0, le=16)
    spacing: tuple[Spacing | None, Spacing | None, Spacing | None] = _f(
        (None, None, None), "mm along x, y, z that images are resampled to; null keeps an axis."
    )
    pixel_mm: float | None = _f(None, "2D, with null above: mm of a slice's pixels, where an image knows its own.", ge=1e-4, le=100)
    field_px: int | None = _f(
        None,
        "2D, likewise: pixels along the longer side, where an image does not and is no crop (0.85 of the patch).",
        ge=16,
        le=4096,
    )
    patch: tuple[int, ...] = _f((64, 64, 64), "Voxels that the network sees at once, array order: (z,) y, x.")
    intensity: dict[str, Any] = _f({"mode": "zscore"}, "Normalisation: none, window, zscore, percentile, ct-foreground.")
    padding: Literal["zero", "reflect"] = _f("zero", "What lies beyond an image's edge, after normalisation.")
    flip_axes: list[Axis] = _f([], "Axes along which a mirrored image is as good an example.")


class Network(_Strict):
    channels: tuple[Maps, ...] = _f((16, 32, 64, 96), "Feature maps of each level, finest first.", min_length=2)
    strides: tuple[tuple[Stride, ...], ...] = _f((), "Down-sampling between levels, one list each; empty is 2 everywhere.")
    kernels: tuple[tuple[Kernel, ...], ...] = _f((), "Kernel size of each level; empty is 3 everywhere.")
    norm: Literal["none", "batch", "instance"] = _f("instance", "Normalisation of features.")
    activation: Literal["relu", "leaky_relu"] = _f("leaky_relu", "Activation.")
    residual: bool = _f(False, "Residual blocks.")
    down: Literal["maxpool", "conv"] = _f("maxpool", "Down-sampling by pooling or by strided convolution.")
    deep_supervision: bool = _f(False, "Coarser levels learn too (not used at prediction).")
    checkpointing: bool = _f(False, "Compute activations twice instead of keeping them: about 30 % slower, far less memory.")


class Augmentation(_Strict):
    """The default is the field's recipe; a strength of 0 or a probability of 0 turns one off."""

    enabled: bool = _f(True, "false: patches as they are.")
    rotation: float = _f(15.0, "Degrees, both ways (3D: about each axis).", ge=0, le=180)
    scaling: Range = _f((0.9, 1.1), "Factors of size.")
    warp_probability: Share = _f(0.7, "How often a patch is rotated and scaled.")
    elastic_alpha: float = _f(34.0, "Elastic deformation (Simard et al. 2003): strength alpha, as in 2D slices also in 3D.", ge=0, le=2000)
    elastic_sigma: Positive = _f(10.0, "Elastic deformation: smoothness sigma, in voxels of the finest axis.")
    elastic_probability: Share = _f(0.3, "How often a patch is bent.")
    noise: float = _f(0.1, "Gaussian noise: largest standard deviation, of normalised values.", ge=0, le=10)
    noise_probability: Share = _f(0.15, "")
    blur: tuple[float, float] = _f((0.5, 1.0), "Gaussian blur: sigma in voxels, from and to.")
    blur_probability: Share = _f(0.15, "")
    brightness: float = _f(0.25, "Factor on all values, 1 minus to 1 plus this.", ge=0, lt=1)
    brightness_probability: Share = _f(0.15, "")
    contrast: float = _f(0.25, "Factor on the distance to the patch's mean, 1 minus to 1 plus this.", ge=0, lt=1)
    contrast_probability: Share = _f(0.15, "")
    gamma: Range = _f((0.7, 1.5), "Gamma curve, from and to.")
    gamma_probability: Share = _f(0.3, "")
    low_resolution: Range = _f((0.5, 1.0), "Down-sampling and back: factor, from and to.")
    low_resolution_probability: Share = _f(0.15, "")
    window_jitter: float = _f(0.1, "CT: shift of the window's level and change of its width, as a part of the width.", ge=0, lt=1)
    window_jitter_probability: Share = _f(0.3, "")

    @model_validator(mode="after")
    def _ordered(self) -> Augmentation:
        for name in ("scaling", "blur", "gamma", "low_resolution"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be two numbers, the smaller first, not [{low:g}, {high:g}]")
        if self.low_resolution[1] > 1:
            raise ValueError("low_resolution must not be above 1")
        return self


class Loss(_Strict):
    kind: Literal["ce", "dice", "dice_ce", "focal", "tversky", "boundary"] = _f(
        "dice_ce", "ce, dice, dice_ce, focal, tversky, or boundary (dice_ce plus a Hausdorff distance term)."
    )
    class_weights: Literal["none", "median-frequency"] | list[Positive] = _f(
        "none", "Of the cross-entropy or focal loss: none, median-frequency, or one number for background and each label."
    )
    focal_gamma: float = _f(2.0, "Focal: how much easy voxels are left out (Lin et al. 2017).", ge=0, le=10)
    tversky: tuple[Share, Share] = _f((0.3, 0.7), "Tversky: weights of false positives and of false negatives (Salehi et al. 2017).")
    boundary_weight: float = _f(0.1, "Boundary: weight of the distance term.", ge=0, le=100)


class Fit(_Strict):
    epochs: int = _f(100, "Epochs at most.", ge=1)
    steps: int = _f(100, "Optimizer steps an epoch.", ge=1)
    batch: int = _f(8, "Patches in a batch, over all devices.", ge=1)
    accumulate: int = _f(1, "Batches whose gradients are added up for a step.", ge=1)
    foreground: Share = _f(0.5, "Part of the patches that are centred on a label; the others lie anywhere.")
    precision: Precision = _f("auto", "auto: bf16 where this machine is fast at it, 16 on older GPUs, else 32.")
    learning_rate: Positive = _f(1e-3, "AdamW's, after the warm-up.")
    final_rate: float = _f(1e-6, "Where the cosine ends.", ge=0)
    warmup: int = _f(50, "Steps of linear warm-up.", ge=0)
    weight_decay: float = _f(1e-4, "AdamW's.", ge=0)
    betas: tuple[Decay, Decay] = _f((0.9, 0.999), "AdamW's.")
    clip: float = _f(5.0, "Largest norm of the gradient; 0 does not clip.", ge=0)
    ema: float = _f(0.998, "Decay of the averaged weights, which are what is validated and kept.", ge=0, lt=1)
    patience: int = _f(15, "Early stopping: epochs without a better validation Dice.", ge=1)
    validate_every: int = _f(1, "Epochs between validations.", ge=1)
    validate_cases: int = _f(20, "Held-out cases of a validation, each whole through predict(); 0 takes all.", ge=0)
    seed: int = _f(20261122, "Of weights, patches and augmentation; `fit --seed N` adds N.", ge=0, lt=2**31)
    deterministic: bool = _f(False, "GPU: the same numbers in each run, somewhat slower (a CPU always does).")
    minutes: float | None = _f(None, "Stop at the end of the epoch in which this much training time is used up.", gt=0)
    workers: int | None = _f(None, "Processes that make patches; null chooses.", ge=0, le=256)
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = _f("auto", "What to train on.")
    devices: int = _f(1, "Devices of this machine; torchrun and SLURM set it themselves.", ge=1)
    nodes: int = _f(1, "Machines; torchrun and SLURM set it themselves.", ge=1)
    strategy: str = _f("auto", "Lightning's strategy for several devices: ddp, fsdp, ...")

    @model_validator(mode="after")
    def _rates(self) -> Fit:
        if self.final_rate > self.learning_rate:
            raise ValueError(f"final_rate ({self.final_rate:g}) must not be above learning_rate ({self.learning_rate:g})")
        return self


class Model(_Strict):
    """What the package that is made from the run says about itself."""

    name: str = _f("my-model", "Lower-case letters, digits and dashes.", pattern="^[a-z0-9][a-z0-9-]{0,63}$")
    version: str = _f("0.1.0", "Three numbers.", max_length=40, pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")
    title: str = _f("", "For people.", max_length=200)
    description: str = _f("", "For people: what it is for, and what not.", max_length=4000)
    licence: str = _f("not stated", "Of the weights; look at the data's.", min_length=1, max_length=500)
    training_data: list[str] = _f([], "What it was trained on.")
    task: Literal["automatic", "click"] = _f(
        "automatic", "automatic, or click: the one lesion that is clicked on; every connected component of a label is one."
    )
    surroundings: Literal["lung", "any"] | None = _f(None, "click: lung: a first click must find lung around its lesion.")
    second_opinion: str | None = _f(
        None,
        "click: name-version of a 2D model of the same label; their answers are averaged.",
        pattern=r"^[a-z0-9-]+-[0-9]+\.[0-9]+\.[0-9]+$",
    )
    tta: Literal["none", "flips", "rotations", "full"] = _f("none", "Test-time augmentation when it is used.")
    surround: Literal["nearest"] | None = _f(
        None, "Of crops, to be set before a training: surroundings of one value are shown as the nearest other voxels; null: as they are."
    )
    extent: Literal["image", "content", "box"] = _f(
        "image",
        "What it is shown, to be set before a training: content: no outer planes of one value; box: of an image with a ROI only that.",
    )
    roi_mm: Positive | None = _f(None, "Meant for a box of this size about a target; null: for whole images.")
    display: str | None = _f(None, "The window preset to look at the images with, by its name.")
    postprocess: dict[str, Any] = _f({}, "largest_component, fill_holes, min_volume_mm3.")


class Config(_Strict):
    model: Model = _f(Model(), "The model package.")
    data: Data = _f(..., "The dataset.")
    labels: list[LabelEntry] = _f(..., "The labels in the order of their values 1, 2, ...", min_length=1, max_length=255)
    channels: list[str] = _f(..., "One name for each input image.", min_length=1, max_length=64)
    input: Input = _f(Input(), "What the network sees.")
    network: Network = _f(Network(), "The U-Net.")
    augmentation: Augmentation = _f(Augmentation(), "Random changes of the patches.")
    loss: Loss = _f(Loss(), "What is minimised.")
    fit: Fit = _f(Fit(), "The training.")

    @model_validator(mode="after")
    def _fits(self) -> Config:
        n = self.input.dimensions
        if len(self.input.patch) != n:
            raise ValueError(f"input.patch needs {n} numbers for {n}D, not {len(self.input.patch)}")
        for error in intensity_errors(self.input.intensity, "input.intensity"):
            raise ValueError(error)
        card = card_schema()
        for error in schema_errors(self.model.postprocess, card["properties"]["postprocess"], card, "model.postprocess"):
            raise ValueError(error)
        if self.model.task == "click" and (n != 3 or len(self.channels) != 1 or None in self.input.spacing):
            raise ValueError("a click model (model.task) is 3D, sees one image and has a spacing along each axis")
        if n == 3 and (self.input.context_slices or self.input.axis != "axial" or self.input.pixel_mm or self.input.field_px):
            raise ValueError("input.axis, input.context_slices, input.pixel_mm and input.field_px belong to 2D")
        divisor = self.unet().divisor
        if any(p < 1 or p % d for p, d in zip(self.input.patch, divisor)):
            raise ValueError(f"input.patch {list(self.input.patch)} must be multiples of the network's down-sampling {list(divisor)}")
        weights = self.loss.class_weights
        if isinstance(weights, list) and len(weights) != len(self.labels) + 1:
            raise ValueError(f"loss.class_weights needs {len(self.labels) + 1} numbers (background and each label), not {len(weights)}")
        if len({label_key(label.name) for label in self.labels}) != len(self.labels):
            raise ValueError("two labels share one name")
        return self

    def unet(self) -> UNetConfig:
        inputs = len(self.channels) * (2 * self.input.context_slices + 1)
        if self.model.task == "click":
            return UNetConfig(self.input.dimensions, inputs + 4, 2, **self.network.model_dump())
        return UNetConfig(self.input.dimensions, inputs, len(self.labels) + 1, **self.network.model_dump())

    def card_labels(self) -> list[LabelEntry]:
        """What the network's outputs are: the labels, or of a click model the one thing that any of them is."""
        if self.model.task == "automatic" or len(self.labels) == 1:
            return self.labels
        first = self.labels[0]
        codes = [label.terminology for label in self.labels]
        same = first.terminology if all(c == first.terminology for c in codes) else None
        return [LabelEntry(name=" or ".join(label.name for label in self.labels)[:200], color=first.color, terminology=same)]

    def card(self) -> dict[str, Any]:
        """A model card without "files" (write_package fills them in); "network" lets the weights be loaded."""
        model, data = self.model, self.input
        card: dict[str, Any] = {
            "format": 1,
            "name": model.name,
            "version": model.version,
            "title": model.title or model.name,
            "description": model.description,
            "task": model.task,
            "dimensions": data.dimensions,
            "channels": self.channels,
            "spacing": list(data.spacing),
            "patch": list(data.patch),
            "divisor": list(self.unet().divisor),
            "padding": data.padding,
            "intensity": data.intensity,
            "labels": [{"value": i, **label.model_dump(exclude_none=True)} for i, label in enumerate(self.card_labels(), 1)],
            "activation": "softmax",
            "flip_axes": list(data.flip_axes),
            "tta": model.tta,
            "roi_mm": model.roi_mm,
            "postprocess": model.postprocess,
            "licence": model.licence,
            "training_data": model.training_data,
            "network": self.unet().to_json(),
        }
        if model.extent != "image":
            card["extent"] = model.extent
        card |= {key: value for key in ("display", "surround", "surroundings", "second_opinion") if (value := getattr(model, key))}
        card |= {key: value for key in ("pixel_mm", "field_px") if (value := getattr(data, key))}
        if data.dimensions == 2:
            card |= {"axis": data.axis, "context_slices": data.context_slices}
        return json.loads(json.dumps(card))  # tuples become lists, as in a card that was read


def parse(data: Any, source: str = "config.yaml") -> Config:
    """A Config from what a YAML file holds; UserError with one sentence about the first thing that is wrong."""
    if not isinstance(data, Mapping):
        raise UserError(f"{source} holds no settings; make one with: unetseg-train plan DATA -o RUN.")
    try:
        return Config.model_validate(data)
    except ValidationError as e:
        raise UserError(f"{source}: {_sentence(e)}") from e
    except ValueError as e:  # UNetConfig's, about strides and kernels
        raise UserError(f"{source}: network: {e}; correct it.") from e


def _sentence(error: ValidationError) -> str:
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt name explains a missing one
    at = ".".join(
        str(p) for p in first["loc"] if not isinstance(p, str) or not p.startswith(("literal[", "list[", "function-", "constrained-"))
    )
    if first["type"] == "extra_forbidden":
        known = _settings(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."
        return f"there is no setting {at!r}; {hint}"
    if first["type"] == "missing":
        return f"the setting {at!r} is missing; add it, or plan again."
    text = first["msg"].removeprefix("Value error, ")
    if not first["loc"] or first["type"] == "value_error":
        return f"{at + ': ' if at else ''}{text}; correct it."
    return f"{at} is {first['input']!r}: {text[0].lower() + text[1:]}; correct it."


def _settings(at: tuple[int | str, ...]) -> list[str]:
    """The names of the settings in the section `at`."""
    model: type[BaseModel] = Config
    for part in at:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        args = getattr(annotation, "__args__", (annotation,))
        model = next(a for a in args if isinstance(a, type) and issubclass(a, BaseModel))
    return list(model.model_fields)


class _Loader(yaml.SafeLoader):
    """Of a section that is written twice YAML takes the last, and the first one's settings would silently be the defaults."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there for the second time", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)  # a title may be a date, or look like one


def read(path: str | Path) -> Config:
    """Read config.yaml, or the config.yaml of a run's folder."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.yaml"
    if not path.is_file():
        run = path.parent if path.suffix == ".yaml" else path
        raise UserError(f"There is no {path}; unetseg-train plan DATA -o {run} makes it.")
    try:
        data = yaml.load(path.read_bytes(), _Loader)  # in UTF-8, or UTF-16 with its mark
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # the last of 3000 brackets, the second of "!!int x"
        if isinstance(e, yaml.reader.ReaderError) and e.encoding != "unicode":
            raise UserError(f"{path} is not in UTF-8; save it as UTF-8.") from e
        place = getattr(e, "problem_mark", None)
        where = f" (line {place.line + 1}: {getattr(e, 'problem', '')})" if place else ""
        raise UserError(f"{path} is not valid YAML{where}; correct it.") from e
    return parse(data, str(path))


def to_yaml(config: Config, reasons: Mapping[str, str] | None = None) -> str:
    """The file's text: each setting after its meaning, and why it has its value. reasons: by "section.setting"."""
    reasons = reasons or {}
    lines = ["# How this model is trained. Edit what you like; unetseg-train checks it before it starts."]

    def comment(text: str, indent: str) -> None:
        lines.extend(textwrap.wrap(text, 120, initial_indent=indent + "# ", subsequent_indent=indent + "# "))

    def entry(name: str, value: Any, indent: str) -> None:
        lines.append(f"{indent}{name}: {_flow(value)}")

    data = config.model_dump(mode="json", exclude_none=False)
    for section, field in Config.model_fields.items():
        value = getattr(config, section)
        lines.append("")
        comment(field.description or section, "")
        if not isinstance(value, BaseModel):
            if why := reasons.get(section):
                comment("Why: " + why, "")
            items = [{k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item for item in data[section]]
            entry(section, items, "")
            continue
        lines.append(f"{section}:")
        for name, setting in type(value).model_fields.items():
            if setting.description:
                comment(setting.description, "  ")
            if why := reasons.get(f"{section}.{name}"):
                comment("Why: " + why, "  ")
            entry(name, data[section][name], "  ")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("...\n").strip()


def write(config: Config, path: str | Path, reasons: Mapping[str, str] | None = None) -> None:
    write_text(path, to_yaml(config, reasons))
