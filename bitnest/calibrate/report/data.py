"""Section: which texts the model read."""

from __future__ import annotations

from bitnest.calibrate.report.common import Analysis, seeds, span
from bitnest.html import Column, Section, note, paragraph, table
from bitnest.html.scales import whole

COLUMNS = (
    Column("data set"),
    Column("source"),
    Column("documents", whole),
    Column("duplicates", whole, help="documents left out because they had been seen"),
    Column("samples", whole),
    Column("tokens", whole, bar=True),
    Column("available", whole, help="tokens the source holds"),
    Column("sha256"),
)


def data_section(analysis: Analysis) -> Section:
    """A row for each data set."""
    rows = [
        (d["label"], d["source"], d["documents"], d["duplicates"], d["samples"], d["tokens"],
         d.get("available"), (d.get("sha256") or "")[:8] or None)
        for d in analysis["data"]
    ]  # fmt: skip
    return Section("data", "Data", (
        paragraph("Everything below was measured on these texts. Statistics keep the data sets "
                  "apart, so that what is used in one and not in another can be seen."),
        table(COLUMNS, rows, noun="data sets"),
        note(f"Samples of {span(analysis['lengths'])} tokens, drawn with "
             f"{seeds(analysis['seed'])}."),
    ))  # fmt: skip
