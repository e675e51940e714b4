"""A feature extractor in one shot without labels, and the distance that its loss takes: tables of docs/results.md.

    nvit-jax convert deit_tiny_patch16_224.pth deit_tiny_features --classes 0
    python -m tests.ablations.features --model deit_tiny_features --images DIR --classes FILE.tsv --out runs/features

The images are split in two by hash of their file names. Some of one half calibrate everything. The distance is chosen
on the rest of that half ("choice"), results are of the other half ("result"). The folder has one image a class, which
has no neighbour of its class; neighbours vote for coarse groups of ImageNet's classes. Every result is kept under
--out at once, so that a stopped run goes on.
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nvit_jax as nvit
from nvit_jax.data.datasets import Split
from nvit_jax.files import read_json, write_json
from nvit_jax.latency import timing
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.training.losses import draw_directions
from tests.ablations.halves import halves

RATIOS = (0.8, 0.6)  # of the MACs
DENSE = "1"
# Labels of ImageNet from 0: the first of each range, in the order of WordNet that ILSVRC's classes have.
GROUPS = {
    "fish": ((0, 7), (389, 398)),
    "birds": ((7, 25), (80, 101), (127, 147)),
    "amphibians and reptiles": ((25, 69),),
    "invertebrates": ((69, 80), (107, 127), (300, 330)),
    "dogs": ((151, 269),),
    "other mammals": ((101, 107), (147, 151), (269, 300), (330, 389)),
    "things, plants and food": ((398, 1000),),
}
Loss = Callable[[jax.Array, dict[str, Any]], jax.Array]


def group_of(label: int) -> int:
    """The number of the group that a label of ImageNet belongs to."""
    return next(i for i, ranges in enumerate(GROUPS.values()) if any(a <= label < b for a, b in ranges))


def directions(name: str, deviations: np.ndarray) -> Loss:
    """The projection of the features on random directions, whose gradients have the Hessian of a distance.

    "relative": |f - f0|^2 / |f0|^2, as losses.feature_distance. "cosine": 1 - cosine of f and f0. "standardised": the
    mean over channels of ((f - f0) / deviation)^2, `deviations` [D] over the calibration images.
    """

    def loss(features: jax.Array, batch: dict[str, Any]) -> jax.Array:
        here = jax.lax.stop_gradient(features)
        relative = draw_directions(here[:, None], jax.random.key(1), batch["index"])[:, 0]
        square = jnp.square(here).sum(-1, keepdims=True)
        if name == "cosine":  # its Hessian is (1 - f f' / |f|^2) / |f|^2
            direction = (relative - here * (relative * here).sum(-1, keepdims=True) / square) / jnp.sqrt(2.0)
        elif name == "standardised":
            direction = relative * jnp.sqrt(square / len(deviations)) / deviations
        else:
            direction = relative
        return (direction * features).sum(-1)

    return loss


DISTANCES = ("relative", "cosine", "standardised")


class Judged:
    """Images that are judged on."""

    def __init__(self, split: Split, dense: nvit.Model) -> None:
        images, labels = split.read()
        self.images, self.groups, self.dense = images, np.array([group_of(int(label)) for label in labels]), dense

    def __call__(self, model: nvit.Model) -> dict[str, Any]:
        return nvit.evaluate(model, (self.images, self.groups), reference=self.dense, batch=25, progress=False)

    @property
    def largest(self) -> float:
        """The accuracy of whoever always says the largest group."""
        return float(np.bincount(self.groups).max() / len(self.groups))


def pruned(name: str, ratio: str, model: nvit.Model, images: np.ndarray, place: pathlib.Path) -> nvit.Model:
    """The model of one ratio: by the distance of that name, or as `prune` does it ("result").

    All ratios are made from one calibration, and kept at `place`.
    """
    *others, last = RATIOS
    places = {one: place / f"{one:g}" for one in RATIOS}
    if not all(one.exists() for one in places.values()):
        options: dict[str, Any] = {}
        if name != "result":
            options = {"criterion": "obs", "loss": directions(name, np.asarray(model(images)).std(0))}
        found = nvit.prune(model, images, macs=last, snapshots=tuple(others), measure=None, **options)
        for one in others:
            found.snapshots[one].compact().save(places[one])
        found.model.save(places[last])
    return nvit.load(place / ratio)


def choice_table(found: Mapping[str, Any]) -> str:
    """Markdown: a row for each distance."""
    lines = ["| distance | " + " | ".join(f"MACs {r:g}: cosine | relative error | kNN top-1" for r in RATIOS) + " |"]
    lines.append("|---|" + "---|---|---|" * len(RATIOS))
    for name in DISTANCES:
        if name in found["choice"]:
            cells = [_shown(found["choice"][name][f"{ratio:g}"]) for ratio in RATIOS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def result_table(found: Mapping[str, Any]) -> str:
    """Markdown: a row for each model."""
    lines = ["| MACs | cosine | relative error | kNN top-1 |", "|---|---|---|---|"]
    lines += [f"| {name} | {_shown(row)} |" for name, row in found["result"].items()]
    return "\n".join(lines)


def _shown(row: Mapping[str, Any]) -> str:
    return f"{row['cosine']:.4f} | {row['error']:.4f} | {row['knn']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=40, help="calibration images")
    parser.add_argument("--judged", type=int, default=100, help="images judged on, at most")
    parser.add_argument("--only", nargs="*", default=["result", *DISTANCES], choices=["result", *DISTANCES])
    options = parser.parse_args()
    model = nvit.load(options.model)
    pre = Preprocessing.from_json(model.info["preprocessing"])
    first, second = halves(options.images, options.classes, pre)
    order = np.random.default_rng(0).permutation(len(first))
    images = first.take(np.sort(order[: options.count])).read()[0]
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        kept = options.out / f"{name}.json"
        judged = second if name == "result" else first.take(np.sort(order[options.count :]))
        judge = Judged(judged.some(options.judged), model)
        part = read_json(kept) if kept.exists() else {"largest": judge.largest, "rows": {}}
        for row in ([DENSE] if name == "result" else []) + [f"{ratio:g}" for ratio in RATIOS]:
            if row not in part["rows"]:
                place = options.out / "models" / name
                part["rows"][row] = judge(model if row == DENSE else pruned(name, row, model, images, place))
                write_json(kept, part)
                print(f"{name}, MACs {row}: {part['rows'][row]}", flush=True)
    places = {name: options.out / f"{name}.json" for name in ("result", *DISTANCES)}
    parts = {name: read_json(path) for name, path in places.items() if path.exists()}
    found = {"choice": {name: part["rows"] for name, part in parts.items() if name != "result"}}
    if "result" in parts:
        found |= {"result": parts["result"]["rows"], "largest": parts["result"]["largest"]}
        print(f"\n{result_table(found)}")
    write_json(options.out / "features.json", found)
    print(f"\n{choice_table(found)}\n\n{timing.device_name()}")


if __name__ == "__main__":
    main()
