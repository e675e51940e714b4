"""The decision: how long the host takes to choose the widths of DeiT-B and ViT-H, by each rule.

    python -m benchmarks.decision --models deit_base vit_huge --rules per_cost solve

Scores are drawn at random, so no model and no data is needed. The limits are half of the MACs, and half of the latency
by the roofline estimate, which is a function of the dims as a measured table is. "widths" is a checksum of the widths
that were chosen: whoever makes the decision faster must choose the same.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.record import Record, make_parser, run
from benchmarks.timing import alternate
from nvit_jax.latency.roofline import Roofline
from nvit_jax.model.dims import KINDS, Units, ViTDims
from nvit_jax.model.masks import full_masks
from nvit_jax.pruning import allocation, ranking

FLOORS = {"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8}
LIMITS = {"macs": "macs_ratio", "latency": "latency_ratio"}
KIND_SETS = {"blocks": KINDS[1:], "all": KINDS}


def draw_scores(dims: ViTDims, seed: int) -> Units:
    """Exponential within a kind and block, times a factor for each; a head scores as 40 of its dims, embed 30."""
    rng = np.random.default_rng(seed)
    masks, weight = full_masks(dims), {"embed": 30.0, "head": 40.0}

    def of(kind: str) -> np.ndarray:
        mask = getattr(masks, kind)
        factors = rng.lognormal(0, 0.7, (1,) if kind == "embed" else (len(mask), *[1] * (mask.ndim - 1)))
        return weight.get(kind, 1.0) * factors * rng.exponential(size=mask.shape)

    return Units(**{kind: of(kind) for kind in KINDS})


def checksum(dims: ViTDims) -> str:
    """Of all widths."""
    return f"{zlib.crc32(repr(sorted(dims.to_json().items())).encode()):08x}"


class Decision:
    """One choice of widths, as a call."""

    def __init__(self, dims: ViTDims, rule: str, limit: str, profile: str, kinds: str, seed: int = 0) -> None:
        latency = Roofline(tflops=100.0, gbs=1000.0, batch=256, itemsize=2, tile=8)
        self.dims, self.rule = dims, rule
        self.scores, self.masks = draw_scores(dims, seed), full_masks(dims)
        sizes = ranking.group_sizes(profile)
        self.policy = ranking.Policy(sizes=sizes, floors=FLOORS, kinds=KIND_SETS[kinds], latency=latency)
        self.targets = ranking.make_targets({LIMITS[limit]: 0.5}, dims, latency)
        self.found: ranking.Ranking | None = None

    def __call__(self) -> None:
        choose = allocation.allocate if self.rule == "solve" else ranking.rank
        self.found = choose(self.scores, self.masks, self.dims, self.policy, self.targets)


def parser() -> Any:
    """Of the command line."""
    found = make_parser("decision", __doc__)
    found.add_argument("--models", nargs="+", default=["deit_base", "vit_huge"])
    found.add_argument("--rules", nargs="+", choices=["per_cost", "solve"], default=["per_cost", "solve"])
    found.add_argument("--limits", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    found.add_argument("--profiles", nargs="+", choices=list(ranking.PROFILES), default=["gpu"])
    found.add_argument("--kinds", nargs="+", choices=list(KIND_SETS), default=["blocks"])
    found.add_argument("--rounds", type=int, default=3)
    return found


def main(words: Sequence[str]) -> None:
    """Measure each decision against itself."""
    options = parser().parse_args(words)
    record = Record("decision", options, words)
    for name in options.models:
        dims = models.dense(name, tiny=options.tiny)
        every = ((r, li, p, k) for r in options.rules for li in options.limits for p in options.profiles
                 for k in options.kinds)  # fmt: skip
        for rule, limit, profile, kinds in every:
            decision = Decision(dims, rule, limit, profile, kinds)
            times = alternate({"decision": decision}, options.rounds)
            assert decision.found is not None
            record.add(
                model=name,
                rule=rule,
                limit=limit,
                profile=profile,
                kinds=kinds,
                units=int(sum(np.size(mask) for mask in decision.masks)),
                groups=len(decision.found.removed),
                met=decision.found.met,
                widths=checksum(decision.found.dims),
                **times.row("decision"),
            )
    record.finish()


if __name__ == "__main__":
    run(main)
