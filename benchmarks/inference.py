"""Inference: dense and pruned models against PyTorch, onnxruntime, the prediction and the device's limits.

    python -m benchmarks.inference --models deit_tiny --batch 1 8 32
    python -m benchmarks.inference --models deit_base --batch 256 --dtypes bfloat16 --predict 0.54

For each dense model, batch and type, everything runs in turns: the dense model, models pruned from it (of widths like
the four NViT models, in multiples of 8, and one with odd widths), each of them in JAX and in the rivals. The peak of
matrix products and of memory is measured in the same process. With `--predict R` a latency table is measured instead,
the dense model is pruned by drawn scores to the predicted ratio R, and what is left runs in turns with the dense model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import models, rivals
from benchmarks.decision import draw_scores
from benchmarks.peaks import Peaks, measure_peaks
from benchmarks.record import Record, make_parser, run
from benchmarks.timing import Call, Times, alternate
from nvit_jax.latency.table import Grid, measure_table
from nvit_jax.latency.table import LatencyTable as Table
from nvit_jax.latency.timing import DoesNotFit, Measurement, compile_piece
from nvit_jax.model.dims import ViTDims, count_macs
from nvit_jax.model.masks import full_masks
from nvit_jax.pruning.ranking import Policy, group_sizes, make_targets, rank

OURS = "nvit_jax"
WIDTHS = {"embed": 5, "heads": 4, "qk": 3, "v": 3, "mlp": 5}
FLOORS = {"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8}


Who = tuple[str, str]  # a model, and nvit_jax or a rival
Prepared = tuple[dict[Who, Call], dict[Who, str]]


class Shape(NamedTuple):
    """A model of a group; `predicted` is its latency as a part of the dense model's, where a table was measured."""

    name: str
    dims: ViTDims
    predicted: float | None = None


def shapes(dims: ViTDims, names: Sequence[str]) -> list[Shape]:
    """The dense model, and those pruned from it: one of models.NVIT, or "NAME_odd"."""
    found = [Shape("dense", dims)]
    for name in names:
        part = models.NVIT[name.removesuffix("_odd")]
        found.append(Shape(name, models.narrowed(dims, part, 1 if name.endswith("_odd") else 8)))
    return found


def predicted(dims: ViTDims, ratio: float, how: Measurement, *, tiny: bool) -> Shape:
    """`dims` pruned by drawn scores to a predicted part of the latency, by a table that is measured now."""
    sizes = group_sizes("cpu" if jax.default_backend() == "cpu" else "gpu")
    widths = dict.fromkeys(WIDTHS, 2) if tiny else WIDTHS
    table = Table(measure_table(dims, Grid(sizes, widths), how))
    policy = Policy(sizes=sizes, floors=FLOORS, latency=table)
    targets = make_targets({"latency_ratio": ratio}, dims, table)
    found = rank(draw_scores(dims, 0), full_masks(dims), dims, policy, targets).dims
    return Shape(f"predicted_{ratio:g}", found, table(found) / table(dims))


def prepare(group: Sequence[Shape], batch: int, dtype: str, against: Sequence[str]) -> Prepared:
    """({(model, who): call}, {(model, who): why it is not run})."""
    calls: dict[Who, Call] = {}
    missing: dict[Who, str] = {}
    for shape in group:
        try:
            calls[shape.name, OURS] = compile_piece(shape.dims, "model", batch, dtype)
        except DoesNotFit as error:
            missing[shape.name, OURS] = str(error)
        params = models.random_params(shape.dims)
        images = models.random_images(shape.dims, batch)
        for who in against:
            try:
                calls[shape.name, who] = rivals.inference(who, shape.dims, params, images, dtype)
            except rivals.NotRun as error:
                missing[shape.name, who] = str(error)
    return calls, missing


