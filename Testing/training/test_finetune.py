"""Going on from a package: what is kept for other labels, channels and spacing; freezing; replay; the guard against forgetting."""

import copy
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("monai", reason="MONAI is not installed")
from safetensors.torch import save  # noqa: E402
from unetseg_training import finetune, metrics, report  # noqa: E402
from unetseg_training.cases import IGNORE, find_cases  # noqa: E402
from UNetSegmentationLib.dataset import Dataset  # noqa: E402
from UNetSegmentationLib.engines.torch import load_network  # noqa: E402
from UNetSegmentationLib.files import UserError  # noqa: E402
from UNetSegmentationLib.image import Image, write_image  # noqa: E402
from UNetSegmentationLib.model import Label, find_model, write_package  # noqa: E402
from UNetSegmentationLib.networks import UNetConfig, build  # noqa: E402
from workers import make_card, make_onnx  # noqa: E402

LABELS = [{"value": 1, "name": "Liver"}, {"value": 2, "name": "Tumour"}]


@pytest.fixture
def base(tmp_path):
    """make(**card and network changes) -> a package whose weights are random."""

    def make(channels=("T1", "FLAIR"), labels=LABELS, **network):
        torch.manual_seed(0)
        config = UNetConfig(dimensions=3, in_channels=len(channels), out_channels=len(labels) + 1, channels=(4, 8, 12), **network)
        model = build(config)
        card = make_card(channels=list(channels), labels=labels, spacing=[1.0, 1.0, 2.0], network=config.to_json(), patch=[16, 16, 16])
        return write_package(tmp_path / "base.unet.zip", card, make_onnx("threshold", card), save(model.state_dict()))

    return make


def test_same_labels_and_channels_give_the_same_network(base):
    package = base()
    start = finetune.start_from(package)
    model = build(start.network)
    model.load_state_dict(start.state)
    x = torch.randn(1, 2, 16, 16, 16)
    assert torch.equal(model.eval()(x), load_network(package)(x))
    assert not start.new and not start.partly and f"{len(start.state)} of {len(start.state)} tensors kept." in start.sentence


def test_labels_keep_their_weights_by_name_in_another_order(base):
    package = base()
    old = load_network(package)
    start = finetune.start_from(package, labels=["Vessel", "tumour"], spacing=(1.0, 1.0, 1.0))
    model = build(start.network)
    model.load_state_dict(start.state)
    x = torch.randn(1, 2, 16, 16, 16)
    logits, before = model.eval()(x), old(x)
    assert torch.allclose(logits[:, 0], before[:, 0]) and torch.allclose(logits[:, 2], before[:, 2])  # background, tumour
    assert not torch.allclose(logits[:, 1], before[:, 1])
    assert start.partly == ["heads.0.weight", "heads.0.bias"] and not start.new
    bias = old.state_dict()["heads.0.bias"]
    assert start.state["heads.0.bias"][1] == bias[1:].mean()  # of the labels: the background's may be far above theirs
    for word in ("From toy 1.0.0:", "new label Vessel, kept tumour", "no longer given: Liver", "1 x 1 x 1 mm instead of 1 x 1 x 2 mm"):
        assert word in start.sentence
    assert "must learn sizes anew" in start.sentence


