"""NViT-B: DeiT-B distilled pruned to 0.54 of its latency by the released criterion, then finetuned (CVPR 2023).

nvit-jax convert deit_base_distilled_patch16_224-df68dfff.pth deit_b
nvit-jax convert regnety_160-a5fe301d.pth regnety_160
nvit-jax run --config nvit_b --workdir runs/nvit_b --config.model=deit_b \
    --config.prune.teacher=regnety_160 --config.finetune.teacher=regnety_160 --config.data.path=imagenet \
    --config.data.classes=imagenet.tsv [--config.latency.table=latency_head.json]

Hardware of the paper: 4 V100 to prune (global batch 512), 32 V100 to finetune (global batch 4,608).
Expected time, computed (nvit_jax/run/recipes.py says how): pruning 5 to 9 h on one H100 (8: 1 to 2 h),
finetuning 29 h (8: 3.6 h).
Without latency.table the latency stage measures this device; the published ratios are the V100 table's.
Published: 34 M parameters, 6.8 GFLOPs, 1.86x on V100, top-1 83.29 %.
Ours: not run.

:tiny is a twin of seconds on the digits, for the tests.
"""

from ml_collections import ConfigDict

from nvit_jax.run.recipes import nvit


def get_config(variant: str = "") -> ConfigDict:
    return nvit((0.54,), variant)
