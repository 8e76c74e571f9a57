"""Dense bit packing: codes of b bits as one little-endian bitstream per row, in 32-bit words.

Element i of a row occupies bits [i*b, (i+1)*b) of the stream; bit k of the stream is bit k % 32 of
word k // 32; the last word is padded with zero bits. For every width this is the layout of
compressed-tensors' `pack-quantized` (0.18 and later for 3, 5, 6 and 7 bits).

32 codes of b bits fill exactly b words, so both directions run over 32 fixed positions, each a
vector operation over all rows.
"""

from __future__ import annotations

import torch

PERIOD = 32  # codes per period; a period of b-bit codes is b words


def words_per_row(columns: int, bits: int) -> int:
    """32-bit words that hold `columns` codes of `bits` bits."""
    return -(-columns * bits // 32)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (..., I), integers in [0, 2^bits), to words (..., ceil(I*bits/32)) int32."""
    columns = codes.shape[-1]
    periods = -(-columns // PERIOD)
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, periods * PERIOD - columns))
    padded = padded.unflatten(-1, (periods, PERIOD))
    words = padded.new_zeros((*padded.shape[:-1], bits))
    for i in range(PERIOD):
        word, shift = divmod(i * bits, 32)
        code = padded[..., i]
        words[..., word] |= code << shift
        if shift + bits > 32:  # the code's high bits continue in the next word
            words[..., word + 1] |= code >> (32 - shift)
    return words.flatten(-2)[..., : words_per_row(columns, bits)].contiguous()


def unpack_bits(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Words (..., ceil(columns*bits/32)) int32 to codes (..., columns) uint8."""
    periods = -(-columns // PERIOD)
    words = torch.nn.functional.pad(words, (0, periods * bits - words.shape[-1]))
    words = words.unflatten(-1, (periods, bits))
    codes = torch.empty((*words.shape[:-1], PERIOD), dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(PERIOD):
        word, shift = divmod(i * bits, 32)
        code = words[..., word] >> shift  # arithmetic shift: the mask drops the sign's copies
        if shift + bits > 32:
            low = 32 - shift
            code = (code & ((1 << low) - 1)) | (words[..., word + 1] << low)
        codes[..., i] = (code & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :columns]
