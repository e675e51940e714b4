"""What a folder of photographs holds: upright, 8 bits, RGB, or refused by name; and training views of it."""

import contextlib
import importlib.util
import io
import pathlib
import random
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from nvit_jax.data import augment
from nvit_jax.data.augment import OPERATIONS, Draw, RandAugment, TrainCrop, crop_box
from nvit_jax.data.images import training_view
from nvit_jax.errors import UserError
from nvit_jax.model.preprocessing import BadImage, open_image, resize_crop

FILL = (124, 116, 104)
VIEW = TrainCrop(64, 3, FILL)


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A photograph's stand-in: JPEG keeps it well."""
    y, x = np.mgrid[:height, :width]
    planes = [128 + 100 * np.sin(x / 31 + c) * np.cos(y / (23 + c)) + 20 * np.sin(x * y / 900) for c in range(3)]
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_what_is_converted():
    rgb = smooth(40, 30)
    exact = np.asarray(rgb)
    for content, expected in (
        (encoded(rgb, "PNG"), exact),
        (encoded(rgb, "WEBP", lossless=True), exact),
        (encoded(rgb.convert("RGBA"), "PNG"), exact),
        (encoded(rgb.convert("L"), "PNG"), np.asarray(rgb.convert("L").convert("RGB"))),
        (encoded(rgb.quantize(256), "PNG"), np.asarray(rgb.quantize(256).convert("RGB"))),
        (encoded(rgb.convert("CMYK"), "TIFF"), np.asarray(rgb.convert("CMYK").convert("RGB"))),
        (encoded(rgb, "GIF", save_all=True, append_images=[smooth(40, 30).rotate(90)]), None),  # its first frame
    ):
        image = open_image(content, 3)
        assert image.mode == "RGB" and image.size == (40, 30)
        if expected is not None:
            assert np.array_equal(np.asarray(image), expected)
    sixteen = (np.asarray(rgb.convert("L")).astype(np.uint16)) * 257
    assert np.array_equal(np.asarray(open_image(encoded(Image.fromarray(sixteen), "PNG"), 1)), sixteen // 257)
    cmyk = np.asarray(open_image(encoded(rgb.convert("CMYK"), "JPEG", quality=95), 3)).astype(float)
    assert np.abs(cmyk - exact).mean() < 4  # JPEG


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    image, exif = smooth(40, 30), Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(open_image(content, 3)), np.asarray(expected))
    told = []
    whole = training_view(content, 3, 30, lambda size: told.append(size) or (0, 0, *size), fast=True)
    assert told == [expected.size] and whole.shape == (30, 30, 3)


def bomb() -> bytes:
    """A PNG that claims 60,000 x 60,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_is_refused():
    jpeg = encoded(smooth(200, 150), "JPEG")
    for content, words in (
        (b"", "empty"),
        (b"no image", "cannot identify"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (encoded(smooth(200, 150), "PNG")[:400], "truncated|broken"),
        (bomb(), "decompression bomb"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
    ):
        with pytest.raises(BadImage, match=words):
            open_image(content, 3)
    thin = Image.fromarray(np.zeros((60000, 1), np.uint8))
    with pytest.raises(BadImage, match="1 x 60000 pixels would become 256 x 15360000"):
        resize_crop(thin, 256, 224, "bicubic")
    rng = np.random.default_rng(0)
    for _ in range(200):  # flipped bytes: an image or BadImage, nothing else
        broken = np.frombuffer(jpeg, np.uint8).copy()
        broken[rng.integers(0, len(broken), 8)] = rng.integers(0, 256, 8)
        with contextlib.suppress(BadImage):
            assert open_image(broken.tobytes(), 3).mode == "RGB"
        with contextlib.suppress(BadImage):
            assert VIEW(broken.tobytes(), rng).shape == (64, 64, 3)
    for content in (b"", b"no image", jpeg[: len(jpeg) // 2], bomb()):
        with pytest.raises(BadImage):
            VIEW(content, rng)


# ----------------------------------------------------------------------------------------------- augmentation


@pytest.fixture(scope="module")
def timm_augment():
    """timm's auto_augment alone: the package around it wants torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm is not installed")
    path = pathlib.Path(found.origin).parent / "data" / "auto_augment.py"
    spec = importlib.util.spec_from_file_location("timm_auto_augment", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["timm_auto_augment"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["timm_auto_augment"]


THEIRS = {  # our name -> timm's, of its "inc1" set and in its order
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}


def test_every_operation_is_timms(timm_augment, monkeypatch):
    assert list(THEIRS) == list(OPERATIONS)
    assert list(THEIRS.values()) == timm_augment._RAND_INCREASING_TRANSFORMS
    image = smooth(96, 96)
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "translate_const": 43}
    for name, theirs in THEIRS.items():
        # At 10 timm posterizes to 0 bits: black, and an error of recent Pillows. Ours keeps one.
        for magnitude in (0.0, 0.7, 4.0, 9.0, 9.4, *([10.0] if name != "posterize" else [])):
            for sign in (-1.0, 1.0):
                monkeypatch.setattr(random, "random", lambda sign=sign: 0.9 if sign < 0 else 0.1)  # its coin
                operation = timm_augment.AugmentOp(theirs, prob=1.0, magnitude=magnitude, hparams=hparams)
                expected = np.asarray(operation(image))
                ours = np.asarray(OPERATIONS[name](image, magnitude / 10, Draw(sign, FILL)))
                assert np.array_equal(ours, expected), (name, magnitude, sign)


def test_rand_augment_draws_what_its_name_says():
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 0.5, 2, 0.5)
    assert RandAugment.parse("rand-m7-n3-p1-inc1") == RandAugment(7.0, 0.0, 3, 1.0)
    for wrong in ("rand-m9-mstd0.5", "auto-m9-inc1", "rand-m9-inc1-w0", "rand-x3-inc1", ""):
        with pytest.raises(UserError, match="it looks like"):
            RandAugment.parse(wrong)


