"""How weights are trained: schedule, objective, regularisation, precision. One recipe for every training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nvit_jax.data.augmentation import Augment
from nvit_jax.errors import UserError, check_choice
from nvit_jax.model.regnet import Teacher
from nvit_jax.parallel import BACKENDS
from nvit_jax.pruning.sparsity import SPARSITY
from nvit_jax.schema import Choice, Flag, Made, Maybe, Number, Shape, check_fields, whole
from nvit_jax.training import optim
from nvit_jax.training.losses import Objective

_SHAPES: dict[str, Shape] = {
    "epochs": Number(above=0, most=1e6),
    **dict.fromkeys(("learning_rate", "final_learning_rate", "weight_decay"), Number(0, 1e30)),
    "warmup_epochs": Number(0, 1e6),
    "clip_norm": Maybe(Number(1e-9, 1e9)),
    **dict.fromkeys(("dropout", "drop_path", "ema"), Number(0, below=1)),
    **dict.fromkeys(("batch", "learning_rate_batch", "accumulate"), Maybe(whole(1, 10**9))),
    **dict.fromkeys(("log_every", "save_every"), whole(1, 10**9)),
    **dict.fromkeys(("evaluate_every", "stream"), whole(0, 10**9)),
    "seed": whole(0, 2**32 - 1, "from 0 to 2**32 - 1"),
    "remat": Flag(),
    "matmul_precision": Maybe(Choice(("default", "bfloat16", "tensorfloat32", "float32", "high", "highest"))),
    "objective": Made(Objective, "an Objective"),
    "augment": Made(Augment, "an Augment"),
}
Loss = Callable[[jax.Array, dict[str, Any]], jax.Array]  # (logits [B, C], batch) -> [B]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW with a warm-up and a cosine; between prunings the rate is constant. Raises UserError for bad values."""

    epochs: float = 10.0  # not between prunings
    batch: int | None = None  # images; None: 64, or all that there are. Batches of a user's own keep their size
    learning_rate: float = 2e-4
    learning_rate_batch: int | None = None  # the rate is for this many images and scales with batch (DeiT: 512)
    warmup_epochs: float = 0.0
    final_learning_rate: float = 0.0
    weight_decay: float = 0.05  # of kernels alone
    clip_norm: float | None = None  # of the global gradient
    optimizer: optax.GradientTransformation | None = None  # in the place of all that
    objective: Objective = dataclasses.field(default_factory=Objective)
    label_teacher: Teacher | None = None  # a classifier to learn labels from, too (objective.teacher_alpha)
    dropout: float = 0.0
    drop_path: float = 0.0  # stochastic depth, rate of the last block
    ema: float = 0.0  # decay of the averaged weights that become the model; 0: the weights themselves
    augment: Augment = dataclasses.field(default_factory=Augment)
    sparsity: str | None = None  # "magnitude" or "gradient": 2 of 4 weights go by this score and stay away
    accumulate: int | None = None  # parts that a batch goes through the device in; None: one, on a CPU small ones
    remat: bool = False  # compute blocks again in the backward pass: less memory, about a third slower
    dtype: str = "float32"  # of compute: or "bfloat16"
    matmul_precision: str | None = None  # None: the device's default
    parallel: str = "jit"  # or "pmap", "fsdp"
    log_every: int = 20  # steps
    evaluate_every: int = 100  # steps; 0: never
    save_every: int = 100  # steps, where there is a directory
    keep: str = "last"  # or "best": the evaluated model with the highest top-1
    seed: int = 0
    stream: int = 3  # keeps the batches of one training apart from another's with the same seed

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, ("last", "best"))
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("parallel", self.parallel, BACKENDS)
        check_choice("sparsity", self.sparsity, (None, *SPARSITY))
        check_fields(self, _SHAPES)
        if self.optimizer is not None and not (hasattr(self.optimizer, "init") and hasattr(self.optimizer, "update")):
            raise UserError(f" is a {type(self.optimizer).__name__}; it must be an optax optimizer", "optimizer")
        if self.evaluate_every % self.log_every:
            text = f"={self.evaluate_every}: it must be a multiple of log_every={self.log_every}"
            raise UserError(text, "evaluate_every")

    @property
    def compute_dtype(self) -> Any:
        return jnp.dtype(self.dtype)

    def precision(self) -> Any:
        """Context of training; saliency has its own."""
        return jax.default_matmul_precision(self.matmul_precision)

    def schedule(self, batch: int, steps: int, per_epoch: int) -> optax.Schedule:
        """Learning rate by step."""
        rate = self.learning_rate * batch / (self.learning_rate_batch or batch)
        return optim.schedule(rate, steps, round(self.warmup_epochs * per_epoch), self.final_learning_rate)

    def make_optimizer(self, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """The optimizer, with the rate where it is not the user's own."""
        if self.optimizer is not None:
            return self.optimizer
        return optim.adamw(learning_rate, weight_decay=self.weight_decay, clip_norm=self.clip_norm)
