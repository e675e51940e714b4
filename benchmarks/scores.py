"""Scores from nothing: so many images through our criteria and through what Torch-Pruning's importances need.

    python -m benchmarks.scores --model deit_tiny --images 500 --batch 25

All see the same images, batch by batch in turns, so that "seconds" are the sum over all of them. Ours are `fisher`
(second order, of each image apart), `taylor` and the products of `hvp`, with and without remat; theirs are the
gradients of a batch (its Taylor importance, first order) and of each image alone (its Hessian importance). Compiling
is left out on both sides. A probe of `hvp` is one more product with the Hessian for each image; it is told in
gradients of the gates ("gradient": what `fisher` takes without drawing labels).
"""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import models, rivals, steps
from benchmarks.record import Record, make_parser, run
from benchmarks.timing import alternate
from nvit_jax.pruning.scoring import Scoring

OURS = {
    "fisher": Scoring(criterion="fisher"),
    "fisher, remat": Scoring(criterion="fisher", remat=True),
    "taylor": Scoring(criterion="taylor"),
    "taylor, remat": Scoring(criterion="taylor", remat=True),
    "gradient": Scoring(criterion="fisher", loss="labels"),
    "hvp, 1 probe": Scoring(criterion="hvp", scheme="all", probes=1),
    "hvp, 3 probes": Scoring(criterion="hvp", scheme="all", probes=3),
}
THEIRS = {"Torch-Pruning Taylor": "taylor", "Torch-Pruning Hessian": "hessian"}


def counted(call: Callable[[int], Any]) -> Callable[[], Any]:
    """Batch after batch."""
    numbers = iter(range(10**9))
    return lambda: call(next(numbers))


def parser() -> Any:
    """Of the command line."""
    found = make_parser("scores", __doc__)
    found.add_argument("--model", default="deit_tiny")
    found.add_argument("--images", type=int, default=500)
    found.add_argument("--batch", type=int, default=25)
    found.add_argument("--ours", nargs="*", choices=list(OURS), default=list(OURS))
    found.add_argument("--theirs", nargs="*", choices=list(THEIRS), default=list(THEIRS))
    return found


def main(words: Sequence[str]) -> None:
    """Measure."""
    options = parser().parse_args(words)
    record = Record("scores", options, words)
    dims, facts = models.dense(options.model, tiny=options.tiny), {"model": options.model, "batch": options.batch}
    images, labels = models.random_batch(dims, options.images)
    calls = {}
    for name in options.ours:
        calls[name] = counted(steps.scoring(dims, images, labels, options.batch, OURS[name]))
    for name in options.theirs:
        try:
            call = steps.torch_scoring(dims, images, labels, options.batch, THEIRS[name])
            calls[name] = rivals.tried(lambda call=call: counted(call))
        except rivals.NotRun as error:
            record.add(what=name, not_run=str(error), **facts)
    batches = max(1, options.images // options.batch)
    times = alternate(calls, batches)
    for name in calls:
        row: dict[str, Any] = times.row(name)
        row |= {"images": batches * options.batch, "seconds": float(times.wall[name].sum())}
        row["cpu_seconds"] = float(times.cpu[name].sum())
        there = [other for other in THEIRS if other in calls and name in OURS]
        row["over"] = {other: {c: times.ratio(name, other, c).value for c in ("wall", "cpu")} for other in there}
        record.add(what=name, **row, **facts)
    if {"gradient", "hvp, 1 probe", "hvp, 3 probes"} <= calls.keys():
        found = {c: (times.seconds("hvp, 3 probes", c) - times.seconds("hvp, 1 probe", c)) / 2 for c in ("wall", "cpu")}
        parts = {f"{c}_gradients": found[c] / times.seconds("gradient", c) for c in found}
        record.add(what="an hvp probe", ms=1e3 * found["wall"], cpu_ms=1e3 * found["cpu"], **parts, **facts)
    record.finish()


if __name__ == "__main__":
    run(main)
