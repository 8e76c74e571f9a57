"""The tensors of a reduced checkpoint: which of the source's each is made of, and how.

Values are computed one tensor at a time. A merge is a sum in float32, rounded once to the type of
the source; what is only moved or cut keeps its bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from bitnest.checkpoint import Checkpoint
from bitnest.errors import CheckpointError, UnsupportedModel
from bitnest.expert_axes import ExpertAxes
from bitnest.neurons import Neurons, gate_layout
from bitnest.reduction import LayerExperts, Own, Reduction
from bitnest.resized import CONSTANTS
from bitnest.safetensors_io import DTYPES, NAMES, TensorInfo
from bitnest.skeleton import Skeleton, Source


@dataclass(frozen=True)
class Part:
    """One tensor as it is in the source. names: of the source."""

    names: tuple[str, ...]

    def read(self, base: Checkpoint) -> torch.Tensor:
        """Its values."""
        return base.read(self.names[0])


@dataclass(frozen=True)
class Rows(Part):
    """Some rows of a router's tensor. dim: along which. rows: of the source."""

    dim: int
    rows: tuple[int, ...]

    def read(self, base: Checkpoint) -> torch.Tensor:
        return super().read(base).index_select(self.dim, torch.tensor(self.rows))


@dataclass(frozen=True)
class Given(Part):
    """A tensor that comes with the reduction. dtype: it is stored in."""

    values: torch.Tensor
    dtype: torch.dtype

    def read(self, base: Checkpoint) -> torch.Tensor:
        return self.values.detach().cpu().to(self.dtype)


@dataclass(frozen=True)
class Blend(Part):
    """One expert's tensor. names: those of all experts of the source."""

    own: Own
    neurons: Neurons | None

    def read(self, base: Checkpoint) -> torch.Tensor:
        tensors = (base.read(self.names[expert]) for expert in self.own.experts)
        return blend(tensors, self.own, self.neurons)


@dataclass(frozen=True)
class Stack(Part):
    """All experts of a layer in one tensor."""

    owns: tuple[Own, ...]
    neurons: Neurons | None

    def read(self, base: Checkpoint) -> torch.Tensor:
        whole = super().read(base)
        owns = self.owns
        return torch.stack([blend((whole[e] for e in o.experts), o, self.neurons) for o in owns])


def blend(tensors: Iterable[torch.Tensor], own: Own, neurons: Neurons | None) -> torch.Tensor:
    """The experts' tensors, given one by one, with their neurons in order, averaged in float32."""
    found: torch.Tensor | None = None
    for place, tensor in enumerate(tensors):
        order = own.order(place)
        if neurons is not None and order is not None:
            tensor = neurons.permute(tensor, order)
        if len(own.experts) == 1:
            return tensor
        dtype, scaled = tensor.dtype, tensor.float() * own.weights[place]
        found = scaled if found is None else found + scaled
    assert found is not None
    return found.to(dtype)


def reduced_parts(
    skeleton: Skeleton, axes: ExpertAxes | None, reduction: Reduction
) -> dict[str, tuple[Part, TensorInfo]]:
    """By their new names, the tensors of the reduced checkpoint, made of what, and their shapes.

    Raises:
        CheckpointError: a tensor of the reduction is of another shape, or is none of a router.
        UnsupportedModel: experts that lie in the checkpoint in a way that cannot be cut.
    """
    return _Parts(skeleton, axes, reduction).all()


