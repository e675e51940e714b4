"""Augmentation of a batch on the device, inside the compiled step: normalisation, random erasing, mixup and cutmix."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nvit_jax.model.sizes import Size, sides
from nvit_jax.training.losses import Batch

_OWN = 2**32 - 1  # the state's key folded with a step is the examples' (drop path); no run is that long


@dataclasses.dataclass(frozen=True)
class Mixing:
    """DeiT's: mixup 0.8, cutmix 1.0, switch 0.5, erasing 0.25. All 0: nothing is drawn.

    mixup, cutmix: parameters of the Beta distribution that the share of the first image is drawn from, one for the
    batch; where both are set, cutmix is taken with probability `switch`. An image's partner is the one that mirrors
    its place in its shard, one of `shards` equal parts of the global batch, so that the numbers do not depend on
    devices. erasing: the part of the images of which a rectangle (2 % to a third of the area) becomes noise.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5
    erasing: float = 0.0
    shards: int = 1

    def __call__(self, key: jax.Array, step: Any, batch: Batch, local_shards: int | None = None) -> Batch:
        """Normalised images [B, h, w, c] -> augmented ones; mixed labels are "mixed_label" [B] and "label_share" [].

        `local_shards`: how many of the shards this call sees (under pmap a device sees its own part of the batch).
        """
        key = jax.random.fold_in(key, step)
        erase_key, mix_key = jax.random.split(key)
        images = batch["image"]
        if self.erasing:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(erase_key, batch["index"])
            images = jax.vmap(lambda k, image: erase(k, image, self.erasing))(keys, images)
        if not (self.mixup or self.cutmix):
            return batch | {"image": images}
        parts = local_shards or self.shards

        def partner(x: jax.Array) -> jax.Array:
            return x.reshape(parts, len(x) // parts, *x.shape[1:])[:, ::-1].reshape(x.shape)

        choose, share_key, box_key = jax.random.split(mix_key, 3)
        cut = jax.random.bernoulli(choose, self.switch if self.mixup and self.cutmix else float(self.cutmix > 0))
        alpha = jnp.where(cut, self.cutmix, self.mixup)
        share = jax.random.beta(share_key, alpha, alpha)
        height, width = images.shape[1:3]
        inside, kept = cut_box(box_key, (height, width), share)
        share = jnp.where(cut, kept, share)
        other = partner(images)
        mixed = jnp.where(cut, jnp.where(inside[..., None], other, images), share * images + (1 - share) * other)
        batch = batch | {"image": mixed.astype(images.dtype)}
        return batch | {"mixed_label": partner(batch["label"]), "label_share": share} if "label" in batch else batch


def cut_box(key: jax.Array, size: Size, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mask [height, width] of a box of (1 - share) of the area around a random center, what is left of the image).

    The box has the shape of the image.
    """
    whole = jnp.array(sides(size))
    side = jnp.floor(whole * jnp.sqrt(1 - share)).astype(jnp.int32)
    center = jax.random.randint(key, (2,), 0, whole)
    low, high = (jnp.clip(center + sign * (side // 2), 0, whole) for sign in (-1, 1))  # as timm, even sides
    rows, columns = ((jnp.arange(n) >= low[i]) & (jnp.arange(n) < high[i]) for i, n in enumerate(sides(size)))
    area = (high - low).prod()
    return rows[:, None] & columns, 1 - area / whole.prod()


def erase(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
    """Zhong et al. 2020, per pixel, as timm does it: [h, w, c] -> the same with a rectangle of N(0, 1), or unchanged.

    2 % to a third of the area, aspect ratio log-uniform in 0.3 to 1/0.3; of ten draws the first that fits is taken.
    """
    height, width, _ = image.shape
    do, area_key, aspect_key, place_key, noise_key = jax.random.split(key, 5)
    area = jax.random.uniform(area_key, (10,), minval=0.02, maxval=1 / 3) * (height * width)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (10,), minval=math.log(0.3), maxval=-math.log(0.3)))
    heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    box, whole = jnp.stack([heights[first], widths[first]]), jnp.array([height, width])
    low = jnp.floor(jax.random.uniform(place_key, (2,)) * (whole - box + 1)).astype(jnp.int32)
    rows, columns = (
        (jnp.arange(n) >= low[i]) & (jnp.arange(n) < low[i] + box[i]) for i, n in enumerate((height, width))
    )
    chosen = jax.random.bernoulli(do, probability) & fits.any()
    noise = jax.random.normal(noise_key, image.shape, image.dtype)
    return jnp.where((rows[:, None] & columns)[..., None] & chosen, noise, image)


def prepare(
    normalise: Callable[[Any], Any],
    step: Callable[..., Any],
    mixing: Mixing | None = None,
    shards_seen: int | None = None,
) -> Callable[..., Any]:
    """A step(inputs, batch, mean) that takes raw images: they are normalised, and mixed by the state's key and step."""

    def run(inputs: Any, batch: Batch, mean: Callable[[Any], Any]) -> Any:
        batch = batch | {"image": normalise(batch["image"])}
        if mixing is not None:
            key = jax.random.fold_in(jax.random.wrap_key_data(inputs.state.key), _OWN)
            batch = mixing(key, inputs.state.step, batch, shards_seen)
        return step(inputs, batch, mean)

    return run
