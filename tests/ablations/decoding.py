"""What reading a training image costs on one core, step by step: images a second, and how far pixels are from Pillow's.

    python -m tests.ablations.decoding --images DIR [--count 300] [--short 375]

DIR/class/image.JPEG are resized to the short side of ImageNet's usual image (375) and encoded again (quality 90), in
memory. Each way reads all of them in turns, five rounds; the fastest round of process time counts. All views are cut
from the same boxes. Then every step of the pipeline alone, the device's with this CPU as the device.
"""

import argparse
import io
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import jax
import numpy as np
import simplejpeg
from PIL import Image

from nvit_jax.data import images
from nvit_jax.data.augment import RandAugment, TrainCrop, crop_box
from nvit_jax.data.images import CenterCrop
from nvit_jax.data.mixing import Mixing
from nvit_jax.model.preprocessing import Preprocessing

SIZE, FILL, SCALE, RATIO = 224, (124, 116, 104), (0.08, 1.0), (3 / 4, 4 / 3)
Way = Callable[[bytes, np.random.Generator], np.ndarray]


def plain(content: bytes, rng: np.random.Generator) -> np.ndarray:
    """PIL.Image.open and a random resized crop, nothing else."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    box = crop_box(image.size, rng, SCALE, RATIO)
    return np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def bilinear(content: bytes, rng: np.random.Generator) -> np.ndarray:
    """The same, bilinear."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    box = crop_box(image.size, rng, SCALE, RATIO)
    return np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def others() -> dict[str, Way]:
    """OpenCV and simplejpeg as they come."""

    def cut(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        left, top, right, bottom = crop_box((image.shape[1], image.shape[0]), rng, SCALE, RATIO)
        smaller = min(right - left, bottom - top) > SIZE
        how = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
        return cv2.resize(image[top:bottom, left:right], (SIZE, SIZE), interpolation=how)

    def opencv(content: bytes, rng: np.random.Generator) -> np.ndarray:
        return cut(cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), 1), cv2.COLOR_BGR2RGB), rng)

    return {
        "opencv, area or cubic": opencv,
        "simplejpeg + opencv": lambda content, rng: cut(simplejpeg.decode_jpeg(content), rng),
        "simplejpeg, fast DCT + opencv": lambda content, rng: cut(
            simplejpeg.decode_jpeg(content, fastdct=True, fastupsample=True), rng
        ),
    }


def steps(
    files: list[pathlib.Path], contents: list[bytes]
) -> dict[str, tuple[Callable[[Any], Any], Sequence[Any], int]]:
    """Every step of reading for training: what it does, to what, and how many images that is."""
    decoded = [simplejpeg.decode_jpeg(content) for content in contents]
    crops = [crop_box(pixels.shape[1::-1], np.random.default_rng(i), SCALE, RATIO) for i, pixels in enumerate(decoded)]
    parts = [pixels[top:bottom, left:right] for pixels, (left, top, right, bottom) in zip(decoded, crops, strict=True)]
    views = [Image.fromarray(images._resize(part, SIZE)) for part in parts]
    arrays, batch = [np.asarray(view) for view in views], 50
    groups = [arrays[i : i + batch] for i in range(0, len(arrays) - batch + 1, batch)]
    pre, mixing = Preprocessing.imagenet(SIZE), Mixing(0.8, 1.0, erasing=0.25)

    @jax.jit
    def on_the_device(raw: Any) -> Any:
        whole = {"image": pre(raw), "label": np.zeros(batch, np.int32), "index": np.arange(batch)}
        return mixing(jax.random.key(0), 1, whole)["image"].mean()

    stacked = [np.stack(group) for group in groups]
    on_the_device(stacked[0]).block_until_ready()
    return {
        "read the file": (lambda file: file.read_bytes(), files, 1),
        "decode": (simplejpeg.decode_jpeg, contents, 1),
        "resize the crop": (lambda part: images._resize(part, SIZE), parts, 1),
        "RandAugment": (lambda i: RandAugment()(views[i], np.random.default_rng(i), FILL), range(len(views)), 1),
        "put into a batch": (np.stack, groups, batch),
        "normalise, erase, mix (device)": (lambda raw: on_the_device(raw).block_until_ready(), stacked, batch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--short", type=int, default=375)
    options = parser.parse_args()
    contents, files = [], sorted(options.images.rglob("*.JPEG"))[: options.count]
    for file in files:
        image = Image.open(file).convert("RGB")
        factor = options.short / min(image.size)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
    ways: dict[str, Way] = {
        "Pillow: open, crop, bicubic": plain,
        "Pillow, bilinear": bilinear,
        "ours, fast_decode=False": TrainCrop(SIZE, 3, FILL, flip=0.0, fast=False),
        "ours": TrainCrop(SIZE, 3, FILL, flip=0.0),
        "ours + flip + RandAugment": TrainCrop(SIZE, 3, FILL, rand_augment=RandAugment()),
        "evaluation (256, 224)": CenterCrop(256, SIZE, "bicubic", 3),
        **others(),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(5):
        for name, way in ways.items():
            start = time.process_time()
            for i, content in enumerate(contents):
                way(content, np.random.default_rng(i))
            best[name] = min(best[name], time.process_time() - start)
    views = {name: [way(c, np.random.default_rng(i)) for i, c in enumerate(contents)] for name, way in ways.items()}
    first = next(iter(ways))
    kilobytes = np.mean([len(c) for c in contents]) / 1024
    print(f"{len(contents)} JPEGs, short side {options.short}, {kilobytes:.0f} KiB on average\n")
    print("| way | images/s and core | to plain Pillow | mean pixel difference |\n|---|---|---|---|")
    for name, seconds in best.items():
        difference = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(views[name], views[first], strict=True)])
        shown = "" if "RandAugment" in name or "evaluation" in name else f"{difference:.2f}"
        print(f"| {name} | {len(contents) / seconds:.0f} | {best[first] / seconds:.2f} | {shown} |")
    print("\n| step | images/s and core |\n|---|---|")
    for name, (step, given, count) in steps(files, contents).items():
        taken = []
        for _ in range(5):
            start = time.process_time()
            for one in given:
                step(one)
            taken.append(time.process_time() - start)
        print(f"| {name} | {count * len(given) / min(taken):,.0f} |")


if __name__ == "__main__":
    main()
