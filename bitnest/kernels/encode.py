"""Rounding a weight to nearest and packing it, in one step: integers, small floats and NF4.

    scale[, zero]   per group, the one of least squared error among the block codec's candidates:
                    clipped ranges, then the full lopsided range of signed integers, then twice
                    least squares s = <w, v> / <v, v>; without clip the whole range
    v             = snap(w / scale)
    tensors         as `fmt.parts` lays them out

The same numbers as `quantize` gives without importance: bit for bit without clip; with clip a group
may take another of two candidates whose errors differ by less than their sums round.

Two implementations with one signature: C (`encode.c`), 16 rows at a time, a group of each in L1,
and torch, the reference. What C returns depends neither on the machine nor on its threads.

The one number that groups share here is e4m3's `global`, found from the whole weight given: what is
to share it must be encoded together.

Left out (`formats/support.py` has the rule): importance, scales that share more (dq, m2, dual,
blocks), learned tables, ternary codes and symmetric one-bit integers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch

from bitnest.formats.block import BlockFormat
from bitnest.formats.elements import FloatElement, IntElement, TableElement
from bitnest.formats.segments import segments
from bitnest.formats.support import native_encoder
from bitnest.kernels import native as compiled
from bitnest.kernels.decode import NF4
from bitnest.kernels.minifloat import encode as encode_minifloat
from bitnest.kernels.minifloat import round_to
from bitnest.kernels.packing import pack_bits, unpack_bits
from bitnest.kernels.scales import (
    GREATEST_E4M3,
    LEAST_PEAK,
    as_e4m3,
    as_half,
    exponent_above,
    least_half,
    pack_scales,
    power_of_two,
)
from bitnest.kernels.segments import pack_segments

# Clip ratios tried here and by the block codec, by bits: first, last, count.
RATIOS: dict[float, tuple[float, float, int]] = {
    1: (0.15, 1.0, 18), 1.6: (0.3, 1.0, 15), 2: (0.35, 1.0, 14), 3: (0.5, 1.0, 11),
}  # fmt: skip
DEFAULT_RATIOS = (0.7, 1.0, 7)
EXPONENTS = (1.0, 0.5, 0.25)  # of the least power of two that does not clip
REFITS = 2
TINY = 1e-30
THREAD_ROWS = 64  # rows a thread takes at least
POWERS = frozenset({"e8m0", "m1"})


@dataclass(frozen=True)
class Encoded:
    """A stored weight. tensors: as fmt.parts says. error: squared error per row, (O,) float32."""

    fmt: BlockFormat
    tensors: dict[str, torch.Tensor]
    error: torch.Tensor

    def rows(self, rows: slice) -> dict[str, torch.Tensor]:
        """The tensors of some rows, as if they had been encoded alone."""
        count = len(self.error)
        if range(count)[rows] == range(count):
            return dict(self.tensors)
        found = {name: t for name, t in self.tensors.items() if name != "zeros"}
        found = {k: t.clone() if k == "global" else t[rows].clone() for k, t in found.items()}
        if "zeros" in self.tensors:  # packed along the rows
            bits = int(self.fmt.bits)
            zeros = unpack_bits(self.tensors["zeros"].T, bits, count)[:, rows]
            found["zeros"] = pack_bits(zeros, bits).T.contiguous()
        return found


def supported(fmt: BlockFormat) -> bool:
    """Whether `encode` takes the format."""
    return native_encoder(fmt)


def available() -> bool:
    """Whether there is native code on this machine."""
    return compiled.load("encode") is not None


def implementation() -> str:
    """What `encode` runs on a CPU here: `reference`, or `native-` and the hash of its source.

    Part of what a result depends on: the two may differ where candidates tie.
    """
    return f"native-{compiled.source_hash('encode')}" if available() else "reference"


def encode(
    weight: torch.Tensor,
    fmt: BlockFormat,
    half: torch.dtype = torch.bfloat16,
    clip: bool = True,
    native: bool | None = None,
) -> Encoded:
    """Round weight (O, I), float32 or bfloat16, to nearest in `fmt`.

    half: type of 16-bit scales. clip: search clipping ratios. native: False for the reference, True
    for C or an error, None for C where it is to be had.

    Raises:
        ValueError: a format or type that is not supported.
        RuntimeError: native is True and there is no native code, or the weight is not on the CPU.
    """
    if not supported(fmt) or half not in {torch.bfloat16, torch.float16}:
        raise ValueError(f"encode does not support {fmt.name} with scales of {half}")
    if weight.dtype not in {torch.float32, torch.bfloat16} or weight.dim() != 2:
        raise ValueError(f"a weight is a float32 or bfloat16 matrix, not {weight.dtype}")
    library = None
    if native is not False and weight.device.type == "cpu":
        library = compiled.load("encode")
    if native and library is None:
        raise RuntimeError("native code was asked for and there is none here; see the log")
    if library is None:
        return _reference(weight, fmt, half, clip)
    return _native(library, weight, fmt, half, clip)


# ---------------------------------------------------------------- what both search


def _ratios(fmt: BlockFormat, clip: bool) -> tuple[list[float], list[float]]:
    """Candidates: shares of the range that the plain and the full grids cover, all of it first.

    A full grid's are divided by its 2^(b-1) steps.
    """
    if not clip:
        return [1.0], []
    if fmt.scale in POWERS:
        return list(EXPONENTS if fmt.scale == "e8m0" and not fmt.rule else EXPONENTS[:1]), []
    first, last, count = RATIOS.get(int(fmt.bits), DEFAULT_RATIOS)
    ratios = [first + (last - first) * i / (count - 1) for i in range(count)]
    element = fmt.element
    if isinstance(element, IntElement) and element.symmetric and not fmt.balanced:
        return ratios[::-1], [ratio / element.zero for ratio in ratios]
    return ratios[::-1], []


def _refits(fmt: BlockFormat, clip: bool) -> int:
    return REFITS if clip and fmt.scale not in POWERS else 0


def _largest(fmt: BlockFormat) -> float:
    """The largest v that has its negative; the largest code for asymmetric integers."""
    element = fmt.element
    if isinstance(element, FloatElement):
        return element.spec.largest
    if isinstance(element, TableElement):
        return 1.0
    assert isinstance(element, IntElement)
    return float((1 << element.bits) - 1) if not element.symmetric else element.zero - 1


def _emax(fmt: BlockFormat) -> int:
    """Exponent of the largest value's binade, for the rule ocp; MXINT8 has 6 bits of fraction."""
    return math.frexp(_largest(fmt))[1] - 1


