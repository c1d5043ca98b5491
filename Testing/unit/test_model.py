"""Model packages: what is refused before anything of it is used, the card's schema, finding models."""

import copy
import hashlib
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from UNetSegmentationLib.image import UserError, read_image
from UNetSegmentationLib.inference.predict import Options, predict
from UNetSegmentationLib.measure import dice
from UNetSegmentationLib.model import (
    CARD,
    MAX_CARD_BYTES,
    ONNX,
    RESOURCES,
    SAFETENSORS,
    ModelPackage,
    bare_card,
    card_schema,
    check_card,
    check_onnx,
    check_ports,
    check_safetensors,
    find_model,
    model_files,
    read_card,
    schema_errors,
    user_models_folder,
    write_package,
)
from workers import make_card, make_onnx

onnx = pytest.importorskip("onnx")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto


def tensors(entries: dict | list | None = None, payload: bytes = bytes(8)) -> bytes:
    """A safetensors file."""
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}} if entries is None else entries
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def refused(path: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        ModelPackage.read(path)
    text = str(error.value)
    assert str(path) in text and text.endswith(".") and "\n" not in text
    assert [p.name for p in path.parent.iterdir()] == [path.name], "something was extracted"


@pytest.fixture
def pack(pack, tmp_path, monkeypatch):
    """Where the packages lie is also the current folder: what is extracted shows."""
    monkeypatch.chdir(tmp_path / "pack")
    return pack


# ------------------------------------------------------------------------------------------------------------ the file


def test_a_good_package_is_read(pack):
    path = pack(safetensors=tensors())
    package = ModelPackage.read(path)
    assert package.path == path and package.card.name == "toy" and package.safetensors == tensors()
    assert hashlib.sha256(package.onnx).hexdigest() == package.card.data["files"][ONNX]["sha256"]


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no model package"):
        ModelPackage.read(tmp_path / "nowhere.unet.zip")
    with pytest.raises(UserError, match="no model package"):
        ModelPackage.read(tmp_path)
    for content in (b"", b"hello", b"PK\x03\x04" + bytes(100), b"PK\x05\x06" + bytes(18)):
        (tmp_path / "a.unet.zip").write_bytes(content)
        with pytest.raises(UserError, match="damaged or not a model package|is refused: it lacks model.json"):
            ModelPackage.read(tmp_path / "a.unet.zip")
    (tmp_path / "a.ONNX").write_bytes(b"")
    with pytest.raises(UserError, match="without its card; .*unetseg model pack a.ONNX --labels A,B --intensity PRESET -o a.unet.zip'"):
        ModelPackage.read(tmp_path / "a.ONNX")


def test_every_truncation_is_refused(pack):
    path = pack()
    content = path.read_bytes()
    for n in [*range(0, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:n])
        refused(path, "damaged or not a model package")


def test_a_package_that_one_may_not_read_is_not_called_damaged(pack, monkeypatch):
    def denied(*args):
        raise PermissionError(13, "Permission denied")

    path = pack()
    monkeypatch.setattr(zipfile, "ZipFile", denied)
    refused(path, "cannot be read .Permission denied.; check your rights")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(pack, method):
    path = pack(method=method, safetensors=tensors())
    content, good = path.read_bytes(), ModelPackage.read(path)
    for at in range(len(content)):
        broken = bytearray(content)
        broken[at] ^= 1 << at % 8
        path.write_bytes(bytes(broken))
        try:
            package = ModelPackage.read(path)
        except UserError:
            continue
        assert (package.card.data, package.onnx, package.safetensors) == (good.card.data, good.onnx, good.safetensors), at


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/evil", "\\evil", "..\\evil", "C:\\evil", "C:evil", "model.json/../x", "a\\..\\b", "..", "x:stream"],
)
def test_entries_that_climb_out_are_refused(pack, name):
    refused(pack(extra=[(name, b"x")]), "climbs out of the folder")


@pytest.mark.parametrize(
    "name", ["evil.py", "sub/", "sub/model.onnx", "MODEL.JSON", "model.onnx.data", "model.pt", ".DS_Store", "model.onnx/x"]
)
def test_entries_that_no_package_holds_are_refused(pack, name):
    refused(pack(extra=[(name, b"x")]), "which no model package does")


@pytest.mark.parametrize("name", [CARD, ONNX])
def test_a_file_that_is_there_twice_is_refused(pack, name):
    refused(pack(extra=[(name, b"x")]), "holds a file twice")


@pytest.mark.parametrize("missing", [CARD, ONNX])
def test_a_file_that_is_missing_is_refused(pack, missing):
    entries = [(CARD, json.dumps(make_card()).encode()), (ONNX, make_onnx("threshold", make_card()))]
    refused(pack([e for e in entries if e[0] != missing]), f"it lacks {missing}")


def test_files_that_the_card_does_not_list_are_refused(pack):
    def forget(card):
        card["files"].pop(SAFETENSORS)

    refused(pack(safetensors=tensors(), change_card=forget), "not those that its card lists")


def test_files_that_only_the_card_lists_are_refused(pack):
    def invent(card):
        card["files"][SAFETENSORS] = card["files"][ONNX]

    refused(pack(change_card=invent), "not those that its card lists")


