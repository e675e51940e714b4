"""A real checkpoint pruned in one shot, without any training, by every criterion: a table of docs/results.md.

    python -m tests.ablations.checkpoint --model MODEL_DIR --images DIR --classes FILE.tsv --out runs/checkpoint

The images are split in two by hash of their names: scores come from one half, accuracies from the other, image by
image, so that a difference to the dense model has a paired standard error. Every compact model is exported to
safetensors and counted again in PyTorch. Latencies of all models are measured in turns in one process. Scores are kept
under --out and read again, so that a stopped run goes on.
"""

import argparse
import pathlib
import time

import jax
import numpy as np

from nvit_jax.data import datasets
from nvit_jax.data.mixing import prepare
from nvit_jax.data.pipeline import train_stream
from nvit_jax.files import write_json
from nvit_jax.formats import export
from nvit_jax.latency import timing
from nvit_jax.model.dims import Units, count_macs, count_params
from nvit_jax.model.directory import Model, load_model
from nvit_jax.model.masks import full_masks
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.model.reshape import reshape
from nvit_jax.parallel import Parallel
from nvit_jax.pruning import ranking
from nvit_jax.pruning.saliency import CRITERIA
from nvit_jax.pruning.scoring import Scoring, make_score_step
from nvit_jax.training.distill import Inputs, TrainState
from nvit_jax.training.losses import Objective
from tests.ablations.halves import halves

BATCH = 16


def score(
    model: Model, split: datasets.Split, pre: Preprocessing, name: str, scheme: str, seed: int = 0
) -> tuple[Units, float]:
    """Scores averaged over one pass over the split, and the seconds it took without compilation."""
    second_order = name in ("hvp", "obd")
    scoring = Scoring(criterion=name, **({"scheme": scheme} if second_order else {}))
    step = Parallel.create("jit", tuple(jax.devices()[:1])).compile(
        prepare(pre, make_score_step(model.dims, scoring, Objective()))
    )
    key = jax.random.key_data(jax.random.key(seed))
    inputs = Inputs(TrainState(np.int32(0), model.params, None, None, full_masks(model.dims), key), model.params)
    stream = train_stream(split, BATCH, (seed,))
    total, count, start = None, len(split) // BATCH, 0.0
    for i in range(count if name not in ("magnitude", "random") else 1):
        batch = stream(i)
        batch["index"] = batch["index"] + i * BATCH
        part = jax.tree.map(lambda s: np.asarray(s, np.float64), step(inputs, batch))
        total = part if total is None else jax.tree.map(np.add, total, part)
        start = start or time.monotonic()
    seconds = (time.monotonic() - start) * count / max(count - 1, 1)
    return Units(*total), seconds


def hits(run, split: datasets.Split, pre: Preprocessing) -> np.ndarray:
    """1 where the largest logit is the label's."""
    found = []
    for i in range(0, len(split), BATCH):
        images, labels = split.read(slice(i, i + BATCH))
        found.append(run(pre(images)).argmax(-1) == labels)
    return np.concatenate(found).astype(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--criteria", nargs="*", default=list(CRITERIA))
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.9, 0.8])
    parser.add_argument("--scheme", default="kind", help="of hvp and obd")
    options = parser.parse_args()
    model = load_model(options.model)
    pre = Preprocessing.from_json(model.info["preprocessing"])
    train, val = halves(options.images, options.classes, pre)
    policy = ranking.Policy(sizes=ranking.group_sizes("cpu"), floors={"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8})
    dense = hits(lambda x: np.asarray(model.apply(model.params, x)), val, pre)
    rows = [("dense", 1.0, model, dense, dense, 0.0)]
    for name in options.criteria:
        kept = options.out / f"{name}.npz"
        if kept.exists():
            with np.load(kept) as arrays:
                scores, seconds = Units(*(arrays[f] for f in Units._fields)), float(arrays["seconds"])
        else:
            scores, seconds = score(model, train, pre, name, options.scheme)
            options.out.mkdir(parents=True, exist_ok=True)
            np.savez(kept, seconds=seconds, **scores._asdict())
        for ratio in options.ratios:
            targets = ranking.make_targets({"macs_ratio": ratio}, model.dims, None)
            found = ranking.rank(scores, full_masks(model.dims), model.dims, policy, targets)
            dims, params = reshape(model.params, found.masks, model.dims)
            compact = Model(dims, params, info=model.info)
            ours = hits(lambda x, m=compact: np.asarray(m.apply(m.params, x)), val, pre)
            place = options.out / f"{name}_{ratio}"
            place.mkdir(exist_ok=True)
            theirs = hits(export.write_safetensors(compact, place).run, val, pre)
            rows.append((name, ratio, compact, ours, theirs, seconds))
            print(f"{name} {ratio}: {ours.mean():.2%}, in PyTorch {theirs.mean():.2%}", flush=True)
    times = timing.measure([row[2].dims for row in rows], timing.Measurement(batch=32, dtype="float32", repeats=7))
    print(f"\ncalibration {len(train) // BATCH * BATCH} images, evaluation n = {len(val)}, {timing.device_name()}\n")
    columns = ("criterion", "MACs asked", "MACs", "params", "latency", "top-1 ± s.e.", "to dense, paired ± s.e.")
    print("| " + " | ".join((*columns, "PyTorch", "seconds")) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    records = []
    for (name, ratio, compact, ours, theirs, seconds), ms in zip(rows, times, strict=True):
        difference, root = ours - dense, len(ours) ** 0.5
        record = {
            "criterion": name,
            "asked": ratio,
            "macs": count_macs(compact.dims) / count_macs(model.dims),
            "params": count_params(compact.dims) / count_params(model.dims),
            "latency": ms.ms / times[0].ms,
            "top1": ours.mean(),
            "top1_se": ours.std(ddof=1) / root,
            "difference": difference.mean(),
            "difference_se": difference.std(ddof=1) / root,
            "pytorch_top1": theirs.mean(),
            "seconds": seconds,
            "dims": compact.dims.to_json(),
        }
        records.append(record)
        print(
            f"| `{name}` | {ratio} | {record['macs']:.3f} | {record['params']:.3f} | {record['latency']:.3f} "
            f"| {record['top1']:.1%} ± {record['top1_se']:.1%} "
            f"| {100 * record['difference']:+.1f} ± {100 * record['difference_se']:.1f} "
            f"| {record['pytorch_top1']:.1%} | {seconds:.0f} |"
        )
    write_json(options.out / "table.json", records)


if __name__ == "__main__":
    main()
