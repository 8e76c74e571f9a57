"""Triton's interpreter (TRITON_INTERPRET=1) where it computes something else than a GPU does.

Triton 3.6 holds bfloat16 as its bits in 16-bit integers. Its interpreter multiplies these in
`tl.dot` and cuts bits off where a GPU rounds to nearest. It turns scalars, arrays of one element,
into loop bounds by int(array), which numpy 2.4 refuses. `mend` sets the three right, and leaves
arithmetic on bfloat16 outside of `tl.dot`, which kernels here do in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs


def mend() -> None:
    """Once per process; nothing where the interpreter is off."""
    if not knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    if getattr(interpreter, "mended_by_bitnest", False):
        return
    interpreter.mended_by_bitnest = True  # type: ignore[attr-defined]
    patch_tensor = interpreter._patch_lang_tensor
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, fp_cast, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def mended_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def mended_cast(before: Any) -> Any:
        def call(self: Any, source: Any, to: Any, *rest: Any) -> Any:
            kinds = source.dtype.scalar, to.scalar
            if kinds == (tl.float32, tl.bfloat16):
                return handle(_bits(source.data), tl.bfloat16)
            if kinds == (tl.bfloat16, tl.float32):
                return handle(_numbers(source.data), tl.float32)
            return before(self, source, to, *rest)

        return call

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            handle(_numbers(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor = mended_tensor
    builder.cast_impl = mended_cast(cast)
    builder.create_fp_to_fp = mended_cast(fp_cast)
    builder.create_dot = mended_dot


def _numbers(bits: Any) -> Any:
    """float32 of bfloat16 bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _bits(numbers: Any) -> Any:
    """Bits of float32 rounded to bfloat16, ties to even."""
    x = torch.from_numpy(np.ascontiguousarray(numbers))
    return x.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(np.shape(numbers))
