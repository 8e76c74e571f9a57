"""compare: how far every format is from a model's own numbers, by kind of site, and why.

Nothing is changed in the model. Every chosen site is rounded to nearest in every format:

    QSNR     10 log10(sum w^2 / sum (w - w_hat)^2) in dB, more is better
    H error  tr(dW H dW^T) / tr(W H W^T), the share of its output energy a site would lose
    GPTQ     the same error after a GPTQ sweep on the same H, if that is asked for
    kappa    absmax / RMS of a block, its crest factor: 1 .. sqrt(block)

and so is what the sites read, token by token (`inputs`), with QSNR and kappa alone. `crest` says
what kappa decides, `scores` what comes out, `select` which sites and formats, `tally` how they are
averaged, `study` runs.

Left out: figures for single sites, H errors of rounded inputs, and the one global scale that
compress gives NV matrices which engines fuse: each has its own here.
"""

from bitnest.quantize.compare.crest import BINS, BLOCKS, PAIRS, CrestTally, crest_factors
from bitnest.quantize.compare.scores import (
    Comparison,
    Crest,
    FormatScore,
    InputReport,
    InputScore,
    KindReport,
    Verdict,
)
from bitnest.quantize.compare.select import choose_sites, matching, on_the_fly, parse_formats
from bitnest.quantize.compare.study import PER_KIND, compare

__all__ = [
    "BINS", "BLOCKS", "PAIRS", "PER_KIND", "Comparison", "Crest", "CrestTally", "FormatScore",
    "InputReport", "InputScore", "KindReport", "Verdict", "choose_sites", "compare",
    "crest_factors", "matching", "on_the_fly", "parse_formats",
]  # fmt: skip
