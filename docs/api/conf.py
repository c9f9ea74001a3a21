"""Sphinx configuration of the API reference. ``./scripts/test api`` builds it, every warning an error."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import django

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]
os.environ["DJANGO_SETTINGS_MODULE"] = "reference_settings"
django.setup()

import tribrick  # noqa: E402  after Django's settings

project = "Tribrick for Django"
author = "Tribrick"
version = release = tribrick.__version__

extensions = ["sphinx.ext.autodoc"]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

# A theme that comes with Sphinx and loads nothing from elsewhere.
html_theme = "alabaster"
html_theme_options = {"description": "API reference", "show_powered_by": False}
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False

# Every name of ours must lead somewhere. Others' are not linked: the reference is built without a network. Left out
# are also type variables and private bases.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!tribrick\.)\w+\..*"), ("py:.*", r"(.*\.)?(T|_\w+)")]
