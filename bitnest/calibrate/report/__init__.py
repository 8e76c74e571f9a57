"""report: the analysis of a model as one HTML page that needs no network.

`render` turns the analysis dictionary (the same that is saved as JSON) into a page: what matters in
sentences first, then a section for every part of it. A part that is missing says why in a sentence.
Where a model has more than a page can show, the strongest are drawn and the page says how many
there are. Nothing is measured here.
"""

from __future__ import annotations

from bitnest.calibrate.report.common import Analysis, check, seeds
from bitnest.calibrate.report.data import data_section
from bitnest.calibrate.report.headline import overview_section
from bitnest.calibrate.report.inputs import crest_section, inputs_section
from bitnest.calibrate.report.offloading import coverage_section, offloading_section
from bitnest.calibrate.report.router import router_section, together_section
from bitnest.calibrate.report.sensitivity import prediction_section, sensitivity_section
from bitnest.calibrate.report.significance import (
    channels_section,
    rankings_section,
    significance_section,
)
from bitnest.calibrate.report.use import domains_section, use_section
from bitnest.html import page
from bitnest.html.scales import short, whole

__all__ = ["render"]

SECTIONS = (
    overview_section, data_section, use_section, domains_section, significance_section,
    rankings_section, channels_section, router_section, together_section, inputs_section,
    crest_section, sensitivity_section, prediction_section, offloading_section, coverage_section,
)  # fmt: skip


def render(analysis: Analysis) -> str:
    """The page of an analysis (version 1), as text to be written to a file in UTF-8.

    Raises:
        ArtifactError: the dictionary lacks a part, or is of another version.
    """
    check(analysis)
    lead = (
        f"{analysis['architecture']} · {short(analysis['parameters'])} parameters · "
        f"{analysis['blocks']} blocks · {whole(sum(d['tokens'] for d in analysis['data']))} tokens "
        f"in {len(analysis['labels'])} data set{'s' if len(analysis['labels']) != 1 else ''}"
    )
    footer = (
        f"bitnest {analysis['bitnest']}, analysed in {short(analysis['seconds'])} s, "
        f"{seeds(analysis['seed'])}. The same figures are in report.json."
    )
    sections = [build(analysis) for build in SECTIONS]
    return page(str(analysis["model"]), lead, sections, footer)
