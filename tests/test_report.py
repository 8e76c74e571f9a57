"""The report: what its sentences claim, what it must survive, and what it may cost."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from contextlib import redirect_stdout
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bitnest.calibrate.report import render
from bitnest.calibrate.report.common import spearman, spread
from bitnest.calibrate.report.headline import half_load, specialists
from bitnest.calibrate.report.inputs import boundaries, strip
from bitnest.calibrate.report.router import bin_median
from bitnest.calibrate.report.sensitivity import best_per_width, reference_format
from bitnest.cli import main
from bitnest.cli.analyze import print_analysis
from bitnest.errors import ArtifactError
from bitnest.html import Axis, Heat, Series, chart, heat, table, tag
from bitnest.html.colour import DARK_RAMP, LIGHT_RAMP, hexadecimal, linear_rgb, ramp
from bitnest.html.scales import linear_ticks, log_ticks, short
from bitnest.html.svg import number
from bitnest.html.tables import Column
from tests.synthetic_analysis import make, make_dense, make_large

VOID = {"meta", "br", "hr", "col", "wbr"}


class Reader(HTMLParser):
    """Checks that every element is closed where it was opened, and gathers what tests ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"style", "script"}:
            self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def analysis() -> dict[str, Any]:
    return make()


def test_every_section_is_in_the_page_and_in_its_contents(analysis: dict[str, Any]) -> None:
    reader = read(render(analysis))
    sections = [a["id"] for name, a in reader.tags if name == "section"]
    links = [a["href"] for name, a in reader.tags if name == "a"]
    assert links == [f"#{name}" for name in sections]
    assert {"use", "domains", "significance", "outliers", "crest", "sensitivity", "prediction",
            "offloading", "coverage"} <= set(sections)  # fmt: skip
    assert not [a for _, a in reader.tags if a.get("class") == "missing"]


def test_nothing_is_fetched(analysis: dict[str, Any]) -> None:
    page = render(analysis)
    reader = read(page)
    assert not [a for _, a in reader.tags if "src" in a or "srcset" in a]
    assert all(a["href"].startswith("#") for _, a in reader.tags if a.get("href"))  # type: ignore[union-attr]
    assert not {name for name, _ in reader.tags} & {"link", "img", "iframe", "object", "image"}
    assert "http://" not in page and "https://" not in page
    assert "@import" not in page and "url(" not in page


