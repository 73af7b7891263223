"""Sphinx settings: MyST Markdown pages and an API reference from the docstrings.

    python -m sphinx -W -b html docs docs/_build
"""

import qsharp_jax

project = "qsharp_jax"
author = "the qsharp_jax authors"
copyright = "2026, the qsharp_jax authors"
version = release = qsharp_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "qsharp_jax"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
