"""The compact model for other places: safetensors with a PyTorch module, StableHLO, ONNX. Each is run after writing."""

import json
import logging
import pathlib
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.files import new_directory
from nvit_jax.formats import interchange
from nvit_jax.model import vit
from nvit_jax.model.directory import Model
from nvit_jax.pruning import sparsity

Path = pathlib.Path
Run = Callable[[np.ndarray], np.ndarray]  # images [B, size, size, channels] float32 -> logits [B, C]


class Written(NamedTuple):
    """An exported file, and what runs it."""

    path: Path
    run: Run
    runner: str


def export_model(
    model: Model, directory: Path, formats: tuple[str, ...], dtypes: tuple[str, ...], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Write directory/<format>/model[.<dtype>].<format>, run each and compare it with the Flax model in float32.

    Returns one record a file. UserError when a package is missing; RuntimeError when a float32 file differs, or the
    matrices of a 2:4 sparse model's file are not sparse.
    """
    size, channels = model.dims.image, model.dims.channels
    images = np.random.default_rng(0).standard_normal((3, size, size, channels)).astype(np.float32)
    with jax.default_matmul_precision("float32"):
        expected = np.asarray(model.apply(model.params, images))
    largest = float(np.abs(expected).max())
    records = []
    for name in formats:
        with new_directory(directory / name, (f"model*.{name}*", "vit.py")) as beside:
            written = [FORMATS[name](model, beside, dtype) for dtype in dtypes]
            _open_to_others(beside)
            for dtype, file in zip(dtypes, written, strict=True):
                # Two batch sizes, neither of them the one that was traced.
                found = np.concatenate([file.run(images[:1]), file.run(images[1:])])
                difference = float(np.abs(found - expected).max())
                limit = 1e-4 * max(1.0, largest)  # of float32; ten times what the order of additions explains
                if not np.isfinite(found).all() or (dtype == "float32" and difference > limit):
                    raise RuntimeError(f"{file.path.name} differs from the model by {difference}")
                size_bytes = sum(f.stat().st_size for f in beside.glob(f"{file.path.name}*"))
                where = f"{directory.name}/{name}/{file.path.name}"
                record = {
                    "path": where,
                    "format": name,
                    "dtype": dtype,
                    "bytes": size_bytes,
                    "max_abs_diff": difference,
                    "max_abs_logit": largest,
                    "run_with": file.runner,
                }
                say(
                    f"{where}: {size_bytes / 1e6:.1f} MB, run with {file.runner}, largest difference "
                    f"{difference:.1e} on logits up to {largest:.2f}"
                )
                if "sparsity" in model.info and name in _MATRICES:
                    record["sparsity"], facts = _check_sparsity(model, list(_MATRICES[name](file.path)))
                    say(f"{where}: {facts}")
                records.append(record)
    return records


def _open_to_others(directory: Path) -> None:
    """Give every file the permissions that new files get here: safetensors makes its own for their owner alone."""
    probe = directory / ".new"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in directory.iterdir():
        file.chmod(mode)


def _file_name(dtype: str, suffix: str) -> str:
    return f"model.{suffix}" if dtype == "float32" else f"model.{dtype}.{suffix}"


def _facts(model: Model) -> dict[str, Any]:
    info = {k: model.info.get(k) for k in ("preprocessing", "classes", "variant")}
    info |= {k: model.info[k] for k in ("sparsity",) if k in model.info}
    return {"dims": model.dims.to_json()} | info


def _check_sparsity(model: Model, found: list[tuple[str, np.ndarray]]) -> tuple[str, str]:
    """The pattern that every matrix of a written file has, and what to know about it. RuntimeError otherwise."""
    count = sparsity.check(found)
    expected = sum(len(e.shape) == 2 for e in interchange.entries(model.dims))
    if count != expected:
        raise RuntimeError(f"found {count} of {expected} matrices in the file that was written")
    facts = f"{sparsity.PATTERN} in each of {count} matrices along the inputs"
    # cuSPARSELt's smallest tile in 16 bits, as PyTorch's SparseSemiStructuredTensorCUSPARSELT asks for it.
    if odd := sum(any(side % 16 for side in matrix.shape) for _, matrix in found):
        facts += f"; {odd} have a side that is no multiple of 16, which sparse kernels need padded with zeros"
    return sparsity.PATTERN, facts


# ------------------------------------------------------------------------------------------- safetensors


def write_safetensors(model: Model, directory: Path, dtype: str = "float32") -> Written:
    """timm's names and shapes; widths, preprocessing and classes in the metadata; vit.py, which loads it, beside."""
    from safetensors.numpy import save_file

    path = directory / _file_name(dtype, "safetensors")
    state = {
        name: value.astype(jnp.dtype(dtype)) for name, value in interchange.to_torch(model.dims, model.params).items()
    }
    save_file(state, path, metadata={"format": "pt", "nvit_jax": json.dumps(_facts(model))})
    shutil.copyfile(Path(__file__).with_name("torch_vit.py"), directory / "vit.py")
    try:
        import torch

        from nvit_jax.formats import torch_vit
    except ImportError:
        return Written(path, _flax_reader(model, path), "Flax, from the file's tensors (PyTorch is not installed)")
    twin = torch_vit.load(str(path))

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy())

    return Written(path, run, f"PyTorch {torch.__version__.split('+')[0]}")


