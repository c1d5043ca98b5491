"""The worker through its client and through bare pipes: real child processes, nothing in the place of anything."""

import base64
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zlib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from UNetSegmentationLib.dataset import Dataset, FolderLock
from UNetSegmentationLib.files import escape_arguments, unescape_arguments
from UNetSegmentationLib.image import Box, Image, UserError, read_image, write_image
from UNetSegmentationLib.inference.click import ClickSession, expects_lung
from UNetSegmentationLib.inference.predict import Cancelled, Options, predict
from UNetSegmentationLib.measure import measure, uncertain_places
from UNetSegmentationLib.model import Label, find_model
from UNetSegmentationLib.nodule import describe
from UNetSegmentationLib.steps import complete
from UNetSegmentationLib.worker import protocol
from UNetSegmentationLib.worker.client import (
    Session,
    WorkerClient,
    WorkerError,
    child_environment,
    command,
    ending,
    find_python,
    new_folder,
    working_folder,
)
from UNetSegmentationLib.worker.protocol import (
    FOLDER_PREFIX,
    LOCK,
    MAX_LINE,
    PROTOCOL,
    Case,
    Lines,
    ProtocolError,
    decode_options,
    decode_prompts,
    encode_prompts,
    fill_array,
    load_array,
    save_array,
)
from UNetSegmentationLib.worker.server import _remove_abandoned
from workers import (
    DEADLINE,
    MISSING_DLL,
    NOISE,
    POSIX,
    QUICK,
    alive,
    at_work,
    greedy_package,
    oblique_image,
    script,
    slow_package,
    stub,
    until,
)


@pytest.fixture
def image() -> Image:
    return oblique_image()


@pytest.fixture
def client():
    with WorkerClient() as client:
        yield client


@pytest.fixture
def launcher(tmp_path) -> str:
    """A program that runs Python and stays beside it, as PythonSlicer does, and as on Windows passes no argument on but in ASCII."""
    text = f"""
        LC_ALL=C
        case "$*" in *[!\\ -~]*) echo "not ASCII: $*" >&2; exit 1;; esac
        "{sys.executable}" "$@"
        exit $?
    """
    return script(tmp_path / "PythonSlicer", text)


@pytest.fixture
def forever(tmp_path):
    return slow_package(tmp_path)


class Raw:
    """A worker on bare pipes, for what no client would say."""

    def __init__(self, folder: Path, greet: bool = True) -> None:
        environment = child_environment(sys.executable)
        self.process = subprocess.Popen(
            command(sys.executable, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            cwd=working_folder(),
            start_new_session=True,
        )
        self.lines = Lines()
        self.messages: list[dict] = []
        self.guard = threading.Timer(6 * DEADLINE, self.process.kill)
        self.guard.start()
        starting, hello = self.next(), self.next()
        assert (starting["event"], hello["event"]) == ("starting", "hello") and starting["pid"] == hello["pid"]
        if greet:
            self.say(op="hello", protocol=PROTOCOL)

    def say(self, **message) -> None:
        self.write(json.dumps(message).encode() + b"\n")

    def write(self, data: bytes) -> None:
        while data:
            data = data[self.process.stdin.write(data) :]

    def next(self) -> dict:
        while not self.messages:
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, "the worker ended"
            self.messages += [json.loads(line) for line in self.lines.feed(data)]
        return self.messages.pop(0)

    def ask(self, **message) -> dict:
        """The answer that ends the request."""
        self.say(**message)
        while (answer := self.next())["event"] == "progress":
            pass
        return answer

    def close(self) -> None:
        self.guard.cancel()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def private(tmp_path) -> Path:
    folder = tmp_path / f"{FOLDER_PREFIX}raw"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def raw(private):
    worker = Raw(private)
    yield worker
    worker.close()


def assert_same(a, b) -> None:
    for name in ("labels", "uncertainty", "mutual_information", "probabilities"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.array.dtype == y.array.dtype and np.array_equal(x.array, y.array), name
            assert (x.spacing, x.origin, x.direction, x.source, x.dicom_files) == (
                y.spacing,
                y.origin,
                y.direction,
                y.source,
                y.dicom_files,
            )
    for name in ("label_defs", "model_name", "roi", "engines", "warnings", "tiles"):
        assert getattr(a, name) == getattr(b, name), name


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"roi": Box((2, 5, 3), (9, 30, 41)), "batch": 1},
        {"at": (-20.0, 25.0, 90.0)},
        {"tta": "flips", "uncertainty": True, "probabilities": True},
        {"intensity": {"mode": "window", "level": 1, "width": 2}, "uncertainty": True},
    ],
    ids=["plain", "roi", "at", "maps", "window"],
)
def test_the_result_is_that_of_predict(client, image, make_package, changes):
    labels = [{"value": 1, "name": "one", "color": [1, 2, 3]}, {"value": 300, "name": "zwei, größer"}]
    model = make_package(labels=labels, flip_axes=["x"], roi_mm=20)
    image = replace(image, source=Path("somewhere/ct ä.nrrd"), dicom_files=("a", "b"))
    options = replace(QUICK, **changes)
    direct = predict(image, [model], options)
    volume = client.load_volume(image)
    through = client.predict(volume, [model], options, measures=True)
    assert_same(through, direct)
    assert through.labels.array.any()
    if "intensity" in changes:
        assert through.warnings
    assert through.measures == measure(direct.labels, direct.label_defs, image)
    assert through.places == (uncertain_places(direct.uncertainty) if options.uncertainty else None)
    through.labels.array[:] = 0  # the caller's own
    assert not list(client.folder.glob("result-*"))


def test_channels_ensembles_and_empty_results(client, make_package):
    array = np.random.default_rng(0).random((2, 6, 20, 20), np.float32)
    image = Image(np.asfortranarray(array))
    models = [make_package("identity", channels=["a", "b"], activation="sigmoid") for _ in range(2)]
    options = replace(QUICK, probabilities=True, uncertainty=True)
    volume = client.load_volume(image)
    assert_same(client.predict(volume, models, options), predict(image, models, options))
    nothing = image.like(np.zeros_like(array))
    assert_same(client.predict(client.load_volume(nothing), models, options), predict(nothing, models, options))


def test_volume_is_sent_once_and_the_engine_stays_warm(client, image, make_package):
    model, other = make_package(), make_package(name="other")
    volume = client.load_volume(image)
    pid = client.pid
    for _ in range(2):
        client.predict(volume, [model.path], QUICK)
    assert client.session.counts["load_volume"] == 1 and client.session.counts["predict"] == 2
    held = client.ping()
    assert (held["volumes"], held["models"], held["engines"], held["engines_made"]) == ([volume], 1, 1, 1)
    client.predict(volume, [model, other], QUICK)
    client.predict(volume, [model], replace(QUICK, threads=2))
    assert client.ping()["engines_made"] == 3
    os.utime(model.path, ns=(1, 1))  # a file that changed is verified and loaded again
    client.predict(volume, [model], QUICK)
    held = client.ping()
    assert (held["models"], held["engines"], held["engines_made"]) == (2, 2, 4)
    client.unload_volume(volume)
    assert client.ping()["volumes"] == [] and not list(client.folder.iterdir())
    with pytest.raises(UserError, match="load it again"):
        client.predict(volume, [model], QUICK)
    assert client.pid == pid


def test_progress_arrives(client, image, make_package):
    seen = []
    client.predict(client.load_volume(image), [make_package()], QUICK, progress=lambda *a: seen.append(a))
    fractions = [f for f, _ in seen]
    assert fractions == sorted(fractions) and fractions[0] == 0 and seen[-1] == (1.0, "done")


def test_the_folder_is_private_and_gone_after_close(image, make_package):
    with WorkerClient() as client:
        if os.name != "nt":
            assert stat.S_IMODE(client.folder.stat().st_mode) == 0o700
        client.predict(client.load_volume(image), [make_package()], replace(QUICK, uncertainty=True))
        assert [p.name.split("-")[0] for p in client.folder.iterdir()] == ["volume"]
        pid = client.pid
    assert not client.folder.exists() and not alive(pid)
    with pytest.raises(UserError, match="closed"):
        client.start()


