"""Split codes against a bit-by-bit reference: which bits go where, in how many bytes."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnest.errors import FormatError
from bitnest.formats.segments import segment_words, segments, split_parts
from bitnest.kernels.packing import pack_bits
from bitnest.kernels.segments import pack_segments, unpack_segments

WIDTHS = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}


def reference_bytes(codes: np.ndarray, bits: int) -> list[bytes]:
    """One row's segments: code strings cut from the left, each cut streamed lowest bit first."""
    strings = [format(int(code), f"0{bits}b") for code in codes]
    parts, start = [], 0
    for width in WIDTHS[bits]:
        stream = "".join(text[start : start + width][::-1] for text in strings)
        stream += "0" * (-len(stream) % 32)
        parts.append(int(stream[::-1], 2).to_bytes(len(stream) // 8, "little"))
        start += width
    return parts


def test_widths_and_names_are_the_documented_ones() -> None:
    assert {bits: segments(bits) for bits in range(1, 9)} == WIDTHS
    assert split_parts(7) == ("codes4", "codes2", "codes1")
    assert split_parts(6) == ("codes4", "codes2")
    assert split_parts(5) == ("codes4", "codes1")
    assert split_parts(3) == ("codes2", "codes1")
    assert {split_parts(bits) for bits in (1, 2, 4, 8)} == {("codes",)}


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_widths_outside_a_byte_are_refused(bits: int) -> None:
    for function in (segments, split_parts, lambda b: segment_words(8, b)):
        with pytest.raises(FormatError, match=f"1 to 8 bits, not {bits}"):
            function(bits)


def test_hand_cut_codes_land_where_the_layout_says() -> None:
    six = pack_segments(torch.tensor([[0b101101, 0b010011, 0b111000]]), 6)
    assert six["codes4"].tolist() == [[0b1110_0100_1011]]
    assert six["codes2"].tolist() == [[0b00_11_01]]
    seven = pack_segments(torch.tensor([[0b1011_01_1, 0b0100_11_0]]), 7)
    assert {name: words.tolist() for name, words in seven.items()} == {
        "codes4": [[0b0100_1011]],
        "codes2": [[0b11_01]],
        "codes1": [[0b0_1]],
    }


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 8), columns=st.integers(1, 200), seed=st.integers(0, 10**6))
def test_every_width_and_tail_has_the_reference_bytes_and_comes_back(
    bits: int, columns: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, columns), dtype=np.uint8)
    parts = pack_segments(torch.from_numpy(codes), bits)
    assert tuple(parts) == split_parts(bits)
    assert {name: words.shape[-1] for name, words in parts.items()} == segment_words(columns, bits)
    for row in range(3):
        stored = [words[row].numpy().tobytes() for words in parts.values()]
        assert stored == reference_bytes(codes[row], bits)
        assert [len(part) for part in stored] == [
            4 * math.ceil(columns * width / 32) for width in WIDTHS[bits]
        ]
    back = unpack_segments(parts, bits, columns)
    assert back.dtype == torch.uint8
    assert torch.equal(back, torch.from_numpy(codes))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_odd_column_count_comes_back(bits: int) -> None:
    for columns in range(1, 200, 2):
        codes = torch.arange(2 * columns).mul(37).remainder(1 << bits).view(2, columns)
        back = unpack_segments(pack_segments(codes, bits), bits, columns)
        assert torch.equal(back, codes.to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_ones_and_experts_of_a_stack_stay_apart(bits: int) -> None:
    ones = torch.full((2, 1, 64), (1 << bits) - 1, dtype=torch.uint8)
    for words in pack_segments(ones, bits).values():
        assert words.dtype == torch.int32
        assert words.eq(-1).all(), "64 codes of all ones fill every bit of their words"
    stack = torch.randint(0, 1 << bits, (3, 5, 77), dtype=torch.uint8)
    parts = pack_segments(stack, bits)
    assert torch.equal(unpack_segments(parts, bits, 77), stack)
    for name, words in pack_segments(stack[1], bits).items():
        assert torch.equal(words, parts[name][1])


def test_codes_of_one_segment_are_the_dense_bitstream() -> None:
    for bits in (1, 2, 4, 8):
        codes = torch.randint(0, 1 << bits, (3, 45), dtype=torch.uint8)
        assert torch.equal(pack_segments(codes, bits)["codes"], pack_bits(codes, bits))


def test_views_that_are_not_contiguous_pack_the_same() -> None:
    codes = torch.randint(0, 64, (40, 6), dtype=torch.uint8)
    for name, words in pack_segments(codes.T[:, 1:], 6).items():
        assert torch.equal(words, pack_segments(codes.T[:, 1:].contiguous(), 6)[name])


def test_layout_arithmetic_does_not_load_torch() -> None:
    modules = "bitnest.formats.segments, bitnest.formats.minifloat"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
