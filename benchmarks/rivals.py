"""What nvit_jax is compared with: PyTorch (eager, fused attention, torch.compile) and onnxruntime. All are optional.

The PyTorch model is the single file that `nvit.export` writes; with "fused" its attention is PyTorch's own. NotRun says
why a rival could not take part: a package is missing, or has no build for the device.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Call
from nvit_jax.formats import interchange
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.model.groups import Params

TORCH = ("eager", "fused", "compile")
RIVALS = (*TORCH, "onnx")


class NotRun(Exception):
    """Why a rival is not there."""


def import_torch() -> Any:
    """PyTorch, on the device that JAX uses. NotRun otherwise."""
    try:
        import torch
    except ImportError as error:
        raise NotRun("PyTorch is not installed") from error
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise NotRun("this PyTorch has no GPU")
    if jax.default_backend() not in ("cpu", "gpu"):
        raise NotRun(f"PyTorch is not run on {jax.default_backend()}")
    return torch


def torch_device() -> str:
    """Where PyTorch runs."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def wait() -> None:
    """Until PyTorch's work on the GPU is done."""
    if torch_device() == "cuda":
        import_torch().cuda.synchronize()


def torch_model(dims: ViTDims, params: Params, how: str = "eager", dtype: str = "float32") -> Any:
    """The module that is exported, on the device, with the weights; `how` is one of TORCH."""
    torch = import_torch()
    from nvit_jax.formats import torch_vit

    module = torch_vit.ViT(dims.to_json())
    state = interchange.to_torch(dims, params)
    module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    module = module.to(device=torch_device(), dtype=getattr(torch, dtype))
    if how != "eager":
        for block in module.blocks:
            if block.attn.heads:
                block.attn.forward = _fused.__get__(block.attn)
    return compiled(module) if how == "compile" else module


def _fused(self: Any, x: Any) -> Any:
    """Attention.forward of torch_vit.py by PyTorch's own kernel; widths of queries and values may differ."""
    from torch.nn import functional

    q, k, v = (
        part.unflatten(-1, (self.heads, width // self.heads)).transpose(1, 2)
        for part, width in zip(self.qkv(x).split(self.widths, -1), self.widths, strict=True)
    )
    z = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
    return self.proj(z.transpose(1, 2).flatten(2))


def compiled(module: Any) -> Any:
    """torch.compile; NotRun comes with the first call, see `tried`."""
    return import_torch().compile(module)


def tried(make: Callable[[], Call]) -> Call:
    """A rival's call that has run once. NotRun, in one line, when it fails: it may not spoil the others' results."""
    try:
        call = make()
        call()
    except NotRun:
        raise
    except Exception as error:  # whatever a compiler of theirs says
        raise NotRun(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}") from error
    return call


def torch_inference(dims: ViTDims, params: Params, images: np.ndarray, dtype: str, how: str) -> Call:
    """The logits of a batch that lies on the device."""
    torch = import_torch()
    module = torch_model(dims, params, how, dtype).eval()
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device=torch_device(), dtype=getattr(torch, dtype))

    def call() -> Any:
        with torch.inference_mode():
            found = module(x)
        wait()
        return found

    return call


def onnx_inference(dims: ViTDims, params: Params, images: np.ndarray, dtype: str) -> Call:
    """onnxruntime on the exported file; on the CPU, or on the GPU where this onnxruntime has one."""
    if dtype != "float32":
        raise NotRun(f"the ONNX file is not written in {dtype}")
    try:
        import onnxruntime

        from nvit_jax.formats.programs import write_onnx
    except ImportError as error:
        raise NotRun("onnxruntime is not installed") from error
    wanted = "CUDAExecutionProvider" if jax.default_backend() == "gpu" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise NotRun(f"this onnxruntime has no {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        written = write_onnx(Model(dims, params), Path(folder))
        session = onnxruntime.InferenceSession(str(written.path), providers=[wanted])
    feed = {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
    return lambda: session.run(None, feed)


def inference(name: str, dims: ViTDims, params: Params, images: np.ndarray, dtype: str) -> Call:
    """The call of one of RIVALS, run once. NotRun."""
    if name == "onnx":
        return tried(lambda: onnx_inference(dims, params, images, dtype))
    return tried(lambda: torch_inference(dims, params, images, dtype, name))