# -------------------------------------------------------------------------------------------------------------- clicks


@pytest.fixture
def chest() -> Image:
    """Balls of 1 in noise below 0.5, on an oblique left-handed grid."""
    shape, rng = (30, 60, 64), np.random.default_rng(4)
    array = rng.uniform(0, 0.45, shape)
    for centre, radius in (((12, 20, 20), 6), ((14, 22, 32), 5), ((16, 44, 44), 7)):
        away = sum(((g - c) * s) ** 2 for g, c, s in zip(np.indices(shape), centre, (1.5, 0.8, 0.9)))
        array[away <= radius**2] += 0.5
    return replace(oblique_image(), array=array.astype(np.float32), spacing=(0.9, 0.8, 1.5))


@pytest.fixture
def clicker(make_package):
    return make_package(task="click", spacing=[1, 1, 1.5], patch=[16, 24, 24])


def click_prompts(image: Image) -> list:
    def point(z, y, x, positive=True):
        return ("point", *image.index_to_point((x, y, z)), positive)

    brushed = np.zeros((8, 14, 10), np.uint8)
    brushed[2:7, 1:12, 2:8] = 1
    box = ("box", *image.index_to_point((12, 12, 5)), *image.index_to_point((40, 30, 22)))
    return [point(12, 20, 20), box, point(14, 22, 32), ("mask", brushed, (10, 15, 26)), point(14, 24, 30, False), point(12, 22, 20)]


def assert_answers(answer, session, image) -> None:
    expected = session.answer
    assert (answer.box, answer.text, answer.zoom, answer.found) == (expected.box, expected.text, expected.zoom, expected.found)
    assert answer.mask.dtype == np.uint8 and np.array_equal(answer.mask, expected.mask)
    if answer.measures is not None:
        assert answer.measures == describe(image, expected.mask, expected.box.start, expects_lung(session.card))


def test_clicks_give_what_a_session_gives(client, chest, clicker):
    prompts, volume = click_prompts(chest), client.load_volume(chest)
    session = ClickSession(chest, clicker, options=QUICK)
    for n in (1, 2, 3, 4, 5, 6, 4, 2, 0, 1, 6):
        session.replay(prompts[:n])
        answer = client.click(volume, clicker, QUICK, "a", prompts[:n], measures=True)
        assert_answers(answer, session, chest)
        assert answer.found == bool(n) and answer.engine == session._engine.describe() and answer.warnings == session.warnings
    one = ClickSession(chest, clicker, options=QUICK)
    one.add_point(prompts[0][1:4])
    assert_answers(client.click(volume, clicker, QUICK, "b", prompts[:1]), one, chest)
    answer = client.click(volume, clicker, QUICK, "a", prompts)
    assert "network" not in answer.seconds and answer.seconds["all"] >= answer.seconds["load"]  # known prompts are not run again
    nothing = client.click(volume, clicker, QUICK, "a", [("point", *chest.index_to_point((4, 55, 2)), True)], measures=True)
    assert not nothing.found and "Nothing was found here" in nothing.text and nothing.measures["voxels"] == 0
    answer.mask[:] = 0  # the caller's own
    assert [p.name.split("-")[0] for p in client.folder.iterdir()] == ["volume"]


def test_clicks_on_a_real_scan_are_those_of_a_session(client, data):
    scan = read_image(data / "chest_ct" / "LIDC-IDRI-0001_ct.nii.gz")
    near = Box((30, 220, 220), (50, 300, 300))
    image, package = scan.crop(near), find_model("lung-nodule-click")
    options = Options(engine="onnx", device="cpu")
    prompts = [("point", 57.0, 86.0, -116.0, True), ("point", 60.0, 86.0, -112.0, True), ("point", 42.0, 86.0, -116.0, False)]
    session = ClickSession(image, package, options=options)
    volume = client.load_volume(image)
    client.click(volume, package, options)
    for n in (3, 1, 2):
        session.replay(prompts[:n])
        assert_answers(client.click(volume, package, options, "nodule", prompts[:n], measures=True), session, image)
        assert session.mask.sum() > 1000


def test_sessions_are_kept_shared_and_dropped(client, chest, clicker):
    prompts, volume = click_prompts(chest), client.load_volume(chest)
    warmed = client.click(volume, clicker, QUICK)
    assert not warmed.found and warmed.text == "" and "network" in warmed.seconds
    held = client.ping()
    assert (held["engines_made"], held["sessions"]) == (1, 1)
    for lesion in range(10):
        first = client.click(volume, clicker, QUICK, str(lesion), prompts)
        assert "network" in first.seconds
    held = client.ping()
    assert (held["engines_made"], held["sessions"]) == (1, 8)
    assert "network" not in client.click(volume, clicker, QUICK, "9", prompts).seconds
    again = client.click(volume, clicker, QUICK, "0", prompts)  # was dropped, and is run anew
    assert "network" in again.seconds and np.array_equal(again.mask, first.mask)
    other = client.load_volume(chest)
    client.click(other, clicker, QUICK, "0", prompts[:1])
    client.click(volume, clicker, replace(QUICK, threads=2), "0", prompts[:1])
    assert client.ping()["sessions"] == 8
    client.unload_volume(volume)
    assert client.ping()["sessions"] == 1
    os.utime(clicker.path, ns=(1, 1))  # another model by the same name
    client.click(other, clicker, QUICK, "0", prompts[:1])
    held = client.ping()
    assert (held["sessions"], held["engines"]) == (1, 1)


@POSIX
def test_a_killed_worker_gives_the_same_answer_again(client, chest, clicker):
    prompts, volume = click_prompts(chest), client.load_volume(chest)
    before = client.click(volume, clicker, QUICK, "a", prompts)
    os.kill(client.pid, signal.SIGKILL)
    until(lambda: client.pid is None, "the worker's death")
    after = client.click(volume, clicker, QUICK, "a", prompts)
    assert after.box == before.box and np.array_equal(after.mask, before.mask)
    assert client.session.counts["load_volume"] == 2


def test_bad_clicks_are_one_sentence(client, chest, clicker, make_package):
    prompts, volume = click_prompts(chest), client.load_volume(chest)
    session = ClickSession(chest, clicker, options=QUICK)
    pid = client.start()["pid"]
    bad = [("point", 1.0, 2.0, True), ("box", 1.0), ("line", 1.0), (), None, ("mask", np.zeros((2, 2)), (0, 0, 0))]
    bad += [("point", float("nan"), 0.0, 0.0, True), ("point", 1e4, 0.0, 0.0, True), ("box", 0.0, 0.0, 0.0, 0.0, 9.0, 9.0)]
    bad += [("mask", np.ones((2, 2, 2), np.uint8), (-1, 0, 0)), ("mask", np.ones((2, 2, 2), np.uint8), (29, 0, 0))]
    for prompt in bad:
        with pytest.raises(UserError) as through:
            client.click(volume, clicker, QUICK, "a", [prompts[0], prompt])
        assert str(through.value).endswith(".") and "unexpected" not in str(through.value)
        if prompt and not (prompt[0] == "point" and prompt[1] != prompt[1]):  # a NaN is refused before it travels
            with pytest.raises(UserError) as direct:
                session.replay([prompts[0], prompt])
            assert str(through.value) == str(direct.value)
    assert_answers(client.click(volume, clicker, QUICK, "a", prompts[:1]), session, chest)
    with pytest.raises(UserError, match="does not work from clicks"):
        client.click(volume, make_package(), QUICK, "a", prompts)
    with pytest.raises(UserError, match="no model package"):
        client.click(volume, clicker.path.with_name("none.unet.zip"), QUICK, "a", prompts)
    with pytest.raises(UserError, match="no scalar volume"):
        client.click(client.load_volume(Image(np.zeros((1, 9, 9), np.int16))), clicker, QUICK)
    with pytest.raises(UserError, match="load it again"):
        client.click(99, clicker, QUICK)
    ragged = np.random.default_rng(0).random((300, 400, 400)) < 0.5
    with pytest.raises(UserError, match="too ragged"):
        client.click(volume, clicker, QUICK, "a", [("mask", ragged, (0, 0, 0))])
    assert client.pid == pid


