"""A real checkpoint pruned in one shot to latency targets, rule against rule, and aligned heads against free ones.

    python -m tests.ablations.rules --model MODEL_DIR --images DIR --classes FILE.tsv --table W/latency/table.json \
        --out runs/rules

Each seed draws 224 of the images for the scores (`fisher`) and counts on the others. Two measures: top-1, and the mean
KL divergence of the pruned model's answers from the dense one's, which is finer than counting. `eta` is tried at a
tenth, one and ten times what `per_cost` pays per millisecond, since nobody knows it beforehand. Heads: query/key and
value dims alone are removed, down to 3/4 and 1/2 of them, with one index for all heads (shared) or each head its own.
"""

import argparse
import pathlib

import jax
import numpy as np

from nvit_jax import allocation, data, latency, models, ranking
from nvit_jax.api import load_model
from nvit_jax.checkpoint import read_json, write_json
from nvit_jax.dims import Units
from nvit_jax.masks import full_masks
from tests.ablations.checkpoint import BATCH, score

FLOORS = {"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8}
SCORED = 224


def attention_dims(dims) -> float:
    """Query/key and value dims over the model."""
    return float(sum(h * (q + v) for h, q, v in zip(dims.heads, dims.qk, dims.v, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "table", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.8, 0.65])
    options = parser.parse_args()
    model, sizes = load_model(options.model), ranking.group_sizes("cpu")
    dims, masks = model.dims, full_masks(model.dims)
    table = latency.LatencyTable(read_json(options.table), str(options.table))
    pre = data.Preprocessing.from_json(model.info["preprocessing"])
    paths = {"train": str(options.images), "val": str(options.images), "classes": str(options.classes)}
    everything = data.load_dataset("folder", **paths, preprocessing=pre).split("train")
    images, labels = everything.images[slice(None)], everything.labels
    forward = jax.jit(lambda p, m, x: jax.nn.log_softmax(models.forward(dims, p, x, m).mean(1)))

    def answers(m: Units, held: data.Split) -> np.ndarray:
        padded = -len(held) % BATCH
        whole = np.concatenate([held.images, held.images[:padded]])
        parts = [forward(model.params, m, pre(whole[i : i + BATCH])) for i in range(0, len(whole), BATCH)]
        return np.concatenate(parts)[: len(held)]

    rows: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(options.seeds):
        order = np.random.default_rng(seed).permutation(len(labels))
        calibration, rest = order[:SCORED], order[SCORED:]
        kept = options.out / f"fisher_{seed}.npz"
        if not kept.exists():
            options.out.mkdir(parents=True, exist_ok=True)
            found, _ = score(model, data.Split(images[calibration], labels[calibration]), pre, "fisher", "kind")
            np.savez(kept, **found._asdict())
        with np.load(kept) as arrays:
            scores = Units(*(arrays[f] for f in Units._fields))
        held = data.Split(images[rest], labels[rest])

        dense = answers(masks, held)

        def add(name: str, result: ranking.Ranking, cost: float, seed=seed, dense=dense, held=held) -> None:
            assert result.met
            ours = answers(result.masks, held)
            divergence = (np.exp(dense) * (dense - ours)).sum(-1).mean()
            top1 = (ours.argmax(-1) == held.labels).mean()
            rows.setdefault(name, []).append((100 * top1, float(divergence), cost))
            print(f"seed {seed}: {name}: top-1 {top1:.1%}, KL {divergence:.3f}, cost {cost:.3f}", flush=True)

        rows.setdefault("dense", []).append((100 * (dense.argmax(-1) == held.labels).mean(), 0.0, 1.0))
        plain = ranking.Policy(sizes=sizes, floors=FLOORS, latency=table)
        for ratio in options.ratios:
            targets = ranking.make_targets({"latency_ratio": ratio}, dims, table)
            by_cost = ranking.rank(scores, masks, dims, plain, targets)
            price = sum(r.score for r in by_cost.removed) / (table(dims) - table(by_cost.dims))
            results = {
                "per_cost": by_cost,
                "solve": allocation.allocate(scores, masks, dims, plain, targets),
            }
            for factor in (0.1, 1.0, 10.0):
                policy = ranking.Policy(sizes=sizes, floors=FLOORS, rule="eta", eta=factor * price, latency=table)
                results[f"eta x{factor:g}"] = ranking.rank(scores, masks, dims, policy, targets)
            for rule, result in results.items():
                add(f"latency {ratio} {rule}", result, table(result.dims) / table(dims))
        for part in (0.75, 0.5):
            for align in ("per_head", "shared"):
                policy = ranking.Policy(sizes=sizes, floors=FLOORS, kinds=("qk", "v"), align=align)
                whole = attention_dims(dims)
                target = ranking.Target("attention dims", attention_dims, part * whole, whole)
                result = ranking.rank(scores, masks, dims, policy, [target])
                add(f"attention dims {part} {align}", result, attention_dims(result.dims) / whole)
    print(f"\n{options.seeds} seeds, {SCORED} images scored, {len(labels) - SCORED} counted\n")
    print("| what | cost | top-1 | KL to dense |\n|---|---|---|---|")
    for name, values in rows.items():
        mean, spread = np.mean(values, 0), np.std(values, 0, ddof=1)
        print(f"| {name} | {mean[2]:.3f} | {mean[0]:.1f} ± {spread[0]:.1f} % | {mean[1]:.3f} ± {spread[1]:.3f} |")
    write_json(options.out / "rules.json", rows)


if __name__ == "__main__":
    main()
