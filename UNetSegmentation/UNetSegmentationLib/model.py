"""Model packages: one .unet.zip with a card, an ONNX network and, to fine-tune from, safetensors; no code.

Everything in a package is verified before anything of it runs: names and sizes of the zip's entries, SHA-256 of every
file, the card against its JSON Schema, the ONNX graph (standard operators only, no external data, no functions) and the
safetensors header. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from .files import UserError, atomic_path, counted, user_path

RESOURCES = Path(__file__).parent / "resources"
CARD, ONNX, SAFETENSORS = "model.json", "model.onnx", "model.safetensors"
SUFFIX = ".unet.zip"
PACKAGES = "[!.]*" + SUFFIX  # in a folder; not macOS' ._NAME, nor what a killed process left of a new one
MAX_CARD_BYTES = 1 << 20
MAX_FILE_BYTES = 2 << 30
_MAX_NUMBER = 1e300  # in a card
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # LZMA would have errors of its own
_MAX_RATIO = 50  # of what an entry is unpacked to; trained weights shrink by a tenth

# Axis of the array (z, y, x), canonical LPS order, along which a 2D model's slices are stacked.
SLICE_AXIS = {"axial": 0, "coronal": 1, "sagittal": 2, "acquired": 0}


def label_key(name: str) -> str:
    """By which the labels of a card, a dataset and a segmentation are the same: people write them in capitals, or leave a space."""
    return name.strip().casefold()


@dataclass(frozen=True)
class Label:
    """One label of a model. color: RGB 0-255; terminology: {"category": [scheme, value, meaning], "type": ..., ...}."""

    value: int
    name: str
    color: tuple[int, int, int]
    terminology: dict[str, list[str]]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Label:
        color = tuple(data.get("color", DEFAULT_COLORS[0]))
        return cls(int(data["value"]), data["name"], color, data.get("terminology", {}))  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"value": int(self.value), "name": self.name, "color": list(self.color)}
        return out | ({"terminology": self.terminology} if self.terminology else {})

    @property
    def key(self) -> str:
        return label_key(self.name)

    def terminology_entry(self) -> str:
        """Slicer's serialised form, the value of a segment's TerminologyEntry tag."""
        if not self.terminology:
            return ""

        def code(key: str) -> str:
            return "^".join(self.terminology.get(key, ("", "", "")))

        kind = ("Segmentation category and type - DICOM master list", *map(code, ("category", "type", "type_modifier")))
        return "~".join((*kind, "Anatomic codes - DICOM master list", code("region"), code("region_modifier")))


# Distinct on grey CT and MR, colour-blind safe (Okabe and Ito), for labels whose card names no colour.
DEFAULT_COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


@dataclass(frozen=True)
class Card:
    """What a package says about its network; `data` is the JSON as it stands. Spatial tuples are in array order."""

    data: dict[str, Any]

    def __hash__(self) -> int:
        return hash((self.name, self.version))

    @property
    def name(self) -> str:
        return self.data["name"]

    @property
    def version(self) -> str:
        return self.data["version"]

    @property
    def dimensions(self) -> int:
        return self.data["dimensions"]

    @property
    def context(self) -> int:
        return self.data.get("context_slices", 0)

    @property
    def slice_axis(self) -> int:
        """Array axis (canonical z, y, x) that is iterated slice by slice; 0 for 3D models."""
        return SLICE_AXIS[self.data.get("axis", "axial")]

    @property
    def acquired(self) -> bool:
        """Whether a 2D model sees the slices as they were acquired, whichever way they lie in the body."""
        return bool(self.data.get("axis") == "acquired")

    @property
    def spacing(self) -> tuple[float | None, ...]:
        """(x, y, z) mm, LPS order; None keeps the image's, but for what pixel_mm and field_px say (see the schema)."""
        return tuple(self.data["spacing"])

    @property
    def patch(self) -> tuple[int, ...]:
        """As (z, y, x) with the slice axis first: a 2D patch has depth 1."""
        return tuple(self.data["patch"]) if self.dimensions == 3 else (1, *self.data["patch"])

    @property
    def divisor(self) -> tuple[int, ...]:
        return tuple(self.data["divisor"]) if self.dimensions == 3 else (1, *self.data["divisor"])

    @property
    def intensity(self) -> dict[str, Any]:
        return self.data["intensity"]

    @property
    def interpolation(self) -> str:
        return self.data.get("interpolation", "linear")

    @property
    def axis_order(self) -> list[int]:
        """The axes of an array (z, y, x) as the network sees them: its slices' first."""
        return [self.slice_axis, *(a for a in range(3) if a != self.slice_axis)]

    @property
    def extent(self) -> str:
        """How much of an image the model is shown: "image", "content" or "box"; see the schema."""
        return str(self.data.get("extent", "image"))

    @property
    def of_target(self) -> bool:
        """Whether it is made for a box around one target, not for whole images."""
        return bool(self.data.get("roi_mm")) or self.extent == "box"

    @property
    def activation(self) -> str:
        return self.data["activation"]

    @cached_property
    def labels(self) -> tuple[Label, ...]:
        return tuple(Label.from_json({"color": c, **item}) for c, item in zip(itertools.cycle(DEFAULT_COLORS), self.data["labels"]))

    @property
    def postprocess(self) -> dict[str, Any]:
        return self.data.get("postprocess", {})

    @property
    def origin(self) -> str:
        """A sentence about the card's lineage; "" where it has none."""
        lineage = self.data.get("lineage", {})
        parent, dataset, cases = (lineage.get(key) for key in ("parent", "dataset", "cases"))
        if isinstance(parent, dict):
            text = f"Fine-tuned from {parent['name']} {parent['version']}"
        elif parent:
            text = f"Fine-tuned from {parent}"
        else:
            text = "Trained from scratch" if dataset else ""
        if text and dataset:
            text += f" with {counted(cases, 'case')}" if cases else ""
            text += f" {'of' if cases else 'on'} {dataset['name']}" if dataset.get("name") else ""
            text += f" (revision {dataset['revision']})" if dataset.get("revision") is not None else ""
        return f"{text}{', ' + lineage['date'] if lineage.get('date') else ''}." if text else ""

    @property
    def inputs(self) -> int:
        """Channels of the network's input; a click model also gets positive and negative clicks, box and former mask."""
        return len(self.data["channels"]) * (2 * self.context + 1) + 4 * (self.data["task"] == "click")

    @property
    def outputs(self) -> int:
        """Channels of the logits: softmax has the background as class 0."""
        return len(self.labels) + (self.activation == "softmax")