def announced(raw, private, image: Image) -> None:
    np.save(private / "volume-1.npy", image.array)
    geometry = {"spacing": [1, 1, 1], "origin": [0, 0, 0], "direction": [1, 0, 0, 0, 1, 0, 0, 0, 1], "source": None}
    assert raw.ask(op="load_volume", id=1, volume=1, file="volume-1.npy", geometry=geometry)["event"] == "done"


CLICK = {"op": "click", "volume": 1, "options": {"engine": "onnx", "threads": 1}, "lesion": "a", "measures": False, "keep": False}


def test_a_click_waits_for_its_turn_and_can_be_cancelled_there(raw, private, tmp_path, chest, clicker):
    model = slow_package(tmp_path, 3000)  # with all its tiles it takes longer than anybody sleeps
    announced(raw, private, chest)
    options = {"engine": "onnx", "device": "cpu", "threads": 1, "batch": 1}
    click = {**CLICK, "model": str(clicker.path), "prompts": [["point", 20.0, 20.0, 12.0, True]]}
    predict = {"op": "predict", "volume": 1, "models": [str(model.path)], "options": options, "measures": False, "keep": False}
    raw.say(**predict, id=2)
    raw.say(**click, id=3)
    raw.say(**click, id=4)
    raw.say(op="cancel", id=5, target=3)
    raw.say(op="cancel", id=6, target=2)
    ends = []
    while len(ends) < 3:
        answer = raw.next()
        ends += [] if answer["event"] == "progress" else [(answer["id"], answer["event"])]
    assert ends == [(2, "cancelled"), (3, "cancelled"), (4, "click")]


def test_a_click_in_an_endless_network_is_cancelled(client, chest, clicker, tmp_path):
    endless = slow_package(tmp_path, task="click", spacing=[1, 1, 1], patch=[8, 8, 8])
    prompts, volume = click_prompts(chest), client.load_volume(chest)
    assert client.click(volume, clicker, QUICK, "a", prompts).found  # what has to be imported is
    pid = client.start()["pid"]
    with pytest.raises(Cancelled):
        client.click(volume, endless, QUICK, "a", prompts, cancelled=at_work(pid))
    assert not alive(pid)
    assert client.click(volume, clicker, QUICK, "a", prompts).found


def test_nonsense_clicks_are_answered_and_survived(raw, private, chest, clicker):
    announced(raw, private, chest)
    good = {**CLICK, "model": str(clicker.path), "prompts": []}
    mask = encode_prompts([("mask", np.ones((2, 2, 2)), (0, 0, 0))])[0]
    assert mask[:3] == ["mask", [0, 0, 0], [2, 2, 2]]
    bomb = base64.b64encode(zlib.compress(bytes(1 << 24))).decode()
    prompts = [3, None, {}, [3], [[]], [["point"]], [["point", 1, 2, 3]], [["point", 1, 2, 3, 4]], [["point", 1, "2", 3, True]]]
    prompts += [[["box", 1, 2, 3]], [["mask"]], [["mask", *mask[1:3]]], [["mask", *mask[1:3], "?"]], [["mask", *mask[1:3], "aaaa"]]]
    prompts += [[["mask", *mask[1:3], bomb]], [["mask", [0, 0, 0], [2, 2, 9], mask[3]]], [["mask", [0, 0, 0], [-2, -2, 2], mask[3]]]]
    prompts += [[["mask", [0, 0, 0], [1 << 20] * 3, bomb]], [["mask", [0, 0.5, 0], [2, 2, 2], mask[3]]], [["line", 1, 2]]]
    bad = [{"prompts": p} for p in prompts]
    bad += [
        {"lesion": 3},
        {"lesion": None},
        {"measures": 1},
        {"model": None},
        {"model": [str(clicker.path)]},
        {"volume": "1"},
        {"volume": 9},
    ]
    bad += [{"options": 3}, {"options": {"evil": 1}}, {"options": {"engine": "magic"}}]
    for number, change in enumerate(bad, 10):
        answer = raw.ask(**{**good, **change, "id": number})
        assert answer["event"] == "error" and answer["error"].endswith(".") and answer["kind"] in ("user", "internal"), change
        assert "unexpectedly" not in answer["error"] and "Something" not in answer["error"], change
    assert raw.ask(**good, id=2)["event"] == "click"


def test_an_answer_that_does_not_fit_is_refused(tmp_path, chest):
    session = Session(tmp_path)
    volume = complete(session.add_volume(chest))
    mask = encode_prompts([("mask", np.ones((2, 2, 2)), (0, 0, 0))])[0][1:]
    good = {"box": [[0, 0, 0], [2, 2, 2]], "mask": mask, "text": "", "zoom": 1.0, "measures": None, "seconds": {"a": 1.0}}
    good |= {"warnings": [], "engine": "x"}
    far = encode_prompts([("mask", np.ones((2, 2, 2)), (29, 0, 0))])[0][1:]
    empty = encode_prompts([("mask", np.zeros((2, 2, 2)), (0, 0, 0))])[0][1:]
    bad = [{"box": [[0, 0, 0], [2, 2, 3]]}, {"box": [[0, 0, 0], [0, 0, 0]]}, {"box": 3}, {"mask": None}, {"mask": "file"}, {"text": None}]
    bad += [{"mask": far, "box": [[29, 0, 0], [31, 2, 2]]}, {"mask": empty, "box": [[0, 0, 0], [0, 0, 0]]}, {"seconds": {"a": "1"}}]
    bad += [{"zoom": "1"}, {"measures": 3}, {"measures": {"center": [1]}}, {"warnings": [1]}, {"engine": None}]
    for change in bad:
        number, line = session.click(volume, "model.unet.zip", prompts=click_prompts(chest))
        (event,) = session.feed(json.dumps({"event": "click", "id": number, **good, **change}).encode() + b"\n")
        with pytest.raises(WorkerError, match="not valid"):
            session.click_result(event)
    number, line = session.click(volume, "model.unet.zip", QUICK, "a", click_prompts(chest))
    assert [json.loads(part)["op"] for part in line.splitlines()] == ["click"]
    (event,) = session.feed(json.dumps({"event": "click", "id": number, **good}).encode() + b"\n")
    assert event.final and session.click_result(event).mask.sum() == 8
    with pytest.raises(WorkerError, match="no request"):
        session.click_result(event)


# --------------------------------------------------------------------------------------------------------------- cases


