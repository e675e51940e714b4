"""A pretrained ViT on CIFAR-10: finetuned, pruned to parts of its MACs in several ways, finetuned again. One table.

    python benchmarks/finetuned.py --checkpoint deit_tiny_patch16_224.pth --images cifar10 --out runs/finetuned \
        --dense-epochs 6 --epochs 1 --train-images 10000
    python benchmarks/finetuned.py --table --out runs/finetuned

IMAGES/train/CLASS/IMAGE and IMAGES/test/CLASS/IMAGE are read whole, at `--image` pixels. For each seed the checkpoint
gets a new classifier and is finetuned: the dense model. Every method prunes that one to the same MACs, and what it
leaves is finetuned by the same recipe for the same epochs (`--epochs`), on the labels and on the dense model's answers.
All test images are counted before and after.

What differs between the methods is the pruning alone. NViT's loop trains while it prunes: these steps are taken out of
its epochs, and "pruned" is then its accuracy at the end of the loop. `scratch` has the widths of `one_shot` and new
weights. Which training images are taken depends on their names, not on the seed.

Finished cells are not repeated, and a training that was stopped goes on: call it again. `--table FILE` prints the table
of a results.json. Times are those of the machine at hand; "at least" where a cell was stopped in between.
"""

import argparse
import dataclasses
import datetime
import hashlib
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import nvit_jax as nvit
from nvit_jax.data.listing import list_folder
from nvit_jax.files import fingerprint, read_json, write_json
from nvit_jax.latency.timing import device_name
from nvit_jax.model import vit
from nvit_jax.pruning.ranking import group_sizes

METHODS = {  # what the table calls them
    "one_shot": "`one_shot`, the default of `nvit.prune`",
    "fisher": "`fisher` alone, without compensation",
    "nvit": "NViT's loop",
    "magnitude": "`magnitude`",
    "random": "`random`",
    "scratch": "widths of `one_shot`, new weights",
}
COLUMNS = ("method", "MACs", "parameters", "latency", "top-1 pruned", "top-1 finetuned", "seeds", "minutes")
RATIOS = (0.5, 0.3)
SCORED = 1024  # images that scores and compensation see, the same number for every method
TOGETHER = 64  # of them
LEARNING_RATE = 2e-4
AUGMENT = nvit.Augment(crop=0.6)  # and flips; CIFAR's objects fill the image
# The released engine prices with a V100's latencies. Its table is not ours to hand out: an estimate takes its place.
V100 = nvit.Roofline(tflops=15.7, gbs=900, batch=256, itemsize=4)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the table for one seed; the dense model has no ratio."""

    method: str
    ratio: float | None
    seed: int

    def place(self, out: Path) -> Path:
        """Where it keeps its files."""
        return out / str(self.seed) / (self.method if self.ratio is None else f"{self.method}_{self.ratio:g}")

    def __str__(self) -> str:
        return f"{self.method}{'' if self.ratio is None else f' {self.ratio:g}'}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all cells share."""

    options: argparse.Namespace
    start: nvit.Model  # the checkpoint for these images, with a classifier of zeros
    train: tuple[np.ndarray, np.ndarray]  # uint8 [n, image, image, channels], int32 [n]
    test: tuple[np.ndarray, np.ndarray]

    @property
    def per_epoch(self) -> int:
        """Training steps."""
        return len(self.train[1]) // self.options.batch

    @property
    def steps(self) -> int:
        """Training steps of a cell."""
        return round(self.options.epochs * self.per_epoch)

    @property
    def dense_steps(self) -> int:
        """Training steps of the dense model."""
        return round(self.options.dense_epochs * self.per_epoch)


