"""HTML pages that load nothing from elsewhere: a template of the package with plotly.js and the data inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

OKABE_ITO = {
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
}
"""Colours that people with any colour vision tell apart and that stand out on white and on black, so without yellow
(Okabe and Ito, Color Universal Design, 2008)."""
GREY = "#999999"
_SHARED = "sparseflow"
_SCRIPTS = ("text.js", "plots.js", "tables.js")


def source(package: str, name: str) -> str:
    """Text of a file that belongs to ``package``.

    >>> source("sparseflow", "report.html.j2").startswith("<!doctype html>")
    True
    """
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def render(template: str, **context: Any) -> str:
    """The page of a Jinja template: names are escaped, an unknown one is an error, ``plotly_js`` is plotly.js itself.

    It may extend the templates in ``sparseflow/assets``.

    >>> render("<h1>{{ name }}</h1>", name="<b>")
    '<h1>&lt;b&gt;</h1>'
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    shared = jinja2.FunctionLoader(lambda name: source(_SHARED, f"assets/{name}"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=shared)
    return environment.from_string(template).render(plotly_js=get_plotlyjs(), **context)


def page(package: str, scripts: Sequence[str], data: Any, **context: Any) -> str:
    """The page in ``assets/page.html.j2`` of ``package``, which extends ``shell.html.j2``.

    It gets the styles and scripts of all pages, then its own ``page.css`` and ``scripts``, and ``data`` as JSON. A
    number that is not finite raises ``ValueError``.
    """
    return render(
        source(package, "assets/page.html.j2"),
        styles=source(_SHARED, "assets/base.css") + source(package, "assets/page.css"),
        scripts="\n".join(
            [source(_SHARED, f"assets/{name}") for name in _SCRIPTS]
            + [source(package, f"assets/{name}") for name in scripts]
        ),
        data=embedded(data),
        **context,
    )


def embedded(data: Any) -> str:
    """``data`` as JSON that can stand in a ``<script>``: no text in it ends the script.

    >>> embedded({"name": "</script>"})
    '{"name":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
