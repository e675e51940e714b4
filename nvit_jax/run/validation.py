"""What a config may say, as two tables: the values of single keys, and the keys that must go together."""

import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nvit_jax.errors import UserError, nearest
from nvit_jax.formats.export import DTYPES, FORMATS
from nvit_jax.model.dims import KINDS
from nvit_jax.parallel import BACKENDS
from nvit_jax.pruning.loop import METHODS
from nvit_jax.pruning.ranking import ALIGNMENTS, PROFILES, RULES
from nvit_jax.pruning.saliency import SCHEMES
from nvit_jax.pruning.scoring import CRITERIA, LOSSES
from nvit_jax.pruning.sparsity import SPARSITY
from nvit_jax.run.config import STAGES, default_config, flatten_config

_TRAININGS = ("pretrain", "finetune")
_LOOPS = ("pretrain", "prune", "finetune")


class Values(NamedTuple):
    """What a key may hold."""

    good: Callable[[Any], bool]
    words: str | Callable[[Any], str]  # what is wrong, of a value that is not good


def one_of(choices: Sequence[Any]) -> Values:
    """One of these."""
    return Values(lambda v: v in choices, f"must be one of {', '.join(map(str, choices))}")


def each_of(choices: Sequence[str], empty: str | None = None, what: str = "") -> Values:
    """A sequence of these; `empty` says what is wrong with none, `what` they are called."""

    def words(value: Any) -> str:
        unknown = [x for x in value if x not in choices]
        if not unknown:
            return f"{empty}; choose of {', '.join(choices)}"
        return f"{what}{unknown[0]!r} is not one of {', '.join(choices)}{nearest(str(unknown[0]), choices)}"

    return Values(lambda v: (empty is None or len(v) > 0) and all(x in choices for x in v), words)


def unset_or(values: Values) -> Values:
    """The same, or None."""
    return Values(lambda v: v is None or values.good(v), values.words)


def at_least(least: float) -> Values:
    """A number from there on."""
    return Values(lambda v: v >= least, f"must be >= {least:g}")


POSITIVE = Values(lambda v: v > 0, "must be > 0")
BELOW_ONE = Values(lambda v: 0 <= v < 1, "must be in [0, 1)")
PART = Values(lambda v: 0 <= v <= 1, "must be in [0, 1]")
RATIO = Values(lambda v: 0 < v <= 1, "must be in (0, 1]")


def _in(sections: Sequence[str], *keys: str) -> Iterator[str]:
    return (f"{section}.{key}" for section, key in itertools.product(sections, keys))


