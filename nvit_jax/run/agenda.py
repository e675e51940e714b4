"""What a command runs, in which order: stages, and comparisons with other criteria."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from nvit_jax.errors import UserError, nearest
from nvit_jax.run.config import STAGES
from nvit_jax.run.reads import STAGES_READ

_SHARED = ("pretrain", "latency")  # of a comparison: the same dense model, the same predictions
_COMPARED = ("prune", "finetune", "eval")


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage of a command."""

    config: ConfigDict
    workdir: pathlib.Path
    name: str
    force: bool
    compared: bool = False  # by another criterion, under W/compare/

    @property
    def home(self) -> pathlib.Path:
        """The workdir of the command."""
        return self.workdir.parent.parent if self.compared else self.workdir

    def where(self, name: str) -> pathlib.Path:
        """The workdir of another stage that this one reads."""
        shared = self.compared and name in _SHARED and not (self.workdir / name).exists()
        return self.home if shared else self.workdir

    def share(self) -> None:
        """Link what a comparison has in common with the run itself."""
        for name in _SHARED if self.compared else ():
            if self.where(name) != self.workdir and (self.home / name).exists():
                link = pathlib.Path("..", "..", name)
                (self.workdir / name).symlink_to(link, target_is_directory=True)

    def ids(self, id_of: Callable[[pathlib.Path, str], str | None]) -> dict[str, str]:
        """What `id_of` (workdir, stage) says of the stages that this one reads, but for None."""
        found = {other: id_of(self.where(other), other) for other in STAGES_READ[self.name]}
        if self.name == "report":
            found |= {f"compare/{c}": id_of(self.workdir / "compare" / c, "eval") for c in self.config.compare}
        return {other: value for other, value in found.items() if value is not None}


def agenda(config: ConfigDict, workdir: pathlib.Path, names: Sequence[str], *, force: bool = False) -> list[Step]:
    """The steps of a command. UserError when there is none, or for an unknown stage.

    Comparisons come once, when all is evaluated, but before the report that shows them. A stage that is named twice
    is begun anew by `force` the first time only.
    """
    if not names:
        raise UserError(f"config.stages=(): there is nothing to do; name some of {', '.join(STAGES)}")
    for name in names:
        if name not in STAGES:
            raise UserError(f"unknown stage {name!r}{nearest(name, STAGES)}; there are {', '.join(STAGES)}")
    steps: list[Step] = []
    for name in names:
        given = config.model if name == "pretrain" else config.latency.table or config.latency.roofline.tflops
        if name in _SHARED and given and len(names) > 1:
            continue  # the model to prune, or the table, is there
        steps.append(Step(config, workdir, name, force and name not in [step.name for step in steps]))
    if "eval" not in names:
        return steps
    last = max(i for i, step in enumerate(steps) if step.name in ("eval", "report"))
    at = last if steps[last].name == "report" else len(steps)
    return [*steps[:at], *_comparisons(config, workdir, force=force and tuple(names) != ("eval",)), *steps[at:]]


def _comparisons(config: ConfigDict, workdir: pathlib.Path, *, force: bool) -> list[Step]:
    """The same pruning, finetuning and evaluation by other criteria, under compare/<criterion>/."""
    steps = []
    for criterion in config.compare:
        other = config.copy_and_resolve_references()
        other.compare = ()
        other.prune.criterion = criterion
        other.prune.score.from_training = config.prune.score.from_training and criterion == "taylor"
        place = workdir / "compare" / criterion
        steps += [Step(other, place, name, force, compared=True) for name in _COMPARED if name in config.stages]
    return steps