@pytest.mark.parametrize(("key", "value"), [("sha256", "0" * 64), ("size", 7)])
@pytest.mark.parametrize("name", [ONNX, SAFETENSORS])
def test_a_wrong_hash_or_size_is_refused(pack, key, value, name):
    refused(
        pack(safetensors=tensors(), change_card=lambda card: card["files"][name].update({key: value})),
        f"{name} is not what the card promises",
    )


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"format": 1, "size": ' + b"9" * 5000 + b"}"],
    ids=["empty", "open", "utf-16", "deep", "long"],
)
def test_a_card_that_is_no_json_is_refused(pack, text):
    refused(pack([(CARD, text), (ONNX, make_onnx("threshold", make_card()))]), "card that is not JSON")


@pytest.mark.parametrize("text", [b"[]", b"null", b"3", b'"x"', b"{}"])
def test_a_card_that_is_no_card_is_refused(pack, text):
    refused(pack([(CARD, text), (ONNX, make_onnx("threshold", make_card()))]), "card is not valid")


def test_a_card_as_large_as_a_book_is_refused_unread(pack):
    refused(pack([(CARD, b" " * (MAX_CARD_BYTES + 1)), (ONNX, b"x")]), "'model.json' is too large")


def patched(path: Path, name: str, offset: int, value: bytes) -> Path:
    """Change a field of an entry in the central directory."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    while content[at + 46 : at + 46 + len(name)] != name.encode():
        at = content.index(b"PK\x01\x02", at + 4)
    content[at + offset : at + offset + len(value)] = value
    path.write_bytes(bytes(content))
    return path


def test_an_entry_that_claims_gigabytes_is_refused_unread(pack):
    refused(patched(pack(), ONNX, 24, struct.pack("<I", (2 << 30) + 1)), "'model.onnx' is too large")


def test_an_entry_that_grows_a_thousandfold_is_refused_unread(pack):
    entries = [(CARD, b"{}"), (ONNX, make_onnx("threshold", make_card())), (SAFETENSORS, bytes(100 << 20))]
    refused(pack(entries, method=zipfile.ZIP_DEFLATED), "would grow to 105 MB, which no weights do")


def test_an_entry_that_is_longer_than_it_claims_is_refused(pack):
    refused(patched(pack(), ONNX, 24, struct.pack("<I", 100)), "damaged or not a model package|not as long as it claims")


def test_encrypted_and_unusually_compressed_entries_are_refused(pack):
    refused(patched(pack(), ONNX, 8, b"\x01\x00"), "damaged or not a model package")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused(pack(method=method), "compressed in an unusual way")


# ------------------------------------------------------------------------------------------------------------ the card

FULL = {
    "format": 1,
    "name": "toy",
    "version": "1.0.0",
    "title": "A toy",
    "description": "of a model",
    "intended_use": "tests",
    "limits": "it is a toy",
    "task": "automatic",
    "dimensions": 2,
    "axis": "coronal",
    "context_slices": 2,
    "channels": ["FLAIR", "T1"],
    "spacing": [1.5, None, 3],
    "patch": [16, 32],
    "divisor": [4, 8],
    "interpolation": "bspline",
    "intensity": {"mode": "ct-foreground", "level": 1, "width": 2.5, "low": -3, "high": 4, "mean": 0.5, "std": 6, "nonzero": True},
    "labels": [
        {"value": 1, "name": "a", "color": [1, 2, 3], "terminology": {"category": ["SCT", "1", "x"], "type": ["SCT", "2", "y"]}},
        {"value": 300, "name": "b"},
    ],
    "activation": "sigmoid",
    "flip_axes": ["x", "z"],
    "tta": "flips",
    "roi_mm": 60,
    "surroundings": "lung",
    "second_opinion": "lung-nodule-2d-1.2.1",
    "display": "lung",
    "postprocess": {"largest_component": True, "fill_holes": False, "min_volume_mm3": 0},
    "licence": "Apache-2.0",
    "training_data": ["LIDC-IDRI"],
    "metrics": {"dice": {"a": 0.8}},
    "network": {"levels": 3},
    "lineage": {
        "parent": {"name": "toy", "version": "0.9.0", "sha256": "0" * 64},
        "dataset": {"name": "set", "revision": 4, "sha256": "1" * 64},
        "date": "2026-11-22",
        "cases": 3,
        "versions": {},
        "note": 1,
    },
    "files": {ONNX: {"sha256": "0" * 64, "size": 3}, SAFETENSORS: {"sha256": "f" * 64, "size": 1}},
}
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    0.5,
    -7.25,
    10**9,
    10**30,
    "",
    "x",
    "1.0.0",
    "lung",
    "x" * 5000,
    [],
    [1],
    ["x"],
    [None] * 2000,
    {},
    {"x": 1},
]


def places(value, at=()):
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def changed(at, change):
    """A copy of FULL in which `change` was applied to the container of the place, with its last key."""
    card = copy.deepcopy(FULL)
    inner = card
    for key in at[:-1]:
        inner = inner[key]
    change(inner, at[-1])
    return card


def mutations():
    yield "nothing", FULL
    for value in VALUES:
        yield f"the card is {value!r:.20}", value
    for at in places(FULL):
        if at:
            yield f"without {at}", changed(at, lambda inner, key: inner.pop(key))
            for value in VALUES:
                yield f"{at} is {value!r:.20}", changed(at, lambda inner, key, value=value: inner.__setitem__(key, value))
            yield f"{at} is doubled", changed(at, lambda inner, key: isinstance(inner, list) and inner.append(inner[key]))
        yield f"more in {at}", changed((*at, "surplus"), lambda inner, key: isinstance(inner, dict) and inner.__setitem__(key, 1))
    for key in ("name", "version"):
        for text in (
            "a",
            "A",
            "a b",
            "-a",
            "a" * 64,
            "a" * 65,
            "../a",
            "a/b",
            "1.2",
            "1.2.3.4",
            "01.2.3",
            "1.2.x",
            "1.2.3-rc",
            " 1.2.3",
            "ä",
        ):
            yield f"{key} is {text}", {**FULL, key: text}


def test_the_schema_check_agrees_with_jsonschema():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(card_schema())
    reference = jsonschema.Draft202012Validator(card_schema())
    seen = {True: 0, False: 0}
    differ = []
    for what, card in mutations():
        want, got = reference.is_valid(card), next(schema_errors(card, card_schema()), None)
        seen[want] += 1
        if want != (got is None):
            differ.append((what, want, got))
    assert differ == []
    assert seen[True] > 100 and seen[False] > 1000


def test_the_schema_uses_only_what_the_check_knows():
    known = {"type", "const", "enum", "minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "pattern"}
    known |= {"minItems", "maxItems", "items", "properties", "required", "additionalProperties", "$ref", "description"}

    def look(schema):
        assert set(schema) <= known, set(schema) - known
        assert schema.get("additionalProperties", False) is False
        for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
            look(inner)

    root = card_schema()
    look({k: v for k, v in root.items() if k not in ("$schema", "title", "$defs")})
    for inner in root["$defs"].values():
        look(inner)


@pytest.mark.parametrize(
    "change",
    [{"dimensions": 3.0}, {"format": 1.0}, {"patch": [16.0, 32]}, {"roi_mm": float("nan")}, {"name": "toy\n"}, {"version": "1.0.0\n"}],
    ids=str,
)
def test_the_schema_check_is_stricter_than_the_standard_in_three_things(change):
    assert next(schema_errors({**FULL, **change}, card_schema()), None)


def test_a_full_card_is_valid():
    assert check_card(FULL).labels[1].value == 300


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"patch": [16, 16]}, "card.patch needs 3 numbers"),
        ({"dimensions": 2, "patch": [16, 16]}, "card.divisor needs 2 numbers"),
        ({"patch": [16, 16, 18]}, "not a multiple of card.divisor"),
        ({"spacing": [1e300, 1, 1]}, "must be at most 100"),  # it was an OverflowError when the model ran
        ({"axis": "axial"}, "belong to 2D models"),
        ({"context_slices": 1}, "belong to 2D models"),
        ({"pixel_mm": 1.3}, "belong to 2D models"),
        ({"labels": [{"value": 1, "name": "a"}, {"value": 1, "name": "b"}]}, "share one value"),
        ({"labels": [{"value": 1, "name": "a"}, {"value": 2, "name": "A "}]}, "share one name"),  # by which --reference finds them
        ({"version": "1" * 40 + ".0.0"}, "card.version has 44 characters"),  # of a file's name
        # What no click session runs: tracebacks and wrong masks.
        *(
            ({"task": "click", **change}, "a click model is 3D, sees one image")
            for change in (
                {"dimensions": 2, "divisor": [4, 4]},
                {"channels": ["CT", "PET"]},
                {"spacing": [1, None, 1]},
                {"labels": [{"value": 1, "name": "a"}, {"value": 2, "name": "b"}]},
                {"labels": [{"value": 256, "name": "a"}]},
                {"activation": "sigmoid"},
            )
        ),
        ({"intensity": {"mode": "window", "level": 3}}, "lacks width"),
        ({"intensity": {"mode": "window", "level": 1e39, "width": 3}}, "must be at most"),
        # In a .seg.nrrd a line break would end the field, and what Slicer puts between a terminology's parts would add some.
        *(({"labels": [{"value": 1, "name": name}]}, "does not match") for name in ("a\nSegment0_Name:=b", "a\x00b", "\x1b[31m", "  ")),
        *(
            (
                {"labels": [{"value": 1, "name": "a", "terminology": {"category": ["S", "1", text], "type": ["S", "1", "x"]}}]},
                "does not match",
            )
            for text in ("a|b", "a~b", "a^b", "a\nb")
        ),
        ({"intensity": {"mode": "percentile", "low": 3}}, "lacks high"),
        ({"intensity": {"mode": "ct-foreground", "low": 3, "high": 4, "mean": 0}}, "lacks std"),
        ({"intensity": {"mode": "percentile", "low": 99, "high": 1}}, "low is not below high"),
        ({"intensity": {"mode": "percentile", "low": -1, "high": 99}}, "not percentages"),
        ({"intensity": {"mode": "percentile", "low": 1, "high": 199}}, "not percentages"),
        ({"intensity": {"mode": "ct-foreground", "low": 3, "high": 3, "mean": 0, "std": 1}}, "low is not below high"),
        ({"flip_axes": ["x", "x"]}, "names an axis twice"),
    ],
)
def test_cards_that_contradict_themselves_are_refused(make_package, change, sentence):
    with pytest.raises(UserError, match=sentence):
        make_package(**{"divisor": [4, 4, 4], **change})


@pytest.mark.parametrize("number", [10**401, -(10**401), 1e301, float("nan"), float("inf")], ids=lambda n: str(n)[:6])
@pytest.mark.parametrize(
    "change", [lambda n: {"metrics": {"dice": {"thing": n}}}, lambda n: {"network": {"a": [{"b": n}]}}, lambda n: {"roi_mm": n}]
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(change, number):
    assert check_card({**FULL, **change(3)})
    with pytest.raises(UserError, match="not finite or too large; ask its author"):
        check_card({**FULL, **change(number)})


@pytest.mark.parametrize("change", [{"title": "\ud800"}, {"labels": [{"value": 1, "name": "a\udfff"}]}, {"metrics": {"\ud800": 1}}])
def test_text_that_no_file_can_hold_is_refused(pack, tmp_path, change):
    with pytest.raises(UserError, match="half a character; ask its author"):
        ModelPackage.read(pack(change_card=lambda card: card.update(change)))
    with pytest.raises(UserError, match="half a character"):
        write_package(tmp_path / "a.unet.zip", make_card(**change), make_onnx("threshold", make_card()))
    assert not list(tmp_path.glob("*.zip"))


def test_the_cards_tuples_are_in_array_order(make_package):
    card = make_package(dimensions=2, axis="sagittal", patch=[16, 32], divisor=[4, 8], context_slices=2, channels=["a", "b"]).card
    assert card.patch == (1, 16, 32) and card.divisor == (1, 4, 8) and card.slice_axis == 2
    assert card.inputs == 10 and card.outputs == 2 and card.context == 2
    card = make_package(kind="identity", activation="sigmoid", labels=[{"value": v, "name": str(v)} for v in (3, 5)]).card
    assert card.outputs == 2 and card.patch == (16, 16, 16) and card.spacing == (None, None, None)
    assert len({label.color for label in card.labels}) == 2


def test_terminology_is_serialised_as_slicer_does(make_package):
    codes = {"category": ["SCT", "49755003", "Morphologically Abnormal Structure"], "type": ["SCT", "27925004", "Nodule"]}
    (label,) = make_package(labels=[{"value": 1, "name": "n", "terminology": {**codes, "region": ["SCT", "39607008", "Lung"]}}]).card.labels
    assert label.terminology_entry() == (
        "Segmentation category and type - DICOM master list~SCT^49755003^Morphologically Abnormal Structure~SCT^27925004^Nodule~^^"
        "~Anatomic codes - DICOM master list~SCT^39607008^Lung~^^"
    )
    assert make_package().card.labels[0].terminology_entry() == ""


# ------------------------------------------------------------------------------------------------------------ the ONNX


def model(nodes=None, initializers=(), sparse=(), opsets=(("", 17),)):
    nodes = [helper.make_node("Relu", ["x"], ["y"])] if nodes is None else nodes
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 1, "H", "W"]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], list(initializers), sparse_initializer=list(sparse))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in opsets], ir_version=8)


def branch(*nodes, initializers=()):
    return helper.make_graph(list(nodes), "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], list(initializers))


def conditional(inner):
    plain = branch(helper.make_node("Identity", ["x"], ["y"]))
    return helper.make_node("If", ["c"], ["y"], then_branch=plain, else_branch=inner)


def external(name="w", location=True, entries=True):
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), name)
    if entries:
        tensor.external_data.add(key="location", value="/etc/passwd")
    if location:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    return tensor


def sparse_external():
    indices = numpy_helper.from_array(np.arange(4), "i")
    return helper.make_sparse_tensor(external("v"), indices, [8])


CUSTOM = helper.make_node("Shell", ["x"], ["y"], domain="com.evil")
FUNCTION = helper.make_function("", "Mine", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 17)])


def nested(depth):
    graph = branch(helper.make_node("Identity", ["x"], ["y"]))
    for _ in range(depth):
        graph = branch(conditional(graph))
    return model([conditional(graph)])


def with_functions():
    m = model()
    m.functions.append(FUNCTION)
    return m


def with_training():
    m = model()
    m.training_info.add()
    return m


BAD_MODELS = {
    "a custom operator": (model([CUSTOM]), "custom operator com.evil.Shell"),
    "a custom operator in a subgraph": (model([conditional(branch(CUSTOM))]), "custom operator com.evil.Shell"),
    "a custom operator in a loop": (model([helper.make_node("Loop", ["n", "c"], ["y"], body=branch(CUSTOM))]), "com.evil.Shell"),
    "a list of graphs": (model([helper.make_node("Relu", ["x"], ["y"], bodies=[branch(CUSTOM)])]), "com.evil.Shell"),
    "a custom operator set": (model(opsets=(("", 17), ("com.evil", 1))), "custom operator set com.evil"),
    "onnxruntime's own operators": (model([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")]), "com.microsoft.Gelu"),
    "external weights": (model(initializers=[external()]), "another file"),
    "only the location of external weights": (model(initializers=[external(location=False)]), "another file"),
    "only the flag of external weights": (model(initializers=[external(entries=False)]), "another file"),
    "external weights in a subgraph": (
        model([conditional(branch(helper.make_node("Identity", ["w"], ["y"]), initializers=[external()]))]),
        "another file",
    ),
    "an external constant": (model([helper.make_node("Constant", [], ["y"], value=external())]), "another file"),
    "a list of external tensors": (model([helper.make_node("Relu", ["x"], ["y"], values=[external()])]), "another file"),
    "an external sparse constant": (model([helper.make_node("Constant", [], ["y"], sparse_value=sparse_external())]), "another file"),
    "external sparse weights": (model(sparse=[sparse_external()]), "another file"),
    "functions": (with_functions(), "functions of its own"),
    "training instructions": (with_training(), "training instructions"),
    "graphs in graphs in graphs": (nested(12), "nests its graphs too deeply"),
    "no nodes": (model([]), "is empty"),
    "no operator set": (model(opsets=()), "is empty"),
    "nothing": (onnx.ModelProto(), "is empty"),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_onnx_models_that_could_do_harm_are_refused(pack, what):
    content, sentence = BAD_MODELS[what][0].SerializeToString(), BAD_MODELS[what][1]
    with pytest.raises(UserError, match=sentence):
        check_onnx(content)
    refused(pack(onnx=content or b"\0"), f"{sentence}|damaged or not an ONNX file")


def varint(value):
    out = []
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def hidden_external(bit):
    """A model with external weights, whose tags have one bit more than ONNX Runtime's protobuf reads: it cuts that off."""
    tensor = external()

    def field(number, content, bit=0):
        return varint((number << 3 | 2) + bit) + varint(len(content)) + content

    entry = tensor.external_data[0].SerializeToString()
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    weights = tensor.SerializeToString() + field(13, entry, bit) + varint((14 << 3) + bit) + b"\x01"
    plain = model()
    graph = plain.graph.SerializeToString() + field(5, weights)
    plain.ClearField("graph")
    return plain.SerializeToString() + field(7, graph)


