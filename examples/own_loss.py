"""A checkpoint, your own arrays and your own loss: no data set, no config, no labels.

    python examples/own_loss.py deit_tiny_patch16_224.pth photos/*.jpg

The loss asks that the pruned model keeps the order of the dense model's five likeliest classes. It is a function of the
logits and of the batch, which carries whatever arrays the loss needs.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import nvit_jax as nvit


def keeps_the_favourites(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """[B] cross-entropy with the dense model's favourites, each weighted by its share."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["favourites"], axis=1)
    return -(batch["share"] * log_p).sum(-1)


def main(checkpoint: str, photos: Sequence[str], macs: float = 0.8) -> nvit.Model:
    """Prune without labels; print how often the small model still agrees with the dense one."""
    model = nvit.load(checkpoint)
    images = model.preprocess(photos)
    answers = np.asarray(jax.nn.softmax(model(images)))
    favourites = np.argsort(-answers, axis=1)[:, :5]
    share = np.take_along_axis(answers, favourites, axis=1)
    size = min(16, len(images))
    batches = [
        {"image": images[i : i + size], "favourites": favourites[i : i + size], "share": share[i : i + size]}
        for i in range(0, len(images) - size + 1, size)
    ]
    found = nvit.prune(model, batches, macs=macs, loss=keeps_the_favourites)
    same = np.asarray(found.model(images)).argmax(1) == favourites[:, 0]
    print(f"{found.model!r}\nagrees with the dense model on {same.mean():.1%} of {len(images)} images")
    return found.model


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
