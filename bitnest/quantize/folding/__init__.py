"""Scales, orders and rotations put into a checkpoint's weights before it is compressed.

`fold_checkpoint` gives a view of a checkpoint that computes the same with channels that are easier
to quantise; `site_inputs` measures what every matrix reads. `bitnest compress --fold` uses both.
"""

from bitnest.quantize.folding.fold import Folding, Skipped, fold_checkpoint, fold_view, skipped_of
from bitnest.quantize.folding.statistics import measure_inputs, site_inputs
from bitnest.quantize.folding.view import FoldedCheckpoint

__all__ = [
    "FoldedCheckpoint",
    "Folding",
    "Skipped",
    "fold_checkpoint",
    "fold_view",
    "measure_inputs",
    "site_inputs",
    "skipped_of",
]
