"""Conversations in data sets, and the text that the model's own chat template makes of them.

A row holds one under `messages`, as [{"role": ..., "content": ...}], or under `conversations`, as
[{"from": "human", "value": ...}]. Content may be a list of text parts. What else a message holds
(`tool_calls`, `name`) goes to the template as it is.

The template is Jinja, run in transformers' sandbox. It writes the special tokens into the text,
where the tokenizer finds them again; none are added after. Templates that print today's date print
`TODAY`, so that the same data are the same tokens tomorrow: a macro in front of the template takes
the place of transformers' `strftime_now`.

Left out: a row's `tools`, images and sound, and prompt/completion or instruction/output pairs,
which no template is agreed for.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from bitnest.errors import DataError

__all__ = ["FIELDS", "TODAY", "Conversation", "check_template", "find_conversation", "render"]

Conversation = list[dict[str, Any]]
"""Messages in order, each with `role` and `content`."""

FIELDS = ("messages", "conversations")
TODAY = datetime(2024, 7, 26)
_DATE = {"-d": str(TODAY.day), **{code: TODAY.strftime(f"%{code}") for code in "aAbBdHIjmMpSyY"}}
_CALENDAR = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{value}')" for code, value in _DATE.items())
    + " }}{% endmacro %}{{ '' }}"
)
_ROLES = {"human": "user", "gpt": "assistant"}
_SPELLING = 'a message reads {"role": "user", "content": "..."} or {"from": "human", "value": ...}'


def find_conversation(row: Mapping[str, Any], where: str) -> Conversation | None:
    """The conversation in `row`, with roles as templates know them; None if it holds none.

    Raises:
        DataError: it is not a list of messages, or a message has no role or no text.
    """
    name = next((field for field in FIELDS if row.get(field) is not None), None)
    if name is None:
        return None
    if not isinstance(row[name], list):
        raise DataError(f"field '{name}' is not a list of messages", where=where, hint=_SPELLING)
    return [_message(entry, where) for entry in row[name]]


def _message(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise DataError("a message is not an object", where=where, hint=_SPELLING)
    known = {key: value for key, value in entry.items() if value is not None}
    role = known.pop("from", None)
    content = known.pop("value", None)
    role = known.pop("role", _ROLES.get(role, role) if isinstance(role, str) else role)
    content = known.pop("content", "" if content is None and "tool_calls" in known else content)
    if not isinstance(role, str) or not role:
        raise DataError("a message has no role", where=where, hint=_SPELLING)
    return {"role": role, "content": _text(content, where), **known}


def _text(content: Any, where: str) -> str:
    """Text of a message: a string, or the text parts of a list, joined."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    if isinstance(content, str):
        return content
    raise DataError("a message without text", where=where, hint=_SPELLING)


def check_template(tokenizer: Any, where: str) -> None:
    """Refuse conversations in `where` when the tokenizer has no chat template.

    Raises:
        DataError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "these are conversations, and the model's tokenizer has no chat template",
            where=where,
            hint="copy chat_template.jinja of the chat model beside the weights, or put the text "
            "to read into field 'text'",
        )


def render(tokenizer: Any, conversation: Conversation, where: str) -> str:
    """The text that the tokenizer's chat template makes of `conversation`; "" of no messages.

    Raises:
        DataError: there is no template, or it refuses the conversation.
    """
    check_template(tokenizer, where)
    if not conversation:
        return ""
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _CALENDAR + template
        return str(
            tokenizer.apply_chat_template(conversation, tokenize=False, chat_template=template)
        )
    except Exception as error:  # whatever the expressions in a template raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the chat template refuses a conversation: {first}",
            where=where,
            hint="its roles and their order: " + ", ".join(m["role"] for m in conversation[:8]),
        ) from error
