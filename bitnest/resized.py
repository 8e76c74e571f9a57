"""Layers of unequal numbers of experts, and router rows that are no expert.

transformers builds every Mixture-of-Experts layer of a model alike. Where config.json says

    "bitnest_experts": {"3": {"count": 5, "rows": [0, 1, 1, "zero", "copy", "constant:0", 2, 3, 4]}}

block 3 holds `count` experts, and its router one row for each of `rows`: the number of an expert,
or what happens instead. With e the choices of a token x and g_e their gates,

    y = sum_{experts} g_e E(x)  +  sum_{"copy"} g_e x  +  sum_{"constant:K"} g_e c_K

A choice of "zero" gives nothing, and the token's other gates are scaled to the sum of all of them
(zero, copy and constant experts: MoE++, Jin et al. 2024; scaling the others is ours). Rows of the
same expert add their gates.

What of a block's parameters grows with its experts is known from `expert_axes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bitnest.errors import CheckpointError, UnsupportedModel
from bitnest.expert_axes import ExpertAxes, expert_axes

KEY = "bitnest_experts"
CONSTANTS = "constants"
Row = int | str


def router_rows(module: Any) -> int:
    """How many choices the router of an experts module has."""
    rows = getattr(module, "expert_rows", None)
    return int(getattr(module, "num_experts", 0) or 0) if rows is None else len(rows)


def config_experts(config: Any) -> dict[str, Any]:
    """What a configuration says of unequal layers: block -> count and rows."""
    for own in (config, config.get_text_config()):
        found = getattr(own, KEY, None)
        if found:
            return dict(found)
    return {}


def resize_experts(model: Any, prefix: str, entries: Mapping[str, Any]) -> None:
    """Give blocks of a model without weights the experts and router rows that `entries` says.

    entries: `bitnest_experts` of a config.json; may be empty. prefix: of the decoder blocks.

    Raises:
        CheckpointError: an entry that is damaged, or of another model.
        UnsupportedModel: the model's layers cannot be resized.
    """
    if not entries:
        return
    axes = expert_axes(model, prefix)
    for block, entry in entries.items():
        count, rows = _checked(block, entry, axes)
        _resize(model, axes, f"{prefix}.{block}", int(block), count, len(rows))
        if rows != list(range(count)):
            module = model.get_submodule(axes.modules[int(block)])
            map_rows(module, rows, int(model.config.get_text_config().hidden_size))


def _checked(block: str, entry: Any, axes: ExpertAxes) -> tuple[int, list[Row]]:
    try:
        count, rows = int(entry["count"]), list(entry["rows"])
        known = int(block) in axes.modules and count > 0 and bool(rows)
        known = known and all(is_row(row, count) for row in rows)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise CheckpointError(
            f"'{KEY}' of block {block} says what no model has: {str(entry)[:80]}",
            where="config.json",
            hint="copy config.json from where the model came from",
        )
    return count, rows


def is_row(row: object, count: int) -> bool:
    """Whether a router's row is one of `count` experts, or zero, copy or constant:K."""
    if isinstance(row, int) and not isinstance(row, bool):
        return 0 <= row < count
    kind, _, number = str(row).partition(":")
    return row in ("zero", "copy") or (kind == "constant" and number.isdecimal())


def constants_of(rows: Sequence[Row]) -> int:
    """How many constants `rows` name: one more than the highest number."""
    named = [int(row.partition(":")[2]) for row in rows if str(row).startswith("constant:")]  # type: ignore[union-attr]
    return max(named, default=-1) + 1


def _resize(model: Any, axes: ExpertAxes, path: str, block: int, count: int, rows: int) -> None:
    def size(name: str) -> int:
        return count if axes.of_experts(block, name) else rows

    for name, dims in axes.tensors.items():
        if name.startswith(f"{path}."):
            _resize_tensor(model, name, {dim: size(name) for dim in dims})
    for (name, attribute), value in axes.numbers.items():
        if f"{name}.".startswith(f"{path}."):
            new, rest = divmod(value * size(name), axes.count)
            if rest:
                raise UnsupportedModel(
                    f"{attribute} {value} for {axes.count} experts cannot become one for {rows}",
                    where=name,
                    hint="keep a number of router rows that its groups divide",
                )
            setattr(model.get_submodule(name), attribute, new)


def _resize_tensor(model: Any, name: str, sizes: Mapping[int, int]) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    shape = [sizes.get(dim, length) for dim, length in enumerate(old.shape)]
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
    elif leaf not in module._non_persistent_buffers_set:
        module._buffers[leaf] = new
    else:
        raise UnsupportedModel("a buffer for each expert that no checkpoint holds", where=name)


