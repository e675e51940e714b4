"""What a config may say: the shape of every key (shapes.py), and the keys that must go together, a table."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nvit_jax.errors import UserError, nearest
from nvit_jax.model.dims import KINDS
from nvit_jax.run.config import default_config, flatten_config
from nvit_jax.run.shapes import LOOPS, SHAPES, TRAININGS


class Together(NamedTuple):
    """Keys that must go together: what must hold of `key`, in words, and what is wrong where that is not the same.

    In `wrong` {c.SECTION.KEY} stands for a value.
    """

    key: str
    good: Callable[[ConfigDict], bool]
    words: str
    wrong: str = ""


def _of_section(name: str) -> Iterator[Together]:
    """What holds for each training section."""
    yield Together(
        f"{name}.accumulate",
        lambda c: c[name].batch % (c[name].accumulate or 1) == 0,
        f"divides {name}.batch",
        f"does not divide batch={{c.{name}.batch}}",
    )
    yield Together(
        f"{name}.teacher_alpha",
        lambda c: (c[name].teacher_alpha > 0) == bool(c[name].teacher),
        f"goes with config.{name}.teacher; set both or none",
    )
    yield Together(
        "augment.mixup_shards",
        lambda c: c[name].batch % c.augment.mixup_shards == 0,
        f"divides {name}.batch",
        f"does not divide {name}.batch={{c.{name}.batch}}",
    )
    if name in TRAININGS:
        yield Together(
            f"{name}.learning_rate",
            lambda c: c[name].learning_rate > 0,
            "must be above 0, or nothing is trained",
        )
        yield Together(
            f"{name}.warmup_epochs",
            lambda c: c[name].warmup_epochs <= c[name].epochs,
            f"is at most {name}.epochs",
            f"is longer than the training, epochs={{c.{name}.epochs:g}}",
        )
        yield Together(
            f"{name}.keep",
            lambda c: c[name].keep == "last" or c[name].eval_every > 0,
            f"needs {name}.eval_every > 0",
        )
        yield Together(
            f"{name}.eval_every",
            lambda c: c[name].eval_every % c[name].log_every == 0,
            "must be a multiple of log_every",
        )


def _snapshots_fall(c: ConfigDict) -> bool:
    if not c.prune.snapshots:
        return True
    target = c.prune.target
    last = target.latency_ratio or 0.0
    if c.prune.mode == "one_shot":
        last = last or target.macs_ratio or target.params_ratio or 0.0
    ratios = (1.0, *c.prune.snapshots, last)
    return all(isinstance(r, int | float) for r in ratios) and all(a > b for a, b in itertools.pairwise(ratios))


def _collects(c: ConfigDict) -> bool:
    p = c.prune
    trains = p.plain_first and p.interval > 0 and p.mode != "one_shot"
    return not p.score.from_training or (p.criterion == "taylor" and trains)


def _roofline(c: ConfigDict) -> bool:
    given = [value for value in (c.latency.roofline.tflops, c.latency.roofline.gbs) if value is not None]
    return len(given) in (0, 2) and all(value > 0 for value in given) and c.latency.roofline.tile >= 1


TOGETHER: tuple[Together, ...] = (
    *itertools.chain.from_iterable(_of_section(name) for name in LOOPS),
    Together(
        "finetune.sparsity",
        lambda c: not (c.finetune.sparsity and c.finetune.from_scratch),
        "chooses among trained weights; it does not go with finetune.from_scratch",
    ),
    Together("prune.snapshots", _snapshots_fall, "must decrease from below 1 to above the target's ratio"),
    Together(
        "prune.snapshots",
        lambda c: not c.prune.snapshots or c.prune.mode != "gradual",
        "do not go with prune.mode=gradual, whose models lie too far apart",
    ),
    Together(
        "prune.score.from_training",
        _collects,
        "needs prune.criterion=taylor, plain_first, an interval and a mode that trains: their steps are scored",
    ),
    Together(
        "prune.score.loss",
        lambda c: not c.prune.score.from_training or c.prune.score.loss is None,
        "does not go with score.from_training: the training loss it is",
    ),
    Together(
        "prune.rule",
        lambda c: c.prune.rule != "nvit" or (c.prune.align == "shared" and c.prune.mode == "iterative"),
        'needs prune.align="shared" and prune.mode="iterative", as the released engine works',
    ),
    Together(
        "prune.rule",
        lambda c: c.prune.rule != "nvit" or (set(c.prune.kinds or KINDS) == set(KINDS) and not c.prune.protected),
        "removes every kind from every block; leave prune.kinds and protected as they are",
    ),
    Together(
        "prune.rule",
        lambda c: c.prune.rule != "solve" or c.prune.mode != "iterative",
        "solves for a target; prune.mode=iterative goes a few groups at a time",
    ),
    Together("latency.roofline", _roofline, "set tflops and gbs, both > 0, or none; tile >= 1"),
    Together(
        "latency.table",
        lambda c: not (c.latency.table and c.latency.roofline.tflops is not None),
        "it excludes latency.roofline",
    ),
    Together(
        "augment.crop",
        lambda c: c.augment.crop is not None or not (c.augment.rand_augment or c.augment.color_jitter),
        "augment.rand_augment and color_jitter need it",
    ),
    Together(
        "export.dtypes",
        lambda c: not ("bfloat16" in c.export.dtypes and "onnx" in c.export.formats),
        "ONNX runtimes lack bfloat16; use float16",
    ),
)


def check_config(c: ConfigDict) -> None:
    """UserError for a value that no stage could work with. Called once, before anything runs."""
    values, known = flatten_config(c), list(flatten_config(default_config()))
    for key in values:
        if key not in known:
            raise UserError(f"the config file sets {key!r}, which is no key{nearest(key, known)}")
    if missing := sorted(set(known) - values.keys()):
        raise UserError(f"the config file lacks {missing[0]!r}; start from nvit_jax.run.config.default_config()")
    for key, shape in SHAPES.items():
        if (fault := shape.fault(values[key])) is not None:
            raise UserError(f"config.{key}={_shown(values[key])}: {fault.text}")
    for together in TOGETHER:
        if not together.good(c):
            value = c.latency.roofline.to_dict() if together.key == "latency.roofline" else values[together.key]
            words = together.wrong.format(c=c) or together.words
            raise UserError(f"config.{together.key}={_shown(value)}: {words}")


def _shown(value: Any) -> str:
    text = repr(tuple(value) if isinstance(value, list) else value)
    return text if len(text) <= 200 else f"{text[:150]}...{text[-30:]}"
