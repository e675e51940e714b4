"""An exported folder as hubs have them: the weights, and what lies beside them for libraries and for people.

The metadata of the weights' file hold the widths, and are what this project and vit.py read. config.json is for the
library that has a class for the model.
"""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from nvit_jax import paths
from nvit_jax.errors import UserError
from nvit_jax.files import checksum
from nvit_jax.formats import card, libraries
from nvit_jax.formats.weights import open_checkpoint
from nvit_jax.model.directory import Model, is_model

Path = pathlib.Path
BESIDE = ("vit.py", "config.json", "preprocessor_config.json", "README.md")


def check_place(directory: Path) -> None:
    """UserError unless a folder may be written there: to a new or an empty one, over one of ours, beside other things.

    A model directory would be loaded instead of it, and other people's files are not replaced.
    """
    if is_model(directory):
        raise UserError(f"{directory} is a model directory; give another one")
    weights = sorted(directory.glob("model*.safetensors"))
    ours = any(_is_ours(path) for path in weights)
    there = [directory / name for name in BESIDE if (directory / name).exists()]
    foreign = [path for path in (*there, *weights) if not ours or (path.name == "README.md" and not _is_card(path))]
    if foreign:
        raise UserError(f"{directory} holds {foreign[0].name}, which would be replaced; move it, or give another place")


def _is_ours(path: Path) -> bool:
    try:
        with open_checkpoint(path) as tensors:
            return "nvit_jax" in tensors.extra
    except UserError:
        return False


def _is_card(path: Path) -> bool:
    return card.MARK.encode() in paths.read(path, most=2**24)


def checksum_of(names: Iterable[str], read: Callable[[str], np.ndarray]) -> int:
    """Of tensors as float32, one at a time."""
    value = 0
    for name in sorted(names):
        value = checksum(read(name), value)
    return value


def write_weights(path: Path, model: Model, state: Mapping[str, np.ndarray], dtype: str) -> None:
    """A safetensors file, with all that is known of the model in its metadata."""
    from safetensors.numpy import save_file

    info = {k: model.info.get(k) for k in ("preprocessing", "classes", "variant")}
    info |= {k: model.info[k] for k in ("sparsity",) if k in model.info}
    with np.errstate(over="ignore"):  # what overflows is found when the file is run
        arrays = {name: value.astype(jnp.dtype(dtype)) for name, value in state.items()}
    told = {"checksum": checksum_of(arrays, lambda name: arrays[name].astype(np.float32))}
    facts = json.dumps({"dims": model.dims.to_json()} | told | info)
    save_file(arrays, path, metadata={"format": "pt", "nvit_jax": facts})


def write_for_timm(model: Model, directory: Path, results: Mapping[str, Any]) -> str:
    """What lies beside weights with timm's names; config.json makes timm build the model where it can.

    Returns a line that says which of both runs it: timm, or vit.py, and why.
    """
    home = libraries.timm_config(model)
    config = home.config or {"model_type": "nvit_jax", "dims": model.dims.to_json()}
    if home.config is None and model.classes:
        config["id2label"] = {str(i): name for i, name in enumerate(model.classes)}
    alone = _VIT.format(shape=", ".join(map(str, (model.dims.channels, *model.dims.sides))))
    if home.config is None:
        use = [f"timm has no class for it ({home.why}). The file vit.py, which needs PyTorch alone, runs it:", alone]
        note = f"timm has no class for it ({home.why}); vit.py runs it"
    else:
        use = ["With timm:", _TIMM, "Or with the file vit.py, which needs PyTorch alone:", alone]
        note = 'timm.create_model("local-dir:FOLDER", pretrained=True) loads it, and so does vit.py'
    library = "nvit_jax" if home.config is None else "timm"
    _write(model, directory, config, card.model_card(model, results, library, [*use, _OURS, _NVIT]))
    shutil.copyfile(Path(__file__).with_name("torch_vit.py"), directory / "vit.py")
    return note


def write_for_transformers(model: Model, directory: Path, results: Mapping[str, Any]) -> str:
    """What lies beside weights with transformers' names. Returns a line that says how they are loaded."""
    config = libraries.transformers_config(model).config or {}
    name = config["architectures"][0]
    use = ["With transformers:", _TRANSFORMERS.format(name=name), _OURS, _NVIT]
    _write(model, directory, config, card.model_card(model, results, "transformers", use))
    return f"transformers.{name}.from_pretrained(FOLDER) loads it"


_TIMM = """```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:USER/NAME
```"""
_TRANSFORMERS = """```python
from transformers import {name}

model = {name}.from_pretrained("FOLDER").eval()
```"""
_VIT = """```python
import torch
import vit

model = vit.load("model.safetensors")
logits = model(torch.zeros(1, {shape}))
```"""
_OURS = "With nvit_jax, which can prune and finetune it further:"
_NVIT = """```python
import nvit_jax as nvit

model = nvit.load("FOLDER")
```"""


def _write(model: Model, directory: Path, config: Mapping[str, Any], readme: str) -> None:
    texts = {"config.json": json.dumps(config, indent=2) + "\n", "README.md": readme}
    pre = model.preprocessing if model.dims.channels == 3 else None  # transformers' processors make three of one
    if pre is not None and (values := libraries.processor_config(pre)) is not None:
        texts["preprocessor_config.json"] = json.dumps(values, indent=2) + "\n"
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
