"""The frame of a page: head, table of contents, sections, script; one file, nothing fetched.

A content security policy in the page itself forbids every request, so a page that tried to fetch
something would show it as an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitnest.html.style import SCRIPT, style_sheet
from bitnest.html.svg import Markup, join, tag

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Section:
    """A part with a heading and a place in the table of contents; `name` is its anchor."""

    name: str
    title: str
    parts: Sequence[object]
    short: str = ""


def page(title: str, lead: object, sections: Sequence[Section], footer: str) -> str:
    """The whole document as text. Titles and names are escaped."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style_sheet())),
    )
    main = tag(
        "main",
        tag("header", tag("h1", title), tag("p", lead)),
        join(tag("section", tag("h2", s.title), *s.parts, id=s.name) for s in sections),
        tag("footer", footer),
    )
    body = tag(
        "body",
        tag("div", _contents(sections), main, class_="frame"),
        tag("div", id="tip", role="tooltip"),
        tag("script", Markup(SCRIPT)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _contents(sections: Sequence[Section]) -> Markup:
    links = join(tag("li", tag("a", s.short or s.title, href=f"#{s.name}")) for s in sections)
    return tag("nav", tag("b", "Contents"), tag("ol", links), aria_label="Contents")
