"""Which transformers models the C runtime can run, and their description in its terms.

A family is known by its config's model_type and described by data: how queries and keys are
normed, which layers have a window, how the router's scores become weights. Everything else is read
off the modules, and every module must be one that is understood, without hooks or adapters;
anything else is refused with a reason, and the caller runs transformers instead.

Packed weights are taken as they are laid out (`PackedWeight.lay_out`), so they lie in memory once;
dense bfloat16 ones are laid out here; other dense ones are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitnest.kernels.cpu.layout_tables import lay_dense
from bitnest.kernels.cpu.linear import CpuWeight
from bitnest.kernels.cpu.runtime import (
    ACTIVATIONS,
    AttentionStruct,
    Forward,
    LayerStruct,
    Linear,
    Network,
    RouterStruct,
)
from bitnest.packed.embedding import PackedRows
from bitnest.packed.modules import PackedHead, PackedLinear, PackedWeight

WIDEST_HEAD = 1024  # attention.c keeps a head on the stack
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}  # whose angles do not depend on the length


class NotNative(Exception):
    """Why a model does not run in C."""


@dataclass(frozen=True)
class Family:
    """norms: of queries and keys: 0 none, 1 each head, 2 all heads as one row. window: "config",
    "layers" (config.layer_types says which) or none. experts: whether layers may have them.
    normalise: whether chosen scores are divided by their sum; None: config.norm_topk_prob."""

    norms: int = 0
    window: str = ""
    experts: bool = False
    normalise: bool | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(window="config"),
    "qwen2": Family(window="layers"),
    "qwen3": Family(norms=1, window="layers"),
    "qwen2_moe": Family(window="layers", experts=True),
    "qwen3_moe": Family(norms=1, window="config", experts=True),
    "mixtral": Family(window="config", experts=True, normalise=True),
    "olmoe": Family(norms=2, experts=True),
}


@dataclass
class Layer:
    """One decoder block. tensors: what its struct points to, besides the matrices."""

    attention: tuple[Linear, Linear, Linear, Linear]  # q, k, v, o
    forward: Forward
    struct: LayerStruct
    tensors: list[torch.Tensor]


@dataclass
class Description:
    """A whole model. head is embedding where they are tied."""

    layers: list[Layer]
    embedding: Linear
    head: Linear
    norm: torch.Tensor
    eps: float
    rotary: Any
    kv_heads: int
    width: int

    @property
    def linears(self) -> list[Linear]:
        """Every matrix once."""
        found = [m for layer in self.layers for m in (*layer.attention, *layer.forward.linears)]
        ends = [self.embedding] if self.head is self.embedding else [self.embedding, self.head]
        return found + ends


def describe(model: Any, planes: int, progress: Callable[[int, int], None]) -> Description:
    """What the runtime has to know of a transformers model; planes: of inputs.

    Raises:
        NotNative: there is something in it that the runtime does not do.
    """
    config, body, family = model.config, model.model, check(model)
    layers = []
    for number, block in enumerate(body.layers):
        layers.append(_layer(block, config, family, number, planes))
        progress(number + 1, len(body.layers))
    embedding = _embedding(body.embed_tokens)
    tied = _tied(model.lm_head, body.embed_tokens)
    head = embedding if tied else _linear(model.lm_head, "lm_head")
    attention = layers[0].struct.attention
    return Description(
        layers, embedding, head, _vector(body.norm.weight), float(body.norm.variance_epsilon),
        body.rotary_emb, attention.kv_heads, attention.width,
    )  # fmt: skip


def check(model: Any) -> Family:
    """Its family, after a look at what it is made of; nothing is laid out.

    Raises:
        NotNative: there is something in it that the runtime does not do.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NotNative(f"the family {config.model_type} is not written in C")
    _check(model, model.model)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise NotNative(f"rotary embedding of type {rope}")
    return family


def _check(model: Any, body: Any) -> None:
    _children(model, "the model", {"model", "lm_head"})
    names = {"embed_tokens", "layers", "norm", "rotary_emb"}
    _children(body, "the decoder", names)
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotNative(f"{path} has hooks")
        if isinstance(module, PackedWeight) and module.rounding:
            raise NotNative(f"{path} rounds its inputs")
    if next(model.parameters()).device.type != "cpu":
        raise NotNative("the model is not on the CPU")