def test_no_label_in_common_starts_a_new_head(base):
    start = finetune.start_from(base(), labels=["Vessel"])
    assert start.new == ["heads.0.weight", "heads.0.bias"] and start.state["heads.0.weight"].shape[0] == 2
    again = finetune.start_from(base(), labels=["Vessel"])
    assert all(torch.equal(a, b) for a, b in zip(start.state.values(), again.state.values()))
    package, before = base(), torch.random.get_rng_state()
    finetune.start_from(package, labels=["Vessel"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_channels_keep_their_weights_by_name_and_new_ones_start_silent(base):
    package = base()
    start = finetune.start_from(package, channels=["FLAIR", "T2", "T1"])
    model = build(start.network)
    model.load_state_dict(start.state)
    x = torch.randn(1, 2, 16, 16, 16)
    given = torch.cat([x[:, 1:], torch.randn(1, 1, 16, 16, 16), x[:, :1]], 1)
    assert torch.allclose(model.eval()(given), load_network(package)(x), atol=1e-5)
    assert "the channel T2 starts without influence" in start.sentence and start.partly == ["encoder.0.first.0.weight"]


def test_of_two_channels_with_one_name_each_keeps_its_own_weights(base):
    package = base(channels=("MR", "MR"))
    old, new = load_network(package).state_dict(), finetune.start_from(package).state
    assert all(torch.equal(new[k], v) for k, v in old.items())
    assert "the channel mr starts without influence" in finetune.start_from(package, channels=["MR", "MR", "mr"]).sentence
    assert "without the channel MR" in finetune.start_from(package, channels=["MR"]).sentence


def test_another_sequence_takes_the_place_of_the_bases(base):
    package = base(channels=("T1",))
    weights = load_network(package).state_dict()["encoder.0.first.0.weight"]
    one = finetune.start_from(package, channels=["CT"])
    assert torch.equal(one.state["encoder.0.first.0.weight"], weights) and "CT takes the place of the base's T1" in one.sentence
    two = finetune.start_from(package, channels=["CT", "PET"])
    assert torch.allclose(two.state["encoder.0.first.0.weight"][:, 1:], weights)


def test_slices_of_a_2d_model_stay_with_their_image():
    package = find_model("lung-nodule-2d")
    start = finetune.start_from(package, labels=["Lung nodule", "Lung mass"], channels=["CT", "PET"])
    old, new = load_network(package).state_dict()["encoder.0.first.0.weight"], start.state["encoder.0.first.0.weight"]
    assert new.shape[1] == 2 * old.shape[1] and torch.equal(new[:, : old.shape[1]], old) and not new[:, old.shape[1] :].any()
    assert start.network.out_channels == 3


def test_a_2d_model_goes_on_with_more_or_fewer_neighbouring_slices():
    package = find_model("lung-nodule-2d")
    network, per = UNetConfig.from_json(package.card.data["network"]), package.card.inputs
    key = "encoder.0.first.0.weight"
    old = load_network(package).state_dict()[key]
    more = finetune.start_from(package, replace(network, in_channels=per + 4))
    assert torch.equal(more.state[key][:, 2:-2], old) and not more.state[key][:, [0, 1, -2, -1]].any() and not more.new
    assert f"{per + 4} slices instead of {per}, the new ones without influence at first" in more.sentence
    fewer = finetune.start_from(package, replace(network, in_channels=per - 2))
    assert torch.allclose(fewer.state[key].sum(1), old.sum(1), atol=1e-6)
    assert torch.equal(fewer.state[key][:, 1:-1], old[:, 2:-2]) and not fewer.new
    with pytest.raises(UserError, match="does not fit 1 images"):
        finetune.start_from(package, replace(network, in_channels=per + 1))


def test_what_does_not_fit_is_refused_in_a_sentence(base, make_package):
    with pytest.raises(UserError, match="cannot be trained on.*no PyTorch weights"):
        finetune.start_from(make_package())
    with pytest.raises(UserError, match="is a 3D network and the plan asks for 2D"):
        finetune.start_from(base(), UNetConfig(dimensions=2, in_channels=2, out_channels=3))
    with pytest.raises(UserError, match="does not fit 2 images and 2 labels"):
        finetune.start_from(base(), UNetConfig(dimensions=3, in_channels=1, out_channels=3))
    with pytest.raises(UserError, match=r"'s \d+ tensors only \d+ fit"):
        finetune.start_from(base(), UNetConfig(dimensions=3, in_channels=2, out_channels=3, channels=(5, 9, 13)))


def test_a_deeper_network_keeps_what_fits(base):
    deeper = UNetConfig(dimensions=3, in_channels=2, out_channels=3, channels=(4, 8, 12, 16), deep_supervision=True)
    start = finetune.start_from(base(), deeper)
    assert {"heads.0.weight", "decoder.2.first.0.weight", "ups.1.weight", "encoder.2.first.0.weight"} <= set(start.kept)
    assert "decoder.0.first.0.weight" in start.new and "heads.1.weight" in start.new and "at random: " in start.sentence
    build(deeper).load_state_dict(start.state)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_frozen_layers_do_not_move(base, norm):
    model = build(finetune.start_from(base(norm=norm)).network)
    frozen = finetune.freeze(model, ["encoder", "decoder.0.first"])
    assert all(k.startswith(("encoder.", "decoder.0.first.")) for k in frozen)
    model.train()
    before = copy.deepcopy(model.state_dict())  # the EMA copies the network too
    copied = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    out = model(torch.randn(2, 2, 16, 16, 16))
    out.square().mean().backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        still = key.startswith(("encoder.", "decoder.0.first."))
        assert torch.equal(value, before[key]) or not still, key
    assert not torch.equal(model.state_dict()["heads.0.weight"], before["heads.0.weight"])
    assert copied.state_dict().keys() == before.keys() and not copied.train().encoder[0].first[1].training == (norm == "batch")


def test_freezing_nothing_or_everything_is_refused(base):
    model = build(finetune.start_from(base()).network)
    with pytest.raises(UserError, match="no layer 'head' to freeze; name one of decoder, encoder, heads, ups"):
        finetune.freeze(model, ["head"])
    with pytest.raises(UserError, match="nothing could be learnt"):
        finetune.freeze(model, ["encoder", "decoder", "ups", "heads"])


def test_labels_named_otherwise_are_told_with_the_cure(base):
    cure = "new labels Anterior, Posterior (if the base's Liver, Tumour are meant, name them so in the dataset)"
    assert cure in finetune.start_from(base(), labels=["Anterior", "Posterior"]).sentence
    for others in (["Anterior", "Tumour"], ["Anterior"], ["Anterior", "Posterior", "Head"]):
        assert "are meant" not in finetune.start_from(base(), labels=others).sentence


@pytest.mark.parametrize(
    "held, name, known", [((1, 2), None, True), ((1, 3), None, False), ((1, 2, 3), None, False), ((1, 2), "Cyst", False)]
)
def test_labels_without_names_are_the_bases_where_the_values_are(base, tmp_path, held, name, known):
    values = np.zeros((4, 8, 8), np.uint8)
    for i, value in enumerate(held):
        values[1:3, 2 * i : 2 * i + 2] = value
    write_image(Image(values.astype(np.int16)), tmp_path / "images" / "a.nii.gz")
    write_image(Image(values), tmp_path / "labels" / "a.nii.gz")
    if name:
        (tmp_path / "labels.json").write_text(json.dumps({"2": name}))
    plain = find_cases(tmp_path)
    named = finetune.named_as(plain, base().card)
    assert ([label.name for label in named.labels] == ["Liver", "Tumour"]) == known == (named is not plain)
    assert not known or named.notes[-1].startswith("The labels have no names and are taken as toy's, 1 for Liver, 2 for Tumour;")
    assert np.array_equal(named.load(named.cases[0])[1], plain.load(plain.cases[0])[1])


@pytest.mark.parametrize("name, known", [(None, True), ("Vessel", False)])
def test_a_single_label_without_a_name_is_the_bases_whatever_marks_it(make_package, tmp_path, name, known):
    card = make_package(labels=[{"value": 1, "name": "Left ventricle"}]).card
    values = np.zeros((4, 8, 8), np.uint8)
    values[1:3, 2:5, 2:5] = 255
    write_image(Image(values.astype(np.int16)), tmp_path / "images" / "a.nii.gz")
    write_image(Image(values), tmp_path / "labels" / "a.nii.gz")
    if name:
        (tmp_path / "labels.json").write_text(json.dumps({"255": name}))
    plain = find_cases(tmp_path)
    named = finetune.named_as(plain, card)
    assert [label.name for label in named.labels] == ["Left ventricle" if known else name]
    told = "The label has no name and is taken as toy's Left ventricle; name it in labels.json if it is another."
    assert named.notes == (*plain.notes, told) if known else named is plain
    assert finetune.named_as(plain, make_package(labels=LABELS).card) is plain  # which of two it is nobody knows
    assert np.array_equal(named.load(named.cases[0])[1], values == 255)


def test_replayed_cases_have_the_new_trainings_labels(tmp_path):
    values = np.zeros((4, 8, 8), np.uint8)
    values[1:3, 1:3], values[1:3, 4:6] = 10, 20
    for folder, array in (("images", values.astype(np.int16)), ("labels", values)):
        (tmp_path / folder).mkdir()
        write_image(Image(array), tmp_path / folder / "a.nii.gz")
    base = find_cases(tmp_path)
    names = [label.name for label in base.labels]
    assert len(names) == 2
    replayed = finetune.replay_set(base, [names[1]], base.channels)
    assert [label.name for label in replayed.labels] == [names[1]]
    assert np.array_equal(replayed.load(replayed.cases[0])[1], values == 20)
    turned = finetune.replay_set(base, names[::-1], ["CT"])
    assert np.array_equal(turned.load(turned.cases[0])[1], np.select([values == 10, values == 20], [2, 1]))
    with pytest.raises(UserError, match="not annotated with Tumour.*nowhere"):
        finetune.replay_set(base, ["Tumour", names[0]], base.channels)
    with pytest.raises(UserError, match="have the channels"):
        finetune.replay_set(base, names, ["T1", "T2"])


def test_what_nobody_has_judged_in_the_bases_cases_is_not_replayed_as_background(tmp_path):
    values = np.zeros((4, 8, 8), np.uint8)
    values[1:3, 1:3], values[1:3, 4:6], values[3] = 1, 2, 3
    write_image(Image(values.astype(np.int16)), tmp_path / "imagesTr" / "a_0000.nii.gz")
    write_image(Image(values), tmp_path / "labelsTr" / "a.nii.gz")
    facts = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "Liver": 1, "Tumour": 2, "ignore": 3}}
    (tmp_path / "dataset.json").write_text(json.dumps({**facts, "numTraining": 1, "file_ending": ".nii.gz"}))
    replayed = finetune.replay_set(find_cases(tmp_path), ["Tumour"], ["CT"])
    assert np.array_equal(replayed.load(replayed.cases[0])[1], np.select([values == 2, values == 3], [1, IGNORE]))


