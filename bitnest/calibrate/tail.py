"""What a model does after its last block: final norm, head, and whatever its family does to logits.

The model's own forward runs with its blocks replaced: they pass on what they get, and the last
one hands out given hidden states. So nothing about a family's tail has to be known. Logits come
window by window: (length, vocabulary) is the largest thing held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bitnest.calibrate.stream import Stream

Tail = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens (1, T), states (1, T, hidden) after the last block) -> logits (T, vocabulary) float32."""


@contextmanager
def open_tail(stream: Stream) -> Iterator[Tail]:
    """Hold everything but the blocks in memory, in the stream's type, while the context lasts."""
    skeleton = stream.skeleton
    model = skeleton.model
    skeleton.fill("", dtype=stream.dtype, device=stream.device, skip=skeleton.prefix)
    model.tie_weights()
    given: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, _a, y: y.to(stream.dtype))
    blocks = list(skeleton.blocks)
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        block.forward = _stand_in(given if last else None, stream.tuple_output)

    def tail(tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        given[:] = [states]
        output = model(input_ids=tokens.to(stream.device), use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    try:
        yield tail
    finally:
        hook.remove()
        for block in blocks:
            del block.forward
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if not name.startswith(skeleton.prefix + ".") and not parameter.is_meta:
                skeleton.drop_parameter(name)


def _stand_in(given: list[torch.Tensor] | None, as_tuple: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        result = states if given is None else given[0]
        return (result,) if as_tuple else result

    return forward