def _children(module: nn.Module, what: str, wanted: set[str], may: set[str] | None = None) -> None:
    """The module's parts are those that the runtime knows."""
    found = {name for name, _ in module.named_children()}
    if not wanted <= found <= wanted | (may or set()):
        raise NotNative(f"{what} is made of {', '.join(sorted(found))}")


def _layer(block: Any, config: Any, family: Family, number: int, planes: int) -> Layer:
    _children(
        block, f"layer {number}",
        {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    )  # fmt: skip
    tensors = [
        _vector(block.input_layernorm.weight),
        _vector(block.post_attention_layernorm.weight),
    ]
    struct = LayerStruct()
    struct.first_norm, struct.second_norm = (t.data_ptr() for t in tensors)
    projections = _attention(block.self_attn, config, family, number, struct.attention, tensors)
    forward = _forward(block.mlp, config, family, number, planes, struct.router, tensors)
    struct.q, struct.k, struct.v, struct.o = (linear.struct for linear in projections)
    struct.forward = forward.struct
    return Layer(projections, forward, struct, tensors)


def _attention(
    module: Any, config: Any, family: Family, number: int, struct: AttentionStruct,
    tensors: list[torch.Tensor],
) -> tuple[Linear, Linear, Linear, Linear]:  # fmt: skip
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms = {"q_norm", "k_norm"} if family.norms else set()
    _children(module, f"the attention of layer {number}", {*names, *norms})
    struct.width = int(module.head_dim)
    linears = [_linear(getattr(module, name), f"layer {number} {name}") for name in names]
    struct.heads = linears[0].shape[0] // struct.width
    struct.kv_heads = linears[1].shape[0] // struct.width
    struct.rotary = struct.width
    if struct.width > WIDEST_HEAD or struct.width % 2 or struct.heads % struct.kv_heads:
        raise NotNative(f"{struct.heads} heads of {struct.width} over {struct.kv_heads}")
    struct.scale = float(module.scaling)
    struct.clip = float(getattr(config, "clip_qkv", None) or 0)
    struct.norm = family.norms
    struct.window = _window(config, family, number)
    if family.norms:
        vectors = [_vector(module.q_norm.weight), _vector(module.k_norm.weight)]
        tensors += vectors
        struct.q_norm, struct.k_norm = (v.data_ptr() for v in vectors)
        struct.eps = float(module.q_norm.variance_epsilon)
    return linears[0], linears[1], linears[2], linears[3]


def _window(config: Any, family: Family, number: int) -> int:
    size = int(getattr(config, "sliding_window", None) or 0)
    if family.window == "layers":
        return size if config.layer_types[number] == "sliding_attention" else 0
    return size if family.window == "config" else 0


def _forward(
    module: Any, config: Any, family: Family, number: int, planes: int, router: RouterStruct,
    tensors: list[torch.Tensor],
) -> Forward:  # fmt: skip
    what = f"the feed-forward layer {number}"
    activation = str(config.hidden_act)
    if activation not in ACTIVATIONS:
        raise NotNative(f"the activation {activation}")
    hidden = int(config.hidden_size)
    if not hasattr(module, "experts"):
        return Forward(hidden, activation, (), _network(module, what), planes=planes)
    if not family.experts:
        raise NotNative(f"{what} has experts")
    _children(module, what, {"gate", "experts"}, {"shared_expert", "shared_expert_gate"})
    _router(module.gate, config, family, router, tensors)
    shared, gate = None, None
    if hasattr(module, "shared_expert"):
        shared = _network(module.shared_expert, what)
        gate = _dense(module.shared_expert_gate)[0]
    experts = list(experts_of(module.experts, what))
    return Forward(hidden, activation, experts, shared, gate, planes=planes)


def _router(
    gate: Any, config: Any, family: Family, struct: RouterStruct, tensors: list[torch.Tensor]
) -> None:
    half = getattr(gate, "weight", None)
    half = half if half is not None and half.dtype == torch.bfloat16 else None
    rows = _dense(gate) if half is None else half.detach().contiguous()
    bias = getattr(gate, "e_score_correction_bias", None)
    if bias is not None:
        raise NotNative("the router corrects its scores")
    tensors.append(rows)
    setattr(struct, "rows32" if half is None else "rows16", rows.data_ptr())
    struct.experts, struct.top = rows.shape[0], int(gate.top_k)
    normalise = family.normalise
    struct.normalise = bool(config.norm_topk_prob) if normalise is None else normalise
    struct.scale = 1.0


def experts_of(module: Any, what: str) -> Iterator[Network | None]:
    """Every expert's network; None where all of it is dropped.

    Raises:
        NotNative: the runtime does not take them.
    """
    for name in ("has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"):
        if getattr(module, name, None) is (name != "is_concatenated"):
            raise NotNative(f"{what}: experts with {name}")
    if not getattr(module, "has_gate", True) or getattr(module, "packed_added", None):
        raise NotNative(f"{what}: experts without gate, or with adapters")
    sites = getattr(module, "packed_sites", None)
    for expert in range(module.num_experts):
        if sites is None:
            up, down = module.gate_up_proj[expert], module.down_proj[expert]
            yield Network(Linear(_form(up)), None, Linear(_form(down)))
            continue
        if expert in module.packed_dropped:
            yield None
            continue
        first = [_packed(w, what) for _, w in sites[f"gate_up_proj.{expert}"]]
        down = [_packed(w, what) for _, w in sites[f"down_proj.{expert}"]]
        if len(first) > 2 or len(down) > 1:
            raise NotNative(f"{what}: experts in more parts than gate, up and down")
        yield Network(first[0], first[1] if len(first) == 2 else None, down[0])


def _network(module: Any, what: str) -> Network:
    """A gated MLP."""
    names = ("gate_proj", "up_proj", "down_proj")
    _children(module, what, set(names), {"act_fn"})
    gate, up, down = (_linear(getattr(module, name), f"{what}: {name}") for name in names)
    return Network(gate, up, down)


def _linear(module: Any, what: str) -> Linear:
    if type(module) in (PackedLinear, PackedHead):
        return _packed(module.packed, what, module.bias)
    if type(module) is nn.Linear:
        return Linear(_form(module.weight), module.bias)
    raise NotNative(f"{what} is a {type(module).__name__}")


def _embedding(module: Any) -> Linear:
    if isinstance(module, PackedRows) and type(module).__bases__[0] is PackedRows:
        return _packed(module.packed, "the embedding")
    if type(module) is nn.Embedding:
        return Linear(_form(module.weight))
    raise NotNative(f"the embedding is a {type(module).__name__}")


def _tied(head: Any, embedding: Any) -> bool:
    if isinstance(head, PackedLinear):
        same = isinstance(embedding, PackedRows) and head.packed is embedding.packed
        return same and head.bias is None
    return type(embedding) is nn.Embedding and head.weight is embedding.weight and head.bias is None


def _packed(weight: PackedWeight, what: str, bias: torch.Tensor | None = None) -> Linear:
    if weight.dropped:
        return Linear(torch.zeros(weight.shape), bias)
    laid = weight.lay_out()
    if not isinstance(laid, CpuWeight):
        raise NotNative(f"{what}: the format {weight.fmt.name}")
    if len(getattr(laid, "at", {}).get(getattr(weight.fmt, "widths", (0,))[-1], [laid])) > 1:
        raise NotNative(f"{what}: {weight.fmt.name} is a sum of several matrices")
    return Linear(laid, bias)


def _form(weight: torch.Tensor) -> CpuWeight | torch.Tensor:
    """A dense matrix as the runtime multiplies it: bfloat16 laid out for its kernel, which rounds
    inputs to bfloat16 too; anything else in float32."""
    return lay_dense(weight.detach()) if weight.dtype == torch.bfloat16 else weight


def _dense(module: Any) -> torch.Tensor:
    """A small matrix in float32, packed or not."""
    if isinstance(module, PackedLinear):
        return module.packed.decode(torch.float32)
    return _vector(module.weight)


def _vector(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().float().contiguous()
