"""How well the latency table predicts whole models: measured against predicted ratios to the dense model.

    python main.py --config configs/checkpoint.py --workdir W --config.model=MODEL_DIR --stage latency
    python -m tests.ablations.latency --table W/latency/table.json --out runs/latency [--models 30]

Models of random widths that are neither in the grid nor among those that the table was corrected by are timed in turns
with the dense model, which is timed twice in every round: its two medians tell how far two timings of the same thing
are apart here (A/A). Writes table.json and latency.png under --out.
"""

import argparse
import pathlib

import matplotlib
import numpy as np

from nvit_jax.files import read_json, write_json
from nvit_jax.latency import table as latency
from nvit_jax.latency import timing
from nvit_jax.pruning import ranking

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GROUP = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("table", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--models", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--profile", default="cpu")
    options = parser.parse_args()
    table = latency.LatencyTable(read_json(options.table), str(options.table))
    dense, rng = table.dims, np.random.default_rng(options.seed)
    all_dims = [latency.random_dims(dense, ranking.group_sizes(options.profile), rng) for _ in range(options.models)]
    measured, apart = [], []
    for i in range(0, len(all_dims), GROUP):
        pieces = [(d, "model") for d in [dense, dense, *all_dims[i : i + GROUP]]]
        times = timing.time_in_turns(timing.compile_pieces(pieces, table.batch, table.dtype), options.repeats)
        ratios = np.median(times / times[:, :1], axis=0)
        apart.append(abs(float(ratios[1]) - 1))
        measured += ratios[2:].tolist()
        print(f"{len(measured)} of {len(all_dims)}, A/A {apart[-1]:.1%}", flush=True)
    predicted = np.array([table(d) for d in all_dims]) / table(dense)
    errors = predicted / np.array(measured) - 1
    found = {
        "device": timing.device_name(),
        "versions": {name: table.values.get(name) for name in ("jax", "jaxlib", "python", "nvit_jax")},
        "seed": options.seed,
        "table": {
            "models": len(table.values["models"]),
            "cells": len(table.values["cells"]),
            "leave_one_out_error": table.leave_one_out,
            "factors": table.factors.tolist(),
        },
        "batch": table.batch,
        "dtype": table.dtype,
        "median_error": float(np.median(np.abs(errors))),
        "worst_error": float(np.abs(errors).max()),
        "bias": float(np.median(errors)),
        "aa_median": float(np.median(apart)),
        "aa_worst": max(apart),
        "measured": measured,
        "predicted": predicted.tolist(),
        "dims": [{axis: getattr(d, axis) for axis in latency.AXES} for d in all_dims],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "table.json", found)
    print(
        f"{len(errors)} models on {found['device']}: median error {found['median_error']:.1%}, worst "
        f"{found['worst_error']:.1%}, median signed {found['bias']:+.1%}; the dense model against itself: median "
        f"{found['aa_median']:.1%}, worst {found['aa_worst']:.1%}"
    )
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="#9aa5b1", lw=1)
    axes.fill_between([0, 1], [0, 0.95], [0, 1.05], color="#9aa5b1", alpha=0.25, label="5 %")
    axes.plot(measured, predicted, "o", color="#0b6e99", ms=5)
    axes.set(
        xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="measured latency ratio", ylabel="predicted latency ratio"
    )
    axes.set_title(f"{len(errors)} random models, batch {table.batch}, {found['device']}", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(options.out / "latency.png", dpi=120)


if __name__ == "__main__":
    main()
