"""Ternary codes in bytes: five to a byte, or 16-bit words of a dictionary fitted to the zero share.

A code is a digit 0, 1 or 2 for the value -1, 0 or +1; a matrix has shape (O, I).

`pack_trits`: byte j of a row is the sum over i < 5 of 3^i * digit[5j + i], the tail padded with
digit 1 (value zero). 1.6 bits per trit, whatever the digits.

`encode_trits` cuts each row into sequences, each a leaf of a parse tree, and stores the leaf's
number as one word: a Tunstall code (Tunstall 1967), of all such trees the one of longest mean
sequence on independent trits. An integer k in [1, 254] alone fixes the tree:

    P(node) = (2k/512)^zeros * ((256 - k)/512)^signs, exact; zeros counts digit 1, signs 0 and 2
    order:  P descending, then depth ascending, then path ascending (lexicographic in the digits)
    inner nodes: the first 32767 nodes shallower than 255 in that order; each has three children
    leaves: the other children, 65535 of them, numbered 0..65534 in lexicographic order of paths

A parent is more probable than its children, so this is Tunstall's "expand the most probable leaf"
with ties settled. Nodes of one class (zeros, signs) are equally probable and two classes of one
depth never are (k = 256/3 is no integer): whole classes become inner in turn, the last in part.
The bound of 255 digits binds from k = 248 and costs 1% of the size at k = 252, 10% at k = 254.

A row is parsed from the root by itself; its last sequence is completed with zeros and the decoder
cuts at I. Word 65535 is never written. As stored:

    words    int16 (N,)      leaf number modulo 2^16, rows one after another
    offsets  int32 (O + 1,)  row r is words[offsets[r]:offsets[r + 1]]; offsets[O] = N
    k        uint8 (1,)

QMoE (Frantar & Alistarh 2023) too looks 16-bit words up in a table, rows apart so that they decode
in parallel. Its one dictionary is the 2^16 most probable sequences of up to 14 pairs at a zero
share of 0.885, prefixes of others included, parsed by longest match. Here no entry is a prefix of
another, so none serves only at the end of a row; runs of zeros go past 28; and the tree follows the
matrix's own share: on random trits 0.655 bits against that construction's 0.734 at 0.885, 1.20
against 1.69 at 0.7.

Left out: unequal signs, dependence between neighbours, a zero share per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

import torch
from torch import Tensor

from bitnest.errors import ArtifactError

LEAVES = 65535  # the most that 16-bit words can count: each split adds two leaves
LONGEST = 255  # digits per sequence: bounds a tree's tables to 9 MB
SHORTEST = 2  # no tree of LEAVES leaves, whatever its k, has a shallower leaf
BLOCK = 1 << 21  # trits decoded at once: 12 bytes of indices each


@dataclass(frozen=True, eq=False)
class TritStream:
    """An encoded matrix, as it is stored."""

    words: Tensor  # (N,) int16
    offsets: Tensor  # (O + 1,) int32
    k: int

    def __post_init__(self) -> None:
        words, offsets = self.words, self.offsets
        if not 1 <= self.k <= 254:
            raise ArtifactError(f"k = {self.k} names no tree: it is an integer from 1 to 254")
        if words.dtype != torch.int16 or offsets.dtype != torch.int32:
            raise ArtifactError(f"{words.dtype} words, {offsets.dtype} offsets: not int16, int32")
        bounded = offsets.ndim == words.ndim == 1 and offsets.numel() > 1 and int(offsets[0]) == 0
        if not bounded or offsets[-1] != words.numel() or bool((offsets.diff() <= 0).any()):
            raise ArtifactError(f"row offsets do not rise from 0 to the {words.numel()} words")


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A parse tree as tables. An inner node is the index in `step` of its three children."""

    step: Tensor  # (3 * inner,) int32: at node + digit, the child node, or ~word of a leaf
    lengths: Tensor  # (leaves,) int32
    starts: Tensor  # (leaves,) int32 into symbols
    symbols: Tensor  # (sum of lengths,) uint8: the leaves' digits, one after another


