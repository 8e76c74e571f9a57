"""Attention of few query tokens over a quantised cache, read as it is stored.

    s[r, t] = scaling q[r] k[t] (+ softcap, mask),  y[r] = sum over t of softmax(s[r])[t] v[t]

with k and v what `kernels/kv.py` stores: codes of old tokens, keys before the rotary embedding and
turned as they are read, and tokens in the model's own type behind them. Causal among the queries,
which are the cache's last tokens; of a sliding window only what is in it.

The reference is `attend_reference`: dequantise, turn, multiply, in float64 if asked. The kernel
splits the context between threads and merges in a fixed order: the same bits with any number of
them. Its integer paths (AVX2, AVX-512) compute keys in fixed point of 14 bits per pair of channels:
error against float64 below 1.5e-3 of the largest output in every test, with channels eight times
as loud as others; rounding keys to bfloat16 alone costs 4e-3. Elsewhere plain float32 loops run.

Left out: many queries (prompts), more than 512 channels, keys and values on other devices.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from bitnest.formats.kv import KVFormat
from bitnest.kernels import kv
from bitnest.kernels.cpu import team

TILE = 128
MAX_ROWS, MAX_WIDTH = 64, 512
KINDS = {"int8": 1, "int4": 2, "fp8_e4m3": 3, "fp8_e5m2": 4}
DENSE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Turning(Protocol):
    """A rotation of keys: frequencies (r / 2,) in radians a position; neighbours: pairs of channels
    are (2i, 2i + 1) rather than (i, i + r/2)."""

    @property
    def frequencies(self) -> torch.Tensor:
        """See above."""

    @property
    def neighbours(self) -> bool:
        """See above."""


@dataclass(frozen=True)
class Held:
    """What a layer's cache holds for one pass, its tokens included.

    stored: codes of the old tokens by name, as `packed/kv_cache.py` keeps them; may be empty. keys,
    values: (B, H, m, D), (B, H, m, E) of the tokens behind them. start: position of the first
    stored token. turning: of the stored keys. scales: of keys and values in 8-bit floats. sliding:
    tokens that a query attends to, itself included.
    """

    fmt: KVFormat
    stored: Mapping[str, torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor
    start: int = 0
    turning: Turning | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    sliding: int | None = None

    @property
    def tokens(self) -> tuple[int, int]:
        """Stored, and behind them."""
        return self.stored["keys"].shape[2] if self.stored else 0, self.keys.shape[2]

    @property
    def visible(self) -> int:
        """Tokens from the first one that is not forgotten."""
        return sum(self.tokens)


class _Cache(ctypes.Structure):
    """`attention_t` of attention.h, field by field."""

    _fields_ = [
        *((name, c_int64) for name in (
            "batch", "heads", "share", "queries", "key_width", "value_width", "stored", "start",
            "recent", "sliding",
        )),
        *((name, c_int32) for name in ("kind", "span", "dense", "neighbours", "rotated", "fast")),
        *((name, c_float) for name in ("key_factor", "value_factor", "scaling", "softcap")),
        *((name, c_void_p) for name in (
            "q", "keys", "values", "key_scale", "key_low", "value_scale", "value_low",
            "recent_keys", "recent_values",
        )),
        *((name, c_int64 * 2) for name in (
            "key_strides", "value_strides", "key_scale_strides", "value_scale_strides",
            "recent_key_strides", "recent_value_strides",
        )),
        ("sinks", c_void_p), ("mask", c_void_p), ("mask_strides", c_int64 * 2),
        ("mask_first", c_int64),
        *((name, c_void_p) for name in ("base", "turn", "table", "out", "scratch")),
    ]  # fmt: skip


def why_not(held: Held, queries: int, heads: int) -> str | None:
    """Why the kernel cannot run for that many query tokens of `heads` query heads; None: it can."""
    share = heads // max(1, held.keys.shape[1])
    width = max(held.keys.shape[-1], held.values.shape[-1])
    if team.library() is None:
        return "no native code here"
    if any(t.device.type != "cpu" for t in (held.keys, *held.stored.values())):
        return "the cache is not on the CPU"
    if held.keys.dtype not in DENSE or held.values.dtype != held.keys.dtype:
        return f"keys of type {held.keys.dtype}"
    if any(held.stored[n].dtype != torch.uint8 for n in ("keys", "values") if held.stored):
        return "codes of another kind"
    if queries * share > MAX_ROWS or width > MAX_WIDTH:
        return f"{queries} tokens of {share} heads a KV head, {width} channels"
    return None


def attend(
    q: torch.Tensor,
    held: Held,
    scaling: float,
    *,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    plain: bool = False,
) -> torch.Tensor:
    """(B, n, Hq, E) in q's type, of queries (B, Hq, n, D), the last n tokens of what is held.

    softcap: 0 for none. sinks: (Hq,) logits of nothing. mask: (B, n, m), added to the scores of the
    last m tokens, or bool, True to attend. plain: the loops for any machine, for comparison. Where
    `why_not` has a reason, this must not be called.
    """
    library = team.library()
    assert library is not None, "why_not was not asked"
    given = _Call(q, held, mask, sinks)
    c = given.struct
    c.scaling, c.softcap, c.fast = scaling, softcap, 0 if plain else 1
    if held.turning is not None and held.stored:
        given.turn(library, held, held.turning)
    batch, heads, queries, _ = q.shape
    out = torch.empty(batch, queries, heads, held.values.shape[-1])
    size = library.attention_scratch(ctypes.byref(c), library.get_threads())
    c.out, c.scratch = out.data_ptr(), given.hold(torch.empty(size + 64, dtype=torch.uint8), 64)
    if out.numel():
        library.attention(ctypes.byref(c))
    return out.to(q.dtype)


class _Call:
    """The struct of a call, and what it points to."""

    def __init__(
        self, q: torch.Tensor, held: Held, mask: torch.Tensor | None, sinks: torch.Tensor | None
    ) -> None:
        self.struct, self.kept = _Cache(), []  # type: ignore[var-annotated]
        c, fmt = self.struct, held.fmt
        c.batch, heads, c.queries, c.key_width = q.shape
        c.heads, c.value_width = held.keys.shape[1], held.values.shape[-1]
        c.share = heads // c.heads
        c.stored, c.recent = held.tokens
        c.start, c.sliding = held.start, held.sliding or 0
        c.span = fmt.group
        c.dense = DENSE[held.keys.dtype]
        c.key_factor, c.value_factor = held.scales
        c.q = self.hold(q.float().contiguous())
        c.recent_keys, c.recent_key_strides = self._part(held.keys)
        c.recent_values, c.recent_value_strides = self._part(held.values)
        if held.stored:
            self._store(held.stored, fmt)
        if sinks is not None:
            c.sinks = self.hold(sinks.detach().float().contiguous())
        if mask is not None:
            self._mask(mask, c.start + c.stored + c.recent)

    def hold(self, tensor: torch.Tensor, align: int = 1) -> int:
        """Its address, rounded up; the tensor lives as long as the call."""
        self.kept.append(tensor)
        return -(-tensor.data_ptr() // align) * align

    def _part(self, tensor: torch.Tensor) -> tuple[int, Any]:
        """Address and strides of (B, H, n, C) whose tokens are contiguous."""
        if tensor.stride(-1) != 1 or (tensor.shape[2] > 1 and tensor.stride(2) != tensor.shape[3]):
            tensor = tensor.contiguous()
        return self.hold(tensor), (c_int64 * 2)(tensor.stride(0), tensor.stride(1))

    def _store(self, stored: Mapping[str, torch.Tensor], fmt: KVFormat) -> None:
        c = self.struct
        c.kind = KINDS[fmt.element]
        c.keys, c.key_strides = self._part(stored["keys"])
        c.values, c.value_strides = self._part(stored["values"])
        if not fmt.integer:
            return
        c.key_scale, c.key_scale_strides = self._part(stored["key_scale"])
        c.value_scale, c.value_scale_strides = self._part(stored["value_scale"])
        # scale and low are made together: the same strides
        c.key_low, low = self._part(stored["key_low"])
        c.value_low, value_low = self._part(stored["value_low"])
        assert list(low) == list(c.key_scale_strides), "scale and low differ in strides"
        assert list(value_low) == list(c.value_scale_strides), "scale and low differ in strides"

    def _mask(self, mask: torch.Tensor, position: int) -> None:
        c = self.struct
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        mask = mask.float().expand(c.batch, c.queries, -1).contiguous()
        c.mask = self.hold(mask)
        c.mask_strides = (c_int64 * 2)(mask.stride(0), mask.stride(1))
        c.mask_first = position - mask.shape[-1]

    def turn(self, library: ctypes.CDLL, held: Held, turning: Turning) -> None:
        """Point to the angles."""
        c = self.struct
        tables = _tables(turning, held.fmt)
        c.rotated, c.neighbours = 2 * len(turning.frequencies), int(turning.neighbours)
        c.base = self.hold(tables.up_to(held.start + held.tokens[0]))
        c.turn, c.table = tables.turn.data_ptr(), tables.packed(library, c).data_ptr()


@dataclass
class _Tables:
    """Cosines and sines of tiles' first tokens and of tokens in a tile, of one rotation and format.

    tile: tokens of one. span: of a group.
    """

    frequencies: torch.Tensor
    span: int
    base: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    table: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.per = -(-self.span // TILE)
        self.tile = -(-self.span // self.per)
        self.turn = self._angles(torch.arange(TILE))

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """(n, 2, r / 2) float32: cosines and sines, of angles in float64."""
        angles = positions.double()[:, None] * self.frequencies.detach().cpu().double()
        return torch.stack((angles.cos(), angles.sin()), dim=1).float().contiguous()

    def up_to(self, tokens: int) -> torch.Tensor:
        """Those of the tiles of at least so many tokens."""
        need = -(-tokens // self.span) * self.per
        if len(self.base) < need:
            tiles = torch.arange(need + need // 2 + 8)
            self.base = self._angles(tiles // self.per * self.span + tiles % self.per * self.tile)
        return self.base

    def packed(self, library: ctypes.CDLL, c: _Cache) -> torch.Tensor:
        """As the kernel's integer path reads them."""
        if self.table is None:
            about = c.kind, c.rotated, c.neighbours, self.turn.data_ptr(), self.tile
            self.table = torch.zeros(library.attention_table(*about, None), dtype=torch.uint8)
            library.attention_table(*about, self.table.data_ptr())
        return self.table