def test_a_case_is_added_and_shown_as_by_the_dataset(client, tmp_path, image, make_package):
    package = make_package(flip_axes=["x"])
    volume = client.load_volume(image)
    kept_labels = client._ask(
        lambda: client.session.predict(volume, [package], replace(QUICK, tta="flips", uncertainty=True), keep=True),
        lambda answer: complete(client.session.result(answer)),
        None,
        None,
    )
    assert kept_labels.kept and not client.predict(volume, [package], QUICK).kept
    assert kept_labels.uncertainty is not None and kept_labels.mutual_information is None  # which no panel shows
    folder = tmp_path / "set"
    folder.mkdir()
    assert client.dataset(folder)["summary"] is None
    thing, vessel = Label(3, "thing", (1, 2, 3), {}), Label(1, "vessel", (4, 5, 6), {})
    corrected = kept_labels.labels.array.copy()
    corrected[0] = 0
    start = (0, 2, 3)
    mask = (3 * (corrected == 1)).astype(np.uint8)
    mask[: start[0], :, :] = mask[:, : start[1]] = mask[:, :, : start[2]] = 0
    case = Case(
        str(folder),
        (thing,),
        create=("Things", ("CT",)),
        offered=(vessel, thing),
        own=((kept_labels.kept, ((1, 3),)),),
        patient="PID",
        modality="CT",
        model="toy",
    )
    told = []
    found = client.add_case(volume, mask[:, 2:, 3:], case, start, lambda f, t: told.append(t))
    dataset = Dataset.open(folder)
    entry = dataset.entries[found["case"]]
    assert [d.name for d in dataset.labels] == ["vessel", "thing"] and entry.patient == dataset.patient("PID")
    assert np.array_equal(read_image(entry.label).array, 2 * (mask > 0)) and entry.record["modality"] == "CT"
    assert np.array_equal(read_image(entry.model).array, 2 * kept_labels.labels.array) and found["own"]
    assert found["summary"] == dataset.summary() == client.dataset(folder)["summary"] and "writing the image" in told
    assert not list(client.folder.glob("mask-*"))
    # Refused, and allowed.
    empty = np.zeros((0, 0, 0), np.uint8)
    with pytest.raises(WorkerError) as e:
        client.add_case(volume, empty, case)
    assert (e.value.kind, e.value.objection) == ("user", "empty") and len(dataset.refresh().versions(entry.name)) == 1
    again = client.add_case(volume, empty, replace(case, allow=("empty",), own=(("0" * 32, ((1, 3),)),)))
    assert again["version"] == 2 and not again["own"]
    elsewhere = tmp_path / "model.nrrd"  # of the scan before it was moved
    write_image(replace(kept_labels.labels, origin=(500.0, 0.0, 0.0)), elsewhere)
    again = client.add_case(volume, empty, replace(case, allow=("empty",), own=(), own_file=str(elsewhere)))
    assert again["version"] == 3 and not again["own"]
    assert client.dataset(folder, "restore", entry.name, 1)["summary"]["cases"][0]["versions"][-1]["restored"] == 1
    assert client.dataset(folder, "remove", entry.name)["summary"]["count"] == 0
    with pytest.raises(WorkerError, match="has no case"):
        client.dataset(folder, "remove", entry.name)
    with pytest.raises(WorkerError, match="is not there"):
        client.dataset(tmp_path / "gone")
    with pytest.raises(UserError, match="0 to 255"):
        client.add_case(volume, np.zeros((1, 1, 1), np.int32), case)


def test_a_case_that_was_added_when_cancel_came_is_told(client, tmp_path, image, monkeypatch):
    monkeypatch.setattr("UNetSegmentationLib.worker.client.CANCEL_S", DEADLINE)
    dataset, entering = Dataset.create(tmp_path / "set", "Things", [Label(1, "thing", (1, 2, 3), {})], ("CT",)), []
    with ExitStack() as held:
        held.enter_context(FolderLock(dataset.folder))

        def progress(fraction, text):
            if text == "adding it to the index":
                entering.append(text)
                held.close()

        case = Case(str(dataset.folder), dataset.labels)
        mask = np.ones((5, 5, 5), np.uint8)
        found = client.add_case(client.load_volume(image), mask, case, progress=progress, cancelled=lambda: bool(entering))
    assert list(dataset.refresh().entries) == [found["case"]]


def test_a_refused_first_case_leaves_no_dataset(client, tmp_path, image):
    case = Case(str(tmp_path), (Label(1, "thing", (1, 2, 3), {}),), ("Things", ("CT",)))
    with pytest.raises(WorkerError, match="is empty"):
        client.add_case(client.load_volume(image), np.zeros((0, 0, 0), np.uint8), case)
    assert not (tmp_path / "dataset.json").exists() and not (tmp_path / "salt").exists()
    with pytest.raises(WorkerError, match="is no dataset"):
        client.add_case(client.load_volume(image), np.ones((5, 5, 5), np.uint8), replace(case, create=None))


def test_nonsense_cases_are_answered_and_survived(raw, private, image):
    volume = complete(protocol.encode_image(image, private, 1))
    assert raw.ask(op="load_volume", id=1, **volume)["event"] == "done"
    good = protocol.encode_case(Case(str(private), (Label(1, "thing", (1, 2, 3), {}),)))
    part = {"box": [[0, 0, 0], [0, 0, 0]], "file": None}
    np.save(private / "mask-7.npy", np.ones((3, 3, 3), np.uint8))
    requests = [
        {"mask": part, "case": {}},
        {"mask": part, "case": {**good, "own": [["a"]]}},
        {"mask": part, "case": {**good, "own": [["a", [[1]]]]}},
        {"mask": part, "case": {**good, "labels": [1]}},
        {"mask": part, "case": {**good, "create": 5}},
        {"mask": {"box": [[0, 0, 0], [3, 3, 4]], "file": "mask-7.npy"}, "case": good},
        {"mask": {"box": [[-1, 0, 0], [2, 3, 3]], "file": "mask-7.npy"}, "case": good},
        {"mask": {"box": [[0, 0, 0], [3, 3, 3]], "file": "../secret.npy"}, "case": good},
        {"mask": part, "case": good, "volume": 9},
    ]
    for number, request in enumerate(requests, 2):
        answer = raw.ask(**{"op": "add_case", "id": number, "volume": 1, **request})
        assert answer["event"] == "error" and answer["kind"] in ("internal", "user"), request
    for request in (
        {},
        {"folder": 5, "action": "show"},
        {"folder": str(private), "action": "burn"},
        {"folder": str(private), "action": "remove"},
    ):
        assert raw.ask(op="dataset", id=99, **request)["event"] == "error"
    assert raw.ask(op="ping", id=100)["event"] == "done" and not (private / "dataset.json").exists()


def test_prompts_travel_as_json(chest):
    prompts = click_prompts(chest)
    again = decode_prompts(json.loads(json.dumps(encode_prompts(prompts))))
    assert [p for p in again if p[0] != "mask"] == [p for p in prompts if p[0] != "mask"]
    kind, mask, start = again[3]
    assert (kind, start) == ("mask", (12, 16, 28)) and mask.shape == (5, 11, 6) and mask.all()
    assert decode_prompts(encode_prompts([("mask", np.zeros((3, 3, 3)), (1, 1, 1))]))[0][1].size == 0
    for bad in (["point", 10**400, 0, 0, True], ["box", 0, 0, 0, 1, 1, -(10**400)], ["mask", [0, 0, 10**400], [1, 1, 1], "eJw"]):
        with pytest.raises(ProtocolError):  # a scene of somebody else's may hold them
            decode_prompts([bad])
    masks = encode_prompts([("mask", np.ones((2, 3, 4), np.uint8), (0, 0, 0))] * 2)
    assert len(decode_prompts(masks, 48)) == 2
    for most in (23, 47):  # of all together
        with pytest.raises(ProtocolError):
            decode_prompts(masks, most)


# ------------------------------------------------------------------------------------------------------ cancel and death


@pytest.mark.parametrize("how", ["callback", "other thread"])
def test_cancel_in_an_endless_network(client, image, forever, make_package, how):
    model = make_package()
    volume = client.load_volume(image)
    client.predict(volume, [model], QUICK)
    running, stop = threading.Event(), threading.Event()
    outcome = []

    def run():
        try:
            client.predict(volume, [forever], QUICK, progress=lambda *a: running.set(), cancelled=stop.is_set)
        except BaseException as e:
            outcome.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert running.wait(DEADLINE)
    pid = client.pid
    until(at_work(pid), "the network, in which nobody asks whether to go on")
    (stop.set if how == "callback" else client.cancel)()
    thread.join(DEADLINE)
    assert [type(e) for e in outcome] == [Cancelled]
    assert not alive(pid)
    assert_same(client.predict(volume, [model], QUICK), predict(image, [model], QUICK))
    assert client.session.counts["load_volume"] == 2  # the successor was told of the volume


def test_a_worker_that_can_cancel_lives_on(raw, private, tmp_path):
    model = slow_package(tmp_path, 3000)
    np.save(private / "volume-1.npy", np.ones((64, 64, 64), np.int16))
    geometry = {"spacing": [1, 1, 1], "origin": [0, 0, 0], "direction": [1, 0, 0, 0, 1, 0, 0, 0, 1], "source": None}
    assert raw.ask(op="load_volume", id=1, volume=1, file="volume-1.npy", geometry=geometry) == {"id": 1, "event": "done"}
    options = {"engine": "onnx", "device": "cpu", "threads": 1, "batch": 1}
    raw.say(op="predict", id=2, volume=1, models=[str(model.path)], options=options, measures=False, keep=False)
    assert raw.next()["event"] == "progress"
    assert raw.ask(op="cancel", id=3, target=2) == {"id": 2, "event": "cancelled"}
    assert raw.ask(op="ping", id=4)["volumes"] == [1]


