"""The OpenAI wire format: what a request may hold, and the shapes of answers and errors.

Every parameter is either honoured, or refused by name with status 400, or known to change nothing
in the answer (`_NO_EFFECT`). None is ignored. Extensions beyond OpenAI's: `top_k`, and
`chat_template_kwargs` for templates with switches such as `enable_thinking`.

Left out on purpose: tools, images and audio, log probabilities, several choices per prompt,
penalties, structured output, the Responses API.
"""

from __future__ import annotations

import json
import time
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_STOPS = 16

# Neutral values of parameters that are otherwise refused.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Bookkeeping for OpenAI's own platform.
_NO_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)


class ApiError(Exception):
    """An error the client is told about, in OpenAI's body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}` as OpenAI's clients expect it."""
        kind = {401: "authentication_error", 500: "server_error", 503: "server_error"}
        return {
            "error": {
                "message": self.message,
                "type": kind.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings, checked."""
        listed = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        if len(listed) > MAX_STOPS:
            raise ApiError(
                400, f"at most {MAX_STOPS} stop strings, not {len(listed)}", param="stop"
            )
        if "" in listed:
            raise ApiError(400, "a stop string may not be empty", param="stop")
        return tuple(listed)

    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream", param="stream_options")
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per choice."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "the prompt is an empty list", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None

    def token_limit(self) -> int | None:
        """The limit on new tokens under either of its names."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise ApiError(
                400, "max_tokens and max_completion_tokens disagree", param="max_completion_tokens"
            )
        return new if new is not None else old

    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages with every content a string."""
        return [_plain(index, message) for index, message in enumerate(self.messages)]


def _plain(index: int, message: dict[str, Any]) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise ApiError(400, f"{where} has no role", param=where)
    unknown = set(message) - {"role", "content", "name", "refusal"}
    if any(message[key] is not None for key in unknown):
        raise ApiError(400, f"{where} holds {sorted(unknown)}: not supported", param=where)
    content = message.get("content")
    if isinstance(content, list):
        if any(not isinstance(p, dict) or not isinstance(p.get("text"), str) for p in content):
            raise ApiError(400, f"{where}: only text content is supported", param=where)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{where} has no text content", param=where)
    plain = {"role": message["role"], "content": content}
    return plain | ({"name": message["name"]} if message.get("name") else {})


R = TypeVar("R", bound=_Request)


def parse(kind: type[R], raw: bytes) -> R:
    """The checked request in `raw`.

    Raises:
        ApiError: 400, naming the parameter.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, neutral in _REFUSED.items():
        value = body.pop(name, None)
        if value is not None and not any(_same(value, n) for n in neutral):
            raise ApiError(400, f"{name} is not supported by this server", param=name)
    for name in _NO_EFFECT:
        body.pop(name, None)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown parameter '{param}'", param=param) from error
        raise ApiError(400, f"{param}: {first['msg']}", param=param) from error


def _same(value: Any, neutral: Any) -> bool:
    # 0 == False in Python, but `logprobs: 0` still asks for log probabilities.
    return bool(isinstance(value, bool) == isinstance(neutral, bool) and value == neutral)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


Kind = Literal["completion", "chat"]


class Shape:
    """Builds the bodies of one answer, whole or in chunks."""

    def __init__(self, kind: Kind, answer_id: str, model: str) -> None:
        self._chat = kind == "chat"
        self._head = {"id": answer_id, "created": int(time.time()), "model": model}

    def whole(self, choices: list[tuple[str, str]], counts: dict[str, int]) -> dict[str, Any]:
        """The body of a finished answer; `choices` holds text and finish reason."""
        listed = []
        for index, (text, reason) in enumerate(choices):
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self._chat else {"text": text}
            listed.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        name = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": name, "choices": listed, "usage": counts}

    def chunk(
        self, index: int, text: str | None, reason: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        """One chunk of one choice."""
        delta: dict[str, str] = {"role": "assistant"} if first else {}
        if text is not None:
            delta["content"] = text
        said = {"delta": delta} if self._chat else {"text": text or ""}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._chunk_name(), "choices": [choice]}

    def usage_chunk(self, counts: dict[str, int]) -> dict[str, Any]:
        """The last chunk when `stream_options.include_usage` is set."""
        return {**self._head, "object": self._chunk_name(), "choices": [], "usage": counts}

    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"


def event(body: dict[str, Any] | str) -> str:
    """A server-sent event."""
    data = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    return f"data: {data}\n\n"