# -------------------------------------------------------------------------------------------------------------- checks


@lru_cache(maxsize=1)
def card_schema() -> dict[str, Any]:
    return json.loads((RESOURCES / "schemas" / "model-card.schema.json").read_text("utf-8"))


_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def _is_type(value: Any, name: str) -> bool:
    if name == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, _TYPES[name])


def schema_errors(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None, at: str = "card") -> Iterator[str]:
    """Violations of the part of JSON Schema that our schemas use. The core has no jsonschema; a test compares both.

    Stricter than the standard where the standard is lax: 1.0 is no integer, NaN no number, and a pattern fits a whole
    string, without a line break after it.
    """
    root = root or schema
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "const" in schema and (value != schema["const"] or type(value) is not type(schema["const"])):
        yield f"{at} must be {schema['const']!r}, not {value!r}"
    if "enum" in schema and not any(value == e and type(value) is type(e) for e in schema["enum"]):
        yield f"{at} must be one of {', '.join(map(str, schema['enum']))}, not {value!r}"
    types = schema.get("type")
    if types is not None and not any(_is_type(value, t) for t in ([types] if isinstance(types, str) else types)):
        yield f"{at} must be {types if isinstance(types, str) else ' or '.join(types)}, not {type(value).__name__}"
        return
    if _is_type(value, "number"):
        if value != value or value in (float("inf"), float("-inf")):
            yield f"{at} must be a finite number"
        if "minimum" in schema and value < schema["minimum"]:
            yield f"{at} must be at least {schema['minimum']}, not {value}"
        if "maximum" in schema and value > schema["maximum"]:
            yield f"{at} must be at most {schema['maximum']}, not {value}"
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            yield f"{at} must be above {schema['exclusiveMinimum']}, not {value}"
    elif isinstance(value, str):
        if len(value) < schema.get("minLength", 0) or len(value) > schema.get("maxLength", sys.maxsize):
            yield f"{at} has {len(value)} characters, outside what is allowed"
        if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
            yield f"{at} {value!r} does not match {schema['pattern']}"
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0) or len(value) > schema.get("maxItems", sys.maxsize):
            yield f"{at} has {len(value)} items, outside what is allowed"
        for i, item in enumerate(value):
            yield from schema_errors(item, schema.get("items", {}), root, f"{at}[{i}]")
    elif isinstance(value, dict):
        known = schema.get("properties", {})
        for key in schema.get("required", ()):
            if key not in value:
                yield f"{at} lacks {key!r}"
        for key, item in value.items():
            if key in known:
                yield from schema_errors(item, known[key], root, f"{at}.{key}")
            elif schema.get("additionalProperties") is False:
                yield f"{at} has the unknown entry {key!r}"


