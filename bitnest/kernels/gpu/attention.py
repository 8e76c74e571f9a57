"""Attention of one new token over a quantised KV cache, without decoding the cache to memory.

    out[b, h] = sum over t of softmax_t(scale q[b, h] . k[b, h // Q, t]) v[b, h // Q, t]

over the visible tokens t: the latest `recent` ones in 16 bits and the `stored` ones before them as
codes, laid out as `kernels/kv.py` does it (docs/kv-cache.md): integers with keys before rotary
embedding, which are turned as they are read, or 8-bit floats as they came. What differs from step
to step (lengths, where the stored tokens start) is in `spans` on the device, so a captured graph
serves all of them. Relative error against float64: 2e-6 in float32, 2e-3 and 2e-2 at most where
queries and the window are float16 and bfloat16.

Angles: position p is 64 u + v, and R(p) = R(64 u) R(v). Two small tables, computed in float64, give
every angle to float32's precision; a table for all positions would be read more than the keys are.

Left out: several new tokens at once (a prompt, speculative decoding), attention sinks as logits,
soft caps, and heads with an odd number of channels or of rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from bitnest.errors import FormatError
from bitnest.formats.kv import INTEGERS
from bitnest.kernels import kv
from bitnest.kernels.gpu.attention_kernels import decode_merge, decode_split
from bitnest.kernels.gpu.attention_tiles import FINE
from bitnest.kernels.gpu.registry import Variant

LOG2E = 1.4426950408889634
BLOCK = 64  # tokens of a tile; at most FINE
STAGES = 2
WAVES = 4  # programs for each multiprocessor
FLOATS = {"fp8_e4m3": 1, "fp8_e5m2": 2}


@dataclass(frozen=True)
class RotaryTables:
    """coarse (U, 2, r/2), fine (64, 2, r/2): cos and sin of positions 64 u and v, float32.
    neighbours: pairs are channels (2i, 2i + 1), else (i, i + r/2)."""

    coarse: torch.Tensor
    fine: torch.Tensor
    neighbours: bool = False

    def turn(self, keys: torch.Tensor, start: int) -> torch.Tensor:
        """Keys (..., n, D) turned as those of positions start, start + 1, ..."""
        half = self.fine.shape[2]
        at = torch.arange(start, start + keys.shape[-2], device=keys.device)
        far, near = self.coarse[at // FINE.value].double(), self.fine[at % FINE.value].double()
        cos = (far[:, 0] * near[:, 0] - far[:, 1] * near[:, 1]).to(keys.dtype)
        sin = (far[:, 1] * near[:, 0] + far[:, 0] * near[:, 1]).to(keys.dtype)
        a, b = slice(0, half), slice(half, 2 * half)
        if self.neighbours:
            a, b = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        turned = keys.clone()
        turned[..., a] = keys[..., a] * cos - keys[..., b] * sin
        turned[..., b] = keys[..., b] * cos + keys[..., a] * sin
        return turned


def rotary_tables(
    frequencies: torch.Tensor, positions: int, neighbours: bool = False
) -> RotaryTables:
    """Tables for positions 0 to `positions` - 1 of frequencies (r / 2,), radians a position."""

    def table(at: torch.Tensor) -> torch.Tensor:
        angles = at.to(frequencies.device, torch.float64)[:, None] * frequencies.double()
        return torch.stack((angles.cos(), angles.sin()), 1).float().contiguous()

    fine = FINE.value
    coarse = fine * torch.arange(-(-positions // fine))
    return RotaryTables(table(coarse), table(torch.arange(fine)), neighbours)


@dataclass(frozen=True)
class QuantizedKV:
    """A layer's cache. B sequences, H heads, room for n stored and w recent tokens, all contiguous.

    element: int8, int4, fp8_e4m3 or fp8_e5m2. group: tokens that share the scales of keys.
    keys (B, H, n, C) uint8; key_scale, key_low (B, H, n / group, D) float16; values (B, H, n, C')
    uint8; value_scale, value_low (B, H, n, 1) float16: as `kernels/kv.py` makes them; None for
    floats. recent_keys (B, H, w, D), recent_values (B, H, w, E) in the type of queries. scales: of
    keys and values in floats. rotation: of stored keys, None where they are stored as they came.

    Raises:
        FormatError: not contiguous, or sizes that the kernel does not take.
    """

    element: str
    group: int
    keys: torch.Tensor
    values: torch.Tensor
    recent_keys: torch.Tensor
    recent_values: torch.Tensor
    key_scale: torch.Tensor | None = None
    key_low: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    value_low: torch.Tensor | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    rotation: RotaryTables | None = None

    def __post_init__(self) -> None:
        width, half = self.recent_keys.shape[3], self.half
        if width % 2 or self.recent_values.shape[3] % 2 or half % 2 or 2 * half > width:
            raise FormatError(
                f"heads of {width} and {self.recent_values.shape[3]} channels, {half} pairs of "
                "them rotated",
                hint="the GPU kernel takes even numbers of each; use the cache's own reading",
            )
        if self.element not in {*INTEGERS, *FLOATS} or self.keys.shape[2] % self.group:
            raise FormatError(f"{self.element} with {self.keys.shape[2]} tokens in {self.group}s")
        parts = (
            self.keys, self.values, self.recent_keys, self.recent_values, self.key_scale,
            self.key_low, self.value_scale, self.value_low,
        )  # fmt: skip
        if not all(part is None or part.is_contiguous() for part in parts):
            raise FormatError("a KV cache that is not contiguous")

    @property
    def bits(self) -> int:
        """Of a code."""
        return INTEGERS.get(self.element, 8)

    @property
    def half(self) -> int:
        """Pairs of channels that are rotated."""
        return 0 if self.rotation is None else self.rotation.fine.shape[2]


def attend_reference(
    q: torch.Tensor, cache: QuantizedKV, spans: torch.Tensor, *,
    scale: float | None = None, sliding: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The same in plain torch, computed in float32 (float64 for float64 queries)."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = _decoded(cache, work)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = q.new_zeros(q.shape[0], q.shape[1], values.shape[-1])
    repeat = q.shape[1] // max(1, keys.shape[1])
    for b, (start, stored, recent, hidden) in enumerate(spans.tolist()):
        k, v = keys[b, :, :stored], values[b, :, :stored]
        if cache.rotation is not None:
            k = cache.rotation.turn(k, start)
        k = torch.cat([k, cache.recent_keys[b, :, :recent].to(work)], 1)
        v = torch.cat([v, cache.recent_values[b, :, :recent].to(work)], 1)
        seen = start + stored + recent
        first = max(hidden, 0 if sliding is None else seen - sliding, start) - start
        if first >= k.shape[1]:
            continue
        k, v = (x[:, first:].repeat_interleave(repeat, 0) for x in (k, v))
        weights = ((k @ q[b].to(work)[..., None])[..., 0] * scale).softmax(-1)
        out[b] = (weights[:, None] @ v)[:, 0].to(q.dtype)
    return out


def _decoded(cache: QuantizedKV, work: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored keys before their rotation, and values."""
    if cache.element in FLOATS:
        keys = kv.dequantize_fp8(cache.keys, cache.element, cache.scales[0])
        return keys.to(work), kv.dequantize_fp8(cache.values, cache.element, cache.scales[1]).to(
            work
        )
    assert cache.key_scale is not None and cache.key_low is not None
    assert cache.value_scale is not None and cache.value_low is not None
    stored = kv.Codes(cache.keys, cache.key_scale, cache.key_low)
    keys = kv.dequantize_keys(stored, cache.bits, cache.group, cache.recent_keys.shape[3])
    stored = kv.Codes(cache.values, cache.value_scale, cache.value_low)
    return keys.to(work), kv.dequantize_values(stored, cache.bits, cache.recent_values.shape[3]).to(
        work
    )


def decode_attention(
    q: torch.Tensor, cache: QuantizedKV, spans: torch.Tensor, *,
    scale: float | None = None, sliding: int | None = None, programs: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of queries (B, H Q, D) to (B, H Q, E), in the type of q and of recent tokens.

    spans: (B, 4) int32 on the device: position of the first stored token, stored tokens, recent
    ones (the query's own is the last) and tokens from the sequence's first on that nobody sees
    (left padding). A sequence without tokens gets 0. scale: D^-1/2 unless given. sliding: tokens
    that are visible, the query's own included. programs: that share the work; the order of sums,
    and so the last bits, depend on it.
    """
    batch, heads, width = cache.recent_keys.shape[0], cache.recent_keys.shape[1], q.shape[2]
    channels, queries = cache.recent_values.shape[3], q.shape[1] // max(1, heads)
    out = q.new_empty(batch, q.shape[1], channels)
    if out.numel() == 0:
        return out
    programs = programs or _programs(q.device)
    sizes = _sizes(queries, batch, width, channels, cache.half)
    slots = programs + batch * heads
    part_m = torch.empty(slots, queries, dtype=torch.float32, device=q.device)
    part_l = torch.empty_like(part_m)
    part_out = torch.empty(slots, queries, channels, dtype=torch.float32, device=q.device)
    rotation, window = cache.rotation, sliding or 0
    factor = 256.0 if cache.element == "fp8_e4m3" else 1.0  # what the kernel's cast leaves out
    decode_split[(programs,)](
        q.contiguous(), cache.keys, cache.key_scale, cache.key_low, cache.values,
        cache.value_scale, cache.value_low, cache.recent_keys, cache.recent_values, spans,
        None if rotation is None else rotation.coarse, None if rotation is None else rotation.fine,
        part_m, part_l, part_out, batch, heads, cache.keys.shape[2], cache.recent_keys.shape[2],
        window, (width**-0.5 if scale is None else scale) * LOG2E, cache.scales[0] * factor,
        cache.scales[1] * factor, queries, width, channels, cache.half,
        rotation is not None and rotation.neighbours, cache.group, cache.bits,
        FLOATS.get(cache.element, 0), BLOCK, sizes["BQ"], sizes["BLOCK_B"], sizes["QP"],
        sizes["TP"], sizes["EP"], num_warps=_warps(width), num_stages=STAGES,
    )  # fmt: skip
    decode_merge[(batch * heads,)](
        part_m, part_l, part_out, spans, out, batch, heads, programs, window, queries, channels,
        BLOCK, sizes["BQ"], sizes["BLOCK_B"], 2 * sizes["EP"], num_warps=4,
    )  # fmt: skip
    return out


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return WAVES
    return WAVES * torch.cuda.get_device_properties(device).multi_processor_count


def _warps(width: int) -> int:
    # with 4, tiles of more than 64 channels do not fit into registers
    return 4 if width <= 64 else 8


def _sizes(queries: int, batch: int, width: int, channels: int, half: int) -> dict[str, int]:
    """Padded sizes: powers of two, at least 16 where they enter a matrix product."""
    power = triton.next_power_of_2
    return {
        "BQ": max(16, power(queries)), "BLOCK_B": power(batch), "QP": max(16, power(half // 2)),
        "TP": max(16, power(width // 2 - half)), "EP": max(16, power(channels // 2)),
    }  # fmt: skip


def _variants() -> list[Variant]:
    names = ("batch", "heads", "capacity", "recent_capacity", "sliding")
    found = []
    for element, width, kind in (
        ("int4", 128, "bf16"), ("int8", 128, "bf16"), ("int4", 64, "bf16"), ("int8", 80, "fp16"),
        ("int4", 96, "bf16"), ("fp8_e4m3", 128, "bf16"), ("fp8_e5m2", 64, "fp16"),
    ):  # fmt: skip
        integer = element in INTEGERS
        half = width // 2 if integer else 0
        types = {
            **dict.fromkeys(("q", "recent_keys", "recent_values"), f"*{kind}"),
            **dict.fromkeys(("keys", "values"), "*u8"), "spans": "*i32",
            **dict.fromkeys(("part_m", "part_l", "part_out"), "*fp32"),
            **dict.fromkeys(names, "i32"),
            **dict.fromkeys(("score_scale", "key_factor", "value_factor"), "fp32"),
        }  # fmt: skip
        scales = ("key_scale", "key_low", "value_scale", "value_low")
        values: dict[str, object] = {
            "QUERIES": 8, "D": width, "E": width, "HALF": half, "NEIGHBOURS": False,
            "GROUP": 128 if integer else 1, "BITS": INTEGERS.get(element, 8),
            "FLOAT": FLOATS.get(element, 0), "BLOCK": BLOCK, **_sizes(8, 8, width, width, half),
        }  # fmt: skip
        if integer:
            types |= dict.fromkeys(scales, "*fp16") | dict.fromkeys(("coarse", "fine"), "*fp32")
        else:
            values |= dict.fromkeys((*scales, "coarse", "fine"))
        label = f"attention-{element}-d{width}-{kind}"
        found.append(Variant(label, decode_split, types, values, _warps(width), STAGES))
    merge = {
        **dict.fromkeys(("part_m", "part_l", "part_out"), "*fp32"), "spans": "*i32", "out": "*bf16",
        **dict.fromkeys(("batch", "heads", "programs", "sliding"), "i32"),
    }  # fmt: skip
    shape = {"QUERIES": 8, "E": 128, "BLOCK": BLOCK, "BQ": 16, "BLOCK_B": 8, "EP": 128}
    return [*found, Variant("attention-merge-d128-bf16", decode_merge, merge, shape, 4, 2)]


VARIANTS = _variants()
