"""The report in a real browser: drawn, without complaints, in light, dark and narrow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bitnest.calibrate.report import render
from tests.synthetic_analysis import make, make_dense, make_large

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH"),
]
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000",
]  # fmt: skip
# Opens every folded part, then writes what it measured into the page, which --dump-dom prints.
PROBE = """<script>
document.querySelectorAll("details").forEach((d) => { d.open = true; });
const boxes = [...document.querySelectorAll("svg")].map((s) => s.getBoundingClientRect());
const header = document.querySelector("th.number button");
if (header) header.click();
const result = {
  svgs: boxes.length,
  empty: boxes.filter((b) => b.width < 5 || b.height < 5).length,
  buttons: document.querySelectorAll("th button").length,
  sorted: document.querySelectorAll("th[aria-sort]").length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
};
const pre = document.createElement("pre");
pre.id = "probe";
pre.textContent = JSON.stringify(result);
document.body.append(pre);
</script>"""


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *options, page.as_uri()],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    return done


def measure(text: str, folder: Path, *options: str, probe: str = PROBE) -> dict[str, Any]:
    page = folder / "probed.html"
    page.write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    dom = browse(page, folder / "profile", "--dump-dom", *options).stdout
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    assert found, dom[-500:]
    return dict(json.loads(found[1]))


@pytest.mark.parametrize("maker", [make, make_dense, make_large])
def test_every_drawing_has_a_size_and_scripts_run_clean(maker: Any, tmp_path: Path) -> None:
    result = measure(render(maker()), tmp_path, "--window-size=1280,2000")
    assert result["svgs"] >= (8 if maker is make_dense else 40)
    assert result["empty"] == 0
    assert result["buttons"] > 5 and result["sorted"] == 1
    assert result["overflow"] <= 0


WIDE = """<script>
const wide = [...document.querySelectorAll(".scroll")].filter((s) => s.scrollWidth > s.clientWidth);
const pre = document.createElement("pre");
pre.id = "probe";
pre.textContent = JSON.stringify({tables: document.querySelectorAll(".scroll").length,
  wide: wide.map((s) => s.closest("section").id)});
document.body.append(pre);
</script>"""


def test_tables_fit_a_page_of_1200_pixels(tmp_path: Path) -> None:
    analysis = make(experts=128)
    analysis["data"][0]["source"] = "hub:HuggingFaceFW/fineweb-edu:sample-10BT@train"
    analysis["data"][1]["source"] = "/home/somebody/calibration/text/code_valid.jsonl"
    for i, site in enumerate(analysis["sensitivity"]["sites"]):
        end = "self_attn.q_proj" if site["expert"] is None else f"mlp.experts.{i % 128}.down_proj"
        site["name"] = f"model.layers.{site['layer'] + 10}.{end}"
    text = render(analysis)
    result = measure(text, tmp_path, "--window-size=1200,2000", probe=WIDE)
    assert result["tables"] > 8 and result["wide"] == []


def test_narrow_page_does_not_scroll_sideways(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render(make()), encoding="utf-8")
    frame = (
        '<!doctype html><body style="margin:0"><iframe id="f" src="page.html" '
        'style="width:400px;height:900px;border:0"></iframe><script>'
        'document.getElementById("f").addEventListener("load", (e) => {'
        "const root = e.target.contentDocument.documentElement;"
        'const pre = document.createElement("pre"); pre.id = "probe";'
        "pre.textContent = JSON.stringify({overflow: root.scrollWidth - 400});"
        "document.body.append(pre); });</script></body>"
    )
    outer = tmp_path / "outer.html"
    outer.write_text(frame, encoding="utf-8")
    dom = browse(outer, tmp_path / "profile", "--dump-dom", "--allow-file-access-from-files").stdout
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom)
    assert found and json.loads(found[1])["overflow"] <= 0


@pytest.mark.parametrize("dark", [False, True])
def test_screenshot_shows_a_page_in_both_colour_schemes(dark: bool, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="no Pillow to look at the screenshot with")
    page, shot = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(render(make()), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    browse(page, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1280,6000", scheme)
    picture = image.open(shot).convert("RGB")
    assert picture.size == (1280, 6000)
    colours = picture.getcolors(maxcolors=1 << 24)
    assert len(colours) > 500
    _, ground = max(colours)
    assert (sum(ground) < 200) == dark
    rows = [picture.crop((230, y, 1270, y + 1000)).getcolors(1 << 24) for y in range(0, 6000, 1000)]
    assert all(len(found) > 100 for found in rows), "a part of the page is blank"