def test_interrupted_by_the_callers_own_error(client, image, forever, make_package):
    def progress(fraction, text):
        raise KeyboardInterrupt

    volume = client.load_volume(image)
    with pytest.raises(KeyboardInterrupt):
        client.predict(volume, [forever], QUICK, progress=progress)
    assert client.pid is None
    assert client.predict(volume, [make_package()], QUICK).labels.array.any()


@POSIX
@pytest.mark.parametrize(("number", "words"), [("SIGKILL", "by the system.*memory"), ("SIGSEGV", "signal 11.*try again")])
def test_worker_killed_while_it_works(client, image, forever, make_package, number, words):
    volume = client.load_volume(image)
    with pytest.raises(WorkerError, match=words):
        client.predict(volume, [forever], QUICK, progress=lambda *a: os.kill(client.pid, getattr(signal, number)))
    assert client.predict(volume, [make_package()], QUICK).labels.array.any()


@POSIX
def test_worker_killed_while_it_waits(client, image, make_package):
    volume = client.load_volume(image)
    os.kill(client.pid, signal.SIGKILL)
    until(lambda: client.pid is None, "the worker's death")
    assert client.predict(volume, [make_package()], QUICK).labels.array.any()


CLIENT = """
import os, subprocess, sys
import numpy as np
from UNetSegmentationLib.image import Image
from UNetSegmentationLib.inference.predict import Options
from UNetSegmentationLib.worker.client import WorkerClient
client = WorkerClient(sys.argv[3])
volume = client.load_volume(Image(np.ones((16, 16, 16), np.int16)))
copy = "0"
if sys.argv[2] == "pipe copy":
    os.set_inheritable(client._process.stdin.fileno(), True)
    copy = str(subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL).pid)
def progress(*a):
    print(client.session.pid, client.folder, copy, flush=True)
client.predict(volume, [sys.argv[1]], Options(engine="onnx", device="cpu", threads=1), progress)
"""


@POSIX
@pytest.mark.parametrize("case", ["plain", "pipe copy", "launcher"])
def test_nothing_is_left_of_a_client_that_was_killed(forever, launcher, case):
    python = launcher if case == "launcher" else sys.executable
    arguments = [sys.executable, "-c", CLIENT, str(forever.path), case, python]
    script = subprocess.Popen(arguments, cwd=working_folder(), stdout=subprocess.PIPE, text=True, bufsize=1)
    copy = 0
    try:
        pid, folder, copy = (t(v) for t, v in zip((int, Path, int), script.stdout.readline().split()))
        assert alive(pid) and list(folder.iterdir())
        script.kill()
        until(lambda: not alive(pid), "the worker's end")  # before the zombie of its client is waited for
        until(lambda: not folder.exists(), "the end of its folder")
    finally:
        script.kill()
        script.wait()
        script.stdout.close()
        if copy:
            os.kill(copy, signal.SIGKILL)


@POSIX
def test_what_is_left_of_a_client_and_worker_that_died_at_once_goes_when_another_starts(forever, tmp_path):
    (tmp_path / "temp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temp")}
    arguments = [sys.executable, "-c", CLIENT, str(forever.path), "plain", sys.executable]
    scripts = [
        subprocess.Popen(arguments, cwd=working_folder(), stdout=subprocess.PIPE, text=True, bufsize=1, env=environment) for _ in range(2)
    ]
    try:
        (dead, left), (living, used) = (script.stdout.readline().split()[:2] for script in scripts)
        left, used = Path(left), Path(used)
        assert left.parent == used.parent == tmp_path / "temp"
        scripts[0].send_signal(signal.SIGSTOP)
        os.kill(int(dead), signal.SIGKILL)
        scripts[0].kill()
        scripts[0].wait()
        assert (left / "volume-1.npy").exists()
        link = used.with_name(f"{FOLDER_PREFIX}link")
        link.symlink_to(tmp_path)
        (tmp_path / "volume-1.npy").touch()
        unlocked = used.with_name(f"{FOLDER_PREFIX}unlocked")
        unlocked.mkdir(mode=0o700)
        opened = used.with_name(f"{FOLDER_PREFIX}opened")
        opened.mkdir()
        opened.chmod(0o755)
        for path in (link, opened):
            path.with_name(path.name + LOCK).touch()
        fresh = used.with_name(f"{FOLDER_PREFIX}fresh")
        fresh.mkdir(mode=0o700)
        for lock in left.parent.glob(f"*{LOCK}"):
            os.utime(lock, (0, 0))
        fresh.with_name(fresh.name + LOCK).touch()
        mine = used.with_name(f"{FOLDER_PREFIX}mine")
        mine.mkdir(mode=0o700)
        worker = Raw(mine)
        try:
            until(lambda: not left.exists(), "the end of the folder of a dead client")
        finally:
            worker.close()
        _remove_abandoned(left.parent)  # the worker may have been killed on its way
        assert alive(int(living)) and (used / "volume-1.npy").exists() and (tmp_path / "volume-1.npy").exists()
        assert all(path.is_dir() for path in (unlocked, opened, fresh, mine)) and not left.with_name(left.name + LOCK).exists()
        os.kill(int(living), signal.SIGKILL)
    finally:
        for script in scripts:
            script.kill()
            script.wait()
            script.stdout.close()


def test_a_folder_is_held_until_it_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(protocol, "NEW_S", -1e9)
    folder, other = new_folder(), new_folder()
    assert len(list(tmp_path.iterdir())) == 4 and not protocol.abandoned(folder)
    (other / "thesis").touch()
    for path in (folder, other):
        protocol.remove_folder(path)
    assert {p.name for p in tmp_path.iterdir()} == {other.name, other.name + LOCK} and not protocol.abandoned(other)


@POSIX
def test_a_worker_whose_launcher_was_ended_goes_too(private, launcher):
    process = subprocess.Popen(
        command(launcher, private), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment(launcher), cwd=working_folder()
    )
    messages = [json.loads(line) for line in (process.stdout.readline() for _ in range(4)) if line.strip()]
    pid = messages[1]["pid"]
    assert [m["event"] for m in messages] == ["starting", "hello"] and alive(pid) and pid != process.pid
    process.kill()
    until(lambda: not alive(pid), "the worker's end")  # though its pipes are open
    assert private.exists()  # the client's, who lives
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_worker_deletes_only_arrays_of_the_protocol(private):
    (private / "thesis.npy").write_bytes(b"x")
    (private / "volume-1.npy").write_bytes(b"x")
    code = "import subprocess, sys; p = subprocess.Popen([sys.argv[1], '-m', 'UNetSegmentationLib.worker', sys.argv[2], '1' * 7],"
    code += "stdin=subprocess.PIPE, stdout=subprocess.PIPE); p.stdin.close(); p.wait()"
    subprocess.run([sys.executable, "-c", code, sys.executable, str(private)], cwd=working_folder(), timeout=60, check=True)
    assert [p.name for p in private.iterdir()] == ["thesis.npy"]