_INTENSITY_NEEDS = {"window": ("level", "width"), "percentile": ("low", "high"), "ct-foreground": ("low", "high", "mean", "std")}


def intensity_errors(intensity: Any, at: str) -> Iterator[str]:
    """What is wrong with a card-style "intensity" entry."""
    schema = card_schema()
    errors = list(schema_errors(intensity, schema["properties"]["intensity"], schema, at))
    yield from errors
    if errors:
        return
    mode = intensity["mode"]
    missing = [k for k in _INTENSITY_NEEDS.get(mode, ()) if k not in intensity]
    if missing:
        yield f"{at} lacks {', '.join(missing)}"
    elif mode in ("percentile", "ct-foreground") and not intensity["low"] < intensity["high"]:
        yield f"{at}.low is not below high"
    elif mode == "percentile" and not 0 <= intensity["low"] < intensity["high"] <= 100:
        yield f"{at}.low and high are not percentages"


def _leaves(value: Any) -> Iterator[Any]:
    """Everything in what JSON gave but its lists and objects, and the objects' keys, however deep it lies."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        else:
            yield item


def _without_cases(card: dict[str, Any]) -> dict[str, Any]:
    """Older cards name the cases that their parity was measured on, which may be called by their patients: the number is kept."""
    lineage = card.get("lineage")
    if not (isinstance(lineage, dict) and isinstance(parity := lineage.get("parity"), dict) and isinstance(parity.get("cases"), list)):
        return card
    return {**card, "lineage": {**lineage, "parity": {**parity, "cases": len(parity["cases"])}}}


def check_card(data: Any, cure: str = "ask its author for a corrected package") -> Card:
    """A Card from JSON, or UserError with the first thing that is wrong and its cure."""

    def wrong(text: str) -> UserError:
        return UserError(f"The model's card is not valid: {text}; {cure}.")

    # Also where the schema asks for nothing: an integer of any length passes there, and then no float can be made of it.
    for leaf in _leaves(data):
        if _is_type(leaf, "number") and not abs(leaf) <= _MAX_NUMBER:
            raise wrong("it holds a number that is not finite or too large")
        if isinstance(leaf, str) and re.search("[\ud800-\udfff]", leaf):  # JSON can say it; no file, table or node can hold it
            raise wrong("it holds a text with half a character")
    for error in schema_errors(data, card_schema()):
        raise wrong(error)
    card = Card(_without_cases(data))
    for key in ("patch", "divisor"):
        if len(data[key]) != card.dimensions:
            raise wrong(f"card.{key} needs {card.dimensions} numbers")
    if any(p % d for p, d in zip(card.patch, card.divisor)):
        raise wrong(f"card.patch {data['patch']} is not a multiple of card.divisor {data['divisor']}")
    if card.dimensions == 3 and (card.context or {"axis", "pixel_mm", "field_px"} & data.keys()):
        raise wrong("axis, context_slices, pixel_mm and field_px belong to 2D models")
    for key, labels in (("value", {label.value for label in card.labels}), ("name", {label.key for label in card.labels})):
        if len(labels) != len(card.labels):
            raise wrong(f"two labels share one {key}")
    if data["task"] == "click" and not (
        card.dimensions == 3
        and len(data["channels"]) == len(card.labels) == 1
        and None not in card.spacing
        and card.activation == "softmax"
        and card.labels[0].value < 256
    ):
        raise wrong("a click model is 3D, sees one image, has a spacing along each axis and one label up to 255, with softmax")
    for error in intensity_errors(card.intensity, "card.intensity"):
        raise wrong(error)
    flips = data.get("flip_axes", ())
    if len(set(flips)) != len(flips):
        raise wrong("card.flip_axes names an axis twice")
    return card


def check_together(cards: Sequence[Card]) -> None:
    """UserError for cards of models that cannot be averaged."""
    first = cards[0]
    for card in cards[1:]:
        names = f"{first.name} and {card.name}"
        if [(v.value, v.name) for v in card.labels] != [(v.value, v.name) for v in first.labels]:
            raise UserError(f"{names} do not give the same labels, so they cannot be averaged; choose one of them.")
        one, other = (", ".join(c.data["channels"]) for c in (first, card))
        if len(first.data["channels"]) != len(card.data["channels"]) or (len(first.data["channels"]) > 1 and one.lower() != other.lower()):
            raise UserError(f"{first.name} takes {one} and {card.name} {other}; models that are averaged must take the same in one order.")
        if card.activation != first.activation:
            raise UserError(f"{names} end in different activations, so they cannot be averaged; choose one of them.")
        if card.acquired != first.acquired:
            raise UserError(f"{names} do not look at the same slices, so they cannot be averaged; choose one of them.")


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: int for varints, memoryview for bytes; ValueError if malformed."""
    i, n = 0, len(data)

    def varint() -> int:
        nonlocal i
        value = shift = 0
        while True:
            if i >= n or shift > 63:
                raise ValueError("truncated")
            byte = data[i]
            i += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while i < n:
        key = varint()
        if not 8 <= key < 1 << 32:  # protobuf cuts a tag to 32 bits, and would see another field than the check
            raise ValueError("not a tag")
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}.get(kind, -1)
        if length < 0 or i + length > n:
            raise ValueError("truncated")
        yield key >> 3, data[i : i + length]
        i += length


