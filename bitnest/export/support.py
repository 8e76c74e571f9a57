"""Which engines run a format, read off `engines` and `layouts` alone, without any model.

An engine is listed for a format that it runs on some linear layer. Whether it runs it on all of a
model's matrices also depends on their shapes, on what is fused and on experts: `targets` says that
for an artifact, before an export is written.
"""

from __future__ import annotations

from bitnest.export.engines import ENGINES, Engine
from bitnest.export.layouts import Layout, inputs_beside, layout_for, scheme, with_inputs
from bitnest.formats import AnyFormat, BlockFormat, DenseFormat

OWN = "bitnest"  # its own runtime decodes every format
KERNEL = "reference"  # which of its kernels does: decode to a dense matrix, then a product


def engines_of(fmt: AnyFormat) -> list[str]:
    """Engines that run `fmt`, bitnest first; `vllm-cuda with humming` names what must be added,
    `vllm-cpu with int8-token` inputs without which it does not run these weights."""
    if isinstance(fmt, DenseFormat):
        return [OWN, *ENGINES]
    layout = layout_for(fmt) if isinstance(fmt, BlockFormat) else None
    if layout is None:
        return [OWN]
    found = (_spelt(name, engine, layout) for name, engine in ENGINES.items())
    return [OWN, *(name for name in found if name)]


def kernel_of(fmt: AnyFormat) -> str:
    """The kernel that serves `fmt` in bitnest's runtime on this machine."""
    return "torch" if isinstance(fmt, DenseFormat) else KERNEL


def _spelt(name: str, engine: Engine, layout: Layout) -> str:
    """The engine's name if it runs linears of that layout, with what it needs; else nothing."""
    if layout.family != "int":
        return name if layout.family in engine.floats else _beside(name, engine, layout)
    if layout.bits in engine.extra_bits:
        return f"{name} with {engine.extra.split()[0]}"
    widths = engine.bits if layout.symmetric else engine.asymmetric_bits
    grouped = not engine.groups or layout.group in engine.groups
    alone = layout.bits in widths and grouped
    return name if alone else _beside(name, engine, layout)


def _beside(name: str, engine: Engine, layout: Layout) -> str:
    """The engine's name with the first inputs that it runs such weights beside."""
    for inputs in inputs_beside(layout):
        if (found := with_inputs(layout, inputs)) and scheme(found) in engine.inputs:
            return f"{name} with {inputs}"
    return ""
