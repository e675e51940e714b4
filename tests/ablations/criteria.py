"""The demo pruned to the same target by several criteria or rules: means over seeds. Tables of docs/results.md.

    python -m tests.ablations.criteria --out runs/criteria [--seeds 3] [--criteria hvp fisher] [--rules per_cost]
        [--target latency_ratio=0.65] [--keys prune.score.batches=4 ...]

Each seed is one dense model and one latency table by configs/demo.py:gradual; every criterion with every rule prunes
and finetunes it: the same targets, images per pruning and finetuning. Rule `eta` takes the price per millisecond at
which `per_cost` ended, since nobody knows it beforehand. Finished runs are not repeated.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np

from nvit_jax.files import read_json
from nvit_jax.pruning.saliency import CRITERIA
from nvit_jax.run.workdir import read_lines

MEASURES = ("pruned", "finetuned", "MACs", "params", "predicted", "measured", "seconds")


def run(workdir: pathlib.Path, *more: str) -> None:
    config = "--config=configs/demo.py:gradual"
    subprocess.run([sys.executable, "main.py", config, f"--workdir={workdir}", *more], check=True)


def cell(base: pathlib.Path, place: pathlib.Path, criterion: str, rule: str, shared: list[str]) -> tuple[float, ...]:
    """One pruning and finetuning of the dense model under `base`."""
    more = [*shared, f"--config.prune.criterion={criterion}", f"--config.prune.rule={rule}"]
    if rule == "eta":
        other = place.with_name(f"{criterion}-per_cost") / "prune"
        found = read_json(other / "metrics.json")  # its price is per fraction of the dense latency
        dense_ms = found["predicted_latency_ms"] / found["predicted_latency_ratio"]
        more.append(f"--config.prune.eta={read_lines(other / 'history.jsonl')[-1]['threshold'] / dense_ms}")
    place.mkdir(parents=True, exist_ok=True)
    for stage in ("pretrain", "latency"):
        if not (place / stage).exists():
            (place / stage).symlink_to((base / stage).resolve(), target_is_directory=True)
    run(place, "--config.stages=('prune','finetune','eval')", *more)
    summary, pruned = read_json(place / "summary.json"), read_json(place / "prune" / "metrics.json")
    ratios = [pruned[f"{name}ratio"] for name in ("macs_", "params_", "predicted_latency_", "latency_")]
    return 100 * summary["pruned"]["top1"], 100 * summary["finetuned"]["top1"], *ratios, pruned["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--criteria", nargs="*", choices=CRITERIA, default=["hvp", "fisher", "magnitude"])
    parser.add_argument("--rules", nargs="*", choices=["per_cost", "solve", "eta", "nvit"], default=["per_cost"])
    parser.add_argument("--target", nargs="*", default=["latency_ratio=0.65"])
    parser.add_argument("--keys", nargs="*", default=[])
    options = parser.parse_args()
    targets = {"macs_ratio": "None", "latency_ratio": "None"} | dict(t.split("=") for t in options.target)
    shared = [f"--config.prune.target.{name}={value}" for name, value in targets.items()]
    shared += [f"--config.{key}" for key in options.keys]
    rows: dict[str, list[tuple[float, ...]]] = {}
    dense = []
    for seed in range(options.seeds):
        base, seeded = options.out / f"{seed}" / "dense", [f"--config.seed={seed}"]
        run(base, "--config.stages=('pretrain','latency','eval')", *seeded)
        dense.append(100 * read_json(base / "summary.json")["dense"]["top1"])
        for criterion in options.criteria:
            for rule in options.rules:
                place = options.out / f"{seed}" / f"{criterion}-{rule}"
                rows.setdefault(f"{criterion} {rule}", []).append(
                    cell(base, place, criterion, rule, [*seeded, *shared])
                )
    spread = np.std(dense, ddof=1) if len(dense) > 1 else 0.0
    print(f"\n{options.seeds} seeds, {' '.join(options.target)}, dense {np.mean(dense):.2f} ± {spread:.2f} %\n")
    print(f"| criterion and rule | {' | '.join(MEASURES)} |\n|---|{'---|' * len(MEASURES)}")
    for name, values in rows.items():
        mean, apart = np.mean(values, 0), np.std(values, 0, ddof=1) if len(values) > 1 else np.zeros(len(MEASURES))
        accuracies = [f"{mean[i]:.2f} ± {apart[i]:.2f} %" for i in (0, 1)]
        print(f"| {name} | {' | '.join([*accuracies, *(f'{m:.3f}' for m in mean[2:6]), f'{mean[6]:.0f}'])} |")


if __name__ == "__main__":
    main()
