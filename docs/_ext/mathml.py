"""Equations as MathML, which browsers draw themselves: no script and no font is fetched, at build or in the browser."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

# Sizes are the browser's business; the converter does not know them.
_SIZES = re.compile(r"\\([bB]igg?[lrm]?|textstyle|displaystyle)(?![A-Za-z])")
_DOTS = re.compile(r"\\dots(?![A-Za-z])")
# To the converter \frac12 is twelve over whatever follows.
_DIGITS = re.compile(r"frac\s*(\d)\s*(\d)")
# Browsers put no space between a function and a letter.
_FUNCTIONS = re.compile(r"\\(log|det)\s*(?=[A-Za-z\d]|\\(?!left|,))")


def _mathml(translator: Any, node: nodes.Element, block: bool) -> str:
    tex = _DOTS.sub(r"\\ldots", _SIZES.sub("", node.astext())).strip()
    tex = _FUNCTIONS.sub(r"\\\1\\, ", _DIGITS.sub(r"frac{\1}{\2}", tex))
    if block and "\\\\" in tex and "\\begin" not in tex:
        tex = f"\\begin{{align}}{tex}\\end{{align}}"
    try:
        return tex2mathml(tex, as_block=block)
    except MathError as error:
        logger.warning("equation %r: %s", tex, error, location=node)
        return f"<code>{translator.encode(tex)}</code>"


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(translator, node, block=False))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{_mathml(translator, node, block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
