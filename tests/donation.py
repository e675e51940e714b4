"""Training and pruning whose old states are deleted by each step: what donation does to them on a GPU.

    python tests/donation.py

There are averages, teachers, saves, evaluations and prunings in between. The numbers must be the same as without, and
the caller's model untouched; whatever reads a deleted array raises RuntimeError.
"""

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import nvit_jax as nvit
from nvit_jax import parallel
from nvit_jax.model import vit

_VALUES = {"image": 8, "patch": 4, "channels": 1, "classes": 10, "embed": 32, "depth": 2, "heads": 2, "mlp": 64}
_ORIGINAL = parallel.TrainingStep.__call__


class _Copying:
    """NumPy, whose arrays of what lies on a CPU are copies, as those of what lies on a GPU."""

    asarray = staticmethod(np.array)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class _Deleting:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, step: Any, inputs: Any, batch: Any) -> Any:
        found = jax.block_until_ready(_ORIGINAL(step, inputs, batch))
        kept = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(found)}  # or goes through a step as it is
        for leaf in jax.tree.leaves(inputs.state):
            if leaf.unsafe_buffer_pointer() not in kept:
                leaf.delete()
                self.count += 1
        return found


def run(model: nvit.Model, place: pathlib.Path) -> Iterator[Any]:
    """Weights of a finetuned model, of a pruned one, and of the given one."""
    data = nvit.load_dataset("digits").split("train").read(slice(0, 96))
    saves = {"evaluate_every": 1, "log_every": 1, "save_every": 1}
    recipe = nvit.Recipe(batch=32, epochs=1, objective=nvit.Objective(kl_weight=4.0), ema=0.9, keep="best", **saves)
    more = {"evaluate_on": data, "directory": place / "tuned", "progress": False}
    yield nvit.finetune(model, data, teacher=model, recipe=recipe, **more).params
    pruned = nvit.prune(
        model,
        data,
        macs=0.7,
        method=nvit.Plan(method="gradual", steps=2, interval=2, warmup=1),
        criterion=nvit.Scoring(criterion="taylor", from_training=True),
        compensate=False,
        training=nvit.Recipe(batch=32, save_every=1),
        measure=None,
        directory=place / "pruned",
        progress=False,
    )
    yield pruned.model.params
    yield model.params


def main() -> None:
    """Compare."""
    dims = nvit.ViTDims.uniform(**_VALUES)
    params = vit.init(dims, jax.random.key(0), std=0.1, position_std=0.5)
    model = nvit.Model(dims, params, info={"preprocessing": nvit.load_dataset("digits").preprocessing.to_json()})
    deleting = _Deleting()
    with tempfile.TemporaryDirectory() as place:
        expected = jax.tree.map(np.array, list(run(model, pathlib.Path(place) / "kept")))
        parallel.TrainingStep.__call__ = lambda step, inputs, batch: deleting(step, inputs, batch)  # type: ignore[method-assign]
        parallel.np = _Copying()  # type: ignore[attr-defined]
        found = list(run(model, pathlib.Path(place) / "gone"))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.array(ours), theirs)
    print(f"the same after {deleting.count} deleted arrays")


if __name__ == "__main__":
    main()
