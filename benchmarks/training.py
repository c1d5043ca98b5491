"""Dice after equal minutes of training: ours, MONAI's recipes for BasicUNet and DynUNet, and nnU-Net v2, on one fold.

    .venv/bin/python benchmarks/training.py DATA --minutes 30                          all rows, a table at the end
    .venv/bin/python benchmarks/training.py DATA --minutes 30 --row nnunetv2           one row, added to the table; a row that is
                                                                                       there is not run again without --again

DATA: a folder that unetseg-train reads, e.g. $UNETSEG_DATA/msd_hippocampus. Every row trains on the same cases of the same
patient-wise fold for the same wall-clock minutes on the same machine, one after the other, each in a process of its own;
planning and pre-processing come before and are told apart. All predictions are scored on the images' own grids by the same
function (unetseg_training.metrics). Peak memory is that of the row's largest process, or of the GPU where there is one.

    ours          unetseg-train's own plan for these minutes
    basicunet     monai.networks.nets.BasicUNet, the transforms of MONAI's spleen tutorial, Dice + cross-entropy; AdamW from
                  1e-3 by a cosine over the minutes (the tutorial's Adam at 1e-4 is far from done in minutes)
    dynunet       monai.networks.nets.DynUNet with deep supervision, SGD with Nesterov momentum 0.99 from 0.01, polynomial
                  decay over the minutes: MONAI's DynUNet pipeline
    nnunetv2      nnU-Net v2 as it is, 3d_fullres, its own plans, augmentation and mirroring when it predicts; its schedule runs
                  over the minutes instead of 1000 epochs. Installed into WORK/venv, with this environment's PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from UNetSegmentationLib.files import write_text

ROOT = Path(__file__).resolve().parents[1]
ROWS = ("ours", "basicunet", "dynunet", "nnunetv2")
NNUNET = "nnunetv2==2.8.1"

# nnU-Net's own command would import every trainer there is to find this one, and with them libraries that not each PyTorch has.
TRAINER = '''
import json, os, sys, time
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class MinutesTrainer(nnUNetTrainer):
    """nnU-Net's trainer whose schedule runs over wall-clock minutes. Everything else is as it is."""

    def run_training(self):
        self.num_val_iterations_per_epoch = 2
        self.on_train_start()
        seconds, began, steps, done = 60 * float(os.environ["BENCHMARK_MINUTES"]), time.monotonic(), 0, 0.0
        while done < 1:
            self.on_epoch_start()
            self.on_train_epoch_start()
            losses = []
            for _ in range(self.num_iterations_per_epoch):
                done = (time.monotonic() - began) / seconds
                if done >= 1 and losses:
                    break
                for group in self.optimizer.param_groups:
                    group["lr"] = self.initial_lr * max(0.0, 1 - done) ** 0.9
                losses.append(self.train_step(next(self.dataloader_train)))
                steps += 1
            self.on_train_epoch_end(losses)
            self.on_validation_epoch_start()
            with torch.no_grad():
                scores = [self.validation_step(next(self.dataloader_val)) for _ in range(self.num_val_iterations_per_epoch)]
            self.on_validation_epoch_end(scores)
            self.on_epoch_end()
        spent = time.monotonic() - began
        gpu = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        with open(os.environ["BENCHMARK_FACTS"], "w") as f:
            parameters = sum(p.numel() for p in self.network.parameters())
            json.dump({"steps": steps, "train_seconds": spent, "gpu_bytes": gpu, "parameters": parameters}, f)
        self.on_train_end()


if __name__ == "__main__":
    folder, device = sys.argv[1:]
    plans, facts = (json.load(open(os.path.join(folder, n + ".json"))) for n in ("nnUNetPlans", "dataset"))
    trainer = MinutesTrainer({**plans, "continue_training": False}, "3d_fullres", 0, facts, torch.device(device))
    trainer.run_training()
    trainer.perform_actual_validation()
