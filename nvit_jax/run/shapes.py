"""What every config key may hold. The page docs/reference/config.md prints it."""

import itertools
from collections.abc import Iterator, Sequence

from nvit_jax.data.augmentation import BETA, JITTER
from nvit_jax.formats.export import DTYPES, FORMATS
from nvit_jax.formats.programs import OPSETS, WEIGHTS
from nvit_jax.model.dims import CHOICES, KINDS, PART_KINDS
from nvit_jax.parallel import BACKENDS
from nvit_jax.pruning.loop import METHODS
from nvit_jax.pruning.ranking import ALIGNMENTS, PROFILES, RULES
from nvit_jax.pruning.saliency import SCHEMES
from nvit_jax.pruning.scoring import CRITERIA, LOSSES
from nvit_jax.pruning.sparsity import SPARSITY
from nvit_jax.run.config import STAGES
from nvit_jax.schema import Choice, Each, Flag, Maybe, Number, Place, Shape, Sides, Text, whole

TRAININGS = ("pretrain", "finetune")
LOOPS = ("pretrain", "prune", "finetune")

# Beyond these float32 overflows, or is 0.
POSITIVE, RATIO, AMOUNT = Number(1e-20, 1e6), Number(above=0, most=1), Number(0, 1e30)
TEMPERATURE, SIZE = Number(1e-3, 1e6), Number(above=0, most=1e18)
BELOW_ONE, PART = Number(0, below=1), Number(0, 1)
COUNT, STEPS = whole(1, 10**9), whole(0, 10**9)
BATCH = whole(1, 2**24)
WIDTH = Maybe(whole(most=2**16))  # ViTDims knows how small each may be
GRID = whole(2, 1000, "at least 2: the smallest width and the full one")
PATH = Maybe(Place())


def _in(sections: Sequence[str], *keys: str) -> Iterator[str]:
    return (f"{section}.{key}" for section, key in itertools.product(sections, keys))


