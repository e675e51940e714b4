"""1 device, 4 devices under jit and 4 under pmap give the same numbers."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, random_images, random_params, small_dims

from nvit_jax.data import datasets
from nvit_jax.data.pipeline import eval_batches
from nvit_jax.data.sources import Arrays
from nvit_jax.errors import UserError
from nvit_jax.model import vit
from nvit_jax.model.masks import full_masks
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.parallel import Parallel, fetch
from nvit_jax.pruning import saliency
from nvit_jax.pruning.ranking import Policy, group_sizes, make_targets, rank
from nvit_jax.pruning.scoring import Scoring, make_score_step
from nvit_jax.training import distill, optim
from nvit_jax.training.evaluate import evaluate, make_eval_step
from nvit_jax.training.losses import Objective, objective_loss

DIMS = small_dims(dist_token=True, heads=4, mlp=16)
SETUPS = {"jit 4": ("jit", 4), "pmap 4": ("pmap", 4), "fsdp 4": ("fsdp", 4)}
MIX = Objective(label_weight=1.0, kl_weight=10.0, tau=2.0, kl_per_head=True)


def parallel(backend="jit", count=1) -> Parallel:
    return Parallel.create(backend, tuple(jax.devices()[:count]))


@pytest.fixture(autouse=True)
def _spread_small_arrays_too(monkeypatch):
    monkeypatch.setattr("nvit_jax.parallel._SMALL", 1)


def batch(size=8):
    rng = np.random.default_rng(3)
    return {
        "image": random_images(DIMS, size, dtype=np.float32),
        "label": rng.integers(0, DIMS.classes, size).astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
    }


def close(a, b, tolerance=1e-5):
    """Within `tolerance` of an array's largest value: the shards' sums run in another order.

    Left out is the bias of the keys: softmax does not see it, its gradient is nothing but rounding (1e-10).
    """
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(a)]
    for path, x, y in zip(paths, jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if "['k']['bias']" in path:
            continue
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(initial=0), 1e-30))


def score_step(p: Parallel, name, loss_name, size=8, count=1):
    step = make_score_step(DIMS, Scoring(criterion=name, loss=loss_name), MIX, accumulate=count, parallel=p)
    params, teacher = random_params(DIMS, 0, np.float32), random_params(DIMS, 1, np.float32)
    optimizer = optim.adamw(1e-3, weight_decay=0.0)
    masks = full_masks(DIMS)
    masks.mlp[0, :3] = 0
    state = distill.new_state(params, optimizer, 7, masks=jax.tree.map(jnp.asarray, masks))
    inputs = distill.Inputs(p.place(state), p.place(teacher))
    return p.compile(step)(inputs, p.shard(batch(size))), masks


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(
    ("name", "loss_name"),
    [
        ("hvp", "labels"),
        ("obd", "mix"),
        ("fisher", "drawn"),
        ("taylor", "labels"),
        ("hvp_joint", "kl"),
        ("random", "labels"),
    ],
)
def test_a_pruning_step(setup, name, loss_name):
    """Scores within 1e-5, masks equal."""
    one, masks = score_step(parallel(), name, loss_name)
    many, _ = score_step(parallel(*SETUPS[setup]), name, loss_name)
    close(many, one)
    policy = Policy(sizes=group_sizes("cpu") | {"embed": 2, "mlp": 2}, floors=dict.fromkeys(group_sizes("cpu"), 1))
    targets = make_targets({"macs_ratio": 0.6}, DIMS, None)
    ranked = [rank(jax.tree.map(np.asarray, s), masks, DIMS, policy, targets) for s in (one, many)]
    for a, b in zip(ranked[0].masks, ranked[1].masks, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "loss_name"),
    [("hvp", "kl"), ("obd", "mix"), ("fisher", "drawn"), ("fisher", "features"), ("hvp_joint", "features")],
)
def test_an_unpruned_model_answers_for_itself(name, loss_name):
    """Its scores without a forward pass of the teacher, which is the same model: in float64, 1e-9."""
    with jax.enable_x64(True):
        params = random_params(DIMS, 0)
        optimizer = optim.adamw(1e-3, weight_decay=0.0)
        state = distill.new_state(params, optimizer, 7, masks=jax.tree.map(jnp.asarray, full_masks(DIMS)))
        given = batch() | {"image": random_images(DIMS, 8)}
        found = [
            make_score_step(DIMS, Scoring(criterion=name, loss=loss_name), MIX, unpruned=unpruned)(
                distill.Inputs(state, params), given, lambda tree: tree
            )
            for unpruned in (False, True)
        ]
        close(*found, tolerance=1e-9)
        assert all(np.asarray(scores).any() for scores in found[0])


@pytest.mark.parametrize("setup", ["jit 1", *SETUPS])
@pytest.mark.parametrize(
    ("name", "loss_name"),
    [("hvp", "kl"), ("obd", "mix"), ("fisher", "drawn"), ("taylor", "labels"), ("hvp_joint", "kl")],
)
def test_scores_of_a_batch_in_parts(setup, name, loss_name):
    """Two parts of two images on each device: means are taken before any square, draws go with the image; 1e-5."""
    whole, _ = score_step(parallel(), name, loss_name, size=16)
    found, _ = score_step(parallel(*SETUPS.get(setup, ("jit", 1))), name, loss_name, size=16, count=2)
    close(found, whole)


@pytest.mark.parametrize("setup", ["jit 1", *SETUPS])
def test_scores_from_training_steps(setup):
    """Their sum over two steps, each `taylor` of a gradient taken apart; again from 0 after a pruning."""
    p = parallel(*SETUPS.get(setup, ("jit", 1)))
    masks = jax.tree.map(jnp.asarray, full_masks(DIMS))
    masks = masks._replace(mlp=masks.mlp.at[0, :3].set(0))
    criterion = functools.partial(saliency.taylor_of, align="shared")
    optimizer = optim.collecting(optim.adamw(1e-3, weight_decay=0.1), criterion, masks)
    state = distill.new_state(random_params(DIMS, 0, np.float32), optimizer, 7, masks=masks)
    step, expected, given = distill.make_train_step(DIMS, optimizer, Objective()), 0.0, batch()
    step = p.compile_training(step)

    def loss(params):
        logits = vit.forward(DIMS, params, given["image"], masks)
        return objective_loss(Objective(), logits, given)[0].mean()

    for _ in range(2):
        gradient = jax.grad(loss)(fetch(state.params))
        state, _ = step(distill.Inputs(p.place(state), None), p.shard(given))
        flat = saliency.taylor_of(fetch(state.params), gradient, masks, align="shared")
        expected = flat if not expected else jax.tree.map(jnp.add, expected, flat)
    close(state.opt_state.scores, expected)
    assert np.asarray(expected.mlp[1]).min() > 0 and not np.asarray(state.opt_state.scores.mlp[0, :3]).any()
    fewer = masks._replace(head=masks.head.at[1, 0].set(0))
    state = state._replace(opt_state=optim.zero_removed(state.opt_state, fewer), masks=fewer)
    assert not any(np.asarray(s).any() for s in state.opt_state.scores)
    state, _ = step(distill.Inputs(p.place(state), None), p.shard(given))
    scores = fetch(state.opt_state.scores)
    assert not scores.qk[1, 0].any() and scores.qk[1, 1].all() and not scores.head[1, 0].any()


@pytest.mark.parametrize("setup", SETUPS)
def test_a_finetuning_step(setup):
    """Parameters, moments and metrics within 1e-5 after three steps, with dropout, stochastic depth, KL and EMA.

    SGD-like scale: epsilon is large so that Adam does not amplify the sign of gradients that are rounding noise.
    """
    params, teacher = random_params(DIMS, 0, np.float32), random_params(DIMS, 1, np.float32)
    optimizer = optax.adamw(1e-2, eps=1e-2, weight_decay=0.1, mask=optim.decays)

    def run(p: Parallel):
        step = distill.make_train_step(
            DIMS, optimizer, MIX, teacher_dims=DIMS, drop_path=0.3, dropout=0.2, ema_decay=0.9
        )
        compiled = p.compile_training(step)
        state = p.place(distill.new_state(params, optimizer, 5, ema=True))
        for _ in range(3):
            state, metrics = compiled(distill.Inputs(state, p.place(teacher)), p.shard(batch()))
        return state.params, state.average, state.opt_state, metrics

    close(run(parallel(*SETUPS[setup])), run(parallel()))


@pytest.mark.parametrize("setup", SETUPS)
def test_a_batch_in_parts_is_the_large_batch(setup):
    """Four parts, on any devices: the sums go in another order, 1e-5. Recomputed blocks change nothing either."""
    params, teacher = random_params(DIMS, 0, np.float32), random_params(DIMS, 1, np.float32)
    optimizer = optax.adamw(1e-2, eps=1e-2, weight_decay=0.1, mask=optim.decays)
    given = batch(16)

    def run(p: Parallel, **options):
        step = distill.make_train_step(
            DIMS,
            optimizer,
            MIX,
            teacher_dims=DIMS,
            drop_path=0.3,
            dropout=0.2,
            ema_decay=0.9,
            parallel=p,
            **options,
        )
        state = p.place(distill.new_state(params, optimizer, 5, ema=True))
        state, metrics = p.compile_training(step)(distill.Inputs(state, p.place(teacher)), p.shard(given))
        return state.params, state.average, state.opt_state, metrics

    close(run(parallel(*SETUPS[setup]), accumulate=4, remat=True), run(parallel()))


def sums_inside_of_loops(text: str) -> tuple[list[str], list[str]]:
    """Of a compiled program: its sums over devices that lie in a loop, and all others."""
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line[0].isspace() and line.endswith("{"):
            current = bodies.setdefault(line.removeprefix("ENTRY ").split()[0].lstrip("%"), [])
        elif bodies:
            current.append(line)
    looped: set[str] = set()
    open_ends = re.findall(r"body=%?([\w.\-]+)", text)
    while open_ends:
        if (name := open_ends.pop()) in bodies and name not in looped:
            looped.add(name)
            open_ends += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", "\n".join(bodies[name]))
    found: tuple[list[str], list[str]] = ([], [])
    for name, lines in bodies.items():
        found[name not in looped].extend(x for x in lines if re.search(r" (all-reduce|reduce-scatter)(-start)?\(", x))
    return found


@pytest.mark.parametrize("backend", ["jit", "fsdp"])
def test_parts_of_a_batch_exchange_gradients_once(backend):
    """After the loop over the parts. Unrolled blocks, so that it is the only loop."""
    dims, optimizer = small_dims(mlp=16, depth=1), optax.sgd(1e-2)
    p, params = parallel(backend, 4), random_params(dims, 0, np.float32)
    step = distill.make_train_step(dims, optimizer, Objective(), accumulate=4, parallel=p)
    state = p.place(distill.new_state(params, optimizer, 5))
    given = batch(16) | {"image": random_images(dims, 16, dtype=np.float32)}
    compiled = p.compile_training(step).lower(distill.Inputs(state, None), p.shard(given)).compile()
    inside, after = sums_inside_of_loops(compiled.as_text())
    assert not inside and after


@pytest.mark.parametrize("widths", [(12, 12, 12, 12, 12, 12), (12, 9, 5, 12, 0, 7)])
def test_ragged_blocks_are_computed_again_too(widths):
    """What pruning makes keeps as little with `remat` as a uniform model: in the derivative, and in its program."""
    dims = dataclasses.replace(small_dims(depth=6), mlp=widths)
    params, images = random_params(dims, 0, np.float32), random_images(dims, 64, dtype=np.float32)

    def kept(remat):
        """Numbers that the forward pass leaves for the backward pass."""

        def backward(params):
            return jax.vjp(lambda p: vit.forward(dims, p, images, remat=remat).sum(), params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, params)))

    def temporaries(remat):
        compiled = jax.jit(jax.grad(lambda p: vit.forward(dims, p, images, remat=remat).sum())).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert kept(True) < 0.5 * kept(False)
    assert temporaries(True) < 0.5 * temporaries(False)


def test_pmap_keeps_state_and_teachers_on_the_devices():
    """Only the batch comes from the host in a step."""
    optimizer = optax.sgd(1e-2)
    p, params = parallel("pmap", 4), random_params(DIMS, 0, np.float32)
    step = p.compile_training(distill.make_train_step(DIMS, optimizer, MIX, teacher_dims=DIMS))
    state, teacher = p.place(distill.new_state(params, optimizer, 5)), p.place(params)
    given = jax.device_put(p.shard(batch(16)), p._sharding(jax.sharding.PartitionSpec("data")))
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, _ = step(distill.Inputs(state, teacher), given)


@pytest.mark.parametrize("backend", ["jit", "fsdp"])
def test_bfloat16_gradients_are_summed_in_float32(backend, tmp_path):
    """Of every parameter, over the batch and over the devices: as XLA's partitioner leaves the program.

    Later a CPU promotes such sums by itself, so that no number here could tell.
    """
    code = f"""
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from conftest import random_params, random_images, small_dims
from nvit_jax import parallel
from nvit_jax.model import vit
from nvit_jax.training.distill import Inputs
parallel._SMALL = 1
dims, p = small_dims(dist_token=True, layer_scale=True, pre_logits=8), parallel.Parallel.create({backend!r})

