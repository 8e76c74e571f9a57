"""Products with weights laid out for the C kernels.

Inputs become integers of 16 or 24 bits, with a scale per INPUT_BLOCK columns, and sums of products
are exact within a cell. On inputs that are normally distributed the error relative to float64 is

    bfloat16, float16    16 bits    about 3e-5
    float32              24 bits    about 1e-7, as of a product in float32

Weights that look numbers up, and dense ones, read inputs as 1, 2 or 3 bfloat16 parts, which hold
all bits of bfloat16, float16 and float32; their products add up in float32.

Float32 keeps 24 bits at any number of tokens: three planes of 8-bit products are more per cycle
than the same product in float32, so nothing is decoded to a dense matrix.

Subnormal float32 inputs count as 0. The scale of a whole matrix multiplies last, so outputs within
a thousandth of float32's largest number may be infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bitnest.kernels.cpu.library import INTEGER, NUMBERS, Inputs, Weight, library
from bitnest.kernels.inputs import Coded

INPUT_BLOCK = 128  # columns per scale of inputs
UNIT, STEP = 32, 16
Tensors = dict[str, torch.Tensor]


@dataclass
class CpuWeight:
    """One matrix (N, K) in the memory layout of cpu.h.

    struct: what C reads; it points into `held`. shape: (N, K). restorer: gives back the stored
    tensors from this. notes: what `restorer` needs besides.
    """

    struct: Weight
    held: Tensors
    shape: tuple[int, int]
    restorer: Callable[[CpuWeight], Tensors]
    notes: Mapping[str, object] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, padding included."""
        return sum(t.numel() * t.element_size() for t in self.held.values())

    def restore(self) -> Tensors:
        """The stored tensors it was made from, bit for bit."""
        return self.restorer(self)

    @property
    def path(self) -> str:
        """Which kernels these are."""
        return "cpu"

    def product(self, x: torch.Tensor, planes: int | None = None) -> torch.Tensor:
        """x W^T of x (..., K) float32, bfloat16 or float16: (..., N) of the same type. planes:
        bytes that inputs are cut into; None: as their type deserves."""
        return self.multiply(self.struct, x, planes)

    def multiply(self, struct: Weight, x: torch.Tensor, planes: int | None = None) -> torch.Tensor:
        """`product` with one of a weight's structs."""
        rows, columns = self.shape
        if x.dtype not in NUMBERS or x.shape[-1] != columns:
            raise TypeError(f"inputs (..., {columns}) of 16 or 32 bits, not {x.dtype} {x.shape}")
        flat = x.reshape(-1, columns)
        if flat.stride(1) != 1:
            flat = flat.contiguous()
        y = torch.empty((len(flat), rows), dtype=x.dtype)
        found = library()
        assert found is not None
        planes = planes or (3 if x.dtype == torch.float32 else 2)
        found.linear(
            struct, flat.data_ptr(), len(flat), flat.stride(0), y.data_ptr(), rows,
            NUMBERS[x.dtype], planes, INPUT_BLOCK,
        )  # fmt: skip
        return y.view(*x.shape[:-1], rows)

    def product_coded(self, parts: Sequence[Coded]) -> torch.Tensor | None:
        """x W^T, (T, N) float32, of integer inputs (kernels/inputs.py), their kept channels left
        out; None where the kernels do not take them: the caller's reference runs."""
        if not self.takes(parts):
            return None
        x, _held = given_codes(parts[0], self.struct.units * UNIT)
        y = torch.empty((x.tokens, self.shape[0]), dtype=torch.float32)
        found = library()
        assert found is not None
        found.linear_coded(self.struct, x, y.data_ptr(), self.shape[0])
        return y

    def takes(self, parts: Sequence[Coded]) -> bool:
        """Whether `product_coded` runs on such inputs: one run of 8-bit integers."""
        return self.struct.engine == INTEGER and one_run(parts, self.shape[1], STEP)


def one_run(parts: Sequence[Coded], columns: int, step: int) -> bool:
    """Whether inputs are one run of integers, with scales of a multiple of `step` channels."""
    part = parts[0]
    whole = len(parts) == 1 and part.start == 0 and part.values.shape[1] == columns
    return whole and part.integer and (part.scales.shape[1] == 1 or part.group % step == 0)


def given_codes(part: Coded, columns: int) -> tuple[Inputs, tuple[torch.Tensor, ...]]:
    """Coded inputs with zeros up to `columns`, and what the struct points to."""
    tokens, own = part.values.shape
    codes = torch.zeros((tokens, columns), dtype=torch.int8)
    codes[:, :own] = part.values
    sums = codes.view(tokens, columns // STEP, STEP).sum(2, dtype=torch.int32)
    scales = part.scales.float().contiguous()
    x = Inputs(
        tokens=tokens, columns=columns, planes=1, codes=codes.data_ptr(),
        block=columns if scales.shape[1] == 1 else part.group,
        scales=scales.data_ptr(), sums=sums.data_ptr(),
    )  # fmt: skip
    return x, (codes, sums, scales)


def code_planes(x: torch.Tensor, planes: int) -> tuple[Inputs, tuple[torch.Tensor, ...]]:
    """x (T, K) float32, rows contiguous, cut into bytes with a scale per INPUT_BLOCK columns, and
    what the struct points to."""
    tokens, own = x.shape
    columns = -(-own // UNIT) * UNIT
    codes = torch.zeros((tokens, planes, columns), dtype=torch.int8)
    sums = torch.zeros((tokens, planes, columns // STEP), dtype=torch.int32)
    scales = torch.ones(tokens, -(-columns // INPUT_BLOCK))
    made = Inputs(
        tokens=tokens, columns=columns, planes=planes, block=INPUT_BLOCK, codes=codes.data_ptr(),
        scales=scales.data_ptr(), sums=sums.data_ptr(),
    )  # fmt: skip
    found = library()
    assert found is not None
    found.code_inputs(x.data_ptr(), x.stride(0), own, made, 0, tokens)
    return made, (codes, sums, scales)


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Where its numbers lie."""
    return None if tensor is None else tensor.data_ptr()
