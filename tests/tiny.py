"""A run of seconds: every stage on the digits with a model of two narrow blocks."""

from nvit_jax.run.config import default_config


def get_config():
    c = default_config()
    c.vit.update(image=8, patch=4, channels=1, classes=10, embed=32, depth=2, heads=2, mlp=64)
    c.vit.init_std = 0.1
    c.vit.position_std = 0.5
    for section in (c.pretrain, c.finetune):
        section.update(epochs=2.0, learning_rate=3e-3, log_every=5, eval_every=10, save_every=7)
    c.latency.update(batch=32, models=3, repeats=3)
    c.latency.widths.update(embed=2, heads=2, qk=2, v=2, mlp=3)
    c.prune.update(steps=3, interval=6, learning_rate=1e-3, kl_weight=10.0, log_every=4, save_every=5, ema=0.5)
    c.prune.criterion = "hvp"
    c.prune.score.update(batch=64, probes=1)
    c.prune.floors.update(embed=4, qk=2, v=2, mlp=4)
    c.prune.target.macs_ratio = 0.7
    c.finetune.update(kl_weight=10.0, tau=2.0, ema=0.9, drop_path=0.1)
    return c
