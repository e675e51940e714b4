"""The directive `config-keys`: a table of every config key, by sections."""

from typing import Any

from config_table import Section, sections
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class ConfigKeys(SphinxDirective):
    """Writes a table for each section."""

    def run(self) -> list[nodes.Node]:
        lines = [line for section in sections() for line in _markdown(section)]
        target = nodes.section()
        target.document = self.state.document
        self.state.nested_parse(StringList(lines, "nvit_jax/run/config.py"), 0, target, match_titles=True)
        return target.children


def _markdown(section: Section) -> list[str]:
    title = f"`{section.name}`" if section.name else "Outside of sections"
    lines = [f"## {title}", ""]
    if section.description:
        lines += [_safe(section.description), ""]
    lines += ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key in section.keys:
        cells = (f"`{key.name}`", f"`{key.default}`", _safe(key.values), _safe(key.description))
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return [*lines, ""]


def _safe(text: str) -> str:
    """Comments are no Markdown."""
    for plain, safe in (("*", r"\*"), ("_", r"\_"), ("<", "&lt;"), ("[", r"\[")):
        text = text.replace(plain, safe)
    return text


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True}
