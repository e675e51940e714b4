"""Growth: time and memory of a training step against depth, width, tokens and batch; of a decision against units.

Along the axis "devices" it is what the devices exchange in a step.

    python -m benchmarks.growth --axes depth width tokens batch
    python -m benchmarks.growth --axes units devices

Along each axis one thing grows and the others stay. Sizes run in turns, on one device; memory is what the compiled
program plans for its temporaries and for the new state, in whose place temporaries may lie. An exponent is fitted to
the logarithms: 1 is linear. What is worse, and why:

- width: the products of a block grow with its square, so does the number of parameters.
- tokens: attention's two products and its weights grow with their square; the rest is linear.
- units: the rule per_cost looks at offers of all blocks; what it removes grows with the units, too.

"units" grows the depth, and times one pruning decision. "devices" compiles the step for virtual CPU devices, in a
process of its own, and reads from the program what is exchanged. Under `jit` that is all gradients once, whatever the
number of devices and of the parts that a batch is cut into (accumulate). Under `fsdp` weights are exchanged, too.
"""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import models, programs, steps
from benchmarks.decision import Decision
from benchmarks.record import Record, make_parser, run
from benchmarks.timing import Call, alternate, fit_exponent
from nvit_jax.model.dims import Units, ViTDims, count_macs, count_params
from nvit_jax.parallel import Parallel

AXES = ("depth", "width", "tokens", "batch", "units", "devices")
BASE = {"embed": 192, "depth": 6, "image": 96, "batch": 8}
SIZES = {
    "depth": ("depth", (3, 6, 12, 24)),
    "width": ("embed", (96, 192, 384, 768)),
    "tokens": ("image", (96, 192, 288, 384)),
    "batch": ("batch", (4, 8, 16, 32)),
    "units": ("depth", (12, 24, 48)),
}
_TINY = {"embed": 32, "depth": 2, "image": 32, "batch": 4}
_TINY_SIZES = {"depth": (1, 2, 4), "embed": (32, 64), "image": (32, 64), "batch": (4, 8)}
DEVICES = (1, 2, 4)


def dims_of(values: dict[str, int]) -> ViTDims:
    """A ViT with heads of 32 dims."""
    embed = values["embed"]
    return ViTDims.uniform(
        image=values["image"], patch=16, classes=1000, embed=embed, depth=values["depth"], heads=embed // 32,
        mlp=4 * embed,
    )  # fmt: skip


def grow(axis: str, options: Any, record: Record) -> None:
    """One row for each size of an axis, and one with the exponents."""
    name, sizes = SIZES[axis]
    base, sizes = (_TINY, _TINY_SIZES[name]) if options.tiny else (BASE, sizes)
    calls: dict[str, Call] = {}
    facts: dict[str, dict[str, Any]] = {}
    for size in sizes:
        values = base | {name: size}
        dims = dims_of(values)
        grown = {"depth": dims.depth, "width": dims.embed, "tokens": dims.tokens, "batch": values["batch"]}
        if axis == "units":
            decision = Decision(dims, "per_cost", "macs", "nvit" if options.tiny else "gpu", "blocks")
            calls[str(size)] = decision
            facts[str(size)] = {"size": sum(mask.size for mask in Units(*decision.masks))}
            continue
        calls[str(size)] = steps.training(dims, values["batch"], accumulate=1)
        plan = programs.memory(programs.program("pretrain", dims, values["batch"]))
        working = plan["temporaries"] + plan["outputs"]
        facts[str(size)] = {"size": grown[axis], "working": working, "params": count_params(dims)}
        facts[str(size)]["macs"] = count_macs(dims) * values["batch"]
    times = alternate(calls, options.rounds)
    rows = [facts[size] | times.row(size) for size in calls]
    for row in rows:
        record.add(axis=axis, **row)
    grown = [row["size"] for row in rows]
    found = {}
    for what in ("ms", "cpu_ms", "working", "macs"):
        if what in rows[0]:
            fit = fit_exponent(grown, [row[what] for row in rows])
            found |= {f"{what}_exponent": fit.exponent, f"{what}_last": fit.last}
    record.add(axis=axis, size="exponent", **found)


def messages(options: Any, record: Record) -> None:
    """One row for each number of devices, parts of a batch, and way to lay out the state."""
    every = jax.devices("cpu")
    dims = models.TINY if options.tiny else dims_of(BASE)
    for backend in ("jit", "fsdp"):
        for count in (n for n in DEVICES if n <= len(every)):
            for parts in (1, 4):
                parallel = Parallel.create(backend, tuple(every[:count]))
                step, inputs = programs.train_step(dims, parallel=parallel, accumulate=parts)
                shapes = programs.spread(parallel, inputs, programs.batch_shapes(dims, 16))
                compiled = parallel.compile_training(step).lower(*shapes).compile()
                sent, operations = programs.collective_bytes(compiled.as_text())
                facts = {"bytes": sent, "operations": operations, "params_bytes": 4 * count_params(dims)}
                facts["bytes_over_params"] = sent / facts["params_bytes"]
                record.add(axis="devices", size=count, accumulate=parts, backend=backend, **facts)


def parser() -> Any:
    """Of the command line."""
    found = make_parser("growth", __doc__)
    found.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    found.add_argument("--rounds", type=int, default=5)
    return found


def main(words: Sequence[str]) -> None:
    """Measure, axis by axis."""
    options = parser().parse_args(words)
    axes = options.axes
    if "devices" in axes and len(axes) > 1:  # the others run on one
        same = [*(["--tiny"] if options.tiny else []), *(["--out", str(options.out)] if options.out else [])]
        subprocess.run([sys.executable, "-m", "benchmarks.growth", "--axes", "devices", *same], check=True)
        axes = [axis for axis in axes if axis != "devices"]
    elif "devices" in axes:
        _virtual_devices(max(DEVICES))
    record = Record("growth", options, words)
    for axis in axes:
        if axis == "devices":
            messages(options, record)
        else:
            grow(axis, options, record)
    record.finish()


def _virtual_devices(count: int) -> None:
    """Before JAX has begun; afterwards it is what it is."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        print(f"JAX has begun with {len(jax.devices('cpu'))} CPU devices", flush=True)


if __name__ == "__main__":
    run(main)
