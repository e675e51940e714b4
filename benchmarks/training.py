"""Training steps: pretraining, finetuning with teachers, steps between prunings, scores; against PyTorch's plain step.

    python -m benchmarks.training --models deit_tiny --batch 32
    python -m benchmarks.training --models deit_base --batch 256 --dtype bfloat16

All run in turns. "pretrain" has labels alone and is what PyTorch (eager, torch.compile) is compared with: autocast for
bfloat16, fused AdamW. "finetune" has both teachers of NViT. "prune" is a step of the masked model, and "prune, taylor
collected" one that also scores. "score ..." is the scoring of one batch; `hvp` and `obd` take one product for each of
the five kinds of units here. "over" is how many times as fast a step is as PyTorch's, or as the plain one of its kind.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import models, rivals, steps
from benchmarks.peaks import measure_peaks
from benchmarks.record import Record, make_parser, run
from benchmarks.timing import Call, alternate
from nvit_jax.model.dims import ViTDims, count_macs
from nvit_jax.pruning.scoring import Scoring

CRITERIA = ("fisher", "taylor", "hvp", "obd", "hvp_joint")
STEPS = (
    "pretrain",
    "pretrain, remat",
    "finetune",
    "prune",
    "prune, taylor collected",
    *(f"score {name}" for name in CRITERIA),
)
RIVALS = {"PyTorch eager": "eager", "PyTorch compile": "compile"}
# What each is compared with, and the forward passes of this model that its products are (the backward pass is two).
_OVER = {"prune, taylor collected": "prune", "pretrain, remat": "pretrain"}
_PASSES = {"pretrain": 3, "pretrain, remat": 4, "finetune": 4, "prune": 3, "prune, taylor collected": 3}


def make(name: str, dims: ViTDims, batch: int, dtype: str, *, tiny: bool) -> Call:
    """One of STEPS or RIVALS, as a call that ends when its work is done. NotRun for a rival that is missing."""
    if name in RIVALS:
        return rivals.tried(lambda: steps.torch_training(dims, batch, how=RIVALS[name], dtype=dtype))
    if name.startswith("score "):
        criterion = name.removeprefix("score ")
        images, labels = models.random_batch(dims, batch)
        scheme = "kind" if criterion in ("hvp", "obd") else "chunk"
        call = steps.scoring(dims, images, labels, batch, Scoring(criterion=criterion, scheme=scheme))
        return functools.partial(call, 0)
    return steps.training(
        dims,
        batch,
        dtype=dtype,
        teachers=name == "finetune",
        masked=name.startswith("prune"),
        collects="taylor" in name,
        tiny=tiny,
        remat="remat" in name,
    )


def measure(dims: ViTDims, facts: dict[str, Any], options: Any, record: Record) -> None:
    """One row for each step of one model."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in [*options.steps, *options.against]:
        try:
            calls[name] = make(name, dims, facts["batch"], facts["dtype"], tiny=options.tiny)
        except rivals.NotRun as error:
            record.add(step=name, not_run=str(error), **facts)
    peaks = measure_peaks(facts["dtype"], tiny=options.tiny)
    times = alternate(calls, options.rounds)
    for name in calls:
        row: dict[str, Any] = times.row(name, _OVER.get(name))
        if name == "pretrain":
            there = [rival for rival in RIVALS if rival in calls]
            row["over"] = {r: {c: times.ratio(name, r, c).value for c in ("wall", "cpu")} for r in there}
        seconds = row["ms"] / 1e3
        row["images_per_second"] = facts["batch"] / seconds
        if passes := _PASSES.get(name):
            row["mfu"] = peaks.part(passes * facts["batch"] * count_macs(dims), seconds)
        record.add(step=name, peak_tflops=peaks.tflops, **row, **facts)


def parser() -> Any:
    """Of the command line."""
    found = make_parser("training", __doc__)
    found.add_argument("--models", nargs="+", default=["deit_tiny"], help="dense models")
    found.add_argument("--batch", type=int, default=32)
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    found.add_argument("--steps", nargs="*", choices=STEPS, default=[s for s in STEPS if "obd" not in s])
    found.add_argument("--against", nargs="*", choices=list(RIVALS), default=list(RIVALS))
    found.add_argument("--rounds", type=int, default=5)
    return found


def main(words: Sequence[str]) -> None:
    """Measure, model by model."""
    options = parser().parse_args(words)
    record = Record("training", options, words)
    for name in options.models:
        facts = {"model": name, "batch": options.batch, "dtype": options.dtype}
        measure(models.dense(name, tiny=options.tiny), facts, options, record)
    record.finish()


if __name__ == "__main__":
    run(main)