def _global(weight: torch.Tensor, fmt: BlockFormat) -> torch.Tensor | None:
    """What e4m3 scales are multiplied by to be stored, (1,) float32: of the largest, 448."""
    if fmt.scale != "e4m3":
        return None
    element = fmt.element
    largest = element.zero - 1 if isinstance(element, IntElement) else _largest(fmt)
    low, high = weight.aminmax()
    peak = torch.maximum(-low, high).float().reshape(1).clamp_min(LEAST_PEAK)
    return GREATEST_E4M3 * largest / peak


def _table(device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """NF4's entries (16,) and the values half-way between neighbours (15,)."""
    entries = torch.tensor(NF4, device=device)
    return entries, (entries[1:] + entries[:-1]) / 2


# ---------------------------------------------------------------- C


class _Job(ctypes.Structure):
    """struct job of encode.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "ratios", "scales", "zeros", "error")),
        ("codes", ctypes.c_void_p * 3),
        *(
            (name, ctypes.c_int64)
            for name in (
                "stride", "columns", "group", "bf16", "kind", "bits", "scale", "ocp", "emax",
                "plain", "full", "refits", "mantissa", "segments",
            )
        ),
        *((name, ctypes.c_int64 * 3) for name in ("width", "shift", "bytes")),
        *(
            (name, ctypes.c_float)
            for name in (
                "low", "high", "zero", "divisor", "largest", "smallest", "tiny", "limit", "shared",
            )
        ),
        *((name, ctypes.c_float * 16) for name in ("table", "middle")),
    )  # fmt: skip


INTEGER, ASYMMETRIC, MINIFLOAT, TABLE = range(4)
BF16, F16, POWER_OF_TWO, E4M3_CODE = range(4)


def _native(
    library: ctypes.CDLL, weight: torch.Tensor, fmt: BlockFormat, half: torch.dtype, clip: bool
) -> Encoded:
    if library.size_of_job() != ctypes.sizeof(_Job):
        raise RuntimeError("encode.c and encode.py disagree about struct job")
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, columns = weight.shape
    types = {"I32": torch.int32, "U8": torch.uint8, "HALF": half}
    tensors = {
        name: torch.empty(part.shape, dtype=types[part.dtype])
        for name, part in fmt.parts((rows, columns)).items()
        if name not in {"zeros", "global"}
    }
    shared = _global(weight, fmt)
    error = torch.empty(rows, dtype=torch.float64)
    zeros = torch.empty(tensors["scales"].shape, dtype=torch.uint8)  # not packed yet
    job = _describe(fmt, half, clip, weight.stride(0), columns)
    job.bf16 = weight.dtype == torch.bfloat16
    job.shared = 0.0 if shared is None else float(shared)
    plain, full = _ratios(fmt, clip)
    ratios = torch.tensor(plain + full, dtype=torch.float32)
    job.plain, job.full, job.refits = len(plain), len(full), _refits(fmt, clip)
    job.weight, job.ratios = weight.data_ptr(), ratios.data_ptr()
    job.scales, job.zeros = tensors["scales"].data_ptr(), zeros.data_ptr()
    job.error = error.data_ptr()
    for k, name in enumerate(name for name in tensors if name != "scales"):
        job.codes[k], job.bytes[k] = tensors[name].data_ptr(), 4 * tensors[name].shape[1]
    _run(library, job, rows)
    if shared is not None:
        tensors["global"] = shared
    if not fmt.symmetric:
        tensors["zeros"] = pack_bits(zeros.T, int(fmt.bits)).T.contiguous()
    return Encoded(fmt, tensors, error.float())


def _run(library: ctypes.CDLL, job: _Job, rows: int) -> None:
    """All rows, in as many slices as torch has threads: ctypes lets go of the interpreter."""

    def some(first: int, last: int) -> int:
        done = library.encode_rows(ctypes.byref(job), ctypes.c_int64(first), ctypes.c_int64(last))
        return int(done)

    threads = max(1, min(torch.get_num_threads(), rows // THREAD_ROWS))
    if threads == 1:
        failed = some(0, rows)
    else:
        cuts = [rows * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            failed = min(pool.map(some, cuts[:-1], cuts[1:]))
    if failed:
        raise MemoryError("no memory for one row of the weight")


def _describe(fmt: BlockFormat, half: torch.dtype, clip: bool, stride: int, columns: int) -> _Job:
    """The numbers of a job that depend on the format."""
    element, bits = fmt.element, int(fmt.bits)
    job = _Job(stride=stride, columns=columns, group=fmt.group_size(columns), bits=bits)
    job.scale = POWER_OF_TWO if fmt.scale in POWERS else BF16 if half == torch.bfloat16 else F16
    if fmt.scale == "e4m3":
        job.scale = E4M3_CODE
    job.tiny, job.limit = least_half(half), torch.finfo(half).max
    job.divisor = _largest(fmt)
    job.ocp, job.emax = fmt.rule == "ocp", _emax(fmt)
    if isinstance(element, FloatElement):
        job.kind, job.mantissa = MINIFLOAT, element.spec.mantissa
        job.largest, job.smallest = element.spec.largest, element.spec.smallest_normal
        widths = segments(bits)
    elif isinstance(element, TableElement):
        entries, middles = _table()
        job.kind, widths = TABLE, (bits,)
        job.table[:], job.middle[:15] = entries.tolist(), middles.tolist()
    else:
        assert isinstance(element, IntElement)
        job.kind = INTEGER if element.symmetric else ASYMMETRIC
        job.high, job.zero = _largest(fmt), element.zero
        job.low = -job.high if fmt.balanced else -job.zero
        widths = (bits,)
    job.segments, shift = len(widths), bits
    for k, width in enumerate(widths):
        shift -= width
        job.width[k], job.shift[k] = width, shift
    return job


# ---------------------------------------------------------------- torch

Project = Callable[[torch.Tensor], torch.Tensor]  # a scale to what will be read back


@dataclass(frozen=True)
class _Grid:
    """What groups w (g, N) are rounded to: (1, N) each; zero only if stored."""

    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def where(self, better: torch.Tensor, other: _Grid) -> _Grid:
        """The other grid's numbers where it is better."""
        zero = self.zero
        if zero is not None and other.zero is not None:
            zero = torch.where(better, other.zero, zero)
        return _Grid(torch.where(better, other.scale, self.scale), zero)


def _reference(weight: torch.Tensor, fmt: BlockFormat, half: torch.dtype, clip: bool) -> Encoded:
    w = weight.float()
    rows, columns = w.shape
    g = fmt.group_size(columns)
    whole = columns // g * g
    shared = _global(weight, fmt)
    project = partial(_project, fmt=fmt, half=half, shared=shared)
    codes, scales, zeros = [], [], []
    error = w.new_zeros(rows, dtype=torch.float64)
    for part, size in ((w[:, :whole], g), (w[:, whole:], columns - whole)):
        if part.numel() == 0:
            continue
        groups = part.reshape(-1, size).T.contiguous()
        grid = _fit(groups, fmt, clip, project)
        v = _snap(groups, grid, fmt)
        miss = (v * grid.scale - groups).square_().sum(0, dtype=torch.float64)
        error += miss.view(rows, -1).sum(1)
        codes.append(_codes(v, grid, fmt).T.reshape(rows, -1))
        scales.append(grid.scale.view(rows, -1))
        zeros += [] if grid.zero is None else [grid.zero.view(rows, -1)]
    tensors = _pack(torch.cat(codes, dim=1), fmt)
    tensors.update(pack_scales(torch.cat(scales, dim=1), fmt, half, shared))
    if zeros:
        tensors["zeros"] = pack_bits(torch.cat(zeros, dim=1).T, int(fmt.bits)).T.contiguous()
    return Encoded(fmt, tensors, error.float())


def _fit(w: torch.Tensor, fmt: BlockFormat, clip: bool, project: Project) -> _Grid:
    """The grid of least squared error for every group, the first of equals."""
    candidates = _candidates(w, fmt, clip, project)
    best = next(candidates)
    if not clip:
        return best
    least = _error(w, best, fmt)
    for other in candidates:
        error = _error(w, other, fmt)
        best, least = best.where(error < least, other), torch.fmin(least, error)
    for _ in range(_refits(fmt, clip)):
        v = _snap(w, best, fmt)
        top, bottom = (v * w).sum(0, keepdim=True), (v * v).sum(0, keepdim=True)
        scale = torch.where(bottom > 0, top / bottom.clamp_min(TINY), best.scale)
        if not fmt.signed_scale:
            scale = torch.where(scale > 0, scale, best.scale)
        other = replace(best, scale=project(scale))
        error = _error(w, other, fmt)
        best, least = best.where(error < least, other), torch.fmin(least, error)
    return best


def _candidates(w: torch.Tensor, fmt: BlockFormat, clip: bool, project: Project) -> Iterator[_Grid]:
    low, high = w.amin(0, keepdim=True), w.amax(0, keepdim=True)
    peak = torch.maximum(-low, high)
    lopsided = torch.where(-low >= high, -low, -high)  # the extra code on the larger side
    plain, full = _ratios(fmt, clip)
    for ratio in plain:
        if fmt.rule == "ocp":
            exponent = torch.frexp(peak).exponent - 1 - _emax(fmt)
            yield _Grid(power_of_two(exponent))
        elif fmt.symmetric:
            yield _Grid(project(peak / _largest(fmt) * ratio))
        else:
            a, b = low.clamp_max(0) * ratio, high.clamp_min(0) * ratio
            scale = project((b - a) / _largest(fmt))
            yield _Grid(scale, (-a / scale).round_().clamp_(0, _largest(fmt)))
    for ratio in full:
        yield _Grid(project(lopsided * ratio))


def _project(
    scale: torch.Tensor, fmt: BlockFormat, half: torch.dtype, shared: torch.Tensor | None
) -> torch.Tensor:
    """The scale as it will be read back, never zero. shared: global (1,) of e4m3."""
    if shared is not None:
        return as_e4m3(scale, shared)
    if fmt.scale in POWERS:
        return power_of_two(exponent_above(scale))
    return as_half(scale, half)


def _snap(w: torch.Tensor, grid: _Grid, fmt: BlockFormat) -> torch.Tensor:
    """v: the nearest number to w / scale that a code stands for, less the zero point."""
    x, element = w / grid.scale, fmt.element
    if isinstance(element, FloatElement):
        return round_to(x, element.spec, out=x)
    if isinstance(element, TableElement):
        entries, middles = _table(x.device)
        place = torch.bucketize(x, middles, out_int32=True)
        return entries.index_select(0, place.flatten()).view(x.shape)
    if grid.zero is not None:
        return torch.clamp(x.round_(), -grid.zero, _largest(fmt) - grid.zero)
    assert isinstance(element, IntElement)
    high = _largest(fmt)
    return x.round_().clamp_(-high if fmt.balanced else -element.zero, high)


def _error(w: torch.Tensor, grid: _Grid, fmt: BlockFormat) -> torch.Tensor:
    """Squared error of every group, (1, N)."""
    return _snap(w, grid, fmt).mul_(grid.scale).sub_(w).square_().sum(0, keepdim=True)


def _codes(v: torch.Tensor, grid: _Grid, fmt: BlockFormat) -> torch.Tensor:
    if isinstance(fmt.element, FloatElement):
        return encode_minifloat(v, fmt.element.spec)
    if isinstance(fmt.element, TableElement):
        return torch.bucketize(v, _table(v.device)[1]).to(torch.uint8)
    assert isinstance(fmt.element, IntElement)
    return (v + (fmt.element.zero if grid.zero is None else grid.zero)).to(torch.uint8)


def _pack(codes: torch.Tensor, fmt: BlockFormat) -> dict[str, torch.Tensor]:
    if isinstance(fmt.element, FloatElement):
        return pack_segments(codes, int(fmt.bits))
    return {"codes": pack_bits(codes, int(fmt.bits))}
