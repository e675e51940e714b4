"""The directive `tests-table`: what `markdown()` of a module of tests/ returns."""

import importlib.util
import pathlib
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

TESTS = pathlib.Path(__file__).parent.parent.parent / "tests"


class TestsTable(SphinxDirective):
    """`{tests-table} families`: the table of tests/families.py."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        spec: Any = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        target = nodes.section()
        target.document = self.state.document
        self.state.nested_parse(StringList(module.markdown(), f"tests/{name}.py"), 0, target)
        return target.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("tests-table", TestsTable)
    return {"parallel_read_safe": True}
