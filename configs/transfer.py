"""A pretrained ViT on another data set: fine-tuned to it, pruned to half of its latency, distilled, evaluated.

nvit-jax convert deit_tiny_patch16_224.pth deit_tiny_10 --classes 10
nvit-jax run --config transfer:cifar10 --workdir runs/cifar10 --config.pretrain.start=deit_tiny_10

:cifar10, :cifar100, :inat18 are read from tensorflow-datasets (prepared once; the run says how), :inat19 from folders
(--config.data.path=ROOT with train/ and val/). CIFAR-10 as folders: --config.data.name=folder
--config.data.train=ROOT/train --config.data.val=ROOT/test. By another criterion: --config.prune.criterion=magnitude and
another workdir, into which pretrain/ and latency/ are copied.
Hardware: one GPU for CIFAR, several for iNaturalist. Ours: not run; rehearsed on a CPU with 400 images and a few steps.
"""

from ml_collections import ConfigDict

from nvit_jax.run.config import default_config
from nvit_jax.run.recipes import check_variant

SETS = {"cifar10": "tfds:cifar10", "cifar100": "tfds:cifar100", "inat18": "tfds:i_naturalist2018", "inat19": "folder"}


def get_config(variant: str = "cifar10") -> ConfigDict:
    check_variant(variant, tuple(SETS))
    c = default_config()
    c.data.name = SETS[variant]
    c.eval.split = "val"
    c.dtype = "bfloat16"
    c.augment.update(crop=0.08, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0)

    small = variant.startswith("cifar")
    c.pretrain.update(epochs=10.0 if small else 100.0, batch=256, warmup_epochs=1.0, smoothing=0.1, drop_path=0.1)
    c.pretrain.update(learning_rate=5e-5, learning_rate_batch=512, ema=0.999, eval_every=200 if small else 1700)

    c.prune.update(mode="iterative", interval=20, groups_per_step=24, ema=0.9, batch=256, profile="gpu")
    c.prune.update(learning_rate=5e-5, kl_weight=1e3, tau=3.0)
    c.prune.target.latency_ratio = 0.5

    c.finetune.update(epochs=20.0 if small else 100.0, batch=256, warmup_epochs=1.0, smoothing=0.1, ema=0.999)
    c.finetune.update(learning_rate=1e-4, learning_rate_batch=512, kl_weight=1e3, tau=20.0)
    c.finetune.eval_every = c.pretrain.eval_every
    return c