def test_a_tag_that_protobuf_reads_otherwise_is_refused():
    with pytest.raises(UserError, match="another file"):
        check_onnx(hidden_external(0))
    for look in (check_onnx, lambda data: check_ports(data, check_card(FULL))):
        with pytest.raises(UserError, match="damaged or not an ONNX file"):
            look(hidden_external(1 << 32))


def test_onnx_runtimes_own_format_is_refused():
    # An ONNX file that is one of ONNX Runtime's too: a producer's name with a length of three bytes before "ORTM".
    producer = b"ORTM" + b"A" * 60
    content = b"\x12" + bytes([len(producer) | 0x80, 0x80, 0]) + producer + model().SerializeToString()
    assert onnx.load_from_string(content).graph.node
    with pytest.raises(UserError, match="ONNX Runtime's own format"):
        check_onnx(content)


def test_ordinary_onnx_models_are_accepted():
    check_onnx(model().SerializeToString())
    check_onnx(model(opsets=(("ai.onnx", 17),)).SerializeToString())
    check_onnx(nested(3).SerializeToString())
    check_onnx(model(initializers=[numpy_helper.from_array(np.zeros(4, np.float32), "w")]).SerializeToString())
    for kind in ("threshold", "identity"):
        check_onnx(make_onnx(kind, make_card()))


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0" * 64, b"\xff" * 64, bytes(range(256)), b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"]
)
def test_garbage_is_no_onnx_model(content):
    with pytest.raises(UserError, match="not an ONNX file"):
        check_onnx(content)


