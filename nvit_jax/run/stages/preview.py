"""preview: a page of training images as the model will see them."""

from typing import Any

import jax
import numpy as np

from nvit_jax.data.pipeline import train_stream
from nvit_jax.parallel import is_main
from nvit_jax.run import report
from nvit_jax.run.stages.common import Run, augment_of, dense_model, dims_from_config, keys_of, load_data

_IMAGES, _VIEWS, _MIXED = 6, 6, 3


def preview_augmentation(run: Run) -> dict[str, Any]:
    """W/preview.html: images as evaluated, training views of them, and batches after erasing, mixup and cutmix."""
    c, path = run.config, run.workdir / "preview.html"
    model = dense_model(run) if c.model or run.other("pretrain").done() else None
    dims = model.dims if model else dims_from_config(c.vit)
    dataset = load_data(run, dims, model.info if model else None)
    split, pre = dataset.split("train").some(_IMAGES), dataset.preprocessing
    augment = augment_of(c)
    with keys_of("pretrain"):
        views_of = augment.pixels(pre)
    plain, labels = split.read()
    known = split.labels.names
    names = [known[label] if 0 <= label < len(known) else "an image" for label in labels]
    pixels = views_of or split.pixels
    views = [
        [pixels(split.source.read(i)[0], np.random.default_rng((c.seed, i, view))) for view in range(_VIEWS)]
        for i in range(len(split))
    ]
    rows = [
        (f"{name}: as evaluated, then {_VIEWS} training views", [_shown(image, pre.scale) for image in (one, *several)])
        for name, one, several in zip(names, plain, views, strict=True)
    ]
    batch = train_stream(dataset.split("train"), min(8, len(dataset.split("train"))), (c.seed, 0), pixels=pixels)(0)
    batch["image"] = pre(batch["image"])
    mixing = augment.mixing
    for step in range(_MIXED):
        shards = len(batch["label"]) if len(batch["label"]) % mixing.shards else mixing.shards
        mixed = jax.device_get(mixing(jax.random.key(c.seed), step, batch, shards))
        share = float(mixed.get("label_share", 1.0))
        text = f"a batch after erasing, mixup and cutmix: labels count {share:.2f}, their partners' {1 - share:.2f}"
        raw = (mixed["image"] * np.array(pre.std) + np.array(pre.mean)) * pre.scale
        rows.append((text, [_shown(image, pre.scale) for image in raw]))
    if is_main():
        report.write_preview(path, rows)
    run.stage.say(f"{path}, {run.stage.seconds():.0f} s")
    return {"path": str(path), "images": len(split)}


def _shown(image: np.ndarray, scale: float) -> np.ndarray:
    return (image.astype(np.float32) * (255 / scale)).clip(0, 255).round().astype(np.uint8)
