"""Scales of keys and values for a cache in 8-bit floats, one of each per layer.

    s = max |x| / largest magnitude of the float

over a calibration text, keys after rotary embedding: the largest that was seen is stored as the
largest there is, and what is larger later is clipped. This is what engines load as `k_scale` and
`v_scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from bitnest.errors import BitnestError
from bitnest.formats.kv import KVFormat
from bitnest.kernels.kv import FP8
from bitnest.packed.kv_cache import Scales, check_family


class Extremes(DynamicCache):
    """A plain cache that remembers the largest magnitudes: (keys, values) by layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.largest: dict[int, tuple[float, float]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Look, then store."""
        keys, values = self.largest.get(layer_idx, (0.0, 0.0))
        self.largest[layer_idx] = (
            max(keys, float(key_states.abs().max())),
            max(values, float(value_states.abs().max())),
        )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def calibrate_scales(
    model: Any,
    tokens: torch.Tensor,
    fmt: KVFormat,
    *,
    batch_size: int = 8,
    step: Callable[[int], None] | None = None,
) -> Scales:
    """Scales by layer. tokens: (N, T) of a calibration text. fmt: of 8-bit floats. step: called
    with the number of windows that were read.

    Raises:
        UnsupportedModel: a family whose cache cannot be quantised.
        BitnestError: keys or values that are not finite, or a layer without any.
    """
    check_family(model.config)
    found: dict[int, tuple[float, float]] = {}
    for start in range(0, len(tokens), batch_size):
        cache = Extremes(model.config)
        part = tokens[start : start + batch_size].to(model.device)
        model(input_ids=part, past_key_values=cache, use_cache=True)
        for layer, (keys, values) in cache.largest.items():
            before = found.get(layer, (0.0, 0.0))
            found[layer] = (max(before[0], keys), max(before[1], values))
        if step is not None:
            step(len(part))
    most = torch.finfo(FP8[fmt.element]).max
    for layer, extremes in found.items():
        if not all(0 < value < float("inf") for value in extremes):
            raise BitnestError(
                f"the largest key and value of layer {layer} are {extremes[0]:g}, {extremes[1]:g}",
                hint="no scale fits; export without --kv",
            )
    return {layer: (keys / most, values / most) for layer, (keys, values) in found.items()}