def test_every_truncated_onnx_model_is_refused():
    content = make_onnx("threshold", make_card())
    for n in range(len(content)):
        with pytest.raises(UserError):
            check_onnx(content[:n])


def test_no_flipped_byte_makes_the_onnx_check_fail_otherwise():
    content = model([conditional(branch(CUSTOM))], [external()], [sparse_external()]).SerializeToString()
    for at in range(len(content)):
        for value in (0, 0x7F, 0xFF, content[at] ^ 1, content[at] ^ 4):
            try:
                check_onnx(content[:at] + bytes([value]) + content[at + 1 :])
            except UserError:
                pass


def ported(inputs=(("x", 1, ["N", 1, "D", "H", "W"]),), outputs=(("y", 1, ["N", 2, "D", "H", "W"]),), weights=()):
    ends = [[helper.make_tensor_value_info(*port) for port in ports] for ports in (inputs, outputs)]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", *ends, [numpy_helper.from_array(np.zeros(4), w) for w in weights]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()


IMAGE = ("x", 1, ["N", 1, "D", "H", "W"])


@pytest.mark.parametrize(
    "ports",
    [
        {},
        {"inputs": [("x", 1, [1, 1, 16, 16, 16])]},
        {"outputs": [("y", 1, ["N", 2, 8, 8, 8])]},  # an example's, which engines take no notice of
        {"inputs": [("x", 1, None)], "outputs": [("y", 1, None)]},
        {"inputs": [("x", 1, ["N", "C", "D", "H", "W"])], "outputs": [("y", 1, ["N", None, "D", "H", "W"])]},
        {"inputs": [("x", 1, [-1, -1, -1, 16, 0])], "outputs": [("y", 1, [-1] * 5)]},  # open, as older exporters write it
        {"inputs": [IMAGE, ("w", 11, [4])], "weights": ["w"]},
        {"outputs": [("y", 1, ["N", 2, "D", "H", "W"]), ("deep", 1, ["N", 2, "D", "H", "W"])]},
    ],
    ids=str,
)
def test_networks_that_fit_their_card_are_accepted(pack, ports):
    ModelPackage.read(pack(onnx=ported(**ports)))