@POSIX
@pytest.mark.parametrize("case", ["open to others", "another name", "missing"])
def test_a_folder_that_is_no_clients_is_refused(tmp_path, case):
    folder = tmp_path / ("data" if case == "another name" else f"{FOLDER_PREFIX}x")
    if case != "missing":
        folder.mkdir()
        folder.chmod(0o755 if case == "open to others" else 0o700)
    done = subprocess.run(command(sys.executable, folder), cwd=working_folder(), capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and b"started by its client" in done.stderr and b"hello" not in done.stdout


# ---------------------------------------------------------------------------------------------------------- bad Pythons


@POSIX
def test_another_protocol_is_refused_by_the_client(tmp_path):
    shutil.copytree(
        working_folder() / "UNetSegmentationLib", tmp_path / "UNetSegmentationLib", ignore=shutil.ignore_patterns("__pycache__")
    )
    protocol = tmp_path / "UNetSegmentationLib" / "worker" / "protocol.py"
    protocol.write_text(protocol.read_text("utf-8").replace(f"PROTOCOL = {PROTOCOL}\n", "PROTOCOL = 99\n"), "utf-8")
    python = script(tmp_path / "python", f"""cd "{tmp_path}"; PYTHONPATH= exec "{sys.executable}" "$@"\n""")
    with WorkerClient(python) as client:
        with pytest.raises(WorkerError, match=f"protocol 99 and its client {PROTOCOL}; reinstall") as e:
            client.start()
        assert e.value.kind == "user" and client.pid is None


def test_another_protocol_is_refused_by_the_worker(private):
    worker = Raw(private, greet=False)
    try:
        assert "reinstall" in worker.ask(op="ping", id=1)["error"]
        answer = worker.ask(op="hello", protocol=99)
        assert answer["kind"] == "user" and f"protocol {PROTOCOL} and its client 99; reinstall" in answer["error"]
        assert "reinstall" in worker.ask(op="ping", id=2)["error"]
    finally:
        worker.close()


@POSIX
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo 'cannot find libpython' >&2; exit 3", "cannot run the worker .*libpython"),
        ("exit 3", "exit code 3"),
        ("kill -9 $$", "memory"),
        (f'PYTHONPATH= exec "{sys.executable}" -S "$@"', "lacks the package numpy"),
    ],
)
def test_a_python_that_cannot_run_the_worker(tmp_path, text, words):
    with WorkerClient(script(tmp_path / "python", text + "\n")) as client:
        with pytest.raises(WorkerError, match=words):
            client.start()


@POSIX
def test_a_launcher_between_changes_nothing(launcher, image, make_package, forever):
    with WorkerClient(launcher) as client:
        volume = client.load_volume(image)
        assert client.predict(volume, [make_package()], QUICK).labels.array.any()
        worker = client.session.pid
        assert worker != client.pid and alive(worker)
        with pytest.raises(WorkerError, match="memory"):
            client.predict(volume, [forever], QUICK, progress=lambda *a: os.kill(client.session.pid, signal.SIGKILL))
        with pytest.raises(WorkerError, match="memory"):
            client.predict(volume, [forever], QUICK, progress=lambda *a: os.kill(client.pid, signal.SIGKILL))
        last = client.session.pid
        assert client.predict(volume, [make_package()], QUICK).labels.array.any()
        until(lambda: not alive(last), "the end of the worker whose launcher was killed")


