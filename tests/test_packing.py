"""Bit packing against a bit-by-bit reference written from docs/format.md."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnest.formats import integer
from bitnest.kernels.decode import decode
from bitnest.kernels.packing import pack_bits, unpack_bits, words_per_row


def bitstream(codes: np.ndarray, bits: int) -> np.ndarray:
    """One row of codes as bits, least significant first, padded to 32-bit words."""
    stream = [(int(code) >> k) & 1 for code in codes for k in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = [
        sum(bit << k for k, bit in enumerate(stream[i : i + 32])) for i in range(0, len(stream), 32)
    ]
    return np.array(words, dtype=np.uint32)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), columns=st.integers(1, 100), seed=st.integers(0, 10**6))
def test_every_width_and_tail_is_the_dense_bitstream(bits: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, columns))
    words = pack_bits(torch.from_numpy(codes), bits)
    assert words.shape == (3, words_per_row(columns, bits))
    for row in range(3):
        assert np.array_equal(words[row].numpy().view(np.uint32), bitstream(codes[row], bits))
    assert torch.equal(unpack_bits(words, bits, columns), torch.from_numpy(codes).to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_codes_spanning_two_words_keep_their_high_bits(bits: int) -> None:
    codes = torch.full((1, 64), (1 << bits) - 1)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 64), codes.to(torch.uint8))
    words = pack_bits(codes, bits)
    assert int(words.ne(-1).sum()) == 0, "64 codes of all ones fill every bit of their words"


def test_words_are_those_of_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in (4, 8):
        codes = torch.randint(0, 1 << bits, (5, 96))
        signed = (codes - (1 << (bits - 1))).to(torch.int8)
        assert torch.equal(pack_bits(codes, bits), helpers.pack_to_int32(signed, bits))


def test_decoding_a_hand_made_weight_gives_the_hand_computed_values() -> None:
    fmt = integer(4, 16, symmetric=False)
    codes = torch.arange(20).remainder(16).view(1, 20)
    zeros = torch.tensor([[3], [9]]).T  # (1 row, 2 groups)
    scales = torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16)
    tensors = {
        "codes": pack_bits(codes, 4),
        "scales": scales,
        "zeros": pack_bits(zeros.T, 4).T.contiguous(),
    }
    expected = [0.5 * (c - 3) for c in range(16)] + [-2.0 * (c - 9) for c in range(4)]
    assert decode(tensors, fmt, (1, 20)).tolist() == [expected]


@pytest.mark.parametrize("name", ["g16", "g48", "g128", "channel"])
@pytest.mark.parametrize("columns", [16, 172, 256])
def test_bytes_promised_are_bytes_stored(name: str, columns: int) -> None:
    group = None if name == "channel" else int(name[1:])
    for bits in range(1, 9):
        for symmetric in (True, False) if bits > 1 else (True,):
            fmt = integer(bits, group, symmetric)
            shapes = {k: part.shape for k, part in fmt.parts((24, columns)).items()}
            sizes = {"codes": 4, "scales": 2, "zeros": 4}
            stored = sum(sizes[k] * np.prod(s) for k, s in shapes.items())
            assert fmt.nbytes((24, columns)) == stored
            words = pack_bits(torch.zeros(24, columns, dtype=torch.uint8), bits)
            assert tuple(words.shape) == shapes["codes"]