def _flax_reader(model: Model, path: Path) -> Run:
    from safetensors.numpy import load_file

    state = {name: np.asarray(value, np.float32) for name, value in load_file(path).items()}
    shapes = {name: value.shape for name, value in state.items()}
    params = interchange.from_torch(model.dims, shapes, state.__getitem__, str(path), np.float32)
    return lambda images: np.asarray(model.apply(params, images))


def _safetensors_matrices(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, [outputs, inputs]) of every linear layer, as a file holds it."""
    from safetensors.numpy import load_file

    return ((name, value) for name, value in load_file(path).items() if value.ndim == 2)


# --------------------------------------------------------------------------------------------- StableHLO


def write_stablehlo(model: Model, directory: Path, dtype: str = "float32") -> Written:
    """A program with its weights, for any batch size, for CPU, CUDA and TPU; read with jax.export.deserialize."""
    kind = jnp.dtype(dtype)
    params = jax.tree.map(lambda x: np.asarray(x).astype(kind), model.params)
    size, channels = model.dims.image, model.dims.channels

    def logits(images: jax.Array) -> jax.Array:
        out = vit.forward(model.dims, params, images.astype(kind), dtype=kind)
        return out.astype(jnp.float32).mean(1)

    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    # In float32 the program asks for float32 products wherever it runs, as the model was evaluated.
    with jax.default_matmul_precision("float32" if dtype == "float32" else None):
        exported = jax.export.export(jax.jit(logits), platforms=("cpu", "cuda", "tpu"))(shape)
    path = directory / _file_name(dtype, "stablehlo")
    path.write_bytes(exported.serialize())
    again = jax.export.deserialize(bytearray(path.read_bytes()))
    return Written(path, lambda images: np.asarray(again.call(images)), f"JAX {jax.__version__}")


# -------------------------------------------------------------------------------------------------- ONNX


def write_onnx(model: Model, directory: Path, dtype: str = "float32") -> Written:
    """images [batch, channels, size, size] -> logits [batch, classes], through the PyTorch module; dynamic batch."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
        import torch

        from nvit_jax.formats import torch_vit
    except ImportError as error:
        raise UserError(f'config.export.formats: "onnx" needs pip install -e ".[onnx]" ({error})') from error
    kind = {"float32": torch.float32, "float16": torch.float16}[dtype]
    twin = torch_vit.ViT(model.dims.to_json())
    twin.load_state_dict(
        {name: torch.from_numpy(value) for name, value in interchange.to_torch(model.dims, model.params).items()}
    )
    twin = twin.to(kind).eval()
    size, channels = model.dims.image, model.dims.channels
    path = directory / _file_name(dtype, "onnx")
    large = sum(p.numel() * p.element_size() for p in twin.parameters()) > 1.9e9  # protobuf's limit is 2 GB
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells everybody that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about its own insides
        torch.onnx.export(
            twin,
            (torch.zeros(2, channels, size, size, dtype=kind),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=large,
            verbose=False,
        )
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        half = np.float16 if dtype == "float16" else np.float32
        return np.asarray(session.run(None, {"images": images.transpose(0, 3, 1, 2).astype(half)})[0], np.float32)

    return Written(path, run, f"onnxruntime {onnxruntime.__version__}")


def _onnx_matrices(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """As `_safetensors_matrices`. A graph multiplies by [inputs, outputs], or by the other way round if it says so."""
    import onnx

    graph = onnx.load(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in tensors:
            matrix = onnx.numpy_helper.to_array(tensors[node.input[1]])
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            yield node.input[1], matrix if turned else matrix.T


DTYPES = ("float32", "float16", "bfloat16")
FORMATS: dict[str, Callable[[Model, Path, str], Written]] = {
    "safetensors": write_safetensors,
    "stablehlo": write_stablehlo,
    "onnx": write_onnx,
}
# Of a StableHLO program none: it is dense for whatever compiles it.
_MATRICES: dict[str, Callable[[Path], Iterator[tuple[str, np.ndarray]]]] = {
    "safetensors": _safetensors_matrices,
    "onnx": _onnx_matrices,
}
