"""Memory: what each stage takes of a device, by the compiled program's plan, with and without remat; ragged, too.

    python -m benchmarks.memory --model deit_base --batch 128

"ragged" is the model pruned to the widths of NViT-B. A plan is of the device at hand: a CPU widens bfloat16, so that a
GPU needs less. Where the device tells its peak (a GPU does), the programs are also run once, from the smallest plan
to the largest, and the peak is measured; it stays empty where an earlier program had a higher one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import models, programs
from benchmarks.record import Record, make_parser, run
from nvit_jax.api.trainer import peak_memory


def measured_peak(compiled: Any, tell: Callable[[], int | None] = peak_memory) -> int | None:
    """Of the device while a program runs on zeros; None where it does not tell, or where it has been higher before."""
    if (before := tell()) is None:
        return None
    arguments, options = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), compiled.in_avals)
    jax.block_until_ready(compiled(*arguments, **options))
    peak = tell()
    return peak if peak is not None and peak > before else None


def parser() -> Any:
    """Of the command line."""
    found = make_parser("memory", __doc__)
    found.add_argument("--model", default="deit_base")
    found.add_argument("--batch", type=int, default=128, help="images on a device")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    found.add_argument("--stages", nargs="+", choices=programs.STAGES, default=list(programs.STAGES))
    found.add_argument("--widths", nargs="+", choices=["dense", "ragged"], default=["dense", "ragged"])
    return found


def main(words: Sequence[str]) -> None:
    """Plan all, then run all from the smallest."""
    options = parser().parse_args(words)
    record = Record("memory", options, words)
    dense = models.dense(options.model, tiny=options.tiny)
    dims = {"dense": dense, "ragged": models.narrowed(dense, models.NVIT["nvit_b"])}
    found = []
    for widths in options.widths:
        for stage in options.stages:
            for remat in (False, True) if stage != "eval" else (False,):
                compiled = programs.program(stage, dims[widths], options.batch, dtype=options.dtype, remat=remat)
                facts = {"stage": stage, "model": options.model, "widths": widths, "batch": options.batch}
                facts |= {"dtype": options.dtype, "remat": remat} | programs.memory(compiled)
                record.add(**facts)
                found.append((compiled, facts))
    for compiled, facts in sorted(found, key=lambda pair: pair[1]["total"]):
        if (peak := measured_peak(compiled)) is not None:
            record.add(**facts, measured_peak=peak)
    record.finish()


if __name__ == "__main__":
    run(main)
