"""What a model does after its last block: final norm, head, and whatever its family does to logits.

The model's own forward runs with its blocks replaced: they pass on what they get, and the last
one hands out given hidden states. So nothing about a family's tail has to be known. Logits come
window by window: (length, vocabulary) is the largest thing held. `open_head` stops at what the head
reads: neither head nor embedding is held then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bitnest.calibrate.stream import Stream

Tail = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens (1, T), states (1, T, hidden) after the last block) -> logits (T, vocabulary) float32."""


Reader = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens (1, T), states (1, T, hidden) after the last block) -> the head's input (T, hidden)."""


@contextmanager
def open_head(stream: Stream) -> Iterator[Reader]:
    """Hold what lies between blocks and head in memory, in the stream's type."""
    skeleton, model = stream.skeleton, stream.skeleton.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    leave = {f"{skeleton.path_of(module)}.weight" for module in (table, head)}
    skeleton.fill("", dtype=stream.dtype, device=stream.device, skip=skeleton.prefix, leave=leave)
    given: list[torch.Tensor] = []
    read: list[torch.Tensor] = []

    def record(x: torch.Tensor) -> torch.Tensor:
        read[:] = [x]
        return x.new_zeros(*x.shape[:-1], 1)

    table.forward = lambda _tokens: given[0]
    head.forward = record

    def reader(tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        given[:] = [states]
        model(input_ids=tokens.to(stream.device), use_cache=False)
        return read.pop()[0]

    try:
        with _stand_ins(stream, given):
            yield reader
    finally:
        del table.forward, head.forward
        _drop(stream)


@contextmanager
def open_tail(stream: Stream) -> Iterator[Tail]:
    """Hold everything but the blocks in memory, in the stream's type, while the context lasts."""
    skeleton = stream.skeleton
    model = skeleton.model
    skeleton.fill("", dtype=stream.dtype, device=stream.device, skip=skeleton.prefix)
    model.tie_weights()
    given: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, _a, y: y.to(stream.dtype))

    def tail(tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        given[:] = [states]
        output = model(input_ids=tokens.to(stream.device), use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits.float()

    try:
        with _stand_ins(stream, given):
            yield tail
    finally:
        hook.remove()
        _drop(stream)


@contextmanager
def _stand_ins(stream: Stream, given: list[torch.Tensor]) -> Iterator[None]:
    """Blocks that pass on what they get, the last one what is `given`."""
    blocks = list(stream.skeleton.blocks)
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        block.forward = _stand_in(given if last else None, stream.tuple_output)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _drop(stream: Stream) -> None:
    """Free everything outside the blocks."""
    skeleton = stream.skeleton
    for name, parameter in list(skeleton.model.named_parameters(remove_duplicate=False)):
        if not name.startswith(skeleton.prefix + ".") and not parameter.is_meta:
            skeleton.drop_parameter(name)


def _stand_in(given: list[torch.Tensor] | None, as_tuple: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        result = states if given is None else given[0]
        return (result,) if as_tuple else result

    return forward