def check_onnx(data: bytes) -> None:
    """Refuse an ONNX model that could do anything but compute on its input.

    Reads the protobuf itself (field numbers of onnx.proto, IR version 13), so that it needs no onnx package: the graph,
    its subgraphs and their tensors. Raises UserError for custom operators, functions, and data outside the file.
    """

    def refuse(text: str) -> UserError:
        return UserError(f"The ONNX model {text}; it is refused. Ask its author for a self-contained model of standard operators.")

    if data[4:8] == b"ORTM":  # by which ONNX Runtime tells it; none of the below would look into it
        raise refuse("is in ONNX Runtime's own format")

    def tensor(message: memoryview) -> None:
        for number, value in _fields(message):
            if number == 13 or (number == 14 and value != 0):
                raise refuse("keeps its weights in another file (external data)")

    def graph(message: memoryview, depth: int) -> int:
        if depth > 8:
            raise refuse("nests its graphs too deeply")
        nodes = 0
        for number, value in _fields(message):
            if number == 1:
                nodes += 1
                node(value, depth)
            elif number == 5:
                tensor(value)
            elif number == 15:
                sparse(value)
        return nodes

    def sparse(message: memoryview) -> None:
        for number, value in _fields(message):
            if number in (1, 2):
                tensor(value)

    def node(message: memoryview, depth: int) -> None:
        op = domain = ""
        for number, value in _fields(message):
            if number == 4:
                op = str(value, "utf-8")
            elif number == 7:
                domain = str(value, "utf-8")
            elif number == 5:
                for kind, part in _fields(value):
                    if kind in (5, 10):
                        tensor(part)
                    elif kind in (6, 11):
                        graph(part, depth + 1)
                    elif kind in (22, 23):
                        sparse(part)
        if domain not in ("", "ai.onnx"):
            raise refuse(f"uses the custom operator {domain}.{op}")

    try:
        nodes, versions = 0, 0
        for number, value in _fields(memoryview(data)):
            if number == 7:
                nodes += graph(value, 0)
            elif number == 25:
                raise refuse("defines functions of its own")
            elif number == 20:
                raise refuse("carries training instructions")
            elif number == 8:
                versions += 1
                domain = next((str(v, "utf-8") for k, v in _fields(value) if k == 1), "")
                if domain not in ("", "ai.onnx"):
                    raise refuse(f"uses the custom operator set {domain}")
    except (ValueError, TypeError) as e:
        raise UserError("The ONNX model is damaged or not an ONNX file; download or export it again.") from e
    if not nodes or not versions:
        raise UserError("The ONNX model is empty or not an ONNX file; download or export it again.")


