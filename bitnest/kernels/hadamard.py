"""Hadamard matrices and the orthogonal block rotation that quantisation mixes channels with.

A Hadamard matrix H has entries +-1 and H H^T = n I. Orders that can be built here:

    1, 2, 4, 8 ...   Sylvester: H_2n = [[1, 1], [1, -1]] (x) H_n
    q + 1            Paley I,  q prime, q = 3 mod 4
    2 (q + 1)        Paley II, q prime, q = 1 mod 4
    m 2^j            H_m (x) H_(2^j), m one of the above

The rotation of x (..., I) by blocks of b channels is x R with

    R = diag(signs) (I_k (x) H_b / sqrt(b)),   k = I // b

and the last I % b channels left as they are, so every width can be given. R R^T = I. Signs come
from a generator of our own (`random_signs`), so a rotation is named by (block, seed) and any other
implementation can rebuild it.

How it is computed: x (H_m (x) H_p) is two small products, H_m^T X H_p on x seen as (m, p). Powers
of two above 128 are split in two factors. One CPU thread, float32, 512 x 4096 values, ms:

    block            16    32    64   128   256  1024  4096
    butterfly      21.3  28.1  34.2  23.3  28.3  33.7  25.7
    one product     0.9   0.9   3.0   3.4   6.4  23.4  97.4
    two factors       -     -     -     -   1.7   2.0   5.1

so the butterfly, whose log2(b) passes each move all of x, is kept as the reference only.

Left out: prime powers in Paley's constructions, and orders such as 92 that need others.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np
import torch

from bitnest.errors import FormatError

BLOCKS = (16, 32, 64, 128)
LARGEST_CORE = 256  # a dense product of this size per value is what a whole width may cost
ONE_PRODUCT = 128  # powers of two up to here are one matrix product


def hadamard(n: int) -> torch.Tensor:
    """A Hadamard matrix of order n, (n, n) float64 of +-1.

    Raises:
        FormatError: no construction known here has this order.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in _factors(n):
        matrix = torch.kron(matrix, factor)
    return matrix


def block_sizes(width: int) -> tuple[int, ...]:
    """Blocks that divide `width`: of 16, 32, 64 and 128, and the whole width if it is an order.

    A whole width that is m 2^j costs about m + 2^(j/2 + 1) products a value, where m is Paley's.
    """
    sizes = [block for block in BLOCKS if width % block == 0]
    if width not in sizes and core_order(width) is not None:
        sizes.append(width)
    return tuple(sizes)


def whole_block(width: int) -> int:
    """The block that rotates all of `width` at once where that is an order of a small Paley part.

    Otherwise the largest power of two up to 128 that fits, which leaves a tail.
    """
    core = core_order(width)
    if core is not None and core <= LARGEST_CORE:
        return width
    return min(BLOCKS[-1], 1 << (width.bit_length() - 1))