def test_slicers_python_is_found_from_within_slicer(monkeypatch, tmp_path):
    assert find_python() == sys.executable
    monkeypatch.setattr(sys, "executable", str(tmp_path / "SlicerApp-real"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="PythonSlicer.* was not found; "):
        find_python()
    name = script(tmp_path / ("PythonSlicer.bat" if os.name == "nt" else "PythonSlicer"), "")
    assert os.path.samefile(find_python(), name)


@POSIX
def test_a_folder_of_any_name_gets_past_slicers_launcher(monkeypatch, tmp_path, launcher, image, make_package):
    place = tmp_path / "Jörg 世界"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with WorkerClient(launcher) as client:
        assert client.predict(client.load_volume(image), [make_package()], QUICK).labels.array.any()
        assert client.folder.parent == place


@pytest.mark.parametrize("text", ["", "a b", "C:\\Jörg\\x.nii", "世界", "\udcfc", "escaped:x", "two\nlines ü"])
def test_arguments_come_back_from_ascii(text):
    assert all(a.isascii() for a in escape_arguments([text])) and unescape_arguments(escape_arguments([text, "-m"])) == [text, "-m"]


def test_variables_of_windows_have_one_case(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert child_environment("python", {"Path": "C:/bin"})["Path"] == "C:/bin"
    monkeypatch.setattr(sys, "platform", "win32")
    out = child_environment("python", {"Path": "C:/bin", "SystemRoot": "C:/Windows", "UNETSEG_X": "1"})
    assert (out["PATH"], out["SYSTEMROOT"], out["UNETSEG_X"]) == ("C:/bin", "C:/Windows", "1") and "Path" not in out


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="temporary folder cannot be written .*; free"):
        new_folder()


@pytest.mark.parametrize(
    ("code", "log", "greeted", "launched", "kind", "words"),
    [
        (-9, "", True, False, "memory", "by the system, probably because memory ran out"),
        (137, "", True, False, "memory", "by the system"),
        (0xC0000017, "", True, False, "memory", "by the system"),
        (0xC000012D, "", True, False, "memory", "by the system"),
        (-11, "", True, False, "worker", r"crashed \(signal 11\)"),
        (1, "[python-real] exit abnormally", True, True, "memory", "by the system"),
        (1, "Fatal Python error: Aborted\n...", True, True, "worker", "exit code 1"),
        (0xC0000005, "", True, False, "worker", "exit code 3221225477"),
        (0xC0000005 - (1 << 32), "", True, False, "worker", "exit code 3221225477"),  # as Qt gives it
        (0xC0000017 - (1 << 32), "", True, False, "memory", "by the system"),
        (0xC0000135 - (1 << 32), "no python312.dll\n", False, False, "worker", "cannot run the worker .no python312.dll"),
        (1, "Windows fatal exception: access violation\n...", True, True, "worker", "exit code 1"),
        (127, "error\nno libpython\n", False, False, "worker", "cannot run the worker .no libpython"),
        (3, "", False, False, "worker", "exit code 3"),
        (-9, "", False, False, "memory", "by the system"),
    ],
)
def test_the_end_of_a_worker_in_one_sentence(code, log, greeted, launched, kind, words):
    error = ending(code, "/opt/python", log, greeted, launched)
    with pytest.raises(WorkerError, match=words):
        raise error
    assert error.kind == kind and str(error).endswith(".") and "; " in str(error) and "draw" not in str(error)  # clicks have no ROI


def test_a_python_that_is_not_there(tmp_path):
    with WorkerClient(str(tmp_path / "python")) as client:
        with pytest.raises(WorkerError, match="cannot be started.*choose another Python"):
            client.start()


def test_what_libraries_print_does_no_harm(tmp_path, image, make_package):
    environment = stub(tmp_path, "sitecustomize", NOISE)
    model = make_package()
    with WorkerClient(environment=environment) as client:
        volume = client.load_volume(image)
        for _ in range(3):
            assert_same(client.predict(volume, [model], QUICK), predict(image, [model], QUICK))
        until(lambda: len(client.log) == 64 << 10, "the log to be full")


def test_a_missing_library_is_named(tmp_path, image, make_package):
    with WorkerClient(environment=stub(tmp_path, "onnxruntime", MISSING_DLL)) as client:
        volume = client.load_volume(image)
        with pytest.raises(WorkerError, match="package onnxruntime cannot be loaded .*install it again") as e:
            client.predict(volume, [make_package()], QUICK)
        assert e.value.kind == "user"
        assert client.ping()["volumes"] == [volume]
        until(lambda: "Traceback" in client.log, "the log, which another thread reads")


def test_too_little_memory_is_a_sentence(client, tmp_path, image, make_package):
    model = greedy_package(tmp_path)
    volume = client.load_volume(image)
    pid = client.start()["pid"]
    client.predict(volume, [make_package()], QUICK)
    assert client.ping()["engines"] == 1
    with pytest.raises(WorkerError, match="not enough memory; .*smaller") as e:
        client.predict(volume, [model], QUICK)
    assert e.value.kind == "memory"
    assert client.ping()["engines"] == client.ping()["models"] == 0  # what was kept for a next time makes room
    assert client.predict(volume, [make_package()], QUICK).labels.array.any() and client.pid == pid


# --------------------------------------------------------------------------------------------------------- bad requests


def test_bad_input_is_the_sentence_of_predict(client, tmp_path, image, make_package):
    model = make_package()
    bad = tmp_path / "bad.unet.zip"
    bad.write_bytes(model.path.read_bytes()[:-100])
    holes = image.like(np.where(image.array == 2, np.nan, image.array).astype(np.float32))
    cases = [
        (image, [tmp_path / "none.unet.zip"], QUICK),
        (image, [bad], QUICK),
        (image, [], QUICK),
        (holes, [model], QUICK),
        (image, [make_package(channels=["a", "b"])], QUICK),
        (image, [model], replace(QUICK, roi=Box((90, 0, 0), (99, 9, 9)))),
        (image, [model], replace(QUICK, at=(9e9, 0.0, 0.0))),
        (image, [model], replace(QUICK, at=(float("nan"), 0.0, 0.0))),
        (image, [model], replace(QUICK, overlap=2.0)),
        (image, [model], replace(QUICK, engine="magic")),
    ]
    from UNetSegmentationLib.model import ModelPackage

    for picture, models, options in cases:
        with pytest.raises(UserError) as direct:
            predict(picture, [m if isinstance(m, ModelPackage) else ModelPackage.read(m) for m in models], options)
        volume = client.load_volume(picture)
        with pytest.raises(UserError) as through:
            client.predict(volume, models, options)
        assert str(through.value) == str(direct.value)
    for options, words in (
        (replace(QUICK, overlap=float("nan")), "finite"),
        (replace(QUICK, batch=0), "batch"),
        (replace(QUICK, intensity={"mode": "window", "level": 1}), "lacks width"),
        (replace(QUICK, intensity={"mode": "magic"}), "must be one of"),
    ):
        with pytest.raises(UserError, match=words):
            client.predict(volume, [model], options)
    with pytest.raises(UserError, match="spacing"):
        client.load_volume(replace(image, spacing=(0.0, 1.0, 1.0)))
    with pytest.raises(UserError, match="not numbers"):
        client.load_volume(Image(np.full((2, 2, 2), None)))
    assert client.predict(volume, [model], QUICK).labels.array.any() and client.ping()["engines_made"] <= 4
    assert client.start()["pid"] == client.pid and not list(client.folder.glob("result-*"))


def test_nonsense_is_answered_and_survived(raw, private, image, make_package):
    np.save(private / "volume-1.npy", image.array)
    np.save(private / "volume-2.npy", np.array([{}], object), allow_pickle=True)
    (private / "volume-3.npy").write_bytes((private / "volume-1.npy").read_bytes()[:500])
    np.save(private / "volume-4.npy", np.zeros(5))
    np.save(private.parent / "volume-5.npy", image.array)
    os.symlink(private.parent / "volume-5.npy", private / "volume-6.npy")
    geometry = {"spacing": [1, 1, 1], "origin": [0, 0, 0], "direction": [1, 0, 0, 0, 1, 0, 0, 0, 1], "source": None}
    load = {"op": "load_volume", "id": 7, "volume": 1, "file": "volume-1.npy", "geometry": geometry}
    run = {"op": "predict", "id": 8, "volume": 1, "models": [str(make_package().path)], "options": {"engine": "onnx"}}
    run |= {"measures": False, "keep": False}
    lines = [b"\xff\xfe", b"hello", b"[1]", b'"x"', b"{}", b'{"op": 3}', b'{"op": "explode", "id": 1}', b'{"op": "ping"}', b"[" * 100_000]
    lines += [b'{"op": "ping", "id": true}', b'{"op": "ping", "id": NaN}', b'{"op": "cancel", "id": 1}', b'{"op": "predict", "id": 5}']
    lines += [b'{"op": "ping", "id": 1, "x": "' + b"x" * MAX_LINE + b'"}']
    lines += [json.dumps({**load, "file": f}).encode() for f in ("volume-2.npy", "volume-3.npy", "volume-4.npy", "volume-6.npy")]
    lines += [
        json.dumps({**load, "file": f}).encode() for f in ("../volume-5.npy", "volume-9.npy", str(private / "volume-1.npy"), "", None)
    ]
    for bad in ({"spacing": [1, 1]}, {"spacing": [0, 1, 1]}, {"origin": ["a", 0, 0]}, {"direction": [1] * 9}, {"source": 3}):
        lines.append(json.dumps({**load, "geometry": {**geometry, **bad}}).encode())
    for bad in (
        {"volume": 99},
        {"models": "x"},
        {"models": [3]},
        {"options": None},
        {"measures": 1},
        {"keep": 1},
        {"options": {"evil": 1}},
    ):
        lines.append(json.dumps({**run, **bad}).encode())
    for bad in ({"roi": [1]}, {"roi": [[1, 2], [3, 4]]}, {"at": [1]}, {"batch": "4"}, {"batch": 10**9}, {"tta": 3}, {"intensity": 3}):
        lines.append(json.dumps({**run, "options": bad}).encode())
    for line in lines:
        raw.write(line + b"\n")
        answer = raw.next()
        assert answer["event"] == "error" and answer["error"].endswith(".") and answer["kind"] in ("user", "internal"), line[:200]
        assert "unexpectedly" not in answer["error"] and "Something" not in answer["error"], line[:200]
    assert raw.ask(**load)["event"] == "done" and raw.ask(**run)["event"] == "result"
    raw.say(op="shutdown")
    assert raw.process.wait(DEADLINE) == 0 and private.exists()  # the folder is the client's


def test_a_volume_that_could_not_be_read_is_read_when_it_can_be(raw, private, image, make_package):
    message = complete(protocol.encode_image(image, private, 1))
    click = {"op": "predict", "volume": 1, "models": [str(make_package().path)], "options": {}, "measures": False, "keep": False}
    assert raw.ask(op="load_volume", id=1, **message)["event"] == "done"
    (private / "volume-1.npy").rename(private / "away")
    moved = {**message, "geometry": {**message["geometry"], "origin": [1.0, 2.0, 3.0]}}
    assert raw.ask(op="load_volume", id=2, **moved)["event"] == "error"
    answer = raw.ask(id=3, **click)  # neither where the volume lay before, nor a sentence that says nothing
    assert answer["event"] == "error" and "volume-1.npy cannot be read" in answer["error"]
    (private / "away").rename(private / "volume-1.npy")
    assert raw.ask(id=4, **click)["event"] == "result"


def test_a_volume_whose_file_was_cleared_away_is_written_again(client, image, make_package):
    model = make_package().path
    volume = client.load_volume(image)
    before = client.predict(volume, [model])
    (client.folder / f"volume-{volume}.npy").unlink()
    assert client.session.place_volume(volume, image) is None
    os.kill(client.pid, signal.SIGTERM)
    until(lambda: client.pid is None, "the end of the worker")
    assert_same(before, client.predict(volume, [model]))
    (client.folder / f"volume-{volume}.npy").unlink()
    os.kill(client.pid, signal.SIGTERM)
    until(lambda: client.pid is None, "the end of the worker")
    with pytest.raises(UserError, match="The system has tidied away the temporary copy of this volume; load it again"):
        client.predict(volume, [model])
    assert_same(before, client.predict(client.load_volume(image), [model]))


# ------------------------------------------------------------------------------------------------- without any process


def test_lines_come_whole_however_they_are_cut():
    stream = b'{"a": 1}\n\n  \r\n{"b": "' + b"x" * 100 + b'"}\n' + b"y" * (MAX_LINE + 5) + b'\n{"c": 3}\n{"unfinished'
    expected = [b'{"a": 1}', b'{"b": "' + b"x" * 100 + b'"}', None, b'{"c": 3}']
    assert Lines().feed(stream) == expected
    for step in (1 << 16, 999_983):
        lines = Lines()
        assert [line for i in range(0, len(stream), step) for line in lines.feed(stream[i : i + step])] == expected
    small = stream[:200]
    lines = Lines()
    assert [line for i in range(len(small)) for line in lines.feed(small[i : i + 1])] == expected[:2]


def test_session_judges_what_it_hears(tmp_path):
    session = Session(tmp_path)
    assert json.loads(session.connect()) == {"op": "hello", "protocol": PROTOCOL}
    assert session.feed(b'{"event": "starting", "pid": 0}\n{"event": "starting", "pid": -1}\n') == [] and session.pid is None
    assert session.feed(b"banner\n{}\n") == [] and session.hello is None
    assert [e.kind for e in session.feed(json.dumps({"event": "hello", "protocol": PROTOCOL, "pid": 7}).encode() + b"\n")] == ["hello"]
    assert session.pid == 7
    for line in (
        b"noise",
        b"{}",
        b'{"event": "x"}',
        b'{"event": "progress", "id": 1}',
        b'{"event": "done", "id": "1"}',
        b'{"event": "error", "id": 1}',
    ):
        (event,) = session.feed(line + b"\n")
        assert event.kind == "fatal" and "unintelligible" in str(event.error()) and event.error().kind == "worker"
    (event,) = session.feed(b'{"event": "result", "id": 5, "arrays": {}}\n')
    with pytest.raises(WorkerError, match="not valid .*reinstall"):
        complete(session.result(event))
    session.connect()
    assert session.hello is None


def test_a_result_that_does_not_fit_is_refused(tmp_path, image):
    session = Session(tmp_path)
    volume = complete(session.add_volume(image))
    number, line = session.predict(volume, ["model.unet.zip"])
    assert [json.loads(part)["op"] for part in line.splitlines()] == ["load_volume", "predict"]
    np.save(tmp_path / "result-1-labels.npy", np.ones((2, 2, 2), np.uint8))
    np.save(tmp_path / "result-1-wide.npy", np.ones((2, 2, 2), np.float64))
    good = {"file": "result-1-labels.npy", "box": [[0, 0, 0], [2, 2, 2]], "dtype": "uint8", "shape": [12, 40, 44]}
    rest = {"label_defs": [], "model_name": "m", "roi": [[0, 0, 0], [1, 1, 1]], "engines": [], "warnings": [], "seconds": 1.0, "tiles": 1}
    rest |= {"kept": ""}
    for bad in (
        {"box": [[0, 0, 0], [2, 2, 3]]},
        {"box": [[0, 0, -1], [2, 2, 1]]},
        {"box": [[11, 0, 0], [13, 2, 2]]},
        {"dtype": "object"},
        {"dtype": "uint16"},
        {"shape": [10**9, 12, 40, 44]},
        {"file": "result-1-wide.npy"},
        {"file": f"volume-{volume}.npy"},
        {"file": "../result-1-labels.npy"},
        {"file": 3},
    ):
        message = {"event": "result", "id": number, "arrays": {"labels": {**good, **bad}}, **rest}
        (event,) = session.feed(json.dumps(message).encode() + b"\n")
        with pytest.raises(WorkerError, match="not valid"):
            complete(session.result(event))
    assert (tmp_path / f"volume-{volume}.npy").exists()
    (event,) = session.feed(json.dumps({"event": "result", "id": number, "arrays": {"labels": good}, **rest}).encode() + b"\n")
    labels = complete(session.result(event)).labels
    assert labels.array.sum() == 8 and labels.same_grid(image) and not (tmp_path / "result-1-labels.npy").exists()


def test_a_result_that_another_program_reads_is_read_all_the_same(tmp_path, image, monkeypatch):
    """As a virus scanner on Windows does, just when it was written."""

    def refused(*arguments):
        raise PermissionError

    monkeypatch.setattr(protocol, "_CUT", 10)
    monkeypatch.setattr(os, "truncate", refused)
    complete(save_array(tmp_path, "result-1-labels.npy", np.ones((2, 2, 2), np.uint8)))
    entry = {"file": "result-1-labels.npy", "box": [[0, 0, 0], [2, 2, 2]], "dtype": "uint8", "shape": list(image.shape)}
    assert complete(protocol._decode_array({"labels": entry}, "labels", tmp_path, image)).sum() == 8


def test_an_array_waits_for_its_name(tmp_path, busy_file):
    complete(save_array(tmp_path, "volume-1.npy", np.ones((2, 2, 2), np.uint8)))
    assert len(busy_file) == 3 and load_array(tmp_path, "volume-1.npy").sum() == 8


def some_arrays():
    rng = np.random.default_rng(5)
    plain = rng.integers(-1000, 1000, (7, 20, 30), np.int16)
    colours = rng.random((7, 20, 30, 3), np.float32)
    return {
        "plain": plain,
        "fortran": np.asfortranarray(plain),
        "reversed": plain[::-1, :, ::-1],
        "permuted": plain.transpose(1, 0, 2),
        "part": plain[2:5, 3:, ::2],
        "channels": np.moveaxis(colours, -1, 0),
        "bool": plain > 0,
        "big endian": plain.astype(">f8"),
        "one voxel": plain[:1, :1, :1],
    }


@pytest.mark.parametrize("case", some_arrays())
@pytest.mark.parametrize("piece", [1, 1000, 1 << 20])
def test_arrays_travel_in_pieces(tmp_path, monkeypatch, case, piece):
    monkeypatch.setattr(protocol, "_PIECE", piece)
    array, name = some_arrays()[case], "volume-1.npy"
    steps = save_array(tmp_path, name, array)
    count = 0
    for _ in steps:
        count += 1
        assert not (tmp_path / name).exists()
    assert count >= array.nbytes / max(piece, array.itemsize) and [p.name for p in tmp_path.iterdir()] == [name]
    assert np.array_equal(load_array(tmp_path, name), array) and load_array(tmp_path, name).dtype == array.dtype
    assert np.array_equal(np.load(tmp_path / name), array)
    complete(save_array(tmp_path, name, np.ascontiguousarray(array)))
    whole = np.zeros([n + 2 for n in array.shape], array.dtype)
    inside = whole[tuple(slice(1, -1) for _ in array.shape)]
    complete(fill_array(tmp_path, name, inside))
    assert np.array_equal(inside, array) and np.count_nonzero(whole) == np.count_nonzero(array)


def test_an_array_that_was_not_written_to_its_end_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "_PIECE", 1000)
    array = np.ones((10, 30, 30), np.int16)
    steps = save_array(tmp_path, "volume-1.npy", array)
    next(steps)
    assert [p.name for p in tmp_path.iterdir()] == ["volume-1.npy.part"]
    steps.close()
    assert not list(tmp_path.iterdir())
    (tmp_path / "volume-2.npy.part").write_bytes(b"of a client that was killed")
    protocol.remove_files(tmp_path)
    assert not list(tmp_path.iterdir())


