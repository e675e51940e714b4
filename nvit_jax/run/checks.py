"""Everything that config and files can tell about a command, found out before its first stage begins."""

import dataclasses
import importlib.util
import pathlib
import uuid
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from nvit_jax.api.prune import check_method, family
from nvit_jax.api.recipe import Recipe
from nvit_jax.api.targets import check_without_latency, reachable_targets
from nvit_jax.api.trainer import Trainer
from nvit_jax.data.datasets import Dataset
from nvit_jax.data.feed import Draws, SplitFeed, make_feed
from nvit_jax.errors import UserError, renamed
from nvit_jax.formats.export import check_formats
from nvit_jax.latency.sources import Milliseconds
from nvit_jax.model.dims import ViTDims
from nvit_jax.parallel import Parallel, any_process
from nvit_jax.paths import in_words
from nvit_jax.pruning.rules import ranker
from nvit_jax.pruning.scoring import make_score_step
from nvit_jax.run import report, writes
from nvit_jax.run.agenda import Step
from nvit_jax.run.outlook import Facts, Outlook, View
from nvit_jax.run.stages import rules
from nvit_jax.run.stages.common import augment_of, keys_of, objective_of, recipe_of, teacher_of
from nvit_jax.training.monitor import Monitor


def check_run(steps: Sequence[Step]) -> None:
    """UserError for the first mistake. All processes look; none goes on alone."""
    error = None
    try:
        _check_all(steps)
    except UserError as caught:
        error = caught
    if any_process(error is not None):
        raise error or UserError("another process has found a mistake; its message says which")


def _check_all(steps: Sequence[Step]) -> None:
    outlook = Outlook()
    for step in steps:
        verdict = outlook.judge(step)
        if verdict.works:
            writes.check_pages(step.workdir, step.name)
            _check_writable(step.workdir / step.name)
            CHECKS[step.name](View(step, outlook))
            outlook.add(step, verdict)


def _check_writable(place: pathlib.Path) -> None:
    """UserError when a stage's directory that is there may not be written."""
    if not place.is_dir():
        return
    probe = place / f".write-{uuid.uuid4().hex}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{place} cannot be written: {in_words(error)}") from error


# ---------------------------------------------------------------------------------------------- trainings


def check_pretrain(view: View) -> None:
    """The model to begin with, images, the teacher, batches, and that there is a step to make."""
    _check_training(view, view.start())


def check_finetune(view: View) -> None:
    """As pretrain, for what prune has made or will make."""
    s = view.config.finetune
    view.need("prune")
    if view.coming("prune"):
        pruned = view.dense()  # narrower then, but of the same images and classes
        if s.snapshot is not None and s.snapshot not in tuple(view.config.prune.snapshots):
            raise UserError(
                f"config.finetune.snapshot={s.snapshot}: prune.snapshots={tuple(view.config.prune.snapshots)}"
            )
    else:
        place = view.path("prune")
        pruned = view.outlook.model(
            place / "model" if s.snapshot is None else place / "snapshots" / str(s.snapshot) / "model"
        )
    if s.kl_weight or not pruned.dims.classes:
        view.dense()
    _check_training(view, pruned)


def _check_training(view: View, facts: Facts) -> None:
    data = view.data(facts)
    data.split("val")
    with keys_of(view.name):
        recipe = _recipe(view, facts.dims, data)
        feed, trainer = _trainer(recipe, facts.dims, data)
        feed.reader(trainer.draws()).close()
        if not round(recipe.epochs * feed.steps(trainer.batch)):
            have = f"{feed.steps(trainer.batch)} batches of {trainer.batch} images are an epoch"
            raise UserError(f"={recipe.epochs:g} is not one step ({have})", "epochs")


def _recipe(view: View, dims: ViTDims, data: Dataset) -> Recipe:
    """Of the stage's own section, its teacher read."""
    teacher = teacher_of(view.config, view.name, dims, data.preprocessing)
    return recipe_of(view.config, view.name, objective_of(view.config, view.name, dims), teacher)


def _trainer(recipe: Recipe, dims: ViTDims, data: Dataset) -> tuple[SplitFeed, Trainer]:
    """Made to see whether it can be: without teachers, which would go to the devices."""
    feed = make_feed(data, dims, data.preprocessing)
    assert isinstance(feed, SplitFeed)
    return feed, Trainer(dims, feed, dataclasses.replace(recipe, label_teacher=None), None, Monitor())


