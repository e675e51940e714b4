"""`nvit-jax convert`: a checkpoint made elsewhere becomes a model directory."""

import pathlib
from collections.abc import Sequence

from nvit_jax.errors import UserError
from nvit_jax.run.commands.parser import Parser, at_least_one

DESCRIPTION = """\
Convert a Vision Transformer (or the RegNetY teacher) made elsewhere into a model directory.

FILE is .pth, .pt or .bin (these need PyTorch: pip install "nvit_jax[torch]"), .safetensors or .npz: official DeiT and
DeiT-III, timm, DINO and DINOv2, Hugging Face ViT and DeiT, torchvision, vision_transformer and big_vision, released
NViT (pruned or dense), regnety_160, or an export of this project. Layout and sizes are found out and printed."""
EXAMPLES = """\
examples:
  nvit-jax convert deit_tiny_patch16_224.pth deit_tiny --verify
  nvit-jax convert deit_base_patch16_224.pth deit_base_384 --image 384
  nvit-jax convert vit_base_patch16_224.safetensors vit_base_10 --variant vit_base --classes 10"""


def _parser() -> Parser:
    parser = Parser("convert", DESCRIPTION, EXAMPLES)
    parser.add_argument("file", metavar="FILE", help="the checkpoint")
    parser.add_argument("directory", metavar="DIR", help="the model directory to write")
    parser.option("--verify", action="store_true", help="run PyTorch and Flax on the same images, print the difference")
    parser.option("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.option("--variant", metavar="NAME", help="a published model that it must be, such as deit_small or vit_base")
    parser.option("--image", metavar="N", type=at_least_one, help="interpolate the position embeddings to this size")
    parser.option("--classes", metavar="N", type=at_least_one, help="a new classifier of zeros, to be trained")
    parser.option("--heads", metavar="N", type=at_least_one, help="heads of a block, for unpublished sizes")
    parser.option("--entry", metavar="NAME", help="the part of a .pth file, such as model or model_ema")
    return parser


def usage() -> str:
    """What --help prints."""
    return _parser().format_help()


def execute(words: Sequence[str]) -> int:
    """Convert. UserError for mistakes."""
    given = _parser().read(words)
    if pathlib.Path(given.directory).exists() and not given.overwrite:
        raise UserError(f"{given.directory} exists; --overwrite replaces it")
    from nvit_jax.formats.convert import Options, convert_checkpoint

    options = Options(given.variant, given.image, given.heads, given.classes, given.entry)
    convert_checkpoint(given.file, given.directory, options, overwrite=given.overwrite, verify=given.verify)
    print(f"written: {given.directory}")
    return 0
