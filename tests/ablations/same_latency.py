"""A real checkpoint pruned in one shot, without any training, to the same latency by every criterion.

    python -m tests.ablations.same_latency --model MODEL_DIR --images DIR --classes FILE.tsv \
        --table W/latency/table.json --out runs/same_latency [--rule solve]

Each seed draws 224 of the images for the scores, the same for every criterion, and counts on the others: top-1, and
the mean KL divergence of the pruned model's answers from the dense one's. `hvp` shares one probe a kind and batch
(scheme="kind"), the only one that does not take hours at this size. Scores are kept under --out and read again.
"""

from nvit_jax.model.masks import full_masks
from nvit_jax.pruning import allocation, ranking
from nvit_jax.pruning.saliency import CRITERIA
from tests.ablations.draws import FLOORS, draws, parser, print_rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--criteria", nargs="*", choices=CRITERIA, default=list(CRITERIA))
    arguments.add_argument("--rule", choices=["per_cost", "solve"], default="solve")
    options = arguments.parse_args()
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for draw, table in draws(options):
        dims = draw.model.dims
        policy = ranking.Policy(sizes=ranking.group_sizes("cpu"), floors=FLOORS, latency=table)
        choose = allocation.allocate if options.rule == "solve" else ranking.rank
        rows.setdefault("dense", []).append((100 * (draw.dense.argmax(-1) == draw.labels).mean(), 0.0, 1.0))
        for ratio in options.ratios:
            targets = ranking.make_targets({"latency_ratio": ratio}, dims, table)
            for criterion in options.criteria:
                found = choose(draw.scores(criterion), full_masks(dims), dims, policy, targets)
                top1, divergence = draw.judge(found)
                name = f"latency {ratio} {criterion}"
                rows.setdefault(name, []).append((top1, divergence, table(found.dims) / table(dims)))
                print(f"seed {draw.seed}: {name}: top-1 {top1:.1f} %, KL {divergence:.3f}", flush=True)
    print_rows(rows, options)


if __name__ == "__main__":
    main()
