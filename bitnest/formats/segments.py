"""Split codes: a b-bit code cut into segments of 8, 4, 2 and 1 bits, each aligned in its words.

The widest segment holds the code's most significant bits (FP6-LLM's 4+2, arXiv 2401.14112, made
general):

    8 -> 8    7 -> 4+2+1    6 -> 4+2    5 -> 4+1    4 -> 4    3 -> 2+1    2 -> 2    1 -> 1

Each segment of a row is a little-endian bitstream of its own, padded to 32 bits. A segment's width
divides 32, so no code lies across two words. I codes of b bits take, per row,

    sum over the widths w of  4 * ceil(I*w/32)  bytes

stored under `codes` when there is one segment, else under `codes4`, `codes2`, `codes1`.

Left out: tensors (`kernels.segments`), and FP6-LLM's further interleaving for tensor cores.
"""

from __future__ import annotations

from bitnest.errors import FormatError

WIDTHS = (8, 4, 2, 1)


def segments(bits: int) -> tuple[int, ...]:
    """Widths of the segments of a `bits`-bit code, the most significant bits first.

    Raises:
        FormatError: bits outside 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise FormatError(
            f"codes have 1 to 8 bits, not {bits}",
            hint="for example 6, stored as a 4-bit and a 2-bit segment",
        )
    return tuple(width for width in WIDTHS if bits & width)


def split_parts(bits: int) -> tuple[str, ...]:
    """Names of the stored tensors, in the order of `segments`."""
    widths = segments(bits)
    return ("codes",) if len(widths) == 1 else tuple(f"codes{width}" for width in widths)


def segment_words(columns: int, bits: int) -> dict[str, int]:
    """32-bit words per row of each stored tensor, for rows of `columns` codes."""
    widths = zip(split_parts(bits), segments(bits), strict=True)
    return {name: -(-columns * width // 32) for name, width in widths}
