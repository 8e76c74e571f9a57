"""An OpenAI-compatible server for one model.

    GET  /health               200 while requests are taken, 503 otherwise
    GET  /v1/models
    POST /v1/completions       JSON, or server-sent events with "stream": true
    POST /v1/chat/completions  the same

`create_app` is the application; `bitnest.serve.run` puts it on a port. Errors have OpenAI's body:
400 for input, 401 for a wrong key, 404 for another model's name, 503 when the queue is full or the
server is stopping. A client that goes away cancels its generation.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from bitnest.errors import UnsupportedModel, require

require("fastapi", "serve")

from fastapi import Depends, FastAPI, Request  # noqa: E402
from fastapi.responses import JSONResponse, Response, StreamingResponse  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402

from bitnest import __version__  # noqa: E402
from bitnest.serve.backend import Backend, end_of_sequence_ids  # noqa: E402
from bitnest.serve.protocol import (  # noqa: E402
    ApiError,
    ChatRequest,
    CompletionRequest,
    Kind,
    Shape,
    event,
    parse,
    usage,
)
from bitnest.serve.service import Answer, Service  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bitnest.formats.kv import KVFormat

BackendName = Literal["auto", "native", "continuous", "generate"]

_MAX_BODY = 32 * 2**20
_DISCONNECT_POLL = 0.2  # seconds between looks at whether a waiting client is still there
T = TypeVar("T")


def make_backend(
    name: BackendName,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_tokens: int = 32768,
    kv: KVFormat | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Backend:
    """The backend called `name`, not started; `generate` where kv says how the cache is stored.
    `auto`: `native` where the C runtime takes the model, `continuous` elsewhere; says why.

    Raises:
        UnsupportedModel: a family whose cache cannot be quantised; `native`, and the runtime does
            not take the model.
    """
    ends = end_of_sequence_ids(model, tokenizer)
    if name in {"auto", "native"} and kv is None:
        from bitnest.packed.native_families import NotNative
        from bitnest.packed.native_model import NativeModel
        from bitnest.serve.backend_native import NativeBackend

        try:
            return NativeBackend(model, NativeModel.of(model), ends)
        except NotNative as error:
            if name == "native":
                raise UnsupportedModel(
                    f"the native runtime does not take this model: {error}",
                    where="--backend native",
                    hint="--backend continuous",
                ) from error
            say(f"not by the native runtime: {error}")
    if name == "generate" or kv is not None:
        from bitnest.serve.backend_generate import GenerateBackend

        return GenerateBackend(model, ends, kv=kv)
    from bitnest.serve.backend_continuous import ContinuousBackend

    return ContinuousBackend(model, ends, cache_tokens=cache_tokens)


def create_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_name: str,
    api_key: str | None = None,
    backend: Backend | BackendName = "continuous",
    cache_tokens: int = 32768,
    max_pending: int = 256,
) -> FastAPI:
    """The application serving `model` under `model_name`.

    api_key: what clients must send as a bearer token; None lets everyone in.
    backend: `continuous` batches requests, `generate` runs one after the other on any model.
    cache_tokens: tokens the continuous backend's cache holds, over all requests.
    max_pending: requests running or waiting before new ones get a 503.

    `app.state.service` is the `Service` behind it. The backend starts with the application, unless
    it was started before.
    """
    engine = (
        make_backend(backend, model, tokenizer, cache_tokens=cache_tokens)
        if isinstance(backend, str)
        else backend
    )
    ends = end_of_sequence_ids(model, tokenizer)
    service = Service(model, tokenizer, engine, ends=ends, max_pending=max_pending)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.start)
        yield
        service.closing = True
        service.end_all()
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="bitnest", version=__version__, lifespan=lifespan)
    app.state.service = service
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)

    async def health() -> Response:
        status = "ok" if service.healthy else "unavailable"
        return JSONResponse({"status": status}, 200 if service.healthy else 503)

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(model_name, service)]})

    async def one_model(name: str) -> Response:
        _check_model(name, model_name)
        return JSONResponse(_model_card(model_name, service))

    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        _check_model(asked.model, model_name)
        answers = service.open(service.completion_prompts(asked), asked, asked.max_tokens)
        return await _respond(request, "completion", answers, asked, model_name)

    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        _check_model(asked.model, model_name)
        answers = service.open([service.chat_prompt(asked)], asked, asked.token_limit())
        return await _respond(request, "chat", answers, asked, model_name)

    open_to_all: dict[str, Any] = {"response_model": None}
    locked = open_to_all | {"dependencies": [Depends(_key_check(api_key))]}
    app.add_api_route("/health", health, methods=["GET"], **open_to_all)
    app.add_api_route("/v1/models", models, methods=["GET"], **locked)
    app.add_api_route("/v1/models/{name:path}", one_model, methods=["GET"], **locked)
    app.add_api_route("/v1/completions", completions, methods=["POST"], **locked)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], **locked)
    return app


def _model_card(name: str, service: Service) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": 0, "owned_by": "bitnest"}
    return card | ({"max_model_len": service.context} if service.context else {})


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        message = f"the model '{asked}' does not exist; this server has '{served}'"
        raise ApiError(404, message, param="model", code="model_not_found")


def _key_check(api_key: str | None) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), api_key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "wrong or missing API key; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY:
            raise ApiError(413, f"the body is larger than {_MAX_BODY} bytes")
    return bytes(body)


async def _respond(
    request: Request,
    kind: Kind,
    answers: list[Answer],
    asked: CompletionRequest | ChatRequest,
    model_name: str,
) -> Response:
    prefix = "chatcmpl" if kind == "chat" else "cmpl"
    shape = Shape(kind, f"{prefix}-{secrets.token_hex(12)}", model_name)
    try:
        include_usage = asked.include_usage()
        if asked.stream:
            events = _events(answers, shape, chat=kind == "chat", include_usage=include_usage)
            return _ClosingStream(events, answers)
        texts = await _until_disconnect(request, asyncio.gather(*(_text(a) for a in answers)))
    except BaseException:
        _close(answers)
        raise
    _close(answers)
    if texts is None:
        return Response(status_code=499)  # nobody is there to read it
    choices = [(text, a.finish_reason) for text, a in zip(texts, answers, strict=True)]
    return JSONResponse(shape.whole(choices, _usage(answers)))


class _ClosingStream(StreamingResponse):
    """Server-sent events whose answers are closed however the response ends."""

    def __init__(self, events: AsyncIterator[str], answers: list[Answer]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _close(self._answers)


async def _text(answer: Answer) -> str:
    return "".join([text async for text in answer])


def _close(answers: list[Answer]) -> None:
    for answer in answers:
        answer.close()


def _usage(answers: list[Answer]) -> dict[str, int]:
    prompt = sum(len(answer.job.prompt) for answer in answers)
    return usage(prompt, sum(answer.completion_tokens for answer in answers))


async def _until_disconnect(request: Request, work: asyncio.Future[T]) -> T | None:
    """The result of `work`, or None when the client left first."""
    try:
        while not work.done():
            await asyncio.wait([work], timeout=_DISCONNECT_POLL)
            if not work.done() and await request.is_disconnected():
                return None
        return work.result()
    finally:
        work.cancel()
        with suppress(asyncio.CancelledError, ApiError):
            await work


async def _events(
    answers: list[Answer], shape: Shape, *, chat: bool, include_usage: bool
) -> AsyncIterator[str]:
    """The chunks of all answers as they come, then usage, then `[DONE]`."""
    chunks: asyncio.Queue[dict[str, Any] | ApiError | None] = asyncio.Queue()

    async def pump(index: int, answer: Answer) -> None:
        try:
            if chat:
                chunks.put_nowait(shape.chunk(index, "", first=True))
            async for text in answer:
                chunks.put_nowait(shape.chunk(index, text))
            chunks.put_nowait(shape.chunk(index, None, answer.finish_reason))
        except ApiError as error:
            chunks.put_nowait(error)
        finally:
            chunks.put_nowait(None)

    pumps = [asyncio.create_task(pump(i, answer)) for i, answer in enumerate(answers)]
    try:
        left = len(pumps)
        while left:
            chunk = await chunks.get()
            if chunk is None:
                left -= 1
            elif isinstance(chunk, ApiError):
                yield event(chunk.body())
                return
            else:
                yield event(chunk)
        if include_usage:
            yield event(shape.usage_chunk(_usage(answers)))
        yield event("[DONE]")
    finally:
        for task in pumps:
            task.cancel()
