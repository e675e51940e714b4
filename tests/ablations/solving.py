"""How long prune.rule="solve" takes for a large model. Scores are drawn at random, so no model and no data is needed.

    python -m tests.ablations.solving [--presets deit_base vit_huge] [--profiles cpu gpu] [--kinds blocks all]
        [--limits macs_ratio=0.5 params_ratio=0.51]

Scores are exponential within a kind and block, times a factor for each kind and block; a head scores as much as 40 of
its dims, an embed channel 30. Kinds: "blocks" is all but embed, as the criterion `obs` removes them. Printed are the
processor's seconds, the seconds that passed, and the sum of the scores that went, as a part of what ranking.rank
("per_cost") takes.
"""

import argparse
import time

from benchmarks.decision import draw_scores
from nvit_jax.model.dims import KINDS, preset
from nvit_jax.model.masks import full_masks
from nvit_jax.pruning import allocation, ranking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="*", default=["deit_base", "vit_huge"])
    parser.add_argument("--profiles", nargs="*", choices=list(ranking.PROFILES), default=["cpu", "gpu"])
    parser.add_argument("--kinds", nargs="*", choices=["blocks", "all"], default=["blocks", "all"])
    parser.add_argument("--limits", nargs="*", default=["macs_ratio=0.5"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    limits = {name: float(value) for name, value in (limit.split("=") for limit in options.limits)}
    floors = {"embed": 8, "head": 1, "qk": 4, "v": 4, "mlp": 8}
    print(f"limits {limits}\n\n| model | profile | kinds | processor s | s | score |\n|---|---|---|---|---|---|")
    for name in options.presets:
        dims = preset(name)
        masks, scores = full_masks(dims), draw_scores(dims, options.seed)
        for profile in options.profiles:
            for kinds in options.kinds:
                policy = ranking.Policy(
                    sizes=ranking.group_sizes(profile),
                    floors=floors,
                    kinds=KINDS if kinds == "all" else KINDS[1:],
                )
                targets = ranking.make_targets(limits, dims, None)
                start = time.process_time(), time.monotonic()
                found = allocation.allocate(scores, masks, dims, policy, targets)
                took = time.process_time() - start[0], time.monotonic() - start[1]
                greedy = ranking.rank(scores, masks, dims, policy, targets)
                part = sum(r.score for r in found.removed) / sum(r.score for r in greedy.removed)
                print(f"| {name} | {profile} | {kinds} | {took[0]:.1f} | {took[1]:.1f} | {part:.4f} |", flush=True)


if __name__ == "__main__":
    main()
