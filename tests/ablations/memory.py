"""What a finetuning step takes of the device's memory, with and without its teachers, as XLA plans it. Nothing is run.

    python -m tests.ablations.memory [--preset deit_base] [--batch 64] [--dtype bfloat16] [--remat]

Arguments are the training state (parameters, two moments, their average) and the teachers' parameters; temporaries are
activations, gradients and whatever the program needs beside. Plans differ between devices: a CPU widens bfloat16,
so that a GPU needs less.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from nvit_jax.model import vit
from nvit_jax.model.dims import preset
from nvit_jax.model.regnet import RegNet, RegNetDims, regnet_shapes
from nvit_jax.training import distill, optim
from nvit_jax.training.losses import Objective

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="deit_base")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--remat", action="store_true")
    options = parser.parse_args()
    dims, dtype = preset(options.preset, dist_token=True), jnp.dtype(options.dtype)
    cnn = RegNet(RegNetDims(), regnet_shapes(RegNetDims()))
    optimizer = optim.adamw(1e-4, weight_decay=0.05)
    state = jax.eval_shape(lambda p: distill.new_state(p, optimizer, 0, ema=True), vit.shapes(dims))
    shape = (options.batch, dims.image, dims.image, dims.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32),
        "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
        "index": jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    }
    print(
        f"{options.preset} trained at batch {options.batch} in {options.dtype}, planned for {jax.devices()[0].platform}"
    )
    print("\n| teachers | arguments, GiB | temporaries, GiB |\n|---|---|---|")
    for name, kl, alpha in (("none", 0.0, 0.0), ("unpruned model", 1e5, 0.0), ("unpruned model and CNN", 1e5, 0.5)):
        step = distill.make_train_step(
            dims,
            optimizer,
            Objective(kl_weight=kl, tau=20.0, kl_per_head=True, teacher_alpha=alpha),
            teacher_dims=dims,
            label_teacher=functools.partial(cnn.logits, dtype=dtype),
            dtype=dtype,
            ema_decay=0.99996,
            accumulate=1,
            remat=options.remat,
        )
        inputs = distill.Inputs(state, vit.shapes(dims) if kl else None, cnn.params if alpha else None)
        compiled = jax.jit(functools.partial(step, mean=lambda tree: tree)).lower(inputs, batch).compile()
        memory = compiled.memory_analysis()
        print(
            f"| {name} | {memory.argument_size_in_bytes / GIB:.2f} | {memory.temp_size_in_bytes / GIB:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
