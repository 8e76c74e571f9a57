"""Streaming: run a model block by block over stored hidden states, one block in memory at a time.

The skeleton's blocks are replaced by recorders and the model is run once per batch shape: that
gives the hidden states entering the first block and, without computing anything, the arguments
(masks, rotary embeddings) every block is called with. From then on `run` sends all samples through
one real block. Hidden states lie in memory, or in a memory-mapped file above a limit.

Left out: models whose block arguments depend on the sample beyond its hidden states (refused), and
outputs after the last block.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bitnest.calibrate.spill import forget
from bitnest.errors import UnsupportedModel
from bitnest.skeleton import Skeleton

BATCH_TOKENS = 2048


class _Done(Exception):
    """Raised by the last recorder: nothing after the blocks is needed."""


@dataclass
class _Call:
    """What one block is called with besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """Hidden states of all calibration samples on their way through the blocks.

    hidden: (samples, length, hidden_size), the states entering the next block.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: torch.Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory_limit: int | None = None,
        labels: Sequence[str] = (),
        singles: bool = False,
    ) -> None:
        """Embed `tokens` (samples, length) and learn how every block is called.

        dtype: of hidden states. memory_limit: bytes of hidden states kept in memory; more go to
        a temporary file. labels: one per sample; a batch never holds samples of two.
        singles: `forward` is also to be called with one sample.

        Raises:
            UnsupportedModel: blocks are called with arguments that change from sample to sample.
        """
        self.skeleton = skeleton
        self.device = device
        self.dtype = dtype
        self.batch = max(1, BATCH_TOKENS // tokens.shape[1])
        self._calls: dict[int, list[_Call]] = {}
        self._limit, self._held = memory_limit, 0
        self._mapped: list[weakref.ref[torch.Tensor]] = []
        self.tuple_output = False
        self._parts = list(_batches(len(tokens), self.batch, labels))
        self._embed(tokens, singles)

    def batches(self) -> list[slice]:
        """Sample ranges, in order."""
        return self._parts

    def forward(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Block `layer`, which must hold its weights, on states (samples, length, hidden_size)."""
        call = self._calls[len(states)][layer]
        output = self.skeleton.blocks[layer](states, *call.args, **call.kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def call(self, layer: int, samples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block `layer` is called with after its hidden states, for a batch of `samples`."""
        call = self._calls[samples][layer]
        return call.args, call.kwargs

    def forward_checked(self, layer: int, part: slice) -> torch.Tensor:
        """`forward` on some of the stored samples.

        Raises:
            UnsupportedModel: NaN or infinite outputs, of which statistics would be meaningless.
        """
        output = self.forward(layer, self.hidden[part].to(self.device))
        if not output.isfinite().all():
            raise UnsupportedModel(
                f"block {layer} gives NaN or infinite values in {self.dtype}",
                where=type(self.skeleton.model).__name__,
                hint="check that the original model gives sensible text; use --method rtn",
            )
        return output

    @torch.no_grad()
    def run(self, layer: int, *, keep: bool, after_batch: Callable[[], None] | None = None) -> None:
        """Send every sample through block `layer`, which must hold its weights.

        keep: store the outputs as the next block's inputs. after_batch: called between batches.
        """
        for part in self.batches():
            output = self.forward_checked(layer, part)
            if keep:
                self.hidden[part] = output
            if after_batch is not None:
                after_batch()
        self.forget()

    def embed(self, tokens: torch.Tensor, change: Callable[[], None]) -> torch.Tensor:
        """What the first block reads of `tokens` (n, length): (n, length, hidden_size).

        change: called when the weights outside the blocks are in memory.
        """
        with self.outside():
            change()
            return torch.cat([
                self._record(row[None].to(self.device))[0].cpu() for row in tokens
            ])  # fmt: skip

    def _embed(self, tokens: torch.Tensor, singles: bool) -> None:
        with self.outside():
            for part in self.batches():
                states, calls = self._record(tokens[part].to(self.device))
                self._remember(len(states), calls)
                if part.start == 0:
                    self.hidden = self.allocate((*tokens.shape, states.shape[-1]))
                self.hidden[part] = states
            if singles:
                self._remember(1, self._record(tokens[:1].to(self.device))[1])

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Hold what lies before the blocks in memory, in the checkpoint's type."""
        skeleton = self.skeleton
        head = skeleton.model.get_output_embeddings()
        head_name = next((n for n, m in skeleton.model.named_modules() if m is head), None)
        outside = [name for name, _ in skeleton.model.named_children() if name != head_name]
        for name in outside:
            skeleton.fill(
                name, dtype=skeleton.checkpoint.dtype, device=self.device, skip=skeleton.prefix
            )
        hook = skeleton.model.get_input_embeddings().register_forward_hook(
            lambda _m, _a, out: out.to(self.dtype)
        )
        self._move_buffers()
        try:
            yield
        finally:
            hook.remove()
            for name in outside:
                for child, parameter in list(skeleton.model.get_submodule(name).named_parameters()):
                    full = f"{name}.{child}"
                    if not full.startswith(skeleton.prefix + ".") and not parameter.is_meta:
                        skeleton.drop_parameter(full)

    def _move_buffers(self) -> None:
        for module in self.skeleton.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def _record(
        self, tokens: torch.Tensor, *, retry: bool = False
    ) -> tuple[torch.Tensor, list[_Call]]:
        """Run the model with recorders for blocks: first block's input, every block's arguments."""
        blocks = self.skeleton.blocks
        first: list[torch.Tensor] = []
        calls: list[_Call] = []

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                states, rest = _split_hidden(args, kwargs)
                if index == 0:
                    first.append(states.detach())
                elif states.shape != first[0].shape and not self.tuple_output:
                    raise _WantsTuple
                calls.append(_Call(rest, {k: v for k, v in kwargs.items() if k != "hidden_states"}))
                if index == len(blocks) - 1:
                    raise _Done
                return (states,) if self.tuple_output else states

            return forward

        for index, block in enumerate(blocks):
            block.forward = recorder(index)
        try:
            with torch.no_grad():
                self.skeleton.model.base_model(input_ids=tokens, use_cache=False)
        except _Done:
            pass
        except _WantsTuple:
            self.tuple_output = True
        finally:
            for block in blocks:
                del block.forward
        if self.tuple_output and len(calls) != len(blocks) and not retry:
            return self._record(tokens, retry=True)
        if len(calls) != len(blocks):
            raise UnsupportedModel(
                f"the model called {len(calls)} of its {len(blocks)} blocks",
                where=type(self.skeleton.model).__name__,
            )
        if first[0].dim() != 3:
            raise UnsupportedModel(
                f"hidden states of shape {tuple(first[0].shape)} between blocks",
                where=type(self.skeleton.model).__name__,
                hint="only (batch, length, width) can be streamed block by block; use --method rtn",
            )
        return first[0], calls

    def _remember(self, size: int, calls: list[_Call]) -> None:
        known = self._calls.setdefault(size, calls)
        for layer, (a, b) in enumerate(zip(known, calls, strict=True)):
            if not (_same(a.args, b.args) and _same(a.kwargs, b.kwargs)):
                raise UnsupportedModel(
                    f"block {layer} is called with arguments that differ from sample to sample",
                    where=type(self.skeleton.model).__name__,
                    hint="such models cannot be streamed block by block; use --method rtn",
                )

    def allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Storage for states: in memory, or above the limit of all in a file that vanishes with
        it."""
        count = math.prod(shape)
        nbytes = count * self.dtype.itemsize
        if self._limit is None or self._held + nbytes <= self._limit:
            self._held += nbytes
            return torch.empty(shape, dtype=self.dtype)
        with tempfile.NamedTemporaryFile(prefix="bitnest-hidden-") as file:
            # allocated, not sparse: a full disk is an error here, not a bus error later
            os.posix_fallocate(file.fileno(), 0, nbytes)
            mapped = torch.from_file(file.name, shared=True, size=count, dtype=self.dtype)
        states = mapped.view(shape)
        self._mapped.append(weakref.ref(states))
        return states

    def forget(self) -> None:
        """Let go of pages of states that lie in files: they would count as the process's own."""
        self._mapped = [ref for ref in self._mapped if ref() is not None]
        for ref in self._mapped:
            states = ref()
            if states is not None:
                forget(states)

    @property
    def tokens(self) -> int:
        """Tokens in all samples."""
        return self.hidden.shape[0] * self.hidden.shape[1]


def _batches(count: int, size: int, labels: Sequence[str]) -> Iterator[slice]:
    """Ranges of at most `size` samples of one label."""
    start = 0
    while start < count:
        stop = start + 1
        while stop < min(start + size, count) and (not labels or labels[stop] == labels[start]):
            stop += 1
        yield slice(start, stop)
        start = stop


class _WantsTuple(Exception):
    """The model indexes what a block returns: recorders must return tuples."""


def _split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    if args:
        return args[0], args[1:]
    return kwargs["hidden_states"], ()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (int, float, str, bool, type(None))):
        return a == b
    return True  # caches and the like: created per call, empty without use_cache
