"""HTML pages that load nothing from elsewhere: a template of the package with plotly.js and the data inside."""

from __future__ import annotations

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


def source(package: str, name: str) -> str:
    """Text of a file that belongs to ``package``.

    >>> source("sparseflow", "report.html.j2").startswith("<!doctype html>")
    True
    """
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def render(template: str, **context: Any) -> str:
    """The page of a Jinja template: names are escaped, an unknown one is an error, ``plotly_js`` is plotly.js itself.

    >>> render("<h1>{{ name }}</h1>", name="<b>")
    '<h1>&lt;b&gt;</h1>'
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(plotly_js=get_plotlyjs(), **context)
