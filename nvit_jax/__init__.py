"""nvit_jax: global structural pruning of Vision Transformers with Hessian-aware saliency, in JAX and Flax.

import nvit_jax as nvit

model = nvit.load("deit_tiny_patch16_224.pth")
found = nvit.prune(model, (images, labels), macs=0.6)
small = nvit.finetune(found.model, (images, labels), teacher=model, epochs=10)
nvit.evaluate(small, (test_images, test_labels))
small.save("small")
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.7.0"

if TYPE_CHECKING:
    from nvit_jax.api.basis import rotate as rotate
    from nvit_jax.api.basis import to_rmsnorm as to_rmsnorm
    from nvit_jax.api.benchmark import benchmark as benchmark
    from nvit_jax.api.benchmark import measure_latency as measure_latency
    from nvit_jax.api.data import load_dataset as load_dataset
    from nvit_jax.api.evaluate import evaluate as evaluate
    from nvit_jax.api.export import export as export
    from nvit_jax.api.export import save as save
    from nvit_jax.api.finetune import finetune as finetune
    from nvit_jax.api.models import convert as convert
    from nvit_jax.api.models import load as load
    from nvit_jax.api.models import load_classifier as load_classifier
    from nvit_jax.api.models import reshape as reshape
    from nvit_jax.api.prune import prune as prune
    from nvit_jax.api.pruner import Pruned as Pruned
    from nvit_jax.api.recipe import Recipe as Recipe
    from nvit_jax.api.saliency import rank as rank
    from nvit_jax.api.saliency import saliency as saliency
    from nvit_jax.api.targets import Choice as Choice
    from nvit_jax.data.augmentation import Augment as Augment
    from nvit_jax.errors import UserError as UserError
    from nvit_jax.latency.roofline import Roofline as Roofline
    from nvit_jax.latency.table import LatencyTable as LatencyTable
    from nvit_jax.latency.timing import Measurement as Measurement
    from nvit_jax.model.dims import Units as Units
    from nvit_jax.model.dims import ViTDims as ViTDims
    from nvit_jax.model.dims import preset as preset
    from nvit_jax.model.directory import Model as Model
    from nvit_jax.model.directory import load_model as load_model
    from nvit_jax.model.directory import save_model as save_model
    from nvit_jax.pruning.loop import Plan as Plan
    from nvit_jax.pruning.scoring import Scoring as Scoring
    from nvit_jax.training.losses import Objective as Objective
else:
    # Where each name comes from; tests/test_front.py holds this to the imports above. They are made at the first use of
    # a name: `nvit-jax --help` must not wait for JAX.
    _HOMES = {
        "data.augmentation": ("Augment",),
        "errors": ("UserError",),
        "latency.roofline": ("Roofline",),
        "latency.table": ("LatencyTable",),
        "latency.timing": ("Measurement",),
        "api.basis": ("rotate", "to_rmsnorm"),
        "api.benchmark": ("benchmark", "measure_latency"),
        "api.data": ("load_dataset",),
        "api.evaluate": ("evaluate",),
        "api.export": ("export", "save"),
        "api.finetune": ("finetune",),
        "api.models": ("convert", "load", "load_classifier", "reshape"),
        "api.prune": ("prune",),
        "api.pruner": ("Pruned",),
        "api.recipe": ("Recipe",),
        "api.saliency": ("rank", "saliency"),
        "api.targets": ("Choice",),
        "model.dims": ("Units", "ViTDims", "preset"),
        "model.directory": ("Model", "load_model", "save_model"),
        "pruning.loop": ("Plan",),
        "pruning.scoring": ("Scoring",),
        "training.losses": ("Objective",),
    }

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(f"nvit_jax.{home}"), name)
                return value
        raise AttributeError(f"module 'nvit_jax' has no attribute {name!r}")


__all__ = [
    "Augment",
    "Choice",
    "LatencyTable",
    "Measurement",
    "Model",
    "Objective",
    "Plan",
    "Pruned",
    "Recipe",
    "Roofline",
    "Scoring",
    "Units",
    "UserError",
    "ViTDims",
    "__version__",
    "benchmark",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "load",
    "load_classifier",
    "load_dataset",
    "load_model",
    "measure_latency",
    "preset",
    "prune",
    "rank",
    "reshape",
    "rotate",
    "saliency",
    "save",
    "save_model",
    "to_rmsnorm",
]


def __dir__() -> list[str]:
    return __all__
