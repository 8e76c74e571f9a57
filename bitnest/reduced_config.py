"""The config.json of a model with fewer experts and blocks.

Where every layer of experts ends up alike, the family's own key says how many there are; else
`bitnest_experts` does (see `resized`). Lists with an entry for each block lose those of dropped
blocks, lists of block numbers are renumbered, and a count of blocks at the start shrinks by those
dropped there. Which keys those are is guessed from their names and lengths, so the guess is
checked: `check_blocks` holds every block of the new model against the one it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from bitnest.errors import CheckpointError, UnsupportedModel
from bitnest.expert_axes import ExpertAxes
from bitnest.reduction import LayerExperts, Reduction
from bitnest.resized import KEY
from bitnest.skeleton import Skeleton

LAYERS = "num_hidden_layers"
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts",
)  # fmt: skip
GROUPS = ("n_group", "n_groups", "num_expert_group", "num_expert_groups")
TOP_GROUPS = ("topk_group", "topk_groups")
LEADING = (
    "first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index",
)  # fmt: skip
_PLACE = {"layer_idx", "layer_id", "layer_number", "block_idx", "idx"}  # of a block in its model


def first_of(config: Any, names: Sequence[str], default: int) -> int:
    """The first of a configuration's keys that holds a number."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def reduced_config(
    skeleton: Skeleton, axes: ExpertAxes | None, reduction: Reduction
) -> dict[str, Any]:
    """The source's config.json, changed."""
    raw = deepcopy(skeleton.checkpoint.config)
    text = skeleton.model.config.get_text_config()
    inner = _container(raw, text)
    count = len(skeleton.blocks)
    kept = [block for block in range(count) if block not in reduction.dropped]
    if reduction.dropped:
        _put(inner, text, LAYERS, len(kept))
        for key, value in text.to_dict().items():
            new = _per_block(key, value, count, kept)
            if new != value:
                _put(inner, text, key, new)
    if axes is not None and reduction.experts:
        _put_experts(inner, text, axes, reduction.experts, kept)
    return raw


def _container(raw: dict[str, Any], text: Any) -> dict[str, Any]:
    """The part of config.json that describes the text model."""
    names = _spellings(text, LAYERS)
    inner = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    return next((own for own in inner if any(name in own for name in names)), raw)


def _spellings(text: Any, key: str) -> list[str]:
    """The names a key may go by, the configuration's own first."""
    aliases: Mapping[str, str] = getattr(text, "attribute_map", {})
    real = aliases.get(key, key)
    return [real, *(alias for alias, name in aliases.items() if name == real)]


def _put(inner: dict[str, Any], text: Any, key: str, value: Any) -> None:
    names = _spellings(text, key)
    for name in [name for name in names if name in inner] or names[:1]:
        inner[name] = value


def _per_block(key: str, value: Any, count: int, kept: Sequence[int]) -> Any:
    if key in LEADING and isinstance(value, int):
        return sum(block < value for block in kept) + max(0, value - count)
    if not isinstance(value, list) or "token" in key or key == "architectures":
        return value
    numbers = [v for v in value if type(v) is int]
    rising = numbers == sorted(set(numbers)) and all(0 <= v < count for v in numbers)
    if value and len(numbers) == len(value) and rising and "layers" in key:
        return [kept.index(block) for block in value if block in kept]
    return [value[block] for block in kept] if len(value) == count else value


def _put_experts(
    inner: dict[str, Any],
    text: Any,
    axes: ExpertAxes,
    layers: Mapping[int, LayerExperts],
    kept: Sequence[int],
) -> None:
    counts = {
        len(layers[block].slots) if block in layers else axes.count
        for block in axes.modules
        if block in kept
    }
    if len(counts) == 1 and all(layer.plain for layer in layers.values()):
        _put(inner, text, axes.key, counts.pop())
        return
    inner[KEY] = {
        str(kept.index(block)): {"count": len(layer.slots), "rows": list(layer.rows)}
        for block, layer in sorted(layers.items())
        if not (layer.plain and len(layer.slots) == axes.count)
    }


def check_groups(config: Any, block: int, layer: LayerExperts, experts: int) -> None:
    """Refuse rows that would leave a router of groups with other groups than it was trained with.

    Raises:
        UnsupportedModel: they would.
    """
    text = config.get_text_config()
    groups = first_of(text, GROUPS, 1)
    if groups <= 1 or layer.rows == tuple(range(experts)):
        return
    size, rest = divmod(len(layer.rows), groups)
    chosen = first_of(text, TOP_GROUPS, groups) * size
    old = [row * groups // experts for row in layer.sources]
    if rest or old != [row // size for row in range(len(layer.rows))]:
        raise UnsupportedModel(
            f"the router chooses among {groups} groups, which {len(layer.rows)} rows do not keep",
            where=f"block {block}",
            hint="keep as many rows of each group, in order",
        )
    if size < 2 or chosen < first_of(text, TOP_K, 2):
        raise UnsupportedModel(
            f"{size} rows in each of {groups} groups are too few for the router to choose from",
            where=f"block {block}",
            hint="keep more",
        )


def check_blocks(
    old: Skeleton, new: Skeleton, kept: Sequence[int], axes: ExpertAxes | None
) -> None:
    """Hold every block of the reduced model against its source's: same modules, same settings.

    Raises:
        UnsupportedModel: a block became another kind, since a key was not understood.
    """
    counts = set() if axes is None else {attribute for _, attribute in axes.numbers}
    for place, block in enumerate(kept):
        ours = _traits(new.blocks[place], counts)
        theirs = _traits(old.blocks[block], counts)
        if odd := sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)):
            raise UnsupportedModel(
                f"block {block} would not be what it was: '{odd[0]}'",
                where=type(new.model).__name__,
                hint="this family's blocks differ by their place: drop none of them",
            )
    if len(kept) < len(old.blocks):
        _check_config(old, new, kept)


def _traits(block: nn.Module, counts: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in block.named_modules():
        found[name] = type(module).__name__.removeprefix("Mapped")
        for key, value in vars(module).items():
            plain = isinstance(value, str | int | float | bool | torch.dtype)
            if plain and key not in _PLACE | counts | {"training"}:
                found[f"{name}.{key}"] = value
    return found


def _check_config(old: Skeleton, new: Skeleton, kept: Sequence[int]) -> None:
    text = old.model.config.get_text_config()
    before, after = text.to_dict(), new.model.config.get_text_config().to_dict()
    scaled = [key for key in before if "layer_idx" in key and before[key]]
    for key, value in before.items():
        per_block = isinstance(value, list) and len(value) == len(old.blocks)
        if per_block and after.get(key) != _per_block(key, value, len(old.blocks), kept):
            scaled.append(key)
    if scaled:
        raise UnsupportedModel(
            f"blocks cannot be dropped where '{scaled[0]}' is set",
            where="config.json",
            hint="this family's blocks differ by their place: drop none of them",
        )


def check_dropped(dropped: Sequence[int], named: Mapping[int, Any], count: int) -> None:
    """Refuse blocks that are not there, or all of them.

    Raises:
        CheckpointError: they are.
    """
    odd = [block for block in [*dropped, *named] if not 0 <= block < count]
    both = sorted(set(dropped) & set(named))
    if odd or both or len(set(dropped)) < len(dropped) or len(dropped) == count:
        said = (
            f"there is no block {odd[0]}: the model has {count}" if odd
            else f"block {both[0]} is dropped and given experts" if both
            else "all blocks dropped" if len(set(dropped)) == count
            else "a block is dropped twice"
        )  # fmt: skip
        raise CheckpointError(said, where="reduction", hint="choose other blocks")
