"""Between HTTP and a backend: prompts become token ids, tokens become text, limits are kept.

One `Service` lives in one asyncio loop. An `Answer` is one running sequence: iterating it yields
text that may be sent; afterwards it knows its finish reason and its token count. Whoever opens an
answer closes it, which cancels what still runs.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from bitnest.serve.backend import Backend, BackendStopped, Job, Update
from bitnest.serve.protocol import ApiError, ChatRequest, CompletionRequest
from bitnest.serve.sampling import Sampling
from bitnest.serve.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_CHAT_TOKENS = 4096  # default for a conversation with a model that states no limit
_SHUTDOWN = "the server is shutting down"


class Answer:
    """One sequence being generated."""

    def __init__(self, service: Service, job: Job, text: TextStream, ends: frozenset[int]) -> None:
        self._service = service
        self._text = text
        self._ends = ends
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.job = job
        self.finish_reason = "length"
        self.completion_tokens = 0

    def deliver(self, update: Update) -> None:
        """Called from the backend's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._updates.put_nowait, update)

    async def __aiter__(self) -> AsyncIterator[str]:
        while True:
            update = await self._updates.get()
            text = "".join(self._take(token) for token in update.tokens)
            if update.finished and not self._text.stopped:
                text += self._text.finish()
            if self._text.stopped:
                self.finish_reason = "stop"
            if text:
                yield text
            if self._text.stopped or update.finished:
                return
            if update.error is not None:
                status = 503 if self._service.closing else 500
                message = _SHUTDOWN if self._service.closing else update.error
                raise ApiError(status, message, code="generation_failed")

    def _take(self, token: int) -> str:
        if self._text.stopped:  # tokens that came with the one that completed a stop string
            return ""
        self.completion_tokens += 1
        if token in self._ends:
            self.finish_reason = "stop"
            return ""
        return self._text.push(token)

    def close(self) -> None:
        """Give the place back and cancel what still runs."""
        self._service.release(self)


class Service:
    """Everything a route needs, without HTTP."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        backend: Backend,
        *,
        ends: Sequence[int],
        max_pending: int,
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._backend = backend
        self._ends = frozenset(ends)
        self._max_pending = max_pending
        self._running: dict[str, Answer] = {}
        self._defaults = default_sampling(model.generation_config)
        config = model.config.get_text_config()
        self._vocabulary = int(config.vocab_size)
        limits = [getattr(config, "max_position_embeddings", None), backend.max_context]
        known = [int(limit) for limit in limits if limit]
        self.context = min(known) if known else None
        self.closing = False

    @property
    def healthy(self) -> bool:
        """Whether new requests would be taken."""
        return self._backend.alive() and not self.closing

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        request: CompletionRequest | ChatRequest,
        limit: int | None,
    ) -> list[Answer]:
        """Start one answer per prompt, all or none.

        Raises:
            ApiError: 400 for prompts that do not fit, 503 when there is no place.
        """
        stops = request.stops()
        jobs = [self._job(prompt, request, limit) for prompt in prompts]
        if not self.healthy:
            why = _SHUTDOWN if self.closing else "the generation thread has stopped"
            raise ApiError(503, why, code="unavailable")
        if len(self._running) + len(jobs) > self._max_pending:
            message = f"{len(self._running)} requests are already running or waiting"
            raise ApiError(503, message, code="queue_full", headers={"Retry-After": "1"})
        answers: list[Answer] = []
        try:
            for job in jobs:
                text = TextStream(self._tokenizer, job.prompt, stops)
                answer = Answer(self, job, text, self._ends)
                self._backend.submit(job, answer.deliver)
                self._running[job.id] = answer
                answers.append(answer)
        except BackendStopped as error:
            for answer in answers:
                answer.close()
            raise ApiError(503, str(error), code="unavailable") from error
        return answers

    def _job(
        self, prompt: Sequence[int], request: CompletionRequest | ChatRequest, limit: int | None
    ) -> Job:
        if not prompt:
            raise ApiError(400, "the prompt is empty", param="prompt")
        room = None if self.context is None else self.context - len(prompt)
        if room is not None and (room < 1 or (limit or 1) > room):
            asked = f" and {limit} new ones were asked for" if limit else ""
            raise ApiError(
                400,
                f"the context holds {self.context} tokens, but the prompt has {len(prompt)}{asked}",
                param="prompt" if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        if limit is None:
            chat = isinstance(request, ChatRequest)
            default = (room or _CHAT_TOKENS) if chat else _COMPLETION_TOKENS
            limit = default if room is None else min(default, room)
        given = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        chosen = {name: value for name, value in given.items() if value is not None}
        seed = request.seed if request.seed is not None else secrets.randbits(63)
        sampling = Sampling(**(self._defaults | chosen), seed=seed)
        return Job(secrets.token_hex(12), tuple(prompt), limit, sampling)

    def release(self, answer: Answer) -> None:
        """Forget an answer, cancelling it if it runs."""
        if self._running.pop(answer.job.id, None) is not None:
            self._backend.cancel(answer.job.id)

    def end_all(self) -> None:
        """End every running answer with an error; part of shutting down."""
        for answer in list(self._running.values()):
            answer.deliver(Update(error=_SHUTDOWN))

    def completion_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of every prompt of a completion request."""
        return [
            self._tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else self._checked(prompt)
            for prompt in request.prompts()
        ]

    def _checked(self, ids: list[int]) -> list[int]:
        for token in ids:
            if not 0 <= token < self._vocabulary:
                raise ApiError(
                    400, f"token id {token} is not in 0..{self._vocabulary - 1}", param="prompt"
                )
        return ids

    def chat_prompt(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation, by the model's own chat template."""
        from jinja2 import TemplateError

        if not getattr(self._tokenizer, "chat_template", None):
            raise ApiError(
                400,
                "this model has no chat template, so it cannot hold a conversation; "
                "use /v1/completions instead",
                code="no_chat_template",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                request.plain_messages(),
                tokenize=False,
                add_generation_prompt=True,
                **(request.chat_template_kwargs or {}),
            )
        except (TemplateError, TypeError, ValueError) as error:
            message = f"the chat template refuses these messages: {error}"
            raise ApiError(400, message, param="messages") from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def default_sampling(generation_config: Any) -> dict[str, Any]:
    """What a request gets that names no sampling: the model's own, if it samples, else OpenAI's."""
    if getattr(generation_config, "do_sample", None):
        names = ("temperature", "top_p", "top_k")
        own = {name: getattr(generation_config, name, None) for name in names}
        return {"temperature": 1.0} | {name: v for name, v in own.items() if v is not None}
    return {"temperature": 1.0}
