"""How well a probing scheme ranks the units, against its cost: the curve behind the default of `saliency.hvp`.

    python -m tests.ablations.probing --workdir runs/demo [--loss kl] [--images 256] [--keys 2]

Takes the dense model of a finished run. The truth is the exact diagonal of the Hessian of the gates on the same
images (one product for each unit, minutes). Printed for each scheme: Hessian-vector products, seconds, Spearman's
rank correlation with the truth over all units (mean over --keys probes), and what a ranking by it loses: the
validation loss of the demo's one-shot pruning to half of the MACs, no training, beside that of the exact diagonal.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

import nvit_jax
from nvit_jax.data import datasets
from nvit_jax.data.pipeline import train_stream
from nvit_jax.model import vit
from nvit_jax.model.masks import full_masks
from nvit_jax.pruning import saliency
from nvit_jax.pruning.ranking import Policy, group_sizes, make_targets, rank
from nvit_jax.training.losses import Objective, cross_entropy, draw_labels, objective_loss

SCHEMES = [  # scheme, units of a chunk, probes
    ("all", 0, 1),
    ("all", 0, 16),
    ("all", 0, 64),
    ("kind", 0, 1),
    ("kind", 0, 16),
    ("block", 0, 1),
    ("block", 0, 8),
    ("part", 0, 1),
    ("part", 0, 4),
    ("chunk", 64, 1),
    ("chunk", 16, 1),
    ("chunk", 8, 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--loss", default="kl", choices=("kl", "labels"))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--keys", type=int, default=2)
    options = parser.parse_args()
    model = nvit_jax.load_model(f"{options.workdir}/pretrain/model")
    dims, params = model.dims, model.params
    dataset = datasets.load_dataset("digits")
    train, val = dataset.splits["train"], dataset.splits["val"]
    batch = train_stream(train, options.images, (0,))(0)
    batch["image"] = dataset.preprocessing(batch["image"])
    batch["teacher"] = np.asarray(model.apply(params, batch["image"]))[:, None]
    kl = Objective(label_weight=0.0, kl_weight=float(dims.classes))
    masks = jax.tree.map(jnp.asarray, full_masks(dims))

    def loss(params, masks, batch, objective=None):
        objective = objective or (kl if options.loss == "kl" else Objective())
        return objective_loss(objective, vit.forward(dims, params, batch["image"], masks), batch)[0]

    policy = Policy(sizes=group_sizes("cpu"), floors={"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8})
    targets = make_targets({"macs_ratio": 0.5}, dims, None)
    raw, labels = val.read()
    images = dataset.preprocessing(raw)

    @jax.jit
    def val_loss(masks):
        return cross_entropy(vit.forward(dims, params, images, masks).mean(1), labels).mean()

    def flat(units) -> np.ndarray:
        return np.concatenate([np.ravel(u) for u in units])

    def pruned_loss(scores) -> float:
        return float(val_loss(rank(jax.tree.map(np.asarray, scores), masks, dims, policy, targets).masks))

    def run(function):
        """(scores of each key, seconds of one without compilation)"""
        compiled = jax.jit(function).lower(params, masks, batch, jax.random.key(0)).compile()
        start = time.perf_counter()
        out = [jax.block_until_ready(compiled(params, masks, batch, jax.random.key(k))) for k in range(options.keys)]
        return out, (time.perf_counter() - start) / options.keys

    def line(name, products, seconds, draws, exact) -> None:
        rho = np.mean([spearmanr(flat(d), exact)[0] for d in draws])
        losses = np.mean([pruned_loss(d) for d in draws])
        print(f"{name:<22} {products:>9} {seconds:>8.1f} {rho:>9.3f} {losses:>10.3f}", flush=True)

    units = sum(m.size for m in masks)
    print(f"{units} units, {options.images} images, loss {options.loss}; dense validation loss {val_loss(masks):.3f}")
    print(f"{'scheme x probes':<22} {'products':>9} {'seconds':>8} {'Spearman':>9} {'val loss':>10}")
    truth, total, start = jax.jit(lambda p, m, b, k: saliency.hvp(loss, p, m, b, k, scheme="unit")), None, time.time()
    for i in range(0, options.images, 32):  # a mean over images; small batches stay in the cache
        part = truth(params, masks, {name: value[i : i + 32] for name, value in batch.items()}, jax.random.key(0))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    exact_units = jax.tree.map(lambda t: t / (options.images // 32), total)
    exact = flat(exact_units)
    line("unit (exact)", units, time.time() - start, [exact_units], exact)
    for scheme, chunk, probes in SCHEMES:
        draws, seconds = run(
            lambda p, m, b, k, scheme=scheme, chunk=chunk, probes=probes: saliency.hvp(
                loss, p, m, b, k, scheme=scheme, chunk=chunk, probes=probes
            )
        )
        count = saliency._probe_parts(masks, scheme, chunk)[1] * probes
        line(f"{scheme} {chunk or ''} x {probes}", count, seconds, draws, exact)

    def drawn(p, m, b, k):
        b = b | {"label": draw_labels(b["teacher"], k, b["index"])}
        return saliency.fisher(lambda p, m, b: loss(p, m, b, Objective()), p, m, b)

    draws, seconds = run(drawn)
    line("fisher, drawn labels", "-", seconds, draws, exact)


if __name__ == "__main__":
    main()
