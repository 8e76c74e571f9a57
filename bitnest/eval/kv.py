"""Windows of text through a quantised cache, as they would go through it one by one.

A model that writes token n reads the cache as it is then: the oldest tokens quantised, the latest
as they came (`formats/kv.py` counts them). One pass over a whole text would show all of its queries
one state of the cache. So text goes through in chunks over which that state does not change:

    w + g - 1 tokens, then g at a time      window w, groups of g

and `strict` (`packed/kv_cache.py`) quantises before a chunk's queries read. This is what passes of
one token see, to the rounding of other matrix shapes. Without a window (w = 0) there is one pass,
in which every query sees everything quantised that fills a group, its own key and value included:
what engines do that store first, and no better than passes of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from bitnest.formats.kv import KVFormat
from bitnest.packed.kv_cache import Scales, open_cache


def chunk_ends(tokens: int, fmt: KVFormat) -> list[int]:
    """Where the passes over `tokens` tokens end."""
    if fmt.window == 0:
        return [tokens]
    first = fmt.window + fmt.group - 1
    return [*range(first, tokens, fmt.group), tokens]


def passes(
    model: Any, tokens: torch.Tensor, fmt: KVFormat | None, scales: Scales | None = None
) -> Iterator[Any]:
    """What `model` puts out for tokens (N, T), pass by pass; one plain pass where `fmt` is None.
    The cache is opened, which may run the model, before the first is asked for."""
    tokens = tokens.to(model.device)
    if fmt is None:
        return (model(input_ids=tokens, use_cache=False) for _ in range(1))
    cache = open_cache(model, fmt, scales=scales, strict=True)
    return (
        model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True)
        for start, stop in pairwise([0, *chunk_ends(tokens.shape[1], fmt)])
    )
