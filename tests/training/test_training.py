"""Losses, optimizer rules, and the pruning loop's own arithmetic."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_images, random_params, small_dims

from nvit_jax.errors import UserError
from nvit_jax.model.dims import Units
from nvit_jax.model.groups import expand, flatten
from nvit_jax.model.masks import full_masks, kept_dims
from nvit_jax.parallel import Parallel
from nvit_jax.pruning import saliency
from nvit_jax.pruning.loop import Plan, Task, new_prune_state, prune_loop
from nvit_jax.pruning.ranking import Ranking, Target
from nvit_jax.pruning.scoring import Scoring, make_score_step
from nvit_jax.training import distill, monitor, optim
from nvit_jax.training.evaluate import evaluate
from nvit_jax.training.losses import Objective, cross_entropy, kl_nvit, objective_loss
from nvit_jax.training.monitor import Monitor


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_losses_are_their_formulas(x64):
    rng = np.random.default_rng(0)
    logits, teacher = rng.standard_normal((2, 6, 2, 5))
    labels = rng.integers(0, 5, 6)
    p = softmax(logits[:, 0])
    np.testing.assert_allclose(cross_entropy(logits[:, 0], labels), -np.log(p[np.arange(6), labels]), rtol=1e-12)
    smooth = 0.9 * np.eye(5)[labels] + 0.1 / 5
    np.testing.assert_allclose(cross_entropy(logits[:, 0], labels, 0.1), -(smooth * np.log(p)).sum(1), rtol=1e-12)
    t, s = softmax(teacher / 3), softmax(logits / 3)
    np.testing.assert_allclose(kl_nvit(teacher, logits, 3.0), (t * np.log(t / s)).mean(-1), rtol=1e-10)

    batch = {"label": labels, "teacher": teacher}
    for per_head in (False, True):
        objective = Objective(label_weight=0.5, kl_weight=7.0, tau=3.0, kl_per_head=per_head)
        total, parts = objective_loss(objective, jnp.asarray(logits), batch)
        if per_head:
            kl = (t * np.log(t / s)).mean(-1).mean(1)
        else:
            a, b = softmax(teacher.mean(1) / 3), softmax(logits.mean(1) / 3)
            kl = (a * np.log(a / b)).mean(-1)
        label = -np.log(softmax(logits.mean(1))[np.arange(6), labels])
        np.testing.assert_allclose(total, 0.5 * label + 7 * kl, rtol=1e-10)
        np.testing.assert_allclose(parts["kl_loss"], kl, rtol=1e-10)


def test_the_teacher_gets_no_gradient(x64):
    objective = Objective(kl_weight=1.0)
    logits = jnp.ones((2, 1, 3)) * jnp.arange(3.0)

    def loss(teacher):
        return objective_loss(objective, logits, {"label": jnp.zeros(2, int), "teacher": teacher})[0].sum()

    assert (jax.grad(loss)(logits * 2) == 0).all()


def test_weight_decay_acts_on_kernels_alone():
    dims = small_dims(dist_token=True, registers=1, layer_scale=True)
    params = random_params(dims)
    for path, decayed in flatten(optim.decays(params)):
        assert decayed == path.endswith("kernel"), path


def test_schedule():
    schedule = optim.schedule(1.0, 100, 10, 0.1)
    assert [float(schedule(i)) for i in (0, 5, 10, 100)] == pytest.approx([0.0, 0.5, 1.0, 0.1])
    assert float(optim.schedule(1.0, 10)(0)) == 1.0


def test_moments_of_removed_units_are_zeroed_and_no_others():
    dims = small_dims()
    params = jax.tree.map(jnp.asarray, random_params(dims, dtype=np.float32))
    optimizer = optim.adamw(1e-3, weight_decay=0.1, clip_norm=1.0)
    _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    masks = full_masks(dims)
    masks.mlp[0, 2] = masks.embed[3] = masks.head[1, 0] = 0
    cleared = optim.zero_removed(state, masks)
    kept = dict(flatten(expand(masks._replace(qk=masks.qk * masks.head[..., None]), params)))
    adam, old = (
        next(s for s in jax.tree.leaves(o, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)) if hasattr(s, "mu"))
        for o in (cleared, state)
    )
    for moment, before in ((adam.mu, old.mu), (adam.nu, old.nu)):
        for (path, value), (_, start) in zip(flatten(moment), flatten(before), strict=True):
            np.testing.assert_array_equal(value, start * kept[path], err_msg=path)
    assert (np.asarray(adam.mu["block_0"]["fc1"]["kernel"])[:, 2] == 0).all()
    assert (np.asarray(adam.mu["block_1"]["proj"]["kernel"])[0] == 0).all()


def test_ema_rises_to_its_decay():
    average, params = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    assert optim.ema_update(average, params, jnp.int32(0), 0.99)["w"][0] == pytest.approx(0.9)
    assert optim.ema_update(average, params, jnp.int32(10**6), 0.99)["w"][0] == pytest.approx(0.01)


def test_gradual_targets_fall_along_a_cubic_and_end_at_the_target():
    target = Target("macs_ratio", lambda d: 0.0, 50.0, 100.0)
    plan = Plan(method="gradual", steps=4)
    limits = [plan.targets(i, [target])[0].limit for i in range(5)]
    assert limits == pytest.approx([50 + 50 * 0.75**3, 50 + 50 * 0.5**3, 50 + 50 * 0.25**3, 50, 50])
    assert Plan(method="iterative", groups_per_step=3).max_groups == 3
    assert Plan(method="one_shot").targets(0, [target]) == [target]
    with pytest.raises(UserError, match="method='magic' is not one of"):
        Plan(method="magic")


@pytest.mark.parametrize("reset", [False, True])
def test_the_loop_averages_scores_and_trains_between_prunings(reset):
    """NViT's loop: steps before the first pruning, too; momentum 0.9, and the average begun anew after the first."""
    dims = small_dims()
    full = full_masks(dims)
    asked, seen = [], []

    def train(state, until):
        asked.append((int(state.prunings), until))
        return state.train._replace(step=jnp.int32(until))

    def score(state, pruning):
        return Units(*(np.full(m.shape, 10.0**pruning) for m in full))

    def rank(scores, masks, pruning):
        seen.append(scores.mlp[0, 0])
        masks = masks._replace(mlp=np.where(np.arange(masks.mlp.shape[1]) < pruning + 1, 0, masks.mlp))
        return Ranking(masks, kept_dims(masks, dims), [], False, 0)

    optimizer = optim.adamw(1e-3, weight_decay=0.0)
    begin = distill.new_state(random_params(dims, dtype=np.float32), optimizer, 0, masks=full)
    target = Target("mlp", lambda d: float(sum(d.mlp)), 2 * dims.mlp[0] - 8.0, 0.0)  # four prunings of 2 neurons
    work = types.SimpleNamespace(
        score=score,
        remove=lambda train, masks: (train._replace(masks=masks), {}),
        train=train,
        evaluate=lambda s: {},
        pruned=lambda pruning: None,
    )
    plan = Plan(method="iterative", warmup=5, interval=3, ema=0.9, reset_scores=reset)
    monitor = Recorder()
    state = prune_loop(new_prune_state(begin), Task(dims, plan, [target], rank), work, monitor)
    assert asked == [(0, 5), (1, 8), (2, 11), (3, 14)] and [line["step"] for line in monitor.prunings] == [5, 8, 11, 14]
    second = (0.0 if reset else 0.9 * 1) + 0.1 * 10
    third = 0.9 * second + 0.1 * 100
    assert seen == pytest.approx([1, second, third, 0.9 * third + 0.1 * 1000])
    assert state.met and int(state.prunings) == 4 and np.asarray(state.train.masks.mlp).sum(1).tolist() == [8, 8]