def test_names_from_data_cannot_become_elements(analysis: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>\"'&"
    text = copy.deepcopy(analysis)
    text["model"] = text["architecture"] = evil
    text["labels"][0] = evil
    text["data"][0] |= {"label": evil, "source": evil, "sha256": "<b>"}
    for d in text["domains"]:
        d["label"], d["other"] = evil, evil
        d["share"] = {evil: 0.5}
    for p in text["prediction"]["points"]:
        p["label"] = evil
    for s in text["sensitivity"]["sites"]:
        s["name"] = s["kind"] = evil
    for e in (*text["sensitivity"]["by_layer"], *text["crest"]["weights"]):
        e["kind"] = evil
    for i in text["inputs"]:
        i["role"] = evil
    for s in text["coverage"]["starved"]:
        s["fallback"] = evil
    page = render(text)
    assert page.count("<script>") == 1  # the page's own
    assert "&lt;script&gt;alert(1)" in page
    assert any(evil[:20] in w for w in read(page).words)


def test_dense_model_says_why_sections_are_empty() -> None:
    reader = read(render(make_dense()))
    missing = [a for name, a in reader.tags if name == "p" and a.get("class") == "missing"]
    assert len(missing) == 11
    text = " ".join(reader.words)
    assert "has no routed experts" in text and "Sensitivity was not measured" in text


@pytest.mark.parametrize("part", ["sensitivity", "prediction", "offloading", "coverage",
                                  "dynamic_channels"])  # fmt: skip
def test_missing_part_of_a_mixture_is_one_sentence(analysis: dict[str, Any], part: str) -> None:
    reader = read(render(analysis | {part: None}))
    assert sum(a.get("class") == "missing" for _, a in reader.tags) == 1


def test_holes_in_the_figures_are_drawn_as_gaps(analysis: dict[str, Any]) -> None:
    holes = copy.deepcopy(analysis)
    for layer in holes["layers"]:
        layer["fisher"] = layer["transitions"] = layer["transition_entropy"] = None
    holes["rankings"]["mean"][4] = [None] * 5
    for entry in holes["rankings"]["layers"]:
        entry["correlation"][0][4] = None
    holes["sensitivity"]["by_layer"][0]["loss"] = [None] * 6
    holes["sensitivity"]["sites"][0]["loss"] = [None] * 6
    holes["sensitivity"]["sites"][0]["fisher"] = None
    holes["sensitivity"]["by_layer"][1]["loss"][0] = 0.0
    holes["prediction"]["points"][0]["predicted"] = 0.0
    holes["inputs"][0]["absmax"] = [0.0] * 256
    holes["inputs"][1]["outliers"] = []
    holes["data"][0]["available"] = holes["data"][0]["sha256"] = None
    holes["coverage"]["starved"] = []
    page = render(holes)
    read(page)
    assert not re.search(
        r"\b(nan|inf|None)\b", re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    )


def test_one_expert_used_alone_and_one_layer(analysis: dict[str, Any]) -> None:
    one = make(blocks=1, experts=2, labels=("only",))
    one["layers"][0]["share"] = [[1.0, 0.0]]
    one["layers"][0]["tokens"] = [[500, 0]]
    one["layers"][0]["significance"] = [[1.0, 0.0]]
    reader = read(render(one | {"domains": []}))
    assert any("at least two data sets" in w for w in reader.words)


def test_analysis_of_another_version_is_refused(analysis: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="version 7"):
        render(analysis | {"version": 7})
    with pytest.raises(ArtifactError, match="lacks layers, crest"):
        render({k: v for k, v in analysis.items() if k not in {"layers", "crest"}})


def test_large_model_stays_small_and_says_what_it_left_out() -> None:
    page = render(make_large())
    assert len(page.encode()) < 5_000_000
    text = " ".join(read(page).words)
    for remark in ("24 of 48 layers are drawn", "32 of 128 experts of a layer",
                   "The first 20 of 6,144 experts", "40 of 192 inputs",
                   "of 390,144 pairs"):  # fmt: skip
        assert remark in text, remark


def test_many_data_sets_are_cut_and_counted() -> None:
    page = render(make(blocks=2, experts=8, labels=[f"set-{i}" for i in range(128)]))
    text = " ".join(read(page).words)
    assert "8 of 128 data sets (those with most tokens) are drawn." in text
    assert len(page.encode()) < 2_000_000


def test_expert_maps_say_their_values_on_hover(analysis: dict[str, Any]) -> None:
    share = analysis["layers"][2]["share"][1][9]
    assert f"layer 2 · expert 9 · {short(100 * share)}" in render(analysis)


def test_same_analysis_gives_the_same_page(analysis: dict[str, Any]) -> None:
    assert render(analysis) == render(copy.deepcopy(analysis))


def test_half_load_counts_the_most_used_experts() -> None:
    assert half_load({"share": [[0.25, 0.25, 0.25, 0.25]]}) == 2
    assert half_load({"share": [[0.6, 0.2, 0.1, 0.1]]}) == 1
    assert half_load({"share": [[0.6, 0.4, 0.0, 0.0], [0.0, 0.4, 0.6, 0.0]]}) == 2


def test_specialist_needs_both_most_of_its_use_and_an_even_share() -> None:
    # expert 0 serves a; 1 serves a but hardly anybody; 2 serves b; 3 serves both
    shares = [[0.40, 0.010, 0.05, 0.54], [0.05, 0.0, 0.60, 0.35]]
    found = specialists({"labels": ["a", "b"], "layers": [{"layer": 3, "experts": 4,
                                                           "share": shares}]})  # fmt: skip
    assert [item[:3] for item in found] == [(3, 2, "b"), (3, 0, "a")]
    assert found[1][3] == pytest.approx(0.40 / 0.45)


def test_headline_says_what_the_figures_say(analysis: dict[str, Any]) -> None:
    text = " ".join(read(render(analysis)).words)
    best = analysis["domains"][0]
    assert f"expert {best['expert']} of layer {best['layer']}" in text
    starved = analysis["coverage"]["experts"] - analysis["coverage"]["covered"]
    assert f"{starved} of 96 experts saw fewer than 2,048 tokens in windows that are not" in text
    assert "attention costs the most per parameter" in text
    assert "Offloading partly suits this model" in text
    assert "integers win as MXINT8 and NVINT4, floats win as MXFP6 and MXFP4" in text
    assert f"within a factor of {math.exp(0.12):.2f}" in text


def told(analysis: dict[str, Any]) -> str:
    return " ".join(read(render(analysis)).words)


def printed(analysis: dict[str, Any], folder: Path, model: str | None = None) -> str:
    """What the terminal shows of it."""
    (folder / "report.json").write_text(json.dumps(analysis), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "1000")
        with redirect_stdout(StringIO()) as out:
            print_analysis(folder, False, model)
    return out.getvalue()


def test_most_concentrated_layer_is_the_one_of_least_entropy(analysis: dict[str, Any]) -> None:
    text = copy.deepcopy(analysis)
    one = [1.0, *[0.0] * 15]
    for layer in text["layers"]:  # one expert takes more than half of each
        layer["share"] = [[0.6, *[0.4 / 15] * 15]] * 3
        layer["balance"] = [0.5, 0.6, 0.7]
    text["layers"][4] |= {"share": [[0.6, 0.4, *one[2:]]] * 3, "balance": [0.2, 0.2, 0.2]}
    said = "layer 4 is the most concentrated, with an evenness of 0.20"
    assert {half_load(layer) for layer in text["layers"]} == {1} and said in told(text)
    text["layers"][1]["balance"] = [0.2, 0.2, 0.2]
    assert "layers 1 and 4 are the most concentrated" in told(text)


def test_clearest_specialist_is_one_of_the_specialists(analysis: dict[str, Any]) -> None:
    text = copy.deepcopy(analysis)
    for layer in text["layers"]:
        layer["share"] = [[1 / 16] * 16] * 3
    rest = [0.9 / 15] * 15
    text["layers"][2]["share"] = [[0.1, *rest], [0.01, *rest], [0.0, *rest]]
    [(layer, expert, label, part)] = specialists(text)
    assert (layer, expert, label) == (2, 0, "books") and part == pytest.approx(0.1 / 0.11)
    best = text["domains"][0]
    assert (best["layer"], best["expert"]) != (2, 0)
    words = told(text)
    assert "expert serves one domain (at least 80\N{NARROW NO-BREAK SPACE}% of its use)" in words
    assert "The clearest is expert 0 of layer 2, with 90.9" in words
    assert f"Use differs most for expert {best['expert']} of layer {best['layer']}" in words


def test_dropping_an_expert_is_not_said_to_hurt_its_domain_first(analysis: dict[str, Any]) -> None:
    words = told(analysis)
    assert "hurts its domain first" not in words
    assert "should hurt the data set it serves more than the one it is set against" in words


def test_one_probe_gives_no_figure_of_error(analysis: dict[str, Any], tmp_path: Path) -> None:
    lone = {**analysis["prediction"], "error": None, "probes": 1}
    text = analysis | {"prediction": lone | {"points": lone["points"][:3]}}
    words = told(text)
    assert words.count("The prediction rests on one probe: nothing says how far it is off.") == 2
    assert "within a factor" not in words and "shaded band" not in words
    assert "fitted to 1 probe. Points are predicted without it." in words
    assert 'class="band"' in render(analysis) and 'class="band"' not in render(text)
    line = "predicted KL: it rests on one probe, so its error is unknown"
    assert line in printed(text, tmp_path)
    assert "(each of 16 probes predicted by the others)" in printed(analysis, tmp_path)


def test_coverage_counts_what_hessians_saw(analysis: dict[str, Any], tmp_path: Path) -> None:
    text = copy.deepcopy(analysis)
    row = {"fallback": "the layer's", "minimum": {"up": 64, "down": 40}}
    text["coverage"] |= {"minimum": 64, "minima": [64], "covered": 94, "starved": [
        row | {"layer": 1, "expert": 5, "tokens": 80, "fitted": 48,
               "lean": {"up": 0.25, "down": 0.0}},
        row | {"layer": 3, "expert": 2, "tokens": 70, "fitted": 16,
               "lean": {"up": 0.75, "down": 0.6}},
    ]}  # fmt: skip
    unheld = "in windows that are not held out for probes"
    words = told(text)
    assert f"2 of 96 experts saw fewer than 64 tokens {unheld} and lean" in words
    assert "the least, expert 2 of layer 3, saw 16." in words
    assert f"94 of 96 experts saw at least 64 tokens {unheld}." in words
    cells = render(text).partition('id="coverage"')[2].partition("<tbody>")[2]
    shown = [float(v) for v in re.findall(r'data-v="([^"]*)"', cells.partition("</tr>")[0])]
    assert shown == [3, 2, 70, 16, 0.75, 0.6]
    line = f"coverage: 94 of 96 experts saw 64 tokens {unheld}, with 12 windows added for it"
    assert f"{line}; fewest: 3:2 16, 1:5 48. " in printed(text, tmp_path)
    text["coverage"] |= {"held": 0, "minima": [40, 64]}
    asked = "94 of 96 experts saw the 40 to 64 tokens that its layer asks for, with"
    assert asked in printed(text, tmp_path)


def test_merger_of_different_lengths_and_seeds_says_so(analysis: dict[str, Any]) -> None:
    words = told(analysis | {"length": None, "lengths": [64, 128], "seed": None})
    assert "Samples of 64 to 128 tokens, drawn with several seeds." in words
    assert re.search(r"analysed in \S+ s, several seeds\.", words)
    assert "Samples of 512 tokens, drawn with seed 0." in told(analysis)


def test_only_analyze_knows_where_the_model_lies(analysis: dict[str, Any], tmp_path: Path) -> None:
    best = analysis["domains"][0]
    place = f"--without {best['layer']}:{best['expert']})"
    assert f"(bitnest eval MODEL {place}" in printed(analysis, tmp_path)
    assert f"(bitnest eval models/m {place}" in printed(analysis, tmp_path, "models/m")


def test_probes_without_importance_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"bitnest analyze demo -o {tmp_path}/s --importance none --probes 12 --format int4-g128"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "where: --importance none --probes 12" in err
    assert "hint: leave out one of the two" in err and not (tmp_path / "s").exists()


def test_long_names_may_break_and_short_ones_do_not() -> None:
    name = "hub:HuggingFaceFW/fineweb-edu:sample-10BT@train"
    page = table([Column("source")], [(name,), ("books.txt",)])
    assert "<td>books.txt</td>" in page and 'class="long">hub:<wbr>HuggingFaceFW/<wbr>' in page
    assert "".join(read(page).words) == f"source{name}books.txt"


def test_spearman_of_ties_and_of_constants() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 0 .5 ... by hand: x 0, 1.5, 1.5, 3 and y 0, 1, 2, 3
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_histogram_median_is_linear_inside_its_bin() -> None:
    assert bin_median([0, 1, 2, 4], [1, 1, 2]) == pytest.approx(2.0)
    assert bin_median([0, 1, 2, 4], [0, 0, 4]) == pytest.approx(3.0)
    assert bin_median([0, 1], [0]) is None


def test_strip_keeps_the_outlier_of_pooled_channels() -> None:
    values = [1.0] * 1000
    values[777] = 100.0
    cells = strip(values, cells=256)
    assert len(cells) == 250 and cells[777 // 4] == pytest.approx(2.0)


def test_boundaries_that_touch_share_a_label() -> None:
    limits = make()["crest"]["limits"]
    assert [(r.y, r.text) for r in boundaries(limits, 32)] == [
        (1.96, ""), (2.04, "1.96, 2.04"), (7.55, "7.55")]  # fmt: skip
    assert boundaries(limits, 128) == []


def test_best_format_of_a_width_is_the_point() -> None:
    formats = [{"name": "a", "bits": 4.5}, {"name": "b", "bits": 2}, {"name": "c", "bits": 4.5}]
    assert best_per_width(formats, [0.2, 0.9, 0.1]) == [(2, 0.9), (4.5, 0.1)]
    assert best_per_width(formats, [None, None, 0.1]) == [(2, None), (4.5, 0.1)]
    assert reference_format(formats) == 0


def test_spread_keeps_both_ends() -> None:
    assert spread(list(range(48)), 4) == [0, 16, 31, 47]
    assert spread([1, 2], 4) == [1, 2]


def test_values_a_log_axis_cannot_show_break_the_line() -> None:
    series = Series("x", [(1, 0.1), (2, 0.0), (3, None), (4, float("nan")), (5, 0.2), (6, 0.3)])
    page = chart([series], Axis("a"), Axis("b", log=True), "c")
    assert page.count('class="line"') == 1  # from 5 to 6; the lone first point has no line
    read(page)


def test_chart_without_any_value_still_has_axes() -> None:
    for log in (False, True):
        assert "<svg" in chart([], Axis("a"), Axis("b", log=log), "c")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (None, "\N{EN DASH}"), (float("nan"), "\N{EN DASH}"), (3.0, "3"),
     (3.14159, "3.14"), (-0.5, "\N{MINUS SIGN}0.5"),
     (12345, "12.3k"), (2.2e7, "22M"), (0.00123, "0.00123"), (1e-6, "10⁻⁶"), (2.5e-9, "2.5·10⁻⁹"),
     (999.6, "1000")],
)  # fmt: skip
def test_numbers_are_written_short(value: float | None, text: str) -> None:
    assert short(value) == text


