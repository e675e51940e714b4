"""A real checkpoint and random halves of its images: scores from one half, answers on the other."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from nvit_jax.data import datasets
from nvit_jax.data.sources import Arrays
from nvit_jax.files import read_json, write_json
from nvit_jax.latency import table as latency
from nvit_jax.model import vit
from nvit_jax.model.dims import Units
from nvit_jax.model.directory import Model, load_model
from nvit_jax.model.masks import full_masks
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.pruning import ranking
from tests.ablations.checkpoint import BATCH, score

FLOORS = {"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8}
SCORED = 224


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that every such ablation takes."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "table", "out"):
        found.add_argument(f"--{name}", type=pathlib.Path, required=True)
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--ratios", nargs="*", type=float, default=[0.8, 0.65])
    return found


@dataclasses.dataclass
class Draw:
    """One random half: the images that scores come from, and what is counted on the others."""

    seed: int
    calibration: datasets.Split
    held: datasets.Split
    dense: np.ndarray  # log-probabilities of the dense model on the held images
    answers: Callable[[Units, datasets.Split], np.ndarray]
    model: Model
    pre: Preprocessing
    out: pathlib.Path

    def scores(self, criterion: str) -> Units:
        """Of one pass over the calibration images. Kept under `out`, and read again."""
        kept = self.out / f"{criterion}_{self.seed}.npz"
        if not kept.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            found, seconds = score(self.model, self.calibration, self.pre, criterion, "kind", seed=self.seed)
            print(f"seed {self.seed}: {criterion} scored in {seconds:.0f} s", flush=True)
            np.savez(kept, **found._asdict())
        with np.load(kept) as arrays:
            return Units(*(arrays[f] for f in Units._fields))

    def judge(self, result: ranking.Ranking) -> tuple[float, float]:
        """Top-1 in percent, and the mean KL divergence of the pruned model's answers from the dense one's."""
        assert result.met
        ours = self.answers(result.masks, self.held)
        divergence = (np.exp(self.dense) * (self.dense - ours)).sum(-1).mean()
        return 100 * (ours.argmax(-1) == self.labels).mean(), float(divergence)

    @property
    def labels(self) -> np.ndarray:
        """Of the held images."""
        return self.held.source.labels


def draws(options: argparse.Namespace) -> Iterator[tuple[Draw, latency.LatencyTable]]:
    """One Draw a seed, with the latency table."""
    model = load_model(options.model)
    dims = model.dims
    table = latency.LatencyTable(read_json(options.table), str(options.table))
    pre = Preprocessing.from_json(model.info["preprocessing"])
    paths = {"train": str(options.images), "val": str(options.images), "classes": str(options.classes)}
    images, labels = datasets.load_dataset("folder", **paths, preprocessing=pre).split("train").read()
    forward = jax.jit(lambda p, m, x: jax.nn.log_softmax(vit.forward(dims, p, x, m).mean(1)))

    def answers(masks: Units, held: datasets.Split) -> np.ndarray:
        whole = held.source.images
        whole = np.concatenate([whole, whole[: -len(held) % BATCH]])
        parts = [forward(model.params, masks, pre(whole[i : i + BATCH])) for i in range(0, len(whole), BATCH)]
        return np.concatenate(parts)[: len(held)]

    for seed in range(options.seeds):
        order = np.random.default_rng(seed).permutation(len(labels))
        calibration, held = (datasets.Split(Arrays(images[i], labels[i])) for i in (order[:SCORED], order[SCORED:]))
        dense = answers(full_masks(dims), held)
        yield Draw(seed, calibration, held, dense, answers, model, pre, options.out), table


def print_rows(rows: dict[str, list[tuple[float, float, float]]], options: argparse.Namespace) -> None:
    """Means and spreads of (top-1, KL, cost) as a table; all rows are kept under --out."""
    print(f"\n{options.seeds} seeds, {SCORED} images scored\n")
    print("| what | cost | top-1 | KL to dense |\n|---|---|---|---|")
    for name, values in rows.items():
        mean, spread = np.mean(values, 0), np.std(values, 0, ddof=1) if len(values) > 1 else np.zeros(3)
        print(f"| {name} | {mean[2]:.3f} | {mean[0]:.1f} ± {spread[0]:.1f} % | {mean[1]:.3f} ± {spread[1]:.3f} |")
    write_json(options.out / "rows.json", rows)