def silenced(gates: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """Gates (tokens, k) with those in `off` 0 and each token's others scaled to the same sum.

    Tokens without any keep their gates bit for bit; those whose others sum to 0 get zeros.
    """
    kept = gates.float().masked_fill(off, 0)
    rest = kept.sum(-1, keepdim=True)
    scale = gates.float().sum(-1, keepdim=True) / rest.masked_fill(rest == 0, 1)
    scaled = (kept * scale).masked_fill(rest == 0, 0).to(gates.dtype)
    return torch.where(off.any(-1, keepdim=True), scaled, gates)


class MappedExperts:
    """What `map_rows` mixes into an experts module's class.

    The choices are mapped in the call, before hooks and before `forward`, which other code
    replaces: every way to run the experts is given numbers of experts, and `num_experts` for none.
    """

    expert_rows: tuple[Row, ...]
    num_experts: int

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        x, index, gates = hidden_states, top_k_index, top_k_weights
        if index.is_floating_point() or index.shape != gates.shape:
            raise UnsupportedModel(
                f"experts are called with choices {tuple(index.shape)} and gates "
                f"{tuple(gates.shape)}",
                where=type(self).__name__,
                hint="rows that are no expert need one gate per choice",
            )
        tables = self.__dict__.setdefault("_row_tables", {})
        if index.device not in tables:
            tables[index.device] = self._table(index.device)
        numbers, off, kinds = tables[index.device]
        index = index.long()
        gates = silenced(gates, off[index])
        slots, kind = numbers[index], kinds[index]
        own, slots = _added(gates, slots, self.num_experts) if self._shared() else (gates, slots)
        y: torch.Tensor = super().__call__(x, slots, own.masked_fill(slots == self.num_experts, 0))  # type: ignore[misc]
        if "copy" in self.expert_rows:
            y = y + (gates * (kind == -1)).sum(-1, keepdim=True).to(y.dtype) * x.to(y.dtype)
        constants = getattr(self, CONSTANTS, None)
        if constants is not None:
            chosen = kind[..., None] == torch.arange(1, len(constants) + 1, device=x.device)
            g = (gates[..., None] * chosen).sum(-2).to(y.dtype)  # (tokens, K)
            y = y + g @ constants.to(y)
        return y

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The family's own, which does not know what no expert is: any, with a gate of 0."""
        index = top_k_index.clamp(max=self.num_experts - 1)
        y: torch.Tensor = super().forward(hidden_states, index, top_k_weights)  # type: ignore[misc]
        return y

    def _table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """By row: its expert or `num_experts`; whether it is zero; -1 for copy, 1 + K."""
        rows = self.expert_rows
        numbers = [row if isinstance(row, int) else self.num_experts for row in rows]
        kinds = [
            0 if isinstance(row, int) or row == "zero"
            else -1 if row == "copy"
            else 1 + int(row.partition(":")[2])
            for row in rows
        ]  # fmt: skip
        off = [row == "zero" for row in rows]
        return (
            torch.tensor(numbers, device=device),
            torch.tensor(off, device=device),
            torch.tensor(kinds, device=device),
        )

    def _shared(self) -> bool:
        numbers = [row for row in self.expert_rows if isinstance(row, int)]
        return len(set(numbers)) < len(numbers)


def _added(
    gates: torch.Tensor, slots: torch.Tensor, none: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and slots (tokens, k) where an expert chosen twice is chosen once, by their sum."""
    gates, slots = gates.clone(), slots.clone()
    for later in range(1, slots.shape[-1]):
        for first in range(later):
            same = (slots[..., first] == slots[..., later]) & (slots[..., later] != none)
            gates[..., first] += gates[..., later] * same
            gates[..., later] = gates[..., later].masked_fill(same, 0)
            slots[..., later] = slots[..., later].masked_fill(same, none)
    return gates, slots


def map_rows(module: Any, rows: Sequence[Row], hidden: int) -> None:
    """Make an experts module read its choices as `rows`; constants (K, hidden) still empty."""
    count = constants_of(rows)
    if count:
        like = next(module.parameters())
        empty = torch.empty(count, hidden, dtype=like.dtype, device=like.device)
        setattr(module, CONSTANTS, nn.Parameter(empty, requires_grad=False))
    cls = type(module)
    module.expert_rows = tuple(rows)
    module.__class__ = type(f"Mapped{cls.__name__}", (MappedExperts, cls), {})
