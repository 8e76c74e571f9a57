"""What becomes of a model with fewer experts and blocks: which are kept, merged, replaced.

A `Reduction` speaks of the source: its block numbers, its experts, its router rows and the names
its checkpoint gives to tensors. It says nothing of how it was chosen. As JSON it holds everything
but tensors, whose values its digest covers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bitnest.errors import CheckpointError
from bitnest.resized import Row, constants_of, is_row

Order = tuple[int, ...] | None


@dataclass(frozen=True)
class Own:
    """One expert of a reduced layer: sum_i weights[i] W_experts[i], its neurons in orders[i].

    experts: of the source's layer; one alone is kept to the bit. weights: sum 1. orders: by expert,
    a permutation of its intermediate neurons (new place -> old) applied to what its first
    projection gives and its down projection reads, or None; empty for none at all.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)
    orders: tuple[Order, ...] = ()

    def order(self, place: int) -> Order:
        """The permutation of the expert at `place` of `experts`."""
        return self.orders[place] if self.orders else None


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts and what its router chooses from.

    slots: the experts, in order. rows: by row of the router that is left, a number of a slot,
    "zero", "copy" or "constant:K" (see `resized`). sources: the row of the source's router that
    each row is, unless its tensors are overridden.
    """

    slots: tuple[Own, ...]
    rows: tuple[Row, ...]
    sources: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether every row is the expert of its number."""
        return self.rows == tuple(range(len(self.slots)))


@dataclass(frozen=True)
class Reduction:
    """Fewer experts and blocks.

    experts: block of the source -> its layer; others stay as they are. dropped: blocks left out.
    tensors: instead of router tensors, by the source checkpoint's names and with as many rows as
    are left; constants (K, hidden), by the model's name of the experts module + ".constants".
    """

    experts: Mapping[int, LayerExperts]
    dropped: tuple[int, ...] = ()
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values of everything but the tensors."""
        return {
            "experts": {
                str(block): {
                    "slots": [_own_json(own) for own in layer.slots],
                    "rows": list(layer.rows),
                    "sources": list(layer.sources),
                }
                for block, layer in sorted(self.experts.items())
            },
            "dropped": list(self.dropped),
        }

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
    ) -> Reduction:
        """The reduction that `to_json` gave, with its tensors.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            experts = {
                int(block): LayerExperts(
                    tuple(_own(own) for own in layer["slots"]),
                    tuple(r if isinstance(r, str) else int(r) for r in layer["rows"]),
                    tuple(int(row) for row in layer["sources"]),
                )
                for block, layer in values["experts"].items()
            }
            dropped = tuple(int(block) for block in values["dropped"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"a reduction that cannot be read: {error}", hint="make it anew"
            ) from error
        return cls(experts, dropped, dict(tensors or {}))

    def summary(self) -> dict[str, Any]:
        """For a manifest: as `to_json`, but experts as lists of those they are made of."""
        layers = {
            str(block): {"slots": [list(o.experts) for o in layer.slots], "rows": list(layer.rows)}
            for block, layer in sorted(self.experts.items())
        }
        return {"experts": layers, "dropped": list(self.dropped), "sha256": self.sha256}

    @property
    def sha256(self) -> str:
        """Of everything, tensors included."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy().tobytes())
        return digest.hexdigest()


def _own_json(own: Own) -> dict[str, Any]:
    values: dict[str, Any] = {"experts": list(own.experts), "weights": list(own.weights)}
    if own.orders:
        values["orders"] = [None if order is None else list(order) for order in own.orders]
    return values


def _own(values: Mapping[str, Any]) -> Own:
    orders = values.get("orders", ())
    return Own(
        tuple(int(expert) for expert in values["experts"]),
        tuple(float(weight) for weight in values["weights"]),
        tuple(None if order is None else tuple(int(i) for i in order) for order in orders),
    )


def check_layer(block: int, layer: LayerExperts, experts: int, top_k: int) -> None:
    """Refuse what no layer can be made of. experts: of the source's layer. top_k: of its router.

    Raises:
        CheckpointError: what is wrong, and in which block.
    """

    def wrong(said: str, hint: str = "choose other experts") -> CheckpointError:
        return CheckpointError(said, where=f"block {block}", hint=hint)

    if not layer.slots:
        raise wrong("a layer without experts", "drop the block instead")
    alone: set[int] = set()
    for own in layer.slots:
        if not own.experts or any(not 0 <= e < experts for e in own.experts):
            raise wrong(f"there is no expert {own.experts}: the layer has {experts}")
        if len(set(own.experts)) < len(own.experts):
            raise wrong(f"an expert merged with itself: {own.experts}")
        if len(own.weights) != len(own.experts) or len(own.orders) not in (0, len(own.experts)):
            raise wrong(f"{len(own.experts)} experts, {len(own.weights)} weights, "
                        f"{len(own.orders)} orders")  # fmt: skip
        if not math.isclose(sum(own.weights), 1, abs_tol=1e-4):  # NaN too
            raise wrong(f"weights {own.weights} do not sum to 1")
        if len(own.experts) == 1:
            if own.experts[0] in alone:
                raise wrong(f"expert {own.experts[0]} twice", "let two rows name one slot")
            alone.add(own.experts[0])
    if len(layer.rows) != len(layer.sources) or any(not 0 <= r < experts for r in layer.sources):
        raise wrong(f"{len(layer.rows)} rows from rows {layer.sources} of {experts}")
    odd = [row for row in layer.rows if not is_row(row, len(layer.slots))]
    if odd:
        raise wrong(f"a row is no slot of {len(layer.slots)}, nor zero, copy or constant: {odd[0]}")
    if idle := set(range(len(layer.slots))) - set(layer.rows):
        raise wrong(f"no row of the router reaches slot {min(idle)}")
    if len(layer.rows) < top_k:
        raise wrong(f"{len(layer.rows)} rows for a router that chooses {top_k}", "keep more")


def check_constants(
    block: int, layer: LayerExperts, found: torch.Tensor | None, hidden: int
) -> None:
    """Refuse constants that are missing or of another shape than the rows need.

    Raises:
        CheckpointError: they are.
    """
    need = (constants_of(layer.rows), hidden)
    have = (0, hidden) if found is None else tuple(found.shape)
    if have != need:
        raise CheckpointError(
            f"constants of shape {have}, the rows need {need}", where=f"block {block}"
        )
