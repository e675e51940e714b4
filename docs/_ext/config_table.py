"""Every config key with its default and its meaning, read from nvit_jax/run/config.py.

Defaults are those that `default_config()` returns. Types and descriptions are read from its source: what a key means
is the comment behind or above the line that sets it. So the page cannot differ from the code.
"""

import ast
import dataclasses
import inspect
from typing import Any

from comments import Comments

from nvit_jax.run import config
from nvit_jax.run.shapes import SHAPES
from nvit_jax.run.validation import TOGETHER

_HELPER = "_training"  # the function that makes the sections pretrain and finetune


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its default as one types it, what it may hold, and what the comments say."""

    name: str
    default: str
    values: str
    description: str


@dataclasses.dataclass(frozen=True)
class Section:
    """The keys of one top-level section, or those outside of sections (name "")."""

    name: str
    description: str
    keys: list[Key]


class _Reader:
    """Walks the assignments of `default_config` and notes type and comment by dotted key."""

    def __init__(self) -> None:
        source = inspect.getsource(config)
        self.comments = Comments(source)
        self.functions = {n.name: n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)}
        self.types: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.order: dict[str, int] = {}  # a ConfigDict is sorted by name; the page is in the order of the source

    def read(self, function: str, prefix: str) -> None:
        """Note what one function assigns; its ConfigDict stands under `prefix`."""
        names = {"c": prefix}  # variable -> dotted prefix
        for node in ast.walk(self.functions[function]):
            if isinstance(node, ast.For):
                self._loop(node, names)
            elif isinstance(node, ast.Assign):
                self._assign(node, names)

    def _assign(self, node: ast.Assign, names: dict[str, str]) -> None:
        keys = [self._key(target, names) for target in node.targets if isinstance(target, ast.Attribute)]
        for key in filter(None, keys):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names[target.id] = key
            self._note(key, node.value, self.comments.of(node))
            if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == _HELPER:
                self.read(_HELPER, key)

    def _loop(self, node: ast.For, names: dict[str, str]) -> None:
        """`for name in ("a", "b"): section[name] = ...`"""
        said = self.comments.above(node)
        for inner in node.body:
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Subscript):
                section = ast.unparse(inner.targets[0].value)
                prefix = names.get(section) or self._dotted(section, names)
                for name in ast.literal_eval(node.iter):
                    self._note(f"{prefix}.{name}", inner.value, self.comments.of(inner) or said)

    def _note(self, key: str, value: ast.expr, comment: str) -> None:
        self.order.setdefault(key, len(self.order))
        if comment:
            self.notes[key] = comment
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "placeholder":
            self.types[key] = ast.unparse(value.args[0])

    def _key(self, target: ast.Attribute, names: dict[str, str]) -> str | None:
        return self._dotted(ast.unparse(target), names)

    def _dotted(self, text: str, names: dict[str, str]) -> str | None:
        first, _, rest = text.partition(".")
        if first not in names:
            return None
        return f"{names[first]}.{rest}" if names[first] else rest


def sections() -> list[Section]:
    """Every section with its keys, in the order of config.py."""
    reader = _Reader()
    reader.read("default_config", "")
    found: dict[str, list[Key]] = {"": []}
    values = config.flatten_config(config.default_config())
    for name in sorted(values, key=lambda key: reader.order.get(key, reader.order.get(key.rpartition(".")[0], 0))):
        group = name.partition(".")[0] if "." in name else ""
        found.setdefault(group, []).append(_key(name, values[name], reader))
    return [Section(name, reader.notes.get(name, ""), keys) for name, keys in found.items()]


def _key(name: str, value: Any, reader: _Reader) -> Key:
    together = [f"{rule.words}" for rule in TOGETHER if rule.key == name]
    described = "; ".join(filter(None, [_description(name, reader), *together]))
    return Key(name, _default(name, value, reader), SHAPES[name].words, described)


def _default(name: str, value: Any, reader: _Reader) -> str:
    if value is None:
        kind = reader.types.get(name, "")
        return f"None ({kind})" if kind else "None"
    return repr(tuple(value)) if isinstance(value, list) else repr(value)


def _description(name: str, reader: _Reader) -> str:
    """The comment of the key, else that of the group it stands in (of a group inside a section only)."""
    parents = [name.rpartition(".")[0]] if name.count(".") > 1 else []
    return next((reader.notes[key] for key in (name, *parents) if key in reader.notes), "")
