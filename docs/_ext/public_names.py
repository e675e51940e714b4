"""The directive `public-names`: autodoc for names of `nvit_jax`.

The comments of a dataclass's fields become their text, and the section "Args:" of a docstring becomes a list.
"""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from comments import Comments
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import nvit_jax


class PublicNames(SphinxDirective):
    """`{public-names} prune finetune`: functions and classes, each with its docstring."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name in self.arguments[0].split():
            kind = "autoclass" if inspect.isclass(getattr(nvit_jax, name)) else "autofunction"
            lines += ["```{eval-rst}", f".. {kind}:: nvit_jax.{name}", *_members(name), "```", ""]
        target = nodes.section()
        target.document = self.state.document
        self.state.nested_parse(StringList(lines, "nvit_jax/__init__.py"), 0, target)
        return target.children


def _members(name: str) -> list[str]:
    """Methods with a docstring, but not fields: these come with the class's own text, see `_fields`."""
    value = getattr(nvit_jax, name)
    if not inspect.isclass(value) or issubclass(value, Exception):
        return []
    fields = {f.name for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    fields |= set(getattr(value, "_fields", ()))
    own = [n for n, member in vars(value).items() if not n.startswith("_") and n not in fields and _said(member)]
    special = ["   :special-members: __call__"] if _said(vars(value).get("__call__")) else []
    return ([f"   :members: {', '.join(own)}"] if own else []) + special


def _said(member: Any) -> bool:
    return bool(getattr(getattr(member, "__func__", member), "__doc__", None))  # its own, not an inherited one


def _fields(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Behind the text of a class: its fields, with the comments of the source."""
    if what != "class" or not (dataclasses.is_dataclass(value) or hasattr(value, "_fields")):
        return
    source = textwrap.dedent(inspect.getsource(value))
    comments, tree = Comments(source), ast.parse(source).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = [node for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    public = [node for node in found if not node.target.id.startswith("_")]  # type: ignore[union-attr]
    if public:
        lines += ["", "Fields:", ""]
    for node in public:
        default = _default(node.value)
        said = comments.of(node)
        text = f"- ``{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{default}``"
        lines.append(text + (f": {_plain(said)}" if said else ""))
    lines.append("")


def _default(value: ast.expr | None) -> str:
    """What stands behind a field, where it says something."""
    text = "" if value is None else ast.unparse(value)
    return f" = {text}" if text and len(text) < 40 and not text.startswith("dataclasses.field") else ""


def _arguments(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """The lines indented below "Args:" as a list; a deeper line goes on with the one above."""
    if "Args:" not in [line.strip() for line in lines]:
        return
    start = [line.strip() for line in lines].index("Args:") + 1
    end = next((i for i in range(start, len(lines)) if lines[i].strip() and not lines[i].startswith(" ")), len(lines))
    body = [line for line in lines[start:end] if line.strip()]
    indent = min(len(line) - len(line.lstrip()) for line in body)
    found: list[str] = []
    for line in body:
        if len(line) - len(line.lstrip()) == indent:
            names, _, text = line.strip().partition(": ")
            found.append(f"- ``{names}``: {text}")
        else:
            found.append(f"  {line.strip()}")
    lines[start - 1 : end] = ["Arguments:", "", *found, ""]


def _plain(text: str) -> str:
    """Comments are no reStructuredText."""
    text = " ".join(text.split())
    for mark in ("\\", "*", "|", "_"):
        text = text.replace(mark, "\\" + mark)
    return text


def _signature(app: Any, what: str, name: str, value: Any, options: Any, signature: Any, returns: Any) -> Any:
    """None for a class whose fields are listed: they say it better."""
    listed = what == "class" and (dataclasses.is_dataclass(value) or hasattr(value, "_fields"))
    return ("", "") if listed else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", _arguments)
    app.connect("autodoc-process-docstring", _fields)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True}
