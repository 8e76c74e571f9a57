"""A checkpoint with LoRA adapters merged into it: tensors are merged when they are asked for.

What reads checkpoints tensor by tensor so reads merged models, without a dense copy on disk. With
M_i(W) what adapter i alone makes of W, and c_i its scale,

    merged = W + sum_i c_i (M_i(W) - W)

in float32, rounded once to the type of W. The sum is over products, never over factors: the mean
of B_i A_i is not the mean of B_i times the mean of A_i. `combining` has other ways than the sum.

Adapters speak of modules as the model has them, the checkpoint of tensors as it has them. The
skeleton maps one to the other; names of the checkpoint are understood as well, so adapters of
versions of transformers that kept experts apart fit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn

from bitnest.changes import Change, Factors, expert_slice
from bitnest.checkpoint import Checkpoint, all_finite
from bitnest.combining import LINEAR, Combine
from bitnest.errors import CheckpointError
from bitnest.lora import Adapter, LowRank
from bitnest.safetensors_io import TensorInfo, read_tensor
from bitnest.sites import Site, find_sites, is_linear, is_tied
from bitnest.skeleton import Skeleton


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """A checkpoint read with adapters merged in.

    base: what they are merged into. adapters: with their scales. changes: by tensor. combine: how
    several become one.
    """

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    changes: Mapping[str, tuple[Change, ...]]
    combine: Combine = field(default_factory=Combine)

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        adapters: Sequence[tuple[Adapter, float]],
        *,
        combine: Combine | None = None,
        trust_remote_code: bool = False,
    ) -> MergedCheckpoint:
        """`base` with `adapters` (each with its scale) merged in.

        Raises:
            CheckpointError: an adapter is for another base: a module or a shape that is not there.
            UnsupportedModel: the model cannot be built.
        """
        places = _Places(Skeleton.build(base, trust_remote_code=trust_remote_code))
        changes: dict[str, list[Change]] = {}
        for number, (adapter, scale) in enumerate(adapters):
            for name, change in places.changes(number, adapter, scale).items():
                changes.setdefault(name, []).append(change)
        fixed = {name: tuple(own) for name, own in changes.items()}
        return cls(
            base.path, base.config, base.tensors, base, tuple(adapters), fixed, combine or Combine()
        )

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # a cached property there
        """The base's."""
        return self.base.dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, merged, in its stored type, on the CPU.

        Raises:
            CheckpointError: merging gives values its type cannot hold.
        """
        tensor = self.base.read(name)
        if name not in self.changes:
            return tensor
        if tensor.dim() == 3:  # one expert at a time in float32
            for expert in range(len(tensor)):
                tensor[expert] = self._merge(name, tensor[expert], expert)
        else:
            tensor = self._merge(name, tensor, None).to(tensor.dtype)
        if not all_finite(tensor):
            raise CheckpointError(
                f"'{name}' holds NaN or infinite values once merged",
                where=str(self.base.path),
                hint=f"the sum leaves the range of {tensor.dtype}, or a row of DoRA is zero: "
                "check the scales",
            )
        return tensor

    def _merge(self, name: str, tensor: torch.Tensor, expert: int | None) -> torch.Tensor:
        """In float32."""
        weight, own = tensor.float(), self.changes[name]
        only, linear = own[0], self.combine.method == LINEAR
        if (
            linear
            and len(own) == 1
            and only.scale == 1.0
            and only.whole is not None
            and not only.factors
        ):
            return only.replacement(expert)  # to the bit
        if linear:  # one change in memory at a time
            return weight + sum(change.scale * change.delta(weight, expert) for change in own)
        deltas = [change.delta(weight, expert) for change in own]
        where = name if expert is None else f"{name}.{expert}"
        return weight + self.combine.change(deltas, [change.scale for change in own], where)

    def scan(self, progress: Callable[[int], None] | None = None) -> str:
        """Scan the base; the sha256 of its hash, the adapters' and their scales."""
        digest = hashlib.sha256(f"merged:{self.base.scan(progress)};".encode())
        for adapter, scale in self.adapters:
            digest.update(f"{adapter.sha256}:{scale!r};".encode())
        if self.combine.method != LINEAR:
            digest.update(f"{self.combine!r};".encode())
        return digest.hexdigest()

    def origin(self) -> dict[str, Any]:
        """What a manifest says of this source besides its name, size and hash."""
        return {**self.base.origin(), "merged": self.merged(), **self.combine.to_json()}

    def check_sites(self, found: Sequence[Site]) -> None:
        """The base's; merging moves nothing."""
        self.base.check_sites(found)

    def merged(self) -> list[dict[str, Any]]:
        """The adapters, for a record."""
        return [
            {
                "adapter": adapter.path.name, "scale": scale,
                "sha256": hashlib.sha256(adapter.sha256.encode()).hexdigest(),
                "base": adapter.config.get("base_model_name_or_path"),
                "tensors": sum(c.adapter == i for own in self.changes.values() for c in own),
            }
            for i, (adapter, scale) in enumerate(self.adapters)
        ]  # fmt: skip


