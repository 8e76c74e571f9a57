"""Packed modules: linears and experts whose weights stay packed in memory and decode as they run.

`PackedWeight` holds one site's stored tensors. `PackedLinear` replaces a linear layer. An experts
module keeps its class's gating, activation and biases: `pack_experts` takes its 3-D weights away
and gives it packed ones, decoded one expert at a time. The arithmetic is the plain reference path:
decode, then a dense product in the input's type. A head is decoded some rows at a time; embeddings
are in `embedding`.

Packed tensors are buffers outside the state dict: they are read from the artifact's packed files,
not by transformers' loader, and `save_pretrained` of a packed model is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bitnest.formats import AnyFormat, ZeroFormat
from bitnest.formats.inputs import InputFormat
from bitnest.kernels.decode import decode
from bitnest.kernels.experts import experts_forward
from bitnest.kernels.laid import Laid, change, lay_out, rounded
from bitnest.kernels.products import CodedWeight, integer_weight, rounded_product
from bitnest.kernels.rows import decode_rows, row_decodable
from bitnest.sites import Site

SLICE = 1 << 24  # weights of a head decoded at once
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedWeight(nn.Module):
    """One site's stored tensors; `decode` gives the (out, in) matrix.

    fmt: how it is stored. shape: (out, in). Tensors are set by `load`. keep: hold on to the decoded
    matrix, which takes its dense size and saves decoding it again. inputs: how what it reads is
    rounded, with the static scale of these, if they are; `rounds` switches that off and on.
    looked_up: rows are asked for while it multiplies, so a layout does not replace what is stored.

    The first product lays the weight out for the kernels of its device (`kernels/laid`), in the
    place of the stored tensors: these are restored when they are asked for.
    """

    def __init__(self, fmt: AnyFormat, shape: tuple[int, int]) -> None:
        super().__init__()
        self.fmt = fmt
        self.shape = shape
        self.keep = False
        self.inputs: InputFormat | None = None
        self.static: float | None = None
        self.rounds = True
        self.looked_up = False
        self.version = 0  # counts changes of what is held
        self._laid: Laid | None = None
        self._unlaid = False  # no kernel takes it: asked once
        self._kept: torch.Tensor | None = None
        self._codes: list[CodedWeight] | None = None
        parts = fmt.parts(shape)
        for name in parts:
            self.register_buffer(name, None, persistent=False)
        self.parts = tuple(parts)
        self.place: torch.Tensor | None  # empty; says where a weight without tensors lives
        self.register_buffer("place", None, persistent=False)

    def load(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Take the stored tensors onto `device`."""
        self._laid, self._unlaid = None, False
        self.version += 1
        for name in self.parts:
            setattr(self, name, tensors[name].to(device))
        self.place = torch.empty(0, dtype=torch.uint8, device=device)

    def change(self, fmt: AnyFormat, tensors: Mapping[str, torch.Tensor]) -> None:
        """Become `fmt`, which shares parts with what is here. tensors: the parts it adds."""
        if self._laid is not None:
            self._laid = None if self.looked_up else self._changed(fmt, tensors)
        device, parts = self.device, fmt.parts(self.shape)
        for name in set(self.parts) - set(parts):
            delattr(self, name)
        for name in parts:
            if name not in self.parts:
                fresh = tensors[name].to(device) if self._laid is None else None
                self.register_buffer(name, fresh, persistent=False)
        self.fmt, self.parts, self._kept, self._codes = fmt, tuple(parts), None, None
        self._unlaid = False
        self.version += 1

    def _changed(self, fmt: AnyFormat, tensors: Mapping[str, torch.Tensor]) -> Laid | None:
        """The layout become `fmt` in place; restored and None where it cannot."""
        assert self._laid is not None
        device = self.device
        changed = change(self._laid, fmt, {n: t.to(device) for n, t in tensors.items()})
        if changed is None:
            self.restore()
        return changed

    def lay_out(self) -> Laid | None:
        """The weight as this device's kernels want it; None where none takes its format."""
        if self._laid is None and not self._unlaid and not self.dropped:
            self._laid = lay_out(self.tensors, self.fmt, self.shape)
            self._unlaid = self._laid is None
            self.version += 1
            if self._laid is not None and not self.looked_up:
                for name in self.parts:
                    setattr(self, name, None)
        return self._laid

    def restore(self) -> None:
        """Hold the stored tensors again, and no layout."""
        if self._laid is not None:
            for name, tensor in self.tensors.items():
                setattr(self, name, tensor)
            self._laid = None
            self.version += 1

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: layouts hold addresses, so what is stored goes instead."""
        self.restore()
        return self.__dict__.copy()

    @property
    def loaded(self) -> bool:
        """Whether the stored tensors are here."""
        return self.place is not None

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        laid = 0 if self._laid is None else self._laid.nbytes
        return laid + sum(t.nbytes for name in self.parts if (t := getattr(self, name)) is not None)

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense (out, in) matrix: made anew at each call, or once if `keep` is set."""
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        dense = decode(self.tensors, self.fmt, self.shape, dtype).to(self.device)
        if self.keep:
            self._kept = dense
        return dense

    @property
    def rounding(self) -> bool:
        """Whether inputs are rounded."""
        return self.inputs is not None and self.rounds and not self.dropped

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b, (..., out) of x (..., in), in x's type. Inputs are rounded where they are to
        be; the product is a kernel's where one takes the format, unless a decoded matrix is held or
        gradients are to flow."""
        native = not self.keep and not x.requires_grad and x.dtype in KERNEL_TYPES
        laid = self.lay_out() if native else None
        flat = x.reshape(-1, self.shape[1])
        if self.rounding:
            y = self._rounded(flat, laid)
        elif laid is not None:
            y = laid.product(flat)
        else:
            return F.linear(x, self.decode(x.dtype), bias)
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias

    def _rounded(self, x: torch.Tensor, laid: Laid | None) -> torch.Tensor:
        """The product with x (n, in) rounded, (n, out) float32."""
        assert self.inputs is not None
        if laid is not None:
            y = rounded(laid, x, self.fmt, self.inputs, self.static)
            if y is not None:
                return y
        codes = self._codes
        if codes is None and self.inputs.integer:
            codes = integer_weight(self.tensors, self.fmt, self.shape)
            self._codes = codes if self.keep else None
        return rounded_product(
            x.float(), self.inputs, self.static, self.fmt, self.tensors,
            codes=codes, dense=self.decode(torch.float32) if codes is None else None,
        )  # fmt: skip

    def rows(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some of its rows (n,) int64, decoded: (n, in). Where a layout replaced what is stored,
        this comes back to stay."""
        if self._laid is not None and not self.looked_up:
            self.restore()
            self.looked_up = True
        return decode_rows(self.tensors, self.fmt, self.shape, rows.to(self.device), dtype)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name; restored, at some cost, where a layout replaced them."""
        if self._laid is not None and not self.looked_up:
            return self._laid.restore()
        return {name: getattr(self, name) for name in self.parts}

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        assert self.place is not None, "the packed files have not been read"
        return self.place.device

    @property
    def dropped(self) -> bool:
        """Whether all of it is zero."""
        return isinstance(self.fmt, ZeroFormat)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedWeight:
        """Move between devices, but never let `.to(dtype)` change stored scales."""
        self.restore()
        stored = self.tensors
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        inputs = f"/{self.inputs.name}" if self.inputs else ""
        return f"{self.fmt.name}{inputs}, shape={self.shape}"


@contextmanager
def inputs_unrounded(model: nn.Module) -> Iterator[None]:
    """Run packed weights with their inputs left alone."""
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    for weight in packed:
        weight.rounds = False
    try:
        yield
    finally:
        for weight in packed:
            weight.rounds = True


def hold_decoded(model: nn.Module) -> bool:
    """Keep every packed weight decoded from its first use on, if half of the free memory holds them
    all in the model's type; gives whether it does. The reference's numbers come out, which kernels
    give up to rounding; for many tokens at a time."""
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    size = next(model.parameters()).element_size() if packed else 0
    need = sum(weight.shape[0] * weight.shape[1] for weight in packed) * size
    fits = 2 * need <= free_memory(next(model.parameters()).device) if packed else False
    for weight in packed:
        weight.keep = fits
    return fits


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; 0 where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


def mark_initialised(item: Any) -> None:
    """Tell transformers' loader that this module or tensor gets its values from elsewhere."""
    item._is_hf_initialized = True


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed. in_features, out_features and bias as in nn.Linear."""

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.packed = packed
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        mark_initialised(self)
        mark_initialised(packed)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded matrix, for code that looks at a layer's weight; in float32.

        Before the packed files are read it has no values, and says so to transformers' loader,
        which would initialise a parent's linear layers otherwise.
        """
        if not self.packed.loaded:
            empty = torch.empty(self.packed.shape, device="meta")
            mark_initialised(empty)
            return empty
        return self.packed.decode(torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed.product(x, self.bias)


class PackedHead(PackedLinear):
    """A PackedLinear of many rows, decoded SLICE weights at a time where its format allows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = max(1, SLICE // self.in_features)
        small = self.out_features <= step or not row_decodable(self.packed.fmt)
        if small or self.packed.lay_out() is not None:
            return super().forward(x)
        parts = []
        for start in range(0, self.out_features, step):
            rows = torch.arange(start, min(start + step, self.out_features))
            bias = None if self.bias is None else self.bias[start : start + step]
            parts.append(F.linear(x, self.packed.rows(rows, x.dtype), bias))
        return torch.cat(parts, dim=-1)


class _PackedExperts:
    """What `pack_experts` mixes into an experts module's class."""

    packed_sites: dict[str, list[tuple[Site, PackedWeight]]]
    packed_dropped: frozenset[int]
    packed_added: dict[tuple[str, tuple[int, int] | None], nn.Module] | None = None  # adapters

    def packed_weight(self, expert: int, param: str, dtype: torch.dtype) -> torch.Tensor:
        """One expert's (out, in) matrix of `param`, its parts stacked in row order."""
        parts = [w for _, w in self.packed_sites[f"{param}.{expert}"]]
        decoded = [part.decode(dtype) for part in parts]
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)

    def packed_product(self, expert: int, param: str, x: torch.Tensor) -> torch.Tensor:
        """What one expert's `param` gives for x (n, in), its parts one by one."""
        parts = [w.product(x) for _, w in self.packed_sites[f"{param}.{expert}"]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        from bitnest.packed.experts_call import experts_call

        found = experts_call(self, hidden_states, top_k_index, top_k_weights)
        if found is not None:
            return found
        dtype = hidden_states.dtype
        return experts_forward(
            self,
            lambda expert, param: self.packed_weight(expert, param, dtype),
            hidden_states,
            top_k_index,
            top_k_weights,
            dropped=self.packed_dropped,
            added=None if self.packed_added is None else self.add_adapters,
            product=self.packed_product,
        )

    def add_adapters(
        self, expert: int, param: str, x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """What x (n, in) gives with the adapters of an expert's `param`, y (n, out) without."""
        key, given, start = f"{param}.{expert}", self.packed_added or {}, 0
        parts = []
        for site, weight in self.packed_sites[key]:
            part = y[:, start : start + weight.shape[0]]
            start += weight.shape[0]
            added = given.get((key, site.rows))
            parts.append(part if added is None else added(x, part))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def pack_linear(parent: nn.Module, leaf: str, fmt: AnyFormat, site: Site) -> PackedWeight:
    """Put a PackedLinear, still empty, in the place of `parent`'s linear layer `leaf`."""
    old = getattr(parent, leaf)
    packed = PackedWeight(fmt, site.shape)
    kind = PackedHead if site.kind == "head" else PackedLinear
    setattr(parent, leaf, kind(packed, old.bias))
    return packed


def pack_experts(module: Any, sites: list[tuple[Site, AnyFormat]]) -> list[PackedWeight]:
    """Take an experts module's 3-D weights and give it packed ones, still empty, in site order."""
    weights = [PackedWeight(fmt, site.shape) for site, fmt in sites]
    table: dict[str, list[tuple[Site, PackedWeight]]] = {}
    for (site, _), weight in zip(sites, weights, strict=True):
        table.setdefault(f"{site.param}.{site.expert}", []).append((site, weight))
    for parts in table.values():
        parts.sort(key=lambda part: part[0].rows or (0, 0))
    for param in {site.param for site, _ in sites}:
        delattr(module, param)
    module.packed = nn.ModuleList(weights)
    module.packed_sites = table
    down = {key: parts for key, parts in table.items() if key.startswith("down_proj.")}
    module.packed_dropped = frozenset(
        int(key.rpartition(".")[2])
        for key, parts in down.items()
        if all(weight.dropped for _, weight in parts)
    )
    mark_initialised(module)
    cls = type(module)
    module.__class__ = type(f"Packed{cls.__name__}", (_PackedExperts, cls), {})
    return weights