@pytest.mark.parametrize(
    ("ports", "sentence"),
    [
        ({"inputs": [("x", 1, ["N", 3, "D", "H", "W"])]}, "takes 3 channels but its card says 1"),
        ({"inputs": [("x", 1, ["N", 1, "D", 16, 32])]}, "takes patches of any x 16 x 32 but its card says 16 x 16 x 16"),
        ({"inputs": [("x", 1, ["N", 1, "H", "W"])]}, "takes no float32 tensor of 5 axes"),
        ({"inputs": [("x", 10, ["N", 1, "D", "H", "W"])]}, "takes no float32 tensor of 5 axes"),
        ({"inputs": [IMAGE, ("w", 1, [4])]}, "takes 2 inputs and gives 1 outputs"),
        ({"inputs": []}, "takes 0 inputs"),
        ({"outputs": []}, "gives 0 outputs"),
        ({"outputs": [("y", 1, ["N", 1, "D", "H", "W"])]}, "gives 1 channels but its card says 2"),
        ({"outputs": [("y", 7, ["N", 2, "D", "H", "W"])]}, "gives no float32 tensor"),
        ({"outputs": [("y", 1, ["N", 2])]}, "gives no float32 tensor"),
    ],
    ids=str,
)
def test_networks_that_do_not_fit_their_card_are_refused(pack, ports, sentence):
    refused(pack(onnx=ported(**ports)), sentence)