def facts_of(shape: Shape, dense: ViTDims, batch: int, dtype: str, peaks: Peaks) -> dict[str, Any]:
    """What is known of a model before it runs."""
    macs = count_macs(shape.dims)
    return {
        "macs": macs,
        "macs_ratio": macs / count_macs(dense),
        "predicted_ratio": shape.predicted,
        "roofline_ms": peaks.roofline_ms(shape.dims, batch, dtype),
        "roofline_ratio": peaks.roofline_ms(shape.dims, batch, dtype) / peaks.roofline_ms(dense, batch, dtype),
        "peak_tflops": peaks.tflops,
        "peak_gbs": peaks.gbs,
    }


def measured(times: Times, shape: Shape, batch: int, peaks: Peaks) -> dict[str, Any]:
    """Of one model: times of everybody, and how many times as fast ours is as each, and as the dense model."""
    ours, found = f"{shape.name} {OURS}", {"noise": times.noise(), "cpu_noise": times.noise("cpu")}
    there = [name for name in times.wall if name.split()[0] == shape.name and not name.endswith("(again)")]
    found["times"] = {
        name.split()[1]: {"ms": 1e3 * times.seconds(name), "cpu_ms": 1e3 * times.seconds(name, "cpu")} for name in there
    }
    found["over"], found["over_dense"] = {}, {}
    for name in there:
        who = name.split()[1]
        if ours in times.wall and name != ours:
            found["over"][who] = {c: times.ratio(ours, name, c).value for c in ("wall", "cpu")}
        if shape.name != "dense" and f"dense {who}" in times.wall:
            found["over_dense"][who] = {c: times.ratio(name, f"dense {who}", c).value for c in ("wall", "cpu")}
    if ours in times.wall:
        seconds = times.seconds(ours)
        found["images_per_second"] = batch / seconds
        found["mfu"] = peaks.part(batch * count_macs(shape.dims), seconds)
    return found


def measure(group: Sequence[Shape], ready: Prepared, key: dict[str, Any], options: Any, record: Record) -> None:
    """One row for each model of a group; everything that is ready runs in turns."""
    batch, dtype = key["batch"], key["dtype"]
    dense = models.dense(key["of"], tiny=options.tiny)
    peaks = measure_peaks(dtype, tiny=options.tiny)
    calls, missing = ready
    times = alternate({" ".join(name): call for name, call in calls.items()}, options.rounds) if calls else None
    for shape in group:
        facts = facts_of(shape, dense, batch, dtype, peaks)
        facts["not_run"] = {who: why for (name, who), why in missing.items() if name == shape.name}
        if times is not None:
            facts |= measured(times, shape, batch, peaks)
        record.add(model=shape.name, **key, **facts)


def parser() -> Any:
    """Of the command line."""
    found = make_parser("inference", __doc__)
    found.add_argument("--models", nargs="+", default=["deit_tiny"], help="dense models")
    every = [*models.NVIT, *(f"{name}_odd" for name in models.NVIT)]
    found.add_argument("--pruned", nargs="*", choices=every, default=["nvit_b", "nvit_b_odd", "nvit_s"])
    found.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    found.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    found.add_argument("--against", nargs="*", choices=rivals.RIVALS, default=list(rivals.RIVALS))
    found.add_argument("--predict", nargs="*", type=float, default=[], help="parts of the latency; minutes for a table")
    found.add_argument("--rounds", type=int, default=7)
    return found


def main(words: Sequence[str]) -> None:
    """Measure, group by group."""
    options = parser().parse_args(words)
    record = Record("inference", options, words)
    for name in options.models:
        dims = models.dense(name, tiny=options.tiny)
        for dtype in options.dtypes:
            for batch in options.batch:
                key = {"of": name, "batch": batch, "dtype": dtype}
                if not options.predict:
                    group = shapes(dims, options.pruned)
                    measure(group, prepare(group, batch, dtype, options.against), key, options, record)
                    continue
                how = Measurement(batch=batch, dtype=dtype, repeats=options.rounds)
                group = [predicted(dims, ratio, how, tiny=options.tiny) for ratio in options.predict]
                ready = prepare([Shape("dense", dims), *group], batch, dtype, ())
                measure(group, ready, key, options, record)
    record.finish()


if __name__ == "__main__":
    run(main)
