"""The directive `command-help`: what `nvit-jax COMMAND --help` prints."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from nvit_jax.run.cli import COMMANDS


class CommandHelp(SphinxDirective):
    """`{command-help} prune`"""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        text = COMMANDS[self.arguments[0]].usage()
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
