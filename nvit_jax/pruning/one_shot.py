"""One pruning without a gradient step: calibration images, scores from all of them, compensation, a check.

The check: on held-back images, the model that is fitted to the others must not be worse than the one that is only cut.
Otherwise the cut one stays, and a warning says so. When it holds, all images are fitted to.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nvit_jax.data.feed import Draws, Feed
from nvit_jax.model import vit
from nvit_jax.model.dims import Units
from nvit_jax.model.groups import Params
from nvit_jax.parallel import Parallel, any_process
from nvit_jax.pruning import cross, obs
from nvit_jax.pruning.compensation import Chosen, compensate, masked_block
from nvit_jax.pruning.moments import Sensitivity
from nvit_jax.pruning.statistics import Gates, Images, Loss, Walk, hold_back, padded_block
from nvit_jax.training.distill import Stopped
from nvit_jax.training.monitor import Monitor

# What is found, for the record; cross_weight with the criterion fisher_set.
CHECKED = (
    "compensated",
    "images_fitted",
    "images_held_back",
    "divergence_cut",
    "divergence_compensated",
    "cross_weight",
)
IMAGES = 2048  # at most, where nobody says how many
_BATCH = 20  # images at most, where nobody says how many
_DRAWS = 2  # labels drawn for an image
_SET_DRAWS = 4  # the same for the gradients of gates


def calibration_images(
    feed: Feed, images: int | None, batch: int | None, seed: tuple[int, ...], monitor: Monitor, *, labels: bool
) -> Images:
    """Batches on the devices, every fifth held back. They are of at most `batch` images and leave out few."""
    known = feed.images()
    limit = IMAGES if images is None else images
    count = limit if known is None else min(known, limit)
    some = jax.devices()[:count] if jax.process_count() == 1 else jax.devices()  # an image each at least
    parallel = Parallel.create("jit", tuple(some))
    devices = len(parallel.devices)
    feed = feed.some(count)
    size = even_batch(count, devices, batch or _BATCH)
    draws = Draws(size, seed, parallel, monitor.warn, labels=labels)
    steps = max(1, feed.steps(size))
    reader = feed.reader(draws)
    try:
        batches = [reader(i) for i in range(steps)]
    finally:
        reader.close()
    for i, one in enumerate(batches):
        one["index"] = one["index"] + i * size  # every image draws its own labels
    return Images([parallel.shard(one) for one in batches], hold_back(steps), parallel)


def even_batch(images: int, devices: int, limit: int) -> int:
    """A batch of at most `limit` images, and at most a fifth of them, that leaves the fewest over."""
    most = max(min(limit, images // 5) // devices, 1) * devices
    least = max(most // 2 // devices, 1) * devices
    return min(range(most, least - 1, -devices), key=lambda size: (images % size, -size))


@dataclasses.dataclass
class OneShot:
    """Scores and compensates one model."""

    walk: Walk
    params: Params  # dense, on the host
    seed: int
    loss: Loss | None  # None: with labels drawn from the model
    monitor: Monitor
    turned: Params | None = None  # the same model in the bases of its scores

    @functools.cached_property
    def felt(self) -> list[Sensitivity]:
        """What the loss feels. Raises Stopped when asked to."""
        with self.monitor.progress(len(self.walk.images.batches), what="gradients", unit="batch"):
            return self.walk.sensitivities(self.params, self.seed, _DRAWS, self.loss, told=_Told(self.monitor))

    def score_sets(
        self, may_go: Callable[[str, int], bool], whole: Callable[[str, int], bool]
    ) -> tuple[Units, dict[str, Any]]:
        """The criterion "fisher_set", and the weight of its cross terms; the functions are those of ranking.Policy."""
        walk, monitor = self.walk, self.monitor
        of = cross.candidates(walk.dims, may_go, whole)
        with monitor.progress(len(walk.images.batches), what="gradients", unit="batch"):
            told = _Told(monitor)
            found = walk.gate_gradients(self.params, of.units, self.seed, _SET_DRAWS, self.loss, told=told)
        held = np.concatenate(
            [np.full(len(b["image"]), h) for b, h in zip(walk.images.batches, walk.images.held, strict=True)]
        )
        with monitor.progress(2 * cross.rounds(of), what="scoring", unit="round"):
            scores, weight = cross.score(
                walk.dims, of, found, np.repeat(held, found.shape[1] // len(held)), _Told(monitor)
            )
        monitor.say(f"cross terms between units count {weight:g}")
        return scores, {"cross_weight": weight}

    def score(self, whole: Callable[[str, int], bool]) -> Units:
        """The criterion "obs", `whole` as ranking.Policy.whole; from here on the model is `turned`."""
        felt = self.felt
        with self.monitor.progress(self.walk.dims.depth, what="scoring", unit="block"):
            found = obs.score(self.walk, self.params, felt, whole=whole, told=_Told(self.monitor))
        self.turned = found.params
        return found.scores

    @property
    def ready(self) -> Params:
        """The model whose units were scored."""
        return self.params if self.turned is None else self.turned

    def compensate(self, masks: Units) -> tuple[Params, Units, dict[str, Any]]:
        """(parameters, masks, what the check found) for masks of the turned model, or of the model as it is."""
        params = self.ready
        chosen = Chosen(values=self.turned is not None, neurons=self.turned is not None)
        walk, images = self.walk, self.walk.images
        if not any(images.held):
            self.monitor.warn("warning: with one batch of images compensation cannot be checked, and is left out")
            return params, masks, {"compensated": False}
        felt = self.felt
        told = _Told(self.monitor)
        with self.monitor.progress(walk.dims.depth, what="trying compensation", unit="block"):
            held = [i for i, back in enumerate(images.held) if back]
            dense = self._logits(self.params, held)
            cut = self._logits(_masked(walk, params, masks), held, np.asarray(masks.embed))
            fitted = compensate(walk, self.params, params, masks, felt, chosen, use_held=False, told=told)
        check: dict[str, Any] = {
            "images_fitted": images.count(held=False),
            "images_held_back": images.count(held=True),
            "divergence_cut": walk.divergence(cut, dense),
            "divergence_compensated": walk.divergence([fitted.logits[i] for i in held], dense),
        }
        better = check["divergence_compensated"] <= check["divergence_cut"]  # a NaN is not
        if not better:
            self.monitor.warn(
                f"warning: on {check['images_held_back']} held-back images the compensated model is further from "
                f"the unpruned one ({check['divergence_compensated']:.4g}) than the one that is only cut "
                f"({check['divergence_cut']:.4g}): compensation is left out; more images would help"
            )
            return params, masks, check | {"compensated": False}
        with self.monitor.progress(walk.dims.depth, what="compensating", unit="block"):
            found = compensate(walk, self.params, params, masks, felt, chosen, use_held=True, told=told)
        return found.params, found.masks, check | {"compensated": True}

    def _logits(self, params: Params, batches: list[int], embed: Gates = None) -> list[Any]:
        streams = self.walk.begin(params, embed)
        placed = self.walk.parallel.place(vit.stack_blocks(params))
        return self.walk.finish(placed, [streams[i] for i in batches], 0, embed)


class _Told:
    """Hears of progress, and stops where a stop is asked for."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def __call__(self, done: int) -> None:
        self._monitor.advance(done)
        if any_process(self._monitor.stopping):
            raise Stopped("stopped while pruning")


def _masked(walk: Walk, params: Params, masks: Units) -> Params:
    """Parameters whose removed units are 0, but for embed channels, which are gated."""
    host = Units(*(np.asarray(m) for m in masks))
    blocks = {
        f"block_{i}": padded_block(walk.dims, masked_block(params[f"block_{i}"], host, i))
        for i in range(walk.dims.depth)
    }
    return params | blocks
