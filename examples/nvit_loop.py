"""NViT's iterative loop from Python, on batches of your own loader.

    python examples/nvit_loop.py runs/demo/pretrain/model

A few groups of units go after every ten training steps, by the criterion of the released code (`taylor`), scored on the
gradients that these steps take anyway, until the model has 0.7 of its MACs. The loader may be anything that can be
iterated over again and again, such as a PyTorch DataLoader.
"""

import sys
from collections.abc import Iterator

import numpy as np

import nvit_jax as nvit


class Loader:
    """Batches of (images, labels), in a new order in every epoch."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch: int) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.labels) // self.batch

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = self.rng.permutation(len(self.labels))
        for i in range(len(self)):
            chosen = order[i * self.batch : (i + 1) * self.batch]
            yield self.images[chosen], self.labels[chosen]


def main(path: str, macs: float = 0.7) -> nvit.Pruned:
    """Prune, and print what went at each pruning."""
    model = nvit.load(path)
    images, labels = nvit.load_dataset("digits").split("train").read()
    loader = Loader(images, labels, batch=64)  # raw pixels: the model knows how to normalise them
    plan = nvit.Plan(method="iterative", interval=10, groups_per_step=2, warmup=10, ema=0.9, reset_scores=True)
    scoring = nvit.Scoring(criterion="taylor", from_training=True, align="shared")
    found = nvit.prune(
        model,
        loader,
        macs=macs,
        method=plan,
        criterion=scoring,
        rule=nvit.Choice(profile="nvit", align="shared"),
        callback=lambda pruning: print(f"pruning {pruning.line['pruning']}: {pruning.line['macs_ratio']:.1%} of MACs"),
    )
    print(found.model.summary())
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