class _Places:
    """Where in a checkpoint the modules of its model lie."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.tensors = skeleton.checkpoint.tensors
        self.tied = skeleton.tied() - set(skeleton.sources)
        self.read = lru_cache(maxsize=4)(read_tensor)  # factors of a layer's experts

    @cached_property
    def sites(self) -> list[Site]:
        return find_sites(self.skeleton)

    def changes(self, number: int, adapter: Adapter, scale: float) -> dict[str, Change]:
        """By tensor, what `adapter` changes."""
        found: dict[str, Change] = {}

        def put(name: str, **parts: Any) -> None:
            found[name] = replace(found.get(name) or Change(number, scale), **parts)

        for name, info in adapter.replaced.items():
            for tensor, part in self._replaced(adapter, name, info):
                put(tensor, whole=part)
        taken: set[str] = set()
        for module in adapter.modules:
            for tensor, factors in self._low_rank(adapter, module):
                if tensor in taken:
                    raise self._misfit(adapter, module.name, "changes a weight twice")
                taken.add(tensor)
                put(tensor, factors=factors)
            if module.bias is not None:
                tensor, s = self._bias(adapter, module)
                put(tensor, vector=(module.bias, s))
        return found

    def _tensor(self, name: str) -> str | None:
        """The one tensor that the parameter `name` is read from."""
        if name in self.tensors:
            return name
        source = self.skeleton.sources.get(name)
        return source.names[0] if source is not None and source.converter is None else None

    def _experts(self, path: str) -> list[Site]:
        return [site for site in self.sites if site.path == path and site.expert is not None]

    def _replaced(
        self, adapter: Adapter, name: str, info: TensorInfo
    ) -> list[tuple[str, TensorInfo]]:
        tensor = self._tensor(name)
        self._check_untied(adapter, name, tensor)
        if tensor is not None:
            if self.tensors[tensor].shape != info.shape:
                raise self._shapes(adapter, name, info.shape, tensor)
            return [(tensor, info)]
        sites = self._experts(name) if name in self.skeleton.sources else []
        if not sites:
            raise self._misfit(adapter, name, "is not in the base")
        if info.shape != tuple(self.skeleton.model.get_parameter(name).shape):
            raise self._shapes(adapter, name, info.shape, name)
        if any(site.transposed for site in sites):
            raise self._misfit(adapter, name, "is laid out as the base does not have it")
        found = []
        for site in sites:
            assert site.expert is not None
            part, width = expert_slice(info, site.expert), info.nbytes // math.prod(info.shape)
            if site.rows is not None:
                begin, end = (part.start + row * site.shape[1] * width for row in site.rows)
                part = replace(part, shape=site.shape, start=begin, stop=end)
            found.append((f"{site.name}.weight", part))
        return found

    def _low_rank(self, adapter: Adapter, module: LowRank) -> list[tuple[str, Factors]]:
        name = f"{module.name}.weight"
        tensor = self._tensor(name)
        self._check_untied(adapter, name, tensor)
        if tensor is None:
            return self._fused(adapter, module)
        shape, (rank, inner), out = self.tensors[tensor].shape, module.a.shape, module.b.shape[0]
        transposed = module.embedding or self._lies_transposed(module.name)
        if shape != ((inner, out) if transposed else (out, inner)):
            raise self._shapes(adapter, module.name, (out, inner), tensor)
        if module.magnitude is not None and math.prod(module.magnitude.shape) != out:
            raise self._shapes(adapter, module.name, module.magnitude.shape, tensor)
        if bool(adapter.config.get("use_dora")) != (module.magnitude is not None):
            raise self._misfit(adapter, module.name, "has a DoRA magnitude or lacks one, against "
                               "use_dora in its configuration,")  # fmt: skip
        scaling = adapter.scaling((module.name, name), rank, module.name)
        return [(tensor, Factors(module.a, module.b, scaling, transposed,
                                 magnitude=module.magnitude))]  # fmt: skip

    def _lies_transposed(self, name: str) -> bool:
        try:
            module = self.skeleton.model.get_submodule(name)
        except AttributeError:
            return False  # a name of the checkpoint alone: an expert that the model has fused
        return is_linear(module) and not isinstance(module, nn.Linear)

    def _fused(self, adapter: Adapter, module: LowRank) -> list[tuple[str, Factors]]:
        """Factors of all experts of a layer, by the parameter that their shapes fit."""
        try:
            owner = self.skeleton.model.get_submodule(module.name)
        except AttributeError:
            owner = nn.Module()
        wanted = [str(n).rpartition(".")[2] for n in adapter.config.get("target_parameters") or ()]
        fits = []
        for param, weight in owner.named_parameters(recurse=False):
            if param in wanted and weight.dim() == 3 and module.a.shape[0] % weight.shape[0] == 0:
                first, second = weight.shape[1:]
                sides = (module.a.shape[1], module.b.shape[0])  # in, out
                plain = not getattr(owner, "is_transposed", False)
                if sides == (second, first) and plain:
                    fits.append((param, weight.shape[0], False))
                if sides == (first, second):
                    fits.append((param, weight.shape[0], plain))
        if len(fits) > 1 and (old := adapter.old_experts) is not None:
            plain = not getattr(owner, "is_transposed", False)
            fits = [fit for fit in fits if fit[2] == (plain and old)]
        if len(fits) != 1:
            said = "fits the base in several ways" if fits else "fits no experts of the base"
            raise self._misfit(adapter, module.name, said)
        if module.magnitude is not None or module.bias is not None or module.embedding:
            raise self._misfit(adapter, module.name, "has DoRA or a bias on fused experts, which")
        param, experts, swapped = fits[0]
        path = f"{module.name}.{param}"
        scaling = adapter.scaling((path, module.name), module.a.shape[0] // experts, path)
        factors = Factors(
            module.a, module.b, scaling, experts=experts, swapped=swapped, read=self.read
        )
        whole = self._tensor(path)
        if whole is not None:
            transposed = bool(getattr(owner, "is_transposed", False))
            return [(whole, replace(factors, transposed=transposed))]
        sites = self._experts(path)
        if any(f"{site.name}.weight" not in self.tensors for site in sites) or not sites:
            raise self._misfit(adapter, path, "is kept on disk in a way that is not understood; it")
        return [
            (
                f"{site.name}.weight",
                replace(factors, expert=site.expert, rows=site.rows, transposed=site.transposed),
            )
            for site in sites
        ]

    def _bias(self, adapter: Adapter, module: LowRank) -> tuple[str, float]:
        name = f"{module.name}.bias"
        tensor = self._tensor(name)
        assert module.bias is not None
        if tensor is None:
            raise self._misfit(adapter, name, "is not in the base")
        if self.tensors[tensor].shape != module.bias.shape:
            raise self._shapes(adapter, name, module.bias.shape, tensor)
        return tensor, adapter.scaling((module.name,), module.a.shape[0], module.name)

    def _check_untied(self, adapter: Adapter, name: str, tensor: str | None) -> None:
        model = self.skeleton.model
        table = self.skeleton.path_of(model.get_input_embeddings())
        is_table = tensor is not None and tensor == self._tensor(f"{table}.weight")
        if name in self.tied or (is_table and is_tied(self.skeleton)):
            raise CheckpointError(
                f"the adapter changes '{name}', one of two uses of the tied embedding",
                where=str(adapter.path),
                hint="save the base with tie_word_embeddings=false and a head of its own first",
            )

    def _shapes(
        self, adapter: Adapter, name: str, shape: tuple[int, ...], tensor: str
    ) -> CheckpointError:
        info = self.tensors.get(tensor)
        have = info.shape if info else tuple(self.skeleton.model.get_parameter(tensor).shape)
        return CheckpointError(
            f"'{name}' is for shape {shape}, the base's '{tensor}' has {have}",
            where=str(adapter.path),
            hint=_other_base(adapter),
        )

    def _misfit(self, adapter: Adapter, name: str, said: str) -> CheckpointError:
        return CheckpointError(
            f"the adapter's '{name}' {said}"
            + (" cannot be merged" if said.endswith(("which", "it", ",")) else ""),
            where=str(adapter.path),
            hint=_other_base(adapter),
        )


def _other_base(adapter: Adapter) -> str:
    base = adapter.config.get("base_model_name_or_path")
    return "the adapter is of another base" + (f": it was trained on {base}" if base else "")
