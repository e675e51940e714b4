"""load_dataset: images and labels by name."""

import logging
import re

from nvit_jax.api.arguments import checked
from nvit_jax.data import datasets
from nvit_jax.data.datasets import Dataset
from nvit_jax.errors import UserError
from nvit_jax.model.preprocessing import Preprocessing

_log = logging.getLogger("nvit_jax")


@checked
def load_dataset(
    name: str,
    path: str | None = None,
    *,
    train: str | None = None,
    val: str | None = None,
    classes: str | None = None,
    holdout: float | None = None,
    preprocessing: Preprocessing | None = None,
) -> Dataset:
    """ "digits" (1,797 scans that come with scikit-learn), "npz" (arrays in the file `path`), "folder" or "tfds:SET".

    Args:
      path: the .npz file; the folder of train/ and val/; the data_dir of tensorflow-datasets.
      train, val: folders of CLASS/IMAGE, in the place of path/train and path/val; splits of a tensorflow-datasets set,
        such as "train[:98%]".
      classes: a file that names one class folder a line, in the order of the model's labels; without it a model that
        knows its classes finds them by their names, and else the folders of train are counted in alphabetical order.
      holdout: this part of train, chosen by a hash of each example's path within the set, is val.
      preprocessing: of image files; a model's own is `model.preprocessing`. The default is DeiT's at 224 pixels.

    Images that lie in a folder itself, without folders of classes, have no labels; for a model without a classifier.
    `.split("train")`, "val" and "test" are what other functions take as batches. Raises UserError for an unknown name,
    data that cannot be read and an empty split.
    """
    try:
        data = datasets.load_dataset(
            name, path, train=train, val=val, classes=classes, holdout=holdout, preprocessing=preprocessing
        )
    except UserError as error:  # below, it is config keys that are spoken of
        raise UserError(_in_arguments(str(error))) from error
    for note in data.notes:
        _log.warning(_in_arguments(note))
    if data.overlap:
        _log.warning("%s images of val are in train, too: accuracies will be too high", data.overlap)
    return data


def _in_arguments(text: str) -> str:
    return re.sub(r"(--)?(config\.)?\bdata\.(name|path|train|val|classes|holdout)\b", r"\3", text)
