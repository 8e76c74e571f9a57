"""What the C kernels run, for `kernels/paths`: the answers are those of the code that runs them.

weights      `layout.why_not`, which `laid.lay_out` obeys
Rounded      the same, and what `CpuWeight.takes`; else the reference, on codes where it can
KV cache     `attention.why_not` of one new token; a prompt decodes the cache everywhere
"""

from __future__ import annotations

from bitnest.formats import (
    AnyFormat,
    BlockFormat,
    DenseFormat,
    NestedFormat,
    SparseFormat,
)
from bitnest.formats.inputs import InputFormat
from bitnest.formats.kv import KVFormat
from bitnest.kernels.paths import Asked, Provider, Rounded, register, whole_integers

NAME = "cpu"


def why_not(asked: Asked, shape: tuple[int, int]) -> str:
    """Empty where the kernels run it."""
    if isinstance(asked, KVFormat):
        return _cache(asked, shape)
    if isinstance(asked, Rounded):
        return _weight(asked.weights, shape) or _rounded(asked.weights, asked.inputs, shape)
    return _weight(asked, shape)


def _weight(fmt: AnyFormat, shape: tuple[int, int]) -> str:
    from bitnest.kernels.cpu.layout import why_not as of_layout

    return of_layout(fmt, shape)


def _rounded(fmt: AnyFormat, inputs: InputFormat, shape: tuple[int, int]) -> str:
    """Of weights that the kernels run: whether they are integers to them, and the inputs fit."""
    from bitnest.kernels.cpu import layout_integers

    if why := whole_integers(inputs, shape[1]):
        return why
    if isinstance(fmt, NestedFormat):
        return f"{fmt.name} meets rounded inputs in the reference, width by width"
    if isinstance(fmt, SparseFormat):
        return _sparse(fmt, inputs, shape)
    if isinstance(fmt, BlockFormat):
        return layout_integers.why_not(fmt, shape)
    return f"{fmt.name} has no integers"


def _sparse(fmt: SparseFormat, inputs: InputFormat, shape: tuple[int, int]) -> str:
    from bitnest.kernels.cpu.sparse import PIECE

    if isinstance(fmt.base, DenseFormat):
        return f"{fmt.name} has no integers"
    group = inputs.group
    whole = group is None or group >= shape[1] or group % PIECE == 0
    return "" if whole else f"scales of {group} channels of inputs, not of {PIECE}"


def _cache(fmt: KVFormat, shape: tuple[int, int]) -> str:
    import torch

    from bitnest.kernels.cpu.attention import Held
    from bitnest.kernels.cpu.attention import why_not as of_attention

    some = torch.empty(1, 1, 0, shape[1], dtype=torch.bfloat16)
    return of_attention(Held(fmt, {}, some, some), 1, 1) or ""


register(Provider(NAME, "cpu", why_not))