def test_no_flipped_byte_makes_the_ports_check_fail_otherwise(make_package):
    content, card = ported(weights=["w"]), make_package().card
    for at in range(len(content)):
        for value in (0, 0x7F, 0xFF, content[at] ^ 1, content[at] ^ 4):
            try:
                check_ports(content[:at] + bytes([value]) + content[at + 1 :], card)
            except UserError:
                pass


# --------------------------------------------------------------------------------------------------- a network alone


def alone(channels=1, size=("D", "H", "W"), outputs=3, op="Relu", type=1):
    """An ONNX model that takes and gives such tensors. op: its operators, one after the other."""
    ends = [[helper.make_tensor_value_info(n, type, ["N", k, *size])] for n, k in (("x", channels), ("y", outputs))]
    ops = op.split()
    names = ["x", *ops[:-1], "y"]
    nodes = [helper.make_node(o, [a], [b]) for o, a, b in zip(ops, names, names[1:])]
    graph = helper.make_graph(nodes, "g", *ends)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()


@pytest.mark.parametrize(
    ("network", "answers", "expected"),
    [
        (
            {},
            ("liver, tumour", "abdomen"),
            {"dimensions": 3, "channels": ["CT"], "spacing": [None] * 3, "patch": [96] * 3, "activation": "softmax"}
            | {"intensity": {"mode": "window", "level": 50, "width": 400}},
        ),
        ({"size": (40, "H", 56)}, ("A,B", "zscore", "0.8,0.8,2"), {"patch": [40, 96, 56], "divisor": [8, 32, 8], "spacing": [0.8, 0.8, 2]}),
        ({"size": (512, 512)}, ("A,B", "zscore", "0.7,0.8"), {"axis": "axial", "spacing": [0.7, 0.8, None], "patch": [512, 512]}),
        ({"size": "HW"}, ("A,B", "zscore", "1,2", "coronal"), {"axis": "coronal", "spacing": [1, None, 2], "patch": [256, 256]}),
        ({"size": "HW"}, ("A,B", "zscore", "1,2", "sagittal"), {"axis": "sagittal", "spacing": [None, 1, 2]}),
        ({"channels": 3, "size": "HW"}, ("A,B", "percentile", "", "acquired"), {"channels": ["Image 1", "Image 2", "Image 3"]}),
        ({"outputs": 1}, ("A", "-100,300"), {"activation": "sigmoid", "intensity": {"mode": "window", "level": -100, "width": 300}}),
        ({"outputs": 2}, ("A", "mr-percentile"), {"activation": "softmax", "intensity": {"mode": "percentile", "low": 1, "high": 99}}),
    ],
    ids=str,
)
def test_a_bare_network_and_three_answers_make_a_package(tmp_path, network, answers, expected):
    onnx = alone(**network)
    card = write_package(tmp_path / "a.unet.zip", bare_card("My Net_v2 (best)", onnx, *answers), onnx).card
    assert card.name == "my-net-v2-best" and [label.name for label in card.labels] == [n.strip() for n in answers[0].split(",")]
    assert {**card.data, **expected} == card.data


