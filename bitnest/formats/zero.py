"""`zero`: all weights are zero and nothing is stored; what dropping a matrix, or an expert, is.

0 bits, 0 bytes, no tensors. It is no width: random plans leave it out (`calibrate/probes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnest.formats.base import Part


@dataclass(frozen=True)
class ZeroFormat:
    """A matrix of zeros."""

    name = "zero"
    bits = 0.0
    row_tile = 1
    fixed_size = True

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """No tensors, whatever the (out, in) shape."""
        return {}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """0, whatever the (out, in) shape."""
        return 0