_Port = tuple[int, list[int | None] | None]


def _ports(data: bytes) -> tuple[_Port, _Port, str]:
    """The one input and the first output, as (element type, the axes' lengths), and the operator that gives the latter's values. None for
    what the model leaves open (by a name, 0 or -1)."""
    ports: dict[int, dict[str, _Port]] = {11: {}, 12: {}}
    weights, makers = set(), dict[str, tuple[str, str]]()
    try:
        for graph in (v for k, v in _fields(memoryview(data)) if k == 7):
            for kind, value in _fields(graph):
                if kind == 5:
                    weights |= {str(v, "utf-8") for k, v in _fields(value) if k == 8}
                elif kind == 1:
                    entries = dict(reversed([*_fields(value)]))  # of several inputs the first
                    taken, made, operator = (str(entries.get(k, b""), "utf-8") for k in (1, 2, 4))
                    makers[made] = operator, taken
                elif kind in ports:
                    entries = dict(_fields(value))
                    tensor = dict(_fields(dict(_fields(entries.get(2, b""))).get(1, b"")))
                    lengths = [dict(_fields(d)).get(1, 0) for k, d in _fields(tensor[2]) if k == 1] if 2 in tensor else None
                    axes = None if lengths is None else [n if 0 < n < 1 << 63 else None for n in lengths]
                    ports[kind][str(entries.get(1, b""), "utf-8")] = tensor.get(1, 0), axes
    except (ValueError, TypeError) as e:
        raise UserError("The ONNX model is damaged or not an ONNX file; download or export it again.") from e
    inputs = {name: port for name, port in ports[11].items() if name not in weights}
    if len(inputs) != 1 or not ports[12]:
        raise UserError(f"The ONNX model takes {len(inputs)} inputs and gives {len(ports[12])} outputs; export it with one of each.")
    name, port = next(iter(ports[12].items()))
    while (maker := makers.get(name, ("", "")))[0] in ("Cast", "Clip", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze"):
        del makers[name]  # or one that is made of itself would never end
        name = maker[1]
    return next(iter(inputs.values())), port, maker[0]


def check_ports(data: bytes, card: Card) -> None:
    """Refuse an ONNX model whose declared input or output is not what its card says, for no engine to stumble over.

    What the model leaves open (most axes' lengths, often the channels too) shows when it runs. So does an output's size: an
    exporter may write its example's, and no engine minds.
    """
    rank = card.dimensions + 2
    taken, given, _ = _ports(data)
    for (element, axes), does, channels in ((taken, "takes", card.inputs), (given, "gives", card.outputs)):
        if element not in (0, 1) or (axes is not None and len(axes) != rank):
            raise UserError(f"The ONNX model {does} no float32 tensor of {rank} axes, as its card says; export it again.")
        if axes is not None and axes[1] not in (None, channels):
            raise UserError(f"The ONNX model {does} {axes[1]} channels but its card says {channels}; export it again.")
        patch = card.data["patch"]
        if does == "takes" and axes is not None and any(n not in (None, p) for n, p in zip(axes[2:], patch)):
            size, wanted = (" x ".join(str(n or "any") for n in shape) for shape in (axes[2:], patch))
            raise UserError(f"The ONNX model takes patches of {size} but its card says {wanted}; export it again, with open axes.")


def read_network(data: bytes) -> tuple[int, list[int | None], int, str]:
    """Of an ONNX model without a card: the number of channels that it takes, the lengths of an image's axes (rows, columns; in 3D
    slices first; None: open), how many labels it finds, and their activation: "sigmoid" of one output, else "softmax" with the
    background. UserError where the file does not say, or is refused by check_onnx()."""
    check_onnx(data)
    (taken, size), (given, out), last = _ports(data)
    if (
        not {taken, given} <= {0, 1}
        or size is None
        or out is None
        or not 4 <= len(size) == len(out) <= 5
        or size[1] is None
        or out[1] is None
        or size[1] > card_schema()["properties"]["channels"]["maxItems"]  # an axis of the image, where channels come last
    ):
        raise UserError(
            "The ONNX model must take and give float32 with the axes batch, channels (in a fixed number), slices if it is 3D, rows "
            "and columns; export it so."
        )
    if last in ("ArgMax", "Greater", "GreaterOrEqual", "Sigmoid", "Softmax"):  # a second sigmoid would put every voxel above 0.5
        raise UserError(f"The ONNX model ends in a {last}, which is applied to what a model gives; export it without that.")
    return size[1], size[2:], max(1, out[1] - 1), "sigmoid" if out[1] == 1 else "softmax"


# Where the file leaves an image's axes open: a usual patch of 2D and of 3D networks, which five poolings halve.
_USUAL_PATCH = {2: 256, 3: 96}


def bare_card(name: str, onnx: bytes, labels: str, intensity: str, spacing: str = "", axis: str = "") -> dict[str, Any]:
    """A card for write_package() of a network that came without one, from its file and what only a person knows.

    name: what the model is to be called, such as its file's stem. labels: "A,B", in the order of the outputs after the
    background. intensity: a window preset's name, "LEVEL,WIDTH" in HU, "zscore" or "percentile" (the 1st to the 99th).
    spacing: "X,Y,Z" in mm (LPS), in 2D "X,Y", along the columns and the rows of a slice; "" leaves images as they are. axis: of
    a 2D network's slices, one of SLICE_AXIS; "" is axial. UserError with one sentence for a network or an answer that will not do.
    """
    from .intensity import expects_hu, parse_window, presets  # which loads NumPy: a list of models needs none

    channels, size, count, activation = read_network(onnx)
    dimensions = len(size)
    names = [n for n in map(str.strip, labels.split(",")) if n]
    if len(names) != count:
        raise UserError(
            f"The network finds {counted(count, 'label')} beside the background, not the {len(names)} that are named; "
            "name each, in the order of its outputs."
        )
    entries = {n: p.intensity() for n, p in presets().items()}
    entries |= {"zscore": {"mode": "zscore"}, "percentile": entries["mr-percentile"]}
    try:
        seen = entries[intensity] if intensity in entries else parse_window(intensity)
    except UserError:
        known = ", ".join(entries)
        raise UserError(f"The intensity {intensity!r} is none of {known}, nor LEVEL,WIDTH in HU; name one of these.") from None
    sizes: list[float | None] = [None] * dimensions
    if spacing.strip():
        try:
            sizes = [float(v) for v in spacing.split(",")]
        except ValueError:
            sizes = []
    if len(sizes) != dimensions:
        raise UserError(
            f"The voxel size of a {dimensions}D network is {'X,Y,Z'[: 2 * dimensions - 1]} in mm, not {spacing!r}; "
            "correct it, or leave it out for images as they are."
        )
    if axis and (dimensions == 3 or axis not in SLICE_AXIS):
        raise UserError(f"The slices of a 2D network are {', '.join(SLICE_AXIS)}, and a 3D one has none; {axis!r} does not fit this one.")
    if dimensions == 2:
        axis = axis or "axial"
        sizes.insert(2 - SLICE_AXIS[axis], None)
    patch = [n or _USUAL_PATCH[dimensions] for n in size]
    kind = "CT" if expects_hu(seen) else "Image"
    card = {
        "format": 1,
        "name": re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:64] or "model",
        "version": "1.0.0",
        "task": "automatic",
        "dimensions": dimensions,
        **({"axis": axis} if axis else {}),
        "channels": [kind] if channels == 1 else [f"{kind} {i + 1}" for i in range(channels)],
        "spacing": sizes,
        "patch": patch,
        "divisor": [math.gcd(n, 32) for n in patch],
        # A patch may be larger than the image: hippocampus-3d, bare, found 0.60 to 0.74 (Dice) of 4 crops of about 37 x 50 x 35 that
        # zeros filled to 96 x 96 x 96, and finds 0.87 to 0.90 so; in patches of 48 x 48 x 48 it finds 0.91 and 0.90 (means).
        "padding": "reflect",
        "intensity": seen,
        "labels": [{"value": i, "name": n} for i, n in enumerate(names, 1)],
        "activation": activation,
        "licence": "not stated",
    }
    check_card({**card, "files": listed({ONNX: onnx})}, "correct the answers")
    return card