def prepare(options: argparse.Namespace) -> Setup:
    """Read the checkpoint and the images."""
    train, test = options.images / "train", options.images / "test"
    classes = len(list_folder(train, "images").files)
    start = nvit.load(options.checkpoint, image=options.image, classes=classes, heads=options.heads)
    seen = start.info["preprocessing"] | {"resize": options.image}  # whole images: nothing is cut off
    start = dataclasses.replace(start, info=start.info | {"preprocessing": seen})
    data = nvit.load_dataset("folder", train=str(train), val=str(test), preprocessing=start.preprocessing)
    found = {}
    for name, count in (("train", options.train_images), ("val", options.test_images)):
        split = data.split(name)
        names = ["/".join(Path(split.source.name(i)).parts[-2:]) for i in range(len(split))]
        order = sorted(range(len(split)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
        chosen = split.take(np.array(order[:count]))
        print(f"reading {len(chosen):,} of {len(split):,} {name} images", flush=True)
        found[name] = chosen.read()
    if len(found["train"][1]) < options.batch:
        raise nvit.UserError(f"={options.batch}: there are {len(found['train'][1])} training images", "--batch")
    return Setup(options, start, found["train"], found["val"])


# ------------------------------------------------------------------------------------------------ one cell


def finetune(
    model: nvit.Model, setup: Setup, place: Path, seed: int, steps: int, teacher: nvit.Model | None = None
) -> nvit.Model:
    """The recipe of every training here; a stopped one goes on."""
    return nvit.finetune(
        model,
        setup.train,
        teacher=teacher,
        epochs=steps / setup.per_epoch,
        batch=setup.options.batch,
        learning_rate=LEARNING_RATE,
        augment=AUGMENT,
        directory=place,
        seed=seed,
    )


def top1(model: nvit.Model, setup: Setup) -> float:
    """On the test images."""
    found: float = nvit.evaluate(model, setup.test)["top1"]
    return found


def prune(cell: Cell, dense: nvit.Model, setup: Setup) -> tuple[nvit.Model, dict[str, Any]]:
    """(the small model, its costs as ratios to the dense one)."""
    place = cell.place(setup.options.out)
    if cell.method == "scratch":
        source = read_json(dataclasses.replace(cell, method="one_shot").place(setup.options.out) / "pruned.json")
        dims = nvit.ViTDims.from_json(source["dims"])
        params = jax.device_get(vit.init(dims, jax.random.key(cell.seed)))
        return nvit.Model(dims, params, info=dense.info), source | {"top1_pruned": None}
    how: dict[str, Any] = {"batch": TOGETHER}
    if cell.method == "nvit":
        how = nvit_loop(cell, dense.dims, setup) | {"directory": place / "pruning"}
    elif cell.method != "one_shot":
        how |= {"criterion": cell.method, "rule": "per_cost", "compensate": False}
    found = nvit.prune(dense, setup.train, macs=cell.ratio, images=SCORED, seed=cell.seed, **how)
    kept = ("dims", "macs_ratio", "params_ratio", "latency_ratio", "latency_spread")
    facts = {name: found.record[name] for name in kept} | {"pruning_steps": found.record["history"][-1]["step"]}
    return found.model, facts | {"top1_pruned": top1(found.model, setup)}


def nvit_loop(cell: Cell, dims: nvit.ViTDims, setup: Setup) -> dict[str, Any]:
    """Arguments of the released loop, with prunings so large that half of the steps are enough for it."""
    assert cell.ratio is not None
    interval = min(100, max(1, setup.steps // 32))  # NViT's 100, where there are steps for 16 such prunings
    prunings = max(2, setup.steps // 2 // interval)
    sizes = group_sizes("nvit")
    widths = {"head": dims.heads, "qk": dims.qk, "v": dims.v, "mlp": dims.mlp}
    groups = dims.embed / sizes["embed"] + sum(sum(all_) / sizes[kind] for kind, all_ in widths.items())
    plan = nvit.Plan(
        method="iterative",
        interval=interval,
        warmup=interval,
        # As if every group had the same MACs. The first pruning of the released step removes a single one.
        groups_per_step=math.ceil(groups * (1 - cell.ratio) / (prunings - 1)),
        ema=0.9,
        reset_scores=True,
        plain_first=True,
    )
    recipe = nvit.Recipe(
        batch=setup.options.batch,
        learning_rate=LEARNING_RATE,
        objective=nvit.Objective(kl_weight=4.0 * dims.classes, tau=2.0, kl_per_head=True),  # that of nvit.finetune
        augment=AUGMENT,
        seed=cell.seed,
        stream=2,  # other batches than the finetuning's
    )
    return {
        "method": plan,
        "criterion": nvit.Scoring(criterion="taylor", from_training=True, align="shared"),
        "rule": nvit.Choice(rule="nvit", profile="nvit", align="shared"),
        "latency_table": V100,
        "training": recipe,
    }


def run(cell: Cell, setup: Setup) -> dict[str, Any]:
    """The record of one cell. Goes on from what an earlier call has left of it."""
    place, out = cell.place(setup.options.out), setup.options.out
    stopped, began = place.exists(), time.monotonic()
    facts: dict[str, Any] = {}
    if cell.method == "dense":
        model = finetune(setup.start, setup, place / "finetuning", cell.seed, setup.dense_steps)
    else:
        dense = nvit.load(Cell("dense", None, cell.seed).place(out) / "finetuning" / "model")
        facts = finished(place / "pruned.json")
        if not facts:
            small, facts = prune(cell, dense, setup)
            small.save(place / "pruned")
            write_json(place / "pruned.json", facts)
        small = nvit.load(place / "pruned")
        steps = max(setup.steps - facts["pruning_steps"], 1)
        model = finetune(small, setup, place / "finetuning", cell.seed, steps, dense)
    return {
        "method": cell.method,
        "ratio": cell.ratio,
        "seed": cell.seed,
        **facts,
        "finetuning_steps": model.info["training"]["steps"],
        "top1": top1(model, setup),
        "train_images": len(setup.train[1]),
        "test_images": len(setup.test[1]),
        "seconds": time.monotonic() - began,
        "stopped": stopped,
        "date": f"{datetime.date.today()}",
    }


def finished(path: Path) -> dict[str, Any]:
    """What a file of ours holds; nothing when it is missing or torn."""
    try:
        return dict(read_json(path))
    except nvit.UserError:
        return {}


# ----------------------------------------------------------------------------------------------- the table


def report(results: dict[str, Any]) -> str:
    """The table of a results.json in Markdown: what was run in the line above it, what was not in the line below."""
    records = results.get("cells", [])
    ratios = sorted({*RATIOS, *(r["ratio"] for r in records if r["ratio"] is not None)}, reverse=True)
    rows, missing = [], []
    for ratio in (None, *ratios):
        for method in ("dense",) if ratio is None else METHODS:
            same = [r for r in records if (r["method"], r["ratio"]) == (method, ratio)]
            name = "dense" if ratio is None else f"{METHODS[method]}, to {ratio:g}"
            if same:
                rows.append(f"| {' | '.join((name, *_columns(same)))} |")
            else:
                missing.append(name)
    lines = [_caption(results)]
    if rows:
        lines += ["", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *rows]
    if rows and missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}."]
    return "\n".join(lines)


def _caption(results: dict[str, Any]) -> str:
    if not results.get("cells"):
        return "Not run yet."
    last, settings = results["cells"][-1], results["settings"]
    return (
        f"{settings['name']} at {settings['image']} pixels, {last['train_images']:,} training images, "
        f"{settings['dense_epochs']:g} epochs for the dense model and {settings['epochs']:g} for every pruned one, "
        f"{last['test_images']:,} test images; {results['device']}, "
        f"JAX {results['versions']['jax']}, {max(r['date'] for r in results['cells'])}."
    )


def _columns(records: list[dict[str, Any]]) -> list[str]:
    """All but the first, means over seeds."""
    cost = [f"{np.mean([r.get(f'{name}_ratio', 1.0) for r in records]):.3f}" for name in ("macs", "params", "latency")]
    tops = [_percent([r.get(name) for r in records]) for name in ("top1_pruned", "top1")]
    minutes = f"{np.mean([r['seconds'] for r in records]) / 60:.1f}"
    return [*cost, *tops, f"{len(records)}", ("at least " if any(r["stopped"] for r in records) else "") + minutes]


def _percent(parts: list[Any]) -> str:
    """Mean and standard deviation over seeds."""
    if None in parts:
        return ""
    spread = f" ± {100 * np.std(parts, ddof=1):.2f}" if len(parts) > 1 else ""
    return f"{100 * np.mean(parts):.2f}{spread} %"


# ------------------------------------------------------------------------------------------------- the run


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--checkpoint", type=Path, help="a file that nvit.load reads")
    found.add_argument("--images", type=Path, help="folder with train/CLASS/IMAGE and test/CLASS/IMAGE")
    found.add_argument("--out", type=Path, help="where everything is kept")
    found.add_argument("--heads", type=int, help="of the checkpoint, where nothing in it tells")
    found.add_argument("--image", type=int, default=64, help="pixels")
    found.add_argument("--epochs", type=float, default=3.0, help="of every finetuning of a pruned model")
    found.add_argument(
        "--dense-epochs", type=float, help="of the dense model before it is pruned; as --epochs by default"
    )
    found.add_argument("--train-images", type=int, help="so many of them; all by default")
    found.add_argument("--test-images", type=int, help="so many of them, for a rehearsal")
    found.add_argument("--batch", type=int, default=64, help="images of a training step")
    found.add_argument("--seeds", type=int, default=2, help="how many: 0, 1, ...")
    found.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    found.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS), help="of MACs")
    found.add_argument(
        "--table", nargs="?", const="", metavar="FILE", help="print that of --out, or of FILE; run nothing"
    )
    return found


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """In the order in which they are run: a whole table for one seed, then the next one."""
    methods = [name for name in METHODS if name in options.methods]
    for seed in range(options.seeds):
        yield Cell("dense", None, seed)
        for ratio in options.ratios:
            yield from (Cell(method, ratio, seed) for method in methods)


def claim(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that all cells under --out share. UserError when others have begun there."""
    shared = ("image", "epochs", "dense_epochs", "train_images", "test_images", "batch")
    settings = {"name": options.checkpoint.name, "checkpoint": fingerprint(options.checkpoint)}
    settings |= {name: getattr(options, name) for name in shared}
    settings |= {"learning_rate": LEARNING_RATE, "crop": AUGMENT.crop, "scored": SCORED}
    path = options.out / "settings.json"
    if not path.exists():
        write_json(path, settings)
    before = read_json(path)
    for name, value in settings.items():
        if before.get(name) != value:
            text = f"={options.out} was begun with {name}={before.get(name)}, not {value}; take another one"
            raise nvit.UserError(text, "--out")
    return settings


def collect(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Every finished cell under `out`, also as results.json there."""
    records = [r for path in out.glob("*/*/result.json") if (r := finished(path))]
    records.sort(key=lambda r: (r["seed"], -(r["ratio"] or 1), ["dense", *METHODS].index(r["method"])))
    versions = {"nvit_jax": nvit.__version__, "jax": jax.__version__, "python": platform.python_version()}
    results = {"device": device_name(), "versions": versions, "settings": settings, "cells": records}
    write_json(out / "results.json", results)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    options = parser().parse_args(arguments)
    options.dense_epochs = options.dense_epochs or options.epochs
    needed = ("out",) if options.table == "" else () if options.table else ("checkpoint", "images", "out")
    for name in needed:
        if getattr(options, name) is None:
            raise nvit.UserError(" is needed", f"--{name}")
    if options.table is not None:
        print(report(read_json(Path(options.table)) if options.table else finished(options.out / "results.json")))
        return
    if "scratch" in options.methods and "one_shot" not in options.methods:
        raise nvit.UserError(": scratch takes its widths from one_shot; name it, too", "--methods")
    if not options.checkpoint.is_file():
        raise nvit.UserError(f"={options.checkpoint}: there is no such file", "--checkpoint")
    settings = claim(options)
    if jax.config.jax_compilation_cache_dir is None:  # every small model is evaluated by the same program twice
        jax.config.update("jax_compilation_cache_dir", str(options.out / "programs"))
    wanted = list(cells(options))
    todo = [cell for cell in wanted if not finished(cell.place(options.out) / "result.json")]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} cells are finished", flush=True)
    setup = prepare(options) if todo else None
    for number, cell in enumerate(todo, 1):
        assert setup is not None
        print(f"{cell}: cell {len(wanted) - len(todo) + number} of {len(wanted)}", flush=True)
        record = run(cell, setup)
        write_json(cell.place(options.out) / "result.json", record)
        taken = [r["seconds"] for r in collect(options.out, settings)["cells"]]
        left = np.mean(taken) * (len(todo) - number) / 60
        print(f"{cell}: top-1 {record['top1']:.2%}, {record['seconds'] / 60:.1f} minutes, about {left:.0f} left")
    print(f"\n{report(collect(options.out, settings))}")


if __name__ == "__main__":
    try:
        main()
    except nvit.UserError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
