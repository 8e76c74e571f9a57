"""The `native` backend: the C runtime runs the whole model, one request at a time.

On a CPU a token is as fast as its weights can be read, with no framework between the layers
(`packed/native_model`). What the cache holds of the last request is kept: a request that begins
with the same tokens, as the next turn of a conversation does, pays for the new ones only.

Left out: several requests at a time (they wait for each other), quantised caches, adapters.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from bitnest.serve.backend import Deliver, Job, Update
from bitnest.serve.backend_generate import Cancelled, GenerateBackend
from bitnest.serve.sampling import force_sampled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitnest.packed.native_model import NativeModel


class NativeBackend(GenerateBackend):
    """A worker thread around a native model."""

    name = "native"

    def __init__(
        self, model: PreTrainedModel, native: NativeModel, end_ids: tuple[int, ...]
    ) -> None:
        super().__init__(model, end_ids)
        self._native = native
        self._cache = native.cache()
        self._held: list[int] = []  # tokens the cache holds

    @torch.no_grad()
    def _generate(self, job: Job, deliver: Deliver, cancelled: threading.Event) -> None:
        prompt = list(job.prompt)
        # the last token always runs: its logits are asked for
        same = _common(prompt[:-1], self._held)
        self._cache.crop(same)
        del self._held[same:]
        new = prompt[same:]
        for number in range(job.max_tokens):
            if cancelled.is_set():
                raise Cancelled
            logits = self._native.forward(new, self._cache)
            self._held += new
            position = len(self._held)
            token = int(force_sampled(logits, [job.sampling], [position]).argmax())
            deliver(Update((token,)))
            if token in self._end_ids or number + 1 == job.max_tokens:
                return
            new = [token]


def _common(first: list[int], second: list[int]) -> int:
    """Tokens that two lists begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