VALUES: dict[str, Values] = {
    "seed": Values(lambda v: 0 <= v < 2**32, "must be from 0 to 2**32 - 1"),
    "stages": each_of(STAGES, "nothing to do", "unknown stage "),
    "dtype": Values(lambda v: v in ("float32", "bfloat16"), 'must be "float32" or "bfloat16"'),
    "matmul_precision": Values(
        lambda v: v in (None, "default", "high", "highest", "bfloat16", "tensorfloat32", "float32"),
        "must be default, bfloat16, tensorfloat32 or float32",
    ),
    "parallel": one_of(BACKENDS),
    "compare": each_of(CRITERIA),
    "eval.split": one_of(("train", "val", "test")),
    "eval.batch": POSITIVE,
    "data.holdout": unset_or(Values(lambda v: 0 < v < 1, "must be between 0 and 1")),
    "data.workers": at_least(0),
    "data.threads": unset_or(POSITIVE),
    "data.max_bad_fraction": BELOW_ONE,
    "augment.crop": unset_or(RATIO),
    **dict.fromkeys(_in(("augment",), "flip", "erasing", "switch"), PART),
    **dict.fromkeys(_in(("augment",), "mixup", "cutmix", "color_jitter"), at_least(0)),
    **dict.fromkeys(_in(("augment",), "repeats", "mixup_shards"), at_least(1)),
    **dict.fromkeys(_in(_LOOPS, "batch", "log_every", "save_every"), POSITIVE),
    **dict.fromkeys(_in(_LOOPS, "learning_rate", "weight_decay"), at_least(0)),
    **dict.fromkeys(_in(_LOOPS, "clip_norm", "teacher_tau"), unset_or(POSITIVE)),
    **dict.fromkeys(_in(_LOOPS, "drop_path"), BELOW_ONE),
    **dict.fromkeys(_in(_LOOPS, "accumulate"), at_least(1)),
    **dict.fromkeys(_in(_LOOPS, "teacher_alpha"), PART),
    **dict.fromkeys(_in(_TRAININGS, "epochs"), POSITIVE),
    **dict.fromkeys(_in(_TRAININGS, "warmup_epochs"), at_least(0)),
    **dict.fromkeys(_in(_TRAININGS, "ema", "dropout", "smoothing"), BELOW_ONE),
    **dict.fromkeys(_in(_TRAININGS, "learning_rate_batch"), unset_or(POSITIVE)),
    **dict.fromkeys(_in(_TRAININGS, "keep"), Values(lambda v: v in ("last", "best"), "must be last or best")),
    **dict.fromkeys(("prune.tau", "finetune.tau"), POSITIVE),
    "finetune.sparsity": one_of((None, *SPARSITY)),
    "prune.protected": Values(
        lambda v: all(isinstance(x, int) and x >= 0 for x in v), "must be numbers of blocks, from 0"
    ),
    "prune.ema": BELOW_ONE,
    "prune.interval": at_least(0),
    "prune.steps": at_least(1),
    "prune.groups_per_step": at_least(1),
    **dict.fromkeys((f"prune.floors.{kind}" for kind in KINDS), at_least(1)),
    "prune.criterion": unset_or(one_of(CRITERIA)),
    "prune.mode": one_of(METHODS),
    "prune.rule": unset_or(one_of(RULES)),
    "prune.align": one_of(ALIGNMENTS),
    "prune.profile": one_of(tuple(PROFILES)),
    "prune.score.loss": one_of((None, *(name for name in LOSSES if name != "own"))),
    "prune.score.scheme": one_of(SCHEMES),
    "prune.eta": at_least(0),
    **dict.fromkeys(_in(("prune.target",), "latency_ratio", "macs_ratio", "params_ratio"), unset_or(RATIO)),
    **dict.fromkeys(_in(("prune.target",), "latency_ms", "macs", "params"), unset_or(POSITIVE)),
    **dict.fromkeys(_in(("prune.score",), "batch", "batches", "chunk", "probes"), POSITIVE),
    "prune.eval_images": POSITIVE,
    **dict.fromkeys(_in(("latency",), "batch", "repeats"), POSITIVE),
    "latency.models": at_least(0),
    **dict.fromkeys(
        _in(("latency.widths",), "embed", "heads", "qk", "v", "mlp"),
        Values(lambda v: v >= 2, "must be at least 2: the smallest width and the full one"),
    ),
    "export.formats": each_of(tuple(FORMATS), "nothing to write"),
    "export.dtypes": each_of(DTYPES, "nothing to write"),
}


class Together(NamedTuple):
    """Keys that must go together; `words` say what `key` lacks."""

    key: str
    good: Callable[[ConfigDict], bool]
    words: str | Callable[[ConfigDict], str]


def _of_section(name: str) -> Iterator[Together]:
    """What holds for each training section."""
    yield Together(
        f"{name}.accumulate",
        lambda c: c[name].batch % c[name].accumulate == 0,
        lambda c: f"does not divide batch={c[name].batch}",
    )
    yield Together(
        f"{name}.teacher_alpha",
        lambda c: (c[name].teacher_alpha > 0) == bool(c[name].teacher),
        f"goes with config.{name}.teacher; set both or none",
    )
    yield Together(
        "augment.mixup_shards",
        lambda c: c[name].batch % c.augment.mixup_shards == 0,
        lambda c: f"does not divide {name}.batch={c[name].batch}",
    )
    if name in _TRAININGS:
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
    *itertools.chain.from_iterable(_of_section(name) for name in _LOOPS),
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
    values, known = flatten_config(c), flatten_config(default_config()).keys()
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0)[0]
            raise UserError(f"the config file sets {key!r}, which is no key; did you mean {near!r}?")
    if missing := sorted(known - values.keys()):
        raise UserError(f"the config file lacks {missing[0]!r}; start from nvit_jax.run.config.default_config()")
    for key, rule in VALUES.items():
        if not rule.good(values[key]):
            words = rule.words if isinstance(rule.words, str) else rule.words(values[key])
            raise UserError(f"config.{key}={_shown(values[key])}: {words}")
    for together in TOGETHER:
        if not together.good(c):
            value = c.latency.roofline.to_dict() if together.key == "latency.roofline" else values[together.key]
            words = together.words if isinstance(together.words, str) else together.words(c)
            raise UserError(f"config.{together.key}={_shown(value)}: {words}")


def _shown(value: Any) -> str:
    return repr(tuple(value) if isinstance(value, list) else value)
