"""The demo pruned to the same targets by several criteria: means over seeds. The table of the README.

    python -m tests.ablations.criteria --out runs/criteria [--seeds 3] [--criteria fisher obd taylor magnitude random]

Each seed is one run of configs/demo.py with config.compare: its own dense model, the same latency table, targets,
images per pruning and finetuning for every criterion. Finished runs are not repeated.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--criteria", nargs="*", default=["fisher", "obd", "taylor", "magnitude", "random"])
    options = parser.parse_args()
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(options.seeds):
        workdir = options.out / str(seed)
        compare = f"--config.compare=({''.join(repr(c) + ',' for c in options.criteria)})"
        command = ["main.py", "--config=configs/demo.py", f"--workdir={workdir}", f"--config.seed={seed}", compare]
        subprocess.run([sys.executable, *command], check=True)
        places = {"hvp": workdir} | {c: workdir / "compare" / c for c in options.criteria}
        for criterion, place in places.items():
            summary = json.loads((place / "summary.json").read_text())
            pruned = json.loads((place / "prune" / "metrics.json").read_text())
            dense, small, final = (summary[name]["top1"] for name in ("dense", "pruned", "finetuned"))
            ratios = (pruned["macs_ratio"], pruned["latency_ratio"])
            rows.setdefault("dense", []).append((dense, dense, 1.0, 1.0, 0.0))
            rows.setdefault(criterion, []).append((small, final, *ratios, pruned["seconds"]))
    print(f"{'criterion':<11} {'pruned':>16} {'finetuned':>16} {'MACs':>6} {'latency':>8} {'prune s':>8}")
    for criterion, values in rows.items():
        mean, spread = np.mean(values, 0), np.std(values, 0, ddof=1) if len(values) > 1 else np.zeros(5)
        print(
            f"{criterion:<11} {mean[0]:>8.2%} ± {spread[0]:.2%} {mean[1]:>8.2%} ± {spread[1]:.2%} "
            f"{mean[2]:>6.3f} {mean[3]:>8.3f} {mean[4]:>8.0f}"
        )


if __name__ == "__main__":
    main()
