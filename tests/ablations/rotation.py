"""Embed channels alone cut, with and without a rotation of the residual stream: the table of docs/results.md.

    python -m tests.ablations.rotation --model MODEL_DIR --images DIR --classes FILE.tsv --out runs/rotation

The images are split in two by hash of their file names: some of one half to calibrate on, some of the other to judge
on. Everything found is kept under --out at once, so that a stopped run goes on.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable

import numpy as np

from nvit_jax.files import read_json, write_json
from nvit_jax.latency import timing
from nvit_jax.model.dims import Units
from nvit_jax.model.directory import Model, load_model
from nvit_jax.model.masks import full_masks
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.parallel import fetch
from nvit_jax.pruning import rotation
from tests.ablations.halves import halves
from tests.ablations.one_shot import KEEP, Draw, Judge

# name -> rotated; which channels go: those of the least `fisher`, or the last; compensated
ROWS = {
    "as it is, fisher": (False, "fisher", False),
    "rotated, last": (True, "last", False),
    "rotated, fisher": (True, "fisher", False),
    "as it is, fisher, compensated": (False, "fisher", True),
    "rotated, last, compensated": (True, "last", True),
}


def converted(model: Model) -> Model:
    """The same function with RMSNorm."""
    dims, params = rotation.to_rmsnorm(model.dims, fetch(model.params))
    return Model(dims, params, info=model.info)


@dataclasses.dataclass
class Kept:
    """Arrays under a folder; each is found once."""

    folder: pathlib.Path

    def __call__(self, name: str, find: Callable[[], np.ndarray]) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            np.save(path, find())
            print(f"found {name}", flush=True)
        return np.asarray(np.load(path))


def turned(draw: Draw, kept: Kept) -> Model:
    """The model of a draw, rotated to the principal directions of its stream."""
    moments = kept("moments", lambda: draw.walk.stream_moments(draw.params))
    params = rotation.rotate(draw.model.dims, draw.params, rotation.principal(moments))
    return Model(draw.model.dims, params, info=draw.model.info)


def masks_of(draw: Draw, which: str, part: float, kept: Kept) -> Units:
    """Masks without a part of the embed channels."""
    masks = full_masks(draw.model.dims)
    order = np.arange(draw.model.dims.embed)[::-1]
    if which == "fisher":
        scores = kept(f"fisher_{draw.model.dims.norm}", lambda: draw.fisher.embed)
        order = np.argsort(scores, kind="stable")
    masks.embed[order[: round(part * len(order))]] = 0
    return masks


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| | top-1 | KL |", "|---|---|---|"]
    lines += [f"| {name} | {row['top1']:.1%} | {row['divergence']:.3f} |" for name, row in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--part", type=float, default=0.125, help="of the embed channels goes")
    parser.add_argument("--count", type=int, default=100, help="calibration images")
    parser.add_argument("--judged", type=int, default=100, help="images judged on")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    model = load_model(options.model)
    pre = Preprocessing.from_json(model.info["preprocessing"])
    train, judged = halves(options.images, options.classes, pre)
    kept = Kept(options.out)
    images, labels = judged.some(options.judged).read()
    judge = Judge(np.asarray(pre(images)), labels, np.zeros(0))
    judge.dense = kept("dense", lambda: judge.answers(model))
    draw = functools.partial(Draw, split=train, pre=pre, count=options.count, seed=0)
    plain = draw(model)
    rotated = functools.cache(lambda: draw(turned(draw(converted(model)), kept)))
    rows = options.out / "rows.json"
    found = read_json(rows) if rows.exists() else {}
    for name in options.rows:
        if name not in found:
            turn, which, compensated = ROWS[name]
            own = rotated() if turn else plain
            masks = masks_of(own, which, options.part, kept)
            found[name] = judge(own.compensated(own.params, masks, KEEP) if compensated else own.cut(own.params, masks))
            write_json(rows, found)
            print(f"{name}: {found[name]}", flush=True)
    top1 = (judge.dense.argmax(-1) == labels).mean()
    print(f"\n{table(found)}\n\nunpruned {top1:.1%}, {len(labels)} images judged, {timing.device_name()}")


if __name__ == "__main__":
    main()