def check_safetensors(data: bytes) -> None:
    """The header is JSON, and its tensors of numbers fill the file one after the other."""
    widths = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8}
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        end = 0
        ok = bool(header) and 8 + length <= len(data)
        for start, stop, entry in sorted(((*t["data_offsets"], t) for t in header.values()), key=lambda t: t[:2]):
            ok &= (
                start == end and stop - start == math.prod(entry["shape"]) * widths[entry["dtype"]] and min(entry["shape"], default=1) >= 0
            )
            end = stop
        ok &= end == len(data) - 8 - length
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        ok = False
    if not ok:
        raise UserError("The package's model.safetensors is damaged or no safetensors file; download or export it again.")


# ------------------------------------------------------------------------------------------------------------ packages


@dataclass(frozen=True, eq=False)
class ModelPackage:
    """A verified package in memory. onnx and safetensors are the files' bytes."""

    path: Path
    card: Card
    onnx: bytes
    safetensors: bytes | None

    @classmethod
    def read(cls, path: str | Path) -> ModelPackage:
        """Read and verify everything; UserError with one sentence if anything is amiss."""
        path = Path(path)
        if not os.path.isfile(path):  # False, too, for a name that is too long
            raise UserError(f"There is no model package {path}; check the name.")
        if path.suffix.lower() == ".onnx":
            made = f"unetseg model pack {path.name} --labels A,B --intensity PRESET -o {path.stem}{SUFFIX}"
            raise UserError(f"{path} is a network without its card; make a package of it by '{made}', or by Import… in Slicer.")
        try:
            files = _read_zip(path)
        except MemoryError as e:
            raise UserError(f"There is not enough memory to read {path}; close other programs, or choose a smaller model.") from e
        except PermissionError as e:
            raise UserError(f"{path} cannot be read ({e.strerror or e}); check your rights.") from e
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as e:
            raise UserError(f"{path} is damaged or not a model package ({e}); download it again.") from e
        except ValueError as e:
            raise UserError(f"{path} is refused: {e}.") from e
        try:
            data = json.loads(files[CARD].decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} has a card that is not JSON; download it again.") from e
        try:
            card = check_card(data)
            if set(files) - {CARD} != set(card.data["files"]):
                raise UserError("The package's files are not those that its card lists; download the model again.")
            for name, entry in card.data["files"].items():
                if len(files[name]) != entry["size"] or hashlib.sha256(files[name]).hexdigest() != entry["sha256"]:
                    raise UserError(f"{name} is not what the card promises (its SHA-256 differs); download the model again.")
            check_onnx(files[ONNX])
            check_ports(files[ONNX], card)
            if SAFETENSORS in files:
                check_safetensors(files[SAFETENSORS])
        except UserError as e:
            raise UserError(f"{path}: {e}") from e
        return cls(path, card, files[ONNX], files.get(SAFETENSORS))


