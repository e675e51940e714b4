"""How Sphinx builds these pages: `sphinx-build -W -b html docs docs/_build`. Nothing is fetched from the network."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import nvit_jax  # noqa: E402 - the path comes first

project = "nvit_jax"
author = "the maintainers of nvit_jax"
version = release = nvit_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "command_help",
    "config_keys",
    "public_names",
    "tests_table",
]
exclude_patterns = ["_build", "_ext"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3  # links such as results.md#the-demo

smartquotes = False  # --stage is no dash
default_role = "code"  # `name` in a docstring is code, as it is in Markdown
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"nvit_jax {release}"
copybutton_prompt_text = "$ "