_VIT: dict[str, Shape] = {
    "vit.preset": Maybe(Text()),
    **dict.fromkeys(_in(("vit",), "image", "patch"), Maybe(Sides(whole(most=2**16)))),
    **dict.fromkeys(_in(("vit",), "channels", "embed", "depth", "heads", "mlp"), WIDTH),
    **dict.fromkeys(_in(("vit",), "qk", "v", "registers", "pre_logits", "qk_norm_count", "rotary"), WIDTH),
    **dict.fromkeys(_in(("vit",), "rotary_grid", "proj_norm_count", "fc2_norm_count"), WIDTH),
    **dict.fromkeys(_in(("vit",), "pool_heads", "pool_mlp"), WIDTH),
    "vit.classes": Maybe(whole(most=2**24)),
    **dict.fromkeys(_in(("vit",), "cls_token", "dist_token", "layer_scale"), Maybe(Flag())),
    **dict.fromkeys(_in(("vit",), "norm_after_pool", "qkv_bias", "patch_bias", "pre_norm", "gated"), Maybe(Flag())),
    "vit.relative": Maybe(Flag()),
    **{f"vit.{key}": Maybe(Choice(choices)) for key, choices in CHOICES.items()},
    **dict.fromkeys(_in(("vit",), "norm_eps", "rotary_base"), Maybe(POSITIVE)),
    **dict.fromkeys(_in(("vit", "finetune"), "init_std", "position_std"), POSITIVE),
}
_TRAINING: dict[str, Shape] = {
    **dict.fromkeys(_in(LOOPS, "batch"), BATCH),
    **dict.fromkeys(_in(LOOPS, "log_every", "save_every"), COUNT),
    **dict.fromkeys(_in(LOOPS, "accumulate"), Maybe(COUNT)),
    **dict.fromkeys(_in(LOOPS, "remat"), Flag()),
    **dict.fromkeys(_in(LOOPS, "learning_rate", "weight_decay", "label_weight"), AMOUNT),
    **dict.fromkeys(_in(LOOPS, "clip_norm"), Maybe(POSITIVE)),
    **dict.fromkeys(_in(LOOPS, "teacher_tau"), Maybe(TEMPERATURE)),
    **dict.fromkeys(_in(LOOPS, "drop_path"), BELOW_ONE),
    **dict.fromkeys(_in(LOOPS, "teacher"), PATH),
    **dict.fromkeys(_in(LOOPS, "teacher_alpha"), PART),
    **dict.fromkeys(_in(TRAININGS, "epochs"), Number(above=0, most=1e6)),
    **dict.fromkeys(_in(TRAININGS, "warmup_epochs"), Number(0, 1e6)),
    **dict.fromkeys(_in(TRAININGS, "final_learning_rate"), AMOUNT),
    **dict.fromkeys(_in(TRAININGS, "learning_rate_batch"), Maybe(COUNT)),
    **dict.fromkeys(_in(TRAININGS, "ema", "dropout", "smoothing"), BELOW_ONE),
    **dict.fromkeys(_in(TRAININGS, "eval_every"), STEPS),
    **dict.fromkeys(_in(TRAININGS, "keep"), Choice(("last", "best"))),
    **dict.fromkeys(_in(("prune", "finetune"), "kl_weight"), Number(0, 1e9)),
    **dict.fromkeys(_in(("prune", "finetune"), "tau"), TEMPERATURE),
    "pretrain.start": PATH,
    "finetune.snapshot": Maybe(RATIO),
    "finetune.sparsity": Maybe(Choice(SPARSITY)),
    "finetune.from_scratch": Flag(),
}
_PRUNING: dict[str, Shape] = {
    "prune.criterion": Maybe(Choice(CRITERIA)),
    "prune.mode": Choice(METHODS),
    **dict.fromkeys(_in(("prune",), "steps", "groups_per_step", "eval_images"), COUNT),
    "prune.interval": STEPS,
    "prune.ema": BELOW_ONE,
    "prune.score.loss": Maybe(Choice(tuple(name for name in LOSSES if name != "own"))),
    "prune.score.scheme": Choice(SCHEMES),
    **dict.fromkeys(_in(("prune.score",), "batch", "batches", "chunk", "probes"), COUNT),
    "prune.score.from_training": Flag(),
    "prune.score.remat": Maybe(Flag()),
    "prune.rule": Maybe(Choice(RULES)),
    "prune.eta": AMOUNT,
    **dict.fromkeys(_in(("prune",), "reset_scores", "plain_first"), Flag()),
    "prune.align": Choice(ALIGNMENTS),
    "prune.profile": Choice(tuple(PROFILES)),
    "prune.kinds": Maybe(Each(Choice(KINDS), "unknown kind ", empty=f"nothing may go; choose of {', '.join(KINDS)}")),
    "prune.compensate": Maybe(Flag()),
    "prune.protected": Each(whole(0), every="must be numbers of blocks, from 0"),
    **{f"prune.floors.{kind}": STEPS if kind in PART_KINDS else COUNT for kind in KINDS},
    **dict.fromkeys(_in(("prune.target",), "latency_ratio", "macs_ratio", "params_ratio"), Maybe(RATIO)),
    **dict.fromkeys(_in(("prune.target",), "latency_ms", "macs", "params"), Maybe(SIZE)),
    "prune.snapshots": Each(Number(), every="must decrease from below 1 to above the target's ratio"),
}
SHAPES: dict[str, Shape] = {
    "profile": STEPS,
    "seed": whole(0, 2**32 - 1, "from 0 to 2**32 - 1"),
    "stages": Each(Choice(STAGES), "unknown stage ", empty=f"nothing to do; choose of {', '.join(STAGES)}"),
    "compare": Each(Choice(CRITERIA)),
    "model": PATH,
    "parallel": Choice(BACKENDS),
    "dtype": Choice(("float32", "bfloat16")),
    "matmul_precision": Maybe(Choice(("default", "bfloat16", "tensorfloat32", "float32", "high", "highest"))),
    **_VIT,
    "data.name": Text('"digits", "npz", "folder" or "tfds:SET"'),
    "data.path": PATH,
    **dict.fromkeys(_in(("data",), "train", "val", "classes"), PATH),
    "data.holdout": Maybe(Number(above=0, below=1)),
    "data.workers": whole(0, 256),
    "data.threads": Maybe(whole(1, 1024)),
    "data.max_bad_fraction": BELOW_ONE,
    "augment.crop": Maybe(RATIO),
    **dict.fromkeys(_in(("augment",), "flip", "erasing", "switch"), PART),
    **dict.fromkeys(_in(("augment",), "mixup", "cutmix"), BETA),
    "augment.color_jitter": JITTER,
    **dict.fromkeys(_in(("augment",), "repeats", "mixup_shards"), COUNT),
    "augment.rand_augment": Maybe(Text()),
    "augment.fast_decode": Flag(),
    **_TRAINING,
    **_PRUNING,
    "latency.table": PATH,
    **dict.fromkeys(_in(("latency.roofline",), "tflops", "gbs"), Maybe(Number(1e-9, 1e12))),
    "latency.roofline.tile": whole(most=2**16),
    "latency.batch": BATCH,
    **dict.fromkeys(_in(("latency.widths",), "embed", "heads", "qk", "v", "mlp"), GRID),
    "latency.models": whole(0, 1000),
    "latency.repeats": whole(1, 10**6),
    "eval.batch": BATCH,
    **dict.fromkeys(_in(("eval",), "neighbours", "database"), COUNT),
    "eval.split": Choice(("train", "val", "test")),
    "export.formats": Each(Choice(tuple(FORMATS)), empty=f"nothing to write; choose of {', '.join(FORMATS)}"),
    "export.dtypes": Each(Choice(DTYPES), empty=f"nothing to write; choose of {', '.join(DTYPES)}"),
    "export.opset": whole(*OPSETS),
    "export.weights": Choice(WEIGHTS),
}