def _read_zip(path: Path) -> dict[str, bytes]:
    """The entries of the zip, none of them written anywhere; ValueError for what a package may not hold."""
    with zipfile.ZipFile(path) as z:
        infos = z.infolist()
        for info in infos:
            name = info.filename
            if ".." in re.split(r"[/\\]", name) or name.startswith(("/", "\\")) or ":" in name:
                raise ValueError(f"its entry {name!r} climbs out of the folder")
            if name not in (CARD, ONNX, SAFETENSORS):
                raise ValueError(f"it holds {name!r}, which no model package does")
            if info.file_size > (MAX_CARD_BYTES if name == CARD else MAX_FILE_BYTES):
                raise ValueError(f"its entry {name!r} is too large")
            if info.file_size > _MAX_RATIO * info.compress_size + MAX_CARD_BYTES:
                raise ValueError(f"its entry {name!r} would grow to {info.file_size / 1e6:.0f} MB, which no weights do")
            if info.compress_type not in _COMPRESSIONS:
                raise ValueError(f"its entry {name!r} is compressed in an unusual way")
        names = [i.filename for i in infos]
        if len(set(names)) != len(names):
            raise ValueError("it holds a file twice")
        if CARD not in names or ONNX not in names:
            raise ValueError(f"it lacks {CARD if CARD not in names else ONNX}")
        out = {}
        for info in infos:
            with z.open(info) as f:
                out[info.filename] = f.read(info.file_size + 1)
            if len(out[info.filename]) != info.file_size:
                raise ValueError(f"its entry {info.filename!r} is not as long as it claims")
        return out