def test_pruning_steps_do_not_recompile():
    """The score step that the loop calls is traced once, whatever the masks and the weights are."""
    dims = small_dims()
    traces = []

    def counting(*arguments, **options):
        traces.append(1)
        return saliency.hvp(*arguments, **options)

    parallel = Parallel.create("jit", tuple(jax.devices()[:1]))
    step = parallel.compile(make_score_step(dims, Scoring(criterion="hvp", loss="kl"), Objective(), criterion=counting))
    params = random_params(dims, dtype=np.float32)
    optimizer = optim.adamw(1e-3, weight_decay=0.0)
    batch = {"image": random_images(dims, dtype=np.float32), "label": np.zeros(3, np.int32)}
    masks = full_masks(dims)
    for pruning in range(3):
        masks.mlp[:, pruning] = 0
        state = distill.new_state(params, optimizer, pruning, masks=jax.tree.map(jnp.asarray, masks))
        index = np.arange(3, dtype=np.int32) + 3 * pruning
        scores = step(distill.Inputs(parallel.place(state), params), parallel.shard(batch | {"index": index}))
        assert (np.asarray(scores.mlp)[:, : pruning + 1] == 0).all()
    assert len(traces) == 1


class Recorder(Monitor):
    """Keeps what it is told."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.lines, self.prunings, self.saves, self.step, self.stop_at = [], [], [], 0, stop_at

    @property
    def stopping(self):
        return self.stop_at is not None and self.step + 1 >= self.stop_at

    def log(self, step, metrics):
        self.lines.append((step, metrics))

    def save(self, step, state):
        self.saves.append(step)

    def history(self, line):
        self.prunings.append(line)

    def advance(self, step, text="", total=None):
        self.step = step


def fake_step(losses):
    def step(state, batch):
        metrics = {"loss": jnp.float32(losses[int(state.step)]), "gradient_norm": jnp.float32(1)}
        return state._replace(step=state.step + 1), metrics

    return step


STATE = distill.TrainState(jnp.int32(0), {}, (), None, None, jnp.zeros(2, jnp.uint32))


def test_fit_logs_saves_and_evaluates_when_it_should():
    monitor = Recorder()
    distill.fit(
        STATE,
        fake_step(np.arange(10.0)),
        lambda step: {},
        10,
        monitor,
        log_every=3,
        save_every=4,
        evaluate=lambda state: {"top1": int(state.step) / 10},
        eval_every=6,
    )
    assert [(s, m["loss"], m.get("val_top1")) for s, m in monitor.lines] == [
        (3, 2.0, None),
        (6, 5.0, 0.6),
        (9, 8.0, None),
        (10, 9.0, 1.0),
    ]
    assert monitor.saves == [4, 8]


def test_a_loss_that_is_not_finite_stops_before_it_is_saved():
    monitor = Recorder()
    losses = [1.0, 1.0, 1.0, 1.0, 1.0, np.nan, 1.0, 1.0]
    with pytest.raises(UserError, match="the loss is nan at step 6"):
        distill.fit(STATE, fake_step(losses), lambda step: {}, 8, monitor, log_every=100, save_every=4)
    assert monitor.saves == [4]


def test_a_stop_saves_where_it_is():
    monitor = Recorder(stop_at=5)
    with pytest.raises(distill.Stopped, match="step 5"):
        distill.fit(STATE, fake_step(np.ones(10)), lambda step: {}, 10, monitor, log_every=3, save_every=100)
    assert monitor.saves == [5]


def test_evaluation_reads_a_batch_when_the_next_ones_run():
    """So that the device never waits for the host; what is found stays in order, and all of it counts."""
    told = []

    class Late:
        def __init__(self, name, value):
            self.name, self.value = name, value

        def __array__(self, dtype=None, copy=None):
            if self.name == "images":
                told.append(("read", self.value))
            return np.array([self.value], float)

    def step(state, number):
        told.append(("run", number))
        values = {"top1": 1, "top5": 2, "loss": 3 * number, "images": number, "broken": 0, "before": 0}
        return {name: Late(name, value) for name, value in values.items()}

    found = evaluate(step, None, iter([4, 5, 6, 7]))
    assert [name for name, _ in told] == ["run"] * 3 + ["read", "run"] + ["read"] * 3
    assert [number for name, number in told if name == "read"] == [4, 5, 6, 7]
    assert found == {"top1": 4 / 22, "top5": 8 / 22, "loss": 3.0, "images": 22}


# --------------------------------------------------------------------------------------------- progress


def test_the_time_left_does_not_count_what_compiles(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(monitor, "time", types.SimpleNamespace(monotonic=lambda: now))
    console = monitor.Console("train")
    with console.progress(100):
        for done, now in ((1, 300.0), (11, 340.0), (12, 341.0), (61, 540.0)):  # noqa: B007 - the first one compiles
            console.advance(done)
    assert capsys.readouterr().out.splitlines() == [
        "[train] step 1 of 100",
        "[train] step 11 of 100, 0.25 a second, 05:56 left",
        "[train] step 61 of 100, 0.25 a second, 02:36 left",
    ]
