"""measure: one matrix, or a sample of one input, in every format.

Weights are rounded as `compress` would with method rtn. Inputs are rounded as an engine would while
it runs: scales from the largest value of a token's block, no search; the one global scale of NV
formats is a constant, the sample's.

With GPTQ, `gptq_worse` counts sites whose H error, summed over their rows, it makes larger.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from bitnest.formats import PackedFormat
from bitnest.progress import Progress
from bitnest.quantize.compare.select import on_the_fly
from bitnest.quantize.compare.tally import SiteTally, Sums
from bitnest.quantize.solve import Options, needs_statistics, solve, weighted_error


class Measure:
    """Adds matrices to the tallies of their kinds.

    half: stored type of 16-bit scales. clip: search the clipping of weights' scales. gptq: run it.
    """

    def __init__(
        self,
        formats: Sequence[PackedFormat],
        kinds: Iterable[str],
        *,
        half: torch.dtype,
        clip: bool,
        gptq: bool,
    ) -> None:
        self.formats = formats
        self.options = Options(method="rtn", clip=clip, half=half)
        self.gptq = Options(method="gptq", clip=clip, half=half) if gptq else None
        self.live = Options(method="rtn", clip=False, half=half)  # of inputs
        dynamic = [fmt for fmt in formats if on_the_fly(fmt)]
        self.tallies = {kind: SiteTally(formats, dynamic) for kind in set(kinds)}

    def inputs(self, kind: str, rows: torch.Tensor) -> None:
        """Round rows (n, I) of one distinct input in every format that can be used on the fly."""
        if not len(rows):
            return
        x = rows.float()
        tally = self.tallies[kind].inputs
        tally.tokens += len(x)
        energy = tally.look(x)
        for fmt in tally.formats:
            found = solve(x[None], None, fmt, self.live).weight[0]
            tally.rounded(fmt, x - found, energy, fmt.nbytes((x.shape[0], x.shape[1])))

    def weight(
        self, kind: str, weight: torch.Tensor, hessian: torch.Tensor | None, progress: Progress
    ) -> bool:
        """Round one site's matrix (1, O, I) in every format; whether it has an H error."""
        tally = self.tallies[kind]
        energy = tally.look(weight[0])
        h = None if hessian is None else hessian[None]
        output = 0.0 if h is None else _lost(weight, h)
        tally.heard += weight.numel() if output > 0 else 0
        for fmt in self.formats:
            found, nbytes = self._round(weight, h, fmt)
            miss = weight - found
            own = tally.rounded(fmt, miss, energy, nbytes)
            if h is not None and output > 0:
                self._losses(own, weight, miss, h, fmt, weight.numel() / output)
            progress.step()
        return output > 0

    def _losses(
        self,
        own: Sums,
        weight: torch.Tensor,
        miss: torch.Tensor,
        h: torch.Tensor,
        fmt: PackedFormat,
        unit: float,
    ) -> None:
        """Add the H errors of one site in one format, rounded to nearest and by GPTQ."""
        plain = _lost(miss, h)
        own.loss += unit * plain
        if self.gptq is not None:
            swept = _lost(weight - solve(weight, h, fmt, self.gptq).weight, h)
            own.gptq_loss += unit * swept
            own.gptq_worse += swept > plain

    def _round(
        self, weight: torch.Tensor, h: torch.Tensor | None, fmt: PackedFormat
    ) -> tuple[torch.Tensor, int]:
        """The weight (1, O, I) as `fmt` decodes it, and its bytes."""
        if not needs_statistics(fmt):
            h = None
        elif h is None:  # no input ever seen: all channels alike
            h = torch.eye(weight.shape[2], device=weight.device)[None]
        result = solve(weight, h, fmt, self.options)
        rows, columns = weight.shape[1:]
        if fmt.fixed_size:
            return result.weight, fmt.nbytes((rows, columns))
        stored = result.store(0, slice(0, rows))
        return result.weight, sum(t.numel() * t.element_size() for t in stored.values())


def _lost(miss: torch.Tensor, h: torch.Tensor) -> float:
    """tr(dW H dW^T) of dW (1, O, I), never negative."""
    return max(float(weighted_error(miss, h).double().sum()), 0.0)
