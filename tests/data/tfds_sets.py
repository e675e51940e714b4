"""Sets of tensorflow-datasets made for a test."""

import pathlib


def prepare_tfds(place: pathlib.Path, image: dict, **splits) -> None:
    """Write the set "tiny" of the classes ant and bee in `place`: of each split its (key, example) pairs."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    # Every builder's name is kept for the life of the process; two tests make a "tiny".
    with registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = place

            def _info(self):
                label = tfds.features.ClassLabel(names=["ant", "bee"])
                features = tfds.features.FeaturesDict({"image": tfds.features.Image(**image), "label": label})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, manager):
                return splits

            def _generate_examples(self):
                raise NotImplementedError

    Tiny(data_dir=str(place), file_format="array_record").download_and_prepare()
