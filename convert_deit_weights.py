"""Convert a Vision Transformer (or the RegNetY teacher) made elsewhere into a model directory.

    python convert_deit_weights.py --checkpoint FILE --out MODEL_DIR [--verify] [--overwrite]

FILE is .pth or .pt (needs PyTorch), .safetensors or .npz: official DeiT and DeiT-III, timm, DINO and DINOv2, Hugging
Face ViT and DeiT, torchvision, vision_transformer and big_vision, released NViT (pruned or dense), regnety_160, or an
export of this project. Layout and sizes are found out and printed. What cannot be seen in a file can be said:
  --variant NAME   a published model that it must be, such as deit_small or vit_base (they normalise pixels differently)
  --image N        interpolate the position embeddings to another image size
  --classes N      put a new classifier of zeros there, to be trained
  --heads N        heads of a block, for unpublished sizes
  --entry NAME     the part of a .pth file, such as model or model_ema (the default where it exists)
--verify runs PyTorch and Flax on the same images and prints the largest difference.
Installed, the same is `nvit-jax convert FILE MODEL_DIR`.
"""

import sys


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 a mistake (one line)."""
    if "--help" in argv or "-h" in argv or len(argv) == 1:
        print(__doc__)
        return 0
    from nvit_jax.errors import UserError

    try:
        return _run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    from absl import flags

    from nvit_jax.errors import UserError

    values = flags.FlagValues()
    for name in ("checkpoint", "out", "variant", "entry"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in ("image", "heads", "classes"):
        flags.DEFINE_integer(name, None, "", lower_bound=1, flag_values=values)
    for name in ("verify", "overwrite"):
        flags.DEFINE_boolean(name, False, "", flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(str(error).splitlines()[0]) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; see --help")
    for name in ("checkpoint", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is missing; see --help")

    from nvit_jax.formats.convert import Options, convert_checkpoint

    options = Options(values.variant, values.image, values.heads, values.classes, values.entry)
    convert_checkpoint(values.checkpoint, values.out, options, overwrite=values.overwrite, verify=values.verify)
    print(f"written: {values.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
