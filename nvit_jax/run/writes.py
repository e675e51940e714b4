"""What a stage writes, and so may replace and remove; whatever else lies in a workdir is the user's."""

import dataclasses
import fnmatch
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nvit_jax import paths
from nvit_jax.errors import UserError
from nvit_jax.files import JSON_BYTES, list_files, parse_json, remove_empty
from nvit_jax.model.directory import OWN
from nvit_jax.run import records

Path = pathlib.Path
RECORD = "stage.json"


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Files of one stage, as patterns relative to its directory; a pattern of a directory is all that is in it."""

    files: tuple[str, ...]
    states: tuple[str, ...] = ()  # saved states; they are dropped when the stage is done
    resumes: tuple[str, ...] = ()  # what a stopped stage goes on from; without any of it, it begins again
    carries: tuple[str, ...] = ()  # what still holds when the stage is done anew for another model
    pages: tuple[str, ...] = ()  # beside the stages' directories

    @property
    def _names(self) -> set[str]:
        """Patterns of what lies in the directory itself."""
        return {pattern.split("/")[0] for pattern in (*self.files, *self.states)}

    def kept(self, directory: Path) -> bool:
        """Whether a stopped stage has something to go on from."""
        return any(_matches(file, self.resumes) for file in list_files(directory))

    def own(self, record: Mapping[str, Any] | None) -> Callable[[str], bool]:
        """Whether the stage has written a file: those that its record lists; of an unfinished one, or one of a
        version that kept no list, those that it would write."""
        if record is not None and "files" in record:
            listed = {*record["files"], RECORD}
            return lambda file: file in listed or _matches(file, self.states)
        return lambda file: _matches(file, (RECORD, *self.files, *self.states))

    def written(self, directory: Path) -> list[str]:
        """What a finished stage has left there."""
        return [file for file in list_files(directory) if _matches(file, self.files)]

    def taken(self, directory: Path) -> str | None:
        """The name of a file or directory that stands in the way of a stage that has not written anything yet."""
        for file in list_files(directory):
            first, *below = file.split("/")
            if any(fnmatch.fnmatch(first, name) for name in self._names):
                return f"{first}/" if below else first
        return None

    def clear(self, directory: Path, record: Mapping[str, Any] | None, but: Iterable[str] = ()) -> None:
        """Remove what the stage has written there, but for the patterns `but`, and its record."""
        own, spared = self.own(record), (RECORD, *but)
        self._remove(directory, [f for f in list_files(directory) if own(f) and not _matches(f, spared)])

    def drop_states(self, directory: Path) -> None:
        """Of a stage that is done."""
        self._remove(directory, [file for file in list_files(directory) if _matches(file, self.states)])

    def _remove(self, directory: Path, files: Iterable[str]) -> None:
        for file in files:
            (directory / file).unlink()
        for name in self._names:
            for place in directory.glob(name):
                remove_empty(place)


def _matches(file: str, patterns: Iterable[str]) -> bool:
    """What is written beside a file or directory before it takes its place counts as that."""
    parts = [re.sub(r"^\.(.+)\.(tmp|old)$", r"\1", part) for part in file.split("/")]
    for pattern in patterns:
        wanted = pattern.split("/")
        if len(parts) >= len(wanted) and all(fnmatch.fnmatch(a, b) for a, b in zip(parts, wanted, strict=False)):
            return True
    return False


def _model(place: str) -> tuple[str, ...]:
    return tuple(f"{place}/{name}" for name in OWN)


_STATES, _DAMAGED = ("state/[0-9]*",), ("state.damaged/[0-9]*",)
_LOGS = ("log.jsonl", "history.jsonl", "tensorboard/events.*", "profile/plugins", "metrics.json")
_TRAINING = Outputs(
    (*_model("model"), *_model("best"), *_DAMAGED, *_LOGS), states=_STATES, resumes=(*_STATES, *_DAMAGED)
)
_SNAPSHOTS = (*_model("snapshots/*/model"), *_model("snapshots/*/masked"))
OUTPUTS = {
    "pretrain": _TRAINING,
    "latency": Outputs(("table.json", "cells.json", "metrics.json"), resumes=("cells.json",)),
    "prune": dataclasses.replace(
        _TRAINING,
        files=(
            *_model("model"),
            *_model("masked"),
            *_SNAPSHOTS,
            "scores.npz",
            ".scores.*",
            "latency.json",
            *_DAMAGED,
            *_LOGS,
        ),
    ),
    "finetune": _TRAINING,
    "eval": Outputs(
        ("scores.json", "latency.json", "metrics.json"),
        resumes=("scores.json",),
        carries=("scores.json",),
        pages=("summary.json",),
    ),
    "export": Outputs(("safetensors", "transformers", "stablehlo", "onnx", "metrics.json")),
    "report": Outputs(("metrics.json",), pages=("report.html",)),
    "preview": Outputs(("metrics.json",), pages=("preview.html",)),
}


def read_record(directory: Path) -> dict[str, Any] | None:
    """stage.json; None where there is none. UserError for one that no stage has written."""
    path = directory / RECORD
    if not path.exists():
        return None
    return records.read(path)


def check_pages(workdir: Path, name: str) -> None:
    """UserError when a file that the stage writes beside the stages' directories is there and somebody else's."""
    for page in ("config.json", *OUTPUTS[name].pages):
        path = workdir / page
        known = page != "config.json" and read_record(workdir / name) is not None  # the stage has written it before
        if path.exists() and not known and not _is_ours(path):
            raise UserError(f"{path} was not written by this program; move it away or use another --workdir")
        if page == "config.json" and path.exists():
            records.read(path)


def _is_ours(path: Path) -> bool:
    """By what it looks like."""
    try:
        text = paths.read(path, most=JSON_BYTES).decode()
        if path.suffix == ".html":
            return any(
                mark in text[:4096] for mark in ('<meta name="generator" content="nvit_jax">', "<title>nvit_jax")
            )
        content = parse_json(text, str(path))
    except ValueError:  # UserError is one
        return False
    return isinstance(content, dict) and ("versions" in content or isinstance(content.get("dense"), dict))
