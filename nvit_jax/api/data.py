"""load_dataset: images and labels by name."""

import re

from nvit_jax.api.arguments import checked
from nvit_jax.data import datasets
from nvit_jax.data.datasets import Dataset
from nvit_jax.errors import UserError
from nvit_jax.model.preprocessing import Preprocessing


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
      classes: a file that names one class folder a line, in the order of the model's labels; without it the folders of
        train are counted in alphabetical order.
      holdout: this part of the train folder, chosen by hash of the file name, is val.
      preprocessing: of image files; a model's own is `model.preprocessing`. The default is DeiT's at 224 pixels.

    `.split("train")`, "val" and "test" are what other functions take as batches. Raises UserError for an unknown name,
    data that cannot be read, an empty split or a single class.
    """
    try:
        return datasets.load_dataset(
            name, path, train=train, val=val, classes=classes, holdout=holdout, preprocessing=preprocessing
        )
    except UserError as error:  # below, it is config keys that are spoken of
        text = re.sub(r"(--)?(config\.)?\bdata\.(name|path|train|val|classes|holdout)\b", r"\3", str(error))
        raise UserError(text) from error
