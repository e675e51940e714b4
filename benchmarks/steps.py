"""Steps as the stages run them, on one batch in the host's memory: training, scoring, and PyTorch's plain training."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import models, rivals
from benchmarks.timing import Call
from nvit_jax.api.recipe import Recipe
from nvit_jax.api.trainer import Trainer
from nvit_jax.data.feed import Draws, make_feed
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.model.masks import full_masks
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.model.regnet import RegNet, RegNetDims, regnet_shapes
from nvit_jax.pruning import saliency
from nvit_jax.pruning.scoring import Scoring, make_score_step
from nvit_jax.training import distill, optim
from nvit_jax.training.losses import Objective
from nvit_jax.training.monitor import Monitor

NVIT_TEACHERS = Objective(kl_weight=1e5, tau=20.0, kl_per_head=True, teacher_alpha=0.5)  # those of NViT's finetuning
_CNN = RegNetDims()  # NViT's teacher


def preprocessing(dims: ViTDims) -> Preprocessing:
    """ImageNet's, whatever the number of channels."""
    grey = (0.45,) * dims.channels
    return Preprocessing(size=dims.image, scale=255.0, mean=grey, std=(0.225,) * dims.channels)


def cnn(dims: ViTDims, *, tiny: bool) -> RegNet:
    """A CNN teacher with random weights."""
    small = RegNetDims(widths=(8,), depths=(1,), group=8, stem=8, classes=dims.classes, channels=dims.channels)
    found = small if tiny else _CNN
    rng = np.random.default_rng(0)
    return RegNet(found, jax.tree.map(lambda s: np.abs(0.02 * rng.standard_normal(s.shape, np.float32)),
                                      regnet_shapes(found)))  # fmt: skip


def _trainer(dims: ViTDims, batch: int, recipe: Recipe, teacher: Model | None) -> tuple[Trainer, Any]:
    """The trainer, and a batch as its reader gives it."""
    arrays = models.random_batch(dims, batch)
    trainer = Trainer(dims, make_feed(arrays, dims, preprocessing(dims)), recipe, teacher, Monitor())
    with trainer.reader() as reader:
        return trainer, reader(0)


def training(
    dims: ViTDims,
    batch: int,
    *,
    dtype: str = "float32",
    teachers: bool = False,
    masked: bool = False,
    collects: bool = False,
    tiny: bool = False,
    **changes: Any,
) -> Call:
    """A training step on the device, and the way of a batch to it.

    teachers: finetuning with both of NViT's. masked: between prunings. collects: with `taylor` scored from its
    gradients. `changes` are fields of the Recipe.
    """
    if teachers:
        changes |= {"objective": NVIT_TEACHERS, "label_teacher": cnn(dims, tiny=tiny)}
    recipe = Recipe(batch=batch, dtype=dtype, **changes)
    params = models.random_params(dims)
    trainer, host = _trainer(dims, batch, recipe, Model(dims, params) if teachers else None)
    optimizer = recipe.make_optimizer(recipe.learning_rate)
    masks = full_masks(dims) if masked else None
    if collects:
        criterion = functools.partial(saliency.taylor_of, align="per_head")
        optimizer = optim.collecting(optimizer, criterion, full_masks(dims))
    step = trainer.compiled(optimizer)
    kept = [trainer.parallel.begin(distill.new_state(params, optimizer, 0, masks=masks))]

    def call() -> Any:
        kept[0], metrics = step(kept[0], host)
        return jax.block_until_ready((kept[0], metrics))

    return call


def scoring(
    dims: ViTDims, images: np.ndarray, labels: np.ndarray, batch: int, chosen: Scoring, accumulate: int | None = None
) -> Callable[[int], Any]:
    """Scores of batch number i of these images, as of an unpruned model, on the host in the end."""
    params = models.random_params(dims)
    recipe = Recipe(batch=batch)
    trainer = Trainer(
        dims, make_feed((images, labels), dims, preprocessing(dims)), recipe, Model(dims, params), Monitor()
    )
    optimizer = recipe.make_optimizer(recipe.learning_rate)
    step = trainer.compiled_plain(
        make_score_step(dims, chosen, Objective(), unpruned=True, accumulate=accumulate, parallel=trainer.parallel)
    )
    state = trainer.parallel.place(distill.new_state(params, optimizer, 0, masks=full_masks(dims)))
    inputs = trainer.inputs(state)
    with contextlib.closing(trainer.feed.reader(Draws(batch, (0,), trainer.parallel))) as reader:
        batches = [reader(i) for i in range(max(1, len(labels) // batch))]

    def call(number: int = 0) -> Units:
        found = step(inputs, trainer.parallel.shard(batches[number % len(batches)]))
        return jax.tree.map(np.asarray, found)

    return call


# --------------------------------------------------------------------------------------------------- PyTorch


def torch_images(dims: ViTDims, images: np.ndarray) -> Any:
    """uint8 [B, s, s, c] in the host's memory -> normalised on the device, as our steps do it."""
    torch = rivals.import_torch()
    x = torch.from_numpy(images).to(rivals.torch_device()).permute(0, 3, 1, 2).float()
    return (x / 255.0 - 0.45) / 0.225


def torch_training(dims: ViTDims, batch: int, *, how: str = "eager", dtype: str = "float32") -> Call:
    """A plain training step: cross-entropy, fused AdamW, autocast for bfloat16."""
    torch = rivals.import_torch()
    module = rivals.torch_model(dims, models.random_params(dims), how).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-4, weight_decay=0.05, fused=True)
    images, labels = models.random_batch(dims, batch)
    device, target = rivals.torch_device(), torch.from_numpy(labels.astype(np.int64))

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = module(torch_images(dims, images))
            loss = torch.nn.functional.cross_entropy(logits.float(), target.to(device))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return call


def torch_scoring(dims: ViTDims, images: np.ndarray, labels: np.ndarray, batch: int, name: str) -> Callable[[int], Any]:
    """What Torch-Pruning needs of batch number i: "taylor" a gradient of it, "hessian" one of each of its images."""
    torch = rivals.import_torch()
    module = rivals.torch_model(dims, models.random_params(dims)).eval()
    accumulate = _accumulate_squares(module) if name == "hessian" else None

    def call(number: int = 0) -> None:
        start = number % max(1, len(labels) // batch) * batch
        x = torch_images(dims, images[start : start + batch])
        y = torch.from_numpy(labels[start : start + batch].astype(np.int64)).to(x.device)
        if accumulate is None:
            torch.nn.functional.cross_entropy(module(x), y).backward()
        else:
            for image, label in zip(x, y, strict=True):
                module.zero_grad()
                torch.nn.functional.cross_entropy(module(image[None]), label[None]).backward()
                accumulate(module)
        rivals.wait()

    return call


def _accumulate_squares(module: Any) -> Callable[[Any], None]:
    """Torch-Pruning's own; NotRun without it."""
    try:
        from torch_pruning.pruner.importance import GroupHessianImportance
    except ImportError as error:
        raise rivals.NotRun("torch-pruning is not installed") from error
    found: Callable[[Any], None] = GroupHessianImportance().accumulate_grad
    return found
