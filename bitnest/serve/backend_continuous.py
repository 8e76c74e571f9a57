"""The `continuous` backend: transformers' continuous batching, with bitnest's sampler in it.

The manager runs the model in its own thread over a paged cache; requests join and leave the batch
at every step. A second thread reads the manager's output queue and hands tokens to their jobs.

What is set, and why:
- Attention: the model's own, `sdpa` or `eager` on a CPU (the manager pages it by itself).
- The cache is sized here (`cache_tokens`), because on a CPU the default is 60 % of the free memory.
- The manager takes the arg max, and its logits processor is replaced by `_BatchSampler`: its own
  sampling knows neither seeds nor greedy requests beside sampled ones. The sampler looks at the
  batch on the host, so CUDA graphs and asynchronous batching are off.

- Nothing else may run the model meanwhile: transformers passes settings of one forward through the
  model's shared config (`is_causal`), where two threads would leave them behind.

Left out on purpose: models whose layers the paged cache does not know (linear attention, state
space); `start` refuses them and names the other backend.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bitnest.errors import UnsupportedModel
from bitnest.serve.backend import BackendStopped, Deliver, Job, Update
from bitnest.serve.sampling import Sampling, force_sampled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PAGE = 256  # tokens per cache block, the manager's default
_SLACK_BLOCKS = 8  # models that mix attention kinds lose part of a block per kind
_GREEDY = Sampling()


class _BatchSampler:
    """Stands in for the manager's logits processor list: one `Sampling` per row of the batch.

    Before every step the manager calls `prepare_tensor_args` with the batch it has just laid out,
    and during the step calls the object with the logits of the requests that get a new token.
    """

    tensors_required = 0  # it keeps its arguments on the host
    do_processing = True

    def __init__(self, samplings: dict[str, Sampling]) -> None:
        self._by_id = samplings
        self._rows: list[Sampling] = []
        self._positions: list[int] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Sampling does not travel through the manager, so nothing may be passed to it."""
        if kwargs:
            raise ValueError(f"unexpected sampling arguments: {sorted(kwargs)}")

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """No tensors, no defaults."""

    def prepare_tensor_args(
        self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor
    ) -> torch.Tensor:
        """Note how each request with a new token samples, and at which position."""
        states = [request.state for request in requests_in_batch if request.has_new_token]
        # A cancelled job may be in one more batch: its tokens go nowhere.
        self._rows = [self._by_id.get(state.request_id, _GREEDY) for state in states]
        self._positions = [state.position_offset for state in states]
        return arg_storage

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        return force_sampled(scores, self._rows, self._positions)