@pytest.mark.parametrize(
    ("network", "answers", "sentence"),
    [
        ({}, ("A", "lung"), "finds 2 labels beside the background, not the 1 that are named"),
        ({"outputs": 1}, ("background,A", "lung"), "finds 1 label beside"),
        ({}, ("A,a ", "lung"), "two labels share one name; correct the answers"),
        ({}, ("A,B", "CT"), "intensity 'CT' is none of ct-lung-field, .*, zscore, percentile, nor LEVEL,WIDTH in HU"),
        ({}, ("A,B", "lung", "1,1"), "voxel size of a 3D network is X,Y,Z in mm, not '1,1'"),
        ({"size": "HW"}, ("A,B", "lung", "1;1"), "voxel size of a 2D network is X,Y in mm, not '1;1'"),
        ({}, ("A,B", "lung", "1,1,0"), r"spacing\[2\] must be at least 0.0001, not 0.0; correct the answers"),
        ({}, ("A,B", "lung", "1,1,nan"), "not finite or too large; correct the answers"),
        ({}, ("A,B", "lung", "", "axial"), "a 3D one has none; 'axial' does not fit"),
        ({"size": "HW"}, ("A,B", "lung", "", "z"), "are axial, coronal, sagittal, acquired, .* 'z' does not fit"),
        ({"op": "Softmax"}, ("A,B", "lung"), "ends in a Softmax"),
        ({"op": "Sigmoid", "outputs": 1}, ("A", "lung"), "ends in a Sigmoid"),
        ({"op": "Sigmoid Identity Squeeze", "outputs": 1}, ("A", "lung"), "ends in a Sigmoid"),
        ({"channels": 256, "size": (256, 1)}, ("A,B", "lung"), "must take and give float32 with the axes batch, channels"),
        ({"channels": "C"}, ("A,B", "lung"), "channels .in a fixed number."),
        ({"outputs": "K"}, ("A,B", "lung"), "channels .in a fixed number."),
        ({"type": 7}, ("A,B", "lung"), "must take and give float32"),
        ({"size": "W"}, ("A,B", "lung"), "slices if it is 3D, rows and columns"),
    ],
    ids=str,
)
def test_wrong_answers_and_networks_that_do_not_say_are_one_sentence(network, answers, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        bare_card("net", alone(**network), *answers)
    assert str(error.value).endswith(".") and "\n" not in str(error.value) and "author" not in str(error.value)


def test_a_bare_network_segments_a_real_image(tmp_path, data):
    """The bundled hippocampus network without its card, on a crop that is smaller than the patch of a network with open axes."""
    model = find_model("hippocampus-3d")
    card = bare_card("hippocampus", model.onnx, ",".join(label.name for label in model.card.labels), "zscore", "1,1,1")
    bare = write_package(tmp_path / "hippocampus.unet.zip", card, model.onnx)
    name = "hippocampus_007.nii.gz"
    image, truth = (read_image(data / "msd_hippocampus" / folder / name) for folder in ("images", "labels"))
    found = predict(image, [bare], Options(engine="onnx")).labels.array
    scores = [dice(found == label.value, truth.array == label.value) for label in bare.card.labels]
    assert min(scores) > 0.75, scores  # 0.91 and 0.84; with zeros around it 0.65 and 0.77


# ----------------------------------------------------------------------------------------------------- the safetensors


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_TENSORS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": struct.pack("<Q", 10**9),
    "a header beyond the end": struct.pack("<Q", 2**63) + b"{}",
    "no JSON": struct.pack("<Q", 5) + b"hello",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a list": tensors([]),
    "no tensors": tensors({}, b""),
    "metadata alone": tensors({"__metadata__": {"a": "b"}}, b""),
    "an entry that is no object": tensors({"w": 3}),
    "objects": tensors({"w": entry("PICKLE")}),
    "no shape": tensors({"w": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "an offset beyond the end": tensors({"w": entry(offsets=(0, 16), shape=(4,))}),
    "a negative offset": tensors({"w": entry(offsets=(-8, 0))}),
    "swapped offsets": tensors({"w": entry(offsets=(8, 0))}),
    "one offset": tensors({"w": entry(offsets=(0,))}),
    "words as offsets": tensors({"w": entry(offsets=("0", "8"))}),
    "a shape of another size": tensors({"w": entry(shape=(3,))}),
    "a negative shape": tensors({"w": entry(shape=(-2, -1))}),
    "overlapping tensors": tensors({"w": entry(), "v": entry(offsets=(4, 12))}, bytes(12)),
    "a gap": tensors({"w": entry(), "v": entry(offsets=(12, 20))}, bytes(20)),
    "a rest": tensors({"w": entry()}, bytes(9)),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_damaged_safetensors_are_refused(pack, what):
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        check_safetensors(BAD_TENSORS[what])
    if BAD_TENSORS[what]:
        refused(pack(safetensors=BAD_TENSORS[what]), "model.safetensors is damaged")


def test_what_the_safetensors_library_writes_is_accepted():
    library = pytest.importorskip("safetensors.numpy")
    arrays = {
        "a.weight": np.zeros((3, 2), np.float32),
        "b": np.ones(5, np.float16),
        "step": np.array(3),
        "none": np.zeros((0, 4), np.float32),
    }
    content = library.save(arrays, {"format": "pt"})
    check_safetensors(content)
    for n in range(len(content)):
        with pytest.raises(UserError):
            check_safetensors(content[:n])


def test_a_pickle_is_never_loaded(pack, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    content = pickle.dumps(Bomb())
    refused(pack(safetensors=content), "model.safetensors is damaged")
    refused(pack(onnx=content), "not an ONNX file")
    path = pack()
    path.write_bytes(content)
    refused(path, "not a model package")
    assert not (tmp_path / "exploded").exists()


# -------------------------------------------------------------------------------------------------------------- writing


def test_the_same_input_gives_the_same_bytes(tmp_path):
    network = make_onnx("identity", make_card())
    first = write_package(tmp_path / "a.unet.zip", make_card(), network, tensors())
    second = write_package(tmp_path / "sub" / "b.unet.zip", make_card(), network, tensors())
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.onnx == network and first.safetensors == tensors()
    again = write_package(tmp_path / "c.unet.zip", first.card.data, first.onnx, first.safetensors)
    assert again.path.read_bytes() == first.path.read_bytes()


def test_the_cases_that_an_older_card_names_are_counted(tmp_path):
    """They may be called by their patients: neither what is read says them nor what is made of it."""
    parity = {"largest_difference": 1e-6, "cases": ["SCHMIDT_EVA_19610704", "case 2"]}
    card = make_card(lineage={"date": "2026-11-22", "parity": parity})
    kept = {"date": "2026-11-22", "parity": {"largest_difference": 1e-6, "cases": 2}}
    with zipfile.ZipFile(write_package(tmp_path / "a.unet.zip", card, make_onnx("identity", card)).path) as z:
        written = json.loads(z.read(CARD))
    assert written["lineage"] == kept and card["lineage"]["parity"] is parity
    assert check_card({**written, "lineage": card["lineage"]}).data == written


@pytest.mark.parametrize(
    ("change", "network", "sentence"),
    [({"licence": ...}, None, "lacks 'licence'"), ({}, b"hello", "not an ONNX file"), ({"roi_mm": float("nan")}, None, "not finite")],
)
def test_a_bad_package_is_not_written(tmp_path, change, network, sentence):
    path = tmp_path / "toy.unet.zip"
    with pytest.raises(UserError, match=sentence) as error:
        write_package(path, make_card(**change), network or make_onnx("identity", make_card()))
    assert str(error.value).startswith(f"{path}: ") and list(tmp_path.iterdir()) == []
    write_package(path, make_card(), make_onnx("identity", make_card()))
    before = path.read_bytes()
    with pytest.raises(UserError, match=sentence):
        write_package(path, make_card(**change), network or make_onnx("identity", make_card()))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------------------------- finding


@pytest.fixture
def library(models_folder):
    for name, version in (("toy", "1.9.0"), ("toy", "1.10.0"), ("toy", "0.99.99"), ("toy-2d", "2.0.0"), ("other", "1.0.0")):
        card = make_card(name=name, version=version)
        write_package(models_folder / f"{name}-{version}.unet.zip", card, make_onnx("threshold", card))
    return models_folder


def test_the_tests_do_not_touch_the_users_models(models_folder):
    assert user_models_folder() == models_folder and not models_folder.exists()
    assert all(models_folder not in p.parents for p in model_files())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("toy", "toy-1.10.0"),
        ("toy-1.9.0", "toy-1.9.0"),
        ("toy-2d", "toy-2d-2.0.0"),
        ("other", "other-1.0.0"),
        ("toy-0.99.99", "toy-0.99.99"),
    ],
)
def test_models_are_found_by_name_and_version_and_the_newest_wins(library, name, found):
    package = find_model(name)
    assert package.path == library / f"{found}.unet.zip" and f"{package.card.name}-{package.card.version}" == found


def test_models_are_found_by_path(library, tmp_path, monkeypatch):
    assert find_model(library / "other-1.0.0.unet.zip").card.name == "other"
    monkeypatch.chdir(library)
    assert find_model("toy-1.9.0.unet.zip").card.version == "1.9.0"
    (library / "toy-1.9.0.unet.zip").rename(tmp_path / "renamed")
    assert find_model(str(tmp_path / "renamed")).card.version == "1.9.0"


@pytest.mark.parametrize("name", ["nothing", "toy-9.9.9", "toy-", "", "1.0.0", "../toy", "TOY"])
def test_an_unknown_name_lists_the_known(library, name):
    with pytest.raises(UserError, match=r"There is no model .*installed are: .*other, toy, toy-2d"):
        find_model(name)


def test_a_package_with_a_name_of_its_own_is_found_by_it(library):
    (library / "other-1.0.0.unet.zip").rename(library / "my best.unet.zip")
    assert find_model("my best").card.name == "other"
    with pytest.raises(UserError, match="click, other, toy"):
        find_model("nothing")


def test_the_card_says_what_a_package_is_called(library):
    (library / "other-1.0.0.unet.zip").rename(library / "toy-3.0.0.unet.zip")
    assert find_model("toy").card.version == "1.10.0"
    assert find_model("other").path == find_model("other-1.0.0").path == library / "toy-3.0.0.unet.zip"
    with pytest.raises(UserError, match="no model 'toy-3.0.0'"):
        find_model("toy-3.0.0")
    (library / "toy-2.0.0.unet.zip").write_bytes(b"cut off")
    for name in ("toy", "toy-2.0.0"):  # an older one is not taken without a word
        with pytest.raises(UserError, match="toy-2.0.0.unet.zip is damaged"):
            find_model(name)


def test_a_damaged_card_in_any_compression_hides_no_other_model(library):
    path = library / "other-1.0.0.unet.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as z:
        z.writestr(CARD, "{}" * 500)
    content = bytearray(path.read_bytes())
    content[45:53] = b"\xff" * 8
    path.write_bytes(content)
    assert find_model("toy").card.version == "1.10.0"
    with pytest.raises(UserError, match="other-1.0.0.unet.zip is damaged"):
        read_card(path)


def test_hidden_files_are_no_models(library):
    good = (library / "other-1.0.0.unet.zip").read_bytes()
    for name, content in (("._toy-9.0.0.unet.zip", b"of macOS"), (".unetseg-1a2b3c4d-r-1.0.0.unet.zip", good)):
        (library / name).write_bytes(content)
    assert find_model("toy").card.version == "1.10.0" and not [p for p in model_files() if p.name.startswith(".")]


def test_bundled_packages_are_good_and_small():
    bundled = sorted((RESOURCES / "models").glob("*"))
    assert bundled, "no model is bundled"
    for path in bundled:
        package = ModelPackage.read(path)
        assert path.name == f"{package.card.name}-{package.card.version}.unet.zip"
        assert path.stat().st_size <= 15e6
        assert package.card.data["training_data"] and package.card.data["metrics"]["dice"]


@pytest.mark.parametrize(
    "lineage, told",
    [
        (FULL["lineage"], "Fine-tuned from toy 0.9.0 with 3 cases of set (revision 4), 2026-11-22."),
        ({"parent": "toy-0.9.0", "date": "2026-11-22"}, "Fine-tuned from toy-0.9.0, 2026-11-22."),
        ({"dataset": {"name": "set", "revision": None, "sha256": "1" * 64}}, "Trained from scratch on set."),
        ({"date": "2026-11-22", "note": 1}, ""),
        ({}, ""),
    ],
)
def test_a_cards_origin_in_a_sentence(lineage, told):
    files = {ONNX: {"sha256": "0" * 64, "size": 3}}
    assert check_card({**make_card(), "lineage": lineage, "files": files}).origin == told