@POSIX
def test_a_full_disk_is_a_sentence(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(UserError, match=r"temporary folder .* cannot hold the volume \(.*\); free some disk space"):
            complete(save_array(tmp_path, "volume-1.npy", np.zeros((40, 300, 300), np.int16)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_array_that_is_not_what_was_announced_is_refused(tmp_path):
    name, target = "result-1-labels.npy", np.zeros((4, 5, 6), np.float32)
    complete(save_array(tmp_path, name, target))
    whole = (tmp_path / name).read_bytes()
    for content in (b"", whole[:5], whole[:100], whole[:-1], whole.replace(b"NUMPY\x01", b"NUMPY\x03"), whole.replace(b"<f4", b"|O8")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ProtocolError):
            complete(fill_array(tmp_path, name, target))
    for other in (target.astype(np.int32), target[:3], np.asfortranarray(target + 1)):
        complete(save_array(tmp_path, name, other))
        with pytest.raises(ProtocolError, match="announced"):
            complete(fill_array(tmp_path, name, target))
    with pytest.raises(ProtocolError):
        complete(fill_array(tmp_path, "../other.npy", target))


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "result-1-labels.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(ProtocolError):
        load_array(tmp_path, "result-1-labels.npy")
    with pytest.raises(ProtocolError):
        complete(fill_array(tmp_path, "result-1-labels.npy", np.zeros(1, object)))
    with pytest.raises(ProtocolError):
        decode_options({"__class__": "os.system"})
