"""A whole model run by the C runtime: tokens in, logits out, no framework between.

    native = NativeModel.of(model)          # a transformers model, packed or not, on the CPU
    cache = native.cache()
    logits = native.forward(tokens, cache)  # behind what the cache holds

Packed weights are shared with the transformers model, as they are laid out; dense bfloat16 ones are
laid out beside theirs. `of` compares the two on a few tokens and refuses what differs. Activations
are float32; what packed matrices read is coded in 8 bits a plane (2: within 2^-15 of the largest).
The cache is float16 or float32. Families: `native_families`.

Left out: batches of more than one sequence, rounded inputs, other devices.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bitnest.kernels.cpu.runtime import (
    CACHE_STEP,
    PLANES,
    STAGES,
    LayerStruct,
    ModelStruct,
    StepStruct,
    runtime,
)
from bitnest.packed.native_families import Description, NotNative, check, describe

TRIED = 16  # tokens on which the two are compared
TOLERANCE = (0.1, 0.03)  # see `deviation`: of 16-bit models, of float32
CHUNK = 256  # tokens of a prompt that go through the layers together


class NativeCache:
    """Keys and values of the tokens seen, of all layers; grows as it is used.

    keys: (layers, kv heads, capacity / 16, width, 16), 16 positions side by side. values: (layers,
    kv heads, capacity, width padded to 16). length: positions held.
    """

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype) -> None:
        self.layers, self.heads, self.width, self.dtype = layers, heads, width, dtype
        self.length = self.capacity = 0
        self.keys, self.values = self._make(0)

    def _make(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, wide = capacity // 16, -(-self.width // 16) * 16
        return (
            torch.zeros(self.layers, self.heads, blocks, self.width, 16, dtype=self.dtype),
            torch.zeros(self.layers, self.heads, capacity, wide, dtype=self.dtype),
        )

    def reserve(self, positions: int) -> None:
        """Room for so many positions."""
        if positions <= self.capacity:
            return
        wanted = max(positions, 2 * self.capacity if self.capacity < 8192 else self.capacity + 4096)
        capacity = -(-wanted // CACHE_STEP) * CACHE_STEP
        keys, values = self._make(capacity)
        keys[:, :, : self.capacity // 16] = self.keys
        values[:, :, : self.capacity] = self.values
        self.keys, self.values, self.capacity = keys, values, capacity

    def crop(self, length: int) -> None:
        """Forget positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"{self.length} positions cannot be cropped to {length}")
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes


class NativeModel:
    """A model described for the runtime. One step at a time: it is not for several threads."""

    def __init__(self, description: Description, planes: int, dtype: torch.dtype) -> None:
        """dtype: of the cache, float16 or float32."""
        library = runtime()
        if library is None:
            raise NotNative("the CPU kernels could not be built")
        self._library, self._description, self._dtype = library, description, dtype
        layers = description.layers
        self._layers = (LayerStruct * len(layers))(*(layer.struct for layer in layers))
        self.vocabulary, self.hidden = description.head.shape
        self._ends = (description.embedding.struct, description.head.struct)
        self._struct = ModelStruct(
            len(layers), planes, self.hidden, self.vocabulary, description.eps, 1.0, self._layers,
            ctypes.pointer(self._ends[0]), ctypes.pointer(self._ends[1]),
            description.norm.data_ptr(),
        )  # fmt: skip
        self._angles: tuple[torch.Tensor, ...] = ()
        self._positions = 0
        self.seconds = np.zeros(len(STAGES))  # of stages, where `timed`
        self.timed = False
        self._context = library.model_open(self._struct)
        if not self._context:
            raise MemoryError("native model")

    @classmethod
    def of(
        cls, model: Any, *, planes: int = PLANES, cache: torch.dtype = torch.float16,
        progress: Callable[[int, int], None] = lambda done, layers: None,
    ) -> NativeModel:  # fmt: skip
        """The model of transformers, laid out for this CPU.

        planes: bytes in which what a matrix reads is coded, 1 to 3.

        Raises:
            NotNative: the runtime cannot run it, or its logits are further from transformers' than
                TOLERANCE; the message says why.
        """
        if runtime() is None:
            raise NotNative("the CPU kernels could not be built")
        with torch.no_grad():
            check(model)
            ids = torch.arange(1, TRIED + 1) * 7919 % model.config.vocab_size
            # before weights are laid out: a lookup afterwards would restore the embedding
            wanted = model(ids[None], use_cache=False).logits[0].float()
            made = cls(describe(model, planes, progress), planes, cache)
            limit = TOLERANCE[model.dtype == torch.float32 and planes > 1]
            if not (far := made.deviation(ids, wanted)) <= limit:  # NaN is far, too
                raise NotNative(
                    f"its logits are {far:.2g} away from those of transformers, of a norm of 1 "
                    f"({limit} at most)"
                )
        return made

    def deviation(self, ids: torch.Tensor, wanted: torch.Tensor) -> float:
        """How far logits of tokens ids (n,) are from `wanted` (n, vocabulary): |a - b| / |b| of a
        token, the median over all; the second half one by one, behind the cache. A router in doubt
        may choose another expert for some, what is computed wrongly is so for most."""
        cache, half = self.cache(len(ids)), len(ids) // 2
        parts = [self.forward(ids[:half], cache, every=True)]
        parts += [self.forward(ids[i : i + 1], cache) for i in range(half, len(ids))]
        miss = (torch.cat(parts) - wanted).norm(dim=1)
        return float((miss / wanted.norm(dim=1).clamp_min(1e-30)).median())

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._library.model_close(self._context)
            self._context = None

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(linear.nbytes for linear in self._description.linears)

    def cache(self, positions: int = 0) -> NativeCache:
        """An empty cache with room for so many positions."""
        about = self._description
        made = NativeCache(len(about.layers), about.kv_heads, about.width, self._dtype)
        made.reserve(positions)
        return made

    def forward(
        self, tokens: Sequence[int] | torch.Tensor, cache: NativeCache, *, every: bool = False
    ) -> torch.Tensor:
        """Logits (1, vocabulary) of the last token, or (tokens, vocabulary) with `every`, float32.

        tokens: at least one, behind the cache's, which takes them in.

        Raises:
            ValueError: no tokens, or ids that are not in the vocabulary.
            MemoryError: no room for what lies between matrices.
        """
        ids = np.ascontiguousarray(tokens, dtype=np.int64).ravel()
        if not len(ids) or ids.min() < 0 or ids.max() >= self._description.embedding.shape[0]:
            raise ValueError(f"{len(ids)} tokens, not all in the vocabulary, or none")
        cache.reserve(cache.length + len(ids))
        self._turn(cache.length + len(ids))
        logits = torch.empty(len(ids) if every else 1, self.vocabulary)
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            last = start + len(part) == len(ids)
            out = logits[start:] if every else logits
            self._step(part, cache, out if every or last else None, every)
        return logits

    def _step(
        self, ids: np.ndarray, cache: NativeCache, logits: torch.Tensor | None, every: bool
    ) -> None:
        step = StepStruct(
            len(ids), cache.length, ids.ctypes.data, cache.capacity,
            cache.dtype == torch.float16, every, cache.keys.data_ptr(), cache.values.data_ptr(),
            None if logits is None else logits.data_ptr(),
            self.seconds.ctypes.data if self.timed else None,
        )  # fmt: skip
        if self._library.model_step(self._context, step):
            raise MemoryError(f"a step of {len(ids)} tokens")
        cache.length += len(ids)

    def _turn(self, positions: int) -> None:
        """Cosines and sines of the rotary embedding for so many positions."""
        if positions <= self._positions:
            return
        count = max(positions, 2 * self._positions, 512)
        place = torch.arange(count)[None]
        with torch.no_grad():
            found = self._description.rotary(torch.zeros(1, 1), place)
        self._angles = tuple(t[0].float().contiguous() for t in found)
        for layer in self._layers:
            about = layer.attention
            about.rotary = self._angles[0].shape[1]
            about.cosines, about.sines = (t.data_ptr() for t in self._angles)
        self._positions = count

    def generate(
        self, prompt: Sequence[int], count: int, *, temperature: float = 0.0, top_p: float = 1.0,
        seed: int | None = None, stop: Sequence[int] = (), cache: NativeCache | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """Up to `count` tokens behind `prompt`, as they come; ends after one of `stop`.

        temperature 0: the likeliest token each time. top_p: of the smallest set of tokens that has
        this probability. cache: what came before the prompt, taken along.
        """
        cache = self.cache() if cache is None else cache
        cache.reserve(cache.length + len(prompt) + count)
        generator = torch.Generator()
        if seed is not None:
            generator.manual_seed(seed)
        logits = self.forward(prompt, cache)[0]
        for number in range(count):
            token = _pick(logits, temperature, top_p, generator)
            yield token
            if token in stop or number + 1 == count:
                return
            logits = self.forward([token], cache)[0]


def _pick(logits: torch.Tensor, temperature: float, top_p: float, generator: Any) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    chances = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        ordered, place = chances.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        chances = torch.zeros_like(chances).scatter(0, place, ordered.where(before < top_p, 0))
    return int(torch.multinomial(chances, 1, generator=generator))
