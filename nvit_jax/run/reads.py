"""What a stage reads: config sections, results of earlier stages, files that the user names. And what changed."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nvit_jax.files import fingerprint
from nvit_jax.model.directory import OWN
from nvit_jax.paths import named
from nvit_jax.run.config import default_config, flatten_config

_COMMON = ("seed", "model", "data", "parallel", "dtype", "matmul_precision", "profile")
SECTIONS = {  # the config sections that a stage is handed, and so the keys that it is redone for
    "pretrain": ("seed", "data", "augment", "parallel", "dtype", "matmul_precision", "profile", "vit", "pretrain"),
    "latency": ("model", "dtype", "latency", "prune.profile"),
    "prune": (*_COMMON, "augment", "prune", "latency"),
    "finetune": (*_COMMON, "augment", "finetune"),
    "eval": ("model", "data", "parallel", "dtype", "latency", "eval"),
    "export": ("model", "export"),
    "report": (),
    "preview": ("seed", "model", "data", "augment", "vit"),
}
STAGES_READ: dict[str, tuple[str, ...]] = {  # the stages whose results a stage reads where they exist
    "pretrain": (),
    "latency": ("pretrain",),
    "prune": ("pretrain", "latency"),
    "finetune": ("pretrain", "prune"),
    "eval": ("pretrain", "prune", "finetune"),
    "export": ("pretrain", "prune", "finetune", "eval"),
    "report": ("pretrain", "latency", "prune", "finetune", "eval"),
    "preview": ("pretrain",),
}
# These take in whatever is new. The other stages are redone only when what they have read changed.
FOLLOW = ("eval", "export", "report", "preview")
_TEACHERS = ("pretrain.teacher", "prune.teacher", "finetune.teacher")
# What these keys name counts by its content, however its path is spelled.
FILES = ("model", "data.path", "data.classes", "pretrain.start", "latency.table", *_TEACHERS)
_PATHS = (*FILES, "data.train", "data.val")
# Where and how a stage runs, not what comes out: a begun stage may go on with another value, on other devices.
_FREE = ("parallel", "profile", "data.workers", "data.threads", "data.max_bad_fraction")
_FREE_IN_SECTIONS = ("accumulate", "remat", "save_every")


def handed(config: ConfigDict, name: str) -> ConfigDict:
    """The sections that a stage may read."""
    out = ConfigDict()
    for section in SECTIONS[name]:
        node, source = out, config
        *parents, last = section.split(".")
        for parent in parents:
            source = source[parent]
            if parent not in node:
                node[parent] = ConfigDict()
            node = node[parent]
        node[last] = source[last]
    return out


def contents(keys: Mapping[str, Any]) -> dict[str, str]:
    """{key: fingerprint} of what the keys of FILES name. Folders of images are too large to be read for that."""
    found = {}
    for key in FILES:
        if not keys.get(key):
            continue
        path = named(keys[key], f"config.{key}=")
        # In a model directory other files do not count; other directories may be large.
        parts = [path / name for name in OWN] if (path / "model.json").is_file() else [path] if path.is_file() else []
        if parts and (key != "data.path" or path.is_file()):
            files = [file for part in parts for file in ([part] if part.is_file() else sorted(part.rglob("*")))]
            facts = [(file, file.stat()) for file in files if file.is_file()]
            found[key] = _fingerprint(tuple((f, s.st_ino, s.st_size, s.st_mtime_ns) for f, s in facts))
    return found


@functools.lru_cache(maxsize=64)
def _fingerprint(files: tuple[tuple[pathlib.Path, int, int, int], ...]) -> str:
    return fingerprint(*(file for file, *_ in files))


class Changes(NamedTuple):
    """What a stage would read now that differs from what its record says."""

    keys: dict[str, tuple[Any, Any]]  # {config key: (then, now)}
    files: list[str]  # keys that name the same file, which has another content
    stages: list[str]  # whose results are others

    @property
    def any(self) -> bool:
        return bool(self.keys or self.files or self.stages)

    @property
    def names(self) -> str:
        return ", ".join([*self.files, *self.stages])

    @property
    def only_models(self) -> bool:
        """Nothing but the models, so that what was found out about each still holds."""
        return not self.keys and not set(self.files) - {"model", "latency.table"}


def changes(name: str, record: Mapping[str, Any], keys: Mapping[str, Any], inputs: Mapping[str, str]) -> Changes:
    """Between the record of a stage and what it would be begun with now."""
    then, defaults = record["inputs"], flatten_config(default_config())
    changed, other_content = {}, []
    for key, now in keys.items():
        before = record["keys"].get(key, defaults.get(key))  # the record may be older than a key
        same_content = key in FILES and key in then and then[key] == inputs.get(key)
        if before == now or (key in _PATHS and _same_path(before, now)):
            if key in FILES and key in then and key in inputs and not same_content:
                other_content.append(key)
        elif not same_content and not _is_free(key):
            changed[key] = (before, now)
    stages = [k for k, now in inputs.items() if k not in FILES and then.get(k, None if name in FOLLOW else now) != now]
    return Changes(changed, other_content, stages)


def _is_free(key: str) -> bool:
    return key in _FREE or key.rpartition(".")[2] in _FREE_IN_SECTIONS


def _same_path(one: Any, other: Any) -> bool:
    return bool(one and other) and pathlib.Path(one).resolve() == pathlib.Path(other).resolve()