class _Parts:
    def __init__(self, skeleton: Skeleton, axes: ExpertAxes | None, reduction: Reduction) -> None:
        self.skeleton, self.axes, self.reduction = skeleton, axes, reduction
        self.infos = skeleton.checkpoint.tensors
        blocks = [b for b in range(len(skeleton.blocks)) if b not in reduction.dropped]
        self.number = {block: place for place, block in enumerate(blocks)}
        self.found: dict[str, tuple[Part, TensorInfo]] = {}
        self.given = dict(reduction.tensors)

    def all(self) -> dict[str, tuple[Part, TensorInfo]]:
        """See `reduced_parts`."""
        start = f"{self.skeleton.prefix}."
        for name, source in self.skeleton.sources.items():
            block = int(name[len(start) :].partition(".")[0]) if name.startswith(start) else None
            if block is None:
                self._same(source, None)
            elif block in self.number:
                self._of_block(block, name, source)
        for block in self.reduction.experts:
            self._constants(block)
        if self.given:
            raise CheckpointError(
                f"the reduction brings '{next(iter(self.given))}', no router's tensor",
                hint="by the source checkpoint's names, of layers that are reduced",
            )
        return self.found

    def _put(self, name: str, part: Part, like: TensorInfo, shape: Sequence[int]) -> None:
        size = DTYPES[like.dtype].itemsize * math.prod(shape)
        info = replace(like, shape=tuple(shape), stop=like.start + size)
        self.found[name] = (part, info)

    def _same(self, source: Source, block: int | None) -> None:
        for key in source.names:
            self._put(self._named(key, block), Part((key,)), self.infos[key], self.infos[key].shape)

    def _of_block(self, block: int, name: str, source: Source) -> None:
        layer = self.reduction.experts.get(block)
        dims = self.axes.tensors.get(name) if self.axes is not None else None
        if layer is None or dims is None:
            self._same(source, block)
            return
        assert self.axes is not None
        if self.axes.of_experts(block, name):
            self._experts(block, name, source, layer)
        else:
            self._router(block, name, source, layer, dims)

    def _router(
        self, block: int, name: str, source: Source, layer: LayerExperts, dims: tuple[int, ...]
    ) -> None:
        assert self.axes is not None
        key, shape = source.names[0], list(self.infos[source.names[0]].shape)
        if len(source.names) > 1 or len(dims) > 1 or shape[dims[0]] != self.axes.count:
            raise _odd(name, "a router's tensor that lies in the checkpoint in another shape")
        shape[dims[0]] = len(layer.rows)
        info, part = self.infos[key], Rows((key,), dims[0], layer.sources)
        given = self.given.pop(key, None)
        if given is not None:
            if tuple(given.shape) != tuple(shape):
                raise CheckpointError(
                    f"'{key}' comes with shape {tuple(given.shape)}, {tuple(shape)} is needed",
                    where=f"block {block}",
                )
            self._put(self._named(key, block), Given((), given, DTYPES[info.dtype]), info, shape)
            return
        self._put(self._named(key, block), part, info, shape)

    def _experts(self, block: int, name: str, source: Source, layer: LayerExperts) -> None:
        assert self.axes is not None
        count = self.axes.count
        by_pattern: dict[str, list[str]] = {}
        for pattern, key in source.keys:
            by_pattern.setdefault(pattern, []).append(key)
        ordered = any(order for own in layer.slots for order in own.orders)
        for keys in by_pattern.values():
            infos = [self.infos[key] for key in keys]
            neurons = self._neurons(block, name, source, len(by_pattern)) if ordered else None
            if len(keys) == count and count > 1:
                place = _differing(keys)
                for slot, own in enumerate(layer.slots):
                    new = _with_number(keys[0], place, slot)
                    part = Blend(tuple(keys), own, neurons)
                    self._check_orders(block, part, infos[0].shape)
                    self._put(self._named(new, block), part, infos[0], infos[0].shape)
            elif len(keys) == 1 and infos[0].shape[0] == count:
                shape = infos[0].shape[1:]
                stack = Stack(tuple(keys), layer.slots, neurons)
                self._check_orders(block, stack, shape)
                self._put(self._named(keys[0], block), stack, infos[0], (len(layer.slots), *shape))
            else:
                raise _odd(name, "experts that lie in the checkpoint in a way not understood")

    def _neurons(self, block: int, name: str, source: Source, parts: int) -> Neurons | None:
        """Where one expert's tensor on disk has its neurons; None where it has none."""
        assert self.axes is not None
        module = self.skeleton.model.get_submodule(self.axes.modules[block])
        leaf = name.rpartition(".")[2]
        gated = bool(getattr(module, "has_gate", True))
        up = "gate_up_proj" if gated else "up_proj"
        if leaf not in {up, "down_proj", f"{up}_bias"}:
            return None
        steps = (
            []
            if source.converter is None
            else [type(o).__name__ for o in source.converter.operations]
        )
        if steps not in ([], ["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            raise _odd(name, "neurons that the checkpoint lays out in a way not understood")
        transposed = bool(module.is_transposed)
        if leaf == "down_proj":
            return Neurons(0 if transposed else 1)
        layout = "one" if not gated or parts == 2 else gate_layout(module, name)
        return Neurons(1 if transposed and not leaf.endswith("_bias") else 0, layout)

    def _check_orders(self, block: int, part: Blend | Stack, shape: tuple[int, ...]) -> None:
        owns = part.owns if isinstance(part, Stack) else (part.own,)
        if part.neurons is None:
            return
        length = shape[part.neurons.dim] // (1 if part.neurons.layout == "one" else 2)
        for own in owns:
            for order in own.orders:
                if order is not None and sorted(order) != list(range(length)):
                    raise CheckpointError(
                        f"an order of expert {own.experts} is no permutation of {length} neurons",
                        where=f"block {block}",
                    )

    def _constants(self, block: int) -> None:
        assert self.axes is not None
        name = f"{self.axes.modules[block]}.{CONSTANTS}"
        values = self.given.pop(name, None)
        if values is None:
            return
        dtype = self.skeleton.checkpoint.dtype
        like = replace(next(iter(self.infos.values())), dtype=NAMES[dtype])
        self._put(self._named(name, block), Given((), values, dtype), like, values.shape)

    def _named(self, key: str, block: int | None) -> str:
        """A tensor's name with its block's new number."""
        if block is None or self.number[block] == block:
            return key
        parts = key.split(".")
        if str(block) not in parts:
            raise _odd(key, "a tensor of a block without its number in its name")
        return _with_number(key, parts.index(str(block)), self.number[block])


def _differing(keys: Sequence[str]) -> int:
    """The component of dotted names that numbers the experts."""
    first, second = keys[0].split("."), keys[1].split(".")
    places = [i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
    if len(first) != len(second) or len(places) != 1 or not first[places[0]].isdecimal():
        raise _odd(keys[0], "experts whose names do not differ by a number")
    return places[0]


def _with_number(name: str, place: int, number: int) -> str:
    parts = name.split(".")
    parts[place] = re.sub(r"\d+", str(number), parts[place])
    return ".".join(parts)


def _odd(where: str, said: str) -> UnsupportedModel:
    return UnsupportedModel(
        said, where=where, hint="this family's experts cannot be dropped or merged"
    )
