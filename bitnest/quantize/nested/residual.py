"""mwq: a base of asymmetric integers and signed residuals, after D2MoE's matryoshka quantisation.

Per group of a row, base first: scale and zero of least error under diag(H). Then, for every further
bit, Q = sign(W - W_hat) and s = sum h |W - W_hat| / sum h, the least-squares scale, so that
W_hat <- W_hat + s Q. Errors are compensated between groups only, as there: what is left at the
widest width moves the groups still to come (D2MoE does not say which width's error does; a narrower
one's would have to be carried by the residuals).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitnest.formats.block import integer
from bitnest.formats.nested import NestedFormat
from bitnest.kernels.nested import split_planes
from bitnest.kernels.packing import pack_bits
from bitnest.quantize.codecs.block import BlockCodec
from bitnest.quantize.gptq import inverse_factor


@dataclass
class Residuals:
    """One solved matrix. codes: (O, I) uint8 of the widest width. scales: (O, G), of the base and
    then by bit. zeros: (O, G). weight: (O, I) at the widest width."""

    fmt: NestedFormat
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    steps: dict[int, torch.Tensor]
    weight: torch.Tensor

    def store(self, half: torch.dtype, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """Tensors of some rows as the format lays them out."""
        zeros = pack_bits(self.zeros[rows].T.to(torch.uint8), self.fmt.widths[0]).T
        steps = {f"scales{bit}": s[rows].to(half).contiguous() for bit, s in self.steps.items()}
        return {
            **split_planes(self.codes[rows], self.fmt),
            "scales": self.scales[rows].to(half).contiguous(), "zeros": zeros.contiguous(), **steps,
        }  # fmt: skip


def solve_residuals(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    fmt: NestedFormat,
    *,
    half: torch.dtype = torch.bfloat16,
    damp: float = 0.03,
) -> Residuals:
    """Base and residuals of weight (O, I) float32 under hessian (I, I), or none."""
    rows, columns = weight.shape
    first, top, g = fmt.widths[0], fmt.widths[-1], fmt.group_size(columns)
    codec = BlockCodec(integer(first, fmt.group, symmetric=False), half)
    h = torch.eye(columns, device=weight.device) if hessian is None else hessian
    factor = inverse_factor(h[None], damp)[0]
    x = weight.T.clone()
    decoded = torch.empty_like(x)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    groups = fmt.groups(columns)
    scales, zeros = x.new_zeros(rows, groups), x.new_zeros(rows, groups)
    steps = {bit: x.new_zeros(rows, groups) for bit in range(first + 1, top + 1)}
    shared = codec.prepare(x[None], h.diagonal()[None, :, None])
    for k in range(groups):
        own = slice(k * g, min((k + 1) * g, columns))
        w, weights = x[own], h.diagonal()[own, None]
        grid = codec.fit(w, weights, shared)
        assert grid.zero is not None
        levels = codec.snap(w.clone(), grid)
        scales[:, k], zeros[:, k] = grid.scale[0], grid.zero[0]
        code = (levels + grid.zero).to(torch.uint8)
        near = levels * grid.scale
        for step in steps.values():
            miss = w - near
            up = miss > 0
            total = weights.sum().clamp_min(1e-30)
            step[:, k] = ((miss.abs() * weights).sum(0) / total).to(half).float()
            near = torch.where(up, near + step[:, k], near - step[:, k])
            code = (code << 1) | up.to(torch.uint8)
        codes[own], decoded[own] = code, near
        if own.stop < columns:
            u = torch.triu(factor[own, own])
            errors = torch.linalg.solve_triangular(u.T, w - near, upper=False)
            x[own.stop :] -= factor[own, own.stop :].T @ errors
    return Residuals(fmt, codes.T.contiguous(), scales, zeros, steps, decoded.T.contiguous())
