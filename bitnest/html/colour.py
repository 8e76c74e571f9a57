"""Colour scales computed in OKLCH, once for paper-white pages and once for dark ones.

    OKLab (L, a, b), a = C cos h, b = C sin h
    (l, m, s) = (M2 (L, a, b))^3,  linear RGB = M1 (l, m, s)        (Björn Ottosson, 2020)

Lightness runs from the page to the far end in near equal steps, so equal steps of a value look
like equal steps of colour: yellow, teal, blue, indigo on white; indigo to yellow on black, the
order of viridis. A colour outside sRGB gives up chroma, never lightness. Levels are CSS classes
(`q0` .. `q31`, `d0` .. `d24`), so that a drawing follows the reader's colour scheme and a cell
costs a few bytes.

The anchors of the scales and the two palettes are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SEQUENTIAL = 32  # levels q0 .. q31
DIVERGING = 25  # levels d0 .. d24, d12 in the middle
PALETTE = 8  # c0 .. c7
TIERS = 4  # t0 .. t3

Anchor = tuple[float, float, float]  # lightness, chroma, hue in degrees

LIGHT_RAMP: Sequence[Anchor] = (
    (0.97, 0.025, 100), (0.83, 0.09, 160), (0.67, 0.115, 205), (0.48, 0.125, 255),
    (0.29, 0.11, 285),
)  # fmt: skip
DARK_RAMP: Sequence[Anchor] = (
    (0.25, 0.05, 285), (0.42, 0.12, 265), (0.60, 0.11, 215), (0.77, 0.13, 160), (0.94, 0.14, 105),
)  # fmt: skip
LIGHT_DIVERGING: Sequence[Anchor] = (
    (0.45, 0.13, 255), (0.72, 0.09, 245), (0.975, 0.003, 240), (0.76, 0.11, 55), (0.50, 0.15, 35),
)  # fmt: skip
DARK_DIVERGING: Sequence[Anchor] = (
    (0.80, 0.11, 235), (0.52, 0.11, 250), (0.26, 0.008, 250), (0.55, 0.12, 45), (0.82, 0.13, 65),
)  # fmt: skip
HUES = (255, 45, 160, 330, 95, 210, 300, 20)  # neighbours far apart, also to red-green blindness
LIGHT_PALETTE = [(light, 0.14, hue) for light, hue in zip(
    (0.50, 0.64, 0.60, 0.55, 0.62, 0.68, 0.45, 0.48), HUES, strict=True)]  # fmt: skip
DARK_PALETTE = [(light, 0.13, hue) for light, hue in zip(
    (0.72, 0.77, 0.76, 0.72, 0.82, 0.80, 0.68, 0.66), HUES, strict=True)]  # fmt: skip
LIGHT_TIERS: Sequence[Anchor] = (
    (0.52, 0.20, 15), (0.70, 0.15, 65), (0.60, 0.10, 190), (0.68, 0.02, 250),
)  # fmt: skip
DARK_TIERS: Sequence[Anchor] = (
    (0.68, 0.19, 15), (0.80, 0.14, 75), (0.70, 0.10, 190), (0.55, 0.02, 250),
)  # fmt: skip


def linear_rgb(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """OKLCH to linear sRGB; outside 0..1 where sRGB has no such colour."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def hexadecimal(lightness: float, chroma: float, hue: float) -> str:
    """The sRGB colour `#rrggbb` of an OKLCH triple, with less chroma where sRGB ends."""
    rgb = linear_rgb(lightness, chroma, hue)
    while chroma > 0 and not all(-1e-4 <= c <= 1.0001 for c in rgb):
        chroma = max(0.0, chroma - 0.004)
        rgb = linear_rgb(lightness, chroma, hue)
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, c)))):02x}" for c in rgb)


def _gamma(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def _lab(anchor: Anchor) -> Anchor:
    lightness, chroma, hue = anchor
    angle = math.radians(hue)
    return lightness, chroma * math.cos(angle), chroma * math.sin(angle)


def ramp(anchors: Sequence[Anchor], levels: int) -> list[str]:
    """`levels` colours through the anchors, on straight lines in OKLab from anchor to anchor."""
    colours = []
    for i in range(levels):
        place = i / (levels - 1) * (len(anchors) - 1)
        j = min(int(place), len(anchors) - 2)
        t = place - j
        ends = zip(_lab(anchors[j]), _lab(anchors[j + 1]), strict=True)
        lightness, a, b = (p + t * (q - p) for p, q in ends)
        colours.append(hexadecimal(lightness, math.hypot(a, b), math.degrees(math.atan2(b, a))))
    return colours


def variables(dark: bool) -> str:
    """CSS custom properties of all levels for one colour scheme."""
    named = {
        "q": ramp(DARK_RAMP if dark else LIGHT_RAMP, SEQUENTIAL),
        "d": ramp(DARK_DIVERGING if dark else LIGHT_DIVERGING, DIVERGING),
        "c": [hexadecimal(*c) for c in (DARK_PALETTE if dark else LIGHT_PALETTE)],
        "t": [hexadecimal(*c) for c in (DARK_TIERS if dark else LIGHT_TIERS)],
    }
    return "".join(f"--{k}{i}:{c};" for k, colours in named.items() for i, c in enumerate(colours))


def classes() -> str:
    """CSS rules that give each level's class its colour; marks draw in `currentColor`."""
    counts = {"q": SEQUENTIAL, "d": DIVERGING, "c": PALETTE, "t": TIERS}
    return "".join(f".{k}{i}{{color:var(--{k}{i})}}" for k, n in counts.items() for i in range(n))


def level(t: float, levels: int = SEQUENTIAL) -> int:
    """The level of a share 0..1 of the scale."""
    return min(levels - 1, max(0, int(t * levels)))


def ordered(i: int, n: int) -> str:
    """Class of the i-th of n ordered lines (layers): the part of the ramp that shows on paper."""
    first = SEQUENTIAL // 4
    return f"q{first + round((SEQUENTIAL - 1 - first) * (i / (n - 1) if n > 1 else 0.6))}"
