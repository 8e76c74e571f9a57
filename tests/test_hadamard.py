"""Hadamard matrices, the block rotation and its signs: what must hold to the bit or to rounding."""

from __future__ import annotations

import pytest
import torch

from bitnest.errors import FormatError
from bitnest.kernels.hadamard import (
    block_sizes,
    butterfly,
    hadamard,
    random_signs,
    rotate,
    unrotate,
    whole_block,
)


def constructible(n: int) -> bool:
    try:
        hadamard(n)
    except FormatError:
        return False
    return True


ORDERS = [n for n in range(1, 257) if constructible(n)]


def explicit(width: int, block: int, signs: torch.Tensor | None) -> torch.Tensor:
    """R written out: diag(signs) times the block-diagonal matrix, identity in the tail."""
    matrix = torch.eye(width, dtype=torch.float64)
    for start in range(0, width - block + 1, block):
        part = hadamard(block) / block**0.5
        if signs is not None:
            part = signs[start : start + block, None] * part
        matrix[start : start + block, start : start + block] = part
    return matrix


def test_every_order_up_to_256_that_the_constructions_reach() -> None:
    missing = [n for n in range(4, 257, 4) if n not in ORDERS]
    # prime powers would add 52 = 2 (25 + 1), 100 = 2 (49 + 1), 244 = 243 + 1; the rest needs others
    assert missing == [52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244]
    assert [n for n in ORDERS if n % 4] == [1, 2]


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal_and_entries_are_signs(n: int) -> None:
    h = hadamard(n)
    assert h.dtype == torch.float64 and h.shape == (n, n)
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))
    assert torch.equal(h.T @ h, n * torch.eye(n, dtype=torch.float64))


def test_small_orders_by_hand() -> None:
    assert hadamard(2).tolist() == [[1, 1], [1, -1]]
    assert hadamard(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    # Paley I with q = 11: row of quadratic residues 1, 3, 4, 5, 9
    assert hadamard(12)[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]


@pytest.mark.parametrize("n", [0, -4, 3, 6, 92, 172])
def test_unreachable_orders_are_refused_with_a_hint(n: int) -> None:
    with pytest.raises(FormatError) as error:
        rotate(torch.ones(2, 256), n)
    assert str(n) in error.value.what and error.value.hint


def test_blocks_for_real_widths() -> None:
    assert block_sizes(4096) == (16, 32, 64, 128, 4096)
    assert block_sizes(14336) == (16, 32, 64, 128, 14336)  # 28 x 512
    assert block_sizes(13824) == (16, 32, 64, 128, 13824)  # 108 x 128
    assert block_sizes(768) == (16, 32, 64, 128, 768)  # 12 x 64
    assert block_sizes(128) == (16, 32, 64, 128)
    assert block_sizes(172) == () and block_sizes(40) == (40,) and block_sizes(96) == (16, 32, 96)


@pytest.mark.parametrize("n", [1, 2, 16, 128, 256, 1024])
def test_product_equals_butterfly(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, n) * n**0.5, butterfly(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(butterfly(x), x @ hadamard(n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    ("width", "block"),
    [
        (64, 16),
        (172, 32),  # tail of 12
        (40, 16),  # tail of 8
        (40, 64),  # all of it is tail
        (96, 12),  # Paley I
        (84, 28),  # Paley II, not symmetric under the transpose of the whole
        (768, 768),  # Paley, times two factors of Sylvester's
        (1024, 512),  # power of two in two factors
    ],
)
def test_rotation_is_the_matrix_in_the_docstring(width: int, block: int, random: bool) -> None:
    signs = random_signs(width, 5) if random else None
    x = torch.randn(2, 3, width, dtype=torch.float64)
    matrix = explicit(width, block, signs)
    torch.testing.assert_close(rotate(x, block, signs), x @ matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unrotate(x, block, signs), x @ matrix.T, rtol=1e-12, atol=1e-12)
    back = unrotate(rotate(x, block, signs), block, signs)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    tail = width % block
    assert torch.equal(rotate(x, block, signs)[..., width - tail :], x[..., width - tail :])


def test_plain_sylvester_rotation_is_its_own_inverse() -> None:
    x = torch.randn(5, 96, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(x, 32), 32), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    x, signs = torch.randn(7, 256).to(dtype), random_signs(256, 1)
    assert torch.equal(rotate(x, 128, signs), rotate(x.float(), 128, signs).to(dtype))


def test_no_rows_and_one_row() -> None:
    assert rotate(torch.empty(0, 64), 16).shape == (0, 64)
    assert rotate(torch.ones(16), 16).tolist() == [4.0] + [0.0] * 15


def test_signs_are_those_of_splitmix64() -> None:
    """Reference outputs of splitmix64 for state 1234567; the sign is bit 63."""
    outputs = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    want = [-1 if value >> 63 else 1 for value in outputs]
    assert want == [1, 1, -1, 1, -1]
    signs = random_signs(5, 1234567)
    assert signs.dtype == torch.int8 and signs.tolist() == want


def test_signs_of_seed_0_to_the_bit() -> None:
    text = "".join("-" if sign < 0 else "+" for sign in random_signs(16, 0).tolist())
    assert text == "-++-+++-+-+-----"
    assert torch.equal(random_signs(100, 7)[:40], random_signs(40, 7))
    assert abs(int(random_signs(4096, 3).sum())) < 300
    assert torch.equal(random_signs(9, -1), random_signs(9, 2**64 - 1))


def test_a_whole_width_is_one_block_where_it_is_an_order_of_small_cost() -> None:
    expected = {16: 16, 96: 96, 172: 128, 7: 4, 1: 1, 768: 768, 2048: 2048, 5632: 5632, 11008: 128}
    assert {width: whole_block(width) for width in expected} == expected
