"""Parts: a batch that goes through a device in parts of all sizes that divide it, against the whole batch at once.

    python -m benchmarks.parts --model deit_tiny --batch 32

All sizes of the parts run in turns. "forward" is inference, "pretrain" a training step, "score ..." the scoring of a
batch, `hvp` with one product with the Hessian. The limits in `nvit_jax/model/parts.py` were set from these
measurements.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import models, steps
from benchmarks.record import Record, make_parser, run
from benchmarks.timing import Call, alternate
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.parts import in_parts
from nvit_jax.pruning.scoring import Scoring

WORK = ("forward", "pretrain", "score fisher", "score hvp")


def make(name: str, dims: ViTDims, batch: int, count: int) -> Call:
    """One of WORK on a batch in so many parts, as a call that ends when its work is done."""
    if name == "pretrain":
        return steps.training(dims, batch, accumulate=count)
    if name.startswith("score "):
        images, labels = models.random_batch(dims, batch)
        chosen = Scoring(criterion=name.removeprefix("score "), scheme="all", remat=False)
        return functools.partial(steps.scoring(dims, images, labels, batch, chosen, count), 0)
    params = jax.device_put(models.random_params(dims))
    images = jax.device_put(models.random_images(dims, batch))
    forward = jax.jit(lambda params, images: in_parts(functools.partial(vit.forward, dims, params), images, count))
    return lambda: jax.block_until_ready(forward(params, images))


def parser() -> Any:
    """Of the command line."""
    found = make_parser("parts", __doc__)
    found.add_argument("--model", default="deit_tiny")
    found.add_argument("--batch", type=int, default=32)
    found.add_argument("--work", nargs="*", choices=WORK, default=list(WORK))
    found.add_argument("--rounds", type=int, default=5)
    return found


def main(words: Sequence[str]) -> None:
    """Measure, one kind of work after the other."""
    options = parser().parse_args(words)
    record = Record("parts", options, words)
    dims = models.dense(options.model, tiny=options.tiny)
    each = options.batch // jax.device_count()  # images of a device
    sizes = [options.batch // count for count in range(1, each + 1) if each % count == 0]
    for name in options.work:
        calls = {str(size): make(name, dims, options.batch, options.batch // size) for size in sizes}
        times = alternate(calls, options.rounds)
        for size in calls:
            row = times.row(size, str(sizes[0]))
            record.add(what=name, model=options.model, batch=options.batch, part=int(size), **row)
    record.finish()


if __name__ == "__main__":
    run(main)
