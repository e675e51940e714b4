"""Every test sees 4 virtual CPU devices; compiled programs are kept in a cache beside the tests."""

import fcntl
import json
import os
import pathlib
import resource
import sys

# Compiling takes most of the tests' time; a quarter less of it. With 0 programs are optimized as in a run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import pytest

import main
from nvit_jax.model import vit
from nvit_jax.model.dims import Units, ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.model.masks import check_masks, full_masks

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny.py")
CACHE = {"jax_compilation_cache_dir": str(ROOT / ".jax_cache"), "jax_persistent_cache_min_compile_time_secs": 0.2}
# Of a run in a process of its own: the CPU, and the same cache.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"} | {name.upper(): str(value) for name, value in CACHE.items()}
jax.config.update("jax_num_cpu_devices", 4)
for name, value in CACHE.items():
    jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_go():
    """Those of a file of tests, once the process is large: it would grow to 6 GB."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 3 * 2**20:
        jax.clear_caches()


@pytest.fixture
def x64():
    """float64 inside the test."""
    with jax.enable_x64(True):
        yield


def small_dims(**changes) -> ViTDims:
    """A ViT that compiles in about a second."""
    values = {"image": 8, "patch": 4, "channels": 1, "classes": 5, "embed": 8, "depth": 2, "heads": 2, "mlp": 12}
    return ViTDims.uniform(**(values | changes))


# Of `small_dims`: every kind of model that there is.
VARIANTS = {
    "plain": {},
    "distilled": {"dist_token": True},
    "registers": {"registers": 3},
    "layer_scale": {"layer_scale": True},
    "mean_pool": {"pool": "mean", "cls_token": False},
    "mean_pool_all_after_norm": {"pool": "mean", "mean_over": "all", "norm_after_pool": True},
    "patch_positions": {"positions": "patches", "registers": 1},
    "no_positions": {"positions": "none"},
    "rgb_tanh_no_qkv_bias": {"channels": 3, "activation": "gelu_tanh", "qkv_bias": False},
    "pre_logits": {"pre_logits": 7},
    "odd_image": {"image": 15, "patch": 5},
    "wide_heads": {"qk": 6, "v": 3},
    "gated": {"gated": True, "activation": "silu"},
    "class_mean": {"pool": "class_mean", "registers": 2},
    "rms": {"norm": "rms", "norm_count": 9},
    "qk_norm": {"qk_norm_count": 5},
    "rotary": {"rotary": 4, "qk": 4, "rotary_base": 7.0, "positions": "none", "registers": 1},
    "rotary_qk_norm": {"rotary": 4, "qk": 3, "qk_norm_count": 8, "qkv_bias": False, "image": (8, 12), "pool": "map"},
    "beit": {"relative": True, "positions": "none", "pool": "mean", "norm_after_pool": True, "layer_scale": True},
    "eva02": {"rotary": 4, "qk": 4, "rotary_grid": 3, "rotary_base": 50.0, "gated": True, "activation": "silu"}
    | {"proj_norm_count": 17, "fc2_norm_count": 13},
    "clip": {"pre_norm": True, "patch_bias": False, "projection": 6, "classes": 0, "activation": "quick_gelu"},
    "siglip": {"pool": "map", "cls_token": False, "classes": 0},
    "map": {"pool": "map", "registers": 1, "mean_over": "all", "pool_heads": 3, "pool_width": 9, "pool_mlp": 7},
    "max": {"pool": "max", "norm_after_pool": True},
    "avgmax": {"pool": "avgmax", "mean_over": "all"},
    "rectangle": {"image": (8, 12), "patch": (4, 2), "channels": 2},
}


def random_params(dims: ViTDims, seed: int = 0, dtype=np.float64):
    """Normal values everywhere, norms and biases included, so that no term of an equality is trivially 0."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: (0.4 * rng.standard_normal(s.shape) + 0.1).astype(dtype), vit.shapes(dims))
    for block in params.values():
        if "rotary" in block:  # the numbers of pairs
            numbers = np.zeros_like(block["rotary"]) + np.arange(block["rotary"].shape[1])
            block["rotary"] = rng.permuted(numbers, axis=1).astype(dtype)
    return params


