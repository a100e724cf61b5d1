"""How Sphinx builds these pages: ``make docs``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "_ext")]

from sphinx.ext.autodoc.mock import mock

from fisherprune import __version__

# What integrations import: their pages need no library, and none is loaded.
LIBRARIES = ["accelerate", "laplace", "lightning", "pytorch_lightning"]
LIBRARIES += ["torch_pruning", "transformers"]
stand_ins = mock(LIBRARIES)
stand_ins.__enter__()

project = "fisherprune"
author = "The fisherprune authors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "api_pages",
    "command_pages",
    "criteria_table",
    "example_pages",
    "mathml",
]
exclude_patterns = ["_build", "_ext", "_static"]

myst_enable_extensions = ["deflist", "dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are not documented twice
napoleon_use_rtype = False
napoleon_custom_sections = [("Reference", "References")]
maximum_signature_line_length = 72
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "fisherprune"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
