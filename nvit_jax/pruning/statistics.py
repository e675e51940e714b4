"""What compensation knows of a model on images: moments and gradients at the parts of its blocks.

A model is walked part by part (`vit.part`: the attention or the mlp of a block), all images through one part before the
next, so that a part's moments need the memory of one part. Sums run over the images of a batch in float32 about the
batch's own mean, over batches in float32 with what its rounding loses kept apart (moments.add); they stay on the
devices until all batches are in. Batches lie on the devices of all processes, sums are whole on each.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.groups import Params, flatten, unflatten
from nvit_jax.model.masks import full_masks
from nvit_jax.model.parts import forward_in_parts
from nvit_jax.parallel import Parallel, fetch
from nvit_jax.pruning.moments import NOTHING, Sensitivity, TokenMoments, add, moments, of_batches
from nvit_jax.pruning.saliency import per_sample
from nvit_jax.training.losses import cross_entropy, draw_directions, draw_labels, feature_distance, kl_nvit

Part = tuple[int, str]  # block, one of vit.PARTS
Loss = Callable[..., jax.Array]  # (logits [B, T, C], batch) -> [B]


def parts(dims: ViTDims) -> list[Part]:
    """Of a model, in the order of the computation."""
    return [(block, name) for block in range(dims.depth) for name in vit.PARTS]


@dataclasses.dataclass
class Images:
    """Calibration images as batches on the devices, with what the walks need of them."""

    batches: list[dict[str, jax.Array]]  # "image", "index", and labels where they are known
    held: list[bool]  # which of them are held back from every fit
    parallel: Parallel

    def count(self, *, held: bool) -> int:
        return sum(len(b["image"]) for b, h in zip(self.batches, self.held, strict=True) if h == held)


def hold_back(count: int) -> list[bool]:
    """Every fifth of `count` batches, at least one of two."""
    if count < 5:
        return [i == count - 1 and count > 1 for i in range(count)]
    return [i % 5 == 4 for i in range(count)]


Streams = list[jax.Array]  # [B, N, D] of every batch
Gates = np.ndarray | None


class Walk:
    """The compiled steps through one kind of model; all blocks share them.

    `features`: losses are of its features, not of its logits; so they are of a model without a classifier.
    """

    def __init__(
        self, dims: ViTDims, images: Images, normalise: Callable[[Any], Any], *, features: bool = False
    ) -> None:
        self.dims, self.images, self._normalise = dims, images, normalise
        self._read = vit.without_classifier(dims, {})[0] if features else dims  # up to what losses read
        self.parallel = images.parallel
        self._steps: dict[Any, Any] = {}

    def _step(self, key: Any, step: Callable[..., Any], *, rows: bool) -> Callable[..., Any]:
        """`step(state, batch)`, compiled at its first use; what it returns lies in rows, or whole on every device."""
        if key not in self._steps:
            self._steps[key] = self.parallel.compile_walk(_exact(step), rows=rows)
        found: Callable[..., Any] = self._steps[key]
        return found

    def _sums(
        self,
        key: Any,
        step: Callable[..., Any],
        state: Any,
        batches: list[Any],
        told: Callable[[int], None] = lambda done: None,
    ) -> tuple[list[Any], Any]:
        """`step(state, batch) -> (small, large)` of all batches: every `small`, and the sum of `large` in float64.

        Both on the host; `state` is placed. Without batches the sum is None.
        """
        if not batches:
            return [], None
        if key not in self._steps:

            def adding(total: Any, state: Any, batch: Any) -> Any:
                small, large = _exact(step)(state, batch)
                return small, add(total, large)

            shapes = jax.eval_shape(step, state, batches[0])[1]
            self._steps[key] = self.parallel.compile_sum(adding), shapes
        run, shapes = self._steps[key]
        total = self.parallel.place(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), (shapes, shapes)))
        every = []
        for number, batch in enumerate(batches):
            small, total = jax.block_until_ready(run(total, state, batch))  # so that `told` tells what is done
            every.append(jax.device_get(small))
            told(number + 1)
        sums, lost = jax.device_get(total)
        return every, jax.tree.map(lambda s, c: s.astype(np.float64) - c.astype(np.float64), sums, lost)

    # ------------------------------------------------------------------------------------------ streams

    # `embed` [D]: gates of the stream; None where all channels are there.

    def begin(self, params: Params, embed: Gates = None) -> Streams:
        """In front of the first block."""

        def step(state: Any, batch: Any) -> jax.Array:
            return vit.stem(self.dims, state[0], self._normalise(batch["image"]), state[1])

        run = self._step("stem", step, rows=True)
        state = self.parallel.place((_outside(params), embed))
        return [run(state, batch) for batch in self.images.batches]

    def advance(self, name: str, block: Params, streams: Streams, embed: Gates = None) -> Streams:
        """Behind a part."""
        step = self._step(("advance", name), lambda s, x: vit.part(self.dims, name, s[0], x, s[1])[0], rows=True)
        state = self.parallel.place((block, embed))
        return [step(state, x) for x in streams]

    def gather(
        self, name: str, block: Params, ours: Streams, after: Streams, embed: Gates = None
    ) -> tuple[TokenMoments, TokenMoments]:
        """(of the images to fit, of those held back): the part's features on `ours`, and what it should write there.

        `after` is the dense model's stream behind the part. What it should write is after - ours.
        """

        def pair(state: Any, x: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
            _, taps = vit.part(self.dims, name, state[0], x, state[1])
            return taps["features"].reshape(*x.shape[:2], -1), after - x

        return self._moments(("gather", name), pair, (block, embed), ours, after)

    def inputs(
        self, name: str, block: Params, ours: Streams, before: Streams, embed: Gates
    ) -> tuple[TokenMoments, TokenMoments]:
        """As `gather`: what a part reads of `ours`, behind its norm, and what it reads of the dense model's stream."""

        def pair(state: Any, x: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
            ours = vit.part(self.dims, name, state[0], x, state[1])[1]["inputs"]
            return ours, vit.part(self.dims, name, state[0], before)[1]["inputs"]

        return self._moments(("inputs", name), pair, (block, embed), ours, before)

    def classifier_inputs(
        self, params: Params, ours: Streams, dense: Streams, embed: Gates
    ) -> tuple[TokenMoments, TokenMoments]:
        """As `inputs`, of the layers behind the blocks, see vit.readout; what they read counts as patches."""

        def pair(state: Any, x: jax.Array, dense: jax.Array) -> tuple[jax.Array, jax.Array]:
            return vit.readout(self.dims, state[0], x, state[1]), vit.readout(self.dims, state[0], dense)

        return self._moments("classifier_inputs", pair, (_outside(params), embed), ours, dense, prefix=0)

    def _moments(
        self,
        key: Any,
        pair: Callable[..., tuple[jax.Array, jax.Array]],
        state: Any,
        ours: Streams,
        dense: Streams,
        prefix: int | None = None,
    ) -> tuple[TokenMoments, TokenMoments]:
        """(of the images to fit, of those held back): of the features and targets `pair(state, ours, dense)`."""
        prefix = self.dims.prefix if prefix is None else prefix

        groups = ([slice(0, prefix)] if prefix else []) + [slice(prefix, None)]

        def step(state: Any, batch: Any) -> tuple[list[Any], list[Any]]:
            features, target = pair(state, *batch)
            found = [moments(features[:, tokens], target[:, tokens]) for tokens in groups]
            return [one[:3] for one in found], [one[3:] for one in found]

        placed = self.parallel.place(state)

        def of(*, held: bool) -> TokenMoments:
            batches = [b for b, h in zip(zip(ours, dense, strict=True), self.images.held, strict=True) if h == held]
            small, large = self._sums(key, step, placed, batches)
            if not small:
                return TokenMoments(NOTHING, NOTHING)
            found = [of_batches([one[i] for one in small], large[i]) for i in range(len(groups))]
            return TokenMoments(*[NOTHING] * (2 - len(found)), *found)

        return of(held=False), of(held=True)

    def stream_moments(self, params: Params) -> np.ndarray:
        """[D, D] second moments of the stream as RMSNorm gives it out, a mean over images.

        They are summed over the tokens, and over the places behind all parts.
        """

        def step(_: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.dims.norm_eps)
            return (), jnp.einsum("bni,bnj->ij", y, y)

        streams, total = self.begin(params), np.zeros((self.dims.embed,) * 2)
        for block, name in parts(self.dims):
            streams = self.advance(name, padded_block(self.dims, params[f"block_{block}"]), streams)
            total += self._sums("stream_moments", step, (), streams)[1]
        return total / sum(len(x) for x in streams)

    def queries_and_keys(
        self, block: Params, shares: tuple[float, float], streams: Streams
    ) -> tuple[np.ndarray, np.ndarray]:
        """[H, Q, Q] second moments of queries, and of keys about their mean over the tokens of their image.

        `shares`: weights of the queries of a prefix token and of a patch.
        """
        tokens = np.full(self.dims.tokens, shares[1], np.float32)
        tokens[: self.dims.prefix] = shares[0]

        def step(state: Any, x: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            block, weights = state
            _, taps = vit.part(self.dims, "attention", block, x)
            q, k = taps["queries"], taps["keys"]
            k = k - k.mean(1, keepdims=True)
            q_moments = jnp.einsum("bnhi,bnhj,n->hij", q, q, weights)
            return (), (q_moments, jnp.einsum("bnhi,bnhj->hij", k, k) / x.shape[1])

        state = self.parallel.place((block, tokens / tokens.sum()))
        _, (q, k) = self._sums("queries_and_keys", step, state, streams)
        images = sum(len(x) for x in streams)
        return q / images, k / images

    # ------------------------------------------------------------------------------------------- losses

    def logits(self, params: Params, streams: Streams, embed: Gates = None) -> list[jax.Array]:
        """[B, T, C] of streams behind the last block; of a model without classes its features."""
        step = self._step("classify", lambda s, x: vit.classify(self.dims, s[0], x, s[1]), rows=True)
        state = self.parallel.place((_outside(params), embed))
        return [step(state, x) for x in streams]

    def finish(self, params: Params, streams: Streams, block: int, embed: Gates = None) -> list[jax.Array]:
        """Logits of streams in front of a block; `params` with stacked blocks, placed."""

        def step(state: Any, x: jax.Array) -> jax.Array:
            params, first, gates = state

            def one(i: jax.Array, x: jax.Array) -> jax.Array:
                own = jax.tree.map(lambda leaf: leaf[i], params["blocks"])
                for name in vit.PARTS:
                    x = vit.part(self.dims, name, own, x, gates)[0]
                return x

            x = jax.lax.fori_loop(first, self.dims.depth, one, x)
            return vit.classify(self.dims, _outside(params), x, gates)

        def in_parts(state: Any, x: jax.Array) -> jax.Array:
            return forward_in_parts(lambda rows: step(state, rows), self.dims, x)

        run = self._step("finish", in_parts, rows=True)
        return [run((params, np.int32(block), embed), x) for x in streams]

    def divergence(self, ours: list[jax.Array], theirs: list[jax.Array]) -> float:
        """Mean over images: KL of the classifiers' mean from `theirs`; without classes `feature_distance`."""
        step = self._step("divergence", lambda _, pair: _divergence(self.dims, *pair), rows=False)
        found = [step((), pair) for pair in zip(ours, theirs, strict=True)]
        return float(sum(np.asarray(f, np.float64) for f in found) / sum(len(x) for x in ours))

    def sensitivities(
        self, params: Params, seed: int, draws: int, loss: Loss | None, told: Callable[[int], None]
    ) -> list[Sensitivity]:
        """Of every part in the order of `parts`.

        `loss(logits [B, T, C], batch) -> [B]` is differentiated; None: -log of the probability of a label drawn from
        the model, `draws` for each image. Of features: their projections on `draw_directions`.
        """
        dims, read = self.dims, self._read

        def step(state: Any, batch: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            params, key = state
            key = jax.random.wrap_key_data(key)
            x = vit.stem(dims, _outside(params), self._normalise(batch["image"]))

            def run(taps: jax.Array) -> jax.Array:
                def body(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
                    block, tap = inputs
                    for i, name in enumerate(vit.PARTS):
                        x = vit.part(dims, name, block, x)[0] + tap[i]
                    return x, None

                out, _ = jax.lax.scan(body, x, (params["blocks"], taps))
                return vit.classify(read, _outside(params), out)

            taps = jnp.zeros((dims.depth, len(vit.PARTS), *x.shape), x.dtype)
            logits, pull = jax.vjp(run, taps)
            total: Any = 0.0, 0.0
            for draw in range(1 if loss is not None else draws):
                (g,) = pull(_cotangent(read, loss, logits, batch, jax.random.fold_in(key, draw)))
                found = jnp.einsum("lpbnd,lpbne->lpde", g, g), jnp.square(g).sum((2, 4))
                total = jax.tree.map(jnp.add, total, found)
            return (), total

        state = self.parallel.place((vit.stack_blocks(params), jax.random.key_data(jax.random.key(seed))))
        batches = self.images.batches
        _, (metrics, tokens) = self._sums(("sensitivities", loss is None), step, state, batches, told)
        images = sum(len(batch["image"]) for batch in batches)
        times = images * (1 if loss is not None else draws)
        metrics, tokens = metrics / times, tokens / times
        prefix, patches = tokens[..., : dims.prefix].sum(-1) / max(dims.prefix, 1), tokens[..., dims.prefix :].mean(-1)
        rows = [(i, vit.PARTS.index(name)) for i, name in parts(dims)]
        return [Sensitivity(metrics[at], float(prefix[at]), float(patches[at])) for at in rows]

    def gate_gradients(
        self,
        params: Params,
        units: np.ndarray,
        seed: int,
        draws: int,
        loss: Loss | None,
        told: Callable[[int], None],
    ) -> np.ndarray:
        """[U, S] float32: the gradient of every sample's loss in the gates of the whole model, on the host.

        Samples are images, and of each the draws; the losses are those of `sensitivities`. `units`: places among all
        units of the model, kind after kind, flattened.
        """
        dims, read, masks = self.dims, self._read, full_masks(self.dims)
        forward = vit.forward if read == dims else vit.features
        draws = 1 if loss is not None else draws

        def step(state: Any, batch: Any) -> jax.Array:
            params, key = state
            key = jax.random.wrap_key_data(key)
            images = self._normalise(batch["image"])
            size = len(images)
            logits, pull = jax.vjp(lambda gates: forward(dims, params, images, gates), per_sample(masks, size))

            def one(draw: int) -> jax.Array:
                (g,) = pull(_cotangent(read, loss, logits, batch, jax.random.fold_in(key, draw)))
                blocks = [jnp.moveaxis(kind, 1, 0).reshape(size, -1) for kind in g[1:]]
                return jnp.concatenate([g.embed, *blocks], 1)[:, units]

            return jnp.stack([one(draw) for draw in range(draws)], 1)

        run = self._step(("gate_gradients", loss is None), step, rows=True)
        state = self.parallel.place((params, jax.random.key_data(jax.random.key(seed))))
        found = np.empty((len(units), draws * sum(len(b["image"]) for b in self.images.batches)), np.float32)
        done = 0
        for number, batch in enumerate(self.images.batches):
            one = fetch(run(state, batch)).reshape(-1, len(units))
            found[:, done : done + len(one)] = one.T
            done += len(one)
            told(number + 1)
        return found


def _exact(step: Callable[..., Any]) -> Callable[..., Any]:
    """With products in full float32, on devices that would round their inputs, too."""

    def run(state: Any, batch: Any) -> Any:
        with jax.default_matmul_precision("float32"):
            return step(state, batch)

    return run


def _cotangent(dims: ViTDims, loss: Loss | None, logits: jax.Array, batch: Any, key: jax.Array) -> jax.Array:
    """The gradient of the summed loss in the logits [B, T, C]; see `Walk.sensitivities`."""
    if loss is not None:
        return jax.grad(lambda out: loss(out, batch).sum())(logits)
    if not dims.classes:
        return draw_directions(logits, key, batch["index"])
    label = draw_labels(logits, key, batch["index"])
    return jax.grad(lambda out: cross_entropy(out.mean(1), label).sum())(logits)


def _outside(params: Params) -> Params:
    """The parameters outside of the blocks."""
    return {name: value for name, value in params.items() if not name.startswith("block")}


def _divergence(dims: ViTDims, ours: jax.Array, theirs: jax.Array) -> jax.Array:
    if not dims.classes:
        return feature_distance(theirs, ours).sum()
    return kl_nvit(theirs.mean(1), ours.mean(1), 1.0).sum() * dims.classes


def padded_block(dims: ViTDims, block: Params) -> Params:
    """One block's parameters at the widths of `dims.padded()`, with zeros, as `vit.part` takes them."""
    own, out = dict(flatten(block)), {}
    for path, wanted in flatten(vit.block_shapes(dims.padded())):
        leaf = np.asarray(own.get(path, np.zeros((0,) * len(wanted.shape), np.asarray(own["proj/bias"]).dtype)))
        out[path] = np.pad(leaf, [(0, n - m) for n, m in zip(wanted.shape, leaf.shape, strict=True)])
    return unflatten(out)