def test_coordinates_keep_their_sign() -> None:
    assert [number(v) for v in (-0.5, -0.001, 0.0, 100.0, 1.255, -12.3)] == [
        "-0.5", "0", "0", "100", "1.25", "-12.3"]  # fmt: skip


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert log_ticks(1e-4, 1, 5) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert log_ticks(1.5, 8) == pytest.approx([2, 3, 5])


@pytest.mark.parametrize(("low", "high"), [(0.59, 1.65), (0.7, 1.4), (3.1, 9.9), (0.9, 1.1)])
def test_a_short_log_axis_has_ticks_enough_to_read_it(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 10 and all(low <= t <= high for t in ticks)


def test_colours_match_known_values_and_lightness_is_monotonic() -> None:
    assert hexadecimal(1.0, 0.0, 0.0) == "#ffffff" and hexadecimal(0.0, 0.0, 0.0) == "#000000"
    # sRGB red is OKLCH (0.62796, 0.25768, 29.234)
    assert linear_rgb(0.62796, 0.25768, 29.234) == pytest.approx((1, 0, 0), abs=2e-3)
    for anchors, sign in ((LIGHT_RAMP, -1), (DARK_RAMP, 1)):
        luminance = [_luminance(c) for c in ramp(anchors, 32)]
        assert all(sign * (b - a) > 0 for a, b in pairwise(luminance))


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_heat_levels_cover_the_scale() -> None:
    scale = Heat(1.0)
    assert scale.level(0.0) == 0 and scale.level(1.0) == 31 and scale.level(9.0) == 31
    assert scale.value(scale.share(0.3)) == pytest.approx(0.3)
    both = Heat(0.5, diverging=True)
    assert both.level(0.0) == 12 and both.level(-0.5) == 0 and both.level(0.5) == 24


def test_ragged_rows_draw_only_their_own_cells() -> None:
    page = heat([[0.1, 0.2, 0.3], [0.4], [None, 0.5]], Heat(1.0), "x", x_name="", y_name="")
    assert page.count("h1v1h-1z") == 5


def test_table_sorts_by_values_and_counts_what_it_cut() -> None:
    columns = [Column("name"), Column("n", short, bar=True)]
    page = table(columns, [("a", 12345), ("b", None), ("c", 1)], limit=2, noun="things")
    assert 'data-v="12345.0"' in page and "12.3k" in page
    assert "The first 2 of 3 things." in page


def test_attributes_are_escaped() -> None:
    assert tag("p", "<b>", title='"x"') == '<p title="&quot;x&quot;">&lt;b&gt;</p>'


def test_rendering_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from bitnest.calibrate.report import render\n"
        "sys.exit('loaded torch' if {'torch', 'numpy'} & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