def core_order(n: int) -> int | None:
    """The smallest order m of Paley (or 1) with n = m 2^j, or None."""
    if n < 1:
        return None
    if n & (n - 1) == 0:
        return 1
    odd = n // (n & -n)
    m = 4 * odd
    while n % m == 0:
        if _is_prime(m - 1) or (m % 8 == 4 and _is_prime(m // 2 - 1)):
            return m
        m *= 2
    return None


def rotate(x: torch.Tensor, block: int, signs: torch.Tensor | None = None) -> torch.Tensor:
    """x R over the last axis. Types under 32 bits are computed in float32 and rounded once.

    x: (..., I). block: any order of `hadamard`. signs: (I,) of +-1; those of the tail are unused.
    """
    return _blockwise(x, block, signs, inverse=False)


def unrotate(x: torch.Tensor, block: int, signs: torch.Tensor | None = None) -> torch.Tensor:
    """x R^T over the last axis, which undoes `rotate`."""
    return _blockwise(x, block, signs, inverse=True)


def random_signs(width: int, seed: int) -> torch.Tensor:
    """Signs (width,) int8 from splitmix64: sign i is -1 where bit 63 of its output i is set.

    Output i (from 0) of state `seed`, everything modulo 2^64:

        z = seed + (i + 1) * 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = z ^ (z >> 31)
    """
    # numpy's unsigned arrays wrap around; numpy's scalars would warn, hence the arrays of one
    golden, first, second = (
        np.array([value], dtype=np.uint64)
        for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
    )
    start = np.array([seed % 2**64], dtype=np.uint64)
    z = start + np.arange(1, width + 1, dtype=np.uint64) * golden
    z = (z ^ (z >> np.uint64(30))) * first
    z = (z ^ (z >> np.uint64(27))) * second
    z = z ^ (z >> np.uint64(31))
    return torch.from_numpy(1 - 2 * (z >> np.uint64(63)).astype(np.int8))


def butterfly(x: torch.Tensor) -> torch.Tensor:
    """Reference: x H over the last axis, a power of two, by the fast Walsh-Hadamard transform."""
    width, half = x.shape[-1], 1
    y = x
    while half < width:
        y = y.reshape(-1, width // (2 * half), 2, half)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], dim=2)
        half *= 2
    return y.reshape(x.shape)


def _blockwise(
    x: torch.Tensor, block: int, signs: torch.Tensor | None, inverse: bool
) -> torch.Tensor:
    work = x if x.dtype in {torch.float32, torch.float64} else x.float()
    factors = [factor.to(work.device, work.dtype) for factor in _factors(block)]
    body = x.shape[-1] // block * block
    head = work[..., :body]
    flip = None if signs is None else signs[:body].to(work.device, work.dtype)
    if flip is not None and not inverse:
        head = head * flip
    head = _product(head.unflatten(-1, (-1, block)), factors, inverse).flatten(-2)
    head = head * block**-0.5
    if flip is not None and inverse:
        head = head * flip
    return torch.cat([head, work[..., body:]], dim=-1).to(x.dtype)


def _product(x: torch.Tensor, factors: list[torch.Tensor], inverse: bool) -> torch.Tensor:
    """x (F_1 (x) F_2 ...) over the last axis, or times the transpose, one factor at a time."""
    if x.numel() == 0:
        return x
    shape, rest = x.shape, prod(len(factor) for factor in factors)
    for factor in factors:
        rest //= len(factor)
        f = factor.T if inverse else factor
        if rest == 1:
            x = x.reshape(-1, len(f)) @ f
        else:
            x = f.T @ x.reshape(-1, len(f), rest)
    return x.reshape(shape)


@lru_cache(maxsize=32)
def _factors(n: int) -> tuple[torch.Tensor, ...]:
    """Matrices whose Kronecker product, in this order, is the Hadamard matrix of order n."""
    core = core_order(n)
    if core is None:
        raise FormatError(
            f"no Hadamard matrix of order {n} can be built here",
            hint="powers of two always can; q + 1 and 2 (q + 1) for some primes q, times those",
        )
    power = (n // core).bit_length() - 1
    if 2**power <= ONE_PRODUCT:
        parts = [power]
    else:
        parts = [power // 2, power - power // 2]
    factors = [_sylvester(part) for part in parts if part]
    return (*([_paley(core)] if core > 1 else []), *factors) or (_sylvester(0),)


def _sylvester(power: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _paley(m: int) -> torch.Tensor:
    """I: I + [[0, 1], [-1, Q]]. II: C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] with
    C = [[0, 1], [1, Q]]. Q_ij = 1 where i - j is a square modulo q, else -1, and 0 for i = j.
    """
    first = _is_prime(m - 1)
    q = m - 1 if first else m // 2 - 1
    character = -torch.ones(q, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1
    character[0] = 0
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:], border[1:, 0] = 1, -1 if first else 1
    border[1:, 1:] = character[(torch.arange(q)[:, None] - torch.arange(q)) % q]
    one = torch.eye(q + 1, dtype=torch.float64)
    if first:
        return one + border
    outer = border.new_tensor([[1.0, 1.0], [1.0, -1.0]])
    inner = border.new_tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(border, outer) + torch.kron(one, inner)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
