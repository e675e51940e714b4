"""Convert a Vision Transformer (or the RegNetY teacher) made elsewhere into a model directory.

    python convert_deit_weights.py --checkpoint FILE --out MODEL_DIR [--verify] [--overwrite]

FILE is .pth, .pt, .bin or .ckpt (needs PyTorch), .safetensors or .npz, or a folder with one: official DeiT and
DeiT-III, timm, DINO, EVA and BEiT, MAE and MoCo v3, Hugging Face ViT and DeiT, CLIP and SigLIP, torchvision,
vision_transformer and big_vision, released NViT (pruned or dense), regnety_160, or an export of this project. Layout
and sizes are found out and printed; a config.json beside FILE is read. What cannot be seen in a file can be said:
  --variant NAME   a published model that it must be, such as deit_small or vit_base (they normalise pixels differently)
  --image N        interpolate the position embeddings to another image size, N or HEIGHTxWIDTH
  --classes N      put a new classifier of zeros there, to be trained
  --heads N        heads of a block, where neither a config.json beside FILE nor its published widths tell
  --entry NAME     the part of a .pth file, such as model or model_ema (the default where it exists), or a prefix
--verify runs PyTorch and Flax on the same images, the publisher's own model where it can be built, and prints the
largest difference.
Installed, the same is `nvit-jax convert FILE MODEL_DIR`.
"""

import os
import signal
import sys


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 a mistake (one line)."""
    if "--help" in argv or "-h" in argv or len(argv) == 1:
        print(__doc__)
        return 0
    from nvit_jax.run.failures import guard

    return guard(lambda words: _run([argv[0], *words]), argv[1:])


def _run(argv: list[str]) -> int:
    from absl import flags

    from nvit_jax.errors import UserError, first_line

    values = flags.FlagValues()
    for name in ("checkpoint", "out", "variant", "entry", "image"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in ("heads", "classes"):
        flags.DEFINE_integer(name, None, "", lower_bound=1, flag_values=values)
    for name in ("verify", "overwrite"):
        flags.DEFINE_boolean(name, False, "", flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(first_line(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; see --help")
    for name in ("checkpoint", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is missing; see --help")

    from nvit_jax.formats.convert import Options, convert_checkpoint
    from nvit_jax.model.sizes import parse
    from nvit_jax.run.failures import tidying

    image = None if values.image is None else parse(values.image)
    if values.image is not None and image is None:
        raise UserError(f"flag --image={values.image}: give a whole number, at least 1, or two as in 256x128")
    options = Options(values.variant, image, values.heads, values.classes, values.entry)
    with tidying():
        convert_checkpoint(values.checkpoint, values.out, options, overwrite=values.overwrite, verify=values.verify)
    print(f"written: {values.out}")
    return 0


def _interrupted(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupted)  # before anything is imported, which would make a traceback of Ctrl-C
    from nvit_jax.run.failures import program

    program(lambda: main(sys.argv))
