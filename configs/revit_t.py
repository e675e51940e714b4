"""ReViT-T: NViT's redistributed widths at embed 176, trained from random weights (CVPR 2023, table 7).

nvit-jax run --config revit_t --workdir runs/revit_t --config.data.path=imagenet \
    --config.data.classes=imagenet.tsv

Hardware: 8 GPUs or more (global batch 1,024). Expected time, computed (nvit_jax/run/recipes.py says how): 3 h on one
H100 if its host reads that fast (16 cores: 13 h).
Published: 5.9 M parameters, 1.3 GFLOPs, top-1 74.20 % (DeiT-T 72.84 %).
Ours: not run. With a CNN teacher: --config.pretrain.teacher=regnety_160 --config.pretrain.teacher_alpha=0.5.

:tiny is a twin of seconds on the digits, for the tests.
"""

from ml_collections import ConfigDict

from nvit_jax.run.recipes import revit


def get_config(variant: str = "") -> ConfigDict:
    return revit("revit_t", variant)
