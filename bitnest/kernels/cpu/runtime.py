"""The structs of runtime.h, field by field, and how matrices come into them.

A `Linear` here owns what its struct points to; whoever makes a larger struct of them keeps them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from bitnest.kernels.cpu.library import Weight, library
from bitnest.kernels.cpu.linear import CpuWeight

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3}
CACHE_STEP = 64  # positions by which a cache may grow
STAGES = ("embedding", "q k v", "attention", "output", "router", "forward", "head")
PLANES = 2  # of inputs: 16 bits


class LinearStruct(ctypes.Structure):
    """linear_t"""

    _fields_ = (
        ("w", Weight),
        ("rows32", ctypes.c_void_p),
        ("rows16", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class NetworkStruct(ctypes.Structure):
    """network_t"""

    _fields_ = (("gate", LinearStruct), ("up", LinearStruct), ("down", LinearStruct))


class ForwardStruct(ctypes.Structure):
    """forward_t"""

    _fields_ = (
        ("experts", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("hidden", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("expert", ctypes.POINTER(NetworkStruct)),
        ("shared", ctypes.POINTER(NetworkStruct)),
        ("shared_gate", ctypes.c_void_p),
    )


class RouterStruct(ctypes.Structure):
    """router_t"""

    _fields_ = (
        ("experts", ctypes.c_int32),
        ("top", ctypes.c_int32),
        ("sigmoid", ctypes.c_int32),
        ("normalise", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("rows32", ctypes.c_void_p),
        ("rows16", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class AttentionStruct(ctypes.Structure):
    """attention_t"""

    _fields_ = (
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("rotary", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("norm", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("clip", ctypes.c_float),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
    )


class LayerStruct(ctypes.Structure):
    """layer_t"""

    _fields_ = (
        ("first_norm", ctypes.c_void_p),
        ("second_norm", ctypes.c_void_p),
        ("q", LinearStruct),
        ("k", LinearStruct),
        ("v", LinearStruct),
        ("o", LinearStruct),
        ("attention", AttentionStruct),
        ("router", RouterStruct),
        ("forward", ForwardStruct),
    )


class ModelStruct(ctypes.Structure):
    """model_t"""

    _fields_ = (
        ("layers", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("hidden", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("embedding_scale", ctypes.c_float),
        ("layer", ctypes.POINTER(LayerStruct)),
        ("embedding", ctypes.POINTER(LinearStruct)),
        ("head", ctypes.POINTER(LinearStruct)),
        ("norm", ctypes.c_void_p),
    )


class StepStruct(ctypes.Structure):
    """step_t"""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("past", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("halves", ctypes.c_int32),
        ("every", ctypes.c_int32),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("seconds", ctypes.c_void_p),
    )


@cache
def runtime() -> Any:
    """The library with the runtime's signatures, None without it."""
    loaded: Any = library()
    if loaded is None:
        return None
    loaded.model_open.argtypes = [ctypes.POINTER(ModelStruct)]
    loaded.model_open.restype = ctypes.c_void_p
    loaded.model_close.argtypes = [ctypes.c_void_p]
    loaded.model_close.restype = None
    loaded.model_step.argtypes = [ctypes.c_void_p, ctypes.POINTER(StepStruct)]
    loaded.model_step.restype = ctypes.c_int
    loaded.experts_call.argtypes = [ctypes.POINTER(ForwardStruct), *[ctypes.c_int64] * 2,
                                    *[ctypes.c_void_p] * 4]  # fmt: skip
    loaded.experts_call.restype = ctypes.c_int
    return loaded


@dataclass
class Linear:
    """One matrix (out, in) as the runtime reads it, and its bias (out,).

    weight: laid out for the kernels, or a dense float32 or bfloat16 matrix multiplied as it is.
    """

    weight: CpuWeight | torch.Tensor
    bias: torch.Tensor | None = None
    struct: LinearStruct = field(init=False)

    def __post_init__(self) -> None:
        self.struct = LinearStruct()
        if isinstance(self.weight, torch.Tensor):
            kind = torch.bfloat16 if self.weight.dtype == torch.bfloat16 else torch.float32
            self.weight = self.weight.detach().to(kind).contiguous()
            self.struct.w.rows, self.struct.w.columns = self.weight.shape
            name = "rows16" if kind == torch.bfloat16 else "rows32"
            setattr(self.struct, name, self.weight.data_ptr())
        else:
            self.struct.w = self.weight.struct
            self._held = tuple(self.weight.held.values())  # a change of width may let go of some
        if self.bias is not None:
            self.bias = self.bias.detach().float().contiguous()
            self.struct.bias = self.bias.data_ptr()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.struct.w.rows), int(self.struct.w.columns)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return int(self.weight.nbytes)


@dataclass(frozen=True)
class Network:
    """down(act(gate x) * up x). up None: gate holds both, stacked, or is all there is."""

    gate: Linear
    up: Linear | None
    down: Linear

    @property
    def struct(self) -> NetworkStruct:
        """Its matrices', which stay this object's."""
        up = LinearStruct() if self.up is None else self.up.struct
        return NetworkStruct(self.gate.struct, up, self.down.struct)

    @property
    def inner(self) -> int:
        """Width of what the down projection reads."""
        return self.down.shape[1]

    @property
    def linears(self) -> list[Linear]:
        """All its matrices."""
        return [m for m in (self.gate, self.up, self.down) if m is not None]


@dataclass
class Forward:
    """A feed-forward layer: experts (None: dropped), a network for all tokens, or both.

    activation: name as transformers has it. shared_gate: (hidden,), of the network for all.
    """

    hidden: int
    activation: str
    experts: Sequence[Network | None] = ()
    shared: Network | None = None
    shared_gate: torch.Tensor | None = None
    gated: bool = True
    planes: int = PLANES
    struct: ForwardStruct = field(init=False)

    def __post_init__(self) -> None:
        networks = [n for n in (*self.experts, self.shared) if n is not None]
        self._table = (NetworkStruct * max(1, len(self.experts)))()
        for i, network in enumerate(self.experts):
            if network is not None:
                self._table[i] = network.struct
        self.struct = ForwardStruct(
            len(self.experts), self.gated, ACTIVATIONS[self.activation], self.planes, self.hidden,
            max((n.inner for n in networks), default=0), self._table,
        )  # fmt: skip
        if self.shared is not None:
            self._shared = self.shared.struct
            self.struct.shared = ctypes.pointer(self._shared)
        if self.shared_gate is not None:
            self.shared_gate = self.shared_gate.detach().float().contiguous()
            self.struct.shared_gate = self.shared_gate.data_ptr()

    @property
    def linears(self) -> list[Linear]:
        """All its matrices."""
        networks = [n for n in (*self.experts, self.shared) if n is not None]
        return [linear for network in networks for linear in network.linears]
