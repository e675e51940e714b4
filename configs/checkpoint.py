"""A checkpoint of your own and your own image folders: evaluate it, prune it in one shot, evaluate the result.

nvit-jax convert deit_tiny_patch16_224.pth MODEL_DIR
nvit-jax run --config checkpoint --workdir W --config.model=MODEL_DIR --config.data.train=DIR \
    --config.data.val=DIR --config.data.classes=FILE.tsv --config.prune.target.macs_ratio=0.8

DIR/class/image.JPEG; FILE.tsv names one class folder a line, in the order of the model's labels. One folder for
both: --config.data.holdout=0.5 instead of data.val. Finetuning: --stage finetune, then --stage eval.
The short way to the same: nvit-jax prune deit_tiny_patch16_224.pth --data DIR --val DIR --macs 0.8 --out W.
Nothing trains; the criterion obs chooses, and the weights that stay are fitted anew. To only cut, by fisher:
--config.prune.criterion=fisher --config.prune.rule=per_cost --config.prune.compensate=False.
Hardware: anything; DeiT-T with 500 images takes about 10 minutes on 2 CPU cores.
"""

from ml_collections import ConfigDict

from nvit_jax.run.config import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.stages = ("eval", "prune", "eval", "report")
    c.data.name = "folder"
    c.eval.split = "val"
    c.eval.batch = 32
    c.latency.batch = 32
    c.latency.repeats = 9

    c.prune.mode = "one_shot"
    c.prune.score.batch = 16
    c.prune.score.batches = 64  # 1,024 images, or all that there are
    c.prune.score.scheme = "kind"  # hvp, obd: 5 products a batch; finer schemes cost hours at this size
    c.prune.batch = 32

    c.finetune.epochs = 30.0
    c.finetune.warmup_epochs = 1.0
    c.finetune.learning_rate = 1e-4
    c.finetune.kl_weight = 1e5
    return c
