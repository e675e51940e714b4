"""`nvit-jax prune`: the short way from a checkpoint and a folder of images to a small model."""

import argparse
import dataclasses
import pathlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvit_jax import paths
from nvit_jax.errors import UserError
from nvit_jax.run.commands.parser import Parser, at_least_one, positive, ratio
from nvit_jax.run.commands.run import run_all
from nvit_jax.run.configfile import load_config
from nvit_jax.run.failures import tidying

if TYPE_CHECKING:  # help and mistakes do not wait for it
    from ml_collections import ConfigDict

HOLDOUT = 0.2  # of the images are kept for evaluation when there are no others
DESCRIPTION = f"""\
Prune a Vision Transformer to a part of its MACs, latency or parameters, and evaluate it before and after.

CHECKPOINT is a model directory, or a file that `nvit-jax convert` reads; it is converted first, into DIR/model.
Images lie in FOLDER/class/image.jpg, or without labels, for a model without a classifier, in FOLDER/image.jpg; --val
likewise. Without --val, and when FOLDER has no train/ and val/, a part of {HOLDOUT:g} of the images is kept for
evaluation, chosen by a hash of their paths. Latency is measured on this device.
The same command again resumes a stopped run; with --finetune or --export added, it goes on from what is there."""
EXAMPLES = """\
--config.KEY=VALUE sets any other key of the config, as `nvit-jax run` does; this is a run of configs/checkpoint.py.

examples:
  nvit-jax prune deit_tiny_patch16_224.pth --data imagenet --classes classes.tsv --macs 0.6 --out runs/tiny
  nvit-jax prune deit.safetensors --data photos --latency 0.5 --out runs/fast --finetune 30
  nvit-jax prune model_dir --data photos --params 0.5 --out runs/small --export safetensors,onnx --config.seed=1"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    config: "ConfigDict"
    workdir: pathlib.Path
    names: tuple[str, ...]  # the stages to run
    checkpoint: pathlib.Path | None  # to be converted into config.model; None where that is given
    force: bool


def _parser() -> Parser:
    parser = Parser("prune", DESCRIPTION, EXAMPLES)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the model to prune")
    parser.option("--data", metavar="FOLDER", required=True, help="images to score units with (and to train on)")
    parser.option("--out", metavar="DIR", required=True, help="the workdir, where everything is written")
    parser.option("--macs", metavar="R", type=ratio, help="this part of the MACs stays, such as 0.6")
    parser.option("--latency", metavar="R", type=ratio, help="this part of the latency stays")
    parser.option("--params", metavar="R", type=ratio, help="this part of the parameters stays")
    parser.option("--val", metavar="FOLDER", help="images for evaluation")
    parser.option("--classes", metavar="FILE", help="a class folder's name a line, in the order of the model's labels")
    parser.option("--finetune", metavar="EPOCHS", type=positive, help="distill from the unpruned model afterwards")
    parser.option("--batch", metavar="N", type=at_least_one, help="images in a batch of finetuning (64)")
    parser.option(
        "--criterion", metavar="NAME", help="obs (the default), fisher, magnitude, taylor, hvp, obd, random, ..."
    )
    parser.option("--export", metavar="FORMATS", help="some of safetensors,transformers,stablehlo,onnx")
    parser.option("--force", action="store_true", help="do everything anew")
    return parser


def usage() -> str:
    """What --help prints."""
    return _parser().format_help()


def execute(words: Sequence[str]) -> int:
    """Convert, prune, say where the small model lies; the exit code. UserError for mistakes."""
    plan = make_plan(words)
    if plan.config.data.holdout is not None:
        print(
            f"no --val: {plan.config.data.holdout:g} of the images in {plan.config.data.train} are kept for evaluation"
        )
    if plan.checkpoint is not None:
        _convert(plan.checkpoint, pathlib.Path(plan.config.model), force=plan.force)
    command = shlex.join(["nvit-jax", "prune", *words])
    code = run_all(plan.config, plan.workdir, plan.names, force=plan.force, command=command)
    if code == 0:
        print(_conclusion(plan, words))
    return code


def make_plan(words: Sequence[str]) -> Plan:
    """Read the command line; nothing is written. UserError for mistakes."""
    overrides = [word for word in words if word.startswith("--config.")]
    for word in overrides:
        if "=" not in word:
            raise UserError(f"{word}: write {word}=VALUE")
    given = _parser().read([word for word in words if word not in overrides])
    if given.macs is None and given.latency is None and given.params is None:
        raise UserError("say how small: --macs, --latency or --params with the part that stays, such as --macs 0.6")
    if given.batch is not None and given.finetune is None:
        raise UserError("--batch goes with --finetune")
    workdir, source = paths.for_writing(given.out, "--out="), _checkpoint(given.checkpoint)
    for name, folder in (("data", given.data), ("val", given.val)):
        if folder is not None:
            paths.directory(folder, f"--{name}=")
    if given.classes is not None:
        paths.file(given.classes, "--classes=")
    ready = source.is_dir()
    config = load_config("checkpoint")
    config.model = str(source if ready else workdir / "model")
    names = _stages(given)
    config.stages = names
    _set_data(config, given)
    _set_rest(config, given)

    from nvit_jax.run.flags import override
    from nvit_jax.run.validation import check_config

    override(config, overrides)
    check_config(config)
    return Plan(config, workdir, names, None if ready else source, given.force)


def _checkpoint(text: str) -> pathlib.Path:
    """A model directory, or the file of a checkpoint, which may lie in a folder as hubs make them. UserError."""
    found = paths.kind(text)
    if found is None:
        raise UserError(f"{text}: there is no such file or directory")
    if found != "a directory":
        return paths.file(text)
    if (pathlib.Path(text) / "model.json").is_file():
        return pathlib.Path(text)
    from nvit_jax.formats.weights import find_weights

    return find_weights(pathlib.Path(text))


def _stages(given: argparse.Namespace) -> tuple[str, ...]:
    """In order. A model is evaluated as soon as it is there; with --force, which scores all anew, once at the end."""
    early = () if given.force else ("eval",)
    return (
        *(("latency",) if given.latency is not None else ()),
        *early,
        "prune",
        *((*early, "finetune") if given.finetune is not None else ()),
        "eval",
        *(("export",) if given.export is not None else ()),
        "report",
    )


def _set_data(config: "ConfigDict", given: argparse.Namespace) -> None:
    data, train, val = config.data, pathlib.Path(given.data, "train"), pathlib.Path(given.data, "val")
    data.classes = given.classes
    if given.val is not None:
        data.train, data.val = given.data, given.val
    elif train.is_dir() and val.is_dir():
        data.train, data.val = str(train), str(val)
    else:
        data.train, data.holdout = given.data, HOLDOUT


def _set_rest(config: "ConfigDict", given: argparse.Namespace) -> None:
    target = config.prune.target
    target.macs_ratio, target.latency_ratio, target.params_ratio = given.macs, given.latency, given.params
    if given.criterion is not None:
        config.prune.criterion = given.criterion
    if given.finetune is not None:
        config.finetune.epochs = given.finetune
        config.finetune.warmup_epochs = min(config.finetune.warmup_epochs, given.finetune / 10)
    if given.batch is not None:
        config.finetune.batch = given.batch
    if given.export is not None:
        config.export.formats = tuple(name.strip() for name in given.export.split(","))


def _convert(checkpoint: pathlib.Path, directory: pathlib.Path, *, force: bool) -> None:
    """Into a model directory that remembers the file's content: the same one is not converted again. UserError."""
    from nvit_jax.files import fingerprint
    from nvit_jax.formats.convert import convert
    from nvit_jax.formats.weights import files_of
    from nvit_jax.model.directory import Model, load_model, save_model

    content = fingerprint(*files_of(checkpoint))
    if directory.exists() and not force:
        made_from = load_model(directory).info.get("provenance", {})
        if made_from.get("content") != content:
            other = made_from.get("checkpoint", "something else")
            raise UserError(
                f"{directory} was made from {other}, not from this {checkpoint}; use another --out, or --force"
            )
        print(f"{directory}: converted before")
        return
    try:
        with tidying():
            model, notes = convert(checkpoint)
    except UserError as error:
        if " --" not in str(error):
            raise
        raise UserError(f"{error}, with nvit-jax convert {checkpoint} MODEL_DIR; then prune MODEL_DIR") from error
    if not isinstance(model, Model):
        raise UserError(f"{checkpoint} is a RegNetY, which can be a teacher; only Vision Transformers are pruned")
    print(*notes, sep="\n")
    provenance = model.info["provenance"] | {"content": content}
    with tidying():
        save_model(directory, dataclasses.replace(model, info=model.info | {"provenance": provenance}))


def _conclusion(plan: Plan, words: Sequence[str]) -> str:
    """Where the small model lies, and the next command."""
    small = plan.workdir / ("finetune" if "finetune" in plan.names else "prune") / "model"
    if "finetune" not in plan.names:
        more, why = ["--finetune", "30"], "to train it"
    elif "export" not in plan.names:
        more, why = ["--export", "safetensors"], "to take it elsewhere"
    else:
        return f"the small model: {small}, exported to {plan.workdir / 'export'}"
    again = shlex.join(["nvit-jax", "prune", *(word for word in words if word != "--force"), *more])
    return f"the small model: {small}\nnext, {why}: {again}"
