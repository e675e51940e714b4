"""A real checkpoint pruned in one shot to latency targets, rule against rule, and aligned heads against free ones.

    python -m tests.ablations.rules --model MODEL_DIR --images DIR --classes FILE.tsv --table W/latency/table.json \
        --out runs/rules

Each seed draws 224 of the images for the scores (`fisher`) and counts on the others. Two measures: top-1, and the mean
KL divergence of the pruned model's answers from the dense one's, which is finer than counting. `eta` is tried at a
tenth, one and ten times what `per_cost` pays per millisecond, since nobody knows it beforehand. Heads: query/key and
value dims alone are removed, down to 3/4 and 1/2 of them, with one index for all heads (shared) or each head its own.
"""

from nvit_jax.model.masks import full_masks
from nvit_jax.pruning import allocation, ranking
from tests.ablations.draws import FLOORS, draws, parser, print_rows


def attention_dims(dims) -> float:
    """Query/key and value dims over the model."""
    return float(sum(h * (q + v) for h, q, v in zip(dims.heads, dims.qk, dims.v, strict=True)))


def main() -> None:
    options = parser(__doc__).parse_args()
    sizes = ranking.group_sizes("cpu")
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for draw, table in draws(options):
        dims = draw.model.dims
        masks, scores = full_masks(dims), draw.scores("fisher")

        def add(name: str, result: ranking.Ranking, cost: float, draw=draw) -> None:
            top1, divergence = draw.judge(result)
            rows.setdefault(name, []).append((top1, divergence, cost))
            print(f"seed {draw.seed}: {name}: top-1 {top1:.1f} %, KL {divergence:.3f}, cost {cost:.3f}", flush=True)

        rows.setdefault("dense", []).append((100 * (draw.dense.argmax(-1) == draw.labels).mean(), 0.0, 1.0))
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
    print_rows(rows, options)


if __name__ == "__main__":
    main()
