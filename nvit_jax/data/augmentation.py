"""The augmentation of a training: what workers do to an image, and what the device does to a batch."""

import dataclasses

from nvit_jax.data.augment import RandAugment, TrainCrop
from nvit_jax.data.mixing import Mixing
from nvit_jax.errors import UserError
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.parallel import Parallel
from nvit_jax.schema import Flag, Maybe, Number, Shape, Text, ZeroOr, check_fields, whole

_PART, JITTER = Number(0, 1), Number(0, 10)
BETA = ZeroOr(Number(1e-3, 1000))  # below and above, float32 draws from it what is no number
_SHAPES: dict[str, Shape] = {
    "crop": Maybe(Number(above=0, most=1)),
    **dict.fromkeys(("flip", "erasing", "switch"), _PART),
    **dict.fromkeys(("mixup", "cutmix"), BETA),
    "color_jitter": JITTER,
    "rand_augment": Maybe(Text()),
    "fast_decode": Flag(),
    **dict.fromkeys(("repeats", "mixup_shards"), whole(1, 10**6)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Off by default. DeiT's: crop=0.08, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0,
    repeats=3. Crops and what is done to single images need 0..255 pixels; the rest works on any batches.
    """

    crop: float | None = None  # random crops of this part of the area or more; None: images as evaluated
    flip: float = 0.5  # probability, of cropped images
    rand_augment: str | None = None  # timm's name
    color_jitter: float = 0.0  # where there is no rand_augment (DeiT 0.4)
    fast_decode: bool = True  # JPEG by libjpeg-turbo and OpenCV, twice as fast; False: pixels are Pillow's
    repeats: int = 1  # views of an image in a batch
    erasing: float = 0.0  # probability that a rectangle becomes noise
    mixup: float = 0.0
    cutmix: float = 0.0
    switch: float = 0.5  # to cutmix, where both are on
    mixup_shards: int = 1  # partners are found within this many equal parts of the batch

    def __post_init__(self) -> None:
        """UserError for values of another type or range."""
        check_fields(self, _SHAPES)
        if self.rand_augment is not None:
            RandAugment.parse(self.rand_augment)

    @property
    def mixing(self) -> Mixing:
        """What the device does."""
        return Mixing(self.mixup, self.cutmix, self.switch, self.erasing, self.mixup_shards)

    def pixels(self, preprocessing: Preprocessing | None) -> TrainCrop | None:
        """What workers do; None for images as evaluated. UserError for images that cannot be cropped."""
        if self.crop is None:
            return None
        if preprocessing is None or preprocessing.scale != 255:
            scale = "normalised" if preprocessing is None else f"0..{preprocessing.scale:g}"
            raise UserError(f"={self.crop}: images of 0..255 are needed, these are {scale}", "augment.crop")
        return TrainCrop(
            size=preprocessing.size,
            channels=len(preprocessing.mean),
            fill=tuple(round(255 * m) for m in preprocessing.mean),
            scale=(self.crop, 1.0),
            flip=self.flip,
            rand_augment=RandAugment.parse(self.rand_augment) if self.rand_augment else None,
            jitter=self.color_jitter,
            fast=self.fast_decode,
        )

    def local_shards(self, parallel: Parallel) -> int | None:
        """Shards that one call of a compiled step sees. UserError where pmap's devices cannot keep them apart."""
        if parallel.backend != "pmap":
            return None
        if (self.mixup or self.cutmix) and self.mixup_shards % len(parallel.devices):
            raise UserError(
                f"={self.mixup_shards}: pmap mixes within devices; set a multiple of {len(parallel.devices)}",
                "augment.mixup_shards",
            )
        return self.mixup_shards // len(parallel.devices)
