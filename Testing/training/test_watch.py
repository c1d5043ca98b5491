"""What a person sees of a running training: live.jsonl, curve.csv, TensorBoard, the bar; and that watching changes nothing."""

import csv
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
L = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
pytest.importorskip("rich", reason="Rich is not installed")
pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
from unetseg_training import live, report, watch  # noqa: E402
from unetseg_training.live import LiveFile  # noqa: E402
from UNetSegmentationLib.image import Image, reorient  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers


class Module(L.LightningModule):
    """A straight line whose "Dice" is what each validation is told to find."""

    def __init__(self, dice=(0.5, 0.7, 0.6), fails_at=None):
        super().__init__()
        self.line, self.dice, self.fails_at, self.count = torch.nn.Linear(1, 1), list(dice), fails_at, 0
        torch.nn.init.constant_(self.line.weight, 0.1)
        torch.nn.init.constant_(self.line.bias, 0.1)

    def training_step(self, batch, index):
        if self.global_step == self.fails_at:
            raise RuntimeError("the disk is full")
        x = batch[0]
        return {"loss": ((self.line(x) - 2 * x + torch.randn_like(x) * 0.01) ** 2).mean()}

    def validation_step(self, batch, index):
        pass

    def on_validation_epoch_end(self):
        a = self.dice[min(self.count, len(self.dice) - 1)]
        self.count += not self.trainer.sanity_checking
        self.log_dict({"dice": a, "dice/one": a + 0.1, "dice/two": a - 0.1})

    def examples(self):
        return EXAMPLES

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


TRUTH = np.zeros((8, 12, 16), np.uint8)
TRUTH[2:5, 3:8, 4:9] = 1
# As NIfTI files of heads lie: to the patient's right and front.
HEAD = Image(np.random.RandomState(0).rand(8, 12, 16), (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
EXAMPLES = [("case 1/2", HEAD, TRUTH, np.roll(TRUTH, 1, 2))]


def train(module, callbacks, epochs=3, checkpoint=None, **how):
    L.seed_everything(1, verbose=False)
    x = torch.linspace(-1, 1, 8)[:, None]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 2)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **how,
    )
    trainer.fit(module, data, data, ckpt_path=checkpoint)
    return trainer


def test_a_run_tells_what_it_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watch, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(watch, "PICTURE_SECONDS", 0.0)
    train(Module(), [watch.Watch(tmp_path, ["one", "two"])], num_sanity_val_steps=2)
    lines = live.read(tmp_path / "live.jsonl")
    assert [line["event"] for line in lines] == ["start", *(["step"] * 4 + ["validation"]) * 3, "end"]
    start, end = lines[0], lines[-1]
    assert start["format"] == 1 and start["labels"] == ["one", "two"] and start["steps"] == 12
    assert end["reason"] == "finished" and end["step"] == 12
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(line["loss"] > 0 and line["learning_rate"] == 0.05 and line["seconds_per_step"] > 0 for line in steps)
    assert steps[-1]["seconds_left"] == 0 and steps[5]["seconds_left"] is not None
    checks = [line for line in lines if line["event"] == "validation"]
    assert [line["dice"] for line in checks] == pytest.approx([0.5, 0.7, 0.6])
    assert checks[2]["best"] == {"dice": 0.7, "step": 8} and checks[2]["dice_per_class"] == pytest.approx({"one": 0.7, "two": 0.5})
    assert checks[0]["pictures"] == ["pictures/example-case_1_2.png"]
    # Upright, with the sides' letters where they are.
    upright, _ = reorient(HEAD)
    truth, found = (np.ascontiguousarray(m[:, ::-1, ::-1]) for m in EXAMPLES[0][2:])
    assert (tmp_path / checks[0]["pictures"][0]).read_bytes() == report.overlay(upright, truth, found, title="case 1/2, step 12")
    with open(tmp_path / "curve.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [r["step"] for r in rows] == ["4", "8", "12"] and float(rows[1]["dice two"]) == pytest.approx(0.6)
    out = capsys.readouterr().out
    assert "step 12  epoch 3  loss" in out and "Dice 0.600 (best 0.700 at step 8)" in out and "one 0.700, two 0.500" in out


def test_the_loss_is_of_a_batch_whatever_is_accumulated(tmp_path):
    first = []
    for together in (1, 4):
        train(Module(), [watch.Watch(tmp_path / str(together), ["one", "two"])], 1, accumulate_grad_batches=together)
        first.append(next(line["loss"] for line in live.read(tmp_path / str(together) / "live.jsonl") if line["event"] == "validation"))
    assert first[0] == pytest.approx(first[1], rel=0.25) and first[0] > 0


def test_tensorboard_holds_loss_dice_rate_and_pictures(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed")
    monkeypatch.setattr(watch, "STEP_SECONDS", 0.0)
    train(Module(), [watch.Watch(tmp_path, ["one", "two"])])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "learning rate", "dice/mean", "dice/one", "dice/two"}
    assert [round(e.value, 3) for e in events.Scalars("dice/one")] == [0.6, 0.8, 0.7]
    assert len(events.Scalars("loss")) == 12 and events.Tags()["images"] == ["examples/case 1/2"]


def test_tensorboard_shows_a_training_that_was_begun_anew_alone(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed")
    for dice in ((0.1, 0.2, 0.3), (0.5, 0.7)):
        train(Module(dice), [watch.Watch(tmp_path, ["one", "two"])], len(dice))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("dice/mean")] == [(4, 0.5), (8, 0.7)]


def test_watching_changes_nothing(tmp_path):
    watched, alone = Module(), Module()
    train(watched, [watch.Watch(tmp_path, ["one", "two"])])
    train(alone, [])
    assert torch.equal(watched.line.weight, alone.line.weight)


def test_a_resumed_run_goes_on_from_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "STEP_SECONDS", 0.0)
    trainer = train(Module((0.5, 0.8)), watch.callbacks(tmp_path), 2)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    LiveFile(tmp_path / "live.jsonl", 8).write("step", step=9, epoch=2, loss=9.9)  # after the checkpoint, then killed
    with (tmp_path / "live.jsonl").open("a") as f:
        f.write('{"event": "step", "ste')
    train(Module((0.6,)), watch.callbacks(tmp_path), 3, tmp_path / "c.ckpt")
    lines = live.read(tmp_path / "live.jsonl")
    steps = [line["step"] for line in lines if line["event"] == "step"]
    assert steps == list(range(1, 13)) and not any(line.get("loss") == 9.9 for line in lines)
    assert lines[-2]["best"] == {"dice": pytest.approx(0.8), "step": 8}
    with open(tmp_path / "curve.csv", newline="", encoding="utf-8") as f:
        assert [r["step"] for r in csv.DictReader(f)] == ["4", "8", "12"]


