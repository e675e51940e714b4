"""Where the scores of a pruning come from: the training steps before it, or batches of their own."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nvit_jax.data import datasets
from nvit_jax.data.pipeline import train_stream
from nvit_jax.files import saving
from nvit_jax.model.dims import Units, ViTDims, count_macs
from nvit_jax.model.masks import full_masks
from nvit_jax.parallel import Parallel, fetch, is_main
from nvit_jax.pruning import loop, ranking
from nvit_jax.run.config import STAGES
from nvit_jax.run.stages.common import Run
from nvit_jax.training import distill, optim


def from_training(plan: loop.Plan, train: distill.TrainState, pruning: int) -> Units:
    """The mean of what the training steps since the last pruning have scored (prune.score.from_training)."""
    assert isinstance(train.opt_state, optim.Collected)
    steps = plan.interval if pruning else plan.warmup
    return Units(*(np.asarray(s, np.float64) / steps for s in fetch(train.opt_state.scores)))


def from_batches(
    run: Run,
    split: datasets.Split,
    parallel: Parallel,
    steps: Sequence[Callable[[distill.Inputs, Any], Units]],
    inputs: Callable[[distill.TrainState], distill.Inputs],
    stack: contextlib.ExitStack,
) -> Callable[[distill.TrainState, int], Units]:
    """(state, pruning) -> scores averaged over batches of their own; `steps` are for the first pruning and the others.

    What is opened is closed by `stack`.
    """
    c, stage, size = run.config, run.stage, run.config.prune.score.batch
    parallel.check_batch(size, "config.prune.score.batch")
    stream = train_stream(split, size, (c.seed, STAGES.index(stage.name), 1), parallel.local_rows(size))
    stream.report = stage.warn
    stack.callback(stream.close)
    batches = min(c.prune.score.batches, max(1, len(split) // size))

    def score(train: distill.TrainState, pruning: int) -> Units:
        total: Any = None
        for i in range(batches):
            if i % 8 == 0 and stage.stopping:
                raise distill.Stopped(f"stopped while scoring for pruning {pruning + 1}")
            number = pruning * batches + i
            batch = stream(number)
            batch["index"] = batch["index"] + number * size  # its own probes and drawn labels
            found = steps[pruning > 0](inputs(train), parallel.shard(batch))
            part = jax.tree.map(lambda s: np.asarray(s, np.float64), found)
            total = part if total is None else jax.tree.map(np.add, total, part)
        return jax.tree.map(lambda s: s / batches, total)

    return score


def keep_scores(run: Run, scores: Units, dims: ViTDims, predict: Callable[[ViTDims], float] | None) -> None:
    """scores.npz, for the report: the scores of the model before pruning, and what a unit of each kind saves."""
    if not is_main():
        return
    unit = "ms" if predict else "million MACs"
    savings = ranking.unit_savings(dims, predict or (lambda d: count_macs(d) / 1e6))
    path = run.stage.path / "scores.npz"
    arrays: dict[str, Any] = {**scores._asdict(), "saving_unit": unit}
    arrays |= {f"saving_{kind}": value for kind, value in savings.items()}
    arrays |= {f"mask_{kind}": value for kind, value in full_masks(dims)._asdict().items()}
    with saving(path):
        beside = path.with_name(".scores.tmp.npz")
        np.savez(beside, **arrays)
        beside.replace(path)
