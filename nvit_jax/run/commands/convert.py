"""`nvit-jax convert`: a checkpoint made elsewhere becomes a model directory."""

from collections.abc import Sequence

from nvit_jax import paths
from nvit_jax.errors import UserError
from nvit_jax.run.commands.parser import Parser, at_least_one, at_least_zero, image_size
from nvit_jax.run.failures import tidying

DESCRIPTION = """\
Convert a Vision Transformer (or the RegNetY teacher) made elsewhere into a model directory.

FILE is .pth, .pt, .bin or .ckpt (these need PyTorch: pip install "nvit_jax[torch]"), .safetensors or .npz, or a folder
with one: official DeiT and DeiT-III, timm, DINO to DINOv3, EVA and BEiT, MAE, I-JEPA and MoCo v3, Hugging Face ViT,
DeiT, DINOv2, DINOv3, BEiT, CLIP and SigLIP, OpenAI's and open_clip's CLIP, torchvision, vision_transformer and
big_vision, released NViT (pruned or dense), regnety_160, or an export of this project. Layout and sizes are found out
and printed; a config.json beside it is read."""
EXAMPLES = """\
examples:
  nvit-jax convert deit_tiny_patch16_224.pth deit_tiny --verify
  nvit-jax convert deit_base_patch16_224.pth deit_base_384 --image 384
  nvit-jax convert vit_base_patch16_224.safetensors vit_base_10 --variant vit_base --classes 10
  nvit-jax convert deit_tiny_patch16_224.pth deit_tiny_features --classes 0"""


def _parser() -> Parser:
    parser = Parser("convert", DESCRIPTION, EXAMPLES)
    parser.add_argument("file", metavar="FILE", help="the checkpoint")
    parser.add_argument("directory", metavar="DIR", help="the model directory to write")
    parser.option("--verify", action="store_true", help="run PyTorch and Flax on the same images, print the difference")
    parser.option("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.option("--variant", metavar="NAME", help="a published model that it must be, such as deit_small or vit_base")
    parser.option("--image", metavar="N", type=image_size, help="interpolate the positions to N x N, or to HxW")
    parser.option(
        "--classes", metavar="N", type=at_least_zero, help="a new classifier of zeros, to be trained; 0: none"
    )
    parser.option("--heads", metavar="N", type=at_least_one, help="heads of a block, where nothing else tells them")
    parser.option("--entry", metavar="NAME", help="the part of a .pth file, such as model or model_ema, or a prefix")
    return parser


def usage() -> str:
    """What --help prints."""
    return _parser().format_help()


def execute(words: Sequence[str]) -> int:
    """Convert. UserError for mistakes."""
    given = _parser().read(words)
    if paths.kind(given.file) != "a directory":  # a folder stands for the one checkpoint in it
        paths.file(given.file)
    elif paths.kind(f"{given.file}/model.json") == "a file":
        raise UserError(f"{given.file} is a model directory already")
    if (paths.for_writing(given.directory) / "model.json").exists() and not given.overwrite:
        raise UserError(f"{given.directory} exists; --overwrite replaces it")
    from nvit_jax.formats.convert import Options, convert_checkpoint

    options = Options(given.variant, given.image, given.heads, given.classes, given.entry)
    with tidying():
        convert_checkpoint(given.file, given.directory, options, overwrite=given.overwrite, verify=given.verify)
    print(f"written: {given.directory}")
    return 0
