"""A page for every source file that the site points at: ``[text](../ntkgp/means.py)`` leads there."""

from __future__ import annotations

import importlib
import inspect
import posixpath
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "source"
SUFFIXES = (".py", ".toml")
_wanted: set[str] = set()


def _page(path: str, docname: str) -> str:
    """The address of a file's page, seen from a document."""
    _wanted.add(path)
    return posixpath.relpath(f"{FOLDER}/{path}.html", posixpath.dirname(docname) or ".")


class LinksToSources(SphinxTransform):
    """Links to source files lead to their pages instead of to downloads."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Replace the nodes before they are collected as downloads."""
        for node in list(self.document.findall(addnodes.download_reference)):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(self.env.docname), node["reftarget"]))
            if path.endswith(SUFFIXES):
                uri = _page(path, self.env.docname)
                node.replace_self(nodes.reference("", "", *node.children, internal=True, refuri=uri))


def _object(name: str) -> Any:
    """What a dotted name of the package means."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None


def _place(found: Any) -> tuple[str, int] | None:
    """File, from the root of the repository, and line of an object."""
    found = inspect.unwrap(found.fget) if isinstance(found, property) else inspect.unwrap(found)
    try:
        path = Path(inspect.getsourcefile(found) or "").resolve().relative_to(ROOT).as_posix()
        line = 1 if isinstance(found, ModuleType) else inspect.getsourcelines(found)[1]
    except (TypeError, ValueError, OSError):
        return None
    return path, line


def linkcode_resolve(domain: str, info: dict[str, Any]) -> str | None:
    """Where an object of the API reference is written; the pages of the reference are all in docs/api."""
    place = _place(_object(f"{info['module']}.{info['fullname']}"))
    return None if place is None else f"{_page(place[0], 'docs/api/index')}#L-{place[1]}"


def resolve(app: Sphinx, env: BuildEnvironment, node: Any, child: Any) -> Any:
    """A name of the package by another of its paths, or one that is in no page of the reference: its source."""
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not name.startswith("ntkgp."):
        return None
    found = _object(name)
    if found is None:
        return None
    domain = env.get_domain("py")
    for known, entry in domain.objects.items():  # type: ignore[attr-defined]
        if known.rpartition(".")[2] == name.rpartition(".")[2] and _object(known) is found:
            uri = f"{app.builder.get_relative_uri(node['refdoc'], entry.docname)}#{entry.node_id}"
            return nodes.reference("", "", child, internal=True, refuri=uri)
    place = _place(found)
    if place is None:
        return None
    uri = f"{_page(place[0], node['refdoc'])}#L-{place[1]}"
    return nodes.reference("", "", child, internal=True, refuri=uri)


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The pages of the files that something points at."""
    formatter = HtmlFormatter(linenos="inline", anchorlinenos=True, lineanchors="L", cssclass="highlight source")
    for path in sorted(_wanted):
        text = (ROOT / path).read_text(encoding="utf-8")
        body = f"<h1>{path}</h1>" + highlight(text, get_lexer_for_filename(path), formatter)
        yield f"{FOLDER}/{path}", {"title": path, "body": body}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect; what is wanted is collected in this process, so that every build reads all pages (-E) in one."""
    app.add_transform(LinksToSources)
    app.connect("missing-reference", resolve)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
