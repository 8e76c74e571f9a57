"""Which implementation runs a format on a device, and why no other does.

A provider is a set of kernels for one kind of device. Its module is in MODULES, imports without
torch, a compiler or triton, and calls `register` with a function

    why_not(asked, shape) -> str        "" where it runs `asked` on this machine, else the reason,
                                        for example "5-bit tables" or "no triton"

asked is what multiplies: a weight's format (inputs of 16 bits), `Rounded` weights and inputs, or
the format of a KV cache; shape: (out, in) of the weight, or (tokens, head width) of a cache. Of a
wrapped weight its core is asked for, of a split one both parts, as `laid` has them multiplied; with
rounded inputs only rotations and permutations are taken off, as there too. The first provider that
answers "" is taken, else the reference in torch: decode, then a dense product. Providers ask what
`laid.lay_out` and the attention of packed models ask, so that what `bitnest doctor` prints runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from bitnest.formats import (
    AnyFormat,
    LowRankFormat,
    SplitFormat,
    TransformedFormat,
    parse_format,
)
from bitnest.formats.inputs import DENSE, InputFormat, parse_inputs, split_name
from bitnest.formats.kv import KVFormat, parse_kv
from bitnest.formats.wrappers import core_format

MODULES = ("bitnest.kernels.cpu.paths", "bitnest.kernels.gpu.paths")
REFERENCE = "reference"
SHAPE = (4096, 4096)
CACHE_SHAPE = (4096, 128)
KV = "kv:"  # before the name of a cache's format


@dataclass(frozen=True)
class Rounded:
    """A weight's format and that of what it reads."""

    weights: AnyFormat
    inputs: InputFormat


Asked = AnyFormat | Rounded | KVFormat


@dataclass(frozen=True)
class Provider:
    """Kernels of one kind. name: as it is printed. device: torch's type of device: cpu, cuda."""

    name: str
    device: str
    why_not: Callable[[Asked, tuple[int, int]], str]


@dataclass(frozen=True)
class Path:
    """name: of the provider, or `reference`. reason: why no provider; empty where one runs it."""

    name: str
    reason: str


_registered: list[Provider] = []


def register(provider: Provider) -> None:
    """Ask this provider from now on, after those that are registered; one of a name and device."""
    same = (provider.name, provider.device)
    _registered[:] = [p for p in _registered if (p.name, p.device) != same] + [provider]


def providers(device: str) -> list[Provider]:
    """Those for a device such as `cpu` or `cuda:1`."""
    for module in MODULES:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
    return [p for p in _registered if p.device == device.partition(":")[0]]


def path(fmt: str | Asked, device: str, shape: tuple[int, int] | None = None) -> Path:
    """What runs `fmt` on `device`: a format, or a name: int4-g128, int4-g128/int8-token, kv:int8.
    shape: SHAPE, of a cache CACHE_SHAPE, unless it is given.

    Raises:
        FormatError: no such name.
    """
    asked = parse_asked(fmt) if isinstance(fmt, str) else fmt
    if shape is None:
        shape = CACHE_SHAPE if isinstance(asked, KVFormat) else SHAPE
    if isinstance(asked, Rounded) and (why := _not_of_codes(asked.weights)):
        return Path(REFERENCE, why)
    reasons = []
    for provider in providers(device):
        why = next(filter(None, (provider.why_not(*core) for core in _cores(asked, shape))), "")
        if not why:
            return Path(provider.name, "")
        reasons.append(f"{provider.name}: {why}")
    return Path(REFERENCE, "; ".join(reasons) or f"no kernels for {device.partition(':')[0]}")


def whole_integers(inputs: InputFormat, channels: int) -> str:
    """Why inputs of that many channels are no single run of integers, as kernels take them; empty:
    they are."""
    if not inputs.integer:
        return "only integers are multiplied as codes, floats as the numbers they stand for"
    if inputs.wide is not None and inputs.wide_of(channels):
        return "inputs in two formats"
    return "" if inputs.keep is None else f"not where a channel reaches {inputs.keep}"


def _not_of_codes(fmt: AnyFormat) -> str:
    """Why a product of codes on both sides never gives this weight's; empty: it may."""
    if isinstance(fmt, LowRankFormat):
        return "a low-rank residual is no integer"
    if isinstance(fmt, SplitFormat):
        return "weights in two formats meet rounded inputs in the reference"
    return _not_of_codes(core_format(fmt)) if isinstance(fmt, TransformedFormat) else ""


def _cores(asked: Asked, shape: tuple[int, int]) -> list[tuple[Asked, tuple[int, int]]]:
    """What is left of `asked` without its wrappers, and the shapes of that."""
    if isinstance(asked, Rounded):
        return [
            (Rounded(core, asked.inputs), size)
            for core, size in _cores(asked.weights, shape)
            if not isinstance(core, Rounded | KVFormat)
        ]
    if isinstance(asked, LowRankFormat | TransformedFormat):
        return _cores(core_format(asked), shape)
    if isinstance(asked, SplitFormat):
        wide, rest = asked.shapes(shape)
        return [(part, size) for part, size in ((asked.wide, wide), (asked.base, rest)) if size[1]]
    return [(asked, shape)]


def parse_asked(name: str) -> Asked:
    """What is spelt WEIGHTS, WEIGHTS/INPUTS or kv:CACHE.

    Raises:
        FormatError: no such name.
    """
    if name.startswith(KV):
        return parse_kv(name.removeprefix(KV))
    weights, inputs = split_name(name)
    fmt = parse_format(weights)
    return fmt if inputs in {None, DENSE} else Rounded(fmt, parse_inputs(str(inputs)))