class ContinuousBackend:
    """A continuous batching manager and the thread that reads from it."""

    name = "continuous"

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: tuple[int, ...],
        *,
        cache_tokens: int = 32768,
        max_batch_tokens: int = 2048,
        max_batch_requests: int = 64,
    ) -> None:
        self._model: Any = model
        self._end_ids = list(end_ids) or [-1]
        self._blocks = max(1, math.ceil(cache_tokens / _PAGE))
        self.max_context: int | None = self._blocks * _PAGE
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_requests = max_batch_requests
        self._lock = threading.Lock()
        self._jobs: dict[str, tuple[Deliver, int]] = {}  # callback, tokens already delivered
        self._samplings: dict[str, Sampling] = {}
        self._manager: Any = None
        self._reader: threading.Thread | None = None
        self._stopped = False

    def start(self) -> None:
        """Allocate the cache and start both threads.

        Raises:
            UnsupportedModel: continuous batching cannot run this model here.
        """
        if self._manager is not None:
            return
        try:
            manager = self._new_manager()
            manager.warmup()  # allocates the cache here, where an error can still be told
        except (ValueError, AttributeError, NotImplementedError, MemoryError, KeyError) as error:
            raise self._unsupported(error) from error
        manager.start()
        self._manager = manager
        self._reader = threading.Thread(target=self._read, name="continuous-reader", daemon=True)
        self._reader.start()
        self._probe()

    def _probe(self) -> None:
        """Generate two tokens: some families are only found out by the first forward pass."""
        news: queue.Queue[Update] = queue.Queue()
        library_log = logging.getLogger("ContinuousBatchingLogger")
        level = library_log.level
        library_log.setLevel(logging.CRITICAL + 1)  # its traceback says nothing the error does not
        try:
            self.submit(Job("probe", (0, 0), 2), news.put)
            while not (update := news.get()).finished:
                if update.error is not None:
                    self.stop()
                    raise self._unsupported(update.error)
        finally:
            library_log.setLevel(level)

    def _unsupported(self, why: object) -> UnsupportedModel:
        return UnsupportedModel(
            f"continuous batching cannot run this model: {why}",
            where=type(self._model).__name__,
            hint="serve it with --backend generate, or with a smaller --cache-tokens if memory is "
            "what is missing",
        )

    def _new_manager(self) -> Any:
        from dataclasses import fields

        from transformers import ContinuousBatchingConfig, GenerationConfig

        if not hasattr(self._model, "init_continuous_batching"):
            raise NotImplementedError("the model class has no continuous batching")
        layer_types = getattr(self._model.config.get_text_config(), "layer_types", None)
        mixed = len(set(layer_types or [])) > 1
        options = {
            "num_blocks": self._blocks + (_SLACK_BLOCKS if mixed else 0),
            "max_batch_tokens": self._max_batch_tokens,
            "max_requests_per_batch": self._max_batch_requests,
            "use_cuda_graph": False,
            "use_async_batching": False,
        }
        # Newer releases look for flash attention kernels on the network unless told not to.
        if any(f.name == "auto_switch_to_flash" for f in fields(ContinuousBatchingConfig)):
            options["auto_switch_to_flash"] = False
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=self._end_ids),
            continuous_batching_config=ContinuousBatchingConfig(**options),
        )
        manager.logit_processor = _BatchSampler(self._samplings)
        return manager

    def submit(self, job: Job, deliver: Deliver) -> None:
        """Queue `job`."""
        with self._lock:
            if self._stopped or self._manager is None:
                raise BackendStopped("the generation thread is not running")
            self._jobs[job.id] = (deliver, 0)
            self._samplings[job.id] = job.sampling
            accepted = self._manager.add_request(
                list(job.prompt),
                request_id=job.id,
                max_new_tokens=job.max_tokens,
                streaming=True,
                eos_token_id=self._end_ids,
            )
            if accepted is None:
                self._forget(job.id)
                raise BackendStopped("the generation thread is stopping")

    def _forget(self, job_id: str) -> tuple[Deliver, int] | None:
        self._samplings.pop(job_id, None)
        return self._jobs.pop(job_id, None)

    def cancel(self, job_id: str) -> None:
        """Take a job out of the batch."""
        with self._lock:
            if self._forget(job_id) is not None and self._manager is not None:
                self._manager.cancel_request(job_id)

    def alive(self) -> bool:
        """Whether the manager's thread runs."""
        return not self._stopped and self._manager is not None and self._manager.is_running()

    def stop(self) -> None:
        """End all jobs and both threads."""
        with self._lock:
            self._stopped = True
            manager = self._manager
        if manager is None:
            return
        manager.stop(block=True, timeout=5, hard_stop=True)
        if self._reader is not None:
            self._reader.join(timeout=5)

    def _read(self) -> None:
        """Hand every output to its job until the manager's thread has ended."""
        while True:
            running = self._manager.is_running()
            output = self._manager.get_result(timeout=0.1)
            if output is not None:
                self._dispatch(output)
            elif not running:
                break
        with self._lock:
            self._stopped = True
            left = [deliver for deliver, _ in self._jobs.values()]
            self._jobs.clear()
            self._samplings.clear()
        for deliver in left:
            deliver(Update(error="the generation thread ended"))

    def _dispatch(self, output: Any) -> None:
        tokens: list[int] = output.generated_tokens  # all so far, not only the new ones
        finished = output.is_finished()
        with self._lock:
            entry = self._jobs.get(output.request_id)
            if entry is None:
                return
            deliver, delivered = entry
            if finished:
                self._forget(output.request_id)
            else:
                self._jobs[output.request_id] = (deliver, len(tokens))
        deliver(Update(tuple(tokens[delivered:]), finished and output.error is None, output.error))
