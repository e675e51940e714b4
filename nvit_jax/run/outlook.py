"""What each stage of a command will find, thought through before the first one begins. Nothing is written.

What an earlier stage of the command is going to make has no weights yet, but its image size and classes are known.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from nvit_jax.data.datasets import Dataset
from nvit_jax.errors import UserError
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.directory import Model, load_model
from nvit_jax.run import reads
from nvit_jax.run.agenda import Step
from nvit_jax.run.config import STAGES, flatten_config
from nvit_jax.run.stages.common import Run, dense_dir, dense_model, dims_from_config, load_data
from nvit_jax.run.workdir import StageDir, Verdict

Path = pathlib.Path
_ANEW = "anew"  # the id of what the command is going to make


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a model that may not exist yet."""

    dims: ViTDims
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    masked: bool = False
    to_come: bool = False  # pretrain is going to make it, for the classes of its data

    @classmethod
    def of(cls, model: Model) -> "Facts":
        """Of a model that exists."""
        return cls(model.dims, model.info, model.masks is not None)


class Outlook:
    """The workdirs of a command, from step to step."""

    def __init__(self) -> None:
        self._works: set[Path] = set()  # stages that will have worked
        self._redone: set[Path] = set()  # among them those that will have taken the place of finished ones
        self._models: dict[Path, Facts] = {}
        self._data: dict[str, Dataset] = {}

    def judge(self, step: Step) -> Verdict:
        """What the stage will do when its turn comes. UserError when it would be refused."""
        keys = flatten_config(reads.handed(step.config, step.name))
        stage, inputs = StageDir(step.workdir, step.name), step.ids(self.id_of) | reads.contents(keys)
        verdict = stage.judge(keys, inputs, force=step.force, stale=self._is_stale(step.workdir, step.name))
        stage.check_place(verdict)
        return verdict

    def add(self, step: Step, verdict: Verdict) -> None:
        """The stage will have worked."""
        place = (step.workdir / step.name).resolve()
        self._works.add(place)
        if verdict.path != step.workdir / step.name:
            self._redone.add(place)

    def id_of(self, workdir: Path, name: str) -> str | None:
        """Of a stage that will be done, else None."""
        if self.coming(workdir, name):
            return _ANEW
        stage = StageDir(workdir, name)
        return stage.id() if stage.done() and not self._is_stale(workdir, name) else None

    def coming(self, workdir: Path, name: str) -> bool:
        """Whether an earlier step of the command makes it."""
        return (workdir / name).resolve() in self._works

    def _is_stale(self, workdir: Path, name: str) -> bool:
        place = (workdir / name).resolve()
        return any(place.parent / earlier in self._redone for earlier in STAGES[: STAGES.index(name)])

    def model(self, path: Path, run: Run | None = None) -> Facts:
        """Of a model directory, read once; with `run`, as the model to prune. UserError when it cannot be used."""
        if path not in self._models:
            self._models[path] = Facts.of(load_model(path) if run is None else dense_model(run))
        return self._models[path]

    def data(self, run: Run, facts: Facts) -> Dataset:
        """The data set of a config, listed once. UserError when it does not fit the model."""
        d, fresh = facts.dims, facts.to_come
        known = [facts.info.get(key) for key in ("preprocessing", "classes")]
        read = (run.config.data.to_dict(), d.image, d.channels, d.classes, known, fresh)
        key = json.dumps(read, sort_keys=True)
        if key not in self._data:
            self._data[key] = load_data(run, d, facts.info, fresh=fresh)
        return self._data[key]


class _Silent(StageDir):
    def say(self, text: str) -> None:
        """The stage itself will."""


@dataclasses.dataclass(frozen=True)
class View:
    """What one stage will find."""

    step: Step
    outlook: Outlook

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def config(self) -> ConfigDict:
        return self.step.config

    def run(self, needs: str = "") -> Run:
        """What a stage is handed, in the workdir where it finds the stage that it needs."""
        workdir = self.step.where(needs) if needs else self.step.workdir
        return Run(self.config, _Silent(workdir, self.name), workdir)

    def path(self, name: str) -> Path:
        """Of another stage."""
        return self.step.where(name) / name

    def done(self, name: str) -> bool:
        """Whether another stage will be done."""
        return self.outlook.id_of(self.step.where(name), name) is not None

    def coming(self, name: str) -> bool:
        """Whether this command will have made it, so that its files are not there yet."""
        return self.outlook.coming(self.step.where(name), name)

    def need(self, name: str) -> None:
        """UserError unless another stage will be done."""
        if not self.done(name):
            raise UserError(f"{self.name} needs {self.path(name)}: run --stage {name} first")

    def start(self) -> Facts:
        """The model that pretrain trains."""
        given = self.config.pretrain.start
        if not given:
            dims = dims_from_config(self.config.vit)
            if not dims.classes:
                raise UserError(
                    "config.vit.classes=0: pretrain learns labels, which need a classifier; set --config.model"
                )
            return Facts(dims, to_come=True)
        facts = self.outlook.model(Path(given))
        if facts.masked or not facts.dims.classes:
            raise UserError(f"config.pretrain.start={given} must be a model without masks and with a classifier")
        return dataclasses.replace(facts, to_come=True)

    def dense(self) -> Facts:
        """The model to prune."""
        if not self.config.model and self.coming("pretrain"):
            return self.start()
        run = self.run("pretrain")
        return self.outlook.model(dense_dir(run), run)

    def data(self, facts: Facts) -> Dataset:
        """The data set, which fits the model."""
        return self.outlook.data(self.run(), facts)
