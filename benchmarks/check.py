"""Check: a few ratios on the CPU, in minutes. Fails when one has fallen below its floor in benchmarks/floors.json.

    python -m benchmarks.check
    python -m benchmarks.check --set      # measure, and write floors anew: a part of what is measured

Ratios are of CPU time, each side on one thread: other work on the machine makes both sides wait, but neither does more.
A ratio fails when it is below its floor by more than the noise of its own A/A pair, three times in a row, each time
with more rounds. The floors leave room (see MARGIN): what they catch is a step that takes twice as long.
"""

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import nvit_jax as nvit
from benchmarks import models, rivals, steps
from benchmarks.decision import Decision
from benchmarks.record import load, make_parser, run
from benchmarks.timing import Call, Ratio, alternate
from nvit_jax.files import read_json, write_json
from nvit_jax.latency.timing import compile_piece
from nvit_jax.pruning.scoring import Scoring

FLOORS = Path(__file__).parent / "floors.json"
MARGIN = 0.5  # a floor is this part of what was measured: machines differ, too
TRIES, ROUNDS, BATCH = 3, 4, 2
Pair = tuple[Call, Call]  # (ours, what it is compared with): the ratio is how many times as fast ours is


def against_eager(tiny: bool) -> Pair:
    """Inference of DeiT-T, and PyTorch's."""
    dims = models.dense("deit_tiny", tiny=tiny)
    params, images = models.random_params(dims), models.random_images(dims, BATCH)
    return compile_piece(dims, "model", BATCH, "float32"), rivals.inference("eager", dims, params, images, "float32")


def pruned_against_dense(tiny: bool) -> Pair:
    """DeiT-T at NViT-B's part of the MACs, and unpruned."""
    dims = models.dense("deit_tiny", tiny=tiny)
    small = models.narrowed(dims, models.NVIT["nvit_b"])
    return compile_piece(small, "model", BATCH, "float32"), compile_piece(dims, "model", BATCH, "float32")


def training_against_eager(tiny: bool) -> Pair:
    """A step of pretraining, and PyTorch's."""
    dims = models.dense("deit_tiny", tiny=tiny)
    return steps.training(dims, BATCH), rivals.tried(lambda: steps.torch_training(dims, BATCH))


def taylor_against_plain(tiny: bool) -> Pair:
    """A step between prunings with `taylor` from its gradients, and without."""
    dims = models.dense("deit_tiny", tiny=tiny)
    return steps.training(dims, BATCH, masked=True, collects=True), steps.training(dims, BATCH, masked=True)


def _scoring(tiny: bool, chosen: Scoring) -> Call:
    dims = models.dense("deit_tiny", tiny=tiny)
    return functools.partial(steps.scoring(dims, *models.random_batch(dims, BATCH), BATCH, chosen), 0)


def fisher_against_gradient(tiny: bool) -> Pair:
    """Scores by `fisher`, and a gradient of PyTorch's in all weights."""
    dims = models.dense("deit_tiny", tiny=tiny)
    theirs = steps.torch_scoring(dims, *models.random_batch(dims, BATCH), BATCH, "taylor")
    return _scoring(tiny, Scoring(criterion="fisher")), rivals.tried(lambda: functools.partial(theirs, 0))


def hvp_against_fisher(tiny: bool) -> Pair:
    """Scores by `hvp` with one probe, and by `fisher`."""
    return _scoring(tiny, Scoring(criterion="hvp", scheme="all")), _scoring(tiny, Scoring(criterion="fisher"))


def decision_against_loop(tiny: bool) -> Pair:
    """Half of DeiT-B's MACs by `per_cost`, and a loop in Python."""
    dims = models.dense("deit_base", tiny=tiny)
    return Decision(dims, "per_cost", "macs", "gpu", "blocks"), lambda: sum(i * i for i in range(3_000_000))


CHECKS: dict[str, Callable[[bool], Pair]] = {
    "inference, PyTorch eager": against_eager,
    "inference of a pruned model, the dense one": pruned_against_dense,
    "training step, PyTorch eager": training_against_eager,
    "training step with taylor, without": taylor_against_plain,
    "fisher, a gradient by PyTorch": fisher_against_gradient,
    "hvp with one probe, fisher": hvp_against_fisher,
    "decision, a loop in Python": decision_against_loop,
}


def failed(found: Ratio, floor: float) -> bool:
    """Below the floor by more than the noise."""
    return found.value * math.exp(found.noise) < floor


def measure(pair: Pair, floor: float | None, rounds: int) -> Ratio:
    """Of CPU time, measured again, for longer, while it is below the floor."""
    for number in range(1, TRIES + 1):
        found = alternate({"ours": pair[0], "other": pair[1]}, rounds * number).ratio("ours", "other", "cpu")
        if floor is None or not failed(found, floor):
            break
    return found


def parser() -> Any:
    """Of the command line."""
    found = make_parser("check", __doc__, result=False)
    found.add_argument("--floors", type=Path, default=FLOORS, help="the JSON file")
    found.add_argument("--set", action="store_true", help="write the floors anew")
    found.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    return found


def main(words: Sequence[str]) -> None:
    """Measure and compare; UserError when a ratio has fallen."""
    options = parser().parse_args(words)
    one_thread()
    path = options.floors
    floors: dict[str, Any] = read_json(path) if path.exists() else {}
    fallen, began, used = [], time.monotonic(), time.process_time()
    for name in options.only:
        floor = None if options.set else floors.get(name, {}).get("floor")
        try:
            found = measure(CHECKS[name](options.tiny), floor, 1 if options.tiny else ROUNDS)
        except rivals.NotRun as error:
            print(f"{name}: not run, {error}", flush=True)
            continue
        text = f"{name}: {found.value:.3g} times as fast (noise {found.noise:.1%})"
        print(f"{text}, floor {'none' if floor is None else f'{floor:.3g}'}, load {load():.1f}", flush=True)
        if floor is not None and failed(found, floor):
            fallen.append(name)
        floors[name] = {"measured": round(found.value, 4), "floor": round(MARGIN * found.value, 4)}
    print(f"{time.monotonic() - began:.0f} s, {time.process_time() - used:.0f} s of CPU time", flush=True)
    if options.set:
        write_json(path, floors)
    if fallen:
        raise nvit.UserError(f": slower than their floors in {path}: {'; '.join(fallen)}", "benchmarks.check")


def one_thread() -> None:
    """For JAX and PyTorch, on the CPU; where they have begun, it is what it is."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    jax.config.update("jax_platforms", "cpu")
    if "torch" not in sys.modules:
        os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.suppress(rivals.NotRun):
        rivals.import_torch().set_num_threads(1)


if __name__ == "__main__":
    run(main)
