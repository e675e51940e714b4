"""One shot as a user calls it: families of MACs and of latency budgets, and what every step takes in time and memory.

    python -m tests.ablations.budgets --model MODEL_DIR --images DIR --classes FILE.tsv --out runs/budgets
    python -m tests.ablations.budgets --random deit_base --count 256 --out runs/budgets_base

The images are split in two by hash of their names: `nvit.prune` sees one half, top-1 and the mean KL divergence from
the unpruned model's answers are counted on the other. One calibration serves all sizes of a family. Latencies are
measured in turns; without --table the latency table is measured first. With --random the weights and the images are
drawn, and only time and memory are told.
"""

import argparse
import functools
import json
import pathlib
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import numpy as np

import nvit_jax as nvit
from nvit_jax.files import read_json, write_json
from nvit_jax.latency import timing
from nvit_jax.model import vit
from nvit_jax.model.dims import count_macs
from nvit_jax.pruning import compensation, obs, rebasis
from nvit_jax.training.monitor import Console
from tests.ablations.halves import halves
from tests.ablations.one_shot import Judge

RATIO = 0.5  # of the MACs, with random weights
# The linear algebra, which the host does; all else is done on the device.
HOST = [(compensation, "fit"), (compensation, "removal"), (obs, "removal"), (obs, "_head_losses")]
HOST += [(rebasis, "value_basis")]


class Steps(Console):
    """Keeps the seconds of every step, those of the host's linear algebra in it, and the peak memory behind it."""

    def __init__(self) -> None:
        super().__init__("prune")
        self.steps: list[dict[str, Any]] = []
        self._host = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the host's part is counted."""

        def timed(call: Any) -> Any:
            @functools.wraps(call)
            def run(*given: Any, **named: Any) -> Any:
                began = time.monotonic()
                try:
                    return call(*given, **named)
                finally:
                    self._host += time.monotonic() - began

            return run

        with ExitStack() as patches:
            for module, name in HOST:
                patches.enter_context(mock.patch.object(module, name, timed(getattr(module, name))))
            yield

    @contextmanager
    def progress(self, total: int | None, initial: int = 0, *, what: str = "", unit: str = "step") -> Iterator[None]:
        began, host = time.monotonic(), self._host
        with super().progress(total, initial, what=what, unit=unit):
            yield
        found = {"seconds": round(time.monotonic() - began, 1), "host_seconds": round(self._host - host, 1)}
        self.steps.append({"step": what, **found, "peak_mib": peak()})


def peak() -> int:
    """MiB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def family(model: nvit.Model, images: np.ndarray, judge: Judge, kind: str, ratios: list[float], how: Any) -> Any:
    """Models of all ratios from one calibration, judged and measured."""
    told = Steps()
    largest, smallest = sorted(ratios, reverse=True)[:-1], min(ratios)
    before = peak()
    with told.watching():
        found = nvit.prune(model, images, snapshots=largest, measure=None, progress=told, **{kind: smallest}, **how)
    models = {ratio: one.compact() for ratio, one in found.snapshots.items()} | {smallest: found.model}
    times = nvit.benchmark([model, *models.values()], batch=32)[1:]
    table = how.get("latency_table")
    rows = []
    for (ratio, one), timed in zip(models.items(), times, strict=True):
        row = {"kind": kind, "ratio": ratio, "macs": count_macs(one.dims) / count_macs(model.dims)}
        row |= {"latency": timed["ratio"], "latency_spread": timed["spread"]} | judge(one)
        if table is not None:
            row["predicted_latency"] = table(one.dims) / table(model.dims)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"images": len(images), "before_mib": before, "steps": told.steps, "rows": rows}


def priced(model: nvit.Model, options: argparse.Namespace) -> nvit.LatencyTable:
    """The latency table that is given; else that of this device, kept under --out."""
    path = options.table or options.out / "latency.json"
    if not path.exists():
        nvit.measure_latency(model, batch=32).save(path)
    return nvit.LatencyTable(read_json(path), str(path))


def drawn(name: str, count: int) -> Any:
    """Time and memory with drawn weights and images."""
    dims = nvit.preset(name)
    model = nvit.Model(dims, jax.device_get(vit.init(dims, jax.random.key(0))), info={})
    shape = (count, dims.image, dims.image, dims.channels)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    told, before = Steps(), peak()
    with told.watching():
        nvit.prune(model, images, macs=RATIO, measure=None, progress=told)
    return {"model": name, "images": count, "ratio": RATIO, "before_mib": before, "steps": told.steps}


def sizes_table(found: dict[str, Any]) -> str:
    """Markdown of the families."""
    lines = ["| asked | MACs | latency predicted | latency measured | top-1 | KL |", "|---|---|---|---|---|---|"]
    lines.append(f"| dense | 1 | 1 | 1 | {found['dense']['top1']:.1%} | 0 |")
    for row in (row for kind in ("macs", "latency") if kind in found for row in found[kind]["rows"]):
        cost = [f"{row['macs']:.3f}", f"{row['predicted_latency']:.3f}" if "predicted_latency" in row else ""]
        cost.append(f"{row['latency']:.3f} ± {row['latency_spread']:.3f}")
        asked = f"{'MACs' if row['kind'] == 'macs' else 'latency'} {row['ratio']:g}"
        lines.append(f"| {' | '.join((asked, *cost))} | {row['top1']:.1%} | {row['divergence']:.3f} |")
    return "\n".join(lines)


def steps_table(found: dict[str, Any]) -> str:
    """Markdown: what every step took. Compensation is done once for each size of a family."""
    lines = ["| model | images | step | seconds | linear algebra | times | peak memory, MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for part in (found[kind] for kind in ("macs", "random") if kind in found):
        model = f"| {part.get('model', 'deit_tiny')} | {part['images']} |"
        for name in dict.fromkeys(step["step"] for step in part["steps"]):
            same = [step for step in part["steps"] if step["step"] == name]
            seconds, host = (np.mean([step[which] for step in same]) for which in ("seconds", "host_seconds"))
            most = max(step["peak_mib"] for step in same)
            lines.append(f"{model} {name or 'all of it'} | {seconds:.0f} | {host:.0f} | {len(same)} | {most:,} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "table"):
        found.add_argument(f"--{name}", type=pathlib.Path)
    found.add_argument("--out", type=pathlib.Path, required=True)
    found.add_argument("--macs", nargs="*", type=float, default=[0.8, 0.7, 0.6, 0.5])
    found.add_argument("--latency", nargs="*", type=float, default=[0.75, 0.6])
    found.add_argument("--random", metavar="PRESET", help="of drawn weights instead, such as deit_base")
    found.add_argument("--count", type=int, default=256, help="drawn images")
    return found


def main() -> None:
    options = parser().parse_args()
    kept = options.out / "budgets.json"
    found = read_json(kept) if kept.exists() else {"device": timing.device_name()}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(kept, found)

    if options.random:
        if "random" not in found:
            keep("random", drawn(options.random, options.count))
    else:
        model = nvit.load(options.model)
        train, judged = halves(options.images, options.classes, model.preprocessing)
        judge = Judge.create(model, judged, model.preprocessing)
        images, _ = train.read()
        keep("dense", judge(model))
        for kind, ratios in (("macs", options.macs), ("latency", options.latency)):
            if ratios and kind not in found:
                how = {"latency_table": priced(model, options)} if kind == "latency" else {}
                keep(kind, family(model, images, judge, kind, ratios, how))
    if "dense" in found:
        print(sizes_table(found), end="\n\n")
    print(steps_table(found))


if __name__ == "__main__":
    main()
