"""Programs: StableHLO and ONNX, written, and what runs them."""

import logging
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.formats import folder, interchange
from nvit_jax.model import vit
from nvit_jax.model.directory import Model

Path = pathlib.Path
Run = Callable[[np.ndarray], np.ndarray]  # images [B, height, width, channels] float32 -> logits [B, C]


class Options(NamedTuple):
    """What is written, beyond formats and number types."""

    opset: int = 20  # of ONNX: the first with GELU; TensorRT 11 reads 9 to 25, onnxruntime 7 to that of its release
    weights: str = "constants"  # StableHLO: inside of the program, or "arguments" of it
    results: Mapping[str, Any] = {}  # what was measured, for the model card; see card.check_results


USUAL = Options()
OPSETS = (17, 25)  # the oldest that PyTorch's exporter converts to, the newest that TensorRT 11 reads
WEIGHTS = ("constants", "arguments")


class Written(NamedTuple):
    """An exported file, and what runs it."""

    path: Path
    run: Run
    runner: str
    weights: Path | None = None  # a file of their own
    note: str = ""  # a line for the user


def file_name(dtype: str, suffix: str) -> str:
    """Of a format's file in a number type."""
    return f"model.{suffix}" if dtype == "float32" else f"model.{dtype}.{suffix}"


# --------------------------------------------------------------------------------------------- StableHLO


MOST_CONSTANTS = 2_000_000_000  # bytes; a serialized program ends at 2 GiB


def write_stablehlo(model: Model, directory: Path, dtype: str = "float32", options: Options = USUAL) -> Written:
    """A program for any batch size, for CPU, CUDA and TPU; read with jax.export.deserialize.

    With its weights inside, images -> logits; or (weights, images) -> logits, and beside it the file of the weights, as
    `write_safetensors` makes it.
    """
    kind, apart = jnp.dtype(dtype), options.weights == "arguments"
    params = jax.tree.map(lambda x: np.asarray(x).astype(kind), model.params)

    def logits(params: Any, images: jax.Array) -> jax.Array:
        out = vit.forward(model.dims, params, images.astype(kind), dtype=kind)
        return out.astype(jnp.float32).mean(1)

    def of_state(state: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        return logits(interchange.assemble(model.dims, state.__getitem__), images)

    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *model.dims.sides, model.dims.channels), jnp.float32)
    # In float32 the program asks for float32 products wherever it runs, as the model was evaluated.
    with jax.default_matmul_precision("float32" if dtype == "float32" else None):
        if apart:
            wanted = {e.torch: jax.ShapeDtypeStruct(e.shape, kind) for e in interchange.entries(model.dims)}
            exported = jax.export.export(jax.jit(of_state), platforms=PLATFORMS)(wanted, shape)
        else:
            exported = jax.export.export(jax.jit(lambda images: logits(params, images)), platforms=PLATFORMS)(shape)
    path = directory / file_name(dtype, "stablehlo")
    path.write_bytes(exported.serialize())
    again = jax.export.deserialize(bytearray(path.read_bytes()))
    runner = f"JAX {jax.__version__}"
    if not apart:
        return Written(path, lambda images: np.asarray(again.call(images)), runner)
    from safetensors.numpy import load_file

    weights = directory / file_name(dtype, "safetensors")
    folder.write_weights(weights, model, interchange.to_torch(model.dims, model.params), dtype)
    state = load_file(weights)
    return Written(path, lambda images: np.asarray(again.call(state, images)), runner, weights)


PLATFORMS = ("cpu", "cuda", "tpu")


# -------------------------------------------------------------------------------------------------- ONNX


def write_onnx(model: Model, directory: Path, dtype: str = "float32", options: Options = USUAL) -> Written:
    """images [batch, channels, height, width] -> logits [batch, classes], through the PyTorch module; dynamic batch."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
        import torch

        from nvit_jax.formats import torch_vit
    except ImportError as error:
        raise UserError(f': "onnx" needs pip install "nvit_jax[onnx]" ({error})', "formats") from error
    kind = {"float32": torch.float32, "float16": torch.float16}[dtype]
    twin = torch_vit.ViT(model.dims.to_json())
    twin.load_state_dict(
        {name: torch.from_numpy(value) for name, value in interchange.to_torch(model.dims, model.params).items()}
    )
    twin = twin.to(kind).eval()
    path = directory / file_name(dtype, "onnx")
    large = sum(p.numel() * p.element_size() for p in twin.parameters()) > 1.9e9  # protobuf's limit is 2 GB
    for name in ("torch.onnx", "onnxscript"):  # that torchvision is not installed, and how versions are converted
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about its own insides
        torch.onnx.export(
            twin,
            (torch.zeros(2, model.dims.channels, *model.dims.sides, dtype=kind),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            opset_version=options.opset,
            external_data=large,
            verbose=False,
        )
    found = {entry.domain: entry.version for entry in onnx.load(path, load_external_data=False).opset_import}.get("")
    if found != options.opset:  # the converter of versions gives up without an error
        raise UserError(f"={options.opset}: the exporter cannot write this model so, but in opset {found}", "opset")
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        half = np.float16 if dtype == "float16" else np.float32
        return np.asarray(session.run(None, {"images": images.transpose(0, 3, 1, 2).astype(half)})[0], np.float32)

    return Written(path, run, f"onnxruntime {onnxruntime.__version__}")


def onnx_matrices(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, [outputs, inputs]) of every linear layer.

    A graph multiplies by [inputs, outputs], or by the other way round if it says so.
    """
    import onnx

    graph = onnx.load(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in tensors:
            matrix = onnx.numpy_helper.to_array(tensors[node.input[1]])
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            yield node.input[1], matrix if turned else matrix.T