'''


def cases(options: argparse.Namespace) -> tuple[Any, list[Any], list[Any], Any]:
    """(case set, training cases, held-out cases, our planned config): the same for all rows."""
    from unetseg_training.cases import find_cases
    from unetseg_training.plan import plan
    from unetseg_training.train import held_out

    case_set = find_cases(options.data)
    names = [name.strip() for name in options.names.split(",")] if options.names else []
    if len(names) not in (0, len(case_set.labels)):
        raise SystemExit(f"{options.data} has {len(case_set.labels)} labels; give as many --names.")
    case_set.labels = tuple(replace(label, name=name) for label, name in zip(case_set.labels, names)) or case_set.labels
    quick = options.minutes < 20  # as --quick plans: small batches, few epochs
    config = plan(case_set, options.data, quick=quick, minutes=options.minutes, measure=options.row == "ours").config
    train, check = held_out(case_set.annotated, config, options.fold)
    return case_set, train, check[: options.cases or len(check)], config


# --------------------------------------------------------------------------------------------------------------- rows


def ours(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train by our own plan, and predict with predict(), as a package would."""
    import torch
    from unetseg_training import metrics
    from unetseg_training.live import read
    from unetseg_training.prepare import prepare
    from unetseg_training.train import LiveEngine, live_package, train
    from unetseg_training.watch import callbacks

    began = time.monotonic()
    case_set, training, check, config = cases(options)
    config = config.model_copy(update={"fit": config.fit.model_copy(update={"minutes": options.minutes})})
    prepare(case_set, config, work / "cache", training, None)
    prepared, began = time.monotonic() - began, time.monotonic()
    folder = work / "run"
    result = train(
        config, folder, case_set, fold=options.fold, cache=work / "cache", resume=False, callbacks=callbacks(folder, config, bar=False)
    )
    spent = time.monotonic() - began
    items = list(metrics.case_items(case_set, check))
    rows = metrics.evaluate(live_package(config.card()), items, labels=case_set.labels, auc=False, engine=LiveEngine(result.network))
    steps = max((line.get("step", 0) for line in read(folder / "live.jsonl")), default=0)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    parameters = sum(p.numel() for p in result.network.parameters())
    facts = {"steps": steps, "train_seconds": spent, "prepare_seconds": prepared, "gpu_bytes": gpu, "parameters": parameters}
    return facts | {"rows": rows}


def monai_recipe(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """MONAI's transforms, patches and sliding-window inference, and one of its networks."""
    import numpy as np
    import torch
    from monai import transforms as t
    from monai.inferers import sliding_window_inference
    from monai.losses import DeepSupervisionLoss, DiceCELoss
    from monai.networks.nets import BasicUNet, DynUNet
    from monai.utils import set_determinism
    from unetseg_training import metrics
    from unetseg_training.train import precision_here

    began = time.monotonic()
    case_set, training, check, config = cases(options)
    set_determinism(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Where bf16 is emulated (a CPU with AVX2 only), BasicUNet's first step took eleven minutes in it.
    reduced = precision_here(config.fit) != "32"
    if config.input.dimensions != 3:
        raise SystemExit("MONAI's recipes here are for 3D; name a dataset of volumes.")
    # Both pool at most four times: patches of multiples of 16.
    patch = [max(16, math.ceil(p / 16) * 16) for p in config.input.patch]
    spacing = [s or float(np.median([case_set.image(c).spacing[i] for c in training[:20]])) for i, s in enumerate(config.input.spacing)][
        ::-1
    ]
    classes, channels = len(case_set.labels) + 1, len(case_set.channels)
    normal = t.NormalizeIntensityd("image", channel_wise=True)
    if config.input.intensity["mode"] in ("window", "ct-foreground"):
        normal = t.ScaleIntensityRanged("image", -1000, 1000, 0, 1, clip=True)  # CT in HU

    def read(case: Any) -> dict[str, Any]:
        from monai.data import MetaTensor

        image, truth = case_set.load(case)
        affine = torch.diag(torch.tensor([*image.spacing[::-1], 1.0], dtype=torch.float64))
        x = MetaTensor(torch.from_numpy(image.channels.astype(np.float32)), affine=affine)
        return {"image": x, "label": MetaTensor(torch.from_numpy(truth[None].astype(np.float32)), affine=affine)}

    both = ["image", "label"]
    spaced, padded = t.Compose([t.Spacingd(both, pixdim=spacing, mode=("bilinear", "nearest")), normal]), t.SpatialPadd(both, patch)
    moving = t.Compose([
        t.RandCropByPosNegLabeld(["image", "label"], "label", patch, pos=1, neg=1, num_samples=1),
        *(t.RandFlipd(["image", "label"], prob=0.5, spatial_axis=a) for a in range(3)),
        t.RandRotated(["image", "label"], 0.26, 0.26, 0.26, prob=0.2, mode=("bilinear", "nearest"), padding_mode="border"),
        t.RandZoomd(["image", "label"], prob=0.2, min_zoom=0.9, max_zoom=1.1, mode=("trilinear", "nearest"), padding_mode="edge"),
        t.RandGaussianNoised("image", prob=0.15, std=0.1),
        t.RandScaleIntensityd("image", 0.1, prob=0.5),
        t.RandShiftIntensityd("image", 0.1, prob=0.5),
    ])  # fmt: skip
    ready = [padded(spaced(read(case))) for case in training]
    deep = options.row == "dynunet"
    model: torch.nn.Module
    if deep:
        levels = min(5, 1 + int(math.log2(min(patch) / 4)))
        kernels, strides = [[3] * 3] * levels, [[1] * 3] + [[2] * 3] * (levels - 1)
        model = DynUNet(3, channels, classes, kernels, strides, strides[1:], deep_supervision=True, deep_supr_num=max(1, levels - 2))
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.99, weight_decay=3e-5, nesterov=True)
    else:
        model = BasicUNet(3, channels, classes)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.to(device)
    loss_of: Any = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    if deep:
        loss_of = DeepSupervisionLoss(loss_of, "exp")
    batch = config.fit.batch
    prepared, began, steps, done = time.monotonic() - began, time.monotonic(), 0, 0.0
    rng = np.random.default_rng(0)
    while done < 1:
        drawn = [moving(ready[i])[0] for i in rng.integers(len(ready), size=batch)]
        x, y = (torch.stack([d[key].as_tensor() for d in drawn]).to(device) for key in ("image", "label"))
        rate = 0.01 * (1 - done) ** 0.9 if deep else 1e-6 + 0.5 * 1e-3 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
            out = model.train()(x)
        out = [o.float() for o in out.unbind(1)] if deep else out.float()
        loss = loss_of(out, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12)
        optimizer.step()
        steps += 1
        done = min(1.0, (time.monotonic() - began) / (60 * options.minutes))
    spent = time.monotonic() - began
    rows = []
    model.eval()
    for case in check:
        image, truth = case_set.load(case)
        small = spaced(read(case))
        sizes = small["image"].shape[1:]
        x = padded(small)["image"].as_tensor()[None].to(device)
        with torch.no_grad():
            p = sliding_window_inference(x, patch, 4, model, overlap=0.5, mode="gaussian").float().softmax(1)
        # Back to the image's own grid, whose first voxel Spacingd keeps in its place.
        starts = [max(0, (n - m) // 2) for n, m in zip(patch, sizes)]
        p = p[(..., *(slice(a, a + n) for a, n in zip(starts, sizes)))]
        axes = [torch.arange(n) * s / w / max(1, m - 1) * 2 - 1 for n, s, w, m in zip(image.shape, image.spacing[::-1], spacing, sizes)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)[None].float().to(device)
        p = torch.nn.functional.grid_sample(p, grid, padding_mode="border", align_corners=True)
        found = p.argmax(1)[0].cpu().numpy()
        for name, row in metrics.score(found, truth, image.spacing, case_set.labels).items():
            rows.append({"case": case.name, "patient": case.patient, "label": name, **row})
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    parameters = sum(p.numel() for p in model.parameters())
    return {"steps": steps, "train_seconds": spent, "prepare_seconds": prepared, "gpu_bytes": gpu, "parameters": parameters, "rows": rows}


def nnunet(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """nnU-Net's own commands, in an environment of its own."""
    import torch
    from unetseg_training import metrics
    from UNetSegmentationLib.image import read_image, write_image

    python = make_venv(options.work / "venv")
    case_set, training, check, _ = cases(options)
    raw, name = work / "raw" / "Dataset001_Benchmark", "Dataset001_Benchmark"
    shutil.rmtree(work, ignore_errors=True)
    files: dict[str, str] = {}
    for i, case in enumerate([*training, *check]):
        files[case.name] = f"case_{i:04d}"
        image, truth = case_set.load(case)
        for c, channel in enumerate(image.channels):
            write_image(image.like(channel.astype("float32")), raw / "imagesTr" / f"case_{i:04d}_{c:04d}.nii.gz")
        write_image(image.like(truth), raw / "labelsTr" / f"case_{i:04d}.nii.gz")
    facts = {
        "channel_names": {str(i): name for i, name in enumerate(case_set.channels)},
        "labels": {"background": 0, **{label.name: label.value for label in case_set.labels}},
        "numTraining": len(files),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(facts), "utf-8")
    (work / "minutes_trainer.py").write_text(TRAINER, "utf-8")
    told = work / "facts.json"
    folders = {f"nnUNet_{k}": str(work / k) for k in ("raw", "preprocessed", "results")}
    environment = {**os.environ, **folders, "nnUNet_compile": "0", "nnUNet_def_n_proc": str(min(4, os.cpu_count() or 1))}
    environment |= {"BENCHMARK_MINUTES": str(options.minutes), "BENCHMARK_FACTS": str(told)}

    def run(command: Path, *arguments: str) -> None:
        subprocess.run([str(command), *arguments], env=environment, check=True, stdout=sys.stderr)

    plan = python.parent / ("nnUNetv2_plan_and_preprocess" + python.suffix)
    began = time.monotonic()
    run(plan, "-d", "1", "-c", "3d_fullres", "-np", "2", "-npfp", "2")
    split = [{"train": [files[c.name] for c in training], "val": [files[c.name] for c in check]}]
    (work / "preprocessed" / name / "splits_final.json").write_text(json.dumps(split), "utf-8")
    prepared = time.monotonic() - began
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run(python, str(work / "minutes_trainer.py"), str(work / "preprocessed" / name), device)
    found = work / "results" / name / "MinutesTrainer__nnUNetPlans__3d_fullres" / "fold_0" / "validation"
    rows = []
    for case in check:
        image, truth = case_set.load(case)
        prediction = read_image(found / f"{files[case.name]}.nii.gz").array.astype("uint8")
        for label, row in metrics.score(prediction, truth, image.spacing, case_set.labels).items():
            rows.append({"case": case.name, "patient": case.patient, "label": label, **row})
    return {**json.loads(told.read_text("utf-8")), "prepare_seconds": prepared, "rows": rows}


def make_venv(folder: Path) -> Path:
    """nnU-Net v2 in an environment of its own, which sees this one's packages behind its own (so PyTorch is the same)."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "ready").exists():
        venv.create(folder, clear=True, with_pip=True)
        query = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
        site = Path(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
        (site / "behind.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n", "utf-8")
        # Named again, or pip would fetch another PyTorch for the newest torchvision.
        torch = "torch==" + metadata.version("torch").split("+")[0]
        subprocess.run([str(python), "-m", "pip", "install", "-q", NNUNET, torch], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return python


# -------------------------------------------------------------------------------------------------------------- table


def run_row(options: argparse.Namespace) -> None:
    """One row, in this process, to WORK/<row>.json."""
    from unetseg_training import metrics

    work = options.work / options.row
    work.mkdir(parents=True, exist_ok=True)
    facts = {"ours": ours, "nnunetv2": nnunet}.get(options.row, monai_recipe)(options, work)
    rows = facts.pop("rows")
    facts |= {
        "row": options.row,
        "minutes": options.minutes,
        "fold": options.fold,
        "cases": options.cases,
        "peak_bytes": peak(),
        "summary": metrics.summary(rows),
    }
    facts |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "command": told(options, options.row)}
    write_text(options.work / f"{options.row}.json", json.dumps(facts, indent=1) + "\n")


def told(options: argparse.Namespace, row: str) -> str:
    """A row's command, without the folders of one machine."""
    words = ["benchmarks/training.py", f"$UNETSEG_DATA/{options.data.name}", f"--minutes {options.minutes:g}"]
    words += [f"--fold {options.fold}"] if options.fold else []
    words += [f"--cases {options.cases}"] if options.cases else []
    words += [f'--names "{options.names}"'] if options.names else []
    return " ".join([*words, f"--row {row}"])


def there(options: argparse.Namespace, row: str) -> dict[str, Any] | None:
    """A row that is there, of these data, names, minutes, fold and cases."""
    try:
        found = json.loads((options.work / f"{row}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("command") == told(options, row) else None


def peak() -> int:
    """Bytes of this process or of its largest child, whichever is more; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def table(options: argparse.Namespace) -> str:
    """Markdown of all rows that are there."""
    found = [row for name in ROWS if (row := there(options, name))]
    if not found:
        return "No row was run yet."
    labels = list(found[0]["summary"]["labels"])
    head = ["row", *(f"Dice {name} (95 %)" for name in labels), "minutes", "steps/s", "peak memory", "parameters", "preparing", "command"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    for row in found:
        dice = []
        for name in labels:
            d = row["summary"]["labels"][name]["dice"]
            dice.append(f"{d['mean']:.3f}" + (f" ({d['low']:.3f} to {d['high']:.3f})" if d["low"] is not None else ""))
        memory = f"{(row['gpu_bytes'] or row['peak_bytes']) / 1e9:.1f} GB{' GPU' if row['gpu_bytes'] else ''}"
        speed = f"{row['steps'] / row['train_seconds']:.2f}"
        cells = [row["row"], *dice, f"{row['train_seconds'] / 60:.1f}", speed, memory, f"{row['parameters'] / 1e6:.2f} M"]
        lines.append("| " + " | ".join([*cells, f"{row['prepare_seconds']:.0f} s", f"`{row['command']}`"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--cases", type=int, default=0, help="held-out cases to score; default all")
    parser.add_argument("--names", default="", help="names of the labels, where DATA has none: ours mirrors only where they allow it")
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--again", action="store_true", help="run rows that are there already")
    parser.add_argument("--table", type=Path, help="also write the table into this file")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark-training")
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.row:
        run_row(options)
    else:
        for row in ROWS:
            if there(options, row) and not options.again:
                print(f"{row} is there already; --again runs it anew.", file=sys.stderr)
                continue
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", row])
            if done.returncode:
                print(f"{row} failed; the others go on.", file=sys.stderr)
    text = table(options)
    print(text)
    if options.table:
        write_text(options.table, text + "\n")


if __name__ == "__main__":
    main()
