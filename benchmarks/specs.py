"""What the table of each benchmark holds: its rows, its columns, and the commands that measure them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

PLATFORMS = ("cpu", "gpu")
Row = dict[str, Any]


def short(value: float) -> str:
    """1234.5 -> 1,234; 12.345 -> 12.3"""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


class Column(NamedTuple):
    """A title, where the number stands in a row ("over.eager.cpu"), how it is shown, and who it may be missing for."""

    title: str
    path: str
    show: Callable[[Any], str] = short
    rival: str = ""


class Table(NamedTuple):
    """The keys that say what a row is of, the columns; by platform the rows that must be there, and what measures them.

    `words` are the command lines behind `python -m benchmarks.NAME`; one without words where there are none.
    """

    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    expected: dict[str, list[Row]]
    words: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 - of a NamedTuple


def percent(value: float) -> str:
    """0.123 -> 12.3 %"""
    return f"{100 * value:.1f} %"


def gib(value: float) -> str:
    """Bytes."""
    return f"{value / 2**30:.2f}"


def times_as_fast(value: float) -> str:
    """1.234 -> 1.23x"""
    return f"{value:.2f}x"


LOAD = Column("load", "run.load", lambda v: f"{v:.1f}")


def _rows(**axes: Sequence[Any]) -> list[Row]:
    """Every combination, the first axis outermost."""
    found: list[Row] = [{}]
    for name, values in axes.items():
        found = [row | {name: value} for row in found for value in values]
    return found


MODELS = ("dense", "nvit_b", "nvit_b_odd", "nvit_s")
PREDICTED = ("predicted_0.7", "predicted_0.54", "predicted_0.4")
OVERS = (("eager", "PyTorch eager"), ("fused", "fused"), ("compile", "compile"), ("onnx", "onnxruntime"))
STEPS = ("pretrain", "finetune", "prune", "prune, taylor collected", "score fisher", "score taylor", "score hvp",
         "PyTorch eager", "PyTorch compile")  # fmt: skip
THEIRS = ("Torch-Pruning Taylor", "Torch-Pruning Hessian")
SCORES = ("fisher", "fisher, remat", "taylor", "taylor, remat", "gradient", "an hvp probe", *THEIRS)
PASSES = ("forward", "gradient")
PARTED = ("forward", "pretrain", "score fisher", "score hvp")
STAGES = ("pretrain", "finetune", "prune", "score fisher", "score taylor", "score hvp")
TABLES = {
    "inference": Table(
        ("of", "model", "dtype", "batch"),
        (
            Column("MACs", "macs_ratio", lambda v: f"{v:.3f}"),
            Column("ms", "times.nvit_jax.ms"),
            Column("CPU ms", "times.nvit_jax.cpu_ms"),
            Column("images/s", "images_per_second"),
            Column("of the peak", "mfu", percent),
            Column("dense = 1", "over_dense.nvit_jax.wall", times_as_fast),
            Column("predicted", "predicted_ratio", lambda v: f"{v:.3f}"),
            *(Column(title, f"over.{name}.wall", times_as_fast, name) for name, title in OVERS),
            Column("eager, CPU time", "over.eager.cpu", times_as_fast, "eager"),
            Column("noise", "noise", percent),
        ),
        {
            "cpu": _rows(of=("deit_tiny",), model=MODELS, dtype=("float32",), batch=(1, 8, 32, 256))
            + _rows(of=("deit_small", "deit_base"), model=MODELS, dtype=("float32",), batch=(1, 32))
            + _rows(of=("deit_tiny",), model=PREDICTED, dtype=("float32",), batch=(32,)),
            "gpu": _rows(of=("deit_tiny", "deit_small", "deit_base"), model=MODELS, dtype=("bfloat16",), batch=(256,))
            + _rows(of=("deit_base",), model=("predicted_0.54",), dtype=("bfloat16",), batch=(256,))
            + _rows(of=("deit_base",), model=("dense", "nvit_b"), dtype=("bfloat16",), batch=(1, 8, 32))
            + _rows(of=("deit_base",), model=("dense",), dtype=("float32",), batch=(256,)),
        },
        {
            "cpu": (
                "--models deit_tiny --batch 1 8 32 256",
                "--models deit_small deit_base --batch 1 32",
                "--models deit_tiny --batch 32 --predict 0.7 0.54 0.4",
            ),
            "gpu": (
                "--models deit_tiny deit_small deit_base --batch 256 --dtypes bfloat16",
                "--models deit_base --batch 256 --dtypes bfloat16 --predict 0.54",
                "--models deit_base --batch 1 8 32 --dtypes bfloat16 --pruned nvit_b",
                "--models deit_base --batch 256 --dtypes float32 --pruned",
            ),
        },
    ),
    "training": Table(
        ("step", "model", "dtype", "batch"),
        (
            Column("ms", "ms"),
            Column("CPU ms", "cpu_ms"),
            Column("images/s", "images_per_second"),
            Column("of the peak", "mfu", percent),
            Column("plain step = 1", "speed", times_as_fast),
            Column("PyTorch eager", "over.PyTorch eager.wall", times_as_fast),
            Column("compile", "over.PyTorch compile.wall", times_as_fast),
            Column("eager, CPU time", "over.PyTorch eager.cpu", times_as_fast),
            Column("noise", "noise", percent),
        ),
        {
            "cpu": _rows(step=STEPS, model=("deit_tiny",), dtype=("float32",), batch=(32,)),
            "gpu": _rows(step=STEPS, model=("deit_base",), dtype=("bfloat16",), batch=(128,)),
        },
        {"cpu": ("--models deit_tiny --batch 32",), "gpu": ("--models deit_base --batch 128 --dtype bfloat16",)},
    ),
    "scores": Table(
        ("what", "model", "batch"),
        (
            Column("images", "images", lambda v: f"{v:,}"),
            Column("s", "seconds"),
            Column("CPU s", "cpu_seconds"),
            Column("Torch-Pruning Taylor", "over.Torch-Pruning Taylor.wall", times_as_fast),
            Column("its Hessian", "over.Torch-Pruning Hessian.wall", times_as_fast),
            Column("in gradients", "wall_gradients"),
            Column("noise", "noise", percent),
        ),
        {
            "cpu": _rows(what=SCORES, model=("deit_tiny",), batch=(25,)),
            "gpu": _rows(what=("fisher", "fisher, remat", *THEIRS), model=("deit_base",), batch=(64,))
            + _rows(what=("an hvp probe",), model=("deit_base",), batch=(32,)),
        },
        {
            "cpu": ("--model deit_tiny --images 500 --batch 25",),
            "gpu": (
                '--model deit_base --images 2048 --batch 64 --ours fisher "fisher, remat"',
                '--model deit_base --images 64 --batch 32 --ours gradient "hvp, 1 probe" "hvp, 3 probes" --theirs',
            ),
        },
    ),
    "decision": Table(
        ("model", "rule", "limit", "profile", "kinds"),
        (
            Column("units", "units", lambda v: f"{v:,}"),
            Column("groups", "groups", lambda v: f"{v:,}"),
            Column("s", "ms", lambda v: f"{v / 1e3:.3f}"),
            Column("CPU s", "cpu_ms", lambda v: f"{v / 1e3:.3f}"),
            Column("widths", "widths", lambda v: f"`{v}`"),
            Column("noise", "noise", percent),
        ),
        {
            "cpu": _rows(
                model=("deit_base", "vit_huge"),
                rule=("per_cost", "solve"),
                limit=("macs", "latency"),
                profile=("gpu",),
                kinds=("blocks",),
            ),
        },
    ),
    "waiting": Table(
        ("what", "config"),
        (
            Column("s", "ms", lambda v: f"{v / 1e3:.2f}"),
            Column("CPU s", "cpu_ms", lambda v: f"{v / 1e3:.2f}"),
            Column("noise", "noise", percent),
        ),
        dict.fromkeys(
            PLATFORMS,
            _rows(what=("import jax", "import nvit_jax", "help", "run help"), config=("",))
            + _rows(what=("cold", "warm"), config=("demo", "deit_tiny", "deit_base")),
        ),
        dict.fromkeys(PLATFORMS, ("--configs demo deit_tiny deit_base",)),
    ),
    "growth": Table(
        ("axis", "size", "accumulate", "backend"),
        (
            Column("ms", "ms"),
            Column("memory, MiB", "working", lambda v: f"{v / 2**20:,.0f}"),
            Column("exponent of time", "ms_exponent", lambda v: f"{v:.2f}"),
            Column("at the end", "ms_last", lambda v: f"{v:.2f}"),
            Column("of memory", "working_exponent", lambda v: f"{v:.2f}"),
            Column("of MACs", "macs_exponent", lambda v: f"{v:.2f}"),
            Column("sent, parameters = 1", "bytes_over_params", lambda v: f"{v:.2f}"),
            Column("operations", "operations", str),
        ),
        {
            "cpu": [
                *_rows(axis=("depth", "width", "tokens", "batch", "units"), size=("exponent",)),
                *_rows(axis=("devices",), size=(1, 2, 4), accumulate=(1, 4), backend=("jit",)),
            ]
        },
    ),
    "parts": Table(
        ("what", "model", "batch", "part"),
        (
            Column("ms", "ms"),
            Column("CPU ms", "cpu_ms"),
            Column("whole batch = 1", "speed", times_as_fast),
            Column("noise", "noise", percent),
        ),
        {
            "cpu": _rows(what=PARTED, model=("deit_tiny",), batch=(32,), part=(32, 16, 8, 4, 2, 1))
            + _rows(what=PARTED, model=("deit_base",), batch=(8,), part=(8, 4, 2, 1)),
        },
        {"cpu": ("--model deit_tiny --batch 32", "--model deit_base --batch 8")},
    ),
    "attention": Table(
        ("of", "qk", "v", "how", "heads", "dtype", "batch"),
        (
            Column("ms", "ms"),
            Column("CPU ms", "cpu_ms"),
            Column("nvit_jax = 1", "speed", times_as_fast),
            Column("noise", "noise", percent),
        ),
        {
            "cpu": _rows(
                of=PASSES, qk=(64,), v=(64,), how=("nvit_jax", "xla"), heads=(3,), dtype=("float32",), batch=(16,)
            ),
            "gpu": _rows(
                of=PASSES,
                qk=(64,),
                v=(64,),
                how=("nvit_jax", "xla", "cudnn"),
                heads=(12,),
                dtype=("bfloat16",),
                batch=(256,),
            ),
        },
        {"gpu": ("--heads 12 --batch 256 --dtype bfloat16",)},
    ),
    "memory": Table(
        ("model", "widths", "stage", "dtype", "batch", "remat"),
        (
            Column("arguments, GiB", "arguments", gib),
            Column("temporaries", "temporaries", gib),
            Column("all", "total", gib),
            Column("measured", "measured_peak", gib),
        ),
        dict.fromkeys(
            PLATFORMS,
            _rows(
                model=("deit_base",),
                widths=("dense", "ragged"),
                stage=STAGES,
                dtype=("bfloat16",),
                batch=(128,),
                remat=(False, True),
            ),
        ),
        dict.fromkeys(PLATFORMS, ("--model deit_base --batch 128",)),
    ),
}
