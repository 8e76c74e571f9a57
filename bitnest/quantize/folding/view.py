"""A checkpoint with folds in it: tensors are changed as they are read.

What reads checkpoints tensor by tensor so reads folded models, without a copy on disk. The model
computes what it did; its channels are smaller, in another order or mixed.

Scales are powers of two and orders move values, so 16-bit tensors stay exact. What is not exact
(rotations, norms that add a constant to their gain) is rounded once to the tensor's type, but for
tensors named in `unrounded`: those are to be quantised and are handed on in float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from bitnest.checkpoint import FLOATS, Checkpoint, all_finite
from bitnest.errors import CheckpointError
from bitnest.folds import Fold
from bitnest.quantize.folding.changes import Change, Order, apply_all, of_expert, to_parts
from bitnest.safetensors_io import byte_view
from bitnest.sites import Site, is_tied
from bitnest.skeleton import Skeleton

ROOM = 800  # bytes that a manifest may say more of than is known before the pass


@dataclass(frozen=True)
class FoldedCheckpoint(Checkpoint):
    """A checkpoint read with folds.

    base: what is folded. folds: that were asked for. changes: by tensor; none until they are
    chosen. copies: tensors that the base does not have, by those they are copies of (a head that
    was tied). record: what was done, for a manifest. unrounded: see above.
    """

    base: Checkpoint
    folds: tuple[Fold, ...] = ()
    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    unrounded: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, base: Checkpoint, folds: Sequence[Fold], *, trust_remote_code: bool = False
    ) -> FoldedCheckpoint:
        """`base` with nothing folded yet. A tied head becomes a tensor of its own if the residual
        stream is to be rotated, since the two uses of the embedding differ then.

        Raises:
            UnsupportedModel, CheckpointError: the model cannot be built.
        """
        plain = cls(base.path, base.config, base.tensors, base, tuple(folds))
        if not any(fold.kind == "rotate" and not fold.heads for fold in folds):
            return plain
        skeleton = Skeleton.build(base, trust_remote_code=trust_remote_code)
        if not is_tied(skeleton):
            return plain
        head, table = (
            f"{skeleton.path_of(module)}.weight"
            for module in (
                skeleton.model.get_output_embeddings(), skeleton.model.get_input_embeddings(),
            )
        )  # fmt: skip
        source = skeleton.sources[table].names[0]
        config = {**base.config, "tie_word_embeddings": False}
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
        tensors = {**base.tensors, head: base.tensors[source]}
        return replace(plain, config=config, tensors=tensors, copies={head: source})

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # a cached property there
        """The base's."""
        return self.base.dtype

    @property
    def pending(self) -> bool:
        """Whether nothing was chosen yet."""
        return not self.changes

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, folded, on the CPU: in its stored type, or in float32 if it is among
        `unrounded` and its type does not hold it exactly.

        Raises:
            CheckpointError: folding gives values its type cannot hold.
        """
        tensor = self.base.read(self.copies.get(name, name))
        own = self.changes.get(name)
        if own is None:
            return tensor
        if all(isinstance(change, Order) for change in own):
            return apply_all(own, tensor)
        # float16 has few exponents: even a power of two may round there
        exact = tensor.dtype != torch.float16 and all(change.exact for change in own)
        loose = name in self.unrounded and not exact
        kind = torch.float32 if loose else tensor.dtype
        folded = self._folded(own, tensor, torch.float32 if exact else torch.float64, kind)
        if not all_finite(folded):
            raise CheckpointError(
                f"'{name}' holds NaN or infinite values once folded",
                where=str(self.base.path),
                hint=f"scales leave the range of {tensor.dtype}: another --fold, or none",
            )
        return folded

    def read_wide(self, name: str) -> torch.Tensor:
        """The tensor `name`, folded, without rounding, in float64."""
        tensor = self.base.read(self.copies.get(name, name)).double()
        return apply_all(self.changes.get(name, ()), tensor)

    def _folded(
        self,
        own: Sequence[Change],
        tensor: torch.Tensor,
        wide: torch.dtype,
        kind: torch.dtype,
    ) -> torch.Tensor:
        if tensor.dim() < 3:
            return apply_all(own, tensor.to(wide)).to(kind)
        folded = torch.empty(tensor.shape, dtype=kind)
        for expert in range(len(tensor)):  # one expert at a time in a wide type
            mine = [c for c in (of_expert(change, expert) for change in own) if c is not None]
            folded[expert] = apply_all(mine, tensor[expert].to(wide))
        return folded

    def scan(self, progress: Callable[[int], None] | None = None) -> str:
        """Scan the base; the sha256 of its hash and of what is folded, its own where nothing is."""
        scanned = self.base.scan(progress)
        if self.pending:
            return scanned
        return hashlib.sha256(f"folded:{scanned};{self.sha256};".encode()).hexdigest()

    @cached_property
    def sha256(self) -> str:
        """Of all changes."""
        digest = hashlib.sha256()
        for name in sorted(self.changes):
            for change in self.changes[name]:
                plain, tensors = to_parts(change)
                digest.update(f"{name}:{json.dumps(plain, sort_keys=True)};".encode())
                for tensor in tensors.values():
                    digest.update(byte_view(tensor.contiguous().view(torch.uint8).flatten()))
        return digest.hexdigest()

    def origin(self) -> dict[str, Any]:
        """What a manifest says of this source besides its name, size and hash."""
        record = dict(self.record) or {"asked": [str(f) for f in self.folds], "room": " " * ROOM}
        return {**self.base.origin(), "folded": record}

    def check_sites(self, found: Sequence[Site]) -> None:
        """The base's; folding moves nothing."""
        self.base.check_sites(found)

    def keeping(self, packed: Iterable[str]) -> FoldedCheckpoint:
        """The same, with these tensors handed on unrounded: they are to be quantised."""
        names = frozenset(n for n in packed if self.tensors[n].dtype in FLOATS)
        return replace(self, unrounded=names)
