"""The demo: 1,797 real 8x8 scans of digits, a 0.3 M ViT pruned to half of its MACs and 0.65 of its latency.

nvit-jax run --config demo --workdir runs/demo         # about 4 minutes on 2 CPU cores
nvit-jax run --config demo:fast --workdir runs/fast    # the same stages, short: to see them run
nvit-jax run --config demo:gradual --workdir runs/gradual    # pruned in three steps, with training between them
"""

from ml_collections import ConfigDict

from nvit_jax.run.config import default_config
from nvit_jax.run.recipes import check_variant


def get_config(variant: str = "") -> ConfigDict:
    check_variant(variant, ("", "fast", "gradual"))
    c = default_config()
    c.vit.update(image=8, patch=2, channels=1, classes=10, embed=64, depth=6, heads=4, mlp=256)
    c.vit.init_std = 0.08
    c.vit.position_std = 0.5

    c.pretrain.epochs = 20.0
    c.pretrain.warmup_epochs = 2.0
    c.pretrain.learning_rate = 1.5e-3
    c.pretrain.dropout = 0.1
    c.pretrain.ema = 0.98
    c.pretrain.save_every = 200

    c.prune.target.macs_ratio = 0.5
    c.prune.target.latency_ratio = 0.65
    c.prune.mode = "one_shot"
    c.prune.score.update(batch=128, batches=8)  # 1,024 images
    c.prune.score.remat = False  # the model is small enough

    c.finetune.epochs = 15.0
    c.finetune.warmup_epochs = 1.0
    c.finetune.learning_rate = 1e-3
    c.finetune.dropout = 0.1
    c.finetune.ema = 0.98
    c.finetune.kl_weight = 40.0
    c.finetune.tau = 2.0
    c.finetune.save_every = 200

    if variant == "fast":
        c.pretrain.epochs = 3.0
        c.latency.update(models=3, repeats=5)
        c.latency.widths.update(embed=2, heads=2, qk=2, v=2, mlp=3)
        c.prune.score.update(batch=64, batches=4)
        c.finetune.epochs = 2.0
    if variant == "gradual":
        c.prune.mode = "gradual"
        c.prune.score.update(batch=256, batches=1)
        c.prune.steps = 3
        c.prune.interval = 40
        c.prune.ema = 0.5
        c.prune.learning_rate = 5e-4
        c.prune.kl_weight = 10.0
        c.prune.log_every = 5
    return c
