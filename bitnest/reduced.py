"""A checkpoint with fewer experts and fewer blocks: tensors are cut and merged when asked for.

What reads checkpoints tensor by tensor so reads reduced models, without a copy on disk. Experts and
blocks are numbered anew, without holes; router matrices and biases lose the rows that are gone; the
configuration says what is left (see `reduced_config`). What is kept is kept to the bit. Tensors
that the model does not use (heads for further tokens) are left out.

Which experts go is chosen elsewhere; a `Reduction` says it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitnest.checkpoint import FLOATS, Checkpoint, all_finite
from bitnest.errors import CheckpointError, UnsupportedModel
from bitnest.expert_axes import ExpertAxes, expert_axes
from bitnest.reduced_config import (
    TOP_K,
    check_blocks,
    check_dropped,
    check_groups,
    first_of,
    reduced_config,
)
from bitnest.reduced_tensors import Blend, Part, Stack, reduced_parts
from bitnest.reduction import LayerExperts, Own, Reduction, check_constants, check_layer
from bitnest.resized import CONSTANTS, KEY, config_experts
from bitnest.skeleton import Skeleton

__all__ = ["LayerExperts", "Own", "ReducedCheckpoint", "Reduction"]


@dataclass(frozen=True)
class ReducedCheckpoint(Checkpoint):
    """A checkpoint read with fewer experts and blocks.

    base: what is reduced. parts: by tensor, what it is made of. A tensor's place in `tensors` has
    no meaning but its size.
    """

    base: Checkpoint
    reduction: Reduction
    parts: Mapping[str, Part]

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        reduction: Reduction,
        *,
        trust_remote_code: bool = False,
        skeleton: Skeleton | None = None,
        axes: ExpertAxes | None = None,
    ) -> ReducedCheckpoint:
        """`base`, reduced. skeleton, axes: the base's, where they are known already.

        Raises:
            CheckpointError: experts, rows or blocks that are not there, or no model without them.
            UnsupportedModel: a family whose experts or blocks cannot go, or groups of its router.
        """
        skeleton = skeleton or Skeleton.build(base, trust_remote_code=trust_remote_code)
        check_dropped(reduction.dropped, reduction.experts, len(skeleton.blocks))
        axes = _check_experts(skeleton, reduction, axes) if reduction.experts else None
        parts = reduced_parts(skeleton, axes, reduction)
        config = reduced_config(skeleton, axes, reduction)
        tensors = {name: info for name, (_, info) in parts.items()}
        own = {name: part for name, (part, _) in parts.items()}
        reduced = cls(base.path, config, tensors, base, reduction, own)
        built = Skeleton.build(reduced, trust_remote_code=trust_remote_code)
        kept = [b for b in range(len(skeleton.blocks)) if b not in reduction.dropped]
        check_blocks(skeleton, built, kept, axes)
        return reduced

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # a cached property there
        """The base's."""
        return self.base.dtype

    @property
    def ordinary(self) -> bool:
        """Whether transformers builds the model without bitnest: all layers of experts alike."""
        return is_ordinary(self.config)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, reduced, in its stored type, on the CPU.

        Raises:
            CheckpointError: merging gives values its type cannot hold.
        """
        part = self.parts[name]
        tensor = part.read(self.base)
        computed = isinstance(part, Blend | Stack) or not part.names
        if computed and tensor.dtype in FLOATS.values() and not all_finite(tensor):
            raise CheckpointError(
                f"'{name}' holds NaN or infinite values once reduced",
                where=str(self.base.path),
                hint=f"the sum leaves the range of {tensor.dtype}, or a tensor given is damaged",
            )
        return tensor

    def scan(self, progress: Callable[[int], None] | None = None) -> str:
        """Scan the base; the sha256 of its hash and the reduction's. progress is called with
        shares of `nbytes`."""
        total = self.base.nbytes or 1

        def step(nbytes: int) -> None:
            assert progress is not None
            progress(nbytes * self.nbytes // total)

        return self.hash_of(self.base.scan(None if progress is None else step))

    def hash_of(self, scanned: str) -> str:
        """What `scan` gives where the base's gives `scanned`."""
        return hashlib.sha256(f"reduced:{scanned};{self.reduction.sha256};".encode()).hexdigest()

    def origin(self) -> dict[str, Any]:
        """What a manifest says of this source besides its name, size and hash."""
        own = {**self.reduction.summary(), "bytes": self.base.nbytes}
        return {**self.base.origin(), "reduced": own}


def is_ordinary(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json is one that transformers builds without bitnest."""
    inner = (value for value in config.values() if isinstance(value, dict))
    return not any(KEY in own for own in (config, *inner))


def _check_experts(skeleton: Skeleton, reduction: Reduction, axes: ExpertAxes | None) -> ExpertAxes:
    config = skeleton.model.config
    if config_experts(config):
        raise UnsupportedModel(
            "its layers have unequal numbers of experts already",
            where=str(skeleton.checkpoint.path),
            hint="start from the model it was made of",
        )
    axes = axes or expert_axes(skeleton.model, skeleton.prefix)
    text = config.get_text_config()
    for block, layer in reduction.experts.items():
        if block not in axes.modules:
            raise CheckpointError(
                f"block {block} has no experts",
                where=str(skeleton.checkpoint.path),
                hint=f"blocks that have: {', '.join(map(str, axes.modules))}",
            )
        check_layer(block, layer, axes.count, first_of(text, TOP_K, 1))
        check_groups(config, block, layer, axes.count)
        constants = reduction.tensors.get(f"{axes.modules[block]}.{CONSTANTS}")
        check_constants(block, layer, constants, int(text.hidden_size))
    return axes
