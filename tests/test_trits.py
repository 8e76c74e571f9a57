"""Ternary codes against a slow Tunstall code: fractions, a heap over leaves, strings of digits."""

import heapq
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnest.errors import ArtifactError
from bitnest.kernels.trits import (
    SHORTEST,
    TritStream,
    best_k,
    decode_trits,
    dictionary,
    encode_trits,
    encoded_nbytes,
    entropy_bits,
    expected_bits,
    inner_classes,
    pack_trits,
    unpack_trits,
    worst_nbytes,
)


def slow_leaves(k: int, leaves: int) -> list[str]:
    """Tunstall's algorithm as written: split the most probable leaf; ties: shallow, then first."""
    p = {"1": Fraction(k, 256)}
    p["0"] = p["2"] = (1 - p["1"]) / 2
    heap = [(Fraction(-1), 0, "")]
    done = []
    while len(heap) + len(done) + 2 <= leaves:
        weight, depth, path = heapq.heappop(heap)
        if depth == 255:
            done.append(path)
            continue
        for digit in "012":
            heapq.heappush(heap, (weight * p[digit], depth + 1, path + digit))
    return sorted(done + [path for _, _, path in heap])


def slow_encode(row: str, leaves: list[str]) -> list[int]:
    words, at = [], 0
    while at < len(row):
        rest = row[at:] + "1" * 255
        (word,) = [w for w, path in enumerate(leaves) if rest.startswith(path)]
        words.append(word)
        at += len(leaves[word])
    return words


def text(codes: torch.Tensor) -> str:
    return "".join(str(int(code)) for code in codes)


def random_codes(rows: int, columns: int, zeros: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    is_zero = torch.rand((rows, columns), generator=generator) < zeros
    signs = torch.randint(0, 2, (rows, columns), generator=generator) * 2
    return torch.where(is_zero, 1, signs).to(torch.uint8)


def table_paths(k: int, leaves: int) -> list[str]:
    table = dictionary(k, leaves)
    digits = "".join(map(str, table.symbols.tolist()))
    return [
        digits[start : start + length]
        for start, length in zip(table.starts.tolist(), table.lengths.tolist(), strict=True)
    ]


def test_smallest_trees_are_those_drawn_by_hand() -> None:
    assert table_paths(128, 3) == ["0", "1", "2"]
    assert table_paths(128, 5) == ["0", "10", "11", "12", "2"]
    # P(0) = P(2) = P(11) = 1/4: the shallower and the first in order is split next
    assert table_paths(128, 7) == ["00", "01", "02", "10", "11", "12", "2"]
    # rare zeros: root, 0 and 2 are split, then 00, the first of four equals
    assert table_paths(1, 9) == ["000", "001", "002", "01", "02", "1", "20", "21", "22"]


@pytest.mark.parametrize("k", [1, 60, 85, 86, 127, 128, 129, 200, 254])
@pytest.mark.parametrize("leaves", [3, 9, 27, 51, 255, 1001])
def test_tree_and_numbering_are_those_of_the_slow_code(k: int, leaves: int) -> None:
    assert table_paths(k, leaves) == slow_leaves(k, leaves)


@pytest.mark.parametrize(("k", "leaves"), [(128, 65535), (231, 20001)])
def test_large_tree_is_that_of_the_slow_code(k: int, leaves: int) -> None:
    assert table_paths(k, leaves) == slow_leaves(k, leaves)


def test_bound_on_the_length_holds_where_zeros_are_nearly_certain() -> None:
    paths = table_paths(254, 1001)
    assert max(map(len, paths)) == 255 and "1" * 255 in paths
    assert paths == slow_leaves(254, 1001)


@pytest.mark.parametrize("leaves", [3, 5, 9, 31])
def test_every_short_row_has_the_words_of_the_slow_code(leaves: int) -> None:
    paths = slow_leaves(150, leaves)
    for columns in range(1, 6):
        codes = torch.tensor(list(product(range(3), repeat=columns)), dtype=torch.uint8)
        stream = encode_trits(codes, 150, leaves)
        expected = [slow_encode(text(row), paths) for row in codes]
        assert stream.words.tolist() == [word for words in expected for word in words]
        assert stream.offsets.diff().tolist() == [len(words) for words in expected]
        assert torch.equal(decode_trits(stream, *codes.shape, leaves), codes)


def test_words_beyond_32767_keep_their_number_as_int16() -> None:
    codes = torch.full((2, 40), 2, dtype=torch.uint8)  # the last leaves
    stream = encode_trits(codes, 128)
    assert set(stream.words[:-1].tolist()) == {65534 - 65536}
    assert torch.equal(decode_trits(stream, 2, 40), codes)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 700),
    zeros=st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.9, 0.99, 1.0]),
    k=st.sampled_from([None, 1, 128, 231, 254]),
    seed=st.integers(0, 10**6),
)
def test_no_shape_share_or_wrong_k_loses_a_trit(
    rows: int, columns: int, zeros: float, k: int | None, seed: int
) -> None:
    codes = random_codes(rows, columns, zeros, seed)
    stream = encode_trits(codes, k)
    assert torch.equal(decode_trits(stream, rows, columns), codes)
    assert encoded_nbytes(stream) <= worst_nbytes(rows, columns, stream.k)
    assert worst_nbytes(rows, columns, stream.k) <= worst_nbytes(rows, columns)