def step(inputs, images, mean):
    params = inputs.state
    loss = lambda params: jnp.square(vit.forward(dims, params, images, dtype=jnp.bfloat16)).mean()
    return mean(jax.grad(loss)(params))

params = random_params(dims, 0, np.float32)
found = p.compile_training(step)(Inputs(p.place(params), None), p.shard(random_images(dims, 24, dtype=np.float32)))
assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))
"""
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_pass_re=spmd-partitioning"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is not compiled is not dumped
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=240)
    texts = [file.read_text() for file in tmp_path.glob("*after_spmd-partitioning*")]
    lines = [line for text in texts for line in text.splitlines() if re.search(r" (all-reduce|reduce-scatter)\(", line)]
    types = [line.split(" = ")[1].split("{")[0] for line in lines]
    # Under fsdp XLA may spread the channels of an activation [24, ...], too, and sum it as it is.
    assert len(types) >= 20 and not [t for t in types if t.startswith("bf16") and not t.startswith("bf16[24,")], types


def test_fsdp_spreads_the_training_state():
    """Each of 4 devices holds about a quarter of parameters, moments and averages, before and after a step."""
    p, params = parallel("fsdp", 4), random_params(DIMS, 0, np.float32)
    step = p.compile_training(distill.make_train_step(DIMS, optax.adamw(1e-2), Objective(), ema_decay=0.9))
    state = p.place(distill.new_state(params, optax.adamw(1e-2), 5, ema=True))
    for _ in range(2):
        leaves = [x for x in jax.tree.leaves(state) if x.ndim]
        held = sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)
        assert held < 0.4  # some axes do not divide by four
        state, _ = step(distill.Inputs(state, None), p.shard(batch()))
    assert jax.tree.map(np.shape, fetch(state.params)) == jax.tree.map(np.shape, params)


@pytest.mark.parametrize("setup", SETUPS)
def test_evaluation_counts_every_image_once(setup):
    p = parallel(*SETUPS[setup])
    params = random_params(DIMS, 0, np.float32)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 17, (27, DIMS.image, DIMS.image, 1)).astype(np.uint8)
    labels = rng.integers(0, DIMS.classes, 27).astype(np.int32)
    split = datasets.Split(Arrays(raw, labels))
    preprocess = Preprocessing(8, 16.0, (0.5,), (0.5,))
    logits = np.asarray(vit.forward(DIMS, params, preprocess(raw))).mean(1)
    order = np.argsort(-logits, axis=1)
    step = make_eval_step(lambda s, x: vit.forward(DIMS, s, preprocess(x)), p)
    for size in (8, 12, 28):
        found = evaluate(step, p.place(params), eval_batches(split, size))
        assert found["images"] == 27
        assert found["top1"] == pytest.approx((order[:, 0] == labels).mean(), abs=1e-6)
        assert found["top5"] == pytest.approx(1.0)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        assert found["loss"] == pytest.approx(-log_p[np.arange(27), labels].mean(), rel=1e-5)


def test_refusals():
    with pytest.raises(UserError, match="parallel='ddp' is not one of"):
        Parallel.create("ddp")
    with pytest.raises(UserError, match="config.prune.batch=6 does not divide over 4 devices"):
        parallel("jit", 4).check_batch(6, "config.prune.batch")


def test_a_training_state_gives_its_memory_to_the_next(monkeypatch):
    """All parameters, moments and averages of the program that is compiled where donation is on."""
    monkeypatch.setattr(Parallel, "donates", True)
    optimizer = optax.adamw(1e-2)
    for backend in ("jit", "fsdp"):
        p = parallel(backend, 4)
        state = p.begin(distill.new_state(random_params(DIMS, 0, np.float32), optimizer, 5, ema=True))
        step = p.compile_training(distill.make_train_step(DIMS, optimizer, Objective(), ema_decay=0.9))
        compiled = step.lower(distill.Inputs(state, None), p.shard(batch(16))).compile()
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        assert compiled.memory_analysis().alias_size_in_bytes >= 0.95 * held  # but for the key and the like


@pytest.mark.slow
def test_nothing_reads_a_state_whose_memory_is_gone():
    """See donation.py. In a process of its own: there is one device, whose arrays share no memory with others."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/donation.py"], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"the same after [1-9]\d+ deleted arrays", done.stdout), done.stdout
