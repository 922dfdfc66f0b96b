"""How the site is built: `make docs`, offline, warnings are errors."""

from __future__ import annotations

import graphprune

project = "graphprune"
author = "the graphprune developers"
copyright = "the graphprune developers, Apache-2.0"
release = version = graphprune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build"]
html_theme = "furo"
html_title = "graphprune"
html_show_sphinx = False

myst_enable_extensions = ["colon_fence", "smartquotes"]
myst_heading_anchors = 3

# Docstrings put code between single backticks.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = False
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
