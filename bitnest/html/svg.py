"""Elements of HTML and SVG as strings that know whether they have been escaped.

`Markup` is text that is already safe; every other value is escaped where it enters an element, so a
name taken from a file cannot become a tag. Attribute names spell `-` as `_`; `class_` is `class`.

Left out: parsing, and checks that an element may stand where it stands.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

SMALL = 340  # drawings up to this width keep their text size on a phone, wider ones enlarge it
VOID = {"meta", "br", "hr", "col", "wbr"}


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """`value` as text of a page: `Markup` stays, everything else has <, >, & and quotes escaped."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Parts one after another, each escaped unless it is `Markup`."""
    return Markup("".join(escape(part) for part in parts))


def number(value: float) -> str:
    """A coordinate to a hundredth of a unit, without trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _attribute(name: str, value: object) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    return f' {name.rstrip("_").replace("_", "-")}="{html.escape(text, quote=True)}"'


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element; children are escaped unless they are `Markup`, attributes always.

    An attribute that is None is left away. Floats are coordinates, rounded by `number`.
    """
    inside = "".join(_attribute(k, v) for k, v in attributes.items() if v is not None)
    if name in VOID:
        return Markup(f"<{name}{inside}>")
    return Markup(f"<{name}{inside}>{join(children)}</{name}>")


def drawing(width: float, height: float, label: str, *children: object) -> Markup:
    """An SVG that scales with its place; `label` is what a screen reader says."""
    return tag(
        "svg",
        *children,
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=float(width),
        height=float(height),
        role="img",
        aria_label=label,
        class_="drawing small" if width <= SMALL else "drawing",
    )


def path(points: Iterable[tuple[float, float]]) -> str:
    """The `d` of a polyline through points."""
    steps = [f"{number(x)} {number(y)}" for x, y in points]
    return "M" + "L".join(steps) if steps else ""