def test_the_loss_since_the_last_validation_is_kept_with_the_checkpoint(tmp_path, monkeypatch):
    """Of a run that is validated every second epoch and was stopped after the first."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(Module(), watch.callbacks(whole), 2, check_val_every_n_epoch=2)
    train(Module(), watch.callbacks(parts), 1, check_val_every_n_epoch=2).save_checkpoint(tmp_path / "c.ckpt")
    train(Module(), watch.callbacks(parts), 2, tmp_path / "c.ckpt", check_val_every_n_epoch=2)
    (one,), (other,) = ([line for line in live.read(f / "live.jsonl") if line["event"] == "validation"] for f in (whole, parts))
    assert one["step"] == other["step"] == 8 and one["loss"] == other["loss"]


def test_a_failure_and_a_stop_are_told(tmp_path):
    with pytest.raises(RuntimeError):
        train(Module(fails_at=5), watch.callbacks(tmp_path))
    end = live.read(tmp_path / "live.jsonl")[-1]
    assert end["reason"] == "failed" and "disk is full" in end["message"] and end["step"] == 5


def test_a_stop_by_the_person_and_an_early_end_are_told_apart(tmp_path):
    class Stops(L.Callback):
        def __init__(self, how):
            self.how = how

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                if self.how:
                    raise self.how
                trainer.should_stop = True

    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning's is to exit
        train(Module(), [*watch.callbacks(tmp_path / "a"), Stops(KeyboardInterrupt)])
    assert live.read(tmp_path / "a" / "live.jsonl")[-1]["reason"] == "stopped"
    train(Module(), [*watch.callbacks(tmp_path / "b"), Stops(None)], min_epochs=1)
    end = live.read(tmp_path / "b" / "live.jsonl")[-1]
    assert end["reason"] == "finished" and end["step"] == 4 and "after 1 of 3 epochs" in end["message"]


def test_what_cannot_be_written_ends_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "STEP_SECONDS", 0.0)
    (tmp_path / "curve.csv").mkdir()
    (tmp_path / "pictures").touch()

    class Fills(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                (tmp_path / "live.jsonl").unlink()
                (tmp_path / "live.jsonl").mkdir()

    assert train(Module(), [*watch.callbacks(tmp_path), Fills()]).global_step == 12
    assert not list(tmp_path.rglob(".unetseg-*"))


def test_accumulated_gradients_are_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "STEP_SECONDS", 0.0)
    train(Module(), watch.callbacks(tmp_path, tensorboard=False), accumulate_grad_batches=2)
    assert [line["step"] for line in live.read(tmp_path / "live.jsonl") if line["event"] == "step"] == list(range(1, 7))


def test_the_file_stays_bounded_and_whole(tmp_path):
    path = tmp_path / "live.jsonl"
    file = LiveFile(path, limit=20_000)
    file.write("start", step=0, epoch=0, format=1)
    for step in range(1, 2001):
        file.write("step", step=step, epoch=0, loss=1 / step, learning_rate=float("nan"))
        if step % 50 == 0:
            file.write("validation", step=step, epoch=0, dice=step / 2000, label="Läsion")
            assert path.stat().st_size <= 20_000
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]  # NaN would not be JSON
    assert lines == live.read(path) and lines[0]["event"] == "start" and lines[-2]["step"] == 2000
    assert len([line for line in lines if line["event"] == "validation"]) == 40
    steps = [line["step"] for line in lines if line["event"] == "step"]
    assert len(steps) > 30 and steps == sorted(steps) and steps[0] < 100
    assert lines[-2]["learning_rate"] is None


def test_reading_needs_no_whole_file(tmp_path):
    path = tmp_path / "live.jsonl"
    assert live.read(path) == []
    path.write_text('{"event": "start"}\nnonsense\n[1]\n{"event": "step", "st', "utf-8")
    assert live.read(path) == [{"event": "start"}]