def test_rand_augment_in_numbers(monkeypatch):
    seen = []
    for name in OPERATIONS:
        record = lambda image, level, draw, name=name: seen.append((name, level, draw.sign)) or image  # noqa: E731
        monkeypatch.setitem(augment.OPERATIONS, name, record)
    rng, draws, image = np.random.default_rng(0), 6000, smooth(8, 8)
    for _ in range(draws):
        RandAugment()(image, rng, FILL)
    # Two layers, each with probability 1/2: `draws` operations; 5 standard deviations everywhere.
    assert abs(len(seen) - draws) < 5 * (draws / 2) ** 0.5
    counts = np.array([sum(name == s[0] for s in seen) for name in OPERATIONS])
    assert np.abs(counts - len(seen) / 15).max() < 5 * (len(seen) / 15) ** 0.5
    levels, signs = np.array([s[1] for s in seen]), np.array([s[2] for s in seen])
    # Normal(0.9, 0.05) above 1 becomes 1: mean 0.9 - 0.05 * 0.0085 (the normal's loss function at 2).
    assert abs(levels.mean() - 0.89958) < 5 * 0.05 / len(seen) ** 0.5 and levels.max() == 1.0
    assert abs((levels == 1.0).mean() - 0.02275) < 5 * (0.02275 / len(seen)) ** 0.5
    assert abs(signs.mean()) < 5 / len(seen) ** 0.5


def test_random_crops_in_numbers():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box((500, 375), rng, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(20000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 375
    parts, ratios = widths * heights / (500 * 375), widths / heights
    assert 0.078 < parts.min() < 0.09 and parts.max() > 0.95 and ratios.min() > 0.74 and ratios.max() < 1.35
    # By rejection sampling of the definition, without rounding: what fits into the image.
    area, aspect = rng.uniform(0.08, 1, 200000), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 200000))
    w, h = np.sqrt(area * 187500 * aspect), np.sqrt(area * 187500 / aspect)
    fits = (w <= 500) & (h <= 375)
    assert abs(parts.mean() - area[fits].mean()) < 0.008
    assert abs(np.log(ratios).mean() - np.log(aspect[fits]).mean()) < 0.006
    left = boxes[:, 0] / np.maximum(500 - widths, 1)
    assert abs(left.mean() - 0.5) < 0.02
    assert crop_box((1000, 10), rng, (0.5, 1.0), (3 / 4, 4 / 3)) == (493, 0, 506, 10)  # nothing fits: the middle


def test_a_training_view_is_pillows():
    image = smooth(600, 450)
    content = encoded(image, "JPEG", quality=90)
    decoded = Image.open(io.BytesIO(content)).convert("RGB")
    exact = TrainCrop(64, 3, FILL, fast=False)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        view = exact(content, np.random.default_rng(seed))
        box = crop_box(image.size, rng, (0.08, 1.0), (3 / 4, 4 / 3))
        expected = decoded.crop(box).resize((64, 64), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            expected = ImageOps.mirror(expected)
        assert np.array_equal(view, np.asarray(expected))
    array = TrainCrop(8, 1, (128,), rand_augment=RandAugment())(
        np.full((8, 8, 1), 7, np.uint8), np.random.default_rng(0)
    )
    assert array.shape == (8, 8, 1)


@pytest.mark.parametrize("size", [450, 300, 224, 160, 112, 64, 40])
def test_fast_views_are_nearly_pillows(size):
    """Enlarged, shrunk, and (up to 225) decoded at a half or less: the same place within half a pixel, as sharp."""
    content = encoded(smooth(602, 451), "JPEG", quality=90)
    box = (71, 33, 71 + 450, 33 + 410)
    fast, exact = (training_view(content, 3, size, lambda _: box, fast=flag).astype(float) for flag in (True, False))
    assert 0 < np.abs(fast - exact).mean() < 1.5  # of 255; a shift by one pixel makes 2 and more
    details = [np.abs(np.diff(view, axis=1)).mean() for view in (fast, exact)]
    assert details[0] == pytest.approx(details[1], rel=0.1)  # scaled decoding has a filter of its own


def test_what_the_fast_decoder_leaves_to_pillow():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = smooth(200, 150)
    for content in (
        encoded(image, "PNG"),
        encoded(image, "JPEG", exif=exif),
        encoded(image.convert("L"), "JPEG"),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "JPEG")[:-2] + b"12345",  # libjpeg-turbo complains, Pillow does not
    ):
        fast, exact = (training_view(content, 3, 64, lambda size: (0, 0, 90, 80), fast=flag) for flag in (1, 0))
        assert np.array_equal(fast, exact)


def test_color_jitter_is_bounded():
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    rng = np.random.default_rng(0)
    values = [np.asarray(augment.color_jitter(image, rng, 0.4)).mean() for _ in range(400)]
    assert 59 < min(values) < 70 and 130 < max(values) < 141  # grey: only brightness changes it