def pack_trits(codes: Tensor) -> Tensor:
    """Codes (..., I) uint8 in {0, 1, 2} to bytes (..., ceil(I/5)) uint8."""
    _check_codes(codes)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 5), value=1)
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=codes.device)
    return (padded.unflatten(-1, (-1, 5)) * powers).sum(-1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """Bytes (..., ceil(columns/5)) uint8 to codes (..., columns) uint8."""
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-columns // 5):
        raise ArtifactError(f"{packed.dtype} {tuple(packed.shape)} is not {columns} trits a row")
    if packed.numel() and int(packed.max()) >= 243:
        raise ArtifactError(f"byte {int(packed.max())} is no five base-3 digits (at most 242)")
    table = torch.tensor([[byte // 3**i % 3 for i in range(5)] for byte in range(243)])
    digits = table.to(packed.device, torch.uint8)[packed.to(torch.int32)]
    return digits.flatten(-2)[..., :columns].contiguous()


@lru_cache(maxsize=256)
def inner_classes(k: int, leaves: int = LEAVES) -> dict[tuple[int, int], int]:
    """Inner nodes of each class (zeros, signs), in the order in which the classes become inner."""
    if not (1 <= k <= 254 and 3 <= leaves <= LEAVES and leaves % 2):
        raise ValueError(f"k = {k} is not in [1, 254], or {leaves} leaves not odd in [3, {LEAVES}]")
    inner: dict[tuple[int, int], int] = {}
    left = (leaves - 1) // 2
    heap = [(-(512**LONGEST), 0, 0)]  # (-P * 512^LONGEST, depth, zeros): the order above, exactly
    while left:
        _, depth, zeros = heappop(heap)
        signs = depth - zeros
        inner[zeros, signs] = min(left, math.comb(depth, zeros) << signs)
        left -= inner[zeros, signs]
        # each class enters once, from a more probable one: by a sign, or as zeros only
        for z, s in [(zeros, signs + 1)] + [(zeros + 1, 0)] * (signs == 0):
            if z + s < LONGEST:
                weight = (2 * k) ** z * (256 - k) ** s * 512 ** (LONGEST - z - s)
                heappush(heap, (-weight, z + s, z))
    return inner


@lru_cache(maxsize=32)
def dictionary(k: int, leaves: int = LEAVES) -> Dictionary:
    """The tables of tree k, walked depth first with paths ascending, so leaves come in order."""
    inner = dict(inner_classes(k, leaves))  # of each class, how many nodes are yet to become inner
    step: list[int] = []
    paths: list[bytes] = []
    pending = [(b"", 0, 0)]  # path, its zeros, the place in step that points to it
    while pending:
        path, zeros, place = pending.pop()
        kind = (zeros, len(path) - zeros)
        name = ~len(paths)
        if inner.get(kind):
            inner[kind] -= 1
            name = len(step)
            step += [0, 0, 0]
            pending += [(path + bytes([d]), zeros + (d == 1), name + d) for d in (2, 1, 0)]
        else:
            paths.append(path)
        if path:
            step[place] = name
    lengths = torch.tensor([len(path) for path in paths], dtype=torch.int32)
    return Dictionary(
        step=torch.tensor(step, dtype=torch.int32),
        lengths=lengths,
        starts=lengths.cumsum(0, dtype=torch.int32) - lengths,
        symbols=torch.frombuffer(bytearray(b"".join(paths)), dtype=torch.uint8),
    )


def encode_trits(codes: Tensor, k: int | None = None, leaves: int = LEAVES) -> TritStream:
    """Codes (O, I) uint8 in {0, 1, 2} to a stream, by tree k (by default the best one).

    One step per column moves every row one node down the tree.

    Raises:
        ValueError: codes or k out of range, or more words than int32 offsets can count.
    """
    _check_codes(codes)
    k = best_k(codes) if k is None else k
    table = dictionary(k, leaves)
    rows, columns = codes.shape
    width = -(-columns // int(table.lengths.min())) + 1  # one spare, for the incomplete word
    if rows * width >= 1 << 31:
        raise ValueError(f"({rows}, {columns}) codes are too many for int32 row offsets")
    step = table.step.to(codes.device)
    base = torch.arange(rows, device=codes.device) * width
    slot, node = base.clone(), torch.zeros_like(base, dtype=torch.int32)
    buffer = torch.zeros(rows * width, dtype=torch.int16, device=codes.device)
    for digit in codes.t().contiguous():
        word = step.index_select(0, node + digit)
        buffer.scatter_(0, slot, word.to(torch.int16))  # overwritten until a leaf is reached
        slot += word < 0
        node = word.clamp_(min=0)
    word = node
    while bool((word >= 0).any()):
        word = torch.where(word < 0, word, step[word.clamp(min=0) + 1])
    buffer.scatter_(0, slot, word.to(torch.int16))
    counts = slot - base + (node > 0)  # a row at the root has no sequence to complete
    filled = torch.arange(width, device=codes.device) < counts[:, None]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return TritStream(~buffer.view(rows, width)[filled], offsets, k)


def decode_trits(stream: TritStream, rows: int, columns: int, leaves: int = LEAVES) -> Tensor:
    """A stream to codes (rows, columns) uint8.

    Raises:
        ArtifactError: a word that is no leaf, or rows that do not hold `columns` trits.
    """
    if stream.offsets.numel() != rows + 1 or columns < 1:
        raise ArtifactError(f"{stream.offsets.numel() - 1} coded rows are not ({rows}, {columns})")
    table = dictionary(stream.k, leaves)
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=stream.words.device)
    block = max(1, BLOCK // columns)
    for row in range(0, rows, block):
        offsets = stream.offsets[row : row + block + 1].to(torch.int64)
        words = stream.words[offsets[0] : offsets[-1]].to(torch.int32) & 0xFFFF
        _decode_rows(table, words, offsets - offsets[0], codes[row : row + block])
    return codes


def _decode_rows(table: Dictionary, words: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Words (n,) of the rows that start at offsets, to out (rows, I)."""
    device, columns = words.device, out.shape[1]
    if int(words.max()) >= table.lengths.numel():
        raise ArtifactError(f"word {int(words.max())} of a ternary stream is no leaf of its tree")
    lengths = table.lengths.to(device)[words]
    totals = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))[offsets].diff()
    beyond, last = totals - columns, offsets[1:] - 1
    if bool(((beyond < 0) | (beyond >= lengths[last])).any()):
        raise ArtifactError(f"a row of a ternary stream does not end at {columns} trits")
    lengths[last] -= beyond.to(torch.int32)
    shift = table.starts.to(device)[words] - (lengths.cumsum(0, dtype=torch.int32) - lengths)
    source = torch.repeat_interleave(shift, lengths, output_size=out.numel())
    source += torch.arange(out.numel(), dtype=torch.int32, device=device)
    torch.index_select(table.symbols.to(device), 0, source, out=out.view(-1))


def best_k(codes: Tensor) -> int:
    """The k of least expected size at the codes' share of zeros: the nearest or one beside it."""
    _check_codes(codes)
    share = float((codes == 1).sum()) / codes.numel()
    nearby = sorted({min(max(round(256 * share) + i, 1), 254) for i in (-1, 0, 1)})
    return min(nearby, key=lambda k: expected_bits(k, share))


def expected_bits(k: int, zero_share: float, leaves: int = LEAVES) -> float:
    """Bits per trit of tree k on independent trits, row ends apart: 16 / mean sequence length.

    The mean length is the probability of the inner nodes summed: each adds a digit to its own.
    """
    sign = (1 - zero_share) / 2
    classes = inner_classes(k, leaves).items()
    return 16 / sum(count * zero_share**z * sign**s for (z, s), count in classes)


def entropy_bits(zero_share: float) -> float:
    """Entropy per trit in bits: what no code of independent trits can stay under."""
    shares = [zero_share, (1 - zero_share) / 2, (1 - zero_share) / 2]
    return -sum(p * math.log2(p) for p in shares if p > 0)


def encoded_nbytes(stream: TritStream) -> int:
    """Bytes of words, offsets and k as tensors of a safetensors file."""
    return 2 * stream.words.numel() + 4 * stream.offsets.numel() + 1


def worst_nbytes(rows: int, columns: int, k: int | None = None) -> int:
    """Bytes that no (rows, columns) codes exceed with tree k, or with any tree."""
    shortest = SHORTEST if k is None else int(dictionary(k).lengths.min())
    return 2 * rows * -(-columns // shortest) + 4 * (rows + 1) + 1


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.numel() == 0 or int(codes.max()) > 2:
        raise ValueError("ternary codes are a non-empty uint8 tensor of 0, 1 and 2")
