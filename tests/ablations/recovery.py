"""Is it worth it to train a model that was pruned in one shot on the same few images, without labels?

    python -m tests.ablations.recovery --model MODEL_DIR --images DIR --classes FILE.tsv --out runs/recovery

The images are split in two by hash of their names. `nvit.prune` sees one half; on the same half the pruned model then
learns the answers of the unpruned one (random crops, mixup and cutmix; nothing else to learn from). Top-1 and the mean
KL divergence from the unpruned model's answers are counted on the other half, before and after. Rows that are there
already stay; 15 minutes on two cores with nothing else running.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import optax

import nvit_jax as nvit
from nvit_jax.api.recipe import Recipe
from nvit_jax.data.augmentation import Augment
from nvit_jax.files import read_json, write_json
from nvit_jax.latency import timing
from nvit_jax.model.dims import count_macs
from nvit_jax.training.losses import Objective
from tests.ablations.halves import halves
from tests.ablations.one_shot import Judge

EPOCHS, BATCH, RATIO = 6.0, 32, 0.5


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train."""

    rate: float
    matrices: bool = True  # or the vectors alone: biases and norms

    @property
    def name(self) -> str:
        return f"{'all weights' if self.matrices else 'biases and norms'}, {self.rate:g}"


SETTINGS = (Setting(1e-5), Setting(3e-5), Setting(2e-4), Setting(3e-4, matrices=False))


def recipe(setting: Setting, classes: int, images: int) -> Recipe:
    """The ordinary KL of an image's answers, by Adam with a cosine."""
    steps = int(EPOCHS * (images // BATCH))
    adam = optax.adam(optax.cosine_decay_schedule(setting.rate, steps))

    def label(params: Any) -> Any:
        def one(path: Any, _: Any) -> str:
            return "on" if setting.matrices or path[-1].key in ("bias", "scale") else "off"

        return jax.tree_util.tree_map_with_path(one, params)

    return Recipe(
        epochs=EPOCHS,
        batch=BATCH,
        evaluate_every=0,
        objective=Objective(label_weight=0.0, kl_weight=float(classes)),
        augment=Augment(crop=0.35, mixup=0.8, cutmix=1.0),
        optimizer=optax.multi_transform({"on": adam, "off": optax.set_to_zero()}, label),
    )


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| learned | top-1 | KL |", "|---|---|---|"]
    lines += [f"| {row['setting']} | {row['top1']:.1%} | {row['divergence']:.3f} |" for row in found["rows"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "images", "classes", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    options = parser.parse_args()
    kept = options.out / "recovery.json"
    found: dict[str, Any] = {"device": timing.device_name(), "ratio": RATIO, "epochs": EPOCHS, "rows": []}
    if kept.exists():
        found = read_json(kept)
    model = nvit.load(options.model)
    train, judged = halves(options.images, options.classes, model.preprocessing)
    judge = Judge.create(model, judged, model.preprocessing)
    images, _ = train.read()
    small = options.out / "pruned"
    if not small.exists():
        nvit.prune(model, images, macs=RATIO, measure=None).model.save(small)
    pruned = nvit.load(small)

    def keep(name: str, one: nvit.Model) -> None:
        found["rows"].append({"setting": name} | judge(one))
        write_json(kept, found)
        print(json.dumps(found["rows"][-1]), flush=True)

    done = {row["setting"] for row in found["rows"]}
    found |= {"macs": count_macs(pruned.dims) / count_macs(model.dims), "images": len(images)}
    for name, one in (("dense", model), ("nothing", pruned)):
        if name not in done:
            keep(name, one)
    for setting in SETTINGS:
        if setting.name not in done:
            how = recipe(setting, model.dims.classes, len(images))
            blank = np.zeros(len(images), np.int32)  # labels that count nothing
            keep(setting.name, nvit.finetune(pruned, (images, blank), teacher=model, recipe=how))
    print(table(found))


if __name__ == "__main__":
    main()
