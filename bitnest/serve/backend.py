"""What a backend is: something that turns token ids into token ids, many requests at a time.

A backend knows nothing about text, HTTP or asyncio. `submit` hands it a `Job` and a callback; the
callback is called from the backend's own thread with every batch of new tokens, the last time with
`finished` set or with an `error`. Three exist: `native` (the C runtime, on CPUs, for families that
it knows), `continuous` (transformers' continuous batching) and `generate` (one `model.generate` at
a time, which every model supports).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from bitnest.serve.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """One sequence to continue."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Update:
    """News of one job: tokens since the last update, the end-of-sequence token included."""

    tokens: tuple[int, ...] = ()
    finished: bool = False
    error: str | None = None


Deliver = Callable[[Update], None]


class BackendStopped(Exception):
    """The backend takes no more jobs: it was stopped, or its thread died."""


class Backend(Protocol):
    """Runs jobs. Every method may be called from any thread."""

    name: str
    max_context: int | None  # most tokens of prompt and answer together; None: only the model's

    def start(self) -> None:
        """Take memory and begin. Starting twice is starting once."""

    def submit(self, job: Job, deliver: Deliver) -> None:
        """Queue `job`. Raises `BackendStopped`."""

    def cancel(self, job_id: str) -> None:
        """End a job early; nothing is delivered for it any more. Unknown ids are ignored."""

    def alive(self) -> bool:
        """Whether jobs are being served."""

    def stop(self) -> None:
        """End all jobs with an error and give the thread back."""


def end_of_sequence_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Tokens that end an answer: of the generation config, else the model, else the tokenizer."""
    for source in (model.generation_config, model.config, tokenizer):
        ids: Any = getattr(source, "eos_token_id", None)
        if ids is None:
            continue
        listed = [int(i) for i in (ids if isinstance(ids, list | tuple) else [ids])]
        return tuple(i for i in listed if i >= 0)
    return ()
