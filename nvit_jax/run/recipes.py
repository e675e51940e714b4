"""What several built-in configs share: NViT's pruning loop and finetuning, ReViT's training, and the check of variants.

The expected times in the headers of configs/nvit_*.py and revit_*.py are computed, not measured. A training step costs
6 operations a MAC of the trained model and 2 of a teacher (DeiT-B 17.6 G, RegNetY-16GF 15.9 G); an H100 does 40 % of
its 989 TFLOP/s in bfloat16. Finetuning to NViT-B: 300 * 1.28 M images * (6 * 6.8 + 2 * 33.5) GFLOP = 29 hours. Between
two prunings lie 100 steps of 512, 22 s, whose gradients score; there are 2,616 runs of units, two go at a time, and
half to all of 1,308 prunings are needed: 4 to 8 hours, and an assumed 3 s of each to evaluate and save. Reading 520
augmented images a second and core, 8 GPUs that prune want 36 cores, that finetune to NViT-B 57.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from nvit_jax.errors import UserError, nearest
from nvit_jax.run.config import default_config


def check_variant(variant: str, known: Sequence[str]) -> None:
    """UserError, with the nearest one, for a variant that a config does not know. "" is a config without one."""
    if variant not in known:
        names = [name for name in known if name]
        raise UserError(f"unknown variant {variant!r}{nearest(variant, names)} (known: {', '.join(names)})")


def _deit(c: ConfigDict) -> None:
    """DeiT's augmentation, as its code trains with by default (and NViT's, which builds on it)."""
    c.augment.update(crop=0.08, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, repeats=3)
    c.augment.mixup_shards = 32  # as the paper's 32 GPUs; a multiple of the devices, or images travel between them
    c.data.workers = 8  # of each host; 0 is enough for fewer than 8 cores


def nvit(ratios: tuple[float, ...], variant: str = "") -> ConfigDict:
    """Prune to the last of the latency ratios, with snapshots at the others. Variant: tiny."""
    check_variant(variant, ("", "tiny"))
    c = default_config()
    c.stages = ("latency", "prune", "finetune", "eval", "report")
    c.data.name = "folder"
    c.dtype = "bfloat16"
    c.eval.split = "val"
    _deit(c)

    c.prune.update(criterion="taylor", align="shared", profile="nvit", rule="nvit", eta=5e-4)
    c.prune.update(mode="iterative", interval=100, groups_per_step=2, ema=0.9, reset_scores=True)
    c.prune.score.from_training = True
    c.prune.update(batch=512, learning_rate=1e-4, drop_path=0.1)
    c.prune.update(label_weight=1.0, teacher_alpha=0.5, kl_weight=1e5, tau=3.0, plain_first=True)
    c.prune.snapshots = ratios[:-1]
    c.prune.target.latency_ratio = ratios[-1]

    f = c.finetune
    f.update(epochs=300.0, batch=4608, learning_rate=2e-4, learning_rate_batch=512, final_learning_rate=1e-5)
    f.update(weight_decay=0.05, ema=0.99996, smoothing=0.1, drop_path=0.0)
    f.update(label_weight=1.0, teacher_alpha=0.5, kl_weight=1e5, tau=20.0)
    f.update(eval_every=1400, save_every=280)  # five epochs, one epoch
    if variant == "tiny":
        _tiny(c)
    return c


def revit(preset: str, variant: str = "") -> ConfigDict:
    """Train redistributed dims from random weights, by DeiT's recipe. Variant: tiny."""
    check_variant(variant, ("", "tiny"))
    c = default_config()
    c.stages = ("pretrain", "eval", "report")
    c.data.name = "folder"
    c.dtype = "bfloat16"
    c.eval.split = "val"
    c.vit.preset = preset
    _deit(c)
    p = c.pretrain
    p.update(epochs=300.0, batch=1024, learning_rate=5e-4, learning_rate_batch=512, final_learning_rate=1e-5)
    p.update(warmup_epochs=5.0, weight_decay=0.05, ema=0.99996, smoothing=0.1, drop_path=0.1)
    p.update(eval_every=6260, save_every=1250)
    if variant == "tiny":
        _plain(c)
        c.data.name, c.dtype, c.eval.split = "digits", "float32", "test"
        c.vit.update(image=8, patch=4, channels=1, classes=10)
        p.update(epochs=0.2, batch=32, warmup_epochs=0.1)
        c.eval.batch = 32
        c.latency.update(batch=8, repeats=2)
    return c


def _plain(c: ConfigDict) -> None:
    """The digits are no photographs."""
    c.augment.update(crop=None, rand_augment=None, erasing=0.0, mixup=0.0, cutmix=0.0, repeats=1, mixup_shards=1)
    c.data.workers = 0


def _tiny(c: ConfigDict) -> None:
    """The same loop on the digits: a narrow distilled ViT of this run's own, less of the way down, no CNN."""
    c.stages = ("pretrain", *c.stages)
    _plain(c)
    c.data.name, c.dtype, c.eval.split = "digits", "float32", "test"
    c.vit.update(image=8, patch=4, channels=1, classes=10, embed=64, depth=2, heads=4, mlp=128, dist_token=True)
    c.vit.update(init_std=0.1, position_std=0.5)
    c.latency.update(batch=256, models=3, repeats=3)
    c.latency.widths.update(embed=2, heads=2, qk=2, v=2, mlp=3)
    c.pretrain.update(epochs=1.0, learning_rate=3e-3)
    c.prune.update(interval=1, groups_per_step=1, batch=32, teacher_alpha=0.0, kl_weight=10.0)
    c.prune.snapshots = tuple(round(0.6 + 0.4 * r, 3) for r in c.prune.snapshots)
    c.prune.target.latency_ratio = round(0.6 + 0.4 * c.prune.target.latency_ratio, 3)
    c.finetune.update(epochs=0.5, batch=32, teacher_alpha=0.0, kl_weight=10.0, tau=2.0, ema=0.9)
