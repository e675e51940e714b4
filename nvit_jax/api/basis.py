"""to_rmsnorm and rotate: the same function in a form whose embed channels can be cut."""

from typing import Any

from nvit_jax.api.arguments import checked
from nvit_jax.api.targets import check_images
from nvit_jax.data.feed import make_feed
from nvit_jax.model.directory import Model
from nvit_jax.parallel import check_same, fetch
from nvit_jax.pruning import rotation
from nvit_jax.pruning.one_shot import calibration_images
from nvit_jax.pruning.statistics import Walk
from nvit_jax.training.monitor import Console, Monitor


@checked
def to_rmsnorm(model: Model) -> Model:
    """The same function with RMSNorm instead of LayerNorm; a masked model is made compact first.

    Gains and biases of the norms go into the weights that read them, LayerScale and the mean over the channels into
    those that write. Raises UserError for a model whose last norm no layer reads (without a classifier), for a norm in
    front of the blocks (CLIP), and for pooling by a largest value.

        >>> nvit.to_rmsnorm(model).dims.norm
        'rms'
    """
    model = model.compact()
    if model.dims.norm == "rms":
        return model
    dims, params = rotation.to_rmsnorm(model.dims, fetch(model.params))
    return Model(dims, params, info=_dense(model.info))


@checked
def rotate(
    model: Model,
    batches: Any,
    *,
    images: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    progress: bool | Monitor = True,
) -> Model:
    """The same function whose embed channels are principal directions of the stream, the last of them of least weight.

    Embed channels that are then cut carry little. The directions are those of the second moments, over the images and
    their tokens, of the stream behind all parts of all blocks, every token divided by its length. LayerNorm becomes
    RMSNorm (`to_rmsnorm`) on the way.

    Args:
      batches: images, as in `prune`; labels are not needed.
      images: that the moments come from; None: 2,048 at most.
      batch: images that go through together; None: 20 at most.

    Raises UserError as `to_rmsnorm`.

        >>> turned = nvit.rotate(model, images)
        >>> found = nvit.prune(turned, images, macs=0.9, kinds=("embed",), criterion="fisher")
    """
    check_images(images)
    model = to_rmsnorm(model)
    monitor = progress if isinstance(progress, Monitor) else Console("rotate") if progress else Monitor()
    feed = make_feed(batches, model.dims, model.preprocessing)
    found = calibration_images(feed, images, batch, (seed, 2, 1), monitor, labels=False)
    walk, params = Walk(model.dims, found, feed.normalise), fetch(model.params)
    turned = rotation.rotate(model.dims, params, rotation.principal(walk.stream_moments(params)))
    check_same(turned, "weights of the rotated model")
    return Model(model.dims, turned, info=_dense(model.info))


def _dense(info: dict[str, Any]) -> dict[str, Any]:
    """Facts about a model whose 2:4 sparse matrices, if it had them, are dense now."""
    return {name: value for name, value in info.items() if name != "sparsity"}