def listed(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """What a card's "files" says of the package's."""
    return {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}


def write_package(path: str | Path, card: dict[str, Any], onnx: bytes, safetensors: bytes | None = None) -> ModelPackage:
    """Fill in sizes and hashes, write the package, and read it back before it takes its name. The same input gives
    the same bytes."""
    path, files = user_path(path), {ONNX: onnx} | ({SAFETENSORS: safetensors} if safetensors else {})
    text = json.dumps({**_without_cases(card), "files": listed(files)}, indent=2, ensure_ascii=False)
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:
            for name, content in [(CARD, text.encode("utf-8", "surrogatepass")), *files.items()]:
                z.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED, 9)
        try:
            made = ModelPackage.read(temporary)
        except UserError as e:
            raise UserError(str(e).replace(str(temporary), str(path))) from e
    return replace(made, path=path)


def user_models_folder() -> Path:
    """Where imported packages lie; $UNETSEG_MODELS overrides the platform's data folder."""
    return user_path(os.environ.get("UNETSEG_MODELS") or user_data_folder() / "models").absolute()


def user_data_folder() -> Path:
    """This user's folder for what the program keeps: imported models, the sample."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "UNetSegmentation"


def model_files() -> list[Path]:
    """Bundled packages, then imported ones, by name."""
    return [p for folder in (RESOURCES / "models", user_models_folder()) for p in sorted(folder.glob(PACKAGES))]


def read_card(path: Path) -> Card:
    """A package's card alone, checked (0.3 ms); the rest is verified when the package is imported, and before it runs."""
    try:
        with zipfile.ZipFile(path) as package:
            if package.getinfo(CARD).file_size > MAX_CARD_BYTES:
                raise ValueError("its card is too large")
            if package.getinfo(CARD).compress_type not in _COMPRESSIONS:
                raise ValueError("its card is compressed in an unusual way")
            data = json.loads(package.read(CARD).decode("utf-8"))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, ValueError, RuntimeError, RecursionError) as e:
        raise UserError(f"{path.name} is damaged or not a model package ({e}); remove it and import it again.") from e
    return check_card(data)


_NAMED = re.compile(r"(.+)-([0-9]+\.[0-9]+\.[0-9]+)")


def named(path: Path) -> tuple[str, str]:
    """(name, version) as a package's card says it; where it has no good one, as its file's name does: no older package shall run
    in its place without a word."""
    try:
        card = read_card(path)
    except UserError:
        text = path.name.removesuffix(SUFFIX)
        parts = re.fullmatch(_NAMED.pattern + "(?:-[0-9]+)?", text)  # so is called what was imported beside another's file of its name
        return (parts[1], parts[2]) if parts else (text, "0.0.0")
    return card.name, card.version


def find_model(name: str | Path) -> ModelPackage:
    """A package by path, by name (its newest version) or by name-version, among the bundled and imported ones. That is what its
    card says, whatever its file is called; a file named neither by the one nor the other is found by its own name too."""
    text = str(name)
    if text.endswith(SUFFIX) or os.path.isfile(text):
        return ModelPackage.read(text)
    known = {p: named(p) for p in model_files()}
    matches = [p for p, (its, version) in known.items() if text in (its, f"{its}-{version}")]
    matches = matches or [p for p in known if p.name == text + SUFFIX and not _NAMED.fullmatch(text)]
    if not matches:
        names = ", ".join(sorted({its for its, _ in known.values()})) or "none"
        raise UserError(f"There is no model {text!r}; installed are: {names}. Name one of these or a {SUFFIX} file.")
    return ModelPackage.read(max(matches, key=lambda p: [int(v) for v in known[p][1].split(".")]))
