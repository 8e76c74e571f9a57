"""The `generate` backend: one `model.generate` at a time, in the order the jobs came.

For models and devices that continuous batching does not support, and for quantised KV caches, which
its paged cache is not. Concurrent requests wait for each
other; nothing else differs, the sampler is the same.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

import torch

from bitnest.packed.kv_cache import open_cache
from bitnest.serve.backend import BackendStopped, Deliver, Job, Update
from bitnest.serve.sampling import force_sampled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bitnest.formats.kv import KVFormat


class Cancelled(Exception):
    """Raised inside `generate` to leave it when its job was cancelled."""


class _Sampler:
    """A logits processor after which the arg max is the sampled token."""

    def __init__(self, job: Job) -> None:
        self._samplings = [job.sampling]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return force_sampled(scores, self._samplings, [input_ids.shape[1]])


class _Streamer:
    """Receives the prompt, then every token, from `generate`."""

    def __init__(self, deliver: Deliver, cancelled: threading.Event) -> None:
        self._deliver = deliver
        self._cancelled = cancelled
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        if self._prompt_seen:
            self._deliver(Update(tuple(int(i) for i in value.reshape(-1))))
        self._prompt_seen = True

    def end(self) -> None:
        """Part of the streamer protocol; the worker itself reports the end."""


class GenerateBackend:
    """A worker thread around `model.generate`."""

    name = "generate"
    max_context: int | None = None

    def __init__(
        self, model: PreTrainedModel, end_ids: tuple[int, ...], *, kv: KVFormat | None = None
    ) -> None:
        """kv: format of every job's KV cache, None for the model's own.

        Raises:
            UnsupportedModel: a family whose cache cannot be quantised.
        """
        self._model: Any = model
        self._kv = kv
        if kv is not None:
            open_cache(model, kv)  # refused, and its rotations found, before the first job
        self._end_ids = end_ids
        self._jobs: queue.Queue[tuple[Job, Deliver] | None] = queue.Queue()
        self._cancelled: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin; no memory is taken before the first job."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="generate", daemon=True)
            self._thread.start()

    def submit(self, job: Job, deliver: Deliver) -> None:
        """Queue `job`."""
        with self._lock:
            if self._stopped or self._thread is None:
                raise BackendStopped("the generation thread is not running")
            self._cancelled[job.id] = threading.Event()
            self._jobs.put((job, deliver))

    def cancel(self, job_id: str) -> None:
        """End a job at its next token, or before it begins."""
        with self._lock:
            event = self._cancelled.get(job_id)
        if event is not None:
            event.set()

    def alive(self) -> bool:
        """Whether the worker runs."""
        return not self._stopped and self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Cancel everything and wait a few seconds for the worker."""
        with self._lock:
            self._stopped = True
            for event in self._cancelled.values():
                event.set()
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, deliver = item
            cancelled = self._cancelled[job.id]
            try:
                if not cancelled.is_set():
                    self._generate(job, deliver, cancelled)
                    deliver(Update(finished=True))
            except Cancelled:
                deliver(Update(error="the request was cancelled"))
            except Exception as error:  # noqa: BLE001  the thread must outlive any model error
                deliver(Update(error=f"{type(error).__name__}: {error}"))
            finally:
                with self._lock:
                    del self._cancelled[job.id]

    @torch.no_grad()
    def _generate(self, job: Job, deliver: Deliver, cancelled: threading.Event) -> None:
        from transformers import GenerationConfig

        # `generate` fills what a config leaves open from the model's own, which may penalise.
        own = self._model.generation_config
        ends = list(self._end_ids) or None
        neutral = GenerationConfig(
            max_new_tokens=job.max_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self._end_ids[0] if ends else 0,
        )
        ids = torch.tensor([job.prompt], device=self._model.device)
        cache = {} if self._kv is None else {"past_key_values": open_cache(self._model, self._kv)}
        self._model.generation_config = neutral
        try:
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=neutral,
                logits_processor=[_Sampler(job)],
                streamer=_Streamer(deliver, cancelled),
                **cache,
            )
        finally:
            self._model.generation_config = own