# ------------------------------------------------------------------------------------------------ pruning


def check_latency(view: View) -> None:
    """There is a model whose pieces can be timed."""
    view.dense()


def check_prune(view: View) -> None:
    """Targets that can be met, a criterion that can score, images, the teacher, batches."""
    p, facts = view.config.prune, view.dense()
    dims, known = facts.dims, view.config.latency.table or view.config.latency.roofline.tflops
    measured_later = not known and view.coming("latency")
    predict: Milliseconds | None = None
    if not measured_later:
        predict = rules.latency_model(view.run("latency"), dims)
    with rules.prune_keys():
        plan, scoring = rules.plan(p), rules.scoring(p).for_model(dims)
        check_method(plan, scoring, rules.choice(p, dims), p.compensate, dims)
        _check_targets(p, dims, predict, measured_later=measured_later)
    data = view.data(facts)
    data.split("val")
    with rules.prune_keys():
        recipe = _recipe(view, dims, data)
        if not scoring.calibrated:
            make_score_step(dims, scoring, recipe.objective)
        feed, trainer = _trainer(recipe, dims, data)
        if plan.trains:
            feed.reader(trainer.draws()).close()
        if not scoring.from_training and scoring.batch is not None:
            trainer.parallel.check_batch(scoring.batch, "criterion.batch")
            feed.reader(Draws(scoring.batch, (0,), trainer.parallel, labels=False)).close()


def _check_targets(p: ConfigDict, dims: ViTDims, predict: Milliseconds | None, *, measured_later: bool) -> None:
    """What a latency that is yet to be measured allows cannot be told; all else can."""
    limits, choice, plan = (
        rules.limits(p, latency=measured_later or predict is not None),
        rules.choice(p, dims),
        rules.plan(p),
    )
    if measured_later:
        check_without_latency(limits, choice, plan, dims)
        return
    family(limits, p.snapshots if p.mode == "one_shot" else (), plan)
    policy = choice.policy(predict)
    ranker(dims, policy, reachable_targets(limits, policy, dims, predict), plan)


# ------------------------------------------------------------------------------------------------- the rest


def check_eval(view: View) -> None:
    """The split is there, and the models that are done can be read."""
    dense = view.dense()
    with keys_of("eval"):
        Parallel.create(view.config.parallel)
    view.data(dense).split(view.config.eval.split)
    for name in ("prune", "finetune"):
        if view.done(name) and not view.coming(name):
            view.outlook.model(view.path(name) / "model")


def check_export(view: View) -> None:
    """There is something to write, by packages that are installed."""
    c = view.config.export
    for key, values in (("formats", c.formats), ("dtypes", c.dtypes)):
        if not tuple(values):
            raise UserError(f"config.export.{key}=(): nothing to write")
    packages = ("onnx", "onnxruntime", "onnxscript", "torch") if "onnx" in c.formats else ()
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f'config.export.formats: "onnx" needs pip install "nvit_jax[onnx]" (there is no {missing[0]})')
    if name := next((name for name in ("finetune", "prune") if view.done(name)), ""):
        last = None if view.coming(name) else view.outlook.model(view.path(name) / "model")
    else:
        last = view.dense()
    if last is not None:
        with renamed({key: f"config.export.{key}" for key in ("formats", "weights")}):
            check_formats(last.dims, tuple(c.formats), c.weights)


def check_report(view: View) -> None:
    """There is something to show, and the files that it stands in can be read."""
    view.need("eval")
    if not any(view.coming(name) for name in ("pretrain", "prune", "finetune", "eval")):
        report.check_files(view.step.workdir)


def check_preview(view: View) -> None:
    """There are training images, which can be augmented."""
    there = view.config.model or view.done("pretrain")
    data = view.data(view.dense() if there else view.start())
    data.split("train")
    with keys_of("pretrain"):
        augment_of(view.config).pixels(data.preprocessing)


CHECKS: dict[str, Callable[[View], None]] = {
    "pretrain": check_pretrain,
    "latency": check_latency,
    "prune": check_prune,
    "finetune": check_finetune,
    "eval": check_eval,
    "export": check_export,
    "report": check_report,
    "preview": check_preview,
}