def test_the_bases_cases_may_have_their_channels_in_another_order(make_package, tmp_path):
    data = Dataset.create(tmp_path / "set", "x", [Label(1, "GTV 1", (1, 2, 3), {})], ["T2", "T1"])
    truth = np.zeros((4, 8, 8), np.uint8)
    truth[1:3, 2:6, 2:6] = 1
    data.add(Image(np.stack([truth, 1 - truth]).astype(np.float32)), truth, name="a")
    cases = find_cases(data.folder)
    replayed = finetune.replay_set(cases, ["gtv-1"], ["T1", "T2"])
    assert np.array_equal(replayed.image(replayed.cases[0]).array, [1 - truth, truth])
    # The toy network looks at the last of two channels.
    right, wrong = (make_package(channels=c, labels=[{"value": 1, "name": "gtv-1"}]) for c in (["T1", "T2"], ["T2", "T1"]))
    facts = finetune.forgetting(right, wrong, metrics.case_items(cases), cases.labels, channels=cases.channels)
    assert facts["before"]["mean"] == 1 and facts["after"]["mean"] == 0


def test_forgetting_is_seen(make_package, tmp_path, base):
    before = make_package(labels=LABELS)
    blind = make_package(kind="threshold", labels=LABELS, intensity={"mode": "window", "level": 0.0, "width": 1000.0})
    wider = make_package(labels=[*LABELS, {"value": 3, "name": "Vessel"}])
    cases = []
    for i in range(4):
        array = np.zeros((8, 16, 16), np.float32)
        array[2:6, 2 : 8 + i, 2:6], array[2:6, 2:8, 8:12] = 1, 2
        cases.append(metrics.Item(f"c{i}", Image(array), array.astype(np.uint8)))
    alive = weakref.WeakSet()

    def one_by_one():
        for case in cases:
            assert len(alive) < 2  # twenty whole CTs would not fit the memory
            alive.add(image := Image(case.image.array))
            yield case._replace(image=image)
            del image

    same = finetune.forgetting(before, wider, one_by_one())
    assert same["before"]["mean"] == same["after"]["mean"] == 1 and same["change"]["mean"] == 0 and not same["forgotten"]
    other = make_package(labels=[{"value": 1, "name": "TUMOUR"}, {"value": 2, "name": "gall bladder"}, {"value": 3, "name": "liver "}])
    respelt = finetune.forgetting(before, other, cases, [replace(label, name=label.name.upper()) for label in before.card.labels])
    assert respelt["labels"] == ["Liver", "Tumour"] and respelt["before"]["mean"] == 1 and respelt["forgotten"]
    part = finetune.forgetting(before, wider, cases, [replace(before.card.labels[1], value=2)])
    assert part["labels"] == ["Tumour"] and part["before"]["mean"] == part["after"]["mean"] == 1  # Liver is in no truth
    worse = finetune.forgetting(before, blind, cases)
    assert worse["forgotten"] and worse["change"]["high"] < -0.5 and "replay" in worse["verdict"]
    none = finetune.forgetting(before, make_package(), cases)
    assert none["labels"] == [] and none["forgotten"] is None
    (tmp_path / "live.jsonl").write_text('{"event": "start", "step": 0}\n')
    finetune.write(tmp_path, finetune.start_from(base()), base(), [], none)
    report.write(tmp_path)
    package = base()
    finetune.write(tmp_path, finetune.start_from(package), package, ["encoder"], worse)
    facts = json.loads((tmp_path / "finetune.json").read_text("utf-8"))
    assert (
        facts["parent"]["name"] == "toy"
        and len(facts["parent"]["sha256"]) == 64
        and facts["base"]["forgotten"]
        and facts["frozen"] == ["encoder"]
    )


@pytest.mark.parametrize("falls, forgotten", [((0.10, -0.04), False), ((0.04, 0.03), True), ((0.03,), True), ((0.015, 0.01), False)])
def test_a_fall_that_chance_explains_is_not_forgetting(make_package, monkeypatch, falls, forgotten):
    """Of one case there is no interval, and a fall is told all the same."""
    before, after = make_package(), make_package()

    def evaluate(model, items, **how):
        (item,) = items
        return [{"case": item.name, "patient": item.name, "label": "thing", "dice": 0.8 - falls[int(item.name)] * (model is after)}]

    monkeypatch.setattr(metrics, "evaluate", evaluate)
    image = Image(np.zeros((2, 2, 2), np.float32))
    facts = finetune.forgetting(before, after, [metrics.Item(str(i), image, image.array) for i in range(len(falls))])
    assert facts["forgotten"] == forgotten and facts["verdict"].startswith("It has forgotten" if forgotten else "It still knows")
    assert facts["change"]["mean"] == pytest.approx(-np.mean(falls))