def test_rows_decode_the_same_in_blocks_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(11, 100, 0.8)
    stream = encode_trits(codes)
    monkeypatch.setattr("bitnest.kernels.trits.BLOCK", 300)
    assert torch.equal(decode_trits(stream, 11, 100), codes)
    alone = encode_trits(codes[4:5], stream.k)
    assert torch.equal(alone.words, stream.words[stream.offsets[4] : stream.offsets[5]])


def test_worst_size_is_reached_and_never_passed() -> None:
    path = min(table_paths(231, 65535), key=len)
    codes = torch.tensor([[int(digit) for digit in path * 50]] * 3, dtype=torch.uint8)
    stream = encode_trits(codes, 231)
    assert encoded_nbytes(stream) == worst_nbytes(3, codes.shape[1], 231)


def test_no_tree_has_a_leaf_shallower_than_the_size_bound_assumes() -> None:
    assert SHORTEST == 2
    for k in range(1, 255):
        inner = inner_classes(k)
        assert (inner[0, 0], inner[1, 0], inner[0, 1]) == (1, 1, 2), "all of depth 0 and 1"
    assert int(dictionary(254).lengths.min()) == 2


def test_bytes_are_those_of_the_stored_tensors() -> None:
    stream = encode_trits(random_codes(5, 333, 0.7))
    stored = [stream.words, stream.offsets, torch.tensor([stream.k], dtype=torch.uint8)]
    assert encoded_nbytes(stream) == sum(t.numel() * t.element_size() for t in stored)


# per cent over the entropy; at 0.95 a 16-bit word holds few sequences with a sign in them
@pytest.mark.parametrize(
    ("zeros", "percent"), [(0.3, 1), (1 / 3, 1), (0.5, 2), (0.7, 2), (0.85, 4), (0.9, 5), (0.95, 9)]
)
def test_size_stays_near_the_entropy(zeros: float, percent: float) -> None:
    codes = random_codes(100, 4000, zeros)
    stream = encode_trits(codes)
    expected = expected_bits(stream.k, zeros)
    assert entropy_bits(zeros) < expected < entropy_bits(zeros) * (1 + percent / 100)
    # a row's last word is half used on average: 8 bits in 4000 trits
    assert 16 * stream.words.numel() / codes.numel() == pytest.approx(expected + 0.002, rel=0.01)


def test_entropy_and_mean_length_are_the_textbook_values() -> None:
    assert entropy_bits(0.9) == pytest.approx(0.569, abs=5e-4)
    assert entropy_bits(0.5) == 1.5
    assert entropy_bits(1 / 3) == pytest.approx(1.58496, abs=1e-5)
    assert entropy_bits(1.0) == 0
    # leaves 0, 2 of length 1 and 10, 11, 12 of length 2: mean 1.5 at a share of 1/2
    assert expected_bits(128, 0.5, 5) == pytest.approx(16 / 1.5)


