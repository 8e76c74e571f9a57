"""html: drawn pages without a network: SVG charts, tables, one self-contained file.

`svg` builds elements and escapes what goes into them, `colour` computes the scales of both colour
schemes, `scales` places numbers, `charts`, `bars` and `heat` draw, `tables` tabulates, `page`
frames. Every function returns `Markup`; nothing here knows what the numbers mean.

Left out: animation, zooming, anything that needs a library in the browser.
"""

from bitnest.html.bars import bars, histogram
from bitnest.html.charts import Axis, Rule, Series, chart
from bitnest.html.figures import details, figure, grid, legend, note, paragraph, stack
from bitnest.html.heat import Heat, colour_bar, heat, matrix
from bitnest.html.page import Section, page
from bitnest.html.svg import Markup, escape, tag
from bitnest.html.tables import Column, table

__all__ = [
    "Axis", "Column", "Heat", "Markup", "Rule", "Section", "Series", "bars", "chart", "colour_bar",
    "details", "escape", "figure", "grid", "heat", "histogram", "legend", "matrix", "note", "page",
    "paragraph", "stack", "table", "tag",
]  # fmt: skip
