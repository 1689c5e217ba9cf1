"""Sphinx: ``python -m sphinx -q -E -W --keep-going -c docs -b html . docs/_build/html``.

The source folder is the repository, so that pages, notebooks and the files that they point at keep their places and
the links are the same on the site and in the repository.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER / "_ext")]

project = "ntkgp"
author = "The ntkgp developers"
copyright = author
try:
    release = version("ntkgp").split("+")[0]
except PackageNotFoundError:
    release = ""
version = release

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "docstrings", "mathml", "source_pages"]
html_math_renderer = "mathml"
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "docs/_*",
    "ntkgp",
    "benchmarks",
    "results",
    "scripts",
    "tests",
    "**/.ipynb_checkpoints",
]
templates_path = ["_templates"]

# Committed outputs are shown; nothing runs here. .ci/notebooks.py runs the notebooks, tests/test_docs.py the pages.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
nitpicky = True
# Names of this package must resolve; inventories of others would have to be fetched.
nitpick_ignore_regex = [("py:.*", r"(?!ntkgp\.).*"), ("py:class", r"ntkgp\..*\.[RT]")]
python_use_unqualified_type_names = True
add_module_names = False
maximum_signature_line_length = 88

html_theme = "furo"
html_title = "ntkgp"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
# The root of the site is the root of the repository: its index leads to docs/.
html_additional_pages = {"index": "redirect.html"}

from source_pages import linkcode_resolve  # noqa: E402, F401
