"""Compiled programs of the stages, nothing of which is run: for their plan of memory and their text."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from benchmarks import steps
from nvit_jax.model import vit
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.masks import full_masks
from nvit_jax.model.regnet import RegNet, RegNetDims, regnet_shapes
from nvit_jax.parallel import AXIS, Parallel
from nvit_jax.pruning.scoring import Scoring, make_score_step
from nvit_jax.training import distill, optim
from nvit_jax.training.evaluate import make_eval_step
from nvit_jax.training.losses import Objective

STAGES = ("pretrain", "finetune", "prune", "score fisher", "score taylor", "score hvp", "eval")


def alone() -> Parallel:
    """One device."""
    return Parallel.create("jit", (jax.devices()[0],))


def batch_shapes(dims: ViTDims, batch: int) -> dict[str, Any]:
    """Of a batch on the devices."""
    images = jax.ShapeDtypeStruct((batch, *dims.sides, dims.channels), jnp.float32)
    number = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return {"image": images, "label": number, "index": number}


def train_step(
    dims: ViTDims,
    *,
    parallel: Parallel,
    teachers: bool = False,
    masked: bool = False,
    dtype: str = "float32",
    remat: bool = False,
    accumulate: int = 1,
) -> tuple[Any, Any]:
    """(the step that the stages compile, the shapes of its inputs)."""
    optimizer = optim.adamw(1e-4, weight_decay=0.05)
    cnn = RegNet(RegNetDims(), regnet_shapes(RegNetDims()))
    step = distill.make_train_step(
        dims,
        optimizer,
        steps.NVIT_TEACHERS if teachers else Objective(),
        teacher_dims=dims if teachers else None,
        label_teacher=functools.partial(cnn.logits, dtype=jnp.dtype(dtype)) if teachers else None,
        dtype=jnp.dtype(dtype),
        accumulate=accumulate,
        parallel=parallel,
        remat=remat,
    )
    params = vit.shapes(dims)
    masks = full_masks(dims) if masked else None
    state = jax.eval_shape(lambda p: distill.new_state(p, optimizer, 0, masks=masks), params)
    return step, distill.Inputs(state, params if teachers else None, cnn.params if teachers else None)


def spread(parallel: Parallel, inputs: Any, batch: Any) -> tuple[Any, Any]:
    """The shapes of a step's inputs, with how they lie on the devices: the state as it is placed, the batch in rows."""
    rows = parallel._sharding(PartitionSpec(AXIS))
    lies = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=parallel._kept(s.shape))  # noqa: E731
    in_rows = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows)  # noqa: E731
    return jax.tree.map(lies, inputs), jax.tree.map(in_rows, batch)


def program(stage: str, dims: ViTDims, batch: int, *, dtype: str = "float32", remat: bool = False) -> Any:
    """The compiled program of one of STAGES, on one device."""
    parallel, shapes = alone(), batch_shapes(dims, batch)
    if stage.startswith("score "):
        chosen = Scoring(criterion=stage.removeprefix("score "), scheme="kind", remat=remat)
        inputs = train_step(dims, parallel=parallel, masked=True)[1]._replace(teacher=vit.shapes(dims))
        step = make_score_step(dims, chosen, Objective(), accumulate=1, parallel=parallel)
        return parallel.compile(step).lower(inputs, shapes).compile()
    if stage == "eval":

        def forward(params: Any, images: jax.Array) -> jax.Array:
            return vit.forward(dims, params, images, dtype=jnp.dtype(dtype))

        found: list[Any] = []
        keeping = _Keeping(parallel, found)
        make_eval_step(forward, keeping)  # type: ignore[arg-type]
        valid = jax.ShapeDtypeStruct((batch,), jnp.float32)
        return found[0].lower(vit.shapes(dims), shapes | {"valid": valid}).compile()
    step, inputs = train_step(
        dims, parallel=parallel, teachers=stage == "finetune", masked=stage == "prune", dtype=dtype, remat=remat
    )
    return parallel.compile_training(step).lower(inputs, shapes).compile()


class _Keeping:
    """A Parallel that keeps what it compiles."""

    def __init__(self, parallel: Parallel, found: list[Any]) -> None:
        self.parallel, self.found = parallel, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parallel, name)

    def compile(self, step: Any, **options: Any) -> Any:
        self.found.append(self.parallel.compile(step, **options))
        return self.found[-1]


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of a device that a program plans with: what it is given, what it returns, what it needs in between."""
    plan = compiled.memory_analysis()
    found = {
        "arguments": plan.argument_size_in_bytes,
        "outputs": plan.output_size_in_bytes,
        "reused": plan.alias_size_in_bytes,  # outputs that take the place of arguments (donated)
        "temporaries": plan.temp_size_in_bytes,
    }
    total = found["arguments"] + found["outputs"] - found["reused"] + found["temporaries"]
    return {name: int(value) for name, value in found.items()} | {"total": int(total)}


# ---------------------------------------------------------------------------------------------- collectives

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: its lines}, the entry's name) of an HLO module."""
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line):
            name = head[2]
            found[name], entry = [], name if head[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def _size(shape: str) -> int:
    """Bytes of "(f32[2,3], bf16[4])" or "f32[]"."""
    return sum(_BYTES.get(kind, 4) * int(np.prod([int(n) for n in sides.split(",") if n], dtype=np.int64))
               for kind, sides in _SHAPE.findall(shape))  # fmt: skip


def collective_bytes(text: str) -> tuple[int, int]:
    """(bytes, operations) of a step that devices exchange, read from the HLO text; a loop's count once a turn."""
    parts, entry = computations(text)

    def count(name: str) -> tuple[int, int]:
        total, operations = 0, 0
        for line in parts.get(name, []):
            said = re.search(r"= (.+?) ([\w\-]+)\(", line)
            if said is None:
                continue
            if said[2].removesuffix("-start") in _COLLECTIVES:
                total, operations = total + _size(said[1]), operations + 1
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for inner in re.findall(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", line):
                if inner != name and said[2].removesuffix("-start") not in _COLLECTIVES:
                    more = count(inner)
                    times = int(turns[1]) if turns and said[2] == "while" else 1
                    total, operations = total + times * more[0], operations + times * more[1]
        return total, operations

    return count(entry)