def test_best_k_follows_the_share_and_stays_in_range() -> None:
    assert best_k(torch.ones((2, 9), dtype=torch.uint8)) in (253, 254)
    assert best_k(torch.zeros((2, 9), dtype=torch.uint8)) in (1, 2)
    assert abs(best_k(random_codes(50, 1000, 0.75)) - 192) <= 3


@settings(max_examples=40, deadline=None)
@given(columns=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_five_trits_to_a_byte_with_a_padded_tail(columns: int, seed: int) -> None:
    codes = random_codes(3, columns, 0.3, seed)
    packed = pack_trits(codes)
    for row in range(3):
        digits = [*codes[row].tolist(), *[1] * (-columns % 5)]
        expected = [
            sum(d * 3**i for i, d in enumerate(digits[j : j + 5])) for j in range(0, len(digits), 5)
        ]
        assert packed[row].tolist() == expected
    assert torch.equal(unpack_trits(packed, columns), codes)


def test_every_byte_of_five_trits_by_hand() -> None:
    assert pack_trits(torch.tensor([[2, 2, 2, 2, 2, 0]], dtype=torch.uint8)).tolist() == [
        [242, 3 + 9 + 27 + 81]
    ]
    everything = torch.arange(243, dtype=torch.uint8).view(1, -1)
    assert torch.equal(pack_trits(unpack_trits(everything, 243 * 5)), everything)


@pytest.mark.parametrize("codes", [torch.tensor([[0, 3]], dtype=torch.uint8), torch.ones((1, 2))])
def test_codes_that_are_no_trits_are_refused(codes: torch.Tensor) -> None:
    for function in (pack_trits, encode_trits, best_k):
        with pytest.raises(ValueError, match="ternary codes"):
            function(codes)


@pytest.mark.parametrize(("k", "leaves"), [(0, 9), (255, 9), (9, 1), (9, 8), (9, 65537)])
def test_impossible_trees_are_refused(k: int, leaves: int) -> None:
    with pytest.raises(ValueError, match="leaves"):
        encode_trits(torch.ones((1, 5), dtype=torch.uint8), k, leaves)


@pytest.mark.parametrize(
    ("words", "offsets", "k"),
    [
        ([1, 2], [0, 1], 9),  # words after the last row
        ([1, 2], [1, 2], 9),  # words before the first
        ([1, 2], [0, 2, 1, 2], 9),  # a row of negative length
        ([1, 2], [0, 0, 2], 9),  # a row without words
        ([1, 2], [0], 9),
        ([1, 2], [0, 2], 0),
        ([1, 2], [0, 2], 255),
    ],
)
def test_damaged_streams_are_refused(words: list[int], offsets: list[int], k: int) -> None:
    with pytest.raises(ArtifactError):
        TritStream(
            torch.tensor(words, dtype=torch.int16), torch.tensor(offsets, dtype=torch.int32), k
        )


def test_streams_of_another_type_are_refused() -> None:
    with pytest.raises(ArtifactError, match="int32"):
        TritStream(torch.tensor([1]), torch.tensor([0, 1], dtype=torch.int32), 9)


def test_rows_that_do_not_end_at_the_asked_column_are_refused() -> None:
    codes = random_codes(3, 100, 0.5)
    stream = encode_trits(codes)
    for rows, columns in [(2, 100), (3, 0), (3, 60), (3, 140)]:
        with pytest.raises(ArtifactError):
            decode_trits(stream, rows, columns)
    words = stream.words.clone()
    words[2] = -1  # 65535, no leaf
    with pytest.raises(ArtifactError, match="no leaf"):
        decode_trits(TritStream(words, stream.offsets, stream.k), 3, 100)
    with pytest.raises(ArtifactError):
        unpack_trits(torch.tensor([[243]], dtype=torch.uint8), 5)
    with pytest.raises(ArtifactError):
        unpack_trits(torch.tensor([[242]], dtype=torch.uint8), 6)