def random_images(dims: ViTDims, batch: int = 3, seed: int = 0, dtype=np.float64) -> np.ndarray:
    shape = (batch, *dims.sides, dims.channels)
    return np.random.default_rng([seed, 1]).standard_normal(shape).astype(dtype)


PREPROCESSING = {
    "size": 16,
    "scale": 255.0,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "resize": 20,
    "interpolation": "bicubic",
}


def ragged(**changes):
    """A model whose blocks differ in every width, with random weights."""
    values = {
        "image": 16, "patch": 4, "classes": 7, "embed": 18, "heads": (2, 1), "qk": (5, 3), "v": (4, 6), "mlp": (9, 20),
        "qk_scale": 0.3, "dist_token": True,
    }  # fmt: skip
    dims = ViTDims(**(values | changes))
    info = {"preprocessing": PREPROCESSING, "classes": [f"class {i}" for i in range(7)], "variant": None}
    return Model(dims, random_params(dims, dtype=np.float32), info=info)


def run_forward(dims: ViTDims, params, images, masks=None, **options):
    """vit.forward, compiled."""
    return np.asarray(jax.jit(lambda p, x, m: vit.forward(dims, p, x, m, **options))(params, images, masks))


def random_masks(dims: ViTDims, rng: np.random.Generator, kinds=("embed", "head", "qk", "v", "mlp")) -> Units:
    """Masks that leave a dense model: any units, but the same number of query/key (value) dims in all live heads.

    With the kind "part" every other attention and mlp goes whole.
    """
    masks = full_masks(dims)

    def some(count: int) -> np.ndarray:
        return rng.permutation(count)[: rng.integers(min(count, 1), count + 1)]

    def only(mask: np.ndarray, kept: np.ndarray) -> None:
        values = np.zeros_like(mask)
        values[kept] = mask[kept]
        mask[:] = values

    if "embed" in kinds:
        only(masks.embed, some(dims.embed))
    for i in range(dims.depth):
        if "head" in kinds:
            only(masks.head[i], some(dims.heads[i]))
        for kind, width in (("qk", dims.qk[i]), ("v", dims.v[i])):
            if kind in kinds and width:
                count = rng.integers(1, width + 1)
                for head in range(dims.heads[i]):
                    only(getattr(masks, kind)[i, head], rng.permutation(width)[:count])
        if "mlp" in kinds:
            only(masks.mlp[i], some(dims.mlp[i]))
        for kind in ("head", "mlp"):
            if "part" in kinds and rng.integers(2):
                getattr(masks, kind)[i] = 0
    return check_masks(masks, dims)


def call(*arguments, config=TINY) -> int:
    """main.py; its exit code."""
    sys.modules.pop("config_config", None)  # ml_collections would run a second config in the first one's module
    return main.main(["main.py", "--config", config, *[str(a) for a in arguments]])


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> pathlib.Path:
    """A workdir in which every stage ran, with a comparison. Tests copy it. One for all processes of pytest."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    workdir = shared / "finished" / "W"
    with open(shared / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "report.html").exists():
            assert call("--workdir", workdir, "--config.compare=('magnitude',)") == 0
    return workdir


@pytest.fixture(scope="session")
def digits_model():
    """A ViT of two narrow blocks with random weights that knows how digits are normalised."""
    import nvit_jax as nvit

    dims = nvit.ViTDims.uniform(image=8, patch=4, channels=1, classes=10, embed=32, depth=2, heads=2, mlp=64)
    info = {"preprocessing": nvit.load_dataset("digits").preprocessing.to_json()}
    return nvit.Model(dims, vit.init(dims, jax.random.key(0), std=0.1, position_std=0.5), info=info)
