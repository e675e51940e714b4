"""JSON files beside a checkpoint, whose values are read with their types."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nvit_jax import paths
from nvit_jax.errors import UserError
from nvit_jax.files import read_json

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class Facts(NamedTuple):
    """A JSON object, and the words that say where it lies."""

    values: Mapping[str, Any]
    where: str

    def get(self, name: str, *kinds: type) -> Any:
        """The value, of one of the kinds; None where it is missing or null. UserError for another type."""
        value = self.values.get(name)
        if isinstance(value, tuple):
            value = list(value)
        if value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)):
            return value
        words = " or ".join(_KINDS[kind] for kind in kinds)
        raise UserError(f"{self.where}: {name}={value!r:.60} is not {words}")

    def at_least_one(self, name: str) -> int | None:
        """A whole number of at least 1."""
        value: int | None = self.get(name, int)
        if value is not None and value < 1:
            raise UserError(f"{self.where}: {name}={value} must be at least 1")
        return value

    def inner(self, name: str) -> "Facts":
        """An object inside; an empty one where it is missing."""
        return Facts(self.get(name, dict) or {}, f"{self.where}: {name}")


def read_beside(path: pathlib.Path, name: str) -> Facts | None:
    """A JSON file in the checkpoint's directory (config.json of a hub model); None when there is none. UserError."""
    file = path.with_name(name)
    if paths.kind(file) is None:
        return None
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}, not an object with settings")
    return Facts(value, str(file))


def read_processor(path: pathlib.Path) -> Facts | None:
    """Hugging Face's preprocessor_config.json beside a checkpoint; of models for images and texts transformers 5 writes
    a processor_config.json, which has it inside. None when there is neither. UserError."""
    both = read_beside(path, "processor_config.json")
    found = read_beside(path, "preprocessor_config.json")
    if found is None and both is not None and "image_processor" in both.values:
        found = both.inner("image_processor")
    return found
