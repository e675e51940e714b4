"""finetune: train a model on, usually by distillation from the one that it was pruned from."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax

from nvit_jax.api.arguments import checked, only_recipe
from nvit_jax.api.evaluate import check_reference, evaluator
from nvit_jax.api.recipe import Loss, Recipe
from nvit_jax.api.recording import open_monitor
from nvit_jax.api.trainer import Trainer, check_objective, cost, trained
from nvit_jax.data.augmentation import Augment
from nvit_jax.data.feed import Feed, make_feed
from nvit_jax.errors import UserError
from nvit_jax.files import read_json, recover
from nvit_jax.model.dims import count_params
from nvit_jax.model.directory import Model, check_weights, load_model, save_model
from nvit_jax.model.groups import Params
from nvit_jax.model.sizes import words
from nvit_jax.parallel import fetch, wait_for_all
from nvit_jax.paths import named
from nvit_jax.pruning import sparsity
from nvit_jax.schema import Number, Record
from nvit_jax.training import distill
from nvit_jax.training.losses import FEATURES, Objective
from nvit_jax.training.measures import watched
from nvit_jax.training.monitor import Monitor, Recorder

_IN_RECIPE = (
    "epochs",
    "batch",
    "learning_rate",
    "loss",
    "optimizer",
    "ema",
    "augment",
    "evaluate_every",
    "keep",
    "seed",
)
_SCORE_BATCHES = 64  # of sparsity="gradient", and at most one pass


@checked
def finetune(
    model: Model,
    batches: Any,
    *,
    teacher: Model | None = None,
    epochs: float = 10.0,
    batch: int | None = None,
    learning_rate: float = 2e-4,
    loss: Loss | None = None,
    optimizer: optax.GradientTransformation | None = None,
    ema: float = 0.0,
    augment: Augment | None = None,
    evaluate_on: Any = None,
    evaluate_every: int | None = None,
    keep: str = "last",
    recipe: Recipe | None = None,
    directory: str | Path | None = None,
    seed: int = 0,
    progress: bool | Monitor = True,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> Model:
    """Train `model` on; the model given stays as it is.

    Args:
      batches: images and labels; see the guide for what may be given.
      teacher: the model that this one was pruned from. The loss is then cross-entropy with the labels plus the KL
        divergence from the teacher's answers at temperature 2, weighted 2^2 (Hinton et al. 2015). A model without a
        classifier learns the teacher's features (`feature_distance`), and needs no labels.
      batch: images of a step (default 64), where `batches` are no batches yet.
      loss: your own, (logits [B, C], batch) -> [B], in the place of the cross-entropy.
      optimizer: any optax transformation, in the place of AdamW with a cosine schedule.
      ema: decay of averaged weights; the average becomes the model.
      evaluate_on: images and labels that accuracy is measured on, every `evaluate_every` steps (default 100) and at the
        end; `keep="best"` returns the evaluated model with the highest top-1. Without a classifier it is the cosine
        similarity to the teacher's features.
      recipe: everything, where the arguments above do not say enough; then those that it has must be left out.
      directory: where logs, states and the model are saved, and from where a stopped run resumes. Without it nothing
        touches the disk.
      callback: is called with (step, metrics) at every logged step.

    Returns the trained Model; `info["training"]` says what the training measured. Raises UserError.
    """
    if recipe is not None:
        given = (epochs, batch, learning_rate, loss, optimizer, ema, augment, evaluate_every, keep, seed)
        only_recipe(finetune, _IN_RECIPE, given)
    else:
        objective = Objective(own=loss)
        if teacher is not None and not model.dims.classes:
            objective = FEATURES if loss is None else dataclasses.replace(objective, feature_weight=1.0)
        elif teacher is not None:
            objective = dataclasses.replace(objective, kl_weight=4.0 * model.dims.classes, tau=2.0, kl_per_head=True)
        recipe = Recipe(
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            objective=objective,
            optimizer=optimizer,
            ema=ema,
            augment=augment or Augment(),
            evaluate_every=(0 if evaluate_on is None else 100) if evaluate_every is None else evaluate_every,
            keep=keep,
            seed=seed,
        )
    with open_monitor(progress, directory, "finetune", callback, (model, recipe, teacher)) as monitor:
        done = None if directory is None else named(directory) / "model"
        if done is not None and done.exists():
            monitor.say(f"finished before: {done}")
            return load_model(done)
        found = fit_model(model, batches, evaluate_on, recipe, teacher, monitor)
        if done is not None:
            found.save(done)
        return found


def fit_model(
    model: Model, batches: Any, evaluate_on: Any, recipe: Recipe, teacher: Model | None, monitor: Monitor
) -> Model:
    """`finetune`, with everything in a recipe and a monitor."""
    model = model.compact()
    check_training(model, recipe, teacher, evaluate_on)
    for name, one in (("model", model), ("teacher", teacher)):
        if one is not None:
            check_weights(one.params, name)
    feed = make_feed(batches, model.dims, model.preprocessing, classes=model.classes)
    held = None
    if evaluate_on is not None:
        held = make_feed(evaluate_on, model.dims, model.preprocessing, split="val", classes=model.classes)
    reference = teacher.compact() if teacher else None
    teacher = reference if recipe.objective.needs_teacher else None
    run = _Run(Trainer(model.dims, feed, recipe, teacher, monitor), held, reference)
    params, facts = run.fit(model.params)
    info = dict(model.info)
    if info.get("preprocessing") is None and getattr(feed, "preprocessing", None) is not None:
        info["preprocessing"] = feed.preprocessing.to_json()  # type: ignore[attr-defined]
    if recipe.sparsity:
        sparsity.check(sparsity.matrices(params))
        info["sparsity"] = sparsity.PATTERN
        facts["nonzero_params"] = sparsity.count_nonzero(params)
    return Model(model.dims, params, info=info | {"training": facts})


def check_training(model: Model, recipe: Recipe, teacher: Model | None, evaluate_on: Any) -> None:
    """UserError when these do not go together."""
    if not model.dims.classes and teacher is None and recipe.objective.own is None:
        text = " has no classifier: it learns the features of a teacher, the unpruned model, or by a loss of your own"
        raise UserError(text, "model")
    check_objective(recipe.objective, model.dims, "objective")
    if not model.dims.classes and teacher is None and evaluate_on is not None:
        raise UserError(" needs a teacher: features are compared with those of the unpruned model", "evaluate_on")
    if recipe.objective.needs_teacher and teacher is None:
        raise UserError(" is needed: the objective has a kl_weight or a feature_weight", "teacher")
    if teacher is not None and not model.dims.classes:
        check_reference(teacher, model.dims, "teacher")
    if teacher is not None and (teacher.dims.classes, teacher.dims.image) != (model.dims.classes, model.dims.image):
        raise UserError(
            f" tells {teacher.dims.classes} classes at {words(teacher.dims.image)} pixels, the model "
            f"{model.dims.classes} at {words(model.dims.image)}",
            "teacher",
        )
    if bool(recipe.objective.teacher_alpha) != (recipe.label_teacher is not None):
        raise UserError(" goes with a label_teacher; give both or none", "objective.teacher_alpha")
    if recipe.keep == "best" and (evaluate_on is None or not recipe.evaluate_every):
        raise UserError('="best" needs evaluate_on, and evaluate_every > 0', "keep")


class _Run:
    """One training from its first step, or from the newest saved state, to its last."""

    def __init__(self, trainer: Trainer, held: Feed | None, reference: Model | None) -> None:
        self.trainer, self.recipe, self.monitor = trainer, trainer.recipe, trainer.monitor
        self.per_epoch = trainer.feed.steps(trainer.batch)
        self.steps = round(self.recipe.epochs * self.per_epoch)
        if not self.per_epoch and (images := trainer.feed.images()) is not None:
            raise UserError(f"={trainer.batch}: there are {images} images", "batch")
        if not self.steps:
            have = f"{self.per_epoch} batches of {trainer.batch} images are an epoch"
            raise UserError(f"={self.recipe.epochs:g} is not one step ({have})", "epochs")
        self.schedule = self.recipe.schedule(trainer.batch, self.steps, self.per_epoch)
        self.optimizer = self.recipe.make_optimizer(self.schedule)
        r = self.recipe
        self.val, self.measure = None, watched(trainer.dims)
        if held is not None:
            how = trainer.parallel, 4 * trainer.batch, r.compute_dtype, self.monitor
            self.val = evaluator(trainer.dims, held, *how, reference=reference, shown=False)
        place = self.monitor.path / "best" if isinstance(self.monitor, Recorder) else None
        self.best = Best(trainer, place) if r.keep == "best" else None

    def fit(self, params: Params) -> tuple[Params, dict[str, Any]]:
        """The weights after the last step (or the best evaluated), and what was measured."""
        trainer, recipe, monitor = self.trainer, self.recipe, self.monitor
        state = self._begin_or_resume(params)
        first = int(state.step)
        monitor.resume(first)
        began = time.monotonic()
        with recipe.precision(), monitor.progress(self.steps, first), trainer.reader() as reader:
            state = distill.fit(
                trainer.parallel.begin(state),
                trainer.compiled(self.optimizer, drop_path=recipe.drop_path),
                reader,
                self.steps,
                monitor,
                log_every=recipe.log_every,
                save_every=recipe.save_every,
                evaluate=self._check if self.val else None,
                eval_every=recipe.evaluate_every,
                learning_rate=self.schedule if recipe.optimizer is None else None,
            )
        facts = cost(monitor, began, (self.steps - first) * trainer.batch)
        found, step = self.best.read() if self.best else (fetch(trained(state)), self.steps)
        value = self.val(found, None)[self.measure.key] if self.val else None
        return found, {"steps": self.steps, "step": step, f"val_{self.measure.key}": value} | facts

    def _check(self, state: distill.TrainState) -> dict[str, Any]:
        assert self.val is not None
        found = self.val(trained(state), None)
        if self.best:
            self.best.offer(found[self.measure.key], int(state.step), trained(state))
        return found

    def _begin_or_resume(self, params: Params) -> distill.TrainState:
        """The newest saved state, on the host, or the one before the first step."""
        sparse = self.recipe.sparsity
        # By magnitude; a saved state brings masks of its own, and these say what shapes they have.
        state = self._begin(params, sparsity.find_masks(params) if sparse else None)
        if (found := self.monitor.restore(state)) is not None:
            self.monitor.say(f"resumes at step {found[0]}")
            return distill.TrainState(*found[1])
        if sparse:
            if sparse == "gradient":
                squares = self.trainer.squared_gradients(params, _SCORE_BATCHES)
                state = self._begin(params, sparsity.find_masks(params, squares))
            count = sparsity.count_nonzero(state.params)
            text = f"{sparsity.PATTERN} by {sparse}: {count:,} of {count_params(self.trainer.dims):,} parameters stay"
            if self.val is not None:
                value = self.measure.form.format(self.val(state.params, None)[self.measure.key])
                text += f", val {self.measure.title} {value} before training"
            self.monitor.say(text)
        return state

    def _begin(self, params: Params, masks: Params | None) -> distill.TrainState:
        """The state before the first step; 2:4 masks are kept by the optimizer."""
        start = params
        if masks is not None:
            base = self.recipe.make_optimizer(self.schedule)
            self.optimizer, start = sparsity.held(base, masks), sparsity.apply(params, masks)
        return distill.new_state(start, self.optimizer, self.recipe.seed, ema=self.recipe.ema > 0)


class Best:
    """The evaluated model of the highest measure of a training, the earliest of equals; at `place` where there is one.

    There it outlives a kill. A later model that a killed run has left comes again when the run is resumed.
    """

    def __init__(self, trainer: Trainer, place: Path | None) -> None:
        self._dims, self._place, self.value = trainer.dims, place, -2.0  # less than any
        self._key = f"val_{watched(trainer.dims).key}"
        self._kept: tuple[Params, int] | None = None
        if place is not None:
            recover(place)
            wait_for_all(f"recover {place}")
            if place.is_dir():
                shape = Record({"provenance": Record({self._key: Number(-1, 1)})})
                self.value = read_json(place / "model.json", shape)["provenance"][self._key]

    def offer(self, value: float, step: int, params: Params) -> None:
        """Keep it if it is better."""
        if value <= self.value:
            return
        self.value = value
        if self._place is None:
            self._kept = fetch(params), step
        else:
            facts = {"provenance": {self._key: value, "step": step}}
            save_model(self._place, Model(self._dims, fetch(params), info=facts))

    def read(self) -> tuple[Params, int]:
        """(parameters, step)."""
        if self._kept is not None:
            return self._kept
        assert self._place is not None
        model = load_model(self._place)
        return model.params, model.info["provenance"]["step"]
