"""The one style sheet and the one script of every page.

Colours are custom properties, set once for light pages and paper, once for dark screens. The script
sorts tables by a column and shows an SVG `<title>` at once instead of after the browser's delay;
everything on the page is there without it.
"""

from __future__ import annotations

from bitnest.html.colour import classes, variables

LIGHT = (
    "--page:#f6f7f8;--card:#fff;--ink:#1b222c;--soft:#5a6573;--faint:#8a94a1;--line:#e2e6ea;"
    "--guide:#eceff2;--accent:#2b62c4;--fill:#dfe8f7;--tip:#1b222c;--tip-ink:#fff;"
)
DARK = (
    "--page:#0e1116;--card:#161b22;--ink:#e4e8ee;--soft:#9aa5b3;--faint:#727d8b;--line:#2a313b;"
    "--guide:#232a33;--accent:#7fabf5;--fill:#23354f;--tip:#e4e8ee;--tip-ink:#10151b;"
)

RULES = """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
.frame{max-width:1360px;margin:0 auto;display:grid;grid-template-columns:208px minmax(0,1fr);
gap:36px;
padding:0 28px}
nav{position:sticky;top:0;align-self:start;max-height:100vh;overflow:auto;padding:34px 0 24px;
font-size:13.5px}
nav b{display:block;font-size:11.5px;letter-spacing:.08em;text-transform:uppercase;
color:var(--faint);
margin-bottom:8px}
nav ol{list-style:none;margin:0;padding:0}
nav a{display:block;padding:4px 10px;border-left:2px solid var(--line);color:var(--soft);
text-decoration:none}
nav a:hover,nav a:focus{color:var(--ink);border-color:var(--accent)}
main{min-width:0;padding:30px 0 60px}
header h1{font-size:30px;line-height:1.2;margin:0 0 4px;letter-spacing:-.015em;
overflow-wrap:anywhere}
header p{margin:0;color:var(--soft)}
section{margin-top:46px;scroll-margin-top:14px}
h2{font-size:20px;line-height:1.3;margin:0 0 6px;letter-spacing:-.01em}
h3{font-size:15px;margin:22px 0 6px}
section>p{max-width:76ch;margin:0 0 14px}
section>p.missing{color:var(--soft);border-left:3px solid var(--line);padding:2px 0 2px 12px}
.note{color:var(--soft);font-size:13px;margin:8px 0 0;max-width:90ch}
.stats{display:flex;flex-wrap:wrap;gap:12px;margin:20px 0}
section:has(>.missing){margin-top:26px}section:has(>.missing) h2{font-size:16px;margin:0 0 2px}
.stat{flex:1 1 200px;max-width:420px;background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:12px 14px}
.stat b{display:block;font-size:24px;line-height:1.25;font-weight:600;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.stat span{display:block;font-size:13px}.stat small{display:block;color:var(--soft);font-size:12px;
line-height:1.4}
.findings{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:0;
padding:6px 20px;display:grid;grid-template-columns:max-content minmax(0,1fr)}
.findings dt,.findings dd{margin:0;padding:8px 0;border-top:1px solid var(--guide)}
.findings dt{font-weight:600;padding-right:24px}.findings dd{max-width:none}
.findings dt:first-of-type,.findings dd:first-of-type{border-top:0}
.grid{display:grid;gap:16px;margin:14px 0}
.of1{grid-template-columns:minmax(0,1fr)}
.of2{grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.of3{grid-template-columns:repeat(auto-fit,minmax(min(100%,270px),1fr))}
figure{margin:0;min-width:0;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:13px 16px 12px;display:flex;flex-direction:column}
.grid>.wide{grid-column:1/-1}
figure+figure{margin-top:0}section>figure{margin:14px 0}
figcaption{font-weight:600;font-size:14px;margin-bottom:8px}
.stack{display:flex;flex-direction:column;gap:16px;min-width:0}
.stack>figure:last-child{flex:1}.plot{min-width:0}.plot>.drawing+.drawing{margin-top:14px}
.drawing{display:block;width:100%;height:auto;overflow:visible}
.drawing text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
.drawing .name{fill:var(--soft);font-size:11.5px}
.drawing .ink{fill:var(--ink);font-size:12px}
.drawing .head{fill:var(--ink)}
.drawing .value{fill:var(--ink);font-size:12px}.drawing .value.on{fill:var(--card)}
.drawing .rule-name{fill:var(--ink);font-size:10.5px;paint-order:stroke;stroke:var(--card);
stroke-width:3px}
.middle{text-anchor:middle}.end{text-anchor:end}
.guide{stroke:var(--guide);fill:none}.axis,.nick{stroke:var(--faint);fill:none;stroke-width:.8}
.rule{stroke:var(--ink);stroke-width:1;stroke-dasharray:5 3;fill:none;opacity:.7}
.band{fill:var(--fill);opacity:.75}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.thin{stroke-width:1.1;opacity:.75}.line.dashed{stroke-dasharray:6 4}
.dot{fill:currentColor;fill-opacity:.82}.hollow{fill:var(--card);stroke:currentColor;
stroke-width:1.5}
.cloud{fill:none;stroke:currentColor;stroke-width:3.2;stroke-linecap:round;stroke-opacity:.6}
.faint{color:var(--faint)}
.bar,.cell{fill:currentColor}.cell.empty{fill:none;stroke:var(--line)}
.cells path{fill:currentColor;stroke:var(--card);stroke-width:1;vector-effect:non-scaling-stroke}
.cells.dense{shape-rendering:crispEdges}.cells.dense path{stroke:none}
.cells path:hover,.dot:hover,.hollow:hover,.bar:hover{stroke:var(--ink);stroke-width:1.5}
.colour-bar{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:center;color:var(--soft);
font-size:13px;margin:6px 0}
.colour-bar .drawing{width:272px;flex:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:-2px 0 8px;font-size:12.5px;
color:var(--soft)}
.legend span{display:inline-flex;align-items:center;gap:6px}
.legend i{flex:none;display:inline-block}
.stroke,.dash{width:18px;border-top:2.5px solid currentColor}.dash{border-top-style:dashed}
.spot,.ring{width:9px;height:9px;border-radius:50%;background:currentColor}
.ring{background:none;border:2px solid currentColor}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;
margin:14px 0 0}
figure .scroll,details .scroll{margin:0 0 10px}figure .scroll{border:0;border-radius:0}
table{border-collapse:collapse;width:100%;font-size:13px;line-height:1.4}
th,td{padding:5px 10px;text-align:left;white-space:nowrap;border-bottom:1px solid var(--guide)}
td.long{white-space:normal;min-width:18ch}
tbody tr:last-child td{border-bottom:0}
th{white-space:normal;font-weight:600;color:var(--soft);border-bottom:1px solid var(--line);
vertical-align:bottom}
tbody tr:hover td{background-color:var(--guide)}
.number{text-align:right;font-variant-numeric:tabular-nums}
.bar-cell{background-image:linear-gradient(var(--fill),var(--fill));background-repeat:no-repeat;
background-size:var(--w) 76%;background-position:right center}
th button{font:inherit;color:inherit;text-align:inherit;
background:none;border:0;padding:0;cursor:pointer}
th button:hover{color:var(--ink)}
th[aria-sort] button::after{content:" \\2193"}
th[aria-sort=ascending] button::after{content:" \\2191"}
details{margin:16px 0 0}
summary{cursor:pointer;color:var(--accent);font-size:14px;padding:2px 0}
details[open]>summary{margin-bottom:10px}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--tip);color:var(--tip-ink);
font-size:12px;line-height:1.4;padding:3px 8px;border-radius:5px;max-width:300px;display:none}
footer{margin-top:56px;padding-top:14px;border-top:1px solid var(--line);color:var(--soft);
font-size:13px}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media(max-width:980px){.frame{display:block;padding:0 16px}
nav{position:static;max-height:none;padding:16px 0 10px;border-bottom:1px solid var(--line)}
nav b{display:none}nav ol{display:flex;gap:0 14px;overflow-x:auto}nav li{flex:none}
nav a{border:0;padding:2px 0}main{padding-top:18px}}
@media(max-width:560px){body{font-size:16px}header h1{font-size:25px}
.stat{flex-basis:140px;padding:10px 12px}.stat b{font-size:21px}
.findings{display:block;padding:6px 14px}.findings dt{padding:8px 0 0}
.findings dd{border:0;padding:0 0 8px}figure{padding:12px 10px}
.drawing text,.drawing .name,.drawing .value,.drawing .ink{font-size:14px}
.drawing .rule-name{font-size:13px}
.drawing.small text,.drawing.small .name,.drawing.small .rule-name{font-size:11.5px}
.drawing .head{font-size:11px}
.pan{overflow-x:auto}.pan>.drawing{width:680px}.pan>.drawing text{font-size:12.5px}
.colour-bar .drawing text{font-size:11px}}
@media print{body{background:#fff;font-size:11pt}.frame{display:block;max-width:none;padding:0}
nav,#tip{display:none}section{margin-top:24pt}figure,tr,.stat{break-inside:avoid}
h2,h3{break-after:avoid}.scroll{overflow:visible}.cell,.cells path,.bar-cell,i{
-webkit-print-color-adjust:exact;print-color-adjust:exact}
details::details-content{content-visibility:visible;block-size:auto}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead th").forEach((th, column) => {
    const button = document.createElement("button");
    button.textContent = th.textContent;
    th.replaceChildren(button);
    button.addEventListener("click", () => {
      const numeric = th.classList.contains("number"), now = th.getAttribute("aria-sort");
      const up = numeric ? now === "descending" : now !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0], sign = up ? 1 : -1;
      const key = (row) => {
        const cell = row.cells[column];
        return numeric ? parseFloat(cell.dataset.v ?? "NaN") : cell.textContent;
      };
      const order = (a, b) => {
        const p = key(a), q = key(b);
        if (!numeric) return sign * p.localeCompare(q, undefined, {numeric: true});
        return isNaN(p) - isNaN(q) || sign * (p - q) || 0;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
const tip = document.getElementById("tip");
let holder = null, words = "";
const leave = () => {
  if (holder) holder.textContent = words;
  holder = null;
  tip.style.display = "none";
};
document.addEventListener("pointerover", (event) => {
  leave();
  const mark = event.target.closest?.("svg *");
  const title = mark?.querySelector(":scope > title")
    ?? mark?.parentElement.querySelector(":scope > title");
  if (!title) return;
  holder = title;
  words = title.textContent;
  title.textContent = "";
  tip.textContent = words;
  tip.style.display = "block";
});
document.addEventListener("pointermove", (event) => {
  if (!holder) return;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18 + tip.offsetHeight < innerHeight;
  tip.style.left = left + "px";
  tip.style.top = (below ? event.clientY + 18 : event.clientY - tip.offsetHeight - 10) + "px";
});
document.addEventListener("pointerleave", leave);
"""


def style_sheet() -> str:
    """The CSS of a page."""
    light, dark = LIGHT + variables(dark=False), DARK + variables(dark=True)
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{classes()}{RULES}"
    )