_known: WeakKeyDictionary[Any, dict[tuple[str, int], _Tables]] = WeakKeyDictionary()


def _tables(turning: Turning, fmt: KVFormat) -> _Tables:
    mine = _known.setdefault(turning, {})
    key = fmt.element, fmt.group
    if key not in mine:
        mine[key] = _Tables(turning.frequencies, fmt.group)
    return mine[key]


def declare(library: ctypes.CDLL) -> None:
    """Say what the C functions take."""
    library.attention.argtypes = [c_void_p]
    library.attention.restype = None
    library.stream_read.argtypes = [c_void_p, c_int64]
    library.attention_scratch.argtypes = [c_void_p, ctypes.c_int]
    library.attention_scratch.restype = c_int64
    library.attention_table.argtypes = [
        ctypes.c_int, c_int64, ctypes.c_int, c_void_p, c_int64, c_void_p,
    ]  # fmt: skip
    library.attention_table.restype = c_int64


def attend_reference(
    q: torch.Tensor,
    held: Held,
    scaling: float,
    *,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The same in torch, in `dtype`: (B, n, Hq, E)."""
    keys, values = held.keys.to(dtype), held.values.to(dtype)
    if held.stored:
        old, old_values = _decoded(held, dtype)
        keys, values = torch.cat([old, keys], 2), torch.cat([old_values, values], 2)
    share, (n, total) = q.shape[1] // keys.shape[1], (q.shape[2], keys.shape[2])
    keys, values = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1)
    s = q.to(dtype) @ keys.transpose(2, 3) * scaling
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if mask is not None:
        m = mask.shape[-1]
        added = mask.to(dtype)
        if mask.dtype == torch.bool:
            added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
        s[..., total - m :] += added[:, None]
    at = torch.arange(total - n, total)[:, None]
    seen = torch.arange(total) <= at
    if held.sliding is not None:
        seen &= torch.arange(total) > at - held.sliding
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(dtype)[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    weights = torch.softmax(s, -1).nan_to_num(0.0)[..., :total]
    return (weights @ values).transpose(1, 2).contiguous()


def _decoded(held: Held, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    fmt, part = held.fmt, held.stored
    if not fmt.integer:
        keys, values = (kv.dequantize_fp8(part[n], fmt.element, 1.0) for n in ("keys", "values"))
        return keys.to(dtype) * held.scales[0], values.to(dtype) * held.scales[1]
    codes = [
        kv.unpack_nibbles(part[n], w.shape[-1]) if fmt.bits == 4 else part[n]
        for n, w in (("keys", held.keys), ("values", held.values))
    ]
    scale, low = (
        part[n].to(dtype).repeat_interleave(fmt.group, 2) for n in ("key_scale", "key_low")
    )
    keys = codes[0].to(dtype) * scale + low
    values = codes[1].to(dtype) * part["value_scale"].to(dtype) + part["value_low"].to(dtype)
    if held.turning is not None:
        keys = _turned(keys, held.start, held.turning)
    return keys, values


def _turned(keys: torch.Tensor, start: int, turning: Turning) -> torch.Tensor:
    half = len(turning.frequencies)
    positions = torch.arange(start, start + keys.shape[2]).double()
    angles = positions[:, None] * turning.frequencies.double()
    cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
    a, b = (slice(0, half), slice(half, 2 * half))
    if turning.neighbours:
        a, b = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    found = keys.clone()
    found[..., a] = keys[..., a] * cos - keys[..., b] * sin
    found[..., b] = keys[..., b] * cos + keys[..., a] * sin
    return found
