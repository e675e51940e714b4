"""The images of a folder in two halves by hash of the files' names: settings come from one, results from the other."""

import hashlib
import pathlib

import numpy as np

from nvit_jax.data import datasets
from nvit_jax.model.preprocessing import Preprocessing


def halves(
    images: pathlib.Path, classes: pathlib.Path, preprocessing: Preprocessing
) -> tuple[datasets.Split, datasets.Split]:
    """(to calibrate on, to judge on). A name alone decides: more files move none."""
    split = datasets.load_dataset(
        "folder", train=str(images), val=str(images), classes=str(classes), preprocessing=preprocessing
    ).split("train")
    names = [pathlib.PurePath(split.source.name(i)).name for i in range(len(split))]
    judged = np.array([hashlib.sha256(name.encode()).digest()[0] < 128 for name in names])
    return split.take(np.flatnonzero(~judged)), split.take(np.flatnonzero(judged))
