"""Which rotation a layer puts on its keys, found by running the model, so that it can be undone.

A rotary embedding turns pairs of a key's channels by angles p w_i at position p:

    (a_i, b_i) -> (a_i cos - b_i sin, b_i cos + a_i sin)

with the pairs (i, i + r/2) of the first r channels, or (2i, 2i + 1). The frequencies w are those
that the model holds (buffers called `inv_freq`); which of them, and which pairs, no field says for
all families. So nothing is assumed: a few tokens run at positions 0, 1, ... and again at positions
moved by SHIFT. Attention with rotary embeddings sees only distances, so in every layer keys must be
the former ones turned by SHIFT w. A candidate that predicts them is the layer's rotation; where
none does (no rotary embedding, learnt positions, tables that are not kept), there is none to undo.
[ours]

Rotations are orthogonal: turning back and forth by the same table loses nothing but rounding, even
where the positions are not those that the model used. Then keys are quantised in a basis turned by
a constant (left padding moves all positions of a row by one offset) or by changing angles (any
other positions), the latter at the price of larger ranges. A table that the family changes with
the length (dynamic NTK) is used as it was found, so it stays exact, too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

log = logging.getLogger(__name__)

PROBE = 4  # tokens
SHIFT = 7  # positions
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest relative error of predicted keys, the median over tokens."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """A layer's rotation. frequencies: (r / 2,) float32, radians a position. neighbours: pairs are
    (2i, 2i + 1) rather than (i, i + r/2)."""

    frequencies: torch.Tensor
    neighbours: bool = False

    def turn(self, keys: torch.Tensor, start: int, *, back: bool = False) -> torch.Tensor:
        """Keys (..., n, D) float32 at positions start, start + 1, ..., turned, or turned back."""
        positions = torch.arange(start, start + keys.shape[-2], device=keys.device)
        return self._turn(keys, positions, back)

    def shift(self, keys: torch.Tensor, by: int) -> torch.Tensor:
        """Keys (..., n, D), all turned by the angles of position `by`."""
        return self._turn(keys, torch.full((keys.shape[-2],), by, device=keys.device), False)

    def _turn(self, keys: torch.Tensor, positions: torch.Tensor, back: bool) -> torch.Tensor:
        # float64 for the angles: at position 10^6 float32 is 0.06 radians off
        frequencies = self.frequencies.to(keys.device, torch.float64)
        angles = positions.to(torch.float64)[:, None] * frequencies
        cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
        sin = -sin if back else sin
        half = frequencies.shape[0]
        turned = keys.clone()
        if self.neighbours:
            places = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            places = slice(0, half), slice(half, 2 * half)
        a, b = keys[..., places[0]], keys[..., places[1]]
        turned[..., places[0]] = a * cos - b * sin
        turned[..., places[1]] = b * cos + a * sin
        return turned


_found: WeakKeyDictionary[Any, tuple[Rotation | None, ...]] = WeakKeyDictionary()


def find_rotations(model: Any) -> tuple[Rotation | None, ...]:
    """Of every layer of `model`, a causal transformers model, the rotation of its keys. Runs it on
    eight tokens, the first time."""
    if model not in _found:
        _found[model] = _find(model)
    return _found[model]


@torch.no_grad()
def _find(model: Any) -> tuple[Rotation | None, ...]:
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    tables = _tables(model)
    if not tables:
        log.info("no rotary frequencies in the model: keys are quantised as they come")
        return (None,) * layers
    try:
        still, moved = _keys(model, 0), _keys(model, SHIFT)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        log.info("keys are quantised as they come, positions cannot be moved: %s", error)
        return (None,) * layers
    found = tuple(_match(a, b, tables) for a, b in zip(still, moved, strict=True))
    lost = sum(rotation is None for rotation in found)
    if lost:
        log.info("%d of %d layers: no rotation of keys found, quantised as they come", lost, layers)
    return found


def _tables(model: Any) -> list[torch.Tensor]:
    """Distinct frequency tables."""
    tables: list[torch.Tensor] = []
    for name, buffer in model.named_buffers():
        table = buffer.detach().float()
        same = any(t.shape == table.shape and torch.equal(t, table) for t in tables)
        if name.endswith("inv_freq") and table.ndim == 1 and not same:
            tables.append(table.clone())
    return tables


def _keys(model: Any, start: int) -> list[torch.Tensor | None]:
    """Keys of PROBE tokens at positions from `start`, by layer."""
    from transformers import DynamicCache

    ids = torch.arange(1, PROBE + 1, device=model.device)[None]
    cache = DynamicCache(config=model.config)
    positions = torch.arange(start, start + PROBE, device=model.device)[None]
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [layer.keys for layer in cache.layers]


def _match(
    still: torch.Tensor | None, moved: torch.Tensor | None, tables: list[torch.Tensor]
) -> Rotation | None:
    """The candidate that turns the keys (1, H, n, D) `still` into `moved`."""
    if still is None or moved is None:
        return None
    limit = TOLERANCE.get(still.dtype, 1e-3)
    best, least = None, limit
    for table in tables:
        if 2 * table.shape[0] > still.shape[-1]:
            continue
        for neighbours in (False, True):
            candidate = Rotation(table, neighbours)
            expected = candidate.shift(still.float(), SHIFT)
            error = (expected - moved.float()).norm(dim=(1, 3)) / moved.float().norm(dim=(1, 3))
            if (median := float(error.median())) < least:
                best, least = candidate, median
    return best
