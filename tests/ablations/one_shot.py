"""One shot without a gradient step, with each of its ingredients left out: the table of docs/results.md.

    python -m tests.ablations.one_shot --model MODEL_DIR --images DIR --classes FILE.tsv --out runs/one_shot

The images are split in two by hash of their paths. Each draw takes some images of one half to calibrate on; top-1
and the mean KL divergence from the unpruned model's answers are of the whole other half. Every result is kept under
--out at once, so that a stopped run goes on. Torch-Pruning on the same images: tests/ablations/torch_pruned.py.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from nvit_jax.api.targets import FLOORS, OBS_KINDS
from nvit_jax.data import datasets
from nvit_jax.data.feed import SplitFeed
from nvit_jax.files import read_json, write_json
from nvit_jax.latency import timing
from nvit_jax.model import vit
from nvit_jax.model.dims import Units, count_macs
from nvit_jax.model.directory import Model, load_model
from nvit_jax.model.masks import full_masks
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.model.reshape import reshape
from nvit_jax.parallel import fetch
from nvit_jax.pruning import allocation, compensation, obs, ranking
from nvit_jax.pruning.compensation import Chosen
from nvit_jax.pruning.one_shot import OneShot, calibration_images
from nvit_jax.pruning.statistics import Walk, padded_block
from nvit_jax.training.monitor import Monitor
from tests.ablations.checkpoint import score
from tests.ablations.halves import halves

BATCH = 32
ANEW, KEEP = Chosen(values=True, neurons=True), Chosen(values=False, neurons=False)
INGREDIENTS = (
    "everything",
    "no compensation",
    "not chosen anew",
    "not sequential",
    "no re-basis",
    "no real cuts",
    "per_cost instead of solve",
    "fisher, compensated",
    "fisher_set, compensated",
    "fisher alone",
    "fisher_set alone",
)


@dataclasses.dataclass
class Judge:
    """The other half of the images."""

    images: np.ndarray  # normalised
    labels: np.ndarray
    dense: np.ndarray  # log-probabilities of the unpruned model

    @classmethod
    def create(cls, model: Model, split: datasets.Split, pre: Preprocessing) -> "Judge":
        images, labels = split.read()
        found = cls(np.asarray(pre(images)), labels, np.zeros(0))
        found.dense = found.answers(model)
        return found

    def answers(self, model: Model) -> np.ndarray:
        """[n, C] log-probabilities."""
        run = jax.jit(lambda p, x: jax.nn.log_softmax(vit.forward(model.dims, p, x).mean(1)))
        count = len(self.images)
        whole = np.concatenate([self.images, self.images[: -count % BATCH]])
        return np.concatenate([run(model.params, whole[i : i + BATCH]) for i in range(0, len(whole), BATCH)])[:count]

    def __call__(self, model: Model) -> dict[str, float]:
        ours = self.answers(model)
        divergence = (np.exp(self.dense) * (self.dense - ours)).sum(-1).mean()
        return {"top1": float((ours.argmax(-1) == self.labels).mean()), "divergence": float(divergence)}


class Draw:
    """Calibration images, and what is found on them; each at its first use."""

    def __init__(self, model: Model, split: datasets.Split, pre: Preprocessing, count: int, seed: int) -> None:
        self.model, self.pre, self.seed, self.count = model, pre, seed, count
        self.split = split.take(np.random.default_rng(seed).permutation(len(split))[:count])
        self.params = fetch(model.params)
        self._known: dict[Any, Any] = {}

    def _once(self, key: Any, find: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    @property
    def walk(self) -> Walk:
        def find() -> Walk:
            feed = SplitFeed(self.split, self.pre)
            images = calibration_images(feed, None, None, (self.seed, 2, 1), Monitor(), labels=False)
            return Walk(self.model.dims, images, feed.normalise)

        return self._once("walk", find)

    @property
    def felt(self) -> Any:
        return self._once("felt", lambda: self.walk.sensitivities(self.params, self.seed, 2, None, lambda done: None))

    def scored(self, *, turned: bool = True, calibrated: bool = True) -> obs.Scored:
        find = lambda: obs.score(self.walk, self.params, self.felt, turned=turned, calibrated=calibrated)  # noqa: E731
        return self._once((turned, calibrated), find)

    @property
    def fisher(self) -> Units:
        return self._once("fisher", lambda: score(self.model, self.split, self.pre, "fisher", "kind", self.seed)[0])

    @property
    def sets(self) -> Units:
        """Scores of fisher_set."""

        def find() -> Units:
            one = OneShot(self.walk, self.params, self.seed, None, Monitor())
            return one.score_sets(lambda kind, block: kind in OBS_KINDS, lambda kind, block: False)[0]

        return self._once("fisher_set", find)

    def allocated(self, scores: Units, ratio: float, rule: str, kinds: tuple[str, ...]) -> Units:
        dims, sizes = self.model.dims, ranking.group_sizes("cpu")
        policy = ranking.Policy(sizes=sizes, floors=FLOORS, kinds=kinds, rule=rule)
        targets = ranking.make_targets({"macs_ratio": ratio}, dims, None)
        choose = allocation.allocate if rule == "solve" else ranking.rank
        return self._once(
            (id(scores), ratio, rule), lambda: choose(scores, full_masks(dims), dims, policy, targets)
        ).masks

    def compensated(self, params: Any, masks: Units, chosen: Chosen) -> Model:
        found = compensation.compensate(self.walk, self.params, params, masks, self.felt, chosen, use_held=True)
        return self.cut(found.params, found.masks)

    def against_dense(self, params: Any, masks: Units, chosen: Chosen) -> Model:
        """Compensation that is not sequential: every part is fitted on the unpruned model's own stream."""
        walk, dims = self.walk, self.model.dims
        before, out, kept = walk.begin(self.params), dict(params), Units(*(np.array(m) for m in masks))
        for index in range(dims.depth):
            name = f"block_{index}"
            block, original = params[name], padded_block(dims, self.params[name])
            for part, feel in zip(vit.PARTS, self.felt[2 * index : 2 * index + 2], strict=True):
                after = walk.advance(part, original, before)
                found = compensation.part_moments(walk, block, kept, index, part, before, after)
                block, found = compensation.choose(dims, block, kept, index, part, found, feel, chosen, use_held=True)
                block = compensation.fit_part(dims, block, kept, index, part, found, feel, use_held=True)
                before = after
            out[name] = block
        return self.cut(out, kept)

    def cut(self, params: Any, masks: Units) -> Model:
        dims, small = reshape(params, masks, self.model.dims)
        return Model(dims, small, info=self.model.info)

    def made(self, name: str, ratio: float) -> Model:
        """The model of one row of the table."""
        if name.startswith("fisher"):
            scores = self.sets if name.startswith("fisher_set") else self.fisher
            masks = self.allocated(scores, ratio, "per_cost", OBS_KINDS)
            return (
                self.compensated(self.params, masks, KEEP)
                if name.endswith("compensated")
                else self.cut(self.params, masks)
            )
        found = self.scored(turned=name != "no re-basis", calibrated=name != "no real cuts")
        rule = "per_cost" if name.startswith("per_cost") else "solve"
        masks = self.allocated(found.scores, ratio, rule, OBS_KINDS)
        if name == "no compensation":
            return self.cut(found.params, masks)
        if name == "not sequential":
            return self.against_dense(found.params, masks, ANEW)
        chosen = {"not chosen anew": KEEP, "no re-basis": Chosen(values=False, neurons=True)}.get(name, ANEW)
        return self.compensated(found.params, masks, chosen)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One result of the table."""

    name: str
    images: int
    seed: int
    ratio: float

    @property
    def key(self) -> str:
        return f"{self.name} | {self.images} | {self.seed} | {self.ratio}"


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """In an order in which a draw is prepared once."""
    for seed in range(options.draws):
        for name in options.methods:
            for ratio in options.ratios:
                yield Cell(name, options.count, seed, ratio)
    for count in options.counts:
        for ratio in options.ratios:
            yield Cell("everything", count, 0, ratio)


def table(found: dict[str, Any], wanted: list[Cell]) -> str:
    """Markdown: a row for each method and number of images, a column for each size; mean ± spread over the draws."""
    ratios = sorted({cell.ratio for cell in wanted}, reverse=True)
    lines = ["| | images | " + " | ".join(f"MACs {r:g}: top-1 | KL" for r in ratios) + " |"]
    lines.append("|---|---|" + "---|---|" * len(ratios))
    for name, count in dict.fromkeys((cell.name, cell.images) for cell in wanted):
        row = [name, str(count)]
        for ratio in ratios:
            own = [
                found[c.key] for c in wanted if (c.name, c.images, c.ratio) == (name, count, ratio) and c.key in found
            ]
            for value, form in (("top1", "{:.1%}"), ("divergence", "{:.3f}")):
                values = [o[value] for o in own]
                text = form.format(np.mean(values)) if values else "not run"
                row.append(text + (f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else ""))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "out"):
        found.add_argument(f"--{name}", type=pathlib.Path, required=True)
    found.add_argument("--methods", nargs="*", default=list(INGREDIENTS), choices=INGREDIENTS)
    found.add_argument("--ratios", nargs="*", type=float, default=[0.8, 0.65, 0.5])
    found.add_argument("--draws", type=int, default=3)
    found.add_argument("--count", type=int, default=100, help="calibration images of a draw")
    found.add_argument("--counts", nargs="*", type=int, default=[32, 250], help="more numbers of them, one draw each")
    return found


def main() -> None:
    options = parser().parse_args()
    model = load_model(options.model)
    pre = Preprocessing.from_json(model.info["preprocessing"])
    train, judged = halves(options.images, options.classes, pre)
    judge = Judge.create(model, judged, pre)
    kept = options.out / "cells.json"
    found = read_json(kept) if kept.exists() else {"dense": judge(model)}
    print(f"unpruned: {found['dense']['top1']:.1%}", flush=True)
    wanted = list(cells(options))
    draw: Draw | None = None
    for number, cell in enumerate(wanted):
        if cell.key in found:
            continue
        if draw is None or (draw.seed, draw.count) != (cell.seed, cell.images):
            draw = Draw(model, train, pre, cell.images, cell.seed)
        small = draw.made(cell.name, cell.ratio)
        found[cell.key] = judge(small) | {"macs": count_macs(small.dims) / count_macs(model.dims)}
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(kept, found)
        told = found[cell.key]
        print(f"{number + 1}/{len(wanted)} {cell.key}: {told['top1']:.1%}, KL {told['divergence']:.3f}", flush=True)
    print(f"\n{table(found, wanted)}\n\n{len(judge.labels)} images judged, {timing.device_name()}")


if __name__ == "__main__":
    main()
