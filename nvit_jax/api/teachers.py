"""A classifier to learn from, fitted to the images of the student."""

import dataclasses
from typing import Any

import jax
import numpy as np

from nvit_jax.errors import UserError
from nvit_jax.model.dims import ViTDims
from nvit_jax.model.directory import Model
from nvit_jax.model.preprocessing import Preprocessing
from nvit_jax.model.regnet import RegNet, Teacher
from nvit_jax.model.sizes import words


@dataclasses.dataclass(frozen=True)
class _Renormalised:
    """A teacher that expects its own mean and std, on images normalised with the student's."""

    teacher: Teacher
    factor: np.ndarray
    offset: np.ndarray

    @property
    def params(self) -> Any:
        return self.teacher.params

    def logits(self, params: Any, images: jax.Array, dtype: Any = None) -> jax.Array:
        return self.teacher.logits(params, images * self.factor + self.offset, dtype)


def check_teacher(dims: Any, student: ViTDims, argument: str = "label_teacher") -> None:
    """UserError when a classifier of these dims tells other classes, or reads other images, than the student."""
    if dims.classes != student.classes or dims.channels != student.channels:
        raise UserError(
            f" tells {dims.classes} classes on {dims.channels} channels, the model {student.classes} on "
            f"{student.channels}",
            argument,
        )
    if isinstance(dims, ViTDims) and dims.image != student.image:
        raise UserError(f" reads images of {words(dims.image)} pixels, not {words(student.image)}", argument)


def fit_teacher(teacher: Model | RegNet, student: ViTDims, preprocessing: Preprocessing | None) -> Teacher:
    """`teacher` on the student's normalised images. Raises UserError when they do not go together."""
    check_teacher(teacher.dims, student)
    if preprocessing is None or teacher.info.get("preprocessing") is None:
        return teacher
    own = Preprocessing.from_json(teacher.info["preprocessing"])
    # (x / scale_t - mean_t) / std_t, with x / scale = student * std + mean
    ratio = preprocessing.scale / own.scale
    std, mean = np.array(preprocessing.std, np.float32), np.array(preprocessing.mean, np.float32)
    factor = ratio * std / np.array(own.std, np.float32)
    offset = (ratio * mean - np.array(own.mean, np.float32)) / np.array(own.std, np.float32)
    return _Renormalised(teacher, factor.astype(np.float32), offset.astype(np.float32))
